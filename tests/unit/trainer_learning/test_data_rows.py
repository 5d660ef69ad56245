"""Rows of every format become the examples they should, and every bad row has a name, a place and a way out."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError, DataError, FineTuneError
from finetune_api.pod import RunConfig
from finetune_trainer.data import DataSummary, check_files, load
from finetune_trainer.data.rows import Completion, Conversation, LabelledAnswer, Preference, Prompt, Text, Turn
from finetune_trainer.inputs import Inputs

from tests.support.learning import make_run, write_rows


def run_for(
    folder: Path,
    spec: dict[str, Any] | None = None,
    rows: Any = (),
    *,
    text: str | bytes | None = None,
    name: str = "train.jsonl",
) -> tuple[RunConfig, Inputs]:
    """A run over one file that holds `rows` as JSONL, or `text` as it is."""
    run, inputs = make_run(folder, Path("/models/tiny"), spec, rows)
    if text is not None:
        file = folder / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        inputs = inputs.model_copy(update={"train": [file]})
    return run, inputs


def examples(folder: Path, dataset: dict[str, Any] | None = None, rows: Any = (), **more: Any) -> list[Any]:
    """Typed training examples."""
    run, inputs = run_for(folder, {"dataset": dataset or {}, **more.pop("spec", {})}, rows, **more)
    return [example for _, example in load(run, inputs).train]


def failure(folder: Path, dataset: dict[str, Any] | None = None, rows: Any = (), **more: Any) -> FineTuneError:
    """The error that checking the files ends with."""
    run, inputs = run_for(folder, {"dataset": dataset or {}, **more.pop("spec", {})}, rows, **more)
    with pytest.raises(FineTuneError) as caught:
        check_files(run, inputs)
    return caught.value


U, A = Turn("user", "hi"), Turn("assistant", "ho")
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]

FORMATS: dict[str, tuple[str, dict[str, Any], Any]] = {
    # name: (format recognised, row, example)
    "messages": ("messages", {"messages": TURNS}, Conversation((U, A))),
    "messages, parts": ("messages", {"messages": [{"role": "human", "content": PARTS}, TURNS[1]]}, Conversation((U, A))),
    "conversation column": ("messages", {"conversation": TURNS}, Conversation((U, A))),
    "weight": ("messages", {"messages": [*TURNS, {**TURNS[1], "weight": 0}]}, Conversation((U, A, Turn("assistant", "ho", 0)))),
    "system column": ("messages", {"system": "Be brief", "messages": TURNS}, Conversation((Turn("system", "Be brief"), U, A))),
    "sharegpt": ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, Conversation((U, A))),
    "sharegpt, role": ("sharegpt", {"conversations": [{"role": "human", "value": "hi"}, {"role": "bot", "value": "ho"}]}, Conversation((U, A))),
    "alpaca": ("alpaca", {"instruction": "hi", "input": "", "output": "ho"}, Conversation((U, A), role_names=("Instruction", "Output"))),
    "alpaca, input": (
        "alpaca", {"instruction": "hi", "input": "x", "output": "ho"},
        Conversation((Turn("user", "hi\n\nx"), A), role_names=("Instruction", "Output")),
    ),
    "instruction": ("instruction", {"instruction": "hi", "response": "ho"}, Conversation((U, A), role_names=("Instruction", "Response"))),
    "qa": ("qa", {"question": "hi", "answer": "ho"}, Conversation((U, A), role_names=("Question", "Answer"))),
    "qa, capitals": ("qa", {"Question": "hi", "Response": "ho"}, Conversation((U, A), role_names=("Question", "Answer"))),
    "qa, context": ("qa", {"question": "hi", "answer": "ho", "context": "c"}, Conversation((Turn("user", "c\n\nhi"), A), role_names=("Question", "Answer"))),
    "mcq": (
        "mcq", {"question": "hi", "options": {"A": "x", "B": "y"}, "answer": "B", "meta_info": "m"},
        Conversation((Turn("user", "hi\nA. x\nB. y"), Turn("assistant", "B")), role_names=("Question", "Answer"), columns={"options": ("A", "B")}),
    ),
    "mcq, answer as text": (
        "mcq", {"question": "hi", "options": ["x", "y"], "answer": "x"},
        Conversation((Turn("user", "hi\nA. x\nB. y"), Turn("assistant", "A")), role_names=("Question", "Answer"), columns={"options": ("A", "B")}),
    ),
    "promptCompletion": ("promptCompletion", {"prompt": "hi", "completion": "ho"}, Completion("hi", "ho")),
    "promptCompletion, turns": ("promptCompletion", {"prompt": TURNS[:1], "completion": TURNS[1:]}, Conversation((Turn("user", "hi", 0), A))),
    "plainText": ("plainText", {"text": "hi ho"}, Text("hi ho")),
    "tree": (
        "oasst", {"prompt": {"text": "hi", "role": "prompter", "replies": [
            {"text": "no", "role": "assistant", "rank": 1, "replies": []}, {"text": "ho", "role": "assistant", "rank": 0, "replies": []}]}},
        Conversation((U, A)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    kind, row, wanted = FORMATS[name]
    run, inputs = run_for(tmp_path, {}, [row])
    loaded = load(run, inputs)
    assert loaded.summary.format == kind
    assert [example for _, example in loaded.train] == [wanted]
    assert examples(tmp_path, {"format": kind}, [row]) == [wanted]


NO = {"role": "assistant", "content": "no"}
S = {"role": "system", "content": "be"}
LED = {"role": "system", "content": "become"}
AND = {"role": "user", "content": "and"}
SIDES = ((A,), (Turn("assistant", "no"),))
TURN_PAIR = Preference((U,), *SIDES)
PREFERENCES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "text": ("dpo", {"prompt": "hi", "chosen": "ho", "rejected": "no"}, Preference("hi", "ho", "no")),
    "capitals": ("dpo", {"Question": "hi", "Chosen": "ho", "Rejected": "no"}, Preference("hi", "ho", "no")),
    "turns": ("orpo", {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [NO]}, TURN_PAIR),
    "text prompt, whole conversations": ("dpo", {"prompt": "hi", "chosen": TURNS, "rejected": [TURNS[0], NO]}, TURN_PAIR),
    "blanks at the end": ("dpo", {"prompt": "hi\n", "chosen": TURNS, "rejected": [TURNS[0], NO]}, Preference((Turn("user", "hi\n"),), *SIDES)),
    "whole conversations": ("reward", {"prompt": TURNS[:1], "chosen": TURNS, "rejected": [TURNS[0], NO]}, TURN_PAIR),
    "one whole conversation": ("orpo", {"prompt": TURNS[:1], "chosen": TURNS, "rejected": "no"}, TURN_PAIR),
    "whole conversations with a system prompt": (
        "dpo", {"prompt": "hi", "chosen": [S, *TURNS], "rejected": [S, TURNS[0], NO]}, Preference((Turn("system", "be"), *TURN_PAIR.prompt), *SIDES)
    ),
    "a further question": (
        "dpo", {"prompt": TURNS, "chosen": [AND, TURNS[1]], "rejected": [AND, NO]},
        Preference((U, A), (Turn("user", "and"), *SIDES[0]), (Turn("user", "and"), *SIDES[1])),
    ),
    "empty prompt, whole conversations": ("dpo", {"prompt": "", "chosen": TURNS, "rejected": [TURNS[0], NO]}, TURN_PAIR),
    "empty prompt, labelled conversation": (
        "kto", {"prompt": " ", "completion": [S, *TURNS], "label": True}, LabelledAnswer((Turn("system", "be"), U), (A,), True)
    ),
    "empty prompt, completed conversation": ("sft", {"prompt": "", "completion": TURNS}, Conversation((U, A))),
    "empty prompt, answers alone": (
        "dpo", {"prompt": "", "chosen": TURNS[1:], "rejected": [NO]}, Preference((Turn("user", ""),), *SIDES)
    ),
    "two questions without a prompt": (
        "dpo", {"chosen": [TURNS[0], AND, TURNS[1]], "rejected": TURNS[:1] + [NO]}, Preference((U,), (Turn("user", "and"), A), SIDES[1])
    ),
    "the same question twice without a prompt": (
        "dpo", {"chosen": [TURNS[0], *TURNS], "rejected": [TURNS[0], NO]}, Preference((U,), (U, A), SIDES[1])
    ),
    "a further question behind a question": (
        "sft", {"prompt": TURNS[:1], "completion": [AND, TURNS[1]]}, Conversation((Turn("user", "hi", 0), Turn("user", "and"), A))
    ),
    "system prompts that a column replaces": (
        "dpo", {"system": "be", "prompt": [LED, TURNS[0]], "chosen": [S, *TURNS], "rejected": "no"}, Preference((Turn("system", "be"), U), *SIDES)
    ),
    "judged, whole conversation": ("kto", {"prompt": "hi", "completion": TURNS, "label": True}, LabelledAnswer((U,), (A,), True)),
    "completion, whole conversation": ("sft", {"prompt": "hi", "completion": TURNS}, Conversation((Turn("user", "hi", 0), A))),
    "implicit turns": ("reward", {"chosen": TURNS, "rejected": [TURNS[0], NO]}, TURN_PAIR),
    "implicit text": ("dpo", {"chosen": "Ask: tell me. yes", "rejected": "Ask: tell me. year"}, Preference("Ask: tell me. ", "yes", "year")),
    "judged": ("kto", {"prompt": "hi", "completion": "ho", "label": "False"}, LabelledAnswer("hi", "ho", False)),
    "prompt": ("grpo", {"prompt": "hi", "solution": 4}, Prompt("hi", {"solution": 4})),
    "question for grpo": ("grpo", {"question": "hi", "answer": "ho"}, Prompt((U,), {"question": "hi", "answer": "ho"})),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_rows_of_other_objectives(name: str, tmp_path: Path) -> None:
    trainer, row, wanted = PREFERENCES[name]
    spec = {"trainer": {"type": trainer, **({"rewards": [{"builtin": "thinkFormat"}]} if trainer == "grpo" else {})}}
    assert examples(tmp_path, rows=[row], spec=spec) == [wanted]


def test_system_prompts_that_the_spec_replaces_may_differ(tmp_path: Path) -> None:
    rows = [{"prompt": [S, TURNS[0]], "completion": [LED, *TURNS]}]
    spec = {"dataset": {"systemPrompt": "x"}}
    assert examples(tmp_path, rows=rows, spec=spec) == [Conversation((Turn("system", "x"), Turn("user", "hi", 0), A))]


MISMATCHES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "another question": ("dpo", {"prompt": "hi", "chosen": [AND, TURNS[1]], "rejected": [AND, NO]}, "PromptMismatch", "`chosen` begins"),
    "only the last question": ("dpo", {"prompt": "and", "chosen": [*TURNS, AND, TURNS[1]], "rejected": [*TURNS, AND, NO]}, "PromptMismatch", "`chosen` begins"),
    "two system prompts": (
        "dpo", {"prompt": [S, TURNS[0]], "chosen": [LED, *TURNS], "rejected": "no"}, "PromptMismatch", "system prompt",
    ),
    "judged": ("kto", {"prompt": "hi", "completion": [AND, TURNS[1]], "label": True}, "PromptMismatch", "`completion` begins"),
    "a completion with the prompt further on": ("sft", {"prompt": TURNS[:1], "completion": [AND, NO, *TURNS]}, "PromptMismatch", "`completion` begins"),
    "no answer at all": ("kto", {"prompt": "", "completion": TURNS[:1], "label": True}, "NoTrainableToken", "no answer"),
    "no answer": ("kto", {"prompt": "hi", "completion": TURNS[:1], "label": True}, "NoTrainableToken", "ends with the prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_conversation_that_does_not_go_on_from_the_prompt_is_a_bad_row(name: str, tmp_path: Path) -> None:
    trainer, row, code, found = MISMATCHES[name]
    error = failure(tmp_path, rows=[row], spec={"trainer": {"type": trainer}})
    assert (error.code, error.exit_code) == (code, 65)
    assert found in error.message and "train.jsonl, row 1" in error.message


def test_oasst_rows_follow_the_best_rank(tmp_path: Path) -> None:
    rows = [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "hi"},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "worse", "rank": 1},
        {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "ho", "rank": 0},
        {"message_id": "4", "parent_id": "3", "role": "prompter", "text": "and"},
        {"message_id": "5", "parent_id": "4", "role": "assistant", "text": "so"},
    ]
    assert examples(tmp_path, rows=rows) == [Conversation((U, A, Turn("user", "and"), Turn("assistant", "so")))]


def test_oasst_orphan_is_named(tmp_path: Path) -> None:
    rows = [{"message_id": "1", "parent_id": "9", "role": "prompter", "text": "hi"}]
    error = failure(tmp_path, rows=rows)
    assert (error.code, error.exit_code) == ("ParentMissing", 65)
    assert "train.jsonl, row 1" in error.message and "'9'" in error.message


def message(name: str, parent: str | None, role: str = "prompter", text: str = "hi") -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "role": role, "text": text}


def test_oasst_messages_that_no_root_leads_to_are_named_and_counted(tmp_path: Path) -> None:
    tree = [message("1", None), message("2", "1", "assistant", "ho")]
    circle = [message("a", "b"), message("b", "a", "assistant"), message("c", "b")]
    error = failure(tmp_path / "a", rows=[*tree, *circle])
    assert (error.code, error.exit_code) == ("ParentsInCircle", 65)
    assert "train.jsonl, row 3" in error.message and "'b'" in error.message
    below = [message("d", "gone"), message("e", "d", "assistant")]
    skip = {"badRows": "skip", "maxBadRowRatio": 0.9}
    run, inputs = run_for(tmp_path / "b", {"dataset": skip}, [*circle, *tree, *below])
    loaded = load(run, inputs)
    assert [example for _, example in loaded.train] == [Conversation((U, A))]
    assert loaded.summary.bad_rows == 5
    itself = failure(tmp_path / "c", rows=[*tree, message("x", "x")])
    assert itself.code == "ParentsInCircle" and "row 3" in itself.message


@pytest.mark.timeout(30)
def test_oasst_ids_are_of_one_message(tmp_path: Path) -> None:
    rows = [message("1", None), message("2", "1", "assistant", "ho"), message("1", "2")]
    error = failure(tmp_path, rows=rows)
    assert (error.code, error.exit_code) == ("MessageIdTwice", 65)
    assert "row 3" in error.message and "train.jsonl, row 1" in error.message


def test_system_prompt_beats_the_column(tmp_path: Path) -> None:
    row = {"question": "hi", "answer": "ho", "system": "column"}
    (example,) = examples(tmp_path, {"systemPrompt": "spec"}, [row])
    assert example.turns[0] == Turn("system", "spec")


def test_columns_are_mapped(tmp_path: Path) -> None:
    row = {"q": "hi", "good": "ho", "persona": "You are kind."}
    columns = {"question": "q", "answer": "good", "system": "persona"}
    (example,) = examples(tmp_path, {"columns": columns}, [row])
    assert example.turns == (Turn("system", "You are kind."), U, A)


def test_messages_may_be_a_question_and_an_answer_in_named_columns(tmp_path: Path) -> None:
    dataset = {"format": "messages", "columns": {"question": "Question", "answer": "Response"}, "systemPrompt": "Help."}
    wanted = Conversation((Turn("system", "Help."), U, A))
    assert examples(tmp_path / "a", dataset, [{"Question": "hi", "Response": "ho"}]) == [wanted]
    assert examples(tmp_path / "b", dataset, [{"messages": TURNS}]) == [wanted]  # messages that are there come first
    error = failure(tmp_path / "c", dataset, [{"Question": "hi", "Answer": "ho"}])
    assert error.code == "ColumnMissing"
    assert "column `Response` (dataset.columns.answer)" in error.message and "`Question`, `Answer`" in error.message
    error = failure(tmp_path / "d", {"format": "messages"}, [{"Question": "hi", "Response": "ho"}])
    assert error.code == "ColumnMissing" and "`messages`" in error.message


def test_alpaca_rows_where_named_columns_are_absent(tmp_path: Path) -> None:
    dataset = {"format": "qa", "columns": {"question": "question", "answer": "answer"}}
    row = {"instruction": "hi", "input": "x", "output": "ho"}
    run, inputs = run_for(tmp_path / "a", {"dataset": dataset}, [row])
    loaded = load(run, inputs)
    assert [example for _, example in loaded.train] == [
        Conversation((Turn("user", "hi\n\nx"), A), role_names=("Instruction", "Output"))
    ]
    assert loaded.summary.format == "alpaca"
    assert loaded.summary.notes == [
        "no row has `question` or `answer` of dataset.columns, and all rows have `instruction` and `output`: they are read as alpaca"
    ]
    error = failure(tmp_path / "b", dataset, [row, {**row, "answer": "ho"}])
    assert error.code == "ColumnMissing" and "`instruction`, `input`, `output`" in error.message


def test_a_prompt_may_be_an_object_with_messages(tmp_path: Path) -> None:
    columns = {"question": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    row = {
        "input": {"messages": TURNS[:1], "tools": [], "parallel_tool_calls": True}, "preferred_output": TURNS[1:],
        "non_preferred_output": [NO],
    }  # fmt: skip
    dataset, spec = {"format": "preference", "columns": columns}, {"trainer": {"type": "dpo"}}
    assert examples(tmp_path / "a", dataset, [row], spec=spec) == [TURN_PAIR]
    row["input"] = {"messages": TURNS[:1], "tools": [{"type": "function"}]}
    error = failure(tmp_path / "b", dataset, [row], spec=spec)
    assert error.code == "DatasetRowInvalid" and "holds tools" in error.message


def test_custom_template_fills_columns_and_braces(tmp_path: Path) -> None:
    dataset = {"format": "custom", "template": "{a} {{x}} {b}"}
    assert examples(tmp_path, dataset, [{"a": "1", "b": 2}]) == [Text("1 {x} 2")]


def test_mcq_options_can_stay_out(tmp_path: Path) -> None:
    row = {"question": "hi", "options": {"A": "x", "B": "y"}, "answer": "a"}
    (example,) = examples(tmp_path, {"format": "mcq", "mcq": {"includeOptions": False}}, [row])
    assert [turn.content for turn in example.turns] == ["hi", "A"]


def test_tool_calls_get_objects_as_arguments(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        TURNS[1],
    ]
    (example,) = examples(tmp_path, rows=[{"messages": turns, "tools": [{"type": "function"}]}])
    assert example.turns[1].extra["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert example.tools == ({"type": "function"},)


FILES: dict[str, tuple[str, str | bytes]] = {
    "json array": ("a.json", '[{"text": "x"}, {"text": "y"}]'),
    "json data": ("a.json", '{"data": [{"text": "x"}, {"text": "y"}]}'),
    "jsonl under the name json": ("a.json", '{"text": "x"}\n{"text": "y"}\n'),
    "jsonl with blank lines and BOM": ("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n\n{"text": "y"}'),
    "csv": ("a.csv", "text,other\nx,1\ny,2\n"),
    "csv with semicolons": ("a.csv", "text;other\nx;1\ny;2\n"),
    "tsv": ("a.tsv", "text\tother\nx\t1\ny\t2\n"),
    "txt": ("a.txt", "x\n\ny\n"),
    "gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"text": "y"}\n')),
    "name without ending": ("data", '{"text": "x"}\n{"text": "y"}\n'),
}


@pytest.mark.parametrize("name", FILES)
def test_file_kinds(name: str, tmp_path: Path) -> None:
    file, text = FILES[name]
    assert examples(tmp_path, text=text, name=file) == [Text("x"), Text("y")]


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("csv", "text,other\nx,1\n", ["x"]),
        ("txt", '{"text": "x"}\n', ['{"text": "x"}']),
        ("jsonl", '{"text": "x"}\n', ["x"]),
        ("json", '[{"text": "x"}]', ["x"]),
    ],
)
def test_the_asked_kind_of_file_beats_its_name(kind: str, text: str, wanted: list[str], tmp_path: Path) -> None:
    found = examples(tmp_path, {"fileFormat": kind}, text=text, name="rows.parquet")
    assert found == [Text(one) for one in wanted]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"messages": [TURNS]}), tmp_path / "a.parquet")
    assert examples(tmp_path, text=(tmp_path / "a.parquet").read_bytes(), name="b.parquet") == [Conversation((U, A))]


GOOD = {"question": "hi", "answer": "ho"}
BAD_ROWS: dict[str, tuple[str, Any, str, str]] = {
    # name: (code, row 17, words of the message, words of the hint)
    "not JSON": ("DatasetRowInvalid", '{"question": "hi", ', "not valid JSON at column 19", "one JSON object per line"),
    "an array": ("DatasetRowInvalid", "[1]", "found an array", "one object per row"),
    "column gone": (
        "ColumnMissing",
        '{"question": "hi", "reply": "ho"}',
        "`question`, `reply`",
        "dataset.columns.answer",
    ),
    "null": ("DatasetRowInvalid", '{"question": "hi", "answer": null}', "`answer` is null", "remove the row"),
    "empty answer": (
        "NoTrainableToken",
        '{"question": "hi", "answer": " "}',
        "no answer to learn from",
        "add an answer",
    ),
    "empty question": ("RowEmpty", '{"question": "", "answer": "ho"}', "question is empty", "remove the row"),
    "a list": ("DatasetRowInvalid", '{"question": ["hi"], "answer": "ho"}', "holds list", "write a string"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_row_17_of_200_is_named(name: str, tmp_path: Path) -> None:
    code, line, found, write = BAD_ROWS[name]
    lines = [json.dumps(GOOD)] * 200
    lines[16] = line
    error = failure(tmp_path, text="\n".join(lines))
    assert isinstance(error, DataError)
    assert error.code == code and error.exit_code == 65
    assert error.message.startswith("train.jsonl, row 17: ")
    assert found in error.message
    assert write in (error.hint or "") and "badRows: skip" in (error.hint or "")


BAD_CONVERSATIONS: dict[str, tuple[str, Any, str]] = {
    "empty": ("ConversationEmpty", [], "no messages"),
    "only system": ("ConversationEmpty", [{"role": "system", "content": "x"}], "has only a system prompt"),
    "unknown role": ("UnknownRole", [{"role": "alien", "content": "x"}, TURNS[1]], "'alien'"),
    "no role": ("DatasetRowInvalid", [{"content": "x"}], "neither `role` nor `from`"),
    "no content": ("DatasetRowInvalid", [{"role": "user"}], "has no content"),
    "no assistant": ("NoTrainableToken", TURNS[:1], "no answer to learn from"),
    "weight": ("DatasetRowInvalid", [TURNS[0], {**TURNS[1], "weight": 0.5}], "weight is 0.5"),
    "all weights 0": ("NoTrainableToken", [TURNS[0], {**TURNS[1], "weight": 0}], "has weight 0"),
    "not an array": ("DatasetRowInvalid", 3, "not an array"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_bad_conversations(name: str, tmp_path: Path) -> None:
    code, turns, found = BAD_CONVERSATIONS[name]
    error = failure(tmp_path, rows=[{"messages": TURNS}, {"messages": turns}])
    assert (error.code, int(error.exit_code)) == (code, 65)
    assert error.message.startswith("train.jsonl, row 2: ") and found in error.message


def test_answerless_rows_are_fine_when_all_tokens_are_learned(tmp_path: Path) -> None:
    dataset = {"responseOnly": {"enabled": False}}
    assert examples(tmp_path, dataset, [{"messages": TURNS[:1]}]) == [Conversation((U,))]


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD)] * 60
    lines[4], lines[9] = "{", '{"question": "hi", "answer": ""}'
    run, inputs = run_for(tmp_path, {"dataset": {"badRows": "skip"}}, text="\n".join(lines))
    summary: DataSummary = check_files(run, inputs)
    assert (summary.rows["train"], summary.bad_rows) == (58, 2)
    assert summary.notes == [
        "2 of 60 rows were left out; the first: train.jsonl, row 5: not valid JSON at column 2: Expecting property name enclosed in double quotes"
    ]


def test_too_many_bad_rows(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD)] * 10 + ["{"]
    error = failure(tmp_path, {"badRows": "skip"}, text="\n".join(lines))
    assert error.code == "TooManyBadRows" and "1 of 11 rows" in error.message and "row 11" in error.message
    assert len(examples(tmp_path, {"badRows": "skip", "maxBadRowRatio": 0.1}, text="\n".join(lines))) == 10


@pytest.mark.parametrize(
    ("text", "name", "code", "found"),
    [
        ("", "train.jsonl", "DatasetEmpty", "no rows"),
        ("\n \n", "train.txt", "DatasetEmpty", "no rows"),
        ("[]", "train.json", "DatasetEmpty", "no rows"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "train.jsonl", "DatasetNotUtf8", "byte 24 is not UTF-8"),
        ("[1]".encode("utf-16"), "train.json", "DatasetNotUtf8", "UTF-16"),
        ("{", "train.json", "DatasetRowInvalid", "line 1, column 2"),
        ('"x"', "train.json", "DatasetRowInvalid", "found a string"),
        ("a,b\n1\n", "train.csv", "DatasetRowInvalid", "1 values, but the header names 2 columns (a, b)"),
        ("\x00\x01", "data", "FileFormatUnknown", "neither the name nor the first bytes"),
        ('{"x": 1}', "train.jsonl", "FormatUnknown", "the first row has `x`"),
        (b"PAR1junk", "train.parquet", "DatasetRowInvalid", "not a readable Parquet file"),
        (b"plain", "train.jsonl.gz", "DatasetRowInvalid", "not a readable gzip file"),
        (
            gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-20],
            "train.jsonl.gz",
            "DatasetRowInvalid",
            "not a readable gzip file",
        ),
        (gzip.compress(b"text\na\n", mtime=0)[:-9], "train.csv.gz", "DatasetRowInvalid", "not a readable gzip file"),
        ("[" * 100_000, "train.jsonl", "DatasetRowInvalid", "row 1: not valid JSON: maximum recursion depth"),
        ("[" * 100_000, "train.json", "DatasetRowInvalid", "not valid JSON: maximum recursion depth"),
        (f'[{{"text": {"1" * 5000}}}]', "train.json", "DatasetRowInvalid", "not valid JSON: Exceeds the limit"),
        (r'{"text": "a \ud83d b"}', "train.jsonl", "DatasetRowInvalid", r"row 1: `\ud83d` is half of a character"),
        (
            r'[{"text": "a"}, {"text": {"b": ["\uDE00"]}}]',
            "train.json",
            "DatasetRowInvalid",
            r"row 2: `\ude00` is half",
        ),
        ("question,answer,answer\nq,a,b\n", "train.csv", "DatasetRowInvalid", "names column 'answer' twice"),
    ],
)
def test_broken_files(text: str | bytes, name: str, code: str, found: str, tmp_path: Path) -> None:
    error = failure(tmp_path, text=text, name=name)
    assert (error.code, int(error.exit_code)) == (code, 65)
    assert found in error.message and name in error.message


def test_whole_characters_may_be_written_as_halves(tmp_path: Path) -> None:
    assert examples(tmp_path, text=r'{"text": "a \ud83d\ude00"}') == [Text("a \U0001f600")]


@pytest.mark.timeout(30)
def test_a_long_row_without_spaces_is_looked_at_once(tmp_path: Path) -> None:
    """A search that begins anew at every dot needs minutes for such a row."""
    dots = "a.b-c." * 50_000
    rows = [{"text": dots}, {"text": f"{dots}@{dots}"}, {"text": "to a.b@mail.example.org."}, {"text": "a@b"}]
    run, inputs = run_for(tmp_path, {"dataset": {"checks": {"piiScan": True}}}, rows)
    findings = check_files(run, inputs).findings
    assert findings.personal is not None and findings.personal["email"] == 1


# ---- mixtures


def mixed(folder: Path, dataset: dict[str, Any], *sources: Any) -> Any:
    """What is loaded of a mixture of sources, the first of weight 9."""
    items = [{"source": f"s3://data/{i}.jsonl", "weight": 1 if i else 9} for i in range(len(sources))]
    run, inputs = run_for(folder, {"dataset": {"train": None, "mixture": items, **dataset}})
    files = [[write_rows(folder / f"{i}.jsonl", rows)] for i, rows in enumerate(sources)]
    return load(run, inputs.model_copy(update={"train": [], "mixture": files}))


def texts(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"text": f"text {number}"} for number in range(first, first + count)]


def test_a_row_of_a_mixture_is_learned_or_held_out(tmp_path: Path) -> None:
    """A small source is gone through several times: its rows must not be both."""
    loaded = mixed(tmp_path, {"split": {"validation": 0.2, "test": 0.2}}, texts(4), texts(16, 100))
    train, validation, test = ({row.text for _, row in part} for part in (loaded.train, loaded.validation, loaded.test))
    assert (len(loaded.train), len(validation), len(test)) == (12, 4, 4)
    assert not train & validation and not train & test and not validation & test
    assert sum(row.text in {one["text"] for one in texts(4)} for _, row in loaded.train) == 11  # 9 of 10 parts


def test_leaving_out_duplicates_keeps_the_weights_of_a_mixture(tmp_path: Path) -> None:
    loaded = mixed(tmp_path, {"checks": {"deduplicate": True}}, texts(2) * 2, [*texts(1), *texts(8, 100)])
    assert loaded.summary.findings.duplicates == 3
    assert [row.text.startswith("text 10") for _, row in loaded.train].count(False) == 9
    assert len(loaded.train) == 10


def test_a_source_without_a_row_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        mixed(tmp_path, {"checks": {"deduplicate": True}}, texts(2), texts(2))
    assert caught.value.code == "DatasetEmpty" and "s3://data/1.jsonl: no row is left" in caught.value.message


def test_column_that_no_row_has_is_one_mistake(tmp_path: Path) -> None:
    error = failure(tmp_path, {"format": "qa", "columns": {"answer": "reply"}, "badRows": "skip"}, [GOOD])
    assert error.code == "ColumnMissing"
    assert "column `reply` (dataset.columns.answer)" in error.message and "`question`, `answer`" in error.message


def test_sft_refuses_preferences_and_dpo_refuses_conversations(tmp_path: Path) -> None:
    error = failure(tmp_path / "a", rows=[PREFERENCES["text"][1]])
    assert isinstance(error, ConfigError) and error.code == "FormatMismatch" and "preference" in error.message
    error = failure(tmp_path / "b", rows=[GOOD], spec={"trainer": {"type": "dpo"}})
    assert error.code == "FormatMismatch" and "dpo needs preference data; the rows are qa" in error.message


def test_equal_answers_and_missing_prompts_are_refused(tmp_path: Path) -> None:
    spec = {"trainer": {"type": "dpo"}}
    assert (
        "are equal"
        in failure(tmp_path / "a", rows=[{"prompt": "a", "chosen": "b", "rejected": "b"}], spec=spec).message
    )
    assert failure(tmp_path / "b", rows=[{"chosen": "b", "rejected": "c"}], spec=spec).code == "PromptMissing"


def test_response_only_on_plain_text_needs_markers(tmp_path: Path) -> None:
    rows = [{"text": "x"}]
    error = failure(tmp_path, {"responseOnly": {"enabled": True}}, rows)
    assert isinstance(error, ConfigError) or error.code == "ResponseOnlyWithoutTurns"
    assert "questionMarker" in (error.hint or "")
    assert examples(tmp_path, {"responseOnly": {"questionMarker": "Q:", "answerMarker": "A:"}}, rows) == [Text("x")]
    assert examples(tmp_path, {}, rows) == [Text("x")]


def test_answers_that_should_be_json(tmp_path: Path) -> None:
    rows = [{"question": "hi", "answer": '{"a": 1}'}, {"question": "hi", "answer": "{a: 1}"}]
    error = failure(tmp_path, {"checks": {"validateJson": True}}, rows)
    assert error.code == "AnswerNotJson" and "row 2" in error.message


def test_looks_at_the_data_are_reported(tmp_path: Path) -> None:
    rows = [
        {"question": "Mail me", "answer": "to a.b@example.org"}, {"question": "Mail me", "answer": "to a.b@example.org"},
        {"question": "Call", "answer": "+49 170 1234567"}, {"question": "Which", "answer": "yes"}, {"question": "What", "answer": "yes"},
    ]  # fmt: skip
    run, inputs = run_for(
        tmp_path, {"dataset": {"checks": {"deduplicate": True, "piiScan": True, "balance": True}}}, rows
    )
    summary = check_files(run, inputs)
    assert summary.rows["train"] == 4
    assert summary.findings.duplicates == 1
    assert summary.findings.personal == {"email": 1, "phone": 1, "creditCard": 0, "ipAddress": 0, "iban": 0}
    assert summary.findings.answers is not None and summary.findings.answers["yes"] == 2
    assert summary.findings.share_of_top_answer == 0.5
    assert not any("example.org" in note for note in summary.notes if "personal" in note)


def test_checking_imports_no_torch() -> None:
    code = "import sys, finetune_trainer.data as d; d.check_files; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
