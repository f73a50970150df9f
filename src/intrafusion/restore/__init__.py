"""Restoring what a reduction lost, without training: one restorer per file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intrafusion.errors import unknown_name
from intrafusion.network.batches import read_batches
from intrafusion.restore.calibration import LEVELS, Calibration, calibrate
from intrafusion.restore.closed_form import ClosedForm
from intrafusion.restore.least_squares import LeastSquares
from intrafusion.restore.noise import Noise
from intrafusion.restore.reestimate import Reestimate
from intrafusion.restore.repair import ActivationRepair
from intrafusion.restore.restorer import Reduced, Restorer
from intrafusion.restore.shifts import add_shifts_
from intrafusion.restore.synthesize import Synthesis, load_images, save_images

RESTORERS: dict[str, type[Any]] = {
    "least_squares": LeastSquares,
    "noise": Noise,
    "closed_form": ClosedForm,
    "reestimate": Reestimate,
    "repair": ActivationRepair,
}


def get(restorer: str | Mapping[str, Any] | Restorer) -> Restorer:
    """The restorer of this name with its default hyper-parameters; a restorer passes through.

    Args:
        restorer: a name, {"name": name or class, hyper-parameter: value, ...} as recipes hold it, or a restorer.
    Raises:
        ValueError: unknown name, or a hyper-parameter that it does not have.
        TypeError: neither a name nor a restorer.
    """
    if isinstance(restorer, str):
        restorer = {"name": restorer}
    if isinstance(restorer, Mapping):
        options = dict(restorer)
        name = str(options.pop("name", None))
        known = RESTORERS | {entry.__name__: entry for entry in RESTORERS.values()}
        if name not in known:
            raise ValueError(unknown_name("restorer", name, RESTORERS))
        try:
            return known[name](**options)
        except TypeError as error:
            raise ValueError(f"restorer {name!r} does not take these options: {error}.") from error
    if isinstance(restorer, type) or not isinstance(restorer, Restorer):
        raise TypeError(f"restorer: expected a name or an object with `needs_data` and `__call__`, got {restorer!r}.")
    return restorer


__all__ = [
    "LEVELS",
    "RESTORERS",
    "ActivationRepair",
    "Calibration",
    "ClosedForm",
    "LeastSquares",
    "Noise",
    "Reduced",
    "Reestimate",
    "Restorer",
    "Synthesis",
    "add_shifts_",
    "calibrate",
    "get",
    "load_images",
    "read_batches",
    "save_images",
]
