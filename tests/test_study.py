"""Studies: many runs, one answer; stopped, shared, extended, resumed elsewhere."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import study
from reports.card import LIMITS
from runs import differences
from studies.answer import Answer
from studies.question import Question, check
from studies.queue import Queue, without_password
from studies.record import Plan
from studies.statistics import corrected_p, smallest_p
from studies.work import shares
from tests.conftest import BASE, Run

ROOT = Path(__file__).parents[1]
FOLDER = Path("runs/question")


@pytest.fixture
def ask(arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a study of the small data set in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return asking(arrays)


def asking(arrays: Path) -> Callable[..., Path]:
    """Return a function that writes a study of the small data set to the current folder."""

    def ask(fixed: dict[str, Any] | None = None, **settings: Any) -> Path:
        small = {
            "data.root": str(arrays),
            "data.verify": False,
            "data.val_size": 200,
            "data.batch_size": 100,
            "model.optimizer.lr": 0.002,
            "trainer.max_epochs": 1,
            "trainer.accelerator": "cpu",
            "model.network": "tests.small.Small",
        }
        varied = {*settings.get("grid", {}), *settings.get("search", {})}
        varied.update(*settings.get("variants", {}).values())
        small = {flag: value for flag, value in small.items() if flag not in varied}
        asked = {
            "question": "Which one?",
            "config": str(BASE),
            "seeds": [0],
            "fixed": small | (fixed or {}),
            **settings,
        }
        file = Path("question.yaml")
        file.write_text(yaml.safe_dump(asked, sort_keys=False))
        return file

    return ask


CONVNET = {"model.network": "ConvNet"}
GRID = {"model.optimizer.lr": [0.002, 0.0001]}
TWO = {"trainer.max_epochs": 2}


@pytest.fixture(scope="session")
def finished(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a finished study of two settings and two seeds, and its output; made once for
    all test processes."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    parent = tmp_path_factory.getbasetemp().parent if is_worker else tmp_path_factory.mktemp("all")
    folder = parent / "finished"
    with FileLock(parent / "finished.lock"):
        if not (folder / "printed").exists():
            folder.mkdir()
            printed = io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
                patch.chdir(folder)
                file = asking(arrays)(TWO, grid=GRID, seeds=[0, 1])
                study.main([str(file), "--jobs", "2"])
            (folder / "printed").write_text(printed.getvalue())
    return folder, (folder / "printed").read_text()


@pytest.fixture
def after(
    finished: tuple[Path, str], tmp_path: Path, ask: Callable[..., Path]
) -> Callable[..., Path]:
    """Write another study in a copy of that study's folder."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return ask


def runs(folder: Path = FOLDER) -> dict[str, Path]:
    """Return the folders of the runs by name."""
    return {path.parent.name: path for path in sorted(folder.glob("*/version_*"))}


def table(folder: Path = FOLDER) -> dict[tuple[str, int], Any]:
    """Return how each run ended, and its epochs without their seconds."""
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    for line in lines:
        line["epochs"].pop("seconds", None)
    return {(line["setting"], line["seed"]): (line["ended"], line["epochs"]) for line in lines}


def trials(storage: str = "journal:runs/question/journal.log") -> list[FrozenTrial]:
    """Return the trials in Optuna's storage."""
    is_journal = storage.startswith("journal:")
    path = storage.removeprefix("journal:")
    opened: Any = JournalStorage(JournalFileBackend(path)) if is_journal else storage
    (name,) = optuna.get_all_study_names(opened)
    return optuna.load_study(study_name=name, storage=opened).trials


def starts(folder: Path = FOLDER) -> int:
    """Return how often runs were started or resumed."""
    header = "output for 128 images"  # of the layer summary
    return sum(log.read_text().count(header) for log in folder.glob("*/fit.log"))


