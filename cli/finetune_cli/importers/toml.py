"""`toml`: one TOML file with sections for training, inference, evaluation and the pipeline, and a tracker.

That tool has no defaults of its own; what a partial file leaves out has the value of its main example, except what would
publish a model (`push_to_hub`) or name a data set, a server or a run of somebody else.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from finetune_cli.hiding import USERINFO
from finetune_cli.importers.commands import after_launcher, config_document, flag_entry, parse_flags, stray_mistakes
from finetune_cli.importers.convert import (
    Unfit,
    any_text,
    anything,
    boolean,
    choice,
    each,
    integer,
    number,
    run_name,
    table,
    text_or_none,
    words,
)
from finetune_cli.importers.material import (
    SECRET_WORD,
    Document,
    Draft,
    Entry,
    Fill,
    Importer,
    Mistake,
    Origin,
    Refused,
    Row,
)
from finetune_cli.importers.paths import output_folder, place_source

SCHEDULERS = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constantWithWarmup", "polynomial": "polynomial",
    "cosine_with_restarts": "cosineWithRestarts", "cosine_with_min_lr": "cosineWithMinLr", "inverse_sqrt": "inverseSqrt",
    "warmup_stable_decay": "warmupStableDecay",
}  # fmt: skip
DTYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32", "auto": "auto"}
BIAS = {"none": "none", "all": "all", "lora_only": "loraOnly"}
TRACKERS = {"wandb": ["wandb"], "tensorboard": ["tensorboard"], "mlflow": ["mlflow"], "none": []}
METRICS = {
    "bleu_score": "bleu", "rouge_score": "rouge", "factual_correctness": "factualCorrectness", "semantic_similarity": "semanticSimilarity",
    "answer_accuracy": "answerAccuracy", "answer_relevancy": "answerRelevancy", "answer_correctness": "answerCorrectness",
}  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAME_KEYS = ("run_name", "run_name_prefix", "run_name_suffix")
ONE_RUN = "one run has one name, from [mlflow]"
AS_TRAINED = "the tuned model is loaded as it was trained"


def checkpointing(value: Any) -> str:
    """true, false or "unsloth"."""
    if isinstance(value, bool):
        return "enabled" if value else "disabled"
    if value == "unsloth":
        return "unsloth"
    raise Unfit("is not known here", 'true, false, "unsloth"')


def tuner(key: str, *args: Any, **kwargs: Any) -> Row:
    """A key of [fine_tuner]."""
    kwargs["aliases"] = tuple(f"fine_tuner.{alias}" for alias in kwargs.get("aliases", ()))
    return Row(f"fine_tuner.{key}", *args, **kwargs)


GENERATION = "evaluation.comparison.generation"
ROWS: tuple[Row, ...] = (
    tuner("base_model_id", "model.source", required=True, manual=True),
    tuner("max_sequence_length", "dataset.maxSequenceLength", integer(1)),
    tuner("dtype", "model.dtype", choice(DTYPES)),
    tuner("load_in_4bit", "model.quantization.bits", boolean, manual=True),
    tuner("load_in_8bit", "model.quantization.bits", boolean, manual=True),
    tuner("full_finetuning", "method.type", boolean, manual=True),
    tuner("rank", "method.lora.rank", integer(1)),
    tuner("lora_alpha", "method.lora.alpha", number(above=0)),
    tuner("lora_dropout", "method.lora.dropout", number(0, 0.3)),
    tuner("target_modules", "method.lora.targetModules", words),
    tuner("bias", "method.lora.bias", choice(BIAS)),
    tuner("use_rslora", "method.lora.rankStabilized", boolean),
    tuner("loftq_config", "method.lora.loftq", table, manual=True),
    tuner("training_data_id", "dataset.train", required=True, manual=True),
    tuner("validation_data_id", "dataset.validation", manual=True),
    tuner("dataset_num_proc", "dataset.numProc", integer(1)),
    tuner("question_column", "dataset.columns.question"),
    tuner("ground_truth_column", "dataset.columns.answer"),
    tuner("system_prompt_column", "dataset.columns.system", text_or_none, empty_is_absent=False),
    tuner("system_prompt_override_text", "dataset.systemPrompt"),
    tuner("epochs", "training.epochs", integer(1)),
    tuner("learning_rate", "training.learningRate", number(above=0)),
    tuner("device_train_batch_size", "training.batchSizePerDevice", integer(1), aliases=("device_batch_size",)),
    tuner("device_validation_batch_size", "evaluation.batchSizePerDevice", integer(1)),
    tuner("grad_accumulation", "training.gradientAccumulationSteps", integer(1)),
    tuner("warmup_steps", "training.warmupSteps", integer(0)),
    tuner("lr_scheduler_type", "training.scheduler", choice(SCHEDULERS)),
    tuner("optimizer", "training.optimizer"),
    tuner("weight_decay", "training.weightDecay", number(0)),
    tuner("grad_clip_norm", "training.maxGradNorm", number(0)),
    tuner("seed", "training.seed", integer(0, 4294967295)),
    tuner("use_gradient_checkpointing", "training.gradientCheckpointing", checkpointing),
    tuner("use_flash_attention", "model.attention", boolean, manual=True),
    tuner("packing", "dataset.packing", boolean),
    tuner("train_on_responses_only", "dataset.responseOnly.enabled", boolean),
    tuner("question_part", "dataset.responseOnly.questionMarker", aliases=("user_part_in_chat_template",)),
    tuner("answer_part", "dataset.responseOnly.answerMarker", aliases=("assistant_part_in_chat_template",)),
    tuner("log_steps", "tracking.loggingSteps", integer(1)),
    tuner("log_first_step", "tracking.logFirstStep", boolean),
    tuner("report_to", "tracking.reportTo", choice(TRACKERS), manual=True),
    tuner("save_steps", "checkpoint.steps", integer(1)),
    tuner("save_strategy", "checkpoint.strategy", choice(["steps", "epoch", "no"])),
    tuner("save_total_limit", "checkpoint.keep", integer(1)),
    tuner("load_best_model_at_end", "checkpoint.loadBestAtEnd", boolean),
    tuner("metric_for_best_model", convert=choice(["eval_loss", "loss"]), inert="the best checkpoint is the one with the lowest validation loss"),
    tuner("eval_steps", "evaluation.steps", integer(1), manual=True),
    tuner("patience", "training.earlyStopping.patience", integer(1)),
    tuner("push_to_hub", "output.hub.push", boolean),
    tuner("wandb_project_name", "tracking.wandb.project"),
    tuner("wandb_run_name", inert=ONE_RUN, aliases=("wandb_run_name_prefix", "wandb_run_name_suffix")),
    tuner("run_name", convert=run_name, inert=ONE_RUN, aliases=("run_name_prefix", "run_name_suffix")),
    tuner("model_local_output_dir", "output.dir", manual=True),
    tuner("is_multimodel", "model.modality", boolean, manual=True),
    tuner("finetune_vision_layers", "method.vision.visionLayers", boolean, manual=True),
    tuner("finetune_language_layers", "method.vision.languageLayers", boolean, manual=True),
    tuner("finetune_attention_modules", "method.vision.attentionModules", boolean, manual=True),
    tuner("finetune_mlp_modules", "method.vision.mlpModules", boolean, manual=True),
    Row("mlflow.tracking_uri", "tracking.mlflow.trackingUri", manual=True),
    Row("mlflow.experiment_name", "tracking.mlflow.experimentName"),
    Row("mlflow.run_name", "output.runName.name", run_name),
    Row("mlflow.run_name_prefix", "output.runName.prefix", run_name),
    Row("mlflow.run_name_suffix", "output.runName.suffix", run_name),
    Row("inferencer.testing_data_id", "dataset.test", manual=True),
    Row("inferencer.max_new_tokens", f"{GENERATION}.maxNewTokens", integer(1)),
    Row("inferencer.temperature", f"{GENERATION}.temperature", number(0, 10)),
    Row("inferencer.min_p", f"{GENERATION}.minP", number(0, 1)),
    Row("inferencer.repetition_penalty", f"{GENERATION}.repetitionPenalty", number(above=0)),
    Row("inferencer.use_cache", convert=boolean, inert="answers are always generated with a cache"),
    *(Row(f"inferencer.{key}", convert=anything, inert=AS_TRAINED) for key in ("max_sequence_length", "dtype", "load_in_4bit", "load_in_8bit")),
    *(Row(f"inferencer.{key}", inert="the test set is read as the training set is") for key in (
        "question_column", "ground_truth_column", "system_prompt_column", "system_prompt_override_text",
    )),
    Row("inferencer.hf_user_id", "output.hub.repository", manual=True, aliases=("evaluator.hf_user_id", "fine_tuner.hf_user_id")),
    *(Row(f"{section}.{key}", convert=any_text, inert=ONE_RUN) for section in ("inferencer", "evaluator") for key in NAME_KEYS),
    Row("evaluator.metrics", "evaluation.metrics", each(choice(METRICS))),
    Row("evaluator.llm", "evaluation.judge.model", aliases=("evaluator.llm_model_id",)),
    Row("evaluator.embedding", "evaluation.judge.embedding", aliases=("evaluator.embedding_model_id",), manual=True),
    Row("evaluator.cost_per_million_input_tokens", "evaluation.judge.inputPrice", number(0)),
    Row("evaluator.cost_per_million_output_tokens", "evaluation.judge.outputPrice", number(0)),
    Row("pipeline.enable_finetuning", "phases.train", boolean),
    Row("pipeline.enable_inference", "phases.infer", boolean),
    Row("pipeline.enable_evaluation", "phases.evaluate", boolean),
    Row("pipeline.stop_after_finetuning", "phases.infer", boolean, manual=True, aliases=("--stop-after-finetuning",)),
    Row("pipeline.stop_after_inference", "phases.evaluate", boolean, manual=True, aliases=("--stop-after-inference",)),
    Row("--skip-finetuning", "phases.train", boolean, manual=True),
    Row("--skip-inference", "phases.infer", boolean, manual=True),
    Row("--skip-evaluation", "phases.evaluate", boolean, manual=True),
    Row("--hf-key", "model.tokenSecretRef", manual=True, secret=True),
    Row("--wandb-key", "tracking.wandb.apiKeySecretRef", manual=True, secret=True),
    Row("--openai-key", "placement.env", manual=True, secret=True),
    Row("--mlflow-username", "placement.env", manual=True, secret=True),
    Row("--mlflow-password", "placement.env", manual=True, secret=True),
)  # fmt: skip

PATHS = {row.key: row.path for row in ROWS}


def _epochs(draft: Draft) -> bool:
    return draft.has("dataset.validation") and not draft.has("evaluation.steps")


EXAMPLE = "page example"
PROFILE: tuple[Fill, ...] = (
    Fill("dataset.maxSequenceLength", 4096, EXAMPLE),
    Fill("model.dtype", "auto", EXAMPLE),
    Fill("method.lora.rank", 16, EXAMPLE),
    Fill("method.lora.alpha", 16, EXAMPLE),
    Fill("method.lora.dropout", 0.1, EXAMPLE),
    Fill("method.lora.targetModules", PROJECTIONS, EXAMPLE),
    Fill("method.lora.bias", "none", EXAMPLE),
    Fill("method.lora.rankStabilized", False, EXAMPLE),
    Fill("dataset.format", "qa", "fixed in its code"),
    Fill("dataset.numProc", 4, EXAMPLE),
    Fill("dataset.columns.question", "question", EXAMPLE),
    Fill("dataset.columns.answer", "answer", EXAMPLE),
    Fill("dataset.useChatTemplate", True, "fixed in its code"),
    Fill("dataset.responseOnly.enabled", True, EXAMPLE),
    Fill("dataset.packing", False, EXAMPLE),
    Fill("training.epochs", 30, EXAMPLE),
    Fill("training.learningRate", 2e-4, EXAMPLE),
    Fill("training.batchSizePerDevice", 4, EXAMPLE),
    Fill("training.gradientAccumulationSteps", 4, EXAMPLE),
    Fill("training.warmupSteps", 5, EXAMPLE),
    Fill("training.scheduler", "linear", EXAMPLE),
    Fill("training.optimizer", "paged_adamw_8bit", EXAMPLE, gpu=True),
    Fill("training.weightDecay", 0.01, EXAMPLE),
    Fill("training.maxGradNorm", 1, "fixed in its code"),
    Fill("training.seed", 42, EXAMPLE),
    Fill("training.gradientCheckpointing", "unsloth", EXAMPLE, gpu=True),
    Fill("trainer.backend", "unsloth", "fixed in its code", gpu=True),
    Fill("model.attention", "flashAttention2", EXAMPLE, gpu=True),
    Fill("checkpoint.strategy", "steps", "fixed in its code"),
    Fill("checkpoint.steps", 20, EXAMPLE),
    Fill("checkpoint.keep", 3, EXAMPLE),
    Fill("evaluation.strategy", "epoch", "our choice: that tool loads validation data and never uses it", _epochs),
    Fill("evaluation.strategy", "steps", "from eval_steps", lambda d: d.has("evaluation.steps")),
    Fill("evaluation.batchSizePerDevice", 4, EXAMPLE, lambda d: d.has("dataset.validation")),
    Fill("output.dir", "models/fine_tuned", "fixed in its code"),
    Fill("output.layout", "flat", "fixed in its code"),
    Fill("tracking.loggingSteps", 10, EXAMPLE),
    Fill("tracking.logFirstStep", True, EXAMPLE),
)  # fmt: skip


# --- reading --------------------------------------------------------------------------------------------------------

SECTIONS = ("fine_tuner", "mlflow", "inferencer", "evaluator", "pipeline")
HEADER = re.compile(r"^\s*\[\s*(?P<name>[^\[\]]+?)\s*\]\s*(#.*)?$")
LIST_HEADER = re.compile(r"^\s*\[\[\s*(?P<name>[^\[\]]+?)\s*\]\]\s*(#.*)?$")
KEY = re.compile(r"""^\s*(?P<name>[A-Za-z0-9_-]+|"[^"]*"|'[^']*')\s*=\s*(?P<value>.*)$""")
VARIABLE = re.compile(r"^\$\{([A-Za-z_][A-Za-z0-9_]*)\}$")


