"""Tools whose files `finetune import` recognises but does not read: the keys of these files, and the fields for the most frequent keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_cli.importers.documents import peek_mapping
from finetune_cli.importers.draft import InputDocument


@dataclass(frozen=True)
class OtherTool:
    """A tool without an importer.

    A file belongs to the tool if all `required_keys` are at the top level of the file. `field_by_key`: the spec field for each of the tool's most
    frequent keys.
    """

    title: str
    required_keys: tuple[str, ...]
    field_by_key: Mapping[str, str]


OTHER_TOOLS: tuple[OtherTool, ...] = (
    OtherTool("Ludwig", ("input_features", "output_features"), {
        "base_model": "model.source", "adapter.type": "method.type", "adapter.r": "method.lora.rank", "adapter.alpha": "method.lora.alpha",
        "quantization.bits": "model.quantization.bits", "input_features[].name": "dataset.columns.question", "output_features[].name": "dataset.columns.answer",
        "trainer.learning_rate": "training.learningRate", "trainer.epochs": "training.epochs", "trainer.batch_size": "training.batchSizePerDevice",
        "trainer.gradient_accumulation_steps": "training.gradientAccumulationSteps"}),
    OtherTool("MS-Swift", ("model", "train_type"), {
        "model": "model.source", "dataset": "dataset.train", "train_type": "method.type", "lora_rank": "method.lora.rank", "lora_alpha": "method.lora.alpha",
        "max_length": "dataset.maxSequenceLength", "num_train_epochs": "training.epochs", "learning_rate": "training.learningRate",
        "per_device_train_batch_size": "training.batchSizePerDevice"}),
    OtherTool("Hugging Face AutoTrain", ("task", "base_model", "params"), {
        "base_model": "model.source", "data.path": "dataset.train", "data.valid_split": "dataset.validation", "params.peft": "method.type",
        "params.quantization": "model.quantization.bits", "params.lora_r": "method.lora.rank", "params.lora_alpha": "method.lora.alpha",
        "params.epochs": "training.epochs", "params.batch_size": "training.batchSizePerDevice", "params.lr": "training.learningRate",
        "params.block_size": "dataset.maxSequenceLength"}),
    OtherTool("LitGPT", ("checkpoint_dir", "train"), {
        "checkpoint_dir": "model.source", "data": "dataset.train", "lora_r": "method.lora.rank", "lora_alpha": "method.lora.alpha",
        "train.epochs": "training.epochs", "train.micro_batch_size": "training.batchSizePerDevice", "train.max_seq_length": "dataset.maxSequenceLength",
        "optimizer.init_args.lr": "training.learningRate"}),
    OtherTool("LLM Foundry", ("max_seq_len", "global_train_batch_size"), {
        "model.pretrained_model_name_or_path": "model.source", "train_loader.dataset.hf_name": "dataset.train", "max_seq_len": "dataset.maxSequenceLength",
        "max_duration": "training.epochs", "device_train_microbatch_size": "training.batchSizePerDevice", "optimizer.lr": "training.learningRate"}),
    OtherTool("NVIDIA NeMo", ("trainer", "exp_manager"), {
        "model.restore_from_path": "model.source", "model.peft.peft_scheme": "method.type", "model.peft.lora_tuning.adapter_dim": "method.lora.rank",
        "model.data.train_ds.file_names": "dataset.train", "model.data.validation_ds.file_names": "dataset.validation",
        "model.micro_batch_size": "training.batchSizePerDevice", "model.optim.lr": "training.learningRate", "trainer.max_steps": "training.maxSteps",
        "trainer.devices": "resources.gpusPerNode", "trainer.num_nodes": "resources.nodes"}),
)  # fmt: skip


def find_other_tool(documents: tuple[InputDocument, ...]) -> OtherTool | None:
    """Return the tool to which one of the documents belongs, or None."""
    for document in documents:
        document_keys = peek_mapping(document)
        for tool in OTHER_TOOLS:
            if all(key in document_keys for key in tool.required_keys):
                return tool
    return None


def describe_fields(tool: OtherTool) -> str:
    """Return a list of the tool's keys with their spec fields, for the hint of a mistake."""
    return ", ".join(f"{key} is {field}" for key, field in tool.field_by_key.items())
