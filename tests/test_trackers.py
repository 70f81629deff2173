"""W&B and MLflow together get the hyperparameters, the curves and the chosen epoch."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from runs import flat
from tests.conftest import BASE, Run, on
from tests.test_train import RUN_0, rows

HAS_BOTH = all(importlib.util.find_spec(name) for name in ("wandb", "mlflow"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_BOTH, reason="wandb and mlflow are not installed"),
]
T = "--trainer.logger"
SETTINGS = {  # names that both use, with this run's values
    "optimizer/class_path": "torch.optim.Adam",
    "optimizer/init_args/lr": 0.001, "batch_size": 64, "val_size": 200, "seed_everything": 3,
    "trainer.max_epochs": 3, "trainer.gradient_clip_val": 1, "name": "base",
    "checkpoint.monitor": "val/acc",
}  # fmt: skip
CURVES = ("train/loss", "train/acc", "val/loss", "val/acc")


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of an offline run: protobuf messages in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no part of a record begins so late in a block
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            yield record
            whole = b""


def program(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run train.py in its own process, because W&B keeps per-process state."""
    command = [sys.executable, str(BASE.parents[1] / "train.py"), *words]
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env["NETRC"] = str(Path("none").absolute())  # no such file
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_wandb_mlflow_and_csv_get_settings_curves_and_the_chosen_epoch(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    ran = program(
        "fit", "--config", str(BASE), *on(arrays), "--trainer.max_epochs", "3",
        "--seed_everything", "3", "--trainer.gradient_clip_val", "1",
        "--model.optimizer.lr", "0.001", "--model.optimizer.fused", "false",
        "--data.batch_size", "64",
        f"{T}+=WandbLogger", f"{T}.offline", "true", f"{T}.project", "laboratory",
        f"{T}+=MLFlowLogger", f"{T}.tracking_uri", store, f"{T}.log_model", "true",
        f"{T}+=CSVLogger", f"{T}.save_dir", "csv",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    epochs = rows(RUN_0)
    best = max(epochs, key=lambda row: row["val/acc"])
    expected = {(row["epoch"], key): row[key] for row in epochs for key in CURVES}

    client = MlflowClient(store)
    (kept,) = client.search_runs(["1"])
    assert kept.info.status == "FINISHED"
    params = {key: yaml.safe_load(kept.data.params[key]) for key in SETTINGS}
    assert params == SETTINGS
    points = {key: client.get_metric_history(kept.info.run_id, key) for key in (*CURVES, "epoch")}
    epoch_of = {point.step: point.value for point in points.pop("epoch")}
    found = {(epoch_of[p.step], key): p.value for key, of in points.items() for p in of}
    assert found == pytest.approx(expected, abs=1e-6)
    assert kept.data.metrics["chosen/val/acc"] == pytest.approx(best["val/acc"])
    assert kept.data.metrics["chosen/epoch"] == best["epoch"]
    names = {file.path for file in client.list_artifacts(kept.info.run_id)}
    assert names == {"epoch_00", "epoch_01", "epoch_02", "last"}

    (file,) = Path("wandb").glob("offline-run-*/*.wandb")
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for record in wandb_records(file):
        config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        if row := {i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}:
            history.append(row)
        summary |= {"/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
    nested = {key.replace(".", "/"): value for key, value in flat(config).items()}
    assert {key: nested[key.replace(".", "/")] for key in SETTINGS} == SETTINGS
    found = {(row["epoch"], key): row[key] for row in history for key in CURVES if key in row}
    assert found == pytest.approx(expected, abs=1e-6)
    assert summary["chosen/val/acc"] == pytest.approx(best["val/acc"])

    (table,) = Path("csv").rglob("metrics.csv")
    assert "chosen/val/acc" in table.read_text()


def test_what_a_tracker_refuses_is_said_in_one_line(
    run: Run, fails: Callable[..., str], arrays: Path, tmp_path: Path
) -> None:
    fit = ("fit", "--config", BASE, "--trainer.max_epochs", "1")
    assert "sqlite:///" in fails(*fit, T, "MLFlowLogger"), "MLflow's own remedy"
    said = program(*map(str, fit), *on(arrays), T, "WandbLogger")
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].startswith("error: wandb: ")
    assert "wandb login" in said.stderr.splitlines()[-1]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    logs = (T, "MLFlowLogger", f"{T}.tracking_uri", store)
    run(*fit, *logs)
    from mlflow import MlflowClient

    (logged,) = MlflowClient(store).search_runs(["1"])
    last = RUN_0 / "checkpoints" / "last.ckpt"
    again = ("fit", "--ckpt_path", last, "--trainer.max_epochs", "2")
    of = (f"{T}.run_id", logged.info.run_id)
    assert "Changing param values is not allowed" in fails(*again, *logs, *of)
    run(*again)  # into another MLflow run
