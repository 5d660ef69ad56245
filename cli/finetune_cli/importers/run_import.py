"""Runs an import: precedence, conversion, defaults, checks, and the report of all mistakes at once.

Precedence, from lowest to highest: the tool's defaults, its files in their order, its command line, the options of `finetune import`. The rules of
the FineTuneJob API check the result. A problem is reported with the key and location in the user's own file, instead of the field of the FineTuneJob.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_api.names import KIND, MAX_NAME_LENGTH, NAME_PATTERN
from finetune_api.rules import OPTIMIZERS_FOR_SHARDED_WEIGHTS, Problem, check_spec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import DatasetFormat, MethodType, StrategyType, TrainerType
from finetune_api.support import find_unsupported_fields
from pydantic import ValidationError

from finetune_cli.field_errors import (
    FieldError,
    find_locations_to_remove,
    is_within,
    iterate_field_errors,
    to_dotted_path,
)
from finetune_cli.files import UnreadableFile, read_text
from finetune_cli.importers.converters import ConversionError
from finetune_cli.importers.documents import parse_document, parse_json
from finetune_cli.importers.draft import (
    NEUTRAL_VALUES,
    GivenOption,
    Importer,
    InputDocument,
    JobDraft,
    OptionEntry,
    OptionRow,
    Request,
    ToolDefault,
)
from finetune_cli.importers.no_effect import remove_options_without_effect
from finetune_cli.importers.options import assign_secret_reference
from finetune_cli.importers.other_tools import describe_fields, find_other_tool
from finetune_cli.mistakes import InvalidInput, Mistake
from finetune_cli.overrides import make_hint_for_option
from finetune_cli.provenance import AssignedValue
from finetune_cli.redaction import REDACTED_TEXT, SECRET_NAME_PATTERN, contains_secret
from finetune_cli.suggestions import find_closest_name


@dataclass(frozen=True)
class ImportResult:
    """The result of an import: the FineTuneJob, the origin of each of its values, the objects that it needs, and the messages to the user."""

    importer: Importer
    name: str
    namespace: str | None
    spec: dict[str, Any]
    assigned_values: dict[str, AssignedValue]
    secret_name: str
    secrets: dict[str, str]
    config_maps: dict[str, dict[str, str]]
    annotations: dict[str, str]
    warnings: list[str]
    notes: list[str]
    reasons: dict[str, str]
    """For each key of the user that sets no field: the reason why it sets none."""


def run_import(request: Request, importers: dict[str, Importer]) -> ImportResult:
    """Import the files of a request with the importer that they belong to. Raise InvalidInput with all mistakes, without secrets in their texts."""
    _check_namespace(request)
    documents = load_documents(request.files)
    importer = choose_importer(documents, request, importers)
    if importer.choose_variant is not None:
        importer = importer.choose_variant(documents)
    return import_documents(request, documents, importer)


def import_documents(request: Request, documents: tuple[InputDocument, ...], importer: Importer) -> ImportResult:
    """Import documents with this importer. Raise InvalidInput with all mistakes, without secrets in their texts."""
    draft = JobDraft(request, importer.option_table, choose_job_name(request, documents), documents)
    _read_options(importer, draft)
    _check_required(draft)
    importer.combine_options(draft)
    _check_benchmarks_option(draft)
    _apply_defaults(importer, draft)
    _apply_overrides(draft)
    remove_options_without_effect(draft)
    spec = _check_spec(draft, counts_problems_as_features=importer.reports_every_key)
    _refuse_secrets(draft)
    if importer.reports_every_key:
        _note_keys_without_field(draft)
    if draft.mistakes:
        raise InvalidInput([_redact_mistake(draft, mistake) for mistake in dict.fromkeys(draft.mistakes)])
    return ImportResult(
        importer, draft.name, request.namespace, spec, draft.values, draft.secret_name, draft.secrets, draft.config_maps,
        draft.annotations, [draft.redact_message(text) for text in draft.warnings], [draft.redact_message(text) for text in draft.notes],
        {key: draft.redact_message(reason) for key, reason in draft.reasons.items()},
    )  # fmt: skip


def _note_keys_without_field(draft: JobDraft) -> None:
    """Add one note for each reason why keys set no field. The note lists the keys that have this reason, except those that a warning already names."""
    warnings_text = " ".join(draft.warnings)
    keys_by_reason: dict[str, list[str]] = {}
    for key, reason in draft.reasons.items():
        if f" {key} " not in f" {warnings_text.replace(',', ' ').replace(':', ' ')} ":
            keys_by_reason.setdefault(reason, []).append(key)
    for reason, keys in keys_by_reason.items():
        draft.add_note(f"{', '.join(keys)}: {reason}")


def _check_benchmarks_option(draft: JobDraft) -> None:
    if draft.request.benchmarks is not None and not draft.has_value("evaluation.benchmarks"):
        draft.mistakes.append(
            Mistake("--benchmarks", draft.request.benchmarks, "the option has no effect, because the configuration names no benchmarks", "remove it")
        )


def _apply_defaults(importer: Importer, draft: JobDraft) -> None:
    """Apply the tool's defaults to fields without a value. A note lists the defaults that this job cannot use."""
    skipped_defaults_by_reason: dict[str, list[str]] = {}
    for default in importer.defaults:
        if not default.is_applicable(draft):
            continue
        reason = _explain_unusable_default(default, draft)
        if reason is None:
            draft.assign_default(default.path, default.value, default.origin)
        elif not draft.has_value(default.path):
            skipped_defaults_by_reason.setdefault(reason, []).append(f"{default.path} {default.value}")
    for reason, skipped_defaults in skipped_defaults_by_reason.items():
        draft.add_note(f"{reason}, so the defaults of FineTuneJob replace those of the tool: {', '.join(skipped_defaults)}")


