"""Attention for packed sequences and padding-free batches with torch's variable-length kernel, registered with transformers as `varlen`.

A packed sequence holds several documents. A padding-free batch is also a sequence of several documents: its rows are concatenated instead of padded.
With sdpa, transformers describes the documents by a mask over all pairs of tokens. Flash kernels do not accept such a mask. torch's `varlen_attn`
receives the boundaries of the documents instead of a mask. TRL's collator adds the boundaries to each batch (`cu_seq_lens_q`, `max_length_q`), and
transformers passes them to every attention layer.

transformers creates one mask per forward pass and then calls the attention function in each layer. `create_varlen_mask` creates no mask if the
kernel can compute the batch. `compute_varlen_attention` calls the kernel, or sdpa in all other cases.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.rules import PROMPT_METHODS, method_type_of, trainer_type_of, value_or_default
from finetune_api.spec.enums import AttentionImplementation, TrainerType
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import find_packed_sequence_indices, sdpa_mask

from finetune_trainer.hardware import FLASH_ATTENTION, Hardware
from finetune_trainer.library_internals import passes_document_boundaries, supports_sdpa

FULL_ATTENTION = "full_attention"
"""transformers' name for layers whose tokens attend to all previous tokens."""
VARLEN_ATTENTION = "varlen"
"""Name of this module's attention implementation in transformers and in the status."""
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""Data types that the kernel computes in."""
MAX_HEAD_SIZE = 256
HEAD_SIZE_MULTIPLE = 8
"""The kernel needs head sizes that are multiples of this number. For other head sizes, sdpa is used, which pads the heads."""
MIN_COMPUTE_CAPABILITY = (8, 0)
ATTENTION_DROPOUT_FIELDS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
"""Fields of model configurations that hold the probability of attention dropout."""

ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention"}
"""The layer types in model configurations whose layers compute attention, and no recurrence or convolution over the tokens."""
MODEL_TYPES_WITH_LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "opt")
"""Model types without rotary embeddings that use the position ids of a padding-free batch."""
MODEL_TYPES_WITHOUT_BOUNDARIES = ("nemotron",)
"""Model types whose layers do not pass the boundaries of the rows to the attention function, so that only sdpa can compute their batches."""
PADDING_FREE_NOTE = (
    f"the rows of a batch are concatenated instead of padded, because attention {VARLEN_ATTENTION} keeps them separate: the loss is the same, and no "
    "time is spent on padding"
)


def gqa_options(kernel: Callable[..., Any]) -> dict[str, bool]:
    """Return the arguments that let the kernel accept fewer key heads than query heads.

    torch 2.11 needs no argument for this, and torch 2.15 needs `enable_gqa`.
    """
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}


GQA_OPTIONS: dict[str, Any] = gqa_options(varlen_attn)


def register() -> None:
    """Register `varlen` with transformers, so that models can be loaded with it."""
    AttentionInterface.register(VARLEN_ATTENTION, compute_varlen_attention)
    AttentionMaskInterface.register(VARLEN_ATTENTION, create_varlen_mask)


def choose_attention(
    run: RunConfig, hardware: Hardware, config: Any, adapter: Path | None = None
) -> tuple[str, list[str]]:
    """Return transformers' name of the attention implementation for this model, and notes for the status.

    SFT runs on a GPU use `varlen` for packed sequences or padding-free batches, unless the spec requests `sdpa`, `eager` or an installed
    flash attention. `config`: the model's configuration; `adapter`: folder of the adapter that the run continues to train, if any.
    Errors: ConfigError AttentionUnavailable, ContextParallelUnsupported.
    """
    requested_attention = run.spec.model.attention or AttentionImplementation.AUTO
    ranks_per_sequence = run.spec.distributed.context_parallel_size or 1
    if ranks_per_sequence > 1:
        require_divisible_attention(config, ranks_per_sequence)
        return "sdpa", []
    attention, notes = require_supported_attention(run, config, hardware.attention)
    is_sdpa_or_eager_requested = requested_attention in (AttentionImplementation.SDPA, AttentionImplementation.EAGER)
    if is_sdpa_or_eager_requested or attention == FLASH_ATTENTION:
        return attention, notes
    is_on_gpu = hardware.device.type == "cuda"
    if is_on_gpu and trainer_type_of(run.spec) is TrainerType.SFT:
        is_packed = run.spec.dataset.packing is True
        reason = reason_against_varlen(run, hardware, config)
        if reason is None and (is_packed or can_concatenate_rows(run, config, adapter)):
            attention = VARLEN_ATTENTION
            notes += [] if is_packed else [PADDING_FREE_NOTE]
        elif is_packed:
            notes.append(f"dataset.packing is faster with attention {VARLEN_ATTENTION}, but {reason}: {attention} is used")
    if requested_attention is AttentionImplementation.FLASH_ATTENTION_2:
        reason = "flash-attn is not installed" if is_on_gpu else "the run uses no GPU"
        notes.append(f"model.attention flashAttention2 is not available ({reason}): {attention} is used")
    return attention, notes


def require_divisible_attention(config: Any, rank_count: int) -> None:
    """Refuse models whose attention heads cannot be divided among `rank_count` ranks. Errors: ConfigError ContextParallelUnsupported."""
    text_config = config.get_text_config()
    head_count, key_head_count = getattr(text_config, "num_attention_heads", None), getattr(text_config, "num_key_value_heads", None)
    layer_types = set(getattr(text_config, "layer_types", None) or [FULL_ATTENTION])
    sliding_window = getattr(text_config, "sliding_window", None) if not getattr(text_config, "layer_types", None) else None
    hint = f"write `contextParallelSize: 1`, or choose a model of another type than {config.model_type}"
    if not head_count or not key_head_count:
        problem = f"models of type {config.model_type} have no attention heads that the ranks could share"
    elif layer_types != {FULL_ATTENTION} or sliding_window:
        unsupported_kinds = ", ".join(sorted(layer_types - {FULL_ATTENTION})) or f"a sliding window of {sliding_window} tokens"
        problem = f"the model has attention layers that do not attend to all previous tokens: {unsupported_kinds}"
    elif head_count % rank_count or (key_head_count % rank_count and rank_count % key_head_count):
        problem = f"the model has {head_count} attention heads and {key_head_count} key-value heads, which {rank_count} ranks cannot share equally"
        possible_rank_counts = [
            str(count) for count in range(2, head_count + 1)
            if head_count % count == 0 and (key_head_count % count == 0 or count % key_head_count == 0)
        ]
        hint = f"write one of {', '.join(possible_rank_counts)}, or 1" if possible_rank_counts else "write `contextParallelSize: 1`"
    else:
        return
    raise ConfigError("ContextParallelUnsupported", f"distributed.contextParallelSize is {rank_count}, but {problem}", hint=hint)


def require_supported_attention(run: RunConfig, config: Any, attention: str) -> tuple[str, list[str]]:
    """Return the attention implementation to use, and notes for the status.

    The result is `attention`, unless `attention` is sdpa and transformers has no sdpa for this type of model. In that case, the result is `eager`.
    Types without sdpa are, for example, Gemma 2 (limited scores), GPT-OSS (attention sinks) and Mamba 2 (no attention).
    Errors: ConfigError AttentionUnavailable if the spec requests sdpa.
    """
    if attention != "sdpa" or supports_sdpa(config):
        return attention, []
    if run.spec.model.attention is AttentionImplementation.SDPA:
        raise ConfigError(
            "AttentionUnavailable", f"model.attention is sdpa, but transformers has no sdpa attention for models of type {config.model_type}",
            hint="remove model.attention, or write eager",
        )  # fmt: skip
    return "eager", [f"attention eager is used, because transformers has no sdpa attention for models of type {config.model_type}"]


def uses_padding_free_batches(run: RunConfig, attention: str) -> bool:
    """Whether the rows of a batch are concatenated instead of padded. `attention`: the result of `choose_attention`."""
    return attention == VARLEN_ATTENTION and run.spec.dataset.packing is not True


def can_concatenate_rows(run: RunConfig, config: Any, adapter: Path | None = None) -> bool:
    """Whether an unpacked run with `varlen` may concatenate its rows.

    It may do so if concatenation, which makes training faster, does not change the results.
    """
    return (
        # Prefix and prompt tuning add virtual tokens to each row. PEFT would put these tokens only once before the concatenated rows, and drop the
        # position ids.
        method_type_of(run.spec) not in PROMPT_METHODS
        and (adapter is None or ignores_token_position(adapter))
        # The size of NEFTune's noise depends on the length of the sequence.
        and run.spec.training.neftune_noise_alpha is None
        # A batch with a single row has no padding that could be saved.
        and value_or_default(run.spec.training, "batch_size_per_device") > 1
        and separates_rows_by_position(config)
    )


def ignores_token_position(adapter: Path) -> bool:
    """Whether the effect of an adapter on a token is independent of where the token's row begins. `adapter`: the adapter's folder."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
    except (OSError, ValueError):
        return False  # If the adapter's configuration cannot be read, the later loading of the adapter raises an error with the reason.
    # Activated LoRA (aLoRA) searches for its invocation tokens once per row of the batch.
    return config.get("peft_type") in ("LORA", "IA3") and not config.get("alora_invocation_tokens")


