"""Cross-field rules: what cannot be together, said once for the CRD (CEL), the operator and the command line.

A rule is a function from a spec to the problems it finds; where CEL can say the same, the expression stands beside it and
the API server refuses the manifest at once. Rules look at what the user wrote, before defaults are filled in; a rule that
depends on a default uses `given_or_default`. An option that would have no effect is a problem, not a shrug.
What needs the model or the data is checked by the trainer before its first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_api.base import DEFAULT, Group
from finetune_api.errors import ConfigError
from finetune_api.names import Env
from finetune_api.reward_parameters import unfit_parameters
from finetune_api.sources import ConfigMapSource, HttpsSource, parse
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    Backend,
    DatasetFormat,
    Device,
    DpoLoss,
    EncryptionType,
    FsdpStateDict,
    GradientCheckpointing,
    LoraInit,
    MethodType,
    MixedPrecision,
    Strategy,
    Tracker,
    TrainerType,
    When,
)


class Where(StrEnum):
    """Where the job is to run: some things are only possible on the user's own machine."""

    CLUSTER = "cluster"
    LOCAL = "local"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what was found and why it cannot be, what to write."""

    path: str
    code: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"spec.{self.path}: {self.message}; {self.hint}"


Found = Iterator[tuple[str, str, str]]
"""(path, what is wrong, what to write)."""


@dataclass(frozen=True)
class Rule:
    """A named rule; `cel` is empty where only code can say it."""

    code: str
    find: Callable[[FineTuneJobSpec, Where], Found]
    cel: str = ""
    message: str = ""


RULES: list[Rule] = []


def rule(
    code: str, *, cel: str = "", message: str = ""
) -> Callable[[Callable[[FineTuneJobSpec, Where], Found]], Callable[..., Found]]:
    """Register a rule; `message` is what the API server says when `cel` is false."""

    def register(find: Callable[[FineTuneJobSpec, Where], Found]) -> Callable[..., Found]:
        RULES.append(Rule(code, find, cel, message))
        return find

    return register


def check(spec: FineTuneJobSpec, *, where: Where = Where.CLUSTER) -> list[Problem]:
    """All problems of a spec, in the order of the rules; empty: it can be run as far as the spec alone tells."""
    return [Problem(path, one.code, message, hint) for one in RULES for path, message, hint in one.find(spec, where)]


def as_written(spec: FineTuneJobSpec, filled: Iterable[str]) -> FineTuneJobSpec:
    """A resolved spec without what was filled in (wire paths), as rules want to see it."""
    value = spec.wire()
    for path in filled:
        *groups, name = path.split(".")
        inner: Any = value
        for group in groups:
            inner = inner.get(group, {}) if isinstance(inner, dict) else {}
        inner.pop(name, None)
    return FineTuneJobSpec.model_validate({key: _without_empty(group) for key, group in value.items()})


def _without_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _without_empty(one) for key, one in value.items()}
    return {key: one for key, one in inner.items() if one != {}}


def refuse(code: str, found: Found) -> None:
    """End with the first problem found. Errors: ConfigError with that code."""
    for _, message, hint in found:
        raise ConfigError(code, message, hint=hint)


def require(spec: FineTuneJobSpec, *codes: str) -> None:
    """End with the first problem of the named rules. Errors: ConfigError with the rule's code."""
    for one in RULES:
        if one.code in codes:
            for path, message, hint in one.find(spec, Where.CLUSTER):
                raise ConfigError(one.code, f"{path}: {message}", hint=hint)


def default_of(group: type[Group], field: str) -> Any:
    """The constant default of a field, from the model's own metadata."""
    extra = group.model_fields[field].json_schema_extra
    return extra.get(DEFAULT) if isinstance(extra, dict) else None


def given_or_default(group: Group, field: str) -> Any:
    """The value a user gave, else the field's constant default."""
    value = getattr(group, field)
    return default_of(type(group), field) if value is None else value


def method_of(spec: FineTuneJobSpec) -> MethodType:
    """The method, given or default."""
    return MethodType(given_or_default(spec.method, "type"))


def trainer_of(spec: FineTuneJobSpec) -> TrainerType:
    """The objective, given or default."""
    return TrainerType(given_or_default(spec.trainer, "type"))


def base_bits(spec: FineTuneJobSpec) -> int | None:
    """Bits that the base is loaded in, given or implied by the method; None: not quantised."""
    given = spec.model.quantization.bits if spec.model.quantization else None
    return given or (4 if method_of(spec) is MethodType.QLORA or starts_with_loftq(spec) else None)


def starts_with_loftq(spec: FineTuneJobSpec) -> bool:
    """Whether adapters start as LoftQ, given or implied."""
    lora = spec.method.lora
    return lora is not None and (lora.loftq is not None or lora.init is LoraInit.LOFTQ)


NEEDS_WHOLE_WEIGHTS = (LoraInit.PISSA, LoraInit.OLORA, LoraInit.EVA)
"""Ways to start that factorise whole weights or what they are given."""
BASE_CHANGING = (LoraInit.PISSA, LoraInit.OLORA)
"""Ways to start that take a part of the base away."""
LORA_METHODS = (MethodType.LORA, MethodType.QLORA, MethodType.DORA, MethodType.ADAPTER)
PROMPT_METHODS = (MethodType.PREFIX_TUNING, MethodType.PROMPT_TUNING)
PREFERENCE_TRAINERS = (TrainerType.DPO, TrainerType.ORPO, TrainerType.REWARD)
HEADS = ("lm_head", "embed_out", "output_projection")


def ranks_per_node(spec: FineTuneJobSpec) -> int:
    """Ranks in a pod, given or default."""
    return spec.resources.processes_per_node or gpus_per_node(spec) or 1


def gpus_per_node(spec: FineTuneJobSpec) -> int:
    """GPUs of a pod, given or default."""
    return int(given_or_default(spec.resources, "gpus_per_node"))


def world_size(spec: FineTuneJobSpec) -> int:
    """Ranks in all, given or default."""
    return int(given_or_default(spec.resources, "nodes")) * ranks_per_node(spec)


def has_validation(spec: FineTuneJobSpec) -> bool:
    """Whether there is data to measure a validation loss on."""
    split = spec.dataset.split
    return spec.dataset.validation is not None or bool(split and split.validation)


def has_test(spec: FineTuneJobSpec) -> bool:
    """Whether rows are held out until training is over."""
    split = spec.dataset.split
    return spec.dataset.test is not None or bool(split and split.test)


def evaluates(spec: FineTuneJobSpec) -> bool:
    """Whether the validation loss is measured during training."""
    if spec.evaluation.strategy is None:
        return has_validation(spec)
    return spec.evaluation.strategy is not When.NO


