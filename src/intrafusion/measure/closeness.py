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
from intrafusion.measure.drift import OutputError
from intrafusion.network.batches import cast_like, count_images, double_first
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.inputs import Inputs, output_tensors
from intrafusion.network.row_weights import select_counted
from intrafusion.network.state import preserve_state

OUTPUT_ERROR = (
    "the mean squared difference of the outputs from the original's, as a fraction of the variance of the original's"
)
"""What the output error is."""


_KEPT = 2**26  # bytes of outputs of the original that are kept from one measurement to the next


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


_Answer = tuple[list[Tensor], Tensor | None]
"""What counts of the outputs of a call, and what looks like class scores among them."""


@dataclass(frozen=True, eq=False)
class Yardstick:
    """Inputs, and what the original network gives on them; rows of padded tokens do not count.

    Attributes:
        original: the original network, as it is to be seen on these inputs.
        inputs: one call, or batches of them.
        kind: what they are, in the plural.
        unseen: whether they were kept from the solver.
    """

    original: nn.Module
    inputs: Inputs | Batches
    kind: str = "images"
    unseen: bool = True

    __repr__ = show_briefly

    @cached_property
    def _batches(self) -> Batches:
        return read_input_batches(self.inputs)

    @cached_property
    def _kept(self) -> dict[int, _Answer]:
        """What the original gives on the first batches, as far as that is little."""
        return {}

    def measure(self, model: nn.Module) -> Closeness:
        """How close a network is to the original here.

        Raises:
            ModelError: one of them does not run on these inputs.
        """
        error, alike = OutputError(), list[Tensor | None]()
        for index, call in enumerate(self._batches):
            (found, scores), (expected, labels) = _answer(model, call), self._expect(index, call)
            error.add(found, expected)
            alike.append(_compare(scores, labels))
        known = [t for t in alike if t is not None]
        agreement = float(torch.cat(known).double().mean()) if len(known) == len(alike) else None
        return Closeness(error.value, agreement)

    def _expect(self, index: int, call: Inputs) -> _Answer:
        if index in self._kept:
            return self._kept[index]
        found = _answer(self.original, call)
        if sum(t.nbytes for tensors, _ in (*self._kept.values(), found) for t in tensors) <= _KEPT:
            self._kept[index] = found
        return found

    def __str__(self) -> str:
        return f"{self._batches.count} {self.kind}"


def _answer(model: nn.Module, inputs: Inputs) -> _Answer:
    call = double_first(inputs)
    with preserve_state(model):
        output = cast_like(call, model).run(model)
    tensors = call.turn_outputs([t.detach() for t in output_tensors(output)])
    scores, counted = find_scores(output, tensors), select_counted(tensors, call.weights)
    return counted, None if scores is None else scores[: count_images(inputs)]


def _compare(scores: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Of which rows the largest score is the same; None where these are no class scores."""
    if scores is None or labels is None or scores.shape != labels.shape:
        return None
    return scores.argmax(1) == labels.argmax(1)


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
