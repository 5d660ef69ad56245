"""Reads the data sets of an Axolotl file: their sources, prompt strategies and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.importers.chat_templates import MARKERS, TurnMarkers, assign_chat_template, assign_template_text
from finetune_cli.importers.data_sources import (
    CONTENT_KEYS,
    READABLE_FILE_PATTERN,
    ROLE_KEYS,
    ROLE_NAMES,
    DataSource,
    assign_data_sources,
    parse_split_fraction,
    to_hub_file_url,
)
from finetune_cli.importers.draft import NEUTRAL_VALUES, JobDraft
from finetune_cli.importers.options import normalise_source_uri

SEPARATE_FILE_HINT = "store the rows that you need in a separate file"


@dataclass(frozen=True)
class PromptStrategy:
    """A prompt strategy of Axolotl: the format of the rows, their columns, and the text around question and answer.

    `template`: a name in `MARKERS`, or `chat` for the chat template of the Axolotl file or the tokenizer, or `jinja:TEXT` for the Jinja template
    TEXT. It is empty if the rows are plain text. `missing_feature`: the feature of the strategy that a FineTuneJob does not have, or an empty text.
    """

    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str = ""
    missing_feature: str = ""


def _make_refused_strategy(feature: str) -> PromptStrategy:
    return PromptStrategy(missing_feature=feature)


def _make_pair_strategy(question: str, answer: str, template: str = "alpaca", **columns: str) -> PromptStrategy:
    return PromptStrategy("instruction", {"question": question, "answer": answer, **columns}, template)


PROMPT_STRATEGY_BY_TYPE: Mapping[str, PromptStrategy] = {
    "alpaca": PromptStrategy("alpaca", {}, "alpaca"), "alpaca_instruct": PromptStrategy("alpaca", {}, "alpaca"),
    "alpaca_instruct.load": PromptStrategy("alpaca", {}, "alpaca"), "alpaca_instruct.load_no_prompt": PromptStrategy("alpaca", {}, "alpaca"),
    "alpaca_chat": PromptStrategy("alpaca", {}, "vicuna"), "alpaca_chat.load": PromptStrategy("alpaca", {}, "vicuna"),
    "alpaca_chat.load_concise": PromptStrategy("alpaca", {}, "vicuna"), "alpaca_chat.load_qa": _make_pair_strategy("question", "answer", "vicuna"),
    "alpaca_chat.load_camel_ai": _make_pair_strategy("message_1", "message_2", "vicuna"),
    "alpaca_chat.load_no_prompt": PromptStrategy("alpaca", {}, "vicuna"),
    "alpaca_w_system": PromptStrategy("alpaca", {"system": "system"}, "alpaca"),
    "alpaca_w_system.load": PromptStrategy("alpaca", {"system": "system"}, "alpaca"),
    "alpaca_w_system.load_instruct": PromptStrategy("alpaca", {"system": "system"}, "alpaca"),
    "alpaca_w_system.load_chat": PromptStrategy("alpaca", {"system": "system"}, "vicuna"),
    "alpaca_w_system.load_open_orca": _make_pair_strategy("question", "response", system="system_prompt"),
    "alpaca_w_system.load_open_orca_chatml": _make_pair_strategy("question", "response", "chatml", system="system_prompt"),
    "gpteacher": PromptStrategy("alpaca", {"answer": "response"}, "alpaca"), "oasst": _make_pair_strategy("INSTRUCTION", "RESPONSE"),
    "summarizetldr": _make_pair_strategy("article", "summary"), "context_qa": _make_pair_strategy("question", "answer"),
    "metharme": _make_pair_strategy("prompt", "generation", "metharme"),
    "orcamini": PromptStrategy("alpaca", {"system": "system"}, "alpaca"),
    "completion": PromptStrategy("plainText"), "pretrain": PromptStrategy("plainText"), "chat_template": PromptStrategy("messages", {}, "chat"),
    "chat": PromptStrategy("messages", {}, "chat"), "messages.chat": PromptStrategy("messages", {}, "chat"), "sharegpt": PromptStrategy("sharegpt", {}, "chat"),
    "sharegpt.load": PromptStrategy("sharegpt", {}, "chat"), "sharegpt.load_role": PromptStrategy("sharegpt", {}, "chat"),
    "sharegpt.load_guanaco": PromptStrategy("sharegpt", {}, "chat"), "sharegpt.load_ultrachat": PromptStrategy("messages", {}, "chat"),
    "llama2_chat": PromptStrategy("sharegpt", {}, "mistral"),
    "reflection": _make_refused_strategy("the prompt strategy reflection, which puts two answers into a row"),
    "explainchoice": _make_refused_strategy("the prompt strategy explainchoice"), "concisechoice": _make_refused_strategy("the prompt strategy concisechoice"),
    "jeopardy": _make_refused_strategy("the prompt strategy jeopardy"), "creative_acr": _make_refused_strategy("the prompt strategy creative_acr"),
    "pygmalion": _make_refused_strategy("the prompt strategy pygmalion"),
    "input_output": _make_refused_strategy("a label for each segment of a row (input_output)"),
    "stepwise_supervised": _make_refused_strategy("training of a process reward model"), "_synthetic": _make_refused_strategy("synthetic rows"),
    "ebft": _make_refused_strategy("energy-based fine-tuning"),
}  # fmt: skip
"""Axolotl's prompt strategies for supervised training, by the name in the option `type`.

