"""The run configuration that the operator gives to pods, and the termination message that the pods return to it."""

from __future__ import annotations

import pytest
from finetune_api import names
from finetune_api.defaults import resolve_defaults
from finetune_api.pod import ResumeConfig, RunConfig, StoreTarget, TerminationMessage, World
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import EvaluationMetric
from finetune_api.status import Checkpoint, EvaluationResult, Metrics, ResolvedConfig

MINIMAL_SPEC = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def make_run_config() -> RunConfig:
    return RunConfig(
        name="job", namespace="team", uid="u-1", attempt=1, spec=resolve_defaults(FineTuneJobSpec.model_validate(MINIMAL_SPEC)).spec,
        world=World(nodes=2, processes_per_node=4, gpus_per_node=4, master_address="job-1-0.job-1", master_port=29400, rendezvous_id="u-1-1"),
        storage=StoreTarget(uri="s3://bucket/team/job/u-1"), resume=ResumeConfig(mode="auto"), grace_seconds=300,
    )  # fmt: skip


def test_a_run_config_does_not_change_when_it_is_written_and_read() -> None:
    run = make_run_config()
    data = run.to_bytes()
    assert RunConfig.model_validate_json(data) == run
    assert RunConfig.model_validate_json(data).to_bytes() == data
    assert run.world.size == 8
    assert len(data) < names.MAX_RUN_BYTES


def test_a_termination_message_has_at_most_4096_bytes() -> None:
    message = TerminationMessage(
        class_="Data", code="DatasetRowInvalid", message="ü" * 5000, hint="h" * 3000, metrics=Metrics(train_loss=1.0),
        checkpoints=[Checkpoint(step=i, uri="s3://bucket/" + "x" * 300) for i in range(6)], resolved=ResolvedConfig(notes=["n" * 900]),
    )  # fmt: skip
    text = message.to_json()
    assert len(text.encode()) <= names.MAX_TERMINATION_BYTES
    parsed_message = TerminationMessage.model_validate_json(text)
    assert (parsed_message.class_, parsed_message.code, parsed_message.checkpoints) == ("Data", "DatasetRowInvalid", [])
    assert parsed_message.message and parsed_message.message.endswith(" ...")


def make_large_evaluation(gate_count: int) -> EvaluationResult:
    numbers = {"value": 0.123456, "base": 0.123456, "difference": 0.123456, "low": 0.123456, "high": 0.123456}
    gates = [{"metric": "answerCorrectness", "passed": i % 2 == 0, "text": "t" * 150} for i in range(gate_count)]
    return EvaluationResult.model_validate({"rows": 200, "metrics": {metric.value: numbers for metric in EvaluationMetric}, "gates": gates})


@pytest.mark.parametrize(
    ("gate_count", "text_length", "has_metrics", "gates_with_text"),
    [(2, 0, True, 2), (16, 0, True, 8), (16, 900, False, 8), (0, 3900, False, 0)],
    ids=["all fits", "texts of passed gates are dropped", "metrics are dropped", "the evaluation is dropped"],
)
def test_a_long_termination_message_keeps_the_gates_and_drops_other_results_first(
    gate_count: int, text_length: int, has_metrics: bool, gates_with_text: int
) -> None:
    message = TerminationMessage(message="m" * text_length, evaluation=make_large_evaluation(gate_count), resolved=ResolvedConfig(notes=["n" * 900]))
    text = message.to_json()
    assert len(text.encode()) <= names.MAX_TERMINATION_BYTES
    evaluation = TerminationMessage.model_validate_json(text).evaluation or EvaluationResult()
    assert bool(evaluation.metrics) is has_metrics
    assert sum(gate.text is not None for gate in evaluation.gates or []) == gates_with_text
    assert len(evaluation.gates or []) == gate_count


def test_a_termination_message_with_long_addresses_keeps_the_address_of_the_model() -> None:
    root = "s3://" + "b" * 507 + "/namespace/name/uid/"
    address_fields = ("uri", "mergedUri", "publishedUri", "hubUri", "reportUri", "lineageUri")
    artefact = {"artefact": "adapter", "result": "NotVerified", "code": "X", "reason": "r" * 300, "difference": 0.1, "tolerance": 0.1, "changeFromBase": 0.1}
    output = {name: root + name for name in address_fields} | {
        "sha256": "a" * 64, "kind": "adapter", "promoted": True, "evaluation": {"testLoss": 1.0},
        "verification": {"result": "NotVerified", "rows": 8, "tokens": 412, "artefacts": [artefact] * 3},
    }  # fmt: skip
    message = TerminationMessage.model_validate({
        "class": "Data", "code": "DatasetEmpty", "message": "m" * 1500, "hint": "h" * 500, "stage": "evaluating", "step": 500, "committedStep": 500,
        "checkpoint": root + "checkpoint", "latestCheckpoint": root + "checkpoint", "checkpoints": [{"step": 500, "uri": root}], "output": output,
        "evaluation": make_large_evaluation(16), "metrics": {"trainLoss": 1.0}, "resolved": {"notes": ["n" * 900]},
    })  # fmt: skip
    text = message.to_json()
    assert len(text.encode()) <= names.MAX_TERMINATION_BYTES
    parsed_message = TerminationMessage.model_validate_json(text)
    assert (parsed_message.class_, parsed_message.code, parsed_message.stage) == ("Data", "DatasetEmpty", "evaluating")
    assert parsed_message.output is not None and parsed_message.output.uri == root + "uri" and parsed_message.output.sha256 == "a" * 64
    assert parsed_message.output.lineage_uri is None and parsed_message.output.evaluation is None
    assert parsed_message.output.verification is not None
    assert [parsed_artefact.reason for parsed_artefact in parsed_message.output.verification.artefacts] == [None] * 3


def test_a_termination_message_with_an_incomplete_character_is_valid_utf8() -> None:
    message = TerminationMessage(class_="Internal", code="Unclassified", message="torn \udcff" + "x" * 5000)
    text = message.to_json()
    assert len(text.encode()) <= names.MAX_TERMINATION_BYTES
    assert TerminationMessage.model_validate_json(text).message.startswith("torn ?")
