"""The training arguments of transformers, which are also options of LLaMA-Factory, TRL, Unsloth and Kubeflow.

The names come from `transformers.TrainingArguments` and from its older releases.
"""

from __future__ import annotations

import json
from typing import Any

from finetune_cli.importers.converters import (
    keep_value,
    to_boolean,
    to_choice,
    to_integer,
    to_list_of,
    to_mapping,
    to_number,
    to_text,
    try_converters,
)
from finetune_cli.importers.deepspeed import is_deepspeed, read_deepspeed
from finetune_cli.importers.draft import JobDraft, OptionRow, ToolDefault
from finetune_cli.importers.guide import to_steps_or_none
from finetune_cli.importers.options import (
    DEVICES_REASON,
    LOADER_REASON,
    RANKS_REASON,
    SCHEDULER_BY_NAME,
    SPEED_REASON,
    assign_optimizer,
    assign_secret_reference,
    assign_source_uri,
    guess_deepspeed_fields,
    make_ignored_options,
    make_refused_options,
    to_steps_or_fraction,
)
from finetune_cli.importers.sources import assign_output_folder

LIGER_REASON = "the trainer uses Liger's kernels for the models with which this release has tested them"
TRACKERS = ("wandb", "tensorboard", "mlflow")
SHARDING_BY_FSDP_WORD = {
    "full_shard": "fullShard",
    "shard_grad_op": "shardGradOp",
    "no_shard": "noShard",
    "hybrid_shard": "fullShard",
    "hybrid_shard_zero2": "shardGradOp",
}
OTHER_FSDP_WORDS = ("auto_wrap", "offload")
"""Words that are allowed in the option `fsdp`, but do not choose the sharding."""


def to_strategy(value: Any) -> str:
    """Return the strategy, which must be `steps`, `epoch`, `no` or `best`."""
    strategy: str = to_choice(["steps", "epoch", "no", "best"])(value)
    return strategy


def to_flag_or_path(value: Any) -> Any:
    """Convert `true` or `false` to a boolean, and any other value to a path."""
    return to_boolean(value) if isinstance(value, bool) or str(value).lower() in ("true", "false") else to_text(value)


