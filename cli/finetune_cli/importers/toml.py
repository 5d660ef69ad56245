"""`toml`: the importer for a TOML file with sections for training, inference, evaluation, the pipeline and a tracker.

The tool has no defaults, so a missing option gets the value that it has in the tool's main example. Some options do not get the value of the example:
`push_to_hub`, because the example publishes the model, and options that name a data set, server or run of the example's author.
"""

from __future__ import annotations

import re
import tomllib
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
    ConversionError,
    keep_value,
    to_any_text,
    to_boolean,
    to_choice,
    to_integer,
    to_list_of,
    to_mapping,
    to_name_list,
    to_number,
    to_run_name,
    to_text_or_none,
)
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.sources import assign_output_folder, assign_source
from finetune_cli.mistakes import InvalidInput, Mistake
from finetune_cli.provenance import ValueOrigin
from finetune_cli.redaction import SECRET_NAME_PATTERN, USERINFO_PATTERN

SCHEDULER_BY_NAME = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constantWithWarmup", "polynomial": "polynomial",
    "cosine_with_restarts": "cosineWithRestarts", "cosine_with_min_lr": "cosineWithMinLr", "inverse_sqrt": "inverseSqrt",
    "warmup_stable_decay": "warmupStableDecay",
}  # fmt: skip
DTYPE_BY_NAME = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32", "auto": "auto"}
BIAS_BY_NAME = {"none": "none", "all": "all", "lora_only": "loraOnly"}
TRACKERS_BY_NAME = {"wandb": ["wandb"], "tensorboard": ["tensorboard"], "mlflow": ["mlflow"], "none": []}
METRIC_BY_NAME = {
    "bleu_score": "bleu", "rouge_score": "rouge", "factual_correctness": "factualCorrectness", "semantic_similarity": "semanticSimilarity",
    "answer_accuracy": "answerAccuracy", "answer_relevancy": "answerRelevancy", "answer_correctness": "answerCorrectness",
}  # fmt: skip
DEFAULT_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RUN_NAME_KEYS = ("run_name", "run_name_prefix", "run_name_suffix")
ONE_RUN_NAME_REASON = "the job gets its run name only from [mlflow]"
TRAINING_SETTINGS_REASON = "the job loads the trained model with the settings of the training"


def to_checkpointing_mode(value: Any) -> str:
    """Convert true, false or "unsloth" to a value of `training.gradientCheckpointing`."""
    if isinstance(value, bool):
        return "enabled" if value else "disabled"
    if value == "unsloth":
        return "unsloth"
    raise ConversionError("is not allowed", 'true, false, "unsloth"')


def make_tuner_option(option_key: str, *args: Any, **kwargs: Any) -> OptionRow:
    """Return the row of the option table for a key in the section [fine_tuner]."""
    kwargs["aliases"] = tuple(f"fine_tuner.{alias}" for alias in kwargs.get("aliases", ()))
    return OptionRow(f"fine_tuner.{option_key}", *args, **kwargs)


