"""All importers by name, which is the value of `--from`."""

from __future__ import annotations

import importlib

from finetune_cli.importers import IMPORTER_NAMES
from finetune_cli.importers.draft import Importer

IMPORTERS: dict[str, Importer] = {
    name: importlib.import_module(f"finetune_cli.importers.{name}").IMPORTER for name in IMPORTER_NAMES
}
