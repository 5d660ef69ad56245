"""The platform team's limits on FineTuneJobs: `policy` in the chart's values.

One table of rules (`table`) has two readers: `check` applies it to a spec in Python (operator, command line), and `admission` writes it as CEL for a
ValidatingAdmissionPolicy, so that the API server refuses the same specs.
"""

from finetune_api.tenancy.check import Platform, PolicyProblem, Pool, check_policy
from finetune_api.tenancy.settings import NamespacePolicy, PlatformPolicy, PolicyRules
from finetune_api.tenancy.user_code import user_code_in_preparation

__all__ = ["NamespacePolicy", "Platform", "PlatformPolicy", "PolicyProblem", "PolicyRules", "Pool", "check_policy", "user_code_in_preparation"]
