"""The decision whether a run uses Liger's kernels. `tests/gpu/test_kernels.py` tests the kernels themselves, which need a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.errors import ConfigError, InternalError

from tests.support.learning import make_run

pytestmark = pytest.mark.pod
UNSLOTH = {"trainer": {"backend": "unsloth"}}
REQUESTED, TURNED_OFF = {"model": {"ligerKernels": True}}, {"model": {"ligerKernels": False}}
CHOSEN, NOT_CHOSEN = (True, []), (False, [])
NOT_TESTED_NOTE = "model.ligerKernels is off: this release was not tested with Liger's kernels for models of type {}"
NO_KERNELS_NOTE = "model.ligerKernels is off: Liger has no kernels for models of type rwkv"
OTHER_ACTIVATION_MESSAGE = "Liger's kernel for models of type llama does not compute the model's activation relu"


@pytest.fixture
def working_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the trainer's test run of a kernel, which needs a GPU, as if the kernels worked."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is only published for x86-64")
    from finetune_trainer import kernels

    monkeypatch.setattr(kernels, "_run_test_kernel", lambda hardware: None)


def choose_liger(
    folder: Path, spec: dict[str, Any], config: dict[str, Any] | None = None, *, device: str = "cuda", kind: str = "causal",
    recorded_defaults: dict[str, Any] | None = None,
) -> tuple[bool, list[str]]:  # fmt: skip
    """Return whether the run uses Liger's kernels, and the notes for the status. `recorded_defaults` contains the defaults of the job's first attempt."""
    import torch
    from finetune_api.defaults import ResolvedSpec, keep_recorded_defaults
    from finetune_trainer.arguments import MemorySavers
    from finetune_trainer.hardware import Hardware
    from finetune_trainer.kernels import choose_kernels

    run, _ = make_run(folder, Path("/models/tiny"), {"resources": {"gpusPerNode": 1}, **spec})
    kept_spec = keep_recorded_defaults(ResolvedSpec(run.spec, {path: run.spec.value(path) for path in run.defaults}), recorded_defaults or {})
    run = run.model_copy(update={"spec": kept_spec.spec, "defaults": sorted(kept_spec.defaults)})
    hardware = Hardware(torch.device(device), f"the {device} device", torch.bfloat16, True, False, "sdpa")
    args = SimpleNamespace(use_liger_kernel=MemorySavers.choose(run, hardware).uses_liger)
    notes = choose_kernels(args, run, hardware, SimpleNamespace(**{"model_type": "llama", "hidden_act": "silu", **(config or {})}), kind)
    return args.use_liger_kernel, notes


CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[bool, list[str]]]] = {
    "no value": ({}, {}, CHOSEN),
    "false": (TURNED_OFF, {}, NOT_CHOSEN),
    "true": (REQUESTED, {}, CHOSEN),
    "backend unsloth": (UNSLOTH, {}, CHOSEN),
    "backend unsloth, false": ({**UNSLOTH, **TURNED_OFF}, {}, NOT_CHOSEN),
    "recorded false": ({}, {"recorded_defaults": {"model.ligerKernels": False}}, NOT_CHOSEN),
    "recorded false, backend unsloth": (UNSLOTH, {"recorded_defaults": {"model.ligerKernels": False}}, CHOSEN),
    "cpu": ({}, {"device": "cpu"}, NOT_CHOSEN),
    "mps": ({}, {"device": "mps"}, NOT_CHOSEN),
    "unknown type": ({}, {"config": {"model_type": "rwkv"}}, (False, [NO_KERNELS_NOTE])),
    "unknown type, backend unsloth": (UNSLOTH, {"config": {"model_type": "rwkv"}}, (False, [NO_KERNELS_NOTE])),
    "mixture of experts": ({}, {"config": {"model_type": "mixtral"}}, (False, [NOT_TESTED_NOTE.format("mixtral")])),
    "mixture of experts, true": (REQUESTED, {"config": {"model_type": "mixtral"}}, CHOSEN),
    "images": ({}, {"config": {"model_type": "gemma3"}}, (False, [NOT_TESTED_NOTE.format("gemma3")])),
    "other activation": ({}, {"config": {"hidden_act": "relu"}}, (False, [f"model.ligerKernels is off: {OTHER_ACTIVATION_MESSAGE}"])),
    "reward model": ({}, {"kind": "reward"}, CHOSEN),
    "gemma3": ({}, {"config": {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}}, CHOSEN),
    "gemma3 as a reward model": (
        {}, {"config": {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}, "kind": "reward"},
        (False, ["model.ligerKernels is off: Liger has no kernels for reward models of type gemma3_text"]),
    ),
    "code of the model": (
        {"model": {"trustRemoteCode": True}}, {"config": {"auto_map": {"AutoModelForCausalLM": "code.Model"}}},
        (False, ["model.ligerKernels is off: the model runs code from its repository (model.trustRemoteCode)"]),
    ),
    "ZeRO stage 2": ({"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}}}, {}, CHOSEN),
    "ZeRO stage 3": ({"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}}}, {}, CHOSEN),
    "unused code of the model": ({}, {"config": {"auto_map": {"AutoModelForCausalLM": "code.Model"}}}, CHOSEN),
}  # fmt: skip
"""For each case: the spec, the options of `choose_liger`, and its expected result."""


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.usefixtures("working_kernels")
def test_spec_and_run_decide_whether_kernels_are_used(name: str, tmp_path: Path) -> None:
    spec, options, expected_choice = CHOICES[name]
    assert choose_liger(tmp_path, spec, **options) == expected_choice


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "cpu": ({"device": "cpu"}, "model.ligerKernels is true, but the run trains on cpu, and Liger's kernels need a CUDA GPU"),
    "mps": ({"device": "mps"}, "model.ligerKernels is true, but the run trains on mps, and Liger's kernels need a CUDA GPU"),
    "unknown type": ({"config": {"model_type": "rwkv"}}, "model.ligerKernels is true, but Liger has no kernels for models of type rwkv"),
    "gemma3 as a reward model": ({"config": {"model_type": "gemma3_text"}, "kind": "reward"}, "Liger has no kernels for reward models"),
    "other activation": ({"config": {"hidden_act": "relu"}}, OTHER_ACTIVATION_MESSAGE),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.usefixtures("working_kernels")
def test_requested_kernels_that_the_run_cannot_use_are_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSALS[name]
    with pytest.raises(ConfigError) as caught:
        choose_liger(tmp_path, REQUESTED, **options)
    assert caught.value.code == "KernelsUnavailable" and message in caught.value.message
    assert caught.value.hint == "remove ligerKernels, or write `ligerKernels: false`"


@pytest.mark.parametrize("missing_part", ["package", "compiler", "library"])
def test_kernels_that_cannot_run_are_refused_or_turned_off(missing_part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The case `compiler` stands for a GPU machine without a C compiler, on which Triton fails. In this test, Triton fails because there is no GPU."""
    import torch
    from finetune_trainer import kernels

    if missing_part == "package":
        monkeypatch.setattr(kernels, "find_spec", lambda name: None)
        reason = "liger-kernel is not installed in this image"
    elif missing_part == "library":
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
        reason = "liger-kernel cannot be imported: "
    else:
        if torch.cuda.is_available():
            pytest.skip("the kernels run on this machine")
        reason = "Liger's kernels do not run on the cuda device: "
    if missing_part != "package":
        pytest.importorskip("liger_kernel", reason="liger-kernel is only published for x86-64")
    is_on, notes = choose_liger(tmp_path, {})
    assert not is_on and len(notes) == 1 and notes[0].startswith(f"model.ligerKernels is off: {reason}")
    with pytest.raises(ConfigError, match="KernelsUnavailable") as caught:
        choose_liger(tmp_path, REQUESTED)
    assert reason in caught.value.message