# --- what must be there ---------------------------------------------------------------------------------------------


@rule(
    "ModelMissing",
    cel="has(self.model) && has(self.model.source)",
    message="spec.model.source is required: write for example org/name or s3://bucket/prefix",
)
def model_missing(spec: FineTuneJobSpec, where: Where) -> Found:
    if not spec.model.source:
        yield (
            "model.source",
            "no base model is named",
            "write for example `source: org/name` or `source: s3://bucket/prefix`",
        )


@rule("DatasetMissing")
def dataset_missing(spec: FineTuneJobSpec, where: Where) -> Found:
    if spec.dataset.train is None and spec.dataset.mixture is None:
        yield (
            "dataset.train",
            "no training data is named",
            "write for example `train: s3://bucket/train.jsonl`, or a `mixture`",
        )
    if spec.dataset.train is not None and spec.dataset.mixture is not None:
        yield "dataset.mixture", "dataset.train and dataset.mixture exclude each other", "remove one of the two"


@rule("SourceInvalid")
def sources(spec: FineTuneJobSpec, where: Where) -> Found:
    for path, text in source_fields(spec):
        try:
            source = parse(text, path=path)
        except ConfigError as error:
            yield path, error.message.removeprefix(f"{path} is "), error.hint or ""
            continue
        is_data = path.startswith("dataset.")
        if isinstance(source, ConfigMapSource | HttpsSource) and not is_data:
            yield (
                path,
                f"a model is a folder of files, and {text!r} names a single one",
                "write org/name, s3://bucket/prefix, pvc://claim/path or file:///path",
            )


