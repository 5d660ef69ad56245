"""`spec.output`, `spec.evaluation`, `spec.tracking` and `spec.phases`: what comes out, how it is judged, who is told."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import Group, option
from finetune_api.spec.common import ConfigMapKeyRef, Line, SecretKeyRef, Word
from finetune_api.spec.enums import ExportFormat, Layout, Metric, Tracker, When

NamePart = Annotated[str, StringConstraints(pattern=r"^[^$#@&*!]*$", max_length=128)]


class RunName(Group):
    """`output.runName`: name shown in trackers."""

    name: NamePart | None = option(
        "Name of the run, without $ # @ & * !.", default_text="the FineTuneJob's name", example="support-bot"
    )
    prefix: NamePart | None = option("Put before the name. Default: none.", example="team-a-")
    suffix: NamePart | None = option("Put after the name. Default: none.", example="-v2")


class Hub(Group):
    """`output.hub`: push the final artefact to a model hub."""

    push: bool | None = option("Push the final artefact.", default=False, example=True)
    repository: Annotated[str, StringConstraints(pattern=r"^[\w.-]+(/[\w.-]+)?$", max_length=256)] | None = option(
        "Repository to push to. Required with push.", example="org/my-model"
    )
    private: bool | None = option("Create the repository as private.", default=True, example=True)
    token_secret_ref: SecretKeyRef | None = option(
        "Secret key with a token that may write.",
        default_text="model.tokenSecretRef",
        example={"name": "hub", "key": "token"},
    )


class Output(Group):
    """`spec.output`."""

    dir: Annotated[str, StringConstraints(pattern=r"^[^/\s][^\s]*$", max_length=512)] | None = option(
        "Also publish the results below `<storage.uri>/<dir>/`. Default: none.", example="results"
    )
    project: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$", max_length=128)] | None = option(
        "Project name in the published layout and in trackers.", default_text="the namespace", example="support"
    )
    run_name: RunName | None = option(
        "Name of the run in trackers. Default: the FineTuneJob's name.", example={"name": "support-bot"}
    )
    layout: Layout | None = option("Layout below dir.", default="projectModelTime", example="flat")
    hub: Hub | None = option(
        "Push to a model hub. Default: none.", example={"push": True, "repository": "org/my-model"}
    )
    merge_adapter: bool | None = option("Also write the base with the adapter merged in.", default=False, example=True)
    export: Annotated[list[ExportFormat], Field(max_length=8)] | None = option(
        "Further formats of the final model. Default: none.", example=["gguf"]
    )


class Benchmark(Group):
    """One benchmark run after training."""

    name: Word = Field(description="Name of the benchmark harness or domain set. Required. Example: `lm-eval`.")
    tasks: Annotated[list[Word], Field(max_length=128)] | None = option(
        "Tasks of the harness. Default: all.", example=["arc_easy"]
    )


class Judge(Group):
    """`evaluation.judge`: a model that scores answers."""

    model: Word | None = option("Model that judges. Default: none.", example="my-judge")
    embedding: Word | None = option("Model that embeds. Default: none.", example="my-embedder")
    input_price: Annotated[float, Field(ge=0, le=1000000)] | None = option(
        "Price of a million input tokens, for the cost report. Default: none.", example=0.5
    )
    output_price: Annotated[float, Field(ge=0, le=1000000)] | None = option(
        "Price of a million output tokens, for the cost report. Default: none.", example=1.5
    )


class Generation(Group):
    """`evaluation.comparison.generation`: how answers are generated."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1048576)] | None = option(
        "Longest answer in tokens.", default=256, example=128
    )
    temperature: Annotated[float, Field(ge=0, le=10)] | None = option("Sampling temperature.", default=1.0, example=0.7)
    top_p: Annotated[float, Field(gt=0, le=1)] | None = option("Nucleus sampling.", default=1.0, example=0.9)
    top_k: Annotated[int, Field(ge=0, le=1000000)] | None = option(
        "Sample among the k likeliest tokens; 0: all.", default=0, example=50
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = option(
        "Drop tokens below this fraction of the likeliest one's probability.", default=0.0, example=0.05
    )
    do_sample: bool | None = option("Sample instead of taking the likeliest token.", default=False, example=True)
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = option(
        "Penalty on repeated tokens; 1: none.", default=1.0, example=1.1
    )


class Comparison(Group):
    """`evaluation.comparison`: the same prompts answered by base and tuned model."""

    prompts_ref: ConfigMapKeyRef | None = option(
        "ConfigMap key with one prompt a line. Default: none.", example={"name": "prompts", "key": "prompts.txt"}
    )
    generation: Generation | None = option(
        "How answers are generated. Default: the values of its fields.", example={"maxNewTokens": 128}
    )


class Evaluation(Group):
    """`spec.evaluation`."""

    strategy: When | None = option(
        "When the validation loss is measured.", default_text="steps with validation data, else no", example="steps"
    )
    steps: Annotated[int, Field(ge=1, le=1000000000)] | None = option(
        "Optimizer steps between evaluations.", default_text="checkpoint.steps", example=100
    )
    batch_size_per_device: Annotated[int, Field(ge=1, le=65536)] | None = option(
        "Rows per rank in an evaluation.", default_text="training.batchSizePerDevice", example=8
    )
    metrics: Annotated[list[Metric], Field(max_length=16)] | None = option(
        "Metrics after training. Default: none.", example=["perplexity"]
    )
    benchmarks: Annotated[list[Benchmark], Field(max_length=32)] | None = option(
        "Benchmarks after training. Default: none.", example=[{"name": "lm-eval"}]
    )
    judge: Judge | None = option("Model that scores answers. Default: none.", example={"model": "my-judge"})
    comparison: Comparison | None = option(
        "Base and tuned model side by side. Default: none.", example={"promptsRef": {"name": "p", "key": "prompts.txt"}}
    )


class Mlflow(Group):
    """`tracking.mlflow`."""

    tracking_uri: Line | None = option(
        "MLflow server. Required with reportTo mlflow.", example="http://mlflow.mlops:5000"
    )
    experiment_name: Word | None = option("Experiment.", default_text="output.project", example="support")


class Wandb(Group):
    """`tracking.wandb`."""

    project: Word | None = option("Project.", default_text="output.project", example="support")
    entity: Word | None = option("Team or user. Default: the key's own.", example="team-a")
    api_key_secret_ref: SecretKeyRef | None = option(
        "Secret key with the API key. Required with reportTo wandb.", example={"name": "wandb", "key": "apiKey"}
    )


class Mongodb(Group):
    """`tracking.mongodb`."""

    uri_secret_ref: SecretKeyRef | None = option(
        "Secret key with the connection URI. Required with reportTo mongodb.", example={"name": "mongo", "key": "uri"}
    )
    database: Word | None = option("Database.", default="finetuning", example="finetuning")


class Tracking(Group):
    """`spec.tracking`."""

    report_to: Annotated[list[Tracker], Field(max_length=4)] | None = option(
        "Trackers that metrics go to. Default: none.", example=["tensorboard"]
    )
    logging_steps: Annotated[int, Field(ge=1, le=1000000)] | None = option(
        "Optimizer steps between logged values.", default=10, example=10
    )
    log_first_step: bool | None = option("Log the first step too.", default=True, example=True)
    mlflow: Mlflow | None = option("MLflow. Default: none.", example={"trackingUri": "http://mlflow.mlops:5000"})
    wandb: Wandb | None = option("Weights & Biases. Default: none.", example={"project": "support"})
    mongodb: Mongodb | None = option("MongoDB. Default: none.", example={"database": "finetuning"})
    system_metrics: bool | None = option("Also report CPU, memory and GPU use.", default=False, example=True)


class Phases(Group):
    """`spec.phases`: parts of the pipeline."""

    train: bool | None = option("Train.", default=True, example=True)
    infer: bool | None = option("Answer the test set with the tuned model.", default=False, example=True)
    evaluate: bool | None = option(
        "Compute evaluation.metrics after training.",
        default_text="true with evaluation.metrics, else false",
        example=True,
    )
