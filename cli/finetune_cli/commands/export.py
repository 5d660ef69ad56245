"""`finetune export`: writes the final model of a job as an OCI image layout, for container registries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NamespaceOption
from finetune_cli.commands.storage_options import (
    EndpointOption,
    SecretOption,
    StorageOption,
    StorageOptions,
    TargetArgument,
    open_target,
)


def export(
    target: TargetArgument,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="New folder for the OCI image layout.")],
    form: Annotated[
        str,
        typer.Option(
            "--form",
            metavar="modelpack|image",
            help="`modelpack`: each layer is a file, for tools that support ModelPack. `image`: each layer is a tar archive below /models, for image volumes.",
        ),
    ] = "modelpack",
    tag: Annotated[str, typer.Option("--tag", metavar="NAME", help="Name of the artefact in the layout.")] = "latest",
    use_secret: SecretOption = False,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Write the final model as an OCI image layout, for a container registry. If storage has a merged model, the command writes the merged model.

    Then copy the layout to a registry, for example with `skopeo copy --all oci:./layout:latest docker://registry.example.com/support-bot:1`.

    Example: finetune export support-bot --to ./layout

    Example: finetune export support-bot --to ./image --form image
    """
    from finetune_cli.oci_layout import LayoutForm, write_layout
    from finetune_cli.status_text import format_bytes

    if form not in list(LayoutForm):
        raise output.fail(f"--form {form}: write {' or '.join(LayoutForm)}")
    if to.exists():
        raise output.fail(f"--to {to}: the folder exists already; choose a new one")
    job_storage, job = open_target(target, StorageOptions(use_secret, endpoint, storage, namespace, context, kubeconfig))
    if job is not None and ((job.get("status") or {}).get("output") or {}).get("promoted") is False:
        output.print_warnings([f"the model of {target} has failed a gate of evaluation.gates, but is exported"])
    layout = write_layout(job_storage, to, LayoutForm(form), tag, lambda path, size: output.print_notes([f"{path} ({format_bytes(size)})"]))
    output.write(f"{to}: {layout.digest}, {format_bytes(layout.total_bytes)}")
