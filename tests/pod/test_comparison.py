"""Failed gates, a stop before the comparison with the base model, jobs that evaluate another job's model, and prompts from a ConfigMap.

`test_stages.py` tests a comparison that succeeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import Env, ExitCode
from finetune_api.pod import StoreTarget
from finetune_api.status import Output, Stage
from pod_harness import UID, Pod, merge, run_config, write_rows

from tests.support.tiny import make_tiny_model

METRICS = ["perplexity", "accuracy", "precision", "recall", "f1", "bleu", "rouge"]
PASSING_GATES = [
    {"metric": "perplexity", "op": "le", "value": 1000},
    {"metric": "loss", "notWorseThanBase": {"margin": 5}},
    {"metric": "rouge", "notWorseThanBase": {"margin": 1}},
]
FAILING_GATES = [{"metric": "perplexity", "op": "le", "value": 1000}, {"metric": "accuracy", "op": "ge", "value": 1}]
OTHER_JOB_UID = "99999999-2222-3333-4444-555555555555"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_comparing_pod(folder: Path, model: Path, spec: dict[str, Any], *, attempt: int = 1, uid: str = UID) -> Pod:
    rows = write_rows(folder / "rows.jsonl")
    base_spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "split": {"train": 28 / 36, "test": 8 / 36}},
        "training": {"maxSteps": 4, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 1e-2},
        "checkpoint": {"steps": 2}, "tracking": {"loggingSteps": 1}, "method": {"type": "lora"},
        "evaluation": {"metrics": METRICS, "comparison": {"generation": {"maxNewTokens": 8}}}, "output": {"dir": "results", "layout": "flat"},
    }  # fmt: skip
    run = run_config(merge(base_spec, spec), StoreTarget(uri=f"file://{folder}/store/team/job/{uid}"), attempt=attempt)
    publish = f"file://{folder}/store/results" if run.spec.output.dir else None
    return Pod(run.model_copy(update={"publish": publish, "uid": uid}), folder / f"pod-{uid[0]}-{attempt}")


def stored_path(folder: Path, key: str, uid: str = UID) -> Path:
    """Return the path of an object in the job's storage folder."""
    return folder / "store" / "team" / "job" / uid / key


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below the folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_failed_gate_keeps_the_model_and_publishes_nothing_in_every_attempt(model: Path, tmp_path: Path) -> None:
    spec = {"evaluation": {"gates": FAILING_GATES, "comparison": None, "metrics": ["perplexity", "accuracy"]}}
    for attempt in (1, 2):
        with make_comparing_pod(tmp_path, model, spec, attempt=attempt) as pod:
            assert pod.end() == ExitCode.GATE_FAILED, pod.text[-6000:]
            message = pod.termination_message()
        assert message.output is not None and message.output.promoted is False and message.output.published_uri is None
        assert (message.class_, message.code, message.stage) == ("Model", "GateFailed", Stage.EVALUATING)
        assert (message.message or "").endswith("and the gate requires at least 1") and "accuracy is 0." in (message.message or "")
        assert [gate.passed for gate in (message.evaluation and message.evaluation.gates) or []] == [True, False]
        assert stored_path(tmp_path, "model/_COMMITTED").exists() and not stored_path(tmp_path, "model/_PROMOTED").exists()
        assert not (tmp_path / "store" / "results").exists() and not stored_path(tmp_path, "run/stages/comparing.json").exists()
    assert json.loads(stored_path(tmp_path, "run/stages/evaluating.json").read_text())["attempt"] == 1