def source_fields(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    """(path, text) of every source that is given."""
    fields: list[tuple[str, str | None]] = [
        ("model.source", spec.model.source),
        ("model.tokenizer", spec.model.tokenizer),
        ("method.adapter.source", spec.method.adapter.source if spec.method.adapter else None),
        ("trainer.dpo.referenceModel", spec.trainer.dpo.reference_model if spec.trainer.dpo else None),
        ("dataset.train", spec.dataset.train),
        ("dataset.validation", spec.dataset.validation),
        ("dataset.test", spec.dataset.test),
    ]
    fields += [(f"dataset.mixture[{i}].source", item.source) for i, item in enumerate(spec.dataset.mixture or [])]
    if spec.checkpoint.resume not in (None, "auto", "never"):
        fields.append(("checkpoint.resume", spec.checkpoint.resume))
    return ((path, text) for path, text in fields if text is not None)


# --- methods and quantisation ---------------------------------------------------------------------------------------


@rule(
    "QloraNeedsFourBits",
    cel="!(has(self.method) && has(self.method.type) && self.method.type == 'qlora') || !has(self.model.quantization) || !has(self.model.quantization.bits) || self.model.quantization.bits == 4",
    message="method.type qlora means 4 bit: remove model.quantization.bits or write 4; for 8 bit write method.type lora",
)
def qlora_bits(spec: FineTuneJobSpec, where: Where) -> Found:
    bits = spec.model.quantization.bits if spec.model.quantization else None
    if method_of(spec) is MethodType.QLORA and bits not in (None, 4):
        yield (
            "model.quantization.bits",
            f"{bits}, but method qlora means 4 bit",
            "remove bits, or write `method: {type: lora}` to train adapters on an 8-bit base",
        )


@rule(
    "FullNeedsWholeWeights",
    cel="!(has(self.method) && has(self.method.type) && self.method.type == 'full') || !has(self.model.quantization) || !has(self.model.quantization.bits)",
    message="method.type full trains all weights, and quantised weights cannot be trained: remove model.quantization, or write method.type qlora",
)
def full_bits(spec: FineTuneJobSpec, where: Where) -> Found:
    bits = spec.model.quantization.bits if spec.model.quantization else None
    if method_of(spec) is MethodType.FULL and bits:
        yield (
            "model.quantization.bits",
            f"{bits}, but method full trains all weights and quantised weights cannot be trained",
            "remove model.quantization, or write `method: {type: qlora}`",
        )
    if method_of(spec) is MethodType.SPECTRUM and bits == 8:
        yield (
            "model.quantization.bits",
            "8, but spectrum trains its modules in 16 bit on a plain or a 4-bit base",
            "remove bits or write 4",
        )


@rule("QuantizationWithoutBits")
def quantization_without_bits(spec: FineTuneJobSpec, where: Where) -> Found:
    quantization = spec.model.quantization
    if quantization is None or method_of(spec) is MethodType.QLORA:
        return
    given = [name for name in ("type", "compute_dtype", "double_quant") if getattr(quantization, name) is not None]
    if given and quantization.bits is None:
        yield (
            "model.quantization.bits",
            "nothing is quantised without it, so the other fields of the group have no effect",
            "write `bits: 4`, or remove model.quantization",
        )
    elif quantization.bits == 8 and given:
        wire = ", ".join(type(quantization).model_fields[name].alias or name for name in given)
        yield "model.quantization", f"{wire} only concern 4 bit, and bits is 8", f"remove {wire}, or write `bits: 4`"


@rule(
    "AdapterSourceMissing",
    cel="!(has(self.method) && has(self.method.type) && self.method.type == 'adapter') || (has(self.method.adapter) && has(self.method.adapter.source))",
    message="method.type adapter continues an existing adapter: write method.adapter.source",
)
def adapter_source(spec: FineTuneJobSpec, where: Where) -> Found:
    source = spec.method.adapter.source if spec.method.adapter else None
    if method_of(spec) is MethodType.ADAPTER and not source:
        yield (
            "method.adapter.source",
            "method adapter continues an existing adapter, and none is named",
            "write for example `adapter: {source: s3://models/my-adapter}`",
        )
    if method_of(spec) is not MethodType.ADAPTER and spec.method.adapter is not None:
        yield (
            "method.adapter",
            f"it is only read with method adapter, and the method is {method_of(spec)}",
            "remove it, or write `type: adapter`",
        )


@rule("OptionOfAnotherMethod")
def options_of_another_method(spec: FineTuneJobSpec, where: Where) -> Found:
    method = method_of(spec)
    if spec.method.lora is not None and method not in LORA_METHODS:
        yield (
            "method.lora",
            f"it is only read with methods lora, qlora, dora and adapter, and the method is {method}",
            "remove it, or change method.type",
        )
    if spec.method.spectrum is not None and method is not MethodType.SPECTRUM:
        yield (
            "method.spectrum",
            f"it is only read with method spectrum, and the method is {method}",
            "remove it, or write `type: spectrum`",
        )
    if spec.method.prompt_length is not None and method not in PROMPT_METHODS:
        yield (
            "method.promptLength",
            f"it is only read with prefixTuning and promptTuning, and the method is {method}",
            "remove it",
        )
    if spec.method.vision is not None and spec.model.modality != "visionLanguage":
        yield "method.vision", "it is only read with `model.modality: visionLanguage`", "remove it, or set the modality"
    if method is MethodType.DORA and spec.method.lora is not None and spec.method.lora.use_dora is False:
        yield "method.lora.useDora", "false, but the method is dora", "remove it, or write `type: lora`"
    if method is MethodType.ADAPTER and spec.method.lora is not None:
        given = [name for name in type(spec.method.lora).model_fields if getattr(spec.method.lora, name) is not None]
        for name in given:
            if name != "plus_ratio":
                yield (
                    f"method.lora.{type(spec.method.lora).model_fields[name].alias or name}",
                    "the adapter that is continued has its own, and only plusRatio is read beside it",
                    "remove it, or write `type: lora` for a new adapter",
                )


@rule(
    "LoraOnHead",
    cel="!has(self.method) || !has(self.method.lora) || !has(self.method.lora.targetModules) || !self.method.lora.targetModules.exists(m, m == 'lm_head' || m == 'embed_out')",
    message="method.lora.targetModules must not name the head (lm_head): put it into method.lora.modulesToSave",
)
def lora_on_head(spec: FineTuneJobSpec, where: Where) -> Found:
    for module in (spec.method.lora and spec.method.lora.target_modules) or []:
        if module in HEADS:
            yield (
                "method.lora.targetModules",
                f"{module!r} is the head; a low-rank update of it is not saved and merged reliably",
                f"remove it, and to train the head write `modulesToSave: [{module}]`",
            )


@rule("LoraInitialisation")
def lora_initialisation(spec: FineTuneJobSpec, where: Where) -> Found:
    lora = spec.method.lora
    if lora is None:
        return
    if lora.loftq is not None and lora.init not in (None, LoraInit.LOFTQ):
        yield (
            "method.lora.init",
            f"{lora.init}, but method.lora.loftq is given, which implies `init: loftq`",
            "remove one of the two",
        )
    bits = spec.model.quantization.bits if spec.model.quantization else None
    if lora.init in BASE_CHANGING and (
        bits or lora.rank_stabilized or lora.use_dora or method_of(spec) is not MethodType.LORA
    ):
        yield (
            "method.lora.init",
            f"{lora.init} moves a part of the base into the adapter, which cannot be undone with a quantised base, DoRA or rsLoRA",
            "remove it, or write method lora without quantization, useDora and rankStabilized",
        )
    if lora.init is LoraInit.EVA and spec.dataset.packing:
        yield (
            "dataset.packing",
            "true, but `method.lora.init: eva` looks at rows one by one",
            "write `packing: false`, or another init",
        )
    if lora.init is LoraInit.EVA and trainer_of(spec) is not TrainerType.SFT:
        yield (
            "method.lora.init",
            f"eva looks at whole rows as sft has them, and the objective is {trainer_of(spec)}",
            "remove it, or write pissa",
        )
    if starts_with_loftq(spec):
        if bits == 8:
            yield (
                "model.quantization.bits",
                "8, but LoftQ makes up for what 4 bits lose",
                "remove model.quantization: the base is then quantised to 4 bits",
            )
        if lora.use_dora or method_of(spec) is MethodType.DORA:
            yield (
                "method.lora.init",
                "loftq, but DoRA takes its directions from the base before LoftQ sets the adapter",
                "write `method: {type: lora}` without useDora, or remove init",
            )


@rule("NewTokensUntrained")
def new_tokens(spec: FineTuneJobSpec, where: Where) -> Found:
    """Rows of new tokens must be trained by the method, and lie where they can be."""
    asked, method = spec.model.new_tokens or [], method_of(spec)
    if not asked:
        return
    path = "model.newTokens"
    twice = next((token for token in asked if asked.count(token) > 1), None)
    if twice is not None:
        yield path, f"{twice} stands twice", "name every token once"
    if method in (MethodType.IA3, *PROMPT_METHODS):
        yield (
            path,
            f"method {method} trains no embeddings, so new tokens would stay without meaning",
            "write method lora or full",
        )
    if method is MethodType.SPECTRUM and spec.model.quantization and spec.model.quantization.bits:
        yield (
            path,
            "spectrum on a quantised base freezes the embeddings, so new tokens would stay without meaning",
            "remove model.quantization, or write method qlora",
        )
    strategy, deepspeed = spec.distributed.strategy, spec.distributed.deepspeed
    if strategy is Strategy.FSDP and method in LORA_METHODS:
        yield (
            path,
            "an adapter trains single rows of the embeddings for them, which FSDP cannot shard",
            "write `distributed: {strategy: ddp}`, or method full",
        )
    if strategy is Strategy.DEEPSPEED and deepspeed and deepspeed.zero_stage == 3:
        yield (
            path,
            "the embeddings have to grow, and with ZeRO stage 3 no rank has them whole",
            "write zeroStage 2, or fsdp with method full",
        )


@rule("SpectrumLayers")
def spectrum_layers(spec: FineTuneJobSpec, where: Where) -> Found:
    spectrum = spec.method.spectrum
    if spectrum is None or spectrum.layers is None:
        return
    twice = sorted({layer for layer in spectrum.layers if spectrum.layers.count(layer) > 1})
    if twice:
        yield "method.spectrum.layers", f"{', '.join(map(str, twice))} stands more than once", "name every layer once"
    for name in ("snr_threshold", "metric"):
        if getattr(spectrum, name) is not None:
            wire = type(spectrum).model_fields[name].alias or name
            yield (
                f"method.spectrum.{wire}",
                "it steers the scan, and with `layers` given there is none",
                "remove one of the two",
            )


@rule("PromptTuning")
def prompt_tuning(spec: FineTuneJobSpec, where: Where) -> Found:
    method = method_of(spec)
    checkpointing = spec.training.gradient_checkpointing
    if method is MethodType.PREFIX_TUNING and checkpointing not in (None, GradientCheckpointing.DISABLED):
        yield (
            "training.gradientCheckpointing",
            f"{checkpointing}, but prefix tuning feeds its prefix as a key-value cache, which recomputation drops",
            "write `gradientCheckpointing: disabled`",
        )
    if method in PROMPT_METHODS and spec.dataset.packing:
        yield (
            "dataset.packing",
            f"true, but {method} puts its virtual tokens before the first document only",
            "write `packing: false`",
        )


# --- objectives -----------------------------------------------------------------------------------------------------

_FORMATS: dict[TrainerType, tuple[DatasetFormat, ...]] = {
    TrainerType.DPO: (DatasetFormat.PREFERENCE,),
    TrainerType.ORPO: (DatasetFormat.PREFERENCE,),
    TrainerType.REWARD: (DatasetFormat.PREFERENCE,),
    TrainerType.KTO: (DatasetFormat.UNPAIRED_PREFERENCE,),
}
_NOT_SFT = (DatasetFormat.PREFERENCE, DatasetFormat.UNPAIRED_PREFERENCE, DatasetFormat.PROMPT_ONLY)


@rule("FormatOfAnotherObjective")
def format_of_objective(spec: FineTuneJobSpec, where: Where) -> Found:
    trainer = trainer_of(spec)
    given = [("dataset.format", spec.dataset.format)] + [
        (f"dataset.mixture[{i}].format", item.format) for i, item in enumerate(spec.dataset.mixture or [])
    ]
    for path, form in given:
        if form is None:
            continue
        wanted = _FORMATS.get(trainer)
        if wanted and form not in wanted:
            yield (
                path,
                f"{form}, but trainer {trainer} learns from {wanted[0]} rows",
                f"write `format: {wanted[0]}`, or change trainer.type",
            )
        if trainer is TrainerType.SFT and form in _NOT_SFT:
            other = {
                DatasetFormat.PREFERENCE: "dpo",
                DatasetFormat.UNPAIRED_PREFERENCE: "kto",
                DatasetFormat.PROMPT_ONLY: "grpo",
            }[form]
            yield (
                path,
                f"{form}, which holds no single answer that sft could learn",
                f"write `trainer: {{type: {other}}}`, or use another format",
            )
        if trainer is TrainerType.GRPO and form in (
            DatasetFormat.PREFERENCE,
            DatasetFormat.UNPAIRED_PREFERENCE,
            DatasetFormat.PLAIN_TEXT,
            DatasetFormat.CUSTOM,
        ):
            yield path, f"{form}, but grpo needs prompts", "write `format: promptOnly`, or a format with a question"


@rule(
    "RewardsMissing",
    cel="!(has(self.trainer) && has(self.trainer.type) && self.trainer.type == 'grpo') || has(self.trainer.rewards)",
    message="trainer.type grpo needs at least one reward: write trainer.rewards",
)
def rewards_missing(spec: FineTuneJobSpec, where: Where) -> Found:
    if trainer_of(spec) is TrainerType.GRPO and not spec.trainer.rewards:
        yield (
            "trainer.rewards",
            "grpo maximises rewards, and none is given",
            "write for example `rewards: [{builtin: regex, parameters: {pattern: '^Answer: '}}]`",
        )


@rule("RewardIncomplete")
def rewards(spec: FineTuneJobSpec, where: Where) -> Found:
    for i, reward in enumerate(spec.trainer.rewards or []):
        path = f"trainer.rewards[{i}]"
        if (reward.builtin is None) == (reward.config_map_ref is None):
            yield (
                path,
                "a reward is either built in or a function from a ConfigMap",
                "write exactly one of `builtin` and `configMapRef`",
            )
        if reward.function is not None and reward.config_map_ref is None:
            yield (
                f"{path}.function",
                "it names a function of a ConfigMap's file, and no configMapRef is given",
                "add configMapRef, or remove it",
            )
        if reward.parameters and reward.config_map_ref is not None:
            yield (
                f"{path}.parameters",
                "they are only read by built-in rewards, and this one is a function from a ConfigMap",
                "remove them, and write the values into the function",
            )
        elif reward.builtin is not None:
            yield from unfit_parameters(f"{path}.parameters", reward.builtin, reward.parameters or {})
    names = [
        one.name or (one.builtin and one.builtin.value) or one.function or "reward"
        for one in spec.trainer.rewards or []
    ]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield (
                f"trainer.rewards[{i}].name",
                f"two rewards are called {name!r}, and metrics are kept by name",
                "give each its own `name`",
            )


@rule("OptionOfAnotherObjective")
def options_of_another_objective(spec: FineTuneJobSpec, where: Where) -> Found:
    trainer = trainer_of(spec)
    if spec.trainer.dpo is not None and trainer not in (TrainerType.DPO, TrainerType.KTO, TrainerType.ORPO):
        yield (
            "trainer.dpo",
            f"it is only read with dpo, kto and orpo, and the objective is {trainer}",
            "remove it, or change trainer.type",
        )
    if spec.trainer.grpo is not None and trainer is not TrainerType.GRPO:
        yield (
            "trainer.grpo",
            f"it is only read with grpo, and the objective is {trainer}",
            "remove it, or write `type: grpo`",
        )
    if spec.trainer.rewards and trainer is not TrainerType.GRPO:
        yield (
            "trainer.rewards",
            f"rewards are only read with grpo, and the objective is {trainer}",
            "remove them, or write `type: grpo`",
        )
    if spec.trainer.max_completion_length is not None and trainer not in (
        TrainerType.DPO,
        TrainerType.GRPO,
        TrainerType.KTO,
        TrainerType.ORPO,
    ):
        yield (
            "trainer.maxCompletionLength",
            f"it is only read with dpo, kto, orpo and grpo, and the objective is {trainer}",
            "remove it; dataset.maxSequenceLength limits rows",
        )
    if spec.dataset.packing and trainer is not TrainerType.SFT:
        yield "dataset.packing", f"true, but rows of {trainer} cannot share a sequence", "write `packing: false`"
    if spec.training.neftune_noise_alpha is not None and trainer is not TrainerType.SFT:
        yield "training.neftuneNoiseAlpha", f"it is only read with sft, and the objective is {trainer}", "remove it"
    if spec.training.group_by_length and trainer is not TrainerType.SFT:
        yield (
            "training.groupByLength",
            f"it orders the rows of sft only, and the objective is {trainer}",
            "remove it",
        )
    if trainer is TrainerType.REWARD and spec.method.lora is not None and spec.method.lora.task_type is not None:
        yield (
            "method.lora.taskType",
            f"{spec.method.lora.task_type}, but a reward model gives a score and writes no text",
            "remove it",
        )
    dpo = spec.trainer.dpo
    for field, readers in _DPO_READERS.items():
        if (
            dpo is not None
            and getattr(dpo, field)
            and trainer in (TrainerType.KTO, TrainerType.ORPO)
            and trainer not in readers
        ):
            yield (
                f"trainer.dpo.{type(dpo).model_fields[field].alias or field}",
                f"it is only read with {' and '.join(readers)}, and the objective is {trainer}",
                "remove it",
            )


_DPO_READERS: dict[str, tuple[TrainerType, ...]] = {
    "loss_types": (TrainerType.DPO,),
    "label_smoothing": (TrainerType.DPO,),
    "reference_model": (TrainerType.DPO, TrainerType.KTO),
}
SMOOTHED = (DpoLoss.ROBUST, DpoLoss.EXO_PAIR)
"""Losses that read the label smoothing."""


@rule("DpoLosses")
def dpo_losses(spec: FineTuneJobSpec, where: Where) -> Found:
    dpo = spec.trainer.dpo
    if dpo is None or trainer_of(spec) is not TrainerType.DPO:
        return
    losses = dpo.loss_types or [DpoLoss.SIGMOID]
    twice = next((loss for loss in losses if losses.count(loss) > 1), None)
    if twice is not None:
        yield "trainer.dpo.lossTypes", f"it names {twice} twice", "name every loss once"
    if dpo.label_smoothing and not any(loss in SMOOTHED for loss in losses):
        yield (
            "trainer.dpo.labelSmoothing",
            f"it is {dpo.label_smoothing:g}, and {', '.join(losses)} do not read it",
            "write `lossTypes: [robust]`, the loss for pairs that may be labelled the wrong way round, or remove it",
        )
    if not dpo.label_smoothing and DpoLoss.EXO_PAIR in losses:
        yield (
            "trainer.dpo.labelSmoothing",
            "loss exoPair takes the logarithm of it, and it is 0",
            "write `labelSmoothing: 0.001`",
        )


@rule("BatchTooSmall")
def kto_batch(spec: FineTuneJobSpec, where: Where) -> Found:
    if trainer_of(spec) is TrainerType.KTO and int(given_or_default(spec.training, "batch_size_per_device")) < 2:
        yield (
            "training.batchSizePerDevice",
            "it is 1, and kto compares the rows of one batch with each other",
            "write 2 or more",
        )


@rule("ObjectiveAndMethod")
def objective_and_method(spec: FineTuneJobSpec, where: Where) -> Found:
    if trainer_of(spec) is TrainerType.ORPO and method_of(spec) is MethodType.PROMPT_TUNING:
        yield (
            "method.type",
            "orpo compares every place of the output with the row, and promptTuning puts virtual tokens before it",
            "write method prefixTuning or lora, or trainer.type dpo",
        )


@rule("GenerationsDoNotDivide")
def generations(spec: FineTuneJobSpec, where: Where) -> Found:
    if trainer_of(spec) is not TrainerType.GRPO:
        return
    wanted = int(given_or_default(spec.trainer.grpo, "num_generations")) if spec.trainer.grpo else 8
    rows = (
        int(given_or_default(spec.training, "batch_size_per_device"))
        * int(given_or_default(spec.training, "gradient_accumulation_steps"))
        * world_size(spec)
    )
    if rows % wanted:
        yield (
            "trainer.grpo.numGenerations",
            f"{wanted} does not divide the {rows} completions of one optimizer step (batchSizePerDevice x gradientAccumulationSteps x ranks)",
            "change one of them so that it does",
        )
    batch = (
        spec.evaluation.batch_size_per_device or int(given_or_default(spec.training, "batch_size_per_device"))
    ) * world_size(spec)
    looks = evaluates(spec) or has_test(spec)
    if looks and not any(batch % size == 0 for size in range(2, wanted + 1)):
        yield (
            "evaluation.batchSizePerDevice",
            f"{batch} answers of all ranks together hold no whole group of at least two",
            "write an even number",
        )


# --- data -----------------------------------------------------------------------------------------------------------


@rule("SplitRatios")
def split_ratios(spec: FineTuneJobSpec, where: Where) -> Found:
    split = spec.dataset.split
    if split is None:
        return
    parts = {name: getattr(split, name) for name in ("train", "validation", "test") if getattr(split, name) is not None}
    total = sum(parts.values())
    text = " + ".join(f"{name} {value:g}" for name, value in parts.items())
    if split.train is not None and not math.isclose(total, 1.0, abs_tol=1e-6):
        yield (
            "dataset.split",
            f"{text} = {total:g}, and the parts must sum to 1",
            "change one of them, or leave train out: it takes the rest",
        )
    elif split.train is None and total >= 1:
        yield "dataset.split", f"{text} = {total:g} leaves nothing for training", "make them smaller"
    for name in ("validation", "test"):
        if parts.get(name) and getattr(spec.dataset, name) is not None:
            yield (
                f"dataset.split.{name}",
                f"{parts[name]:g}, but dataset.{name} names its own data",
                "remove one of the two",
            )


@rule("DataOptionWithoutEffect")
def data_options(spec: FineTuneJobSpec, where: Where) -> Found:
    dataset = spec.dataset
    if dataset.max_bad_row_ratio is not None and given_or_default(dataset, "bad_rows") != "skip":
        yield "dataset.maxBadRowRatio", "it is only read with `badRows: skip`", "add that, or remove it"
    if dataset.template is not None and dataset.format is not DatasetFormat.CUSTOM:
        yield "dataset.template", "it is only read with `format: custom`", "add that, or remove it"
    if dataset.format is DatasetFormat.CUSTOM and dataset.template is None:
        yield (
            "dataset.template",
            "format custom renders rows with a template, and none is given",
            "write for example `template: 'Q: {q}\\nA: {a}'`",
        )
    if dataset.mcq is not None and dataset.format not in (None, DatasetFormat.MCQ):
        yield "dataset.mcq", f"it is only read with format mcq, and the format is {dataset.format}", "remove it"
    if dataset.chat_template is not None:
        if (dataset.chat_template.text is None) == (dataset.chat_template.config_map_ref is None):
            yield (
                "dataset.chatTemplate",
                "a chat template is either text or from a ConfigMap",
                "write exactly one of `text` and `configMapRef`",
            )
        if dataset.use_chat_template is False:
            yield "dataset.chatTemplate", "it has no effect with `useChatTemplate: false`", "remove one of the two"
    only = dataset.response_only
    if only is not None and (only.question_marker or only.answer_marker):
        if only.enabled is False:
            yield (
                "dataset.responseOnly",
                "the markers have no effect with `enabled: false`",
                "remove them, or enable it",
            )
        if not (only.question_marker and only.answer_marker):
            yield (
                "dataset.responseOnly",
                "one marker alone does not tell where an answer ends",
                "give both questionMarker and answerMarker, or neither: the chat template's own turns are then used",
            )


@rule("ResponseOnlyWithoutTurns")
def response_only(spec: FineTuneJobSpec, where: Where) -> Found:
    only, form = spec.dataset.response_only, spec.dataset.format
    without = form in (DatasetFormat.PLAIN_TEXT, DatasetFormat.CUSTOM)
    if only is not None and only.enabled and without and not (only.question_marker or only.answer_marker):
        yield (
            "dataset.responseOnly.enabled",
            f"true, but format {form} has no turns to tell an answer by",
            "give questionMarker and answerMarker, or remove it",
        )


# --- training -------------------------------------------------------------------------------------------------------


@rule("WarmupTwice")
def warmup_twice(spec: FineTuneJobSpec, where: Where) -> Found:
    if spec.training.warmup_steps is not None and spec.training.warmup_ratio is not None:
        yield (
            "training.warmupRatio",
            f"warmupSteps {spec.training.warmup_steps} and warmupRatio {spec.training.warmup_ratio:g} exclude each other",
            "remove one of them",
        )


OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad", "adamw_8bit", "adamw_bnb_8bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "adamw_torch_4bit", "adamw_torch_8bit",
    "schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam",
)  # fmt: skip
"""Optimizer names accepted; the trainer's tests hold them against transformers' own list."""


