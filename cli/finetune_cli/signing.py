"""Ed25519 keys in PEM files, and DSSE envelopes that are signed with them.

No message contains a private key. Source: the DSSE v1 specification (envelope and protocol).
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.lineage import PAYLOAD_TYPE, Envelope, Signature, encode_signed_bytes

from finetune_cli.output import CommandError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PASSWORD_VARIABLE = "FINETUNE_KEY_PASSWORD"  # noqa: S105  the name of a variable
NEW_KEY_HINT = "create one with `finetune sign --new-key FILE`, or `openssl genpkey -algorithm ed25519`"


class KeyFileError(CommandError):
    """A key file cannot be used."""


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key. The password of an encrypted key comes from the environment variable FINETUNE_KEY_PASSWORD or a prompt. Raises KeyFileError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem_bytes = _read_key_file(path)
    _require_private_file(path)
    is_encrypted = b"ENCRYPTED" in pem_bytes
    try:
        key = load_pem_private_key(pem_bytes, _ask_password(path).encode() if is_encrypted else None)
    except (ValueError, TypeError):
        problem = "the password is wrong, or the file is damaged" if is_encrypted else "this is not a private key in PEM form"
        raise KeyFileError(f"{path}: {problem}; {NEW_KEY_HINT}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: this is not an ed25519 key; {NEW_KEY_HINT}")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key. Raises KeyFileError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    pem_bytes = _read_key_file(path)
    if b"PRIVATE KEY" in pem_bytes:
        raise KeyFileError(f"{path}: this is a private key; give the public key, for example {path}.pub")
    try:
        key = load_pem_public_key(pem_bytes)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError(f"{path}: this is not a public key in PEM form; write one with `openssl pkey -in KEY -pubout`") from None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path}: this is not an ed25519 key")
    return key


def _read_key_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None


def _require_private_file(path: Path) -> None:
    """Raise KeyFileError if other users can read or replace the file."""
    file_mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and file_mode & 0o077:
        raise KeyFileError(f"{path}: other users have access to this private key (mode {file_mode:03o}); run `chmod 600 {path}`")


def _ask_password(path: Path) -> str:
    password = os.environ.get(PASSWORD_VARIABLE)
    if password is None and sys.stdin.isatty():
        import typer

        password = str(typer.prompt(f"Password of {path}", hide_input=True, err=True))
    if password is None:
        raise KeyFileError(f"{path}: this key is encrypted; set {PASSWORD_VARIABLE} to its password")
    return password


def write_new_key(path: Path, password: str) -> Path:
    """Write a new private key to `path`, readable only by this user, and its public key to `path.pub`. Returns the path of the public key.

    An empty `password` leaves the private key unencrypted. Existing files are not replaced. Raises CommandError.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key, public_path = Ed25519PrivateKey.generate(), path.with_name(f"{path.name}.pub")
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    content_and_mode_by_file = {
        path: (key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), 0o600),
        public_path: (key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644),
    }
    for file in content_and_mode_by_file:
        if file.exists():
            raise KeyFileError(f"{file} exists already: choose another name, because a lost key cannot be restored")
    for file, (content, mode) in content_and_mode_by_file.items():
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(content)
        except OSError as error:
            raise KeyFileError(f"{file} cannot be written: {error.strerror}") from None
    return public_path


def compute_key_id(public_key: Any) -> str:
    """Return the ID of a public key: the sha256 (hex) of its DER form."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def sign(payload: bytes, private_key: Ed25519PrivateKey, earlier_signatures: list[Signature]) -> Envelope:
    """Sign a statement. `earlier_signatures`: signatures of the same payload. The envelope keeps them, except signatures with the ID of this key."""
    new_signature = Signature(
        keyid=compute_key_id(private_key.public_key()), sig=base64.b64encode(private_key.sign(encode_signed_bytes(PAYLOAD_TYPE, payload))).decode()
    )
    signatures = [*(signature for signature in earlier_signatures if signature.keyid != new_signature.keyid), new_signature]
    return Envelope(payload_type=PAYLOAD_TYPE, payload=base64.b64encode(payload).decode(), signatures=signatures)


def decode_payload(envelope: Envelope) -> bytes | None:
    """Return the payload of an envelope, or None if it is not base64."""
    try:
        return _decode_base64(envelope.payload)
    except ValueError:
        return None


def _decode_base64(text: str) -> bytes:
    """Decode base64 text in the standard or the URL-safe alphabet; DSSE allows both."""
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)


def is_signed_by(envelope: Envelope, public_key: Ed25519PublicKey) -> bool:
    """Return whether one of the signatures was made with this key. Every signature is tried, because key IDs are only hints."""
    from cryptography.exceptions import InvalidSignature

    payload = decode_payload(envelope)
    for signature in envelope.signatures if payload is not None else []:
        try:
            public_key.verify(_decode_base64(signature.sig), encode_signed_bytes(envelope.payload_type, payload or b""))
        except (InvalidSignature, ValueError):
            continue
        return True
    return False
