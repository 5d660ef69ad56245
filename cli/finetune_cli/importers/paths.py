"""Local paths and hub names of other tools become sources of the API.

A hub name stays as it is. A path of the user's machine becomes `file://` and the path as written, with a warning, since no pod
can read it; our own options name a place that it can read.
"""

from __future__ import annotations

import re

from finetune_cli.importers.material import Draft

URI = re.compile(r"^(hf|s3|pvc|configmap|https?|file)://")
DATA_FILE = re.compile(r"\.(jsonl?|csv|txt|parquet|tsv|zip|gz)$", re.IGNORECASE)
OPTION = {
    "model.source": "--model",
    "model.tokenizer": "--set model.tokenizer=URI",
    "method.adapter.source": "--adapter",
    "dataset.train": "--data",
    "dataset.validation": "--validation",
    "dataset.test": "--test",
    "checkpoint.resume": "--set checkpoint.resume=URI",
}


def is_local(text: str) -> bool:
    """Whether a model or data name is surely a path."""
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or bool(DATA_FILE.search(text))


def place_source(draft: Draft, key: str, path: str, *, always_local: bool = False) -> None:
    """Put the source that a key names at a path of the spec, unless our own options name another."""
    if key not in draft.given or path in draft.request.own:
        return
    given = draft.given[key]
    found = str(given.value)
    if not URI.match(found) and (always_local or is_local(found)):
        option = OPTION[path]
        written = option if option.startswith("--set") else f"{option} URI"
        draft.warn(
            f"{given.origin.place}: {given.key}: {found} is a path of this machine, which no pod of a cluster can read; "
            f"give {written} (`finetune run --local` reads it as it is)"
        )
        found = f"file://{found}"
    draft.put(path, found, key)


def place_tokenizer(draft: Draft, key: str, model_key: str) -> None:
    """Put the tokenizer; if it only repeats the model's name, it follows a model named by our own option."""
    if "model.source" in draft.request.own and key in draft.given and draft.get(key) == draft.get(model_key):
        draft.note(f"{draft.given[key].key} is the model's own, so the tokenizer comes from --model too")
        return
    place_source(draft, key, "model.tokenizer")


def config_map_reference(draft: Draft, key: str, path: str, purpose: str, option: str) -> None:
    """A local file that the API takes from a ConfigMap only: name one, and say how it is made."""
    if key not in draft.given or any(own == path or own.startswith(path + ".") for own in draft.request.own):
        return
    given = draft.given[key]
    file = str(given.value)
    name = f"{draft.name}-{purpose}"
    base = re.sub(r"[^-._a-zA-Z0-9]", "_", file.replace("\\", "/").rstrip("/").rpartition("/")[2]) or purpose
    draft.put(f"{path}.name", name, key)
    draft.put(f"{path}.key", base, key)
    draft.warn(
        f"{given.origin.place}: {given.key}: pods read {file} from a ConfigMap: "
        f"`kubectl create configmap {name} --from-file={base}={file}`, or give {option} NAME/KEY of one that is there"
    )


def output_folder(draft: Draft, key: str) -> None:
    """The folder of the results, relative to the storage root."""
    given = draft.given[key]
    folder = str(given.value).replace("\\", "/")
    relative = re.sub(r"^(\./)+", "", folder).lstrip("/")
    if folder.startswith(("/", "~", "..")) or re.match(r"^[A-Za-z]:", folder):
        draft.warn(
            f"{given.origin.place}: {given.key}: results go to the storage root, so {folder} is taken relative to it"
        )
        relative = re.sub(r"^(~|\.\.)?/*", "", re.sub(r"^[A-Za-z]:", "", relative))
    if relative in ("", "."):
        return
    draft.put("output.dir", relative.rstrip("/"), key)
