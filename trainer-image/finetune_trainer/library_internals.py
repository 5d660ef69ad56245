"""Accesses all private attributes of transformers, TRL, PEFT, accelerate and DeepSpeed that the trainer needs.

Any release of these libraries may rename a private attribute. So only this module uses private attributes. Each private attribute is used in only one
function or method, whose docstring gives the reason. `tests/unit/trainer/test_library_internals.py` checks the attributes against the installed
versions. This module was written for transformers 5.23, TRL 1.16, PEFT 0.21, accelerate 1.15 and DeepSpeed 0.19.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import Trainer, TrainingArguments

if TYPE_CHECKING:
    from finetune_trainer.generation_server import GenerationServer


class OpenTrainer(Trainer):  # type: ignore[misc]  # transformers ships no types
    """A Trainer with public methods that subclasses override instead of private methods of transformers.

    In each pair of methods, transformers calls the private method, and the private method calls the public method. The public method
    calls the implementation of transformers. transformers has no callback at these points (`trainer.py`, v5.23).
    """

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        self.run_epoch(*args, **options)

    def run_epoch(self, *args: Any, **options: Any) -> None:
        """Train on one pass over the data. Subclasses override this method, because transformers compares the step with `max_steps` only after each step."""
        super()._run_epoch(*args, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_checkpoint_weights(resume_from_checkpoint, model)

    def load_checkpoint_weights(self, folder: str, model: Any = None) -> None:
        """Load the weights of a checkpoint. Subclasses override this method to check the files, and because FSDP weights are stored in one plain folder."""
        super()._load_from_checkpoint(folder, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self.check_loaded_keys(list(load_result.missing_keys), list(load_result.unexpected_keys))

    def check_loaded_keys(self, missing_keys: list[str], unexpected_keys: list[str]) -> None:
        """Handle the names of weights that only the model (`missing_keys`) or only the checkpoint (`unexpected_keys`) has. transformers only logs a warning."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_optimizer_and_scheduler(checkpoint)

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and scheduler. Subclasses override this method to keep this attempt's learning rates, and to choose FSDP's state layout."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.save_optimizer_and_scheduler(output_dir)

    def save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save optimizer and scheduler. Subclasses override this method, because transformers uses the same FSDP layout for states and weights."""
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_checkpoint(model, trial)

    def save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Save a checkpoint. Subclasses override this method, because transformers writes all files before training continues."""
        super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        self.load_best_model()

    def load_best_model(self) -> None:
        """Load the best weights at the end of training. Subclasses override this method, because transformers only warns if the folder is missing."""
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.save_files(output_dir or self.args.output_dir, state_dict)

    def save_files(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        """Write weights, configuration and tokenizer on this rank. (The public `save_model` also decides which ranks write.)"""
        super()._save(output_dir, state_dict)

    def run_after_files(self, task: Callable[[], object]) -> None:
        """Run `task` at once, because all saved files are written already. A subclass that writes files later also runs `task` later."""
        task()

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.clip_gradients(model)

    def clip_gradients(self, model: Any) -> Any:
        """Clip the gradients of `model.parameters()`, and return their norm. Subclasses override this method, because `parameters` walks over all modules."""
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self.gradient_norm(model, grad_norm)

    def gradient_norm(self, model: Any, norm: Any = None) -> Any:
        """Return `norm` if it is given, else the gradient norm of `model.parameters()`. Subclasses override this: `parameters` walks over all modules."""
        return super()._get_grad_norm(model, norm)

    def prepare_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device in the same way as the training loop."""
        prepared_inputs: dict[str, Any] = self._prepare_inputs(batch)
        return prepared_inputs


class OwnDatasetPreparation:
    """Mixin for TRL trainers whose rows are already tokenised: replaces TRL's tokenisation.

    Only TRL's SFTTrainer has an option to skip the tokenisation (`skip_prepare_dataset`).
    """

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return self.prepare_rows(dataset, args, dataset_name)

    def prepare_rows(self, rows: Any, args: Any, dataset_name: str) -> Any:
        """Convert the rows of one data set to the columns that the trainer reads. `dataset_name`: `train`, or the name of an evaluation set."""
        return rows


class GenerationUnderAutocast:
    """Mixin for TRL's GRPOTrainer: generates completions under autocast, as in training.

    TRL generates outside autocast. Outside autocast, 32-bit trained weights and 16-bit frozen weights cannot be used in one multiplication.
    """

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        with self.accelerator.autocast():  # type: ignore[attr-defined]  # of the Trainer that this is mixed into
            return super()._generate_single_turn(*args, **options)  # type: ignore[misc]  # of the TRL trainer


@contextmanager
def generation_by_server(server: GenerationServer, main_rank_first: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let a GRPOTrainer of TRL that is built within the context generate its completions with `server`.

    TRL's classes for a vLLM server need the package vllm, for two purposes: to check that it is installed, and to send the weights with NCCL.
    The trainer's image cannot contain vllm. Therefore the methods that need vllm are replaced, and all other methods are TRL's own.
    `main_rank_first`: creates a context whose block rank 0 runs before the other ranks.
    """
    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.trainer import grpo_trainer

    class ServerClient(VLLMClient):  # type: ignore[misc]  # TRL ships no types
        def __init__(self) -> None:
            self.base_url, self.model = server.url, str(server.model_folder)

        def _post(self, url: str, json: dict[str, Any]) -> dict[str, Any]:
            return server.post(url.removeprefix(server.url), json)

        def get_server_info(self) -> dict[str, Any]:
            return server.get("/server_info?config_format=json")

    class ServerGeneration(VLLMGeneration):  # type: ignore[misc]  # TRL ships no types
        def _init_vllm(self) -> None:
            self.generation_kwargs = {"stop_token_ids": end_token_ids(self.model, self.processing_class)}
            with main_rank_first():
                if self.accelerator.is_main_process:
                    self.processing_class.save_pretrained(server.model_folder)
                    self._write_weights()
                    server.start()
                    self.vllm_client = ServerClient()

        def sync_weights(self) -> None:
            if self.accelerator.is_main_process:
                self._write_weights()
                server.reload_weights()

        def generate(self, *args: Any, **options: Any) -> Any:
            if self.accelerator.is_main_process:
                # The state of this random generator is part of each checkpoint, so a resumed run sends the same seeds.
                self.generation_kwargs["seed"] = int(torch.randint(2**31, (1,)))
            return super().generate(*args, **options)

        def _write_weights(self) -> None:
            # Under autocast, merging would round the weights to 16 bits.
            with torch.autocast(self.accelerator.device.type, enabled=False), torch.no_grad(), unchanged_base_weights(self.model):
                dtype = getattr(torch, server.options.dtype)
                weights = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in self._iter_named_params()}
            base_model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            base_model.save_pretrained(server.model_folder, state_dict=weights)

    original_generation = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = ServerGeneration
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = original_generation


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end a completion: the same ids as in TRL's GRPOTrainer."""
    ids = model.generation_config.eos_token_id
    ids_as_list = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return ids_as_list if tokenizer.eos_token_id in ids_as_list else [tokenizer.eos_token_id, *ids_as_list]


