"""`env`: a `.env` file and the command line of a trainer that is configured by both.

The file's keys and the command line's flags are two spellings of one option; flags win. What that tool documents and does not
do (ratios, accumulation, result folder) is honoured here as documented.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from finetune_cli.importers.commands import after_launcher, config_document, flag_entry, parse_flags, stray_mistakes
from finetune_cli.importers.convert import (
    boolean,
    choice,
    each,
    exactly,
    integer,
    modules,
    nearest,
    number,
)
from finetune_cli.importers.material import Document, Draft, Entry, Fill, Importer, Mistake, Origin, Row
from finetune_cli.importers.paths import config_map_reference, output_folder, place_source, place_tokenizer

FORMATS = {
    "plain_text": "plainText", "mcq_jsonl": "mcq", "instruction_jsonl": "instruction", "instruction": "instruction", "qa": "qa", "text": "text",
    "conversation": "messages",
}  # fmt: skip
METRICS = {
    "accuracy": "accuracy", "f1": "f1", "precision": "precision", "recall": "recall", "perplexity": "perplexity", "bleu": "bleu", "rouge": "rouge",
    "rougeL": "rouge", "bertscore": "bertscore",
}  # fmt: skip
PRECISION = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}
NOT_ACTED_ON = "that tool writes its metrics to fixed places, and so do we"
SHORT_WORD = 12
FOLDER_NAME = exactly(lambda t: bool(re.match(r"^[\w.-]+$", t)), "cannot be a folder's name", "letters, digits, _ . -")

ROWS: tuple[Row, ...] = (
    Row("PROJECT_NAME", "output.project", FOLDER_NAME, ("--project_name", "-project", "--project")),
    Row("MODEL_NAME", "model.source", aliases=("--model_name", "-model", "--model"), manual=True),
    Row("TOKENIZER", "model.tokenizer", aliases=("--tokenizer", "-tokenizer"), manual=True),
    Row("HUGGINGFACE_TOKEN", "model.tokenSecretRef", aliases=("--hf_token",), manual=True, secret=True),
    Row("USE_AUTH_TOKEN", "model.tokenSecretRef", boolean, manual=True),
    Row("CACHE_DIR", "model.cache", manual=True),
    Row("PAD_TOKEN", "model.padToken"),
    Row("TRAIN_DATA_PATH", "dataset.train", aliases=("--data_path", "-data", "--data"), required=True, manual=True),
    Row("DATASET_TYPE", "dataset.format", choice(FORMATS), ("--dataset_type", "-dataset_type"), required=True, manual=True),
    Row("DATA_FORMAT", "dataset.fileFormat", choice(["jsonl", "json", "csv", "auto", "txt"])),
    Row("VAL_DATA_PATH", "dataset.validation", aliases=("--val_path",), manual=True),
    Row("TEST_DATA_PATH", "dataset.test", aliases=("--test_path",), manual=True),
    Row("TRAIN_RATIO", "dataset.split.train", number(0, 1), ("--train_ratio",), manual=True),
    Row("VAL_RATIO", "dataset.split.validation", number(0, 1), ("--val_ratio",), manual=True),
    Row("TEST_RATIO", "dataset.split.test", number(0, 1), ("--test_ratio",), manual=True),
    Row("SPLIT_SEED", "dataset.split.seed", integer(0, 4294967295), ("--split_seed",), manual=True),
    Row("MAX_LENGTH", "dataset.maxSequenceLength", integer(1)),
    Row("PACKING", "dataset.packing", boolean),
    Row("TECHNIQUE", "method.type", choice(["lora", "qlora", "dora", "adapter"]), ("--technique", "-technique"), manual=True),
    Row("ADAPTER_PATH", "method.adapter.source", aliases=("--adapter_path",), manual=True),
    Row("LORA_R", "method.lora.rank", integer(4, 128), ("--lora_r", "-lora_r")),
    Row("LORA_ALPHA", "method.lora.alpha", number(above=0), ("--lora_alpha", "-lora_alpha")),
    Row("LORA_DROPOUT", "method.lora.dropout", number(0, 0.3), ("--lora_dropout", "-lora_dropout")),
    Row("LORA_TARGET_MODULES", "method.lora.targetModules", modules, ("--lora_target_modules",)),
    Row("LORA_BIAS", "method.lora.bias", choice({"none": "none", "all": "all", "lora_only": "loraOnly"})),
    Row("LOAD_IN_4BIT", "model.quantization.bits", boolean, manual=True),
    Row("BNB_4BIT_COMPUTE_DTYPE", "model.quantization.computeDtype", choice(PRECISION)),
    Row("BNB_4BIT_USE_DOUBLE_QUANT", "model.quantization.doubleQuant", boolean),
    Row("BNB_4BIT_QUANT_TYPE", "model.quantization.type", choice(["nf4", "fp4"])),
    Row("EPOCHS", "training.epochs", integer(1, 20), ("--epochs", "-epochs")),
    Row("BATCH_SIZE", "training.batchSizePerDevice", integer(1, 32), ("--batch_size", "-batch_size")),
    Row("GRAD_ACC_STEPS", "training.gradientAccumulationSteps", integer(1), ("--grad_acc_steps",)),
    Row("LEARNING_RATE", "training.learningRate", number(1e-5, 5e-4), ("--learning_rate", "-lr")),
    Row("DEVICE", "training.device", choice(["cpu", "cuda", "mps", "auto"]), ("--device", "-device"), manual=True),
    Row("EVAL_STEPS", "evaluation.steps", integer(1), ("--eval_steps",), manual=True),
    Row("SAVE_STRATEGY", "checkpoint.strategy", choice(["steps", "epoch", "no"]), manual=True),
    Row("RESUME_CHECKPOINT", "checkpoint.resume", manual=True),
    Row("OUTPUT_DIR", "output.dir", aliases=("--save_path", "-savepath", "--output", "--output_dir"), manual=True),
    Row("PROMPTS_FILE", "evaluation.comparison.promptsRef", aliases=("--prompts_file",), manual=True),
    Row("COMPARISON_MAX_TOKENS", "evaluation.comparison.generation.maxNewTokens", integer(1), ("MAX_NEW_TOKENS",)),
    Row("COMPARISON_TEMPERATURE", "evaluation.comparison.generation.temperature", number(0, 10)),
    Row("COMPARISON_TOP_P", "evaluation.comparison.generation.topP", number(0, 1, above=0)),
    Row("COMPARISON_DO_SAMPLE", "evaluation.comparison.generation.doSample", boolean),
    Row("COMPARISON_OUTPUT", inert=NOT_ACTED_ON),
    Row("TRACK_METRICS", "evaluation.metrics", manual=True),
    Row("METRICS", "evaluation.metrics", each(choice(METRICS)), manual=True),
    Row("METRICS_PATH", inert=NOT_ACTED_ON),
    Row("REPORT_PATH", inert=NOT_ACTED_ON),
    Row("LOG_INTERVAL", "tracking.loggingSteps", integer(1)),
    Row("MONGODB_ENABLED", "tracking.reportTo", boolean, manual=True),
    Row("MONGODB_URI", "tracking.mongodb.uriSecretRef", manual=True, secret=True),
    Row("MONGODB_DB_NAME", "tracking.mongodb.database"),
    Row("MONGODB_COLLECTION_PREFIX", inert="collections have fixed names"),
)  # fmt: skip


KEYS = frozenset(key for row in ROWS for key in (row.key, *row.aliases))


def _validated(draft: Draft) -> bool:
    return draft.has("dataset.validation") or bool(draft.value("dataset.split.validation"))


def _four_bits(draft: Draft) -> bool:
    return bool(draft.value("model.quantization.bits") == 4)


def _compares(draft: Draft) -> bool:
    """Whether base and tuned model answer prompts: what the file leaves open about that is not what we would do."""
    return any(path.startswith("evaluation.comparison.") for path in draft.values)


PROFILE: tuple[Fill, ...] = (
    Fill("model.source", "gpt2", "page default"),
    Fill("method.lora.rank", 8, when=lambda d: d.value("method.type") != "adapter"),
    Fill("method.lora.alpha", 16, when=lambda d: d.value("method.type") != "adapter"),
    Fill("method.lora.dropout", 0.1, when=lambda d: d.value("method.type") != "adapter"),
    Fill("training.epochs", 3),
    Fill("training.batchSizePerDevice", 4),
    Fill("training.gradientAccumulationSteps", 4),
    Fill("training.learningRate", 3e-4),
    Fill("training.scheduler", "linear", "fixed in its code"),
    Fill("training.warmupRatio", 0, "fixed in its code"),
    Fill("training.optimizer", "adamw_torch", "fixed in its code"),
    Fill("training.weightDecay", 0, "fixed in its code"),
    Fill("training.maxGradNorm", 1, "fixed in its code"),
    Fill("dataset.maxSequenceLength", 512),
    Fill("dataset.useChatTemplate", False, "fixed in its code"),
    Fill("dataset.responseOnly.enabled", False, "fixed in its code"),
    Fill("model.quantization.doubleQuant", False, "default of its code", _four_bits),
    Fill("model.quantization.computeDtype", "float16", "default of its code", lambda d: _four_bits(d) and d.value("training.mixedPrecision") == "fp16"),
    Fill("evaluation.comparison.generation.maxNewTokens", 150, "default of its code", _compares),
    Fill("evaluation.comparison.generation.temperature", 0.7, "default of its code", _compares),
    Fill("evaluation.comparison.generation.topP", 0.9, "default of its code", _compares),
    Fill("evaluation.comparison.generation.doSample", True, "default of its code", _compares),
    Fill("dataset.mcq.includeOptions", True, "our choice: that tool leaves the options out of the prompt", lambda d: d.value("dataset.format") == "mcq"),
    Fill("checkpoint.keep", 0, "fixed in its code"),
    Fill("checkpoint.loadBestAtEnd", True, "fixed in its code", _validated),
    Fill("output.dir", "results", "fixed in its code"),
    Fill("output.layout", "projectModelTime", "fixed in its code"),
    Fill("output.project", "default_project", "fixed in its code"),
    Fill("tracking.loggingSteps", 10),
)  # fmt: skip


# --- reading --------------------------------------------------------------------------------------------------------

MARKS = re.compile(r"^\s*(export\s+)?(MODEL_NAME|TRAIN_DATA_PATH|DATASET_TYPE|TECHNIQUE)\s*=", re.MULTILINE)
FLAG_MARKS = ("--data_path", "--dataset_type", "--technique", "--model_name", "--hf_token")


def recognise(documents: tuple[Document, ...], words: tuple[str, ...]) -> bool:
    """A `.env` file, or that tool's flags where no file is given."""
    if documents:
        return any(d.path.suffix == ".env" or d.path.name == ".env" or MARKS.search(d.text) for d in documents)
    return any(word.partition("=")[0] in FLAG_MARKS for word in words)