def _explain_unusable_default(default: ToolDefault, draft: JobDraft) -> str | None:
    """Return the reason why this job cannot use a default of the tool, or None if it can."""
    if default.needs_gpu and draft.value("resources.gpusPerNode") == 0:
        return "the job uses no GPU"
    optimizer = default.value if default.path == "training.optimizer" else None
    if (
        optimizer not in (None, *OPTIMIZERS_FOR_SHARDED_WEIGHTS)
        and draft.value("distributed.strategy") == StrategyType.FSDP
    ):
        return "FSDP cannot use the default optimizer of the tool"
    return None


def _apply_overrides(draft: JobDraft) -> None:
    """Apply the overrides: the fields that options of `finetune import` set. An override with null removes a field or a whole group."""
    for path, assigned_value in draft.request.overrides.items():
        for overridden_path in [value_path for value_path in draft.values if is_within(value_path, path)]:
            del draft.values[overridden_path]
        if assigned_value.value is not None:
            draft.values[path] = assigned_value


def _refuse_secrets(draft: JobDraft) -> None:
    """Record a mistake for each value that looks like a secret, because everyone who may read the job can see its spec."""
    hint = "remove it; refer to a Secret with model.tokenSecretRef, or in placement.env with secretKeyRef"
    reported_keys = {mistake.key for mistake in draft.mistakes}
    for path, assigned_value in draft.values.items():
        key = assigned_value.key or f"spec.{path}"
        if contains_secret(assigned_value.value) and key not in reported_keys:
            draft.mistakes.append(
                Mistake(assigned_value.origin.location, key, "the value looks like a token or password", hint)
            )
    for key, value in draft.annotations.items():
        if contains_secret(value):
            draft.mistakes.append(Mistake(draft.location, key, "the value looks like a token or password", "remove it"))


def _redact_mistake(draft: JobDraft, mistake: Mistake) -> Mistake:
    return Mistake(
        mistake.location, draft.redact_message(mistake.key), draft.redact_message(mistake.message), draft.redact_message(mistake.hint), mistake.feature
    )


# --- files ----------------------------------------------------------------------------------------------------------