In `alpaca:chat`, the name is `alpaca`, and `chat` is a key of `TEMPLATE_BY_STYLE`.
"""
TEMPLATE_BY_STYLE = {"chat": "vicuna", "instruct": "alpaca", "chatml": "chatml", "phi": "phi3"}
"""The name of a template in `MARKERS` for each prompt style, which is the text after the colon in the option `type`."""
PREFERENCE_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "default": {}, "argilla_chat": {}, "argilla": {}, "icr": {"question": "input"}, "intel": {"question": "question"}, "prompt_pairs": {"question": "prompt"},
    "ultra": {}, "load": {"question": "input", "system": "system"}, "chat_template": {"question": "input", "system": "system"}, "": {},
}  # fmt: skip
"""Columns of the prompt strategies for DPO, ORPO and reward models. The key is the last part of the strategy's name, such as `intel` in `chatml.intel`."""
KTO_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "argilla": {"question": "instruction"}, "argilla_chat": {"question": "completion"}, "intel": {"question": "question"},
    "prompt_pairs": {"question": "prompt"}, "ultra": {"question": "prompt"}, "default": {}, "": {},
}  # fmt: skip
REASON_BY_IGNORED_KEY = {
    "preprocess_shards": "the trainer reads the rows in parallel itself",
    "trust_remote_code": "the trainer reads data files and runs no code of the repository",
    "input_format": "the tool does not read this key either", "field_human": "the trainer recognises roles by their names",
    "field_model": "the trainer recognises roles by their names",
    "field_tools": "the column `tools` is read if it exists", "text_column": "the key `field` names the column of the text",
}  # fmt: skip
FEATURE_BY_REFUSED_KEY = {
    "shards": "training on one shard of the rows of a source", "shards_idx": "training on one shard of the rows of a source",
    "skip": "skipping the first rows of a source", "input_transform": "a transformation of rows in Python",
    "logprobs_field": "distillation", "temperature": "distillation",
    "message_field_training": "a mark in each message that decides whether it is trained on", "split_thinking": "splitting reasoning traces from answers",
    "message_field_training_detail": "a mark in each message that decides which of its tokens are trained on",
    "drop_system_message": "dropping the system messages of the data", "step_separator": "training of a process reward model",
    "train_on_last_step_only": "training of a process reward model", "max_completion_length": "training of a process reward model",
    "length": "synthetic rows", "sequence_length": "synthetic rows", "min_input_id": "synthetic rows", "max_input_id": "synthetic rows",
    "images": "training on images, video or audio", "image_base_dir": "training on images, video or audio",
}  # fmt: skip
SUPPORTED_KEYS = (
    "path", "type", "data_files", "ds_type", "name", "split", "revision", "field", "field_messages", "field_chosen", "field_rejected", "field_prompt",
    "field_completion", "field_label", "field_system", "message_field_role", "message_field_content", "message_property_mappings", "roles",
    "roles_to_train", "train_on_eos", "train_on_eot", "chat_template", "chat_template_jinja", "conversation", "field_thinking",
    "template_thinking_key", "seed",
)  # fmt: skip
"""Keys of a data set that the import knows, and neither ignores nor refuses in general."""
FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""Values of `path` that name a file reader of the library `datasets`. The file is then named by `data_files`."""


def set_data(draft: JobDraft, trainer: str) -> None:
    """Set the data from `datasets` or `pretraining_dataset`, and the chat template."""
    key = "datasets" if draft.get("datasets") else "pretraining_dataset"
    entries = draft.get(key)
    if not entries:
        return
    entries = entries if isinstance(entries, list) else [entries]
    templates: list[str] = []
    data_sources: list[DataSource] = []
    for index, entry in enumerate(entries):
        data_source = _read_dataset(draft, key, f"{key}[{index}]", entry, trainer, templates)
        if data_source is not None:
            data_sources.append(data_source)
    assign_data_sources(draft, key, data_sources)
    _set_template(draft, key, list(dict.fromkeys(templates)))


def set_test_data(draft: JobDraft, trainer: str) -> None:
    """Set the validation data from `test_datasets`. Refuse `test_datasets` if it lists several sources."""
    entries = draft.get("test_datasets")
    if not entries:
        return
    entries = entries if isinstance(entries, list) else [entries]
    if len(entries) > 1:
        draft.refuse_feature("test_datasets", "several sources of validation data", "store them in one file")
        return
    entry = dict(entries[0]) if isinstance(entries[0], dict) else entries[0]
    if isinstance(entry, dict) and entry.get("split") not in (None, "train") and not entry.get("data_files"):
        draft.refuse_feature(
            "test_datasets", f"the split {entry['split']} of a data set on the hub", "give --validation URI"
        )
        return
    data_source = _read_dataset(draft, "test_datasets", "test_datasets[0]", entry, trainer, [])
    if data_source is not None and "dataset.validation" not in draft.request.overrides:
        draft.assign("dataset.validation", data_source.source, "test_datasets")


def _read_dataset(draft: JobDraft, option_key: str, entry_path: str, entry: Any, trainer: str, templates: list[str]) -> DataSource | None:
    """Return the data source of an entry in `datasets`, or None if the entry is refused. Append the entry's template to `templates`."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        draft.add_mistake(option_key, "an entry of the list is not a group of options", "write `- path: org/name`")
        return None
    location = draft.given_options[option_key].origin.location
    prompt_type = entry.get("type")
    prompt_options = prompt_type if isinstance(prompt_type, dict) else {}
    for option, value in entry.items():
        _check_option(draft, location, f"{entry_path}.{option}", option, value)
    strategy = _read_user_defined_strategy(draft, location, entry_path, prompt_options) if prompt_options else _choose_strategy(entry, trainer, option_key)
    if strategy.missing_feature:
        draft.refuse_feature_at(
            location, f"{entry_path}.type", strategy.missing_feature, "prepare the rows in another format", is_droppable=False
        )
        return None
    source = _find_source_uri(draft, option_key, entry_path, location, entry)
    if source is None:
        return None
    templates.append(_choose_template(draft, location, entry_path, entry, strategy))
    fraction = 1.0
    if isinstance(entry.get("split"), str) and not entry.get("data_files"):
        split_fraction = parse_split_fraction(entry["split"])
        if split_fraction is None:
            draft.refuse_feature_at(
                location,
                f"{entry_path}.split",
                f"the split {entry['split']} of a data set on the hub",
                f"{SEPARATE_FILE_HINT}, and give --data URI",
            )
        fraction = split_fraction or 1.0
    return DataSource(
        source, strategy.format, _read_columns(draft, location, entry_path, entry | prompt_options, strategy), None, fraction
    )


