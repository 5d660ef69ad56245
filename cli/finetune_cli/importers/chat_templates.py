"""Chat templates that other tools choose by name: which tokenizers have a template, and the texts of simple templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_cli.importers.draft import JobDraft

CHAT_MODEL_PATTERN = re.compile(
    r"instruct|chat|-it\b|\bit-|thinking|think|[-_]sft|safeguard|gpt-oss|guanaco|alpaca|vicuna|reasoning|magistral",
    re.IGNORECASE,
)
"""Matches the names of models that were trained on conversations. The tokenizer of a model with a matching name has a chat template."""


@dataclass(frozen=True)
class TurnMarkers:
    """For each role, the text before and the text after each turn of this role.

    `{eos}` stands for the end-of-sequence token. `start_variable`: the name of a Jinja variable whose value is written before the first turn.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    start_variable: str = ""

    def to_jinja(self) -> str:
        """Return the chat template for these markers. In the template, a `generation` block encloses each answer together with its end token."""
        answer = f"{{{{ {_to_jinja_expression(self.assistant[0])} }}}}{{% generation %}}"
        answer += f"{{{{ message['content'] + {_to_jinja_expression(self.assistant[1])} }}}}{{% endgeneration %}}"
        system = f"{{{{ {_to_jinja_expression(self.system[0])} + message['content'] + {_to_jinja_expression(self.system[1])} }}}}"
        question = f"{{{{ {_to_jinja_expression(self.user[0])} + message['content'] + {_to_jinja_expression(self.user[1])} }}}}"
        start = f"{{{{ {self.start_variable} }}}}" if self.start_variable else ""
        return (
            f"{start}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}{answer}{{% elif message['role'] == 'system' %}}{system}"
            f"{{% else %}}{question}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {_to_jinja_expression(self.assistant[0])} }}}}{{% endif %}}"
        )


def _to_jinja_expression(text: str) -> str:
    """Return the Jinja expression for a text in which `{eos}` stands for the end-of-sequence token."""
    json_parts = [json.dumps(part) for part in text.split("{eos}")]
    return " + eos_token + ".join(json_parts)


def _build_markers(before_role: str, after_role: str, turn_end: str) -> TurnMarkers:
    """Return markers for turns that begin with `before_role`, the role's name and `after_role`. The text `turn_end` ends each turn."""
    return TurnMarkers(
        (f"{before_role}system{after_role}", turn_end), (f"{before_role}user{after_role}", turn_end), (f"{before_role}assistant{after_role}", turn_end)
    )  # fmt: skip


MARKERS: Mapping[str, TurnMarkers] = {
    "chatml": _build_markers("<|im_start|>", "\n", "<|im_end|>\n"),
    "llama3": TurnMarkers(
        ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"), ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"), "bos_token",
    ),
    "gemma": TurnMarkers(
        ("<start_of_turn>user\n", "<end_of_turn>\n"), ("<start_of_turn>user\n", "<end_of_turn>\n"), ("<start_of_turn>model\n", "<end_of_turn>\n"), "bos_token"
    ),
    "phi3": _build_markers("<|", "|>\n", "<|end|>\n"),
    "mistral": TurnMarkers(("[INST] ", " [/INST]"), ("[INST] ", " [/INST]"), (" ", "{eos}"), "bos_token"),
    "alpaca": TurnMarkers(("", "\n\n"), ("### Instruction:\n", "\n\n"), ("### Response:\n", "{eos}\n\n")),
    "vicuna": TurnMarkers(("", "\n"), ("USER: ", " "), ("ASSISTANT: ", "{eos}")),
    "metharme": TurnMarkers(("<|system|>", ""), ("<|user|>", ""), ("<|model|>", "{eos}")),
    "zephyr": _build_markers("<|", "|>\n", "{eos}\n"),
    "human": TurnMarkers(("", "\n"), ("Human: ", "\n"), ("Assistant: ", "{eos}\n")),
}  # fmt: skip
"""For the name of each simple chat template: the texts before and after the turns of each role."""