def load_documents(files: Iterable[Path]) -> tuple[InputDocument, ...]:
    """Read all files. A folder becomes an InputDocument without text, because the importer itself reads the folder's files.

    Raise InvalidInput for unreadable or empty files.
    """
    mistakes: list[Mistake] = []
    documents: list[InputDocument] = []
    for path in files:
        if path.is_dir():
            documents.append(InputDocument(path, "", is_folder=True))
            continue
        try:
            documents.append(InputDocument(path, read_text(path)))
        except UnreadableFile as error:
            mistakes.append(error.mistake)
    mistakes += [
        Mistake(document.name, "", "the file is empty")
        for document in documents
        if not document.is_folder and not document.text.strip()
    ]
    if mistakes:
        raise InvalidInput(mistakes)
    return tuple(documents)


def choose_importer(documents: tuple[InputDocument, ...], request: Request, importers: dict[str, Importer]) -> Importer:
    """Return the importer that `--from` names, or the only importer that recognises the files.

    Raise InvalidInput if no importer or more than one importer recognises them.
    """
    known_importer_names = ", ".join(importers)
    if request.source is not None:
        if request.source not in importers:
            raise InvalidInput(
                [Mistake("--from", request.source, "there is no importer with this name", f"write one of {known_importer_names}")]
            )
        return importers[request.source]
    if not documents and not request.tool_arguments:
        raise InvalidInput(
            [
                Mistake(
                    "command line",
                    "FILE",
                    "no file is given",
                    "give a file, a folder, or the tool's command line after --",
                )
            ]
        )
    matching_importers = [importer for importer in importers.values() if importer.recognises_input(documents, request.tool_arguments)]
    if len(matching_importers) == 1:
        return matching_importers[0]
    file_names = ", ".join(document.name for document in documents) or "command line"
    if not matching_importers:
        _check_syntax(documents)
        other_tool = find_other_tool(documents)
        if other_tool is not None:
            message = f"this is a configuration of {other_tool.title}, which has no importer"
            raise InvalidInput([Mistake(file_names, "", message, f"write a FineTuneJob: {describe_fields(other_tool)}")])
        raise InvalidInput(
            [
                Mistake(
                    file_names,
                    "",
                    "no importer recognises this configuration",
                    f"choose one with --from: {known_importer_names}",
                )
            ]
        )
    importer_names = ", ".join(importer.name for importer in matching_importers)
    raise InvalidInput(
        [
            Mistake(
                file_names,
                "",
                f"several importers recognise this configuration: {importer_names}",
                f"choose one with --from {'|'.join(importer.name for importer in matching_importers)}",
            )
        ]
    )


def _check_syntax(documents: tuple[InputDocument, ...]) -> None:
    """Explain why no importer recognises the files: raise InvalidInput if a file is invalid YAML or JSON, or is already a FineTuneJob."""
    for document in documents:
        if document.path.suffix.lower() in (".yaml", ".yml"):
            tree = parse_document(document)
            if tree.value.get("kind") == KIND:
                hint = "check it with `finetune validate`, or submit it with `finetune submit`"
                raise InvalidInput([Mistake(document.name, "", f"this is already a {KIND}", hint)])
        if document.path.suffix.lower() == ".json":
            parse_json(document)


def choose_job_name(request: Request, documents: tuple[InputDocument, ...]) -> str:
    """Return the name of the FineTuneJob, from `--name` or from the name of the first file. Raise InvalidInput if `--name` is invalid."""
    if request.name is not None:
        if not re.match(NAME_PATTERN, request.name) or len(request.name) > MAX_NAME_LENGTH:
            raise InvalidInput([
                Mistake(
                    "--name", request.name, "this cannot be the name of a FineTuneJob",
                    f"write at most {MAX_NAME_LENGTH} characters a-z, 0-9 and -, beginning with a letter",
                )
            ])  # fmt: skip
        return request.name
    stem = next((d.path.resolve().name if d.is_folder else d.path.stem or d.path.name for d in documents), "")
    return to_job_name(stem) or "imported"


