"""Names of folders in storage that are computed from other values."""

from __future__ import annotations

from finetune_api import names


def test_folder_names_contain_the_attempt_and_pod_uid_or_the_step() -> None:
    assert names.make_incarnation_folder_name(2, "1f3c9a2b-77aa-4c1e-9d7f-000000000000") == "a2-1f3c9a2b"
    assert names.checkpoint_folder(500) == "step-00000500"
