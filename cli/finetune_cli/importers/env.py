"""`env`: the importer for a trainer that is configured with a `.env` file and command line flags.

A key of the file and a flag of the command line are two spellings of the same option. A flag overrides the value in the file. The tool ignores some
of its documented options (ratios, accumulation, result folder), but the importer applies them as documented.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from finetune_cli.importers.command_lines import (
    add_config_file,
    add_stray_mistakes,
    build_flag_entry,
    parse_flags,
    strip_launcher,
)
from finetune_cli.importers.converters import (
    to_boolean,
    to_choice,
    to_integer,
    to_list_of,
    to_module_names,
    to_number,
    to_text_matching,
)
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.sources import assign_config_map, assign_output_folder, assign_source, assign_tokenizer
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import ValueOrigin
from finetune_cli.suggestions import find_closest_name

DATASET_FORMAT_BY_NAME = {
    "plain_text": "plainText", "mcq_jsonl": "mcq", "instruction_jsonl": "instruction", "instruction": "instruction", "qa": "qa", "text": "text",
    "conversation": "messages",
}  # fmt: skip
METRIC_BY_NAME = {
    "accuracy": "accuracy", "f1": "f1", "precision": "precision", "recall": "recall", "perplexity": "perplexity", "bleu": "bleu", "rouge": "rouge",
    "rougeL": "rouge", "bertscore": "bertscore",
}  # fmt: skip
PRECISION_BY_DTYPE = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}
FIXED_FILES_REASON = "the job writes metrics and reports to files with fixed names"
MAX_SHOWN_WORD_LENGTH = 12
to_folder_name = to_text_matching(
    lambda t: bool(re.match(r"^[\w.-]+$", t)), "cannot be a folder's name", "letters, digits, _ . -"
)

OPTION_TABLE: tuple[OptionRow, ...] = (
    OptionRow("PROJECT_NAME", "output.project", to_folder_name, ("--project_name", "-project", "--project")),
    OptionRow("MODEL_NAME", "model.source", aliases=("--model_name", "-model", "--model"), is_set_by_combine=True),
    OptionRow("TOKENIZER", "model.tokenizer", aliases=("--tokenizer", "-tokenizer"), is_set_by_combine=True),
    OptionRow("HUGGINGFACE_TOKEN", "model.tokenSecretRef", aliases=("--hf_token",), is_set_by_combine=True, is_secret=True),
    OptionRow("USE_AUTH_TOKEN", "model.tokenSecretRef", to_boolean, is_set_by_combine=True),
    OptionRow("CACHE_DIR", "model.cache", is_set_by_combine=True),
    OptionRow("PAD_TOKEN", "model.padToken"),
    OptionRow("TRAIN_DATA_PATH", "dataset.train", aliases=("--data_path", "-data", "--data"), is_required=True, is_set_by_combine=True),
    OptionRow(
        "DATASET_TYPE", "dataset.format", to_choice(DATASET_FORMAT_BY_NAME), ("--dataset_type", "-dataset_type"), is_required=True, is_set_by_combine=True
    ),
    OptionRow("DATA_FORMAT", "dataset.fileFormat", to_choice(["jsonl", "json", "csv", "auto", "txt"])),
    OptionRow("VAL_DATA_PATH", "dataset.validation", aliases=("--val_path",), is_set_by_combine=True),
    OptionRow("TEST_DATA_PATH", "dataset.test", aliases=("--test_path",), is_set_by_combine=True),
    OptionRow("TRAIN_RATIO", "dataset.split.train", to_number(0, 1), ("--train_ratio",), is_set_by_combine=True),
    OptionRow("VAL_RATIO", "dataset.split.validation", to_number(0, 1), ("--val_ratio",), is_set_by_combine=True),
    OptionRow("TEST_RATIO", "dataset.split.test", to_number(0, 1), ("--test_ratio",), is_set_by_combine=True),
    OptionRow("SPLIT_SEED", "dataset.split.seed", to_integer(0, 4294967295), ("--split_seed",), is_set_by_combine=True),
    OptionRow("MAX_LENGTH", "dataset.maxSequenceLength", to_integer(1)),
    OptionRow("PACKING", "dataset.packing", to_boolean),
    OptionRow("TECHNIQUE", "method.type", to_choice(["lora", "qlora", "dora", "adapter"]), ("--technique", "-technique"), is_set_by_combine=True),
    OptionRow("ADAPTER_PATH", "method.adapter.source", aliases=("--adapter_path",), is_set_by_combine=True),
    OptionRow("LORA_R", "method.lora.rank", to_integer(4, 128), ("--lora_r", "-lora_r")),
    OptionRow("LORA_ALPHA", "method.lora.alpha", to_number(exclusive_low=0), ("--lora_alpha", "-lora_alpha")),
    OptionRow("LORA_DROPOUT", "method.lora.dropout", to_number(0, 0.3), ("--lora_dropout", "-lora_dropout")),
    OptionRow("LORA_TARGET_MODULES", "method.lora.targetModules", to_module_names, ("--lora_target_modules",)),
    OptionRow("LORA_BIAS", "method.lora.bias", to_choice({"none": "none", "all": "all", "lora_only": "loraOnly"})),
    OptionRow("LOAD_IN_4BIT", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("BNB_4BIT_COMPUTE_DTYPE", "model.quantization.computeDtype", to_choice(PRECISION_BY_DTYPE)),
    OptionRow("BNB_4BIT_USE_DOUBLE_QUANT", "model.quantization.doubleQuant", to_boolean),
    OptionRow("BNB_4BIT_QUANT_TYPE", "model.quantization.type", to_choice(["nf4", "fp4"])),
    OptionRow("EPOCHS", "training.epochs", to_integer(1, 20), ("--epochs", "-epochs")),
    OptionRow("BATCH_SIZE", "training.batchSizePerDevice", to_integer(1, 32), ("--batch_size", "-batch_size")),
    OptionRow("GRAD_ACC_STEPS", "training.gradientAccumulationSteps", to_integer(1), ("--grad_acc_steps",)),
    OptionRow("LEARNING_RATE", "training.learningRate", to_number(1e-5, 5e-4), ("--learning_rate", "-lr")),
    OptionRow("DEVICE", "training.device", to_choice(["cpu", "cuda", "mps", "auto"]), ("--device", "-device"), is_set_by_combine=True),
    OptionRow("EVAL_STEPS", "evaluation.steps", to_integer(1), ("--eval_steps",), is_set_by_combine=True),
    OptionRow("SAVE_STRATEGY", "checkpoint.strategy", to_choice(["steps", "epoch", "no"]), is_set_by_combine=True),
    OptionRow("RESUME_CHECKPOINT", "checkpoint.resume", is_set_by_combine=True),
    OptionRow("OUTPUT_DIR", "output.dir", aliases=("--save_path", "-savepath", "--output", "--output_dir"), is_set_by_combine=True),
    OptionRow("PROMPTS_FILE", "evaluation.comparison.promptsRef", aliases=("--prompts_file",), is_set_by_combine=True),
    OptionRow("COMPARISON_MAX_TOKENS", "evaluation.comparison.generation.maxNewTokens", to_integer(1), ("MAX_NEW_TOKENS",)),
    OptionRow("COMPARISON_TEMPERATURE", "evaluation.comparison.generation.temperature", to_number(0, 10)),
    OptionRow("COMPARISON_TOP_P", "evaluation.comparison.generation.topP", to_number(0, 1, exclusive_low=0)),
    OptionRow("COMPARISON_DO_SAMPLE", "evaluation.comparison.generation.doSample", to_boolean),
    OptionRow("COMPARISON_OUTPUT", no_effect_reason=FIXED_FILES_REASON),
    OptionRow("TRACK_METRICS", "evaluation.metrics", is_set_by_combine=True),
    OptionRow("METRICS", "evaluation.metrics", to_list_of(to_choice(METRIC_BY_NAME)), is_set_by_combine=True),
    OptionRow("METRICS_PATH", no_effect_reason=FIXED_FILES_REASON),
    OptionRow("REPORT_PATH", no_effect_reason=FIXED_FILES_REASON),
    OptionRow("LOG_INTERVAL", "tracking.loggingSteps", to_integer(1)),
    OptionRow("MONGODB_ENABLED", "tracking.reportTo", to_boolean, is_set_by_combine=True),
    OptionRow("MONGODB_URI", "tracking.mongodb.uriSecretRef", is_set_by_combine=True, is_secret=True),
    OptionRow("MONGODB_DB_NAME", "tracking.mongodb.database"),
    OptionRow("MONGODB_COLLECTION_PREFIX", no_effect_reason="the trainer gives the collections fixed names"),
)  # fmt: skip


KNOWN_KEYS = frozenset(key for option_row in OPTION_TABLE for key in (option_row.key, *option_row.aliases))


def _has_validation_data(draft: JobDraft) -> bool:
    return draft.has_value("dataset.validation") or bool(draft.value("dataset.split.validation"))


def _is_4bit(draft: JobDraft) -> bool:
    return bool(draft.value("model.quantization.bits") == 4)


def _compares_models(draft: JobDraft) -> bool:
    """Return whether the job compares base and trained model on prompts. The tool's defaults for the comparison differ from those of FineTuneJob."""
    return any(path.startswith("evaluation.comparison.") for path in draft.values)


