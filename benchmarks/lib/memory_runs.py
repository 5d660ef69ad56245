"""Small training runs on a CPU with random configurations: measures their peak of memory, and describes them for the memory plan."""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.memory import optimizers
from finetune_api.memory.architecture import parse_model_shape
from finetune_api.memory.heads import LossHead
from finetune_api.memory.layers import Batch, Kernels, TrainedWeights
from finetune_api.memory.replay import Step

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "mixtral")
METHODS = ("full", "lora", "qlora")
PRECISIONS = ("float32", "bfloat16", "autocast")
"""`bfloat16`: 16-bit weights. `autocast`: 32-bit weights, and for LoRA either 16-bit or 32-bit base weights, computed in bfloat16."""
OPTIMIZERS = {"adamw": optimizers.ADAMW_FUSED, "sgd": optimizers.SGD, "adafactor": optimizers.ADAFACTOR}
ALL_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET_MODULE_CHOICES = (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ALL_LINEAR_LAYERS)
STEP_COUNT = 2


@dataclass(frozen=True)
class SmallRun:
    """The configuration of one small run, which follows from its seed."""

    seed: int
    family: str
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    ties_embeddings: bool
    method: str
    rank: int
    target_modules: tuple[str, ...]
    uses_dropout: bool
    precision: str
    base_bytes: int
    """Bytes of each value of the base model's weights, before quantisation."""
    optimizer: str
    recomputes: bool
    packs: bool
    rows: int
    tokens: int
    loss_head: str
    attention: str
    accumulation: int

    @staticmethod
    def draw(seed: int) -> SmallRun:
        """Draw a random configuration with the seed `seed`. After a change of this function, `memory_peaks.json` must be measured again."""
        rng = random.Random(seed)
        family, method = rng.choice(FAMILIES), rng.choice(METHODS)
        heads, head_size = rng.choice((2, 4, 8)), rng.choice((32, 64))
        hidden = heads * head_size if family in ("llama", "qwen2", "mixtral") else rng.choice((128, 192, 256, 384))
        precision = rng.choice(PRECISIONS)
        packs = rng.random() < 0.4
        target_modules = rng.choice(TARGET_MODULE_CHOICES[:2] if family == "mixtral" else TARGET_MODULE_CHOICES)
        base_bytes = {"float32": 4, "bfloat16": 2, "autocast": 4 if method == "full" else rng.choice((2, 4))}[precision]
        return SmallRun(
            seed, family, hidden, rng.randrange(2, 5) * hidden, rng.randrange(2, 6), heads, rng.choice([count for count in (1, 2, 4, 8) if count <= heads]),
            head_size, rng.choice((512, 2000, 4000, 8000)), rng.random() < 0.5, method, rng.choice((4, 16, 32)), target_modules,
            rng.random() < 0.3, precision, base_bytes, rng.choice(tuple(OPTIMIZERS)), rng.random() < 0.5, packs, 1 if packs else rng.randrange(1, 5),
            rng.choice((96, 128, 192, 256, 384)), rng.choice(("tiles", "logits", "logits")), "eager" if rng.random() < 0.15 else "sdpa", rng.choice((1, 1, 2)),
        )  # fmt: skip

    def make_config(self) -> dict[str, Any]:
        """Return the content of the model's `config.json`."""
        config_values: dict[str, Any] = {
            "model_type": self.family, "hidden_size": self.hidden, "intermediate_size": self.feed_forward, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.key_heads, "head_dim": self.head_size, "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.ties_embeddings, "max_position_embeddings": 4096, "dtype": "float32" if self.base_bytes == 4 else "bfloat16",
        }  # fmt: skip
        return config_values | ({"num_local_experts": 4, "num_experts_per_tok": 2} if self.family == "mixtral" else {})

    def as_step(self) -> Step:
        """Return the memory plan's description of the run."""
        is_full = self.method == "full"
        weights = TrainedWeights(
            0.5 + 4 / 64 if self.method == "qlora" else self.base_bytes, self.base_bytes, is_full, lora_rank=self.rank,
            target_layers=frozenset() if is_full else frozenset(self.target_modules), has_dropout=self.uses_dropout and not is_full,
        )  # fmt: skip
        # A batch of one row needs no mask, because it has no padding. But a packed row has several documents, and eager attention always gets a mask.
        batch = Batch(self.rows, self.tokens, has_mask=self.packs or self.rows > 1 or self.attention == "eager")
        return Step(
            parse_model_shape(self.make_config()), weights, batch, OPTIMIZERS[self.optimizer], Kernels(is_gpu=False, attention=self.attention),
            autocast_bytes=2 if self.precision == "autocast" else None, quantized_compute_bytes=self.compute_bytes,
            loss_head=LossHead(self.loss_head), recomputed_layer_count=self.layers if self.recomputes else 0, accumulation=self.accumulation,
        )  # fmt: skip

    @property
    def compute_bytes(self) -> int:
        """Bytes of each value in the computation of quantised layers."""
        return 4 if self.precision == "float32" else 2