GENERATION_PATH = "evaluation.comparison.generation"
OPTION_TABLE: tuple[OptionRow, ...] = (
    make_tuner_option("base_model_id", "model.source", is_required=True, is_set_by_combine=True),
    make_tuner_option("max_sequence_length", "dataset.maxSequenceLength", to_integer(1)),
    make_tuner_option("dtype", "model.dtype", to_choice(DTYPE_BY_NAME)),
    make_tuner_option("load_in_4bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    make_tuner_option("load_in_8bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    make_tuner_option("full_finetuning", "method.type", to_boolean, is_set_by_combine=True),
    make_tuner_option("rank", "method.lora.rank", to_integer(1)),
    make_tuner_option("lora_alpha", "method.lora.alpha", to_number(exclusive_low=0)),
    make_tuner_option("lora_dropout", "method.lora.dropout", to_number(0, 0.3)),
    make_tuner_option("target_modules", "method.lora.targetModules", to_name_list),
    make_tuner_option("bias", "method.lora.bias", to_choice(BIAS_BY_NAME)),
    make_tuner_option("use_rslora", "method.lora.rankStabilized", to_boolean),
    make_tuner_option("loftq_config", "method.lora.loftq", to_mapping, is_set_by_combine=True),
    make_tuner_option("training_data_id", "dataset.train", is_required=True, is_set_by_combine=True),
    make_tuner_option("validation_data_id", "dataset.validation", is_set_by_combine=True),
    make_tuner_option("dataset_num_proc", "dataset.numProc", to_integer(1)),
    make_tuner_option("question_column", "dataset.columns.question"),
    make_tuner_option("ground_truth_column", "dataset.columns.answer"),
    make_tuner_option("system_prompt_column", "dataset.columns.system", to_text_or_none, empty_is_absent=False),
    make_tuner_option("system_prompt_override_text", "dataset.systemPrompt"),
    make_tuner_option("epochs", "training.epochs", to_integer(1)),
    make_tuner_option("learning_rate", "training.learningRate", to_number(exclusive_low=0)),
    make_tuner_option("device_train_batch_size", "training.batchSizePerDevice", to_integer(1), aliases=("device_batch_size",)),
    make_tuner_option("device_validation_batch_size", "evaluation.batchSizePerDevice", to_integer(1)),
    make_tuner_option("grad_accumulation", "training.gradientAccumulationSteps", to_integer(1)),
    make_tuner_option("warmup_steps", "training.warmupSteps", to_integer(0)),
    make_tuner_option("lr_scheduler_type", "training.scheduler", to_choice(SCHEDULER_BY_NAME)),
    make_tuner_option("optimizer", "training.optimizer"),
    make_tuner_option("weight_decay", "training.weightDecay", to_number(0)),
    make_tuner_option("grad_clip_norm", "training.maxGradNorm", to_number(0)),
    make_tuner_option("seed", "training.seed", to_integer(0, 4294967295)),
    make_tuner_option("use_gradient_checkpointing", "training.gradientCheckpointing", to_checkpointing_mode),
    make_tuner_option("use_flash_attention", "model.attention", to_boolean, is_set_by_combine=True),
    make_tuner_option("packing", "dataset.packing", to_boolean),
    make_tuner_option("train_on_responses_only", "dataset.responseOnly.enabled", to_boolean),
    make_tuner_option("question_part", "dataset.responseOnly.questionMarker", aliases=("user_part_in_chat_template",)),
    make_tuner_option("answer_part", "dataset.responseOnly.answerMarker", aliases=("assistant_part_in_chat_template",)),
    make_tuner_option("log_steps", "tracking.loggingSteps", to_integer(1)),
    make_tuner_option("log_first_step", "tracking.logFirstStep", to_boolean),
    make_tuner_option("report_to", "tracking.reportTo", to_choice(TRACKERS_BY_NAME), is_set_by_combine=True),
    make_tuner_option("save_steps", "checkpoint.steps", to_integer(1)),
    make_tuner_option("save_strategy", "checkpoint.strategy", to_choice(["steps", "epoch", "no"])),
    make_tuner_option("save_total_limit", "checkpoint.keep", to_integer(1)),
    make_tuner_option("load_best_model_at_end", "checkpoint.loadBestAtEnd", to_boolean),
    make_tuner_option("metric_for_best_model", convert=to_choice(["eval_loss", "loss"]),
        no_effect_reason="the best checkpoint is the one with the lowest validation loss"),
    make_tuner_option("eval_steps", "evaluation.steps", to_integer(1), is_set_by_combine=True),
    make_tuner_option("patience", "training.earlyStopping.patience", to_integer(1)),
    make_tuner_option("push_to_hub", "output.hub.push", to_boolean),
    make_tuner_option("wandb_project_name", "tracking.wandb.project"),
    make_tuner_option("wandb_run_name", no_effect_reason=ONE_RUN_NAME_REASON, aliases=("wandb_run_name_prefix", "wandb_run_name_suffix")),
    make_tuner_option("run_name", convert=to_run_name, no_effect_reason=ONE_RUN_NAME_REASON, aliases=("run_name_prefix", "run_name_suffix")),
    make_tuner_option("model_local_output_dir", "output.dir", is_set_by_combine=True),
    make_tuner_option("is_multimodel", "model.modality", to_boolean, is_set_by_combine=True),
    make_tuner_option("finetune_vision_layers", "method.vision.visionLayers", to_boolean, is_set_by_combine=True),
    make_tuner_option("finetune_language_layers", "method.vision.languageLayers", to_boolean, is_set_by_combine=True),
    make_tuner_option("finetune_attention_modules", "method.vision.attentionModules", to_boolean, is_set_by_combine=True),
    make_tuner_option("finetune_mlp_modules", "method.vision.mlpModules", to_boolean, is_set_by_combine=True),
    OptionRow("mlflow.tracking_uri", "tracking.mlflow.trackingUri", is_set_by_combine=True),
    OptionRow("mlflow.experiment_name", "tracking.mlflow.experimentName"),
    OptionRow("mlflow.run_name", "output.runName.name", to_run_name),
    OptionRow("mlflow.run_name_prefix", "output.runName.prefix", to_run_name),
    OptionRow("mlflow.run_name_suffix", "output.runName.suffix", to_run_name),
    OptionRow("inferencer.testing_data_id", "dataset.test", is_set_by_combine=True),
    OptionRow("inferencer.max_new_tokens", f"{GENERATION_PATH}.maxNewTokens", to_integer(1)),
    OptionRow("inferencer.temperature", f"{GENERATION_PATH}.temperature", to_number(0, 10)),
    OptionRow("inferencer.min_p", f"{GENERATION_PATH}.minP", to_number(0, 1)),
    OptionRow("inferencer.repetition_penalty", f"{GENERATION_PATH}.repetitionPenalty", to_number(exclusive_low=0)),
    OptionRow("inferencer.use_cache", convert=to_boolean, no_effect_reason="generation always uses the KV cache"),
    *(OptionRow(f"inferencer.{key}", convert=keep_value, no_effect_reason=TRAINING_SETTINGS_REASON)
      for key in ("max_sequence_length", "dtype", "load_in_4bit", "load_in_8bit")),
    *(OptionRow(f"inferencer.{key}", no_effect_reason="the job reads the test data like the training data") for key in (
        "question_column", "ground_truth_column", "system_prompt_column", "system_prompt_override_text",
    )),
    OptionRow("inferencer.hf_user_id", "output.hub.repository", is_set_by_combine=True, aliases=("evaluator.hf_user_id", "fine_tuner.hf_user_id")),
    *(OptionRow(f"{section}.{key}", convert=to_any_text, no_effect_reason=ONE_RUN_NAME_REASON)
      for section in ("inferencer", "evaluator") for key in RUN_NAME_KEYS),
    OptionRow("evaluator.metrics", "evaluation.metrics", to_list_of(to_choice(METRIC_BY_NAME))),
    OptionRow("evaluator.llm", "evaluation.judge.model", aliases=("evaluator.llm_model_id",)),
    OptionRow("evaluator.embedding", "evaluation.judge.embedding", aliases=("evaluator.embedding_model_id",), is_set_by_combine=True),
    OptionRow("evaluator.cost_per_million_input_tokens", "evaluation.judge.inputPrice", to_number(0)),
    OptionRow("evaluator.cost_per_million_output_tokens", "evaluation.judge.outputPrice", to_number(0)),
    OptionRow("pipeline.enable_finetuning", "phases.train", to_boolean),
    OptionRow("pipeline.enable_inference", "phases.infer", to_boolean),
    OptionRow("pipeline.enable_evaluation", "phases.evaluate", to_boolean),
    OptionRow("pipeline.stop_after_finetuning", "phases.infer", to_boolean, is_set_by_combine=True, aliases=("--stop-after-finetuning",)),
    OptionRow("pipeline.stop_after_inference", "phases.evaluate", to_boolean, is_set_by_combine=True, aliases=("--stop-after-inference",)),
    OptionRow("--skip-finetuning", "phases.train", to_boolean, is_set_by_combine=True),
    OptionRow("--skip-inference", "phases.infer", to_boolean, is_set_by_combine=True),
    OptionRow("--skip-evaluation", "phases.evaluate", to_boolean, is_set_by_combine=True),
    OptionRow("--hf-key", "model.tokenSecretRef", is_set_by_combine=True, is_secret=True),
    OptionRow("--wandb-key", "tracking.wandb.apiKeySecretRef", is_set_by_combine=True, is_secret=True),
    OptionRow("--openai-key", "placement.env", is_set_by_combine=True, is_secret=True),
    OptionRow("--mlflow-username", "placement.env", is_set_by_combine=True, is_secret=True),
    OptionRow("--mlflow-password", "placement.env", is_set_by_combine=True, is_secret=True),
)  # fmt: skip

PATH_BY_KEY = {option_row.key: option_row.path for option_row in OPTION_TABLE}


def _evaluates_by_epoch(draft: JobDraft) -> bool:
    return draft.has_value("dataset.validation") and not draft.has_value("evaluation.steps")


EXAMPLE_ORIGIN = "documented example"
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("dataset.maxSequenceLength", 4096, EXAMPLE_ORIGIN),
    ToolDefault("model.dtype", "auto", EXAMPLE_ORIGIN),
    ToolDefault("method.lora.rank", 16, EXAMPLE_ORIGIN),
    ToolDefault("method.lora.alpha", 16, EXAMPLE_ORIGIN),
    ToolDefault("method.lora.dropout", 0.1, EXAMPLE_ORIGIN),
    ToolDefault("method.lora.targetModules", DEFAULT_PROJECTIONS, EXAMPLE_ORIGIN),
    ToolDefault("method.lora.bias", "none", EXAMPLE_ORIGIN),
    ToolDefault("method.lora.rankStabilized", False, EXAMPLE_ORIGIN),
    ToolDefault("dataset.format", "qa", "hard-coded in the tool"),
    ToolDefault("dataset.numProc", 4, EXAMPLE_ORIGIN),
    ToolDefault("dataset.columns.question", "question", EXAMPLE_ORIGIN),
    ToolDefault("dataset.columns.answer", "answer", EXAMPLE_ORIGIN),
    ToolDefault("dataset.useChatTemplate", True, "hard-coded in the tool"),
    ToolDefault("dataset.responseOnly.enabled", True, EXAMPLE_ORIGIN),
    ToolDefault("dataset.packing", False, EXAMPLE_ORIGIN),
    ToolDefault("training.epochs", 30, EXAMPLE_ORIGIN),
    ToolDefault("training.learningRate", 2e-4, EXAMPLE_ORIGIN),
    ToolDefault("training.batchSizePerDevice", 4, EXAMPLE_ORIGIN),
    ToolDefault("training.gradientAccumulationSteps", 4, EXAMPLE_ORIGIN),
    ToolDefault("training.warmupSteps", 5, EXAMPLE_ORIGIN),
    ToolDefault("training.scheduler", "linear", EXAMPLE_ORIGIN),
    ToolDefault("training.optimizer", "paged_adamw_8bit", EXAMPLE_ORIGIN, needs_gpu=True),
    ToolDefault("training.weightDecay", 0.01, EXAMPLE_ORIGIN),
    ToolDefault("training.maxGradNorm", 1, "hard-coded in the tool"),
    ToolDefault("training.seed", 42, EXAMPLE_ORIGIN),
    ToolDefault("training.gradientCheckpointing", "unsloth", EXAMPLE_ORIGIN, needs_gpu=True),
    ToolDefault("trainer.backend", "unsloth", "hard-coded in the tool", needs_gpu=True),
    ToolDefault("model.attention", "flashAttention2", EXAMPLE_ORIGIN, needs_gpu=True),
    ToolDefault("checkpoint.strategy", "steps", "hard-coded in the tool"),
    ToolDefault("checkpoint.steps", 20, EXAMPLE_ORIGIN),
    ToolDefault("checkpoint.keep", 3, EXAMPLE_ORIGIN),
    ToolDefault("evaluation.strategy", "epoch", "chosen by the importer: the tool loads validation data but does not use it", _evaluates_by_epoch),
    ToolDefault("evaluation.strategy", "steps", "from eval_steps", lambda draft: draft.has_value("evaluation.steps")),
    ToolDefault("evaluation.batchSizePerDevice", 4, EXAMPLE_ORIGIN, lambda draft: draft.has_value("dataset.validation")),
    ToolDefault("output.dir", "models/fine_tuned", "hard-coded in the tool"),
    ToolDefault("output.layout", "flat", "hard-coded in the tool"),
    ToolDefault("tracking.loggingSteps", 10, EXAMPLE_ORIGIN),
    ToolDefault("tracking.logFirstStep", True, EXAMPLE_ORIGIN),
)  # fmt: skip


