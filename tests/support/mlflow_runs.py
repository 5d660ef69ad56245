"""Reads runs from an MLflow store or server."""

from __future__ import annotations

from typing import Any


class MlflowRuns:
    """The runs of one experiment."""

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._experiment = experiment

    def all(self) -> list[Any]:
        experiment = self._client.get_experiment_by_name(self._experiment)
        return [] if experiment is None else list(self._client.search_runs([experiment.experiment_id]))

    def names(self) -> set[str]:
        return {run.info.run_name for run in self.all()}

    def run(self, name: str) -> Any:
        """The only run with this name."""
        [run] = [run for run in self.all() if run.info.run_name == name]
        return run

    def history(self, name: str, key: str) -> list[tuple[int, float]]:
        """Step and value of every stored value of a metric, in the order of steps."""
        values = self._client.get_metric_history(self.run(name).info.run_id, key)
        return sorted((metric.step, metric.value) for metric in values)
