"""Unreadable image files do not stop the others, and the reason is given."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar10 import pictures
from cifar10.pictures import Pictures, find_pictures, read_picture, why_unreadable


@pytest.fixture
def png(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.png")
    return tmp_path / "good.png"


def unreadable(folder: Path, content: bytes) -> dict[str, str]:
    """Write unreadable files; return the expected reason for each name."""
    heic = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    (folder / "phone.HEIC").write_bytes(heic)
    Image.new("1", (14_000, 14_000)).save(folder / "huge.png")
    (folder / os.fsdecode(b"worse\xff.png")).write_bytes(content[:100])
    damaged = "not an image, or damaged"
    return {
        "cut.png": damaged,
        "empty.jpg": damaged,
        "notes.txt": damaged,
        "phone.HEIC": "HEIC needs pip install pillow-heif",
        "huge.png": "larger than Pillow's limit of 178,956,970 pixels",
        os.fsdecode(b"worse\xff.png"): damaged,
    }


def test_what_cannot_be_read_does_not_stop_the_others_and_says_why(
    png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "HAS_HEIF", False)
    reasons = unreadable(png.parent, png.read_bytes())
    (png.parent / os.fsdecode(b"bad\xff.png")).write_bytes(png.read_bytes())
    files = find_pictures(str(png.parent))
    (batch,) = Pictures(files).batches()
    skipped = {file.name for file in files} - {files[i].name for i in batch.indices}
    assert skipped == set(reasons)
    assert len(batch.images) == 2
    assert {name: why_unreadable(png.parent / name) for name in skipped} == reasons
    assert all(name.isprintable() for name in reasons.values())


def test_a_file_whose_name_is_not_utf_8_is_read_as_any_other(png: Path) -> None:
    odd = png.with_name(os.fsdecode(b"bad\xff.png"))
    png.rename(odd)
    for words in (str(odd), str(odd.parent), str(odd.parent / "*.png")):
        assert find_pictures(words) == [odd]
    assert read_picture(odd).shape == (3, 32, 32)


def test_the_reason_of_the_system_is_passed_on(tmp_path: Path, png: Path) -> None:
    assert why_unreadable(tmp_path / "gone.png") == "No such file or directory"
    assert why_unreadable(tmp_path) == "Is a directory"
    assert "second attempt" in why_unreadable(png)


def test_a_damaged_heic_file_is_called_so_where_heic_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "HAS_HEIF", True)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x1cftypheic")
    assert why_unreadable(tmp_path / "a.heic") == "not an image, or damaged"


@pytest.mark.skipif(not pictures.HAS_HEIF, reason="pillow-heif is not installed")
def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    Image.new("RGB", (320, 320), "red").save(tmp_path / "a.heic")
    assert read_picture(tmp_path / "a.heic")[:, 16, 16].tolist() == pytest.approx(
        [255, 0, 0], abs=8
    )
