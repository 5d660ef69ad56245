"""The importers `trl`, `unsloth`, `together`, `torchtune` and `kubeflow`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from finetune_api.base import find_nested_group
from finetune_api.spec import FineTuneJobSpec
from finetune_cli.importers import kubeflow, together, torchtune, trl, unsloth
from finetune_cli.importers.draft import Importer
from finetune_cli.importers.other_tools import OTHER_TOOLS
from finetune_cli.importers.registry import IMPORTERS

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

TRL: dict[str, Any] = {
    "model_name_or_path": "org/m",
    "dataset_name": "org/d",
    "use_peft": True,
    "lora_r": 8,
    "learning_rate": 1e-4,
}
UNSLOTH: dict[str, Any] = {
    "model": {"model_name": "org/m", "max_seq_length": 1024, "load_in_4bit": True},
    "peft": {"r": 8, "target_modules": ["q_proj"], "lora_alpha": 16, "use_gradient_checkpointing": "unsloth", "random_state": 3407},
    "training": {"per_device_train_batch_size": 2, "max_steps": 60, "optim": "adamw_8bit"}, "data": {"dataset": "org/d"},
}  # fmt: skip
TOGETHER: dict[str, Any] = {
    "training_file": "s3://data/t.jsonl", "model": "org/m", "n_epochs": 3, "learning_rate": 1e-5, "training_type": {"type": "Lora", "lora_r": 8},
}  # fmt: skip
TORCHTUNE: dict[str, Any] = {
    "model": {"_component_": "torchtune.models.llama3_2.lora_llama3_2_1b", "lora_attn_modules": ["q_proj", "output_proj"], "lora_rank": 8, "lora_alpha": 16},
    "dataset": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "packed": False}, "batch_size": 4, "epochs": 1, "dtype": "bf16",
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": 3e-4}, "loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"},
    "batch_size_val": "${batch_size}",
}  # fmt: skip
TRAINJOB: dict[str, Any] = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": "tune"},
    "spec": {
        "runtimeRef": {"name": "torchtune-llama3.2-1b"},
        "trainer": {"numNodes": 1, "args": ["batch_size=4", "epochs=2", "optimizer.lr=1e-5"], "resourcesPerNode": {"limits": {"nvidia.com/gpu": 2}}},
    },
}  # fmt: skip
SETTINGS_BY_TOOL = {"trl": TRL, "unsloth": UNSLOTH, "together": TOGETHER, "torchtune": TORCHTUNE, "kubeflow": TRAINJOB}


def apply_changes(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with changes at paths such as `group/key`. If the changed value of a key is None, the key is removed."""
    changed_settings = json.loads(json.dumps(settings))
    for path, value in changes.items():
        group = changed_settings
        *groups, name = path.split("/")
        for key in groups:
            group = group.setdefault(key, {})
        if value is None:
            group.pop(name)
        else:
            group[name] = value
    return dict(changed_settings)


@pytest.fixture
def import_settings(write_file: WriteFile) -> Any:
    """Return a function that changes a tool's settings and imports them. The importer is the one that recognises the settings."""

    def run(tool: str, changes: dict[str, Any] | None = None, **options: Any) -> ImportOutcome:
        return import_files(
            write_file("run.yaml", yaml.safe_dump(apply_changes(SETTINGS_BY_TOOL[tool], changes or {}), sort_keys=False)), **options
        )

    return run


@pytest.mark.parametrize("tool", SETTINGS_BY_TOOL)
def test_a_file_is_recognised_by_its_content(import_settings: Any, tool: str) -> None:
    assert import_settings(tool).mistakes == []


