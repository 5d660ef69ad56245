"""The training arguments of transformers, which LLaMA-Factory, TRL, Unsloth and Kubeflow share: option table, and fields that depend on several options.

The names are those of `transformers.TrainingArguments` and of older releases.
"""

from __future__ import annotations

import json
from typing import Any

from finetune_cli.importers.converters import (
    any_value,
    first_match,
    list_of,
    text,
    to_boolean,
    to_choice,
    to_integer,
    to_mapping,
    to_number,
)
from finetune_cli.importers.deepspeed import is_deepspeed, read_deepspeed
from finetune_cli.importers.draft import JobDraft, Row, ToolDefault
from finetune_cli.importers.guide import steps_or_none
from finetune_cli.importers.options import (
    DEVICES_REASON,
    LOADER_REASON,
    RANKS_REASON,
    SCHEDULERS,
    SPEED_REASON,
    assign_optimizer,
    assign_secret_reference,
    assign_source_uri,
    ignored,
    refused,
    to_steps_or_fraction,
    zero_stage_of_file,
)
from finetune_cli.importers.sources import assign_output_folder

LIGER_REASON = "Liger's kernels are used where this release has compared them with the model's layers"
TRACKERS = ("wandb", "tensorboard", "mlflow")
FSDP_WORDS = {
    "full_shard": "fullShard",
    "shard_grad_op": "shardGradOp",
    "no_shard": "noShard",
    "hybrid_shard": "fullShard",
    "hybrid_shard_zero2": "shardGradOp",
}
OTHER_FSDP_WORDS = ("auto_wrap", "offload")
"""Words of `fsdp` that do not choose the sharding."""


def strategy(value: Any) -> str:
    """Convert `steps`, `epoch`, `no` or `best`."""
    word: str = to_choice(["steps", "epoch", "no", "best"])(value)
    return word


def flag_or_path(value: Any) -> Any:
    """Convert true, false or a path."""
    return to_boolean(value) if isinstance(value, bool) or str(value).lower() in ("true", "false") else text(value)