def command(*args: object, core: int | None = None) -> subprocess.Popen[str]:
    """Start `python study.py` as a user does, in its own process group and, if there is a choice,
    on its own core."""

    def on_core() -> None:
        if core is not None and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[core % len(cores)]})

    words = [sys.executable, str(ROOT / "study.py"), *map(str, args)]
    return subprocess.Popen(
        words, start_new_session=True, stdout=subprocess.PIPE, text=True, preexec_fn=on_core
    )


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run a study that must fail before anything is written; return its error line."""
    with pytest.raises(SystemExit) as stopped:
        study.main([str(arg) for arg in args])
    code = stopped.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err
    assert code
    assert message.startswith("error: ")
    assert len(message.strip().splitlines()) == 1
    assert not Path("runs").exists()
    return message


# ------------------------------------------------------------------------------------ the answer


def test_a_study_runs_every_setting_with_every_seed_and_answers(
    finished: tuple[Path, str], after: Callable[..., Path]
) -> None:
    out = finished[1]
    names = [f"lr={lr},seed={seed}" for lr in (0.002, 0.0001) for seed in (0, 1)]
    assert sorted(runs()) == sorted(names)
    for name in names:
        assert f"{name}: val/acc" in out
    assert "[4/4] " in out
    assert re.search(r"^\[1/4\] .*; 3 left, about [1-9]\d* min$", out, re.M)

    # the answer agrees with the runs' own files
    text = (FOLDER / "answer.md").read_text()
    for name in names:
        epochs = rows(runs()[name])
        chosen = max(epochs, key=lambda epoch: epoch["val/acc"])
        setting, seed = name.split(",seed=")
        cells = [f"{100 * chosen[key]:.2f}" for key in ("val/acc", "test/acc")]
        assert f"| {setting} | {seed} | {' | '.join(cells)} | {chosen['epoch']:.0f} |" in text
        assert table()[setting, int(seed)][1]["val/acc"] == [epoch["val/acc"] for epoch in epochs]
    assert "# Which one?\n\n```\npython study.py question.yaml\n```" in text, "no word of --jobs"
    assert "2 seeds can't show a significant difference: the smallest p" in text
    assert "`trainer.max_epochs` 2" in text, "what was fixed"
    for name in ("summary.png", "curves.png"):
        assert (FOLDER / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text


def rows(version: Path) -> list[dict[str, float]]:
    """Return the epochs of a run from its `metrics.csv`."""
    lines = (version / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    return [dict(zip(header, map(float, line.split(",")), strict=True)) for line in lines[1:]]


def test_each_run_is_one_that_train_makes(after: Callable[..., Path], run: Run) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the study's two jobs on two cores
    run("fit", "--config", BASE, "--data.batch_size", "100",
        "--model.optimizer.lr", "0.0001", "--seed_everything", "1", "--name", "alone")  # fmt: skip
    torch.set_num_threads(threads)
    last = Path("checkpoints/last.ckpt")
    alone = torch.load(Path("runs/alone/version_0") / last, weights_only=True)["state_dict"]
    ours = torch.load(runs()["lr=0.0001,seed=1"] / last, weights_only=True)["state_dict"]
    assert all(torch.allclose(alone[key], ours[key], atol=1e-4) for key in alone)
    accuracies = [epoch["val/acc"] for epoch in rows(Path("runs/alone/version_0"))]
    assert table()["lr=0.0001", 1][1]["val/acc"] == accuracies


@pytest.mark.slow
def test_adding_a_seed_runs_the_new_one_only_and_another_folder_takes_all(
    after: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (path / "model.pth").stat().st_mtime_ns for name, path in runs().items()}
    file = after(TWO, grid=GRID, seeds=[0, 1, 2])
    study.main([str(file), "--jobs", "2"])
    assert sorted(runs()) == [f"lr={lr},seed={s}" for lr in (0.0001, 0.002) for s in (0, 1, 2)]
    assert all((runs()[name] / "model.pth").stat().st_mtime_ns == t for name, t in before.items())
    assert starts() == 6
    assert len(table()) == 6
    answer = (FOLDER / "answer.md").read_text()
    capsys.readouterr()

    # elsewhere, from the record alone
    record = FOLDER.rename("kept") / "runs.jsonl"
    study.main([str(file), "--jobs", "2", "--from", str(record)])
    assert "kept/runs.jsonl: 6 runs added\n" in capsys.readouterr().out
    assert runs() == {}
    assert (FOLDER / "answer.md").read_text() == answer
    assert (FOLDER / "runs.jsonl").read_text() == record.read_text()
    study.main([str(file), "--from", str(record)])
    assert "0 runs added" in capsys.readouterr().out, "once"


def test_a_record_by_other_code_is_taken_only_if_asked_and_the_answer_says_so(
    after: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = after(TWO, grid=GRID, seeds=[0, 1])
    lines = [json.loads(line) for line in (FOLDER / "runs.jsonl").read_text().splitlines()]
    for line in lines[:1]:
        line["code"]["tests.small"] = "older"
    Path("record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(FOLDER)
    take = [str(file), "--jobs", "0", "--from", "record.jsonl"]
    study.main(take)
    said = capsys.readouterr().out
    assert (
        "record.jsonl: 3 runs added\n1 runs were made by different code (tests.small) and are left"
        in said
    )
    assert len(table()) == 3
    assert "Not all runs" not in (FOLDER / "answer.md").read_text()
    study.main([*take, "--any_code", "true"])
    assert "1 runs added" in capsys.readouterr().out
    answer = (FOLDER / "answer.md").read_text()
    assert "**Not all runs are by the same code**: it differs in tests.small." in answer
    assert len(table()) == 4
    study.main([str(file), "--jobs", "0"])
    assert len(table()) == 3, "in the same folder too"

    # nor is a run with other settings, images or packages taken
    for part, key, value in (
        ("versions", "torch", "1.0"),
        ("images", "train", "CIFAR-10"),
        ("settings", "seed_everything", 7),
    ):
        other = json.loads(json.dumps(lines[1]))
        other[part][key] = value
        Path("record.jsonl").write_text(json.dumps(other))
        shutil.rmtree(FOLDER)
        with pytest.raises(SystemExit, match="no finished run counts yet"):
            study.main(take)
    Path("record.jsonl").write_text('{"seed": 0}\n')
    with pytest.raises(SystemExit, match=r"--from record.jsonl is not a study's runs.jsonl"):
        study.main(take)


def test_a_record_is_taken_only_for_the_settings_that_it_had(
    after: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (FOLDER / "runs.jsonl").read_text().splitlines()]

    def taken(fixed: dict[str, Any], change: Callable[[Any], None], **asked: Any) -> int:
        """Return how many runs of a changed record a study takes; check its own record."""
        changed = [json.loads(json.dumps(line)) for line in lines]
        for line in changed:
            change(line["settings"])
        Path("record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        shutil.rmtree(FOLDER, ignore_errors=True)
        asked = {"grid": GRID, "seeds": [0, 1]} | asked
        file = after(TWO | fixed, **asked)
        with contextlib.suppress(SystemExit):
            study.main([str(file), "--jobs", "0", "--from", "record.jsonl"])
        match = re.search(r"record.jsonl: (\d) runs added", capsys.readouterr().out)
        assert match
        return int(match[1])

    def nothing(_settings: Any) -> None:
        """Change nothing."""

    one_batch, all_batches = (
        {"trainer.limit_train_batches": 1},
        {"trainer.limit_train_batches": 1.0},
    )
    assert taken({}, nothing) == 4
    assert taken(one_batch, lambda its: its["trainer"].update(limit_train_batches=1)) == 4
    assert taken(all_batches, lambda its: its["trainer"].update(limit_train_batches=1)) == 0
    # an argument that the record's version lacks
    assert taken({}, lambda its: its["model"].pop("label_smoothing")) == 4
    smoothing = {"model.label_smoothing": 0.1}
    assert taken(smoothing, lambda its: its["model"].pop("label_smoothing")) == 0
    # variants with other names
    variants = {"fast": {"model.optimizer.lr": 0.002}, "slow": {"model.optimizer.lr": 0.0001}}
    assert taken({}, nothing, grid={}, variants=variants) == 4
    assert {setting for setting, _ in table()} == {"fast", "slow"}


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ({"dropout": 0.1}, {"dropout": 0.1}, []),
        ({"dropout": 1}, {"dropout": 1.0}, ["dropout"]),
        ({}, {"dropout": 0}, []),
        ({}, {"dropout": 0.1}, ["dropout"]),
        ({"options": None}, {"options": {"bias": False}}, ["options.bias"]),
        ({"options": {}}, {"options": {"bias": False}}, ["options.bias"]),
        ({"widths": [8]}, {"widths": [8, 0]}, ["widths.1"]),
    ],
)
def test_settings_differ_by_all_but_arguments_that_another_version_lacks(
    before: dict[str, Any], now: dict[str, Any], changed: list[str]
) -> None:
    its, ours = ({"model": {"network": {"init_args": of}}} for of in (before, now))
    names = [f"model.network.init_args.{key}" for key in changed]
    assert [*differences(its, ours)] == [*differences(ours, its)] == names


@pytest.mark.slow
def test_a_run_by_hand_beside_one_that_has_ended_is_not_taken_for_it(
    after: Callable[..., Path],
) -> None:
    file, before = after(TWO, grid=GRID, seeds=[0, 1]), table()
    ended = runs()["lr=0.002,seed=1"]
    shutil.copytree(ended, by_hand := ended.with_name("version_1"))
    (by_hand / "model.md").unlink()
    metrics = by_hand / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    (FOLDER / "journal.log").unlink()
    study.main([str(file)])
    assert table() == before


def test_a_class_does_not_reset_its_arguments_whatever_stands_first() -> None:
    fixed = {"model.optimizer.lr": 0.05, "trainer.accelerator": "cpu"}
    grid: dict[str, Any] = {"model.optimizer": ["torch.optim.SGD", "torch.optim.Adam"]}
    for plan in check(Question("Q?", str(BASE), grid=grid, fixed=fixed)).values():
        assert plan.settings["model"]["optimizer"]["init_args"]["lr"] == 0.05


@pytest.mark.slow
def test_a_run_resumed_by_hand_with_another_rate_is_not_taken_for_the_run_of_one(
    after: Callable[..., Path], run: Run
) -> None:
    file = after(TWO, grid=GRID, seeds=[0, 1])
    before = table()
    resumed = runs()["lr=0.002,seed=1"]
    first = resumed / "checkpoints" / "epoch_00.ckpt"
    for other in ("epoch_01.ckpt", "last.ckpt"):
        (resumed / "checkpoints" / other).unlink()
    run("fit", "--ckpt_path", first, "--model.optimizer.lr", "0.0001")
    assert rows(resumed)[1]["train/loss"] != before["lr=0.002", 1][1]["train/loss"][1]
    (FOLDER / "journal.log").unlink()
    study.main([str(file), "--jobs", "2"])
    assert table() == before
    assert starts() == 5, "the other three are there"
    assert [path.name for path in FOLDER.glob("lr=0.002,seed=1/version_*")] == [
        "version_0", "version_1",
    ]  # fmt: skip


def test_a_password_is_not_written_down() -> None:
    text = "--storage postgresql://me:s3:cret@host:5432/db"
    assert without_password(text) == "--storage postgresql://me:...@host:5432/db"
    assert without_password("sqlite:////tmp/a.db") == "sqlite:////tmp/a.db"


def test_hparams_of_tensorboard_show_what_differs(after: Callable[..., Path]) -> None:
    events = EventAccumulator(str(runs()["lr=0.0001,seed=1"])).Reload()
    chosen = {key: events.Scalars(f"chosen/{key}")[-1].value for key in ("val/acc", "epoch")}
    best = max(rows(runs()["lr=0.0001,seed=1"]), key=lambda epoch: epoch["val/acc"])
    assert chosen == pytest.approx({key: best[key] for key in chosen}, abs=1e-6)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["model.optimizer.lr"].number_value == 0.0001
    assert start.hparams["seed_everything"].number_value == 1


@pytest.mark.slow
def test_a_run_that_diverges_is_reported_and_stops_nothing(
    ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = ask(CONVNET | TWO, grid={"model.optimizer.lr": [1000, 1e30, 0.002]})
    study.main([str(file), "--jobs", "2"])
    out = capsys.readouterr().out
    assert re.search(r"lr=1000,seed=0: diverged: train/loss \S+ in epoch 1", out)
    assert re.search(r"lr=1e\+30,seed=0: diverged in epoch 0, step \d+: .* is NaN or inf", out)
    assert "lr=0.002,seed=0: val/acc" in out
    ended = {setting: how for (setting, _), (how, _) in table().items()}
    assert ended.pop("lr=0.002") == ""
    assert all(how.startswith("diverged") for how in ended.values())
    text = (FOLDER / "answer.md").read_text()
    assert "lr=1000: 1 diverged." in text
    assert "| 1000 | 0 (1 diverged) | - |" in text


@pytest.mark.slow
def test_a_run_that_fails_stops_nothing_and_is_tried_again(
    ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {
        "fails": {"model.network": {"class_path": "tests.small.Fails"}},
        "dies [red]": {"model.network": {"class_path": "tests.small.Dies"}},
    }
    file = ask(variants=variants)
    Path("fail").touch()
    with pytest.raises(SystemExit, match="no finished run counts yet"):
        study.main([str(file), "--jobs", "2"])
    out = capsys.readouterr().out
    assert "fails,seed=0: failed: RuntimeError: out of luck, see runs/question/fails" in out
    assert re.search(r"dies\S+,seed=0: failed: exit code -9", out)
    Path("fail").unlink()
    with pytest.raises(SystemExit, match="1 failed"):
        study.main([str(file), "--jobs", "2"])
    assert [setting for setting, _ in table()] == ["fails"]
    assert "dies [red]" in capsys.readouterr().out, "names are no markup"


@pytest.mark.slow
def test_a_search_picks_settings_prunes_and_gives_each_all_seeds(
    ask: Callable[..., Path],
) -> None:
    search = {
        "model.optimizer.lr": {"low": 1e-6, "high": 1e-2, "log": True},
        "data.batch_size": [100, 200],
    }
    pruner = {
        "class_path": "optuna.pruners.ThresholdPruner",
        "init_args": {"lower": 0.3, "n_warmup_steps": 1},
    }
    sampler = {"class_path": "optuna.samplers.RandomSampler", "init_args": {"seed": 0}}
    waits = {"trainer.callbacks": [{"class_path": "tests.small.Slow"}]}
    asked = {"search": search, "trials": 3, "seeds": [0, 1], "sampler": sampler, "pruner": pruner}
    file = ask(CONVNET | waits | {"trainer.max_epochs": 4}, **asked)
    study.main([str(file), "--jobs", "2"])
    done = [trial for trial in trials() if "record" in trial.user_attrs]
    first = [trial for trial in done if trial.user_attrs["seed"] == 0]
    assert len(first) == 3
    assert all(1e-6 <= trial.params["model.optimizer.lr"] <= 1e-2 for trial in first)
    for trial in first:
        flags = trial.user_attrs["flags"]
        again = [t.user_attrs["seed"] for t in done if t.user_attrs["flags"] == flags]
        assert again == ([0] if trial.state == TrialState.PRUNED else [0, 1])
        epochs = trial.user_attrs["record"]["epochs"]
        assert (trial.state == TrialState.PRUNED) == (min(epochs["val/acc"][1:]) < 0.3)
        assert trial.state == TrialState.PRUNED or len(epochs["epoch"]) == 4
    assert {trial.state for trial in first} == {TrialState.PRUNED, TrialState.COMPLETE}

    # in another folder its settings are known
    before = table()
    record = FOLDER.rename("kept") / "runs.jsonl"
    study.main([str(file), "--jobs", "2", "--from", str(record)])
    assert table() == before
    assert runs() == {}


@pytest.mark.slow
def test_a_search_resumes_with_what_it_picked_and_ends_when_all_is_picked(
    ask: Callable[..., Path],
) -> None:
    search = {"data.batch_size": [100, 200]}
    network = {"model.network": {"class_path": "tests.small.Fails"}}
    file = ask(network, search=search, trials=9)
    Path("fail").touch()
    with pytest.raises(SystemExit, match="no finished run counts yet"):
        study.main([str(file), "--jobs", "2"])
    Path("fail").unlink()
    study.main([str(file), "--jobs", "2"])
    assert sorted(setting for setting, _ in table()) == ["batch_size=100", "batch_size=200"]
    assert len([trial for trial in trials() if trial.state == TrialState.COMPLETE]) == 2


def test_a_search_picks_every_setting_that_it_is_asked_for_and_none_twice(tmp_path: Path) -> None:
    search: Any = {"data.batch_size": [1, 2, 3, 4, 5], "model.label_smoothing": [0, 1, 2, 3, 4]}
    question = Question("Q?", str(BASE), search=search, trials=30, seeds=[0])
    queue = Queue(question, {}, tmp_path / "runs", None, False)
    picked = []
    while trial := queue.take():  # the sampler has a favourite
        picked.append(trial.user_attrs["flags"])
        queue.study.tell(trial, float(trial.params["data.batch_size"] == 3))
    assert len({json.dumps(flags) for flags in picked}) == len(picked) == 25


class BrokenPruner(optuna.pruners.BasePruner):
    """Fails when it is asked."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Fail."""
        raise RuntimeError("out of order")


