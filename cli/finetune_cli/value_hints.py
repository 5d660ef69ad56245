"""Builds hints that say what to write instead of an invalid value: the value in the correct form, or the API's word for a word of another tool."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from finetune_api.aliases import VALUE_ALIASES, normalise
from finetune_api.rules import ALL_MODULES, make_optimizer_hint
from finetune_api.source_mistakes import explain_mistake

from finetune_cli.fields import find_example, find_field, make_group_example, remove_indexes
from finetune_cli.redaction import contains_secret

SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
DURATION_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)(?:ec|ecs|econd|econds|in|ins|inute|inutes|r|rs|our|ours|ay|ays|eek|eeks)?\s*(?=\d|$)")
WORDS_FOR_NO_VALUE = ("none", "null", "auto", "default", "no", "false", "off", "")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1", "y"), ("false", "no", "off", "0", "n")
FIELD_OF_GROUP = {
    "model": "source", "dataset": "train", "method": "type", "trainer": "type", "storage": "uri", "distributed": "strategy",
    "output.hub": "repository", "method.adapter": "source", "dataset.mixture[]": "source", "output.combineAdapters[]": "source",
}  # fmt: skip
"""For each group: the field that users mean if they write a text instead of the group."""
FIELD_OF_GROUP_FOR_NUMBER = {"dataset.split": "validation", "training.earlyStopping": "patience", "model.quantization": "bits"}
"""For each group: the field that users mean if they write a number instead of the group."""
FIELDS_WITH_OPTIONAL_LIMIT = ("training.maxSteps", "policy.activeDeadlineSeconds")
"""Fields in which other tools allow 0 or -1, meaning that there is no limit."""
PLAIN_TEXT_PATTERN = re.compile(r"[\w./@-]+")
ZERO_STAGE_PATTERN = re.compile(r"(?:deepspeed)?(?:zero|stage|zerostage)(\d)")


def to_yaml_text(value: Any) -> str:
    """Return a scalar as it is written in YAML, with strings in single quotes."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)


def make_field_example_hint(path: str) -> str:
    """Return a hint with an example of the field in YAML, or an empty string if the field has no example."""
    example = find_example(path)
    return f"for example {path.rpartition('.')[2]}: {example}" if example else ""


def make_group_example_hint(path: str) -> str:
    """Return a hint with an example of the group in YAML, or an empty string without an example."""
    example = make_group_example(path)
    return f"write for example {example}" if example else ""


def make_hint_for_value(error_type: str, value: Any, path: str, context: Mapping[str, Any]) -> str:
    """Return a hint that says what to write instead of an invalid value.

    `error_type` and `context` come from pydantic's error; `path` is relative to spec.
    """
    if error_type in ("model_type", "model_attributes_type", "dict_type"):
        return _make_hint_for_group(value, path)
    if error_type == "string_pattern_mismatch":
        return _make_hint_for_pattern(str(value), path) or make_field_example_hint(path)
    if error_type in ("enum", "literal_error"):
        return _make_hint_for_word(value, path)
    if error_type == "list_type":
        return _make_hint_for_list(value, path)
    if error_type == "bool_type":
        return _make_hint_for_bool(value)
    if error_type == "string_type":
        return _make_hint_for_string(value, path)
    if error_type in ("missing", "string_too_short"):
        return make_field_example_hint(path)
    if error_type in ("less_than", "less_than_equal", "greater_than", "greater_than_equal"):
        return _make_hint_for_bound(value, path, context)
    if error_type in ("int_type", "float_type", "int_from_float", "int_parsing", "float_parsing", "finite_number"):
        return _make_hint_for_number(value, path)
    return make_field_example_hint(path) if error_type == "value_error" else ""


def _get_field_name(path: str) -> str:
    return path.rpartition(".")[2]


def _to_flow_style(value: Any) -> str:
    """Return a value in YAML's flow style."""
    return value if isinstance(value, str) and PLAIN_TEXT_PATTERN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _make_hint_to_remove(path: str) -> str:
    """Return a hint to remove a field. The hint names the field's default if it has one."""
    field = find_field(path)
    match = re.search(r"Default: (.*?)\.(?: Example|$)", field.description) if field else None
    name = _get_field_name(path)
    return f"remove {name} to use the default: {match[1]}" if match and match[1] != "none" else f"remove {name}"


