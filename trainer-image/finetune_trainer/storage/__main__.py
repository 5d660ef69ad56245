"""`python -m finetune_trainer.storage list|verify|download <uri>`: list, verify or download the checkpoints and the model of a job.

The URI names a job (`s3://bucket/root/<namespace>/<name>/<uid>`), one checkpoint (`.../checkpoints/step-00000100`) or the final
model (`.../model`). Credentials come from the usual AWS_ variables. If objects are encrypted with a customer's key, AWS_SSE_CUSTOMER_KEY holds this
key. Endpoint and region come from options or from AWS_ variables. An `https://` URI must name one checkpoint or the model; its query, such as a
signature, is sent with every request.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from finetune_api.errors import DataError, FineTuneError
from finetune_api.names import Env, ExitCode
from finetune_api.pod import StoreTarget
from finetune_api.spec.enums import AddressingStyle, EncryptionType

from finetune_trainer.checkpoint.address import JobAddress, download_committed, find_committed, parse_address
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.roots import open_store
from finetune_trainer.storage.web import split_query


def print_committed(tree: CheckpointTree, address: JobAddress) -> None:
    """Print one line for each committed checkpoint and for the model."""
    committed_checkpoints = list(find_committed(tree, address))
    print(f"{'WHAT':<16}{'FILES':>6}{'BYTES':>14}  {'HEALTHY':<8}{'MADE BY':<14}URI")
    for checkpoint in committed_checkpoints:
        manifest = tree.read_manifest(checkpoint)
        name = "model" if checkpoint.step is None else f"step {checkpoint.step}"
        file_count, size_text = (len(manifest.files), manifest.total_bytes) if manifest else ("?", "damaged")
        healthy_text = "-" if checkpoint.step is None else "yes" if checkpoint.is_healthy else "unknown"
        print(f"{name:<16}{file_count:>6}{size_text:>14}  {healthy_text:<8}{checkpoint.marker.path:<14}{tree.uri(checkpoint.folder)}")


def verify(tree: CheckpointTree, address: JobAddress) -> None:
    """Download every committed file and compare it with its manifest. Errors: DataError `CheckpointDamaged`."""
    problems: list[str] = []
    for checkpoint in find_committed(tree, address):
        with tempfile.TemporaryDirectory() as folder:
            problem = download_committed(tree, checkpoint, Path(folder))
        print(f"{tree.uri(checkpoint.folder)}: {problem or 'complete and undamaged'}")
        problems += [problem] if problem else []
    if problems:
        raise DataError("CheckpointDamaged", f"{len(problems)} checkpoints or models are damaged; the first: {problems[0]}")


def download(tree: CheckpointTree, address: JobAddress, target_folder: Path) -> None:
    """Download the checkpoint or model that the address names. If the address names a job, download the model, or the newest checkpoint if the job has
    no model.

    Errors: DataError `CheckpointDamaged`.
    """
    committed_checkpoints = list(find_committed(tree, address))
    chosen_checkpoint = next((checkpoint for checkpoint in committed_checkpoints if checkpoint.step is None), committed_checkpoints[0])
    problem = download_committed(tree, chosen_checkpoint, target_folder)
    if problem:
        raise DataError("CheckpointDamaged", problem)
    print(f"downloaded {tree.uri(chosen_checkpoint.folder)} to {target_folder}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns 0 or the exit code of the failure."""
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer.storage", description=__doc__)
    parser.add_argument("command", choices=["list", "verify", "download"])
    parser.add_argument("uri", help="URI of a job, a checkpoint or a model")
    parser.add_argument("--to", type=Path, help="folder to download into (default: the last part of the URI)")
    parser.add_argument("--endpoint", help="URL of an S3-compatible store")
    parser.add_argument("--region")
    parser.add_argument("--addressing-style", choices=list(AddressingStyle), type=AddressingStyle)
    parser.add_argument("--ca-bundle", help="file with PEM certificates to trust")
    options = parser.parse_args(arguments)
    if options.uri.startswith("https://") and (options.endpoint or options.region or options.addressing_style):
        parser.error("--endpoint, --region and --addressing-style are for s3:// only: an https:// URI contains the address of its server")
    address = parse_address(options.uri)
    target = StoreTarget(
        uri=address.job_uri, endpoint=options.endpoint, region=options.region, addressing_style=options.addressing_style,
        ca_bundle=options.ca_bundle, encryption=EncryptionType.CUSTOMER_KEY if os.environ.get(Env.STORAGE_CUSTOMER_KEY) else None,
    )  # fmt: skip
    try:
        tree = CheckpointTree(open_store(target))
        match options.command:
            case "list":
                print_committed(tree, address)
            case "verify":
                verify(tree, address)
            case "download":
                download(tree, address, options.to or Path(split_query(options.uri)[0].rstrip("/").rpartition("/")[2]))
    except FineTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
