"""The Secret and the NetworkPolicy of an attempt, and the operator's key."""

from __future__ import annotations

import base64
import json
from typing import Any, cast

import pytest
from finetune_api.attempt_secret import (
    derive_attempt_secret,
    derive_checkpoint_key,
    derive_prepared_rows_key,
    derive_progress_token,
)
from finetune_api.metadata_addresses import METADATA_CIDRS
from finetune_api.names import Annotation, Reason
from finetune_operator.act import PlanExecutor
from finetune_operator.attempt_secrets import AttemptSecrets
from finetune_operator.builders.isolation import build_network_policy
from finetune_operator.kube import Forbidden, KubeClient
from finetune_operator.objects import JOB, NETWORK_POLICY, SECRET, SERVICE, Kind, Object
from finetune_operator.plan import ActionResult, Plan, Situation
from finetune_operator.settings import IsolationSettings, OperatorConfig, SettingsError, StartError, parse_config

from tests.unit.operator.fake_cluster import FakeApiServer, new_server
from tests.unit.operator.samples import CONFIG, UID, facts, job, spec

KEY = bytes(range(32))
OPERATOR_PODS = {"app.kubernetes.io/name": "finetune-operator", "app.kubernetes.io/instance": "rel"}
ISOLATION = IsolationSettings(secret=True, network_policy=True, operator_namespace="ops", operator_labels=OPERATOR_PODS)
SECRET_NAME = AttemptSecrets(ISOLATION, KEY).derive_secret_name("run-1", UID, 1)


def make_isolated_config(**changes: Any) -> OperatorConfig:
    return CONFIG.model_copy(update={"isolation": ISOLATION.model_copy(update=changes)})


def make_executor(server: FakeApiServer, config: OperatorConfig) -> PlanExecutor:
    return PlanExecutor(cast("KubeClient", server), config, AttemptSecrets(config.isolation, KEY))


async def create_first_attempt(server: FakeApiServer, config: OperatorConfig, nodes: int = 1) -> ActionResult:
    job_facts = facts(spec=spec(resources={"nodes": nodes, "gpusPerNode": 0}), config=config)
    return await make_executor(server, config).act(job_facts, Plan(Situation.STARTING, attempt_to_create=1))


# The NetworkPolicy


def test_only_pods_of_the_attempt_the_operator_and_monitoring_may_connect() -> None:
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    policy = build_network_policy(job(network_policy_name="run-1"), ISOLATION.model_copy(update={"metrics_from": (monitoring,)}))
    own_pods = {"matchLabels": {"batch.kubernetes.io/job-name": "run-1"}}
    operator_pods = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ops"}}, "podSelector": {"matchLabels": OPERATOR_PODS},
    }  # fmt: skip
    assert policy["spec"] == {
        "podSelector": own_pods,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": own_pods}]},
            {"from": [operator_pods, monitoring], "ports": [{"protocol": "TCP", "port": 8080}]},
        ],
    }
    meta = policy["metadata"]
    assert (meta["name"], meta["namespace"], meta["ownerReferences"][0]["uid"]) == ("run-1", "team", "job-1")


def test_blocked_addresses_are_exceptions_of_an_egress_rule() -> None:
    settings = ISOLATION.model_copy(update={"block_metadata": True, "blocked_cidrs": ("10.9.0.0/16",)})
    policy = build_network_policy(job(network_policy_name="run-1"), settings)["spec"]
    metadata_ipv4_cidrs = [cidr for cidr in METADATA_CIDRS if ":" not in cidr]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == [{"to": [
        {"namespaceSelector": {}},
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": [*metadata_ipv4_cidrs, "10.9.0.0/16"]}},
        {"ipBlock": {"cidr": "::/0", "except": ["fd00:ec2::254/128", "fd20:ce::254/128"]}},
    ]}]  # fmt: skip
    assert "169.254.169.254/32" in metadata_ipv4_cidrs


