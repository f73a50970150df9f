"""Layers of a network as they are observed and solved: what they read and give, where, and how they are written."""

from __future__ import annotations

import contextlib
import itertools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]
from torch.utils._python_dispatch import _disable_current_modes

from intrafusion.brief import show_briefly
from intrafusion.errors import watching
from intrafusion.graph import ChannelGraph, FoldableNorm, Member
from intrafusion.network.autocast import without_autocast
from intrafusion.network.gram import multiply_by_group
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.tensors import named_tensors

_ALIKE = 0.05  # of the outputs of a layer; half precision is off by less
_ENTRIES = 2**24  # of what the sampled rows of all groups of a layer read together, unless that are fewer rows than ...
_FEWEST_ROWS = 1024
_PIECE = 2**20  # entries of them that are put in order at a time
_GIVEN, _EACH = 6 * 2**20, 32  # entries of what the sampled rows give, unless that are fewer rows for each input

LinearMap = nn.Linear | nn.modules.conv._ConvNd
K = TypeVar("K", bound=Hashable)


# ---- which modules --------------------------------------------------------------------------------------------------


def is_linear_map(module: nn.Module) -> TypeGuard[LinearMap]:
    """Also the linear layer of older Transformers, which is no nn.Linear but has a weight and a bias as one has."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or _is_stored_transposed(module)


def _is_stored_transposed(module: nn.Module) -> bool:
    """The linear layer of GPT-2, transformers.pytorch_utils.Conv1D: y = x W + b with a weight (inputs, outputs)."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def is_convolution_or_linear(module: nn.Module) -> TypeGuard[LinearMap]:
    """Also grouped ones, not transposed convolutions."""
    known = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or _is_stored_transposed(module)
    return known and not nn.utils.parametrize.is_parametrized(module)


def is_solvable(module: nn.Module) -> TypeGuard[LinearMap]:
    """Whose weight a regression can solve for: all linear maps, grouped and transposed ones too, that own theirs."""
    return is_linear_map(module) and not nn.utils.parametrize.is_parametrized(module)


def has_own_forward(module: LinearMap) -> bool:
    """Whether it is of a subclass that may do more than a product, such as pad."""
    return type(module).forward not in _FORWARDS and not _is_stored_transposed(module)


_FORWARDS = tuple(
    kind.forward
    for kind in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
)


def _is_dense(module: nn.Module) -> TypeGuard[LinearMap]:
    """A linear layer, or a convolution in which every output reads every input channel."""
    return is_convolution_or_linear(module) and getattr(module, "groups", 1) == 1


def find_layers(
    model: nn.Module, graph: ChannelGraph, suits: Callable[[nn.Module], TypeGuard[LinearMap]] = _is_dense
) -> dict[str, Layer]:
    """Layers with a weight of their own, of real numbers, and the norms behind them, by name.

    Args:
        suits: which modules to take; by default those in which every output reads every input channel.
    """
    tensors = named_tensors(model)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    norms = {norm.producer_weight: norm for norm in graph.norms}
    scales = {s.weight: tensors[s.scale] for g in graph.groups if g.rotation is not None for s in g.rotation.scales}
    found = {}
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        if suits(module) and weight in tensors and owners[id(own := tensors[weight])] == 1 and not own.is_complex():
            norm = norms.get(weight)
            found[name] = Layer(name, module, None if norm is None else Norm.of(norm, tensors), scales.get(weight))
    return found


