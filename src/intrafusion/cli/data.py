"""Labelled images that a command line names: a data set of the zoo, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from intrafusion.errors import FolderError, ModelError
from intrafusion.lab import zoo
from intrafusion.lab.zoo import Images
from intrafusion.lab.zoo.data import DATA_SETS

_TRAIN_SPLITS = {"cifar10": "train", "cifar100": "calibration", "mnist": "train", "digits": "train"}
_TEST_SPLITS = {"imagenet": "sample"}  # "test" for the others


def data_of(model: str, data: str | None) -> str:
    """The data that were named, or those of a network of the zoo.

    Raises:
        ModelError: no data are known for the network.
    """
    name = _zoo_name(model)
    if data is None and name is None:
        raise ModelError(
            f"{model}: no data are known for it; name some with --data ({', '.join(DATA_SETS)}, or a file)."
        )
    return data or zoo.entry(name or "").data


def read_test_images(data: str, model: str, limit: int | None) -> Images:
    """Test images, normalised for a network of the zoo if it is one for these data.

    Raises:
        FolderError: the file is missing, damaged or lacks them.
    """
    if data in DATA_SETS:
        return zoo.load_data(zoo_data(data, model), _TEST_SPLITS.get(data, "test"), limit=limit)
    return _images_of(data, _read_file(data), "test", limit)


def read_training_images(data: str, model: str, limit: int | None) -> Images | None:
    """Training images, if there are any; otherwise as `read_test_images`."""
    if data in DATA_SETS:
        split = _TRAIN_SPLITS.get(data)
        return zoo.load_data(zoo_data(data, model), split, limit=limit) if split else None
    found = _read_file(data)
    return _images_of(data, found, "train", limit) if "train_images" in found else None


def require_training_images(data: str, model: str, limit: int | None) -> Images:
    """
    Raises:
        FolderError: there are none.
    """
    found = read_training_images(data, model, limit)
    if found is None:
        raise FolderError(f"--data {data}: expected training images, and it has none; name other data.")
    return found


def _zoo_name(model: str) -> str | None:
    name = model.removeprefix("zoo:")
    return name if name in zoo.names() else None


def zoo_data(data: str, model: str) -> str:
    """The network of the zoo, for its normalisation, if these are its data; else the data set."""
    name = _zoo_name(model)
    return name if name and zoo.entry(name).data == data else data


def _read_file(data: str) -> Mapping[str, Tensor]:
    path = Path(data)
    if not path.is_file():
        raise FolderError(f"--data {data}: expected {', '.join(DATA_SETS)}, or a .safetensors file; there is none.")
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise FolderError(f"--data {data}: not a safetensors file, or a damaged one ({error}).") from error


def _images_of(data: str, found: Mapping[str, Tensor], split: str, limit: int | None) -> Images:
    images, labels = found.get(f"{split}_images"), found.get(f"{split}_labels")
    shapes = [None if t is None else tuple(t.shape) for t in (images, labels)]
    if images is None or labels is None or labels.shape != images.shape[:1] or not len(images):
        raise FolderError(
            f"--data {data}: expected {split}_images (n, ...) and {split}_labels (n,), got {shapes[0]} and {shapes[1]}."
        )
    if labels.is_floating_point() or labels.is_complex() or images.is_complex():
        raise FolderError(
            f"--data {data}: expected real {split}_images and whole numbers in {split}_labels, got {images.dtype} and "
            f"{labels.dtype}."
        )
    return Images(images[:limit], labels[:limit].long())
