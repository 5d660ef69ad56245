"""Compare a new FineTuneJob with the stored result of an earlier job of the same name, for `policy.onExistingResult`.

After a successful run, rank 0's pod stores a `RunResult` at `names.RESULT_KEY`. A later job of the same name adopts this result if both jobs
have the same digest. The digest covers:

* the values that the user set in fields that can change the result. Filled-in defaults are not included: otherwise, every job would train
  again after an upgrade to a release with other defaults;
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
from finetune_api.lineage import remove_secrets
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import EvaluationResult, Metrics, Output, Progress, ResolvedConfig

PATHS_WITHOUT_EFFECT_ON_RESULT = (
    "storage", "placement", "policy", "prepare", "tracking", "suspend", "cancel",
    "resources.nodePool", "resources.gpuResource", "resources.cpu", "resources.memory", "resources.ephemeralStorage", "resources.sharedMemory",
    "checkpoint.keep", "checkpoint.pinned", "checkpoint.allowPickle",
    "model.tokenSecretRef", "model.storage", "dataset.storage", "output.hub.tokenSecretRef", "evaluation.judge.apiKeySecretRef",
)  # fmt: skip
"""Groups and fields that decide where, when and with which rights a job runs, but not what it trains and stores.

The numbers of nodes, GPUs and processes are not listed, because they determine the effective batch.
"""


class RunResult(LenientModel):
    """`run/result.json` in storage: the result of a successful run, and the spec and inputs from which it was made."""

    digest: str = Field(description="sha256 (hex) over `settings` and `inputs`.")
    settings: dict[str, Any] = Field(description="The values that the user set and that can change the result, by spec path, without secrets.")
    inputs: dict[str, str] = Field(description="Digest or version of each input, by the name that messages use for the input.")
    finished_at: datetime = Field(description="End of the run.")
    output: Output = Field(description="The final model, as in the status.")
    evaluation: EvaluationResult | None = Field(default=None, description="Results of the evaluation, as in the status.")
    metrics: Metrics | None = Field(default=None, description="Last training metrics, as in the status.")
    progress: Progress | None = Field(default=None, description="Progress at the end, as in the status.")
    resolved: ResolvedConfig | None = Field(default=None, description="The resolved configuration of the run, as in the status.")


def collect_result_settings(spec: FineTuneJobSpec, filled_paths: Collection[str], user_values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the values that the user set and that can change the result, by spec path.

    `filled_paths`: spec paths of filled-in defaults, which are left out. `user_values`: the user's own values of fields that the operator
    changed after a failure. Queries and passwords of web addresses are removed, so an address whose signature was renewed counts as unchanged.
    """
    redacted_spec, _ = remove_secrets(spec.to_wire())
    settings = {path: value for path, value in _iterate_values_by_path(redacted_spec, "") if path not in filled_paths and not _is_without_effect(path)}
    user_settings = settings | {path: user_value for path, user_value in (user_values or {}).items() if path in settings}
    return {path: value for path, value in user_settings.items() if value is not None}


def _iterate_values_by_path(nested_values: Mapping[str, Any], path_prefix: str) -> Iterator[tuple[str, Any]]:
    for name, nested_value in nested_values.items():
        if isinstance(nested_value, Mapping):
            yield from _iterate_values_by_path(nested_value, f"{path_prefix}{name}.")
        else:
            yield f"{path_prefix}{name}", nested_value


def _is_without_effect(path: str) -> bool:
    return any(path == field or path.startswith(f"{field}.") for field in PATHS_WITHOUT_EFFECT_ON_RESULT)


def compute_result_digest(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the sha256 (hex) over the values of `collect_result_settings` and the digests of the inputs."""
    settings_and_inputs_json = json.dumps({"settings": dict(settings), "inputs": dict(inputs)}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(settings_and_inputs_json.encode()).hexdigest()


def list_result_differences(earlier_result: RunResult, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """Return what differs from the earlier result: the spec paths of settings, then `contents of <input>`. The list is empty if the digests are equal."""
    return _list_changed_keys(earlier_result.settings, settings) + [f"contents of {name}" for name in _list_changed_keys(earlier_result.inputs, inputs)]


def _list_changed_keys(earlier_values: Mapping[str, Any], new_values: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*earlier_values, *new_values}) if earlier_values.get(key) != new_values.get(key)]