@rule("OptimizerUnknown")
def optimizer_unknown(spec: FineTuneJobSpec, where: Where) -> Found:
    import difflib

    name = spec.training.optimizer
    if name is not None and name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, 1)
        yield (
            "training.optimizer",
            f"{name!r} is not an optimizer known here",
            f"did you mean {near[0]}?" if near else f"write one of {', '.join(OPTIMIZERS[:8])}, ...",
        )


@rule("PrecisionOnCpu")
def precision_on_cpu(spec: FineTuneJobSpec, where: Where) -> Found:
    cpu = spec.training.device is Device.CPU or gpus_per_node(spec) == 0
    if not cpu or (where is Where.LOCAL and spec.training.device in (None, Device.AUTO)):
        return
    if spec.training.mixed_precision is MixedPrecision.FP16:
        yield "training.mixedPrecision", "fp16, but a CPU has no loss scaling for it", "write auto, no or bf16"
    if spec.model.liger_kernels:
        yield (
            "model.ligerKernels",
            "true, but the kernels only exist for GPUs, and the job runs on CPU",
            "remove it, or ask for GPUs",
        )
    if spec.training.gradient_checkpointing is GradientCheckpointing.UNSLOTH:
        yield (
            "training.gradientCheckpointing",
            "unsloth moves activations from GPU to host memory, and the job runs on CPU",
            "write enabled or disabled",
        )


