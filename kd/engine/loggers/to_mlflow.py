"""MLflow."""
import json
import os
import re
import shlex
import time
from typing import Any

from ..run import Run
from .base import Ended, Logger, figures, keep_id, known_id

# The run waits while a record is sent, so a server that does not answer is given up soon.
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
LONGEST = 500  # characters of a parameter, which every version takes
AT_ONCE = 100  # parameters in a request
STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow(Logger):
    """A run of MLflow.

    Its own variables choose the rest: MLFLOW_TRACKING_URI (by default MLflow's own store in the current folder) and
    MLFLOW_EXPERIMENT_NAME (here "densekd" by default).
    """

    def __init__(self, run: Run, origin: dict):
        self.work_dir, self.from_step, self.origin = run.work_dir, run.step, origin
        self.client = self.id = None

    def start(self) -> None:
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.client = MlflowClient()
        tags = {"work_dir": str(self.work_dir), "command": shlex.join(self.origin["command"]),
                "commit": self.origin["commit"] or "unknown", "date": self.origin["date"]}
        there = self._continue() if self.from_step else None
        if there is None:
            self.id = self.client.create_run(self._experiment(), run_name=str(self.work_dir)).info.run_id
            keep_id(self.work_dir, "mlflow", self.id)
        self._describe(flat(self.origin["config"]), tags, there or {})

    def _continue(self) -> dict[str, str] | None:
        """Go on with the run that the work dir names, and return its parameters; None if the store has no such run."""
        from mlflow.exceptions import MlflowException

        before = known_id(self.work_dir, "mlflow")
        if before is None:
            return None
        try:
            params = self.client.get_run(before).data.params
        except MlflowException:  # another store; one that does not answer fails again when a run is made
            return None
        self.id = before
        self.client.update_run(before, status="RUNNING")
        return params

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "densekd"
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found else self.client.create_experiment(name)

    def _describe(self, params: dict[str, str], tags: dict[str, str], there: dict[str, str]) -> None:
        """Send the configuration. MLflow cannot change a parameter, so a new value of one becomes a tag."""
        from mlflow.entities import Param, RunTag

        tags |= {name: value for name, value in params.items() if there.get(name, value) != value}
        self.client.log_batch(self.id, tags=[RunTag(name, value[:LONGEST]) for name, value in tags.items()])
        new = [Param(name, value) for name, value in params.items() if name not in there]
        for i in range(0, len(new), AT_ONCE):
            self.client.log_batch(self.id, params=new[i:i + AT_ONCE])

    def show(self, record: dict) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = {"epoch": record["epoch"]} | figures(record)
        self.client.log_batch(self.id, metrics=[Metric(allowed(name), float(value), now, record["step"])
                                                for name, value in values.items()])

    def end(self, ended: Ended) -> None:
        self.client.set_terminated(self.id, STATES[ended])


def flat(value: Any, key: str = "") -> dict[str, str]:
    """The values of a configuration as texts, by dotted keys; entries of lists are numbered."""
    if value and isinstance(value, dict | list):
        found: dict[str, str] = {}
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            found |= flat(each, f"{key}.{name}" if key else str(name))
        return found
    text = value if isinstance(value, str) else json.dumps(value)
    return {allowed(key): text[:LONGEST]}


def allowed(name: str) -> str:
    """A name with only what MLflow allows in names; other characters become their number, such as _28 for a bracket."""
    name = re.sub(r"[^\w\-. /]", lambda found: f"_{ord(found[0]):x}", name, flags=re.ASCII)
    return "/".join("_" if part.strip(". ") == "" else part for part in name.split("/"))[:250]
