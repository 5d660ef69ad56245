"""`yaml`: the importer for a YAML file with seven sections, dotted overrides such as `--training.epochs 2`, and an optional DeepSpeed JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.benchmarks import BENCHMARK_KINDS, BenchmarkKind, replace_old_task_names

from finetune_cli.files import read_text
from finetune_cli.importers.accelerate import SHARDING_BY_NAME, STATE_DICT_BY_NAME
from finetune_cli.importers.command_lines import (
    NEGATIVE_NUMBER_PATTERN,
    add_config_file,
    build_flag_entry,
    strip_launcher,
)
from finetune_cli.importers.converters import (
    ConversionError,
    Converter,
    keep_value,
    to_boolean,
    to_choice,
    to_integer,
    to_layer_numbers,
    to_list_of,
    to_module_names,
    to_number,
    try_converters,
)
from finetune_cli.importers.deepspeed import is_deepspeed, read_deepspeed
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_mapping
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.sources import (
    assign_config_map,
    assign_output_folder,
    assign_source,
    assign_tokenizer,
    is_local,
)
from finetune_cli.importers.toml import BIAS_BY_NAME, DEFAULT_PROJECTIONS, SCHEDULER_BY_NAME
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import ValueOrigin
from finetune_cli.yaml_reader import parse_value

LATER_REVISION_REASON = "a later revision of the tool added this option; a FineTuneJob has no such field"
TOOL_TASKS = ["hellaswag", "mmlu", "truthfulqa_mc", "winogrande", "gsm8k", "arc_challenge"]
"""Tasks that the tool runs with lm-evaluation-harness."""
BENCHMARK_NAMES = ["lm-evaluation-harness", "domain-specific-eval", "human-eval", "openai-humaneval"]
UNUSED_KEYS = (
    "model.hybrid_lora_adapter", "fine_tuning.lora.dynamic_rank", "fine_tuning.quantization.bnb_8bit_compute_dtype",
    "fine_tuning.quantization.calibration", "fine_tuning.efficiency_transformer.adaptive_layer_selection",
    "fine_tuning.efficiency_transformer.cross_layer_parameter_sharing", "fine_tuning.efficiency_transformer.importance_score_method",
    "fine_tuning.efficiency_transformer.low_resource_mode", "fine_tuning.efficiency_transformer.target_speedup", "pruning.method",
    "pruning.initial_sparsity", "pruning.final_sparsity", "pruning.pruning_start", "pruning.pruning_end", "pruning.pruning_interval",
    "pruning.importance_metric", "pruning.quantization_aware", "evaluation.custom_benchmarks", "evaluation.baseline_comparison",
    "evaluation.baseline_results_path", "evaluation.resource_metrics", "evaluation.performance_thresholds",
)  # fmt: skip


def to_enabled_or_disabled(value: Any) -> str:
    """Convert true to `enabled`, and false to `disabled`."""
    return "enabled" if to_boolean(value) else "disabled"


def refuse_true(feature: str) -> Converter:
    """Return a converter that accepts only false, because true would turn on a feature that is not supported."""

    def convert(value: Any) -> bool:
        if to_boolean(value):
            raise ConversionError(f"enables {feature}, which is not supported", "false")
        return False

    return convert


OPTION_TABLE: tuple[OptionRow, ...] = (
    OptionRow("model.base_model", "model.source", is_required=True, is_set_by_combine=True),
    OptionRow("model.tokenizer", "model.tokenizer", is_set_by_combine=True),
    OptionRow("model.load_in_8bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("model.load_in_4bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("model.trust_remote_code", "model.trustRemoteCode", to_boolean),
    OptionRow("model.use_flash_attention", "model.attention", to_boolean, is_set_by_combine=True),
    OptionRow("model.use_liger_kernels", "model.ligerKernels", to_boolean),
    OptionRow("fine_tuning.method", "method.type", to_choice(["full", "lora", "qlora", "spectrum"]), is_set_by_combine=True),
    OptionRow("fine_tuning.lora.r", "method.lora.rank", to_integer(1)),
    OptionRow("fine_tuning.lora.alpha", "method.lora.alpha", to_number(exclusive_low=0)),
    OptionRow("fine_tuning.lora.dropout", "method.lora.dropout", to_number(0, exclusive_high=1)),
    OptionRow("fine_tuning.lora.target_modules", "method.lora.targetModules", to_module_names),
    OptionRow("fine_tuning.lora.bias", "method.lora.bias", to_choice(BIAS_BY_NAME)),
    OptionRow("fine_tuning.lora.task_type", "method.lora.taskType", to_choice({"CAUSAL_LM": "causalLM"})),
    OptionRow("fine_tuning.spectrum.snr_threshold", "method.spectrum.snrThreshold", to_number(0, 1)),
    OptionRow("fine_tuning.spectrum.layers_to_finetune", "method.spectrum.layers", try_converters(to_layer_numbers, to_choice({"auto": None}))),
    OptionRow("fine_tuning.quantization.bits", "model.quantization.bits", try_converters(to_choice({"4": 4, "8": 8}), to_integer(4, 8)),
        is_set_by_combine=True),
    OptionRow("fine_tuning.quantization.bnb_4bit_compute_dtype", "model.quantization.computeDtype", to_choice(["bfloat16", "float16", "float32"])),
    OptionRow("fine_tuning.quantization.bnb_4bit_quant_type", "model.quantization.type", to_choice(["nf4", "fp4"])),
    OptionRow("fine_tuning.quantization.bnb_4bit_use_double_quant", "model.quantization.doubleQuant", to_boolean),
    OptionRow("training.epochs", "training.epochs", to_integer(1)),
    OptionRow("training.micro_batch_size", "training.batchSizePerDevice", to_integer(1)),
    OptionRow("training.gradient_accumulation_steps", "training.gradientAccumulationSteps", to_integer(1)),
    OptionRow("training.learning_rate", "training.learningRate", to_number(exclusive_low=0)),
    OptionRow("training.lr_scheduler_type", "training.scheduler", to_choice(SCHEDULER_BY_NAME)),
    OptionRow("training.warmup_ratio", "training.warmupRatio", to_number(0, exclusive_high=1)),
    OptionRow("training.warmup_steps", "training.warmupSteps", to_integer(0)),
    OptionRow("training.max_grad_norm", "training.maxGradNorm", to_number(0)),
    OptionRow("training.optimizer", "training.optimizer"),
    OptionRow("training.weight_decay", "training.weightDecay", to_number(0)),
    OptionRow("training.max_seq_length", "dataset.maxSequenceLength", to_integer(1)),
    OptionRow("training.gradient_checkpointing", "training.gradientCheckpointing", to_enabled_or_disabled),
    OptionRow("training.mixed_precision", "training.mixedPrecision", to_choice(["no", "fp16", "bf16"])),
    OptionRow("training.gradient_based_pruning", convert=refuse_true("pruning")),
    OptionRow("dataset.format", "dataset.format", to_choice(["alpaca", "sharegpt", "oasst", "custom"])),
    OptionRow("dataset.train_path", "dataset.train", is_set_by_combine=True),
    OptionRow("dataset.eval_path", "dataset.validation", is_set_by_combine=True),
    OptionRow("dataset.preprocessing.add_eos_token", "dataset.addEosToken", to_boolean),
    OptionRow("dataset.preprocessing.add_bos_token", "dataset.addBosToken", to_boolean),
    OptionRow("dataset.preprocessing.use_chat_template", "dataset.useChatTemplate", to_boolean),
    OptionRow("dataset.preprocessing.custom_prompt_template", "dataset.template"),
    OptionRow("distributed.use_deepspeed", "distributed.strategy", to_boolean, is_set_by_combine=True),
    OptionRow("distributed.deepspeed_config", "distributed.deepspeed.configRef", is_set_by_combine=True),
    OptionRow("distributed.zero_stage", "distributed.deepspeed.zeroStage", to_integer(0, 3), is_set_by_combine=True),
    OptionRow("distributed.gradient_accumulation_steps", "training.gradientAccumulationSteps", to_integer(1), is_set_by_combine=True),
    OptionRow("distributed.use_fsdp", "distributed.strategy", to_boolean, is_set_by_combine=True),
    OptionRow("distributed.fsdp_config", "distributed.fsdp.configRef", convert=keep_value, is_set_by_combine=True),
    OptionRow("distributed.fsdp_sharding_strategy", "distributed.fsdp.sharding", to_choice(SHARDING_BY_NAME)),
    OptionRow("distributed.fsdp_checkpoint_strategy", "distributed.fsdp.stateDict", to_choice(STATE_DICT_BY_NAME)),
    OptionRow("distributed.offload_optimizer", "distributed.deepspeed.offloadOptimizer", to_boolean),
    OptionRow("distributed.offload_param", "distributed.deepspeed.offloadParameters", to_boolean),
    OptionRow("output.output_dir", "output.dir", is_set_by_combine=True),
    OptionRow("output.logging_steps", "tracking.loggingSteps", to_integer(1)),
    OptionRow("output.eval_steps", "evaluation.steps", to_integer(1), is_set_by_combine=True),
    OptionRow("output.save_steps", "checkpoint.steps", to_integer(1)),
    OptionRow("output.save_total_limit", "checkpoint.keep", to_integer(1)),
    OptionRow("output.push_to_hub", "output.hub.push", to_boolean),
    OptionRow("output.hub_model_id", "output.hub.repository"),
    OptionRow("output.track_resource_usage", "tracking.systemMetrics", to_boolean),
    OptionRow("evaluation.do_eval", "evaluation.strategy", to_boolean, is_set_by_combine=True),
    OptionRow("evaluation.eval_batch_size", "evaluation.batchSizePerDevice", to_integer(1)),
    OptionRow("evaluation.eval_strategy", "evaluation.strategy", to_choice(["steps", "epoch", "no"]), is_set_by_combine=True),
    OptionRow("evaluation.eval_steps", "evaluation.steps", to_integer(1), is_set_by_combine=True),
    OptionRow("evaluation.benchmarks", "evaluation.benchmarks", to_list_of(to_choice(BENCHMARK_NAMES)), is_set_by_combine=True),
    OptionRow("pruning.enabled", convert=refuse_true("pruning")),
    *(OptionRow(key, convert=keep_value, no_effect_reason=LATER_REVISION_REASON) for key in UNUSED_KEYS),
    OptionRow("--eval_only", "phases.train", to_boolean, is_set_by_combine=True),
)  # fmt: skip


EXAMPLE_ORIGIN = "documented example"
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("model.trustRemoteCode", False, "chosen by the importer: the tool runs code from the model's repository by default"),
    ToolDefault("model.dtype", "bfloat16", "hard-coded in the tool", needs_gpu=True),
    ToolDefault("model.attention", "flashAttention2", "documented default", needs_gpu=True),
    ToolDefault("model.ligerKernels", False, "documented default"),
    ToolDefault("method.lora.rank", 16, EXAMPLE_ORIGIN),
    ToolDefault("method.lora.alpha", 32, EXAMPLE_ORIGIN),
    ToolDefault("method.lora.dropout", 0.05, EXAMPLE_ORIGIN),
    ToolDefault("method.lora.targetModules", DEFAULT_PROJECTIONS, EXAMPLE_ORIGIN, lambda draft: "fine_tuning.lora.target_modules" not in draft.given_options),
    ToolDefault("method.lora.bias", "none", EXAMPLE_ORIGIN),
    ToolDefault("method.spectrum.snrThreshold", 0.5, EXAMPLE_ORIGIN),
    ToolDefault("method.spectrum.metric", "marchenkoPastur", "chosen by the importer: the published metric, because the tool's metric does not rank modules"),
    ToolDefault("training.epochs", 3, EXAMPLE_ORIGIN),
    ToolDefault("training.batchSizePerDevice", 1, EXAMPLE_ORIGIN),
    ToolDefault("training.gradientAccumulationSteps", 16, EXAMPLE_ORIGIN),
    ToolDefault("training.learningRate", 2e-4, EXAMPLE_ORIGIN),
    ToolDefault("training.scheduler", "cosine", EXAMPLE_ORIGIN),
    ToolDefault("training.warmupRatio", 0.03, EXAMPLE_ORIGIN, lambda draft: not draft.has_value("training.warmupSteps")),
    ToolDefault("training.maxGradNorm", 0.3, EXAMPLE_ORIGIN),
    ToolDefault("training.optimizer", "paged_adamw_8bit", EXAMPLE_ORIGIN, needs_gpu=True),
    ToolDefault("training.weightDecay", 0.001, EXAMPLE_ORIGIN),
    ToolDefault("training.gradientCheckpointing", "enabled", EXAMPLE_ORIGIN),
    ToolDefault("training.mixedPrecision", "bf16", EXAMPLE_ORIGIN, needs_gpu=True),
    ToolDefault("dataset.maxSequenceLength", 4096, EXAMPLE_ORIGIN),
    ToolDefault("dataset.format", "alpaca", EXAMPLE_ORIGIN),
    ToolDefault("dataset.addEosToken", True, EXAMPLE_ORIGIN),
    ToolDefault("dataset.addBosToken", False, EXAMPLE_ORIGIN),
    ToolDefault("dataset.useChatTemplate", True, EXAMPLE_ORIGIN),
    ToolDefault("dataset.responseOnly.enabled", False, "hard-coded in the tool"),
    ToolDefault("checkpoint.strategy", "steps", "hard-coded in the tool"),
    ToolDefault("checkpoint.steps", 500, EXAMPLE_ORIGIN),
    ToolDefault("checkpoint.keep", 5, EXAMPLE_ORIGIN),
    ToolDefault("output.dir", "models/runs", EXAMPLE_ORIGIN),
    ToolDefault("output.layout", "flat", "hard-coded in the tool"),
    ToolDefault("tracking.reportTo", ["tensorboard"], "hard-coded in the tool"),
    ToolDefault("tracking.loggingSteps", 10, EXAMPLE_ORIGIN),
)  # fmt: skip


# --- reading --------------------------------------------------------------------------------------------------------

OPAQUE_PATHS = frozenset(
    {
        "evaluation.performance_thresholds",
        "distributed.fsdp_config",
        "fine_tuning.quantization.calibration",
        "evaluation.resource_metrics",
    }
)
RECOGNISED_FLAG_PREFIXES = ("--model.", "--fine_tuning.", "--training.", "--dataset.", "--distributed.", "--output.", "--evaluation.")


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document has `model.base_model` or a section `fine_tuning`. If there are no documents, return whether a word is a flag of the tool."""
    if not documents:
        return any(word.startswith(RECOGNISED_FLAG_PREFIXES) for word in command_words)
    for document in documents:
        values_by_key = peek_mapping(document)
        model = values_by_key.get("model")
        if "fine_tuning" in values_by_key or (isinstance(model, dict) and "base_model" in model):
            return True
    return False


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of the files in order, then the overrides. A DeepSpeed JSON file is left out, because `combine_options` reads it."""
    overrides = list(_read_overrides(draft))
    for document in draft.documents:
        if not is_deepspeed(document):
            yield from iterate_entries(document, parse_document(document), OPAQUE_PATHS)
    yield from overrides


def _read_overrides(draft: JobDraft) -> Iterator[OptionEntry]:
    remaining_words = strip_launcher(draft.request.tool_arguments)
    while remaining_words:
        word = remaining_words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            draft.mistakes.append(
                Mistake("command line", word, "this word belongs to no option", "write --section.key value")
            )
        elif name == "--eval_only" and not equals:
            yield build_flag_entry(name, True)
        elif not equals and (not remaining_words or (remaining_words[0].startswith("-") and not NEGATIVE_NUMBER_PATTERN.match(remaining_words[0]))):
            draft.mistakes.append(Mistake("command line", name, "the value is missing", f"write {name} VALUE"))
        else:
            value_text = value if equals else remaining_words.pop(0)
            if name == "--config":
                add_config_file(draft, value_text)
            elif name == "--deepspeed":
                yield OptionEntry("distributed.deepspeed_config", value_text, ValueOrigin(f"command line {name}"))
            else:
                yield OptionEntry(name.removeprefix("--"), parse_value(value_text), ValueOrigin(f"command line {name}"))


# --- fields that depend on several options --------------------------------------------------------------------------


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options of the tool."""
    assign_source(draft, "model.base_model", "model.source")
    assign_tokenizer(draft, "model.tokenizer", "model.base_model")
    _set_data(draft)
    _set_method(draft)
    if "model.use_flash_attention" in draft.given_options:
        draft.assign(
            "model.attention",
            "flashAttention2" if draft.get("model.use_flash_attention") else "sdpa",
            "model.use_flash_attention",
        )
    _report_remote_code(draft)
    _set_distributed(draft)
    _set_evaluation(draft)
    if "output.output_dir" in draft.given_options:
        assign_output_folder(draft, "output.output_dir")
    if draft.get("--eval_only"):
        draft.assign("phases.train", False, "--eval_only")
        draft.assign("phases.evaluate", True, "--eval_only")


