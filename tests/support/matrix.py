"""Run every method with every objective and every strategy. Write which combinations work, and why the others are refused.

`python -m tests.support.matrix` runs all combinations (about ten minutes on two cores) and writes docs/reference/matrix.md.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune_api.names import ExitCode

from tests.support.cells import REPOSITORY, Cell, Result, launch
from tests.support.learning import TEN, merged
from tests.support.preferences import LABELLED, PAIRS, PROMPTS

PAGE = REPOSITORY / "docs/reference/matrix.md"
WORKS = "yes"
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}},
    "lora": {"method": {"type": "lora"}},
    "lora, 8-bit base": {"method": {"type": "lora"}, "model": {"quantization": {"bits": 8}}},
    "qlora": {"method": {"type": "qlora"}},
    "dora": {"method": {"type": "dora"}},
    "adapter": {"method": {"type": "adapter", "adapter": {"source": "s3://models/my-adapter"}}},
    "ia3": {"method": {"type": "ia3"}},
    "spectrum": {"method": {"type": "spectrum"}},
    "spectrum, 4-bit base": {"method": {"type": "spectrum"}, "model": {"quantization": {"bits": 4}}},
    "prefixTuning": {"method": {"type": "prefixTuning"}},
    "promptTuning": {"method": {"type": "promptTuning"}},
}
REWARDED = {
    "grpo": {"numGenerations": 2, "beta": 0.1},
    "rewards": [{"builtin": "regex", "parameters": {"pattern": "e"}}],
}
OBJECTIVES: dict[str, tuple[dict[str, Any], Sequence[Any]]] = {
    "sft": ({}, TEN),
    "dpo": ({"type": "dpo"}, PAIRS),
    "grpo": ({"type": "grpo", "maxCompletionLength": 6, **REWARDED}, PROMPTS),
    "kto": ({"type": "kto"}, LABELLED),
    "orpo": ({"type": "orpo"}, PAIRS),
    "reward": ({"type": "reward"}, PAIRS),
}
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp, fullShard": (2, {"strategy": "fsdp"}),
    "fsdp, shardGradOp": (2, {"strategy": "fsdp", "fsdp": {"sharding": "shardGradOp"}}),
    "deepspeed, ZeRO 1": (2, {"strategy": "deepspeed", "deepspeed": {"zeroStage": 1}}),
    "deepspeed, ZeRO 2": (2, {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}}),
    "deepspeed, ZeRO 3": (2, {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}}),
}
Table = dict[tuple[str, str], str]
"""For each (method, objective): `yes` if the combination works, else the reason for the refusal."""


def run(strategy: str, folder: Path) -> Table:
    """Run all cells of one strategy in one launch. Errors: AssertionError if a cell fails with an error other than a ConfigError."""
    ranks, distributed = STRATEGIES[strategy]
    model = _model(folder / "model")
    writer, scorer = (_adapter(model, folder / kind, kind) for kind in ("CAUSAL_LM", "SEQ_CLS"))
    cells = []
    for method, spec in METHODS.items():
        for objective, (trainer, rows) in OBJECTIVES.items():
            cell_spec = merged(spec, {"trainer": trainer, "distributed": distributed, "training": {"maxSteps": 2}})
            adapter = None if method != "adapter" else scorer if objective == "reward" else writer
            cells.append(Cell(f"{method} | {objective}", str(model), cell_spec, rows, adapter=adapter))
    found = launch(cells, folder / "cells", ranks=ranks, timeout=1500)
    return {
        (method, objective): _verdict(found[f"{method} | {objective}"])
        for method in METHODS
        for objective in OBJECTIVES
    }


def _verdict(result: Result) -> str:
    if result.error is None:
        assert len(result.losses) == 2, result
        assert any(name.endswith(".safetensors") for name in result.files), result
        return WORKS
    assert result.error["exitCode"] == ExitCode.CONFIG_INVALID, f"{result.name}: {result.error}"
    return f"{result.error['message']}; {result.error['hint']}"


def _model(path: Path) -> Path:
    from tests.support.tiny import make_tiny_model

    return make_tiny_model(path)


def _adapter(model: Path, folder: Path, kind: str) -> str:
    """Create and save an adapter for the PEFT task type `kind`. Returns its folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader = AutoModelForCausalLM if kind == "CAUSAL_LM" else AutoModelForSequenceClassification
    options = {} if kind == "CAUSAL_LM" else {"num_labels": 1}
    base = loader.from_pretrained(model, **options)
    get_peft_model(base, LoraConfig(task_type=kind, target_modules="all-linear", r=4)).save_pretrained(folder)
    return str(folder)


