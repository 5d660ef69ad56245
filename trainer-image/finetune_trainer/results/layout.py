"""The additional copy of a run's results below `storage.uri`: its folder, and the key of each file.

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
from finetune_api.sources import HubSource, last_folder, parse
from finetune_api.spec.enums import OutputLayout
from finetune_api.spec.results import Output

from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.run_names import time_folder

MODEL_FOLDER = "model/"
"""Folder of the final model in the layout `projectModelTime`."""


@dataclass(frozen=True)
class CopyFolder:
    """The folder of a run's additional copy. `key`: relative to `storage.uri`, with a slash at its end."""

    key: str
    layout: OutputLayout

    def key_of_result(self, file: ResultFile) -> str:
        """Return the key of a metric file or another file of results."""
        return self.key + file

    def key_of_model_file(self, path: str) -> str:
        """Return the key of a file of the final model. `path`: relative to the model's folder."""
        return self.key + (MODEL_FOLDER if self.layout is OutputLayout.PROJECT_MODEL_TIME else "") + path


def copy_folder(output: Output, *, namespace: str, model_source: str, started_at: datetime) -> CopyFolder | None:
    """Return the folder of the additional copy; None without `output.dir`.

    `started_at` must be the same in all attempts of a run. Errors: ConfigError OutputPathInvalid, SourceInvalid.
    """
    if output.dir is None:
        return None
    layout = output.layout or OutputLayout.PROJECT_MODEL_TIME
    parts = [part for part in output.dir.split("/") if part]
    _require_no_dots("output.dir", output.dir, parts)
    if layout is OutputLayout.PROJECT_MODEL_TIME:
        project = output.project or namespace
        _require_no_dots("output.project", project, [project])
        parts += [project, model_folder(model_source), time_folder(started_at)]
    return CopyFolder("/".join(parts) + "/", layout)


def model_folder(source: str) -> str:
    """Return the name of a base model as the name of one folder, such as `meta-llama_Llama-2-7b-hf`.

    A hub repository is named with its owner, but without its revision. Other sources are named by their last folder; the result of
    another job is named by that job. Characters other than letters, digits, `.`, `_` and `-` become `_`. Errors: ConfigError SourceInvalid.
    """
    model = parse(source)
    name = model.repo if isinstance(model, HubSource) else last_folder(source)
    folder = re.sub(r"[^\w.-]", "_", name)
    return folder if folder.strip(".") else "_"


def _require_no_dots(path: str, value: str, parts: list[str]) -> None:
    if any(part in (".", "..") for part in parts):
        raise ConfigError(
            "OutputPathInvalid", f"{path} is {value!r}, but `.` and `..` are not names of folders",
            hint="write a folder below storage.uri, such as results",
        )  # fmt: skip
