"""Variable-length attention computes the same as sdpa on packed sequences. The GPU kernel is replaced by plain torch operations."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_api.errors import FineTuneError
from finetune_trainer import attention
from finetune_trainer.attention import PADDING_FREE_NOTE, VARLEN_ATTENTION, compute_varlen_attention, create_varlen_mask
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import RestoredCheckpoint
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig
from transformers.masking_utils import causal_mask_function
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.support.learning import TEN_ROWS, make_run, merge_mappings, run_training
from tests.support.slices import quick_slice

pytestmark = pytest.mark.pod
CPU = torch.device("cpu")
MODEL_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = 5
MIXED_LAYERS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, **MIXED_LAYERS},
    "qwen3": {},
    "gemma3_text": {"query_pre_attn_scalar": 20, **MIXED_LAYERS},
}
"""For each type of model: the options of a small model. Three of the models have layers with a sliding window."""
DOCUMENTS = [
    [3 + (7 * row + 5 * i) % 60 for i in range(length)] for row, length in enumerate((7, 1, 12, WINDOW, WINDOW + 1))
]


class DocumentKernel:
    """Replaces the GPU kernel `varlen_attn`: computes each document alone with plain torch, and records the window of each call."""

    def __init__(self, *, mixes_documents: bool = False):
        self.mixes_documents = mixes_documents
        self.windows: list[tuple[int, int]] = []

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        call_arguments = inspect.signature(torch.nn.attention.varlen.varlen_attn).bind(*args, **options).arguments
        query, key, value, starts = (call_arguments[name] for name in ("query", "key", "value", "cu_seq_q"))
        assert call_arguments["cu_seq_k"] is starts and starts.dtype == torch.int32
        assert all(
            type(call_arguments[name]) is int and call_arguments[name] == int(starts.diff().max())
            for name in ("max_q", "max_k")
        )
        before, after = call_arguments["window_size"]
        assert after == 0
        self.windows.append((before, after))
        boundaries = [0, len(query)] if self.mixes_documents else starts.tolist()
        groups = query.shape[1] // key.shape[1]
        document_outputs = []
        for start, end in pairwise(boundaries):
            q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
            k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
            distances = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
            is_visible = (distances >= 0) & ((distances <= before) | (before < 0))
            # The products are computed as sums, because oneDNN's matrix products in 16 bits need instructions that some CPUs lack.
            scores = (q[:, :, None] * k[:, None]).sum(-1) * (call_arguments.get("scale") or q.shape[-1] ** -0.5)
            weights = scores.masked_fill(~is_visible, -torch.inf).softmax(-1)
            document_outputs.append((weights[..., None] * v[:, None]).sum(2).transpose(0, 1))
        return torch.cat(document_outputs).to(query.dtype)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> DocumentKernel:
    """Replace the kernel by a `DocumentKernel` that the trainer may also use on a CPU and in 32 bits."""
    return install_kernel(monkeypatch, DocumentKernel())


def install_kernel(monkeypatch: pytest.MonkeyPatch, kernel: DocumentKernel) -> DocumentKernel:
    """Let the trainer use this kernel on every device, in 32 bits and in bf16. Returns the kernel."""
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "device_has_kernel", lambda device: True)
    monkeypatch.setattr(attention, "KERNEL_DTYPES", (torch.float32, torch.bfloat16))
    return kernel


def build_model(
    name: str, implementation: str, *, lora: bool = False, gradient_checkpointing: bool = False, **options: Any
) -> Any:
    """Create a small model with this attention implementation. Its weights do not depend on the implementation."""
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**MODEL_SIZES, **MODELS[name], **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model


def collate(documents: list[list[int]], *, packed: bool = True) -> dict[str, Any]:
    """Return a batch with the documents in one packed row, or in one padded row each."""
    batch: dict[str, Any] = DataCollatorForLanguageModeling(0, padding_free=packed)(
        [{"input_ids": ids} for ids in documents]
    )
    return batch


def compute_loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_training(model: Any, expected_model: Any, batch: dict[str, Any]) -> None:
    """Check that two models have the same loss and the same gradients for a batch."""
    loss, gradients = compute_loss_and_gradients(model, batch)
    expected_loss, expected_gradients = compute_loss_and_gradients(expected_model, batch)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all activations kept", "gradient checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_trains_like_sdpa(name: str, lora: bool, checkpointing: bool, kernel: DocumentKernel) -> None:
    options: dict[str, Any] = {"lora": lora, "gradient_checkpointing": checkpointing}
    assert_same_training(build_model(name, VARLEN_ATTENTION, **options), build_model(name, "sdpa", **options), collate(DOCUMENTS))
    windows_by_model = {
        "mistral": [(WINDOW - 1, 0)] * 2,
        "qwen2": [(WINDOW - 1, 0), (-1, 0)],
        "gemma3_text": [(WINDOW - 1, 0), (-1, 0)],
    }
    forward_windows = windows_by_model.get(name, [(-1, 0), (-1, 0)])
    recomputed_windows = forward_windows[::-1] if checkpointing else []  # the backward pass recomputes the last layer first
    assert kernel.windows == forward_windows + recomputed_windows


def test_a_document_is_computed_independently_of_the_other_documents(kernel: DocumentKernel) -> None:
    model = build_model("mistral", VARLEN_ATTENTION)
    with torch.no_grad():
        packed_logits = model(**collate(DOCUMENTS), use_cache=False).logits[0]
        single_logits = torch.cat([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in DOCUMENTS])
    torch.testing.assert_close(packed_logits, single_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "opt"])
def test_learned_positions_restart_in_each_row(name: str, kernel: DocumentKernel) -> None:
    """The rows of the batch together are longer than the model's table of positions."""
    attention.register()
    torch.manual_seed(0)
    no_dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0}
    sizes = {"word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 16}
    config = AutoConfig.for_model(name, **{**MODEL_SIZES, **no_dropout, **sizes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN_ATTENTION).eval()
    assert sum(map(len, DOCUMENTS)) > 16 and attention.separates_rows_by_position(config)
    with torch.no_grad():
        packed_logits = model(**collate(DOCUMENTS), use_cache=False).logits[0]
        single_logits = torch.cat([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in DOCUMENTS])
    assert len(kernel.windows) == 2
    torch.testing.assert_close(packed_logits, single_logits, atol=1e-5, rtol=1e-5)


def test_without_the_kernel_the_model_computes_with_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has no kernel, so sdpa computes the attention."""
    monkeypatch.setattr(attention, "varlen_attn", None)
    for name in MODELS:
        for packed in (True, False):
            assert_same_training(
                build_model(name, VARLEN_ATTENTION), build_model(name, "sdpa"), collate(DOCUMENTS, packed=packed)
            )


@pytest.mark.parametrize(
    "options",
    [{"attention_dropout": 0.2}, {"head_dim": 12}, {"head_dim": 264}],
    ids=["dropout", "head size not a multiple of 8", "large heads"],
)
def test_unsupported_models_use_sdpa(options: dict[str, Any], kernel: DocumentKernel) -> None:
    varlen_model, sdpa_model = (build_model("llama", name, **options) for name in (VARLEN_ATTENTION, "sdpa"))
    varlen_model, sdpa_model = (model.eval() if "attention_dropout" in options else model for model in (varlen_model, sdpa_model))
    assert_same_training(varlen_model, sdpa_model, collate(DOCUMENTS))
    assert kernel.windows == []


def test_padded_batches_and_generation_use_sdpa(kernel: DocumentKernel) -> None:
    varlen_model, sdpa_model = (build_model("mistral", name) for name in (VARLEN_ATTENTION, "sdpa"))
    assert_same_training(varlen_model, sdpa_model, collate(DOCUMENTS, packed=False))
    prompt = torch.tensor([DOCUMENTS[2]])
    for mask in (None, torch.ones_like(prompt)):
        generated_ids = [
            model.eval().generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
            for model in (varlen_model, sdpa_model)
        ]
        assert generated_ids[0].tolist() == generated_ids[1].tolist()
    assert kernel.windows == []


MASK_ARGUMENTS: dict[str, Any] = {
    "config": LlamaConfig(**MODEL_SIZES), "batch_size": 1, "q_length": 8, "kv_length": 8, "q_offset": 0, "kv_offset": 0, "mask_function": causal_mask_function,
    "attention_mask": None, "allow_is_causal_skip": False, "dtype": torch.float32, "use_vmap": False, "device": CPU,
}  # fmt: skip
SDPA_MASK_CASES: dict[str, dict[str, Any]] = {
    "several rows": {"batch_size": 2},
    "padding": {"attention_mask": torch.ones(1, 8, dtype=torch.bool)},
    "cached keys": {"q_length": 2, "q_offset": 6},
    "mask changed by the model": {"use_vmap": True},
    "bidirectional": {"allow_is_bidirectional_skip": False},
    "chunks": {"local_size": 4},
    "64 bits": {"dtype": torch.float64},
    "soft-capping": {"config": AutoConfig.for_model("gemma2", **MODEL_SIZES, attn_logit_softcapping=50.0)},
    "dropout": {"config": LlamaConfig(**MODEL_SIZES, attention_dropout=0.1)},
}


def test_a_packed_sequence_needs_no_mask(kernel: DocumentKernel) -> None:
    assert create_varlen_mask(**MASK_ARGUMENTS) is None
    assert (
        create_varlen_mask(**MASK_ARGUMENTS | {"config": AutoConfig.for_model("mistral", **MODEL_SIZES, sliding_window=4), "local_size": 4})
        is None
    )


@pytest.mark.parametrize("case", SDPA_MASK_CASES)
def test_inputs_that_the_kernel_does_not_support_have_the_mask_of_sdpa(case: str, kernel: DocumentKernel) -> None:
    mask = create_varlen_mask(**MASK_ARGUMENTS | SDPA_MASK_CASES[case])
    assert mask is not None and mask.shape[-1] == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_device_without_the_kernel_has_the_mask_of_sdpa(dtype: torch.dtype) -> None:
    assert create_varlen_mask(**MASK_ARGUMENTS | {"dtype": dtype}) is not None


def test_autocast_decides_the_data_type_of_the_kernel(monkeypatch: pytest.MonkeyPatch, kernel: DocumentKernel) -> None:
    """With 32-bit weights and autocast, rotary embeddings convert queries and keys to 32 bits. Under autocast, the kernel still computes in 16 bits."""
    monkeypatch.setattr(attention, "KERNEL_DTYPES", (torch.bfloat16,))
    query, key, value = make_random_heads(torch.float32)
    inputs = (ATTENTION_LAYER, query, key, value.to(torch.bfloat16), None)
    boundaries = {name: collate(DOCUMENTS)[name] for name in ("cu_seq_lens_q", "max_length_q")}
    assert create_varlen_mask(**MASK_ARGUMENTS) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert create_varlen_mask(**MASK_ARGUMENTS) is None
        output, _ = compute_varlen_attention(*inputs, **boundaries)
    assert output.dtype == torch.bfloat16 and len(kernel.windows) == 1
    expected_output, _ = compute_varlen_attention(ATTENTION_LAYER, query, key, value, None, **boundaries)
    assert len(kernel.windows) == 1
    torch.testing.assert_close(output.float(), expected_output, atol=0.05, rtol=0.05)


ATTENTION_LAYER: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
"""An attention layer with only the attributes that sdpa reads."""


def make_random_heads(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return random queries, keys and values for all tokens of DOCUMENTS, with four query heads and two key heads."""
    torch.manual_seed(0)
    return [torch.randn(1, heads, sum(map(len, DOCUMENTS)), 8, dtype=dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("described_by", ["boundaries", "positions"])
def test_the_attention_function_creates_a_missing_mask(
    described_by: str, window: int | None, kernel: DocumentKernel
) -> None:
    """The kernel does not support 64-bit inputs, so torch's attention runs instead. `compute_varlen_attention` creates the mask for torch's attention."""
    query, key, value = make_random_heads(torch.float64)
    batch = collate(DOCUMENTS)
    options = {"boundaries": ("cu_seq_lens_q", "max_length_q"), "positions": ("position_ids",)}[described_by]
    output, _ = compute_varlen_attention(
        ATTENTION_LAYER, query, key, value, None, sliding_window=window, **{name: batch[name] for name in options}
    )
    starts = batch["cu_seq_lens_q"]
    window_size = (-1 if window is None else window - 1, 0)
    expected_output = DocumentKernel()(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        starts,
        starts,
        *[batch["max_length_q"]] * 2,
        window_size=window_size,
    )
    assert kernel.windows == []
    torch.testing.assert_close(output[0], expected_output)


def test_a_window_longer_than_all_documents_is_not_passed_to_the_kernel(kernel: DocumentKernel) -> None:
    """A window that is longer than all documents has no effect. Without a window, the faster kernel of cuDNN can be used."""
    query, key, value = make_random_heads(torch.float32)
    batch = {name: collate(DOCUMENTS)[name] for name in ("cu_seq_lens_q", "max_length_q")}
    longest = max(map(len, DOCUMENTS))
    for window in (longest - 1, longest, longest + 1):
        compute_varlen_attention(ATTENTION_LAYER, query, key, value, None, sliding_window=window, **batch)
    assert kernel.windows == [(longest - 2, 0), (-1, 0), (-1, 0)]


UNSUPPORTED_LAYER_INPUTS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.1},
    "negative scale": {"scaling": -1.0},
    "not causal": {"is_causal": False},
    "soft-capping": {"softcap": 50.0},
    "sinks": {"s_aux": torch.zeros(4)},
    "position bias": {"position_bias": torch.zeros(1)},
    "paged cache": {"cache": object()},
    "longest document unknown": {"max_length_q": None},
    "mask given": {"attention_mask": torch.ones(1, 1, 31, 31, dtype=torch.bool)},
    "smaller values": {"value": torch.zeros(1, 2, 31, 4)},
    "odd head size": {name: torch.zeros(1, 2, 31, 12) for name in ("query", "key", "value")},
    "two rows": {name: torch.zeros(2, 2, 31, 8) for name in ("query", "key", "value")},
    "more keys than queries": {"key": torch.zeros(1, 2, 40, 8), "value": torch.zeros(1, 2, 40, 8)},
    "mixed data types": {"value": torch.zeros(1, 2, 31, 8, dtype=torch.bfloat16)},
}


@pytest.mark.parametrize("case", [None, *UNSUPPORTED_LAYER_INPUTS])
def test_the_kernel_is_called_only_for_inputs_that_it_supports(
    case: str | None, kernel: DocumentKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def sdpa(*arguments: Any, **options: Any) -> tuple[None, None]:
        calls.append(arguments)
        return None, None

    monkeypatch.setattr(attention, "sdpa_attention_forward", sdpa)
    query, key, value = make_random_heads(torch.float32)
    batch = {name: collate(DOCUMENTS)[name] for name in ("cu_seq_lens_q", "max_length_q")}
    arguments = {"query": query, "key": key, "value": value, "attention_mask": None, **batch}
    changes = UNSUPPORTED_LAYER_INPUTS[case] if case else {}
    compute_varlen_attention(ATTENTION_LAYER, **arguments | changes)
    assert (len(kernel.windows), len(calls)) == ((0, 1) if case else (1, 0))


def test_grouped_key_heads_work_with_both_versions_of_the_kernel() -> None:
    def kernel_of_torch_2_11(query: Any, *, scale: Any = None) -> None: ...
    def kernel_of_torch_2_15(query: Any, *, scale: Any = None, enable_gqa: bool = False) -> None: ...

    assert attention.gqa_options(kernel_of_torch_2_11) == {}
    assert attention.gqa_options(kernel_of_torch_2_15) == {"enable_gqa": True}


@pytest.mark.parametrize(
    ("capability", "hip", "has_kernel"),
    [((9, 0), None, True), ((8, 0), None, True), ((7, 5), None, False), ((9, 0), "7.2", False)],
)
def test_the_kernel_runs_on_nvidia_gpus_since_ampere(
    capability: tuple[int, int], hip: str | None, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    attention.device_has_kernel.cache_clear()
    assert attention.device_has_kernel(torch.device("cuda", 0)) is has_kernel
    assert attention.device_has_kernel(CPU) is False
    attention.device_has_kernel.cache_clear()


H100 = Hardware(torch.device("cuda", 0), "NVIDIA H100", torch.bfloat16, True, False, "sdpa")
LLAMA = LlamaConfig(**MODEL_SIZES)
PACKED: dict[str, Any] = {"dataset": {"packing": True}}
SPEC_CHOICES: dict[str, tuple[dict[str, Any], str, str, list[str]]] = {
    "packed": (PACKED, "sdpa", VARLEN_ATTENTION, []),
    "packed, sdpa requested": (PACKED | {"model": {"attention": "sdpa"}}, "sdpa", "sdpa", []),
    "packed, eager requested": (PACKED | {"model": {"attention": "eager"}}, "eager", "eager", []),
    "packed, flash attention installed": (PACKED | {"model": {"attention": "flashAttention2"}}, "flash_attention_2", "flash_attention_2", []),
    "packed, flash attention missing": (
        PACKED | {"model": {"attention": "flashAttention2"}}, "sdpa", VARLEN_ATTENTION,
        ["model.attention flashAttention2 is not available (flash-attn is not installed): varlen is used"],
    ),
    "not packed": ({}, "sdpa", VARLEN_ATTENTION, [PADDING_FREE_NOTE]),
    "not packed, sdpa requested": ({"model": {"attention": "sdpa"}}, "sdpa", "sdpa", []),
    "not packed, eager requested": ({"model": {"attention": "eager"}}, "eager", "eager", []),
    "not packed, flash attention installed": (
        {"model": {"attention": "flashAttention2"}}, "flash_attention_2", "flash_attention_2", [],
    ),
    "not packed, flash attention missing": (
        {"model": {"attention": "flashAttention2"}}, "sdpa", VARLEN_ATTENTION,
        [PADDING_FREE_NOTE, "model.attention flashAttention2 is not available (flash-attn is not installed): varlen is used"],
    ),
    "one row per batch": ({"training": {"batchSizePerDevice": 1}}, "sdpa", "sdpa", []),
    "prefix tuning": ({"method": {"type": "prefixTuning"}}, "sdpa", "sdpa", []),
    "prompt tuning": ({"method": {"type": "promptTuning"}}, "sdpa", "sdpa", []),
    "NEFTune": ({"training": {"neftuneNoiseAlpha": 5}}, "sdpa", "sdpa", []),
    "another objective": ({"trainer": {"type": "dpo"}}, "sdpa", "sdpa", []),
}  # fmt: skip


@pytest.mark.parametrize("case", SPEC_CHOICES)
def test_the_spec_decides_whether_varlen_is_chosen(case: str, kernel: DocumentKernel, tmp_path: Path) -> None:
    spec, hardware_attention, expected_attention, notes = SPEC_CHOICES[case]
    hardware = Hardware(H100.device, H100.name, H100.dtype, True, False, hardware_attention)
    run, _ = make_run(tmp_path, tmp_path, spec)
    assert attention.choose_attention(run, hardware, LLAMA) == (expected_attention, notes)
    assert attention.uses_padding_free_batches(run, expected_attention) is (PADDING_FREE_NOTE in notes)


CPU_HARDWARE = Hardware(CPU, "cpu", torch.float32, False, False, "sdpa")
GPU_IN_32_BITS = Hardware(H100.device, H100.name, torch.float32, False, False, "sdpa")
WEIGHT_FILES_DECIDE = Hardware(H100.device, H100.name, "auto", False, False, "sdpa")
MODEL_CHOICES: dict[str, tuple[Hardware, Any, str, str | None]] = {
    "cpu": (CPU_HARDWARE, LLAMA, "sdpa", None),
    "mps": (Hardware(torch.device("mps"), "mps", "auto", False, False, "sdpa"), LLAMA, "sdpa", None),
    "32 bits": (GPU_IN_32_BITS, LLAMA, "sdpa", "the run computes in 32 bits"),
    "16-bit files": (WEIGHT_FILES_DECIDE, LlamaConfig(**MODEL_SIZES, dtype="bfloat16"), VARLEN_ATTENTION, None),
    "32-bit files": (WEIGHT_FILES_DECIDE, LlamaConfig(**MODEL_SIZES, dtype="float32"), "sdpa", "the run computes in 32 bits"),
    "sliding window": (H100, AutoConfig.for_model("mistral", **MODEL_SIZES), VARLEN_ATTENTION, None),
    "soft-capping": (
        H100,
        AutoConfig.for_model("gemma3_text", **MODEL_SIZES, attn_logit_softcapping=50.0),
        "sdpa",
        "attn_logit_softcapping",
    ),
    "no sdpa": (
        H100,
        AutoConfig.for_model("gemma2", **MODEL_SIZES),
        "eager",
        "transformers does not support it for models of type gemma2",
    ),
    "no keyword arguments": (
        H100,
        AutoConfig.for_model("bloom"),
        "eager",
        "transformers does not support it for models of type bloom",
    ),
    "chunks": (
        H100,
        AutoConfig.for_model("llama4_text"),
        "sdpa",
        "transformers does not support it for models of type llama4_text",
    ),
    "images": (H100, AutoConfig.for_model("gemma3"), "sdpa", "models of type gemma3 have other inputs than text"),
    "dropout": (H100, LlamaConfig(**MODEL_SIZES, attention_dropout=0.1), "sdpa", "attention_dropout"),
    "dropout of GPT-2": (H100, AutoConfig.for_model("gpt2"), "sdpa", "attn_pdrop"),
    "GPT-2 without dropout": (H100, AutoConfig.for_model("gpt2", attn_pdrop=0.0), VARLEN_ATTENTION, None),
    "heads of different sizes": (H100, AutoConfig.for_model("gemma4_text"), "sdpa", "different attention settings"),
    "bidirectional": (
        H100,
        AutoConfig.for_model("gemma3_text", **MODEL_SIZES, use_bidirectional_attention=True),
        "sdpa",
        "is not causal",
    ),
    "large heads": (H100, LlamaConfig(**MODEL_SIZES | {"head_dim": 264}), "sdpa", "attention heads of size 264"),
    "odd heads": (H100, LlamaConfig(**MODEL_SIZES | {"head_dim": 12}), "sdpa", "attention heads of size 12"),
    "largest heads": (H100, LlamaConfig(**MODEL_SIZES | {"head_dim": 256}), VARLEN_ATTENTION, None),
    "latent attention": (H100, AutoConfig.for_model("deepseek_v3"), "sdpa", "v_head_dim"),
}


@pytest.mark.parametrize("case", MODEL_CHOICES)
def test_hardware_and_model_decide_whether_varlen_is_chosen(case: str, kernel: DocumentKernel, tmp_path: Path) -> None:
    hardware, config, expected_attention, reason = MODEL_CHOICES[case]
    chosen_attention, notes = attention.choose_attention(make_run(tmp_path, tmp_path, PACKED)[0], hardware, config)
    assert chosen_attention == expected_attention and len(notes) == (reason is not None) + (expected_attention == "eager")
    if expected_attention == "eager":
        assert notes[0].startswith("attention eager is used, because ")
    if reason is not None:
        assert reason in notes[-1] and notes[-1].endswith(f": {expected_attention} is used")


UNPACKED_CHOICES: dict[str, tuple[Hardware, Any, str]] = {
    "cpu": (CPU_HARDWARE, LLAMA, "sdpa"),
    "32 bits": (GPU_IN_32_BITS, LLAMA, "sdpa"),
    "sliding window": (H100, AutoConfig.for_model("mistral", **MODEL_SIZES), VARLEN_ATTENTION),
    "mixed layers": (H100, AutoConfig.for_model("gemma3_text", **MODEL_SIZES, **MIXED_LAYERS), VARLEN_ATTENTION),
    "soft-capping": (H100, AutoConfig.for_model("gemma3_text", **MODEL_SIZES, attn_logit_softcapping=50.0), "sdpa"),
    "ALiBi": (H100, AutoConfig.for_model("bloom"), "eager"),
    "dropout of GPT-2": (H100, AutoConfig.for_model("gpt2"), "sdpa"),
    "GPT-2 without dropout": (H100, AutoConfig.for_model("gpt2", attn_pdrop=0.0), VARLEN_ATTENTION),
    "OPT": (H100, AutoConfig.for_model("opt"), VARLEN_ATTENTION),
    "convolutions": (H100, AutoConfig.for_model("lfm2", full_attn_idxs=[1]), "sdpa"),
    "recurrence": (H100, AutoConfig.for_model("recurrent_gemma", hidden_size=64, num_attention_heads=4), "sdpa"),
    "linear attention": (H100, AutoConfig.for_model("minimax"), "sdpa"),
    "state space layers": (H100, AutoConfig.for_model("granitemoehybrid"), "sdpa"),
    "encoder": (H100, AutoConfig.for_model("roberta", attention_probs_dropout_prob=0.0), "sdpa"),
    "boundaries are not passed": (H100, AutoConfig.for_model("nemotron", head_dim=128), "sdpa"),
}


@pytest.mark.parametrize("case", UNPACKED_CHOICES)
def test_hardware_and_model_decide_whether_batches_are_padding_free(
    case: str, kernel: DocumentKernel, tmp_path: Path
) -> None:
    """A run with padded batches has no note about padding, because padding is the normal case."""
    hardware, config, expected_attention = UNPACKED_CHOICES[case]
    chosen_attention, notes = attention.choose_attention(make_run(tmp_path, tmp_path)[0], hardware, config)
    assert chosen_attention == expected_attention
    expected_notes = [PADDING_FREE_NOTE] if expected_attention == VARLEN_ATTENTION else []
    assert notes == expected_notes or (expected_attention == "eager" and "has no sdpa attention" in notes[0])


ADAPTERS: dict[str, tuple[str, bool]] = {
    "LoRA": ('{"peft_type": "LORA", "alora_invocation_tokens": null}', True),
    "IA3": ('{"peft_type": "IA3"}', True),
    "activated LoRA": ('{"peft_type": "LORA", "alora_invocation_tokens": [5, 6]}', False),
    "virtual tokens": ('{"peft_type": "CPT"}', False),
    "unreadable": ("{", False),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_type_of_an_existing_adapter_decides_whether_batches_are_padding_free(
    case: str, kernel: DocumentKernel, tmp_path: Path
) -> None:
    config_text, is_padding_free = ADAPTERS[case]
    (tmp_path / "adapter_config.json").write_text(config_text)
    run, _ = make_run(tmp_path, tmp_path, {"method": {"type": "adapter", "adapter": {"source": f"file://{tmp_path}"}}})
    assert attention.choose_attention(run, H100, LLAMA, tmp_path)[0] == (VARLEN_ATTENTION if is_padding_free else "sdpa")


def test_a_model_with_unknown_head_sizes_uses_sdpa(
    kernel: DocumentKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(attention, "passes_document_boundaries", lambda config: True)
    run, _ = make_run(tmp_path, tmp_path, PACKED)
    assert "is unknown" in (attention.reason_against_varlen(run, H100, PreTrainedConfig()) or "")


def test_an_old_gpu_uses_sdpa(tmp_path: Path) -> None:
    hardware = Hardware(CPU_HARDWARE.device, "Tesla T4", torch.float16, False, True, "sdpa")
    assert attention.reason_against_varlen(make_run(tmp_path, tmp_path, PACKED)[0], hardware, LLAMA) == (
        "torch has no variable-length kernel for Tesla T4"
    )


def test_a_model_with_its_own_code_uses_sdpa(kernel: DocumentKernel, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, tmp_path, merge_mappings(PACKED, {"model": {"trustRemoteCode": True}}))
    config = AutoConfig.for_model("llama", **MODEL_SIZES, auto_map={"AutoModelForCausalLM": "modeling.Own"})
    assert "trustRemoteCode" in (attention.reason_against_varlen(run, H100, config) or "")


@pytest.fixture
def choose_varlen(monkeypatch: pytest.MonkeyPatch) -> Callable[[DocumentKernel], DocumentKernel]:
    """Return a function that replaces the kernel and lets runs on the CPU choose `varlen`."""

    def install(kernel: DocumentKernel) -> DocumentKernel:
        monkeypatch.setattr(attention, "choose_attention", lambda *_: (VARLEN_ATTENTION, []))
        return install_kernel(monkeypatch, kernel)

    return install


@pytest.mark.parametrize(
    "spec",
    [
        {"method": {"type": "full"}},
        {"method": {"lora": {"dropout": 0}}, "training": {"gradientCheckpointing": "enabled"}},
        pytest.param({"method": {"lora": {"dropout": 0}}, "training": {"gradientCheckpointing": "disabled"}}, marks=pytest.mark.slow),
    ],
    ids=["full", "lora, gradient checkpointing", "lora"],
)
def test_a_packed_run_has_the_losses_of_sdpa(
    spec: dict[str, Any], model: Path, tmp_path: Path, choose_varlen: Callable[[DocumentKernel], DocumentKernel]
) -> None:
    packed_spec = merge_mappings(spec, PACKED | {"evaluation": {"strategy": "steps", "steps": 4}})
    rows = [
        {"text": f"{word} " * length} for length, word in enumerate(("red", "green", "blue", "yes", "no", "one"), 1)
    ]
    sdpa_outcome = run_training(tmp_path / "a", model, packed_spec, rows, validation=rows[:3])
    kernel = choose_varlen(DocumentKernel())
    varlen_outcome = run_training(tmp_path / "b", model, packed_spec, rows, validation=rows[:3])
    assert (sdpa_outcome.resolved["attention"], varlen_outcome.resolved["attention"]) == ("sdpa", VARLEN_ATTENTION) and kernel.windows
    assert varlen_outcome.losses == pytest.approx(sdpa_outcome.losses, abs=1e-5)
    assert varlen_outcome.grad_norms == pytest.approx(sdpa_outcome.grad_norms, rel=1e-4)
    assert varlen_outcome.eval_losses == pytest.approx(sdpa_outcome.eval_losses, abs=1e-5) and len(varlen_outcome.eval_losses) == 1


def test_a_kernel_that_mixes_documents_ends_the_run(
    model: Path, tmp_path: Path, choose_varlen: Callable[[DocumentKernel], DocumentKernel]
) -> None:
    choose_varlen(DocumentKernel(mixes_documents=True))
    with pytest.raises(FineTuneError) as caught:
        run_training(tmp_path, model, PACKED)
    assert caught.value.code == "PackingLeaks" and "attention varlen lets them attend to each other" in caught.value.message


def make_conversations(*lengths: int) -> list[dict[str, Any]]:
    """Return one conversation for each of `lengths`, whose answer has this number of words."""
    return [
        {"messages": [TEN_ROWS[i]["messages"][0], {"role": "assistant", "content": "red " * length}]}
        for i, length in enumerate(lengths)
    ]


ANSWER_LENGTHS = (1, 40, 3, 25, 2, 60, 9, 1, 30, 5)
TEXT_ROWS = [
    {"text": f"{word} " * length} for word, length in zip(("red", "green", "blue", "yes", "no"), ANSWER_LENGTHS, strict=False)
]
CHOICE_ROWS = [
    {
        "question": "one or more " * length,
        "options": {"A": row["messages"][1]["content"], "B": "y"},
        "answer": "AB"[i % 2],
    }
    for i, (row, length) in enumerate(zip(TEN_ROWS, ANSWER_LENGTHS, strict=True))
]
LORA: dict[str, Any] = {"method": {"lora": {"dropout": 0}}}
THREE_ROWS: dict[str, Any] = {
    "training": {"batchSizePerDevice": 3, "learningRate": 2e-4, "maxSteps": 4},
    "evaluation": {"strategy": "steps", "steps": 2},
}
"""Batches of three rows. The last batch of an epoch of ten rows, and of an evaluation, has only one row."""
PADDING_FREE_RUNS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "full, answers": ({"method": {"type": "full"}}, make_conversations(*ANSWER_LENGTHS)),
    "lora, answers": (LORA, make_conversations(*ANSWER_LENGTHS)),
    "lora, all tokens": (LORA, TEXT_ROWS),
    "full, multiple choice": ({"method": {"type": "full"}}, CHOICE_ROWS),
    "accumulation": (merge_mappings(LORA, {"training": {"gradientAccumulationSteps": 2}}), make_conversations(*ANSWER_LENGTHS)),
    "rows grouped by length": (merge_mappings(LORA, {"training": {"groupByLength": True}}), make_conversations(*ANSWER_LENGTHS)),
    "gradient checkpointing": (
        merge_mappings(LORA, {"training": {"gradientCheckpointing": "enabled"}}),
        make_conversations(*ANSWER_LENGTHS),
    ),
    "test set": (
        merge_mappings(LORA, {"dataset": {"split": {"test": 0.4}}, "evaluation": {"batchSizePerDevice": 3}}),
        make_conversations(*ANSWER_LENGTHS),
    ),
    "eva": ({"method": {"lora": {"dropout": 0, "init": "eva", "rank": 2}}}, make_conversations(*ANSWER_LENGTHS)),
}


QUICK_PADDING_FREE_RUNS = ("full, answers", "accumulation", "gradient checkpointing", "test set")


@pytest.mark.parametrize("case", quick_slice(PADDING_FREE_RUNS, QUICK_PADDING_FREE_RUNS))
def test_a_padding_free_run_has_the_losses_of_a_padded_run(
    case: str, model: Path, tmp_path: Path, choose_varlen: Callable[[DocumentKernel], DocumentKernel]
) -> None:
    spec, rows = PADDING_FREE_RUNS[case]
    spec = merge_mappings(THREE_ROWS, spec)
    padded_outcome = run_training(tmp_path / "a", model, spec, rows, validation=rows)
    kernel = choose_varlen(DocumentKernel())
    padding_free_outcome = run_training(tmp_path / "b", model, spec, rows, validation=rows)
    assert (padded_outcome.resolved["attention"], padding_free_outcome.resolved["attention"]) == ("sdpa", VARLEN_ATTENTION) and kernel.windows
    assert padding_free_outcome.losses == pytest.approx(padded_outcome.losses, abs=1e-5) and len(padding_free_outcome.losses) == 4
    assert padding_free_outcome.grad_norms == pytest.approx(padded_outcome.grad_norms, rel=1e-4)
    assert padding_free_outcome.eval_losses == pytest.approx(padded_outcome.eval_losses, abs=1e-5) and len(padding_free_outcome.eval_losses) == 2
    shares, padded_shares = (
        [line["padding_share"] for line in outcome.logs if "loss" in line] for outcome in (padding_free_outcome, padded_outcome)
    )
    assert set(shares) == {0.0} and max(padded_shares) > 0.2
    for name in ("num_tokens", "eval_mean_token_accuracy", "eval_answer_accuracy"):
        logged_values, padded_values = ([line.get(name) for line in outcome.logs] for outcome in (padding_free_outcome, padded_outcome))
        assert logged_values == pytest.approx(padded_values)
    assert padding_free_outcome.extra.get("evaluation", {}) == pytest.approx(padded_outcome.extra.get("evaluation", {}), abs=1e-5)


def test_padding_free_batches_have_the_load_balance_loss_of_padded_batches(
    model: Path, tmp_path: Path, choose_varlen: Callable[[DocumentKernel], DocumentKernel]
) -> None:
    """The load balance loss of a mixture of experts covers all tokens except padding."""
    folder = tmp_path / "experts"
    shutil.copytree(model, folder)
    torch.manual_seed(0)
    sizes = {**MODEL_SIZES, "vocab_size": 448, "pad_token_id": 3, "max_position_embeddings": 512}
    config = AutoConfig.for_model("mixtral", **sizes, num_local_experts=4, router_aux_loss_coef=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    spec = merge_mappings(THREE_ROWS, {"method": {"type": "full"}, "training": {"gradientAccumulationSteps": 2}})
    padded_outcome = run_training(tmp_path / "a", folder, spec, make_conversations(*ANSWER_LENGTHS), validation=TEXT_ROWS)
    choose_varlen(DocumentKernel())
    outcome = run_training(tmp_path / "b", folder, spec, make_conversations(*ANSWER_LENGTHS), validation=TEXT_ROWS)
    assert outcome.losses == pytest.approx(padded_outcome.losses, abs=1e-5)
    assert outcome.grad_norms == pytest.approx(padded_outcome.grad_norms, rel=1e-4)
    assert outcome.eval_losses == pytest.approx(padded_outcome.eval_losses, abs=1e-5)


def test_a_resumed_padding_free_run_continues_with_the_same_losses(
    model: Path, tmp_path: Path, choose_varlen: Callable[[DocumentKernel], DocumentKernel]
) -> None:
    choose_varlen(DocumentKernel())
    rows = make_conversations(*ANSWER_LENGTHS)
    spec = merge_mappings(merge_mappings(THREE_ROWS, LORA), {"checkpoint": {"strategy": "steps", "steps": 2}})
    whole_outcome = run_training(tmp_path / "a", model, spec, rows, validation=rows)
    checkpoint = RestoredCheckpoint(path=tmp_path / "a" / "out" / "checkpoint-2", step=2, uri="file:///x")
    resumed_outcome = run_training(tmp_path / "b", model, spec, rows, validation=rows, restore=checkpoint)
    assert resumed_outcome.losses == whole_outcome.losses[2:] and len(resumed_outcome.losses) == 2
    token_counts, whole_token_counts = ([line["num_tokens"] for line in outcome.logs if "loss" in line] for outcome in (resumed_outcome, whole_outcome))
    assert token_counts == whole_token_counts[2:]


def test_a_prefix_tuning_run_stays_padded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer chooses the attention as on a GPU that has the kernel."""
    kernel = install_kernel(monkeypatch, DocumentKernel())
    original_choose = attention.choose_attention
    monkeypatch.setattr(attention, "choose_attention", lambda run, hardware, *options: original_choose(run, H100, *options))
    spec = merge_mappings(THREE_ROWS, {"method": {"type": "prefixTuning", "promptLength": 4}})
    outcome = run_training(tmp_path / "a", model, spec, make_conversations(*ANSWER_LENGTHS), validation=make_conversations(*ANSWER_LENGTHS))
    assert outcome.resolved["attention"] == "sdpa" and not kernel.windows and PADDING_FREE_NOTE not in outcome.notes
    chosen_outcome = run_training(tmp_path / "b", model, merge_mappings(THREE_ROWS, LORA), make_conversations(*ANSWER_LENGTHS), validation=TEXT_ROWS)
    assert chosen_outcome.resolved["attention"] == VARLEN_ATTENTION and kernel.windows and PADDING_FREE_NOTE in chosen_outcome.notes


def test_a_kernel_that_mixes_rows_ends_a_padding_free_run(
    model: Path, tmp_path: Path, choose_varlen: Callable[[DocumentKernel], DocumentKernel]
) -> None:
    choose_varlen(DocumentKernel(mixes_documents=True))
    with pytest.raises(FineTuneError) as caught:
        run_training(tmp_path, model, THREE_ROWS, validation=TEN_ROWS)
    assert caught.value.code == "PackingLeaks" and "rows of a padding-free batch" in caught.value.message
    assert "model.attention: sdpa" in (caught.value.hint or "")
