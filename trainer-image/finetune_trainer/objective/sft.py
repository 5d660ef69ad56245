"""Supervised fine-tuning: the next token of what the data says, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from datasets import Dataset
from finetune_api.errors import InternalError
from finetune_api.spec.enums import MethodType
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer.arguments import common
from finetune_trainer.data.prepare import Prepared, prepare
from finetune_trainer.distributed import connected
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.library_internals import attention_implementation
from finetune_trainer.objective.base import Facts, Setting, facts_of
from finetune_trainer.speed import Meter, Shape, flops_per_token, peak_of, trained_parameters

MODEL_KIND = "causal"


class Sft(GuardedTrainer, SFTTrainer):
    """TRL's trainer on rows that the data room has tokenised.

    Three differences: sums for metrics stay on the device and are reduced once per log line, where TRL waits for the device
    several times per micro-batch; the evaluation loss is that of all tokens together, not a mean of batch means; data
    preparation is ours.
    """

    multiple_choice = False
    """Whether rows are questions with one letter as the answer: evaluations then tell how many letters are right."""

    def __init__(self, *args: Any, **options: Any):
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        super().__init__(*args, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss per learned token of the whole effective batch, over ranks and accumulation steps alike."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, fused_lm_head=True)
        total = -outputs.log_probs.sum()
        count = (
            outputs.label_mask.sum()
            if num_items_in_batch is None
            else torch.as_tensor(num_items_in_batch, device=total.device)
        )
        loss = total / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:  # experts that are used unevenly; a mean of each micro-batch, and so of all of them
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        sums, own = self._sums["train" if self.model.training else "eval"], self._own(inputs, outputs.label_mask)
        sums["learned"] += (outputs.label_mask * own).sum()
        sums["nll"] += total.detach() if self.model.training else -(outputs.log_probs.detach() * own).sum()
        sums["correct"] += (outputs.is_top1 * own).sum()
        sums["entropy"] += (outputs.entropy.detach() * own).sum()
        sums["tokens"] += (
            inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel()
        )
        sums["places"] += inputs["input_ids"].numel()
        if self.multiple_choice and not self.model.training:
            # The letter is the first learned token of a row: it stands where learning begins.
            begins = outputs.label_mask & ~torch.nn.functional.pad(outputs.label_mask, (1, 0))[:, :-1]
            sums["letters"] += (begins * own).sum()
            sums["right"] += (outputs.is_top1 * begins * own).sum()
        return loss

    def _own(self, inputs: dict[str, Any], places: torch.Tensor) -> Any:
        """1 at the places of an evaluation's rows that are not repeated, as a tensor like `places`, or 1 for all of them.

        So that all ranks have as many rows, the last batches are filled up with rows that were looked at already.
        """
        state, documents = self.accelerator.gradient_state, inputs.get("cu_seq_lens_q")
        if self.model.training or not state.end_of_dataloader or state.remainder <= 0:
            return 1
        rows = len(inputs["input_ids"]) if documents is None else len(documents) - 1
        kept = max(0, min(rows, state.remainder - self.accelerator.process_index * rows))
        own = torch.zeros_like(places)
        if documents is None:
            own[:kept] = 1
        else:
            own[:, : int(documents[kept])] = 1
        return own

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """The loss of all tokens of the evaluation set together."""
        output = super().evaluation_loop(*args, **options)
        prefix = options.get("metric_key_prefix", "eval")
        sums = self._reduced("eval")
        if sums.get("learned") and output.metrics is not None:
            output.metrics[f"{prefix}_loss"] = sums["nll"] / sums["learned"]
            output.metrics[f"{prefix}_mean_token_accuracy"] = sums["correct"] / sums["learned"]
            if sums.get("letters"):
                output.metrics[f"{prefix}_answer_accuracy"] = sums["right"] / sums["letters"]
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add token accuracy, entropy, tokens seen and the share of padding since the last line.

        Tokens are counted in the Trainer's state, so that they are part of a checkpoint and a resumed run goes on counting.
        """
        sums = self._reduced("train") if self.model.training else {}
        if sums.get("learned"):
            self.state.num_input_tokens_seen += int(sums["tokens"])
            logs["mean_token_accuracy"] = sums["correct"] / sums["learned"]
            logs["entropy"] = sums["entropy"] / sums["learned"]
            logs["padding_share"] = 1 - sums["tokens"] / sums["places"]
        if self.model.training:
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def _reduced(self, mode: str) -> dict[str, float]:
        """Sums over all ranks since the last call; every rank calls it at the same time."""
        sums = self._sums[mode]
        if not sums:
            return {}
        names = sorted(sums)
        local = torch.stack(
            [torch.as_tensor(sums[name], dtype=torch.float64, device=self.args.device) for name in names]
        )
        total = self.accelerator.reduce(local, reduction="sum")
        sums.clear()
        return dict(zip(names, total.tolist(), strict=True))


