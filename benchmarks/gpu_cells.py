"""Runs tests and benchmarks on a machine with a GPU. Each test run or benchmark is a named cell; the most important cells run first.

    make gpu-kit                                                   # on the development machine: packs the packages that the GPU machine lacks
    python3 benchmarks/gpu_cells.py install build/gpu-kit/site.tar.xz   # on the GPU machine, once
    python3 benchmarks/gpu_cells.py run --output OUT --seconds 1800     # on the GPU machine, until all cells have run
    python3 benchmarks/gpu_cells.py run --rehearse --output OUT         # on any machine, on its CPU with tiny models
    python benchmarks/gpu_cells.py record OUT/gpu_cells.json ...        # on the development machine: writes results/gpu_cells.json

Method. Every cell runs in a separate process and writes one JSON value. Cells that have passed in an earlier call are skipped; `--done` names the
result files of earlier calls. The cells `tests-*` run the tests of `tests/gpu` in parallel processes; the other cells run one after the other. The
result names the versions of the libraries. The GPU machine uses its own version of torch, so no result was measured with the locked version.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_test_report
import record

ROOT = Path(__file__).resolve().parent.parent
PACKAGES_FOLDER = Path("/opt/gpu-kit/site-packages")
"""Folder of the kit's packages.

The folder must be named `site-packages`: dill treats only modules in such a folder as installed, and this changes the hashes of the package datasets.
"""
PYTHONPATH = os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "trainer-image", "benchmarks", "."))
RECORDED_PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed", "liger-kernel", "pyarrow")
CELL_TIME_LIMIT_SECONDS = 90.0


@dataclass(frozen=True)
class Cell:
    """A named cell.

    `make_command` returns the command of the cell. Its arguments are the path of the cell's JSON file, and whether this is a rehearsal on a CPU.
    `seconds`: the time limit of the cell.
    """

    name: str
    make_command: Callable[[Path, bool], Sequence[str]]
    seconds: float = CELL_TIME_LIMIT_SECONDS


def make_environment_command(output_file: Path, is_rehearsal: bool) -> Sequence[str]:
    return (sys.executable, str(Path(__file__)), "environment", str(output_file))


def make_test_cell(name: str, expression: str, *, process_count: int, time_limit_seconds: float = CELL_TIME_LIMIT_SECONDS) -> Cell:
    """Return a cell that runs tests of `tests/gpu`. `expression` selects the tests, as pytest's option -k."""

    def make_command(output_file: Path, is_rehearsal: bool) -> Sequence[str]:
        # A machine without the project's environment lacks some of pytest's plugins that pyproject.toml configures.
        pytest_options = ["-c", "/dev/null", "--rootdir", str(ROOT), "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider", "-q", "-ra"]
        parallel_options = ["-n", str(process_count), "--dist", "worksteal"] if process_count > 1 else []
        return (sys.executable, "-m", "pytest", *pytest_options, *parallel_options, "-p", "gpu_test_report", "-W", "ignore", "-k", expression, "tests/gpu")

    return Cell(f"tests-{name}", make_command, time_limit_seconds)


def make_speed_cell(
    model_size: str, method: str, data_kind: str, arm_names: str, *, round_count: int = 1, step_count: int = 12, batch_size: int = 2,
    time_limit_seconds: float = CELL_TIME_LIMIT_SECONDS,
) -> Cell:
    """Return a cell that runs `gpu_throughput.py`. `arm_names`: the names of the trainers that it compares, separated by semicolons."""
    name = "-".join(["speed", model_size, method, data_kind, *([f"batch{batch_size}"] if batch_size != 2 else [])])

    def make_command(output_file: Path, is_rehearsal: bool) -> Sequence[str]:
        size_options = ["--shape", "tiny", "--device", "cpu", "--length", "256"] if is_rehearsal else ["--shape", model_size]
        model_options = ["--model-cache", str(choose_model_folder())]
        round_options = ["--rounds", str(round_count), "--steps", str(step_count), "--batch", str(batch_size), "--output", str(output_file), "--no-write"]
        workload_options = [*size_options, "--method", method, "--data", data_kind]
        return (sys.executable, str(ROOT / "benchmarks/gpu_throughput.py"), *workload_options, "--arms", arm_names, *model_options, *round_options)

    return Cell(name, make_command, time_limit_seconds)


