"""Rules for objectives, their options, and the data formats that they learn from."""

from __future__ import annotations

from finetune_api.objectives import OBJECTIVES, objective_for_format, objectives_that_read
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    evaluates_during_training,
    has_test_set,
    method_type_of,
    trainer_type_of,
    value_or_default,
    world_size,
)
from finetune_api.rules.rewards import invalid_parameters
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    DpoLoss,
    MethodType,
    TrainerType,
)


@rule("FormatOfAnotherObjective")
def format_of_objective(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    trainer = trainer_type_of(spec)
    formats = OBJECTIVES[trainer].formats
    given = [("dataset.format", spec.dataset.format)] + [
        (f"dataset.mixture[{i}].format", item.format) for i, item in enumerate(spec.dataset.mixture or [])
    ]
    for path, form in given:
        if form is not None and form not in formats:
            yield (
                path,
                f"{form}, but trainer {trainer} cannot learn from {form} rows",
                f"write `format: {formats[0]}`, or `trainer: {{type: {objective_for_format(form)}}}`",
            )


@rule(
    "RewardsMissing",
    cel="!(has(self.trainer) && has(self.trainer.type) && self.trainer.type == 'grpo') || has(self.trainer.rewards)",
    message="trainer.type grpo needs at least one reward: write trainer.rewards",
)
def rewards_missing(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if trainer_type_of(spec) is TrainerType.GRPO and not spec.trainer.rewards:
        yield (
            "trainer.rewards",
            "grpo maximises rewards, and no reward is given",
            "write for example `rewards: [{builtin: regex, parameters: {pattern: '^Answer: '}}]`",
        )


@rule("RewardIncomplete")
def rewards(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, reward in enumerate(spec.trainer.rewards or []):
        path = f"trainer.rewards[{i}]"
        if (reward.builtin is None) == (reward.config_map_ref is None):
            yield (
                path,
                "a reward is either built in or a function from a ConfigMap",
                "write exactly one of `builtin` and `configMapRef`",
            )
        if reward.function is not None and reward.config_map_ref is None:
            yield (
                f"{path}.function",
                "it is a function in a ConfigMap's file, and no configMapRef is given",
                "add configMapRef, or remove it",
            )
        if reward.parameters and reward.config_map_ref is not None:
            yield (
                f"{path}.parameters",
                "only built-in rewards read parameters, and this one is a function from a ConfigMap",
                "remove them, and write the values into the function",
            )
        elif reward.builtin is not None:
            yield from invalid_parameters(f"{path}.parameters", reward.builtin, reward.parameters or {})
    names = [
        reward.name or (reward.builtin and reward.builtin.value) or reward.function or "reward"
        for reward in spec.trainer.rewards or []
    ]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield (
                f"trainer.rewards[{i}].name",
                f"two rewards are named {name!r}, and metrics are stored by name",
                "give each reward its own `name`",
            )


@rule("OptionOfAnotherObjective")
def options_of_another_objective(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    trainer = trainer_type_of(spec)
    options = {
        "dpo": (spec.trainer.dpo is not None, "remove it, or change trainer.type"),
        "grpo": (spec.trainer.grpo is not None, "remove it, or write `type: grpo`"),
        "rewards": (bool(spec.trainer.rewards), "remove it, or write `type: grpo`"),
        "maxCompletionLength": (
            spec.trainer.max_completion_length is not None,
            "remove it; dataset.maxSequenceLength limits rows",
        ),
    }
    for option, (is_given, write) in options.items():
        if is_given and option not in OBJECTIVES[trainer].options:
            objectives = " and ".join(", ".join(objectives_that_read(option)).rsplit(", ", 1))
            yield f"trainer.{option}", f"it is only read with {objectives}, and the objective is {trainer}", write
    if spec.dataset.packing and trainer is not TrainerType.SFT:
        yield "dataset.packing", f"true, but {trainer} cannot train on several rows in one sequence", "write `packing: false`"
    if spec.training.neftune_noise_alpha is not None and trainer is not TrainerType.SFT:
        yield "training.neftuneNoiseAlpha", f"it is only read with sft, and the objective is {trainer}", "remove it"
    if spec.training.group_by_length and trainer is not TrainerType.SFT:
        yield (
            "training.groupByLength",
            f"it has an effect only with sft, and the objective is {trainer}",
            "remove it",
        )
    if trainer is TrainerType.REWARD and spec.method.lora is not None and spec.method.lora.task_type is not None:
        yield (
            "method.lora.taskType",
            f"{spec.method.lora.task_type}, but a reward model outputs a score and no text",
            "remove it",
        )
    dpo = spec.trainer.dpo
    for field, readers in _DPO_READERS.items():
        if (
            dpo is not None
            and getattr(dpo, field)
            and trainer in (TrainerType.KTO, TrainerType.ORPO)
            and trainer not in readers
        ):
            yield (
                f"trainer.dpo.{type(dpo).model_fields[field].alias or field}",
                f"it is only read with {' and '.join(readers)}, and the objective is {trainer}",
                "remove it",
            )


_DPO_READERS: dict[str, tuple[TrainerType, ...]] = {
    "loss_types": (TrainerType.DPO,),
    "label_smoothing": (TrainerType.DPO,),
    "reference_model": (TrainerType.DPO, TrainerType.KTO),
}
LOSSES_WITH_LABEL_SMOOTHING = (DpoLoss.ROBUST, DpoLoss.EXO_PAIR)
"""Losses that read labelSmoothing."""


@rule("DpoLosses")
def dpo_losses(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    dpo = spec.trainer.dpo
    if dpo is None or trainer_type_of(spec) is not TrainerType.DPO:
        return
    losses = dpo.loss_types or [DpoLoss.SIGMOID]
    twice = next((loss for loss in losses if losses.count(loss) > 1), None)
    if twice is not None:
        yield "trainer.dpo.lossTypes", f"it names {twice} twice", "name each loss once"
    if dpo.label_smoothing and not any(loss in LOSSES_WITH_LABEL_SMOOTHING for loss in losses):
        yield (
            "trainer.dpo.labelSmoothing",
            f"it is {dpo.label_smoothing:g}, and {', '.join(losses)} do not read it",
            "write `lossTypes: [robust]`, which assumes wrongly labelled pairs, or remove it",
        )
    if not dpo.label_smoothing and DpoLoss.EXO_PAIR in losses:
        yield (
            "trainer.dpo.labelSmoothing",
            "it is 0, and loss exoPair takes its logarithm",
            "write `labelSmoothing: 0.001`",
        )


def min_batch_size_per_device(spec: FineTuneJobSpec) -> int:
    """Return the minimum rows per device: 2 for kto, which compares the rows of one batch with each other."""
    return 2 if trainer_type_of(spec) is TrainerType.KTO else 1


@rule("BatchTooSmall")
def kto_batch(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if int(value_or_default(spec.training, "batch_size_per_device")) < min_batch_size_per_device(spec):
        yield (
            "training.batchSizePerDevice",
            "it is 1, and kto compares the rows of one batch with each other",
            "write 2 or more",
        )


@rule("ObjectiveAndMethod")
def objective_and_method(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if trainer_type_of(spec) is TrainerType.ORPO and method_type_of(spec) is MethodType.PROMPT_TUNING:
        yield (
            "method.type",
            "orpo compares each output position with the row, and promptTuning inserts virtual tokens before the row",
            "write method prefixTuning or lora, or trainer.type dpo",
        )


@rule("GenerationsDoNotDivide")
def generations(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if trainer_type_of(spec) is not TrainerType.GRPO:
        return
    generations_per_prompt = int(value_or_default(spec.trainer.grpo, "num_generations")) if spec.trainer.grpo else 8
    rows = (
        int(value_or_default(spec.training, "batch_size_per_device"))
        * int(value_or_default(spec.training, "gradient_accumulation_steps"))
        * world_size(spec)
    )
    if rows % generations_per_prompt:
        yield (
            "trainer.grpo.numGenerations",
            f"{generations_per_prompt} does not divide the {rows} completions of one optimizer step (batchSizePerDevice x gradientAccumulationSteps x ranks)",
            "change one of these values so that numGenerations divides the completions",
        )
    batch = (
        spec.evaluation.batch_size_per_device or int(value_or_default(spec.training, "batch_size_per_device"))
    ) * world_size(spec)
    generates = evaluates_during_training(spec) or has_test_set(spec)
    if generates and not any(batch % size == 0 for size in range(2, generations_per_prompt + 1)):
        yield (
            "evaluation.batchSizePerDevice",
            f"{batch} answers of all ranks together cannot be divided into groups of two or more",
            "write an even number",
        )
