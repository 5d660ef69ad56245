"""Runs the stage `verifying`: checks that the stored artefacts compute what the trained model computed, and writes manifests for servers.

An artefact is loaded as a user would load it: with transformers and PEFT, and only from the artefact's own folder and the base model. The trainer's own
loaders are not used, because they could hide a fault of the files.
"""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_api.errors import InternalError, MemoryExhaustedError
from finetune_api.pod import RunConfig
from finetune_api.rules import verifies_artefacts
from finetune_api.spec.enums import OutputKind
from finetune_api.status import ArtefactVerification, Stage, VerificationOutcome

from finetune_trainer import imports
from finetune_trainer.artefact.combination import load_combined_adapters
from finetune_trainer.channel import Channel
from finetune_trainer.data.vision import VisionProcessor
from finetune_trainer.failure import classify_error
from finetune_trainer.inputs import Inputs
from finetune_trainer.results.serving_files import ServedModel, build_serving_files
from finetune_trainer.stages.files import OUTPUT_FOLDER, StageResult, StageTask
from finetune_trainer.stages.heartbeats import send_heartbeats_while_computing
from finetune_trainer.stages.placement import estimate_needed_bytes, free_gpu_bytes
from finetune_trainer.verification import compare
from finetune_trainer.verification.artefact_checks import find_fault
from finetune_trainer.verification.compare import MERGED_MODEL_NAME
from finetune_trainer.verification.reference import FILE_NAME, ReferenceValues
from finetune_trainer.verification.weight_files import has_16_bit_weights

log = logging.getLogger(__name__)
PORTABLE_ATTENTION = ("sdpa", "eager")
TRANSFORMERS_ATTENTION = (*PORTABLE_ATTENTION, "flash_attention_2")
"""Attention implementations that transformers itself contains. If the training used another implementation, this stage uses sdpa."""


class UnfitArtefactError(Exception):
    """An artefact cannot be loaded."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NotComparableError(Exception):
    """The values of an artefact cannot be compared in this pod. The artefact may still be correct."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Artefact:
    """One stored adapter or model."""

    name: str
    folder: Path
    kind: OutputKind


@dataclass(frozen=True)
class ArtefactValues:
    """The values that an artefact computes. For an adapter, also the values of the base model, which is loaded with the adapter."""

    values: list[float]
    base_values: list[float] | None = None
    device: str = ""
    """Type of the device that computed the values."""


def run_stage(run: RunConfig, channel: Channel, inputs: Inputs, task: StageTask, folder: Path) -> StageResult:
    """Write the manifests for servers, and verify each artefact unless `output.verify` is false."""
    for name, manifest_text in build_serving_files(run.spec, ServedModel.of(run, task.uri, task.kind, task.model, task.merged_uri)).items():
        (folder / OUTPUT_FOLDER / name).write_text(manifest_text, encoding="utf-8")
    if not verifies_artefacts(run.spec):
        return StageResult()
    reference = _read_reference(folder)
    with send_heartbeats_while_computing(channel):
        results = Verifier(run, channel, inputs, reference, missing_reason=task.reference_problem).verify(list_artefacts(task))
    verification = compare.summarise(results, reference)
    for result in results:
        if result.result is not VerificationOutcome.VERIFIED or result.reason:
            channel.report_note(f"verification of the {result.artefact}: {result.result}: {result.reason}")
    return StageResult(verification=verification)


def list_artefacts(task: StageTask) -> list[Artefact]:
    """Return the artefacts that the job has stored: the adapter or model, then the merged model if there is one."""
    artefacts = [Artefact(task.kind.value, task.model, task.kind)]
    return artefacts if task.merged is None else [*artefacts, Artefact(MERGED_MODEL_NAME, task.merged, OutputKind.MODEL)]


def _read_reference(folder: Path) -> ReferenceValues | None:
    path = folder / FILE_NAME
    return ReferenceValues.model_validate_json(path.read_text()) if path.exists() else None


