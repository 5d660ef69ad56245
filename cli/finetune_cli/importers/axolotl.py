"""`axolotl`: the importer for a configuration file of Axolotl."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune_cli.importers.axolotl_data import set_data, set_test_data
from finetune_cli.importers.axolotl_keys import (
    FEATURE_BY_PLUGIN,
    FSDP_NAMES,
    GRPO_IGNORED_OPTION_ROWS,
    IGNORED_OPTION_ROWS,
    ONLY_TRACKERS_REASON,
    OPTION_GROUP_ROWS,
    REFUSED_OPTION_ROWS,
)
from finetune_cli.importers.converters import (
    keep_value,
    to_boolean,
    to_choice,
    to_integer,
    to_list_of,
    to_mapping,
    to_name_list,
    to_number,
    to_template_variables,
    to_text,
    try_converters,
)
from finetune_cli.importers.data_sources import set_validation_split
from finetune_cli.importers.deepspeed import is_deepspeed
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_mapping
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.guide import to_steps_or_none
from finetune_cli.importers.module_patterns import UnsupportedPattern, expand_pattern
from finetune_cli.importers.options import (
    SCHEDULER_BY_NAME,
    assign_default_gpus,
    assign_hub_push,
    assign_optimizer,
    assign_secret_reference,
    assign_source_uri,
    double_kto_batch,
    make_ignored_options,
    to_steps_or_fraction,
)
from finetune_cli.importers.sources import assign_output_folder
from finetune_cli.importers.training_arguments import has_validation, set_deepspeed, set_state_dict, to_flag_or_path
from finetune_cli.mistakes import Mistake

TRAINER_BY_OBJECTIVE = {
    "dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "grpo": "grpo", "gdpo": "gdpo", "simpo": "simpo", "ebft": "ebft",
}  # fmt: skip
FEATURE_BY_UNSUPPORTED_OBJECTIVE = {"gdpo": "GDPO", "simpo": "SimPO", "ebft": "energy-based fine-tuning"}
ATTENTION_BY_NAME = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flashAttention2", "auto": "auto"}
ATTENTION_BY_OLD_KEY = {
    "flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager", "xformers_attention": "xformers",
    "sage_attention": "sage", "flex_attention": "flex_attention",
}  # fmt: skip
INIT_BY_NAME = {
    "true": "default", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "eva": "eva", "loftq": "loftq",
}  # fmt: skip
TEMPLATE_VARIABLES_PATH = "dataset.templateVariables"
MODEL_CLASS_PATTERN = re.compile(r"^(AutoModel\w*|\w+ForCausalLM|\w+LMHeadModel|\w+ForConditionalGeneration)$")
FEATURE_BY_UNSUPPORTED_CLASS = {
    "MambaLMHeadModel": "a model of the package mamba_ssm",
    "AutoModelForTokenClassification": "token classification",
}
ATTENTION_REASON = (
    "the trainer has eager, sdpa and flash_attention_2; it chooses the fastest that the GPU and model support"
)


def to_learning_rate(value: Any) -> float | int:
    """Convert a learning rate to a number. The learning rate may also be a text such as `5e-5`."""
    number: float | int = to_number(exclusive_low=0)(value)
    return number


def to_lora_init(value: Any) -> str:
    """Convert `peft_init_lora_weights` to a value of `method.lora.init`."""
    if value is True:
        return "default"
    init_name: str = to_choice(INIT_BY_NAME)(value)
    return init_name


def to_precision_flag(value: Any) -> Any:
    """Return `auto` and `full` unchanged, and convert every other value to a boolean."""
    return value if value in ("auto", "full") else to_boolean(value)


OPTION_TABLE: tuple[OptionRow, ...] = (
    # model
    OptionRow("base_model", "model.source", is_required=True, is_set_by_combine=True),
    OptionRow("revision_of_model", "model.source", aliases=("model_revision",), is_set_by_combine=True),
    OptionRow("tokenizer_config", "model.tokenizer", is_set_by_combine=True),
    OptionRow("model_type", aliases=("type_of_model",), is_set_by_combine=True),
    OptionRow("cls_model_config", is_set_by_combine=True),
    OptionRow("trust_remote_code", "model.trustRemoteCode", to_boolean),
    OptionRow("load_in_8bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("load_in_4bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("bnb_config_kwargs.bnb_4bit_quant_type", "model.quantization.type", to_choice(["nf4", "fp4"])),
    OptionRow("bnb_config_kwargs.bnb_4bit_use_double_quant", "model.quantization.doubleQuant", to_boolean),
    OptionRow("bnb_config_kwargs.bnb_4bit_compute_dtype", "model.quantization.computeDtype", to_choice(["bfloat16", "float16", "float32"])),
    *make_ignored_options("the trainer chooses how it stores quantised weights",
        "bnb_config_kwargs.bnb_4bit_quant_storage bnb_config_kwargs.llm_int8_has_fp16_weight "
             "bnb_config_kwargs.load_in_4bit bnb_config_kwargs.load_in_8bit"),
    OptionRow("model_quantization_config", is_set_by_combine=True),
    OptionRow("model_quantization_config_kwargs.dequantize", convert=to_boolean, is_set_by_combine=True),
    OptionRow("attn_implementation", "model.attention", is_set_by_combine=True),
    *(OptionRow(key, "model.attention", to_boolean, is_set_by_combine=True) for key in ATTENTION_BY_OLD_KEY if key != "xformers_attention"),
    OptionRow("special_tokens.pad_token", "model.padToken"),
    OptionRow("special_tokens.additional_special_tokens", "model.newTokens", to_name_list, is_set_by_combine=True),
    *(OptionRow(f"special_tokens.{name}_token", is_set_by_combine=True) for name in ("bos", "eos", "unk", "mask", "sep", "cls")),
    OptionRow("tokens", "model.newTokens", try_converters(to_list_of(to_text), to_mapping), is_set_by_combine=True),
    *make_ignored_options("the trainer uses Liger's kernels for the models with which this release has tested them",
        "liger_rope liger_rms_norm liger_rms_norm_gated "
             "liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy liger_fused_linear_cross_entropy"),
    # method
    OptionRow("adapter", "method.type", is_set_by_combine=True),
    OptionRow("lora_model_dir", "method.adapter.source", is_set_by_combine=True),
    OptionRow("lora_r", "method.lora.rank", to_integer(1)),
    OptionRow("lora_alpha", "method.lora.alpha", to_number(exclusive_low=0)),
    OptionRow("lora_dropout", "method.lora.dropout", to_number(0, exclusive_high=1)),
    OptionRow("lora_target_modules", "method.lora.targetModules", to_name_list, is_set_by_combine=True),
    OptionRow("lora_target_linear", "method.lora.targetModules", to_boolean, is_set_by_combine=True),
    OptionRow("lora_target_parameters", "method.lora.targetParameters", to_name_list, is_set_by_combine=True),
    OptionRow("lora_modules_to_save", "method.lora.modulesToSave", to_name_list),
    OptionRow("peft_use_dora", "method.lora.useDora", to_boolean),
    OptionRow("peft_use_rslora", "method.lora.rankStabilized", to_boolean),
    OptionRow("peft_init_lora_weights", "method.lora.init", to_lora_init),
    OptionRow("peft.loftq_config.loftq_bits", "method.lora.loftq.bits", to_integer(2, 8)),
    OptionRow("loraplus_lr_ratio", "method.lora.plusRatio", to_number(1)),
    OptionRow("unfrozen_parameters", "method.type", to_list_of(to_text), is_set_by_combine=True),
    OptionRow("spectrum_top_fraction", "method.spectrum.snrThreshold", to_number(0, 1), is_set_by_combine=True),
    OptionRow("spectrum_model_name", is_set_by_combine=True),
    OptionRow("plugins", convert=to_list_of(to_text), is_set_by_combine=True),
    # objective
    OptionRow("rl", "trainer.type", to_choice(TRAINER_BY_OBJECTIVE), is_set_by_combine=True),
    OptionRow("reward_model", "trainer.type", to_boolean, is_set_by_combine=True),
    OptionRow("num_labels", convert=to_integer(1), is_set_by_combine=True),
    OptionRow("rl_beta", "trainer.dpo.beta", to_number(exclusive_low=0), ("dpo_beta",), is_set_by_combine=True),
    OptionRow("orpo_alpha", "trainer.dpo.beta", to_number(exclusive_low=0), is_set_by_combine=True),
    OptionRow("dpo_label_smoothing", "trainer.dpo.labelSmoothing", to_number(0, exclusive_high=0.5), is_set_by_combine=True),
    OptionRow("dpo_loss_type", "trainer.dpo.lossTypes", to_name_list, is_set_by_combine=True),
    OptionRow("trl.beta", "trainer.grpo.beta", to_number(0), is_set_by_combine=True),
    OptionRow("trl.max_completion_length", "trainer.maxCompletionLength", to_integer(1), is_set_by_combine=True),
    OptionRow("trl.num_generations", "trainer.grpo.numGenerations", to_integer(2), is_set_by_combine=True),
    OptionRow("trl.temperature", "trainer.grpo.temperature", to_number(exclusive_low=0), is_set_by_combine=True),
    OptionRow("trl.chat_template_kwargs", TEMPLATE_VARIABLES_PATH, to_template_variables, is_set_by_combine=True),
    OptionRow("trl.top_p", "trainer.grpo.topP", to_number(exclusive_low=0, high=1), is_set_by_combine=True),
    OptionRow("trl.loss_type", "trainer.grpo.lossType", to_choice({"grpo": "grpo", "bnpo": "bnpo", "dr_grpo": "drGrpo", "dapo": "dapo"}),
        is_set_by_combine=True),
    # data
    OptionRow("datasets", "dataset.train", keep_value, is_set_by_combine=True),
    OptionRow("pretraining_dataset", "dataset.train", keep_value, is_set_by_combine=True),
    OptionRow("test_datasets", "dataset.validation", keep_value, is_set_by_combine=True),
    OptionRow("val_set_size", "dataset.split.validation", to_number(0), is_set_by_combine=True),
    OptionRow("sequence_len", "dataset.maxSequenceLength", to_integer(1)),
    OptionRow("excess_length_strategy", "dataset.overflow", to_choice({"drop": "drop", "truncate": "truncate", "raise": "fail"})),
    OptionRow("sample_packing", "dataset.packing", to_boolean, is_set_by_combine=True),
    OptionRow("train_on_inputs", "dataset.responseOnly.enabled", to_boolean, is_set_by_combine=True),
    OptionRow("dataset_exact_deduplication", "dataset.checks.deduplicate", to_boolean),
    OptionRow("dataset_processes", "dataset.numProc", to_integer(1), ("dataset_num_proc",)),
    OptionRow("default_system_message", "dataset.systemPrompt", is_set_by_combine=True),
    OptionRow("chat_template", "dataset.chatTemplate", is_set_by_combine=True),
    OptionRow("chat_template_jinja", "dataset.chatTemplate.text", is_set_by_combine=True),
    OptionRow("chat_template_kwargs", TEMPLATE_VARIABLES_PATH, to_template_variables),
    OptionRow("shuffle_merged_datasets", convert=to_boolean, is_set_by_combine=True),
    # training
    OptionRow("num_epochs", "training.epochs", to_number(exclusive_low=0)),
    OptionRow("max_steps", "training.maxSteps", to_steps_or_none),
    OptionRow("micro_batch_size", "training.batchSizePerDevice", to_integer(1)),
    OptionRow("gradient_accumulation_steps", "training.gradientAccumulationSteps", to_integer(1)),
    OptionRow("batch_size", "training.gradientAccumulationSteps", to_integer(1), is_set_by_combine=True),
    OptionRow("context_parallel_size", "distributed.contextParallelSize", to_integer(1), ("sequence_parallel_degree",)),
    OptionRow("eval_batch_size", "evaluation.batchSizePerDevice", to_integer(1)),
    OptionRow("learning_rate", "training.learningRate", to_learning_rate),
    OptionRow("lr_scheduler", "training.scheduler", is_set_by_combine=True),
    OptionRow("lr_scheduler_kwargs", "training.schedulerParameters", to_mapping, is_set_by_combine=True),
    OptionRow("cosine_min_lr_ratio", "training.schedulerParameters", to_number(0, 1), is_set_by_combine=True),
    OptionRow("warmup_steps", "training.warmupSteps", to_steps_or_fraction, is_set_by_combine=True),
    OptionRow("warmup_ratio", "training.warmupRatio", to_number(0, exclusive_high=1), is_set_by_combine=True),
    OptionRow("optimizer", "training.optimizer", is_set_by_combine=True),
    OptionRow("weight_decay", "training.weightDecay", to_number(0)),
    OptionRow("adam_beta1", "training.adamBeta1", to_number(0, exclusive_high=1)),
    OptionRow("adam_beta2", "training.adamBeta2", to_number(0, exclusive_high=1)),
    OptionRow("adam_epsilon", "training.adamEpsilon", to_number(exclusive_low=0)),
    OptionRow("max_grad_norm", "training.maxGradNorm", to_number(0)),
    OptionRow("neftune_noise_alpha", "training.neftuneNoiseAlpha", to_number(exclusive_low=0), ("noisy_embedding_alpha",)),
    OptionRow("group_by_length", "training.groupByLength", to_boolean),
    OptionRow("seed", "training.seed", to_integer(0, 4294967295)),
    *(OptionRow(key, "training.mixedPrecision", to_precision_flag, is_set_by_combine=True) for key in ("bf16", "fp16", "bfloat16", "float16", "float32")),
    OptionRow("gradient_checkpointing", "training.gradientCheckpointing", is_set_by_combine=True, convert=keep_value),
    OptionRow("activation_offloading", "training.gradientCheckpointing", is_set_by_combine=True, convert=keep_value),
    OptionRow("early_stopping_patience", "training.earlyStopping.patience", to_integer(0), is_set_by_combine=True),
    # evaluation, checkpoints, results
    OptionRow("eval_steps", "evaluation.steps", to_number(0), is_set_by_combine=True),
    OptionRow("evals_per_epoch", "evaluation.strategy", to_number(0), is_set_by_combine=True),
    OptionRow("eval_strategy", "evaluation.strategy", to_choice(["steps", "epoch", "no"]), ("evaluation_strategy",), is_set_by_combine=True),
    OptionRow("save_steps", "checkpoint.steps", to_number(0), is_set_by_combine=True),
    OptionRow("saves_per_epoch", "checkpoint.strategy", to_number(0), is_set_by_combine=True),
    OptionRow("save_strategy", "checkpoint.strategy", to_choice(["steps", "epoch", "no", "best"]), is_set_by_combine=True),
    OptionRow("save_total_limit", "checkpoint.keep", to_steps_or_none),
    OptionRow("load_best_model_at_end", "checkpoint.loadBestAtEnd", to_boolean),
    OptionRow("resume_from_checkpoint", "checkpoint.resume", to_flag_or_path, is_set_by_combine=True),
    OptionRow("auto_resume_from_checkpoints", "checkpoint.resume", to_boolean, is_set_by_combine=True),
    OptionRow("output_dir", "output.dir", is_set_by_combine=True),
    OptionRow("hub_model_id", "output.hub.repository", is_set_by_combine=True),
    OptionRow("hub_revision", is_set_by_combine=True),
    # tracking
    OptionRow("logging_steps", "tracking.loggingSteps", to_number(exclusive_low=0), is_set_by_combine=True),
    OptionRow("use_wandb", "tracking.reportTo", to_boolean, is_set_by_combine=True),
    OptionRow("wandb_project", "tracking.wandb.project", is_set_by_combine=True),
    OptionRow("wandb_entity", "tracking.wandb.entity", is_set_by_combine=True),
    OptionRow("wandb_name", "output.runName.name", is_set_by_combine=True),
    OptionRow("wandb_mode", is_set_by_combine=True),
    OptionRow("use_mlflow", "tracking.reportTo", to_boolean, is_set_by_combine=True),
    OptionRow("mlflow_tracking_uri", "tracking.mlflow.trackingUri", is_set_by_combine=True),
    OptionRow("mlflow_experiment_name", "tracking.mlflow.experimentName", is_set_by_combine=True),
    OptionRow("mlflow_run_name", "output.runName.name", is_set_by_combine=True),
    OptionRow("use_tensorboard", "tracking.reportTo", to_boolean, is_set_by_combine=True),
    OptionRow("comet_api_key", no_effect_reason=ONLY_TRACKERS_REASON, is_secret=True),
    OptionRow("swanlab_api_key", no_effect_reason=ONLY_TRACKERS_REASON, is_secret=True),
    OptionRow("swanlab_lark_secret", no_effect_reason=ONLY_TRACKERS_REASON, is_secret=True),
    # distribution
    OptionRow("deepspeed", "distributed.deepspeed", try_converters(to_text, to_mapping), is_set_by_combine=True),
    OptionRow("fsdp", "distributed.fsdp.sharding", try_converters(to_list_of(to_text)), is_set_by_combine=True),
    OptionRow("fsdp_version", convert=to_integer(1, 2), is_set_by_combine=True),
    OptionRow("fsdp_final_state_dict_type", "distributed.fsdp.stateDict", is_set_by_combine=True),
    *(OptionRow(f"fsdp_config.{name}", "distributed.fsdp", keep_value, () if name == "fsdp_version" else (f"fsdp_config.fsdp_{name}",), is_set_by_combine=True)
      for name in FSDP_NAMES),
    OptionRow("dp_shard_size", "resources.gpusPerNode", to_integer(1), is_set_by_combine=True),
    OptionRow("dp_replicate_size", "resources.gpusPerNode", to_integer(1), is_set_by_combine=True),
    OptionRow("ray_num_workers", "resources.gpusPerNode", to_integer(1), is_set_by_combine=True),
    *IGNORED_OPTION_ROWS, *REFUSED_OPTION_ROWS, *GRPO_IGNORED_OPTION_ROWS, *OPTION_GROUP_ROWS,
)  # fmt: skip


def _uses_lora(draft: JobDraft) -> bool:
    return draft.value("method.type") in ("lora", "qlora")


DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("training.epochs", 1, is_applicable=lambda draft: not draft.has_value("training.maxSteps")),
    ToolDefault("training.batchSizePerDevice", 1),
    ToolDefault("training.gradientAccumulationSteps", 1),
    ToolDefault("training.scheduler", "cosine"),
    ToolDefault("training.warmupRatio", 0.03, is_applicable=lambda draft: not draft.has_value("training.warmupSteps")),
    ToolDefault("training.optimizer", "adamw_torch_fused"),
    ToolDefault("training.weightDecay", 0),
    ToolDefault("training.gradientCheckpointing", "disabled"),
    ToolDefault("dataset.maxSequenceLength", 512),
    ToolDefault("dataset.overflow", "drop"),
    ToolDefault("dataset.packing", False),
    ToolDefault("checkpoint.strategy", "epoch", is_applicable=lambda draft: not draft.has_value("checkpoint.steps")),
    ToolDefault("method.lora.dropout", 0, is_applicable=_uses_lora),
    ToolDefault("dataset.responseOnly.enabled", True, is_applicable=lambda draft: (
        draft.value("trainer.type", "sft") == "sft" and draft.value("dataset.format") not in (None, "plainText"))),
    ToolDefault("output.layout", "flat", is_applicable=lambda draft: draft.has_value("output.dir")),
)  # fmt: skip
OPAQUE_PATHS = frozenset(
    {
        "datasets", "test_datasets", "pretraining_dataset", "deepspeed", "lr_scheduler_kwargs", "tokens", "qat", "quantization", "ebft", "diffusion", "vllm",
        "dynamic_checkpoint", "gradient_checkpointing_kwargs", "selective_checkpointing", "overrides_of_model_config", "overrides_of_model_kwargs",
        "model_config", "model_kwargs", "accelerator_config", "lora_rank_pattern", "lora_alpha_pattern", "optim_args", "chat_template_kwargs",
        "max_memory", "device_map", "resources_per_worker", "torch_compile_options", "flex_attn_compile_kwargs", "added_tokens_overrides", "hatchery", "mora",
        "llmcompressor", "processor_kwargs", "comet_experiment_config", "peft_trainable_token_indices", "rope_scaling", "trl.generation_kwargs",
        "trl.chat_template_kwargs", "adapter", "nemo_gym_datasets",
    }
)  # fmt: skip
RECOGNISED_KEYS = (
    "micro_batch_size", "sequence_len", "sample_packing", "val_set_size", "datasets", "num_epochs", "lora_r", "adapter", "special_tokens", "evals_per_epoch",
    "saves_per_epoch", "lr_scheduler", "dataset_prepared_path", "pretraining_dataset", "rl",
)  # fmt: skip


# --- reading --------------------------------------------------------------------------------------------------------


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document is a configuration of Axolotl: it has a text at `base_model`, and at least two other keys of Axolotl."""
    for document in documents:
        content = peek_mapping(document)
        if isinstance(content.get("base_model"), str) and sum(key in content for key in RECOGNISED_KEYS) >= 2:
            return True
    return False


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of the files in order."""
    for word in draft.request.tool_arguments:
        hint = "change the file, or use the options of `finetune import`"
        draft.mistakes.append(Mistake("command line", word, "this importer accepts no options of the training tool's command line", hint))
    for document in draft.documents:
        if not is_deepspeed(document):
            yield from iterate_entries(document, parse_document(document), OPAQUE_PATHS)


# --- fields that depend on several options --------------------------------------------------------------------------


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options."""
    _set_model(draft)
    _set_tokens(draft)
    _set_method(draft)
    trainer = _set_trainer(draft)
    set_validation_split(draft, "val_set_size", "test_datasets")
    if trainer is not None:
        set_test_data(draft, trainer)
        set_data(draft, trainer)
        _set_row_options(draft, trainer)
    _set_precision(draft)
    _set_gradient_checkpointing(draft)
    _set_distribution(draft)
    _set_schedule(draft)
    _set_intervals(draft)
    _set_results(draft)
    _set_trackers(draft)
    double_kto_batch(draft, "micro_batch_size")
    assign_default_gpus(draft)


