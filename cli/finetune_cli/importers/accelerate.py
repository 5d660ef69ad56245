"""Reads an accelerate YAML file that the user gives together with another tool's configuration."""

from __future__ import annotations

from finetune_cli.importers.deepspeed import assign_consistently, read_option_group
from finetune_cli.importers.documents import parse_document, peek_mapping
from finetune_cli.importers.draft import InputDocument, JobDraft
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import AssignedValue, ValueOrigin
from finetune_cli.suggestions import find_closest_name
from finetune_cli.yaml_reader import Tree

SHARDING_BY_NAME = {
    "FULL_SHARD": "fullShard", "SHARD_GRAD_OP": "shardGradOp", "NO_SHARD": "noShard", "HYBRID_SHARD": "fullShard", "1": "fullShard", "2": "shardGradOp",
    "3": "noShard",
}  # fmt: skip
STATE_DICT_BY_NAME = {
    "FULL_STATE_DICT": "full", "SHARDED_STATE_DICT": "sharded", "LOCAL_STATE_DICT": "local", "FULL": "full", "SHARDED": "sharded", "LOCAL": "local",
}  # fmt: skip
ACCELERATE_KEYS = (
    "compute_environment", "debug", "distributed_type", "downcast_bf16", "dynamo_config", "enable_cpu_affinity", "fsdp_config", "deepspeed_config",
    "gpu_ids", "machine_rank", "main_process_ip", "main_process_port", "main_training_function", "mixed_precision", "num_machines", "num_processes",
    "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu", "megatron_lm_config", "mpirun_config", "ipex_config",
)  # fmt: skip
FSDP_KEYS = (
    "fsdp_sharding_strategy",
    "fsdp_state_dict_type",
    "fsdp_version",
    "fsdp_offload_params",
    "fsdp_reshard_after_forward",
)
IGNORED_KEYS = (
    "dynamo_config",
    "gpu_ids",
    "ipex_config",
    "megatron_lm_config",
    "mpirun_config",
    "tpu_env",
    "tpu_use_cluster",
    "tpu_use_sudo",
)
"""Keys of an accelerate configuration that have no effect on the FineTuneJob. The importer warns about them."""
DEEPSPEED_KEYS = (
    "zero_stage", "offload_optimizer_device", "offload_param_device", "gradient_accumulation_steps", "gradient_clipping", "deepspeed_config_file",
)  # fmt: skip
OFFLOAD_KEY = "fsdp_offload_params"
RESHARD_KEY = "fsdp_reshard_after_forward"
"""Boolean key of FSDP 2 that replaces the key `fsdp_sharding_strategy` of FSDP 1."""


def is_accelerate(document: InputDocument) -> bool:
    """Return whether a document is an accelerate configuration: it has the key `distributed_type`."""
    return "distributed_type" in peek_mapping(document)


def read_accelerate(draft: JobDraft, document: InputDocument) -> None:
    """Set strategy, resources, precision, FSDP and DeepSpeed from an accelerate configuration."""
    parsed_file = parse_document(document)
    for key in parsed_file.value:
        if key not in ACCELERATE_KEYS:
            closest_key = find_closest_name(key, ACCELERATE_KEYS)
            draft.mistakes.append(
                Mistake(
                    _locate_option(document, parsed_file, key),
                    key,
                    "unknown key",
                    f"did you mean {closest_key}?" if closest_key else "remove it",
                )
            )
    distributed_type = str(parsed_file.value.get("distributed_type", "NO")).upper()
    strategy = {
        "NO": "none",
        "FALSE": "none",
        "MULTI_GPU": "ddp",
        "MULTI_CPU": "ddp",
        "FSDP": "fsdp",
        "DEEPSPEED": "deepspeed",
    }.get(distributed_type)
    origin = ValueOrigin(_locate_option(document, parsed_file, "distributed_type"))
    if strategy is None:
        draft.mistakes.append(
            Mistake(
                origin.location,
                "distributed_type",
                f"{distributed_type} is not supported",
                "write one of NO, MULTI_GPU, FSDP, DEEPSPEED",
            )
        )
        return
    assign_consistently(draft, "distributed.strategy", "distributed_type", strategy, origin)
    _set_process_counts(draft, document, parsed_file)
    _set_precision(draft, document, parsed_file)
    unused_keys = [key for key in IGNORED_KEYS if parsed_file.value.get(key) not in (None, False, {}, "NO", "no", "all")]
    if unused_keys:
        draft.add_warning(
            f"{document.name}: these keys have no effect: {', '.join(unused_keys)}: the operator and the trainer set up processes and devices themselves"
        )
    if strategy == "fsdp":
        _set_fsdp(draft, document, parsed_file)
    if strategy == "deepspeed":
        _set_deepspeed(draft, document, parsed_file)


def _set_precision(draft: JobDraft, document: InputDocument, parsed_file: Tree) -> None:
    precision = parsed_file.value.get("mixed_precision")
    location = _locate_option(document, parsed_file, "mixed_precision")
    if precision in ("no", "fp16", "bf16", False):
        draft.values["training.mixedPrecision"] = AssignedValue(precision or "no", ValueOrigin(location), "mixed_precision")
    elif precision is not None:
        draft.mistakes.append(
            Mistake(location, "mixed_precision", f"{precision} is not supported", "write one of no, fp16, bf16")
        )


def _locate_option(document: InputDocument, parsed_file: Tree, option_key: str) -> str:
    return f"{document.name}:{parsed_file.lines[option_key]}" if option_key in parsed_file.lines else document.name