@pytest.mark.slow
def test_a_mistake_in_a_pruner_has_its_traceback_and_leaves_no_run_behind(
    ask: Callable[..., Path],
) -> None:
    waits = {"trainer.callbacks": [{"class_path": "tests.small.Slow"}], "trainer.max_epochs": 50}
    file = ask(waits, variants={"one": {}}, pruner="tests.test_study.BrokenPruner")
    with pytest.raises(RuntimeError, match="out of order"):
        study.main([str(file)])
    time.sleep(5)
    assert len(rows(runs()["one,seed=0"])) < 10
    with FileLock(runs()["one,seed=0"] / ".lock", timeout=0):
        pass


def test_another_value_beside_a_pruner_leaves_the_runs_that_were_done(tmp_path: Path) -> None:
    pruner, lr = optuna.pruners.MedianPruner(), "model.optimizer.lr"
    before = Question("Q?", str(BASE), grid={lr: [0.1]}, seeds=[0], pruner=pruner)
    after = Question("Q?", str(BASE), grid={lr: [0.1, 0.2]}, seeds=[0], pruner=pruner)
    queue = Queue(before, {"lr=0.1": Plan({lr: 0.1}, {}, "cpu")}, tmp_path / "runs", None, False)
    trial = queue.take()
    assert trial
    queue.study.tell(trial, 0.5)
    plans = {f"lr={of}": Plan({lr: of}, {}, "cpu") for of in (0.1, 0.2)}
    then = Queue(after, plans, tmp_path / "runs", None, False).take()
    assert then
    assert then.user_attrs["flags"] == {lr: 0.2}

    # from another recipe, the pruner would learn what doesn't hold for this one
    (tmp_path / "recipe.yaml").write_text("model: {label_smoothing: 0.1}")
    other = replace(after, config=[str(BASE), str(tmp_path / "recipe.yaml")])
    for smoothing in (0.1, 0.2):
        (tmp_path / "recipe.yaml").write_text(f"model: {{label_smoothing: {smoothing}}}")
        trial = Queue(other, plans, tmp_path / "runs", None, False).take()
        assert trial
        assert trial.user_attrs["flags"] == {lr: 0.1}