@contextmanager
def unchanged_base_weights(model: Any) -> Iterator[None]:
    """At the end of the context, restore the base weights below adapters bit for bit.

    PEFT merges an adapter by adding the product of its matrices to the base weight, and subtracts the product afterwards. The sum is rounded,
    so the base weight would change a little with each merge.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = {id(weight): weight for layer in layers for weight in layer.get_base_layer().parameters(recurse=False)}
    copies = [(weight, weight.detach().to("cpu", copy=True)) for weight in weights.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, copy in copies:
                weight.copy_(copy)


def disable_compiled_deepspeed_operations() -> None:
    """Let DeepSpeed use torch's collectives only. Call this function before DeepSpeed creates its process group.

    On a CPU, DeepSpeed compiles a C++ extension when it creates the process group (`build_shm_op` in `comm/torch.py`, v0.19). The image has no
    C++ compiler, and training does not need the extension, which sums the results of tensor-parallel inference. DeepSpeed skips operations
    that `__compatible_ops__` does not contain. DeepSpeed's public switches (`DS_BUILD_*`) have an effect only while DeepSpeed is being installed.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


@contextmanager
def cheap_reference_passes(trainer: Any) -> Iterator[None]:
    """Within the context, replace the functions that TRL's dpo, kto and grpo trainers call around each forward pass of the reference model.

    Each of these functions walks over all modules of the trained model. The replacements do not:
    * `is_peft_model` and `Accelerator.unwrap_model` return the results of their first calls, which do not change.
    * `use_adapter` sets the active adapter in a list of layers. It leaves `requires_grad` alone, because TRL computes no gradients in the reference
      model's forward pass.
    * `disable_gradient_checkpointing` does nothing. Without gradients, checkpointing has no effect anyway. TRL 1.16's function would turn
      checkpointing on again after the forward pass, but with transformers' defaults: `every_n_layers` and `offload` would be lost, and each call would
      add another hook to the embedding.
    """
    trl_class = next(kind for kind in type(trainer).__mro__ if kind.__module__.startswith("trl."))
    namespace = vars(sys.modules[trl_class.__module__])
    accelerator, unwrap = trainer.accelerator, trainer.accelerator.unwrap_model
    unwrap_once = cache(unwrap)
    replacements = {
        "is_peft_model": cache(namespace["is_peft_model"]), "use_adapter": AdapterSwitch(namespace["use_adapter"]).use_adapter,
        "disable_gradient_checkpointing": lambda model, options=None: nullcontext(),
    }  # fmt: skip
    original_functions = {name: namespace[name] for name in replacements}
    namespace.update(replacements)
    accelerator.unwrap_model = lambda model, *args, **options: unwrap(model, *args, **options) if args or options else unwrap_once(model)
    try:
        yield
    finally:
        namespace.update(original_functions)
        del accelerator.unwrap_model


