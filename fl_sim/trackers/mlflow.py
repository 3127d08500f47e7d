"""MLflow: a run of its own for each run folder, in a local store or on a server."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_sim.errors import require
from fl_sim.folder import waiting, write_text
from fl_sim.trackers.packages import check_installed
from fl_sim.trackers.scalars import Scalar, scalars, settings

STORE, NAME = "mlflow.db", "mlflow_id"
METRICS_AT_ONCE, PARAMS_AT_ONCE, LONGEST = 1000, 100, 6000
"""MLflow's limits."""


@dataclass
class MLflow:
    """For MLflow: by default the local store `mlflow.db` in the `output` folder, which all of its runs share."""

    folder: Path
    config: Mapping[str, Any]
    uri: str | None = None
    """Another store or server, such as http://HOST:5000."""
    experiment: str | None = None
    """None: the run's `name`, so that a sweep is an experiment."""
    _client: Any = field(default=None, init=False, repr=False)
    _run: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.uri is None or "://" in self.uri, "uri", self.uri, "must be null or such as http://HOST:5000")
        check_installed("mlflow")

    def rebuild(self, events: Iterable[Mapping[str, Any]]) -> None:
        """A fresh run with what the record holds; that of an interrupted attempt is deleted."""
        self.close()
        client = importlib.import_module("mlflow").MlflowClient
        with _quiet():
            if self.uri is not None:
                self._client = client(tracking_uri=self.uri)
            else:
                store = Path(str(self.config["output"])).resolve() / STORE
                store.parent.mkdir(parents=True, exist_ok=True)
                # Whoever is first makes the store's tables: several runs of a sweep may begin at once.
                with waiting(store.with_suffix(".lock")):
                    self._client = client(tracking_uri=f"sqlite:///{store}")
            self._begin()
        self._metrics([scalar for event in events for scalar in scalars(event)])

    def log(self, event: str, **fields: Any) -> None:
        self._metrics(list(scalars({"event": event} | fields)))

    def end(self, summary: Mapping[str, Any]) -> None:
        final = [Scalar(f"final/{key}", 0, summary[key]) for key in ("acc", "asr") if summary.get(key) is not None]
        self._metrics(final)
        self._finish("FINISHED")

    def close(self) -> None:
        """A run that is closed before its end counts as killed."""
        self._finish("KILLED")

    def _begin(self) -> None:
        path, name = self.folder / NAME, str(self.config["name"])
        tags = {"fl_sim.folder": str(self.folder.resolve())}
        number = self._experiment(self.experiment or name)
        for run in {*([path.read_text()] if path.exists() else ()), *self._orphans(number, tags)}:
            self._forget(run)
        run = self._client.create_run(number, run_name=f"{name} {self.folder.name}", tags=tags)
        self._run = str(run.info.run_id)
        write_text(path, self._run)
        kind = importlib.import_module("mlflow.entities").Param
        params = [kind(key, str(value)[:LONGEST]) for key, value in settings(self.config).items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._run, params=params[start : start + PARAMS_AT_ONCE])

    def _orphans(self, experiment: str, tags: Mapping[str, str]) -> Iterator[str]:
        """Runs that a killed process began in this folder: it may not have come to writing down which.

        Only in a store of this machine's own. On a server, another machine's folder may have the same name.
        """
        if self.uri is None:
            for run in self._client.search_runs([experiment], "attributes.status = 'RUNNING'"):
                if tags.items() <= run.data.tags.items():
                    yield str(run.info.run_id)

    def _forget(self, run: str) -> None:
        """Delete an earlier attempt's run, unless whoever cleared the store was faster."""
        try:
            self._client.delete_run(run)
        except importlib.import_module("mlflow.exceptions").MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _experiment(self, name: str) -> str:
        """The experiment of this name, made if need be; another run of the sweep may be making it, too."""
        known = self._client.get_experiment_by_name(name)
        if known is None:
            try:
                return str(self._client.create_experiment(name))
            except importlib.import_module("mlflow.exceptions").MlflowException:
                known = self._client.get_experiment_by_name(name)
                if known is None:
                    raise
        return str(known.experiment_id)

    def _metrics(self, found: Sequence[Scalar]) -> None:
        kind, now = importlib.import_module("mlflow.entities").Metric, int(1000 * time.time())
        metrics = [kind(each.tag, each.value, now, each.step) for each in found]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[start : start + METRICS_AT_ONCE])

    def _finish(self, status: str) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run, status)
            self._run = None


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow and its migrations tell of every table that they make."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
