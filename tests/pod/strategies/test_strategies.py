"""Every strategy on two ranks: it is active, its losses equal those of one rank, its artefacts are complete, and it resumes exactly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cells import Cell, Result, launch_cells
from tests.support.learning import TEN_ROWS, merge_mappings, run_training
from tests.support.preferences import PREFERENCE_PAIRS
from tests.support.slices import quick_slice
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.pod

FULL_SPEC: dict[str, Any] = {"method": {"type": "full"}, "training": {"learningRate": 1e-3}}
LORA_SPEC: dict[str, Any] = {"method": {"type": "lora", "lora": {"dropout": 0.1}}, "training": {"learningRate": 5e-3}}
QLORA_SPEC: dict[str, Any] = {"method": {"type": "qlora", "lora": {"dropout": 0}}}
DDP_SPEC = {"distributed": {"strategy": "ddp"}}
SAVE_STEPS = {"checkpoint": {"strategy": "steps", "steps": 2}}


def make_fsdp_spec(**options: Any) -> dict[str, Any]:
    return {"distributed": {"strategy": "fsdp", **({"fsdp": options} if options else {})}}


def make_zero_spec(stage: int | None = None, **options: Any) -> dict[str, Any]:
    group = options | ({"zeroStage": stage} if stage is not None else {})
    return {"distributed": {"strategy": "deepspeed", **({"deepspeed": group} if group else {})}}


ACCELERATE_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_processes: 2
mixed_precision: 'no'
fsdp_config:
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_backward_prefetch: BACKWARD_PRE
"""
DEEPSPEED_CONFIG = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.25,
    "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.8, 0.9]}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": "auto"}},
    "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
}  # fmt: skip
SPECS: dict[str, dict[str, Any]] = {
    "ddp full": merge_mappings(FULL_SPEC, DDP_SPEC),
    "ddp lora": merge_mappings(merge_mappings(LORA_SPEC, DDP_SPEC), SAVE_STEPS),
    "ddp qlora": merge_mappings(QLORA_SPEC, DDP_SPEC),
    "fsdp full": merge_mappings(merge_mappings(FULL_SPEC, make_fsdp_spec()), SAVE_STEPS),
    "fsdp full, full states": merge_mappings(merge_mappings(FULL_SPEC, make_fsdp_spec(stateDict="full")), SAVE_STEPS),
    "fsdp lora": merge_mappings(merge_mappings(LORA_SPEC, make_fsdp_spec()), SAVE_STEPS),
    "fsdp qlora": merge_mappings(QLORA_SPEC, make_fsdp_spec()),
    "fsdp shardGradOp": merge_mappings(FULL_SPEC, make_fsdp_spec(sharding="shardGradOp")),
    "fsdp noShard": merge_mappings(FULL_SPEC, make_fsdp_spec(sharding="noShard")),
    "fsdp file": merge_mappings(FULL_SPEC, make_fsdp_spec(configRef={"name": "mine", "key": "fsdp.yaml"})),
    "zero0 full": merge_mappings(FULL_SPEC, make_zero_spec(0)),
    "zero1 full": merge_mappings(FULL_SPEC, make_zero_spec(1)),
    "zero2 full": merge_mappings(merge_mappings(FULL_SPEC, make_zero_spec()), SAVE_STEPS),
    "zero2 lora": merge_mappings(LORA_SPEC, make_zero_spec(2)),
    "zero2 qlora": merge_mappings(QLORA_SPEC, make_zero_spec(2)),
    "zero2 offload": merge_mappings(FULL_SPEC, make_zero_spec(2, offloadOptimizer=True)),
    "zero3 full": merge_mappings(merge_mappings(FULL_SPEC, make_zero_spec(3)), SAVE_STEPS),
    "zero3 lora": merge_mappings(merge_mappings(LORA_SPEC, make_zero_spec(3)), SAVE_STEPS),
    "zero3 offload": merge_mappings(FULL_SPEC, make_zero_spec(3, offloadOptimizer=True, offloadParameters=True)),
    "zero3 json": merge_mappings(FULL_SPEC, make_zero_spec(configRef={"name": "mine", "key": "zero.json"})),
}
RESUMED_CELLS = ("ddp lora", "fsdp full", "fsdp full, full states", "fsdp lora", "zero2 full", "zero3 full", "zero3 lora")
BEST_CHECKPOINT_SPECS = {
    "fsdp best": merge_mappings(merge_mappings(LORA_SPEC, make_fsdp_spec()), {"training": {"learningRate": 0.03}}),
    "zero2 best": merge_mappings(merge_mappings(FULL_SPEC, make_zero_spec(2)), {"training": {"learningRate": 0.01}}),
    "zero3 best": merge_mappings(merge_mappings(LORA_SPEC, make_zero_spec(3)), {"training": {"learningRate": 0.03}}),
}
UNEVEN_ROWS = [
    {"messages": [row["messages"][0], {"role": "assistant", "content": "red " * (1 + index % 4)}]}
    for index, row in enumerate(TEN_ROWS[:8])
]
"""Rows whose answers differ in length, so that ranks and micro-batches have unequal numbers of trained tokens."""
EXACT_SPEC: dict[str, Any] = {
    "training": {"seed": 7, "batchSizePerDevice": 2, "gradientAccumulationSteps": 1, "maxSteps": 4}
}
LORA_EXACT = {"method": {"type": "lora", "lora": {"dropout": 0}}}
EQUAL_BATCH_SPECS: dict[str, dict[str, Any]] = {
    "ddp": DDP_SPEC,
    "ddp, accumulated": merge_mappings(DDP_SPEC, {"training": {"batchSizePerDevice": 1, "gradientAccumulationSteps": 2}}),
    "fsdp": make_fsdp_spec(),
    "zero2": make_zero_spec(2),
    "zero2, accumulated": merge_mappings(make_zero_spec(2), {"training": {"batchSizePerDevice": 1, "gradientAccumulationSteps": 2}}),
}
"""Runs on two ranks that together train four rows per step."""
REFUSED_SPECS: dict[str, tuple[dict[str, Any], str, str]] = {
    "fsdp prompt": (merge_mappings({"method": {"type": "promptTuning"}}, make_fsdp_spec()), "StrategyAndMethod", "virtual tokens"),
    "fsdp 8 bit": (merge_mappings({"model": {"quantization": {"bits": 8}}}, make_fsdp_spec()), "StrategyAndMethod", "8-bit"),
    "fsdp local": (make_fsdp_spec(stateDict="local"), "StateDictUnavailable", "version 2"),
    "zero3 qlora": (merge_mappings(QLORA_SPEC, make_zero_spec(3)), "StrategyAndMethod", "quantised"),
    "zero3 pissa": (merge_mappings({"method": {"lora": {"init": "pissa"}}}, make_zero_spec(3)), "StrategyAndMethod", "pissa"),
    "zero3 spectrum": (merge_mappings({"method": {"type": "spectrum"}}, make_zero_spec(3)), "StrategyAndMethod", "spectrum"),
    "fsdp 8-bit optimizer": (
        merge_mappings({"training": {"optimizer": "adamw_8bit"}}, make_fsdp_spec()),
        "StrategyAndMethod",
        "adamw_8bit cannot update weights that FSDP has sharded",
    ),
    "fsdp head": (
        merge_mappings({"method": {"lora": {"modulesToSave": ["lm_head"]}}}, make_fsdp_spec()),
        "StrategyAndMethod",
        "contains the output head lm_head",
    ),
    "zero1 adagrad": (merge_mappings({"training": {"optimizer": "adagrad"}}, make_zero_spec(1)), "StrategyAndMethod", "optimizer adagrad creates its state"),
    "json against fields": (
        merge_mappings({"training": {"maxGradNorm": 1.0}}, make_zero_spec(2, configRef={"name": "mine", "key": "zero.json"})),
        "ConfigsDisagree",
        "gradient_clipping is 0.25, training.maxGradNorm is 1.0; zero_optimization.stage is 3, distributed.deepspeed.zeroStage is 2",
    ),
}

