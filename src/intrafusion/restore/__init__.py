"""Restoring what a reduction lost, without training: one restorer per file."""

from __future__ import annotations

from collections.abc import Callable

from intrafusion.batches import batches
from intrafusion.errors import unknown_name
from intrafusion.restore.least_squares import LeastSquares
from intrafusion.restore.pivoting import Pivot, Pivoted, add_shifts_
from intrafusion.restore.restorer import Reduced, Restorer
from intrafusion.restore.synthesize import Synthesis, load_images, save_images

RESTORERS: dict[str, Callable[[], Restorer]] = {
    "least_squares": LeastSquares,
}


def get(restorer: str | Restorer) -> Restorer:
    """The restorer of this name with its default hyper-parameters; a restorer passes through.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a restorer.
    """
    if isinstance(restorer, str):
        if restorer not in RESTORERS:
            raise ValueError(unknown_name("restorer", restorer, RESTORERS))
        return RESTORERS[restorer]()
    if isinstance(restorer, type) or not isinstance(restorer, Restorer):
        raise TypeError(f"restorer: expected a name or an object with `needs_data` and `__call__`, got {restorer!r}.")
    return restorer


__all__ = [
    "RESTORERS",
    "LeastSquares",
    "Pivot",
    "Pivoted",
    "Reduced",
    "Restorer",
    "Synthesis",
    "add_shifts_",
    "batches",
    "get",
    "load_images",
    "save_images",
]
