"""Merging a user's DeepSpeed JSON or accelerate file with the spec. Conflicts and invalid values are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.errors import ConfigError, FineTuneError, NotFoundError
from finetune_trainer.distributed import deepspeed, fsdp

from tests.support.learning import make_run, merge_mappings

CPU_HARDWARE: Any = SimpleNamespace(computes_in_bf16=False, computes_in_fp16=False, name="cpu", is_cpu=True)
GPU_HARDWARE: Any = SimpleNamespace(computes_in_bf16=True, computes_in_fp16=False, name="NVIDIA H200", is_cpu=False)


def build_deepspeed_options(
    tmp_path: Path, file_content: Any, spec: dict[str, Any] | None = None, hardware: Any = CPU_HARDWARE, **options: Any
) -> deepspeed.DeepspeedOptions:
    """Return the DeepSpeed options of a run. `file_content`: the user's DeepSpeed JSON, or None."""
    options_in_spec = dict(options) if file_content is None else {"configRef": {"name": "mine", "key": "ds.json"}, **options}
    job_spec = merge_mappings(spec or {}, {"distributed": {"strategy": "deepspeed", **({"deepspeed": options_in_spec} if options_in_spec else {})}})
    config_maps = {} if file_content is None else {"mine": {"ds.json": file_content if isinstance(file_content, str) else json.dumps(file_content)}}
    run, inputs = make_run(tmp_path, tmp_path / "model", job_spec, ranks=2, config_maps=config_maps)
    return deepspeed.build_options(run, inputs, hardware, 2)


def build_fsdp_options(tmp_path: Path, file_text: str | None, spec: dict[str, Any] | None = None, **options: Any) -> fsdp.FsdpOptions:
    """Return the FSDP options of a run. `file_text`: the user's accelerate file, or None."""
    options_in_spec = dict(options) if file_text is None else {"configRef": {"name": "mine", "key": "a.yaml"}, **options}
    job_spec = merge_mappings(spec or {}, {"distributed": {"strategy": "fsdp", **({"fsdp": options_in_spec} if options_in_spec else {})}})
    run, inputs = make_run(
        tmp_path, tmp_path / "model", job_spec, ranks=2, config_maps={"mine": {"a.yaml": file_text}} if file_text else {}
    )
    return fsdp.build_options(run, inputs, CPU_HARDWARE, 2)


def test_without_a_file_the_options_come_from_the_spec(tmp_path: Path) -> None:
    built_options = build_deepspeed_options(tmp_path, None)
    assert built_options.stage == 2
    assert built_options.config == {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "train_batch_size": 4, "gradient_clipping": 1.0,
        "bf16": {"enabled": False}, "fp16": {"enabled": False}, "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def test_auto_is_replaced_and_options_of_deepspeed_are_kept(tmp_path: Path) -> None:
    file_content = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"}, "wall_clock_breakdown": False,
    }  # fmt: skip
    built_options = build_deepspeed_options(tmp_path, file_content, hardware=GPU_HARDWARE)
    assert (built_options.stage, built_options.config["bf16"]) == (3, {"enabled": True})
    assert built_options.config["zero_optimization"] == {
        "stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": True,
    }  # fmt: skip
    assert (built_options.config["train_batch_size"], built_options.config["wall_clock_breakdown"]) == (4, False)


