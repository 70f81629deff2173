"""Measure what "not sure" is worth for images of classes that a model has never seen.

    python -m benchmarks.open_set --config configs/base.yaml --splits 5

Train on six of the classes, with a fifth of their images for validation, and test on all test
images: how well do the largest probability and the energy (Liu et al., arXiv 2010.03759) tell the
6,000 images of known classes from the 4,000 of the others? Each split draws other classes. Other
flags, such as --trainer.max_epochs 8, go to `train.py fit`. Finished splits are not repeated.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import mannwhitneyu
from torch import Tensor

from cifar10 import archive
from runs import read_checkpoint

KNOWN = 6
TITLES = {
    "accuracy": "accuracy on known", "probability_auroc": "AUROC, probability",
    "energy_auroc": "AUROC, energy", "probability_fpr95": "FPR at 95 %, probability",
    "energy_fpr95": "FPR at 95 %, energy", "sure_of_known": "sure of known",
    "sure_of_unknown": "sure of unknown",
}  # fmt: skip


def write_split(root: Path, data: archive.Arrays, known: list[int]) -> int:
    """Write CIFAR-10 with only the training images of the `known` classes, relabelled 0 to 5, and
    all test images, where other classes get higher labels; return the number of training images.
    """
    others = [label for label in range(10) if label not in known]
    new = torch.tensor([[*known, *others].index(label) for label in range(10)], dtype=torch.uint8)
    labels = new[data.train_labels.long()]
    is_known = labels < KNOWN
    test_labels = new[data.test_labels.long()]
    arrays = archive.Arrays(
        data.train_images[is_known], labels[is_known], data.test_images, test_labels
    )
    folder = root / archive.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    archive.save_arrays(folder, arrays)
    return len(arrays.train_labels)


def measured(logits: Tensor, labels: Tensor, temperature: float, least: float) -> dict[str, float]:
    """Return how well a model tells known classes from others, by its logits [N, 10] and labels
    int64 [N], below 6 for known classes. It is sure if its probability is at least `least`."""
    is_known = labels < KNOWN
    probability = (logits / temperature).softmax(dim=1).max(dim=1).values
    is_right = (logits.argmax(dim=1) == labels)[is_known]
    metrics = {"accuracy": is_right.double().mean()}
    for name, score in (("probability", probability), ("energy", logits.logsumexp(dim=1))):
        wins = mannwhitneyu(score[is_known], score[~is_known]).statistic  # ties count half
        metrics[f"{name}_auroc"] = wins / (is_known.sum() * (~is_known).sum())
        threshold = score[is_known].quantile(0.05)  # by 95 % of the known images
        metrics[f"{name}_fpr95"] = (score[~is_known] >= threshold).double().mean()
    for name, mask in (("known", is_known), ("unknown", ~is_known)):
        metrics[f"sure_of_{name}"] = (probability[mask] >= least).double().mean()
    return {key: float(value) for key, value in metrics.items()}


def run(configs: list[Path], split: int, data: archive.Arrays, more: list[str]) -> dict[str, float]:
    """Train and test on a split, unless that was done before; return the measurements."""
    known = sorted(np.random.default_rng(split).permutation(10)[:KNOWN].tolist())
    texts = [config.read_text(encoding="utf-8") for config in configs]
    digest = hashlib.sha256("\0".join([*texts, *more]).encode()).hexdigest()[:6]
    parent = Path("runs", "open_set", f"{configs[-1].stem}_{digest}_{split}")
    tested = sorted(parent.glob("version_*/test.npz"))
    if not tested:
        size = write_split(parent / "data", data, known)
        root = ["--data.root", str(parent / "data")]
        flags = [*root, "--data.verify", "false", "--data.val_size", str(size // 5)]
        flags += ["--name", f"open_set/{parent.name}", "--seed_everything", str(split), *more]
        layers = [word for config in configs for word in ("--config", str(config))]
        subprocess.run([sys.executable, "train.py", "fit", *layers, *flags], check=True)
        name = ["--name", f"open_set/{parent.name}"]
        test = [sys.executable, "train.py", "test", "--ckpt_path", "best", *name]
        subprocess.run(test, check=True)
        tested = sorted(parent.glob("version_*/test.npz"))
    folder = tested[-1].parent
    result = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    checkpoint = read_checkpoint(folder / "checkpoints" / result["checkpoint"])
    with np.load(folder / "test.npz") as content:
        logits, labels = torch.from_numpy(content["logits"]), torch.from_numpy(content["labels"])
    least = checkpoint["unsure_below"]
    return measured(logits, labels, checkpoint["temperature"], least)


def main() -> None:
    """Run all splits; print the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, action="append")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--root", default="data", help="folder of the images")
    parser.add_argument("--json", type=Path, help="write the figures of every split to this file")
    args, more = parser.parse_known_args()
    if missing := [config for config in args.config if not config.is_file()]:
        parser.error(f"no such file: {missing[0]}")
    data = archive.load(args.root)
    results = [run(args.config, split, data, more) for split in range(args.splits)]
    table = Table(box=box.SIMPLE, header_style="bold")
    table.add_column(args.config[-1].name)
    table.add_column(f"mean of {len(results)}", justify="right")
    table.add_column("of each split")
    for key, title in TITLES.items():
        values = [100 * result[key] for result in results]
        each = ", ".join(f"{value:.1f}" for value in values)
        table.add_row(title, f"{np.mean(values):.1f} %", each)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