HEAD = """# What works together

Each combination of method, objective and strategy was run with a tiny model on two CPU ranks (`one rank`: on a single rank). A dot means that
the combination trained and saved an artefact. A number means that the combination was refused before training, with the message below.
`python -m tests.support.matrix` writes this page; a test compares the page with actual runs.
"""


def page(tables: dict[str, Table]) -> str:
    """Return the text of the reference page."""
    reasons: list[str] = []
    blocks = []
    for strategies, table in _grouped(tables):
        lines = [
            f"## {'; '.join(strategies)}",
            "",
            f"| method | {' | '.join(OBJECTIVES)} |",
            f"|---|{'---|' * len(OBJECTIVES)}",
        ]
        for method in METHODS:
            marks = []
            for objective in OBJECTIVES:
                verdict = table[method, objective]
                if verdict != WORKS and verdict not in reasons:
                    reasons.append(verdict)
                marks.append("•" if verdict == WORKS else str(reasons.index(verdict) + 1))
            lines.append(f"| {method} | {' | '.join(marks)} |")
        blocks.append("\n".join(lines))
    notes = "\n".join(f"{place}. {reason}" for place, reason in enumerate(reasons, 1))
    return "\n".join([HEAD, "\n\n".join(blocks), "\n## Refused\n", notes, ""])


def _grouped(tables: dict[str, Table]) -> Iterator[tuple[list[str], Table]]:
    """Group the strategies that have equal tables. Yields the names of the strategies and their table."""
    groups: list[tuple[list[str], Table]] = []
    for strategy, table in tables.items():
        for names, other in groups:
            if other == table:
                names.append(strategy)
                break
        else:
            groups.append(([strategy], table))
    yield from groups


def expected(strategy: str) -> Table:
    """Read the table of a strategy from the reference page."""
    text = PAGE.read_text()
    assert strategy in text, f"the page has no table of {strategy}: run python -m tests.support.matrix '{strategy}'"
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", text.split("\n## Refused\n")[1], re.MULTILINE))
    block = next(one for one in text.split("\n## ") if strategy in one.splitlines()[0].split("; "))
    table: Table = {}
    for line in block.splitlines():
        cells = [one.strip() for one in line.strip("|").split("|")]
        if cells[0] in METHODS:
            for objective, mark in zip(OBJECTIVES, cells[1:], strict=True):
                table[cells[0], objective] = WORKS if mark == "•" else reasons[mark]
    return table


def main(requested: Sequence[str]) -> None:
    """Run the requested strategies (default: all). Write the page after each strategy; the tables of other strategies stay unchanged."""
    tables = {name: expected(name) for name in STRATEGIES if PAGE.exists() and name in PAGE.read_text()}
    for strategy in requested or STRATEGIES:
        with tempfile.TemporaryDirectory() as folder:
            tables[strategy] = run(strategy, Path(folder))
        refused = sum(verdict != WORKS for verdict in tables[strategy].values())
        print(f"{strategy}: {len(tables[strategy]) - refused} work, {refused} are refused", flush=True)
        PAGE.write_text(page({name: tables[name] for name in STRATEGIES if name in tables}))


if __name__ == "__main__":
    main(sys.argv[1:])