@pytest.mark.parametrize(
    ("tool", "changes", "path", "expected"),
    [
        ("trl", {}, "method", {"type": "lora", "lora": {"rank": 8, "alpha": 32, "dropout": 0.05}}),
        ("trl", {"load_in_4bit": True}, "method.type", "qlora"),
        ("trl", {"use_peft": False}, "method", {"type": "full"}),
        ("trl", {"torch_dtype": "bfloat16"}, "model.dtype", "bfloat16"),
        ("trl", {"assistant_only_loss": True}, "dataset.responseOnly.enabled", True),
        ("trl", {"max_length": 256, "packing": True}, "dataset", {"train": "org/d", "maxSequenceLength": 256, "packing": True}),
        ("trl", {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "precompute_ref_log_probs": True}, "trainer",
         {"type": "dpo", "dpo": {"beta": 0.3, "lossTypes": ["sigmoid", "sft"]}}),
        ("trl", {"num_generations": 8, "reward_funcs": ["think_format_reward"]}, "trainer.rewards", [{"builtin": "thinkFormat"}]),
        ("trl", {"num_generations": 8, "reward_funcs": ["think_format_reward"], "chat_template_kwargs": {"enable_thinking": False}},
         "dataset.templateVariables", {"enable_thinking": "false"}),
        ("trl", {"num_generations": 8, "reward_funcs": ["think_format_reward"], "chat_template_kwargs": '{"effort": "low"}'},
         "dataset.templateVariables", {"effort": "low"}),
        ("trl", {"desirable_weight": 1.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, "training.gradientAccumulationSteps", 2),
        ("unsloth", {}, "method.lora", {"rank": 8, "alpha": 16, "dropout": 0, "targetModules": ["q_proj"]}),
        ("unsloth", {}, "training.seed", 3407),
        ("unsloth", {}, "training.gradientCheckpointing", "unsloth"),
        ("unsloth", {"model/load_in_4bit": None}, "method.type", "qlora"),
        ("unsloth", {"model/load_in_4bit": None, "model/load_in_16bit": True}, "method.type", "lora"),
        ("unsloth", {"model/load_in_4bit": False, "model/load_in_16bit": True}, "model", {"source": "org/m"}),
        ("unsloth", {"peft/loftq_config": {"loftq_bits": 4, "loftq_iter": 3}, "model/load_in_4bit": False}, "method.lora.loftq", {"bits": 4, "iterations": 1}),
        ("together", {}, "method.lora", {"rank": 8, "alpha": 16, "targetModules": ["all-linear"]}),
        ("together", {"model": "org/m-Reference"}, "model.source", "org/m"),
        ("together", {"training_type": {"type": "Full"}}, "method", {"type": "full"}),
        ("together", {"batch_size": 8}, "training.batchSizePerDevice", 4),
        ("together", {"training_method": {"method": "dpo", "dpo_beta": 0.2}}, "trainer", {"type": "dpo", "dpo": {"beta": 0.2}}),
        ("together", {"lr_scheduler": {"lr_scheduler_type": "cosine", "lr_scheduler_args": {"min_lr_ratio": 0.1}}}, "training.scheduler", "cosineWithMinLr"),
        ("torchtune", {}, "model.source", "meta-llama/Llama-3.2-1B-Instruct"),
        ("torchtune", {}, "method.lora", {"rank": 8, "alpha": 16, "targetModules": ["q_proj", "o_proj"]}),
        ("torchtune", {}, "training.optimizer", "adamw_torch_fused"),
        ("torchtune", {"model/_component_": "torchtune.models.qwen3.qlora_qwen3_8b_instruct"}, "method.type", "qlora"),
        ("torchtune", {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1},
                       "dataset": {"_component_": "torchtune.datasets.stack_exchange_paired_dataset"}}, "trainer", {"type": "dpo", "dpo": {"beta": 0.1}}),
        ("torchtune", {"max_steps_per_epoch": 10, "epochs": 2}, "training.maxSteps", 20),
        ("torchtune", {"dataset/split": "train[:10%]"}, "dataset.split.train", 0.1),
        ("kubeflow", {}, "resources", {"nodes": 1, "gpusPerNode": 2}),
        ("kubeflow", {}, "dataset.train", "tatsu-lab/alpaca"),
        ("kubeflow", {"spec/initializer": {"dataset": {"storageUri": "hf://org/d/data"}}}, "dataset.train", "org/d"),
        ("kubeflow", {"metadata/labels": {"kueue.x-k8s.io/queue-name": "team-a"}}, "placement.queueName", "team-a"),
        ("kubeflow", {"spec/runtimeRef/name": "torch", "spec/trainer/command": ["trl", "dpo"], "spec/trainer/args": [
            "--model_name_or_path", "org/m", "--dataset_name", "org/d", "--beta", "0.2"]}, "trainer", {"type": "dpo", "dpo": {"beta": 0.2}}),
    ],
)  # fmt: skip
def test_options_set_fields_of_the_spec(import_settings: Any, tool: str, changes: dict[str, Any], path: str, expected: Any) -> None:
    import_outcome = import_settings(tool, changes)
    assert import_outcome.mistakes == []
    assert import_outcome.at(path) == expected


