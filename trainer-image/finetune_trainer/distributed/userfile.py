"""A user's own configuration file from a ConfigMap, and what happens where it and the spec's fields both speak.

A value the user wrote in both places must be the same in both: every difference is listed with both values. Where the spec's
value is only a default, the file's word counts, and has to keep the rules that hold for the spec's. What the operator has adapted
since (a smaller micro-batch after memory ran out, a lower rate after a rollback) is not in the file: its values are compared with what
the spec said before, and change by the same factor.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.rules import new_problems, without_defaults
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.common import ConfigMapKeyRef
from pydantic import ValidationError

AUTO = "auto"


@dataclass(frozen=True)
class Kind:
    """What a value of a file may be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def one_of(*values: Any) -> Kind:
    """One of some words or numbers; true is not 1."""
    return Kind(
        f"one of {', '.join(_shown(one) for one in values)}",
        lambda found: any(found == one and type(found) is type(one) for one in values),
    )


COUNT = Kind("a whole number of at least 1", lambda found: _whole(found) and found >= 1)
STEPS = Kind("a whole number of at least 0", lambda found: _whole(found) and found >= 0)
POSITIVE = Kind("a number above 0", lambda found: _number(found) and found > 0)
NOT_NEGATIVE = Kind("a number of at least 0", lambda found: _number(found) and 0 <= found < math.inf)
FLAG = Kind("true or false", lambda found: isinstance(found, bool))
TEXT = Kind("text", lambda found: isinstance(found, str))
MAPPING = Kind("a mapping of keys and values", lambda found: isinstance(found, dict))


def fitting(file: str, group: str, found: Mapping[str, Any], kinds: Mapping[str, Kind], *, auto: bool = False) -> None:
    """Whether every key of a group (empty: the file itself) has an effect and every value its kind.

    null always fits; `auto`, if asked for, instead of anything but a mapping.
    Errors: ConfigError ConfigFileInvalid with all that does not fit.
    """
    unknown = [f"{_path(group, key)}{_near(key, kinds)}" for key in found if key not in kinds]
    wrong = [
        f"{_path(group, key)} is {_shown(value)}, not {kind.words}"
        for key, kind, value in ((key, kinds[key], value) for key, value in found.items() if key in kinds)
        if value is not None and not (auto and value == AUTO and kind is not MAPPING) and not kind.fits(value)
    ]
    told = ([f"{', '.join(unknown)} would have no effect"] if unknown else []) + wrong
    if told:
        hint = " and ".join((["remove it"] if unknown else []) + (["write a value that fits"] if wrong else []))
        raise ConfigError("ConfigFileInvalid", f"{file}: {'; '.join(told)}", hint=hint)


def _path(group: str, key: str) -> str:
    return f"{group}.{key}" if group else key


def _near(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), 1, cutoff=0.9)
    return f" (did you mean {near[0]}?)" if near else ""


def read(ref: ConfigMapKeyRef, config_maps: Path, path: str) -> dict[str, Any]:
    """The file as nested dictionaries; YAML and JSON alike. Errors: NotFoundError ConfigMapMissing; ConfigError ConfigFileInvalid."""
    where = f"{path}: ConfigMap {ref.name}, key {ref.key}"
    try:
        text = (config_maps / ref.name / ref.key).read_text(encoding="utf-8")
    except OSError:
        raise NotFoundError(
            "ConfigMapMissing", f"{where} does not exist", hint="create it", failure_class=FailureClass.USER
        ) from None
    try:
        value = json.loads(text)
    except ValueError:
        value = _yaml(text, where)
    if not isinstance(value, dict):
        raise ConfigError(
            "ConfigFileInvalid", f"{where} holds {type(value).__name__}, not a mapping", hint="write keys and values"
        )
    strange = [_shown(key) for key in _keys(value) if not isinstance(key, str)]
    if strange:
        raise ConfigError(
            "ConfigFileInvalid", f"{where} has keys that are no text: {', '.join(strange)}", hint="write them in quotes"
        )
    return value


def _keys(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [key for one in value for key in _keys(one)]
    return [*value, *(key for one in value.values() for key in _keys(one))] if isinstance(value, dict) else []


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            "ConfigFileInvalid", f"{where} is neither JSON nor YAML: {first}", hint="mend the file"
        ) from None


