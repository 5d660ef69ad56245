"""Whatever a user gives us is answered with a sentence and exit code 1: never with a trace, never with a secret."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from finetune_cli import cluster, main, output
from finetune_cli.hiding import hide, looks_secret

from tests.unit.cli.conftest import JOB, Call, Write

ENV = "MODEL_NAME=gpt2\nTRAIN_DATA_PATH=s3://data/t.jsonl\nDATASET_TYPE=mcq_jsonl\n"
FLAT = "model: org/m\nlora_r: 8\n"
TOKEN = "hf_" + "a1B2c3D4e5F6g7H8"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


def sentences(said: str, folder: Path) -> list[str]:
    """The errors of a command, without the test's folder."""
    return [
        line.removeprefix("error: ").replace(f"{folder}/", "")
        for line in said.splitlines()
        if line.startswith("error: ")
    ]


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.env", "", ["a.env: it is empty"]),
        ("a.yaml", " \n\n", ["a.yaml: it is empty"]),
        ("a.yaml", "# nothing\n", ["a.yaml: it is empty"]),
        ("a.yaml", "hello\n", ["a.yaml: it is not a mapping of names and values"]),
        ("a.yaml", "\tmodel: x\n", ["a.yaml:1: it is not YAML: found character '\\t' that cannot start any token"]),
        ("a.yaml", FLAT + "lora_r: 16\n", ["a.yaml:3: lora_r: it stands twice: lines 2 and 3; keep one"]),
        ("a.yaml", FLAT + "---\n" + FLAT, ["a.yaml:4: a second document begins here; give one configuration a file"]),
        ("a.yaml", "model: &a [*a]\n", ["a.yaml:1: model[0]: an alias stands inside its own anchor; write the value itself"]),
        ("a.yaml", "? [a, b]\n: c\n" + FLAT, ["a.yaml:1: a name must be a text; write name: value"]),
        ("a.yaml", "model: !!python/name:os.system x\nlora_r: 8\n",
         ["a.yaml:1: model: the tag tag:yaml.org,2002:python/name:os.system is not read here; write the value itself"]),
        ("a.yaml", BOMB, ["a.yaml:1: it holds more than 20000 values, its aliases counted"]),
        ("a.yaml", "[" * 600, ["a.yaml: it is nested too deeply to be a configuration"]),
        ("a.yaml", "model: org/m\nlora_r: 99999999999999999999\nlearning_rate: .nan\nepochs: .inf\n", [
            'a.yaml:3: learning_rate: ".nan" is not a number; allowed: a number greater than 0',
            'a.yaml:4: epochs: ".inf" is not a number; allowed: a number greater than 0',
            "a.yaml:2: lora_r: 99999999999999999999: should be less than or equal to 4096",
        ]),
        ("a.env", ENV + "EPOCHS=1e400\nLEARNING_RATE=nan\nBATCH_SIZE=" + "9" * 5000 + "\n", [
            'a.env:4: EPOCHS: "1e400" is not an integer; allowed: an integer from 1 to 20',
            'a.env:5: LEARNING_RATE: "nan" is not a number; allowed: a number from 1e-05 to 0.0005',
            f'a.env:6: BATCH_SIZE: "{"9" * 77}..." is not an integer; allowed: an integer from 1 to 32',
        ]),
        ("a.toml", '[fine_tuner]\nbase_model_id = "m"\ntraining_data_id = "d"\n[[arr]]\n',
         ["a.toml:4: arr: unknown key; it is not an option of this TOML tool; remove it"]),
        ("a.toml", "[fine_tuner]\nepochs = " + "9" * 5000 + "\n", ["a.toml: a number is too long, or it is nested too deeply"]),
        ("a.json", "[1, 2]", ["a.json: it is not a JSON object"]),
        ("a.json", '{"model": "org/m", "training_file": "s3://data/t", "hyperparameters": [1], "method": "dpo", "seed": -1}', [
            "a.json:1: hyperparameters: it is a group of options, and one value is given; write hyperparameters.n_epochs and its like",
            "a.json:1: method: it is a group of options, and one value is given; write method.type and its like",
            "a.json:1: seed: -1 is out of range; allowed: an integer from 0 to 4294967295",
        ]),
        ("a.json", '{"model": "org/m", "training_file": ' + "9" * 5000 + "}", ["a.json: a number is too long, or it is nested too deeply"]),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_imported(call: Call, write: Write, name: str, text: str, expected: list[str]) -> None:
    path = write(name, text)
    code, out, said = call("import", path)
    assert (code, out) == (1, "")
    assert sentences(said, path.parent) == expected