def separates_rows_by_position(config: Any) -> bool:
    """Whether the layers of a text model keep the rows of a padding-free batch separate, and compute their attention with the kernel.

    The position ids show where a row begins, because they begin at 0 in each row. Recurrent and convolutional layers ignore position ids.
    Encoders such as RoBERTa do not count positions from 0.
    """
    return (
        (bool(getattr(config, "rope_parameters", None)) or config.model_type in MODEL_TYPES_WITH_LEARNED_POSITIONS)
        and config.model_type not in MODEL_TYPES_WITHOUT_BOUNDARIES
        and set(getattr(config, "layer_types", None) or ()) <= ATTENTION_LAYER_TYPES
    )


def reason_against_varlen(run: RunConfig, hardware: Hardware, config: Any) -> str | None:
    """Return why a run on this GPU cannot use `varlen`; None if it can."""
    if not device_has_kernel(hardware.device):
        return f"torch has no variable-length kernel for {hardware.name}"
    dtype = getattr(config, "dtype", None) if hardware.dtype == "auto" else hardware.dtype
    if not (hardware.computes_in_bf16 or hardware.computes_in_fp16 or str(dtype).removeprefix("torch.") in ("float16", "bfloat16")):
        return "the run computes in 32 bits"
    if run.spec.model.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return "the model runs code from its repository (model.trustRemoteCode)"
    if not passes_document_boundaries(config):
        return f"transformers does not support it for models of type {config.model_type}"
    if config.get_text_config() is not config:
        return f"models of type {config.model_type} have other inputs than text"
    try:
        return _find_unsupported_feature(config)
    except RuntimeError:  # The configuration raises RuntimeError if the layers have different values of a field.
        return "the layers of the model have different attention settings"