class Verifier:
    """Loads artefacts, and compares the values that they compute with the reference values of the training."""

    def __init__(
        self, run: RunConfig, channel: Channel, inputs: Inputs, reference: ReferenceValues | None, *, missing_reason: str | None = None
    ) -> None:
        """`missing_reason`: why `reference` is None."""
        self._missing_reason = missing_reason or "the trainer wrote no reference values"
        self._run, self._channel, self._inputs, self._reference = run, channel, inputs, reference
        self._base_values: list[float] | None = None
        self._vision: VisionProcessor | None = None
        """Processor of a vision-language model, from the files of the artefact."""

    def verify(self, artefacts: list[Artefact]) -> list[ArtefactVerification]:
        """Verify the artefacts in order. The first artefact must be the trained adapter or model."""
        return [self._verify_artefact(artefact, artefacts[0].folder) for artefact in artefacts]

    def _verify_artefact(self, artefact: Artefact, trained_folder: Path) -> ArtefactVerification:
        self._channel.report_stage(Stage.VERIFYING, f"checking the files of the {artefact.name}")
        reference, is_adapter = self._reference, artefact.kind is OutputKind.ADAPTER
        fault = find_fault(artefact.folder, self._inputs.model, reference, is_adapter=is_adapter)
        if fault is not None:
            return compare.build_failed_result(artefact.name, fault.code, fault.message)
        if reference is None or reference.reason is not None:
            reason = self._missing_reason if reference is None else str(reference.reason)
            return compare.build_not_verified_result(artefact.name, "NoReferenceValues", reason)
        if reference.trusts_code and not self._trusts_code:
            reason = "the training ran code from the repository of the model, but model.trustRemoteCode of this job is not true"
            return compare.build_not_verified_result(artefact.name, "CodeNotTrusted", reason)
        self._channel.report_stage(Stage.VERIFYING, f"loading the {artefact.name}")
        try:
            measured_values = self._measure_artefact(artefact, reference)
            base_values = self._compute_base_values(measured_values, reference)
            expected_values = self._compute_expected_values(artefact, trained_folder, reference)
        except UnfitArtefactError as error:
            return compare.build_failed_result(artefact.name, error.code, str(error))
        except NotComparableError as error:
            return compare.build_not_verified_result(artefact.name, error.code, str(error))
        is_rounded = artefact.name == MERGED_MODEL_NAME and has_16_bit_weights(artefact.folder)
        return compare.judge_artefact(artefact.name, measured_values.values, base_values, expected_values, is_rounded=is_rounded, device=measured_values.device)

    def _compute_expected_values(self, artefact: Artefact, trained_folder: Path, reference: ReferenceValues) -> ReferenceValues:
        """Return the values that the artefact must compute: the reference values of the training.

        A merged model with combined adapters must compute the same values as the base model with the unmerged adapters. This function computes these values.
        """
        if artefact.name != MERGED_MODEL_NAME or not self._run.spec.output.combine_adapters:
            return reference
        self._channel.report_stage(Stage.VERIFYING, "computing the values of the combined adapters")
        with _convert_to_verification_errors("combined adapters", self._inputs.model):
            model = _add_adapter(self._load_model(self._inputs.model, reference, quantizes=False), trained_folder, reference)
            model.base_model.set_adapter(load_combined_adapters(model, self._run, self._inputs.combined_adapters))
            expected_values = compare.replace_values(reference, self._compute_values(model, reference))
        del model
        _release_memory()
        return expected_values

    def _measure_artefact(self, artefact: Artefact, reference: ReferenceValues) -> ArtefactValues:
        """Load the artefact, compute the values of all rows, and release the memory of the model."""
        imports.hide_unneeded_libraries(self._run, keeps_bitsandbytes=_is_quantized(reference))
        imports.import_libraries()
        is_adapter = artefact.kind is OutputKind.ADAPTER
        with _convert_to_verification_errors(artefact.name, self._inputs.model):
            tokenizer = _load_tokenizer(artefact.folder, reference, trusts_code=self._trusts_code)
            if reference.reads_images:
                self._vision = _load_processor(artefact.folder, self._inputs.model if is_adapter else artefact.folder, tokenizer)
            model = self._load_model(self._inputs.model if is_adapter else artefact.folder, reference, quantizes=is_adapter)
            if is_adapter:
                model = _add_adapter(model, artefact.folder, reference)
            measured_values = ArtefactValues(self._compute_values(model, reference), device=model.get_input_embeddings().weight.device.type)
            if is_adapter and reference.head == "causal" and not _has_biases(artefact.folder):
                with model.disable_adapter():
                    measured_values = replace(measured_values, base_values=self._compute_values(model, reference))
        del model
        _release_memory()
        return measured_values

    def _compute_base_values(self, measured_values: ArtefactValues, reference: ReferenceValues) -> list[float] | None:
        """Return the values of the base model, or None if the model has a score head.

        If the values of the base model were already computed together with those of an adapter, the base model is not loaded again.
        """
        if measured_values.base_values is not None:
            self._base_values = measured_values.base_values
        if self._base_values is None and reference.head == "causal":
            self._channel.report_stage(Stage.VERIFYING, "loading the base model")
            try:
                with _convert_to_verification_errors("base model", self._inputs.model):
                    model = self._load_model(self._inputs.model, reference, quantizes=True)
                    self._fit_vocabulary(model, reference)
                    self._base_values = self._compute_values(model, reference)
            except UnfitArtefactError as error:  # The artefact may be correct even if the base model cannot be loaded.
                raise NotComparableError("BaseModelUnreadable", str(error)) from error
            del model
            _release_memory()
        return self._base_values

    @staticmethod
    def _fit_vocabulary(model: Any, reference: ReferenceValues) -> None:
        """Add embedding rows for new tokens to the base model, if the reference rows contain such tokens."""
        if model.get_input_embeddings().weight.shape[0] <= max(max(row.ids) for row in reference.rows):
            model.resize_token_embeddings(reference.tokenizer_length, mean_resizing=False)

    def _compute_values(self, model: Any, reference: ReferenceValues) -> list[float]:
        from finetune_trainer.verification.measure import compute_row_values

        device = model.get_input_embeddings().weight.device
        values_by_row = compute_row_values(
            model, reference.rows, head=reference.head, pad_token_id=reference.pad_token_id, device=device, autocast=reference.autocast, vision=self._vision
        )
        return [value for row_values in values_by_row for value in row_values]

    def _load_model(self, folder: Path, reference: ReferenceValues, *, quantizes: bool) -> Any:
        """Load a model in the number format of the training. Errors: NotComparableError if the model does not fit on the pod's GPUs."""
        import torch
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoModelForSequenceClassification,
            BitsAndBytesConfig,
        )

        from finetune_trainer.hardware import detect_hardware

        device = detect_hardware(self._run, 0).device
        supported_attention = TRANSFORMERS_ATTENTION if device.type == "cuda" else PORTABLE_ATTENTION
        options: dict[str, Any] = {
            "dtype": getattr(torch, reference.dtype), "attn_implementation": reference.attention if reference.attention in supported_attention else "sdpa",
            "trust_remote_code": self._trusts_code,
        }  # fmt: skip
        is_quantized = quantizes and _is_quantized(reference)
        if is_quantized:
            options["quantization_config"] = BitsAndBytesConfig.from_dict(dict(reference.quantization or {}))
            options["device_map"] = {"": str(device)}
        elif device.type == "cuda":
            options["device_map"] = choose_device_map(folder, torch.tensor([], dtype=options["dtype"]).element_size(), str(device), free_gpu_bytes())
        loader: Any = AutoModelForImageTextToText if reference.reads_images else AutoModelForCausalLM
        if reference.head == "reward":
            loader, options["num_labels"] = AutoModelForSequenceClassification, 1
        model = loader.from_pretrained(folder, **options).eval()
        return model if "device_map" in options else model.to(device)

    @property
    def _trusts_code(self) -> bool:
        return bool(self._run.spec.model.trust_remote_code)


