"""A token in another tool's configuration file reaches the trainer through a Secret, and appears nowhere else."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import PLURAL, Env
from finetune_cli import main, output
from finetune_operator.builders.job import build_job
from finetune_operator.builders.run_config import build_run_config

from tests.integration.cli.conftest import Result
from tests.support.kubeapi import KubeApi
from tests.unit.operator.samples import CONFIG, accept_spec, finetunejob

HUB_TOKEN, OPENAI_KEY = "hf_" + "q1W2e3R4t5Y6u7I8", "sk-" + "z9X8c7V6b5N4m3L2k1J0"
ENV_CONFIG = f"MODEL_NAME=org/gated\nTRAIN_DATA_PATH=org/rows\nDATASET_TYPE=instruction_jsonl\nHUGGINGFACE_TOKEN={HUB_TOKEN}\nDEVICE=cpu\n"
TOML_CONFIG = '[fine_tuner]\nbase_model_id = "org/gated"\ntraining_data_id = "org/rows"\nload_in_4bit = false\nreport_to = "none"\n'


@pytest.mark.parametrize(
    ("name", "text", "tool_flags", "expected_variables"),
    [
        ("train.env", ENV_CONFIG, [], {Env.HF_TOKEN.value: HUB_TOKEN}),
        ("train.toml", TOML_CONFIG, ["--hf-key", HUB_TOKEN, "--openai-key", OPENAI_KEY], {Env.HF_TOKEN.value: HUB_TOKEN, "OPENAI_API_KEY": OPENAI_KEY}),
    ],
    ids=["env", "toml"],
)  # fmt: skip
def test_an_imported_token_reaches_only_the_pod(
    name: str, text: str, tool_flags: list[str], expected_variables: dict[str, str],
    finetune: Callable[..., Result], api: KubeApi, namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / name).write_text(text, encoding="utf-8")
    manifest = tmp_path / "job.yaml"
    options = [
        "--name",
        "bot",
        "--data",
        "org/rows",
        "--storage",
        "s3://models/x",
        "--gpus",
        "0",
        "--set",
        "output=null",
    ]
    output.error_console.cache_clear()
    assert main.run(["import", str(tmp_path / name), *options, "-o", str(manifest)], tool_flags) == output.OK
    captured_output = capsys.readouterr()
    submit_result = finetune("submit", str(manifest))
    assert submit_result.code == 0, submit_result.err
    created_object = api.get(PLURAL, namespace, "bot")
    job = build_first_job(created_object)
    assert read_secret_variables(job, api, namespace) == expected_variables
    archive = tmp_path / "bundle.tar.gz"
    bundle_result = finetune("support-bundle", "bot", "-o", str(archive))
    visible_texts = [
        captured_output.out,
        captured_output.err,
        submit_result.out,
        submit_result.err,
        bundle_result.out,
        json.dumps(created_object),
        json.dumps(job),
    ]
    for secret in expected_variables.values():
        assert not any(secret in text for text in visible_texts)
        assert secret.encode() not in archive.read_bytes()


def build_first_job(created_object: dict[str, Any]) -> dict[str, Any]:
    """Return the Job that the operator creates for the first attempt of a FineTuneJob."""
    resolution = accept_spec(created_object["spec"])
    own_job = finetunejob(created_object["spec"])
    run = build_run_config(own_job, resolution.spec, 1, defaults=resolution.defaults, committed_step=0, max_step=None)
    return build_job(own_job, run, resolution.pool, CONFIG)


def read_secret_variables(job: dict[str, Any], api: KubeApi, namespace: str) -> dict[str, str]:
    """Return the trainer's environment variables that come from Secrets, with the values that a kubelet would set."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {}
    for variable in container["env"]:
        reference = (variable.get("valueFrom") or {}).get("secretKeyRef")
        if reference is not None:
            data = api.get("secrets", namespace, reference["name"])["data"]
            variables[variable["name"]] = base64.b64decode(data[reference["key"]]).decode()
    return variables
