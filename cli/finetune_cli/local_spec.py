"""Adapts a spec to the user's machine for `finetune run --local`: local paths for storage and sources, and at most the GPUs of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.sources import ConfigMapSource, PvcSource, is_data_file_name, parse_source

from finetune_cli.fields import get_value, set_value
from finetune_cli.job_storage import CREDENTIALS_HINT
from finetune_cli.output import CommandError

SOURCE_FIELDS = (
    "model.source",
    "model.tokenizer",
    "method.adapter.source",
    "trainer.dpo.referenceModel",
    "dataset.train",
    "dataset.validation",
    "dataset.test",
    "dataset.images.root",
    "evaluation.metricModels.bertscore",
    "evaluation.metricModels.semanticSimilarity",
    "phases.from",
)


class LocalRunError(CommandError):
    """The job cannot run on this machine."""


@dataclass(frozen=True)
class LocalMachine:
    """Folders and GPUs of the user's machine. `config_maps` and `claim_folders` map each ConfigMap or volume claim to the local folder that replaces it."""

    output_folder: Path
    manifest_folder: Path
    gpu_count: int
    config_maps: dict[str, Path] = field(default_factory=dict)
    claim_folders: dict[str, Path] = field(default_factory=dict)


def parse_folders(option: str, pair_texts: list[str]) -> dict[str, Path]:
    """Parse `NAME=FOLDER` texts. Raises LocalRunError if a folder does not exist."""
    folders = {}
    for text in pair_texts:
        name, equals_sign, path = text.partition("=")
        if not equals_sign or not Path(path).is_dir():
            raise LocalRunError(f"{option} {text}: write NAME=FOLDER with an existing folder")
        folders[name] = Path(path).resolve()
    return folders


def count_gpus() -> int:
    """Count the NVIDIA GPUs by their device files, because a driver library may be missing."""
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()])


def adapt_spec(spec: dict[str, Any], machine: LocalMachine) -> list[str]:
    """Change a spec in place so that the job runs on this machine. Returns a note about each change. Raises LocalRunError."""
    notes: list[str] = []
    storage = get_value(spec, "storage.uri")
    if storage:
        notes.append(f"results are written to {machine.output_folder} instead of {storage}")
    spec["storage"] = {"uri": f"file://{machine.output_folder}"}
    if (mode := get_value(spec, "policy.onExistingResult")) is not None:
        notes.append(f"policy.onExistingResult {mode} has no effect in a local run: a local run never adopts the stored result of another job")
        del spec["policy"]["onExistingResult"]
    for path in SOURCE_FIELDS:
        source_text = get_value(spec, path)
        if isinstance(source_text, str) and source_text:
            set_value(spec, path, to_local_source(source_text, path, machine))
    for path, item, key in _find_sources_in_lists(spec):
        item[key] = to_local_source(item[key], path, machine)
    _inline_config_maps(spec, machine)
    _limit_resources(spec, machine.gpu_count, notes)
    return notes


