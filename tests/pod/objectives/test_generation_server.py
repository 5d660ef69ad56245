"""grpo with a vLLM server: the server generates the completions of each step with the weights of that step.

`tests.support.generation_server` replaces vLLM. The trainer's client and the program that starts the server are the real ones.
`tests/unit/trainer/test_generation_server.py` tests failures of the server. `tests/pod/test_generation_resume.py` tests the attempt that follows
a failure of the server.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import FineTuneError
from finetune_trainer.channel import Channel

from tests.support.generation_server import Server, complete, start_server
from tests.support.learning import RecordingHooks, RunOutcome, make_run
from tests.support.preferences import PROMPTS
from tests.support.slices import quick_slice

pytestmark = pytest.mark.pod
Spec = dict[str, Any]
STEPS = 3


class SnapshotHooks(RecordingHooks):
    """Hooks that also record the weights at the beginning of each step. In a run with an adapter, the adapter is merged into the recorded weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[str, torch.Tensor]] = []

    def create_callbacks(self, *args: Any) -> list[Any]:
        from transformers import TrainerCallback

        weights = self.weights

        class Snapshot(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                copied_model = copy.deepcopy(model)
                weights.append((copied_model.merge_and_unload() if hasattr(copied_model, "merge_and_unload") else copied_model).state_dict())

        return [*super().create_callbacks(*args), Snapshot()]


def make_grpo_spec(method: str) -> Spec:
    return {
        "method": {"type": method, **({"lora": {"dropout": 0, "rank": 4}} if method != "full" else {})},
        "training": {"maxSteps": STEPS, "batchSizePerDevice": 16, "scheduler": "constant", "learningRate": 0.05},
        "trainer": {
            "type": "grpo", "maxCompletionLength": 6, "rewards": [{"builtin": "regex", "parameters": {"pattern": "e"}}],
            "grpo": {"numGenerations": 8, "topP": 0.9, "generation": {"backend": "vllm", "gpus": 0, "startTimeoutSeconds": 300}},
        },
    }  # fmt: skip


def train(folder: Path, model: Path, spec: Spec, server: Server) -> tuple[RunOutcome, list[Any]]:
    """Train in this process. Returns the outcome and, for each step, a model with the weights at the beginning of the step."""
    from finetune_trainer import train as trainer
    from transformers import AutoModelForCausalLM

    run, inputs = make_run(folder, model, spec, PROMPTS)
    hooks = SnapshotHooks()
    trainer.main(run.model_copy(update={"generation_url": server.url}), Channel.create_recording(folder / "work"), inputs, hooks)
    # accelerate replaces `forward` of the trained model, so a copy of that model would always compute with the final weights.
    models = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for _ in hooks.weights]
    for fresh_model, weights in zip(models, hooks.weights, strict=True):
        fresh_model.load_state_dict(weights)
    return hooks.outcome, models


def sample_completions(model: Any, request: dict[str, Any]) -> list[list[int]]:
    """Sample the completions of a recorded server request again. `model` has weights of the trainer."""
    return [complete(model, prompt, request, number)["token_ids"] for prompt in request["prompt"] for number in range(request["n"])]


def assert_unchanged_base(trained_model: Any, base: Path) -> None:
    """Check that the base weights are unchanged bit for bit, although the adapter was merged and removed for each request to the server."""
    from transformers import AutoModelForCausalLM

    base_weights = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    weights = {name.replace(".base_layer", ""): weight for name, weight in trained_model.get_base_model().named_parameters() if "lora_" not in name}
    assert weights.keys() == base_weights.keys()
    assert [name for name in base_weights if not torch.equal(weights[name], base_weights[name])] == []


@pytest.mark.parametrize("method", quick_slice(["full", "lora", "dora"], ["lora"]))
def test_each_step_generates_with_the_weights_of_the_trainer(method: str, model: Path, tmp_path: Path) -> None:
    with start_server(tmp_path / "work" / "generation", tmp_path / "record.jsonl") as server:
        outcome, models = train(tmp_path, model, make_grpo_spec(method), server)
    requests = server.generations
    assert len(requests) == len(models) == len(outcome.losses) == STEPS
    for request, step_model in zip(requests, models, strict=True):
        assert request["completions"] == sample_completions(step_model, request)
        options = {name: request[name] for name in ("n", "temperature", "top_p", "top_k", "max_tokens", "logprobs")}
        assert options == {"n": 8, "temperature": 1.0, "top_p": 0.9, "top_k": 0, "max_tokens": 6, "logprobs": 0}
    assert requests[-1]["completions"] != sample_completions(models[0], requests[-1]), "the weights have not changed the completions"
    assert len({request["seed"] for request in requests}) == STEPS
    if method != "full":
        assert_unchanged_base(outcome.model, model)


def test_a_run_without_the_address_of_its_server_is_refused(model: Path, tmp_path: Path) -> None:
    from finetune_trainer import train as trainer

    run, inputs = make_run(tmp_path, model, make_grpo_spec("full"), PROMPTS)
    with pytest.raises(FineTuneError, match="GenerationAddressMissing: trainer.grpo.generation.backend is vllm, but run.json contains no address"):
        trainer.main(run, Channel.create_recording(tmp_path / "work"), inputs, RecordingHooks())
