"""Defines the files through which the supervisor and the process of a stage exchange data."""

from __future__ import annotations

from pathlib import Path

from finetune_api.base import LenientModel, WireModel
from finetune_api.spec.enums import OutputKind
from finetune_api.status import EvaluationResult, Stage, Verification
from pydantic import Field

TASK_FILE = "task.json"
RESULT_FILE = "result.json"
OUTPUT_FOLDER = "files"
PARTS_FOLDER = "parts"
"""Folder for the results of finished parts of a stage. The supervisor uploads each result as soon as its part is finished, so that a repeated stage
skips this part."""
MEASUREMENTS_FILE = "measurements.json"
"""Measurements of the trained model, for the stage `comparing`."""


class StageTask(WireModel):
    """`task.json`: the input of the process of a stage. The supervisor writes this file to the stage's folder."""

    stage: Stage = Field(description="The stage.")
    model: Path = Field(description="Folder with the committed model or adapter.")
    kind: OutputKind = Field(description="Whether `model` is an adapter or a complete model.")
    uri: str = Field(description="Address of the committed model in storage.")
    evaluated: Path | None = Field(default=None, description="Folder with the files that the stage `evaluating` wrote. The stage `comparing` reads them.")
    merged: Path | None = Field(default=None, description="Folder with the merged model. None if output.mergeAdapter is not set.")
    merged_uri: str | None = Field(default=None, description="Address of the merged model in storage.")
    reference_problem: str | None = Field(default=None, description="For the stage `verifying`: why its folder contains no reference values.")

    @staticmethod
    def read(folder: Path) -> StageTask:
        """Read the task in the folder of a stage."""
        return StageTask.model_validate_json((folder / TASK_FILE).read_text())


class StageResult(LenientModel):
    """`result.json`: the result of the process of a stage. The files that the stage has written are in the folder `files` next to it."""

    evaluation: EvaluationResult | None = Field(default=None, description="Value of `status.evaluation`. None if the stage measures nothing.")
    merged_uri: str | None = Field(default=None, description="Value of `status.output.mergedUri`. None if the stage merges nothing.")
    verification: Verification | None = Field(default=None, description="Value of `status.output.verification`. None if the stage verifies nothing.")
    published_uri: str | None = Field(default=None, description="Value of `status.output.publishedUri`. None if the stage copies nothing.")
    hub_uri: str | None = Field(default=None, description="Value of `status.output.hubUri`. None if the stage pushes nothing.")
    oci_digest: str | None = Field(default=None, description="Value of `status.output.ociDigest`. None if the stage writes no OCI artefact.")


class StoredFile(LenientModel):
    """A file that a stage has stored."""

    key: str = Field(description="Key of the file, relative to the job's folder in storage.")
    size: int = Field(description="Size of the file in bytes.")
    sha256: str = Field(description="SHA-256 of the file's contents, in hex.")


class StageRecord(LenientModel):
    """`run/stages/<stage>.json` in storage: the record of a completed stage. A later attempt skips the stage if its committed model is the same."""

    stage: Stage
    model_sha256: str = Field(description="sha256 (hex) of the manifest of the model that the stage read.")
    attempt: int = Field(description="Number of the attempt that ran the stage.")
    time: str = Field(description="Time of the record, in ISO 8601.")
    result: StageResult = Field(default_factory=StageResult)
    files: list[StoredFile] = Field(default_factory=list)