# --- groups and lists -----------------------------------------------------------------------------------------------


def _make_hint_for_group(value: Any, path: str) -> str:
    """Return a hint with the group to write instead of a scalar: `storage: {uri: s3://bucket/x}` for `storage: s3://bucket/x`."""
    name, example, pattern = _get_field_name(path), make_group_example_hint(path), remove_indexes(path)
    field = find_field(path)
    if field is not None and field.type_text.startswith("map of"):
        return _make_hint_for_map(value, path)
    if isinstance(value, bool) and find_field(f"{path}.enabled") is not None:
        return f"write {name}: {{enabled: {to_yaml_text(value)}}}"
    if isinstance(value, int | float) and not isinstance(value, bool) and pattern in FIELD_OF_GROUP_FOR_NUMBER:
        return f"write {name}: {{{FIELD_OF_GROUP_FOR_NUMBER[pattern]}: {value}}}"
    if not isinstance(value, str) or contains_secret(value):
        return example
    key, colon, rest = value.partition(":")
    if colon and rest and not rest.startswith("//") and find_field(f"{path}.{key}") is not None:
        return f"write a space after the colon: {name}: {{{key}: {_to_flow_style(rest)}}}"
    if name.endswith("Ref"):
        return example.replace(f"name: {find_example(f'{path}.name')}", f"name: {_to_flow_style(value)}", 1)
    field_name = FIELD_OF_GROUP.get(pattern)
    if field_name is None:
        return example
    word = _find_known_word(value, f"{path}.{field_name}") or (value if "://" in value else _to_flow_style(value))
    return f"write {{{field_name}: {word}}}" if path.endswith("]") else f"write {name}: {{{field_name}: {word}}}"


def _make_hint_for_map(value: Any, path: str) -> str:
    """Return a hint with the map to write instead of texts such as `gpu=a100`."""
    texts = value if isinstance(value, list) else str(value).split(",")
    pairs = [str(text).strip().partition("=") for text in texts]
    if all(separator and PLAIN_TEXT_PATTERN.fullmatch(key) for key, separator, _ in pairs) and not contains_secret(value):
        return f"write {_get_field_name(path)}: {{{', '.join(f'{key}: {_to_flow_style(inner)}' for key, _, inner in pairs)}}}"
    return make_field_example_hint(path)


def _make_hint_for_list(value: Any, path: str) -> str:
    """Return a hint with the list to write instead of a single value: `targetModules: [q_proj, v_proj]` for `q_proj,v_proj`."""
    name, field = _get_field_name(path), find_field(path)
    type_text = field.type_text if field else ""
    if isinstance(value, str) and value.lower() in WORDS_FOR_NO_VALUE:
        return f"remove {name}"
    if isinstance(value, dict) and type_text == "list of group" and path.endswith("env"):
        items = ", ".join(f"{{name: {key}, value: ...}}" for key in value)
        return f"write {name}: [{items}]"
    if isinstance(value, dict) and type_text == "list of group":
        return f"write a hyphen before the entry, for example {name}: {find_example(path)}"
    is_scalar = isinstance(value, str | int | float) and not isinstance(value, bool)
    if type_text.startswith("list of group") or not is_scalar or contains_secret(value):
        return make_field_example_hint(path)
    items = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
    words = [_find_known_word(str(item), path) or _to_flow_style(item) for item in items]
    if path == "method.lora.targetModules" and all(normalise(word) in ALL_MODULES for word in words):
        words = ["all-linear"]
    return f"write {name}: [{', '.join(words)}]"


# --- words, booleans and texts --------------------------------------------------------------------------------------


