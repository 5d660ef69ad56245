"""Every wrong setting of a store causes an error that names the setting, before training starts."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest
from finetune_api.errors import FineTuneError, StorageError
from finetune_api.names import MAX_TERMINATION_BYTES, FailureClass
from finetune_api.pod import StorageCheckResult, StoreTarget
from finetune_api.spec.enums import AddressingStyle
from finetune_trainer.__main__ import main as trainer_main
from finetune_trainer.storage import check
from finetune_trainer.storage.preflight import preflight
from stub_s3 import serve_error


def catch_preflight_error(endpoint: str | None, **change: object) -> FineTuneError:
    with pytest.raises(FineTuneError) as caught:
        preflight(StoreTarget.model_validate({"uri": "s3://bucket/root", "endpoint": endpoint} | change))
    shown_text = f"{caught.value} {caught.value.hint}"
    assert "very-secret-word" not in shown_text and "AKIDENTIFIER" not in shown_text
    return caught.value


@pytest.mark.parametrize(
    ("status", "response_code", "method", "exit_code", "code", "text_part"),
    [
        (404, "NoSuchBucket", None, 67, "BucketNotFound", "bucket"),
        (301, "PermanentRedirect", None, 67, "RegionWrong", "us-east-1"),
        (400, "AuthorizationHeaderMalformed", None, 67, "RegionWrong", "us-east-1"),
        (403, "RequestTimeTooSkewed", None, 67, "ClockSkew", "clock"),
        (403, "InvalidAccessKeyId", None, 77, "CredentialsRejected", "InvalidAccessKeyId"),
        (404, "XAdminUserNotFound", None, 77, "CredentialsRejected", "XAdminUserNotFound"),
        (403, "SignatureDoesNotMatch", None, 77, "CredentialsRejected", "SignatureDoesNotMatch"),
        (400, "ExpiredToken", None, 77, "CredentialsExpired", "expired"),
        (403, "AccessDenied", "GET", 77, "PermissionDenied", "s3:ListBucket"),
        (403, "AccessDenied", "PUT", 77, "PermissionDenied", "s3:PutObject"),
        (500, "InternalError", None, 69, "StorageFailed", "500"),
    ],
)
def test_an_error_response_is_converted_to_an_error_with_a_code(
    status: int, response_code: str, method: str | None, exit_code: int, code: str, text_part: str
) -> None:
    with serve_error(status, response_code, failing_method=method) as endpoint:
        error = catch_preflight_error(endpoint)
    assert (error.exit_code, error.code, error.failure_class) == (exit_code, code, FailureClass.STORAGE)
    assert text_part in f"{error.message} {error.hint}"


def test_a_port_without_a_server_is_reported_as_unreachable() -> None:
    with socket.socket() as bound_socket:
        bound_socket.bind(("127.0.0.1", 0))
        error = catch_preflight_error(f"http://127.0.0.1:{bound_socket.getsockname()[1]}")
    assert (error.exit_code, error.code) == (69, "EndpointUnreachable")


def test_an_unknown_host_is_reported_as_unreachable() -> None:
    error = catch_preflight_error("http://store.invalid:9000")
    assert (error.exit_code, error.code) == (69, "EndpointUnreachable")
    assert "store.invalid" in error.message


def test_an_unknown_host_name_with_the_bucket_is_reported_as_wrong_addressing() -> None:
    with serve_error(200, "none") as endpoint:
        endpoint_by_name = endpoint.replace("127.0.0.1", "localhost")
        error = catch_preflight_error(endpoint_by_name, addressing_style=AddressingStyle.VIRTUAL, uri="s3://no-such-host-name-here/x")
    assert (error.exit_code, error.code) == (67, "AddressingWrong")
    assert "addressingStyle: path" in (error.hint or "")


def test_tls_to_a_port_without_tls_is_reported_as_a_wrong_endpoint() -> None:
    with serve_error(200, "none") as endpoint:
        error = catch_preflight_error(endpoint.replace("http://", "https://"))
    assert (error.exit_code, error.code) == (67, "TlsFailed")
    assert "http://" in (error.hint or "")


def test_an_untrusted_certificate_is_reported(tmp_path: Path) -> None:
    from self_signed import write_certificate

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*write_certificate(tmp_path))
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                context.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, OSError):
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        error = catch_preflight_error(f"https://127.0.0.1:{listener.getsockname()[1]}")
        error_with_ca_bundle = catch_preflight_error(f"https://127.0.0.1:{listener.getsockname()[1]}", ca_bundle=str(tmp_path / "cert.pem"))
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    assert (error.exit_code, error.code) == (67, "TlsFailed")
    assert "caBundleRef" in (error.hint or "")
    assert error_with_ca_bundle.code == "EndpointUnreachable", "with the CA bundle TLS works, but this server sends no response"


def test_missing_credentials_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with serve_error(200, "none") as endpoint:
        error = catch_preflight_error(endpoint)
    assert (error.exit_code, error.code) == (77, "CredentialsMissing")
    assert "credentialsSecretRef" in (error.hint or "")


def test_a_folder_passes_the_same_checks(tmp_path: Path) -> None:
    result = preflight(StoreTarget(uri=f"file://{tmp_path}/root"))
    assert result.to_wire() == {"kind": "folder", "conditionalWrites": True, "canDelete": True}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_check_storage_reports_its_result_as_termination_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(tmp_path / "message"))
    target = StoreTarget(uri=f"file://{tmp_path}/store")
    assert trainer_main(["check-storage", target.model_dump_json(by_alias=True)]) == 0
    expected_result = StorageCheckResult(ok=True)
    assert StorageCheckResult.model_validate_json((tmp_path / "message").read_text()) == expected_result
    assert StorageCheckResult.model_validate_json(capsys.readouterr().out.splitlines()[-1]) == expected_result
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    web_target = target.model_copy(update={"uri": "https://host/x"})
    assert trainer_main(["check-storage", web_target.model_dump_json(by_alias=True)]) == 64
    result = StorageCheckResult.model_validate_json((tmp_path / "message").read_text())
    assert (result.ok, result.code, "a web server is read-only" in result.message, result.hint[:6]) == (False, "StorageUriInvalid", True, "write ")
    assert trainer_main(["check-storage"]) == 64
    assert "give one StoreTarget as JSON" in capsys.readouterr().err


def test_check_storage_writes_no_secret_and_at_most_4096_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text of a store's error may contain a signed address, and characters of several bytes."""
    monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(tmp_path / "message"))

    def fail(_target: StoreTarget) -> None:
        raise StorageError("StorageFailed", "https://user:very-secret-word@host/ " + "\N{SNOWMAN}" * 5000, hint="password=very-secret-word")

    monkeypatch.setattr(check, "preflight", fail)
    assert trainer_main(["check-storage", StoreTarget(uri="s3://bucket/root").model_dump_json(by_alias=True)]) == 69
    message_bytes, printed_line = (tmp_path / "message").read_bytes(), capsys.readouterr().out.splitlines()[-1]
    assert message_bytes.decode() == printed_line, "`finetune doctor` reads the log if there is no termination message"
    result = StorageCheckResult.model_validate_json(message_bytes)
    assert result.message.startswith("https://[redacted]@host/ \N{SNOWMAN}") and result.message.endswith("\N{SNOWMAN} ...")
    assert (result.ok, result.code, result.hint) == (False, "StorageFailed", "password=[redacted]")
    assert MAX_TERMINATION_BYTES - 32 < len(message_bytes) <= MAX_TERMINATION_BYTES