def read(draft: Draft) -> Iterator[Entry]:
    """Files in order, then the file of the tool's own --config, then its flags."""
    for document in draft.documents:
        yield from _file(document, draft)
    yield from _flags(draft)


def _file(document: Document, draft: Draft) -> Iterator[Entry]:
    from dotenv.parser import parse_stream

    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(document.text)):
        line = binding.original.line + _leading_lines(binding.original.string)
        place = f"{document.name}:{line}"
        if binding.error:
            shown = binding.original.string.strip()
            draft.mistakes.append(
                Mistake(place, "", f"{_shorten(shown)!r} is not KEY=value", "remove the line, or write KEY=value")
            )
        elif binding.key is not None and binding.value is None:
            name = binding.key if binding.key in KEYS else _shorten(binding.key)
            hint = f"write {name}=value, or {name}= for none"
            draft.mistakes.append(Mistake(place, name, "it has no `=` and no value", hint))
        elif binding.key is not None and binding.value is not None:
            value = _interpolate(binding.value, values, draft, place, binding.key)
            values[binding.key] = value
            yield Entry(binding.key, value.strip(), Origin(place))


def _leading_lines(original: str) -> int:
    """Blank lines that the parser counts to the binding behind them."""
    return len(original) - len(original.lstrip("\r\n")) if original.strip() else 0


