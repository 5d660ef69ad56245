"""The InferenceService in the hand-off files is valid for KServe's real CRD. The CRD comes from KServe's Go module."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.results.serving_files import ServedModel, build_serving_files

pytestmark = pytest.mark.slow
KSERVE = "github.com/kserve/kserve@v0.15.2"
URI = "s3://models/ft/team-a/support-bot/UID/model/a1-1f3c9a2b"


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The schema of InferenceService v1beta1, changed so that validation refuses unknown fields, as kubectl does."""
    if shutil.which("go") is None:
        pytest.skip("needs Go")
    download_process = subprocess.run(
        ["go", "mod", "download", "-json", KSERVE], cwd=tmp_path_factory.mktemp("go"), capture_output=True, text=True, timeout=300, check=False
    )
    assert download_process.returncode == 0, download_process.stderr
    file = Path(json.loads(download_process.stdout)["Dir"]) / "config/crd/full/serving.kserve.io_inferenceservices.yaml"
    crd = yaml.safe_load(file.read_text())
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1beta1")
    return _forbid_unknown_fields(version["schema"]["openAPIV3Schema"])


def _forbid_unknown_fields(schema: Any) -> Any:
    """Add `additionalProperties: false` to all objects whose fields are listed. In the result, a field of the Kubernetes type int-or-string accepts any
    value.
    """
    if isinstance(schema, list):
        return [_forbid_unknown_fields(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {}
    strict_schema = {key: _forbid_unknown_fields(value) for key, value in schema.items() if key != "format"}
    is_closed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields")
    return {"additionalProperties": False} | strict_schema if is_closed else strict_schema


def read_inference_service(rank: int | None) -> dict[str, Any]:
    spec = FineTuneJobSpec.model_validate({"model": {"source": "org/base"}, "dataset": {"train": "org/d"}, "output": {"serving": ["kserve"]}})
    objects = yaml.safe_load_all(build_serving_files(spec, ServedModel("bot", "team-a", "hf://org/base", URI, rank))["kserve.yaml"])
    inference_service: dict[str, Any] = next(value for value in objects if value["kind"] == "InferenceService")
    return inference_service


def add_metadata(schema: dict[str, Any]) -> dict[str, Any]:
    return schema | {"properties": schema["properties"] | {"metadata": {"type": "object"}}}


@pytest.mark.parametrize("rank", [None, 16])
def test_the_inference_service_is_valid(rank: int | None, schema: dict[str, Any]) -> None:
    jsonschema.validate(read_inference_service(rank), add_metadata(schema))


def test_a_misspelled_field_is_refused(schema: dict[str, Any]) -> None:
    service = read_inference_service(16)
    service["spec"]["predictor"]["model"]["storageURI"] = service["spec"]["predictor"]["model"].pop("storageUri")
    with pytest.raises(jsonschema.ValidationError, match="storageURI"):
        jsonschema.validate(service, add_metadata(schema))
