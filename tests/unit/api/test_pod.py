"""The data that operator and pods exchange: run configuration and termination message."""

from __future__ import annotations

from finetune_api import names
from finetune_api.defaults import resolve_defaults
from finetune_api.pod import ResumeConfig, RunConfig, StoreTarget, TerminationMessage, World
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Checkpoint, Metrics, ResolvedConfig

MINIMAL_SPEC = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def run_config() -> RunConfig:
    return RunConfig(
        name="job", namespace="team", uid="u-1", attempt=1, spec=resolve_defaults(FineTuneJobSpec.model_validate(MINIMAL_SPEC)).spec,
        world=World(nodes=2, processes_per_node=4, gpus_per_node=4, master_address="job-1-0.job-1", master_port=29400, rendezvous_id="u-1-1"),
        storage=StoreTarget(uri="s3://bucket/team/job/u-1"), resume=ResumeConfig(mode="auto"), grace_seconds=300,
    )  # fmt: skip


def test_run_config_is_equal_after_reading_its_bytes() -> None:
    run = run_config()
    data = run.to_bytes()
    assert RunConfig.model_validate_json(data) == run
    assert RunConfig.model_validate_json(data).to_bytes() == data
    assert run.world.size == 8
    assert len(data) < names.MAX_RUN_BYTES


def test_termination_message_fits_into_4096_bytes() -> None:
    message = TerminationMessage(
        class_="Data", code="DatasetRowInvalid", message="ü" * 5000, hint="h" * 3000, metrics=Metrics(train_loss=1.0),
        checkpoints=[Checkpoint(step=i, uri="s3://bucket/" + "x" * 300) for i in range(6)], resolved=ResolvedConfig(notes=["n" * 900]),
    )  # fmt: skip
    text = message.to_json()
    assert len(text.encode()) <= names.MAX_TERMINATION_BYTES
    parsed = TerminationMessage.model_validate_json(text)
    assert (parsed.class_, parsed.code, parsed.checkpoints) == ("Data", "DatasetRowInvalid", [])
    assert parsed.message and parsed.message.endswith(" ...")


def test_termination_message_with_half_a_character_is_valid_utf8() -> None:
    message = TerminationMessage(class_="Internal", code="Unclassified", message="torn \udcff" + "x" * 5000)
    text = message.to_json()
    assert len(text.encode()) <= names.MAX_TERMINATION_BYTES
    assert TerminationMessage.model_validate_json(text).message.startswith("torn ?")
