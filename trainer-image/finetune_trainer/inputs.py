"""`inputs.json`: the local paths of everything that the supervisor has fetched and checked for its ranks.

Ranks import their libraries while the supervisor downloads. When model, data and the checkpoint to
resume from are on the local disk, the supervisor writes this file atomically. A rank downloads nothing itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_api.base import WireModel
from pydantic import Field

from finetune_trainer.files import replace_file

FILE_NAME = "inputs.json"


class RestoredCheckpoint(WireModel):
    """A committed checkpoint that was downloaded and matches its manifest."""

    path: Path = Field(description="Local folder of the checkpoint, as the Trainer wrote it: a plain HF or PEFT folder.")
    step: int = Field(ge=1, description="Optimizer steps done at the checkpoint.")
    uri: str = Field(description="Address of the checkpoint in storage.")
    manifest: dict[str, Any] = Field(default_factory=dict, description="Manifest of the checkpoint.")


class Inputs(WireModel):
    """The local paths of everything that a rank reads, and the folder that it may write to."""

    model: Path = Field(description="Folder of the base model.")
    tokenizer: Path | None = Field(default=None, description="Folder of the tokenizer; None if the model's folder holds the tokenizer.")
    adapter: Path | None = Field(
        default=None, description="Folder of the adapter to continue training (method.adapter)."
    )
    combined_adapters: list[Path] = Field(default_factory=list, description="Folder of each adapter of output.combineAdapters.")
    reference: Path | None = Field(default=None, description="Folder of the reference model (trainer.dpo).")
    bertscore_model: Path | None = Field(default=None, description="Folder of the model of evaluation.metricModels.bertscore.")
    similarity_model: Path | None = Field(default=None, description="Folder of the model of evaluation.metricModels.semanticSimilarity.")
    benchmarks: list[Path | None] = Field(
        default_factory=list, description="Folder of each benchmark of evaluation.benchmarks; None for a benchmark without a folder."
    )
    train: list[Path] = Field(default_factory=list, description="Training files, in the order of their names.")
    mixture: list[list[Path]] = Field(default_factory=list, description="Files of each item of dataset.mixture.")
    validation: list[Path] = Field(default_factory=list, description="Validation files.")
    images: Path | None = Field(default=None, description="Folder with the images (dataset.images.root).")
    image_digests: dict[str, str] = Field(
        default_factory=dict, description="sha256 (hex) over the contents of the images that the rows name, by set (`finetune_api.lineage.IMAGE_SETS`)."
    )
    test: list[Path] = Field(default_factory=list, description="Test files.")
    file_digests: dict[Path, str] = Field(default_factory=dict, description="sha256 (hex) of each data file whose sha256 is known from the download.")
    stored_rows: str | None = Field(default=None, description="Digest of the prepared rows that were downloaded from storage. None if no rows were downloaded.")
    source_versions: dict[str, str] = Field(
        default_factory=dict, description="Version of the base model and of the reference model at their sources. The keys are spec paths."
    )
    model_revision: str = Field(description="Commit of a hub model, or a fingerprint of the files of another model.")
    dataset_digest: str = Field(description="sha256 (hex) over the training files' contents.")
    restore: RestoredCheckpoint | None = Field(default=None, description="The checkpoint to resume from.")
    output_dir: Path = Field(description="Scratch folder for the Trainer (its output_dir) on local disk.")
    config_maps: Path = Field(description="Folder of the mounted ConfigMaps, with one file `<name>/<key>` for each key.")

    def write(self, work_folder: Path) -> None:
        """Write `<work>/inputs.json` atomically."""
        with replace_file(work_folder / FILE_NAME) as partial_file:
            partial_file.write_text(self.model_dump_json(by_alias=True))

    @staticmethod
    def read(work_folder: Path) -> Inputs | None:
        """Return the inputs, or None if the file does not exist yet."""
        try:
            text = (work_folder / FILE_NAME).read_text()
        except FileNotFoundError:
            return None
        return Inputs.model_validate_json(text)
