"""Operator and trainer of neighbouring releases can read each other's data, as docs/decisions/0070-contract-across-versions.md requires."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.compatibility import read_run_config, read_spec
from finetune_api.defaults import PlatformDefaults, find_origins, resolve_defaults
from finetune_api.errors import ConfigError, FineTuneError, TooOldError
from finetune_api.names import CONTRACT_VERSION, RELEASE, Origin
from finetune_api.pod import ProgressReport, ResumeConfig, RunConfig, StoreTarget, TerminationMessage, World
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from finetune_api.status import FineTuneJobStatus
from pydantic import ValidationError

MINIMAL_SPEC: dict[str, Any] = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}
GRPO_SPEC = {"trainer": {"type": "grpo", "rewards": [{"builtin": "thinkFormat"}]}}
RELEASE_0_1_0 = json.loads((Path(__file__).parent / "data/run_config_0_1_0.json").read_text())
"""All fields of `run.json` that trainer 0.1.0 knows, as nested objects. The value of a field that has no inner fields is None or, for an enumeration, the
list of its values.
"""


def make_run_config(**changes: Any) -> RunConfig:
    platform = PlatformDefaults(storage=StorageRoot(uri="s3://bucket/prefix"), cpu="4")
    resolution = resolve_defaults(FineTuneJobSpec.model_validate(MINIMAL_SPEC | changes), platform_defaults=platform)
    return RunConfig(
        name="job", namespace="team", uid="u-1", attempt=1, spec=resolution.spec,
        defaults=sorted(resolution.defaults), origins=find_origins(resolution.defaults),
        world=World(nodes=1, processes_per_node=1, gpus_per_node=1, master_address="127.0.0.1", master_port=0, rendezvous_id="u-1-1"),
        storage=StoreTarget(uri="s3://bucket/prefix/team/job/u-1"), resume=ResumeConfig(mode="auto"), grace_seconds=300,
    )  # fmt: skip


def set_at_path(nested_values: Any, path: str, new_value: Any) -> None:
    """Set the value at a dotted path. The path may contain indices of list items."""
    *groups, name = path.split(".")
    container = nested_values
    for group in groups:
        container = container[int(group)] if isinstance(container, list) else container.setdefault(group, {})
    container[name] = new_value


def make_run_json_of_newer_operator(path: str, value: Any, *added_defaults: str, **changes: Any) -> bytes:
    """Return the run.json that a newer operator would write: it has `value` at `path`, and the `added_defaults` in its list `defaults`."""
    run_json = json.loads(make_run_config(**changes).to_bytes())
    set_at_path(run_json, path, value)
    run_json["defaults"] += added_defaults
    return json.dumps(run_json).encode()


IGNORED = None
NEWER_OPERATOR_CASES = [
    # each case: path in run.json, value at this path, added entries of `defaults`, expected part of the error message (IGNORED: no error is expected)
    ("spec.training.fieldOfALaterRelease", 64, ["training.fieldOfALaterRelease"], IGNORED),
    ("spec.training.fieldOfALaterRelease", 64, [], "spec.training.fieldOfALaterRelease"),
    ("spec.training.fieldOfALaterRelease", 64, ["training.fieldOfALaterRelease", "#plan training.fieldOfALaterRelease"], "fieldOfALaterRelease"),
    ("spec.training.fieldOfALaterRelease", 64, ["training.fieldOfALaterRelease", "#platform training.fieldOfALaterRelease"], "fieldOfALaterRelease"),
    ("spec.training.fieldOfALaterRelease", 64, ["training.fieldOfALaterRelease", "#policy training.fieldOfALaterRelease"], "fieldOfALaterRelease"),
    ("spec.budget", {"strategy": "auto", "ttlDays": 7}, ["budget.strategy", "budget.ttlDays"], IGNORED),
    ("spec.budget", {"strategy": "always", "ttlDays": 7}, ["budget.ttlDays"], "spec.budget.strategy"),
    ("spec.budget", {"limits": {"cpu": "8"}}, ["budget.strategy"], "spec.budget.limits.cpu"),
    ("spec.budget", {}, [], IGNORED),
    ("spec.dataset.filters", ["a"], ["dataset.filters"], IGNORED),
    ("spec.dataset.filters", ["a"], [], "spec.dataset.filters"),
    ("spec.trainer.rewards.0.cache", True, [], "spec.trainer.rewards[0].cache"),
    ("spec.method.type", "galore", [], "spec.method.type: galore"),
    ("spec.trainer.dpo", {"lossTypes": ["charm"]}, [], "spec.trainer.dpo.lossTypes[0]: charm"),
    ("spec.training.optimizer", "adamw_torch", [], IGNORED),
    ("spec.training.scheduler", "zigzag", [], "spec.training.scheduler: zigzag"),
    ("hints", {"x": 1}, [], IGNORED),
    ("world.zone", "eu-1", [], IGNORED),
    ("storage.encryption", "quantumSafe", [], "storage.encryption: quantumSafe"),
    ("version", CONTRACT_VERSION + 1, [], IGNORED),
    ("uid", "u-1", ["#minTrainerVersion 99.0.0"], "trainer 99.0.0 or newer"),
    ("uid", "u-1", [f"#minTrainerVersion {RELEASE}"], IGNORED),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "added_defaults", "refusal"), NEWER_OPERATOR_CASES, ids=[f"{case[0]}-{case[2]}" for case in NEWER_OPERATOR_CASES])
def test_trainer_refuses_unknown_fields_that_are_not_defaults(path: str, value: Any, added_defaults: list[str], refusal: str | None) -> None:
    changes = GRPO_SPEC if "rewards" in path else {}
    data = make_run_json_of_newer_operator(path, value, *added_defaults, **changes)
    if refusal is None:
        known_spec = json.loads(make_run_config(**changes).to_bytes())["spec"]
        assert read_run_config(data).spec == FineTuneJobSpec.model_validate(known_spec | find_known_change(path, value, known_spec))
        return
    with pytest.raises(TooOldError) as error:
        read_run_config(data)
    assert refusal in error.value.message
    assert (error.value.exit_code, error.value.code) == (79, "TrainerTooOld")


def find_known_change(path: str, value: Any, known_spec: dict[str, Any]) -> dict[str, Any]:
    return {"training": known_spec["training"] | {"optimizer": value}} if path.endswith("optimizer") else {}


def test_the_error_names_all_refused_fields() -> None:
    run_json = json.loads(make_run_config().to_bytes())
    run_json["spec"]["training"] |= {"first": 1, "second": 2}
    with pytest.raises(TooOldError, match=r"spec\.training\.second.*spec\.training\.first|first.*second"):
        read_run_config(json.dumps(run_json).encode())


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"version": 2}', make_run_json_of_newer_operator("attempt", 0), make_run_json_of_newer_operator("spec.training.maxSteps", -1)],
    ids=["torn", "list", "empty", "attempt 0", "maxSteps -1"],
)  # fmt: skip
def test_invalid_values_in_run_config_are_configuration_errors(data: bytes) -> None:
    with pytest.raises(ConfigError) as error:
        read_run_config(data)
    assert error.value.code == "RunFileInvalid"


def test_trainer_reads_run_config_of_operator_0_1_0() -> None:
    run_json = json.loads(make_run_config().to_bytes())
    run_json["version"] = 1
    run_json["defaults"] = [path for path in run_json["defaults"] if not path.startswith("#")]
    run = read_run_config(json.dumps(run_json).encode())
    assert run.spec == make_run_config().spec
    assert (run.origin("training.epochs"), run.origin("model.source")) == (Origin.DEFAULT, Origin.USER)


def list_paths_refused_by_0_1_0(value: Any, known_fields: Any, path: str = "") -> list[str]:
    """Return the paths of the fields in a run.json that trainer 0.1.0 refuses. `known_fields` holds the fields of `value` that trainer 0.1.0 knows, as in
    RELEASE_0_1_0.
    """
    if isinstance(value, list):
        return [refused_path for item in value for refused_path in list_paths_refused_by_0_1_0(item, known_fields, f"{path}[]")]
    if isinstance(value, dict) and isinstance(known_fields, dict):
        unknown_paths = [f"{path}.{name}" for name in value if name not in known_fields]
        return unknown_paths + [
            refused_path
            for name in value if name in known_fields
            for refused_path in list_paths_refused_by_0_1_0(value[name], known_fields[name], f"{path}.{name}")
        ]  # fmt: skip
    return [f"{path}: {value}"] if isinstance(known_fields, list) and value not in known_fields else []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GRPO_SPEC,
        {"trainer": {"type": "dpo", "dpo": {"beta": 0.2}}},
        {"method": {"type": "qlora"}, "resources": {"gpusPerNode": 2}, "distributed": {"strategy": "ddp"}},
        {"method": {"type": "spectrum"}, "training": {"maxSteps": 5}, "checkpoint": {"keep": 1}},
    ],
    ids=["smallest", "grpo", "dpo", "qlora", "spectrum"],
)
def test_trainer_0_1_0_reads_run_config_without_new_fields(changes: dict[str, Any]) -> None:
    assert list_paths_refused_by_0_1_0(json.loads(make_run_config(**changes).to_bytes()), RELEASE_0_1_0) == []


def test_a_new_field_with_its_default_is_omitted_and_one_that_the_user_set_needs_a_newer_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_api.pod.map_fields_to_release", lambda model: {"training.seed": "0.2.0"})
    run_json_with_default = json.loads(make_run_config().to_bytes())
    assert "seed" not in run_json_with_default["spec"]["training"]
    assert "#minTrainerVersion 0.1.0" in run_json_with_default["defaults"]
    run_json_with_value = json.loads(make_run_config(training={"seed": 7}).to_bytes())
    assert run_json_with_value["spec"]["training"]["seed"] == 7
    assert "#minTrainerVersion 0.2.0" in run_json_with_value["defaults"]


def test_run_config_keeps_the_origin_of_every_value() -> None:
    run = read_run_config(make_run_config(training={"epochs": 2}).to_bytes())
    assert run == make_run_config(training={"epochs": 2})
    origins = {path: run.origin(path) for path in ("training.epochs", "training.seed", "resources.cpu", "storage.uri")}
    assert list(origins.values()) == [Origin.USER, Origin.DEFAULT, Origin.PLATFORM, Origin.PLATFORM]


# The operator reads a spec


@pytest.mark.parametrize(
    ("change", "expected_paths"),
    [
        ({}, ()),
        ({"budget": {"strategy": "auto"}}, ("budget",)),
        ({"training": {"fieldOfALaterRelease": 64, "epochs": 2}}, ("training.fieldOfALaterRelease",)),
        ({"method": {"type": "galore"}}, ("method.type",)),
        ({"evaluation": {"metrics": ["accuracy", "vibes", "f1", "charm"]}}, ("evaluation.metrics[3]", "evaluation.metrics[1]")),
        ({"storage": {"uri": "s3://bucket/x", "encryption": {"type": "quantumSafe"}}}, ("storage.encryption.type", "storage.encryption")),
        ({"trainer": {"type": "dpo", "dpo": {"lossTypes": ["charm"]}}}, ("trainer.dpo.lossTypes[0]", "trainer.dpo.lossTypes")),
        ({"placement": {"tolerations": [{"operator": "Roughly", "key": "gpu"}]}}, ("placement.tolerations[0].operator",)),
    ],
    ids=str,
)  # fmt: skip
def test_operator_reads_a_newer_spec_and_lists_its_unknown_fields_and_values(change: dict[str, Any], expected_paths: tuple[str, ...]) -> None:
    spec, unknown_paths = read_spec(MINIMAL_SPEC | change)
    assert unknown_paths == expected_paths
    assert spec.model.source == "org/name"
    if "evaluation" in change:
        assert spec.evaluation.metrics == ["accuracy", "f1"]
    if "training" in change:
        assert spec.training.epochs == 2


def test_reading_a_spec_leaves_the_original_untouched() -> None:
    raw_spec = MINIMAL_SPEC | {"training": {"fieldOfALaterRelease": 64}}
    read_spec(raw_spec)
    assert raw_spec["training"] == {"fieldOfALaterRelease": 64}


def test_invalid_value_in_a_spec_is_a_validation_error() -> None:
    with pytest.raises(ValidationError):
        read_spec(MINIMAL_SPEC | {"training": {"epochs": -1}})


# The operator reads reports and statuses

REPORT: dict[str, Any] = {"attempt": 1, "uid": "u-1", "stage": "training", "progress": {"step": 5}, "metrics": {"trainLoss": 1.5}}


def test_only_the_field_with_an_unknown_enumeration_value_is_dropped_from_a_report() -> None:
    report = ProgressReport.model_validate_json(json.dumps(REPORT | {"stage": "distilling", "mood": "good"}))
    assert (report.stage, report.progress.step, report.metrics.train_loss) == ("starting", 5, 1.5)


def test_only_the_field_with_an_unreadable_number_is_dropped_from_a_report() -> None:
    report = ProgressReport.model_validate_json(json.dumps(REPORT | {"metrics": {"trainLoss": {"mean": 1}, "gradNorm": 0.5}}))
    assert (report.metrics.train_loss, report.metrics.grad_norm) == (None, 0.5)


def test_only_the_unreadable_list_item_is_dropped_from_a_report() -> None:
    checkpoints = [{"step": 1, "uri": "s3://b/1"}, {"step": 2}, {"step": 3, "uri": "s3://b/3"}]
    report = ProgressReport.model_validate_json(json.dumps(REPORT | {"checkpoints": checkpoints}))
    assert [checkpoint.step for checkpoint in report.checkpoints] == [1, 3]


def test_a_report_without_a_required_field_is_refused() -> None:
    with pytest.raises(ValidationError):
        ProgressReport.model_validate({"uid": "u-1"})


def test_only_the_field_with_an_unknown_enumeration_value_is_dropped_from_a_termination_message() -> None:
    text = json.dumps({"class": "Quota", "code": "X", "message": "m", "output": {"kind": "distilled", "uri": "s3://b/m"}})
    message = TerminationMessage.model_validate_json(text)
    assert (message.class_, message.code, message.message) == (None, "X", "m")
    assert message.output is not None
    assert (message.output.kind, message.output.uri) == (None, "s3://b/m")


def test_only_the_unknown_condition_is_dropped_from_a_status() -> None:
    conditions = [{"type": "Budgeted", "status": "True"}, {"type": "Finished", "status": "True"}]
    status = FineTuneJobStatus.model_validate({"phase": "Pricing", "attempt": 2, "conditions": conditions})
    assert (status.phase, status.attempt, [condition.type for condition in status.conditions]) == (None, 2, ["Finished"])


def test_the_heartbeat_is_also_written_and_read_under_its_old_name() -> None:
    report = ProgressReport.model_validate(REPORT | {"health": {"secondsSinceHeartbeat": 4.0}}).to_wire()
    assert report["health"]["secondsSinceSign"] == 4.0
    old_report = ProgressReport.model_validate(REPORT | {"health": {"secondsSinceSign": 3.0}})
    assert old_report.health.seconds_since_heartbeat == 3.0


def test_too_old_error_has_exit_code_79() -> None:
    assert issubclass(TooOldError, FineTuneError)
    assert TooOldError("TrainerTooOld", "m").exit_code == 79


def test_release_is_the_version_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["version"] == RELEASE
