"""All data formats: detection, reading, and the errors for bad rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.spec.enums import DatasetFormat
from finetune_trainer.data import load
from finetune_trainer.data.formats import FORMATS as ALL_FORMATS
from finetune_trainer.data.rows import Completion, Conversation, LabelledAnswer, Preference, Prompt, Text, Turn

from tests.support.data import catch_check_error, load_examples, make_data_run

HI, HO = Turn("user", "hi"), Turn("assistant", "ho")
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CONTENT_PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
FORMAT_CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    # test id: (detected format, row, expected example)
    "messages": ("messages", {"messages": CHAT}, Conversation((HI, HO))),
    "messages, parts": ("messages", {"messages": [{"role": "human", "content": CONTENT_PARTS}, CHAT[1]]}, Conversation((HI, HO))),
    "conversation column": ("messages", {"conversation": CHAT}, Conversation((HI, HO))),
    "weight": ("messages", {"messages": [*CHAT, {**CHAT[1], "weight": 0}]}, Conversation((HI, HO, Turn("assistant", "ho", 0)))),
    "thinking": ("messages", {"messages": [CHAT[0], {**CHAT[1], "thinking": "hm"}]}, Conversation((HI, Turn("assistant", "ho", 1, {"thinking": "hm"})))),
    "system column": ("messages", {"system": "Be brief", "messages": CHAT}, Conversation((Turn("system", "Be brief"), HI, HO))),
    "sharegpt": ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, Conversation((HI, HO))),
    "sharegpt, role": ("sharegpt", {"conversations": [{"role": "human", "value": "hi"}, {"role": "bot", "value": "ho"}]}, Conversation((HI, HO))),
    "alpaca": ("alpaca", {"instruction": "hi", "input": "", "output": "ho"}, Conversation((HI, HO), role_names=("Instruction", "Output"))),
    "alpaca, input": (
        "alpaca", {"instruction": "hi", "input": "x", "output": "ho"},
        Conversation((Turn("user", "hi\n\nx"), HO), role_names=("Instruction", "Output")),
    ),
    "instruction": ("instruction", {"instruction": "hi", "response": "ho"}, Conversation((HI, HO), role_names=("Instruction", "Response"))),
    "qa": ("qa", {"question": "hi", "answer": "ho"}, Conversation((HI, HO), role_names=("Question", "Answer"))),
    "qa, capitals": ("qa", {"Question": "hi", "Response": "ho"}, Conversation((HI, HO), role_names=("Question", "Answer"))),
    "qa, context": ("qa", {"question": "hi", "answer": "ho", "context": "c"}, Conversation((Turn("user", "c\n\nhi"), HO), role_names=("Question", "Answer"))),
    "mcq": (
        "mcq", {"question": "hi", "options": {"A": "x", "B": "y"}, "answer": "B", "meta_info": "m"},
        Conversation((Turn("user", "hi\nA. x\nB. y"), Turn("assistant", "B")), role_names=("Question", "Answer"), columns={"options": ("A", "B")}),
    ),
    "mcq, answer as text": (
        "mcq", {"question": "hi", "options": ["x", "y"], "answer": "x"},
        Conversation((Turn("user", "hi\nA. x\nB. y"), Turn("assistant", "A")), role_names=("Question", "Answer"), columns={"options": ("A", "B")}),
    ),
    "promptCompletion": ("promptCompletion", {"prompt": "hi", "completion": "ho"}, Completion("hi", "ho")),
    "promptCompletion, turns": ("promptCompletion", {"prompt": CHAT[:1], "completion": CHAT[1:]}, Conversation((Turn("user", "hi", 0), HO))),
    "plainText": ("plainText", {"text": "hi ho"}, Text("hi ho")),
    "tree": (
        "oasst", {"prompt": {"text": "hi", "role": "prompter", "replies": [
            {"text": "no", "role": "assistant", "rank": 1, "replies": []}, {"text": "ho", "role": "assistant", "rank": 0, "replies": []}]}},
        Conversation((HI, HO)),
    ),
}  # fmt: skip
ANSWER_NO = {"role": "assistant", "content": "no"}
SYSTEM_BE = {"role": "system", "content": "be"}
SYSTEM_BECOME = {"role": "system", "content": "become"}
QUESTION_AND = {"role": "user", "content": "and"}
ANSWER_TURNS = ((HO,), (Turn("assistant", "no"),))
PAIR_OF_TURNS = Preference((HI,), *ANSWER_TURNS)
PREFERENCE_CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "text": ("dpo", {"prompt": "hi", "chosen": "ho", "rejected": "no"}, Preference("hi", "ho", "no")),
    "capitals": ("dpo", {"Question": "hi", "Chosen": "ho", "Rejected": "no"}, Preference("hi", "ho", "no")),
    "one message": ("dpo", {"prompt": CHAT[:1], "chosen": {"from": "gpt", "value": "ho"}, "rejected": ANSWER_NO}, PAIR_OF_TURNS),
    "turns": ("orpo", {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [ANSWER_NO]}, PAIR_OF_TURNS),
    "text prompt, each answer is a complete conversation": ("dpo", {"prompt": "hi", "chosen": CHAT, "rejected": [CHAT[0], ANSWER_NO]}, PAIR_OF_TURNS),
    "blanks at the end": ("dpo", {"prompt": "hi\n", "chosen": CHAT, "rejected": [CHAT[0], ANSWER_NO]}, Preference((Turn("user", "hi\n"),), *ANSWER_TURNS)),
    "each answer is a complete conversation": ("reward", {"prompt": CHAT[:1], "chosen": CHAT, "rejected": [CHAT[0], ANSWER_NO]}, PAIR_OF_TURNS),
    "complete conversation only in chosen": ("orpo", {"prompt": CHAT[:1], "chosen": CHAT, "rejected": "no"}, PAIR_OF_TURNS),
    "complete conversations with a system prompt": (
        "dpo", {"prompt": "hi", "chosen": [SYSTEM_BE, *CHAT], "rejected": [SYSTEM_BE, CHAT[0], ANSWER_NO]},
        Preference((Turn("system", "be"), *PAIR_OF_TURNS.prompt), *ANSWER_TURNS)
    ),
    "answers that begin with a second question": (
        "dpo", {"prompt": CHAT, "chosen": [QUESTION_AND, CHAT[1]], "rejected": [QUESTION_AND, ANSWER_NO]},
        Preference((HI, HO), (Turn("user", "and"), *ANSWER_TURNS[0]), (Turn("user", "and"), *ANSWER_TURNS[1])),
    ),
    "empty prompt, each answer is a complete conversation": ("dpo", {"prompt": "", "chosen": CHAT, "rejected": [CHAT[0], ANSWER_NO]}, PAIR_OF_TURNS),
    "empty prompt and labelled conversation": (
        "kto", {"prompt": " ", "completion": [SYSTEM_BE, *CHAT], "label": True}, LabelledAnswer((Turn("system", "be"), HI), (HO,), True)
    ),
    "empty prompt and complete conversation": ("sft", {"prompt": "", "completion": CHAT}, Conversation((HI, HO))),
    "empty prompt and answers without a question": (
        "dpo", {"prompt": "", "chosen": CHAT[1:], "rejected": [ANSWER_NO]}, Preference((Turn("user", ""),), *ANSWER_TURNS)
    ),
    "two questions without a prompt": (
        "dpo", {"chosen": [CHAT[0], QUESTION_AND, CHAT[1]], "rejected": CHAT[:1] + [ANSWER_NO]}, Preference((HI,), (Turn("user", "and"), HO), ANSWER_TURNS[1])
    ),
    "the same question twice without a prompt": (
        "dpo", {"chosen": [CHAT[0], *CHAT], "rejected": [CHAT[0], ANSWER_NO]}, Preference((HI,), (HI, HO), ANSWER_TURNS[1])
    ),
    "completion that begins with a second question": (
        "sft", {"prompt": CHAT[:1], "completion": [QUESTION_AND, CHAT[1]]}, Conversation((Turn("user", "hi", 0), Turn("user", "and"), HO))
    ),
    "a system column replaces system prompts": (
        "dpo", {"system": "be", "prompt": [SYSTEM_BECOME, CHAT[0]], "chosen": [SYSTEM_BE, *CHAT], "rejected": "no"},
        Preference((Turn("system", "be"), HI), *ANSWER_TURNS)
    ),
    "label and complete conversation": ("kto", {"prompt": "hi", "completion": CHAT, "label": True}, LabelledAnswer((HI,), (HO,), True)),
    "complete conversation as completion": ("sft", {"prompt": "hi", "completion": CHAT}, Conversation((Turn("user", "hi", 0), HO))),
    "implicit turns": ("reward", {"chosen": CHAT, "rejected": [CHAT[0], ANSWER_NO]}, PAIR_OF_TURNS),
    "implicit text": ("dpo", {"chosen": "Ask: tell me. yes", "rejected": "Ask: tell me. year"}, Preference("Ask: tell me. ", "yes", "year")),
    "judged": ("kto", {"prompt": "hi", "completion": "ho", "label": "False"}, LabelledAnswer("hi", "ho", False)),
    "prompt": ("grpo", {"prompt": "hi", "solution": 4}, Prompt("hi", {"solution": 4})),
    "question for grpo": ("grpo", {"question": "hi", "answer": "ho"}, Prompt((HI,), {"question": "hi", "answer": "ho"})),
}  # fmt: skip
MISMATCH_CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "another question": (
        "dpo", {"prompt": "hi", "chosen": [QUESTION_AND, CHAT[1]], "rejected": [QUESTION_AND, ANSWER_NO]},
        "PromptMismatch", "`chosen` begins",
    ),
    "only the last question": (
        "dpo", {"prompt": "and", "chosen": [*CHAT, QUESTION_AND, CHAT[1]], "rejected": [*CHAT, QUESTION_AND, ANSWER_NO]},
        "PromptMismatch", "`chosen` begins",
    ),
    "two system prompts": (
        "dpo", {"prompt": [SYSTEM_BE, CHAT[0]], "chosen": [SYSTEM_BECOME, *CHAT], "rejected": "no"}, "PromptMismatch", "system prompt",
    ),
    "judged": ("kto", {"prompt": "hi", "completion": [QUESTION_AND, CHAT[1]], "label": True}, "PromptMismatch", "`completion` begins"),
    "a completion that repeats the prompt in the middle": (
        "sft", {"prompt": CHAT[:1], "completion": [QUESTION_AND, ANSWER_NO, *CHAT]},
        "PromptMismatch", "`completion` begins",
    ),
    "no answer at all": ("kto", {"prompt": "", "completion": CHAT[:1], "label": True}, "NoTrainableToken", "no answer"),
    "no answer": ("kto", {"prompt": "hi", "completion": CHAT[:1], "label": True}, "NoTrainableToken", "ends with the prompt"),
}  # fmt: skip
BAD_CONVERSATIONS: dict[str, tuple[str, Any, str]] = {
    "empty": ("ConversationEmpty", [], "no messages"),
    "only system": ("ConversationEmpty", [{"role": "system", "content": "x"}], "has only a system prompt"),
    "unknown role": ("UnknownRole", [{"role": "alien", "content": "x"}, CHAT[1]], "'alien'"),
    "no role": ("DatasetRowInvalid", [{"content": "x"}], "neither `role` nor `from`"),
    "no content": ("DatasetRowInvalid", [{"role": "user"}], "has no content"),
    "no assistant": ("NoTrainableToken", CHAT[:1], "no answer to learn from"),
    "weight": ("DatasetRowInvalid", [CHAT[0], {**CHAT[1], "weight": 0.5}], "weight is 0.5"),
    "all weights 0": ("NoTrainableToken", [CHAT[0], {**CHAT[1], "weight": 0}], "has weight 0"),
    "not an array": ("DatasetRowInvalid", 3, "not an array"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMAT_CASES)
def test_every_format_is_detected_and_read(name: str, tmp_path: Path) -> None:
    format_name, row, expected = FORMAT_CASES[name]
    run, inputs = make_data_run(tmp_path, {}, [row])
    loaded_data = load(run, inputs)
    assert loaded_data.summary.format == format_name
    assert [example for _, example in loaded_data.train] == [expected]
    assert load_examples(tmp_path, {"format": format_name}, [row]) == [expected]


@pytest.mark.parametrize("name", PREFERENCE_CASES)
def test_rows_with_prompts_and_answers_are_read(name: str, tmp_path: Path) -> None:
    trainer, row, expected = PREFERENCE_CASES[name]
    spec = {"trainer": {"type": trainer, **({"rewards": [{"builtin": "thinkFormat"}]} if trainer == "grpo" else {})}}
    assert load_examples(tmp_path, rows=[row], spec=spec) == [expected]


def test_system_prompts_may_differ_if_the_spec_replaces_them(tmp_path: Path) -> None:
    rows = [{"prompt": [SYSTEM_BE, CHAT[0]], "completion": [SYSTEM_BECOME, *CHAT]}]
    spec = {"dataset": {"systemPrompt": "x"}}
    assert load_examples(tmp_path, rows=rows, spec=spec) == [
        Conversation((Turn("system", "x"), Turn("user", "hi", 0), HO))
    ]


@pytest.mark.parametrize("name", MISMATCH_CASES)
def test_an_answer_that_does_not_continue_the_prompt_is_a_bad_row(name: str, tmp_path: Path) -> None:
    trainer, row, code, make_oasst_message = MISMATCH_CASES[name]
    error = catch_check_error(tmp_path, rows=[row], spec={"trainer": {"type": trainer}})
    assert (error.code, error.exit_code) == (code, 65)
    assert make_oasst_message in error.message and "train.jsonl, row 1" in error.message


def test_the_best_ranked_path_of_an_oasst_tree_becomes_the_conversation(tmp_path: Path) -> None:
    rows = [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "hi"},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "worse", "rank": 1},
        {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "ho", "rank": 0},
        {"message_id": "4", "parent_id": "3", "role": "prompter", "text": "and"},
        {"message_id": "5", "parent_id": "4", "role": "assistant", "text": "so"},
    ]
    assert load_examples(tmp_path, rows=rows) == [Conversation((HI, HO, Turn("user", "and"), Turn("assistant", "so")))]


def test_an_oasst_message_without_its_parent_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"message_id": "1", "parent_id": "9", "role": "prompter", "text": "hi"}]
    error = catch_check_error(tmp_path, rows=rows)
    assert (error.code, error.exit_code) == ("ParentMissing", 65)
    assert "train.jsonl, row 1" in error.message and "'9'" in error.message


def make_oasst_message(name: str, parent: str | None, role: str = "prompter", text: str = "hi") -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "role": role, "text": text}


def test_oasst_messages_without_a_root_are_bad_rows(tmp_path: Path) -> None:
    tree = [make_oasst_message("1", None), make_oasst_message("2", "1", "assistant", "ho")]
    cycle = [make_oasst_message("a", "b"), make_oasst_message("b", "a", "assistant"), make_oasst_message("c", "b")]
    error = catch_check_error(tmp_path / "a", rows=[*tree, *cycle])
    assert (error.code, error.exit_code) == ("ParentsInCircle", 65)
    assert "train.jsonl, row 3" in error.message and "'b'" in error.message
    below = [make_oasst_message("d", "gone"), make_oasst_message("e", "d", "assistant")]
    skip = {"badRows": "skip", "maxBadRowRatio": 0.9}
    run, inputs = make_data_run(tmp_path / "b", {"dataset": skip}, [*cycle, *tree, *below])
    loaded_data = load(run, inputs)
    assert [example for _, example in loaded_data.train] == [Conversation((HI, HO))]
    assert loaded_data.summary.bad_rows == 5
    cycle_of_one = catch_check_error(tmp_path / "c", rows=[*tree, make_oasst_message("x", "x")])
    assert cycle_of_one.code == "ParentsInCircle" and "row 3" in cycle_of_one.message


@pytest.mark.timeout(30)
def test_a_second_oasst_message_with_the_same_id_is_a_bad_row(tmp_path: Path) -> None:
    rows = [make_oasst_message("1", None), make_oasst_message("2", "1", "assistant", "ho"), make_oasst_message("1", "2")]
    error = catch_check_error(tmp_path, rows=rows)
    assert (error.code, error.exit_code) == ("MessageIdTwice", 65)
    assert "row 3" in error.message and "train.jsonl, row 1" in error.message


def test_the_system_prompt_of_the_spec_takes_precedence_over_the_column(tmp_path: Path) -> None:
    row = {"question": "hi", "answer": "ho", "system": "column"}
    (example,) = load_examples(tmp_path, {"systemPrompt": "spec"}, [row])
    assert example.turns[0] == Turn("system", "spec")


def test_columns_are_read_under_the_names_in_dataset_columns(tmp_path: Path) -> None:
    row = {"q": "hi", "good": "ho", "persona": "You are kind."}
    columns = {"question": "q", "answer": "good", "system": "persona"}
    (example,) = load_examples(tmp_path, {"columns": columns}, [row])
    assert example.turns == (Turn("system", "You are kind."), HI, HO)


def test_the_messages_format_reads_question_and_answer_columns_named_in_dataset_columns(tmp_path: Path) -> None:
    dataset = {"format": "messages", "columns": {"question": "Question", "answer": "Response"}, "systemPrompt": "Help."}
    expected_conversation = Conversation((Turn("system", "Help."), HI, HO))
    assert load_examples(tmp_path / "a", dataset, [{"Question": "hi", "Response": "ho"}]) == [expected_conversation]
    assert load_examples(tmp_path / "b", dataset, [{"messages": CHAT}]) == [
        expected_conversation
    ]  # an existing messages column takes precedence
    error = catch_check_error(tmp_path / "c", dataset, [{"Question": "hi", "Answer": "ho"}])
    assert error.code == "ColumnMissing"
    assert "column `Response` (dataset.columns.answer)" in error.message and "`Question`, `Answer`" in error.message
    error = catch_check_error(tmp_path / "d", {"format": "messages"}, [{"Question": "hi", "Response": "ho"}])
    assert error.code == "ColumnMissing" and "`messages`" in error.message


def test_qa_rows_with_alpaca_columns_are_read_as_alpaca(tmp_path: Path) -> None:
    dataset = {"format": "qa", "columns": {"question": "question", "answer": "answer"}}
    row = {"instruction": "hi", "input": "x", "output": "ho"}
    run, inputs = make_data_run(tmp_path / "a", {"dataset": dataset}, [row])
    loaded_data = load(run, inputs)
    assert [example for _, example in loaded_data.train] == [
        Conversation((Turn("user", "hi\n\nx"), HO), role_names=("Instruction", "Output"))
    ]
    assert loaded_data.summary.format == "alpaca"
    assert loaded_data.summary.notes == [
        "no row has `question` or `answer` of dataset.columns, and all rows have `instruction` and `output`: the rows are read as alpaca"
    ]
    error = catch_check_error(tmp_path / "b", dataset, [row, {**row, "answer": "ho"}])
    assert error.code == "ColumnMissing" and "`instruction`, `input`, `output`" in error.message


def test_a_prompt_may_be_an_object_with_messages(tmp_path: Path) -> None:
    columns = {"question": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    row = {
        "input": {"messages": CHAT[:1], "tools": [], "parallel_tool_calls": True}, "preferred_output": CHAT[1:],
        "non_preferred_output": [ANSWER_NO],
    }  # fmt: skip
    dataset, spec = {"format": "preference", "columns": columns}, {"trainer": {"type": "dpo"}}
    assert load_examples(tmp_path / "a", dataset, [row], spec=spec) == [PAIR_OF_TURNS]
    row["input"] = {"messages": CHAT[:1], "tools": [{"type": "function"}]}
    error = catch_check_error(tmp_path / "b", dataset, [row], spec=spec)
    assert error.code == "DatasetRowInvalid" and "holds tools" in error.message


def test_one_column_may_hold_prompt_and_answer_of_kto(tmp_path: Path) -> None:
    columns = {"question": "messages", "answer": "messages", "label": "good"}
    spec = {"trainer": {"type": "kto"}, "dataset": {"format": "unpairedPreference", "columns": columns}}
    run, inputs = make_data_run(tmp_path, spec, [{"messages": CHAT, "good": False}])
    assert [example for _, example in load(run, inputs).train] == [LabelledAnswer((HI,), (HO,), False)]


def test_a_custom_template_inserts_columns_and_keeps_literal_braces(tmp_path: Path) -> None:
    dataset = {"format": "custom", "template": "{a} {{x}} {b}"}
    assert load_examples(tmp_path, dataset, [{"a": "1", "b": 2}]) == [Text("1 {x} 2")]


def test_mcq_options_can_be_left_out_of_the_question(tmp_path: Path) -> None:
    row = {"question": "hi", "options": {"A": "x", "B": "y"}, "answer": "a"}
    (example,) = load_examples(tmp_path, {"format": "mcq", "mcq": {"includeOptions": False}}, [row])
    assert [turn.content for turn in example.turns] == ["hi", "A"]


def test_tool_call_arguments_become_objects(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        CHAT[1],
    ]
    (example,) = load_examples(tmp_path, rows=[{"messages": turns, "tools": [{"type": "function"}]}])
    assert example.turns[1].extra["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert example.tools == ({"type": "function"},)


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_a_bad_conversation_is_refused(name: str, tmp_path: Path) -> None:
    code, turns, make_oasst_message = BAD_CONVERSATIONS[name]
    error = catch_check_error(tmp_path, rows=[{"messages": CHAT}, {"messages": turns}])
    assert (error.code, int(error.exit_code)) == (code, 65)
    assert error.message.startswith("train.jsonl, row 2: ") and make_oasst_message in error.message


def test_rows_without_an_answer_are_usable_when_all_tokens_are_trained_on(tmp_path: Path) -> None:
    dataset = {"responseOnly": {"enabled": False}}
    assert load_examples(tmp_path, dataset, [{"messages": CHAT[:1]}]) == [Conversation((HI,))]


def test_equal_answers_and_missing_prompts_are_refused(tmp_path: Path) -> None:
    spec = {"trainer": {"type": "dpo"}}
    assert (
        "are equal"
        in catch_check_error(tmp_path / "a", rows=[{"prompt": "a", "chosen": "b", "rejected": "b"}], spec=spec).message
    )
    assert catch_check_error(tmp_path / "b", rows=[{"chosen": "b", "rejected": "c"}], spec=spec).code == "PromptMissing"


def test_every_dataset_format_has_one_class() -> None:
    assert sorted(form.name for form in ALL_FORMATS) == sorted(DatasetFormat)
