"""The interface of an objective, which reads the data and builds the Trainer, and the types of its inputs and results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from finetune_api.names import GENERATION_MOUNT
from finetune_api.objectives import OBJECTIVES, ObjectiveFacts
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import DatasetFormat, TrainerType
from transformers import TrainingArguments

from finetune_trainer.data.prepare import NoPreparationCallbacks, PreparationCallbacks, Splits
from finetune_trainer.data.vision import VisionProcessor
from finetune_trainer.distributed import DistributedStrategy, connect_trainer_class
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs
from finetune_trainer.method.vision_parts import TrainedParts

SplitsT = TypeVar("SplitsT", bound=Splits)
ArgumentsT = TypeVar("ArgumentsT", bound=TrainingArguments)


@dataclass
class TrainingContext:
    """The inputs of an objective. All inputs exist before the model is loaded."""

    run: RunConfig
    inputs: Inputs
    hardware: Hardware
    strategy: DistributedStrategy
    tokenizer: Any
    token_cache: Path
    """Folder for tokenised data."""
    max_positions: int | None
    """Longest sequence that the model can read, in tokens; None if unknown."""
    callbacks: Sequence[Any] = ()
    vision: VisionProcessor | None = None
    """Processor of a vision-language model; None for a text model."""
    preparation: PreparationCallbacks = field(default_factory=NoPreparationCallbacks)
    """Callbacks while the rows are prepared."""
    unquantized: tuple[str, ...] = ()
    """Modules of a quantised base model that stay unquantised, because the method spectrum trains them."""

    @property
    def generation_folder(self) -> Path:
        """The folder that this pod shares with its vLLM server."""
        return self.token_cache.parent / Path(GENERATION_MOUNT).name


def image_arguments(context: TrainingContext) -> dict[str, Any]:
    """Return the keyword arguments of TrainingArguments for rows with images; none for a text model."""
    parts = TrainedParts.of(context.run)
    if parts is None:
        return {}
    return {
        "remove_unused_columns": False,  # TRL does not know the column with the images
        # DDP must not wait for gradients of the vision layers, because a micro-batch without images computes no such gradients.
        "ddp_find_unused_parameters": parts.vision_layers and context.strategy.world_size > 1,
    }


@dataclass
class DataFacts:
    """The facts about a run's data that the status and the report show."""

    rows: int
    """Number of training rows."""
    format: DatasetFormat
    notes: list[str] = field(default_factory=list)
    """Sentences for the status."""
    report: dict[str, Any] = field(default_factory=dict)
    """Counts for the report, as JSON."""
    longest_sequence: int = 0
    """Tokens of the longest training sequence; 0 if unknown."""


@dataclass(frozen=True)
class HeldOutMetric:
    """A metric of the test set, measured after training."""

    logged_as: str
    """Name in the Trainer's log, without its prefix `test_` or `eval_`."""
    status_name: str
    """Name in `status.output.evaluation`."""
    label: str
    """Name of the metric in status notes."""


TEST_LOSS = HeldOutMetric("loss", "testLoss", "loss")
TEST_TOKEN_ACCURACY = HeldOutMetric("mean_token_accuracy", "testTokenAccuracy", "token accuracy")
TEST_PREFERENCE_ACCURACY = HeldOutMetric("rewards/accuracies", "testPreferenceAccuracy", "preference accuracy")


class Objective(ABC, Generic[SplitsT, ArgumentsT]):
    """Loads the data and builds the Trainer for one `trainer.type`. Instances have no state."""

    trainer_type: ClassVar[TrainerType]
    trainer_class: ClassVar[type[Any]]
    """The Trainer class. The first base classes of the Trainer class are mixins of this package; its last base class is a trainer of TRL."""
    model_kind: ClassVar[str] = "causal"
    """Head of the model: `causal` (next token) or `reward` (one score)."""
    held_out_metrics: ClassVar[tuple[HeldOutMetric, ...]] = (TEST_LOSS,)

    @property
    def facts(self) -> ObjectiveFacts:
        """The objective's data formats, options and default learning rate, from the table in `finetune_api.objectives`."""
        return OBJECTIVES[self.trainer_type]

    @abstractmethod
    def load_data(self, context: TrainingContext) -> tuple[SplitsT, DataFacts]:
        """Read, check and tokenise the data. Errors: ConfigError, DataError."""

    @abstractmethod
    def training_arguments(self, context: TrainingContext, *, has_validation_data: bool) -> ArgumentsT:
        """Create TRL's configuration. Errors: ConfigError."""

    def trainer_attributes(self, data: SplitsT) -> dict[str, Any]:
        """Return class attributes for the Trainer."""
        return {}

    def trainer_options(self, context: TrainingContext) -> dict[str, Any]:
        """Return additional keyword arguments for the Trainer's constructor."""
        return {}

    def build_trainer(self, context: TrainingContext, args: ArgumentsT, model: Any, data: SplitsT) -> Any:
        """Build the Trainer, connected to the distributed strategy."""
        trainer_class = connect_trainer_class(self.trainer_class, context.strategy, **self.trainer_attributes(data))
        return trainer_class(
            model=model, args=args, train_dataset=data.train, eval_dataset=data.validation, processing_class=context.tokenizer,
            callbacks=list(context.callbacks), **self.trainer_options(context),
        )  # fmt: skip

    def verify_trainer(self, trainer: Any) -> None:
        """Check that the Trainer applies the settings of the run. This method is called when training begins. Errors: InternalError."""
