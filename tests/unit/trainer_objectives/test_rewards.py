"""Scores of the built-in rewards, functions of users, and errors for invalid rewards before a model is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError, NotFoundError
from finetune_api.rules import REWARD_PARAMETERS, find_invalid_parameters
from finetune_api.spec.enums import BuiltinReward
from finetune_api.spec.trainer import Reward
from finetune_trainer.objective import reward_process
from finetune_trainer.objective.rewards import (
    BUILTIN_REWARDS,
    RewardParameters,
    build_rewards,
    completion_text,
    require_columns,
)

CITED_ANSWER = "<cited_answer><answer>Paris</answer><citations><source_id>7</source_id></citations></cited_answer>"


def build_one_reward(**spec: object):
    return build_rewards([Reward.model_validate(spec)], Path("absent"))[0]


def score_text(
    text: str, /, ids: list[int] | None = None, row: dict[str, object] | None = None, **spec: object
) -> float | None:
    columns = {name: [value] for name, value in (row or {}).items()}
    return build_one_reward(**spec)(prompts=["p"], completions=[text], completion_ids=[ids or []], **columns)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CITED_ANSWER, 1.0),
        (f"  {CITED_ANSWER}\n", 1.0),
        (f"Here: {CITED_ANSWER}", 0.0),
        (CITED_ANSWER.replace("<citations><source_id>7</source_id></citations>", ""), 0.0),
        (CITED_ANSWER.replace("<source_id>7</source_id>", ""), 0.0),
        (CITED_ANSWER.replace("Paris", "Pa\nris"), 0.0),
        ("", 0.0),
    ],
)
def test_citation_format_scores_complete_citations(text: str, expected: float) -> None:
    assert score_text(text, builtin="citationFormat") == expected


def test_citation_format_matches_over_several_lines_only_with_multiline() -> None:
    multiline_answer = CITED_ANSWER.replace("><", ">\n<").replace("Paris", "Paris\nindeed")
    assert score_text(multiline_answer, builtin="citationFormat") == 0.0
    assert score_text(multiline_answer, builtin="citationFormat", parameters={"multiline": "true"}) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>two and two</think>\nfour", 1.0),
        ("<think></think>four", 0.0),
        ("<think>a</think>", 0.0),
        ("four <think>a</think>", 0.0),
        ("<think>a</think>b<think>c</think>d", 0.0),
        ("<think>a four", 0.0),
    ],
)
def test_think_format_scores_one_think_block_followed_by_an_answer(text: str, expected: float) -> None:
    assert score_text(text, builtin="thinkFormat") == expected


def test_a_regex_matches_a_part_of_the_completion_or_the_whole_completion() -> None:
    assert score_text("so Answer: 4", builtin="regex", parameters={"pattern": r"Answer: \d"}) == 1.0
    assert score_text("so Answer: 4", builtin="regex", parameters={"pattern": r"Answer: \d", "match": "full"}) == 0.0
    assert score_text("ANSWER: 4", builtin="regex", parameters={"pattern": r"answer", "ignoreCase": "true"}) == 1.0
    assert score_text("a\nb", builtin="regex", parameters={"pattern": "a.b", "dotAll": "true"}) == 1.0


def test_exact_match_compares_the_completion_with_a_column() -> None:
    assert score_text(" four ", builtin="exactMatch", row={"answer": "four"}) == 1.0
    assert score_text("five", builtin="exactMatch", row={"answer": "four"}) == 0.0
    assert (
        score_text("Four", builtin="exactMatch", row={"gold": "four"}, parameters={"column": "gold", "ignoreCase": "true"})
        == 1.0
    )
    extract_parameters = {"extract": r"####\s*(\S+)"}
    assert score_text("3 no #### 3 #### 4", builtin="exactMatch", row={"answer": 4}, parameters=extract_parameters) == 1.0
    assert score_text("4", builtin="exactMatch", row={"answer": 4}, parameters=extract_parameters) == 0.0


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 0.0), (5, 0.5), (10, 1.0), (20, 1.0), (30, 0.5), (40, 0.0), (99, 0.0)]
)
def test_the_length_reward_falls_linearly_outside_its_bounds(size: int, expected: float) -> None:
    assert score_text("x", ids=[1] * size, builtin="length", parameters={"minimum": "10", "maximum": "20"}) == expected


def test_the_length_reward_counts_the_unit_of_the_spec() -> None:
    assert score_text("one two", builtin="length", parameters={"unit": "words", "minimum": "4"}) == 0.5
    assert score_text("abcd", builtin="length", parameters={"unit": "characters", "maximum": "4"}) == 1.0


def test_json_schema_scores_json_that_matches_the_schema_and_other_json() -> None:
    spec = {
        "builtin": "jsonSchema",
        "parameters": {"schema": '{"type": "object", "required": ["a"]}', "parsed": "0.25"},
    }
    assert score_text('{"a": 1}', **spec) == 1.0
    assert score_text('```json\n{"a": 1}\n```', **spec) == 1.0
    assert score_text('{"b": 1}', **spec) == 0.25
    assert score_text("{a: 1}", **spec) == 0.0


def test_a_completion_of_messages_is_read_as_text() -> None:
    assert completion_text([{"role": "assistant", "content": "four"}]) == "four"
    assert build_one_reward(builtin="regex", parameters={"pattern": "^four$"})(
        completions=[[{"role": "assistant", "content": "four"}]]
    ) == [1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"builtin": "regex"}, r"trainer.rewards\[0\].parameters.pattern is missing"),
        ({"builtin": "regex", "parameters": {"pattern": "("}}, "not a regular expression"),
        ({"builtin": "regex", "parameters": {"pattern": "a", "ignoreCase": "yes"}}, "write true or false"),
        ({"builtin": "regex", "parameters": {"pattern": "a", "match": "begin"}}, "search, full"),
        ({"builtin": "thinkFormat", "parameters": {"pattern": "a"}}, "thinkFormat has no parameter pattern"),
        ({"builtin": "length"}, "neither minimum nor maximum"),
        ({"builtin": "length", "parameters": {"minimum": "ten"}}, "write a number"),
        ({"builtin": "length", "parameters": {"minimum": "20", "maximum": "10"}}, "up to the maximum, 10"),
        ({"builtin": "jsonSchema", "parameters": {"schema": "{"}}, "not JSON"),
        ({"builtin": "jsonSchema", "parameters": {"schema": '{"type": "thing"}'}}, "not a JSON schema"),
    ],
)
def test_the_error_names_the_invalid_parameter(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_one_reward(**spec)
    assert caught.value.code == "RewardParameterInvalid"


def test_two_rewards_with_the_same_name_are_refused() -> None:
    equal_rewards = [Reward.model_validate({"builtin": "thinkFormat"})] * 2
    with pytest.raises(ConfigError, match="'thinkFormat'") as caught:
        build_rewards(equal_rewards, Path("absent"))
    assert caught.value.code == "RewardNameTwice"


def test_the_error_for_a_missing_column_lists_the_columns_of_the_rows() -> None:
    with pytest.raises(ConfigError, match="reads column 'answer', but the rows have level, solution") as caught:
        require_columns([build_one_reward(builtin="exactMatch")], ["solution", "level"])
    assert caught.value.code == "RewardColumnMissing"


# ---- user-defined functions


def build_user_reward(tmp_path: Path, source: str, **spec: object):
    (tmp_path / "mine").mkdir(exist_ok=True)
    (tmp_path / "mine" / "r.py").write_text(source)
    value = {"configMapRef": {"name": "mine", "key": "r.py"}, **spec}
    return build_rewards([Reward.model_validate(value)], tmp_path)[0]


def test_a_user_function_gets_the_columns_and_has_the_weight_of_the_spec(tmp_path: Path) -> None:
    source = "SCALE = 2\ndef tone(completions, level, **_):\n    return [SCALE * n for n in level]\n"
    reward = build_user_reward(tmp_path, source, function="tone", weight=0.5)
    assert (reward.__name__, reward.weight) == ("tone", 0.5)
    assert reward(prompts=["p", "p"], completions=["a", "b"], level=[1, 3]) == [2.0, 6.0]


def test_a_user_function_is_named_reward_by_default_and_may_return_none(tmp_path: Path) -> None:
    reward = build_user_reward(
        tmp_path, "def reward(completions, **_):\n    return [None for _ in completions]\n", name="quiet"
    )
    assert reward.__name__ == "quiet"
    assert reward(completions=["a"]) == [None]


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("def reward(:\n", "RewardFileInvalid", r"ConfigMap mine, key r.py .* \(line 1\)"),
        ("import absent_package\n", "RewardFileInvalid", "absent_package"),
        ("x = 1\n", "RewardFunctionMissing", "defines no function reward"),
        ("def reward(completions):\n    return [1]\n", "RewardFunctionMissing", r"\*\*kwargs"),
    ],
)
def test_the_error_for_an_unusable_file_names_the_config_map(tmp_path: Path, source: str, code: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_user_reward(tmp_path, source)
    assert caught.value.code == code
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("return 1.0", "RewardInvalid", "returned float"),
        ("return [1.0]", "RewardInvalid", "1 values for 2 completions"),
        ("return [1.0, 'good']", "RewardInvalid", "'good' for completion 2"),
        ("return [1.0, float('nan')]", "RewardInvalid", "nan for completion 2"),
        ("return [1 / 0, 1]", "RewardFailed", r"ZeroDivisionError: division by zero \(line 2\)"),
    ],
)
def test_the_return_value_of_a_user_function_is_checked(tmp_path: Path, body: str, code: str, message: str) -> None:
    reward = build_user_reward(tmp_path, f"def reward(completions, **_):\n    {body}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        reward(completions=["a", "b"])
    assert caught.value.code == code


# ---- functions in a process of their own

STATEFUL = """
import os
calls = []
def reward(completions, level, log_metric, **_):
    calls.append(1)
    log_metric("calls", len(calls))
    return [os.getpid(), *level[1:]]
