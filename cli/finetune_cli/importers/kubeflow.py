"""`kubeflow`: the importer for a TrainJob of Kubeflow whose runtime is torchtune or TRL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from finetune_cli.importers import torchtune, trl, trl_options
from finetune_cli.importers.converters import any_value, list_of, text, to_boolean, to_integer
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_keys
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, Row
from finetune_cli.importers.options import assign_default_gpus, group_rows, ignored, refused
from finetune_cli.provenance import ValueOrigin

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU_RESOURCES = re.compile(r"gpu|nvidia\.com/mig")
OWN_ROWS: tuple[Row, ...] = (
    Row("spec.trainer.numNodes", "resources.nodes", to_integer(1)),
    Row("spec.trainer.numProcPerNode", "resources.gpusPerNode", any_value, is_set_by_combine=True),
    Row("spec.trainer.resourcesPerNode", "resources", any_value, is_set_by_combine=True),
    Row("spec.trainer.args", convert=list_of(text), is_set_by_combine=True),
    Row("spec.trainer.command", convert=list_of(text), is_set_by_combine=True),
    Row("spec.trainer.env", "placement.env", any_value, is_set_by_combine=True),
    Row("spec.initializer.dataset.storageUri", "dataset.train", is_set_by_combine=True),
    Row("spec.initializer.model.storageUri", "model.source", is_set_by_combine=True),
    Row("spec.initializer.dataset.secretRef.name", "model.tokenSecretRef", is_set_by_combine=True),
    Row("spec.initializer.model.secretRef.name", "model.tokenSecretRef", is_set_by_combine=True),
    Row("spec.runtimeRef.name", is_set_by_combine=True),
    Row("spec.activeDeadlineSeconds", "policy.activeDeadlineSeconds", to_integer(1)),
    Row("spec.suspend", "suspend", to_boolean),
    Row("metadata", "placement.queueName", any_value, is_set_by_combine=True),
    *group_rows("spec spec.trainer spec.initializer spec.initializer.dataset spec.initializer.model spec.runtimeRef"),
    *ignored("the kind of the object", "apiVersion kind spec.runtimeRef.apiGroup spec.runtimeRef.kind status"),
    *ignored("the operator has its own image", "spec.trainer.image"),
    *ignored("the trainer downloads model and data itself", "spec.initializer.dataset.env spec.initializer.model.env"),
    *refused("a change of the pods that a runtime creates",
             "spec.runtimePatches spec.podTemplateOverrides spec.podSpecOverrides", "write spec.placement with --set"),
    *refused("another controller for the job", "spec.managedBy", "", "trainer.kubeflow.org/trainjob-controller"),
    *refused("labels and annotations for all pods", "spec.labels spec.annotations"),
)  # fmt: skip
OPAQUE_PATHS = frozenset({"metadata", "spec.trainer.resourcesPerNode", "spec.labels", "spec.annotations", "status"})
MODELS_OF_RUNTIMES = {
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
}
"""Models of Kubeflow's runtimes `torchtune-NAME`. Their data set is tatsu-lab/alpaca."""


def recognises_input(documents: tuple[InputDocument, ...], words: tuple[str, ...]) -> bool:
    """Return whether a document is a TrainJob."""
    return any(peek_keys(document).get("kind") == "TrainJob" for document in documents)


def runtime_of(documents: tuple[InputDocument, ...]) -> str:
    """Return `torchtune`, `trl`, or an empty text for other runtimes of a TrainJob."""
    for document in documents:
        spec = _mapping(peek_keys(document).get("spec"))
        trainer, reference = _mapping(spec.get("trainer")), _mapping(spec.get("runtimeRef"))
        words = " ".join(
            map(str, [reference.get("name"), *_items(trainer.get("command")), *_items(trainer.get("args"))])
        )
        if re.search(r"\btorchtune|\btune run\b", words):
            return "torchtune"
        if re.search(r"\btrl\b|trl/scripts", words):
            return "trl"
    return ""


