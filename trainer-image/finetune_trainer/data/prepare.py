"""The half of the data room that needs a tokenizer: examples to token sequences, once per node, kept by content hash.

One rank of a node does the work and writes it below the work folder; the others map the same files into memory. A second
attempt on the same disk, or a local run repeated, finds them by the hash of everything that went in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.errors import ConfigError, DataError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.rules import PROMPT_METHODS, method_of, value_or_default
from finetune_api.spec.enums import BadRows, DatasetFormat, Overflow

from finetune_trainer.data.load import Loaded, load, response_only
from finetune_trainer.data.parallel import Work, cores, encoded_rows
from finetune_trainer.data.rows import Completion
from finetune_trainer.data.template import Style
from finetune_trainer.data.tokenise import Rules, TokenReport, Tokens, packed, tokenise
from finetune_trainer.inputs import Inputs

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
VERSION = 4
"""Of what is cached; a change of the stages raises it."""
SUMMARY = "summary.json"
MAX_LENGTH = "dataset.maxSequenceLength"
DEFAULT_LENGTH = 2048
SHORTEST = 2
"""Tokens of a row in which something can be predicted."""
FAR = 1 << 24
"""A limit beyond this is a tokenizer's way of saying that it has none."""


@dataclass
class Prepared:
    """Token sequences of each part, and what is worth saying about them."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    format: DatasetFormat
    max_length: int
    reports: dict[str, TokenReport]
    rows: dict[str, int]
    notes: list[str] = field(default_factory=list)
    choices: bool = False
    """Whether all rows are questions with one letter as the answer."""
    cached: bool = False


def prepare(
    run: RunConfig, inputs: Inputs, tokenizer: Any, *, model_limit: int | None, cache: Path,
    first: AbstractContextManager[Any] | None = None,
) -> Prepared:  # fmt: skip
    """Token sequences for supervised training.

    `model_limit`: positions the model has; `first`: a context that lets one rank of the node in before the others.
    Errors: those of `load`; DataError NoTrainableToken, RowTooLong, TemplateRefusedRow, MarkerAbsent (with file and row);
    ConfigError SequenceTooLong, ChatTemplateMissing, TemplateSpansUnknown.
    """
    length = max_length(run, tokenizer, model_limit)
    template = use_template(run, inputs, tokenizer)
    folder = cache / key(run, inputs, tokenizer, length)
    with first or nullcontext():
        cached = (folder / SUMMARY).exists()
        if not cached:
            _write(folder, _tokens(run, inputs, tokenizer, length, template))
    return _open(folder, length, cached)


def max_length(run: RunConfig, tokenizer: Any, model_limit: int | None) -> int:
    """Longest row in tokens: as asked; a default gives way to the model's limit. Virtual tokens of a prompt method take positions, too.

    Errors: ConfigError SequenceTooLong.
    """
    asked = run.spec.dataset.max_sequence_length
    own = getattr(tokenizer, "model_max_length", None)
    limit = model_limit or (own if own and own < FAR else None)
    if limit is None:
        return asked or DEFAULT_LENGTH
    virtual = virtual_tokens(run)
    room = limit - virtual
    taken = f", of which method.promptLength takes {virtual}" if virtual else ""
    if virtual and room < SHORTEST:
        raise ConfigError(
            "SequenceTooLong", f"the model has {limit} positions{taken}: no row fits",
            hint=f"write method.promptLength {limit // 2} or less, or choose a model with a longer context",
        )  # fmt: skip
    if asked is None or MAX_LENGTH in run.defaults:
        return min(DEFAULT_LENGTH, room)
    if asked <= room:
        return asked
    raise ConfigError(
        "SequenceTooLong", f"{MAX_LENGTH} is {asked}, but the model has {limit} positions{taken}",
        hint=f"write {room} or less, or choose a model with a longer context",
    )  # fmt: skip


def virtual_tokens(run: RunConfig) -> int:
    """Positions before every row that prefix and prompt tuning fill."""
    return int(value_or_default(run.spec.method, "prompt_length")) if method_of(run.spec) in PROMPT_METHODS else 0


def use_template(run: RunConfig, inputs: Inputs, tokenizer: Any) -> bool:
    """Give the tokenizer the spec's chat template, if any, and say whether turns are rendered with it. Errors: ConfigError."""
    spec = run.spec.dataset
    if spec.chat_template is not None:
        tokenizer.chat_template = _template_text(spec.chat_template, inputs.config_maps)
    has = bool(tokenizer.chat_template)
    if spec.use_chat_template and not has:
        raise ConfigError(
            "ChatTemplateMissing", "dataset.useChatTemplate is true, but the tokenizer has no chat template",
            hint="give one in dataset.chatTemplate, or leave useChatTemplate out",
        )  # fmt: skip
    return has if spec.use_chat_template is None else spec.use_chat_template


