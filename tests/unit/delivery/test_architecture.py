"""All files and identifiers that `docs/architecture.md` names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE_TEXT = (ROOT / "docs/architecture.md").read_text("utf-8")
RECIPES_TEXT = PAGE_TEXT[PAGE_TEXT.index("## Where to add things") :]
FILE_PATHS = sorted(set(re.findall(r"`((?:crds|operator|trainer-image|cli|tests|docs)/[\w./-]*[\w/])`", PAGE_TEXT)))
NAMES_AND_FILES = re.findall(r"`([A-Z]\w+|[a-z_]+\(\))`[^|`]* in `([\w./-]+\.py)`", RECIPES_TEXT)


@pytest.mark.parametrize("file", FILE_PATHS)
def test_files_that_the_page_names_exist(file: str) -> None:
    assert (ROOT / file).exists()


@pytest.mark.parametrize(("name", "file"), NAMES_AND_FILES)
def test_identifiers_are_defined_in_the_file_that_the_page_names(name: str, file: str) -> None:
    name = name.removesuffix("()")
    source = next(path for path in (ROOT / file, ROOT / "trainer-image/finetune_trainer" / file) if path.exists())
    assert re.search(rf"^(class |def |){name}\b", source.read_text("utf-8"), re.MULTILINE)


PROGRAM_FOLDERS = {"operator": "operator/finetune_operator", "trainer": "trainer-image/finetune_trainer"}
PATH_OF_A_JOB = PAGE_TEXT[PAGE_TEXT.index("## The path of one job") : PAGE_TEXT.index("## Storage")]


@pytest.mark.parametrize("module", sorted(set(re.findall(r"`((?:\w+/)*\w+\.py|\w+/)`", PATH_OF_A_JOB))))
def test_modules_on_the_path_of_a_job_exist(module: str) -> None:
    assert any((ROOT / folder / module).exists() for folder in PROGRAM_FOLDERS.values())


def test_each_kind_of_extension_has_a_recipe() -> None:
    headings = re.findall(r"^### (.*)$", RECIPES_TEXT, re.MULTILINE)
    assert headings == [
        "Explain a usual mistake", "Change a retry rule or an exit code", "Add a status field", "Add a printer column", "Add an event",
        "Add a rule to the platform's policy", "Add a method",
        "Add a type of model to the tests", "Add a model type to the memory plan", "Add a type of GPU", "Add an objective",
        "Add a data format", "Add an importer",
    ]  # fmt: skip
    assert len(FILE_PATHS) > 20 and len(NAMES_AND_FILES) >= 9
