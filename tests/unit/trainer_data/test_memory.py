"""The memory that preparing data needs does not depend on the number of tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys, tracemalloc
from pathlib import Path
import accelerate, datasets, pyarrow
from finetune_trainer.data import parallel, shards
from finetune_trainer.data.prepare import prepare
from tests.support.data import tokenizer
from tests.support.learning import make_run

folder, rows = Path(sys.argv[1]), int(sys.argv[2])
datasets.disable_progress_bars()
parallel.BATCH_CHARACTERS, shards.TOKENS_PER_BATCH, shards.MAX_SHARD_BYTES = 40_000, 20_000, 1 << 20
tok = tokenizer(folder)
dataset = {"packing": True, "split": {"validation": 0.1}, "numProc": 1, "maxSequenceLength": 4000}
run, inputs = make_run(folder, Path("/models/tiny"), {"dataset": dataset}, ())
with inputs.train[0].open("w") as file:
    file.writelines(json.dumps({"text": f"{number} " + "one two three four five " * 100}) + "\\n" for number in range(rows))
tracemalloc.start()
data = prepare(run, inputs, tok, max_positions=4000, cache_folder=folder / "tokens")
peak = tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory()
print(json.dumps([sum(report.tokens for report in data.reports.values()), peak]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_does_not_depend_on_the_number_of_tokens(tmp_path: Path) -> None:
    """Packed training rows and unpacked validation rows together need less than one more byte for each additional token.

    `tracemalloc` counts the memory of Python and numpy, and Arrow's pool counts the memory of Arrow.
    If rows were kept as Python objects, a token would take 125 bytes.
    """

    def measure(rows: int) -> tuple[int, int]:
        (tmp_path / str(rows)).mkdir()
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / str(rows)), str(rows)]
        completed_process = subprocess.run(command, check=True, capture_output=True, text=True)
        tokens, peak_bytes = json.loads(completed_process.stdout)
        return tokens, peak_bytes

    (tokens, peak_bytes), (more_tokens, higher_peak_bytes) = measure(200), measure(600)
    assert more_tokens - tokens > 200_000
    assert (higher_peak_bytes - peak_bytes) / (more_tokens - tokens) < 1