def _make_hint_for_word(value: Any, path: str) -> str:
    """Return a hint with the allowed word that the user probably means, or with the field that allows the given word."""
    text = to_yaml_text(value).strip("'")
    stage_match = ZERO_STAGE_PATTERN.fullmatch(normalise(text))
    if path == "distributed.strategy" and stage_match:
        return f"write `strategy: deepspeed` and `deepspeed: {{zeroStage: {stage_match[1]}}}`"
    word = _find_known_word(text, path)
    if word in ("no", "on", "off") and isinstance(value, bool):
        return f'write "{word}" in quotes, because YAML reads {word} without quotes as {text}'
    if word:
        return f"write {word}"
    if path.endswith("]") and text.lower() in WORDS_FOR_NO_VALUE:
        return f"remove {_get_field_name(path).partition('[')[0]}"
    other_field = _find_field_with_word(text)
    if other_field:
        return f"{text} is a value of {other_field}"
    word_by_spelling = {normalise(allowed_word): allowed_word for allowed_word in _list_allowed_words(path)}
    similar_words = difflib.get_close_matches(normalise(text), word_by_spelling, 1, 0.75)
    return f"did you mean {word_by_spelling[similar_words[0]]}?" if similar_words else ""


def _list_allowed_words(path: str) -> tuple[str, ...]:
    """Return the allowed words of a field or list item."""
    field = find_field(path) or find_field(path.rpartition("[")[0])
    return field.enum_values if field else ()


def _find_known_word(text: str, path: str) -> str:
    """Return the allowed word that `text` means; an empty string for an unknown text. `text` may have another spelling, or be another tool's name."""
    pattern = remove_indexes(path).removesuffix("[]")
    spelling = normalise(text).removeprefix("torch.")
    word_by_spelling = {normalise(word): word for word in _list_allowed_words(path)}
    aliases = next((words for field, words in VALUE_ALIASES.items() if pattern.endswith(field)), {})
    return word_by_spelling.get(spelling) or aliases.get(spelling, "")


def _find_field_with_word(text: str) -> str:
    """Return a field that allows the word `text`, or an empty string if no field allows it.

    The user has probably written a value of this field into another field.
    """
    for path in ("method.type", "trainer.type", "distributed.strategy", "training.scheduler", "dataset.format"):
        field = find_field(path)
        if field is not None and text.lower() in (word.lower() for word in field.enum_values):
            return path
    return ""


def _make_hint_for_bool(value: Any) -> str:
    text = str(value).strip().lower()
    word = "true" if text in TRUE_WORDS else "false" if text in FALSE_WORDS else ""
    return f"write {word} without quotes" if word and isinstance(value, str) else f"write {word}" if word else "write true or false"


def _make_hint_for_string(value: Any, path: str) -> str:
    """Return a hint with the text to write instead of a number, boolean, list or mapping."""
    if path == "checkpoint.resume" and isinstance(value, bool):
        return f"write {'auto' if value else 'never'}"
    if isinstance(value, bool | int | float):
        return f'quote it: "{to_yaml_text(value)}"'
    if isinstance(value, list) and path == "dataset.train" and all(isinstance(item, str) for item in value):
        return f"write mixture: [{', '.join(f'{{source: {item}}}' for item in value)}]" if len(value) > 1 else f"write train: {''.join(value)}"
    if isinstance(value, dict):
        inner_value = next((value[key] for key in ("name", "claimName", "secretName", "source", "path", "uri") if isinstance(value.get(key), str)), None)
        if inner_value is not None and not contains_secret(inner_value):
            return f"write {inner_value}" if path.endswith("]") else f"write {_get_field_name(path)}: {_to_flow_style(inner_value)}"
    return make_field_example_hint(path)


