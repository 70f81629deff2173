"""A model's predictions for a set of images, as a file."""

import io
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException


class Saved(NamedTuple):
    """Logits float32 [N, classes], labels and indices int64 [N], the identity of the image set, and
    the model's name."""

    logits: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    images: str
    model: str

    @property
    def is_right(self) -> np.ndarray:
        """Whether each image is classified correctly, bool [N]."""
        is_right: np.ndarray = self.logits.argmax(axis=1) == self.labels
        return is_right

    def content(self) -> bytes:
        """Return the content of a file that `read_saved` reads."""
        file = io.BytesIO()
        np.savez_compressed(file, **self._asdict())
        return file.getvalue()


def read_saved(path: Path, name: str = "test.npz") -> Saved:
    """Return the predictions in a file, or in the file `name` of a run folder."""
    file = path / name if path.is_dir() else path
    command = f"train.py {'test' if name == 'test.npz' else 'validate'}"
    try:
        with np.load(file) as content:
            logits, labels, indices, images, model = (content[key] for key in Saved._fields)
    except FileNotFoundError:
        raise MisconfigurationException(
            f"no {file}: python {command} --ckpt_path CHECKPOINT writes it"
        ) from None
    except (OSError, EOFError, KeyError, ValueError, TypeError, BadZipFile) as error:
        raise MisconfigurationException(
            f"{file} is damaged, or was not written by `{command}`"
        ) from error
    return Saved(logits, labels, indices, str(images), str(model))