def _check_option(draft: JobDraft, location: str, option_path: str, option: str, value: Any) -> None:
    is_neutral = any(
        value == neutral and isinstance(value, bool) is isinstance(neutral, bool) for neutral in NEUTRAL_VALUES
    )
    if option in FEATURE_BY_REFUSED_KEY and not is_neutral:
        draft.refuse_feature_at(location, option_path, FEATURE_BY_REFUSED_KEY[option], SEPARATE_FILE_HINT)
    elif option in REASON_BY_IGNORED_KEY and not is_neutral:
        draft.add_reason(option_path, f"no effect: {REASON_BY_IGNORED_KEY[option]}")
    elif option not in SUPPORTED_KEYS and option not in FEATURE_BY_REFUSED_KEY and option not in REASON_BY_IGNORED_KEY:
        draft.add_reason(option_path, "the tool does not know this key and ignores it")
        draft.add_warning(
            f"{location}: {option_path}: the tool does not know this key and ignores it, so the import ignores it, too"
        )


def _choose_strategy(entry: dict[str, Any], trainer: str, option_key: str) -> PromptStrategy:
    """Return the prompt strategy that the option `type` of a data set names."""
    prompt_type = str(entry.get("type") or ("completion" if option_key == "pretraining_dataset" else ""))
    base, _, style = prompt_type.partition(":")
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
            return _make_refused_strategy(f"the prompt strategy {prompt_type} for {trainer}")
        columns = dict(PREFERENCE_COLUMNS[name])
        if prefix == "chat_template" and name == "default":
            columns["question"] = "messages"
        return PromptStrategy("preference", columns, prefix if prefix in ("chatml", "llama3") else "chat")
    if trainer == "kto":
        prefix, _, name = base.rpartition(".") if "." in base else ("", "", base)
        if name not in KTO_COLUMNS or prefix not in ("", "chatml", "llama3", "user_defined"):
            return _make_refused_strategy(f"the prompt strategy {prompt_type} for kto")
        return PromptStrategy("unpairedPreference", KTO_COLUMNS[name], prefix if prefix in ("chatml", "llama3") else "chat")
    if trainer == "grpo":
        return PromptStrategy("promptOnly", {}, "chat")
    if not base:
        return _make_refused_strategy("training on rows that are already tokenised")
    strategy = PROMPT_STRATEGY_BY_TYPE.get(base) or PROMPT_STRATEGY_BY_TYPE.get(base.partition(".")[0])
    if strategy is None:
        return _make_refused_strategy("energy-based fine-tuning" if base.startswith("ebft") else f"the prompt strategy {base}")
    return (
        PromptStrategy(strategy.format, strategy.columns, TEMPLATE_BY_STYLE.get(style, strategy.template), strategy.missing_feature)
        if strategy.template not in ("", "chat")
        else strategy
    )