@pytest.mark.slow
def test_what_a_result_depends_on_tells_settings_apart(
    ask: Callable[..., Path], arrays: Path, tmp_path: Path
) -> None:
    """Images, custom networks and their code."""
    shutil.copytree(arrays, tmp_path / "noisy")
    labels = tmp_path / "noisy" / "cifar-10-arrays" / "train_labels.npy"
    np.save(labels, np.random.default_rng(0).permutation(np.load(labels)))
    network = "from tests.small import Small\n\n\nclass Mine(Small):\n    pass\n"
    Path("mynet.py").write_text(network)
    grid = {
        "data.root": [str(arrays), "noisy"],
        "model.network": ["mynet.Mine", "tests.small.Flat"],
    }
    file = ask(grid=grid)
    study.main([str(file), "--jobs", "2"])
    losses = [str(epochs["train/loss"]) for _, epochs in table().values()]
    assert len(set(losses)) == 4
    codes = [json.loads(line)["code"] for line in (FOLDER / "runs.jsonl").read_text().splitlines()]
    assert ["mynet" in code for code in codes] == [True, False, True, False]
    assert all("tests.small" in code for code in codes)

    # changed code restarts its runs, and only those
    Path("mynet.py").write_text(network.replace("pass", "changed = True"))
    said = command(file, "--jobs", "2").communicate()[0]
    assert "2 runs were made by different code (mynet) and restart" in said
    assert starts() == 4 + 2, "mynet's"
    Path("mynet.py").write_text(network)
    said = command(file, "--jobs", "2").communicate()[0]
    assert starts() == 6, "those of before are there"


