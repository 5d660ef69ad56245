"""The arguments of TRL's scripts: option table, and fields that depend on several options. Unsloth and Kubeflow use the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_cli.importers import training_arguments
from finetune_cli.importers.converters import (
    first_match,
    list_of,
    name_list,
    text,
    to_boolean,
    to_choice,
    to_integer,
    to_mapping,
    to_number,
)
from finetune_cli.importers.data_parts import DataPart, assign_parts, fraction_of_split
from finetune_cli.importers.draft import JobDraft, Row, ToolDefault
from finetune_cli.importers.options import (
    assign_default_gpus,
    assign_source_uri,
    fit_kto_batch,
    ignored,
    refused,
    to_source_uri,
)
from finetune_cli.importers.training_arguments import set_training_arguments

DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flashAttention2"}
DPO_LOSSES = {
    "sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exoPair", "nca_pair": "ncaPair", "robust": "robust", "bco_pair": "bcoPair",
    "apo_zero": "apoZero", "apo_down": "apoDown", "sft": "sft",
}  # fmt: skip
GRPO_LOSSES = {"grpo": "grpo", "bnpo": "bnpo", "dr_grpo": "drGrpo", "dapo": "dapo"}
LEARNING_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "grpo": 1e-6, "reward": 1e-4}
"""Default learning rates of TRL's trainers."""
BUILTIN_REWARDS = {"think_format_reward": "thinkFormat"}
NO_ITEM = "give --data URI"