def test_an_address_family_without_blocked_addresses_has_no_exceptions() -> None:
    settings = ISOLATION.model_copy(update={"blocked_cidrs": ("10.9.0.0/16",)})
    assert build_network_policy(job(), settings)["spec"]["egress"][0]["to"][2] == {"ipBlock": {"cidr": "::/0"}}


# The objects of an attempt


@pytest.mark.parametrize("nodes", [1, 2])
async def test_policy_is_created_before_the_secret_that_the_pods_wait_for(nodes: int) -> None:
    server = new_server()
    result = await create_first_attempt(server, make_isolated_config(), nodes)
    assert result.blocking_condition is None
    kinds = [JOB, NETWORK_POLICY, SECRET, *([SERVICE] if nodes > 1 else [])]
    assert server.requests == [("create", kind.plural) for kind in kinds]


async def test_pods_mount_the_secret_next_to_run_json() -> None:
    server = new_server()
    await create_first_attempt(server, make_isolated_config())
    job_body = server.objects[JOB.plural, "run-1"]
    volume = next(volume for volume in job_body["spec"]["template"]["spec"]["volumes"] if volume["name"] == "run")
    run_source, secret_source = volume["projected"]["sources"]
    assert run_source["downwardAPI"]["items"][0]["path"] == "run.json"
    items = [{"key": "attempt-secret", "path": "attempt-secret"}, {"key": "checkpoint-key", "path": "checkpoint-key"}]
    assert secret_source == {"secret": {"name": SECRET_NAME, "items": items}}
    assert job_body["metadata"]["annotations"][Annotation.ATTEMPT_SECRET] == SECRET_NAME


async def test_only_the_secret_object_contains_the_secret() -> None:
    server = new_server()
    await create_first_attempt(server, make_isolated_config(), nodes=2)
    secret, checkpoint_key = derive_attempt_secret(KEY, UID, 1), derive_checkpoint_key(KEY, UID)
    body = server.objects.pop((SECRET.plural, SECRET_NAME))
    assert {name: base64.b64decode(value).decode() for name, value in body["data"].items()} == {
        "attempt-secret": secret, "checkpoint-key": checkpoint_key,
    }  # fmt: skip
    assert (body["immutable"], body["type"], body["metadata"]["ownerReferences"][0]["uid"]) == (True, "Opaque", "uid-run-1")
    for value in (secret, checkpoint_key, *body["data"].values(), derive_progress_token(secret), KEY.hex()):
        assert value not in json.dumps(list(server.objects.values()))


async def test_a_preparation_gets_a_secret_with_the_key_for_prepared_rows_of_its_namespace() -> None:
    server = new_server()
    config = make_isolated_config(network_policy=False)
    job_facts = facts(spec=spec(resources={"gpusPerNode": 1}, prepare={"strategy": "always"}), config=config)
    result = await make_executor(server, config).act(job_facts, Plan(Situation.PREPARING, preparation_to_create=2))
    name = AttemptSecrets(ISOLATION, KEY).derive_secret_name("run-prepare2", UID, 0)
    assert result.created_preparation is not None and result.created_preparation.attempt_secret_name == name
    data = server.objects[SECRET.plural, name]["data"]
    assert {key: base64.b64decode(value).decode() for key, value in data.items()} == {
        "attempt-secret": derive_attempt_secret(KEY, UID, 0), "checkpoint-key": derive_prepared_rows_key(KEY, "team"),
    }  # fmt: skip
    assert derive_prepared_rows_key(KEY, "team") != derive_prepared_rows_key(KEY, "other")
    pod_spec = server.objects[JOB.plural, "run-prepare2"]["spec"]["template"]["spec"]
    volume = next(volume for volume in pod_spec["volumes"] if volume["name"] == "run")
    assert volume["projected"]["sources"][1]["secret"]["name"] == name


