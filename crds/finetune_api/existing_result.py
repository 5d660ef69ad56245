"""Compares a new FineTuneJob with the stored result of an earlier job of the same name, for `policy.onExistingResult`.

After a successful end, rank 0's pod stores a `RunResult` at `names.RESULT_KEY`. A new job with another uid adopts this result if its digest
is the same. The digest covers two things:

* the values that the user set in fields that can change the result. Filled-in defaults do not count, because a job keeps the defaults with
  which it began: an upgrade with other defaults must not train everything again;
* the contents of the inputs: data, ConfigMaps, and the versions of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from typing import Any

from pydantic import Field

from finetune_api.base import LenientModel
from finetune_api.lineage import without_secrets
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import EvaluationResult, Metrics, Output, Progress, ResolvedConfig

WITHOUT_EFFECT_ON_RESULT = (
    "storage", "placement", "policy", "prepare", "tracking", "suspend", "cancel",
    "resources.nodePool", "resources.gpuResource", "resources.cpu", "resources.memory", "resources.ephemeralStorage", "resources.sharedMemory",
    "checkpoint.keep", "checkpoint.pinned", "checkpoint.allowPickle",
    "model.tokenSecretRef", "model.storage", "dataset.storage", "output.hub.tokenSecretRef", "evaluation.judge.apiKeySecretRef",
)  # fmt: skip
"""Groups and fields that decide where, when and with which rights a job runs, but not what it trains and stores.

The numbers of nodes, GPUs and processes are not listed, because the effective batch follows from them.
"""


class RunResult(LenientModel):
    """`run/result.json` in storage: the result of a successful run, and the spec and inputs from which it was made."""

    digest: str = Field(description="`result_digest` of `settings` and `inputs`.")
    settings: dict[str, Any] = Field(description="The values that the user set and that can change the result, by spec path, without secrets.")
    inputs: dict[str, str] = Field(description="Digest or version of each input, by its name in messages.")
    finished_at: datetime = Field(description="End of the run.")
    output: Output = Field(description="The final model, as in the status.")
    evaluation: EvaluationResult | None = Field(default=None, description="Results of the evaluation, as in the status.")
    metrics: Metrics | None = Field(default=None, description="Last training metrics, as in the status.")
    progress: Progress | None = Field(default=None, description="Progress at the end, as in the status.")
    resolved: ResolvedConfig | None = Field(default=None, description="The configuration in use, as in the status.")


def result_settings(spec: FineTuneJobSpec, filled_paths: Collection[str], originals: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the values that the user set and that can change the result, by spec path.

    `filled_paths`: paths of filled-in defaults, which are left out. `originals`: values of the user that the operator has adapted after a
    failure. Queries and passwords of web addresses are left out, so a new signature of the same address is no difference.
    """
    value, _ = without_secrets(spec.to_wire())
    settings = {path: leaf for path, leaf in _leaves(value, "") if path not in filled_paths and not _has_no_effect(path)}
    restored = settings | {path: original for path, original in (originals or {}).items() if path in settings}
    return {path: leaf for path, leaf in restored.items() if leaf is not None}


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _has_no_effect(path: str) -> bool:
    return any(path == field or path.startswith(f"{field}.") for field in WITHOUT_EFFECT_ON_RESULT)


def result_digest(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the sha256 (hex) over the values of `result_settings` and the digests of the inputs."""
    text = json.dumps({"settings": dict(settings), "inputs": dict(inputs)}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def result_differences(earlier: RunResult, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """Return what differs from the earlier run: spec paths, then names of inputs with the word `contents`. Empty if the digests are equal."""
    return _changed_keys(earlier.settings, settings) + [f"contents of {name}" for name in _changed_keys(earlier.inputs, inputs)]


def _changed_keys(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*earlier, *new}) if earlier.get(key) != new.get(key)]