@pytest.mark.parametrize("other_key", ["load_in_4bit", "load_in_8bit"])
def test_unsloth_loads_the_base_model_with_one_precision(import_settings: Any, other_key: str) -> None:
    (mistake,) = import_settings("unsloth", {"model/load_in_4bit": None, "model/load_in_16bit": True, f"model/{other_key}": True}).mistakes
    assert "load_in_16bit" in mistake and other_key in mistake and "a base model has either 4, 8 or 16 bits" in mistake


@pytest.mark.parametrize(
    ("tool", "changes", "feature"),
    [
        ("trl", {"loss_type": ["aot"], "beta": 0.1}, "the loss aot"),
        ("trl", {"dataset_train_split": "train_sft"}, "the split train_sft of a data set on the hub"),
        ("trl", {"model_init_kwargs": {"x": 1}}, "options for loading the model"),
        ("trl", {"reward_funcs": ["accuracy_reward"], "num_generations": 8}, "the reward function accuracy_reward"),
        ("unsloth", {"peft/finetune_vision_layers": True}, "training on images, video or audio"),
        ("unsloth", {"model/load_in_fp8": True}, "8-bit floating point weights"),
        ("together", {"from_checkpoint": "ft-1"}, "continuing a job of the API"),
        ("together", {"training_method": {"method": "dpo", "simpo_gamma": 0.5}}, "a loss term of RPO or SimPO"),
        ("torchtune", {"quantizer": {"_component_": "x"}}, "quantisation-aware training"),
        (
            "torchtune",
            {"model/_component_": "torchtune.models.llama3_2_vision.lora_llama3_2_vision_11b"},
            "training on images, video or audio",
        ),
        ("torchtune", {"loss/_component_": "torchtune.rlhf.loss.PPOLoss"}, "PPO"),
        ("torchtune", {"tensor_parallel_dim": 2}, "tensor parallelism"),
        (
            "kubeflow",
            {"spec/runtimeRef/name": "torch-distributed", "spec/trainer/args": []},
            "the runtime torch-distributed",
        ),
        ("kubeflow", {"spec/runtimePatches": [{"manager": "x"}]}, "changing the pods that a runtime creates"),
    ],
)
def test_a_refused_option_names_the_missing_feature(import_settings: Any, tool: str, changes: dict[str, Any], feature: str) -> None:
    mistakes = import_settings(tool, changes).mistakes
    assert any(f"a FineTuneJob does not support {feature}" in mistake for mistake in mistakes), mistakes


def test_trl_flags_override_the_file(import_settings: Any) -> None:
    import_outcome = import_settings("trl", words="trl sft --lora_r 16 --lora_target_modules q_proj v_proj --no_packing")
    assert (import_outcome.at("method.lora.rank"), import_outcome.at("method.lora.targetModules")) == (16, ["q_proj", "v_proj"])


def test_trl_flags_need_no_file() -> None:
    import_outcome = import_files(words="trl reward --model_name_or_path org/m --dataset_name org/d --use_peft")
    assert (import_outcome.at("trainer.type"), import_outcome.at("training.learningRate")) == ("reward", 1e-4)
    (mistake,) = import_files(words="trl rloo --model_name_or_path org/m --dataset_name org/d").mistakes
    assert mistake == "command line: rloo: a FineTuneJob does not support RLOO; use dpo, kto, orpo or grpo"


