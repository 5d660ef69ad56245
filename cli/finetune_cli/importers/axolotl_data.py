"""The data sets of an Axolotl file: sources, prompt strategies and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.importers.chat_templates import MARKERS, TurnMarkers, assign_chat_template, assign_template_text
from finetune_cli.importers.data_parts import (
    CONTENT_KEYS,
    READABLE_FILE,
    ROLE_KEYS,
    ROLE_NAMES,
    DataPart,
    assign_parts,
    fraction_of_split,
    hub_file_url,
)
from finetune_cli.importers.draft import NEUTRAL_VALUES, JobDraft
from finetune_cli.importers.options import to_source_uri

OWN_FILE = "store the rows that you need in a separate file"


@dataclass(frozen=True)
class Strategy:
    """A prompt strategy of Axolotl: the format of the rows, their columns, and the text around question and answer.

    `template`: a name in `MARKERS`; `chat` for the chat template of the file or tokenizer; empty for rows that are one text.
    `refused` names a strategy that a FineTuneJob cannot follow.
    """

    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str = ""
    refused: str = ""


def _refused(what: str) -> Strategy:
    return Strategy(refused=what)


def _pairs(question: str, answer: str, template: str = "alpaca", **columns: str) -> Strategy:
    return Strategy("instruction", {"question": question, "answer": answer, **columns}, template)


STRATEGIES: Mapping[str, Strategy] = {
    "alpaca": Strategy("alpaca", {}, "alpaca"), "alpaca_instruct": Strategy("alpaca", {}, "alpaca"),
    "alpaca_instruct.load": Strategy("alpaca", {}, "alpaca"), "alpaca_instruct.load_no_prompt": Strategy("alpaca", {}, "alpaca"),
    "alpaca_chat": Strategy("alpaca", {}, "vicuna"), "alpaca_chat.load": Strategy("alpaca", {}, "vicuna"),
    "alpaca_chat.load_concise": Strategy("alpaca", {}, "vicuna"), "alpaca_chat.load_qa": _pairs("question", "answer", "vicuna"),
    "alpaca_chat.load_camel_ai": _pairs("message_1", "message_2", "vicuna"), "alpaca_chat.load_no_prompt": Strategy("alpaca", {}, "vicuna"),
    "alpaca_w_system": Strategy("alpaca", {"system": "system"}, "alpaca"), "alpaca_w_system.load": Strategy("alpaca", {"system": "system"}, "alpaca"),
    "alpaca_w_system.load_instruct": Strategy("alpaca", {"system": "system"}, "alpaca"),
    "alpaca_w_system.load_chat": Strategy("alpaca", {"system": "system"}, "vicuna"),
    "alpaca_w_system.load_open_orca": _pairs("question", "response", system="system_prompt"),
    "alpaca_w_system.load_open_orca_chatml": _pairs("question", "response", "chatml", system="system_prompt"),
    "gpteacher": Strategy("alpaca", {"answer": "response"}, "alpaca"), "oasst": _pairs("INSTRUCTION", "RESPONSE"),
    "summarizetldr": _pairs("article", "summary"), "context_qa": _pairs("question", "answer"), "metharme": _pairs("prompt", "generation", "metharme"),
    "orcamini": Strategy("alpaca", {"system": "system"}, "alpaca"),
    "completion": Strategy("plainText"), "pretrain": Strategy("plainText"), "chat_template": Strategy("messages", {}, "chat"),
    "chat": Strategy("messages", {}, "chat"), "messages.chat": Strategy("messages", {}, "chat"), "sharegpt": Strategy("sharegpt", {}, "chat"),
    "sharegpt.load": Strategy("sharegpt", {}, "chat"), "sharegpt.load_role": Strategy("sharegpt", {}, "chat"),
    "sharegpt.load_guanaco": Strategy("sharegpt", {}, "chat"), "sharegpt.load_ultrachat": Strategy("messages", {}, "chat"),
    "llama2_chat": Strategy("sharegpt", {}, "mistral"),
    "reflection": _refused("the prompt strategy reflection, which puts two answers into a row"),
    "explainchoice": _refused("the prompt strategy explainchoice"), "concisechoice": _refused("the prompt strategy concisechoice"),
    "jeopardy": _refused("the prompt strategy jeopardy"), "creative_acr": _refused("the prompt strategy creative_acr"),
    "pygmalion": _refused("the prompt strategy pygmalion"), "input_output": _refused("a label for each segment of a row (input_output)"),
    "stepwise_supervised": _refused("training of a process reward model"), "_synthetic": _refused("synthetic rows"),
    "ebft": _refused("energy-based fine-tuning"),
}  # fmt: skip
"""Prompt strategies of supervised training. What follows a colon in a file (`alpaca:chat`) is the style of the prompt."""
STYLES = {"chat": "vicuna", "instruct": "alpaca", "chatml": "chatml", "phi": "phi3"}
PREFERENCE_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "default": {}, "argilla_chat": {}, "argilla": {}, "icr": {"question": "input"}, "intel": {"question": "question"}, "prompt_pairs": {"question": "prompt"},
    "ultra": {}, "load": {"question": "input", "system": "system"}, "chat_template": {"question": "input", "system": "system"}, "": {},
}  # fmt: skip
"""Columns of the strategies of dpo, orpo and reward models, by the name after the dot."""
KTO_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "argilla": {"question": "instruction"}, "argilla_chat": {"question": "completion"}, "intel": {"question": "question"},
    "prompt_pairs": {"question": "prompt"}, "ultra": {"question": "prompt"}, "default": {}, "": {},
}  # fmt: skip
WITHOUT_EFFECT = {
    "preprocess_shards": "the trainer reads the rows in parallel itself", "trust_remote_code": "data is read from files, without code of the repository",
    "input_format": "the tool does not read it either", "field_human": "the names of the roles decide", "field_model": "the names of the roles decide",
    "field_tools": "the column `tools` is read if it exists", "text_column": "see `field`",
}  # fmt: skip
REFUSED_KEYS = {
    "shards": "a part of the rows of a source (shards)", "shards_idx": "a part of the rows of a source (shards)", "skip": "skipping the first rows of a source",
    "input_transform": "a transformation of rows in Python", "logprobs_field": "distillation", "temperature": "distillation",
    "message_field_training": "a mark in each message that decides whether it is trained on", "split_thinking": "splitting reasoning traces from answers",
    "message_field_training_detail": "a mark in each message that decides which of its tokens are trained on",
    "drop_system_message": "dropping the system messages of the data", "step_separator": "training of a process reward model",
    "train_on_last_step_only": "training of a process reward model", "max_completion_length": "training of a process reward model",
    "length": "synthetic rows", "sequence_length": "synthetic rows", "min_input_id": "synthetic rows", "max_input_id": "synthetic rows",
    "images": "training on images, video or audio", "image_base_dir": "training on images, video or audio",
}  # fmt: skip
READ_KEYS = (
    "path", "type", "data_files", "ds_type", "name", "split", "revision", "field", "field_messages", "field_chosen", "field_rejected", "field_prompt",
    "field_completion", "field_label", "field_system", "message_field_role", "message_field_content", "message_property_mappings", "roles",
    "roles_to_train", "train_on_eos", "train_on_eot", "chat_template", "chat_template_jinja", "conversation", "field_thinking",
    "template_thinking_key", "seed",
)  # fmt: skip
FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow")


def set_data(draft: JobDraft, trainer: str) -> None:
    """Set the data from `datasets` or `pretraining_dataset`, and the chat template."""
    key = "datasets" if draft.get("datasets") else "pretraining_dataset"
    items = draft.get(key)
    if not items:
        return
    items = items if isinstance(items, list) else [items]
    templates: list[str] = []
    parts: list[DataPart] = []
    for index, item in enumerate(items):
        part = _read_item(draft, key, f"{key}[{index}]", item, trainer, templates)
        if part is not None:
            parts.append(part)
    assign_parts(draft, key, parts)
    _set_template(draft, key, list(dict.fromkeys(templates)))


def set_test_data(draft: JobDraft, trainer: str) -> None:
    """Set the validation data from `test_datasets`, which may name one source."""
    items = draft.get("test_datasets")
    if not items:
        return
    items = items if isinstance(items, list) else [items]
    if len(items) > 1:
        draft.refuse_feature("test_datasets", "several sources of validation data", "store them in one file")
        return
    item = dict(items[0]) if isinstance(items[0], dict) else items[0]
    if isinstance(item, dict) and item.get("split") not in (None, "train") and not item.get("data_files"):
        draft.refuse_feature(
            "test_datasets", f"the split {item['split']} of a data set on the hub", "give --validation URI"
        )
        return
    part = _read_item(draft, "test_datasets", "test_datasets[0]", item, trainer, [])
    if part is not None and "dataset.validation" not in draft.request.overrides:
        draft.assign("dataset.validation", part.source, "test_datasets")


def _read_item(draft: JobDraft, key: str, name: str, item: Any, trainer: str, templates: list[str]) -> DataPart | None:
    """Return one source, or None if it is refused. The name of its template is appended to `templates`."""
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, dict):
        draft.add_mistake(key, "an item of the list is not a group of options", "write `- path: org/name`")
        return None
    location = draft.given_options[key].origin.location
    kind = item.get("type")
    kind_keys = kind if isinstance(kind, dict) else {}
    for option, value in item.items():
        _check_option(draft, location, f"{name}.{option}", option, value)
    strategy = _user_defined(draft, location, name, kind_keys) if kind_keys else _strategy(item, trainer, key)
    if strategy.refused:
        draft.refuse_feature_at(
            location, f"{name}.type", strategy.refused, "prepare the rows in another format", is_droppable=False
        )
        return None
    source = _source(draft, key, name, location, item)
    if source is None:
        return None
    templates.append(_template_of_item(draft, location, name, item, strategy))
    fraction = 1.0
    if isinstance(item.get("split"), str) and not item.get("data_files"):
        found = fraction_of_split(item["split"])
        if found is None:
            draft.refuse_feature_at(
                location,
                f"{name}.split",
                f"the split {item['split']} of a data set on the hub",
                f"{OWN_FILE}, and give --data URI",
            )
        fraction = found or 1.0
    return DataPart(
        source, strategy.format, _columns(draft, location, name, item | kind_keys, strategy), None, fraction
    )


def _check_option(draft: JobDraft, location: str, name: str, option: str, value: Any) -> None:
    is_neutral = any(
        value == neutral and isinstance(value, bool) is isinstance(neutral, bool) for neutral in NEUTRAL_VALUES
    )
    if option in REFUSED_KEYS and not is_neutral:
        draft.refuse_feature_at(location, name, REFUSED_KEYS[option], OWN_FILE)
    elif option in WITHOUT_EFFECT and not is_neutral:
        draft.add_reason(name, f"no effect: {WITHOUT_EFFECT[option]}")
    elif option not in READ_KEYS and option not in REFUSED_KEYS and option not in WITHOUT_EFFECT:
        draft.add_reason(name, "the tool does not know this key and ignores it")
        draft.add_warning(
            f"{location}: {name}: the tool does not know this key and ignores it, so the import does, too"
        )


def _strategy(item: dict[str, Any], trainer: str, key: str) -> Strategy:
    """Return the prompt strategy of a data set that names it."""
    kind = str(item.get("type") or ("completion" if key == "pretraining_dataset" else ""))
    base, _, style = kind.partition(":")
    if trainer in ("dpo", "orpo", "reward"):
        prefix, _, name = base.rpartition(".") if "." in base else ("", "", base)
        if name not in PREFERENCE_COLUMNS or prefix not in (
            "",
            "chat_template",
            "chatml",
            "llama3",
            "user_defined",
            "passthrough",
            "bradley_terry",
        ):
            return _refused(f"the prompt strategy {kind} for {trainer}")
        columns = dict(PREFERENCE_COLUMNS[name])
        if prefix == "chat_template" and name == "default":
            columns["question"] = "messages"
        return Strategy("preference", columns, prefix if prefix in ("chatml", "llama3") else "chat")
    if trainer == "kto":
        prefix, _, name = base.rpartition(".") if "." in base else ("", "", base)
        if name not in KTO_COLUMNS or prefix not in ("", "chatml", "llama3", "user_defined"):
            return _refused(f"the prompt strategy {kind} for kto")
        return Strategy("unpairedPreference", KTO_COLUMNS[name], prefix if prefix in ("chatml", "llama3") else "chat")
    if trainer == "grpo":
        return Strategy("promptOnly", {}, "chat")
    if not base:
        return _refused("training on rows that are already tokenised")
    found = STRATEGIES.get(base) or STRATEGIES.get(base.partition(".")[0])
    if found is None:
        return _refused("energy-based fine-tuning" if base.startswith("ebft") else f"the prompt strategy {base}")
    return (
        Strategy(found.format, found.columns, STYLES.get(style, found.template), found.refused)
        if found.template not in ("", "chat")
        else found
    )


def _user_defined(draft: JobDraft, location: str, name: str, kind: dict[str, Any]) -> Strategy:
    """Return the strategy of a data set whose `type` is a group of columns and formats."""
    known = (
        "system_prompt", "system_format", "field_system", "field_instruction", "field_input", "field_output", "format", "no_input_format",
        "field_prompt", "field_chosen", "field_rejected", "field_completion", "field_label", "prompt_format", "chosen_format", "rejected_format",
        "completion_format",
    )  # fmt: skip
    for option in kind:
        if option not in known:
            draft.add_warning(
                f"{location}: {name}.type.{option}: the tool does not know this key and ignores it, so the import does, too"
            )
            draft.add_reason(f"{name}.type.{option}", "the tool does not know this key and ignores it")
    if kind.get("system_prompt"):
        draft.assign("dataset.systemPrompt", str(kind["system_prompt"]), name.partition("[")[0])
    if "field_chosen" in kind or "field_rejected" in kind:
        return Strategy(
            "preference",
            _renamed(
                kind, question="field_prompt", chosen="field_chosen", rejected="field_rejected", system="field_system"
            ),
            "chat",
        )
    if "field_label" in kind or "field_completion" in kind:
        return Strategy(
            "unpairedPreference",
            _renamed(kind, question="field_prompt", answer="field_completion", label="field_label"),
            "chat",
        )
    columns = _renamed(
        {"field_instruction": "instruction", "field_output": "output", **kind}, question="field_instruction", answer="field_output", system="field_system",
        input="field_input",
    )  # fmt: skip
    text = (
        str(kind.get("no_input_format") or kind.get("format") or "{instruction}\n")
        .replace("{input}", "")
        .replace("\\n", "\n")
    )
    before, _, after = text.partition("{instruction}")
    markers = TurnMarkers(("", "\n"), (before, after), ("", "{eos}"))
    return Strategy("alpaca" if "input" in columns else "instruction", columns, f"jinja:{markers.to_jinja()}")


def _renamed(options: Mapping[str, Any], **fields: str) -> dict[str, str]:
    """Return the columns that options name: `field=option`."""
    return {field_name: str(options[option]) for field_name, option in fields.items() if options.get(option)}


def _source(draft: JobDraft, key: str, name: str, location: str, item: dict[str, Any]) -> str | None:
    """Return the source URI of a data set, or None if it is refused."""
    path, files = str(item.get("path") or ""), item.get("data_files")
    files = [files] if isinstance(files, str) else list(files or [])
    if item.get("name") not in (None, "", "default"):
        draft.refuse_feature_at(
            location,
            f"{name}.name",
            f"the configuration {item['name']} of a data set on the hub",
            f"{OWN_FILE}, and give --data URI",
        )
        return path or None
    if path == "synthetic":
        draft.refuse_feature_at(location, f"{name}.path", "synthetic rows", is_droppable=False)
        return None
    if path.startswith(("gs://", "gcs://", "az://", "adl://", "abfs://", "oci://")):
        draft.refuse_feature_at(
            location,
            f"{name}.path",
            f"reading data from {path.partition('://')[0]}://",
            "copy the data to S3",
            is_droppable=False,
        )
        return None
    if not path or "<" in path:
        draft.add_mistake(
            key, f"{name}.path: {path or 'nothing'} is not the name of a data set", "write the name, or give --data URI"
        )
        return None
    if len(files) > 1:
        draft.refuse_feature_at(
            location,
            f"{name}.data_files",
            "several files of one data set",
            "store the rows in one file, and give --data URI",
        )
        return None
    if path in FILE_BUILDERS and files:
        return to_source_uri(draft, key, "dataset.train", str(files[0]))
    if files:
        if not READABLE_FILE.search(str(files[0])):
            draft.refuse_feature_at(
                location,
                f"{name}.data_files",
                f"reading {files[0]}",
                "store the rows as JSONL, CSV, text or Parquet, and give --data URI",
            )
            return None
        return str(files[0]) if "://" in str(files[0]) else hub_file_url(path, str(files[0]), item.get("revision"))
    source = to_source_uri(draft, key, "dataset.train", path)
    return f"{source}@{item['revision']}" if item.get("revision") and "://" not in source else source


def _columns(draft: JobDraft, location: str, name: str, item: dict[str, Any], strategy: Strategy) -> dict[str, str]:
    """Return the columns of a data set, and refuse names inside messages that the trainer does not read."""
    columns = dict(strategy.columns)
    if strategy.format == "plainText":
        columns["text"] = str(item.get("field") or item.get("text_column") or "text")
        return columns
    if strategy.format in ("messages", "sharegpt") and item.get("field_messages"):
        columns["messages"] = str(item["field_messages"])
    if strategy.format == "preference":
        columns |= _renamed(item, question="field_messages", chosen="field_chosen", rejected="field_rejected")
    _check_messages(draft, location, name, item)
    return columns


def _check_messages(draft: JobDraft, location: str, name: str, item: dict[str, Any]) -> None:
    mappings = item.get("message_property_mappings") or {}
    names = {
        "message_field_role": (item.get("message_field_role") or mappings.get("role"), ROLE_KEYS),
        "message_field_content": (item.get("message_field_content") or mappings.get("content"), CONTENT_KEYS),
    }
    for option, (value, known) in names.items():
        if value and value not in known:
            draft.refuse_feature_at(
                location,
                f"{name}.{option}",
                f"messages whose key is {value} instead of {' or '.join(known)}",
                "rename the key in the data",
            )
    others = [key for key, value in mappings.items() if key not in ("role", "content") and key != value]
    if others:
        draft.refuse_feature_at(
            location,
            f"{name}.message_property_mappings",
            f"renaming the keys {', '.join(others)} of messages",
            "rename the keys in the data",
        )
    for role, sources in (item.get("roles") or {}).items():
        unknown = [
            source
            for source in ([sources] if isinstance(sources, str) else sources or [])
            if source not in ROLE_NAMES.get(role, ())
        ]
        if unknown:
            draft.refuse_feature_at(
                location,
                f"{name}.roles",
                f"the role names {', '.join(map(str, unknown))} for {role}",
                "rename the roles in the data",
            )
    roles = item.get("roles_to_train")
    if roles and any(role not in ROLE_NAMES["assistant"] for role in roles):
        draft.refuse_feature_at(
            location,
            f"{name}.roles_to_train",
            f"training on the messages of {', '.join(map(str, roles))}",
            "write [assistant]",
        )
    for option in ("train_on_eos", "train_on_eot"):
        if item.get(option) not in (None, "turn"):
            draft.refuse_feature_at(
                location,
                f"{name}.{option}",
                f"{item[option]} instead of the end token of each answer as trained end tokens",
                "write turn",
            )
    thinking = (
        item.get("field_thinking") or "reasoning_content",
        item.get("template_thinking_key") or "reasoning_content",
    )
    if thinking[0] != thinking[1] or thinking[0] not in ("reasoning_content", "thinking"):
        draft.refuse_feature_at(
            location,
            f"{name}.field_thinking",
            f"reasoning traces under the key {thinking[0]} for a template that reads {thinking[1]}",
            "rename the key in the data",
        )


def _template_of_item(draft: JobDraft, location: str, name: str, item: dict[str, Any], strategy: Strategy) -> str:
    """Return the template of a data set: a name in `MARKERS`, `chat:NAME` for a chat template of its own, `chat`, or an empty text."""
    if strategy.template != "chat":
        return strategy.template
    if item.get("chat_template_jinja"):
        return f"jinja:{item['chat_template_jinja']}"
    own = item.get("chat_template") or item.get("conversation")
    return f"chat:{own}" if own and own != "tokenizer_default" else "chat"


def _set_template(draft: JobDraft, key: str, templates: list[str]) -> None:
    """Set one template for all rows. Refuses sources with different templates."""
    templates = [template for template in templates if template]
    if len(templates) > 1:
        draft.refuse_feature(key, "a different prompt format of each source", "prepare all rows as messages")
        return
    if not templates:
        if draft.get("chat_template"):
            draft.add_reason("chat_template", "no effect: the rows are plain text")
        return
    (template,) = templates
    if template.startswith("jinja:"):
        _set_jinja(draft, key, template.removeprefix("jinja:"))
    elif template.startswith("chat"):
        _set_chat_template(draft, key, template.partition(":")[2])
    elif template == "llama3":
        assign_chat_template(draft, key, "llama3")
    else:
        assign_template_text(draft, key, template)
        if template in ("alpaca", "vicuna"):
            draft.add_note(
                f"{key}: rows are written as {MARKERS[template].user[0].strip()} ... {MARKERS[template].assistant[0].strip()} ...; the tool also writes an "
                "introduction, which you can set with --set dataset.systemPrompt=TEXT"
            )
    if not template.startswith("chat") and draft.get("chat_template"):
        draft.add_reason("chat_template", "no effect: the prompt format of the data set applies")


def _set_chat_template(draft: JobDraft, key: str, name: str) -> None:
    given = draft.get("chat_template")
    jinja = draft.get("chat_template_jinja")
    name = name or str(given or "")
    own_key = "chat_template" if "chat_template" in draft.given_options else key
    if name == "jinja" or (jinja and not name):
        _set_jinja(draft, "chat_template_jinja" if jinja else own_key, str(jinja or ""))
        return
    if name.startswith("tokenizer_default_fallback_"):
        fallback = name.removeprefix("tokenizer_default_fallback_")
        draft.add_warning(
            f"chat_template: the chat template of the tokenizer is used; if it has none, give --set dataset.chatTemplate.text for {fallback}"
        )
        draft.add_reason(own_key, "the chat template of the tokenizer is used")
    elif name in ("", "tokenizer_default"):
        if own_key == "chat_template":
            draft.add_reason(own_key, "the chat template of the tokenizer is used")
    else:
        assign_chat_template(draft, own_key, {"llama-3": "llama3", "llama-2": "llama2"}.get(name, name))


def _set_jinja(draft: JobDraft, key: str, text: str) -> None:
    if "{" in text:
        draft.assign("dataset.chatTemplate.text", text, key)
    else:
        draft.refuse_feature(
            key, f"reading the chat template from the file {text or '(none)'}",
            "store the file in a ConfigMap and give --set dataset.chatTemplate.configMapRef.name=NAME --set dataset.chatTemplate.configMapRef.key=KEY",
        )  # fmt: skip