ROWS: tuple[Row, ...] = (
    Row("output_dir", "output.dir", is_set_by_combine=True),
    Row("per_device_train_batch_size", "training.batchSizePerDevice", to_integer(1), ("per_gpu_train_batch_size",)),
    Row("per_device_eval_batch_size", "evaluation.batchSizePerDevice", to_integer(1), ("per_gpu_eval_batch_size",), is_set_by_combine=True),
    Row("num_train_epochs", "training.epochs", to_number(exclusive_low=0)),
    Row("max_steps", "training.maxSteps", steps_or_none),
    Row("gradient_accumulation_steps", "training.gradientAccumulationSteps", to_integer(1)),
    Row("learning_rate", "training.learningRate", to_number(exclusive_low=0)),
    Row("lr_scheduler_type", "training.scheduler", is_set_by_combine=True),
    Row("lr_scheduler_kwargs", "training.schedulerParameters", to_mapping, is_set_by_combine=True),
    Row("warmup_steps", "training.warmupSteps", to_steps_or_fraction, is_set_by_combine=True),
    Row("warmup_ratio", "training.warmupRatio", to_number(0, exclusive_high=1), is_set_by_combine=True),
    Row("optim", "training.optimizer", is_set_by_combine=True),
    Row("adafactor", "training.optimizer", to_boolean, is_set_by_combine=True),
    Row("weight_decay", "training.weightDecay", to_number(0)),
    Row("adam_beta1", "training.adamBeta1", to_number(0, exclusive_high=1)),
    Row("adam_beta2", "training.adamBeta2", to_number(0, exclusive_high=1)),
    Row("adam_epsilon", "training.adamEpsilon", to_number(exclusive_low=0)),
    Row("max_grad_norm", "training.maxGradNorm", to_number(0)),
    Row("bf16", "training.mixedPrecision", to_boolean, is_set_by_combine=True),
    Row("fp16", "training.mixedPrecision", to_boolean, is_set_by_combine=True),
    Row("gradient_checkpointing", "training.gradientCheckpointing", any_value, ("activation_checkpointing",), is_set_by_combine=True),
    Row("neftune_noise_alpha", "training.neftuneNoiseAlpha", to_number(exclusive_low=0)),
    Row("group_by_length", "training.groupByLength", to_boolean, is_set_by_combine=True),
    Row("train_sampling_strategy", "training.groupByLength", is_set_by_combine=True),
    Row("seed", "training.seed", to_integer(0, 4294967295)),
    Row("use_cpu", "resources.gpusPerNode", to_boolean, ("no_cuda",), is_set_by_combine=True),
    Row("logging_steps", "tracking.loggingSteps", to_number(0), is_set_by_combine=True),
    Row("logging_strategy", "tracking.loggingSteps", strategy, is_set_by_combine=True),
    Row("logging_first_step", "tracking.logFirstStep", to_boolean),
    Row("report_to", "tracking.reportTo", first_match(list_of(text)), is_set_by_combine=True),
    Row("run_name", "output.runName.name"),
    Row("eval_strategy", "evaluation.strategy", strategy, ("evaluation_strategy",), is_set_by_combine=True),
    Row("eval_steps", "evaluation.steps", to_number(0), is_set_by_combine=True),
    Row("save_strategy", "checkpoint.strategy", strategy, is_set_by_combine=True),
    Row("save_steps", "checkpoint.steps", to_number(0), is_set_by_combine=True),
    Row("save_total_limit", "checkpoint.keep", steps_or_none),
    Row("load_best_model_at_end", "checkpoint.loadBestAtEnd", to_boolean),
    Row("resume_from_checkpoint", "checkpoint.resume", flag_or_path, is_set_by_combine=True),
    Row("push_to_hub", "output.hub.push", to_boolean, is_set_by_combine=True),
    Row("hub_model_id", "output.hub.repository", aliases=("push_to_hub_model_id",), is_set_by_combine=True),
    Row("hub_token", "output.hub.tokenSecretRef", aliases=("push_to_hub_token",), is_set_by_combine=True, is_secret=True),
    Row("hub_private_repo", "output.hub.private", to_boolean, is_set_by_combine=True),
    Row("hub_revision", is_set_by_combine=True),
    Row("deepspeed", "distributed.deepspeed", first_match(text, to_mapping), is_set_by_combine=True),
    Row("fsdp", "distributed.fsdp.sharding", any_value, is_set_by_combine=True),
    Row("fsdp_config", "distributed.fsdp", first_match(text, to_mapping), is_set_by_combine=True),
    *ignored("every run writes to its own folder", "overwrite_output_dir logging_dir"),
    *ignored("the job always trains", "do_train"),
    *ignored("the validation set decides whether the job evaluates", "do_eval"),
    *ignored(SPEED_REASON, "tf32 torch_compile torch_compile_backend torch_compile_mode torchdynamo gradient_checkpointing_kwargs "
             "activation_checkpointing_kwargs "
             "torch_empty_cache_steps jit_mode_eval half_precision_backend fp16_backend fp16_opt_level bf16_full_eval fp16_full_eval use_ipex use_mps_device "
             "use_cache liger_kernel_config mp_parameters past_index optim_target_modules"),
    *ignored(LIGER_REASON, "use_liger_kernel"),
    *ignored(LOADER_REASON, "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
             "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names length_column_name accelerator_config dispatch_batches "
             "split_batches"),
    *ignored(RANKS_REASON, "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank ray_scope "
             "xpu_backend tpu_num_cores tpu_metrics_debug average_tokens_across_devices fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap"),
    *ignored(DEVICES_REASON, "device_map low_cpu_mem_usage"),
    *ignored("the trainer's own log has these values", "log_level log_level_replica log_on_each_node logging_nan_inf_filter disable_tqdm "
             "include_tokens_per_second include_num_input_tokens_seen skip_memory_metrics debug project trackio_space_id trackio_bucket_id "
             "trackio_static_space_id"),
    *ignored("the validation loss is measured in the trainer's own way", "prediction_loss_only eval_on_start eval_delay eval_do_concat_batches "
             "eval_use_gather_object eval_accumulation_steps include_for_metrics include_inputs_for_metrics batch_eval_metrics greater_is_better"),
    *ignored("checkpoints always contain the state of the optimizer, so that the job can resume", "save_only_model save_on_each_node save_safetensors "
             "enable_jit_checkpoint ignore_data_skip restore_callback_states_from_checkpoint"),
    *ignored("only the final model is pushed", "hub_strategy hub_always_push push_to_hub_organization"),
    *ignored("generating answers is a phase of its own; see evaluation.comparison", "do_predict predict_with_generate generation_max_length "
             "generation_num_beams generation_config sortish_sampler"),
    *ignored("one seed sets all random numbers", "data_seed full_determinism"),
    *refused("label smoothing", "label_smoothing_factor"),
    *refused("options of the optimizer beyond learning rate, betas, epsilon and weight decay", "optim_args"),
    *refused("a search for the batch size", "auto_find_batch_size", "policy.onOutOfMemory: Adapt retries with a smaller batch"),
    *refused("choosing the best checkpoint by another metric than the validation loss", "metric_for_best_model", "write eval_loss", "loss", "eval_loss"),
    *refused("tensor and context parallelism", "parallelism_config", "use FSDP or DeepSpeed"),
    *refused("the sharding of fairscale", "sharded_ddp", "use fsdp"),
)  # fmt: skip
OPAQUE_PATHS = frozenset(
    {"lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "deepspeed", "fsdp_config", "accelerator_config",
     "liger_kernel_config", "parallelism_config", "generation_config", "optim_args"}
)  # fmt: skip
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("training.epochs", 3, is_applicable=lambda d: not d.has_value("training.maxSteps")),
    ToolDefault("training.batchSizePerDevice", 8),
    ToolDefault("training.gradientAccumulationSteps", 1),
    ToolDefault("training.learningRate", 5e-5),
    ToolDefault("training.scheduler", "linear"),
    ToolDefault("training.warmupSteps", 0, is_applicable=lambda d: not d.has_value("training.warmupRatio")),
    ToolDefault("training.optimizer", "adamw_torch_fused"),
    ToolDefault("training.weightDecay", 0),
    ToolDefault("training.maxGradNorm", 1),
    ToolDefault("training.seed", 42),
    ToolDefault("checkpoint.strategy", "steps"),
    ToolDefault("checkpoint.steps", 500, is_applicable=lambda d: d.value("checkpoint.strategy", "steps") == "steps"),
    ToolDefault("checkpoint.keep", 0),
    ToolDefault("tracking.loggingSteps", 500),
    ToolDefault("output.layout", "flat", is_applicable=lambda d: d.has_value("output.dir")),
)  # fmt: skip
"""Defaults of transformers. A tool with other defaults puts its own defaults before these."""


