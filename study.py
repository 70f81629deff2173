"""Command-line entry point: many runs that answer one question.

    python study.py configs/studies/batch_size.yaml
    python study.py configs/studies/batch_size.yaml --jobs 2              # two runs at a time
    python study.py configs/studies/batch_size.yaml --jobs 0              # the answer so far
    python study.py configs/studies/batch_size.yaml --seeds '[6, 7]'      # other seeds
    python study.py configs/studies/batch_size.yaml --from docs/studies/batch_size/runs.jsonl

Every run is one of `python train.py fit`, in runs/<study>/<setting>,seed=<seed>/version_0/. The
same command resumes a study that was stopped, in whatever way; started again while it runs, here or
on another machine, it takes its share. The answer lies in runs/<study>/: `answer.md`, two figures,
and the record of all runs, `runs.jsonl`, by which another machine can resume the study.
"""

import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from studies.answer import Answer
from studies.question import Question, check
from studies.queue import STORAGE_ERRORS, Queue, without_password
from studies.record import read_records
from studies.work import Work
from terminal import ShortParser, quieten, short_errors

HOW = ("jobs", "storage", "folder", "from", "any_code")  # flags that no result depends on


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake gives one line and an exit code that is not 0."""
    quieten()
    if "" not in sys.path:
        sys.path.append("")  # the current folder, for classes of the user's own
    with short_errors():
        _main(sys.argv[1:] if args is None else args)


def _main(args: list[str]) -> None:
    parser = ShortParser(prog="study.py", description="Answer a question by many runs.")
    parser.add_argument("--file", action=ActionConfigFile, help="the question (or as first word)")
    parser.add_class_arguments(Question)
    parser.add_argument(
        "--jobs", type=NonNegativeInt, default=1, help="runs at a time; 0: the answer so far"
    )
    parser.add_argument("--storage", type=str | None, help="journal:FILE or a database's URL")
    parser.add_argument("--folder", type=str | None, help="default: runs/<name of the file>")
    parser.add_argument(
        "--from", type=str | list[str], default=[], help="take runs that a runs.jsonl has as done"
    )
    parser.add_argument("--any_code", type=bool, default=False, help="also those by other code")
    given = parser.parse_args(_with_file(args))
    settings = parser.instantiate_classes(given).as_dict()
    # Flags are words to pass on, though some of them name classes.
    settings |= {key: given.as_dict()[key] for key in ("grid", "variants", "fixed")}
    names = [field.name for field in dataclasses.fields(Question)]
    question = Question(**{name: settings[name] for name in names})
    folder = Path(given.folder or Path("runs", Path(str(given.file[-1])).stem))
    files = [given["from"]] if isinstance(given["from"], str) else given["from"]
    records = {file: read_records(Path(file)) for file in files}
    plans = check(question)
    nothing = MisconfigurationException(f"{folder}: no run has ended yet, so there is no answer")
    if not (given.jobs or given.storage or records or folder.exists()):
        raise nothing
    try:
        queue = Queue(question, plans, folder, given.storage, given.any_code)
        for file, runs in records.items():
            print(f"{file}: {queue.take_over(runs)} runs taken")
        queue.runs()
        if queue.left_out:
            names = sorted({name for changed in queue.left_out.values() for name in changed})
            which = f"{len(queue.left_out)} runs are by other code ({', '.join(names[:4])})"
            then = "start anew" if given.jobs else "are left out"
            print(f"{which} and {then}: --any_code true counts them too")
        if given.jobs:
            Work(queue, folder).do_all(given.jobs)
        settings, done = queue.settings(), queue.records()
    except STORAGE_ERRORS as error:
        reason = without_password(str(error).splitlines()[0])
        raise MisconfigurationException(
            f"the storage failed ({reason}): the same command resumes"
        ) from error
    if not done:
        raise nothing
    command = shlex.join(["python", "study.py", *_that_ask(args)])
    answer = Answer(question, command, question.levels(settings), done)
    terminal = Console(highlight=False)
    answer.write(folder, terminal if terminal.is_terminal else Console(width=120, highlight=False))
    if queue.failed:
        sys.exit(f"error: {len(queue.failed)} failed, see above: the same command tries again")


def _with_file(args: list[str]) -> list[str]:
    """Put the study's file first and its flag before it: flags override it."""
    for i, word in enumerate(args):
        is_file = not i or (Path(word).suffix in (".yaml", ".yml") and args[i - 1][:1] != "-")
        if is_file and not word.startswith("-"):
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # the parser says why
                if "question" not in (yaml.safe_load(Path(word).read_text()) or {}):
                    raise MisconfigurationException(f"{word} is not a study: it asks no question")
            return ["--file", word, *args[:i], *args[i + 1 :]]
    if not {"--file", "--help", "-h"} & {word.partition("=")[0] for word in args}:
        raise MisconfigurationException("name the file of a study: python study.py FILE")
    return args


def _that_ask(args: list[str]) -> list[str]:
    """Return the words of a command line that say what is asked, not how it is done."""
    words, is_value = [], False
    for word in args:
        flag, _, value = word.removeprefix("--").partition("=")
        is_how = word.startswith("--") and flag.rstrip("+") in HOW
        if not (is_how or is_value):
            words.append(word)
        is_value = is_how and not value
    return words


if __name__ == "__main__":
    main()
