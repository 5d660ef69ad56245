"""Generate the reference pages in `docs/reference` from the CRD, the shared names and the rules.

`python -m finetune_api.reference FOLDER` writes the pages. `make verify` fails if a page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.base import iterate_nested_groups, read_member_docs
from finetune_api.exits import EXIT_POLICIES, RetryPolicy
from finetune_api.rules import RULES
from finetune_api.schema import PRINTER_COLUMNS, build_crd
from finetune_api.spec import FineTuneJobSpec
from finetune_api.support import UNSUPPORTED_FIELDS, to_wire_path
from finetune_api.troubleshooting import (
    CURE_OF_CONDITION,
    CURE_OF_EXIT_CODE,
    CURE_OF_REASON,
    FAILURE_REMEDIES,
    RULE_REMEDIES,
    Remedy,
)

GENERATED_NOTE = "<!-- Generated from crds/finetune_api by `make generate`; do not edit. -->\n\n"


def build_pages() -> dict[str, str]:
    """Return the text of each page, by file name."""
    schema_by_group = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    return {
        "spec.md": GENERATED_NOTE + "# FineTuneJob: spec\n\n" + "\n".join(_iterate_sections("spec", schema_by_group["spec"])),
        "status.md": GENERATED_NOTE + "# FineTuneJob: status\n\n" + _make_columns_section() + "\n".join(_iterate_sections("status", schema_by_group["status"])),
        "names.md": GENERATED_NOTE + _build_names_page(),
        "rules.md": GENERATED_NOTE + _build_rules_page(),
        "troubleshooting.md": GENERATED_NOTE + _build_troubleshooting_page(),
    }


def _iterate_sections(path: str, schema: dict[str, Any]) -> Iterator[str]:
    """Yield the section of an object, with a table of its fields, then the sections of all nested objects."""
    yield f"## {path}\n\n| field | type | meaning |\n|---|---|---|"
    for name, field_schema in schema["properties"].items():
        yield f"| `{name}` | {_format_type(field_schema)} | {_escape_cell(field_schema.get('description', ''))} |"
    yield ""
    for name, field_schema in schema["properties"].items():
        item_schema, suffix = (field_schema["items"], "[]") if field_schema.get("type") == "array" else (field_schema, "")
        if item_schema.get("properties"):
            yield from _iterate_sections(f"{path}.{name}{suffix}", item_schema)


def _format_type(field_schema: dict[str, Any]) -> str:
    if "x-kubernetes-int-or-string" in field_schema:
        return "quantity"
    if field_schema["type"] == "array":
        return f"list of {_format_type(field_schema['items'])}"
    if "additionalProperties" in field_schema:
        return f"map of {_format_type(field_schema['additionalProperties'])}"
    if "enum" in field_schema:
        return " \\| ".join(f"`{word}`" for word in field_schema["enum"])
    lower_bound = f"{'>' if field_schema.get('exclusiveMinimum') else '≥'} {field_schema['minimum']:g}" if "minimum" in field_schema else ""
    upper_bound = f"{'<' if field_schema.get('exclusiveMaximum') else '≤'} {field_schema['maximum']:g}" if "maximum" in field_schema else ""
    return " ".join(part for part in (field_schema["type"], ", ".join(part for part in (lower_bound, upper_bound) if part)) if part)


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _make_columns_section() -> str:
    rows = [
        f"| {name.upper()} | `{path}` | {'wide' if is_wide else 'always'} | {text} |"
        for name, _, path, is_wide, text in PRINTER_COLUMNS
    ]
    return "\n".join(
        [
            "## Columns of `kubectl get finetunejobs`\n",
            "| column | from | shown | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
            "",
        ]
    )


def _make_enum_table(title: str, enum_class: type[Enum]) -> str:
    docs_by_member = read_member_docs(enum_class)
    rows = [f"| `{member.value}` | {_escape_cell(docs_by_member.get(member.name, ''))} |" for member in enum_class]
    return "\n".join([f"## {title}\n", "| name | meaning |", "|---|---|", *rows, "", ""])


def _make_exit_codes_section() -> str:
    """Return a table of the exit codes and a table of the retry policies."""
    docs_by_member = read_member_docs(names.ExitCode)
    rows = []
    for code in names.ExitCode:
        policy = EXIT_POLICIES.get(code)
        cells = [policy.failure_class, policy.default_failure_code, policy.retry_policy, policy.default_hint] if policy else [""] * 4
        rows.append(f"| {code:d} | {_escape_cell(docs_by_member[code.name])} | " + " | ".join(_escape_cell(str(cell)) for cell in cells) + " |")
    header = "| code | meaning | `failure.class` | `failure.code` | retry policy | hint |"
    retry_policy_table = _make_enum_table("Retry policies after a failed attempt", RetryPolicy)
    return "\n".join(["## Exit codes of a pod\n", header, "|---|---|---|---|---|---|", *rows, "", "", retry_policy_table])


def _build_names_page() -> str:
    titled_enums: list[tuple[str, type[Enum]]] = [
        ("Labels on objects that the operator creates", names.Label),
        ("Annotations", names.Annotation),
        ("Conditions", names.Condition),
        ("Reasons in conditions, attempts and events", names.Reason),
        ("Environment variables of the trainer container", names.Env),
        ("Names in storage", names.Storage),
    ]
    return "# Names shared by operator, trainer and CLI\n\n" + "\n".join(_make_enum_table(title, enum_class) for title, enum_class in titled_enums) + "\n" + _make_exit_codes_section()


def _build_rules_page() -> str:
    messages_by_code = {rule.code: [rule.message] if rule.cel else [] for rule in RULES}
    for cel in dict.fromkeys(cel for group in iterate_nested_groups(FineTuneJobSpec) for cel in group.cel):
        messages_by_code[cel.code].append(cel.message)
    rows = [
        f"| `{rule.code}` | {'API server, ' if messages_by_code[rule.code] else ''}operator, command line | {_escape_cell('; '.join(messages_by_code[rule.code]))} |"
        for rule in RULES
    ]
    unsupported_field_rows = [f"| `{to_wire_path(unsupported_field.path)}` | {_escape_cell(unsupported_field.hint)} |" for unsupported_field in UNSUPPORTED_FIELDS]
    return "\n".join(
        [
            "# Rules\n", "## Cross-field rules\n", "| rule | checked by | message of the API server |", "|---|---|---|", *rows,
            "\n## Fields that this release does not implement\n", "If a job sets one of these fields, the operator refuses the job with `Accepted=False`, reason `NotSupportedYet`. For some fields, the operator refuses only certain values.\n",
            "| field | what to write |", "|---|---|", *unsupported_field_rows, "",
        ]
    )  # fmt: skip


TROUBLESHOOTING_INTRODUCTION = """\
# Troubleshooting

