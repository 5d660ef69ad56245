"""Checks a stored model against its commit marker, its manifest, its lineage statement and the statement's signature.

Each check adds findings, each with a code. A user who can write to storage could change all compared files so that they still agree. Therefore,
nothing but a signature by a trusted key proves that the files were not changed after signing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from finetune_api.lineage import (
    BASE_MODEL_DEPENDENCY,
    BUILD_TYPE,
    ENVELOPE_KEY,
    IMAGE_SETS,
    PAYLOAD_TYPE,
    REVISION_ANNOTATION,
    STATEMENT_KEY,
    Envelope,
    Statement,
    remove_secrets,
)
from finetune_api.names import RUN_FILE_NAME, Storage, make_attempt_folder_name, parse_attempt_of_uri
from pydantic import ValidationError

from finetune_cli.job_storage import JobStorage, StorageError, hash_object
from finetune_cli.signing import compute_key_id, decode_payload, is_signed_by

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MARKER_KEY = f"{Storage.MODEL}/{Storage.COMMITTED}"
SHA256_DIGITS = 64


class CheckName(StrEnum):
    """The checks, in the order of the output."""

    MARKER = "marker"
    MANIFEST = "manifest"
    FILES = "files"
    STATEMENT = "statement"
    CHECKPOINTS = "checkpoints"
    SIGNATURE = "signature"


MODEL_CHECKS = (CheckName.MARKER, CheckName.MANIFEST, CheckName.FILES)


class Code(StrEnum):
    """The problem that a check has found. The code of a finding stays the same in all releases."""

    LINK = "FileIsLink"
    """A file or folder is a symbolic link, so its content can change outside this storage."""
    MARKER_MISSING = "MarkerMissing"
    MARKER_INVALID = "MarkerInvalid"
    MANIFEST_MISSING = "ManifestMissing"
    MANIFEST_CHANGED = "ManifestChanged"
    """The sha256 of the manifest differs from the sha256 in the commit marker."""
    MANIFEST_INVALID = "ManifestInvalid"
    PATH_INVALID = "ManifestPathInvalid"
    """The manifest lists a path outside the model's folder."""
    PATH_DUPLICATE = "ManifestPathDuplicate"
    FILE_MISSING = "FileMissing"
    FILE_CHANGED = "FileChanged"
    FILE_UNEXPECTED = "FileUnexpected"
    """The model's folder has a file that the manifest does not list."""
    STATEMENT_MISSING = "StatementMissing"
    STATEMENT_INVALID = "StatementInvalid"
    OTHER_RUN = "StatementOfAnotherRun"
    SUBJECT_CHANGED = "SubjectChanged"
    """The statement's subjects are not the files of the manifest."""
    CONTRADICTS_MANIFEST = "StatementContradictsManifest"
    CONTRADICTS_RUN = "StatementContradictsRun"
    """The statement's spec is not the spec in the stored run configuration."""
    CHECKPOINT_CHANGED = "CheckpointChanged"
    UNSIGNED = "Unsigned"
    """No signature is stored, but the options require one."""
    ENVELOPE_INVALID = "EnvelopeInvalid"
    PAYLOAD_TYPE = "PayloadTypeWrong"
    SIGNED_OTHER = "SignedStatementDiffers"
    """The signed statement is not the stored statement."""
    SIGNATURE_INVALID = "SignatureInvalid"
    """A signature names the trusted key, but does not match the payload."""
    NOT_TRUSTED = "SignatureNotTrusted"
    """No signature was made with the trusted key."""


class SignatureState(StrEnum):
    """What is known about the signature."""

    UNSIGNED = "unsigned"
    NOT_CHECKED = "signed, but not checked"
    VERIFIED = "signed by the given key"
    FAILED = "not verified"


@dataclass(frozen=True)
class Finding:
    """One problem that a check has found."""

    check: CheckName
    code: Code
    message: str


