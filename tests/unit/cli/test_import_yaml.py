"""The importer `yaml`: YAML syntax, overrides, DeepSpeed files and duplicate keys."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

REQUIRED_KEYS = "model: {base_model: org/m}\ndataset: {train_path: s3://data/t.json}\n"


@pytest.fixture
def import_yaml(write_file: WriteFile) -> Any:
    """Return a function that writes a YAML file with the required keys followed by `text`, and imports it."""

    def run(text: str = "", words: str = "", base_text: str = REQUIRED_KEYS, **request_fields: Any) -> ImportOutcome:
        return import_files(write_file("job.yaml", base_text + text), words=words, source="yaml", **request_fields)

    return run


def test_a_minimal_file_gets_the_defaults_of_the_tool(import_yaml: Any) -> None:
    import_outcome = import_yaml()
    assert import_outcome.spec["training"] == {
        "epochs": 3, "batchSizePerDevice": 1, "gradientAccumulationSteps": 16, "learningRate": 2e-4, "scheduler": "cosine", "warmupRatio": 0.03,
        "maxGradNorm": 0.3, "optimizer": "paged_adamw_8bit", "weightDecay": 0.001, "gradientCheckpointing": "enabled", "mixedPrecision": "bf16",
    }  # fmt: skip
    assert import_outcome.at("method.type") == "qlora"
    assert import_outcome.at("model.trustRemoteCode") is False
    assert import_outcome.at("dataset.responseOnly.enabled") is False
    assert import_outcome.at("tracking.reportTo") == ["tensorboard"]
    assert (import_outcome.at("checkpoint.steps"), import_outcome.at("checkpoint.keep")) == (500, 5)


@pytest.mark.parametrize("spelling", ["2e-4", "2.0e-4", ".0002", '"2e-4"', "0.0002", "2E-4"])
def test_every_spelling_of_a_number_is_read(import_yaml: Any, spelling: str) -> None:
    assert import_yaml(f"training: {{learning_rate: {spelling}}}\n").at("training.learningRate") == 2e-4


@pytest.mark.parametrize("spelling", ["inf", ".nan", "-1e-4", '"1_000"', "true", "fast"])
def test_invalid_learning_rate_is_refused(import_yaml: Any, spelling: str) -> None:
    (mistake,) = import_yaml(f"training: {{learning_rate: {spelling}}}\n").mistakes
    assert mistake.startswith("job.yaml:3: training.learning_rate: ")


def test_yaml_1_1_numbers_are_read(import_yaml: Any) -> None:
    import_outcome = import_yaml("training: {max_seq_length: 1_024, epochs: 010}\n")
    assert (import_outcome.at("dataset.maxSequenceLength"), import_outcome.at("training.epochs")) == (1024, 8)


@pytest.mark.parametrize("word", ["no", "off", '"no"', "false"])
def test_unquoted_no_is_read_as_the_word_no(import_yaml: Any, word: str) -> None:
    import_outcome = import_yaml(f"training: {{mixed_precision: {word}}}\nevaluation: {{eval_strategy: {word}}}\n")
    assert (import_outcome.at("training.mixedPrecision"), import_outcome.at("evaluation.strategy")) == ("no", "no")


def test_duplicate_key_is_refused(import_yaml: Any) -> None:
    assert import_yaml("model: {base_model: b}\n").mistakes == [
        "job.yaml:3: model: the key occurs twice, in lines 1 and 3; keep one"
    ]


def test_overrides_with_a_space_or_an_equals_sign_are_read(import_yaml: Any) -> None:
    import_outcome = import_yaml(
        words="python src/train.py --training.epochs=2 --training.epochs 5 --fine_tuning.lora.target_modules '[a, b]' --training.learning_rate 1e-5"
    )
    assert (
        import_outcome.at("training.epochs"),
        import_outcome.at("method.lora.targetModules"),
        import_outcome.at("training.learningRate"),
    ) == (
        5,
        ["a", "b"],
        1e-5,
    )


@pytest.mark.parametrize(
    ("text", "method", "bits"),
    [
        ("fine_tuning: {method: lora}\n", "lora", None),
        ("fine_tuning: {method: lora, quantization: {bits: 8}}\n", "lora", 8),
        ("fine_tuning: {method: qlora}\n", "qlora", 4),
        ("fine_tuning: {method: spectrum}\n", "spectrum", None),
        ("fine_tuning: {method: full}\n", "full", None),
    ],
)
def test_options_select_method_and_bits(import_yaml: Any, text: str, method: str, bits: int | None) -> None:
    import_outcome = import_yaml(text)
    assert (import_outcome.at("method.type"), import_outcome.at("model.quantization.bits")) == (method, bits)


@pytest.mark.parametrize(
    ("model", "tuning", "expected"),
    [
        ("load_in_4bit: true, load_in_8bit: true", "method: lora", "4-bit and 8-bit loading exclude each other"),
        ("load_in_8bit: true", "method: qlora", "method qlora needs 4-bit, but model.load_in_8bit is true"),
        (
            "load_in_4bit: true",
            "method: qlora, quantization: {bits: 8}",
            "method qlora needs 4-bit, but fine_tuning.quantization.bits is 8",
        ),
        ("load_in_4bit: true", "method: full", "method full trains all weights"),
        (
            "load_in_4bit: true",
            "method: lora, quantization: {bits: 8}",
            "4 bits and 8 bits are given for the same base model",
        ),
        ("load_in_4bit: false", "method: qlora", "method qlora needs 4-bit, but model.load_in_4bit is false"),
    ],
)
def test_options_that_contradict_each_other_about_bits_are_refused(import_yaml: Any, model: str, tuning: str, expected: str) -> None:
    (mistake,) = import_yaml(
        base_text=f"model: {{base_model: m/m, {model}}}\nfine_tuning: {{{tuning}}}\ndataset: {{train_path: s3://data/t.json}}\n"
    ).mistakes
    assert expected in mistake


def test_lora_with_a_4_bit_base_model_is_qlora(import_yaml: Any) -> None:
    import_outcome = import_yaml(base_text="model: {base_model: m/m, load_in_4bit: true}\nfine_tuning: {method: lora}\n")
    assert import_outcome.at("method.type") == "qlora"
    assert "method lora with a 4-bit base model is QLoRA and is imported as qlora" in import_outcome.notes


def test_evaluation_needs_data_from_the_file_or_an_override(import_yaml: Any) -> None:
    text = "evaluation: {do_eval: true}\n"
    assert "dataset.eval_path is missing" in import_yaml(text).mistakes[0]
    import_outcome = import_yaml(text, overrides={"dataset.validation": "s3://data/v.json"})
    assert import_outcome.spec["evaluation"] == {
        "strategy": "steps",
        "steps": 200,
        "metrics": ["perplexity", "bleu", "rouge"],
    }


def test_interval_of_the_evaluation_section_overrides_the_output_section(import_yaml: Any) -> None:
    text = "evaluation: {eval_steps: 200}\noutput: {eval_steps: 100}\n"
    import_outcome = import_yaml(text, overrides={"dataset.validation": "s3://data/v.json"})
    assert import_outcome.at("evaluation.steps") == 200
    assert import_outcome.warnings == [
        "job.yaml:4: output.eval_steps has no effect: evaluation.eval_steps (200) overrides it"
    ]


def test_both_human_evaluations_are_imported_without_permission_to_run_generated_code(import_yaml: Any) -> None:
    text = "evaluation: {benchmarks: [human-eval, openai-humaneval]}\n"
    import_outcome = import_yaml(text, overrides={"dataset.validation": "s3://data/v.json"}, benchmarks="s3://data/code")
    assert import_outcome.at("evaluation.benchmarks") == [{"name": "human-eval"}, {"name": "openai-humaneval", "folder": "s3://data/code"}]
    (warning,) = [text for text in import_outcome.warnings if "openai-humaneval" in text]
    assert "runs code that the model generates, but allowCodeExecution is not true" in warning and "the operator refuses the job" in warning


def test_harness_gets_the_tasks_of_the_tool_and_the_folder_of_the_option(import_yaml: Any) -> None:
    text = "evaluation: {benchmarks: [lm-evaluation-harness, domain-specific-eval]}\n"
    tasks = ["hellaswag", "mmlu", "truthfulqa_mc1", "truthfulqa_mc2", "winogrande", "gsm8k", "arc_challenge"]
    import_outcome = import_yaml(text, benchmarks="s3://data/b")
    assert import_outcome.at("evaluation.benchmarks") == [
        {"name": "lm-evaluation-harness", "tasks": tasks, "folder": "s3://data/b"}, {"name": "domain-specific-eval", "folder": "s3://data/b"},
    ]  # fmt: skip
    warnings = [warning for warning in import_yaml(text).warnings if "has no folder" in warning]
    assert len(warnings) == 2 and all("give --benchmarks URI" in warning for warning in warnings)


def test_the_option_benchmarks_is_refused_without_benchmarks(import_yaml: Any) -> None:
    (mistake,) = import_yaml(benchmarks="s3://data/b").mistakes
    assert mistake == "--benchmarks: s3://data/b: the option has no effect, because the configuration names no benchmarks; remove it"


def test_output_head_as_target_is_refused(import_yaml: Any) -> None:
    (mistake,) = import_yaml("fine_tuning: {lora: {target_modules: [q_proj, lm_head]}}\n").mistakes
    assert mistake.startswith("job.yaml:3: fine_tuning.lora.target_modules: 'lm_head' is the output head")
    assert "modulesToSave: [lm_head]" in mistake
    assert import_yaml("fine_tuning: {lora: {target_modules: [q_proj, embed_tokens]}}\n").mistakes == []


def test_explicit_spectrum_layers_replace_the_threshold(import_yaml: Any) -> None:
    import_outcome = import_yaml("fine_tuning: {method: spectrum, spectrum: {snr_threshold: 0.7, layers_to_finetune: [3]}}\n")
    assert import_outcome.at("method.spectrum") == {"layers": [3]}
    assert "snr_threshold has no effect: the layers are listed explicitly" in import_outcome.warnings[0]
    (mistake,) = import_yaml("fine_tuning: {method: spectrum, spectrum: {layers_to_finetune: [3, 3]}}\n").mistakes
    assert "the list contains 3 more than once" in mistake


def test_pruning_is_refused(import_yaml: Any) -> None:
    assert import_yaml("pruning: {enabled: false, method: magnitude}\n").mistakes == []
    assert "enables pruning, which is not supported" in import_yaml("pruning: {enabled: true}\n").mistakes[0]


def build_deepspeed_config(**zero_options: Any) -> str:
    return json.dumps({"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.3, "zero_optimization": zero_options})


def test_deepspeed_file_is_read_and_stored_in_a_config_map(import_yaml: Any, write_file: WriteFile) -> None:
    write_file("config/ds.json", build_deepspeed_config(stage=3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}))
    import_outcome = import_yaml(
        "fine_tuning: {method: lora}\ndistributed: {use_deepspeed: true, deepspeed_config: config/ds.json}\n"
    )
    assert import_outcome.spec["distributed"] == {
        "strategy": "deepspeed",
        "deepspeed": {"zeroStage": 3, "offloadOptimizer": True, "offloadParameters": True, "configRef": {"name": "job-deepspeed", "key": "ds.json"}},
    }  # fmt: skip
    config_map, job = import_outcome.documents
    assert json.loads(config_map["data"]["ds.json"])["zero_optimization"]["stage"] == 3
    assert job["spec"]["distributed"]["strategy"] == "deepspeed"


def test_contradicting_deepspeed_file_is_refused(import_yaml: Any, write_file: WriteFile) -> None:
    write_file("ds.json", build_deepspeed_config(stage=2))
    (mistake,) = import_yaml(
        "fine_tuning: {method: lora}\ndistributed: {use_deepspeed: true, zero_stage: 3, deepspeed_config: ds.json}\n"
    ).mistakes
    assert mistake.startswith(
        "job.yaml:4, ds.json: distributed.zero_stage, zero_optimization.stage: 3 and 2 are given for the same option"
    )


def test_zero_stage_0_is_imported_as_ddp(import_yaml: Any) -> None:
    import_outcome = import_yaml("distributed: {use_deepspeed: true, zero_stage: 0}\n")
    assert import_outcome.spec["distributed"] == {"strategy": "ddp"}


def test_fsdp_gets_two_gpus_and_a_usable_optimizer(import_yaml: Any) -> None:
    import_outcome = import_yaml(
        "distributed: {use_fsdp: true, fsdp_sharding_strategy: SHARD_GRAD_OP, fsdp_checkpoint_strategy: FULL_STATE_DICT}\n"
    )
    assert import_outcome.spec["distributed"] == {
        "strategy": "fsdp",
        "fsdp": {"sharding": "shardGradOp", "stateDict": "full"},
    }
    assert import_outcome.at("resources.gpusPerNode") == 2
    assert "optimizer" not in import_outcome.spec["training"]
    assert (
        "FSDP cannot use the default optimizer of the tool, so the defaults of FineTuneJob replace those of the tool: training.optimizer paged_adamw_8bit"
        in import_outcome.notes
    )
    assert (
        import_yaml("distributed: {use_fsdp: true}\n", overrides={"resources.gpusPerNode": 8}).at("resources.gpusPerNode") == 8
    )


def test_push_without_a_repository_is_refused(import_yaml: Any) -> None:
    (mistake,) = import_yaml(
        "output: {push_to_hub: true}\n", overrides={"model.tokenSecretRef": {"name": "a", "key": "b"}}
    ).mistakes
    assert mistake.startswith("job.yaml:3: output.push_to_hub: output.push_to_hub is true, but output.")


def test_overrides_win_over_files_and_command_line(import_yaml: Any) -> None:
    import_outcome = import_yaml("training: {epochs: 2}\n", words="--training.epochs 3", overrides={"training.epochs": 4})
    assert import_outcome.at("training.epochs") == 4
