"""How close the outputs of a smaller network are to the original's, on inputs of which it is known what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.measure.drift import OutputError
from intrafusion.network.batches import cast_like, count_images, double_first
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.inputs import Inputs, output_tensors
from intrafusion.network.outputs import name_tensors
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
        error: the output error: mean squared difference as a fraction of the variance of the original's; of several
            outputs, the largest.
        agreement: share of the rows whose largest output, the label, is the same; None where no class scores are seen.
        outputs: the error of each output beside its own variance, by name, where there are several.
    """

    error: float
    agreement: float | None = None
    outputs: Mapping[str, float] = field(default_factory=dict)

    __repr__ = show_briefly

    def is_worse_than(self, other: Closeness) -> bool:
        """By the output error, of several outputs by the sum of theirs; one that is no number is worse than any."""
        if self.outputs and self.outputs.keys() == other.outputs.keys():
            own, others = sum(self.outputs.values()), sum(other.outputs.values())
        else:
            own, others = self.error, other.error
        return own > others or math.isnan(own)


_Answer = tuple[list[Tensor], Tensor | None, list[str]]
"""What counts of the outputs of a call, what looks like class scores among them, and what the outputs are called."""


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
        error, alike, names = OutputError(), list[Tensor | None](), list[str]()
        for index, call in enumerate(self._batches):
            (found, scores, _), (expected, labels, names) = _answer(model, call), self._expect(index, call)
            error.add(found, expected)
            alike.append(_compare(scores, labels))
        known = [t for t in alike if t is not None]
        agreement = float(torch.cat(known).double().mean()) if len(known) == len(alike) else None
        outputs = _name_errors(error, names)
        worst = error.value if len(outputs) < 2 else max(outputs.values(), key=lambda e: (math.isnan(e), e))
        return Closeness(worst, agreement, outputs if len(outputs) > 1 else {})

    def _expect(self, index: int, call: Inputs) -> _Answer:
        if index in self._kept:
            return self._kept[index]
        found = _answer(self.original, call)
        if sum(t.nbytes for tensors, _, _ in (*self._kept.values(), found) for t in tensors) <= _KEPT:
            self._kept[index] = found
        return found

    @property
    def count(self) -> int:
        """Images in all of them."""
        return self._batches.count

    def __str__(self) -> str:
        return f"{self.count} {self.kind}"


def _answer(model: nn.Module, inputs: Inputs) -> _Answer:
    call = double_first(inputs)
    with preserve_state(model):
        output = cast_like(call, model).run(model)
    tensors = call.turn_outputs([t.detach() for t in output_tensors(output)])
    names = name_tensors(output)
    scores = find_scores(output, tensors)
    floating = [t.is_floating_point() or t.is_complex() for t in tensors]
    if any(floating):  # beside numbers with a point, whole ones (labels, places) are no outputs of their own
        tensors = [t for t, chosen in zip(tensors, floating, strict=True) if chosen]
        names = [name for name, chosen in zip(names, floating, strict=True) if chosen]
    counted = select_counted(tensors, call.weights)
    return counted, None if scores is None else scores[: count_images(inputs)], names


def _name_errors(error: OutputError, names: Sequence[str]) -> dict[str, float]:
    """The worst of the tensors of each name."""
    found: dict[str, float] = {}
    for index, own in error.each.items():
        found[names[index]] = max(found.get(names[index], 0.0), own) if own == own else math.nan
    return found


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