# --- reading --------------------------------------------------------------------------------------------------------

KNOWN_SECTIONS = ("fine_tuner", "mlflow", "inferencer", "evaluator", "pipeline")
SECTION_HEADER_PATTERN = re.compile(r"^\s*\[\s*(?P<name>[^\[\]]+?)\s*\]\s*(#.*)?$")
LIST_HEADER_PATTERN = re.compile(r"^\s*\[\[\s*(?P<name>[^\[\]]+?)\s*\]\]\s*(#.*)?$")
KEY_PATTERN = re.compile(r"""^\s*(?P<name>[A-Za-z0-9_-]+|"[^"]*"|'[^']*')\s*=\s*(?P<value>.*)$""")
VARIABLE_PATTERN = re.compile(r"^\$\{([A-Za-z_][A-Za-z0-9_]*)\}$")


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document has a section that only this tool has."""
    return any(re.search(r"^\s*\[(fine_tuner|inferencer|evaluator)\]", d.text, re.MULTILINE) for d in documents)


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of the files in order, then the flags of the tool's command line."""
    flags = parse_flags(
        strip_launcher(draft.request.tool_arguments), lambda name: not name.startswith(("--skip-", "--stop-after-"))
    )
    add_stray_mistakes(draft, flags)
    documents = list(draft.documents)
    for name, value in flags.name_value_pairs:
        config_document = add_config_file(draft, value) if name == "--config" and value else None
        documents += [config_document] if config_document else []
    for document in documents:
        yield from _read_file(document, draft)
    for name, value in flags.name_value_pairs:
        if name.startswith(("--skip-", "--stop-after-")) and value is None:
            yield build_flag_entry(name, True)
        elif name != "--config" and value is None:
            draft.mistakes.append(Mistake("command line", name, "the value is missing", f"write {name} VALUE"))
        elif name != "--config":
            yield build_flag_entry(name, value)