class AdapterSwitch:
    """Activates another adapter of a PEFT model for a forward pass without gradients.

    The first switch to an adapter calls TRL's `use_adapter`, and records which active adapter each object then has. Later switches only set
    the recorded values.
    """

    def __init__(self, use_adapter: Callable[[Any, str | None], AbstractContextManager[None]]) -> None:
        self._use_adapter = use_adapter
        self._holders: dict[int, list[tuple[Any, str]]] = {}
        """Objects that have an active adapter, by the id of their model."""
        self._recorded_adapters: dict[tuple[int, str], list[Any]] = {}
        """The active adapter of each object in `_holders`, by the id of the model and the adapter's name."""

    @contextmanager
    def use_adapter(self, model: Any, adapter_name: str | None) -> Iterator[None]:
        """Activate an adapter within the context. None deactivates all adapters."""
        if adapter_name is None or torch.is_grad_enabled():
            with self._use_adapter(model, adapter_name):
                yield
            return
        key = (id(model), adapter_name)
        if key not in self._recorded_adapters:
            self._holders.setdefault(id(model), _find_adapter_holders(model))
            with self._use_adapter(model, adapter_name):
                self._recorded_adapters[key] = self._list_active_adapters(model)
                yield
            return
        previous_adapters = self._list_active_adapters(model)
        self._activate(model, self._recorded_adapters[key])
        try:
            yield
        finally:
            self._activate(model, previous_adapters)

    def _list_active_adapters(self, model: Any) -> list[Any]:
        return [vars(holder).get(name, NO_ACTIVE_ADAPTER) for holder, name in self._holders[id(model)]]

    def _activate(self, model: Any, active_adapters: list[Any]) -> None:
        for (holder, name), active_adapter in zip(self._holders[id(model)], active_adapters, strict=True):
            if active_adapter is not NO_ACTIVE_ADAPTER:
                vars(holder)[name] = active_adapter
            else:
                vars(holder).pop(name, None)


NO_ACTIVE_ADAPTER = object()
"""Marks an object that has no active adapter of its own, so that the default of its class applies."""


