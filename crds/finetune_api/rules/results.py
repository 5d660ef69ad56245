"""Rules for `spec.output`, `spec.tracking`, `spec.evaluation` and `spec.phases`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from finetune_api.errors import ConfigError
from finetune_api.names import JUDGE_KEY, WANDB_KEY, WANDB_MODE
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    FRACTION_METRICS,
    JUDGE_EMBEDDING_METRICS,
    JUDGE_METRICS,
    LOWER_IS_BETTER_METRICS,
    PROMPT_METHODS,
    benchmarks_after_training,
    exports_oci,
    has_test_set,
    has_validation_set,
    method_type_of,
    metrics_after_training,
    prompts_to_compare,
    trainer_type_of,
    trains_base_weights,
    uses_loftq,
    verifies_artefacts,
    writes_predictions,
)
from finetune_api.sources import HubSource, parse_source, redact_source
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    EvaluationMetric,
    GateMetric,
    LoraBias,
    MethodType,
    Tracker,
    TrainerType,
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
    if hub.token_secret_ref is None and spec.model.token_secret_ref is None and target is ExecutionTarget.CLUSTER:
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
    if spec.output.project is not None and spec.output.dir is None and not spec.tracking.report_to:
        yield (
            "output.project",
            f"{spec.output.project}, but project has no effect without output.dir and without trackers",
            "write output.dir, or remove project",
        )
    if exports_oci(spec) and spec.phases.train is False:
        yield (
            "output.export",
            "contains oci, but a job with phases.train false exports no model, because the model of phases.from belongs to another job",
            "remove oci, and run `finetune export` with the address in phases.from",
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
            f"true, but {method_type_of(spec)} trains virtual tokens, which cannot be merged into weights",
            "remove mergeAdapter",
        )
    if spec.output.merge_adapter and uses_loftq(spec):
        yield (
            "output.mergeAdapter",
            "true, but an adapter with method.lora.init loftq also corrects the quantisation error of the base model. The merged model is not "
            "quantised, so this correction would make it worse",
            "remove mergeAdapter, or remove init",
        )


@rule("AdaptersNotCombinable")
def check_combined_adapters(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if not spec.output.combine_adapters:
        if spec.output.adapter_weight is not None:
            yield (
                "output.adapterWeight",
                f"{spec.output.adapter_weight:g}, but adapterWeight has no effect without output.combineAdapters",
                "write output.combineAdapters, or remove adapterWeight",
            )
        return
    if not spec.output.merge_adapter:
        yield (
            "output.combineAdapters",
            "adapters are combined only in the merged model, but output.mergeAdapter is not true",
            "write `mergeAdapter: true`, or remove combineAdapters",
        )
    lora = spec.method.lora
    is_used_by_option = {
        f"method {method_type_of(spec)}": method_type_of(spec) not in (MethodType.LORA, MethodType.QLORA, MethodType.ADAPTER),
        "method.lora.useDora": bool(lora and lora.use_dora),
        "method.lora.bias": bool(lora and lora.bias not in (None, LoraBias.NONE)),
        "method.lora.modulesToSave": bool(lora and lora.modules_to_save),
        "method.lora.targetParameters": bool(lora and lora.target_parameters),
        "model.newTokens": bool(spec.model.new_tokens),
        f"the objective {trainer_type_of(spec)}": trainer_type_of(spec) is TrainerType.REWARD,
    }
    for option in (option for option, is_used in is_used_by_option.items() if is_used):
        yield (
            "output.combineAdapters",
            f"only plain LoRA adapters can be combined, but the job uses {option}",
            "remove combineAdapters",
        )


@rule("OutputPathInvalid")
def check_output_folder(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    folder_names_by_path = {"output.dir": (spec.output.dir or "").split("/"), "output.project": [spec.output.project or ""]}
    for path, folder_names in folder_names_by_path.items():
        if any(name in (".", "..") for name in folder_names):
            yield path, f"{'/'.join(folder_names)}, but a folder must not have the name `.` or `..`", "write a folder below storage.uri, for example results"
    if "://" in (spec.output.dir or ""):
        yield (
            "output.dir",
            f"{redact_source(spec.output.dir or '')} is an address, but output.dir is a folder below storage.uri",
            "write the address in storage.uri, and in output.dir a folder such as results",
        )


@rule("TrackerAndOptions")
def check_trackers(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    trackers_to_use = spec.tracking.report_to or []
    for tracker, options in (
        (Tracker.WANDB, spec.tracking.wandb),
        (Tracker.MLFLOW, spec.tracking.mlflow),
        (Tracker.MONGODB, spec.tracking.mongodb),
    ):
        if options is not None and tracker not in trackers_to_use:
            yield (
                f"tracking.{tracker}",
                f"tracking.{tracker} has no effect, because tracking.reportTo does not contain {tracker}",
                f"write `reportTo: [{tracker}]`, or remove tracking.{tracker}",
            )
    if (
        Tracker.WANDB in trackers_to_use
        and (spec.tracking.wandb is None or spec.tracking.wandb.api_key_secret_ref is None)
        and not _has_wandb_variables(spec)
        and target is ExecutionTarget.CLUSTER
    ):
        yield (
            "tracking.wandb.apiKeySecretRef",
            "reportTo contains wandb, but the API key is missing",
            "write `wandb: {apiKeySecretRef: {name: wandb, key: apiKey}}`, or `{name: WANDB_MODE, value: offline}` in placement.env to write files instead",
        )
    if Tracker.MLFLOW in trackers_to_use and (spec.tracking.mlflow is None or spec.tracking.mlflow.tracking_uri is None):
        yield (
            "tracking.mlflow.trackingUri",
            "reportTo contains mlflow, but the URL of the MLflow server is missing",
            "write for example `mlflow: {trackingUri: 'http://mlflow.mlops:5000'}`",
        )
    uri = spec.tracking.mlflow.tracking_uri if spec.tracking.mlflow else None
    if uri is not None and re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", uri) is None:
        shown_uri = redact_source(uri)
        yield (
            "tracking.mlflow.trackingUri",
            f"{shown_uri!r} is not an http or https URL of a server without user and password",
            "write for example http://mlflow.mlops:5000, and the variables MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD with secretKeyRef in placement.env",
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


def _has_wandb_variables(spec: FineTuneJobSpec) -> bool:
    """Whether `placement.env` has the API key of Weights & Biases, or selects its offline mode, which writes files and needs no key."""
    return any(
        variable.name == WANDB_KEY or (variable.name == WANDB_MODE and variable.value == "offline") for variable in spec.placement.env or []
    )


@rule("JudgeMissing")
def check_judge(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    judge = spec.evaluation.judge
    if judge is not None and judge.model is None and (judge.input_price is not None or judge.output_price is not None):
        yield (
            "evaluation.judge.model",
            "inputPrice and outputPrice have no effect without a judge model",
            "write evaluation.judge.model, or remove the prices",
        )
    metrics = metrics_after_training(spec)
    judge_metrics = [metric for metric in JUDGE_METRICS if metric in metrics]
    if not judge_metrics:
        return
    if judge is None or judge.model is None:
        yield (
            "evaluation.judge.model",
            f"evaluation.metrics contains {_join_with_and(judge_metrics)}, but the judge model is missing",
            "write for example `judge: {model: gpt-4.1-mini, apiKeySecretRef: {name: judge, key: apiKey}}`; "
            "for a server of your own also write evaluation.judge.endpoint (default https://api.openai.com/v1)",
        )
    has_api_key = (judge is not None and judge.api_key_secret_ref is not None) or any(variable.name == JUDGE_KEY for variable in spec.placement.env or [])
    if not has_api_key and target is ExecutionTarget.CLUSTER:
        yield (
            "evaluation.judge.apiKeySecretRef",
            f"evaluation.metrics contains {_join_with_and(judge_metrics)}, but the API key of the judge is missing",
            "write `judge: {apiKeySecretRef: {name: judge, key: apiKey}}`; if the server does not check the API key, the Secret may contain any text",
        )
    embedding_metrics = [metric for metric in JUDGE_EMBEDDING_METRICS if metric in metrics]
    if embedding_metrics and (judge is None or judge.embedding is None):
        yield (
            "evaluation.judge.embedding",
            f"evaluation.metrics contains {_join_with_and(embedding_metrics)}, but the judge's embedding model is missing",
            "write for example `judge: {embedding: text-embedding-3-small}`",
        )


@rule("MetricModelMissing")
def check_metric_models(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    metrics, metric_models, judge = metrics_after_training(spec), spec.evaluation.metric_models, spec.evaluation.judge
    bertscore, semantic_similarity = (metric_models.bertscore, metric_models.semantic_similarity) if metric_models else (None, None)
    if EvaluationMetric.BERTSCORE in metrics and bertscore is None:
        yield (
            "evaluation.metricModels.bertscore",
            "evaluation.metrics contains bertscore, but the model for this metric is missing",
            "write for example `metricModels: {bertscore: FacebookAI/roberta-large}`, or remove bertscore",
        )
    if EvaluationMetric.SEMANTIC_SIMILARITY in metrics and semantic_similarity is None and (judge is None or judge.embedding is None):
        yield (
            "evaluation.metricModels.semanticSimilarity",
            "evaluation.metrics contains semanticSimilarity, but the model for this metric is missing",
            "write for example `metricModels: {semanticSimilarity: sentence-transformers/all-MiniLM-L6-v2}`, or evaluation.judge.embedding",
        )
    for metric, source in ((EvaluationMetric.BERTSCORE, bertscore), (EvaluationMetric.SEMANTIC_SIMILARITY, semantic_similarity)):
        if source is not None and metric not in metrics:
            yield (
                f"evaluation.metricModels.{metric}",
                f"the model has no effect, because the job does not compute the metric {metric}",
                f"add {metric} to evaluation.metrics, or remove metricModels.{metric}",
            )


@rule("GateInvalid")
def check_gates(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, gate in enumerate(spec.evaluation.gates or []):
        path = f"evaluation.gates[{i}]"
        if (gate.value is None) == (gate.not_worse_than_base is None):
            set_fields_text = "neither value nor notWorseThanBase" if gate.value is None else "both value and notWorseThanBase"
            yield (
                path,
                f"the gate for {gate.metric} has {set_fields_text}, but a gate needs exactly one of these fields",
                f"write for example `{{metric: {gate.metric}, op: {_choose_example_operator(gate.metric)}, value: 0.8}}` or `{{metric: {gate.metric}, notWorseThanBase: {{margin: 0.02}}}}`",
            )
        elif gate.value is not None and gate.op is None:
            yield (
                f"{path}.op",
                f"the gate for {gate.metric} has the value {gate.value:g}, but the comparison is missing",
                f"write `op: {_choose_example_operator(gate.metric)}`, or another comparison: lt, le, gt or ge",
            )
        elif gate.not_worse_than_base is not None and gate.op is not None:
            yield f"{path}.op", f"{gate.op}, but a gate with notWorseThanBase needs no comparison", "remove op"
        if gate.metric in FRACTION_METRICS:
            margin = gate.not_worse_than_base.margin if gate.not_worse_than_base else None
            for field, number in (("value", gate.value), ("notWorseThanBase.margin", margin)):
                if number is not None and not 0 <= number <= 1:
                    yield (
                        f"{path}.{field}",
                        f"{number:g}, but {gate.metric} is a number between 0 and 1",
                        f"write for example {number / 100:g}" if 1 < number <= 100 else "write a number between 0 and 1",
                    )


def _choose_example_operator(metric: GateMetric) -> str:
    """Return the comparison for the example of a gate in a hint: `le` for a metric for which lower values are better, otherwise `ge`."""
    return "le" if metric in LOWER_IS_BETTER_METRICS else "ge"


@rule("GateMetricMissing")
def check_gate_metrics(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if spec.evaluation.gates and spec.phases.evaluate is False:
        yield (
            "evaluation.gates",
            "the gates need the metrics of the evaluation, but phases.evaluate is false",
            "remove `evaluate: false`, or remove evaluation.gates",
        )
        return
    for i, gate in enumerate(spec.evaluation.gates or []):
        needed_metric = EvaluationMetric.PERPLEXITY if gate.metric is GateMetric.LOSS else EvaluationMetric(gate.metric.value)
        if needed_metric not in (spec.evaluation.metrics or []):
            cause = f"{gate.metric} is measured together with perplexity, but" if gate.metric is GateMetric.LOSS else f"{gate.metric}, but"
            yield (
                f"evaluation.gates[{i}].metric",
                f"{cause} evaluation.metrics does not contain {needed_metric}",
                f"add {needed_metric} to evaluation.metrics, or remove the gate",
            )


@rule("EvaluationRowsMissing")
def check_evaluation_rows(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if has_test_set(spec) or has_validation_set(spec):
        return
    for path, needs_rows, subject in (
        ("evaluation.gates", bool(spec.evaluation.gates), "the gates need"),
        ("evaluation.metrics", bool(metrics_after_training(spec)), "the metrics need"),
        ("phases.infer", writes_predictions(spec), "the phase infer needs"),
    ):
        if needs_rows:
            yield (
                path,
                f"{subject} rows to evaluate, but the spec contains neither test data nor validation data",
                "write for example `dataset: {test: s3://bucket/test.jsonl}` or `dataset: {split: {test: 0.1}}`",
            )
            return


@rule("RewardModelWritesNoText")
def check_evaluation_of_reward_model(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if trainer_type_of(spec) is not TrainerType.REWARD:
        return
    for path, is_set in (
        ("evaluation.metrics", bool(metrics_after_training(spec))),
        ("evaluation.comparison.promptsRef", prompts_to_compare(spec) is not None),
        ("phases.infer", writes_predictions(spec)),
        ("evaluation.benchmarks", bool(benchmarks_after_training(spec))),
    ):
        if is_set:
            yield path, "a reward model scores answers and writes no text, so its answers cannot be evaluated", f"remove {path}"


@rule("EvaluationOptionWithoutEffect")
def check_max_rows(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if spec.evaluation.max_rows is not None and not metrics_after_training(spec) and not spec.phases.infer:
        yield (
            "evaluation.maxRows",
            f"{spec.evaluation.max_rows}, but maxRows has no effect, because the job generates no answers",
            "write evaluation.metrics or `phases: {infer: true}`, or remove maxRows",
        )


@rule("PhasesContradiction")
def check_phases(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    phases = spec.phases
    if phases.evaluate and not spec.evaluation.metrics and not benchmarks_after_training(spec):
        yield (
            "phases.evaluate",
            "true, but evaluation.metrics and evaluation.benchmarks are empty, so there is nothing to compute",
            "write for example `evaluation: {metrics: [perplexity]}`, or remove `evaluate: true`",
        )
    if phases.train is not False:
        if phases.from_ is not None:
            yield (
                "phases.from",
                "phases.from has no effect, because the job trains its own model",
                "write `train: false` to evaluate the model of phases.from, or remove `from`",
            )
        return
    if phases.from_ is None:
        yield (
            "phases.from",
            "phases.train is false, but phases.from is missing, so the other phases have no model",
            "write for example `from: s3://bucket/prefix/model`, the value of status.output.uri of another FineTuneJob",
        )
    elif _is_hub_source(phases.from_):
        yield (
            "phases.from",
            f"{phases.from_!r} is a hub repository, but phases.from needs a final model or checkpoint of another FineTuneJob",
            "write for example `from: s3://bucket/prefix/model`, the value of status.output.uri of that job",
        )
    if not phases.evaluate and not _has_work_after_training(spec):
        yield (
            "phases",
            "train, infer and evaluate are all false, so the job would do nothing",
            "write evaluation.metrics or evaluation.benchmarks without `evaluate: false`, or `infer: true`, or output.verify: true, or remove `train: false`",
        )


def _has_work_after_training(spec: FineTuneJobSpec) -> bool:
    """Whether the spec requests any work after training: predictions, an evaluation, publishing, or verification."""
    output, hub = spec.output, spec.output.hub
    publishes = output.dir is not None or output.merge_adapter is True or bool(output.serving) or (hub is not None and hub.push is True)
    evaluates = bool(metrics_after_training(spec)) or bool(benchmarks_after_training(spec)) or prompts_to_compare(spec) is not None
    return writes_predictions(spec) or evaluates or publishes or verifies_artefacts(spec)


def _is_hub_source(text: str) -> bool:
    try:
        return isinstance(parse_source(text), HubSource)
    except ConfigError:  # `check_sources` reports sources that cannot be parsed
        return False


def _join_with_and(metrics: Iterable[EvaluationMetric]) -> str:
    return " and ".join(metrics)
