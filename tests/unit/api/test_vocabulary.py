"""Names, sources, defaults, the schema and the pod contract."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_api.base import DEFAULT, DEFAULT_TEXT
from finetune_api.defaults import PlatformDefaults, resolve
from finetune_api.errors import ERROR_OF_CODE, ConfigError, DataError
from finetune_api.exits import EXIT_POLICIES, REASON_OF_CLASS
from finetune_api.pod import Resume, RunConfig, StoreTarget, TerminationMessage, World
from finetune_api.rules import check
from finetune_api.schema import HEADER, crd
from finetune_api.sources import ConfigMapSource, FileSource, HttpsSource, HubSource, PvcSource, S3Source, parse
from finetune_api.spec import FineTuneJobSpec, load_spec
from finetune_api.spec.cluster import StorageRoot
from finetune_api.status import Checkpoint, Metrics, Resolved
from finetune_api.support import UNSUPPORTED_FIELDS, unsupported_fields, wire_path
from pydantic import ValidationError
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[3]


def test_every_failing_exit_code_has_a_class_and_every_class_a_reason() -> None:
    plain = {names.ExitCode.OK, names.ExitCode.KILLED, names.ExitCode.TERMINATED}
    assert set(EXIT_POLICIES) == set(names.ExitCode) - plain
    assert set(REASON_OF_CLASS) == set(names.FailureClass)


def test_every_failing_exit_code_but_the_stops_has_an_error_class() -> None:
    codes = set(ERROR_OF_CODE)
    stops = {names.ExitCode.PREEMPTED_SAVED, names.ExitCode.PREEMPTED_UNSAVED}
    assert codes == set(EXIT_POLICIES) - stops


def test_incarnations_differ_by_pod() -> None:
    assert names.incarnation(2, "1f3c9a2b-77aa-4c1e-9d7f-000000000000") == "a2-1f3c9a2b"
    assert names.checkpoint_folder(500) == "step-00000500"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubSource("org/name")),
        ("gpt2", HubSource("gpt2")),
        ("hf://org/name@v1.0", HubSource("org/name", "v1.0")),
        ("s3://bucket/a/b.jsonl", S3Source("bucket", "a/b.jsonl")),
        ("s3://bucket", S3Source("bucket", "")),
        ("pvc://claim/models/x", PvcSource("claim", "models/x")),
        ("configmap://data/train.jsonl", ConfigMapSource("data", "train.jsonl")),
        ("https://example.com/x.csv", HttpsSource("https://example.com/x.csv")),
        ("file:///data/x", FileSource("/data/x")),
    ],
)
def test_sources(text: str, expected: object) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "write"),
    [
        ("", "org/name"),
        (" org/name", "org/name"),
        ("./data", "file:///path/to/data"),
        ("/data", "file:///data"),
        ("s3://B/x", "s3://bucket/key"),
        ("s3:///x", "s3://bucket/key"),
        ("pvc://claim/../x", "pvc://claim/path"),
        ("configmap://only-name", "configmap://name/key"),
        ("http://example.com/x", "https://example.com/x"),
        ("https://example.com", "https://host/path/file.jsonl"),
        ("file://data/x", "file:///data/x"),
        ("org/name@", "org/name@main"),
        ("a/b/c", "org/name"),
        ("gs://bucket/x", "s3://bucket/key"),
    ],
)
def test_a_bad_source_says_what_to_write(text: str, write: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text, path="dataset.train")
    assert error.value.code == "SourceInvalid"
    assert error.value.message.startswith("dataset.train")
    assert write in (error.value.hint or "")


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as error:
        parse("https://user:hunter2@example.com/x.jsonl")
    assert "hunter2" not in str(error.value)


MINIMAL = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def resolved(change: dict[str, Any] | None = None, platform: PlatformDefaults | None = None) -> Any:
    return resolve(FineTuneJobSpec.model_validate(MINIMAL | (change or {})), platform=platform)


def test_defaults_of_the_smallest_job() -> None:
    found = resolved()
    spec = found.spec
    assert (spec.method.type, spec.method.lora.rank, spec.method.lora.alpha, spec.method.lora.dropout) == (
        "lora",
        16,
        32,
        0.05,
    )
    assert (spec.training.epochs, spec.training.batch_size_per_device, spec.training.gradient_accumulation_steps) == (
        3,
        4,
        4,
    )
    assert (spec.training.learning_rate, spec.training.scheduler, spec.training.warmup_ratio) == (2e-4, "cosine", 0.03)
    assert (spec.training.gradient_checkpointing, spec.training.seed, spec.dataset.packing) == ("enabled", 42, False)
    assert (spec.checkpoint.strategy, spec.checkpoint.steps, spec.checkpoint.keep, spec.checkpoint.resume) == (
        "steps",
        100,
        3,
        "auto",
    )
    assert (spec.tracking.logging_steps, spec.policy.retries, spec.resources.gpus_per_node) == (10, 3, 1)
    assert found.defaults["training.learningRate"] == 2e-4
    assert "model.source" not in found.defaults
    assert found.notes == []


@pytest.mark.parametrize(
    ("change", "rate"),
    [
        ({"method": {"type": "full"}}, 2e-5),
        ({"method": {"type": "spectrum"}}, 2e-5),
        ({"method": {"type": "qlora"}}, 2e-4),
        ({"trainer": {"type": "dpo"}}, 5e-6),
        ({"trainer": {"type": "orpo"}, "method": {"type": "full"}}, 5e-6),
        ({"trainer": {"type": "grpo"}}, 1e-6),
        ({"training": {"learningRate": 0.5}}, 0.5),
    ],
)
def test_the_learning_rate_depends_on_method_and_objective(change: dict[str, Any], rate: float) -> None:
    assert resolved(change).spec.training.learning_rate == rate


def test_resolving_twice_changes_nothing_and_fills_nothing() -> None:
    once = resolved({"method": {"type": "qlora"}, "training": {"maxSteps": 40}})
    twice = resolve(once.spec)
    assert twice.spec == once.spec
    assert twice.defaults == {}
    assert check(once.spec) == []


def test_max_steps_wins_and_says_so() -> None:
    found = resolved({"training": {"maxSteps": 40, "epochs": 2}})
    assert found.notes == ["training.epochs 2 has no effect, because training.maxSteps is 40"]


def test_another_store_gets_no_credentials_of_the_default_one() -> None:
    default = StorageRoot(
        uri="s3://models/x", endpoint="https://s3.internal", region="eu", credentials_secret_ref={"name": "s3"}
    )
    platform = PlatformDefaults(storage=default)
    assert resolved(None, platform).spec.storage == default
    own = resolved({"storage": {"endpoint": "https://elsewhere.example.com"}}, platform).spec.storage
    assert own.to_wire() == {"endpoint": "https://elsewhere.example.com", "uri": "s3://models/x"}


def fields(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in schema.get("properties", {}).items():
        yield f"{path}.{name}", value
        yield from fields(value, f"{path}.{name}")
        yield from fields(value.get("items", {}), f"{path}.{name}[]")


def schema_of(part: str) -> dict[str, Any]:
    return crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][part]


def test_every_field_of_the_spec_says_its_default_or_that_it_is_required() -> None:
    silent = [
        path
        for path, value in fields(schema_of("spec"), "spec")
        if not any(word in value["description"] for word in ("Default", "Required"))
    ]
    assert silent == []


def test_every_field_of_the_status_is_described() -> None:
    assert [
        path for path, value in fields(schema_of("status"), "status") if len(value.get("description", "")) < 4
    ] == []


def test_the_schema_is_structural() -> None:
    text = json.dumps(crd())
    assert "$ref" not in text
    assert "oneOf" not in text
    for path, value in fields(schema_of("spec"), "spec"):
        assert "type" in value or "x-kubernetes-int-or-string" in value, path


def test_the_schema_sets_no_defaults_but_the_switches() -> None:
    found = {path: value["default"] for path, value in fields(schema_of("spec"), "spec") if "default" in value}
    assert found == {"spec.suspend": False, "spec.cancel": False, "spec.policy": {}, "spec.placement": {}}


def test_the_checked_in_crd_is_the_generated_one_and_small_enough() -> None:
    path = ROOT / "crds" / "finetunejobs.yaml"
    text = path.read_text()
    assert text.startswith(HEADER)
    assert YAML(typ="safe").load(text) == json.loads(json.dumps(crd()))
    assert path.stat().st_size < 200_000


def test_a_field_has_a_constant_default_or_words_for_it_but_not_both() -> None:
    def walk(model: Any) -> Iterator[tuple[str, Any]]:
        for name, info in model.model_fields.items():
            yield f"{model.__name__}.{name}", info
            for one in [info.annotation, *getattr(info.annotation, "__args__", ())]:
                if hasattr(one, "model_fields"):
                    yield from walk(one)

    for path, info in walk(FineTuneJobSpec):
        extra = info.json_schema_extra or {}
        assert not (DEFAULT in extra and DEFAULT_TEXT in extra), path


def test_rows_of_the_not_yet_table_name_real_fields() -> None:
    assert all(wire_path(row.path) for row in UNSUPPORTED_FIELDS)
    assert unsupported_fields(FineTuneJobSpec.model_validate(MINIMAL)) == []


def test_unknown_fields_and_non_numbers_are_refused() -> None:
    for change in (
        {"training": {"learninRate": 1}},
        {"training": {"learningRate": float("nan")}},
        {"training": {"maxSteps": 0}},
    ):
        with pytest.raises(ValidationError):
            FineTuneJobSpec.model_validate(MINIMAL | change)


@pytest.mark.parametrize(
    "change", [{"training": {"maxSteps": True}}, {"training": {"maxSteps": "3"}}, {"suspend": "true"}]
)
def test_loading_is_as_strict_as_the_api_server(change: dict[str, Any]) -> None:
    assert load_spec(MINIMAL | {"training": {"learningRate": 1}, "method": {"type": "qlora"}}).training.learning_rate == 1
    with pytest.raises(ValidationError):
        load_spec(MINIMAL | change)


def run_config() -> RunConfig:
    return RunConfig(
        name="job", namespace="team", uid="u-1", attempt=1, spec=resolved().spec,
        world=World(nodes=2, processes_per_node=4, gpus_per_node=4, master_address="job-1-0.job-1", master_port=29400, rendezvous_id="u-1-1"),
        storage=StoreTarget(uri="s3://bucket/team/job/u-1"), resume=Resume(mode="auto"), grace_seconds=300,
    )  # fmt: skip


def test_the_run_configuration_survives_the_way_to_the_pod() -> None:
    run = run_config()
    data = run.to_bytes()
    assert RunConfig.model_validate_json(data) == run
    assert RunConfig.model_validate_json(data).to_bytes() == data
    assert run.world.size == 8
    assert len(data) < names.MAX_RUN_BYTES


def test_last_words_fit_into_what_a_kubelet_keeps() -> None:
    words = TerminationMessage(
        class_="Data", code="DatasetRowInvalid", message="ü" * 5000, hint="h" * 3000, metrics=Metrics(train_loss=1.0),
        checkpoints=[Checkpoint(step=i, uri="s3://bucket/" + "x" * 300) for i in range(6)], resolved=Resolved(notes=["n" * 900]),
    )  # fmt: skip
    text = words.to_json()
    assert len(text.encode()) <= names.MAX_TERMINATION_BYTES
    found = TerminationMessage.model_validate_json(text)
    assert (found.class_, found.code, found.checkpoints) == ("Data", "DatasetRowInvalid", [])
    assert found.message and found.message.endswith(" ...")


def test_last_words_survive_half_a_character() -> None:
    words = TerminationMessage(class_="Internal", code="Unclassified", message="torn \udcff" + "x" * 5000)
    text = words.to_json()
    assert len(text.encode()) <= names.MAX_TERMINATION_BYTES
    assert TerminationMessage.model_validate_json(text).message.startswith("torn ?")


def test_failures_cross_process_borders() -> None:
    import pickle

    error = DataError("DatasetEmpty", "no rows", hint="add rows")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.code, copy.hint, copy.failure_class, copy.exit_code) == (
        DataError,
        "DatasetEmpty",
        "add rows",
        "Data",
        65,
    )


@pytest.mark.parametrize("endpoint", ["https://s3.example.com", "http://10.0.0.7:8333/", "http://[fd00::7]:8333"])
def test_an_endpoint_is_scheme_and_host(endpoint: str) -> None:
    assert load_spec(MINIMAL | {"storage": {"endpoint": endpoint}}).storage.endpoint == endpoint


@pytest.mark.parametrize("endpoint", ["https://key:secret@s3.example.com", "https://s3.example.com/bucket", "s3.example.com"])
def test_an_endpoint_has_no_credentials_and_no_path(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="storage.endpoint"):
        load_spec(MINIMAL | {"storage": {"endpoint": endpoint}})
