"""A smaller image on which a network does the same, so that proofs take a fraction of the arithmetic.

A permutation can only break which entry of a weight meets which channel. So what is proved on a smaller image holds on
the given one where each operation either is the very same on both, operands of one shape with the same arguments, or
treats every place alike, by the same arguments, and each tap of its kernel meets a place of the smaller image, too:
then every entry of a weight that takes part on the given image takes part on the smaller one, and meets there the same
channels. All that depends on places or sizes, such as a view, a position that is added or a resampling, differs in
its shapes or arguments and leaves the image as it is; so does whatever is not in the lists below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.graph import ChannelGraph
from intrafusion.network.decisions import decides
from intrafusion.network.inputs import Inputs
from intrafusion.network.modes import Mode
from intrafusion.network.state import Memory, preserve_state
from intrafusion.network.tensors import named_tensors

_STEP = 32  # pixels: most networks halve an image five times
_WORTH = 3  # times fewer pixels, or it is not worth looking

_aten = torch.ops.aten
_ALIKE = frozenset([  # places, besides what is element-wise; all read channels in dimension 1
    _aten.native_batch_norm, _aten._native_batch_norm_legit_no_training, _aten.cudnn_batch_norm,
    _aten.max_pool2d_with_indices, _aten.avg_pool2d, _aten.clone, _aten.detach, _aten.alias,
])  # fmt: skip


def find_smaller(model: nn.Module, graph: ChannelGraph, inputs: Inputs) -> Inputs | None:
    """The example with the smallest image on which the network does the same; None where there is none, or no gain."""
    (*rest, image) = inputs.tensors() or [None]
    if rest or image is None or image.dim() != 4 or not image.is_floating_point() or graph.calls > 1 or graph.ways:
        return None
    memory = None
    for size in range(2 * _STEP, math.isqrt(image.shape[2] * image.shape[3] // _WORTH) + 1, _STEP):
        memory = memory or Memory(model)
        small = inputs.map(lambda t, size=size: _thin_out(t, size))
        steps = _record(model, small, memory)
        if steps is not None and _record(model, inputs, memory, steps) is not None:
            return small
    return None


def _thin_out(image: Tensor, size: int) -> Tensor:
    """Rows and columns from all over the image."""
    for dim in (2, 3):
        places = torch.linspace(0, image.shape[dim] - 1, size, device=image.device).round().long()
        image = image.index_select(dim, places)
    return image


class _Step(NamedTuple):
    """An operation: its arguments, tensors by where they come from, and the shapes of all tensors in it."""

    func: Any
    arguments: Any
    shapes: tuple[torch.Size, ...]


class _Differs(Exception):
    """The network does something else, or something of which it is not known whether it treats places alike."""


class _Recorder(Mode):
    """Notes what a network does on the smaller image, or compares what it does on the given one with that."""

    def __init__(self, model: nn.Module, expected: Sequence[_Step] | None) -> None:
        super().__init__()
        self.expected = expected
        self.names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        self.steps: list[_Step] = []
        self.sources = WeakTensorKeyDictionary()  # by which step, and which of its outputs, a tensor was made
        self.borders = WeakTensorKeyDictionary()  # zeros around an image, (before, after) of both dimensions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = tree_map(self._name, (args, kwargs))
        operands = _list_tensors((args, kwargs))
        out = func(*args, **kwargs)
        outputs = _list_tensors(out)
        shapes = tuple(t.shape for t in (*operands, *outputs))
        step = _Step(func, arguments, shapes)
        self._check(step, args, decides(func, args))
        for index, tensor in enumerate(outputs):
            self.sources[tensor] = (len(self.steps), index)
        if self.expected is None and func.overloadpacket is _aten.constant_pad_nd:
            pads = [*args[1], 0, 0, 0, 0][:4]
            self.borders[out] = ((pads[2], pads[3]), (pads[0], pads[1]))
        self.steps.append(step)
        return out

    def _name(self, leaf: Any) -> Any:
        """Where a tensor comes from: a step, the weights, or outside, which is the image."""
        return self.sources.get(leaf, self.names.get(id(leaf))) if isinstance(leaf, Tensor) else leaf

    def _check(self, step: _Step, args: Sequence[Any], decided: bool) -> None:
        packet = step.func.overloadpacket
        if decided or torch.Tag.nondeterministic_seeded in step.func.tags:
            raise _Differs
        if self.expected is None:
            if packet is _aten.convolution:
                _check_taps(args, self.borders.get(args[0]) or ((0, 0), (0, 0)))
            return
        if len(self.steps) >= len(self.expected):
            raise _Differs
        other = self.expected[len(self.steps)]
        if (step.func, step.arguments) != (other.func, other.arguments) or len(step.shapes) != len(other.shapes):
            raise _Differs
        if step.shapes != other.shapes and not (
            _treats_places_alike(step) and all(map(_differ_in_places_alone, step.shapes, other.shapes))
        ):
            raise _Differs


def _list_tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _differ_in_places_alone(shape: torch.Size, other: torch.Size) -> bool:
    return shape == other or (len(shape) == len(other) == 4 and shape[:2] == other[:2])


def _treats_places_alike(step: _Step) -> bool:
    """Whether an operation does the same at each place of images (N, C, H, W), given the same arguments."""
    packet, (args, _) = step.func.overloadpacket, step.arguments
    if packet is _aten.convolution:
        return not args[6]  # transposed
    if packet is _aten.cat:
        return args[1:] == (1,)
    if packet is _aten.constant_pad_nd:
        return len(args[1]) <= 4 and not any(args[2:])
    if packet is _aten.mean:
        return {d % 4 for d in args[1]} == {2, 3}
    if packet is _aten._adaptive_avg_pool2d:
        return list(args[1]) == [1, 1]
    return packet in _ALIKE or _is_elementwise(step.func)


@functools.cache
def _is_elementwise(func: Any) -> bool:
    """Also of what writes in place, which has no tag of its own everywhere."""
    name = func.overloadpacket.__name__.removesuffix("_")
    same = getattr(getattr(_aten, name, None), func._overloadname, func)
    return func.namespace == "aten" and any(torch.Tag.pointwise in f.tags for f in (func, same))


def _check_taps(args: Sequence[Any], borders: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Whether each tap of a kernel meets a place of the image, and not only zeros around it."""
    image, weight, _, strides, pads, steps = args[:6]
    if weight.dim() != 4:
        raise _Differs
    spread = lambda values: list(values) * (2 // len(values))  # noqa: E731
    along = zip(image.shape[2:], weight.shape[2:], spread(strides), spread(pads), spread(steps), borders, strict=True)
    for size, taps, stride, pad, step, (before, after) in along:
        last = size + 2 * pad - step * (taps - 1) - 1
        starts = range(-pad, last - pad + 1, stride)
        if not all(any(before <= at + step * tap < size - after for at in starts) for tap in range(taps)):
            raise _Differs


def _record(
    model: nn.Module, inputs: Inputs, memory: Memory, expected: Sequence[_Step] | None = None
) -> list[_Step] | None:
    """What a network does on inputs; None where it does not run, or not as expected."""
    try:
        with preserve_state(model, memory), torch.no_grad(), _Recorder(model, expected) as recorder:
            inputs.call(model)
    except Exception:  # a network may be of one size alone, and say so as it likes
        return None
    return None if expected is not None and len(recorder.steps) != len(expected) else recorder.steps
