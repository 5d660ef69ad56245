"""The import cases: every required sample, and every configuration block on the documentation pages of five tools.

`python -m tests.unit.cli.cases` overwrites the expected results with the current results. Review the changes of these files before you commit them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CASES_FOLDER = Path(__file__).parent
CASES_WITH_COMMANDS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "env-command-line-over-file": (
        ("samples/env-A.env",),
        "env",
        "python main.py --config base.env --technique dora --train_ratio 0.85 --val_ratio 0.15 --lora_dropout 0 --grad_acc_steps 8 --hf_token hf_xxx",
    ),
    "env-page-run": (("blocks/env-01.env",), "env", "python main.py --config my_config.env"),
    "env-page-example-7": (
        ("blocks/env-02.env",),
        "env",
        "python main.py --config production.env --hf_token your_token",
    ),
    "yaml-overrides": (
        ("samples/yaml-A.yaml",),
        "yaml",
        "python src/train.py --config s2.yaml --model.base_model Qwen/Qwen2.5-0.5B --training.learning_rate=1e-4 "
        "--fine_tuning.lora.target_modules '[c_attn, c_proj]' --training.epochs 1 --training.epochs 2",
    ),
    "yaml-overrides-refused": (
        ("samples/yaml-A.yaml",),
        "yaml",
        "--trainning.epochs 3 --training.epochs three --model.base_model",
    ),
    "yaml-page-run": (("blocks/yaml-01.yaml",), "yaml", "python src/train.py --config config.yaml"),
    "yaml-page-validate": (
        ("blocks/yaml-01.yaml",),
        "yaml",
        "python scripts/validate_config.py --config your_config.yaml",
    ),
    "yaml-page-overrides": (
        ("blocks/yaml-01.yaml",),
        "yaml",
        "python src/train.py --config config.yaml --model.base_model mistralai/Mistral-7B-Instruct-v0.2 --training.learning_rate 1e-4",
    ),
    "yaml-deepspeed-beside": (
        ("blocks/yaml-04.yaml", "samples/yaml-ds_config.json"),
        "yaml",
        "--distributed.zero_stage 2",
    ),
    "yaml-deepspeed-contradicts": (("blocks/yaml-04.yaml", "samples/yaml-ds_config.json"), "yaml", ""),
    "hydra-overrides": (
        ("samples/hydra-A.yaml",),
        "hydra",
        "python train.py dataset.path=data/pairs.json dataset.format=preference training_config.trainer=DPO "
        "training_config.learning_rate=5e-6 +training_config.warmup_ratio=0.05",
    ),
    "hydra-overrides-alone": (
        (),
        "",
        "python train.py dataset.path=data/pairs.json dataset.format=preference training_config.trainer=DPO "
        "training_config.learning_rate=5e-6 +training_config.warmup_ratio=0.05",
    ),
    "hydra-flags": (
        (),
        "",
        "python train.py --model Qwen/Qwen2.5-0.5B --dataset d.csv --format standard --trainer SFT --distributed-training DDP "
        "--gradient-checkpointing False ---max-seq-length 1024",
    ),
    "hydra-page-flags": (
        (),
        "",
        "--model org/name --dataset org/data --format conversational --trainer SFT --distributed-training unsloth "
        "--per-device-train-batch-size 2 --gradient-acc-steps 4 --optim adamw_torch_fused --learning-rate 2e-4 --num-train-epochs 3 "
        "--lr-scheduler-type cosine --save-steps 100 --max-completion-length 512 ---max-seq-length 2048 --gradient-checkpointing True --report-to wandb",
    ),
    "hydra-unknown-key": (("samples/hydra-A.yaml",), "hydra", "python train.py training_config.lr=1e-4"),
    "hydra-sweep": (("samples/hydra-A.yaml",), "hydra", "python train.py dataset.path=a.json,b.json"),
}


BLOCK_COUNTS_BY_PAGE: dict[str, tuple[int, int]] = {"env": (2, 8), "toml": (17, 0), "yaml": (4, 3), "hydra": (0, 1), "guide": (2, 0)}
"""For each tool: how many configuration files and how many command lines its documentation page contains. All other code blocks of the page are data or code.
"""
REQUIRED_SAMPLES: dict[str, tuple[str, str]] = {
    "env": ("A B C", "R1 R2 R3 R4"), "toml": ("A B C", "R1 R2 R3 R4"), "yaml": ("A B C D", "R1 R2 R3 R4"),
    "hydra": ("A B C D", "R1 R2 R3 R4"), "guide": ("A B", "R1 R2"),
}  # fmt: skip
"""For each tool: the names of the required samples that the importer must accept, and the names of those that it must refuse."""
CASE_BY_COMMAND_SAMPLE = {
    "env-C": "env-command-line-over-file", "yaml-C": "yaml-overrides", "yaml-D": "yaml-deepspeed-beside", "yaml-R4": "yaml-overrides-refused",
    "hydra-C": "hydra-overrides", "hydra-D": "hydra-flags", "hydra-R3": "hydra-unknown-key", "hydra-R4": "hydra-sweep",
}  # fmt: skip
"""For each required sample that is a command line: the name of its case in `CASES_WITH_COMMANDS`."""


def list_import_cases() -> dict[str, tuple[tuple[Path, ...], str | None, str]]:
    """Return the cases by name. A case has the files, the importer's name (None if the files' content decides the importer), and the command line of the
    other tool.
    """
    cases_by_name: dict[str, tuple[tuple[Path, ...], str | None, str]] = {}
    for folder in ("samples", "blocks"):
        for path in sorted((CASES_FOLDER / folder).iterdir()):
            name = f"{folder}-{path.stem}"
            source = path.name.partition("-")[0]
            if path.suffix == ".txt":
                cases_by_name[name] = ((), None, path.read_text(encoding="utf-8"))
            elif path.suffix != ".json":
                cases_by_name[name] = ((path,), source, "")
    for name, (files, source, words) in CASES_WITH_COMMANDS.items():
        cases_by_name[name] = (tuple(CASES_FOLDER / file for file in files), source or None, words)
    return cases_by_name


def list_accepted_cases() -> list[str]:
    """Return the names of the cases whose expected result is not a refusal."""
    return [
        name for name in list_import_cases() if '"refused"' not in (CASES_FOLDER / "expected" / f"{name}.json").read_text(encoding="utf-8")
    ]


def run_import_case(name: str) -> dict[str, Any]:
    """Import a case, and return the outcome in the same form as the files in `expected/`."""
    from tests.unit.cli.import_command import import_files

    files, source, words = list_import_cases()[name]
    import_outcome = import_files(*files, source=source, words=words)
    outcome_fields: dict[str, Any] = {"refused": import_outcome.mistakes} if import_outcome.mistakes else {"spec": import_outcome.spec}
    return outcome_fields | {
        key: value
        for key, value in (("warnings", import_outcome.warnings), ("notes", import_outcome.notes), ("secrets", import_outcome.secrets))
        if value
    }


def main() -> None:
    """Import all cases, and write their outcomes as expected results."""
    (CASES_FOLDER / "expected").mkdir(exist_ok=True)
    for name in list_import_cases():
        text = json.dumps(run_import_case(name), indent=1, sort_keys=True, ensure_ascii=False)
        (CASES_FOLDER / "expected" / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
