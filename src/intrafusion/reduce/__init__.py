"""n channels -> m: one reducer per file."""

from __future__ import annotations

from collections.abc import Callable

from intrafusion.errors import unknown_name
from intrafusion.reduce.fold import Fold, cluster_map
from intrafusion.reduce.fuse import IntraFusion, intrafusion_map
from intrafusion.reduce.pivot import Pivot
from intrafusion.reduce.problem import Moments, Reducer, ReductionMap, ReductionProblem
from intrafusion.reduce.select import Select, most_important, selection_map

REDUCERS: dict[str, Callable[[], Reducer]] = {
    "select": Select,
    "intrafusion": IntraFusion,
    "fold": Fold,
    "pivot": Pivot,
}


def get(reducer: str | Reducer) -> Reducer:
    """The reducer of this name with its default hyper-parameters; a reducer passes through.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a reducer.
    """
    if isinstance(reducer, str):
        if reducer not in REDUCERS:
            raise ValueError(unknown_name("reducer", reducer, REDUCERS))
        return REDUCERS[reducer]()
    if isinstance(reducer, type) or not isinstance(reducer, Reducer):
        raise TypeError(f"reducer: expected a name or an object with `mixes` and `__call__`, got {reducer!r}.")
    return reducer


__all__ = [
    "REDUCERS",
    "Fold",
    "IntraFusion",
    "Moments",
    "Pivot",
    "Reducer",
    "ReductionMap",
    "ReductionProblem",
    "Select",
    "cluster_map",
    "get",
    "intrafusion_map",
    "most_important",
    "selection_map",
]
