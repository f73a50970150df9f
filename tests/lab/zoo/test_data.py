"""Data sets of the zoo: packed files, MNIST, digits, their windows and normalisation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intrafusion.errors import FolderError
from intrafusion.lab import zoo
from intrafusion.lab.zoo import Images, Normalisation
from intrafusion.lab.zoo.digits import load_digits
from intrafusion.lab.zoo.npz import load_mnist, load_packed

PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), white=1.0)
GREY = Normalisation((0.0,), (1.0,), white=1.0)


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def pack(path: Path, split: str, encoded: list[bytes], labels: list[int]) -> Path:
    offset = np.cumsum([0, *map(len, encoded)])
    image = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    np.savez(path, **{f"{split}_image": image, f"{split}_offset": offset, f"{split}_label": np.array(labels)})
    return path


def encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return file.getvalue()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack(tmp_path / "packed.npz", "test", [encode(p) for p in noise(5, 8, 6, 3)], [4, 3, 2, 1, 0])


def test_packed_images_are_the_encoded_ones(packed: Path) -> None:
    data = load_packed(packed, "test", PLAIN)
    assert torch.equal(data.images, torch.tensor(noise(5, 8, 6, 3)).permute(0, 3, 1, 2).float())
    assert data.labels.tolist() == [4, 3, 2, 1, 0]
    assert (data.images.dtype, data.labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(("start", "limit", "labels"), [(0, 2, [4, 3]), (3, 1, [1]), (3, 9, [1, 0]), (4, None, [0])])
def test_a_window_reads_its_images_only(packed: Path, start: int, limit: int | None, labels: list[int]) -> None:
    part, whole = load_packed(packed, "test", PLAIN, start=start, limit=limit), load_packed(packed, "test", PLAIN)
    assert part.labels.tolist() == labels
    assert torch.equal(part.images, whole.images[start : start + len(labels)])


def test_images_outside_the_window_are_not_decoded(tmp_path: Path) -> None:
    path = pack(tmp_path / "half.npz", "test", [encode(noise(1, 4, 4, 3)[0]), b"no image"], [0, 1])
    assert len(load_packed(path, "test", PLAIN, limit=1)) == 1
    with pytest.raises(FolderError, match=r"half.npz: test image at byte \d+: expected a readable image"):
        load_packed(path, "test", PLAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 5}, r"expected a start in 0\.\.4, got 5"),
        ({"start": -1}, r"expected a start in 0\.\.4, got -1"),
        ({"limit": 0}, "expected a limit of at least 1 image .* got 0"),
    ],
)
def test_an_empty_window_is_an_error(packed: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_packed(packed, "test", PLAIN, **options)


def test_an_unknown_split_is_named_with_the_nearest(packed: Path) -> None:
    with pytest.raises(ValueError, match=r"packed.npz: unknown split 'tset'. Did you mean 'test'\?"):
        load_packed(packed, "tset", PLAIN)


@pytest.mark.parametrize(("sizes", "labels"), [((4, 4), [0]), ((4, 5), [0, 1])])
def test_packed_arrays_that_disagree(tmp_path: Path, sizes: tuple[int, ...], labels: list[int]) -> None:
    path = pack(tmp_path / "odd.npz", "test", [encode(noise(1, size, 4, 3)[0]) for size in sizes], labels)
    with pytest.raises(FolderError, match=r"odd.npz: expected test images of one size with one label each"):
        load_packed(path, "test", PLAIN)


@pytest.mark.parametrize("content", [None, b"", b"junk", b"PK\x03\x04 cut off", b"\x93NUMPY"])
def test_a_file_that_is_no_npz(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.npz"
    if content is not None:
        path.write_bytes(content)
    got = "none" if content is None else "a damaged or another one"
    with pytest.raises(FolderError, match=f"bad.npz: expected an .npz file, got {got}; fetch it again"):
        load_packed(path, "test", PLAIN)


def test_a_pickle_in_an_npz_is_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", test_x=np.zeros((1, 2, 2)), test_y=np.array([{}], dtype=object))
    with pytest.raises(FolderError, match=r"mnist.npz: expected a readable array test_y, got: .*allow_pickle=False"):
        load_mnist(tmp_path / "mnist.npz", "test", GREY)


def test_a_damaged_array_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    np.savez(path, test_x=noise(1, 28, 28), test_y=np.array([7]))
    content = path.read_bytes()
    at = content.index(noise(1, 28, 28).tobytes())
    path.write_bytes(content[:at] + b"\x00" * 100 + content[at + 100 :])
    with pytest.raises(FolderError, match=r"expected a readable array test_x, got: Bad CRC-32"):
        load_mnist(path, "test", GREY)


def test_mnist_arrays(tmp_path: Path) -> None:
    pixels = noise(4, 28, 28)
    np.savez(tmp_path / "mnist.npz", train_x=pixels, train_y=np.array([7, 8, 9, 0], dtype=np.uint8))
    data = load_mnist(tmp_path / "mnist.npz", "train", GREY, start=1, limit=2)
    assert torch.equal(data.images, torch.tensor(pixels[1:3, None]).float())
    assert data.labels.tolist() == [8, 9]


def test_normalisation_is_per_colour() -> None:
    normalise = Normalisation((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    out = normalise(np.array([[[[255, 0, 51]]]], dtype=np.uint8))
    torch.testing.assert_close(out, torch.tensor([1.0, -1.0, 0.2]).view(1, 3, 1, 1))


def test_images_want_one_label_each() -> None:
    with pytest.raises(ValueError, match="expected one label per image, got 3 images, 2 labels"):
        Images(torch.zeros(3, 1, 2, 2), torch.zeros(2))


def test_batches_are_consecutive() -> None:
    data = Images(torch.arange(5.0).view(5, 1, 1, 1), torch.arange(5))
    parts = list(data.batches(2))
    assert [part.labels.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([part.images for part in parts]), data.images)


def test_digits_are_scikit_learns_in_three_disjoint_parts() -> None:
    from sklearn.datasets import load_digits as read_digits

    pixels, labels = read_digits(return_X_y=True)
    known = sorted((*map(float, row), int(label)) for row, label in zip(pixels, labels, strict=True))
    plain = Normalisation((0.0,), (1.0,), white=1.0)
    parts = [load_digits(split, plain) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1197, 240, 360]
    ours = [
        (*row.tolist(), int(label))
        for part in parts
        for row, label in zip(part.images.flatten(1), part.labels, strict=True)
    ]
    assert sorted(ours) == known


def test_normalised_training_digits_have_mean_0_and_deviation_1() -> None:
    images = zoo.load_data("digits", "train").images
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3


def test_digits_take_a_window_and_know_their_splits() -> None:
    whole, part = zoo.load_data("digits", "test"), zoo.load_data("digits", "test", 3, start=2)
    assert torch.equal(part.images, whole.images[2:5])
    with pytest.raises(ValueError, match="digits: unknown split 'dev'. .*Valid: test, train, validation"):
        zoo.load_data("digits", "dev")


def test_a_network_name_brings_its_own_normalisation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INTRAFUSION_DATA", str(tmp_path))
    pixels = noise(2, 32, 32, 3)
    pack(tmp_path / "cifar10.npz", "test", [encode(p) for p in pixels], [0, 1])
    raw = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    for name, mean, std in [
        ("cifar10", 0.4914, 0.2023),
        ("cifar10_resnet20", 0.4914, 0.2023),
        ("cifar10_vit", 0.4914, 0.2470),
        ("cifar10_vgg11_bn", 0.485, 0.229),
    ]:
        red = zoo.load_data(name, "test").images[:, 0]
        torch.testing.assert_close(red, (raw[:, 0] - mean) / std)


def test_mobilenet_wants_pixels_from_minus_1_to_1() -> None:
    normalise = zoo.entry("imagenet_mobilenetv1_025").normalisation
    out = normalise(np.array([0, 255, 51], dtype=np.uint8).reshape(1, 1, 1, 3))
    torch.testing.assert_close(out.flatten(), torch.tensor([-1.0, 1.0, 51 / 127.5 - 1]))


def test_data_wants_the_variable_and_a_known_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTRAFUSION_DATA", raising=False)
    with pytest.raises(FolderError, match=r"mnist.npz is needed, but INTRAFUSION_DATA is not set; set it"):
        zoo.load_data("mnist", "test")
    with pytest.raises(ValueError, match=r"unknown network or data set 'cifar11'. Did you mean 'cifar10'\?"):
        zoo.load_data("cifar11", "test")


@pytest.mark.parametrize(
    ("name", "split", "shape", "classes"),
    [
        ("cifar10", "train", (3, 32, 32), 10),
        ("cifar100", "calibration", (3, 32, 32), 100),
        ("imagenet", "sample", (3, 224, 224), 1000),
        ("mnist", "train", (1, 28, 28), 10),
    ],
)
def test_real_data(name: str, split: str, shape: tuple[int, ...], classes: int, data_dir: Path) -> None:
    data = zoo.load_data(name, split, 20)
    assert data.images.shape == (20, *shape)
    assert 0 <= int(data.labels.min()) < int(data.labels.max()) < classes
    assert abs(float(data.images.mean())) < 0.5
    assert 0.5 < float(data.images.std()) < 1.5