OPTION_TABLE: tuple[OptionRow, ...] = (
    OptionRow("output_dir", "output.dir", is_set_by_combine=True),
    OptionRow("per_device_train_batch_size", "training.batchSizePerDevice", to_integer(1), ("per_gpu_train_batch_size",)),
    OptionRow("per_device_eval_batch_size", "evaluation.batchSizePerDevice", to_integer(1), ("per_gpu_eval_batch_size",), is_set_by_combine=True),
    OptionRow("num_train_epochs", "training.epochs", to_number(exclusive_low=0)),
    OptionRow("max_steps", "training.maxSteps", to_steps_or_none),
    OptionRow("gradient_accumulation_steps", "training.gradientAccumulationSteps", to_integer(1)),
    OptionRow("learning_rate", "training.learningRate", to_number(exclusive_low=0)),
    OptionRow("lr_scheduler_type", "training.scheduler", is_set_by_combine=True),
    OptionRow("lr_scheduler_kwargs", "training.schedulerParameters", to_mapping, is_set_by_combine=True),
    OptionRow("warmup_steps", "training.warmupSteps", to_steps_or_fraction, is_set_by_combine=True),
    OptionRow("warmup_ratio", "training.warmupRatio", to_number(0, exclusive_high=1), is_set_by_combine=True),
    OptionRow("optim", "training.optimizer", is_set_by_combine=True),
    OptionRow("adafactor", "training.optimizer", to_boolean, is_set_by_combine=True),
    OptionRow("weight_decay", "training.weightDecay", to_number(0)),
    OptionRow("adam_beta1", "training.adamBeta1", to_number(0, exclusive_high=1)),
    OptionRow("adam_beta2", "training.adamBeta2", to_number(0, exclusive_high=1)),
    OptionRow("adam_epsilon", "training.adamEpsilon", to_number(exclusive_low=0)),
    OptionRow("max_grad_norm", "training.maxGradNorm", to_number(0)),
    OptionRow("bf16", "training.mixedPrecision", to_boolean, is_set_by_combine=True),
    OptionRow("fp16", "training.mixedPrecision", to_boolean, is_set_by_combine=True),
    OptionRow("gradient_checkpointing", "training.gradientCheckpointing", keep_value, ("activation_checkpointing",), is_set_by_combine=True),
    OptionRow("neftune_noise_alpha", "training.neftuneNoiseAlpha", to_number(exclusive_low=0)),
    OptionRow("group_by_length", "training.groupByLength", to_boolean, is_set_by_combine=True),
    OptionRow("train_sampling_strategy", "training.groupByLength", is_set_by_combine=True),
    OptionRow("seed", "training.seed", to_integer(0, 4294967295)),
    OptionRow("use_cpu", "resources.gpusPerNode", to_boolean, ("no_cuda",), is_set_by_combine=True),
    OptionRow("logging_steps", "tracking.loggingSteps", to_number(0), is_set_by_combine=True),
    OptionRow("logging_strategy", "tracking.loggingSteps", to_strategy, is_set_by_combine=True),
    OptionRow("logging_first_step", "tracking.logFirstStep", to_boolean),
    OptionRow("report_to", "tracking.reportTo", try_converters(to_list_of(to_text)), is_set_by_combine=True),
    OptionRow("run_name", "output.runName.name"),
    OptionRow("eval_strategy", "evaluation.strategy", to_strategy, ("evaluation_strategy",), is_set_by_combine=True),
    OptionRow("eval_steps", "evaluation.steps", to_number(0), is_set_by_combine=True),
    OptionRow("save_strategy", "checkpoint.strategy", to_strategy, is_set_by_combine=True),
    OptionRow("save_steps", "checkpoint.steps", to_number(0), is_set_by_combine=True),
    OptionRow("save_total_limit", "checkpoint.keep", to_steps_or_none),
    OptionRow("load_best_model_at_end", "checkpoint.loadBestAtEnd", to_boolean),
    OptionRow("resume_from_checkpoint", "checkpoint.resume", to_flag_or_path, is_set_by_combine=True),
    OptionRow("push_to_hub", "output.hub.push", to_boolean, is_set_by_combine=True),
    OptionRow("hub_model_id", "output.hub.repository", aliases=("push_to_hub_model_id",), is_set_by_combine=True),
    OptionRow("hub_token", "output.hub.tokenSecretRef", aliases=("push_to_hub_token",), is_set_by_combine=True, is_secret=True),
    OptionRow("hub_private_repo", "output.hub.private", to_boolean, is_set_by_combine=True),
    OptionRow("hub_revision", is_set_by_combine=True),
    OptionRow("deepspeed", "distributed.deepspeed", try_converters(to_text, to_mapping), is_set_by_combine=True),
    OptionRow("fsdp", "distributed.fsdp.sharding", keep_value, is_set_by_combine=True),
    OptionRow("fsdp_config", "distributed.fsdp", try_converters(to_text, to_mapping), is_set_by_combine=True),
    *make_ignored_options("every run writes to its own folder", "overwrite_output_dir logging_dir"),
    *make_ignored_options("the job always trains", "do_train"),
    *make_ignored_options("the job evaluates if it has a validation set", "do_eval"),
    *make_ignored_options(SPEED_REASON, "tf32 torch_compile torch_compile_backend torch_compile_mode torchdynamo gradient_checkpointing_kwargs "
             "activation_checkpointing_kwargs "
             "torch_empty_cache_steps jit_mode_eval half_precision_backend fp16_backend fp16_opt_level bf16_full_eval fp16_full_eval use_ipex use_mps_device "
             "use_cache liger_kernel_config mp_parameters past_index optim_target_modules"),
    *make_ignored_options(LIGER_REASON, "use_liger_kernel"),
    *make_ignored_options(LOADER_REASON,
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
             "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names length_column_name accelerator_config dispatch_batches "
             "split_batches"),
    *make_ignored_options(RANKS_REASON,
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank "
             "ray_scope xpu_backend tpu_num_cores tpu_metrics_debug average_tokens_across_devices fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap"),
    *make_ignored_options(DEVICES_REASON, "device_map low_cpu_mem_usage"),
    *make_ignored_options("the job's log contains these values", "log_level log_level_replica log_on_each_node logging_nan_inf_filter disable_tqdm "
             "include_tokens_per_second include_num_input_tokens_seen skip_memory_metrics debug project trackio_space_id trackio_bucket_id "
             "trackio_static_space_id"),
    *make_ignored_options("the trainer has one way of measuring the validation loss", "prediction_loss_only eval_on_start eval_delay eval_do_concat_batches "
             "eval_use_gather_object eval_accumulation_steps include_for_metrics include_inputs_for_metrics batch_eval_metrics greater_is_better"),
    *make_ignored_options("checkpoints always contain the optimizer state, so that the job can resume", "save_only_model save_on_each_node save_safetensors "
             "enable_jit_checkpoint ignore_data_skip restore_callback_states_from_checkpoint"),
    *make_ignored_options("only the final model is pushed", "hub_strategy hub_always_push push_to_hub_organization"),
    *make_ignored_options("the job generates answers in a separate phase; see evaluation.comparison", "do_predict predict_with_generate generation_max_length "
             "generation_num_beams generation_config sortish_sampler"),
    *make_ignored_options("one seed sets all random numbers", "data_seed full_determinism"),
    *make_refused_options("label smoothing", "label_smoothing_factor"),
    *make_refused_options("options of the optimizer beyond learning rate, betas, epsilon and weight decay", "optim_args"),
    *make_refused_options("a search for the batch size", "auto_find_batch_size", "policy.onOutOfMemory: Adapt retries with a smaller batch"),
    *make_refused_options("choosing the best checkpoint by another metric than the validation loss", "metric_for_best_model", "write eval_loss", "loss",
        "eval_loss"),
    *make_refused_options("tensor and context parallelism", "parallelism_config", "use FSDP or DeepSpeed"),
    *make_refused_options("the sharding of fairscale", "sharded_ddp", "use fsdp"),
)  # fmt: skip
OPAQUE_PATHS = frozenset(
    {"lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "deepspeed", "fsdp_config", "accelerator_config",
     "liger_kernel_config", "parallelism_config", "generation_config", "optim_args"}
)  # fmt: skip
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("training.epochs", 3, is_applicable=lambda draft: not draft.has_value("training.maxSteps")),
    ToolDefault("training.batchSizePerDevice", 8),
    ToolDefault("training.gradientAccumulationSteps", 1),
    ToolDefault("training.learningRate", 5e-5),
    ToolDefault("training.scheduler", "linear"),
    ToolDefault("training.warmupSteps", 0, is_applicable=lambda draft: not draft.has_value("training.warmupRatio")),
    ToolDefault("training.optimizer", "adamw_torch_fused"),
    ToolDefault("training.weightDecay", 0),
    ToolDefault("training.maxGradNorm", 1),
    ToolDefault("training.seed", 42),
    ToolDefault("checkpoint.strategy", "steps"),
    ToolDefault("checkpoint.steps", 500, is_applicable=lambda draft: draft.value("checkpoint.strategy", "steps") == "steps"),
    ToolDefault("checkpoint.keep", 0),
    ToolDefault("tracking.loggingSteps", 500),
    ToolDefault("output.layout", "flat", is_applicable=lambda draft: draft.has_value("output.dir")),
)  # fmt: skip
"""Defaults of transformers.

If a tool has other defaults, its importer lists these defaults before the defaults of transformers, because the first default of a field is used.
"""


