"""The one engine behind all importers: precedence, conversion, profile, checks, and every mistake at once.

Values come in this order, later wins: the tool's profile < its files in order < its command line < our own options. What the
API's rules say about the result is told in the words of the user's own file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.names import KIND, MAX_NAME_LENGTH, NAME_PATTERN
from finetune_api.rules import OPTIMIZERS_FOR_SHARDED_WEIGHTS, Problem, check
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import DatasetFormat, MethodType, Strategy, TrainerType
from finetune_api.support import unsupported_fields
from pydantic import ValidationError

from finetune_cli.files import Unreadable, read_text
from finetune_cli.hiding import HIDDEN, looks_secret
from finetune_cli.importers.convert import Unfit, nearest
from finetune_cli.importers.material import (
    SECRET_WORD,
    Assigned,
    Document,
    Draft,
    Entry,
    Fill,
    Given,
    Importer,
    Mistake,
    Refused,
    Request,
    Row,
)
from finetune_cli.importers.prune import prune
from finetune_cli.importers.yaml_tree import parse, parse_json
from finetune_cli.shapes import Misshapen, inside, misshapen, path_of, unreadable


@dataclass(frozen=True)
class Imported:
    """A FineTuneJob that came out of files, with the story of every value."""

    importer: Importer
    name: str
    namespace: str | None
    spec: dict[str, Any]
    assigned: dict[str, Assigned]
    secret_name: str
    secrets: dict[str, str]
    config_maps: dict[str, dict[str, str]]
    annotations: dict[str, str]
    warnings: list[str]
    notes: list[str]


def run(request: Request, importers: dict[str, Importer]) -> Imported:
    """Import the files of a request. Raises Refused with all mistakes, whose texts hold no secret."""
    _check_namespace(request)
    documents = load(request.files)
    importer = choose(documents, request, importers)
    draft = Draft(request, importer.rows, job_name(request, documents), documents)
    take(importer, draft)
    demand(draft)
    importer.combine(draft)
    _fill(importer, draft)
    _ours(draft)
    prune(draft)
    spec = settle(draft)
    _refuse_secrets(draft)
    if draft.mistakes:
        raise Refused([_safe(draft, mistake) for mistake in dict.fromkeys(draft.mistakes)])
    return Imported(
        importer, draft.name, request.namespace, spec, draft.values, draft.secret_name, draft.secrets, draft.config_maps,
        draft.annotations, [draft.safe(one) for one in draft.warnings], [draft.safe(one) for one in draft.notes],
    )  # fmt: skip


def _fill(importer: Importer, draft: Draft) -> None:
    """The profile, where the files are silent; on a CPU without what only a GPU can do, with FSDP without what it cannot."""
    left_out: dict[str, list[str]] = {}
    for fill in importer.profile:
        if not fill.when(draft):
            continue
        reason = _unfit(fill, draft)
        if reason is None:
            draft.fill(fill.path, fill.value, fill.origin)
        elif not draft.has(fill.path):
            left_out.setdefault(reason, []).append(f"{fill.path} {fill.value}")
    for reason, fills in left_out.items():
        draft.note(f"{reason}, so our defaults stand in for {', '.join(fills)}")


def _unfit(fill: Fill, draft: Draft) -> str | None:
    """Why a value of the profile cannot stand in this job; None: it can."""
    if fill.gpu and draft.value("resources.gpusPerNode") == 0:
        return "the job asks for no GPU"
    optimizer = fill.value if fill.path == "training.optimizer" else None
    if optimizer not in (None, *OPTIMIZERS_FOR_SHARDED_WEIGHTS) and draft.value("distributed.strategy") == Strategy.FSDP:
        return "FSDP cannot use the optimizer of that tool"
    return None


def _ours(draft: Draft) -> None:
    """Our own options win; a null takes away what the files said, a group with all that is in it."""
    for path, assigned in draft.request.own.items():
        for known in [one for one in draft.values if inside(one, path)]:
            del draft.values[known]
        if assigned.value is not None:
            draft.values[path] = assigned


def _refuse_secrets(draft: Draft) -> None:
    """Everybody who may read the job reads its fields: what looks like a secret stays out of them, wherever it came from."""
    hint = "take it out; a Secret is named with model.tokenSecretRef, or in placement.env with secretKeyRef"
    told = {one.key for one in draft.mistakes}
    for path, assigned in draft.values.items():
        key = assigned.key or f"spec.{path}"
        if looks_secret(assigned.value) and key not in told:
            draft.mistakes.append(Mistake(assigned.origin.place, key, "it looks like a token or password", hint))
    for key, value in draft.annotations.items():
        if looks_secret(value):
            draft.mistakes.append(Mistake(draft.where, key, "it looks like a token or password", "take it out"))


def _safe(draft: Draft, mistake: Mistake) -> Mistake:
    return Mistake(mistake.place, draft.safe(mistake.key), draft.safe(mistake.message), draft.safe(mistake.hint))


# --- files ----------------------------------------------------------------------------------------------------------


def load(files: Iterable[Path]) -> tuple[Document, ...]:
    """Read all files; a folder is taken as it is. Raises Refused for what cannot be read."""
    mistakes: list[Mistake] = []
    documents: list[Document] = []
    for path in files:
        if path.is_dir():
            documents.append(Document(path, "", folder=True))
            continue
        try:
            documents.append(Document(path, read_text(path)))
        except Unreadable as unreadable:
            mistakes.append(unreadable.mistake)
    mistakes += [Mistake(one.name, "", "it is empty") for one in documents if not one.folder and not one.text.strip()]
    if mistakes:
        raise Refused(mistakes)
    return tuple(documents)


def choose(documents: tuple[Document, ...], request: Request, importers: dict[str, Importer]) -> Importer:
    """The importer that was asked for, or the only one that recognises the files."""
    known = ", ".join(importers)
    if request.source is not None:
        if request.source not in importers:
            raise Refused([Mistake("--from", request.source, "is not a source known here", f"write one of {known}")])
        return importers[request.source]
    if not documents and not request.words:
        raise Refused(
            [
                Mistake(
                    "command line",
                    "FILE",
                    "no file is named",
                    "name a file, a folder or, after --, the tool's own command",
                )
            ]
        )
    found = [one for one in importers.values() if one.recognise(documents, request.words)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(document.name for document in documents) or "the command"
    if not found:
        _syntax(documents)
        raise Refused(
            [
                Mistake(
                    names,
                    "",
                    "it is not recognised as the configuration of any tool known here",
                    f"say which with --from {known}",
                )
            ]
        )
    fits = ", ".join(one.name for one in found)
    raise Refused(
        [
            Mistake(
                names,
                "",
                f"it fits several tools: {fits}",
                f"say which with --from {'|'.join(one.name for one in found)}",
            )
        ]
    )


def _syntax(documents: tuple[Document, ...]) -> None:
    """A YAML or JSON file that nothing recognises may only be broken. Raises Refused."""
    for document in documents:
        if document.path.suffix.lower() in (".yaml", ".yml"):
            found = parse(document)
            if found.value.get("kind") == KIND:
                hint = "check it with `finetune validate`, send it with `finetune submit`"
                raise Refused([Mistake(document.name, "", f"it is a {KIND} already", hint)])
        if document.path.suffix.lower() == ".json":
            parse_json(document)


def job_name(request: Request, documents: tuple[Document, ...]) -> str:
    """Name of the FineTuneJob: given, or made from the first file's name."""
    if request.name is not None:
        if not re.match(NAME_PATTERN, request.name) or len(request.name) > MAX_NAME_LENGTH:
            raise Refused([
                Mistake(
                    "--name", request.name, "cannot be the name of a FineTuneJob",
                    f"write a-z, 0-9 and -, a letter first, at most {MAX_NAME_LENGTH} characters",
                )
            ])  # fmt: skip
        return request.name
    stem = next((d.path.resolve().name if d.folder else d.path.stem or d.path.name for d in documents), "")
    return slug(stem) or "imported"


