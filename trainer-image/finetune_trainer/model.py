"""Loads the base model and its tokenizer from the local disk, with the requested dtype, attention, quantisation and pad token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.errors import ConfigError, NotFoundError
from finetune_api.pod import RunConfig
from finetune_api.rules import base_bits, is_vision_language, trains_base_weights, uses_loftq
from finetune_api.sources import redact_source
from finetune_api.spec.enums import ComputeDtype, QuantizationType

from finetune_trainer import vocabulary
from finetune_trainer.data.vision import VisionProcessor
from finetune_trainer.hardware import Hardware, trains_on_quantized_base
from finetune_trainer.imports import needs_bitsandbytes
from finetune_trainer.inputs import Inputs
from finetune_trainer.library_internals import build_processor, image_text_processor_class

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

END_OF_SEQUENCE = "<eos>"
"""Value of `model.padToken` that selects the end token."""
COMPUTE_DTYPE_PATH = "model.quantization.computeDtype"
RESERVED_TOKEN = re.compile(
    r"^(<\|?(finetune_right_)?pad(_id)?\|?>|\[PAD\]|<\|(reserved_special_token|extra|dummy|unused)_?\d+\|>|<unk>|<\|endoftext\|>)$"
)
"""Matches tokens that vocabularies reserve for padding or other purposes."""


def load_tokenizer(run: RunConfig, inputs: Inputs) -> tuple[Any, list[str]]:
    """Load the tokenizer and set its pad token. Returns the tokenizer and notes for the status. Errors: NotFoundError TokenizerUnreadable; ConfigError."""
    from transformers import AutoTokenizer

    folder = inputs.tokenizer or inputs.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=bool(run.spec.model.trust_remote_code))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable_error("TokenizerUnreadable", "tokenizer", run.spec.model.tokenizer, folder, error, run) from error
    tokenizer.padding_side = "right"
    added_ids = vocabulary.add_tokens(tokenizer, run.spec.model.new_tokens)
    notes = [f"{len(added_ids)} new tokens, ids {added_ids[0]} to {added_ids[-1]}"] if added_ids else []
    return tokenizer, [*notes, *_choose_pad_token(tokenizer, run.spec.model.pad_token)]


def _choose_pad_token(tokenizer: Any, requested_token: str | None) -> list[str]:
    """Set the pad token, and return notes for the status.

    The pad token is the first of these that exists: the requested token, the tokenizer's own pad token, a reserved token, the end token.
    """
    vocabulary_tokens = tokenizer.get_vocab()
    if requested_token is not None:
        token = tokenizer.eos_token if requested_token == END_OF_SEQUENCE else requested_token
        if token not in vocabulary_tokens:
            raise ConfigError(
                "PadTokenUnknown", f"model.padToken {requested_token!r} is not in the vocabulary",
                hint=f"write a token of the vocabulary, write {END_OF_SEQUENCE} for the end token, or remove the field",
            )  # fmt: skip
        tokenizer.pad_token = token
        return []
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return []
    reserved_tokens = sorted(token for token in vocabulary_tokens if RESERVED_TOKEN.match(token) and token != tokenizer.eos_token)
    tokenizer.pad_token = reserved_tokens[0] if reserved_tokens else tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            "PadTokenUnknown", "the tokenizer has neither a pad nor an end token", hint="set model.padToken"
        )
    return [
        f"the tokenizer has no pad token: short rows are padded with {tokenizer.pad_token}; padding is not trained on"
    ]


def load_processor(run: RunConfig, inputs: Inputs, config: Any, tokenizer: Any) -> VisionProcessor | None:
    """Load the processor of a vision-language model. Returns None for a job with a text model.

    If the tokenizer has no chat template, it gets the processor's template.

    Errors: ConfigError ModelWithoutVision, ImageProcessorUnavailable; NotFoundError ProcessorUnreadable.
    """
    if not is_vision_language(run.spec):
        return None
    processor_class = image_text_processor_class(config)
    if processor_class is None:
        raise ConfigError(
            "ModelWithoutVision", f"model.modality is visionLanguage, but transformers has no model for images and text of type {config.model_type}",
            hint="remove modality to train a text model, or give a vision-language model",
        )  # fmt: skip
    try:
        processor = build_processor(processor_class, inputs.model, tokenizer)
    except ImportError as error:
        raise ConfigError(
            "ImageProcessorUnavailable", f"the image processor of models of type {config.model_type} needs {str(error).strip().splitlines()[0][:200]}, "
            "which this image does not have",
            hint="set placement.image to an image that has the package, or give a model of another type",
        ) from error  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable_error("ProcessorUnreadable", "processor", run.spec.model.source, inputs.model, error, run) from error
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    return VisionProcessor(processor)


def load_config(run: RunConfig, inputs: Inputs) -> Any:
    """Read the base model's `config.json`. Errors: NotFoundError ModelUnreadable."""
    from transformers import AutoConfig

    spec = run.spec.model
    try:
        return AutoConfig.from_pretrained(inputs.model, trust_remote_code=bool(spec.trust_remote_code))
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable_error("ModelUnreadable", "model", spec.source, inputs.model, error, run) from error