def _measures_validation_data(draft: JobDraft) -> bool:
    return _has_validation_data(draft) and str(draft.get("TRACK_METRICS")).lower() != "false"


DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("model.source", "gpt2", "documented default"),
    ToolDefault("method.lora.rank", 8, is_applicable=lambda draft: draft.value("method.type") != "adapter"),
    ToolDefault("method.lora.alpha", 16, is_applicable=lambda draft: draft.value("method.type") != "adapter"),
    ToolDefault("method.lora.dropout", 0.1, is_applicable=lambda draft: draft.value("method.type") != "adapter"),
    ToolDefault("training.epochs", 3),
    ToolDefault("training.batchSizePerDevice", 4),
    ToolDefault("training.gradientAccumulationSteps", 4),
    ToolDefault("training.learningRate", 3e-4),
    ToolDefault("training.scheduler", "linear", "hard-coded in the tool"),
    ToolDefault("training.warmupRatio", 0, "hard-coded in the tool"),
    ToolDefault("training.optimizer", "adamw_torch", "hard-coded in the tool"),
    ToolDefault("training.weightDecay", 0, "hard-coded in the tool"),
    ToolDefault("training.maxGradNorm", 1, "hard-coded in the tool"),
    ToolDefault("dataset.maxSequenceLength", 512),
    ToolDefault("dataset.useChatTemplate", False, "hard-coded in the tool"),
    ToolDefault("dataset.responseOnly.enabled", False, "hard-coded in the tool"),
    ToolDefault("model.quantization.doubleQuant", False, "default in the tool's code", _is_4bit),
    ToolDefault("model.quantization.computeDtype", "float16", "default in the tool's code",
                lambda draft: _is_4bit(draft) and draft.value("training.mixedPrecision") == "fp16"),
    ToolDefault("evaluation.comparison.generation.maxNewTokens", 150, "default in the tool's code", _compares_models),
    ToolDefault("evaluation.comparison.generation.temperature", 0.7, "default in the tool's code", _compares_models),
    ToolDefault("evaluation.comparison.generation.topP", 0.9, "default in the tool's code", _compares_models),
    ToolDefault("evaluation.comparison.generation.doSample", True, "default in the tool's code", _compares_models),
    ToolDefault("dataset.mcq.includeOptions", True, "chosen by the importer: the prompt of the tool does not list the options",
                lambda draft: draft.value("dataset.format") == "mcq"),
    ToolDefault("checkpoint.keep", 0, "hard-coded in the tool"),
    ToolDefault("checkpoint.loadBestAtEnd", True, "hard-coded in the tool", _has_validation_data),
    ToolDefault("evaluation.metrics", ["accuracy", "f1", "precision", "recall"], "documented content of epoch_metrics.json", _measures_validation_data),
    ToolDefault("output.dir", "results", "hard-coded in the tool"),
    ToolDefault("output.layout", "projectModelTime", "hard-coded in the tool"),
    ToolDefault("output.project", "default_project", "hard-coded in the tool"),
    ToolDefault("tracking.loggingSteps", 10),
)  # fmt: skip