@pytest.mark.slow
def test_each_seed_can_have_a_split_of_its_own(ask: Callable[..., Path]) -> None:
    study.main([str(ask(variants={"one": {}}, seeds=[0, 3], vary=["seed", "split"]))])
    splits = [yaml.safe_load((path / "config.yaml").read_text())["data"]["split_seed"]
              for path in runs().values()]  # fmt: skip
    assert splits == [0, 3]
    assert "Each seed has its own split" in (FOLDER / "answer.md").read_text()


@pytest.mark.slow
def test_every_published_answer_follows_from_its_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    records = sorted((ROOT / "docs" / "studies").glob("*/runs.jsonl"))
    assert records
    for record in records:
        name = record.parent.name
        study.main([f"configs/studies/{name}.yaml", "--from", str(record), "--any_code", "true",
                    "--jobs", "0"])  # fmt: skip
        made = (tmp_path / "runs" / name / "answer.md").read_text()
        assert made == (record.parent / "answer.md").read_text(), name


# ----------------------------------------------------------------------- stopped, shared, resumed


def killed_after_an_epoch(file: Path, epoch: int, whole: bool) -> None:
    """Start a study and kill it, with its runs or without, once one of its two runs has finished
    `epoch`; the runs wait in the next one."""
    Path("wait_in").write_text(f"{epoch + 1}")
    process, deadline = command(file, "--jobs", 2), time.monotonic() + 120
    while time.monotonic() < deadline:
        logs = [log.read_text() for log in FOLDER.glob("*/fit.log")]
        if len(logs) == 2 and any(re.search(rf"^ +{epoch} ", log, re.M) for log in logs):
            break
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL) if whole else process.kill()
    assert not (FOLDER / "answer.md").exists()
    assert not any((path / "model.pth").exists() for path in runs().values()), "killed too late"


@pytest.mark.slow
def test_killed_in_an_epoch_and_started_again_it_answers_the_same(
    ask: Callable[..., Path],
) -> None:
    augment = {"data.augment": [{"class_path": "cifar10.augment.RandomFlip"}]}
    waits = {"trainer.callbacks": [{"class_path": "tests.small.Waits"}]}
    file = ask(
        CONVNET | waits | {"trainer.max_epochs": 6}, variants={"plain": {}, "flipped": augment}
    )
    killed_after_an_epoch(file, epoch=1, whole=True)
    killed_after_an_epoch(file, epoch=3, whole=False)
    Path("wait_in").unlink()  # the surviving runs end; the study waits for them
    study.main([str(file), "--jobs", "2"])
    broken = table()
    logs = [log.read_text() for log in FOLDER.glob("*/fit.log")]
    assert all(log.count("\n    0 ") == 1 for log in logs), "no run began from its start again"
    assert all(log.count("\n    5 ") == 1 for log in logs), "nor was one done twice"
    shutil.rmtree("runs")
    study.main([str(file), "--jobs", "2"])
    assert table() == broken


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_its_runs_to_the_next(
    ask: Callable[..., Path], number: signal.Signals
) -> None:
    waits = {"trainer.callbacks": [{"class_path": "tests.small.Waits"}]}
    file = ask(CONVNET | waits | TWO, variants={"one": {}})
    Path("wait_in").write_text("1")
    process = command(file)
    while not Path("waits").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    time.sleep(2)
    Path("wait_in").unlink()  # a run stops after its batch
    process.communicate()
    assert process.returncode == 128 + number
    assert [trial.state for trial in trials()] == [TrialState.FAIL]
    study.main([str(file), "--jobs", "2"])
    assert len(table()["one", 0][1]["epoch"]) == 2
    assert (FOLDER / "one,seed=0" / "fit.log").read_text().count("\n    0 ") == 1


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_another_run(
    after: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"ID": "7", "NTASKS": "4", "NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{'JOB_' * (name != 'NTASKS')}{name}", value)
    file = after({"trainer.max_epochs": 1}, grid={"model.optimizer.lr": [0.002, "2e-3"]})
    study.main([str(file)])
    said = capsys.readouterr().out
    assert "have different settings (trainer.max_epochs) and restart" in said
    assert "1 runs in runs/question: 0 done, 1 to do" in said
    assert "[1/1] lr=0.002,seed=0" in said, "it is one setting"
    assert "There is one setting only" in said
    assert len(list((FOLDER / "lr=0.002,seed=0").glob("version_*"))) == 2
    assert [len(epochs["epoch"]) for _, epochs in table().values()] == [1]


def shared(ask: Callable[..., Path], storage: str) -> Path:
    """Start one study twice at once, and assert that every run was done exactly once."""
    meets = {"trainer.callbacks": [{"class_path": "tests.small.Meets"}]}
    fixed = CONVNET | meets | {"trainer.max_epochs": 4}
    file = ask(fixed, grid={"data.batch_size": [100, 200]}, seeds=[0, 1])
    both = [command(file, "--storage", storage, core=core) for core in range(2)]
    outs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    done = [t for t in trials(storage) if t.state == TrialState.COMPLETE]
    keys = [(json.dumps(t.user_attrs["flags"]), t.user_attrs["seed"]) for t in done]
    assert len(keys) == len(set(keys)) == 4
    assert starts() == 4
    assert len({trial.user_attrs["worker"] for trial in done}) == 2, "both took part"
    answers = [out[out.index("Which one?") :] for out in outs]
    assert answers[0] == answers[1]
    return file


@pytest.mark.slow
def test_two_processes_share_a_study_in_a_journal(ask: Callable[..., Path]) -> None:
    shared(ask, "journal:shared.log")


