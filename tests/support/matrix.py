"""Runs every method with every objective and every strategy, and records which combinations work and why each other combination is refused.

`python -m tests.support.matrix` runs all combinations in the trainer image (about ten minutes on two cores) and writes docs/reference/matrix.md.
Run `make prepare` before you run this program.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_api.names import ExitCode

from tests.support.cells import CHECKOUT_FOLDER, Cell, PythonRunner, Result, launch_cells, run_test_python
from tests.support.learning import TEN_ROWS, merge_mappings
from tests.support.preferences import LABELLED_ANSWERS, PREFERENCE_PAIRS, PROMPTS

PAGE = CHECKOUT_FOLDER / "docs/reference/matrix.md"
WORKS_VERDICT = "yes"
SPEC_BY_METHOD: dict[str, dict[str, Any]] = {
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
REWARD_SETTINGS = {
    "grpo": {"numGenerations": 2, "beta": 0.1},
    "rewards": [{"builtin": "regex", "parameters": {"pattern": "e"}}],
}
TRAINER_BY_OBJECTIVE: dict[str, tuple[dict[str, Any], Sequence[Any]]] = {
    "sft": ({}, TEN_ROWS),
    "dpo": ({"type": "dpo"}, PREFERENCE_PAIRS),
    "grpo": ({"type": "grpo", "maxCompletionLength": 6, **REWARD_SETTINGS}, PROMPTS),
    "kto": ({"type": "kto"}, LABELLED_ANSWERS),
    "orpo": ({"type": "orpo"}, PREFERENCE_PAIRS),
    "reward": ({"type": "reward"}, PREFERENCE_PAIRS),
}
RANKS_BY_STRATEGY: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp, fullShard": (2, {"strategy": "fsdp"}),
    "fsdp, shardGradOp": (2, {"strategy": "fsdp", "fsdp": {"sharding": "shardGradOp"}}),
    "deepspeed, ZeRO 1": (2, {"strategy": "deepspeed", "deepspeed": {"zeroStage": 1}}),
    "deepspeed, ZeRO 2": (2, {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}}),
    "deepspeed, ZeRO 3": (2, {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}}),
}
VerdictTable = dict[tuple[str, str], str]
"""The verdict for each (method, objective): `yes` if the combination works, else the message with which it is refused."""


def run_strategy(
    strategy: str, folder: Path, *, methods: Sequence[str] = tuple(SPEC_BY_METHOD), base_spec: Mapping[str, Any] | None = None,
    run_python: PythonRunner = run_test_python,
) -> VerdictTable:  # fmt: skip
    """Run every method with every objective for one strategy, in one launch. `base_spec` holds the settings that all of these runs share.

    `run_python` starts Python, as in `launch_cells`. Errors: AssertionError if a run fails with an exit code other than CONFIG_INVALID.
    """
    rank_count, distributed_spec = RANKS_BY_STRATEGY[strategy]
    model = _make_model(folder / "model")
    generation_adapter, reward_adapter = (_make_adapter(model, folder / kind, kind) for kind in ("CAUSAL_LM", "SEQ_CLS"))
    cells = []
    for method in methods:
        spec = merge_mappings(base_spec or {}, SPEC_BY_METHOD[method])
        for objective, (trainer, rows) in TRAINER_BY_OBJECTIVE.items():
            cell_spec = merge_mappings(spec, {"trainer": trainer, "distributed": distributed_spec, "training": {"maxSteps": 2}})
            adapter = None if method != "adapter" else reward_adapter if objective == "reward" else generation_adapter
            cells.append(Cell(f"{method} | {objective}", str(model), cell_spec, rows, adapter=adapter))
    results = launch_cells(cells, folder / "cells", rank_count=rank_count, timeout=1500, run_python=run_python)
    return {
        (method, objective): _read_verdict(results[f"{method} | {objective}"])
        for method in methods
        for objective in TRAINER_BY_OBJECTIVE
    }


def _read_verdict(result: Result) -> str:
    if result.error is None:
        assert len(result.losses) == 2, result
        assert any(name.endswith(".safetensors") for name in result.files), result
        return WORKS_VERDICT
    assert result.error["exitCode"] == ExitCode.CONFIG_INVALID, f"{result.name}: {result.error}"
    return f"{result.error['message']}; {result.error['hint']}"


def _make_model(path: Path) -> Path:
    from tests.support.tiny import make_tiny_model

    return make_tiny_model(path)


def _make_adapter(model: Path, folder: Path, task_type: str) -> str:
    """Save a new LoRA adapter for the PEFT task type `task_type`. Returns its folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader = AutoModelForCausalLM if task_type == "CAUSAL_LM" else AutoModelForSequenceClassification
    options = {} if task_type == "CAUSAL_LM" else {"num_labels": 1}
    base_model = loader.from_pretrained(model, **options)
    get_peft_model(base_model, LoraConfig(task_type=task_type, target_modules="all-linear", r=4)).save_pretrained(folder)
    return str(folder)


