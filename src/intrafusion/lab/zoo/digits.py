"""The 1,797 handwritten digits (8 x 8, grey) that come with scikit-learn, in three fixed parts."""

from __future__ import annotations

import numpy as np
import torch

from intrafusion.errors import ArgumentError, unknown_name
from intrafusion.lab.zoo.images import Images, Normalisation, window

# positions in one fixed random order
_SPLITS = {"train": slice(0, 1197), "validation": slice(1197, 1437), "test": slice(1437, 1797)}


def load_digits(split: str, normalisation: Normalisation, *, start: int = 0, limit: int | None = None) -> Images:
    """Read digits of "train" (1,197), "validation" (240) or "test" (360).

    Raises:
        ArgumentError: no such split, or `start` and `limit` select nothing.
    """
    from sklearn.datasets import load_digits as read_digits

    if split not in _SPLITS:
        raise ArgumentError(f"digits: {unknown_name('split', split, _SPLITS)}")
    pixels, labels = read_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))[_SPLITS[split]]
    order = order[window(len(order), start, limit)]
    return Images(normalisation(pixels[order].reshape(-1, 8, 8)), torch.tensor(labels[order], dtype=torch.int64))
