"""Rules for the objective (`trainer.type`), its options, and the dataset formats that it can learn from."""

from __future__ import annotations

from finetune_api.objectives import OBJECTIVES, choose_objective_for_format, list_objectives_that_read
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    compute_batch_split,
    effective_batch,
    evaluates_during_training,
    has_test_set,
    method_type_of,
    min_batch_size_per_device,
    trainer_type_of,
    value_or_default,
    world_size,
)
from finetune_api.rules.rewards import find_invalid_parameters
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    DpoLoss,
    MethodType,
    TrainerType,
)


@rule("FormatOfAnotherObjective")
def check_format_of_objective(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    trainer = trainer_type_of(spec)
    supported_formats = OBJECTIVES[trainer].dataset_formats
    paths_and_formats = [("dataset.format", spec.dataset.format)] + [
        (f"dataset.mixture[{i}].format", item.format) for i, item in enumerate(spec.dataset.mixture or [])
    ]
    for path, dataset_format in paths_and_formats:
        if dataset_format is not None and dataset_format not in supported_formats:
            yield (
                path,
                f"{dataset_format}, but trainer {trainer} cannot learn from {dataset_format} rows",
                f"write `format: {supported_formats[0]}`, or `trainer: {{type: {choose_objective_for_format(dataset_format)}}}`",
            )


@rule(
    "RewardsMissing",
    cel="!(has(self.trainer) && has(self.trainer.type) && self.trainer.type == 'grpo') || has(self.trainer.rewards)",
    message="trainer.type grpo needs at least one reward: write trainer.rewards",
)
def check_rewards_missing(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if trainer_type_of(spec) is TrainerType.GRPO and not spec.trainer.rewards:
        yield (
            "trainer.rewards",
            "trainer.type grpo needs at least one reward",
            "write for example `rewards: [{builtin: regex, parameters: {pattern: '^Answer: '}}]`",
        )


@rule("RewardIncomplete")
def check_rewards(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, reward in enumerate(spec.trainer.rewards or []):
        path = f"trainer.rewards[{i}]"
        if (reward.builtin is None) == (reward.config_map_ref is None):
            yield (
                path,
                "a reward is either a built-in reward or a function in a ConfigMap",
                "write exactly one of `builtin` and `configMapRef`",
            )
        if reward.function is not None and reward.config_map_ref is None:
            yield (
                f"{path}.function",
                "function has no effect without configMapRef",
                "write configMapRef, or remove function",
            )
        if reward.timeout_seconds is not None and reward.config_map_ref is None:
            yield (
                f"{path}.timeoutSeconds",
                "timeoutSeconds has no effect without configMapRef",
                "write configMapRef, or remove timeoutSeconds",
            )
        if reward.parameters and reward.config_map_ref is not None:
            yield (
                f"{path}.parameters",
                "parameters have no effect on a reward from a ConfigMap",
                "remove parameters, and write the values into the function",
            )
        elif reward.builtin is not None:
            yield from find_invalid_parameters(f"{path}.parameters", reward.builtin, reward.parameters or {})
    reward_names = [
        reward.name or (reward.builtin and reward.builtin.value) or reward.function or "reward"
        for reward in spec.trainer.rewards or []
    ]
    for i, name in enumerate(reward_names):
        if name in reward_names[:i]:
            yield (
                f"trainer.rewards[{i}].name",
                f"two rewards have the name {name!r}, but each reward's metric needs a different name",
                "give each reward its own `name`",
            )


@rule("OptionOfAnotherObjective")
def check_options_of_another_objective(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    trainer = trainer_type_of(spec)
    presence_and_hint_by_option = {
        "dpo": (spec.trainer.dpo is not None, "remove trainer.dpo, or change trainer.type"),
        "grpo": (spec.trainer.grpo is not None, "remove trainer.grpo, or write `type: grpo`"),
        "rewards": (bool(spec.trainer.rewards), "remove trainer.rewards, or write `type: grpo`"),
        "maxCompletionLength": (
            spec.trainer.max_completion_length is not None,
            "remove maxCompletionLength; dataset.maxSequenceLength limits the length of rows",
        ),
    }
    for option, (is_set, hint) in presence_and_hint_by_option.items():
        if is_set and option not in OBJECTIVES[trainer].options:
            objectives_text = " and ".join(", ".join(list_objectives_that_read(option)).rsplit(", ", 1))
            yield f"trainer.{option}", f"{option} has an effect only with {objectives_text}, but trainer.type is {trainer}", hint
    if spec.dataset.packing and trainer is not TrainerType.SFT:
        yield "dataset.packing", f"true, but {trainer} cannot train on several rows in one sequence", "write `packing: false`"
    if spec.training.neftune_noise_alpha is not None and trainer is not TrainerType.SFT:
        yield "training.neftuneNoiseAlpha", f"neftuneNoiseAlpha has an effect only with sft, but trainer.type is {trainer}", "remove neftuneNoiseAlpha"
    if spec.training.group_by_length and trainer is not TrainerType.SFT:
        yield (
            "training.groupByLength",
            f"groupByLength has an effect only with sft, but trainer.type is {trainer}",
            "remove groupByLength",
        )
    if trainer is TrainerType.REWARD and spec.method.lora is not None and spec.method.lora.task_type is not None:
        yield (
            "method.lora.taskType",
            f"{spec.method.lora.task_type}, but a reward model outputs a score instead of text",
            "remove taskType",
        )
    dpo = spec.trainer.dpo
    for field, objectives in _OBJECTIVES_OF_DPO_FIELDS.items():
        if (
            dpo is not None
            and getattr(dpo, field)
            and trainer in (TrainerType.KTO, TrainerType.ORPO)
            and trainer not in objectives
        ):
            wire_name = type(dpo).model_fields[field].alias or field
            yield (
                f"trainer.dpo.{wire_name}",
                f"{wire_name} has an effect only with {' and '.join(objectives)}, but trainer.type is {trainer}",
                f"remove {wire_name}",
            )


_OBJECTIVES_OF_DPO_FIELDS: dict[str, tuple[TrainerType, ...]] = {
    "loss_types": (TrainerType.DPO,),
    "label_smoothing": (TrainerType.DPO,),
    "reference_model": (TrainerType.DPO, TrainerType.KTO),
}
"""For fields of `trainer.dpo`, the objectives that use the field."""
LOSSES_WITH_LABEL_SMOOTHING = (DpoLoss.ROBUST, DpoLoss.EXO_PAIR)
"""DPO losses that use `trainer.dpo.labelSmoothing`."""


@rule("DpoLosses")
def check_dpo_losses(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    dpo = spec.trainer.dpo
    if dpo is None or trainer_type_of(spec) is not TrainerType.DPO:
        return
    losses = dpo.loss_types or [DpoLoss.SIGMOID]
    duplicate_loss = next((loss for loss in losses if losses.count(loss) > 1), None)
    if duplicate_loss is not None:
        yield "trainer.dpo.lossTypes", f"the list contains {duplicate_loss} twice", "write each loss once"
    if dpo.label_smoothing and not any(loss in LOSSES_WITH_LABEL_SMOOTHING for loss in losses):
        yield (
            "trainer.dpo.labelSmoothing",
            f"{dpo.label_smoothing:g}, but labelSmoothing has no effect on {', '.join(losses)}",
            "write `lossTypes: [robust]` if some pairs have wrong labels, or remove labelSmoothing",
        )
    if not dpo.label_smoothing and DpoLoss.EXO_PAIR in losses:
        yield (
            "trainer.dpo.labelSmoothing",
            "0, but loss exoPair computes the logarithm of labelSmoothing",
            "write `labelSmoothing: 0.001`",
        )


@rule("BatchTooSmall")
def check_kto_batch(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    training, min_micro_batch = spec.training, min_batch_size_per_device(spec)
    if compute_batch_split(spec)[0] < min_micro_batch:
        if training.effective_batch_size is not None and training.batch_size_per_device is None:
            rows_per_step = min_micro_batch * (training.gradient_accumulation_steps or 1) * world_size(spec)
            yield (
                "training.effectiveBatchSize",
                f"{training.effective_batch_size}, which gives each rank a micro-batch of 1 row, but kto compares the rows of one batch with each other",
                f"write {rows_per_step} or more" + (", or a smaller gradientAccumulationSteps" if training.gradient_accumulation_steps else ""),
            )
            return
        yield (
            "training.batchSizePerDevice",
            "1, but kto compares the rows of one batch with each other",
            "write 2 or more",
        )


@rule("ObjectiveAndMethod")
def check_objective_and_method(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if trainer_type_of(spec) is TrainerType.ORPO and method_type_of(spec) is MethodType.PROMPT_TUNING:
        yield (
            "method.type",
            "orpo matches each output position with a token of the row, but promptTuning inserts virtual tokens before the row",
            "write `method: {type: prefixTuning}` or `method: {type: lora}`, or write `trainer: {type: dpo}`",
        )


@rule("GenerationsDoNotDivide")
def check_generations(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if trainer_type_of(spec) is not TrainerType.GRPO:
        return
    generations_per_prompt = int(value_or_default(spec.trainer.grpo, "num_generations")) if spec.trainer.grpo else 8
    completion_count = effective_batch(spec)
    if completion_count % generations_per_prompt:
        yield (
            "trainer.grpo.numGenerations",
            f"one optimizer step has {completion_count} completions (batchSizePerDevice x gradientAccumulationSteps x ranks), and {completion_count} is not divisible by {generations_per_prompt}",
            "change one of these values so that the number of completions is divisible by numGenerations",
        )
    answers_per_batch = (spec.evaluation.batch_size_per_device or compute_batch_split(spec)[0]) * world_size(spec)
    generates_for_evaluation = evaluates_during_training(spec) or has_test_set(spec)
    if generates_for_evaluation and not any(answers_per_batch % group_size == 0 for group_size in range(2, generations_per_prompt + 1)):
        yield (
            "evaluation.batchSizePerDevice",
            f"an evaluation batch of all ranks has {answers_per_batch} answers, which cannot be divided into groups of two or more",
            "write an even number",
        )
