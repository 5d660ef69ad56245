"""Repeats a run from its lineage statement on this machine, and compares the weights.

Before the training starts, the trainer checks that the downloaded base model and data have the digests in the lineage statement.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.base import LenientModel, remove_value_at_path
from finetune_api.lineage import Statement
from finetune_api.names import GROUP, KIND, VERSION, Env
from finetune_api.spec.cluster import StorageRoot

from finetune_cli import output
from finetune_cli.downloads import download, make_committed_source
from finetune_cli.fields import get_value
from finetune_cli.job_storage import CommittedFolder, JobStorage, StorageError
from finetune_cli.lineage import MODEL_CHECKS, CheckResults, Verifier, require_statement
from finetune_cli.local_run import LocalRun, prepare_run, require_trainer, run_trainer
from finetune_cli.local_spec import SOURCE_FIELDS, LocalRunError
from finetune_cli.transfers import SilentProgress

UNUSED_GROUPS = ("output", "phases", "placement", "policy", "storage")
"""Groups of the spec that do not influence the weights. A replay removes these groups, so that it publishes nothing and runs no stage after training."""
USED_FIELDS = {"evaluation": ("strategy", "steps", "batchSizePerDevice"), "tracking": ("loggingSteps", "logFirstStep")}
"""For some groups of the spec: the fields that influence the training.

A replay removes the other fields of these groups, so that it reports to no tracker and computes no metrics.
"""
CPU = "cpu"


class ReplayRefused(LocalRunError):
    """The run cannot be repeated. The message begins with a code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")


@dataclass(frozen=True)
class ReplayOptions:
    """Options of `finetune run --local` that also apply to a replay."""

    set_texts: list[str] = field(default_factory=list)
    config_maps: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)
    python: str | None = None


class WeightComparison(LenientModel):
    """The output of `finetune-trainer compare-weights`."""

    tensors: int
    equal: bool
    different_tensors: int
    largest_difference: float = 0.0
    largest_in: str | None = None
    mismatched: list[str] = []


@dataclass(frozen=True)
class ReplayResult:
    """The comparison of the weights, and the known reasons why they may differ."""

    comparison: WeightComparison
    reasons: list[str]


def read_run(storage: JobStorage) -> CheckResults:
    """Verify the stored model and read its statement. Raises StorageError if the model is damaged. Prints other findings as warnings."""
    verification = Verifier(storage).verify()
    damage_findings = verification.select_findings(*MODEL_CHECKS)
    if damage_findings:
        raise StorageError(f"{damage_findings[0].code}: {damage_findings[0].message}; a damaged model cannot be compared")
    require_statement(verification)
    output.print_warnings(f"{finding.code}: {finding.message}" for finding in verification.findings)
    return verification


def replay(storage: JobStorage, folder: Path, options: ReplayOptions) -> ReplayResult | int:
    """Repeat the run in `folder`. Returns the comparison, or the exit code of the command if the training failed.

    Raises ReplayRefused, StorageError, LocalRunError, or CommandExit after printing the errors of the spec.
    """
    interpreter = options.python or sys.executable
    require_trainer(interpreter)
    verification = read_run(storage)
    statement = require_statement(verification)
    run = _prepare_replay(statement, folder, options)
    variables = {Env.EXPECTED_INPUTS.value: json.dumps(_collect_expected_inputs(statement))}
    thread_counts = {attempt.threads for attempt in statement.run.attempts if attempt.threads}
    if thread_counts:
        variables["OMP_NUM_THREADS"] = str(max(thread_counts))
    exit_code = run_trainer(run, options.python, variables)
    if exit_code != output.OK:
        return exit_code
    repeated_verification = Verifier(JobStorage(run.config.storage.uri, StorageRoot())).verify()
    original_folder = folder / "original"
    committed_folder = CommittedFolder("model", verification.folder.removeprefix("model/"), verification.manifest_sha256, True)
    download(make_committed_source(storage, committed_folder), original_folder, SilentProgress())
    repeated_folder = Path(run.config.storage.uri.removeprefix("file://")) / repeated_verification.folder
    comparison = compare_weights(interpreter, original_folder, repeated_folder)
    return ReplayResult(comparison, list(find_reasons_to_differ(statement, require_statement(repeated_verification))))


