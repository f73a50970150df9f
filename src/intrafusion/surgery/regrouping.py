"""Numbers in code that a `view` keeps, while the -1 beside them takes up what channels were removed.

`x.view(-1, 8)` runs on half of the channels, too: it has half of the rows. What goes wrong then is seen later, where
nothing is written, or not at all. So where a smaller network fails, each view of a number and a -1 that came out with
the number as it was is tried with a smaller number; if that mends the network, the number is named.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from intrafusion.brief import show_briefly
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state
from intrafusion.surgery.blame import find_literals, is_of_user, name_place

_LINES = 3  # of code, with such views, that are tried together
_VIEWS = frozenset([Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten])


class View(NamedTuple):
    """A view whose sizes hold a -1 and numbers from the code.

    place: in words; code: where in it; shape: what came out; fixed: dimensions of which the code says the number.
    """

    place: str
    code: tuple[int, int]
    shape: tuple[int, ...]
    inferred: int
    fixed: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Regrouping:
    """Views of a network in which channels that were removed made fewer rows, in the order of the calls.

    Attributes:
        before: the views of the original; after: those of a smaller network, as far as it runs.
    """

    before: Sequence[View]
    after: Sequence[View]

    __repr__ = show_briefly

    @property
    def suspects(self) -> list[int]:
        """Views, by number, that kept their numbers and lost rows; none behind the first that another line made."""
        found = []
        for k, (old, new) in enumerate(zip(self.before, self.after, strict=False)):
            if old.code != new.code or len(old.shape) != len(new.shape):
                break
            if new.shape[new.inferred] < old.shape[old.inferred]:
                found.append(k)
        return found

    def ways_to_mend(self) -> Iterator[tuple[TorchFunctionMode, str]]:
        """Modes in which these views keep their rows, and one number of each is smaller: the last, or the first.

        Those of the first line, then of the first two, and so on, as further ones may be right; with the first view and
        its number, in words.
        """
        views = {k: self.before[k] for k in self.suspects}
        lines = list(dict.fromkeys(view.code for view in views.values()))
        for count, which in itertools.product(range(1, min(len(lines), _LINES) + 1), (-1, 0)):
            first = next(iter(views.values()))
            told = (
                f"at {first.place} {first.shape[first.fixed[which]]} is written in the code, and a -1 beside it takes "
                "up what is missing: take it from a shape, or from an attribute of the module"
            )
            chosen = {k: view for k, view in views.items() if view.code in lines[:count]}
            yield _Views({k: (view.shape, view.fixed[which]) for k, view in chosen.items()}), told


class _Views(TorchFunctionMode):
    """Notes every view, and has some of them give another shape: (shape, the dimension that is what is left)."""

    def __init__(self, instead: dict[int, tuple[tuple[int, ...], int]] | None = None) -> None:
        super().__init__()
        self.instead, self.found = instead or {}, list[View]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _VIEWS:
            return func(*args, **kwargs)
        asked = _list_sizes(func, args, kwargs)
        view = _describe(asked) if asked.count(-1) == 1 else None
        if view is None:
            return func(*args, **kwargs)
        other = self.instead.get(len(self.found))
        if other is None:
            out = func(*args, **kwargs)
        else:
            shape, dim = other
            rest = math.prod(size for d, size in enumerate(shape) if d != dim)
            out = args[0].reshape([*shape[:dim], args[0].numel() // rest, *shape[dim + 1 :]])
        self.found.append(view._replace(shape=tuple(out.shape)))
        return out


def _list_sizes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    """What shape was asked for; none where that is not said in numbers."""
    x, *rest = args
    rest += [kwargs[name] for name in ("dim", "sizes", "size", "shape") if name in kwargs]
    if func in (Tensor.unflatten, torch.unflatten):
        dim, sizes = rest[:2]
        if not isinstance(dim, int):
            return []
        rest = [*x.shape[: dim % x.dim()], *sizes, *x.shape[dim % x.dim() + 1 :]]
    elif len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        rest = list(rest[0])
    return rest if all(isinstance(size, int) for size in rest) else []


def _describe(asked: Sequence[int]) -> View | None:
    """A view that code of the user asked for, if it writes any of the sizes as a number."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not is_of_user(frame.f_code):
        frame = frame.f_back
    if frame is None:
        return None
    written = find_literals(frame.f_code, frame.f_lasti, given=True)
    fixed = tuple(d for d, size in enumerate(asked) if size > 1 and size in written)
    place = name_place(frame.f_code, frame.f_lasti)
    return View(place, (id(frame.f_code), frame.f_lasti), (), asked.index(-1), fixed) if fixed else None


def list_views(model: nn.Module, inputs: Inputs) -> list[View]:
    """Those of a network, which may not run to its end, whose sizes hold a -1 and numbers from the code."""
    failing = contextlib.suppress(Exception)  # which was seen before, and told
    with preserve_state(model), torch.no_grad(), _Views() as views, failing:
        inputs.call(model)
    return views.found