def _set_data(draft: JobDraft) -> None:
    for key, path in (("dataset.train_path", "dataset.train"), ("dataset.eval_path", "dataset.validation")):
        if key in draft.given_options:
            data_path = str(draft.get(key))
            assign_source(
                draft,
                key,
                path,
                always_local=is_local(data_path)
                or "/" not in data_path
                or data_path.split("/")[0] in ("data", "datasets"),
            )
    if draft.get("dataset.format") == "custom" and "dataset.preprocessing.custom_prompt_template" not in draft.given_options:
        draft.add_mistake(
            "dataset.format",
            "the format custom needs a template, but no template is given",
            "write dataset.preprocessing.custom_prompt_template",
            explained_path="dataset.template",
        )


def _report_remote_code(draft: JobDraft) -> None:
    given_option = draft.given_options.get("model.trust_remote_code")
    if given_option is None:
        draft.add_note(
            "model.trust_remote_code is not set and becomes false, although the tool runs code from the model's repository by default; "
            "set the option to true if the model needs this code"
        )
    elif given_option.value:
        draft.add_warning(f"{given_option.origin.location}: {given_option.key}: the pod will run code from the model's repository")


KEY_4BIT, KEY_8BIT, KEY_BITS, KEY_METHOD = (
    "model.load_in_4bit",
    "model.load_in_8bit",
    "fine_tuning.quantization.bits",
    "fine_tuning.method",
)