@pytest.mark.slow  # test_evaluation.py has a similar test, which stops a pod during its evaluation
@pytest.mark.faults
def test_the_next_attempt_compares_after_a_pod_was_stopped_before_the_comparison(model: Path, tmp_path: Path) -> None:
    """Full training stores a complete model, so the comparison must load the base model separately."""
    spec = {"method": {"type": "full"}, "evaluation": {"gates": [{"metric": "loss", "notWorseThanBase": {"margin": 50}}]}}
    with make_comparing_pod(tmp_path, model, spec) as stopped_pod:
        stopped_pod.wait_until(lambda: (report := stopped_pod.report()) is not None and report.stage is Stage.COMPARING)
        stopped_pod.terminate()
        assert stopped_pod.end() == ExitCode.PREEMPTED_SAVED, stopped_pod.text[-6000:]
    assert (stopped_pod.termination_message().evaluation or pytest.fail("the stopped pod did not report its evaluation")).gates is None
    evaluating_record = json.loads(stored_path(tmp_path, "run/stages/evaluating.json").read_text())
    with make_comparing_pod(tmp_path, model, spec, attempt=2) as resumed_pod:
        assert resumed_pod.end() == ExitCode.OK, resumed_pod.text[-6000:]
        message = resumed_pod.termination_message()
    assert message.evaluation is not None and (message.evaluation.metrics or {})["loss"].low is not None
    assert message.output is not None and message.output.promoted is True and stored_path(tmp_path, "model/_PROMOTED").exists()
    assert json.loads(stored_path(tmp_path, "run/stages/evaluating.json").read_text()) == evaluating_record
    assert json.loads(stored_path(tmp_path, "run/stages/comparing.json").read_text())["attempt"] == 2