def _find_sources_in_lists(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """For each source inside a list of the spec, yield the path of the source, the list item, and the key of the source in this item."""
    for path, key in (("dataset.mixture", "source"), ("evaluation.benchmarks", "folder"), ("output.combineAdapters", "source")):
        for i, item in enumerate(get_value(spec, path) or []):
            if isinstance(item, dict) and isinstance(item.get(key), str):
                yield f"{path}[{i}].{key}", item, key


def to_local_source(text: str, path: str, machine: LocalMachine) -> str:
    """Convert a source to one that this machine can read. Hub, S3 and web sources stay unchanged. Raises LocalRunError."""
    if text.startswith("file://") and not text.startswith("file:///"):
        return _to_file_source(text.removeprefix("file://"), path, machine)
    if text.startswith((".", "/", "~")) or is_data_file_name(text):
        return _to_file_source(text, path, machine)
    source = parse_source(text, spec_path=path)
    if isinstance(source, ConfigMapSource):
        return f"file://{_find_path_in_folder(machine.config_maps, source.name, source.key, path, '--config-map')}"
    if isinstance(source, PvcSource):
        return f"file://{_find_path_in_folder(machine.claim_folders, source.claim, source.path, path, '--claim')}"
    return text


def _to_file_source(text: str, path: str, machine: LocalMachine) -> str:
    """Return the `file://` source of a path. A relative path is looked up in the current folder, then in the manifest's folder."""
    try:
        file = Path(text).expanduser()
    except RuntimeError:
        raise LocalRunError(
            f"spec.{path}: {text}: this user has no home folder on this machine; write the whole path"
        ) from None
    for candidate in (file, machine.manifest_folder / file):
        if candidate.exists():
            return f"file://{candidate.resolve()}"
    raise LocalRunError(
        f"spec.{path}: {text} does not exist; relative paths are looked up in {Path.cwd()} and in {machine.manifest_folder}"
    )


def _find_path_in_folder(folders: dict[str, Path], name: str, inner_path: str, spec_path: str, option: str) -> Path:
    if name not in folders:
        raise LocalRunError(
            f"spec.{spec_path}: {name} is not on this machine; name a folder that replaces it with {option} {name}=FOLDER"
        )
    file = folders[name] / inner_path
    if not file.exists():
        raise LocalRunError(f"spec.{spec_path}: {file} does not exist")
    return file


def require_s3_credentials(spec: dict[str, Any]) -> None:
    """Raise LocalRunError if a source is in S3 and this machine has no credentials. This check reports the error before the trainer is started."""
    sources = {path: get_value(spec, path) for path in SOURCE_FIELDS}
    sources |= {path: item[key] for path, item, key in _find_sources_in_lists(spec)}
    s3_sources = {path: text for path, text in sources.items() if isinstance(text, str) and text.startswith("s3://")}
    if not s3_sources:
        return
    from botocore.session import Session

    if Session().get_credentials() is None:
        path, text = next(iter(s3_sources.items()))
        raise LocalRunError(f"spec.{path}: {text} needs S3 credentials; {CREDENTIALS_HINT}")


def _inline_config_maps(spec: dict[str, Any], machine: LocalMachine) -> None:
    """Replace the ConfigMap reference of a chat template by the template's text, and check that the file with the comparison prompts exists.

    Raises LocalRunError if a reference can be read in a pod, but not on this machine.
    """
    reference = get_value(spec, "dataset.chatTemplate.configMapRef")
    if isinstance(reference, dict):
        name, key = str(reference.get("name")), str(reference.get("key"))
        file = _find_path_in_folder(machine.config_maps, name, key, "dataset.chatTemplate.configMapRef", "--config-map")
        spec["dataset"]["chatTemplate"] = {"text": file.read_text(encoding="utf-8")}
    prompts_reference = get_value(spec, "evaluation.comparison.promptsRef")
    if isinstance(prompts_reference, dict):
        name, key = str(prompts_reference.get("name")), str(prompts_reference.get("key"))
        _find_path_in_folder(machine.config_maps, name, key, "evaluation.comparison.promptsRef", "--config-map")
    for path in ("distributed.deepspeed.configRef", "distributed.fsdp.configRef"):
        if get_value(spec, path) is not None:
            raise LocalRunError(
                f"spec.{path}: only a pod can read this ConfigMap; write the other fields of the group instead"
            )


def _limit_resources(spec: dict[str, Any], gpu_count: int, notes: list[str]) -> None:
    resources = spec.setdefault("resources", {})
    if int(resources.get("nodes") or 1) > 1:
        notes.append(f"resources.nodes is {resources['nodes']}, but a local run uses 1")
        resources["nodes"] = 1
    requested_gpus = resources.get("gpusPerNode")
    if requested_gpus is None or int(requested_gpus) > gpu_count:
        if requested_gpus is not None:
            notes.append(f"resources.gpusPerNode is {requested_gpus}, but this machine has {gpu_count}")
        resources["gpusPerNode"] = min(int(requested_gpus or 1), gpu_count)
    for name in ("nodePool", "gpuResource"):
        resources.pop(name, None)
