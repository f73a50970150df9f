"""What a network is trained for: labels, the outputs of another network, or those of one of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.measure.accuracy import class_scores
from intrafusion.network.state import preserve_state


class Objective(Protocol):
    """(model, images, labels) -> a scalar loss; labels may be None where they are not needed."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None, /) -> Tensor: ...


@dataclass(frozen=True)
class Labels:
    """Cross-entropy to the labels."""

    smoothing: float = 0.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ModelError("train: this objective needs labels; give some, or distil from the original network.")
        return F.cross_entropy(class_scores(model(images), len(images)), labels, label_smoothing=self.smoothing)


@dataclass(frozen=True, eq=False)
class Distillation:
    r"""T^2 KL(teacher / T || network / T), no labels.

    Attributes:
        teacher: left as it was, used in evaluation mode.
        temperature: T.
    Reference: Hinton et al. 2015.
    """

    teacher: nn.Module
    temperature: float = 2.0

    __repr__ = show_briefly

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        with preserve_state(self.teacher):
            wanted = class_scores(self.teacher(images), len(images)) / self.temperature
        found = class_scores(model(images), len(images)) / self.temperature
        loss = F.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
        return loss * self.temperature**2


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

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
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


class _Reached(Exception):
    """The output of a module is there; the rest of the forward pass is not needed."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _output_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What a module gives, without running what comes after it."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output)

    handle = model.get_submodule(name).register_forward_hook(stop)
    try:
        model(images)
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    raise ModelError(f"{name}: does not run in a forward pass of the network.")