def test_a_file_that_is_no_text(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.env").write_bytes(bytes(range(256)))
    for command in ("import", "validate"):
        code, _, said = call(command, tmp_path / "a.env")
        assert (code, sentences(said, tmp_path)) == (1, ["a.env: it is not a text in UTF-8"])
    assert call("validate", tmp_path)[2] == f"error: {tmp_path}: it is a folder, and a file is needed\n"
    assert call("import", tmp_path / "b.env")[2] == f"error: {tmp_path}/b.env: there is no such file\n"
    assert "is not recognised as the configuration of any tool" in call("import", tmp_path)[2]


@pytest.mark.parametrize(
    ("name", "text"), [("a.env", ENV), ("a.yaml", FLAT), ("job.yaml", JOB)], ids=["env", "guide", "job"]
)
def test_a_byte_order_mark_and_carriage_returns_mean_nothing(
    call: Call, write: Write, tmp_path: Path, name: str, text: str
) -> None:
    command = "validate" if text is JOB else "import"
    plain = call(command, write(name, text))
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert plain[0] == 0
    assert call(command, tmp_path / name) == plain


def test_anchors_and_merge_keys_are_read_as_kubectl_reads_them(call: Call, write: Write) -> None:
    text = "model: {base_model: org/m}\nfine_tuning:\n  method: lora\n  lora:\n    <<: [{r: 8, alpha: 4}, {r: 3, dropout: 0.2}]\n    alpha: 6\n"
    code, out, _ = call("import", write("a.yaml", text))
    assert code == 0
    assert "      rank: 8\n      alpha: 6\n      dropout: 0.2\n" in out
    job = JOB + "  training: &t {epochs: 2}\n  checkpoint: {<<: {steps: 30}}\n"
    assert call("validate", write("job.yaml", job))[0] == 0
    said = call("validate", write("job.yaml", JOB + "  checkpoint: {<<: {stps: 30}}\n"))[2]
    assert "spec.checkpoint.stps: unknown field; did you mean spec.checkpoint.steps?" in said


def test_standard_input(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    typed(ENV)
    code, out, _ = call("import", "-")
    assert (code, "name: imported" in out) == (0, True)
    typed(ENV + "EPOCHS=0\n")
    assert call("import", "-")[2].startswith("error: standard input:4: EPOCHS: ")
    typed(JOB)
    assert call("validate", "-")[:2] == (0, "standard input: bot: ok\n")
    typed("")
    assert call("validate", "-")[2] == "error: standard input: there is no FineTuneJob in it\n"


@pytest.mark.parametrize(
    "text", [TOKEN, f"see {TOKEN}", "https://me:pw@host.example/x", "http://host.example/?api_key=abc"]
)
def test_what_looks_like_a_secret_never_reaches_the_job(call: Call, write: Write, text: str) -> None:
    for line in (f"PAD_TOKEN={text}", f"PROJECT_NAME={text}", f"NOBODY_KNOWS={text}", text):
        code, out, said = call("import", write("a.env", f"{ENV}{line}\n"))
        assert (code, out) == (1, "")
        assert text not in said
        assert "pw" not in said
        assert TOKEN not in said
    code, out, said = call("import", write("a.env", ENV), "--set", f"model.padToken={text}")
    assert (code, out, text in said) == (1, "", False)


def test_a_secret_in_a_manifest_is_a_warning_and_strictly_an_error(call: Call, write: Write) -> None:
    path = write("job.yaml", JOB + f"  placement: {{env: [{{name: X, value: {TOKEN}}}]}}\n")
    code, _, said = call("validate", path)
    assert (code, "warning: " in said, "spec.placement.env: it looks like a token" in said) == (0, True, True)
    assert call("validate", "--strict", path)[0] == 1


def test_what_is_a_secret_by_its_look() -> None:
    for text in (
        TOKEN,
        "s3://a:b@host",
        {"a": [TOKEN]},
        "https://h/x?X-Amz-Signature=0a",
        "sk-" + "proj1" * 6,
        "ghp_" + "a" * 36,
    ):
        assert looks_secret(text)
    for text in (
        "hf_model.env",
        "hf-internal-testing/tiny",
        "org/sk-learn-classification-model",
        "s3://bucket/a@b",
        3,
        None,
    ):
        assert not looks_secret(text)
    assert hide(f"a {TOKEN} b https://u:p@h/?token=x&y=1") == "a *** b https://***@h/?token=***&y=1"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--set", "training"], "--set: training: it has no value; write --set training=VALUE, or training=null for none"),
        (["--set", "training=3"], "--set: training: it is a group of fields; set its fields, for example --set training.epochs=VALUE, "
                                  "or take it away with --set training=null"),
        (["--set", "training.epochs="], "--set: training.epochs: it has no value; write --set training.epochs=VALUE, or training.epochs=null for none"),
        (["--set", "training.epochs=.nan"], "--set: training.epochs: '.nan': should be a valid number, unable to parse string as a number"),
        (["--set", "training.epochs=1e999"], "--set: training.epochs: inf: should be a finite number"),
        (["--set", "trainer.rewards[0].weight=2"], "--set: trainer.rewards[0].weight: unknown field; a list is set as a whole: --set 'trainer.rewards=[...]'"),
        (["--set", "training.schedulerParameters.x=1"], "--set: training.schedulerParameters.x: unknown field; a map is set as a whole: "
                                                        "--set 'training.schedulerParameters={NAME: VALUE}'"),
        (["--set", "=3"], "--set: unknown field; `finetune explain` lists all"),
        (["--name", "A"], "--name: A: cannot be the name of a FineTuneJob; write a-z, 0-9 and -, a letter first, at most 40 characters"),
        (["--name", "a" * 41], f"--name: {'a' * 41}: cannot be the name of a FineTuneJob; write a-z, 0-9 and -, a letter first, at most 40 characters"),
        (["--namespace", "A B"], "--namespace: A B: cannot be the name of a namespace; write a-z, 0-9 and -, at most 63 characters"),
        (["--storage", "x"], "--storage: 'x': it is not of the right form; for example uri: s3://models/finetune (spec.storage.uri)"),
        (["--data", ""], "--data: it is empty; for example train: s3://data/train.jsonl (spec.dataset.train)"),
        (["--gpus", "-1"], "--gpus: -1: should be greater than or equal to 0"),
        (["--prompts", "A_B/k"], "--prompts: A_B/k: it is not the name and key of a ConfigMap; write NAME/KEY"),
        (["--from", "nobody"], "--from: nobody: is not a source known here; write one of env, toml, yaml, hydra, guide, openai"),
        (["-o", "/proc/nobody/x.yaml"], "/proc/nobody/x.yaml cannot be written: No such file or directory; name another place with -o"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be(call: Call, write: Write, option: list[str], expected: str) -> None:
    path = write("a.env", ENV)
    code, out, said = call("import", path, *option)
    assert (code, out, sentences(said, path.parent)) == (1, "", [expected])


def test_set_reads_lists_maps_and_words(call: Call, write: Write) -> None:
    code, out, _ = call(
        "import", write("a.env", ENV), "--set", "method.lora.targetModules=q_proj,v_proj", "--set", "training.schedulerParameters={x: 1, z: true}",
        "--set", "dataset.systemPrompt=no",
    )  # fmt: skip
    assert code == 0
    assert "targetModules: [q_proj, v_proj]" in out
    assert '      x: "1"\n      z: "true"\n' in out
    assert 'systemPrompt: "no"' in out


# --- validate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("  method: ~\n  training:\n", []),
        ("  storage: {uri: 's3://models/x', credentialsSecretRef: {name: 3}}\n",
         ["job.yaml:7: spec.storage.credentialsSecretRef.name: 3: should be a valid string [ValueInvalid]"]),
        ("  storage: {uri: 'http://x', credentialsSecretRef: {}}\n", [
            "job.yaml:7: spec.storage.credentialsSecretRef.name: it is missing, and it is required; for example name: s3-credentials [ValueInvalid]",
            "job.yaml:7: spec.storage.uri: 'http://x': it is not of the right form; for example uri: s3://models/finetune [ValueInvalid]",
        ]),
        ("  storage: {credentialsSecretRef: {}}\n  training: {warmupSteps: 1, warmupRatio: 0.1}\n", [
            "job.yaml:7: spec.storage.credentialsSecretRef.name: it is missing, and it is required; for example name: s3-credentials [ValueInvalid]",
            "job.yaml:8: spec.training.warmupRatio: warmupSteps 1 and warmupRatio 0.1 exclude each other; remove one of them [WarmupTwice]",
        ]),
        ("  trainer: {type: grpo, rewards: [3]}\n", ["job.yaml:7: spec.trainer.rewards[0]: 3: should be an object [ValueInvalid]"]),
        ("  training: hello\n", ["job.yaml:7: spec.training: 'hello': should be an object [ValueInvalid]"]),
        ("  training: {epochs: .nan, seed: 99999999999}\n", [
            "job.yaml:7: spec.training.epochs: '.nan': should be a valid number [ValueInvalid]",
            "job.yaml:7: spec.training.seed: 99999999999: should be less than or equal to 4294967295 [ValueInvalid]",
        ]),
        ("  training: &a {x: *a}\n", ["job.yaml:7: spec.training.x: an alias stands inside its own anchor; write the value itself"]),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_be(call: Call, write: Write, more: str, expected: list[str]) -> None:
    path = write("job.yaml", JOB + more)
    code, _, said = call("validate", path)
    assert (code, sentences(said, path.parent)) == (1 if expected else 0, expected)


@pytest.mark.parametrize("split", ["{train: 0}", "{train: 0, validation: 0.5, test: 0.5}", "{train: 0, validation: 1}"])
def test_something_must_be_left_for_training(call: Call, write: Write, split: str) -> None:
    path = write("job.yaml", JOB.replace('t.jsonl"', f't.jsonl", split: {split}'))
    code, _, said = call("validate", path)
    assert code == 1
    assert sentences(said, path.parent) == [
        "job.yaml:6: spec.dataset.split.train: 0: should be greater than 0 [ValueInvalid]"
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: bot", "name: 3", [
            "job.yaml:3: metadata.name: '3' cannot be the name of a FineTuneJob; a-z, 0-9 and -, a letter first, at most 40 characters [NameInvalid]"]),
        ("name: bot", "name: bot, labels: {a: 1, b: true}, anotations: {}", [
            "job.yaml:3: metadata.anotations: unknown field; did you mean metadata.annotations? [UnknownField]",
            'job.yaml:3: metadata.labels.a: 1 is not a text; quote it: "1" [ValueInvalid]',
            'job.yaml:3: metadata.labels.b: true is not a text; quote it: "true" [ValueInvalid]']),
        ("kind: FineTuneJob", "kind: FinetuneJob", ["job.yaml:2: kind: FinetuneJob is not FineTuneJob; write kind: FineTuneJob [Kind]"]),
        ("apiVersion: finetune-operator.io/v1alpha1\n", "",
         ["job.yaml: apiVersion: it is missing; write apiVersion: finetune-operator.io/v1alpha1 [ApiVersion]"]),
    ],
)  # fmt: skip
def test_a_frame_that_cannot_be(call: Call, write: Write, old: str, new: str, expected: list[str]) -> None:
    path = write("job.yaml", JOB.replace(old, new))
    code, _, said = call("validate", path)
    assert (code, sentences(said, path.parent)) == (1, expected)


