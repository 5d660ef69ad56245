"""`finetune diff`: compares two jobs after defaults are filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NamespaceOption


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A manifest, or the name of a job in the cluster.")],
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

    def load(text: str) -> dict[str, Any]:
        if text == "-" or Path(text).is_file() or text.endswith((".yaml", ".yml", ".json")):
            manifest = read_job(Path(text))
            unknown = [finding.mistake for finding in check_manifest(manifest)[1] if finding.code == "UnknownField"]
            if unknown:
                raise output.fail(*unknown)
            return manifest.spec
        from finetune_cli.cluster import connect

        return dict(connect(namespace, context, kubeconfig).job(text).get("spec") or {})

    left, right = flatten(_resolved(load(first), first)), flatten(_resolved(load(second), second))
    rows = [
        (path, left.get(path, "-"), right.get(path, "-"))
        for path in sorted({*left, *right})
        if left.get(path) != right.get(path)
    ]
    if not rows:
        output.notes(["both jobs have the same configuration"])
        return
    width = max(len(path) for path, *_ in rows)
    output.write("\n".join(f"{path:<{width}}  {a}  ->  {b}" for path, a, b in rows))


def _resolved(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a spec with all defaults filled in. Raises Exit for an invalid spec."""
    from finetune_api.defaults import resolve_defaults
    from finetune_api.spec import FineTuneJobSpec
    from pydantic import ValidationError

    try:
        return resolve_defaults(FineTuneJobSpec.model_validate(spec)).spec.to_wire()
    except ValidationError as error:
        raise output.fail(
            f"{name}: the spec has {error.error_count()} errors; `finetune validate` lists them"
        ) from None
