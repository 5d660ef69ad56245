"""Composes Hydra configurations and applies overrides, using the Hydra library.

Hydra needs a primary file, does not return the line of a value, and stops at the first mistake. This module also composes folders
without a primary file, records the line of each value, and reports all mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune_cli.files import read_text
from finetune_cli.importers.documents import parse_document
from finetune_cli.importers.draft import InputDocument, JobDraft, OptionEntry
from finetune_cli.mistakes import InvalidInput, Mistake
from finetune_cli.provenance import ValueOrigin
from finetune_cli.suggestions import closest_name
from finetune_cli.yaml_reader import Tree

GROUPS = ("training_config", "training_configs", "training")


def normalise_key(key: str) -> str:
    """Normalise group names and dashed flags: `--a-b` and `training.a_b` become `training_config.a_b`."""
    if key.startswith("--"):
        name = key.lstrip("-").replace("-", "_")
        return {"dataset": "dataset.path", "format": "dataset.format"}.get(name, f"training_config.{name}")
    head, dot, rest = key.partition(".")
    if not dot:
        return f"training_config.{key}" if key not in GROUPS else key
    return f"training_config.{rest}" if head in GROUPS else key


CONFIG_NAME = ("--config-name", "-cn")
CONFIG_FOLDER = ("--config-path", "-cp", "--config-dir", "-cd")


def split_hydra_flags(draft: JobDraft, words: list[str]) -> tuple[list[str], str]:
    """Separate Hydra's own flags. Returns all other words, and the name of the primary file (default `config`).

    Flags for the folder are ignored, because the folder is an argument of `finetune import`.
    """
    remaining, overrides, name = list(words), [], "config"
    while remaining:
        word, equals, value = remaining[0].partition("=")
        if word not in (*CONFIG_NAME, *CONFIG_FOLDER):
            overrides.append(remaining.pop(0))
            continue
        remaining.pop(0)
        if not equals and remaining:
            value = remaining.pop(0)
        if not value:
            draft.mistakes.append(Mistake("command line", word, "the value is missing", f"write {word} VALUE"))
        elif word in CONFIG_NAME:
            name = value.removesuffix(".yaml")
    return overrides, name


def has_dashed_flags(words: Iterable[str]) -> bool:
    """Return whether the words are the tool's older command line: they contain dashed flags other than Hydra's."""
    names = (word.partition("=")[0] for word in words)
    return any(name.startswith("--") and name not in (*CONFIG_NAME, *CONFIG_FOLDER) for name in names)


def config_file(folder: Path, name: str = "config") -> Path | None:
    """Return the primary file of a folder, or None if the folder has no primary file."""
    folders = (folder, folder / "configs", folder / "conf", folder / ".hydra")
    return next((candidate / f"{name}.yaml" for candidate in folders if (candidate / f"{name}.yaml").is_file()), None)


def options_by_group(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each group of a folder with the names of its options."""
    for base in (folder, folder / "configs", folder / "conf"):
        for group in ("dataset", *GROUPS):
            names = sorted(path.stem for path in (base / group).glob("*.yaml"))
            if names:
                yield group, names


def read_shipped(draft: JobDraft, words: list[str], values: dict[str, Any]) -> Iterator[OptionEntry]:
    """Apply the overrides to the tool's own configuration, because no file is given."""
    draft.add_note("no file is given, so the overrides apply to the tool's own configuration")
    shipped_config: dict[str, Any] = {"dataset": {}, "training_config": {}}
    for key, value in values.items():
        group, _, name = key.partition(".")
        shipped_config[group][name] = value
    from omegaconf import OmegaConf

    applicable_words = _select_applicable(draft, words, frozenset(values), frozenset())
    yield from _iterate_entries(
        draft, _apply_overrides(OmegaConf.create(shipped_config), applicable_words), "the tool's own configuration", _override_locations(words)
    )


def read_composed(draft: JobDraft, document: InputDocument, words: list[str], config: str) -> Iterator[OptionEntry]:
    """Compose one file or folder and apply the overrides."""
    from omegaconf.errors import OmegaConfBaseException

    path = config_file(document.path, config) if document.is_folder else document.path
    locations: dict[str, str] = {}
    if path is None and config != "config":
        draft.mistakes.append(
            Mistake(document.name, "--config-name", f"the folder has no {config}.yaml", "give another name")
        )
        return
    try:
        if path is None:
            composed_config = _read_group_folder(draft, document, words, locations)
        else:
            primary = InputDocument(path, read_text(path)) if document.is_folder else document
            tree = parse_document(primary)
            composed_config = _read_primary_file(draft, primary, tree, words, locations)
            locations |= _line_locations(primary.name, tree)
    except OmegaConfBaseException as error:
        raise InvalidInput(
            [Mistake(document.name, "", f"the configuration cannot be read: {str(error).splitlines()[0]}")]
        ) from None
    if composed_config is not None:
        yield from _iterate_entries(draft, composed_config, document.name, locations | _override_locations(words))