def set_training_arguments(draft: JobDraft, *, default_precision: str = "no") -> None:
    """Set the fields that depend on several training arguments. `default_precision`: for a file without `bf16` and `fp16`; empty: set by the tool."""
    set_precision(draft, default_precision)
    set_distribution(draft)
    set_schedule(draft)
    set_intervals(draft)
    set_results(draft)
    set_trackers(draft)


def set_precision(draft: JobDraft, default: str) -> None:
    """Set mixed precision from `bf16` and `fp16`."""
    if draft.get("bf16") and draft.get("fp16"):
        draft.add_mistake(
            ("bf16", "fp16"),
            "bf16 and fp16 are both true",
            "set one of them to false",
            explained_path="training.mixedPrecision",
        )
        return
    on = next((key for key in ("bf16", "fp16") if draft.get(key)), None)
    for key in ("bf16", "fp16"):
        if draft.get(key) is False and (on or key == "fp16"):
            draft.add_reason(key, "no effect: another data type is used")
    if on:
        draft.assign("training.mixedPrecision", on, on)
    elif draft.get("bf16") is False:
        draft.assign("training.mixedPrecision", "no", "bf16")
    elif default and not draft.has_value("training.mixedPrecision"):
        draft.assign_default("training.mixedPrecision", default)


def set_schedule(draft: JobDraft) -> None:
    """Set schedule, warm-up, optimizer, recomputation and the order of rows."""
    name = draft.get("lr_scheduler_type")
    if name is not None and str(name) in SCHEDULERS:
        draft.assign("training.scheduler", SCHEDULERS[str(name)], "lr_scheduler_type")
    elif name is not None:
        draft.refuse_feature(
            "lr_scheduler_type", f"the learning rate schedule {name}", f"write one of {', '.join(SCHEDULERS)}"
        )
    if "lr_scheduler_kwargs" in draft.given_options:
        parameters = {str(key): str(value) for key, value in draft.get("lr_scheduler_kwargs").items()}
        draft.assign("training.schedulerParameters", parameters, "lr_scheduler_kwargs")
    _set_warmup(draft)
    if "optim" in draft.given_options:
        assign_optimizer(draft, "optim")
    if draft.get("adafactor"):
        draft.assign("training.optimizer", "adafactor", "adafactor")
    elif "adafactor" in draft.given_options:
        draft.add_reason("adafactor", "no effect: another optimizer is used")
    if "gradient_checkpointing" in draft.given_options:
        value = draft.get("gradient_checkpointing")
        mode = "unsloth" if value == "unsloth" else "enabled" if str(value).lower() == "true" else "disabled"
        draft.assign("training.gradientCheckpointing", mode, "gradient_checkpointing")
    _set_order(draft)


