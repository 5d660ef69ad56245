"""Server-side encryption with a real store: a customer key protects all objects, and a store that does not encrypt is reported."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from finetune_api.errors import FineTuneError
from finetune_api.pod import ResumeConfig, StoreTarget
from finetune_api.spec.enums import EncryptionType
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts, checkpoint_folder_key
from finetune_trainer.checkpoint.restore import restore
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage import s3
from finetune_trainer.storage.preflight import preflight
from finetune_trainer.storage.s3 import S3Store
from proxied_tree import ProxiedTree

from tests.support.store_features import IGNORED, SSE_C, SSE_KMS, SSE_S3, YES, read_result_of_chosen_store

needs_customer_key_encryption = pytest.mark.skipif(read_result_of_chosen_store(SSE_C) != YES, reason="this store does not encrypt with the customer's key")


@pytest.fixture
def target(storage: ProxiedTree, monkeypatch: pytest.MonkeyPatch) -> StoreTarget:
    """A storage target with a customer key.

    The API forbids customer keys with an http:// endpoint. The tests can use such an endpoint, because they create the target without the API.
    """
    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY", base64.b64encode(bytes(range(32))).decode())
    plain_target: StoreTarget = storage.direct_tree.store.target  # type: ignore[attr-defined] # an S3Store
    return plain_target.model_copy(update={"encryption": EncryptionType.CUSTOMER_KEY})


@needs_customer_key_encryption
def test_an_encrypted_checkpoint_is_committed_and_restored(
    target: StoreTarget, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has small objects, an object that is uploaded in parts, a manifest and a marker."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * s3.MIB)
    (checkpoint / "large").write_bytes(bytes(11 * s3.MIB))
    assert preflight(target).has_conditional_writes
    tree = CheckpointTree(S3Store(target))
    entries = tree.upload(checkpoint_folder_key(5), "a1-00000000", checkpoint)
    tree.commit(checkpoint_folder_key(5), Manifest(step=5, incarnation="a1-00000000", files=entries))
    restore_result = restore(tree, ResumeConfig(mode="auto", expect_step=5), RunFacts(), tmp_path / "back")
    assert (restore_result.step, restore_result.damage_messages) == (5, [])
    assert restore_result.local_folder is not None and (restore_result.local_folder / "large").read_bytes() == bytes(11 * s3.MIB)


@needs_customer_key_encryption
@pytest.mark.parametrize("key", [None, bytes(reversed(range(32)))])
def test_an_object_cannot_be_read_without_its_key(
    target: StoreTarget, monkeypatch: pytest.MonkeyPatch, key: bytes | None
) -> None:
    S3Store(target).put("key", b"sealed")
    if key is None:
        other_store = S3Store(target.model_copy(update={"encryption": None}))
    else:
        monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY", base64.b64encode(key).decode())
        other_store = S3Store(target)
    with pytest.raises(FineTuneError) as caught:
        other_store.get("key")
    assert caught.value.code in ("EncryptionRefused", "PermissionDenied"), caught.value


@pytest.mark.parametrize(("kind", "feature"), [(EncryptionType.S3, SSE_S3), (EncryptionType.KMS, SSE_KMS), (EncryptionType.CUSTOMER_KEY, SSE_C)])
def test_encryption_that_the_store_lacks_is_refused(target: StoreTarget, kind: EncryptionType, feature: str) -> None:
    """SeaweedFS without keys answers an encrypted write with status 500. Other stores accept it, but store the object unencrypted."""
    probe_result = read_result_of_chosen_store(feature)
    if probe_result == YES:
        assert preflight(target.model_copy(update={"encryption": kind})).can_delete
        return
    with pytest.raises(FineTuneError) as caught:
        preflight(target.model_copy(update={"encryption": kind}))
    # MinIO refuses a customer key without TLS, before any other check. The API therefore forbids customer keys with http://.
    needs_tls = kind is EncryptionType.CUSTOMER_KEY and probe_result == "400 InvalidRequest"
    assert (caught.value.exit_code, caught.value.code) == (67, "TlsFailed" if needs_tls else "EncryptionRefused")
    assert ("stores objects without it" in caught.value.message) == (probe_result == IGNORED)
