"""Composes Hydra configurations and applies overrides, with the Hydra library.

Hydra itself needs a primary file, does not report the line of a value, and stops at the first mistake. This module also composes folders
without a primary file, finds the line of each value, and reports all mistakes.
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
from finetune_cli.suggestions import find_closest_name
from finetune_cli.yaml_reader import Tree

TRAINING_GROUP_NAMES = ("training_config", "training_configs", "training")


def normalise_key(option_key: str) -> str:
    """Return the key of an option in the option table: `--a-b`, `a_b` and `training.a_b` become `training_config.a_b`."""
    if option_key.startswith("--"):
        name = option_key.lstrip("-").replace("-", "_")
        return {"dataset": "dataset.path", "format": "dataset.format"}.get(name, f"training_config.{name}")
    head, dot, rest = option_key.partition(".")
    if not dot:
        return f"training_config.{option_key}" if option_key not in TRAINING_GROUP_NAMES else option_key
    return f"training_config.{rest}" if head in TRAINING_GROUP_NAMES else option_key


CONFIG_NAME_FLAGS = ("--config-name", "-cn")
CONFIG_FOLDER_FLAGS = ("--config-path", "-cp", "--config-dir", "-cd")


def split_hydra_flags(draft: JobDraft, command_words: list[str]) -> tuple[list[str], str]:
    """Return two values: the words of the command line without Hydra's own flags, and the name of the primary file (default: `config`).

    The flags for the configuration folder are ignored, because the user gives this folder as an argument of `finetune import`.
    """
    remaining_words, kept_words, config_name = list(command_words), [], "config"
    while remaining_words:
        word, equals, value = remaining_words[0].partition("=")
        if word not in (*CONFIG_NAME_FLAGS, *CONFIG_FOLDER_FLAGS):
            kept_words.append(remaining_words.pop(0))
            continue
        remaining_words.pop(0)
        if not equals and remaining_words:
            value = remaining_words.pop(0)
        if not value:
            draft.mistakes.append(Mistake("command line", word, "the value is missing", f"write {word} VALUE"))
        elif word in CONFIG_NAME_FLAGS:
            config_name = value.removesuffix(".yaml")
    return kept_words, config_name


def has_dashed_flags(command_words: Iterable[str]) -> bool:
    """Return whether the command line is for an older release of the tool: it then has dashed flags that do not belong to Hydra."""
    flag_names = (word.partition("=")[0] for word in command_words)
    return any(name.startswith("--") and name not in (*CONFIG_NAME_FLAGS, *CONFIG_FOLDER_FLAGS) for name in flag_names)


def find_config_file(folder: Path, name: str = "config") -> Path | None:
    """Return the primary file of a folder, or None if the folder has no file with this name."""
    folders = (folder, folder / "configs", folder / "conf", folder / ".hydra")
    return next((candidate / f"{name}.yaml" for candidate in folders if (candidate / f"{name}.yaml").is_file()), None)


def list_group_options(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each Hydra group in a folder, and the names of its options. Each option of a group is a file with this name."""
    for base_folder in (folder, folder / "configs", folder / "conf"):
        for group in ("dataset", *TRAINING_GROUP_NAMES):
            option_names = sorted(path.stem for path in (base_folder / group).glob("*.yaml"))
            if option_names:
                yield group, option_names


def read_default_options(draft: JobDraft, command_words: list[str], shipped_values: dict[str, Any]) -> Iterator[OptionEntry]:
    """Apply the overrides to the configuration that the tool ships, and yield its options. `shipped_values`: its values, by dotted key."""
    draft.add_note("no file is given, so the overrides apply to the tool's own configuration")
    shipped_config: dict[str, Any] = {"dataset": {}, "training_config": {}}
    for key, value in shipped_values.items():
        group, _, name = key.partition(".")
        shipped_config[group][name] = value
    from omegaconf import OmegaConf

    valid_overrides = _select_valid_overrides(draft, command_words, frozenset(shipped_values), frozenset())
    yield from _iterate_entries(
        draft, _apply_overrides(OmegaConf.create(shipped_config), valid_overrides), "the tool's own configuration", _list_override_locations(command_words)
    )


