"""`hydra`: a composed file, a folder of groups or an older dashed command line, with Hydra's own composition and override grammar.

That tool's method, adapter sizes and warm-up are fixed in its code; an import writes them out, or the run would be another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune_cli.files import read_text
from finetune_cli.importers.commands import after_launcher, flag_entry, parse_flags, stray_mistakes
from finetune_cli.importers.companions import is_accelerate, read_accelerate
from finetune_cli.importers.convert import boolean, choice, integer, nearest, number
from finetune_cli.importers.material import Document, Draft, Entry, Fill, Importer, Mistake, Origin, Refused, Row
from finetune_cli.importers.paths import is_local, place_source
from finetune_cli.importers.toml import PROJECTIONS, SCHEDULERS
from finetune_cli.importers.yaml import assume_ranks
from finetune_cli.importers.yaml_tree import Tree, parse, sniff

GROUPS = ("training_config", "training_configs", "training")
TRACKERS = {"wandb": ["wandb"], "tensorboard": ["tensorboard"], "mlflow": ["mlflow"], "none": []}
FORMATS = {
    "standard": "promptCompletion", "conversational": "messages", "preference": "preference", "no": "plainText", "simple": "plainText",
}  # fmt: skip
COLUMNS: dict[str, dict[str, str]] = {
    "messages": {"question": "Question", "answer": "Response"},
    "plainText": {"text": "text"},
}
"""Columns that its code wants. Those of the other formats the trainer finds by itself, in any letter case, after TRL's own."""
SYSTEM_PROMPT = "You are a personal assistant."


def config(key: str, *args: Any, **kwargs: Any) -> Row:
    """A key of the training group; its dashed flag is another spelling."""
    return Row(f"training_config.{key}", *args, **kwargs)