SIXTEEN_BITS: dict[str, Any] = {
    "model": {"dtype": "bfloat16"},
    "training": {"mixedPrecision": "bf16", "gradientCheckpointing": "enabled", "maxSteps": 3, "learningRate": 5e-3},
}
"""A spec with the default dtypes of a GPU and with gradient checkpointing."""
PACKING_SPEC: dict[str, Any] = {"dataset": {"packing": True, "maxSequenceLength": 64}, "training": {"batchSizePerDevice": 1}}
HEAD_IN_FULL = {"method": {"lora": {"dropout": 0, "modulesToSave": ["lm_head"]}}}
SIXTEEN_BIT_RUNS: dict[str, tuple[dict[str, Any], Sequence[Any]]] = {
    "16 bits, ddp": (merge_mappings(LORA_EXACT, DDP_SPEC), TEN_ROWS),
    "16 bits, fsdp": (merge_mappings(LORA_EXACT, make_fsdp_spec()), TEN_ROWS),
    "16 bits, zero2": (merge_mappings(LORA_EXACT, make_zero_spec(2)), TEN_ROWS),
    "16 bits, zero3": (merge_mappings(LORA_EXACT, make_zero_spec(3)), TEN_ROWS),
    "16 bits, ddp, trained head": (merge_mappings(HEAD_IN_FULL, DDP_SPEC), TEN_ROWS),
    "16 bits, ddp, ia3 and dpo": (merge_mappings({"method": {"type": "ia3"}, "trainer": {"type": "dpo"}}, DDP_SPEC), PREFERENCE_PAIRS),
    "16 bits, fsdp, reward": (merge_mappings({"trainer": {"type": "reward"}}, make_fsdp_spec()), PREFERENCE_PAIRS),
    "16 bits, zero3, reward": (merge_mappings({"trainer": {"type": "reward"}}, make_zero_spec(3)), PREFERENCE_PAIRS),
    "16 bits, ddp, packed": (merge_mappings(merge_mappings(LORA_EXACT, PACKING_SPEC), DDP_SPEC), TEN_ROWS),
    "16 bits, fsdp, packed": (merge_mappings(merge_mappings(LORA_EXACT, PACKING_SPEC), make_fsdp_spec()), TEN_ROWS),
    "16 bits, ddp, packed, full": (merge_mappings(merge_mappings(FULL_SPEC, PACKING_SPEC), DDP_SPEC), TEN_ROWS),
    "16 bits, zero3, packed, full": (merge_mappings(merge_mappings(FULL_SPEC, PACKING_SPEC), make_zero_spec(3)), TEN_ROWS),
    "16 bits, zero3, packed": (merge_mappings(merge_mappings(LORA_EXACT, PACKING_SPEC), make_zero_spec(3)), TEN_ROWS),
}




