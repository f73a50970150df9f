"""How much does each channel matter? One criterion per file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from intrafusion.errors import unknown_name
from intrafusion.graph import ChannelGroup
from intrafusion.importance.bn_scale import BNScale
from intrafusion.importance.chip import CHIP
from intrafusion.importance.contribution import RelativeContribution
from intrafusion.importance.fpgm import FPGM
from intrafusion.importance.lamp import LAMP
from intrafusion.importance.magnitude import Magnitude
from intrafusion.importance.observation import NEEDS, Activations, Observation, ObservationError, needs_of
from intrafusion.importance.random import Random
from intrafusion.importance.taylor import Taylor
from intrafusion.importance.torch_pruning import TorchPruning, is_torch_pruning


@runtime_checkable
class Importance(Protocol):
    """(group, weights, observations) -> (n,) finite scores; larger = more important.

    `weights` are tensors by name with norms folded. A criterion that looks at more says so in an attribute `needs`, a
    frozenset of names in `NEEDS`; `observations` is then the group's `Observation`, else None.
    """

    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor: ...


IMPORTANCES: dict[str, Importance] = {
    "l1": Magnitude(p=1.0),
    "l2": Magnitude(p=2.0),
    "linf": Magnitude(p=math.inf),
    "bn_scale": BNScale(),
    "taylor": Taylor(),
    "lamp": LAMP(),
    "chip": CHIP(),
    "fpgm": FPGM(),
    "contribution": RelativeContribution(),
    "random": Random(),
}


def get(importance: Any) -> Importance:
    """The criterion of this name; a criterion passes through, an object of Torch-Pruning is made one.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor callable.
    """
    if isinstance(importance, str):
        if importance not in IMPORTANCES:
            raise ValueError(unknown_name("importance", importance, IMPORTANCES))
        return IMPORTANCES[importance]
    if is_torch_pruning(importance):
        return TorchPruning(importance)
    if isinstance(importance, type) or not isinstance(importance, Importance):
        raise TypeError(
            f"importance: expected a name or a callable (group, weights, observations) -> (n,), got {importance!r}."
        )
    return importance


__all__ = [
    "CHIP",
    "FPGM",
    "IMPORTANCES",
    "LAMP",
    "NEEDS",
    "Activations",
    "BNScale",
    "Importance",
    "Magnitude",
    "Observation",
    "ObservationError",
    "Random",
    "RelativeContribution",
    "Taylor",
    "TorchPruning",
    "get",
    "needs_of",
]
