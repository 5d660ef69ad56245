"""Writes the model card `README.md`: metadata for the hub, and how the model was trained.

The card shows only those fields of the spec that `SHOWN_FIELDS` lists. Sources are shown without secrets, and every value is escaped, so that no text
of a user can change the structure of the card.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from finetune_api.errors import ConfigError
from finetune_api.names import Env, Storage
from finetune_api.pod import RunConfig
from finetune_api.rules import is_vision_language, method_type_of, trainer_type_of
from finetune_api.sources import HubSource, parse_source, redact_source
from finetune_api.spec.enums import OutputKind, TrainerType

from finetune_trainer.inputs import Inputs

CARD_FILE = "README.md"
METADATA_FENCE = "---\n"
LICENSE_KEYS = ("license", "license_name", "license_link", "language")
"""Keys of the base model's metadata that are copied to the card, because they are also correct for the trained model."""
SHOWN_FIELDS = (
    "method.type", "method.promptLength", "method.lora.rank", "method.lora.alpha", "method.lora.dropout", "method.lora.targetModules",
    "method.lora.modulesToSave", "method.lora.useDora", "method.lora.rankStabilized", "method.lora.init", "model.quantization.bits", "model.newTokens",
    "trainer.type", "training.learningRate", "training.scheduler", "training.warmupRatio", "training.warmupSteps", "training.optimizer",
    "training.weightDecay", "training.maxGradNorm", "training.epochs", "training.maxSteps", "training.batchSizePerDevice",
    "training.gradientAccumulationSteps", "training.mixedPrecision", "training.seed", "dataset.maxSequenceLength", "dataset.packing",
)  # fmt: skip
VISION_TASK = "image-text-to-text"
VISION_MODEL_CLASS = "transformers.AutoModelForImageTextToText"
"""The class that loads vision-language models and their adapters.

If a folder holds an adapter, the class loads the base model too. PEFT has no class of its own for adapters of vision-language models.
"""
MARKDOWN_SPECIAL_CHARACTERS = re.compile(r"([\\`*_{}\[\]<>|#!~$&])")
MAX_VALUE_LENGTH = 300
MERGED_SENTENCE = "The adapter is merged into the weights of the base model, so this folder is a complete model."


@dataclass(frozen=True)
class TrainingFacts:
    """The numbers of a training run that the card shows in addition to fields of the spec."""

    rows: int
    """Number of training rows."""
    data_format: str
    steps: int
    """Number of optimizer steps."""
    trainable_parameters: int
    total_parameters: int
    metrics: Mapping[str, float]
    """Measured values by name, such as `testLoss`."""


def build_model_card(run: RunConfig, inputs: Inputs, kind: OutputKind, facts: TrainingFacts) -> str:
    """Return the model card as a text: YAML metadata, then Markdown."""
    return f"{METADATA_FENCE}{_to_yaml(_build_card_metadata(run, inputs, kind))}{METADATA_FENCE}\n{_build_card_text(run, inputs, kind, facts)}"


def build_merged_card(adapter_card: str) -> str:
    """Return the card of the merged model. `adapter_card`: the adapter's card. An adapter's card without metadata is returned unchanged."""
    metadata, body = split_card(adapter_card)
    if not metadata:
        return adapter_card
    metadata |= {"library_name": "transformers", "base_model_relation": "finetune", "tags": [tag for tag in metadata.get("tags", []) if tag != "peft"]}
    if "base_model" not in metadata:
        del metadata["base_model_relation"]
    heading, _, card_text = body.lstrip("\n").partition("\n")
    model_class = VISION_MODEL_CLASS if metadata.get("pipeline_tag") == VISION_TASK else "transformers.AutoModelForCausalLM"
    card_text = re.sub(r"## Loading\n.*?(?=\n## )", _build_loading_section(OutputKind.MODEL, model_class), card_text, flags=re.DOTALL)
    return f"{METADATA_FENCE}{_to_yaml(metadata)}{METADATA_FENCE}\n{heading}\n\n{MERGED_SENTENCE}\n{card_text}"


def split_card(card_text: str) -> tuple[dict[str, Any], str]:
    """Split a card into its metadata and its Markdown. The metadata is empty if the card has no readable metadata."""
    _, fence, rest = card_text.partition(METADATA_FENCE) if card_text.startswith(METADATA_FENCE) else ("", "", card_text)
    header, closing_fence, body = rest.partition(f"\n{METADATA_FENCE}")
    if not fence or not closing_fence:
        return {}, card_text
    try:
        metadata = yaml.safe_load(header)
    except yaml.YAMLError:
        return {}, card_text
    return (metadata, body) if isinstance(metadata, dict) else ({}, card_text)


