"""The rewards of GRPO: built-in rewards, and functions of the user from a Python file in a ConfigMap.

Unknown or malformed parameters, invalid patterns and missing functions are found before the model is loaded. During training, a user's
function is called with the keyword arguments `prompts`, `completions`, `completion_ids`, `trainer_state` and the row's other columns. The function
must return a list with one number, or None for "no opinion", for each completion. This module does not import torch.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, FineTuneError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.spec.enums import BuiltinReward
from finetune_api.spec.trainer import Reward

from finetune_trainer.objective.reward_process import RewardProcess

ScoreFunction = Callable[..., "float | None"]
"""A function that returns the reward of one completion. The function gets the text, the token ids (keyword `ids`) and the row's columns (keyword `row`)."""
DEFAULT_FUNCTION = "reward"
"""Name of the function in a user's file if the spec does not set `function`."""
RESERVED_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keyword arguments that every reward function receives. Data columns with these names are not passed to reward functions."""


class RewardFunction:
    """A reward function for TRL, which calls it once per generation batch and uses its `__name__` in the names of metrics."""

    def __init__(
        self, name: str, weight: float, function: Callable[..., Sequence[float | None]], columns: Sequence[str] = ()
    ):
        self.__name__ = name
        self.weight, self.columns, self._function = weight, tuple(columns), function

    def __call__(self, **arguments: Any) -> list[float | None]:
        """Return one reward per completion; None means no opinion. Errors: ConfigError RewardFailed, RewardInvalid."""
        try:
            returned_values = self._function(**arguments)
        except FineTuneError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                "RewardFailed", f"reward {self.__name__} raised {describe_error(error)}",
                hint="fix the function: it must return a list with one number, or None, for every completion",
            ) from error  # fmt: skip
        return _check_returned_values(self.__name__, returned_values, len(arguments["completions"]))


def build_rewards(specs: Sequence[Reward], config_maps: Path) -> list[RewardFunction]:
    """Build the reward functions of a run, in the order of `trainer.rewards`.

    Errors: ConfigError RewardParameterInvalid, RewardNameTwice, RewardFileInvalid, RewardFunctionMissing; NotFoundError ConfigMapMissing.
    """
    functions = [
        _build_builtin_reward(spec, f"trainer.rewards[{i}]") if spec.builtin else _build_user_reward(spec, i, config_maps)
        for i, spec in enumerate(specs)
    ]
    names = [function.__name__ for function in functions]
    duplicate_name = next((name for name in names if names.count(name) > 1), None)
    if duplicate_name is not None:
        raise ConfigError(
            "RewardNameTwice", f"two of trainer.rewards have the name {duplicate_name!r}, but metrics are stored by name",
            hint="give each reward its own `name`",
        )  # fmt: skip
    return functions


def require_columns(reward_functions: Sequence[RewardFunction], present_columns: Sequence[str]) -> None:
    """Refuse data without a column that a built-in reward reads. Errors: ConfigError RewardColumnMissing."""
    present_columns_text = ", ".join(sorted(present_columns)) or "no other columns"
    for function in reward_functions:
        for column in function.columns:
            if column not in present_columns:
                raise ConfigError(
                    "RewardColumnMissing", f"reward {function.__name__} reads column {column!r}, but the rows have {present_columns_text}",
                    hint="name an existing column in the reward's `parameters: {column: ...}`, or add the column to the data",
                )  # fmt: skip


def completion_text(completion: Any) -> str:
    """Return the text of a completion. TRL passes a string, or messages if the prompt consists of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion if message.get("role") == "assistant")


# ---- built-in rewards


