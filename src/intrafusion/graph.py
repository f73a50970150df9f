"""The channel graph: which indices of which tensors are one and the same channel.

Data only. Tensors are named as in `state_dict()`; nothing here refers to a module, so a graph can be printed, compared
and saved without the network it came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.names import hide_numbers, name_some, plain_name, plain_text, star_numbers
from intrafusion.table import WIDTH, GroupLine, TextTable, tabulate_groups, wrap_text

BLOCKS = ":blocks"  # what the names of groups end with whose units are whole blocks
SHARING = ":sharing"  # and of those whose units are blocks that share channels with others, as query heads a key
_MEMBERS = 25  # of a group, that are printed
_HEADER = ("group", "channels", "can be", "other layers, or reason")
_ASK = f'whole only where asked for, as by keep={{"*{BLOCKS}": 0.5}}'


class Role(StrEnum):
    """What a tensor does with the channels of a group along one of its dimensions."""

    PRODUCES = "produces"  # rows of a linear map: W <- M W
    CONSUMES = "consumes"  # columns of a linear map: W <- W U
    MATCHES = "matches"  # rows and biases of what is multiplied with the channels and summed, as keys: W <- U^T W
    SHIFTS = "shifts"  # added to each channel: a bias
    SCALES = "scales"  # multiplied onto each channel: a norm's weight, a depthwise kernel
    MEAN = "mean"  # subtracted by a norm
    VARIANCE = "variance"  # divided out by a norm
    FOLLOWS = "follows"  # anything else per channel: the slope of a PReLU, a clamp


READS = frozenset([Role.CONSUMES, Role.MATCHES])
"""What is transformed as the channels are read: by the transposed unmerge."""


@checked
@dataclass(frozen=True)
class Slice:
    """Part of a tensor: indices start..stop along dim. One group of a grouped convolution sees only such a part."""

    dim: int
    start: int
    stop: int


@checked
@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor that a group runs through.

    positions[c, s] is the index along `dim` of slot s of channel c, shape (n, slots). There is more than one slot
    where a channel covers several indices, as after conv -> flatten -> linear (one per pixel).
    Positions along `dim` count from the start of the tensor; with `within`, they hold only inside that slice.
    """

    tensor: str
    dim: int
    positions: np.ndarray
    roles: frozenset[Role]
    within: Slice | None = None

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor ('' for the network itself)."""
        return self.tensor.rpartition(".")[0]

    def key(self) -> tuple[str, int, Slice | None]:
        return self.tensor, self.dim, self.within

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}] {'+'.join(sorted(self.roles))}".rstrip()

    def __repr__(self) -> str:
        return f"Member({str(self)!r}, {len(self.positions)} channels)"


@checked
@dataclass(frozen=True)
class StreamNorm:
    """A norm over all channels of a group, giving (offset + scale) * normalised + shift, and what alone reads that.

    Attributes:
        scale, shift: names of tensors with one entry per channel; None where it has none.
        readers: weights, and the dimension along which they read.
        offset: what is added to the scale, 1 in Gemma.
    """

    scale: str | None
    shift: str | None
    readers: tuple[tuple[str, int], ...]
    offset: float = 0.0


@checked
@dataclass(frozen=True)
class StreamScale:
    """What one linear map gives to a group, and nothing else, is multiplied with a scale of each channel (LayerScale).

    Attributes:
        scale: name of a tensor with one entry per channel.
        weight, dim: the map's weight, and the dimension along which it gives the channels.
        bias: name of what it adds; None where it adds nothing.
    """

    scale: str
    weight: str
    dim: int
    bias: str | None

    __repr__ = show_briefly


@checked
@dataclass(frozen=True)
class Rotation:
    """How a group whose channels only norms see together may be rotated.

    Attributes:
        norms: those that have a scale or a shift, which go into their readers first.
        scales: those of branches, which go into what writes the branch first.
        centred: whether the rotation must leave the mean of the channels alone, as a LayerNorm takes it off.
    """

    norms: tuple[StreamNorm, ...]
    centred: bool = False
    scales: tuple[StreamScale, ...] = ()

    __repr__ = show_briefly


@checked
@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """`size` interchangeable channels and every tensor dimension that must change with them.

    Attributes:
        name: the module that produces the channels first, with `#k` where one module produces several groups.
        size: number of channels n (of whole blocks where `kind` is "block").
        members: in execution order.
        reason: why the group cannot be reduced; None if it can.
        notes: what the tracer saw happen to these channels, such as a softmax over them.
        unmixable: why channels may be selected but not mixed (merging exact duplicates would change the output);
            None where they may be mixed.
        family: groups of one family are twins (the groups of one grouped convolution, the heads of one attention)
            and must keep the same number of channels, times the `multiple` of each.
        kind: "channel", or "block" where the unit is a whole head or convolution group.
        linear: whether nothing but linear maps lies between what produces the channels and what reads them, so that any
            invertible matrix may be put there; proved by one, see `surgery.permute`.
        rotation: how the channels may be rotated although norms see them together; proved by a random one. None where
            they may not, or where `linear` says more.
        together: what looks at all channels together so that a channel of zeros is not the same as no channel (the
            statistics of a norm, a softmax, a maximum), in words; None where it is.
        depth: index counted from the output of the network by the last layer that produces the group, 0 = nearest,
            as in Theus et al. 2024; None for groups that cannot be reduced.
        multiple: how many of its channels go with one of its family: a stream that must be as wide as four heads
            together has 4, and they have 1; see `surgery.widths`.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    reason: str | None = None
    notes: tuple[str, ...] = ()
    unmixable: str | None = None
    family: int = 0
    kind: str = "channel"
    depth: int | None = None
    together: str | None = None
    linear: bool = False
    rotation: Rotation | None = None
    multiple: int = 1

    __repr__ = show_briefly

    def __str__(self) -> str:
        """Its name, what can be done to it, and the first of its members."""
        line = _describe_group(self)
        members = [str(member) for member in sort_by_role(self.members)]
        more = [f"and {len(members) - _MEMBERS} more"] if len(members) > _MEMBERS else []
        said = [
            f"{line.name}: {line.channels}{' channels' if self.is_channel else ''}, {line.how}",
            line.why,
            *members[:_MEMBERS],
            *more,
        ]
        first, *rest = (part for text in filter(None, said) for part in wrap_text(plain_text(text), WIDTH - 2))
        return "\n".join([first, *(f"  {text}" for text in rest)])

    @property
    def is_channel(self) -> bool:
        """Whether the unit is one channel, not a whole head or convolution group."""
        return self.kind == "channel"

    @property
    def reducible(self) -> bool:
        """Whether nothing speaks against changing these channels; see `reason`."""
        return self.reason is None

    @checked
    def with_role(self, *roles: Role) -> tuple[Member, ...]:
        """Members that have at least one of these roles."""
        return tuple(m for m in self.members if m.roles.intersection(roles))

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the layers whose outputs are these channels, or are multiplied with them."""
        made = self.with_role(Role.PRODUCES, Role.MATCHES)
        return tuple(dict.fromkeys(plain_name(m.module) for m in made))

    @property
    def consumers(self) -> tuple[str, ...]:
        """Names of the layers whose inputs are these channels."""
        return tuple(dict.fromkeys(plain_name(m.module) for m in self.with_role(Role.CONSUMES)))


@checked
@dataclass(frozen=True)
class FoldableNorm:
    """A batch norm that directly follows a linear map and nothing else reads in between: it can be folded into it.

    All fields but `eps` are tensor names; `producer_dim` is the output dimension of the producer's weight.
    """

    producer_weight: str
    producer_dim: int
    producer_bias: str | None
    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float

    __repr__ = show_briefly


@checked
@dataclass(frozen=True)
class WeightNorm:
    """A weight whose direction and length are tensors of their own: w = length * direction / ||direction||.

    The norm is taken over all dimensions but `dim`, the one along which `length` runs.
    """

    direction: str
    length: str
    dim: int


@dataclass(frozen=True)
class Factor:
    """A number that met channels of groups in an operation, such as the 4.0 of q @ k / 4.0."""

    operation: str
    where: str
    value: float


@checked
@dataclass(frozen=True)
class FixedSide:
    """Indices of one dimension of a tensor that belong to no group, such as the columns that read the input."""

    tensor: str
    dim: int
    size: int
    why: str

    __repr__ = show_briefly

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}] ({self.size})"


@dataclass(frozen=True, eq=False)
class Way:
    """One way through a forward that goes by the values of its tensors.

    Attributes:
        answers: what is decided at each place of the code, in order, see `network.decisions`.
        arguments: positional and keyword ones of a call that goes this way; None: those of the example.
    """

    answers: Mapping[str, tuple[Any, ...]]
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None

    __repr__ = show_briefly


@checked
@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """Every channel group of a network, in execution order, the irreducible ones with their reason.

    Attributes:
        groups: reducible and irreducible groups.
        norms: batch norms that can be folded into the layer before them.
        shapes: shape of every parameter and floating buffer that was traced.
        warnings: what a user should know about the trace, such as parameters that the example input never reached.
        weight_norms: weights that are stored as a direction and a length.
        derived: tensors that layers do not use as they are, and through what they go first.
        factors: numbers that met channels, in execution order; a smaller network must show the same.
        calls: forward calls in a row that were traced: 2 where the first leaves a state in an attribute.
        fixed: the sides of layers that are in no group; with the groups, these are all.
        ways: of a forward that goes by the values of its tensors, the ways that were followed, that of the example
            first; none of any other.
    """

    groups: tuple[ChannelGroup, ...]
    norms: tuple[FoldableNorm, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    weight_norms: tuple[WeightNorm, ...] = ()
    derived: dict[str, str] = field(default_factory=dict)
    factors: tuple[Factor, ...] = ()
    calls: int = 1
    fixed: tuple[FixedSide, ...] = ()
    ways: tuple[Way, ...] = ()

    @property
    def reducible(self) -> tuple[ChannelGroup, ...]:
        """Groups without a reason against it, blocks included."""
        return tuple(g for g in self.groups if g.reducible)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def __str__(self) -> str:
        return str(tabulate_graph(self))

    def __repr__(self) -> str:
        return f"ChannelGraph({len(self.groups)} groups, {_count_reducible(self)} can be reduced; print it to see them)"

    def _repr_html_(self) -> str:
        return tabulate_graph(self).to_html()


def tabulate_graph(graph: ChannelGraph, below: Iterable[str] = ()) -> TextTable:
    """Every group with what can be done to it; `below` are sentences to stand after how many can be reduced."""
    notes = (
        f"{_count_reducible(graph)} of {len(graph.groups)} groups can be reduced",
        *below,
        *(f"in no group, {line}" for line in describe_fixed(graph)),
        *(f"note: {w}" for w in graph.warnings),
    )
    return tabulate_groups(_HEADER, map(_describe_group, graph.groups), notes)


def _count_reducible(graph: ChannelGraph) -> int:
    return sum(group.reducible and group.is_channel for group in graph.groups)


def _describe_group(group: ChannelGroup) -> GroupLine:
    layers = layers_of(member.tensor for member in sort_by_role(group.members))
    if group.reason is None and group.is_channel:
        how, why = ("selected", f"not mixed: {group.unmixable}") if group.unmixable else ("mixed", "")
        if group.rotation is not None:
            how, why = "rotated", ""
        return GroupLine(group.name, str(group.size), how, layers, why)
    size = str(group.size) if group.is_channel else f"{group.size} blocks"
    return GroupLine(group.name, size, "kept", why=group.reason or _ASK)


def sort_by_role(members: Iterable[Member]) -> list[Member]:
    """Producers first."""
    rank = list(Role)
    return sorted(members, key=lambda m: min(map(rank.index, m.roles), default=len(rank)))


def layers_of(tensors: Iterable[str]) -> tuple[str, ...]:
    """The layers that own these tensors; a tensor of the network itself stands for itself."""
    names = map(plain_name, tensors)
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def describe_fixed(graph: ChannelGraph) -> tuple[str, ...]:
    """What is in no group, a sentence for each reason; reasons that differ in numbers of layers are one."""
    by_reason: dict[str, list[FixedSide]] = {}
    for side in graph.fixed:
        by_reason.setdefault(hide_numbers(side.why), []).append(side)
    return tuple(
        f"{star_numbers([side.why for side in sides])}: {name_some([str(side) for side in sides])}"
        for sides in by_reason.values()
    )


def families_of(groups: Iterable[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups that only make sense together, in order."""
    families: dict[int, list[ChannelGroup]] = {}
    for group in groups:
        families.setdefault(group.family, []).append(group)
    return list(families.values())


def size_twins(twins: Iterable[ChannelGroup], m: int) -> dict[str, int]:
    """The sizes of groups of one family of which one whose multiple is 1 has size m.

    >>> head, stream = (ChannelGroup(n, k, (), multiple=k // 8) for n, k in (("head", 8), ("stream", 32)))
    >>> size_twins([head, stream], 5)
    {'head': 5, 'stream': 20}
    """
    return {g.name: m * g.multiple for g in twins}
