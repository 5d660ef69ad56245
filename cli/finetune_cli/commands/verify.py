"""`finetune verify`: checks a stored model against its manifest, its lineage statement and the statement's signature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import (
    ContextOption,
    DataFormatOption,
    KubeconfigOption,
    NamespaceOption,
    require_format,
    write_data,
)
from finetune_cli.commands.storage_options import (
    EndpointOption,
    SecretOption,
    StorageOption,
    StorageOptions,
    TargetArgument,
    open_target,
)

if TYPE_CHECKING:
    from finetune_cli.lineage import CheckResults

CHECK_FAILED_EXIT_CODE = 2
"""Exit code if a check has failed. Exit code 1 means that storage, the job or the key cannot be read."""


def verify(
    target: TargetArgument,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="The signer's public ed25519 key (PEM). With --key, the check of an unsigned statement fails.")
    ] = None,
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Fail if the statement is unsigned. Only --key also checks who signed it.")
    ] = False,
    use_secret: SecretOption = False,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    output_format: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Read every file of a final model, and check the files, the commit marker, the manifest, the lineage statement and its signature.

    Exit code 0: no check failed. 1: storage, the job or the key cannot be read. 2: a check failed.

    Example: finetune verify support-bot --key team.pem.pub

    Example: finetune verify s3://models/ft/team-a/support-bot/UID/model
    """
    require_format(output_format, "yaml", "json")
    from finetune_cli.lineage import Verifier
    from finetune_cli.signing import read_public_key

    public_key = read_public_key(key) if key is not None else None
    job_storage, _ = open_target(target, StorageOptions(use_secret, endpoint, storage, namespace, context, kubeconfig))
    verification = Verifier(job_storage).verify(public_key, require_signature)
    if output_format is not None:
        write_data(to_dict(job_storage.uri, verification), output_format)
    else:
        output.write("\n".join(format_check_lines(verification)))
    if verification.findings:
        raise output.CommandExit(CHECK_FAILED_EXIT_CODE)


def format_check_lines(verification: CheckResults) -> list[str]:
    """Return one line for each finding, and one line for each check without findings."""
    from finetune_cli.lineage import CheckName, SignatureState

    lines = []
    for check in CheckName:
        findings = verification.select_findings(check)
        lines += [f"{check:<12} FAILED  {finding.code}: {finding.message}" for finding in findings]
        if check is CheckName.SIGNATURE and verification.signature is not SignatureState.FAILED and not findings:
            is_verified = verification.signature is SignatureState.VERIFIED
            lines.append(f"{check:<12} {'ok' if is_verified else '-':<7} {_describe_signature(verification)}")
        elif not findings:
            note = verification.notes.get(check)
            lines.append(f"{check:<12} {'ok' if note else '-':<7} {note or 'not checked, because an earlier check failed'}")
    return lines


def _describe_signature(verification: CheckResults) -> str:
    from finetune_cli.lineage import SignatureState

    return {
        SignatureState.UNSIGNED: "unsigned: anyone who can write to this storage could have changed model and statement together",
        SignatureState.NOT_CHECKED: "signed, but not checked: give the signer's public key with --key",
    }.get(verification.signature, verification.signature.value)


def to_dict(uri: str, verification: CheckResults) -> dict[str, Any]:
    """Return the results of the checks as a dict, for `-o json` and `-o yaml`."""
    from finetune_cli.lineage import CheckName

    checks = [
        {
            "check": check.value, "ok": not verification.select_findings(check), "note": verification.notes.get(check),
            "findings": [{"code": finding.code.value, "message": finding.message} for finding in verification.select_findings(check)],
        }
        for check in CheckName
    ]  # fmt: skip
    return {"uri": uri, "ok": not verification.findings, "signature": verification.signature.value, "checks": checks}
