"""Preparing token sequences, and their cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from finetune_api.defaults import LATE_DEFAULT_PATHS
from finetune_api.errors import ConfigError, FineTuneError
from finetune_api.lineage import TRAINING_IMAGES
from finetune_trainer.data.prepare import (
    UNLIMITED_TOKENIZER_LENGTH,
    PreparedData,
    add_template_variables,
    choose_chat_template,
    inputs_digest,
    late_defaults,
    max_sequence_length,
    prepare,
)
from finetune_trainer.data.rows import Completion
from transformers import AutoTokenizer

from tests.support.data import decode_rows, prepare_rows, render_options, tokenizer, trained_texts
from tests.support.learning import TEN_ROWS, make_run, write_rows
from tests.support.tiny import CHATML_MARKED, make_tiny_model


def compute_sequence_limit(folder: Path, spec: dict[str, Any], model_limit: int | None, tokenizer_limit: int = UNLIMITED_TOKENIZER_LENGTH) -> int:
    run, _ = make_run(folder, Path("/models/tiny"), spec)
    return max_sequence_length(run, SimpleNamespace(model_max_length=tokenizer_limit), model_limit)


@pytest.mark.parametrize(
    ("method", "virtual_token_count"),
    [({}, 0), ({"type": "prefixTuning"}, 20), ({"type": "promptTuning", "promptLength": 8}, 8)],
    ids=["lora", "prefix", "prompt"],
)
def test_virtual_tokens_reduce_the_sequence_length(method: dict[str, Any], virtual_token_count: int, tmp_path: Path) -> None:
    assert compute_sequence_limit(tmp_path, {"method": method}, 512) == 512 - virtual_token_count
    assert compute_sequence_limit(tmp_path, {"method": method}, None, tokenizer_limit=256) == 256 - virtual_token_count
    assert compute_sequence_limit(tmp_path, {"method": method}, 4096) == 2048, "the default is the largest length that fits, but at most 2048"
    assert compute_sequence_limit(tmp_path, {"method": method, "dataset": {"maxSequenceLength": 512 - virtual_token_count}}, 512) == 512 - virtual_token_count
    with pytest.raises(ConfigError, match=f"write {512 - virtual_token_count} or less") as caught:
        compute_sequence_limit(tmp_path, {"method": method, "dataset": {"maxSequenceLength": 513 - virtual_token_count}}, 512)
    assert caught.value.code == "SequenceTooLong"
    assert ("method.promptLength takes" in caught.value.message) is bool(virtual_token_count)


def test_defaults_that_depend_on_the_model_are_reported_unless_the_user_set_the_field(tmp_path: Path) -> None:
    def read_late_defaults(dataset: dict[str, Any], template: str | None) -> dict[str, Any]:
        run, _ = make_run(tmp_path, Path("/models/tiny"), {"dataset": dataset})
        return late_defaults(run, SimpleNamespace(model_max_length=UNLIMITED_TOKENIZER_LENGTH, chat_template=template), 512)

    assert read_late_defaults({"numProc": 2}, "t") == {"dataset.maxSequenceLength": 512, "dataset.useChatTemplate": True}
    assert read_late_defaults({"numProc": 2, "useChatTemplate": False, "maxSequenceLength": 64}, None) == {}
    assert list(read_late_defaults({}, None)) == list(LATE_DEFAULT_PATHS)


def test_virtual_tokens_that_leave_no_position_are_refused(tmp_path: Path) -> None:
    spec = {"method": {"type": "promptTuning", "promptLength": 64}}
    with pytest.raises(ConfigError, match="64 positions and method.promptLength takes 64 of them, so no row fits") as caught:
        compute_sequence_limit(tmp_path, spec, 64)
    assert (caught.value.code, caught.value.exit_code) == ("SequenceTooLong", 64)
    assert "promptLength 32" in (caught.value.hint or "")


def test_prompt_and_completion_are_joined_without_a_template(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    data = prepare_rows(tmp_path, tok, {"format": "promptCompletion"}, [{"prompt": "one:", "completion": "red"}] * 3)
    assert decode_rows(tok, data) == [("one:red<|im_end|>", "red<|im_end|>")] * 3
    assert any("useChatTemplate" in note for note in data.notes)
    templated_data = prepare_rows(tmp_path / "b", tok, {"useChatTemplate": True}, [{"prompt": "one", "completion": "red"}])
    assert decode_rows(tok, templated_data)[0][0].startswith("<|im_start|>user\none")
    assert trained_texts(Completion("one ", "red"), render_options(tok, template=False)) == ["red"]


@pytest.mark.parametrize("first_source", ["text", "messages"])
def test_trained_tokens_do_not_depend_on_the_order_of_a_mixture(first_source: str, tmp_path: Path) -> None:
    """All tokens of plain text are trained on, but not the questions of a conversation, whichever source comes first."""
    tok = tokenizer(tmp_path)
    text_rows, completion_rows = [{"text": "two plus"}], [{"prompt": "one ", "completion": "two"}]
    sources = [text_rows, completion_rows, TEN_ROWS[:1]] if first_source == "text" else [TEN_ROWS[:1], completion_rows, text_rows]
    files = [[write_rows(tmp_path / f"{i}.jsonl", rows)] for i, rows in enumerate(sources)]
    mixture = [{"source": f"s3://data/{i}.jsonl"} for i in range(3)]
    run, inputs = make_run(tmp_path, Path("/models/tiny"), {"dataset": {"train": None, "mixture": mixture}})
    inputs = inputs.model_copy(update={"train": [], "mixture": files})
    trained_rows = decode_rows(tok, prepare(run, inputs, tok, max_positions=512, cache_folder=tmp_path / "tokens"))
    assert sorted(trained_rows) == sorted([
        ("two plus<|im_end|>", "two plus<|im_end|>"), ("one two<|im_end|>", " two<|im_end|>"),
        ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n", "red<|im_end|>"),
    ])  # fmt: skip


def test_a_length_beyond_the_model_is_refused_and_a_default_is_lowered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_rows(tmp_path, tokenizer(tmp_path), {"maxSequenceLength": 1024})
    assert caught.value.code == "SequenceTooLong" and "512 positions" in caught.value.message
    assert prepare_rows(tmp_path, tokenizer(tmp_path)).max_sequence_length == 512
    assert prepare_rows(tmp_path, tokenizer(tmp_path), limit=4096).max_sequence_length == 2048


def test_a_changed_image_changes_the_digest(tmp_path: Path) -> None:
    run, inputs = make_run(tmp_path, Path("/models/tiny"), {}, list(TEN_ROWS))
    vision, tok = SimpleNamespace(identity="processor"), tokenizer(tmp_path)
    digests = {inputs_digest(run, inputs.model_copy(update={"image_digests": {TRAINING_IMAGES: digest}}), tok, 512, vision) for digest in "aab"}  # type: ignore[arg-type]
    assert len(digests) == 2


def test_tokens_are_cached_by_content(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    assert prepare_rows(tmp_path, tok).is_from_cache is False
    assert prepare_rows(tmp_path, tok).is_from_cache is True
    assert prepare_rows(tmp_path, tok, {"addEosToken": False}).is_from_cache is False
    assert prepare_rows(tmp_path, tok, {}, TEN_ROWS[:9]).is_from_cache is False
    assert prepare_rows(tmp_path, tokenizer(tmp_path, CHATML_MARKED)).is_from_cache is False


def compute_digest(folder: Path, change: dict[str, Any] | None = None, *, rows: Any = TEN_ROWS, **changed_inputs: Any) -> str:
    """Return the inputs digest of a run with these rows. `change`: options of `dataset`."""
    run, inputs = make_run(folder, Path("/models/tiny"), {"dataset": {"format": "messages", **(change or {})}}, list(rows))
    inputs, tok = inputs.model_copy(update=changed_inputs), tokenizer(folder)
    choose_chat_template(run, inputs, tok)
    return inputs_digest(run, inputs, tok, 512)


def test_the_digest_depends_on_contents_and_not_on_addresses(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        folder.mkdir()
    expected_digest = compute_digest(folders[0], {"train": "s3://one/train.jsonl"})
    same_digests = [
        compute_digest(folders[1], {"train": "s3://two/other/train.jsonl", "storage": {"endpoint": "https://s3.example.com"}}),
        compute_digest(folders[2], {"train": "pvc://claim/train.jsonl", "numProc": 3}),
        compute_digest(folders[3]),
    ]
    assert set(same_digests) == {expected_digest}
    file = write_rows(tmp_path / "train.jsonl", TEN_ROWS)
    digest_from_known_hash = compute_digest(folders[3], train=[file], file_digests={file: hashlib.sha256(file.read_bytes()).hexdigest()})
    assert digest_from_known_hash == expected_digest, "the sha256 from the download has the same effect as hashing the file"
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "maps/t").mkdir(parents=True)
    (tmp_path / "maps/t/chat.jinja").write_text(text)
    digest_with_template = compute_digest(folders[3], {"chatTemplate": {"text": text}})
    reference = {"configMapRef": {"name": "t", "key": "chat.jinja"}}
    assert digest_with_template == compute_digest(folders[3], {"chatTemplate": reference}, config_maps=tmp_path / "maps")
    changed_rows = [*TEN_ROWS[:-1], TEN_ROWS[0]]
    renamed_file = write_rows(tmp_path / "train.txt", TEN_ROWS)
    other_digests = [
        compute_digest(folders[3], rows=changed_rows), compute_digest(folders[3], rows=TEN_ROWS[::-1]), compute_digest(folders[3], train=[renamed_file]),
        compute_digest(folders[3], {"packing": True}), compute_digest(folders[3], {"overflow": "drop"}), compute_digest(folders[3], {"badRows": "skip"}),
        compute_digest(folders[3], train=[file], validation=[file]), compute_digest(folders[3], train=[file, file]),
        compute_digest(folders[3], train=[file], test=[file]), digest_with_template,
    ]  # fmt: skip
    assert len({expected_digest, *other_digests}) == len(other_digests) + 1


def test_the_digest_depends_on_tokenizer_settings_outside_of_its_backend(tmp_path: Path) -> None:
    run, inputs = make_run(tmp_path, Path("/models/tiny"), {}, list(TEN_ROWS))
    tok = tokenizer(tmp_path)
    first_digest = inputs_digest(run, inputs, tok, 512)
    tok.init_kwargs |= {"name_or_path": "/elsewhere", "tokenizer_file": "/elsewhere/tokenizer.json", "cache_dir": "/elsewhere", "_commit_hash": "f"}
    assert inputs_digest(run, inputs, tok, 512) == first_digest
    tok.init_kwargs["split_special_tokens"] = True
    assert inputs_digest(run, inputs, tok, 512) != first_digest


def test_the_digest_depends_on_remote_code(tmp_path: Path) -> None:
    run, inputs = make_run(tmp_path, Path("/models/tiny"), {"model": {"trustRemoteCode": True}}, list(TEN_ROWS))
    tok = tokenizer(tmp_path)
    inputs = inputs.model_copy(update={"tokenizer": tmp_path / "own"})
    (tmp_path / "own/parts").mkdir(parents=True)
    digests = set()
    for code in ("one = 1", "one = 2"):
        (tmp_path / "own/parts/tokenization_own.py").write_text(code)
        digests.add(inputs_digest(run, inputs, tok, 512))
    assert len(digests) == 2


@pytest.mark.parametrize(("text", "is_shared"), [("{{ strftime_now('%d %b %Y') }}", False), ("", True)])
def test_rows_with_the_date_are_not_shared(tmp_path: Path, text: str, is_shared: bool) -> None:
    template = text + "{% for m in messages %}{{ m.role + '=' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant={% endif %}"
    run, inputs = make_run(tmp_path, Path("/models/tiny"), {"dataset": {"chatTemplate": {"text": template}}}, list(TEN_ROWS))
    requested_digests: list[str] = []
    callbacks = SimpleNamespace(provide_rows=requested_digests.append, count_rows=lambda _: None)
    prepare(run, inputs, tokenizer(tmp_path), max_positions=512, cache_folder=tmp_path / "tokens", preparation=callbacks)
    assert len(requested_digests) == is_shared


def render_with_variables(folder: Path, variables: dict[str, str], **given_variables: Any) -> str:
    template = "{% if thinking is defined and thinking %}<think>{% endif %}{{ level }}:{% for message in messages %}{{ message['content'] }}{% endfor %}"
    run, inputs = make_run(folder, make_tiny_model(folder / "model"), {"dataset": {"chatTemplate": {"text": template}, "templateVariables": variables}})
    tok = AutoTokenizer.from_pretrained(inputs.model)
    for _ in range(2):
        choose_chat_template(run, inputs, tok)
    assert tok.chat_template.count("is not defined") == len(variables)
    return str(tok.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, **given_variables))


@pytest.mark.parametrize(
    ("variables", "given_variables", "expected_text"),
    [
        ({"thinking": "false", "level": "3"}, {}, "3:x"), ({"thinking": "true", "level": "high"}, {}, "<think>high:x"),
        ({"thinking": "true"}, {"thinking": False, "level": 1}, "1:x"), ({"level": '"3"'}, {"thinking": "no"}, "<think>3:x"), ({"level": "null"}, {}, "None:x"),
        ({"level": "\U0001f600"}, {}, "\U0001f600:x"), ({"level": '{"a": [null, true]}'}, {}, "{'a': [None, True]}:x"), ({"level": "NaN"}, {}, "NaN:x"),
    ],
)  # fmt: skip
def test_template_variables_of_the_spec_are_defaults(variables: dict[str, str], given_variables: dict[str, Any], expected_text: str, tmp_path: Path) -> None:
    assert render_with_variables(tmp_path, variables, **given_variables) == expected_text


def test_a_variable_that_the_template_does_not_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        render_with_variables(tmp_path, {"enable_thinking": "false"})
    assert caught.value.code == "TemplateVariableUnknown" and "does not use enable_thinking" in caught.value.message


@pytest.mark.parametrize(
    ("json_text", "expected_repr"),
    [
        ("NaN", "'NaN'"), ("-Infinity", "'-Infinity'"), ("1e999", "'1e999'"), ("[null, 1.5]", "[None, 1.5]"),
        ('{"a": null, "b": [true, {}]}', "{'a': None, 'b': [True, {}]}"), ("null", "None"), ("{% x", "'{% x'"),
    ],
)  # fmt: skip
def test_a_template_variable_has_the_value_of_its_json(json_text: str, expected_repr: str) -> None:
    template = add_template_variables("{{ value.__repr__() }}", {"value": json_text})
    assert jinja2.Environment().from_string(template).render() == expected_repr


def test_the_chat_template_of_the_spec_is_used(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    template = "{% for m in messages %}{{ m.role + '=' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant={% endif %}"
    data = prepare_rows(tmp_path, tok, {"chatTemplate": {"text": template}})
    assert decode_rows(tok, data)[0] == ("user=one<|im_end|>assistant=red<|im_end|>", "red<|im_end|>")
    with pytest.raises(FineTuneError) as caught:
        prepare_rows(tmp_path, tok, {"chatTemplate": {"configMapRef": {"name": "t", "key": "chat.jinja"}}})
    assert caught.value.code == "ConfigMapMissing"


@pytest.mark.parametrize("changed_split", ["validation", "test"])
def test_changed_validation_or_test_rows_are_tokenised_again(changed_split: str, tmp_path: Path) -> None:
    """The file keeps its name; only its content changes."""
    tok = tokenizer(tmp_path)
    run, inputs = make_run(tmp_path, Path("/models/tiny"), rows=TEN_ROWS)
    files = {name: write_rows(tmp_path / f"{name}.jsonl", TEN_ROWS[:2]) for name in ("validation", "test")}
    inputs = inputs.model_copy(update={name: [file] for name, file in files.items()})

    def prepare_again() -> PreparedData:
        return prepare(run, inputs, tok, max_positions=512, cache_folder=tmp_path / "tokens")

    assert (prepare_again().is_from_cache, prepare_again().is_from_cache) == (False, True)
    write_rows(files[changed_split], TEN_ROWS[2:5])
    data = prepare_again()
    assert not data.is_from_cache
    assert data.rows[changed_split] == 3


def test_another_seed_changes_the_mixture(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    sources = [[write_rows(tmp_path / f"{i}.jsonl", TEN_ROWS[i * 5 : i * 5 + 5])] for i in range(2)]
    mixture = [{"source": f"s3://data/{i}.jsonl", "weight": 1 + 3 * i} for i in range(2)]

    def prepare_mixture(seed: int) -> PreparedData:
        spec = {"dataset": {"train": None, "mixture": mixture}, "training": {"seed": seed}}
        run, inputs = make_run(tmp_path, Path("/models/tiny"), spec)
        inputs = inputs.model_copy(update={"train": [], "mixture": sources})
        return prepare(run, inputs, tok, max_positions=512, cache_folder=tmp_path / "tokens")

    prepared_mixtures = [prepare_mixture(seed) for seed in range(4)]
    assert [data.is_from_cache for data in prepared_mixtures] == [False] * 4
    assert len({tuple(map(tuple, data.train["input_ids"])) for data in prepared_mixtures}) > 1
    assert prepare_mixture(0).is_from_cache and prepare_mixture(0).train["input_ids"] == prepared_mixtures[0].train["input_ids"]