def choose_device_map(folder: Path, bytes_per_value: int, device: str, free_bytes: list[int]) -> Any:
    """Return transformers' `device_map`: `device` if the model fits on the first GPU, else all GPUs. `free_bytes`: free memory of each GPU.

    Errors: NotComparableError ModelTooLarge.
    """
    needed_bytes = estimate_needed_bytes(folder, bytes_per_value)
    if needed_bytes is None or needed_bytes <= free_bytes[0]:
        return {"": device}
    if needed_bytes <= sum(free_bytes):
        return "auto"
    raise NotComparableError(
        "ModelTooLarge", f"the model needs {needed_bytes / 2**30:.1f} GiB, but the pod's GPUs ({len(free_bytes)}) "
        f"have only {sum(free_bytes) / 2**30:.1f} GiB free"
    )


def _is_quantized(reference: ReferenceValues) -> bool:
    """Whether the base model was quantised with bitsandbytes during training."""
    return (reference.quantization or {}).get("quant_method") == "bitsandbytes"


def _load_processor(folder: Path, model_folder: Path, tokenizer: Any) -> VisionProcessor:
    """Load the artefact's processor for images. Errors: ValueError if the model does not read images; errors of transformers."""
    from transformers import AutoConfig

    from finetune_trainer.library_internals import build_processor, image_text_processor_class

    processor_class = image_text_processor_class(AutoConfig.from_pretrained(model_folder))
    if processor_class is None:
        raise ValueError("config.json describes a model without images")
    return VisionProcessor(build_processor(processor_class, folder, tokenizer))


