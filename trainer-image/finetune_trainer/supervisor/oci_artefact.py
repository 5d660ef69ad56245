"""Stores the config and the manifest of the model's OCI artefact next to the model. The layers of the artefact are the model's files, which are
already in storage."""

from __future__ import annotations

from finetune_api.errors import NoCheckpointError
from finetune_api.oci import CONFIG_KEY, MANIFEST_KEY, ModelFile, build_modelpack_artefact
from finetune_api.spec.enums import OutputKind

from finetune_trainer.checkpoint.tree import CheckpointTree


def store_oci_artefact(tree: CheckpointTree, name: str, *, is_merged: bool) -> str:
    """Store the config and the manifest. Returns the digest of the artefact.

    `name`: name of the FineTuneJob. `is_merged`: whether the artefact holds the merged model; otherwise it holds the trained adapter or model.
    Errors: NoCheckpointError ModelDamaged; those of storage.
    """
    committed_model = tree.get_merged() if is_merged else tree.get_committed(None)
    manifest = tree.read_manifest(committed_model) if committed_model is not None else None
    if manifest is None:
        raise NoCheckpointError("ModelDamaged", "the manifest of the committed model cannot be read")
    artefact = build_modelpack_artefact(
        name, manifest.kind or OutputKind.MODEL, [ModelFile(file.path, file.size, file.sha256) for file in manifest.files]
    )
    tree.store.put(CONFIG_KEY, artefact.config)
    tree.store.put(MANIFEST_KEY, artefact.manifest)
    return artefact.digest
