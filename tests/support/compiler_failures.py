"""Calls library functions that need a compiler or a GPU driver, and writes how the trainer classifies the resulting errors. This program runs in the trainer
image.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_shared_memory_operation() -> None:
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load()


def load_adam() -> None:
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder

    CPUAdamBuilder().load()


def load_cuda_operation() -> None:
    from deepspeed.ops.op_builder.fp_quantizer import FPQuantizerBuilder

    FPQuantizerBuilder().load()


def compile_with_torch() -> None:
    import torch

    torch.compile(lambda x: x.sin() + 1)(torch.ones(4))


def find_triton_compiler() -> None:
    from triton.runtime.build import _find_compiler

    _find_compiler("c")


def initialise_cuda() -> None:
    import torch

    torch.cuda.init()


ACTIONS: dict[str, Callable[[], None]] = {
    "DeepSpeed's shared-memory operation": load_shared_memory_operation,
    "DeepSpeed's Adam": load_adam,
    "DeepSpeed's CUDA operation": load_cuda_operation,
    "torch.compile": compile_with_torch,
    "Triton": find_triton_compiler,
    "CUDA": initialise_cuda,
}


def main(output: Path) -> None:
    from finetune_trainer.failure import classify_error

    failures: dict[str, Any] = {}
    for name, action in ACTIONS.items():
        try:
            action()
            failures[name] = {"exitCode": 0, "code": "", "message": "no error"}
        except Exception as error:  # The libraries raise exceptions of different types, so all types are caught.
            failure, _ = classify_error(error)
            failures[name] = {"exitCode": int(failure.exit_code), "code": failure.code, "message": failure.message}
    output.write_text(json.dumps(failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
