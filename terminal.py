"""What the person at the terminal sees: mistakes in one line, and no noise of the frameworks."""

import contextlib
import difflib
import errno
import logging
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.cli import LightningArgumentParser

from cifar10.archive import CIFAR10Error

KNOWN_ERRORS = (MisconfigurationException, CIFAR10Error, OSError)


# What PyTorch and Lightning say only in the middle of a run, as a RuntimeError.
MENDS = {
    "No working C++ compiler": "model.compile needs a C++ compiler: install g++, or leave it off",
    "Failed to find C compiler": "model.compile needs a C compiler: install gcc, or leave it off",
    "Cannot find a working triton": "model.compile needs triton: install it, or leave it off",
    "too old to be supported by the triton": "model.compile needs a newer GPU: leave it off",
    "closed by peer": "another process of this run has ended: what is saved can be gone on with",
    "reset by peer": "another process of this run has ended: what is saved can be gone on with",
    "does not allow for gradient clipping": "trainer.gradient_clip_val with mixed precision needs "
    "an optimizer that is not fused: add --model.optimizer.fused false",
}


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line, where jsonargparse prints the usage first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, with the nearest right key for an unknown one, and exit with 2."""
        unknown = re.search(r"option '(\S+)'|unrecognized arguments: --([^\s=]+)", message, re.I)
        if unknown:
            key = unknown[1] or unknown[2]
            parser = getattr(ex, "subcommand_parser", None) or self
            dests = (action.dest for action in parser._actions)
            known = [d for d in dests if not d.endswith("help") and not d.startswith("print_")]
            near = difflib.get_close_matches(key, known, n=1)
            message = f"unknown option {key}"
            if near:
                message += f": did you mean {near[0]}?"
            elif not known:  # as of the default network
                message += ": that class takes none (name one first, as by --model.network ConvNet)"
            elif len(known) < 12:
                message += f": there are {', '.join(known)}"
        elif message.lower().startswith("unrecognized arguments: ") and " -" not in message:
            message += ": a pattern for files needs quotes"
        self.exit(2, f"error: {_one_line(message)}\n")


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn a user's mistake into one line and an exit code that is not 0."""
    try:
        yield
    except KNOWN_ERRORS as error:
        is_full = getattr(error, "errno", None) == errno.ENOSPC
        sys.exit(f"error: {_one_line(str(error))}{': free some space' if is_full else ''}")
    except RuntimeError as error:
        for cause, mend in MENDS.items():
            if cause in str(error):
                sys.exit(f"error: {mend}")
        if "loading state_dict" not in str(error):
            raise
        mismatch = str(error).splitlines()[1].strip()
        sys.exit(f"error: the checkpoint does not fit the network of the settings: {mismatch}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _one_line(message: str) -> str:
    """Put a message of jsonargparse or Lightning on one line, without the inner workings."""
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message).replace("NoneType", "null")
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", message).replace(
        "Expected a '", "expected '"
    )
    several = re.search(r"(Multiple subclasses with name .*)\. Give .* ambiguity: (.*)\.", message)
    is_number = re.search(r"Subtypes: .*\bfloat\b", message)  # or a tensor, thus a class too
    nowhere = re.search(r"dot import path string: (\S+)", message)
    if several:
        message = f"{message.splitlines()[0]} {several[1]}: give one of {several[2]}"
    elif nowhere and not is_number:
        message = f"{message.splitlines()[0]} there is no class {nowhere[1]}"
    elif "Union subtypes" in message:
        types = " or ".join(re.findall(r"Subtypes: \[(.*)\]", message)[0].split(", "))
        value = re.findall(r"Given value: (.*)", message, re.S)[0]
        message = f"{message.splitlines()[0]} expected {types}, got {value}"
    restriction = r"Not of type \w+: (.*?) does not conform to restriction (.*)"
    message = re.sub(restriction, lambda m: f"{m[1]} is not {m[2].replace('v', '')}", message)
    message = re.sub(r'^Parser key "([^"]+)":', r"\1:", message)
    return " ".join(message.split())


def quieten() -> None:
    """Keep tips of the framework, and what it does not know of this project, off the terminal."""
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
        r"The dirpath has changed",  # for a run that goes on from an earlier epoch of another
        r"Total length of `Batches` across ranks is zero",  # val_size 0
        r"Precision bf16-mixed is not supported by the model summary",
        r"`?isinstance\(treespec, LeafSpec\)`? is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
