"""Export a checkpoint, for use without this project or as a small file to share.

    python export.py --ckpt_path X --format onnx --out model.onnx
    python export.py --ckpt_path X --format torch --out model.pt2       # a torch.export program
    python export.py --ckpt_path X --format safetensors --out model.safetensors    # weights, card
    python export.py --ckpt_path X --format page --out page             # to try it in a browser
    python export.py --ckpt_path X --format checkpoint --out small.ckpt # to share

X is a path, or `best --name base` for the newest run of that name. ONNX, torch and page map pixels
uint8 [B, 3, 32, 32] to probabilities float32 [B, classes]; normalisation, test-time augmentation,
calibration and softmax are included. Before an export is written, it is loaded and compared with
the checkpoint on 1,000 test images (to share: on all). docs/export.md shows how to use each.
"""

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import logging
import shlex
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import instantiate_module
from torch import Tensor, nn

from calibration import UNKNOWN, is_file, notes_on
from cifar10 import archive
from cifar10.arrays import classes_in
from lightning_module import ImageClassifier
from reports.card import parts_of, said_of_probabilities
from runs import named, read_checkpoint, run_of, settings_of, write_whole
from terminal import ShortParser, innermost, short_errors

Card = dict[str, Any]
Predict = Callable[[Tensor], Tensor]

SUFFIXES = {
    "onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors", "page": "",
    "checkpoint": ".ckpt",
}  # fmt: skip
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_BYTES = 33_106_585
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
PAGE_FILES = {"index.html", "model.onnx", *RUNTIME_FILES}
CARD_OF_PAGE = ("classes", "recipe", "epoch", "calibrated", "unsure_below")
COMPARED = 1000  # test images
DIGEST = "- **SHA-256**: "  # in the card of a shared checkpoint
MAY_DIFFER = 0.0005  # share of images whose class half precision may change
SHARED = (  # checkpoint keys that aren't only for resuming
    "epoch", "global_step", "pytorch-lightning_version", "hparams_name", "hyper_parameters",
    "datamodule_hparams_name", "datamodule_hyper_parameters", "temperature", "unsure_below",
)  # fmt: skip
EXAMPLE = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)  # one image would fix the batch size
SHAPES = ({0: torch.export.Dim("batch", min=1)},)


class Classifier(nn.Module):
    """A trained model that maps pixels to probabilities, as in `predict`."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 [B, 3, 32, 32] to probabilities float32 [B, classes]."""
        return self.model.probabilities(pixels)


def load(
    path: Path, checkpoint: dict[str, Any], root: str | None, calibrate: bool | str | None
) -> tuple[Classifier, Card, Tensor]:
    """Return the classifier of a checkpoint, its card, and test images uint8 [N, 3, 32, 32] from
    `root`, by default the checkpoint's `data.root`. `calibrate` overrides `model.calibrate` unless
    it is None. The checkpoint is loaded as data: none of its code runs."""
    overrides = {} if calibrate is None else {"calibrate": calibrate}
    try:
        # Override the instantiator that the file names.
        builder = "lightning.pytorch.cli.instantiate_module"
        model = ImageClassifier.load_from_checkpoint(path, _instantiator=builder, **overrides)
    except ArgumentError as error:
        reason = " ".join(str(innermost(error)).split())
        raise MisconfigurationException(f"{path}: can't build its network: {reason}") from error
    settings = settings_of(checkpoint)
    data = settings["data"] | ({"root": root} if root else {})
    data = {key: data[key] for key in ("root", "download", "sources", "verify") if key in data}
    unchanged = torch.zeros(3), torch.ones(3)
    mean, std = (model.mean, model.std) if model.is_normalizing else unchanged
    rows = _own_rows(checkpoint)
    metrics = rows[0] if rows else {}
    card: Card = {
        "network": settings["model"]["network"],
        "classes": model.classes,
        "input": "float32 [B, 3, 32, 32], RGB: pixels / 255, then (x - mean) / std per channel",
        "mean": mean.flatten().tolist(),
        "std": std.flatten().tolist(),
        "output": "logits [B, classes]; softmax of logits / temperature is the probabilities",
        "temperature": model.temperature or 1.0,
        "calibrated": model.temperature is not None,
        "unsure_below": model.calibration.unsure_below if model.temperature else None,
        "test_time_augmentation": model.tta,
        "recipe": settings.get("name"),
        "epoch": checkpoint["epoch"],
        **{key: metrics[key] for key in ("val/acc", "val/loss") if key in metrics},
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
    }
    images, folder = archive.load(**data).test_images, data.get("root", "data")
    if (classes_in(folder) or archive.CLASSES) != model.classes:
        raise MisconfigurationException(
            f"the images in {folder} have other classes than the model: set --data.root"
        )
    return Classifier(model).eval(), card, images


