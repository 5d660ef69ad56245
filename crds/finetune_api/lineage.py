"""The lineage statement of a final model (an in-toto statement) and the DSSE envelope with its signature.

The trainer writes the statement, and the command line signs, verifies and replays it. The predicate is SLSA provenance v1: its fields suit
a fine-tuning run (parameters, dependencies, the builder), and supply-chain tools can read them. Facts for which SLSA has no field are below
`finetune_run`, because the specification reserves names with a vendor's prefix for such extensions.

Sources: the specifications of in-toto attestation v1 (statement, resource descriptor), SLSA provenance v1 and DSSE v1.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from finetune_api.base import LenientModel, WireModel
from finetune_api.names import Storage
from finetune_api.sources import redact_source
from finetune_api.status import ResolvedConfig, TimeUse

STATEMENT_TYPE: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Literal["https://slsa.dev/provenance/v1"] = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://finetune-operator.io/fine-tuning/v1"
BUILDER_ID = "https://finetune-operator.io/trainer"
"""The builder is the trainer in the job's own pod. User code can run in the same pod, so this is SLSA build level 1."""
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_KEY = f"{Storage.LINEAGE}/statement.json"
ENVELOPE_KEY = f"{Storage.LINEAGE}/statement.dsse.json"
"""Path of the signed envelope below the job's folder in storage. STATEMENT_KEY is the path of the statement without a signature."""
BASE_MODEL_DEPENDENCY = "model.source"
"""Name of the base model in the list of dependencies.

In this list, the name of each source is the path of the spec field that contains the source, here `model.source`.
"""
TRAINER_IMAGE_DEPENDENCY = "trainer image"
REVISION_ANNOTATION = "revision"
"""Name of an annotation of the base model. The value of the annotation is the commit of a hub model, or a fingerprint of the model's files."""
TRAINING_IMAGES, HELD_OUT_IMAGES = "training image set", "held-out image set"
"""Names of two dependencies: the images of the training rows, and the images of the validation and test rows.

The digests of these two dependencies cover all image files.
"""
IMAGE_SETS = (TRAINING_IMAGES, HELD_OUT_IMAGES)


class Resource(LenientModel):
    """An in-toto resource descriptor: a file, or another input or result of the run, with its digests by algorithm."""

    name: str | None = None
    uri: str | None = None
    digest: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_wire().items() if value}


class BuildDefinition(LenientModel):
    """The inputs of the run."""

    build_type: str
    external_parameters: dict[str, Any] = Field(description="`spec`: the resolved spec as in `run.json`, without secrets.")
    internal_parameters: dict[str, Any] = Field(default_factory=dict)
    resolved_dependencies: list[Resource] = Field(default_factory=list)


class Builder(LenientModel):
    id: str
    version: dict[str, str] = Field(default_factory=dict, description="Versions of the libraries.")


class BuildMetadata(LenientModel):
    invocation_id: str = Field(description="namespace/name/uid of the FineTuneJob.")
    started_on: str | None = None
    finished_on: str | None = None


class AttemptRecord(LenientModel):
    """`run/records/<incarnation>.json` in storage: how one incarnation of an attempt began, what it used, and how it ended.

    Rank 0's pod writes the file when training begins, after each committed checkpoint, and before the pod ends. If the pod is killed, the
    file has no end time.
    """

    attempt: int = Field(description="Number of the attempt.")
    incarnation: str = Field(description="Name of the folders in storage that the incarnation wrote.")
    started_at: datetime = Field(description="Start of rank 0's pod.")
    ended_at: datetime | None = Field(default=None, description="End of rank 0's pod.")
    gpus: int = Field(default=0, description="GPUs of all pods of the attempt. 0: training on CPUs.")
    pods: int = Field(default=1, description="Pods of the attempt.")
    threads: int | None = Field(default=None, description="Number of CPU threads of each rank; it affects the rounding of sums. Absent if nothing was trained.")
    config_sha256: str = Field(default="", description="sha256 (hex) of the run configuration.")
    start_step: int | None = Field(default=None, description="Optimizer step from which the training started. Absent if nothing was trained.")
    last_step: int | None = Field(default=None, description="Last optimizer step that the incarnation completed.")
    exit_code: int | None = Field(default=None, description="Exit code of rank 0's pod.")
    code: str | None = Field(default=None, description="Code of the failure or of the stop. Absent after a success.")
    message: str | None = Field(default=None, description="What failed, and why.")
    hint: str | None = Field(default=None, description="What the user can do.")
    timings: dict[str, float] = Field(default_factory=dict, description="Duration of each stage in seconds, by name of the stage.")
    time_use: TimeUse | None = Field(default=None, description="What the time of rank 0's container was used for. Absent if the pod was killed.")
    notes: list[str] = Field(default_factory=list, description="Notes of `status.resolved.notes`.")
    resolved: ResolvedConfig = Field(default_factory=ResolvedConfig, description="The configuration in use.")

    def without_texts(self) -> AttemptRecord:
        """Return the record without message, hint and notes, because these texts can contain values that readers of a statement must not see."""
        return self.model_copy(update={"message": None, "hint": None, "notes": []})