ROWS: tuple[Row, ...] = (
    Row("model_name_or_path", "model.source", is_required=True, is_set_by_combine=True),
    Row("model_revision", "model.source", is_set_by_combine=True),
    Row("trust_remote_code", "model.trustRemoteCode", to_boolean),
    Row("dtype", "model.dtype", to_choice(DTYPES), ("torch_dtype",)),
    Row("attn_implementation", "model.attention", is_set_by_combine=True),
    Row("use_peft", "method.type", to_boolean, is_set_by_combine=True),
    Row("lora_r", "method.lora.rank", to_integer(1), is_set_by_combine=True),
    Row("lora_alpha", "method.lora.alpha", to_number(exclusive_low=0), is_set_by_combine=True),
    Row("lora_dropout", "method.lora.dropout", to_number(0, exclusive_high=1), is_set_by_combine=True),
    Row("lora_target_modules", "method.lora.targetModules", name_list, is_set_by_combine=True),
    Row("lora_target_parameters", "method.lora.targetParameters", name_list, is_set_by_combine=True),
    Row("lora_modules_to_save", "method.lora.modulesToSave", name_list, is_set_by_combine=True),
    Row("lora_task_type", convert=to_choice(["CAUSAL_LM", "SEQ_CLS"]), is_set_by_combine=True),
    Row("use_rslora", "method.lora.rankStabilized", to_boolean, is_set_by_combine=True),
    Row("use_dora", "method.lora.useDora", to_boolean, is_set_by_combine=True),
    Row("load_in_8bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    Row("load_in_4bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    Row("bnb_4bit_quant_type", "model.quantization.type", to_choice(["nf4", "fp4"])),
    Row("use_bnb_nested_quant", "model.quantization.doubleQuant", to_boolean),
    Row("dataset_name", "dataset.train", is_set_by_combine=True),
    Row("dataset_config", is_set_by_combine=True),
    Row("dataset_train_split", is_set_by_combine=True),
    Row("dataset_test_split", is_set_by_combine=True),
    Row("datasets", "dataset.mixture", list_of(to_mapping), is_set_by_combine=True),
    Row("test_split_size", "dataset.split.validation", to_number(0), is_set_by_combine=True),
    Row("dataset_text_field", "dataset.columns.text", is_set_by_combine=True),
    Row("dataset_num_proc", "dataset.numProc", to_integer(1)),
    Row("max_length", "dataset.maxSequenceLength", to_integer(1), ("max_seq_length",)),
    Row("packing", "dataset.packing", to_boolean, is_set_by_combine=True),
    Row("completion_only_loss", "dataset.responseOnly.enabled", to_boolean, is_set_by_combine=True),
    Row("assistant_only_loss", "dataset.responseOnly.enabled", to_boolean, is_set_by_combine=True),
    Row("pad_token", "model.padToken"),
    Row("activation_offloading", "training.gradientCheckpointing", to_boolean, is_set_by_combine=True),
    Row("loss_type", "trainer.dpo.lossTypes", first_match(list_of(text)), is_set_by_combine=True),
    Row("beta", "trainer.dpo.beta", to_number(0), is_set_by_combine=True),
    Row("label_smoothing", "trainer.dpo.labelSmoothing", to_number(0, exclusive_high=0.5), is_set_by_combine=True),
    Row("max_completion_length", "trainer.maxCompletionLength", to_integer(1), is_set_by_combine=True),
    Row("num_generations", "trainer.grpo.numGenerations", to_integer(2), is_set_by_combine=True),
    Row("temperature", "trainer.grpo.temperature", to_number(exclusive_low=0), is_set_by_combine=True),
    Row("top_p", "trainer.grpo.topP", to_number(exclusive_low=0, high=1), is_set_by_combine=True),
    Row("reward_funcs", "trainer.rewards", name_list, is_set_by_combine=True),
    *ignored("packing keeps rows whole and apart from each other", "packing_strategy padding_free pad_to_multiple_of eval_packing pad_to_sequence_len"),
    *ignored("the trainer chooses how it stores quantised weights", "bnb_4bit_quant_storage"),
    *ignored("rows are always shuffled and read whole", "shuffle_dataset dataset_streaming streaming dataset_batch_size num_of_sequences"),
    *ignored("the trainer's own way of working does not need this",
             "ignore_bias_buffers gradient_checkpointing_use_reentrant disable_dropout is_encoder_decoder "
             "precompute_ref_log_probs precompute_ref_batch_size padding_value label_pad_token_id ds3_gather_for_generation use_logits_to_keep "
             "cache_implementation discopop_tau f_alpha_divergence_coef use_liger_loss use_liger"),
    *ignored("answers are not generated during training; see evaluation.comparison", "generate_during_eval num_generations_eval"),
    *ignored("metrics of the rewards are always logged", "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo "
             "wandb_log_unique_prompts"),
    *ignored("the trainer generates the answers itself", "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
             "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
             "vllm_tensor_parallel_size vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
             "vllm_importance_sampling_clip_min vllm_importance_sampling_cap vllm_guided_decoding_regex use_transformers_continuous_batching "
             "transformers_continuous_batching_config use_transformers_paged generation_batch_size steps_per_generation"),
    *ignored("only with sync_ref_model", "ref_model_mixup_alpha ref_model_sync_steps"),
    *ignored("only with loss_type vespo or sapo", "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"),
    *ignored("the environment of the pods is placement.env", "env"),
    *refused("options for loading the model", "model_init_kwargs ref_model_init_kwargs"),
    *refused("changing the model's architecture or configuration", "router_aux_loss_coef rope_scaling"),
    *refused("options for preparing rows in Python", "dataset_kwargs formatting_func"),
    *refused("another end-of-sequence token than the tokenizer's", "eos_token", "give a tokenizer with --set model.tokenizer=URI"),
    *refused("a chat template from a file", "chat_template_path chat_template",
             "store it in a ConfigMap and give --set dataset.chatTemplate.configMapRef.name=NAME --set dataset.chatTemplate.configMapRef.key=KEY"),
    *refused("truncating rows at their beginning", "truncation_mode", "write keep_start", "keep_start"),
    *refused("an own maximum length for prompts", "max_prompt_length", "write max_length"),
    *refused("weights of losses", "loss_weights use_weighting ld_alpha", "", [1.0]),
    *refused("another divergence than the reverse KL divergence", "f_divergence_type", "write reverse_kl", "reverse_kl"),
    *refused("a reference model that is updated during training", "sync_ref_model"),
    *refused("different weights of good and bad answers in KTO", "desirable_weight undesirable_weight", "write 1", 1),
    *refused("the loss term center_rewards_coefficient of reward models", "center_rewards_coefficient"),
    *refused("a reward model in GRPO", "reward_model_name_or_path", "set trainer.rewards"),
    *refused("tools and environments in GRPO", "max_tool_calling_iterations"),
    *refused("this option of GRPO", "generation_kwargs min_p delta epsilon_high importance_sampling_level reward_weights mask_truncated_completions "
             "top_entropy_quantile entropy_coef use_adaptive_entropy off_policy_mask_threshold chat_template_kwargs cast_lm_head_to_fp32 num_iterations "
             "repetition_penalty", "", 1, "token"),
    *refused("another clipping range than 0.2 in GRPO", "epsilon", "write 0.2", 0.2),
    *refused("another scale of rewards than their standard deviation in the group", "scale_rewards multi_objective_aggregation", "write group", True, "group",
             "sum_then_normalize"),
    *ignored("only with use_adaptive_entropy or off_policy_mask_threshold",
             "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target use_bias_correction_kl"),
    *refused("sampling among the most likely tokens only", "top_k", "write 0", -1),
    *training_arguments.ROWS,
)  # fmt: skip
OPAQUE_PATHS = training_arguments.OPAQUE_PATHS | {
    "model_init_kwargs", "dataset_kwargs", "env", "generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config", "rope_scaling",
}  # fmt: skip


def _uses_lora(draft: JobDraft) -> bool:
    return draft.value("method.type") in ("lora", "qlora")


def _has_trainer(name: str) -> Callable[[JobDraft], bool]:
    return lambda draft: bool(draft.value("trainer.type", "sft") == name)


DEFAULTS: tuple[ToolDefault, ...] = (
    *(ToolDefault("training.learningRate", rate, is_applicable=_has_trainer(name)) for name, rate in LEARNING_RATES.items()),
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
    """Set the fields whose value depends on several options. `trainer`: a value of `trainer.type`. If `uses_adapter` is None, the option `use_peft` decides."""
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
    _set_rows(draft, trainer)
    set_training_arguments(draft, default_precision="")
    if draft.get("activation_offloading"):
        draft.assign("training.gradientCheckpointing", "unsloth", "activation_offloading")
    elif "activation_offloading" in draft.given_options:
        draft.add_reason("activation_offloading", "no effect: activations stay on the GPU")
    fit_kto_batch(draft, "per_device_train_batch_size")
    assign_default_gpus(draft)


def _set_attention(draft: JobDraft) -> None:
    name = draft.get("attn_implementation")
    if name in ATTENTION:
        draft.assign("model.attention", ATTENTION[name], "attn_implementation")
    elif name is not None:
        draft.add_reason(
            "attn_implementation",
            f"{name} is replaced by attention auto: the trainer chooses the fastest that the GPU and model support",
        )


def _set_method(draft: JobDraft, uses_peft: bool) -> None:
    in_4bit, in_8bit = draft.get("load_in_4bit"), draft.get("load_in_8bit")
    if in_4bit and in_8bit:
        message = "4-bit and 8-bit loading exclude each other, but both are true"
        draft.add_mistake(
            ("load_in_4bit", "load_in_8bit"), message, "set one of them to false", explained_path="model.quantization"
        )
        return
    quantised = "load_in_4bit" if in_4bit else "load_in_8bit" if in_8bit else None
    for key in ("load_in_4bit", "load_in_8bit"):
        if draft.get(key) is False:
            draft.add_reason(key, "no effect: the base model is not loaded in this way")
    if "use_peft" in draft.given_options:
        draft.assign("method.type", ("qlora" if in_4bit else "lora") if uses_peft else "full", "use_peft")
    elif not uses_peft:
        draft.assign_default("method.type", "full", "without use_peft, all weights are trained")
    if quantised and uses_peft:
        draft.assign("model.quantization.bits", 4 if in_4bit else 8, quantised)
    elif quantised:
        draft.add_mistake(
            quantised,
            f"{quantised} needs an adapter, but use_peft is not true",
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
            draft.assign(draft.given_options[key].row.path, draft.get(key), key)
        elif key in draft.given_options:
            draft.add_reason(key, "no effect: use_peft is not true")
    if "lora_task_type" in draft.given_options:
        draft.add_reason("lora_task_type", "no effect: the objective decides")


def _set_objective(draft: JobDraft, trainer: str) -> None:
    losses = draft.get("loss_type") or []
    if trainer == "dpo":
        unknown = [name for name in losses if name not in DPO_LOSSES]
        if unknown:
            draft.refuse_feature("loss_type", f"the loss {', '.join(unknown)}", f"write one of {', '.join(DPO_LOSSES)}")
        elif losses:
            draft.assign("trainer.dpo.lossTypes", [DPO_LOSSES[name] for name in losses], "loss_type")
    elif trainer == "grpo" and losses and losses[0] in GRPO_LOSSES:
        draft.assign("trainer.grpo.lossType", GRPO_LOSSES[losses[0]], "loss_type")
    elif losses and losses not in (["nll"], ["kto"]):
        draft.refuse_feature("loss_type", f"the loss {', '.join(losses)} of {trainer}")
    elif losses:
        draft.add_reason("loss_type", f"the loss of {trainer}")
    paths = {
        "beta": {"grpo": "trainer.grpo.beta", **dict.fromkeys(("dpo", "kto", "orpo"), "trainer.dpo.beta")},
        "label_smoothing": {"dpo": "trainer.dpo.labelSmoothing"},
        "max_completion_length": dict.fromkeys(("dpo", "kto", "orpo", "grpo"), "trainer.maxCompletionLength"),
        "num_generations": {"grpo": "trainer.grpo.numGenerations"}, "temperature": {"grpo": "trainer.grpo.temperature"}, "top_p": {"grpo": "trainer.grpo.topP"},
    }  # fmt: skip
    for key, path_by_trainer in paths.items():
        if key in draft.given_options and trainer in path_by_trainer and (draft.get(key) or key != "label_smoothing"):
            draft.assign(path_by_trainer[trainer], draft.get(key), key)
        elif key in draft.given_options:
            draft.warn_no_effect(key, f"the objective is {trainer}")
    _set_rewards(draft, trainer)


def _set_rewards(draft: JobDraft, trainer: str) -> None:
    names = draft.get("reward_funcs") or []
    unknown = [name for name in names if name not in BUILTIN_REWARDS]
    if unknown and "trainer.rewards" not in draft.request.overrides:
        draft.refuse_feature(
            "reward_funcs",
            f"the reward function {', '.join(unknown)}",
            "store it in a ConfigMap and set trainer.rewards",
        )
    elif names and trainer == "grpo":
        draft.assign(
            "trainer.rewards",
            [{"builtin": BUILTIN_REWARDS[name]} for name in names if name in BUILTIN_REWARDS],
            "reward_funcs",
        )
    elif names:
        draft.warn_no_effect("reward_funcs", f"the objective is {trainer}")


def _set_data(draft: JobDraft, trainer: str) -> None:
    parts = []
    if "dataset_name" in draft.given_options:
        parts.append(_part(draft, "dataset_name", {
            "path": draft.get("dataset_name"), "name": draft.get("dataset_config"), "split": draft.get("dataset_train_split")}))  # fmt: skip
    for item in draft.get("datasets") or []:
        parts.append(_part(draft, "datasets", item))
    size = draft.get("test_split_size")
    if size and size < 1:
        draft.assign("dataset.split.validation", size, "test_split_size")
    elif size:
        draft.refuse_feature(
            "test_split_size", "a number of validation rows", "write a fraction such as 0.05, or give --validation URI"
        )
    if "dataset_name" in draft.given_options and "datasets" in draft.given_options:
        draft.add_mistake(("dataset_name", "datasets"), "both name the training data", "remove one of them")
        return
    assign_parts(
        draft,
        "dataset_name" if "dataset_name" in draft.given_options else "datasets",
        [part for part in parts if part is not None],
    )
    for key in ("dataset_config", "dataset_train_split"):
        if key in draft.given_options:
            draft.add_reason(key, "part of the source of the data")
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
        draft.add_reason("dataset_text_field", "the usual name of the column")
    elif column is not None:
        draft.assign("dataset.columns.text", column, "dataset_text_field")


def _part(draft: JobDraft, key: str, item: dict[str, Any]) -> DataPart | None:
    path = item.get("path")
    if not path:
        draft.add_mistake(key, "a data set has no path", "write path: org/name")
        return None
    known = ("path", "name", "data_dir", "data_files", "split", "columns")
    for name, value in item.items():
        if name in ("name", "data_dir", "data_files", "columns") and value not in (None, "", "default", []):
            draft.refuse_feature(
                key,
                f"the option {name} of a data set on the hub",
                f"store the rows that you need in a file, and {NO_ITEM}",
            )
        elif name not in known:
            draft.add_warning(
                f"{draft.given_options[key].origin.location}: {key}: {name} is not an option of a data set"
            )
    fraction = fraction_of_split(str(item.get("split") or "train"))
    if fraction is None:
        draft.refuse_feature(
            key,
            f"the split {item['split']} of a data set on the hub",
            f"store the rows that you need in a file, and {NO_ITEM}",
        )
    return DataPart(to_source_uri(draft, key, "dataset.train", str(path)), None, {}, None, fraction or 1.0)


def _set_rows(draft: JobDraft, trainer: str) -> None:
    if draft.get("packing") and trainer == "sft":
        draft.assign("dataset.packing", True, "packing")
    elif "packing" in draft.given_options:
        draft.add_reason("packing", "rows are not packed")
    key = next((name for name in ("assistant_only_loss", "completion_only_loss") if draft.get(name)), None)
    key = key or next(
        (name for name in ("completion_only_loss", "assistant_only_loss") if name in draft.given_options), None
    )
    if key is not None and trainer == "sft":
        draft.assign("dataset.responseOnly.enabled", draft.get(key), key)
    elif trainer == "sft":
        draft.add_warning(
            "TRL trains on all tokens of conversations, a FineTuneJob only on the answers: "
            "write --set dataset.responseOnly.enabled=false to train on all tokens"
        )
    for name in ("assistant_only_loss", "completion_only_loss"):
        if name in draft.given_options and name != key:
            draft.add_reason(name, f"no effect: {key} decides")