def test_torchtune_overrides_change_the_data_set_of_the_file(import_settings: Any) -> None:
    words = "tune run --nproc_per_node 2 lora_finetune_distributed --config run.yaml dataset.packed=True batch_size=8"
    import_outcome = import_settings("torchtune", words=words)
    assert (import_outcome.at("dataset.train"), import_outcome.at("dataset.packing")) == ("yahma/alpaca-cleaned", True)
    assert (
        import_outcome.at("training.batchSizePerDevice"),
        import_outcome.at("distributed.strategy"),
        import_outcome.at("resources.gpusPerNode"),
    ) == (8, "fsdp", 2)


def test_an_api_key_is_stored_in_a_secret(import_settings: Any) -> None:
    import_outcome = import_settings("together", {"wandb_api_key": "wsecret", "wandb_project_name": "bot"})
    assert import_outcome.secrets == {"wandb-api-key": "wsecret"}
    assert import_outcome.at("tracking") == {
        "reportTo": ["wandb"], "wandb": {"project": "bot", "apiKeySecretRef": {"name": "run-import", "key": "wandb-api-key"}}
    }  # fmt: skip


@pytest.mark.parametrize("tool", SETTINGS_BY_TOOL)
def test_unknown_keys_are_refused(import_settings: Any, tool: str) -> None:
    (mistake,) = import_settings(tool, {"no_such_option_at_all": 1}).mistakes
    assert "no_such_option_at_all: unknown key" in mistake


@pytest.mark.parametrize(
    "importer",
    [trl.IMPORTER, unsloth.IMPORTER, together.IMPORTER, torchtune.IMPORTER, kubeflow.IMPORTER],
    ids=lambda i: i.name,
)
def test_no_key_is_in_two_rows_of_the_option_table(importer: Importer) -> None:
    keys = [key for option_row in importer.option_table for key in (option_row.key, *option_row.aliases)]
    assert sorted(key for key in set(keys) if keys.count(key) > 1) == []


@pytest.mark.parametrize(
    ("settings", "title", "field"),
    [
        ({"model_type": "llm", "base_model": "org/m", "input_features": [], "output_features": []}, "Ludwig", "base_model is model.source"),
        ({"task": "llm-sft", "base_model": "org/m", "params": {"epochs": 1}}, "Hugging Face AutoTrain", "params.lr is training.learningRate"),
        ({"checkpoint_dir": "x", "train": {"epochs": 1}}, "LitGPT", "lora_r is method.lora.rank"),
    ],
)
def test_tools_without_importer_are_named(write_file: WriteFile, settings: dict[str, Any], title: str, field: str) -> None:
    (mistake,) = import_files(write_file("run.yaml", yaml.safe_dump(settings))).mistakes
    assert mistake.startswith(f"run.yaml: this is a configuration of {title}, which has no importer; write a FineTuneJob: ")
    assert field in mistake


def test_spec_fields_for_tools_without_importer_exist() -> None:
    paths = {field for tool in OTHER_TOOLS for field in tool.field_by_key.values()}
    known_paths = set(list_field_paths(FineTuneJobSpec))
    assert sorted(paths - known_paths) == []


def list_field_paths(model: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of all fields of a Pydantic model."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        yield path
        group = find_nested_group(info.annotation)
        if group is not None:
            yield from list_field_paths(group, f"{path}.")


@pytest.mark.parametrize("name", IMPORTERS)
def test_rows_of_the_option_table_name_existing_fields(name: str) -> None:
    known_paths = set(list_field_paths(FineTuneJobSpec))
    option_rows = [option_row for option_row in IMPORTERS[name].option_table if option_row.path]
    assert sorted(option_row.path for option_row in option_rows if option_row.path not in known_paths) == []