def model_class(run: RunConfig, model_kind: str) -> Any:
    """Return the class of transformers that builds or loads the base model. `model_kind`: see `load_model`. A `reward` model needs `num_labels` 1."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification

    if model_kind == "reward":
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if is_vision_language(run.spec) else AutoModelForCausalLM


def load_model(
    run: RunConfig,
    inputs: Inputs,
    hardware: Hardware,
    *,
    skip_quantization: tuple[str, ...] = (),
    is_sharded: bool = False,
    model_kind: str = "causal",
    quantize: bool = True,
    is_spread: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """Load the base model and check that no weight is missing. Returns the model and notes for the status.

    `skip_quantization`: modules that stay unquantised. `is_sharded`: whether FSDP will shard the weights. `model_kind`: `causal` for a
    language model, `reward` for a model whose head has one output. `quantize`: whether the spec's quantisation applies. `is_spread`: whether
    the layers are spread over all GPUs of the pod.

    Errors: NotFoundError ModelUnreadable, ModelIncomplete (class Model); ConfigError QuantizedBase.
    """
    from finetune_trainer import attention
    from finetune_trainer.library_internals import connect_backbone

    spec = run.spec.model
    attention.register()
    notes = _check_prequantized(load_config(run, inputs), run)
    options: dict[str, Any] = {
        "dtype": hardware.dtype,
        "attn_implementation": hardware.attention,
        "trust_remote_code": bool(spec.trust_remote_code),
    }
    quantization_options = quantization_config(run, hardware, skipped_modules=skip_quantization, is_sharded=is_sharded) if quantize else None
    if is_spread:
        options["device_map"] = "auto"
    if quantization_options is not None:
        options |= {"quantization_config": quantization_options, "device_map": {"": str(hardware.device)}}
    if model_kind == "reward":
        options["num_labels"] = 1
    try:
        model, loading_info = model_class(run, model_kind).from_pretrained(inputs.model, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unreadable_error("ModelUnreadable", "model", spec.source, inputs.model, error, run) from error
    _check_complete(loading_info, run, expected_missing=("score.weight", "score.bias") if model_kind == "reward" else ())
    connect_backbone(model)
    _keep_quantized_weights_trainable(model)
    return model, notes


def _keep_quantized_weights_trainable(model: Any) -> None:
    """Turn off a conversion by bitsandbytes. On some CPUs, bitsandbytes changes the layout of 4-bit weights at the first evaluation. No gradients
    pass through weights in the new layout.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def max_positions(config: Any) -> int | None:
    """Return the model's number of positions, which limits the sequence length. None if the model's configuration does not have this field."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def quantization_config(
    run: RunConfig, hardware: Hardware, *, skipped_modules: tuple[str, ...] = (), is_sharded: bool = False
) -> BitsAndBytesConfig | None:
    """Return the quantisation of the frozen base model, or None if it is not quantised.

    `skipped_modules`: modules that stay unquantised, in addition to the head.
    """
    import torch
    from transformers import BitsAndBytesConfig

    spec = run.spec.model.quantization
    bits = base_bits(run.spec)
    if bits is None:
        return None
    unquantized_modules = ["lm_head", "score", *skipped_modules] if skipped_modules else None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantized_modules)
    torch_dtypes = {
        ComputeDtype.BFLOAT16: torch.bfloat16,
        ComputeDtype.FLOAT16: torch.float16,
        ComputeDtype.FLOAT32: torch.float32,
    }
    default_dtype = ComputeDtype.FLOAT32 if hardware.is_cpu else ComputeDtype.BFLOAT16
    requested_dtype = spec.compute_dtype if spec else None
    if trains_on_quantized_base(run) and COMPUTE_DTYPE_PATH in run.defaults:
        requested_dtype = ComputeDtype.BFLOAT16
    compute_dtype = torch_dtypes[requested_dtype or default_dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=str((spec.type if spec else None) or QuantizationType.NF4),
        bnb_4bit_use_double_quant=spec is None or spec.double_quant is not False,
        bnb_4bit_compute_dtype=compute_dtype,
        # FSDP only warns about integer weights, and does not shard them. So the quantised bytes are stored as floats.
        bnb_4bit_quant_storage=compute_dtype if is_sharded else torch.uint8,
        llm_int8_skip_modules=unquantized_modules,
    )


def _check_prequantized(config: Any, run: RunConfig) -> list[str]:
    """Return a note if the model's files are quantised. Errors: ConfigError QuantizedBase if the job needs unquantised weights or bitsandbytes."""
    stored_quantization = getattr(config, "quantization_config", None)
    if stored_quantization is None:
        return []
    is_dictionary = isinstance(stored_quantization, dict)
    quantization_method = stored_quantization.get("quant_method") if is_dictionary else getattr(stored_quantization, "quant_method", "unknown")
    if trains_base_weights(run.spec):
        raise ConfigError(
            "QuantizedBase", f"the model is stored quantised ({quantization_method}), but method {run.spec.method.type} trains the base weights",
            hint="give the unquantised model, or write method lora",
        )  # fmt: skip
    if uses_loftq(run.spec):
        raise ConfigError(
            "QuantizedBase", f"the model is stored quantised ({quantization_method}), but method.lora.init loftq needs the unquantised weights",
            hint="give the unquantised model, or remove init",
        )  # fmt: skip
    if run.spec.output.merge_adapter:
        raise ConfigError(
            "QuantizedBase", f"the model is stored quantised ({quantization_method}), but output.mergeAdapter needs the unquantised weights",
            hint="give the unquantised model (with model.quantization, the trainer quantises it for the training), or remove mergeAdapter",
        )  # fmt: skip
    if quantization_method == "bitsandbytes" and not needs_bitsandbytes(run):  # module `imports` hides bitsandbytes from this job
        bits = 8 if _loads_in_8_bits(stored_quantization) else 4
        raise ConfigError(
            "QuantizedBase", f"the model is stored in {bits} bits by bitsandbytes, but model.quantization is not set",
            hint=f"write `model: {{quantization: {{bits: {bits}}}}}`, or give the unquantised model",
        )  # fmt: skip
    return [f"the model is stored quantised ({quantization_method}) and stays quantised"]


