"""`finetune replay`: repeats a run from its lineage statement on this machine, and compares the weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NamespaceOption, SetOption
from finetune_cli.commands.storage_options import (
    EndpointOption,
    SecretOption,
    StorageOption,
    StorageOptions,
    TargetArgument,
    open_target,
)

if TYPE_CHECKING:
    from finetune_cli.replay import ReplayResult

WEIGHTS_DIFFER_EXIT_CODE = 2
"""Exit code if the weights differ, or if the repeated training failed."""


def replay(
    target: TargetArgument,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="New folder for the repeated run. Default: a temporary folder, which is removed.")
    ] = None,
    sets: SetOption = None,
    config_maps: Annotated[
        list[str] | None, typer.Option("--config-map", metavar="NAME=FOLDER", help="A local folder that replaces a ConfigMap.")
    ] = None,
    claims: Annotated[
        list[str] | None, typer.Option("--claim", metavar="NAME=FOLDER", help="A local folder that replaces a volume claim.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Python interpreter with the trainer installed. Default: the interpreter that runs finetune.")
    ] = None,
    use_secret: SecretOption = False,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Repeat the training that the lineage statement describes on this machine, and compare the weights with the stored model.

    On the same kind of CPU with the same library versions, the weights are equal.

    Exit code 0: the weights are equal. 1: the replay was refused, or the stored model cannot be read. 2: the weights differ, or the training failed.

    Example: finetune replay s3://models/ft/team-a/support-bot/UID --keep ./replayed
    """
    from finetune_cli.replay import ReplayOptions, ReplayResult
    from finetune_cli.replay import replay as repeat

    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise output.fail(f"--keep {keep}: the folder is not empty; choose a new one")
    job_storage, _ = open_target(target, StorageOptions(use_secret, endpoint, storage, namespace, context, kubeconfig))
    replay_folder = keep.resolve() if keep is not None else Path(tempfile.mkdtemp(prefix="finetune-replay-"))
    replay_folder.mkdir(parents=True, exist_ok=True)
    try:
        result = repeat(job_storage, replay_folder, ReplayOptions(sets or [], config_maps or [], claims or [], python))
    finally:
        if keep is None:
            shutil.rmtree(replay_folder, ignore_errors=True)
    raise output.CommandExit(_print_result(result) if isinstance(result, ReplayResult) else result)


def _print_result(result: ReplayResult) -> int:
    """Print the comparison, and return the exit code."""
    comparison = result.comparison
    if comparison.equal:
        output.write(f"equal: all {comparison.tensors} tensors have the same bits as in the stored model")
        return output.OK
    differences = [f"{comparison.different_tensors} of {comparison.tensors} tensors have other values"] if comparison.different_tensors else []
    if comparison.largest_in is not None:
        differences.append(f"the largest difference is {comparison.largest_difference:.3g}, in {comparison.largest_in}")
    if comparison.mismatched:
        differences.append(f"{len(comparison.mismatched)} tensors are missing or have another shape, for example {comparison.mismatched[0]}")
    output.write(f"different: {'; '.join(differences)}")
    output.print_notes(
        result.reasons or ["the reason is unknown: the run may have used another kind of CPU than this machine, or the statement may be wrong"]
    )
    return WEIGHTS_DIFFER_EXIT_CODE