@rule("DeviceOfAnotherMachine")
def device(spec: FineTuneJobSpec, where: Where) -> Found:
    wanted = spec.training.device
    if where is Where.LOCAL:
        return
    if wanted is Device.MPS:
        yield (
            "training.device",
            "mps only exists on Apple machines, not on cluster nodes",
            "remove it, or use `finetune run --local`",
        )
    if wanted is Device.CPU and gpus_per_node(spec) > 0:
        yield (
            "training.device",
            f"cpu, but resources.gpusPerNode is {gpus_per_node(spec)}: the GPUs would be idle",
            "write `resources: {gpusPerNode: 0}`",
        )
    if wanted is Device.CUDA and gpus_per_node(spec) == 0:
        yield "training.device", "cuda, but resources.gpusPerNode is 0", "write gpusPerNode 1 or more, or `device: cpu`"


@rule(
    "BestNeedsMatchingSteps",
    cel="!(has(self.checkpoint) && has(self.checkpoint.loadBestAtEnd) && self.checkpoint.loadBestAtEnd && has(self.checkpoint.steps) && has(self.evaluation) && has(self.evaluation.steps)) || self.checkpoint.steps % self.evaluation.steps == 0",
    message="with checkpoint.loadBestAtEnd, checkpoint.steps must be a multiple of evaluation.steps: only an evaluated checkpoint can be the best",
)
def best_checkpoint(spec: FineTuneJobSpec, where: Where) -> Found:
    if not spec.checkpoint.load_best_at_end:
        return
    if not evaluates(spec):
        yield (
            "checkpoint.loadBestAtEnd",
            "true, but no validation loss is measured, so no checkpoint is the best",
            "add dataset.validation or dataset.split.validation, or remove it",
        )
        return
    saves, looks = given_or_default(spec.checkpoint, "strategy"), spec.evaluation.strategy or When.STEPS
    if saves == When.NO or saves != looks:
        yield (
            "checkpoint.strategy",
            f"{saves}, but evaluation.strategy is {looks}: with loadBestAtEnd both must be the same",
            f"write `checkpoint: {{strategy: {looks}}}`",
        )
    every = int(given_or_default(spec.checkpoint, "steps"))
    evaluated = spec.evaluation.steps or every
    if saves == When.STEPS and looks is When.STEPS and every % evaluated:
        yield (
            "checkpoint.steps",
            f"{every} is not a multiple of evaluation.steps {evaluated}, and only an evaluated checkpoint can be the best",
            f"write for example {math.ceil(every / evaluated) * evaluated}",
        )


