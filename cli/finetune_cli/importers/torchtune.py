"""`torchtune`: the importer for the YAML configuration of a torchtune recipe, and for `key=value` overrides, which Kubeflow's TrainJobs also use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune_cli.importers.command_lines import strip_launcher
from finetune_cli.importers.converters import (
    keep_value,
    to_boolean,
    to_choice,
    to_integer,
    to_list_of,
    to_name_list,
    to_number,
)
from finetune_cli.importers.data_sources import DataSource, assign_data_sources, parse_split_fraction
from finetune_cli.importers.documents import iterate_entries, parse_document
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.options import (
    DEVICES_REASON,
    LOADER_REASON,
    SPEED_REASON,
    assign_default_gpus,
    assign_secret_reference,
    make_ignored_options,
    make_refused_options,
    normalise_source_uri,
)
from finetune_cli.importers.sources import assign_output_folder
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import ValueOrigin
from finetune_cli.yaml_reader import parse_value

REPOSITORY_BY_MODEL_BUILDER = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf", "llama2_13b": "meta-llama/Llama-2-13b-hf", "llama2_70b": "meta-llama/Llama-2-70b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B-Instruct", "llama3_70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama3_1_8b": "meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3_1_70b": "meta-llama/Meta-Llama-3.1-70B-Instruct",
    "llama3_1_405b": "meta-llama/Meta-Llama-3.1-405B-Instruct", "llama3_2_1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_2_3b": "meta-llama/Llama-3.2-3B-Instruct", "llama3_3_70b": "meta-llama/Llama-3.3-70B-Instruct", "mistral_7b": "mistralai/Mistral-7B-v0.1",
    "gemma_2b": "google/gemma-2b", "gemma_7b": "google/gemma-7b", "gemma2_2b": "google/gemma-2-2b", "gemma2_9b": "google/gemma-2-9b",
    "gemma2_27b": "google/gemma-2-27b", "phi3_mini": "microsoft/Phi-3-mini-4k-instruct", "phi4_14b": "microsoft/phi-4",
    **{f"qwen2_{size.lower().replace('.', '_')}": f"Qwen/Qwen2-{size}-Instruct" for size in ("0.5B", "1.5B", "7B")},
    **{f"qwen2_5_{size.lower().replace('.', '_')}": f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")},
    **{f"qwen3_{size.lower().replace('.', '_')}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")},
}  # fmt: skip
"""The repository on the hub for each of torchtune's model builders."""
DATASET_BY_BUILDER: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", {}, True), "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", {}, True),
    "instruct_dataset": ("", "instruction", {"question": "input", "answer": "output"}, False), "chat_dataset": ("", "messages", {}, False),
    "preference_dataset": ("", "preference", {}, False), "text_completion_dataset": ("", "plainText", {"text": "text"}, True),
    "grammar_dataset": ("liweili/c4_200m", "instruction", {"question": "input", "answer": "output"}, False),
    "samsum_dataset": ("Samsung/samsum", "instruction", {"question": "dialogue", "answer": "summary"}, False),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt", {}, False),
    "stack_exchange_paired_dataset": (
        "lvwerra/stack-exchange-paired", "preference", {"question": "question", "chosen": "response_j", "rejected": "response_k"}, False),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", "preference", {}, False),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", "plainText", {"text": "article"}, True),
}  # fmt: skip
"""For each of torchtune's data sets: source, format, columns, and whether torchtune trains on all tokens of the data set by default."""
COLUMN_FIELD_BY_NAME = {
    "input": "question",
    "output": "answer",
    "instruction": "question",
    "prompt": "question",
    "chosen": "chosen",
    "rejected": "rejected",
    "text": "text",
}
DATASET_KEYS = (
    "_component_", "source", "split", "packed", "train_on_input", "column_map", "column", "conversation_column", "conversation_style", "new_system_prompt",
    "data_files", "data_dir", "name", "add_eos", "max_seq_len", "split_across_pack", "filter_fn", "subset",
)  # fmt: skip
OPTIMIZER_BY_COMPONENT = {
    "torch.optim.AdamW": "adamw_torch", "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit", "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit", "torchao.optim.AdamW8bit": "adamw_torch_8bit", "torchao.optim.AdamW4bit": "adamw_torch_4bit",
    "torch.optim.SGD": "sgd", "torchao.prototype.low_bit_optim.AdamW8bit": "adamw_torch_8bit",
}  # fmt: skip
SUPPORTED_SCHEDULER = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
FEATURE_BY_LOSS = {"KL": "distillation", "PPO": "PPO", "GRPO": "GRPO of torchtune", "RSOLoss": "the loss RSO"}
TRACKER_BY_LOGGER = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}
MODULE_BY_NAME = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}