"""
CALL = {"prompts": ["p1", "p2", "p3"], "completions": ["a", "bad", "c"], "level": [1, 2, 3]}


def test_a_function_with_a_timeout_runs_in_one_process_of_its_own(tmp_path: Path) -> None:
    logged: list[tuple[Any, ...]] = []
    reward = build_user_reward(tmp_path, STATEFUL, timeoutSeconds=60)
    answers = [reward(**CALL, log_metric=lambda *call: logged.append(call), log_extra=None, trainer_state=None) for _ in range(2)]
    assert answers[0] == answers[1] and answers[0][1:] == [2, 3] and answers[0][0] != os.getpid()
    assert logged == [("calls", 1), ("calls", 2)], "the reward process keeps its state between calls, and the trainer logs its metrics"


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        ("threading.Event().wait()", "has not answered for 2 s"),
        ("os.kill(os.getpid(), 11)", "ended its process by signal SIGSEGV"),
        ("os._exit(3)", "ended its process with exit code 3"),
    ],
)
def test_the_error_for_a_function_that_hangs_or_crashes_names_the_completion(
    action: str, problem: str, tmp_path: Path
) -> None:
    source = f"import os, threading\ndef reward(completions, **_):\n    if 'bad' in completions:\n        {action}\n    return [1.0] * len(completions)\n"
    reward = build_user_reward(tmp_path, source, name="mine", timeoutSeconds=2)
    assert reward(completions=["a"], prompts=["p"]) == [1.0]  # the first call has a longer time limit, because the process must start
    with pytest.raises(ConfigError) as caught:
        reward(**CALL)
    assert caught.value.code == "RewardWithoutAnswer"
    assert caught.value.message == f"reward mine {problem}; completion 2 of 3 alone causes it (prompt: 'p2')"
    assert reward(completions=["a"], prompts=["p"]) == [1.0], "a new process answers"


def test_the_error_says_if_no_single_completion_causes_a_crash(tmp_path: Path) -> None:
    source = "import os\ndef reward(completions, **_):\n    if len(completions) > 1:\n        os._exit(1)\n    return [1.0]\n"
    with pytest.raises(ConfigError, match="ended its process with exit code 1; no single completion causes it"):
        build_user_reward(tmp_path, source, timeoutSeconds=60)(**CALL)


def test_an_exception_in_the_process_is_described_as_in_the_rank(tmp_path: Path) -> None:
    reward = build_user_reward(tmp_path, "def reward(completions, **_):\n    return [1 / 0, 1]\n", timeoutSeconds=60)
    with pytest.raises(ConfigError, match=r"reward reward raised ZeroDivisionError: division by zero \(line 2\)") as caught:
        reward(completions=["a", "b"])
    assert caught.value.code == "RewardFailed"


RETURNED_TENSORS = """
import torch
def reward(completions, log_metric, **_):
    log_metric("mean", torch.tensor(1.5))
    return torch.tensor([1.0, 2.0])
