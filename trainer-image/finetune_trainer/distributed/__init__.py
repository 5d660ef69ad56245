"""Distributed strategies: one module for each, with its TrainingArguments and the proof that it is active."""

from finetune_trainer.distributed.base import DistributedStrategy, connect_trainer_class
from finetune_trainer.distributed.choice import choose

__all__ = ["DistributedStrategy", "choose", "connect_trainer_class"]
