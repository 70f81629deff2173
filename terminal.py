"""Terminal output: short messages for user mistakes, and no noise from the frameworks. LAB_DEBUG=1
shows every traceback."""

import contextlib
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse._typehints import get_all_subclass_paths
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Errors that PyTorch and Lightning raise only mid-run, and the message to print instead.
MENDS = {
    "No working C++ compiler": "model.compile needs a C++ compiler: install g++, or leave it off",
    "Failed to find C compiler": "model.compile needs a C compiler: install gcc, or leave it off",
    "Cannot find a working triton": "model.compile needs triton: install it, or leave it off",
    "too old to be supported by the triton": "model.compile needs a newer GPU: leave it off",
    " by peer": "another process of this run has ended: resume from its last checkpoint",
    "Early stopping conditioned on metric": "EarlyStopping's monitor is not logged: use val/loss "
    "or val/acc, with data.val_size above 0",
    "or equal to the number of the training batches": "trainer.val_check_interval exceeds the "
    "batches of an epoch: add --trainer.check_val_every_n_epoch null to count across epochs",
    "codec can't decode": "a config file is not in this system's encoding: set PYTHONUTF8=1",
    "more than one stateful callback": "two trainer.callbacks have the same class and arguments: "
    "give one of them another monitor, or remove it",
    "does not allow for gradient clipping": "trainer.gradient_clip_val with mixed precision needs "
    "an optimizer that is not fused: add --model.optimizer.fused false",
}


# Flags that users know from other projects, and ours.
MEANT = {
    "lr": "model.optimizer.lr", "learning_rate": "model.optimizer.lr", "seed": "seed_everything",
    "epochs": "trainer.max_epochs", "gpus": "trainer.devices", "device": "trainer.accelerator",
    "optimizer": "model.optimizer", "network": "model.network", "weight_decay":
    "model.optimizer.weight_decay", "ckpt": "ckpt_path", "resume": "ckpt_path",
    "images": "data.images",
}  # fmt: skip

# jsonargparse's messages about values, and plainer ones.
VALUES = (
    (r"Expected a <class '[\w.]*Sequence'>\. Got value: (.*)", r"expected a list, not \1: in "
     r"YAML one item per line, on the command line one += per item"),
    (r"Expected a <class '(?:\w+\.)*(\w+)'>\. Got value: ", r"expected \1, not "),
    (r"Expected a typing\.Literal\[(.*)\]\. Got value: ", r"expected one of \1, not "),
    (r"File does not exist: '?(.*?)'?$", r"no such file: \1"),
    (r"invalid literal for int\(\) with base 10: ", "expected int, not "),
    (r"could not convert string to float: ", "expected float, not "),
    (r"(\S+) does not conform to restriction (v\S+(?: and v\S+)*)", r"expected a value \2, not \1"),
)  # fmt: skip

# The types of a union that reject the value.
KINDS = re.compile(
    r"- (?:Expected a|Not of type) (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*)\]|(\w+):)"
)

# Lightning's flags that the help describes, and help texts that replace the original ones.
SHOWN = {*MEANT.values(), *(f"checkpoint.{name}" for name in ("monitor", "mode", "filename",
         "save_top_k", "save_last"))}  # fmt: skip
COMMANDS = {
    "fit": "Train, and keep a checkpoint of every epoch.",
    "validate": "Evaluate a checkpoint on the validation set.",
    "test": "Evaluate a checkpoint on the test set.",
    "predict": "Classify your own images, or the test set, with a checkpoint.",
}
HELP = {
    "trainer.max_epochs": "Number of epochs; -1: no limit other than max_steps or max_time.",
    "ckpt_path": "A checkpoint; or `last` or `best` of the newest run of --name.",
    "model.optimizer": "Builds the optimizer from the parameters. The class's arguments are flags "
    "too: --model.optimizer SGD --model.optimizer.lr 0.05; --model.optimizer.help SGD lists them.",
}


def innermost(error: BaseException) -> BaseException:
    """Return the exception at the root of a chain."""
    while True:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            return error
        error = cause


