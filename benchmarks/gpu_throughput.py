"""Tokens per second of this trainer and of a bare TRL script, with packed sequences and random weights.

    python benchmarks/gpu_throughput.py --shape 8b --method lora            # one GPU
    python benchmarks/gpu_throughput.py --shape tiny --device cpu --no-write  # only checks that the benchmark runs

Method. The model is a Llama of the chosen shape. Its weights are random, because throughput does not depend on them. Rows of random words are packed
into full sequences. This trainer and bare TRL train alternately for the same number of steps with the same arguments in one process; the
first pair warms up and is not counted. Only optimizer steps are timed, and padding tokens are not counted. MFU is the rate of the model's
FLOPs (recomputation is not counted), divided by the device's dense bf16 peak. With N parameters and A attention FLOPs per token, a token
needs 4N + 3A FLOPs with adapters and 3 (2N + A) with full training.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
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
TIED_EMBEDDINGS = {"tiny": False, "1b": True, "8b": False}


def make_model(folder: Path, shape_name: str, sequence_length: int) -> Path:
    """Write a model with random bf16 weights and the small tokenizer of the tests, which uses only a part of the vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.tiny import make_tokenizer

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **MODEL_SHAPES[shape_name], vocab_size=VOCABULARY_SIZES[shape_name], tie_word_embeddings=TIED_EMBEDDINGS[shape_name],
        max_position_embeddings=max(sequence_length, 512),
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def make_rows(sequence_length: int, sequence_count: int) -> list[dict[str, str]]:
    """Create random rows of different lengths. Packed together, they fill at least `sequence_count` sequences."""
    rng = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "Paris", "Berlin", "fox", "dog"]
    rows_of_text, tokens = [], 0
    while tokens < sequence_length * sequence_count:
        count = rng.randint(8, max(9, sequence_length // 8))
        rows_of_text.append({"text": " ".join(rng.choice(words) for _ in range(count))})
        tokens += 2 * count
    return rows_of_text


def measure_programs(options: argparse.Namespace) -> dict[str, Any]:
    """Measure tokens per second and MFU of both programs, and their ratio. Errors: SystemExit if the chosen device is not available."""
    import torch
    from finetune_trainer.hardware import detect_hardware
    from finetune_trainer.speed import ModelShape, flops_per_token, peak_of
    from trainer_overhead import run_our_trainer, run_plain_trl
    from transformers import AutoModelForCausalLM

    from tests.support.learning import make_run

    is_gpu = options.device == "cuda"
    folder = Path(tempfile.mkdtemp(prefix="gpu-throughput-"))
    model = make_model(folder / "model", options.shape, options.length)
    spec = {
        "method": {"type": options.method}, "resources": {"gpusPerNode": int(is_gpu), "processesPerNode": 1},
        "dataset": {"packing": True, "maxSequenceLength": options.length, "format": "plainText"},
        "model": {"dtype": "bfloat16"} if is_gpu else {}, "tracking": {"loggingSteps": 1},
        "training": {
            "maxSteps": options.steps, "batchSizePerDevice": options.batch, "gradientAccumulationSteps": 1, "learningRate": 1e-5,
            "optimizer": options.optimizer, "gradientCheckpointing": options.checkpointing,
        },
    }  # fmt: skip
    run, inputs = make_run(folder, model, spec, make_rows(options.length, 2 * options.batch * options.steps))
    device = detect_hardware(run, 0).name
    if is_gpu == (device == "cpu"):
        raise SystemExit(f"--device {options.device} is not available: the runs would use {device}")
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    peak_memory_bytes = 0
    for round_number in range(options.rounds + 1):
        for name, program in (("ours", run_our_trainer), ("bare", run_plain_trl)):
            gc.collect()
            if is_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            measurements = program(run, inputs, folder)
            if round_number:
                seconds[name].append(measurements.loop_seconds)
            if is_gpu and name == "ours":
                peak_memory_bytes = max(peak_memory_bytes, torch.cuda.max_memory_allocated())
    (summary_file,) = (folder / "work" / "tokens").glob("*/summary.json")
    row_counts = json.loads(summary_file.read_text())["reports"]["train"]
    tokens = options.steps * options.batch * row_counts["tokens"] / row_counts["sequences"]
    shape = ModelShape.of(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16))
    flops = flops_per_token(shape, row_counts["tokens"] / row_counts["rows"], frozen_base=options.method != "full")
    peak_flops = peak_of(device)
    figures: dict[str, Any] = {
        "shape": options.shape,
        "method": options.method,
        "device": device,
        "length": options.length,
        "batch": options.batch,
    }
    for name, loop_seconds in seconds.items():
        tokens_per_second = tokens / statistics.median(loop_seconds)
        figures[name] = {"tokensPerSecond": round(tokens_per_second, 1), "mfu": round(tokens_per_second * flops / peak_flops, 4) if peak_flops else None}
    figures["ratio"] = round(statistics.median(a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)), 4)
    if is_gpu:
        figures["peakMemoryGb"] = round(peak_memory_bytes / 1e9, 2)
    return figures


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result unless --no-write is set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(MODEL_SHAPES), default="1b")
    parser.add_argument("--method", choices=["full", "lora", "qlora"], default="lora")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--optimizer", default="adamw_torch_fused")
    parser.add_argument("--checkpointing", choices=["enabled", "disabled", "unsloth"], default="enabled")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    figures = measure_programs(options)
    print(json.dumps(figures, indent=1))
    if not options.no_write:
        import record

        method = record.extract_method(__doc__).replace("\n", " ")
        print(record.write_result(f"gpu_throughput_{options.shape}_{options.method}", figures, method=method))
    return figures


if __name__ == "__main__":
    main()