# --- reading --------------------------------------------------------------------------------------------------------

TOOL_KEY_PATTERN = re.compile(r"^\s*(export\s+)?(MODEL_NAME|TRAIN_DATA_PATH|DATASET_TYPE|TECHNIQUE)\s*=", re.MULTILINE)
RECOGNISED_FLAGS = ("--data_path", "--dataset_type", "--technique", "--model_name", "--hf_token")


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a file is a `.env` file or has keys of the tool. If no file is given, return whether the command line has a flag of the tool."""
    if documents:
        return any(d.path.suffix == ".env" or d.path.name == ".env" or TOOL_KEY_PATTERN.search(d.text) for d in documents)
    return any(value.partition("=")[0] in RECOGNISED_FLAGS for value in command_words)


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of the given files in order, then those of the file that the flag `--config` names, then the flags."""
    for document in draft.documents:
        yield from _read_file(document, draft)
    yield from _read_flags(draft)


def _read_file(document: InputDocument, draft: JobDraft) -> Iterator[OptionEntry]:
    from dotenv.parser import parse_stream

    values_by_key: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(document.text)):
        line = binding.original.line + _count_leading_lines(binding.original.string)
        location = f"{document.name}:{line}"
        if binding.error:
            line_text = binding.original.string.strip()
            draft.mistakes.append(
                Mistake(
                    location,
                    "",
                    f"{_shorten_line(line_text)!r} does not have the form KEY=value",
                    "remove the line, or write KEY=value",
                )
            )
        elif binding.key is not None and binding.value is None:
            name = binding.key if binding.key in KNOWN_KEYS else _shorten_line(binding.key)
            hint = f"write {name}=value, or {name}= to leave it unset"
            draft.mistakes.append(Mistake(location, name, "the line has no `=` and no value", hint))
        elif binding.key is not None and binding.value is not None:
            value = _expand_variables(binding.value, values_by_key, draft, location, binding.key)
            values_by_key[binding.key] = value
            yield OptionEntry(binding.key, value.strip(), ValueOrigin(location))


