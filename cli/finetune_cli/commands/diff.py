"""`finetune diff`: what two jobs really differ in, defaults filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.options import ContextOption, KubeconfigOption, NamespaceOption


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A manifest, or the name of a job in the cluster.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Compare the resolved configurations of two jobs. Exit code 0 also when they differ.

    Example: finetune diff job.yaml other.yaml

    Example: finetune diff support-1 support-2 -n team-a
    """

    def load(text: str) -> dict[str, Any]:
        if text == "-" or Path(text).is_file() or text.endswith((".yaml", ".yml", ".json")):
            return _from_file(Path(text))
        from finetune_cli.cluster import connect

        return dict(connect(namespace, context, kubeconfig).job(text).get("spec") or {})

    left, right = flat(_resolved(load(first), first)), flat(_resolved(load(second), second))
    rows = [
        (path, left.get(path, "-"), right.get(path, "-"))
        for path in sorted({*left, *right})
        if left.get(path) != right.get(path)
    ]
    if not rows:
        output.notes(["the two resolve to the same configuration"])
        return
    width = max(len(path) for path, *_ in rows)
    output.write("\n".join(f"{path:<{width}}  {a}  ->  {b}" for path, a, b in rows))


def _from_file(path: Path) -> dict[str, Any]:
    from finetune_cli.manifests import read

    jobs = [one for one in read(path) if one.is_job]
    if len(jobs) != 1:
        output.errors([f"{path}: {len(jobs)} FineTuneJobs are in it, and one is needed"])
        raise output.Ended(output.ERROR)
    spec = jobs[0].value.get("spec") or {}
    if not isinstance(spec, dict):
        output.errors([f"{jobs[0].place('spec')}: spec: it is not a group; write spec:"])
        raise output.Ended(output.ERROR)
    return spec


def _resolved(spec: dict[str, Any], name: str) -> dict[str, Any]:
    from finetune_api.defaults import resolve
    from finetune_api.spec import FineTuneJobSpec
    from pydantic import ValidationError

    try:
        return resolve(FineTuneJobSpec.model_validate(spec)).spec.to_wire()
    except ValidationError as error:
        output.errors([f"{name}: it cannot be read ({error.error_count()} errors); `finetune validate` tells them"])
        raise output.Ended(output.ERROR) from None


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    import json

    result: dict[str, str] = {}
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if isinstance(inner, dict) and inner:
            result |= flat(inner, f"{path}.")
        elif inner != {}:
            result[path] = json.dumps(inner, ensure_ascii=False)
    return result
