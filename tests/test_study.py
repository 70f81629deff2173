"""Studies: many runs, one answer; stopped, shared, extended."""

import contextlib
import csv
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
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import study
from studies.answer import Answer, Outcome
from studies.question import Question
from studies.record import without_password
from tests.conftest import BASE, Run

ROOT = Path(__file__).parents[1]
FOLDER = Path("runs/question")


@pytest.fixture
def ask(arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a study of the small data set in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return asking(arrays)


def asking(arrays: Path) -> Callable[..., Path]:
    """Return what writes a study of the small data set, here."""

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
    """A folder with a finished study of two settings and two seeds, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        study.main([str(asking(arrays)(TWO, grid=GRID, seeds=[0, 1])), "--jobs", "2"])
    return folder, printed.getvalue()


@pytest.fixture
def after(
    finished: tuple[Path, str], tmp_path: Path, ask: Callable[..., Path]
) -> Callable[..., Path]:
    """Be where that study was run, in a copy, and write another."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return ask


def runs(folder: Path = FOLDER) -> dict[str, Path]:
    """Return the folders of the runs by name."""
    return {path.parent.name: path for path in sorted(folder.glob("*/version_*"))}


def table(folder: Path = FOLDER) -> list[dict[str, str]]:
    """Return the table of the answer, without what is measured in seconds."""
    with (folder / "answer.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def record(storage: str = "sqlite:///runs/question/study.db") -> list[Any]:
    return optuna.load_study(study_name="question", storage=storage).trials


def starts(folder: Path = FOLDER) -> int:
    """Return how often a run was begun or gone on with."""
    header = "output for 128 images"  # of the table of layers
    return sum(log.read_text().count(header) for log in folder.glob("*/fit.log"))


def command(*args: object, core: int | None = None) -> subprocess.Popen[str]:
    """Start `python study.py` as a user does, with all that it starts in a group of its own; on a
    core of its own, if there is a choice."""

    def on_core() -> None:
        if core is not None and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[core % len(cores)]})

    words = [sys.executable, str(ROOT / "study.py"), *map(str, args)]
    return subprocess.Popen(
        words, start_new_session=True, stdout=subprocess.PIPE, text=True, preexec_fn=on_core
    )


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run a study that must fail before anything is written; return its one line."""
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

    # the table says what the runs' own files say
    for row, lr in zip(table(), (0.002, 0.0001), strict=True):
        chosen = []
        for seed in (0, 1):
            with (runs()[f"lr={lr},seed={seed}"] / "metrics.csv").open() as metrics:
                epochs = [{k: float(v) for k, v in e.items()} for e in csv.DictReader(metrics)]
            chosen.append(max(epochs, key=lambda epoch: epoch["val/acc"]))
        for key in ("val/acc", "test/acc", "epoch"):
            values = [epoch[key] for epoch in chosen]
            assert float(row[key]) == pytest.approx(sum(values) / 2, abs=1e-6)
    answer = (FOLDER / "answer.md").read_text()
    assert "# Which one?" in answer
    assert "python study.py question.yaml --jobs 2" in answer
    for name in ("summary.png", "curves.png"):
        assert (FOLDER / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in answer


def test_each_run_is_one_that_train_makes(after: Callable[..., Path], run: Run) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the study's two jobs had, where there are two cores
    run("fit", "--config", BASE, "--data.batch_size", "100",
        "--model.optimizer.lr", "0.0001", "--seed_everything", "1", "--name", "alone")  # fmt: skip
    torch.set_num_threads(threads)
    last = Path("checkpoints/last.ckpt")
    alone = torch.load(Path("runs/alone/version_0") / last, weights_only=True)["state_dict"]
    ours = torch.load(runs()["lr=0.0001,seed=1"] / last, weights_only=True)["state_dict"]
    assert all(torch.allclose(alone[key], ours[key], atol=1e-4) for key in alone)
    assert table_of_run(Path("runs/alone/version_0")) == table_of_run(runs()["lr=0.0001,seed=1"])


def table_of_run(version: Path) -> list[str]:
    """Return the validation accuracies of a run."""
    with (version / "metrics.csv").open() as metrics:
        return [row["val/acc"] for row in csv.DictReader(metrics)]


def test_adding_a_seed_runs_the_new_one_only(after: Callable[..., Path]) -> None:
    before = {name: (path / "model.pth").stat().st_mtime_ns for name, path in runs().items()}
    assert starts() == 4
    study.main([str(after(TWO, grid=GRID, seeds=[0, 1, 2])), "--jobs", "2"])
    assert sorted(runs()) == [f"lr={lr},seed={s}" for lr in (0.0001, 0.002) for s in (0, 1, 2)]
    assert all((runs()[name] / "model.pth").stat().st_mtime_ns == t for name, t in before.items())
    assert starts() == 6
    assert [row["seeds"] for row in table()] == ["3", "3"]


def test_a_run_that_another_study_has_done_is_taken_from_there(
    after: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # one of the runs there was stopped before its last epoch: it is none to take
    stopped = runs()["lr=0.002,seed=1"]
    for name in ("epoch_01.ckpt", "last.ckpt"):
        (stopped / "checkpoints" / name).unlink()
    shutil.copy(stopped / "checkpoints" / "epoch_00.ckpt", stopped / "checkpoints" / "last.ckpt")
    after(TWO, grid=GRID, seeds=[0, 1]).rename("other.yaml")
    study.main(["other.yaml", "--jobs", "2"])
    other = Path("runs/other")
    assert starts(other) == 1
    assert table(other) == table()
    assert capsys.readouterr().out.count("taken from the study question") == 3
    assert "3 taken from the study question" in (other / "answer.md").read_text()
    assert (runs(other)["lr=0.002,seed=0"] / "checkpoints" / "epoch_01.ckpt").exists()

    # nor one that other code has trained
    for path in [*runs().values(), *runs(other).values()]:
        checkpoint = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
        checkpoint["run"]["code"] = "older"
        torch.save(checkpoint, path / "checkpoints" / "last.ckpt")
    after(TWO, grid={"model.optimizer.lr": [0.002]}).rename("third.yaml")
    study.main(["third.yaml", "--jobs", "2"])
    assert starts(Path("runs/third")) == 1


def test_a_password_is_not_written_down() -> None:
    text = "--storage postgresql://me:s3:cret@host:5432/db"
    assert without_password(text) == "--storage postgresql://me:...@host:5432/db"
    assert without_password("sqlite:////tmp/a.db") == "sqlite:////tmp/a.db"


def test_hparams_of_tensorboard_show_what_differs(after: Callable[..., Path]) -> None:
    events = EventAccumulator(str(runs()["lr=0.0001,seed=1"])).Reload()
    chosen = {key: events.Scalars(f"chosen/{key}")[-1].value for key in ("val/acc", "epoch")}
    with (runs()["lr=0.0001,seed=1"] / "metrics.csv").open() as metrics:
        best = max(csv.DictReader(metrics), key=lambda epoch: float(epoch["val/acc"]))
    assert chosen == pytest.approx({key: float(best[key]) for key in chosen}, abs=1e-6)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["model.optimizer.lr"].number_value == 0.0001
    assert start.hparams["seed_everything"].number_value == 1


def test_a_run_that_diverges_is_reported_and_stops_nothing(
    ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = ask(CONVNET | TWO, grid={"model.optimizer.lr": [1000, 1e30, 0.002]})
    study.main([str(file), "--jobs", "2"])
    out = capsys.readouterr().out
    assert re.search(r"lr=1000,seed=0: diverged: train/loss \S+ in epoch 1", out)
    assert "lr=1e+30,seed=0: diverged: train/loss is NaN or infinite" in out
    assert "lr=0.002,seed=0: val/acc" in out
    wild, wildest, sane = table()
    for row in (wild, wildest):
        assert (row["seeds"], row["ended"], row["val/acc"]) == ("0", "1 diverged", "")
    assert (sane["seeds"], sane["ended"]) == ("1", "")
    text = (FOLDER / "answer.md").read_text()
    assert "the setting lr=1000 diverged in 1 of 1 runs" in text
    assert "| nan |" not in text


def test_a_run_that_fails_stops_nothing_and_is_tried_again(
    ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {
        "fails": {"model.network": {"class_path": "tests.small.Fails"}},
        "dies [red]": {"model.network": {"class_path": "tests.small.Dies"}},
        "works": {"model.network": "tests.small.Small"},
    }
    file = ask(variants=variants)
    Path("fail").touch()
    with pytest.raises(SystemExit, match="2 failed"):
        study.main([str(file), "--jobs", "2"])
    out = capsys.readouterr().out
    assert "fails,seed=0: failed: RuntimeError: out of luck" in out
    assert re.search(r"dies\S+,seed=0: failed: its process ended with exit code -9", out)
    assert "works,seed=0: val/acc" in out
    Path("fail").unlink()
    with pytest.raises(SystemExit, match="1 failed"):
        study.main([str(file), "--jobs", "2"])
    out = capsys.readouterr().out
    assert "works,seed=0" not in out.split("Which one?")[0]
    assert "dies [red]" in out, "names are no markup"
    assert [row["seeds"] for row in table()] == ["1", "0", "1"]


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
    asked = {"search": search, "trials": 3, "seeds": [0, 1], "sampler": sampler, "pruner": pruner}
    study.main([str(ask(CONVNET | {"trainer.max_epochs": 3}, **asked)), "--jobs", "2"])
    trials = record()
    picked = [trial for trial in trials if "picked" in trial.user_attrs]
    assert len(picked) == 3
    assert all(1e-6 <= trial.params["model.optimizer.lr"] <= 1e-2 for trial in picked)
    for trial in picked:
        again = [t.user_attrs["seed"] for t in trials if t.params == trial.params]
        assert again == ([0] if trial.state == TrialState.PRUNED else [0, 1])
        rows = trial.user_attrs["rows"]
        late = [row["val/acc"] for row in rows if row["epoch"] >= 1]
        assert (trial.state == TrialState.PRUNED) == (min(late) < 0.3)
        assert trial.state == TrialState.PRUNED or len(rows) == 3
    assert {trial.state for trial in picked} == {TrialState.PRUNED, TrialState.COMPLETE}
    assert [row["seeds"] for row in table()] == sorted(row["seeds"] for row in table())[::-1]


def test_a_search_goes_on_with_what_it_picked_and_ends_when_all_is_picked(
    ask: Callable[..., Path],
) -> None:
    search = {"data.batch_size": [100, 200]}
    network = {"model.network": {"class_path": "tests.small.Fails"}}
    file = ask(network, search=search, trials=9)
    Path("fail").touch()
    with pytest.raises(SystemExit, match="no run has ended yet"):
        study.main([str(file), "--jobs", "2"])
    Path("fail").unlink()
    study.main([str(file), "--jobs", "2"])
    assert sorted(row["setting"] for row in table()) == ["batch_size=100", "batch_size=200"]
    done = [trial for trial in record() if trial.state == TrialState.COMPLETE]
    assert len(done) == 2


# ----------------------------------------------------------------------- stopped, shared, resumed


def killed_after_an_epoch(file: Path, epoch: int, whole: bool) -> None:
    """Start a study and kill it, with its runs or without, when one of its two runs has had an
    epoch; there they wait in the next."""
    Path("wait_in").write_text(f"{epoch + 1}")
    process, deadline = command(file, "--jobs", 2), time.monotonic() + 120
    while time.monotonic() < deadline:
        logs = [log.read_text() for log in FOLDER.glob("*/fit.log")]
        if len(logs) == 2 and any(re.search(rf"^ +{epoch} ", log, re.M) for log in logs):
            break
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL) if whole else process.kill()
    process.communicate()
    assert not (FOLDER / "answer.csv").exists()
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
    Path("wait_in").unlink()
    study.main([str(file), "--jobs", "2"])
    broken = table()
    logs = [log.read_text() for log in FOLDER.glob("*/fit.log")]
    assert starts() >= 4
    assert all(log.count("\n    0 ") == 1 for log in logs), "no run began from its start again"
    shutil.rmtree("runs")
    study.main([str(file), "--jobs", "2"])
    assert table() == broken


def test_interrupted_it_leaves_its_runs_to_the_next(
    ask: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    file = ask(TWO, variants={"one": {}})
    with monkeypatch.context() as patch:
        patch.setattr("study.Runner._stops", interrupt)
        with pytest.raises(SystemExit) as stopped:
            study.main([str(file), "--jobs", "2"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command resumes\n"
    assert [trial.state for trial in record()] == [TrialState.FAIL]
    study.main([str(file), "--jobs", "2"])
    assert [row["seeds"] for row in table()] == ["1"]


def test_other_settings_in_the_same_folder_are_another_run(ask: Callable[..., Path]) -> None:
    study.main([str(ask(variants={"one": {}})), "--jobs", "2"])
    first = table()
    file = ask(TWO, variants={"one": {}})
    study.main([str(file), "--jobs", "2", "--storage", "sqlite:///second.db"])
    assert [path.name for path in sorted(FOLDER.glob("*/version_*"))] == ["version_0", "version_1"]
    assert table_of_run(FOLDER / "one,seed=0" / "version_0") == [first[0]["val/acc"]]
    assert len(table_of_run(FOLDER / "one,seed=0" / "version_1")) == 2


def shared(ask: Callable[..., Path], storage: str) -> None:
    """Start one study twice at once, and assert that every run was done, once."""
    meets = {"trainer.callbacks": [{"class_path": "tests.small.Meets"}]}
    fixed = CONVNET | meets | {"trainer.max_epochs": 4}
    file = ask(fixed, grid={"data.batch_size": [100, 200]}, seeds=[0, 1])
    both = [command(file, "--storage", storage, core=core) for core in range(2)]
    outs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    trials = [t for t in record(storage) if t.state == TrialState.COMPLETE]
    keys = [(json.dumps(t.user_attrs["flags"]), t.user_attrs["seed"]) for t in trials]
    assert len(keys) == len(set(keys)) == 4
    assert starts() == 4
    assert len({trial.user_attrs["worker"] for trial in trials}) == 2, "both took part"
    answers = [out[out.index("Which one?") :] for out in outs]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_two_processes_share_a_study_in_sqlite(ask: Callable[..., Path]) -> None:
    shared(ask, "sqlite:///shared.db")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of this session's own."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    if initdb is None:
        pytest.skip("needs PostgreSQL (Debian's package postgresql)")
    # Its server refuses to run as root.
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


def test_a_journal_on_a_shared_disk_is_a_storage(ask: Callable[..., Path]) -> None:
    file = ask(grid={"data.batch_size": [100]})
    study.main([str(file), "--jobs", "2", "--storage", "journal:journal.log"])
    before = table()
    study.main([str(file), "--jobs", "2", "--storage", "journal:journal.log"])
    assert table() == before
    assert starts() == 1


def test_a_worker_elsewhere_keeps_its_run_until_it_falls_silent(
    ask: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ask(grid={"data.batch_size": [100]})
    FOLDER.mkdir(parents=True)
    storage = "sqlite:///runs/question/study.db"
    elsewhere = optuna.create_study(study_name="question", storage=storage, direction="maximize")
    elsewhere.enqueue_trial({}, {"flags": {"data.batch_size": 100}, "seed": 0})
    elsewhere.ask().set_user_attr("worker", "elsewhere.1")
    monkeypatch.setattr("studies.record.SILENCE", 3.0)
    began = time.time()
    study.main([str(file), "--jobs", "2"])
    out = capsys.readouterr().out
    assert out.index("waits for the runs of others") < out.index("batch_size=100,seed=0: val/acc")
    states = [trial.state for trial in record()]
    assert states == [TrialState.FAIL, TrialState.COMPLETE]
    assert record()[1].datetime_start.timestamp() > began + 3, "not before it was silent for long"


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
        ({}, "a study has grid, variants or search"),
        ({"grid": {"seed_everything": [1]}}, "seed_everything belongs to the study: use seeds"),
        ({"grid": {"trainer.max_epochs": [1]}, "choose": "test/acc"}, "never by the test set"),
        ({"grid": {"trainer.max_epochs": [1]}, "sedes": [1]}, "sedes: did you mean seeds"),
        ({"grid": {"trainer.max_epochs": [1]}, "seeds": [1, 1]}, "seeds"),
        ({"grid": {"data.augment": []}}, "no values"),
        ({"variants": {"a": {}, "b": {}}}, "two settings are the same"),
        ({"variants": {"a": {}}, "baseline": "c"}, "baseline c is no variant: name one of a"),
        ({"variants": {"a b": {}, "a_b": {"seed": 1}}}, "two names differ only in spaces"),
        ({"grid": {"data.batch_size": [1]}, "baseline": "batch_size=1"}, "has none"),
        ({"search": {"data.batch_size": []}}, "no values"),
        ({"search": {"data.batch_size": {"low": 1, "high": 9, "step": 0.5}}}, "step 0.5"),
        (
            {"search": {"data.batch_size": [1]}, "sampler": "optuna.samplers.BruteForceSampler"},
            "use grid",
        ),
        ({"variants": {"a": {"checkpoint": {"monitor": "train/acc"}}}}, "belongs to the study"),
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
    assert "name the file" in fails(capsys)
    assert "jobs" in fails(capsys, file, "--jobs", "-1")


def test_a_storage_that_cannot_be_opened_is_refused_in_one_line(
    ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = ask(grid={"data.batch_size": [100]})
    for url in ("nonsense://x", "sqlite:////nowhere/at/all.db", "no url at all"):
        with pytest.raises(SystemExit, match=f"^error: storage {url}: ") as stopped:
            study.main([str(file), "--storage", url])
        assert "\n" not in str(stopped.value.code)


def test_a_changed_recipe_is_not_mixed_with_the_old_one(after: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match="begun with another recipe"):
        study.main([str(after({"trainer.max_epochs": 3}, grid=GRID))])
    assert starts() == 4


def test_the_answer_so_far_runs_nothing_and_leaves_nothing(after: Callable[..., Path]) -> None:
    file = after(TWO, grid=GRID, seeds=[0])
    study.main(["--jobs", "0", str(file)])
    assert starts() == 4
    assert [row["seeds"] for row in table()] == ["1", "1"]
    with pytest.raises(SystemExit, match="no run has ended yet"):
        study.main([str(file), "--folder", "runs/b", "--jobs", "0"])
    assert not Path("runs/b").exists()


@pytest.mark.slow
def test_every_study_of_the_project_can_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    files = sorted(Path("configs/studies").glob("*.yaml"))
    assert [file.stem for file in files] == [
        "batch_size", "epochs", "fast94", "improved", "improved_full", "learning_rate",
        "remedies", "softmax",
    ]  # fmt: skip
    for file in files:
        with pytest.raises(SystemExit, match="no run has ended yet"):
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
    assert study.shares(jobs) == expected


# -------------------------------------------------------------------------------- statistics


def outcomes(values: dict[str, list[float]], **ended: str) -> list[Outcome]:
    """Return runs of three epochs, of which the second is the best."""
    return [
        Outcome(
            setting,
            seed,
            [
                {"epoch": epoch, "train/loss": 1.0, "train/acc": 0.5, "val/loss": 2.0 - value,
                 "val/acc": value - abs(epoch - 1) / 10, "test/loss": 2.0, "test/acc": value / 2,
                 "seconds": 2.0}
                for epoch in range(3)
            ],
            ended.get(f"{setting}_{seed}", ""),
        )
        for setting, of_seed in values.items()
        for seed, value in enumerate(of_seed)
    ]  # fmt: skip


def answer(
    values: dict[str, list[float]],
    levels: dict[str, dict[str, str]] | None = None,
    ended: dict[str, str] | None = None,
    baseline: str | None = None,
    is_search: bool = False,
) -> Answer:
    settings = levels or {setting: {"": setting} for setting in values}
    runs_ = outcomes(values, **(ended or {}))
    return Answer("Q?", "c", "val/acc", settings, runs_, baseline, is_search)


def test_means_have_the_interval_of_student_t() -> None:
    a = [0.5, 0.53, 0.58]
    (row,) = answer({"a": a}).by_setting()
    low, high = stats.t.interval(0.95, 2, loc=sum(a) / 3, scale=stats.sem(a))
    assert (row["val/acc"].low, row["val/acc"].high) == pytest.approx((low, high))
    assert row["test/acc"].value == pytest.approx(sum(a) / 6)
    assert (row["epoch"].value, row["seconds"].value) == (1, 6)
    (alone,) = answer({"a": [0.5]}).columns()[2][1]
    assert alone == "50.00"


def test_folders_of_runs_have_names_of_their_own() -> None:
    names = {"a/b": {"data.batch_size": 1}, "a|b": {"data.batch_size": 2}, "x" * 300: {}}
    question = Question("Q?", "base.yaml", variants=names)
    folders = {question.folder_of(flags, 0) for flags in names.values()}
    assert len(folders) == 3
    assert all(len(name) < 120 and re.fullmatch(r"[\w.,=+-]+,seed=0", name) for name in folders)
    assert Question("Q?", "c", variants={"weight decay": {}}).folder_of({}, 3) == (
        "weight_decay,seed=3"
    )


def test_differences_are_paired_and_corrected_after_holm() -> None:
    values = {"a": [0.50, 0.60, 0.70], "b": [0.53, 0.64, 0.73], "c": [0.52, 0.58, 0.73]}
    raw = {
        (x, y): stats.ttest_rel(values[y], values[x]).pvalue
        for x, y in (("a", "b"), ("a", "c"), ("b", "c"))
    }
    ordered = sorted(raw, key=lambda pair: raw[pair])
    holm, highest = {}, 0.0
    for rank, pair in enumerate(ordered):
        highest = max(highest, min(1.0, (3 - rank) * raw[pair]))
        holm[pair] = highest
    found = {(d.one, d.other): d for d in answer(values).differences}
    assert {pair: d.p for pair, d in found.items()} == pytest.approx(holm)
    assert found["a", "b"].mean.value == pytest.approx((0.03 + 0.04 + 0.03) / 3)
    assert raw["a", "b"] < 0.05
    assert found["a", "b"].is_significant == (holm["a", "b"] < 0.05)


def test_the_sentence_says_what_the_data_decide() -> None:
    clear = {"a": [0.50, 0.60, 0.70], "b": [0.601, 0.70, 0.80], "c": [0.599, 0.701, 0.802]}
    sentence = answer(clear).conclusion()
    assert sentence.startswith(
        "The setting c has the best mean val/acc, 70.07 %, significantly better than a"
    )
    assert "between it and b the data do not decide" in sentence
    noise = {"a": [0.5, 0.6, 0.7], "b": [0.6, 0.5, 0.71]}
    assert answer(noise).conclusion().startswith("The data do not decide: b has the best")
    few = {"a": [0.5, 0.5], "b": [0.6, 0.7]}
    assert answer(few).differences == []
    assert answer(few).conclusion().startswith("Too few runs to compare: it takes 3 seeds")
    same = {"a": [0.5, 0.6, 0.7], "b": [0.6, 0.7, 0.8]}  # no spread says nothing of chance
    assert "do not decide" in answer(same).conclusion()
    equal = {"a": [0.5, 0.6, 0.7], "b": [0.5, 0.6, 0.7]}
    assert answer(equal).conclusion() == "All have the same mean val/acc, 60.00 %."
    with_base = answer(clear, baseline="a")
    assert {(d.one, d.other) for d in with_base.differences} == {("a", "b"), ("a", "c")}
    assert with_base.conclusion().startswith("Significantly better than a: b (+10.03")


def test_a_diverged_run_is_in_no_mean_and_in_no_pair_and_its_setting_does_not_lead() -> None:
    values = {"a": [0.5, 0.6, 0.7, 0.6], "b": [0.61, 0.7, 0.82, 0.1], "c": [0.4, 0.51, 0.6, 0.5]}
    found = answer(values, ended={"b_3": "diverged: at once"})
    assert {(d.one, d.other): d.pairs for d in found.differences} == {
        ("a", "b"): 3, ("a", "c"): 4, ("b", "c"): 3,
    }  # fmt: skip
    row = found.by_setting()[1]
    assert (row["seeds"], row["ended"]) == (3, "1 diverged")
    assert row["val/acc"].value == pytest.approx(0.71)
    sentence = found.conclusion()
    assert sentence.startswith("The setting a has the best mean val/acc")
    assert "b left out: too few whole runs" in sentence
    assert "the setting b diverged in 1 of 4 runs" in sentence


def test_the_best_of_more_epochs_is_not_taken_at_its_word() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.61, 0.7, 0.82]}
    found = answer(values)
    assert "more epochs" not in found.conclusion()
    (difference,) = found.differences
    assert difference.test.value == pytest.approx((0.11 + 0.1 + 0.12) / 6)
    for run in found.outcomes[:3]:
        run.rows.append({**run.rows[0], "epoch": 3})
    assert "some have more epochs" in found.conclusion()


def test_a_variant_that_lost_runs_is_left_out_of_the_sentence() -> None:
    values = {"a": [0.5, 0.6, 0.7, 0.6], "b": [0.61, 0.7, 0.82, 0.7], "c": [0.7, 0.8, 0.91, 0.1]}
    sentence = answer(values, baseline="a", ended={"c_3": "diverged: at once"}).conclusion()
    assert sentence.startswith("Significantly better than a: b (+")
    assert "c left out: too few whole runs" in sentence


def test_a_search_says_that_the_best_looks_better_than_it_is() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.61], "c": [0.52, 0.63, 0.72]}
    found = answer(values, is_search=True)
    assert found.ranked() == ["c", "a", "b"], "b has too few runs to lead"
    assert "the best of 3 settings looks better by val/acc than it is" in found.conclusion()


def test_factors_of_a_grid_are_compared_over_the_levels_of_the_others() -> None:
    levels = {f"{x}{y}": {"x": x, "y": y} for x in "pq" for y in "rs"}
    values = {
        "pr": [0.50, 0.60, 0.55], "ps": [0.52, 0.59, 0.56],
        "qr": [0.60, 0.71, 0.66], "qs": [0.63, 0.69, 0.67],
    }  # fmt: skip
    by_x, by_y = answer(values, levels).differences
    p = [(a + b) / 2 for a, b in zip(values["pr"], values["ps"], strict=True)]
    q = [(a + b) / 2 for a, b in zip(values["qr"], values["qs"], strict=True)]
    assert (by_x.factor, by_x.one, by_x.other) == ("x", "p", "q")
    assert by_x.p == pytest.approx(2 * stats.ttest_rel(q, p).pvalue)
    assert by_x.is_significant
    assert not by_y.is_significant
    sentence = answer(values, levels).conclusion()
    assert sentence.startswith("For x, q has the best mean val/acc")
    assert "for y, the data do not decide: s" in sentence


def test_a_loss_chooses_the_lowest() -> None:
    runs_ = outcomes({"a": [0.5, 0.6, 0.6], "b": [0.7, 0.81, 0.8]})
    found = Answer("Q?", "c", "val/loss", {"a": {"": "a"}, "b": {"": "b"}}, runs_)
    assert [row["val/loss"].value for row in found.by_setting()] == pytest.approx(
        [4.3 / 3, 3.69 / 3]
    )
    assert found.conclusion().startswith("The setting b has the best mean val/loss, 1.2300")
