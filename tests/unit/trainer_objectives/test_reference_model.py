"""Before the first step, the reference model equals the trained model, so the first loss is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError

from tests.support.learning import make_run, run_training, train_here
from tests.support.preferences import LABELLED_ANSWERS, PREFERENCE_PAIRS, PROMPTS, user_message
from tests.support.tiny import make_tiny_model

METHOD_SPECS: dict[str, dict[str, Any]] = {
    "spectrum on 4 bits": {"method": {"type": "spectrum"}, "model": {"quantization": {"bits": 4}}},
    "spectrum": {"method": {"type": "spectrum"}},
}

GRPO_TRAINER = {
    "type": "grpo", "maxCompletionLength": 6, "grpo": {"numGenerations": 2, "beta": 0.1},
    "rewards": [{"builtin": "regex", "parameters": {"pattern": "e"}}],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "raw")


@pytest.fixture(autouse=True)
def same_matmul_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable a CPU kernel that multiplies frozen 4-bit weights in another order, because this changes the loss slightly."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.mark.parametrize("method", METHOD_SPECS)
def test_first_dpo_loss_shows_that_reference_and_model_are_equal(method: str, model: Path, tmp_path: Path) -> None:
    spec = {**METHOD_SPECS[method], "trainer": {"type": "dpo"}, "training": {"maxSteps": 1}}
    assert run_training(tmp_path, model, spec, PREFERENCE_PAIRS).losses == [pytest.approx(math.log(2), abs=2e-6)]


def test_first_kto_loss_shows_that_reference_and_model_are_equal(model: Path, tmp_path: Path) -> None:
    spec = {**METHOD_SPECS["spectrum on 4 bits"], "trainer": {"type": "kto"}, "training": {"maxSteps": 1}}
    assert run_training(tmp_path, model, spec, LABELLED_ANSWERS).losses == [pytest.approx(0.5, abs=2e-6)]


@pytest.mark.parametrize("method", ["spectrum on 4 bits", "new tokens"])
def test_first_kl_divergence_of_grpo_is_zero(method: str, model: Path, tmp_path: Path) -> None:
    """The reference model also needs an embedding row for a new token, because the prompts contain it."""
    with_new_token = {"method": {"type": "full"}, "model": {"newTokens": ["<a>"]}}
    spec = {**METHOD_SPECS.get(method, with_new_token), "trainer": GRPO_TRAINER, "training": {"maxSteps": 1}}
    rows = [{**row, "prompt": [user_message("<a> one")]} for row in PROMPTS] if method == "new tokens" else PROMPTS
    assert [line["kl"] for line in run_training(tmp_path, model, spec, rows).logs if "kl" in line] == [pytest.approx(0, abs=2e-6)]


@pytest.fixture(scope="module")
def model_with_spare_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has one token more than the embedding has rows, as in some multimodal models."""
    from transformers import AutoTokenizer

    path = make_tiny_model(tmp_path_factory.mktemp("model_with_spare_token") / "raw")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<image{index}>" for index in range(449 - len(tokenizer))])
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("trainer", "rows"), [({"type": "dpo"}, PREFERENCE_PAIRS), ({"type": "kto"}, LABELLED_ANSWERS), (GRPO_TRAINER, PROMPTS)]
)
def test_the_reference_model_needs_no_rows_for_tokens_that_the_model_lacks(
    trainer: dict[str, Any], rows: Any, model_with_spare_token: Path, tmp_path: Path
) -> None:
    spec = {"method": {"type": "full"}, "trainer": trainer, "training": {"maxSteps": 1}}
    assert len(run_training(tmp_path, model_with_spare_token, spec, rows).losses) == 1


@pytest.mark.parametrize("rows", [448, 447])
def test_a_reference_model_of_the_spec_needs_as_many_rows_as_the_trained_model(rows: int, model_with_spare_token: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other_model = AutoModelForCausalLM.from_pretrained(model_with_spare_token)
    other_model.resize_token_embeddings(rows)
    other_model.save_pretrained(tmp_path / "reference")
    trainer = {"type": "dpo", "dpo": {"referenceModel": "s3://models/other"}}
    run, inputs = make_run(tmp_path, model_with_spare_token, {"trainer": trainer, "training": {"maxSteps": 1}}, PREFERENCE_PAIRS)
    inputs = inputs.model_copy(update={"reference": tmp_path / "reference"})
    if rows == 448:
        assert len(train_here(run, inputs).losses) == 1
        return
    with pytest.raises(ConfigError) as caught:
        train_here(run, inputs)
    assert (caught.value.code, "has 447 tokens" in caught.value.message) == ("VocabularyDiffers", True)