def data(setting: Setting) -> tuple[Prepared, Facts]:
    """Token sequences, prepared by one rank of the node."""
    from accelerate import PartialState

    prepared = prepare(
        setting.run, setting.inputs, setting.tokenizer, model_limit=setting.limit, cache=setting.cache,
        first=PartialState().local_main_process_first(),
    )  # fmt: skip
    return prepared, facts_of(prepared)


def arguments(setting: Setting, *, evaluates: bool) -> SFTConfig:
    """TRL's configuration."""
    run = setting.run
    return SFTConfig(
        **common(run, setting.inputs, setting.hardware, setting.plan, evaluates=evaluates),
        packing=run.spec.dataset.packing is True,
        eval_packing=False,
        max_length=None if run.spec.dataset.packing is not True else run.spec.dataset.max_sequence_length or 2048,
        dataset_kwargs={"skip_prepare_dataset": True},
        average_tokens_across_devices=True,
    )


def build(setting: Setting, args: SFTConfig, model: Any, prepared: Prepared) -> Sft:
    """The trainer, ready to run."""
    trainer: Sft = connected(Sft, setting.plan, multiple_choice=prepared.choices)(
        model=model, args=args, train_dataset=_fast(prepared.train), eval_dataset=_fast(prepared.validation), processing_class=setting.tokenizer,
        callbacks=setting.callbacks,
    )  # fmt: skip
    base, whole = getattr(model, "get_base_model", lambda: model)(), setting.run.spec.method.type is MethodType.FULL
    report = prepared.reports["train"]
    mean = report.tokens / max(1, report.rows)
    flops = flops_per_token(Shape.of(base), mean, frozen_base=not whole, trained=trained_parameters(base))
    trainer.meter = Meter(flops_of_token=flops, peak=peak_of(setting.hardware.name), ranks=setting.plan.world_size)
    return trainer


def _fast(part: Dataset | None) -> Dataset | None:
    """Rows as arrays, which become tensors without a Python number for every token."""
    return None if part is None else part.with_format("numpy")


@torch.no_grad()
def require_isolation(trainer: Any) -> None:
    """Prove on this model and attention, where it trains, that packed documents do not see each other.

    What a document is read as must not depend on the one packed before it. The measure is what it does to the same two as one
    document. Both are read in one shape, so that kernels of 16 bits round alike. Errors: InternalError PackingLeaks.
    """
    model, size = trainer.model, min(trainer.model.config.get_text_config().vocab_size, 200)
    before, behind = ([place % size for place in range(start, start + 16)] for start in (10, 40))

    def read(first: list[int], lengths: list[int]) -> torch.Tensor:
        ids = first + behind
        row = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
        del row["labels"]
        with trainer.accelerator.autocast():
            logits: torch.Tensor = model(**trainer.prepare_inputs(row), use_cache=False).logits
        return logits[0, -len(behind) :].float()

    def depends(lengths: list[int]) -> torch.Tensor:
        return (read(before, lengths) - read(before[::-1], lengths)).abs().mean()

    training = model.training
    model.eval()
    packed, joined = depends([len(before), len(behind)]), depends([len(before) + len(behind)])
    model.train(training)
    if packed > 0.1 * joined:
        raise InternalError(
            "PackingLeaks", f"with attention {attention_implementation(model)} packed documents see each other",
            hint="set dataset.packing: false, or another model.attention",
        )  # fmt: skip