def _read_file(document: InputDocument, draft: JobDraft) -> Iterator[OptionEntry]:
    line_of_key = scan_lines(document)
    try:
        content = tomllib.loads(document.text)
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"line (\d+)", str(error))
        location = f"{document.name}:{match.group(1)}" if match else document.name
        raise InvalidInput([Mistake(location, "", f"invalid TOML: {error}")]) from None
    except (ValueError, RecursionError):
        raise InvalidInput(
            [Mistake(document.name, "", "the file holds a number that is too long, or is nested too deeply")]
        ) from None
    for section, section_options in content.items():
        if not isinstance(section_options, dict):
            yield OptionEntry(section, section_options, _get_line_origin(document, line_of_key, section))
            continue
        if section not in KNOWN_SECTIONS:
            draft.mistakes.append(
                Mistake(
                    _get_line_origin(document, line_of_key, section).location,
                    f"[{section}]",
                    "unknown section",
                    f"write one of {', '.join(KNOWN_SECTIONS)}",
                )
            )
            continue
        for key, value in section_options.items():
            name = f"{section}.{key}"
            origin = _get_line_origin(document, line_of_key, name)
            if _check_variables(value, name, origin, draft):
                yield OptionEntry(name, _resolve_value(value, draft), origin)


def _get_line_origin(document: InputDocument, line_of_key: dict[str, int], option_key: str) -> ValueOrigin:
    return ValueOrigin(f"{document.name}:{line_of_key[option_key]}" if option_key in line_of_key else document.name)


