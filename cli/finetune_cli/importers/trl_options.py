"""The arguments of TRL's scripts, which are also options of Unsloth and of Kubeflow's TRL runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_cli.importers import training_arguments
from finetune_cli.importers.converters import (
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
from finetune_cli.importers.data_sources import DataSource, assign_data_sources, parse_split_fraction
from finetune_cli.importers.draft import JobDraft, OptionRow, ToolDefault
from finetune_cli.importers.options import (
    assign_default_gpus,
    assign_source_uri,
    double_kto_batch,
    make_ignored_options,
    make_refused_options,
    normalise_source_uri,
)
from finetune_cli.importers.training_arguments import set_training_arguments

DTYPE_BY_NAME = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}
ATTENTION_BY_NAME = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flashAttention2"}
DPO_LOSS_BY_NAME = {
    "sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exoPair", "nca_pair": "ncaPair", "robust": "robust", "bco_pair": "bcoPair",
    "apo_zero": "apoZero", "apo_down": "apoDown", "sft": "sft",
}  # fmt: skip
GRPO_LOSS_BY_NAME = {"grpo": "grpo", "bnpo": "bnpo", "dr_grpo": "drGrpo", "dapo": "dapo"}
LEARNING_RATE_BY_TRAINER = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "grpo": 1e-6, "reward": 1e-4}
"""The default learning rate of each of TRL's trainers."""
BUILTIN_REWARD_BY_NAME = {"think_format_reward": "thinkFormat"}
DATA_OPTION_HINT = "give --data URI"

