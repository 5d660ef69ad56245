"""For every method and objective, plain transformers and PEFT compute from the stored artefact what the trainer computed in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind
from finetune_api.status import ArtefactVerification, VerificationOutcome
from finetune_trainer.channel import Channel
from finetune_trainer.inputs import Inputs
from finetune_trainer.stages.verify import Artefact, Verifier
from finetune_trainer.verification.reference import FILE_NAME, ReferenceValues

from tests.support.learning import TEN_ROWS, RunOutcome, make_run, merge_mappings, train_here
from tests.support.preferences import LABELLED_ANSWERS, PREFERENCE_PAIRS, PROMPTS

pytestmark = pytest.mark.pod
BASE_SPEC: dict[str, Any] = {"output": {"verify": True}, "training": {"learningRate": 1e-2, "maxSteps": 4}, "method": {"lora": {"dropout": 0}}}
NO_LORA: dict[str, Any] = {"lora": None}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"method": {"lora": {"rankStabilized": True}}},
    "pissa": {"method": {"lora": {"init": "pissa", "rank": 8}}},
    "olora": {"method": {"lora": {"init": "olora", "rank": 8}}},
    "eva": {"method": {"lora": {"init": "eva", "rank": 8}}},
    "bias": {"method": {"lora": {"bias": "all"}}, "model": {"source": "attention bias"}},
    "saved modules": {"method": {"lora": {"modulesToSave": ["lm_head"]}}},
    "embeddings": {"method": {"lora": {"targetModules": ["q_proj", "embed_tokens"]}}},
    "dora": {"method": {"type": "dora"}},
    "qlora": {"method": {"type": "qlora"}},
    "8 bits": {"model": {"quantization": {"bits": 8}}},
    "loftq": {"method": {"lora": {"init": "loftq"}}},
    "ia3": {"method": {"type": "ia3", **NO_LORA}},
    "prefix tuning": {"method": {"type": "prefixTuning", **NO_LORA}},
    "prompt tuning": {"method": {"type": "promptTuning", **NO_LORA}},
    "full": {"method": {"type": "full", **NO_LORA}},
    "spectrum": {"method": {"type": "spectrum", **NO_LORA}},
    "new tokens": {"model": {"newTokens": ["<yes>"]}},
    "new tokens full": {"model": {"newTokens": ["<yes>"]}, "method": {"type": "full", **NO_LORA}},
    "bf16": {"training": {"mixedPrecision": "bf16"}},
    "bf16 full": {"training": {"mixedPrecision": "bf16"}, "method": {"type": "full", **NO_LORA}},
    "bf16 weights": {"training": {"mixedPrecision": "bf16"}, "model": {"dtype": "bfloat16"}},
    "packed": {"dataset": {"packing": True, "maxSequenceLength": 128}},
}
LENGTH_REWARD = {"builtin": "length", "parameters": {"unit": "tokens", "minimum": "8"}}
OBJECTIVES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "dpo": ({"trainer": {"type": "dpo"}}, PREFERENCE_PAIRS),
    "orpo": ({"trainer": {"type": "orpo"}}, PREFERENCE_PAIRS),
    "kto": ({"trainer": {"type": "kto"}}, LABELLED_ANSWERS),
    "reward": ({"trainer": {"type": "reward"}}, PREFERENCE_PAIRS),
    "reward full": ({"trainer": {"type": "reward"}, "method": {"type": "full", **NO_LORA}}, PREFERENCE_PAIRS),
    "grpo": ({"trainer": {"type": "grpo", "grpo": {"numGenerations": 2}, "maxCompletionLength": 8, "rewards": [LENGTH_REWARD]}}, PROMPTS),
}  # fmt: skip
SLOW_RUNS = ("embeddings", "rslora", "olora", "eva", "bias", "8 bits", "loftq", "bf16 full", "new tokens full", "packed", "orpo", "reward full")


def mark_slow(names: Iterable[str]) -> list[Any]:
    """Return the names as test parameters. The names in SLOW_RUNS are marked as slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_RUNS else []) for name in names]