def _set_model(draft: JobDraft) -> None:
    assign_source_uri(draft, "base_model", "model.source", draft.get("revision_of_model"))
    if "revision_of_model" in draft.given_options:
        draft.add_reason("revision_of_model", "the revision is part of model.source")
    assign_source_uri(draft, "tokenizer_config", "model.tokenizer")
    name = draft.get("model_type")
    if (
        name
        and (name in FEATURE_BY_UNSUPPORTED_CLASS or not MODEL_CLASS_PATTERN.match(name))
        and name != "AutoModelForSequenceClassification"
    ):
        draft.refuse_feature("model_type", FEATURE_BY_UNSUPPORTED_CLASS.get(name, f"the model class {name}"))
    elif name:
        draft.add_reason("model_type", "no effect: the trainer reads the class from the model's own configuration")
    if draft.get("cls_model_config"):
        draft.add_reason("cls_model_config", "no effect: the trainer loads only the text part of the model")
    _set_attention(draft)
    if "model_quantization_config" in draft.given_options:
        if draft.get("model_quantization_config_kwargs.dequantize"):
            draft.add_reason("model_quantization_config", "no effect: the trainer loads the weights in 16 bits")
        else:
            draft.refuse_feature(
                "model_quantization_config",
                "training on a base model in MXFP4 or FP8",
                "write model_quantization_config_kwargs: {dequantize: true}",
            )
    if "model_quantization_config_kwargs.dequantize" in draft.given_options:
        draft.add_reason(
            "model_quantization_config_kwargs.dequantize", "no effect: the trainer loads the weights in 16 bits"
        )