OPTION_TABLE: tuple[OptionRow, ...] = (
    OptionRow("model._component_", "model.source", is_set_by_combine=True),
    OptionRow("model.lora_attn_modules", "method.lora.targetModules", to_name_list, is_set_by_combine=True),
    OptionRow("model.apply_lora_to_mlp", "method.lora.targetModules", to_boolean, is_set_by_combine=True),
    OptionRow("model.apply_lora_to_output", "method.lora.targetModules", to_boolean, is_set_by_combine=True),
    OptionRow("model.lora_rank", "method.lora.rank", to_integer(1)),
    OptionRow("model.lora_alpha", "method.lora.alpha", to_number(exclusive_low=0)),
    OptionRow("model.lora_dropout", "method.lora.dropout", to_number(0, exclusive_high=1)),
    OptionRow("model.use_dora", "method.lora.useDora", to_boolean),
    OptionRow("model.quantize_base", "method.type", to_boolean, is_set_by_combine=True),
    OptionRow("checkpointer.checkpoint_dir", "model.source", is_set_by_combine=True),
    OptionRow("tokenizer.max_seq_len", "dataset.maxSequenceLength", to_integer(1)),
    OptionRow("dataset", "dataset.train", keep_value, is_set_by_combine=True),
    OptionRow("dataset_val", "dataset.validation", keep_value, is_set_by_combine=True),
    OptionRow("run_val_every_n_steps", "evaluation.steps", to_integer(1), is_set_by_combine=True),
    OptionRow("batch_size", "training.batchSizePerDevice", to_integer(1)),
    OptionRow("batch_size_val", "evaluation.batchSizePerDevice", to_integer(1), is_set_by_combine=True),
    OptionRow("epochs", "training.epochs", to_integer(1)),
    OptionRow("max_steps_per_epoch", "training.maxSteps", to_integer(1), is_set_by_combine=True),
    OptionRow("num_steps", "training.maxSteps", to_integer(1)),
    OptionRow("gradient_accumulation_steps", "training.gradientAccumulationSteps", to_integer(1)),
    OptionRow("clip_grad_norm", "training.maxGradNorm", to_number(0)),
    OptionRow("seed", "training.seed", to_integer(0, 4294967295)),
    OptionRow("shuffle", convert=to_boolean, is_set_by_combine=True),
    OptionRow("optimizer._component_", "training.optimizer", is_set_by_combine=True),
    OptionRow("optimizer.fused", "training.optimizer", to_boolean, is_set_by_combine=True),
    OptionRow("optimizer.lr", "training.learningRate", to_number(exclusive_low=0)),
    OptionRow("optimizer.weight_decay", "training.weightDecay", to_number(0)),
    OptionRow("optimizer.eps", "training.adamEpsilon", to_number(exclusive_low=0)),
    OptionRow("optimizer.betas", "training.adamBeta1", to_list_of(to_number(0, exclusive_high=1)), is_set_by_combine=True),
    OptionRow("lr_scheduler._component_", "training.scheduler", is_set_by_combine=True),
    OptionRow("lr_scheduler.num_warmup_steps", "training.warmupSteps", to_integer(0)),
    OptionRow("loss._component_", "trainer.type", is_set_by_combine=True),
    OptionRow("loss.beta", "trainer.dpo.beta", to_number(exclusive_low=0), is_set_by_combine=True),
    OptionRow("dtype", "training.mixedPrecision", to_choice({"bf16": "bf16", "fp16": "fp16", "fp32": "no"}), is_set_by_combine=True),
    OptionRow("device", "training.device", to_choice({"cuda": "cuda", "cpu": "cpu", "mps": "mps"}), is_set_by_combine=True),
    OptionRow("enable_activation_checkpointing", "training.gradientCheckpointing", to_boolean, is_set_by_combine=True),
    OptionRow("enable_activation_offloading", "training.gradientCheckpointing", to_boolean, is_set_by_combine=True),
    OptionRow("fsdp_cpu_offload", "distributed.strategy", to_boolean, is_set_by_combine=True),
    OptionRow("fsdp_reshard_after_forward", "distributed.fsdp.sharding", to_boolean, is_set_by_combine=True),
    OptionRow("save_every_n_steps", "checkpoint.steps", to_integer(1)),
    OptionRow("resume_from_checkpoint", convert=to_boolean, no_effect_reason="each attempt of a job resumes from the last checkpoint"),
    OptionRow("output_dir", "output.dir", is_set_by_combine=True),
    OptionRow("metric_logger._component_", "tracking.reportTo", is_set_by_combine=True),
    OptionRow("metric_logger.project", "tracking.wandb.project", is_set_by_combine=True),
    OptionRow("metric_logger.entity", "tracking.wandb.entity", is_set_by_combine=True),
    OptionRow("log_every_n_steps", "tracking.loggingSteps", to_integer(1)),
    *make_ignored_options("the model's repository on the hub has the tokenizer", "tokenizer._component_ tokenizer.path tokenizer.merges_file "
             "tokenizer.special_tokens_path tokenizer.truncation_type"),
    *make_ignored_options("the trainer reads and writes safetensors", "checkpointer._component_ checkpointer.checkpoint_files checkpointer.recipe_checkpoint "
             "checkpointer.output_dir checkpointer.model_type checkpointer.adapter_checkpoint checkpointer.safe_serialization "
             "checkpointer.keep_last_n_checkpoints checkpointer.enable_dcp checkpointer.should_load_recipe_state checkpointer ref_checkpointer "
             "save_adapter_weights_only enable_async_checkpointing save_every_n_epochs"),
    *make_ignored_options(SPEED_REASON, "compile cudnn_deterministic_mode use_flex optimizer_in_bwd ac_mode ac_option low_cpu_ram enable_expandable_segments "
             "custom_sharded_layers fsdp_sharding_strategy data_parallel_replicate_dim data_parallel_shard_dim use_distributed_state_dict "
             "loss.num_output_chunks loss.tiled_linear loss.mask_ignored_tokens loss.ignore_index model.tie_word_embeddings lr_scheduler.last_epoch "
             "optimizer.foreach optimizer.amsgrad"),
    *make_ignored_options(LOADER_REASON, "collate_fn dataloader dataset.parallel_method"),
    *make_ignored_options(DEVICES_REASON, "device_map"),
    *make_ignored_options("the job's log contains these values",
             "log_peak_memory_stats log_level profile_memory metric_logger.log_dir metric_logger.filename metric_logger.group "
             "metric_logger.organize_logs metric_logger.name profiler log_dir"),
    *make_refused_options("a template around messages", "tokenizer.prompt_template", "give --set dataset.chatTemplate.text=TEXT"),
    *make_refused_options("quantisation-aware training", "quantizer fake_quant_after_n_steps"),
    *make_refused_options("distillation", "teacher_model teacher_checkpointer kd_ratio kd_loss"),
    *make_refused_options("PPO", "ppo_epochs ppo_batch_size policy_model reward_and_value_model value_checkpointer reward_checkpointer ref_policy_checkpointer "
             "forward_batch_size "
             "kl_coeff gamma lmbda whiten_rewards penalise_no_eos reward_penalty min_response_length"),
    *make_refused_options("GRPO of torchtune", "grpo_samples grpo_size orchestration inference reward_functions"),
    *make_refused_options("early exit", "early_exit_loss layer_dropout"),
    *make_refused_options("tensor parallelism", "tensor_parallel_dim tensor_parallel_plan", "write 1", 1),
    *make_refused_options("context parallelism", "context_parallel_dim", "write 1", 1),
    *make_refused_options("label smoothing in the sigmoid loss", "loss.label_smoothing"),
    *make_refused_options("a number of cosine cycles other than 0.5", "lr_scheduler.num_cycles", "write 0.5", 0.5),
    *make_refused_options("resizing the embeddings", "resize_token_embeddings", "set model.newTokens with --set"),
    *make_refused_options("generating text or evaluating a model without training", "max_new_tokens tasks prompt top_k temperature"),
)  # fmt: skip
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("training.scheduler", "constant", is_applicable=lambda draft: not draft.has_value("training.warmupSteps")),
    ToolDefault("training.scheduler", "cosine"),
    ToolDefault("training.warmupSteps", 0),
    ToolDefault("training.weightDecay", 0.01, "default of torch.optim.AdamW"),
    ToolDefault("training.maxGradNorm", 0, "the recipe does not clip gradients"),
    ToolDefault("training.gradientCheckpointing", "disabled"),
    ToolDefault("checkpoint.strategy", "epoch", is_applicable=lambda draft: not draft.has_value("checkpoint.steps")),
    ToolDefault("output.layout", "flat", is_applicable=lambda draft: draft.has_value("output.dir")),
)
OPAQUE_PATHS = frozenset({"dataset", "dataset_val", "profiler", "quantizer", "ref_checkpointer", "collate_fn", "dataloader", "teacher_model",
                          "teacher_checkpointer",
                          "kd_loss", "policy_model", "reward_and_value_model", "value_checkpointer", "reward_checkpointer", "ref_policy_checkpointer",
                          "tensor_parallel_plan", "orchestration", "inference", "early_exit_loss", "layer_dropout"})  # fmt: skip


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document names components of torchtune, or the command is `tune run`."""
    return command_words[:2] == ("tune", "run") or any(
        "torchtune." in document.text and "_component_" in document.text for document in documents
    )


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of the files in order, then the overrides."""
    dataset_options: dict[str, dict[str, Any]] = {}
    for document in draft.documents:
        parsed_file = parse_document(document)
        for entry in iterate_entries(document, parsed_file, OPAQUE_PATHS):
            value = resolve_references(entry.value, parsed_file.value)
            if isinstance(value, dict):
                dataset_options[entry.key] = dict(value)
            yield OptionEntry(entry.key, value, entry.origin)
    yield from read_overrides(draft, strip_launcher(draft.request.tool_arguments), dataset_options)


