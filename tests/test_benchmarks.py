"""The clock of the benchmarks, not the times."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.__main__ import cpu_seconds, measure, turns

HERE = Path(__file__).parent.parent
WAY = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1], "checkpoints")
folder.mkdir(parents=True)
for epoch in range(1000):
    time.sleep(0.15)
    end = time.process_time() + 0.05
    while time.process_time() < end: pass
    (folder / f"epoch_{epoch:02d}.ckpt").write_text("")
"""


@pytest.mark.slow
def test_programs_run_in_their_turns_only(tmp_path: Path) -> None:
    def epochs() -> int:
        return len(list((tmp_path / "way" / "checkpoints").iterdir()))

    command = ["-c", WAY, str(tmp_path / "way")]
    spent, counted, last = 0.0, 0.0, 0
    with contextlib.closing(turns(command, tmp_path / "way", at_least=0.3)) as program:
        for turn in range(3):
            began = time.monotonic()
            wall, cpu = next(program)
            spent += time.monotonic() - began
            (process,) = psutil.Process().children()
            while process.status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)
            assert epochs() > last
            if turn:  # the first one doesn't count
                # One fewer, because an epoch may have ended while it was being stopped.
                counted += wall * max(1, epochs() - last - 1)
                assert cpu > 0
            last = epochs()
            time.sleep(5 * spent)
            assert epochs() == last, "it is stopped"
    assert counted <= spent, "the pause is not counted"
    assert not process.is_running()


def test_ratios_are_of_two_turns_of_one_round(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    found = measure({way: ["-c", WAY, str(runs / way)] for way in "ce"}, runs, 2, at_least=0.1)
    assert capfd.readouterr().err.split("\r")[:-1] == [
        "0/2 c",
        "0/2 e",
        "1/2 e",
        "1/2 c",
        "2/2 c",
        "2/2 e",
    ]
    for clock in ("wall", "cpu"):
        for one, other in (("c", "e"), ("e", "c")):
            pairs = zip(found[one][clock]["turns"], found[other][clock]["turns"], strict=True)
            assert found[one][f"{clock} / {other}"]["turns"] == [mine / its for mine, its in pairs]
    assert not psutil.Process().children()


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no images here"):
        next(turns(["-c", "raise SystemExit('no images here')"], tmp_path / "way", 0.1))


def test_cpu_seconds_are_those_of_all_processes_of_a_program() -> None:
    busy = "import time\nwhile time.process_time() < 0.5: pass\n"
    started = f"import subprocess, sys, time; child = [sys.executable, '-c', '''{busy}''']; "
    ended_and_running = "subprocess.run(child); subprocess.Popen(child); print(flush=True)"
    command = [sys.executable, "-c", f"{started}{ended_and_running}; time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 30
        while (seconds := cpu_seconds(process.pid)) < 0.8 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert 0.8 <= seconds < 3


def run_benchmarks(tmp_path: Path, *flags: str) -> dict[str, Any]:
    """Run `python -m benchmarks` on a few made-up images to its end; return its figures."""
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu", "--synthetic", "300"]
    command += ["--rounds", "1", "--json", str(tmp_path / "figures.json"), *flags]
    subprocess.run(command, cwd=HERE, check=True, timeout=600)
    figures: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return figures


@pytest.mark.slow
def test_all_programs_take_their_turns_to_the_end(tmp_path: Path) -> None:
    figures = run_benchmarks(tmp_path, "--seconds", "0.1")
    assert list(figures["epochs"]) == ["a", "b", "c", "d", "e"]
    assert list(figures["steps"]) == ["b", "c", "e"]
    for ways in (figures["epochs"], figures["steps"]):
        for way in ways.values():
            assert way["wall"]["median"] > 0
            assert {"cpu", "wall / c", "cpu / c", "wall / e", "cpu / e"} < way.keys()
        assert ways["e"]["wall / e"]["turns"] == [1]


@pytest.mark.slow
def test_no_process_is_left_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu", "--synthetic", "300"]
    with subprocess.Popen(
        [*command, "--json", str(tmp_path / "figures.json")], cwd=HERE
    ) as process:
        deadline = time.monotonic() + 100
        while len(children := psutil.Process(process.pid).children()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) != 0
    assert not [child for child in children if child.is_running()]


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
    flags = ["--minutes", "9", "--reference", str(tmp_path / "reference.py"), "--only", *only]
    figures = run_benchmarks(tmp_path, *flags)["gpu"]
    assert set(only) == figures.keys()
    assert not {name: step for name, step in figures.items() if "failed" in step}
    assert figures["resumed"]["same to the bit"] is True
    assert figures["fast94"]["reference s"]["turns"] == [2.0]