# --- files to write, and clusters -----------------------------------------------------------------------------------


def test_places_that_cannot_be_written(call: Call, write: Write, tmp_path: Path) -> None:
    words = ("init", "bot", "--model", "org/m", "--data", "s3://data/t.jsonl", "-o")
    assert call(*words, "/proc/nobody/x")[2].startswith("error: /proc/nobody/x cannot be written: ")
    assert call(*words, tmp_path)[2] == f"error: {tmp_path} exists; name another file\n"
    job = write("job.yaml", JOB)
    assert call("run", job, "--local", "-o", "/proc/nobody")[2].startswith("error: /proc/nobody cannot be written: ")
    assert call("import", write("a.env", ENV), "-o", tmp_path)[2].endswith(
        f"error: {tmp_path} cannot be written: Is a directory; name another place with -o\n"
    )


def test_init_tells_all_words_that_it_does_not_know(call: Call) -> None:
    said = call("init", "bot", "--model", "org/m", "--data", "org/d", "--method", "x", "--trainer", "y")[2]
    assert [line.split(" is not")[0] for line in said.splitlines()] == ["error: --method: x", "error: --trainer: y"]


KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:9"}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
users: [{name: u, user: {token: secret-of-mine}}]
current-context: x
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (KUBECONFIG, "the API server at http://127.0.0.1:9 cannot be reached: "),
        ("", "no cluster: "),
        ("a: [secret-of-mine", "config is not a kubeconfig that can be read (ParserError)"),
        ("[1, 2]", "config is not a kubeconfig that can be read (TypeError)"),
        (KUBECONFIG.replace("context: x", "context: y"), "no cluster: "),
        (KUBECONFIG.replace("token: secret-of-mine", "exec: {apiVersion: client.authentication.k8s.io/v1, command: /nobody, interactiveMode: Never}"),
         "no credentials from the kubeconfig: "),
    ],
)  # fmt: skip
def test_a_kubeconfig_that_leads_nowhere(call: Call, write: Write, text: str, expected: str) -> None:
    path = write("config", text)
    code, out, said = call("get", "--kubeconfig", path)
    assert (code, out) == (1, "")
    assert expected in said
    assert len(said.splitlines()) == 1
    assert "secret-of-mine" not in said