def _read_user_defined_strategy(draft: JobDraft, location: str, entry_path: str, prompt_options: dict[str, Any]) -> PromptStrategy:
    """Return the prompt strategy of a data set whose option `type` is a group. This group holds the names of columns and a prompt format."""
    known_names = (
        "system_prompt", "system_format", "field_system", "field_instruction", "field_input", "field_output", "format", "no_input_format",
        "field_prompt", "field_chosen", "field_rejected", "field_completion", "field_label", "prompt_format", "chosen_format", "rejected_format",
        "completion_format",
    )  # fmt: skip
    for option in prompt_options:
        if option not in known_names:
            draft.add_warning(
                f"{location}: {entry_path}.type.{option}: the tool does not know this key and ignores it, so the import ignores it, too"
            )
            draft.add_reason(f"{entry_path}.type.{option}", "the tool does not know this key and ignores it")
    if prompt_options.get("system_prompt"):
        draft.assign("dataset.systemPrompt", str(prompt_options["system_prompt"]), entry_path.partition("[")[0])
    if "field_chosen" in prompt_options or "field_rejected" in prompt_options:
        return PromptStrategy(
            "preference",
            _map_columns(
                prompt_options, question="field_prompt", chosen="field_chosen", rejected="field_rejected", system="field_system"
            ),
            "chat",
        )
    if "field_label" in prompt_options or "field_completion" in prompt_options:
        return PromptStrategy(
            "unpairedPreference",
            _map_columns(prompt_options, question="field_prompt", answer="field_completion", label="field_label"),
            "chat",
        )
    columns = _map_columns(
        {"field_instruction": "instruction", "field_output": "output", **prompt_options}, question="field_instruction", answer="field_output",
        system="field_system", input="field_input",
    )  # fmt: skip
    prompt_format = (
        str(prompt_options.get("no_input_format") or prompt_options.get("format") or "{instruction}\n")
        .replace("{input}", "")
        .replace("\\n", "\n")
    )
    text_before, _, text_after = prompt_format.partition("{instruction}")
    markers = TurnMarkers(("", "\n"), (text_before, text_after), ("", "{eos}"))
    return PromptStrategy("alpaca" if "input" in columns else "instruction", columns, f"jinja:{markers.to_jinja()}")


def _map_columns(options: Mapping[str, Any], **fields: str) -> dict[str, str]:
    """Return the name of the column in the data for each field of `dataset.columns`. `fields`: for each field, the option that names its column."""
    return {field_name: str(options[option]) for field_name, option in fields.items() if options.get(option)}