def train_and_verify(folder: Path, model: Path, spec: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[ArtefactVerification, ReferenceValues]:
    """Train in this process, and verify the stored artefact. Returns the verification and the trainer's reference values."""
    if spec.get("model", {}).get("source") == "attention bias":
        from tests.support.tiny import make_tiny_model

        model = make_tiny_model(folder / "model", attention_bias=True)
        spec = merge_mappings(spec, {"model": {"source": f"file://{model}"}})
    run, inputs = make_run(folder, model, merge_mappings(BASE_SPEC, spec), rows)
    outcome: RunOutcome = train_here(run, inputs)
    assert outcome.folder is not None and outcome.kind is not None
    reference = ReferenceValues.model_validate_json((inputs.output_dir / FILE_NAME).read_text())
    assert reference.reason is None
    return verify(run, folder, inputs, reference, outcome), reference


def verify(run: RunConfig, folder: Path, inputs: Inputs, reference: ReferenceValues, outcome: RunOutcome) -> ArtefactVerification:
    """Verify the artefact of `outcome` with the settings of the job `run`. Another job than `run` may have trained the artefact."""
    assert outcome.folder is not None and outcome.kind is not None
    verifier = Verifier(run, Channel.create_recording(folder / "work"), inputs, reference)
    (result,) = verifier.verify([Artefact(outcome.kind, outcome.folder, OutputKind(outcome.kind))])
    return result


@pytest.mark.parametrize("name", ["qlora", "new tokens"])
def test_a_job_without_the_training_settings_verifies_the_artefact_as_it_was_trained(name: str, model: Path, tmp_path: Path) -> None:
    """The reference values record how the model must be loaded, so a job that only verifies an artefact needs no training settings."""
    run, inputs = make_run(tmp_path, model, merge_mappings(BASE_SPEC, METHODS[name]), list(TEN_ROWS))
    outcome = train_here(run, inputs)
    reference = ReferenceValues.model_validate_json((inputs.output_dir / FILE_NAME).read_text())
    assert (reference.device, reference.trusts_code) == ("cpu", False)
    (tmp_path / "other").mkdir()
    other_run, other_inputs = make_run(tmp_path / "other", model, {"phases": {"train": False, "from": "s3://b/job/model"}, "output": {"verify": True}})
    verification = verify(other_run, tmp_path / "other", other_inputs, reference, outcome)
    assert verification == verify(run, tmp_path, inputs, reference, outcome) and verification.result is VerificationOutcome.VERIFIED
    untrusted_verification = verify(other_run, tmp_path / "other", other_inputs, reference.model_copy(update={"trusts_code": True}), outcome)
    assert (untrusted_verification.result, untrusted_verification.code) == (VerificationOutcome.NOT_VERIFIED, "CodeNotTrusted")
    gpu_fields = {"device": "cuda", "attention": "flash_attention_2"}
    assert verify(other_run, tmp_path / "other", other_inputs, reference.model_copy(update=gpu_fields), outcome).result is VerificationOutcome.VERIFIED


@pytest.mark.parametrize("name", mark_slow(METHODS))
def test_the_stored_artefact_of_every_method_computes_what_was_trained(name: str, model: Path, tmp_path: Path) -> None:
    result, reference = train_and_verify(tmp_path, model, METHODS[name], list(TEN_ROWS))
    assert result.result is VerificationOutcome.VERIFIED, result
    assert result.reason is None and (result.change_from_base or 0) > 1e-3
    assert len(reference.rows) == 8 or name == "packed"


@pytest.mark.parametrize("name", mark_slow(OBJECTIVES))
def test_the_stored_artefact_of_every_objective_computes_what_was_trained(name: str, model: Path, tmp_path: Path) -> None:
    spec, rows = OBJECTIVES[name]
    result, reference = train_and_verify(tmp_path, model, spec, list(rows))
    assert result.result is VerificationOutcome.VERIFIED, result
    assert (result.change_from_base is None) == (reference.head == "reward")