def _set_method(draft: JobDraft) -> None:
    method = draft.get(KEY_METHOD, "qlora")
    bits = _resolve_bits(draft, method)
    if KEY_METHOD in draft.paths_of_invalid_keys:
        return
    if method == "lora" and bits == 4:
        draft.add_note("method lora with a 4-bit base model is QLoRA and is imported as qlora")
        method = "qlora"
    if KEY_METHOD in draft.given_options:
        draft.assign("method.type", method, KEY_METHOD)
    else:
        draft.assign_default("method.type", method)
    if method == "spectrum":
        draft.add_note(
            "spectrum ranks modules by the published metric (marchenkoPastur); for the metric of the tool, set `method.spectrum.metric: meanOverStd`"
        )
        if bits == 4:
            draft.add_warning(
                "spectrum with a 4-bit base model: frozen layers stay in 4 bits, the selected layers are loaded in 16 bits"
            )
    if method == "full" and bits:
        keys = tuple(key for key in (KEY_METHOD, KEY_4BIT, KEY_8BIT, KEY_BITS) if key in draft.given_options)
        draft.add_mistake(
            keys,
            f"method full trains all weights, but weights in {bits} bits cannot be trained",
            "remove the quantization, or write method: qlora",
            explained_path="model.quantization",
        )
    elif bits:
        source_key = next(
            (key for key in (KEY_4BIT, KEY_8BIT) if draft.get(key)), KEY_BITS if KEY_BITS in draft.given_options else KEY_METHOD
        )
        if source_key in draft.given_options:
            draft.assign("model.quantization.bits", bits, source_key)
        else:
            draft.assign_default("model.quantization.bits", bits)


