"""A micro-batch neither walks over all modules nor copies a tensor from the GPU to read it.

The results of a run are the same as with the libraries' own code, which does both.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer import engine, module_walks
from finetune_trainer.objective import reference_model

from tests.support import learning
from tests.support.host_work import HostWork, count_host_work
from tests.support.learning import TEN_ROWS, RunOutcome, merge_mappings, run_training
from tests.support.preferences import LABELLED_ANSWERS, PREFERENCE_PAIRS

pytestmark = pytest.mark.pod
FOUR_STEPS: dict[str, Any] = {
    "training": {"maxSteps": 4, "batchSizePerDevice": 1, "gradientAccumulationSteps": 2, "gradientCheckpointing": "enabled"},
    "tracking": {"loggingSteps": 100, "logFirstStep": False},
}  # fmt: skip
LORA_SPEC: dict[str, Any] = {"method": {"type": "lora", "lora": {"dropout": 0.1}}}
FULL_SPEC: dict[str, Any] = {"method": {"type": "full", "lora": None}}
DPO_SPEC: dict[str, Any] = {"trainer": {"type": "dpo"}}
KTO_SPEC: dict[str, Any] = {"trainer": {"type": "kto"}, "training": {"batchSizePerDevice": 2}}
RUNS = [
    pytest.param([LORA_SPEC], TEN_ROWS, id="sft-lora"),
    pytest.param([FULL_SPEC], TEN_ROWS, id="sft-full"),
    pytest.param([LORA_SPEC, DPO_SPEC], PREFERENCE_PAIRS * 4, id="dpo-lora"),
    pytest.param([FULL_SPEC, DPO_SPEC], PREFERENCE_PAIRS * 4, id="dpo-full"),
    pytest.param([LORA_SPEC, KTO_SPEC], LABELLED_ANSWERS * 4, id="kto-lora"),
]


SLOW_COMPARISONS = ("dpo-full", "kto-lora")


def mark_slow(case: Any) -> Any:
    """Return a test case that runs only with `make test-faults`."""
    return pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)


def merge_specs(*specs: dict[str, Any]) -> dict[str, Any]:
    """Merge specs. A later spec overrides the fields of an earlier one."""
    merged_spec: dict[str, Any] = {}
    for spec in specs:
        merged_spec = merge_mappings(merged_spec, spec)
    return merged_spec


def train_and_count_work(folder: Path, model: Path, spec: dict[str, Any], rows: list[Any], patch: pytest.MonkeyPatch) -> list[HostWork]:
    """Train, and count the host work of each optimizer step, but not the work of the callbacks after the step."""
    from transformers import TrainerCallback

    steps: list[HostWork] = []
    with count_host_work() as work_so_far:

        class StepRecorder(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                work_so_far.visited_modules.clear()
                work_so_far.tensor_reads.clear()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                steps.append(HostWork())
                steps[-1].visited_modules.update(work_so_far.visited_modules)
                steps[-1].tensor_reads.update(work_so_far.tensor_reads)

        create_callbacks = learning.RecordingHooks.create_callbacks
        patch.setattr(learning.RecordingHooks, "create_callbacks", lambda *args: [*create_callbacks(*args), StepRecorder()])
        run_training(folder, model, spec, rows)
    return steps


@pytest.mark.parametrize(("specs", "rows"), RUNS)
def test_no_step_after_the_first_walks_over_the_modules(
    specs: list[dict[str, Any]], rows: list[Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first step may walk over the modules, because it searches for the adapter layers of the reference model."""
    steps = train_and_count_work(tmp_path, model, merge_specs(FOUR_STEPS, *specs), rows, monkeypatch)
    assert len(steps) == 4
    assert [dict(step.visited_modules) for step in steps[1:]] == [{}, {}, {}]


