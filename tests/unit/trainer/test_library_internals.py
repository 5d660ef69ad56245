"""The private attributes of libraries that `library_internals` uses exist and behave as the trainer expects."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_trainer import library_internals as internals
from transformers import Trainer, TrainingArguments

from tests.support.learning import run_training
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "raw")


class OneWeightModel(torch.nn.Module):
    """A model with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: Any) -> dict[str, Any]:
        return {"loss": (self.weight * x).square().mean()}


HOOK_NAMES = (
    "run_epoch", "load_checkpoint_weights", "check_loaded_keys", "load_optimizer_and_scheduler", "save_optimizer_and_scheduler",
    "save_checkpoint", "load_best_model", "save_files", "clip_gradients", "gradient_norm",
)  # fmt: skip


class RecordingTrainer(internals.OpenTrainer):
    """Counts the calls of each public hook."""

    def __init__(self, *args: Any, **options: Any):
        self.calls = dict.fromkeys(HOOK_NAMES, 0)
        super().__init__(*args, **options)


def _make_counting_hook(name: str) -> Any:
    def hook(self: RecordingTrainer, *args: Any, **options: Any) -> Any:
        self.calls[name] += 1
        return getattr(super(RecordingTrainer, self), name)(*args, **options)

    return hook


for _name in HOOK_NAMES:
    setattr(RecordingTrainer, _name, _make_counting_hook(_name))


def make_recording_trainer(folder: Path, **options: Any) -> RecordingTrainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_steps=10, **options,
    )  # fmt: skip
    rows = [{"x": 1.0}, {"x": 2.0}]
    return RecordingTrainer(model=OneWeightModel(), args=args, train_dataset=rows, eval_dataset=rows)


def test_every_public_hook_belongs_to_one_private_method_of_the_trainer() -> None:
    private_names = [name for name, value in vars(internals.OpenTrainer).items() if name.startswith("_") and callable(value)]
    overridden_names = [name for name in private_names if not name.startswith("__")]
    assert len(overridden_names) == len(HOOK_NAMES)
    assert [name for name in overridden_names if not hasattr(Trainer, name)] == []


def test_a_training_run_calls_the_hooks_that_belong_to_it(tmp_path: Path) -> None:
    trainer = make_recording_trainer(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, label_names=["x"]
    )
    trainer.train()
    # The run saves two checkpoints. The keys are checked once, when the best weights are loaded.
    assert trainer.calls == {
        "run_epoch": 2, "load_checkpoint_weights": 0, "check_loaded_keys": 1, "load_optimizer_and_scheduler": 0,
        "save_optimizer_and_scheduler": 2, "save_checkpoint": 2, "load_best_model": 1, "save_files": 2, "clip_gradients": 2, "gradient_norm": 2,
    }  # fmt: skip


def test_a_resumed_run_calls_the_loading_hooks(tmp_path: Path) -> None:
    make_recording_trainer(tmp_path).train()
    resumed_trainer = make_recording_trainer(tmp_path / "again")
    resumed_trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name in ("load_checkpoint_weights", "check_loaded_keys", "load_optimizer_and_scheduler"):
        assert resumed_trainer.calls[name] == 1, name
    assert resumed_trainer.state.global_step == 2


def test_batches_are_moved_to_the_device_of_training(tmp_path: Path) -> None:
    trainer = make_recording_trainer(tmp_path)
    prepared_inputs = trainer.prepare_inputs({"x": torch.ones(2)})
    assert prepared_inputs["x"].device == trainer.args.device


def test_loss_sum_and_last_logged_step_belong_to_the_current_logging_window(tmp_path: Path) -> None:
    trainer = make_recording_trainer(tmp_path)
    trainer.train()  # logs nothing: two steps are fewer than logging_steps
    assert internals.last_logged_step(trainer) == 0
    assert internals.loss_sum(trainer).item() > 0
    internals.set_last_logged_step(trainer, 2)
    assert trainer._globalstep_last_logged == 2