CELLS = (
    Cell("environment", make_environment_command, 60),
    make_test_cell("features", "not does_not_fit", process_count=12, time_limit_seconds=300),
    make_test_cell("memory", "does_not_fit", process_count=1),
    make_speed_cell("8b", "lora", "packed", "ours; tuned; bare"),
    make_speed_cell("8b", "lora", "chat", "ours; tuned; bare"),
    make_speed_cell("1b", "lora", "packed", "ours; tuned; bare", step_count=20),
    make_speed_cell("8b", "qlora", "packed", "ours; tuned; bare"),
    make_speed_cell("8b", "full", "packed", "ours; ours, 16-bit weights; tuned, checkpointing on"),
    make_speed_cell("1b", "full", "packed", "ours; tuned; bare", step_count=20),
    make_speed_cell("1b", "lora", "chat", "ours; tuned; bare", step_count=20),
    make_speed_cell("1b", "full", "chat", "ours; tuned; bare", step_count=20),
    make_speed_cell("1b", "lora", "packed", "tuned; tuned, compiled", step_count=30, batch_size=4),
)


def choose_model_folder() -> Path:
    """Return the folder of the generated models: in memory if 30 GiB of memory are free, because memory is faster than the disk."""
    memory_folder = Path("/dev/shm")  # noqa: S108  models are no secrets
    if memory_folder.exists() and os.statvfs(memory_folder).f_bavail * os.statvfs(memory_folder).f_frsize > 30 * 2**30:
        return memory_folder / "gpu-kit-models"
    return PACKAGES_FOLDER / "models"


def install_kit(archive: Path) -> None:
    """Unpack the kit, so that the kit's packages take precedence over the packages of the machine's Python."""
    PACKAGES_FOLDER.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(PACKAGES_FOLDER, filter="data")
    path_file = Path(sysconfig.get_paths()["purelib"]) / "gpu-kit.pth"
    path_file.write_text(f"import sys; sys.path.insert(0, {str(PACKAGES_FOLDER)!r})\n")
    print(f"{PACKAGES_FOLDER} comes first on the path of {sys.executable}")


def describe_environment() -> dict[str, Any]:
    """Return the versions of the libraries, the device, and two measured limits of the GPU: bf16 matrix products and memory bandwidth."""
    import torch

    description: dict[str, Any] = {"cores": os.cpu_count(), "versions": record.read_package_versions(RECORDED_PACKAGES) | {"cuda": torch.version.cuda}}
    if not torch.cuda.is_available():
        return description | {"device": "cpu"}
    gpu_properties = torch.cuda.get_device_properties(0)
    description |= {"device": gpu_properties.name, "memoryGb": round(gpu_properties.total_memory / 1e9, 1)}
    left_matrix, right_matrix = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source_tensor = torch.randn(2**30, device="cuda")
    target_tensor = torch.empty_like(source_tensor)
    description["matmulTeraflops"] = round(2 * 8192**3 / _measure_seconds(lambda: torch.matmul(left_matrix, right_matrix)) / 1e12, 1)
    description["copyTerabytesPerSecond"] = round(2 * 4 * 2**30 / _measure_seconds(lambda: target_tensor.copy_(source_tensor)) / 1e12, 2)
    return description


def _measure_seconds(action: Callable[[], Any]) -> float:
    """Return the median duration of an action on the GPU in seconds."""
    import statistics

    import torch

    durations = []
    for number in range(23):
        torch.cuda.synchronize()
        started_at = time.perf_counter()
        action()
        torch.cuda.synchronize()
        durations += [time.perf_counter() - started_at] if number >= 3 else []
    return statistics.median(durations)


