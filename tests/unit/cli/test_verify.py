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
    def statement_path(self) -> Path:
        return self.root / "lineage" / "statement.json"

    @property
    def envelope_path(self) -> Path:
        return self.root / "lineage" / "statement.dsse.json"

    @property
    def weights_path(self) -> Path:
        return model_folder(self.root) / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def signed_runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two signed runs and two keys."""
    folder = tmp_path_factory.mktemp("signed")
    run_folders = [write_finished_run(folder / "one"), write_finished_run(folder / "two", uid="99999999-2222-3333-4444-555555555555")]
    for name in ("team.pem", "other.pem"):
        assert main.run(["sign", "--new-key", str(folder / name)], []) == 0
    for root in run_folders:
        assert main.run(["sign", f"file://{root}", "--key", str(folder / "team.pem")], []) == 0
    return folder


@pytest.fixture
def run(signed_runs_folder: Path, tmp_path: Path) -> SignedRun:
    folder = shutil.copytree(signed_runs_folder, tmp_path / "runs")
    first_root, second_root = (next((folder / name / "store/team/bot").iterdir()) for name in ("one", "two"))
    return SignedRun(first_root, folder / "team.pem", folder / "other.pem", second_root)


def list_finding_codes(run: SignedRun, key: Path | None = None) -> list[str]:
    """Return the codes of all findings when the run is verified with `key`, by default with the key that signed it."""
    public_key = read_public_key(Path(f"{key or run.key}.pub"))
    return [str(finding.code) for finding in Verifier(JobStorage(f"file://{run.root}", StorageRoot())).verify(public_key).findings]


def list_finding_codes_without_signature(run: SignedRun) -> list[str]:
    """Remove the signature, as an attacker who cannot sign would do, and return the codes of all findings."""
    run.envelope_path.unlink()
    return [str(finding.code) for finding in Verifier(JobStorage(f"file://{run.root}", StorageRoot())).verify().findings]


def test_an_unchanged_signed_run_has_no_findings(run: SignedRun) -> None:
    verification = Verifier(JobStorage(f"file://{run.root}", StorageRoot())).verify(read_public_key(Path(f"{run.key}.pub")))
    assert (verification.findings, verification.signature) == ([], SignatureState.VERIFIED)
    assert set(verification.notes) == set(CheckName) - {CheckName.SIGNATURE}


def flip_byte(run: SignedRun) -> None:
    data = bytearray(run.weights_path.read_bytes())
    data[100] ^= 1
    run.weights_path.write_bytes(data)


def truncate_weights(run: SignedRun) -> None:
    run.weights_path.write_bytes(run.weights_path.read_bytes()[:-1])


def add_file(run: SignedRun) -> None:
    (model_folder(run.root) / "pytorch_model.bin").write_bytes(b"pickle")


def remove_file(run: SignedRun) -> None:
    run.weights_path.unlink()


def rename_file(run: SignedRun) -> None:
    run.weights_path.rename(run.weights_path.with_name("adapter_model-2.safetensors"))


def replace_by_link(run: SignedRun) -> None:
    target = run.root.parent / "elsewhere"
    run.weights_path.rename(target)
    run.weights_path.symlink_to(target)


def replace_folder_by_link(run: SignedRun) -> None:
    folder = model_folder(run.root) / "tokenizer"
    folder.rename(run.root.parent / "tokenizer")
    folder.symlink_to(run.root.parent / "tokenizer")


def change_weights_and_manifest(run: SignedRun) -> None:
    """Replace the weights, and update manifest, marker and subjects."""
    import hashlib

    run.weights_path.write_bytes(b"other weights")

    def edit(manifest: Any) -> None:
        file_entry = next(file for file in manifest["files"] if file["path"] == run.weights_path.name)
        file_entry.update(size=13, sha256=hashlib.sha256(b"other weights").hexdigest())

    edit_manifest(run.root, edit)


def edit_only_manifest(run: SignedRun) -> None:
    edit_json(model_folder(run.root) / "manifest.json", lambda manifest: manifest.update(tokens=1))


def edit_manifest_and_marker(run: SignedRun) -> None:
    subjects = json.loads(run.statement_path.read_text())["subject"]
    edit_manifest(run.root, lambda manifest: manifest.update(tokens=1))
    edit_json(run.statement_path, lambda statement: statement.update(subject=subjects))
    run.envelope_path.unlink()


def make_path_listing(path: str) -> Callable[[SignedRun], None]:
    """List one more file in the manifest, and adapt the commit marker and the statement's subjects to the changed manifest."""

    def edit(manifest: Any) -> None:
        manifest["files"].append({**manifest["files"][0], "path": path})

    return lambda run: edit_manifest(run.root, edit)


def make_statement_edit(edit: Callable[[Any], None]) -> Callable[[SignedRun], None]:
    return lambda run: edit_json(run.statement_path, edit)


