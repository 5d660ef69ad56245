"""`llamafactory`: the importer for a training configuration of LLaMA-Factory, as YAML or JSON, and `key=value` overrides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from finetune_cli.importers import training_arguments
from finetune_cli.importers.accelerate import is_accelerate, read_accelerate
from finetune_cli.importers.chat_templates import assign_chat_template
from finetune_cli.importers.command_lines import strip_launcher
from finetune_cli.importers.converters import (
    to_boolean,
    to_choice,
    to_integer,
    to_list_of,
    to_name_list,
    to_number,
    to_text,
)
from finetune_cli.importers.data_sources import set_validation_split
from finetune_cli.importers.deepspeed import is_deepspeed
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_mapping
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.llamafactory_data import is_dataset_info, set_data
from finetune_cli.importers.llamafactory_keys import IGNORED_OPTION_ROWS, REFUSED_OPTION_ROWS
from finetune_cli.importers.options import assign_default_gpus, assign_source_uri, double_kto_batch
from finetune_cli.importers.training_arguments import has_validation, set_training_arguments
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import ValueOrigin
from finetune_cli.yaml_reader import parse_value

TRAINER_BY_STAGE = {"sft": "sft", "pt": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}
ATTENTION_BY_NAME = {"auto": "auto", "disabled": "eager", "sdpa": "sdpa", "fa2": "flashAttention2", "fa3": "fa3"}

PRECISION_BY_MEGATRON_NAME = {
    "bf16_mixed": "bf16",
    "bf16": "bf16",
    "fp16_mixed": "fp16",
    "fp16": "fp16",
    "no": "no",
    "fp8": "fp8",
}


def to_names(value: Any) -> list[str]:
    """Convert a list of names, or one string with names that are separated by commas."""
    names: list[str] = to_name_list(value)
    return names


OPTION_TABLE: tuple[OptionRow, ...] = (
    # model
    OptionRow("model_name_or_path", "model.source", is_required=True, is_set_by_combine=True),
    OptionRow("model_revision", "model.source", is_set_by_combine=True),
    OptionRow("adapter_name_or_path", "method.adapter.source", to_names, is_set_by_combine=True),
    OptionRow("trust_remote_code", "model.trustRemoteCode", to_boolean),
    OptionRow("hf_hub_token", "model.tokenSecretRef", is_secret=True, is_set_by_combine=True),
    OptionRow("ms_hub_token", no_effect_reason="models come from Hugging Face", is_secret=True),
    OptionRow("om_hub_token", no_effect_reason="models come from Hugging Face", is_secret=True),
    OptionRow("swanlab_api_key", no_effect_reason="a FineTuneJob reports to wandb, tensorboard, mlflow and mongodb", is_secret=True),
    OptionRow("swanlab_lark_secret", no_effect_reason="a FineTuneJob reports to wandb, tensorboard, mlflow and mongodb", is_secret=True),
    OptionRow("flash_attn", "model.attention", to_choice(ATTENTION_BY_NAME), is_set_by_combine=True),
    OptionRow("quantization_bit", "model.quantization.bits", to_integer(1, 8), is_set_by_combine=True),
    OptionRow("quantization_method", is_set_by_combine=True),
    OptionRow("quantization_type", "model.quantization.type", to_choice(["nf4", "fp4"]), is_set_by_combine=True),
    OptionRow("double_quantization", "model.quantization.doubleQuant", to_boolean, is_set_by_combine=True),
    OptionRow("add_tokens", "model.newTokens", to_names, is_set_by_combine=True),
    OptionRow("add_special_tokens", "model.newTokens", to_names, is_set_by_combine=True),
    OptionRow("use_unsloth", "trainer.backend", to_boolean, is_set_by_combine=True),
    OptionRow("use_unsloth_gc", "training.gradientCheckpointing", to_boolean, is_set_by_combine=True),
    OptionRow("disable_gradient_checkpointing", "training.gradientCheckpointing", to_boolean, is_set_by_combine=True),
    # method
    OptionRow("stage", "trainer.type", to_choice(TRAINER_BY_STAGE), is_set_by_combine=True),
    OptionRow("finetuning_type", "method.type", to_choice(["lora", "full", "freeze", "oft"]), is_set_by_combine=True),
    OptionRow("lora_rank", "method.lora.rank", to_integer(1)),
    OptionRow("lora_alpha", "method.lora.alpha", to_number(exclusive_low=0)),
    OptionRow("lora_dropout", "method.lora.dropout", to_number(0, exclusive_high=1)),
    OptionRow("lora_target", "method.lora.targetModules", to_names, is_set_by_combine=True),
    OptionRow("additional_target", "method.lora.modulesToSave", to_names),
    OptionRow("loraplus_lr_ratio", "method.lora.plusRatio", to_number(1)),
    OptionRow("use_rslora", "method.lora.rankStabilized", to_boolean),
    OptionRow("use_dora", "method.lora.useDora", to_boolean),
    OptionRow("pissa_init", "method.lora.init", to_boolean, is_set_by_combine=True),
    OptionRow("pure_bf16", "model.dtype", to_boolean, is_set_by_combine=True),
    # preferences
    OptionRow("pref_beta", "trainer.dpo.beta", to_number(exclusive_low=0), is_set_by_combine=True),
    OptionRow("pref_loss", "trainer.dpo.lossTypes", to_choice(["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"]), is_set_by_combine=True),
    OptionRow("pref_ftx", "trainer.dpo.lossTypes", to_number(0), is_set_by_combine=True),
    OptionRow("ref_model", "trainer.dpo.referenceModel", is_set_by_combine=True),
    # data
    OptionRow("dataset", "dataset.train", to_names, is_set_by_combine=True),
    OptionRow("eval_dataset", "dataset.validation", to_names, is_set_by_combine=True),
    OptionRow("dataset_dir", is_set_by_combine=True),
    OptionRow("template", "dataset.chatTemplate", is_set_by_combine=True),
    OptionRow("cutoff_len", "dataset.maxSequenceLength", to_integer(1)),
    OptionRow("train_on_prompt", "dataset.responseOnly.enabled", to_boolean, is_set_by_combine=True),
    OptionRow("mix_strategy", "dataset.mixture", to_choice(["concat", "interleave_under", "interleave_over", "interleave_once"]), is_set_by_combine=True),
    OptionRow("interleave_probs", "dataset.mixture", to_list_of(to_number(exclusive_low=0)), is_set_by_combine=True),
    OptionRow("preprocessing_num_workers", "dataset.numProc", to_integer(1)),
    OptionRow("max_samples", convert=to_integer(1), is_set_by_combine=True),
    OptionRow("val_size", "dataset.split.validation", to_number(0), is_set_by_combine=True),
    OptionRow("packing", "dataset.packing", to_boolean, is_set_by_combine=True),
    OptionRow("neat_packing", "dataset.packing", to_boolean, is_set_by_combine=True),
    OptionRow("default_system", "dataset.systemPrompt", to_text),
    OptionRow("enable_thinking", convert=to_boolean, is_set_by_combine=True),
    OptionRow("early_stopping_steps", "training.earlyStopping.patience", to_integer(1), is_set_by_combine=True),
    OptionRow("ray_num_workers", "resources.gpusPerNode", to_integer(1), is_set_by_combine=True),
    OptionRow("mixed_precision", "training.mixedPrecision", to_choice(PRECISION_BY_MEGATRON_NAME), is_set_by_combine=True),
    *IGNORED_OPTION_ROWS, *REFUSED_OPTION_ROWS,
    *training_arguments.OPTION_TABLE,
)  # fmt: skip


def _uses_lora(draft: JobDraft) -> bool:
    return draft.value("method.type") in ("lora", "qlora")


DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("method.lora.rank", 8, is_applicable=_uses_lora),
    ToolDefault("dataset.maxSequenceLength", 2048),
    ToolDefault("training.gradientCheckpointing", "enabled"),
    ToolDefault("dataset.responseOnly.enabled", True, is_applicable=lambda draft: (
        draft.value("trainer.type", "sft") == "sft" and draft.value("dataset.format") not in (None, "plainText"))),
    *training_arguments.DEFAULTS,
)  # fmt: skip
TEMPLATES_WITH_THINKING_VARIABLE = ("qwen3", "qwen3_5", "qwen3_6", "glm4_moe", "glm4_7")
"""Templates for reasoning. The chat templates of their models' tokenizers have the variable `enable_thinking`."""
OTHER_REASONING_TEMPLATES = ("aeva", "deepseekr1", "gemma4", "gemma4n", "glmz1", "gpt_oss", "hy3", "mimo", "mimo_v2", "minimax2", "seed_oss", "youtu")
"""Templates for reasoning. The chat templates of their models' tokenizers do not have this variable: they turn the reasoning off in another way, or cannot."""
RECOGNISED_KEYS = ("stage", "finetuning_type", "cutoff_len", "lora_target", "template", "dataset_dir")


