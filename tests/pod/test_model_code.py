"""A model with its own Python code (`model.trustRemoteCode`) trains with several ranks."""

from __future__ import annotations

from pathlib import Path

from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget
from pod_harness import UID, Pod, run_config, write_rows

from tests.support.model_with_code import write_model_with_code


def test_each_rank_imports_its_own_copy_of_the_code(tmp_path: Path) -> None:
    """transformers copies the code file before it imports the copy. Ranks with a common copy could import a file that another rank still writes."""
    model, rows = write_model_with_code(tmp_path, "pass"), write_rows(tmp_path / "rows.jsonl")
    spec = {
        "model": {"source": f"file://{model}", "trustRemoteCode": True}, "method": {"type": "lora"}, "dataset": {"train": f"file://{rows}"},
        "training": {"maxSteps": 1, "batchSizePerDevice": 1, "gradientAccumulationSteps": 1},
    }  # fmt: skip
    run = run_config(spec, StoreTarget(uri=f"file://{tmp_path}/store/team/job/{UID}"), processes=2)
    with Pod(run, tmp_path / "pod") as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        code_files = sorted((tmp_path / "pod/work/model-code").rglob("modeling_own.py"))
    assert [file.relative_to(tmp_path / "pod/work/model-code").parts[0] for file in code_files] == ["rank-0", "rank-1"]
