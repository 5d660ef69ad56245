"""kstatus (of Flux and Helm) and the health script for Argo CD give the right verdict in each phase of a FineTuneJob. The GitOps examples are complete."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api import rules
from finetune_api.names import API_VERSION, KIND, FailureClass, Phase, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.schema import build_crd_yaml
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Output
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.report import compute_status

from localcluster.build import ensure_built
from tests.unit.operator.samples import at, end_pod, facts, job, pod, report, spec, status

GITOPS = Path(__file__).resolve().parents[3] / "examples/gitops"
STARTED_ATTEMPT = {"number": 1, "startTime": "2026-11-21T12:00:00Z"}
RUNNING_STATUS = {"attempt": 1, "startTime": "2026-11-21T12:00:00Z", "attempts": [STARTED_ATTEMPT]}
RETRIED_STATUS = {**RUNNING_STATUS, "attempt": 2, "attempts": [
    {**STARTED_ATTEMPT, "endTime": "2026-11-21T12:01:00Z", "reason": "Preempted"}, {"number": 2, "startTime": "2026-11-21T12:02:00Z"},
]}  # fmt: skip
QUEUED_SPEC = spec(placement={"queueName": "q"})
IN_PROGRESS, CURRENT, FAILED = ("InProgress", "Progressing"), ("Current", "Healthy"), ("Failed", "Degraded")


PREPARED_JOB = job(0, name="run-prepare1", uid="prepare-1", completed_at=at(50))
PREPARED_POD = pod(0, name="run-prepare1-0-x", uid="pod-prepare-1", job_uid="prepare-1")
ADOPTION_MESSAGE = TerminationMessage(exit_code=0, output=Output(uri="s3://models/test/team/run/old/model/a1-12345678", adopted_uid="old"))
POD_WITH_EXISTING_RESULT = end_pod(PREPARED_POD, 64, TerminationMessage(class_=FailureClass.USER, code="ExistingResultFound", message="stored", exit_code=64))
ADOPTING_FACTS = facts(
    spec=spec(prepare={"strategy": "always"}), status=status(preparation={"number": 1, "startTime": "2026-11-21T12:00:00Z"}),
    jobs=[PREPARED_JOB], pods=[end_pod(PREPARED_POD, 0, ADOPTION_MESSAGE)],
)  # fmt: skip


def make_facts_in_stage(stage: str, step: int) -> Facts:
    received_report = report(stage=stage, progress={"step": step, "totalSteps": 10})
    return facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], last_report=received_report)


@dataclass(frozen=True)
class Situation:
    """A situation of a job: what the operator observes, the phase that the operator then reports, and the verdicts that kstatus and Argo CD must give."""

    facts: Facts
    phase: Phase
    verdicts: tuple[str, str] = IN_PROGRESS
    result: ActionResult = ActionResult()


SITUATIONS = {
    "created": Situation(facts(), Phase.PENDING),
    "unknown pool": Situation(facts(spec=spec(resources={"nodePool": "x", "gpusPerNode": 1})), Phase.PENDING),
    "quota": Situation(facts(), Phase.PENDING, result=ActionResult(blocking_condition=BlockingCondition(Reason.QUOTA_EXCEEDED, "no"))),
    "preparing": Situation(facts(spec=spec(prepare={"strategy": "always"})), Phase.PREPARING),
    "queued": Situation(facts(spec=QUEUED_SPEC, jobs=[job(is_suspended=True, started_at=None, queue="q")]), Phase.QUEUED),
    "starting": Situation(facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod(is_ready=False)]), Phase.STARTING),
    "start timeout": Situation(facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod(is_ready=False)], now=at(2000)), Phase.STARTING),
    "validating": Situation(make_facts_in_stage("checking", 0), Phase.VALIDATING),
    "running": Situation(make_facts_in_stage("training", 3), Phase.RUNNING),
    "recovering": Situation(facts(status=status(**RETRIED_STATUS), jobs=[job(2)], pods=[pod(2, is_ready=False)]), Phase.RECOVERING),
    "evaluating": Situation(make_facts_in_stage("evaluating", 10), Phase.EVALUATING),
    "uploading": Situation(make_facts_in_stage("uploading", 10), Phase.UPLOADING),
    "suspending": Situation(facts(spec=spec(suspend=True), status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()]), Phase.SUSPENDING),
    "suspended": Situation(facts(spec=spec(suspend=True)), Phase.SUSPENDED, ("Current", "Suspended")),
    "cancelling": Situation(facts(spec=spec(cancel=True), status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()]), Phase.CANCELLING),
    "cancelled": Situation(facts(spec=spec(cancel=True)), Phase.CANCELLED, CURRENT),
    "succeeded": Situation(
        facts(status=status(**RUNNING_STATUS), jobs=[job(completed_at=at(60))], pods=[end_pod(pod(), 0)]), Phase.SUCCEEDED, CURRENT
    ),
    "adopted": Situation(ADOPTING_FACTS, Phase.SUCCEEDED, CURRENT),
    "existing result": Situation(
        replace(
            ADOPTING_FACTS, jobs=(replace(PREPARED_JOB, completed_at=None, failed_at=at(50), failed_reason="BackoffLimitExceeded"),),
            pods=(POD_WITH_EXISTING_RESULT,),
        ),
        Phase.FAILED, FAILED,
    ),
    "failed": Situation(
        facts(status=status(**RUNNING_STATUS), jobs=[job(failed_at=at(60), failed_reason="BackoffLimitExceeded")], pods=[end_pod(pod(), 65)], now=at(61)),
        Phase.FAILED, FAILED,
    ),
}  # fmt: skip


def make_job_in_situation(situation: Situation) -> dict[str, Any]:
    """Return a FineTuneJob with the status that the operator writes in this situation."""
    job_facts = situation.facts
    new_status = compute_status(job_facts, decide(job_facts), situation.result)
    body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "run", "namespace": "team", "generation": job_facts.job.generation}}
    return body | {"spec": job_facts.job.spec, "status": new_status.to_wire()}


def judge(*objects: dict[str, Any]) -> list[tuple[str, str, str]]:
    """For each object, return the status that kstatus reports, and the status and message that the health script reports."""
    if shutil.which("go") is None:
        pytest.skip("needs Go")
    lines = "".join(json.dumps(item) + "\n" for item in objects)
    completed_process = subprocess.run([ensure_built("verdicts"), GITOPS / "argocd/health.lua"], input=lines, capture_output=True, text=True)
    assert completed_process.returncode == 0, completed_process.stderr
    return [(line["kstatus"], line["argo"], line["message"]) for line in map(json.loads, completed_process.stdout.splitlines())]


def test_there_is_a_situation_for_each_phase() -> None:
    assert {situation.phase for situation in SITUATIONS.values()} == set(Phase)
    assert {name: make_job_in_situation(situation)["status"]["phase"] for name, situation in SITUATIONS.items()} == {
        name: situation.phase.value for name, situation in SITUATIONS.items()
    }


def derive_verdict_from_conditions(body: dict[str, Any]) -> tuple[str, str]:
    """Compute the verdicts of kstatus and Argo CD from only the conditions of a job, which `kubectl wait --for=condition=...` also reads."""
    status_and_reason_by_type = {condition["type"]: (condition["status"], condition["reason"]) for condition in body["status"]["conditions"]}
    if status_and_reason_by_type["Suspended"][0] == "True":
        return "Current", "Suspended"
    if status_and_reason_by_type["Finished"][0] == "False":
        return IN_PROGRESS
    return CURRENT if status_and_reason_by_type["Succeeded"][0] == "True" or status_and_reason_by_type["Finished"][1] == Reason.CANCELLED else FAILED


def test_the_conditions_for_kubectl_wait_agree_with_the_verdicts() -> None:
    verdicts = {name: derive_verdict_from_conditions(make_job_in_situation(situation)) for name, situation in SITUATIONS.items()}
    assert verdicts == {name: situation.verdicts for name, situation in SITUATIONS.items()} | {"start timeout": IN_PROGRESS}
    reasons = {name: make_job_in_situation(SITUATIONS[name])["status"]["reason"] for name in ("adopted", "existing result", "succeeded")}
    assert reasons == {"adopted": "ExistingResultAdopted", "existing result": "ExistingResultFound", "succeeded": "-"}


@pytest.mark.slow
def test_kstatus_and_argo_cd_agree_in_each_phase() -> None:
    verdicts = judge(*(make_job_in_situation(situation) for situation in SITUATIONS.values()))
    assert {name: verdict[:2] for name, verdict in zip(SITUATIONS, verdicts, strict=True)} == {
        name: situation.verdicts for name, situation in SITUATIONS.items()
    }
    messages = {name: verdict[2] for name, verdict in zip(SITUATIONS, verdicts, strict=True)}
    assert messages["quota"] == "Pending: no"
    assert messages["suspended"] == "Suspended: set spec.suspend to false to continue."
    assert messages["succeeded"] == "Succeeded"


@pytest.mark.slow
def test_status_that_the_operator_has_not_written_is_in_progress() -> None:
    succeeded_job = make_job_in_situation(SITUATIONS["succeeded"])
    job_without_status = {key: value for key, value in succeeded_job.items() if key != "status"}
    crd = yaml.load(build_crd_yaml(), yaml.CSafeLoader)
    default_status = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["default"]
    changed_job = succeeded_job | {"metadata": succeeded_job["metadata"] | {"generation": 2}}
    deleted_job = succeeded_job | {"metadata": succeeded_job["metadata"] | {"deletionTimestamp": "2026-11-21T12:00:00Z"}}
    default_verdict, changed_verdict, deleted_verdict = judge(job_without_status | {"status": default_status}, changed_job, deleted_job)
    assert (default_verdict[:2], changed_verdict[:2]) == (IN_PROGRESS, IN_PROGRESS)
    assert deleted_verdict[0] == "Terminating"
    (missing_verdict,) = judge(job_without_status)
    assert missing_verdict[1] == "Progressing", "kstatus reports an object without status as Current, so the CRD has a default status"


def test_the_config_map_of_argo_cd_contains_the_script() -> None:
    data = yaml.safe_load((GITOPS / "argocd/argocd-cm.yaml").read_text("utf-8"))["data"]
    assert data["resource.customizations.health.finetune-operator.io_FineTuneJob"] == (GITOPS / "argocd/health.lua").read_text("utf-8")
    pointers = yaml.safe_load(data["resource.customizations.ignoreResourceUpdates.finetune-operator.io_FineTuneJob"])["jsonPointers"]
    crd = yaml.load(build_crd_yaml(), yaml.CSafeLoader)
    properties = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    assert {pointer.removeprefix("/status/") for pointer in pointers} <= set(properties)


def read_documents(name: str) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all((GITOPS / name).read_text("utf-8")) if item]


def test_chart_values_of_the_examples_are_accepted(helm: Path, root: Path) -> None:
    (release,) = [item for item in read_documents("flux/operator.yaml") if item["kind"] == "HelmRelease"]
    operator, _ = read_documents("argocd/applications.yaml")
    for values in (release["spec"]["values"], operator["spec"]["source"]["helm"]["valuesObject"]):
        command = [helm, "template", "rel", root / "helm/finetune-operator", "-f", "-"]
        completed_process = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)
        assert completed_process.returncode == 0, completed_process.stderr


def test_gitops_tools_create_jobs_after_the_operator() -> None:
    waves = {item["metadata"]["name"]: item["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"] for item in read_documents("argocd/applications.yaml")}
    assert waves == {"finetune-operator": "0", "finetune-jobs-team-a": "1"}
    flux_specs = {(item["kind"], item["metadata"]["name"]): item["spec"] for item in read_documents("flux/jobs.yaml")}
    jobs_spec = flux_specs["Kustomization", "team-a-jobs"]
    assert jobs_spec["dependsOn"] == [{"name": "finetune-operator"}]
    assert flux_specs["Kustomization", "finetune-operator"]["wait"] is True
    for path in (jobs_spec["path"], read_documents("argocd/applications.yaml")[1]["spec"]["source"]["path"]):
        assert (GITOPS.parents[1] / path / "kustomization.yaml").is_file()


@pytest.mark.slow
def test_kustomize_builds_a_run_from_the_base() -> None:
    command = [ensure_built("kube"), "kubectl", "kustomize", GITOPS / "jobs/team-a"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    built_job = yaml.safe_load(text)
    (health_check,) = next(item["spec"]["healthChecks"] for item in read_documents("flux/jobs.yaml") if "healthChecks" in item["spec"])
    assert (built_job["kind"], built_job["metadata"]["name"], built_job["metadata"]["namespace"]) == (KIND, health_check["name"], health_check["namespace"])
    built_spec = FineTuneJobSpec.model_validate(built_job["spec"])
    assert rules.check_spec(built_spec) == []
    assert (built_spec.training.epochs, built_spec.training.learning_rate) == (3, 0.0001)
