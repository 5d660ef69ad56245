"""Which fields of a spec let a preparation pod run code that the platform has not chosen."""

from __future__ import annotations

from finetune_api.spec import FineTuneJobSpec
from finetune_api.tenancy.check import Platform, check_policy
from finetune_api.tenancy.settings import PolicyRules

CODE_RULES = PolicyRules(images=(), allow_trust_remote_code=False, allow_user_code=False)
"""These rules refuse every image and all code of the user. Their defaults refuse variables and mounts that load other code."""
RULES_ABOUT_CODE = frozenset({"images", "environment", "mountPaths", "allowTrustRemoteCode", "allowUserCode"})
GROUPS_OF_PREPARATION = ("model.", "trainer.", "placement.")
"""Groups whose code a preparation runs. It reads no checkpoints and runs no benchmarks."""


def user_code_in_preparation(spec: FineTuneJobSpec) -> list[str]:
    """Return the paths of the fields that make the preparation of a job run code of the user or of a model repository.

    Such a preparation does not get the key that signs the prepared rows of the namespace, and neither stores nor uses prepared rows.
    """
    problems = check_policy(spec, CODE_RULES, Platform(namespace=""))
    return sorted({problem.path for problem in problems if problem.rule in RULES_ABOUT_CODE and problem.path.startswith(GROUPS_OF_PREPARATION)})
