"""What the person at the terminal sees: a user's mistake in a few words, and no noise of the
frameworks. LAB_DEBUG=1 shows every traceback."""

import contextlib
import difflib
import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.cli import LightningArgumentParser

# What PyTorch and Lightning say only in the middle of a run, as a RuntimeError.
MENDS = {
    "No working C++ compiler": "model.compile needs a C++ compiler: install g++, or leave it off",
    "Failed to find C compiler": "model.compile needs a C compiler: install gcc, or leave it off",
    "Cannot find a working triton": "model.compile needs triton: install it, or leave it off",
    "too old to be supported by the triton": "model.compile needs a newer GPU: leave it off",
    " by peer": "another process of this run has ended: resume from its last checkpoint",
    "Early stopping conditioned on metric": "EarlyStopping's monitor is not logged: use val/loss "
    "or val/acc, with data.val_size above 0",
    "does not allow for gradient clipping": "trainer.gradient_clip_val with mixed precision needs "
    "an optimizer that is not fused: add --model.optimizer.fused false",
}


def innermost(error: BaseException) -> BaseException:
    """Return the exception at the root of a chain of them."""
    while True:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            return error
        error = cause


def refused(error: BaseException) -> MisconfigurationException:
    """Return what a class said about its arguments in the settings, with the class's name."""
    root = innermost(error)
    frames = [frame for frame, _ in traceback.walk_tb(root.__traceback__)]
    builders = [f.f_locals["self"] for f in frames if f.f_code.co_name == "__init__"]
    name = f"{type(builders[-1]).__name__}: " if builders else ""
    return MisconfigurationException(f"{name}{root}")


class ShortParser(LightningArgumentParser):
    """Says what is wrong in one line, where jsonargparse prints the usage first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the key and the innermost cause, or the keys near an unknown one; exit with 2."""
        key = message.partition('Parser key "')[2].partition('"')[0]
        words = message.removeprefix("unrecognized arguments: ")
        if type(ex).__name__ == "NSKeyError" and "'" in message:
            parser = getattr(ex, "subcommand_parser", None) or self
            message = _unknown(message.split("'")[-2], parser)
        elif words == message and key and ex is not None:
            message = f"{key}: {innermost(ex)}"
        elif words != message and words.startswith("--"):
            message = _unknown(words[2:].split("=")[0].split(" ")[0], self)
        elif words != message:
            is_config = words.endswith((".yaml", ".yml"))
            message += (
                f": did you mean --config {words}?" if is_config else ": quote patterns of files"
            )
        if os.environ.get("LAB_DEBUG") and ex is not None:
            raise ex
        self.exit(2, f"error: {' '.join(message.split())}\n")


def _unknown(name: str, parser: LightningArgumentParser) -> str:
    """Return what to say of an unknown option: the nearest one, or all if there are few."""
    known = [a.dest for a in parser._actions if not a.dest.endswith(("help", "config"))]
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        hint = f": did you mean {near[0]}?"
    elif len(known) < 12:
        hint = f": there are {', '.join(known)}" if known else ": that class takes none"
    else:
        hint = ""
    return f"unknown option {name}{hint}"


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """Turn a user's mistake into a line and an exit code that is not 0; leave all others alone."""
    tell = threading.excepthook
    # TensorBoard writes in a thread of its own, and tells the main thread of a full disk too.
    threading.excepthook = lambda args: None if _is_full_disk(args.exc_value) else tell(args)
    try:
        yield
    except (
        RuntimeError,
        OSError,
        ValueError,
        KeyboardInterrupt,
        MisconfigurationException,
    ) as error:
        if os.environ.get("LAB_DEBUG"):
            raise
        if _is_full_disk(root := innermost(error)):  # loggers raise it as a ValueError
            sys.exit(f"error: {root}: free some space")
        if isinstance(error, OSError | ValueError):
            raise
        if isinstance(error, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        text = " ".join(str(error).split())
        if isinstance(error, MisconfigurationException):
            sys.exit(f"error: {text}")
        for cause, mend in MENDS.items():
            if cause in text:
                sys.exit(f"error: {mend}")
        if "loading state_dict" not in text:
            raise
        mismatch = str(error).splitlines()[1].strip()
        sys.exit(f"error: the checkpoint does not fit the network of the settings: {mismatch}")
    finally:
        threading.excepthook = tell


def quieten() -> None:
    """Keep tips of the frameworks, and what they don't know of this project, off the terminal."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A compilation on a machine without a GPU says that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if sys.warnoptions:  # python -W default train.py ... shows all
        return
    for category in (DeprecationWarning, FutureWarning, PossibleUserWarning):
        warnings.simplefilter("ignore", category)
    for message in (
        r".*callbacks used to create the checkpoint need to be provided",  # to test without them
        r"Checkpoint directory .* exists and is not empty",  # a resumed run's
        r"The dirpath has changed",  # of a moved run, or one that resumes another's earlier epoch
        r"Total length of `Batches` across ranks is zero",  # val_size 0
        r"Precision bf16-mixed is not supported by the model summary",
        r"`?isinstance\(treespec, LeafSpec\)`? is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
