"""n channels -> m: one reducer per file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from intrafusion.arguments import checked
from intrafusion.reduce.auto import Auto
from intrafusion.reduce.eliminate import Eliminate
from intrafusion.reduce.fold import Fold, cluster_map
from intrafusion.reduce.fuse import IntraFusion, intrafusion_map
from intrafusion.reduce.mean_shift import Flap, VarianceBased
from intrafusion.reduce.pivot import Pivot
from intrafusion.reduce.problem import Moments, Reducer, ReducerTraits, ReductionMap, ReductionProblem, Selecting
from intrafusion.reduce.select import Select, most_important, selection_map
from intrafusion.registry import Registry

REDUCERS: dict[str, Callable[[], Reducer]] = {
    "select": Select,
    "intrafusion": IntraFusion,
    "fold": Fold,
    "pivot": Pivot,
    "eliminate": Eliminate,
    "variance": VarianceBased,
    "flap": Flap,
    "auto": Auto,
}


REGISTRY = Registry("reducer", REDUCERS, "an object with `mixes` and `__call__(problem)`", 1, ReducerTraits)


def get_reducer(reducer: str | Mapping[str, Any] | Reducer) -> Reducer:
    """The reducer of this name, or of {"name": ..., hyper-parameter: value}; a reducer passes through.

    Raises:
        RecipeError: unknown name or hyper-parameter, or no reducer.
    """
    return REGISTRY.resolve(reducer)


@checked
def selecting_form(reducer: Reducer) -> Reducer:
    """What stands in for a reducer where channels must not be mixed: its own selecting form, or plain pruning."""
    if not reducer.mixes:
        return reducer
    return reducer.selecting() if isinstance(reducer, Selecting) else Select()


__all__ = [
    "REDUCERS",
    "REGISTRY",
    "Auto",
    "Eliminate",
    "Flap",
    "Fold",
    "IntraFusion",
    "Moments",
    "Pivot",
    "Reducer",
    "ReducerTraits",
    "ReductionMap",
    "ReductionProblem",
    "Select",
    "VarianceBased",
    "cluster_map",
    "get_reducer",
    "intrafusion_map",
    "most_important",
    "selecting_form",
    "selection_map",
]
