"""Rule for the quantities of `spec.resources`. The CRD's schema contains the same patterns and minimums (see `finetune_api.quantities`)."""

from __future__ import annotations

from finetune_api.quantities import CPU_KIND, SIZE_KIND, quantity_problem
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.spec import FineTuneJobSpec


@rule("QuantityInvalid")
def check_quantity_invalid(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    resources = spec.resources
    for name, value, kind in (
        ("cpu", resources.cpu, CPU_KIND),
        ("memory", resources.memory, SIZE_KIND),
        ("ephemeralStorage", resources.ephemeral_storage, SIZE_KIND),
        ("sharedMemory", resources.shared_memory, SIZE_KIND),
    ):
        problem = None if value is None else quantity_problem(value, kind)
        if problem is not None:
            yield f"resources.{name}", *problem
