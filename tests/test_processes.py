"""Several processes train one model, with the same results as one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from tests.conftest import BASE, Run
from tests.test_train import ROOT, is_same, rows, weights

METRICS = [f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("loss", "acc")]


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(run: Run, arrays: Path, tmp_path: Path) -> None:
    """Batches of 97 divide evenly neither over the ranks nor the epoch, nor do 203 validation
    images. There is no batch norm, because its statistics are per rank."""
    settings = [
        *("fit", "--model.network", "tests.small.Flat", "--data.verify", "false"),
        *("--data.val_size", "203", "--data.batch_size", "97", "--data.test_curve", "true"),
        *(
            "--trainer.max_epochs",
            "3",
            "--trainer.accelerator",
            "cpu",
            "--model.optimizer.lr",
            "0.001",
        ),
    ]
    run(*settings, "--name", "alone")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = []
    for rank in (0, 1):
        root = tmp_path / f"disk_of_{rank}"
        shutil.copytree(arrays, root)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *(f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"),
            *(str(ROOT / "train.py"), *settings, "--name", "together", "--data.root", str(root)),
            *("--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.strategy=ddp"),
        ]
        nodes.append(
            subprocess.Popen(
                command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )  # fmt: skip
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "best  epoch" in said[0]
    assert "epoch" not in said[1], "one process speaks"

    alone, together = Path("runs/alone/version_0"), Path("runs/together/version_0")
    assert [path.name for path in together.parent.iterdir()] == ["version_0"]
    files = [
        {path.name for path in folder.rglob("*") if "events" not in path.name}
        for folder in (alone, together)
    ]
    assert files[0] == files[1]
    assert len(list(together.glob("events*"))) == 1
    for one, other in zip(rows(alone), rows(together), strict=True):
        assert [one[key] for key in METRICS] == pytest.approx([other[key] for key in METRICS], 1e-5)
    last = [weights(folder / "checkpoints" / "last.ckpt") for folder in (alone, together)]
    for name, tensor in last[0].items():
        assert tensor.allclose(last[1][name], atol=1e-5), name
    two = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
    command = [sys.executable, str(ROOT / "train.py"), "test", "--ckpt_path"]
    subprocess.run([*command, str(together / "checkpoints" / "last.ckpt"), *two], check=True)
    report = json.loads((together / "test.json").read_text())
    assert report["images"] == sum(map(sum, report["confusion"])) == 200
    for name in ("test/loss", "test/acc"):
        assert report[name] == pytest.approx(rows(together)[-1][name], abs=1e-4)


@pytest.mark.slow
def test_a_job_that_slurm_requeues_goes_on_exactly(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM warns with SIGUSR1, Lightning asks it to requeue the job, SLURM kills it and reruns
    the same command."""
    args = [
        *("fit", "--config", str(BASE), "--data.augment+=cifar10.augment.RandomFlip"),
        *("--data.root", str(arrays), "--data.verify=false", "--data.val_size=200"),
        *("--data.batch_size=100", "--trainer.accelerator=cpu", "--trainer.max_epochs=6"),
        *("--trainer.callbacks+=tests.small.Waits", "--model.network=tests.small.Small"),
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wait_in").write_text("4")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho $@ > asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train",
             "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    command = [sys.executable, str(ROOT / "train.py"), *args]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **slurm})
        deadline = time.monotonic() + 100
        while not (tmp_path / "waits").exists():
            assert job.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        while not (tmp_path / "asked").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.kill()
        job.wait()
    (tmp_path / "wait_in").unlink()
    assert (tmp_path / "asked").read_text().split() == ["requeue", "77"]
    assert len(list(Path("runs/base/version_0/checkpoints").glob("epoch_*.ckpt"))) == 4

    for name, value in {**slurm, "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    train.main(args)
    assert [path.name for path in Path("runs/base").iterdir()] == ["version_0"]
    train.main([*args, "--trainer.max_epochs=1"])  # the next command of the job
    (Path("runs/base/version_1/checkpoints/last.ckpt")).write_bytes(b"damaged")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    train.main(args)  # a job that has saved nothing restarts
    assert is_same(
        *(weights(Path(f"runs/base/version_{i}/checkpoints/epoch_05.ckpt")) for i in (0, 2))
    )
