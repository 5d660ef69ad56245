"""The importer `axolotl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_cli.importers.axolotl import OPTION_TABLE
from finetune_cli.importers.module_patterns import UnsupportedPattern, expand_pattern

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

BASE_SETTINGS: dict[str, Any] = {
    "base_model": "org/model-instruct", "datasets": [{"path": "org/data", "type": "chat_template"}], "adapter": "lora", "lora_r": 8, "lora_alpha": 16,
    "lora_target_linear": True, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 2, "learning_rate": "2e-4", "sequence_len": 1024,
}  # fmt: skip


@pytest.fixture
def import_settings(write_file: WriteFile) -> Any:
    """Return a function that imports `BASE_SETTINGS` with changes as an Axolotl file. If the changed value of a key is None, the file does not contain the
    key.
    """

    def run(changes: dict[str, Any] | None = None, *files: Path, **options: Any) -> ImportOutcome:
        settings = {key: value for key, value in (BASE_SETTINGS | (changes or {})).items() if value is not None}
        return import_files(write_file("run.yaml", yaml.safe_dump(settings, sort_keys=False)), *files, **options)

    return run


def test_a_file_is_recognised_and_becomes_a_job(import_settings: Any) -> None:
    import_outcome = import_settings()
    assert import_outcome.mistakes == []
    assert import_outcome.at("method") == {
        "type": "lora",
        "lora": {"rank": 8, "alpha": 16, "dropout": 0, "targetModules": ["all-linear"]},
    }
    assert import_outcome.at("dataset") == {
        "train": "org/data", "format": "messages", "maxSequenceLength": 1024, "overflow": "drop", "packing": False, "responseOnly": {"enabled": True},
    }  # fmt: skip
    assert import_outcome.at("training.learningRate") == 2e-4
    assert import_outcome.at("checkpoint") == {"strategy": "epoch"}


@pytest.mark.parametrize(
    ("changes", "path", "expected"),
    [
        ({"adapter": "qlora", "load_in_4bit": True}, "method.type", "qlora"),
        ({"load_in_8bit": True}, "model.quantization.bits", 8),
        ({"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": None}, "method", {"type": "full"}),
        ({"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]}, "method.lora.targetModules", ["q_proj", "v_proj"]),
        (
            {"lora_target_linear": None, "lora_target_modules": r"model.layers.[\d]+.mlp.(up|down)_proj"},
            "method.lora.targetModules", ["mlp.up_proj", "mlp.down_proj"],
        ),
        ({"revision_of_model": "abc123"}, "model.source", "org/model-instruct@abc123"),
        ({"special_tokens": {"pad_token": "<pad>"}}, "model.padToken", "<pad>"),
        ({"tokens": ["<think>"]}, "model.newTokens", ["<think>"]),
        ({"val_set_size": 0.05}, "dataset.split", {"validation": 0.05, "seed": 42}),
        ({"val_set_size": 0.05, "seed": 7}, "dataset.split.seed", 7),
        ({"datasets": [{"path": "org/d", "type": "completion", "field": "body"}]}, "dataset.columns", {"text": "body"}),
        ({"datasets": [{"path": "org/d", "type": "chat_template", "split": "train[:20%]"}]}, "dataset.split", {"train": 0.2, "validation": 0.8}),
        (
            {"datasets": [{"path": "org/d", "type": "chat_template", "split": "train[:20%]"}], "val_set_size": 0.1},
            "dataset.split", {"train": 0.18, "validation": 0.02, "test": 0.8, "seed": 42},
        ),
        (
            {"datasets": [{"path": "org/d", "type": "alpaca", "data_files": ["a/b.jsonl"]}]},
            "dataset.train", "https://huggingface.co/datasets/org/d/resolve/main/a/b.jsonl",
        ),
        ({"datasets": [{"path": "s3://data/t.jsonl", "type": "alpaca"}]}, "dataset.format", "alpaca"),
        (
            {"rl": "dpo", "datasets": [{"path": "org/d", "type": "chat_template.default", "field_messages": "conversation"}]},
            "dataset.columns", {"question": "conversation"},
        ),
        ({"rl": "ipo", "datasets": [{"path": "org/d", "type": "chatml.intel"}]}, "trainer", {"type": "dpo", "dpo": {"lossTypes": ["ipo"]}}),
        ({"rl": "kto", "rl_beta": 0.2, "datasets": [{"path": "org/d", "type": "llama3.ultra"}]}, "trainer", {"type": "kto", "dpo": {"beta": 0.2}}),
        ({"reward_model": True, "datasets": [{"path": "org/d", "type": "bradley_terry.chat_template"}]}, "trainer.type", "reward"),
        ({"batch_size": 8, "gradient_accumulation_steps": None}, "training.gradientAccumulationSteps", 4),
        ({"warmup_steps": 0.1}, "training.warmupRatio", 0.1),
        ({"warmup_steps": 10}, "training.warmupSteps", 10),
        ({"bf16": "auto"}, "training.mixedPrecision", "auto"),
        ({"gradient_checkpointing": "offload"}, "training.gradientCheckpointing", "unsloth"),
        ({"cosine_min_lr_ratio": 0.1}, "training.schedulerParameters", {"min_lr_rate": "0.1"}),
        ({"attn_implementation": "flash_attention_2"}, "model.attention", "flashAttention2"),
        ({"sdp_attention": True}, "model.attention", "sdpa"),
        ({"max_steps": 100, "num_epochs": 1, "saves_per_epoch": 4}, "checkpoint", {"strategy": "steps", "steps": 25}),
        ({"save_steps": 50}, "checkpoint", {"strategy": "steps", "steps": 50}),
        ({"deepspeed": "deepspeed_configs/zero3_bf16_cpuoffload_all.json"}, "distributed.deepspeed",
         {"zeroStage": 3, "offloadOptimizer": True, "offloadParameters": True}),
        (
            {"deepspeed": "deepspeed_configs/zero2.json", "context_parallel_size": 2, "sample_packing": False, "dp_shard_size": 4},
            "distributed", {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}, "contextParallelSize": 2},
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "effort": "low", "style": "3"}}, "dataset.templateVariables",
            {"enable_thinking": "false", "effort": "low", "style": '"3"'},
        ),
        ({"fsdp_config": {"state_dict_type": "FULL_STATE_DICT", "reshard_after_forward": False}}, "distributed.fsdp",
         {"sharding": "shardGradOp", "stateDict": "full"}),
        ({"fsdp": ["full_shard"], "optimizer": "adamw_bnb_8bit"}, "training.optimizer", "adamw_torch_fused"),
        ({"dp_shard_size": 4, "fsdp_config": {"offload_params": True}}, "resources.gpusPerNode", 4),
        ({"wandb_project": "bot"}, "tracking", {"reportTo": ["wandb"], "wandb": {"project": "bot", "apiKeySecretRef": {"name": "run-wandb", "key": "token"}}}),
        ({"hub_model_id": "org/out"}, "output.hub", {"push": True, "repository": "org/out", "tokenSecretRef": {"name": "run-hub", "key": "token"}}),
    ],
)  # fmt: skip
def test_options_set_fields_of_the_spec(import_settings: Any, changes: dict[str, Any], path: str, expected: Any) -> None:
    import_outcome = import_settings(changes)
    assert import_outcome.mistakes == []
    assert import_outcome.at(path) == expected


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"tensor_parallel_size": 2}, "tensor parallelism"),
        ({"qat": {"weight_dtype": "int4"}}, "quantisation-aware training"),
        ({"rl": "simpo"}, "SimPO"),
        ({"relora": True}, "ReLoRA"),
        ({"lr_scheduler": "one_cycle"}, "the learning rate schedule one_cycle"),
        ({"val_set_size": 100}, "a number of validation rows"),
        ({"plugins": ["mine.Plugin"]}, "the plugin mine.Plugin"),
        ({"chat_template": "jamba"}, "the chat template jamba for a model of another family"),
        ({"datasets": [{"path": "org/d", "type": "input_output"}]}, "a label for each segment of a row (input_output)"),
        (
            {"datasets": [{"path": "org/d", "type": "alpaca", "name": "part"}]},
            "the configuration part of a data set on the hub",
        ),
        (
            {"datasets": [{"path": "org/d", "type": "alpaca", "split": "train[:500]"}]},
            "the split train[:500] of a data set on the hub",
        ),
        (
            {"datasets": [{"path": "org/d", "type": "chat_template", "roles_to_train": ["user"]}]},
            "training on the messages of user",
        ),
        ({"processor_type": "AutoProcessor"}, "training on images, video or audio"),
        ({"base_model": "org/m-GPTQ"}, "training on a base model in GPTQ"),
        ({"optimizer": "muon"}, "'muon' is not a supported optimizer"),
    ],
)
def test_a_refused_option_names_the_missing_feature(import_settings: Any, changes: dict[str, Any], feature: str) -> None:
    assert any(feature in mistake for mistake in import_settings(changes).mistakes), import_settings(changes).mistakes


def test_drop_unsupported_leaves_refused_options_out(import_settings: Any) -> None:
    import_outcome = import_settings({"tensor_parallel_size": 2, "relora": True}, drop_unsupported=True)
    assert import_outcome.mistakes == []
    assert [warning.partition(": ")[2] for warning in import_outcome.warnings] == [
        "tensor_parallel_size is left out: a FineTuneJob does not support tensor parallelism",
        "relora is left out: a FineTuneJob does not support ReLoRA",
    ]


def test_every_key_without_a_field_is_listed(import_settings: Any) -> None:
    import_outcome = import_settings({"tf32": True, "strict": False, "wandb_entity": ""})
    assert "wandb_entity: has no value, so it is not set" in import_outcome.notes
    assert any(note.startswith("tf32: no effect: the trainer chooses its kernels") for note in import_outcome.notes)
    assert any(note.startswith("strict: no effect") for note in import_outcome.notes)


def test_unknown_keys_give_a_warning_unless_they_resemble_a_known_key(import_settings: Any) -> None:
    assert "did you mean learning_rate?" in import_settings({"lerning_rate": 1}).mistakes[0]
    assert import_settings({"own_note": "x"}).warnings == [
        "run.yaml:14: own_note: Axolotl does not know this key and ignores it, so the import ignores it, too"
    ]


def test_a_conflict_names_both_keys(import_settings: Any) -> None:
    (mistake,) = import_settings({"warmup_steps": 10, "warmup_ratio": 0.1}).mistakes
    assert (
        mistake
        == "run.yaml:14, run.yaml:15: warmup_steps, warmup_ratio: 10 and 0.1 both set the warm-up; remove one of them"
    )
    (mistake,) = import_settings({"load_in_4bit": True, "load_in_8bit": True}).mistakes
    assert "load_in_4bit, load_in_8bit" in mistake


def test_alpaca_rows_keep_their_prompt_format(import_settings: Any) -> None:
    text = import_settings({"datasets": [{"path": "org/d", "type": "alpaca"}]}).at("dataset.chatTemplate.text")
    assert "### Instruction:" in text and "{% generation %}{{ message['content'] + \"\" + eos_token" in text


def test_a_prompt_format_of_the_user_becomes_a_chat_template(import_settings: Any) -> None:
    prompt_options = {
        "field_instruction": "q",
        "field_output": "a",
        "format": "[INST] {instruction} [/INST]",
        "system_prompt": "Be brief.",
    }
    import_outcome = import_settings({"datasets": [{"path": "org/d", "type": prompt_options}]})
    assert import_outcome.at("dataset.columns") == {"question": "q", "answer": "a"}
    assert import_outcome.at("dataset.systemPrompt") == "Be brief."
    assert '"[INST] " + message[\'content\'] + " [/INST]"' in import_outcome.at("dataset.chatTemplate.text")


@pytest.mark.parametrize(
    ("model", "name", "uses_tokenizer"),
    [
        ("google/gemma-3-1b-it", "gemma3", True),
        ("google/gemma-3-1b-pt", "gemma3", False),
        ("Qwen/Qwen3-8B", "qwen3", True),
        ("org/any", "chatml", False),
    ],
)
def test_the_chat_template_comes_from_the_tokenizer_of_the_family(
    import_settings: Any, model: str, name: str, uses_tokenizer: bool
) -> None:
    import_outcome = import_settings({"base_model": model, "chat_template": name})
    assert import_outcome.mistakes == []
    assert (import_outcome.at("dataset.chatTemplate") is None) is uses_tokenizer


def test_several_sources_become_a_mixture(import_settings: Any) -> None:
    import_outcome = import_settings({"datasets": [{"path": "org/a", "type": "alpaca"}, {"path": "org/b", "type": "alpaca"}]})
    assert import_outcome.at("dataset.mixture") == [{"source": "org/a"}, {"source": "org/b"}]
    assert "set dataset.mixture[].weight" in import_outcome.warnings[0]


def test_a_given_deepspeed_json_is_read(import_settings: Any, write_file: WriteFile) -> None:
    file = write_file("ds.json", '{"zero_optimization": {"stage": 2}}')
    import_outcome = import_settings({"deepspeed": "my/ds.json"}, file)
    assert import_outcome.at("distributed.deepspeed.zeroStage") == 2
    (mistake,) = import_settings({"deepspeed": "my/ds.json"}).mistakes
    assert "give the JSON as a further file, or --deepspeed NAME/KEY" in mistake


def test_no_key_is_in_two_rows_of_the_option_table() -> None:
    keys = [key for option_row in OPTION_TABLE for key in (option_row.key, *option_row.aliases)]
    assert sorted(key for key in set(keys) if keys.count(key) > 1) == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("mlp.(up|down)_proj", ["mlp.up_proj", "mlp.down_proj"]),
        (
            r"model.layers.[\d]+.(_checkpoint_wrapped_module.)?self_attn.(q|k)_proj",
            ["self_attn.q_proj", "self_attn.k_proj"],
        ),
        (r".*\.layers\.(3|7)\.self_attn\.q_proj", ["layers.3.self_attn.q_proj", "layers.7.self_attn.q_proj"]),
    ],
)
def test_a_module_pattern_becomes_a_list_of_names(pattern: str, expected: list[str]) -> None:
    assert expand_pattern(pattern) == expected


@pytest.mark.parametrize("pattern", ["q_proj(", "a[^b]c", "(a|b)" * 9, ".*"])
def test_a_pattern_that_matches_no_list_of_names_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedPattern):
        expand_pattern(pattern)


GRPO_OPTIONS = {"rl": "grpo", "datasets": [{"path": "org/d", "type": "prompt"}]}


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ({"trl": {"chat_template_kwargs": {"enable_thinking": False}}}, {"enable_thinking": "false"}),
        ({"chat_template_kwargs": {"effort": "low"}, "trl": {"chat_template_kwargs": {}}}, {"effort": "low"}),
        ({"trl": {"chat_template_kwargs": {}}}, None),
        ({"chat_template_kwargs": {}}, None),
        ({"chat_template_kwargs": {}, "trl": {"chat_template_kwargs": {"effort": "low"}}}, {"effort": "low"}),
    ],
    ids=["only for grpo", "empty for grpo", "empty", "empty for all objectives", "empty for all objectives, given for grpo"],
)
def test_arguments_of_the_chat_template_for_grpo_become_template_variables(
    import_settings: Any, options: dict[str, Any], variables: dict[str, str] | None
) -> None:
    import_outcome = import_settings({**GRPO_OPTIONS, **options}, overrides={"trainer.rewards": [{"builtin": "exactMatch"}]})
    assert import_outcome.mistakes == []
    assert import_outcome.at("dataset").get("templateVariables") == variables


def test_two_sources_of_template_variables_are_refused(import_settings: Any) -> None:
    options = {"chat_template_kwargs": {"effort": "low"}, "trl": {"chat_template_kwargs": {"effort": "high"}}}
    mistakes = import_settings({**GRPO_OPTIONS, **options}).mistakes
    assert [mistake for mistake in mistakes if "both set the variables of the chat template" in mistake]
