"""IA3: learned factors that scale the keys, the values and the inner activations of the MLP."""

from __future__ import annotations

from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.spec.enums import MethodType, OutputKind

from finetune_trainer.method.base import TrainableModel
from finetune_trainer.method.peft_method import PeftMethod, linear_layer_names, peft_task_type

KEY_AND_VALUE_LAYERS = ("k_proj", "v_proj", "query_key_value", "c_attn")
"""Names of the layers that compute keys and values."""
MLP_OUTPUT_LAYERS = ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "w2")
"""Names of the MLP layers whose inputs are the inner activations."""


class Ia3(PeftMethod, types=(MethodType.IA3,)):
    """Trains the scaling factors of IA3. The base model is frozen."""

    def apply(self, model: Any) -> TrainableModel:
        """Add scaling factors to the layers with known names. Errors: ConfigError TargetModulesMissing if the model has no such layers."""
        from peft import IA3Config, get_peft_model

        layer_names = linear_layer_names(model)
        mlp_names = [name for name in MLP_OUTPUT_LAYERS if name in layer_names][:1]
        attention_names = [name for name in KEY_AND_VALUE_LAYERS if name in layer_names]
        if not mlp_names or not attention_names:
            raise ConfigError(
                "TargetModulesMissing", f"ia3 needs key, value and MLP layers with known names, but the model only has {', '.join(layer_names)}",
                hint="write method lora, which finds the layers by type",
            )  # fmt: skip
        config = IA3Config(task_type=peft_task_type(model), target_modules=[*attention_names, *mlp_names], feedforward_modules=mlp_names)
        return TrainableModel(get_peft_model(model, config), OutputKind.ADAPTER)