def test_liger_knows_every_type_of_model_for_which_kernels_are_chosen() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is only published for x86-64")
    from finetune_trainer.kernels import ACTIVATIONS, COMPARED_MODEL_TYPES, MODEL_TYPES_WITHOUT_REWARD_KERNELS
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    assert set(MODEL_TYPE_TO_APPLY_LIGER_FN) >= COMPARED_MODEL_TYPES == set(ACTIVATIONS)
    assert COMPARED_MODEL_TYPES > MODEL_TYPES_WITHOUT_REWARD_KERNELS


@pytest.mark.parametrize(
    ("spec", "is_active", "expected_notes_or_code"),
    [
        ({}, True, ["model.ligerKernels is on: the run uses a GPU, and Liger has kernels for models of type llama (model.ligerKernels: false turns them off)"]),
        ({}, False, ["model.ligerKernels is off: Liger replaced no layer of FakeModel"]),
        (UNSLOTH, False, ["model.ligerKernels is off: Liger replaced no layer of FakeModel"]),
        (REQUESTED, True, []),
        (REQUESTED, False, "KernelsNotActive"),
    ],
)
def test_inactive_kernels_end_the_run_only_if_the_spec_requests_kernels(
    spec: dict[str, Any], is_active: bool, expected_notes_or_code: list[str] | str, tmp_path: Path
) -> None:
    import torch
    from finetune_trainer.active_features import verify_kernels

    class FakeModel(torch.nn.Linear):
        config = SimpleNamespace(model_type="llama")

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input

    FakeModel.forward.__module__ = "liger_kernel.transformers.rms_norm" if is_active else __name__
    run, _ = make_run(tmp_path, Path("/models/tiny"), spec)
    if isinstance(expected_notes_or_code, str):
        with pytest.raises(InternalError, match=expected_notes_or_code):
            verify_kernels(FakeModel(1, 1), run)
    else:
        assert verify_kernels(FakeModel(1, 1), run) == expected_notes_or_code


MODEL_SCRIPT = """
import sys, torch
from finetune_trainer.kernels import COMPARED_MODEL_TYPES, LIGER_OPTIONS, MODEL_TYPES_WITHOUT_REWARD_KERNELS
from tests.support.kernels import make_model, uses_kernels
from transformers.integrations.liger import apply_liger_kernel

cross_entropy = torch.nn.functional.cross_entropy
for kind in ("causal", "reward"):
    for model_type in sorted(COMPARED_MODEL_TYPES - (MODEL_TYPES_WITHOUT_REWARD_KERNELS if kind == "reward" else set())):
        with torch.device("meta"):
            model = make_model(model_type, kind)
        if model is None:
            continue
        assert kind == "reward" or not uses_kernels(model)  # Liger also replaces classes of transformers
        apply_liger_kernel(model, LIGER_OPTIONS)
        assert uses_kernels(model), (model_type, kind)
        assert model.forward.__func__ is type(model).forward, (model_type, kind)
assert torch.nn.functional.cross_entropy is cross_entropy
print("compared")
"""


@pytest.mark.slow
def test_liger_replaces_layers_of_every_chosen_type_but_not_its_forward_pass_and_loss() -> None:
    """Liger must not replace the model's forward pass: Liger's forward pass needs a language-model head, which a reward model lacks."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is only published for x86-64")
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", MODEL_SCRIPT], cwd=root, capture_output=True, text=True, check=False)
    # Libraries can print warnings first, so only the last word of the output is compared.
    assert result.stdout.split()[-1:] == ["compared"], result.stderr[-2000:]
