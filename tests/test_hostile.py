"""Malicious files are refused in one line, and none of their code runs."""

import copyreg
import io
import pickle
import pickletools
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cifar10 import archive
from runs import read_checkpoint
from tests.conftest import Run

TRIPPED: list[object] = []


class Trap:
    """Records when it is created, by whatever means."""

    def __new__(cls, *args: object, **kwargs: object) -> "Trap":
        TRIPPED.append(args)
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        TRIPPED.append(state)


copyreg.add_extension(__name__, "Trap", 200)


def word(text: str) -> bytes:
    """Return the opcode for a short text."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


# Every opcode that imports, with Trap, and every way to make an object from the import.
IMPORTS = {
    "GLOBAL": f"c{__name__}\nTrap\n".encode(),
    "STACK_GLOBAL": word(__name__) + word("Trap") + b"\x93",
    "EXT1": b"\x82\xc8",
    "EXT2": b"\x83\xc8\x00",
    "EXT4": b"\x84\xc8\x00\x00\x00",
}
CALLS = {
    "REDUCE": lambda found: found + b")R",
    "NEWOBJ": lambda found: found + b")\x81",
    "NEWOBJ_EX": lambda found: found + b")}\x92",
    "OBJ": lambda found: b"(" + found + b"o",
    "BUILD": lambda found: found + b")R}X\x01\x00\x00\x00aK\x01sb",
}
PAYLOADS = {
    f"{name} {call}": CALLS[call](found) for name, found in IMPORTS.items() for call in CALLS
}
PAYLOADS["INST"] = f"(i{__name__}\nTrap\n".encode()
# Functions that do more than record a call.
OTHERS = ["os\nsystem", "builtins\neval", "builtins\n__import__", "torch\nload", "shutil\nrmtree"]

payloads = st.one_of(
    st.sampled_from(list(PAYLOADS.values())),
    st.sampled_from(OTHERS).map(lambda name: f"c{name}\n(X\x01\x00\x00\x001tR".encode()),
)


def wrapped(payload: bytes, depth: int, as_key: bool) -> bytes:
    """Return a pickled batch with a payload in nested lists, or as a key."""
    inner = b"]" * depth + payload + b"a" * depth
    item = inner + b"K\x01" if as_key and not depth else b"K\x01" + inner
    return b"\x80\x04}(" + item + b"u."


hidden = st.builds(wrapped, payloads, st.integers(0, 4), st.booleans())


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_traps_do_trip_where_pickles_are_trusted(name: str) -> None:
    TRIPPED.clear()
    pickle.loads(wrapped(PAYLOADS[name], 2, as_key=False))
    assert TRIPPED


def test_no_opcode_that_imports_is_left_out() -> None:
    """Find every opcode that can name code in the standard library's table."""
    naming = {op.name for op in pickletools.opcodes if "GLOBAL" in op.name or "EXT" in op.name}
    assert naming - {"NEXT_BUFFER", "READONLY_BUFFER"} == set(IMPORTS)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=hidden, as_arrays=st.booleans())
def test_no_pickle_of_the_data_set_runs_anything(
    content: bytes, as_arrays: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neither in the official files, whose checksums then differ, nor in an array of objects."""
    root = tmp_path_factory.mktemp("hostile")
    if as_arrays:
        header = io.BytesIO()
        objects = {"descr": "|O", "fortran_order": False, "shape": (1,)}
        np.lib.format.write_array_header_1_0(header, objects)
        files = {f"{name}.npy": header.getvalue() + content for name in archive.SHA256}
    else:
        files = dict.fromkeys(archive.BATCH_MD5, content)
    folder = root / (archive.FOLDER if as_arrays else "cifar-10-batches-py")
    folder.mkdir()
    for name, file in files.items():
        (folder / name).write_bytes(file)
    TRIPPED.clear()
    message = "is damaged" if as_arrays else "data_batch_1 is missing, truncated or altered"
    with pytest.raises(archive.CIFAR10Error, match=message) as refused:
        archive.load(root, verify=False, download=False)
    assert "\n" not in str(refused.value)
    assert not TRIPPED
    assert [path.name for path in root.iterdir()] == [folder.name]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=hidden, zipped=st.booleans())
def test_no_checkpoint_runs_anything(
    content: bytes, zipped: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.ckpt"
    if zipped:
        torch.save({}, path)
        with zipfile.ZipFile(path) as good:
            parts = {name: good.read(name) for name in good.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as bad:
            for name, part in parts.items():
                bad.writestr(name, content if name.endswith("data.pkl") else part)
    else:
        path.write_bytes(content)
    TRIPPED.clear()
    with pytest.raises(MisconfigurationException, match="is not a checkpoint"):
        read_checkpoint(path)
    assert not TRIPPED


def member(name: str, content: bytes = b"", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


def test_an_archive_of_another_checksum_is_not_even_opened(
    batches: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links, files outside its folder, and content that would fill memory do nothing."""
    root, outside = tmp_path / "data", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    links = [
        member("cifar-10-batches-py/data_batch_1", type=tarfile.SYMTYPE,
               linkname=str(outside / "secret")),
        member("cifar-10-batches-py/data_batch_2", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    ]  # fmt: skip
    strays = [member("../outside/stray", b"x"), member(str(outside / "stray"), b"x")]
    bomb = [member("c/data_batch_1", bytes(1 << 26))]
    rest = [member(f"c/{name}", content) for name, content in batches.items()]
    with tarfile.open(root / archive.ARCHIVE, "w:gz") as packed:
        for info, content in (*links, *strays, *bomb, *rest):
            packed.addfile(info, io.BytesIO(content))
    opened: list[object] = []
    monkeypatch.setattr(archive.tarfile, "open", lambda *args, **_: opened.append(args))
    with pytest.raises(archive.CIFAR10Error, match=f"{archive.ARCHIVE} is missing, truncated or"):
        archive.load(root, verify=False, download=False)
    assert not opened
    assert not list(outside.iterdir())
    assert [path.name for path in root.iterdir()] == [archive.ARCHIVE]


POPEN = "{class_path: subprocess.Popen, init_args: {args: [mkdir, proof]}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.mkdir [proof]", "could not determine a constructor"),
        ("model: {network: {class_path: os.mkdir, init_args: {path: proof}}}", "os.mkdir"),
        (f"model: {{network: {POPEN}}}", "subprocess.Popen"),
        (f"model: {{optimizer: {POPEN}}}", "subprocess.Popen"),
        (f"model: {{lr_scheduler: {POPEN}}}", "subprocess.Popen"),
        (f"trainer: {{callbacks: [{POPEN}]}}", "subprocess.Popen"),
        (f"trainer: {{logger: [{POPEN}]}}", "subprocess.Popen"),
        (f"data: {{augment: [{POPEN}]}}", "subprocess.Popen"),
        (f"data: {{root: {POPEN}}}", "data.root"),
    ],
)
def test_a_yaml_builds_nothing_but_what_belongs_there(
    fails: Run, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "hostile.yaml").write_text(text)
    assert message in fails("fit", "--config", tmp_path / "hostile.yaml")
    assert not Path("proof").exists()
    shutil.rmtree("runs", ignore_errors=True)
