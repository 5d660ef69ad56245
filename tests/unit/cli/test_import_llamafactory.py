"""The importer `llamafactory`, and the training arguments of transformers that this importer and others accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_cli.importers.llamafactory import OPTION_TABLE

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

PUBLISHED_FILES_URL = "https://raw.githubusercontent.com/hiyouga/LLaMA-Factory/main/data/"
BASE_SETTINGS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all",
    "dataset": "alpaca_en_demo", "template": "qwen3_nothink", "cutoff_len": 1024, "output_dir": "saves/x", "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "bf16": True,
}  # fmt: skip


@pytest.fixture
def import_settings(write_file: WriteFile) -> Any:
    """Return a function that imports `BASE_SETTINGS` with changes as a LLaMA-Factory file. If the changed value of a key is None, the file does not contain
    the key.
    """

    def run(changes: dict[str, Any] | None = None, *files: Path, **options: Any) -> ImportOutcome:
        settings = {key: value for key, value in (BASE_SETTINGS | (changes or {})).items() if value is not None}
        return import_files(write_file("run.yaml", yaml.safe_dump(settings, sort_keys=False)), *files, **options)

    return run


def test_a_file_is_recognised_and_becomes_a_job(import_settings: Any) -> None:
    import_outcome = import_settings()
    assert import_outcome.mistakes == []
    assert import_outcome.at("method") == {"type": "lora", "lora": {"rank": 8, "alpha": 16, "targetModules": ["all-linear"]}}
    assert import_outcome.at("dataset") == {
        "train": f"{PUBLISHED_FILES_URL}alpaca_en_demo.json", "format": "alpaca", "maxSequenceLength": 1024, "responseOnly": {"enabled": True},
    }  # fmt: skip
    assert import_outcome.at("training.scheduler") == "linear"
    assert import_outcome.at("checkpoint") == {"strategy": "steps", "steps": 500, "keep": 0}


@pytest.mark.parametrize(
    ("changes", "path", "expected"),
    [
        ({"quantization_bit": 4}, "method.type", "qlora"),
        ({"finetuning_type": "full", "lora_rank": None, "lora_target": None}, "method", {"type": "full"}),
        ({"lora_target": "q_proj,v_proj"}, "method.lora.targetModules", ["q_proj", "v_proj"]),
        ({"adapter_name_or_path": "org/adapter", "lora_rank": None, "lora_target": None}, "method",
         {"type": "adapter", "adapter": {"source": "org/adapter"}}),
        ({"pissa_init": True}, "method.lora.init", "pissa"),
        ({"loraplus_lr_ratio": 16.0}, "method.lora.plusRatio", 16.0),
        ({"flash_attn": "fa2"}, "model.attention", "flashAttention2"),
        ({"use_unsloth_gc": True}, "training.gradientCheckpointing", "unsloth"),
        ({"pure_bf16": True, "bf16": None}, "model.dtype", "bfloat16"),
        ({"stage": "pt", "dataset": "c4_demo", "template": None}, "dataset.packing", True),
        ({"stage": "dpo", "dataset": "dpo_en_demo", "pref_beta": 0.2, "pref_loss": "hinge"}, "trainer",
         {"type": "dpo", "dpo": {"beta": 0.2, "lossTypes": ["hinge"]}}),
        ({"stage": "dpo", "dataset": "dpo_en_demo", "pref_loss": "orpo"}, "trainer", {"type": "orpo"}),
        ({"stage": "dpo", "dataset": "dpo_en_demo"}, "dataset.columns", {"question": "conversations", "chosen": "chosen", "rejected": "rejected"}),
        ({"stage": "kto", "dataset": "kto_en_demo"}, "dataset.columns", {"question": "messages", "answer": "messages", "label": "label"}),
        ({"stage": "kto", "dataset": "kto_en_demo"}, "training.batchSizePerDevice", 2),
        ({"stage": "rm", "dataset": "dpo_en_demo"}, "trainer", {"type": "reward"}),
        ({"dataset": "identity,alpaca_en_demo"}, "dataset.mixture",
         [{"source": f"{PUBLISHED_FILES_URL}identity.json", "weight": 91}, {"source": f"{PUBLISHED_FILES_URL}alpaca_en_demo.json", "weight": 999}]),
        ({"dataset": "identity,alpaca_en_demo", "mix_strategy": "interleave_over", "interleave_probs": "0.3,0.7"}, "dataset.mixture",
         [{"source": f"{PUBLISHED_FILES_URL}identity.json", "weight": 0.3}, {"source": f"{PUBLISHED_FILES_URL}alpaca_en_demo.json", "weight": 0.7}]),
        ({"dataset": "openorca"}, "dataset.columns", {"question": "question", "answer": "response", "system": "system_prompt"}),
        ({"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 50}, "evaluation", {"strategy": "steps", "steps": 50}),
        ({"deepspeed": "examples/deepspeed/ds_z2_offload_config.json"}, "distributed.deepspeed", {"zeroStage": 2, "offloadOptimizer": True}),
        ({"fsdp": "full_shard auto_wrap"}, "distributed", {"strategy": "fsdp", "fsdp": {"sharding": "fullShard"}}),
        ({"fsdp": "full_shard", "fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}}, "distributed.fsdp.stateDict", "sharded"),
        ({"warmup_ratio": 0.1}, "training.warmupRatio", 0.1),
        ({"save_steps": 0.1, "max_steps": 1000}, "checkpoint.steps", 100),
        ({"report_to": "none"}, "tracking.reportTo", []),
        ({"template": "qwen3", "enable_thinking": False}, "dataset.templateVariables", {"enable_thinking": "false"}),
        ({"template": None, "enable_thinking": False}, "dataset.templateVariables", {"enable_thinking": "false"}),
        ({"push_to_hub": True, "hub_model_id": "org/out"}, "output.hub.repository", "org/out"),
        ({"train_on_prompt": True}, "dataset.responseOnly.enabled", False),
        ({"ray_num_workers": 4}, "resources.gpusPerNode", 4),
        ({"optim": "adamw_hf"}, "training.optimizer", "adamw_torch"),
    ],
)  # fmt: skip
def test_options_set_fields_of_the_spec(import_settings: Any, changes: dict[str, Any], path: str, expected: Any) -> None:
    import_outcome = import_settings(changes)
    assert import_outcome.mistakes == []
    assert import_outcome.at(path) == expected


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"finetuning_type": "freeze"}, "training of the last layers (freeze)"),
        ({"finetuning_type": "oft"}, "OFT"),
        ({"stage": "ppo"}, "PPO"),
        ({"use_galore": True}, "the optimizer GaLore"),
        ({"mixture_of_depths": "convert"}, "mixture of depths"),
        ({"use_dft_loss": True}, "a loss other than the cross entropy"),
        ({"quantization_bit": 3}, "3-bit weights"),
        ({"quantization_method": "hqq"}, "the quantisation hqq"),
        ({"tensor_model_parallel_size": 2}, "tensor parallelism"),
        ({"template": "qwen2_vl"}, "training on images, video or audio"),
        ({"template": "deepseekr1", "model_name_or_path": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "enable_thinking": False},
         "answers without reasoning in the chat template deepseekr1"),
        ({"dataset": "mllm_demo"}, "training on images, video or audio"),
        ({"dataset": "alpaca_en", "max_samples": 1000}, "a limit of 1000 rows for each data set"),
        ({"dataset": "dpo_mix_en", "stage": "dpo"}, "the configuration en of the data set dpo_mix_en on the hub"),
        ({"stage": "dpo"}, "dpo on the data set alpaca_en_demo, whose rows have no better and worse answer"),
        ({"eval_strategy": "epoch", "val_size": 20}, "a number of validation rows"),
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "LOCAL_STATE_DICT"}}, "the state dict LOCAL_STATE_DICT of FSDP"),
        ({"fsdp": True, "fsdp_config": "fsdp.json"}, "reading the FSDP configuration fsdp.json from a file"),
        ({"save_strategy": "best"}, "saving only checkpoints that are better than all earlier ones"),
    ],
)
def test_a_refused_option_names_the_missing_feature(import_settings: Any, changes: dict[str, Any], feature: str) -> None:
    assert any(
        f"a FineTuneJob does not support {feature}" in mistake for mistake in import_settings(changes).mistakes
    )


def test_the_switch_for_reasoning_has_no_effect_without_reasoning(import_settings: Any) -> None:
    import_outcome = import_settings({"enable_thinking": False})
    assert import_outcome.mistakes == [] and import_outcome.at("dataset.templateVariables") is None
    assert "enable_thinking: no effect: the chat template qwen3_nothink has no reasoning" in import_outcome.notes


def test_an_unknown_word_of_fsdp_is_refused(import_settings: Any) -> None:
    (mistake,) = import_settings({"fsdp": "full_sharding auto_wrap"}).mistakes
    assert mistake.endswith(
        "fsdp: full_sharding is not an option of FSDP; "
        "write one or more of full_shard, shard_grad_op, no_shard, hybrid_shard, hybrid_shard_zero2, auto_wrap, offload"
    )


def test_data_sets_are_found_in_the_users_dataset_info(import_settings: Any, write_file: WriteFile) -> None:
    dataset_info = {
        "mine": {"file_name": "s3://b/mine.jsonl", "columns": {"prompt": "q", "response": "a"}},
        "hub": {"hf_hub_url": "org/hub"},
    }
    file = write_file("dataset_info.json", json.dumps(dataset_info))
    assert import_settings({"dataset": "hub"}, file).at("dataset.train") == "org/hub"
    (mistake,) = import_settings({"dataset": "other"}, file).mistakes
    assert (
        mistake
        == "run.yaml:7: dataset: no dataset_info.json describes the data set other; give the dataset_info.json as a further file, or --data URI"
    )
    assert import_settings({"dataset": "other"}, overrides={"dataset.train": "org/d"}).at("dataset.train") == "org/d"


def test_overrides_on_the_command_line_replace_values_of_the_file(import_settings: Any) -> None:
    import_outcome = import_settings(words="llamafactory-cli train run.yaml learning_rate=1e-5 lora_rank=4")
    assert (import_outcome.at("training.learningRate"), import_outcome.at("method.lora.rank")) == (1e-5, 4)


def test_push_without_repository_is_refused(import_settings: Any) -> None:
    (mistake,) = import_settings({"push_to_hub": True}).mistakes
    assert (
        mistake
        == "run.yaml:15: push_to_hub: push_to_hub is true, but hub_model_id is missing; write hub_model_id: org/name"
    )


def test_tokens_are_stored_in_a_secret(import_settings: Any) -> None:
    import_outcome = import_settings({"hf_hub_token": "hf_abc123secret"})
    assert import_outcome.secrets == {"hf-token": "hf_abc123secret"}
    assert import_outcome.at("model.tokenSecretRef") == {"name": "run-import", "key": "hf-token"}


def test_unknown_keys_are_refused(import_settings: Any) -> None:
    assert "did you mean lora_rank?" in import_settings({"lora_ranks": 1}).mistakes[0]


def test_no_key_is_in_two_rows_of_the_option_table() -> None:
    keys = [key for option_row in OPTION_TABLE for key in (option_row.key, *option_row.aliases)]
    assert sorted(key for key in set(keys) if keys.count(key) > 1) == []
