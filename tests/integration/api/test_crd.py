"""The CRD on a real API server: no warnings, structural, and its CEL rules say what the Python rules say."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from finetune_api import names
from finetune_api.rules import RULES, check
from finetune_api.spec import FineTuneJobSpec
from ruamel.yaml import YAML

from localcluster.api import Endpoint

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
CRD_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
JOBS_PATH = f"/apis/{names.API_VERSION}/namespaces/default/{names.PLURAL}"
MINIMAL: dict[str, Any] = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: Message

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


def call(
    api: Endpoint, method: str, path: str, body: Any = None, *, kind: str = "application/json", **query: str
) -> Answer:
    """One request with the answer's headers: warnings travel there."""
    url = api.server + path + (f"?{urlencode(query)}" if query else "")
    request = urllib.request.Request(url, method=method, data=None if body is None else json.dumps(body).encode())
    request.add_header("Authorization", f"Bearer {api.token}")
    request.add_header("Content-Type", kind)
    context = ssl.create_default_context(cafile=str(api.ca))
    try:
        with urllib.request.urlopen(request, context=context, timeout=20) as answer:
            return Answer(answer.status, json.loads(answer.read()), answer.headers)
    except urllib.error.HTTPError as error:
        return Answer(error.code, json.loads(error.read()), error.headers)


@pytest.fixture(scope="module")
def api(control_plane: Endpoint, crd_installed: Answer) -> Endpoint:
    return control_plane


@pytest.fixture(scope="module")
def crd_installed(control_plane: Endpoint) -> Answer:
    crd = YAML(typ="safe").load((ROOT / "crds" / "finetunejobs.yaml").read_text())
    path = f"{CRD_PATH}/{crd['metadata']['name']}"
    answer = call(
        control_plane, "PATCH", path, crd, kind="application/apply-patch+yaml", fieldManager="test", force="true"
    )
    assert answer.status in (200, 201), answer.message
    watch = {"fieldSelector": f"metadata.name={crd['metadata']['name']}", "watch": "true", "timeoutSeconds": "30"}
    request = urllib.request.Request(f"{control_plane.server}{CRD_PATH}?{urlencode(watch)}")
    request.add_header("Authorization", f"Bearer {control_plane.token}")
    context = ssl.create_default_context(cafile=str(control_plane.ca))
    with urllib.request.urlopen(request, context=context, timeout=40) as lines:
        for line in lines:
            conditions = json.loads(line)["object"].get("status", {}).get("conditions") or []
            if {c["type"]: c["status"] for c in conditions}.get("Established") == "True":
                break
        else:
            pytest.fail("the CRD was not established within 30 s")
    return answer


def manifest(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


SEALED = {"type": "customerKey", "customerKeySecretRef": {"name": "sse", "key": "key"}}


def dry_run(api: Endpoint, spec: dict[str, Any], name: str = "job") -> Answer:
    return call(api, "POST", JOBS_PATH, manifest(name, spec), dryRun="All", fieldValidation="Strict")


def test_it_is_accepted_without_a_warning_and_is_structural(control_plane: Endpoint, crd_installed: Answer) -> None:
    assert crd_installed.headers.get_all("Warning") is None
    found = call(control_plane, "GET", f"{CRD_PATH}/{names.PLURAL}.{names.GROUP}").body
    conditions = {one["type"]: one["status"] for one in found["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


def test_the_smallest_job_gets_only_the_switches_and_an_unobserved_status(api: Endpoint) -> None:
    answer = dry_run(api, MINIMAL)
    assert answer.status == 201, answer.message
    assert answer.body["spec"] == MINIMAL | {"suspend": False, "cancel": False, "policy": {}, "placement": {}}
    assert answer.body["status"] == {"observedGeneration": -1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"learningRate": "2e-4"}}, ["spec.training.learningRate", "number"]),
        ({"training": {"learningRate": 0}}, ["spec.training.learningRate", "greater than 0"]),
        ({"training": {"epochs": -1}}, ["spec.training.epochs"]),
        ({"method": {"lora": {"rank": 1.5}}}, ["spec.method.lora.rank", "integer"]),
        ({"method": {"type": "qlorra"}}, ["spec.method.type", '"qlora"']),
        ({"training": {"learnRate": 1}}, ['unknown field "spec.training.learnRate"']),
        ({"placement": {"volumeMounts": [{"name": "x", "mountPath": "/x"}]}}, ["placement.volumes"]),
        ({"trainer": {"rewards": [{"weight": 1}]}}, ["exactly one"]),
        ({"training": {"warmupSteps": 1, "warmupRatio": 0.1}}, ["exclude each other"]),
        ({"storage": {"encryption": {"type": "s3", "kmsKeyId": "alias/x"}}}, ["kmsKeyId only goes with type kms"]),
        ({"storage": {"encryption": {"type": "customerKey"}}}, ["goes with customerKeySecretRef"]),
        ({"storage": {"endpoint": "http://store:9000", "encryption": SEALED}}, ["write https://"]),
    ],
)
def test_a_bad_value_is_refused_with_its_field(api: Endpoint, change: dict[str, Any], words: list[str]) -> None:
    answer = dry_run(api, MINIMAL | change)
    assert answer.status in (400, 422)
    assert [word for word in words if word not in answer.message] == []


