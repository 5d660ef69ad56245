"""Tokens per second, MFU and peak memory of this trainer, of bare TRL and of hand-tuned TRL.

    python benchmarks/gpu_throughput.py --shape 8b --method lora --data packed     # one GPU
    python benchmarks/gpu_throughput.py --shape tiny --device cpu --no-write       # only checks that the benchmark runs

Method. The model is a Llama of the chosen shape. Its weights are random, because throughput does not depend on them. `packed` data are documents of different
lengths that are packed into full sequences. `chat` data are conversations of about 500 tokens, a few of them much longer. An arm is one program with one set
of settings. All arms train in one process on the same rows, one after the other, those with Liger's kernels last. Each arm runs `rounds` times. `ours` is a
whole rank of this trainer. Its FineTuneJob sets only model, data, method, sequence length and batch size, and has the defaults for everything else. `bare` is
TRL's SFTTrainer with TRL's defaults on 16-bit weights. The `tuned` arms are TRL with settings chosen by hand for speed. The loss of the first step is
recorded, because arms that do the same work must have the same loss. Time is measured from the end of the warm-up steps to the end of the last step, with the
device synchronised at both ends. Padding tokens are not counted. MFU is the number of the model's FLOPs per second (recomputation is not counted), divided by
the device's peak for dense bf16. With N parameters and A attention FLOPs per token, a token needs 4N + 3A FLOPs with adapters and 3 (2N + A) with full
training.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
MODEL_SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARY_SIZES = {"tiny": 448, "1b": 128256, "8b": 128256}
HAS_TIED_EMBEDDINGS = {"tiny": False, "1b": True, "8b": False}
MEAN_CHAT_TOKENS = 500
WORDS = ("red", "green", "blue", "one", "two", "three", "Paris", "Berlin", "fox", "dog")


@dataclass(frozen=True)
class Workload:
    """The training that all arms run: model, method, data and number of steps."""

    shape: str
    """Size of the model: a key of `MODEL_SHAPES`."""
    method: str
    data: str
    """`packed` or `chat`."""
    length: int
    """Tokens of a full sequence."""
    batch: int
    """Number of full sequences in a step. With unpacked chat data, a step has more rows, with about as many tokens in total."""
    steps: int
    warmup_steps: int
    is_gpu: bool

    @property
    def chat_rows_per_step(self) -> int:
        return max(1, self.batch * self.length // min(MEAN_CHAT_TOKENS, self.length // 2))


@dataclass(frozen=True)
class TrlArm:
    """Settings of an arm that runs TRL's SFTTrainer without this trainer."""

    checkpoints_activations: bool
    attention: str = "sdpa"
    uses_liger: bool = False
    compiles: bool = False
    packs: bool = False
    """Whether the arm also packs chat data."""
    dropout: float | None = None
    """LoRA's dropout. None: the same dropout as in the arm `ours`."""


OUR_ARMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, checkpointing off": {"training": {"gradientCheckpointing": "disabled"}},
    "ours, 16-bit weights": {"model": {"dtype": "bfloat16"}},
    "ours, packing": {"dataset": {"packing": True}},
    "ours, without liger": {"model": {"ligerKernels": False}},
    "ours, sdpa": {"model": {"attention": "sdpa"}},
}
"""Arms of this trainer, with the settings that differ from the defaults."""
TRL_ARMS = {
    "bare": TrlArm(checkpoints_activations=True),
    "tuned": TrlArm(checkpoints_activations=False, attention="varlen", packs=True, dropout=0.0, uses_liger=True),
    "tuned, without liger": TrlArm(checkpoints_activations=False, attention="varlen", packs=True, dropout=0.0),
    "tuned, sdpa": TrlArm(checkpoints_activations=False, packs=True, dropout=0.0),
    "tuned, checkpointing on": TrlArm(checkpoints_activations=True, attention="varlen", packs=True, dropout=0.0, uses_liger=True),
    "tuned, compiled": TrlArm(checkpoints_activations=False, attention="varlen", packs=True, dropout=0.0, uses_liger=True, compiles=True),
}


@dataclass
class ArmResult:
    """Measurements of one run of an arm, which is one program with one set of settings."""

    tokens_per_second: float | None = None
    step_seconds: float | None = None
    first_loss: float | None = None
    peak_memory_gb: float | None = None
    attention: str | None = None
    seconds: float = 0.0
    """Duration of the whole run, with loading and warm-up."""
    error: str | None = None


@dataclass
class CountingCollator:
    """A collator that also counts the tokens of each batch that are not padding."""

    collator: Any
    token_counts: list[int] = field(default_factory=list)

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        self.token_counts.append(int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()))
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)