def _check_variables(value: Any, option_key: str, origin: ValueOrigin, draft: JobDraft) -> bool:
    """Return whether all environment variables in a value are set. Record a mistake for each variable that is not."""
    missing_names = [name for name in _list_variables(value) if name not in draft.request.environment]
    for name in missing_names:
        draft.paths_of_invalid_keys[option_key] = PATH_BY_KEY.get(option_key, "")
        draft.mistakes.append(
            Mistake(origin.location, option_key, f"variable {name} is not set", "set the variable, or write its value here")
        )
    for name in _list_variables(value):
        if SECRET_NAME_PATTERN.search(name) and not option_key.endswith("tracking_uri"):
            draft.redact_in_messages(draft.request.environment.get(name))
    return not missing_names


def _list_variables(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [match.group(1) for text in texts if isinstance(text, str) and (match := VARIABLE_PATTERN.match(text))]


def _resolve_value(value: Any, draft: JobDraft) -> Any:
    """Return None for the string `"null"`, and the value of the environment variable for a string `"${NAME}"`.

    In a list, each item is replaced in the same way.
    """
    if isinstance(value, list):
        return [item for item in (_resolve_value(item, draft) for item in value) if item is not None]
    if value == "null":
        return None
    variable = VARIABLE_PATTERN.match(value) if isinstance(value, str) else None
    return value if variable is None else draft.request.environment[variable.group(1)]


def scan_lines(document: InputDocument) -> dict[str, int]:
    """Return the line of each section and key.

    Raise InvalidInput for errors that the TOML parser reports without the key and without a hint.
    """
    line_of_key: dict[str, int] = {}
    mistakes: list[Mistake] = []
    section, closing_quotes = "", ""
    for line_number, line in enumerate(document.text.splitlines(), 1):
        if closing_quotes:
            closing_quotes = "" if closing_quotes in line else closing_quotes
            continue
        header, key = SECTION_HEADER_PATTERN.match(line), KEY_PATTERN.match(line)
        if header:
            section = header["name"].replace('"', "")
            _record_line(line_of_key, section, line_number, document, mistakes, f"table [{section}] is declared")
        elif list_header := LIST_HEADER_PATTERN.match(line):
            section = list_header["name"].replace('"', "")
            line_of_key.setdefault(section, line_number)
        elif key:
            name = f"{section}.{key['name'].strip(chr(34) + chr(39))}".lstrip(".")
            _record_line(line_of_key, name, line_number, document, mistakes, f"{name} is set")
            mistakes += _find_syntax_mistakes(document, line_number, name, key["value"].partition("#")[0].strip())
            closing_quotes = _find_closing_quotes(key["value"])
    if mistakes:
        raise InvalidInput(mistakes)
    return line_of_key


def _record_line(
    line_of_key: dict[str, int], name: str, line: int, document: InputDocument, mistakes: list[Mistake], subject: str
) -> None:
    if name in line_of_key:
        hint = "keep one of them; a later file can override the value"
        mistakes.append(
            Mistake(f"{document.name}:{line}", name, f"{subject} twice: lines {line_of_key[name]} and {line}", hint)
        )
    line_of_key.setdefault(name, line)


def _find_closing_quotes(value: str) -> str:
    """If `value` begins a multi-line string, return the quotes that end this string. Otherwise return an empty string."""
    for quotes in ('"""', "'''"):
        if value.startswith(quotes) and value.count(quotes) == 1:
            return quotes
    return ""


def _find_syntax_mistakes(document: InputDocument, line: int, name: str, value: str) -> Iterator[Mistake]:
    location = f"{document.name}:{line}"
    if value == "null":
        yield Mistake(location, name, "an unquoted null is not TOML", 'write "null", or remove the key')
    if value in ("True", "False"):
        yield Mistake(location, name, f"{value} is not TOML", f"write {value.lower()}")
    if re.match(r"^[+-]?\.\d", value):
        yield Mistake(location, name, f"{value} is not TOML", f"write {value.replace('.', '0.', 1)}")
    if value.startswith("{") and "}" not in value:
        yield Mistake(location, name, "an inline table must be on one line", "write { a = 1, b = 2 } on one line")


# --- fields that depend on several options --------------------------------------------------------------------------


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options of the tool."""
    assign_source(draft, "fine_tuner.base_model_id", "model.source")
    for key, path in (
        ("fine_tuner.training_data_id", "dataset.train"),
        ("fine_tuner.validation_data_id", "dataset.validation"),
        ("inferencer.testing_data_id", "dataset.test"),
    ):
        assign_source(draft, key, path)
    _set_method(draft)
    _note_system_column(draft)
    if "fine_tuner.use_flash_attention" in draft.given_options:
        draft.assign(
            "model.attention",
            "flashAttention2" if draft.get("fine_tuner.use_flash_attention") else "sdpa",
            "fine_tuner.use_flash_attention",
        )
    if "fine_tuner.eval_steps" in draft.given_options:
        draft.assign("evaluation.steps", draft.get("fine_tuner.eval_steps"), "fine_tuner.eval_steps")
    _set_trackers(draft)
    _set_vision(draft)
    _set_output(draft)
    _set_judge_and_sampling(draft)
    _set_phases(draft)
    _set_secrets(draft)


def _note_system_column(draft: JobDraft) -> None:
    """Add a note if the file turns the system column off, because the trainer reads a column named `system` even so."""
    key = "fine_tuner.system_prompt_column"
    if key in draft.given_options and draft.get(key) is None and "fine_tuner.system_prompt_override_text" not in draft.given_options:
        draft.add_note(
            "system_prompt_column is null, but the trainer reads a column `system` or `system_prompt` if the rows have one: "
            "rename the column if it does not contain a system prompt"
        )


def _set_method(draft: JobDraft) -> None:
    key_4bit, key_8bit, key_full = (f"fine_tuner.{key}" for key in ("load_in_4bit", "load_in_8bit", "full_finetuning"))
    if draft.get(key_4bit) and draft.get(key_8bit):
        draft.add_mistake(
            (key_4bit, key_8bit),
            "4-bit and 8-bit loading exclude each other, but both are true",
            "set one of them to false",
            explained_path="model.quantization.bits",
        )
        return
    if draft.get(key_full):
        for key, bits in ((key_4bit, 4), (key_8bit, 8)):
            if draft.get(key):
                draft.add_mistake(
                    (key_full, key),
                    f"full fine-tuning trains all weights, but weights in {bits} bits cannot be trained",
                    f"set {key.partition('.')[2]} = false",
                    explained_path="model.quantization.bits",
                )
        if not draft.has_key(key_4bit):
            draft.add_note("full_finetuning is true, so the base model is not loaded in 4 bits")
        draft.assign("method.type", "full", key_full)
        return
    _set_quantization(draft, key_4bit, key_8bit)


def _set_quantization(draft: JobDraft, key_4bit: str, key_8bit: str) -> None:
    loftq_options = draft.get("fine_tuner.loftq_config")
    source = str(draft.get("fine_tuner.base_model_id", ""))
    is_quantized = source.lower().endswith("-bnb-4bit")
    bits = (
        8
        if draft.get(key_8bit)
        else 4
        if draft.get(key_4bit, not draft.has_key(key_8bit) or draft.get(key_8bit) is False)
        else None
    )
    if is_quantized and bits != 4:
        draft.add_warning(f"{source} holds 4-bit weights, so load_in_4bit = false has no effect")
        bits = 4
    if loftq_options is not None:
        _set_loftq(draft, loftq_options, is_quantized, bits, source)
        return
    if bits is None:
        draft.assign("method.type", "lora", key_4bit) if key_4bit in draft.given_options else draft.assign_default(
            "method.type", "lora"
        )
        return
    key = key_8bit if bits == 8 else key_4bit
    for path, value in (("method.type", "lora" if bits == 8 else "qlora"), ("model.quantization.bits", bits)):
        if key in draft.given_options:
            draft.assign(path, value, key)
        else:
            draft.assign_default(path, value, EXAMPLE_ORIGIN)
    if bits == 4:
        draft.assign_default("model.quantization.type", "nf4", "hard-coded in the tool")


def _set_loftq(draft: JobDraft, loftq_options: dict[str, Any], is_quantized: bool, bits: int | None, source: str) -> None:
    key = "fine_tuner.loftq_config"
    for name in loftq_options:
        if name not in ("loftq_bits", "loftq_iter"):
            draft.add_mistake(key, f"unknown key {name}", "write { loftq_bits = 4, loftq_iter = 1 }")
    if is_quantized:
        draft.add_mistake(
            (key, "fine_tuner.base_model_id"),
            f"LoftQ needs an unquantized base model, but {source} holds 4-bit weights",
            "give the base model without -bnb-4bit",
        )
        return
    try:
        draft.assign("method.lora.loftq.bits", to_integer(2, 8)(loftq_options.get("loftq_bits", 4)), key)
        iterations = to_integer(1, 64)(loftq_options.get("loftq_iter", 1))
        draft.assign("method.lora.loftq.iterations", 1, key)
        if iterations != 1:
            draft.add_note(
                f"loftq_iter {iterations} becomes 1: each further iteration changes the quantised base model, but only the adapter is saved"
            )
    except ConversionError as error:
        draft.add_mistake(key, error.problem, f"allowed: {error.allowed}")
    draft.assign("method.lora.init", "loftq", key)
    draft.assign("method.type", "lora", key)
    if bits:
        draft.add_note(
            f"LoftQ with load_in_{bits}bit: the trainer loads the base model in full precision, initialises the adapter, and then quantises the model"
        )


def _set_trackers(draft: JobDraft) -> None:
    report_option = draft.given_options.get("fine_tuner.report_to")
    uri_option = draft.given_options.get("mlflow.tracking_uri")
    if report_option is not None:
        draft.assign("tracking.reportTo", report_option.value, "fine_tuner.report_to")
        if (
            report_option.value == ["mlflow"]
            and not draft.has_key("mlflow.tracking_uri")
            and not draft.has_value("tracking.mlflow.trackingUri")
        ):
            draft.add_mistake(
                "fine_tuner.report_to",
                "mlflow needs a server, but no server is given",
                "write [mlflow] tracking_uri",
                explained_path="tracking.mlflow",
            )
    elif uri_option is not None or draft.has_key("mlflow.tracking_uri"):
        draft.assign_default("tracking.reportTo", ["mlflow"], EXAMPLE_ORIGIN)
    elif "fine_tuner.report_to" not in draft.paths_of_invalid_keys:
        draft.assign_default("tracking.reportTo", [], "no [mlflow] tracking_uri is given")
        draft.add_note("no tracking_uri is given, so metrics are not sent to mlflow (the tool's example sends them)")
    if uri_option is None:
        if draft.has_key("mlflow.tracking_uri"):
            draft.paths_of_invalid_keys["tracking.mlflow"] = "tracking.mlflow"
        return
    address = str(uri_option.value)
    userinfo_match = USERINFO_PATTERN.search(address)
    if userinfo_match:
        user, _, password = userinfo_match.group(0).rstrip("@").partition(":")
        _set_secret_variables(
            draft, "mlflow.tracking_uri", {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
        )
        address = USERINFO_PATTERN.sub("", address)
        draft.add_warning(f"{uri_option.origin.location}: {uri_option.key}: user and password are moved into the Secret")
    draft.assign("tracking.mlflow.trackingUri", address, "mlflow.tracking_uri")


def _set_secret_variables(draft: JobDraft, option_key: str, value_by_variable: dict[str, str]) -> None:
    """Store values in the Secret, and set environment variables of the trainer to them."""
    variables = list(draft.value("placement.env") or [])
    for name, value in value_by_variable.items():
        if value:
            variables.append({"name": name, "secretKeyRef": draft.store_secret(name.lower().replace("_", "-"), value)})
    if variables:
        draft.assign("placement.env", variables, option_key)


def _set_vision(draft: JobDraft) -> None:
    is_multimodal = draft.get("fine_tuner.is_multimodel")
    if is_multimodal:
        draft.assign("model.modality", "visionLanguage", "fine_tuner.is_multimodel")
        if "fine_tuner.finetune_vision_layers" not in draft.given_options:
            draft.assign("method.vision.visionLayers", True, "fine_tuner.is_multimodel")  # The tool trains the vision layers by default.
    for option_row in OPTION_TABLE:
        if option_row.path.startswith("method.vision.") and option_row.key in draft.given_options:
            if is_multimodal:
                draft.assign(option_row.path, draft.get(option_row.key), option_row.key)
            else:
                given_option = draft.given_options[option_row.key]
                draft.warn_no_effect(given_option.option_row.key, "the model is not multimodal")


def _set_output(draft: JobDraft) -> None:
    if "fine_tuner.model_local_output_dir" in draft.given_options:
        assign_output_folder(draft, "fine_tuner.model_local_output_dir")
    if "mlflow.run_name" not in draft.given_options and (
        draft.get("mlflow.run_name_prefix") or draft.get("mlflow.run_name_suffix")
    ):
        draft.add_note(
            "the run name is prefix + FineTuneJob name + suffix; the tool writes the current time between prefix and suffix"
        )
    if not draft.get("fine_tuner.push_to_hub"):
        if not draft.has_key("fine_tuner.push_to_hub"):
            draft.add_note(
                "push_to_hub is not set, so the model is not published (the tool's example publishes it); to publish it, set push_to_hub = true"
            )
        return
    name_parts = [str(draft.get(f"mlflow.{key}", "")) for key in ("run_name_prefix", "run_name", "run_name_suffix")]
    name = "".join(name_parts) if name_parts[1] else f"{name_parts[0]}{draft.name}{name_parts[2]}"
    user = draft.get("inferencer.hf_user_id")
    if not re.match(r"^[\w.-]+$", name):
        draft.add_mistake(
            "fine_tuner.push_to_hub",
            f"the repository is named after the run, but {name!r} is not a valid repository name",
            "give --set output.hub.repository=org/name",
        )
        return
    draft.assign_default("output.hub.repository", f"{user}/{name}" if user else name, "the run's name")
    draft.assign_default("output.hub.private", False, "hard-coded in the tool")


def _set_judge_and_sampling(draft: JobDraft) -> None:
    if "evaluator.embedding" in draft.given_options:
        embedding_model = str(draft.get("evaluator.embedding")).replace("text-embeddings-", "text-embedding-")
        draft.assign("evaluation.judge.embedding", embedding_model, "evaluator.embedding")
    if draft.get("inferencer.temperature"):
        draft.assign_default(f"{GENERATION_PATH}.doSample", True, "a temperature above 0")


def _set_phases(draft: JobDraft) -> None:
    """Turn off the phases of the tool's pipeline that a `stop_after_*` or `--skip-*` option turns off. These options override the `enable_*` options."""
    for key, skipped_phases in (
        ("pipeline.stop_after_finetuning", ("phases.infer", "phases.evaluate")),
        ("pipeline.stop_after_inference", ("phases.evaluate",)),
        ("--skip-finetuning", ("phases.train",)),
        ("--skip-inference", ("phases.infer",)),
        ("--skip-evaluation", ("phases.evaluate",)),
    ):
        for path in skipped_phases if draft.get(key) else ():
            draft.assign(path, False, key)


def _set_secrets(draft: JobDraft) -> None:
    if "--hf-key" in draft.given_options:
        draft.assign("model.tokenSecretRef", draft.store_secret("hf-token", draft.get("--hf-key")), "--hf-key")
    if "--wandb-key" in draft.given_options:
        draft.assign(
            "tracking.wandb.apiKeySecretRef",
            draft.store_secret("wandb-api-key", draft.get("--wandb-key")),
            "--wandb-key",
        )
    for flag, variable in (
        ("--openai-key", "OPENAI_API_KEY"),
        ("--mlflow-username", "MLFLOW_TRACKING_USERNAME"),
        ("--mlflow-password", "MLFLOW_TRACKING_PASSWORD"),
    ):
        if flag in draft.given_options:
            _set_secret_variables(draft, flag, {variable: draft.get(flag)})


IMPORTER = Importer("toml", "this TOML tool", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options)
