"""Supervised fine-tuning: the model learns to predict each trained token of a row from the tokens before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from finetune_api.errors import ConfigError, InternalError
from finetune_api.pod import RunConfig
from finetune_api.rules import metrics_after_training, value_or_default
from finetune_api.spec.enums import EvaluationMetric, MethodType, TrainerType
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer.arguments import shared_arguments
from finetune_trainer.attention import uses_padding_free_batches
from finetune_trainer.data.prepare import PreparedData, prepare
from finetune_trainer.data.vision import IMAGE_SOURCES_COLUMN, VisionCollator
from finetune_trainer.distributed import local_rank_0_first
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.evaluation.token_metrics import IGNORED_LABEL, OutputHead, TokenCounts, shifted_predictions
from finetune_trainer.library_internals import attention_implementation
from finetune_trainer.objective.base import (
    TEST_LOSS,
    TEST_TOKEN_ACCURACY,
    DataFacts,
    HeldOutMetric,
    Objective,
    TrainingContext,
    image_arguments,
)
from finetune_trainer.speed import ModelShape, SpeedMeter, flops_per_token, peak_flops_of, trained_parameters

PADDED_IMAGES_NOTE = "batches are padded, because padding-free batches support only text"
CLASSIFICATION_METRICS = (EvaluationMetric.PRECISION, EvaluationMetric.RECALL, EvaluationMetric.F1)


class SftTrainer(GuardedTrainer, SFTTrainer):
    """TRL's trainer for already tokenised rows, with two changes.

    The sums for metrics stay on the device, and the ranks add them up once per log line. TRL's own code synchronises with the device
    several times per micro-batch. The evaluation loss is the mean over all tokens; TRL's own code computes a mean of batch means.
    """

    is_multiple_choice = False
    """Whether the answer of every row is one letter. If this is the case, evaluations measure the share of correct letters."""
    measures_classification = False
    """Whether evaluations also measure precision, recall and F1 of the predicted tokens. To measure them, each batch needs a second pass through the head."""

    def __init__(self, *args: Any, **options: Any):
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._token_counts: TokenCounts | None = None
        super().__init__(*args, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the micro-batch's share of the mean loss per trained token of the effective batch (all ranks and accumulation steps)."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        with self._keep_hidden_states() as kept_states:
            outputs = model(**inputs, fused_lm_head=True)
        if kept_states:
            self._count_predictions(inputs, kept_states[0], outputs.label_mask)
        total_loss = -outputs.log_probs.sum()
        token_count = (
            outputs.label_mask.sum()
            if num_items_in_batch is None
            else torch.as_tensor(num_items_in_batch, device=total_loss.device)
        )
        loss = total_loss / token_count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
            if self.strategy.gradient_factor > 1:  # Only the gradients are divided by `gradient_factor`; the logged loss keeps its value.
                divided_loss = loss / self.strategy.gradient_factor
                loss = divided_loss + (loss - divided_loss).detach()
        if self.aux_loss_enabled:
            # `aux_loss`, the load-balancing loss of the experts, is a mean over one micro-batch. So `aux_loss` is averaged over the micro-batches.
            accumulation_steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / accumulation_steps
        self._add_to_sums(inputs, outputs, total_loss)
        return loss

    @contextmanager
    def _keep_hidden_states(self) -> Iterator[list[torch.Tensor]]:
        """Yield a list that receives the last hidden states of the next forward pass, from which the head predicts tokens.

        The list stays empty unless this is an evaluation that measures precision, recall and F1.
        """
        hidden_states: list[torch.Tensor] = []
        if self.model.training or not self.measures_classification:
            yield hidden_states
            return
        backbone = getattr(self.model, "get_base_model", lambda: self.model)().base_model
        handle = backbone.register_forward_hook(lambda _module, _arguments, output: hidden_states.append(output.last_hidden_state))
        try:
            yield hidden_states
        finally:
            handle.remove()

    @torch.no_grad()
    def _count_predictions(self, inputs: dict[str, Any], hidden_states: torch.Tensor, label_mask: torch.Tensor) -> None:
        """Add the predicted tokens of one micro-batch to the counts of the evaluation. Repeated rows do not count."""
        head, labels = OutputHead.of(self.model), inputs["labels"].clone()
        if self._token_counts is None:
            self._token_counts = TokenCounts(head.vocabulary_size, hidden_states.device)
        counted_mask = self._build_counted_mask(inputs, label_mask[:, -(labels.shape[1] - 1) :])
        labels[:, 1:].masked_fill_(torch.as_tensor(counted_mask, device=labels.device) == 0, IGNORED_LABEL)
        with self.accelerator.autocast():
            self._token_counts.add(shifted_predictions(hidden_states[:, -labels.shape[1] :], labels, head))

    def _compute_classification_metrics(self) -> dict[str, float]:
        """Return precision, recall and F1 of the evaluation that has just ended. This is a collective operation: every rank must call this function."""
        counts, self._token_counts = self._token_counts, None
        if counts is None:
            return {}
        counts.reduce(lambda total: self.accelerator.reduce(total, reduction="sum"))
        value_by_metric = {"precision": counts.precision.value, "recall": counts.recall.value, "f1": counts.f1.value}
        return {name: value for name, value in value_by_metric.items() if value is not None}

    def _add_to_sums(self, inputs: dict[str, Any], outputs: Any, total_loss: torch.Tensor) -> None:
        """Add one micro-batch to the sums for metrics, without waiting for the device."""
        sums = self._sums["train" if self.model.training else "eval"]
        counted_mask = self._build_counted_mask(inputs, outputs.label_mask)
        sums["trained"] += (outputs.label_mask * counted_mask).sum()
        sums["nll"] += total_loss.detach() if self.model.training else -(outputs.log_probs.detach() * counted_mask).sum()
        sums["correct"] += (outputs.is_top1 * counted_mask).sum()
        sums["entropy"] += (outputs.entropy.detach() * counted_mask).sum()
        sums["tokens"] += (
            inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel()
        )
        sums["positions"] += inputs["input_ids"].numel()
        if self.is_multiple_choice and not self.model.training:
            # The option letter is the first token of each trained span.
            letter_mask = outputs.label_mask & ~torch.nn.functional.pad(outputs.label_mask, (1, 0))[:, :-1]
            sums["letters"] += (letter_mask * counted_mask).sum()
            sums["correct_letters"] += (outputs.is_top1 * letter_mask * counted_mask).sum()

    def _build_counted_mask(self, inputs: dict[str, Any], label_mask: torch.Tensor) -> Any:
        """Return a mask of the positions that count in an evaluation, with the shape of `label_mask`; the number 1 if all positions count.

        The last batches of an evaluation repeat some rows, so that all ranks have equally many rows. Repeated rows do not count.
        """
        gradient_state, document_boundaries = self.accelerator.gradient_state, inputs.get("cu_seq_lens_q")
        if self.model.training or not gradient_state.end_of_dataloader or gradient_state.remainder <= 0:
            return 1
        row_count = len(inputs["input_ids"]) if document_boundaries is None else len(document_boundaries) - 1
        counted_row_count = max(0, min(row_count, gradient_state.remainder - self.accelerator.process_index * row_count))
        mask = torch.zeros_like(label_mask)
        if document_boundaries is None:
            mask[:counted_row_count] = 1
        else:
            mask[:, : int(document_boundaries[counted_row_count])] = 1
        return mask

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Evaluate, and replace TRL's metrics with means over all tokens of the evaluation set."""
        output = super().evaluation_loop(*args, **options)
        prefix = options.get("metric_key_prefix", "eval")
        sums = self._reduce_sums("eval")
        if sums.get("trained") and output.metrics is not None:
            output.metrics[f"{prefix}_loss"] = sums["nll"] / sums["trained"]
            output.metrics[f"{prefix}_mean_token_accuracy"] = sums["correct"] / sums["trained"]
            if sums.get("letters"):
                output.metrics[f"{prefix}_answer_accuracy"] = sums["correct_letters"] / sums["letters"]
            output.metrics.update({f"{prefix}_{name}": value for name, value in self._compute_classification_metrics().items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the logged values: the number of tokens seen, and token accuracy, entropy and share of padding since the last log line.

        The number of tokens seen is part of the Trainer's state, which checkpoints contain. So a resumed run continues to count from the number in
        the checkpoint.
        """
        sums = self._reduce_sums("train") if self.model.training else {}
        if sums.get("trained"):
            self.state.num_input_tokens_seen += int(sums["tokens"])
            logs["mean_token_accuracy"] = sums["correct"] / sums["trained"]
            logs["entropy"] = sums["entropy"] / sums["trained"]
            logs["padding_share"] = 1 - sums["tokens"] / sums["positions"]
        if self.model.training:
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def _reduce_sums(self, mode: str) -> dict[str, float]:
        """Return the sums since the last call, added up over all ranks. This is a collective operation: every rank must call this function."""
        sums = self._sums[mode]
        if not sums:
            return {}
        sum_names = sorted(sums)
        sums_of_this_rank = torch.stack(
            [torch.as_tensor(sums[name], dtype=torch.float64, device=self.args.device) for name in sum_names]
        )
        sums_of_all_ranks = self.accelerator.reduce(sums_of_this_rank, reduction="sum")
        sums.clear()
        return dict(zip(sum_names, sums_of_all_ranks.tolist(), strict=True))


class SftObjective(Objective[PreparedData, SFTConfig]):
    """`trainer.type: sft`."""

    trainer_type = TrainerType.SFT
    trainer_class = SftTrainer
    held_out_metrics = (TEST_LOSS, TEST_TOKEN_ACCURACY, HeldOutMetric("answer_accuracy", "testAnswerAccuracy", "answer accuracy"))  # fmt: skip

    def load_data(self, context: TrainingContext) -> tuple[PreparedData, DataFacts]:
        """Load the token sequences. One rank of each node prepares the sequences."""
        data = prepare(
            context.run, context.inputs, context.tokenizer, max_positions=context.max_positions, cache_folder=context.token_cache,
            one_rank_first=local_rank_0_first(), vision=context.vision, preparation=context.preparation,
        )  # fmt: skip
        reports = {name: vars(report) for name, report in data.reports.items()}
        max_row_length = packed_sequence_length(context.run) or data.reports["train"].longest
        notes = data.notes if context.vision is None else [*data.notes, PADDED_IMAGES_NOTE]
        facts = DataFacts(data.rows["train"], data.format, notes, {"tokens": reports, "rows": data.rows}, max_row_length)
        return data, facts

    def training_arguments(self, context: TrainingContext, *, has_validation_data: bool) -> SFTConfig:
        run = context.run
        is_packed = run.spec.dataset.packing is True
        shared_fields = shared_arguments(run, context.inputs, context.hardware, context.strategy, has_validation_data=has_validation_data)
        return SFTConfig(
            **shared_fields | image_arguments(context),
            packing=is_packed,
            padding_free=uses_padding_free_batches(run, context.hardware.attention),
            eval_packing=False,
            max_length=packed_sequence_length(run),
            dataset_kwargs={"skip_prepare_dataset": True},
            average_tokens_across_devices=True,
            pad_to_multiple_of=context.strategy.context_parallel_size,
        )

    def trainer_options(self, context: TrainingContext) -> dict[str, Any]:
        if context.vision is None:
            return {}
        return {"data_collator": VisionCollator(context.vision, int(context.tokenizer.pad_token_id))}

    def trainer_attributes(self, data: PreparedData) -> dict[str, Any]:
        return {"is_multiple_choice": data.is_multiple_choice}

    def build_trainer(self, context: TrainingContext, args: SFTConfig, model: Any, data: PreparedData) -> SftTrainer:
        """Build the Trainer with a meter for tokens per second and MFU."""
        data_as_arrays = replace(data, train=_as_arrays(data.train), validation=data.validation and _as_arrays(data.validation))
        trainer: SftTrainer = super().build_trainer(context, args, model, data_as_arrays)
        base_model = getattr(model, "get_base_model", lambda: model)()
        is_full = context.run.spec.method.type is MethodType.FULL
        report = data.reports["train"]
        mean_length = report.tokens / max(1, report.rows)
        flops_of_token = flops_per_token(ModelShape.of(base_model), mean_length, frozen_base=not is_full, trained_count=trained_parameters(base_model))
        trainer.measures_classification = self._measures_classification(context.run, trainer)
        # The estimated FLOPs are right only for text models. If `peak_flops` is None, no utilisation is reported.
        peak_flops = peak_flops_of(context.hardware.name) if context.vision is None else None
        trainer.meter = SpeedMeter(flops_of_token=flops_of_token, peak_flops=peak_flops, rank_count=context.strategy.world_size)
        return trainer

    @staticmethod
    def _measures_classification(run: RunConfig, trainer: SftTrainer) -> bool:
        """Whether the spec requests precision, recall or F1, and every rank has the whole head."""
        is_requested = any(metric in metrics_after_training(run.spec) for metric in CLASSIFICATION_METRICS)
        return is_requested and not trainer.is_fsdp_enabled and not is_deepspeed_zero3_enabled()

    def verify_trainer(self, trainer: Any) -> None:
        """Check that packed documents, or the rows of a padding-free batch, do not attend to each other. Errors: PackingLeaks."""
        if trainer.args.packing or trainer.args.padding_free:
            require_isolated_documents(trainer)


def packed_sequence_length(run: RunConfig) -> int | None:
    """Return the number of tokens of a packed sequence; None without packing."""
    return value_or_default(run.spec.dataset, "max_sequence_length") if run.spec.dataset.packing else None


def _as_arrays(rows: Dataset) -> Dataset:
    """Return the data set with its rows as numpy arrays. Arrays can be converted to tensors without creating a Python integer for each token."""
    return rows.with_format("numpy", columns=[name for name in rows.column_names if name != IMAGE_SOURCES_COLUMN], output_all_columns=True)


NO_PACKING_TEXT = "packed sequences apart"
"""Part of transformers' error message for packed rows in a model with convolution layers, if a package for these layers is missing."""


@torch.no_grad()
def require_isolated_documents(trainer: Any) -> None:
    """Check that this model and attention kernel do not let packed documents, or the rows of a padding-free batch, attend to each other.

    The scores of a document must not depend on the preceding document. The check measures how much the scores change when the preceding
    tokens are reversed: once if these tokens are a separate document, and once if they are part of the same document. The change with separate
    documents must be at most a tenth of the change within one document. All four sequences have the same shape, so that 16-bit kernels round alike.
    With DeepSpeed, the model is called as in training, because ZeRO stage 3 gathers parameters in the order of the first call. With other strategies
    the head computes logits, because with torch 2.11, FSDP fails in the backward pass if the head was never called.
    Errors: ConfigError PackingLeaks for packing, which the user chose; InternalError PackingLeaks for padding-free batches.
    """
    model, token_id_limit = trainer.model, min(trainer.model.config.get_text_config().vocab_size, 200)
    first_tokens, second_tokens = ([index % token_id_limit for index in range(start, start + 16)] for start in (10, 40))

    def score_second_document(first_document: list[int], lengths: list[int]) -> torch.Tensor:
        """Return the log-probabilities of the second document's tokens (DeepSpeed), or the logits at its positions."""
        ids = first_document + second_tokens
        batch = trainer.prepare_inputs(trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}]))
        with trainer.accelerator.autocast():
            if trainer.is_deepspeed_enabled:
                log_probs: torch.Tensor = model(**batch, use_cache=False, fused_lm_head=True).log_probs
                return log_probs[0, 1 - len(second_tokens) :].float()
            del batch["labels"]
            logits: torch.Tensor = model(**batch, use_cache=False).logits
        return logits[0, -len(second_tokens) :].float()

    def measure_score_change(document_lengths: list[int]) -> torch.Tensor:
        """Return the mean change of the second document's scores when the tokens before it are reversed."""
        return (score_second_document(first_tokens, document_lengths) - score_second_document(first_tokens[::-1], document_lengths)).abs().mean()

    was_training = model.training
    model.eval()
    try:
        change_as_two_documents = measure_score_change([len(first_tokens), len(second_tokens)])
        change_as_one_document = measure_score_change([len(first_tokens) + len(second_tokens)])
    except ValueError as error:
        if NO_PACKING_TEXT not in str(error):
            raise
        problem = str(error).partition(". ")[0]  # The rest of transformers' message says what to install, but users cannot change the image.
    else:
        is_isolated = change_as_two_documents <= 0.1 * change_as_one_document
        problem = "" if is_isolated else f"attention {attention_implementation(model)} lets them attend to each other"
    model.train(was_training)
    if problem and trainer.args.padding_free:
        hint = "set model.attention: sdpa for padded batches"
        raise InternalError("PackingLeaks", f"the rows of a padding-free batch cannot be kept apart: {problem}", hint=hint)
    if problem:
        hint = "set dataset.packing: false, or choose another model.attention"
        raise ConfigError("PackingLeaks", f"packed documents cannot be kept apart in a model of type {trainer.model.config.model_type}: {problem}", hint=hint)


OBJECTIVE = SftObjective()
