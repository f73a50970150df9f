"""How close the outputs of a smaller network are to the original's, on inputs of which it is known what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.measure.drift import output_error
from intrafusion.network.batches import cast_like, count_images, double_first
from intrafusion.network.inputs import Inputs, output_tensors
from intrafusion.network.row_weights import select_counted
from intrafusion.network.state import preserve_state

OUTPUT_ERROR = (
    "the mean squared difference of the outputs from the original's, as a fraction of the variance of the original's"
)
"""What the output error is."""


@dataclass(frozen=True)
class Closeness:
    """How close outputs are to the original's.

    Attributes:
        error: the output error: mean squared difference as a fraction of the variance of the original's.
        agreement: share of the rows whose largest output, the label, is the same; None where no class scores are seen.
    """

    error: float
    agreement: float | None = None

    __repr__ = show_briefly

    def is_worse_than(self, other: Closeness) -> bool:
        """By the output error; one that is no number is worse than any."""
        return self.error > other.error or math.isnan(self.error)


@dataclass(frozen=True, eq=False)
class Yardstick:
    """Inputs, and what the original network gives on them; rows of padded tokens do not count.

    Attributes:
        original: the original network, as it is to be seen on these inputs.
        inputs: all of them, as one call.
        kind: what they are, in the plural.
        unseen: whether they were kept from the solver.
    """

    original: nn.Module
    inputs: Inputs
    kind: str = "images"
    unseen: bool = True

    __repr__ = show_briefly

    @cached_property
    def _expected(self) -> tuple[list[Tensor], Tensor | None]:
        return self._run(self.original)

    def measure(self, model: nn.Module) -> Closeness:
        """How close a network is to the original here.

        Raises:
            ModelError: one of them does not run on these inputs.
        """
        (found, scores), (expected, labels) = self._run(model), self._expected
        agreement = None
        if scores is not None and labels is not None and scores.shape == labels.shape:
            agreement = float((scores.argmax(1) == labels.argmax(1)).double().mean())
        return Closeness(output_error(found, expected), agreement)

    def _run(self, model: nn.Module) -> tuple[list[Tensor], Tensor | None]:
        call = double_first(self.inputs)
        with preserve_state(model):
            output = cast_like(call, model).run(model)
        tensors = [t.detach() for t in output_tensors(output)]
        scores, counted = find_scores(output, tensors), select_counted(tensors, call.weights)
        return counted, None if scores is None else scores[: count_images(self.inputs)]

    def __str__(self) -> str:
        return f"{count_images(self.inputs)} {self.kind}"


def say_where(on: str, unseen: bool) -> str:
    """On which inputs something was measured.

    Args:
        on: how many of what.
        unseen: whether they were kept from the solver.

    >>> say_where("51 images", True), say_where("51 images", False)
    ('on 51 unseen images', 'on the 51 images that it was solved on')
    """
    if not unseen:
        return f"on the {on} that it was solved on"
    count, _, kind = on.partition(" ")
    return f"on {count} unseen {kind}" if kind in ("images", "sequences") else f"on {on}, not used by the solver"


def find_scores(output: Any, tensors: list[Tensor]) -> Tensor | None:
    """What looks like class scores (n, classes) in an output: its `logits`, or else its only tensor; None if neither.

    >>> find_scores(torch.zeros(3, 2, 2), [torch.zeros(3, 2, 2)]) is None
    True
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = logits if isinstance(logits, Tensor) else tensors[0] if len(tensors) == 1 else None
    if found is None or found.dim() != 2 or found.shape[1] < 2 or not torch.is_floating_point(found):
        return None
    return found.detach()