def test_every_conflict_is_reported_with_both_values(tmp_path: Path) -> None:
    file_content = {
        "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        build_deepspeed_options(tmp_path, file_content, {"training": {"maxGradNorm": 2}}, zeroStage=2)
    assert caught.value.code == "ConfigsDisagree"
    for message_part in (
        "train_micro_batch_size_per_gpu is 8, training.batchSizePerDevice is 2",
        "gradient_clipping is 0.5, training.maxGradNorm is 2.0",
        "optimizer.params.lr is 0.0001, training.learningRate is 0.005",
        "bf16.enabled is true, bf16 on cpu, from training.mixedPrecision, is false",
        "zero_optimization.stage is 1, distributed.deepspeed.zeroStage is 2",
    ):
        assert message_part in caught.value.message
    assert "gradient_accumulation_steps" not in caught.value.message
    assert "auto" in (caught.value.hint or "")


def test_file_values_replace_defaults_with_a_note(tmp_path: Path) -> None:
    file_content = {
        "gradient_clipping": 0.5, "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3}},
        "optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}},
    }  # fmt: skip
    built_options = build_deepspeed_options(tmp_path, file_content, {"training": {"warmupSteps": 3, "warmupRatio": None}})
    assert built_options.training_arguments == {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_grad_norm": 0.5, "optim": "adamw_torch_fused",
        "adam_beta1": 0.8, "adam_beta2": 0.95, "learning_rate": 5e-3, "adam_epsilon": 1e-6, "weight_decay": 0.1,
        "lr_scheduler_type": "linear", "warmup_steps": 3,
    }  # fmt: skip
    assert "optimizer" not in built_options.config and "scheduler" not in built_options.config
    assert "gradient_clipping 0.5 of the file replaces the default training.maxGradNorm 1.0" in built_options.notes


VALUES_BEFORE_HALVING = {"training.batchSizePerDevice": 2, "training.gradientAccumulationSteps": 1, "training.learningRate": 5e-3}
"""The spec's values before the operator halves the micro-batch and the learning rate."""


def build_options_after_halving(tmp_path: Path, file_content: Any, defaults: list[str]) -> deepspeed.DeepspeedOptions:
    spec = {
        "training": {"batchSizePerDevice": 1, "gradientAccumulationSteps": 2, "learningRate": 2.5e-3},
        "distributed": {"strategy": "deepspeed", "deepspeed": {"configRef": {"name": "mine", "key": "ds.json"}}},
    }  # fmt: skip
    run, inputs = make_run(
        tmp_path, tmp_path / "model", spec, ranks=2, config_maps={"mine": {"ds.json": json.dumps(file_content)}}
    )
    run = run.model_copy(update={"before_adaptation": VALUES_BEFORE_HALVING, "defaults": defaults})
    return deepspeed.build_options(run, inputs, CPU_HARDWARE, 2)


def make_batch_config(micro_batch: int, accumulation: int, learning_rate: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation, "train_batch_size": micro_batch * accumulation * 2,
        "optimizer": {"type": "AdamW", "params": {"lr": learning_rate}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": learning_rate}},
    }  # fmt: skip


def test_values_in_both_file_and_spec_are_adapted_as_in_the_spec(tmp_path: Path) -> None:
    built_options = build_options_after_halving(
        tmp_path, make_batch_config(2, 1, 5e-3), defaults=["training.scheduler", "training.optimizer"]
    )
    assert built_options.training_arguments["per_device_train_batch_size"] == 1
    assert built_options.training_arguments["gradient_accumulation_steps"] == 2
    assert built_options.training_arguments["learning_rate"] == 2.5e-3
    assert built_options.config["train_batch_size"] == 4


def test_values_only_in_the_file_are_adapted_by_the_same_factor(tmp_path: Path) -> None:
    built_options = build_options_after_halving(
        tmp_path, make_batch_config(8, 3, 1e-4), defaults=list(VALUES_BEFORE_HALVING) + ["training.scheduler", "training.optimizer"]
    )
    assert built_options.training_arguments["per_device_train_batch_size"] == 4
    assert built_options.training_arguments["gradient_accumulation_steps"] == 6
    assert built_options.training_arguments["learning_rate"] == pytest.approx(5e-5)
    assert built_options.config["train_batch_size"] == 48
    assert (
        "the operator changed training.batchSizePerDevice from 2 to 1; train_micro_batch_size_per_gpu in the file therefore changes "
        "from 8 to 4, and gradient_accumulation_steps from 3 to 6" in built_options.notes
    )
    assert (
        "the operator changed training.learningRate from 0.005 to 0.0025; optimizer.params.lr in the file therefore changes from "
        "0.0001 to 5e-05" in built_options.notes
    )


KTO_SPEC = {"trainer": {"type": "kto"}}
GRPO_SPEC = {"trainer": {"type": "grpo", "rewards": [{"builtin": "regex", "parameters": {"pattern": "e"}}], "grpo": {"numGenerations": 4}}}  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "old_batch", "new_batch", "file_batch", "expected_batch", "expected_note"),
    [
        ({}, (4, 4), (2, 8), (1, None), (1, 4), "of the file stays 1, although"),
        ({}, (4, 4), (2, 8), (5, None), (1, 20), "in the file therefore changes from 5 to 1"),
        ({}, (4, 4), (2, 8), (9, 2), (3, 6), "in the file therefore changes from 9 to 3"),
        ({}, (4, 4), (1, 16), (12, None), (3, 16), "in the file therefore changes from 12 to 3"),
        ({}, (4, 4), (2, 8), (None, 3), (2, 6), "in the file therefore changes from 4 to 2"),
        ({}, (4, 4), (2, 8), (2, 65536), (2, 65536), "of the file stays 2, although"),
        (KTO_SPEC, (4, 4), (2, 8), (2, None), (2, 4), "of the file stays 2, although"),
        (KTO_SPEC, (8, 4), (2, 16), (6, None), (2, 12), "in the file therefore changes from 6 to 2"),
        (merge_mappings(GRPO_SPEC, {"evaluation": {"strategy": "no"}}), (4, 4), (2, 8), (2, None), (1, 8), "in the file therefore changes from 2 to 1"),
    ],
)  # fmt: skip
def test_the_micro_batch_of_a_file_is_reduced_without_breaking_a_rule(
    spec: dict[str, Any], old_batch: tuple[int, int], new_batch: tuple[int, int], file_batch: tuple[int | None, int | None],
    expected_batch: tuple[int, int], expected_note: str, tmp_path: Path,
) -> None:  # fmt: skip
    """When the operator reduces the micro-batch, the effective batch that the file sets does not change. The new values satisfy the rules of the API."""
    field_paths = ("training.batchSizePerDevice", "training.gradientAccumulationSteps")
    training_spec = dict(zip(("batchSizePerDevice", "gradientAccumulationSteps"), new_batch, strict=True))
    distributed_spec = {"strategy": "deepspeed", "deepspeed": {"configRef": {"name": "mine", "key": "ds.json"}}}
    file_keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    file_text = json.dumps({key: value for key, value in zip(file_keys, file_batch, strict=True) if value})
    run, inputs = make_run(
        tmp_path, tmp_path / "model", merge_mappings(spec, {"training": training_spec, "distributed": distributed_spec}), ranks=2,
        config_maps={"mine": {"ds.json": file_text}},
    )  # fmt: skip
    run_before_reduction = run.model_copy(
        update={"spec": run.spec.with_values(dict(zip(field_paths, old_batch, strict=True))), "defaults": list(field_paths)}
    )
    run_after_reduction = run.model_copy(update={"before_adaptation": dict(zip(field_paths, old_batch, strict=True)), "defaults": list(field_paths)})
    effective_batch = deepspeed.build_options(run_before_reduction, inputs, CPU_HARDWARE, 2).config["train_batch_size"]
    built_options = deepspeed.build_options(run_after_reduction, inputs, CPU_HARDWARE, 2)
    assert (built_options.config[file_keys[0]], built_options.config[file_keys[1]]) == expected_batch
    assert built_options.config["train_batch_size"] == effective_batch == expected_batch[0] * expected_batch[1] * 2
    assert any(expected_note in note for note in built_options.notes)


