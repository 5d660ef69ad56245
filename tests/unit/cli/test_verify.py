"""`finetune verify` finds every change that an attacker makes to a stored model, its statement or its signature, and reports each change with a code."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finetune_api.lineage import TRAINING_IMAGES
from finetune_api.spec.cluster import StorageRoot
from finetune_cli import main
from finetune_cli.job_storage import JobStorage, to_job_folder_uri
from finetune_cli.lineage import CheckName, Code, SignatureState, Verifier
from finetune_cli.signing import read_public_key

from tests.support.lineage import edit_json, edit_manifest, model_folder, write_finished_run
from tests.unit.cli.conftest import RunCommand


@dataclass(frozen=True)
class SignedRun:
    """A signed run. It consists of its folder, the key that signed it, a second key that did not, and the folder of another signed run."""

    root: Path
    key: Path
    other_key: Path
    other_root: Path

    @property
    def statement(self) -> Path:
        return self.root / "lineage" / "statement.json"

    @property
    def envelope(self) -> Path:
        return self.root / "lineage" / "statement.dsse.json"

    @property
    def weights(self) -> Path:
        return model_folder(self.root) / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two signed runs and two keys."""
    folder = tmp_path_factory.mktemp("signed")
    roots = [write_finished_run(folder / "one"), write_finished_run(folder / "two", uid="99999999-2222-3333-4444-555555555555")]
    for name in ("team.pem", "other.pem"):
        assert main.run(["sign", "--new-key", str(folder / name)], []) == 0
    for root in roots:
        assert main.run(["sign", f"file://{root}", "--key", str(folder / "team.pem")], []) == 0
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> SignedRun:
    folder = shutil.copytree(original, tmp_path / "runs")
    one, two = (next((folder / name / "store/team/bot").iterdir()) for name in ("one", "two"))
    return SignedRun(one, folder / "team.pem", folder / "other.pem", two)


def findings(run: SignedRun, key: Path | None = None) -> list[str]:
    """Return the codes of all findings when the run is verified with `key`, by default with the key that signed it."""
    public_key = read_public_key(Path(f"{key or run.key}.pub"))
    return [str(finding.code) for finding in Verifier(JobStorage(f"file://{run.root}", StorageRoot())).verify(public_key).findings]


def unsigned_findings(run: SignedRun) -> list[str]:
    """Remove the signature, as an attacker who cannot sign would do, and return the codes of all findings."""
    run.envelope.unlink()
    return [str(finding.code) for finding in Verifier(JobStorage(f"file://{run.root}", StorageRoot())).verify().findings]


def test_an_unchanged_signed_run_has_no_findings(run: SignedRun) -> None:
    verification = Verifier(JobStorage(f"file://{run.root}", StorageRoot())).verify(read_public_key(Path(f"{run.key}.pub")))
    assert (verification.findings, verification.signature) == ([], SignatureState.VERIFIED)
    assert set(verification.notes) == set(CheckName) - {CheckName.SIGNATURE}


def flip_byte(run: SignedRun) -> None:
    data = bytearray(run.weights.read_bytes())
    data[100] ^= 1
    run.weights.write_bytes(data)


def truncate(run: SignedRun) -> None:
    run.weights.write_bytes(run.weights.read_bytes()[:-1])


def add_file(run: SignedRun) -> None:
    (model_folder(run.root) / "pytorch_model.bin").write_bytes(b"pickle")


def remove_file(run: SignedRun) -> None:
    run.weights.unlink()


def rename_file(run: SignedRun) -> None:
    run.weights.rename(run.weights.with_name("adapter_model-2.safetensors"))


def replace_by_link(run: SignedRun) -> None:
    target = run.root.parent / "elsewhere"
    run.weights.rename(target)
    run.weights.symlink_to(target)


def replace_folder_by_link(run: SignedRun) -> None:
    folder = model_folder(run.root) / "tokenizer"
    folder.rename(run.root.parent / "tokenizer")
    folder.symlink_to(run.root.parent / "tokenizer")


def change_weights_and_manifest(run: SignedRun) -> None:
    """Replace the weights, and update manifest, marker and subjects."""
    import hashlib

    run.weights.write_bytes(b"other weights")

    def edit(manifest: Any) -> None:
        entry = next(file for file in manifest["files"] if file["path"] == run.weights.name)
        entry.update(size=13, sha256=hashlib.sha256(b"other weights").hexdigest())

    edit_manifest(run.root, edit)


def edit_only_manifest(run: SignedRun) -> None:
    edit_json(model_folder(run.root) / "manifest.json", lambda manifest: manifest.update(tokens=1))


