"""Files that come beside another tool's configuration: a DeepSpeed JSON and an accelerate YAML."""

from __future__ import annotations

import re
from typing import Any

from finetune_cli.importers.convert import nearest
from finetune_cli.importers.material import Assigned, Document, Draft, Mistake, Origin
from finetune_cli.importers.yaml_tree import Tree, parse, parse_json, sniff, sniff_json

DEEPSPEED_MARKS = (
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "bf16",
    "fp16",
    "gradient_clipping",
)
SHARDING = {
    "FULL_SHARD": "fullShard", "SHARD_GRAD_OP": "shardGradOp", "NO_SHARD": "noShard", "HYBRID_SHARD": "fullShard", "1": "fullShard", "2": "shardGradOp",
    "3": "noShard",
}  # fmt: skip
STATE = {
    "FULL_STATE_DICT": "full", "SHARDED_STATE_DICT": "sharded", "LOCAL_STATE_DICT": "local", "FULL": "full", "SHARDED": "sharded", "LOCAL": "local",
}  # fmt: skip
ACCELERATE = (
    "compute_environment", "debug", "distributed_type", "downcast_bf16", "dynamo_config", "enable_cpu_affinity", "fsdp_config", "deepspeed_config",
    "gpu_ids", "machine_rank", "main_process_ip", "main_process_port", "main_training_function", "mixed_precision", "num_machines", "num_processes",
    "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu", "megatron_lm_config", "mpirun_config", "ipex_config",
)  # fmt: skip
FSDP = (
    "fsdp_sharding_strategy",
    "fsdp_state_dict_type",
    "fsdp_version",
    "fsdp_offload_params",
    "fsdp_reshard_after_forward",
)
UNUSED = (
    "dynamo_config",
    "gpu_ids",
    "ipex_config",
    "megatron_lm_config",
    "mpirun_config",
    "tpu_env",
    "tpu_use_cluster",
    "tpu_use_sudo",
)
"""Keys of an accelerate configuration that change a run there and are not taken over."""
DEEPSPEED = (
    "zero_stage", "offload_optimizer_device", "offload_param_device", "gradient_accumulation_steps", "gradient_clipping", "deepspeed_config_file",
)  # fmt: skip
OFFLOADS = "fsdp_offload_params"
RESHARDS = "fsdp_reshard_after_forward"
"""FSDP 2 says with a truth value what FSDP 1 calls a sharding strategy."""


def is_deepspeed(document: Document) -> bool:
    """A DeepSpeed JSON: an object with DeepSpeed's own names."""
    value = sniff_json(document)
    return any(mark in value for mark in DEEPSPEED_MARKS) and "model" not in value


def is_accelerate(document: Document) -> bool:
    """An accelerate configuration: it names the kind of distribution."""
    return "distributed_type" in sniff(document)


# --- DeepSpeed ------------------------------------------------------------------------------------------------------


def read_deepspeed(draft: Draft, document: Document) -> None:
    """Translate what the API has fields for, check it against the other files, and bring the whole file as a ConfigMap."""
    content = parse_json(document)
    origin = Origin(document.name)
    zero = _group(draft, content, "zero_optimization", origin)
    found: dict[str, tuple[str, Any]] = {
        "distributed.deepspeed.zeroStage": ("zero_optimization.stage", zero.get("stage")),
        "training.maxGradNorm": ("gradient_clipping", content.get("gradient_clipping")),
        "training.batchSizePerDevice": (
            "train_micro_batch_size_per_gpu",
            content.get("train_micro_batch_size_per_gpu"),
        ),
        "training.gradientAccumulationSteps": (
            "gradient_accumulation_steps",
            content.get("gradient_accumulation_steps"),
        ),
    }
    for path, (key, value) in found.items():
        if value is not None and value != "auto":
            _agree(draft, path, key, value, origin)
    for path, key in (
        ("distributed.deepspeed.offloadOptimizer", "offload_optimizer"),
        ("distributed.deepspeed.offloadParameters", "offload_param"),
    ):
        device = (zero.get(key) or {}).get("device") if isinstance(zero.get(key), dict) else None
        if device in ("cpu", "nvme"):
            _agree(draft, path, f"zero_optimization.{key}.device", True, origin)
    for precision in ("bf16", "fp16"):
        if isinstance(content.get(precision), dict) and content[precision].get("enabled") is True:
            _agree(draft, "training.mixedPrecision", f"{precision}.enabled", precision, origin)
    _carry(draft, document)