def resolve_references(value: Any, top_level_values: dict[str, Any]) -> Any:
    """Return a value in which each `${name}` is replaced by the value of the top-level key `name`, as OmegaConf does."""
    if isinstance(value, str):
        single_reference = re.match(r"^\$\{(\w+)\}$", value)
        if single_reference:
            return top_level_values.get(single_reference[1])
        return re.sub(r"\$\{(\w+)\}", lambda match: str(top_level_values.get(match[1], match[0])), value)
    return {key: resolve_references(item, top_level_values) for key, item in value.items()} if isinstance(value, dict) else value


def read_overrides(draft: JobDraft, command_words: list[str], dataset_options: dict[str, dict[str, Any]]) -> Iterator[OptionEntry]:
    """Yield the options of `key=value` overrides. Skip the recipe's name and the launcher's options.

    `dataset_options`: the options of `dataset` and `dataset_val` in the file. Overrides of these options are added to this mapping.
    """
    skips_next_word = False
    changed_keys: list[str] = []
    for word in command_words:
        name, equals, value = word.partition("=")
        if (
            skips_next_word
            or word in ("tune", "run")
            or word.endswith(("_distributed", "_single_device"))
            or name.startswith(("--rdzv", "--nnodes", "--nproc"))
        ):
            skips_next_word = not skips_next_word and word.startswith("--") and not equals
        elif word == "--config":
            skips_next_word = True
        elif not equals:
            draft.mistakes.append(Mistake("command line", word, "this word belongs to no option", "write key=value"))
        elif name.partition(".")[0] in ("dataset", "dataset_val"):
            dataset_key, _, option_name = name.partition(".")
            dataset_options.setdefault(dataset_key, {})[option_name or "_component_"] = parse_value(value)
            changed_keys.append(dataset_key)
        else:
            component_groups = {"optimizer", "loss", "model", "tokenizer", "lr_scheduler", "checkpointer", "metric_logger"}
            yield OptionEntry(
                f"{name}._component_" if name in component_groups else name, parse_value(value), ValueOrigin("command line")
            )
    for dataset_key in dict.fromkeys(changed_keys):
        yield OptionEntry(dataset_key, dataset_options[dataset_key], ValueOrigin("command line"))


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options."""
    set_torchtune_options(draft)
    match = re.search(r"--nproc[_-]per[_-]node[= ](\d+)", " ".join(draft.request.tool_arguments))
    if match and int(match[1]) > 1:
        draft.assign_default("resources.gpusPerNode", int(match[1]), "--nproc_per_node")
        draft.assign_default("distributed.strategy", "fsdp", "the recipe for several devices")
    assign_default_gpus(draft)


def set_torchtune_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options of a recipe, except the number of GPUs."""
    _set_model(draft)
    _set_objective(draft)
    _set_data(draft)
    _set_optimizer(draft)
    _set_precision(draft)
    _set_distribution(draft)
    _set_results(draft)


