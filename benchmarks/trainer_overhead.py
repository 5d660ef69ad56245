"""Overhead of this trainer compared with a plain TRL script with the same arguments, data and order.

    python benchmarks/trainer_overhead.py --rounds 6 --steps 300

Method. Both programs train the same model with random weights on the same token sequences in the same order, in one process. The runs alternate
(ours, bare, bare, ours, ...), so that a change of the machine's speed affects both. `ours` is the whole rank: guards, reporting to a
supervisor's channel, metrics, verification. `bare` is TRL's SFTTrainer with the same arguments and nothing else. Two durations are measured.
`step` is the training loop, from the start of the first step to the end of the last step. `run` is the whole run, from reading the tokenizer
to the saved model. Each ratio is the median of ours / bare over pairs of consecutive runs. The losses of both programs must agree at every
logged step, which shows that both do the same work. The first pair is not counted, because it includes the imports and the tokenization.
Later runs read the tokens from disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
LOSS_TOLERANCE = 1e-6


@dataclass
class RunMeasurements:
    """Measurements of one run: seconds of the training loop and of the whole run, losses, and the shares of time spent on waiting for data."""

    loop_seconds: float = 0.0
    run_seconds: float = 0.0
    losses: dict[int, float] = field(default_factory=dict)
    """Losses by step. This trainer logs the loss of the last step, which the plain TRL script does not log."""
    data_wait_shares: list[float] = field(default_factory=list)
    began_at: float = 0.0


def make_timing_callback(measurements: RunMeasurements) -> Any:
    """Create a callback that times the training loop and records the losses."""
    from transformers import TrainerCallback

    class TimingCallback(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not measurements.began_at:
                measurements.began_at = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            measurements.loop_seconds = time.perf_counter() - measurements.began_at

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                measurements.losses[state.global_step] = logs["loss"]
                measurements.data_wait_shares += [logs["data_wait_share"]] if "data_wait_share" in logs else []

    return TimingCallback()


class MeasuringHooks:
    """The hooks of a rank that runs without a supervisor. These hooks add the callback that measures the run."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    def create_callbacks(self, run: Any, channel: Any, inputs: Any) -> list[Any]:
        """Return the rank's callbacks for checkpoints and reporting, followed by the measuring callback."""
        from finetune_trainer.checkpoint import rank

        return [*rank.create_callbacks(run, channel, inputs), self._callback]

    def get_resume_folder(self, inputs: Any) -> None:
        """Return None: the run does not resume."""

    def report_final_artefact(self, run: Any, channel: Any, model_dir: Path, kind: Any, manifest_extra: dict[str, Any]) -> None:
        """Do nothing: the artefact is not uploaded."""


Program = Callable[[Any, Any, Path], RunMeasurements]


def run_our_trainer(run: Any, trainer_inputs: Any, folder: Path) -> RunMeasurements:
    """Run this trainer once and return its measurements."""
    from finetune_trainer import train
    from finetune_trainer.channel import Channel

    measurements = RunMeasurements()
    channel = Channel.create_recording(folder / "work")
    train.TrainingSession(run, channel, trainer_inputs, MeasuringHooks(make_timing_callback(measurements))).execute()
    return measurements


