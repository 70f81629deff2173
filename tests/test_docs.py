"""The examples of the documentation, run as they stand on made-up images."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Run
from tests.test_train import rows

ROOT = Path(__file__).parents[1]


def test_parts_of_ones_own_are_made_as_the_guide_says(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(tmp_path)
    text = (ROOT / "docs" / "develop.md").read_text()
    said, files = "", list[Path]()
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
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
                said += run(*words)
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
