"""The third door: a checkpoint leaves as a file that needs nothing of this project.

    python export.py --ckpt_path X --format onnx --out model.onnx
    python export.py --ckpt_path X --format torch --out model.pt2       # a torch.export program
    python export.py --ckpt_path X --format weights --out model.pth     # with a card, model.json
    python export.py --ckpt_path X --format page --out page             # to try it in a browser

The first two take pixels uint8 [B, 3, 32, 32] and return probabilities float32 [B, 10]: what the
recipe does to pixels is inside. Each export is loaded again and compared with the checkpoint on
1,000 test images before it is there; docs/export.md says how each is used.
"""

import contextlib
import importlib.util
import io
import json
import logging
import shlex
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning
import requests
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from cifar10 import archive
from cifar10.augment import Normalize, TestTimeAugmentation, Transform, average_over_views
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from runs import read_checkpoint, with_checkpoint_settings
from terminal import KNOWN_ERRORS, OneLineParser, errors_in_one_line, quieten

Predict = Callable[[Tensor], Tensor]

NEEDS = ("onnx", "onnxscript", "onnxruntime")
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_BYTES = 33_106_585
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
PAGE_FILES = {"index.html", "model.onnx", *RUNTIME_FILES}
COMPARED = 1000  # test images


class Classifier(nn.Module):
    """A network from pixels to probabilities."""

    def __init__(self, network: nn.Module, transform: Transform, tta: TestTimeAugmentation) -> None:
        super().__init__()
        self.network = network
        self.transform = transform
        self.tta = tta

    def forward(self, images: Tensor) -> Tensor:
        """Map pixels uint8 [B, 3, 32, 32] to probabilities float32 [B, 10]."""
        # Indices matter to augmentation only, which evaluation leaves out.
        images = self.transform(images, images)
        return average_over_views(self.network, images, self.tta).softmax(dim=1)


def load(path: str, root: str | None) -> tuple[Classifier, dict[str, Any], Tensor]:
    """Return the classifier of a checkpoint, its card, and test images uint8 [N, 3, 32, 32].

    Args:
        path: The checkpoint, which is read as data; it runs no code.
        root: The folder of the images, if not the checkpoint's.

    Raises:
        MisconfigurationException: No such checkpoint, or not one of this laboratory.
        CIFAR10Error: The images cannot be had.
    """
    checkpoint = read_checkpoint(path)
    options: dict[str, Any] = {
        "map_location": "cpu",
        "weights_only": True,
        "_instantiator": "lightning.pytorch.cli.instantiate_module",  # whatever the file says
    }
    said = io.StringIO()  # by jsonargparse, many lines
    try:
        with contextlib.redirect_stderr(said):
            restored = with_checkpoint_settings(["test", "--ckpt_path", path], ["test"])[2]
            root = root or yaml.safe_load(restored)["data"].get("root", "data")
            model = ImageClassifier.load_from_checkpoint(path, **options)
            data = CIFAR10DataModule.load_from_checkpoint(path, **options, root=root)
        settings = checkpoint["hyper_parameters"]["network"]
        # A checkpoint of weights only has no callbacks.
        rows = checkpoint.get("callbacks", {}).get("History", {}).get("rows", [])
    except (SystemExit, Exception) as error:  # settings can be wrong in any way
        reason = " ".join(f"{said.getvalue() or error}".split())
        raise MisconfigurationException(
            f"{path} does not say how to build its network: {reason}"
        ) from error
    images = archive.load(
        data.root, download=data.download, sources=data.sources, verify=data.verify
    ).test_images
    chosen = [row for row in rows if row["epoch"] == checkpoint["epoch"]]
    card = {
        "network": settings,
        "classes": archive.CLASSES,
        "input": "float32 [B, 3, 32, 32], RGB: pixels / 255, then (x - mean) / std per channel",
        **_normalisation(data.augment),
        "output": "logits [B, 10]; softmax makes probabilities of them",
        "test_time_augmentation": model.tta,
        "recipe": checkpoint.get("run", {}).get("name"),
        "epoch": checkpoint["epoch"],
        **{key: row[key] for row in chosen for key in ("val/acc", "val/loss") if key in row},
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
    }
    classifier = Classifier(model.network, Transform(data.augment), model.tta)
    return classifier.eval(), card, images


