"""`spec.output`, `spec.evaluation`, `spec.tracking` and `spec.phases`: the final model, its evaluation, the trackers, and the phases of the job."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import CelRule, Group, spec_field
from finetune_api.patterns import HUB_REPOSITORY, PROJECT_NAME, RELATIVE_FOLDER, RUN_NAME_PART, SERVICE_URL
from finetune_api.spec.common import ConfigMapKeyRef, Line, SecretKeyRef, ShortText, Source
from finetune_api.spec.enums import (
    EvaluationMetric,
    ExportFormat,
    GateMetric,
    GateOperator,
    IntervalStrategy,
    OutputLayout,
    ServingTarget,
    Tracker,
)

NamePart = Annotated[str, StringConstraints(pattern=RUN_NAME_PART, max_length=128)]


class RunName(Group):
    """`output.runName`: name of the run in trackers. The name is prefix + name + suffix, without separators."""

    name: NamePart | None = spec_field(
        "Name of the run, without $ # @ & * !.",
        default_text="the start time of the run as YYYYMMDD-HHMMSS, in UTC",
        example="support-bot",
    )
    prefix: NamePart | None = spec_field(
        "Text before the name, without $ # @ & * !. No separator is added.", default_text="none", example="team-a-"
    )
    suffix: NamePart | None = spec_field(
        "Text after the name, without $ # @ & * !. No separator is added.", default_text="none", example="-v2"
    )


class Hub(Group):
    """`output.hub`: push the final model to a model hub."""

    push: bool | None = spec_field(
        "Push the final model to the hub: with output.mergeAdapter the merged model, otherwise the adapter or model at status.output.uri.",
        default=False,
        example=True,
    )
    repository: Annotated[str, StringConstraints(pattern=HUB_REPOSITORY, max_length=256)] | None = spec_field(
        "Name of the hub repository. Required with `push: true`.", default_text="none", example="org/my-model"
    )
    private: bool | None = spec_field(
        "Create a private repository. If true, the job refuses to push to an existing public repository.", default=True, example=False
    )
    token_secret_ref: SecretKeyRef | None = spec_field(
        "Key of a Secret that contains a hub token with write permission.",
        default_text="model.tokenSecretRef",
        example={"name": "hub", "key": "token"},
    )


class CombinedAdapter(Group):
    """One adapter of `output.combineAdapters`."""

    source: Source = Field(
        description="LoRA adapter for the same base model, in the same forms as `model.source`. Required. Example: `s3://models/ft/team-a/style/UID/model`."
    )
    weight: Annotated[float, Field(ge=-100, le=100)] | None = spec_field(
        "Factor by which this adapter's change of the base weights is multiplied.", default=1.0, example=0.5, since="0.2.0"
    )


class Output(Group):
    """`spec.output`: additional copies and formats of the final model."""

    cel = (
        CelRule(
            "!has(self.dir) || !self.dir.contains('://')",
            "output.dir must be a folder below storage.uri: write for example results, and write the address of the store in storage.uri",
            "OutputPathInvalid",
        ),
    )

    dir: Annotated[str, StringConstraints(pattern=RELATIVE_FOLDER, max_length=512)] | None = spec_field(
        "Folder below storage.uri for an additional copy of the results.", default_text="none", example="results"
    )
    project: Annotated[str, StringConstraints(pattern=PROJECT_NAME, max_length=128)] | None = spec_field(
        "Name of the project, for the folders below output.dir and for trackers.", default_text="the namespace", example="support"
    )
    run_name: RunName | None = spec_field(
        "Name of the run in trackers: prefix, name and suffix, without separators.",
        default_text="the FineTuneJob's name",
        example={"name": "support-bot"},
    )
    layout: OutputLayout | None = spec_field(
        "Structure of the folders below output.dir. With `projectModelTime`, each run has its own folder. With `flat`, a run overwrites the files of an earlier run with the same output.dir.",
        default="projectModelTime",
        example="flat",
    )
    hub: Hub | None = spec_field(
        "Push the final model to a model hub.", default_text="none", example={"push": True, "repository": "org/my-model"}
    )
    merge_adapter: bool | None = spec_field(
        "Also store a complete model: the unquantised base model with the adapter merged into it. The base model must fit into the pod's memory.",
        default=False,
        example=True,
    )
    combine_adapters: Annotated[list[CombinedAdapter], Field(min_length=1, max_length=16)] | None = spec_field(
        "Further LoRA adapters for the merged model. The weights of the merged model are the base weights plus the weighted sum of the changes by all adapters. Requires mergeAdapter. The stored adapter contains only the training of this job.",
        default_text="none",
        example=[{"source": "s3://models/ft/team-a/style/UID/model", "weight": 0.5}],
        since="0.2.0",
    )
    adapter_weight: Annotated[float, Field(ge=-100, le=100)] | None = spec_field(
        "Factor by which the trained adapter's change of the base weights is multiplied in the merged model. Allowed only with combineAdapters.", default_text="1", example=0.5, since="0.2.0"
    )
    export: Annotated[list[ExportFormat], Field(max_length=8)] | None = spec_field(
        "Formats of the final model. The model is always saved as safetensors. With `oci`, the manifest of an OCI artefact is stored next to the model, for `finetune export`. `gguf` and `onnx` are refused.",
        default_text="safetensors",
        example=["safetensors"],
    )
    verify: bool | None = spec_field(
        "After training, load the stored model in a new process with plain transformers and PEFT, and compare its log-probabilities with those of the trained model. If the log-probabilities differ, the job fails, and the files are kept. If false, the job only compares the hashes of the uploaded files. With phases.train: false, the log-probabilities of the model of phases.from are compared with those that the training job of this model recorded.",
        default_text="true; with phases.train: false, true only if the job merges the adapter or names output.serving",
        example=False,
        since="0.2.0",
    )
    serving: Annotated[list[ServingTarget], Field(max_length=2)] | None = spec_field(
        "Servers that must be able to serve the final model. If one of these servers cannot serve it, the job is refused. The job stores manifests for these servers in the folder `serving` next to the model.",
        default_text="none; without servers, a feature that vllm or kserve cannot serve only leads to a note in status.resolved.notes",
        example=["vllm"],
        since="0.2.0",
    )


class Benchmark(Group):
    """One benchmark that runs after training."""

    name: ShortText = Field(
        description="Name of the benchmark: `lm-eval` or `lm-evaluation-harness` (tasks of the lm-evaluation-harness), `domain-specific-eval` (questions of domain files), "
        "`human-eval` (sheets in which people rate answers) or `openai-humaneval` (generated code against unit tests). Required. Example: `lm-eval`."
    )
    tasks: Annotated[list[ShortText], Field(max_length=128)] | None = spec_field(
        "Names of the tasks of the harness, or names of the domains of domain-specific-eval.", default_text="all tasks or domains of the folder", example=["arc_easy"]
    )
    folder: Source | None = spec_field(
        "Folder with the tasks and their data: s3://, file://, pvc:// or a data set repository of the hub. Required, except for human-eval. "
        "Benchmarks never download data from the hub while they run.",
        default_text="none",
        example="s3://data/benchmarks",
        since="0.2.0",
    )
    few_shot: Annotated[int, Field(ge=0, le=1000)] | None = spec_field(
        "Number of solved examples before each question. Tasks that do not allow solved examples run without them.", default_text="the number in the task's definition", example=5, since="0.2.0"
    )
    limit: Annotated[int, Field(ge=1, le=1000000000)] | None = spec_field(
        "Maximum number of questions of each task: the first questions of the task, or a random sample of the rows for human-eval.",
        default_text="all questions; 50 for human-eval",
        example=200,
        since="0.2.0",
    )
    apply_chat_template: bool | None = spec_field(
        "Render the questions of harness tasks with the chat template of the model.", default=False, example=True, since="0.2.0"
    )
    compare_with_base: bool | None = spec_field(
        "Also run the benchmark with the base model. The comparison shows what training has improved and what the model has forgotten.",
        default=False,
        example=True,
        since="0.2.0",
    )
    allow_code_execution: bool | None = spec_field(
        "Allow the benchmark to run code: Python code in the folder, and code that the model generates. Required with openai-humaneval.",
        default=False,
        example=True,
        since="0.2.0",
    )


class Judge(Group):
    """`evaluation.judge`: a model that scores answers."""

    model: ShortText | None = spec_field(
        "Model that scores answers. Required with the metrics factualCorrectness, answerAccuracy, answerRelevancy and answerCorrectness.",
        default_text="none",
        example="gpt-4.1-mini",
    )
    embedding: ShortText | None = spec_field(
        "Model that computes embeddings. Required with the metrics answerRelevancy and answerCorrectness.",
        default_text="none",
        example="text-embedding-3-small",
    )
    endpoint: Annotated[str, StringConstraints(pattern=SERVICE_URL, max_length=512)] | None = spec_field(
        "Base URL of a server with the OpenAI API, without user and password. The trainer sends the questions and answers of the test set to this server.",
        default="https://api.openai.com/v1",
        example="http://vllm.inference:8000/v1",
    )
    api_key_secret_ref: SecretKeyRef | None = spec_field(
        "Key of a Secret that contains the API key for the endpoint. Required with the metrics that need a judge. If the server does not check API keys, the Secret may contain any text.",
        default_text="the variable OPENAI_API_KEY in placement.env if set",
        example={"name": "judge", "key": "apiKey"},
        since="0.2.0",
    )
    input_price: Annotated[float, Field(ge=0, le=1000000)] | None = spec_field(
        "Price of a million input tokens, for the cost report.", default_text="none", example=0.5
    )
    output_price: Annotated[float, Field(ge=0, le=1000000)] | None = spec_field(
        "Price of a million output tokens, for the cost report.", default_text="none", example=1.5
    )


class Generation(Group):
    """`evaluation.comparison.generation`: options for generating answers."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1048576)] | None = spec_field(
        "Maximum length of an answer in tokens.", default=256, example=128
    )
    temperature: Annotated[float, Field(ge=0, le=10)] | None = spec_field("Sampling temperature.", default=1.0, example=0.7)
    top_p: Annotated[float, Field(gt=0, le=1)] | None = spec_field("Nucleus sampling: sample only among the most likely tokens with this total probability.", default=1.0, example=0.9)
    top_k: Annotated[int, Field(ge=0, le=1000000)] | None = spec_field(
        "Sample only among the k most likely tokens. 0: sample among all tokens.", default=0, example=50
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = spec_field(
        "Minimum probability of a token, as a fraction of the most likely token's probability.", default=0.0, example=0.05
    )
    do_sample: bool | None = spec_field("Sample tokens. If false, always generate the most likely token.", default=False, example=True)
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = spec_field(
        "Penalty on repeated tokens. 1: no penalty.", default=1.0, example=1.1
    )


class Comparison(Group):
    """`evaluation.comparison`: compare the metrics and answers of the trained model with those of the base model."""

    prompts_ref: ConfigMapKeyRef | None = spec_field(
        "Key of a ConfigMap that contains the prompts: one prompt per line, or prompts of several lines with blank lines between them.", default_text="none", example={"name": "prompts", "key": "prompts.txt"}
    )
    generation: Generation | None = spec_field(
        "Options for generating answers.", default_text="the defaults of the fields", example={"maxNewTokens": 128}
    )


class MetricModels(Group):
    """`evaluation.metricModels`: the models that compute metrics in the job's pods. The fields accept the same forms as `model.source`."""

    bertscore: Source | None = spec_field(
        "Model that computes the token embeddings for the metric bertscore. Required with this metric.",
        default_text="none",
        example="FacebookAI/roberta-large",
    )
    semantic_similarity: Source | None = spec_field(
        "Model that computes the sentence embeddings for the metric semanticSimilarity. Required with this metric if judge.embedding is absent.",
        default_text="none",
        example="sentence-transformers/all-MiniLM-L6-v2",
    )


class NotWorseThanBase(Group):
    """`evaluation.gates[].notWorseThanBase`: the trained model must not be worse than the base model on the same rows."""

    margin: Annotated[float, Field(ge=0, le=1000000)] | None = spec_field(
        "By how much the trained model may be worse than the base model, in the metric's own unit.", default=0.0, example=0.02
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] | None = spec_field(
        "One-sided confidence of the comparison, above 0.5. With 0.95, a model that is worse by exactly the margin passes the gate in at most about 5 % of all cases.",
        default=0.95,
        example=0.99,
    )


class Gate(Group):
    """One gate: a condition on one metric of the trained model."""

    cel = (
        CelRule(
            "has(self.value) != has(self.notWorseThanBase)",
            "a gate needs exactly one of `value` and `notWorseThanBase`",
            "GateInvalid",
        ),
        CelRule(
            "has(self.op) || !has(self.value)",
            "a gate with `value` needs `op`: write for example `op: ge`",
            "GateInvalid",
        ),
        CelRule(
            "!has(self.op) || !has(self.notWorseThanBase)",
            "`notWorseThanBase` already contains the comparison: remove `op`",
            "GateInvalid",
        ),
    )

    metric: GateMetric = Field(
        description="Metric of the trained model. evaluation.metrics must contain this metric or, for loss, perplexity. Required. Example: `accuracy`."
    )
    op: GateOperator | None = spec_field(
        "How the metric is compared with `value`. Required with `value`, and not allowed with notWorseThanBase.", default_text="none", example="ge"
    )
    value: Annotated[float, Field(ge=-1000000, le=1000000)] | None = spec_field(
        "Value with which the metric is compared, in the metric's own unit. Exactly one of `value` and notWorseThanBase is required.",
        default_text="none",
        example=0.8,
    )
    not_worse_than_base: NotWorseThanBase | None = spec_field(
        "With notWorseThanBase, the gate passes if, with the given confidence, the trained model is worse than the base model by at most the margin. "
        "loss and perplexity may be higher than those of the base model by at most the margin; all other metrics may be lower by at most the margin.",
        default_text="none",
        example={"margin": 0.02},
    )


class Evaluation(Group):
    """`spec.evaluation`: the evaluation of the model during and after training."""

    cel = (
        CelRule(
            "!has(self.gates) || self.gates.all(g, has(self.metrics) && (g.metric in self.metrics || (g.metric == 'loss' && 'perplexity' in self.metrics)))",
            "a gate's metric is not measured: add the metric to evaluation.metrics; for loss add perplexity",
            "GateMetricMissing",
        ),
    )

    strategy: IntervalStrategy | None = spec_field(
        "When the trainer measures the validation loss.", default_text="steps with validation data, otherwise no", example="epoch"
    )
    steps: Annotated[int, Field(ge=1, le=1000000000)] | None = spec_field(
        "Optimizer steps between evaluations.", default_text="checkpoint.steps", example=100
    )
    batch_size_per_device: Annotated[int, Field(ge=1, le=65536)] | None = spec_field(
        "Rows per rank in one forward pass of the evaluation.", default_text="training.batchSizePerDevice", example=8
    )
    metrics: Annotated[list[EvaluationMetric], Field(max_length=16)] | None = spec_field(
        "Metrics that are computed after training.", default_text="none", example=["perplexity"]
    )
    max_rows: Annotated[int, Field(ge=1, le=1000000000)] | None = spec_field(
        "Maximum number of rows of the test set for which answers are generated. The rows are a random sample with the seed training.seed.",
        default_text="all rows",
        example=200,
        since="0.2.0",
    )
    metric_models: MetricModels | None = spec_field(
        "Models that compute metrics in the job's pods.",
        default_text="none",
        example={"bertscore": "FacebookAI/roberta-large"},
        since="0.2.0",
    )
    gates: Annotated[list[Gate], Field(min_length=1, max_length=16)] | None = spec_field(
        "Conditions on the trained model. If a gate fails, the job fails with reason GateFailed, and the trained model stays in storage without the marker `_PROMOTED`.",
        default_text="none",
        example=[{"metric": "accuracy", "op": "ge", "value": 0.8}, {"metric": "loss", "notWorseThanBase": {"margin": 0.05}}],
        since="0.2.0",
    )
    benchmarks: Annotated[list[Benchmark], Field(max_length=32)] | None = spec_field(
        "Benchmarks that run after training.", default_text="none", example=[{"name": "lm-eval"}]
    )
    judge: Judge | None = spec_field("Model that scores answers.", default_text="none", example={"model": "my-judge"})
    comparison: Comparison | None = spec_field(
        "Compare the trained model with the base model: the metrics of evaluation.metrics, and the answers to the prompts of promptsRef or, without promptsRef, to the test questions.",
        default_text="none", example={"promptsRef": {"name": "prompts", "key": "prompts.txt"}}
    )


class Mlflow(Group):
    """`tracking.mlflow`: the MLflow server that receives the metrics."""

    tracking_uri: Line | None = spec_field(
        "URL of the MLflow server, with http or https and without user and password. Required with reportTo mlflow. Write the server's credentials into placement.env, as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or as MLFLOW_TRACKING_TOKEN.", default_text="none", example="http://mlflow.mlops:5000"
    )
    experiment_name: ShortText | None = spec_field("Name of the MLflow experiment.", default_text="output.project", example="support")


class Wandb(Group):
    """`tracking.wandb`: the W&B project that receives the metrics."""

    project: ShortText | None = spec_field("Name of the W&B project.", default_text="output.project", example="support")
    entity: ShortText | None = spec_field("W&B team or user that owns the runs.", default_text="the owner of the API key", example="team-a")
    api_key_secret_ref: SecretKeyRef | None = spec_field(
        "Key of a Secret that contains the API key. Required with reportTo wandb, unless placement.env sets WANDB_MODE to offline. In offline mode, the run is stored below `tracking/wandb/` in the job's folder.", default_text="none", example={"name": "wandb", "key": "apiKey"}
    )


class Mongodb(Group):
    """`tracking.mongodb`: the MongoDB database that receives the metrics."""

    uri_secret_ref: SecretKeyRef | None = spec_field(
        "Key of a Secret that contains the connection URI. Required with reportTo mongodb.", default_text="none", example={"name": "mongo", "key": "uri"}
    )
    database: ShortText | None = spec_field("Name of the database.", default="finetuning", example="experiments")


class Tracking(Group):
    """`spec.tracking`: which metrics are logged, and which trackers receive them."""

    report_to: Annotated[list[Tracker], Field(max_length=4)] | None = spec_field(
        "Trackers that receive the metrics. TensorBoard files are stored below `tracking/tensorboard/` in the job's folder. A tracker that is unavailable never delays or ends a job.", default_text="none", example=["tensorboard"]
    )
    logging_steps: Annotated[int, Field(ge=1, le=1000000)] | None = spec_field(
        "Optimizer steps between two logged values of a metric.", default=10, example=50
    )
    log_first_step: bool | None = spec_field("Log the first optimizer step, too.", default=True, example=False)
    mlflow: Mlflow | None = spec_field("Connection to MLflow.", default_text="none", example={"trackingUri": "http://mlflow.mlops:5000"})
    wandb: Wandb | None = spec_field("Connection to Weights & Biases.", default_text="none", example={"project": "support"})
    mongodb: Mongodb | None = spec_field("Connection to MongoDB.", default_text="none", example={"database": "experiments"})
    system_metrics: bool | None = spec_field("Also report the usage of CPU, memory and GPUs, and store it in `metrics/system_metrics.jsonl`.", default=False, example=True)


class Phases(Group):
    """`spec.phases`: whether the job trains, generates answers and evaluates."""

    cel = (
        CelRule(
            "has(self.from) == (has(self.train) && !self.train)",
            "`train: false` and `from` require each other: write both, or remove both",
            "PhasesContradiction",
        ),
    )

    train: bool | None = spec_field("Train the model. With false, the other phases use the model of phases.from.", default=True, example=False)
    from_: Source | None = spec_field(
        "Folder of a committed final model or checkpoint of another job, for a job that does not train. The job reads this folder with the connection of spec.storage. Allowed only with `train: false`.",
        default_text="none",
        example="s3://models/ft/team-a/support-bot/UID/model",
        since="0.2.0",
        alias="from",
    )
    infer: bool | None = spec_field("Generate answers to the test set with the trained model.", default=False, example=True)
    evaluate: bool | None = spec_field(
        "Compute evaluation.metrics and run evaluation.benchmarks after training.",
        default_text="true if evaluation.metrics or evaluation.benchmarks is set, otherwise false",
        example=True,
    )