def edit_manifest_and_marker(run: SignedRun) -> None:
    subjects = json.loads(run.statement.read_text())["subject"]
    edit_manifest(run.root, lambda manifest: manifest.update(tokens=1))
    edit_json(run.statement, lambda statement: statement.update(subject=subjects))
    run.envelope.unlink()


def list_path(path: str) -> Callable[[SignedRun], None]:
    """List one more file in the manifest, and adapt the commit marker and the statement's subjects to the changed manifest."""

    def edit(manifest: Any) -> None:
        manifest["files"].append({**manifest["files"][0], "path": path})

    return lambda run: edit_manifest(run.root, edit)


def edit_statement(edit: Callable[[Any], None]) -> Callable[[SignedRun], None]:
    return lambda run: edit_json(run.statement, edit)


def edit_envelope(edit: Callable[[Any], None]) -> Callable[[SignedRun], None]:
    return lambda run: edit_json(run.envelope, edit)


def definition(statement: Any) -> Any:
    return statement["predicate"]["buildDefinition"]


def change_base_revision(statement: Any) -> None:
    definition(statement)["resolvedDependencies"][0]["annotations"]["revision"] = "sha256:" + "0" * 64


def change_data_file(statement: Any) -> None:
    entry = next(one for one in definition(statement)["resolvedDependencies"] if one["name"] == "dataset.train/train.jsonl")
    entry["digest"]["sha256"] = "0" * 64


def change_images(statement: Any) -> None:
    entry = next(one for one in definition(statement)["resolvedDependencies"] if one["name"] == TRAINING_IMAGES)
    entry["annotations"]["combinedDigest"] = "0" * 64


def swap_lineage(run: SignedRun) -> None:
    shutil.rmtree(run.root / "lineage")
    shutil.copytree(run.other_root / "lineage", run.root / "lineage")


def take_signature_of_other_statement(run: SignedRun) -> None:
    other = json.loads((run.other_root / "lineage" / "statement.dsse.json").read_text())
    edit_json(run.envelope, lambda envelope: envelope.update(signatures=other["signatures"]))


def sign_other_payload(run: SignedRun) -> None:
    """Replace the signature by another one of the trusted key, which is valid only for the statement of another run."""
    shutil.copy(run.other_root / "lineage" / "statement.dsse.json", run.envelope)


def use_two_untrusted_signatures(envelope: Any) -> None:
    envelope["signatures"] = [{"keyid": str(number), "sig": base64.b64encode(bytes(64)).decode()} for number in range(2)]


def replace_checkpoint(run: SignedRun) -> None:
    edit_json(run.root / "checkpoints" / "step-00000010" / "_COMMITTED", lambda marker: marker.update(manifestSha256="0" * 64))


def remove(path: str) -> Callable[[SignedRun], None]:
    return lambda run: (run.root / path).unlink()


