"""Several processes train one model, and leave what one process leaves."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cifar10 import archive
from tests.conftest import Run
from tests.test_train import ROOT, rows, weights

METRICS = [f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("loss", "acc")]


def test_two_nodes_train_as_one_process_does(run: Run, tarball: bytes, tmp_path: Path) -> None:
    """Batches of 97 divide evenly neither over the ranks nor the epoch, nor do 203 images to
    validate. Without batch norm, whose statistics are each rank's own."""
    settings = [
        *("fit", "--model.network", "tests.test_train.Flat", "--data.verify", "false"),
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
        root.mkdir()
        (root / archive.ARCHIVE).write_bytes(tarball)
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
    said = [node.communicate(timeout=120)[0] for node in nodes]
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
    assert run("test", "--ckpt_path", together / "checkpoints" / "last.ckpt")
