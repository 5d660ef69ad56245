"""`yaml`: the importer for a YAML file with seven sections, dotted overrides (`--training.epochs 2`) and an optional DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_cli.files import read_text
from finetune_cli.importers.accelerate import SHARDING, STATE_DICTS
from finetune_cli.importers.command_lines import NEGATIVE, add_config_file, flag_entry, strip_launcher
from finetune_cli.importers.converters import (
    ConversionError,
    Convert,
    any_value,
    boolean,
    choice,
    first_match,
    integer,
    layer_numbers,
    list_of,
    module_names,
    number,
)
from finetune_cli.importers.deepspeed import is_deepspeed, read_deepspeed
from finetune_cli.importers.documents import entries, parse, peek
from finetune_cli.importers.draft import Document, Draft, Entry, Importer, Row, ToolDefault
from finetune_cli.importers.sources import (
    assign_config_map,
    assign_output_folder,
    assign_source,
    assign_tokenizer,
    is_local,
)
from finetune_cli.importers.toml import BIAS, PROJECTIONS, SCHEDULERS
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import Origin
from finetune_cli.yaml_reader import parse_value

OF_LATER_REVISION = "a later revision of the tool added this option; a FineTuneJob has no such field"
BENCHMARKS = ["lm-evaluation-harness", "domain-specific-eval", "human-eval", "openai-humaneval"]
UNUSED_KEYS = (
    "model.hybrid_lora_adapter", "fine_tuning.lora.dynamic_rank", "fine_tuning.quantization.bnb_8bit_compute_dtype",
    "fine_tuning.quantization.calibration", "fine_tuning.efficiency_transformer.adaptive_layer_selection",
    "fine_tuning.efficiency_transformer.cross_layer_parameter_sharing", "fine_tuning.efficiency_transformer.importance_score_method",
    "fine_tuning.efficiency_transformer.low_resource_mode", "fine_tuning.efficiency_transformer.target_speedup", "pruning.method",
    "pruning.initial_sparsity", "pruning.final_sparsity", "pruning.pruning_start", "pruning.pruning_end", "pruning.pruning_interval",
    "pruning.importance_metric", "pruning.quantization_aware", "evaluation.custom_benchmarks", "evaluation.baseline_comparison",
    "evaluation.baseline_results_path", "evaluation.resource_metrics", "evaluation.performance_thresholds",
)  # fmt: skip


def enabled_or_disabled(value: Any) -> str:
    """Convert a boolean to `enabled` or `disabled`."""
    return "enabled" if boolean(value) else "disabled"


def must_be_false(feature: str) -> Convert:
    """Return a converter for a boolean that must be false, because the feature is not supported."""

    def convert(value: Any) -> bool:
        if boolean(value):
            raise ConversionError(f"enables {feature}, which is not supported", "false")
        return False

    return convert


ROWS: tuple[Row, ...] = (
    Row("model.base_model", "model.source", required=True, manual=True),
    Row("model.tokenizer", "model.tokenizer", manual=True),
    Row("model.load_in_8bit", "model.quantization.bits", boolean, manual=True),
    Row("model.load_in_4bit", "model.quantization.bits", boolean, manual=True),
    Row("model.trust_remote_code", "model.trustRemoteCode", boolean),
    Row("model.use_flash_attention", "model.attention", boolean, manual=True),
    Row("model.use_liger_kernels", "model.ligerKernels", boolean),
    Row("fine_tuning.method", "method.type", choice(["full", "lora", "qlora", "spectrum"]), manual=True),
    Row("fine_tuning.lora.r", "method.lora.rank", integer(1)),
    Row("fine_tuning.lora.alpha", "method.lora.alpha", number(above=0)),
    Row("fine_tuning.lora.dropout", "method.lora.dropout", number(0, below=1)),
    Row("fine_tuning.lora.target_modules", "method.lora.targetModules", module_names),
    Row("fine_tuning.lora.bias", "method.lora.bias", choice(BIAS)),
    Row("fine_tuning.lora.task_type", "method.lora.taskType", choice({"CAUSAL_LM": "causalLM"})),
    Row("fine_tuning.spectrum.snr_threshold", "method.spectrum.snrThreshold", number(0, 1)),
    Row("fine_tuning.spectrum.layers_to_finetune", "method.spectrum.layers", first_match(layer_numbers, choice({"auto": None}))),
    Row("fine_tuning.quantization.bits", "model.quantization.bits", first_match(choice({"4": 4, "8": 8}), integer(4, 8)), manual=True),
    Row("fine_tuning.quantization.bnb_4bit_compute_dtype", "model.quantization.computeDtype", choice(["bfloat16", "float16", "float32"])),
    Row("fine_tuning.quantization.bnb_4bit_quant_type", "model.quantization.type", choice(["nf4", "fp4"])),
    Row("fine_tuning.quantization.bnb_4bit_use_double_quant", "model.quantization.doubleQuant", boolean),
    Row("training.epochs", "training.epochs", integer(1)),
    Row("training.micro_batch_size", "training.batchSizePerDevice", integer(1)),
    Row("training.gradient_accumulation_steps", "training.gradientAccumulationSteps", integer(1)),
    Row("training.learning_rate", "training.learningRate", number(above=0)),
    Row("training.lr_scheduler_type", "training.scheduler", choice(SCHEDULERS)),
    Row("training.warmup_ratio", "training.warmupRatio", number(0, below=1)),
    Row("training.warmup_steps", "training.warmupSteps", integer(0)),
    Row("training.max_grad_norm", "training.maxGradNorm", number(0)),
    Row("training.optimizer", "training.optimizer"),
    Row("training.weight_decay", "training.weightDecay", number(0)),
    Row("training.max_seq_length", "dataset.maxSequenceLength", integer(1)),
    Row("training.gradient_checkpointing", "training.gradientCheckpointing", enabled_or_disabled),
    Row("training.mixed_precision", "training.mixedPrecision", choice(["no", "fp16", "bf16"])),
    Row("training.gradient_based_pruning", convert=must_be_false("pruning")),
    Row("dataset.format", "dataset.format", choice(["alpaca", "sharegpt", "oasst", "custom"])),
    Row("dataset.train_path", "dataset.train", manual=True),
    Row("dataset.eval_path", "dataset.validation", manual=True),
    Row("dataset.preprocessing.add_eos_token", "dataset.addEosToken", boolean),
    Row("dataset.preprocessing.add_bos_token", "dataset.addBosToken", boolean),
    Row("dataset.preprocessing.use_chat_template", "dataset.useChatTemplate", boolean),
    Row("dataset.preprocessing.custom_prompt_template", "dataset.template"),
    Row("distributed.use_deepspeed", "distributed.strategy", boolean, manual=True),
    Row("distributed.deepspeed_config", "distributed.deepspeed.configRef", manual=True),
    Row("distributed.zero_stage", "distributed.deepspeed.zeroStage", integer(0, 3), manual=True),
    Row("distributed.gradient_accumulation_steps", "training.gradientAccumulationSteps", integer(1), manual=True),
    Row("distributed.use_fsdp", "distributed.strategy", boolean, manual=True),
    Row("distributed.fsdp_config", "distributed.fsdp.configRef", convert=any_value, manual=True),
    Row("distributed.fsdp_sharding_strategy", "distributed.fsdp.sharding", choice(SHARDING)),
    Row("distributed.fsdp_checkpoint_strategy", "distributed.fsdp.stateDict", choice(STATE_DICTS)),
    Row("distributed.offload_optimizer", "distributed.deepspeed.offloadOptimizer", boolean),
    Row("distributed.offload_param", "distributed.deepspeed.offloadParameters", boolean),
    Row("output.output_dir", "output.dir", manual=True),
    Row("output.logging_steps", "tracking.loggingSteps", integer(1)),
    Row("output.eval_steps", "evaluation.steps", integer(1), manual=True),
    Row("output.save_steps", "checkpoint.steps", integer(1)),
    Row("output.save_total_limit", "checkpoint.keep", integer(1)),
    Row("output.push_to_hub", "output.hub.push", boolean),
    Row("output.hub_model_id", "output.hub.repository"),
    Row("output.track_resource_usage", "tracking.systemMetrics", boolean),
    Row("evaluation.do_eval", "evaluation.strategy", boolean, manual=True),
    Row("evaluation.eval_batch_size", "evaluation.batchSizePerDevice", integer(1)),
    Row("evaluation.eval_strategy", "evaluation.strategy", choice(["steps", "epoch", "no"]), manual=True),
    Row("evaluation.eval_steps", "evaluation.steps", integer(1), manual=True),
    Row("evaluation.benchmarks", "evaluation.benchmarks", list_of(choice(BENCHMARKS)), manual=True),
    Row("pruning.enabled", convert=must_be_false("pruning")),
    *(Row(key, convert=any_value, no_effect=OF_LATER_REVISION) for key in UNUSED_KEYS),
    Row("--eval_only", "phases.train", boolean, manual=True),
)  # fmt: skip


EXAMPLE = "documented example"
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("model.trustRemoteCode", False, "chosen by the importer: the tool runs code from the model's repository by default"),
    ToolDefault("model.dtype", "bfloat16", "hard-coded in the tool", needs_gpu=True),
    ToolDefault("model.attention", "flashAttention2", "documented default", needs_gpu=True),
    ToolDefault("model.ligerKernels", False, "documented default"),
    ToolDefault("method.lora.rank", 16, EXAMPLE),
    ToolDefault("method.lora.alpha", 32, EXAMPLE),
    ToolDefault("method.lora.dropout", 0.05, EXAMPLE),
    ToolDefault("method.lora.targetModules", PROJECTIONS, EXAMPLE, lambda d: "fine_tuning.lora.target_modules" not in d.given),
    ToolDefault("method.lora.bias", "none", EXAMPLE),
    ToolDefault("method.spectrum.snrThreshold", 0.5, EXAMPLE),
    ToolDefault("method.spectrum.metric", "marchenkoPastur", "chosen by the importer: the published metric, because the tool's metric does not rank modules"),
    ToolDefault("training.epochs", 3, EXAMPLE),
    ToolDefault("training.batchSizePerDevice", 1, EXAMPLE),
    ToolDefault("training.gradientAccumulationSteps", 16, EXAMPLE),
    ToolDefault("training.learningRate", 2e-4, EXAMPLE),
    ToolDefault("training.scheduler", "cosine", EXAMPLE),
    ToolDefault("training.warmupRatio", 0.03, EXAMPLE, lambda d: not d.has_value("training.warmupSteps")),
    ToolDefault("training.maxGradNorm", 0.3, EXAMPLE),
    ToolDefault("training.optimizer", "paged_adamw_8bit", EXAMPLE, needs_gpu=True),
    ToolDefault("training.weightDecay", 0.001, EXAMPLE),
    ToolDefault("training.gradientCheckpointing", "enabled", EXAMPLE),
    ToolDefault("training.mixedPrecision", "bf16", EXAMPLE, needs_gpu=True),
    ToolDefault("dataset.maxSequenceLength", 4096, EXAMPLE),
    ToolDefault("dataset.format", "alpaca", EXAMPLE),
    ToolDefault("dataset.addEosToken", True, EXAMPLE),
    ToolDefault("dataset.addBosToken", False, EXAMPLE),
    ToolDefault("dataset.useChatTemplate", True, EXAMPLE),
    ToolDefault("dataset.responseOnly.enabled", False, "hard-coded in the tool"),
    ToolDefault("checkpoint.strategy", "steps", "hard-coded in the tool"),
    ToolDefault("checkpoint.steps", 500, EXAMPLE),
    ToolDefault("checkpoint.keep", 5, EXAMPLE),
    ToolDefault("output.dir", "models/runs", EXAMPLE),
    ToolDefault("output.layout", "flat", "hard-coded in the tool"),
    ToolDefault("tracking.reportTo", ["tensorboard"], "hard-coded in the tool"),
    ToolDefault("tracking.loggingSteps", 10, EXAMPLE),
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
FLAG_MARKS = ("--model.", "--fine_tuning.", "--training.", "--dataset.", "--distributed.", "--output.", "--evaluation.")


def recognises(documents: tuple[Document, ...], words: tuple[str, ...]) -> bool:
    """Return whether a document has `model.base_model` or a section `fine_tuning`."""
    if not documents:
        return any(word.startswith(FLAG_MARKS) for word in words)
    for document in documents:
        content = peek(document)
        model = content.get("model")
        if "fine_tuning" in content or (isinstance(model, dict) and "base_model" in model):
            return True
    return False


def read(draft: Draft) -> Iterator[Entry]:
    """Yield the options of the files in order, then the overrides. `combine` reads a DeepSpeed JSON."""
    overrides = list(_read_overrides(draft))
    for document in draft.documents:
        if not is_deepspeed(document):
            yield from entries(document, parse(document), OPAQUE_PATHS)
    yield from overrides


def _read_overrides(draft: Draft) -> Iterator[Entry]:
    remaining = strip_launcher(draft.request.tool_arguments)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            draft.mistakes.append(
                Mistake("command line", word, "this word belongs to no option", "write --section.key value")
            )
        elif name == "--eval_only" and not equals:
            yield flag_entry(name, True)
        elif not equals and (not remaining or (remaining[0].startswith("-") and not NEGATIVE.match(remaining[0]))):
            draft.mistakes.append(Mistake("command line", name, "the value is missing", f"write {name} VALUE"))
        else:
            text = value if equals else remaining.pop(0)
            if name == "--config":
                add_config_file(draft, text)
            elif name == "--deepspeed":
                yield Entry("distributed.deepspeed_config", text, Origin(f"command line {name}"))
            else:
                yield Entry(name.removeprefix("--"), parse_value(text), Origin(f"command line {name}"))


# --- fields that depend on several options --------------------------------------------------------------------------


def combine(draft: Draft) -> None:
    """Set the fields whose value depends on several options of the tool."""
    assign_source(draft, "model.base_model", "model.source")
    assign_tokenizer(draft, "model.tokenizer", "model.base_model")
    _set_data(draft)
    _set_method(draft)
    if "model.use_flash_attention" in draft.given:
        draft.assign(
            "model.attention",
            "flashAttention2" if draft.get("model.use_flash_attention") else "sdpa",
            "model.use_flash_attention",
        )
    _report_remote_code(draft)
    _set_distributed(draft)
    _set_evaluation(draft)
    if "output.output_dir" in draft.given:
        assign_output_folder(draft, "output.output_dir")
    if draft.get("--eval_only"):
        draft.assign("phases.train", False, "--eval_only")
        draft.assign("phases.evaluate", True, "--eval_only")


def _set_data(draft: Draft) -> None:
    for key, path in (("dataset.train_path", "dataset.train"), ("dataset.eval_path", "dataset.validation")):
        if key in draft.given:
            data_path = str(draft.get(key))
            assign_source(
                draft,
                key,
                path,
                always_local=is_local(data_path)
                or "/" not in data_path
                or data_path.split("/")[0] in ("data", "datasets"),
            )
    if draft.get("dataset.format") == "custom" and "dataset.preprocessing.custom_prompt_template" not in draft.given:
        draft.add_mistake(
            "dataset.format",
            "the format custom needs a template, but no template is given",
            "write dataset.preprocessing.custom_prompt_template",
            explains="dataset.template",
        )


def _report_remote_code(draft: Draft) -> None:
    given = draft.given.get("model.trust_remote_code")
    if given is None:
        draft.add_note(
            "model.trust_remote_code is not set and becomes false, although the tool runs code from the model's repository by default; "
            "set the option to true if the model needs this code"
        )
    elif given.value:
        draft.add_warning(f"{given.origin.location}: {given.key}: the pod will run code from the model's repository")


KEY_4BIT, KEY_8BIT, KEY_BITS, KEY_METHOD = (
    "model.load_in_4bit",
    "model.load_in_8bit",
    "fine_tuning.quantization.bits",
    "fine_tuning.method",
)


def _set_method(draft: Draft) -> None:
    method = draft.get(KEY_METHOD, "qlora")
    bits = _resolve_bits(draft, method)
    if KEY_METHOD in draft.unreadable:
        return
    if method == "lora" and bits == 4:
        draft.add_note("method lora with a 4-bit base model is QLoRA and is imported as qlora")
        method = "qlora"
    if KEY_METHOD in draft.given:
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
        keys = tuple(key for key in (KEY_METHOD, KEY_4BIT, KEY_8BIT, KEY_BITS) if key in draft.given)
        draft.add_mistake(
            keys,
            f"method full trains all weights, but weights in {bits} bits cannot be trained",
            "remove the quantization, or write method: qlora",
            explains="model.quantization",
        )
    elif bits:
        source = next(
            (key for key in (KEY_4BIT, KEY_8BIT) if draft.get(key)), KEY_BITS if KEY_BITS in draft.given else KEY_METHOD
        )
        if source in draft.given:
            draft.assign("model.quantization.bits", bits, source)
        else:
            draft.assign_default("model.quantization.bits", bits)


def _resolve_bits(draft: Draft, method: str) -> int | None:
    """Return the number of bits of the loaded base model, from four options. Options that contradict each other are mistakes."""
    in_4bit, in_8bit, bits = draft.get(KEY_4BIT), draft.get(KEY_8BIT), draft.get(KEY_BITS)
    if bits is not None and bits not in (4, 8):
        draft.add_mistake(KEY_BITS, f"{bits} is not supported", "write 4 or 8")
        return None
    if in_4bit and in_8bit:
        draft.add_mistake(
            (KEY_4BIT, KEY_8BIT),
            "4-bit and 8-bit loading exclude each other, but both are true",
            "set one of them to false",
            explains="model.quantization",
        )
        return None
    if method == "qlora":
        for key, contradicts in ((KEY_4BIT, in_4bit is False), (KEY_8BIT, bool(in_8bit)), (KEY_BITS, bits == 8)):
            if contradicts:
                value = str(draft.get(key)).lower()
                draft.add_mistake(
                    (KEY_METHOD, key),
                    f"method qlora needs 4-bit, but {key} is {value}",
                    "set load_in_4bit: true, or write method: lora",
                    explains="model.quantization",
                )
        return 4
    loaded = 4 if in_4bit else 8 if in_8bit else None
    if loaded and bits and loaded != bits:
        draft.add_mistake(
            (KEY_4BIT if in_4bit else KEY_8BIT, KEY_BITS),
            f"{loaded} bits and {bits} bits are given for the same base model",
            "make them equal",
            explains="model.quantization",
        )
    if (
        loaded is None
        and bits is not None
        and (in_4bit is False or in_8bit is False)
        and not (draft.has_key(KEY_4BIT) and in_4bit is None)
    ):
        given = draft.given[KEY_BITS]
        draft.add_warning(
            f"{given.origin.location}: {given.key} has no effect: the base model is not loaded in {bits} bits"
        )
        return None
    return loaded or bits


def _set_distributed(draft: Draft) -> None:
    deepspeed, fsdp = "distributed.use_deepspeed", "distributed.use_fsdp"
    _set_accumulation(draft)
    if draft.get(deepspeed) and draft.get(fsdp):
        draft.add_mistake(
            (deepspeed, fsdp),
            "both keys are true, but a job has only one strategy",
            "set one of them to false",
            explains="distributed",
        )
        return
    stage = draft.get("distributed.zero_stage")
    if draft.get(deepspeed):
        _set_deepspeed(draft, deepspeed, stage)
    elif draft.get(fsdp):
        draft.assign("distributed.strategy", "fsdp", fsdp)
        assume_two_gpus(draft, "FSDP")
    elif deepspeed in draft.given or fsdp in draft.given:
        draft.assign("distributed.strategy", "none", deepspeed if deepspeed in draft.given else fsdp)
    if not draft.get(deepspeed) and "distributed.zero_stage" in draft.given:
        given = draft.given["distributed.zero_stage"]
        draft.warn_no_effect(given.row.key, "DeepSpeed is not used")
    _set_fsdp_config(draft)


def assume_two_gpus(draft: Draft, strategy: str) -> None:
    """Set two GPUs per node, because FSDP needs several ranks. The files of other tools do not set the number of GPUs, because a launcher sets it."""
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


def _set_deepspeed(draft: Draft, key: str, stage: int | None) -> None:
    if stage == 0:
        draft.assign("distributed.strategy", "ddp", "distributed.zero_stage")
        draft.add_note("zero_stage 0 does not shard anything and is imported as DDP")
        return
    draft.assign("distributed.strategy", "deepspeed", key)
    if stage is not None:
        draft.assign("distributed.deepspeed.zeroStage", stage, "distributed.zero_stage")
    document = next((d for d in draft.documents if is_deepspeed(d)), None) or _find_deepspeed_file(draft)
    if document is not None:
        read_deepspeed(draft, document)
    else:
        assign_config_map(
            draft, "distributed.deepspeed_config", "distributed.deepspeed.configRef", "deepspeed", "--deepspeed"
        )
    if "distributed.zero_stage" not in draft.unreadable:
        draft.assign_default("distributed.deepspeed.zeroStage", 2, EXAMPLE)


def _find_deepspeed_file(draft: Draft) -> Document | None:
    """Return the DeepSpeed file to which the configuration refers by a relative path, or None if there is no such file."""
    config_path = draft.get("distributed.deepspeed_config")
    if not config_path or any(
        override.startswith("distributed.deepspeed.configRef") for override in draft.request.overrides
    ):
        return None
    for folder in [d.path.parent for d in draft.documents]:
        path = folder / str(config_path)
        if path.is_file():
            document = Document(path, read_text(path))
            return document if is_deepspeed(document) else None
    return None


def _set_accumulation(draft: Draft) -> None:
    first, second = "training.gradient_accumulation_steps", "distributed.gradient_accumulation_steps"
    if second not in draft.given:
        return
    if first in draft.given and draft.get(first) != draft.get(second):
        draft.add_mistake(
            (first, second),
            f"{draft.get(first)} and {draft.get(second)} are given for the same option",
            "make the values equal, or remove one of them",
        )
    elif first not in draft.given:
        draft.assign("training.gradientAccumulationSteps", draft.get(second), second)


def _set_fsdp_config(draft: Draft) -> None:
    given = draft.given.get("distributed.fsdp_config")
    if given is None:
        return
    if isinstance(given.value, str) and draft.get("distributed.use_fsdp"):
        assign_config_map(
            draft, "distributed.fsdp_config", "distributed.fsdp.configRef", "fsdp", "--set distributed.fsdp.configRef="
        )
    else:
        draft.warn_no_effect(given.row.key, "the trainer chooses the layers to wrap")


def _set_evaluation(draft: Draft) -> None:
    do_eval, strategy, steps = "evaluation.do_eval", "evaluation.eval_strategy", "evaluation.eval_steps"
    has_validation = draft.has_value("dataset.validation")
    is_disabled = draft.get(do_eval) is False or draft.get(strategy) == "no"
    if is_disabled:
        draft.assign("evaluation.strategy", "no", do_eval if draft.get(do_eval) is False else strategy)
    elif draft.get(do_eval) and not has_validation and "dataset.eval_path" not in draft.unreadable:
        draft.add_mistake(
            do_eval,
            "evaluation is on, but dataset.eval_path is missing",
            "add dataset.eval_path, give --validation URI, or set do_eval: false",
            explains="evaluation",
        )
    elif has_validation:
        if strategy in draft.given:
            draft.assign("evaluation.strategy", draft.get(strategy), strategy)
        draft.assign_default("evaluation.strategy", "steps", EXAMPLE)
        draft.assign_default("evaluation.metrics", ["perplexity", "bleu", "rouge"], "hard-coded in the tool")
    elif strategy in draft.given:
        draft.assign("evaluation.strategy", draft.get(strategy), strategy)
    _set_eval_steps(draft, steps, has_validation and not is_disabled)
    if "evaluation.benchmarks" in draft.given and not is_disabled:
        draft.assign(
            "evaluation.benchmarks",
            [{"name": name} for name in draft.get("evaluation.benchmarks")],
            "evaluation.benchmarks",
        )
    elif "evaluation.benchmarks" in draft.given:
        given = draft.given["evaluation.benchmarks"]
        draft.warn_no_effect(given.row.key, "evaluation is off")


def _set_eval_steps(draft: Draft, steps: str, is_enabled: bool) -> None:
    """Set the evaluation interval. The evaluation section overrides the output section."""
    other = "output.eval_steps"
    if steps in draft.given and other in draft.given and draft.get(steps) != draft.get(other):
        given = draft.given[other]
        draft.add_warning(
            f"{given.origin.location}: {given.key} has no effect: evaluation.eval_steps ({draft.get(steps)}) overrides it"
        )
    key = steps if steps in draft.given else other if other in draft.given else None
    if key and is_enabled:
        draft.assign("evaluation.steps", draft.get(key), key)
    elif key:
        given = draft.given[key]
        draft.warn_no_effect(given.row.key, "there is no evaluation during training")
    elif is_enabled:
        draft.assign_default("evaluation.steps", 200, EXAMPLE)


IMPORTER = Importer("yaml", "this YAML tool", ROWS, DEFAULTS, recognises, read, combine)
