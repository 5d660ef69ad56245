"""The built trainer image contains the trainer of this checkout, restricts it like a pod, and has no compiler."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.cells import CHECKOUT_FOLDER
from tests.support.trainer_image import TrainerImage

pytestmark = pytest.mark.image


def run_module_in_image(image: TrainerImage, folder: Path, module: str) -> dict[str, Any]:
    """Run a Python module of the tests in the image. Returns the JSON value that the module writes."""
    with (folder / "log").open("wb") as output:
        exit_code = image.python_runner(folder)(["-m", module, str(folder / "report.json")], {}, output, 120)
    assert exit_code == 0, (folder / "log").read_text()[-6000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def test_the_test_container_has_the_restrictions_of_a_pod(trainer_image: TrainerImage, tmp_path: Path) -> None:
    report = run_module_in_image(trainer_image, tmp_path, "tests.support.image_report")
    assert (report["user"], report["capabilities"]) == (10001, 0)
    assert report["networkInterfaces"] == ["lo"]
    assert set(report["writableFolders"]) == {"/dev/shm", "/tmp", str(tmp_path)}


def test_the_image_has_the_trainer_of_this_checkout(trainer_image: TrainerImage) -> None:
    for package in ("trainer-image/finetune_trainer", "crds/finetune_api"):
        command = ["diff", "-rq", "-x", "__pycache__", CHECKOUT_FOLDER / package, trainer_image.root / "app" / Path(package).name]
        assert subprocess.run(command, capture_output=True, text=True).stdout == ""


@pytest.mark.slow
def test_a_missing_compiler_is_reported_as_a_broken_installation(trainer_image: TrainerImage, tmp_path: Path) -> None:
    """The image has no compiler, so the libraries raise the errors that they would raise in a pod."""
    failures = run_module_in_image(trainer_image, tmp_path, "tests.support.compiler_failures")
    assert {name: failure["exitCode"] for name, failure in failures.items()} == dict.fromkeys(failures, 78)
    missing_parts = {name: failure["message"].partition("lacks ")[2].partition(":")[0] for name, failure in failures.items()}
    assert missing_parts == {
        "DeepSpeed's shared-memory operation": "the program c++", "DeepSpeed's Adam": "the program c++", "DeepSpeed's CUDA operation": "the CUDA compiler nvcc",
        "torch.compile": "a C++ compiler", "Triton": "a C compiler", "CUDA": "",
    }  # fmt: skip
    assert failures["CUDA"]["code"] == "GpuDriverMissing"


def test_tests_outside_the_image_cannot_compile_extensions_either() -> None:
    """Otherwise, such a test could pass with an extension that cannot be compiled in the image."""
    assert not Path(os.environ["CXX"]).exists()
