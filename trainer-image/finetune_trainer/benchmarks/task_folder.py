"""Reads the task definitions of a benchmark's folder without running them, and checks that the folder contains their data.

The harness reads every `*.yaml` file of the folder, imports the Python functions that a task names, and loads data sets from the hub. This module
finds code and hub data sets in task definitions before training, so that the harness never runs or loads them by accident. Paths in a definition are
relative to the benchmark's folder, because it is the working directory of the harness.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from finetune_api.benchmarks import BUNDLED_TASKS, replace_old_task_names
from finetune_api.errors import ConfigError

DATA_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
"""Values of `dataset_path` for which the library `datasets` only reads the files in `data_files`. Other builders of the library may run code, for
example because they unpickle files."""
IGNORED_FOLDERS = {"__pycache__", ".ipynb_checkpoints"}
"""Names of folders that this module ignores, as the harness does."""
MAX_LISTED_NAMES = 8
"""How many known names a message lists."""


@dataclass(frozen=True)
class TaskDefinition:
    """The definition of a task or of a group of tasks in one YAML file, merged with the files that it includes."""

    file: str
    """Path of the file below the folder."""
    names: tuple[str, ...]
    """Name of the task or group that the file defines, followed by its tags."""
    is_task: bool
    """Whether the file defines a task. A file that does not define a task defines a group of tasks."""
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class TaskFolder:
    """The folder of a benchmark, with its task definitions."""

    path: Path
    field: str
    """The field of the spec that names the folder, for messages."""
    definitions: tuple[TaskDefinition, ...]

    @classmethod
    def read(cls, path: Path, field: str, *, allows_code: bool) -> TaskFolder:
        """Read and check all definitions. Errors: ConfigError TaskFolderInvalid, CodeExecutionNotAllowed, BenchmarkDataMissing."""
        reader = _DefinitionReader(path, field)
        definitions = tuple(reader.read_definitions())
        if not allows_code:
            _require_no_code(path, field, reader)
        for definition in definitions:
            for settings in _find_settings_with_data(definition.settings):
                _check_data(path, field, definition.file, settings)
        return cls(path, field, definitions)

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks that the folder defines, in the order of their files. Groups are left out."""
        return list(dict.fromkeys(definition.names[0] for definition in self.definitions if definition.is_task))

    def select(self, tasks: Sequence[str] | None) -> list[str]:
        """Return the names of the tasks to run: `tasks` or, if `tasks` is None, all tasks that the folder defines or has data for.

        Errors: ConfigError TaskNotInFolder, TaskFolderEmpty.
        """
        if tasks is None:
            bundled_names = [name for name in BUNDLED_TASKS if name not in self.task_names and self._has_data_of(name)]
            if not self.task_names and not bundled_names:
                raise ConfigError(
                    "TaskFolderEmpty", f"{self.field} contains neither a task definition (*.yaml) nor the data of a known task",
                    hint=f"add task definitions, or a copy of a data set at its path, for example {BUNDLED_TASKS['hellaswag'].dataset_repository}/",
                )  # fmt: skip
            return [*self.task_names, *bundled_names]
        selected_names = replace_old_task_names(list(tasks))
        for name in selected_names:
            if not self.is_defined(name) and not (name in BUNDLED_TASKS and self._has_data_of(name)):
                raise self._missing_task_error(name)
        return selected_names

    def is_defined(self, name: str) -> bool:
        """Whether the folder contains the definition of a task, group or tag."""
        return any(name in definition.names for definition in self.definitions)

    def _has_data_of(self, name: str) -> bool:
        return (self.path / BUNDLED_TASKS[name].dataset_repository).is_dir()

    def _missing_task_error(self, name: str) -> ConfigError:
        if name in BUNDLED_TASKS:
            dataset = BUNDLED_TASKS[name].dataset_repository
            return ConfigError(
                "TaskNotInFolder", f"the task {name} needs the data set {dataset}, but {self.field} does not contain the folder {dataset}",
                hint=f"copy the files of the hub's data set repository {dataset} to {dataset}/ in this folder, or remove {name} from tasks",
            )  # fmt: skip
        defined_names = {name for definition in self.definitions for name in definition.names}
        known_names = sorted(defined_names | {bundled_name for bundled_name in BUNDLED_TASKS if self._has_data_of(bundled_name)})
        similar_names = difflib.get_close_matches(name, known_names, n=1)
        listed_names = ", ".join(known_names[:MAX_LISTED_NAMES])
        if len(known_names) > MAX_LISTED_NAMES:
            listed_names += f" and {len(known_names) - MAX_LISTED_NAMES} others"
        return ConfigError(
            "TaskNotInFolder", f"the task {name} is not defined in {self.field}, which defines {listed_names or 'no task'}",
            hint=f"did you mean {similar_names[0]}?" if similar_names
            else f"add a definition with `task: {name}` and its data to the folder, or remove {name} from tasks",
        )  # fmt: skip


