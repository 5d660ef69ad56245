"""Spectrum: train the modules with the best signal-to-noise ratio (SNR) in full, and freeze all others.

The SNR is computed as in the paper. Let S be the singular values of a linear weight W (n x m). The estimated noise level is
sigma = IQR(S) / 1.349. Singular values above sigma * (1 + sqrt(min(n, m) / max(n, m))) are signal; the others are noise.
SNR = (sum of the signal / sum of the noise) / max(S). Modules are compared only with modules of the same type (all `mlp.down_proj`, all
`self_attn.q_proj`, ...). With a `snrThreshold` of t, the modules with the highest SNR are trained: a share of 1 - t of each type.
The metric `meanOverStd` ranks whole layers by mean(|W|) / std(W). This metric hardly distinguishes layers; it exists so that configurations of
an older tool select the same layers here.

On a 4-bit base model, the selected modules are not quantised. On other base models, the head and the embeddings are trained too.
Source: Hartford et al., Spectrum: Targeted Training on Signal to Noise Ratio, https://arxiv.org/abs/2406.06623.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import MethodType, OutputKind, SpectrumMetric

from finetune_trainer.distributed import local_rank_0_first
from finetune_trainer.files import replace_file
from finetune_trainer.hardware import trains_on_quantized_base, uses_gpu
from finetune_trainer.inputs import Inputs
from finetune_trainer.library_internals import accept_quantized_model
from finetune_trainer.method.base import Method, MethodContext, TrainableModel
from finetune_trainer.method.precision import TrainedWeightsCopy
from finetune_trainer.model import load_model

SNR_FILE = "spectrum_snr.json"
SCAN_CACHE_VERSION = 2
"""Part of the file name of a cached scan. Increase this number when the fields of `ScannedModule` change, because local runs reuse their work folder."""
_LAYER_NAME_PATTERN = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.(?P<type>.+)$")


@dataclass(frozen=True)
class ScannedModule:
    """A linear module of a layer, with its SNR."""

    name: str
    layer: int
    type: str
    """The module's name below its layer, such as `mlp.down_proj`."""
    snr: float