def _find_adapter_holders(model: Any) -> list[tuple[Any, str]]:
    """Return the objects of a PEFT model that have an active adapter, each with the name of the attribute."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = ((BaseTunerLayer, "_active_adapter"), (AuxiliaryTrainingWrapper, "_active_adapter"), (BaseTuner, "active_adapter"))
    holders = [(module, name) for module in model.modules() for kind, name in names if isinstance(module, kind)]
    return [(model, "active_adapter"), *holders]


class DeferFunction(Protocol):
    """A function that copies `values`, and calls `save` with the copy later. `is_collective`: whether `save` communicates with other ranks."""

    def __call__(self, save: Callable[..., None], values: Any, is_collective: bool) -> None: ...


@contextmanager
def deferred_saves(defer: DeferFunction) -> Iterator[None]:
    """Within the context, the functions that write tensors to files pass their work to `defer`.

    * `torch.save`: the optimizer's state, and all files of DeepSpeed.
    * `safetensors.torch.save_file`, which transformers and PEFT import as `safe_save_file`: weights and adapters.
    * `torch.distributed.checkpoint.save`, called by accelerate: the shards of FSDP's optimizer state.

    Objects that are no dictionaries, such as the TrainingArguments, are small and written at once.
    """
    import peft.peft_model
    import torch.distributed.checkpoint as distributed_checkpoint
    import transformers.modeling_utils

    save_object, save_tensors, save_shards = torch.save, transformers.modeling_utils.safe_save_file, distributed_checkpoint.save

    def defer_object(values: Any, file: Any, *args: Any, **options: Any) -> None:
        if isinstance(values, dict):
            defer(lambda copies: save_object(copies, file, *args, **options), values, is_collective=False)
        else:
            save_object(values, file, *args, **options)

    def defer_tensors(tensors: dict[str, Any], file: Any, metadata: dict[str, str] | None = None) -> None:
        defer(lambda copies: save_tensors(copies, file, metadata=metadata), tensors, is_collective=False)

    def defer_shards(state_dict: dict[str, Any], **options: Any) -> None:
        defer(lambda copies, process_group: save_shards(copies, process_group=process_group, **options), state_dict, is_collective=True)

    patches = (
        (torch, "save", defer_object), (transformers.modeling_utils, "safe_save_file", defer_tensors),
        (peft.peft_model, "safe_save_file", defer_tensors), (distributed_checkpoint, "save", defer_shards),
    )  # fmt: skip
    original_functions = [getattr(module, name) for module, name, _ in patches]
    for module, name, function in patches:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), original in zip(patches, original_functions, strict=True):
            setattr(module, name, original)


def use_one_device(args: TrainingArguments) -> None:
    """Limit a rank to one device. Without this limit, transformers would use all visible GPUs in one process, which TRL refuses."""
    args._n_gpu = min(args.n_gpu, 1)


def tied_weight_names(model: Any) -> set[str]:
    """Return the names of weights that share their tensor with another weight. Checkpoints store a shared tensor only once."""
    return set(getattr(model, "_tied_weights_keys", None) or ())


def attention_implementation(model: Any) -> str:
    """Return the attention implementation that the model uses. (The public argument `attn_implementation` only requests one.)"""
    return str(model.config._attn_implementation)


def passes_document_boundaries(config: Any) -> bool:
    """Whether transformers' language model for `config` passes the boundaries of packed documents to its attention layers.

    Three flags of the model class must be set. `_supports_attention_backend`: the model uses the attention and mask interfaces, and passes all keyword
    arguments to each layer. `_supports_flash_attn`: the model's layers also work without a mask. `_supports_sdpa`: sdpa can compute the model's attention.
    The result is False for models that run code from their repository.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    flag_names = ("_supports_attention_backend", "_supports_flash_attn", "_supports_sdpa")
    return all(getattr(model_class, flag, False) is True for flag in flag_names)


def supports_sdpa(config: Any) -> bool:
    """Whether transformers has sdpa attention for language models with this configuration.

    The answer is the flag `_supports_sdpa` of the model class. Code from a model's repository is assumed to have sdpa attention.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return model_class is None or getattr(model_class, "_supports_sdpa", False) is True


def image_text_processor_class(config: Any) -> type[Any] | None:
    """Return transformers' processor class for a vision-language model with this configuration. None if there is no such model or
    processor.

    For SmolVLM, return Idefics3's processor: it treats images in the same way, and SmolVLM's own processor also needs a package for videos.
    """
    from transformers import Idefics3Processor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    processor_class: type[Any] | None = Idefics3Processor if config.model_type == "smolvlm" else PROCESSOR_MAPPING.get(type(config), None)
    return processor_class


def build_processor(processor_class: type[Any], folder: Any, tokenizer: Any) -> Any:
    """Build the processor for images and text from a model's folder. The processor's part for videos is left out, because rows contain no videos.

    `ProcessorMixin` refuses a processor that lacks one of its parts, so the check of the parts is switched off while the processor is built. Pillow resizes
    the images; torchvision does so only if the model type has no processor with Pillow. Errors: ImportError, if the image processor needs a package that
    is not installed; errors of transformers for unreadable files.
    """
    from transformers import AutoImageProcessor

    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except ValueError as error:
        classes_without_packages = re.search(r"image processor classes: (.*?)\. None of these classes could be imported", str(error))
        if classes_without_packages is None:
            raise
        raise ImportError(f"the packages of {classes_without_packages.group(1).rpartition(' ')[2]}") from error
    processor_parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    settings, _ = processor_class.get_processor_dict(folder)
    unchecked_class: Any = type(processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": lambda self, name, part: None})
    processor = unchecked_class.from_args_and_dict([processor_parts.get(name) for name in processor_class.get_attributes()], settings)
    processor.__class__ = processor_class  # An instance of the temporary class `unchecked_class` could not be sent to worker processes.
    return processor


def reinterpreted_lora_targets(model: Any) -> frozenset[str]:
    """Return the names of linear layers that PEFT treats as weights of routed experts in this type of model.

    Before transformers v5, each expert had linear layers with these names. PEFT maps such a name in a LoRA configuration to the parameters
    that replaced these layers (`utils/transformers_weight_conversion.py`, v0.21), even if dense layers or shared experts of the model still
    have the name.
    """
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(getattr(model.config, "model_type", None))
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern) or ()) if pattern is not None else frozenset()


def connect_backbone(model: Any) -> None:
    """Let TRL's fused head find the layers and the number of experts of every language model.

    TRL calls `model.base_model` and reads `config.num_experts` (`trainer/utils.py`, v1.16). In transformers v5.23, `base_model_prefix` of
    Llama 4's language model does not name its layers, so `base_model` returns the model itself. The vision-language model of Llama 4 has no
    module with all layers but the head: it calls a complete language model. Some configurations store the number of experts under another name.
    """
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"
    elif model.base_model is model and getattr(getattr(model, "language_model", None), "lm_head", None) is not None:
        model.run_without_head = types.MethodType(_run_without_head, model)
        model.base_model_prefix = "run_without_head"
    config = model.config.get_text_config()
    if not hasattr(config, "num_experts") and hasattr(config, "num_local_experts"):
        type(config).attribute_map = {**type(config).attribute_map, "num_experts": "num_local_experts"}


def _run_without_head(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the output of the language model's layers. `self` is a vision-language model that calls a complete language model.

    The head of the language model is computed only for the last token, because it cannot be left out.
    """
    outputs: list[Any] = []
    hook = self.language_model.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        type(self).forward(self, *args, logits_to_keep=1, **kwargs)
    finally:
        hook.remove()
    return outputs[0]


