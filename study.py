"""Command-line entry point: many runs that answer one question.

    python study.py configs/studies/batch_size.yaml
    python study.py configs/studies/batch_size.yaml --jobs 2              # two runs at a time
    python study.py configs/studies/batch_size.yaml --jobs 0              # the answer so far
    python study.py configs/studies/batch_size.yaml --seeds '[6, 7]'      # other seeds
    python study.py configs/studies/epochs.yaml --from runs.jsonl         # resume another folder's

Every run is a `python train.py fit`, in runs/<study>/<setting>,seed=<seed>/version_0/. However a
study was stopped, the same command resumes it; started again while the study runs, here or on
another machine, it does a share of the runs. The answer is in runs/<study>/: `answer.md`, two
figures, and the record of the runs, `runs.jsonl`, from which another machine can resume.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException

from studies.answer import Answer
from studies.question import Question, check
from studies.queue import CODE, STORAGE_ERRORS, Queue, without_password
from studies.record import other_code, read_records
from studies.work import Work
from terminal import ShortParser, innermost, refused, short_errors

HOW = {"--jobs", "--storage", "--folder", "--from", "--any_code"}  # flags that don't affect results


@short_errors()
def main(args: list[str] | None = None) -> None:
    """Run the command line. A user's mistake prints one line and exits with a non-zero code."""
    if "" not in sys.path:
        sys.path.append("")  # the current folder, for the user's classes
    os.environ.pop("SLURM_NTASKS", None)  # a run is one process, however many a job has
    args = _with_file_first(sys.argv[1:] if args is None else args)
    parser = ShortParser(prog="study.py", description="Answer a question with many runs.")
    add = parser.add_argument
    add(
        "--file",
        action=ActionConfigFile,
        help="the study's YAML file; the flag's name may be left out",
    )
    parser.add_class_arguments(Question)
    add("--jobs", type=NonNegativeInt, default=1, help="runs at a time; 0: the answer so far")
    add("--storage", type=str | None, help="journal:FILE or a database's URL")
    add("--folder", type=str | None, help="null: runs/<name of the file>")
    add("--from", action="append", default=[], help="count the runs of a runs.jsonl as done")
    add("--any_code", type=bool, default=False, help="also count runs by other code")
    given = parser.parse_args(args)
    # Flags to pass on must not be instantiated, though some name classes.
    try:
        values = parser.instantiate_classes(given).as_dict()
    except (ValueError, TypeError) as error:  # from a sampler or a pruner
        raise refused(error) from error
    values |= {key: given.as_dict()[key] for key in ("grid", "variants", "fixed")}
    question = Question(**{f.name: values[f.name] for f in dataclasses.fields(Question)})
    folder = Path(given.folder or Path("runs", Path(str(given.file[-1])).stem))
    records = {file: read_records(Path(file)) for file in given["from"]}
    plans = check(question)
    no_runs = MisconfigurationException(f"{folder}: no finished run counts yet")
    if not (given.jobs or given.storage or records or folder.exists()):
        raise no_runs
    try:
        queue = Queue(question, plans, folder, given.storage, given.any_code)
        for file, finished in records.items():
            print(f"{file}: {queue.take_over(finished)} runs added")
        for reason in queue.other():
            action = "restart" if given.jobs else "are left out"
            hint = ": --any_code true counts them too" if CODE in reason else ""
            print(f"{reason} and {action}{hint}")
        if given.jobs:
            Work(queue).do_all(given.jobs)
        settings, done = queue.settings(), queue.records()
    except STORAGE_ERRORS as error:
        text = without_password(str(innermost(error)).splitlines()[0])
        reason = f"the storage failed ({text})"
        raise MisconfigurationException(f"{reason}: run the same command to resume") from error
    if not done:
        raise no_runs
    if other := sorted({name for record in done.values() for name in other_code(record)}):
        print(f"counting runs by other code, which differs in {', '.join(other)}")
    from studies.figures import write_figures  # Matplotlib is slow to import

    command = shlex.join(["python", "study.py", *_that_ask(args[1:])])
    levels = {name: question.levels_of(flags) for name, flags in settings.items()}
    answer = Answer(question, command, levels, done)
    answer.write(folder)
    write_figures(answer, folder)
    if given.jobs and (missing := queue.total() - len(done)):
        failed = f"{len(queue.failed)} failed, see above"
        cause = failed if queue.failed else "other workers have them"
        sys.exit(f"error: {missing} runs are missing ({cause}): run the same command to retry")


def _with_file_first(args: list[str]) -> list[str]:
    """Move the study's file to the front, as `--file`, so that flags override it."""
    args = [word for word in args if word != "--file"]
    if {"--help", "-h"} & {*args}:
        return args
    is_value = [previous.startswith("--") and "=" not in previous for previous in ["", *args]]
    positions = [i for i, word in enumerate(args) if not (word.startswith("-") or is_value[i])]
    if not positions:
        raise MisconfigurationException("name the study's file: python study.py FILE")
    file = args[positions[0]]
    with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):  # the parser says why
        if "question" not in (yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}):
            raise MisconfigurationException(f"{file} is not a study: it has no `question`")
    return ["--file", file, *args[: positions[0]], *args[positions[0] + 1 :]]


def _that_ask(args: list[str]) -> list[str]:
    """Return a command line without the flags that don't affect results."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in HOW:
        parser.add_argument(flag)
    return parser.parse_known_args(args)[1]


if __name__ == "__main__":
    main()