def set_training_arguments(draft: JobDraft, *, default_precision: str = "no") -> None:
    """Set the fields that depend on several training arguments.

    `default_precision`: the mixed precision if the file sets neither `bf16` nor `fp16`. If it is empty, the defaults of the tool set the mixed precision.
    """
    set_precision(draft, default_precision)
    set_distribution(draft)
    set_schedule(draft)
    set_intervals(draft)
    set_results(draft)
    set_trackers(draft)


def set_precision(draft: JobDraft, default_precision: str) -> None:
    """Set the mixed precision from `bf16` or `fp16`. If the file contains neither of these options, set the mixed precision from `default_precision`."""
    if draft.get("bf16") and draft.get("fp16"):
        draft.add_mistake(
            ("bf16", "fp16"),
            "bf16 and fp16 are both true",
            "set one of them to false",
            explained_path="training.mixedPrecision",
        )
        return
    enabled_key = next((key for key in ("bf16", "fp16") if draft.get(key)), None)
    for key in ("bf16", "fp16"):
        if draft.get(key) is False and (enabled_key or key == "fp16"):
            draft.add_reason(key, "no effect: another data type is used")
    if enabled_key:
        draft.assign("training.mixedPrecision", enabled_key, enabled_key)
    elif draft.get("bf16") is False:
        draft.assign("training.mixedPrecision", "no", "bf16")
    elif default_precision and not draft.has_value("training.mixedPrecision"):
        draft.assign_default("training.mixedPrecision", default_precision)


