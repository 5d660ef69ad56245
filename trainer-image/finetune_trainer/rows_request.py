"""How the process `check` of a preparation asks its supervisor for stored rows, and reports how many rows it has tokenised.

Only this process can compute the digest of the rows, because it has the tokenizer. Only the supervisor has credentials for storage.
"""

from __future__ import annotations

import time
from pathlib import Path

from finetune_trainer.channel import POLL_SECONDS, Channel

ROWS_NEEDED, ROWS_TOKENISED = "rowsNeeded", "rowsTokenised"
"""Messages to the supervisor: rows with this digest are needed, and so many rows are tokenised."""
ANSWER_FILES = "stored-rows-*"
"""Pattern of the names of the files with which the supervisor answers. The star stands for a part of the digest."""


class SupervisorRowPreparation:
    """Lets the supervisor download rows that another preparation has stored, and counts tokenised rows (`data.prepare.PreparationCallbacks`)."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.digest: str | None = None
        self.tokenised_rows = 0

    def provide_rows(self, digest: str) -> None:
        """Wait until the supervisor has looked for the rows."""
        self.digest = digest
        self._channel.send_message(ROWS_NEEDED, digest=digest)
        while not answer_file(self._channel.work, digest).exists():
            time.sleep(POLL_SECONDS)

    def count_rows(self, rows: int) -> None:
        """Report the number of rows that are tokenised so far."""
        self.tokenised_rows += rows
        self._channel.send_message(ROWS_TOKENISED, rows=self.tokenised_rows)


def answer_file(work: Path, digest: str) -> Path:
    """The file that the supervisor creates when it has looked for the rows with this digest."""
    return work / ANSWER_FILES.replace("*", digest[:24])