def _set_warmup(draft: JobDraft) -> None:
    steps, ratio = draft.get("warmup_steps"), draft.get("warmup_ratio")
    if steps:
        draft.assign("training.warmupSteps" if steps >= 1 else "training.warmupRatio", steps, "warmup_steps")
        if ratio is not None:
            draft.add_reason("warmup_ratio", "no effect: warmup_steps decides")
        return
    if ratio is not None:
        draft.assign("training.warmupRatio", ratio, "warmup_ratio")
        if steps is not None:
            draft.add_reason("warmup_steps", "no effect: warmup_ratio decides")
    elif steps is not None:
        draft.assign("training.warmupSteps", 0, "warmup_steps")


def _set_order(draft: JobDraft) -> None:
    order = draft.get("train_sampling_strategy")
    if order == "group_by_length" or draft.get("group_by_length"):
        key = "group_by_length" if draft.get("group_by_length") else "train_sampling_strategy"
        draft.assign("training.groupByLength", True, key)
    elif order == "sequential":
        draft.refuse_feature("train_sampling_strategy", "a fixed order of the rows", "write random")
    for key in ("train_sampling_strategy", "group_by_length"):
        if key in draft.given_options and not any(
            value.key == draft.given_options[key].key for value in draft.values.values()
        ):
            draft.add_reason(key, "no effect: rows are shuffled")
    if draft.value("dataset.packing") and draft.value("training.groupByLength"):
        draft.remove("training.groupByLength", "packed sequences have the same length")


def set_distribution(draft: JobDraft) -> None:
    """Set CPU training, DeepSpeed and FSDP."""
    if draft.get("use_cpu"):
        draft.assign("resources.gpusPerNode", 0, "use_cpu")
    elif "use_cpu" in draft.given_options:
        draft.add_reason("use_cpu", "no effect: the job uses GPUs")
    set_deepspeed(draft)
    set_fsdp(draft)


def set_deepspeed(draft: JobDraft) -> None:
    """Set DeepSpeed from the given DeepSpeed JSON, and from `deepspeed`: the name of a JSON, or its content."""
    for document in draft.documents:
        if is_deepspeed(document):
            read_deepspeed(draft, document)
            draft.assign_default("distributed.strategy", "deepspeed", "a DeepSpeed JSON is given")
    value = draft.get("deepspeed")
    if value is None:
        return
    draft.assign("distributed.strategy", "deepspeed", "deepspeed")
    if any(is_deepspeed(document) for document in draft.documents) or any(
        path.startswith("distributed.deepspeed") for path in draft.request.overrides
    ):
        return
    if isinstance(value, dict):
        name = f"{draft.name}-deepspeed"
        draft.config_maps[name] = {"deepspeed.json": json.dumps(value, indent=2)}
        draft.assign("distributed.deepspeed.configRef.name", name, "deepspeed")
        draft.assign("distributed.deepspeed.configRef.key", "deepspeed.json", "deepspeed")
        return
    fields = zero_stage_of_file(str(value))
    for word, feature in (("autotp", "tensor parallelism"), ("fp8", "FP8 training")):
        if word in str(value).lower():
            draft.refuse_feature("deepspeed", feature, "use another DeepSpeed configuration")
            return
    if fields is None:
        hint = "give the JSON as a further file, or --deepspeed NAME/KEY"
        draft.refuse_feature(
            "deepspeed", f"reading the DeepSpeed configuration {value}, which is not given,", hint, is_droppable=False
        )
        return
    for name, field_value in fields.items():
        draft.assign(f"distributed.deepspeed.{name}", field_value, "deepspeed")
    draft.add_note(
        f"deepspeed: the options come from the name {value}; give the JSON as a further file to use its content"
    )


