"""Turns local paths and hub names of other tools into source URIs.

A hub name stays unchanged. A path on the user's machine becomes `file://PATH`, with a warning, because pods cannot read the path. The
warning names the option (such as `--data`) that replaces the path by a source that pods can read.
"""

from __future__ import annotations

import re

from finetune_cli.importers.draft import JobDraft

URI = re.compile(r"^(hf|s3|pvc|configmap|https?|file)://")
DATA_FILE = re.compile(r"\.(jsonl?|csv|txt|parquet|tsv|zip|gz)$", re.IGNORECASE)
OPTION_BY_PATH = {
    "model.source": "--model",
    "model.tokenizer": "--set model.tokenizer=URI",
    "method.adapter.source": "--adapter",
    "dataset.train": "--data",
    "dataset.validation": "--validation",
    "dataset.test": "--test",
    "checkpoint.resume": "--set checkpoint.resume=URI",
}


def is_local(text: str) -> bool:
    """Return whether the name of a model or data set can only be a path."""
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or bool(DATA_FILE.search(text))


def assign_source(draft: JobDraft, key: str, path: str, *, always_local: bool = False) -> None:
    """Set a source field from an option, unless an override sets the field."""
    if key not in draft.given_options or path in draft.request.overrides:
        return
    given_option = draft.given_options[key]
    source = str(given_option.value)
    if not URI.match(source) and (always_local or is_local(source)):
        option = OPTION_BY_PATH[path]
        option_text = option if option.startswith("--set") else f"{option} URI"
        draft.add_warning(
            f"{given_option.origin.location}: {given_option.key}: {source} is a path on this machine, which pods cannot read; "
            f"give {option_text} (`finetune run --local` can read the path)"
        )
        source = f"file://{source}"
    draft.assign(path, source, key)


def assign_tokenizer(draft: JobDraft, key: str, model_key: str) -> None:
    """Set the tokenizer. No tokenizer is set if the file gives the model's name as tokenizer and an override replaces the model."""
    if "model.source" in draft.request.overrides and key in draft.given_options and draft.get(key) == draft.get(model_key):
        draft.add_note(
            f"{draft.given_options[key].key} is the name of the model itself, so the job uses the tokenizer of --model"
        )
        return
    assign_source(draft, key, "model.tokenizer")


def assign_config_map(draft: JobDraft, key: str, path: str, purpose: str, option: str) -> None:
    """Set a reference to a ConfigMap that replaces a local file, and warn with the command that creates the ConfigMap."""
    if key not in draft.given_options or any(
        override == path or override.startswith(path + ".") for override in draft.request.overrides
    ):
        return
    given_option = draft.given_options[key]
    local_path = str(given_option.value)
    name = f"{draft.name}-{purpose}"
    key_name = re.sub(r"[^-._a-zA-Z0-9]", "_", local_path.replace("\\", "/").rstrip("/").rpartition("/")[2]) or purpose
    draft.assign(f"{path}.name", name, key)
    draft.assign(f"{path}.key", key_name, key)
    draft.add_warning(
        f"{given_option.origin.location}: {given_option.key}: pods read {local_path} from a ConfigMap: "
        f"create it with `kubectl create configmap {name} --from-file={key_name}={local_path}`, or give an existing ConfigMap with {option} NAME/KEY"
    )


def assign_output_folder(draft: JobDraft, key: str) -> None:
    """Set the folder for results, relative to the storage root."""
    given_option = draft.given_options[key]
    folder = str(given_option.value).replace("\\", "/")
    relative_path = re.sub(r"^(\./)+", "", folder).lstrip("/")
    if folder.startswith(("/", "~", "..")) or re.match(r"^[A-Za-z]:", folder):
        draft.add_warning(
            f"{given_option.origin.location}: {given_option.key}: results are written below the storage root; {folder} is relative to this root"
        )
        relative_path = re.sub(r"^(~|\.\.)?/*", "", re.sub(r"^[A-Za-z]:", "", relative_path))
    if relative_path in ("", "."):
        return
    draft.assign("output.dir", relative_path.rstrip("/"), key)