# ------------------------------------------------------------------------------------- formats


def export_onnx(classifier: Classifier, card: Card) -> tuple[bytes, Predict]:
    """Return an ONNX model, and a function that predicts with ONNX Runtime."""
    import onnxruntime  # an optional dependency

    program = torch.onnx.export(
        classifier, (EXAMPLE,), dynamo=True, verbose=False, external_data=False,
        input_names=["images"], output_names=["probabilities"], dynamic_shapes=SHAPES,
        opset_version=18,  # the oldest that this exporter writes
    )  # fmt: skip
    assert program is not None
    names = ("classes", "recipe", "epoch", "val/acc", "calibrated", "unsure_below")
    keys = [key for key in names if key in card]
    program.model.metadata_props.update({key: json.dumps(card[key]) for key in keys})
    content = program.model_proto.SerializeToString()
    run = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run
    return content, lambda pixels: torch.from_numpy(run(None, {"images": pixels.numpy()})[0])


def export_torch(classifier: Classifier, card: Card) -> tuple[bytes, Predict]:
    """Return a `torch.export` program, and a function that predicts with it after loading."""
    program = torch.export.export(classifier, (EXAMPLE,), dynamic_shapes=SHAPES)
    inside = ("mean", "std", "temperature")
    metadata = {key: value for key, value in card.items() if key not in inside}
    metadata["input"] = "uint8 [B, 3, 32, 32], RGB"
    metadata["output"] = "probabilities float32 [B, classes]"
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"card.json": json.dumps(metadata)})
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


def export_safetensors(classifier: Classifier, card: Card) -> tuple[bytes, Predict]:
    """Return the network's weights with the card as metadata, and a model that is built from these
    alone."""
    from safetensors.torch import load, save

    weights = classifier.model.network.state_dict()
    weights = {key: value.clone().contiguous() for key, value in weights.items()}  # unties weights
    content = save(weights, {"card": json.dumps(card)})
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    stored = json.loads(header["__metadata__"]["card"])
    arguments = {"network": stored["network"], "tta": stored["test_time_augmentation"]}
    arguments["normalize"] = {key: stored[key] for key in ("mean", "std")}
    arguments["classes"] = stored["classes"]
    model = instantiate_module(ImageClassifier, arguments)
    model.network.load_state_dict(load(content))
    model.calibration.temperature = stored["temperature"]
    return content, Classifier(model).eval()


FORMATS = {
    "onnx": export_onnx,
    "torch": export_torch,
    "safetensors": export_safetensors,
    "page": export_onnx,
}


def export_checkpoint(
    classifier: Classifier, checkpoint: dict[str, Any], images: Tensor
) -> tuple[bytes, str]:
    """Return a checkpoint with weights, config and its epoch's metrics, and a note on precision:
    half if that changes the class of at most 0.05 % of `images`, otherwise unchanged."""
    weights = checkpoint["state_dict"]
    halves = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    expected, small = predicted(classifier, images), _shared(checkpoint, halves)
    restored = copy.deepcopy(classifier)
    restored.model.load_state_dict(torch.load(io.BytesIO(small), weights_only=True)["state_dict"])
    if not expected.isfinite().all():
        raise MisconfigurationException("the network's outputs are NaN: it is not exported")
    changed = int((expected.argmax(dim=1) != predicted(restored, images).argmax(dim=1)).sum())
    note = f"half precision changes the class of {changed} of {len(images):,} test images"
    if changed <= MAY_DIFFER * len(images):
        return small, note
    return _shared(checkpoint, weights), f"{note}, so single is kept"


def _shared(checkpoint: dict[str, Any], weights: dict[str, Tensor]) -> bytes:
    """Return a checkpoint with these weights, without what is only for resuming and without the
    locations of its images and loggers."""
    run = copy.deepcopy(checkpoint.get("run", {}))
    run.pop("started_in", None)
    for key in ("logger", "default_root_dir"):
        run.get("trainer", {}).pop(key, None)
    for part in run.get("parts", []):
        part.pop("settings", None)
    shared = {key: copy.copy(checkpoint[key]) for key in SHARED if key in checkpoint}
    shared.get("datamodule_hyper_parameters", {}).pop("root", None)
    history = {"rows": _own_rows(checkpoint)}
    shared |= {"state_dict": weights, "callbacks": {"History": history}, "run": run}
    file = io.BytesIO()
    torch.save(shared, file)
    return file.getvalue()


