"""GRPO: the model generates several answers to every prompt, and learns to prefer answers with higher rewards."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from datasets import Dataset
from finetune_api.errors import ConfigError, DataError
from finetune_api.rules import generation_server, has_test_set, value_or_default
from finetune_api.spec.enums import GrpoLoss, OverflowPolicy, TrainerType
from finetune_api.spec.trainer import Grpo as GrpoSpec
from trl.trainer import grpo_trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from finetune_trainer.arguments import shared_arguments
from finetune_trainer.data.load import Rows, load
from finetune_trainer.data.prepare import Splits, choose_chat_template, max_sequence_length, render_options
from finetune_trainer.data.rows import Conversation, Prompt, Turn
from finetune_trainer.data.template import RenderOptions, render
from finetune_trainer.distributed import local_rank_0_first
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.generation_server import GenerationServer, ServerOptions
from finetune_trainer.library_internals import GenerationUnderAutocast, generation_by_server
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import TEST_LOSS, DataFacts, HeldOutMetric, Objective, TrainingContext
from finetune_trainer.objective.reference_model import ReferenceModelMixin, load_reference_model
from finetune_trainer.objective.rewards import RESERVED_ARGUMENTS, RewardFunction, build_rewards, require_columns

TRL_LOSS_NAMES = {GrpoLoss.GRPO: "grpo", GrpoLoss.BNPO: "bnpo", GrpoLoss.DR_GRPO: "dr_grpo", GrpoLoss.DAPO: "dapo"}
"""TRL's name of each loss."""


class GrpoTrainer(GuardedTrainer, ReferenceModelMixin, GenerationUnderAutocast, GRPOTrainer):
    """TRL's trainer for GRPO, with the mixins of this project."""


class GrpoObjective(Objective[Splits, GRPOConfig]):
    """`trainer.type: grpo`."""

    trainer_type = TrainerType.GRPO
    trainer_class = GrpoTrainer
    held_out_metrics = (TEST_LOSS, HeldOutMetric("reward", "testReward", "reward"))

    def load_data(self, context: TrainingContext) -> tuple[Splits, DataFacts]:
        """Load the prompts and the columns that the rewards read.

        Errors: ConfigError RewardColumnMissing; DataError RowTooLong, NoTrainableToken.
        """
        is_templated = choose_chat_template(context.run, context.inputs, context.tokenizer)
        loaded_data = load(context.run, context.inputs)
        notes = list(loaded_data.summary.notes)
        rewards = reward_functions(context)
        dataset_by_split: dict[str, Dataset] = {}
        for name, rows in loaded_data.splits():
            options = replace(
                render_options(context.run, context.tokenizer, is_templated, loaded_data.summary.format), turn_markers=None
            )
            prompt_rows = _make_prompt_rows(rows, options, context.run.spec.dataset.use_chat_template is True)
            require_columns(rewards, [column for column in prompt_rows[0] if column != "prompt"])
            dataset_by_split[name] = _make_pickled_dataset(_drop_long_prompts(prompt_rows, context, notes, name))
        splits = Splits(dataset_by_split["train"], dataset_by_split.get("validation"), dataset_by_split.get("test"))
        return splits, DataFacts(len(splits.train), loaded_data.summary.format, notes, {"rows": loaded_data.summary.rows})

    def training_arguments(self, context: TrainingContext, *, has_validation_data: bool) -> GRPOConfig:
        """Create TRL's configuration. Errors: ConfigError CompletionTooLong; errors of `reward_functions`."""
        run, spec = context.run, context.run.spec.trainer.grpo or GrpoSpec()
        argument_fields = shared_arguments(run, context.inputs, context.hardware, context.strategy, has_validation_data=has_validation_data)
        del argument_fields["train_sampling_strategy"]
        generation_count = spec.num_generations or 8
        if argument_fields["metric_for_best_model"] is not None:
            argument_fields |= {"metric_for_best_model": "eval_reward", "greater_is_better": True}
        if argument_fields["eval_strategy"] != "no" or has_test_set(run.spec):
            batch_size = argument_fields["per_device_eval_batch_size"] * context.strategy.world_size
            argument_fields["num_generations_eval"] = _choose_generation_count_for_evaluation(batch_size, generation_count)
        return GRPOConfig(
            **argument_fields,
            num_generations=generation_count,
            max_completion_length=_compute_length_limits(context)[1],
            temperature=1.0 if spec.temperature is None else spec.temperature,
            top_p=1.0 if spec.top_p is None else spec.top_p,
            beta=0.0 if spec.beta is None else spec.beta,
            loss_type=TRL_LOSS_NAMES[spec.loss_type or GrpoLoss.DAPO],
            reward_weights=[reward.weight for reward in reward_functions(context)],
            use_vllm=generation_server(run.spec) is not None,
            vllm_mode="server",
        )

    def trainer_options(self, context: TrainingContext) -> dict[str, Any]:
        return {"reward_funcs": list(reward_functions(context))}

    def build_trainer(self, context: TrainingContext, args: GRPOConfig, model: Any, data: Splits) -> GrpoTrainer:
        """Build the Trainer. If the Trainer needs a reference model, `load_reference_model` loads this model."""
        server = _create_generation_server(context, args)
        with _replace_reference_loader(context), generation_by_server(server, local_rank_0_first) if server is not None else nullcontext():
            trainer: GrpoTrainer = super().build_trainer(context, args, model, data)
        return trainer