def make_envelope_edit(edit: Callable[[Any], None]) -> Callable[[SignedRun], None]:
    return lambda run: edit_json(run.envelope_path, edit)


def get_build_definition(statement: Any) -> Any:
    return statement["predicate"]["buildDefinition"]


def change_base_revision(statement: Any) -> None:
    get_build_definition(statement)["resolvedDependencies"][0]["annotations"]["revision"] = "sha256:" + "0" * 64


def change_data_file(statement: Any) -> None:
    dependency = next(entry for entry in get_build_definition(statement)["resolvedDependencies"] if entry["name"] == "dataset.train/train.jsonl")
    dependency["digest"]["sha256"] = "0" * 64


def change_images(statement: Any) -> None:
    dependency = next(entry for entry in get_build_definition(statement)["resolvedDependencies"] if entry["name"] == TRAINING_IMAGES)
    dependency["annotations"]["combinedDigest"] = "0" * 64


def swap_lineage(run: SignedRun) -> None:
    shutil.rmtree(run.root / "lineage")
    shutil.copytree(run.other_root / "lineage", run.root / "lineage")


def take_signature_of_other_statement(run: SignedRun) -> None:
    other_envelope = json.loads((run.other_root / "lineage" / "statement.dsse.json").read_text())
    edit_json(run.envelope_path, lambda envelope: envelope.update(signatures=other_envelope["signatures"]))


def sign_other_payload(run: SignedRun) -> None:
    """Replace the signature by another one of the trusted key, which is valid only for the statement of another run."""
    shutil.copy(run.other_root / "lineage" / "statement.dsse.json", run.envelope_path)


def use_two_untrusted_signatures(envelope: Any) -> None:
    envelope["signatures"] = [{"keyid": str(number), "sig": base64.b64encode(bytes(64)).decode()} for number in range(2)]


def replace_checkpoint(run: SignedRun) -> None:
    edit_json(run.root / "checkpoints" / "step-00000010" / "_COMMITTED", lambda marker: marker.update(manifestSha256="0" * 64))


def make_removal(path: str) -> Callable[[SignedRun], None]:
    return lambda run: (run.root / path).unlink()