ROWS: tuple[Row, ...] = (
    config("model", "model.source", required=True, manual=True),
    Row("dataset.path", "dataset.train", manual=True, aliases=("--dataset",)),
    Row("dataset.format", "dataset.format", choice(FORMATS), manual=True, aliases=("--format",)),
    config("trainer", "trainer.type", choice({"SFT": "sft", "DPO": "dpo", "GRPO": "grpo"})),
    config("distributed_training", "distributed.strategy", choice({"DDP": "ddp", "FSDP": "fsdp", "Unsloth": "unsloth"}), manual=True),
    config("per_device_train_batch_size", "training.batchSizePerDevice", integer(1)),
    config("gradient_acc_steps", "training.gradientAccumulationSteps", integer(1)),
    config("optim", "training.optimizer"),
    config("learning_rate", "training.learningRate", number(above=0)),
    config("num_train_epochs", "training.epochs", integer(1)),
    config("lr_scheduler_type", "training.scheduler", choice(SCHEDULERS)),
    config("save_steps", "checkpoint.steps", integer(1)),
    config("max_completion_length", "trainer.maxCompletionLength", integer(1)),
    config("max_seq_length", "dataset.maxSequenceLength", integer(1)),
    config("gradient_checkpointing", "training.gradientCheckpointing", boolean, manual=True),
    config("report_to", "tracking.reportTo", choice(TRACKERS), manual=True, empty_is_absent=False),
    config("warmup_ratio", "training.warmupRatio", number(0, below=1)),
    config("warmup_steps", "training.warmupSteps", integer(0)),
    config("weight_decay", "training.weightDecay", number(0)),
    config("max_grad_norm", "training.maxGradNorm", number(0)),
    config("logging_steps", "tracking.loggingSteps", integer(1)),
    config("max_steps", "training.maxSteps", integer(1)),
    config("save_total_limit", "checkpoint.keep", integer(1)),
    config("seed", "training.seed", integer(0, 4294967295)),
    config("beta", "trainer.dpo.beta", number(0), manual=True),
    config("num_generations", "trainer.grpo.numGenerations", integer(2), manual=True),
    config("temperature", "trainer.grpo.temperature", number(above=0), manual=True),
)  # fmt: skip
FIXED = "fixed in its code"
PROFILE: tuple[Fill, ...] = (
    Fill("method.type", "lora", FIXED),
    Fill("method.lora.rank", 128, FIXED),
    Fill("method.lora.alpha", 64, FIXED),
    Fill("method.lora.dropout", 0, "fixed in its code for Unsloth", lambda d: d.value("trainer.backend") == "unsloth"),
    Fill("method.lora.dropout", 0.05, FIXED),
    Fill("method.lora.targetModules", PROJECTIONS, FIXED),
    Fill("method.lora.bias", "none", FIXED),
    Fill("model.dtype", "bfloat16", FIXED),
    Fill("model.attention", "flashAttention2", FIXED, lambda d: d.value("trainer.backend") != "unsloth"),
    Fill("trainer.type", "sft", "code default"),
    Fill("training.batchSizePerDevice", 2, "code default"),
    Fill("training.gradientAccumulationSteps", 4, "code default"),
    Fill("training.optimizer", "adamw_torch_fused", "code default"),
    Fill("training.epochs", 1, "code default"),
    Fill("training.scheduler", "cosine", "code default"),
    Fill("training.warmupRatio", 0.1, FIXED, lambda d: not d.has("training.warmupSteps")),
    Fill("training.weightDecay", 0, FIXED),
    Fill("training.maxGradNorm", 1, FIXED),
    Fill("training.mixedPrecision", "bf16", FIXED),
    Fill("dataset.maxSequenceLength", 2048, "code default"),
    Fill("dataset.responseOnly.enabled", False, FIXED, lambda d: d.value("trainer.type", "sft") == "sft"),
    Fill("dataset.useChatTemplate", True, FIXED, lambda d: d.value("dataset.format") not in ("plainText", None)),
    Fill("checkpoint.strategy", "steps", FIXED),
    Fill("checkpoint.steps", 100, "code default"),
    Fill("checkpoint.keep", 0, FIXED),
    Fill("output.dir", "adapters", FIXED),
    Fill("output.layout", "flat", FIXED),
    Fill("tracking.loggingSteps", 50, FIXED),
)  # fmt: skip
SHIPPED: dict[str, Any] = {
    "training_config.model": "./my_saved_model/qwen3-full", "training_config.trainer": "SFT", "training_config.distributed_training": "Unsloth",
    "training_config.per_device_train_batch_size": 2, "training_config.gradient_acc_steps": 1, "training_config.optim": "adamw_torch_fused",
    "training_config.learning_rate": 5e-5, "training_config.num_train_epochs": 2, "training_config.lr_scheduler_type": "cosine",
    "training_config.save_steps": 100, "training_config.max_completion_length": 2048, "training_config.max_seq_length": 4096,
    "training_config.gradient_checkpointing": True, "training_config.report_to": "tensorboard", "dataset.path": None, "dataset.format": "standard",
}  # fmt: skip
"""What that tool's own configuration files say: the base of overrides that come without a file."""


def key_of(key: str) -> str:
    """One spelling for group names and dashed flags: `--a-b` and `training.a_b` are `training_config.a_b`."""
    if key.startswith("--"):
        name = key.lstrip("-").replace("-", "_")
        return {"dataset": "dataset.path", "format": "dataset.format"}.get(name, f"training_config.{name}")
    head, dot, rest = key.partition(".")
    if not dot:
        return f"training_config.{key}" if key not in GROUPS else key
    return f"training_config.{rest}" if head in GROUPS else key


KNOWN = frozenset(key_of(row.key) for row in ROWS)


# --- reading --------------------------------------------------------------------------------------------------------

FLAT_MARKS = ("distributed_training", "gradient_acc_steps", "max_completion_length")
FLAG_MARKS = (
    "--distributed-training",
    "--gradient-acc-steps",
    "--max-completion-length",
    "---max-seq-length",
    "--trainer",
    "--num-train-epochs",
)


def recognise(documents: tuple[Document, ...], words: tuple[str, ...]) -> bool:
    """A mapping with a training group, a flat group file, a folder of groups, or that tool's flags and overrides."""
    if not documents:
        return any(
            w.partition("=")[0] in FLAG_MARKS or re.match(r"^[+~]*(training_configs?|training|dataset)[.=]", w)
            for w in words
        )
    for document in documents:
        if document.folder:
            return _config_file(document.path) is not None or any(_options(document.path))
        found = sniff(document)
        model = found.get("model")
        if any(isinstance(found.get(group), dict) for group in GROUPS[:2]):
            return True
        if any(mark in found for mark in FLAT_MARKS) or any(
            isinstance(one, str) and re.match(r"^(training_configs?|training)(:|$)", str(one))
            for one in found.get("defaults") or []
        ):
            return True
        if isinstance(found.get("defaults"), list) or (
            isinstance(found.get("training"), dict) and "distributed_training" in found["training"] and model is None
        ):
            return True
    return False


