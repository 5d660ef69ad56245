"""Finds the fields of a spec that let a preparation pod run code which the platform team has not chosen."""

from __future__ import annotations

from finetune_api.spec import FineTuneJobSpec
from finetune_api.tenancy.check import Platform, check_policy
from finetune_api.tenancy.settings import PolicyRules

RULES_WITHOUT_USER_CODE = PolicyRules(images=(), allow_trust_remote_code=False, allow_user_code=False)
"""Rules that refuse every image and all code of the user.

`environment` and `mountPaths` keep their default patterns, which refuse variables and mounts that load other code.
"""
CODE_RULE_NAMES = frozenset({"images", "environment", "mountPaths", "allowTrustRemoteCode", "allowUserCode"})
PREPARATION_GROUPS = ("model.", "trainer.", "placement.")
"""Groups of the spec whose code a preparation runs. A preparation reads no checkpoints and runs no benchmarks."""


def find_user_code_in_preparation(spec: FineTuneJobSpec) -> list[str]:
    """Return the paths of the fields that let the preparation of a job run code of the user or of a model repository.

    A preparation that can run such code does not get the key that signs the namespace's prepared rows. Such a preparation neither stores nor uses prepared
    rows.
    """
    problems = check_policy(spec, RULES_WITHOUT_USER_CODE, Platform(namespace=""))
    return sorted({problem.path for problem in problems if problem.rule in CODE_RULE_NAMES and problem.path.startswith(PREPARATION_GROUPS)})
