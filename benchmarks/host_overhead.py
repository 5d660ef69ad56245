"""Host overhead: the time for each micro-batch in which the host does not run the model's computation. A fast GPU would be idle in this time.

    python benchmarks/host_overhead.py --rounds 4 --steps 60

Method. A Llama with 32 layers and LoRA on all linear layers has 2,665 modules. Its width is 32, so that its arithmetic is small on a CPU. One
micro-batch makes an optimizer step. The time outside the computation is the duration of a step without five parts: collation of the batch (`dataMs`),
forward pass, backward pass, norm of the gradients, and step of the optimizer. Three programs train the same model on the same batches, one after the
other in changing order. `plain` is a loop in PyTorch that runs only these parts, and frees the gradients and the graph between them. `ours` is the
whole rank of this trainer. In `libraries`, the same rank uses the methods of transformers that iterate over all modules: `train`, `zero_grad`,
`parameters` for the gradient norm, and `num_parameters` for the number of operations. Each figure is the median over all steps of all rounds,
without the first ten steps of a run. The host overhead is this time minus the time of `plain`. The losses of `ours` and `libraries` must be
equal. The target is an overhead of 1 ms for `ours`.
"""

from __future__ import annotations

import argparse
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
WARMUP_STEPS = 10
LAYER_COUNT = 32


@dataclass
class StepTimes:
    """Durations in seconds and losses of the steps of one run."""

    total_seconds: list[float] = field(default_factory=list)
    computation_seconds: list[float] = field(default_factory=list)
    """Duration of forward pass, backward pass, gradient norm and optimizer."""
    data_seconds: list[float] = field(default_factory=list)
    """Duration of fetching and collating the batch."""
    losses: list[float] = field(default_factory=list)
    module_count: int = 0

    def remove_warmup_steps(self) -> StepTimes:
        """Remove the times of the warm-up steps, and return this object."""
        for durations in (self.total_seconds, self.computation_seconds, self.data_seconds):
            del durations[:WARMUP_STEPS]
        return self


class StepTimer:
    """Measures the duration of each part of a step. The timer implements the hooks of a rank, and creates the callback that measures."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self._computation_seconds = self._data_seconds = 0.0
        self._forward_began_at = self._step_began_at = 0.0

    def create_callbacks(self, run: Any, channel: Any, inputs: Any) -> list[Any]:
        """Return the rank's callbacks for checkpoints and reporting, followed by the callback that times the steps."""
        from finetune_trainer.checkpoint import rank
        from transformers import TrainerCallback

        timer = self

        class TimingCallback(TrainerCallback):
            def on_trainer_created(self, trainer: Any) -> None:
                trainer.accelerator.backward = timer.wrap_with_timer(trainer.accelerator.backward)
                trainer.get_batch_samples = timer.wrap_with_timer(trainer.get_batch_samples, is_data=True)

            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
                timer.times.module_count = sum(1 for _ in model.modules())
                model.register_forward_pre_hook(timer._begin_forward)
                model.register_forward_hook(timer._end_forward)
                optimizer.step = timer.wrap_with_timer(optimizer.step)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                timer.end_step()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                timer.times.losses += [logs["loss"]] if logs and "loss" in logs else []

        return [*rank.create_callbacks(run, channel, inputs), TimingCallback()]

    def get_resume_folder(self, inputs: Any) -> None:
        """Return None: the run does not resume."""

    def report_final_artefact(self, run: Any, channel: Any, model_dir: Path, kind: Any, manifest_extra: dict[str, Any]) -> None:
        """Do nothing: the artefact is not uploaded."""

    @contextmanager
    def time_gradient_norm(self) -> Iterator[None]:
        """While the context is active, add the duration of torch's function for the gradient norm to the computation."""
        import torch

        original_function = torch.nn.utils.clip_grad_norm_
        torch.nn.utils.clip_grad_norm_ = self.wrap_with_timer(original_function)
        try:
            yield
        finally:
            torch.nn.utils.clip_grad_norm_ = original_function

    def wrap_with_timer(self, function: Callable[..., Any], *, is_data: bool = False) -> Callable[..., Any]:
        """Wrap a function, so that its duration counts as computation or, with `is_data`, as fetching data."""

        def call_timed(*args: Any, **options: Any) -> Any:
            began_at = time.perf_counter()
            result = function(*args, **options)
            seconds = time.perf_counter() - began_at
            if is_data:
                self._data_seconds += seconds
            else:
                self._computation_seconds += seconds
            return result

        return call_timed

    def _begin_forward(self, *_: Any) -> None:
        self._forward_began_at = time.perf_counter()

    def _end_forward(self, *_: Any) -> None:
        self._computation_seconds += time.perf_counter() - self._forward_began_at

    def end_step(self) -> None:
        ended_at = time.perf_counter()
        if self._step_began_at:
            self.times.total_seconds.append(ended_at - self._step_began_at)
            self.times.computation_seconds.append(self._computation_seconds)
            self.times.data_seconds.append(self._data_seconds)
        self._step_began_at, self._computation_seconds, self._data_seconds = ended_at, 0.0, 0.0


@contextmanager
def use_library_methods() -> Iterator[None]:
    """While the context is active, let transformers iterate over all modules, as in a trainer without `finetune_trainer.module_walks`."""
    from finetune_trainer import engine

    @contextmanager
    def keep_library_code(model: Any) -> Iterator[None]:
        yield None

    original_collected_model = engine.collected_model
    engine.collected_model = keep_library_code  # type: ignore[assignment]  # yields None instead of the lists
    try:
        yield
    finally:
        engine.collected_model = original_collected_model