def _normalisation(steps: Any) -> dict[str, list[float]]:
    """Return the mean and the standard deviation that all normalising steps together come to."""
    mean, std = torch.zeros(3), torch.ones(3)
    for step in steps:
        if isinstance(step, Normalize):
            mean, std = mean + std * step.mean.view(-1), std * step.std.view(-1)
    return {"mean": mean.tolist(), "std": std.tolist()}


# ------------------------------------------------------------------------------------- formats


def export_onnx(classifier: Classifier, card: dict[str, Any], file: Path) -> Predict:
    """Write an ONNX model, and return what ONNX Runtime makes of it."""
    import onnxruntime

    program = torch.onnx.export(
        classifier, (_example(),), dynamo=True, verbose=False, external_data=False,
        input_names=["images"], output_names=["probabilities"], dynamic_shapes=_dynamic(),
    )  # fmt: skip
    assert program is not None
    keys = {"classes", "recipe", "epoch", "val/acc"} & card.keys()
    program.model.metadata_props.update({key: json.dumps(card[key]) for key in sorted(keys)})
    program.save(file)
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def export_torch(classifier: Classifier, card: dict[str, Any], file: Path) -> Predict:
    """Write a `torch.export` program, and return it loaded again."""
    program = torch.export.export(classifier, (_example(),), dynamic_shapes=_dynamic())
    torch.export.save(program, file, extra_files={"card.json": json.dumps(card)})
    return torch.export.load(file).module()


def export_weights(classifier: Classifier, card: dict[str, Any], file: Path) -> Predict:
    """Write the network's weights and, in JSON beside them, how to use them; return a network built
    from the two."""
    torch.save(classifier.network.state_dict(), file)
    file.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    said = json.loads(file.with_suffix(".json").read_text())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("network", type=nn.Module)
    network = parser.instantiate(parser.parse_object({"network": said["network"]})).network
    network.load_state_dict(torch.load(file, weights_only=True))
    normalise, tta = Normalize(said["mean"], said["std"]), said["test_time_augmentation"]
    network.eval()
    return lambda images: average_over_views(network, normalise(images / 255), tta).softmax(dim=1)