def _own_rows(checkpoint: dict[str, Any]) -> list[dict[str, float]]:
    """Return the metrics of a checkpoint's epoch; a weights-only checkpoint may have none."""
    rows = checkpoint.get("callbacks", {}).get("History", {}).get("rows", [])
    return [row for row in rows if row["epoch"] == checkpoint["epoch"]]


def card_of_file(
    path: Path, out: Path, content: bytes, precision: str, card: Card, calibrated: str
) -> str:
    """Return the card of a checkpoint to share: its run's card, with the test result of this epoch,
    whether probabilities are calibrated, and details of the file."""
    cards = (run_of(path) / "model.md", path.with_suffix(".md"))  # of a run, of a shared one
    texts = [file.read_text(encoding="utf-8") for file in cards if file.exists()]
    text, result, _ = parts_of((texts or [f"# {out.stem}\n"])[0])
    # Others lack the run's config.yaml; the checkpoint contains it.
    skipped = tuple(f"- **{key}**" for key in ("Repeat", "Probabilities", "File", "SHA-256"))
    text = "".join(line for line in text.splitlines(True) if not line.startswith(skipped))
    text += f"- **Probabilities**: {calibrated}\n"
    accuracy = f", validation accuracy {card['val/acc']:.2%}" if "val/acc" in card else ""
    text += f"- **File**: `{out.name}`, epoch {card['epoch']}{accuracy}, {len(content):,} bytes; "
    text += f"{precision}\n{DIGEST}{hashlib.sha256(content).hexdigest()}\n"
    if f"Of epoch {card['epoch']} (" in result:
        return text + result
    print(f"the card has no test result of epoch {card['epoch']}: run `train.py test` first")
    return text


def page_files(model: bytes, card: Card) -> dict[str, bytes]:
    """Return the files of a page: HTML, an ONNX model, and ONNX Runtime Web from npm."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            package = archive.npm_pack(RUNTIME, Path(scratch), total=RUNTIME_BYTES)
        except archive.CIFAR10Error as error:
            raise MisconfigurationException(
                f"--format page needs {RUNTIME} from npm, but {error}: install npm, or check that "
                "it reaches its registry"
            ) from error
        with tarfile.open(package) as tar:
            members = {name: tar.extractfile(f"package/dist/{name}") for name in RUNTIME_FILES}
            files = {name: member.read() for name, member in members.items() if member}
    card_json = json.dumps({key: card[key] for key in CARD_OF_PAGE})
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = page.replace("CARD", card_json.replace("<", "\\u003c"))
    return {"index.html": page.encode(), "model.onnx": model, **files}


# ----------------------------------------------------------------------------------- the command


@torch.no_grad()
def predicted(predict: Predict, images: Tensor) -> Tensor:
    """Return the probabilities [N, classes] of images uint8 [N, 3, 32, 32]."""
    return torch.cat([predict(part) for part in torch.split(images, 250)])


def compare(expected: Predict, found: Predict, images: Tensor) -> float:
    """Return the largest difference between two predictions of probabilities. Raise if it is 0.001
    or more, or if the class of any image differs, except in near ties."""
    target, output = predicted(expected, images), predicted(found, images)
    difference = float((target - output).abs().max())
    # How much less probable the export's class is than the checkpoint's.
    behind = target.max(dim=1).values - target.gather(1, output.argmax(dim=1, keepdim=True))[:, 0]
    if wrong := int((behind > 1e-4).sum()):
        raise MisconfigurationException(
            f"the export predicts another class for {wrong} of {len(images)} images: not written"
        )
    if not difference < 1e-3:  # NaN included
        raise MisconfigurationException(
            f"the export's probabilities differ by {difference:.1e}: not written"
        )
    return difference


def _check(format_: str, out: Path, overwrite: bool) -> None:
    """Raise on an unusable format or output, before any work. A run's files are never overwritten:
    only its checkpoints and card share a suffix with exports, and those are checked."""
    if format_ not in SUFFIXES:
        raise MisconfigurationException(
            f"--format {format_}: expected onnx, torch, safetensors (for weights), page or "
            "checkpoint (to share)"
        )
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if format_ in ("onnx", "page") and missing:
        raise MisconfigurationException(
            f"--format {format_} needs {', '.join(missing)}: pip install -e '.[export]'"
        )
    suffix, is_page = SUFFIXES[format_], format_ == "page"
    if out.name in ("", "..") or (suffix and out.suffix != suffix):
        expected = "a new folder" if is_page else f"a file that ends in {suffix}"
        raise MisconfigurationException(f"--out {out}: name {expected}")
    is_shared = format_ == "checkpoint"
    for path in (out, out.with_suffix(".md")) if is_shared else (out,):
        if not path.exists():
            continue
        if is_page:
            is_export = path.is_dir() and {file.name for file in path.iterdir()} <= PAGE_FILES
        elif path.suffix == ".md":
            is_export = DIGEST in path.read_text(encoding="utf-8")
        else:
            is_export = path.is_file() and path.parent.name != "checkpoints"
            if is_shared and is_export:
                is_export = "optimizer_states" not in read_checkpoint(path)
        if not is_export:
            raise MisconfigurationException(
                f"--out {path} exists and is not an export: choose another path"
            )
        if not overwrite:
            raise MisconfigurationException(f"--out {path} exists: add --overwrite to replace it")


@contextlib.contextmanager
def _exporting(format_: str, network: nn.Module) -> Iterator[None]:
    """Turn an exporter's failure into a one-line error, and hide its progress output."""
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise):
            yield
    except Exception as error:  # exporters raise exceptions of any kind
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise MisconfigurationException(
            f"--format {format_} does not support {type(network).__name__} ({reason})"
            + (": use --format safetensors" if format_ != "safetensors" else "")
        ) from error


