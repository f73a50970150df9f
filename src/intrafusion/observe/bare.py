"""Weights that functions multiply with, as the projections of nn.MultiheadAttention: seen as layers where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGraph
from intrafusion.network.layers import Layer, Norm, unseen_by_modes
from intrafusion.network.modes import Mode
from intrafusion.network.tensors import named_tensors
from intrafusion.trace.dispatch import is_composite

_MATRICES = ("aten::mm", "aten::addmm")
_SUMS = ("aten::add", "aten::add_")


@dataclass(frozen=True, eq=False)
class BareLayer(Layer):
    """What a function computes with a parameter, as a layer: its module holds views of what the network holds.

    Attributes:
        tensor: name of the parameter.
        dim: along which it has the outputs.
        start: of these, the first one that this function gives.
        all_outputs: how many these are.
        bias: name of what is added, where that is a parameter too, or a part of one.
        bias_start: the first entry of that part.
        lead: dimensions of which the rows of a matrix product are made, where these were flattened before.
        along: which of these images run along, where that is known; see `find_image_dims`.
    """

    tensor: str = ""
    dim: int = 0
    start: int = 0
    all_outputs: int = 0
    bias: str | None = None
    bias_start: int = 0
    lead: tuple[int, ...] = ()
    along: int | None = None

    __repr__ = show_briefly

    @property
    def weight_name(self) -> str:
        return self.tensor

    @property
    def output_dim(self) -> int:
        return self.dim

    @property
    def outputs(self) -> int:
        module = self.module
        return module.out_channels if isinstance(module, nn.modules.conv._ConvNd) else module.weight.shape[0]

    @property
    def stop(self) -> int:
        return self.start + self.outputs

    def meets(self, other: BareLayer) -> bool:
        """Whether both have entries of a weight, or of a bias."""
        overlap = lambda a, b: a < b + other.outputs and b < a + self.outputs  # noqa: E731
        shared = self.bias is not None and self.bias == other.bias and overlap(self.bias_start, other.bias_start)
        return shared or (self.tensor == other.tensor and overlap(self.start, other.start))

    def cut_merge(self, merge: Tensor | None, original: BareLayer) -> Tensor | None:
        """Of what became of all outputs of the parameter (m, n), the part that this function gives, (outputs, outputs).

        None where that part comes from what another function gave as well.
        """
        merge = torch.eye(self.all_outputs, dtype=torch.float64) if merge is None else merge
        rows = merge[self.start : self.stop]
        own = rows[:, original.start : original.stop]
        return own if bool(own.count_nonzero() == rows.count_nonzero()) else None

    def like(self, original: BareLayer, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> BareLayer | None:
        """The same with a bias that the original turned out to have, added in a step of its own.

        Of a bias that several products share, as many parts as there were; None where it has no such parts.

        Args:
            tensors: of this network; sizes: lengths of tensors of the original one.
        """
        if original.bias == self.bias:
            return self
        name = str(original.bias)
        bias, whole = tensors[name], sizes[name]
        part, rest = divmod(original.bias_start, original.outputs)
        if whole == original.all_outputs and len(bias) == self.all_outputs:
            return self.with_bias(name, bias, self.start)
        if rest or whole % original.outputs or len(bias) * original.outputs != whole * self.outputs:
            return None
        return self.with_bias(name, bias, part * self.outputs)

    def arrange(self, rows: Tensor, images: int) -> Tensor:
        """What it reads or gives (k, c) as a view along whose first dimension the images run, where that is seen."""
        dim = self._find_dim(images)
        if dim is None:
            return rows
        found = rows.unflatten(0, self.lead).movedim(dim, 0)
        return found if len(found) == images else found.unflatten(0, (images, -1))  # several windows of each image

    def hides_images(self, images: int) -> bool:
        """Whether images may run along several dimensions, and it is not known along which."""
        return self.lead.count(images) > 1 and self._find_dim(images) is None

    def _find_dim(self, images: int) -> int | None:
        if self.along is not None and self.along < len(self.lead) and self.lead[self.along] % images == 0:
            return self.along
        return self.lead.index(images) if self.lead.count(images) == 1 else None

    def with_bias(self, name: str, bias: Tensor, start: int) -> BareLayer:
        """The same with a bias that is added later, from its entry `start` on."""
        module = self.module
        module.bias = nn.Parameter(bias.detach()[start : start + self.outputs], requires_grad=False)
        return replace(self, bias=name, bias_start=start)


class BareWatcher(Mode):
    """Calls `reached(layer, x)` before, and `called(layer, x, output)` after each product with a parameter.

    That is a convolution with all of it, or a matrix product with all of it or some of its rows, as F.linear(x, w), or
    columns, as x @ w. Such a layer is called as the parameter and, of the parts of it, in which turn it was met. It may
    watch one pass after another; of each, `begin` is to be told.

    Args:
        ran: modules that were called, so that their own parameters are no concern of this.
        along: by layer, which dimension of `lead` images run along.

    Attributes:
        elsewhere: parameters that other operations read as well.
        biases: by layer, the parameter that was added to what was given, in a step of its own, and the part of it.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        ran: Collection[str],
        reached: Callable[[BareLayer, Tensor], None] | None = None,
        called: Callable[[BareLayer, Tensor, Tensor], None] | None = None,
        along: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.along = along or {}
        self.tensors, self.ran, self.reached, self.called = named_tensors(model), ran, reached, called
        self.norms = {norm.producer_weight: norm for norm in graph.norms}
        by_memory: dict[int, list[str]] = defaultdict(list)
        for name, _ in model.named_parameters(remove_duplicate=False):
            if name in self.tensors:
                by_memory[_memory_of(self.tensors[name])].append(name)
        self.names = {memory: names[0] for memory, names in by_memory.items() if len(names) == 1}
        self.elsewhere: set[str] = set()
        self.biases: dict[str, tuple[str, Tensor]] = {}
        self.parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.added: list[set[str]] = []  # of each pass, the layers to which a bias was
        self.given = WeakTensorKeyDictionary()
        self.leads = WeakTensorKeyDictionary()  # dimensions of which the first one of a matrix was made

    def begin(self) -> None:
        """A pass."""
        self.given.clear()
        self.leads.clear()
        self.added.append(set())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = [(t, name) for t in read if (name := self.name_of(t)) is not None]
        found = self.find(func, args, kwargs) if known else None
        if found is not None and self.reached is not None:
            with unseen_by_modes():
                self.reached(*found)
        out = func(*args, **kwargs)
        self.note(func, args, kwargs, known, found, out)
        if found is not None and self.called is not None:
            with unseen_by_modes():
                self.called(*found, out)
        return out

    def settle(self, layers: dict[str, Layer]) -> dict[str, Tensor]:
        """After all passes: gives layers the biases that were added later; those, which their rows lack, by layer."""
        found = {}
        for name, (added, bias) in self.biases.items():
            layer, always = layers.get(name), all(name in own for own in self.added)
            start = self.find_start(added, bias)
            if not isinstance(layer, BareLayer) or not isinstance(layer.module, nn.Linear) or layer.bias is not None:
                self.elsewhere.add(added)
            elif always and start is not None and len(bias) == layer.outputs:
                layers[name], found[name] = layer.with_bias(added, self.tensors[added], start), bias.detach()
            else:
                self.elsewhere.add(added)
        return found

    def list_shared(self, layers: Mapping[str, Layer], solved: Collection[str]) -> list[str]:
        """After that: which cannot be solved by themselves.

        Those are weights that are read in another way as well, or in parts that overlap, that share a bias, and those
        of layers that are solved as what they look like.
        """
        found = {name: layer for name, layer in layers.items() if isinstance(layer, BareLayer)}
        return [n for n, one in found.items() if self._is_shared(n, found) or one.tensor.rpartition(".")[0] in solved]

    def _is_shared(self, name: str, found: Mapping[str, BareLayer]) -> bool:
        layer = found[name]
        others = (other for n, other in found.items() if n != name)
        return bool(self.elsewhere & {layer.tensor, layer.bias}) or any(map(layer.meets, others))

    def name_of(self, tensor: Tensor) -> str | None:
        """The parameter of real numbers that a tensor is a view of, unless a layer that runs as such owns it."""
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_complex():
            return None
        name = self.names.get(_memory_of(tensor))
        return None if name is None or name.rpartition(".")[0] in self.ran else name

    def find_start(self, name: str, part: Tensor) -> int | None:
        """Of entries of a parameter that lie one after another, the first; None where they are no such."""
        whole = self.tensors[name]
        start = int(part.storage_offset()) - int(whole.storage_offset())
        own = whole[start : start + len(part)] if whole.dim() == 1 and start >= 0 else None
        return start if own is not None and _is_same(own, part) else None

    def note(self, func: Any, args: Any, kwargs: Any, known: Any, found: Any, out: Any) -> None:
        """What else is done with parameters, and with what was given."""
        first = out if isinstance(out, Tensor) else None
        own = [] if found is None else [found[0].tensor, found[0].bias]
        memories = {_memory_of(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        key = next((self.given[t] for t in args if isinstance(t, Tensor) and t in self.given), None)
        adds = func._schema.name in _SUMS and not kwargs and key is not None and key not in self.added[-1]
        for tensor, name in known:
            is_view = _memory_of(tensor) in memories
            if adds and tensor.dim() == 1 and _is_same(tensor, self.biases.setdefault(str(key), (name, tensor))[1]):
                self.added[-1].add(str(key))
            elif name not in own and not is_view:
                self.elsewhere.add(name)
        if first is not None and found is not None:
            self.given[first] = found[0].name
        elif first is not None and key is not None and func._schema.name in _VIEWS:
            self.given[first] = key
        if first is not None and first.dim() == 2 and func._schema.name in _VIEWS:
            self.leads[first] = _list_lead(args[0].shape, len(first))

    def find(self, func: Any, args: Any, kwargs: Any) -> tuple[BareLayer, Tensor] | None:
        """The layer and what it reads, of an operation that is such a product."""
        name = func._schema.name
        if name in _MATRICES and not kwargs:
            layer, x = self.read_matrix(args[-1], args[0] if name == "aten::addmm" else None), args[-2]
            layer = None if layer is None else replace(layer, lead=self.leads.get(x, ()))
        elif name == "aten::convolution":
            layer, x = self.read_convolution(*args), args[0]
        else:
            return None
        if layer is None:
            return None
        part, parts = (layer.start, layer.outputs), self.parts[layer.tensor]
        parts += [] if part in parts else [part]
        full = f"{layer.tensor}[{parts.index(part)}]"
        return replace(layer, name=full, along=self.along.get(full)), x

    def read_matrix(self, matrix: Tensor, bias: Tensor | None) -> BareLayer | None:
        """Of a product with (d, c)."""
        name = self.name_of(matrix)
        if name is None or (whole := self.tensors[name]).dim() != 2:
            return None
        dim = 0 if matrix.mT.stride() == whole.stride() else 1
        if (matrix if dim else matrix.mT).stride() != whole.stride() or len(matrix) != whole.shape[1 - dim]:
            return None
        start = (matrix.storage_offset() - whole.storage_offset()) // whole.stride(dim)
        own = {"tensor": name, "dim": dim, "start": start, "all_outputs": whole.shape[dim]}
        layer = BareLayer("", _linear(matrix.mT), **own)
        if bias is None:
            return layer
        added = self.name_of(bias) if bias.shape == (layer.outputs,) else None
        first = None if added is None else self.find_start(added, bias)
        return None if added is None or first is None else layer.with_bias(added, self.tensors[added], first)

    def read_convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> BareLayer | None:
        name = self.name_of(weight)
        if name is None or not _is_same(weight, self.tensors[name]):
            return None
        added = None if bias is None else self.name_of(bias)
        if (added is None) != (bias is None):
            return None
        norm = self.norms.get(name)
        module = _convolution(weight, bias, *how)
        own = None if norm is None else Norm.of(norm, self.tensors)
        dim = int(bool(how[3]))
        return BareLayer("", module, own, tensor=name, dim=dim, all_outputs=module.out_channels, bias=added)


_VIEWS = ("aten::view", "aten::_unsafe_view", "aten::alias", "aten::reshape")


def _list_lead(shape: Sequence[int], rows: int) -> tuple[int, ...]:
    """Dimensions of which the first one is made of a matrix of so many rows that is a view of such a shape.

    >>> _list_lead((7, 5, 8), 35), _list_lead((7, 15, 8), 35), _list_lead((7, 5), 4)
    ((7, 5), (7, 5), ())
    """
    lead, left = list[int](), rows
    for size in shape:
        part = size if size and left % size == 0 else left
        if left <= 1 or size % part:
            break
        lead.append(part)
        left //= part
    return tuple(lead) if left == 1 else ()


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(1, 1, bias=False, device="meta")
    module.out_features, module.in_features = weight.shape
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return module


def _convolution(weight: Tensor, bias: Tensor | None, *how: Any) -> nn.modules.conv._ConvNd:
    stride, padding, dilation, transposed, output_padding, groups = how
    dims = weight.dim() - 2
    kind = (_TRANSPOSED if transposed else _PLAIN)[dims - 1]
    inputs, outputs = (len(weight), weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, len(weight))
    each = lambda sizes: tuple(sizes) * (dims if len(sizes) == 1 else 1)  # noqa: E731
    options = {"stride": each(stride), "padding": each(padding), "dilation": each(dilation), "groups": groups}
    options |= {"output_padding": each(output_padding)} if transposed else {}
    kernel: Any = tuple(weight.shape[2:])
    module = kind(inputs, outputs, kernel, bias=bias is not None, device="meta", **options)
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return module


_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
