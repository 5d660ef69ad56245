"""Creates tiny vision-language models with their processors, and rows with images. Nothing is downloaded.

The weights of the models are random, but two models with the same seed have equal weights. The processors have the settings in `FAMILIES`, and are saved in
the hub's layout.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from tests.support.tiny import make_tokenizer

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yes": (240, 240, 240), "no": (10, 10, 10)}
"""RGB values of each answer: an image of one colour has the colour's name as its answer."""
TEXT_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip

CHAT_TEMPLATE = (
    "{%% for message in messages %%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%% for part in message['content'] %%}{%% if part['type'] == 'image' %%}{{ '%s' }}{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}"
    "{{ '<|im_end|>\\n' }}{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
"""ChatML for messages whose content is a list of texts and images. `%s` is replaced by the model's placeholder for an image."""


@dataclass(frozen=True)
class VisionFamily:
    """One type of vision-language model: its tokens for images, and the settings of a tiny model and its processor."""

    placeholder: str
    """Text that the chat template writes in place of an image."""
    image_token: str
    """Token that the processor repeats, once for each patch of an image."""
    special_tokens: tuple[str, ...]
    processor: dict[str, Any]
    """Content of `preprocessor_config.json`."""
    vision: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    processor_options: dict[str, Any] = field(default_factory=dict)
    """Content of `processor_config.json`."""
    named_tokens: dict[str, str] = field(default_factory=dict)
    """Special tokens that the processor reads from an attribute of the tokenizer, by the name of the attribute."""
    tower: str = ""
    """Name of the module with the vision layers, below `parent`."""
    projector: str = ""
    parent: str = "model."
    """Name of the module that contains `tower` and `projector`, with a dot at the end. Empty for the whole model."""


QWEN_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
    "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4},
}  # fmt: skip
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *(f"<row_{y}_col_{x}>" for y in (1, 2) for x in (1, 2)))
SIGLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
"""Sizes of the vision layers. On a CPU, each row of a 4-bit weight matrix must have at least 64 values, because the weights are computed in blocks of 64."""


def make_idefics_family(processor_type: str, **options: Any) -> VisionFamily:
    """Return the settings for a tiny model of the family Idefics3 or SmolVLM: the processor cuts an image into tiles of 28 pixels, and each tile becomes one
    token.
    """
    return VisionFamily(
        placeholder="<image>", image_token="<image>", special_tokens=IDEFICS_TOKENS,
        processor={
            "image_processor_type": processor_type, "do_image_splitting": True, "size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28},
        },
        vision=SIGLIP | {"image_size": 28}, config={"scale_factor": 2}, processor_options={"image_seq_len": 1}, tower="vision_model", projector="connector",
        **options,
    )  # fmt: skip