def _shorten(line: str) -> str:
    """Enough of a stray line to find it; one long word may be a secret that lost its key."""
    if " " not in line and len(line) > SHORT_WORD:
        return line[:2] + "..."
    return line if len(line) <= 40 else line[:37] + "..."


def _interpolate(value: str, values: dict[str, str], draft: Draft, place: str, key: str) -> str:
    from dotenv.variables import parse_variables

    known = {**draft.request.environment, **values}
    parts = list(parse_variables(value))
    for part in parts:
        name = getattr(part, "name", None)
        if name is not None and name not in known and getattr(part, "default", None) is None:
            draft.mistakes.append(
                Mistake(place, key, f"variable {name} is not set", "set it above this line, or write the value itself")
            )
    return "".join(part.resolve(known) for part in parts)


def _flags(draft: Draft) -> Iterator[Entry]:
    known = [alias for row in ROWS for alias in row.aliases if alias.startswith("-")]
    flags = parse_flags(after_launcher(draft.request.words), lambda name: True)
    stray_mistakes(draft, flags)
    entries: list[Entry] = []
    for name, value in flags.pairs:
        spelled = _complete(name, known)
        if spelled in ("--config", "-config"):
            document = config_document(draft, value) if value else None
            if document is not None:
                yield from _file(document, draft)
        elif value is None:
            draft.mistakes.append(Mistake("command line", name, "it has no value", f"write {name} VALUE"))
        else:
            entries.append(flag_entry(spelled, value))
    yield from entries


