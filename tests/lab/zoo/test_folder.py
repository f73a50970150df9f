"""Image folders: order, classes, and the resize and crop of the usual evaluation."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intrafusion.errors import FolderError
from intrafusion.lab.zoo import Normalisation, open_folder
from intrafusion.lab.zoo.folder import read_cropped
from intrafusion.network.sources import import_torchvision

PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), white=1.0)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five one-coloured images in three classes, written out of order, and a file that is no image."""
    for i, name in enumerate(["n02/b.PNG", "n01/z.png", "n02/a.png", "n10/c.png", "n01/y.webp"]):
        save(tmp_path / name, np.full((12, 16, 3), 10 * i, dtype=np.uint8))
    (tmp_path / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "labels.csv").write_text("no class")
    return tmp_path


def test_classes_and_files_are_sorted_and_read_in_batches(root: Path) -> None:
    folder = open_folder(root, PLAIN, resize=8, crop=6)
    assert folder.classes == ("n01", "n02", "n10")
    batches = list(folder.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [label for batch in batches for label in batch.labels.tolist()] == [0, 0, 1, 1, 2]
    images = torch.cat([batch.images for batch in batches])
    assert images.shape == (5, 3, 6, 6)
    assert images.flatten(1).unique(dim=1).squeeze(1).tolist() == [40, 10, 20, 0, 30]
    assert (images.dtype, batches[0].labels.dtype) == (torch.float32, torch.int64)


def test_images_are_read_when_asked_for(root: Path) -> None:
    folder = open_folder(root, PLAIN, resize=8, crop=6)
    (root / "n10" / "c.png").write_bytes(b"junk")
    batches = folder.batches(4)
    assert len(next(batches)) == 4
    with pytest.raises(FolderError, match=r"n10/c.png: expected a readable image"):
        next(batches)


def test_a_sample_is_seeded_and_keeps_the_labels(root: Path) -> None:
    folder = open_folder(root, PLAIN)
    first, again = folder.sample(3, seed=1), folder.sample(3, seed=1)
    assert len(first) == 3
    assert first.files == again.files != folder.sample(3, seed=2).files
    assert set(first.files) <= set(folder.files)
    assert sorted(folder.sample(99).files) == sorted(folder.files)


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(256, 300, 16, 38), (400, 256, 88, 16), (256, 256, 16, 16)]
)
def test_an_image_of_the_right_size_is_only_cropped(
    tmp_path: Path, height: int, width: int, top: int, left: int
) -> None:
    pixels = noise(height, width)
    path = save(tmp_path / "x.png", pixels)
    assert np.array_equal(read_cropped(path, 256, 224), pixels[top : top + 224, left : left + 224])


@pytest.mark.parametrize(("height", "width"), [(100, 70), (33, 91), (64, 64)])
def test_resize_and_crop_agree_with_torchvision(tmp_path: Path, height: int, width: int) -> None:
    try:
        transforms = import_torchvision().transforms
    except ModuleNotFoundError:
        pytest.skip("needs torchvision")
    path = save(tmp_path / "x.png", noise(height, width))
    usual = transforms.Compose([transforms.Resize(48), transforms.CenterCrop(40)])
    with Image.open(path) as image:
        assert np.array_equal(read_cropped(path, 48, 40), np.asarray(usual(image)))


def test_grey_images_become_coloured(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", noise(10, 10)[..., 0])
    pixels = read_cropped(path, 10, 10)
    assert np.array_equal(pixels, np.repeat(noise(10, 10)[..., :1], 3, axis=2))


def test_an_image_too_large_to_be_one(tmp_path: Path) -> None:
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 60000, 60000, 1, 24, *[0] * 6
    )
    (tmp_path / "bomb.bmp").write_bytes(header)
    with pytest.raises(
        FolderError, match=r"bomb.bmp: expected a readable image, got: Image size \(3600000000 pixels\)"
    ):
        read_cropped(tmp_path / "bomb.bmp", 10, 10)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="expected one subfolder per class with .jpg, .* images, found none"):
        open_folder(tmp_path, PLAIN)
    with pytest.raises(FolderError, match="absent: expected one subfolder per class"):
        open_folder(tmp_path / "absent", PLAIN)


def test_a_crop_larger_than_the_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 1 <= crop <= resize, got crop 300 and resize 256"):
        open_folder(tmp_path, PLAIN, crop=300)