PAGE_HEADER = """# What works together

Each combination of method, objective and strategy was run with a tiny model on two CPU ranks (`one rank`: on a single rank). The runs were in the
built trainer image, with the restrictions of a trainer pod: as user 10001 and on a read-only root file system. They had no network. A dot means
that the combination trained and saved an artefact. A number means that the combination was refused before training, with the message below.
`python -m tests.support.matrix` writes this page; `tests/image/test_matrix.py` compares the page with runs in the image.
"""


def render_page(tables: dict[str, VerdictTable]) -> str:
    """Return the text of the reference page."""
    reasons: list[str] = []
    sections = []
    for strategies, table in _group_by_table(tables):
        lines = [
            f"## {'; '.join(strategies)}",
            "",
            f"| method | {' | '.join(TRAINER_BY_OBJECTIVE)} |",
            f"|---|{'---|' * len(TRAINER_BY_OBJECTIVE)}",
        ]
        for method in SPEC_BY_METHOD:
            cell_texts = []
            for objective in TRAINER_BY_OBJECTIVE:
                verdict = table[method, objective]
                if verdict != WORKS_VERDICT and verdict not in reasons:
                    reasons.append(verdict)
                cell_texts.append("•" if verdict == WORKS_VERDICT else str(reasons.index(verdict) + 1))
            lines.append(f"| {method} | {' | '.join(cell_texts)} |")
        sections.append("\n".join(lines))
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return "\n".join([PAGE_HEADER, "\n\n".join(sections), "\n## Refused\n", notes, ""])


def _group_by_table(tables: dict[str, VerdictTable]) -> Iterator[tuple[list[str], VerdictTable]]:
    """Yield each table once, together with the names of all strategies whose verdicts are the same as in this table."""
    groups: list[tuple[list[str], VerdictTable]] = []
    for strategy, table in tables.items():
        for strategies, group_table in groups:
            if group_table == table:
                strategies.append(strategy)
                break
        else:
            groups.append(([strategy], table))
    yield from groups


def read_expected_table(strategy: str) -> VerdictTable:
    """Read the table of a strategy from the reference page."""
    text = PAGE.read_text()
    assert strategy in text, f"the page has no table of {strategy}: run python -m tests.support.matrix '{strategy}'"
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", text.split("\n## Refused\n")[1], re.MULTILINE))
    section = next(section for section in text.split("\n## ") if strategy in section.splitlines()[0].split("; "))
    table: VerdictTable = {}
    for line in section.splitlines():
        cell_texts = [cell_text.strip() for cell_text in line.strip("|").split("|")]
        if cell_texts[0] in SPEC_BY_METHOD:
            for objective, mark in zip(TRAINER_BY_OBJECTIVE, cell_texts[1:], strict=True):
                table[cell_texts[0], objective] = WORKS_VERDICT if mark == "•" else reasons[mark]
    return table


def main(requested_strategies: Sequence[str]) -> None:
    """Run all combinations of the requested strategies (by default of all strategies) in the trainer image. After each strategy, write its table into the
    reference page.
    """
    from tests.support.trainer_image import open_trainer_image

    tables = {name: read_expected_table(name) for name in RANKS_BY_STRATEGY if PAGE.exists() and name in PAGE.read_text()}
    with open_trainer_image() as image:
        for strategy in requested_strategies or RANKS_BY_STRATEGY:
            with tempfile.TemporaryDirectory() as folder:
                tables[strategy] = run_strategy(strategy, Path(folder), run_python=image.python_runner(Path(folder)))
            refused_count = sum(verdict != WORKS_VERDICT for verdict in tables[strategy].values())
            print(f"{strategy}: {len(tables[strategy]) - refused_count} work, {refused_count} are refused", flush=True)
            PAGE.write_text(render_page({name: tables[name] for name in RANKS_BY_STRATEGY if name in tables}))


if __name__ == "__main__":
    main(sys.argv[1:])