def _complete(name: str, known: list[str]) -> str:
    """The flag that an abbreviation stands for, as that tool's parser reads it; otherwise the name itself."""
    if name in known or name in ("--config", "-config"):
        return name
    longer = [one for one in (*known, "--config") if name.startswith("--") and one.startswith(name)]
    return longer[0] if len(longer) == 1 else name


# --- options that belong together -----------------------------------------------------------------------------------


def combine(draft: Draft) -> None:
    """What one option of that tool means depends on others."""
    place_source(draft, "MODEL_NAME", "model.source")
    place_tokenizer(draft, "TOKENIZER", "MODEL_NAME")
    for key, path in (
        ("TRAIN_DATA_PATH", "dataset.train"),
        ("VAL_DATA_PATH", "dataset.validation"),
        ("TEST_DATA_PATH", "dataset.test"),
    ):
        place_source(draft, key, path, always_local=True)
    _token(draft)
    _format(draft)
    _split(draft)
    _method(draft)
    _device(draft)
    _steps(draft)
    _rest(draft)


def _token(draft: Draft) -> None:
    token, used = draft.given.get("HUGGINGFACE_TOKEN"), draft.get("USE_AUTH_TOKEN")
    if token is not None and used is False:
        draft.warn(f"{token.origin.place}: {token.key} has no effect: USE_AUTH_TOKEN is false")
    elif token is not None:
        draft.put("model.tokenSecretRef", draft.secret("hf-token", token.value), "HUGGINGFACE_TOKEN")
    elif used and "model.tokenSecretRef" not in draft.request.own:
        place = draft.given["USE_AUTH_TOKEN"].origin.place
        draft.warn(f"{place}: USE_AUTH_TOKEN is true and no token is given: for a gated model add model.tokenSecretRef")


def _format(draft: Draft) -> None:
    found = draft.get("DATASET_TYPE")
    if found == "text":
        found = "plainText" if str(draft.get("TRAIN_DATA_PATH", "")).endswith(".txt") else "promptCompletion"
        draft.note(f"DATASET_TYPE text is read as {found}")
    if found is not None:
        draft.put("dataset.format", found, "DATASET_TYPE")
    if found == "mcq":
        draft.note(
            "multiple choice: the options are written into the prompt; `dataset.mcq.includeOptions: false` leaves them out, as that tool does"
        )


