"""Which specs the operator accepts or refuses, and which defaults a job keeps after its spec was accepted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from finetune_api.names import Reason
from finetune_operator.decide import decide
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, RefusedSpec, accept, read_first_attempt
from finetune_operator.settings import OperatorConfig, parse_config

from tests.unit.operator.samples import CONFIG, accept_spec, at, end_pod, facts, job, pod, spec, status


def refuse(raw_spec: dict[str, Any], config: OperatorConfig = CONFIG) -> RefusedSpec:
    acceptance = accept(raw_spec, config)
    assert isinstance(acceptance, RefusedSpec), acceptance
    return acceptance


STORE = {"uri": "s3://one/models", "endpoint": "https://a.example.com", "credentialsSecretRef": {"name": "one"}}

WITHOUT_STORAGE = {name: group for name, group in spec().items() if name != "storage"}


def accept_with_storage(raw_spec: dict[str, Any], storage: dict[str, Any], first_defaults: dict[str, Any] | None = None) -> AcceptedSpec:
    acceptance = accept(raw_spec, parse_config({"storage": storage}, "test"), None if first_defaults is None else FirstAttempt(first_defaults))
    assert isinstance(acceptance, AcceptedSpec), acceptance
    return acceptance


def test_defaults_are_filled_in_and_listed() -> None:
    acceptance = accept_spec()
    assert acceptance.spec.training.learning_rate == 2e-4
    assert acceptance.defaults["training.learningRate"] == 2e-4
    assert acceptance.spec.resources.memory == "4Gi"
    assert acceptance.pool is None


def test_all_problems_are_listed_at_once_with_their_fields() -> None:
    acceptance = refuse(spec(model={"source": "./x"}, dataset={"train": None, "validation": "/tmp/v"}))
    assert acceptance.is_final
    assert acceptance.reason is Reason.REJECTED
    assert acceptance.message.index("spec.") == 0
    assert "spec.model.source" in acceptance.message
    assert "spec.dataset.validation" in acceptance.message


@pytest.mark.parametrize(
    ("raw_spec", "reason", "expected_text", "is_final"),
    [
        (spec(resources={"nodePool": "a100"}), Reason.UNKNOWN_NODE_POOL, "pools are: h100 (8 x nvidia.com/gpu), mig", False),
        (spec(resources={"gpusPerNode": 9}), Reason.POOL_TOO_SMALL, "gpusPerNode is 9, but a node of pool h100 has 8", False),
        (
            spec(resources={"nodePool": "mig", "gpusPerNode": 1, "nodes": 3}),
            Reason.POOL_TOO_SMALL, "nodes is 3, but the maximum of pool mig is 2", False,
        ),
        (spec(storage={"uri": None}), Reason.STORAGE_NOT_CONFIGURED, "spec.storage.uri is absent", False),
        (spec(storage={"uri": "pvc://claim/../x"}), Reason.REJECTED, "spec.storage.uri", True),
    ],
)  # fmt: skip
def test_refusal_has_its_reason_and_message_and_is_final_only_if_another_spec_helps(
    raw_spec: dict[str, Any], reason: Reason, expected_text: str, is_final: bool
) -> None:
    acceptance = refuse(raw_spec)
    assert (acceptance.reason, acceptance.is_final) == (reason, is_final)
    assert expected_text in acceptance.message
    assert acceptance.hint


@pytest.mark.parametrize("new_storage", [{}, {"uri": "s3://two/models"}, {**STORE, "endpoint": "https://b.example.com"}])
def test_default_store_of_the_first_attempt_is_kept_with_its_connection(new_storage: dict[str, Any]) -> None:
    first_acceptance = accept_with_storage(WITHOUT_STORAGE, STORE)
    acceptance = accept_with_storage(WITHOUT_STORAGE, new_storage, first_acceptance.defaults)
    assert (acceptance.spec.storage, acceptance.defaults) == (first_acceptance.spec.storage, first_acceptance.defaults)


def test_connection_to_the_same_store_follows_the_configuration() -> None:
    first_acceptance = accept_with_storage(WITHOUT_STORAGE, STORE)
    new_storage = {**STORE, "credentialsSecretRef": {"name": "two"}, "caBundleRef": {"name": "ca", "key": "ca.crt"}}
    acceptance = accept_with_storage(WITHOUT_STORAGE, new_storage, first_acceptance.defaults)
    assert acceptance.spec.storage == accept_with_storage(WITHOUT_STORAGE, new_storage).spec.storage


def test_store_in_the_spec_takes_precedence_over_the_first_attempts_defaults() -> None:
    raw_spec = {**WITHOUT_STORAGE, "storage": {"uri": "s3://mine/x", "endpoint": "https://mine.example.com"}}
    first_acceptance = accept_with_storage(raw_spec, STORE)
    assert accept_with_storage(raw_spec, {"uri": "s3://two/models"}, first_acceptance.defaults).spec == first_acceptance.spec


@pytest.mark.parametrize("first_defaults", [{"storage.uri": "no uri"}, {"training.learningRate": "fast"}, {"gone.option": 1}])
def test_unusable_defaults_of_the_first_attempt_are_ignored(first_defaults: dict[str, Any]) -> None:
    assert accept_with_storage(WITHOUT_STORAGE, STORE, first_defaults) == accept_with_storage(WITHOUT_STORAGE, STORE)


def test_running_attempt_keeps_its_resolved_spec_when_its_pool_is_removed() -> None:
    """The resolved spec must be kept, because the operator reads the attempt's batch size from it if the attempt runs out of memory later."""
    raw_spec = spec(resources={"nodePool": "gone", "gpusPerNode": 1}, policy={"onOutOfMemory": "Adapt"})
    started_attempt = {"number": 1, "startTime": "2026-11-21T12:00:00Z"}
    adaptation = {
        "time": "2026-11-21T12:00:00Z",
        "reason": "OutOfMemory",
        "change": "",
        "set": {"training.batchSizePerDevice": 2},
    }
    old_status = status(attempt=1, attempts=[started_attempt], adaptations=[adaptation])
    plan = decide(
        facts(spec=raw_spec, status=old_status, jobs=[job(failed_at=at(60))], pods=[end_pod(pod(), 71)], now=at(61))
    )
    assert plan.attempt_end is not None and plan.attempt_end.adaptation is not None
    assert plan.attempt_end.adaptation.change.startswith("batchSizePerDevice 2 -> 1")


