"""Each example that needs no GPU completes with `finetune run --local` and a tiny model."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from finetune_api.names import KIND
from finetune_api.sources import S3Source, parse_source

from tests.pod.cli.test_run_local import run_finetune
from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.pod, pytest.mark.slow, pytest.mark.timeout(300)]
EXAMPLES = Path(__file__).parents[3] / "examples"
LOCAL_EXAMPLES = ("methods/instruction-lora", "methods/dpo", "methods/grpo", "methods/spectrum", "sources/csv-from-configmap", "results/tracking")
"""The examples that need neither a GPU nor a server. OPTIONS removes MLflow from `results/tracking`."""
OPTIONS = {"results/tracking": ["--set", "tracking.reportTo=[tensorboard]", "--set", "tracking.mlflow=null", "--set", "placement=null"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    make_tiny_model(root / "tiny")
    return root


def prepare_local_options(folder: Path, path: Path) -> list[str]:
    """Write the ConfigMaps of an example file into folders. Returns the options that select local folders for the model and the data."""
    documents = list(yaml.safe_load_all(path.read_text("utf-8")))
    (job,) = (document for document in documents if document["kind"] == KIND)
    options = ["--set", f"model.source=file://{folder}/tiny"]
    source = parse_source(job["spec"]["dataset"]["train"])
    if isinstance(source, S3Source):
        options += ["--set", f"dataset.train=file://{EXAMPLES}/data/{source.key}"]
    for document in documents:
        if document["kind"] == "ConfigMap":
            name = document["metadata"]["name"]
            (folder / name).mkdir(exist_ok=True)
            for key, text in document["data"].items():
                (folder / name / key).write_text(text, "utf-8")
            options += ["--config-map", f"{name}={folder / name}"]
    return options


@pytest.mark.parametrize("name", LOCAL_EXAMPLES)
def test_example_trains(folder: Path, name: str) -> None:
    path = EXAMPLES / f"{name}.yaml"
    job_name = path.stem
    options = [*prepare_local_options(folder, path), "--set", "dataset.maxSequenceLength=128", *OPTIONS.get(name, [])]
    result: subprocess.CompletedProcess[str] = run_finetune(folder, "run", str(path), "--local", "-o", f"out-{job_name}", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{job_name}: done, the model is in file://" in result.stdout
    assert len(list((folder / f"out-{job_name}").rglob("model/_COMMITTED"))) == 1