@rule("StepsWithoutEffect")
def steps_without_effect(spec: FineTuneJobSpec, where: Where) -> Found:
    saves = given_or_default(spec.checkpoint, "strategy")
    if spec.checkpoint.steps is not None and saves != When.STEPS:
        yield (
            "checkpoint.steps",
            f"it is only read with strategy steps, and the strategy is {saves}",
            "remove one of the two",
        )
    if spec.evaluation.steps is not None and spec.evaluation.strategy in (When.EPOCH, When.NO):
        yield (
            "evaluation.steps",
            f"it is only read with strategy steps, and the strategy is {spec.evaluation.strategy}",
            "remove one of the two",
        )
    if (
        spec.training.checkpoint_every_n_layers not in (None, 1)
        and spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED
    ):
        yield (
            "training.checkpointEveryNLayers",
            "it has no effect with `gradientCheckpointing: disabled`",
            "remove one of the two",
        )


@rule("ValidationMissing")
def validation_missing(spec: FineTuneJobSpec, where: Where) -> Found:
    hint = "add dataset.validation or dataset.split.validation, or remove it"
    if has_validation(spec):
        if spec.training.early_stopping is not None and not evaluates(spec):
            yield (
                "training.earlyStopping",
                "it watches the validation loss, and evaluation.strategy is no",
                "write `evaluation: {strategy: steps}`, or remove it",
            )
        return
    if spec.evaluation.strategy not in (None, When.NO):
        yield "evaluation.strategy", f"{spec.evaluation.strategy}, but there is no validation data", hint
    if spec.evaluation.steps is not None and spec.evaluation.strategy is None:
        yield "evaluation.steps", "given, but there is no validation data", hint
    if spec.training.early_stopping is not None:
        yield "training.earlyStopping", "it watches the validation loss, but there is no validation data", hint


