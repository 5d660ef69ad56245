"""`unsloth`: the importer for the arguments of Unsloth's functions, written as YAML or JSON, and for the flags of its script.

The functions are `FastLanguageModel.from_pretrained`, `get_peft_model` and `SFTConfig`. The file may have the arguments of all functions in one
group, or in several groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from finetune_cli.importers import trl_options
from finetune_cli.importers.command_lines import add_stray_mistakes, build_flag_entry, parse_flags, strip_launcher
from finetune_cli.importers.converters import to_boolean, to_choice, to_mapping, to_text, try_converters
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_mapping
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.options import make_ignored_options, make_refused_options
from finetune_cli.importers.trl_options import set_trl_options
from finetune_cli.yaml_reader import parse_value

TRL_NAME_BY_UNSLOTH_NAME = {
    "model_name": "model_name_or_path", "revision": "model_revision", "r": "lora_r", "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save", "target_parameters": "lora_target_parameters", "use_gradient_checkpointing": "gradient_checkpointing",
    "dataset": "dataset_name", "random_state": "seed", "hub_path": "hub_model_id", "push_model": "push_to_hub",
}  # fmt: skip
"""For each option that has different names in Unsloth and TRL: the name in TRL."""
GROUP_NAMES = (
    "model", "from_pretrained", "model_args", "lora", "peft", "get_peft_model", "peft_args", "lora_args", "training", "training_args", "training_arguments",
    "args", "sft_config", "trainer", "data", "data_args", "save", "logging",
)  # fmt: skip
"""Names of groups that a file may have. The importer ignores these names, because an option has the same meaning in every group."""
OWN_OPTION_ROWS: tuple[OptionRow, ...] = (
    OptionRow("full_finetuning", "method.type", to_boolean, is_set_by_combine=True),
    OptionRow("bias", "method.lora.bias", to_choice({"none": "none", "all": "all", "lora_only": "loraOnly"})),
    OptionRow("init_lora_weights", "method.lora.init", try_converters(to_boolean, to_choice(["gaussian", "pissa", "olora", "eva", "loftq"])),
        is_set_by_combine=True),
    OptionRow("loftq_config", "method.lora.loftq", try_converters(to_mapping, to_text), is_set_by_combine=True),
    OptionRow("token", "model.tokenSecretRef", is_secret=True, is_set_by_combine=True),
    OptionRow("save_method", "output.mergeAdapter", is_set_by_combine=True),
    *make_ignored_options("the trainer sets this itself",
             "device_map fast_inference gpu_memory_utilization float8_kv_cache max_lora_rank disable_log_stats use_exact_model_name "
             "fix_tokenizer resize_model_vocab unsloth_vllm_standby offload_embedding layer_replication temporary_location return_logits "
             "maximum_memory_usage"),
    *make_ignored_options("the status of the job tells where its results are stored", "save_model save_path push_method"),
    *make_refused_options("training on images, video or audio", "finetune_vision_layers"),
    *make_ignored_options("the model has language layers only", "finetune_language_layers finetune_attention_modules finetune_mlp_modules"),
    *make_refused_options("8-bit floating point weights", "load_in_fp8"),
    OptionRow("load_in_16bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    *make_refused_options("an adapter in some of the layers only", "layers_to_transform layers_pattern", "write target_modules with the names of the modules"),
    *make_refused_options("quantisation-aware training", "qat_scheme"),
    *make_refused_options("quantisation after training", "quantization", "quantise the final model with another program"),
    *make_refused_options("different learning rates for different modules", "embedding_learning_rate"),
)  # fmt: skip
OPTION_TABLE: tuple[OptionRow, ...] = (
    *(
        replace(option_row, aliases=(*option_row.aliases, *(name for name, trl_name in TRL_NAME_BY_UNSLOTH_NAME.items() if trl_name == option_row.key)))
        for option_row in trl_options.OPTION_TABLE
        if option_row.key not in {own_row.key for own_row in OWN_OPTION_ROWS}
    ),
    *OWN_OPTION_ROWS,
)  # fmt: skip
UNSLOTH_DEFAULTS = (
    ToolDefault("method.lora.rank", 16, is_applicable=lambda draft: draft.value("method.type") in ("lora", "qlora")),
    ToolDefault("method.lora.alpha", 16, is_applicable=lambda draft: draft.value("method.type") in ("lora", "qlora")),
    ToolDefault("method.lora.dropout", 0, is_applicable=lambda draft: draft.value("method.type") in ("lora", "qlora")),
    ToolDefault("dataset.maxSequenceLength", 2048),
    ToolDefault("training.gradientCheckpointing", "unsloth", needs_gpu=True),
)
DEFAULTS = (*UNSLOTH_DEFAULTS, *trl_options.DEFAULTS)
RECOGNISED_KEYS = (
    "r",
    "target_modules",
    "use_gradient_checkpointing",
    "random_state",
    "max_seq_length",
    "full_finetuning",
    "finetune_language_layers",
)


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document has `model_name` and at least two other keys of Unsloth, or the command starts Unsloth's script."""
    if any(word.endswith(("unsloth-cli.py", "unsloth_cli.py")) for word in command_words):
        return True
    for document in documents:
        content = peek_mapping(document)
        option_names = set(content) | {
            name for group in GROUP_NAMES if isinstance(content.get(group), dict) for name in content[group]
        }
        if "model_name" in option_names and sum(name in option_names for name in RECOGNISED_KEYS) >= 2:
            return True
    return False


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of the files in order, with the names of groups removed from their keys, then the flags."""
    for document in draft.documents:
        opaque_paths = {
            f"{prefix}{path}"
            for path in (*trl_options.OPAQUE_PATHS, "loftq_config")
            for prefix in ("", *(f"{group}." for group in GROUP_NAMES))
        }
        for entry in iterate_entries(document, parse_document(document), frozenset(opaque_paths)):
            group, _, name = entry.key.partition(".")
            yield OptionEntry(name if group in GROUP_NAMES and name else entry.key, entry.value, entry.origin)
    flags = parse_flags(strip_launcher(draft.request.tool_arguments), lambda name: True)
    add_stray_mistakes(draft, flags)
    for name, value in flags.name_value_pairs:
        entry = build_flag_entry(name.removeprefix("--"), True if value is None else parse_value(value))
        yield entry


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options."""
    draft.assign_default("trainer.type", "sft", "Unsloth's arguments are those of supervised training")
    draft.assign_default("trainer.backend", "unsloth", "the tool")
    is_full = draft.get("full_finetuning") is True
    if "full_finetuning" in draft.given_options:
        draft.assign("method.type", "full" if is_full else "qlora" if _is_4bit(draft) else "lora", "full_finetuning")
    elif "use_peft" not in draft.given_options:
        draft.assign_default("method.type", "qlora" if _is_4bit(draft) else "lora", "adapters are the tool's default")
    set_trl_options(draft, "sft", uses_adapter=not is_full)
    if not is_full and _is_4bit(draft) and "load_in_4bit" not in draft.given_options:
        draft.assign_default("model.quantization.bits", 4)
    if "token" in draft.given_options:
        draft.assign("model.tokenSecretRef", draft.store_secret("hf-token", draft.get("token")), "token")
    if "load_in_16bit" in draft.given_options:
        _explain_16bit(draft)
    _set_initialisation(draft)
    if "save_method" in draft.given_options:
        draft.assign("output.mergeAdapter", str(draft.get("save_method")).startswith("merged"), "save_method")
    if draft.value("resources.gpusPerNode", 1) > 1 or draft.value("resources.nodes", 1) > 1:
        draft.values.pop("trainer.backend", None)


