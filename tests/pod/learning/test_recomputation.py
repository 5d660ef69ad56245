"""Losses and weights do not depend on whether a run keeps its activations or recomputes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.recomputation import RecomputationPerBatch, count_kept_layers
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.support import learning
from tests.support.learning import RunOutcome, merge_mappings, run_training
from tests.support.slices import quick_slice

pytestmark = pytest.mark.pod
ROWS = [{"text": "The quick brown fox jumps over the lazy dog. " * (1 + number % 5)} for number in range(20)]
"""Rows of five different lengths. The largest micro-batch of two rows has about five times as many tokens as the smallest."""
SPEC: dict[str, Any] = {
    "training": {"maxSteps": 5, "batchSizePerDevice": 2, "gradientAccumulationSteps": 2, "gradientCheckpointing": "enabled"},
    "evaluation": {"strategy": "steps", "steps": 2},
}  # fmt: skip
METHODS = {
    "lora": {"method": {"type": "lora"}},
    "lora with dropout": {"method": {"type": "lora", "lora": {"dropout": 0.1}}},
    "full": {"method": {"type": "full", "lora": None}},
    "full in 16 bits": {"method": {"type": "full", "lora": None}, "training": {"mixedPrecision": "bf16"}},
}
TOKEN_LIMITS = {"all recompute": 0, "some recompute": 120, "none recompute": 10**9}


class ForwardCounter:
    """Counts the forward passes of the first layer in each optimizer step.

    Each micro-batch needs one forward pass of the layer, and a second one if the layer recomputes its activations.
    """

    def __init__(self, kept_layer_tokens: int | None) -> None:
        self._kept_layer_tokens = kept_layer_tokens
        self.counts: list[int] = []

    def create_callback(self) -> Any:
        from transformers import TrainerCallback

        counter = self

        class Callback(TrainerCallback):
            def on_trainer_created(self, trainer: Any) -> None:
                trainer.kept_layer_tokens = counter._kept_layer_tokens
                base = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
                base.model.layers[0].mlp.register_forward_pre_hook(lambda module, *_: counter._count(module))

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                counter.counts.append(0)

        return Callback()

    def _count(self, module: torch.nn.Module) -> None:
        if module.training:
            self.counts[-1] += 1


def train(folder: Path, model: Path, spec: dict[str, Any], kept_layer_tokens: int | None, patch: pytest.MonkeyPatch) -> tuple[RunOutcome, list[int]]:
    counter = ForwardCounter(kept_layer_tokens)
    with patch.context() as context:
        create_callbacks = learning.RecordingHooks.create_callbacks
        context.setattr(learning.RecordingHooks, "create_callbacks", lambda *args: [*create_callbacks(*args), counter.create_callback()])
        return run_training(folder, model, spec, ROWS, validation=ROWS[:4]), counter.counts


@pytest.mark.parametrize("name", quick_slice(METHODS, ("full in 16 bits", "lora with dropout")))
def test_results_do_not_depend_on_recomputation(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = merge_mappings(SPEC, METHODS[name])
    spec_without_recomputation = merge_mappings(spec, {"training": {"gradientCheckpointing": "disabled"}})
    expected_outcome, counts = train(tmp_path / "disabled", model, spec_without_recomputation, None, monkeypatch)
    assert counts == [2] * 5
    counts_by_limit = {}
    for limit_name, limit in TOKEN_LIMITS.items():
        outcome, counts_by_limit[limit_name] = train(tmp_path / limit_name, model, spec, limit, monkeypatch)
        assert outcome.losses == expected_outcome.losses and outcome.grad_norms == expected_outcome.grad_norms
        assert outcome.eval_losses == expected_outcome.eval_losses and outcome.eval_losses
        weights = expected_outcome.model.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in outcome.model.state_dict().items())
    assert counts_by_limit["all recompute"] == [4] * 5
    assert counts_by_limit["none recompute"] == [2] * 5
    assert 2 * 5 < sum(counts_by_limit["some recompute"]) < 4 * 5


class Layer(GradientCheckpointingLayer):
    def __init__(self, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self) -> None:
        """Compute nothing, because the tests only read the layer's flag."""


@pytest.mark.parametrize(
    ("tokens", "kept_count"), [(1, 4), (10, 4), (11, 2), (13, 2), (14, 1), (20, 1), (21, 0), (40, 0), (41, 0)]
)
def test_larger_micro_batches_keep_the_activations_of_fewer_layers(tokens: int, kept_count: int) -> None:
    assert count_kept_layers(4, tokens, 40) == kept_count


def test_the_last_layers_keep_their_activations_if_only_some_layers_fit() -> None:
    model = torch.nn.ModuleList([Layer(True), Layer(False), torch.nn.Linear(1, 1), Layer(True), Layer(True)])
    recomputation = RecomputationPerBatch(model, 30)
    flags = []
    for rows, length in [(2, 5), (1, 16), (1, 11), (11, 1), (15, 1), (1, 10)]:
        recomputation.prepare({"input_ids": torch.zeros(rows, length)})
        flags.append([layer.gradient_checkpointing for layer in model if isinstance(layer, Layer)])
    all_kept, one_kept, none_kept = [False] * 4, [True, False, True, False], [True, False, True, True]
    assert flags == [all_kept, none_kept, one_kept, one_kept, one_kept, all_kept]


RANK_LIMITS = {"both recompute": (0, 0), "one rank recomputes": (0, 100), "none recomputes": (100, 100)}


def train_one_rank(rank: int, model: str, folder: str) -> None:
    """Run one of two ranks, which train with ddp once for each entry of RANK_LIMITS, and write the resulting weights."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    weights = {}
    for name, limits in RANK_LIMITS.items():
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
        net.activation_checkpointing_enable({"use_reentrant": False})
        recomputation, ddp_model = RecomputationPerBatch(net, limits[rank]), DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(rank)
        for step in range(4):
            ids = torch.randint(0, 400, (2, 8 + step), generator=generator)
            recomputation.prepare({"input_ids": ids})
            if step % 2 == 0:
                with ddp_model.no_sync():
                    ddp_model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                continue
            ddp_model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights[name] = net.state_dict()
    torch.save(weights, f"{folder}/weights-{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_weights_are_equal_if_only_one_rank_recomputes(model: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_one_rank, (str(model), str(tmp_path)), nprocs=2)
    weights_by_rank = [torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1)]
    expected_weights = weights_by_rank[0]["none recomputes"]
    for weights in (weights_by_rank[rank][name] for rank in (0, 1) for name in RANK_LIMITS):
        assert all(torch.equal(value, expected_weights[key]) for key, value in weights.items())