# --- ranks and strategies -------------------------------------------------------------------------------------------


@rule("RanksAndGpus")
def ranks_and_gpus(spec: FineTuneJobSpec, where: Where) -> Found:
    gpus, ranks = gpus_per_node(spec), spec.resources.processes_per_node
    if where is Where.CLUSTER and gpus > 0 and ranks not in (None, gpus):
        yield (
            "resources.processesPerNode",
            f"{ranks}, but resources.gpusPerNode is {gpus}: every rank needs a GPU of its own, and a GPU without a rank is idle",
            f"write {gpus}, or remove it",
        )


@rule("StrategyAndRanks")
def strategy_and_ranks(spec: FineTuneJobSpec, where: Where) -> Found:
    strategy, ranks = spec.distributed.strategy, world_size(spec)
    if strategy is Strategy.NONE and ranks > 1:
        yield (
            "distributed.strategy",
            f"none, but there are {ranks} ranks, which would each train a model of its own",
            "write ddp, fsdp or deepspeed, or remove it",
        )
    if strategy is Strategy.FSDP and ranks == 1:
        yield (
            "distributed.strategy",
            "fsdp, but there is one rank, and nothing can be sharded over one",
            "ask for more in resources (gpusPerNode, nodes), or remove it",
        )
    if spec.distributed.deepspeed is not None and strategy is not Strategy.DEEPSPEED:
        yield (
            "distributed.deepspeed",
            f"it is only read with strategy deepspeed, and the strategy is {strategy or 'not given'}",
            "write `strategy: deepspeed`, or remove it",
        )
    if spec.distributed.fsdp is not None and strategy is not Strategy.FSDP:
        yield (
            "distributed.fsdp",
            f"it is only read with strategy fsdp, and the strategy is {strategy or 'not given'}",
            "write `strategy: fsdp`, or remove it",
        )
    deepspeed = spec.distributed.deepspeed
    if deepspeed is not None and deepspeed.offload_parameters and deepspeed.zero_stage not in (None, 3):
        yield (
            "distributed.deepspeed.offloadParameters",
            f"true, but zeroStage is {deepspeed.zero_stage}: only stage 3 shards parameters",
            "write `zeroStage: 3`, or remove it",
        )
    if deepspeed is not None and deepspeed.offload_optimizer and deepspeed.zero_stage == 0:
        yield (
            "distributed.deepspeed.offloadOptimizer",
            "true, but with zeroStage 0 DeepSpeed does not own the optimizer's state",
            "write `zeroStage: 1` or more, or remove it",
        )


def unfit_for_fsdp(spec: FineTuneJobSpec) -> Found:
    """What FSDP cannot train."""
    method, bits = method_of(spec), base_bits(spec)
    if method in PROMPT_METHODS:
        yield (
            "method.type",
            f"method {method} looks its virtual tokens up outside the layers that FSDP gathers",
            "write `distributed: {strategy: ddp}`: so few parameters are trained that nothing is gained by sharding them",
        )
    if method is MethodType.SPECTRUM and bits:
        yield (
            "model.quantization.bits",
            "spectrum trains whole weights between quantised ones, and FSDP gathers those of a layer in one number type",
            "write `distributed: {strategy: ddp}`, or do not quantise: FSDP shards the whole weights too",
        )
    if bits == 8:
        yield (
            "model.quantization.bits",
            "model.quantization.bits is 8, and 8-bit weights cannot be sharded",
            "write bits 4, or `distributed: {strategy: ddp}`",
        )


def unfit_for_zero3(spec: FineTuneJobSpec) -> Found:
    """What reads or rewrites whole weights, which no rank has with ZeRO stage 3."""
    method, lora = method_of(spec), spec.method.lora
    hint = "write zeroStage 2, or use fsdp"
    if base_bits(spec):
        yield (
            "distributed.deepspeed.zeroStage",
            "ZeRO stage 3 cannot shard a quantised base",
            "write zeroStage 2, or do not quantise",
        )
    if method is MethodType.SPECTRUM:
        yield "method.type", "spectrum measures whole weight matrices, which no rank has with ZeRO stage 3", hint
    if method in PROMPT_METHODS:
        yield (
            "method.type",
            f"{method} looks its virtual tokens up outside the layers that ZeRO stage 3 gathers",
            "write zeroStage 2, or `distributed: {strategy: ddp}`",
        )
    if method is MethodType.IA3 and trainer_of(spec) is TrainerType.KTO:
        yield (
            "method.type",
            "ZeRO stage 3 fetches parameters in the order of the step before, and kto does not use those of ia3 in one order",
            "write zeroStage 2, or method lora",
        )
    if lora is not None and lora.init in NEEDS_WHOLE_WEIGHTS:
        yield (
            "method.lora.init",
            f"method.lora.init {lora.init} factorises whole weights, which no rank has with ZeRO stage 3",
            hint,
        )


@rule("StrategyAndMethod")
def strategy_and_method(spec: FineTuneJobSpec, where: Where) -> Found:
    deepspeed = spec.distributed.deepspeed
    if spec.distributed.strategy is Strategy.FSDP:
        yield from unfit_for_fsdp(spec)
    if spec.distributed.strategy is Strategy.DEEPSPEED and deepspeed is not None and deepspeed.zero_stage == 3:
        yield from unfit_for_zero3(spec)


@rule("StateDictUnavailable")
def state_dict(spec: FineTuneJobSpec, where: Where) -> Found:
    fsdp = spec.distributed.fsdp
    if fsdp is not None and fsdp.state_dict is FsdpStateDict.LOCAL:
        yield (
            "distributed.fsdp.stateDict",
            "it is local, which FSDP version 2 does not have",
            "write sharded, which is also one file a rank, or full",
        )


@rule(
    "BackendAndStrategy",
    cel="!(has(self.trainer) && has(self.trainer.backend) && self.trainer.backend == 'unsloth') || !has(self.distributed) || !has(self.distributed.strategy) || self.distributed.strategy == 'none'",
    message="trainer.backend unsloth is the single-GPU path: remove distributed.strategy, or write backend transformers",
)
def backend_and_strategy(spec: FineTuneJobSpec, where: Where) -> Found:
    if spec.trainer.backend is not Backend.UNSLOTH:
        return
    if spec.distributed.strategy not in (None, Strategy.NONE):
        yield (
            "trainer.backend",
            f"unsloth is the single-GPU path, and distributed.strategy is {spec.distributed.strategy}",
            "write `backend: transformers`, or remove the strategy",
        )
    elif world_size(spec) > 1:
        yield (
            "trainer.backend",
            f"unsloth is the single-GPU path, and resources ask for {world_size(spec)} ranks",
            "write `backend: transformers`, or ask for one GPU",
        )


