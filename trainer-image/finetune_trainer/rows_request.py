"""How the process `check` of a preparation asks its supervisor for stored rows, and reports how many rows it has tokenised.

Only this process can compute the digest of the rows, because it has the tokenizer. Only the supervisor has credentials for storage.
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
"""Messages to the supervisor: rows with this digest are needed, and so many rows are tokenised."""
ANSWER_FILES = "stored-rows-*"
"""Pattern of the names of the files with which the supervisor answers. The star stands for a part of the digest."""
RESEND_SECONDS = 30.0
"""Time after which the request is sent again, because the supervisor may have lost it."""
SILENCE_SECONDS = 600.0
"""Time without a sign of the supervisor after which the process tokenises the data itself."""


class SupervisorRowPreparation:
    """Lets the supervisor download rows that another preparation has stored, and counts tokenised rows (`data.prepare.PreparationCallbacks`)."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.digest: str | None = None
        self.tokenised_rows = 0

    def provide_rows(self, digest: str) -> None:
        """Wait until the supervisor has looked for the rows, or has been silent for too long."""
        self.digest = digest
        answer, working = answer_file(self._channel.work, digest), working_file(self._channel.work, digest)
        sent_at, heard_at, last_sign = float("-inf"), time.monotonic(), 0
        while not answer.exists():
            now, sign = time.monotonic(), _modified_at(working)
            if sign != last_sign:
                heard_at, last_sign = now, sign
            if now - heard_at >= SILENCE_SECONDS:
                log.warning("the supervisor did not answer for %.0f s; the data are tokenised", SILENCE_SECONDS)
                return
            if now - sent_at >= RESEND_SECONDS:
                self._channel.send_message(ROWS_NEEDED, digest=digest)
                sent_at = now
            time.sleep(POLL_SECONDS)

    def count_rows(self, rows: int) -> None:
        """Report the number of rows that are tokenised so far."""
        self.tokenised_rows += rows
        self._channel.send_message(ROWS_TOKENISED, rows=self.tokenised_rows)


def answer_file(work: Path, digest: str) -> Path:
    """The file that the supervisor creates when it has looked for the rows with this digest."""
    return work / ANSWER_FILES.replace("*", digest[:24])


def working_file(work: Path, digest: str) -> Path:
    """The file that the supervisor touches at each repeated request while it still looks for the rows."""
    return work / f"{answer_file(work, digest).name}.working"


def is_digest(value: Any) -> bool:
    """Whether the value has the form of a digest of rows: 64 hex digits. The process `check` is not trusted to send one."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _modified_at(file: Path) -> int:
    """When the file was touched last, in ns; 0 if it does not exist."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
