"""The OCI artefact of a final model, in the format of the CNCF ModelPack specification (v0.0.7).

Each file of the model is one layer, which is neither packed nor compressed. The layer's digest is therefore the file's sha256, and the
artefact needs no second copy of the weights. Config and manifest depend only on the committed manifest of the model, so the trainer and the
command line compute the same digest.

Sources: the OCI image specification v1.1 (manifest, descriptor) and the ModelPack specification (media types, annotations, config).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.names import Storage
from finetune_api.spec.enums import OutputKind

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
FILE_PATH = "org.cncf.model.filepath"
"""Annotation of a layer: path of the file in the model's folder."""
TITLE = "org.opencontainers.image.title"
"""Annotation with the same path. ORAS and other tools that do not know ModelPack use it as file name."""

MANIFEST_KEY, CONFIG_KEY = f"{Storage.SERVING}/oci/manifest.json", f"{Storage.SERVING}/oci/config.json"
"""Paths below the job's folder in storage."""

_CONTENT_OF_SUFFIX = {"safetensors": "weight", "bin": "weight", "md": "doc", "py": "code"}
_DOCUMENTS = ("LICENSE", "LICENCE", "NOTICE", "README")


@dataclass(frozen=True)
class ModelFile:
    """One file of a committed model: path in the model's folder, size in bytes, sha256 (hex)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class OciArtefact:
    """Config and manifest as the bytes that a registry stores. The layers are the files of the model."""

    config: bytes
    manifest: bytes

    @property
    def digest(self) -> str:
        """Return the digest by which registries address the artefact: `sha256:` and the hash of the manifest."""
        return digest_of(self.manifest)


def modelpack_artefact(name: str, kind: OutputKind, files: Sequence[ModelFile]) -> OciArtefact:
    """Return config and manifest of a model. `name`: name of the FineTuneJob."""
    ordered = sorted(files, key=lambda file: file.path)
    content = "adapter for the base model that adapter_config.json names" if kind is OutputKind.ADAPTER else "complete model"
    config = to_bytes(
        {
            "descriptor": {"name": name, "title": name, "description": f"{content}, trained by the FineTuneJob {name}"},
            "config": {"architecture": "transformer", "format": "safetensors"},
            "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in ordered]},
        }
    )
    manifest = {
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": MODEL_TYPE,
        "config": descriptor(CONFIG_TYPE, config), "layers": [_layer(file) for file in ordered],
    }  # fmt: skip
    return OciArtefact(config, to_bytes(manifest))


def descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    """Return the OCI descriptor of a blob."""
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def to_bytes(document: dict[str, Any]) -> bytes:
    """Return canonical JSON, with sorted keys and without spaces."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def digest_of(data: bytes) -> str:
    """Return the OCI digest of a blob."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _layer(file: ModelFile) -> dict[str, Any]:
    return {
        "mediaType": f"application/vnd.cncf.model.{_content_of(file.path)}.v1.raw", "digest": f"sha256:{file.sha256}", "size": file.size,
        "annotations": {FILE_PATH: file.path, TITLE: file.path},
    }  # fmt: skip


def _content_of(path: str) -> str:
    """Return ModelPack's word for the content of a file: weight, doc, code, or weight.config for settings and tokenizers."""
    name = path.rpartition("/")[2]
    if name.partition(".")[0].upper() in _DOCUMENTS:
        return "doc"
    return _CONTENT_OF_SUFFIX.get(name.rpartition(".")[2], "weight.config")