def make_equal_cell_name(method: str, name: str) -> str:
    return f"equal batches, {method}, {name}"


QUICK_CELLS = {
    "ddp full", "ddp lora", "fsdp full", "fsdp full, full states", "fsdp lora", "fsdp noShard", "zero2 full",
    "zero3 full", "zero3 lora", "zero3 json", *REFUSED_SPECS, "16 bits, ddp", "16 bits, fsdp", "zero2 best",
    make_equal_cell_name("full", "ddp, accumulated"), make_equal_cell_name("lora", "fsdp"), make_equal_cell_name("full", "zero2, accumulated"),
    "ddp full, stored in 16 bits", "fsdp full, stored in 16 bits",
}  # fmt: skip
"""The cells of the test matrix that `make test` runs. For each of them, `make test` also runs a cell that resumes from a checkpoint.

These cells cover every strategy, and ZeRO stages 2 and 3. `make test-faults` runs all cells.
"""


def mark_slow_cells(names: Iterable[str]) -> list[Any]:
    """Return the names of cells as test parameters. All but the quick cells are marked as slow."""
    all_names = list(names)
    return quick_slice(all_names, QUICK_CELLS & set(all_names))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "raw")


class Results(dict[str, Result]):
    """The results by cell name.

    When a test reads the result of a quick cell for the first time, all quick cells run. In the same way, the first read of a slow cell runs all
    slow cells.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__()
        self._model, self._folder = model, folder

    def __missing__(self, name: str) -> Result:
        is_quick = name.removesuffix(", resumed") in QUICK_CELLS
        folder = self._folder / ("quick" if is_quick else "slow")
        cells = [cell for cell in make_cells(self._model, self._folder / f"model-16-bit-{folder.name}") if (cell.name in QUICK_CELLS) == is_quick]
        for number, cell in enumerate(cells[:]):
            if cell.name in RESUMED_CELLS:  # a cell's folder is named by its number, not by its name
                checkpoint = folder / f"{number:03d}" / "out" / "checkpoint-2"
                cells.append(replace(cell, name=f"{cell.name}, resumed", resume=str(checkpoint)))
        self.update(launch_cells(cells, folder, rank_count=2))
        return self.get(name) or pytest.fail(f"there is no cell {name}")


def make_cells(model: Path, folder_16_bits: Path) -> list[Cell]:
    """Return all cells except the resumed ones. Writes a copy of the model in bf16 into `folder_16_bits`."""
    files = {"mine": {"fsdp.yaml": ACCELERATE_CONFIG, "zero.json": json.dumps(DEEPSPEED_CONFIG)}}
    specs = {**SPECS, **{name: spec for name, (spec, _, _) in REFUSED_SPECS.items()}}
    cells = [Cell(name, str(model), spec, TEN_ROWS, config_maps=files) for name, spec in specs.items()]
    # The validation loss first falls, because the model learns the format. Then the loss rises, because the validation
    # answers consist of characters that no training row contains.
    unlearnable_rows = [{"messages": [row["messages"][0], {"role": "assistant", "content": "!?#%&@"}]} for row in TEN_ROWS]
    best_spec = {
        "training": {"maxSteps": 12, "scheduler": "constant"}, "evaluation": {"steps": 3},
        "checkpoint": {"strategy": "steps", "steps": 3, "loadBestAtEnd": True},
    }  # fmt: skip
    cells += [
        Cell(name, str(model), merge_mappings(SIXTEEN_BITS, spec), rows) for name, (spec, rows) in SIXTEEN_BIT_RUNS.items()
    ]
    cells += [
        Cell(name, str(model), merge_mappings(best_spec, spec), TEN_ROWS, validation=unlearnable_rows) for name, spec in BEST_CHECKPOINT_SPECS.items()
    ]
    cells += [
        Cell(make_equal_cell_name(method, name), str(model), merge_mappings(merge_mappings(EXACT_SPEC, method_spec), spec), UNEVEN_ROWS)
        for name, spec in EQUAL_BATCH_SPECS.items()
        for method, method_spec in (("full", FULL_SPEC), ("lora", LORA_EXACT))
    ]
    model_in_16_bits = store_in_16_bits(model, folder_16_bits)
    return cells + [
        Cell(f"{name}, stored in 16 bits", str(model_in_16_bits), specs[name], TEN_ROWS) for name in ("ddp full", "fsdp full")
    ]


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return Results(model, tmp_path_factory.mktemp("cells"))


def store_in_16_bits(model: Path, folder: Path) -> Path:
    """Write a copy of the model whose weights are in bf16. Returns the folder of the copy."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def load_final_tensors(result: Result) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    final_folder = Path(result.folder) / "final"
    return dict(
        load_file(
            next(final_folder / name for name in ("adapter_model.safetensors", "model.safetensors") if (final_folder / name).exists())
        )
    )


