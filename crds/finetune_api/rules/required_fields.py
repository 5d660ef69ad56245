"""Rules for required fields (base model and training data), and for the syntax of all sources."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.errors import ConfigError
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import reads_rows_after_training
from finetune_api.sources import ConfigMapSource, HttpsSource, HubSource, parse_source, redact_source
from finetune_api.spec import FineTuneJobSpec

IMAGE_ROOT = "dataset.images.root"
RESUME_HINT = (
    "write auto to continue from the newest checkpoint of this job, never to start from the base model, or the address of a checkpoint such as "
    "s3://bucket/.../checkpoints/step-00000100"
)


@rule(
    "ModelMissing",
    cel="has(self.model) && has(self.model.source)",
    message="spec.model.source is required: write for example org/name or s3://bucket/prefix",
)
def check_model_missing(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if not spec.model.source:
        yield (
            "model.source",
            "the spec names no base model",
            "write for example `source: org/name` or `source: s3://bucket/prefix`",
        )


@rule("DatasetMissing")
def check_dataset_missing(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    dataset = spec.dataset
    has_held_out_rows = dataset.test is not None or dataset.validation is not None
    reads_rows = reads_rows_after_training(spec) or dataset.split is not None
    needs_no_training_data = spec.phases.train is False and (has_held_out_rows or not reads_rows)
    if dataset.train is None and dataset.mixture is None and not needs_no_training_data:
        yield (
            "dataset.train",
            "the spec names no training data",
            "write for example `train: s3://bucket/train.jsonl`, or a `mixture`",
        )
    if dataset.train is not None and dataset.mixture is not None:
        yield "dataset.mixture", "dataset.train and dataset.mixture exclude each other", "remove dataset.train or dataset.mixture"


@rule("SourceInvalid")
def check_sources(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for path, source_text in iterate_source_fields(spec):
        try:
            source = parse_source(source_text, spec_path=path)
        except ConfigError as error:
            hint = RESUME_HINT if path == "checkpoint.resume" and "://" not in source_text else error.hint
            yield path, error.message.removeprefix(f"{path} is "), hint or ""
            continue
        if path.startswith("dataset.") and path != IMAGE_ROOT:
            continue
        if path == "checkpoint.resume" and isinstance(source, HubSource):
            yield path, f"{source_text!r} is not the address of a checkpoint", RESUME_HINT
        if isinstance(source, ConfigMapSource):
            subject = "a benchmark" if path.startswith("evaluation.benchmarks") else "the root of the images" if path == IMAGE_ROOT else "a model"
            yield (
                path,
                f"{source_text!r} is a single file, but {subject} needs a folder",
                "write org/name, s3://bucket/prefix, pvc://claim/path or file:///path",
            )
        if isinstance(source, HttpsSource) and path.startswith(("evaluation.benchmarks", IMAGE_ROOT)):
            message, _ = _describe_unreadable_folder(source_text, path)
            yield path, message, "write org/name, s3://bucket/prefix, pvc://claim/path or file:///path"
        elif isinstance(source, HttpsSource) and not _is_readable_web_folder(source, path):
            yield (path, *_describe_unreadable_folder(source_text, path))


def _is_readable_web_folder(source: HttpsSource, path: str) -> bool:
    """Whether the trainer can read this `https://` folder.

    The trainer can read only a folder that a FineTuneJob wrote, because such a folder contains a list of its files.
    """
    return source.is_checkpoint if path == "checkpoint.resume" else source.is_job_result


def _describe_unreadable_folder(url: str, path: str) -> tuple[str, str]:
    """Return (message, hint) for an `https://` folder that the trainer cannot read."""
    example = "https://host/jobs/checkpoints/step-00000100"
    if path == "checkpoint.resume":
        return f"{redact_source(url)!r} does not name a checkpoint", f"write {example}"
    return (
        f"the trainer cannot list the files of {redact_source(url)!r} on a web server",
        f"write org/name, s3://bucket/prefix, pvc://claim/path, file:///path, or the URL of a FineTuneJob's result, such as https://host/jobs/model or {example}",
    )


def iterate_source_fields(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    """Yield (spec path, text) of each source that the spec contains."""
    paths_and_sources: list[tuple[str, str | None]] = [
        ("model.source", spec.model.source),
        ("model.tokenizer", spec.model.tokenizer),
        ("method.adapter.source", spec.method.adapter.source if spec.method.adapter else None),
        ("trainer.dpo.referenceModel", spec.trainer.dpo.reference_model if spec.trainer.dpo else None),
        ("dataset.train", spec.dataset.train),
        ("dataset.validation", spec.dataset.validation),
        ("dataset.test", spec.dataset.test),
        ("dataset.images.root", spec.dataset.images.root if spec.dataset.images else None),
    ]
    paths_and_sources += [(f"dataset.mixture[{i}].source", item.source) for i, item in enumerate(spec.dataset.mixture or [])]
    if spec.evaluation.metric_models is not None:
        paths_and_sources += [
            ("evaluation.metricModels.bertscore", spec.evaluation.metric_models.bertscore),
            ("evaluation.metricModels.semanticSimilarity", spec.evaluation.metric_models.semantic_similarity),
        ]
    paths_and_sources += [(f"evaluation.benchmarks[{i}].folder", benchmark.folder) for i, benchmark in enumerate(spec.evaluation.benchmarks or [])]
    paths_and_sources += [(f"output.combineAdapters[{i}].source", item.source) for i, item in enumerate(spec.output.combine_adapters or [])]
    paths_and_sources.append(("phases.from", spec.phases.from_))
    if spec.checkpoint.resume not in (None, "auto", "never"):
        paths_and_sources.append(("checkpoint.resume", spec.checkpoint.resume))
    return ((path, text) for path, text in paths_and_sources if text is not None)