def recognise(documents: tuple[Document, ...], words_given: tuple[str, ...]) -> bool:
    """A TOML file with one of that tool's sections."""
    return any(re.search(r"^\s*\[(fine_tuner|inferencer|evaluator)\]", d.text, re.MULTILINE) for d in documents)


def read(draft: Draft) -> Iterator[Entry]:
    """Files in order, each over the one before, then the tool's own command line."""
    flags = parse_flags(
        after_launcher(draft.request.words), lambda name: not name.startswith(("--skip-", "--stop-after-"))
    )
    stray_mistakes(draft, flags)
    documents = list(draft.documents)
    for name, value in flags.pairs:
        found = config_document(draft, value) if name == "--config" and value else None
        documents += [found] if found else []
    for document in documents:
        yield from _file(document, draft)
    for name, value in flags.pairs:
        if name.startswith(("--skip-", "--stop-after-")) and value is None:
            yield flag_entry(name, True)
        elif name != "--config" and value is None:
            draft.mistakes.append(Mistake("command line", name, "it has no value", f"write {name} VALUE"))
        elif name != "--config":
            yield flag_entry(name, value)


def _file(document: Document, draft: Draft) -> Iterator[Entry]:
    lines = scan(document)
    try:
        content = tomllib.loads(document.text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        place = f"{document.name}:{found.group(1)}" if found else document.name
        raise Refused([Mistake(place, "", f"it is not TOML: {error}")]) from None
    except (ValueError, RecursionError):
        raise Refused([Mistake(document.name, "", "a number is too long, or it is nested too deeply")]) from None
    for section, group in content.items():
        if not isinstance(group, dict):
            yield Entry(section, group, _at(document, lines, section))
            continue
        if section not in SECTIONS:
            draft.mistakes.append(
                Mistake(
                    _at(document, lines, section).place,
                    f"[{section}]",
                    "unknown section",
                    f"one of {', '.join(SECTIONS)}",
                )
            )
            continue
        for key, value in group.items():
            name = f"{section}.{key}"
            origin = _at(document, lines, name)
            if _resolved(value, name, origin, draft):
                yield Entry(name, _plain(value, draft), origin)


def _at(document: Document, lines: dict[str, int], key: str) -> Origin:
    return Origin(f"{document.name}:{lines[key]}" if key in lines else document.name)


def _resolved(value: Any, key: str, origin: Origin, draft: Draft) -> bool:
    """Whether every variable in a value is set; a mistake if not."""
    missing = [name for name in _variables_of(value) if name not in draft.request.environment]
    for name in missing:
        draft.broken[key] = PATHS.get(key, "")
        draft.mistakes.append(
            Mistake(origin.place, key, f"variable {name} is not set", f"set {name}, or write the value itself")
        )
    for name in _variables_of(value):
        if SECRET_WORD.search(name) and not key.endswith("tracking_uri"):
            draft.hide(draft.request.environment.get(name))
    return not missing


def _variables_of(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [found.group(1) for one in texts if isinstance(one, str) and (found := VARIABLE.match(one))]


def _plain(value: Any, draft: Draft) -> Any:
    """`"null"` is none, also inside a list; a whole `"${NAME}"` is the environment variable."""
    if isinstance(value, list):
        return [one for one in (_plain(one, draft) for one in value) if one is not None]
    if value == "null":
        return None
    variable = VARIABLE.match(value) if isinstance(value, str) else None
    return value if variable is None else draft.request.environment[variable.group(1)]


def scan(document: Document) -> dict[str, int]:
    """Line of every section and key. Raises Refused for the slips that TOML's parser explains badly, all at once."""
    lines: dict[str, int] = {}
    mistakes: list[Mistake] = []
    section, closing = "", ""
    for number_, line in enumerate(document.text.splitlines(), 1):
        if closing:
            closing = "" if closing in line else closing
            continue
        header, key = HEADER.match(line), KEY.match(line)
        if header:
            section = header["name"].replace('"', "")
            _first(lines, section, number_, document, mistakes, f"table [{section}] is declared")
        elif listed := LIST_HEADER.match(line):
            section = listed["name"].replace('"', "")
            lines.setdefault(section, number_)
        elif key:
            name = f"{section}.{key['name'].strip(chr(34) + chr(39))}".lstrip(".")
            _first(lines, name, number_, document, mistakes, f"{name} is set")
            mistakes += _slips(document, number_, name, key["value"].partition("#")[0].strip())
            closing = _opens(key["value"])
    if mistakes:
        raise Refused(mistakes)
    return lines


def _first(lines: dict[str, int], name: str, line: int, document: Document, mistakes: list[Mistake], what: str) -> None:
    if name in lines:
        hint = "keep one; for a file over another one give both files in order"
        mistakes.append(Mistake(f"{document.name}:{line}", name, f"{what} twice: lines {lines[name]} and {line}", hint))
    lines.setdefault(name, line)


def _opens(value: str) -> str:
    """The quotes that close a text over several lines, if one begins here."""
    for quotes in ('"""', "'''"):
        if value.startswith(quotes) and value.count(quotes) == 1:
            return quotes
    return ""


def _slips(document: Document, line: int, name: str, value: str) -> Iterator[Mistake]:
    place = f"{document.name}:{line}"
    if value == "null":
        yield Mistake(place, name, "a bare null is not TOML", 'write "null", or leave the key out')
    if value in ("True", "False"):
        yield Mistake(place, name, f"{value} is not TOML", f"write {value.lower()}")
    if re.match(r"^[+-]?\.\d", value):
        yield Mistake(place, name, f"{value} is not TOML", f"write {value.replace('.', '0.', 1)}")
    if value.startswith("{") and "}" not in value:
        yield Mistake(place, name, "an inline table must stand on one line", "write { a = 1, b = 2 } on one line")


# --- options that belong together -----------------------------------------------------------------------------------


def combine(draft: Draft) -> None:
    """What one option of that tool means depends on others."""
    place_source(draft, "fine_tuner.base_model_id", "model.source")
    for key, path in (
        ("fine_tuner.training_data_id", "dataset.train"),
        ("fine_tuner.validation_data_id", "dataset.validation"),
        ("inferencer.testing_data_id", "dataset.test"),
    ):
        place_source(draft, key, path)
    _method(draft)
    _system_column(draft)
    if "fine_tuner.use_flash_attention" in draft.given:
        draft.put(
            "model.attention",
            "flashAttention2" if draft.get("fine_tuner.use_flash_attention") else "sdpa",
            "fine_tuner.use_flash_attention",
        )
    if "fine_tuner.eval_steps" in draft.given:
        draft.put("evaluation.steps", draft.get("fine_tuner.eval_steps"), "fine_tuner.eval_steps")
    _tracker(draft)
    _vision(draft)
    _output(draft)
    _evaluator(draft)
    _phases(draft)
    _keys(draft)


def _system_column(draft: Draft) -> None:
    """That tool reads no system column if it is told so; ours finds one by its name."""
    key = "fine_tuner.system_prompt_column"
    if key in draft.given and draft.get(key) is None and "fine_tuner.system_prompt_override_text" not in draft.given:
        draft.note(
            "system_prompt_column is none, and the trainer still reads a column `system` or `system_prompt` if the rows have one: "
            "rename such a column if it is not meant"
        )


def _method(draft: Draft) -> None:
    four, eight, full = (f"fine_tuner.{key}" for key in ("load_in_4bit", "load_in_8bit", "full_finetuning"))
    if draft.get(four) and draft.get(eight):
        draft.refuse(
            (four, eight),
            "4-bit and 8-bit are both true, and a base is loaded in one of them",
            "set one of them to false",
            settles="model.quantization.bits",
        )
        return
    if draft.get(full):
        for key, bits in ((four, 4), (eight, 8)):
            if draft.get(key):
                draft.refuse(
                    (full, key),
                    f"full fine-tuning trains all weights, and weights in {bits} bit cannot be trained",
                    f"set {key.partition('.')[2]} = false",
                    settles="model.quantization.bits",
                )
        if not draft.wrote(four):
            draft.note("full_finetuning is true, so the default 4-bit load is dropped")
        draft.put("method.type", "full", full)
        return
    _bits(draft, four, eight)


def _bits(draft: Draft, four: str, eight: str) -> None:
    loftq = draft.get("fine_tuner.loftq_config")
    source = str(draft.get("fine_tuner.base_model_id", ""))
    packed = source.lower().endswith("-bnb-4bit")
    bits = (
        8 if draft.get(eight) else 4 if draft.get(four, not draft.wrote(eight) or draft.get(eight) is False) else None
    )
    if packed and bits != 4:
        draft.warn(
            f"{source} holds 4-bit weights already, which load_in_4bit = false cannot undo: it is treated as 4-bit"
        )
        bits = 4
    if loftq is not None:
        _loftq(draft, loftq, packed, bits, source)
        return
    if bits is None:
        draft.put("method.type", "lora", four) if four in draft.given else draft.fill("method.type", "lora")
        return
    key = eight if bits == 8 else four
    for path, value in (("method.type", "lora" if bits == 8 else "qlora"), ("model.quantization.bits", bits)):
        if key in draft.given:
            draft.put(path, value, key)
        else:
            draft.fill(path, value, EXAMPLE)
    if bits == 4:
        draft.fill("model.quantization.type", "nf4", "fixed in its code")


def _loftq(draft: Draft, loftq: dict[str, Any], packed: bool, bits: int | None, source: str) -> None:
    key = "fine_tuner.loftq_config"
    for name in loftq:
        if name not in ("loftq_bits", "loftq_iter"):
            draft.refuse(key, f"{name} is unknown in it", "write { loftq_bits = 4, loftq_iter = 1 }")
    if packed:
        draft.refuse(
            (key, "fine_tuner.base_model_id"),
            f"LoftQ needs the whole base, and {source} holds 4-bit weights already",
            "name the base without -bnb-4bit",
        )
        return
    try:
        draft.put("method.lora.loftq.bits", integer(2, 8)(loftq.get("loftq_bits", 4)), key)
        draft.put("method.lora.loftq.iterations", integer(1, 64)(loftq.get("loftq_iter", 1)), key)
    except Unfit as unfit:
        draft.refuse(key, unfit.what, f"allowed: {unfit.allowed}")
    draft.put("method.lora.init", "loftq", key)
    draft.put("method.type", "lora", key)
    if bits:
        draft.note(f"LoftQ with load_in_{bits}bit: the base is loaded in full precision, initialised, then quantised")


def _tracker(draft: Draft) -> None:
    given = draft.given.get("fine_tuner.report_to")
    uri = draft.given.get("mlflow.tracking_uri")
    if given is not None:
        draft.put("tracking.reportTo", given.value, "fine_tuner.report_to")
        if (
            given.value == ["mlflow"]
            and not draft.wrote("mlflow.tracking_uri")
            and not draft.has("tracking.mlflow.trackingUri")
        ):
            draft.refuse(
                "fine_tuner.report_to",
                "mlflow needs a server, and none is named",
                "write [mlflow] tracking_uri",
                settles="tracking.mlflow",
            )
    elif uri is not None or draft.wrote("mlflow.tracking_uri"):
        draft.fill("tracking.reportTo", ["mlflow"], EXAMPLE)
    elif "fine_tuner.report_to" not in draft.broken:
        draft.fill("tracking.reportTo", [], "no [mlflow] tracking_uri is given")
        draft.note("report_to is mlflow by that tool's example, but no tracking_uri is given: nothing is reported")
    if uri is None:
        if draft.wrote("mlflow.tracking_uri"):
            draft.broken["tracking.mlflow"] = "tracking.mlflow"
        return
    address = str(uri.value)
    userinfo = USERINFO.search(address)
    if userinfo:
        user, _, password = userinfo.group(0).rstrip("@").partition(":")
        _variables(
            draft, "mlflow.tracking_uri", {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
        )
        address = USERINFO.sub("", address)
        draft.warn(f"{uri.origin.place}: {uri.key}: user and password were moved into the Secret")
    draft.put("tracking.mlflow.trackingUri", address, "mlflow.tracking_uri")


def _variables(draft: Draft, key: str, values: dict[str, str]) -> None:
    """Environment variables of the trainer that come from the Secret."""
    variables = list(draft.value("placement.env") or [])
    for name, value in values.items():
        if value:
            variables.append({"name": name, "secretKeyRef": draft.secret(name.lower().replace("_", "-"), value)})
    if variables:
        draft.put("placement.env", variables, key)


def _vision(draft: Draft) -> None:
    wanted = draft.get("fine_tuner.is_multimodel")
    if wanted:
        draft.put("model.modality", "visionLanguage", "fine_tuner.is_multimodel")
    for row in ROWS:
        if row.path.startswith("method.vision.") and row.key in draft.given:
            if wanted:
                draft.put(row.path, draft.get(row.key), row.key)
            else:
                given = draft.given[row.key]
                draft.warn(f"{given.origin.place}: {given.key} has no effect: the model is not multimodal")


def _output(draft: Draft) -> None:

    if "fine_tuner.model_local_output_dir" in draft.given:
        output_folder(draft, "fine_tuner.model_local_output_dir")
    if "mlflow.run_name" not in draft.given and (
        draft.get("mlflow.run_name_prefix") or draft.get("mlflow.run_name_suffix")
    ):
        draft.note(
            "run_name is automatic: the FineTuneJob's name stands where that tool puts the time, between prefix and suffix"
        )
    if not draft.get("fine_tuner.push_to_hub"):
        if not draft.wrote("fine_tuner.push_to_hub"):
            draft.note(
                "push_to_hub is not set: nothing is published (that tool's example publishes); push_to_hub = true does"
            )
        return
    parts = [str(draft.get(f"mlflow.{key}", "")) for key in ("run_name_prefix", "run_name", "run_name_suffix")]
    name = "".join(parts) if parts[1] else f"{parts[0]}{draft.name}{parts[2]}"
    user = draft.get("inferencer.hf_user_id")
    if not re.match(r"^[\w.-]+$", name):
        draft.refuse(
            "fine_tuner.push_to_hub",
            f"the repository has the run's name, and {name!r} cannot be one",
            "give --set output.hub.repository=org/name",
        )
        return
    draft.fill("output.hub.repository", f"{user}/{name}" if user else name, "the run's name")
    draft.fill("output.hub.private", False, "fixed in its code")


def _evaluator(draft: Draft) -> None:
    if "evaluator.embedding" in draft.given:
        spelled = str(draft.get("evaluator.embedding")).replace("text-embeddings-", "text-embedding-")
        draft.put("evaluation.judge.embedding", spelled, "evaluator.embedding")
    if draft.get("inferencer.temperature"):
        draft.fill(f"{GENERATION}.doSample", True, "a temperature above 0")


def _phases(draft: Draft) -> None:
    """Stops and skips win over what is enabled."""
    for key, ended in (
        ("pipeline.stop_after_finetuning", ("phases.infer", "phases.evaluate")),
        ("pipeline.stop_after_inference", ("phases.evaluate",)),
        ("--skip-finetuning", ("phases.train",)),
        ("--skip-inference", ("phases.infer",)),
        ("--skip-evaluation", ("phases.evaluate",)),
    ):
        for path in ended if draft.get(key) else ():
            draft.put(path, False, key)


def _keys(draft: Draft) -> None:
    if "--hf-key" in draft.given:
        draft.put("model.tokenSecretRef", draft.secret("hf-token", draft.get("--hf-key")), "--hf-key")
    if "--wandb-key" in draft.given:
        draft.put(
            "tracking.wandb.apiKeySecretRef", draft.secret("wandb-api-key", draft.get("--wandb-key")), "--wandb-key"
        )
    for flag, variable in (
        ("--openai-key", "OPENAI_API_KEY"),
        ("--mlflow-username", "MLFLOW_TRACKING_USERNAME"),
        ("--mlflow-password", "MLFLOW_TRACKING_PASSWORD"),
    ):
        if flag in draft.given:
            _variables(draft, flag, {variable: draft.get(flag)})


IMPORTER = Importer("toml", "this TOML tool", ROWS, PROFILE, recognise, read, combine)
