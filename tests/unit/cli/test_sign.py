"""`finetune sign`: keys, cases in which it refuses to sign, and envelopes that another implementation of DSSE accepts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from finetune_api.lineage import Statement
from finetune_cli import output
from finetune_cli.commands import sign as sign_command
from finetune_cli.signing import PASSWORD_VARIABLE
from securesystemslib.dsse import Envelope as OtherEnvelope
from securesystemslib.signer import SSlibKey

from tests.support.lineage import edit_json, model_folder, write_finished_run
from tests.unit.cli.conftest import RunCommand


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_finished_run(tmp_path / "run")


@pytest.fixture
def key(tmp_path: Path, run_command: RunCommand) -> Path:
    path = tmp_path / "team.pem"
    assert run_command("sign", "--new-key", path)[0] == 0
    return path


def read_envelope(root: Path) -> dict[str, Any]:
    envelope: dict[str, Any] = json.loads((root / "lineage/statement.dsse.json").read_text())
    return envelope


def load_key_of_other_library(path: Path) -> SSlibKey:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return SSlibKey.from_crypto(load_pem_public_key(Path(f"{path}.pub").read_bytes()))


def test_another_implementation_accepts_the_signature(root: Path, key: Path, run_command: RunCommand) -> None:
    code, out, _ = run_command("sign", f"file://{root}", "--key", key)
    assert (code, out.startswith(f"file://{root}: signed by the key ")) == (0, True)
    envelope = read_envelope(root)
    other_library_key = load_key_of_other_library(key)
    other_library_key.keyid = envelope["signatures"][0]["keyid"]
    parsed_envelope = OtherEnvelope.from_dict(envelope)
    assert list(parsed_envelope.verify([other_library_key], 1)) == [other_library_key.keyid]
    assert parsed_envelope.payload == (root / "lineage/statement.json").read_bytes()


def test_statement_that_does_not_match_the_files_is_not_signed(root: Path, key: Path, run_command: RunCommand) -> None:
    (model_folder(root) / "adapter_config.json").write_bytes(b"[]")
    code, _, stderr = run_command("sign", f"file://{root}", "--key", key)
    assert (code, "error: FileChanged: adapter_config.json" in stderr) == (1, True)
    assert not (root / "lineage/statement.dsse.json").exists()


def test_signatures_of_two_people_are_kept(root: Path, key: Path, tmp_path: Path, run_command: RunCommand) -> None:
    second_key = tmp_path / "second.pem"
    run_command("sign", "--new-key", second_key)
    for signing_key in (key, second_key, key):
        assert run_command("sign", f"file://{root}", "--key", signing_key)[0] == 0
    assert len(read_envelope(root)["signatures"]) == 2
    for signing_key in (key, second_key):
        assert run_command("verify", f"file://{root}", "--key", f"{signing_key}.pub")[0] == 0


def test_new_key_is_readable_only_by_its_user_and_replaces_nothing(key: Path, run_command: RunCommand) -> None:
    assert (key.stat().st_mode & 0o777, Path(f"{key}.pub").stat().st_mode & 0o077) == (0o600, 0o044)
    data_before = key.read_bytes()
    code, _, stderr = run_command("sign", "--new-key", key)
    assert (code, "exists already" in stderr, key.read_bytes()) == (1, True, data_before)


def test_encrypted_key_needs_its_password(root: Path, tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "locked.pem"
    monkeypatch.setenv(PASSWORD_VARIABLE, "correct horse")
    assert run_command("sign", "--new-key", key)[1].startswith(f"{key}: the private key, encrypted.")
    assert run_command("sign", f"file://{root}", "--key", key)[0] == 0
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    code, _, stderr = run_command("sign", f"file://{root}", "--key", key)
    assert (code, "the password is wrong" in stderr, "wrong horse" in stderr) == (1, True, False)
    monkeypatch.delenv(PASSWORD_VARIABLE)
    code, _, stderr = run_command("sign", f"file://{root}", "--key", key)
    assert (code, f"set {PASSWORD_VARIABLE} to its password" in stderr) == (1, True)


def test_key_of_openssl_works(root: Path, tmp_path: Path, run_command: RunCommand) -> None:
    key = tmp_path / "openssl.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", f"{key}.pub"], check=True, capture_output=True)
    key.chmod(0o600)
    assert run_command("sign", f"file://{root}", "--key", key)[0] == 0
    assert run_command("verify", f"file://{root}", "--key", f"{key}.pub")[0] == 0


def test_unusable_keys_are_refused(root: Path, key: Path, tmp_path: Path, run_command: RunCommand) -> None:
    rsa_key = tmp_path / "rsa.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "RSA", "-out", rsa_key], check=True, capture_output=True)
    rsa_key.chmod(0o600)
    text_file = tmp_path / "text.pem"
    text_file.write_text("no key")
    text_file.chmod(0o600)
    key.chmod(0o644)
    problems = {key: "run `chmod 600", rsa_key: "not an ed25519 key", text_file: "not a private key", tmp_path / "absent": "No such file"}
    for path, problem in problems.items():
        code, out, stderr = run_command("sign", f"file://{root}", "--key", path)
        assert (code, problem in stderr, stderr.count("\n"), out) == (1, True, 1, "")
    for path, problem in {key: "this is a private key", text_file: "not a public key"}.items():
        code, _, stderr = run_command("verify", f"file://{root}", "--key", path)
        assert (code, problem in stderr) == (1, True)


# ---- by the name of a job ----


def use_job(monkeypatch: pytest.MonkeyPatch, root: Path, status: dict[str, Any]) -> None:
    """Replace `open_target`, so that it returns the storage of a job with this status."""
    from finetune_api.spec.cluster import StorageRoot
    from finetune_cli.job_storage import JobStorage

    job = {"metadata": {"name": "bot", "namespace": "team", "uid": root.name}, "spec": {}, "status": status}
    monkeypatch.setattr(sign_command, "open_target", lambda target, options: (JobStorage(f"file://{root}", StorageRoot()), job))


def test_job_by_name_adds_the_image_digest_that_the_operator_saw(
    root: Path, key: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest_sha256 = json.loads((root / "model/_COMMITTED").read_text())["manifestSha256"]
    resolved = {"image": "registry/trainer:0.2.0", "imageDigest": f"registry/trainer@sha256:{'b' * 64}"}
    use_job(monkeypatch, root, {"output": {"sha256": manifest_sha256}, "resolved": resolved})
    for _ in range(2):
        assert run_command("sign", "bot", "--key", key)[0] == output.OK
    statement = Statement.model_validate_json((root / "lineage/statement.json").read_bytes())
    image = statement.dependency("trainer image")
    assert image is not None and (image.uri, image.digest, image.annotations) == ("registry/trainer", {"sha256": "b" * 64}, {"observedBy": "operator"})
    assert len([dependency for dependency in statement.predicate.build_definition.resolved_dependencies if dependency.name == "trainer image"]) == 1
    assert run_command("verify", f"file://{root}", "--key", f"{key}.pub")[0] == 0


def test_model_that_is_not_the_one_of_the_status_is_not_signed(root: Path, key: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    use_job(monkeypatch, root, {"output": {"sha256": "c" * 64}})
    code, _, stderr = run_command("sign", "bot", "--key", key)
    assert (code, "the model was replaced after the run" in stderr) == (1, True)
    assert not (root / "lineage/statement.dsse.json").exists()


def test_error_for_wrong_usage_shows_the_right_usage(key: Path, run_command: RunCommand) -> None:
    assert "write `finetune sign NAME --key FILE`" in run_command("sign")[2]
    assert "--new-key only creates a key" in run_command("sign", "bot", "--new-key", "x.pem")[2]


def test_statement_contains_no_secret(root: Path) -> None:
    text = (root / "lineage/statement.json").read_text()
    statement = Statement.model_validate_json(text)
    assert "secret" not in json.dumps(statement.spec["dataset"]) and "signature=abc" not in text
    assert statement.spec["dataset"]["test"] == "https://host/test.jsonl"
    assert statement.predicate.build_definition.internal_parameters["redactedFields"] == ["dataset.test"]


def test_statement_with_an_earlier_signature_of_another_statement(root: Path, key: Path, run_command: RunCommand) -> None:
    assert run_command("sign", f"file://{root}", "--key", key)[0] == 0
    edit_json(root / "lineage/statement.json", lambda statement: statement["predicate"]["runDetails"]["metadata"].update(startedOn="2026-01-01"))
    code, _, stderr = run_command("sign", f"file://{root}", "--key", key)
    assert (code, "earlier signatures are removed" in stderr) == (0, True)
