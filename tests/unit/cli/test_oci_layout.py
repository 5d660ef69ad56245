"""The OCI layouts that `finetune export` writes: digests, contents, and what skopeo reads from these layouts."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from finetune_api.oci import build_modelpack_artefact
from finetune_api.spec.cluster import StorageRoot
from finetune_cli.job_storage import JobStorage, StorageError
from finetune_cli.oci_layout import LayoutForm, write_layout

from tests.unit.cli.conftest import RunCommand
from tests.unit.cli.test_job_storage import commit_folder

FILES = {
    "adapter_model.safetensors": b"weights", "adapter_config.json": b"{}", "README.md": b"# card", "tokenizer.json": b"{}", "modeling.py": b"code",
}  # fmt: skip


@pytest.fixture
def storage(tmp_path: Path) -> JobStorage:
    commit_folder(tmp_path / "job", "model", FILES, manifest={"job": "team-a/bot/uid", "kind": "adapter"})
    return JobStorage(f"file://{tmp_path / 'job'}", StorageRoot())


def export(storage: JobStorage, target: Path, form: LayoutForm = LayoutForm.MODELPACK) -> str:
    return write_layout(storage, target, form, "v1", lambda path, size: None).digest


def read_blob(layout: Path, digest: str) -> bytes:
    data = (layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == digest
    return data


def read_manifest(layout: Path) -> dict[str, Any]:
    descriptor = json.loads((layout / "index.json").read_bytes())["manifests"][0]
    assert descriptor["annotations"] == {"org.opencontainers.image.ref.name": "v1"}
    manifest: dict[str, Any] = json.loads(read_blob(layout, descriptor["digest"]))
    return manifest


def test_a_modelpack_layer_is_a_file(storage: JobStorage, tmp_path: Path) -> None:
    digest = export(storage, tmp_path / "layout")
    manifest = read_manifest(tmp_path / "layout")
    layers = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in manifest["layers"]}
    assert {path: read_blob(tmp_path / "layout", layer["digest"]) for path, layer in layers.items()} == FILES
    contents = {path: layer["mediaType"].removeprefix("application/vnd.cncf.model.").removesuffix(".v1.raw") for path, layer in layers.items()}
    assert contents == {
        "adapter_model.safetensors": "weight", "adapter_config.json": "weight.config", "README.md": "doc", "tokenizer.json": "weight.config",
        "modeling.py": "code",
    }  # fmt: skip
    config = json.loads(read_blob(tmp_path / "layout", manifest["config"]["digest"]))
    assert config["descriptor"]["name"] == "bot"
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    assert digest == json.loads((tmp_path / "layout/index.json").read_bytes())["manifests"][0]["digest"]


def test_an_image_has_the_files_below_models_for_each_architecture(storage: JobStorage, tmp_path: Path) -> None:
    digest = export(storage, tmp_path / "image", LayoutForm.IMAGE)
    images = read_manifest(tmp_path / "image")["manifests"]
    assert [image["platform"] for image in images] == [{"architecture": "amd64", "os": "linux"}, {"architecture": "arm64", "os": "linux"}]
    manifest, other_manifest = (json.loads(read_blob(tmp_path / "image", image["digest"])) for image in images)
    assert manifest["layers"] == other_manifest["layers"]
    configs = [json.loads(read_blob(tmp_path / "image", image_manifest["config"]["digest"])) for image_manifest in (manifest, other_manifest)]
    assert [config.pop("architecture") for config in configs] == ["amd64", "arm64"] and configs[0] == configs[1]
    extracted_files = {}
    for layer in manifest["layers"]:
        read_blob(tmp_path / "image", layer["digest"])
        with tarfile.open(tmp_path / "image/blobs/sha256" / layer["digest"].removeprefix("sha256:")) as archive:
            member = archive.getmembers()[0]
            assert (member.mode, member.uid, member.mtime) == (0o644, 0, 0)
            content = archive.extractfile(member)
            assert content is not None
            extracted_files[member.name] = content.read()
    assert extracted_files == {f"models/{path}": data for path, data in FILES.items()}
    config = json.loads(read_blob(tmp_path / "image", manifest["config"]["digest"]))
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    blobs = list((tmp_path / "image/blobs/sha256").iterdir())
    assert len(blobs) == len(FILES) + 5, "the layers, two configs, two manifests and their index; no downloaded file is left, even if two files are equal"
    assert export(storage, tmp_path / "again", LayoutForm.IMAGE) == digest


def test_the_merged_model_is_exported_if_there_is_one(storage: JobStorage, tmp_path: Path) -> None:
    model = json.loads((tmp_path / "job/model/_COMMITTED").read_text())["manifestSha256"]
    manifest = {"job": "team-a/bot/uid", "kind": "model", "extra": {"adapterSha256": model}}
    commit_folder(tmp_path / "job", "merged", {"model.safetensors": b"merged"}, manifest=manifest)
    export(storage, tmp_path / "layout")
    assert [layer["annotations"]["org.cncf.model.filepath"] for layer in read_manifest(tmp_path / "layout")["layers"]] == ["model.safetensors"]


def test_a_merged_model_of_another_adapter_is_not_exported(storage: JobStorage, tmp_path: Path) -> None:
    manifest = {"job": "team-a/bot/uid", "kind": "model", "extra": {"adapterSha256": "0" * 64}}
    commit_folder(tmp_path / "job", "merged", {"model.safetensors": b"merged"}, manifest=manifest)
    export(storage, tmp_path / "layout")
    assert len(read_manifest(tmp_path / "layout")["layers"]) == len(FILES)


def test_a_damaged_file_leaves_no_layout(storage: JobStorage, tmp_path: Path) -> None:
    (tmp_path / "job/model/a1-00000000/README.md").write_bytes(b"# cord")
    with pytest.raises(StorageError, match=r"README\.md is damaged"):
        export(storage, tmp_path / "layout")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job"]


def test_a_job_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    with pytest.raises(StorageError, match="there is no committed model"):
        export(JobStorage(f"file://{tmp_path / 'job'}", StorageRoot()), tmp_path / "layout")


def test_the_digest_does_not_depend_on_the_order_of_the_files() -> None:
    from finetune_api.oci import ModelFile
    from finetune_api.spec.enums import OutputKind

    files = [ModelFile("b", 1, "b" * 64), ModelFile("a", 1, "a" * 64)]
    assert build_modelpack_artefact("bot", OutputKind.MODEL, files) == build_modelpack_artefact("bot", OutputKind.MODEL, files[::-1])
    assert build_modelpack_artefact("bot", OutputKind.ADAPTER, files).digest != build_modelpack_artefact("bot", OutputKind.MODEL, files).digest


@pytest.mark.parametrize("form", list(LayoutForm))
def test_skopeo_copies_the_layout(storage: JobStorage, tmp_path: Path, form: LayoutForm) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("needs skopeo")
    digest = export(storage, tmp_path / "layout", form)
    command = ["skopeo", "copy", "--quiet", "--all", "--insecure-policy", "--preserve-digests", f"oci:{tmp_path / 'layout'}:v1", f"dir:{tmp_path / 'copy'}"]
    subprocess.run(command, check=True, timeout=60)
    assert f"sha256:{hashlib.sha256((tmp_path / 'copy/manifest.json').read_bytes()).hexdigest()}" == digest


def test_skopeo_finds_the_image_of_every_architecture_with_gpus(storage: JobStorage, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("needs skopeo")
    export(storage, tmp_path / "layout", LayoutForm.IMAGE)
    layers = []
    for architecture in ("amd64", "arm64"):
        command = ["skopeo", "inspect", f"--override-arch={architecture}", "--override-os=linux", f"oci:{tmp_path / 'layout'}:v1"]
        image_info = json.loads(subprocess.run(command, check=True, timeout=60, capture_output=True).stdout)
        assert (image_info["Architecture"], image_info["Os"]) == (architecture, "linux")
        layers.append(image_info["Layers"])
    assert layers[0] == layers[1] and len(layers[0]) == len(FILES)


def test_command_writes_a_new_folder(storage: JobStorage, tmp_path: Path, run_command: RunCommand) -> None:
    uri = f"{storage.uri}/model"
    code, out, _ = run_command("export", uri, "--to", tmp_path / "layout", "--form", "image")
    assert (code, out.startswith(f"{tmp_path / 'layout'}: sha256:")) == (0, True)
    code, _, err = run_command("export", uri, "--to", tmp_path / "layout")
    assert (code, err) == (1, f"error: --to {tmp_path / 'layout'}: the folder exists already; choose a new one\n")
    code, _, err = run_command("export", uri, "--to", tmp_path / "other", "--form", "docker")
    assert (code, err) == (1, "error: --form docker: write modelpack or image\n")