def _set_model(draft: JobDraft) -> None:
    component = str(draft.get("model._component_", "")).rpartition(".")[2]
    checkpoint_folder = draft.get("checkpointer.checkpoint_dir")
    builder_name = re.sub(r"^(lora|qlora)_|_(instruct|base)$", "", component)
    if re.search("vision|multimodal|llama4|classifier", component):
        feature = "classification" if "classifier" in component else "training on images, video or audio"
        draft.refuse_feature("model._component_", feature, is_droppable=False)
        draft.paths_of_invalid_keys["model._component_"] = "model.source"
    elif builder_name in REPOSITORY_BY_MODEL_BUILDER and "model.source" not in draft.request.overrides:
        draft.assign("model.source", REPOSITORY_BY_MODEL_BUILDER[builder_name], "model._component_")
        draft.add_note(
            f"the job loads {REPOSITORY_BY_MODEL_BUILDER[builder_name]} from the hub, and not the files in {checkpoint_folder or 'a folder'}; "
            "give another model with --model URI"
        )
    elif component and "model.source" not in draft.request.overrides:
        draft.add_mistake(
            "model._component_",
            f"the model {component} has no known repository",
            "give --model URI",
            explained_path="model.source",
        )
    if "checkpointer.checkpoint_dir" in draft.given_options:
        draft.add_reason("checkpointer.checkpoint_dir", "no effect: the model comes from model.source")
    is_lora = component.startswith(("lora_", "qlora_"))
    is_quantised = component.startswith("qlora_") or draft.get("model.quantize_base") is True
    if "model._component_" in draft.given_options:
        draft.assign(
            "method.type", "qlora" if is_lora and is_quantised else "lora" if is_lora else "full", "model._component_"
        )
    if "model.quantize_base" in draft.given_options:
        draft.add_reason("model.quantize_base", "included in method.type")
    module_names = [MODULE_BY_NAME.get(name, name) for name in draft.get("model.lora_attn_modules") or []]
    if draft.get("model.apply_lora_to_mlp"):
        module_names += ["gate_proj", "up_proj", "down_proj"]
    for key in ("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output"):
        if key in draft.given_options:
            draft.add_reason(key, "included in method.lora.targetModules")
    if module_names and is_lora:
        draft.assign(
            "method.lora.targetModules",
            module_names,
            "model.lora_attn_modules"
            if "model.lora_attn_modules" in draft.given_options
            else "model.apply_lora_to_mlp",
        )
    if draft.get("model.apply_lora_to_output"):
        draft.refuse_feature(
            "model.apply_lora_to_output",
            "an adapter of the output head",
            "write false, and give --set method.lora.modulesToSave=[lm_head]",
        )


