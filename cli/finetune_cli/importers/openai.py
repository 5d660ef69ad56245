"""`openai`: a fine-tuning job of an API of that kind, as JSON, and its JSONL data, which is used unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from finetune_cli.importers.convert import Unfit, anything, choice, integer, number, table, text
from finetune_cli.importers.material import Document, Draft, Entry, Fill, Importer, Mistake, Origin, Row
from finetune_cli.importers.paths import is_local, place_source
from finetune_cli.importers.yaml_tree import parse, parse_json, sniff_json

REPORTED = "it is what that API reports about a job"


def auto_or(convert: Any) -> Any:
    """`auto` leaves the value to us."""

    def read_value(value: Any) -> Any:
        if value == "auto":
            return None
        try:
            return convert(value)
        except Unfit as unfit:
            raise Unfit(unfit.what, f'"auto" or {unfit.allowed}') from None

    return read_value


def _hyper(
    name: str, path: str, convert: Any, methods: tuple[str, ...] = ("supervised", "dpo"), *, manual: bool = False
) -> Row:
    places = tuple(f"method.{method}.hyperparameters.{name}" for method in methods)
    return Row(f"hyperparameters.{name}", path, auto_or(convert), places, manual=manual)


ROWS: tuple[Row, ...] = (
    Row("model", "model.source", required=True, manual=True),
    Row("training_file", "dataset.train", manual=True, required=True),
    Row("validation_file", "dataset.validation", manual=True),
    Row("method.type", "trainer.type", choice({"supervised": "sft", "dpo": "dpo"}), manual=True),
    _hyper("n_epochs", "training.epochs", integer(1, 50)),
    _hyper("batch_size", "training.batchSizePerDevice", integer(1), manual=True),
    _hyper("learning_rate_multiplier", "training.learningRate", number(above=0), manual=True),
    _hyper("beta", "trainer.dpo.beta", number(above=0, high=2), ("dpo",)),
    Row("seed", "training.seed", integer(0, 4294967295)),
    Row("suffix", "output.runName.suffix", text),
    Row("metadata", convert=table, manual=True),
    Row("integrations", "tracking.reportTo", anything, manual=True),
    *(Row(key, convert=anything, inert=REPORTED) for key in (
        "id", "object", "created_at", "finished_at", "fine_tuned_model", "organization_id", "result_files", "status", "trained_tokens", "error",
        "estimated_finish", "user_provided_suffix", "shared_with_openai", "usage_metrics", "eval_id",
    )),
)  # fmt: skip
PROFILE: tuple[Fill, ...] = (
    Fill("training.epochs", 3, "auto"),
    Fill("method.type", "lora", "our choice: that API does not say what it trains"),
    Fill("dataset.fileFormat", "jsonl", "fixed by that API"),
    Fill("dataset.responseOnly.enabled", True, "fixed by that API", lambda d: d.value("trainer.type", "sft") == "sft"),
)
OPAQUE = frozenset({"metadata", "integrations", "error"})
BASE_RATE = {"sft": 2e-4, "dpo": 5e-6}
"""Learning rates that the multiplier multiplies: our own defaults for adapters."""


# --- reading --------------------------------------------------------------------------------------------------------


def recognise(documents: tuple[Document, ...], words: tuple[str, ...]) -> bool:
    """A JSON object with a training file."""
    return any(_is_job(document) for document in documents)


def _is_job(document: Document) -> bool:
    if document.path.suffix == ".json" and '"training_file"' in document.text:
        return True
    return "training_file" in sniff_json(document)


def read(draft: Draft) -> Iterator[Entry]:
    """The job, with the line of every key; data files given beside it are looked at in `combine`."""
    for word in draft.request.words:
        draft.mistakes.append(
            Mistake("command line", word, "this source has no command line", "change the file, or use our own options")
        )
    for document in draft.documents:
        if document.path.suffix == ".jsonl":
            continue
        value = parse_json(document)
        lines = parse(document).lines
        yield from _leaves(value, "", document, lines)


def _leaves(value: dict[str, Any], prefix: str, document: Document, lines: dict[str, int]) -> Iterator[Entry]:
    for key, inner in value.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(inner, dict) and path not in OPAQUE:
            yield from _leaves(inner, path, document, lines)
        elif inner is not None:
            yield Entry(path, inner, Origin(f"{document.name}:{lines[path]}" if path in lines else document.name))


# --- options that belong together -----------------------------------------------------------------------------------


def combine(draft: Draft) -> None:
    """What one field of that API means depends on others."""
    _model(draft)
    trainer = draft.get("method.type", "sft")
    if "method.type" in draft.given:
        draft.put("trainer.type", trainer, "method.type")
    else:
        draft.fill("trainer.type", trainer, "fixed by that API")
    _data(draft, trainer)
    _batch(draft)
    multiplier = draft.get("hyperparameters.learning_rate_multiplier")
    if multiplier is not None:
        base = BASE_RATE[trainer]
        draft.put(
            "training.learningRate", float(f"{base * multiplier:.6g}"), "hyperparameters.learning_rate_multiplier"
        )
        draft.note(f"learning_rate_multiplier {multiplier:g} multiplies our own default rate, {base:g}")
    if trainer != "dpo":
        draft.drop("trainer.dpo", "the method is not dpo")
    _metadata(draft)
    _integrations(draft)


def _model(draft: Draft) -> None:
    given = draft.given.get("model")
    if given is None or "model.source" in draft.request.own:
        return
    name = str(given.value)
    mapped = draft.request.model_map.get(name)
    if mapped is not None:
        draft.put("model.source", f"file://{mapped}" if is_local(mapped) and "://" not in mapped else mapped, "model")
    elif "/" in name or is_local(name):
        place_source(draft, "model", "model.source")
    else:
        draft.refuse(
            "model",
            f'"{name}" is a model of that API, which nobody else can train',
            f"say which open model takes its place: --model-map {name}=org/name",
            settles="model.source",
        )


def _data(draft: Draft, trainer: str) -> None:
    beside = [document for document in draft.documents if document.path.suffix == ".jsonl"]
    for key, path, document in (
        ("training_file", "dataset.train", beside[0] if beside else None),
        ("validation_file", "dataset.validation", beside[1] if len(beside) > 1 else None),
    ):
        if key not in draft.given or path in draft.request.own:
            continue
        _file(draft, key, path, document)
    for document in beside:
        _rows(draft, document, trainer)
    if trainer == "dpo":
        draft.fill("dataset.format", "preference", "fixed by that API")
        for column, name in (
            ("question", "input"),
            ("chosen", "preferred_output"),
            ("rejected", "non_preferred_output"),
        ):
            draft.fill(f"dataset.columns.{column}", name, "fixed by that API")
    else:
        draft.fill("dataset.format", "messages", "fixed by that API")


def _file(draft: Draft, key: str, path: str, document: Document | None) -> None:
    given = draft.given[key]
    if document is not None:
        option = "--data" if path == "dataset.train" else "--validation"
        draft.put(path, f"file://{document.path}", key)
        draft.warn(
            f"{given.origin.place}: {key}: {document.path} is a path of this machine, which no pod of a cluster can read; give {option} URI"
        )
    elif re.match(r"^file-[A-Za-z0-9]+$", str(given.value)):
        option = "--data" if path == "dataset.train" else "--validation"
        draft.warn(
            f"{given.origin.place}: {key}: {given.value} is a file of that API; give the same rows with {option} URI"
        )
        draft.broken[key] = path if path == "dataset.train" else ""
    else:
        place_source(draft, key, path)


def _rows(draft: Draft, document: Document, trainer: str) -> None:
    """Look at the rows' shape, so that a file of the other method is told here and not on a GPU."""
    wanted = ("input", "preferred_output", "non_preferred_output") if trainer == "dpo" else ("messages",)
    for number_, line in enumerate(document.text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", "a number is too long, or it is nested too deeply")
            draft.mistakes.append(Mistake(f"{document.name}:{number_}", "", f"it is not JSON: {why}"))
            return
        missing = [key for key in wanted if not isinstance(row, dict) or key not in row]
        if missing:
            present = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            draft.mistakes.append(
                Mistake(
                    f"{document.name}:{number_}",
                    ", ".join(missing),
                    f"it is missing in the row, which has {present}",
                    f"rows of {trainer} hold {', '.join(wanted)}",
                )
            )
            return


def _batch(draft: Draft) -> None:
    """That API's batch size counts all rows of an optimizer step, whatever number of ranks they are spread over."""
    rows, key = draft.get("hyperparameters.batch_size"), "hyperparameters.batch_size"
    if rows is None:
        return
    ranks = _ranks(draft)
    share = rows // ranks
    if rows % ranks:
        fitting = f"{share * ranks} or {(share + 1) * ranks}" if share else str(ranks)
        draft.refuse(
            key,
            f"{rows} rows of a step cannot be shared by {ranks} ranks",
            f"write {fitting}, or other --gpus and --nodes",
        )
        return
    device = next(size for size in (4, 3, 2, 1) if share % size == 0)
    draft.put("training.batchSizePerDevice", device, key)
    draft.put("training.gradientAccumulationSteps", share // device, key)
    draft.note(f"batch_size {rows} is {device} rows a rank, times {share // device} accumulated, times {ranks} ranks")


def _ranks(draft: Draft) -> int:
    """Processes of the job, from our own options: that API's files name none."""
    own = {path: one.value for path, one in draft.request.own.items() if isinstance(one.value, int)}
    gpus = own.get("resources.gpusPerNode", 1)
    each = own.get("resources.processesPerNode", gpus) or 1
    return max(1, each * own.get("resources.nodes", 1))


def _metadata(draft: Draft) -> None:
    for key, value in (draft.get("metadata") or {}).items():
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", str(key)).strip("_.-")[:63].strip("_.-")
        if name:
            draft.annotations[name] = str(value)


def _integrations(draft: Draft) -> None:
    given = draft.given.get("integrations")
    if given is None:
        return
    if not isinstance(given.value, list):
        draft.refuse("integrations", "it is not a list", 'write [{"type": "wandb", "wandb": {"project": "..."}}]')
        return
    for one in given.value:
        options = one.get("wandb") if isinstance(one, dict) else None
        if not isinstance(one, dict) or one.get("type") != "wandb" or not isinstance(options, dict):
            draft.refuse(
                "integrations", "only wandb is offered", 'write [{"type": "wandb", "wandb": {"project": "..."}}]'
            )
            continue
        draft.put("tracking.reportTo", ["wandb"], "integrations")
        ignored = [key for key in options if key not in ("project", "entity", "name")]
        if ignored:
            draft.warn(
                f"{given.origin.place}: integrations: {', '.join(ignored)} of wandb has no effect: it has no counterpart"
            )
        for key, path in (
            ("project", "tracking.wandb.project"),
            ("entity", "tracking.wandb.entity"),
            ("name", "output.runName.name"),
        ):
            if options.get(key):
                draft.put(path, str(options[key]), "integrations")


IMPORTER = Importer("openai", "that API", ROWS, PROFILE, recognise, read, combine)
