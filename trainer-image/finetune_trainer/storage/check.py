"""`finetune-trainer check-storage <StoreTarget as JSON>`: check that this pod can write, read and list objects in a store.

`finetune doctor` runs the command in a pod. The command writes its result as JSON to the termination message and to the last line of the log. It
deletes the objects that it writes to the store.
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
    """Check the store and report the result. Returns 0, or the exit code of the failure."""
    if len(arguments) != 1:
        print("finetune-trainer check-storage: give one StoreTarget as JSON", file=sys.stderr)
        return ExitCode.CONFIG_INVALID
    try:
        abilities = preflight(StoreTarget.model_validate_json(arguments[0]))
    except FineTuneError as error:
        _report(StorageCheckResult(ok=False, code=error.code, message=error.message, hint=error.hint or ""))
        return int(error.exit_code)
    missing_abilities = [
        description
        for description, is_missing in (
            ("without conditional writes", not abilities.has_conditional_writes), ("old checkpoints cannot be deleted", not abilities.can_delete),
        )
        if is_missing
    ]  # fmt: skip
    _report(StorageCheckResult(ok=True, message=", ".join(missing_abilities)))
    return ExitCode.OK


def _report(result: StorageCheckResult) -> None:
    text = result.to_json()
    print(text, flush=True)
    with contextlib.suppress(OSError):  # Outside a pod, the file of the termination message cannot be written.
        Path(os.environ.get(Env.TERMINATION_LOG, TERMINATION_LOG)).write_text(text, encoding="utf-8")