@dataclass
class CheckResults:
    """The result of all checks. `notes` contains a text for each completed check, which says what was checked."""

    findings: list[Finding] = field(default_factory=list)
    notes: dict[CheckName, str] = field(default_factory=dict)
    signature: SignatureState = SignatureState.UNSIGNED
    statement: Statement | None = None
    statement_bytes: bytes = b""
    """The statement as it is stored."""
    folder: str = ""
    """Key of the model's folder."""
    manifest: dict[str, Any] | None = None
    manifest_sha256: str = ""

    def select_findings(self, *checks: CheckName) -> list[Finding]:
        """Return the findings of the given checks."""
        return [finding for finding in self.findings if finding.check in checks]


class Verifier:
    """Runs the checks on one job's folder. Raises StorageError if storage cannot be read."""

    def __init__(self, storage: JobStorage) -> None:
        self._storage = storage
        self._result = CheckResults()

    def verify(self, key: Ed25519PublicKey | None = None, require_signature: bool = False) -> CheckResults:
        """Run all checks. `key`: the trusted public key. A missing signature is a finding if `key` is given or `require_signature` is true."""
        self._check_links()
        marker = self._check_marker()
        if marker is not None:
            self._check_manifest(marker)
            self._check_files()
        self._check_statement()
        self._check_checkpoints()
        self._check_signature(key, require_signature)
        return self._result

    def _add_finding(self, check: CheckName, code: Code, message: str) -> None:
        self._result.findings.append(Finding(check, code, message))

    def _add_note(self, check: CheckName, text: str) -> None:
        self._result.notes[check] = text

    # ---- the model ----

    def _check_links(self) -> None:
        self._links = {key for folder in (Storage.MODEL, Storage.LINEAGE) for key in self._storage.list_links(folder)}
        for key in sorted(self._links):
            self._add_finding(CheckName.FILES, Code.LINK, f"{key} is a symbolic link; replace it by a copy of its target")

    def _is_linked(self, object_key: str) -> bool:
        return any(object_key == link or object_key.startswith(f"{link}/") for link in self._links)

    def _check_marker(self) -> dict[str, Any] | None:
        """Return the model's commit marker, or None if it is missing or invalid."""
        marker_bytes = self._storage.read_if_exists(MARKER_KEY)
        if marker_bytes is None:
            self._add_finding(CheckName.MARKER, Code.MARKER_MISSING, f"{self._storage.uri} has no {MARKER_KEY}: no model is committed there")
            return None
        marker = _parse_json_object(marker_bytes)
        path, digest = marker.get("path"), marker.get("manifestSha256")
        if not isinstance(path, str) or "/" in path or parse_attempt_of_uri(path) is None or not _is_sha256(digest):
            self._add_finding(CheckName.MARKER, Code.MARKER_INVALID, f"{MARKER_KEY} does not name a folder and the sha256 of its manifest")
            return None
        self._result.folder = f"{Storage.MODEL}/{path}"
        self._add_note(CheckName.MARKER, f"{MARKER_KEY} names {path}")
        return marker

    def _check_manifest(self, marker: dict[str, Any]) -> None:
        key = f"{self._result.folder}/{Storage.MANIFEST}"
        manifest_bytes = self._storage.read_if_exists(key)
        if manifest_bytes is None:
            self._add_finding(CheckName.MANIFEST, Code.MANIFEST_MISSING, f"{key} is missing")
            return
        digest = self._result.manifest_sha256 = hashlib.sha256(manifest_bytes).hexdigest()
        if digest != marker["manifestSha256"]:
            digest_in_marker = marker["manifestSha256"]
            self._add_finding(CheckName.MANIFEST, Code.MANIFEST_CHANGED, f"{key} has sha256 {digest[:12]}..., but the marker names {digest_in_marker[:12]}...")
        manifest = _parse_json_object(manifest_bytes)
        entries = manifest.get("files")
        if not isinstance(entries, list) or not entries or not all(map(_is_file_entry, entries)) or not isinstance(manifest.get("facts"), dict):
            self._add_finding(CheckName.MANIFEST, Code.MANIFEST_INVALID, f"{key} does not contain a list of files with path, size and sha256, and the facts")
            return
        self._result.manifest = manifest
        self._add_note(CheckName.MANIFEST, f"sha256 {digest[:12]}..., {len(entries)} files")
        for path, count in Counter(entry["path"] for entry in entries).items():
            if not _is_inside_folder(path):
                self._add_finding(CheckName.MANIFEST, Code.PATH_INVALID, f"the manifest lists {path!r}, which is not inside the model's folder")
            if count > 1:
                self._add_finding(CheckName.MANIFEST, Code.PATH_DUPLICATE, f"the manifest lists {path} {count} times")

    def _check_files(self) -> None:
        if self._result.manifest is None:
            return
        folder, total_bytes = self._result.folder, 0
        stored_paths = {stored_object.key.removeprefix(f"{folder}/") for stored_object in self._storage.list_objects(folder)}
        entries = {entry["path"]: entry for entry in self._result.manifest["files"] if _is_inside_folder(entry["path"])}
        for path, entry in entries.items():
            if self._is_linked(f"{folder}/{path}"):
                continue
            if path not in stored_paths:
                self._add_finding(CheckName.FILES, Code.FILE_MISSING, f"{path} is missing")
                continue
            total_bytes += entry["size"]
            self._check_file(folder, path, entry)
        for path in sorted(stored_paths - entries.keys() - {Storage.MANIFEST.value}):
            if not self._is_linked(f"{folder}/{path}"):
                self._add_finding(CheckName.FILES, Code.FILE_UNEXPECTED, f"{path} is in the model's folder, but not in the manifest")
        self._add_note(CheckName.FILES, f"{len(entries)} files, {total_bytes} bytes read again")

    def _check_file(self, folder: str, path: str, entry: dict[str, Any]) -> None:
        sha256, size = hash_object(self._storage, f"{folder}/{path}")
        if size != entry["size"]:
            self._add_finding(CheckName.FILES, Code.FILE_CHANGED, f"{path} has {size} bytes, but the manifest lists {entry['size']}")
        elif sha256 != entry["sha256"]:
            text = f"{path} has sha256 {sha256[:12]}..., but the manifest lists {entry['sha256'][:12]}..."
            self._add_finding(CheckName.FILES, Code.FILE_CHANGED, text)

    # ---- the statement ----

    def _check_statement(self) -> None:
        statement_bytes = self._storage.read_if_exists(STATEMENT_KEY)
        if statement_bytes is None:
            text = f"{STATEMENT_KEY} is missing, for example because the run used a release before 0.2.0; this run cannot be signed or replayed"
            self._add_finding(CheckName.STATEMENT, Code.STATEMENT_MISSING, text)
            return
        self._result.statement_bytes = statement_bytes
        try:
            statement = Statement.model_validate_json(statement_bytes)
        except ValidationError as error:
            location = ".".join(map(str, error.errors()[0]["loc"])) or "the whole file"
            self._add_finding(CheckName.STATEMENT, Code.STATEMENT_INVALID, f"{STATEMENT_KEY} is not a statement of a fine-tuning run: {location}")
            return
        if statement.predicate.build_definition.build_type != BUILD_TYPE:
            text = f"{STATEMENT_KEY} has another buildType than {BUILD_TYPE}"
            self._add_finding(CheckName.STATEMENT, Code.STATEMENT_INVALID, text)
            return
        self._result.statement = statement
        self._add_note(CheckName.STATEMENT, f"of {statement.job}, step {statement.run.step}")
        manifest = self._result.manifest
        if manifest is not None and statement.job != manifest.get("job"):
            text = f"the statement is about the run {statement.job}, but the model belongs to the run {manifest.get('job')}"
            self._add_finding(CheckName.STATEMENT, Code.OTHER_RUN, text)
        elif manifest is not None:
            self._compare_subjects(statement, manifest)
            for name in find_contradictions(statement, manifest):
                self._add_finding(CheckName.STATEMENT, Code.CONTRADICTS_MANIFEST, f"{name} in the statement differs from the manifest")
            self._compare_spec(statement, manifest)

    def _compare_subjects(self, statement: Statement, manifest: dict[str, Any]) -> None:
        expected_subjects = [(Storage.MANIFEST.value, self._result.manifest_sha256), *((entry["path"], entry["sha256"]) for entry in manifest["files"])]
        subjects = [(subject.name or "", subject.digest.get("sha256", "")) for subject in statement.subject]
        if Counter(expected_subjects) != Counter(subjects):
            name = sorted((Counter(expected_subjects) - Counter(subjects)) + (Counter(subjects) - Counter(expected_subjects)))[0][0]
            self._add_finding(CheckName.STATEMENT, Code.SUBJECT_CHANGED, f"{name} in the statement's subjects differs from the manifest")

    def _compare_spec(self, statement: Statement, manifest: dict[str, Any]) -> None:
        """Compare the statement's spec with the run configuration of the attempt that committed the model."""
        key = f"{Storage.RUN}/{make_attempt_folder_name(int(manifest.get('attempt') or 1))}/{RUN_FILE_NAME}"
        run_file_bytes = self._storage.read_if_exists(key)
        if run_file_bytes is None:
            return
        spec, _ = remove_secrets(_parse_json_object(run_file_bytes).get("spec") or {})
        if spec != statement.spec:
            path = next(iter(sorted(_find_different_paths(spec, statement.spec))), "spec")
            self._add_finding(CheckName.STATEMENT, Code.CONTRADICTS_RUN, f"{path} in the statement differs from {key}")

    def _check_checkpoints(self) -> None:
        """Compare each stored checkpoint with the statement.

        If a checkpoint of the statement is no longer stored, this is not a finding, because retention or a user may have deleted the checkpoint.
        """
        if self._result.statement is None or self._result.select_findings(CheckName.STATEMENT):
            return
        named_checkpoints = self._result.statement.predicate.run_details.byproducts
        stored_count = 0
        for checkpoint in named_checkpoints:
            marker_bytes = self._storage.read_if_exists(f"{checkpoint.name}/{Storage.COMMITTED}")
            stored_count += marker_bytes is not None
            if marker_bytes is not None and _parse_json_object(marker_bytes).get("manifestSha256") != checkpoint.digest.get("sha256"):
                self._add_finding(CheckName.CHECKPOINTS, Code.CHECKPOINT_CHANGED, f"the manifest of {checkpoint.name} has another sha256 than in the statement")
        self._add_note(CheckName.CHECKPOINTS, f"{stored_count} of {len(named_checkpoints)} named checkpoints are stored (their files are not read)")

    # ---- the signature ----

    def _check_signature(self, public_key: Ed25519PublicKey | None, require_signature: bool) -> None:
        envelope_bytes = self._storage.read_if_exists(ENVELOPE_KEY)
        if envelope_bytes is None:
            if public_key is not None or require_signature:
                self._add_finding(CheckName.SIGNATURE, Code.UNSIGNED, "the statement is unsigned; sign it with `finetune sign`")
            return
        finding_count_before = len(self._result.findings)
        envelope = self._read_envelope(envelope_bytes)
        if envelope is not None:
            self._check_envelope(envelope, public_key)
        if len(self._result.findings) > finding_count_before:
            self._result.signature = SignatureState.FAILED
        else:
            self._result.signature = SignatureState.VERIFIED if public_key is not None else SignatureState.NOT_CHECKED

    def _read_envelope(self, envelope_bytes: bytes) -> Envelope | None:
        try:
            return Envelope.model_validate_json(envelope_bytes)
        except ValidationError as error:
            details = error.errors()[0]
            location = ".".join(map(str, details["loc"])) or "the whole file"
            problem = "no signature covers this field" if details["type"] == "extra_forbidden" else "missing or not valid"
            self._add_finding(CheckName.SIGNATURE, Code.ENVELOPE_INVALID, f"{ENVELOPE_KEY}: {location}: {problem}")
            return None

    def _check_envelope(self, envelope: Envelope, public_key: Ed25519PublicKey | None) -> None:
        if envelope.payload_type != PAYLOAD_TYPE:
            text = f"the payload type is {envelope.payload_type} instead of {PAYLOAD_TYPE}"
            self._add_finding(CheckName.SIGNATURE, Code.PAYLOAD_TYPE, text)
            return
        if decode_payload(envelope) != self._result.statement_bytes:
            text = f"the signature is for another statement than {STATEMENT_KEY}; sign the stored statement with `finetune sign`"
            self._add_finding(CheckName.SIGNATURE, Code.SIGNED_OTHER, text)
        if public_key is None or is_signed_by(envelope, public_key):
            return
        if any(signature.keyid == compute_key_id(public_key) for signature in envelope.signatures):
            text = f"the signature of the key {compute_key_id(public_key)[:12]}... does not match the statement"
            self._add_finding(CheckName.SIGNATURE, Code.SIGNATURE_INVALID, text)
        else:
            text = f"the statement has {len(envelope.signatures)} signatures, but none by the key {compute_key_id(public_key)[:12]}..."
            self._add_finding(CheckName.SIGNATURE, Code.NOT_TRUSTED, text)