def _count_leading_lines(text: str) -> int:
    """Return the number of blank lines before a key. The parser of python-dotenv counts these lines as a part of the key's binding."""
    return len(text) - len(text.lstrip("\r\n")) if text.strip() else 0


def _shorten_line(line: str) -> str:
    """Shorten an invalid line for a message. If the line is a single long word, keep only its first two characters, because the word may be a secret."""
    if " " not in line and len(line) > MAX_SHOWN_WORD_LENGTH:
        return line[:2] + "..."
    return line if len(line) <= 40 else line[:37] + "..."


def _expand_variables(value: str, earlier_values: dict[str, str], draft: JobDraft, location: str, option_key: str) -> str:
    from dotenv.variables import parse_variables

    variables = {**draft.request.environment, **earlier_values}
    parts = list(parse_variables(value))
    for part in parts:
        name = getattr(part, "name", None)
        if name is not None and name not in variables and getattr(part, "default", None) is None:
            draft.mistakes.append(
                Mistake(
                    location,
                    option_key,
                    f"variable {name} is not set",
                    "set the variable above this line, or write its value here",
                )
            )
    return "".join(part.resolve(variables) for part in parts)


def _read_flags(draft: JobDraft) -> Iterator[OptionEntry]:
    known_flags = [alias for option_row in OPTION_TABLE for alias in option_row.aliases if alias.startswith("-")]
    flags = parse_flags(strip_launcher(draft.request.tool_arguments), lambda name: True)
    add_stray_mistakes(draft, flags)
    entries: list[OptionEntry] = []
    for name, value in flags.name_value_pairs:
        full_name = _expand_abbreviation(name, known_flags)
        if full_name in ("--config", "-config"):
            document = add_config_file(draft, value) if value else None
            if document is not None:
                yield from _read_file(document, draft)
        elif value is None:
            draft.mistakes.append(Mistake("command line", name, "the value is missing", f"write {name} VALUE"))
        else:
            entries.append(build_flag_entry(full_name, value))
    yield from entries


def _expand_abbreviation(name: str, known_flags: list[str]) -> str:
    """Return the full name of an abbreviated flag.

    The parser of the tool accepts such abbreviations. Return a full name or an ambiguous abbreviation unchanged.
    """
    if name in known_flags or name in ("--config", "-config"):
        return name
    matches = [flag for flag in (*known_flags, "--config") if name.startswith("--") and flag.startswith(name)]
    return matches[0] if len(matches) == 1 else name