class RewardParameters:
    """Reads the `parameters` of one built-in reward by name and type."""

    def __init__(self, path: str, spec_parameters: Mapping[str, str]):
        self.path, self._spec_parameters = f"{path}.parameters", dict(spec_parameters)
        self.read_names: list[str] = []
        """Names of the parameters that were read."""

    def read_text(self, name: str, default: str | None = None) -> str:
        """Return a string parameter. Without a default, the parameter is required."""
        self.read_names.append(name)
        value = self._spec_parameters.get(name, default)
        if value is None:
            raise ConfigError(
                "RewardParameterInvalid", f"{self.path}.{name} is missing", hint=f"write `parameters: {{{name}: ...}}`"
            )
        return value

    def read_flag(self, name: str, default: bool) -> bool:
        """Return a boolean parameter, written `true` or `false`."""
        value = self.read_text(name, str(default).lower())
        if value not in ("true", "false"):
            raise self.invalid_value_error(name, value, "write true or false")
        return value == "true"

    def read_number(
        self, name: str, default: float | None = None, *, minimum: float = -math.inf, maximum: float = math.inf
    ) -> float | None:
        """Return a parameter that is a finite number within bounds."""
        self.read_names.append(name)
        text = self._spec_parameters.get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            raise self.invalid_value_error(name, text, "write a number") from None
        if not (math.isfinite(value) and minimum <= value <= maximum):
            raise self.invalid_value_error(name, text, f"write a number from {minimum:g} to {maximum:g}")
        return value

    def read_choice(self, name: str, default: str, allowed_values: Sequence[str]) -> str:
        """Return a parameter that is one of the allowed values."""
        value = self.read_text(name, default)
        if value not in allowed_values:
            raise self.invalid_value_error(name, value, f"write one of {', '.join(allowed_values)}")
        return value

    def read_pattern(self, name: str, default: str | None = None, flags: int = 0) -> re.Pattern[str]:
        """Return a parameter that is a regular expression of Python's `re`."""
        text = self.read_text(name, default)
        try:
            return re.compile(text, flags)
        except re.error as error:
            raise self.invalid_value_error(name, text, f"it is not a regular expression: {error}") from None

    def invalid_value_error(self, name: str, value: str, hint: str) -> ConfigError:
        """Return the error for a parameter with an invalid value."""
        return ConfigError("RewardParameterInvalid", f"{self.path}.{name} is {value[:200]!r}", hint=hint)

    def refuse_unknown(self, builtin: BuiltinReward) -> None:
        """Refuse parameters that the reward has not read, because they would have no effect. Errors: ConfigError RewardParameterInvalid."""
        unknown_names = sorted(set(self._spec_parameters) - set(self.read_names))
        if unknown_names:
            raise ConfigError(
                "RewardParameterInvalid", f"{self.path}: {builtin} has no parameter {', '.join(unknown_names)}",
                hint=f"the parameters of {builtin} are: {', '.join(sorted(set(self.read_names))) or 'none'}",
            )  # fmt: skip


def _build_citation_reward(parameters: RewardParameters) -> ScoreFunction:
    """Reward 1 if the completion is one `<cited_answer>` block, which contains an answer and then citations with a source; else 0."""
    flags = re.DOTALL if parameters.read_flag("multiline", False) else 0
    whitespace_pattern = r"\s*" if flags else r"[ \t]*"
    source = whitespace_pattern.join((
        "<cited_answer>", "<answer>.+?</answer>", "<citations>.*?<source_id>.+?</source_id>.*?</citations>", "</cited_answer>",
    ))  # fmt: skip
    block_pattern = re.compile(source, flags)
    return lambda text, **_: float(block_pattern.fullmatch(text.strip()) is not None)


def _build_think_reward(parameters: RewardParameters) -> ScoreFunction:
    """Reward 1 if the completion is a `<think>` block followed by an answer, else 0. With `emptyAnswer: true`, the answer may be empty."""
    may_be_empty = parameters.read_flag("emptyAnswer", False)

    def score(text: str, **_: Any) -> float:
        if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.lstrip().startswith("<think>"):
            return 0.0
        thought, answer = text.split("</think>")
        return float(bool(thought.replace("<think>", "").strip()) and (may_be_empty or bool(answer.strip())))

    return score


def _build_regex_reward(parameters: RewardParameters) -> ScoreFunction:
    """Reward 1 if the pattern matches a part of the completion, else 0. With `match: full`, the pattern must match the whole completion."""
    flags = re.IGNORECASE if parameters.read_flag("ignoreCase", False) else 0
    flags |= re.DOTALL if parameters.read_flag("dotAll", False) else 0
    flags |= re.MULTILINE if parameters.read_flag("multiline", False) else 0
    pattern = parameters.read_pattern("pattern", flags=flags)
    must_match_fully = parameters.read_choice("match", "search", ("search", "full")) == "full"
    match = pattern.fullmatch if must_match_fully else pattern.search
    return lambda text, **_: float(match(text) is not None)


def _build_exact_match_reward(parameters: RewardParameters) -> ScoreFunction:
    """Reward 1 if the completion equals the value of a column, else 0.

    If the parameter `extract` is set to a pattern, only the last match of this pattern in the completion is compared.
    """
    column = parameters.read_text("column", "answer")
    ignores_case = parameters.read_flag("ignoreCase", False)
    strips_whitespace = parameters.read_flag("strip", True)
    extract_pattern = parameters.read_pattern("extract", "")

    def normalise(text: str) -> str:
        text = text.strip() if strips_whitespace else text
        return text.casefold() if ignores_case else text

    def score(text: str, *, row: Mapping[str, Any], **_: Any) -> float:
        if extract_pattern.pattern:
            matches = list(extract_pattern.finditer(text))
            if not matches:
                return 0.0
            text = matches[-1].group(1 if extract_pattern.groups else 0) or ""
        return float(normalise(text) == normalise(str(row[column])))

    return score


