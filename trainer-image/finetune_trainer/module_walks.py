"""Collects the modules and parameters of a model once per epoch, so that no micro-batch walks over all modules.

In each step, transformers calls `train`, `zero_grad`, `parameters` and `num_parameters` of the model. Each call visits every module: 2,665
modules for a Llama with 32 layers and LoRA on all linear layers. During these calls, a GPU that has finished its kernels waits. Modules and
parameters do not change within an epoch, so lists of them give the same results. `benchmarks/host_overhead.py` measures the saved time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

REPEATABLE_TRAIN_METHODS = (nn.Module.train, PreTrainedModel.train, DistributedDataParallel.train)
"""Implementations of `train` that change nothing if the module and all its children are already in training mode."""
read_training_flag = attrgetter("training")


class CollectedModel:
    """The modules and the trained parameters of a model, in the order of `Module.modules` and `Module.parameters`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.modules())
        self.trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        """The parameters that require gradients. All other parameters never have gradients."""

    def train(self, mode: bool = True) -> nn.Module:
        """Set all modules to training mode, or to evaluation mode if `mode` is False. Does nothing if all modules are in training mode already."""
        if mode and all(map(read_training_flag, self._modules)):
            return self._model
        model: nn.Module = type(self._model).train(self._model, mode)
        return model

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove the gradients of all parameters, or set them to 0."""
        if not set_to_none:
            type(self._model).zero_grad(self._model, set_to_none)
            return
        for parameter in self.trained_parameters:
            parameter.grad = None

    @property
    def can_replace_train(self) -> bool:
        """Whether the method `train` of every module only sets the mode. The `train` methods of DeepSpeed's engine and of DoRA's layers do more than that."""
        return all(type(module).train in REPEATABLE_TRAIN_METHODS for module in self._modules)

    @property
    def can_replace_zero_grad(self) -> bool:
        """Whether the model uses torch's `zero_grad`."""
        return type(self._model).zero_grad is nn.Module.zero_grad


@contextmanager
def collected_model(model: nn.Module) -> Iterator[CollectedModel]:
    """Collect the modules of `model`, and replace its methods `train` and `zero_grad` within the context.

    The methods of the object `model` are replaced, so that calls from transformers and TRL also use the collected lists. Every rank must hold
    the whole model, because FSDP and ZeRO stage 3 exchange the parameters of their modules within a step.
    """
    collection = CollectedModel(model)
    replacement_methods = {}
    if collection.can_replace_train:
        replacement_methods["train"] = collection.train
    if collection.can_replace_zero_grad:
        replacement_methods["zero_grad"] = collection.zero_grad
    vars(model).update(replacement_methods)
    try:
        yield collection
    finally:
        for name in replacement_methods:
            del vars(model)[name]
