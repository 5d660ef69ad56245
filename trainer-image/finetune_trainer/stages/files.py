"""The files with which the supervisor and the process of a stage exchange data."""

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
"""Folder for the results of finished parts of a stage. They are uploaded at once, so a repeated stage skips these parts."""
MEASUREMENTS_FILE = "measurements.json"
"""Measurements of the trained model, for the stage `comparing`."""


class StageTask(WireModel):
    """`task.json`: the input of the process of a stage. The supervisor writes it to the stage's folder."""

    stage: Stage = Field(description="The stage.")
    model: Path = Field(description="Folder with the committed model or adapter.")
    kind: OutputKind = Field(description="Whether `model` is an adapter or a complete model.")
    uri: str = Field(description="Address of the committed model in storage.")
    evaluated: Path | None = Field(default=None, description="Folder with the files of the stage `evaluating`, for the stage `comparing`.")
    merged: Path | None = Field(default=None, description="Folder with the merged model; None without output.mergeAdapter.")
    merged_uri: str | None = Field(default=None, description="Address of the merged model in storage.")
    reference_problem: str | None = Field(default=None, description="Why the folder has no reference values, for the stage `verifying`.")

    @staticmethod
    def read(folder: Path) -> StageTask:
        """Read the task in the folder of a stage."""
        return StageTask.model_validate_json((folder / TASK_FILE).read_text())


class StageResult(LenientModel):
    """`result.json`: the result of the process of a stage. The files of the stage are in the folder `files` beside it."""

    evaluation: EvaluationResult | None = Field(default=None, description="For `status.evaluation`. Absent if the stage measures nothing.")
    merged_uri: str | None = Field(default=None, description="For `status.output.mergedUri`. Absent if the stage merges nothing.")
    verification: Verification | None = Field(default=None, description="For `status.output.verification`. Absent if the stage verifies nothing.")
    published_uri: str | None = Field(default=None, description="For `status.output.publishedUri`. Absent if the stage copies nothing.")
    hub_uri: str | None = Field(default=None, description="For `status.output.hubUri`. Absent if the stage pushes nothing.")
    oci_digest: str | None = Field(default=None, description="For `status.output.ociDigest`. Absent if the stage writes no OCI artefact.")


class StoredFile(LenientModel):
    """A file that a stage has stored."""

    key: str = Field(description="Key below the job's folder in storage.")
    size: int = Field(description="Bytes.")
    sha256: str = Field(description="Hex.")


class StageRecord(LenientModel):
    """`run/stages/<stage>.json` in storage: the stage is done. Later attempts skip the stage if the record is about the same model."""

    stage: Stage
    model_sha256: str = Field(description="sha256 (hex) of the manifest of the model that the stage read.")
    attempt: int = Field(description="Number of the attempt that ran the stage.")
    time: str = Field(description="Time of the record, in ISO 8601.")
    result: StageResult = Field(default_factory=StageResult)
    files: list[StoredFile] = Field(default_factory=list)
