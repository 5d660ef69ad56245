"""All importers by name (the value of `--from`). To add a tool, add its importer here."""

from __future__ import annotations

from finetune_cli.importers import env, guide, hydra, openai, toml, yaml
from finetune_cli.importers.draft import Importer

IMPORTERS: dict[str, Importer] = {
    importer.name: importer
    for importer in (env.IMPORTER, toml.IMPORTER, yaml.IMPORTER, hydra.IMPORTER, guide.IMPORTER, openai.IMPORTER)
}