class RunSummary(LenientModel):
    """Facts about the run for which SLSA provenance has no field."""

    step: int = Field(description="Optimizer steps of the final model.")
    facts: dict[str, Any] = Field(description="The `facts` of the model's manifest: revision of the base model, data digest, seed, world size, versions, ...")
    attempts: list[AttemptRecord] = Field(default_factory=list)
    stage_seconds: dict[str, float] = Field(default_factory=dict, description="Duration of each stage of the last attempt, in seconds.")


class RunDetails(LenientModel):
    builder: Builder
    metadata: BuildMetadata
    byproducts: list[Resource] = Field(default_factory=list, description="The checkpoints in storage, each with the sha256 of its manifest.")
    finetune_run: RunSummary = Field(alias="finetune_run")


class Provenance(LenientModel):
    """The SLSA predicate."""

    build_definition: BuildDefinition
    run_details: RunDetails


class Statement(LenientModel):
    """The in-toto statement. The subjects of the statement are the files of the model and their manifest."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT_TYPE, alias="_type")
    subject: list[Resource] = Field(min_length=1)
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = PREDICATE_TYPE
    predicate: Provenance

    def to_wire(self) -> dict[str, Any]:
        statement = super().to_wire()
        definition, details = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
        statement["subject"] = [resource.to_wire() for resource in self.subject]
        definition["resolvedDependencies"] = [dependency.to_wire() for dependency in self.predicate.build_definition.resolved_dependencies]
        details["byproducts"] = [byproduct.to_wire() for byproduct in self.predicate.run_details.byproducts]
        return statement

    def to_bytes(self) -> bytes:
        """Return the statement as the JSON that is stored and signed."""
        return json.dumps(self.to_wire(), indent=1, sort_keys=True, ensure_ascii=False).encode()

    @property
    def spec(self) -> dict[str, Any]:
        """The resolved spec without secrets."""
        spec: dict[str, Any] = self.predicate.build_definition.external_parameters.get("spec") or {}
        return spec

    @property
    def run(self) -> RunSummary:
        return self.predicate.run_details.finetune_run

    @property
    def job(self) -> str:
        """The FineTuneJob that wrote the model: `namespace/name/uid`."""
        return self.predicate.run_details.metadata.invocation_id

    def dependency(self, name: str) -> Resource | None:
        """Return the dependency with this name, or None."""
        return next((resource for resource in self.predicate.build_definition.resolved_dependencies if resource.name == name), None)


class Signature(WireModel):
    """A signature in a DSSE envelope. `keyid` is only a hint: it is not signed."""

    keyid: str | None = None
    sig: str = Field(description="Base64.")


class Envelope(WireModel):
    """A DSSE envelope. An envelope with an unknown field is refused, because the signature does not cover that field."""

    payload_type: str
    payload: str = Field(description="The statement's bytes in base64.")
    signatures: list[Signature] = Field(min_length=1)


def encode_signed_bytes(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that a DSSE signature covers: DSSE's pre-authentication encoding of the payload type and the payload."""
    encoded_type = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(encoded_type), encoded_type, len(payload), payload)


def remove_secrets(spec: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the spec without values that may be secret, and the paths of the changed fields.

    The queries and passwords of web addresses and the values of `placement.env` are removed. A spec contains only the names of Secrets,
    never their contents.
    """
    changed_paths: list[str] = []
    redacted_spec = _redact(spec, "", changed_paths)
    for index, variable in enumerate((redacted_spec.get("placement") or {}).get("env") or []):
        if variable.pop("value", None) is not None:
            changed_paths.append(f"placement.env[{index}].value")
    return redacted_spec, changed_paths


def _redact(value: Any, path: str, changed_paths: list[str]) -> Any:
    """Return a copy of a spec or of a part of it without secrets in web addresses, and append the paths of changed values to `changed_paths`."""
    if isinstance(value, dict):
        return {key: _redact(nested_value, f"{path}.{key}".lstrip("."), changed_paths) for key, nested_value in value.items()}
    if isinstance(value, list):
        return [_redact(item, f"{path}[{index}]", changed_paths) for index, item in enumerate(value)]
    if isinstance(value, str) and (redacted_text := redact_source(value)) != value:
        changed_paths.append(path)
        return redacted_text
    return value
