"""The rule for quantities in the spec, such as memory. The CRD's schema has the same patterns and minimums (see `finetune_api.quantities`)."""

from __future__ import annotations

from finetune_api.base import Group
from finetune_api.quantities import CPU_KIND, SIZE_KIND, QuantityKind, find_quantity_problem
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.spec import FineTuneJobSpec

QUANTITY_KIND_BY_FIELD: dict[str, QuantityKind] = {"cpu": CPU_KIND, "memory": SIZE_KIND, "ephemeralStorage": SIZE_KIND, "sharedMemory": SIZE_KIND}
"""Kind of quantity by field name. A field of this name has the same kind in all groups that request resources."""


@rule("QuantityInvalid")
def check_quantity_invalid(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    group_by_path: dict[str, Group] = {"resources": spec.resources, "prepare.resources": spec.prepare.resources}
    if spec.trainer.grpo and spec.trainer.grpo.generation:
        group_by_path["trainer.grpo.generation"] = spec.trainer.grpo.generation
    for path, group in group_by_path.items():
        for name, value in group.to_wire().items():
            problem = find_quantity_problem(value, QUANTITY_KIND_BY_FIELD[name]) if name in QUANTITY_KIND_BY_FIELD else None
            if problem is not None:
                yield f"{path}.{name}", *problem