def read(draft: Draft) -> Iterator[Entry]:
    """Compose files and overrides with Hydra, or take the older dashed flags."""
    words, config = _config_name(draft, after_launcher(draft.request.words))
    bases = [document for document in draft.documents if not is_accelerate(document)]
    dashed = _dashed(words)
    if len(bases) > 1:
        draft.mistakes.append(
            Mistake(
                ", ".join(d.name for d in bases),
                "",
                "one base file or folder is needed",
                "give one, and the accelerate file beside it",
            )
        )
        return
    if dashed:
        if bases:
            yield from _composed(draft, bases[0], [], config)
        yield from _flags(draft, words)
    elif bases:
        yield from _composed(draft, bases[0], words, config)
    else:
        yield from _shipped(draft, words)


def _dashed(words: Iterable[str]) -> bool:
    """Whether the older flags are used; Hydra's own are none of them."""
    names = (word.partition("=")[0] for word in words)
    return any(name.startswith("--") and name not in (*CONFIG_NAME, *CONFIG_PLACE) for name in names)


CONFIG_NAME = ("--config-name", "-cn")
CONFIG_PLACE = ("--config-path", "-cp", "--config-dir", "-cd")


def _config_name(draft: Draft, words: list[str]) -> tuple[list[str], str]:
    """Hydra's own flags taken out: the primary file's name, `config` if none is given; where it lies is what we are given."""
    rest, kept, name = list(words), [], "config"
    while rest:
        word, equals, value = rest[0].partition("=")
        if word not in (*CONFIG_NAME, *CONFIG_PLACE):
            kept.append(rest.pop(0))
            continue
        rest.pop(0)
        if not equals and rest:
            value = rest.pop(0)
        if not value:
            draft.mistakes.append(Mistake("command line", word, "it has no value", f"write {word} VALUE"))
        elif word in CONFIG_NAME:
            name = value.removesuffix(".yaml")
    return kept, name


def _flags(draft: Draft, words: list[str]) -> Iterator[Entry]:
    flags = parse_flags(words, lambda name: True)
    stray_mistakes(draft, flags)
    known = sorted({f"--{key.partition('.')[2].replace('_', '-')}" for key in KNOWN} | {"--dataset", "--format"})
    for name, value in flags.pairs:
        if key_of(name) not in KNOWN:
            near = nearest(name, known)
            draft.mistakes.append(
                Mistake("command line", name, "unknown option", f"did you mean {near}?" if near else "remove it")
            )
        elif value is None:
            draft.mistakes.append(Mistake("command line", name, "it has no value", f"write {name} VALUE"))
        else:
            yield flag_entry(
                "--" + name.lstrip("-"),
                None if value.lower() in ("null", "none") and key_of(name).endswith("report_to") else value,
            )


# --- Hydra ----------------------------------------------------------------------------------------------------------


def _config_file(folder: Path, name: str = "config") -> Path | None:
    """The primary file of a folder."""
    places = (folder, folder / "configs", folder / "conf", folder / ".hydra")
    return next((place / f"{name}.yaml" for place in places if (place / f"{name}.yaml").is_file()), None)