EVALUATION_ONLY_SPEC: dict[str, Any] = {
    "phases": {"train": False}, "evaluation": {"gates": PASSING_GATES[:2], "metrics": ["perplexity", "accuracy"], "comparison": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained_job(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Output]:
    """Run a job that trains without an evaluation. Returns the folder of its files, and its output."""
    folder = tmp_path_factory.mktemp("trained")
    with make_comparing_pod(folder, model, {"evaluation": {"metrics": None, "comparison": None}}, uid=OTHER_JOB_UID) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        output = pod.termination_message().output
    assert output is not None and output.uri is not None
    return folder, output


def test_a_job_without_training_evaluates_the_model_of_another_job_and_leaves_its_folder_unchanged(
    trained_job: tuple[Path, Output], model: Path
) -> None:
    folder, other_output = trained_job
    other_files = read_files(stored_path(folder, "", OTHER_JOB_UID))
    with make_comparing_pod(folder, model, merge(EVALUATION_ONLY_SPEC, {"phases": {"from": other_output.uri}})) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        message = pod.termination_message()
        assert "step 1/4" not in pod.text and not pod.pids("agent")
    assert message.output is not None
    assert (message.output.uri, message.output.sha256, message.output.kind) == (other_output.uri, other_output.sha256, "adapter")
    assert message.output.promoted is True and message.progress is not None
    assert (message.progress.total_steps, message.progress.display, message.checkpoints) == (None, None, [])
    assert message.evaluation is not None and (message.evaluation.metrics or {})["loss"].low is not None
    assert read_files(stored_path(folder, "", OTHER_JOB_UID)) == other_files
    assert json.loads(stored_path(folder, "model/_PROMOTED").read_text())["manifestSha256"] == other_output.sha256
    assert json.loads(stored_path(folder, "run/given_model.json").read_text())["uri"] == other_output.uri
    assert {path.name for path in stored_path(folder, "run/stages").iterdir()} == {"evaluating.json", "comparing.json", "uploading.json"}


@pytest.mark.slow
@pytest.mark.faults
def test_a_job_without_training_runs_every_stage_on_a_checkpoint_of_another_job(trained_job: tuple[Path, Output], model: Path) -> None:
    folder, _ = trained_job
    uri, uid = f"file://{stored_path(folder, 'checkpoints/step-00000002', OTHER_JOB_UID)}", UID.replace("1", "2")
    output = {"dir": None, "layout": None, "mergeAdapter": True, "verify": True}
    evaluation = {"gates": None, "benchmarks": [{"name": "human-eval", "limit": 2}]}
    spec = merge(EVALUATION_ONLY_SPEC, {"phases": {"from": uri}, "evaluation": evaluation, "output": output})
    with make_comparing_pod(folder, model, spec, uid=uid) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        message = pod.termination_message()
        assert not list((pod.folder / "work" / "final-model").rglob("optimizer*"))
    assert message.output is not None and message.output.kind == "adapter" and (message.output.uri or "").startswith(f"{uri}/a1-")
    assert message.evaluation is not None and message.evaluation.rows == 8 and message.output.promoted is None
    stages = {path.stem for path in stored_path(folder, "run/stages", uid).glob("*.json")}
    assert stages == {"evaluating", "merging", "verifying", "benchmarking"}
    assert (message.output.merged_uri or "").startswith(f"file://{stored_path(folder, 'merged', uid)}/a1-")
    assert stored_path(folder, "evaluation/human_rating.csv", uid).exists()
    verification = message.output.verification
    assert verification is not None and verification.result == "NotVerified"
    reason = "the model is a checkpoint, and a trainer records reference values only for its final model"
    assert [(artefact.artefact, artefact.code, artefact.reason) for artefact in verification.artefacts] == [
        ("adapter", "NoReferenceValues", reason), ("merged", "NoReferenceValues", reason),
    ]  # fmt: skip


def test_an_adapter_of_another_base_model_is_refused_before_any_stage(trained_job: tuple[Path, Output], tmp_path: Path) -> None:
    folder, other_output = trained_job
    other_base = make_tiny_model(tmp_path / "other", seed=5)
    spec = merge(EVALUATION_ONLY_SPEC, {"phases": {"from": other_output.uri}})
    with make_comparing_pod(folder, other_base, spec, uid=UID.replace("1", "3")) as pod:
        assert pod.end() == ExitCode.CONFIG_INVALID, pod.text[-6000:]
        message = pod.termination_message()
    assert (message.code, message.output, message.stage) == ("ExistingModelOfOtherBase", None, None)
    assert "which was trained from the base model" in (message.message or "") and "model.source" in (message.hint or "")


@pytest.mark.slow
def test_base_and_trained_model_answer_the_prompts_and_invalid_prompts_end_the_job_before_training(
    model: Path, tmp_path: Path
) -> None:
    config_map_folder = tmp_path / "maps" / "prompts"
    config_map_folder.mkdir(parents=True)
    (config_map_folder / "good").write_text("What is 2 + 3?\n\nName a city\nin France.\n")
    (config_map_folder / "empty").write_text(" \n")
    (config_map_folder / "latin").write_bytes("Grüße".encode("latin-1"))

    def make_prompt_pod(prompts_key: str, attempt: int) -> Pod:
        comparison = {"promptsRef": {"name": "prompts", "key": prompts_key}, "generation": {"maxNewTokens": 4}}
        spec = {"evaluation": {"metrics": None, "comparison": comparison}, "output": {"dir": None, "layout": None}}
        pod = make_comparing_pod(tmp_path, model, spec, attempt=attempt)
        pod.env = {Env.CONFIG_MAPS.value: str(tmp_path / "maps")}
        return pod

    refusals = (("empty", "PromptsEmpty", "no prompts"), ("latin", "PromptsNotUtf8", "byte 3 is not valid UTF-8"))
    for attempt, (key, code, expected_text) in enumerate(refusals, 1):
        with make_prompt_pod(key, attempt) as refused_pod:
            assert refused_pod.end() == ExitCode.DATA_INVALID, refused_pod.text[-6000:]
        message = refused_pod.termination_message()
        assert message.code == code and f"ConfigMap prompts, key {key}: {expected_text}" in (message.message or "") and message.hint
        assert "step 1/4" not in refused_pod.text
    with make_prompt_pod("good", 3) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    comparison = json.loads(stored_path(tmp_path, "evaluation/model_comparison.json").read_text())
    assert comparison["metadata"]["prompts_file"] == "configmap://prompts/good" and comparison["metadata"]["num_prompts"] == 2
    assert [(row["prompt_id"], row["prompt"]) for row in comparison["comparisons"]] == [(1, "What is 2 + 3?"), (2, "Name a city\nin France.")]
    assert all(row.keys() >= {"base_model_response", "finetuned_model_response", "timestamp", "prompt_preview"} for row in comparison["comparisons"])
    evaluation = pod.termination_message().evaluation
    assert evaluation is not None and evaluation.metrics is None and evaluation.rows is None and evaluation.predictions_uri is None
    assert evaluation.comparison_uri == f"file://{stored_path(tmp_path, 'evaluation/model_comparison.json')}"