def _find_unsupported_feature(config: Any) -> str | None:
    """Return the feature of a text model's attention that the kernel does not have; None if there is no such feature."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model limits its attention scores (attn_logit_softcapping)"
    dropout_field = next((name for name in ATTENTION_DROPOUT_FIELDS if getattr(config, name, None)), None)
    if dropout_field is not None:
        return f"the model uses attention dropout ({dropout_field})"
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        return "the model's attention is not causal"
    if getattr(config, "attention_chunk_size", None) is not None or "chunked_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        return "the model's attention is limited to chunks (attention_chunk_size)"
    if getattr(config, "v_head_dim", None) is not None:
        return "the model's keys and values have different sizes (v_head_dim)"
    head_sizes = _list_head_sizes(config)
    if not head_sizes:
        return "the size of the model's attention heads is unknown"
    unsupported_sizes = [size for size in head_sizes if not _is_supported_head_size(size)]
    return f"its kernel does not support attention heads of size {unsupported_sizes[0]}" if unsupported_sizes else None


def _list_head_sizes(config: Any) -> list[int]:
    """Return the sizes of the model's attention heads. Some models have larger heads in the layers without a sliding window."""
    head_size, head_count = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    if head_size is None and head_count:
        head_size = config.hidden_size // head_count
    return [int(size) for size in (head_size, getattr(config, "global_head_dim", None)) if size]


def _is_supported_head_size(size: int) -> bool:
    return size <= MAX_HEAD_SIZE and size % HEAD_SIZE_MULTIPLE == 0


@lru_cache
def device_has_kernel(device: torch.device) -> bool:
    """Whether torch has the variable-length kernel for a device: NVIDIA GPUs since Ampere."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_COMPUTE_CAPABILITY


def _computation_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the data type in which attention is computed for inputs of type `dtype`: under autocast, autocast's type.

    Autocast does not convert the kernel's inputs, so `_call_kernel` does.
    """
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def create_varlen_mask(**arguments: Any) -> torch.Tensor | None:
    """Create the attention mask of one forward pass (transformers' mask interface): None if the kernel is used, else the mask for sdpa."""
    return None if _needs_no_mask(**arguments) else sdpa_mask(**arguments)


