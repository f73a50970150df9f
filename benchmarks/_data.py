"""What benchmarks share that need real data."""

from __future__ import annotations

import os

from intrafusion.lab import zoo

_TESTED = {"imagenet": "sample"}  # 1,000 images, no others
_MOST = {"imagenet_mobilenetv1_025": 744}  # 256 of 1,000 are looked at
_SEEN = {"cifar10": "train", "cifar100": "calibration"}


def has_data(holds: str = "cifar10.npz and models/") -> bool:
    """Whether INTRAFUSION_DATA is set; if not, it is said that the benchmark is skipped, and what has to be there."""
    if os.environ.get("INTRAFUSION_DATA"):
        return True
    print(f"skipped: INTRAFUSION_DATA is not set; it names the folder with {holds}.")
    return False


def count_tested(network: str, images: int) -> int:
    """As many of these test images as there are, apart from those that are looked at."""
    return min(images, _MOST.get(network, images))


def load_apart(network: str, tested: int | None, seen: int = 256) -> tuple[zoo.Images, zoo.Images]:
    """The first images to test a network on, and others to look at; of one split where no second is at hand."""
    data = zoo.entry(network).data
    if data in _SEEN:
        return zoo.load_data(network, "test", limit=tested), zoo.load_data(network, _SEEN[data], limit=seen)
    load = lambda start, limit: zoo.load_data(network, _TESTED[data], start=start, limit=limit)  # noqa: E731
    return load(0, tested), load(tested, seen)