@dataclass(frozen=True)
class ModuleSelection:
    """The modules to train, and the scan that selected them. If the spec lists the layers, there is no scan, metric or threshold."""

    modules: tuple[str, ...]
    """Names of the modules to train."""
    scanned_modules: tuple[ScannedModule, ...] = ()
    metric: str | None = None
    snr_threshold: float | None = None

    def to_json(self) -> str:
        """Return the content of `spectrum_snr.json`. An infinite SNR is written as null."""
        modules = {m.name: {"snr": m.snr if math.isfinite(m.snr) else None, "type": m.type} for m in self.scanned_modules}
        content = {
            "metric": self.metric,
            "snrThreshold": self.snr_threshold,
            "modules": modules,
            "trained": list(self.modules),
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


class Spectrum(Method, types=(MethodType.SPECTRUM,)):
    """Trains the selected modules in full. For a quantised base model, the modules are selected from the unquantised weights."""

    def __init__(self, context: MethodContext):
        super().__init__(context)
        self._selection: ModuleSelection | None = None
        """The modules that `before_load` selects for a quantised base model. None for an unquantised base model, because `apply` selects the modules
        of such a model."""
        self._weights_before_construction: TrainedWeightsCopy | None = None

    def before_load(self) -> tuple[str, ...]:
        context = self.context
        if not trains_on_quantized_base(context.run):
            return ()
        unquantized_model, _ = load_model(context.run, context.inputs, context.hardware, quantize=False)
        self._selection = select_modules(context.run, context.inputs, unquantized_model)
        return self._selection.modules

    def apply(self, model: Any) -> TrainableModel:
        """Freeze all weights except those of the selected modules and, in an unquantised base model, of the head and the embeddings."""
        selection = self._selection or select_modules(self.context.run, self.context.inputs, model)
        is_quantized = bool(getattr(model, "is_loaded_in_4bit", False))
        always_trained_modules = [] if is_quantized else [model.get_input_embeddings(), model.get_output_embeddings()]
        always_trained_modules.append(getattr(model, "score", None))  # a reward model's random head
        always_trained_ids = {id(p) for module in always_trained_modules if module is not None for p in module.parameters()}
        for name, parameter in model.named_parameters():
            is_selected = name.rsplit(".", 1)[0] in selection.modules or id(parameter) in always_trained_ids
            parameter.requires_grad_(is_selected and parameter.is_floating_point())
            if is_selected and is_quantized and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        also_trained_parts = "" if is_quantized else ", the head and the embeddings"
        notes = [f"spectrum trains {len(selection.modules)} modules{also_trained_parts}"]
        return TrainableModel(model, OutputKind.MODEL, notes=notes, extra_files={SNR_FILE: selection.to_json()})

    def after_apply(self, trainable: TrainableModel) -> None:
        if self._selection is not None:
            self._weights_before_construction = TrainedWeightsCopy(trainable.model)

    def trainer_construction(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext() if self._selection is None else accept_quantized_model(model)

    def on_trainer_created(self, trainer: Any) -> None:
        if self._weights_before_construction is not None:
            self._weights_before_construction.restore(trainer.model)
        super().on_trainer_created(trainer)


def select_modules(run: RunConfig, inputs: Inputs, model: Any) -> ModuleSelection:
    """Return all modules of the layers in `method.spectrum.layers`, or the best modules of a scan.

    The scan is stored for later runs with the same revision of the model.
    Errors: ConfigError SpectrumLayerMissing, SpectrumSelectsNothing.
    """
    spec = run.spec.method.spectrum
    modules = dict(_find_linear_modules(model))
    if spec is not None and spec.layers is not None:
        model_layers = {layer for layer, _ in modules.values()}
        absent_layers = sorted(set(spec.layers) - model_layers)
        if absent_layers:
            raise ConfigError(
                "SpectrumLayerMissing", f"method.spectrum.layers names {', '.join(map(str, absent_layers))}; the model has layers 0 to {max(model_layers)}",
                hint="name layers that the model has",
            )  # fmt: skip
        return ModuleSelection(tuple(name for name, (layer, _) in modules.items() if layer in spec.layers))
    metric = (spec.metric if spec else None) or SpectrumMetric.MARCHENKO_PASTUR
    threshold = 0.5 if spec is None or spec.snr_threshold is None else spec.snr_threshold
    scan_file = inputs.output_dir.parent / f"spectrum-{SCAN_CACHE_VERSION}-{metric}-{_to_file_name(inputs.model_revision)}.json"
    with local_rank_0_first():
        scan = _load_or_make_scan(scan_file, model, metric, torch.device("cuda") if uses_gpu(run) else torch.device("cpu"))
    selects_whole_layers = metric is SpectrumMetric.MEAN_OVER_STD
    selected_names = _choose_best_layers(scan, threshold) if selects_whole_layers else _choose_best_of_each_type(scan, 1 - threshold)
    if not selected_names:
        raise ConfigError(
            "SpectrumSelectsNothing", f"method.spectrum.snrThreshold {threshold} selects no module", hint="lower snrThreshold"
        )  # fmt: skip
    # Every rank must train the same modules, but nodes may rank two modules with similar SNRs differently because of rounding errors.
    selected_names = list(broadcast_object_list(selected_names))
    return ModuleSelection(tuple(selected_names), tuple(scan), metric.value, threshold)


def _find_linear_modules(model: Any) -> Iterator[tuple[str, tuple[int, str]]]:
    """Yield the name, the layer number and the type of each linear module in a numbered layer, as (name, (layer, type))."""
    for name, module in model.named_modules():
        match = _LAYER_NAME_PATTERN.match(name)
        if match and getattr(module, "weight", None) is not None and "Linear" in type(module).__name__:
            yield name, (int(match["index"]), match["type"])


def _load_or_make_scan(file: Path, model: Any, metric: SpectrumMetric, device: torch.device) -> list[ScannedModule]:
    """Return the scan from `file` if an earlier run has scanned the same weights. If there is no such scan, scan the model and write the file."""
    if file.exists():
        return [ScannedModule(**{**item, "snr": float(item["snr"])}) for item in json.loads(file.read_text())]
    scan = [
        ScannedModule(name, layer, module_type, signal_to_noise(_read_weight(model, name, device), metric))
        for name, (layer, module_type) in _find_linear_modules(model)
    ]
    with replace_file(file) as partial_file:
        partial_file.write_text(json.dumps([{**asdict(m), "snr": str(m.snr)} for m in scan]))
    return scan


def _read_weight(model: Any, name: str, device: torch.device) -> torch.Tensor:
    """Return a module's weight on the device in 32 bits. On a CPU, computing the singular values of a large matrix takes minutes."""
    return model.get_submodule(name).weight.detach().to(device).float()  # type: ignore[no-any-return]  # get_submodule gives Any


def signal_to_noise(weight: torch.Tensor, metric: SpectrumMetric) -> float:
    """Return the SNR of a 32-bit weight. The SNR is infinite if no singular value is noise."""
    if metric is SpectrumMetric.MEAN_OVER_STD:
        standard_deviation = float(weight.std())
        return float(weight.abs().mean()) / standard_deviation if standard_deviation > 0 else 0.0
    singular_values = torch.linalg.svdvals(weight)
    lower_quartile, upper_quartile = torch.quantile(singular_values, torch.tensor([0.25, 0.75], device=singular_values.device)).tolist()
    short_side, long_side = sorted(weight.shape)
    noise_limit = (upper_quartile - lower_quartile) / 1.349 * (1 + math.sqrt(short_side / long_side))
    signal, noise = float(singular_values[singular_values > noise_limit].sum()), float(singular_values[singular_values <= noise_limit].sum())
    largest_value = float(singular_values.max())
    if largest_value == 0:
        return 0.0
    return signal / noise / largest_value if noise > 0 else math.inf


def _choose_best_of_each_type(scanned_modules: Sequence[ScannedModule], selected_share: float) -> list[str]:
    """Return the names of the modules with the highest SNR. Of each type, the share `selected_share` (0 to 1) is selected, rounded down."""
    modules_by_type: dict[str, list[ScannedModule]] = {}
    for module in scanned_modules:
        modules_by_type.setdefault(module.type, []).append(module)
    selected_names = {
        m.name
        for modules_of_type in modules_by_type.values()
        for m in sorted(modules_of_type, key=lambda m: (-m.snr, m.layer))[: _round_down(len(modules_of_type) * selected_share)]
    }
    return [module.name for module in scanned_modules if module.name in selected_names]


def _choose_best_layers(scanned_modules: Sequence[ScannedModule], quantile: float) -> list[str]:
    """Return the names of the modules in the best layers.

    A layer is selected if its mean SNR is at least the quantile `quantile` (0 to 1) of the mean SNRs of all layers.
    """
    snrs_by_layer: dict[int, list[float]] = {}
    for module in scanned_modules:
        snrs_by_layer.setdefault(module.layer, []).append(module.snr)
    mean_by_layer: Mapping[int, float] = {layer: sum(snrs) / len(snrs) for layer, snrs in snrs_by_layer.items()}
    lowest_mean = float(torch.quantile(torch.tensor(sorted(mean_by_layer.values()), dtype=torch.float64), quantile))
    return [module.name for module in scanned_modules if mean_by_layer[module.layer] >= lowest_mean - 1e-12]


def _round_down(count: float) -> int:
    """Round down, but ignore the rounding error of a product: (1 - 0.9) * 10 is 0.9999999999999998, and counts as 1."""
    return int(count + 1e-9)


def _to_file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[:80]