def _group(draft: Draft, content: dict[str, Any], key: str, origin: Origin) -> dict[str, Any]:
    """A group of options; an empty one if it is absent, or a mistake if it is something else."""
    found = content.get(key) or {}
    if isinstance(found, dict):
        return found
    draft.mistakes.append(
        Mistake(origin.place, key, f"{found} is given, and a group of options is needed", "write names and values")
    )
    return {}


def _agree(draft: Draft, path: str, key: str, value: Any, origin: Origin) -> None:
    """Set a field from a companion; what the user wrote elsewhere with another value is a mistake, both named."""
    there = draft.values.get(path)
    if there is not None and there.key and there.value != value:
        hint = f"make them equal, or write `auto` for {key}"
        draft.mistakes.append(
            Mistake(
                f"{there.origin.place}, {origin.place}",
                f"{there.key}, {key}",
                f"{there.value} and {value} are given for one thing",
                hint,
            )
        )
        return
    if there is None or not there.key:
        draft.values[path] = Assigned(value, origin, key)


def _carry(draft: Draft, document: Document) -> None:
    """The whole file as a ConfigMap of the manifest, named by the job."""
    path = "distributed.deepspeed.configRef"
    if any(own.startswith(path) for own in draft.request.own):
        return
    name, key = f"{draft.name}-deepspeed", re.sub(r"[^-._a-zA-Z0-9]", "_", document.path.name) or "deepspeed.json"
    draft.config_maps[name] = {key: document.text}
    origin = Origin(document.name)
    draft.values[f"{path}.name"] = Assigned(name, origin, document.name)
    draft.values[f"{path}.key"] = Assigned(key, origin, document.name)


# --- accelerate -----------------------------------------------------------------------------------------------------


def read_accelerate(draft: Draft, document: Document) -> None:
    """Strategy, sizes and sharding of an accelerate configuration."""
    tree = parse(document)
    for key in tree.value:
        if key not in ACCELERATE:
            near = nearest(key, ACCELERATE)
            draft.mistakes.append(
                Mistake(
                    _place(document, tree, key), key, "unknown key", f"did you mean {near}?" if near else "remove it"
                )
            )
    kind = str(tree.value.get("distributed_type", "NO")).upper()
    strategy = {
        "NO": "none",
        "FALSE": "none",
        "MULTI_GPU": "ddp",
        "MULTI_CPU": "ddp",
        "FSDP": "fsdp",
        "DEEPSPEED": "deepspeed",
    }.get(kind)
    place = Origin(_place(document, tree, "distributed_type"))
    if strategy is None:
        draft.mistakes.append(
            Mistake(place.place, "distributed_type", f"{kind} is not offered", "one of NO, MULTI_GPU, FSDP, DEEPSPEED")
        )
        return
    _agree(draft, "distributed.strategy", "distributed_type", strategy, place)
    _sizes(draft, document, tree)
    _precision(draft, document, tree)
    unused = [key for key in UNUSED if tree.value.get(key) not in (None, False, {}, "NO", "no", "all")]
    if unused:
        draft.warn(
            f"{document.name}: {', '.join(unused)} have no effect: the operator and the trainer do that themselves, or not at all"
        )
    if strategy == "fsdp":
        _fsdp(draft, document, tree)
    if strategy == "deepspeed":
        _deepspeed(draft, document, tree)


def _precision(draft: Draft, document: Document, tree: Tree) -> None:
    found = tree.value.get("mixed_precision")
    place = _place(document, tree, "mixed_precision")
    if found in ("no", "fp16", "bf16", False):
        draft.values["training.mixedPrecision"] = Assigned(found or "no", Origin(place), "mixed_precision")
    elif found is not None:
        draft.mistakes.append(Mistake(place, "mixed_precision", f"{found} is not offered", "one of no, fp16, bf16"))


def _place(document: Document, tree: Tree, key: str) -> str:
    return f"{document.name}:{tree.lines[key]}" if key in tree.lines else document.name