def test_an_adapted_value_is_compared_with_the_value_that_the_user_wrote(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_micro_batch_size_per_gpu is 1, training.batchSizePerDevice is 2"):
        build_options_after_halving(tmp_path, {"train_micro_batch_size_per_gpu": 1}, defaults=[])


def test_gradient_checkpointing_that_the_operator_enabled_does_not_conflict_with_an_accelerate_file(
    tmp_path: Path,
) -> None:
    spec = {
        "training": {"gradientCheckpointing": "enabled"},
        "distributed": {"strategy": "fsdp", "fsdp": {"configRef": {"name": "mine", "key": "a.yaml"}}},
    }
    file_text = "fsdp_config: {fsdp_activation_checkpointing: false}\n"
    run, inputs = make_run(tmp_path, tmp_path / "model", spec, ranks=2, config_maps={"mine": {"a.yaml": file_text}})
    with pytest.raises(ConfigError, match="gradientCheckpointing is true"):
        fsdp.build_options(run, inputs, CPU_HARDWARE, 2)
    run = run.model_copy(update={"before_adaptation": {"training.gradientCheckpointing": "disabled"}})
    fsdp.build_options(run, inputs, CPU_HARDWARE, 2)


def test_offloading_uses_the_optimizer_of_torch(tmp_path: Path) -> None:
    built_options = build_deepspeed_options(
        tmp_path,
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}},
        offloadOptimizer=True,
    )
    assert built_options.config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert built_options.config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert built_options.config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("file_content", "options", "code", "message_part"),
    [
        ("{", {}, "ConfigFileInvalid", "neither JSON nor YAML"),
        ("[1]", {}, "ConfigFileInvalid", "holds list"),
        ({"elasticity": {}}, {}, "ConfigFileInvalid", "the operator decides"),
        ({"optimizer": {"type": "OneBitAdam"}}, {}, "ConfigFileInvalid", "DeepSpeed compiles optimizer OneBitAdam"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": False}}, {}, "ConfigFileInvalid",
            "DeepSpeed compiles zero_optimization.zero_quantized_weights on first use",
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, {}, "ConfigFileInvalid", "compiles zero_optimization.zenflow"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}}, {}, "ConfigFileInvalid",
            "compiles zero_optimization.offload_optimizer.super_offload",
        ),
        ({"checkpoint": {"writer": {"type": "fast"}}}, {}, "ConfigFileInvalid", "compiles checkpoint.writer"),
        ({"optimizer": {"type": "AdamW", "params": {"freeze_step": 3}}}, {}, "ConfigFileInvalid", "freeze_step would have no effect"),
        ({"scheduler": {"type": "OneCycle"}}, {}, "ConfigFileInvalid", "OneCycle"),
        ({"comms_logger": {"enabled": "auto"}}, {}, "ConfigFileInvalid", "comms_logger.enabled is auto"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, {}, "ConfigFileInvalid", "nvme"),
        ({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}}, {}, "ConfigsDisagree", "loadable checkpoint"),
        ({"zero_optimization": {"stage": 2}}, {"offloadParameters": True}, "OffloadNeedsStage3", "stage is 2"),
        ({"zero_optimization": {"stage": 0}}, {"offloadOptimizer": True}, "OffloadNeedsStage1", "stage 0"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {"offloadOptimizer": False}, "ConfigsDisagree", "offloadOptimizer"),
        ({"zero_optimisation": {"stage": 3}}, {}, "ConfigFileInvalid", "zero_optimisation (did you mean zero_optimization?) would have no effect"),
        ({"quantize_training": {"enabled": True}}, {}, "ConfigFileInvalid", "quantize_training (this version of DeepSpeed"),
        ({"progressive_layer_drop": {"enabled": True}}, {}, "ConfigFileInvalid", "progressive_layer_drop"),
        ({"amp": {"enabled": True}}, {}, "ConfigFileInvalid", "amp"),
        ({"csv_monitor": {"enabled": True}}, {}, "ConfigFileInvalid", "`tracking` decides where"),
        ({"zero_optimization": {"cpu_offload": True}}, {}, "ConfigFileInvalid", "called offload_optimizer"),
        ({"fp16": True}, {}, "ConfigFileInvalid", "fp16 is true, not a mapping"),
        ({"bf16": {"enabled": "false"}}, {}, "ConfigFileInvalid", 'bf16.enabled is "false", not true or false'),
        ({"zero_optimization": 3}, {}, "ConfigFileInvalid", "zero_optimization is 3, not a mapping"),
        ({"zero_optimization": "auto"}, {}, "ConfigFileInvalid", "zero_optimization is auto, not a mapping"),
        ({"zero_optimization": {"stage": "3"}}, {}, "ConfigFileInvalid", 'stage is "3", not one of 0, 1, 2, 3'),
        ({"zero_optimization": {"stage": 7}}, {}, "ConfigFileInvalid", "stage is 7, not one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, {}, "ConfigFileInvalid", "stage is true, not one of"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, {}, "ConfigFileInvalid", "offload_optimizer is cpu, not a mapping"),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, {}, "ConfigFileInvalid", "device is gpu, not one of none, cpu, nvme"),
        ({"optimizer": "AdamW"}, {}, "ConfigFileInvalid", "optimizer is AdamW, not a mapping"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, {}, "ConfigFileInvalid", "betas is [0.9], not two numbers"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}}}, {}, "ConfigFileInvalid", 'lr is "1e-4", not a number above 0'),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 11}}}, {}, "ConfigFileInvalid", "training.weightDecay 11"),
        ({"scheduler": "WarmupLR"}, {}, "ConfigFileInvalid", "scheduler is WarmupLR, not a mapping"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0.1}}}, {}, "ConfigFileInvalid", "warmup_num_steps is 0.1"),
        ({"gradient_clipping": -1}, {}, "ConfigFileInvalid", "gradient_clipping is -1, not a number of at least 0"),
        ({"train_micro_batch_size_per_gpu": "8"}, {}, "ConfigFileInvalid", 'train_micro_batch_size_per_gpu is "8", not a whole number'),
        ({"zero_force_ds_cpu_optimizer": True}, {}, "ConfigsDisagree", "zero_force_ds_cpu_optimizer is true"),
        ("{3: 4}", {}, "ConfigFileInvalid", "keys that are not text: 3"),
    ],
)  # fmt: skip
def test_an_invalid_deepspeed_json_is_refused(
    file_content: Any, options: dict[str, Any], code: str, message_part: str, tmp_path: Path
) -> None:
    with pytest.raises(FineTuneError) as caught:
        build_deepspeed_options(tmp_path, file_content, **options)
    assert (caught.value.code, caught.value.exit_code) == (code, 64)
    assert message_part in caught.value.message