def set_schedule(draft: JobDraft) -> None:
    """Set the learning rate schedule, warm-up, optimizer, gradient checkpointing and the order of rows."""
    name = draft.get("lr_scheduler_type")
    if name is not None and str(name) in SCHEDULER_BY_NAME:
        draft.assign("training.scheduler", SCHEDULER_BY_NAME[str(name)], "lr_scheduler_type")
    elif name is not None:
        draft.refuse_feature(
            "lr_scheduler_type", f"the learning rate schedule {name}", f"write one of {', '.join(SCHEDULER_BY_NAME)}"
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
    _set_row_order(draft)


def _set_warmup(draft: JobDraft) -> None:
    steps, ratio = draft.get("warmup_steps"), draft.get("warmup_ratio")
    if steps:
        draft.assign("training.warmupSteps" if steps >= 1 else "training.warmupRatio", steps, "warmup_steps")
        if ratio is not None:
            draft.add_reason("warmup_ratio", "no effect: warmup_steps is used instead")
        return
    if ratio is not None:
        draft.assign("training.warmupRatio", ratio, "warmup_ratio")
        if steps is not None:
            draft.add_reason("warmup_steps", "no effect: warmup_ratio is used instead")
    elif steps is not None:
        draft.assign("training.warmupSteps", 0, "warmup_steps")


def _set_row_order(draft: JobDraft) -> None:
    sampling_strategy = draft.get("train_sampling_strategy")
    if sampling_strategy == "group_by_length" or draft.get("group_by_length"):
        key = "group_by_length" if draft.get("group_by_length") else "train_sampling_strategy"
        draft.assign("training.groupByLength", True, key)
    elif sampling_strategy == "sequential":
        draft.refuse_feature("train_sampling_strategy", "a fixed order of the rows", "write random")
    for key in ("train_sampling_strategy", "group_by_length"):
        if key in draft.given_options and not any(
            value.key == draft.given_options[key].key for value in draft.values.values()
        ):
            draft.add_reason(key, "no effect: rows are shuffled")
    if draft.value("dataset.packing") and draft.value("training.groupByLength"):
        draft.remove("training.groupByLength", "packed sequences have the same length")


def set_distribution(draft: JobDraft) -> None:
    """Set training on CPU, DeepSpeed and FSDP."""
    if draft.get("use_cpu"):
        draft.assign("resources.gpusPerNode", 0, "use_cpu")
    elif "use_cpu" in draft.given_options:
        draft.add_reason("use_cpu", "no effect: the job uses GPUs")
    set_deepspeed(draft)
    set_fsdp(draft)


def set_deepspeed(draft: JobDraft) -> None:
    """Set DeepSpeed from a DeepSpeed JSON file of the user and from the option `deepspeed`.

    The value of this option is the name or the content of a DeepSpeed JSON file.
    """
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
    fields = guess_deepspeed_fields(str(value))
    for word, feature in (("autotp", "tensor parallelism"), ("fp8", "FP8 training")):
        if word in str(value).lower():
            draft.refuse_feature("deepspeed", feature, "use another DeepSpeed configuration")
            return
    if fields is None:
        hint = "give the JSON as a further file, or --deepspeed NAME/KEY"
        draft.refuse_feature(
            "deepspeed", f"reading the DeepSpeed configuration {value} without the file", hint, is_droppable=False
        )
        return
    for name, field_value in fields.items():
        draft.assign(f"distributed.deepspeed.{name}", field_value, "deepspeed")
    draft.add_note(
        f"deepspeed: the import reads stage and offloading from the name {value}; to use the content, give the JSON as a further file"
    )


def set_fsdp(draft: JobDraft) -> None:
    """Set FSDP from the options `fsdp` and `fsdp_config`."""
    value, config = draft.get("fsdp"), draft.get("fsdp_config")
    fsdp_words = (
        value.replace(",", " ").split()
        if isinstance(value, str)
        else list(value)
        if isinstance(value, list)
        else ["full_shard"]
        if value is True
        else []
    )
    if not fsdp_words:
        for key in ("fsdp", "fsdp_config"):
            if key in draft.given_options:
                draft.add_reason(key, "no effect: the file does not use FSDP")
        return
    if draft.value("distributed.strategy") == "deepspeed":
        draft.add_mistake(("deepspeed", "fsdp"), "DeepSpeed and FSDP exclude each other", "remove one of them")
        return
    draft.assign("distributed.strategy", "fsdp", "fsdp")
    unknown_words = [word for word in fsdp_words if word not in (*SHARDING_BY_FSDP_WORD, *OTHER_FSDP_WORDS)]
    if unknown_words:
        draft.add_mistake("fsdp", f"{', '.join(unknown_words)} is not an option of FSDP",
            f"write one or more of {', '.join((*SHARDING_BY_FSDP_WORD, *OTHER_FSDP_WORDS))}")
    sharding = next((SHARDING_BY_FSDP_WORD[word] for word in fsdp_words if word in SHARDING_BY_FSDP_WORD), "fullShard")
    if isinstance(config, str) and config:
        draft.refuse_feature("fsdp_config", f"reading the FSDP configuration {config} from a file", "write its options below fsdp_config")
    if isinstance(config, dict):
        fsdp_options = {key.removeprefix("fsdp_"): value for key, value in config.items()}
        if fsdp_options.get("reshard_after_forward") is False:
            sharding = "shardGradOp"
        if fsdp_options.get("offload_params"):
            fsdp_words.append("offload")
        set_state_dict(draft, "fsdp_config", fsdp_options.get("state_dict_type"))
    if isinstance(config, dict) and "fsdp_config" in draft.given_options:
        draft.add_reason("fsdp_config", "the trainer uses FSDP version 2 and chooses the layers to wrap")
    draft.assign("distributed.fsdp.sharding", sharding, "fsdp")
    if "offload" in fsdp_words:
        draft.add_warning(
            f"{draft.given_options['fsdp'].origin.location}: fsdp: offload has no effect: the weights stay in GPU memory; use more GPUs, or DeepSpeed"
        )


def set_state_dict(draft: JobDraft, option_key: str, state_dict_type: Any) -> None:
    """Set the form of FSDP's checkpoints from `state_dict_type`, which is the value of the option `option_key`.

    Refuse a form that FSDP version 2 does not support.
    """
    state_dict_form = str(state_dict_type or "").upper().removesuffix("_STATE_DICT")
    if state_dict_form in ("FULL", "SHARDED"):
        draft.assign("distributed.fsdp.stateDict", state_dict_form.lower(), option_key)
    elif state_dict_form:
        draft.refuse_feature(option_key, f"the state dict {state_dict_type} of FSDP", "write SHARDED_STATE_DICT or FULL_STATE_DICT")


def has_validation(draft: JobDraft) -> bool:
    """Return whether the job has validation rows and evaluates on them."""
    has_rows = draft.has_value("dataset.validation") or bool(draft.value("dataset.split.validation"))
    return has_rows and draft.value("evaluation.strategy") != "no"


def set_intervals(draft: JobDraft) -> None:
    """Set when the job saves checkpoints, evaluates and logs metrics."""
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
    steps, strategy = draft.get("logging_steps"), draft.get("logging_strategy")
    if steps and strategy in (None, "steps"):
        max_steps = draft.get("max_steps")
        draft.assign(
            "tracking.loggingSteps", max(1, int(steps if steps >= 1 else steps * (max_steps or 100))), "logging_steps"
        )
    elif "logging_steps" in draft.given_options:
        draft.add_reason("logging_steps", "no effect: the job logs metrics at the default interval")
    if "logging_strategy" in draft.given_options:
        draft.add_reason("logging_strategy", "no effect: the job always logs metrics after a number of steps")


def _set_interval(draft: JobDraft, spec_group: str, strategy_key: str, steps_key: str) -> None:
    strategy, steps, max_steps = draft.get(strategy_key), draft.get(steps_key), draft.get("max_steps")
    if strategy == "best":
        draft.refuse_feature(
            strategy_key, "saving only checkpoints that are better than all earlier ones", "write steps or epoch; the best checkpoint is always kept"
        )
        return
    if strategy is not None:
        draft.assign(f"{spec_group}.strategy", strategy, strategy_key)
    if steps_key not in draft.given_options:
        return
    if strategy in ("epoch", "no"):
        draft.add_reason(steps_key, f"no effect: {strategy_key} is {strategy}")
    elif not steps:
        draft.add_reason(steps_key, "0 leaves the interval to the tool's default")
    elif steps >= 1 or max_steps:
        draft.assign(f"{spec_group}.steps", max(1, int(steps if steps >= 1 else steps * max_steps)), steps_key)
    else:
        draft.assign(f"{spec_group}.strategy", "epoch", steps_key)
        draft.add_warning(
            f"{draft.given_options[steps_key].origin.location}: {steps_key}: {steps:g} is a fraction of all steps. "
            f"{spec_group}.strategy becomes epoch, because the number of steps is not known before the data is read; "
            f"set {spec_group}.strategy and {spec_group}.steps for another interval"
        )


def set_results(draft: JobDraft) -> None:
    """Set the output folder, the push to the hub, and the checkpoint to resume from."""
    if "output_dir" in draft.given_options:
        assign_output_folder(draft, "output_dir")
        if not draft.has_value("output.dir"):
            draft.add_reason("output_dir", "no effect: results are in the job's storage")
    _set_hub(draft)
    resume_value = draft.get("resume_from_checkpoint")
    if isinstance(resume_value, bool):
        draft.add_reason("resume_from_checkpoint", "no effect: each attempt of a job resumes from the last checkpoint")
    elif resume_value is not None:
        assign_source_uri(draft, "resume_from_checkpoint", "checkpoint.resume")


def _set_hub(draft: JobDraft) -> None:
    hub_keys = ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision")
    if not draft.get("push_to_hub"):
        if "push_to_hub" in draft.given_options:
            draft.add_reason("push_to_hub", "no effect: nothing is pushed")
        for key in hub_keys:
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
    """Set the trackers that `report_to` lists, and what they need: the key of wandb and the address of MLflow."""
    if "report_to" not in draft.given_options:
        return
    tracker_names = [str(name).strip() for name in draft.get("report_to")]
    known_trackers = [name for name in tracker_names if name in TRACKERS]
    draft.assign("tracking.reportTo", known_trackers, "report_to")
    unknown_trackers = [name for name in tracker_names if name not in (*TRACKERS, "none")]
    if unknown_trackers:
        draft.add_warning(
            f"{draft.given_options['report_to'].origin.location}: report_to: {', '.join(unknown_trackers)}: "
            "a FineTuneJob reports to wandb, tensorboard, mlflow and mongodb"
        )
    if "wandb" in known_trackers:
        assign_secret_reference(draft, "tracking.wandb.apiKeySecretRef", "wandb", "reporting to wandb")
    if "mlflow" in known_trackers and not draft.has_value("tracking.mlflow.trackingUri"):
        uri = draft.request.environment.get("MLFLOW_TRACKING_URI", "")
        if uri:
            draft.assign_default("tracking.mlflow.trackingUri", uri, "the variable MLFLOW_TRACKING_URI")
        else:
            draft.refuse_feature(
                "report_to",
                "reporting to MLflow without the address of the server",
                "give --set tracking.mlflow.trackingUri=URL",
            )
