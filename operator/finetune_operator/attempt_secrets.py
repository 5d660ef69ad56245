"""The operator's key, and the secrets of attempts that the operator derives from it.

The operator may create Secrets, but may not read the Secrets of users. The operator reads only its own key, at startup and when it becomes the leader. If
the Secret with the key is deleted while the operator runs, the leader creates it again with the same key. If the Secret is deleted while no operator runs,
the next leader creates another key. Attempts that started with the old key continue to run, but the operator cannot read their progress with the new key.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os

from finetune_api.attempt_secret import (
    derive_attempt_secret,
    derive_checkpoint_key,
    derive_prepared_rows_key,
    derive_progress_token,
    derive_secret_name_suffix,
)
from finetune_api.names import MANAGER_NAME, Label

from finetune_operator.kube import AlreadyExists, Forbidden, KubeClient, NotFound
from finetune_operator.objects import SECRET, Object
from finetune_operator.settings import IsolationSettings, StartError

logger = logging.getLogger(__name__)

KEY_ENTRY_NAME = "key"
KEY_LENGTH_BYTES = 32


class AttemptSecrets:
    """Derives the secrets of all attempts from the operator's key. `load_key` must be called before the other functions."""

    def __init__(self, settings: IsolationSettings, operator_key: bytes | None = None):
        self._settings = settings
        self._operator_key = operator_key

    @property
    def is_enabled(self) -> bool:
        """Whether new attempts get a Secret."""
        return self._settings.secret

    async def load_key(self, kube: KubeClient, namespace: str, *, may_create: bool = True) -> None:
        """Read the operator's key from its Secret. If the Secret is missing, create it, unless `may_create` is false. Errors: KubeError, StartError.

        Only the leader may create the Secret. If the Secret was deleted, the leader restores the key that it uses; a standby replica that starts
        at that time would create another key. If `isolation.secret` is false, an existing key is still read, because attempts that started
        while `isolation.secret` was true report their progress only if the request contains their token.
        """
        name = self._settings.key_secret_name
        try:
            body = await kube.get(SECRET, namespace, name)
        except Forbidden:
            if self.is_enabled:
                raise
            return
        except NotFound:
            if not self.is_enabled or not may_create:
                return
            body = await self._create_key(kube, namespace, name)
        try:
            self._operator_key = _read_key(body, f"{namespace}/{name}")
        except StartError as error:
            if self.is_enabled:
                raise
            logger.warning("the progress of attempts with a Secret cannot be read: %s", error)

    async def _create_key(self, kube: KubeClient, namespace: str, name: str) -> Object:
        try:
            key = self._operator_key or os.urandom(KEY_LENGTH_BYTES)
            return (await kube.create(SECRET, namespace, _build_key_secret(name, namespace, key))).body
        except AlreadyExists:  # another replica was faster
            return await kube.get(SECRET, namespace, name)

    async def restore_key(self, kube: KubeClient, namespace: str) -> None:
        """Create the Secret with the operator's key again if it was deleted. If the Secret contains another key, log a warning. Errors: KubeError."""
        if not self.is_enabled:
            return
        name = self._settings.key_secret_name
        try:
            body = await kube.get(SECRET, namespace, name)
        except NotFound:
            await kube.create(SECRET, namespace, _build_key_secret(name, namespace, self._key))
            logger.warning("Secret %s/%s with the operator's key was deleted; created it again with the same key", namespace, name)
            return
        if (body.get("data") or {}) != _build_key_secret(name, namespace, self._key)["data"]:
            logger.warning(
                "Secret %s/%s contains another key than the operator uses: after its next start, the operator cannot read the progress of the "
                "attempts that run now. Restore the Secret from a backup, or delete it: then the operator creates it again with the key that it uses",
                namespace, name,
            )  # fmt: skip

    def derive_secret_name(self, job_name: str, uid: str, attempt: int) -> str:
        """Return the name of an attempt's Secret. `job_name`: name of the attempt's Job."""
        return f"{job_name}-{derive_secret_name_suffix(self._key, uid, attempt)}"

    def derive_secret(self, uid: str, attempt: int) -> str:
        """Return an attempt's secret, from which its tokens are derived."""
        return derive_attempt_secret(self._key, uid, attempt)

    def derive_checkpoint_key(self, uid: str) -> str:
        """Return the key that signs the checkpoints of all attempts of a job."""
        return derive_checkpoint_key(self._key, uid)

    def derive_prepared_rows_key(self, namespace: str) -> str:
        """Return the key that signs the prepared rows of a namespace."""
        return derive_prepared_rows_key(self._key, namespace)

    def derive_progress_token(self, uid: str, attempt: int) -> str | None:
        """Return the token for reading an attempt's progress, or None if the operator has no key. An attempt without a secret ignores the token."""
        return derive_progress_token(self.derive_secret(uid, attempt)) if self._operator_key is not None else None

    @property
    def _key(self) -> bytes:
        if self._operator_key is None:
            raise RuntimeError("the operator's key is not loaded")
        return self._operator_key


def _build_key_secret(name: str, namespace: str, key: bytes) -> Object:
    return {
        "apiVersion": SECRET.api_version,
        "kind": SECRET.kind,
        "metadata": {"name": name, "namespace": namespace, "labels": {Label.MANAGED_BY.value: MANAGER_NAME}},
        "type": "Opaque",
        "immutable": True,
        "data": {KEY_ENTRY_NAME: base64.b64encode(key).decode()},
    }


def _read_key(body: Object, name: str) -> bytes:
    try:
        key = base64.b64decode((body.get("data") or {}).get(KEY_ENTRY_NAME, ""), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < KEY_LENGTH_BYTES:
        raise StartError(
            f"Secret {name} has no key {KEY_ENTRY_NAME!r} of at least {KEY_LENGTH_BYTES} bytes: delete the Secret, and the operator creates a new one"
        )
    return key
