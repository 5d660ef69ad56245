"""`finetune diff`: compares two jobs with all defaults filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NamespaceOption


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="The manifest of a job, or the name of a job in the cluster.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another manifest or job.")],
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Compare two jobs with all defaults filled in. The exit code is 0 even if the jobs differ.

    Example: finetune diff job.yaml other.yaml

    Example: finetune diff support-1 support-2 -n team-a
    """
    from finetune_cli.checks import check_manifest
    from finetune_cli.fields import flatten
    from finetune_cli.manifests import read_job

    def load_spec(manifest_or_job: str) -> dict[str, Any]:
        if manifest_or_job == "-" or Path(manifest_or_job).is_file() or manifest_or_job.endswith((".yaml", ".yml", ".json")):
            manifest = read_job(Path(manifest_or_job))
            unknown_field_mistakes = [finding.mistake for finding in check_manifest(manifest)[1] if finding.code == "UnknownField"]
            if unknown_field_mistakes:
                raise output.fail(*unknown_field_mistakes)
            return manifest.spec
        from finetune_cli.cluster import connect

        return dict(connect(namespace, context, kubeconfig).get_job(manifest_or_job).get("spec") or {})

    first_values, second_values = flatten(_fill_in_defaults(load_spec(first), first)), flatten(_fill_in_defaults(load_spec(second), second))
    differences = [
        (path, first_values.get(path, "-"), second_values.get(path, "-"))
        for path in sorted({*first_values, *second_values})
        if first_values.get(path) != second_values.get(path)
    ]
    if not differences:
        output.print_notes(["both jobs have the same configuration"])
        return
    path_width = max(len(path) for path, *_ in differences)
    output.write("\n".join(f"{path:<{path_width}}  {first_value}  ->  {second_value}" for path, first_value, second_value in differences))


def _fill_in_defaults(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a spec with all defaults filled in. Raises CommandExit for an invalid spec."""
    from finetune_api.defaults import resolve_defaults
    from finetune_api.spec import FineTuneJobSpec
    from pydantic import ValidationError

    try:
        return resolve_defaults(FineTuneJobSpec.model_validate(spec)).spec.to_wire()
    except ValidationError as error:
        raise output.fail(
            f"{name}: the spec has {error.error_count()} errors; `finetune validate` lists them"
        ) from None
