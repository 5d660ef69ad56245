"""Data formats, options and defaults of each objective (`trainer.type`).

A new objective needs a member of `TrainerType`, an entry in `OBJECTIVES`, and a module in `finetune_trainer.objective` whose name is the member's value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.spec.enums import DatasetFormat, TrainerType

FORMATS_WITHOUT_TURNS = (DatasetFormat.PLAIN_TEXT, DatasetFormat.CUSTOM, DatasetFormat.PRE_TOKENIZED)
"""Data formats in which a row is one text, or its tokens, without questions and answers."""
CONVERSATION_FORMATS = (
    DatasetFormat.MESSAGES, DatasetFormat.SHAREGPT, DatasetFormat.OASST, DatasetFormat.INSTRUCTION, DatasetFormat.ALPACA,
    DatasetFormat.QA, DatasetFormat.MCQ, DatasetFormat.PROMPT_COMPLETION,
)  # fmt: skip
"""Data formats in which a row contains questions and answers."""


@dataclass(frozen=True)
class ObjectiveFacts:
    """Data formats, options and defaults of one objective."""

    dataset_formats: tuple[DatasetFormat, ...]
    """Data formats that the objective can learn from. Error messages suggest the first format."""
    options: frozenset[str] = frozenset()
    """Names, in camelCase, of the fields of `spec.trainer` that the objective reads in addition to `type` and `backend`."""
    learning_rate: float | None = None
    """Default of `training.learningRate`. None: the default depends on the method."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Further defaults of the objective, by spec path."""
    sequences_per_row: int = 1
    """Number of sequences that the model reads for one row: two for a pair of answers, each with the prompt."""
    passes_without_gradients: int = 0
    """Number of forward passes without gradients for each sequence: those of the reference model, and for kto also those with mismatched answers."""


_DPO_BETA_DEFAULT = {"trainer.dpo.beta": 0.1}
OBJECTIVES: Mapping[TrainerType, ObjectiveFacts] = {
    TrainerType.SFT: ObjectiveFacts(dataset_formats=(*CONVERSATION_FORMATS, *FORMATS_WITHOUT_TURNS)),
    TrainerType.DPO: ObjectiveFacts(
        dataset_formats=(DatasetFormat.PREFERENCE,), options=frozenset({"dpo", "maxCompletionLength"}), learning_rate=5e-6, defaults=_DPO_BETA_DEFAULT,
        sequences_per_row=2, passes_without_gradients=1,
    ),
    TrainerType.KTO: ObjectiveFacts(
        dataset_formats=(DatasetFormat.UNPAIRED_PREFERENCE,), options=frozenset({"dpo", "maxCompletionLength"}), learning_rate=5e-6,
        defaults=_DPO_BETA_DEFAULT, passes_without_gradients=3,
    ),
    TrainerType.ORPO: ObjectiveFacts(
        dataset_formats=(DatasetFormat.PREFERENCE,), options=frozenset({"dpo", "maxCompletionLength"}), learning_rate=5e-6, defaults=_DPO_BETA_DEFAULT,
        sequences_per_row=2,
    ),
    TrainerType.GRPO: ObjectiveFacts(
        dataset_formats=(DatasetFormat.PROMPT_ONLY, *CONVERSATION_FORMATS), options=frozenset({"grpo", "rewards", "maxCompletionLength"}),
        learning_rate=1e-6, defaults={"trainer.grpo.numGenerations": 8},
    ),
    TrainerType.REWARD: ObjectiveFacts(dataset_formats=(DatasetFormat.PREFERENCE,), sequences_per_row=2),
}  # fmt: skip


def list_objectives_that_read(option: str) -> tuple[TrainerType, ...]:
    """Return the objectives that read the field `option` of `spec.trainer`, in the order of `OBJECTIVES`."""
    return tuple(objective for objective, facts in OBJECTIVES.items() if option in facts.options)


def choose_objective_for_format(dataset_format: DatasetFormat) -> TrainerType:
    """Return the first objective that can learn from data of this format. Error messages suggest this objective."""
    return next(objective for objective, facts in OBJECTIVES.items() if dataset_format in facts.dataset_formats)