def _loads_in_8_bits(quantization: Any) -> bool:
    is_8_bit = quantization.get("load_in_8bit") if isinstance(quantization, dict) else quantization.load_in_8bit
    return bool(is_8_bit)


def _check_complete(loading_info: Any, run: RunConfig, expected_missing: tuple[str, ...] = ()) -> None:
    """Refuse a model with missing weights. transformers would only warn, and initialise the missing weights randomly.
    `expected_missing`: the weights of a new head. Errors: NotFoundError ModelIncomplete.
    """
    missing_keys = sorted(set(loading_info.get("missing_keys", ())) - set(expected_missing))
    mismatched_keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading_info.get("mismatched_keys", ()))
    if missing_keys or mismatched_keys:
        example_names = ", ".join((missing_keys + mismatched_keys)[:5])
        raise NotFoundError(
            "ModelIncomplete", f"{redact_source(run.spec.model.source or '')}: {len(missing_keys)} weights are missing, {len(mismatched_keys)} have a "
            f"different shape than in config.json, for example {example_names}",
            hint="upload all weight files of one model together with its config.json",
        )  # fmt: skip


def _unreadable_error(
    code: str, unreadable_object: str, source: str | None, folder: Path, error: Exception, run: RunConfig
) -> NotFoundError:
    """Return the error for an unreadable folder. The error quotes the first line of the library's message, with `source` instead of the local path."""
    source = redact_source(source or unreadable_object)
    first_line = str(error).strip().split("\n")[0].replace(str(folder), source)[:300]
    file_names = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else []
    needs_remote_code = "trust_remote_code" in first_line or "custom code" in first_line
    hint = (
        "set model.trustRemoteCode: true if you trust the source"
        if needs_remote_code
        else f"give a {unreadable_object} folder in the layout of the Hugging Face hub; this folder holds {', '.join(file_names) or 'no files'}"
    )
    return NotFoundError(code, f"{source}: {first_line}", hint=hint)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the number of trained values and the number of all values in the model's parameters."""
    sizes_and_flags = [(count_parameter_values(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes_and_flags if is_trained), sum(size for size, _ in sizes_and_flags)


def count_parameter_values(parameter: Any) -> int:
    """Return the number of values in a parameter: two per byte for a 4-bit weight, the unsharded size for a ZeRO-3 parameter."""
    stored_count = int(getattr(parameter, "ds_numel", None) or parameter.numel())
    return stored_count * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else stored_count
