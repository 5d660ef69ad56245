"""From the operator's own key, derive the secret of an attempt, and the keys that sign checkpoints and prepared rows.

Each pod mounts the secret of its attempt and a signing key as files, and derives the progress token and the gang key from the secret. The operator
never reads the Secret of an attempt. After a restart, the operator derives the secret of a running attempt again. The operator therefore needs no permission to
read the Secrets of users, and can still ask the pods for their progress.
"""

from __future__ import annotations

import hashlib
import hmac


def derive_attempt_secret(operator_key: bytes, uid: str, attempt: int) -> str:
    """Return the secret (64 hex digits) of an attempt. `uid`: uid of the FineTuneJob."""
    return _derive(operator_key, f"attempt-secret/{uid}/{attempt}").hex()


def derive_checkpoint_key(operator_key: bytes, uid: str) -> str:
    """Return the key (64 hex digits) with which all attempts of a FineTuneJob sign their checkpoints. `uid`: uid of the FineTuneJob."""
    return _derive(operator_key, f"checkpoint-key/{uid}").hex()


def derive_prepared_rows_key(operator_key: bytes, namespace: str) -> str:
    """Return the key (64 hex digits) with which all preparation pods of a namespace sign prepared rows. Training pods do not have this key."""
    return _derive(operator_key, f"prepared-rows-key/{namespace}").hex()


def sign_manifest(signing_key: str, folder: str, manifest_sha256: str) -> str:
    """Return the signature (64 hex digits) of the manifest of a checkpoint or of prepared rows.

    `folder`: path of the manifest's folder below the root folder of the job or of the prepared rows. The signature covers the path of the folder, so it is not
    valid for a copy of the manifest in another folder.
    """
    return _derive(signing_key.encode(), f"checkpoint/{folder}/{manifest_sha256}").hex()


def derive_secret_name_suffix(operator_key: bytes, uid: str, attempt: int) -> str:
    """Return eight hex digits for the name of the attempt's Secret.

    Users cannot predict the digits, so they cannot create a Secret with the name of the attempt's Secret before the operator does. If a FineTuneJob is deleted
    and a new one is created with the same name, the digits differ, so the new job never uses a Secret of the deleted job.
    """
    return _derive(operator_key, f"secret-name/{uid}/{attempt}").hex()[:8]


def derive_progress_token(attempt_secret: str) -> str:
    """Return the token that a request for `GET /progress` must contain. The attempt's secret and its gang key cannot be computed from this token."""
    return _derive(attempt_secret.encode(), "progress-token").hex()


def derive_gang_key(attempt_secret: str) -> bytes:
    """Return the key (32 bytes) with which a pod proves to the other pods of its gang that it belongs to the gang."""
    return _derive(attempt_secret.encode(), "gang-key")


def _derive(key: bytes, purpose: str) -> bytes:
    """Return a key of 32 bytes, derived from `key` with HMAC-SHA256. Keys for different purposes are independent of each other."""
    return hmac.new(key, purpose.encode(), hashlib.sha256).digest()