def _build_length_reward(parameters: RewardParameters) -> ScoreFunction:
    """Reward 1 for a length from `minimum` to `maximum`. Outside this range, the reward falls linearly: to 0 at length 0 and at twice `maximum`."""
    unit = parameters.read_choice("unit", "tokens", ("tokens", "words", "characters"))
    minimum = parameters.read_number("minimum", 0.0, minimum=0) or 0.0
    maximum = parameters.read_number("maximum", math.inf, minimum=1)
    assert maximum is not None, "the parameter has a default"
    if minimum == 0 and maximum == math.inf:
        raise ConfigError(
            "RewardParameterInvalid",
            f"{parameters.path} has neither minimum nor maximum",
            hint="write minimum, maximum or both",
        )
    if minimum > maximum:
        raise parameters.invalid_value_error("minimum", f"{minimum:g}", f"write a number up to the maximum, {maximum:g}")

    def score(text: str, *, ids: Sequence[int], **_: Any) -> float:
        length = {"tokens": len(ids), "words": len(text.split()), "characters": len(text)}[unit]
        if length < minimum:
            return length / minimum
        return 1.0 if length <= maximum else max(0.0, 2.0 - length / maximum)

    return score


def _build_json_schema_reward(parameters: RewardParameters) -> ScoreFunction:
    """Reward 1 for JSON that matches `schema`, the value of the parameter `parsed` (default 0) for other JSON, and 0 for text that is not JSON."""
    if find_spec("jsonschema") is None:
        raise ConfigError(
            "RewardUnavailable",
            f"{parameters.path}: this image has no jsonschema package",
            hint="use the project's own image, or a reward function from a ConfigMap",
        )
    import jsonschema  # type: ignore[import-untyped]  # it ships no types

    schema_text = parameters.read_text("schema")
    reward_for_json = parameters.read_number("parsed", 0.0, minimum=0, maximum=1)
    try:
        schema = json.loads(schema_text)
    except ValueError as error:
        raise parameters.invalid_value_error("schema", schema_text, f"it is not JSON: {error}") from None
    validator_class = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator_class.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise parameters.invalid_value_error("schema", schema_text, f"it is not a JSON schema: {error.message}") from None
    validator = validator_class(schema)

    def score(text: str, **_: Any) -> float:
        try:
            parsed_json = json.loads(_remove_fence(text))
        except ValueError:
            return 0.0
        return 1.0 if validator.is_valid(parsed_json) else float(reward_for_json or 0.0)

    return score


def _remove_fence(text: str) -> str:
    """Remove a Markdown code fence around the text, because models often write JSON inside a fence."""
    fence_match = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return fence_match.group(1) if fence_match else text


BUILTIN_REWARDS: dict[BuiltinReward, Callable[[RewardParameters], ScoreFunction]] = {
    BuiltinReward.CITATION_FORMAT: _build_citation_reward,
    BuiltinReward.THINK_FORMAT: _build_think_reward,
    BuiltinReward.REGEX: _build_regex_reward,
    BuiltinReward.EXACT_MATCH: _build_exact_match_reward,
    BuiltinReward.LENGTH: _build_length_reward,
    BuiltinReward.JSON_SCHEMA: _build_json_schema_reward,
}


def _build_builtin_reward(spec: Reward, path: str) -> RewardFunction:
    assert spec.builtin is not None, "the caller has checked it"
    parameters = RewardParameters(path, spec.parameters or {})
    score = BUILTIN_REWARDS[spec.builtin](parameters)
    parameters.refuse_unknown(spec.builtin)
    columns = [(spec.parameters or {}).get("column", "answer")] if spec.builtin is BuiltinReward.EXACT_MATCH else []

    def score_completions(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] = (), **data_columns: Any
    ) -> list[float | None]:
        ids = completion_ids or [[] for _ in completions]
        rewards: list[float | None] = []
        for index, completion in enumerate(completions):
            row = {name: data_columns[name][index] for name in columns}
            rewards.append(score(completion_text(completion), ids=ids[index], row=row))
        return rewards

    return RewardFunction(spec.name or spec.builtin.value, _choose_reward_weight(spec), score_completions, columns)


# ---- the user's own functions