@pytest.mark.parametrize("method", [LORA_SPEC, FULL_SPEC], ids=["lora", "full"])
def test_only_the_padding_mask_is_read_between_log_lines(
    method: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sdpa, transformers reads the mask of a padded batch. Runs on a GPU need no mask (decision 0079)."""
    steps = train_and_count_work(tmp_path, model, merge_specs(FOUR_STEPS, method), TEN_ROWS, monkeypatch)
    readers = {caller for step in steps for caller in step.tensor_reads}
    assert readers <= {"transformers/masking_utils.py:_ignore_causal_mask_sdpa"}


def test_dpo_reads_tensors_only_for_the_metrics_of_trl(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reads the tensor of each metric in each micro-batch. The trainer of this project reads no further tensors."""
    steps = train_and_count_work(tmp_path, model, merge_specs(FOUR_STEPS, LORA_SPEC, DPO_SPEC), PREFERENCE_PAIRS * 4, monkeypatch)
    readers = {caller for step in steps for caller in step.tensor_reads}
    assert readers <= {"transformers/masking_utils.py:_ignore_causal_mask_sdpa", "trainer/dpo_trainer.py:_compute_loss"}


@contextmanager
def _keep_library_code(*_: Any) -> Any:
    yield None


def use_library_methods(patch: pytest.MonkeyPatch) -> None:
    """Let transformers and TRL walk over the modules, as without `module_walks` and `cheap_reference_passes`."""
    patch.setattr(engine, "collected_model", _keep_library_code)
    patch.setattr(reference_model, "cheap_reference_passes", _keep_library_code)


def collect_results(outcome: RunOutcome) -> tuple[Any, ...]:
    """Return those results of a run that must be the same in two equal runs."""
    times = ("_runtime", "_per_second", "_share", "_time", "_seconds")
    lines = [{key: value for key, value in line.items() if not key.endswith(times)} for line in outcome.logs]
    return [{key: value for key, value in line.items() if key != "train_runtime"} for line in lines], outcome.model.state_dict()


@pytest.mark.parametrize(("specs", "rows"), [mark_slow(case) if case.id in SLOW_COMPARISONS else case for case in RUNS])
def test_results_equal_those_of_the_libraries(
    specs: list[dict[str, Any]], rows: list[Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout and an evaluation after every second step, results would differ if the model were in the wrong mode (training or evaluation)."""
    spec = merge_specs(FOUR_STEPS, *specs, {"training": {"maxSteps": 6}, "tracking": {"loggingSteps": 1}, "evaluation": {"strategy": "steps", "steps": 2}})
    our_outcome = run_training(tmp_path / "ours", model, spec, rows, validation=rows[:4])
    use_library_methods(monkeypatch)
    library_outcome = run_training(tmp_path / "theirs", model, spec, rows, validation=rows[:4])
    (our_lines, our_weights), (library_lines, library_weights) = collect_results(our_outcome), collect_results(library_outcome)
    assert our_lines == library_lines
    assert any("total_flos" in line for line in our_lines)
    assert len(our_outcome.losses) == 6 and len(our_outcome.eval_losses) == 3
    assert list(our_weights) == list(library_weights)
    assert all(torch.equal(our_weights[name], weight) for name, weight in library_weights.items())


def test_a_reference_pass_keeps_the_choice_of_checkpointed_layers(model: Path, tmp_path: Path) -> None:
    """After each reference pass, TRL itself would turn on checkpointing for every layer and add a hook to the embedding."""
    spec = merge_specs(FOUR_STEPS, LORA_SPEC, DPO_SPEC, {"training": {"checkpointEveryNLayers": 2}})
    outcome = run_training(tmp_path, model, spec, PREFERENCE_PAIRS * 4)
    layers = outcome.model.get_base_model().model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    hooks_after_4_steps = len(outcome.model.get_input_embeddings()._forward_hooks)
    longer_outcome = run_training(tmp_path / "longer", model, merge_specs(spec, {"training": {"maxSteps": 6}}), PREFERENCE_PAIRS * 4)
    assert len(longer_outcome.model.get_input_embeddings()._forward_hooks) == hooks_after_4_steps


# ---- the context manager `module_walks`


def make_small_model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))


def test_a_single_module_in_evaluation_mode_is_set_to_training_mode() -> None:
    net = make_small_model()
    with module_walks.collected_model(net):
        net[1].eval()
        assert net.train() is net
        assert net[1].training
        net.eval()
        assert not any(module.training for module in net.modules())
        net.train(True)
        assert all(module.training for module in net.modules())


def test_the_methods_of_the_class_are_restored_after_the_context() -> None:
    net = make_small_model()
    with module_walks.collected_model(net):
        assert {"train", "zero_grad"} <= set(vars(net))
    assert not {"train", "zero_grad"} & set(vars(net))


def test_gradients_are_removed_or_set_to_zero() -> None:
    net = make_small_model()
    net[0].bias.requires_grad_(False)
    with module_walks.collected_model(net) as collected_model:
        assert [id(parameter) for parameter in collected_model.trained_parameters] == [id(net[0].weight)]
        net[0].weight.grad = torch.ones(2, 2)
        net.zero_grad(set_to_none=False)
        assert net[0].weight.grad.tolist() == [[0, 0], [0, 0]]
        net.zero_grad()
        assert net[0].weight.grad is None


def test_methods_that_a_subclass_overrides_are_not_replaced() -> None:
    class Frozen(torch.nn.Linear):
        def train(self, mode: bool = True) -> Any:
            return super().train(False)

    class Engine(torch.nn.Sequential):
        def zero_grad(self, set_to_none: bool = True) -> None:
            raise NotImplementedError

    net = Engine(Frozen(2, 2))
    with module_walks.collected_model(net):
        assert not {"train", "zero_grad"} & set(vars(net))