def test_a_rank_uses_one_of_several_devices(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    args._n_gpu = 2
    assert args.train_batch_size == 8
    internals.use_one_device(args)
    assert args.train_batch_size == 4


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_head_is_among_the_weights_that_a_model_can_tie(is_tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    names = internals.tied_weight_names(LlamaForCausalLM(LlamaConfig(tie_word_embeddings=is_tied, **sizes)))
    assert "lm_head.weight" in names
    assert internals.tied_weight_names(OneWeightModel()) == set()


def build_dpo_trainer(folder: Path, model: Path) -> tuple[Any, Any]:
    """Build a DPO trainer with LoRA. Return the trainer and its PEFT model."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    net = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    rows = Dataset.from_list([{"prompt": "one", "chosen": "red", "rejected": "blue"}])
    args = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
    trainer = DPOTrainer(model=net, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model))
    return trainer, net


def test_a_cheap_switch_activates_the_adapters_that_peft_would_activate(model: Path, tmp_path: Path) -> None:
    from trl.trainer import dpo_trainer
    from trl.trainer.utils import use_adapter

    def list_active_adapters() -> list[Any]:
        return [net.active_adapter, net.base_model.active_adapter, *(getattr(module, "active_adapter", None) for module in net.modules())]

    trainer, net = build_dpo_trainer(tmp_path, model)
    with torch.no_grad():
        with use_adapter(net, "ref"):
            pass  # The first switch changes the initial value ["default"] to "default".
        adapters_before = list_active_adapters()
        with use_adapter(net, "ref"):
            expected_adapters = list_active_adapters()
        assert expected_adapters != adapters_before == list_active_adapters()
        with internals.cheap_reference_passes(trainer):
            for _ in range(3):
                with dpo_trainer.use_adapter(net, "ref"):
                    assert list_active_adapters() == expected_adapters
                assert list_active_adapters() == adapters_before
            trained_names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
            with dpo_trainer.use_adapter(net, None):
                assert all(module.disable_adapters for module in net.modules() if hasattr(module, "disable_adapters"))
        assert [name for name, parameter in net.named_parameters() if parameter.requires_grad] == trained_names


def test_functions_of_trl_are_only_replaced_within_the_context(model: Path, tmp_path: Path) -> None:
    from trl.trainer import dpo_trainer

    trainer, net = build_dpo_trainer(tmp_path, model)
    names = ("is_peft_model", "use_adapter", "disable_gradient_checkpointing")
    originals = [getattr(dpo_trainer, name) for name in names]
    with internals.cheap_reference_passes(trainer):
        assert all(getattr(dpo_trainer, name) is not original for name, original in zip(names, originals, strict=True))
        assert dpo_trainer.is_peft_model(net) and not dpo_trainer.is_peft_model(net.get_base_model())
        assert trainer.accelerator.unwrap_model(net) is net
        assert trainer.accelerator.unwrap_model(net, keep_torch_compile=False) is net
    assert [getattr(dpo_trainer, name) for name in names] == originals
    assert "unwrap_model" not in vars(trainer.accelerator)


def test_the_reported_attention_follows_a_later_change(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded_model = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa")
    assert internals.attention_implementation(loaded_model) == "sdpa"
    loaded_model.set_attn_implementation("eager")
    assert internals.attention_implementation(loaded_model) == "eager"


@pytest.mark.parametrize(
    ("model_type", "passes_boundaries"),
    [("llama", True), ("mistral", True), ("qwen3", True), ("gemma3_text", True), ("gemma2", False), ("bloom", False), ("llama4_text", False)],
)
def test_models_that_pass_document_boundaries_are_known_by_their_class(model_type: str, passes_boundaries: bool) -> None:
    """Gemma 2 has no sdpa, Bloom does not use the attention interface, and layers of Llama 4 need a mask."""
    from transformers import AutoConfig

    assert internals.passes_document_boundaries(AutoConfig.for_model(model_type)) is passes_boundaries


def test_a_model_with_code_of_its_own_passes_no_document_boundaries() -> None:
    from transformers import LlamaConfig

    class ForeignConfig(LlamaConfig):
        model_type = "foreign"

    assert not internals.passes_document_boundaries(ForeignConfig())


def test_a_quantised_model_is_only_accepted_within_the_context() -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    model: Any = SimpleNamespace(is_quantized=True, hf_quantizer=quantizer)
    with internals.accept_quantized_model(model):
        validate_quantization_for_training(model)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)


def test_a_new_accelerator_state_reports_fsdp_on_cpu() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(True)  # earlier tests in this process have set the state
    Accelerator(cpu=True)
    try:
        plugin = SimpleNamespace()
        internals.enable_fsdp_on_cpu(plugin)
        state = AcceleratorState()
        assert (state.distributed_type, state.fsdp_plugin) == (DistributedType.FSDP, plugin)
        assert PartialState().distributed_type == DistributedType.FSDP
    finally:
        AcceleratorState._reset_state(True)


def import_class(module: str, name: str) -> type:
    import importlib

    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "name"), [("trl.trainer.dpo_trainer", "DPOTrainer"), ("trl.trainer.kto_trainer", "KTOTrainer")]
)
def test_trl_prepares_rows_with_the_arguments_that_the_override_expects(module: str, name: str) -> None:
    trainer = import_class(module, name)
    expected_parameters = list(inspect.signature(internals.OwnDatasetPreparation._prepare_dataset).parameters)
    assert list(inspect.signature(trainer._prepare_dataset).parameters) == expected_parameters  # type: ignore[attr-defined]
    assert 'self._prepare_dataset(train_dataset, processing_class, args, "train")' in inspect.getsource(trainer)


def test_trl_generates_completions_through_the_overridden_method() -> None:
    trainer = import_class("trl.trainer.grpo_trainer", "GRPOTrainer")
    assert "self._generate_single_turn(" in inspect.getsource(trainer._generate)  # type: ignore[attr-defined]

    class PlainTrainer:
        accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16))

        def _generate_single_turn(self) -> torch.dtype:
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    class GeneratingTrainer(internals.GenerationUnderAutocast, PlainTrainer):
        pass

    assert GeneratingTrainer()._generate_single_turn() == torch.bfloat16


def test_trl_still_has_the_methods_that_are_replaced_for_a_vllm_server() -> None:
    """If an upgrade of TRL has changed one of these methods, this test shows which one. `tests/pod/objectives/test_generation_server.py` runs the methods."""
    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.trainer import grpo_trainer

    assert grpo_trainer.VLLMGeneration is VLLMGeneration
    assert "self._init_vllm()" in inspect.getsource(VLLMGeneration.__init__)
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    generate_source = inspect.getsource(VLLMGeneration.generate)
    assert "self.vllm_client.generate(" in generate_source and '"generation_kwargs": self.generation_kwargs' in generate_source
    client_source = inspect.getsource(VLLMClient.generate)
    assert 'self._post(f"{self.base_url}/v1/completions", json=payload)' in client_source and '"model": self.model' in client_source
    assert 'self.vllm_generation.vllm_client.get_server_info()["model_config"]' in inspect.getsource(grpo_trainer.GRPOTrainer.__init__)


@pytest.mark.parametrize(("configured_ids", "expected_ids"), [(None, [7]), (3, [7, 3]), (7, [7]), ([3, 7], [3, 7]), ([], [7])])
def test_end_tokens_are_those_of_trl(configured_ids: Any, expected_ids: list[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured_ids))
    assert internals.end_token_ids(model, SimpleNamespace(eos_token_id=7)) == expected_ids


def test_base_weights_survive_a_merge_bit_for_bit(model: Path) -> None:
    wrapped_model = make_peft_model(model)
    for name, weight in wrapped_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    names = [name for name, _ in wrapped_model.named_parameters() if "q_proj.base_layer" in name]
    weights_before = {name: wrapped_model.get_parameter(name).detach().clone() for name in names}

    def list_changed_weights() -> list[str]:
        return [name for name in names if not torch.equal(wrapped_model.get_parameter(name), weights_before[name])]

    with internals.unchanged_base_weights(wrapped_model):
        wrapped_model.merge_adapter()
        assert list_changed_weights() == names
        wrapped_model.unmerge_adapter()
        assert list_changed_weights() == names, "if merging did not round, this test would show nothing"
    assert list_changed_weights() == [] and len(names) == 2


@pytest.fixture
def trained_trainer(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An SFT trainer that has trained two steps without logging a line."""
    from trl.trainer.sft_trainer import SFTTrainer

    built_trainers: list[Any] = []
    original = SFTTrainer.__init__

    def remember(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        built_trainers.append(self)

    monkeypatch.setattr(SFTTrainer, "__init__", remember)
    run_training(tmp_path, model, {"training": {"maxSteps": 2}, "tracking": {"loggingSteps": 50}})
    yield built_trainers[0]


def test_trl_keeps_metrics_and_a_token_count_under_the_expected_names(trained_trainer: Any) -> None:
    internals.metric_lists(trained_trainer)["mine"] = [2.0, 4.0]
    assert trained_trainer._metrics["train"]["mine"] == [2.0, 4.0]
    assert internals.trained_tokens(trained_trainer) == 0  # TRL counts no tokens, because the trainer's own loss function counts them
    internals.set_trained_tokens(trained_trainer, 7)
    assert internals.trained_tokens(trained_trainer) == 7


def test_trainers_without_trl_have_no_metric_lists() -> None:
    trainer_without_trl = SimpleNamespace()
    assert (internals.metric_lists(trainer_without_trl), internals.trained_tokens(trainer_without_trl)) == ({}, 0)
    internals.set_trained_tokens(trainer_without_trl, 7)
    assert internals.trained_tokens(trainer_without_trl) == 0


def make_peft_model(model: Path, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)


def test_modules_that_peft_copies_are_found_with_their_original(model: Path) -> None:
    wrapped_model = make_peft_model(model, modules_to_save=["lm_head"])
    ((name, original),) = internals.find_copied_modules(wrapped_model).items()
    assert name.endswith("lm_head")
    assert isinstance(original, torch.nn.Linear) and not original.weight.requires_grad
    assert internals.find_copied_modules(make_peft_model(model)) == {}


def test_a_head_with_trained_rows_lacks_its_bias_until_it_is_exposed(model: Path) -> None:
    wrapped_model = make_peft_model(model, trainable_token_indices={"lm_head": [1]})
    head = wrapped_model.get_base_model().get_output_embeddings()
    with pytest.raises(AttributeError):
        _ = head.bias
    internals.expose_head_bias(wrapped_model)
    assert head.bias is None


def test_lora_is_a_continuable_adapter_type_and_an_unknown_type_is_not() -> None:
    assert "LORA" in internals.continuable_adapter_types()
    assert "NEWKIND" not in internals.continuable_adapter_types()


def test_deepspeed_loads_no_compiled_operation_for_its_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, DeepSpeed calls a builder, which compiles a C++ extension. The test replaces the builder, so that nothing is compiled."""
    import deepspeed
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    monkeypatch.setattr(ShareMemCommBuilder, "load", lambda self, verbose=False: "compiled")
    monkeypatch.setattr(deepspeed.accelerator.get_accelerator(), "create_op_builder", lambda name: ShareMemCommBuilder())
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {ShareMemCommBuilder.NAME: True}, raising=False)
    assert build_shm_op() == "compiled"
    internals.disable_compiled_deepspeed_operations()
    assert build_shm_op() is None
