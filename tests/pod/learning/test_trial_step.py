"""A preparation trains one step with a small copy of the model.

If this step fails because of a fault of the model's code, the preparation refuses the job. Other problems only cause a note.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_api.names import FailureClass
from finetune_trainer import check_run, trial_step
from finetune_trainer.channel import Channel
from finetune_trainer.inputs import Inputs
from finetune_trainer.small_copy import shrink_config
from finetune_trainer.trial_step import make_small_run, reason_against_trial_step
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.learning import make_run
from tests.support.model_with_code import write_model_with_code
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.pod
NO_STEP_NOTE = "the preparation trained no step with a small copy of the model: "
PAIRS = [{"prompt": "a question", "chosen": f"yes {number}", "rejected": f"no {number}"} for number in range(6)]
LABELLED = [{"prompt": "a question", "completion": f"yes {number}", "label": number % 2 == 0} for number in range(6)]
MODEL_CLASS_BODIES = {
    "good": "pass",
    "unknown name": "def forward(self, *args, **options):\n        return no_such_function(*args, **options)",
    "refuses an argument": "def forward(self, input_ids=None, attention_mask=None, **options):\n        if attention_mask is not None:\n"
    "            raise ValueError('masks are not supported')\n        return super().forward(input_ids=input_ids, **options)",
    "removed method": "def forward(self, *args, **options):\n        return self.no_such_method(*args, **options)",
    "needs a GPU": "def forward(self, *args, **options):\n        raise RuntimeError('no kernel for this device')",
}


def check_and_list_notes(folder: Path, model: Path, spec: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> list[str]:
    """Check the job in this process, as a preparation pod does. Returns the notes that mention the small copy."""
    run, inputs = make_run(folder, model, spec, **({"rows": rows} if rows else {}))
    channel = Channel.create_recording(folder)
    check_run.check(run, channel, inputs)
    assert channel.sent[-1]["kind"] == "checked"
    return [message["text"] for message in channel.sent if message["kind"] == "note" and "small copy" in message["text"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ({"method": {"type": "lora"}}, None), ({"method": {"type": "full"}, "training": {"optimizer": "paged_adamw_8bit"}}, None),
        ({"method": {"type": "qlora"}, "dataset": {"packing": True, "maxSequenceLength": 64}}, None),
        ({"method": {"type": "lora"}, "trainer": {"type": "dpo"}}, PAIRS), ({"method": {"type": "lora"}, "trainer": {"type": "orpo"}}, PAIRS),
        ({"method": {"type": "lora"}, "trainer": {"type": "reward"}}, PAIRS), ({"method": {"type": "lora"}, "trainer": {"type": "kto"}}, LABELLED),
        ({"method": {"type": "prefixTuning"}}, None),
    ],
    ids=["lora", "full", "qlora, packed", "dpo", "orpo", "reward", "kto", "prefix tuning"],
)  # fmt: skip
def test_a_good_job_trains_one_step(tmp_path: Path, model: Path, spec: dict[str, Any], rows: list[dict[str, Any]] | None) -> None:
    assert check_and_list_notes(tmp_path, model, spec, rows) == []
    assert not (tmp_path / "trial-step").exists()


def test_a_model_with_its_own_code_trains_one_step(tmp_path: Path) -> None:
    spec = {"model": {"trustRemoteCode": True}, "method": {"type": "lora"}}
    assert check_and_list_notes(tmp_path, write_model_with_code(tmp_path, MODEL_CLASS_BODIES["good"]), spec) == []


@pytest.mark.parametrize(
    ("body_name", "code", "location"),
    [
        ("unknown name", "ModelCodeFails", "at modeling_own.py:12: NameError: name 'no_such_function' is not defined"),
        ("removed method", "ModelCodeFails", "AttributeError: 'OwnModel' object has no attribute 'no_such_method'"),
        ("refuses an argument", "TrainingStepFails", "a model of type own cannot be trained with trainer.type sft and method.type lora: one step with a small "
         "copy fails at modeling_own.py:13: ValueError: masks are not supported. The same step works with a Llama model"),
    ],
)
def test_faults_in_the_code_of_a_model_are_refused_with_location_and_hint(tmp_path: Path, body_name: str, code: str, location: str) -> None:
    spec = {"model": {"trustRemoteCode": True}, "method": {"type": "lora"}}
    with pytest.raises(ConfigError) as caught:
        check_and_list_notes(tmp_path, write_model_with_code(tmp_path, MODEL_CLASS_BODIES[body_name]), spec)
    assert (caught.value.code, caught.value.failure_class) == (code, FailureClass.MODEL)
    assert location in caught.value.message and "prepare.strategy: never" in (caught.value.hint or "")


def test_a_model_that_cannot_compute_without_a_gpu_is_only_noted(tmp_path: Path) -> None:
    spec = {"model": {"trustRemoteCode": True}, "method": {"type": "lora"}}
    assert check_and_list_notes(tmp_path, write_model_with_code(tmp_path, MODEL_CLASS_BODIES["needs a GPU"]), spec) == [
        f"{NO_STEP_NOTE}the small copy cannot be trained (RuntimeError: no kernel for this device)"
    ]


def test_a_fault_that_also_occurs_with_a_llama_model_is_only_noted(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("this check is wrong")

    monkeypatch.setattr(trial_step, "_run_job_step", refuse)
    assert check_and_list_notes(tmp_path, model, {"method": {"type": "lora"}}) == [f"{NO_STEP_NOTE}ValueError: this check is wrong"]


def exit_at_once() -> None:
    os._exit(9)


def allocate_too_much() -> None:
    torch.ones(2**30)


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (lambda: time.sleep(600), "it did not end within 0.1 seconds"), (exit_at_once, "its process ended with exit code 9"),
        (allocate_too_much, "DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["time", "exit", "memory"],
)  # fmt: skip
def test_a_step_that_exits_or_runs_out_of_memory_does_not_end_the_preparation(action: Any, reason: str) -> None:
    assert reason in str(trial_step._run_forked(action, 0.1 if "time" in reason or "within" in reason else 60))


@pytest.mark.parametrize(
    ("spec", "inputs", "reason"),
    [
        ({}, {}, None), ({"trainer": {"type": "grpo"}}, {}, "grpo generates answers and calls rewards"),
        ({"method": {"type": "spectrum"}}, {}, "the method needs the weights of the model"),
        ({}, {"adapter": Path("a")}, "the method needs the weights of the model"),
        ({"trainer": {"type": "dpo"}, "method": {"type": "full"}}, {}, "the objective needs the weights of a reference model"),
        ({"trainer": {"type": "dpo"}}, {"reference": Path("r")}, "the objective needs the weights of a reference model"),
        ({"trainer": {"type": "dpo"}}, {}, None), ({"trainer": {"type": "orpo"}, "method": {"type": "full"}}, {}, None),
    ],
)  # fmt: skip
def test_jobs_that_need_real_weights_train_no_step(tmp_path: Path, spec: dict[str, Any], inputs: dict[str, Any], reason: str | None) -> None:
    run, default_inputs = make_run(tmp_path, tmp_path, {"method": {"type": "lora"}, **spec})
    context: Any = type("Context", (), {"run": run, "inputs": Inputs.model_validate(default_inputs.model_dump() | inputs), "vision": None})
    assert reason_against_trial_step(context) == reason
    context.vision = object()
    assert reason_against_trial_step(context) == "it is a model for images and text"


def test_the_trial_step_runs_without_gpu_options(tmp_path: Path) -> None:
    written_spec = {
        "training": {"gradientCheckpointing": "unsloth", "mixedPrecision": "bf16"}, "method": {"type": "qlora"}, "model": {"quantization": {"bits": 4}},
    }  # fmt: skip
    run, _ = make_run(tmp_path, tmp_path, written_spec)
    spec = make_small_run(run).spec
    assert (spec.training.gradient_checkpointing, spec.training.mixed_precision, spec.training.max_steps) == ("enabled", "no", 1)
    assert (spec.model.quantization, spec.model.liger_kernels, spec.checkpoint.strategy) == (None, False, "no")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "qwen3_moe", "deepseek_v3", "gemma3_text", "gpt_oss", "falcon"])
def test_small_copies_of_real_models_compute_a_forward_pass(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    settings_before, small_config = config.to_dict(), shrink_config(config)
    assert config.to_dict() == settings_before
    model = AutoModelForCausalLM.from_config(small_config, attn_implementation="eager")
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 64)
    assert (small_config.num_hidden_layers, small_config.model_type, sum(parameter.numel() for parameter in model.parameters()) < 3e6) == (2, model_type, True)


def test_small_copies_keep_the_kind_of_attention_and_of_layers() -> None:
    layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, layer_types=layer_types, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    small = shrink_config(config)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim, small.hidden_size) == (8, 2, 16, 128)
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48, "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    sizes = {"hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 131072}
    long_context_config = AutoConfig.for_model("phi3", **sizes, rope_parameters=factors)
    assert (shrink_config(long_context_config).hidden_size, shrink_config(long_context_config).num_attention_heads) == (2 * 96, 2)
