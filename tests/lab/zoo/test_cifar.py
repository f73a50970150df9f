"""CIFAR archives: read as their authors wrote them, and no pickle in them can run code."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from intrafusion.errors import FolderError
from intrafusion.lab.zoo import Normalisation, load_cifar

PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), white=1.0)
CIFAR10_FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def python2_pickle(data: np.ndarray, labels: list[int], label_key: bytes = b"labels") -> bytes:
    """A batch opcode by opcode as Python 2's pickle and NumPy 1 wrote it, all texts being byte strings."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = (
        b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN" + number(-1) * 2 + b"K\x00tb"
    )
    shape = b"(" + number(data.shape[0]) + number(data.shape[1]) + b"t"
    content = b"T" + struct.pack("<i", data.nbytes) + data.tobytes()
    blank = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    array = blank + b"(K\x01" + shape + dtype + b"I00\n" + content + b"tb"
    numbers = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(label_key) + numbers + b"u."


def cifar10_batches() -> dict[str, bytes]:
    """Batch i holds i + 1 images, whose labels count on from batch to batch."""
    sizes = [(name, i + 1) for i, name in enumerate(CIFAR10_FILES)]
    return {
        name: python2_pickle(pixels(size, seed=size), list(range(10 * size, 11 * size))[:size]) for name, size in sizes
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(params=["folder", "tar"])
def cifar10(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "folder":
        return write_folder(tmp_path / "cifar-10-batches-py", cifar10_batches())
    reordered = dict(reversed(cifar10_batches().items()))
    return write_tar(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", reordered)


def test_the_training_set_is_the_five_batches_in_order(cifar10: Path) -> None:
    data = load_cifar("cifar10", cifar10, "train", PLAIN)
    rows = np.concatenate([pixels(size, seed=size) for size in range(1, 6)])
    assert torch.equal(data.images, torch.tensor(rows).view(15, 3, 32, 32).float())
    assert data.labels.tolist() == [10, 20, 21, 30, 31, 32, 40, 41, 42, 43, 50, 51, 52, 53, 54]


def test_the_test_set_and_a_window_of_it(cifar10: Path) -> None:
    data = load_cifar("cifar10", cifar10, "test", PLAIN, start=1, limit=2)
    assert torch.equal(data.images, torch.tensor(pixels(6, seed=6)[1:3]).view(2, 3, 32, 32).float())
    assert data.labels.tolist() == [61, 62]


def test_cifar100_reads_the_fine_labels(tmp_path: Path) -> None:
    batch = python2_pickle(pixels(2, seed=0), [99, 3], b"fine_labels")
    path = write_tar(tmp_path / "cifar-100-python.tar.gz", "cifar-100-python", {"test": batch})
    assert load_cifar("cifar100", path, "test", PLAIN).labels.tolist() == [99, 3]


@pytest.mark.parametrize("protocol", [2, 4])
def test_batches_pickled_by_python_3_are_read_too(tmp_path: Path, protocol: int) -> None:
    data = pixels(2, seed=5)
    batch = pickle.dumps({b"data": data, b"labels": [1, 0], b"batch_label": b"testing"}, protocol=protocol)
    folder = write_folder(tmp_path / "cifar", {"test_batch": batch})
    loaded = load_cifar("cifar10", folder, "test", PLAIN)
    assert torch.equal(loaded.images.flatten(1), torch.tensor(data).float())
    assert loaded.labels.tolist() == [1, 0]


class Calls:
    """Pickles as a call of a function, run when it is read."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, np.load, pickle.loads])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_batch_is_refused_and_runs_nothing(tmp_path: Path, function: Any, protocol: int) -> None:
    marker = tmp_path / "ran"
    attack = {os.system: f"touch {marker}", eval: f"open({str(marker)!r}, 'w')", exec: f"open({str(marker)!r}, 'w')"}
    argument = attack.get(function, str(marker))
    batch = pickle.dumps({b"data": Calls(function, argument), b"labels": []}, protocol=protocol)
    folder = write_folder(tmp_path / "cifar", {"test_batch": batch})
    with pytest.raises(FolderError, match=rf"test_batch: the pickle asks for \w+(\.\w+)*\.{function.__name__}, which"):
        load_cifar("cifar10", folder, "test", PLAIN)
    assert not marker.exists()


def test_a_malicious_batch_in_an_archive_is_refused(tmp_path: Path) -> None:
    batch = pickle.dumps(Calls(os.system, f"touch {tmp_path / 'ran'}"))
    path = write_tar(tmp_path / "evil.tar.gz", "cifar-10-batches-py", {"test_batch": batch})
    with pytest.raises(
        FolderError, match=r"evil.tar.gz:cifar-10-batches-py/test_batch: the pickle asks for \w+.system"
    ):
        load_cifar("cifar10", path, "test", PLAIN)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (python2_pickle(pixels(2, 0), [1, 2])[:-40], "damaged batch"),
        (b"", "damaged batch"),
        (pickle.dumps([1, 2]), "expected a batch with 'data'"),
        (pickle.dumps({b"data": pixels(2, 0)}), "expected a batch .* got: KeyError"),
        (python2_pickle(pixels(2, 0), [1]), r"got: ValueError\('data uint8 \(2, 3072\), labels \(1,\)"),
        (pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}, protocol=4), "data float64"),
    ],
)
def test_a_damaged_batch(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_folder(tmp_path / "cifar", {"test_batch": content})
    with pytest.raises(FolderError, match=message):
        load_cifar("cifar10", folder, "test", PLAIN)


def test_missing_batches(tmp_path: Path) -> None:
    files = {"data_batch_1": b"", "data_batch_3": b""}
    with pytest.raises(FolderError, match="data_batch_2, data_batch_4, data_batch_5 missing"):
        load_cifar("cifar10", write_folder(tmp_path / "cifar", files), "train", PLAIN)
    tar = write_tar(tmp_path / "cifar.tar.gz", "cifar-10-batches-py", files)
    with pytest.raises(FolderError, match="cifar-10-batches-py/data_batch_2, .*data_batch_5 missing"):
        load_cifar("cifar10", tar, "train", PLAIN)


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as tar:
        tar.addfile(link)
    with pytest.raises(FolderError, match=r"cifar.tar.gz: cifar-10-batches-py/test_batch missing"):
        load_cifar("cifar10", tmp_path / "cifar.tar.gz", "test", PLAIN)


def test_no_archive_at_all(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "cifar.tar.gz", "cifar-10-batches-py", cifar10_batches()).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk.tar.gz").write_bytes(b"junk")
    for name in ("none.tar.gz", "junk.tar.gz", "cut.tar.gz"):
        with pytest.raises(FolderError, match=f"{name}: expected the folder cifar-10-batches-py or its tar.gz, got"):
            load_cifar("cifar10", tmp_path / name, "test", PLAIN)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown CIFAR data set 'cifar'.* Valid: cifar10, cifar100"):
        load_cifar("cifar", tmp_path, "test", PLAIN)
    with pytest.raises(ValueError, match="cifar10: unknown split 'calibration'"):
        load_cifar("cifar10", tmp_path, "calibration", PLAIN)