@dataclass
class Comparison:
    """Collects every conflict between a file and the spec, so that they are told at once."""

    run: RunConfig
    conflicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settled: dict[str, Any] = field(default_factory=dict)
    """What the file says instead of the spec, by spec path."""

    def same(self, key: str, found: Any, path: str, asked: Any, shown: str | None = None) -> Any:
        """The value that holds: the file's, unless it is absent or `auto`; a difference from what the user asked is a conflict.

        `shown`: the file's own word for `found`, where it has another one.
        """
        before = self.before(path, asked)
        if not self.wins(key, found, path, before, shown):
            return asked
        self.settled[path] = found if _equal(before, asked) else self._adapted(key, found, path, before, asked)
        return self.settled[path]

    def wins(self, key: str, found: Any, path: str, before: Any, shown: str | None = None) -> bool:
        """Whether the file's value holds, not the spec's, which was `before` as the user wrote it. Notes it, or the conflict."""
        if found is None or found == AUTO or _equal(found, before):
            return False
        told = _shown(found) if shown is None else shown
        if before is not None and path not in self.run.defaults:
            self.conflicts.append(f"{key} is {told}, {path} is {_shown(before)}")
            return False
        if before is not None:
            self.notes.append(f"{key} {told} of the file wins over the default {path} {_shown(before)}")
        return True

    def before(self, path: str, asked: Any) -> Any:
        """What the spec said there before the operator adapted it; `asked` if it did not."""
        return (self.run.before_adaptation or {}).get(path, asked)

    def undone(self, path: str, asked: Any, value: Any) -> Any:
        """A value that holds now, as it was before the operator adapted what the spec says at `path`."""
        before = self.before(path, asked)
        return value if _equal(before, asked) else value * before / asked

    def _adapted(self, key: str, found: Any, path: str, before: Any, asked: Any) -> Any:
        """The file's value, changed as the spec's was."""
        if not all(_number(value) and value for value in (found, before, asked)):
            return asked
        value = found * asked / before
        self.notes.append(
            f"{key} {_shown(found)} of the file becomes {value:.10g}, as {path} went from {_shown(before)} to {_shown(asked)}"
        )
        return value

    def must(self, key: str, found: Any, path: str, actual: Any) -> None:
        """As `same`, for facts that a file cannot change, whether the user wrote them in the spec or not."""
        if found is not None and found != AUTO and not _equal(found, actual):
            self.conflicts.append(f"{key} is {_shown(found)}, {path} is {_shown(actual)}")

    def settle(self, file: str) -> None:
        """Errors: ConfigError ConfigsDisagree with every conflict; ConfigFileInvalid; or the code of a rule that the file breaks."""
        if self.conflicts:
            raise ConfigError(
                "ConfigsDisagree", f"{file} and the spec disagree: {'; '.join(self.conflicts)}",
                hint="write the same value in both, remove one of the two, or (DeepSpeed) write auto in the file",
            )  # fmt: skip
        if not self.settled:
            return
        try:
            spec = self.with_file()
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, one['loc']))} {one['input']}: {one['msg']}" for one in error.errors())
            raise ConfigError(
                "ConfigFileInvalid", f"{file} holds what the API does not allow: {told}", hint="write a value that fits"
            ) from None
        for problem in new_problems(without_defaults(self.run.spec, self._filled()), spec):
            raise ConfigError(
                problem.code, f"{problem.path}, with the values of {file}: {problem.message}", hint=problem.hint
            )

    def with_file(self) -> FineTuneJobSpec:
        """The spec as if the user had written the file's values into it. Errors: pydantic's ValidationError."""
        return without_defaults(self.run.spec, self._filled()).with_values(self.settled)

    def allowed(self, values: Mapping[str, Any]) -> bool:
        """Whether other values at some paths break no rule that the file's own keep. Errors: pydantic's ValidationError."""
        spec = self.with_file()
        return not new_problems(spec, spec.with_values(values))

    def _filled(self) -> list[str]:
        """Defaults, without those that the operator has changed since."""
        return [path for path in self.run.defaults if path not in (self.run.before_adaptation or {})]


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-9)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """As the file has it: text that could be taken for something else in quotes."""
    if isinstance(value, str):
        return value if value[:1].isalpha() and value not in ("true", "false", "null") else json.dumps(value)
    return "not given" if value is None else json.dumps(value, default=str)
