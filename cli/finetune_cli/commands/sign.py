"""`finetune sign`: signs the lineage statement of a final model, after checking that the statement matches the stored files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NamespaceOption, complete_job
from finetune_cli.commands.storage_options import (
    EndpointOption,
    SecretOption,
    StorageOption,
    StorageOptions,
    open_target,
)

if TYPE_CHECKING:
    from finetune_cli.job_storage import JobStorage
    from finetune_cli.lineage import CheckResults


def sign(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|URI", help="Name of the FineTuneJob, or the URI of its folder in storage.", autocompletion=complete_job
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Private ed25519 key (PEM) to sign with.")] = None,
    new_key: Annotated[
        Path | None,
        typer.Option("--new-key", metavar="FILE", help="Create a key pair: FILE and FILE.pub. FINETUNE_KEY_PASSWORD encrypts FILE."),
    ] = None,
    use_secret: SecretOption = False,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Sign the lineage statement of a final model. Run this command after the job has ended and outside the cluster, because no pod may have the private key.

    Example: finetune sign --new-key team.pem

    Example: finetune sign support-bot --key team.pem
    """
    if new_key is not None:
        if target is not None or key is not None:
            raise output.fail("--new-key only creates a key: run `finetune sign NAME --key FILE` afterwards")
        _create_key(new_key)
        return
    if target is None or key is None:
        raise output.fail("write `finetune sign NAME --key FILE`, or `finetune sign --new-key FILE` to create a key")
    from finetune_cli.signing import compute_key_id, read_private_key

    private_key = read_private_key(key)
    job_storage, job = open_target(target, StorageOptions(use_secret, endpoint, storage, namespace, context, kubeconfig))
    statement_bytes = _verify_statement(job_storage, job)
    _store_signature(job_storage, statement_bytes, private_key)
    output.write(f"{job_storage.uri}: signed by the key {compute_key_id(private_key.public_key())}")


def _create_key(path: Path) -> None:
    import os

    from finetune_cli.signing import PASSWORD_VARIABLE, write_new_key

    password = os.environ.get(PASSWORD_VARIABLE, "")
    public_path = write_new_key(path, password)
    output.write(f"{path}: the private key, {'encrypted' if password else 'not encrypted'}. {public_path}: the public key, for `finetune verify`")


def _verify_statement(storage: JobStorage, job: dict[str, Any] | None) -> bytes:
    """Return the bytes of the statement to sign. If a check of the model or the statement fails, print the findings and raise CommandExit."""
    from finetune_cli.lineage import CheckName, Verifier

    verification = Verifier(storage).verify()
    findings = [finding for finding in verification.findings if finding.check is not CheckName.SIGNATURE]
    if findings:
        output.print_errors(f"{finding.code}: {finding.message}" for finding in findings)
        raise output.fail("nothing was signed, because the statement does not match the stored files")
    if job is None:
        return verification.statement_bytes
    _compare_with_status(verification, job)
    return _add_image_digest(verification.statement_bytes, job)


def _compare_with_status(verification: CheckResults, job: dict[str, Any]) -> None:
    """Raise StorageError if the sha256 of the stored manifest differs from the sha256 in the job's status.

    The sha256 in the status comes from the pod that committed the model.
    """
    from finetune_cli.job_storage import StorageError
    from finetune_cli.status_text import parse_status

    model_output = parse_status(job).output
    if model_output is not None and model_output.sha256 is not None and model_output.sha256 != verification.manifest_sha256:
        raise StorageError(
            f"the job's status names a model with the manifest {model_output.sha256[:12]}..., but storage has {verification.manifest_sha256[:12]}...: "
            "nothing was signed, because the model was replaced after the run"
        )


def _add_image_digest(statement_bytes: bytes, job: dict[str, Any]) -> bytes:
    """Add the digest of the trainer image from the job's status to the statement. The pod that wrote the statement does not know this digest."""
    import json

    from finetune_api.lineage import TRAINER_IMAGE_DEPENDENCY, Resource

    from finetune_cli.status_text import parse_status

    resolved_config = parse_status(job).resolved
    image, _, digest = ((resolved_config.image_digest if resolved_config is not None else None) or "").rpartition("sha256:")
    if resolved_config is None or not digest:
        return statement_bytes
    statement_object = json.loads(statement_bytes)
    build_definition = statement_object["predicate"]["buildDefinition"]
    image_dependency = Resource(
        name=TRAINER_IMAGE_DEPENDENCY, uri=image.rstrip("@") or resolved_config.image, digest={"sha256": digest}, annotations={"observedBy": "operator"}
    )
    other_dependencies = [
        dependency for dependency in build_definition["resolvedDependencies"] if dependency.get("name") != TRAINER_IMAGE_DEPENDENCY
    ]
    build_definition["resolvedDependencies"] = [*other_dependencies, image_dependency.to_wire()]
    return json.dumps(statement_object, indent=1, sort_keys=True, ensure_ascii=False).encode()


def _store_signature(storage: JobStorage, payload: bytes, private_key: Any) -> None:
    """Sign the statement, and store it with its signatures. Signatures by other keys are kept if they are for the same statement."""
    import json

    from finetune_api.lineage import ENVELOPE_KEY, STATEMENT_KEY

    from finetune_cli import signing
    from finetune_cli.lineage import read_envelope

    earlier_envelope = read_envelope(storage)
    has_same_payload = earlier_envelope is not None and signing.decode_payload(earlier_envelope) == payload
    if earlier_envelope is not None and not has_same_payload:
        output.print_notes(["earlier signatures are removed, because they are for another statement"])
    envelope = signing.sign(payload, private_key, earlier_envelope.signatures if earlier_envelope is not None and has_same_payload else [])
    storage.write_object(STATEMENT_KEY, payload)
    storage.write_object(ENVELOPE_KEY, json.dumps(envelope.to_wire(), indent=1).encode())
