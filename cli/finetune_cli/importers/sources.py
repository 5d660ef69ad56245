"""Turns the hub names and local paths in other tools' files into sources of a FineTuneJob.

A hub name stays unchanged. A path on the user's machine becomes `file://PATH`, with a warning, because pods cannot read the path. The
warning names the option, such as `--data`, with which the user gives a source that pods can read.
"""

from __future__ import annotations

import re

from finetune_cli.importers.draft import JobDraft

URI_PATTERN = re.compile(r"^(hf|s3|pvc|configmap|https?|file)://")
DATA_FILE_PATTERN = re.compile(r"\.(jsonl?|csv|txt|parquet|tsv|zip|gz)$", re.IGNORECASE)
OPTION_BY_PATH = {
    "model.source": "--model",
    "model.tokenizer": "--set model.tokenizer=URI",
    "method.adapter.source": "--adapter",
    "dataset.train": "--data",
    "dataset.validation": "--validation",
    "dataset.test": "--test",
    "checkpoint.resume": "--set checkpoint.resume=URI",
}


def is_local(name_or_path: str) -> bool:
    """Return whether the name of a model or data set must be a path, because no hub repository can have this name."""
    return name_or_path.startswith((".", "/", "~")) or "\\" in name_or_path or name_or_path.count("/") > 1 or bool(DATA_FILE_PATTERN.search(name_or_path))


def assign_source(draft: JobDraft, option_key: str, spec_path: str, *, always_local: bool = False) -> None:
    """Set a source field from an option, unless an override sets the field.

    If `always_local` is true, a value that is not a URI is always treated as a path.
    """
    if option_key not in draft.given_options or spec_path in draft.request.overrides:
        return
    given_option = draft.given_options[option_key]
    source = str(given_option.value)
    if not URI_PATTERN.match(source) and (always_local or is_local(source)):
        option = OPTION_BY_PATH[spec_path]
        option_text = option if option.startswith("--set") else f"{option} URI"
        draft.add_warning(
            f"{given_option.origin.location}: {given_option.key}: {source} is a path on this machine, which pods cannot read; "
            f"give {option_text} (`finetune run --local` can read the path)"
        )
        source = f"file://{source}"
    draft.assign(spec_path, source, option_key)


def assign_tokenizer(draft: JobDraft, option_key: str, model_key: str) -> None:
    """Set the tokenizer, unless the file names its model as the tokenizer and an override replaces this model."""
    if "model.source" in draft.request.overrides and option_key in draft.given_options and draft.get(option_key) == draft.get(model_key):
        draft.add_note(
            f"{draft.given_options[option_key].key} is the name of the model itself, so the job uses the tokenizer of --model"
        )
        return
    assign_source(draft, option_key, "model.tokenizer")


def assign_config_map(draft: JobDraft, option_key: str, spec_path: str, name_suffix: str, option: str) -> None:
    """Set a reference to a ConfigMap that replaces a local file, and warn with the command that creates the ConfigMap.

    `name_suffix`: the end of the ConfigMap's name. `option`: the option that names another ConfigMap.
    """
    if option_key not in draft.given_options or any(
        override == spec_path or override.startswith(spec_path + ".") for override in draft.request.overrides
    ):
        return
    given_option = draft.given_options[option_key]
    local_path = str(given_option.value)
    name = f"{draft.name}-{name_suffix}"
    config_map_key = re.sub(r"[^-._a-zA-Z0-9]", "_", local_path.replace("\\", "/").rstrip("/").rpartition("/")[2]) or name_suffix
    draft.assign(f"{spec_path}.name", name, option_key)
    draft.assign(f"{spec_path}.key", config_map_key, option_key)
    draft.add_warning(
        f"{given_option.origin.location}: {given_option.key}: pods read {local_path} from a ConfigMap: "
        f"create it with `kubectl create configmap {name} --from-file={config_map_key}={local_path}`, or give an existing ConfigMap with {option} NAME/KEY"
    )


def assign_output_folder(draft: JobDraft, option_key: str) -> None:
    """Set the folder for results, which is below the storage root.

    If the file gives an absolute path, add a warning that the folder is below the storage root.
    """
    given_option = draft.given_options[option_key]
    given_folder = str(given_option.value).replace("\\", "/")
    relative_path = re.sub(r"^(\./)+", "", given_folder).lstrip("/")
    if given_folder.startswith(("/", "~", "..")) or re.match(r"^[A-Za-z]:", given_folder):
        draft.add_warning(
            f"{given_option.origin.location}: {given_option.key}: the results are written below the storage root, "
            f"and {given_folder} is read as a path relative to it"
        )
        relative_path = re.sub(r"^(~|\.\.)?/*", "", re.sub(r"^[A-Za-z]:", "", relative_path))
    if relative_path in ("", "."):
        return
    draft.assign("output.dir", relative_path.rstrip("/"), option_key)