def test_ranks_that_share_converted_weights_train_the_same(results: dict[str, Result]) -> None:
    """With FSDP, one rank converts the 16-bit files to 32 bits for all ranks. With ddp, every rank converts the files for itself."""
    shared_result, private_result = results["fsdp full, stored in 16 bits"], results["ddp full, stored in 16 bits"]
    assert shared_result.error is None and shared_result.losses == private_result.losses != results["ddp full"].losses
    assert not list((Path(shared_result.folder).parent / "work").glob("float32-weights*"))


@pytest.mark.parametrize("name", mark_slow_cells(SPECS))
def test_strategy_is_active_and_learns(name: str, results: dict[str, Result]) -> None:
    result = results[name]
    assert result.error is None
    assert (
        result.resolved["strategy"] == {"ddp": "ddp", "fsdp": "fsdp", "zero": "deepspeed"}[name.split()[0][:4].strip()]
        or "noShard" in name
    )
    assert result.resolved["worldSize"] == 2
    assert result.losses[-1] < result.losses[0]


DDP_CELLS = {
    **{
        name: f"ddp {name.split()[1]}"
        for name in SPECS
        if name.split()[-1] in ("full", "lora", "qlora") and not name.startswith("ddp")
    },
    **dict.fromkeys(("fsdp shardGradOp", "fsdp noShard", "fsdp file", "zero2 offload", "zero3 offload"), "ddp full"),
}
"""For each cell: the cell with ddp whose run must have the same losses."""


