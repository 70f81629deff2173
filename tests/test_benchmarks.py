"""The clock of the benchmarks, not the times."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.__main__ import Program, cpu_seconds

HERE = Path(__file__).parent.parent
WAY = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
for epoch in range(1000):
    time.sleep(0.05)
    (folder / f"epoch_{epoch:02d}.ckpt").write_text("")
"""


def test_programs_run_in_their_turns_only(tmp_path: Path) -> None:
    program, marks = Program(["-c", WAY, str(tmp_path / "marks")], tmp_path / "marks"), []
    began, paused = time.monotonic(), 0.0
    try:
        program.turn(0.1)
        assert not program.wall, "the first epoch has the start in it"
        for _ in range(2):
            assert program.process is not None
            os.waitid(os.P_PID, program.process.pid, os.WSTOPPED | os.WNOWAIT)
            marks.append(program.epochs)
            before = len(list((tmp_path / "marks").iterdir()))
            pause = time.monotonic() - began - paused  # longer than all turns so far
            time.sleep(pause)
            paused += pause
            assert len(list((tmp_path / "marks").iterdir())) == before, "it is stopped"
            program.turn(0.3)
            assert len(list((tmp_path / "marks").iterdir())) >= before + 1
        marks.append(program.epochs)
        assert len(program.wall) == len(program.cpu) == 2
        in_turns = time.monotonic() - began - paused
        turns = zip(program.wall, pairwise(marks), strict=True)
        counted = sum(seconds * (now - before) for seconds, (before, now) in turns)
        assert counted <= in_turns, "the pause is not counted"
    finally:
        program.end()
    assert program.process is not None
    assert program.process.poll() is not None


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    program = Program(["-c", "raise SystemExit('no images here')"], tmp_path)
    with pytest.raises(SystemExit, match="no images here"):
        program.turn(0.1)
    program.end()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_cpu_seconds_are_those_of_all_processes_of_a_program() -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass\n"
    child = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '''{busy}''']); "
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{child}\n{busy}\nprint(flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        deadline = time.monotonic() + 30
        while (seconds := cpu_seconds(process.pid)) < 0.55 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 0.55 <= seconds < 3
    finally:
        process.kill()
        process.wait()
    assert cpu_seconds(os.getpgid(0)) > 0


def run_benchmarks(tmp_path: Path, *flags: str) -> dict[str, dict[str, dict[str, object]]]:
    """Run `python -m benchmarks` on a few made-up images to its end; return its figures."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu", "--json", str(file), *flags]
    subprocess.run(command, cwd=HERE, check=True, timeout=600)
    figures: dict[str, dict[str, dict[str, object]]] = json.loads(file.read_text())
    return figures


@pytest.mark.slow
def test_all_programs_take_their_turns_to_the_end(tmp_path: Path) -> None:
    figures = run_benchmarks(tmp_path, "--synthetic", "300", "--rounds", "1", "--seconds", "0.1")
    assert list(figures["epochs"]) == ["a", "b", "c", "d", "e"]
    assert list(figures["steps"]) == ["b", "c", "e"]
    for ways in (figures["epochs"], figures["steps"]):
        for way in ways.values():
            assert way["wall"]["median"] > 0  # type: ignore[index]
            assert {"cpu", "wall / c", "cpu / c", "wall / e", "cpu / e"} < way.keys()
        assert ways["e"]["wall / e"]["turns"] == [1]  # type: ignore[index]


REFERENCE = """
import torch

class CifarNet(torch.nn.Linear):
    def __init__(self): super().__init__(1, 1)
    def cuda(self): return self

def print_training_details(row, is_final_entry): raise AssertionError

def main(run, model):
    assert torch.load("cifar10/train.pt")["images"].shape[1:] == (32, 32, 3)
    for time_seconds in (1.0, 2.0, 2.5):
        print_training_details(locals(), is_final_entry=False)
    return 0.94
"""


@pytest.mark.slow
def test_what_a_gpu_can_show_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "reference.py").write_text(REFERENCE)
    only = ["fast94", "base_graph", "base_trace", "resumed", "bare"]
    figures = run_benchmarks(
        tmp_path, "--synthetic", "300", "--rounds", "1", "--minutes", "9", "--only", *only,
        "--reference", str(tmp_path / "reference.py"),
    )["gpu"]  # fmt: skip
    assert set(only) == figures.keys()
    assert not {name: step for name, step in figures.items() if "failed" in step}
    assert figures["resumed"]["same to the bit"] is True
    assert figures["fast94"]["reference s"]["turns"] == [2.0]  # type: ignore[index]