def _is_4bit(draft: JobDraft) -> bool:
    """Return whether the base model is loaded in 4 bits, which is Unsloth's default."""
    return draft.get("load_in_4bit", not draft.get("load_in_8bit") and not draft.get("load_in_16bit")) is True


def _explain_16bit(draft: JobDraft) -> None:
    """Explain the effect of `load_in_16bit`, which sets no field: a FineTuneJob loads the base model in 16 bits if it sets no quantisation."""
    other_keys = tuple(key for key in ("load_in_4bit", "load_in_8bit") if draft.get(key) is True)
    if draft.get("load_in_16bit") is not True:
        draft.add_reason("load_in_16bit", "load_in_4bit and load_in_8bit decide, with 4 bits as the default")
    elif other_keys:
        draft.add_mistake(
            ("load_in_16bit", *other_keys), "a base model has either 4, 8 or 16 bits", "set one of them to true", explained_path="model.quantization"
        )
    else:
        draft.add_reason("load_in_16bit", "16 bits are the trainer's default for the frozen base model")


def _set_initialisation(draft: JobDraft) -> None:
    initialisation, loftq_options = draft.get("init_lora_weights"), draft.get("loftq_config")
    if isinstance(initialisation, str):
        draft.assign("method.lora.init", initialisation, "init_lora_weights")
    elif initialisation is False:
        draft.refuse_feature("init_lora_weights", "adapters without initialisation", "write true")
    elif initialisation is True:
        draft.add_reason("init_lora_weights", "true is the default initialisation")
    if isinstance(loftq_options, dict) and loftq_options:
        draft.assign("method.lora.loftq.bits", loftq_options.get("loftq_bits", 4), "loftq_config")
        draft.assign("method.lora.loftq.iterations", 1, "loftq_config")
        if loftq_options.get("loftq_iter", 1) != 1:
            draft.add_note(
                f"loftq_config: loftq_iter {loftq_options['loftq_iter']} becomes 1: "
                "each further iteration changes the base model, but only the adapter is saved"
            )
    elif "loftq_config" in draft.given_options:
        draft.add_reason("loftq_config", "LoftQ is not used")


IMPORTER = Importer(
    "unsloth", "Unsloth", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options, reports_every_key=True
)
