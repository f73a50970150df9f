"""What is known about every live tensor, and what the rules may ask and say of it.

The ledger knows no operation and no rule. A rule asks `look_up`, and says what an operation did: `record` (a weight
produces or consumes channels), `lay` (a per-channel tensor lies along them), `pin` and `forbid` (not understood), or,
through `relations`, that channels are united, form a block, or are told apart by a colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.graph import Role, Slice
from intrafusion.trace.info import Axis, Info, LabelledTensor, Origin, Weight
from intrafusion.trace.labels import (
    FIXED,
    UNIFORM,
    compact,
    count_earlier,
    find_varying,
    lay_along,
    narrow,
    pair_up,
    widen,
)
from intrafusion.trace.relations import Plane, Relations


class Ledger:
    """Labels and coordinates of every tensor that is alive, and the relations that the rules found."""

    def __init__(self, model: nn.Module) -> None:
        self.relations = Relations()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.reached: set[str] = set()
        self.origins: list[Origin] = []
        # Weak: a tensor that the network drops is forgotten, and its memory is not held until the end of the pass.
        self._known = WeakTensorKeyDictionary()
        self._written = WeakTensorKeyDictionary()  # labels of tensors that are written into, which views share
        self._alike = WeakTensorKeyDictionary()  # tensors that hold one number everywhere
        # By identity: the network holds its parameters for as long as the ledger lives, so no id is reused.
        self._parameters: dict[int, str] = {}
        self._buffers = {name for name, _ in model.named_buffers()}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and id(tensor) not in self._parameters:
                self._parameters[id(tensor)] = name
                self.shapes[name] = tuple(tensor.shape)

    # ---- what is known about tensors --------------------------------------------------------------------------------

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor carries channels or comes from parameters."""
        return tensor in self._known or id(tensor) in self._parameters or self._is_part_of_written(tensor)

    def look_up(self, tensor: Tensor | None) -> Info | None:
        """What is known of a tensor; parameters and buffers get their coordinates when they are first read."""
        if tensor is None:
            return None
        if self._is_part_of_written(tensor):  # views that were made before the write see it too
            base = tensor._base
            assert base is not None
            return LabelledTensor(compact(_view_labels(self._written[base], base, tensor).clone()))
        known = self._known.get(tensor)
        if known is None and id(tensor) in self._parameters:
            known = self._known[tensor] = self._start_coordinates(self._parameters[id(tensor)])
        return known

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether it is the same for all channels, or nothing is known of it."""
        info = self.look_up(tensor)
        return info is None or (isinstance(info, LabelledTensor) and info.is_uniform)

    def is_of_buffers(self, weight: Weight) -> bool:
        """Whether a tensor was made from buffers alone, which no training changes."""
        return {axis.tensor for axis in weight.axes} <= self._buffers

    def learn(self, tensor: Tensor, info: Info | None) -> None:
        """From now on this is what is known of a tensor; None: it is a constant."""
        if len(self._written) and tensor in self._written:
            self._written[tensor].copy_(info.labels if isinstance(info, LabelledTensor) else torch.tensor(UNIFORM))
        if info is not None:
            self._known[tensor] = info
        elif tensor in self._known:
            del self._known[tensor]

    def note_filled(self, tensor: Tensor, filled: bool) -> None:
        """Whether a tensor of which nothing is known holds one number everywhere, the same for all channels."""
        base = tensor if tensor._base is None else tensor._base
        if filled:
            self._alike[base] = True
        elif base in self._alike:
            del self._alike[base]

    def write_part(self, view: Tensor, labels: Tensor) -> None:
        """Labels written into part of a tensor, of which every view then knows.

        The rest of an unknown one is fixed, unless it was filled with one number.
        """
        base = view._base
        assert base is not None
        if base not in self._written:
            known = self.look_up(base)
            rest = UNIFORM if base in self._alike else FIXED
            start = known.labels if isinstance(known, LabelledTensor) else torch.full(base.shape, rest)
            self._written[base] = torch.empty_strided(base.shape, base.stride(), dtype=torch.long).copy_(start)
        _view_labels(self._written[base], base, view).copy_(labels)
        self._known[base] = LabelledTensor(compact(self._written[base].clone()))

    def share_with_views(self, base: Tensor) -> None:
        """What is learnt of a tensor from now on is known of its views too, also of those that were made before."""
        self._written[base] = torch.empty_strided(base.shape, base.stride(), dtype=torch.long)

    def _is_part_of_written(self, tensor: Tensor) -> bool:
        base = tensor._base if len(self._written) else None
        return base is not None and base in self._written

    def is_of_network(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer itself, not one that was computed."""
        return id(tensor) in self._parameters

    def _start_coordinates(self, name: str) -> Weight:
        self.reached.add(name)
        shape = self.shapes[name]
        return Weight([Axis(name, d, lay_along(np.arange(size), d, shape)) for d, size in enumerate(shape)])

    # ---- labels -----------------------------------------------------------------------------------------------------

    def settle(self, labels: Tensor) -> Tensor:
        """The same channels with one label along dimensions that turned out to carry none."""
        united = widen(self.relations.roots(narrow(labels)), labels.shape)
        same = find_varying(labels) - find_varying(united)
        first = labels[tuple(slice(0, 1) if d in same else slice(None) for d in range(labels.dim()))]
        return first.expand(labels.shape)

    def tell_apart(self, labels: Tensor, dims: set[int]) -> Tensor:
        """A channel that stands at several places along these dimensions gets a label for each."""
        for dim in dims & find_varying(labels):
            rank = count_earlier(narrow(labels), dim)
            if rank.any():
                labels = widen(self.relations.copy(narrow(labels), rank), labels.shape)
        return labels

    def activate(self, info: Info, dims: set[int]) -> LabelledTensor:
        """Use a weight-like tensor (class token, embedding row) as an activation with channels along dims."""
        if isinstance(info, LabelledTensor):
            return info
        axes = [a for a in info.axes if a.varies and a.varies <= dims]
        if not axes:
            return LabelledTensor.fixed(info.axes[0].coordinates.shape if info.axes else torch.Size())
        first = axes[0]
        fresh = torch.from_numpy(self.relations.fresh(self.shapes[first.tensor][first.dim]))
        coordinates = first.coordinates
        small = torch.from_numpy(np.ascontiguousarray(narrow(coordinates)))
        labels = torch.where(small < 0, UNIFORM, fresh[small.clamp(min=0)]).expand(coordinates.shape)
        for axis in axes:
            self.record(info, axis, Role.PRODUCES, labels)
        return LabelledTensor(labels)

    # ---- what uses them ---------------------------------------------------------------------------------------------

    def record(self, weight: Weight, axis: Axis, role: Role, labels: Tensor, *, within: Slice | None = None) -> None:
        """A linear map's weight produces or consumes the labels along one of its dimensions."""
        positions, channels = pair_up(axis.coordinates, labels.expand(axis.coordinates.shape), 0, FIXED)
        key = (axis.tensor, axis.dim, within)
        self.relations.use(key, self.shapes[axis.tensor][axis.dim], role, positions, channels)
        if weight.nonlinear:
            self.relations.reparametrised.setdefault(axis.tensor, weight.nonlinear)

    def lay(self, weight: Weight, labels: Tensor, role: Role) -> Tensor:
        """A per-channel tensor meets labels of its shape; returns the labels of the result."""
        for axis in weight.axes:
            if not axis.varies:
                continue
            if axis.varies & find_varying(labels):
                labels = self.tell_apart(labels, axis.varies)
                positions, channels = pair_up(axis.coordinates, labels, 0, FIXED)
                self.relations.share(axis.tensor, axis.dim, role, positions, channels)
                self._note_plane(weight, axis, labels, role)
                if weight.nonlinear and role is Role.SHIFTS:
                    self.relations.reparametrised.setdefault(axis.tensor, weight.nonlinear)
            else:
                self.relations.pin(
                    axis.tensor, axis.dim, f"meets what has no channels along it: {self.relations.where}"
                )
            # A constant that meets different entries of a parameter is the same for all channels no longer.
            if bool((narrow(labels) == UNIFORM).any()):
                labels = torch.where(
                    (labels == UNIFORM) & (axis.coordinates >= 0), _follow_entries(axis, labels), labels
                )
        return labels

    def _note_plane(self, weight: Weight, axis: Axis, labels: Tensor, role: Role) -> None:
        """Whether another dimension of the same tensor lies along the channels too, as in a scale (heads, width)."""
        others = [a for a in weight.axes if a.tensor == axis.tensor and a.dim != axis.dim]
        others = [a for a in others if a.varies & find_varying(labels)]
        if len(others) == 1:
            size, rows = self.shapes[axis.tensor][axis.dim], others[0].coordinates
            entries = torch.where((rows < 0) | (axis.coordinates < 0), -1, rows * size + axis.coordinates)
            entries, channels = pair_up(compact(entries), labels, 0, FIXED)
            plane = Plane(role, others[0].dim, entries // size, entries % size, channels)
            self.relations.planes[axis.tensor, axis.dim].append(plane)

    def note_origin(self, origin: Origin) -> Origin:
        """Remember a linear map whose weight and bias are whole parameters: a norm may be folded into it."""
        self.origins.append(origin)
        return origin

    def note_read(self, info: Info | None, where: str) -> None:
        """Something reads a tensor."""
        if isinstance(info, LabelledTensor):
            if info.origin is not None:
                info.origin.reads += 1
            if info.indices_of is not None:
                self.relations.forbid(info.indices_of, f"the position of a channel is read: {where}")

    def note_passage(self, operands: Sequence[Info | None], results: Sequence[Info | None]) -> None:
        """Channels that pass an operation are unlike those that do not, operand by operand, output by output."""
        self.relations.calls += 1
        for slot, info in enumerate((*operands, *results)):
            if isinstance(info, LabelledTensor):
                self.relations.passed(narrow(info.labels), slot)

    # ---- what is not understood -------------------------------------------------------------------------------------

    def pin(self, info: Info | None, reason: str, dims: set[int] | None = None) -> None:
        """Forbid channels along the dimensions of a weight that vary (along `dims`, if given)."""
        if isinstance(info, Weight):
            for axis in info.axes:
                if dims is None or axis.varies & dims:
                    self.relations.pin(axis.tensor, axis.dim, reason)

    def forbid(self, info: Info | None, reason: str) -> None:
        """Block whatever a tensor carries."""
        if isinstance(info, LabelledTensor):
            self.relations.forbid(narrow(info.labels).ravel(), reason)
        self.pin(info, reason)


def _follow_entries(axis: Axis, labels: Tensor) -> Tensor:
    """What a constant becomes where it meets the entries of a parameter: the one channel that each entry serves.

    So does padding in front of a sequence that is scaled. Fixed, where an entry serves several or none.
    """
    entries, channels = pair_up(axis.coordinates, labels, 0, FIXED)
    if not len(entries):
        return torch.full_like(axis.coordinates, FIXED)
    lowest = np.full(int(axis.coordinates.max()) + 1, np.iinfo(np.int64).max)
    highest = np.full(len(lowest), FIXED)
    np.minimum.at(lowest, entries, channels)
    np.maximum.at(highest, entries, channels)
    small = narrow(axis.coordinates)
    found = np.where(lowest == highest, highest, FIXED)[np.maximum(small, 0)]
    return widen(found, axis.coordinates.shape)


def _view_labels(labels: Tensor, base: Tensor, view: Tensor) -> Tensor:
    """The labels of a view, as a view of its base's labels, which lie in memory as the base does."""
    return labels.as_strided(view.shape, view.stride(), view.storage_offset() - base.storage_offset())