def choose_variant(documents: tuple[InputDocument, ...]) -> Importer:
    """Return the importer with the option table of the TrainJob's runtime."""
    if runtime_of(documents) == "trl":
        return Importer(
            "kubeflow",
            TITLE,
            (*OWN_ROWS, *_optional(trl_options.ROWS)),
            trl_options.DEFAULTS,
            recognises_input,
            read,
            combine_trl,
            reports_every_key=True,
        )
    return Importer(
        "kubeflow",
        TITLE,
        (*OWN_ROWS, *torchtune.ROWS),
        torchtune.DEFAULTS,
        recognises_input,
        read,
        combine_torchtune,
        reports_every_key=True,
    )


TITLE = "Kubeflow's TrainJob"


def _optional(rows: tuple[Row, ...]) -> Iterator[Row]:
    """Yield the rows without required options, because the TrainJob itself may name the model."""
    return (replace(row, is_required=False) for row in rows)


def read(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the fields of the TrainJob, then the arguments of its trainer."""
    for document in draft.documents:
        tree = parse_document(document)
        yield from iterate_entries(document, tree, OPAQUE_PATHS)
        line = tree.lines.get("spec.trainer.args", tree.lines.get("spec.trainer.command", 1))
        origin = ValueOrigin(f"{document.name}:{line}")
        words = _command(draft, tree.value)
        entries = (
            trl.read_flags(trl.parse_command(draft, words))
            if runtime_of(draft.documents) == "trl"
            else _torchtune_entries(draft, list(words))
        )
        yield from (OptionEntry(entry.key, entry.value, origin) for entry in entries)


def _command(draft: JobDraft, job: dict[str, Any]) -> tuple[str, ...]:
    trainer = _mapping(_mapping(job.get("spec")).get("trainer"))
    return tuple(str(word) for key in ("command", "args") for word in _items(trainer.get(key)))


def _mapping(value: Any) -> dict[str, Any]:
    """Return a group of options, or an empty dict for any other value, which the option table refuses."""
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    """Return a list, or an empty list for any other value, which the option table refuses."""
    return value if isinstance(value, list) else []


def _torchtune_entries(draft: JobDraft, words: list[str]) -> Iterator[OptionEntry]:
    return torchtune.read_overrides(draft, words, {}) if runtime_of(draft.documents) == "torchtune" else iter(())


def combine_trl(draft: JobDraft) -> None:
    """Set the fields of a TrainJob that runs TRL."""
    _set_sources(draft)
    words = (*(draft.get("spec.trainer.command") or []), *(draft.get("spec.trainer.args") or []))
    _set_resources(draft)
    trl.combine_command(draft, words)


def combine_torchtune(draft: JobDraft) -> None:
    """Set the fields of a TrainJob that runs torchtune."""
    if not runtime_of(draft.documents):
        runtime = draft.get("spec.runtimeRef.name", "without a name")
        draft.refuse_feature(
            "spec.runtimeRef.name",
            f"the runtime {runtime}",
            "use a runtime of torchtune or TRL; for own code, run a pod",
            is_droppable=False,
        )
        return
    _set_sources(draft)
    runtime = str(draft.get("spec.runtimeRef.name", "")).removeprefix("torchtune-")
    if runtime in MODELS_OF_RUNTIMES:
        draft.assign_default("model.source", MODELS_OF_RUNTIMES[runtime], "the runtime")
        draft.assign_default("dataset.train", "tatsu-lab/alpaca", "the runtime")
        draft.assign_default("dataset.format", "alpaca", "the runtime")
        if "dataset" in draft.given_options:
            _set_row_options(draft)
    if "model._component_" not in draft.given_options:
        draft.assign_default("method.type", "full", "the runtime's recipe full_finetune_distributed")
    _set_resources(draft)
    torchtune.set_torchtune_options(draft)
    if draft.value("resources.gpusPerNode", 1) * draft.value("resources.nodes", 1) > 1:
        draft.assign_default("distributed.strategy", "fsdp", "the runtime's recipe for several devices")
    assign_default_gpus(draft)


def _set_row_options(draft: JobDraft) -> None:
    """Set the options of rows in the overrides of the data set. The initializer of the runtime names the data itself."""
    options = draft.get("dataset")
    if isinstance(options, dict) and "train_on_input" in options:
        draft.assign("dataset.responseOnly.enabled", options["train_on_input"] is False, "dataset")
    if isinstance(options, dict) and "packed" in options:
        draft.assign("dataset.packing", options["packed"] is True, "dataset")
    draft.add_reason("dataset", "the initializer of the runtime loads the data")
    draft.given_options.pop("dataset")


def _set_sources(draft: JobDraft) -> None:
    for key, path in (
        ("spec.initializer.model.storageUri", "model.source"),
        ("spec.initializer.dataset.storageUri", "dataset.train"),
    ):
        if key in draft.given_options and path not in draft.request.overrides:
            address = str(draft.get(key))
            parts = address.removeprefix("hf://").split("/")
            draft.assign(path, "/".join(parts[:2]) if address.startswith("hf://") else address, key)
            if address.startswith("hf://") and len(parts) > 2:
                draft.add_note(f"{key}: the job reads the whole repository {'/'.join(parts[:2])}")
    for key in ("spec.initializer.model.secretRef.name", "spec.initializer.dataset.secretRef.name"):
        if key in draft.given_options:
            draft.assign("model.tokenSecretRef", {"name": draft.get(key), "key": "ACCESS_TOKEN"}, key)
            draft.add_warning(
                f"{key}: the job reads the key ACCESS_TOKEN of the Secret {draft.get(key)}; for another key give --set model.tokenSecretRef.key=KEY"
            )
    draft.add_reason("spec.runtimeRef.name", "the operator's own runtime is used")
    for key in ("spec.trainer.args", "spec.trainer.command"):
        if key in draft.given_options:
            draft.add_reason(key, "the options in it are read")


def _set_resources(draft: JobDraft) -> None:
    resources = draft.get("spec.trainer.resourcesPerNode")
    key = "spec.trainer.resourcesPerNode"
    if isinstance(resources, dict):
        values = {**_mapping(resources.get("requests")), **_mapping(resources.get("limits"))}
        for name, value in values.items():
            path = {
                "cpu": "resources.cpu",
                "memory": "resources.memory",
                "ephemeral-storage": "resources.ephemeralStorage",
            }.get(name)
            if path:
                draft.assign(path, str(value), key)
            elif GPU_RESOURCES.search(name) and not str(value).isdigit():
                draft.add_mistake(key, f"{name}: {value} is not a number of GPUs", "write an integer")
            elif GPU_RESOURCES.search(name):
                draft.assign("resources.gpusPerNode", int(str(value)), key)
                if name != "nvidia.com/gpu":
                    draft.assign("resources.gpuResource", name, key)
            else:
                draft.add_warning(f"{key}: {name} has no effect: a FineTuneJob does not request it")
    processes = draft.get("spec.trainer.numProcPerNode")
    if processes is not None and not draft.has_value("resources.gpusPerNode") and str(processes).isdigit():
        draft.assign("resources.gpusPerNode", int(str(processes)), "spec.trainer.numProcPerNode")
    elif processes is not None:
        draft.add_reason("spec.trainer.numProcPerNode", "one rank per GPU, as in every FineTuneJob")
    queue = _mapping(_mapping(draft.get("metadata")).get("labels")).get(QUEUE_LABEL)
    if queue:
        draft.assign("placement.queueName", str(queue), "metadata")
    else:
        draft.add_reason("metadata", "the name comes from --name or the file")
    variables = draft.get("spec.trainer.env")
    if isinstance(variables, list) and variables:
        draft.assign(
            "placement.env", [_variable(item) for item in variables if isinstance(item, dict)], "spec.trainer.env"
        )


def _variable(item: dict[str, Any]) -> dict[str, Any]:
    reference = _mapping(item.get("valueFrom")).get("secretKeyRef")
    source = (
        {"secretKeyRef": {"name": reference.get("name"), "key": reference.get("key")}}
        if isinstance(reference, dict)
        else {"value": str(item.get("value", ""))}
    )
    return {"name": str(item.get("name")), **source}


IMPORTER = Importer(
    "kubeflow", TITLE, (*OWN_ROWS, *torchtune.ROWS), torchtune.DEFAULTS, recognises_input, read, combine_torchtune, choose_variant=choose_variant,
    reports_every_key=True,
)  # fmt: skip
