"""The distributed strategies. A strategy sets its fields of TrainingArguments, and verifies that it is active."""

from finetune_trainer.distributed.base import DistributedStrategy, connect_trainer_class
from finetune_trainer.distributed.choice import choose_strategy
from finetune_trainer.distributed.rank_order import local_rank_0_first

__all__ = ["DistributedStrategy", "choose_strategy", "connect_trainer_class", "local_rank_0_first"]
