"""Restoring what a reduction lost, without labels: one restorer per file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intrafusion.network.batches import read_batches
from intrafusion.registry import Registry
from intrafusion.restore.calibration import LEVELS, Calibration, calibrate
from intrafusion.restore.closed_form import ClosedForm
from intrafusion.restore.distill import Distill
from intrafusion.restore.grail import Grail
from intrafusion.restore.lbyl import LeaveBeforeYouLeave
from intrafusion.restore.least_squares import LeastSquares
from intrafusion.restore.noise import Noise
from intrafusion.restore.reestimate import Reestimate
from intrafusion.restore.repair import ActivationRepair
from intrafusion.restore.restorer import Reduced, Restorer, RestorerTraits
from intrafusion.restore.shifts import add_shifts_
from intrafusion.restore.synthesize import Synthesis, load_images, save_images

RESTORERS: dict[str, type[Any]] = {
    "least_squares": LeastSquares,
    "noise": Noise,
    "closed_form": ClosedForm,
    "reestimate": Reestimate,
    "repair": ActivationRepair,
    "grail": Grail,
    "lbyl": LeaveBeforeYouLeave,
    "distill": Distill,
}


REGISTRY = Registry(
    "restorer",
    RESTORERS,
    "an object with `needs_data` and `__call__(compressed, reference, graph, images)`",
    4,
    RestorerTraits,
    words=("auto", *LEVELS),
)


def get_restorer(restorer: str | Mapping[str, Any] | Restorer) -> Restorer:
    """The restorer of this name, or of {"name": ..., hyper-parameter: value}; a restorer passes through.

    Raises:
        RecipeError: unknown name or hyper-parameter, or no restorer.
    """
    return REGISTRY.resolve(restorer)


__all__ = [
    "LEVELS",
    "REGISTRY",
    "RESTORERS",
    "ActivationRepair",
    "Calibration",
    "ClosedForm",
    "Distill",
    "Grail",
    "LeastSquares",
    "LeaveBeforeYouLeave",
    "Noise",
    "Reduced",
    "Reestimate",
    "Restorer",
    "RestorerTraits",
    "Synthesis",
    "add_shifts_",
    "calibrate",
    "get_restorer",
    "load_images",
    "read_batches",
    "save_images",
]