def _resolve_bits(draft: JobDraft, method: str) -> int | None:
    """Return the number of bits in which the base model is loaded: 4, 8, or None for no quantisation.

    Four options can set this number. Record a mistake for options that contradict each other.
    """
    loads_in_4bit, loads_in_8bit, bits = draft.get(KEY_4BIT), draft.get(KEY_8BIT), draft.get(KEY_BITS)
    if bits is not None and bits not in (4, 8):
        draft.add_mistake(KEY_BITS, f"{bits} is not supported", "write 4 or 8")
        return None
    if loads_in_4bit and loads_in_8bit:
        draft.add_mistake(
            (KEY_4BIT, KEY_8BIT),
            "4-bit and 8-bit loading exclude each other, but both are true",
            "set one of them to false",
            explained_path="model.quantization",
        )
        return None
    if method == "qlora":
        for key, contradicts in ((KEY_4BIT, loads_in_4bit is False), (KEY_8BIT, bool(loads_in_8bit)), (KEY_BITS, bits == 8)):
            if contradicts:
                value = str(draft.get(key)).lower()
                draft.add_mistake(
                    (KEY_METHOD, key),
                    f"method qlora needs 4-bit, but {key} is {value}",
                    "set load_in_4bit: true, or write method: lora",
                    explained_path="model.quantization",
                )
        return 4
    loaded_bits = 4 if loads_in_4bit else 8 if loads_in_8bit else None
    if loaded_bits and bits and loaded_bits != bits:
        draft.add_mistake(
            (KEY_4BIT if loads_in_4bit else KEY_8BIT, KEY_BITS),
            f"{loaded_bits} bits and {bits} bits are given for the same base model",
            "make them equal",
            explained_path="model.quantization",
        )
    if (
        loaded_bits is None
        and bits is not None
        and (loads_in_4bit is False or loads_in_8bit is False)
        and not (draft.has_key(KEY_4BIT) and loads_in_4bit is None)
    ):
        given_option = draft.given_options[KEY_BITS]
        draft.add_warning(
            f"{given_option.origin.location}: {given_option.key} has no effect: the base model is not loaded in {bits} bits"
        )
        return None
    return loaded_bits or bits