def refused(error: BaseException) -> MisconfigurationException:
    """Return the error that a class raised for its arguments, prefixed with the class name."""
    root = innermost(error)
    frames = [frame for frame, _ in traceback.walk_tb(root.__traceback__)]
    builders = [f.f_locals["self"] for f in frames if f.f_code.co_name == "__init__"]
    name = f"{type(builders[-1]).__name__}: " if builders else ""
    return MisconfigurationException(f"{name}{root}")


class ShortParser(LightningArgumentParser):
    """Prints one-line errors, without jsonargparse's usage, and four pages of help. Flags can't be
    abbreviated, as another version may resolve abbreviations differently."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def format_help(self, *args: Any) -> str:
        """Return the help: descriptions of this project's flags and Lightning's most used ones, the
        names of the others, and no lists of known subclasses."""
        for group in self._action_groups:
            others = []
            for action in group._group_actions:
                name = action.dest
                for command in getattr(action, "_choices_actions", ()):
                    command.help = COMMANDS.get(command.dest, command.help)
                if name.startswith(("trainer.", "checkpoint.")) and name not in SHOWN:
                    others.append(name)
                is_whole = name in ("model", "data", "trainer", "checkpoint")
                if name in others or name.endswith(".help") or is_whole:
                    action.help = SUPPRESS
                action.help = HELP.get(name, action.help)
            if others := [name for name in others if not name.endswith(".help")]:
                group.description = f"Other Lightning flags: {', '.join(others)}"
        self._action_groups = sorted(
            self._action_groups, key=lambda g: any("trainer" in a.dest for a in g._group_actions)
        )
        self.usage = SUPPRESS
        return re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", super().format_help(*args))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the key and the root cause, or the option nearest an unknown one; exit with 2."""
        key = message.partition('Parser key "')[2].partition('"')[0]
        words = message.removeprefix("unrecognized arguments: ")
        if type(ex).__name__ == "NSKeyError" and "'" in message:
            parser = getattr(ex, "subcommand_parser", None) or self
            message = _unknown(message.split("'")[-2], parser)
        elif words == message and key and ex is not None:
            message = _about(key, str(innermost(ex)), message)
        elif words != message and words.startswith("--"):
            message = _unknown(words[2:].split("=")[0].split(" ")[0], self)
        elif words != message:
            is_config = words.endswith((".yaml", ".yml"))
            message += (
                f": did you mean --config {words}?"
                if is_config
                else ": quote file patterns; several are a list, --data.images '[a.jpg, b.jpg]'"
            )
        if not self.exit_on_error:  # a class's parser: the outer one prints it
            raise ArgumentError(None, message) from None
        if os.environ.get("LAB_DEBUG") and ex is not None:
            raise ex
        self.exit(2, f"error: {' '.join(message.split())}\n")


def _unknown(name: str, parser: LightningArgumentParser) -> str:
    """Return the message for an unknown option: the nearest one, or all if there are few."""
    known = [a.dest for a in parser._actions if not a.dest.endswith(("help", "config", "shtab"))]
    if (last := name.rpartition(".")[2]) in MEANT and "trainer.max_epochs" in known:
        hint = f": did you mean {MEANT[last]}?"
    elif last == "class_path":
        hint = ": arguments of a class belong under its init_args"
    elif last in ("num_workers", "pin_memory"):
        hint = ": batches are taken from tensors in memory, so there are no workers"
    elif "fixed" in known and "." in name:  # in a study
        hint = ": put flags of fit under fixed, grid or variants in the study's file"
    elif near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        hint = f": did you mean {near[0]}?"
    elif len(known) < 12:
        hint = f": options are {', '.join(known)}" if known else ": that class takes no arguments"
        if known and not parser.exit_on_error:  # a class
            hint += f"; if it takes **kwargs: dict_kwargs.{name}"
    else:
        hint = ""
    return f"unknown option {name}{hint}"