BROKEN: dict[str, dict[str, Any]] = {
    "ModelMissing": {"model": {"dtype": "auto"}},
    "QloraNeedsFourBits": {"method": {"type": "qlora"}, "model": {"source": "a/b", "quantization": {"bits": 8}}},
    "FullNeedsWholeWeights": {"method": {"type": "full"}, "model": {"source": "a/b", "quantization": {"bits": 4}}},
    "AdapterSourceMissing": {"method": {"type": "adapter"}},
    "LoraOnHead": {"method": {"lora": {"targetModules": ["lm_head"]}}},
    "RewardsMissing": {"trainer": {"type": "grpo"}},
    "BestNeedsMatchingSteps": {
        "dataset": {"train": "a/b", "validation": "a/c"},
        "checkpoint": {"loadBestAtEnd": True, "steps": 30},
        "evaluation": {"steps": 20},
    },
    "BackendAndStrategy": {"trainer": {"backend": "unsloth"}, "distributed": {"strategy": "ddp"}},
    "HubRepositoryMissing": {"output": {"hub": {"push": True, "tokenSecretRef": {"name": "h", "key": "t"}}}},
}


def test_every_rule_with_cel_has_a_case_here() -> None:
    assert {rule.code for rule in RULES if rule.cel} == set(BROKEN)


@pytest.mark.parametrize("code", sorted(BROKEN))
def test_cel_and_python_refuse_the_same(api: Endpoint, code: str) -> None:
    spec = MINIMAL | BROKEN[code]
    assert code in {problem.code for problem in check(FineTuneJobSpec.model_validate(spec))}
    answer = dry_run(api, spec)
    assert answer.status == 422
    assert next(rule.message for rule in RULES if rule.code == code) in answer.message


@pytest.mark.parametrize("name", ["a.b", "1job", "a" * 41, "job-"])
def test_names_that_could_not_be_host_names_are_refused(api: Endpoint, name: str) -> None:
    answer = dry_run(api, MINIMAL, name)
    assert answer.status == 422
    assert "metadata.name" in answer.message


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model": {"source": "other/name"}}, "spec.model cannot change after creation: create a new FineTuneJob"),
    ({"training": {"epochs": 5}}, "spec.training cannot change after creation"),
    ({"checkpoint": None}, "spec.checkpoint cannot change after creation"),
    ({"policy": {"retries": 7}}, "spec.policy.retries cannot change after creation"),
    ({"policy": None}, "spec.policy.retries cannot change after creation"),
    ({"placement": {"priorityClassName": "high"}}, "spec.placement.priorityClassName cannot change after creation"),
    ({"placement": {"queueName": "other"}}, "set spec.suspend to true first"),
]


@pytest.fixture(scope="module")
def created(api: Endpoint) -> str:
    spec = MINIMAL | {
        "checkpoint": {"steps": 5},
        "policy": {"retries": 2, "activeDeadlineSeconds": 60},
        "placement": {"queueName": "q"},
    }
    answer = call(api, "POST", JOBS_PATH, manifest("immutable", spec))
    assert answer.status == 201, answer.message
    return "immutable"


def patch(api: Endpoint, name: str, spec: dict[str, Any], *, dry: bool = True) -> Answer:
    query = {"dryRun": "All"} if dry else {}
    return call(api, "PATCH", f"{JOBS_PATH}/{name}", {"spec": spec}, kind="application/merge-patch+json", **query)


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[words[:40] for _, words in CHANGES])
def test_a_created_job_cannot_become_another(api: Endpoint, created: str, change: dict[str, Any], words: str) -> None:
    answer = patch(api, created, change)
    assert answer.status == 422, answer.body
    assert words in answer.message


@pytest.mark.parametrize(
    "change",
    [
        {"suspend": True},
        {"cancel": True},
        {"policy": {"activeDeadlineSeconds": 90}},
        {"policy": {"ttlSecondsAfterFinished": 9}},
    ],
)
def test_what_steers_a_job_can_change(api: Endpoint, created: str, change: dict[str, Any]) -> None:
    answer = patch(api, created, change)
    assert answer.status == 200, answer.message


def test_the_queue_can_change_while_suspended_and_a_cancel_cannot_be_taken_back(api: Endpoint) -> None:
    name = "steered"
    assert call(api, "POST", JOBS_PATH, manifest(name, MINIMAL | {"suspend": True})).status == 201
    assert patch(api, name, {"placement": {"queueName": "other"}}, dry=False).status == 200
    assert patch(api, name, {"cancel": True}, dry=False).status == 200
    answer = patch(api, name, {"cancel": False})
    assert answer.status == 422
    assert "spec.cancel cannot be taken back" in answer.message
