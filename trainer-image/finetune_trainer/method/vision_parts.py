"""Chooses the trained parts of a vision-language model (`method.vision`): vision layers or language layers, attention or MLP modules.

The language part consists of the decoder and the head. Everything else belongs to the vision part: the vision tower, and the layers that connect
the tower to the decoder. By default, the vision part is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.rules import is_vision_language, value_or_default
from finetune_api.spec.method import Vision

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "cross_attn", "linear_attn")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""Names of the modules of these kinds in transformers' models."""


NO_NAME = "(?!)"
"""A regular expression that matches no name."""


@dataclass(frozen=True)
class TrainedParts:
    """The values of `method.vision`, with defaults."""

    vision_layers: bool
    language_layers: bool
    attention_modules: bool
    mlp_modules: bool

    @staticmethod
    def of(run: RunConfig) -> TrainedParts | None:
        """The trained parts of a run; None for a text model."""
        if not is_vision_language(run.spec):
            return None
        vision = run.spec.method.vision or Vision()
        names = ("vision_layers", "language_layers", "attention_modules", "mlp_modules")
        return TrainedParts(**{name: bool(value_or_default(vision, name)) for name in names})

    def freeze(self, model: Any) -> None:
        """Freeze the parameters outside of the trained parts."""
        excluded = re.compile(self.excluded_modules(model))
        for name, parameter in model.named_parameters():
            if excluded.fullmatch(name):
                parameter.requires_grad_(False)

    def excluded_modules(self, model: Any) -> str:
        """A regular expression for the names of all modules and parameters outside of the trained parts."""
        language, vision = language_part_names(model), vision_part_names(model)
        parts = [] if self.vision_layers else vision
        parts = parts if self.language_layers else [*parts, *language]
        kinds = ([] if self.attention_modules else list(ATTENTION_NAMES)) + ([] if self.mlp_modules else list(MLP_NAMES))
        patterns = [rf"{re.escape(name)}(\..*)?" for name in parts] + [rf"(.*\.)?{name}(\..*)?" for name in kinds]
        return "|".join(patterns) or NO_NAME

    def describe(self, model: Any) -> list[str]:
        """Notes about the frozen parts."""
        notes = []
        if not self.vision_layers:
            notes.append(
                f"the vision layers ({', '.join(vision_part_names(model))}) are frozen; to train them, write `vision: {{visionLayers: true}}` in method"
            )
        if not self.language_layers:
            notes.append(f"the language layers ({', '.join(language_part_names(model))}) are frozen")
        kinds = {"attention modules": self.attention_modules, "MLP modules": self.mlp_modules}
        notes += [f"the {kind} are frozen" for kind, is_trained in kinds.items() if not is_trained]
        return notes

    def require_targets(self, model: Any, targets: str | list[str], linear_names: list[str]) -> None:
        """Check that the adapter is added to at least one module. Errors: ConfigError TargetModulesMissing."""
        excluded = re.compile(self.excluded_modules(model))
        names = linear_names if isinstance(targets, str) else targets
        modules = (name for name, _ in model.named_modules() if any(name == target or name.endswith(f".{target}") for target in names))
        if all(excluded.fullmatch(name) for name in modules):
            raise ConfigError(
                "TargetModulesMissing", f"no module would have an adapter: method.vision leaves out all of {', '.join(names)}",
                hint="change method.vision, or remove method.lora.targetModules",
            )  # fmt: skip


def vision_part_names(model: Any) -> list[str]:
    """Names of the outermost modules and parameters of the vision part. Errors: ConfigError ModelWithoutVision."""
    kept = _language_modules(model)
    names = list(_names_outside(model, "", kept))
    if not names:
        raise ConfigError(
            "ModelWithoutVision", f"model.modality is visionLanguage, but {type(model).__name__} has no vision layers",
            hint="remove modality to train a text model, or give a vision-language model",
        )  # fmt: skip
    return names


def language_part_names(model: Any) -> list[str]:
    """Names of the decoder and the head."""
    kept = {id(module) for module in _language_modules(model)}
    return [name for name, module in model.named_modules() if id(module) in kept]


def _language_modules(model: Any) -> list[Any]:
    return [module for module in (model.get_decoder(), model.get_output_embeddings()) if module is not None]


def _names_outside(module: Any, prefix: str, kept: list[Any]) -> Iterator[str]:
    """Yield the names of all parts of a module (children and own parameters), except the modules `kept` and the modules that contain them."""
    yield from (prefix + name for name, _ in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if any(child is one for one in kept):
            continue
        if any(inner is one for inner in child.modules() for one in kept):
            yield from _names_outside(child, f"{prefix}{name}.", kept)
        else:
            yield prefix + name