def _create_generation_server(context: TrainingContext, args: GRPOConfig) -> GenerationServer | None:
    """Return the vLLM server of the run; None if the trainer itself generates the completions. Errors: ConfigError GenerationAddressMissing."""
    run, options = context.run, generation_server(context.run.spec)
    if options is None:
        return None
    if run.generation_url is None:
        raise ConfigError(
            "GenerationAddressMissing", "trainer.grpo.generation.backend is vllm, but run.json contains no address of a server",
            hint="upgrade the operator to the version of the CRD",
        )  # fmt: skip
    context.generation_folder.mkdir(parents=True, exist_ok=True)
    return GenerationServer(
        run.generation_url, context.generation_folder,
        ServerOptions(
            port=urlsplit(run.generation_url).port or 80, gpus=value_or_default(options, "gpus"),
            gpu_memory_utilization=value_or_default(options, "gpu_memory_utilization"),
            dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
            max_length=sum(_compute_length_limits(context)), seed=args.seed,
        ),
        start_timeout_seconds=value_or_default(options, "start_timeout_seconds"),
        request_timeout_seconds=value_or_default(options, "request_timeout_seconds"),
    )  # fmt: skip


def _make_prompt_rows(rows: Rows, options: RenderOptions, renders_text_as_turns: bool) -> list[dict[str, Any]]:
    """Convert rows to dictionaries with a column `prompt` and the columns for the rewards. Every row gets all columns; missing values are None."""
    reserved_names = ("prompt", *RESERVED_ARGUMENTS)
    prompt_rows = []
    for _, example in rows:
        assert isinstance(example, Prompt), "`load` has checked the format"
        columns = {name: value for name, value in example.columns.items() if name not in reserved_names}
        prompt_rows.append({"prompt": _convert_prompt(example.prompt, options, renders_text_as_turns), **columns})
    all_columns = dict.fromkeys(name for row in prompt_rows for name in row)
    return [{**all_columns, **row} for row in prompt_rows]


def _convert_prompt(prompt: tuple[Turn, ...] | str, options: RenderOptions, renders_text_as_turns: bool) -> str | list[dict[str, Any]]:
    """Convert the prompt to TRL's form.

    With a chat template, turns become messages. Without a chat template, turns become one text, which ends where the answer begins. A prompt that is
    a text stays unchanged, unless `renders_text_as_turns` is true.
    """
    if isinstance(prompt, str):
        if not renders_text_as_turns:
            return prompt
        prompt = (Turn("user", prompt),)
    if options.use_chat_template:
        return [turn.to_message() for turn in prompt]
    return render(Conversation((*prompt, Turn("assistant", ""))), options).text