def make_window_timer(workload: Workload, result: ArmResult) -> Any:
    """Create a callback that writes the speed of the steps after the warm-up and the first loss into `result`."""
    import torch
    from transformers import TrainerCallback

    class WindowTimer(TrainerCallback):
        started_at = 0.0

        def on_trainer_created(self, trainer: Any) -> None:
            self.collator = trainer.data_collator = CountingCollator(trainer.data_collator)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.collator.token_counts.clear()
            result.attention = str(model.config._attn_implementation)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step not in (workload.warmup_steps, workload.steps):
                return
            if workload.is_gpu:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if state.global_step == workload.warmup_steps:
                self.started_at = now
                return
            token_count = sum(self.collator.token_counts[workload.warmup_steps : workload.steps])
            result.tokens_per_second = token_count / (now - self.started_at)
            result.step_seconds = (now - self.started_at) / (workload.steps - workload.warmup_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs and result.first_loss is None:
                result.first_loss = logs["loss"]

    return WindowTimer()


def make_model(folder: Path, workload: Workload) -> Path:
    """Write a model with random bf16 weights, and the tests' small tokenizer, which has fewer tokens than the model. Returns `folder`."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.support.tiny import make_tokenizer

    if (folder / "config.json").exists():
        return folder
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if workload.is_gpu else "cpu"):
        model = LlamaForCausalLM(make_model_config(workload, tokenizer.eos_token_id, tokenizer.pad_token_id)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def make_model_config(workload: Workload, eos_token_id: int | None = None, pad_token_id: int | None = None) -> Any:
    """Return the configuration of the workload's model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **MODEL_SHAPES[workload.shape], vocab_size=VOCABULARY_SIZES[workload.shape], tie_word_embeddings=HAS_TIED_EMBEDDINGS[workload.shape],
        max_position_embeddings=max(workload.length, 512), dtype="bfloat16", eos_token_id=eos_token_id, pad_token_id=pad_token_id,
    )  # fmt: skip