UNSET_BATCH_SPEC = {"training": {"batchSizePerDevice": None, "gradientAccumulationSteps": None}}


@pytest.mark.parametrize(
    ("file_content", "spec", "code", "message_part"),
    [
        ({"train_micro_batch_size_per_gpu": 1}, merge_mappings(UNSET_BATCH_SPEC, KTO_SPEC), "BatchTooSmall", "kto compares"),
        (
            {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1}, merge_mappings(UNSET_BATCH_SPEC, GRPO_SPEC),
            "GenerationsDoNotDivide", "one optimizer step has 6 completions",
        ),
        ({"zero_optimization": {"stage": 3}}, {"method": {"type": "spectrum"}}, "StrategyAndMethod", "spectrum needs whole"),
    ],
)  # fmt: skip
def test_values_of_a_file_must_satisfy_the_rules_of_the_spec(
    file_content: Any, spec: dict[str, Any], code: str, message_part: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_deepspeed_options(tmp_path, file_content, spec)
    assert caught.value.code == code
    assert message_part in caught.value.message and "with the values of the DeepSpeed JSON" in caught.value.message


def test_adamw_in_the_file_agrees_with_both_adamw_implementations_of_torch(tmp_path: Path) -> None:
    built_options = build_deepspeed_options(tmp_path, {"optimizer": {"type": "AdamW"}}, {"training": {"optimizer": "adamw_torch"}})
    assert built_options.training_arguments["optim"] == "adamw_torch"
    with pytest.raises(ConfigError, match="optimizer.type is Adam, training.optimizer is sgd"):
        build_deepspeed_options(tmp_path, {"optimizer": {"type": "Adam"}}, {"training": {"optimizer": "sgd"}})


def test_a_conflict_message_uses_the_schedule_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"scheduler.type is WarmupLR \(constantWithWarmup\), training.scheduler is linear"
    ):
        build_deepspeed_options(tmp_path, {"scheduler": {"type": "WarmupLR"}}, {"training": {"scheduler": "linear"}})


