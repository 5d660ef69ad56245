"""The rule for `policy.onExistingResult`, and the decision whether a pod without GPUs prepares a job."""

from __future__ import annotations

from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import gpus_per_node
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import OnExistingResult, PrepareStrategy

MODES_WITH_PREPARATION = (OnExistingResult.ADOPT, OnExistingResult.FAIL)
"""Values of `policy.onExistingResult` that compare the job with earlier results. The preparation pod makes this comparison."""


def needs_preparation(spec: FineTuneJobSpec, strategy: PrepareStrategy | None) -> bool:
    """Whether a pod without GPUs prepares the job. `strategy`: `prepare.strategy` of the spec or of the operator's configuration."""
    if spec.phases.train is False:
        return False
    if spec.policy.on_existing_result in MODES_WITH_PREPARATION or strategy is PrepareStrategy.ALWAYS:
        return True
    return strategy is PrepareStrategy.AUTO and gpus_per_node(spec) > 0


@rule(
    "ExistingResultNotCompared",
    cel="!has(self.policy) || !has(self.policy.onExistingResult) || self.policy.onExistingResult == 'train' || "
    "((!has(self.prepare) || !has(self.prepare.strategy) || self.prepare.strategy != 'never') && "
    "(!has(self.phases) || !has(self.phases.train) || self.phases.train))",
    message="spec.policy.onExistingResult adopt and fail need a preparation: remove prepare.strategy never and phases.train false, or write onExistingResult train",
)
def check_existing_result(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    mode = spec.policy.on_existing_result
    if mode not in MODES_WITH_PREPARATION:
        return
    if spec.prepare.strategy is PrepareStrategy.NEVER:
        yield (
            "policy.onExistingResult",
            f"{mode} compares the job with earlier results in the preparation pod, but prepare.strategy is never",
            "write `prepare.strategy: auto`, or `policy.onExistingResult: train`",
        )
    if spec.phases.train is False:
        yield (
            "policy.onExistingResult",
            f"{mode} has an effect only on jobs that train, but phases.train is false",
            "remove policy.onExistingResult",
        )