def read_composed_options(draft: JobDraft, document: InputDocument, command_words: list[str], config_name: str) -> Iterator[OptionEntry]:
    """Compose one file or folder with Hydra, apply the overrides, and yield the resulting options."""
    from omegaconf.errors import OmegaConfBaseException

    primary_path = find_config_file(document.path, config_name) if document.is_folder else document.path
    locations: dict[str, str] = {}
    if primary_path is None and config_name != "config":
        draft.mistakes.append(
            Mistake(document.name, "--config-name", f"the folder has no {config_name}.yaml", "give another name")
        )
        return
    try:
        if primary_path is None:
            composed_config = _read_group_folder(draft, document, command_words, locations)
        else:
            primary_document = InputDocument(primary_path, read_text(primary_path)) if document.is_folder else document
            parsed_file = parse_document(primary_document)
            composed_config = _read_primary_file(draft, primary_document, parsed_file, command_words, locations)
            locations |= _list_line_locations(primary_document.name, parsed_file)
    except OmegaConfBaseException as error:
        raise InvalidInput(
            [Mistake(document.name, "", f"the configuration cannot be read: {str(error).splitlines()[0]}")]
        ) from None
    if composed_config is not None:
        yield from _iterate_entries(draft, composed_config, document.name, locations | _list_override_locations(command_words))


def _list_line_locations(name: str, parsed_file: Tree, group: str = "") -> dict[str, str]:
    """Return the location `file:line` of each key in a file. If the file has no groups, its keys belong to the training group."""
    is_flat = not group and not any(isinstance(value, dict) for value in parsed_file.value.values())
    prefix = f"{group or 'training_config'}." if group or is_flat else ""
    return {f"{prefix}{path}": f"{name}:{line}" for path, line in parsed_file.lines.items() if path}


def _read_group_folder(draft: JobDraft, document: InputDocument, command_words: list[str], locations: dict[str, str]) -> Any:
    """Compose a folder of groups without a primary file.

    Record a mistake and return None if a group has several options and `command_words` chooses none of them.
    """
    names_by_group = dict(list_group_options(document.path))
    chosen_groups = {group for group in names_by_group if any(word.lstrip("+").startswith(f"{group}=") for word in command_words)}
    ambiguous_groups = {group: names for group, names in names_by_group.items() if len(names) > 1 and group not in chosen_groups}
    for group, names in ambiguous_groups.items():
        message, hint = f"the group has several options: {', '.join(names)}", f"choose one: -- {group}={names[0]}"
        draft.mistakes.append(Mistake(document.name, group, message, hint))
    if ambiguous_groups:
        return None
    overrides = [f"+{group}={names[0]}" for group, names in names_by_group.items() if group not in chosen_groups]
    overrides += [f"+{word}" if word.partition("=")[0] in names_by_group else word for word in command_words]
    folders = (document.path, document.path / "configs", document.path / "conf")
    folders_with_groups = (
        candidate for candidate in folders if any((candidate / group).is_dir() for group in ("dataset", *TRAINING_GROUP_NAMES))
    )
    return _compose_config(draft, next(folders_with_groups, document.path), None, overrides, locations)


