"""Write the files that are generated from the models, or check that they are up to date.

The generated files are the CRD, the reference pages, and the chart's values schema, README, admission rules and copy of the CRD. The chart needs a copy
of the CRD, because Helm cannot read files outside a chart. The page about types of models is written from recorded runs. helm-docs writes the README
from the comments in values.yaml. `make verify` runs this program with --check.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from chart_schema import make_values_schema
from finetune_api.reference import build_pages
from finetune_api.schema import build_crd_yaml
from finetune_api.tenancy.admission import build_admission_rules_yaml
from models_page import make_models_page
from tools import HELM_DOCS, build_go_tools

ROOT = Path(__file__).resolve().parent.parent
CHART_FOLDER = ROOT / "helm/finetune-operator"
CRD_FILES = (ROOT / "crds/finetunejobs.yaml", CHART_FOLDER / "files/finetunejobs.yaml")
REFERENCE_FOLDER = ROOT / "docs/reference"
VALUES_SCHEMA_FILE = CHART_FOLDER / "values.schema.json"
ADMISSION_RULES_FILE = CHART_FOLDER / "files/admission-rules.yaml"


def render_chart_readme() -> str:
    """Return the text of the chart's README. Errors: StepFailed if helm-docs cannot be built."""
    build_go_tools(HELM_DOCS)
    command = [HELM_DOCS.path, "--dry-run", "--log-level", "error", "--sort-values-order", "file", "--chart-search-root", CHART_FOLDER]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return text.strip() + "\n"


def generate_files() -> dict[Path, str]:
    """Return the text of each generated file by its path."""
    values_schema = json.dumps(make_values_schema(), indent=2, ensure_ascii=False) + "\n"
    reference_pages = {REFERENCE_FOLDER / name: text for name, text in (build_pages() | {"models.md": make_models_page()}).items()}
    chart_files = {VALUES_SCHEMA_FILE: values_schema, ADMISSION_RULES_FILE: build_admission_rules_yaml(), CHART_FOLDER / "README.md": render_chart_readme()}
    return dict.fromkeys(CRD_FILES, build_crd_yaml()) | chart_files | reference_pages


def main(argv: list[str] | None = None) -> int:
    """Write the files, or check them (--check). Returns 1 if --check finds a file that is not up to date, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 1 if a file is not up to date")
    arguments = parser.parse_args(argv)
    outdated_files = [path for path, text in generate_files().items() if not path.exists() or path.read_text("utf-8") != text]
    for path in outdated_files:
        if arguments.check:
            print(f"{path.relative_to(ROOT)} is out of date: run `make generate`", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generate_files()[path], "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if outdated_files and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