# Each row: the change, the expected codes when the trusted key is used, the expected codes when the signature is removed as well.
TAMPERINGS: dict[str, tuple[Callable[[SignedRun], object], list[str], list[str]]] = {
    "a byte of the weights is flipped": (flip_byte, ["FileChanged"], ["FileChanged"]),
    "the weights are truncated": (truncate, ["FileChanged"], ["FileChanged"]),
    "a file is added": (add_file, ["FileUnexpected"], ["FileUnexpected"]),
    "a file is removed": (remove_file, ["FileMissing"], ["FileMissing"]),
    "a file is renamed": (rename_file, ["FileMissing", "FileUnexpected"], ["FileMissing", "FileUnexpected"]),
    "a file is a link": (replace_by_link, ["FileIsLink"], ["FileIsLink"]),
    "the manifest is changed": (edit_only_manifest, ["ManifestChanged", "SubjectChanged"], ["ManifestChanged", "SubjectChanged"]),
    "manifest, marker and subjects are changed": (change_weights_and_manifest, ["SignedStatementDiffers"], []),
    "the marker names another manifest": (
        lambda run: edit_json(run.root / "model/_COMMITTED", lambda marker: marker.update(manifestSha256="0" * 64)),
        ["ManifestChanged"], ["ManifestChanged"],
    ),
    "the marker names a folder outside": (
        lambda run: edit_json(run.root / "model/_COMMITTED", lambda marker: marker.update(path="../model")), ["MarkerInvalid"], ["MarkerInvalid"],
    ),
    "the marker is removed": (remove("model/_COMMITTED"), ["MarkerMissing"], ["MarkerMissing"]),
    "the manifest lists a path outside": (list_path("../x"), ["ManifestPathInvalid", "SignedStatementDiffers"], ["ManifestPathInvalid"]),
    "the manifest lists an absolute path": (list_path("/etc/passwd"), ["ManifestPathInvalid", "SignedStatementDiffers"], ["ManifestPathInvalid"]),
    "the manifest lists another size": (
        lambda run: edit_manifest(run.root, lambda manifest: manifest["files"][0].update(size=1)),
        ["FileChanged", "SignedStatementDiffers"], ["FileChanged"],
    ),
    "the manifest lists a file twice": (
        list_path("adapter_config.json"), ["ManifestPathDuplicate", "SignedStatementDiffers"], ["ManifestPathDuplicate"],
    ),
    "the statement and its signature are those of another run": (swap_lineage, ["StatementOfAnotherRun"], ["StatementOfAnotherRun"]),
    "the digest of a subject is changed": (
        edit_statement(lambda one: one["subject"][1]["digest"].update(sha256="0" * 64)), ["SubjectChanged", "SignedStatementDiffers"], ["SubjectChanged"],
    ),
    "a subject is removed": (edit_statement(lambda one: one["subject"].pop()), ["SubjectChanged", "SignedStatementDiffers"], ["SubjectChanged"]),
    "the base revision is changed": (
        edit_statement(change_base_revision), ["StatementContradictsManifest", "SignedStatementDiffers"], ["StatementContradictsManifest"],
    ),
    "the digest of a data file is changed": (
        edit_statement(change_data_file), ["StatementContradictsManifest", "SignedStatementDiffers"], ["StatementContradictsManifest"],
    ),
    "the digest of the images is changed": (
        edit_statement(change_images), ["StatementContradictsManifest", "SignedStatementDiffers"], ["StatementContradictsManifest"],
    ),
    "the seed is changed": (
        edit_statement(lambda one: definition(one)["externalParameters"]["spec"]["training"].update(seed=7)),
        ["StatementContradictsRun", "SignedStatementDiffers"], ["StatementContradictsRun"],
    ),
    "the statement is empty": (lambda run: run.statement.write_bytes(b""), ["StatementInvalid", "SignedStatementDiffers"], ["StatementInvalid"]),
    "the statement is removed": (remove("lineage/statement.json"), ["StatementMissing", "SignedStatementDiffers"], ["StatementMissing"]),
    "a checkpoint is replaced": (replace_checkpoint, ["CheckpointChanged"], ["CheckpointChanged"]),
    "a folder is a link": (replace_folder_by_link, ["FileIsLink"], ["FileIsLink"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_of_a_signed_run_is_found(name: str, run: SignedRun) -> None:
    tamper, expected, _ = TAMPERINGS[name]
    tamper(run)
    assert findings(run) == expected


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_of_an_unsigned_run_is_found_unless_everything_fits(name: str, run: SignedRun) -> None:
    tamper, _, expected = TAMPERINGS[name]
    tamper(run)
    assert unsigned_findings(run) == expected


SIGNATURE_TAMPERINGS: dict[str, tuple[Callable[[SignedRun], object], list[str]]] = {
    "the signature is of another statement": (take_signature_of_other_statement, ["SignatureInvalid"]),
    "the payload is another statement": (sign_other_payload, ["SignedStatementDiffers"]),
    "the payload type is changed": (edit_envelope(lambda envelope: envelope.update(payloadType="text/plain")), ["PayloadTypeWrong"]),
    "no signature is trusted": (edit_envelope(use_two_untrusted_signatures), ["SignatureNotTrusted"]),
    "there is no signature in the envelope": (edit_envelope(lambda envelope: envelope.update(signatures=[])), ["EnvelopeInvalid"]),
    "a second payload is added": (edit_envelope(lambda envelope: envelope.update(payload2="e30=")), ["EnvelopeInvalid"]),
    "a field is added to a signature": (edit_envelope(lambda envelope: envelope["signatures"][0].update(cert="x")), ["EnvelopeInvalid"]),
    "the payload is no base64": (edit_envelope(lambda envelope: envelope.update(payload="%")), ["SignedStatementDiffers", "SignatureInvalid"]),
    "the envelope is removed": (remove("lineage/statement.dsse.json"), ["Unsigned"]),
    "the envelope is empty": (lambda run: run.envelope.write_bytes(b""), ["EnvelopeInvalid"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURE_TAMPERINGS)
def test_tampering_of_the_signature_is_found(name: str, run: SignedRun) -> None:
    tamper, expected = SIGNATURE_TAMPERINGS[name]
    tamper(run)
    assert findings(run) == expected


def test_signature_of_another_key_is_not_trusted(run: SignedRun) -> None:
    assert findings(run, run.other_key) == ["SignatureNotTrusted"]


def test_a_changed_manifest_with_a_new_marker_contradicts_the_subjects(run: SignedRun) -> None:
    edit_manifest_and_marker(run)
    public_findings = Verifier(JobStorage(f"file://{run.root}", StorageRoot())).verify().findings
    assert [str(one.code) for one in public_findings] == ["SubjectChanged"]


# ---- the command ----


def test_command_prints_one_line_for_each_check(run: SignedRun, run_command: RunCommand) -> None:
    code, out, _ = run_command("verify", f"file://{run.root}/model", "--key", f"{run.key}.pub")
    assert (code, [line.split()[:2] for line in out.splitlines()]) == (0, [[str(check), "ok"] for check in CheckName])
    flip_byte(run)
    code, out, _ = run_command("verify", f"file://{run.root}", "--key", f"{run.key}.pub")
    (line,) = [line for line in out.splitlines() if "FAILED" in line]
    assert (code, line.split()[:3]) == (2, ["files", "FAILED", "FileChanged:"])


def test_unsigned_is_said_and_fails_only_if_a_signature_is_required(run: SignedRun, run_command: RunCommand) -> None:
    code, out, _ = run_command("verify", f"file://{run.root}")
    assert (code, "signature    -       signed, but not checked" in out) == (0, True)
    run.envelope.unlink()
    code, out, _ = run_command("verify", f"file://{run.root}")
    assert (code, "signature    -       unsigned: anyone who can write" in out) == (0, True)
    for options in (("--require-signature",), ("--key", f"{run.key}.pub")):
        code, out, _ = run_command("verify", f"file://{run.root}", *options)
        assert (code, "signature    FAILED  Unsigned: " in out) == (2, True)


def test_json_has_the_codes(run: SignedRun, run_command: RunCommand) -> None:
    truncate(run)
    code, out, _ = run_command("verify", f"file://{run.root}", "-o", "json")
    result = json.loads(out)
    assert (code, result["ok"], result["signature"]) == (2, False, "signed, but not checked")
    assert [finding["code"] for check in result["checks"] for finding in check["findings"]] == ["FileChanged"]


def test_a_folder_without_a_model_is_a_failed_check(tmp_path: Path, run_command: RunCommand) -> None:
    code, out, _ = run_command("verify", f"file://{tmp_path}")
    assert (code, out.split("\n")[0].split()[:3]) == (2, ["marker", "FAILED", "MarkerMissing:"])


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("s3://b/p/ns/bot/uid", "s3://b/p/ns/bot/uid"), ("s3://b/p/ns/bot/uid/model/", "s3://b/p/ns/bot/uid"),
        ("s3://b/p/ns/bot/uid/model/a1-1f3c9a2b", "s3://b/p/ns/bot/uid"), ("s3://b/ns/model/uid", "s3://b/ns/model/uid"),
        ("file:///r/ns/bot/uid/lineage/statement.json", "file:///r/ns/bot/uid"), ("s3://b/ns/bot/u/checkpoints/step-00000010", "s3://b/ns/bot/u"),
    ],
)  # fmt: skip
def test_uri_of_a_part_leads_to_the_folder_of_the_job(uri: str, root: str) -> None:
    assert to_job_folder_uri(uri) == root


def test_every_code_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs/guides/lineage.md").read_text(encoding="utf-8")
    assert [code.value for code in Code if f"`{code}`" not in text] == []


def test_s3_storage_is_signed_and_verified(run: SignedRun, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto import mock_aws

    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="models")
        for path in run.root.rglob("*"):
            if path.is_file() and path != run.envelope:
                client.put_object(Bucket="models", Key=f"ft/job/{path.relative_to(run.root)}", Body=path.read_bytes())
        options = ("s3://models/ft/job/model", "--key")
        assert run_command("verify", *options, f"{run.key}.pub")[0] == 2
        assert run_command("sign", *options, run.key)[0] == 0
        code, out, _ = run_command("verify", *options, f"{run.key}.pub")
        assert (code, out.count(" ok ")) == (0, len(CheckName))
        client.put_object(Bucket="models", Key=f"ft/job/{run.weights.relative_to(run.root)}", Body=b"other")
        code, out, _ = run_command("verify", *options, f"{run.key}.pub")
        assert (code, "FAILED  FileChanged" in out) == (2, True)