def _read_primary_file(draft: JobDraft, document: InputDocument, parsed_file: Tree, command_words: list[str], locations: dict[str, str]) -> Any:
    """Load a primary file and apply the overrides.

    If the file has a `defaults` list, it is composed with the other files of its folder. Otherwise the file is complete on its own.
    """
    from omegaconf import OmegaConf

    defaults = parsed_file.value.get("defaults")
    if defaults is not None and not isinstance(defaults, list):
        location = f"{document.name}:{parsed_file.lines['defaults']}"
        raise InvalidInput([Mistake(location, "defaults", "this is not a list", "write `- group: option` lines")])
    if defaults:
        return _compose_config(draft, document.path.parent, document.path.stem, command_words, locations)
    invalid_groups = [
        group for group in ("dataset", *TRAINING_GROUP_NAMES) if group in parsed_file.value and not isinstance(parsed_file.value[group], dict)
    ]
    if invalid_groups:
        group_lines = {group: f"{document.name}:{parsed_file.lines[group]}" for group in invalid_groups}
        raise InvalidInput(
            [
                Mistake(group_lines[group], group, f"`{group}` is not a Hydra config group", "write its options below it as `name: value`")
                for group in invalid_groups
            ]
        )
    is_flat = not any(isinstance(value, dict) for value in parsed_file.value.values())
    options_by_group: dict[str, Any] = {"training_config": parsed_file.value} if is_flat else parsed_file.value
    valid_overrides = _select_valid_overrides(draft, command_words, _list_keys(options_by_group), frozenset())
    loaded_config = OmegaConf.create(document.text)
    return _apply_overrides(OmegaConf.create({"training_config": loaded_config}) if is_flat else loaded_config, valid_overrides)


def _list_keys(options_by_group: dict[str, Any]) -> frozenset[str]:
    return frozenset(
        f"{group}.{key}" for group, options in options_by_group.items() if isinstance(options, dict) for key in options
    ) | frozenset(options_by_group)


def _parse_overrides(draft: JobDraft, command_words: list[str]) -> list[Any]:
    """Parse overrides with Hydra. Record a mistake for each override that Hydra rejects, and for each sweep over several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed_overrides = OverridesParser.create(), []
    for word in command_words:
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
                    "a comma requests a sweep over several values, which is not supported",
                    f"quote the value: '{override.key_or_group}=\"...\"'",
                )
            )
            continue
        parsed_overrides.append(override)
    return parsed_overrides


def _select_valid_overrides(draft: JobDraft, command_words: list[str], present_keys: frozenset[str], groups: frozenset[str]) -> list[str]:
    """Return the overrides that can be applied, and record a mistake for each override that cannot.

    An override can be applied if the tool knows its key. If the file does not have the key, the override must begin with `+`. If the file has the
    key, `+` is not allowed.
    """
    valid_overrides: list[str] = []
    known_keys = {normalise_key(option_row.key) for option_row in draft.option_table}
    for override in _parse_overrides(draft, command_words):
        key, override_line = override.key_or_group, str(override.input_line)
        if key in groups:
            valid_overrides.append(override_line)
            continue
        if normalise_key(key) not in known_keys:
            closest_key = find_closest_name(
                key,
                [
                    spelling
                    for key_of_tool in sorted(known_keys)
                    for spelling in (key_of_tool, *(key_of_tool.replace("training_config", group_name, 1) for group_name in TRAINING_GROUP_NAMES))
                ],
            )
            plus_hint = "; + can only add keys of this tool" if override.is_add() else ""
            draft.mistakes.append(
                Mistake(
                    "command line", key, "unknown key", (f"did you mean {closest_key}?" if closest_key else "remove it") + plus_hint
                )
            )
        elif override.is_delete() or override.is_force_add():
            valid_overrides.append(override_line)
        elif override.is_add() and key in present_keys:
            draft.mistakes.append(
                Mistake("command line", f"+{key}", "the key already exists", f"write {key}=... without +")
            )
        elif not override.is_add() and key not in present_keys:
            draft.mistakes.append(
                Mistake("command line", key, "the key is not in the file", f"write +{key}=... to add it")
            )
        else:
            valid_overrides.append(override_line)
    return valid_overrides


def _apply_overrides(composed_config: Any, valid_overrides: list[str]) -> Any:
    """Apply overrides to a configuration that is already composed, and return it."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(valid_overrides), composed_config)
    return composed_config