def _build_card_metadata(run: RunConfig, inputs: Inputs, kind: OutputKind) -> dict[str, Any]:
    """Return the metadata for the hub. The metadata names a base model or data set only if it is on the hub, because the hub refuses other names."""
    is_adapter, is_reward = kind is OutputKind.ADAPTER, trainer_type_of(run.spec) is TrainerType.REWARD
    task = "text-classification" if is_reward else VISION_TASK if is_vision_language(run.spec) else "text-generation"
    base_repository, data_repository = _find_hub_repository(run.spec.model.source), _find_hub_repository(run.spec.dataset.train)
    tags = ["finetune-operator", str(trainer_type_of(run.spec)), _read_wire_value(run, "method.type"), "peft" if is_adapter else None]
    metadata = {
        "base_model": base_repository, "base_model_relation": base_repository and ("adapter" if is_adapter else "finetune"),
        "library_name": "peft" if is_adapter else "transformers", "pipeline_tag": task,
        "tags": list(dict.fromkeys(tag for tag in tags if tag)), "datasets": [data_repository] if data_repository else None,
        **_read_license_of_base(inputs.model),
    }  # fmt: skip
    return {name: value for name, value in metadata.items() if value}


def _read_license_of_base(base: Path) -> dict[str, Any]:
    """Return licence and language of the base model, from the model's card or configuration."""
    card_file, config_file = base / CARD_FILE, base / "config.json"
    metadata = split_card(card_file.read_text(encoding="utf-8", errors="replace"))[0] if card_file.exists() else {}
    if "license" not in metadata and config_file.exists():
        metadata = {"license": json.loads(config_file.read_text()).get("license"), **metadata}
    return {key: metadata[key] for key in LICENSE_KEYS if isinstance(metadata.get(key), str | list)}


def _build_card_text(run: RunConfig, inputs: Inputs, kind: OutputKind, facts: TrainingFacts) -> str:
    job_uri, incarnation = redact_source(run.storage.uri), os.environ.get(Env.INCARNATION_FOLDER, "")
    relation_to_base = "Adapter for" if kind is OutputKind.ADAPTER else "Model trained from"
    model_class = "peft.AutoPeftModelForCausalLM" if kind is OutputKind.ADAPTER else "transformers.AutoModelForCausalLM"
    if is_vision_language(run.spec):
        model_class = VISION_MODEL_CLASS
    if trainer_type_of(run.spec) is TrainerType.REWARD:
        model_class = model_class.replace("CausalLM", "SequenceClassification")
    base_facts = {"source": redact_source(run.spec.model.source or ""), "revision": inputs.model_revision}
    data_facts = {
        "source": redact_source(run.spec.dataset.train or "several sources (dataset.mixture)"), "digest (sha256)": inputs.dataset_digest,
        "rows": facts.rows, "format": facts.data_format,
    }  # fmt: skip
    training_facts = {path: value for path in SHOWN_FIELDS if (value := _read_wire_value(run, path)) not in (None, [])}
    training_facts |= {"optimizer steps": facts.steps, "trained parameters": facts.trainable_parameters, "all parameters": facts.total_parameters}
    lineage_facts = {
        "FineTuneJob": f"{run.namespace}/{run.name}", "uid": run.uid, "attempt": run.attempt, "files of the job": job_uri,
        "this artefact": f"{job_uri}/{Storage.MODEL}/{incarnation}", "metrics": f"{job_uri}/{Storage.METRICS}",
        "spec of each attempt": f"{job_uri}/{Storage.RUN}",
    }  # fmt: skip
    card_sections = [
        f"# {escape_markdown(run.name)}\n\n{relation_to_base} {escape_markdown(base_facts['source'])}, "
        f"trained with {escape_markdown(str(method_type_of(run.spec)))} by a FineTuneJob.\n",
        _build_loading_section(kind, model_class), _build_table("Base model", base_facts), _build_table("Data", data_facts),
        _build_table("Training", training_facts),
        _build_table("Metrics", facts.metrics) if facts.metrics else "", _build_table("Lineage", lineage_facts),
    ]  # fmt: skip
    return "\n".join(section for section in card_sections if section)


def _build_loading_section(kind: OutputKind, model_class: str) -> str:
    module, _, name = model_class.rpartition(".")
    note = "`generation_config.json` contains the end tokens that the model learned in training."
    if kind is OutputKind.ADAPTER:
        note += " Pass the settings in this file to `generate`, because libraries otherwise use the settings of the base model."
    elif "Sequence" in name:
        note = "The model returns one score."
    return f'## Loading\n\n```python\nfrom {module} import {name}\n\nmodel = {name}.from_pretrained("this/folder")\n```\n\n{note}\n'


def _build_table(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"| {escape_markdown(name)} | {escape_markdown(_format_value(value))} |\n" for name, value in values.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}"


def escape_markdown(text: str) -> str:
    """Return the text in one line, cut to `MAX_VALUE_LENGTH` characters and escaped, so that Markdown shows its characters unchanged."""
    line = " ".join(text.split())
    return MARKDOWN_SPECIAL_CHARACTERS.sub(r"\\\1", line if len(line) <= MAX_VALUE_LENGTH else f"{line[:MAX_VALUE_LENGTH]}...")


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _read_wire_value(run: RunConfig, path: str) -> Any:
    value: Any = run.spec.to_wire()
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _find_hub_repository(source: str | None) -> str | None:
    try:
        parsed_source = parse_source(source or "")
    except ConfigError:
        return None
    return parsed_source.repo if isinstance(parsed_source, HubSource) else None


def _to_yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