def test_a_name_is_never_a_path() -> None:
    one = cluster.Cluster(None, "team/../x")
    assert one._namespaced("pods", "../secrets/a?b") == "namespaces/team%2F..%2Fx/pods/..%2Fsecrets%2Fa%3Fb"


@pytest.mark.parametrize(
    "words",
    [("wait", "bot", "--timeout", "-1"), ("logs", "bot", "--rank", "-1"), ("rerun", "bot", "--from-checkpoint", "x")],
)
def test_numbers_out_of_their_range_are_wrong_usage(call: Call, words: tuple[str, ...]) -> None:
    code, _, said = call(*words)
    assert (code, "Error: Invalid value for" in said) == (1, True)


# --- faults of ours -------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_shows_no_trace_unless_asked(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*words: object, **more: object) -> None:
        raise KeyError(TOKEN)

    monkeypatch.setattr(main, "app", broken)
    code, out, said = call("get")
    assert (code, out) == (output.ERROR, "")
    assert said.startswith("error: this is a fault of finetune: KeyError in test_bad_input.py:")
    assert ("Traceback" in said, TOKEN in said) == (False, False)
    monkeypatch.setitem(os.environ, main.TRACE, "1")
    assert "Traceback" in call("get")[2]


def test_the_version(call: Call) -> None:
    code, out, _ = call("--version")
    assert (code, out.split()[0]) == (0, "finetune")