def _sizes(draft: Draft, document: Document, tree: Tree) -> None:
    machines, processes = tree.value.get("num_machines", 1), tree.value.get("num_processes")
    origin = Origin(_place(document, tree, "num_processes"))
    for key, value in (("num_machines", machines), ("num_processes", processes)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            draft.mistakes.append(Mistake(_place(document, tree, key), key, f"{value} is not a number of at least 1"))
            return
    if machines > 1:
        draft.values["resources.nodes"] = Assigned(
            machines, Origin(_place(document, tree, "num_machines")), "num_machines"
        )
    if processes is None:
        return
    if processes % machines:
        draft.mistakes.append(
            Mistake(
                origin.place,
                "num_processes",
                f"{processes} processes cannot be shared by {machines} machines",
                "make it a multiple of num_machines",
            )
        )
        return
    each = processes // machines
    on_cpu = tree.value.get("use_cpu") is True
    draft.values["resources.gpusPerNode"] = Assigned(0 if on_cpu else each, origin, "num_processes")
    if on_cpu:
        draft.values["resources.processesPerNode"] = Assigned(each, origin, "num_processes")


def _fsdp(draft: Draft, document: Document, tree: Tree) -> None:
    options = _group(draft, tree.value, "fsdp_config", Origin(_place(document, tree, "fsdp_config")))
    for key, path, words in (
        ("fsdp_sharding_strategy", "distributed.fsdp.sharding", SHARDING),
        ("fsdp_state_dict_type", "distributed.fsdp.stateDict", STATE),
    ):
        if options.get(key) is None:
            continue
        place = Origin(_place(document, tree, f"fsdp_config.{key}"))
        word = words.get(str(options[key]).upper())
        if word is None:
            draft.mistakes.append(
                Mistake(place.place, key, f'"{options[key]}" is not known here', f"one of {', '.join(words)}")
            )
        else:
            _agree(draft, path, key, word, place)
    if isinstance(options.get(RESHARDS), bool):
        word = "fullShard" if options[RESHARDS] else "shardGradOp"
        _agree(
            draft,
            "distributed.fsdp.sharding",
            RESHARDS,
            word,
            Origin(_place(document, tree, f"fsdp_config.{RESHARDS}")),
        )
    if str(options.get("fsdp_sharding_strategy")).upper().startswith("HYBRID"):
        draft.warn(
            f"{document.name}: fsdp_sharding_strategy: {options['fsdp_sharding_strategy']} copies the shards to every node; "
            "fullShard is written, which shards over all ranks: the same numbers, more traffic between nodes"
        )
    if options.get(OFFLOADS) is True:
        place = _place(document, tree, f"fsdp_config.{OFFLOADS}")
        draft.warn(f"{place}: {OFFLOADS} has no effect: the weights stay on the GPUs, so they must fit there")
    others = [key for key in options if key not in FSDP]
    if others:
        draft.warn(
            f"{document.name}: fsdp_config: {', '.join(others)} have no effect: the trainer wraps layers by itself"
        )


def _deepspeed(draft: Draft, document: Document, tree: Tree) -> None:
    place = Origin(_place(document, tree, "deepspeed_config"))
    options = _group(draft, tree.value, "deepspeed_config", place)
    if isinstance(options.get("zero_stage"), int):
        _agree(draft, "distributed.deepspeed.zeroStage", "zero_stage", options["zero_stage"], place)
    for key, path in (("offload_optimizer_device", "offloadOptimizer"), ("offload_param_device", "offloadParameters")):
        if options.get(key) in ("cpu", "nvme"):
            _agree(draft, f"distributed.deepspeed.{path}", key, True, place)
    for key, path in (
        ("gradient_accumulation_steps", "training.gradientAccumulationSteps"),
        ("gradient_clipping", "training.maxGradNorm"),
    ):
        if isinstance(options.get(key), int | float) and not isinstance(options[key], bool):
            _agree(draft, path, key, options[key], place)
    named = options.get("deepspeed_config_file")
    if named and not any(own.startswith("distributed.deepspeed.configRef") for own in draft.request.own):
        draft.mistakes.append(
            Mistake(
                place.place, "deepspeed_config_file", f"{named} is a file beside this one, and it is not read",
                "put it into a ConfigMap, and name that with --deepspeed NAME/KEY",
            )
        )  # fmt: skip
    others = [key for key in options if key not in DEEPSPEED and options[key] not in (None, "none", "auto", False)]
    if others:
        draft.warn(
            f"{document.name}: deepspeed_config: {', '.join(others)} have no effect: the trainer decides that itself"
        )
