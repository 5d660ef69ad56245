"""Rewards of GRPO: the built-in ones, and the user's own from a ConfigMap's Python file.

Every reward is checked before the model is loaded: unknown and malformed parameters, a pattern that does not compile, a file
without the function. While training, a user's function is called with keyword arguments (`prompts`, `completions`,
`completion_ids`, the row's other columns, `trainer_state`) and must return one number, or None for "no opinion", a completion.
Nothing here imports torch.
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

Score = Callable[..., "float | None"]
"""From one completion's text, its token ids and the row's columns (keywords `ids`, `row`) to a reward."""
OWN_FUNCTION = "reward"
"""Function of a user's file when `function` is left out."""
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keyword arguments that every reward function receives beside the row's columns."""


class RewardFunction:
    """What TRL calls for one generation batch. `__name__` is the name in metrics."""

    def __init__(
        self, name: str, weight: float, call: Callable[..., Sequence[float | None]], columns: Sequence[str] = ()
    ):
        self.__name__ = name
        self.weight, self.columns, self._call = weight, tuple(columns), call

    def __call__(self, **given: Any) -> list[float | None]:
        """One reward a completion; None: no opinion. Errors: ConfigError RewardFailed, RewardInvalid."""
        try:
            found = self._call(**given)
        except FineTuneError:
            raise
        except Exception as error:  # the user's code may raise anything; it is named, not swallowed
            raise ConfigError(
                "RewardFailed", f"reward {self.__name__} raised {type(error).__name__}: {_first_line(error)}{_line_of(error)}",
                hint="mend the function; it must return one number, or None, for every completion",
            ) from error  # fmt: skip
        return _checked(self.__name__, found, len(given["completions"]))


def rewards(specs: Sequence[Reward], config_maps: Path) -> list[RewardFunction]:
    """The reward functions of a run, in the order of `trainer.rewards`.

    Errors: ConfigError RewardParameterInvalid, RewardNameTwice, RewardFileInvalid, RewardFunctionMissing; NotFoundError ConfigMapMissing.
    """
    made = [
        _built_in(one, f"trainer.rewards[{i}]") if one.builtin else _own(one, i, config_maps)
        for i, one in enumerate(specs)
    ]
    names = [one.__name__ for one in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            "RewardNameTwice", f"two of trainer.rewards are called {twice!r}, and metrics are kept by name",
            hint="give each its own `name`",
        )  # fmt: skip
    return made


def require_columns(functions: Sequence[RewardFunction], there: Sequence[str]) -> None:
    """Every column that a built-in reward reads must be in the data. Errors: ConfigError RewardColumnMissing."""
    for one in functions:
        for column in one.columns:
            if column not in there:
                raise ConfigError(
                    "RewardColumnMissing", f"reward {one.__name__} reads column {column!r}, and the rows have {', '.join(sorted(there)) or 'no other columns'}",
                    hint="name one of them in the reward's `parameters: {column: ...}`, or add the column to the data",
                )  # fmt: skip


def text_of(completion: Any) -> str:
    """The text of a completion, which TRL gives as a string or as messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion if message.get("role") == "assistant")


# ---- built in


class Parameters:
    """`parameters` of one built-in: read by name and type; what nobody read is an error."""

    def __init__(self, path: str, given: Mapping[str, str]):
        self.path, self._given = f"{path}.parameters", dict(given)
        self._known: list[str] = []

    def text(self, name: str, default: str | None = None) -> str:
        """Required without a default."""
        self._known.append(name)
        found = self._given.get(name, default)
        if found is None:
            raise ConfigError(
                "RewardParameterInvalid", f"{self.path}.{name} is missing", hint=f"write `parameters: {{{name}: ...}}`"
            )
        return found

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        found = self.text(name, str(default).lower())
        if found not in ("true", "false"):
            raise self.invalid(name, found, "write true or false")
        return found == "true"

    def number(
        self, name: str, default: float | None = None, *, least: float = -math.inf, most: float = math.inf
    ) -> float | None:
        """A finite number within bounds."""
        self._known.append(name)
        found = self._given.get(name)
        if found is None:
            return default
        try:
            value = float(found)
        except ValueError:
            raise self.invalid(name, found, "write a number") from None
        if not (math.isfinite(value) and least <= value <= most):
            raise self.invalid(name, found, f"write a number from {least:g} to {most:g}")
        return value

    def word(self, name: str, default: str, allowed: Sequence[str]) -> str:
        """One of a few words."""
        found = self.text(name, default)
        if found not in allowed:
            raise self.invalid(name, found, f"write one of {', '.join(allowed)}")
        return found

    def pattern(self, name: str, default: str | None = None, flags: int = 0) -> re.Pattern[str]:
        """A regular expression of Python's `re`."""
        found = self.text(name, default)
        try:
            return re.compile(found, flags)
        except re.error as error:
            raise self.invalid(name, found, f"it is no regular expression: {error}") from None

    def invalid(self, name: str, value: str, what: str) -> ConfigError:
        """The error for one parameter."""
        return ConfigError("RewardParameterInvalid", f"{self.path}.{name} is {value[:200]!r}", hint=what)

    def done(self, builtin: BuiltinReward) -> None:
        """Refuse what was given and not read."""
        strange = sorted(set(self._given) - set(self._known))
        if strange:
            raise ConfigError(
                "RewardParameterInvalid", f"{self.path}: {builtin} has no parameter {', '.join(strange)}",
                hint=f"it has {', '.join(sorted(set(self._known))) or 'none'}",
            )  # fmt: skip