def _split(draft: Draft) -> None:
    ratios = ("TRAIN_RATIO", "VAL_RATIO", "TEST_RATIO")
    given = {key: float(draft.get(key)) for key in ratios if key in draft.given}
    if draft.has("dataset.validation") or draft.has("dataset.test"):
        for key in (*given, *(["SPLIT_SEED"] if "SPLIT_SEED" in draft.given else [])):
            one = draft.given[key]
            draft.warn(
                f"{one.origin.place}: {one.key} has no effect: a file of its own is given for validation or test, so nothing is split"
            )
        return
    if any(key in draft.broken for key in ratios):
        return
    total = sum(given.values())
    names = "+".join(given)
    if len(given) == 3 and abs(total - 1) > 1e-6:
        draft.refuse(
            tuple(given), f"{names} = {total:g}, must be 1", "change one of them, or leave one out: it takes the rest"
        )
        return
    if total > 1 + 1e-6:
        draft.refuse(tuple(given), f"{names} = {total:g}, must not be more than 1", "make them smaller")
        return
    parts = _ratios(given)
    if parts["TRAIN_RATIO"] <= 0:
        draft.refuse(
            tuple(given), "nothing is left for training", "make the other parts smaller", settles="dataset.split"
        )
        return
    for key, value in parts.items():
        part = {"TRAIN_RATIO": "train", "VAL_RATIO": "validation", "TEST_RATIO": "test"}[key]
        if key in given:
            draft.put(f"dataset.split.{part}", value, key)
        else:
            draft.fill(f"dataset.split.{part}", value, "the rest" if given else "page default")
    if "SPLIT_SEED" in draft.given:
        draft.put("dataset.split.seed", draft.get("SPLIT_SEED"), "SPLIT_SEED")
    else:
        draft.fill("dataset.split.seed", 42, "page default")


def _ratios(given: dict[str, float]) -> dict[str, float]:
    """All three ratios: what is not given takes the rest; a lone training ratio leaves equal parts to the other two."""
    ratios = {"TRAIN_RATIO": 0.8, "VAL_RATIO": 0.1, "TEST_RATIO": 0.1}
    if not given:
        return ratios
    rest = round(1 - sum(given.values()), 10)
    if len(given) == 1 and "TRAIN_RATIO" in given:
        return {**given, "VAL_RATIO": round(rest / 2, 10), "TEST_RATIO": round(rest / 2, 10)}
    if len(given) == 1:
        other = "TEST_RATIO" if "VAL_RATIO" in given else "VAL_RATIO"
        kept = min(ratios[other], rest)
        return {**given, other: kept, "TRAIN_RATIO": round(rest - kept, 10)}
    missing = next((key for key in ratios if key not in given), None)
    return given if missing is None else {**given, missing: max(rest, 0.0)}


def _method(draft: Draft) -> None:
    technique, four_bit = draft.get("TECHNIQUE", "lora"), draft.get("LOAD_IN_4BIT")
    if "TECHNIQUE" in draft.broken:
        return
    if technique == "qlora" and four_bit is False:
        draft.refuse(
            ("TECHNIQUE", "LOAD_IN_4BIT"),
            "qlora loads the base in 4 bit, and LOAD_IN_4BIT is false",
            "remove LOAD_IN_4BIT, or write TECHNIQUE=lora",
        )
    if technique == "lora" and four_bit:
        draft.note("TECHNIQUE lora with LOAD_IN_4BIT true is QLoRA, and imported as such")
        technique = "qlora"
    if technique == "adapter":
        place_source(draft, "ADAPTER_PATH", "method.adapter.source")
        if not draft.has("method.adapter.source") and "ADAPTER_PATH" not in draft.broken:
            draft.refuse(
                "TECHNIQUE",
                "adapter needs an adapter to load, and none is named",
                "give --adapter URI",
                settles="method.adapter.source",
            )
    elif "ADAPTER_PATH" in draft.given:
        draft.warn(f"{draft.given['ADAPTER_PATH'].origin.place}: ADAPTER_PATH has no effect: TECHNIQUE is {technique}")
    if "TECHNIQUE" in draft.given:
        draft.put("method.type", technique, "TECHNIQUE")
    else:
        draft.fill("method.type", technique)
    if four_bit or technique == "qlora":
        draft.put("model.quantization.bits", 4, "LOAD_IN_4BIT" if four_bit else "TECHNIQUE")
        draft.fill("model.quantization.type", "nf4")


def _device(draft: Draft) -> None:
    device = draft.get("DEVICE", "auto")
    if device == "auto":
        return
    draft.put("training.device", device, "DEVICE")
    if device == "cpu":
        draft.put("resources.gpusPerNode", 0, "DEVICE")
        draft.fill("training.mixedPrecision", "no", "fixed in its code")
    if device == "cuda":
        draft.put("resources.gpusPerNode", 1, "DEVICE")
        draft.fill("training.mixedPrecision", "fp16", "fixed in its code")
    if device == "mps":
        draft.fill("training.mixedPrecision", "no", "fixed in its code")


