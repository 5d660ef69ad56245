"""`finetune-trainer`: what the image runs. `supervise` is a pod's PID 1, `train` one rank, `agent` what stands between.

argparse and nothing heavy on purpose: the pod must answer HTTP within a second of its start.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    command, rest = (given[0], given[1:]) if given else ("supervise", [])
    match command:
        case "train":
            from finetune_trainer import rank

            return rank.main()
        case "agent":
            from finetune_trainer import agent

            return agent.main(rest)
        case "supervise" | "run":
            return _supervise(command, rest)
    print(f"finetune-trainer: {command!r} is no command; write supervise, run, train or agent", file=sys.stderr)
    return 64


def _supervise(command: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"finetune-trainer {command}", description="Run one pod of a FineTuneJob.")
    parser.add_argument("--run-file", help="the run configuration (default: FINETUNE_RUN_FILE)")
    parser.add_argument("--work-dir", help="folder for everything that is written (default: FINETUNE_WORK_DIR)")
    parser.add_argument("--port", type=int, help="port of /progress; 0: any free one (default: FINETUNE_PORT)")
    options = parser.parse_args(arguments)
    asked = _note_early_stops()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s supervisor %(message)s", stream=sys.stderr)
    from finetune_trainer.supervisor.settings import Settings
    from finetune_trainer.supervisor.supervise import supervise

    return supervise(Settings.from_env(run_file=options.run_file, work=options.work_dir, port=options.port), asked)


def _note_early_stops() -> list[float]:
    """Remember a SIGTERM that comes while we still import: the kernel throws away what PID 1 has no handler for."""
    asked: list[float] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: asked.append(time.monotonic()))
    return asked


if __name__ == "__main__":
    sys.exit(main())