@pytest.mark.parametrize(
    ("groups", "has_key"),
    [
        ({}, True),
        ({"model": {"trustRemoteCode": True}}, False),
        ({"placement": {"image": "registry.example.com/own:1"}}, False),
        ({"placement": {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}}, True),
        ({"trainer": {"type": "grpo", "rewards": [{"configMapRef": {"name": "rewards", "key": "rewards.py"}}]}}, False),
        ({"trainer": {"type": "grpo", "rewards": [{"builtin": "regex", "parameters": {"pattern": "x"}}]}}, True),
    ],
)
async def test_only_a_preparation_without_user_code_gets_the_key_for_prepared_rows(groups: dict[str, Any], has_key: bool) -> None:
    server, config = new_server(), make_isolated_config(network_policy=False)
    job_facts = facts(spec=spec(resources={"gpusPerNode": 1}, prepare={"strategy": "always"}, **groups), config=config)
    await make_executor(server, config).act(job_facts, Plan(Situation.PREPARING, preparation_to_create=1))
    volumes = server.objects[JOB.plural, "run-prepare1"]["spec"]["template"]["spec"]["volumes"]
    sources = [source for volume in volumes if volume["name"] == "run" for source in volume["projected"]["sources"]]
    mounted_keys = [item["key"] for source in sources if "secret" in source for item in source["secret"]["items"]]
    assert mounted_keys == ["attempt-secret", *(["checkpoint-key"] if has_key else [])]


async def test_by_default_an_attempt_gets_neither_secret_nor_policy() -> None:
    server = new_server()
    await create_first_attempt(server, CONFIG)
    job_body = server.objects[JOB.plural, "run-1"]
    assert server.requests == [("create", JOB.plural)]
    assert {Annotation.ATTEMPT_SECRET, Annotation.NETWORK_POLICY} & set(job_body["metadata"]["annotations"]) == set()
    volume = next(volume for volume in job_body["spec"]["template"]["spec"]["volumes"] if volume["name"] == "run")
    assert list(volume) == ["name", "downwardAPI"]


async def test_a_running_job_of_an_older_operator_is_not_changed() -> None:
    server = new_server()
    job_facts = facts(jobs=[job(pod_count=1)], config=make_isolated_config())
    assert await make_executor(server, make_isolated_config()).act(job_facts, Plan(Situation.ACTIVE)) == ActionResult()
    assert server.requests == []


async def test_missing_objects_of_a_running_job_are_created_again() -> None:
    server = new_server()
    running_job = job(pod_count=1, attempt_secret_name=SECRET_NAME, network_policy_name="run-1")
    await make_executor(server, make_isolated_config()).act(facts(jobs=[running_job], config=make_isolated_config()), Plan(Situation.ACTIVE))
    assert {(SECRET.plural, SECRET_NAME), (NETWORK_POLICY.plural, "run-1")} <= set(server.objects)


async def test_existing_secret_of_an_attempt_is_not_read() -> None:
    server = new_server()
    server.put(SECRET, {"metadata": {"name": SECRET_NAME, "namespace": "team"}})
    result = await create_first_attempt(server, make_isolated_config(network_policy=False))
    assert (result.blocking_condition, server.requests) == (None, [("create", JOB.plural), ("create", SECRET.plural)])


