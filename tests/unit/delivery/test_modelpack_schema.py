"""The config of the OCI artefact is valid for ModelPack's own schema. The schema comes from the specification's Go module."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
from finetune_api.oci import ModelFile, build_modelpack_artefact
from finetune_api.spec.enums import OutputKind

pytestmark = pytest.mark.slow
MODELPACK = "github.com/modelpack/model-spec@v0.0.7"


@pytest.mark.parametrize("kind", [OutputKind.ADAPTER, OutputKind.MODEL])
def test_config_of_the_artefact_is_valid_for_modelpack(kind: OutputKind, tmp_path: Path) -> None:
    if shutil.which("go") is None:
        pytest.skip("needs Go")
    download_process = subprocess.run(["go", "mod", "download", "-json", MODELPACK], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert download_process.returncode == 0, download_process.stderr
    schema = json.loads((Path(json.loads(download_process.stdout)["Dir"]) / "schema/config-schema.json").read_text())
    config = json.loads(build_modelpack_artefact("bot", kind, [ModelFile("model.safetensors", 8, "0" * 64)]).config)
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"modelfs": {"type": "layers", "diffIds": []}}, schema)
