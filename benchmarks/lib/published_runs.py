"""Published training runs with their measured peaks of memory, and their description for the memory plan.

Source: PEFT's comparison of methods (repository huggingface/peft, commit 5d602fd, folder method_comparison/MetaMathQA/results), Apache-2.0. All runs
train Llama 3.2 3B in bfloat16 with batches of four rows on an L40S. The published peak is the largest memory that torch reserved. The runs
differ only in the method, and have the same batches. The length of their longest row was not published.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune_api.memory import optimizers
from finetune_api.memory.architecture import parse_model_shape
from finetune_api.memory.heads import LossHead
from finetune_api.memory.layers import Batch, Kernels, TrainedWeights
from finetune_api.memory.replay import Step

LLAMA_3B_SHAPE = parse_model_shape({
    "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True,
})  # fmt: skip
ATTENTION_LAYERS, FEED_FORWARD_LAYERS = frozenset({"q_proj", "v_proj"}), frozenset({"gate_proj", "up_proj", "down_proj"})
ALL_LAYERS = FEED_FORWARD_LAYERS | {"q_proj", "k_proj", "v_proj", "o_proj"}
SMALLEST_LENGTH, LARGEST_LENGTH = 600, 768
"""Bounds of the longest row in tokens. The runs truncate rows after 768 tokens."""


@dataclass(frozen=True)
class PublishedRun:
    """A published run and its peak of reserved memory."""

    name: str
    reserved_bytes: int
    weights: TrainedWeights = field(default_factory=lambda: TrainedWeights(2, 2, False))

    def as_step(self, longest_row_tokens: int) -> Step:
        """Return the memory plan's description of the run. `longest_row_tokens`: tokens of its longest row."""
        batch = Batch(4, longest_row_tokens + self.weights.prompt_tokens, has_mask=True)
        return Step(
            LLAMA_3B_SHAPE, self.weights, batch, optimizers.ADAMW_FOREACH, Kernels(is_gpu=True), loss_head=LossHead.LOGITS, keeps_outputs=True, accumulation=1
        )


def _make_adapter_weights(**settings: object) -> TrainedWeights:
    return TrainedWeights(2, 2, False, **settings)  # type: ignore[arg-type]


IA3_LAYERS = frozenset({"k_proj", "v_proj", "down_proj"})
PUBLISHED_RUNS = (
    PublishedRun("full-finetuning--lr_0.00001", 38868615168, TrainedWeights(2, 2, True)),
    PublishedRun("lora--rank32", 22292725760, _make_adapter_weights(lora_rank=32, target_layers=ATTENTION_LAYERS)),
    PublishedRun("lora--rank64", 22552772608, _make_adapter_weights(lora_rank=64, target_layers=ATTENTION_LAYERS)),
    PublishedRun("lora--rank64-rslora", 22561161216, _make_adapter_weights(lora_rank=64, target_layers=ATTENTION_LAYERS)),
    PublishedRun("lora--rank10-target-mlp", 24698159104, _make_adapter_weights(lora_rank=10, target_layers=FEED_FORWARD_LAYERS)),
    PublishedRun("lora--rank32-dora", 24532484096, _make_adapter_weights(lora_rank=32, target_layers=ATTENTION_LAYERS, is_dora=True)),
    PublishedRun("ia3--default", 23234347008, _make_adapter_weights(ia3_layers=IA3_LAYERS, ia3_input_layers=frozenset({"down_proj"}))),
    PublishedRun("ia3--lr_0.001", 23234347008, _make_adapter_weights(ia3_layers=IA3_LAYERS, ia3_input_layers=frozenset({"down_proj"}))),
    PublishedRun("ia3--all-attn-5k-lr0.005", 26145193984, _make_adapter_weights(ia3_layers=ALL_LAYERS, ia3_input_layers=FEED_FORWARD_LAYERS)),
    PublishedRun("prompt_tuning--default", 24394072064, _make_adapter_weights(prompt_tokens=200)),
    PublishedRun("prompt_tuning--lr_0.001", 24394072064, _make_adapter_weights(prompt_tokens=200)),
    PublishedRun("prompt_tuning--sample_vocab-lr_0.001", 24410849280, _make_adapter_weights(prompt_tokens=200)),
    PublishedRun("prefixtuning--lr_0.001", 21952987136, _make_adapter_weights(prefix_tokens=200)),
    PublishedRun("prefixtuning--lr_0.005_zero_init", 21952987136, _make_adapter_weights(prefix_tokens=200)),
    PublishedRun("prefixtuning--tokens50-init_prefix-lr_0.005", 20585644032, _make_adapter_weights(prefix_tokens=50)),
)
