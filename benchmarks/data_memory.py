"""How much memory the preparation of training data needs for each token.

    python benchmarks/data_memory.py

Method. A process prepares chat rows of about 1,000 tokens for training: it reads, splits, renders, tokenises, packs and stores them. The peak
of its memory is the sum of two exact counters: `tracemalloc` counts the bytes of Python objects and numpy arrays, and Arrow's memory pool counts
the bytes of Arrow arrays. Pages of memory-mapped files are not counted, because the system can drop them. Every case runs with two numbers of
rows, each in a new process; the bytes for each token are the difference of the two peaks, divided by the difference of the numbers of tokens.
The tokenizer has 30,000 words, because Python keeps only one object for each number up to 256, so that small token IDs would need no memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WORD_COUNT = 30_000
END_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN = "<|im_end|>", "<|pad|>", "<|unknown|>"
WORDS_PER_ROW = 1000
ROW_COUNTS = (1000, 3000)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' <|im_end|> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def make_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the words `w0` to `w29999`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    token_texts = [END_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN, "user", "assistant", *(f"w{number}" for number in range(WORD_COUNT))]
    word_tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(token_texts)}, unk_token=UNKNOWN_TOKEN))
    word_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer, eos_token=END_TOKEN, pad_token=PAD_TOKEN, chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False
    )


def make_chat_row(row_number: int) -> dict[str, Any]:
    """Return a row with a question and its answer. The row has `WORDS_PER_ROW` words, which depend on the row's number."""
    words = [f"w{(row_number * 7919 + index * 31) % WORD_COUNT}" for index in range(WORDS_PER_ROW)]
    half_word_count = WORDS_PER_ROW // 2
    return {"messages": [{"role": "user", "content": " ".join(words[:half_word_count])}, {"role": "assistant", "content": " ".join(words[half_word_count:])}]}


def make_pair_row(row_number: int) -> dict[str, Any]:
    """Return a row with a prompt, a preferred answer and a rejected answer."""
    first_messages, second_messages = make_chat_row(row_number)["messages"], make_chat_row(row_number + 1)["messages"]
    return {"prompt": first_messages[:1], "chosen": first_messages[1:], "rejected": second_messages[1:]}


def prepare_supervised(folder: Path, tokenizer: Any, row_count: int, **dataset_options: Any) -> int:
    """Prepare chat rows for supervised training. Returns the number of tokens of all splits."""
    from finetune_trainer.data.prepare import prepare

    from tests.support.learning import make_run

    run, inputs = make_run(folder, folder / "model", {"dataset": {"maxSequenceLength": 4096, "numProc": 1, **dataset_options}}, rows=())
    write_rows(inputs.train[0], make_chat_row, row_count)
    start_memory_counters()
    prepared_data = prepare(run, inputs, tokenizer, max_positions=4096, cache_folder=folder / "tokens")
    return sum(report.tokens for report in prepared_data.reports.values())


def prepare_pairs(folder: Path, tokenizer: Any, row_count: int) -> int:
    """Prepare pairs for direct preference optimisation. Returns the number of tokens."""
    from finetune_trainer.objective import answers

    from tests.support.learning import make_run

    run, inputs = make_run(folder, folder / "model", {"dataset": {"maxSequenceLength": 4096, "numProc": 1}, "trainer": {"type": "dpo"}}, rows=())
    write_rows(inputs.train[0], make_pair_row, row_count)
    context: Any = SimpleNamespace(run=run, inputs=inputs, tokenizer=tokenizer, token_cache=folder / "tokens", max_positions=4096)
    start_memory_counters()
    splits, _ = answers.load_rows(context, answers.RowLayout.PAIRS)
    return sum(len(ids) for row in splits.train for ids in row.values())


def write_rows(rows_file: Path, make_row: Callable[[int], dict[str, Any]], row_count: int) -> None:
    """Create and write the rows one by one, so that they do not stay in the memory of this process."""
    with rows_file.open("w") as file:
        file.writelines(json.dumps(make_row(number)) + "\n" for number in range(row_count))


CASE_BY_NAME: dict[str, Callable[[Path, Any, int], int]] = {
    "plain": prepare_supervised,
    "packed": lambda *arguments: prepare_supervised(*arguments, packing=True),
    "split": lambda *arguments: prepare_supervised(*arguments, split={"validation": 0.1, "test": 0.1}),
    "pairs": prepare_pairs,
}


def start_memory_counters() -> None:
    """Start both memory counters. The libraries are imported first, so that their objects are not counted."""
    import accelerate
    import datasets
    import pyarrow

    accelerate.PartialState()
    datasets.disable_progress_bars()
    assert pyarrow.total_allocated_bytes() == 0
    tracemalloc.start()


def run_case(case_name: str, row_count: int) -> dict[str, int]:
    """Prepare the rows of a case in this process. Returns the number of tokens and the peaks of both counters in bytes."""
    import pyarrow

    with tempfile.TemporaryDirectory() as folder:
        token_count = CASE_BY_NAME[case_name](Path(folder), make_tokenizer(), row_count)
        return {"tokens": token_count, "pythonPeak": tracemalloc.get_traced_memory()[1], "arrowPeak": pyarrow.default_memory_pool().max_memory()}


def measure_case(case_name: str, row_counts: tuple[int, ...]) -> dict[str, float]:
    """Run a case with each number of rows in a new process. Returns the peaks of the larger run and the bytes per token."""
    small_result, large_result = (
        json.loads(subprocess.run([sys.executable, __file__, "--case", case_name, str(row_count)], check=True, capture_output=True, text=True).stdout)
        for row_count in row_counts
    )
    peak_bytes = [result["pythonPeak"] + result["arrowPeak"] for result in (small_result, large_result)]
    return {
        "tokens": large_result["tokens"], "peakMB": round(peak_bytes[1] / 1e6, 1), "pythonPeakMB": round(large_result["pythonPeak"] / 1e6, 1),
        "arrowPeakMB": round(large_result["arrowPeak"] / 1e6, 1),
        "bytesPerToken": round((peak_bytes[1] - peak_bytes[0]) / (large_result["tokens"] - small_result["tokens"]), 2),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write the result unless --no-write is set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=2, metavar=("NAME", "ROWS"), help="run one case in this process and print its counters")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case[0], int(options.case[1]))))
        return
    figures = {name: measure_case(name, ROW_COUNTS) for name in CASE_BY_NAME}
    print(json.dumps(figures, indent=1))
    if not options.no_write:
        import record

        print(record.write_result("data_memory", figures, method=record.extract_method(__doc__).replace("\n", " ")))


if __name__ == "__main__":
    main()
