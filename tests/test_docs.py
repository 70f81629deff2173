"""The documentation's examples, run on made-up images."""

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import export
import study
from tests.conftest import Run, made_up
from tests.test_train import rows

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # language and lines


@pytest.mark.slow
def test_parts_of_ones_own_are_made_as_the_guide_says(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(tmp_path)
    text = (ROOT / "docs" / "develop.md").read_text()
    said, files = "", list[Path]()
    for kind, block in BLOCK.findall(text):
        if name := re.match(r"# (\w+\.(py|yaml))\n", block):
            files.append(Path(name[1]))
            files[-1].write_text(block)
        elif kind == "diff":
            source = (ROOT / "lightning_module.py").read_text()
            kept = [line[1:] for line in block.splitlines() if line.startswith(" ")]
            assert all(f"\n{line}\n" in source for line in kept)
        else:
            for command in block.splitlines():
                program, *words = shlex.split(command)[1:]
                assert program == "train.py"
                is_large = "networks.library_network" in words
                said += run(*words, *["--trainer.fast_dev_run=1"] * is_large)
    assert [file.name for file in files] == [
        "mynet.py", "myaugment.py", "mine.yaml", "mymetrics.py", "mycallbacks.py",
    ]  # fmt: skip
    assert re.search(r"best  epoch \d, val/f1 [01]\.\d+", said)
    for folder in ("base/version_0", "mine/version_0", "base/version_1", "base/version_2"):
        assert len(rows(Path("runs") / folder)) == 2
    events = EventAccumulator("runs/base/version_2").Reload()
    assert len(events.Scalars("train/gradient_norm")) == 2
    for file in files:
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize(
    ("name", "commands"),
    [("README.md", 5), pytest.param("docs/usage.md", 14, marks=pytest.mark.slow)],
)
def test_commands_of_the_documentation_run(
    run: Run, batches: dict[str, bytes], arrays: Path, tmp_path: Path, name: str, commands: int
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(ROOT / "pretrained", tmp_path / "pretrained")  # results are written there too
    Path("photos").mkdir()
    Image.new("RGB", (40, 30), "blue").save("photos/sky.jpg")
    Path("my-batches").mkdir()
    for file, content in batches.items():
        Path("my-batches", file).write_bytes(content)

    def ask(*words: str) -> None:
        with pytest.raises(SystemExit, match="no finished run counts yet"):
            study.main([*words, "--jobs", "0"])

    programs: dict[str, Callable[..., Any]] = {
        "train.py": run, "export.py": lambda *words: export.main([*words]), "study.py": ask,
    }  # fmt: skip
    blocks, ran = BLOCK.findall((ROOT / name).read_text()), 0
    Path("mine.yaml").write_text("{}")
    for block in (block for kind, block in blocks if kind == "yaml"):
        if name_of := re.match(r"# (\w+\.yaml)\n", block):
            Path(name_of[1]).write_text(block)
            run("fit", "--config", ROOT / "configs/base.yaml", "--config", name_of[1],
                "--trainer.fast_dev_run", "1")  # fmt: skip
    for kind, block in blocks:
        if kind == "python":
            here = f"CIFAR10DataModule('{arrays}', verify=False, val_size=200, "
            exec(small(block).replace("CIFAR10DataModule(", here), {})
        for command in block.splitlines() if not kind else ():
            program, *words = shlex.split(small(command), comments=True)[1:]
            if program in programs:
                programs[program](*words)
                ran += 1
    assert ran == commands
    if name == "docs/usage.md":
        images = np.load("data/cifar-10-arrays/train_images.npy")
        assert np.array_equal(images, made_up()["train_images"])


@pytest.mark.slow
def test_the_notebook_runs_from_end_to_end(arrays: Path, tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").symlink_to(arrays)
    for entry in (*ROOT.glob("*.py"), *(f.parent for f in ROOT.glob("*/*"))):
        if entry.name not in ("notebooks", "data", "runs") and not (tmp_path / entry.name).exists():
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "pretrained").unlink()  # results are written beside a checkpoint
    shutil.copytree(ROOT / "pretrained", tmp_path / "pretrained")
    notebook = nbformat.read(  # type: ignore[no-untyped-call]
        ROOT / "notebooks" / "tour.ipynb", as_version=4
    )
    for cell in notebook.cells:
        assert not cell.get("outputs"), "committed without outputs"
        cell.source = cell.source.replace("Module()", "Module(verify=False, val_size=200)").replace(
            "base.yaml --name", "base.yaml --data.verify false --data.val_size 200 --name"
        )
    folder = str(tmp_path / "notebooks")
    NotebookClient(notebook, resources={"metadata": {"path": folder}}).execute()
    assert len(rows(tmp_path / "runs" / "tour" / "version_0")) == 3
    assert (tmp_path / "pretrained" / "fast94" / "predictions.csv").exists()


def small(command: str) -> str:
    """Adapt a command of the documentation to runs of two epochs."""
    return command.replace("epoch_28", "epoch_01").replace("max_epochs 50", "max_epochs 3")