def _citation_format(parameters: Parameters) -> Score:
    """1 if the whole answer is one cited_answer block: an answer, then citations that name a source."""
    flags = re.DOTALL if parameters.flag("multiline", False) else 0
    gap = r"\s*" if flags else r"[ \t]*"
    inner = gap.join((
        "<cited_answer>", "<answer>.+?</answer>", "<citations>.*?<source_id>.+?</source_id>.*?</citations>", "</cited_answer>",
    ))  # fmt: skip
    shape = re.compile(inner, flags)
    return lambda text, **_: float(shape.fullmatch(text.strip()) is not None)


def _think_format(parameters: Parameters) -> Score:
    """1 if the answer begins with exactly one think block and says something after it."""
    optional = parameters.flag("emptyAnswer", False)

    def score(text: str, **_: Any) -> float:
        if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.lstrip().startswith("<think>"):
            return 0.0
        thought, answer = text.split("</think>")
        filled = bool(thought.replace("<think>", "").strip()) and (optional or bool(answer.strip()))
        return float(filled)

    return score


def _regex(parameters: Parameters) -> Score:
    """1 if the pattern is found in the answer (or, with `match: full`, is the whole answer)."""
    flags = re.IGNORECASE if parameters.flag("ignoreCase", False) else 0
    flags |= re.DOTALL if parameters.flag("dotAll", False) else 0
    flags |= re.MULTILINE if parameters.flag("multiline", False) else 0
    shape = parameters.pattern("pattern", flags=flags)
    how = shape.fullmatch if parameters.word("match", "search", ("search", "full")) == "full" else shape.search
    return lambda text, **_: float(how(text) is not None)


def _exact_match(parameters: Parameters) -> Score:
    """1 if the answer equals a column of the row; `extract` takes the last match of a pattern out of the answer first."""
    column = parameters.text("column", "answer")
    fold = parameters.flag("ignoreCase", False)
    strip = parameters.flag("strip", True)
    extract = parameters.pattern("extract", "")

    def plain(text: str) -> str:
        text = text.strip() if strip else text
        return text.casefold() if fold else text

    def score(text: str, *, row: Mapping[str, Any], **_: Any) -> float:
        if extract.pattern:
            found = list(extract.finditer(text))
            if not found:
                return 0.0
            text = found[-1].group(1 if extract.groups else 0) or ""
        return float(plain(text) == plain(str(row[column])))

    return score


def _length(parameters: Parameters) -> Score:
    """1 between `minimum` and `maximum`; outside it falls with the distance, to 0 at nothing and at twice the maximum."""
    unit = parameters.word("unit", "tokens", ("tokens", "words", "characters"))
    least = parameters.number("minimum", 0.0, least=0) or 0.0
    most = parameters.number("maximum", math.inf, least=1)
    assert most is not None, "it has a default"
    if least == 0 and most == math.inf:
        raise ConfigError(
            "RewardParameterInvalid",
            f"{parameters.path} gives neither minimum nor maximum",
            hint="write at least one of them",
        )
    if least > most:
        raise parameters.invalid("minimum", f"{least:g}", f"maximum is {most:g}: write a smaller number")

    def score(text: str, *, ids: Sequence[int], **_: Any) -> float:
        size = {"tokens": len(ids), "words": len(text.split()), "characters": len(text)}[unit]
        if size < least:
            return size / least
        return 1.0 if size <= most else max(0.0, 2.0 - size / most)

    return score


def _json_schema(parameters: Parameters) -> Score:
    """1 if the answer is JSON that fits `schema`; `parsed` (0 to 1, default 0) for JSON that does not fit."""
    if find_spec("jsonschema") is None:
        raise ConfigError(
            "RewardUnavailable",
            f"{parameters.path}: this image has no jsonschema package",
            hint="use the project's own image, or a function of yours",
        )
    import jsonschema  # type: ignore[import-untyped]  # it ships no types

    text = parameters.text("schema")
    parsed = parameters.number("parsed", 0.0, least=0, most=1)
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise parameters.invalid("schema", text, f"it is no JSON: {error}") from None
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise parameters.invalid("schema", text, f"it is no JSON schema: {error.message}") from None
    validator = kind(schema)

    def score(text: str, **_: Any) -> float:
        try:
            value = json.loads(_without_fence(text))
        except ValueError:
            return 0.0
        return 1.0 if validator.is_valid(value) else float(parsed or 0.0)

    return score