def _check_namespace(request: Request) -> None:
    if request.namespace is not None and not re.match(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", request.namespace):
        hint = "write a-z, 0-9 and -, at most 63 characters"
        raise Refused([Mistake("--namespace", request.namespace, "cannot be the name of a namespace", hint)])


def slug(text: str) -> str:
    """A name that Kubernetes and the API allow, as near to the text as can be; empty if nothing is left."""
    found = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-").lstrip("0123456789-")
    return found[:MAX_NAME_LENGTH].strip("-")


# --- from entries to values -----------------------------------------------------------------------------------------


COMMAND_LINE = "command line"
"""How the place of a flag begins; later flags win, as every parser of flags does it."""


def take(importer: Importer, draft: Draft) -> None:
    """Look every entry up in the table and convert it; a later entry of the same key wins."""
    by_key = {importer.key_of(spelling): row for row in importer.rows for spelling in (row.key, *row.aliases)}
    last: dict[str, tuple[Row, Entry]] = {}
    for entry in importer.read(draft):
        row = by_key.get(importer.key_of(entry.key))
        if row is None:
            _unknown(importer, draft, entry)
            continue
        if row.secret:
            draft.hide(entry.value)
        if row.key in last and not row.inert and not _takes_over(draft, row, last[row.key][1], entry):
            continue
        last[row.key] = (row, entry)
    for row, entry in last.values():
        _convert(row, entry, draft)


def _takes_over(draft: Draft, row: Row, first: Entry, second: Entry) -> bool:
    """Whether a later entry wins. Two spellings of one option in one file are no order that anybody means: if their values differ, a mistake."""
    if first.key == second.key or _file(first) != _file(second):
        return True
    if first.origin.place.startswith(COMMAND_LINE):
        draft.note(f"{second.origin.place}: {second.key} wins over {first.key}")
        return True
    if _open(second.value) or str(first.value) == str(second.value):
        return False
    if not _open(first.value):
        draft.broken[row.key] = row.path
        places = ", ".join(dict.fromkeys((first.origin.place, second.origin.place)))
        values = f"{HIDDEN} and {HIDDEN}" if row.secret else f"{_shown(first.value)} and {_shown(second.value)}"
        draft.mistakes.append(
            Mistake(places, f"{first.key}, {second.key}", f"{values} are given for one thing", "keep one of them")
        )
    return True


def _file(entry: Entry) -> str:
    """The file of an entry, without the line."""
    return re.sub(r":\d+$", "", entry.origin.place)


def _open(value: Any) -> bool:
    """Whether a value leaves the choice to another spelling."""
    return absent(value) or value == "auto"


def _unknown(importer: Importer, draft: Draft, entry: Entry) -> None:
    """An unknown key; a group where one value is wanted, and the other way round, are told as what they are."""
    if SECRET_WORD.search(entry.key):
        draft.hide(entry.value)
    known = [key for row in importer.rows for key in (row.key, *row.aliases)]
    inner = next((one for one in known if one.startswith(f"{entry.key}.")), None)
    outer = next((one for one in known if entry.key.startswith(f"{one}.")), None)
    if inner is not None:
        message, hint = "it is a group of options, and one value is given", f"write {inner} and its like"
    elif outer is not None:
        message, hint = "unknown key", f"{outer} is one value, and no group"
    else:
        near = nearest(entry.key, known)
        message, hint = (
            "unknown key",
            f"did you mean {near}?" if near else f"it is not an option of {importer.title}; remove it",
        )
    draft.mistakes.append(Mistake(entry.origin.place, entry.key, message, hint))


def absent(value: Any) -> bool:
    """Whether a value says that there is none."""
    return value is None or (isinstance(value, str) and value.strip() in ("", "null", "~"))


def _convert(row: Row, entry: Entry, draft: Draft) -> None:
    if row.empty_is_absent and absent(entry.value):
        if row.required:
            draft.broken[row.key] = row.path
            draft.mistakes.append(Mistake(entry.origin.place, entry.key, "it is empty, and it is required"))
        return
    if row.inert:
        draft.warn(f"{entry.origin.place}: {entry.key} has no effect: {row.inert}")
        return
    try:
        value = row.convert(entry.value)
    except Unfit as unfit:
        draft.broken[row.key] = row.path
        shown = HIDDEN if row.secret else _shown(entry.value)
        hint = f"allowed: {unfit.allowed}" + (f"; did you mean {unfit.near}?" if unfit.near else "")
        draft.mistakes.append(Mistake(entry.origin.place, entry.key, f"{shown} {unfit.what}", hint))
        return
    draft.given[row.key] = Given(row, entry.key, value, entry.value, entry.origin)
    if row.path and not row.manual and value is not None:
        draft.put(row.path, value, row.key)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 80 else f'"{value[:77]}..."'
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if not isinstance(value, dict | list) or len(str(value)) <= 80 else "it"


def demand(draft: Draft) -> None:
    """Every required key must be there, unless our own options set what it stands for."""
    for row in draft.rows:
        if row.required and not draft.wrote(row.key) and row.path not in draft.request.own:
            draft.broken[row.key] = row.path
            option = {"model.source": "--model", "dataset.train": "--data"}.get(row.path)
            draft.mistakes.append(
                Mistake(
                    draft.where,
                    row.key,
                    "it is missing, and it is required",
                    f"add it, or give {option} URI" if option else "add it",
                )
            )


# --- the API's own checks, told in the file's words -------------------------------------------------------------------


def nest(values: dict[str, Assigned]) -> dict[str, Any]:
    """Dotted paths to nested groups."""
    spec: dict[str, Any] = {}
    for path, assigned in values.items():
        group = spec
        *groups, last = path.split(".")
        for one in groups:
            group = group.setdefault(one, {})
        group[last] = assigned.value
    return spec


def settle(draft: Draft) -> dict[str, Any]:
    """Check the spec with the API's models and rules; returns it nested, wire names."""
    values = dict(draft.values)
    told: list[Misshapen] = []
    for _ in range(3):
        try:
            spec = FineTuneJobSpec.model_validate(nest(values))
            break
        except ValidationError as error:
            found = list(misshapen(error, told))
            told += found
            for wrong in found:
                draft.broken[wrong.path] = wrong.path
                draft.mistakes.append(_told(draft, Problem(wrong.path, "Shape", wrong.message, wrong.hint)))
            for location in map(path_of, unreadable(error)):
                for known in [one for one in values if inside(location, one) or inside(one, location)]:
                    del values[known]
    else:
        return nest(values)
    for problem in _problems(spec, draft):
        _judge(problem, draft)
    if not draft.mistakes:
        for missing in unsupported_fields(spec):
            draft.warn(f"spec.{missing.path}: {missing.message}; {missing.hint}")
    return nest(draft.values)


PIVOTS: dict[str, tuple[str, ...]] = {
    "method.type": tuple(MethodType),
    "trainer.type": tuple(TrainerType),
    "dataset.format": tuple(DatasetFormat),
    "distributed.strategy": tuple(Strategy),
}
"""Paths that decide what other fields mean. If one could not be read, only problems that stand for all its values are told."""


def _problems(spec: FineTuneJobSpec, draft: Draft) -> list[Problem]:
    """What the rules say, without what only follows from a value that could not be read."""
    broken = [path for path in draft.broken.values() if path]
    problems = check(spec)
    for path in broken:
        if path in PIVOTS:
            group, field = path.split(".")
            for value in PIVOTS[path]:
                changed = spec.to_wire()
                changed.setdefault(group, {})[field] = value
                still = {(one.path, one.code) for one in check(FineTuneJobSpec.model_validate(changed))}
                problems = [one for one in problems if (one.path, one.code) in still]
    return [one for one in problems if not any(inside(one.path, path) or inside(path, one.path) for path in broken)]


def _judge(problem: Problem, draft: Draft) -> None:
    """A problem is a mistake of the file, unless it is one that is mended beside the file: then it is a warning."""
    told = _told(draft, problem)
    relative = problem.code == "SourceInvalid" and str(draft.value(problem.path, "")).startswith("file://")
    missing_data = problem.code == "DatasetMissing" and problem.path == "dataset.train"
    another_machine = problem.path == "training.device" and draft.value("training.device") == "mps"
    if missing_data:
        if "dataset.train" not in draft.broken.values():
            draft.warn(
                f"{draft.where}: no training data is named, and a FineTuneJob needs it: add --data URI, or write dataset.train"
            )
    elif relative:
        return
    elif another_machine or problem.path in (
        "output.hub.tokenSecretRef",
        "tracking.wandb.apiKeySecretRef",
        "tracking.mongodb.uriSecretRef",
    ):
        draft.warn(f"{told} (the operator refuses the job until then)")
    elif problem.code == "ModelMissing":
        if "model.source" not in draft.broken.values():
            draft.mistakes.append(Mistake(draft.where, "", "no base model is named", "name it, or give --model URI"))
    else:
        draft.mistakes.append(told)


def _told(draft: Draft, problem: Problem) -> Mistake:
    """A problem at a spec path, told with the key and place that the value came from."""
    group, _, _ = problem.path.rpartition(".")
    assigned = _around(draft, problem.path) or (_around(draft, group) if "." in group else [])
    written = [one for one in assigned if one.key] or [one for one in assigned if one.origin.given]
    if not written:
        return Mistake(draft.where, f"spec.{problem.path}", problem.message, problem.hint)
    keys = ", ".join(dict.fromkeys(one.key or f"spec.{problem.path}" for one in written))
    places = ", ".join(dict.fromkeys(one.origin.place for one in written))
    return Mistake(
        places,
        keys,
        _as_written(draft, written[0]) + problem.message,
        f"{problem.hint} (spec.{problem.path})" if problem.hint else "",
    )


def _around(draft: Draft, path: str) -> list[Assigned]:
    """Values at, below and above a path."""
    return [
        one for known, one in draft.values.items() if inside(known, path) or path.startswith((known + ".", known + "["))
    ]


def _as_written(draft: Draft, assigned: Assigned) -> str:
    """The user's own word where the spec has another one for it."""
    given = next((one for one in draft.given.values() if one.key == assigned.key), None)
    if given is None or not isinstance(given.raw, str) or given.row.secret or given.raw == str(assigned.value):
        return ""
    return f'"{given.raw}" is ' if isinstance(assigned.value, str) and not given.raw.startswith(("/", ".")) else ""


__all__ = ["Imported", "Refused", "Request", "run", "slug"]
