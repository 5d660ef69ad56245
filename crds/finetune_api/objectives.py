"""Formats, options and defaults of each objective (`trainer.type`). The defaults, the rules and the trainer share this table.

A new objective is one value of `TrainerType`, one row of `OBJECTIVES` here, and one module with the value's name in
`finetune_trainer.objective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.spec.enums import DatasetFormat, TrainerType

FORMATS_WITHOUT_TURNS = (DatasetFormat.PLAIN_TEXT, DatasetFormat.CUSTOM)
"""Formats whose rows are one text, without questions and answers."""
CONVERSATION_FORMATS = (
    DatasetFormat.MESSAGES, DatasetFormat.SHAREGPT, DatasetFormat.OASST, DatasetFormat.INSTRUCTION, DatasetFormat.ALPACA,
    DatasetFormat.QA, DatasetFormat.MCQ, DatasetFormat.PROMPT_COMPLETION,
)  # fmt: skip
"""Formats whose rows are questions with answers."""


@dataclass(frozen=True)
class ObjectiveFacts:
    """Data formats and options that an objective reads, and its defaults."""

    formats: tuple[DatasetFormat, ...]
    """Data formats that the objective can learn from. Error messages suggest the first one."""
    options: frozenset[str] = frozenset()
    """Fields of `spec.trainer` that the objective reads besides `type` and `backend`, as wire names."""
    learning_rate: float | None = None
    """Default of `training.learningRate`; None: the default depends on the method."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Other defaults, by spec path."""


_BETA = {"trainer.dpo.beta": 0.1}
OBJECTIVES: Mapping[TrainerType, ObjectiveFacts] = {
    TrainerType.SFT: ObjectiveFacts(formats=(*CONVERSATION_FORMATS, *FORMATS_WITHOUT_TURNS)),
    TrainerType.DPO: ObjectiveFacts(
        formats=(DatasetFormat.PREFERENCE,), options=frozenset({"dpo", "maxCompletionLength"}), learning_rate=5e-6, defaults=_BETA
    ),
    TrainerType.KTO: ObjectiveFacts(
        formats=(DatasetFormat.UNPAIRED_PREFERENCE,), options=frozenset({"dpo", "maxCompletionLength"}), learning_rate=5e-6,
        defaults=_BETA,
    ),
    TrainerType.ORPO: ObjectiveFacts(
        formats=(DatasetFormat.PREFERENCE,), options=frozenset({"dpo", "maxCompletionLength"}), learning_rate=5e-6, defaults=_BETA
    ),
    TrainerType.GRPO: ObjectiveFacts(
        formats=(DatasetFormat.PROMPT_ONLY, *CONVERSATION_FORMATS), options=frozenset({"grpo", "rewards", "maxCompletionLength"}),
        learning_rate=1e-6, defaults={"trainer.grpo.numGenerations": 8},
    ),
    TrainerType.REWARD: ObjectiveFacts(formats=(DatasetFormat.PREFERENCE,)),
}  # fmt: skip


def objectives_that_read(option: str) -> tuple[TrainerType, ...]:
    """Return the objectives that read the field `option` of `spec.trainer` (a wire name), in the order of the table."""
    return tuple(objective for objective, facts in OBJECTIVES.items() if option in facts.options)


def objective_for_format(form: DatasetFormat) -> TrainerType:
    """Return the first objective that can learn from rows of the format. Error messages suggest this objective."""
    return next(objective for objective, facts in OBJECTIVES.items() if form in facts.formats)