def _line_locations(name: str, tree: Tree, group: str = "") -> dict[str, str]:
    """Return `file:line` of every key of a file. The keys of a file without groups belong to the training group."""
    is_flat = not group and not any(isinstance(value, dict) for value in tree.value.values())
    prefix = f"{group or 'training_config'}." if group or is_flat else ""
    return {f"{prefix}{path}": f"{name}:{line}" for path, line in tree.lines.items() if path}


def _read_group_folder(draft: JobDraft, document: InputDocument, words: list[str], locations: dict[str, str]) -> Any:
    """Compose a folder of groups without a primary file. A group with several options needs a choice in `words`.

    Returns None after a mistake.
    """
    names_by_group = dict(options_by_group(document.path))
    chosen_groups = {group for group in names_by_group if any(word.lstrip("+").startswith(f"{group}=") for word in words)}
    ambiguous_groups = {group: names for group, names in names_by_group.items() if len(names) > 1 and group not in chosen_groups}
    for group, names in ambiguous_groups.items():
        message, hint = f"the group has several options: {', '.join(names)}", f"choose one: -- {group}={names[0]}"
        draft.mistakes.append(Mistake(document.name, group, message, hint))
    if ambiguous_groups:
        return None
    overrides = [f"+{group}={names[0]}" for group, names in names_by_group.items() if group not in chosen_groups]
    overrides += [f"+{word}" if word.partition("=")[0] in names_by_group else word for word in words]
    folders = (document.path, document.path / "configs", document.path / "conf")
    with_groups = (
        candidate for candidate in folders if any((candidate / group).is_dir() for group in ("dataset", *GROUPS))
    )
    return _compose_config(draft, next(with_groups, document.path), None, overrides, locations)


def _read_primary_file(draft: JobDraft, document: InputDocument, tree: Tree, words: list[str], locations: dict[str, str]) -> Any:
    """Load a primary file. If the file has a `defaults` list, compose its folder. Otherwise the file is the whole configuration."""
    from omegaconf import OmegaConf

    defaults = tree.value.get("defaults")
    if defaults is not None and not isinstance(defaults, list):
        location = f"{document.name}:{tree.lines['defaults']}"
        raise InvalidInput([Mistake(location, "defaults", "this is not a list", "write `- group: option` lines")])
    if defaults:
        return _compose_config(draft, document.path.parent, document.path.stem, words, locations)
    invalid_groups = [
        group for group in ("dataset", *GROUPS) if group in tree.value and not isinstance(tree.value[group], dict)
    ]
    if invalid_groups:
        group_lines = {group: f"{document.name}:{tree.lines[group]}" for group in invalid_groups}
        raise InvalidInput(
            [
                Mistake(group_lines[group], group, f"`{group}` is not a Hydra config group", "write its options below it as `name: value`")
                for group in invalid_groups
            ]
        )
    is_flat = not any(isinstance(value, dict) for value in tree.value.values())
    value: dict[str, Any] = {"training_config": tree.value} if is_flat else tree.value
    applicable_words = _select_applicable(draft, words, _all_keys(value), frozenset())
    loaded_config = OmegaConf.create(document.text)
    return _apply_overrides(OmegaConf.create({"training_config": loaded_config}) if is_flat else loaded_config, applicable_words)


def _all_keys(value: dict[str, Any]) -> frozenset[str]:
    return frozenset(
        f"{group}.{key}" for group, inner in value.items() if isinstance(inner, dict) for key in inner
    ) | frozenset(value)


def _parse_overrides(draft: JobDraft, words: list[str]) -> list[Any]:
    """Parse overrides with Hydra. Record a mistake for each override that Hydra rejects and for each multirun sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, result = OverridesParser.create(), []
    for word in words:
        if word in ("-m", "--multirun"):
            draft.mistakes.append(
                Mistake(
                    "command line",
                    word,
                    "a sweep runs several jobs, but an import creates only one FineTuneJob",
                    "import each combination separately",
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
                    "Hydra cannot parse this override",
                    str(error).splitlines()[0],
                )
            )
            continue
        if override.is_sweep_override():
            draft.mistakes.append(
                Mistake(
                    "command line",
                    override.key_or_group,
                    "a comma means a sweep, and sweeps are not supported",
                    f"quote the value: '{override.key_or_group}=\"...\"'",
                )
            )
            continue
        result.append(override)
    return result


def _select_applicable(draft: JobDraft, words: list[str], present_keys: frozenset[str], groups: frozenset[str]) -> list[str]:
    """Return the valid overrides. An unknown key is a mistake. A key that the file lacks needs `+`; a key in the file must not have `+`."""
    applicable_words: list[str] = []
    known_keys = {normalise_key(row.key) for row in draft.rows}
    for override in _parse_overrides(draft, words):
        key, line = override.key_or_group, str(override.input_line)
        if key in groups:
            applicable_words.append(line)
            continue
        if normalise_key(key) not in known_keys:
            closest = closest_name(
                key,
                [
                    spelling
                    for key_of_tool in sorted(known_keys)
                    for spelling in (key_of_tool, *(key_of_tool.replace("training_config", g, 1) for g in GROUPS))
                ],
            )
            plus_hint = "; + can only add keys of this tool" if override.is_add() else ""
            draft.mistakes.append(
                Mistake(
                    "command line", key, "unknown key", (f"did you mean {closest}?" if closest else "remove it") + plus_hint
                )
            )
        elif override.is_delete() or override.is_force_add():
            applicable_words.append(line)
        elif override.is_add() and key in present_keys:
            draft.mistakes.append(
                Mistake("command line", f"+{key}", "the key already exists", f"write {key}=... without +")
            )
        elif not override.is_add() and key not in present_keys:
            draft.mistakes.append(
                Mistake("command line", key, "the key is not in the file", f"write +{key}=... to add it")
            )
        else:
            applicable_words.append(line)
    return applicable_words


def _apply_overrides(composed_config: Any, words: list[str]) -> Any:
    """Apply overrides to a plain configuration."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(words), composed_config)
    return composed_config