def test_the_size_limit_of_a_spec_counts_bytes_and_not_characters() -> None:
    """A value of Chinese characters exceeds the limit, and a value of equally many letters does not, because a Chinese character has three bytes in UTF-8."""
    for letter, fits in (("m", True), ("\u6a21", False)):
        env = [{"name": f"V{n}", "value": letter * 4000} for n in range(6)]
        assert isinstance(accept(spec(placement={"env": env}), CONFIG), AcceptedSpec) is fits


def test_stricter_storage_rules_do_not_end_a_started_job() -> None:
    acceptance = accept(spec(storage={"uri": "pvc://claim/../x"}), CONFIG, FirstAttempt())
    assert isinstance(acceptance, RefusedSpec) and not acceptance.is_final and acceptance.hint


@pytest.mark.parametrize(
    ("fields", "first_attempt"),
    [
        ({}, None), ({"resolved": {"specSha256": "a"}}, None), ({"attempts": [{"number": 1}]}, FirstAttempt()),
        ({"attempts": [{"number": 1}], "resolved": {}}, FirstAttempt()),
        ({"attempts": [{"number": 1}], "resolved": {"specSha256": "a", "defaults": {"x": 1}}}, FirstAttempt({"x": 1}, "a")),
    ],
)  # fmt: skip
def test_first_attempt_is_read_from_the_status(fields: dict[str, Any], first_attempt: FirstAttempt | None) -> None:
    assert read_first_attempt(status(**fields)) == first_attempt


UNSUPPORTED = {"output": {"export": ["gguf"]}}
AGAINST_A_RULE = {"training": {"optimizer": "adafactor", "adamBeta1": 0.9}}


