"""Rule for the quantities of the spec. The CRD's schema contains the same patterns and minimums (see `finetune_api.quantities`)."""

from __future__ import annotations

from finetune_api.base import Group
from finetune_api.quantities import CPU_KIND, SIZE_KIND, QuantityKind, quantity_problem
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.spec import FineTuneJobSpec

KIND_OF_FIELD: dict[str, QuantityKind] = {"cpu": CPU_KIND, "memory": SIZE_KIND, "ephemeralStorage": SIZE_KIND, "sharedMemory": SIZE_KIND}
"""Kind of quantity by the name of the field, in every group of resources."""


@rule("QuantityInvalid")
def check_quantity_invalid(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    groups: dict[str, Group] = {"resources": spec.resources, "prepare.resources": spec.prepare.resources}
    if spec.trainer.grpo and spec.trainer.grpo.generation:
        groups["trainer.grpo.generation"] = spec.trainer.grpo.generation
    for path, group in groups.items():
        for name, value in group.to_wire().items():
            problem = quantity_problem(value, KIND_OF_FIELD[name]) if name in KIND_OF_FIELD else None
            if problem is not None:
                yield f"{path}.{name}", *problem
