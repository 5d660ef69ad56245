"""`kubeflow`: the importer for a TrainJob of Kubeflow whose runtime is torchtune or TRL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from finetune_cli.importers import torchtune, trl, trl_options
from finetune_cli.importers.converters import keep_value, to_boolean, to_integer, to_list_of, to_text
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_mapping
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow
from finetune_cli.importers.options import (
    assign_default_gpus,
    make_ignored_options,
    make_option_groups,
    make_refused_options,
)
from finetune_cli.provenance import ValueOrigin

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU_RESOURCE_PATTERN = re.compile(r"gpu|nvidia\.com/mig")
TRAINJOB_OPTION_ROWS: tuple[OptionRow, ...] = (
    OptionRow("spec.trainer.numNodes", "resources.nodes", to_integer(1)),
    OptionRow("spec.trainer.numProcPerNode", "resources.gpusPerNode", keep_value, is_set_by_combine=True),
    OptionRow("spec.trainer.resourcesPerNode", "resources", keep_value, is_set_by_combine=True),
    OptionRow("spec.trainer.args", convert=to_list_of(to_text), is_set_by_combine=True),
    OptionRow("spec.trainer.command", convert=to_list_of(to_text), is_set_by_combine=True),
    OptionRow("spec.trainer.env", "placement.env", keep_value, is_set_by_combine=True),
    OptionRow("spec.initializer.dataset.storageUri", "dataset.train", is_set_by_combine=True),
    OptionRow("spec.initializer.model.storageUri", "model.source", is_set_by_combine=True),
    OptionRow("spec.initializer.dataset.secretRef.name", "model.tokenSecretRef", is_set_by_combine=True),
    OptionRow("spec.initializer.model.secretRef.name", "model.tokenSecretRef", is_set_by_combine=True),
    OptionRow("spec.runtimeRef.name", is_set_by_combine=True),
    OptionRow("spec.activeDeadlineSeconds", "policy.activeDeadlineSeconds", to_integer(1)),
    OptionRow("spec.suspend", "suspend", to_boolean),
    OptionRow("metadata", "placement.queueName", keep_value, is_set_by_combine=True),
    *make_option_groups("spec spec.trainer spec.initializer spec.initializer.dataset spec.initializer.model spec.runtimeRef"),
    *make_ignored_options("the key only identifies the object as a TrainJob", "apiVersion kind spec.runtimeRef.apiGroup spec.runtimeRef.kind status"),
    *make_ignored_options("the operator has its own image", "spec.trainer.image"),
    *make_ignored_options("the trainer downloads model and data itself", "spec.initializer.dataset.env spec.initializer.model.env"),
    *make_refused_options("changing the pods that a runtime creates",
             "spec.runtimePatches spec.podTemplateOverrides spec.podSpecOverrides", "write spec.placement with --set"),
    *make_refused_options("another controller for the job", "spec.managedBy", "", "trainer.kubeflow.org/trainjob-controller"),
    *make_refused_options("labels and annotations for all pods", "spec.labels spec.annotations"),
)  # fmt: skip
OPAQUE_PATHS = frozenset({"metadata", "spec.trainer.resourcesPerNode", "spec.labels", "spec.annotations", "status"})
MODEL_BY_RUNTIME = {
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
}
"""The model of each Kubeflow runtime `torchtune-NAME`, by NAME. All these runtimes train on the data set tatsu-lab/alpaca."""


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document is a TrainJob."""
    return any(peek_mapping(document).get("kind") == "TrainJob" for document in documents)


def find_runtime_program(documents: tuple[InputDocument, ...]) -> str:
    """Return the program that the runtime of a TrainJob starts: `torchtune`, `trl`, or an empty text for any other program."""
    for document in documents:
        spec = _mapping_or_empty(peek_mapping(document).get("spec"))
        trainer, reference = _mapping_or_empty(spec.get("trainer")), _mapping_or_empty(spec.get("runtimeRef"))
        command_words = " ".join(
            map(str, [reference.get("name"), *_list_or_empty(trainer.get("command")), *_list_or_empty(trainer.get("args"))])
        )
        if re.search(r"\btorchtune|\btune run\b", command_words):
            return "torchtune"
        if re.search(r"\btrl\b|trl/scripts", command_words):
            return "trl"
    return ""


