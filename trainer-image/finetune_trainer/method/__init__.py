"""Which parameters are trained: one module a family of methods, each a function from a base model to a trainable one."""

from finetune_trainer.method.base import Applied, apply, widen

__all__ = ["Applied", "apply", "widen"]
