"""Imports of a Hydra configuration together with an accelerate file."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import import_files

HYDRA_CONFIG = """\
dataset: {path: org/data, format: standard}
training_config: {model: org/m, trainer: SFT, distributed_training: FSDP, max_seq_length: 512}
"""


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: false}\n",
         "distributed.fsdp.sharding", "shardGradOp"),
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_sharding_strategy: FULL_SHARD}\n", "distributed.fsdp.sharding", "fullShard"),
    ],
)  # fmt: skip
def test_the_sharding_of_an_accelerate_file_is_read(write_file: WriteFile, text: str, path: str, value: Any) -> None:
    import_outcome = import_files(write_file("job.yaml", HYDRA_CONFIG), write_file("acc.yaml", text), source="hydra")
    assert (import_outcome.mistakes, import_outcome.at(path)) == ([], value)


def test_accelerate_options_without_effect_give_a_warning(write_file: WriteFile) -> None:
    text = (
        "distributed_type: FSDP\nnum_processes: 2\ndynamo_config: {dynamo_backend: INDUCTOR}\n"
        "fsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD, fsdp_offload_params: true}\n"
    )
    warnings = "\n".join(import_files(write_file("job.yaml", HYDRA_CONFIG), write_file("acc.yaml", text), source="hydra").warnings)
    assert [
        option for option in ("dynamo_config", "HYBRID_SHARD", "fsdp_offload_params") if option not in warnings
    ] == []


def test_options_that_contradict_the_hydra_configuration_are_refused(write_file: WriteFile) -> None:
    hydra_text = HYDRA_CONFIG.replace("distributed_training: FSDP", "gradient_acc_steps: 4")
    accelerate_text = "distributed_type: DEEPSPEED\nnum_processes: 2\nmixed_precision: fp8\n"
    accelerate_text += "deepspeed_config: {gradient_accumulation_steps: 8, deepspeed_config_file: ds.json}\n"
    mistakes = "\n".join(import_files(write_file("job.yaml", hydra_text), write_file("acc.yaml", accelerate_text), source="hydra").mistakes)
    assert "fp8 is not supported" in mistakes
    assert "4 and 8 are given for the same option" in mistakes
    assert "the file ds.json is not read" in mistakes