def _find_source_uri(draft: JobDraft, option_key: str, entry_path: str, location: str, entry: dict[str, Any]) -> str | None:
    """Return the source URI of a data set, or None if the data set is refused."""
    path, files = str(entry.get("path") or ""), entry.get("data_files")
    files = [files] if isinstance(files, str) else list(files or [])
    if entry.get("name") not in (None, "", "default"):
        draft.refuse_feature_at(
            location,
            f"{entry_path}.name",
            f"the configuration {entry['name']} of a data set on the hub",
            f"{SEPARATE_FILE_HINT}, and give --data URI",
        )
        return path or None
    if path == "synthetic":
        draft.refuse_feature_at(location, f"{entry_path}.path", "synthetic rows", is_droppable=False)
        return None
    if path.startswith(("gs://", "gcs://", "az://", "adl://", "abfs://", "oci://")):
        draft.refuse_feature_at(
            location,
            f"{entry_path}.path",
            f"reading data from {path.partition('://')[0]}://",
            "copy the data to S3",
            is_droppable=False,
        )
        return None
    if not path or "<" in path:
        draft.add_mistake(
            option_key, f"{entry_path}.path: {path or 'nothing'} is not the name of a data set", "write the name, or give --data URI"
        )
        return None
    if len(files) > 1:
        draft.refuse_feature_at(
            location,
            f"{entry_path}.data_files",
            "several files of one data set",
            "store the rows in one file, and give --data URI",
        )
        return None
    if path in FILE_BUILDERS and files:
        return normalise_source_uri(draft, option_key, "dataset.train", str(files[0]))
    if files:
        if not READABLE_FILE_PATTERN.search(str(files[0])):
            draft.refuse_feature_at(
                location,
                f"{entry_path}.data_files",
                f"reading {files[0]}",
                "store the rows as JSONL, CSV, text or Parquet, and give --data URI",
            )
            return None
        return str(files[0]) if "://" in str(files[0]) else to_hub_file_url(path, str(files[0]), entry.get("revision"))
    source = normalise_source_uri(draft, option_key, "dataset.train", path)
    return f"{source}@{entry['revision']}" if entry.get("revision") and "://" not in source else source


def _read_columns(draft: JobDraft, location: str, entry_path: str, entry: dict[str, Any], strategy: PromptStrategy) -> dict[str, str]:
    """Return the columns of a data set. Refuse keys and roles of messages that the trainer does not read."""
    columns = dict(strategy.columns)
    if strategy.format == "plainText":
        columns["text"] = str(entry.get("field") or entry.get("text_column") or "text")
        return columns
    if strategy.format in ("messages", "sharegpt") and entry.get("field_messages"):
        columns["messages"] = str(entry["field_messages"])
    if strategy.format == "preference":
        columns |= _map_columns(entry, question="field_messages", chosen="field_chosen", rejected="field_rejected")
    _check_message_keys(draft, location, entry_path, entry)
    return columns


def _check_message_keys(draft: JobDraft, location: str, entry_path: str, entry: dict[str, Any]) -> None:
    mappings = entry.get("message_property_mappings") or {}
    key_names_by_option = {
        "message_field_role": (entry.get("message_field_role") or mappings.get("role"), ROLE_KEYS),
        "message_field_content": (entry.get("message_field_content") or mappings.get("content"), CONTENT_KEYS),
    }
    for option, (key_name, supported_names) in key_names_by_option.items():
        if key_name and key_name not in supported_names:
            draft.refuse_feature_at(
                location,
                f"{entry_path}.{option}",
                f"messages whose key is {key_name} instead of {' or '.join(supported_names)}",
                "rename the key in the data",
            )
    renamed_keys = [key for key, key_name in mappings.items() if key not in ("role", "content") and key != key_name]
    if renamed_keys:
        draft.refuse_feature_at(
            location,
            f"{entry_path}.message_property_mappings",
            f"renaming the keys {', '.join(renamed_keys)} of messages",
            "rename the keys in the data",
        )
    for role, role_names in (entry.get("roles") or {}).items():
        unknown_names = [
            role_name
            for role_name in ([role_names] if isinstance(role_names, str) else role_names or [])
            if role_name not in ROLE_NAMES.get(role, ())
        ]
        if unknown_names:
            draft.refuse_feature_at(
                location,
                f"{entry_path}.roles",
                f"the role names {', '.join(map(str, unknown_names))} for {role}",
                "rename the roles in the data",
            )
    roles = entry.get("roles_to_train")
    if roles and any(role not in ROLE_NAMES["assistant"] for role in roles):
        draft.refuse_feature_at(
            location,
            f"{entry_path}.roles_to_train",
            f"training on the messages of {', '.join(map(str, roles))}",
            "write [assistant]",
        )
    for option in ("train_on_eos", "train_on_eot"):
        if entry.get(option) not in (None, "turn"):
            draft.refuse_feature_at(
                location,
                f"{entry_path}.{option}",
                f"the value {entry[option]} for the end tokens that are trained on",
                "write turn",
            )
    thinking_keys = (
        entry.get("field_thinking") or "reasoning_content",
        entry.get("template_thinking_key") or "reasoning_content",
    )
    if thinking_keys[0] != thinking_keys[1] or thinking_keys[0] not in ("reasoning_content", "thinking"):
        draft.refuse_feature_at(
            location,
            f"{entry_path}.field_thinking",
            f"reasoning traces under the key {thinking_keys[0]} for a template that reads {thinking_keys[1]}",
            "rename the key in the data",
        )


