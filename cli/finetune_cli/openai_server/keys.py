"""The table of API keys: which ServiceAccount each key stands for. The table contains digests of keys, not the keys."""

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

from finetune_cli.config_files import mistakes_of, read_mapping
from finetune_cli.files import UnreadableFile, display_name
from finetune_cli.mistakes import InvalidInput
from finetune_cli.openai_server.failures import RequestFailure

logger = logging.getLogger(__name__)
ObjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
HINT = "write `keys:` with entries {sha256: <sha256 of the key>, namespace: team-a, serviceAccount: finetune-user}"


@dataclass(frozen=True)
class Account:
    """The ServiceAccount that an API key stands for."""

    namespace: str
    service_account: str

    @property
    def user(self) -> str:
        """The name under which Kubernetes knows the ServiceAccount as a user."""
        return f"system:serviceaccount:{self.namespace}:{self.service_account}"


class KeyEntry(WireModel):
    """One entry of the table."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    namespace: ObjectName
    service_account: ObjectName


class KeyFile(WireModel):
    """The content of the table's file."""

    keys: list[KeyEntry] = Field(min_length=1)

    @field_validator("keys")
    @classmethod
    def _refuse_duplicates(cls, keys: list[KeyEntry]) -> list[KeyEntry]:
        digests = [entry.sha256 for entry in keys]
        for number, digest in enumerate(digests):
            if digest in digests[:number]:
                raise ValueError(f"entry {number + 1} has the same sha256 as an earlier entry: each key stands for one ServiceAccount; remove one")
        return keys


class KeyTable:
    """The table of API keys in a file. A changed file is read again, so that a removed key is refused without a restart of the server."""

    def __init__(self, path: Path):
        """Read the file. Errors: UnreadableFile, InvalidInput."""
        self._path, self._lock = path, threading.Lock()
        self._version: tuple[int, int, int] | None = None
        self._entries: list[KeyEntry] = []
        self._read()

    def find(self, key: str) -> Account | None:
        """Return the account of a key, or None for an unknown key. Errors: RequestFailure if the file cannot be read now.

        The time of the comparison does not depend on the key: every entry is compared, each in constant time.
        """
        try:
            with self._lock:
                self._read()
                entries = self._entries
        except (UnreadableFile, InvalidInput) as error:
            # With the old table, a key that was just removed would still be accepted.
            problems = error.mistakes if isinstance(error, InvalidInput) else [error]
            logger.error("the table of keys is refused: %s", "; ".join(map(str, problems)))
            message = "the table of API keys of this server is not valid: ask its administrator to correct the table; the server's log names the mistake"
            raise RequestFailure(HTTPStatus.SERVICE_UNAVAILABLE, message, code="keys_unavailable") from None
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        matching = [entry for entry in entries if hmac.compare_digest(entry.sha256, digest)]
        return Account(matching[0].namespace, matching[0].service_account) if matching else None

    def _read(self) -> None:
        try:
            state = self._path.stat()
        except OSError:
            version = None
        else:
            version = (state.st_ino, state.st_mtime_ns, state.st_size)
        if version is not None and version == self._version:
            return
        values, lines = read_mapping(self._path, "a table of API keys", HINT)
        try:
            self._entries = KeyFile.model_validate(values).keys
        except ValidationError as error:
            raise InvalidInput(list(mistakes_of(error, display_name(self._path), lines, f"unknown key; {HINT}"))) from None
        self._version = version
