"""Where pods run, and with what environment."""

from __future__ import annotations

from finetune_api.names import Env
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.spec import FineTuneJobSpec


@rule("EnvironmentReserved")
def environment(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    ours = {member.value for member in Env}
    for i, variable in enumerate(spec.placement.env or []):
        if variable.name in ours or variable.name.startswith("FINETUNE_"):
            yield (
                f"placement.env[{i}].name",
                f"{variable.name} is set by the operator",
                "remove it; credentials belong into storage.credentialsSecretRef and model.tokenSecretRef",
            )
