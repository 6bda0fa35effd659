"""Records of a run to TensorBoard, Weights & Biases and MLflow, each by option and with the packages of opsin[track].

All of them write below the run's folder, and nothing leaves the machine: Weights & Biases is offline unless
WANDB_MODE says otherwise (`wandb sync` uploads later), MLflow has a store of files in OUT/mlflow unless
MLFLOW_TRACKING_URI names another, and their reports to their makers are switched off. A resumed run goes on in the same
run of each. A tracker that fails is told of once and left out from then on: the training and metrics.jsonl go on.
"""

import importlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from opsin.errors import OpsinError

PRIVATE = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Environment variables that are set before the packages are imported, unless they are there."""


class Tracker(Protocol):
    """Where records go."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a record."""

    def close(self) -> None:
        """Write what is left."""


class Trackers:
    """Sends the numbers of every record to the trackers that were asked for."""

    def __init__(
        self, names: Iterable[str], out: Path, config: Mapping[str, Any], first: int, say: Callable[[str], None]
    ) -> None:
        """Start the trackers.

        Args:
            names: of `KINDS`.
            out: folder of the run.
            config: settings that are shown beside the curves.
            first: finished steps of the run; what a tracker holds beyond them will come again.
            say: for a sentence about a tracker that failed.

        Raises:
            OpsinError: a package is not installed.
        """
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        for variable, value in PRIVATE.items():
            os.environ.setdefault(variable, value)
        for name in names:
            try:
                importlib.import_module(MODULES[name])
            except ImportError as error:
                raise OpsinError(
                    f"monitor.trackers has {name}, whose package cannot be imported ({error}): pip install "
                    "'opsin[track]', or leave it out."
                ) from None
            self._safely(name, partial(self._start, name, out, config, first))

    def _start(self, name: str, out: Path, config: Mapping[str, Any], first: int) -> None:
        self._trackers[name] = KINDS[name](out, config, first)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record; values that are no numbers are left out."""
        numbers = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
        for name, tracker in list(self._trackers.items()):
            self._safely(name, partial(tracker.log, int(record["step"]), numbers))

    def close(self) -> None:
        """Finish what every tracker has begun."""
        for name, tracker in list(self._trackers.items()):
            self._safely(name, tracker.close)

    def _safely(self, name: str, work: Callable[[], None]) -> None:
        """Whatever a tracker meets, a full disk or a mistake of its package, is no reason to end a run."""
        try:
            work()
        except Exception as error:
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._say(f"{name} is left out from here on ({reason}): metrics.jsonl has all records.")


class _TensorBoard:
    """Event files in OUT/tensorboard: `tensorboard --logdir OUT`."""

    def __init__(self, out: Path, config: Mapping[str, Any], first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1 if first else None)
        if not first:
            self._writer.add_text("recipe", "\n".join(f"    {name}: {v}" for name, v in flat(config).items()))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in _grouped(numbers).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run in OUT/wandb."""

    def __init__(self, out: Path, config: Mapping[str, Any], first: int) -> None:
        import wandb

        settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_stats=True)
        identity = _remembered(out, "wandb") or _remember(out, "wandb", secrets.token_hex(4))
        self._run = wandb.init(
            project="opsin",
            name=out.resolve().name,
            id=identity,
            resume="allow" if first else None,
            dir=str(out),
            config=dict(config),
            mode=os.environ["WANDB_MODE"],  # type: ignore[arg-type]
            settings=settings,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(_grouped(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run in the store of files OUT/mlflow, or in that of MLFLOW_TRACKING_URI."""

    def __init__(self, out: Path, config: Mapping[str, Any], first: int) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (out / "mlflow").resolve().as_uri())
        known = _remembered(out, "mlflow")
        if known is None or not first:
            experiment = self._client.get_experiment_by_name("opsin")
            number = experiment.experiment_id if experiment else self._client.create_experiment("opsin")
            run = self._client.create_run(number, run_name=out.resolve().name)
            known = _remember(out, "mlflow", run.info.run_id)
            self._client.log_batch(known, params=[Param(name, str(v)[:500]) for name, v in flat(config).items()])
        else:
            self._client.update_run(known, "RUNNING")
        self._run = known

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


KINDS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
"""What the names of `monitor.trackers` mean."""
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow.tracking"}
"""What each of them imports."""


def _grouped(numbers: Mapping[str, float]) -> dict[str, float]:
    """`loss.dino` as `loss/dino`: one group of charts for each family. (To MLflow's files that would be a folder.)"""
    return {name.replace(".", "/", 1): value for name, value in numbers.items()}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _remembered(out: Path, name: str) -> str | None:
    """The name under which a tracker knows the run in this folder."""
    path = out / "tracking.json"
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return known.get(name)


def _remember(out: Path, name: str, identity: str) -> str:
    path = out / "tracking.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, name: identity}))
    return identity