def make_rows(workload: Workload) -> list[dict[str, Any]]:
    """Create random rows of different lengths, enough for all steps."""
    rng = random.Random(0)

    def make_text(word_count: int) -> str:
        """Return a text with `word_count` words. With the tests' tokenizer, a word is about one token."""
        return " ".join(rng.choice(WORDS) for _ in range(max(1, word_count)))

    rows: list[dict[str, Any]] = []
    if workload.data == "chat":
        for _ in range(workload.chat_rows_per_step * (workload.steps + 1)):
            word_count = min(workload.length // 2, max(16, int(rng.lognormvariate(5.9, 0.8))))
            messages = [{"role": "user", "content": make_text(word_count // 3)}, {"role": "assistant", "content": make_text(word_count * 2 // 3)}]
            rows.append({"messages": messages})
        return rows
    total_word_count = 0
    while total_word_count < 1.3 * workload.length * workload.batch * (workload.steps + 1):
        word_count = rng.randint(16, max(17, workload.length // 4)) // 2
        rows.append({"text": make_text(word_count)})
        total_word_count += word_count
    return rows


def make_our_spec(workload: Workload, changed_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec of an arm of this trainer. `changed_settings`: the settings that differ from the defaults."""
    from tests.support.learning import merge_mappings

    spec = merge_mappings(
        {
            "method": {"type": workload.method}, "resources": {"gpusPerNode": int(workload.is_gpu), "processesPerNode": 1},
            "dataset": {"maxSequenceLength": workload.length, **({"packing": True} if workload.data == "packed" else {})},
            "training": {"maxSteps": workload.steps, "gradientAccumulationSteps": 1, "learningRate": 1e-5},
            "tracking": {"loggingSteps": workload.steps},
        },
        changed_settings,
    )  # fmt: skip
    rows_per_device = workload.batch if spec["dataset"].get("packing") else workload.chat_rows_per_step
    return merge_mappings(spec, {"training": {"batchSizePerDevice": rows_per_device}})


def run_our_arm(workload: Workload, changed_settings: Mapping[str, Any], folder: Path, model_folder: Path, result: ArmResult) -> None:
    """Run this trainer once, and write the measurements into `result`."""
    from finetune_trainer import train
    from finetune_trainer.channel import Channel
    from trainer_overhead import MeasuringHooks

    from tests.support.learning import make_run

    class SessionWithoutOutput(train.TrainingSession):
        def _save_output(self, trainer: Any, trainable_model: Any) -> tuple[Path, dict[str, Any]]:
            return self.inputs.output_dir, {}

    run, inputs = make_run(folder, model_folder, make_our_spec(workload, changed_settings), make_rows(workload))
    train.preload(run)
    channel = Channel.create_recording(folder / "work")
    SessionWithoutOutput(run, channel, inputs, MeasuringHooks(make_window_timer(workload, result))).execute()


@dataclass(frozen=True)
class PreparedTokens:
    """The training data of the TRL arms."""

    token_dataset: Any
    """Dataset of token sequences."""
    run: Any
    """The run configuration of the arm `ours`, with which the data were tokenised."""


def prepare_tokens(workload: Workload, folder: Path, model_folder: Path) -> PreparedTokens:
    """Tokenise the rows as this trainer does."""
    from finetune_trainer import hardware, train
    from finetune_trainer import model as models
    from finetune_trainer.distributed import DistributedStrategy
    from finetune_trainer.objective.base import TrainingContext
    from finetune_trainer.objective.sft import OBJECTIVE

    from tests.support.learning import make_run

    run, inputs = make_run(folder, model_folder, make_our_spec(workload, {}), make_rows(workload))
    train.preload(run)
    detected_hardware = hardware.detect_hardware(run, 0)
    tokenizer, _ = models.load_tokenizer(run, inputs)
    context = TrainingContext(
        run, inputs, detected_hardware, DistributedStrategy(run, detected_hardware, 1), tokenizer, folder / "work" / "tokens", workload.length, []
    )
    splits, _ = OBJECTIVE.load_data(context)
    return PreparedTokens(splits.train, run)


def run_trl_arm(
    workload: Workload, arm: TrlArm, folder: Path, model_folder: Path, prepared_tokens: PreparedTokens, result: ArmResult
) -> None:
    """Run TRL once on the tokens that this trainer has prepared, and write the measurements into `result`."""
    import torch
    from finetune_trainer import attention, kernels
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, set_seed
    from trl import SFTConfig, SFTTrainer, pack_dataset

    attention.register()
    token_dataset = prepared_tokens.token_dataset
    is_packed = workload.data == "packed" or arm.packs
    if is_packed and workload.data != "packed":
        token_dataset = pack_dataset(token_dataset.select_columns(["input_ids", "labels"]), workload.length, "bfd")
    set_seed(42)
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ) if workload.method == "qlora" else None  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.bfloat16 if workload.is_gpu else torch.float32, attn_implementation=arm.attention,
        quantization_config=quantization_config, device_map={"": 0} if workload.is_gpu else None,
    )  # fmt: skip
    if workload.method != "full":
        lora_settings = prepared_tokens.run.spec.method.lora
        dropout = lora_settings.dropout if arm.dropout is None else arm.dropout
        lora_config = LoraConfig(task_type="CAUSAL_LM", r=lora_settings.rank, lora_alpha=lora_settings.alpha, lora_dropout=dropout, target_modules="all-linear")
        model = get_peft_model(model, lora_config)
    sft_config = SFTConfig(
        output_dir=str(folder / "bare"), per_device_train_batch_size=workload.batch if is_packed else workload.chat_rows_per_step,
        gradient_accumulation_steps=1, max_steps=workload.steps, learning_rate=1e-5, logging_steps=workload.steps, logging_first_step=True,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not workload.is_gpu, bf16=workload.is_gpu,
        gradient_checkpointing=arm.checkpoints_activations, use_liger_kernel=arm.uses_liger,
        liger_kernel_config=dict(kernels.LIGER_OPTIONS) if arm.uses_liger else None, torch_compile=arm.compiles, tf32=workload.is_gpu or None,
        dataset_kwargs={"skip_prepare_dataset": True}, packing=is_packed, max_length=workload.length if is_packed else None,
    )  # fmt: skip
    timer = make_window_timer(workload, result)
    trainer = SFTTrainer(
        model=model,
        args=sft_config,
        train_dataset=token_dataset.with_format(None),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        callbacks=[timer],
    )
    timer.on_trainer_created(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def run_arm(workload: Workload, arm_name: str, folder: Path, model_folder: Path, prepared_tokens: PreparedTokens) -> ArmResult:
    """Run one arm once. If the arm fails, the result contains the first line of the error."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    result, started_at = ArmResult(), time.perf_counter()
    gc.collect()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    if workload.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        if arm_name in OUR_ARMS:
            run_our_arm(workload, OUR_ARMS[arm_name], folder, model_folder, result)
        else:
            run_trl_arm(workload, TRL_ARMS[arm_name], folder, model_folder, prepared_tokens, result)
    except Exception as error:
        result.error = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
        traceback.clear_frames(error.__traceback__)  # otherwise the stack frames of the error would keep tensors in memory
    if workload.is_gpu:
        result.peak_memory_gb = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    result.seconds = round(time.perf_counter() - started_at, 1)
    return result


def compute_flops_per_token(workload: Workload, document_lengths: Sequence[int]) -> float:
    """Return the number of FLOPs that the model needs to train on one token. On average, a token attends to half of its document."""
    import torch
    from finetune_trainer.speed import ModelShape, flops_per_token
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shape = ModelShape.of(LlamaForCausalLM(make_model_config(workload)))
    attended_length = sum(length**2 for length in document_lengths) / sum(document_lengths)
    return flops_per_token(shape, attended_length, frozen_base=workload.method != "full")


def uses_liger(arm_name: str) -> bool:
    """Whether an arm uses Liger's kernels on a GPU."""
    return TRL_ARMS[arm_name].uses_liger if arm_name in TRL_ARMS else OUR_ARMS[arm_name].get("model", {}).get("ligerKernels") is not False


def measure_arms(workload: Workload, arm_names: Sequence[str], round_count: int, model_cache_folder: Path) -> Iterator[dict[str, Any]]:
    """Run the arms one after the other. After each run, yield all figures measured so far, so that an interrupted benchmark keeps them."""
    import torch
    from finetune_trainer.speed import peak_flops_of

    folder = Path(tempfile.mkdtemp(prefix="gpu-throughput-"))
    device_name = torch.cuda.get_device_name() if workload.is_gpu else "cpu"
    model_folder = make_model(model_cache_folder / workload.shape, workload)
    prepared_tokens = prepare_tokens(workload, folder / "tokens", model_folder)
    token_dataset = prepared_tokens.token_dataset
    if workload.data == "packed":
        document_lengths = [length for row in token_dataset["seq_lengths"] for length in row]
    else:
        document_lengths = [len(row) for row in token_dataset["input_ids"]]
    flops_per_token, peak_flops = compute_flops_per_token(workload, document_lengths), peak_flops_of(device_name)
    figures: dict[str, Any] = {"workload": asdict(workload), "device": device_name, "flopsPerToken": round(flops_per_token), "arms": {}}
    # Liger replaces the layers of a model type for the whole process.
    arm_names = sorted(arm_names, key=uses_liger)
    results_by_arm: dict[str, list[ArmResult]] = {arm_name: [] for arm_name in arm_names}
    for arm_name in arm_names:
        for round_number in range(round_count):
            result = run_arm(workload, arm_name, folder / f"{round_number}-{arm_names.index(arm_name)}", model_folder, prepared_tokens)
            results_by_arm[arm_name].append(result)
            speeds = [arm_result.tokens_per_second for arm_result in results_by_arm[arm_name] if arm_result.tokens_per_second]
            median_speed = statistics.median(speeds) if speeds else None
            figures["arms"][arm_name] = {
                "tokensPerSecond": median_speed and round(median_speed, 1),
                "mfu": median_speed and peak_flops and round(median_speed * flops_per_token / peak_flops, 4), "runs": len(speeds),
                "peakMemoryGb": result.peak_memory_gb, "stepSeconds": result.step_seconds and round(result.step_seconds, 4),
                "firstLoss": result.first_loss, "attention": result.attention, "seconds": result.seconds, "error": result.error,
            }  # fmt: skip
            yield figures


def parse_arms(text: str) -> list[str]:
    """Return the names of arms in an option, which are separated by semicolons. Errors: argparse.ArgumentTypeError for an unknown arm."""
    arm_names = [arm_name.strip() for arm_name in text.split(";")]
    for arm_name in arm_names:
        if arm_name not in OUR_ARMS and arm_name not in TRL_ARMS:
            raise argparse.ArgumentTypeError(f"there is no arm {arm_name!r}: write one of {'; '.join([*OUR_ARMS, *TRL_ARMS])}")
    return arm_names


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result unless --no-write is set. Errors: SystemExit if the chosen device is not available."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(MODEL_SHAPES), default="1b")
    parser.add_argument("--method", choices=["full", "lora", "qlora"], default="lora")
    parser.add_argument("--data", choices=["packed", "chat"], default="packed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="full sequences of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arms", type=parse_arms, default="ours; bare; tuned", help=f"separated by semicolons: {'; '.join([*OUR_ARMS, *TRL_ARMS])}")
    parser.add_argument("--model-cache", type=Path, help="folder that keeps the models for the next run")
    parser.add_argument("--output", type=Path, help="JSON file that is rewritten after every run of an arm")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda is not available: torch finds no GPU")
    workload = Workload(
        options.shape, options.method, options.data, options.length, options.batch, options.steps, options.warmup_steps, options.device == "cuda"
    )  # fmt: skip
    model_cache_folder = options.model_cache or Path(tempfile.mkdtemp(prefix="gpu-throughput-models-"))
    figures: dict[str, Any] = {}
    for figures in measure_arms(workload, options.arms, options.rounds, model_cache_folder):
        if options.output:
            options.output.write_text(json.dumps(figures))
    print(json.dumps(figures, indent=1))
    if not options.no_write:
        import record

        method = record.extract_method(__doc__).replace("\n", " ")
        print(record.write_result(f"gpu_throughput_{options.shape}_{options.method}_{options.data}", figures, method=method))
    return figures


if __name__ == "__main__":
    main()
