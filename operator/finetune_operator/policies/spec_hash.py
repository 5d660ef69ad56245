"""Computes the hash of a spec's immutable fields. The hash changes if an older CRD is installed and the API server removes fields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

MUTABLE_FIELDS = (
    "suspend", "cancel", "policy.activeDeadlineSeconds", "policy.ttlSecondsAfterFinished", "policy.maxCost", "placement.queueName",
)  # fmt: skip
"""Fields of the spec that a user may change after the FineTuneJob was created."""


def compute_spec_sha256(raw_spec: Mapping[str, Any]) -> str:
    """Return the hash of a spec's immutable fields. Empty objects in the spec are ignored, because the API server may add them as defaults."""
    text = json.dumps(_select_immutable_fields(raw_spec, ""), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _select_immutable_fields(value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    child_paths = {name: (f"{path}.{name}" if path else name) for name in value}
    kept_fields = {
        name: _select_immutable_fields(value[name], child_path) for name, child_path in child_paths.items() if child_path not in MUTABLE_FIELDS
    }
    return {name: field_value for name, field_value in kept_fields.items() if field_value != {}}