def _without_fence(text: str) -> str:
    """JSON is often written inside a Markdown fence."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return fenced.group(1) if fenced else text


MAKERS: dict[BuiltinReward, Callable[[Parameters], Score]] = {
    BuiltinReward.CITATION_FORMAT: _citation_format,
    BuiltinReward.THINK_FORMAT: _think_format,
    BuiltinReward.REGEX: _regex,
    BuiltinReward.EXACT_MATCH: _exact_match,
    BuiltinReward.LENGTH: _length,
    BuiltinReward.JSON_SCHEMA: _json_schema,
}


def _built_in(spec: Reward, path: str) -> RewardFunction:
    assert spec.builtin is not None, "the caller looks"
    parameters = Parameters(path, spec.parameters or {})
    score = MAKERS[spec.builtin](parameters)
    parameters.done(spec.builtin)
    columns = [(spec.parameters or {}).get("column", "answer")] if spec.builtin is BuiltinReward.EXACT_MATCH else []

    def call(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] = (), **columns_of: Any
    ) -> list[float | None]:
        ids = completion_ids or [[] for _ in completions]
        found: list[float | None] = []
        for place, completion in enumerate(completions):
            row = {name: columns_of[name][place] for name in columns}
            found.append(score(text_of(completion), ids=ids[place], row=row))
        return found

    return RewardFunction(spec.name or spec.builtin.value, _weight(spec), call, columns)


# ---- the user's own


def _own(spec: Reward, place: int, config_maps: Path) -> RewardFunction:
    ref, path = spec.config_map_ref, f"trainer.rewards[{place}]"
    if ref is None:
        raise ConfigError(
            "RewardIncomplete",
            f"{path} is neither built in nor from a ConfigMap",
            hint="write exactly one of `builtin` and `configMapRef`",
        )
    if spec.parameters:
        raise ConfigError(
            "RewardParameterInvalid", f"{path}.parameters are only read by built-in rewards, and this one is a function of ConfigMap {ref.name}",
            hint="remove them, and write the values into the function",
        )  # fmt: skip
    name = spec.function or OWN_FUNCTION
    where = f"{path}: ConfigMap {ref.name}, key {ref.key}"
    function = _load(config_maps / ref.name / ref.key, where).get(name)
    if not callable(function):
        raise ConfigError(
            "RewardFunctionMissing",
            f"{where} defines no function {name}",
            hint=f"define it, or name another in {path}.function",
        )
    _check_signature(function, where, name)
    return RewardFunction(spec.name or name, _weight(spec), function)


def _load(file: Path, where: str) -> dict[str, Any]:
    """Run the user's file as a module of its own."""
    try:
        source = file.read_text(encoding="utf-8")
    except OSError:
        raise NotFoundError(
            "ConfigMapMissing", f"{where} does not exist", hint="create it", failure_class=FailureClass.USER
        ) from None
    scope: dict[str, Any] = {"__name__": "finetune_user_reward", "__file__": file.name}
    try:
        exec(compile(source, file.name, "exec"), scope)
    except Exception as error:  # whatever the user's file does when it is read
        raise ConfigError(
            "RewardFileInvalid", f"{where} cannot be read as Python: {type(error).__name__}: {_first_line(error)}{_line_of(error)}",
            hint="try the file with python on your own machine; only packages of the trainer image can be imported",
        ) from error  # fmt: skip
    return scope


def _check_signature(function: Callable[..., Any], where: str, name: str) -> None:
    """It must accept keywords that it does not name: the row's columns and more are passed."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return
    raise ConfigError(
        "RewardFunctionMissing", f"{where}: function {name} does not accept further keyword arguments",
        hint=f"write `def {name}(completions, **kwargs):`; prompts, completion_ids and the row's columns are passed too",
    )  # fmt: skip


def _weight(spec: Reward) -> float:
    return 1.0 if spec.weight is None else spec.weight


def _checked(name: str, found: Any, wanted: int) -> list[float | None]:
    """One number or None a completion, and no NaN. Errors: ConfigError RewardInvalid."""
    hint = "return a list with one number, or None, for every completion"
    if isinstance(found, str | bytes) or not hasattr(found, "__iter__"):
        raise ConfigError(
            "RewardInvalid", f"reward {name} returned {type(found).__name__}, not a list of numbers", hint=hint
        )
    values = list(found)
    if len(values) != wanted:
        raise ConfigError(
            "RewardInvalid", f"reward {name} returned {len(values)} values for {wanted} completions", hint=hint
        )
    for place, value in enumerate(values):
        if value is None:
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ConfigError(
                "RewardInvalid", f"reward {name} returned {value!r:.80} for completion {place + 1}", hint=hint
            ) from None
        if not math.isfinite(number):
            raise ConfigError(
                "RewardInvalid",
                f"reward {name} returned {number} for completion {place + 1}",
                hint="return a finite number",
            )
        values[place] = number
    return values


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else "")[:300]


def _line_of(error: BaseException) -> str:
    """Where in the user's file it happened: the innermost frame of that file."""
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})" if error.lineno else ""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "finetune_user_reward":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line else ""
