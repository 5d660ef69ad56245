"""Entry point of the trainer image.

`supervise` and `prepare` run as PID 1 of a pod, and `fill-cache` runs in its init container. All other commands run as additional processes in a pod.

`agent` starts the pod's ranks, `train` runs one rank, `check` checks spec, model and data before GPUs are requested, `stage` runs a stage after
training, `track` sends a run to its trackers, `compare-weights` compares the weights of two models for `finetune replay`, `check-storage` checks the
access to storage for `finetune doctor`.

This module imports only light packages, because the pod must answer HTTP within a second of its start.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name, and return the exit code."""
    command_line = sys.argv[1:] if arguments is None else arguments
    command, options = (command_line[0], command_line[1:]) if command_line else ("supervise", [])
    match command:
        case "train":
            from finetune_trainer import rank

            return rank.main()
        case "agent":
            from finetune_trainer import agent

            return agent.main(options)
        case "check":
            from finetune_trainer import check_run

            return check_run.main()
        case "stage":
            from finetune_trainer.stages import process

            return process.main(options)
        case "track":
            from finetune_trainer.trackers import process as tracker_process

            return tracker_process.main(options)
        case "compare-weights":
            from finetune_trainer import compare_weights

            return compare_weights.main(options)
        case "check-storage":
            from finetune_trainer.storage import check

            return check.main(options)
        case "fill-cache":
            return _fill_cache(options)
        case "supervise" | "run" | "prepare":
            return _supervise(command, options)
    known_commands = "supervise, run, prepare, fill-cache, train, agent, check, stage, track, compare-weights or check-storage"
    print(f"finetune-trainer: unknown command {command!r}; use {known_commands}", file=sys.stderr)
    return 64


def _supervise(command: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"finetune-trainer {command}", description="Run one pod of a FineTuneJob.")
    parser.add_argument("--run-file", help="file with the run configuration (default: FINETUNE_RUN_FILE)")
    parser.add_argument("--work-dir", help="folder for all files that the pod writes (default: FINETUNE_WORK_DIR)")
    parser.add_argument("--port", type=int, help="port of /progress; 0 chooses a free port (default: FINETUNE_PORT)")
    options = parser.parse_args(arguments)
    stop_request_times = _record_early_stop_requests()
    from finetune_trainer.logs import configure_logging

    configure_logging("supervisor")
    logging.getLogger("botocore.credentials").setLevel(logging.WARNING)  # botocore logs the source of the credentials for every connection
    try:
        from finetune_trainer.settings import Settings

        if command == "prepare":
            from finetune_trainer.supervisor.preparation_pod import prepare as run_pod
        else:
            from finetune_trainer.supervisor.supervise import supervise as run_pod
    except ImportError as error:
        return _exit_code_of_failed_import(error)

    exit_code = run_pod(Settings.from_env(run_file=options.run_file, work_folder=options.work_dir, port=options.port), stop_request_times)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Exit without waiting for threads, because after a stop request, abandoned transfers run until they time out.
    os._exit(exit_code)


def _fill_cache(arguments: list[str]) -> int:
    """Fill the model cache in an init container.

    SIGTERM ends the process at once. The kernel then releases the locks of the process, and the next pod repeats the download.
    """
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda _number, _frame: os._exit(128 + signal.SIGTERM))
    from finetune_trainer.logs import configure_logging
    from finetune_trainer.supervisor import cache_pod

    configure_logging("model-cache")
    exit_code = cache_pod.main(arguments)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # without waiting for the threads of the storage clients


def _exit_code_of_failed_import(error: ImportError) -> int:
    """If the image lacks a package or a library, print its name and return exit code 78. All other import errors are raised again.

    Kubernetes copies the printed name to the termination message, because this message consists of the last lines of the container's log.
    """
    from finetune_trainer.failure import installation_error

    installation_problem = installation_error(error)
    if installation_problem is None:
        raise error
    print(f"finetune-trainer: {installation_problem.code}: {installation_problem.message}", file=sys.stderr)
    return int(installation_problem.exit_code)


def _record_early_stop_requests() -> list[float]:
    """Record the time of each SIGTERM that arrives during the imports. Without a handler, the kernel discards signals to PID 1."""
    request_times: list[float] = []
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda _number, _frame: request_times.append(time.monotonic()))
    return request_times


if __name__ == "__main__":
    sys.exit(main())
