"""Distributed strategies: one module for each, with its TrainingArguments and the proof that it is active."""

from finetune_trainer.distributed.base import Plan, connected
from finetune_trainer.distributed.choice import choose

__all__ = ["Plan", "choose", "connected"]