def set_fsdp(draft: JobDraft) -> None:
    """Set FSDP from `fsdp` and `fsdp_config`."""
    value, config = draft.get("fsdp"), draft.get("fsdp_config")
    words = (
        value.replace(",", " ").split()
        if isinstance(value, str)
        else list(value)
        if isinstance(value, list)
        else ["full_shard"]
        if value is True
        else []
    )
    if not words:
        for key in ("fsdp", "fsdp_config"):
            if key in draft.given_options:
                draft.add_reason(key, "no effect: the file does not use FSDP")
        return
    if draft.value("distributed.strategy") == "deepspeed":
        draft.add_mistake(("deepspeed", "fsdp"), "DeepSpeed and FSDP exclude each other", "remove one of them")
        return
    draft.assign("distributed.strategy", "fsdp", "fsdp")
    unknown_words = [word for word in words if word not in (*FSDP_WORDS, *OTHER_FSDP_WORDS)]
    if unknown_words:
        draft.add_mistake("fsdp", f"{', '.join(unknown_words)} is not an option of FSDP", f"write words of {', '.join((*FSDP_WORDS, *OTHER_FSDP_WORDS))}")
    sharding = next((FSDP_WORDS[word] for word in words if word in FSDP_WORDS), "fullShard")
    if isinstance(config, str) and config:
        draft.refuse_feature("fsdp_config", f"reading the FSDP configuration {config}, which is not given,", "write its options below fsdp_config")
    if isinstance(config, dict):
        names = {key.removeprefix("fsdp_"): value for key, value in config.items()}
        if names.get("reshard_after_forward") is False:
            sharding = "shardGradOp"
        if names.get("offload_params"):
            words.append("offload")
        set_state_dict(draft, "fsdp_config", names.get("state_dict_type"))
    if isinstance(config, dict) and "fsdp_config" in draft.given_options:
        draft.add_reason("fsdp_config", "the trainer uses FSDP version 2 and chooses the layers to wrap")
    draft.assign("distributed.fsdp.sharding", sharding, "fsdp")
    if "offload" in words:
        draft.add_warning(
            f"{draft.given_options['fsdp'].origin.location}: fsdp: offload has no effect: the weights stay in GPU memory; use more GPUs, or DeepSpeed"
        )


def set_state_dict(draft: JobDraft, key: str, state_dict_type: Any) -> None:
    """Set the form of FSDP's checkpoints from the value of the option `key`. Refuse a form that FSDP version 2 does not have."""
    word = str(state_dict_type or "").upper().removesuffix("_STATE_DICT")
    if word in ("FULL", "SHARDED"):
        draft.assign("distributed.fsdp.stateDict", word.lower(), key)
    elif word:
        draft.refuse_feature(key, f"the state dict {state_dict_type} of FSDP", "write SHARDED_STATE_DICT or FULL_STATE_DICT")


def has_validation(draft: JobDraft) -> bool:
    """Return whether the job has validation rows that it evaluates."""
    has_rows = draft.has_value("dataset.validation") or bool(draft.value("dataset.split.validation"))
    return has_rows and draft.value("evaluation.strategy") != "no"


def set_intervals(draft: JobDraft) -> None:
    """Set when to save, evaluate and log."""
    _set_interval(draft, "checkpoint", "save_strategy", "save_steps")
    if has_validation(draft):
        _set_interval(draft, "evaluation", "eval_strategy", "eval_steps")
        if draft.has_value("evaluation.steps"):
            draft.assign_default("evaluation.strategy", "steps")
        if "per_device_eval_batch_size" in draft.given_options:
            draft.assign(
                "evaluation.batchSizePerDevice", draft.get("per_device_eval_batch_size"), "per_device_eval_batch_size"
            )
        if not draft.has_value("evaluation.strategy"):
            draft.assign_default(
                "evaluation.strategy", "no" if not draft.value("checkpoint.loadBestAtEnd") else "steps"
            )
    else:
        for key in ("eval_strategy", "eval_steps", "per_device_eval_batch_size"):
            if key in draft.given_options:
                draft.add_reason(key, "no effect: there is no validation set")
    steps, kind = draft.get("logging_steps"), draft.get("logging_strategy")
    if steps and kind in (None, "steps"):
        total = draft.get("max_steps")
        draft.assign(
            "tracking.loggingSteps", max(1, int(steps if steps >= 1 else steps * (total or 100))), "logging_steps"
        )
    elif "logging_steps" in draft.given_options:
        draft.add_reason("logging_steps", "no effect: metrics are logged at the trainer's own interval")
    if "logging_strategy" in draft.given_options:
        draft.add_reason("logging_strategy", "no effect: metrics are always logged by steps")