def _choose_template(draft: JobDraft, location: str, entry_path: str, entry: dict[str, Any], strategy: PromptStrategy) -> str:
    """Return the template of a data set in the form of `PromptStrategy.template`, or `chat:NAME` if the data set names a chat template."""
    if strategy.template != "chat":
        return strategy.template
    if entry.get("chat_template_jinja"):
        return f"jinja:{entry['chat_template_jinja']}"
    entry_template = entry.get("chat_template") or entry.get("conversation")
    return f"chat:{entry_template}" if entry_template and entry_template != "tokenizer_default" else "chat"


def _set_template(draft: JobDraft, option_key: str, templates: list[str]) -> None:
    """Set one template for all rows. Refuse sources with different templates."""
    templates = [template for template in templates if template]
    if len(templates) > 1:
        draft.refuse_feature(option_key, "a different prompt format for each source", "prepare all rows as messages")
        return
    if not templates:
        if draft.get("chat_template"):
            draft.add_reason("chat_template", "no effect: the rows are plain text")
        return
    (template,) = templates
    if template.startswith("jinja:"):
        _set_jinja_template(draft, option_key, template.removeprefix("jinja:"))
    elif template.startswith("chat"):
        _set_chat_template(draft, option_key, template.partition(":")[2])
    elif template == "llama3":
        assign_chat_template(draft, option_key, "llama3")
    else:
        assign_template_text(draft, option_key, template)
        if template in ("alpaca", "vicuna"):
            draft.add_note(
                f"{option_key}: rows are written as {MARKERS[template].user[0].strip()} ... {MARKERS[template].assistant[0].strip()} ...; "
                "the tool also writes an introduction, which you can set with --set dataset.systemPrompt=TEXT"
            )
    if not template.startswith("chat") and draft.get("chat_template"):
        draft.add_reason("chat_template", "no effect: the prompt format of the data set is used instead")


def _set_chat_template(draft: JobDraft, option_key: str, name: str) -> None:
    given_template = draft.get("chat_template")
    jinja_text = draft.get("chat_template_jinja")
    name = name or str(given_template or "")
    template_key = "chat_template" if "chat_template" in draft.given_options else option_key
    if name == "jinja" or (jinja_text and not name):
        _set_jinja_template(draft, "chat_template_jinja" if jinja_text else template_key, str(jinja_text or ""))
        return
    if name.startswith("tokenizer_default_fallback_"):
        fallback_name = name.removeprefix("tokenizer_default_fallback_")
        draft.add_warning(
            f"chat_template: the chat template of the tokenizer is used; if it has none, write the template {fallback_name} in dataset.chatTemplate.text"
        )
        draft.add_reason(template_key, "the chat template of the tokenizer is used")
    elif name in ("", "tokenizer_default"):
        if template_key == "chat_template":
            draft.add_reason(template_key, "the chat template of the tokenizer is used")
    else:
        assign_chat_template(draft, template_key, {"llama-3": "llama3", "llama-2": "llama2"}.get(name, name))


def _set_jinja_template(draft: JobDraft, option_key: str, template_text: str) -> None:
    if "{" in template_text:
        draft.assign("dataset.chatTemplate.text", template_text, option_key)
    else:
        draft.refuse_feature(
            option_key, f"reading the chat template from the file {template_text or '(none)'}",
            "store the file in a ConfigMap and give --set dataset.chatTemplate.configMapRef.name=NAME --set dataset.chatTemplate.configMapRef.key=KEY",
        )  # fmt: skip