# Each row: the change, the expected codes when the trusted key is used, the expected codes when the signature is removed as well.
TAMPERINGS: dict[str, tuple[Callable[[SignedRun], object], list[str], list[str]]] = {
    "a byte of the weights is flipped": (flip_byte, ["FileChanged"], ["FileChanged"]),
    "the weights are truncated": (truncate_weights, ["FileChanged"], ["FileChanged"]),
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
    "the marker is removed": (make_removal("model/_COMMITTED"), ["MarkerMissing"], ["MarkerMissing"]),
    "the manifest lists a path outside": (make_path_listing("../x"), ["ManifestPathInvalid", "SignedStatementDiffers"], ["ManifestPathInvalid"]),
    "the manifest lists an absolute path": (make_path_listing("/etc/passwd"), ["ManifestPathInvalid", "SignedStatementDiffers"], ["ManifestPathInvalid"]),
    "the manifest lists another size": (
        lambda run: edit_manifest(run.root, lambda manifest: manifest["files"][0].update(size=1)),
        ["FileChanged", "SignedStatementDiffers"], ["FileChanged"],
    ),
    "the manifest lists a file twice": (
        make_path_listing("adapter_config.json"), ["ManifestPathDuplicate", "SignedStatementDiffers"], ["ManifestPathDuplicate"],
    ),
    "the statement and its signature are those of another run": (swap_lineage, ["StatementOfAnotherRun"], ["StatementOfAnotherRun"]),
    "the digest of a subject is changed": (
        make_statement_edit(lambda statement: statement["subject"][1]["digest"].update(sha256="0" * 64)),
        ["SubjectChanged", "SignedStatementDiffers"], ["SubjectChanged"],
    ),
    "a subject is removed": (
        make_statement_edit(lambda statement: statement["subject"].pop()), ["SubjectChanged", "SignedStatementDiffers"], ["SubjectChanged"],
    ),
    "the base revision is changed": (
        make_statement_edit(change_base_revision), ["StatementContradictsManifest", "SignedStatementDiffers"], ["StatementContradictsManifest"],
    ),
    "the digest of a data file is changed": (
        make_statement_edit(change_data_file), ["StatementContradictsManifest", "SignedStatementDiffers"], ["StatementContradictsManifest"],
    ),
    "the digest of the images is changed": (
        make_statement_edit(change_images), ["StatementContradictsManifest", "SignedStatementDiffers"], ["StatementContradictsManifest"],
    ),
    "the seed is changed": (
        make_statement_edit(lambda statement: get_build_definition(statement)["externalParameters"]["spec"]["training"].update(seed=7)),
        ["StatementContradictsRun", "SignedStatementDiffers"], ["StatementContradictsRun"],
    ),
    "the statement is empty": (lambda run: run.statement_path.write_bytes(b""), ["StatementInvalid", "SignedStatementDiffers"], ["StatementInvalid"]),
    "the statement is removed": (make_removal("lineage/statement.json"), ["StatementMissing", "SignedStatementDiffers"], ["StatementMissing"]),
    "a checkpoint is replaced": (replace_checkpoint, ["CheckpointChanged"], ["CheckpointChanged"]),
    "a folder is a link": (replace_folder_by_link, ["FileIsLink"], ["FileIsLink"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_of_a_signed_run_is_found(name: str, run: SignedRun) -> None:
    tamper, expected, _ = TAMPERINGS[name]
    tamper(run)
    assert list_finding_codes(run) == expected


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_of_an_unsigned_run_is_found_unless_everything_fits(name: str, run: SignedRun) -> None:
    tamper, _, expected = TAMPERINGS[name]
    tamper(run)
    assert list_finding_codes_without_signature(run) == expected


SIGNATURE_TAMPERINGS: dict[str, tuple[Callable[[SignedRun], object], list[str]]] = {
    "the signature is of another statement": (take_signature_of_other_statement, ["SignatureInvalid"]),
    "the payload is another statement": (sign_other_payload, ["SignedStatementDiffers"]),
    "the payload type is changed": (make_envelope_edit(lambda envelope: envelope.update(payloadType="text/plain")), ["PayloadTypeWrong"]),
    "no signature is trusted": (make_envelope_edit(use_two_untrusted_signatures), ["SignatureNotTrusted"]),
    "there is no signature in the envelope": (make_envelope_edit(lambda envelope: envelope.update(signatures=[])), ["EnvelopeInvalid"]),
    "a second payload is added": (make_envelope_edit(lambda envelope: envelope.update(payload2="e30=")), ["EnvelopeInvalid"]),
    "a field is added to a signature": (make_envelope_edit(lambda envelope: envelope["signatures"][0].update(cert="x")), ["EnvelopeInvalid"]),
    "the payload is no base64": (make_envelope_edit(lambda envelope: envelope.update(payload="%")), ["SignedStatementDiffers", "SignatureInvalid"]),
    "the envelope is removed": (make_removal("lineage/statement.dsse.json"), ["Unsigned"]),
    "the envelope is empty": (lambda run: run.envelope_path.write_bytes(b""), ["EnvelopeInvalid"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURE_TAMPERINGS)
def test_tampering_of_the_signature_is_found(name: str, run: SignedRun) -> None:
    tamper, expected = SIGNATURE_TAMPERINGS[name]
    tamper(run)
    assert list_finding_codes(run) == expected


def test_signature_of_another_key_is_not_trusted(run: SignedRun) -> None:
    assert list_finding_codes(run, run.other_key) == ["SignatureNotTrusted"]


def test_a_changed_manifest_with_a_new_marker_contradicts_the_subjects(run: SignedRun) -> None:
    edit_manifest_and_marker(run)
    public_findings = Verifier(JobStorage(f"file://{run.root}", StorageRoot())).verify().findings
    assert [str(finding.code) for finding in public_findings] == ["SubjectChanged"]


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
    run.envelope_path.unlink()
    code, out, _ = run_command("verify", f"file://{run.root}")
    assert (code, "signature    -       unsigned: anyone who can write" in out) == (0, True)
    for options in (("--require-signature",), ("--key", f"{run.key}.pub")):
        code, out, _ = run_command("verify", f"file://{run.root}", *options)
        assert (code, "signature    FAILED  Unsigned: " in out) == (2, True)


def test_json_has_the_codes(run: SignedRun, run_command: RunCommand) -> None:
    truncate_weights(run)
    code, out, _ = run_command("verify", f"file://{run.root}", "-o", "json")
    report = json.loads(out)
    assert (code, report["ok"], report["signature"]) == (2, False, "signed, but not checked")
    assert [finding["code"] for check in report["checks"] for finding in check["findings"]] == ["FileChanged"]


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
            if path.is_file() and path != run.envelope_path:
                client.put_object(Bucket="models", Key=f"ft/job/{path.relative_to(run.root)}", Body=path.read_bytes())
        options = ("s3://models/ft/job/model", "--key")
        assert run_command("verify", *options, f"{run.key}.pub")[0] == 2
        assert run_command("sign", *options, run.key)[0] == 0
        code, out, _ = run_command("verify", *options, f"{run.key}.pub")
        assert (code, out.count(" ok ")) == (0, len(CheckName))
        client.put_object(Bucket="models", Key=f"ft/job/{run.weights_path.relative_to(run.root)}", Body=b"other")
        code, out, _ = run_command("verify", *options, f"{run.key}.pub")
        assert (code, "FAILED  FileChanged" in out) == (2, True)