def _template_text(chosen: Any, config_maps: Path) -> str:
    if chosen.text is not None:
        return str(chosen.text)
    ref = chosen.config_map_ref
    try:
        return (config_maps / ref.name / ref.key).read_text(encoding="utf-8")
    except OSError:
        raise NotFoundError(
            "ConfigMapMissing", f"dataset.chatTemplate: ConfigMap {ref.name} has no key {ref.key}", hint="create it",
            failure_class=FailureClass.USER,
        ) from None  # fmt: skip


def style_of(run: RunConfig, tokenizer: Any, template: bool, kind: DatasetFormat) -> Style:
    """How the rows of this run are rendered."""
    chosen = run.spec.dataset.response_only
    markers = (chosen.question_marker or "", chosen.answer_marker or "") if chosen else ("", "")
    specials = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    return Style(
        tokenizer, template, response_only(run, kind), markers if markers[1] else None, tuple(specials),
        text_as_turns=run.spec.dataset.use_chat_template is True,
    )  # fmt: skip


def _tokens(
    run: RunConfig, inputs: Inputs, tokenizer: Any, length: int, template: bool
) -> tuple[Loaded, dict[str, Tokens], list[str]]:
    """Everything but the cache: load, render, tokenise, pack."""
    spec = run.spec.dataset
    loaded = load(run, inputs)
    rules = Rules(length, spec.overflow or Overflow.TRUNCATE, spec.add_eos_token is not False, spec.add_bos_token)
    style = style_of(run, tokenizer, template, loaded.summary.with_turns)
    notes = list(loaded.summary.notes)
    parts: dict[str, Tokens] = {}
    for name, rows in loaded.parts():
        if template and spec.use_chat_template is None and any(isinstance(one, Completion) for _, one in rows):
            notes.append("prompt and completion are joined as they are; dataset.useChatTemplate: true makes them turns")
        bad = RowPolicy(run, len(rows))
        stream = encoded_rows(rows, Work(style, rules), processes=spec.num_proc or cores(), on_bad_row=bad)
        parts[name] = tokenise(stream, rules, on_bad_row=bad)
        notes += bad.notes(name) + [f"{name}: {note}" for note in parts[name].report.notes(rules)]
    if spec.packing:
        parts["train"] = packed(parts["train"], length)
        notes.append(f"train: {parts['train'].report.notes(rules)[-1]}")
    return loaded, parts, list(dict.fromkeys(notes))