def _set_objective(draft: JobDraft) -> None:
    component = str(draft.get("loss._component_", "")).rpartition(".")[2]
    feature = next((feature for word, feature in FEATURE_BY_LOSS.items() if word in component), None)
    if feature:
        draft.refuse_feature("loss._component_", feature, is_droppable=False)
    elif component == "DPOLoss":
        draft.assign("trainer.type", "dpo", "loss._component_")
    elif component:
        draft.add_reason("loss._component_", "the job trains with the cross entropy")
    if "loss.beta" in draft.given_options:
        if component == "DPOLoss":
            draft.assign("trainer.dpo.beta", draft.get("loss.beta"), "loss.beta")
        else:
            draft.add_reason("loss.beta", "no effect: the loss is not DPOLoss")


def _set_data(draft: JobDraft) -> None:
    dataset_entries = draft.get("dataset")
    if not isinstance(dataset_entries, list):
        dataset_entries = [dataset_entries] if dataset_entries else []
    data_sources = [_read_dataset(draft, "dataset", dataset_entry) for dataset_entry in dataset_entries]
    has_validation = draft.get("run_val_every_n_steps") is not None
    if has_validation and isinstance(draft.get("dataset_val"), dict):
        data_source = _read_dataset(draft, "dataset_val", draft.get("dataset_val"))
        if data_source is not None and data_source.fraction == 1.0 and "dataset.validation" not in draft.request.overrides:
            draft.assign("dataset.validation", data_source.source, "dataset_val")
            draft.assign("evaluation.steps", draft.get("run_val_every_n_steps"), "run_val_every_n_steps")
            if "batch_size_val" in draft.given_options:
                draft.assign("evaluation.batchSizePerDevice", draft.get("batch_size_val"), "batch_size_val")
    for key in ("dataset_val", "batch_size_val", "run_val_every_n_steps"):
        if key in draft.given_options and not any(value.key == key for value in draft.values.values()):
            draft.add_reason(
                key, "no effect: run_val_every_n_steps is not set, or the validation rows are a part of a split"
            )
    assign_data_sources(draft, "dataset", [data_source for data_source in data_sources if data_source is not None])
    if draft.get("shuffle") is False:
        draft.refuse_feature("shuffle", "a fixed order of the rows", "write true")
    elif "shuffle" in draft.given_options:
        draft.add_reason("shuffle", "rows are always shuffled")


