"""Lists the stages that run after the commit of the model."""

from __future__ import annotations

from finetune_api.pod import RunConfig
from finetune_api.rules import (
    benchmarks_after_training,
    compares_metrics,
    exports_oci,
    metrics_after_training,
    prompts_to_compare,
    pushes_to_hub,
    verifies_artefacts,
    writes_predictions,
)
from finetune_api.status import Stage


def list_planned_stages(run: RunConfig) -> list[Stage]:
    """Return the stages that the spec requests, in the order in which they run."""
    compares_models = compares_metrics(run.spec) or prompts_to_compare(run.spec) is not None
    is_wanted_by_stage = {
        Stage.EVALUATING: bool(metrics_after_training(run.spec)) or writes_predictions(run.spec) or compares_models,
        Stage.COMPARING: compares_models,
        Stage.MERGING: run.spec.output.merge_adapter is True,
        Stage.VERIFYING: verifies_artefacts(run.spec) or bool(run.spec.output.serving),
        Stage.BENCHMARKING: bool(benchmarks_after_training(run.spec)),
        Stage.UPLOADING: run.publish is not None or pushes_to_hub(run.spec) or exports_oci(run.spec),
    }
    return [stage for stage, is_wanted in is_wanted_by_stage.items() if is_wanted]