async def test_attempt_does_not_start_without_its_network_policy() -> None:
    """Pods cannot start before the Secret of the attempt exists, and the operator creates the NetworkPolicy before the Secret."""
    server = new_server()

    def refuse(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("create", NETWORK_POLICY):
            raise Forbidden(verb, kind, "run-1", 403, "Forbidden", "networkpolicies is forbidden: cannot create resource")

    server.before_request = refuse
    result = await create_first_attempt(server, make_isolated_config())
    assert result.blocking_condition is not None and "cannot create resource" in result.blocking_condition.message
    assert server.count("create", SECRET) == 0


async def test_network_policy_of_another_owner_is_a_conflict() -> None:
    server = new_server()
    server.put(NETWORK_POLICY, {"metadata": {"name": "run-1", "namespace": "team"}})
    result = await create_first_attempt(server, make_isolated_config())
    assert result.blocking_condition is not None
    assert result.blocking_condition.reason is Reason.CHILDREN_CONFLICT
    assert result.blocking_condition.message == (
        "NetworkPolicy run-1 exists and belongs to another object: the pods would not be protected from other pods"
    )


# The operator's key


async def load_key(server: FakeApiServer) -> AttemptSecrets:
    secrets = AttemptSecrets(ISOLATION)
    await secrets.load_key(cast("KubeClient", server), "ops")
    return secrets


async def test_the_operator_creates_its_key_once() -> None:
    server = new_server()
    first_secrets, second_secrets = await load_key(server), await load_key(server)
    assert server.requests == [("get", SECRET.plural), ("create", SECRET.plural), ("get", SECRET.plural)]
    assert first_secrets.derive_secret(UID, 1) == second_secrets.derive_secret(UID, 1) != (await load_key(new_server())).derive_secret(UID, 1)
    body = server.objects[SECRET.plural, ISOLATION.key_secret_name]
    assert (len(base64.b64decode(body["data"]["key"])), body["immutable"]) == (32, True)


async def test_two_replicas_use_the_key_that_was_created_first() -> None:
    server, server_of_first_replica = new_server(), new_server()
    first_secrets = await load_key(server_of_first_replica)

    def create_key_before(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("create", SECRET):
            server.put(SECRET, cast("Object", server_of_first_replica.objects[SECRET.plural, ISOLATION.key_secret_name]))

    server.before_request = create_key_before
    assert (await load_key(server)).derive_secret(UID, 1) == first_secrets.derive_secret(UID, 1)


@pytest.mark.parametrize("data", [None, {}, {"key": ""}, {"key": "not base64"}, {"key": base64.b64encode(bytes(31)).decode()}])
async def test_a_damaged_key_is_refused_without_showing_it(data: Object | None) -> None:
    server = new_server()
    server.put(SECRET, {"metadata": {"name": ISOLATION.key_secret_name, "namespace": "ops"}, "data": data})
    with pytest.raises(StartError) as error:
        await load_key(server)
    assert str(error.value) == (
        "Secret ops/finetune-operator-attempt-key has no key 'key' of at least 32 bytes: delete the Secret, and the operator creates a new one"
    )


async def test_deleted_key_is_restored_while_the_operator_runs() -> None:
    """If the operator restarted with another key, it could not read the progress of running attempts."""
    server = new_server()
    secrets = await load_key(server)
    original_secret = server.objects.pop((SECRET.plural, ISOLATION.key_secret_name))
    await secrets.restore_key(cast("KubeClient", server), "ops")
    assert server.objects[SECRET.plural, ISOLATION.key_secret_name]["data"] == original_secret["data"]
    server.requests.clear()
    await secrets.restore_key(cast("KubeClient", server), "ops")
    assert server.requests == [("get", SECRET.plural)], "an existing key is not created again"
    assert (await load_key(server)).derive_secret(UID, 1) == secrets.derive_secret(UID, 1)


async def test_only_the_leader_creates_a_key_and_a_leader_keeps_its_key() -> None:
    """A standby replica may start after the key was deleted and before the leader restores it. The standby replica must not create another key."""
    server, new_standby = new_server(), AttemptSecrets(ISOLATION)
    old_standby = await load_key(server)
    original_secret = server.objects.pop((SECRET.plural, ISOLATION.key_secret_name))
    await new_standby.load_key(cast("KubeClient", server), "ops", may_create=False)
    assert new_standby.derive_progress_token(UID, 1) is None and (SECRET.plural, ISOLATION.key_secret_name) not in server.objects
    await old_standby.load_key(cast("KubeClient", server), "ops")
    assert server.objects[SECRET.plural, ISOLATION.key_secret_name]["data"] == original_secret["data"]
    await new_standby.load_key(cast("KubeClient", server), "ops")
    assert new_standby.derive_secret(UID, 1) == old_standby.derive_secret(UID, 1)


async def test_a_secret_with_another_key_is_logged_without_the_keys(caplog: pytest.LogCaptureFixture) -> None:
    server = new_server()
    secrets = await load_key(server)
    original_secret = server.objects.pop((SECRET.plural, ISOLATION.key_secret_name))
    other_key = base64.b64encode(KEY).decode()
    server.put(SECRET, {"metadata": {"name": ISOLATION.key_secret_name, "namespace": "ops"}, "data": {"key": other_key}})
    await secrets.restore_key(cast("KubeClient", server), "ops")
    assert "contains another key than the operator uses" in caplog.text
    assert other_key not in caplog.text and original_secret["data"]["key"] not in caplog.text


async def test_without_secrets_no_key_is_restored() -> None:
    server = new_server()
    await AttemptSecrets(IsolationSettings()).restore_key(cast("KubeClient", server), "ops")
    assert server.requests == []


async def test_without_secrets_no_key_is_created_and_no_token_is_sent() -> None:
    server, secrets = new_server(), AttemptSecrets(IsolationSettings())
    await secrets.load_key(cast("KubeClient", server), "ops")
    assert (server.requests, secrets.derive_progress_token(UID, 1)) == ([("get", SECRET.plural)], None)


async def test_after_secrets_are_turned_off_the_progress_of_running_attempts_is_still_read() -> None:
    server = new_server()
    token = (await load_key(server)).derive_progress_token(UID, 1)
    secrets = AttemptSecrets(IsolationSettings())
    await secrets.load_key(cast("KubeClient", server), "ops")
    assert token is not None
    assert (secrets.derive_progress_token(UID, 1), secrets.is_enabled) == (token, False)


@pytest.mark.parametrize("data", [{}, {"key": "not base64"}])
async def test_without_secrets_a_damaged_key_does_not_stop_the_operator(data: Object) -> None:
    server, secrets = new_server(), AttemptSecrets(IsolationSettings())
    server.put(SECRET, {"metadata": {"name": ISOLATION.key_secret_name, "namespace": "ops"}, "data": data})
    await secrets.load_key(cast("KubeClient", server), "ops")
    assert secrets.derive_progress_token(UID, 1) is None


async def test_without_secrets_a_missing_permission_for_the_key_does_not_stop_the_operator() -> None:
    server, secrets = new_server(), AttemptSecrets(IsolationSettings())

    def refuse(verb: str, kind: Kind) -> None:
        raise Forbidden(verb, kind, "key", 403, "Forbidden", "secrets is forbidden")

    server.before_request = refuse
    await secrets.load_key(cast("KubeClient", server), "ops")
    assert secrets.derive_progress_token(UID, 1) is None
    enabled_secrets = AttemptSecrets(ISOLATION)
    with pytest.raises(Forbidden):
        await enabled_secrets.load_key(cast("KubeClient", server), "ops")


# The configuration


@pytest.mark.parametrize(
    ("isolation", "message"),
    [
        ({"networkPolicy": True}, "networkPolicy needs operatorNamespace and operatorLabels"),
        ({"networkPolicy": True, "operatorNamespace": "ops"}, "networkPolicy needs operatorNamespace and operatorLabels"),
        ({"blockMetadata": True}, "have no effect without networkPolicy"),
        ({"blockedCidrs": ["10.0.0.0/8"]}, "have no effect without networkPolicy"),
        ({"metricsFrom": [{}]}, "have no effect without networkPolicy"),
        ({"blockedCidrs": ["10.0.0.1/8"]}, "'10.0.0.1/8' is not an address range"),
    ],
)
def test_contradicting_settings_are_refused(isolation: Object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_config({"isolation": isolation}, "test")