# --- fields that depend on several options --------------------------------------------------------------------------


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options of the tool."""
    assign_source(draft, "MODEL_NAME", "model.source")
    assign_tokenizer(draft, "TOKENIZER", "MODEL_NAME")
    for key, path in (
        ("TRAIN_DATA_PATH", "dataset.train"),
        ("VAL_DATA_PATH", "dataset.validation"),
        ("TEST_DATA_PATH", "dataset.test"),
    ):
        assign_source(draft, key, path, always_local=True)
    _set_token(draft)
    _set_dataset_format(draft)
    _set_split(draft)
    _set_method(draft)
    _set_device(draft)
    _set_intervals(draft)
    _set_other_fields(draft)


def _set_token(draft: JobDraft) -> None:
    token_option, use_auth_token = draft.given_options.get("HUGGINGFACE_TOKEN"), draft.get("USE_AUTH_TOKEN")
    if token_option is not None and use_auth_token is False:
        draft.warn_no_effect("HUGGINGFACE_TOKEN", "USE_AUTH_TOKEN is false")
    elif token_option is not None:
        draft.assign("model.tokenSecretRef", draft.store_secret("hf-token", token_option.value), "HUGGINGFACE_TOKEN")
    elif use_auth_token and "model.tokenSecretRef" not in draft.request.overrides:
        location = draft.given_options["USE_AUTH_TOKEN"].origin.location
        message = "USE_AUTH_TOKEN is true, but no token is given: if the model is gated, set model.tokenSecretRef"
        draft.add_warning(f"{location}: {message}")


def _set_dataset_format(draft: JobDraft) -> None:
    dataset_format = draft.get("DATASET_TYPE")
    if dataset_format == "text":
        dataset_format = "plainText" if str(draft.get("TRAIN_DATA_PATH", "")).endswith(".txt") else "promptCompletion"
        draft.add_note(f"DATASET_TYPE text is read as {dataset_format}")
    if dataset_format is not None:
        draft.assign("dataset.format", dataset_format, "DATASET_TYPE")
    if dataset_format == "mcq":
        draft.add_note(
            "DATASET_TYPE mcq_jsonl: the prompt lists the options of each question, unlike in the tool; "
            "to leave them out, set `dataset.mcq.includeOptions: false`"
        )


def _set_split(draft: JobDraft) -> None:
    ratio_keys = ("TRAIN_RATIO", "VAL_RATIO", "TEST_RATIO")
    given_ratios = {key: float(draft.get(key)) for key in ratio_keys if key in draft.given_options}
    if draft.has_value("dataset.validation") or draft.has_value("dataset.test"):
        for key in (*given_ratios, *(["SPLIT_SEED"] if "SPLIT_SEED" in draft.given_options else [])):
            option = draft.given_options[key]
            draft.add_warning(
                f"{option.origin.location}: {option.key} has no effect: the training data is not split, because a validation or test file is given"
            )
        return
    if any(key in draft.paths_of_invalid_keys for key in ratio_keys):
        return
    ratio_sum = sum(given_ratios.values())
    key_names = "+".join(given_ratios)
    if len(given_ratios) == 3 and abs(ratio_sum - 1) > 1e-6:
        draft.add_mistake(
            tuple(given_ratios),
            f"{key_names} = {ratio_sum:g}, but must be 1",
            "change a ratio, or remove one, which the import then sets to the rest",
        )
        return
    if ratio_sum > 1 + 1e-6:
        draft.add_mistake(tuple(given_ratios), f"{key_names} = {ratio_sum:g}, but must be at most 1", "reduce the ratios")
        return
    ratios_by_key = _complete_ratios(given_ratios)
    if ratios_by_key["TRAIN_RATIO"] <= 0:
        draft.add_mistake(
            tuple(given_ratios), "no rows are left for training", "reduce the other ratios", explained_path="dataset.split"
        )
        return
    for key, value in ratios_by_key.items():
        split_name = {"TRAIN_RATIO": "train", "VAL_RATIO": "validation", "TEST_RATIO": "test"}[key]
        if key in given_ratios:
            draft.assign(f"dataset.split.{split_name}", value, key)
        else:
            draft.assign_default(f"dataset.split.{split_name}", value, "the rest of the rows" if given_ratios else "documented default")
    if "SPLIT_SEED" in draft.given_options:
        draft.assign("dataset.split.seed", draft.get("SPLIT_SEED"), "SPLIT_SEED")
    else:
        draft.assign_default("dataset.split.seed", 42, "documented default")


def _complete_ratios(given_ratios: dict[str, float]) -> dict[str, float]:
    """Return the ratios of the training, validation and test rows, which add up to 1.

    If two ratios are given, the third is the rest. If the training ratio is the only given ratio, validation and test each get half of the rest. If only
    the validation ratio is given, the test ratio is 0.1 (or all that is left, if that is less), and training gets the rest. If only the test ratio is given,
    the validation ratio follows in the same way.
    """
    default_ratios = {"TRAIN_RATIO": 0.8, "VAL_RATIO": 0.1, "TEST_RATIO": 0.1}
    if not given_ratios:
        return default_ratios
    remaining_ratio = round(1 - sum(given_ratios.values()), 10)
    if len(given_ratios) == 1 and "TRAIN_RATIO" in given_ratios:
        return {**given_ratios, "VAL_RATIO": round(remaining_ratio / 2, 10), "TEST_RATIO": round(remaining_ratio / 2, 10)}
    if len(given_ratios) == 1:
        second_key = "TEST_RATIO" if "VAL_RATIO" in given_ratios else "VAL_RATIO"
        second_ratio = min(default_ratios[second_key], remaining_ratio)
        return {**given_ratios, second_key: second_ratio, "TRAIN_RATIO": round(remaining_ratio - second_ratio, 10)}
    missing_key = next((key for key in default_ratios if key not in given_ratios), None)
    return given_ratios if missing_key is None else {**given_ratios, missing_key: max(remaining_ratio, 0.0)}


def _set_method(draft: JobDraft) -> None:
    technique, loads_in_4bit = draft.get("TECHNIQUE", "lora"), draft.get("LOAD_IN_4BIT")
    if "TECHNIQUE" in draft.paths_of_invalid_keys:
        return
    if technique == "qlora" and loads_in_4bit is False:
        draft.add_mistake(
            ("TECHNIQUE", "LOAD_IN_4BIT"),
            "qlora loads the base model in 4 bits, but LOAD_IN_4BIT is false",
            "remove LOAD_IN_4BIT, or write TECHNIQUE=lora",
        )
    if technique == "lora" and loads_in_4bit:
        draft.add_note("TECHNIQUE lora with LOAD_IN_4BIT true is QLoRA and is imported as qlora")
        technique = "qlora"
    if technique == "adapter":
        assign_source(draft, "ADAPTER_PATH", "method.adapter.source")
        if not draft.has_value("method.adapter.source") and "ADAPTER_PATH" not in draft.paths_of_invalid_keys:
            draft.add_mistake(
                "TECHNIQUE",
                "TECHNIQUE adapter continues training an adapter, but no adapter is given",
                "give --adapter URI",
                explained_path="method.adapter.source",
            )
    elif "ADAPTER_PATH" in draft.given_options:
        draft.warn_no_effect("ADAPTER_PATH", f"TECHNIQUE is {technique}")
    if "TECHNIQUE" in draft.given_options:
        draft.assign("method.type", technique, "TECHNIQUE")
    else:
        draft.assign_default("method.type", technique)
    if loads_in_4bit or technique == "qlora":
        draft.assign("model.quantization.bits", 4, "LOAD_IN_4BIT" if loads_in_4bit else "TECHNIQUE")
        draft.assign_default("model.quantization.type", "nf4")


def _set_device(draft: JobDraft) -> None:
    device = draft.get("DEVICE", "auto")
    if device == "auto":
        return
    draft.assign("training.device", device, "DEVICE")
    if device == "cpu":
        draft.assign("resources.gpusPerNode", 0, "DEVICE")
        draft.assign_default("training.mixedPrecision", "no", "hard-coded in the tool")
    if device == "cuda":
        draft.assign("resources.gpusPerNode", 1, "DEVICE")
        draft.assign_default("training.mixedPrecision", "fp16", "hard-coded in the tool")
    if device == "mps":
        draft.assign_default("training.mixedPrecision", "no", "hard-coded in the tool")


def _set_intervals(draft: JobDraft) -> None:
    """Set the intervals of evaluations and checkpoints.

    With validation data, the tool evaluates and saves a checkpoint every EVAL_STEPS steps. Otherwise, SAVE_STRATEGY sets when it saves.
    """
    steps, save_strategy = draft.get("EVAL_STEPS", 100), draft.get("SAVE_STRATEGY")
    has_eval_steps = "EVAL_STEPS" in draft.given_options
    if _has_validation_data(draft):
        draft.assign_default("evaluation.strategy", "steps", "hard-coded in the tool")
        draft.assign_default("checkpoint.strategy", "steps", "hard-coded in the tool")
        for path in ("evaluation.steps", "checkpoint.steps"):
            if has_eval_steps:
                draft.assign(path, steps, "EVAL_STEPS")
            else:
                draft.assign_default(path, steps, "documented default")
        if save_strategy not in (None, "steps"):
            draft.warn_no_effect("SAVE_STRATEGY", "with validation data, checkpoints are saved at every evaluation")
        return
    if save_strategy is None:
        draft.assign_default("checkpoint.strategy", "epoch", "hard-coded in the tool")
    else:
        draft.assign("checkpoint.strategy", save_strategy, "SAVE_STRATEGY")
    if save_strategy == "steps":
        draft.assign("checkpoint.steps", steps, "EVAL_STEPS" if has_eval_steps else "SAVE_STRATEGY")
    elif has_eval_steps and "dataset.split" not in {m.key for m in draft.mistakes} and not draft.paths_of_invalid_keys:
        draft.warn_no_effect("EVAL_STEPS", "there is no validation data")


def _set_other_fields(draft: JobDraft) -> None:
    if "OUTPUT_DIR" in draft.given_options:
        assign_output_folder(draft, "OUTPUT_DIR")
    assign_config_map(draft, "PROMPTS_FILE", "evaluation.comparison.promptsRef", "prompts", "--prompts")
    if "RESUME_CHECKPOINT" in draft.given_options:
        value = str(draft.get("RESUME_CHECKPOINT")).lower()
        if value in ("auto", "never", "true", "false"):
            draft.assign("checkpoint.resume", {"true": "auto", "false": "never"}.get(value, value), "RESUME_CHECKPOINT")
        else:
            assign_source(draft, "RESUME_CHECKPOINT", "checkpoint.resume", always_local=True)
    if "CACHE_DIR" in draft.given_options:
        _set_cache(draft)
    _set_metrics(draft)
    if draft.get("MONGODB_ENABLED"):
        draft.assign("tracking.reportTo", ["mongodb"], "MONGODB_ENABLED")
    if "MONGODB_URI" in draft.given_options and draft.get("MONGODB_ENABLED") is not False:
        draft.assign("tracking.reportTo", ["mongodb"], "MONGODB_URI")
        draft.assign(
            "tracking.mongodb.uriSecretRef", draft.store_secret("mongodb-uri", draft.get("MONGODB_URI")), "MONGODB_URI"
        )


def _set_cache(draft: JobDraft) -> None:
    given_option = draft.given_options["CACHE_DIR"]
    if str(given_option.value).startswith("pvc://"):
        draft.assign("model.cache", given_option.value, "CACHE_DIR")
    else:
        draft.warn_no_effect(
            "CACHE_DIR", "pods cannot use a local folder; give a volume with --set model.cache=pvc://claim/path"
        )


def _set_metrics(draft: JobDraft) -> None:
    """Set the metrics from the lists in METRICS and TRACK_METRICS. TRACK_METRICS may also be a boolean; false turns the metrics off."""
    metrics: list[Any] = list(draft.get("METRICS") or [])
    track_option = draft.given_options.get("TRACK_METRICS")
    if track_option is not None and str(track_option.value).lower() not in ("true", "false"):
        for value in str(track_option.value).strip("[]").split(","):
            name = METRIC_BY_NAME.get(value.strip())
            if name is None:
                closest = find_closest_name(value.strip(), METRIC_BY_NAME)
                draft.add_mistake(
                    "TRACK_METRICS",
                    f'"{value.strip()}" is not a supported metric',
                    f"write one of {', '.join(METRIC_BY_NAME)}" + (f"; did you mean {closest}?" if closest else ""),
                )
            else:
                metrics.append(name)
    if metrics and not (track_option is not None and str(track_option.value).lower() == "false"):
        draft.assign(
            "evaluation.metrics",
            list(dict.fromkeys(metrics)),
            "METRICS" if "METRICS" in draft.given_options else "TRACK_METRICS",
        )


IMPORTER = Importer("env", "this .env tool", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options)
