"""Node pools, and placement values that contradict the pool, the operator's configuration or Kubernetes' syntax."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import Reason
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, RefusedSpec, accept
from finetune_operator.policies.placement import choose_pool, find_placement_problems
from finetune_operator.settings import parse_config

from tests.unit.operator.samples import CONFIG, SPEC, accept_spec, spec

TAINT = {"key": "gpu", "operator": "Equal", "value": "h100", "effect": "NoSchedule"}
CONFIG_WITH_POOL = parse_config(
    {
        "trainer": {"image": "trainer:1", "labels": {"cost": "research"}, "annotations": {"mesh": "off"}},
        "nodePools": [
            {"name": "h100", "default": True, "gpusPerNode": 8, "nodeSelector": {"gpu": "h100"}, "tolerations": [TAINT]}
        ],
    },
    "test",
)


def accept_placement(placement: dict[str, Any], first_attempt: FirstAttempt | None = None, **groups: Any) -> AcceptedSpec | RefusedSpec:
    raw_spec = spec(placement=placement, resources={"gpusPerNode": 1}, **groups)
    return accept(raw_spec, CONFIG_WITH_POOL, first_attempt)


@pytest.mark.parametrize(
    ("placement", "expected_texts"),
    [
        ({"nodeSelector": {"gpu": "a100"}}, ("spec.placement.nodeSelector.gpu is 'a100'", "pool h100 selects nodes with 'h100'")),
        ({"tolerations": [{**TAINT, "value": "a100"}]}, ("'value': 'a100'", "pool h100 sets", "'value': 'h100'")),
        ({"tolerations": [{"key": "gpu", "operator": "Exists"}]}, ("'operator': 'Exists'", "'value': 'h100'")),
        ({"labels": {"cost": "fun"}}, ("spec.placement.labels.cost is 'fun'", "sets 'research'")),
        ({"annotations": {"mesh": "on"}}, ("spec.placement.annotations.mesh is 'on'", "sets 'off'")),
        ({"labels": {"finetune-operator.io/name": "x"}}, ("spec.placement.labels.finetune-operator.io/name", "sets this key itself")),
        ({"labels": {"kueue.x-k8s.io/queue-name": "q"}}, ("kueue.x-k8s.io/queue-name", "write placement.queueName")),
        ({"annotations": {"finetune-operator.io/run.json": "{}"}}, ("finetune-operator.io/run.json", "sets this key itself")),
        ({"annotations": {"kubectl.kubernetes.io/default-container": "x"}}, ("default-container", "sets this key itself")),
        ({"labels": {"team": "a b"}}, ("spec.placement.labels.team: 'a b' is not a label value", "at most 63")),
        ({"nodeSelector": {"a b": "c"}}, ("spec.placement.nodeSelector.a b", "'a b'")),
    ],
)  # fmt: skip
def test_contradicting_value_is_refused_and_both_values_are_named(placement: dict[str, Any], expected_texts: tuple[str, ...]) -> None:
    acceptance = accept_placement(placement)
    assert isinstance(acceptance, RefusedSpec), acceptance
    assert (acceptance.reason, acceptance.is_final) == (Reason.REJECTED, True)
    for expected_text in expected_texts:
        assert expected_text in acceptance.message


@pytest.mark.parametrize(
    "placement",
    [
        {"nodeSelector": {"gpu": "h100", "disk": "nvme"}},
        {"tolerations": [TAINT]},
        {"tolerations": [{**TAINT, "value": "a100", "effect": "NoExecute"}]},
        {"tolerations": [{"key": "spot", "operator": "Exists"}]},
        {"labels": {"cost": "research", "team": "", "example.com/team": "a"}},
        {"labels": {"kueue.x-k8s.io/priority-class": "high"}},
        {"annotations": {"mesh": "off", "note": "any text: at all"}},
    ],
)
def test_values_that_do_not_contradict_the_platforms_are_accepted(placement: dict[str, Any]) -> None:
    assert isinstance(accept_placement(placement), AcceptedSpec)


def test_pool_that_changed_since_the_first_attempt_does_not_end_the_job() -> None:
    acceptance = accept_placement({"nodeSelector": {"gpu": "a100"}}, FirstAttempt())
    assert isinstance(acceptance, AcceptedSpec)
    assert any("pool h100 selects nodes with 'h100'" in note for note in acceptance.notes)


@pytest.mark.parametrize("name", ["cpu", "memory", "ephemeralStorage", "sharedMemory"])
@pytest.mark.parametrize("value", ["32 GB", "lots", "-1Gi"])
def test_wrong_quantity_is_refused_with_its_field(name: str, value: str) -> None:
    acceptance = accept(spec(resources={name: value}), CONFIG)
    assert isinstance(acceptance, RefusedSpec), acceptance
    assert acceptance.reason is Reason.REJECTED
    assert f"spec.resources.{name}" in acceptance.message and value in acceptance.message


def test_storage_with_dots_in_its_path_is_refused() -> None:
    refusal = accept(spec(storage={"uri": "pvc://claim/../x"}), CONFIG)
    assert isinstance(refusal, RefusedSpec) and refusal.is_final
    assert "spec.storage.uri" in refusal.message and ".." in refusal.message


def test_accepted_spec_names_its_pool() -> None:
    assert accept_spec(spec(resources={"gpusPerNode": 8})).pool is not None


def make_spec(**groups: Any) -> FineTuneJobSpec:
    """Return a spec that has only the required groups and the groups in `groups`. Defaults are not filled in."""
    return FineTuneJobSpec.model_validate({"model": SPEC["model"], "dataset": SPEC["dataset"], **groups})


POOLS = parse_config(
    {
        "nodePools": [
            {"name": "small", "gpusPerNode": 4},
            {"name": "main", "default": True, "gpusPerNode": 8, "maxNodes": 2},
            {"name": "slices", "gpusPerNode": 7, "gpuResource": "nvidia.com/mig", "gpuMemory": "10Gi", "description": "tests", "maxNodes": 1},
            {"name": "amd", "gpusPerNode": 8, "gpuResource": "amd.com/gpu"},
            {"name": "more-slices", "gpusPerNode": 7, "gpuResource": "nvidia.com/mig"},
            {"name": "cpu"},
        ]
    },
    "test",
)
LIST_OF_POOLS = (
    "the pools are: small (4 x nvidia.com/gpu), main (8 x nvidia.com/gpu), slices (7 x nvidia.com/mig of 10Gi: tests), "
    "amd (8 x amd.com/gpu), more-slices (7 x nvidia.com/mig), cpu (0 x nvidia.com/gpu)"
)


@pytest.mark.parametrize(
    ("resources", "name"),
    [
        ({}, "main"), ({"gpusPerNode": 0}, None), ({"gpusPerNode": 8, "nodes": 2}, "main"), ({"gpuResource": "nvidia.com/gpu"}, "main"),
        ({"gpuResource": "nvidia.com/mig"}, "slices"), ({"gpuResource": "amd.com/gpu"}, "amd"), ({"gpuResource": "intel.com/gpu"}, None),
        ({"nodePool": "small", "gpusPerNode": 4, "nodes": 99}, "small"), ({"nodePool": "slices"}, "slices"),
        ({"nodePool": "cpu", "gpusPerNode": 0}, "cpu"), ({"nodePool": "cpu", "gpusPerNode": 0, "gpuResource": "amd.com/gpu"}, "cpu"),
        ({"nodePool": "amd", "gpuResource": "".join(("amd.com", "/gpu"))}, "amd"),
    ],
)  # fmt: skip
def test_pool_with_enough_gpus_and_nodes_is_chosen(resources: dict[str, Any], name: str | None) -> None:
    pool = choose_pool(make_spec(resources=resources), POOLS)
    assert not isinstance(pool, RefusedSpec)
    assert (pool.name if pool else None) == name


@pytest.mark.parametrize(
    ("resources", "reason", "problem"),
    [
        ({"nodePool": "gone"}, Reason.UNKNOWN_NODE_POOL, "nodePool is 'gone'"),
        ({"nodePool": "amd", "gpuResource": "nvidia.com/mig"}, Reason.POOL_LACKS_RESOURCE,
         "gpuResource is nvidia.com/mig, but nodes of pool amd have amd.com/gpu"),
        ({"nodePool": "slices", "gpuResource": "amd.com/gpu"}, Reason.POOL_LACKS_RESOURCE,
         "gpuResource is amd.com/gpu, but nodes of pool slices have nvidia.com/mig"),
        ({"gpusPerNode": 9}, Reason.POOL_TOO_SMALL, "gpusPerNode is 9, but a node of pool main has 8"),
        ({"nodePool": "cpu"}, Reason.POOL_TOO_SMALL, "gpusPerNode is 1, but a node of pool cpu has 0"),
        ({"nodes": 3}, Reason.POOL_TOO_SMALL, "nodes is 3, but the maximum of pool main is 2"),
        ({"nodePool": "slices", "nodes": 2}, Reason.POOL_TOO_SMALL, "nodes is 2, but the maximum of pool slices is 1"),
    ],
)  # fmt: skip
def test_job_that_fits_no_pool_waits_for_another_configuration(resources: dict[str, Any], reason: Reason, problem: str) -> None:
    refusal = choose_pool(make_spec(resources=resources), POOLS)
    assert isinstance(refusal, RefusedSpec)
    assert (refusal.reason, refusal.message, refusal.is_final) == (reason, f"spec.resources.{problem}; {LIST_OF_POOLS}", False)


def test_refusal_says_that_the_operator_has_no_pools() -> None:
    config = parse_config({}, "test")
    assert choose_pool(make_spec(resources={"gpusPerNode": 64, "nodes": 9}), config) is None
    refusal = choose_pool(make_spec(resources={"nodePool": "a"}), config)
    assert isinstance(refusal, RefusedSpec)
    assert refusal.message == "spec.resources.nodePool is 'a'; the operator's configuration has no pools"


@pytest.mark.parametrize(
    ("toleration", "pool_toleration", "has_conflict"),
    [
        ({}, {}, False), ({"value": "a"}, {}, True), ({"value": "z"}, {}, True),
        ({"value": "a", "key": "cpu"}, {}, False), ({"value": "a", "key": "tpu"}, {}, False),
        ({"value": "a", "effect": "NoExecute"}, {}, False), ({"value": "a", "effect": "PreferNoSchedule"}, {}, False),
        ({"effect": None}, {}, True), ({}, {"effect": None}, True), ({"value": "a", "effect": None}, {"effect": None}, True),
    ],
)  # fmt: skip
def test_tolerations_conflict_if_they_match_the_same_taint_but_differ(
    toleration: dict[str, Any], pool_toleration: dict[str, Any], has_conflict: bool
) -> None:
    pool = {"name": "h100", "default": True, "gpusPerNode": 8, "tolerations": [{**TAINT, **pool_toleration}]}
    config = parse_config({"nodePools": [pool]}, "test")
    job_toleration = {"".join(list(name)): value and "".join(list(value)) for name, value in {**TAINT, **toleration}.items()}
    raw_spec = make_spec(placement={"tolerations": [{"key": "other", "operator": "Exists"}, job_toleration]})
    shown_tolerations = [{name: value for name, value in {**TAINT, **fields}.items() if value} for fields in (toleration, pool_toleration)]
    message = f"spec.placement.tolerations[1] is {shown_tolerations[0]}, but pool h100 sets {shown_tolerations[1]}"
    assert list(find_placement_problems(raw_spec, config.node_pools[0], config)) == ([message] if has_conflict else [])
    assert list(find_placement_problems(raw_spec, None, config)) == []


@pytest.mark.parametrize("value", ["a", "z"])
def test_each_conflicting_label_is_named_with_both_values(value: str) -> None:
    equal_value = "".join(["h", "100"])
    raw_spec = make_spec(placement={"nodeSelector": {"gpu": value, "disk": "b"}, "labels": {"cost": value}, "annotations": {"mesh": value}})
    assert list(find_placement_problems(raw_spec, CONFIG_WITH_POOL.node_pools[0], CONFIG_WITH_POOL)) == [
        f"spec.placement.nodeSelector.gpu is '{value}', but pool h100 selects nodes with 'h100'",
        f"spec.placement.labels.cost is '{value}', but the operator's configuration sets 'research'",
        f"spec.placement.annotations.mesh is '{value}', but the operator's configuration sets 'off'",
    ]
    raw_spec = make_spec(placement={"nodeSelector": {"gpu": equal_value}, "labels": {"cost": "".join(["re", "search"])}})
    assert list(find_placement_problems(raw_spec, CONFIG_WITH_POOL.node_pools[0], CONFIG_WITH_POOL)) == []


@pytest.mark.parametrize(
    ("field", "key", "hint"),
    [
        ("labels", "kueue.x-k8s.io/queue-name", "write placement.queueName"), ("labels", "job-name", "remove it"),
        ("labels", "batch.kubernetes.io/x", "remove it"), ("annotations", "finetune-operator.io/x", "remove it"),
        ("annotations", "kubectl.kubernetes.io/default-container", "remove it"),
    ],
)  # fmt: skip
def test_reserved_key_is_refused(field: str, key: str, hint: str) -> None:
    message = f"spec.placement.{field}.{key} is 'a', but the operator sets this key itself: {hint}"
    assert list(find_placement_problems(make_spec(placement={field: {key: "a"}}), None, CONFIG)) == [message]