def _set_attention(draft: JobDraft) -> None:
    old_keys = [key for key in ATTENTION_BY_OLD_KEY if draft.get(key)]
    for old_key in ATTENTION_BY_OLD_KEY:
        if draft.get(old_key) is False:
            draft.add_reason(old_key, "no effect: this attention implementation is turned off")
    key = "attn_implementation" if "attn_implementation" in draft.given_options else old_keys[0] if old_keys else None
    if key is None:
        return
    for unused_key in old_keys:
        if unused_key != key:
            draft.add_reason(unused_key, f"no effect: {key} is used instead")
    name = str(draft.get(key)) if key == "attn_implementation" else ATTENTION_BY_OLD_KEY[key]
    if name in ATTENTION_BY_NAME:
        draft.assign("model.attention", ATTENTION_BY_NAME[name], key)
    else:
        draft.add_reason(key, f"{name} is replaced by attention auto: {ATTENTION_REASON}")


def _set_tokens(draft: JobDraft) -> None:
    """Set the pad token and the tokens to add to the tokenizer. In older Axolotl files, the option `tokens` is a mapping with the special tokens."""
    tokens = draft.get("tokens")
    new_tokens = list(tokens) if isinstance(tokens, list) else []
    if isinstance(tokens, dict):
        if tokens.get("pad_token"):
            draft.assign("model.padToken", tokens["pad_token"], "tokens")
        other_tokens = [value for key, value in tokens.items() if key != "pad_token" and value]
        draft.add_warning(_describe_kept_token(draft, "tokens", ", ".join(map(str, other_tokens))))
    new_tokens += draft.get("special_tokens.additional_special_tokens") or []
    if new_tokens:
        draft.assign(
            "model.newTokens",
            list(dict.fromkeys(new_tokens)),
            "tokens" if isinstance(tokens, list) else "special_tokens.additional_special_tokens",
        )
    for name in ("bos", "eos", "unk", "mask", "sep", "cls"):
        key = f"special_tokens.{name}_token"
        if key in draft.given_options:
            draft.add_reason(key, "the tokenizer's own token is used")
            draft.add_warning(_describe_kept_token(draft, key, str(draft.get(key))))


