"""Supervised fine-tuning: the next token of what the data says, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from finetune_api.errors import InternalError
from finetune_api.spec.enums import DatasetFormat
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer.arguments import common
from finetune_trainer.data.prepare import Prepared, prepare
from finetune_trainer.distributed import connected
from finetune_trainer.engine import Guarded
from finetune_trainer.hardware import FULL_METHODS
from finetune_trainer.objective.base import Facts, Setting, facts_of
from finetune_trainer.speed import Meter, Shape, flops_per_token, peak_of

MODEL_KIND = "causal"


class Sft(Guarded, SFTTrainer):
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
        if return_outputs or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        outputs = model(**inputs, fused_lm_head=True)
        learned = outputs.label_mask.sum()
        total = -outputs.log_probs.sum()
        count = learned if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
        loss = total / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        sums = self._sums["train" if self.model.training else "eval"]
        sums["learned"] += learned
        sums["nll"] += total.detach()
        sums["correct"] += outputs.is_top1.sum()
        sums["entropy"] += outputs.entropy.detach().sum()
        sums["tokens"] += (
            inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel()
        )
        sums["places"] += inputs["input_ids"].numel()
        if self.multiple_choice and not self.model.training:
            # The letter is the first learned token of a row: it stands where learning begins.
            begins = outputs.label_mask & ~torch.nn.functional.pad(outputs.label_mask, (1, 0))[:, :-1]
            sums["letters"] += begins.sum()
            sums["right"] += (outputs.is_top1 * begins).sum()
        return loss

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
    choice = prepared.format is DatasetFormat.MCQ
    trainer: Sft = connected(Sft, setting.plan, multiple_choice=choice)(
        model=model, args=args, train_dataset=prepared.train, eval_dataset=prepared.validation, processing_class=setting.tokenizer,
        callbacks=setting.callbacks,
    )  # fmt: skip
    frozen = setting.run.spec.method.type not in FULL_METHODS
    report = prepared.reports["train"]
    mean = report.tokens / max(1, report.rows)
    flops = flops_per_token(Shape.of(getattr(model, "get_base_model", lambda: model)()), mean, frozen_base=frozen)
    trainer.meter = Meter(flops_of_token=flops, peak=peak_of(setting.hardware.name), ranks=setting.plan.world_size)
    if args.packing and not setting.plan.sharded_weights:
        require_isolation(trainer.model)
    return trainer


@torch.no_grad()
def require_isolation(model: Any) -> None:
    """Prove on this model and attention that packed documents do not see each other.

    A document behind another one must be read as it is read alone. The measure is what a real leak does to it: the same two
    documents with positions that run on. Errors: InternalError PackingLeaks.
    """
    size = min(model.config.get_text_config().vocab_size, 200)
    first = torch.arange(10, 26, device=model.device) % size
    second = torch.arange(40, 56, device=model.device) % size
    both, length = torch.cat([first, second])[None], len(first)
    places = torch.arange(2 * length, device=model.device)

    def read(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, position_ids=positions[None], use_cache=False).logits
        return logits[0, -length:].float()

    training = model.training
    model.eval()
    alone = read(second[None], places[:length])
    packed = (read(both, places % length) - alone).abs().mean()
    leaked = (read(both, places) - alone).abs().mean()
    model.train(training)
    if packed > 0.1 * leaked:
        raise InternalError(
            "PackingLeaks", f"with attention {model.config._attn_implementation} packed documents see each other",
            hint="set dataset.packing: false, or another model.attention",
        )  # fmt: skip