def write_folder(out: Path, files: dict[str, bytes]) -> None:
    """Write a folder of files that is never seen half-written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            for name, content in files.items():
                write_whole(Path(scratch, "new", name), content)
            if out.is_dir():  # unlike a file, it can't be replaced in one step
                out.replace(Path(scratch, "earlier"))
            Path(scratch, "new").replace(out)
    except OSError as error:
        raise MisconfigurationException(f"--out {out}: {error.strerror}") from error


@short_errors()
def main(args: list[str] | None = None) -> None:
    """Run the command line. A user's mistake prints one line and exits with a non-zero code."""
    warnings.filterwarnings("ignore", module="torch")
    parser = ShortParser(prog="export.py", description="Export a checkpoint.")
    parser.add_argument("--ckpt_path", type=str, required=True, help="the checkpoint")
    parser.add_argument(
        "--name", type=str, default="default", help="the run's name, for --ckpt_path best or last"
    )
    parser.add_argument("--format", type=str, required=True, help=" | ".join(SUFFIXES))
    parser.add_argument("--out", type=str, required=True, help="a file, or a folder for page")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--data.root", type=str | None, default=None, help="images to compare on; null: the run's"
    )
    text = "false: don't calibrate; a checkpoint: use its temperature; null: as in the run"
    parser.add_argument("--model.calibrate", type=bool | str | None, default=None, help=text)
    options = parser.parse_args(args)
    out, format_ = Path(options.out), options.format
    _check(format_, out, options.overwrite)
    path = named(options.ckpt_path, Path("runs", options.name))
    checkpoint = read_checkpoint(path)
    if (calibrate := options.model.calibrate) is not None and format_ == "checkpoint":
        raise MisconfigurationException(
            "--format checkpoint keeps its run's calibration: give --model.calibrate when the file "
            "is tested or exported"
        )
    if calibrate is not None and is_file(calibrate):
        for note in notes_on(calibrate, settings_of(checkpoint)):
            print(f"note: {note}")
    classifier, card, images = load(path, checkpoint, options.data.root, calibrate)
    classifier(EXAMPLE)  # a bug in the network shows its traceback here
    if not card["calibrated"]:
        is_off = not classifier.model.calibrates
        reason = "model.calibrate is false" if is_off else f"{path} {UNKNOWN}"
        print(f"probabilities are not calibrated: {reason}")
    if format_ == "checkpoint":
        content, precision = export_checkpoint(classifier, checkpoint, images)
        saved = settings_of(checkpoint)["model"].get("calibrate", "auto")
        calibrated = said_of_probabilities(saved, classifier.model.temperature)
        described = card_of_file(path, out, content, precision, card, calibrated)
        write_whole(out, content)
        write_whole(out.with_suffix(".md"), described.encode())
        print(f"{precision}\nwritten to {out} and {out.with_suffix('.md')}")
        return
    with _exporting(format_, classifier.model.network):
        exported, predict = FORMATS[format_](classifier, card)
        predict(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))  # another batch size
    images = images[:COMPARED]
    difference = compare(classifier, predict, images)
    if format_ == "page":
        write_folder(out, page_files(exported, card))
    else:
        write_whole(out, exported)
    print(
        f"compared with the checkpoint on {len(images):,} test images: same classes, probabilities "
        f"within {difference:.1e}"
    )
    print(f"written to {out}")
    if format_ == "page":
        server = f"python -m http.server --directory {shlex.quote(str(out))}"
        print(f"view    {server}    then http://localhost:8000")


if __name__ == "__main__":
    main()