def _make_pickled_dataset(rows: Sequence[dict[str, Any]]) -> Dataset:
    """Build a data set that stores each row as pickled bytes, so that no row changes.

    In an Arrow column, all values have the same fields. Without pickling, every message would get the keys of all other messages, with null values.
    """
    return Dataset.from_dict({"row": [pickle.dumps(row) for row in rows]}).with_transform(_unpickle_rows)


def _unpickle_rows(batch: dict[str, list[bytes]]) -> dict[str, list[Any]]:
    rows = [pickle.loads(row) for row in batch["row"]]
    return {name: [row[name] for row in rows] for name in rows[0]}


@contextmanager
def _replace_reference_loader(context: TrainingContext) -> Iterator[None]:
    """Make TRL load the reference model with `load_reference_model` while the trainer is built.

    TRL 1.16 itself would load the reference model from disk, without the embedding rows of new tokens and without quantisation. TRL has
    no argument for another reference model, so this function replaces TRL's loading function.
    """
    original_loader = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *_, **__: load_reference_model(context)
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = original_loader


def reward_functions(context: TrainingContext) -> list[RewardFunction]:
    """Build the reward functions of this run. Errors: ConfigError RewardsMissing; errors of `build_rewards`."""
    reward_specs = context.run.spec.trainer.rewards
    if not reward_specs:
        raise ConfigError("RewardsMissing", "trainer.type grpo needs at least one reward", hint="write trainer.rewards")
    return build_rewards(reward_specs, context.inputs.config_maps)


def _choose_generation_count_for_evaluation(batch_size: int, generation_count: int) -> int:
    """Return the number of answers per prompt in evaluations: the largest divisor of `batch_size` from 2 to `generation_count`.

    `batch_size`: the evaluation batch size of all ranks together.
    """
    divisors = [count for count in range(2, generation_count + 1) if batch_size % count == 0]
    assert divisors, "the API's rules refuse a batch that cannot hold all answers to a prompt"
    return divisors[-1]


def _compute_length_limits(context: TrainingContext) -> tuple[int, int]:
    """Return the maximum number of tokens of a prompt, and of an answer."""
    max_row_length = max_sequence_length(context.run, context.tokenizer, context.max_positions)
    max_answer_length = answers.max_answer_length(context, max_row_length)
    assert max_answer_length is not None, "the API's defaults fill in trainer.maxCompletionLength for grpo"
    return max_row_length - max_answer_length, max_answer_length


def _drop_long_prompts(
    prompt_rows: list[dict[str, Any]], context: TrainingContext, notes: list[str], split: str
) -> list[dict[str, Any]]:
    """Drop prompts that leave too few tokens for an answer, and add a note. Prompts are not cut, because a cut prompt would ask for something else.

    Errors: DataError RowTooLong, NoTrainableToken.
    """
    max_prompt_length, max_answer_length = _compute_length_limits(context)
    fitting_rows = [row for row in prompt_rows if _count_tokens(row["prompt"], context.tokenizer) <= max_prompt_length]
    if len(fitting_rows) == len(prompt_rows):
        return prompt_rows
    limit_text = f"dataset.maxSequenceLength {max_prompt_length + max_answer_length} minus {max_answer_length} for the answer"
    problem = (
        f"{split}: {len(prompt_rows) - len(fitting_rows)} of {len(prompt_rows)} prompts have more than {max_prompt_length} tokens ({limit_text})"
    )
    if context.run.spec.dataset.overflow is OverflowPolicy.FAIL:
        raise DataError("RowTooLong", problem, hint="raise maxSequenceLength, or set dataset.overflow to drop")
    if not fitting_rows:
        raise DataError(
            "NoTrainableToken", f"{problem}: no row is left", hint="raise maxSequenceLength, or shorten the prompts"
        )
    notes.append(f"{problem} and were left out")
    return fitting_rows


def _count_tokens(prompt: Any, tokenizer: Any) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


OBJECTIVE = GrpoObjective()