def _read_dataset(draft: JobDraft, option_key: str, dataset_entry: Any) -> DataSource | None:
    """Return the data source of one data set, or None if it is refused.

    If the option is `dataset`, also set packing, the system prompt, and whether the loss counts only answers.
    """
    dataset_entry = dataset_entry if isinstance(dataset_entry, dict) else {"_component_": dataset_entry}
    component = str(dataset_entry.get("_component_", "")).rpartition(".")[2]
    if component not in DATASET_BY_BUILDER:
        draft.refuse_feature(
            option_key, f"the data set {component or '(none)'}", "give --data URI and --set dataset.format=FORMAT"
        )
        return None
    source, row_format, columns, trains_on_input = DATASET_BY_BUILDER[component]
    location = draft.given_options[option_key].origin.location
    for name in dataset_entry:
        if name not in DATASET_KEYS:
            draft.add_warning(f"{location}: {option_key}.{name}: this option of a data set is unknown and has no effect")
    for name, feature in (
        ("filter_fn", "a filter for rows in Python"),
        ("name", "a configuration of a data set on the hub"),
        ("subset", "a configuration of a data set on the hub"),
    ):
        if dataset_entry.get(name):
            draft.refuse_feature(option_key, feature, "store the rows that you need in a file, and give --data URI")
    source, data_files = str(dataset_entry.get("source") or source), dataset_entry.get("data_files") or dataset_entry.get("data_dir")
    if source in ("json", "csv", "parquet", "text"):
        source = str(data_files[0] if isinstance(data_files, list) else data_files or "")
    if not source:
        draft.add_mistake(option_key, "the data set has no source", "write source, or give --data URI")
        return None
    columns = dict(columns) | {
        COLUMN_FIELD_BY_NAME[name]: column for name, column in (dataset_entry.get("column_map") or {}).items() if name in COLUMN_FIELD_BY_NAME
    }
    if row_format == "messages" and dataset_entry.get("conversation_column"):
        columns["messages"] = str(dataset_entry["conversation_column"])
    if row_format == "plainText" and dataset_entry.get("column"):
        columns["text"] = str(dataset_entry["column"])
    if option_key == "dataset":
        if "packed" in dataset_entry and row_format != "preference":
            draft.assign("dataset.packing", dataset_entry["packed"] is True, option_key)
        if row_format not in ("plainText", "preference"):
            draft.assign("dataset.responseOnly.enabled", not dataset_entry.get("train_on_input", trains_on_input), option_key)
        if dataset_entry.get("new_system_prompt"):
            draft.assign("dataset.systemPrompt", str(dataset_entry["new_system_prompt"]), option_key)
    fraction = parse_split_fraction(str(dataset_entry.get("split") or "train"))
    if fraction is None and option_key == "dataset":
        draft.refuse_feature(
            option_key,
            f"the split {dataset_entry['split']} of a data set on the hub",
            "store the rows that you need in a file, and give --data URI",
        )
    return DataSource(
        normalise_source_uri(draft, option_key, "dataset.train", source),
        row_format,
        columns,
        None,
        # 0.0 marks validation data of a split that cannot be selected: the caller then ignores this data.
        fraction if fraction is not None else 0.0 if option_key != "dataset" else 1.0,
    )