def find_contradictions(statement: Statement, model_manifest: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the facts whose value in the statement differs from the value in the model's manifest."""
    facts = model_manifest["facts"]
    for name in sorted({*facts, *statement.run.facts}):
        if facts.get(name) != statement.run.facts.get(name):
            yield name
    if statement.run.step != model_manifest.get("step"):
        yield "step"
    base_model = statement.dependency(BASE_MODEL_DEPENDENCY)
    revision = facts.get("modelRevision")
    if base_model is None or base_model.annotations.get(REVISION_ANNOTATION) != revision or base_model.digest.get("gitCommit", revision) != revision:
        yield "the revision of the base model"
    if not _has_digest(statement, facts.get("datasetDigest"), ("dataset.train", "dataset.mixture[")):
        yield "the digest of the training data"
    digest_by_name = facts.get("beside") or {}
    for path, name in (("dataset.validation", "validation data"), ("dataset.test", "test data")):
        if name in digest_by_name and not _has_digest(statement, digest_by_name[name], (path,)):
            yield f"the digest of the {name}"
    for name in IMAGE_SETS:
        if name in digest_by_name and not _has_digest(statement, digest_by_name[name], (name,)):
            yield f"the digest of the {name}"


def _has_digest(statement: Statement, digest: Any, name_prefixes: tuple[str, ...]) -> bool:
    """Return whether the statement has this combined digest for the sources whose names begin with one of `name_prefixes`.

    If the statement also has digests of single files of these sources, the hash of these single digests must be equal to the combined digest.
    """
    resources = [
        resource for resource in statement.predicate.build_definition.resolved_dependencies if (resource.name or "").startswith(name_prefixes)
    ]
    combined_digests = [resource.annotations["combinedDigest"] for resource in resources if "combinedDigest" in resource.annotations]
    file_digests = [resource.digest["sha256"] for resource in resources if "combinedDigest" not in resource.annotations and "sha256" in resource.digest]
    do_file_digests_match = not file_digests or hashlib.sha256("\n".join(file_digests).encode()).hexdigest() == digest
    return bool(combined_digests) and set(combined_digests) == {digest} and do_file_digests_match


def read_envelope(storage: JobStorage) -> Envelope | None:
    """Return the stored envelope, or None if it is missing or invalid. Raises StorageError."""
    envelope_bytes = storage.read_if_exists(ENVELOPE_KEY)
    try:
        return Envelope.model_validate_json(envelope_bytes) if envelope_bytes is not None else None
    except ValidationError:
        return None


def require_statement(verification: CheckResults) -> Statement:
    """Return the lineage statement. If it is missing or invalid, raises StorageError with the message of the finding."""
    if verification.statement is None:
        raise StorageError(verification.select_findings(CheckName.STATEMENT)[0].message)
    return verification.statement


def _parse_json_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object in `content`, or an empty dict if it holds no JSON object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == SHA256_DIGITS and set(value) <= set("0123456789abcdef")


def _is_file_entry(entry: Any) -> bool:
    is_object = isinstance(entry, dict) and isinstance(entry.get("path"), str)
    return is_object and isinstance(entry.get("size"), int) and _is_sha256(entry.get("sha256"))


def _is_inside_folder(path: str) -> bool:
    """Return whether a path in a manifest is relative and leads to a file inside the model's folder."""
    return "\\" not in path and "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def _find_different_paths(first_value: Any, second_value: Any, path: str = "") -> Iterator[str]:
    if isinstance(first_value, dict) and isinstance(second_value, dict):
        for key in first_value.keys() | second_value.keys():
            yield from _find_different_paths(first_value.get(key), second_value.get(key), f"{path}.{key}".lstrip("."))
    elif first_value != second_value:
        yield path
