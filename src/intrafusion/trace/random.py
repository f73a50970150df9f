"""Random numbers that a forward draws, at their mean: dropout that is always on, noise in the shape of its input."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from intrafusion.network.modes import Mode


class Draws(Mode):
    """Notes which operations draw random numbers; with `mean`, those in the shape of a tensor give their mean instead.

    Each element is drawn by itself, so that channels which change places get numbers of the same distribution, but not
    the same numbers: a proof that compares numbers must do without. What is drawn in a shape of its own stays random.
    """

    def __init__(self, *, mean: bool = False) -> None:
        super().__init__()
        self.mean = mean
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _draws(func):
            name = func._schema.name.partition("::")[2].rstrip("_")
            drawn = _mean_of(func, name, args, kwargs) if self.mean else None
            if name not in self.names:
                self.names.append(name)
            if drawn is not None:
                return drawn
        return func(*args, **kwargs)


@functools.cache
def _draws(func: Any) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _mean_of(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mean of what an operation would draw, in its place; None where it has none, or a shape of its own."""
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments} | dict(zip((a.name for a in arguments), args, strict=False))
    given |= kwargs
    like = next((t for k in ("self", "input", "mean", "std") if isinstance(t := given.get(k), Tensor)), None)
    if like is None or "out" in given:
        return None
    if name == "native_dropout":
        return like.clone(), torch.ones_like(like, dtype=torch.bool)
    mean = _mean(name, given)
    if mean is None:
        return None
    out = like if func._schema.is_mutable else torch.empty_like(like)
    return out.copy_(mean) if isinstance(mean, Tensor) else out.fill_(mean)


def _mean(name: str, given: dict[str, Any]) -> float | Tensor | None:
    if name == "bernoulli":
        return given["p"] if given.get("p") is not None else given["self"]
    if name == "uniform":
        return (given["from"] + given["to"]) / 2
    if name == "exponential":
        return 1 / given["lambd"]
    return {"normal": given.get("mean"), "rand_like": 0.5, "randn_like": 0.0, "poisson": given.get("self")}.get(name)
