"""Hydra's side of `hydra`: composition of folders and files, and the override grammar, by Hydra itself.

What Hydra would only do in its own program is done here: options of a folder without a primary file, the line of every value,
and a list of what does not fit instead of the first complaint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune_cli.files import read_text
from finetune_cli.importers.convert import nearest
from finetune_cli.importers.material import Document, Draft, Entry, Mistake, Origin, Refused
from finetune_cli.importers.yaml_tree import Tree, parse

GROUPS = ("training_config", "training_configs", "training")


def key_of(key: str) -> str:
    """One spelling for group names and dashed flags: `--a-b` and `training.a_b` are `training_config.a_b`."""
    if key.startswith("--"):
        name = key.lstrip("-").replace("-", "_")
        return {"dataset": "dataset.path", "format": "dataset.format"}.get(name, f"training_config.{name}")
    head, dot, rest = key.partition(".")
    if not dot:
        return f"training_config.{key}" if key not in GROUPS else key
    return f"training_config.{rest}" if head in GROUPS else key


CONFIG_NAME = ("--config-name", "-cn")
CONFIG_PLACE = ("--config-path", "-cp", "--config-dir", "-cd")


def config_name(draft: Draft, words: list[str]) -> tuple[list[str], str]:
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


def dashed(words: Iterable[str]) -> bool:
    """Whether the older flags are used; Hydra's own are none of them."""
    names = (word.partition("=")[0] for word in words)
    return any(name.startswith("--") and name not in (*CONFIG_NAME, *CONFIG_PLACE) for name in names)


def config_file(folder: Path, name: str = "config") -> Path | None:
    """The primary file of a folder."""
    places = (folder, folder / "configs", folder / "conf", folder / ".hydra")
    return next((place / f"{name}.yaml" for place in places if (place / f"{name}.yaml").is_file()), None)


def options(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(group, option names) of a folder without a primary file."""
    for base in (folder, folder / "configs", folder / "conf"):
        for group in ("dataset", *GROUPS):
            names = sorted(path.stem for path in (base / group).glob("*.yaml"))
            if names:
                yield group, names


def shipped(draft: Draft, words: list[str], values: dict[str, Any]) -> Iterator[Entry]:
    """Overrides without a file change that tool's own configuration."""
    draft.note("no file is given: the overrides change the configuration that comes with that tool")
    base: dict[str, Any] = {"dataset": {}, "training_config": {}}
    for key, value in values.items():
        group, _, name = key.partition(".")
        base[group][name] = value
    from omegaconf import OmegaConf

    fitting = _fitting(draft, words, frozenset(values), frozenset())
    yield from _leaves(draft, _apply(OmegaConf.create(base), fitting), "that tool's own configuration", _places(words))


def composed(draft: Draft, document: Document, words: list[str], config: str) -> Iterator[Entry]:
    """One file or folder, composed and overridden as Hydra does it."""
    from omegaconf.errors import OmegaConfBaseException

    path = config_file(document.path, config) if document.folder else document.path
    places: dict[str, str] = {}
    if path is None and config != "config":
        draft.mistakes.append(Mistake(document.name, "--config-name", f"{config}.yaml is not in it", "name another"))
        return
    try:
        if path is None:
            found = _from_groups(draft, document, words, places)
        else:
            text = Document(path, read_text(path)) if document.folder else document
            tree = parse(text)
            found = _from_file(draft, text, tree, words, places)
            places |= _lines(text.name, tree)
    except OmegaConfBaseException as error:
        raise Refused([Mistake(document.name, "", f"it cannot be read: {str(error).splitlines()[0]}")]) from None
    if found is not None:
        yield from _leaves(draft, found, document.name, places | _places(words))


def _lines(name: str, tree: Tree, group: str = "") -> dict[str, str]:
    """`file:line` of every key of a file; of a file without groups they belong to the training group."""
    flat = not group and not any(isinstance(value, dict) for value in tree.value.values())
    prefix = f"{group or 'training_config'}." if group or flat else ""
    return {f"{prefix}{path}": f"{name}:{line}" for path, line in tree.lines.items() if path}


def _from_groups(draft: Draft, document: Document, words: list[str], places: dict[str, str]) -> Any:
    """A folder of groups without a primary file: the only option of each, or the one that is named; None after a mistake."""
    found = dict(options(document.path))
    chosen = {group for group in found if any(word.lstrip("+").startswith(f"{group}=") for word in words)}
    crowded = {group: names for group, names in found.items() if len(names) > 1 and group not in chosen}
    for group, names in crowded.items():
        message, hint = f"several options: {', '.join(names)}", f"choose one: -- {group}={names[0]}"
        draft.mistakes.append(Mistake(document.name, group, message, hint))
    if crowded:
        return None
    overrides = [f"+{group}={names[0]}" for group, names in found.items() if group not in chosen]
    overrides += [f"+{word}" if word.partition("=")[0] in found else word for word in words]
    folders = (document.path, document.path / "configs", document.path / "conf")
    holding = (place for place in folders if any((place / group).is_dir() for group in ("dataset", *GROUPS)))
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
    known = {key_of(row.key) for row in draft.rows}
    for override in _parsed(draft, words):
        key, line = override.key_or_group, str(override.input_line)
        if key in groups:
            fitting.append(line)
            continue
        if key_of(key) not in known:
            near = nearest(
                key,
                [
                    spelled
                    for one in sorted(known)
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
