"""How much host memory each rank needs while a model is loaded and sharded.

    python -m benchmarks.loading_memory

Method. A pod (supervisor and four ranks of the real trainer, on this machine's CPU) trains a Llama whose weights are stored in bf16 and loaded in
32 bits (about 170 MB), as a full fine-tuning on GPUs does. Each rank samples its private memory (RssAnon) every 5 ms: bytes that no other process shares
and that the kernel cannot drop. The benchmark reports two increases over the memory before the model is loaded: `loaded`, the peak until the model is
loaded, and `peak`, the peak until the first step. Runs in which the ranks share one converted copy of the weights alternate with runs in which each rank
converts all weights. The losses of all runs with the same strategy must be equal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.lib.bench_pods import POD_PYTHONPATH, Workspace, open_workspace
from tests.pod.pod_harness import Pod, run_config

MODEL_SHAPE = {"hidden": 768, "layers": 8}
RANK_COUNT = 4
STRATEGIES: dict[str, dict[str, Any]] = {
    "fsdp": {"strategy": "fsdp"}, "zero3": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}},
}  # fmt: skip


def create_16_bit_model(workspace: Workspace) -> Path:
    """Create a copy of the model with weights in bf16. Returns its folder."""
    import torch
    from transformers import AutoModelForCausalLM

    source_folder = Path(workspace.make_spec(MODEL_SHAPE)["model"]["source"].removeprefix("file://"))
    copy_folder = source_folder.with_name(source_folder.name + "-bf16")
    shutil.copytree(source_folder, copy_folder)
    AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.bfloat16).save_pretrained(copy_folder)
    return copy_folder


def run_training(workspace: Workspace, model_folder: Path, strategy: str, loading_mode: str, round_number: int) -> list[dict[str, Any]]:
    """Train two steps. Returns the measurements of each rank, as `benchmarks.lib.measured_loading` writes them."""
    name = f"{strategy}-{loading_mode}-{round_number}"
    spec = workspace.make_spec(
        MODEL_SHAPE, method={"type": "full"}, checkpoint={"strategy": "no"}, tracking={"loggingSteps": 1}, distributed=STRATEGIES[strategy],
        training={"maxSteps": 2, "batchSizePerDevice": 1, "gradientAccumulationSteps": 1, "learningRate": 1e-4},
    ) | {"model": {"source": f"file://{model_folder}"}}  # fmt: skip
    environment = {
        "PYTHONPATH": POD_PYTHONPATH, "FINETUNE_TRAINER_MODULE": "benchmarks.lib.measured_loading", "BENCHMARK_LOADING": loading_mode,
        **workspace.credentials,
    }  # fmt: skip
    with Pod(run_config(spec, workspace.make_target(name), processes=RANK_COUNT), workspace.folder / name, environment) as pod:
        assert pod.end(580) == 0, pod.text[-3000:]
    return [json.loads((pod.folder / "work" / f"memory-{rank}.json").read_text()) for rank in range(RANK_COUNT)]


def measure_strategy(workspace: Workspace, model_folder: Path, strategy: str, round_count: int) -> dict[str, Any]:
    """Measure loading with shared and with private weights in turn. Errors: AssertionError if the losses differ."""
    measurements_by_mode: dict[str, list[dict[str, Any]]] = {"shared": [], "private": []}
    losses: set[tuple[float, ...]] = set()
    for round_number in range(round_count):
        for loading_mode in measurements_by_mode:
            rank_measurements = run_training(workspace, model_folder, strategy, loading_mode, round_number)
            measurements_by_mode[loading_mode] += rank_measurements
            losses.add(tuple(rank_measurements[0]["losses"]))
            print(f"{strategy} {loading_mode}: {[round((rank['peak'] - rank['before']) / 1e6) for rank in rank_measurements]} MB", flush=True)
    assert len(losses) == 1, f"the losses differ: {losses}"
    return {"losses": list(losses.pop())} | {
        f"{loading_mode}Megabytes": {
            name: summarize_increases([rank[name] - rank["before"] for rank in rank_measurements]) for name in ("loaded", "peak")
        }
        for loading_mode, rank_measurements in measurements_by_mode.items()
    }  # fmt: skip


def summarize_increases(increases: list[int]) -> dict[str, float]:
    """Return the median and the maximum of `increases` in megabytes; `increases` are in bytes."""
    return {"median": round(statistics.median(increases) / 1e6, 1), "most": round(max(increases) / 1e6, 1)}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with open_workspace() as workspace:
        model_folder = create_16_bit_model(workspace)
        measurements: dict[str, Any] = {
            "ranks": RANK_COUNT, "rounds": options.rounds, "fileBytes": sum(file.stat().st_size for file in model_folder.glob("*.safetensors")),
        }  # fmt: skip
        for strategy in options.strategies.split(","):
            measurements[strategy] = measure_strategy(workspace, model_folder, strategy, options.rounds)
    print(json.dumps(measurements, indent=1))
    print(record.write_result("loading_memory", measurements, method=record.extract_method(__doc__)))


if __name__ == "__main__":
    main()
