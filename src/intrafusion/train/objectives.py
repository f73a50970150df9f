"""What a network is trained for: labels, the outputs of another network, or those of one of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.arguments import Batch, Positive, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import IntrafusionError, ModelError, show, unknown_name
from intrafusion.measure.accuracy import class_scores
from intrafusion.network.inputs import Inputs, told_of
from intrafusion.network.state import preserve_state


@runtime_checkable
class Objective(Protocol):
    """(model, images, labels) -> a scalar loss; labels may be None where they are not needed."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None, /) -> Tensor: ...


@checked
@dataclass(frozen=True)
class Labels:
    """Cross-entropy to the labels."""

    smoothing: float = 0.0

    @checked
    def __call__(self, model: nn.Module, images: Batch, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ModelError("train: this objective needs labels; give some, or distil from the original network.")
        scores = class_scores(_run(model, images), len(images))
        try:
            return F.cross_entropy(scores, labels, label_smoothing=self.smoothing)
        except (ValueError, RuntimeError, IndexError) as error:
            raise ModelError(
                f"train: expected class numbers ({len(images)},) from 0 to {scores.shape[1] - 1}, got {show(labels)}: "
                f"{error}; look at the labels of the data."
            ) from error


@checked
@dataclass(frozen=True, eq=False)
class Distillation:
    r"""T^2 KL(teacher / T || network / T), no labels.

    Attributes:
        teacher: left as it was, used in evaluation mode.
        temperature: T.
    Reference: Hinton et al. 2015.
    """

    teacher: nn.Module
    temperature: Positive = 2.0

    __repr__ = show_briefly

    @checked
    def __call__(self, model: nn.Module, images: Batch, labels: Tensor | None) -> Tensor:
        with preserve_state(self.teacher):
            wanted = class_scores(_run(self.teacher, images), len(images)) / self.temperature
        found = class_scores(_run(model, images), len(images)) / self.temperature
        loss = F.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
        return loss * self.temperature**2


@checked
@dataclass(frozen=True, eq=False)
class Block:
    """Mean squared difference of what a block gives to what it gives in the reference network; no labels.

    Attributes:
        reference: left as it was, used in evaluation mode.
        name: of the block in both networks.
        merge: (m, n), what a reduction did to the channels that the block gives (dimension 1 of images, the last of
            tokens and rows); None for nothing.
    """

    reference: nn.Module
    name: str
    merge: Tensor | None = None

    __repr__ = show_briefly

    @checked
    def __call__(self, model: nn.Module, images: Batch, labels: Tensor | None) -> Tensor:
        with preserve_state(self.reference):
            wanted = _output_of(self.reference, self.name, images)
        if self.merge is not None:
            dim = 1 if wanted.dim() > 3 else -1
            wanted = (wanted.movedim(dim, -1) @ self.merge.to(wanted).T).movedim(-1, dim)
        found = _output_of(model, self.name, images)
        if found.shape != wanted.shape:
            raise ModelError(
                f"{self.name}: gives {list(found.shape)}, {list(wanted.shape)} in the reference; pass the merge of the "
                "group that it produces (plan.maps[group].merge)."
            )
        return F.mse_loss(found, wanted)


class _Reached(IntrafusionError):
    """The output of a module is there; the rest of the forward pass is not needed."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _run(model: nn.Module, images: Tensor) -> Any:
    with told_of(model, Inputs((images,), source="the images")):
        return model(images)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """
    Raises:
        ModelError: the network has no module of this name.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise ModelError(f"train: {unknown_name('module', name, [n for n in modules if n])}")
    return modules[name]


def _output_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What a module gives, without running what comes after it."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output)

    handle = find_module(model, name).register_forward_hook(stop)
    try:
        _run(model, images)
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    raise ModelError(f"{name}: does not run in a forward pass of the network.")