class RowPolicy:
    """The policy for rows that turn out to be unusable only once they are rendered."""

    def __init__(self, run: RunConfig, rows: int):
        self.spec, self.total = run.spec.dataset, rows
        self.first: tuple[str, str] | None = None
        self.count = 0

    def __call__(self, place: str, code: str, found: str, write: str) -> None:
        """A row that cannot be used. Errors: DataError with the row's own code, or TooManyBadRows."""
        if self.spec.bad_rows is not BadRows.SKIP:
            raise DataError(
                code, f"{place}: {found}", hint=f"{write}; or `dataset.badRows: skip` to leave such rows out"
            )
        self.count += 1
        self.first = self.first or (place, found)
        limit = 0.05 if self.spec.max_bad_row_ratio is None else self.spec.max_bad_row_ratio
        if self.count > limit * self.total:
            raise DataError(
                "TooManyBadRows", f"more than {limit:.1%} of {self.total} rows cannot be used; the first: {self.first[0]}: {self.first[1]}",
                hint=f"{write}; or raise dataset.maxBadRowRatio",
            )  # fmt: skip

    def notes(self, part: str) -> list[str]:
        """What was left out."""
        return (
            [f"{part}: {self.count} rows were left out; the first: {self.first[0]}: {self.first[1]}"]
            if self.first
            else []
        )


# ---- cache


def key(run: RunConfig, inputs: Inputs, tokenizer: Any, length: int) -> str:
    """Hash of everything that decides the tokens: data, options, tokenizer, version."""
    digest = hashlib.sha256(inputs.dataset_digest.encode())
    for path in [*inputs.train, *(one for part in inputs.mixture for one in part), *inputs.validation, *inputs.test]:
        digest.update(f"{path.name}\0".encode())
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    seed = run.spec.training.seed if run.spec.dataset.mixture else None
    facts = [
        VERSION,
        {name: value for name, value in run.spec.dataset.to_wire().items() if name != "numProc"},
        run.spec.trainer.type,
        run.spec.trainer.max_completion_length,
        _defaults(run),
        length,
        seed,
        tokenizer.chat_template,
    ]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(
        tokenizer.backend_tokenizer.to_str().encode()
        if hasattr(tokenizer, "backend_tokenizer")
        else repr(tokenizer).encode()
    )
    digest.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def _defaults(run: RunConfig) -> list[str]:
    """Options that nobody asked for: they give way where an asked one would be refused."""
    return sorted(path for path in run.defaults if path.startswith(("dataset.", "trainer.maxCompletionLength")))


def _write(folder: Path, made: tuple[Loaded, dict[str, Tokens], list[str]]) -> None:
    from datasets import Dataset

    loaded, parts, notes = made
    sets = {}
    for name, tokens in parts.items():
        columns: dict[str, Any] = {"input_ids": tokens.input_ids, "labels": tokens.labels}
        if tokens.lengths is not None:
            columns["seq_lengths"] = tokens.lengths
        sets[name] = Dataset.from_dict(columns)
    summary = {
        "format": loaded.summary.format, "rows": loaded.summary.rows, "notes": notes,
        "choices": set(loaded.summary.formats) == {DatasetFormat.MCQ},
        "reports": {name: asdict(tokens.report) for name, tokens in parts.items()},
    }  # fmt: skip
    keep(folder, sets, summary)


def keep(folder: Path, parts: Mapping[str, Dataset], summary: Mapping[str, Any]) -> None:
    """Write beside and rename, so that a reader sees all or nothing."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, part in parts.items():
        part.save_to_disk(str(beside / name), num_shards=1)
    (beside / SUMMARY).write_text(json.dumps(summary))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def kept(folder: Path) -> tuple[Dataset, Dataset | None, Dataset | None, Any]:
    """Rows of training, validation and test, in memory that ranks share, and the summary."""
    from datasets import Dataset

    train, validation, test = (
        Dataset.load_from_disk(str(folder / part)) if (folder / part).exists() else None
        for part in ("train", "validation", "test")
    )
    assert train is not None, "a summary is written after the rows of training"
    return train, validation, test, json.loads((folder / SUMMARY).read_text())


def _open(folder: Path, length: int, cached: bool) -> Prepared:
    train, validation, test, summary = kept(folder)
    return Prepared(
        train=train,
        validation=validation,
        test=test,
        format=DatasetFormat(summary["format"]),
        max_length=length,
        reports={name: TokenReport(**report) for name, report in summary["reports"].items()},
        rows=summary["rows"],
        notes=summary["notes"],
        choices=summary["choices"],
        cached=cached,
    )
