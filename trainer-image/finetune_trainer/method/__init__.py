"""Which parameters are trained: one module a family of methods, each a function from a base model to a trainable one."""

from finetune_trainer.method.base import Applied, apply, require_scalable, widen

__all__ = ["Applied", "apply", "require_scalable", "widen"]
