"""Context parallelism: several ranks compute each sequence together, for sequences that do not fit on one GPU.

Each rank of a group computes a part of the tokens of each sequence. Before each attention, DeepSpeed's Ulysses exchanges data between the ranks,
so that a rank has all tokens, but only some of the attention heads. DeepSpeed's own data loader is not used: it loads different rows
on each rank, sends the rows to all ranks, and cannot resume a run within an epoch. Here, the ranks of a group load the same rows, and each rank takes its
part of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.errors import ConfigError, InternalError

CONTEXT_PARALLEL_FIELD = "distributed.contextParallelSize"


@dataclass(frozen=True)
class SequencePart:
    """The part of each sequence that a rank computes: number `index` (from 0) of `count` equal parts."""

    index: int
    count: int

    def cut(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a batch of tensors with shape (rows, tokens). The number of tokens must be a multiple of `count`.

        The labels are shifted before the cut, because the last token of a part must predict the first token of the next part.
        """
        import torch

        tensors = dict(batch)
        # transformers counts the trained tokens only if a batch also has the column `labels`.
        tensors["shift_labels"] = torch.nn.functional.pad(tensors["labels"], (0, 1), value=-100)[:, 1:]
        part_length = tensors["input_ids"].shape[1] // self.count
        return {name: tensor[:, self.index * part_length : (self.index + 1) * part_length].contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class PartCollator:
    """A data collator that returns this rank's part of each batch. The processes of the data loader receive pickled copies of the collator."""

    collator: Callable[[Sequence[Any]], Mapping[str, Any]]
    part: SequencePart

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Collate `rows` to a batch, and return this rank's part of the batch."""
        return self.part.cut(self.collator(rows))


def parallelism_config(ranks_per_group: int, world_size: int) -> Any:
    """Return accelerate's configuration for DeepSpeed's Ulysses with groups of `ranks_per_group` ranks."""
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    return ParallelismConfig(sp_backend="deepspeed", sp_size=ranks_per_group, dp_shard_size=world_size // ranks_per_group, sp_handler=handler)


def gradient_factor(ranks_per_group: int, stage: int, config: Mapping[str, Any]) -> int:
    """Return the factor by which DeepSpeed's gradients are larger than the mean over all ranks.

    Up to stage 2, DeepSpeed 0.19 adds up the gradients of the ranks in a group, and averages over the groups. In stage 3, DeepSpeed averages over all
    ranks if the option `reduce_scatter` is on. Errors: ConfigError ContextParallelUnsupported if the option is off in stage 3.
    """
    if stage < 3:
        return ranks_per_group
    if config.get("zero_optimization", {}).get("reduce_scatter", True) is not True:
        raise ConfigError(
            "ContextParallelUnsupported",
            f"{CONTEXT_PARALLEL_FIELD} is {ranks_per_group}, but the JSON of distributed.deepspeed.configRef turns off reduce_scatter",
            hint="remove zero_optimization.reduce_scatter, or write zeroStage 2",
        )  # fmt: skip
    return 1


def require_sequence_group(rank_count: int) -> None:
    """Check that this rank's group in DeepSpeed has `rank_count` ranks with consecutive numbers. Errors: InternalError StrategyNotActive."""
    from deepspeed.utils import groups
    from torch import distributed

    ranks = distributed.get_process_group_ranks(groups._get_sequence_parallel_group())
    first_rank = distributed.get_rank() // rank_count * rank_count
    if ranks != list(range(first_rank, first_rank + rank_count)):
        raise InternalError(
            "StrategyNotActive", f"{CONTEXT_PARALLEL_FIELD} {rank_count} was requested, but the ranks {ranks} share their sequences",
            hint="this is a bug of the trainer image: report it with the versions of its packages",
        )  # fmt: skip


def context_parallel_mixin() -> type:
    """Return the mixin class. The class is defined in a function so that importing this module does not import torch."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from finetune_trainer.library_internals import OpenTrainer

    class SequenceSharingTrainer(OpenTrainer):
        """Loads the same rows on all ranks of a group, and trains on this rank's part of the tokens. Evaluations use whole sequences."""

        strategy: Any

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            # transformers sets `model_accepts_loss_kwargs` to False, because its own loss for shared sequences is a mean over each micro-batch.
            self.model_accepts_loss_kwargs = True

        def train(self, *args: Any, **options: Any) -> Any:
            """Train, and restore transformers' attention function after the training, because DeepSpeed replaces this function for all models."""
            attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
            self.accelerator.deepspeed_ulysses_dl_adapter = lambda loader, _model: loader
            try:
                return super().train(*args, **options)
            finally:
                ALL_ATTENTION_FUNCTIONS["sdpa"] = attention

        def get_train_dataloader(self) -> Any:
            """Return the loader that yields this rank's parts of the batches. The ranks of a group get the same rows."""
            group_size, collator = self.strategy.context_parallel_size, self.data_collator
            rank, rank_count = self.accelerator.process_index, self.accelerator.num_processes
            self.data_collator = PartCollator(collator, SequencePart(rank % group_size, group_size))
            try:
                loader = super().get_train_dataloader()
            finally:
                self.data_collator = collator
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = rank_count // group_size, rank // group_size
            return loader

        def get_sp_size(self) -> int:
            """Return 1, because this class does not use DeepSpeed's loader.

            DeepSpeed's loader changes the numbers of batches and labels, and transformers corrects these numbers by the returned factor.
            """
            return 1

        def get_total_train_batch_size(self, args: Any) -> int:
            """Return the number of rows per optimizer step. The ranks of a group load the same rows, so a group counts as one rank."""
            return super().get_total_train_batch_size(args) // self.strategy.context_parallel_size

    return SequenceSharingTrainer
