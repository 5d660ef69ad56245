"""The table of API keys, with the ServiceAccount to which each key belongs. The table contains the digests of the keys, but not the keys."""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

from finetune_api.base import WireModel
from pydantic import Field, StringConstraints, ValidationError, field_validator

from finetune_cli.config_files import list_mistakes, read_mapping
from finetune_cli.files import UnreadableFile, display_name
from finetune_cli.mistakes import InvalidInput
from finetune_cli.openai_server.failures import RequestFailure

logger = logging.getLogger(__name__)
ObjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
KEYS_HINT = "write `keys:` with entries {sha256: <sha256 of the key>, namespace: team-a, serviceAccount: finetune-user}"


@dataclass(frozen=True)
class Account:
    """The ServiceAccount to which an API key belongs."""

    namespace: str
    service_account: str

    @property
    def user(self) -> str:
        """The user name of the ServiceAccount in Kubernetes."""
        return f"system:serviceaccount:{self.namespace}:{self.service_account}"


class KeyEntry(WireModel):
    """One entry of the table: the SHA-256 digest of a key in hexadecimal digits, and the ServiceAccount to which the key belongs."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    namespace: ObjectName
    service_account: ObjectName


class KeyFile(WireModel):
    """The content of the file with the table of API keys."""

    keys: list[KeyEntry] = Field(min_length=1)

    @field_validator("keys")
    @classmethod
    def _refuse_duplicates(cls, keys: list[KeyEntry]) -> list[KeyEntry]:
        digests = [entry.sha256 for entry in keys]
        for index, digest in enumerate(digests):
            if digest in digests[:index]:
                raise ValueError(f"entry {index + 1} has the same sha256 as an earlier entry: each key belongs to one ServiceAccount; remove one")
        return keys


class KeyTable:
    """The table of API keys in a file.

    If the file changes, the server reads it again. Therefore a removed key stops working without a restart of the server.
    """

    def __init__(self, path: Path):
        """Read the file. Raise UnreadableFile, or InvalidInput with all mistakes."""
        self._path, self._lock = path, threading.Lock()
        self._file_version: tuple[int, int, int] | None = None
        self._entries: list[KeyEntry] = []
        self._reload()

    def find_account(self, api_key: str) -> Account | None:
        """Return the account of a key, or None for an unknown key. Raise RequestFailure if the file has changed and is not valid.

        The key is compared with every entry, each time in constant time, so that the duration of the comparison reveals nothing about the valid keys.
        """
        try:
            with self._lock:
                self._reload()
                entries = self._entries
        except (UnreadableFile, InvalidInput) as error:
            # The table that was read before the change is not used, because it may contain a key that was just removed.
            problems = error.mistakes if isinstance(error, InvalidInput) else [error]
            logger.error("the table of API keys is not valid, so all requests are refused: %s", "; ".join(map(str, problems)))
            message = "the table of API keys of this server is not valid: ask its administrator to correct the table; the server's log names the mistake"
            raise RequestFailure(HTTPStatus.SERVICE_UNAVAILABLE, message, code="keys_unavailable") from None
        digest = hashlib.sha256(api_key.encode("utf-8", "surrogateescape")).hexdigest()
        matching_entries = [entry for entry in entries if hmac.compare_digest(entry.sha256, digest)]
        return Account(matching_entries[0].namespace, matching_entries[0].service_account) if matching_entries else None

    def _reload(self) -> None:
        try:
            file_status = self._path.stat()
        except OSError:
            file_version = None
        else:
            file_version = (file_status.st_ino, file_status.st_mtime_ns, file_status.st_size)
        if file_version is not None and file_version == self._file_version:
            return
        values, lines = read_mapping(self._path, "a table of API keys", KEYS_HINT)
        try:
            self._entries = KeyFile.model_validate(values).keys
        except ValidationError as error:
            raise InvalidInput(list(list_mistakes(error, display_name(self._path), lines, f"unknown key; {KEYS_HINT}"))) from None
        self._file_version = file_version
