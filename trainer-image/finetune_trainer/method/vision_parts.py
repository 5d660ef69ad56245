"""Applies `method.vision`, which chooses the trained parts of a vision-language model.

Users choose vision layers, language layers or both, and of these the attention modules, the MLP modules or both. The language part of a model
consists of the decoder and the head. All other modules belong to the vision part: the vision tower, and the layers that connect the tower to
the decoder. By default, the vision part is frozen.
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
"""Names of attention modules in the models of transformers."""
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""Names of MLP modules in the models of transformers."""
PATTERN_WITHOUT_MATCH = "(?!)"
"""A regular expression that matches no name."""


@dataclass(frozen=True)
class TrainedParts:
    """The fields of `method.vision`, with their defaults filled in."""

    vision_layers: bool
    language_layers: bool
    attention_modules: bool
    mlp_modules: bool

    @staticmethod
    def of(run: RunConfig) -> TrainedParts | None:
        """Return the trained parts of a run; None for a text model."""
        if not is_vision_language(run.spec):
            return None
        vision = run.spec.method.vision or Vision()
        names = ("vision_layers", "language_layers", "attention_modules", "mlp_modules")
        return TrainedParts(**{name: bool(value_or_default(vision, name)) for name in names})

    def freeze(self, model: Any) -> None:
        """Freeze the parameters outside of the trained parts."""
        excluded_pattern = re.compile(self.excluded_names_pattern(model))
        for name, parameter in model.named_parameters():
            if excluded_pattern.fullmatch(name):
                parameter.requires_grad_(False)

    def excluded_names_pattern(self, model: Any) -> str:
        """Return a regular expression that matches the names of all modules and parameters outside of the trained parts."""
        language_names, vision_names = language_part_names(model), vision_part_names(model)
        frozen_parts = [] if self.vision_layers else vision_names
        frozen_parts = frozen_parts if self.language_layers else [*frozen_parts, *language_names]
        frozen_modules = ([] if self.attention_modules else list(ATTENTION_NAMES)) + ([] if self.mlp_modules else list(MLP_NAMES))
        patterns = [rf"{re.escape(name)}(\..*)?" for name in frozen_parts] + [rf"(.*\.)?{name}(\..*)?" for name in frozen_modules]
        return "|".join(patterns) or PATTERN_WITHOUT_MATCH

    def describe_frozen_parts(self, model: Any) -> list[str]:
        """Return notes about the frozen parts, for the status."""
        notes = []
        if not self.vision_layers:
            notes.append(
                f"the vision layers ({', '.join(vision_part_names(model))}) are frozen; to train them, write `vision: {{visionLayers: true}}` in method"
            )
        if not self.language_layers:
            notes.append(f"the language layers ({', '.join(language_part_names(model))}) are frozen")
        trained_modules = {"attention modules": self.attention_modules, "MLP modules": self.mlp_modules}
        notes += [f"the {name} are frozen" for name, is_trained in trained_modules.items() if not is_trained]
        return notes

    def require_targets(self, model: Any, targets: str | list[str], linear_names: list[str]) -> None:
        """Check that at least one module would get an adapter. Errors: ConfigError TargetModulesMissing.

        `targets`: names of modules, or PEFT's value for all linear layers. `linear_names`: names of the linear layers.
        """
        excluded_pattern = re.compile(self.excluded_names_pattern(model))
        target_names = linear_names if isinstance(targets, str) else targets
        matching_names = (name for name, _ in model.named_modules() if any(name == target or name.endswith(f".{target}") for target in target_names))
        if all(excluded_pattern.fullmatch(name) for name in matching_names):
            raise ConfigError(
                "TargetModulesMissing", f"no module would have an adapter: method.vision leaves out all of {', '.join(target_names)}",
                hint="change method.vision, or remove method.lora.targetModules",
            )  # fmt: skip


def vision_part_names(model: Any) -> list[str]:
    """Return the names of the outermost modules and parameters of the vision part. Errors: ConfigError ModelWithoutVision."""
    names = list(_list_names_outside(model, "", _find_language_modules(model)))
    if not names:
        raise ConfigError(
            "ModelWithoutVision", f"model.modality is visionLanguage, but {type(model).__name__} has no vision layers",
            hint="remove modality to train a text model, or give a vision-language model",
        )  # fmt: skip
    return names


def language_part_names(model: Any) -> list[str]:
    """Return the names of the decoder and the head."""
    language_ids = {id(module) for module in _find_language_modules(model)}
    return [name for name, module in model.named_modules() if id(module) in language_ids]


def _find_language_modules(model: Any) -> list[Any]:
    return [module for module in (model.get_decoder(), model.get_output_embeddings()) if module is not None]


def _list_names_outside(module: Any, prefix: str, skipped_modules: list[Any]) -> Iterator[str]:
    """Yield the names of the outermost children and parameters of `module` that neither are nor contain a skipped module."""
    yield from (prefix + name for name, _ in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if any(child is skipped_module for skipped_module in skipped_modules):
            continue
        if any(inner is skipped_module for inner in child.modules() for skipped_module in skipped_modules):
            yield from _list_names_outside(child, f"{prefix}{name}.", skipped_modules)
        else:
            yield prefix + name