def choose_variant(documents: tuple[InputDocument, ...]) -> Importer:
    """Return the importer with the options of TRL or, for any other runtime, of torchtune."""
    if find_runtime_program(documents) == "trl":
        return Importer(
            "kubeflow",
            TITLE,
            (*TRAINJOB_OPTION_ROWS, *_make_optional(trl_options.OPTION_TABLE)),
            trl_options.DEFAULTS,
            recognises_input,
            read_options,
            combine_trl_options,
            reports_every_key=True,
        )
    return Importer(
        "kubeflow",
        TITLE,
        (*TRAINJOB_OPTION_ROWS, *torchtune.OPTION_TABLE),
        torchtune.DEFAULTS,
        recognises_input,
        read_options,
        combine_torchtune_options,
        reports_every_key=True,
    )


TITLE = "Kubeflow's TrainJob"


def _make_optional(option_rows: tuple[OptionRow, ...]) -> Iterator[OptionRow]:
    """Yield copies of the option rows in which no option is required, because the TrainJob itself may name the model."""
    return (replace(option_row, is_required=False) for option_row in option_rows)


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the fields of the TrainJob, then the arguments of its trainer."""
    for document in draft.documents:
        parsed_file = parse_document(document)
        yield from iterate_entries(document, parsed_file, OPAQUE_PATHS)
        line = parsed_file.lines.get("spec.trainer.args", parsed_file.lines.get("spec.trainer.command", 1))
        origin = ValueOrigin(f"{document.name}:{line}")
        command_words = _read_command(draft, parsed_file.value)
        entries = (
            trl.read_flags(trl.parse_command(draft, command_words))
            if find_runtime_program(draft.documents) == "trl"
            else _read_torchtune_overrides(draft, list(command_words))
        )
        yield from (OptionEntry(entry.key, entry.value, origin) for entry in entries)


def _read_command(draft: JobDraft, job: dict[str, Any]) -> tuple[str, ...]:
    trainer = _mapping_or_empty(_mapping_or_empty(job.get("spec")).get("trainer"))
    return tuple(str(word) for key in ("command", "args") for word in _list_or_empty(trainer.get(key)))


def _mapping_or_empty(value: Any) -> dict[str, Any]:
    """Return a mapping unchanged, and an empty dict for any other value. A value that is not a mapping is refused elsewhere, by the option table."""
    return value if isinstance(value, dict) else {}


def _list_or_empty(value: Any) -> list[Any]:
    """Return a list unchanged, and an empty list for any other value. A value that is not a list is refused elsewhere, by the option table."""
    return value if isinstance(value, list) else []


def _read_torchtune_overrides(draft: JobDraft, command_words: list[str]) -> Iterator[OptionEntry]:
    return torchtune.read_overrides(draft, command_words, {}) if find_runtime_program(draft.documents) == "torchtune" else iter(())


def combine_trl_options(draft: JobDraft) -> None:
    """Set the fields of a TrainJob that runs TRL."""
    _set_sources(draft)
    command_words = (*(draft.get("spec.trainer.command") or []), *(draft.get("spec.trainer.args") or []))
    _set_resources(draft)
    trl.combine_command(draft, command_words)


def combine_torchtune_options(draft: JobDraft) -> None:
    """Set the fields of a TrainJob that runs torchtune."""
    if not find_runtime_program(draft.documents):
        runtime = draft.get("spec.runtimeRef.name", "without a name")
        draft.refuse_feature(
            "spec.runtimeRef.name",
            f"the runtime {runtime}",
            "use a runtime of torchtune or TRL; run code of your own in a pod",
            is_droppable=False,
        )
        return
    _set_sources(draft)
    runtime = str(draft.get("spec.runtimeRef.name", "")).removeprefix("torchtune-")
    if runtime in MODEL_BY_RUNTIME:
        draft.assign_default("model.source", MODEL_BY_RUNTIME[runtime], "the runtime")
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
    """Set two fields from the overrides of `dataset`: packing, and whether the loss counts only answers.

    Ignore a data source in these overrides, because the initializer loads the data.
    """
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
            address_segments = address.removeprefix("hf://").split("/")
            draft.assign(path, "/".join(address_segments[:2]) if address.startswith("hf://") else address, key)
            if address.startswith("hf://") and len(address_segments) > 2:
                draft.add_note(f"{key}: the job reads the whole repository {'/'.join(address_segments[:2])}")
    for key in ("spec.initializer.model.secretRef.name", "spec.initializer.dataset.secretRef.name"):
        if key in draft.given_options:
            draft.assign("model.tokenSecretRef", {"name": draft.get(key), "key": "ACCESS_TOKEN"}, key)
            draft.add_warning(
                f"{key}: the job reads the key ACCESS_TOKEN of the Secret {draft.get(key)}; for another key give --set model.tokenSecretRef.key=KEY"
            )
    draft.add_reason("spec.runtimeRef.name", "the operator's own runtime is used")
    for key in ("spec.trainer.args", "spec.trainer.command"):
        if key in draft.given_options:
            draft.add_reason(key, "the options in these words are read")


def _set_resources(draft: JobDraft) -> None:
    resources = draft.get("spec.trainer.resourcesPerNode")
    key = "spec.trainer.resourcesPerNode"
    if isinstance(resources, dict):
        quantity_by_resource = {**_mapping_or_empty(resources.get("requests")), **_mapping_or_empty(resources.get("limits"))}
        for name, value in quantity_by_resource.items():
            path = {
                "cpu": "resources.cpu",
                "memory": "resources.memory",
                "ephemeral-storage": "resources.ephemeralStorage",
            }.get(name)
            if path:
                draft.assign(path, str(value), key)
            elif GPU_RESOURCE_PATTERN.search(name) and not str(value).isdigit():
                draft.add_mistake(key, f"{name}: {value} is not a number of GPUs", "write an integer")
            elif GPU_RESOURCE_PATTERN.search(name):
                draft.assign("resources.gpusPerNode", int(str(value)), key)
                if name != "nvidia.com/gpu":
                    draft.assign("resources.gpuResource", name, key)
            else:
                draft.add_warning(f"{key}: {name} has no effect: a FineTuneJob does not request this resource")
    process_count = draft.get("spec.trainer.numProcPerNode")
    if process_count is not None and not draft.has_value("resources.gpusPerNode") and str(process_count).isdigit():
        draft.assign("resources.gpusPerNode", int(str(process_count)), "spec.trainer.numProcPerNode")
    elif process_count is not None:
        draft.add_reason("spec.trainer.numProcPerNode", "no effect: a FineTuneJob starts one rank per GPU")
    queue_name = _mapping_or_empty(_mapping_or_empty(draft.get("metadata")).get("labels")).get(QUEUE_LABEL)
    if queue_name:
        draft.assign("placement.queueName", str(queue_name), "metadata")
    else:
        draft.add_reason("metadata", "the name comes from --name or the file")
    variables = draft.get("spec.trainer.env")
    if isinstance(variables, list) and variables:
        draft.assign(
            "placement.env", [_to_env_variable(variable) for variable in variables if isinstance(variable, dict)], "spec.trainer.env"
        )


def _to_env_variable(variable: dict[str, Any]) -> dict[str, Any]:
    reference = _mapping_or_empty(variable.get("valueFrom")).get("secretKeyRef")
    source = (
        {"secretKeyRef": {"name": reference.get("name"), "key": reference.get("key")}}
        if isinstance(reference, dict)
        else {"value": str(variable.get("value", ""))}
    )
    return {"name": str(variable.get("name")), **source}


IMPORTER = Importer(
    "kubeflow", TITLE, (*TRAINJOB_OPTION_ROWS,
        *torchtune.OPTION_TABLE), torchtune.DEFAULTS, recognises_input, read_options, combine_torchtune_options, choose_variant=choose_variant,
    reports_every_key=True,
)  # fmt: skip
