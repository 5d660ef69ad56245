"""`python -m finetune_trainer.storage list|verify|download <uri>`: what a person does with a job's tree.

The uri is that of a job (`s3://bucket/root/<namespace>/<name>/<uid>`), of one checkpoint (`.../checkpoints/step-00000100`) or
of the final model (`.../model`). Credentials come from the usual AWS_ variables, as does the key of objects
that are encrypted with a customer's key (AWS_SSE_CUSTOMER_KEY); endpoint and region from options or AWS_ ones. What is served over
`https://` can be read where one checkpoint or the model is named; a query, such as a signature, goes with every request.
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

from finetune_trainer.checkpoint.tree import Tree
from finetune_trainer.storage.committed import Address, address, bring, meant
from finetune_trainer.storage.roots import open_store
from finetune_trainer.storage.web import apart


def show(tree: Tree, where: Address) -> None:
    """One line for each checkpoint and the model."""
    found = list(meant(tree, where))
    print(f"{'WHAT':<16}{'FILES':>6}{'BYTES':>14}  {'HEALTHY':<8}{'MADE BY':<14}URI")
    for one in found:
        manifest = tree.manifest(one)
        what = "model" if one.step is None else f"step {one.step}"
        files, size = (len(manifest.files), manifest.total_bytes) if manifest else ("?", "damaged")
        healthy = "-" if one.step is None else "yes" if one.healthy else "unknown"
        print(f"{what:<16}{files:>6}{size:>14}  {healthy:<8}{one.marker.path:<14}{tree.uri(one.folder)}")


def verify(tree: Tree, where: Address) -> None:
    """Read every byte and compare. Errors: DataError CheckpointDamaged, naming each object."""
    problems: list[str] = []
    for one in meant(tree, where):
        with tempfile.TemporaryDirectory() as folder:
            problem = bring(tree, one, Path(folder))
        print(f"{tree.uri(one.folder)}: {problem or 'whole and right'}")
        problems += [problem] if problem else []
    if problems:
        raise DataError("CheckpointDamaged", f"{len(problems)} damaged: {problems[0]}")


def download(tree: Tree, where: Address, target: Path) -> None:
    """Bring the newest that is meant (the model, if the whole job is) into a folder. Errors: DataError CheckpointDamaged."""
    found = list(meant(tree, where))
    one = next((one for one in found if one.step is None), found[0])
    problem = bring(tree, one, target)
    if problem:
        raise DataError("CheckpointDamaged", problem)
    print(f"{tree.uri(one.folder)} is in {target}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code of the failure's class."""
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer.storage", description=__doc__)
    parser.add_argument("command", choices=["list", "verify", "download"])
    parser.add_argument("uri")
    parser.add_argument("--to", type=Path, help="folder to download into (default: the last part of the uri)")
    parser.add_argument("--endpoint", help="URL of an S3-compatible store")
    parser.add_argument("--region")
    parser.add_argument("--addressing-style", choices=list(AddressingStyle), type=AddressingStyle)
    parser.add_argument("--ca-bundle", help="file with PEM certificates to trust")
    options = parser.parse_args(arguments)
    if options.uri.startswith("https://") and (options.endpoint or options.region or options.addressing_style):
        parser.error(
            "--endpoint, --region and --addressing-style are for s3://: an https:// uri says itself where to ask"
        )
    where = address(options.uri)
    target = StoreTarget(
        uri=where.root, endpoint=options.endpoint, region=options.region, addressing_style=options.addressing_style,
        ca_bundle=options.ca_bundle, encryption=EncryptionType.CUSTOMER_KEY if os.environ.get(Env.STORAGE_CUSTOMER_KEY) else None,
    )  # fmt: skip
    try:
        tree = Tree(open_store(target))
        match options.command:
            case "list":
                show(tree, where)
            case "verify":
                verify(tree, where)
            case "download":
                download(tree, where, options.to or Path(apart(options.uri)[0].rstrip("/").rpartition("/")[2]))
    except FineTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
