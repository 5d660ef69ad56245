"""Reads a spec that the CRD of another version may have accepted.

The API server enforces the schema of the installed CRD. A spec that contradicts only this operator's models was therefore accepted
by a newer CRD: during an upgrade, or after `kubectl rollout undo` of the operator. Such a spec is no mistake of the user.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from pydantic import ValidationError

from finetune_operator.objects import Object

MUTABLE_FIELDS = (
    "suspend", "cancel", "policy.activeDeadlineSeconds", "policy.ttlSecondsAfterFinished", "placement.queueName",
)  # fmt: skip
"""Fields of the spec that may change after creation."""


def read_spec(raw: Object) -> tuple[FineTuneJobSpec, tuple[str, ...]]:
    """Return the spec without the parts that this version does not know, and one sentence for each of these parts."""
    readable: Object = copy.deepcopy(raw)
    unknown: list[str] = []
    while True:
        try:
            return FineTuneJobSpec.model_validate(readable), tuple(unknown)
        except ValidationError as error:
            found = {_existing_path(readable, item["loc"]): item["msg"] for item in error.errors()}
            unknown += [f"spec.{'.'.join(map(str, path))}: {message}" for path, message in found.items()]
            if () in found:
                return FineTuneJobSpec(), tuple(unknown)
            for path in reversed(found):  # from the back: removing an item of a list moves the later ones
                _remove(readable, path)


def _existing_path(value: Any, location: Sequence[Any]) -> tuple[Any, ...]:
    """The longest part of pydantic's error location that exists in `value`.

    The location may end in the name of a missing field or of a member of a union; neither exists in the value.
    """
    path: list[Any] = []
    for key in location:
        exists = key in value if isinstance(value, dict) else isinstance(value, list) and isinstance(key, int)
        if not exists:
            break
        path.append(key)
        value = value[key]
    return tuple(path)


def _remove(value: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        value = value[key]
    del value[path[-1]]


def spec_sha256(raw: Mapping[str, Any]) -> str:
    """Hash of the parts of a spec that may not change after creation; empty groups do not count."""
    text = json.dumps(_without_mutable(raw, ""), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_mutable(value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    children = {name: (f"{path}.{name}" if path else name) for name in value}
    kept = {name: _without_mutable(value[name], child) for name, child in children.items() if child not in MUTABLE_FIELDS}
    return {name: found for name, found in kept.items() if found != {}}
