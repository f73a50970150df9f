"""What a law is, and the error where a method breaks one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from intrafusion.errors import IntrafusionError, RecipeError, show
from intrafusion.importance.observation import importance_label
from intrafusion.registry import registry_of


def adopt(method: Any, kind: str) -> Any:
    """The method itself; one of ours where it is named.

    Raises:
        RecipeError: an unknown name, or what cannot be called as a method of this kind is.
    """
    registry = registry_of(kind)
    if isinstance(method, (str, Mapping)):
        return registry.resolve(method)
    if not registry.can_call(method):
        raise RecipeError(f"check: expected {registry.expected}, or the name of a {kind}, got {show(method)}.")
    return method


ROUNDING = 1e-6  # numbers that should be equal but are computed in another order, relative to the largest


LAWS = {
    "shape": "the answer has the shape and type that the contract says",
    "finite": "no NaN and no infinity, whatever is dead, equal or missing",
    "deterministic": "the same question gives the same bits, whatever else drew random numbers",
    "inputs untouched": "nothing that was handed over is written to",
    "relabelling": "channels in another order get the same answer in that order",
    "needs": "a method that looks at images says so in `needs` or `needs_data`, and asks for `images=` if it gets none",
    "works somewhere": "a method may refuse a network with an IntrafusionError, but not all of them",
    "identity": "keeping every channel is the identity up to a permutation",
    "selects": "a reducer with mixes = False picks channels as they are",
    "absorbs duplicates": "merging exact duplicates changes nothing, for reducers with absorbs_duplicates = True",
    "network untouched": "a restorer changes numbers: no shape, type, device, mode, flag, parameter object or hook",
    "reference untouched": "the original network and the plan stay as they are",
    "all or nothing": "on an error nothing has been written",
    "lossless": "a reduction that lost nothing still has lost nothing after a restorer",
}


class LawError(IntrafusionError, AssertionError):
    """A method breaks a law."""


class Checking:
    """Collects the laws that one method was held to."""

    def __init__(self, method: object) -> None:
        self.name = importance_label(method)
        self.held: dict[str, None] = {}

    def law(self, name: str, holds: bool, detail: str | Callable[[], str]) -> None:
        """Raise unless it holds; the detail says where, what was expected and what was got."""
        if not holds:
            text = detail() if callable(detail) else detail
            raise LawError(f"{self.name} breaks the law {name!r} ({LAWS[name]}): {text}.")
        self.held[name] = None

    def equal(self, name: str, found: Tensor, expected: Tensor, where: str) -> None:
        self.law(name, _agree(found, expected), lambda: f"{where}: {_first_difference(found, expected)}")

    def close(self, name: str, found: Tensor, expected: Tensor, where: str) -> None:
        size = max(1e-300, float(expected.abs().max())) if expected.numel() else 1.0
        holds = found.shape == expected.shape and bool(((found - expected).abs() <= ROUNDING * size).all())
        self.law(name, holds, lambda: f"{where}: {_first_difference(found, expected, ROUNDING * size)}")

    @property
    def laws(self) -> tuple[str, ...]:
        return tuple(self.held)


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _first_difference(found: Tensor, expected: Tensor, least: float = 0.0) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"expected {describe_kind(expected)}, got {describe_kind(found)}"
    apart = ~((found - expected).abs() <= least) if found.is_floating_point() else found != expected
    at = tuple(apart.nonzero()[0].tolist()) if bool(apart.any()) else ()
    return f"at {list(at)}: expected {expected[at].item():.9g}, got {found[at].item():.9g}"


def describe_kind(value: object) -> str:
    return f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def random_order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))
