"""A user's own configuration file from a ConfigMap, and what happens where it and the spec's fields both speak.

A value the user wrote in both places must be the same in both: every difference is listed with both values. Where the spec's
value is only a default, the file's word counts. What the operator has adapted since (a smaller micro-batch after memory ran out, a
lower rate after a rollback) is not in the file: its values are compared with what the spec said before, and change by the same factor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.spec.common import ConfigMapKeyRef

AUTO = "auto"


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
    return value


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

    def same(self, key: str, found: Any, path: str, asked: Any) -> Any:
        """The value that holds: the file's, unless it is absent or `auto`; a difference from what the user asked is a conflict."""
        before = self.before(path, asked)
        if found is None or found == AUTO or _equal(found, before):
            return asked
        if before is None or path in self.run.defaults:
            if before is not None:
                self.notes.append(f"{key} {_shown(found)} of the file wins over the default {path} {_shown(before)}")
            return found if _equal(before, asked) else self._adapted(key, found, path, before, asked)
        self.conflicts.append(f"{key} is {_shown(found)}, {path} is {_shown(before)}")
        return asked

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
        if not isinstance(found, int):
            result = value
        elif value.is_integer():
            result = int(value)
        else:
            self.conflicts.append(
                f"{key} is {_shown(found)}, which cannot change as {path} had to, from {_shown(before)} to {_shown(asked)}"
            )
            return asked
        self.notes.append(
            f"{key} {_shown(found)} of the file becomes {_shown(result)}, as {path} went from {_shown(before)} to {_shown(asked)}"
        )
        return result

    def must(self, key: str, found: Any, path: str, actual: Any) -> None:
        """As `same`, for facts that a file cannot change, whether the user wrote them in the spec or not."""
        if found is not None and found != AUTO and not _equal(found, actual):
            self.conflicts.append(f"{key} is {_shown(found)}, {path} is {_shown(actual)}")

    def settle(self, file: str) -> None:
        """Errors: ConfigError ConfigsDisagree with every conflict."""
        if self.conflicts:
            raise ConfigError(
                "ConfigsDisagree", f"{file} and the spec disagree: {'; '.join(self.conflicts)}",
                hint="write the same value in both, remove one of the two, or (DeepSpeed) write auto in the file",
            )  # fmt: skip


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


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) else str(value)