def _describe_kept_token(draft: JobDraft, option_key: str, token: str) -> str:
    option = draft.given_options[option_key]
    return (
        f"{option.origin.location}: {option.key}: the tokenizer's own token is used; if it is not {token}, "
        "store a tokenizer with this token and give --set model.tokenizer=URI"
    )


def _set_method(draft: JobDraft) -> None:
    adapter, loads_in_4bit, loads_in_8bit = draft.get("adapter"), draft.get("load_in_4bit"), draft.get("load_in_8bit")
    for plugin in draft.get("plugins") or []:
        feature = FEATURE_BY_PLUGIN.get(plugin, f"the plugin {plugin}")
        if feature:
            draft.refuse_feature("plugins", feature)
    if "plugins" in draft.given_options:
        draft.add_reason("plugins", "no effect: the options of the plugins are read instead")
    if loads_in_4bit and loads_in_8bit:
        message = "4-bit and 8-bit loading exclude each other, but both are true"
        draft.add_mistake(
            ("load_in_4bit", "load_in_8bit"), message, "set one of them to false", explained_path="model.quantization"
        )
        return
    if adapter is not None and adapter not in ("lora", "qlora"):
        draft.refuse_feature("adapter", f"the adapter {adapter}", "write lora or qlora", is_droppable=False)
        draft.paths_of_invalid_keys["adapter"] = "method"
        return
    quantisation_key = "load_in_4bit" if loads_in_4bit else "load_in_8bit" if loads_in_8bit else None
    if adapter is None:
        _set_full_method(draft, quantisation_key)
    else:
        if "unfrozen_parameters" in draft.given_options:
            draft.add_reason("unfrozen_parameters", "no effect: only the adapter is trained")
        draft.assign("method.type", "qlora" if adapter == "qlora" or loads_in_4bit else "lora", "adapter")
        if quantisation_key:
            draft.assign("model.quantization.bits", 4 if loads_in_4bit else 8, quantisation_key)
        if adapter == "qlora" and loads_in_8bit:
            draft.add_mistake(
                ("adapter", "load_in_8bit"), "qlora needs 4 bits, but load_in_8bit is true", "write load_in_4bit: true"
            )
    for key in ("load_in_4bit", "load_in_8bit"):
        if draft.get(key) is False:
            draft.add_reason(key, "no effect: false leaves this quantisation off")
    _set_existing_adapter(draft)
    _set_target_modules(draft)


