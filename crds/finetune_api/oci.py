"""The OCI artefact of a final model, in the format of the CNCF ModelPack specification (v0.0.7).

Each file of the model is one layer, neither packed nor compressed. The layer's digest is therefore the file's sha256, and the artefact
needs no second copy of the weights. The OCI config and the OCI manifest depend only on the committed manifest of the model, so the trainer
and the command line compute the same digest.

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

MANIFEST_MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"
MODEL_MEDIA_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_MEDIA_TYPE = "application/vnd.cncf.model.config.v1+json"
FILE_PATH_ANNOTATION = "org.cncf.model.filepath"
"""Annotation of a layer: path of the file in the model's folder."""
TITLE_ANNOTATION = "org.opencontainers.image.title"
"""Annotation of a layer with the same value as FILE_PATH_ANNOTATION. ORAS and other tools that do not know ModelPack use this annotation as the file name."""

MANIFEST_KEY, CONFIG_KEY = f"{Storage.SERVING}/oci/manifest.json", f"{Storage.SERVING}/oci/config.json"
"""Paths of the OCI manifest and the OCI config below the job's folder in storage."""

_CONTENT_TYPE_OF_EXTENSION = {"safetensors": "weight", "bin": "weight", "md": "doc", "py": "code"}
_DOCUMENT_NAMES = ("LICENSE", "LICENCE", "NOTICE", "README")


@dataclass(frozen=True)
class ModelFile:
    """One file of a committed model: its path in the model's folder, its size in bytes, and its sha256 (hex)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class OciArtefact:
    """The OCI config and the OCI manifest as the bytes that a registry stores. The layers are the files of the model."""

    config: bytes
    manifest: bytes

    @property
    def digest(self) -> str:
        """The digest by which registries address the artefact: `sha256:` and the hash of the manifest."""
        return compute_digest(self.manifest)


def build_modelpack_artefact(job_name: str, output_kind: OutputKind, files: Sequence[ModelFile]) -> OciArtefact:
    """Return the OCI config and the OCI manifest of a model. `job_name`: name of the FineTuneJob, which is also the name of the model."""
    sorted_files = sorted(files, key=lambda file: file.path)
    content_description = "adapter for the base model that adapter_config.json names" if output_kind is OutputKind.ADAPTER else "complete model"
    config = to_canonical_json(
        {
            "descriptor": {"name": job_name, "title": job_name, "description": f"{content_description}, trained by the FineTuneJob {job_name}"},
            "config": {"architecture": "transformer", "format": "safetensors"},
            "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in sorted_files]},
        }
    )
    manifest = {
        "schemaVersion": 2, "mediaType": MANIFEST_MEDIA_TYPE, "artifactType": MODEL_MEDIA_TYPE,
        "config": build_descriptor(CONFIG_MEDIA_TYPE, config), "layers": [_build_layer(file) for file in sorted_files],
    }  # fmt: skip
    return OciArtefact(config, to_canonical_json(manifest))


def build_descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    """Return the OCI descriptor of a blob: its media type, digest and size."""
    return {"mediaType": media_type, "digest": compute_digest(blob), "size": len(blob)}


def to_canonical_json(document: dict[str, Any]) -> bytes:
    """Return the document as canonical JSON, with sorted keys and without spaces."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def compute_digest(blob: bytes) -> str:
    """Return the OCI digest of a blob: `sha256:` and its hash (hex)."""
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _build_layer(file: ModelFile) -> dict[str, Any]:
    return {
        "mediaType": f"application/vnd.cncf.model.{_choose_content_type(file.path)}.v1.raw", "digest": f"sha256:{file.sha256}", "size": file.size,
        "annotations": {FILE_PATH_ANNOTATION: file.path, TITLE_ANNOTATION: file.path},
    }  # fmt: skip


def _choose_content_type(path: str) -> str:
    """Return the content type of a file in ModelPack's media types: weight, doc, code, or weight.config for settings and tokenizers."""
    file_name = path.rpartition("/")[2]
    if file_name.partition(".")[0].upper() in _DOCUMENT_NAMES:
        return "doc"
    return _CONTENT_TYPE_OF_EXTENSION.get(file_name.rpartition(".")[2], "weight.config")
