"""Finds faults in the files of a stored adapter or model that servers and libraries would silently ignore. This module does not import torch.

Each fault has its own code. The checks compare the files with each other, with the base model's files, and with the settings of the training.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.verification.reference import ReferenceValues, hash_text
from finetune_trainer.verification.weight_files import DamagedFileError, StoredTensor, read_folder

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR_PREFIX = "base_model.model."
"""Beginning of the names of all tensors in an adapter file. Servers ignore tensors with other names, without an error."""
WRAPPER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")
"""Prefixes that torch's wrappers add to the names of modules."""
LORA_TENSOR_PATTERN = re.compile(r"\.(lora_(?:embedding_)?[AB])(?:\.weight)?$")
DORA_TENSOR_PATTERN = re.compile(r"\.lora_magnitude_vector(\.weight)?$")
PROMPT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
TENSOR_PATTERN_BY_TYPE = {"IA3": re.compile(r"\.ia3_l(\.weight)?$")}
TRAINED_TOKENS_PATTERN = re.compile(r"\.(token_adapter\.)?trainable_tokens_delta$")
SINGLE_EXPERT_PATTERN = re.compile(r"\.experts\.\d+\.")
"""Matches the name of a module or weight of one routed expert."""
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Fault:
    """A fault that makes a served artefact differ from the trained model."""

    code: str
    message: str


class _FaultFound(Exception):
    """Raised at the first fault to end the checks, because each check relies on the facts that earlier checks have confirmed."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.fault = Fault(code, message)


def find_fault(folder: Path, base: Path, reference: ReferenceValues | None, *, is_adapter: bool) -> Fault | None:
    """Return the first fault of the artefact in `folder`, or None. `base`: folder of the base model. `reference`: settings of the training."""
    try:
        if is_adapter:
            _check_adapter(folder, base, reference)
        else:
            _check_model(folder)
        _check_tokenizer(folder, reference)
    except _FaultFound as error:
        return error.fault
    return None


def find_adapter_fault(folder: Path, base: Path) -> Fault | None:
    """Return the first fault of an adapter that another job trained, or None.

    The tokenizer in the adapter's folder is not checked, because the job does not use it.
    """
    try:
        _check_adapter(folder, base, None)
    except _FaultFound as error:
        return error.fault
    return None


# ---- adapters


def _check_adapter(folder: Path, base: Path, reference: ReferenceValues | None) -> None:
    config = _read_json(folder / ADAPTER_CONFIG)
    if config is None:
        raise _FaultFound("AdapterConfigMissing", f"{ADAPTER_CONFIG} is missing or is not JSON")
    tensors = _read_tensors(folder, ADAPTER_WEIGHTS, "AdapterFileDamaged")
    if not tensors:
        raise _FaultFound("AdapterFileEmpty", f"{ADAPTER_WEIGHTS} is missing or contains no tensors")
    peft_type = str(config.get("peft_type"))
    if reference is not None and reference.adapter is not None and peft_type != reference.adapter.peft_type:
        raise _FaultFound("AdapterOfAnotherMethod", f"peft_type in {ADAPTER_CONFIG} is {peft_type}, but {reference.adapter.peft_type} was trained")
    if peft_type not in PROMPT_TYPES:
        _check_prefixes(tensors)
    _check_finite(tensors)
    if peft_type == "LORA":
        _check_lora(tensors, config, _read_base(base), reference)
    elif peft_type in TENSOR_PATTERN_BY_TYPE:
        _check_known_names(tensors, config, TENSOR_PATTERN_BY_TYPE[peft_type])


def _check_prefixes(tensors: Mapping[str, StoredTensor]) -> None:
    for name in tensors:
        module = name.removeprefix(TENSOR_PREFIX)
        wrapper = next((prefix for prefix in WRAPPER_PREFIXES if module.startswith(prefix) or f".{prefix}" in module), None)
        if wrapper is not None:
            raise _FaultFound("AdapterPrefixIgnored", f"the tensor {name} contains `{wrapper}`, the name of a wrapper: no server finds its module")
        if not name.startswith(TENSOR_PREFIX):
            raise _FaultFound("AdapterPrefixIgnored", f"the tensor {name} does not begin with `{TENSOR_PREFIX}`: servers ignore it")


def _check_finite(tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_finite():
            raise _FaultFound("WeightsNotFinite", f"the tensor {name} contains NaN or an infinite value")


def _check_lora(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], base_tensors: Mapping[str, StoredTensor], reference: ReferenceValues | None
) -> None:
    _check_known_names(tensors, config, LORA_TENSOR_PATTERN)
    lora_pairs = _group_lora_matrices(tensors)
    _check_pairs_are_complete(lora_pairs)
    _check_ranks(lora_pairs, config, base_tensors)
    _check_base(lora_pairs, base_tensors)
    _check_targets(lora_pairs, config, base_tensors, _find_adapted_embeddings(tensors))
    trained_adapter = reference.adapter if reference is not None else None
    if trained_adapter is not None:
        _check_scaling(lora_pairs, config, trained_adapter.scaling)
    # If the trainer could not measure whether the adapter changes values, the later comparison with the reference values finds adapters without an effect.
    was_changed = trained_adapter is None or trained_adapter.changes_output or (trained_adapter.changes_output is None and not (reference and reference.rows))
    is_every_b_zero = all(pair["B"].is_zero() for pair in lora_pairs.values() if "B" in pair)
    has_only_lora = all(LORA_TENSOR_PATTERN.search(name) for name in tensors)
    if was_changed and has_only_lora and is_every_b_zero:
        raise _FaultFound("AdapterHasNoEffect", "all B matrices of the adapter are zero: the model answers as the base model does")


def _group_lora_matrices(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Return the matrices A and B of each adapted module, by the module's name in the base model.

    Embeddings are left out, because their matrices have another layout.
    """
    lora_pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = LORA_TENSOR_PATTERN.search(name)
        if match and "embedding" not in match.group(1):
            lora_pairs.setdefault(name[: match.start()].removeprefix(TENSOR_PREFIX), {})[match.group(1)[-1]] = tensor
    return lora_pairs


