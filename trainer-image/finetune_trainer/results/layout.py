"""Computes the folder and the keys of the additional copy of a run's results (`output.dir`), which is stored below `storage.uri`.

| `output.layout` | folder | final model | metric files |
|---|---|---|---|
| `projectModelTime` | `<dir>/<project>/<model>/<YYYYMMDD_HHMMSS>/` | in `model/` | in the folder |
| `flat` | `<dir>/` | in the folder | in the folder |

With `flat`, a second run with the same `output.dir` overwrites the files of the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from finetune_api.errors import ConfigError
from finetune_api.sources import HubSource, get_last_folder, parse_source
from finetune_api.spec.enums import OutputLayout
from finetune_api.spec.results import Output

from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.run_names import time_folder_name

MODEL_FOLDER = "model/"
"""Folder of the final model in the layout `projectModelTime`."""


@dataclass(frozen=True)
class CopyFolder:
    """The folder of a run's additional copy of its results."""

    key: str
    """Path of the folder relative to `storage.uri`, with a slash at its end."""
    layout: OutputLayout

    def key_of_result(self, file: ResultFile) -> str:
        """Return the key of a metric file or another result file, relative to `storage.uri`."""
        return self.key + file

    def key_of_model_file(self, path: str) -> str:
        """Return the key of a file of the final model, relative to `storage.uri`. `path`: the file's path in the model's folder."""
        return self.key + (MODEL_FOLDER if self.layout is OutputLayout.PROJECT_MODEL_TIME else "") + path


def find_copy_folder(output: Output, *, namespace: str, model_source: str, started_at: datetime) -> CopyFolder | None:
    """Return the folder of the additional copy, or None if `output.dir` is not set.

    `started_at` must be the same in all attempts of a run. Errors: ConfigError OutputPathInvalid, SourceInvalid.
    """
    if output.dir is None:
        return None
    layout = output.layout or OutputLayout.PROJECT_MODEL_TIME
    folder_names = [part for part in output.dir.split("/") if part]
    _require_no_dots("output.dir", output.dir, folder_names)
    if layout is OutputLayout.PROJECT_MODEL_TIME:
        project = output.project or namespace
        _require_no_dots("output.project", project, [project])
        folder_names += [project, model_folder_name(model_source), time_folder_name(started_at)]
    return CopyFolder("/".join(folder_names) + "/", layout)


def model_folder_name(source: str) -> str:
    """Return the folder name of a base model, such as `meta-llama_Llama-2-7b-hf`.

    For a model from a hub, the folder is named after the repository and its owner; for a model of another job, after that job; for any other source,
    after the last folder of the source. Characters other than letters, digits, `.`, `_` and `-` become `_`. Errors: ConfigError SourceInvalid.
    """
    parsed_source = parse_source(source)
    name = parsed_source.repo if isinstance(parsed_source, HubSource) else get_last_folder(source)
    folder_name = re.sub(r"[^\w.-]", "_", name)
    return folder_name if folder_name.strip(".") else "_"


def _require_no_dots(path: str, value: str, folder_names: list[str]) -> None:
    if any(name in (".", "..") for name in folder_names):
        raise ConfigError(
            "OutputPathInvalid", f"{path} is {value!r}, but `.` and `..` are not names of folders",
            hint="write a folder below storage.uri, such as results",
        )  # fmt: skip