def _set_distributed(draft: JobDraft) -> None:
    deepspeed_key, fsdp_key = "distributed.use_deepspeed", "distributed.use_fsdp"
    _set_accumulation(draft)
    if draft.get(deepspeed_key) and draft.get(fsdp_key):
        draft.add_mistake(
            (deepspeed_key, fsdp_key),
            "both keys are true, but a job has only one strategy",
            "set one of them to false",
            explained_path="distributed",
        )
        return
    stage = draft.get("distributed.zero_stage")
    if draft.get(deepspeed_key):
        _set_deepspeed(draft, deepspeed_key, stage)
    elif draft.get(fsdp_key):
        draft.assign("distributed.strategy", "fsdp", fsdp_key)
        assume_two_gpus(draft, "FSDP")
    elif deepspeed_key in draft.given_options or fsdp_key in draft.given_options:
        draft.assign("distributed.strategy", "none", deepspeed_key if deepspeed_key in draft.given_options else fsdp_key)
    if not draft.get(deepspeed_key) and "distributed.zero_stage" in draft.given_options:
        given_option = draft.given_options["distributed.zero_stage"]
        draft.warn_no_effect(given_option.option_row.key, "DeepSpeed is not used")
    _set_fsdp_config(draft)


def assume_two_gpus(draft: JobDraft, strategy: str) -> None:
    """If nothing sets the number of ranks, set two GPUs per node, because `strategy` needs several ranks.

    Files of other tools do not contain the number of GPUs, because their launcher sets it.
    """
    if not any(
        draft.has_value(path) for path in ("resources.gpusPerNode", "resources.nodes", "resources.processesPerNode")
    ):
        draft.assign_default(
            "resources.gpusPerNode",
            2,
            f"chosen by the importer: {strategy} needs several ranks, and the file does not set the number of GPUs",
        )
        draft.add_warning(
            f"{strategy} needs several ranks, but the file sets no number of GPUs: the job gets 2 per node; to change this, give --gpus N (and --nodes N)"
        )


