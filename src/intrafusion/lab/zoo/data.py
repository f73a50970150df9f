"""The data sets of the zoo by name, normalised as each network expects them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from intrafusion.arguments import checked
from intrafusion.errors import ArgumentError, unknown_name
from intrafusion.lab.zoo import registry
from intrafusion.lab.zoo.digits import load_digits
from intrafusion.lab.zoo.images import Images, Normalisation
from intrafusion.lab.zoo.npz import load_mnist, load_packed
from intrafusion.lab.zoo.root import data_file


class _Reader(Protocol):
    """Reads part of a split."""

    def __call__(
        self, split: str, normalisation: Normalisation, *, start: int = 0, limit: int | None = None
    ) -> Images: ...


@dataclass(frozen=True)
class _DataSet:
    """A data set of the zoo, and its usual normalisation."""

    read: _Reader
    normalisation: Normalisation


def _below_root(load: Callable[..., Images], file: str) -> _Reader:
    """A reader of one file of `$INTRAFUSION_DATA`."""

    def read(split: str, normalisation: Normalisation, *, start: int = 0, limit: int | None = None) -> Images:
        return load(data_file(file), split, normalisation, start=start, limit=limit)

    return read


DATA_SETS: dict[str, _DataSet] = {
    "cifar10": _DataSet(_below_root(load_packed, "cifar10.npz"), registry.CIFAR10),
    "cifar100": _DataSet(_below_root(load_packed, "cifar100_test.npz"), registry.CIFAR100),
    "imagenet": _DataSet(_below_root(load_packed, "imagenet_1000.npz"), registry.IMAGENET),
    "mnist": _DataSet(_below_root(load_mnist, "mnist.npz"), registry.MNIST),
    "digits": _DataSet(load_digits, registry.DIGITS),
}


@checked
def load_data(name: str, split: str, limit: int | None = None, *, start: int = 0) -> Images:
    """Images of the data set of a network, normalised as this network expects.

    Splits: cifar10 and mnist "train", "test"; cifar100 "calibration" (out of its training set), "test"; imagenet
    "sample" (one image per class); digits "train", "validation", "test". All but digits lie in `$INTRAFUSION_DATA`.

    Args:
        name: a network, or a data set for its usual normalisation.
        limit: read this many images, from `start` on; None for all.
    Raises:
        ArgumentError: unknown name or split, or `start` and `limit` select nothing.
        FolderError: INTRAFUSION_DATA is unset, or the file is missing or damaged.
    """
    if name in registry.NETWORKS:
        network = registry.NETWORKS[name]
        data, normalisation = DATA_SETS[network.data], network.normalisation
    elif name in DATA_SETS:
        data, normalisation = DATA_SETS[name], DATA_SETS[name].normalisation
    else:
        raise ArgumentError(unknown_name("network or data set", name, [*registry.NETWORKS, *DATA_SETS]))
    return data.read(split, normalisation, start=start, limit=limit)
