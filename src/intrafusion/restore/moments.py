"""Mean and covariance of a group's channels as its consumers read them: measured on images, or from the norm alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.apply import named_tensors
from intrafusion.batches import Images, batches, fitted, joined
from intrafusion.graph import ChannelGraph, ChannelGroup, FoldableNorm, Member, Role
from intrafusion.inputs import ExampleInputs, Inputs
from intrafusion.norms import fold
from intrafusion.restore.layers import Layer, hooked, solvable
from intrafusion.trace.state import preserved


@dataclass(frozen=True, eq=False)
class Moments:
    """What consumers read of n channels, at each of the points where they read them, float64.

    Attributes:
        means: (n,) at each point.
        covariances: (n, n) at each point.
        reader: (n, n), sum over the consumers of W_c^T W_c, norms folded: squared change of what they give.
    """

    means: tuple[Tensor, ...]
    covariances: tuple[Tensor, ...]
    reader: Tensor

    @property
    def overall(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance over all points."""
        return torch.stack(self.means).mean(0), torch.stack(self.covariances).mean(0)


def points(group: ChannelGroup, layers: Mapping[str, Layer]) -> list[tuple[Layer, Member]]:
    """The layers that read a group along their second dimension."""
    members = [m for m in group.with_role(Role.CONSUMES) if m.dim == 1 and m.within is None]
    return [(layers[m.module], m) for m in members if m.tensor.endswith("weight") and m.module in layers]


