"""Secrets and keys of an attempt: every release derives the same values as the releases before it, and values for different purposes differ."""

from __future__ import annotations

from finetune_api.attempt_secret import (
    derive_attempt_secret,
    derive_checkpoint_key,
    derive_gang_key,
    derive_progress_token,
    derive_secret_name_suffix,
    sign_manifest,
)

KEY = bytes(range(32))


def test_derived_secrets_and_keys_are_the_same_in_all_releases() -> None:
    """After an upgrade, the operator must be able to derive the secrets of attempts that an older operator started."""
    secret = derive_attempt_secret(KEY, "uid", 1)
    assert secret == "a2101a184636a66f9ba11b3a314d6123256f3287a72a18b94bbe4d05e27f3050"
    assert derive_secret_name_suffix(KEY, "uid", 1) == "0a3d4628"
    assert derive_progress_token(secret) == "8c7ac0f0bc6b85bd30cecb80000723f2a78b6f8b15d8690ad03ff708d312f576"
    key = derive_checkpoint_key(KEY, "uid")
    assert key == "a074b5d1c202b5c6a584586c77cd99d6219a0416c848491495d2cbb9094238ac"
    assert sign_manifest(key, "checkpoints/step-00000005/a1-00000000", "ab" * 32) == (
        "dfc9a5f6342ac7492d62b23beac4af87189dff5cb38632b6b6a5bee9d7ca3f39"
    )
    assert derive_gang_key(secret).hex() == "26cfb9b5ab530bd350e0259604815c45064b5e316c9ce3d63869a7e0b193a4b3"


def test_the_secret_depends_on_operator_key_job_and_attempt() -> None:
    secrets = {derive_attempt_secret(key, uid, attempt) for key in (KEY, KEY[::-1]) for uid in ("a", "b", "a/1") for attempt in (1, 11)}
    assert len(secrets) == 12
    suffixes = {derive_secret_name_suffix(KEY, uid, attempt) for uid in ("a", "b") for attempt in (1, 2)}
    assert len(suffixes) == 4