def _set_full_method(draft: JobDraft, quantisation_key: str | None) -> None:
    if draft.get("spectrum_top_fraction") is not None or any(
        "spectrum" in plugin for plugin in draft.get("plugins") or []
    ):
        key = "spectrum_top_fraction" if "spectrum_top_fraction" in draft.given_options else "plugins"
        draft.assign("method.type", "spectrum", key)
        draft.assign("method.spectrum.snrThreshold", round(1 - draft.get("spectrum_top_fraction", 0.5), 6), key)
        return
    key = (
        "adapter"
        if "adapter" in draft.given_options
        else "unfrozen_parameters"
        if "unfrozen_parameters" in draft.given_options
        else ""
    )
    if key:
        draft.assign("method.type", "full", key)
    else:
        draft.assign_default("method.type", "full", "the file has no adapter")
    if quantisation_key:
        draft.warn_no_effect(
            quantisation_key, "without an adapter, all weights are trained, which needs an unquantised base model"
        )
    patterns = draft.get("unfrozen_parameters")
    if patterns and not _covers_language_model(patterns):
        draft.refuse_feature(
            "unfrozen_parameters",
            "training of the parameters that match a pattern",
            "choose whole layers with method spectrum and --set method.spectrum.layers=[...]",
        )


def _covers_language_model(patterns: list[str]) -> bool:
    """Return whether patterns of `unfrozen_parameters` select the whole language model."""
    plain_names = [re.sub(r"[\^$\\]|\.\*$|\.$", "", pattern).strip(".") for pattern in patterns]
    return any(name in ("model", "model.language_model", "language_model", "") for name in plain_names) and all(
        re.match(r"^[\w.]*$", name) for name in plain_names
    )


def _set_existing_adapter(draft: JobDraft) -> None:
    if "lora_model_dir" not in draft.given_options or draft.get("adapter") is None:
        if "lora_model_dir" in draft.given_options:
            draft.warn_no_effect("lora_model_dir", "the file has no adapter")
        return
    draft.assign("method.type", "adapter", "lora_model_dir")
    assign_source_uri(draft, "lora_model_dir", "method.adapter.source")


def _set_target_modules(draft: JobDraft) -> None:
    module_names: list[str] = []
    patterns = draft.get("lora_target_modules") or []
    raw_value = draft.given_options["lora_target_modules"].raw_value if patterns else None
    for pattern in [raw_value] if isinstance(raw_value, str) else patterns:
        if pattern in ("all-linear", "all"):
            module_names.append("all-linear")
            continue
        try:
            module_names += expand_pattern(pattern)
        except UnsupportedPattern as error:
            draft.refuse_feature(
                "lora_target_modules",
                f"choosing modules with the pattern {pattern} ({error})",
                "write a list of names",
            )
    if draft.get("lora_target_linear"):
        module_names.append("all-linear")
        draft.assign("method.lora.targetModules", list(dict.fromkeys(module_names)), "lora_target_linear")
    elif "lora_target_linear" in draft.given_options:
        draft.add_reason("lora_target_linear", "no effect: lora_target_modules is used instead")
    if module_names:
        draft.assign(
            "method.lora.targetModules",
            list(dict.fromkeys(module_names)),
            "lora_target_modules" if patterns else "lora_target_linear",
        )
        if patterns and draft.get("lora_target_linear"):
            draft.add_reason("lora_target_linear", "included in method.lora.targetModules")
    parameters = draft.get("lora_target_parameters")
    if parameters:
        draft.assign("method.lora.targetParameters", parameters, "lora_target_parameters")


def _set_trainer(draft: JobDraft) -> str | None:
    """Set the training objective (`trainer.type`) and its options.

    Return the value of `trainer.type`, or None if a FineTuneJob does not have the objective.
    """
    objective = draft.get("rl")
    if objective in FEATURE_BY_UNSUPPORTED_OBJECTIVE:
        draft.refuse_feature("rl", FEATURE_BY_UNSUPPORTED_OBJECTIVE[objective], is_droppable=False)
        draft.paths_of_invalid_keys["rl"] = "trainer"
        return None
    trainer = str(objective or ("reward" if draft.get("reward_model") else "sft"))
    if objective:
        draft.assign("trainer.type", trainer, "rl")
    elif trainer == "reward":
        draft.assign("trainer.type", trainer, "reward_model")
    if "reward_model" in draft.given_options and trainer != "reward":
        draft.add_reason("reward_model", "no effect: the model is not a reward model")
    if draft.get("num_labels") not in (None, 1) or ("num_labels" in draft.given_options and trainer != "reward"):
        draft.refuse_feature("num_labels", "classification")
    elif "num_labels" in draft.given_options:
        draft.add_reason("num_labels", "no effect: a reward model gives one score")
    _set_preference_options(draft, trainer)
    _set_grpo_options(draft, trainer)
    return trainer


def _set_preference_options(draft: JobDraft, trainer: str) -> None:
    for key in ("rl_beta", "orpo_alpha"):
        if key in draft.given_options:
            if trainer in ("dpo", "kto", "orpo"):
                draft.assign("trainer.dpo.beta", draft.get(key), key)
            else:
                draft.warn_no_effect(key, f"the objective is {trainer}")
    if draft.given_options.get("rl") and str(draft.given_options["rl"].raw_value).lower() == "ipo":
        draft.assign("trainer.dpo.lossTypes", ["ipo"], "rl")
    for key, path in (
        ("dpo_label_smoothing", "trainer.dpo.labelSmoothing"),
        ("dpo_loss_type", "trainer.dpo.lossTypes"),
    ):
        if key in draft.given_options:
            if trainer == "dpo":
                value = draft.get(key)
                draft.assign(path, [_to_camel_case(name) for name in value] if key == "dpo_loss_type" else value, key)
            else:
                draft.warn_no_effect(key, f"the objective is {trainer}")


