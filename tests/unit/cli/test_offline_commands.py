"""`validate`, `explain`, `init`, `diff`, `import` as a user calls them: output, messages, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_cli import main

from tests.unit.cli.conftest import JOB, Call, Write
from tests.unit.cli.imports import HERE

# --- validate -------------------------------------------------------------------------------------------------------


def test_a_good_manifest(call: Call, write: Write) -> None:
    path = write("job.yaml", JOB)
    assert call("validate", path) == (0, f"{path}: bot: ok\n", "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: bot", "name: Bot_1",
         "job.yaml:3: metadata.name: 'Bot_1' cannot be the name of a FineTuneJob; a-z, 0-9 and -, a letter first, at most 40 characters [NameInvalid]"),
        ("v1alpha1", "v1",
         "job.yaml:1: apiVersion: finetune-operator.io/v1 is not finetune-operator.io/v1alpha1; write apiVersion: finetune-operator.io/v1alpha1 [ApiVersion]"),
        ("source: org/m", "sorce: org/m", "job.yaml:5: spec.model.sorce: unknown field; did you mean spec.model.source? [UnknownField]"),
        ("org/m}", "org/m}\n  training: {warmupSteps: 1, warmupRatio: 0.1}",
         "job.yaml:6: spec.training.warmupRatio: warmupSteps 1 and warmupRatio 0.1 exclude each other; remove one of them [WarmupTwice]"),
        ("org/m}", "org/m}\n  training: {learningRate: '2e-4'}", None),
        ("org/m}", "org/m}\n  training: {device: mps}",
         "job.yaml:6: spec.training.device: mps only exists on Apple machines, not on cluster nodes; "
         "remove it, or use `finetune run --local` [DeviceOfAnotherMachine]"),
    ],
)  # fmt: skip
def test_a_manifest_with_one_problem(call: Call, write: Write, old: str, new: str, message: str | None) -> None:
    path = write("job.yaml", JOB.replace(old, new))
    code, _, said = call("validate", path)
    found = [line.removeprefix("error: ").replace(str(path.parent) + "/", "") for line in said.splitlines()]
    if message is None:
        assert code in (0, 1)
        return
    assert code == 1
    assert message in found


def test_all_problems_at_once_over_several_documents(call: Call, write: Write) -> None:
    two = JOB.replace("org/m", "./m") + "---\n" + JOB.replace("name: bot", "name: other").replace("train:", "trian:")
    code, out, said = call("validate", write("jobs.yaml", two))
    assert (code, out) == (1, "")
    assert "jobs.yaml:5: spec.model.source:" in said
    assert "jobs.yaml:13: spec.dataset.trian: unknown field; did you mean spec.dataset.train?" in said
    assert "no training data is named" in said


def test_the_same_name_twice(call: Call, write: Write) -> None:
    assert "metadata.name: bot stands twice, first at" in call("validate", write("jobs.yaml", JOB + "---\n" + JOB))[2]


def test_local_allows_what_only_this_machine_has(call: Call, write: Write) -> None:
    path = write("job.yaml", JOB.replace("org/m", "file://tiny") + "  training: {device: mps}\n")
    assert call("validate", "--local", path)[0] == 0
    assert call("validate", path)[0] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "it is not YAML"),
        ("- a\n", "it is not a manifest: a mapping is needed"),
        ("kind: Pod\n", "there is no FineTuneJob in it"),
        ("a: 1\n", "kind: it is missing; write kind: FineTuneJob"),
        (JOB + "spec: {}\n", "it stands twice"),
        (JOB.partition("spec:")[0], "spec: it is missing; write spec:"),
    ],
)
def test_what_is_no_manifest(call: Call, write: Write, text: str, message: str) -> None:
    code, _, said = call("validate", write("job.yaml", text))
    assert code == 1
    assert message in said


def test_strict_refuses_other_kinds(call: Call, write: Write) -> None:
    path = write("job.yaml", JOB + "---\nkind: Service\n")
    assert call("validate", path)[0] == 0
    assert "kind: Service is not a FineTuneJob" in call("validate", "--strict", path)[2]


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain(call: Call) -> None:
    assert call("explain", "training.learningRate")[1].startswith(
        "spec.training.learningRate <number > 0, <= 10>\n  Peak learning rate."
    )
    assert "rank" in call("explain", "method.lora")[1]
    assert "spec.trainer.rewards[].weight" in call("explain", "trainer.rewards.weight")[1]
    assert "spec.training.warmupSteps" in call("explain", "--search", "warmup")[1]
    assert call("explain", "training.learnRate") == (
        1, "", "error: training.learnRate is not a field of a FineTuneJob; did you mean spec.training.learningRate?\n",
    )  # fmt: skip
    assert call("explain", "--search", "zebra")[0] == 1


# --- init and diff --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo", "kto", "orpo", "reward"])
def test_init_writes_what_the_rules_accept(call: Call, write: Write, trainer: str) -> None:
    code, text, _ = call("init", "bot", "--model", "org/m", "--data", "s3://data/t.jsonl", "--trainer", trainer)
    assert code == 0
    said = call("validate", write("job.yaml", text))[2]
    assert [line for line in said.splitlines() if "NotSupportedYet" not in line] == []


def test_init_refuses(call: Call, write: Write, tmp_path: Path) -> None:
    assert "--model is missing, and there is nobody to ask" in call("init", "bot", "--data", "x/y")[2]
    assert "metadata.name" in call("init", "Bad", "--model", "org/m", "--data", "x/y")[2]
    assert (
        "--method: lra is not known here"
        in call("init", "bot", "--model", "o/m", "--data", "x/y", "--method", "lra")[2]
    )
    there = write("job.yaml", "")
    assert "exists; name another file" in call("init", "bot", "--model", "o/m", "--data", "x/y", "-o", there)[2]


def test_diff_compares_what_the_jobs_resolve_to(call: Call, write: Write) -> None:
    first = write("a.yaml", JOB)
    second = write("b.yaml", JOB + "  training: {epochs: 3}\n")
    third = write("c.yaml", JOB + "  method: {type: full}\n")
    assert call("diff", first, second) == (0, "", "note: the two resolve to the same configuration\n")
    rows = [line.split() for line in call("diff", first, third)[1].splitlines()]
    assert ["training.learningRate", "0.0002", "->", "2e-05"] in rows
    assert ["method.lora.rank", "16", "->", "-"] in rows


# --- import ---------------------------------------------------------------------------------------------------------


def test_import_to_stdout_with_words_behind_two_dashes(call: Call) -> None:
    code, out, said = call(
        "import",
        HERE / "samples" / "env-A.env",
        "--name",
        "x",
        "-n",
        "team",
        "--storage",
        "s3://bucket/out",
        behind=("--epochs", "9"),
    )
    assert code == 0
    assert out.startswith(
        "apiVersion: finetune-operator.io/v1alpha1\nkind: FineTuneJob\nmetadata:\n  name: x\n  namespace: team\n"
    )
    assert "epochs: 9\n" in out
    assert "uri: s3://bucket/out\n" in out
    assert "warning: env-A.env:4: TRAIN_DATA_PATH:" in said


def test_a_refused_import_prints_nothing(call: Call) -> None:
    code, out, said = call("import", HERE / "samples" / "env-R2.env")
    assert (code, out, len(said.splitlines())) == (1, "", 3)


def test_explain_table(call: Call) -> None:
    lines = call("import", HERE / "samples" / "env-A.env", "--explain")[1].splitlines()
    assert lines[0].split() == ["WRITTEN", "AS", "FIELD", "VALUE", "ORIGIN"]
    assert any(line.split() == ["LEARNING_RATE", "training.learningRate", "0.0002", "env-A.env:9"] for line in lines)
    assert any(line.split() == ["-", "training.maxGradNorm", "1", "fixed", "in", "its", "code"] for line in lines)


def test_own_options_that_are_wrong(call: Call) -> None:
    said = call(
        "import", HERE / "samples" / "env-A.env", "--set", "training.sed=1", "--set", "training.seed", "--prompts", "x"
    )[2]
    assert said.splitlines() == [
        "error: --prompts: x: it is not the name and key of a ConfigMap; write NAME/KEY",
        "error: --set: training.sed: unknown field; did you mean training.seed?",
        "error: --set: training.seed: it has no value; write --set training.seed=VALUE, or training.seed=null for none",
    ]


def test_output_to_a_file(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    assert call("import", HERE / "samples" / "env-A.env", "-o", path)[1] == ""
    assert path.read_text(encoding="utf-8").startswith("apiVersion:")


# --- the program ----------------------------------------------------------------------------------------------------


def test_wrong_usage_is_1(call: Call) -> None:
    assert call("nonsense")[0] == 1
    assert call("validate")[0] == 1


@pytest.mark.parametrize("command", sorted(main.COMMANDS))
def test_every_command_has_an_example(call: Call, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"Example: finetune {command}" in out


def test_help_imports_nothing_heavy() -> None:
    heavy = ("pydantic", "kubernetes", "hydra", "omegaconf", "boto3", "ruamel.yaml", "finetune_api")
    code = f"import sys; sys.argv = ['finetune']; import finetune_cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_run_wants_to_be_asked_for(call: Call, write: Write) -> None:
    assert "say so with --local" in call("run", write("job.yaml", JOB))[2]


@pytest.mark.parametrize(
    ("typed", "candidates"),
    [
        ("ev", {"events"}),
        ("explain training.learn", {"training.learningRate"}),
        ("import --from h", {"hydra"}),
        ("rerun x --set method.lora.ra", {"method.lora.rank=", "method.lora.rankStabilized="}),
        ("get -o ", {"yaml", "json", "wide", "name"}),
    ],
)
def test_the_shell_is_told_what_could_follow(typed: str, candidates: set[str]) -> None:
    words = ["finetune", *typed.split(" ")]
    environment = {
        **os.environ,
        "_FINETUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from finetune_cli.main import app; app(prog_name='finetune')"
    if not words[-1]:
        environment["COMP_WORDS"] += "''"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert set(found.stdout.split()) == candidates


def test_kubectl_is_told_what_could_follow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FINETUNE_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "argv", ["kubectl_complete-finetune", "status", "bot", "--wa"])
    main.kubectl_complete()
    assert capsys.readouterr().out.split() == ["--watch", ":4"]


def test_the_plugin_names_itself_as_it_is_called(
    call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/kubectl-finetune"])
    assert call("--help")[1].startswith("Usage: kubectl finetune [OPTIONS]")
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/kubectl-finetune", "--show-completion", "bash"])
    assert "_FINETUNE_COMPLETE=complete_bash" in call("--show-completion", "bash")[1]


def test_a_format_that_a_command_does_not_have_is_refused(call: Call) -> None:
    assert call("get", "-o", "table")[2] == "error: -o table: one of yaml, json, wide, name\n"
    assert call("status", "bot", "-o", "wide")[2] == "error: -o wide: one of yaml, json\n"
    assert "choose one" in call("status", "bot", "-o", "json", "--watch")[2]
    assert call("checkpoints", "bot", "--verify", "-o", "json")[2] == "error: --verify and -o: choose one\n"


def test_colours_only_where_they_are_wanted(write: Write, tmp_path: Path) -> None:
    def said(**more: str) -> str:
        command = f"{sys.executable} -m finetune_cli validate {tmp_path}/none"
        environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        words = ["script", "-qec", command, "/dev/null"]
        return subprocess.run(
            words, env={**environment, "TERM": "xterm", **more}, capture_output=True, text=True
        ).stdout

    assert "\x1b[1;31merror: " in said()
    assert "\x1b[1;31m" not in said(NO_COLOR="1")