@contextmanager
def accept_quantized_model(model: Any) -> Iterator[None]:
    """Let transformers build a Trainer on a quantised model that trains unquantised modules instead of an adapter.

    transformers refuses such a model as "purely quantized" (`trainer_utils.py`, `validate_quantization_for_training`) unless the flag
    `_hf_peft_config_loaded` says that an adapter is loaded. The flag is restored at the end, because saving also reads it.
    """
    loaded_flag_before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = loaded_flag_before


def enable_fsdp_on_cpu(fsdp_plugin: Any) -> None:
    """Enable FSDP on CPUs. accelerate 1.15 enables FSDP only for accelerators, and runs DDP on CPUs.

    AcceleratorState and PartialState are both set, because each new AcceleratorState copies the fields of PartialState.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": fsdp_plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def loss_sum(trainer: Any) -> Any:
    """Return the sum of this rank's losses since the last log line: a tensor with one number, which callers may change in place."""
    return trainer._tr_loss


def last_logged_step(trainer: Any) -> int:
    """Return the step of the last log line. The next logged loss is the mean over the steps since this step."""
    return int(trainer._globalstep_last_logged)


def set_last_logged_step(trainer: Any, step: int) -> None:
    """Set the step of the last log line, so that a resumed run continues the checkpoint's logging window."""
    trainer._globalstep_last_logged = step


def metric_lists(trainer: Any) -> MutableMapping[str, Any]:
    """Return TRL's training metrics since the last log line, by name. Empty for trainers without such metrics."""
    lists: dict[str, dict[str, Any]] = getattr(trainer, "_metrics", {"train": {}})
    return lists["train"]


def trained_tokens(trainer: Any) -> int:
    """Return TRL's count of tokens since the run began. 0 for trainers without this count."""
    return int(getattr(trainer, "_total_train_tokens", 0))


def set_trained_tokens(trainer: Any, tokens: int) -> None:
    """Set TRL's count of tokens since the run began, if the trainer has such a count."""
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = tokens


def find_copied_modules(model: Any) -> dict[str, Any]:
    """Return the original modules of `modules_to_save`, by name. PEFT freezes these modules and trains copies of them."""
    from peft.utils.other import ModulesToSaveWrapper

    return {
        name: module.original_module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def expose_head_bias(model: Any) -> None:
    """Give PEFT's wrapper of a head with trained rows the attribute `bias`: the loss reads it, but PEFT 0.21 only exposes `weight`."""
    head = model.get_base_model().get_output_embeddings()
    if type(head).__name__ == "TrainableTokensWrapper":
        head.bias = head.original_module.bias


def continuable_adapter_types() -> Collection[str]:
    """Return the values of `peft_type` in an adapter's configuration that the installed PEFT supports."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return [str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
