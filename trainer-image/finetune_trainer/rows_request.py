"""Lets the process `check` of a preparation ask its supervisor for stored rows, and report how many rows it has tokenised.

Only the process `check` can compute the digest of the rows, because it has the tokenizer. Only the supervisor has credentials for storage.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

from finetune_trainer.channel import POLL_SECONDS, Channel

log = logging.getLogger(__name__)

ROWS_NEEDED, ROWS_TOKENISED = "rowsNeeded", "rowsTokenised"
"""Kinds of messages to the supervisor: a request for the rows that have a given digest, and the number of rows that are tokenised so far."""
ANSWER_FILES = "stored-rows-*"
"""Pattern of the names of the files with which the supervisor answers. The star stands for the first 24 digits of the digest."""
RESEND_SECONDS = 30.0
"""Interval at which the request is repeated, because the supervisor may have lost an earlier request."""
SILENCE_SECONDS = 600.0
"""How long the process waits without an answer or a heartbeat from the supervisor. After this time, the process tokenises the data itself."""


class SupervisorRowPreparation:
    """Lets the supervisor download rows that another preparation has stored, and counts tokenised rows (`data.prepare.PreparationCallbacks`)."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.digest: str | None = None
        self.tokenised_rows = 0

    def provide_rows(self, digest: str) -> None:
        """Ask the supervisor for the rows with this digest. Return when the supervisor has answered, or has been silent for `SILENCE_SECONDS`."""
        self.digest = digest
        answer_path, working_path = answer_file(self._channel.work_folder, digest), working_file(self._channel.work_folder, digest)
        last_request_time, last_heartbeat_time, last_modification_time = float("-inf"), time.monotonic(), 0
        while not answer_path.exists():
            now, modification_time = time.monotonic(), _read_modification_time(working_path)
            if modification_time != last_modification_time:
                last_heartbeat_time, last_modification_time = now, modification_time
            if now - last_heartbeat_time >= SILENCE_SECONDS:
                log.warning("the supervisor did not answer for %.0f s, so this process tokenises the data", SILENCE_SECONDS)
                return
            if now - last_request_time >= RESEND_SECONDS:
                self._channel.send_message(ROWS_NEEDED, digest=digest)
                last_request_time = now
            time.sleep(POLL_SECONDS)

    def count_rows(self, rows: int) -> None:
        """Add newly tokenised rows, and report the number of rows that are tokenised so far."""
        self.tokenised_rows += rows
        self._channel.send_message(ROWS_TOKENISED, rows=self.tokenised_rows)


def answer_file(work_folder: Path, digest: str) -> Path:
    """Return the path of the file that the supervisor creates when its search for the rows with this digest has ended."""
    return work_folder / ANSWER_FILES.replace("*", digest[:24])


def working_file(work_folder: Path, digest: str) -> Path:
    """Return the path of the file that the supervisor touches, each time the request is repeated, to show that it still looks for the rows."""
    return work_folder / f"{answer_file(work_folder, digest).name}.working"


def is_digest(value: Any) -> bool:
    """Whether the value has the form of a digest: 64 hex digits.

    The supervisor checks the form of each digest, because it does not trust the process `check`.
    """
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _read_modification_time(file: Path) -> int:
    """Return when the file was touched last, in ns since 1970; 0 if it does not exist."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
