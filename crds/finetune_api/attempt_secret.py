"""The secret of an attempt and the key for checkpoints: how the operator derives them, and what pods derive from them.

Each pod of the attempt mounts both as files. The operator does not store secrets. It derives them again from its own key, so a
restarted operator can still read the progress of running attempts without permission to read the Secrets of users.
"""

from __future__ import annotations

import hashlib
import hmac


def derive_attempt_secret(operator_key: bytes, uid: str, attempt: int) -> str:
    """Return the secret (64 hex digits) of one attempt of the FineTuneJob with this uid."""
    return _derive(operator_key, f"attempt-secret/{uid}/{attempt}").hex()


def derive_checkpoint_key(operator_key: bytes, uid: str) -> str:
    """Return the key (64 hex digits) with which all attempts of the FineTuneJob sign their checkpoints."""
    return _derive(operator_key, f"checkpoint-key/{uid}").hex()


def derive_prepared_rows_key(operator_key: bytes, namespace: str) -> str:
    """Return the key (64 hex digits) with which all preparation pods of a namespace sign prepared rows. Training pods do not have it."""
    return _derive(operator_key, f"prepared-rows-key/{namespace}").hex()


def sign_checkpoint(checkpoint_key: str, folder: str, manifest_sha256: str) -> str:
    """Return the signature (64 hex digits) of a checkpoint or of prepared rows.

    `folder`: its folder below the root of the job or of the prepared rows, so that a signature fits no other step and no other data.
    """
    return _derive(checkpoint_key.encode(), f"checkpoint/{folder}/{manifest_sha256}").hex()


def derive_secret_name_suffix(operator_key: bytes, uid: str, attempt: int) -> str:
    """Return eight hex digits for the name of the attempt's Secret.

    Users cannot predict the digits, so they cannot create the Secret with a known content before the operator does. A FineTuneJob with the
    name of a deleted one gets other digits, so it never finds the old Secret.
    """
    return _derive(operator_key, f"secret-name/{uid}/{attempt}").hex()[:8]


def derive_progress_token(attempt_secret: str) -> str:
    """Return the token that `GET /progress` asks for. It does not reveal the secret or the gang key."""
    return _derive(attempt_secret.encode(), "progress-token").hex()


def derive_gang_key(attempt_secret: str) -> bytes:
    """Return the key (32 bytes) with which the pods of a gang prove that they belong to it."""
    return _derive(attempt_secret.encode(), "gang-key")


def _derive(key: bytes, purpose: str) -> bytes:
    """HMAC-SHA256 as a key derivation function. The purpose makes the results independent of each other."""
    return hmac.new(key, purpose.encode(), hashlib.sha256).digest()
