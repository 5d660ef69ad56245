"""Rules for `spec.output`, `spec.tracking` and `spec.evaluation.judge`."""

from __future__ import annotations

from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    PROMPT_METHODS,
    method_type_of,
    trains_base_weights,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    Tracker,
)


@rule(
    "HubRepositoryMissing",
    cel="!(has(self.output) && has(self.output.hub) && has(self.output.hub.push) && self.output.hub.push) || has(self.output.hub.repository)",
    message="output.hub.push needs output.hub.repository",
)
def check_hub_push(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    hub = spec.output.hub
    if hub is None:
        return
    if not hub.push:
        if hub.repository is not None or hub.private is not None:
            yield (
                "output.hub",
                "the fields of output.hub have no effect without `push: true`",
                "write `push: true`, or remove output.hub",
            )
        return
    if hub.repository is None:
        yield (
            "output.hub.repository",
            "output.hub.push is true, but the repository is missing",
            "write for example `repository: org/my-model`",
        )
    if hub.token_secret_ref is None and spec.model.token_secret_ref is None:
        yield (
            "output.hub.tokenSecretRef",
            "output.hub.push is true, but the token with write permission is missing",
            "write `tokenSecretRef: {name: hub, key: token}` in output.hub or in model",
        )


@rule("OutputOptionWithoutEffect")
def check_output_options(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if spec.output.layout is not None and spec.output.dir is None:
        yield (
            "output.layout",
            f"{spec.output.layout}, but layout has no effect without output.dir",
            "write output.dir, or remove layout",
        )
    if spec.output.merge_adapter and trains_base_weights(spec):
        yield (
            "output.mergeAdapter",
            f"true, but method {method_type_of(spec)} trains no adapter",
            "remove mergeAdapter, because the output is already a whole model",
        )
    if spec.output.merge_adapter and method_type_of(spec) in PROMPT_METHODS:
        yield (
            "output.mergeAdapter",
            f"true, but {method_type_of(spec)} trains virtual tokens, and virtual tokens cannot be merged into weights",
            "remove it",
        )


@rule("TrackerAndOptions")
def check_trackers(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    trackers_to_use = spec.tracking.report_to or []
    for tracker, group in (
        (Tracker.WANDB, spec.tracking.wandb),
        (Tracker.MLFLOW, spec.tracking.mlflow),
        (Tracker.MONGODB, spec.tracking.mongodb),
    ):
        if group is not None and tracker not in trackers_to_use:
            yield (
                f"tracking.{tracker}",
                f"tracking.{tracker} has no effect, because tracking.reportTo does not contain {tracker}",
                f"write `reportTo: [{tracker}]`, or remove tracking.{tracker}",
            )
    if (
        Tracker.WANDB in trackers_to_use
        and (spec.tracking.wandb is None or spec.tracking.wandb.api_key_secret_ref is None)
        and target is ExecutionTarget.CLUSTER
    ):
        yield (
            "tracking.wandb.apiKeySecretRef",
            "reportTo contains wandb, but the API key is missing",
            "write `wandb: {apiKeySecretRef: {name: wandb, key: apiKey}}`",
        )
    if Tracker.MLFLOW in trackers_to_use and (spec.tracking.mlflow is None or spec.tracking.mlflow.tracking_uri is None):
        yield (
            "tracking.mlflow.trackingUri",
            "reportTo contains mlflow, but the URL of the MLflow server is missing",
            "write for example `mlflow: {trackingUri: 'http://mlflow.mlops:5000'}`",
        )
    if Tracker.MONGODB in trackers_to_use and (spec.tracking.mongodb is None or spec.tracking.mongodb.uri_secret_ref is None):
        yield (
            "tracking.mongodb.uriSecretRef",
            "reportTo contains mongodb, but the connection URI is missing",
            "write `mongodb: {uriSecretRef: {name: mongo, key: uri}}`",
        )
    for i, tracker in enumerate(trackers_to_use):
        if tracker in trackers_to_use[:i]:
            yield f"tracking.reportTo[{i}]", f"the list contains {tracker} twice", "write each tracker once"


@rule("JudgeMissing")
def check_judge(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    group = spec.evaluation.judge
    if group is not None and group.model is None and (group.input_price is not None or group.output_price is not None):
        yield (
            "evaluation.judge.model",
            "inputPrice and outputPrice have no effect without a judge model",
            "write evaluation.judge.model, or remove the prices",
        )