def _load_tokenizer(folder: Path, reference: ReferenceValues, *, trusts_code: bool) -> Any:
    """Load the artefact's tokenizer. Errors: UnfitArtefactError TokenizerDiffers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code)
    if reference.tokenizer_length and len(tokenizer) != reference.tokenizer_length:
        raise UnfitArtefactError(
            "TokenizerDiffers", f"the stored tokenizer has {len(tokenizer)} tokens, but the model was trained with {reference.tokenizer_length}"
        )
    return tokenizer


def _add_adapter(base_model: Any, folder: Path, reference: ReferenceValues) -> Any:
    """Load the adapter on the base model. If the adapter has new tokens, first add embedding rows for them to the base model, as PEFT requires."""
    from peft import PeftModel

    config = _read_adapter_config(folder)
    embedding_row_count = base_model.get_input_embeddings().weight.shape[0]
    token_ids = [token for ids in _read_token_indices(config).values() for token in ids]
    if embedding_row_count < reference.tokenizer_length and (any(token >= embedding_row_count for token in token_ids) or config.get("modules_to_save")):
        base_model.resize_token_embeddings(reference.tokenizer_length, mean_resizing=False)
    return PeftModel.from_pretrained(base_model, folder).eval()


def _has_biases(folder: Path) -> bool:
    """Whether the adapter changes biases. If it does, disabling the adapter does not restore the base model, because PEFT keeps the changed biases."""
    return (_read_adapter_config(folder).get("bias") or "none") != "none"


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def _read_token_indices(config: dict[str, Any]) -> dict[str, list[int]]:
    indices = config.get("trainable_token_indices") or {}
    return indices if isinstance(indices, dict) else {"": list(indices)}


@contextmanager
def _convert_to_verification_errors(name: str, base_folder: Path) -> Iterator[None]:
    """Convert exceptions raised within the context: for exhausted memory to NotComparableError, for an unreadable artefact to UnfitArtefactError.

    Failures of the node keep their type, so that the attempt is repeated.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        _release_memory()
        raise NotComparableError("OutOfMemory", f"the memory of this pod is too small to load the {name}") from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        failure, _ = classify_error(error)
        if isinstance(failure, MemoryExhaustedError):
            raise NotComparableError("OutOfMemory", f"the memory of this pod is too small to load the {name}") from error
        if not isinstance(failure, InternalError):  # After a fault of the node or of its disk, the artefact may still be correct.
            raise failure from error
        log.exception("the %s cannot be loaded", name)
        short_error_text = re.sub(r"\s+", " ", str(error)).replace(str(base_folder), "the base model").strip()[:300]
        raise UnfitArtefactError("ArtefactUnreadable", f"transformers cannot load the {name}: {type(error).__name__}: {short_error_text}") from error


def _release_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
