"""Options of methods, models and objectives have their documented effects. Other files test further options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import NotFoundError

from tests.support.learning import RunOutcome, make_run, merge_mappings, run_training, train_here
from tests.support.preferences import PROMPTS

pytestmark = pytest.mark.pod
ONE_STEP: dict[str, Any] = {"training": {"maxSteps": 1}}


def read_adapter_config(outcome: RunOutcome) -> dict[str, Any]:
    assert outcome.folder is not None
    config: dict[str, Any] = json.loads((outcome.folder / "adapter_config.json").read_text())
    return config


def load_weights(folder: Path | None, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    assert folder is not None
    return dict(load_file(folder / name))


# ---- options of methods


@pytest.mark.parametrize(("method", "shape"), [("promptTuning", (7, 64)), ("prefixTuning", (7, 2 * 2 * 32))])
def test_prompt_length_is_the_number_of_virtual_tokens(
    method: str, shape: tuple[int, int], model: Path, tmp_path: Path
) -> None:
    outcome = run_training(tmp_path, model, merge_mappings(ONE_STEP, {"method": {"type": method, "promptLength": 7}}))
    assert read_adapter_config(outcome)["num_virtual_tokens"] == 7
    (learned_vectors,) = load_weights(outcome.folder).values()
    assert tuple(learned_vectors.shape) == shape


def test_use_dora_equals_method_dora(model: Path, tmp_path: Path) -> None:
    lora = {"lora": {"dropout": 0, "rank": 4}}
    type_outcome = run_training(tmp_path / "a", model, merge_mappings(ONE_STEP, {"method": {"type": "dora", **lora}}))
    flag_outcome = run_training(
        tmp_path / "b", model, merge_mappings(ONE_STEP, {"method": {"lora": {**lora["lora"], "useDora": True}}})
    )
    plain_outcome = run_training(tmp_path / "c", model, merge_mappings(ONE_STEP, {"method": lora}))
    magnitude_counts = [sum("magnitude" in key for key in load_weights(outcome.folder)) for outcome in (type_outcome, flag_outcome, plain_outcome)]
    assert magnitude_counts == [14, 14, 0]
    assert type_outcome.losses == flag_outcome.losses


@pytest.mark.parametrize(("bias", "trained_count"), [("none", 0), ("loraOnly", 2), ("all", 6)])
def test_the_biases_of_the_spec_are_trained(bias: str, trained_count: int, tmp_path: Path) -> None:
    from tests.support.tiny import make_tiny_model

    model_with_biases = make_tiny_model(tmp_path / "model", attention_bias=True)
    spec = {"method": {"lora": {"targetModules": ["q_proj"], "bias": bias}}}
    outcome = run_training(tmp_path, model_with_biases, spec)
    bias_names = [n for n, p in outcome.model.named_parameters() if p.requires_grad and n.endswith(".bias")]
    assert len([n for n in bias_names if "o_proj" not in n]) == trained_count
    assert all((("q_proj" in n) or bias == "all") for n in bias_names)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_4_bit_layers_compute_in_the_dtype_of_the_spec(compute_dtype: str, model: Path, tmp_path: Path) -> None:
    spec = merge_mappings(ONE_STEP, {"method": {"type": "qlora"}, "model": {"quantization": {"computeDtype": compute_dtype}}})
    outcome = run_training(tmp_path, model, spec)
    layers = [m for m in outcome.model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "compute_dtype")]
    assert {str(layer.compute_dtype) for layer in layers} == {f"torch.{compute_dtype}"}


def test_spectrum_by_mean_over_std_selects_whole_layers(model: Path, tmp_path: Path) -> None:
    base_weights = load_weights(model, "model.safetensors")
    ratios = {
        layer: sum(
            float(w.abs().mean() / w.std())
            for w in (v for k, v in base_weights.items() if f"layers.{layer}." in k and v.ndim == 2)
        )
        / 7
        for layer in (0, 1)
    }
    best_layer = max(ratios, key=lambda layer: ratios[layer])
    spec = merge_mappings(
        ONE_STEP, {"method": {"type": "spectrum", "spectrum": {"metric": "meanOverStd", "snrThreshold": 0.9}}}
    )
    outcome = run_training(tmp_path, model, spec)
    assert outcome.folder is not None
    record = json.loads((outcome.folder / "spectrum_snr.json").read_text())
    assert record["metric"] == "meanOverStd"
    assert len(record["trained"]) == 7
    assert all(name.startswith(f"model.layers.{best_layer}.") for name in record["trained"])


def test_a_spectrum_scan_is_reused_for_the_same_model_revision(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.method import spectrum

    spec = merge_mappings(ONE_STEP, {"method": {"type": "spectrum"}})
    first_outcome = run_training(tmp_path, model, spec)
    scanned_metrics: list[str] = []
    original = spectrum.signal_to_noise
    monkeypatch.setattr(
        spectrum, "signal_to_noise", lambda weight, metric: scanned_metrics.append(metric) or original(weight, metric)
    )
    repeated_outcome = run_training(tmp_path, model, spec)
    assert scanned_metrics == []
    assert first_outcome.folder == repeated_outcome.folder and repeated_outcome.losses == first_outcome.losses
    run, inputs = make_run(tmp_path, model, spec)
    train_here(run, inputs.model_copy(update={"model_revision": "another"}))
    assert len(scanned_metrics) == 14


# ---- options of the model


def test_remote_code_runs_only_if_it_is_trusted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    own_model = tmp_path / "own"
    shutil.copytree(model, own_model)
    (own_model / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((own_model / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (own_model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    with pytest.raises(NotFoundError) as caught:
        run_training(tmp_path / "a", own_model, ONE_STEP)
    assert caught.value.hint == "set model.trustRemoteCode: true if you trust the source"
    trusted_outcome = run_training(tmp_path / "b", own_model, merge_mappings(ONE_STEP, {"model": {"trustRemoteCode": True}}))
    assert type(trusted_outcome.model.get_base_model()).__name__ == "OwnForCausalLM"


# ---- options of objectives and logging


@pytest.mark.parametrize("sampling", [{"temperature": 0.001}, {"topP": 0.001}], ids=["temperature", "topP"])
def test_sampling_from_one_candidate_gives_equal_completions(
    sampling: dict[str, float], model: Path, tmp_path: Path
) -> None:
    reward = {"builtin": "length", "parameters": {"unit": "characters", "minimum": "500"}}

    def compute_share_of_groups_with_equal_rewards(**options: float) -> float:
        """Train one step on 8 questions with 4 answers each. Returns the share of questions whose four answers have the same reward."""
        trainer = {
            "type": "grpo",
            "maxCompletionLength": 8,
            "grpo": {"numGenerations": 4, **options},
            "rewards": [reward],
        }
        batch = {"training": {"batchSizePerDevice": 32, "maxSteps": 1}}
        outcome = run_training(tmp_path / f"{sorted(options)}", model, merge_mappings(batch, {"trainer": trainer}), PROMPTS)
        return next(float(line["frac_reward_zero_std"]) for line in outcome.logs if "frac_reward_zero_std" in line)

    assert compute_share_of_groups_with_equal_rewards(**sampling) == 1.0
    assert compute_share_of_groups_with_equal_rewards() < 1.0


@pytest.mark.parametrize(("logs_first_step", "steps"), [(True, [1, 3, 6]), (False, [3, 6])])
def test_log_lines_appear_at_the_steps_of_the_spec(logs_first_step: bool, steps: list[int], model: Path, tmp_path: Path) -> None:
    spec = {"training": {"maxSteps": 6}, "tracking": {"loggingSteps": 3, "logFirstStep": logs_first_step}}
    outcome = run_training(tmp_path, model, spec)
    assert [line["step"] for line in outcome.logs if "loss" in line] == steps