def _to_camel_case(name: str) -> str:
    first_word, *other_words = name.split("_")
    return first_word + "".join(word.capitalize() for word in other_words)


def _set_grpo_options(draft: JobDraft, trainer: str) -> None:
    if draft.value(TEMPLATE_VARIABLES_PATH) == {}:
        draft.remove(TEMPLATE_VARIABLES_PATH, "no arguments")
    for option_row in OPTION_TABLE:
        if not option_row.key.startswith("trl.") or not option_row.is_set_by_combine or option_row.key not in draft.given_options:
            continue
        if option_row.path == TEMPLATE_VARIABLES_PATH and not draft.get(option_row.key):
            draft.add_reason(option_row.key, "no arguments")
        elif option_row.path == TEMPLATE_VARIABLES_PATH and draft.get("chat_template_kwargs") and trainer == "grpo":
            draft.add_mistake(("chat_template_kwargs", option_row.key), "both set the variables of the chat template", "keep one of them")
        elif trainer == "grpo" or (option_row.key == "trl.max_completion_length" and trainer in ("dpo", "kto", "orpo")):
            draft.assign(option_row.path, draft.get(option_row.key), option_row.key)
        else:
            draft.warn_no_effect(option_row.key, f"the objective is {trainer}")
    if (
        trainer == "grpo"
        and "trainer.rewards" not in draft.request.overrides
        and not any(m.key.startswith("trl.reward") for m in draft.mistakes)
    ):
        draft.add_warning("grpo needs rewards: set trainer.rewards")


def _set_row_options(draft: JobDraft, trainer: str) -> None:
    """Set packing, and whether the loss counts only the tokens of answers.

    Refuse a system prompt that applies only to rows without a system prompt, and refuse a fixed order of the rows.
    """
    if "sample_packing" in draft.given_options:
        if trainer == "sft" or not draft.get("sample_packing"):
            draft.assign("dataset.packing", draft.get("sample_packing"), "sample_packing")
        else:
            draft.warn_no_effect("sample_packing", f"{trainer} trains on one row per sequence")
    if draft.value("dataset.packing") and draft.value("training.groupByLength"):
        draft.remove("training.groupByLength", "packed sequences have the same length")
    if "train_on_inputs" in draft.given_options:
        if trainer == "sft" and draft.value("dataset.format") not in (None, "plainText"):
            draft.assign("dataset.responseOnly.enabled", not draft.get("train_on_inputs"), "train_on_inputs")
        else:
            draft.add_reason("train_on_inputs", "no effect: rows of this format have no questions")
    if "default_system_message" in draft.given_options:
        draft.refuse_feature(
            "default_system_message",
            "a system prompt only for rows that have none",
            "write --set dataset.systemPrompt=TEXT for all rows",
        )
    if draft.get("shuffle_merged_datasets") is False:
        draft.refuse_feature("shuffle_merged_datasets", "a fixed order of the rows")
    elif "shuffle_merged_datasets" in draft.given_options:
        draft.add_reason("shuffle_merged_datasets", "no effect: rows are always shuffled")
    if "chat_template_jinja" in draft.given_options and not any(
        value.key == "chat_template_jinja" for value in draft.values.values()
    ):
        draft.add_reason("chat_template_jinja", "no effect: chat_template is used instead")


def _set_precision(draft: JobDraft) -> None:
    keys = [key for key in ("bf16", "fp16", "bfloat16", "float16", "float32") if key in draft.given_options]
    enabled_keys = [key for key in keys if draft.get(key) not in (False, "auto")]
    for key in keys:
        if draft.get(key) is False:
            draft.add_reason(key, "no effect: another data type is used")
    if "bf16" in enabled_keys and "fp16" in enabled_keys:
        draft.add_mistake(("bf16", "fp16"), "bf16 and fp16 are both true", "set one of them to false")
        return
    is_full = draft.value("method.type") in ("full", "spectrum")
    for key, precision, dtype in (
        ("bf16", "bf16", "bfloat16"), ("fp16", "fp16", None), ("bfloat16", "bf16", "bfloat16"), ("float16", "fp16", None), ("float32", "no", "float32")
    ):  # fmt: skip
        if key in enabled_keys:
            draft.assign("training.mixedPrecision", precision, key)
            if dtype == "float32" or (dtype and is_full):
                draft.assign("model.dtype", dtype, key)
            for other_key in enabled_keys:
                if other_key != key:
                    draft.add_reason(other_key, f"no effect: {key} is used instead")
            if "bf16" in keys and draft.get("bf16") == "auto":
                draft.add_reason("bf16", f"no effect: {key} is used instead")
            return
    if draft.get("bf16") == "auto":
        draft.assign("training.mixedPrecision", "auto", "bf16")
    elif "bf16" in keys:
        draft.assign("training.mixedPrecision", "no", "bf16")


def _set_gradient_checkpointing(draft: JobDraft) -> None:
    checkpointing, offloading = draft.get("gradient_checkpointing"), draft.get("activation_offloading")
    key = "gradient_checkpointing" if checkpointing else "activation_offloading"
    if checkpointing in ("offload", "offload_disk") or offloading not in (None, False):
        draft.assign("training.gradientCheckpointing", "unsloth", key)
        for other_key in ("gradient_checkpointing", "activation_offloading"):
            if other_key != key and other_key in draft.given_options:
                draft.add_reason(
                    other_key, "included in training.gradientCheckpointing: unsloth, which keeps activations in host memory"
                )
        if checkpointing and offloading:
            draft.add_reason(
                "activation_offloading",
                "included in training.gradientCheckpointing: unsloth, which keeps activations in host memory",
            )
        return
    if "activation_offloading" in draft.given_options:
        draft.add_reason("activation_offloading", "no effect: activations stay on the GPU")
    if "gradient_checkpointing" in draft.given_options:
        draft.assign(
            "training.gradientCheckpointing", "enabled" if checkpointing else "disabled", "gradient_checkpointing"
        )