def _set_interval(draft: JobDraft, group: str, strategy_key: str, steps_key: str) -> None:
    kind, steps, total = draft.get(strategy_key), draft.get(steps_key), draft.get("max_steps")
    if kind == "best":
        draft.refuse_feature(
            strategy_key, "saving only better checkpoints", "write steps or epoch; the best checkpoint is always kept"
        )
        return
    if kind is not None:
        draft.assign(f"{group}.strategy", kind, strategy_key)
    if steps_key not in draft.given_options:
        return
    if kind in ("epoch", "no"):
        draft.add_reason(steps_key, f"no effect: {strategy_key} is {kind}")
    elif not steps:
        draft.add_reason(steps_key, "0 leaves the interval to the tool's default")
    elif steps >= 1 or total:
        draft.assign(f"{group}.steps", max(1, int(steps if steps >= 1 else steps * total)), steps_key)
    else:
        draft.assign(f"{group}.strategy", "epoch", steps_key)
        draft.add_warning(
            f"{draft.given_options[steps_key].origin.location}: {steps_key}: {steps:g} is a fraction of all steps, "
            "whose number is not known before the data is "
            f"read, so the job does this once per epoch; set {group}.strategy and {group}.steps for another interval"
        )


def set_results(draft: JobDraft) -> None:
    """Set the output folder, the hub and the checkpoint to resume from."""
    if "output_dir" in draft.given_options:
        assign_output_folder(draft, "output_dir")
        if not draft.has_value("output.dir"):
            draft.add_reason("output_dir", "no effect: results are in the job's storage")
    _set_hub(draft)
    resume = draft.get("resume_from_checkpoint")
    if isinstance(resume, bool):
        draft.add_reason("resume_from_checkpoint", "no effect: attempts of a job always resume")
    elif resume is not None:
        assign_source_uri(draft, "resume_from_checkpoint", "checkpoint.resume")


def _set_hub(draft: JobDraft) -> None:
    keys = ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision")
    if not draft.get("push_to_hub"):
        if "push_to_hub" in draft.given_options:
            draft.add_reason("push_to_hub", "no effect: nothing is pushed")
        for key in keys:
            if key in draft.given_options:
                draft.add_reason(key, "no effect: push_to_hub is not true")
        return
    if "hub_model_id" not in draft.given_options:
        if "output.hub.repository" not in draft.request.overrides:
            draft.add_mistake(
                "push_to_hub",
                "push_to_hub is true, but hub_model_id is missing",
                "write hub_model_id: org/name",
                explained_path="output.hub",
            )
        return
    draft.assign("output.hub.push", True, "push_to_hub")
    draft.assign("output.hub.repository", draft.get("hub_model_id"), "hub_model_id")
    if "hub_private_repo" in draft.given_options:
        draft.assign("output.hub.private", draft.get("hub_private_repo"), "hub_private_repo")
    if "hub_token" in draft.given_options:
        draft.assign("output.hub.tokenSecretRef", draft.store_secret("hf-token", draft.get("hub_token")), "hub_token")
    elif not draft.has_value("model.tokenSecretRef"):
        assign_secret_reference(draft, "output.hub.tokenSecretRef", "hub", "pushing the model to the hub")
    if draft.get("hub_revision") not in (None, "main"):
        draft.refuse_feature("hub_revision", "pushing to a branch of a repository", "write main")
    elif "hub_revision" in draft.given_options:
        draft.add_reason("hub_revision", "no effect: the model is pushed to the branch main")


def set_trackers(draft: JobDraft) -> None:
    """Set the trackers of `report_to`."""
    if "report_to" not in draft.given_options:
        return
    names = [str(name).strip() for name in draft.get("report_to")]
    known = [name for name in names if name in TRACKERS]
    draft.assign("tracking.reportTo", known, "report_to")
    others = [name for name in names if name not in (*TRACKERS, "none")]
    if others:
        draft.add_warning(
            f"{draft.given_options['report_to'].origin.location}: report_to: {', '.join(others)}: "
            "a FineTuneJob reports to wandb, tensorboard, mlflow and mongodb"
        )
    if "wandb" in known:
        assign_secret_reference(draft, "tracking.wandb.apiKeySecretRef", "wandb", "reporting to wandb")
    if "mlflow" in known and not draft.has_value("tracking.mlflow.trackingUri"):
        uri = draft.request.environment.get("MLFLOW_TRACKING_URI", "")
        if uri:
            draft.assign_default("tracking.mlflow.trackingUri", uri, "the variable MLFLOW_TRACKING_URI")
        else:
            draft.refuse_feature(
                "report_to",
                "reporting to MLflow without the address of the server",
                "give --set tracking.mlflow.trackingUri=URL",
            )
