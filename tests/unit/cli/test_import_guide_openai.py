"""The guide's flat and nested form, and jobs of fine-tuning APIs; recognising a source."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.cli.conftest import Write
from tests.unit.cli.imports import Outcome, import_

NESTED = "base_model: {name: mistralai/M}\nlora: {r: 8, lora_alpha: 16}\n"


@pytest.fixture
def guide(write: Write) -> Any:
    """Import a text of the guide."""

    def run(text: str, words: str = "", **more: Any) -> Outcome:
        return import_(write("job.yaml", text), words=words, source="guide", **more)

    return run


@pytest.mark.parametrize("text", ["model: org/m\nlora_r: 8\n", NESTED])
def test_both_forms_have_one_profile(guide: Any, text: str) -> None:
    found = guide(text)
    assert found.spec["training"] == {
        "epochs": 3, "batchSizePerDevice": 4, "gradientAccumulationSteps": 4, "learningRate": 2e-4, "scheduler": "linear", "warmupRatio": 0.03,
        "optimizer": "adamw_torch", "weightDecay": 0, "maxGradNorm": 1, "mixedPrecision": "bf16",
    }  # fmt: skip
    assert found.spec["method"]["lora"]["rank"] == 8
    assert (found.at("dataset.maxSequenceLength"), found.at("checkpoint.keep"), found.at("dataset.train")) == (
        512,
        3,
        None,
    )
    assert any("no training data is named" in one for one in found.warnings)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("lora_r: 8\n", "lora"),
        ("lora_r: 8\nuse_4bit: true\n", "qlora"),
        ("lora_r: 8\nuse_4bit: false\n", "lora"),
        ("use_4bit: true\n", "qlora"),
    ],
)
def test_the_method_is_inferred(guide: Any, text: str, method: str) -> None:
    assert guide("model: org/m\n" + text).at("method.type") == method


def test_no_method(guide: Any) -> None:
    (mistake,) = guide("model: org/m\nuse_4bit: false\n").mistakes
    assert "no method" in mistake


def test_targets_by_family(guide: Any) -> None:
    text = "base_model: {name: meta-llama/Llama-3}\nlora: {r: 8, target_modules: {mistral: [a], llama: [b, c]}}\n"
    assert guide(text).at("method.lora.targetModules") == ["b", "c"]
    (mistake,) = guide(text.replace("meta-llama/Llama-3", "org/gpt")).mistakes
    assert "it names mistral, llama, and none of them stands in the model's name org/gpt" in mistake


def test_bf16_wins_over_float16_weights(guide: Any) -> None:
    found = guide("base_model: {name: m/m, dtype: float16}\nlora: {r: 8}\ntraining: {bf16: true}\n")
    assert (found.at("model.dtype"), found.at("training.mixedPrecision")) == ("bfloat16", "bf16")
    assert "bfloat16 wins" in found.warnings[0]


def test_early_stopping_and_wandb(guide: Any) -> None:
    text = (
        NESTED
        + "dataset: {eval_size: 0.1}\ncallbacks: {early_stopping: {enabled: true}, wandb: {enabled: true, project: p}}\n"
    )
    found = guide(text)
    assert found.at("training.earlyStopping") == {"patience": 3, "threshold": 0.01}
    assert (found.at("tracking.reportTo"), found.at("tracking.wandb")) == (["wandb"], {"project": "p"})
    assert found.at("evaluation") == {"steps": 100, "strategy": "steps"}


def test_evaluation_without_data_is_refused(guide: Any) -> None:
    (mistake,) = guide(NESTED + "training: {eval_strategy: steps}\n").mistakes
    assert mistake.startswith("job.yaml:3: training.eval_strategy: steps, but there is no validation data")


def test_flags_of_the_script(guide: Any) -> None:
    found = guide(
        "model: org/m\nlora_r: 8\n",
        words="python finetune_lora.py --data s3://data/x.json --epochs 1 --batch-size 2 --lora-r 4 --merge",
    )
    assert (found.at("dataset.train"), found.at("training.epochs"), found.at("method.lora.rank")) == (
        "s3://data/x.json",
        1,
        4,
    )
    assert found.at("output.mergeAdapter") is True


# --- fine-tuning APIs -----------------------------------------------------------------------------------------------

JOB = {"model": "gpt-4o-mini", "training_file": "file-abc123"}


@pytest.fixture
def api(write: Write) -> Any:
    """Import a job of an API."""

    def run(job: dict[str, Any], *files: Any, **more: Any) -> Outcome:
        more.setdefault("model_map", {"gpt-4o-mini": "org/small"})
        return import_(write("job.json", json.dumps(job)), *files, **more)

    return run


def test_hyperparameters(api: Any) -> None:
    found = api(
        JOB
        | {
            "hyperparameters": {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5},
            "seed": 7,
            "suffix": "bot",
        }
    )
    assert found.at("model.source") == "org/small"
    assert found.at("training") == {
        "epochs": 2, "batchSizePerDevice": 3, "gradientAccumulationSteps": 2, "learningRate": 1e-4, "seed": 7,
    }  # fmt: skip
    assert found.at("dataset") == {"format": "messages", "fileFormat": "jsonl", "responseOnly": {"enabled": True}}
    assert found.at("output.runName") == {"suffix": "bot"}
    assert "file-abc123 is a file of that API" in found.warnings[0]


def test_auto_leaves_the_choice(api: Any) -> None:
    found = api(
        JOB | {"hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}}
    )
    assert found.at("training") == {"epochs": 3}


def test_dpo(api: Any) -> None:
    found = api(JOB | {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}})
    assert (found.at("trainer"), found.at("training.epochs")) == ({"type": "dpo", "dpo": {"beta": 0.2}}, 1)
    assert found.at("dataset.columns") == {
        "question": "input",
        "chosen": "preferred_output",
        "rejected": "non_preferred_output",
    }


def test_a_model_of_theirs_needs_one_of_ours(api: Any) -> None:
    (mistake,) = api(JOB, model_map={}).mistakes
    assert mistake.endswith("say which open model takes its place: --model-map gpt-4o-mini=org/name")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": {"type": "reinforcement"}}, "one of supervised, dpo"),
        ({"hyperparameters": {"n_epochs": 0}}, '"auto" or an integer from 1 to 50'),
        ({"hyperparameter": {"n_epochs": 1}}, "unknown key"),
        ({"integrations": [{"type": "other"}]}, "only wandb is offered"),
    ],
)
def test_mistakes(api: Any, change: dict[str, Any], words: str) -> None:
    (mistake,) = api(JOB | change).mistakes
    assert words in mistake


def test_its_data_is_looked_at(api: Any, write: Write) -> None:
    good = write("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n')
    assert api(JOB, good).at("dataset.train") == f"file://{good}"
    bad = write("b.jsonl", '{"messages": []}\n{"prompt": "x"}\n')
    (mistake,) = api(JOB, bad).mistakes
    assert mistake == "b.jsonl:2: messages: it is missing in the row, which has prompt; rows of sft hold messages"


def test_metadata_becomes_annotations(api: Any) -> None:
    assert api(JOB | {"metadata": {"team a": "x"}}).documents[0]["metadata"]["annotations"] == {"team_a": "x"}


# --- recognising ----------------------------------------------------------------------------------------------------


def test_a_file_that_fits_two_tools_is_refused(write: Write) -> None:
    text = "model: {base_model: m}\ntraining_config: {model: m}\n"
    assert import_(write("x.yaml", text)).mistakes == [
        "x.yaml: it fits several tools: yaml, hydra; say which with --from yaml|hydra"
    ]


def test_a_file_of_nobody_is_refused(write: Write) -> None:
    assert import_(write("x.yaml", "a: 1\n")).mistakes == [
        "x.yaml: it is not recognised as the configuration of any tool known here; say which with --from env, toml, yaml, hydra, guide, openai"
    ]


def test_missing_files_are_all_named(tmp_path: Any) -> None:
    found = import_(tmp_path / "a", tmp_path / "b")
    assert [one.rpartition("/")[2] for one in found.mistakes] == [
        "a: there is no such file",
        "b: there is no such file",
    ]


def test_a_name_that_kubernetes_refuses(write: Write) -> None:
    (mistake,) = import_(write("job.json", json.dumps(JOB)), name="Bad_Name").mistakes
    assert mistake.startswith("--name: Bad_Name: cannot be the name of a FineTuneJob")