def _make_hint_for_pattern(value: str, path: str) -> str:
    """Return a hint with the corrected text of a field that requires a pattern, or an empty string."""
    name = _get_field_name(path)
    if contains_secret(value):
        return ""
    if path == "training.optimizer":
        return make_optimizer_hint(value)
    if name == "uri":
        mistake = explain_mistake(value, path)
        is_bucket = re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#]*)?", value)
        if value.startswith(("/", ".", "~")):
            return "write pvc://claim/path for a volume, or s3://bucket/prefix"
        return f"write {mistake[1]}" if mistake else f"write s3://{value}" if is_bucket else ""
    if path == "output.hub.repository" and (match := re.search(r"//[^/]+/([\w.-]+/[\w.-]+)/?$", value)):
        return f"write {match[1]}"
    if name == "endpoint" and re.fullmatch(r"[\w.-]+(:\d+)?/?", value):
        return f"write https://{value}"
    if name == "endpoint" and (match := re.match(r"https?://[^\s/?#@]+", value)):
        return f"write {match[0]}, and the bucket in uri"
    if path == "output.dir" and value.startswith("/") and not re.search(r"\s", value.strip("/")):
        return f"write {value.strip('/')}" if value.strip("/") else ""
    if name == "name" or name.endswith(("Name", "Claim", "Map")) or name == "secret":
        corrected_name = re.sub(r"[^a-z0-9.-]+", "-", value.lower()).strip("-.")
        return f"write {corrected_name}" if corrected_name and path != "output.runName.name" and not path.startswith("placement.env") else ""
    return ""


# --- numbers --------------------------------------------------------------------------------------------------------


def _make_hint_for_number(value: Any, path: str) -> str:
    name, field = _get_field_name(path), find_field(path)
    is_integer = field is not None and field.type_text.startswith("integer")
    if isinstance(value, float):
        return _make_hint_for_fraction(value, path)
    if not isinstance(value, str) or contains_secret(value):
        return make_field_example_hint(path)
    text = value.strip().lower().replace("_", "")
    if "Seconds" in name and (seconds := _parse_seconds(text)) is not None:
        return f"write {seconds}"
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        return make_field_example_hint(path) if is_integer else f"write {float(match[1]) / 100:g}"
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*k", text):
        return f"write {round(float(match[1]) * (1024 if 'Length' in name else 1000))}"
    if text in WORDS_FOR_NO_VALUE:
        return _make_hint_to_remove(path)
    if match := re.fullmatch(r"(\d+)\s*-?bits?", text):
        return f"write {match[1]}"
    if not is_integer and re.fullmatch(r"\d+,\d+", text) and not re.fullmatch(r"[1-9]\d{0,2},\d{3}", text):
        return f"write {text.replace(',', '.')}"
    if re.fullmatch(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?(e[-+]?\d+)?", text) and not (is_integer and "." in text):
        return f"write {text.replace(',', '')}" + (" without quotes" if "," not in text else "")
    return make_field_example_hint(path)


def _make_hint_for_fraction(value: float, path: str) -> str:
    """Return the hint for a fraction in a field that takes whole numbers."""
    if path == "training.warmupSteps" and 0 < value < 1:
        return f"write warmupRatio: {value:g}, or a whole number of steps"
    if path.endswith(".steps") and 0 < value < 1:
        return f"write a number of steps, {make_field_example_hint(path)}"
    if path == "resources.gpusPerNode":
        return "write a whole number; for a part of a GPU, set gpuResource to a MIG slice, for example nvidia.com/mig-1g.10gb"
    return make_field_example_hint(path)


def _make_hint_for_bound(value: Any, path: str, context: Mapping[str, Any]) -> str:
    """Return the hint for a number that is too small or too large."""
    limit = context.get("le", context.get("lt"))
    if limit is not None and limit <= 1 < value <= 100:
        steps_hint = f", or {_get_field_name(path).replace('Ratio', 'Steps')}: {value:g}" if path == "training.warmupRatio" else ""
        return f"write {value / 100:g} for {value:g} percent{steps_hint}"
    if limit is None and path in FIELDS_WITH_OPTIONAL_LIMIT:
        return _make_hint_to_remove(path)
    if limit is None and path == "checkpoint.keep":
        return "write 0 to keep all checkpoints"
    return make_field_example_hint(path)


def _parse_seconds(text: str) -> int | None:
    """Convert a duration such as `1h`, `1.5 hours` or `1h30m` to seconds. Return None for any other text."""
    matches = list(DURATION_PATTERN.finditer(text))
    if not matches or "".join(match[0] for match in matches) != text:
        return None
    return round(sum(float(match[1]) * SECONDS_OF_UNIT[match[2]] for match in matches))
