"""Layers whose weights a regression can solve for: what they read and give at sampled places, how they are written."""

from __future__ import annotations

import contextlib
import itertools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeGuard

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from intrafusion.graph import ChannelGraph, FoldableNorm, Role
from intrafusion.network.tensors import named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.maps import as_row_member, mix_channels, shorten

ALIKE = 0.05  # of the outputs of a layer; half precision is off by less


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm in evaluation mode that follows a layer and nothing else reads in between."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float

    @classmethod
    def of(cls, norm: FoldableNorm, tensors: Mapping[str, Tensor]) -> Norm:
        get = lambda name: None if name is None else tensors[name]  # noqa: E731
        return cls(get(norm.weight), get(norm.bias), tensors[norm.mean], tensors[norm.variance], norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise along dimension 1."""
        own = (self.mean, self.variance, self.weight, self.bias)
        mean, variance, weight, bias = (None if t is None else t.to(x.dtype) for t in own)
        return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)

    @property
    def slope(self) -> Tensor:
        """Change of the output per change of the input, (c,) float64."""
        scale = (self.variance.double() + self.eps).rsqrt()
        return scale if self.weight is None else scale * self.weight.double()


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer and the norm behind it, in one of the two networks."""

    name: str
    module: nn.Linear | nn.modules.conv._ConvNd
    norm: Norm | None

    @property
    def channel_dim(self) -> int:
        return -1 if isinstance(self.module, nn.Linear) else 1

    @property
    def fan_in(self) -> int:
        return self.module.weight[0].numel()

    @property
    def shifts(self) -> bool:
        """Whether there is a place for a constant."""
        return self.module.bias is not None or self.norm is not None

    @property
    def tensors(self) -> list[Tensor]:
        """What `add_` may write."""
        own = (self.module.weight, self.module.bias, None if self.norm is None else self.norm.mean)
        return [t for t in own if t is not None]

    def normed(self, output: Tensor) -> Tensor:
        return output if self.norm is None else self.norm(output)

    def before_norm(self, change: Tensor) -> Tensor:
        """The change (k, c) of the layer's own output that changes the norm's by this much; 0 where none does."""
        if self.norm is None:
            return change
        slope = self.norm.slope
        return change * torch.where(slope != 0, 1 / slope, 0.0).to(change)

    def after_norm(self, change: Tensor) -> Tensor:
        """The change (k, c) of the norm's output if the layer's own output changes by this much."""
        return change if self.norm is None else change * self.norm.slope.to(change)

    def places(self, output: Tensor, limit: int, seed: int) -> Tensor:
        """Sampled places of the output: one index per dimension that is not the channel's; (k, dims), in order.

        The same for both networks: they depend on the name, the seed and the shape without channels.
        """
        return self.sampled(output.movedim(self.channel_dim, -1).shape[:-1], limit, seed).to(output.device)

    def sampled(self, shape: torch.Size, limit: int, seed: int) -> Tensor:
        return sampled_places(self.name, tuple(shape), limit, seed)

    def outputs(self, output: Tensor, places: Tensor) -> Tensor:
        """Rows (k, c) of what the layer, or its norm, or a sum gave at these places."""
        return output.movedim(self.channel_dim, -1)[tuple(places.T)].float()

    @property
    def matrix(self) -> Tensor:
        """The weight as (c, d): the input channels of one place of the kernel, then those of the next."""
        return self.module.weight.movedim(1, -1).flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix of that form in the shape of the weight."""
        weight = self.module.weight
        return matrix.reshape(weight.movedim(1, -1).shape).movedim(-1, 1)

    def inputs(self, x: Tensor, places: Tensor) -> Tensor:
        """Rows (k, d) of what the layer read at these places, columns as in `matrix`."""
        return x[tuple(places.T)] if isinstance(self.module, nn.Linear) else self._patches(self._padded(x), places)

    def linear(self, rows: Tensor) -> Tensor:
        """What the layer makes of such rows, (k, c)."""
        bias = self.module.bias
        return F.linear(rows.float(), self.matrix.float(), None if bias is None else bias.float())

    def is_plain(self, x: Tensor, output: Tensor, places: Tensor) -> bool:
        """Whether it gives weight times patches; a subclass may pad, or scale its weight, in a forward of its own."""
        few = places[: min(len(places), 16)]
        if not isinstance(self.module, nn.Linear):
            x = x[: int(few[:, 0].max()) + 1]
            kernel = zip(self.module.kernel_size, self.module.dilation, self.module.stride, strict=True)
            sizes = zip(self._padded(x).shape[1:-1], kernel, strict=True)
            if tuple((size - d * (k - 1) - 1) // s + 1 for size, (k, d, s) in sizes) != tuple(output.shape[2:]):
                return False
        given = self.outputs(output, few)
        return float((self.linear(self.inputs(x, few)) - given).norm()) <= ALIKE * float(given.norm()) + 1e-12

    def _padded(self, x: Tensor) -> Tensor:
        module = self.module
        assert isinstance(module, nn.modules.conv._ConvNd)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(x, module._reversed_padding_repeated_twice, mode).movedim(1, -1)

    def _patches(self, x: Tensor, places: Tensor) -> Tensor:
        module, *sizes = self.module, *x.shape[:-1]
        assert isinstance(module, nn.modules.conv._ConvNd)
        steps = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]  # from a place to the next, in flat x
        corner = places * places.new_tensor([s * step for s, step in zip((1, *module.stride), steps, strict=True)])
        offsets = itertools.product(
            *(range(0, k * d, d) for k, d in zip(module.kernel_size, module.dilation, strict=True))
        )
        kernel = [sum(o * step for o, step in zip(offset, steps[1:], strict=True)) for offset in offsets]
        flat = corner.sum(1, keepdim=True) + places.new_tensor(kernel)
        return x.reshape(-1, x.shape[-1]).index_select(0, flat.flatten()).reshape(len(places), -1)

    def add_(self, change: Tensor, shift: Tensor) -> None:
        """Add in place: to the weight, in the form of `matrix`; a constant to the bias or, without one, to the norm."""
        weight = self.module.weight
        weight.data.copy_(weight.double() + self.as_weight(change))
        if self.module.bias is not None:
            self.module.bias.data.copy_(self.module.bias.double() + shift)
        elif self.norm is not None:
            self.norm.mean.data.copy_(self.norm.mean.double() - shift)


@lru_cache(maxsize=64)
def sampled_places(name: str, shape: tuple[int, ...], limit: int, seed: int) -> Tensor:
    """Up to `limit` different places in a shape, in order, (k, dims); kept, as each layer is asked several times."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    size = math.prod(shape)
    if size > 8 * limit:  # far more places than rows: draw, and draw again what came twice
        chosen = torch.randint(size, (limit + limit // 4,), generator=generator).unique()
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:limit]]
    else:
        chosen = torch.randperm(size, generator=generator)[:limit]
    return torch.stack(torch.unravel_index(chosen.sort().values, shape), dim=1)


def solvable(
    model: nn.Module, graph: ChannelGraph, suits: Callable[[nn.Module], bool] | None = None
) -> dict[str, Layer]:
    """Convolutions and linear layers with a weight of their own, by name; grouped ones are left out.

    Args:
        suits: which modules to take instead; they must be linear layers or convolutions.
    """
    tensors = named_tensors(model)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    norms = {norm.producer_weight: norm for norm in graph.norms}
    found = {}
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        if (suits or is_dense)(module) and weight in tensors and owners[id(tensors[weight])] == 1:
            assert isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
            norm = norms.get(weight)
            found[name] = Layer(name, module, None if norm is None else Norm.of(norm, tensors))
    return found


def is_convolution_or_linear(module: nn.Module) -> bool:
    """Also grouped ones, not transposed ones."""
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not (
        nn.utils.parametrize.is_parametrized(module)
    )


def is_dense(module: nn.Module) -> TypeGuard[nn.Linear | nn.modules.conv._ConvNd]:
    """A linear layer, or a convolution in which every output reads every input channel."""
    if nn.utils.parametrize.is_parametrized(module):
        return False
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
    return convolution or isinstance(module, nn.Linear)


def output_map(layer: Layer, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> Tensor | None:
    """What the maps do to the outputs of a layer of the original network, as one (c', c) matrix; None for nothing."""
    weight = f"{layer.name}.weight" if layer.name else "weight"
    touching = [
        (m, maps[g.name]) for g in graph.groups if g.name in maps for m in g.members
        if m.tensor == weight and Role.PRODUCES in m.roles and m.dim == 0
    ]  # fmt: skip
    if not touching:
        return None
    matrix = torch.eye(len(layer.module.weight), dtype=torch.float64, device=layer.module.weight.device)
    for member, reduction in touching:
        matrix = mix_channels(matrix, as_row_member(member), reduction)
    return shorten(matrix, [(as_row_member(m), len(r.merge)) for m, r in touching], weight)


@contextlib.contextmanager
def hooked(
    layers: Mapping[str, Layer],
    called: Callable[[str, Tensor, Tensor], Tensor | None] | None = None,
    *,
    reached: Callable[[str, Tensor], None] | None = None,
) -> Iterator[None]:
    """Call `reached(name, input)` before and `called(name, input, output)` after each of these layers.

    Modes that watch the network do not see what these do. What `called` returns, if it does, replaces the output.
    """

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> None:
            assert reached is not None
            with _disable_current_modes():
                reached(name, first(args, kwargs))

        return hook

    def after(name: str) -> Callable[..., Tensor | None]:
        def hook(
            module: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], output: Tensor
        ) -> Tensor | None:
            assert called is not None
            with _disable_current_modes():
                return called(name, first(args, kwargs), output)

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            if reached is not None:
                stack.callback(layer.module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            if called is not None:
                stack.callback(layer.module.register_forward_hook(after(name), with_kwargs=True).remove)
        yield


def first(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a layer is called on."""
    return args[0] if args else next(iter(kwargs.values()))
