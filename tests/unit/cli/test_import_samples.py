"""The imports of all required samples, and of all configurations on the tools' documentation pages, have the results that were reviewed and stored in
`expected/`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetune_api.spec import FineTuneJobSpec
from finetune_cli.importers.registry import IMPORTERS
from finetune_cli.importers.run_import import load_documents

from tests.pod.cli.sources import SOURCES
from tests.unit.cli.cases import (
    BLOCK_COUNTS_BY_PAGE,
    CASE_BY_COMMAND_SAMPLE,
    CASES_WITH_COMMANDS,
    REQUIRED_SAMPLES,
    list_import_cases,
    run_import_case,
)
from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import CASES_FOLDER, import_files

TOML_BLOCKS = sorted((CASES_FOLDER / "blocks").glob("toml-*.toml"))


@pytest.mark.parametrize("name", list_import_cases())
def test_an_import_has_the_reviewed_result(name: str) -> None:
    expected = json.loads((CASES_FOLDER / "expected" / f"{name}.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(run_import_case(name))) == expected


def test_every_expected_result_has_a_case() -> None:
    assert {path.stem for path in (CASES_FOLDER / "expected").glob("*.json")} == set(list_import_cases())


@pytest.mark.parametrize("source", BLOCK_COUNTS_BY_PAGE)
def test_every_block_of_a_page_is_imported(source: str) -> None:
    blocks = [path for path in (CASES_FOLDER / "blocks").iterdir() if path.name.startswith(f"{source}-")]
    commands = [path for path in blocks if path.suffix == ".txt"]
    command_cases = [name for name in CASES_WITH_COMMANDS if name.startswith(f"{source}-page-")]
    assert (len(blocks) - len(commands), len(commands) + len(command_cases)) == BLOCK_COUNTS_BY_PAGE[source]


@pytest.mark.parametrize("source", REQUIRED_SAMPLES)
def test_every_required_sample_is_imported(source: str) -> None:
    for words, is_refused in zip(REQUIRED_SAMPLES[source], (False, True), strict=True):
        for word in words.split():
            name = CASE_BY_COMMAND_SAMPLE.get(f"{source}-{word}", f"samples-{source}-{word}")
            assert ("refused" in run_import_case(name)) is is_refused, name
    sample_names = {path.stem for path in (CASES_FOLDER / "samples").iterdir() if path.stem.startswith(f"{source}-")} - {
        "yaml-ds_config"
    }
    required_names = {f"{source}-{word}" for words in REQUIRED_SAMPLES[source] for word in words.split()}
    assert sample_names == required_names - set(CASE_BY_COMMAND_SAMPLE)


@pytest.mark.parametrize("name", [name for name in list_import_cases() if "-A" in name or "-B" in name or "-C" in name])
def test_samples_a_b_and_c_are_accepted(name: str) -> None:
    outcome_fields = run_import_case(name)
    assert "refused" not in outcome_fields
    FineTuneJobSpec.model_validate(outcome_fields["spec"])


@pytest.mark.parametrize("name", [name for name in list_import_cases() if "-R" in name])
def test_mistakes_in_refused_samples_name_their_file(name: str) -> None:
    for mistake in run_import_case(name)["refused"]:
        assert name.partition("-")[2].split("-")[0] in mistake.split(":")[0]


@pytest.mark.parametrize("path", TOML_BLOCKS, ids=lambda path: path.stem)
def test_a_toml_block_with_model_and_data_is_imported(path: Path) -> None:
    import_outcome = import_files(path, source="toml", overrides={"model.source": "org/m", "dataset.train": "org/d"})
    assert import_outcome.mistakes == []
    assert import_outcome.at("model.source") == "org/m"


def test_all_toml_blocks_combine_to_one_configuration() -> None:
    import_outcome = import_files(
        *TOML_BLOCKS, source="toml", overrides={"output.hub.tokenSecretRef": {"name": "hub", "key": "token"}}
    )
    assert import_outcome.mistakes == []
    assert import_outcome.at("training.epochs") == 30
    assert import_outcome.at("training.gradientAccumulationSteps") == 32
    assert import_outcome.at("method.lora.rank") == 64
    assert import_outcome.at("output.hub.push") is True


@pytest.mark.parametrize("name", list_import_cases())
def test_case_is_recognised_as_its_tool_or_refused(name: str) -> None:
    files, source, words = list_import_cases()[name]
    importer_names = [
        importer.name for importer in IMPORTERS.values() if importer.recognises_input(load_documents(files), tuple(words.split()))
    ]
    assert importer_names in ([source or name.removeprefix("blocks-").partition("-")[0]], [])


def test_annotated_manifest_names_the_origin_of_values() -> None:
    text = import_files(CASES_FOLDER / "samples" / "env-A.env").text
    assert "learningRate: 0.0002 # env-A.env:9 LEARNING_RATE" in text
    assert "gradientAccumulationSteps: 4 # default of the tool" in text
    assert "scheduler: linear # hard-coded in the tool" in text


@pytest.mark.parametrize("source", SOURCES)
def test_cpu_job_gets_no_gpu_only_defaults(source: str, write_file: WriteFile) -> None:
    overrides = {"model.source": "org/m", "dataset.train": "org/d", "output": None, "tracking.reportTo": None}
    file = write_file(SOURCES[source].file, SOURCES[source].text)
    import_outcome = import_files(file, source=source, overrides={**overrides, "resources.gpusPerNode": 0})
    assert import_outcome.mistakes == []
    assert "bf16" not in str(import_outcome.spec)
    outcome_with_gpus = import_files(file, source=source, overrides=overrides)
    replacement_notes = [
        note
        for note in import_outcome.notes
        if note.startswith("the job uses no GPU, so the defaults of FineTuneJob replace those of the tool: ")
    ]
    assert bool(replacement_notes) is (source in ("toml", "yaml", "hydra", "guide"))
    assert not any(note.startswith("the job uses no GPU") for note in outcome_with_gpus.notes)