def _collect_expected_inputs(statement: Statement) -> dict[str, Any]:
    """Return the facts about base model and data that the trainer compares with the downloaded files before it trains.

    The digest of the contents of ConfigMaps is left out, because only pods mount ConfigMaps.
    """
    facts = statement.run.facts
    other_digests = {name: digest for name, digest in (facts.get("beside") or {}).items() if name != "contents of ConfigMaps"}
    return {"modelRevision": facts.get("modelRevision", ""), "datasetDigest": facts.get("datasetDigest", ""), "beside": other_digests}


def _prepare_replay(statement: Statement, folder: Path, options: ReplayOptions) -> LocalRun:
    """Write the run configuration of the replay."""
    internal_parameters = statement.predicate.build_definition.internal_parameters
    _require_complete_sources(internal_parameters.get("redactedFields") or [], options.set_texts)
    spec, recorded_defaults = make_replay_spec(statement)
    manifest_file = folder / "job.json"
    manifest = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": {"name": statement.job.split("/")[1]}, "spec": spec}
    manifest_file.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    run = prepare_run(manifest_file, folder, options.set_texts, options.config_maps, options.claims, recorded_defaults=recorded_defaults)
    rank_count = int(statement.run.facts.get("worldSize") or 1)
    if run.config.world.size != rank_count:
        raise ReplayRefused(
            "WorldSizeDiffers", f"the run had {rank_count} ranks, but this machine runs {run.config.world.size}, so each step would train on other rows; "
            f"use a machine with {rank_count} GPUs or, for a run on CPUs, give --set resources.processesPerNode={rank_count}",
        )  # fmt: skip
    return run


def make_replay_spec(statement: Statement) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the spec of the replay (the fields that the user has set and that influence the weights), and the defaults of the run by spec path."""
    spec = copy.deepcopy(statement.spec)
    for group in UNUSED_GROUPS:
        spec.pop(group, None)
    for group, field_names in USED_FIELDS.items():
        spec[group] = {name: value for name, value in (spec.get(group) or {}).items() if name in field_names}
    recorded_defaults = {}
    for path in statement.predicate.build_definition.internal_parameters.get("defaults") or []:
        value = get_value(spec, path)
        if value is not None:
            recorded_defaults[path] = value
            remove_value_at_path(spec, path)
    return {group: value for group, value in spec.items() if value != {}}, recorded_defaults


def _require_complete_sources(redacted_fields: list[str], set_texts: list[str]) -> None:
    paths_set_by_option = {text.partition("=")[0] for text in set_texts}
    for path in redacted_fields:
        is_source = path in SOURCE_FIELDS or path.startswith("dataset.mixture[")
        if is_source and path not in paths_set_by_option:
            raise ReplayRefused(
                "SourceRedacted", f"the statement omits the address in {path}, because it contained a secret; give it with --set {path}=URI"
            )


def compare_weights(interpreter: str, left_folder: Path, right_folder: Path) -> WeightComparison:
    """Compare the weights of two models in a process of the trainer's interpreter, because this program has no library for tensors. Raises LocalRunError."""
    command = [interpreter, "-m", "finetune_trainer", "compare-weights", str(left_folder), str(right_folder)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise LocalRunError(f"the weights cannot be compared: {last_line}")
    return WeightComparison.model_validate_json(process.stdout)


def find_reasons_to_differ(original_statement: Statement, repeated_statement: Statement) -> Iterator[str]:
    """Yield the known reasons why the weights of two runs may differ."""
    for run_name, statement in (("the run", original_statement), ("the replay", repeated_statement)):
        devices = {device for attempt in statement.run.attempts if (device := attempt.resolved.device) and not device.lower().startswith(CPU)}
        if devices:
            yield f"{run_name} used {', '.join(sorted(devices))}; equal weights are only expected on CPUs"
    original_versions, repeated_versions = (
        statement.predicate.run_details.builder.version for statement in (original_statement, repeated_statement)
    )
    changed_versions = [
        f"{library} {original_versions.get(library, '-')} -> {repeated_versions.get(library, '-')}"
        for library in sorted(original_versions.keys() | repeated_versions.keys())
        if original_versions.get(library) != repeated_versions.get(library)
    ]
    if changed_versions:
        yield f"library versions differ: {', '.join(changed_versions)}"
    if original_statement.predicate.build_definition.internal_parameters.get("originalValues"):
        yield "the operator changed values of the spec between the attempts of the run, for example after exhausted memory"