def run_plain_loop(run: Any, inputs: Any, folder: Path, step_count: int) -> StepTimes:
    """Train in a loop that calls only the model, torch and the optimizer. Returns the times of the steps after the warm-up."""
    import torch
    from finetune_trainer import train
    from finetune_trainer.channel import Channel

    timer = StepTimer()
    session = train.TrainingSession(run, Channel.create_recording(folder / "work"), inputs, timer)
    trainer, _ = session._build_trainer([])
    optimizer, model = trainer.create_optimizer(), trainer.model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(8), strict=False)]
    forward, backward, clip, step = map(timer.wrap_with_timer, (model, torch.Tensor.backward, torch.nn.utils.clip_grad_norm_, optimizer.step))
    for number in range(step_count):
        batch = batches[number % len(batches)]
        outputs = forward(**batch, use_cache=False, fused_lm_head=True)
        loss = -outputs.log_probs.sum() / outputs.label_mask.sum()
        backward(loss)
        clip(parameters, 1.0)
        step()
        del outputs, loss
        optimizer.zero_grad()
        timer.end_step()
    return timer.times.remove_warmup_steps()


def run_rank(run: Any, inputs: Any, folder: Path, *, uses_library_methods: bool) -> StepTimes:
    """Run the whole rank once. Returns the times of the steps after the warm-up."""
    from contextlib import nullcontext

    from finetune_trainer import train
    from finetune_trainer.channel import Channel

    timer = StepTimer()
    with use_library_methods() if uses_library_methods else nullcontext(), timer.time_gradient_norm():
        train.TrainingSession(run, Channel.create_recording(folder / "work"), inputs, timer).execute()
    return timer.times.remove_warmup_steps()


def measure(round_count: int, step_count: int, *, layer_count: int = LAYER_COUNT) -> dict[str, Any]:
    """Measure the three programs alternately. Errors: SystemExit if their losses differ."""
    import torch
    from trainer_overhead import suppress_warnings

    from tests.support.learning import make_run
    from tests.support.tiny import make_tiny_model

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = Path(tempfile.mkdtemp(prefix="host-overhead-"))
    model_folder = make_tiny_model(folder / "model", hidden=32, layers=layer_count)
    rows = [{"text": f"The quick brown fox jumps over the lazy dog {number}."} for number in range(64)]
    spec = {
        "method": {"type": "lora"}, "tracking": {"loggingSteps": 10},
        "training": {"maxSteps": step_count + WARMUP_STEPS + 1, "batchSizePerDevice": 1, "gradientAccumulationSteps": 1, "learningRate": 1e-4},
    }  # fmt: skip
    run, inputs = make_run(folder, model_folder, spec, rows)
    programs: dict[str, Callable[[], StepTimes]] = {
        "ours": lambda: run_rank(run, inputs, folder, uses_library_methods=False),
        "libraries": lambda: run_rank(run, inputs, folder, uses_library_methods=True),
        "plain": lambda: run_plain_loop(run, inputs, folder, step_count + WARMUP_STEPS),
    }  # fmt: skip
    results_by_program: dict[str, list[StepTimes]] = {name: [] for name in programs}
    with suppress_warnings():
        for round_number in range(round_count):
            for name in list(programs)[:: 1 if round_number % 2 == 0 else -1]:
                results_by_program[name].append(programs[name]())
    shutil.rmtree(folder)
    losses_of_runs = [times.losses for name in ("ours", "libraries") for times in results_by_program[name]]
    if any(losses != losses_of_runs[0] for losses in losses_of_runs):
        raise SystemExit(f"the losses of the runs differ: {losses_of_runs}")
    figures_by_program = {name: _summarise(runs) for name, runs in results_by_program.items()}
    overhead_by_program = {name: round(figures_by_program[name]["outsideMs"] - figures_by_program["plain"]["outsideMs"], 3) for name in ("ours", "libraries")}
    return {
        "overheadMs": overhead_by_program, **figures_by_program, "modules": results_by_program["ours"][0].module_count, "rounds": round_count,
        "stepsEach": step_count, "layers": layer_count, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _summarise(runs: list[StepTimes]) -> dict[str, float]:
    """Return the medians over all steps of all runs, in milliseconds."""
    step_durations = [step for times in runs for step in zip(times.total_seconds, times.computation_seconds, times.data_seconds, strict=True)]
    median_seconds = {
        "outsideMs": statistics.median(total - computation - data for total, computation, data in step_durations),
        "dataMs": statistics.median(data for *_, data in step_durations), "stepMs": statistics.median(total for total, *_ in step_durations),
    }  # fmt: skip
    return {name: round(1000 * seconds, 3) for name, seconds in median_seconds.items()}


def main() -> None:
    """Measure, print, and write the result unless --no-write is set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="runs of each program")
    parser.add_argument("--steps", type=int, default=60, help="measured optimizer steps of a run")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    figures = measure(options.rounds, options.steps)
    print(json.dumps(figures, indent=1))
    if not options.no_write:
        import record

        print(record.write_result("host_overhead", figures, method=record.extract_method(__doc__).replace("\n", " ")))


if __name__ == "__main__":
    main()
