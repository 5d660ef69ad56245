"""`yaml`: a nested YAML file with seven sections, dotted overrides on the command line, and a DeepSpeed JSON beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_cli.files import read_text
from finetune_cli.importers.commands import NEGATIVE, after_launcher, config_document, flag_entry
from finetune_cli.importers.companions import SHARDING, STATE, is_deepspeed, read_deepspeed
from finetune_cli.importers.convert import (
    Convert,
    Unfit,
    anything,
    boolean,
    choice,
    each,
    integer,
    integers,
    modules,
    number,
    one_of,
)
from finetune_cli.importers.material import Document, Draft, Entry, Fill, Importer, Mistake, Origin, Row
from finetune_cli.importers.paths import config_map_reference, is_local, output_folder, place_source, place_tokenizer
from finetune_cli.importers.toml import BIAS, PROJECTIONS, SCHEDULERS
from finetune_cli.importers.yaml_tree import entries, parse, parse_value, sniff

LATER = "it belongs to a later revision of that tool and has no counterpart"
BENCHMARKS = ["lm-evaluation-harness", "domain-specific-eval", "human-eval", "openai-humaneval"]
UNUSED = (
    "model.hybrid_lora_adapter", "fine_tuning.lora.dynamic_rank", "fine_tuning.quantization.bnb_8bit_compute_dtype",
    "fine_tuning.quantization.calibration", "fine_tuning.efficiency_transformer.adaptive_layer_selection",
    "fine_tuning.efficiency_transformer.cross_layer_parameter_sharing", "fine_tuning.efficiency_transformer.importance_score_method",
    "fine_tuning.efficiency_transformer.low_resource_mode", "fine_tuning.efficiency_transformer.target_speedup", "pruning.method",
    "pruning.initial_sparsity", "pruning.final_sparsity", "pruning.pruning_start", "pruning.pruning_end", "pruning.pruning_interval",
    "pruning.importance_metric", "pruning.quantization_aware", "evaluation.custom_benchmarks", "evaluation.baseline_comparison",
    "evaluation.baseline_results_path", "evaluation.resource_metrics", "evaluation.performance_thresholds",
)  # fmt: skip


def on_off(value: Any) -> str:
    """A switch for recomputing activations."""
    return "enabled" if boolean(value) else "disabled"


def off_only(what: str) -> Convert:
    """A switch that can only be off, since what it switches on is not offered."""

    def convert(value: Any) -> bool:
        if boolean(value):
            raise Unfit(f"asks for {what}, which is not offered", "false")
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
    Row("fine_tuning.lora.target_modules", "method.lora.targetModules", modules),
    Row("fine_tuning.lora.bias", "method.lora.bias", choice(BIAS)),
    Row("fine_tuning.lora.task_type", "method.lora.taskType", choice({"CAUSAL_LM": "causalLM"})),
    Row("fine_tuning.spectrum.snr_threshold", "method.spectrum.snrThreshold", number(0, 1)),
    Row("fine_tuning.spectrum.layers_to_finetune", "method.spectrum.layers", one_of(integers, choice({"auto": None}))),
    Row("fine_tuning.quantization.bits", "model.quantization.bits", one_of(choice({"4": 4, "8": 8}), integer(4, 8)), manual=True),
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
    Row("training.gradient_checkpointing", "training.gradientCheckpointing", on_off),
    Row("training.mixed_precision", "training.mixedPrecision", choice(["no", "fp16", "bf16"])),
    Row("training.gradient_based_pruning", convert=off_only("pruning")),
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
    Row("distributed.fsdp_config", "distributed.fsdp.configRef", convert=anything, manual=True),
    Row("distributed.fsdp_sharding_strategy", "distributed.fsdp.sharding", choice(SHARDING)),
    Row("distributed.fsdp_checkpoint_strategy", "distributed.fsdp.stateDict", choice(STATE)),
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
    Row("evaluation.benchmarks", "evaluation.benchmarks", each(choice(BENCHMARKS)), manual=True),
    Row("pruning.enabled", convert=off_only("pruning")),
    *(Row(key, convert=anything, inert=LATER) for key in UNUSED),
    Row("--eval_only", "phases.train", boolean, manual=True),
)  # fmt: skip


EXAMPLE = "page example"
PROFILE: tuple[Fill, ...] = (
    Fill("model.trustRemoteCode", False, "our choice: that tool runs code from the model unasked"),
    Fill("model.dtype", "bfloat16", "fixed in its code", gpu=True),
    Fill("model.attention", "flashAttention2", "page default", gpu=True),
    Fill("model.ligerKernels", False, "page default"),
    Fill("method.lora.rank", 16, EXAMPLE),
    Fill("method.lora.alpha", 32, EXAMPLE),
    Fill("method.lora.dropout", 0.05, EXAMPLE),
    Fill("method.lora.targetModules", PROJECTIONS, EXAMPLE, lambda d: "fine_tuning.lora.target_modules" not in d.given),
    Fill("method.lora.bias", "none", EXAMPLE),
    Fill("method.spectrum.snrThreshold", 0.5, EXAMPLE),
    Fill("method.spectrum.metric", "marchenkoPastur", "our choice: that tool's own ranking does not rank"),
    Fill("training.epochs", 3, EXAMPLE),
    Fill("training.batchSizePerDevice", 1, EXAMPLE),
    Fill("training.gradientAccumulationSteps", 16, EXAMPLE),
    Fill("training.learningRate", 2e-4, EXAMPLE),
    Fill("training.scheduler", "cosine", EXAMPLE),
    Fill("training.warmupRatio", 0.03, EXAMPLE, lambda d: not d.has("training.warmupSteps")),
    Fill("training.maxGradNorm", 0.3, EXAMPLE),
    Fill("training.optimizer", "paged_adamw_8bit", EXAMPLE, gpu=True),
    Fill("training.weightDecay", 0.001, EXAMPLE),
    Fill("training.gradientCheckpointing", "enabled", EXAMPLE),
    Fill("training.mixedPrecision", "bf16", EXAMPLE, gpu=True),
    Fill("dataset.maxSequenceLength", 4096, EXAMPLE),
    Fill("dataset.format", "alpaca", EXAMPLE),
    Fill("dataset.addEosToken", True, EXAMPLE),
    Fill("dataset.addBosToken", False, EXAMPLE),
    Fill("dataset.useChatTemplate", True, EXAMPLE),
    Fill("dataset.responseOnly.enabled", False, "fixed in its code"),
    Fill("checkpoint.strategy", "steps", "fixed in its code"),
    Fill("checkpoint.steps", 500, EXAMPLE),
    Fill("checkpoint.keep", 5, EXAMPLE),
    Fill("output.dir", "models/runs", EXAMPLE),
    Fill("output.layout", "flat", "fixed in its code"),
    Fill("tracking.reportTo", ["tensorboard"], "fixed in its code"),
    Fill("tracking.loggingSteps", 10, EXAMPLE),
)  # fmt: skip


# --- reading --------------------------------------------------------------------------------------------------------

OPAQUE = frozenset(
    {
        "evaluation.performance_thresholds",
        "distributed.fsdp_config",
        "fine_tuning.quantization.calibration",
        "evaluation.resource_metrics",
    }
)
FLAG_MARKS = ("--model.", "--fine_tuning.", "--training.", "--dataset.", "--distributed.", "--output.", "--evaluation.")


def recognise(documents: tuple[Document, ...], words: tuple[str, ...]) -> bool:
    """A mapping with `model.base_model` or a section `fine_tuning`."""
    if not documents:
        return any(word.startswith(FLAG_MARKS) for word in words)
    for document in documents:
        found = sniff(document)
        model = found.get("model")
        if "fine_tuning" in found or (isinstance(model, dict) and "base_model" in model):
            return True
    return False


def read(draft: Draft) -> Iterator[Entry]:
    """Files in order, then the overrides; a DeepSpeed JSON waits for `combine`."""
    overrides = list(_overrides(draft))
    for document in draft.documents:
        if not is_deepspeed(document):
            yield from entries(document, parse(document), OPAQUE)
    yield from overrides


def _overrides(draft: Draft) -> Iterator[Entry]:
    rest = after_launcher(draft.request.words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            draft.mistakes.append(Mistake("command line", word, "it belongs to no option", "write --section.key value"))
        elif name == "--eval_only" and not equals:
            yield flag_entry(name, True)
        elif not equals and (not rest or (rest[0].startswith("-") and not NEGATIVE.match(rest[0]))):
            draft.mistakes.append(Mistake("command line", name, "it has no value", f"write {name} VALUE"))
        else:
            text = value if equals else rest.pop(0)
            if name == "--config":
                config_document(draft, text)
            elif name == "--deepspeed":
                yield Entry("distributed.deepspeed_config", text, Origin(f"command line {name}"))
            else:
                yield Entry(name.removeprefix("--"), parse_value(text), Origin(f"command line {name}"))


# --- options that belong together -----------------------------------------------------------------------------------


def combine(draft: Draft) -> None:
    """What one option of that tool means depends on others."""
    place_source(draft, "model.base_model", "model.source")
    place_tokenizer(draft, "model.tokenizer", "model.base_model")
    _data(draft)
    _method(draft)
    if "model.use_flash_attention" in draft.given:
        draft.put(
            "model.attention",
            "flashAttention2" if draft.get("model.use_flash_attention") else "sdpa",
            "model.use_flash_attention",
        )
    _remote_code(draft)
    _distributed(draft)
    _evaluation(draft)
    if "output.output_dir" in draft.given:
        output_folder(draft, "output.output_dir")
    if draft.get("--eval_only"):
        draft.put("phases.train", False, "--eval_only")
        draft.put("phases.evaluate", True, "--eval_only")


def _data(draft: Draft) -> None:
    for key, path in (("dataset.train_path", "dataset.train"), ("dataset.eval_path", "dataset.validation")):
        if key in draft.given:
            found = str(draft.get(key))
            place_source(
                draft,
                key,
                path,
                always_local=is_local(found) or "/" not in found or found.split("/")[0] in ("data", "datasets"),
            )
    if draft.get("dataset.format") == "custom" and "dataset.preprocessing.custom_prompt_template" not in draft.given:
        draft.refuse(
            "dataset.format",
            "custom rows need a template, and none is given",
            "write dataset.preprocessing.custom_prompt_template",
            settles="dataset.template",
        )


def _remote_code(draft: Draft) -> None:
    given = draft.given.get("model.trust_remote_code")
    if given is None:
        draft.note(
            "model.trust_remote_code is not set, and stays false: that tool's default runs code from the model's repository; "
            "set it to true if the model needs it"
        )
    elif given.value:
        draft.warn(f"{given.origin.place}: {given.key}: code from the model's repository will run in the pod")


FOUR, EIGHT, BITS, METHOD = (
    "model.load_in_4bit",
    "model.load_in_8bit",
    "fine_tuning.quantization.bits",
    "fine_tuning.method",
)


def _method(draft: Draft) -> None:
    method = draft.get(METHOD, "qlora")
    bits = _bits(draft, method)
    if METHOD in draft.broken:
        return
    if method == "lora" and bits == 4:
        draft.note("method lora on a 4-bit base is QLoRA, and imported as such")
        method = "qlora"
    if METHOD in draft.given:
        draft.put("method.type", method, METHOD)
    else:
        draft.fill("method.type", method)
    if method == "spectrum":
        draft.note(
            "spectrum ranks modules as published (marchenkoPastur); that tool's own ranking is `method.spectrum.metric: meanOverStd`"
        )
        if bits == 4:
            draft.warn(
                "spectrum with a 4-bit base: frozen layers stay in 4 bit, the selected ones are loaded in 16 bit"
            )
    if method == "full" and bits:
        keys = tuple(key for key in (METHOD, FOUR, EIGHT, BITS) if key in draft.given)
        draft.refuse(
            keys,
            f"method full trains all weights, and weights in {bits} bit cannot be trained",
            "do not quantise, or write method: qlora",
            settles="model.quantization",
        )
    elif bits:
        source = next((key for key in (FOUR, EIGHT) if draft.get(key)), BITS if BITS in draft.given else METHOD)
        if source in draft.given:
            draft.put("model.quantization.bits", bits, source)
        else:
            draft.fill("model.quantization.bits", bits)


def _bits(draft: Draft, method: str) -> int | None:
    """Bits of the base from four options, refusing what contradicts."""
    four, eight, bits = draft.get(FOUR), draft.get(EIGHT), draft.get(BITS)
    if bits is not None and bits not in (4, 8):
        draft.refuse(BITS, f"{bits} is not offered", "allowed: 4 or 8")
        return None
    if four and eight:
        draft.refuse(
            (FOUR, EIGHT),
            "4-bit and 8-bit are both true, and a base is loaded in one of them",
            "set one of them to false",
            settles="model.quantization",
        )
        return None
    if method == "qlora":
        for key, wrong in ((FOUR, four is False), (EIGHT, bool(eight)), (BITS, bits == 8)):
            if wrong:
                shown = str(draft.get(key)).lower()
                draft.refuse(
                    (METHOD, key),
                    f"method qlora needs 4-bit, but {key} is {shown}",
                    "set load_in_4bit: true, or write method: lora",
                    settles="model.quantization",
                )
        return 4
    loaded = 4 if four else 8 if eight else None
    if loaded and bits and loaded != bits:
        draft.refuse(
            (FOUR if four else EIGHT, BITS),
            f"{loaded} bit and {bits} bit are given for one base",
            "make them equal",
            settles="model.quantization",
        )
    if (
        loaded is None
        and bits is not None
        and (four is False or eight is False)
        and not (draft.wrote(FOUR) and four is None)
    ):
        given = draft.given[BITS]
        draft.warn(f"{given.origin.place}: {given.key} has no effect: the base is not loaded in {bits} bit")
        return None
    return loaded or bits


def _distributed(draft: Draft) -> None:
    deepspeed, fsdp = "distributed.use_deepspeed", "distributed.use_fsdp"
    _accumulation(draft)
    if draft.get(deepspeed) and draft.get(fsdp):
        draft.refuse(
            (deepspeed, fsdp),
            "both are true, and one strategy is needed",
            "set one of them to false",
            settles="distributed",
        )
        return
    stage = draft.get("distributed.zero_stage")
    if draft.get(deepspeed):
        _deepspeed(draft, deepspeed, stage)
    elif draft.get(fsdp):
        draft.put("distributed.strategy", "fsdp", fsdp)
        assume_ranks(draft, "FSDP")
    elif deepspeed in draft.given or fsdp in draft.given:
        draft.put("distributed.strategy", "none", deepspeed if deepspeed in draft.given else fsdp)
    if not draft.get(deepspeed) and "distributed.zero_stage" in draft.given:
        given = draft.given["distributed.zero_stage"]
        draft.warn(f"{given.origin.place}: {given.key} has no effect: DeepSpeed is not used")
    _fsdp_file(draft)


def assume_ranks(draft: Draft, strategy: str) -> None:
    """FSDP needs several ranks; files of other tools leave their number to the launcher."""
    if not any(draft.has(path) for path in ("resources.gpusPerNode", "resources.nodes", "resources.processesPerNode")):
        draft.fill(
            "resources.gpusPerNode", 2, f"our choice: {strategy} needs several ranks, and the file names no number"
        )
        draft.warn(
            f"{strategy} needs several ranks, and no number is given: 2 GPUs a node are written; say how many with --gpus N (and --nodes N)"
        )


def _deepspeed(draft: Draft, key: str, stage: int | None) -> None:
    if stage == 0:
        draft.put("distributed.strategy", "ddp", "distributed.zero_stage")
        draft.note("zero_stage 0 shards nothing: it is plain DDP")
        return
    draft.put("distributed.strategy", "deepspeed", key)
    if stage is not None:
        draft.put("distributed.deepspeed.zeroStage", stage, "distributed.zero_stage")
    document = next((d for d in draft.documents if is_deepspeed(d)), None) or _beside(draft)
    if document is not None:
        read_deepspeed(draft, document)
    else:
        config_map_reference(
            draft, "distributed.deepspeed_config", "distributed.deepspeed.configRef", "deepspeed", "--deepspeed"
        )
    if "distributed.zero_stage" not in draft.broken:
        draft.fill("distributed.deepspeed.zeroStage", 2, EXAMPLE)


def _beside(draft: Draft) -> Document | None:
    """The DeepSpeed file that the configuration names, if it lies where the tool would look for it."""
    named = draft.get("distributed.deepspeed_config")
    if not named or any(own.startswith("distributed.deepspeed.configRef") for own in draft.request.own):
        return None
    for folder in [d.path.parent for d in draft.documents]:
        path = folder / str(named)
        if path.is_file():
            document = Document(path, read_text(path))
            return document if is_deepspeed(document) else None
    return None


def _accumulation(draft: Draft) -> None:
    first, second = "training.gradient_accumulation_steps", "distributed.gradient_accumulation_steps"
    if second not in draft.given:
        return
    if first in draft.given and draft.get(first) != draft.get(second):
        draft.refuse(
            (first, second),
            f"{draft.get(first)} and {draft.get(second)} are given for one thing",
            "make them equal, or remove one",
        )
    elif first not in draft.given:
        draft.put("training.gradientAccumulationSteps", draft.get(second), second)


def _fsdp_file(draft: Draft) -> None:
    given = draft.given.get("distributed.fsdp_config")
    if given is None:
        return
    if isinstance(given.value, str) and draft.get("distributed.use_fsdp"):
        config_map_reference(
            draft, "distributed.fsdp_config", "distributed.fsdp.configRef", "fsdp", "--set distributed.fsdp.configRef="
        )
    else:
        draft.warn(f"{given.origin.place}: {given.key} has no effect: the trainer wraps layers by itself")


def _evaluation(draft: Draft) -> None:
    do_eval, strategy, steps = "evaluation.do_eval", "evaluation.eval_strategy", "evaluation.eval_steps"
    there = draft.has("dataset.validation")
    off = draft.get(do_eval) is False or draft.get(strategy) == "no"
    if off:
        draft.put("evaluation.strategy", "no", do_eval if draft.get(do_eval) is False else strategy)
    elif draft.get(do_eval) and not there and "dataset.eval_path" not in draft.broken:
        draft.refuse(
            do_eval,
            "it is true, but dataset.eval_path is missing",
            "add dataset.eval_path, give --validation URI, or set do_eval: false",
            settles="evaluation",
        )
    elif there:
        if strategy in draft.given:
            draft.put("evaluation.strategy", draft.get(strategy), strategy)
        draft.fill("evaluation.strategy", "steps", EXAMPLE)
        draft.fill("evaluation.metrics", ["perplexity", "bleu", "rouge"], "fixed in its code")
    elif strategy in draft.given:
        draft.put("evaluation.strategy", draft.get(strategy), strategy)
    _eval_steps(draft, steps, there and not off)
    if "evaluation.benchmarks" in draft.given and not off:
        draft.put(
            "evaluation.benchmarks",
            [{"name": name} for name in draft.get("evaluation.benchmarks")],
            "evaluation.benchmarks",
        )
    elif "evaluation.benchmarks" in draft.given:
        given = draft.given["evaluation.benchmarks"]
        draft.warn(f"{given.origin.place}: {given.key} has no effect: evaluation is off")


def _eval_steps(draft: Draft, steps: str, on: bool) -> None:
    """The evaluation section's period wins over the output section's."""
    other = "output.eval_steps"
    if steps in draft.given and other in draft.given and draft.get(steps) != draft.get(other):
        given = draft.given[other]
        draft.warn(f"{given.origin.place}: {given.key} has no effect: evaluation.eval_steps ({draft.get(steps)}) wins")
    key = steps if steps in draft.given else other if other in draft.given else None
    if key and on:
        draft.put("evaluation.steps", draft.get(key), key)
    elif key:
        given = draft.given[key]
        draft.warn(f"{given.origin.place}: {given.key} has no effect: nothing is evaluated during training")
    elif on:
        draft.fill("evaluation.steps", 200, EXAMPLE)


IMPORTER = Importer("yaml", "this YAML tool", ROWS, PROFILE, recognise, read, combine)
