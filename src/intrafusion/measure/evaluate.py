"""What a function of the user says of a network, such as its accuracy; whatever it does, the network stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, IntrafusionError, show
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.network.wrappers import unwrap, wrap_like

Evaluate = Callable[[nn.Module], Any]
"""Gives a number for a network, such as its accuracy."""

_CHANGED = (
    "evaluate changes the weights, or what norms remember, of the network that it is given; that is a copy, and what "
    "comes back is without these changes."
)


@dataclass(frozen=True, eq=False)
class Judge:
    """A function of the user, and what was noticed while it was called.

    Attributes:
        evaluate: it is given a copy of a network, in evaluation mode.
        notes: what the user should know.
    """

    evaluate: Evaluate
    notes: list[str] = field(default_factory=list)

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise ArgumentError(
                f"evaluate: expected a function of a network, got {show(self.evaluate)}; pass one, or None."
            )

    def score(self, model: nn.Module, called: str = "the network") -> float:
        """What it gives of a network.

        Args:
            called: how messages call that network.
        Raises:
            ArgumentError: it raises something, or gives no finite number; errors of this library pass.
        """
        core = unwrap(model)
        return self._ask(model, copy_model(core), core, called)

    def score_nothing(self, model: nn.Module) -> float | None:
        """The same of that network with all parameters zero, whose outputs tell nothing; None where it says nothing."""
        empty = copy_model(unwrap(model))
        with torch.no_grad():
            for parameter in empty.parameters():
                parameter.zero_()
        try:
            return self._ask(model, empty, empty, "the network with all weights zero")
        except IntrafusionError:  # such as NaN, where something is divided by the length of a vector
            return None

    def _ask(self, wrapper: nn.Module, copy: nn.Module, like: nn.Module, called: str) -> float:
        """
        Args:
            copy: to be given away.
            like: what it is a copy of; itself where nobody minds what becomes of it.
        """
        try:
            found = self.evaluate(wrap_like(wrapper, copy).eval())
        except IntrafusionError:  # says all that is needed
            raise
        except Exception as error:
            raise ArgumentError(
                f"evaluate: raised {type(error).__name__}: {error}; of {called}. It is called with a network alone."
            ) from error
        if _has_changed(copy, like) and _CHANGED not in self.notes:
            self.notes.append(_CHANGED)
        return _read_number(found, called)


def _read_number(found: Any, called: str) -> float:
    """What an evaluation gave, as a number; a tensor of one entry is one, a text is none.

    Raises:
        ArgumentError: it is none, or not finite.
    """
    try:
        number = (
            None if isinstance(found, (str, bytes)) else float(found.detach() if isinstance(found, Tensor) else found)
        )
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = None
    if number is None:
        raise ArgumentError(f"evaluate: expected it to return a number, got {show(found)}; return one, as of {called}.")
    if not math.isfinite(number):
        raise ArgumentError(
            f"evaluate: expected it to return a finite number, got {show(found)}; check what it does with {called}."
        )
    return number + 0.0  # no -0


def _has_changed(copy: nn.Module, like: nn.Module) -> bool:
    """Whether a copy holds other values than what it was copied from, as far as it was neither moved nor cast."""
    after, before = named_tensors(copy), named_tensors(like)
    return after.keys() != before.keys() or any(_differ(after[name], tensor) for name, tensor in before.items())


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    return a.device == b.device and a.dtype == b.dtype and not torch.equal(a.nan_to_num(), b.nan_to_num())