FAMILY_AND_MARKERS_BY_TEMPLATE: Mapping[str, tuple[str, str]] = {
    "alpaca": ("", "alpaca"), "chatml": ("", "chatml"), "default": ("", "human"), "vicuna": ("vicuna", "vicuna"), "metharme": ("", "metharme"),
    "zephyr": ("zephyr", "zephyr"), "llama2": ("llama-?2", "mistral"),
    "mistral": ("mistral|mixtral", "mistral"), "mistral_v1": ("mistral|mixtral", "mistral"), "mistral_v2v3": ("mistral|mixtral", "mistral"),
    "mistral_v3_tekken": ("mistral|ministral|magistral|devstral|nemo", ""), "mistral_v7_tekken": ("mistral|ministral|magistral|devstral", ""),
    "mistral_small": ("mistral|magistral|devstral", ""), "ministral": ("ministral", ""), "ministral3": ("ministral", ""),
    "gemma": ("gemma", "gemma"), "gemma2": ("gemma", "gemma"), "gemma3": ("gemma", "gemma"), "gemma3n": ("gemma", "gemma"), "gemma4": ("gemma-?4", ""),
    "gemma4n": ("gemma-?4", ""), "gemma4_unified": ("gemma-?4", ""),
    "cohere": ("command|aya|c4ai|cohere", ""), "command_a": ("command", ""), "command_a_tool_use": ("command", ""), "command_a_rag": ("command", ""),
    "aya": ("aya", ""), "aeva": ("aeva", ""), "llama3": ("llama-?3", "llama3"), "llama4": ("llama-?4", ""),
    "phi": ("phi-?3", "phi3"), "phi_3": ("phi-?3", "phi3"), "phi_35": ("phi-?3", "phi3"), "phi_small": ("phi-?3", "phi3"), "phi4": ("phi-?4", ""),
    "phi4_mini": ("phi-?4", ""), "deepseek": ("deepseek", ""), "deepseek_v2": ("deepseek", ""), "deepseek_v3": ("deepseek", ""),
    "deepseek3": ("deepseek", ""), "deepseekr1": ("deepseek", ""), "deepseekcoder": ("deepseek", ""), "jamba": ("jamba", ""),
    "qwen": ("qwen|qwq", "chatml"), "qwen_25": ("qwen", "chatml"), "qwen3": ("qwen", ""), "qwen3_5": ("qwen", ""), "qwen3_6": ("qwen", ""),
    "falcon": ("falcon", ""), "falcon_h1": ("falcon", ""), "nemotron_h": ("nemotron", ""), "exaone": ("exaone", ""), "exaone4": ("exaone", ""),
    "gpt_oss": ("gpt-?oss", ""), "glm4": ("glm", ""), "glm4_moe": ("glm", ""), "glm4_7": ("glm", ""), "glmz1": ("glm", ""), "chatglm3": ("glm", ""),
    "bailing": ("ling|bailing", ""), "bailing_v2": ("ling|bailing", ""), "breeze": ("breeze", ""), "chatml_de": ("", "chatml"), "cpm4": ("cpm", ""),
    "dbrx": ("dbrx", ""), "hy3": ("hunyuan|hy", ""), "ernie": ("ernie", ""), "granite3": ("granite", ""), "granite4": ("granite", ""),
    "index": ("index", ""), "hunyuan": ("hunyuan", ""), "hunyuan_small": ("hunyuan", ""), "hy_dense_1_8b": ("hunyuan|hy", ""),
    "hy_dense_7b": ("hunyuan|hy", ""), "intern2": ("intern", ""), "intern_s1": ("intern", ""), "lfm2": ("lfm2", ""), "llama2_zh": ("llama", ""),
    "mimo": ("mimo", ""), "mimo_v2": ("mimo", ""), "minimax1": ("minimax", ""), "minimax2": ("minimax", ""), "moonlight": ("moonlight|kimi", ""),
    "olmo": ("olmo", ""), "openchat": ("openchat", ""), "openchat-3.6": ("openchat", ""), "opencoder": ("opencoder", ""), "sailor": ("sailor", ""),
    "seed_coder": ("seed", ""), "seed_oss": ("seed", ""), "smollm": ("smollm", "chatml"), "smollm2": ("smollm", "chatml"), "solar": ("solar", ""),
    "starchat": ("starchat", ""), "telechat2": ("telechat", ""), "xuanyuan": ("xuanyuan", ""), "yi": ("\\byi\\b", "chatml"), "youtu": ("youtu", ""),
    "yuan": ("yuan", ""),
}  # fmt: skip
"""For each template name: a pattern for the names of models whose tokenizer has this template, and the name in `MARKERS` for all other models."""
PREFIXES_WITH_BASE_TEMPLATE = ("qwen", "phi", "jamba", "falcon_h1", "gpt_oss")
"""If the name of a template begins with one of these words, the template exists in base models of its family, too, and not only in chat models."""
MULTIMODAL_TEMPLATE_PATTERN = "llava|pixtral|_vl|vision|qwen2_audio|_omni|paligemma|minicpm|mllama|glm4v|glm4_5v|glm_ocr|dots_ocr|moss_vl|video|intern_vl"


def assign_chat_template(draft: JobDraft, option_key: str, name: str) -> None:
    """Set the chat template that an option names, or keep the chat template of the tokenizer.

    Refuse a name if neither the tokenizer nor `MARKERS` has the template.
    """
    model = str(draft.value("model.source", ""))
    plain_name = name.removesuffix("_nothink")
    if plain_name not in FAMILY_AND_MARKERS_BY_TEMPLATE:
        is_multimodal = re.search(MULTIMODAL_TEMPLATE_PATTERN, name) is not None
        feature = "training on images, video or audio" if is_multimodal else f"the chat template {name}"
        draft.refuse_feature(option_key, feature, "" if is_multimodal else _build_config_map_hint(), is_droppable=not is_multimodal)
        return
    pattern, marker_name = FAMILY_AND_MARKERS_BY_TEMPLATE[plain_name]
    is_model_of_family = bool(pattern) and re.search(pattern, model, re.IGNORECASE) is not None
    has_template = CHAT_MODEL_PATTERN.search(model) is not None or plain_name.startswith(PREFIXES_WITH_BASE_TEMPLATE)
    if is_model_of_family and (has_template or not marker_name):
        draft.add_reason(
            option_key, f"the chat template of the tokenizer of {model} is used, because the model belongs to the family of this template"
        )
        if not has_template:
            draft.add_warning(
                f"{draft.given_options[option_key].origin.location}: {option_key}: check that the tokenizer of {model} has a chat template; "
                f"{_build_config_map_hint()}"
            )
    elif marker_name:
        assign_template_text(draft, option_key, marker_name)
    else:
        draft.refuse_feature(option_key, f"the chat template {name} for a model of another family", _build_config_map_hint())


def _build_config_map_hint() -> str:
    return "give the template with --set dataset.chatTemplate.configMapRef.name=NAME --set dataset.chatTemplate.configMapRef.key=KEY"


def assign_template_text(draft: JobDraft, option_key: str, marker_name: str) -> None:
    """Set the text of the chat template from an entry of `MARKERS`, unless an override sets the template."""
    if not any(path.startswith("dataset.chatTemplate") for path in draft.request.overrides):
        draft.assign("dataset.chatTemplate.text", MARKERS[marker_name].to_jinja(), option_key)