def _build_user_reward(spec: Reward, index: int, config_maps: Path) -> RewardFunction:
    config_map_ref, path = spec.config_map_ref, f"trainer.rewards[{index}]"
    if config_map_ref is None:
        raise ConfigError(
            "RewardIncomplete",
            f"{path} has neither `builtin` nor `configMapRef`",
            hint="write exactly one of `builtin` and `configMapRef`",
        )
    if spec.parameters:
        raise ConfigError(
            "RewardParameterInvalid", f"{path}.parameters is only for built-in rewards, but this reward is a function from ConfigMap {config_map_ref.name}",
            hint="remove the parameters, and write the values into the function",
        )  # fmt: skip
    function_name = spec.function or DEFAULT_FUNCTION
    location = f"{path}: ConfigMap {config_map_ref.name}, key {config_map_ref.key}"
    function: Any = run_user_file(config_maps / config_map_ref.name / config_map_ref.key, location).get(function_name)
    if not callable(function):
        raise ConfigError(
            "RewardFunctionMissing",
            f"{location} defines no function {function_name}",
            hint=f"define the function, or name another function in {path}.function",
        )
    _check_signature(function, location, function_name)
    if spec.timeout_seconds is not None:
        function = RewardProcess(spec.name or function_name, config_maps / config_map_ref.name / config_map_ref.key, function_name, spec.timeout_seconds)
    return RewardFunction(spec.name or function_name, _choose_reward_weight(spec), function)


def run_user_file(file: Path, location: str) -> dict[str, Any]:
    """Run the user's file and return its global names. Errors: NotFoundError ConfigMapMissing; ConfigError RewardFileInvalid."""
    try:
        source = file.read_text(encoding="utf-8")
    except OSError:
        raise NotFoundError(
            "ConfigMapMissing", f"{location} does not exist", hint="create the ConfigMap with this key", failure_class=FailureClass.USER
        ) from None
    global_names: dict[str, Any] = {"__name__": "finetune_user_reward", "__file__": file.name}
    try:
        exec(compile(source, file.name, "exec"), global_names)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            "RewardFileInvalid", f"{location} fails as a Python program: {describe_error(error)}",
            hint="run the file with Python on your machine; it can only import packages of the trainer image",
        ) from error  # fmt: skip
    return global_names


def _check_signature(function: Callable[..., Any], location: str, name: str) -> None:
    """Refuse a function without `**kwargs`, because a reward function is called with all columns of the row. Errors: ConfigError RewardFunctionMissing."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    raise ConfigError(
        "RewardFunctionMissing", f"{location}: function {name} does not accept arbitrary keyword arguments",
        hint=f"write `def {name}(completions, **kwargs):`; kwargs gets prompts, completion_ids and the row's columns",
    )  # fmt: skip


def _choose_reward_weight(spec: Reward) -> float:
    return 1.0 if spec.weight is None else spec.weight


def _check_returned_values(name: str, returned_values: Any, completion_count: int) -> list[float | None]:
    """Return the values as a list. Errors: ConfigError RewardInvalid unless there is one finite number, or None, for each completion."""
    hint = "return a list with one number, or None, for every completion"
    if isinstance(returned_values, str | bytes) or not hasattr(returned_values, "__iter__"):
        raise ConfigError(
            "RewardInvalid", f"reward {name} returned {type(returned_values).__name__}, not a list of numbers", hint=hint
        )
    values = list(returned_values)
    if len(values) != completion_count:
        raise ConfigError(
            "RewardInvalid", f"reward {name} returned {len(values)} values for {completion_count} completions", hint=hint
        )
    for index, value in enumerate(values):
        if value is None:
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ConfigError(
                "RewardInvalid", f"reward {name} returned {value!r:.80} for completion {index + 1}", hint=hint
            ) from None
        if not math.isfinite(number):
            raise ConfigError(
                "RewardInvalid",
                f"reward {name} returned {number} for completion {index + 1}",
                hint="return a finite number",
            )
        values[index] = number
    return values


def describe_error(error: BaseException) -> str:
    """Describe an exception of the user's code: its type, the first line of its message, and the line number in the user's file."""
    return f"{type(error).__name__}: {_first_line(error)}{_describe_line_in_user_file(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else "")[:300]


def _describe_line_in_user_file(error: BaseException) -> str:
    """Return the line of the user's file that raised the error, as ` (line 2)`; an empty text if no line of the file raised it.

    If several frames of the traceback are in the user's file, the innermost one counts.
    """
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})" if error.lineno else ""
    line_number, traceback_entry = 0, error.__traceback__
    while traceback_entry is not None:
        if traceback_entry.tb_frame.f_globals.get("__name__") == "finetune_user_reward":
            line_number = traceback_entry.tb_lineno
        traceback_entry = traceback_entry.tb_next
    return f" (line {line_number})" if line_number else ""
