"""The trainer chooses device, dtypes and attention from the spec and the hardware. The trainer refuses specs that the hardware cannot run, and gives a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError, FineTuneError
from finetune_trainer.hardware import Hardware, detect_hardware

from tests.support.learning import make_run

ONE_GPU_SPEC: dict[str, Any] = {"resources": {"gpusPerNode": 1}}


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a GPU without bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


def detect_for_spec(folder: Path, spec: dict[str, Any]) -> Hardware:
    run, _ = make_run(folder, Path("/models/tiny"), spec)
    world = run.world.model_copy(update={"gpus_per_node": run.spec.resources.gpus_per_node})
    return detect_hardware(run.model_copy(update={"world": world}), 0)


@pytest.mark.parametrize(
    ("requested", "dtype", "computes_in_bf16"),
    [("auto", torch.float32, False), ("no", torch.float32, False), ("bf16", torch.float32, True)],
)
def test_a_cpu_trains_in_32_bits_unless_the_spec_says_bf16(
    requested: str, dtype: torch.dtype, computes_in_bf16: bool, tmp_path: Path
) -> None:
    hardware = detect_for_spec(tmp_path, {"training": {"mixedPrecision": requested}})
    assert (hardware.is_cpu, hardware.name, hardware.dtype, hardware.computes_in_bf16, hardware.computes_in_fp16) == (
        True,
        "cpu",
        dtype,
        computes_in_bf16,
        False,
    )


def test_an_old_gpu_computes_in_fp16(old_gpu: None, tmp_path: Path) -> None:
    hardware = detect_for_spec(tmp_path, ONE_GPU_SPEC)
    assert (hardware.device, hardware.name, hardware.computes_in_bf16, hardware.computes_in_fp16) == (
        torch.device("cuda", 0),
        "Tesla T4",
        False,
        True,
    )


@pytest.mark.parametrize(
    ("spec", "code", "expected_text", "hint"),
    [
        (
            {"training": {"mixedPrecision": "fp16"}},
            "PrecisionUnavailable",
            "but fp16 needs a GPU",
            "write bf16, no or auto",
        ),
        ({"training": {"device": "mps"}}, "DeviceAbsent", "training.device is mps", "write auto"),
        (
            {"training": {"device": "cuda"}},
            "DeviceAbsent",
            "training.device is cuda, but the job requests no GPU",
            "write auto",
        ),
    ],
)
def test_a_missing_device_or_format_is_refused(
    spec: dict[str, Any], code: str, expected_text: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        detect_for_spec(tmp_path, spec)
    assert (caught.value.code, caught.value.exit_code) == (code, 64)
    assert expected_text in caught.value.message and hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("driver_error", "code", "exit_code", "expected_text"),
    [
        (
            RuntimeError(
                "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
                "http://www.nvidia.com/Download/index.aspx"
            ),
            "GpuDriverMissing", 78, "the pod has no GPU driver: Found no NVIDIA driver",
        ),
        (AssertionError("Torch not compiled with CUDA enabled"), "InstallationBroken", 78, "the trainer image lacks a build of torch for CUDA"),
        (
            RuntimeError(
                "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that might have "
                "already set an error? Error 802: system not yet initialized"
            ),
            "NodeDriverUnusable", 74, "the job requests GPUs (per node: 1), but torch finds none: Unexpected error",
        ),
        (RuntimeError("No CUDA GPUs are available"), "NodeDriverUnusable", 74, "No CUDA GPUs are available"),
        (RuntimeError("an unknown message"), "NodeDriverUnusable", 74, "an unknown message"),
        (None, "NodeDriverUnusable", 74, "the driver reports no GPU"),
    ],
    ids=["no driver", "no CUDA", "broken node", "no GPUs", "unknown", "no error"],
)  # fmt: skip
def test_a_requested_gpu_that_torch_does_not_find(
    driver_error: Exception | None, code: str, exit_code: int, expected_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two errors are not retried: the pod has no driver, or the image has no CUDA. All other errors can be caused by one node, so they are retried."""

    def init() -> None:
        if driver_error is not None:
            raise driver_error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(FineTuneError) as caught:
        detect_for_spec(tmp_path, ONE_GPU_SPEC)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert expected_text in caught.value.message


def test_bf16_is_refused_on_a_gpu_without_bf16(old_gpu: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        detect_for_spec(tmp_path, {**ONE_GPU_SPEC, "training": {"mixedPrecision": "bf16"}})
    assert caught.value.message == "Tesla T4 cannot compute in bf16"


@pytest.mark.parametrize(("requested", "expected_attention"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_the_attention_of_the_spec_is_chosen(requested: str, expected_attention: str, tmp_path: Path) -> None:
    assert detect_for_spec(tmp_path, {"model": {"attention": requested}}).attention == expected_attention


@pytest.fixture
def new_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with two GPUs that support flash attention."""
    from finetune_trainer import hardware

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(hardware, "find_spec", lambda name: name)


def test_flash_attention_needs_16_bits(new_gpus: None, tmp_path: Path) -> None:
    flash_spec: dict[str, Any] = {**ONE_GPU_SPEC, "model": {"attention": "flashAttention2"}, "method": {"type": "full"}}
    assert detect_for_spec(tmp_path / "a", flash_spec).attention == "flash_attention_2"
    with pytest.raises(ConfigError) as caught:
        detect_for_spec(tmp_path / "b", {**flash_spec, "training": {"mixedPrecision": "no"}})
    assert caught.value.code == "AttentionPrecision" and "write mixedPrecision bf16" in (caught.value.hint or "")
