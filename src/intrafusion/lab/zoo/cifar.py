"""CIFAR-10 and CIFAR-100 as their authors distribute them: pickled batches in a folder or a tar.gz archive."""

from __future__ import annotations

import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intrafusion.arguments import checked
from intrafusion.errors import ArgumentError, FolderError, unknown_name
from intrafusion.lab.zoo.downloading import DownloadProgress, download
from intrafusion.lab.zoo.images import Images, Normalisation, window


@dataclass(frozen=True)
class _Archive:
    """One published archive.

    Attributes:
        folder: the folder inside the archive.
        splits: batch files of each split.
        label_key: key of the class numbers in a batch.
    """

    url: str
    sha256: str
    folder: str
    splits: dict[str, tuple[str, ...]]
    label_key: bytes


_MOST = 1 << 29  # bytes of one batch; the largest there is has 155 MB

ARCHIVES: dict[str, _Archive] = {
    "cifar10": _Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        folder="cifar-10-batches-py",
        splits={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        label_key=b"labels",
    ),
    "cifar100": _Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        folder="cifar-100-python",
        splits={"train": ("train",), "test": ("test",)},
        label_key=b"fine_labels",
    ),
}


@checked
def fetch_cifar(name: str, folder: Path, *, progress: DownloadProgress | None = None) -> Path:
    """Download the archive of "cifar10" or "cifar100" into a folder, unless it is there, and return its path.

    Raises:
        ArgumentError: unknown data set.
        IntrafusionError: the download failed.
    """
    archive = _archive(name)
    file = folder / archive.url.rpartition("/")[2]
    return download(archive.url, file, sha256=archive.sha256, progress=progress)


@checked
def load_cifar(
    name: str,
    path: Path,
    split: str,
    normalisation: Normalisation,
    *,
    start: int = 0,
    limit: int | None = None,
) -> Images:
    """Read one split of "cifar10" or "cifar100" from the tar.gz archive or from the folder it unpacks to.

    Nothing is unpacked to disk, and the pickles can create nothing but arrays, numbers, bytes, lists and dicts.

    Raises:
        ArgumentError: unknown data set or split, or `start` and `limit` select nothing.
        FolderError: a batch is missing, damaged, or refers to a forbidden class.
    """
    archive = _archive(name)
    if split not in archive.splits:
        raise ArgumentError(f"{name}: {unknown_name('split', split, archive.splits)}")
    read = _read_folder if path.is_dir() else _read_tar
    batches = [_batch(data, archive.label_key, where) for where, data in read(path, archive, archive.splits[split])]
    pixels = np.concatenate([pixels for pixels, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    part = window(len(labels), start, limit)
    return Images(normalisation(pixels[part]), torch.tensor(labels[part], dtype=torch.int64))


def _archive(name: str) -> _Archive:
    if name not in ARCHIVES:
        raise ArgumentError(unknown_name("CIFAR data set", name, ARCHIVES))
    return ARCHIVES[name]


def _read_folder(path: Path, archive: _Archive, files: Sequence[str]) -> list[tuple[str, bytes]]:
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise FolderError(f"{path}: expected the batches of {archive.folder}, {', '.join(missing)} missing.")
    return [(str(path / file), (path / file).read_bytes()) for file in files]


def _read_tar(path: Path, archive: _Archive, files: Sequence[str]) -> list[tuple[str, bytes]]:
    wanted = [f"{archive.folder}/{file}" for file in files]
    try:
        with tarfile.open(path) as tar:
            opened = (
                (member.name, tar.extractfile(member)) for member in tar if member.name in wanted and member.isfile()
            )
            found = {member: file.read(_MOST + 1) for member, file in opened if file is not None}
        if any(len(data) > _MOST for data in found.values()):
            raise FolderError(f"{path}: a batch has more than {_MOST} bytes; fetch it from {archive.url}.")
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise FolderError(f"{path}: expected the folder {archive.folder} or its tar.gz, got: {error}") from error
    missing = [member for member in wanted if member not in found]
    if missing:
        raise FolderError(f"{path}: {', '.join(missing)} missing; expected the whole archive {archive.url}.")
    return [(f"{path}:{member}", found[member]) for member in wanted]


def _batch(data: bytes, label_key: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 32, 32, 3) uint8 and class numbers (n,) of one pickled batch."""
    batch = _unpickle(data, where)
    try:
        pixels, labels = batch[b"data"], np.array(batch[label_key], dtype=np.int64)
        if pixels.dtype != np.uint8 or labels.ndim != 1 or pixels.shape != (len(labels), 3072):
            raise ValueError(f"data {pixels.dtype} {pixels.shape}, labels {labels.shape}")
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
        expected = f"'data' (n, 3072) of bytes and {label_key.decode()!r} (n,)"
        raise FolderError(f"{where}: expected a batch with {expected}, got: {error!r}") from error
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _unpickle(data: bytes, where: str) -> Any:
    try:
        return _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except FolderError as error:
        raise FolderError(f"{where}: {error}") from None
    except Exception as error:  # pickle promises no narrower class for damaged data
        raise FolderError(f"{where}: damaged batch ({error!r}); fetch the archive again.") from error


def _latin1(text: str, _encoding: str) -> bytes:
    """How Python 3 pickles bytes at protocol 2."""
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]

_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Creates arrays and built-in containers; any other class or function is refused, so no pickle can run code."""

    def find_class(self, module_name: str, global_name: str) -> object:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise FolderError(
                f"the pickle asks for {module_name}.{global_name}, which a CIFAR batch does not need; "
                "it was refused: fetch the archive from its home page."
            ) from None
