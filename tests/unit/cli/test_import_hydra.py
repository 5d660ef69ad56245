"""The importer `hydra`: composition of configurations, overrides, the command-line flags with dashes of older versions, and accelerate files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

BASE_CONFIG = """\
dataset: {path: org/data, format: conversational}
training_config:
  model: org/m
  trainer: SFT
  distributed_training: DDP
  learning_rate: 5e-5
  max_seq_length: 512
  report_to: none
"""


@pytest.fixture
def import_hydra(write_file: WriteFile) -> Any:
    """Return a function that imports one file, which contains the composed Hydra configuration, together with overrides."""

    def run(words: str = "", base_text: str = BASE_CONFIG, **request_fields: Any) -> ImportOutcome:
        return import_files(write_file("job.yaml", base_text), words=words, source="hydra", **request_fields)

    return run


@pytest.fixture
def folder(write_file: WriteFile, tmp_path: Path) -> Path:
    """Return a folder that contains Hydra config groups and a primary configuration file."""
    write_file("configs/config.yaml", "defaults:\n  - dataset: default\n  - training: ddp\n  - _self_\n")
    write_file("configs/dataset/default.yaml", "path: org/data\nformat: standard\n")
    write_file("configs/dataset/pairs.yaml", "path: org/pairs\nformat: preference\n")
    write_file(
        "configs/training/ddp.yaml",
        "model: org/m\ntrainer: SFT\ndistributed_training: DDP\nlearning_rate: 5e-5\nreport_to: none\nmax_seq_length: 512\n",
    )
    write_file(
        "configs/training/dpo.yaml",
        "model: org/m\ntrainer: DPO\ndistributed_training: Unsloth\nlearning_rate: 5e-6\nreport_to: none\nmax_seq_length: 256\n",
    )
    return tmp_path / "configs"


def test_values_that_are_hard_coded_in_the_tool_are_written(import_hydra: Any) -> None:
    import_outcome = import_hydra()
    assert import_outcome.spec["method"]["lora"] == {
        "rank": 128, "alpha": 64, "dropout": 0.05, "bias": "none",
        "targetModules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    assert (
        import_outcome.at("training.warmupRatio"),
        import_outcome.at("training.mixedPrecision"),
        import_outcome.at("tracking.loggingSteps"),
    ) == (0.1, "bf16", 50)
    assert (import_outcome.at("checkpoint.keep"), import_outcome.at("model.attention"), import_outcome.at("training.learningRate")) == (
        0,
        "flashAttention2",
        5e-5,
    )
    assert import_outcome.at("dataset.systemPrompt") == "You are a personal assistant."
    assert import_outcome.at("tracking.reportTo") == []


def test_unsloth_sets_dropout_and_gradient_checkpointing(import_hydra: Any) -> None:
    import_outcome = import_hydra(base_text=BASE_CONFIG.replace("DDP", "unsloth"))
    assert (import_outcome.at("method.lora.dropout"), import_outcome.at("training.gradientCheckpointing")) == (0, "unsloth")
    assert (import_outcome.at("trainer.backend"), import_outcome.at("distributed.strategy")) == ("unsloth", "none")


@pytest.mark.parametrize("group", ["training_config", "training_configs", "training"])
def test_every_name_of_the_training_group_is_read(import_hydra: Any, group: str) -> None:
    import_outcome = import_hydra(words=f"{group}.learning_rate=1e-5", base_text=BASE_CONFIG.replace("training_config:", f"{group}:"))
    assert import_outcome.at("training.learningRate") == 1e-5


def test_a_folder_of_groups_is_composed(folder: Path) -> None:
    import_outcome = import_files(folder)
    assert (import_outcome.at("dataset.train"), import_outcome.at("dataset.format"), import_outcome.at("trainer.type")) == (
        "org/data",
        "promptCompletion",
        "sft",
    )


def test_group_options_and_overrides_are_applied(folder: Path) -> None:
    import_outcome = import_files(
        folder,
        words="python train.py dataset=pairs training=dpo training.learning_rate=1e-6 +training.warmup_ratio=0.2",
    )
    assert import_outcome.mistakes == []
    assert (import_outcome.at("dataset.train"), import_outcome.at("trainer.type"), import_outcome.at("training.learningRate")) == (
        "org/pairs",
        "dpo",
        1e-6,
    )
    assert (import_outcome.at("training.warmupRatio"), import_outcome.at("dataset.maxSequenceLength")) == (0.2, 256)


def test_missing_group_option_is_refused(folder: Path) -> None:
    (mistake,) = import_files(folder, words="training=nope").mistakes
    assert mistake.startswith("configs: Hydra cannot compose the folder: ")
    assert "training/nope" in mistake


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (
            "training_config.lr=1",
            "command line: training_config.lr: unknown key; did you mean training_config.learning_rate?",
        ),
        (
            "+training_config.foo_bar_baz=1",
            "command line: training_config.foo_bar_baz: unknown key; remove it; + can only add keys of this tool",
        ),
        (
            "training_config.seed=1",
            "command line: training_config.seed: the key is not in the file; write +training_config.seed=... to add it",
        ),
        (
            "+training_config.trainer=DPO",
            "command line: +training_config.trainer: the key already exists; write training_config.trainer=... without +",
        ),
        (
            "dataset.path=a,b",
            "command line: dataset.path: a comma requests a sweep over several values, which is not supported; quote the value: 'dataset.path=\"...\"'",
        ),
        (
            "-m",
            "command line: -m: a sweep runs several jobs, but an import creates only one FineTuneJob; import each combination separately",
        ),
    ],
)
def test_invalid_override_is_refused(import_hydra: Any, words: str, mistake: str) -> None:
    assert import_hydra(words=words).mistakes == [mistake]


def test_overrides_add_force_and_delete_keys(import_hydra: Any) -> None:
    import_outcome = import_hydra(
        words="++training_config.seed=3 ~training_config.learning_rate +training_config.save_total_limit=2 'dataset.path=\"a,b.json\"'"
    )
    assert (import_outcome.at("training.seed"), import_outcome.at("training.learningRate"), import_outcome.at("checkpoint.keep")) == (
        3,
        5e-5,
        2,
    )
    assert import_outcome.at("dataset.train") == "file://a,b.json"


def test_interpolation_within_the_file_is_resolved(import_hydra: Any) -> None:
    assert import_hydra(base_text=BASE_CONFIG.replace("model: org/m", "model: ${dataset.path}")).at("model.source") == "org/data"


def test_only_allowed_environment_variables_are_read(import_hydra: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base_text = BASE_CONFIG.replace("model: org/m", "model: ${oc.env:BASE_MODEL}")
    monkeypatch.setenv("BASE_MODEL", "org/other")
    assert import_hydra(base_text=base_text, environment={"BASE_MODEL": "org/other"}).mistakes == [
        "job.yaml:3: training_config.model: the value reads the environment variable BASE_MODEL, which is not allowed; allow it with --allow-env BASE_MODEL",
        "job.yaml: training_config.model: this required option is missing; add it, or give --model URI",
    ]
    import_outcome = import_hydra(base_text=base_text, environment={"BASE_MODEL": "org/other"}, allowed_variables=frozenset({"BASE_MODEL"}))
    assert import_outcome.at("model.source") == "org/other"


def test_flags_accept_booleans_and_any_letter_case(write_file: WriteFile) -> None:
    import_outcome = import_files(
        words="--model m/m --dataset d/d --trainer sft --distributed-training ddp --gradient-checkpointing False ---max-seq-length 99 --format standard"
    )
    assert (import_outcome.at("training.gradientCheckpointing"), import_outcome.at("dataset.maxSequenceLength")) == ("disabled", 99)
    assert (
        "no learning rate is given; the job uses 2e-4, which the tool's documentation advises for its dashed flags"
        in import_outcome.notes
    )


def test_unknown_flag_is_refused(write_file: WriteFile) -> None:
    import_outcome = import_files(words="--model m/m --dataset d/d --trainr SFT --distributed-training DDP", source="hydra")
    assert import_outcome.mistakes == ["command line: --trainr: unknown option; did you mean --trainer?"]


def test_grpo_gets_the_hard_coded_reward(import_hydra: Any) -> None:
    import_outcome = import_hydra(base_text=BASE_CONFIG.replace("SFT", "grpo") + "  per_device_train_batch_size: 1\n  gradient_acc_steps: 4\n")
    assert import_outcome.mistakes == []
    assert import_outcome.at("trainer.rewards") == [{"builtin": "citationFormat"}]
    assert import_outcome.at("trainer.grpo.numGenerations") == 4


def test_the_names_of_dataset_formats_become_those_of_the_spec(import_hydra: Any) -> None:
    assert import_hydra(base_text=BASE_CONFIG.replace("conversational", "no")).spec["dataset"]["columns"] == {"text": "text"}
    assert import_hydra(base_text=BASE_CONFIG.replace("conversational", "no")).at("dataset.format") == "plainText"
    (mistake,) = import_hydra(base_text=BASE_CONFIG.replace("conversational", "preference")).mistakes
    assert mistake.startswith(
        "job.yaml:1: dataset.format: preference, but trainer sft cannot learn from preference rows"
    )


ACCELERATE_CONFIG = "distributed_type: FSDP\nnum_machines: 2\nnum_processes: 8\nmixed_precision: bf16\nfsdp_config:\n  fsdp_sharding_strategy: FULL_SHARD\n"


def test_accelerate_file_sets_nodes_and_sharding(write_file: WriteFile) -> None:
    import_outcome = import_files(write_file("job.yaml", BASE_CONFIG.replace("DDP", "FSDP")), write_file("acc.yaml", ACCELERATE_CONFIG))
    assert import_outcome.mistakes == []
    assert import_outcome.spec["resources"] == {"nodes": 2, "gpusPerNode": 4}
    assert import_outcome.spec["distributed"] == {"strategy": "fsdp", "fsdp": {"sharding": "fullShard"}}


def test_contradicting_accelerate_file_is_refused(write_file: WriteFile) -> None:
    (mistake,) = import_files(write_file("job.yaml", BASE_CONFIG), write_file("acc.yaml", ACCELERATE_CONFIG)).mistakes
    assert mistake.startswith(
        "job.yaml:5, acc.yaml:1: training_config.distributed_training, distributed_type: ddp and fsdp are given"
    )


def test_mistake_in_a_group_file_names_its_line(write_file: WriteFile, folder: Path) -> None:
    write_file("configs/dataset/default.yaml", "path: org/data\nformat: standrd\n")
    text = (folder / "training/ddp.yaml").read_text(encoding="utf-8").replace("5e-5", "big")
    write_file("configs/training/ddp.yaml", text)
    assert import_files(folder, words="--config-name config --config-path=x").mistakes == [
        'dataset/default.yaml:2: dataset.format: "standrd" is not an allowed value; '
        "allowed: one of standard, conversational, preference, no, simple; did you mean standard?",
        'training/ddp.yaml:4: training.learning_rate: "big" is not a number; allowed: a number greater than 0',
    ]


def test_config_name_selects_the_primary_file(write_file: WriteFile, folder: Path) -> None:
    write_file(
        "configs/other.yaml",
        "defaults:\n  - dataset: default\n  - training: dpo\n  - _self_\ndataset: {format: preference}\n",
    )
    import_outcome = import_files(folder, words=["train.py", "-cn", "other", "training.learning_rate=1e-6"], source="hydra")
    assert (import_outcome.mistakes, import_outcome.at("trainer.type"), import_outcome.at("training.learningRate")) == ([], "dpo", 1e-6)
    assert (
        "configs: --config-name: the folder has no nobody.yaml; give another name"
        in import_files(folder, words="--config-name nobody").mistakes
    )
    assert (
        "command line: --config-name: the value is missing; write --config-name VALUE"
        in import_files(folder, words="--config-name").mistakes
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defaults: hello\ndataset: {path: x}\n", "config.yaml:1: defaults: this is not a list; write `- group: option` lines"),
        ("defaults:\n  - dataset: missing\n", "configs: Hydra cannot compose the folder: In 'config': Could not find 'dataset/missing'; "
                                               "Available options in 'dataset': default pairs"),
        ("dataset: [1]\ntraining: x\n", "config.yaml:1: dataset: `dataset` is not a Hydra config group; write its options below it as `name: value`"),
        ('dataset: {path: "${dataset.path}"}\ntraining: {model: org/m}\n', "config.yaml:1: dataset.path: Recursive interpolation detected"),
        ('dataset: {path: "${"}\ntraining: {model: org/m}\n', "configs: the configuration cannot be read: no viable alternative at input '${'"),
    ],
)  # fmt: skip
def test_invalid_primary_file_is_refused(write_file: WriteFile, folder: Path, text: str, expected: str) -> None:
    write_file("configs/config.yaml", text)
    assert import_files(folder, source="hydra").mistakes[0].startswith(expected)


def test_value_in_place_of_a_group_is_refused(write_file: WriteFile, folder: Path) -> None:
    accelerate_path = write_file("acc.yaml", "distributed_type: FSDP\nnum_processes: x\nfsdp_config: hello\n")
    mistakes = import_files(folder, accelerate_path, source="hydra", words="training.distributed_training=FSDP").mistakes
    assert mistakes == [
        "acc.yaml:2: num_processes: x is not an integer of at least 1",
        "acc.yaml:3: fsdp_config: the value is hello, but a group of options is needed; write names and values",
    ]
    deepspeed_path = write_file("ds.json", '{"zero_optimization": 3, "gradient_clipping": "a"}')
    text = "model: {base_model: a/b}\nfine_tuning: {method: lora}\ndistributed: {use_deepspeed: true}\n"
    assert import_files(write_file("job.yaml", text), deepspeed_path, source="yaml").mistakes == [
        "ds.json: zero_optimization: the value is 3, but a group of options is needed; write names and values",
        "ds.json: gradient_clipping: 'a': should be a valid number, unable to parse string as a number; "
        "for example maxGradNorm: 0.5 (spec.training.maxGradNorm)",
    ]


def test_folder_without_a_primary_file_names_lines(write_file: WriteFile, tmp_path: Path) -> None:
    write_file("conf/dataset/only.yaml", "path: org/d\nformat: standard\n")
    write_file("conf/training/only.yaml", "model: org/m\nlearning_rate: big\n")
    (mistake,) = import_files(tmp_path / "conf", source="hydra").mistakes
    assert mistake.startswith('training/only.yaml:2: training.learning_rate: "big" is not a number')


@pytest.mark.parametrize(
    ("lengths", "completion_length", "has_warning"),
    [
        ("max_seq_length: 512", 256, False),
        ("max_seq_length: 4096", 2048, False),
        ("max_seq_length: 1024\n  max_completion_length: 512", 512, False),
        ("max_seq_length: 1024\n  max_completion_length: 2048", 512, True),
    ],
)
def test_the_completion_leaves_tokens_for_the_prompt(import_hydra: Any, lengths: str, completion_length: int, has_warning: bool) -> None:
    base_text = BASE_CONFIG.replace("max_seq_length: 512", lengths).replace("SFT", "DPO").replace("conversational", "preference")
    import_outcome = import_hydra(base_text=base_text)
    assert (import_outcome.mistakes, import_outcome.at("trainer.maxCompletionLength")) == ([], completion_length)
    assert any("leaves no room" in warning for warning in import_outcome.warnings) is has_warning


@pytest.mark.parametrize("word", ["None", "NONE", "null"])
def test_the_word_none_means_no_value_in_files_overrides_and_flags(import_hydra: Any, word: str) -> None:
    outcome_of_file = import_hydra(base_text=BASE_CONFIG.replace("report_to: none", f"report_to: '{word}'\n  optim: '{word}'\n  lr_scheduler_type: '{word}'"))
    outcome_of_override = import_hydra(words=f"training_config.report_to={word} +training_config.optim={word} training_config.distributed_training={word}")
    flags = f"--model org/m --dataset org/d --format standard --trainer {word} --optim {word} --report-to {word} --gradient-checkpointing {word}"
    outcome_of_flags = import_files(words=f"python train.py {flags}")
    for import_outcome in (outcome_of_file, outcome_of_override, outcome_of_flags):
        assert import_outcome.mistakes == []
        assert (import_outcome.at("tracking.reportTo"), import_outcome.at("training.optimizer")) == ([], "adamw_torch_fused")
    assert outcome_of_flags.at("trainer.type") == "sft"


def test_a_warm_up_given_twice_names_both_overrides(import_hydra: Any) -> None:
    (mistake,) = import_hydra(words="+training_config.warmup_ratio=0.05 +training_config.warmup_steps=3").mistakes
    assert mistake.endswith("training_config.warmup_steps 3 and training_config.warmup_ratio 0.05: both set the warm-up; remove one of them")


@pytest.mark.parametrize(("gpus", "backend"), [(1, "unsloth"), (0, "transformers")])
def test_the_default_back_end_needs_a_gpu(gpus: int, backend: str, import_hydra: Any) -> None:
    text = BASE_CONFIG.replace("  distributed_training: DDP\n", "")
    import_outcome = import_hydra(base_text=text, overrides={"resources.gpusPerNode": gpus})
    assert (import_outcome.mistakes, import_outcome.at("trainer.backend"), import_outcome.at("distributed.strategy")) == ([], backend, "none")


def test_unsloth_in_the_file_is_refused_without_a_gpu(import_hydra: Any) -> None:
    import_outcome = import_hydra("training_config.distributed_training=Unsloth", overrides={"resources.gpusPerNode": 0})
    assert len(import_outcome.mistakes) == 1 and "training_config.distributed_training" in import_outcome.mistakes[0]
    assert "unsloth needs a GPU, but the job runs on CPU" in import_outcome.mistakes[0]