def measure_peak(run: SmallRun) -> int:
    """Train `STEP_COUNT` steps and return the peak of torch's allocated memory in bytes."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.manual_seed(run.seed)
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model = _create_model(run)
            optimizer = _create_optimizer(run, [parameter for parameter in model.parameters() if parameter.requires_grad])
            batches = [_create_batch(run) for _ in range(run.accumulation)]
            gc.collect()
            with record_function("training"):
                for _ in range(STEP_COUNT):
                    _train_step(run, model, optimizer, batches)
    finally:
        gc.enable()
    return find_peak_bytes(profiler.profiler.kineto_results.experimental_event_tree())


def summarise_errors(peaks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of runs, the number within 5 %, and the median and the largest relative error of the estimates."""
    relative_errors = sorted(abs(peak["expectedBytes"] / peak["measuredBytes"] - 1) for peak in peaks)
    return {
        "runs": len(relative_errors), "within5Percent": sum(error <= 0.05 for error in relative_errors),
        "medianError": round(statistics.median(relative_errors), 5), "worstError": round(relative_errors[-1], 5),
    }  # fmt: skip


def find_peak_bytes(events: Any) -> int:
    """Return the largest number of bytes that were allocated at one time after the start of the event `training`."""
    allocations: list[tuple[int, int]] = []
    training_start_ns = 0
    remaining_events = list(events)
    while remaining_events:
        event = remaining_events.pop()
        if event.name == "training":
            training_start_ns = event.start_time_ns
        if event.tag.name == "Allocation":
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
        remaining_events += event.children
    live_bytes = peak_bytes = 0
    for time_ns, size_bytes in sorted(allocations, key=lambda allocation: allocation[0]):
        live_bytes += size_bytes
        peak_bytes = max(peak_bytes, live_bytes) if time_ns >= training_start_ns else peak_bytes
    return peak_bytes


def _create_model(run: SmallRun) -> Any:
    from trl.trainer.utils import add_fused_lm_head

    model = create_base_model(run)
    if run.loss_head == "tiles":
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if run.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if run.method != "full":
            model.enable_input_require_grads()
    if run.method != "full":
        model = add_adapter(run, model)
    return model.train()


def create_base_model(run: SmallRun, **options: Any) -> Any:
    """Create a language model with random weights, quantised for QLoRA. With the option `num_labels`, create a sequence classifier."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    dtype = torch.float32 if run.base_bytes == 4 else torch.bfloat16
    model_class = AutoModelForSequenceClassification if "num_labels" in options else AutoModelForCausalLM
    config_values = run.make_config() | options
    config = AutoConfig.for_model(config_values.pop("model_type"), **config_values)
    model = model_class.from_config(config, dtype=dtype, attn_implementation=run.attention)
    if run.method == "qlora":
        compute_dtype = torch.float32 if run.compute_bytes == 4 else torch.bfloat16
        quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = model_class.from_pretrained(
                folder, dtype=dtype, attn_implementation=run.attention, quantization_config=quantization_config, device_map={"": "cpu"}
            )
        for parameter in model.parameters():  # unquantised weights are views of the mapped file; without a copy, the whole file would stay in memory
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
        for module in model.modules():  # as the trainer does
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def add_adapter(run: SmallRun, model: Any) -> Any:
    """Freeze a model and add a trained LoRA adapter."""
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dropout = 0.05 if run.uses_dropout else 0.0
    task_type = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    return get_peft_model(
        model, LoraConfig(task_type=task_type, r=run.rank, lora_alpha=16, lora_dropout=dropout, target_modules=list(run.target_modules))
    )


def _create_optimizer(run: SmallRun, parameters: list[Any]) -> Any:
    import torch
    from transformers.optimization import Adafactor

    if run.optimizer == "adafactor":
        return Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True) if run.optimizer == "adamw" else torch.optim.SGD(parameters, lr=1e-4)


def _create_batch(run: SmallRun) -> dict[str, Any]:
    """Return a batch of random tokens: one packed row with three documents, or padded rows."""
    import torch

    token_ids = torch.randint(0, run.vocabulary, (run.rows, run.tokens))
    if run.packs:
        document_positions = [torch.arange(length) for length in (run.tokens // 3, run.tokens // 3, run.tokens - 2 * (run.tokens // 3))]
        return {"input_ids": token_ids, "labels": token_ids.clone(), "position_ids": torch.cat(document_positions)[None]}
    attention_mask = torch.ones_like(token_ids)
    for row in range(1, run.rows):
        attention_mask[row, run.tokens - row * 7 :] = 0
    return {"input_ids": token_ids, "labels": token_ids.masked_fill(attention_mask == 0, -100), "attention_mask": attention_mask}


def _train_step(run: SmallRun, model: Any, optimizer: Any, batches: list[dict[str, Any]]) -> None:
    import torch

    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "autocast"):
            model_options = {"fused_lm_head": True} if run.loss_head == "tiles" else {}
            loss = model(**batch, use_cache=False, **model_options).loss
        loss.backward()
        del loss
    torch.nn.utils.clip_grad_norm_([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