@pytest.mark.parametrize(
    ("groups", "reason", "problems"),
    [
        (UNSUPPORTED, Reason.NOT_SUPPORTED_YET, ["spec.output.export"]),
        (AGAINST_A_RULE, Reason.REJECTED, ["spec.training.adamBeta1"]),
        ({**UNSUPPORTED, **AGAINST_A_RULE}, Reason.REJECTED, ["spec.training.adamBeta1", "spec.output.export"]),
    ],
    ids=["unsupported", "against a rule", "both"],
)  # fmt: skip
def test_a_started_job_is_not_refused_because_of_a_new_rule(groups: dict[str, Any], reason: Reason, problems: list[str]) -> None:
    new_acceptance, started_acceptance = accept(spec(**groups), CONFIG), accept(spec(**groups), CONFIG, FirstAttempt())
    assert isinstance(new_acceptance, RefusedSpec) and isinstance(started_acceptance, AcceptedSpec)
    assert (new_acceptance.reason, new_acceptance.is_final, new_acceptance.spec is not None and new_acceptance.spec.policy.retries) == (reason, True, None)
    assert [text.split(":")[0] for text in new_acceptance.message.split("; ") if text.startswith("spec.")] == problems
    refused_notes = [note.removeprefix("a new job would be refused: ") for note in started_acceptance.notes if note.startswith("a new job would be refused: ")]
    assert (len(refused_notes), "; ".join(refused_notes)) == (len(problems), new_acceptance.message)


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ({"training": {"epochs": []}}, "spec.training.epochs: Input should be a valid number"),
        ({"training": {"newer": 1}, **UNSUPPORTED}, "spec.training.newer"),
    ],
)
def test_job_with_unknown_fields_waits_for_a_newer_operator(groups: dict[str, Any], problem: str, is_new: bool) -> None:
    refusal = accept(spec(**groups), CONFIG, None if is_new else FirstAttempt())
    assert isinstance(refusal, RefusedSpec)
    assert (refusal.reason, refusal.is_final) == (Reason.OPERATOR_TOO_OLD, False)
    assert refusal.message == f"this version of the operator does not know parts of the spec: {problem}"


@pytest.mark.parametrize(("digest", "is_accepted"), [("0" * 64, False), ("f" * 64, False), (None, True), ("own", True)])
def test_started_job_waits_if_its_spec_has_changed(digest: str | None, is_accepted: bool) -> None:
    own_digest = accept_spec().spec_sha256
    acceptance = accept(spec(), CONFIG, FirstAttempt({}, "".join(list(own_digest)) if digest == "own" else digest))
    assert isinstance(acceptance, AcceptedSpec) is is_accepted
    if isinstance(acceptance, RefusedSpec):
        assert (acceptance.reason, acceptance.is_final) == (Reason.SPEC_CHANGED, False)


def build_env_variables(length: int) -> list[dict[str, str]]:
    """Return environment variables whose values have `length` characters in total."""
    return [{"name": f"V{n:02}", "value": "x" * min(4000, max(0, length - n * 4000))} for n in range(16)]


@pytest.mark.parametrize(
    ("groups", "first_attempt"),
    [
        ({"resources": {"nodePool": "gone"}}, None), ({"storage": {"uri": None}}, None), ({"storage": {"uri": "pvc://c/../x"}}, FirstAttempt()),
        ({"placement": {"labels": {"job-name": "x"}}}, None), ({"placement": {"env": build_env_variables(60000)}}, FirstAttempt()),
        ({"newer": 1}, None), ({}, FirstAttempt({}, "0" * 64)),
    ],
    ids=["pool", "no storage", "storage", "placement", "size", "unknown field", "changed spec"],
)  # fmt: skip
def test_refused_spec_contains_the_defaults(groups: dict[str, Any], first_attempt: FirstAttempt | None) -> None:
    refusal = accept(spec(**groups), CONFIG, first_attempt)
    assert isinstance(refusal, RefusedSpec) and refusal.spec is not None
    assert (refusal.spec.policy.retries, refusal.spec.training.learning_rate) == (3, 2e-4)


