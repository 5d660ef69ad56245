"""Context parallelism: several ranks compute each sequence together, for sequences that do not fit on one GPU.

Each rank computes a part of the tokens. DeepSpeed's Ulysses exchanges tokens for attention heads before each attention, so that a rank sees all
tokens of a part of the heads. DeepSpeed's own loader lets each rank load other rows, sends all of them to all ranks, and cannot be resumed
within an epoch. Here, the ranks of a group load the same rows, and each rank cuts its part of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.errors import ConfigError, InternalError

FIELD = "distributed.contextParallelSize"


@dataclass(frozen=True)
class SequencePart:
    """The part of each sequence that a rank computes."""

    index: int
    count: int

    def cut(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a batch of tensors (rows, tokens). The number of tokens must be a multiple of `count`.

        The labels are shifted first, because the label of a part's last token is the first token of the next part.
        """
        import torch

        values = dict(batch)
        # transformers counts the trained tokens only if a batch also has the column `labels`.
        values["shift_labels"] = torch.nn.functional.pad(values["labels"], (0, 1), value=-100)[:, 1:]
        size = values["input_ids"].shape[1] // self.count
        return {name: value[:, self.index * size : (self.index + 1) * size].contiguous() for name, value in values.items()}


@dataclass(frozen=True)
class PartCollator:
    """A data collator that returns this rank's part of each batch. Instances are pickled and sent to the processes of the loader."""

    collator: Callable[[Sequence[Any]], Mapping[str, Any]]
    part: SequencePart

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return this rank's part of the rows."""
        return self.part.cut(self.collator(rows))


def parallelism_config(size: int, world_size: int) -> Any:
    """Return accelerate's configuration for DeepSpeed's Ulysses: groups of `size` ranks."""
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    return ParallelismConfig(sp_backend="deepspeed", sp_size=size, dp_shard_size=world_size // size, sp_handler=handler)


def gradient_factor(size: int, stage: int, config: Mapping[str, Any]) -> int:
    """Return the factor by which DeepSpeed's gradients are larger than the mean over all ranks.

    Up to stage 2, DeepSpeed 0.19 sums up the gradients of the ranks of a group, and averages over the groups. In stage 3, it averages over all
    ranks, but only if it reduces with scatter. Errors: ConfigError ContextParallelUnsupported.
    """
    if stage < 3:
        return size
    if config.get("zero_optimization", {}).get("reduce_scatter", True) is not True:
        raise ConfigError(
            "ContextParallelUnsupported", f"{FIELD} is {size}, but the JSON of distributed.deepspeed.configRef turns off reduce_scatter",
            hint="remove zero_optimization.reduce_scatter, or write zeroStage 2",
        )  # fmt: skip
    return 1


def require_group(size: int) -> None:
    """Check DeepSpeed's group of this rank: `size` ranks with consecutive numbers. Errors: InternalError StrategyNotActive."""
    from deepspeed.utils import groups
    from torch import distributed

    ranks = distributed.get_process_group_ranks(groups._get_sequence_parallel_group())
    first = distributed.get_rank() // size * size
    if ranks != list(range(first, first + size)):
        raise InternalError(
            "StrategyNotActive", f"{FIELD} {size} was requested, but the ranks {ranks} share their sequences",
            hint="this is a bug of the trainer image: report it with the versions of its packages",
        )  # fmt: skip


def context_parallel_mixin() -> type:
    """Create the mixin class on demand, so that importing this module does not import torch."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from finetune_trainer.library_internals import OpenTrainer

    class SharesSequences(OpenTrainer):
        """Loads the same rows on all ranks of a group, and trains on this rank's part of the tokens. Evaluations use whole sequences."""

        strategy: Any

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            # transformers turns this off, because its own loss for shared sequences is a mean of each micro-batch.
            self.model_accepts_loss_kwargs = True

        def train(self, *args: Any, **options: Any) -> Any:
            """Train. DeepSpeed replaces the attention function for all models; it is restored at the end."""
            attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
            self.accelerator.deepspeed_ulysses_dl_adapter = lambda loader, _model: loader
            try:
                return super().train(*args, **options)
            finally:
                ALL_ATTENTION_FUNCTIONS["sdpa"] = attention

        def get_train_dataloader(self) -> Any:
            """Return the loader of this rank's parts. Ranks of the same group get the same rows."""
            size, collator = self.strategy.context_parallel_size, self.data_collator
            rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
            self.data_collator = PartCollator(collator, SequencePart(rank % size, size))
            try:
                loader = super().get_train_dataloader()
            finally:
                self.data_collator = collator
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = ranks // size, rank // size
            return loader

        def get_sp_size(self) -> int:
            """Return 1, because the loader has as many batches as groups need, and its labels are not repeated.

            transformers asks for the factor by which DeepSpeed's loader changes these numbers.
            """
            return 1

        def get_total_train_batch_size(self, args: Any) -> int:
            """Return the rows of a step. The ranks of a group count once."""
            return super().get_total_train_batch_size(args) // self.strategy.context_parallel_size

    return SharesSequences