## Where to look first

1. `finetune status JOB` shows the phase, the conditions, the attempts and the failure with its code and hint. Without the command line, use
   `kubectl describe finetunejob JOB`.
2. `finetune logs JOB` shows the logs of the newest attempt.
3. Look up the reason, the exit code or the failure code on this page.
4. `finetune support-bundle JOB` writes an archive for a bug report, without Secrets. Check the archive before you share it.

`status.failure.code` contains a code from one of the tables "Failure codes". If the trainer refuses the spec, `status.failure.code` contains a code from the
table "Rules". A code that is not on this page is the name of a Python exception, `ExitCode` with a number, or the reason that Kubernetes gives for the end
of a pod (for example `EvictionByEvictionAPI`). For these codes, `status.failure.message` is the text of the library or of Kubernetes.
"""


def _build_troubleshooting_page() -> str:
    sections = [
        TROUBLESHOOTING_INTRODUCTION,
        _make_cure_table("Conditions", names.Condition, {key.value: text for key, text in CURE_OF_CONDITION.items()}),
        _make_cure_table("Reasons of conditions, attempts and events", names.Reason, {key.value: text for key, text in CURE_OF_REASON.items()}),
        _make_exit_cure_table(),
        *(_make_remedy_table(f"Failure codes: {subject}", remedies) for subject, remedies in FAILURE_REMEDIES.items()),
        _make_remedy_table("Rules: why a spec is refused", RULE_REMEDIES),
    ]
    return "\n".join(sections)


def _make_cure_table(title: str, enum_class: type[Enum], cure_by_name: dict[str, str]) -> str:
    docs_by_member = read_member_docs(enum_class)
    rows = [f"| `{member.value}` | {_escape_cell(docs_by_member[member.name])} | {_escape_cell(cure_by_name[member.value])} |" for member in enum_class]
    return "\n".join([f"## {title}\n", "| name | meaning or cause | what to do |", "|---|---|---|", *rows, ""])


def _make_exit_cure_table() -> str:
    docs_by_member = read_member_docs(names.ExitCode)
    cure_by_exit_code = {int(code): text for code, text in CURE_OF_EXIT_CODE.items()} | {int(code): policy.default_hint for code, policy in EXIT_POLICIES.items()}
    rows = [f"| {code:d} | {_escape_cell(docs_by_member[code.name])} | {_escape_cell(_to_sentence(cure_by_exit_code[code]))} |" for code in names.ExitCode]
    return "\n".join(["## Exit codes of a pod\n", "| code | cause | what to do |", "|---|---|---|", *rows, ""])


def _make_remedy_table(title: str, remedies: tuple[Remedy, ...]) -> str:
    rows = [f"| `{remedy.code}` | {_escape_cell(remedy.cause)} | {_escape_cell(remedy.cure)} |" for remedy in sorted(remedies, key=lambda remedy: remedy.code)]
    return "\n".join([f"## {title}\n", "| code | cause | cure |", "|---|---|---|", *rows, ""])


def _to_sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


def main() -> None:
    """Write all pages into the folder whose path is the first command-line argument."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, page_text in build_pages().items():
        (folder / name).write_text(page_text)


if __name__ == "__main__":
    main()