def export_page(classifier: Classifier, card: dict[str, Any], folder: Path) -> Predict:
    """Write a folder with a page, the ONNX model, and what runs it in a browser, from npm."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            package = archive.npm_pack(RUNTIME, Path(scratch), total=RUNTIME_BYTES)
        except (archive.CIFAR10Error, requests.Timeout) as error:
            raise MisconfigurationException(
                f"--format page needs {RUNTIME} from npm, but {str(error) or 'it sent nothing'}: "
                "install npm, or see that it reaches its registry"
            ) from error
        with tarfile.open(package) as files:
            for name in RUNTIME_FILES:
                content = files.extractfile(f"package/dist/{name}")
                assert content is not None
                (folder / name).write_bytes(content.read())
    said = json.dumps({key: card[key] for key in ("classes", "recipe", "epoch")})
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = page.replace("CARD", said.replace("<", "\\u003c"))
    (folder / "index.html").write_text(page, encoding="utf-8")
    return export_onnx(classifier, card, folder / "model.onnx")


FORMATS = {
    "onnx": export_onnx,
    "torch": export_torch,
    "weights": export_weights,
    "page": export_page,
}


def _example() -> Tensor:
    return torch.zeros(2, 3, 32, 32, dtype=torch.uint8)  # of one image the batch would be fixed


def _dynamic() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1)},)


# ----------------------------------------------------------------------------------- the command


@torch.no_grad()
def compare(expected: Predict, found: Predict, images: Tensor) -> float:
    """Return the largest difference between two predictions of probabilities.

    Raises:
        MisconfigurationException: They name another class for any of the images, but for near ties,
            or differ by more than 0.001.
    """
    parts = [(expected(part), found(part)) for part in torch.split(images, 250)]
    ours, theirs = (torch.cat(part) for part in zip(*parts, strict=True))
    difference = float((ours - theirs).abs().max())
    # By how much the class that theirs names is less probable.
    behind = ours.max(dim=1).values - ours.gather(1, theirs.argmax(dim=1, keepdim=True))[:, 0]
    if wrong := int((behind > 1e-4).sum()):
        raise MisconfigurationException(
            f"the export names another class for {wrong} of {len(images)} images: it is not kept"
        )
    if not difference < 1e-3:  # as it is where the network says no numbers
        raise MisconfigurationException(
            f"the export's probabilities differ by {difference:.1e}: it is not kept"
        )
    return difference


def _check_packages(format_: str) -> None:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if format_ in ("onnx", "page") and missing:
        raise MisconfigurationException(
            f"--format {format_} needs {', '.join(missing)}: pip install -e '.[export]'"
        )


def _check_out(out: Path, options: Namespace) -> None:
    """Refuse to write over what is no earlier export."""
    checkpoint = Path(options.ckpt_path).resolve()
    if out.name in ("", ".."):
        raise MisconfigurationException(f"--out {out}: name a new file, or of a page a folder")
    if options.format == "page":
        there = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if (out.exists() and not out.is_dir()) or there not in (set(), PAGE_FILES):
            raise MisconfigurationException(f"--out {out} holds other things: name a new folder")
        return
    if options.format == "torch" and out.suffix != ".pt2":
        raise MisconfigurationException(f"--out {out}: PyTorch wants a name that ends in .pt2")
    if options.format == "weights" and out.suffix == ".json":
        raise MisconfigurationException(f"--out {out}: the weights' card will be the .json file")
    for file in [out] + [out.with_suffix(".json")] * (options.format == "weights"):
        if file.exists() and not file.is_file():
            raise MisconfigurationException(f"--out {file} is no file: name a new one")
        is_the_runs = file.suffix == ".ckpt" or (
            checkpoint.parent.name == "checkpoints"
            and checkpoint.parents[1] in file.resolve().parents
            and file.suffix not in (".onnx", ".pt2")  # which are earlier exports
        )
        if file.exists() and (is_the_runs or file.resolve() == checkpoint):
            raise MisconfigurationException(f"--out {file} is a file of the run: name a new one")
        if file != out and file.exists() and '"network"' not in file.read_text(errors="replace"):
            raise MisconfigurationException(f"--out {file} is no card of weights: name a new file")


def _write(options: Namespace, classifier: Classifier, card: dict[str, Any], file: Path) -> Predict:
    """Write a scratch file of the format, without what PyTorch says meanwhile.

    Raises:
        MisconfigurationException: The network has code that the format cannot hold.
    """
    noise = io.StringIO()
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise):
            predict = FORMATS[options.format](classifier, card, file)
            predict(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))  # a batch unlike the example's
    except KNOWN_ERRORS:
        raise
    except Exception as error:  # a network can be beyond a format in any way
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise MisconfigurationException(
            f"--format {options.format} cannot hold {type(classifier.network).__name__} ({reason})"
            + (": --format weights can" if options.format != "weights" else "")
        ) from error
    return predict


def _main(args: list[str]) -> None:
    parser = OneLineParser(prog="export.py", description="Export a checkpoint.")
    parser.add_argument("--ckpt_path", type=str, required=True, help="the checkpoint")
    parser.add_argument("--format", type=Literal[tuple(FORMATS)], required=True)
    parser.add_argument("--out", type=str, required=True, help="a file; of page a folder")
    parser.add_argument("--data.root", type=str | None, default=None, help="the images' folder")
    options = parser.parse_args(args)
    out = Path(options.out)
    _check_packages(options.format)
    _check_out(out, options)
    classifier, card, images = load(options.ckpt_path, options.data.root)
    # Folders that are not there yet are made when there is something to put into them.
    near = next(folder for folder in out.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=near) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        predict = _write(options, classifier, card, new / out.name)
        difference = compare(classifier, predict, images[:COMPARED])
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            out.replace(Path(scratch, "earlier"))
        for part in sorted(new.iterdir(), reverse=True):
            part.replace(out.with_name(part.name))
    count = min(COMPARED, len(images))
    print(f"the same classes for {count} test images, probabilities within {difference:.1e}")
    print(f"written to {out}")
    if options.format == "page":
        server = f"python -m http.server --directory {shlex.quote(str(out))}"
        print(f"view    {server}    then http://localhost:8000")


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake gives one line and an exit code that is not 0."""
    quieten()
    warnings.filterwarnings("ignore", module="torch")
    with errors_in_one_line():
        _main(sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    main()