# ---- reading ----


class _CodeReference(str):
    """A Python function that a definition names with `!function`."""


class _DefinitionLoader(yaml.SafeLoader):
    """Reads YAML, but keeps the name of each function in a `_CodeReference` instead of importing the function."""


_DefinitionLoader.add_constructor("!function", lambda loader, node: _CodeReference(loader.construct_scalar(node)))  # type: ignore[arg-type]


class _DefinitionReader:
    """Reads the YAML files of a folder. `settings_by_file` has the settings of each file that was read, also of included files."""

    def __init__(self, folder: Path, field: str) -> None:
        self.folder, self.field = folder, field
        self.settings_by_file: dict[str, dict[str, Any]] = {}

    def read_definitions(self) -> Iterator[TaskDefinition]:
        for path in sorted(self.folder.rglob("*.yaml"), key=lambda file: file.as_posix()):
            if IGNORED_FOLDERS & set(path.parts) or not path.is_file():
                continue
            settings = self._merge_included_files(path, ())
            name = settings.get("group") or settings.get("task")
            if not isinstance(name, str):  # The file defines neither a task nor a group, and is only included by other files.
                continue
            tags = settings.get("tag") or []
            names = (name, *([tags] if isinstance(tags, str) else map(str, tags)))
            yield TaskDefinition(self._make_relative(path), names, "group" not in settings, settings)

    def _merge_included_files(self, path: Path, including_files: tuple[Path, ...]) -> dict[str, Any]:
        """Return the settings of a file, merged with the settings of the files that it includes. The file's own settings take precedence."""
        if path in including_files:
            raise self._invalid_file_error(path, "includes itself")
        settings = self._load_settings(path)
        merged_settings: dict[str, Any] = {}
        included_names = settings.get("include", [])
        for name in included_names if isinstance(included_names, list) else [included_names]:
            included_file = Path(os.path.normpath(path.parent / str(name)))
            if not included_file.is_relative_to(self.folder) or not included_file.is_file():
                raise self._invalid_file_error(path, f"includes {name}, which is not a file of the folder")
            included_settings = self._merge_included_files(included_file, (*including_files, path))
            merged_settings |= {key: value for key, value in included_settings.items() if key != "task_list"}
        return merged_settings | {key: value for key, value in settings.items() if key != "include"}

    def _load_settings(self, path: Path) -> dict[str, Any]:
        try:
            settings = yaml.load(path.read_bytes(), Loader=_DefinitionLoader)  # noqa: S506  a subclass of the safe loader
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1}: " if mark else ""
            problem = getattr(error, "problem", None) or "unreadable text"
            raise self._invalid_file_error(path, f"is not valid YAML: {line}{problem}") from error
        if not isinstance(settings, dict):
            raise self._invalid_file_error(path, "does not contain a YAML mapping")
        self.settings_by_file[self._make_relative(path)] = settings
        return settings

    def _make_relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _invalid_file_error(self, path: Path, problem: str) -> ConfigError:
        message = f"{self.field}: the file {self._make_relative(path)} {problem}"
        return ConfigError("TaskFolderInvalid", message, hint="correct the file, or remove it from the folder")