def _compose_config(draft: JobDraft, folder: Path, name: str | None, command_words: list[str], locations: dict[str, str]) -> Any:
    """Compose a folder of groups, and add the location of each key to `locations`. Raise InvalidInput if Hydra cannot compose the folder."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    groups = frozenset(path.name for path in folder.iterdir() if path.is_dir())
    override_lines = [str(override.input_line) for override in _parse_overrides(draft, command_words)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder.resolve()), version_base="1.3"):
            group_overrides = [line for line in override_lines if line.lstrip("+~").partition("=")[0] in groups]
            base_config = compose(config_name=name, overrides=group_overrides)
            present_keys = (
                _list_keys({key: value for key, value in _to_mapping(base_config).items() if isinstance(value, dict)}) | groups
            )
            composed_config = compose(
                config_name=name,
                overrides=_select_valid_overrides(draft, override_lines, present_keys, groups),
                return_hydra_config=True,
            )
            for group, option in composed_config.hydra.runtime.choices.items():
                file = folder / group / f"{option}.yaml"
                if file.is_file():
                    document = InputDocument(file, read_text(file))
                    locations |= _list_line_locations(f"{group}/{document.name}", parse_document(document), group)
            return composed_config
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        # Hydra's parsers raise OSError and ValueError for files that are not configurations.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InvalidInput(
            [Mistake(folder.name, "", f"Hydra cannot compose the folder: {lines[0]}", " ".join(lines[1:4]))]
        ) from None
    finally:
        GlobalHydra.instance().clear()


def _to_mapping(composed_config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(composed_config, resolve=False)
    return {str(key): value for key, value in container.items()} if isinstance(container, dict) else {}


def _list_override_locations(command_words: list[str]) -> dict[str, str]:
    """Return the location for each overridden key, which names the override on the command line."""
    return {word.lstrip("+~").partition("=")[0]: f"command line {word.partition('=')[0]}" for word in command_words}


RESOLVER_PATTERN = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*:\s*([^,}\s]+)")


def _iterate_entries(draft: JobDraft, composed_config: Any, default_location: str, locations: dict[str, str]) -> Iterator[OptionEntry]:
    """Resolve the interpolations in each option, and yield the options. An environment variable is read only if `--allow-env` names it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for group, options in _to_mapping(composed_config).items():
        if group == "hydra":
            continue
        leaves = options.items() if isinstance(options, dict) else [("", options)]
        for key, raw_value in leaves:
            path = f"{group}.{key}" if key else group
            origin = ValueOrigin(locations.get(path, default_location))
            if isinstance(raw_value, str) and "${" in raw_value and not _check_resolvers(draft, path, raw_value, origin):
                continue
            try:
                value = OmegaConf.select(composed_config, path)
            except OmegaConfBaseException as error:
                draft.mistakes.append(Mistake(origin.location, path, f"{str(error).splitlines()[0]}"))
                continue
            if raw_value == "???":
                draft.mistakes.append(
                    Mistake(origin.location, path, "the value is marked as missing (???)", f"give {path}=VALUE")
                )
                continue
            yield OptionEntry(path, value, origin)


def _check_resolvers(draft: JobDraft, option_key: str, raw_value: str, origin: ValueOrigin) -> bool:
    """Return whether the import may run all resolvers in a value. Record a mistake for each resolver that it may not run."""
    are_all_allowed = True
    for resolver, name in RESOLVER_PATTERN.findall(raw_value):
        if resolver != "oc.env":
            draft.mistakes.append(
                Mistake(origin.location, option_key, f"the resolver {resolver} is not supported", "write the value itself")
            )
            are_all_allowed = False
        elif name not in draft.request.allowed_variables:
            draft.mistakes.append(
                Mistake(
                    origin.location,
                    option_key,
                    f"the value reads the environment variable {name}, which is not allowed",
                    f"allow it with --allow-env {name}",
                )
            )
            are_all_allowed = False
        elif name not in draft.request.environment and "," not in raw_value:
            draft.mistakes.append(
                Mistake(
                    origin.location, option_key, f"variable {name} is not set", "set the variable, or write its value here"
                )
            )
            are_all_allowed = False
    return are_all_allowed