# --- output and trackers --------------------------------------------------------------------------------------------


@rule(
    "HubRepositoryMissing",
    cel="!(has(self.output) && has(self.output.hub) && has(self.output.hub.push) && self.output.hub.push) || has(self.output.hub.repository)",
    message="output.hub.push needs output.hub.repository",
)
def hub_push(spec: FineTuneJobSpec, where: Where) -> Found:
    hub = spec.output.hub
    if hub is None:
        return
    if not hub.push:
        if hub.repository is not None or hub.private is not None:
            yield (
                "output.hub",
                "nothing is pushed without `push: true`, so its fields have no effect",
                "write `push: true`, or remove output.hub",
            )
        return
    if hub.repository is None:
        yield (
            "output.hub.repository",
            "push is true, and no repository is named",
            "write for example `repository: org/my-model`",
        )
    if hub.token_secret_ref is None and spec.model.token_secret_ref is None:
        yield (
            "output.hub.tokenSecretRef",
            "push is true, and there is no token that may write",
            "write `tokenSecretRef: {name: hub, key: token}`, here or in model",
        )


@rule("OutputOptionWithoutEffect")
def output_options(spec: FineTuneJobSpec, where: Where) -> Found:
    if spec.output.layout is not None and spec.output.dir is None:
        yield (
            "output.layout",
            f"{spec.output.layout} describes the tree below output.dir, and that is not given",
            "write output.dir, or remove it",
        )
    if spec.output.merge_adapter and method_of(spec) in (MethodType.FULL, MethodType.SPECTRUM):
        yield (
            "output.mergeAdapter",
            f"true, but method {method_of(spec)} makes no adapter",
            "remove it: the output is a whole model",
        )
    if spec.output.merge_adapter and method_of(spec) in PROMPT_METHODS:
        yield (
            "output.mergeAdapter",
            f"true, but {method_of(spec)} adds virtual tokens, which cannot be merged into weights",
            "remove it",
        )


@rule("TrackerAndOptions")
def trackers(spec: FineTuneJobSpec, where: Where) -> Found:
    named = spec.tracking.report_to or []
    for tracker, group in (
        (Tracker.WANDB, spec.tracking.wandb),
        (Tracker.MLFLOW, spec.tracking.mlflow),
        (Tracker.MONGODB, spec.tracking.mongodb),
    ):
        if group is not None and tracker not in named:
            yield (
                f"tracking.{tracker}",
                f"it is only read when tracking.reportTo names {tracker}",
                f"write `reportTo: [{tracker}]`, or remove it",
            )
    if (
        Tracker.WANDB in named
        and (spec.tracking.wandb is None or spec.tracking.wandb.api_key_secret_ref is None)
        and where is Where.CLUSTER
    ):
        yield (
            "tracking.wandb.apiKeySecretRef",
            "reportTo names wandb, and there is no key",
            "write `wandb: {apiKeySecretRef: {name: wandb, key: apiKey}}`",
        )
    if Tracker.MLFLOW in named and (spec.tracking.mlflow is None or spec.tracking.mlflow.tracking_uri is None):
        yield (
            "tracking.mlflow.trackingUri",
            "reportTo names mlflow, and no server is named",
            "write for example `mlflow: {trackingUri: 'http://mlflow.mlops:5000'}`",
        )
    if Tracker.MONGODB in named and (spec.tracking.mongodb is None or spec.tracking.mongodb.uri_secret_ref is None):
        yield (
            "tracking.mongodb.uriSecretRef",
            "reportTo names mongodb, and no connection is named",
            "write `mongodb: {uriSecretRef: {name: mongo, key: uri}}`",
        )
    for i, one in enumerate(named):
        if one in named[:i]:
            yield f"tracking.reportTo[{i}]", f"{one} stands twice", "name it once"


@rule("JudgeMissing")
def judge(spec: FineTuneJobSpec, where: Where) -> Found:
    group = spec.evaluation.judge
    if group is not None and group.model is None and (group.input_price is not None or group.output_price is not None):
        yield (
            "evaluation.judge.model",
            "prices are given, and no judge that would cost them",
            "name a model, or remove the prices",
        )


# --- storage --------------------------------------------------------------------------------------------------------


@rule("EncryptionContradiction")
def encryption(spec: FineTuneJobSpec, where: Where) -> Found:
    """What the API server checks inside the group, and whether there is anything to encrypt."""
    connections = {
        "storage": spec.storage,
        "model.storage": spec.model.storage,
        "dataset.storage": spec.dataset.storage,
    }
    for path, connection in connections.items():
        asked = connection.encryption if connection else None
        if connection is None or asked is None:
            continue
        if asked.kms_key_id is not None and asked.type is not EncryptionType.KMS:
            yield (
                f"{path}.encryption.kmsKeyId",
                f"a key of the key service, but type is {asked.type}",
                "write `type: kms`, or remove kmsKeyId",
            )
        if (asked.customer_key_secret_ref is not None) != (asked.type is EncryptionType.CUSTOMER_KEY):
            yield (
                f"{path}.encryption.customerKeySecretRef",
                f"type is {asked.type}, and a Secret with the key is {'given' if asked.customer_key_secret_ref else 'missing'}",
                "write `{type: customerKey, customerKeySecretRef: {name: s3-customer-key, key: key}}`, or another type without it",
            )
        if asked.type is EncryptionType.CUSTOMER_KEY and (connection.endpoint or "").startswith("http://"):
            yield (
                f"{path}.endpoint",
                f"{connection.endpoint} is not encrypted, and a customer's key is sent with every request",
                "write https://, or another encryption.type",
            )
    if spec.storage.encryption is not None and (spec.storage.uri or "s3://").partition("://")[0] != "s3":
        yield (
            "storage.encryption",
            f"storage.uri is {spec.storage.uri}, and only an S3 store encrypts on request",
            "remove it, or write s3:// in storage.uri",
        )


# --- placement ------------------------------------------------------------------------------------------------------


@rule("EnvironmentReserved")
def environment(spec: FineTuneJobSpec, where: Where) -> Found:
    ours = {member.value for member in Env}
    for i, variable in enumerate(spec.placement.env or []):
        if variable.name in ours or variable.name.startswith("FINETUNE_"):
            yield (
                f"placement.env[{i}].name",
                f"{variable.name} is set by the operator",
                "remove it; credentials belong into storage.credentialsSecretRef and model.tokenSecretRef",
            )


def paths(problems: Iterable[Problem]) -> list[str]:
    """Field paths of some problems, in order."""
    return [problem.path for problem in problems]