def _check_known_names(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], expected_pattern: re.Pattern[str]) -> None:
    """Refuse a tensor whose name matches neither `expected_pattern` nor a setting of the configuration."""
    saved_modules = tuple(config.get("modules_to_save") or ())
    has_tokens, has_bias = bool(config.get("trainable_token_indices")), config.get("bias") not in (None, "none")
    for name in tensors:
        is_in_saved_module = any(f".{module}." in name for module in saved_modules)
        is_dora_tensor = bool(config.get("use_dora")) and DORA_TENSOR_PATTERN.search(name)
        is_token_tensor = has_tokens and TRAINED_TOKENS_PATTERN.search(name)
        is_known_tensor = bool(expected_pattern.search(name)) or is_in_saved_module or is_dora_tensor or is_token_tensor
        if not (is_known_tensor or (has_bias and name.endswith(".bias")) or _is_embedding(name)):
            raise _FaultFound("AdapterKeysUnknown", f"the tensor {name} belongs to no setting in {ADAPTER_CONFIG}: PEFT and servers ignore or reject it")


def _is_embedding(name: str) -> bool:
    """Whether the tensor is an enlarged embedding or head, which PEFT saves with the adapter."""
    return re.search(r"\.(embed_tokens|wte|lm_head|embed_in|embed_out|word_embeddings)(\.base_layer)?\.(weight|bias)$", name) is not None