def test_warmup_steps_of_a_file_replace_a_default_ratio(tmp_path: Path) -> None:
    file_content = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}
    assert build_deepspeed_options(tmp_path, file_content, {"training": {"warmupRatio": None}}).training_arguments["warmup_steps"] == 0


def test_null_values_and_disabled_sections_are_ignored(tmp_path: Path) -> None:
    file_content = {
        "amp": {"enabled": False}, "fp16": None, "steps_per_print": 1e5,
        "zero_optimization": {"stage": 2, "offload_optimizer": None, "overlap_comm": None},
    }  # fmt: skip
    built_options = build_deepspeed_options(tmp_path, file_content)
    assert "amp" not in built_options.config and built_options.config["zero_optimization"] == {"stage": 2}
    assert "sections that the DeepSpeed JSON disables are ignored: amp" in built_options.notes


def test_deepspeed_validates_its_own_sections(tmp_path: Path) -> None:
    valid_content = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_max_live_parameters": 1e9}}
    deepspeed.validate_with_deepspeed(build_deepspeed_options(tmp_path, valid_content).config)
    for file_content, message_part in (
        ({"zero_optimization": {"overlapcomm": True}}, "overlapcomm: Extra inputs are not permitted"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size: Input should be a valid"),
        ({"gradient_allreduce_op": "max"}, "Got: 'max'"),
    ):
        with pytest.raises(ConfigError) as caught:
            deepspeed.validate_with_deepspeed(build_deepspeed_options(tmp_path, file_content).config)
        assert caught.value.code == "ConfigFileInvalid" and message_part in caught.value.message


def test_a_missing_config_map_is_named(tmp_path: Path) -> None:
    run, inputs = make_run(
        tmp_path,
        tmp_path,
        {"distributed": {"strategy": "deepspeed", "deepspeed": {"configRef": {"name": "mine", "key": "ds.json"}}}},
        ranks=2,
    )
    with pytest.raises(NotFoundError) as caught:
        deepspeed.build_options(run, inputs, CPU_HARDWARE, 2)
    assert caught.value.code == "ConfigMapMissing"


# ---- accelerate


def test_without_a_file_the_options_of_fsdp_are_defaults(tmp_path: Path) -> None:
    built_options = build_fsdp_options(tmp_path, None)
    assert (built_options.sharding, built_options.state_dict, built_options.offloads_to_cpu) == ("fullShard", "sharded", False)


def test_values_of_an_accelerate_file_are_used(tmp_path: Path) -> None:
    file_text = """
distributed_type: FSDP
num_machines: 1
machine_rank: 0
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: false
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_offload_params: true
  fsdp_auto_wrap_policy: SIZE_BASED_WRAP
  fsdp_min_num_params: 1000
"""
    built_options = build_fsdp_options(tmp_path, file_text)
    assert (built_options.sharding, built_options.state_dict, built_options.offloads_to_cpu) == ("shardGradOp", "full", True)
    assert built_options.wrap_policy == {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 1000}
    assert any("machine_rank" in note and "the operator starts the ranks" in note for note in built_options.notes)


@pytest.mark.parametrize(("spelling", "expected_size"), [("1.0e+8", 10**8), ("'2000'", 2000), ("0.0", None)])
def test_a_size_may_be_written_as_any_whole_number(spelling: str, expected_size: int | None, tmp_path: Path) -> None:
    file_text = f"fsdp_config: {{fsdp_auto_wrap_policy: SIZE_BASED_WRAP, fsdp_min_num_params: {spelling}}}\n"
    min_num_params = build_fsdp_options(tmp_path, file_text).wrap_policy.get("min_num_params")
    assert (min_num_params, type(min_num_params)) == (expected_size, type(expected_size))


@pytest.mark.parametrize(
    ("names_in_file", "layer_names"), [("'Block,'", ["Block"]), ("['Block', ' ']", ["Block"]), ("','", None)]
)
def test_empty_layer_names_are_ignored(names_in_file: str, layer_names: list[str] | None, tmp_path: Path) -> None:
    built_options = build_fsdp_options(tmp_path, f"fsdp_config: {{fsdp_transformer_layer_cls_to_wrap: {names_in_file}}}\n")
    assert built_options.wrap_policy.get("transformer_layer_cls_to_wrap") == layer_names


@pytest.mark.parametrize("spelling", ["no", "'no'"])
def test_an_unquoted_no_is_read_as_a_precision(spelling: str, tmp_path: Path) -> None:
    assert build_fsdp_options(tmp_path, f"mixed_precision: {spelling}\n") == fsdp.FsdpOptions()
    with pytest.raises(ConfigError, match="mixed_precision is bf16, the precision from training.mixedPrecision is no"):
        build_fsdp_options(tmp_path, "mixed_precision: bf16\n")


@pytest.mark.parametrize(("spelling", "offloads_to_cpu"), [("yes", True), ("'True'", True), ("false", False), ("'no'", False), ("null", False)])  # fmt: skip
def test_a_boolean_may_have_several_spellings(spelling: str, offloads_to_cpu: bool, tmp_path: Path) -> None:
    assert build_fsdp_options(tmp_path, f"fsdp_config: {{fsdp_offload_params: {spelling}}}\n").offloads_to_cpu is offloads_to_cpu


def test_unknown_layer_classes_are_refused_by_name(tmp_path: Path) -> None:
    class Block:
        pass

    built_options = build_fsdp_options(tmp_path, "fsdp_config: {fsdp_transformer_layer_cls_to_wrap: 'Block, NoSuchLayer'}\n")
    assert built_options.wrap_policy["transformer_layer_cls_to_wrap"] == ["Block", "NoSuchLayer"]
    run, _ = make_run(tmp_path, tmp_path / "model", {"distributed": {"strategy": "fsdp"}}, ranks=2)
    trainer: Any = SimpleNamespace(model=SimpleNamespace(modules=lambda: [Block()]))
    with pytest.raises(ConfigError) as caught:
        fsdp.Fsdp(run, CPU_HARDWARE, 2, built_options).on_accelerator_created(trainer)
    assert caught.value.code == "ConfigFileInvalid"
    assert "names NoSuchLayer, which the model does not have" in caught.value.message
    assert caught.value.hint == "remove it, or write one of these classes: Block"


@pytest.mark.parametrize(
    ("file_text", "options", "code", "message_part"),
    [
        ("fsdp_config: true\n", {}, "ConfigFileInvalid", "fsdp_config is true, not a mapping"),
        ("fsdp_config: {fsdp_auto_wrap_policy: SIZE_BASED_WRAP, fsdp_min_num_params: abc}\n", {}, "ConfigFileInvalid", "min_num_params is abc"),
        ("fsdp_config: {fsdp_auto_wrap_policy: SIZE_BASED_WRAP, fsdp_min_num_params: 1.5}\n", {}, "ConfigFileInvalid", "min_num_params is 1.5"),
        ("fsdp_config: {fsdp_auto_wrap_policy: SIZE_BASED_WRAP, fsdp_min_num_params: true}\n", {}, "ConfigFileInvalid", "min_num_params is true"),
        ("fsdp_config: {fsdp_min_num_params: 1000}\n", {}, "ConfigFileInvalid", "only read with SIZE_BASED_WRAP"),
        (
            "fsdp_config: {fsdp_auto_wrap_policy: NO_WRAP, fsdp_transformer_layer_cls_to_wrap: Block}\n", {},
            "ConfigFileInvalid", "only read with TRANSFORMER_BASED_WRAP",
        ),
        ("fsdp_config: {fsdp_auto_wrap_policy: FOO}\n", {}, "ConfigFileInvalid", "FOO, not one of TRANSFORMER_BASED_WRAP"),
        ("fsdp_config: {fsdp_auto_wrap_policy: auto}\n", {}, "ConfigFileInvalid", "auto_wrap_policy is auto"),
        ("fsdp_config: {fsdp_offload_params: maybe}\n", {}, "ConfigFileInvalid", "offload_params is maybe, not true or false"),
        ("mixed_precision: bf17\n", {}, "ConfigFileInvalid", "bf17, not one of no, fp16, bf16, fp8"),
        ("num_processes: '2'\n", {}, "ConfigFileInvalid", 'num_processes is "2", not a whole number'),
        ("1: 2\nx: 3\n", {}, "ConfigFileInvalid", "keys that are not text: 1"),
        ("fsdp_config: {3: true, fsdp_version: 2}\n", {}, "ConfigFileInvalid", "keys that are not text: 3"),
        ("distributed_type: MULTI_GPU\nnum_processes: 8\n", {}, "ConfigsDisagree", "num_processes is 8, the number of ranks is 2"),
        ("mixed_precision: bf16\n", {}, "ConfigsDisagree", "mixed_precision is bf16"),
        ("fsdp_config: {fsdp_sharding_strategy: FULL_SHARD}\n", {"sharding": "shardGradOp"}, "ConfigsDisagree", "shardGradOp"),
        (
            "fsdp_config: {fsdp_sharding_strategy: FULL_SHARD, fsdp_reshard_after_forward: false}\n", {},
            "ConfigsDisagree", "fsdp_reshard_after_forward means shardGradOp",
        ),
        ("fsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}\n", {}, "ConfigFileInvalid", "HYBRID_SHARD"),
        ("fsdp_config: {fsdp_version: 1}\n", {}, "ConfigFileInvalid", "fsdp_version 1"),
        ("fsdp_config: {fsdp_cpu_ram_efficient_loading: true}\n", {}, "ConfigFileInvalid", "every rank reads"),
        ("fsdp_config: {fsdp_activation_checkpointing: true}\n", {}, "ConfigsDisagree", "gradientCheckpointing is false"),
        ("fsdp_config: {fsdp_colour: red}\n", {}, "ConfigFileInvalid", "fsdp_config.colour would have no effect"),
        ("fp8_config: {}\n", {}, "ConfigFileInvalid", "fp8_config would have no effect"),
        ("fsdp_config: {fsdp_state_dict_type: LOCAL_STATE_DICT}\n", {}, "StateDictUnavailable", "version 2"),
    ],
)  # fmt: skip
def test_an_invalid_accelerate_file_is_refused(
    file_text: str, options: dict[str, Any], code: str, message_part: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_fsdp_options(tmp_path, file_text, **options)
    assert caught.value.code == code
    assert message_part in caught.value.message