def _set_schedule(draft: JobDraft) -> None:
    _set_accumulation(draft)
    name = str(draft.get("lr_scheduler") or "cosine")
    if name in SCHEDULER_BY_NAME and "lr_scheduler" in draft.given_options:
        draft.assign("training.scheduler", SCHEDULER_BY_NAME[name], "lr_scheduler")
    elif name not in SCHEDULER_BY_NAME:
        draft.refuse_feature(
            "lr_scheduler", f"the learning rate schedule {name}", f"write one of {', '.join(SCHEDULER_BY_NAME)}"
        )
    if "cosine_min_lr_ratio" in draft.given_options:
        draft.assign("training.scheduler", "cosineWithMinLr", "cosine_min_lr_ratio")
        draft.assign(
            "training.schedulerParameters",
            {"min_lr_rate": str(draft.get("cosine_min_lr_ratio"))},
            "cosine_min_lr_ratio",
        )
        draft.add_reason("lr_scheduler", "cosine_min_lr_ratio selects the cosine schedule with a minimum learning rate")
    if draft.get("lr_scheduler_kwargs"):
        draft.assign(
            "training.schedulerParameters",
            {str(key): str(value) for key, value in draft.get("lr_scheduler_kwargs").items()},
            "lr_scheduler_kwargs",
        )
    steps, ratio = draft.get("warmup_steps"), draft.get("warmup_ratio")
    if steps and ratio:
        draft.add_mistake(
            ("warmup_steps", "warmup_ratio"),
            f"{steps} and {ratio} both set the warm-up",
            "remove one of them",
            explained_path="training.warmupRatio",
        )
    elif steps is not None and (steps > 0 or ratio is None):
        draft.assign(
            "training.warmupSteps" if steps >= 1 or steps == 0 else "training.warmupRatio", steps, "warmup_steps"
        )
        if ratio is not None:
            draft.add_reason("warmup_ratio", "no effect: warmup_steps is used instead")
    elif ratio is not None:
        draft.assign("training.warmupRatio", ratio, "warmup_ratio")
        if steps is not None:
            draft.add_reason("warmup_steps", "no effect: warmup_ratio is used instead")
    if "optimizer" in draft.given_options:
        assign_optimizer(draft, "optimizer")
    if (
        "lr_scheduler" in draft.given_options
        and draft.value("training.scheduler") == "constant"
        and draft.value("training.warmupRatio", 0) == 0
    ):
        draft.assign_default("training.warmupRatio", 0, "the schedule constant has no warm-up")


