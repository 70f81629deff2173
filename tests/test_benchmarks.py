"""The clock of the benchmarks, not the times."""

import time
from pathlib import Path

import pytest

from benchmarks.__main__ import Program

WAY = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
for epoch in range(1000):
    time.sleep(0.2)
    (folder / f"epoch_{epoch:02d}.ckpt").write_text("")
"""


def test_programs_run_in_their_turns_only(tmp_path: Path) -> None:
    program = Program(["-c", WAY, str(tmp_path / "marks")], tmp_path / "marks")
    try:
        program.turn(0.1)
        assert program.start > 0.2
        for _ in range(2):
            before = len(list((tmp_path / "marks").iterdir()))
            time.sleep(0.7)
            assert len(list((tmp_path / "marks").iterdir())) == before, "it is stopped"
            program.turn(0.3)
            assert len(list((tmp_path / "marks").iterdir())) >= before + 1
        assert len(program.seconds) == 2
    finally:
        program.end()
    assert program.process is not None
    assert program.process.poll() is not None


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    program = Program(["-c", "raise SystemExit('no images here')"], tmp_path)
    with pytest.raises(SystemExit, match="no images here"):
        program.turn(0.1)
    program.end()