def _options(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(group, option names) of a folder without a primary file."""
    for base in (folder, folder / "configs", folder / "conf"):
        for group in ("dataset", *GROUPS):
            names = sorted(path.stem for path in (base / group).glob("*.yaml"))
            if names:
                yield group, names


def _shipped(draft: Draft, words: list[str]) -> Iterator[Entry]:
    """Overrides without a file change that tool's own configuration."""
    draft.note("no file is given: the overrides change the configuration that comes with that tool")
    base: dict[str, Any] = {"dataset": {}, "training_config": {}}
    for key, value in SHIPPED.items():
        group, _, name = key.partition(".")
        base[group][name] = value
    from omegaconf import OmegaConf

    fitting = _fitting(draft, words, frozenset(SHIPPED), frozenset())
    yield from _leaves(draft, _apply(OmegaConf.create(base), fitting), "that tool's own configuration", _places(words))


def _composed(draft: Draft, document: Document, words: list[str], config: str) -> Iterator[Entry]:
    """One file or folder, composed and overridden as Hydra does it."""
    from omegaconf.errors import OmegaConfBaseException

    path = _config_file(document.path, config) if document.folder else document.path
    places: dict[str, str] = {}
    if path is None and config != "config":
        draft.mistakes.append(Mistake(document.name, "--config-name", f"{config}.yaml is not in it", "name another"))
        return
    try:
        if path is None:
            composed = _from_groups(draft, document, words, places)
        else:
            text = Document(path, read_text(path)) if document.folder else document
            tree = parse(text)
            composed = _from_file(draft, text, tree, words, places)
            places |= _lines(text.name, tree)
    except OmegaConfBaseException as error:
        raise Refused([Mistake(document.name, "", f"it cannot be read: {str(error).splitlines()[0]}")]) from None
    if composed is not None:
        yield from _leaves(draft, composed, document.name, places | _places(words))


def _lines(name: str, tree: Tree, group: str = "") -> dict[str, str]:
    """`file:line` of every key of a file; of a file without groups they belong to the training group."""
    flat = not group and not any(isinstance(value, dict) for value in tree.value.values())
    prefix = f"{group or 'training_config'}." if group or flat else ""
    return {f"{prefix}{path}": f"{name}:{line}" for path, line in tree.lines.items() if path}


def _from_groups(draft: Draft, document: Document, words: list[str], places: dict[str, str]) -> Any:
    """A folder of groups without a primary file: the only option of each, or the one that is named; None after a mistake."""
    found = dict(_options(document.path))
    chosen = {group for group in found if any(word.lstrip("+").startswith(f"{group}=") for word in words)}
    crowded = {group: names for group, names in found.items() if len(names) > 1 and group not in chosen}
    for group, names in crowded.items():
        message, hint = f"several options: {', '.join(names)}", f"choose one: -- {group}={names[0]}"
        draft.mistakes.append(Mistake(document.name, group, message, hint))
    if crowded:
        return None
    overrides = [f"+{group}={names[0]}" for group, names in found.items() if group not in chosen]
    overrides += [f"+{word}" if word.partition("=")[0] in found else word for word in words]
    places = (document.path, document.path / "configs", document.path / "conf")
    holding = (place for place in places if any((place / group).is_dir() for group in ("dataset", *GROUPS)))
    return _compose(draft, next(holding, document.path), None, overrides, places)


def _from_file(draft: Draft, document: Document, tree: Tree, words: list[str], places: dict[str, str]) -> Any:
    """A primary file: with a `defaults` list the folder around it is composed, without one it is complete."""
    from omegaconf import OmegaConf

    defaults = tree.value.get("defaults")
    if defaults is not None and not isinstance(defaults, list):
        place = f"{document.name}:{tree.lines['defaults']}"
        raise Refused([Mistake(place, "defaults", "it is not a list", "write `- group: option` lines")])
    if defaults:
        return _compose(draft, document.path.parent, document.path.stem, words, places)
    wrong = [group for group in ("dataset", *GROUPS) if group in tree.value and not isinstance(tree.value[group], dict)]
    if wrong:
        places = {group: f"{document.name}:{tree.lines[group]}" for group in wrong}
        raise Refused(
            [Mistake(places[one], one, "it is not a group of options", "write name: value below it") for one in wrong]
        )
    flat = not any(isinstance(value, dict) for value in tree.value.values())
    value: dict[str, Any] = {"training_config": tree.value} if flat else tree.value
    fitting = _fitting(draft, words, _keys(value), frozenset())
    loaded = OmegaConf.create(document.text)
    return _apply(OmegaConf.create({"training_config": loaded}) if flat else loaded, fitting)


def _keys(value: dict[str, Any]) -> frozenset[str]:
    return frozenset(
        f"{group}.{key}" for group, inner in value.items() if isinstance(inner, dict) for key in inner
    ) | frozenset(value)


def _parsed(draft: Draft, words: list[str]) -> list[Any]:
    """Overrides by Hydra's own parser; what it refuses, and sweeps, are mistakes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, result = OverridesParser.create(), []
    for word in words:
        if word in ("-m", "--multirun"):
            draft.mistakes.append(
                Mistake(
                    "command line", word, "a sweep makes several jobs, and a FineTuneJob is one", "import each of them"
                )
            )
            continue
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            draft.mistakes.append(
                Mistake(
                    "command line",
                    word.partition("=")[0],
                    "it is not an override that Hydra reads",
                    str(error).splitlines()[0],
                )
            )
            continue
        if override.is_sweep_override():
            draft.mistakes.append(
                Mistake(
                    "command line",
                    override.key_or_group,
                    "a comma makes a sweep, and a sweep needs -m",
                    f"quote the value: '{override.key_or_group}=\"...\"'",
                )
            )
            continue
        result.append(override)
    return result


def _fitting(draft: Draft, words: list[str], present: frozenset[str], groups: frozenset[str]) -> list[str]:
    """The overrides that can be applied: known keys, `+` only for new ones. The others are mistakes, told all at once."""
    fitting: list[str] = []
    for override in _parsed(draft, words):
        key, line = override.key_or_group, str(override.input_line)
        if key in groups:
            fitting.append(line)
            continue
        if key_of(key) not in KNOWN:
            near = nearest(
                key,
                [
                    spelled
                    for one in KNOWN
                    for spelled in (one, *(one.replace("training_config", g, 1) for g in GROUPS))
                ],
            )
            plus = "; + is only for keys known here" if override.is_add() else ""
            draft.mistakes.append(
                Mistake("command line", key, "unknown key", (f"did you mean {near}?" if near else "remove it") + plus)
            )
        elif override.is_delete() or override.is_force_add():
            fitting.append(line)
        elif override.is_add() and key in present:
            draft.mistakes.append(
                Mistake("command line", f"+{key}", "it is there already", f"write {key}=... without +")
            )
        elif not override.is_add() and key not in present:
            draft.mistakes.append(Mistake("command line", key, "it is not in the file", f"write +{key}=... to add it"))
        else:
            fitting.append(line)
    return fitting


def _apply(composed: Any, words: list[str]) -> Any:
    """Apply overrides that fit to a plain configuration."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(words), composed)
    return composed


def _compose(draft: Draft, folder: Path, name: str | None, words: list[str], places: dict[str, str]) -> Any:
    """Compose a folder of groups, and tell the places of the chosen files' keys; Hydra's own complaint becomes a mistake."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    groups = frozenset(path.name for path in folder.iterdir() if path.is_dir())
    kept = [str(one.input_line) for one in _parsed(draft, words)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder.resolve()), version_base="1.3"):
            chosen = [w for w in kept if w.lstrip("+~").partition("=")[0] in groups]
            base = compose(config_name=name, overrides=chosen)
            present = _keys({key: value for key, value in _plain(base).items() if isinstance(value, dict)}) | groups
            composed = compose(
                config_name=name, overrides=_fitting(draft, kept, present, groups), return_hydra_config=True
            )
            for group, option in composed.hydra.runtime.choices.items():
                file = folder / group / f"{option}.yaml"
                if file.is_file():
                    document = Document(file, read_text(file))
                    places |= _lines(f"{group}/{document.name}", parse(document), group)
            return composed
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        # The last two: what Hydra lets through of its own parsers for files that are no configurations.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise Refused(
            [Mistake(folder.name, "", f"Hydra cannot compose it: {lines[0]}", " ".join(lines[1:4]))]
        ) from None
    finally:
        GlobalHydra.instance().clear()


def _plain(composed: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(composed, resolve=False)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _places(words: list[str]) -> dict[str, str]:
    """Where an overridden key was written."""
    return {word.lstrip("+~").partition("=")[0]: f"command line {word.partition('=')[0]}" for word in words}


RESOLVER = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*:\s*([^,}\s]+)")


def _leaves(draft: Draft, composed: Any, file: str, places: dict[str, str]) -> Iterator[Entry]:
    """Every value after interpolation; the environment is read for allowed names only."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for group, inner in _plain(composed).items():
        if group == "hydra":
            continue
        leaves = inner.items() if isinstance(inner, dict) else [("", inner)]
        for key, raw in leaves:
            path = f"{group}.{key}" if key else group
            origin = Origin(places.get(path, file))
            if isinstance(raw, str) and "${" in raw and not _allowed(draft, path, raw, origin):
                continue
            try:
                value = OmegaConf.select(composed, path)
            except OmegaConfBaseException as error:
                draft.mistakes.append(Mistake(origin.place, path, f"{str(error).splitlines()[0]}"))
                continue
            if raw == "???":
                draft.mistakes.append(
                    Mistake(origin.place, path, "it is marked as missing (???)", f"give {path}=VALUE")
                )
                continue
            yield Entry(path, value, origin)


def _allowed(draft: Draft, path: str, raw: str, origin: Origin) -> bool:
    fine = True
    for resolver, name in RESOLVER.findall(raw):
        if resolver != "oc.env":
            draft.mistakes.append(
                Mistake(origin.place, path, f"the resolver {resolver} is not offered", "write the value itself")
            )
            fine = False
        elif name not in draft.request.allow_env:
            draft.mistakes.append(
                Mistake(
                    origin.place,
                    path,
                    f"it reads the environment variable {name}, which is not allowed",
                    f"allow it with --allow-env {name}",
                )
            )
            fine = False
        elif name not in draft.request.environment and "," not in raw:
            draft.mistakes.append(
                Mistake(origin.place, path, f"variable {name} is not set", f"set {name}, or write the value itself")
            )
            fine = False
    return fine


# --- options that belong together -----------------------------------------------------------------------------------


def combine(draft: Draft) -> None:
    """What one option of that tool means depends on others."""
    place_source(draft, "training_config.model", "model.source")
    found = str(draft.get("dataset.path", ""))
    place_source(draft, "dataset.path", "dataset.train", always_local=is_local(found))
    if (
        not draft.wrote("dataset.path")
        and (draft.wrote("dataset.format") or _dashed(draft.request.words))
        and "dataset.train" not in draft.request.own
    ):
        draft.mistakes.append(
            Mistake(draft.where, "dataset.path", "it is missing, and it is required", "add it, or give --data URI")
        )
        draft.broken["dataset.path"] = "dataset.train"
    _learning_rate(draft)
    for document in draft.documents:
        if is_accelerate(document):
            _with_accelerate(draft, document)
    _strategy(draft)
    _format(draft)
    _objective(draft)
    _checkpointing(draft)
    _report(draft)


def _learning_rate(draft: Draft) -> None:
    if draft.wrote("training_config.learning_rate"):
        return
    if _dashed(draft.request.words) and not [d for d in draft.documents if not is_accelerate(d)]:
        draft.fill("training.learningRate", 2e-4, "page advice")
        draft.note("no learning rate is given: 2e-4, as that tool's page advises for its flags")
    else:
        draft.fill("training.learningRate", 5e-5, "code default")


def _with_accelerate(draft: Draft, document: Document) -> None:
    """The strategy of the file is set first, so that another one there is told as a contradiction."""
    wanted = draft.given.get("training_config.distributed_training")
    if wanted is not None:
        draft.put(
            "distributed.strategy",
            "none" if wanted.value == "unsloth" else wanted.value,
            "training_config.distributed_training",
        )
    read_accelerate(draft, document)


def _strategy(draft: Draft) -> None:
    key = "training_config.distributed_training"
    if key in draft.broken:
        return
    given = draft.given.get(key)
    if given is None and draft.has("distributed.strategy"):
        draft.fill("trainer.backend", "transformers", "fixed in its code")
        return
    wanted = given.value if given else "unsloth"
    backend, strategy = ("unsloth", "none") if wanted == "unsloth" else ("transformers", wanted)
    if given:
        draft.put("trainer.backend", backend, key)
        draft.put("distributed.strategy", strategy, key)
    else:
        draft.fill("trainer.backend", backend, "page default")
        draft.fill("distributed.strategy", strategy, "page default")
    if strategy == "fsdp":
        assume_ranks(draft, "FSDP")


def _format(draft: Draft) -> None:
    if "dataset.format" in draft.given:
        draft.put("dataset.format", draft.get("dataset.format"), "dataset.format")
    form = draft.get("dataset.format")
    for column, name in COLUMNS.get(str(form), {}).items():
        draft.fill(f"dataset.columns.{column}", name, "fixed in its code")
    if form == "messages":
        draft.fill("dataset.systemPrompt", SYSTEM_PROMPT, "fixed in its code")


def _objective(draft: Draft) -> None:
    trainer = draft.get("training_config.trainer", "sft")
    if "training_config.beta" in draft.given:
        path = {"dpo": "trainer.dpo.beta", "grpo": "trainer.grpo.beta"}.get(trainer)
        _put_or_warn(draft, "training_config.beta", path)
    for key in ("num_generations", "temperature"):
        name = {"num_generations": "numGenerations"}.get(key, key)
        _put_or_warn(draft, f"training_config.{key}", f"trainer.grpo.{name}" if trainer == "grpo" else None)
    if trainer != "sft":
        _completions(draft)
    if trainer == "grpo":
        _grpo(draft)


def _completions(draft: Draft) -> None:
    """That tool's two limits may be equal, which leaves nothing to the prompt: then each gets one half."""
    path, key = "trainer.maxCompletionLength", "training_config.max_completion_length"
    wanted, whole = draft.get(key, 2048), draft.get("training_config.max_seq_length", 2048)
    half = max(1, whole // 2)
    if wanted < whole and key not in draft.given:
        draft.fill(path, wanted, "code default")
    elif wanted >= whole and key in draft.given:
        given = draft.given[key]
        draft.put(path, half, key)
        draft.warn(
            f"{given.origin.place}: {given.key}: {wanted} leaves no room in {whole} tokens to the prompt: {half} is written"
        )
    elif key not in draft.broken:
        draft.fill(path, half, f"our choice: the code's 2048 leaves no room in {whole} tokens to the prompt")


def _put_or_warn(draft: Draft, key: str, path: str | None) -> None:
    given = draft.given.get(key)
    if given is None:
        return
    if path:
        draft.put(path, given.value, key)
    else:
        draft.warn(f"{given.origin.place}: {given.key} has no effect with this trainer")


def _grpo(draft: Draft) -> None:
    draft.fill("trainer.rewards", [{"builtin": "citationFormat"}], "fixed in its code")
    draft.note(
        "trainer GRPO: the reward of that tool's code, citationFormat, is filled in; name others in trainer.rewards"
    )
    rows = int(draft.get("training_config.per_device_train_batch_size", 2)) * int(
        draft.get("training_config.gradient_acc_steps", 4)
    )
    wanted = int(draft.get("training_config.num_generations", 8))
    if rows % wanted and "training_config.num_generations" not in draft.given:
        fitting = next((n for n in range(min(wanted, rows), 1, -1) if rows % n == 0), None)
        if fitting is None:
            draft.fill(
                "training.gradientAccumulationSteps", 8, "our choice: GRPO compares several completions in a step"
            )
        else:
            draft.fill("trainer.grpo.numGenerations", fitting, "our choice: divides the completions of a step")
            draft.note(f"GRPO samples {fitting} completions for a prompt, since 8 do not divide the {rows} of one step")


def _checkpointing(draft: Draft) -> None:
    key, path = "training_config.gradient_checkpointing", "training.gradientCheckpointing"
    on = "unsloth" if draft.value("trainer.backend") == "unsloth" else "enabled"
    if key in draft.given:
        draft.put(path, on if draft.get(key) else "disabled", key)
    elif key not in draft.broken:
        draft.fill(path, on, "code default")


def _report(draft: Draft) -> None:
    key = "training_config.report_to"
    if key in draft.given:
        draft.put("tracking.reportTo", draft.get(key), key)
    elif key not in draft.broken:
        flags = _dashed(draft.request.words)
        draft.fill("tracking.reportTo", ["wandb"] if flags else ["tensorboard"], "code default")


IMPORTER = Importer("hydra", "this Hydra tool", ROWS, PROFILE, recognise, read, combine, key_of)