def _check_namespace(request: Request) -> None:
    if request.namespace is not None and not re.match(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", request.namespace):
        hint = "write at most 63 characters a-z, 0-9 and -"
        raise InvalidInput([Mistake("--namespace", request.namespace, "this cannot be the name of a namespace", hint)])


def to_job_name(text: str) -> str:
    """Turn a text into a valid name of a FineTuneJob, or into an empty string if the text has no letter a-z."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-").lstrip("0123456789-")
    return name[:MAX_NAME_LENGTH].strip("-")


# --- from entries to values -----------------------------------------------------------------------------------------


COMMAND_LINE_LOCATION = "command line"
"""If an option comes from a flag of the command line, its location begins with this text."""


def _read_options(importer: Importer, draft: JobDraft) -> None:
    """Convert each entry by the `OptionRow` of its key. A later entry overrides an earlier entry of the same option."""
    option_row_by_key = {importer.normalise_key(spelling): option_row for option_row in importer.option_table for spelling in (option_row.key,
        *option_row.aliases)}
    last_entry_by_key: dict[str, tuple[OptionRow, OptionEntry]] = {}
    for entry in importer.read_options(draft):
        option_row = option_row_by_key.get(importer.normalise_key(entry.key))
        if option_row is None:
            _report_unknown_option(importer, draft, entry)
            continue
        if importer.reports_every_key and is_absent(entry.value):
            draft.add_reason(entry.key, "has no value, so it is not set")
        if option_row.is_secret:
            draft.redact_in_messages(entry.value)
        if option_row.key in last_entry_by_key and not option_row.no_effect_reason:
            _, earlier_entry = last_entry_by_key[option_row.key]
            if not _overrides_earlier(draft, option_row, earlier_entry, entry):
                continue
        last_entry_by_key[option_row.key] = (option_row, entry)
    for option_row, entry in last_entry_by_key.values():
        _convert_entry(option_row, entry, draft, adds_reason=importer.reports_every_key)


def _overrides_earlier(draft: JobDraft, option_row: OptionRow, first_entry: OptionEntry, second_entry: OptionEntry) -> bool:
    """Return whether the later of two entries for the same option overrides the earlier entry.

    Record a mistake if one file has two spellings of the option with different values, because the order in a file has no meaning.
    """
    if first_entry.key == second_entry.key or _strip_line_number(first_entry) != _strip_line_number(second_entry):
        return True
    if first_entry.origin.location.startswith(COMMAND_LINE_LOCATION):
        draft.add_note(f"{second_entry.origin.location}: {second_entry.key} overrides {first_entry.key}")
        return True
    if _is_unset(second_entry.value) or str(first_entry.value) == str(second_entry.value):
        return False
    if not _is_unset(first_entry.value):
        draft.paths_of_invalid_keys[option_row.key] = option_row.path
        locations = ", ".join(dict.fromkeys((first_entry.origin.location, second_entry.origin.location)))
        shown_values = (
            f"{REDACTED_TEXT} and {REDACTED_TEXT}"
            if option_row.is_secret
            else f"{_format_value(first_entry.value)} and {_format_value(second_entry.value)}"
        )
        draft.mistakes.append(
            Mistake(
                locations, f"{first_entry.key}, {second_entry.key}", f"{shown_values} are given for the same option", "keep one of them"
            )
        )
    return True


def _strip_line_number(entry: OptionEntry) -> str:
    """Return the location of an entry without the line number: a file name, or the command line."""
    return re.sub(r":\d+$", "", entry.origin.location)


def _is_unset(value: Any) -> bool:
    """Return whether a value is absent or `auto`. In this case, the value of another spelling of the option is used."""
    return is_absent(value) or value == "auto"


TYPING_ERROR_SIMILARITY = 0.86
"""Similarity to a known key, from 0 to 1, above which an unknown key is refused as a typing error even if the tool ignores unknown keys."""


def _report_unknown_option(importer: Importer, draft: JobDraft, entry: OptionEntry) -> None:
    """Record a mistake about an unknown key, or a warning if the tool ignores unknown keys.

    If the key names a group of options but has a single value, or the reverse, the message says so.
    """
    if SECRET_NAME_PATTERN.search(entry.key):
        draft.redact_in_messages(entry.value)
    known_keys = [key for option_row in importer.option_table for key in (option_row.key, *option_row.aliases)]
    if importer.ignores_unknown_keys and is_absent(entry.value):
        draft.add_reason(entry.key, "has no value, so it is not set")
        return
    if importer.ignores_unknown_keys and not difflib.get_close_matches(entry.key, known_keys, 1, TYPING_ERROR_SIMILARITY):
        draft.add_reason(entry.key, "the tool does not know this key and ignores it")
        draft.add_warning(f"{entry.origin.location}: {entry.key}: {importer.title} does not know this key and ignores it, so the import ignores it, too")
        return
    option_in_group = next((key for key in known_keys if key.startswith(f"{entry.key}.")), None)
    enclosing_option = next((key for key in known_keys if entry.key.startswith(f"{key}.")), None)
    if option_in_group is not None:
        message, hint = (
            "the key is a group of options, but a single value is given",
            f"write its options, for example {option_in_group}",
        )
    elif enclosing_option is not None:
        message, hint = "unknown key", f"{enclosing_option} takes a single value and is not a group"
    else:
        closest_key = find_closest_name(entry.key, known_keys)
        message = "unknown key"
        hint = f"did you mean {closest_key}?" if closest_key else f"it is not an option of {importer.title}; remove it"
    draft.mistakes.append(Mistake(entry.origin.location, entry.key, message, hint))


def is_absent(value: Any) -> bool:
    """Return whether a value means that the option is not set."""
    return value is None or (isinstance(value, str) and value.strip() in ("", "null", "~"))


def _convert_entry(option_row: OptionRow, entry: OptionEntry, draft: JobDraft, *, adds_reason: bool = False) -> None:
    if option_row.empty_is_absent and is_absent(entry.value):
        if option_row.is_required:
            draft.paths_of_invalid_keys[option_row.key] = option_row.path
            draft.mistakes.append(Mistake(entry.origin.location, entry.key, "this required option is empty"))
        return
    if option_row.missing_feature:
        _refuse_unless_neutral(option_row, entry, draft)
        return
    if option_row.no_effect_reason and adds_reason:
        draft.add_reason(entry.key, f"no effect: {option_row.no_effect_reason}")
        return
    if option_row.no_effect_reason:
        draft.add_warning(f"{entry.origin.location}: {entry.key} has no effect: {option_row.no_effect_reason}")
        return
    try:
        value = option_row.convert(entry.value)
    except ConversionError as error:
        draft.paths_of_invalid_keys[option_row.key] = option_row.path
        shown_value = REDACTED_TEXT if option_row.is_secret else _format_value(entry.value)
        hint = f"allowed: {error.allowed}" + (f"; did you mean {error.closest}?" if error.closest else "")
        draft.mistakes.append(Mistake(entry.origin.location, entry.key, f"{shown_value} {error.problem}", hint))
        return
    draft.given_options[option_row.key] = GivenOption(option_row, entry.key, value, entry.value, entry.origin)
    if option_row.path and not option_row.is_set_by_combine and value is not None:
        draft.assign(option_row.path, value, option_row.key)


def _refuse_unless_neutral(option_row: OptionRow, entry: OptionEntry, draft: JobDraft) -> None:
    """Refuse an option whose feature a FineTuneJob does not have, unless its value turns the feature off."""
    if any(entry.value == value and isinstance(entry.value, bool) is isinstance(value, bool) for value in (*NEUTRAL_VALUES, *option_row.neutral_values)):
        draft.add_reason(entry.key, f"no effect: this value turns off a feature that a FineTuneJob does not support: {option_row.missing_feature}")
    else:
        draft.refuse_feature_at(entry.origin.location, entry.key, option_row.missing_feature, option_row.hint)


def _format_value(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 80 else f'"{value[:77]}..."'
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if not isinstance(value, dict | list) or len(str(value)) <= 80 else "the value"


def _check_required(draft: JobDraft) -> None:
    """Record a mistake for each required option that is missing, unless an override sets its field."""
    for option_row in draft.option_table:
        if option_row.is_required and not draft.has_key(option_row.key) and option_row.path not in draft.request.overrides:
            draft.paths_of_invalid_keys[option_row.key] = option_row.path
            option = {"model.source": "--model", "dataset.train": "--data"}.get(option_row.path)
            draft.mistakes.append(
                Mistake(
                    draft.location,
                    option_row.key,
                    "this required option is missing",
                    f"add it, or give {option} URI" if option else "add it",
                )
            )


# --- checks with the API's models and rules -------------------------------------------------------------------------


def nest_values(values: dict[str, AssignedValue]) -> dict[str, Any]:
    """Turn values at dotted paths into a nested spec."""
    spec: dict[str, Any] = {}
    for path, assigned_value in values.items():
        enclosing_group = spec
        *groups, field_name = path.split(".")
        for name in groups:
            enclosing_group = enclosing_group.setdefault(name, {})
        enclosing_group[field_name] = assigned_value.value
    return spec


def _check_spec(draft: JobDraft, *, counts_problems_as_features: bool = False) -> dict[str, Any]:
    """Check the values of the draft with the API's models and rules, and return them as a nested spec.

    The tool may accept values that break a rule of the API. `counts_problems_as_features`: whether a broken rule is reported as a feature that a
    FineTuneJob does not have.
    """
    valid_values = dict(draft.values)
    reported_errors: list[FieldError] = []
    for _ in range(3):
        try:
            spec = FineTuneJobSpec.model_validate(nest_values(valid_values))
            break
        except ValidationError as error:
            new_errors = list(iterate_field_errors(error, reported_errors))
            reported_errors += new_errors
            for field_error in new_errors:
                draft.paths_of_invalid_keys[field_error.path] = field_error.path
                draft.mistakes.append(
                    _to_mistake(
                        draft, Problem(field_error.path, "Shape", field_error.message, field_error.hint)
                    )
                )
            for path_to_remove in map(to_dotted_path, find_locations_to_remove(error)):
                for invalid_path in [
                    value_path
                    for value_path in valid_values
                    if is_within(path_to_remove, value_path) or is_within(value_path, path_to_remove)
                ]:
                    del valid_values[invalid_path]
    else:
        return nest_values(valid_values)
    for problem in _find_problems(spec, draft):
        _record_problem(problem, draft, is_missing_feature=counts_problems_as_features)
    if not draft.mistakes:
        for unsupported_field in find_unsupported_fields(spec):
            if draft.request.drop_unsupported:
                _drop_field(draft, unsupported_field)
            else:
                draft.add_warning(f"spec.{unsupported_field.path}: {unsupported_field.message}; {unsupported_field.hint}")
    return nest_values(draft.values)


def _drop_field(draft: JobDraft, problem: Problem) -> None:
    """Leave out a field that this release does not implement. If the field is a list and one of its items is not implemented, leave out this item."""
    assigned_value = draft.values.get(problem.path)
    list_item = problem.message.removeprefix("contains ").partition(",")[0]
    if assigned_value is not None and isinstance(assigned_value.value, list) and list_item in assigned_value.value and len(assigned_value.value) > 1:
        draft.values[problem.path] = replace(assigned_value, value=[value for value in assigned_value.value if value != list_item])
        draft.add_warning(f"{assigned_value.origin.location}: {assigned_value.key or problem.path}: {list_item} is left out: {problem.message}")
        return
    for path in [path for path in draft.values if is_within(path, problem.path)]:
        removed_value = draft.values.pop(path)
        draft.add_warning(f"{removed_value.origin.location}: {removed_value.key or path} is left out: spec.{problem.path} {problem.message}")


DISCRIMINATOR_VALUES: dict[str, tuple[str, ...]] = {
    "method.type": tuple(MethodType),
    "trainer.type": tuple(TrainerType),
    "dataset.format": tuple(DatasetFormat),
    "distributed.strategy": tuple(StrategyType),
}
"""The allowed values of each field that decides which other fields are allowed.

If the user's value of such a field is invalid, a problem in the other fields is reported only if it would occur with every allowed value.
"""


def _find_problems(spec: FineTuneJobSpec, draft: JobDraft) -> list[Problem]:
    """Return the problems that the rules find.

    If the only cause of a problem is an invalid value, and the invalid value is already reported, the problem is left out.
    """
    invalid_paths = [path for path in draft.paths_of_invalid_keys.values() if path]
    problems = check_spec(spec)
    for path in invalid_paths:
        if path in DISCRIMINATOR_VALUES:
            enclosing_group, field = path.split(".")
            for value in DISCRIMINATOR_VALUES[path]:
                changed_spec = spec.to_wire()
                changed_spec.setdefault(enclosing_group, {})[field] = value
                remaining_problems = {(problem.path, problem.code) for problem in check_spec(FineTuneJobSpec.model_validate(changed_spec))}
                problems = [problem for problem in problems if (problem.path, problem.code) in remaining_problems]
    return [
        problem
        for problem in problems
        if not any(is_within(problem.path, path) or is_within(path, problem.path) for path in invalid_paths)
    ]


SECRETS_TO_CREATE = {
    "output.hub.tokenSecretRef": ("hub", "pushing the model to the hub"),
    "tracking.wandb.apiKeySecretRef": ("wandb", "reporting to wandb"),
    "tracking.mongodb.uriSecretRef": ("mongodb", "reporting to MongoDB"),
}
"""For each field that refers to a Secret of the user: the end of the Secret's name, and the feature that needs the Secret."""


def _record_problem(problem: Problem, draft: JobDraft, *, is_missing_feature: bool) -> None:
    """Record a problem as a mistake or, if the user can correct it in the printed manifest, as a warning.

    `is_missing_feature`: whether a mistake also names the problem as a feature that a FineTuneJob does not have.
    """
    mistake = _to_mistake(draft, problem)
    is_local_file = problem.code == "SourceInvalid" and str(draft.value(problem.path, "")).startswith("file://")
    is_missing_data = problem.code == "DatasetMissing" and problem.path == "dataset.train"
    is_device_of_another_machine = problem.path == "training.device" and draft.value("training.device") == "mps"
    if is_missing_data:
        if "dataset.train" not in draft.paths_of_invalid_keys.values():
            draft.add_warning(
                f"{draft.location}: the configuration names no training data: give --data URI, or set dataset.train in the manifest"
            )
    elif problem.code == "BenchmarkFolderMissing":
        draft.add_warning(f"{draft.location}: {problem.message}: give --benchmarks URI, or remove the benchmark from the manifest")
    elif is_local_file:
        return
    elif problem.path in SECRETS_TO_CREATE:
        assign_secret_reference(draft, problem.path, *SECRETS_TO_CREATE[problem.path])
    elif is_device_of_another_machine or problem.code == "CodeExecutionNotAllowed":
        draft.add_warning(f"{mistake} (the operator refuses the job until this is corrected)")
    elif problem.code == "ModelMissing":
        if "model.source" not in draft.paths_of_invalid_keys.values():
            draft.mistakes.append(Mistake(draft.location, "", "no base model is given", "add it, or give --model URI"))
    else:
        draft.mistakes.append(replace(mistake, feature=problem.message) if is_missing_feature else mistake)


CONFLICT_BY_PROBLEM: dict[tuple[str, str], tuple[tuple[str, str], str]] = {
    ("WarmupTwice", "training.warmupRatio"): (("training.warmupSteps", "training.warmupRatio"), "both set the warm-up"),
    ("BestNeedsMatchingSteps", "checkpoint.steps"): (
        ("checkpoint.steps", "evaluation.steps"),
        "the first is not a multiple of the second, but the best checkpoint can only be found if every checkpoint is evaluated",
    ),
}
"""For each error code and field of a problem: the two fields that contradict each other, and a text about the contradiction."""


def _to_conflict_mistake(draft: JobDraft, problem: Problem) -> Mistake | None:
    """Return the mistake for two fields that contradict each other, with both keys and values as in the user's files, or None for any other problem."""
    if problem.code == "HubRepositoryMissing" and problem.path == "output.hub.repository":
        push_value = draft.values.get("output.hub.push")
        option_row = next((option_row for option_row in draft.option_table if option_row.path == problem.path), None)
        if push_value is not None and push_value.key and option_row is not None:
            message = f"{push_value.key} is true, but {option_row.key} is missing"
            return Mistake(push_value.origin.location, push_value.key, message, f"write {option_row.key}: org/name")
    paths, contradiction = CONFLICT_BY_PROBLEM.get((problem.code, problem.path), ((), ""))
    conflicting_values = [(path, draft.values[path]) for path in paths if path in draft.values]
    if len(conflicting_values) < 2 or not all(value.key for _, value in conflicting_values):
        return None
    shown_values = " and ".join(f"{value.key} {value.value}" for _, value in conflicting_values)
    locations = ", ".join(dict.fromkeys(value.origin.location for _, value in conflicting_values))
    hint = "remove one of them" if problem.code == "WarmupTwice" else problem.hint
    return Mistake(locations, ", ".join(value.key for _, value in conflicting_values), f"{shown_values}: {contradiction}", hint)


def _to_mistake(draft: JobDraft, problem: Problem) -> Mistake:
    """Return the mistake for a problem at a spec path, with the key and location of the value in the user's files."""
    conflict = _to_conflict_mistake(draft, problem)
    if conflict is not None:
        return conflict
    enclosing_group, _, _ = problem.path.rpartition(".")
    assigned_values = _find_values_around(draft, problem.path) or (_find_values_around(draft, enclosing_group) if "." in enclosing_group else [])
    written_values = [value for value in assigned_values if value.key] or [
        value for value in assigned_values if value.origin.written_by_user
    ]
    if not written_values:
        return Mistake(draft.location, f"spec.{problem.path}", problem.message, problem.hint)
    keys = ", ".join(dict.fromkeys(value.key or f"spec.{problem.path}" for value in written_values))
    locations = ", ".join(dict.fromkeys(value.origin.location for value in written_values))
    override = draft.request.overrides.get(problem.path.partition("[")[0])
    hint = make_hint_for_option(problem.hint, override.origin.location, problem.path) if override else problem.hint
    message = _quote_user_spelling(draft, written_values[0]) + problem.message
    return Mistake(locations, keys, message, f"{hint} (spec.{problem.path})" if hint else "")


def _find_values_around(draft: JobDraft, spec_path: str) -> list[AssignedValue]:
    """Return the assigned values that belong to a path.

    These are the value at the path, the values of the fields below it, and the values of the groups that contain it.
    """
    return [
        assigned_value
        for value_path, assigned_value in draft.values.items()
        if is_within(value_path, spec_path) or spec_path.startswith((value_path + ".", value_path + "["))
    ]


def _quote_user_spelling(draft: JobDraft, assigned_value: AssignedValue) -> str:
    """If the spec spells a value differently from the user's file, return `"VALUE" is ` with the spelling of the user. Otherwise return an empty string."""
    given_option = next((option for option in draft.given_options.values() if option.key == assigned_value.key), None)
    if given_option is None or not isinstance(given_option.raw_value,
        str) or given_option.option_row.is_secret or given_option.raw_value == str(assigned_value.value):
        return ""
    return f'"{given_option.raw_value}" is ' if isinstance(assigned_value.value, str) and not given_option.raw_value.startswith(("/", ".")) else ""
