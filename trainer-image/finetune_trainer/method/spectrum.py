"""Spectrum: train the modules with the best signal-to-noise ratio in full, freeze the rest.

The scan is the published one: singular values S of every linear weight W (n x m); sigma = IQR(S) / 1.349; the cut is
sigma * (1 + sqrt(min(n, m) / max(n, m))); SNR = (sum of S above the cut / sum of S not above it) / max(S). Modules are compared
with those of their own kind only (all `mlp.down_proj`, all `self_attn.q_proj`, ...). `snrThreshold` t keeps the best 1 - t of
each kind. `meanOverStd` ranks whole layers by mean(|W|) / std(W), as an older tool does: it hardly tells layers apart, and is
here so that its configurations mean what they meant. The head and the embeddings are always trained.

On a 4-bit base the selected modules are kept in 16 bits (they are left out of quantisation); only those are trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind, SpectrumMetric

from finetune_trainer.hardware import wants_gpu
from finetune_trainer.inputs import Inputs
from finetune_trainer.method.base import Applied

SNR_FILE = "spectrum_snr.json"
_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True)
class Module:
    """One linear module of a layer, with its ratio."""

    name: str
    layer: int
    kind: str
    snr: float


@dataclass(frozen=True)
class Selection:
    """What is trained: module names (without `.weight`), and the scan, if there was one."""

    modules: tuple[str, ...]
    scan: tuple[Module, ...] = ()
    metric: str | None = None
    threshold: float | None = None

    def to_json(self) -> str:
        """The contents of `spectrum_snr.json`."""
        modules = {m.name: {"snr": m.snr if math.isfinite(m.snr) else None, "type": m.kind} for m in self.scan}
        value = {
            "metric": self.metric,
            "snrThreshold": self.threshold,
            "modules": modules,
            "trained": list(self.modules),
        }
        return json.dumps(value, indent=2, sort_keys=True) + "\n"


def select(run: RunConfig, inputs: Inputs, model: Any) -> Selection:
    """Choose the modules: the given layers, or the best of a scan, which is kept by the model's revision.

    Errors: ConfigError SpectrumLayerMissing, SpectrumSelectsNothing.
    """
    spec = run.spec.method.spectrum
    modules = dict(_linear(model))
    if spec is not None and spec.layers is not None:
        there = {layer for layer, _ in modules.values()}
        absent = sorted(set(spec.layers) - there)
        if absent:
            raise ConfigError(
                "SpectrumLayerMissing", f"method.spectrum.layers names {', '.join(map(str, absent))}; the model has layers 0 to {max(there)}",
                hint="name layers that are there",
            )  # fmt: skip
        return Selection(tuple(name for name, (layer, _) in modules.items() if layer in spec.layers))
    metric = (spec.metric if spec else None) or SpectrumMetric.MARCHENKO_PASTUR
    threshold = 0.5 if spec is None or spec.snr_threshold is None else spec.snr_threshold
    file = inputs.output_dir.parent / f"spectrum-{metric}-{_safe(inputs.model_revision)}.json"
    with PartialState().local_main_process_first():
        scan = _cached(file, model, metric, torch.device("cuda") if wants_gpu(run) else torch.device("cpu"))
    chosen = (
        _best_layers(scan, threshold) if metric is SpectrumMetric.MEAN_OVER_STD else _best_of_kind(scan, 1 - threshold)
    )
    if not chosen:
        raise ConfigError(
            "SpectrumSelectsNothing", f"method.spectrum.snrThreshold {threshold} keeps no module", hint="lower it"
        )  # fmt: skip
    # Nodes may round differently where two ratios are close, and every rank must train the same modules.
    chosen = list(broadcast_object_list(chosen))
    return Selection(tuple(chosen), tuple(scan), metric.value, threshold)


def apply(run: RunConfig, inputs: Inputs, model: Any, selection: Selection | None = None) -> Applied:
    """Freeze all but the selected modules, the head and the embeddings. On a quantised base `selection` was made before loading."""
    chosen = selection or select(run, inputs, model)
    quantized = bool(getattr(model, "is_loaded_in_4bit", False))
    ends = [] if quantized else [model.get_input_embeddings(), model.get_output_embeddings()]
    ends.append(getattr(model, "score", None))  # a reward model's head begins at random
    always = {id(p) for module in ends if module is not None for p in module.parameters()}
    for name, parameter in model.named_parameters():
        wanted = name.rsplit(".", 1)[0] in chosen.modules or id(parameter) in always
        parameter.requires_grad_(wanted and parameter.is_floating_point())
        if wanted and quantized and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    notes = [f"spectrum trains {len(chosen.modules)} modules{'' if quantized else ', the head and the embeddings'}"]
    return Applied(model, OutputKind.MODEL, notes=notes, extra_files={SNR_FILE: chosen.to_json()})


@contextmanager
def trainable_although_quantized(model: Any) -> Iterator[None]:
    """Let a Trainer take a model whose frozen part is quantised and whose trained part is not.

    transformers refuses every quantised model without adapters ("purely quantized"); what is trained here are plain 16-bit
    weights. The flag is the one that it looks at; it goes back as soon as the Trainer is built.
    """
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def _linear(model: Any) -> Iterator[tuple[str, tuple[int, str]]]:
    """Linear modules inside numbered layers: name, (layer, kind)."""
    for name, module in model.named_modules():
        match = _LAYER.match(name)
        if match and getattr(module, "weight", None) is not None and "Linear" in type(module).__name__:
            yield name, (int(match["index"]), match["kind"])


def _cached(file: Path, model: Any, metric: SpectrumMetric, device: torch.device) -> list[Module]:
    """The scan of this model, from disk if one was made of the same weights."""
    if file.exists():
        return [Module(**{**item, "snr": float(item["snr"])}) for item in json.loads(file.read_text())]
    scan = [
        Module(name, layer, kind, ratio(_weight(model, name, device), metric)) for name, (layer, kind) in _linear(model)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{id(model)}")
    beside.write_text(json.dumps([{**asdict(m), "snr": str(m.snr)} for m in scan]))
    beside.rename(file)
    return scan


def _weight(model: Any, name: str, device: torch.device) -> torch.Tensor:
    """One matrix at a time on the device: singular values cost a CPU minutes a matrix."""
    return model.get_submodule(name).weight.detach().to(device).float()  # type: ignore[no-any-return]  # get_submodule gives Any


def ratio(weight: torch.Tensor, metric: SpectrumMetric) -> float:
    """Signal-to-noise ratio of one weight, in 32 bits. Infinite where no singular value is noise."""
    if metric is SpectrumMetric.MEAN_OVER_STD:
        deviation = float(weight.std())
        return float(weight.abs().mean()) / deviation if deviation > 0 else 0.0
    values = torch.linalg.svdvals(weight)
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device)).tolist()
    small, large = sorted(weight.shape)
    cut = (high - low) / 1.349 * (1 + math.sqrt(small / large))
    signal, noise = float(values[values > cut].sum()), float(values[values <= cut].sum())
    largest = float(values.max())
    if largest == 0:
        return 0.0
    return signal / noise / largest if noise > 0 else math.inf


def _best_of_kind(scan: Sequence[Module], keep: float) -> list[str]:
    kinds: dict[str, list[Module]] = {}
    for module in scan:
        kinds.setdefault(module.kind, []).append(module)
    chosen = [
        m.name
        for group in kinds.values()
        for m in sorted(group, key=lambda m: (-m.snr, m.layer))[: _floor(len(group) * keep)]
    ]
    return [module.name for module in scan if module.name in set(chosen)]


def _best_layers(scan: Sequence[Module], threshold: float) -> list[str]:
    """Modules of the layers whose mean ratio is at or above that percentile of all layers."""
    layers: dict[int, list[float]] = {}
    for module in scan:
        layers.setdefault(module.layer, []).append(module.snr)
    means: Mapping[int, float] = {layer: sum(found) / len(found) for layer, found in layers.items()}
    limit = float(torch.quantile(torch.tensor(sorted(means.values()), dtype=torch.float64), threshold))
    return [module.name for module in scan if means[module.layer] >= limit - 1e-12]


def _floor(count: float) -> int:
    """Floor that forgives the last bit: 0.7 * 10 is 7."""
    return int(count + 1e-9)


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[:80]
