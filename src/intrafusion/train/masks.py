"""Which weights stay: masks of single entries, by magnitude, by Wanda or by relative contribution."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from intrafusion.arguments import Count, Seed, checked
from intrafusion.errors import ArgumentError, FolderError, ModelError, show, unknown_name
from intrafusion.io.atomic import atomic_file, report_unreadable
from intrafusion.io.tensors import detach_dense, read_tensors
from intrafusion.network.batches import ImagesLike, cast_like, join_batches, read_batches
from intrafusion.network.layers import find_layers, watch_calls
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.trace import trace

Masks = dict[str, Tensor]


@checked
def masks_of(
    model: nn.Module,
    sparsity: float,
    criterion: str = "magnitude",
    images: ImagesLike | None = None,
    *,
    rows: Count = 4096,
    seed: Seed = 0,
) -> Masks:
    """For every convolution with one group and every linear layer, which entries of its weight stay.

    "wanda" and "contribution" leave alone what does more in its `forward` than multiply its weight by what it reads.

    Args:
        sparsity: fraction of the entries to drop, in [0, 1): of each layer for "magnitude", of each output for the
            others, which compare the weights of one output.
        criterion: "magnitude", "wanda" or "contribution".
        images: unlabelled; needed by the last two.
        rows: sampled places per layer at most.
        seed: of the places.
    Returns:
        boolean masks, True where an entry stays, by name of the weight.
    Raises:
        ArgumentError: an unknown criterion, or a sparsity outside [0, 1).
        ModelError: no images where they are needed.
    """
    if criterion not in _CRITERIA:
        raise ArgumentError(unknown_name("criterion", criterion, _CRITERIA))
    if not 0 <= sparsity < 1:
        raise ArgumentError(f"sparsity: expected a fraction in [0, 1), got {show(sparsity)}; 0.5 drops half.")
    if criterion == "magnitude":
        weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
        flat = {n: w.detach().abs().reshape(1, -1) for n, w in weights.items() if isinstance(w, Tensor)}
        return {f"{n}.weight": _strongest(s, sparsity).reshape(weights[n].shape) for n, s in flat.items()}
    if images is None:
        raise ModelError(f"masks: {criterion!r} looks at what layers read; pass unlabelled images.")
    inputs = join_batches(read_batches(images))
    layers = find_layers(model, trace(model, inputs))
    found: Masks = {}

    def called(name: str, x: Tensor, output: Tensor) -> None:
        layer = layers[name]
        places = layer.sample_places(output, rows, seed)
        if not layer.is_plain(x, output, places):
            return
        read = layer.take_inputs(x, places).double()
        scores = _CRITERIA[criterion](layer.matrix.detach().double(), read)
        found[f"{name}.weight"] = layer.as_weight(_strongest(scores, sparsity))

    with preserve_state(model), watch_calls({n: layer.module for n, layer in layers.items()}, called):
        cast_like(inputs, model).call(model)
    return found


def _strongest(scores: Tensor, sparsity: float) -> Tensor:
    """True for all but the fraction of lowest scores in each row; of equal scores the first ones stay."""
    dropped = int(sparsity * scores.shape[1])
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, order[:, scores.shape[1] - dropped :], False)


def wanda(weight: Tensor, read: Tensor) -> Tensor:
    r"""|W_ij| * ||x_j||_2 over the samples (Sun et al. 2024); weight (c_out, d), read (samples, d)."""
    return weight.abs() * read.norm(dim=0)


def contribution(weight: Tensor, read: Tensor) -> Tensor:
    r"""Mean over the samples of |w_ij x_j| / sum_k |w_ik x_k|; 0 for a sample in which the sum is 0.

    Reference: Hussien et al. 2024; this bounded form is OURS.
    """
    sums = read.abs() @ weight.abs().T
    shares = torch.where(sums > 0, 1 / sums.clamp(min=1e-300), 0.0)
    return weight.abs() * (shares.T @ read.abs()) / len(read)


@checked
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the entries that do not stay to zero (in place).

    Raises:
        ModelError: a mask that fits no tensor of the network.
    """
    tensors = named_tensors(model)
    for name, mask in masks.items():
        if name not in tensors or tensors[name].shape != mask.shape:
            raise ModelError(f"masks: the network has no {name!r} of shape {list(mask.shape)}.")
    with torch.no_grad():
        for name, mask in masks.items():
            tensors[name].masked_fill_(~mask.to(tensors[name].device), 0.0)


@checked
def save_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write masks to a safetensors file: a zero weight does not say that it was dropped."""
    with atomic_file(path) as temporary:
        save_file({name: detach_dense(name, mask) for name, mask in masks.items()}, temporary)


@checked
def load_masks(path: str | os.PathLike[str]) -> Masks:
    """Read what `save_masks` wrote.

    Raises:
        FolderError: no such file, a damaged one, or one that holds no masks.
    """
    path = Path(path)
    with report_unreadable(path):
        masks = read_tensors(path)
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise FolderError(f"{path}: expected masks of bool, got {name!r} of {mask.dtype}; save_masks writes them.")
    return masks


_CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda weight, read: weight.abs(),
    "wanda": wanda,
    "contribution": contribution,
}