def _compose_config(draft: JobDraft, folder: Path, name: str | None, words: list[str], locations: dict[str, str]) -> Any:
    """Compose a folder of groups and record the location of every key. Raises InvalidInput if Hydra cannot compose the folder."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    groups = frozenset(path.name for path in folder.iterdir() if path.is_dir())
    override_lines = [str(override.input_line) for override in _parse_overrides(draft, words)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder.resolve()), version_base="1.3"):
            chosen_groups = [w for w in override_lines if w.lstrip("+~").partition("=")[0] in groups]
            base = compose(config_name=name, overrides=chosen_groups)
            present_keys = (
                _all_keys({key: value for key, value in _to_dict(base).items() if isinstance(value, dict)}) | groups
            )
            composed_config = compose(
                config_name=name,
                overrides=_select_applicable(draft, override_lines, present_keys, groups),
                return_hydra_config=True,
            )
            for group, option in composed_config.hydra.runtime.choices.items():
                file = folder / group / f"{option}.yaml"
                if file.is_file():
                    document = InputDocument(file, read_text(file))
                    locations |= _line_locations(f"{group}/{document.name}", parse_document(document), group)
            return composed_config
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        # Hydra's parsers raise OSError and ValueError for files that are not configurations.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InvalidInput(
            [Mistake(folder.name, "", f"Hydra cannot compose the folder: {lines[0]}", " ".join(lines[1:4]))]
        ) from None
    finally:
        GlobalHydra.instance().clear()


def _to_dict(composed_config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(composed_config, resolve=False)
    return {str(key): value for key, value in container.items()} if isinstance(container, dict) else {}


def _override_locations(words: list[str]) -> dict[str, str]:
    """Return the location of each overridden key, for messages."""
    return {word.lstrip("+~").partition("=")[0]: f"command line {word.partition('=')[0]}" for word in words}


RESOLVER_PATTERN = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*:\s*([^,}\s]+)")


def _iterate_entries(draft: JobDraft, composed_config: Any, default_location: str, locations: dict[str, str]) -> Iterator[OptionEntry]:
    """Yield every value after interpolation. Only environment variables in `--allow-env` are read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for group, inner in _to_dict(composed_config).items():
        if group == "hydra":
            continue
        leaves = inner.items() if isinstance(inner, dict) else [("", inner)]
        for key, raw in leaves:
            path = f"{group}.{key}" if key else group
            origin = ValueOrigin(locations.get(path, default_location))
            if isinstance(raw, str) and "${" in raw and not _check_resolvers(draft, path, raw, origin):
                continue
            try:
                value = OmegaConf.select(composed_config, path)
            except OmegaConfBaseException as error:
                draft.mistakes.append(Mistake(origin.location, path, f"{str(error).splitlines()[0]}"))
                continue
            if raw == "???":
                draft.mistakes.append(
                    Mistake(origin.location, path, "the value is marked as missing (???)", f"give {path}=VALUE")
                )
                continue
            yield OptionEntry(path, value, origin)


def _check_resolvers(draft: JobDraft, path: str, raw_value: str, origin: ValueOrigin) -> bool:
    all_allowed = True
    for resolver, name in RESOLVER_PATTERN.findall(raw_value):
        if resolver != "oc.env":
            draft.mistakes.append(
                Mistake(origin.location, path, f"the resolver {resolver} is not supported", "write the value itself")
            )
            all_allowed = False
        elif name not in draft.request.allowed_variables:
            draft.mistakes.append(
                Mistake(
                    origin.location,
                    path,
                    f"the value reads the environment variable {name}, which is not allowed",
                    f"allow it with --allow-env {name}",
                )
            )
            all_allowed = False
        elif name not in draft.request.environment and "," not in raw_value:
            draft.mistakes.append(
                Mistake(
                    origin.location, path, f"variable {name} is not set", "set the variable, or write its value here"
                )
            )
            all_allowed = False
    return all_allowed
