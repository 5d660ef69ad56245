"""`finetune-trainer check-storage <StoreTarget as JSON>`: check from a pod that it can write, read and list in storage, for `finetune doctor`.

The result is the termination message and the last line of the log. The check deletes the objects that it writes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from finetune_api.errors import FineTuneError
from finetune_api.names import TERMINATION_LOG, Env, ExitCode
from finetune_api.pod import StorageCheckResult, StoreTarget

from finetune_trainer.storage.preflight import preflight


def main(arguments: list[str]) -> int:
    """Check the storage. Returns 0, or the exit code of the failure."""
    if len(arguments) != 1:
        print("finetune-trainer check-storage: give one StoreTarget as JSON", file=sys.stderr)
        return ExitCode.CONFIG_INVALID
    try:
        abilities = preflight(StoreTarget.model_validate_json(arguments[0]))
    except FineTuneError as error:
        _report(StorageCheckResult(ok=False, code=error.code, message=error.message, hint=error.hint or ""))
        return int(error.exit_code)
    limits = [
        text
        for text, is_missing in (
            ("without conditional writes", not abilities.conditional_writes), ("old checkpoints cannot be deleted", not abilities.can_delete),
        )
        if is_missing
    ]  # fmt: skip
    _report(StorageCheckResult(ok=True, message=", ".join(limits)))
    return ExitCode.OK


def _report(result: StorageCheckResult) -> None:
    text = result.to_json()
    print(text, flush=True)
    with contextlib.suppress(OSError):  # outside of a pod there is no such file
        Path(os.environ.get(Env.TERMINATION_LOG, TERMINATION_LOG)).write_text(text, encoding="utf-8")