def _set_deepspeed(draft: JobDraft, option_key: str, stage: int | None) -> None:
    if stage == 0:
        draft.assign("distributed.strategy", "ddp", "distributed.zero_stage")
        draft.add_note("zero_stage 0 shards nothing and is imported as DDP")
        return
    draft.assign("distributed.strategy", "deepspeed", option_key)
    if stage is not None:
        draft.assign("distributed.deepspeed.zeroStage", stage, "distributed.zero_stage")
    document = next((document for document in draft.documents if is_deepspeed(document)), None) or _find_deepspeed_file(draft)
    if document is not None:
        read_deepspeed(draft, document)
    else:
        assign_config_map(
            draft, "distributed.deepspeed_config", "distributed.deepspeed.configRef", "deepspeed", "--deepspeed"
        )
    if "distributed.zero_stage" not in draft.paths_of_invalid_keys:
        draft.assign_default("distributed.deepspeed.zeroStage", 2, EXAMPLE_ORIGIN)


def _find_deepspeed_file(draft: JobDraft) -> InputDocument | None:
    """Return the DeepSpeed JSON file at the relative path in the configuration, or None if there is no such file."""
    config_path = draft.get("distributed.deepspeed_config")
    if not config_path or any(
        override.startswith("distributed.deepspeed.configRef") for override in draft.request.overrides
    ):
        return None
    for folder in [document.path.parent for document in draft.documents]:
        path = folder / str(config_path)
        if path.is_file():
            document = InputDocument(path, read_text(path))
            return document if is_deepspeed(document) else None
    return None