def _check_pairs_are_complete(lora_pairs: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    for module, matrices in lora_pairs.items():
        absent_matrices = sorted({"A", "B"} - set(matrices))
        if absent_matrices:
            raise _FaultFound("TargetWeightsMissing", f"{module} has no matrix lora_{absent_matrices[0]}, so its adapter has no effect")


def _find_adapted_embeddings(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Return the names (in the base model) of the embeddings that have an adapter."""
    names_and_matches = ((name, LORA_TENSOR_PATTERN.search(name)) for name in tensors)
    return {name[: match.start()].removeprefix(TENSOR_PREFIX) for name, match in names_and_matches if match and "embedding" in match.group(1)}


def _check_ranks(lora_pairs: Mapping[str, Mapping[str, StoredTensor]], config: Mapping[str, Any], base_tensors: Mapping[str, StoredTensor]) -> None:
    """Compare the shapes with the rank. The matrix A of experts has rank x experts rows, because PEFT stores all experts as one matrix."""
    for module, matrices in lora_pairs.items():
        a_shape, b_shape, rank = matrices["A"].shape, matrices["B"].shape, _read_module_setting(config, module, "r", "rank_pattern")
        may_be_experts = f"{module}.weight" not in base_tensors
        if len(a_shape) == 2 and (a_shape[0] != b_shape[1] or (a_shape[0] % rank if may_be_experts else a_shape[0] != rank)):
            raise _FaultFound("RankDiffers", f"{ADAPTER_CONFIG} says rank {rank:g} for {module}, but A has {a_shape[0]} rows and B has {b_shape[1]} columns")


def _check_base(lora_pairs: Mapping[str, Mapping[str, StoredTensor]], base_tensors: Mapping[str, StoredTensor]) -> None:
    """Compare the shapes with those of the base model's weights. Quantised weights are left out, because they have other shapes."""
    known_weights = {module: base_tensors[f"{module}.weight"] for module in lora_pairs if f"{module}.weight" in base_tensors}
    if base_tensors and lora_pairs and not known_weights and not _has_renamed_weights(lora_pairs, base_tensors):
        raise _FaultFound("AdapterOfAnotherBase", f"the base model has no module {next(iter(lora_pairs))}: the adapter was trained on another model")
    for module, weight in known_weights.items():
        if weight.dtype not in ("F32", "F16", "BF16", "F64") or len(weight.shape) != 2:
            continue
        inputs, outputs = lora_pairs[module]["A"].shape[-1], lora_pairs[module]["B"].shape[0]
        if weight.shape not in ((outputs, inputs), (inputs, outputs)):
            shape = " x ".join(map(str, weight.shape))
            raise _FaultFound("AdapterOfAnotherBase", f"{module} has the shape {shape} in the base model, but its adapter fits {outputs} x {inputs}")


def _has_renamed_weights(lora_pairs: Mapping[str, Any], base_tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the weights in the base model's files have other names than its modules, because transformers renames the weights when it loads them."""
    last_names = {module.removesuffix(".base_layer").rsplit(".", 1)[-1] for module in lora_pairs}
    return any(name.removesuffix(".weight").rsplit(".", 1)[-1] in last_names or ("experts" in last_names and ".experts." in name) for name in base_tensors)


def _check_targets(lora_pairs: Mapping[str, Any], config: Mapping[str, Any], base_tensors: Mapping[str, StoredTensor], embeddings: set[str]) -> None:
    """Check that each module of the base model that the configuration targets has an adapter. `embeddings`: embeddings that have an adapter.

    The files of many models contain a weight for each routed expert (`experts.0.down_proj`). transformers joins these weights when it loads the model,
    so the targets do not apply to them. They are checked only if the adapter has weights for single experts.
    """
    targets = config.get("target_modules")
    modules = [name.removesuffix(".weight") for name, tensor in base_tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2]
    if not targets or targets == ALL_LINEAR or not set(lora_pairs) <= set(modules):
        return
    if not any(SINGLE_EXPERT_PATTERN.search(module) for module in lora_pairs):
        modules = [module for module in modules if not SINGLE_EXPERT_PATTERN.search(module)]
    layers = config.get("layers_to_transform")
    chosen_layers = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
    for module in modules:
        if _is_targeted(module, targets) and not _is_excluded(module, config.get("exclude_modules")) and module not in lora_pairs and module not in embeddings:
            layer = next((int(part) for part in module.split(".") if part.isdecimal()), None)
            if chosen_layers is None or layer in chosen_layers:
                raise _FaultFound("TargetWeightsMissing", f"{ADAPTER_CONFIG} targets {module}, but {ADAPTER_WEIGHTS} has no weights for it")


def _is_targeted(module: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _is_excluded(module: str, excluded_modules: Any) -> bool:
    return bool(excluded_modules) and _is_targeted(module, excluded_modules)


def _check_scaling(lora_pairs: Mapping[str, Any], config: Mapping[str, Any], trained_scaling: Mapping[str, float]) -> None:
    """Compare the factor by which the configuration scales each module's product B A with the factor in training (`trained_scaling`)."""
    for module in lora_pairs:
        rank, alpha = _read_module_setting(config, module, "r", "rank_pattern"), _read_module_setting(config, module, "lora_alpha", "alpha_pattern")
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if module in trained_scaling and not math.isclose(factor, trained_scaling[module], rel_tol=1e-6):
            settings_text = f"lora_alpha {alpha:g} and rank {rank:g} scale the adapter of {module} by {factor:g}"
            raise _FaultFound("AdapterScaleDiffers", f"{settings_text}, but it was trained with {trained_scaling[module]:g}")


def _read_module_setting(config: Mapping[str, Any], module: str, name: str, pattern_name: str) -> float:
    """Return the value of a setting for a module: that of the first matching pattern or, if no pattern matches, that of the whole adapter."""
    patterns: Mapping[str, float] = config.get(pattern_name) or {}
    value = next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), config.get(name))
    return float(value) if isinstance(value, int | float) and value > 0 else math.nan


# ---- models and tokenizers


def _check_model(folder: Path) -> None:
    if _read_json(folder / "config.json") is None:
        raise _FaultFound("ModelConfigMissing", "config.json is missing or is not JSON")
    tensors = _read_tensors(folder, "model.safetensors", "ModelFileDamaged")
    if not tensors:
        raise _FaultFound("ModelFileEmpty", "the folder contains no safetensors file with weights")
    wrapped_name = next((name for name in tensors if name.startswith(WRAPPER_PREFIXES) or "._orig_mod." in name), None)
    if wrapped_name is not None:
        raise _FaultFound("ModelPrefixIgnored", f"the tensor {wrapped_name} has the name of a wrapper: servers do not find its module")
    _check_finite(tensors)


def _check_tokenizer(folder: Path, reference: ReferenceValues | None) -> None:
    """Compare the size and the chat template of the tokenizer with those in training. The size is only known from tokenizer.json."""
    if reference is None:
        return
    vocabulary_size = _read_vocabulary_size(folder)
    if vocabulary_size is not None and reference.tokenizer_length and vocabulary_size != reference.tokenizer_length:
        raise _FaultFound("TokenizerDiffers", f"tokenizer.json has {vocabulary_size} tokens, but the model was trained with {reference.tokenizer_length}")
    template = _read_chat_template(folder)
    if reference.chat_template_sha256 is not None and template is None:
        raise _FaultFound("ChatTemplateMissing", "the tokenizer has no chat template, but the model was trained with one: servers would use another format")
    if reference.chat_template_sha256 is not None and hash_text(template) != reference.chat_template_sha256:
        raise _FaultFound("ChatTemplateDiffers", "the chat template differs from the template of the training")


def _read_vocabulary_size(folder: Path) -> int | None:
    """Return the number of tokens in tokenizer.json, or None if this file cannot be read."""
    tokenizer = _read_json(folder / "tokenizer.json")
    vocabulary = (tokenizer or {}).get("model", {}).get("vocab")
    if tokenizer is None or not isinstance(vocabulary, dict | list):
        return None
    tokens = set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
    return len(tokens | {token["content"] for token in tokenizer.get("added_tokens") or ()})


def _read_chat_template(folder: Path) -> str | None:
    """Return the chat template from chat_template.jinja or, if this file does not exist, from tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = (_read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    return template if isinstance(template, str) else None


# ---- files


def _read_tensors(folder: Path, name: str, code: str) -> dict[str, StoredTensor]:
    try:
        return read_folder(folder, name)
    except (DamagedFileError, OSError) as error:
        raise _FaultFound(code, str(error)) from error


def _read_base(base: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the base model, by name. The result is empty if the base model has no safetensors files."""
    try:
        return read_folder(base)
    except (DamagedFileError, OSError):
        return {}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
