"""How much does each channel matter? One criterion per file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from intrafusion.graph import ChannelGroup
from intrafusion.importance.bn_scale import BNScale
from intrafusion.importance.chip import CHIP
from intrafusion.importance.contribution import RelativeContribution
from intrafusion.importance.fpgm import FPGM
from intrafusion.importance.lamp import LAMP
from intrafusion.importance.magnitude import Magnitude
from intrafusion.importance.observation import (
    NEEDS,
    Activations,
    ImportanceTraits,
    Observation,
    ObservationError,
    needs_of,
)
from intrafusion.importance.random import Random
from intrafusion.importance.taylor import Taylor
from intrafusion.importance.torch_pruning import TorchPruning, is_torch_pruning
from intrafusion.registry import Registry


@runtime_checkable
class Importance(Protocol):
    """(group, weights, observations) -> (n,) finite scores; larger = more important.

    `weights` are tensors by name with norms folded. A criterion that looks at more says so in an attribute `needs`, see
    `ImportanceTraits`; `observations` is then the group's `Observation`, else None.
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


def _adopted(importance: Any) -> Any:
    return TorchPruning(importance) if is_torch_pruning(importance) else importance


_EXPECTED = "a callable (group, weights, observations) -> (n,)"
REGISTRY = Registry("importance", IMPORTANCES, _EXPECTED, 3, ImportanceTraits, adopt=_adopted)


def get_importance(importance: Any) -> Importance:
    """The criterion of this name, or of {"name": ..., hyper-parameter: value}.

    A criterion passes through, an object of Torch-Pruning is made one.

    Raises:
        RecipeError: unknown name or hyper-parameter, or no criterion.
    """
    return REGISTRY.resolve(importance)


__all__ = [
    "CHIP",
    "FPGM",
    "IMPORTANCES",
    "LAMP",
    "NEEDS",
    "REGISTRY",
    "Activations",
    "BNScale",
    "Importance",
    "ImportanceTraits",
    "Magnitude",
    "Observation",
    "ObservationError",
    "Random",
    "RelativeContribution",
    "Taylor",
    "TorchPruning",
    "get_importance",
    "needs_of",
]
