"""Options that many commands share, with kubectl's spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NamespaceOption = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; left out: the context's.")]
ContextOption = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig.")]
KubeconfigOption = Annotated[Path | None, typer.Option("--kubeconfig", help="Path of the kubeconfig.")]
FormatOption = Annotated[str | None, typer.Option("-o", "--output", metavar="yaml|json|wide|name", help="Format.")]