# ---- code ----


def _require_no_code(folder: Path, field: str, reader: _DefinitionReader) -> None:
    """Check that the harness would not run Python code from the folder. Errors: ConfigError CodeExecutionNotAllowed."""
    code_description = next((f"the file {path.relative_to(folder).as_posix()} is Python code" for path in sorted(folder.rglob("*.py"))), None)
    for file, settings in reader.settings_by_file.items():
        code_description = code_description or next((f"the file {file} {problem}" for problem in _find_code(settings)), None)
    if code_description:
        raise ConfigError(
            "CodeExecutionNotAllowed", f"{field}: {code_description}, but allowCodeExecution of the benchmark is not true",
            hint="write `allowCodeExecution: true` in the benchmark if you trust the folder, or remove the file",
        )  # fmt: skip


def _find_code(value: Any) -> Iterator[str]:
    """For each setting that would run code, yield what the setting does, such as `calls the Python function f`."""
    match value:
        case _CodeReference():
            yield f"calls the Python function {value}"
        case dict():
            if value.get("unsafe_code"):
                yield "sets unsafe_code, so the task runs generated code"
            if "class" in value:
                yield f"names the Python class {value['class']}"
            if value.get("hf_evaluate"):
                yield f"loads the code of the metric {value.get('metric')} from the hub"
            for inner in value.values():
                yield from _find_code(inner)
        case list():
            for inner in value:
                yield from _find_code(inner)


# ---- data ----


def _find_settings_with_data(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of each task that names a data set. `settings`: the settings of a task, or of a group. A group may define tasks itself."""
    if "dataset_path" in settings:
        yield settings
    members = settings.get("task")
    for member in members if isinstance(members, list) else []:
        if isinstance(member, Mapping):
            yield from _find_settings_with_data({key: value for key, value in settings.items() if key != "task"} | dict(member))


def _check_data(folder: Path, field: str, file: str, settings: Mapping[str, Any]) -> None:
    """Check that a task only loads data from the folder. `settings`: the settings of the task. Errors: ConfigError BenchmarkDataMissing."""
    dataset, options = str(settings["dataset_path"]), settings.get("dataset_kwargs") or {}
    for text in _find_texts(options):
        if not _is_in_folder(text):
            problem = f"has {text} in dataset_kwargs, which is not a path in the folder"
            raise _data_error(field, file, problem, "write a path relative to the folder")
    if dataset in DATA_BUILDERS:
        paths = list(_find_texts(options.get("data_files") if isinstance(options, Mapping) else None))
        if not paths:
            problem = f"reads {dataset} files, but dataset_kwargs.data_files names none"
            raise _data_error(field, file, problem, "write for example `dataset_kwargs: {data_files: {test: test.jsonl}}`")
        for path in paths:
            if not any(folder.glob(path)):
                raise _data_error(field, file, f"reads {path}, which is not a file of the folder", "write a path relative to the folder, and add the file")
    elif not _is_in_folder(dataset) or not (folder / dataset).is_dir():
        raise _data_error(
            field, file, f"reads the data set {dataset}, but the folder does not contain {dataset}/",
            f"copy the files of this data set to {dataset}/ in the folder, or remove the file",
        )  # fmt: skip


def _data_error(field: str, file: str, problem: str, hint: str) -> ConfigError:
    return ConfigError("BenchmarkDataMissing", f"{field}: the task of {file} {problem}", hint=hint)


def _find_texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from _find_texts(inner)
        case list():
            for inner in value:
                yield from _find_texts(inner)


def _is_in_folder(text: str) -> bool:
    """Whether a text is a relative path that stays below the folder.

    Symbolic links are not resolved, because the files of a downloaded hub repository are links into a cache.
    """
    path = PurePosixPath(text)
    return "://" not in text and not path.is_absolute() and ".." not in path.parts