def _needs_no_mask(
    *, config: Any, batch_size: int, q_length: int, kv_length: int, device: torch.device, dtype: torch.dtype, q_offset: Any = 0,
    attention_mask: torch.Tensor | None = None, local_size: int | None = None, use_vmap: bool = False, **options: Any,
) -> bool:  # fmt: skip
    """Whether `compute_varlen_attention` needs no mask: the boundaries of the documents and the size of the sliding window are enough."""
    return (
        # transformers passes `allow_is_bidirectional_skip` for every mask that is not causal, and `use_vmap` for a mask that the model has modified.
        "allow_is_bidirectional_skip" not in options
        and not use_vmap
        # Chunked masks also set `local_size`, but no layer passes the size of its chunks to the attention function.
        and local_size in (None, getattr(config, "sliding_window", None))
        and attention_mask is None
        and batch_size == 1
        and isinstance(q_offset, int)
        and (q_offset, q_length) == (0, kv_length)
        and device_has_kernel(device)
        and _computation_dtype(device, dtype) in KERNEL_DTYPES
        and _find_unsupported_feature(config) is None
    )


def compute_varlen_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, is_causal: bool | None = None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Compute the attention of one layer (transformers' attention interface).

    Shapes: `query` (batch, heads, tokens, head size); `key` and `value` the same, possibly with fewer heads; the result
    (batch, tokens, heads, head size). `options` may hold the boundaries of the documents: `cu_seq_lens_q` and `max_length_q`.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    boundaries = options.get("cu_seq_lens_q")
    if (
        attention_mask is None
        and is_causal
        and boundaries is not None
        and _kernel_supports(query, key, value, dropout, scaling, options)
    ):
        return _call_kernel(query, key, value, boundaries, int(options["max_length_q"]), scaling, sliding_window), None
    if attention_mask is None and is_causal and _may_lack_mask(query, key):
        attention_mask = _create_mask(query, boundaries, options.get("position_ids"), sliding_window)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, sliding_window=sliding_window,
        **options,
    )  # fmt: skip


def _kernel_supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> bool:
    """Whether the kernel computes the same as sdpa for these inputs."""
    dtypes = {_computation_dtype(query.device, tensor.dtype) for tensor in (query, key, value)}
    return (
        device_has_kernel(query.device)
        and len(dtypes) == 1
        and dtypes.pop() in KERNEL_DTYPES
        and query.shape[0] == 1
        and query.shape[2] == key.shape[2]
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and _is_supported_head_size(query.shape[-1])
        and dropout == 0.0
        and (scaling is None or scaling > 0)
        and options.get("max_length_q") is not None
        and all(options.get(name) is None for name in ("softcap", "s_aux", "position_bias", "cache"))
    )


def _call_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, max_length: int, scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Call the kernel. `boundaries`: start of each document, then the number of tokens in the sequence; `max_length`: tokens of the longest document.

    transformers' size of a sliding window includes the token itself. The kernel's size includes only the preceding tokens.
    """
    dtype = _computation_dtype(query.device, query.dtype)
    query, key, value = (tensor.squeeze(0).transpose(0, 1).to(dtype) for tensor in (query, key, value))
    tokens_before = sliding_window - 1 if sliding_window is not None and sliding_window < max_length else -1
    # `boundaries` is passed twice (for queries and for keys), because newer versions of torch use cuDNN's faster kernel only if both arguments are
    # the same object.
    attention_output: Any = varlen_attn(
        query,
        key,
        value,
        boundaries,
        boundaries,
        max_length,
        max_length,
        scale=scaling,
        window_size=(tokens_before, 0),
        **GQA_OPTIONS,
    )
    return attention_output.unsqueeze(0)


def _may_lack_mask(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether it is possible that `create_varlen_mask` created no mask for these inputs, because it expected the kernel to compute them."""
    return device_has_kernel(query.device) and query.shape[0] == 1 and query.shape[2] == key.shape[2]


def _create_mask(
    query: torch.Tensor, boundaries: torch.Tensor | None, position_ids: torch.Tensor | None, sliding_window: int | None
) -> torch.Tensor | None:
    """Create the mask with which sdpa computes one packed sequence; its shape is (1, 1, tokens, tokens). None if a plain causal mask is correct."""
    positions = torch.arange(query.shape[2], device=query.device)
    document_indices = None
    if boundaries is not None and len(boundaries) > 2:
        document_indices = torch.searchsorted(boundaries.contiguous(), positions, right=True)
    elif boundaries is None and position_ids is not None and position_ids.ndim == 2:
        packed_sequence_indices = find_packed_sequence_indices(position_ids)
        document_indices = None if packed_sequence_indices is None else packed_sequence_indices[0]
    if sliding_window is not None and sliding_window >= len(positions):
        sliding_window = None
    if document_indices is None and sliding_window is None:
        return None
    distances = positions[:, None] - positions[None, :]
    mask = distances >= 0
    if document_indices is not None:
        mask &= document_indices[:, None] == document_indices[None, :]
    if sliding_window is not None:
        mask &= distances < sliding_window
    return mask[None, None]