@pytest.mark.parametrize("first_attempt", [None, FirstAttempt()])
def test_spec_with_defaults_may_have_exactly_56_kib(first_attempt: FirstAttempt | None) -> None:
    def accept_with_value(length: int) -> AcceptedSpec | RefusedSpec:
        return accept(spec(placement={"env": build_env_variables(length)}), CONFIG, first_attempt)

    refusal = accept_with_value(57344)
    assert isinstance(refusal, RefusedSpec)
    assert (refusal.reason, refusal.is_final) == (Reason.REJECTED, first_attempt is None)
    other_bytes = int(refusal.message.split("has ")[1].split(" bytes")[0]) - 57344
    longest_accepted = accept_with_value(57344 - other_bytes)
    assert isinstance(longest_accepted, AcceptedSpec)
    assert len(json.dumps(longest_accepted.spec.to_wire(), separators=(",", ":"))) == pytest.approx(57344, abs=2)  # +- 2, because 1e-8 may be written as 1e-08
    assert isinstance(accept_with_value(57345 - other_bytes), RefusedSpec)


@pytest.mark.parametrize(
    ("recorded_defaults", "field", "value"),
    [
        ({"training.learningRate": 1e-3}, "training.learningRate", 1e-3), ({"training.learningRate": 1e-6}, "training.learningRate", 1e-6),
        ({"training.epochs": 1, "checkpoint.keep": 7}, "checkpoint.keep", 7), ({"resources.memory": "1Gi"}, "resources.memory", "4Gi"),
        ({"model.ligerKernels": False}, "model.ligerKernels", False), ({}, "model.ligerKernels", None),
        ({"method.lora.dropout": 0.05}, "method.lora.dropout", 0.05), ({}, "method.lora.dropout", 0),
        ({"policy.retries": 9}, "policy.retries", 3), ({"storage.region": "x"}, "storage.region", None),
    ],
)  # fmt: skip
def test_training_values_stay_those_of_the_first_attempt_and_cluster_values_follow_the_configuration(
    recorded_defaults: dict[str, Any], field: str, value: Any
) -> None:
    acceptance = accept(spec(), CONFIG, FirstAttempt(recorded_defaults))
    assert isinstance(acceptance, AcceptedSpec)
    assert (acceptance.spec.value(field), acceptance.defaults.get(field)) == (value, value)


def test_resources_of_the_pool_take_precedence_over_the_operators_configuration() -> None:
    pools = [{"name": "a", "default": True, "gpusPerNode": 1, "gpuResource": "amd.com/gpu", "resources": {"cpu": "7", "sharedMemory": "9Gi"}}]
    config = parse_config({"nodePools": pools, "resources": {"memory": "5Gi", "sharedMemory": "2Gi"}}, "test")
    for gpus, expected in ((1, ("a", "amd.com/gpu", "7", "5Gi", "20Gi", "9Gi")), (0, (None, "nvidia.com/gpu", "1", "5Gi", "20Gi", "2Gi"))):
        acceptance = accept(spec(resources={"gpusPerNode": gpus}), config)
        assert isinstance(acceptance, AcceptedSpec)
        resources = acceptance.spec.resources
        assert (resources.node_pool, resources.gpu_resource, resources.cpu, resources.memory, resources.ephemeral_storage, resources.shared_memory) == expected


def test_default_storage_that_cannot_be_parsed_waits_for_the_platform_team() -> None:
    """The job waits and does not fail, because its user cannot correct the operator's configuration."""
    config = parse_config({"trainer": {"image": "t"}, "storage": {"uri": "pvc://claim/../x"}}, "test")
    raw_spec = {name: group for name, group in spec().items() if name != "storage"}
    acceptance = accept(raw_spec, config)
    assert isinstance(acceptance, RefusedSpec)
    assert (acceptance.reason, acceptance.is_final) == (Reason.STORAGE_NOT_CONFIGURED, False)
    assert acceptance.hint
    assert isinstance(accept(spec(), config), AcceptedSpec)