def _set_optimizer(draft: JobDraft) -> None:
    name = str(draft.get("optimizer._component_", "torch.optim.AdamW"))
    if name not in OPTIMIZER_BY_COMPONENT:
        draft.refuse_feature("optimizer._component_", f"the optimizer {name}", f"write one of {', '.join(OPTIMIZER_BY_COMPONENT)}")
    elif "optimizer._component_" in draft.given_options:
        spec_optimizer = (
            "adamw_torch_fused" if name == "torch.optim.AdamW" and draft.get("optimizer.fused") else OPTIMIZER_BY_COMPONENT[name]
        )
        draft.assign("training.optimizer", spec_optimizer, "optimizer._component_")
    if "optimizer.fused" in draft.given_options:
        draft.add_reason("optimizer.fused", "included in training.optimizer")
    betas = draft.get("optimizer.betas")
    if betas:
        draft.assign("training.adamBeta1", betas[0], "optimizer.betas")
        draft.assign("training.adamBeta2", betas[1], "optimizer.betas")
    scheduler = draft.get("lr_scheduler._component_")
    if scheduler == SUPPORTED_SCHEDULER:
        draft.assign("training.scheduler", "cosine", "lr_scheduler._component_")
    elif scheduler:
        draft.refuse_feature(
            "lr_scheduler._component_", f"the learning rate schedule {scheduler}", f"write {SUPPORTED_SCHEDULER}"
        )
    steps_per_epoch = draft.get("max_steps_per_epoch")
    if steps_per_epoch:
        draft.assign("training.maxSteps", steps_per_epoch * draft.get("epochs", 1), "max_steps_per_epoch")


def _set_precision(draft: JobDraft) -> None:
    dtype = draft.get("dtype")
    if dtype:
        draft.assign("training.mixedPrecision", dtype, "dtype")
        if dtype == "bf16" and draft.value("method.type") == "full":
            draft.assign("model.dtype", "bfloat16", "dtype")
    if draft.get("device") == "cpu":
        draft.assign("resources.gpusPerNode", 0, "device")
    elif draft.get("device") == "mps":
        draft.assign("training.device", "mps", "device")
    elif "device" in draft.given_options:
        draft.add_reason("device", "the job uses GPUs")
    offloads_activations, recomputes_activations = draft.get("enable_activation_offloading"), draft.get("enable_activation_checkpointing")
    for key, mode in (("enable_activation_checkpointing", "enabled"), ("enable_activation_offloading", "unsloth")):
        if draft.get(key):
            draft.assign("training.gradientCheckpointing", mode, key)
        elif key in draft.given_options:
            draft.add_reason(key, "no effect: false turns it off")
    if offloads_activations and recomputes_activations:
        draft.add_reason("enable_activation_checkpointing", "included in training.gradientCheckpointing: unsloth")


def _set_distribution(draft: JobDraft) -> None:
    if "fsdp_reshard_after_forward" in draft.given_options:
        draft.assign("distributed.strategy", "fsdp", "fsdp_reshard_after_forward")
        draft.assign(
            "distributed.fsdp.sharding",
            "fullShard" if draft.get("fsdp_reshard_after_forward") else "shardGradOp",
            "fsdp_reshard_after_forward",
        )
    if draft.get("fsdp_cpu_offload"):
        draft.assign("distributed.strategy", "fsdp", "fsdp_cpu_offload")
        draft.add_warning("fsdp_cpu_offload: with FSDP, the weights stay in GPU memory: use more GPUs")
    elif "fsdp_cpu_offload" in draft.given_options:
        draft.add_reason("fsdp_cpu_offload", "no effect: weights stay on the GPU")


def _set_results(draft: JobDraft) -> None:
    if "output_dir" in draft.given_options:
        assign_output_folder(draft, "output_dir")
        if not draft.has_value("output.dir"):
            draft.add_reason("output_dir", "no effect: results are in the job's storage")
    logger_name = str(draft.get("metric_logger._component_", "")).rpartition(".")[2]
    tracker = TRACKER_BY_LOGGER.get(logger_name)
    if tracker:
        draft.assign("tracking.reportTo", [tracker], "metric_logger._component_")
    elif logger_name:
        draft.add_reason("metric_logger._component_", "metrics are in the job's storage")
    for key in ("metric_logger.project", "metric_logger.entity"):
        if key in draft.given_options and tracker == "wandb":
            draft.assign(draft.given_options[key].option_row.path, draft.get(key), key)
        elif key in draft.given_options:
            draft.add_reason(key, "no effect: wandb gets no metrics")
    if tracker == "wandb":
        assign_secret_reference(draft, "tracking.wandb.apiKeySecretRef", "wandb", "reporting to wandb")


IMPORTER = Importer(
    "torchtune", "torchtune", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options, reports_every_key=True
)
