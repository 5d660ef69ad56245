"""The process `check` of a preparation: checks with the large libraries whether model, data and method fit together, without weights or GPU.

The process runs the code of a training rank up to the point where the rank loads the weights: it loads the tokenizer and the chat template, creates
the objective, and tokenises the rows. Then the process builds the model on torch's meta device, where tensors have shapes but no values, and applies
the method to the model. So a mistake in the spec causes the same error in this check as in a training pod. If a library cannot build a model without
values, a note says what was not checked.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn

from finetune_api import rules
from finetune_api.errors import ConfigError, InternalError
from finetune_api.pod import RunConfig
from finetune_api.status import DataReport, ResolvedConfig, Stage

from finetune_trainer import imports
from finetune_trainer.channel import Channel
from finetune_trainer.child_main import run_child_main
from finetune_trainer.data.prepared import TOKENS_FOLDER
from finetune_trainer.inputs import Inputs
from finetune_trainer.objective import load_objective, objective_module
from finetune_trainer.rows_request import SupervisorRowPreparation
from finetune_trainer.settings import Settings, load_run

if TYPE_CHECKING:
    from finetune_trainer.hardware import Hardware
    from finetune_trainer.objective.base import DataFacts

METHODS_THAT_NEED_WEIGHTS = ("spectrum",)
"""Methods that cannot be applied to a model without values, because they choose the trained layers by the values of the weights."""


def main() -> NoReturn:
    """Run the checks, report a failure, and end the process."""
    run_child_main("check", _check_with_inputs)


def _check_with_inputs(channel: Channel) -> None:
    run, _ = load_run(Settings.from_env())
    inputs = Inputs.read(channel.work_folder)
    if inputs is None:
        raise InternalError("InputsMissing", "the inputs were not downloaded before the check began")
    check(run, channel, inputs, SupervisorRowPreparation(channel))


def check(run: RunConfig, channel: Channel, inputs: Inputs, preparation: SupervisorRowPreparation | None = None) -> None:
    """Check the data and the method, and report the counts of rows, tokens and parameters.

    `preparation`: None if there is no supervisor that can download stored rows. Errors: those of `Objective.load_data` and of the method.
    """
    imports.preload(run, objective_module(rules.trainer_type_of(run.spec)))
    from finetune_api.memory.description import RunFacts

    from finetune_trainer import model, trial_step
    from finetune_trainer.data.prepare import NoPreparationCallbacks, template_writes_date
    from finetune_trainer.distributed import DistributedStrategy
    from finetune_trainer.memory_plan import choose_and_plan
    from finetune_trainer.objective.base import TrainingContext

    channel.report_stage(Stage.CHECKING, "rows and tokens")
    objective = load_objective(rules.trainer_type_of(run.spec))
    hardware = _describe_meta_hardware()
    strategy = DistributedStrategy(run, hardware, 1)
    strategy.prepare_process()
    tokenizer, notes = model.load_tokenizer(run, inputs)
    config = model.load_config(run, inputs)
    context = TrainingContext(
        run, inputs, hardware, strategy, tokenizer, channel.work_folder / TOKENS_FOLDER, model.max_positions(config),
        vision=model.load_processor(run, inputs, config, tokenizer), preparation=preparation or NoPreparationCallbacks(),
    )  # fmt: skip
    splits, facts = objective.load_data(context)
    for note in (*notes, *facts.notes):
        channel.report_note(note)
    if preparation is not None and template_writes_date(tokenizer):
        channel.report_note("prepared rows are neither stored nor used, because the chat template can write the date; the training pods tokenise the data")
    channel.report_stage(Stage.CHECKING, "model and method")
    trainable_count, total_count = _check_method(run, channel, inputs, context, config, objective.model_kind)
    memory_facts = RunFacts(longest_tokens=facts.longest_sequence or None)
    channel.report_plan(choose_and_plan(run, config, memory_facts, facts.report, trainable_count))
    channel.report_stage(Stage.CHECKING, "one step with a small copy of the model")
    note = trial_step.try_step(context, objective, splits, model.load_config(run, inputs))
    if note is not None:
        channel.report_note(note)
    resolved_config = ResolvedConfig(
        dataset_digest=inputs.dataset_digest, dataset_rows=facts.rows, dataset_format=facts.format.value,
        trainable_parameters=trainable_count, total_parameters=total_count,
    )  # fmt: skip
    data_report = _build_data_report(facts)
    if preparation is not None and preparation.digest is not None:
        data_report = data_report.model_copy(update={"digest": preparation.digest, "tokenised_rows": preparation.tokenised_rows})
    channel.send_message("checked", value={"data": data_report.to_wire(), "resolved": resolved_config.to_wire()})


def _describe_meta_hardware() -> Hardware:
    import torch

    from finetune_trainer.hardware import Hardware

    return Hardware(torch.device("meta"), "none", torch.float32, computes_in_bf16=False, computes_in_fp16=False, attention="eager")


def _build_data_report(facts: DataFacts) -> DataReport:
    train_tokens = facts.report.get("tokens", {}).get("train", {})
    return DataReport(
        rows=facts.report.get("rows"), tokens=train_tokens.get("tokens"), trained_tokens=train_tokens.get("trained_tokens"),
        median_length=train_tokens.get("median"), longest=train_tokens.get("longest"), truncated=train_tokens.get("truncated"),
    )  # fmt: skip


def _check_method(run: RunConfig, channel: Channel, inputs: Inputs, context: Any, config: Any, model_kind: str) -> tuple[int | None, int | None]:
    """Apply the method to the model on the meta device. Returns the number of trained values and of all values; both are None if the method was not checked.

    Errors: ConfigError of the method, for example if no module has a name that `method.lora.targetModules` contains.
    """
    from finetune_trainer import vocabulary
    from finetune_trainer.method.base import MethodContext
    from finetune_trainer.method.registry import create_method

    if rules.method_type_of(run.spec) in METHODS_THAT_NEED_WEIGHTS or inputs.adapter is not None:
        channel.report_note("the preparation did not check the method against the model, because this check needs the weights")
        return None, None
    method_context = MethodContext(
        run, inputs, context.hardware, context.strategy, model_kind,
        new_token_ids=tuple(vocabulary.new_token_ids(context.tokenizer, run.spec.model.new_tokens)), is_resumed=True,
    )  # fmt: skip
    try:
        trainable = create_method(method_context).apply(_build_without_values(run, config, model_kind))
    except ConfigError:
        raise
    except Exception as error:  # The library may have failed only because the weights have no values on the meta device. In this case, training works.
        logging.getLogger(__name__).warning("the method was not checked against the model", exc_info=error)
        channel.report_note(f"the preparation did not check the method against the model: {type(error).__name__}")
        return None, None
    from finetune_trainer.model import count_parameters

    return count_parameters(trainable.model)


def _build_without_values(run: RunConfig, config: Any, model_kind: str) -> Any:
    """Build the model from its configuration, on the meta device."""
    import torch

    from finetune_trainer.model import model_class

    if model_kind == "reward":
        config.num_labels = 1
    with torch.device("meta"):
        return model_class(run, model_kind).from_config(config, trust_remote_code=bool(run.spec.model.trust_remote_code), attn_implementation="eager")