# ---- a layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm in evaluation mode that follows a layer and nothing else reads in between."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float

    __repr__ = show_briefly

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
    """A convolution or linear layer of a network, and the norm behind it.

    With g groups, the c outputs are g times c / g that lie next to each other; each reads d inputs of its own group.

    Attributes:
        scale: what multiplies each channel that it gives, where a rotation of the stream takes that into its weight.
    """

    name: str
    module: LinearMap
    norm: Norm | None = None
    scale: Tensor | None = None

    __repr__ = show_briefly

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def spatial_dims(self) -> int:
        return len(self.module.kernel_size) if isinstance(self.module, nn.modules.conv._ConvNd) else 0

    @property
    def channel_dim(self) -> int:
        """Of what it reads and gives, from the end."""
        return -1 - self.spatial_dims

    @property
    def input_dim(self) -> int:
        """The dimension of its weight that runs along what it reads; a tied weight may be read the other way too."""
        return 1 if isinstance(self.module, nn.Linear) or not getattr(self.module, "transposed", True) else 0

    @property
    def output_dim(self) -> int:
        """The dimension of its weight that runs along what it gives."""
        return 1 - self.input_dim

    @property
    def groups(self) -> int:
        return getattr(self.module, "groups", 1)

    @property
    def outputs(self) -> int:
        """How many channels it gives."""
        return self.module.weight.shape[self.output_dim] * (self.groups if self.output_dim else 1)

    @property
    def all_outputs(self) -> int:
        """How many its weight has, of which a function may give some."""
        return self.outputs

    @property
    def fan_in(self) -> int:
        """d, the inputs of one output."""
        return self.module.weight.numel() // self.outputs

    def limit_rows(self, rows: int) -> int:
        """That many rows, or fewer of a layer whose rows would take too much memory together.

        Each group has a small system of its own, which needs no more rows because there are more groups, nor does one
        system because it has more outputs.
        """
        if self.groups == 1:
            return min(rows, max(_EACH * self.fan_in, _GIVEN // self.outputs))
        return min(rows, max(_FEWEST_ROWS, _ENTRIES // (self.groups * self.fan_in)))

    @property
    def own_bias(self) -> Tensor | None:
        """Its bias, unless that is computed anew in each call, as one that `torch.nn.utils.prune` masks."""
        return self.module._parameters.get("bias")

    @property
    def takes_constant(self) -> bool:
        return self.own_bias is not None or self.norm is not None

    @property
    def writable(self) -> list[Tensor]:
        """What `add_` may write."""
        own = (self.module.weight, self.own_bias, None if self.norm is None else self.norm.mean)
        return [t for t in own if t is not None]

    def apply_norm(self, output: Tensor) -> Tensor:
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

    def sample_places(self, x: Tensor, limit: int, seed: int, weights: Tensor | None = None) -> Tensor:
        """Places of what it reads or gives: one index per dimension that is not the channel's; (k, dims), in order.

        The same for all networks: they depend on the name, the seed and the shape without channels.

        Args:
            weights: as `weigh_rows` gave them; places without any are left out.
        """
        return sample_places(self.name, self.shape_places(x), limit, seed, weights).to(x.device)

    def shape_places(self, x: Tensor) -> tuple[int, ...]:
        """The shape of what it reads or gives, without channels."""
        return tuple(x.shape[:-1] if x.dim() < 2 else x.movedim(self.channel_dim, -1).shape[:-1])

    def weigh_rows(self, x: Tensor, weights: RowWeights | None) -> Tensor | None:
        """How much each place of what it reads or gives counts, in the shape without channels; None for all alike."""
        if weights is None or x.dim() < 2:
            return None
        return weights.of_rows(x.movedim(self.channel_dim, -1), self.name)

    def take_rows(self, x: Tensor, places: Tensor) -> Tensor:
        """The channels (k, c) of what the layer reads or gives at these places, in their own precision."""
        if x.dim() < 2:
            return x.expand(len(places), -1)
        rows = x.movedim(self.channel_dim, -1)
        if not rows.is_contiguous():
            return rows[tuple(places.T)]
        flat = places[:, 0]  # the same, in a third of the time
        for dim in range(1, places.shape[1]):
            flat = flat * rows.shape[dim] + places[:, dim]
        return rows.reshape(-1, rows.shape[-1]).index_select(0, flat)

    def take_outputs(self, output: Tensor, places: Tensor) -> Tensor:
        """Rows (k, c) of what the layer, or its norm, or a sum gave at these places."""
        return self.take_rows(output, places).float()

    def take_inputs(self, x: Tensor, places: Tensor) -> Tensor:
        """Rows (k, d) of what the layer read for the outputs at these places, columns as in `matrix`.

        With groups, (g, k, d): the inputs of each group.
        """
        if not self.spatial_dims:
            return self.take_rows(x, places)
        patches, x = (self._scattered, x) if self._is_transposed else (self._patches, self._padded(x))
        if self.groups == 1:
            return patches(x, places).flatten(1)
        found, start = x.new_empty(self.groups, len(places), self.fan_in), 0
        for part in places.split(max(1, _PIECE // (self.groups * self.fan_in))):  # so that it is not there twice
            found[:, start : start + len(part)] = self._by_group(patches(x, part))
            start += len(part)
        return found

    def _by_group(self, rows: Tensor) -> Tensor:
        """Rows (k, places of the kernel, channels) as (g, k, d)."""
        if self.groups == rows.shape[2]:  # the same as below; PyTorch copies turned matrices an order faster
            return rows.flatten(0, 1).T.contiguous().reshape(self.groups, len(rows), -1)
        return rows.unflatten(2, (self.groups, -1)).permute(2, 0, 1, 3).flatten(2)

    @property
    def matrix(self) -> Tensor:
        """The weight as (c, d): the input channels of one place of the kernel, then those of the next."""
        weight = self.module.weight
        if self.input_dim:
            return weight.movedim(1, -1).flatten(1)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).movedim(2, -1).flatten(0, 1).flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix of that form in the shape of the weight."""
        weight = self.module.weight
        if self.input_dim:
            return matrix.reshape(weight.movedim(1, -1).shape).movedim(-1, 1)
        inputs, outputs, *kernel = weight.shape
        parts = matrix.reshape(self.groups, outputs, *kernel, inputs // self.groups)
        return parts.movedim(-1, 1).flatten(0, 1)

    def compute(self, rows: Tensor) -> Tensor:
        """What the layer makes of such rows, (k, c)."""
        bias = None if self.module.bias is None else self.module.bias.float()
        if self.groups == 1:
            return F.linear(rows.float(), self.matrix.float(), bias)
        given = multiply_by_group(rows.float(), self.matrix.float())
        return given if bias is None else given + bias

    def is_plain(self, x: Tensor, output: Tensor, places: Tensor) -> bool:
        """Whether it gives weight times patches; a subclass may pad, or scale its weight, in a forward of its own."""
        few = places[: min(len(places), 16)]
        if isinstance(self.module, nn.modules.conv._ConvNd):
            x = x[: int(few[:, 0].max()) + 1]
            if not self._is_size(x, output):
                return False
        given = self.take_outputs(output, few)
        return float((self.compute(self.take_inputs(x, few)) - given).norm()) <= _ALIKE * float(given.norm()) + 1e-12

    def _is_size(self, x: Tensor, output: Tensor) -> bool:
        """Whether a convolution gives as many places of such inputs; a transposed one may be asked for some more."""
        module = self.module
        assert isinstance(module, nn.modules.conv._ConvNd)
        kernel = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        if not self._is_transposed:
            sizes = zip(self._padded(x).shape[1:-1], kernel, strict=True)
            return tuple((size - d * (k - 1) - 1) // s + 1 for size, (k, d, s) in sizes) == tuple(output.shape[2:])
        sizes = zip(x.shape[2:], output.shape[2:], _read_padding(module), kernel, strict=True)
        more = [given - (size - 1) * s + 2 * pad - d * (k - 1) - 1 for size, given, pad, (k, d, s) in sizes]
        return all(0 <= m < max(d, s) for m, d, s in zip(more, module.dilation, module.stride, strict=True))

    @property
    def _is_transposed(self) -> bool:
        return bool(getattr(self.module, "transposed", False))

    def _padded(self, x: Tensor) -> Tensor:
        module = self.module
        assert isinstance(module, nn.modules.conv._ConvNd)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(x, module._reversed_padding_repeated_twice, mode).movedim(1, -1)

    def _patches(self, x: Tensor, places: Tensor) -> Tensor:
        """What lies under the kernel at these places, (k, places of the kernel, channels)."""
        module, *sizes = self.module, *x.shape[:-1]
        assert isinstance(module, nn.modules.conv._ConvNd)
        strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]  # from a place to the next, in flat x
        corner = places * places.new_tensor([s * step for s, step in zip((1, *module.stride), strides, strict=True)])
        kernel = [sum(o * step for o, step in zip(tap, strides[1:], strict=True)) for tap in _list_taps(module)]
        flat = corner.sum(1, keepdim=True) + places.new_tensor(kernel)
        return x.reshape(-1, x.shape[-1]).index_select(0, flat.flatten()).reshape(*flat.shape, x.shape[-1])

    def _scattered(self, x: Tensor, places: Tensor) -> Tensor:
        """What a transposed convolution adds up at these places, likewise: 0 where a place of the kernel has nothing.

        Output o gets, by place t of the kernel, the input i of which  i stride + t dilation = o + padding.
        """
        module, x = self.module, x.movedim(1, -1)
        assert isinstance(module, nn.modules.conv._ConvNd)
        stride, last = places.new_tensor(module.stride), places.new_tensor(x.shape[1:-1]) - 1
        at = places[:, None, 1:] + places.new_tensor(_read_padding(module)) - places.new_tensor(_list_taps(module))
        index = at.div(stride, rounding_mode="floor")
        there = ((index * stride == at) & (index >= 0) & (index <= last)).all(2)
        index = torch.minimum(index.clamp(min=0), last)
        rows = x[(places[:, :1].expand_as(there), *index.unbind(2))]
        return torch.where(there[..., None], rows, 0.0)

    def add_(self, change: Tensor, constant: Tensor) -> None:
        """Add in place: to the weight, in the form of `matrix`; a constant to the bias or, without one, to the norm.

        Nowhere, where it takes none.
        """
        weight = self.module.weight
        weight.data.copy_(weight.double() + self.as_weight(change))
        if self.own_bias is not None:
            self.own_bias.data.copy_(self.own_bias.double() + constant)
        elif self.norm is not None:
            self.norm.mean.data.copy_(self.norm.mean.double() - constant)


def _list_taps(module: nn.modules.conv._ConvNd) -> list[tuple[int, ...]]:
    """Where the places of a kernel lie, from the first one on."""
    kernel = zip(module.kernel_size, module.dilation, strict=True)
    return list(itertools.product(*(range(0, k * d, d) for k, d in kernel)))


def _read_padding(module: nn.modules.conv._ConvNd) -> tuple[int, ...]:
    """Of a transposed convolution, which takes no other than numbers."""
    return tuple(p for p in module.padding if isinstance(p, int))


def sample_places(name: str, shape: tuple[int, ...], limit: int, seed: int, weights: Tensor | None = None) -> Tensor:
    """Up to `limit` different places in a shape, in order, (k, dims).

    Args:
        weights: of that shape; the places are drawn as if those without weight were not there.
    """
    if weights is None:
        return _draw_places(name, shape, limit, seed)
    counted = weights.flatten().nonzero()[:, 0].cpu()
    chosen = counted[_draw_places(name, (len(counted),), limit, seed)[:, 0]]
    return unravel(chosen, shape)


def unravel(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Places (k, dims) in a shape by their numbers; of a single row, which has no dimension but its channels, (k, 0).

    >>> unravel(torch.tensor([0, 5]), (2, 3)).tolist(), unravel(torch.tensor([0]), ()).shape
    ([[0, 0], [1, 2]], torch.Size([1, 0]))
    """
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]  # torch.unravel_index imports sympy for itself
    return flat[:, None] // flat.new_tensor(strides) % flat.new_tensor(shape)


@lru_cache(maxsize=64)
def _draw_places(name: str, shape: tuple[int, ...], limit: int, seed: int) -> Tensor:
    """Kept, as each layer is asked several times."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    size = math.prod(shape)
    if size > 8 * limit:  # far more places than rows: draw, and draw again what came twice
        chosen = torch.randint(size, (limit + limit // 4,), generator=generator).unique()
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:limit]]
    else:
        chosen = torch.randperm(size, generator=generator)[:limit]
    return unravel(chosen.sort().values, shape)


# ---- the channels of a group at a layer -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Port:
    """Where a layer reads, or gives, the channels of a group.

    Attributes:
        weight: name of the layer's weight, in which the group has a member.
        reads: whether they are the layer's input, else its output.
        positions: (n, slots) along the channel dimension of that.
    """

    layer: Layer
    weight: str
    reads: bool
    positions: Tensor

    __repr__ = show_briefly

    @classmethod
    def of(cls, layer: Layer, member: Member) -> Port:
        """Where a layer has the channels that run along a dimension of its weight."""
        positions = torch.as_tensor(member.positions, dtype=torch.long)
        if member.within is not None and isinstance(layer.module, nn.modules.conv._ConvNd):
            weight = layer.module.weight
            size = weight.shape[member.within.dim] // layer.module.groups  # positions count from the slice's first one
            positions = positions + member.within.start // size * weight.shape[member.dim]
        return cls(layer, member.tensor, member.dim == layer.input_dim, positions)

    def take_channels(self, x: Tensor) -> Tensor:
        """(images, n, places) of what the layer reads or gives, every place and slot."""
        x = x.movedim(self.layer.channel_dim, -1)
        x = x[None] if x.dim() == self.layer.spatial_dims + 1 else x
        x = x.reshape(len(x), -1, x.shape[-1])
        return x[..., self.positions.to(x.device)].permute(0, 2, 1, 3).flatten(2)

    def weigh_channels(self, x: Tensor, weights: RowWeights | None) -> Tensor | None:
        """How much each of these places and slots counts, (images, places); None for all alike."""
        counts = self.layer.weigh_rows(x, weights)
        if counts is None:
            return None
        counts = counts if counts.dim() > self.layer.spatial_dims else counts[None]
        return counts.reshape(len(counts), -1).repeat_interleave(self.positions.shape[1], 1)


# ---- watching -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unseen_by_modes() -> Iterator[None]:
    """Modes that watch a network do not see what is done inside, and what is made there can be written elsewhere.

    A forward that runs in inference mode would make tensors there that nothing can be added to afterwards, and one in
    autocast products of half precision, of which nothing can be solved; see `autocast`.
    """
    with _disable_current_modes(), without_autocast(), watching():
        if not torch.is_inference_mode_enabled():
            yield
            return
        with torch.inference_mode(False), torch.no_grad():
            yield


@contextlib.contextmanager
def watch_calls(
    modules: Mapping[K, nn.Module],
    called: Callable[[K, Tensor, Any], Tensor | None] | None = None,
    *,
    reached: Callable[[K, Tensor], None] | None = None,
    history: bool = False,
) -> Iterator[None]:
    """Call `reached(key, input)` before and `called(key, input, output)` after each of these modules, inside.

    Modes that watch the network do not see what these do. What `called` returns, if it does, replaces the output. Calls
    in a transform of `torch.func` are left out: one row stands for all there, and is another thing behind it.

    Args:
        history: whether they see tensors that can be differentiated, where the network is; else these are detached.
    """
    seen = (lambda x: x) if history else _without_history
    observing = contextlib.nullcontext if history else torch.no_grad

    def before(key: K) -> Callable[..., None]:
        def hook(module: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> None:
            assert reached is not None
            if _is_in_transform():
                return
            with unseen_by_modes(), observing():
                reached(key, seen(_first(args, kwargs)))

        return hook

    def after(key: K) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], output: Any) -> Tensor | None:
            assert called is not None
            if _is_in_transform():
                return None
            with unseen_by_modes(), observing():
                instead = called(key, seen(_first(args, kwargs)), seen(output))
            # a forward that differentiates itself (forces of an energy) needs the way back through the layer
            return output + (instead - output).detach() if instead is not None and output.requires_grad else instead

        return hook

    with contextlib.ExitStack() as stack:
        for key, module in modules.items():
            if reached is not None:
                stack.callback(module.register_forward_pre_hook(before(key), with_kwargs=True).remove)
            if called is not None:
                stack.callback(module.register_forward_hook(after(key), with_kwargs=True).remove)
        yield


def _is_in_transform() -> bool:
    """Whether `torch.func.vmap`, `grad` or another of its transforms is at work."""
    return peek_interpreter_stack() is not None


def _without_history(x: Any) -> Any:
    """The tensor itself, which others know by its identity, unless gradients would follow it."""
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x


def _first(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a module is called on."""
    return args[0] if args else next(iter(kwargs.values()))