FAMILIES = {
    "qwen2_vl": VisionFamily(
        placeholder="<|vision_start|><|image_pad|><|vision_end|>", image_token="<|image_pad|>", special_tokens=QWEN_TOKENS, processor=QWEN_PROCESSOR,
        vision={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}, text=QWEN_ROPE, tower="visual", projector="visual.merger",
    ),
    "qwen2_5_vl": VisionFamily(
        placeholder="<|vision_start|><|image_pad|><|vision_end|>", image_token="<|image_pad|>", special_tokens=QWEN_TOKENS, processor=QWEN_PROCESSOR,
        vision={
            "depth": 2, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        text=QWEN_ROPE, tower="visual", projector="visual.merger",
    ),
    "gemma3": VisionFamily(
        placeholder="<start_of_image>", image_token="<image_soft_token>", special_tokens=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        processor={"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}},
        vision=SIGLIP | {"image_size": 28, "vision_use_head": False}, text={"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
        config={"mm_tokens_per_image": 4}, processor_options={"image_seq_length": 4},
        named_tokens={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        tower="vision_tower", projector="multi_modal_projector",
    ),
    "idefics3": make_idefics_family("Idefics3ImageProcessor"),
    "smolvlm": make_idefics_family("SmolVLMImageProcessor"),
    "llama4": VisionFamily(
        placeholder="<|image|>", image_token="<|patch|>",
        special_tokens=("<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        processor={"image_processor_type": "Llama4ImageProcessorFast", "size": {"height": 28, "width": 28}, "max_patches": 4},
        vision={
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": 28,
            "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
        },
        text={
            "head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
            "router_aux_loss_coef": 0.0,
        },
        processor_options={"patch_size": 7}, tower="vision_model", projector="multi_modal_projector", parent="",
    ),
}  # fmt: skip
SIMILAR_FAMILIES = ("qwen2_5_vl", "smolvlm")
"""Families whose layers and processors are the same as those of another family. `make test-faults` trains these families; `make test` does not."""


def make_vision_model(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write a tiny vision-language model with its tokenizer and its processor. Returns `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder, chat_template=CHAT_TEMPLATE % family.placeholder)
    named_tokens = {"extra_special_tokens": family.named_tokens} if family.named_tokens else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **named_tokens)
    tokenizer.add_tokens(list(family.special_tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(family.processor))
    if family.processor_options:
        (folder / "processor_config.json").write_text(json.dumps(family.processor_options))
    token_ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    image_id = tokenizer.convert_tokens_to_ids(family.image_token)
    own_ids: dict[str, Any] = {"image_token_id": image_id}
    if name.startswith("qwen"):
        own_ids |= {
            "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"), "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        }  # fmt: skip
    if name == "gemma3":
        own_ids |= {
            "boi_token_index": tokenizer.convert_tokens_to_ids("<start_of_image>"), "eoi_token_index": tokenizer.convert_tokens_to_ids("<end_of_image>"),
            "image_token_index": image_id,
        }  # fmt: skip
        del own_ids["image_token_id"]
    text_config = TEXT_SIZES | {"vocab_size": len(tokenizer)} | token_ids | family.text
    if name in ("idefics3", "smolvlm"):
        text_config["model_type"] = "llama"
    config = AutoConfig.for_model(
        name, text_config=text_config, vision_config=family.vision, tie_word_embeddings=False, **family.config, **own_ids, **token_ids
    )
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    if name == "gemma3":  # transformers initialises these weights with zeros, which would make all images equal
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    model.save_pretrained(folder)
    torch.random.set_rng_state(random_state)
    return folder


def make_png(colour: tuple[int, int, int], size: tuple[int, int] = (40, 32)) -> bytes:
    """Return a PNG image of one colour. `size` is width and height in pixels."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def to_data_uri(content: bytes) -> str:
    """Return the bytes of a PNG as a base64 data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def make_image_rows(colours: Sequence[str] = tuple(COLOURS), *, sizes: Sequence[tuple[int, int]] = ((40, 32),)) -> list[dict[str, Any]]:
    """For each colour, return a question about an image of this colour. The answer is the colour's name. The first image has the first of `sizes` (width,
    height), the next image the next size, and so on.
    """
    return [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": to_data_uri(make_png(COLOURS[name], size))}, {"type": "text", "text": "question"}]},
                {"role": "assistant", "content": name},
            ]
        }
        for name, size in zip(colours, cycle(sizes), strict=False)
    ]


def make_image_pairs(colours: Sequence[str] = tuple(COLOURS), *, sizes: Sequence[tuple[int, int]] = ((40, 32),)) -> list[dict[str, Any]]:
    """For each colour, return a question about an image of this colour. The better answer is the colour's name, and the worse answer is a sentence about
    another colour.
    """
    rows = make_image_rows(colours, sizes=sizes)
    return [
        {
            "prompt": row["messages"][:1], "chosen": row["messages"][1:],
            "rejected": [{"role": "assistant", "content": f"is it {colours[index - 1]}"}],
        }
        for index, row in enumerate(rows)
    ]  # fmt: skip
