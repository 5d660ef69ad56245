"""Secret keys in a spec become environment variables of the trainer. The Job refers to the Secrets and does not contain the values."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api import names
from finetune_api.pod import RunConfig
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.builders.job import build_job
from finetune_operator.builders.mounts import build_mounts

from tests.unit.operator.samples import CONFIG, accept_spec, finetunejob, spec
from tests.unit.operator.test_builders import build_config_and_job


def build_secret_variables(**groups: Any) -> dict[str, Any]:
    """Return the container's environment variables by name. `groups` are added after the spec was accepted, because the operator would refuse a spec with
    fields that are not supported yet.
    """
    run, _ = build_config_and_job(spec())
    raw_spec = FineTuneJobSpec.model_validate({**run.spec.to_wire(), **groups})
    run = RunConfig.model_validate(run.model_dump(by_alias=True) | {"spec": raw_spec.to_wire()})
    job = build_job(finetunejob(spec()), run, accept_spec(spec()).pool, CONFIG)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variable_names = [variable["name"] for variable in container["env"]]
    assert sorted(set(variable_names)) == sorted(variable_names)
    return {variable["name"]: variable.get("valueFrom", {}).get("secretKeyRef") or variable.get("value") for variable in container["env"]}


KEY = {"name": "keys", "key": "mine"}


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        (names.WANDB_KEY, {"tracking": {"wandb": {"apiKeySecretRef": KEY}}}),
        (names.MONGODB_URI, {"tracking": {"mongodb": {"uriSecretRef": KEY}}}),
        (names.JUDGE_KEY, {"evaluation": {"judge": {"apiKeySecretRef": KEY}}}),
        (names.HUB_TOKEN, {"output": {"hub": {"tokenSecretRef": KEY}}}),
        (names.Env.HF_TOKEN.value, {"model": {"source": "org/m", "tokenSecretRef": KEY}}),
        ("OPENAI_API_KEY", {"placement": {"env": [{"name": "OPENAI_API_KEY", "secretKeyRef": KEY}]}}),
    ],
)
def test_secret_key_is_a_reference_and_not_a_value(name: str, groups: dict[str, Any]) -> None:
    assert build_secret_variables(**groups)[name] == KEY
    assert name not in build_secret_variables()


def test_users_variable_replaces_a_trackers_key() -> None:
    placement = {"env": [{"name": names.WANDB_KEY, "value": "own"}]}
    assert build_secret_variables(placement=placement, tracking={"wandb": {"apiKeySecretRef": KEY}})[names.WANDB_KEY] == "own"


def test_users_variable_never_replaces_the_hub_token() -> None:
    placement = {"env": [{"name": names.Env.HF_TOKEN.value, "value": "own"}]}
    environment = build_secret_variables(placement=placement, model={"source": "org/m", "tokenSecretRef": KEY})
    assert environment[names.Env.HF_TOKEN.value] == KEY


def test_pods_mount_the_claims_of_metric_models_benchmarks_and_of_the_evaluated_model() -> None:
    benchmark = {"name": "lm-eval", "folder": "pvc://tasks/a"}
    claims = {"evaluation": {"metricModels": {"bertscore": "pvc://metrics/a"}, "benchmarks": [benchmark]}, "phases": {"train": False, "from": "pvc://results/model"}}
    raw_spec = FineTuneJobSpec.model_validate({"model": {"source": "org/m"}, **claims})
    volumes = build_mounts(raw_spec).volumes
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in volumes] == ["metrics", "results", "tasks"]