def _set_accumulation(draft: JobDraft) -> None:
    training_key, distributed_key = "training.gradient_accumulation_steps", "distributed.gradient_accumulation_steps"
    if distributed_key not in draft.given_options:
        return
    if training_key in draft.given_options and draft.get(training_key) != draft.get(distributed_key):
        draft.add_mistake(
            (training_key, distributed_key),
            f"{draft.get(training_key)} and {draft.get(distributed_key)} are given for the same option",
            "make the values equal, or remove one of them",
        )
    elif training_key not in draft.given_options:
        draft.assign("training.gradientAccumulationSteps", draft.get(distributed_key), distributed_key)


def _set_fsdp_config(draft: JobDraft) -> None:
    given_option = draft.given_options.get("distributed.fsdp_config")
    if given_option is None:
        return
    if isinstance(given_option.value, str) and draft.get("distributed.use_fsdp"):
        assign_config_map(
            draft, "distributed.fsdp_config", "distributed.fsdp.configRef", "fsdp", "--set distributed.fsdp.configRef="
        )
    else:
        draft.warn_no_effect(given_option.option_row.key, "the trainer chooses the layers to wrap")


def _set_evaluation(draft: JobDraft) -> None:
    do_eval_key, strategy_key, steps_key = "evaluation.do_eval", "evaluation.eval_strategy", "evaluation.eval_steps"
    has_validation = draft.has_value("dataset.validation")
    is_disabled = draft.get(do_eval_key) is False or draft.get(strategy_key) == "no"
    if is_disabled:
        draft.assign("evaluation.strategy", "no", do_eval_key if draft.get(do_eval_key) is False else strategy_key)
    elif draft.get(do_eval_key) and not has_validation and "dataset.eval_path" not in draft.paths_of_invalid_keys:
        draft.add_mistake(
            do_eval_key,
            "evaluation is on, but dataset.eval_path is missing",
            "add dataset.eval_path, give --validation URI, or set do_eval: false",
            explained_path="evaluation",
        )
    elif has_validation:
        if strategy_key in draft.given_options:
            draft.assign("evaluation.strategy", draft.get(strategy_key), strategy_key)
        draft.assign_default("evaluation.strategy", "steps", EXAMPLE_ORIGIN)
        draft.assign_default("evaluation.metrics", ["perplexity", "bleu", "rouge"], "hard-coded in the tool")
    elif strategy_key in draft.given_options:
        draft.assign("evaluation.strategy", draft.get(strategy_key), strategy_key)
    _set_eval_steps(draft, steps_key, has_validation and not is_disabled)
    if "evaluation.benchmarks" in draft.given_options and not is_disabled:
        draft.assign(
            "evaluation.benchmarks",
            [_build_benchmark(name, draft.request.benchmarks) for name in draft.get("evaluation.benchmarks")],
            "evaluation.benchmarks",
        )
    elif "evaluation.benchmarks" in draft.given_options:
        given_option = draft.given_options["evaluation.benchmarks"]
        draft.warn_no_effect(given_option.option_row.key, "evaluation is off")


def _build_benchmark(name: str, folder: str | None) -> dict[str, Any]:
    """Return the entry of `evaluation.benchmarks` for a benchmark of the tool. `folder`: the value of the option `--benchmarks`, or None."""
    kind = BENCHMARK_KINDS[name]
    tasks = {"tasks": replace_old_task_names(TOOL_TASKS)} if kind is BenchmarkKind.HARNESS else {}
    return {"name": name} | tasks | ({} if folder is None or kind is BenchmarkKind.RATING_SHEETS else {"folder": folder})


def _set_eval_steps(draft: JobDraft, steps_key: str, is_enabled: bool) -> None:
    """Set the evaluation interval from the section `evaluation`. If this section has no interval, set it from the section `output`."""
    output_key = "output.eval_steps"
    if steps_key in draft.given_options and output_key in draft.given_options and draft.get(steps_key) != draft.get(output_key):
        given_option = draft.given_options[output_key]
        draft.add_warning(
            f"{given_option.origin.location}: {given_option.key} has no effect: evaluation.eval_steps ({draft.get(steps_key)}) overrides it"
        )
    key = steps_key if steps_key in draft.given_options else output_key if output_key in draft.given_options else None
    if key and is_enabled:
        draft.assign("evaluation.steps", draft.get(key), key)
    elif key:
        given_option = draft.given_options[key]
        draft.warn_no_effect(given_option.option_row.key, "there is no evaluation during training")
    elif is_enabled:
        draft.assign_default("evaluation.steps", 200, EXAMPLE_ORIGIN)


IMPORTER = Importer("yaml", "this YAML tool", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options)
