"""Accuracy of a classifier on labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from intrafusion.arguments import Batch, Count, checked
from intrafusion.errors import ArgumentError, ModelError
from intrafusion.network.inputs import Inputs, output_tensors, told_of
from intrafusion.network.state import preserve_state

BATCH_SIZE = 25  # small enough for the activations of a layer to stay in a CPU's caches, and fastest there


@checked
def accuracy(model: nn.Module, images: Batch, labels: Tensor, batch_size: Count = BATCH_SIZE) -> float:
    """Fraction, in [0, 1], of images whose largest output is the one of their label.

    Runs in evaluation mode, without gradients, on the device and in the precision of the network; the network is left
    as it was, the mode of each of its modules included.

    Args:
        images: (n, ...), one per label.
        labels: class numbers (n,).
    Raises:
        ArgumentError: no images, not one label per image, or `batch_size` below 1.
        ModelError: the output is not, and does not hold, one row of class scores per image.
    """
    if len(images) == 0 or labels.shape != (len(images),):
        raise ArgumentError(
            f"accuracy: expected one label per image, got {len(images)} images, labels {tuple(labels.shape)}; "
            "give as many of both, and at least one."
        )
    right = 0
    with preserve_state(model):
        for batch, target in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            predicted = class_scores(answer(model, batch), len(batch)).argmax(1)
            right += int((predicted == target.to(predicted.device)).sum())
    return right / len(images)


def answer(model: nn.Module, batch: Tensor) -> Any:
    """What a network returns on a batch of images, on its device and in its precision.

    Raises:
        ModelError: it does not run on them.
    """
    given = as_parameters(model, batch)
    with told_of(model, Inputs((given,), source="the images")):
        return model(given)


@checked
def class_scores(output: Any, count: int) -> Tensor:
    """The (count, classes) tensor in what a classifier returned.

    That is the output itself, its attribute or key `logits` (Hugging Face), or else its first tensor.

    Raises:
        ModelError: there is none, or it has another shape.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    scores = logits if isinstance(logits, Tensor) else next(iter(output_tensors(output)), None)
    if scores is None or scores.ndim != 2 or len(scores) != count:
        got = type(output).__name__ if scores is None else f"shape {tuple(scores.shape)}"
        raise ModelError(f"accuracy: expected class scores of shape ({count}, classes) from the network, got {got}.")
    return scores


@checked
def as_parameters(model: nn.Module, batch: Tensor) -> Tensor:
    """A copy of the batch (a forward may write into it) on the device of the network, floats in its precision."""
    tensors = [*model.parameters(), *model.buffers()]
    batch = batch.clone()
    if not tensors:
        return batch
    batch = batch.to(tensors[0].device)
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
    return batch if dtype is None or not batch.is_floating_point() else batch.to(dtype)