def run_cell(cell: Cell, folder: Path, time_limit_seconds: float, *, is_rehearsal: bool) -> dict[str, Any]:
    """Run one cell for at most `time_limit_seconds`.

    Returns its result. If the cell runs out of time, the result contains the figures that the cell has written so far.
    """
    output_file, log_file = folder / f"{cell.name}.json", folder / f"{cell.name}.log"
    environment = os.environ | {
        "PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        gpu_test_report.REPORT_VARIABLE: str(output_file.with_suffix(".jsonl")),
        **({"REHEARSE_ON_CPU": "1", "OMP_NUM_THREADS": "1"} if is_rehearsal else {"OMP_NUM_THREADS": "4"}),
    }  # fmt: skip
    started_at = time.monotonic()
    with log_file.open("wb") as stream:
        process = subprocess.Popen(cell.make_command(output_file, is_rehearsal), env=environment, stdout=stream, stderr=stream, start_new_session=True)
        try:
            exit_code: int | None = process.wait(time_limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            exit_code = None
    figures = _read_figures(output_file)
    status = "out of time" if exit_code is None else "passed" if exit_code == 0 else "failed"
    result = {"status": status, "seconds": round(time.monotonic() - started_at, 1), "figures": figures}
    return result if status == "passed" else result | {"log": log_file.read_text(errors="replace")[-1500:]}


def _read_figures(output_file: Path) -> Any:
    """Return the figures that a cell has written: its JSON file, or the results of its tests."""
    if output_file.exists():
        return json.loads(output_file.read_text())
    report_file = output_file.with_suffix(".jsonl")
    return gpu_test_report.read_report(report_file) if report_file.exists() else None


def has_result(figures: Any) -> bool:
    """Whether at least one arm, test or property of a cell has a result."""
    if not figures:
        return False
    if "arms" in figures:
        return any(arm["error"] is None for arm in figures["arms"].values())
    return not all(isinstance(figure, dict) and figure.get("status", "passed") != "passed" for figure in figures.values())


def summarise(cell_results: Mapping[str, Any]) -> str:
    """Return a short text with the status and main figures of all cells."""
    lines = []
    for name, cell_result in cell_results.items():
        lines.append(f"{cell_result['status']:12} {name} ({cell_result['seconds']} s)")
        figures = cell_result["figures"] or {}
        if "arms" in figures:
            lines += [f"    {arm}: {_describe_arm(arm_result)}" for arm, arm_result in figures["arms"].items()]
        elif name.startswith("tests-"):
            failed_tests = {test: test_result for test, test_result in figures.items() if test_result["status"] != "passed"}
            lines.append(f"    {len(figures) - len(failed_tests)} of {len(figures)} tests passed")
            lines += [f"    {test_result['status']}: {test}: {test_result['text'][-400:]!r}" for test, test_result in failed_tests.items()]
        else:
            lines.append(f"    {json.dumps(figures)[:900]}")
    return "\n".join(lines)


def _describe_arm(arm_result: Mapping[str, Any]) -> str:
    speed_or_error = arm_result["error"] or f"{arm_result['tokensPerSecond']} tokens/s, MFU {arm_result['mfu']}, first loss {arm_result['firstLoss']}"
    return f"{speed_or_error}, {arm_result['peakMemoryGb']} GB, {arm_result['seconds']} s"


def run_cells(options: argparse.Namespace) -> int:
    """Run the cells that have not passed yet, in order, until the time is used up. Returns 1 if a cell did not pass, else 0."""
    deadline = time.monotonic() + options.seconds
    options.output.mkdir(parents=True, exist_ok=True)
    passed_cell_names = {name for file in options.done for name, cell in json.loads(file.read_text())["cells"].items() if cell["status"] == "passed"}
    result_by_cell: dict[str, Any] = {}
    for cell in CELLS:
        remaining_seconds = deadline - time.monotonic()
        if (options.only and cell.name not in options.only) or cell.name in passed_cell_names or remaining_seconds < 20:
            continue
        print(f"--- {cell.name}", flush=True)
        time_limit_seconds = min(cell.seconds, options.cell_seconds, remaining_seconds - 5)
        result_by_cell[cell.name] = run_cell(cell, options.output, time_limit_seconds, is_rehearsal=options.rehearse)
        (options.output / "gpu_cells.json").write_text(json.dumps({"cells": result_by_cell}, indent=1))
        if not has_result(result_by_cell[cell.name]["figures"]):
            print(f"{cell.name} has no result: the other cells are skipped, because the kit may not work on this machine")
            break
    print(summarise(result_by_cell))
    return int(any(cell["status"] != "passed" for cell in result_by_cell.values()))


def merge_results(result_files: Sequence[Path]) -> dict[str, Any]:
    """Merge the cells of several calls. A later result of a cell replaces an earlier result, unless the later result has no figures."""
    merged_cells: dict[str, Any] = {}
    for file in result_files:
        for name, cell in json.loads(file.read_text())["cells"].items():
            if name not in merged_cells or has_result(cell["figures"]):
                merged_cells[name] = cell
    return merged_cells


def write_results(result_name: str, result_files: Sequence[Path]) -> Path:
    """Write the merged results to `results/<name>.json`, without logs and tracebacks. The cell `environment` describes the machine."""
    cells = {name: {key: value for key, value in cell.items() if key != "log"} for name, cell in merge_results(result_files).items()}
    for figure in (figure for cell in cells.values() for figure in cell["figures"].values() if isinstance(figure, dict) and "text" in figure):
        figure["text"] = "\n".join(line for line in figure["text"].splitlines() if line.startswith("E ") and "Error" in line)[-500:]
    if "environment" not in cells:
        raise SystemExit("the results lack the cell environment, which describes the machine: run this cell with --only environment, and add its result file")
    machine = cells.pop("environment")["figures"]
    method = record.extract_method(__doc__).replace("\n", " ")
    return record.write_result(result_name, cells, method=method, machine=machine, versions=machine.pop("versions"))


def parse_cells(text: str) -> list[str]:
    """Return the names of cells in an option, which are separated by commas. Errors: argparse.ArgumentTypeError for an unknown cell."""
    cell_names, known_names = text.split(","), [cell.name for cell in CELLS]
    for name in cell_names:
        if name not in known_names:
            raise argparse.ArgumentTypeError(f"there is no cell {name!r}: write one of {', '.join(known_names)}")
    return cell_names


def main() -> int:
    """Install the kit, run the cells, record the results, or describe the machine. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    subparsers.add_parser("install", help="unpack the kit").add_argument("archive", type=Path)
    subparsers.add_parser("environment", help="write versions and speed of this machine").add_argument("file", type=Path)
    record_parser = subparsers.add_parser("record", help="write the results of all calls to benchmarks/results")
    record_parser.add_argument("files", type=Path, nargs="+", help="results of all calls, oldest first")
    record_parser.add_argument("--name", default="gpu_cells", help="name of the file in benchmarks/results")
    run_parser = subparsers.add_parser("run", help="run the cells")
    run_parser.add_argument("--output", type=Path, required=True, help="folder for results and logs")
    run_parser.add_argument("--seconds", type=float, default=1e9, help="end after this time")
    run_parser.add_argument("--cell-seconds", type=float, default=1e9, help="end each cell after this time; what it has measured is kept")
    run_parser.add_argument("--done", type=Path, nargs="*", default=[], help="result files of earlier calls")
    run_parser.add_argument("--only", type=parse_cells, help=f"run only these cells, separated by commas: {', '.join(cell.name for cell in CELLS)}")
    run_parser.add_argument("--rehearse", action="store_true", help="run on a CPU with tiny models")
    options = parser.parse_args()
    if options.command == "install":
        install_kit(options.archive)
        return 0
    if options.command == "environment":
        options.file.write_text(json.dumps(describe_environment()))
        return 0
    if options.command == "record":
        print(write_results(options.name, options.files))
        return 0
    return run_cells(options)


if __name__ == "__main__":
    sys.exit(main())