@pytest.mark.parametrize("name", mark_slow_cells(DDP_CELLS))
def test_losses_and_artefact_equal_those_of_ddp(name: str, results: dict[str, Result]) -> None:
    result, ddp_result = results[name], results[DDP_CELLS[name]]
    assert result.losses == pytest.approx(ddp_result.losses, abs=1e-5)
    tensors_here, tensors_of_ddp = load_final_tensors(result), load_final_tensors(ddp_result)
    assert tensors_here.keys() == tensors_of_ddp.keys()
    for key, value in tensors_of_ddp.items():
        assert tensors_here[key].shape == value.shape
        torch.testing.assert_close(tensors_here[key].float(), value.float(), atol=2e-4, rtol=0)
    assert result.files == ddp_result.files


@pytest.fixture(scope="module")
def one_rank_outcomes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each method: the outcome of a run on one rank that trains the same four rows in each step."""
    outcomes = {}
    for method, method_spec in (("full", FULL_SPEC), ("lora", LORA_EXACT)):
        spec = merge_mappings(merge_mappings(EXACT_SPEC, method_spec), {"training": {"batchSizePerDevice": 4}})
        outcomes[method] = run_training(tmp_path_factory.mktemp("one"), model, spec, UNEVEN_ROWS)
    return outcomes


@pytest.mark.parametrize("name", mark_slow_cells(make_equal_cell_name(method, name) for method in ("full", "lora") for name in EQUAL_BATCH_SPECS))
def test_two_ranks_have_the_losses_of_one_rank(name: str, one_rank_outcomes: dict[str, Any], results: dict[str, Result]) -> None:
    one_rank_outcome, result = one_rank_outcomes[name.split(", ")[1]], results[name]
    assert result.error is None and result.resolved["effectiveBatch"] == 4
    assert len(one_rank_outcome.losses) == 4
    assert result.losses == pytest.approx(one_rank_outcome.losses, abs=1e-6)
    assert result.grad_norms == pytest.approx(one_rank_outcome.grad_norms, rel=1e-5)


@pytest.mark.parametrize("name", mark_slow_cells(SIXTEEN_BIT_RUNS))
def test_two_ranks_train_in_16_bits(name: str, results: dict[str, Result]) -> None:
    result, (prefix, strategy, *options) = results[name], name.split(", ")
    assert result.error is None
    assert len(result.losses) == 3 and all(math.isfinite(loss) for loss in result.losses)
    ddp_result = (
        results[", ".join([prefix, "ddp", *options])] if strategy != "ddp" and options != ["reward"] else result
    )
    assert result.losses == pytest.approx(ddp_result.losses, abs=0.02)


def test_no_shard_uses_ddp_and_adds_a_note(results: dict[str, Result]) -> None:
    assert results["fsdp noShard"].resolved["strategy"] == "ddp"
    assert any("noShard" in note for note in results["fsdp noShard"].notes)


@pytest.mark.parametrize("name", mark_slow_cells(RESUMED_CELLS))
def test_a_resumed_run_equals_an_uninterrupted_run(name: str, results: dict[str, Result]) -> None:
    uninterrupted_result, resumed_result = results[name], results[f"{name}, resumed"]
    assert resumed_result.error is None
    assert len(resumed_result.losses) == 2  # the resumed run trains only steps 3 and 4
    assert resumed_result.losses == uninterrupted_result.losses[2:]
    assert resumed_result.grad_norms == uninterrupted_result.grad_norms[2:]
    uninterrupted_tensors, resumed_tensors = load_final_tensors(uninterrupted_result), load_final_tensors(resumed_result)
    assert [key for key in uninterrupted_tensors if not torch.equal(uninterrupted_tensors[key], resumed_tensors[key])] == []


def test_fsdp_checkpoints_contain_weights_and_optimizer_state_once(results: dict[str, Result]) -> None:
    def list_checkpoint_file_names(name: str) -> set[str]:
        return {path.name for path in (Path(results[name].folder) / "checkpoint-2").iterdir()}

    sharded_names, full_names, adapter_names = map(list_checkpoint_file_names, ("fsdp full", "fsdp full, full states", "fsdp lora"))
    assert {"model.safetensors", "optimizer_0", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= sharded_names
    assert {"model.safetensors", "optimizer.bin"} <= full_names and "optimizer_0" not in full_names
    assert {"adapter_model.safetensors", "optimizer_0"} <= adapter_names
    assert not any("pytorch_model_fsdp" in name for name in sharded_names | full_names | adapter_names)


@pytest.mark.parametrize("name", mark_slow_cells(BEST_CHECKPOINT_SPECS))
def test_the_best_weights_are_published(name: str, results: dict[str, Result]) -> None:
    from safetensors.torch import load_file

    result = results[name]
    assert result.error is None
    folder = Path(result.folder)
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    file = "model.safetensors" if "zero2" in name else "adapter_model.safetensors"
    best_weights = load_file(folder / f"checkpoint-{state['best_global_step']}" / file)
    last_weights, final_weights = load_file(folder / "checkpoint-12" / file), load_final_tensors(result)
    assert state["best_global_step"] < 12
    assert [key for key in best_weights if not torch.equal(final_weights[key], best_weights[key])] == []
    assert not all(torch.equal(final_weights[key], last_weights[key]) for key in last_weights)


def test_artefacts_load_in_plain_libraries(model: Path, results: dict[str, Result]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for name in ("fsdp full", "zero3 full"):
        loaded_model = AutoModelForCausalLM.from_pretrained(Path(results[name].folder) / "final", dtype=torch.float32)
        assert torch.isfinite(loaded_model(torch.tensor([[5, 6, 7]])).logits).all()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base_logits = base(torch.tensor([[5, 6, 7]])).logits
    for name in ("fsdp lora", "zero3 lora"):
        tuned_model = PeftModel.from_pretrained(base, Path(results[name].folder) / "final")
        assert not torch.equal(tuned_model(torch.tensor([[5, 6, 7]])).logits, base_logits)
        base = tuned_model.unload()


def test_the_deepspeed_json_sets_options_that_the_spec_does_not_set(results: dict[str, Result]) -> None:
    result = results["zero3 json"]
    message = "\n".join(result.notes)
    assert "gradient_clipping 0.25 of the file replaces the default training.maxGradNorm 1.0" in message
    assert "ZeRO stage 3" in message
    assert result.losses != results["zero3 full"].losses


@pytest.mark.parametrize("name", REFUSED_SPECS)
def test_impossible_combinations_are_refused_with_the_reason(name: str, results: dict[str, Result]) -> None:
    _, code, message = REFUSED_SPECS[name]
    error = results[name].error
    assert error is not None
    assert (error["code"], error["exitCode"]) == (code, 64)
    assert message in error["message"]
    assert error["hint"]