def folded(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """Every floating tensor of a network in float64, foldable norms folded."""
    return fold({n: t for n, t in named_tensors(model).items() if t.is_floating_point()}, graph.norms)


def reader_of(readers: Iterable[tuple[Layer, Member]], weights: Mapping[str, Tensor], reach: float = 0.0) -> Tensor:
    """Sum of W_c K W_c^T over consumers; K as in `spatial_prior`."""
    total = []
    for layer, member in readers:
        columns = taps(weights[member.tensor], member, layer)
        total.append(torch.einsum("nok,kl,mol->nm", columns, spatial_prior(layer, reach).to(columns), columns))
    return torch.stack(total).sum(0)


def taps(weight: Tensor, member: Member, layer: Layer) -> Tensor:
    """(n, outputs * slots, kernel positions) of a consumer's weight."""
    columns = weight.movedim(1, 0)[torch.from_numpy(member.positions).to(weight.device)]
    return columns.reshape(len(columns), -1, kernel_size(layer))


def kernel_size(layer: Layer) -> int:
    return layer.module.weight[0, 0].numel()


def spatial_prior(layer: Layer, reach: float) -> Tensor:
    """K_pq = exp(-|p - q| / reach) between the kernel positions of a layer; the identity for reach 0."""
    grid = np.indices(layer.module.weight.shape[2:]).reshape(layer.module.weight.dim() - 2, kernel_size(layer))
    places = torch.from_numpy(grid.T.astype(np.float64))
    distance = torch.cdist(places, places) if len(grid) else torch.zeros(1, 1, dtype=torch.float64)
    return torch.exp(-distance / reach) if reach > 0 else (distance == 0).double()


# ---- measured -------------------------------------------------------------------------------------------------------


def measured(
    model: nn.Module, graph: ChannelGraph, images: Images, *, rows: int = 20_000, seed: int = 0
) -> dict[str, Moments]:
    """Moments of every group that a dense layer reads, from one forward pass of the original network.

    Args:
        images: unlabelled; see `batches`.
        rows: sampled places per layer.
    Raises:
        ModelError: no images, or images that the network does not run on.
    """
    layers = solvable(model, graph)
    read = {g.name: points(g, layers) for g in graph.reducible}
    wanted = {layer.name: layer for layers_of in read.values() for layer, _ in layers_of}
    rows_of: dict[str, Tensor] = {}

    def called(name: str, x: Tensor, output: Tensor) -> None:
        like = x if x.dim() < 2 else x.movedim(wanted[name].channel_dim, -1)
        places = wanted[name].sampled(like.shape[:-1], rows, seed).to(x.device)
        rows_of[name] = like[tuple(places.T)].double()

    with preserved(model), hooked(wanted, called):
        fitted(joined(batches(images)), model).call(model)
    weights, found = folded(model, graph), {}
    for name, all_readers in read.items():
        readers = [(layer, member) for layer, member in all_readers if layer.name in rows_of]
        if readers:
            pairs = [moments_of(rows_of[layer.name], member) for layer, member in readers]
            found[name] = Moments(*zip(*pairs, strict=True), reader_of(readers, weights))  # type: ignore[arg-type]
    return found


def moments_of(rows: Tensor, member: Member) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the channels, over rows and over the slots of each channel."""
    channels = rows[:, torch.from_numpy(member.positions).to(rows.device)]
    channels = channels.movedim(1, -1).flatten(0, -2)
    return channels.mean(0), torch.atleast_2d(torch.cov(channels.T, correction=0))


# ---- from the norm alone --------------------------------------------------------------------------------------------


def gaussian(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: ExampleInputs,
    *,
    reach: float = 1.0,
    samples: int = 8_000,
    seed: int = 0,
) -> dict[str, Moments]:
    r"""Moments without data of every group that one layer with a foldable batch norm produces.

    Behind the norm z ~ N(beta, D R D), D = diag |gamma|, and R_ij is the correlation of <w_i, x> and <w_j, x> over
    patches x with covariance I (x) K, K_pq = exp(-|p - q| / reach): neighbouring pixels are alike, channels of the
    layer before are not. The consumers read h = act(z), whose moments are taken from Gaussian samples; act is what the
    network applies on the way, found by one run. OURS.

    Args:
        example_inputs: one call of the network; only what is applied to what is read from it.
        reach: in pixels.
    """
    layers = solvable(model, graph)
    norms = {norm.producer_weight: norm for norm in graph.norms}
    paths = activations(model, layers, Inputs.of(example_inputs))
    weights, found = folded(model, graph), {}
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}
    for group in graph.reducible:
        made = [m for m in group.with_role(Role.PRODUCES) if m.tensor in norms and m.dim == 0 and m.within is None]
        readers = [(layer, m) for layer, m in points(group, layers) if made and (made[0].module, layer.name) in paths]
        if len(group.with_role(Role.PRODUCES)) != 1 or not made or not readers or made[0].module not in layers:
            continue
        z = gaussian_samples(weights, tensors, norms[made[0].tensor], layers[made[0].module], reach, samples, seed)
        z = z[:, torch.from_numpy(made[0].positions[:, 0]).to(z.device)]
        reads = [paths[made[0].module, layer.name](z) for layer, _ in readers]
        pairs = [(h.mean(0), torch.atleast_2d(torch.cov(h.T, correction=0))) for h in reads]
        found[group.name] = Moments(*zip(*pairs, strict=True), reader_of(readers, weights, reach))  # type: ignore[arg-type]
    return found


def gaussian_samples(
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    norm: FoldableNorm,
    layer: Layer,
    reach: float,
    samples: int,
    seed: int,
) -> Tensor:
    """z (samples, c) as `gaussian` describes it."""
    rows = weights[norm.producer_weight]
    rows = rows.reshape(len(rows), -1, kernel_size(layer))
    alike = torch.einsum("ock,kl,pcl->op", rows, spatial_prior(layer, reach).to(rows), rows)
    spread = alike.diagonal().clamp(min=1e-24).sqrt()
    size = torch.ones(len(rows)).to(rows) if norm.weight is None else tensors[norm.weight].abs().double()
    centre = torch.zeros_like(size) if norm.bias is None else tensors[norm.bias].double()
    covariance = alike / torch.outer(spread, spread) * torch.outer(size, size)
    values, vectors = torch.linalg.eigh(covariance)
    draws = torch.randn(samples, len(rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws.to(rows.device) @ (vectors * values.clamp(min=0).sqrt()).T + centre


# ---- what lies between a norm and a consumer ------------------------------------------------------------------------

Elementwise = Callable[[Tensor], Tensor]

ELEMENTWISE = {
    *("relu", "gelu", "silu", "mish", "elu", "leaky_relu", "softplus", "sigmoid", "tanh"),
    *("hardtanh", "hardswish", "hardsigmoid", "clamp", "clamp_min"),
}
PASSED = {
    *("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "mean"),
    *("view", "_unsafe_view", "reshape", "flatten"),
}


class Paths(TorchDispatchMode):
    """Follows each layer's norm output through element-wise functions; pooling and flattening pass as they are."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self.layers = layers
        self.known = WeakTensorKeyDictionary()  # tensor -> (layer, functions), functions None before the norm

    def start(self, output: Tensor, name: str) -> None:
        self.known[output] = (name, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self.known.get(args[0]) if args and isinstance(args[0], Tensor) else None
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2].rstrip("_")
        alone = sum(isinstance(t, Tensor) for t in tree_leaves((args, kwargs))) == 1
        first = out[0] if isinstance(out, (tuple, list)) else out
        if known is None or not isinstance(first, Tensor):
            return out
        layer, functions = known
        if functions is None:
            if "batch_norm" in name:
                self.known[first] = (layer, ())
        elif alone and name in ELEMENTWISE:
            self.known[first] = (layer, (*functions, bound(func, args[1:], kwargs)))
        elif name in PASSED:
            self.known[first] = known
        elif func._schema.is_mutable:
            self.known.pop(args[0], None)
        return out


def bound(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Elementwise:
    """The function of an operation's first argument, never in place."""
    return lambda x: func(x.clone(), *args, **kwargs)


def activations(model: nn.Module, layers: Mapping[str, Layer], inputs: Inputs) -> dict[tuple[str, str], Elementwise]:
    """What is applied to a layer's norm output before another layer reads it, by (layer, reader)."""
    normed = {name: layer for name, layer in layers.items() if layer.norm is not None}
    paths, found = Paths(normed), {}

    def called(name: str, x: Tensor, output: Tensor) -> None:
        known = paths.known.get(x)
        if known is not None and known[1] is not None:
            found[known[0], name] = composed(known[1])
        if name in normed:
            paths.start(output, name)

    with preserved(model), hooked(layers, called), paths:
        inputs.call(model)
    return found


def composed(functions: tuple[Elementwise, ...]) -> Elementwise:
    def apply(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return apply
