"""Node pools, and placement values that contradict the pool, the platform or Kubernetes' syntax."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import Reason
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, RefusedSpec, accept
from finetune_operator.settings import OperatorConfig, parse_config

from tests.unit.operator.samples import CONFIG, accept_spec, spec

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


def accept_placement(placement: dict[str, Any], first: FirstAttempt | None = None, **groups: Any) -> AcceptedSpec | RefusedSpec:
    written = spec(placement=placement, resources={"gpusPerNode": 1}, **groups)
    return accept(written, CONFIG_WITH_POOL, first)


@pytest.mark.parametrize(
    ("placement", "values"),
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
        ({"labels": {"team": "a b"}}, ("spec.placement.labels.team is 'a b'", "at most 63")),
        ({"nodeSelector": {"a b": "c"}}, ("spec.placement.nodeSelector.a b", "'a b'")),
    ],
)  # fmt: skip
def test_contradicting_value_is_refused_and_both_values_are_named(placement: dict[str, Any], values: tuple[str, ...]) -> None:
    acceptance = accept_placement(placement)
    assert isinstance(acceptance, RefusedSpec), acceptance
    assert (acceptance.reason, acceptance.is_final) == (Reason.REJECTED, True)
    for value in values:
        assert value in acceptance.message


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


@pytest.mark.parametrize(("gpus", "nodes", "fits"), [(8, 1, True), (9, 1, False), (8, 2, True), (7, 3, False)])
def test_job_may_use_the_whole_pool(gpus: int, nodes: int, fits: bool) -> None:
    """The pool has two nodes with 8 GPUs each."""
    pools = [{"name": "h100", "default": True, "gpusPerNode": 8, "maxNodes": 2}]
    config: OperatorConfig = parse_config({"trainer": {"image": "t"}, "nodePools": pools}, "test")
    acceptance = accept(spec(resources={"gpusPerNode": gpus, "nodes": nodes}), config)
    assert isinstance(acceptance, AcceptedSpec) is fits
    assert fits or (isinstance(acceptance, RefusedSpec) and acceptance.reason is Reason.POOL_TOO_SMALL)


def test_default_storage_that_cannot_be_parsed_waits_for_the_platform_team() -> None:
    """The job waits instead of failing, because the user cannot correct the operator's configuration."""
    config = parse_config({"trainer": {"image": "t"}, "storage": {"uri": "pvc://claim/../x"}}, "test")
    written = {name: group for name, group in spec().items() if name != "storage"}
    acceptance = accept(written, config)
    assert isinstance(acceptance, RefusedSpec)
    assert (acceptance.reason, acceptance.is_final) == (Reason.STORAGE_NOT_CONFIGURED, False)
    assert isinstance(accept(spec(), config), AcceptedSpec)


def test_storage_with_dots_in_its_path_is_refused() -> None:
    found = accept(spec(storage={"uri": "pvc://claim/../x"}), CONFIG)
    assert isinstance(found, RefusedSpec) and found.is_final
    assert "spec.storage.uri" in found.message and ".." in found.message


def test_accepted_spec_has_its_pool() -> None:
    assert accept_spec(spec(resources={"gpusPerNode": 8})).pool is not None
