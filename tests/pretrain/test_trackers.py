"""Records reach every tracker and are read back from what it wrote on disk."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from watched import tiny, train, varied

from opsin.errors import OpsinError
from opsin.pretrain import trackers
from opsin.pretrain.trackers import KINDS, MODULES, PRIVATE, Trackers, flat

RECORDS = [{"step": step, "loss": 1.0 / step, "loss.dino": 0.5, "note": "text"} for step in (10, 20)]


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Those that trackers set are as they were after the test."""
    for variable in [*PRIVATE, "MLFLOW_TRACKING_URI"]:
        monkeypatch.delenv(variable, raising=False)


def send(name, out, records, first=0):
    said = []
    tracking = Trackers([name], out, {"seed": 0, "batch": {"size": 8}}, first, said.append)
    for record in records:
        tracking.log(record)
    tracking.close()
    assert said == []


def test_tensorboard_files_are_read_back(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    send("tensorboard", tmp_path, RECORDS)
    send("tensorboard", tmp_path, [{"step": 20, "loss": 7.0}], first=10)  # resumed: step 20 comes again
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["step", "loss", "loss/dino"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, pytest.approx(0.1)), (20, 7.0)]
    (text,) = events.Tensors("recipe/text_summary")
    assert b"batch.size: 8" in text.tensor_proto.string_val[0]


def test_mlflow_files_are_read_back(tmp_path):
    pytest.importorskip("mlflow")
    send("mlflow", tmp_path, RECORDS)
    send("mlflow", tmp_path, [{"step": 30, "loss": math.nan}], first=20)
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tmp_path / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'opsin'")
    (run,) = client.search_runs([experiment.experiment_id])  # the resumed run is the same one
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "batch.size": "8"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history[:2]] == [(10, 0.1), (20, 0.05)]
    assert math.isnan(history[2].value)
    assert [m.value for m in client.get_metric_history(run.info.run_id, "loss.dino")] == [0.5, 0.5]


READ_WANDB = """
import json, sys
from wandb.proto import wandb_internal_pb2
data, at, whole = open(sys.argv[1], "rb").read(), 7, b""  # LevelDB's log format: blocks of 32 KiB after a header
while at < len(data):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
    if kind not in (1, 4):  # whole, or the last part
        continue
    record, whole = wandb_internal_pb2.Record.FromString(whole), b""
    if record.WhichOneof("record_type") == "run":
        print(json.dumps({"run": record.run.run_id}))
    if record.WhichOneof("record_type") == "history":
        items = record.history.item
        print(json.dumps({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}))
"""


def test_wandb_files_are_read_back_and_the_mode_is_offline(tmp_path):
    pytest.importorskip("wandb")
    send("wandb", tmp_path, RECORDS)
    send("wandb", tmp_path, [{"step": 30, "loss": 7.0}], first=20)
    assert os.environ["WANDB_MODE"] == "offline"
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2
    lines = [
        json.loads(line)
        for file in files
        for line in subprocess.run(
            [sys.executable, "-c", READ_WANDB, str(file)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    ]
    assert len({line["run"] for line in lines if "run" in line}) == 1
    history = [(line["_step"], line["loss"]) for line in lines if "loss" in line]
    assert history == [(10, 0.1), (20, 0.05), (30, 7.0)]
    assert [line["loss/dino"] for line in lines if "loss/dino" in line] == [0.5, 0.5]


ALONE = """
import socket, sys
def refuse(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise RuntimeError(f"NETWORK {address}")
    return connect(self, address)
connect, socket.socket.connect = socket.socket.connect, refuse
real = socket.getaddrinfo
def look_up(host, *rest, **more):
    if host not in (None, "", "127.0.0.1", "localhost", "::1"):
        print("NETWORK", host, file=sys.stderr)
        raise OSError(host)
    return real(host, *rest, **more)
socket.getaddrinfo = look_up
from pathlib import Path
from opsin.pretrain.trackers import Trackers
said = []
tracking = Trackers(["tensorboard", "wandb", "mlflow"], Path(sys.argv[1]), {"seed": 0}, 0, said.append)
tracking.log({"step": 1, "loss": 1.0})
tracking.close()
assert said == [], said
"""


def test_nothing_reaches_the_network(tmp_path):
    for package in ("tensorboard", "wandb", "mlflow"):
        pytest.importorskip(package)
    free = {name: value for name, value in os.environ.items() if name not in PRIVATE}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], capture_output=True, text=True, env=free, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "NETWORK" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tensorboard", "wandb", "mlflow", "tracking.json"}


def test_the_users_own_settings_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    Trackers([], tmp_path, {}, 0, print)
    assert os.environ["WANDB_MODE"] == "online"
    assert os.environ["DO_NOT_TRACK"] == "1"


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OpsinError, match=r"monitor.trackers has wandb, whose .*pip install 'opsin\[track\]', or leave"):
        Trackers(["wandb"], tmp_path, {}, 0, print)


class Failing:
    """A tracker whose disk is full after the first record."""

    def __init__(self, *_):
        self.records = 0

    def log(self, *_):
        self.records += 1
        if self.records > 1:
            raise OSError(28, "No space left on device")

    def close(self):
        raise AssertionError("it was left out before")


def test_a_tracker_that_fails_never_ends_the_run(monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "mlflow", Failing)
    monkeypatch.setitem(MODULES, "mlflow", "json")
    records, said, _ = train(tiny(20, trackers=("mlflow",)), varied(tmp_path / "images", 40), tmp_path / "run")
    assert [line for line in said if "mlflow" in line] == [
        "mlflow is left out from here on ([Errno 28] No space left on device): metrics.jsonl has all records."
    ]
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_tracker_that_cannot_start_is_left_out(monkeypatch, tmp_path):
    def broken(out, config, first):
        raise ValueError("no such thing")

    monkeypatch.setitem(KINDS, "mlflow", broken)
    monkeypatch.setitem(MODULES, "mlflow", "json")
    said = []
    tracking = Trackers(["mlflow"], tmp_path, {}, 0, said.append)
    tracking.log({"step": 1})
    tracking.close()
    assert said == ["mlflow is left out from here on (no such thing): metrics.jsonl has all records."]


def test_a_recipe_becomes_flat():
    settings = flat(asdict(tiny()))
    assert settings["batch.size"] == 32
    assert settings["backbone.depth"] == 2
    assert len(trackers.KINDS) == len(trackers.MODULES) == 3