OPTION_TABLE: tuple[OptionRow, ...] = (
    OptionRow("model_name_or_path", "model.source", is_required=True, is_set_by_combine=True),
    OptionRow("model_revision", "model.source", is_set_by_combine=True),
    OptionRow("trust_remote_code", "model.trustRemoteCode", to_boolean),
    OptionRow("dtype", "model.dtype", to_choice(DTYPE_BY_NAME), ("torch_dtype",)),
    OptionRow("attn_implementation", "model.attention", is_set_by_combine=True),
    OptionRow("use_peft", "method.type", to_boolean, is_set_by_combine=True),
    OptionRow("lora_r", "method.lora.rank", to_integer(1), is_set_by_combine=True),
    OptionRow("lora_alpha", "method.lora.alpha", to_number(exclusive_low=0), is_set_by_combine=True),
    OptionRow("lora_dropout", "method.lora.dropout", to_number(0, exclusive_high=1), is_set_by_combine=True),
    OptionRow("lora_target_modules", "method.lora.targetModules", to_name_list, is_set_by_combine=True),
    OptionRow("lora_target_parameters", "method.lora.targetParameters", to_name_list, is_set_by_combine=True),
    OptionRow("lora_modules_to_save", "method.lora.modulesToSave", to_name_list, is_set_by_combine=True),
    OptionRow("lora_task_type", convert=to_choice(["CAUSAL_LM", "SEQ_CLS"]), is_set_by_combine=True),
    OptionRow("use_rslora", "method.lora.rankStabilized", to_boolean, is_set_by_combine=True),
    OptionRow("use_dora", "method.lora.useDora", to_boolean, is_set_by_combine=True),
    OptionRow("load_in_8bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("load_in_4bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("bnb_4bit_quant_type", "model.quantization.type", to_choice(["nf4", "fp4"])),
    OptionRow("use_bnb_nested_quant", "model.quantization.doubleQuant", to_boolean),
    OptionRow("dataset_name", "dataset.train", is_set_by_combine=True),
    OptionRow("dataset_config", is_set_by_combine=True),
    OptionRow("dataset_train_split", is_set_by_combine=True),
    OptionRow("dataset_test_split", is_set_by_combine=True),
    OptionRow("datasets", "dataset.mixture", to_list_of(to_mapping), is_set_by_combine=True),
    OptionRow("test_split_size", "dataset.split.validation", to_number(0), is_set_by_combine=True),
    OptionRow("dataset_text_field", "dataset.columns.text", is_set_by_combine=True),
    OptionRow("dataset_num_proc", "dataset.numProc", to_integer(1)),
    OptionRow("max_length", "dataset.maxSequenceLength", to_integer(1), ("max_seq_length",)),
    OptionRow("packing", "dataset.packing", to_boolean, is_set_by_combine=True),
    OptionRow("completion_only_loss", "dataset.responseOnly.enabled", to_boolean, is_set_by_combine=True),
    OptionRow("assistant_only_loss", "dataset.responseOnly.enabled", to_boolean, is_set_by_combine=True),
    OptionRow("pad_token", "model.padToken"),
    OptionRow("activation_offloading", "training.gradientCheckpointing", to_boolean, is_set_by_combine=True),
    OptionRow("loss_type", "trainer.dpo.lossTypes", try_converters(to_list_of(to_text)), is_set_by_combine=True),
    OptionRow("beta", "trainer.dpo.beta", to_number(0), is_set_by_combine=True),
    OptionRow("label_smoothing", "trainer.dpo.labelSmoothing", to_number(0, exclusive_high=0.5), is_set_by_combine=True),
    OptionRow("max_completion_length", "trainer.maxCompletionLength", to_integer(1), is_set_by_combine=True),
    OptionRow("num_generations", "trainer.grpo.numGenerations", to_integer(2), is_set_by_combine=True),
    OptionRow("chat_template_kwargs", "dataset.templateVariables", to_template_variables, is_set_by_combine=True),
    OptionRow("temperature", "trainer.grpo.temperature", to_number(exclusive_low=0), is_set_by_combine=True),
    OptionRow("top_p", "trainer.grpo.topP", to_number(exclusive_low=0, high=1), is_set_by_combine=True),
    OptionRow("reward_funcs", "trainer.rewards", to_name_list, is_set_by_combine=True),
    *make_ignored_options("packing keeps rows whole, and rows do not attend to each other",
             "packing_strategy padding_free pad_to_multiple_of eval_packing pad_to_sequence_len"),
    *make_ignored_options("the trainer chooses how it stores quantised weights", "bnb_4bit_quant_storage"),
    *make_ignored_options("rows are always shuffled and read whole", "shuffle_dataset dataset_streaming streaming dataset_batch_size num_of_sequences"),
    *make_ignored_options("the trainer does not need this option",
             "ignore_bias_buffers gradient_checkpointing_use_reentrant disable_dropout is_encoder_decoder "
             "precompute_ref_log_probs precompute_ref_batch_size padding_value label_pad_token_id ds3_gather_for_generation use_logits_to_keep "
             "cache_implementation discopop_tau f_alpha_divergence_coef use_liger_loss use_liger"),
    *make_ignored_options("answers are not generated during training; see evaluation.comparison", "generate_during_eval num_generations_eval"),
    *make_ignored_options("metrics of the rewards are always logged", "log_completions log_multimodal num_completions_to_print log_unique_prompts "
             "log_completions_hub_repo wandb_log_unique_prompts"),
    *make_ignored_options("the trainer generates the answers itself", "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
             "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
             "vllm_tensor_parallel_size vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
             "vllm_importance_sampling_clip_min vllm_importance_sampling_cap vllm_guided_decoding_regex use_transformers_continuous_batching "
             "transformers_continuous_batching_config use_transformers_paged generation_batch_size steps_per_generation"),
    *make_ignored_options("only with sync_ref_model", "ref_model_mixup_alpha ref_model_sync_steps"),
    *make_ignored_options("only with loss_type vespo or sapo",
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"),
    *make_ignored_options("set environment variables in placement.env instead", "env"),
    *make_refused_options("options for loading the model", "model_init_kwargs ref_model_init_kwargs"),
    *make_refused_options("changing the model's architecture or configuration", "router_aux_loss_coef rope_scaling"),
    *make_refused_options("options for preparing rows in Python", "dataset_kwargs formatting_func"),
    *make_refused_options("an end-of-sequence token other than that of the tokenizer", "eos_token", "give a tokenizer with --set model.tokenizer=URI"),
    *make_refused_options("a chat template from a file", "chat_template_path chat_template",
             "store it in a ConfigMap and give --set dataset.chatTemplate.configMapRef.name=NAME --set dataset.chatTemplate.configMapRef.key=KEY"),
    *make_refused_options("truncating rows at their beginning", "truncation_mode", "write keep_start", "keep_start"),
    *make_refused_options("a separate maximum length for prompts", "max_prompt_length", "write max_length"),
    *make_refused_options("weights for the terms of the loss", "loss_weights use_weighting ld_alpha", "", [1.0]),
    *make_refused_options("a divergence other than the reverse KL divergence", "f_divergence_type", "write reverse_kl", "reverse_kl"),
    *make_refused_options("a reference model that is updated during training", "sync_ref_model"),
    *make_refused_options("different weights for good and bad answers in KTO", "desirable_weight undesirable_weight", "write 1", 1),
    *make_refused_options("the loss term center_rewards_coefficient of reward models", "center_rewards_coefficient"),
    *make_refused_options("a reward model in GRPO", "reward_model_name_or_path", "set trainer.rewards"),
    *make_refused_options("tools and environments in GRPO", "max_tool_calling_iterations"),
    *make_refused_options("this option of GRPO",
        "generation_kwargs min_p delta epsilon_high importance_sampling_level reward_weights mask_truncated_completions "
             "top_entropy_quantile entropy_coef use_adaptive_entropy off_policy_mask_threshold cast_lm_head_to_fp32 num_iterations "
             "repetition_penalty", "", 1, "token"),
    *make_refused_options("a clipping range other than 0.2 in GRPO", "epsilon", "write 0.2", 0.2),
    *make_refused_options("rewards that are not scaled by their standard deviation in the group", "scale_rewards multi_objective_aggregation",
             "write group", True, "group", "sum_then_normalize"),
    *make_ignored_options("only with use_adaptive_entropy or off_policy_mask_threshold",
             "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target use_bias_correction_kl"),
    *make_refused_options("sampling among the most likely tokens only", "top_k", "write 0", -1),
    *training_arguments.OPTION_TABLE,
)  # fmt: skip
OPAQUE_PATHS = training_arguments.OPAQUE_PATHS | {
    "model_init_kwargs", "dataset_kwargs", "env", "generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config", "rope_scaling",
}  # fmt: skip


def _uses_lora(draft: JobDraft) -> bool:
    return draft.value("method.type") in ("lora", "qlora")


def _make_trainer_check(name: str) -> Callable[[JobDraft], bool]:
    return lambda draft: bool(draft.value("trainer.type", "sft") == name)


DEFAULTS: tuple[ToolDefault, ...] = (
    *(ToolDefault("training.learningRate", rate, is_applicable=_make_trainer_check(name)) for name, rate in LEARNING_RATE_BY_TRAINER.items()),
    ToolDefault("training.gradientCheckpointing", "enabled"),
    ToolDefault("training.mixedPrecision", "bf16", needs_gpu=True),
    ToolDefault("tracking.loggingSteps", 10),
    ToolDefault("dataset.maxSequenceLength", 1024),
    ToolDefault("method.lora.rank", 16, is_applicable=_uses_lora),
    ToolDefault("method.lora.alpha", 32, is_applicable=_uses_lora),
    ToolDefault("method.lora.dropout", 0.05, is_applicable=_uses_lora),
    *training_arguments.DEFAULTS,
)


def set_trl_options(draft: JobDraft, trainer: str, *, uses_adapter: bool | None = None) -> None:
    """Set the fields whose value depends on several options.

    `trainer`: a value of `trainer.type`. `uses_adapter`: whether the job trains an adapter. If it is None, the option `use_peft` decides this.
    """
    revision = draft.get("model_revision")
    assign_source_uri(
        draft, "model_name_or_path", "model.source", None if revision in (None, "main") else str(revision)
    )
    if "model_revision" in draft.given_options:
        draft.add_reason("model_revision", "the revision is part of model.source")
    _set_attention(draft)
    _set_method(draft, bool(draft.get("use_peft")) if uses_adapter is None else uses_adapter)
    _set_objective(draft, trainer)
    _set_data(draft, trainer)
    _set_row_options(draft, trainer)
    set_training_arguments(draft, default_precision="")
    if draft.get("activation_offloading"):
        draft.assign("training.gradientCheckpointing", "unsloth", "activation_offloading")
    elif "activation_offloading" in draft.given_options:
        draft.add_reason("activation_offloading", "no effect: activations stay on the GPU")
    double_kto_batch(draft, "per_device_train_batch_size")
    assign_default_gpus(draft)


def _set_attention(draft: JobDraft) -> None:
    name = draft.get("attn_implementation")
    if name in ATTENTION_BY_NAME:
        draft.assign("model.attention", ATTENTION_BY_NAME[name], "attn_implementation")
    elif name is not None:
        draft.add_reason(
            "attn_implementation",
            f"{name} is replaced by attention auto: the trainer chooses the fastest that the GPU and model support",
        )


def _set_method(draft: JobDraft, uses_peft: bool) -> None:
    loads_in_4bit, loads_in_8bit = draft.get("load_in_4bit"), draft.get("load_in_8bit")
    if loads_in_4bit and loads_in_8bit:
        message = "4-bit and 8-bit loading exclude each other, but both are true"
        draft.add_mistake(
            ("load_in_4bit", "load_in_8bit"), message, "set one of them to false", explained_path="model.quantization"
        )
        return
    quantisation_key = "load_in_4bit" if loads_in_4bit else "load_in_8bit" if loads_in_8bit else None
    for key in ("load_in_4bit", "load_in_8bit"):
        if draft.get(key) is False:
            draft.add_reason(key, "no effect: false leaves this quantisation off")
    if "use_peft" in draft.given_options:
        draft.assign("method.type", ("qlora" if loads_in_4bit else "lora") if uses_peft else "full", "use_peft")
    elif not uses_peft:
        draft.assign_default("method.type", "full", "without use_peft, all weights are trained")
    if quantisation_key and uses_peft:
        draft.assign("model.quantization.bits", 4 if loads_in_4bit else 8, quantisation_key)
    elif quantisation_key:
        draft.add_mistake(
            quantisation_key,
            f"{quantisation_key} needs an adapter, but use_peft is not true",
            "write use_peft: true",
            explained_path="model.quantization",
        )
    for key in (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_target_parameters",
        "lora_modules_to_save",
        "use_rslora",
        "use_dora",
    ):
        if key in draft.given_options and uses_peft:
            draft.assign(draft.given_options[key].option_row.path, draft.get(key), key)
        elif key in draft.given_options:
            draft.add_reason(key, "no effect: use_peft is not true")
    if "lora_task_type" in draft.given_options:
        draft.add_reason("lora_task_type", "no effect: the objective sets the task type")


def _set_objective(draft: JobDraft, trainer: str) -> None:
    loss_names = draft.get("loss_type") or []
    if trainer == "dpo":
        unknown_names = [name for name in loss_names if name not in DPO_LOSS_BY_NAME]
        if unknown_names:
            draft.refuse_feature("loss_type", f"the loss {', '.join(unknown_names)}", f"write one of {', '.join(DPO_LOSS_BY_NAME)}")
        elif loss_names:
            draft.assign("trainer.dpo.lossTypes", [DPO_LOSS_BY_NAME[name] for name in loss_names], "loss_type")
    elif trainer == "grpo" and loss_names and loss_names[0] in GRPO_LOSS_BY_NAME:
        draft.assign("trainer.grpo.lossType", GRPO_LOSS_BY_NAME[loss_names[0]], "loss_type")
    elif loss_names and loss_names not in (["nll"], ["kto"]):
        draft.refuse_feature("loss_type", f"the loss {', '.join(loss_names)} of {trainer}")
    elif loss_names:
        draft.add_reason("loss_type", f"the loss of {trainer}")
    paths_by_key = {
        "beta": {"grpo": "trainer.grpo.beta", **dict.fromkeys(("dpo", "kto", "orpo"), "trainer.dpo.beta")},
        "label_smoothing": {"dpo": "trainer.dpo.labelSmoothing"},
        "max_completion_length": dict.fromkeys(("dpo", "kto", "orpo", "grpo"), "trainer.maxCompletionLength"),
        "num_generations": {"grpo": "trainer.grpo.numGenerations"}, "temperature": {"grpo": "trainer.grpo.temperature"}, "top_p": {"grpo": "trainer.grpo.topP"},
        "chat_template_kwargs": {"grpo": "dataset.templateVariables"},
    }  # fmt: skip
    for key, path_by_trainer in paths_by_key.items():
        if key not in draft.given_options:
            continue
        if key == "chat_template_kwargs" and not draft.get(key):
            draft.add_reason(key, "no arguments")
        elif trainer in path_by_trainer and (draft.get(key) or key != "label_smoothing"):
            draft.assign(path_by_trainer[trainer], draft.get(key), key)
        else:
            draft.warn_no_effect(key, f"the objective is {trainer}")
    _set_rewards(draft, trainer)


def _set_rewards(draft: JobDraft, trainer: str) -> None:
    reward_names = draft.get("reward_funcs") or []
    unknown_names = [name for name in reward_names if name not in BUILTIN_REWARD_BY_NAME]
    if unknown_names and "trainer.rewards" not in draft.request.overrides:
        draft.refuse_feature(
            "reward_funcs",
            f"the reward function {', '.join(unknown_names)}",
            "store it in a ConfigMap and set trainer.rewards",
        )
    elif reward_names and trainer == "grpo":
        draft.assign(
            "trainer.rewards",
            [{"builtin": BUILTIN_REWARD_BY_NAME[name]} for name in reward_names if name in BUILTIN_REWARD_BY_NAME],
            "reward_funcs",
        )
    elif reward_names:
        draft.warn_no_effect("reward_funcs", f"the objective is {trainer}")


def _set_data(draft: JobDraft, trainer: str) -> None:
    data_sources = []
    if "dataset_name" in draft.given_options:
        data_sources.append(_read_dataset(draft, "dataset_name", {
            "path": draft.get("dataset_name"), "name": draft.get("dataset_config"), "split": draft.get("dataset_train_split")}))  # fmt: skip
    for dataset_entry in draft.get("datasets") or []:
        data_sources.append(_read_dataset(draft, "datasets", dataset_entry))
    validation_size = draft.get("test_split_size")
    if validation_size and validation_size < 1:
        draft.assign("dataset.split.validation", validation_size, "test_split_size")
    elif validation_size:
        draft.refuse_feature(
            "test_split_size", "a number of validation rows", "write a fraction such as 0.05, or give --validation URI"
        )
    if "dataset_name" in draft.given_options and "datasets" in draft.given_options:
        draft.add_mistake(("dataset_name", "datasets"), "both name the training data", "remove one of them")
        return
    assign_data_sources(
        draft,
        "dataset_name" if "dataset_name" in draft.given_options else "datasets",
        [data_source for data_source in data_sources if data_source is not None],
    )
    for key in ("dataset_config", "dataset_train_split"):
        if key in draft.given_options:
            draft.add_reason(key, "included in the source of the data")
    if (
        draft.get("eval_strategy") not in (None, "no")
        and not draft.has_value("dataset.validation")
        and not draft.value("dataset.split.validation")
    ):
        draft.add_warning(
            f"{draft.given_options['eval_strategy'].origin.location}: eval_strategy has no effect: "
            f"the split {draft.get('dataset_test_split', 'test')} of a data set "
            "on the hub cannot be selected: give --validation URI"
        )
    if "dataset_test_split" in draft.given_options:
        draft.add_reason(
            "dataset_test_split", "no effect: splits of data sets on the hub cannot be selected; give --validation URI"
        )
    column = draft.get("dataset_text_field")
    if column == "text":
        draft.add_reason("dataset_text_field", "text is the default name of the column")
    elif column is not None:
        draft.assign("dataset.columns.text", column, "dataset_text_field")


def _read_dataset(draft: JobDraft, option_key: str, dataset_entry: dict[str, Any]) -> DataSource | None:
    path = dataset_entry.get("path")
    if not path:
        draft.add_mistake(option_key, "a data set has no path", "write path: org/name")
        return None
    known_options = ("path", "name", "data_dir", "data_files", "split", "columns")
    for name, value in dataset_entry.items():
        if name in ("name", "data_dir", "data_files", "columns") and value not in (None, "", "default", []):
            draft.refuse_feature(
                option_key,
                f"the option {name} of a data set on the hub",
                f"store the rows that you need in a file, and {DATA_OPTION_HINT}",
            )
        elif name not in known_options:
            draft.add_warning(
                f"{draft.given_options[option_key].origin.location}: {option_key}: {name} has no effect: it is not an option of a data set"
            )
    fraction = parse_split_fraction(str(dataset_entry.get("split") or "train"))
    if fraction is None:
        draft.refuse_feature(
            option_key,
            f"the split {dataset_entry['split']} of a data set on the hub",
            f"store the rows that you need in a file, and {DATA_OPTION_HINT}",
        )
    return DataSource(normalise_source_uri(draft, option_key, "dataset.train", str(path)), None, {}, None, fraction or 1.0)


def _set_row_options(draft: JobDraft, trainer: str) -> None:
    if draft.get("packing") and trainer == "sft":
        draft.assign("dataset.packing", True, "packing")
    elif "packing" in draft.given_options:
        draft.add_reason("packing", "rows are not packed")
    loss_key = next((name for name in ("assistant_only_loss", "completion_only_loss") if draft.get(name)), None)
    loss_key = loss_key or next(
        (name for name in ("completion_only_loss", "assistant_only_loss") if name in draft.given_options), None
    )
    if loss_key is not None and trainer == "sft":
        draft.assign("dataset.responseOnly.enabled", draft.get(loss_key), loss_key)
    elif trainer == "sft":
        draft.add_warning(
            "TRL trains on all tokens of a conversation, but a FineTuneJob only on the answers: "
            "to train on all tokens, give --set dataset.responseOnly.enabled=false"
        )
    for name in ("assistant_only_loss", "completion_only_loss"):
        if name in draft.given_options and name != loss_key:
            draft.add_reason(name, f"no effect: {loss_key} is used instead")