"""
RETURNED_OBJECTS = """
import threading
def reward(completions, log_metric, **_):
    class Number(float):
        lock = threading.Lock()
    log_metric("mean", 1.5)
    return [Number(1), Number(2)]
"""


@pytest.mark.parametrize("source", [RETURNED_TENSORS, RETURNED_OBJECTS])
def test_a_function_with_a_timeout_may_return_the_same_values_as_in_the_rank(source: str, tmp_path: Path) -> None:
    logged: list[tuple[str, float]] = []
    reward = build_user_reward(tmp_path, source, timeoutSeconds=60)
    assert reward(completions=["a", "b"], log_metric=lambda name, value: logged.append((name, float(value)))) == [1.0, 2.0]
    assert logged == [("mean", 1.5)]


def test_a_value_that_cannot_be_pickled_is_an_error_of_the_function(tmp_path: Path) -> None:
    source = "def reward(completions, log_extra, **_):\n    log_extra('x', lambda: 1)\n    return [1.0]\n"
    with pytest.raises(ConfigError, match="reward reward raised .* when its result was sent: .*pickle") as caught:
        build_user_reward(tmp_path, source, timeoutSeconds=60)(completions=["a"], log_extra=lambda *_: None)
    assert caught.value.code == "RewardFailed"


def test_a_file_that_hangs_when_the_process_imports_it_does_not_block_a_large_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_process, "START_SECONDS", 1.0)
    source = (
        "import sys, threading\nif 'torch' not in sys.modules and 'pytest' not in sys.modules:\n    threading.Event().wait()\n"
        "def reward(completions, **_):\n    return [1.0]\n"
    )
    with pytest.raises(ConfigError, match="has not imported its file for 1 s") as caught:
        build_user_reward(tmp_path, source, timeoutSeconds=60)(completions=["a" * 5_000_000])
    assert caught.value.code == "RewardWithoutAnswer"


def test_a_missing_config_map_is_a_user_failure(tmp_path: Path) -> None:
    spec = Reward.model_validate({"configMapRef": {"name": "mine", "key": "r.py"}})
    with pytest.raises(NotFoundError) as caught:
        build_rewards([spec], tmp_path)
    assert (caught.value.code, caught.value.failure_class) == ("ConfigMapMissing", "User")


def test_parameters_for_a_user_function_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is only for built-in rewards"):
        build_user_reward(tmp_path, "def reward(**_):\n    return []\n", parameters={"a": "b"})


@pytest.mark.parametrize("builtin", list(BuiltinReward))
def test_builtin_rewards_read_the_parameters_that_the_api_lists(builtin: BuiltinReward) -> None:
    needed = {
        BuiltinReward.REGEX: {"pattern": "x"}, BuiltinReward.JSON_SCHEMA: {"schema": "{}"}, BuiltinReward.LENGTH: {"minimum": "1"},
    }  # fmt: skip
    parameters = RewardParameters("trainer.rewards[0]", needed.get(builtin, {}))
    BUILTIN_REWARDS[builtin](parameters)
    assert set(parameters.read_names) == set(REWARD_PARAMETERS[builtin])
    assert list(find_invalid_parameters("p", builtin, needed.get(builtin, {}))) == []
