"""The options of `spec.training`, `checkpoint` and `evaluation` have their documented effects, and failing runs have their error codes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError, DivergedError, NoCheckpointError, NotFoundError
from finetune_trainer.inputs import RestoredCheckpoint

from tests.support.learning import TEN_ROWS, RecordingHooks, RunOutcome, merge_mappings, run_training
from tests.support.slices import quick_slice

pytestmark = pytest.mark.pod
LORA_SPEC = {"method": {"lora": {"dropout": 0}}}


@pytest.fixture(scope="module")
def default_lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    """Four steps of LoRA with default options."""
    return run_training(tmp_path_factory.mktemp("default"), model, LORA_SPEC)


@pytest.fixture(scope="module")
def default_full(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    """Four steps of full training with default options."""
    return run_training(tmp_path_factory.mktemp("default"), model, {"method": {"type": "full"}})


def list_logged_learning_rates(outcome: RunOutcome) -> list[float]:
    """Return the logged learning rate of each step."""
    return [line["learning_rate"] for line in outcome.logs if "learning_rate" in line]


SCHEDULES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "linear": ({"scheduler": "linear"}, [1, 0.75, 0.5, 0.25]),
    "cosine": ({"scheduler": "cosine"}, [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]),
    "constant": ({"scheduler": "constant"}, [1, 1, 1, 1]),
    "warm-up steps": ({"scheduler": "constantWithWarmup", "warmupSteps": 2}, [0, 0.5, 1, 1]),
    "warm-up ratio": ({"scheduler": "constantWithWarmup", "warmupRatio": 0.5}, [0, 0.5, 1, 1]),
    "polynomial": ({"scheduler": "polynomial", "schedulerParameters": {"power": "2", "lr_end": "0"}}, [1, 0.5625, 0.25, 0.0625]),
    "minimum": (
        {"scheduler": "cosineWithMinLr", "schedulerParameters": {"min_lr_rate": "0.5"}},
        [0.5 + 0.25 * (1 + math.cos(math.pi * i / 4)) for i in range(4)],
    ),
    "restarts": ({"scheduler": "cosineWithRestarts", "schedulerParameters": {"num_cycles": "2"}}, [1, 0.5, 1, 0.5]),
    "stable": ({"scheduler": "warmupStableDecay", "schedulerParameters": {"num_decay_steps": "2"}}, [1, 1, 1, 0.5]),
    "inverse": ({"scheduler": "inverseSqrt", "warmupSteps": 1}, [0, 1, math.sqrt(1 / 2), math.sqrt(1 / 3)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_follows_the_schedule(name: str, raw_model: Path, tmp_path: Path) -> None:
    training, factors = SCHEDULES[name]
    if "warmupSteps" in training:
        training = {**training, "warmupRatio": None}
    outcome = run_training(tmp_path, raw_model, {**LORA_SPEC, "training": training})
    assert list_logged_learning_rates(outcome) == pytest.approx([5e-3 * factor for factor in factors], rel=1e-6, abs=1e-12)


def test_an_unknown_scheduler_parameter_is_refused(raw_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, raw_model, {"training": {"scheduler": "cosine", "schedulerParameters": {"min_lr": "0"}}})
    assert caught.value.code == "SchedulerParameterInvalid"
    assert "min_lr" in caught.value.message and "num_cycles" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("training", "expected_text"),
    [
        ({"scheduler": "warmupStableDecay"}, "num_decay_steps"),
        ({"scheduler": "cosineWithMinLr"}, "min_lr"),
        ({"scheduler": "polynomial", "schedulerParameters": {"lr_end": "1"}}, "lr_end"),
        ({"scheduler": "polynomial", "schedulerParameters": {"power": "high"}}, "rejects training.schedulerParameters"),
    ],
)
def test_invalid_scheduler_parameters_are_refused(
    training: dict[str, Any], expected_text: str, raw_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, raw_model, {"training": training})
    assert caught.value.code == "SchedulerParameterInvalid" and expected_text in caught.value.message


@pytest.mark.parametrize(
    ("name", "package"), [("schedule_free_adamw", "schedulefree"), ("adamw_torch_4bit", "torchao")]
)
def test_an_optimizer_whose_package_is_missing_is_refused(
    name: str, package: str, raw_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer import arguments

    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, raw_model, {"training": {"optimizer": name}})
    assert caught.value.code == "OptimizerUnavailable" and f"needs the package {package}" in caught.value.message


def test_transformers_has_every_optimizer_of_the_api() -> None:
    from finetune_api.rules import OPTIMIZERS
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) <= {item.value for item in OptimizerNames}


@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor", "lion_8bit", "rmsprop"]
)
def test_every_optimizer_trains(name: str, model: Path, default_lora: RunOutcome, tmp_path: Path) -> None:
    outcome = run_training(
        tmp_path, model, {**LORA_SPEC, "training": {"optimizer": name, "learningRate": 1e-2 if name != "sgd" else 1}}
    )
    assert outcome.losses[0] == default_lora.losses[0]
    assert outcome.losses[1:] != default_lora.losses[1:]
    assert all(math.isfinite(loss) for loss in outcome.losses)


CHANGED_OPTIONS: dict[str, dict[str, Any]] = {
    "adamBeta1": {"adamBeta1": 0.5},
    "adamBeta2": {"adamBeta2": 0.5},
    "adamEpsilon": {"adamEpsilon": 0.1},
    "weightDecay": {"weightDecay": 5.0},
    "neftuneNoiseAlpha": {"neftuneNoiseAlpha": 5},
    "seed": {"seed": 7},
    "learningRate": {"learningRate": 1e-3},
}


@pytest.mark.parametrize("name", CHANGED_OPTIONS)
def test_each_of_these_options_changes_the_losses(name: str, model: Path, default_full: RunOutcome, tmp_path: Path) -> None:
    other_outcome = run_training(tmp_path, model, {"method": {"type": "full"}, "training": CHANGED_OPTIONS[name]})
    assert default_full.losses != other_outcome.losses


def test_two_equal_runs_have_equal_losses(model: Path, tmp_path: Path) -> None:
    first_outcome, second_outcome = (run_training(tmp_path / name, model, {"training": {"maxSteps": 6}}) for name in "ab")
    assert first_outcome.losses == second_outcome.losses and first_outcome.grad_norms == second_outcome.grad_norms


def test_gradients_are_clipped_unless_the_norm_is_0(model: Path, tmp_path: Path) -> None:
    spec: dict[str, Any] = {"method": {"type": "full"}, "training": {"optimizer": "sgd", "learningRate": 1e-2}}
    clipped_outcome = run_training(tmp_path / "a", model, merge_mappings(spec, {"training": {"maxGradNorm": 0.001}}))
    unclipped_outcome = run_training(tmp_path / "b", model, merge_mappings(spec, {"training": {"maxGradNorm": 0}}))
    assert clipped_outcome.grad_norms[0] > 0.001
    assert clipped_outcome.losses[1] > unclipped_outcome.losses[1]


def test_max_steps_take_precedence_over_epochs(model: Path, tmp_path: Path) -> None:
    outcome_of_epochs = run_training(tmp_path / "a", model, {"training": {"maxSteps": None, "epochs": 1.5}})
    assert len(outcome_of_epochs.losses) == 8  # 1.5 epochs of 5 steps are 7.5 steps, rounded up
    assert len(run_training(tmp_path / "b", model, {"training": {"maxSteps": 3, "epochs": 9}}).losses) == 3


def test_mixed_precision_keeps_weights_in_32_bits_and_model_dtype_does_not(
    model: Path, default_full: RunOutcome, tmp_path: Path
) -> None:
    mixed_outcome = run_training(tmp_path / "b", model, {"method": {"type": "full"}, "training": {"mixedPrecision": "bf16"}})
    assert mixed_outcome.losses != default_full.losses and mixed_outcome.losses == pytest.approx(default_full.losses, rel=0.05)
    assert next(mixed_outcome.model.parameters()).dtype == torch.float32
    outcome_in_16_bits = run_training(tmp_path / "c", model, {"method": {"type": "full"}, "model": {"dtype": "bfloat16"}})
    assert next(outcome_in_16_bits.model.parameters()).dtype == torch.bfloat16
    assert any("bfloat16" in note for note in outcome_in_16_bits.notes)


@pytest.mark.parametrize("method", quick_slice(["full", "lora", "spectrum", "ia3", "promptTuning"], ["full", "promptTuning"]))
def test_gradient_checkpointing_does_not_change_the_losses(method: str, model: Path, tmp_path: Path) -> None:
    spec: dict[str, Any] = {"method": {"type": method, **({"lora": {"dropout": 0}} if method == "lora" else {})}}
    plain_outcome = run_training(tmp_path / "a", model, spec)
    repeated_outcome = run_training(tmp_path / "b", model, merge_mappings(spec, {"training": {"gradientCheckpointing": "enabled"}}))
    assert repeated_outcome.losses == pytest.approx(plain_outcome.losses, abs=1e-6)


@pytest.mark.parametrize(("every_n_layers", "expected_flags"), [(1, [True, True]), (2, [True, False])])
def test_gradient_checkpointing_may_cover_only_every_nth_layer(
    every_n_layers: int, expected_flags: list[bool], model: Path, tmp_path: Path
) -> None:
    training = {"gradientCheckpointing": "enabled", "checkpointEveryNLayers": every_n_layers, "maxSteps": 1}
    outcome = run_training(tmp_path, model, {"method": {"type": "full"}, "training": training})
    assert [layer.gradient_checkpointing for layer in outcome.model.model.layers] == expected_flags


def test_grouping_by_length_reduces_padding(model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [TEN_ROWS[0]["messages"][0], {"role": "assistant", "content": "red " * (1 + 9 * (i % 2))}]}
        for i in range(20)
    ]
    spec = {"training": {"maxSteps": 10, "batchSizePerDevice": 2}}
    mixed_outcome = run_training(tmp_path / "a", model, spec, rows)
    grouped_outcome = run_training(tmp_path / "b", model, merge_mappings(spec, {"training": {"groupByLength": True}}), rows)
    padding = [sum(line["padding_share"] for line in o.logs if "padding_share" in line) for o in (mixed_outcome, grouped_outcome)]
    assert padding[1] < 0.5 * padding[0]


def test_early_stopping_ends_the_run(model: Path, tmp_path: Path) -> None:
    unlearnable_rows = [
        {"messages": [row["messages"][0], TEN_ROWS[(i + 5) % 10]["messages"][1]]} for i, row in enumerate(TEN_ROWS)
    ]
    spec = {
        "training": {"maxSteps": 60, "earlyStopping": {"patience": 2}},
        "evaluation": {"strategy": "steps", "steps": 2},
    }
    outcome = run_training(tmp_path, model, merge_mappings(LORA_SPEC, spec), validation=unlearnable_rows)
    best_loss = min(outcome.eval_losses)
    assert len(outcome.losses) < 60
    assert outcome.eval_losses.index(best_loss) == len(outcome.eval_losses) - 3


def test_the_best_weights_are_published_even_after_a_resume(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    unlearnable_rows = [
        {"messages": [row["messages"][0], TEN_ROWS[(i + 5) % 10]["messages"][1]]} for i, row in enumerate(TEN_ROWS)
    ]
    spec = {
        "training": {"maxSteps": 8}, "evaluation": {"strategy": "steps", "steps": 2},
        "checkpoint": {"strategy": "steps", "steps": 2, "loadBestAtEnd": True},
    }  # fmt: skip
    outcome = run_training(tmp_path, model, merge_mappings(LORA_SPEC, spec), validation=unlearnable_rows)
    best_step = 2 * (1 + outcome.eval_losses.index(min(outcome.eval_losses)))
    assert best_step < 8
    assert outcome.folder is not None
    final_weights = load_file(outcome.folder / "adapter_model.safetensors")
    best_weights = load_file(tmp_path / "out" / f"checkpoint-{best_step}" / "adapter_model.safetensors")
    assert not list((tmp_path / "out").rglob("checkpoint-*/README.md")), "checkpoints must have no model card, because writing it costs time"
    assert all(torch.equal(final_weights[key], best_weights[key]) for key in best_weights)
    carried_file = tmp_path / "out" / "checkpoint-8" / "best--adapter_model.safetensors"
    assert all(torch.equal(load_file(carried_file)[key], best_weights[key]) for key in best_weights)

    # The disk of the second attempt contains only the newest checkpoint, which is not the best one.
    # The second attempt publishes the weights of the best checkpoint, as the first attempt does.
    moved_checkpoint = tmp_path / "again" / "restored"
    shutil.copytree(tmp_path / "out" / "checkpoint-8", moved_checkpoint)
    shutil.rmtree(tmp_path / "out")
    longer_spec = merge_mappings(merge_mappings(LORA_SPEC, spec), {"training": {"maxSteps": 10}})
    restore = RestoredCheckpoint(path=moved_checkpoint, step=8, uri="file:///x")
    repeated_outcome = run_training(tmp_path / "again", model, longer_spec, validation=unlearnable_rows, restore=restore)
    assert len(repeated_outcome.losses) == 2
    assert repeated_outcome.folder is not None
    final_weights = load_file(repeated_outcome.folder / "adapter_model.safetensors")
    assert all(
        torch.equal(final_weights[key], value) for key, value in load_file(moved_checkpoint / "best--adapter_model.safetensors").items()
    )


@pytest.mark.parametrize("method", quick_slice(["full", "lora", "qlora", "spectrum", "promptTuning", "pissa"], ["qlora", "spectrum", "pissa"]))
def test_a_resumed_run_equals_an_uninterrupted_run(method: str, model: Path, tmp_path: Path) -> None:
    spec: dict[str, Any] = {
        "training": {"maxSteps": 6},
        "checkpoint": {"strategy": "steps", "steps": 3},
        "dataset": {"packing": False},
    }
    spec["method"] = {"lora": {"init": "pissa", "dropout": 0.1}} if method == "pissa" else {"type": method}
    uninterrupted_outcome = run_training(tmp_path / "a", model, spec)
    restore = RestoredCheckpoint(path=tmp_path / "a" / "out" / "checkpoint-3", step=3, uri="file:///x")
    resumed_outcome = run_training(tmp_path / "b", model, spec, restore=restore)
    assert [line["step"] for line in resumed_outcome.logs if "loss" in line] == [4, 5, 6]
    assert resumed_outcome.losses == uninterrupted_outcome.losses[3:] and resumed_outcome.grad_norms == uninterrupted_outcome.grad_norms[3:]
    assert resumed_outcome.logs[-1]["num_tokens"] == uninterrupted_outcome.logs[-1]["num_tokens"]
    assert resumed_outcome.folder is not None and uninterrupted_outcome.folder is not None
    for file in uninterrupted_outcome.folder.glob("*.safetensors"):
        assert (resumed_outcome.folder / file.name).read_bytes() == file.read_bytes()


def test_spectrum_on_a_4_bit_base_resumes(model: Path, tmp_path: Path) -> None:
    spec = {
        "method": {"type": "spectrum"}, "model": {"quantization": {"bits": 4}}, "training": {"maxSteps": 4},
        "checkpoint": {"strategy": "steps", "steps": 2},
    }  # fmt: skip
    uninterrupted_outcome = run_training(tmp_path / "a", model, spec)
    restore = RestoredCheckpoint(path=tmp_path / "a" / "out" / "checkpoint-2", step=2, uri="file:///x")
    resumed_outcome = run_training(tmp_path / "b", model, spec, restore=restore)
    assert resumed_outcome.losses == pytest.approx(uninterrupted_outcome.losses[2:], rel=1e-3)


def test_a_checkpoint_with_model_and_adapter_weights_is_refused(model: Path, tmp_path: Path) -> None:
    spec = {**LORA_SPEC, "checkpoint": {"strategy": "steps", "steps": 2}}
    run_training(tmp_path / "a", model, spec)
    folder = tmp_path / "a" / "out" / "checkpoint-2"
    shutil.copy(model / "model.safetensors", folder)
    with pytest.raises(NoCheckpointError) as caught:
        run_training(tmp_path / "b", model, spec, restore=RestoredCheckpoint(path=folder, step=2, uri="file:///x"))
    assert caught.value.code == "CheckpointForeign"


def test_a_nan_loss_ends_the_run_as_diverged(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    poisoned_model = tmp_path / "poisoned"
    shutil.copytree(model, poisoned_model)
    weights = load_file(poisoned_model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, poisoned_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DivergedError) as caught:
        run_training(tmp_path / "a", poisoned_model, {"method": {"type": "full"}})
    assert caught.value.code == "LossNotFinite" and int(caught.value.exit_code) == 72
    assert "step 1" in caught.value.message


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_that_become_nan_after_the_last_step_are_not_published(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback

    class NanWeights(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            next(parameter for parameter in model.parameters() if parameter.requires_grad).data[0] = float("nan")

    original = RecordingHooks.create_callbacks
    monkeypatch.setattr(RecordingHooks, "create_callbacks", lambda self, *args: [*original(self, *args), NanWeights()])
    with pytest.raises(DivergedError) as caught:
        run_training(tmp_path, model, {"method": {"type": method}})
    assert caught.value.code == "WeightsNotFinite" and int(caught.value.exit_code) == 72
    assert not (tmp_path / "out" / "final").exists()


def test_evaluation_without_data_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, model, {"evaluation": {"strategy": "epoch"}})
    assert caught.value.code == "EvaluationWithoutData"


def test_a_missing_or_incomplete_model_is_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    empty_folder = tmp_path / "empty"
    empty_folder.mkdir()
    with pytest.raises(NotFoundError) as caught:
        run_training(tmp_path / "a", empty_folder)
    assert caught.value.code in ("TokenizerUnreadable", "ModelUnreadable") and caught.value.failure_class == "Model"
    assert str(empty_folder) not in caught.value.message.replace(f"file://{empty_folder}", "")
    incomplete_model = tmp_path / "part"
    shutil.copytree(model, incomplete_model)
    weights = load_file(incomplete_model / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, incomplete_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFoundError) as caught:
        run_training(tmp_path / "b", incomplete_model)
    assert caught.value.code == "ModelIncomplete" and "model.layers.1.mlp.up_proj.weight" in caught.value.message


def test_the_attention_of_the_spec_is_used_or_its_replacement_is_noted(model: Path, tmp_path: Path) -> None:
    eager_outcome = run_training(tmp_path / "a", model, {**LORA_SPEC, "model": {"attention": "eager"}})
    flash_outcome = run_training(tmp_path / "b", model, {**LORA_SPEC, "model": {"attention": "flashAttention2"}})
    assert (eager_outcome.resolved["attention"], flash_outcome.resolved["attention"]) == ("eager", "sdpa")
    assert any("flashAttention2 is not available" in note for note in flash_outcome.notes)
    assert eager_outcome.losses == pytest.approx(flash_outcome.losses, abs=1e-5)


def test_the_run_reports_its_resolved_settings(model: Path, tmp_path: Path) -> None:
    outcome = run_training(tmp_path, model, {"training": {"batchSizePerDevice": 2, "gradientAccumulationSteps": 3}})
    resolved = outcome.resolved
    assert (resolved["worldSize"], resolved["effectiveBatch"], resolved["strategy"], resolved["device"]) == (
        1,
        6,
        "single",
        "cpu",
    )
    assert (resolved["datasetRows"], resolved["datasetFormat"]) == (10, "messages")
    assert {"dataset.maxSequenceLength", "dataset.useChatTemplate"} <= resolved["defaults"].keys()
    line = outcome.logs[-2]
    assert line["tokens_per_second"] > 0 and 0 <= line["data_wait_share"] <= 1
    assert outcome.messages("stage")[-1]["stage"] == "saving"
    assert (
        json.loads((tmp_path / "out" / "final" / "config.json").read_text())["model_type"] == "llama"
        if outcome.kind == "model"
        else True
    )


def test_eva_starts_with_orthonormal_directions(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    spec = {
        "method": {"lora": {"dropout": 0, "init": "eva", "rank": 4}},
        "training": {"learningRate": 1e-9, "maxSteps": 1},
    }
    outcome = run_training(tmp_path, model, spec)
    assert outcome.folder is not None
    weights = {
        key: value for key, value in load_file(outcome.folder / "adapter_model.safetensors").items() if "lora_A" in key
    }
    assert len(weights) == 14
    for value in weights.values():  # the rows of a random initialisation would not be orthonormal
        assert torch.allclose(value @ value.T, torch.eye(4), atol=1e-3)