# --- reading --------------------------------------------------------------------------------------------------------


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document has the key `model_name_or_path` and at least one other key that is typical of LLaMA-Factory."""
    for document in documents:
        content = peek_mapping(document)
        if "model_name_or_path" in content and any(key in content for key in RECOGNISED_KEYS):
            return True
    return False


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of the files in order, then the `key=value` overrides of the tool's command line."""
    for document in draft.documents:
        if not (is_deepspeed(document) or is_dataset_info(document) or is_accelerate(document)):
            yield from iterate_entries(
                document,
                parse_document(document),
                training_arguments.OPAQUE_PATHS
                | {
                    "kt_config",
                    "ray_init_kwargs",
                    "vllm_config",
                    "sglang_config",
                    "resources_per_worker",
                    "additional_configs",
                },
            )
    for word in strip_launcher(draft.request.tool_arguments):
        if word in ("llamafactory-cli", "lmf", "train") or word.endswith((".yaml", ".yml", ".json")):
            continue
        name, equals, value = word.partition("=")
        if not equals:
            draft.mistakes.append(Mistake("command line", word, "this word belongs to no option", "write key=value"))
        else:
            yield OptionEntry(name, parse_value(value), ValueOrigin("command line"))


# --- fields that depend on several options --------------------------------------------------------------------------


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options."""
    assign_source_uri(draft, "model_name_or_path", "model.source", _get_revision(draft))
    if "model_revision" in draft.given_options:
        draft.add_reason("model_revision", "the revision is part of model.source")
    if "hf_hub_token" in draft.given_options:
        draft.assign("model.tokenSecretRef", draft.store_secret("hf-token", draft.get("hf_hub_token")), "hf_hub_token")
    _set_model(draft)
    _set_method(draft)
    trainer = _set_trainer(draft)
    if trainer is not None:
        set_validation_split(draft, "val_size", "eval_dataset")
        set_data(
            draft,
            trainer,
            is_pretraining=draft.given_options["stage"].raw_value == "pt" if "stage" in draft.given_options else False,
        )
        _set_row_options(draft, trainer)
        _set_template(draft, trainer)
    if "dataset_dir" in draft.given_options:
        draft.add_reason("dataset_dir", "only names the folder with dataset_info.json")
    _set_backend(draft)
    for document in draft.documents:
        if is_accelerate(document):
            read_accelerate(draft, document)
    set_training_arguments(draft)
    _set_precision(draft)
    _set_early_stopping(draft)
    if "ray_num_workers" in draft.given_options:
        draft.assign("resources.gpusPerNode", draft.get("ray_num_workers"), "ray_num_workers")
    double_kto_batch(draft, "per_device_train_batch_size")
    assign_default_gpus(draft)


def _get_revision(draft: JobDraft) -> str | None:
    revision = draft.get("model_revision")
    return None if revision in (None, "main") else str(revision)


def _set_model(draft: JobDraft) -> None:
    if draft.get("flash_attn") == "fa3":
        draft.add_reason(
            "flash_attn",
            "fa3 is replaced by attention auto: the trainer chooses the fastest attention that the GPU and model support",
        )
    elif "flash_attn" in draft.given_options:
        draft.assign("model.attention", draft.get("flash_attn"), "flash_attn")
    method = str(draft.get("quantization_method", "bnb")).lower()
    if method not in ("bnb", "bitsandbytes"):
        draft.refuse_feature("quantization_method", f"the quantisation {method}", "write bnb")
    elif "quantization_method" in draft.given_options:
        draft.add_reason("quantization_method", "every FineTuneJob quantises with bitsandbytes")
    if draft.get("quantization_bit") not in (None, 4, 8):
        draft.refuse_feature("quantization_bit", f"{draft.get('quantization_bit')}-bit weights", "write 4 or 8")
    elif "quantization_bit" in draft.given_options:
        draft.assign("model.quantization.bits", draft.get("quantization_bit"), "quantization_bit")
    for key, path in (
        ("quantization_type", "model.quantization.type"),
        ("double_quantization", "model.quantization.doubleQuant"),
    ):
        if key in draft.given_options and draft.get("quantization_bit") == 4:
            draft.assign(path, draft.get(key), key)
        elif key in draft.given_options:
            draft.add_reason(key, "no effect: the base model is not loaded in 4 bits")
    added_tokens = [*(draft.get("add_tokens") or []), *(draft.get("add_special_tokens") or [])]
    for key in ("add_tokens", "add_special_tokens"):
        if key in draft.given_options:
            draft.assign("model.newTokens", list(dict.fromkeys(added_tokens)), key)
            draft.add_reason(key, "included in model.newTokens")


def _set_method(draft: JobDraft) -> None:
    finetuning_type = draft.get("finetuning_type", "lora")
    if finetuning_type in ("freeze", "oft"):
        feature = "training of the last layers (freeze)" if finetuning_type == "freeze" else "OFT"
        hint = (
            "choose layers with --set method.type=spectrum --set method.spectrum.layers=[...]"
            if finetuning_type == "freeze"
            else "write lora"
        )
        draft.refuse_feature("finetuning_type", feature, hint, is_droppable=False)
        draft.paths_of_invalid_keys["finetuning_type"] = "method"
        return
    adapters = draft.get("adapter_name_or_path") or []
    method = "qlora" if finetuning_type == "lora" and draft.get("quantization_bit") == 4 else finetuning_type
    if adapters and finetuning_type == "lora":
        method = "adapter"
        if len(adapters) > 1:
            draft.refuse_feature(
                "adapter_name_or_path", "several adapters", "merge all adapters except the last one into the model"
            )
        draft.given_options["adapter_name_or_path"] = replace(
            draft.given_options["adapter_name_or_path"], value=adapters[0]
        )
        assign_source_uri(draft, "adapter_name_or_path", "method.adapter.source")
    if "finetuning_type" in draft.given_options:
        draft.assign("method.type", method, "finetuning_type")
    else:
        draft.assign_default("method.type", method)
    target_modules = draft.get("lora_target")
    if target_modules is not None:
        draft.assign("method.lora.targetModules", ["all-linear"] if target_modules == ["all"] else target_modules, "lora_target")
    elif finetuning_type == "lora":
        draft.assign_default("method.lora.targetModules", ["all-linear"])
    if method in ("lora", "qlora"):
        rank = draft.value("method.lora.rank", 8)
        draft.assign_default("method.lora.alpha", 2 * rank, "the tool's default: twice the rank")
    if draft.get("pissa_init"):
        draft.assign("method.lora.init", "pissa", "pissa_init")
    elif "pissa_init" in draft.given_options:
        draft.add_reason("pissa_init", "no effect: the adapter gets the default initial weights")


def _set_trainer(draft: JobDraft) -> str | None:
    """Set the training objective (`trainer.type`) and its options.

    Return the value of `trainer.type`, or None if a FineTuneJob does not have the objective.
    """
    trainer, loss = str(draft.get("stage", "sft")), draft.get("pref_loss", "sigmoid")
    if trainer == "ppo":
        draft.refuse_feature("stage", "PPO", "use GRPO with rewards", is_droppable=False)
        draft.paths_of_invalid_keys["stage"] = "trainer"
        return None
    if trainer == "dpo" and loss in ("simpo", "kto_pair"):
        draft.refuse_feature(
            "pref_loss", "SimPO" if loss == "simpo" else "the loss kto_pair", "write sigmoid, hinge, ipo or orpo"
        )
    if trainer == "dpo" and loss == "orpo":
        trainer = "orpo"
    if "stage" in draft.given_options:
        draft.assign("trainer.type", trainer, "stage")
    is_preference = trainer in ("dpo", "orpo", "kto")
    for key in ("pref_beta", "pref_loss", "pref_ftx", "ref_model"):
        if key in draft.given_options and not is_preference:
            draft.warn_no_effect(key, f"the stage is {draft.get('stage', 'sft')}")
    if not is_preference:
        return trainer
    if "pref_beta" in draft.given_options:
        draft.assign("trainer.dpo.beta", draft.get("pref_beta"), "pref_beta")
    if "pref_loss" in draft.given_options:
        if trainer == "dpo" and loss in ("sigmoid", "hinge", "ipo"):
            draft.assign("trainer.dpo.lossTypes", [loss, *(["sft"] if draft.get("pref_ftx") == 1 else [])], "pref_loss")
        else:
            draft.add_reason("pref_loss", f"included in trainer.type {trainer}")
    if draft.get("pref_ftx") not in (None, 0, 1):
        draft.refuse_feature("pref_ftx", "a weight for the supervised loss term", "write 0 or 1")
    elif "pref_ftx" in draft.given_options:
        draft.add_reason(
            "pref_ftx", "included in trainer.dpo.lossTypes" if draft.get("pref_ftx") else "0 turns the supervised loss term off"
        )
    assign_source_uri(draft, "ref_model", "trainer.dpo.referenceModel")
    return trainer


def _set_row_options(draft: JobDraft, trainer: str) -> None:
    is_plain_text = draft.value("dataset.format") == "plainText"
    packing_key = next((key for key in ("neat_packing", "packing") if draft.get(key)), None)
    for key in ("packing", "neat_packing"):
        if key in draft.given_options and key != packing_key:
            draft.add_reason(
                key, "no effect: another option turns packing on" if packing_key else "rows are not packed"
            )
    if packing_key and trainer == "sft":
        draft.assign("dataset.packing", True, packing_key)
        if packing_key == "packing":
            draft.add_note("packing: rows in the same sequence do not attend to each other, which the tool calls neat_packing")
    elif packing_key:
        draft.warn_no_effect(packing_key, f"{trainer} trains on one row per sequence")
    elif trainer == "sft" and is_plain_text and draft.get("packing") is not False:
        draft.assign_default("dataset.packing", True, "the tool packs plain text")
    if "train_on_prompt" in draft.given_options:
        if trainer == "sft" and not is_plain_text:
            draft.assign("dataset.responseOnly.enabled", not draft.get("train_on_prompt"), "train_on_prompt")
        else:
            draft.add_reason("train_on_prompt", "no effect: rows of this format have no questions")
    _set_thinking(draft)


def _set_thinking(draft: JobDraft) -> None:
    """Set the variable `enable_thinking` of the chat template. Only templates for reasoning have this variable. For all others, the tool ignores the option."""
    if "enable_thinking" not in draft.given_options:
        return
    template_name = draft.get("template")
    if draft.get("enable_thinking") is not False:
        draft.add_reason("enable_thinking", "true is the default of the chat template")
    elif draft.value("dataset.format") == "plainText":
        draft.add_reason("enable_thinking", "no effect: the rows are plain text")
    elif template_name is None or template_name in TEMPLATES_WITH_THINKING_VARIABLE:
        draft.assign("dataset.templateVariables", {"enable_thinking": "false"}, "enable_thinking")
        draft.add_warning(
            "enable_thinking: false: reasoning in the answers is trained, although the tool would remove it; remove the reasoning from the rows"
        )
    elif template_name in OTHER_REASONING_TEMPLATES:
        draft.refuse_feature(
            "enable_thinking", f"answers without reasoning in the chat template {template_name}", "write the empty reasoning into a chat template of your own"
        )
    else:
        draft.add_reason("enable_thinking", f"no effect: the chat template {template_name} has no reasoning")


def _set_template(draft: JobDraft, trainer: str) -> None:
    name = draft.get("template")
    if name is None:
        return
    if draft.value("dataset.format") == "plainText":
        draft.add_reason("template", "no effect: the rows are plain text")
    elif name == "empty":
        draft.assign("dataset.useChatTemplate", False, "template")
    else:
        assign_chat_template(draft, "template", str(name))


def _set_backend(draft: JobDraft) -> None:
    if draft.get("use_unsloth"):
        draft.assign("trainer.backend", "unsloth", "use_unsloth")
    elif "use_unsloth" in draft.given_options:
        draft.add_reason("use_unsloth", "no effect: the standard implementation is used")
    if draft.get("use_unsloth_gc"):
        draft.assign("training.gradientCheckpointing", "unsloth", "use_unsloth_gc")
        if "disable_gradient_checkpointing" in draft.given_options:
            draft.add_reason("disable_gradient_checkpointing", "no effect: use_unsloth_gc is used instead")
        return
    if "use_unsloth_gc" in draft.given_options:
        draft.add_reason("use_unsloth_gc", "no effect: activations are not kept in host memory")
    if "disable_gradient_checkpointing" in draft.given_options:
        mode = "disabled" if draft.get("disable_gradient_checkpointing") else "enabled"
        draft.assign("training.gradientCheckpointing", mode, "disable_gradient_checkpointing")


def _set_precision(draft: JobDraft) -> None:
    precision = draft.get("mixed_precision")
    if precision == "fp8":
        draft.refuse_feature("mixed_precision", "FP8 training", "write bf16_mixed")
    elif precision and not (draft.get("bf16") or draft.get("fp16")):
        draft.assign("training.mixedPrecision", precision, "mixed_precision")
    elif precision:
        draft.add_reason("mixed_precision", "no effect: bf16 or fp16 is used instead")
    if draft.get("pure_bf16"):
        draft.assign("model.dtype", "bfloat16", "pure_bf16")
        draft.assign("training.mixedPrecision", "bf16", "pure_bf16")
    elif "pure_bf16" in draft.given_options:
        draft.add_reason("pure_bf16", "no effect: bf16 or fp16 is used instead")


def _set_early_stopping(draft: JobDraft) -> None:
    if "early_stopping_steps" in draft.given_options:
        if has_validation(draft):
            draft.assign("training.earlyStopping.patience", draft.get("early_stopping_steps"), "early_stopping_steps")
        else:
            draft.add_reason("early_stopping_steps", "no effect: there is no validation set")


IMPORTER = Importer(
    "llamafactory", "LLaMA-Factory", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options, reports_every_key=True
)