def _set_accumulation(draft: JobDraft) -> None:
    """Set the accumulation steps from Axolotl's option `batch_size`, which is the number of rows that one rank trains on in an optimizer step."""
    if "batch_size" not in draft.given_options:
        return
    rows_per_step, rows_per_micro_batch = draft.get("batch_size"), draft.get("micro_batch_size", 1)
    if "gradient_accumulation_steps" in draft.given_options:
        keys = ("batch_size", "gradient_accumulation_steps")
        draft.add_mistake(
            keys,
            f"{rows_per_step} and {draft.get('gradient_accumulation_steps')} both set the gradient accumulation",
            "remove batch_size",
        )
    else:
        draft.assign("training.gradientAccumulationSteps", max(1, rows_per_step // rows_per_micro_batch), "batch_size")


def _set_distribution(draft: JobDraft) -> None:
    shard_count, replica_count = draft.get("dp_shard_size", 1), draft.get("dp_replicate_size", 1)
    size_keys = [key for key in ("dp_shard_size", "dp_replicate_size") if key in draft.given_options]
    for key in size_keys:
        draft.add_reason(
            key,
            "included in resources.gpusPerNode" if shard_count * replica_count > 1 else "no effect: 1 does not set the number of GPUs",
        )
    if shard_count * replica_count > 1:
        draft.assign("resources.gpusPerNode", shard_count * replica_count, size_keys[0])
        if replica_count > 1 and shard_count > 1:
            draft.add_warning(
                "dp_replicate_size: the job shards over all GPUs instead of replicating shards: the results are the same"
            )
    if "ray_num_workers" in draft.given_options:
        draft.assign("resources.gpusPerNode", draft.get("ray_num_workers"), "ray_num_workers")
    set_deepspeed(draft)
    _set_fsdp(draft)


def _set_fsdp(draft: JobDraft) -> None:
    """Set FSDP from `fsdp` (version 1) and `fsdp_config`."""
    key_by_name = {name: f"fsdp_config.{name}" for name in FSDP_NAMES if f"fsdp_config.{name}" in draft.given_options}
    fsdp_words = [word.split()[0] for word in draft.get("fsdp") or [] if word]
    if not key_by_name and not fsdp_words:
        for key in ("fsdp_version", "fsdp_final_state_dict_type"):
            if key in draft.given_options:
                draft.add_reason(key, "no effect: the file does not use FSDP")
        return
    if draft.value("distributed.strategy") == "deepspeed":
        draft.add_mistake(("deepspeed", "fsdp"), "DeepSpeed and FSDP exclude each other", "remove one of them")
        return
    source_key = "fsdp" if fsdp_words else next(iter(key_by_name.values()))
    draft.assign("distributed.strategy", "fsdp", source_key)
    sharding = str(
        draft.get("fsdp_config.sharding_strategy") or next((word for word in fsdp_words if "shard" in word), "full_shard")
    ).upper()
    reshard_value = draft.get("fsdp_config.reshard_after_forward")
    if sharding in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2") or reshard_value is False:
        draft.assign("distributed.fsdp.sharding", "shardGradOp", source_key)
    elif sharding == "NO_SHARD":
        draft.assign("distributed.fsdp.sharding", "noShard", source_key)
    else:
        draft.assign("distributed.fsdp.sharding", "fullShard", source_key)
    if draft.get("fsdp_config.offload_params") or "offload" in fsdp_words:
        option = draft.given_options[key_by_name.get("offload_params", "fsdp")]
        draft.add_warning(
            f"{option.origin.location}: {option.key}: with FSDP, the weights stay in GPU memory: use more GPUs, "
            "or DeepSpeed with --set distributed.strategy=deepspeed "
            "--set distributed.deepspeed.zeroStage=3 --set distributed.deepspeed.offloadParameters=true"
        )
    _set_state_dict(draft)
    for name, key in key_by_name.items():
        if name not in ("state_dict_type", "final_state_dict_type") and key != source_key:
            draft.add_reason(key, "no effect: the trainer uses FSDP version 2 and chooses the layers to wrap")
    if "fsdp_version" in draft.given_options:
        draft.add_reason("fsdp_version", "no effect: the trainer uses FSDP version 2")


def _set_state_dict(draft: JobDraft) -> None:
    keys = ("fsdp_config.state_dict_type", "fsdp_config.final_state_dict_type", "fsdp_final_state_dict_type")
    for key in keys:
        if key not in draft.given_options:
            continue
        if key == keys[0]:
            set_state_dict(draft, key, draft.get(key))
        else:
            draft.add_reason(key, "no effect: the final model is always stored whole")


def _set_intervals(draft: JobDraft) -> None:
    """Set when the job saves checkpoints and when it evaluates, and set early stopping."""
    _set_interval(draft, "checkpoint", ("save_strategy", "save_steps", "saves_per_epoch"))
    if not has_validation(draft):
        for key in ("eval_strategy", "eval_steps", "evals_per_epoch", "early_stopping_patience"):
            if key in draft.given_options:
                draft.add_reason(key, "no effect: there is no validation set")
        if draft.value("checkpoint.loadBestAtEnd"):
            draft.remove("checkpoint.loadBestAtEnd", "there is no validation set")
        draft.remove("evaluation.batchSizePerDevice", "there is no validation set")
        return
    _set_interval(draft, "evaluation", ("eval_strategy", "eval_steps", "evals_per_epoch"))
    draft.assign_default("evaluation.strategy", "epoch")
    if draft.get("early_stopping_patience"):
        draft.assign("training.earlyStopping.patience", draft.get("early_stopping_patience"), "early_stopping_patience")
    elif "early_stopping_patience" in draft.given_options:
        draft.add_reason("early_stopping_patience", "0 turns early stopping off")


def _set_interval(draft: JobDraft, spec_group: str, keys: tuple[str, str, str]) -> None:
    """Set the fields `strategy` and `steps` in the group `spec_group` of the spec, which is `checkpoint` or `evaluation`.

    `keys`: the options with the strategy, the number of steps, and the number of times per epoch.
    """
    strategy_key, steps_key, per_epoch_key = keys
    strategy, steps, per_epoch = (draft.get(key) for key in keys)
    if steps and per_epoch:
        draft.add_mistake(
            (steps_key, per_epoch_key), f"{steps:g} and {per_epoch:g} both set the interval", "remove one of them"
        )
        return
    deciding_key = steps_key if steps else per_epoch_key if per_epoch else strategy_key
    for key in keys:
        if key in draft.given_options and key != deciding_key:
            draft.add_reason(
                key,
                f"no effect: {deciding_key} is used instead"
                if deciding_key in draft.given_options
                else "0 leaves the interval to the tool's default",
            )
    max_steps = draft.get("max_steps")
    if per_epoch and max_steps:
        steps = 1 / (per_epoch * draft.get("num_epochs", 1))
    if steps and (steps >= 1 or max_steps):
        draft.assign(f"{spec_group}.strategy", "steps", deciding_key)
        draft.assign(f"{spec_group}.steps", max(1, int(steps if steps >= 1 else steps * max_steps)), deciding_key)
    elif steps or per_epoch:
        draft.assign(f"{spec_group}.strategy", "epoch", deciding_key)
        if per_epoch != 1:
            draft.add_warning(
                f"{draft.given_options[deciding_key].origin.location}: {deciding_key}: {spec_group}.strategy becomes epoch, "
                f"because the number of steps is not known before the data is read; set {spec_group}.strategy and {spec_group}.steps for another interval"
            )
    elif strategy == "best":
        draft.refuse_feature(
            strategy_key, "saving only checkpoints that are better than all earlier ones", "write epoch; the best checkpoint is always kept"
        )
    elif strategy:
        draft.assign(f"{spec_group}.strategy", strategy, strategy_key)


def _set_results(draft: JobDraft) -> None:
    if "output_dir" in draft.given_options:
        assign_output_folder(draft, "output_dir")
        if not draft.has_value("output.dir"):
            draft.add_reason("output_dir", "no effect: results are in the job's storage")
    if "hub_model_id" in draft.given_options:
        if "<" in str(draft.get("hub_model_id")):
            draft.add_mistake(
                "hub_model_id",
                f"{draft.get('hub_model_id')} is not the name of a repository",
                "write org/name, or remove the key",
            )
        else:
            assign_hub_push(draft, "hub_model_id")
    if draft.get("hub_revision") not in (None, "main"):
        draft.refuse_feature("hub_revision", "pushing to a branch of a repository", "write main")
    elif "hub_revision" in draft.given_options:
        draft.add_reason("hub_revision", "no effect: the model is pushed to the branch main")
    if isinstance(draft.get("resume_from_checkpoint"), bool):
        draft.add_reason("resume_from_checkpoint", "no effect: each attempt of a job resumes from the last checkpoint")
    elif "resume_from_checkpoint" in draft.given_options:
        assign_source_uri(draft, "resume_from_checkpoint", "checkpoint.resume")
    if "auto_resume_from_checkpoints" in draft.given_options:
        if draft.get("auto_resume_from_checkpoints") and not draft.has_value("checkpoint.resume"):
            draft.assign("checkpoint.resume", "auto", "auto_resume_from_checkpoints")
        else:
            draft.add_reason("auto_resume_from_checkpoints", "no effect: each attempt of a job resumes from the last checkpoint")


def _set_trackers(draft: JobDraft) -> None:
    if "logging_steps" in draft.given_options:
        draft.assign("tracking.loggingSteps", max(1, int(draft.get("logging_steps"))), "logging_steps")
    tracker_key_pairs = [
        (name, key) for name, flag, keys in (
            ("wandb", "use_wandb", ("use_wandb", "wandb_project")), ("mlflow", "use_mlflow", ("use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name")),
            ("tensorboard", "use_tensorboard", ("use_tensorboard",)),
        ) for key in [next((key for key in keys if draft.get(key)), None)]
        if key and draft.get(flag) is not False and draft.get(f"{name}_mode") != "disabled"
    ]  # fmt: skip
    for key in ("use_wandb", "use_mlflow", "use_tensorboard", "wandb_mode"):
        if key in draft.given_options:
            draft.add_reason(
                key, "selects the trackers that get the metrics" if draft.get(key) else "no effect: this tracker is off"
            )
    if tracker_key_pairs:
        draft.assign("tracking.reportTo", [name for name, _ in tracker_key_pairs], tracker_key_pairs[0][1])
    tracker_names = {name for name, _ in tracker_key_pairs}
    for key, path, tracker in (
        ("wandb_project", "tracking.wandb.project", "wandb"), ("wandb_entity", "tracking.wandb.entity", "wandb"),
        ("wandb_name", "output.runName.name", "wandb"),
        ("mlflow_tracking_uri", "tracking.mlflow.trackingUri", "mlflow"), ("mlflow_experiment_name", "tracking.mlflow.experimentName", "mlflow"),
        ("mlflow_run_name", "output.runName.name", "mlflow"),
    ):  # fmt: skip
        if key in draft.given_options and tracker in tracker_names:
            draft.assign(path, draft.get(key), key)
        elif key in draft.given_options:
            draft.add_reason(key, f"no effect: {tracker} gets no metrics")
    if "wandb" in tracker_names and draft.get("wandb_mode") != "offline":
        assign_secret_reference(draft, "tracking.wandb.apiKeySecretRef", "wandb", "reporting to wandb")
    if "wandb" in tracker_names and draft.get("wandb_mode") == "offline":
        draft.assign("placement.env", [{"name": "WANDB_MODE", "value": "offline"}], "wandb_mode")


IMPORTER = Importer(
    "axolotl",
    "Axolotl",
    OPTION_TABLE,
    DEFAULTS,
    recognises_input,
    read_options,
    combine_options,
    ignores_unknown_keys=True,
    reports_every_key=True,
)
