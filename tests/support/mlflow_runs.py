"""Reads runs from an MLflow store or server."""

from __future__ import annotations

from typing import Any


class MlflowRuns:
    """The runs of one MLflow experiment."""

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
        """Return the run with this name. Errors: ValueError unless exactly one run has this name."""
        [run] = [run for run in self.all() if run.info.run_name == name]
        return run

    def history(self, name: str, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) for every stored value of a run's metric, sorted by step."""
        values = self._client.get_metric_history(self.run(name).info.run_id, metric)
        return sorted((value.step, value.value) for value in values)