def _set_process_counts(draft: JobDraft, document: InputDocument, parsed_file: Tree) -> None:
    machine_count, process_count = parsed_file.value.get("num_machines", 1), parsed_file.value.get("num_processes")
    origin = ValueOrigin(_locate_option(document, parsed_file, "num_processes"))
    for key, value in (("num_machines", machine_count), ("num_processes", process_count)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            draft.mistakes.append(
                Mistake(_locate_option(document, parsed_file, key), key, f"{value} is not an integer of at least 1")
            )
            return
    if machine_count > 1:
        draft.values["resources.nodes"] = AssignedValue(
            machine_count, ValueOrigin(_locate_option(document, parsed_file, "num_machines")), "num_machines"
        )
    if process_count is None:
        return
    if process_count % machine_count:
        draft.mistakes.append(
            Mistake(
                origin.location,
                "num_processes",
                f"{process_count} processes cannot be divided among {machine_count} machines",
                "write a multiple of num_machines",
            )
        )
        return
    processes_per_machine = process_count // machine_count
    uses_cpu = parsed_file.value.get("use_cpu") is True
    draft.values["resources.gpusPerNode"] = AssignedValue(0 if uses_cpu else processes_per_machine, origin, "num_processes")
    if uses_cpu:
        draft.values["resources.processesPerNode"] = AssignedValue(processes_per_machine, origin, "num_processes")


def _set_fsdp(draft: JobDraft, document: InputDocument, parsed_file: Tree) -> None:
    options = read_option_group(draft, parsed_file.value, "fsdp_config", ValueOrigin(_locate_option(document, parsed_file, "fsdp_config")))
    for key, path, value_by_name in (
        ("fsdp_sharding_strategy", "distributed.fsdp.sharding", SHARDING_BY_NAME),
        ("fsdp_state_dict_type", "distributed.fsdp.stateDict", STATE_DICT_BY_NAME),
    ):
        if options.get(key) is None:
            continue
        origin = ValueOrigin(_locate_option(document, parsed_file, f"fsdp_config.{key}"))
        value = value_by_name.get(str(options[key]).upper())
        if value is None:
            draft.mistakes.append(
                Mistake(origin.location, key, f'"{options[key]}" is not supported', f"write one of {', '.join(value_by_name)}")
            )
        else:
            assign_consistently(draft, path, key, value, origin)
    if isinstance(options.get(RESHARD_KEY), bool):
        value = "fullShard" if options[RESHARD_KEY] else "shardGradOp"
        assign_consistently(
            draft,
            "distributed.fsdp.sharding",
            RESHARD_KEY,
            value,
            ValueOrigin(_locate_option(document, parsed_file, f"fsdp_config.{RESHARD_KEY}")),
        )
    if str(options.get("fsdp_sharding_strategy")).upper().startswith("HYBRID"):
        draft.add_warning(
            f"{document.name}: fsdp_sharding_strategy: {options['fsdp_sharding_strategy']} becomes fullShard, which shards over all nodes "
            "instead of replicating the weights on every node: the results are the same, but there is more traffic between nodes"
        )
    if options.get(OFFLOAD_KEY) is True:
        location = _locate_option(document, parsed_file, f"fsdp_config.{OFFLOAD_KEY}")
        draft.add_warning(f"{location}: {OFFLOAD_KEY} has no effect: the weights stay in GPU memory")
    unused_keys = [key for key in options if key not in FSDP_KEYS]
    if unused_keys:
        draft.add_warning(
            f"{document.name}: these keys of fsdp_config have no effect: {', '.join(unused_keys)}: the trainer chooses the layers to wrap"
        )


def _set_deepspeed(draft: JobDraft, document: InputDocument, parsed_file: Tree) -> None:
    origin = ValueOrigin(_locate_option(document, parsed_file, "deepspeed_config"))
    options = read_option_group(draft, parsed_file.value, "deepspeed_config", origin)
    if isinstance(options.get("zero_stage"), int):
        assign_consistently(draft, "distributed.deepspeed.zeroStage", "zero_stage", options["zero_stage"], origin)
    for key, path in (("offload_optimizer_device", "offloadOptimizer"), ("offload_param_device", "offloadParameters")):
        if options.get(key) in ("cpu", "nvme"):
            assign_consistently(draft, f"distributed.deepspeed.{path}", key, True, origin)
    for key, path in (
        ("gradient_accumulation_steps", "training.gradientAccumulationSteps"),
        ("gradient_clipping", "training.maxGradNorm"),
    ):
        if isinstance(options.get(key), int | float) and not isinstance(options[key], bool):
            assign_consistently(draft, path, key, options[key], origin)
    config_file = options.get("deepspeed_config_file")
    if config_file and not any(
        override.startswith("distributed.deepspeed.configRef") for override in draft.request.overrides
    ):
        draft.mistakes.append(
            Mistake(
                origin.location, "deepspeed_config_file", f"the file {config_file} is not read",
                "store the file in a ConfigMap and refer to the ConfigMap with --deepspeed NAME/KEY",
            )
        )  # fmt: skip
    unused_keys = [key for key in options if key not in DEEPSPEED_KEYS and options[key] not in (None, "none", "auto", False)]
    if unused_keys:
        draft.add_warning(
            f"{document.name}: these keys of deepspeed_config have no effect: {', '.join(unused_keys)}: the trainer chooses their values"
        )
