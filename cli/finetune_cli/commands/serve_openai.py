"""`finetune serve-openai`: runs a server with the endpoints of the OpenAI fine-tuning API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption


def serve_openai(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="YAML file with the storage and the models of the server.")],
    keys: Annotated[Path, typer.Option("--keys", metavar="FILE", help="YAML file with the sha256 and the ServiceAccount of each API key.")],
    host: Annotated[str, typer.Option(help="Address on which the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on which the server listens. 0: any free port.")] = 8080,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Serve `/v1/files` and `/v1/fine_tuning/jobs` of the OpenAI API with FineTuneJobs and S3, until Ctrl-C.

    A client of the OpenAI API works with this server if you change its base URL and API key. The server reads its S3 credentials from
    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.

    Example: finetune serve-openai --config server.yaml --keys keys.yaml --port 8080
    """
    import asyncio
    import logging

    from finetune_cli.cluster import connect
    from finetune_cli.mistakes import InvalidInput
    from finetune_cli.openai_server.app import create_app, serve
    from finetune_cli.openai_server.config import load_config
    from finetune_cli.openai_server.job_requests import check_models
    from finetune_cli.openai_server.keys import KeyTable
    from finetune_cli.openai_server.service import FineTuningService

    server_config = load_config(config)
    mistakes = check_models(server_config)
    if mistakes:
        raise InvalidInput(mistakes)
    app = create_app(FineTuningService(server_config, connect(None, context, kubeconfig)), KeyTable(keys))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(app, host, port, lambda address: output.print_notes([f"base URL for clients: {address}"])))
    except OSError as error:
        reason = str(error.strerror or error).rpartition(": ")[2]
        raise output.fail(f"--host {host} --port {port}: the server cannot listen there: {reason}") from None
