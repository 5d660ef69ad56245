"""How ranks work together: one module a strategy, each with what it tells the Trainer and how it is proved to be active."""

from finetune_trainer.distributed.base import Plan, connected
from finetune_trainer.distributed.choice import choose

__all__ = ["Plan", "choose", "connected"]
