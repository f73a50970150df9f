"""What was seen of one group of channels, for criteria that look beyond the folded weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.errors import IntrafusionError, RecipeError, show, unknown_name
from intrafusion.graph import ChannelGroup
from intrafusion.registry import Traits

NEEDS = {"tensors": False, "gradients": True, "activations": True, "feature_maps": True, "contributions": True}
"""What a criterion may ask for in `needs`, and whether that takes images."""


@dataclass(frozen=True)
class ImportanceTraits(Traits):
    """What a criterion says of itself, in attributes of these names.

    Attributes:
        needs: names in `NEEDS`, of what it looks at beyond the folded weights.
        random: whether its scores belong to the channels' numbers, not to what they are.
    """

    needs: frozenset[str] = frozenset()
    random: bool = False


class ObservationError(IntrafusionError, ValueError):
    """A criterion was not given what it looks at."""


@checked
@dataclass(frozen=True, eq=False)
class Activations:
    """Statistics of n channels over images and places, (n,) float64 each."""

    mean: Tensor
    mean_square: Tensor

    __repr__ = show_briefly


@checked
@dataclass(frozen=True, eq=False)
class Observation:
    """What was seen of one group; a field is None if no criterion asked for it, or if it could not be seen.

    Channels are watched where linear layers and convolutions read them, or, where none does, as such layers give them.

    Attributes:
        tensors: every member's tensor as it is in the network: norms not folded, on its device, in its precision.
        gradients: of the loss with respect to the parameters among them, mean over the images, in their precision.
        activations: over all readers, each weighing the same.
        feature_maps: (k, n, places) float32 of the first reader, for the first k images; places are sampled if many.
        contributions: (readers, n) float64: the share that each channel has of what a reader adds up,
            |w_kc x_c| / sum_c' |w_kc' x_c'|, summed over outputs k and averaged over images and places.
        images: how many images were seen.
    """

    tensors: Mapping[str, Tensor] | None = None
    gradients: Mapping[str, Tensor] | None = None
    activations: Activations | None = None
    feature_maps: Tensor | None = None
    contributions: Tensor | None = None
    images: int = 0

    __repr__ = show_briefly


def needs_of(importance: object) -> frozenset[str]:
    """What a criterion asks for; nothing unless it says so.

    Raises:
        RecipeError: it asks for something that nobody observes.
    """
    needs = frozenset(ImportanceTraits.of(importance).needs)
    for need in needs:
        if need not in NEEDS:
            raise RecipeError(
                f"importance {importance_label(importance)}: needs: {unknown_name('observation', need, NEEDS)}"
            )
    return needs


def check_images(who: str, needs: Collection[str], images: object) -> None:
    """Raise ObservationError if images are needed and there are none."""
    wanted = sorted(need for need in needs if NEEDS[need])
    if wanted and images is None:
        raise ObservationError(
            f"{who}: it looks at {' and '.join(wanted)} on images, and was given none; pass images= (a few hundred, "
            "with labels or without: a tensor, or any iterable of batches), or choose a criterion that reads weights "
            "alone, such as 'l1'."
        )


def get_observed(observation: Any, field: str, importance: object, group: ChannelGroup) -> Any:
    """One field of an observation, for the criterion that needs it.

    Raises:
        ObservationError: there is no observation, or the group could not be watched.
    """
    if observation is None:
        check_images(f"importance {importance_label(importance)}", needs_of(importance), None)
        raise ObservationError(
            f"importance {importance_label(importance)}: group {group.name!r}: expected an Observation with {field}, "
            "got None; call the criterion with observe(model, graph, groups, images, needs)[group.name]."
        )
    if not isinstance(observation, Observation):
        raise ObservationError(
            f"importance {importance_label(importance)}: group {group.name!r}: expected an Observation, got "
            f"{show(observation)}; observe(model, graph, groups, images, needs)[group.name] makes one."
        )
    value = getattr(observation, field)
    if value is None:
        raise ObservationError(
            f"importance {importance_label(importance)}: group {group.name!r}: no {field} were seen. No linear layer "
            "or convolution that reads these channels ran as a module; exclude the group, or choose another criterion."
        )
    return value


def choose_weights(
    importance: object, group: ChannelGroup, weights: Mapping[str, Tensor], observation: object, *, folded: bool
) -> Mapping[str, Tensor]:
    """The weights with norms folded, as they are handed to a criterion, or those of the network as it is.

    Raises:
        ObservationError: the latter, without an observation.
    """
    return weights if folded else get_observed(observation, "tensors", importance, group)


def needs_tensors(folded: bool) -> frozenset[str]:
    """What a criterion needs that reads weights alone, with norms folded or as they are."""
    return frozenset() if folded else frozenset({"tensors"})


def importance_label(importance: object) -> str:
    """How messages call a criterion."""
    return repr(importance) if hasattr(importance, "__dataclass_fields__") else _importance_name(importance)


def _importance_name(importance: object) -> str:
    return str(getattr(importance, "__qualname__", type(importance).__qualname__))