def _steps(draft: Draft) -> None:
    """With validation data that tool evaluates and saves every EVAL_STEPS steps; without, SAVE_STRATEGY decides."""
    steps, saves = draft.get("EVAL_STEPS", 100), draft.get("SAVE_STRATEGY")
    origin = draft.given["EVAL_STEPS"].origin if "EVAL_STEPS" in draft.given else None
    if _validated(draft):
        draft.fill("evaluation.strategy", "steps", "fixed in its code")
        draft.fill("checkpoint.strategy", "steps", "fixed in its code")
        for path in ("evaluation.steps", "checkpoint.steps"):
            if origin:
                draft.put(path, steps, "EVAL_STEPS")
            else:
                draft.fill(path, steps, "page default")
        if saves not in (None, "steps"):
            place = draft.given["SAVE_STRATEGY"].origin.place
            draft.warn(
                f"{place}: SAVE_STRATEGY has no effect: with validation data checkpoints are made when the model is evaluated"
            )
        return
    if saves is None:
        draft.fill("checkpoint.strategy", "epoch", "fixed in its code")
    else:
        draft.put("checkpoint.strategy", saves, "SAVE_STRATEGY")
    if saves == "steps":
        draft.put("checkpoint.steps", steps, "EVAL_STEPS" if origin else "SAVE_STRATEGY")
    elif origin and "dataset.split" not in {m.key for m in draft.mistakes} and not draft.broken:
        draft.warn(f"{origin.place}: EVAL_STEPS has no effect: there is no validation data")


def _rest(draft: Draft) -> None:
    if "OUTPUT_DIR" in draft.given:
        output_folder(draft, "OUTPUT_DIR")
    config_map_reference(draft, "PROMPTS_FILE", "evaluation.comparison.promptsRef", "prompts", "--prompts")
    if "RESUME_CHECKPOINT" in draft.given:
        word = str(draft.get("RESUME_CHECKPOINT")).lower()
        if word in ("auto", "never", "true", "false"):
            draft.put("checkpoint.resume", {"true": "auto", "false": "never"}.get(word, word), "RESUME_CHECKPOINT")
        else:
            place_source(draft, "RESUME_CHECKPOINT", "checkpoint.resume", always_local=True)
    if "CACHE_DIR" in draft.given:
        _cache(draft)
    _metrics(draft)
    if draft.get("MONGODB_ENABLED"):
        draft.put("tracking.reportTo", ["mongodb"], "MONGODB_ENABLED")
    if "MONGODB_URI" in draft.given and draft.get("MONGODB_ENABLED") is not False:
        draft.put("tracking.reportTo", ["mongodb"], "MONGODB_URI")
        draft.put("tracking.mongodb.uriSecretRef", draft.secret("mongodb-uri", draft.get("MONGODB_URI")), "MONGODB_URI")


def _cache(draft: Draft) -> None:
    given = draft.given["CACHE_DIR"]
    if str(given.value).startswith("pvc://"):
        draft.put("model.cache", given.value, "CACHE_DIR")
    else:
        draft.warn(
            f"{given.origin.place}: CACHE_DIR has no effect: pods have no such folder; name a volume with --set model.cache=pvc://claim/path"
        )


def _metrics(draft: Draft) -> None:
    """METRICS lists them; TRACK_METRICS is a list or a switch."""
    found: list[Any] = list(draft.get("METRICS") or [])
    track = draft.given.get("TRACK_METRICS")
    if track is not None and str(track.value).lower() not in ("true", "false"):
        for word in str(track.value).strip("[]").split(","):
            name = METRICS.get(word.strip())
            if name is None:
                near = nearest(word.strip(), METRICS)
                draft.refuse(
                    "TRACK_METRICS",
                    f'"{word.strip()}" is not a metric known here',
                    f"one of {', '.join(METRICS)}" + (f"; did you mean {near}?" if near else ""),
                )
            else:
                found.append(name)
    if found and not (track is not None and str(track.value).lower() == "false"):
        draft.put(
            "evaluation.metrics", list(dict.fromkeys(found)), "METRICS" if "METRICS" in draft.given else "TRACK_METRICS"
        )


IMPORTER = Importer("env", "this .env tool", ROWS, PROFILE, recognise, read, combine)