@pytest.mark.slow
def test_the_run_of_a_killed_worker_is_finished_by_the_other(ask: Callable[..., Path]) -> None:
    waits = {"trainer.callbacks": [{"class_path": "tests.small.Waits"}]}
    file = ask(CONVNET | waits | TWO, grid={"data.batch_size": [100, 200]})
    Path("wait_in").write_text("1")
    both = [command(file, core=core) for core in range(2)]
    deadline = time.monotonic() + 120
    while sum("\n    0 " in log.read_text() for log in FOLDER.glob("*/fit.log")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(both[0].pid, signal.SIGKILL)
    Path("wait_in").unlink()
    both[1].communicate()
    assert both[1].returncode == 0
    assert [len(epochs["epoch"]) for _, epochs in table().values()] == [2, 2]
    logs = [log.read_text() for log in FOLDER.glob("*/fit.log")]
    assert all(log.count("\n    0 ") == 1 for log in logs), "from its last checkpoint"
    assert starts() == 3


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server for the test session."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    if initdb is None:
        pytest.skip("needs PostgreSQL (Debian's package postgresql)")
    # PostgreSQL refuses to run as root.
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    folder = tmp_path_factory.mktemp("postgres")
    if user:
        shutil.chown(folder, "postgres")
        for parent in list(folder.parents)[:3]:
            parent.chmod(parent.stat().st_mode | 0o011)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    data, bin_ = folder / "data", Path(initdb).parent
    subprocess.run([*user, initdb, "-D", data, "-U", "study", "-A", "trust"], **quiet)  # type: ignore[call-overload]
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    control = [*user, str(bin_ / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log")]
    subprocess.run([*control, "-o", options, "start"], **quiet)  # type: ignore[call-overload]
    yield f"postgresql+psycopg2://study@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], **quiet)  # type: ignore[call-overload]


@pytest.mark.slow
def test_two_processes_share_a_study_in_postgresql(ask: Callable[..., Path], postgres: str) -> None:
    shared(ask, postgres)


# ----------------------------------------------------------------- refused before anything runs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": {"data.batchsize": [1]}}, "unknown option data.batchsize: did you mean"),
        ({"grid": {"data.batch_size": [100, "many"]}}, "data.batch_size"),
        ({"grid": {"model.network.dense_unit": [80]}, "fixed": CONVNET}, "dense_units?"),
        ({"variants": {"a": {}, "b": {"model.optimizer.lr": "fast"}}}, "lr"),
        ({"search": {"model.optimizer.lr": {"low": 1, "high": 0}}}, "search.model.optimizer.lr"),
        ({"search": {"data.batch_size": {"low": 100, "hihg": 200}}}, "hihg: did you mean high"),
        ({}, "a study needs exactly one of grid, variants and search"),
        ({"grid": {"seed_everything": [1]}}, "seed_everything is set by the study: use seeds"),
        ({"grid": {"trainer.max_epochs": [1]}, "choose": "test/acc"}, "never by the test set"),
        ({"grid": {"trainer.max_epochs": [1]}, "sedes": [1]}, "sedes: did you mean seeds"),
        ({"grid": {"trainer.max_epochs": [1]}, "seeds": [1, 1]}, "seeds"),
        ({"grid": {"data.augment": []}}, "no values"),
        ({"variants": {"a": {}, "b": {}}}, "a and b are the same setting"),
        ({"variants": {"a": {}, True: {"data.batch_size": 1}}}, "quote it"),
        (
            {"grid": {"data.batch_size": [1]}, "pruner": "optuna.pruners.ThresholdPruner"},
            "ThresholdPruner",
        ),
        ({"grid": {"data.split_seed": [0, 1]}, "vary": ["seed", "split"]}, "use vary"),
        ({"variants": {"a": {}}, "vary": ["split"]}, "vary"),
        ({"variants": {"a": {}}, "baseline": "c"}, "baseline c is not a variant: name one of a"),
        (
            {"variants": {"a b": {}, "a_b": {"data.batch_size": 50}}},
            "two names differ only in spaces",
        ),
        ({"grid": {"data.batch_size": [1]}, "baseline": "batch_size=1"}, "has no variants"),
        ({"search": {"data.batch_size": []}}, "no values"),
        ({"search": {"data.batch_size": {"low": 1, "high": 9, "step": 0.5}}}, "step 0.5"),
        (
            {"search": {"data.batch_size": [1]}, "sampler": "optuna.samplers.BruteForceSampler"},
            "use grid",
        ),
        ({"variants": {"a": {"checkpoint": {"monitor": "train/acc"}}}}, "the study controls"),
        ({"grid": {"trainer.max_epoch": [1]}}, "did you mean trainer.max_epochs?"),
        ({"variants": {"a": {"trainer": {"max_epochs": 3}}}}, "by their dotted names"),
        ({"grid": {"trainer.max_epochs": [-1]}}, "trainer.max_epochs must be a number"),
        ({"grid": {"trainer.max_epochs": [1]}, "config": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    ask: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    message: str,
) -> None:
    assert message in fails(capsys, ask(**settings))


def test_wrong_calls_are_refused_in_one_line(
    ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = ask(grid={"data.batch_size": [100]})
    assert "nowhere.yaml" in fails(capsys, "nowhere.yaml")
    assert "name the study's file" in fails(capsys)
    assert "jobs" in fails(capsys, file, "--jobs", "-1")
    assert "did you mean jobs?" in fails(capsys, file, "--job", "2")
    assert "put flags of fit under fixed" in fails(capsys, file, "--trainer.max_epochs", "2")
    assert "--from nowhere.jsonl: No such file" in fails(capsys, file, "--from", "nowhere.jsonl")
    assert "base.yaml is not a study: it has no `question`" in fails(capsys, BASE)


def test_a_storage_that_cannot_be_opened_is_refused_in_one_line(
    ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = ask(grid={"data.batch_size": [100]})
    for url in ("nonsense://x", "sqlite:///a.db", "journal:a/b/c.log", "no url at all"):
        with pytest.raises(SystemExit, match=f"^error: storage {url}: ") as stopped:
            study.main([str(file), "--storage", url])
        assert "\n" not in str(stopped.value.code)


def test_the_answer_so_far_runs_nothing_and_leaves_nothing(after: Callable[..., Path]) -> None:
    file = after(TWO, grid=GRID, seeds=[0])
    study.main(["--jobs", "0", str(file)])
    assert starts() == 4
    assert list(table()) == [("lr=0.002", 0), ("lr=0.0001", 0)]
    with pytest.raises(SystemExit, match="no finished run counts yet"):
        study.main(["--folder=runs/b", "--jobs", "0", str(file)])
    assert not Path("runs/b").exists()


@pytest.mark.slow
def test_every_study_of_the_project_can_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    files = sorted(Path("configs/studies").glob("*.yaml"))
    assert [file.stem for file in files] == [
        "airbench94", "batch_size", "epochs", "improved", "improved_full", "learning_curve",
        "learning_curve_improved", "learning_rate", "regularisation", "remedies", "softmax",
    ]  # fmt: skip
    for file in files:
        with pytest.raises(SystemExit, match="no finished run counts yet"):
            study.main([str(file), "--jobs", "0"])


# ------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("visible", "count", "jobs", "expected"),
    [
        (None, 0, 3, [(None, 2), (None, 2), (None, 2)]),
        (None, 0, 1, [(None, 6)]),
        (None, 2, 2, [("0", 3), ("1", 3)]),
        (None, 2, 3, [("0", 2), ("1", 2), ("0", 2)]),
        ("4,5,7", 3, 2, [("4", 3), ("5", 3)]),
    ],
)
def test_each_job_has_its_share_of_cores_or_gpus(
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    count: int,
    jobs: int,
    expected: list[tuple[str | None, int]],
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert shares(jobs) == expected


# -------------------------------------------------------------------------------- statistics


def answer(
    values: dict[str, list[float]],
    levels: dict[str, dict[str, str]] | None = None,
    ended: dict[str, str] | None = None,
    epochs: int = 3,
    **asked: Any,
) -> Answer:
    """Return the answer to runs of three epochs, the second of which is the best."""
    records = {}
    for setting, of_seed in values.items():
        for seed, value in enumerate(of_seed):
            count = epochs if setting == next(iter(values)) else 3
            columns: dict[str, list[float]] = {
                "epoch": list(range(count)), "train/loss": [1.0] * count,
                "val/loss": [2.0 - value] * count,
                "val/acc": [value - abs(epoch - 1) / 10 for epoch in range(count)],
                "test/acc": [value / 2] * count, "seconds": [2.0] * count,
            }  # fmt: skip
            trainer = dict.fromkeys(LIMITS) | {"limit_train_batches": None}
            settings = {"trainer": trainer, "data": {"split_seed": 0, "val_size": 200}}
            made_by = {"code": {}, "versions": {}, "machine": "a machine", "settings": settings}
            why = (ended or {}).get(f"{setting}_{seed}", "")
            record = {"seed": seed, "ended": why, "epochs": columns, **made_by}
            records[setting, seed] = record
    question = Question("Q?", "base.yaml", **asked)
    return Answer(question, "c", levels or {name: {"": name} for name in values}, records)


def test_means_have_the_interval_of_student_t() -> None:
    a = [0.5, 0.53, 0.58]
    low, high = stats.t.interval(0.95, 2, loc=sum(a) / 3, scale=stats.sem(a))
    columns = answer({"a": a}).columns()
    assert columns["val/acc, %"] == [f"{100 * sum(a) / 3:.2f} ± {50 * (high - low):.2f}"]
    assert columns["test/acc, %"] == [f"{50 * sum(a) / 3:.2f} ± {25 * (high - low):.2f}"]
    assert (columns["best epoch"], columns["seconds"]) == (["1.0 ± 0.0"], ["6 ± 0"])
    assert answer({"a": [0.5]}).columns()["val/acc, %"] == ["50.00"]


def test_folders_of_runs_have_names_of_their_own() -> None:
    names = {"a/b": {"data.batch_size": 1}, "a|b": {"data.batch_size": 2}, "x" * 300: {}}
    question = Question("Q?", "base.yaml", variants=names)
    folders = {question.folder_of(flags, 0) for flags in names.values()}
    assert len(folders) == 3
    assert all(len(name) < 120 and re.fullmatch(r"[\w.,=+-]+,seed=0", name) for name in folders)
    assert Question("Q?", "c", variants={"weight decay": {}}).folder_of({}, 3) == (
        "weight_decay,seed=3"
    )


@pytest.mark.parametrize("seeds", range(3, 9))
def test_p_of_one_comparison_is_that_of_scipy(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    for shift in (0.0, 0.5, 3.0):
        gains = rng.normal(shift, 1, seeds)
        reference = stats.permutation_test(
            (gains,), np.mean, permutation_type="samples", alternative="two-sided"
        )
        assert corrected_p(gains[:, None])[0] == pytest.approx(reference.pvalue)
    assert corrected_p(np.ones((seeds, 1)))[0] == smallest_p(seeds)
    assert corrected_p(np.zeros((seeds, 1)))[0] == 1


def test_six_seeds_suffice_however_many_comparisons_there_are() -> None:
    noise = np.random.default_rng(0).normal(size=(6, 16))
    noise[:, 3] += 100
    gains = np.stack([noise[:, j] - noise[:, i] for i in range(16) for j in range(i)], axis=1)
    p = corrected_p(gains)
    assert p.min() == smallest_p(6) == 1 / 32
    assert (p < 0.05).sum() == 15, "the one that differs, from all others"
    lacks_a_seed = gains.copy()
    lacks_a_seed[0, 0] = np.nan
    assert corrected_p(lacks_a_seed)[0] >= smallest_p(5)


@pytest.mark.parametrize("shift", [0.0, 2.0, 30.0])
@pytest.mark.parametrize("seeds", [6, 8])
def test_at_most_one_study_in_twenty_finds_a_difference_that_is_not_there(
    shift: float, seeds: int
) -> None:
    rng, studies, false, found = np.random.default_rng(1), 600, 0, 0
    pairs = [(i, j) for j in range(5) for i in range(j)]
    for _ in range(studies):
        values = rng.normal(size=(seeds, 5)) * [1, 1, 2, 0.5, 1] + rng.normal(size=(seeds, 1))
        values[:, 4] += shift  # one level that differs, or none
        p = corrected_p(np.stack([values[:, j] - values[:, i] for i, j in pairs], axis=1))
        is_real = np.array([4 in pair and shift > 0 for pair in pairs])
        false += (p[~is_real] < 0.05).any()
        found += (p[is_real] < 0.05).any()
    assert false <= 0.05 * studies
    assert found == (studies if shift == 30 else found)


def test_the_difference_that_would_be_found_is_found_in_four_studies_of_five() -> None:
    rng, names, size = np.random.default_rng(2), list("abcd"), list[float]()
    for _ in range(12):
        values = 0.6 + rng.normal(0, 0.01, (4, 6))
        columns = answer(dict(zip(names, values.tolist(), strict=True))).compared_columns()
        assert columns["compared"][2] == "d - a"
        size.append(float(columns["80 % power at, points"][2]) / 100)
    mean, found = float(np.mean(size)), 0  # each by the spread of its own six seeds
    for _ in range(300):
        values = rng.normal(0, 0.01, (4, 6))
        values[3] += mean
        gains = [values[j] - values[i] for i in range(4) for j in range(i + 1, 4)]
        found += corrected_p(np.stack(gains, axis=1))[2] < 0.05
    assert 0.7 < found / 300 < 0.9
    columns = answer({"a": [0.5] * 5, "b": [0.6, 0.7, 0.6, 0.7, 0.6]}).compared_columns()
    assert columns["80 % power at, points"] == ["-"], "five seeds find nothing"


def test_the_verdict_says_what_the_table_says() -> None:
    clear = {"a": [0.50, 0.60, 0.70, 0.5, 0.6, 0.7], "b": [0.601, 0.70, 0.80, 0.6, 0.7, 0.8],
             "c": [0.599, 0.701, 0.802, 0.6, 0.7, 0.81]}  # fmt: skip
    found = answer(clear)
    assert found.conclusion()[0] == (
        "Best: c (70.20 %); significantly worse: a (-10.20 ± 0.42); no significant difference: "
        "b (-0.18 ± 0.44)."
    )
    assert found.compared_columns()["significant"] == ["better", "better", "no"]
    few = answer({"a": [0.5, 0.5, 0.5], "b": [0.6, 0.7, 0.6]}).conclusion()
    assert few[0] == "Best: b (63.33 %); no significant difference: a (-13.33 ± 14.34)."
    assert few[1] == (
        "3 seeds can't show a significant difference: the smallest p that they can reach is 0.25; "
        "it takes 6 seeds."
    )
    assert answer({"a": [0.5], "b": [0.6]}).conclusion() == ["Too few runs to compare."]
    same = {"a": clear["a"], "b": clear["a"]}
    assert answer(same).conclusion()[0].startswith("Best: a (60.00 %); no significant difference")
    with_base = answer(clear, variants={"a": {}, "b": {}, "c": {}}, baseline="a")
    assert {(d.one, d.other) for d in with_base.differences} == {("a", "b"), ("a", "c")}
    assert with_base.conclusion()[0] == (
        "Baseline: a (60.00 %); significantly better: b (+10.02 ± 0.04), c (+10.20 ± 0.42)."
    )


def test_a_diverged_run_is_in_no_mean_and_in_no_pair_and_its_setting_does_not_lead() -> None:
    values = {"a": [0.5, 0.6, 0.7, 0.6], "b": [0.61, 0.7, 0.82, 0.1], "c": [0.4, 0.51, 0.6, 0.5]}
    found = answer(values, ended={"b_3": "diverged: at once"})
    assert {(d.one, d.other): d.mean.count for d in found.differences} == {
        ("a", "b"): 3, ("a", "c"): 4, ("b", "c"): 3,
    }  # fmt: skip
    assert found.columns()["runs"][1] == "3 (1 diverged)"
    assert found.columns()["val/acc, %"][1].startswith("71.00 ± ")
    assert found.conclusion()[0].startswith("Best: a (60.00 %)")
    assert "b: 1 diverged." in found.conclusion()
    found = answer({"a": values["a"], "b": values["b"]}, ended={"b_3": "diverged: at once"})
    assert (
        found.conclusion()[0] == "Best: a (60.00 %); no significant difference: b (+11.00 ± 2.48)."
    )


def test_settings_that_lost_different_seeds_are_ranked_by_the_seeds_of_both() -> None:
    # b is better in every pair, but lost a seed that is good for all
    values = {"a": [0.50, 0.51, 0.52, 0.90, 0.50], "b": [0.53, 0.54, 0.55, 0.93, 0.53]}
    found = answer(values, ended={"a_0": "diverged", "b_3": "diverged"})
    means = [float(cell.split(" ")[0]) for cell in found.columns()["val/acc, %"]]
    assert means[0] > means[1]
    assert found.conclusion()[0].startswith("Best: b (")
    assert found.differences[0].mean.value == pytest.approx(0.03)


def test_a_setting_whose_runs_are_still_to_come_can_be_the_best() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.61, 0.7], "c": [0.4, 0.5, 0.6], "d": []}
    assert answer(values).conclusion()[0].startswith("Best: b (65.50 %)")


def test_the_best_of_more_epochs_is_not_taken_at_its_word() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.61, 0.7, 0.82]}
    assert "more epochs" not in str(answer(values).conclusion())
    assert "Some runs have more epochs" in str(answer(values, epochs=5).conclusion())


def test_a_search_says_that_the_best_looks_better_than_it_is() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.61], "c": [0.52, 0.63, 0.72]}
    found = answer(values, search={"x": [1]})
    assert found.ranked() == ["c", "a", "b"], "b has too few runs to lead"
    assert "The best of 3 settings looks better by val/acc" in found.conclusion()[-1]


def test_factors_of_a_grid_are_compared_over_the_levels_of_the_others() -> None:
    levels = {f"{x}{y}": {"x": x, "y": y} for x in "pq" for y in "rs"}
    rng = np.random.default_rng(0)
    values = {name: (0.6 + rng.normal(0, 0.01, 6)).tolist() for name in levels}
    for name in ("qr", "qs"):
        values[name] = [value + 0.1 for value in values[name]]
    by_x, by_y = answer(values, levels).differences
    gains = [
        (values["qr"][i] + values["qs"][i] - values["pr"][i] - values["ps"][i]) / 2
        for i in range(6)
    ]
    assert (by_x.factor, by_x.one, by_x.other) == ("x", "p", "q")
    assert by_x.gains == pytest.approx(gains)
    assert by_x.p < 0.05 < by_y.p
    lines = answer(values, levels).conclusion()
    assert lines[0].startswith("Best x: q (")
    assert "significantly worse: p (-" in lines[0]
    assert re.match(r"Best y: [rs] .*; no significant difference: [rs] ", lines[1])


def test_a_loss_chooses_the_lowest() -> None:
    found = answer({"a": [0.5, 0.6, 0.6], "b": [0.7, 0.81, 0.8]}, choose="val/loss")
    assert [cell[:6] for cell in found.columns()["val/loss"]] == ["1.4333", "1.2300"]
    assert found.conclusion()[0].startswith("Best: b (1.2300); no significant difference: a (+0.2")
