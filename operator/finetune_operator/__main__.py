"""The command `finetune-operator`: reads the configuration, connects to the API server and runs the operator."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
from pathlib import Path

from kubernetes.aio.config import ConfigException

from finetune_operator import kopf_adapter, logs, settings
from finetune_operator.kube import KubeClient
from finetune_operator.metrics import Metrics
from finetune_operator.runtime import OperatorRuntime

CONFIG_VARIABLE = "FINETUNE_OPERATOR_CONFIG"
USAGE_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the operator. Returns the exit code: 0 after SIGTERM, 1 if the start or a task of the operator failed, 2 if the configuration is
    wrong or no address of an API server is found.
    """
    options = _parse_options(arguments)
    try:
        config = _load_config(options.config)
    except settings.SettingsError as error:
        sys.stderr.write(f"finetune-operator: {error}\n")
        return USAGE_ERROR
    if options.check:
        sys.stdout.write("the configuration is valid\n")
        return 0
    logs.configure_logging(config.log)
    kopf_adapter.configure_logging()
    _tune_garbage_collector()
    return asyncio.run(_run(config))


def _tune_garbage_collector() -> None:
    """Exclude imported modules from garbage collection, and collect old objects less often.

    The cache holds thousands of long-lived objects. With the default thresholds, each burst of events triggers a full collection, which
    blocks the event loop. A burst leaves many reference cycles, so young objects are still collected often, a few at a time.
    Measurements: docs/decisions/0030-operator-core.md.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 5, 1000)


async def _run(config: settings.OperatorConfig) -> int:
    metrics = Metrics()
    try:
        kube = await KubeClient.connect(config.api, metrics.record_request)
    except (ConfigException, OSError) as error:
        sys.stderr.write(f"finetune-operator: cannot find the address of an API server: {error}\n")
        return USAGE_ERROR
    try:
        return await OperatorRuntime(config, kube, metrics).run()
    finally:
        await kube.close()


def _parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finetune-operator", description="The control loop of FineTuneJobs.")
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help=f"configuration file (YAML or JSON); default: the file that ${CONFIG_VARIABLE} names, or {settings.CONFIG_PATH} if it exists",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true", help="read the configuration, report whether it is valid, and exit"
    )
    return parser.parse_args(arguments)


def _load_config(path: Path | None) -> settings.OperatorConfig:
    """Return the configuration. `path` is the argument of `--config`.

    If `path` is None, read the file that the environment variable names, or else the file that the chart mounts. If neither exists, use the defaults.
    """
    if path is not None:
        return settings.load_config(path)
    if configured_path := os.environ.get(CONFIG_VARIABLE):
        return settings.load_config(Path(configured_path))
    return settings.load_config(settings.CONFIG_PATH) if settings.CONFIG_PATH.exists() else settings.OperatorConfig()


if __name__ == "__main__":
    sys.exit(main())