def run_plain_trl(run: Any, inputs: Any, folder: Path) -> RunMeasurements:
    """Run a plain TRL script once with the arguments and tokens of this trainer, and return its measurements."""
    from finetune_trainer.arguments import shared_arguments
    from finetune_trainer.data.prepare import open_split
    from finetune_trainer.data.prepared import open_prepared
    from finetune_trainer.distributed import DistributedStrategy
    from finetune_trainer.hardware import detect_hardware
    from finetune_trainer.model import quantization_config
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    measurements = RunMeasurements()
    hardware, dataset_spec = detect_hardware(run, 0), run.spec.dataset
    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    model = AutoModelForCausalLM.from_pretrained(
        inputs.model, dtype=hardware.dtype, attn_implementation="sdpa", quantization_config=quantization_config(run, hardware),
        device_map=None if hardware.is_cpu else {"": str(hardware.device)},
    )  # fmt: skip
    if run.spec.method.type != "full":
        lora_settings = run.spec.method.lora
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora_settings.rank,
                lora_alpha=lora_settings.alpha,
                lora_dropout=lora_settings.dropout,
                target_modules="all-linear",
            ),
        )
    (tokens_folder,) = (folder / "work" / "tokens").iterdir()
    sft_config = SFTConfig(
        **shared_arguments(run, inputs, hardware, DistributedStrategy(run, hardware, 1), has_validation_data=False),
        dataset_kwargs={"skip_prepare_dataset": True}, packing=dataset_spec.packing is True,
        max_length=dataset_spec.max_sequence_length if dataset_spec.packing else None,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=sft_config,
        train_dataset=open_split(open_prepared(tokens_folder), "train"),
        processing_class=tokenizer,
        callbacks=[make_timing_callback(measurements)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(folder / "bare"))
    return measurements


def time_program(program: Program, run: Any, inputs: Any, folder: Path) -> RunMeasurements:
    """Run a program once. The measurements also contain the duration of the whole run."""
    gc.collect()
    began_at = time.perf_counter()
    measurements = program(run, inputs, folder)
    measurements.run_seconds = time.perf_counter() - began_at
    return measurements


def measure_pairs(
    round_count: int, step_count: int, *, hidden_size: int, layer_count: int, sequence_length: int, batch_size: int, method: str
) -> dict[str, Any]:
    """Run both programs alternately and return the ratios of their durations. Errors: SystemExit if the losses of a pair differ."""
    import torch

    from tests.support.learning import make_run
    from tests.support.tiny import make_tiny_model

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = Path(tempfile.mkdtemp(prefix="trainer-overhead-"))
    model_folder = make_tiny_model(folder / "model", hidden=hidden_size, layers=layer_count, positions=max(512, sequence_length))
    rows = [
        {"text": "The quick brown fox jumps over the lazy dog. " * (1 + (7 * row_number) % (sequence_length // 12))} for row_number in range(64)
    ]
    spec = {
        "method": {"type": method}, "dataset": {"maxSequenceLength": sequence_length}, "tracking": {"loggingSteps": 10},
        "training": {"maxSteps": step_count, "batchSizePerDevice": batch_size, "gradientAccumulationSteps": 1, "learningRate": 1e-4},
    }  # fmt: skip
    run, inputs = make_run(folder, model_folder, spec, rows)
    run_pairs: list[tuple[RunMeasurements, RunMeasurements]] = []
    with suppress_warnings():
        for round_number in range(round_count + 1):
            program_order: tuple[Program, Program] = (run_our_trainer, run_plain_trl) if round_number % 2 == 0 else (run_plain_trl, run_our_trainer)
            measurements_by_program = {program: time_program(program, run, inputs, folder) for program in program_order}
            our_run, plain_run = measurements_by_program[run_our_trainer], measurements_by_program[run_plain_trl]
            if any(abs(our_run.losses[step] - loss) > LOSS_TOLERANCE for step, loss in plain_run.losses.items()):
                raise SystemExit(f"the losses of the two trainings differ: {our_run.losses} and {plain_run.losses}")
            run_pairs += [(our_run, plain_run)] if round_number else []
    shutil.rmtree(folder)
    return {
        "step": _compute_ratios([(our_run.loop_seconds, plain_run.loop_seconds) for our_run, plain_run in run_pairs]) | {
            "oursMs": round(1000 * statistics.median(our_run.loop_seconds for our_run, _ in run_pairs) / step_count, 2),
            "bareMs": round(1000 * statistics.median(plain_run.loop_seconds for _, plain_run in run_pairs) / step_count, 2),
        },
        "run": _compute_ratios([(our_run.run_seconds, plain_run.run_seconds) for our_run, plain_run in run_pairs]) | {
            "oursSeconds": round(statistics.median(our_run.run_seconds for our_run, _ in run_pairs), 2),
            "bareSeconds": round(statistics.median(plain_run.run_seconds for _, plain_run in run_pairs), 2),
        },
        "dataWaitShare": round(statistics.median([share for our_run, _ in run_pairs for share in our_run.data_wait_shares] or [0.0]), 5),
        "runs": round_count, "stepsEach": step_count, "method": method, "hidden": hidden_size, "layers": layer_count, "length": sequence_length,
        "batch": batch_size, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _compute_ratios(duration_pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the ratio of this trainer's duration to that of the plain TRL script for each pair of runs, and the median of these ratios."""
    ratios = [our_duration / plain_duration for our_duration, plain_duration in duration_pairs]
    return {"ratio": round(statistics.median(ratios), 4), "ratios": [round(ratio, 4) for ratio in ratios]}


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Suppress warnings of the libraries while the context is active."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Measure, print, and write the result unless --no-write is set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="measured pairs of runs")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--method", choices=["full", "lora"], default="lora")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    figures = measure_pairs(
        options.rounds,
        options.steps,
        hidden_size=options.hidden,
        layer_count=options.layers,
        sequence_length=options.length,
        batch_size=options.batch,
        method=options.method,
    )
    print(json.dumps(figures, indent=1))
    if not options.no_write:
        import record

        print(
            record.write_result(
                "trainer_overhead", figures, method=record.extract_method(__doc__).replace("\n", " ")
            )
        )


if __name__ == "__main__":
    main()