def _about(key: str, root: str, whole: str) -> str:
    """Return the message for a key's value, from the root cause and the whole message."""
    if name := root.partition("dot import path string: ")[2]:
        return f"{key}: {_no_class(name)}"
    if missing := re.fullmatch(r"module '([\w.]+)' has no attribute '(\w+)'", root):
        module, name = missing.groups()
        near = difflib.get_close_matches(name, dir(sys.modules[module]), n=1, cutoff=0.75)
        root += f": did you mean {module}.{near[0]}?" if near else ""
    if names := root.partition("arguments are required: ")[2]:
        return f"{key} needs {', '.join(f'--{key}.{name}' for name in names.split(', '))}"
    kinds, value = KINDS.findall(whole), whole.partition("Given value: ")[2]
    if value and len(kinds) == whole.count("\n    - "):
        types = [name for name in map("".join, kinds) if name != "NoneType"]
        return f"{key}: expected {' or '.join(types)}, not {value}"
    if "not correspond to a subclass" in root:
        root += "; a function needs a return annotation, e.g. `-> nn.Module`"
    for pattern, replacement in VALUES:
        root = re.sub(pattern, replacement, root)
    is_arguments = re.match(r"\w+: expected ", root)  # of a class
    return f"{key}{'.' if is_arguments else ': '}{root}"


def _no_class(name: str) -> str:
    """Return the message for a class name that can't be resolved."""
    for file in sorted(Path().glob("*.py")):
        if re.search(rf"^class {re.escape(name)}\b", file.read_text(errors="replace"), re.M):
            return f"did you mean {file.stem}.{name}?"
    bases = (nn.Module, Optimizer, LRScheduler, Callback)
    known = {path.rpartition(".")[2] for base in bases for path in get_all_subclass_paths(base)}
    lower = {c.lower(): c for c in sorted(known)}
    matches = [c for c in lower if c.startswith(name.lower())][:2]
    matches = matches or difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.75)
    near = " or ".join(lower[c] for c in matches)
    return f"no class {name}: " + (f"did you mean {near}?" if near else "name it as file.Class")


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """Turn a user's mistake into one line and a non-zero exit code; let other errors pass. Quieten
    the frameworks."""
    _quieten()
    hook = threading.excepthook
    # TensorBoard's writer thread reports a full disk to the main thread too.
    threading.excepthook = lambda args: None if _is_full_disk(args.exc_value) else hook(args)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("LAB_DEBUG"):
            raise
        if _is_full_disk(root := innermost(error)):  # loggers raise it as a ValueError
            sys.exit(f"error: {root}: free some space")
        if isinstance(error, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        text = " ".join(str(error).split())
        if isinstance(error, MisconfigurationException):
            sys.exit(f"error: {text}")
        if (tracker := type(error).__module__.partition(".")[0]) in ("mlflow", "wandb"):
            sys.exit(f"error: {tracker}: {text}")
        for cause, fix in MENDS.items():
            if cause in text:
                sys.exit(f"error: {fix}")
        if "loading state_dict" not in text:
            raise
        mismatch = textwrap.shorten(str(error).splitlines()[1], 200)
        sys.exit(f"error: the checkpoint does not fit the configured network: {mismatch}")
    finally:
        threading.excepthook = hook


def _quieten() -> None:
    """Hide the frameworks' tips, and warnings that don't apply to this project."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("profilers", "callbacks"):  # their tables, and why they stop a run
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for file names that it can't encode
            stream.reconfigure(errors="backslashreplace")
    # Without a GPU, compiling logs that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if sys.warnoptions:  # python -W default train.py ... shows all
        return
    for category in (DeprecationWarning, FutureWarning, PossibleUserWarning):
        warnings.simplefilter("ignore", category)
    for message in (
        r".*callbacks used to create the checkpoint need to be provided",  # `test` needs none
        r"Checkpoint directory .* exists and is not empty",  # a resumed run's
        r"The dirpath has changed",  # moved, or resumed from another's earlier epoch
        r"Total length of `Batches` across ranks is zero",  # val_size 0
        r"Precision bf16-mixed is not supported by the model summary",
        r"Glyph .* missing from font",  # in a class name
    ):
        warnings.filterwarnings("ignore", message)
