"""The platform's policy: what FineTuneJobs of each namespace may use. The platform team sets this policy in `policy` of the chart's values.

Two modules use the rules in `table`: `check` applies them to a spec in Python, for the operator and the command line. `admission` writes the rules as CEL
for a ValidatingAdmissionPolicy, so that the API server refuses the same specs.
"""

from finetune_api.tenancy.check import Platform, PolicyProblem, Pool, check_policy
from finetune_api.tenancy.settings import NamespacePolicy, PlatformPolicy, PolicyRules
from finetune_api.tenancy.user_code import find_user_code_in_preparation

__all__ = ["NamespacePolicy", "Platform", "PlatformPolicy", "PolicyProblem", "PolicyRules", "Pool", "check_policy", "find_user_code_in_preparation"]
