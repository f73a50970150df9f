"""What one forward pass revealed about channels: equal ones, the tensors that use them, and what sets them apart.

Labels are integers. Two labels that must move together are united (union-find, vectorised). A *block* label stands for
a set of channels that were seen together, such as a head, a norm group or a group of a grouped convolution.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from intrafusion.graph import Factor, Role, Slice, WeightNorm
from intrafusion.trace.arrays import split_runs
from intrafusion.trace.info import Tail, Writer
from intrafusion.trace.labels import FIRST, FIXED, UNIFORM

Key = tuple[str, int, Slice | None]


class UnionFind:
    """Disjoint sets of integers with array-wise operations; the representative of a set is its smallest element."""

    def __init__(self, size: int = 4096) -> None:
        self.parent = np.arange(size)

    def reserve(self, size: int) -> None:
        if size > len(self.parent):
            self.parent = np.concatenate([self.parent, np.arange(len(self.parent), max(size, 2 * len(self.parent)))])

    def find(self, x: np.ndarray) -> np.ndarray:
        parent = self.parent
        root = parent[x]
        while True:
            above = parent[root]
            if np.array_equal(above, root):
                return root
            parent[x] = above  # path compression: the next look-up is shorter
            root = above

    def unite(self, x: np.ndarray, y: np.ndarray) -> None:
        while True:
            x, y = self.find(x), self.find(y)
            different = x != y
            if not different.any():
                return
            x, y = x[different], y[different]
            np.minimum.at(self.parent, np.maximum(x, y), np.minimum(x, y))


class Cause(StrEnum):
    """Why several channels were seen together."""

    CONVOLUTION = "one group of a grouped convolution"
    REDUCTION = "reduced together"
    SOFTMAX = "softmax over channels"
    STATISTICS = "norm statistics over channels"
    PRODUCT = "contracted between two activations"


class Gates(NamedTuple):
    """members[i] met gates[i], a channel that is one value for several others; `gates` decides what that means."""

    members: np.ndarray
    gates: np.ndarray
    call: int
    where: str


class Plane(NamedTuple):
    """Two dimensions of a tensor that lie along channels at once: the entry (rows[i], positions[i]) serves labels[i].

    rows run along dimension `across`; roles and positions are those of the other dimension.
    """

    role: Role
    across: int
    rows: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


class Union(NamedTuple):
    """Labels x[i] and y[i], of channels that became one, and where; `sides` for the two sides of a product."""

    x: np.ndarray
    y: np.ndarray
    where: str
    sides: bool


class Relations:
    """Collects relations during the forward pass; `groups.build_graph` turns them into a ChannelGraph."""

    def __init__(self) -> None:
        self.sets = UnionFind()
        self.sides = UnionFind()  # the same but for what products of activations, such as queries and keys, pair up
        self.is_block = np.zeros(4096, bool)
        self.count = FIRST
        self.tables: dict[Key, np.ndarray] = {}
        self.uses: dict[Key, list[tuple[Role, np.ndarray, np.ndarray]]] = defaultdict(list)
        self.shared: dict[tuple[str, int], list[tuple[Role, np.ndarray, np.ndarray]]] = defaultdict(list)
        self.planes: dict[tuple[str, int], list[Plane]] = defaultdict(list)  # of what is shared, where it is in one
        self.births: list[int] = []  # the first label of each layer's, or other maker's
        self.calls = 0  # operations so far
        self.where = ""  # the present operation, for messages
        self.tied: list[tuple[np.ndarray, str]] = []  # channels that met fixed data, and where
        self.unions: list[Union] = []  # labels that became one, in order
        self.block_members: list[tuple[np.ndarray, int, int]] = []
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.meetings: list[tuple[np.ndarray, int, int]] = []
        self.gates: list[Gates] = []
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.dissolved: list[tuple[np.ndarray, int, int]] = []  # blocks that turned out to be one channel
        self.causes: dict[int, tuple[Cause, str]] = {}
        self.colours: list[tuple[np.ndarray, np.ndarray]] = []
        self.next_colour = 0
        self.bent: list[np.ndarray] = []  # channels that something not linear was done to
        self.products: set[str] = set()  # where two activations were multiplied and summed, as in `unions`
        self.passes: list[tuple[np.ndarray, tuple[int, int]]] = []
        self.blocked: list[tuple[np.ndarray, str]] = []
        self.pins: dict[tuple[str, int], str] = {}
        self.notes: list[tuple[np.ndarray, str]] = []
        self.reparametrised: dict[str, str] = {}
        self.norm_calls: Counter[str] = Counter()
        self.weight_norms: dict[str, WeightNorm] = {}
        self.factors: list[Factor] = []
        self.tails: dict[tuple[str, int], set[Tail | None]] = defaultdict(set)  # behind what weights read, by dim
        self.scaled: dict[str, set[Writer | None]] = defaultdict(set)  # what vectors multiply: None for anything else
        self.strays: dict[Tail, str] = {}  # of channels that something else than a linear map reads as well, and where

    def fresh(self, count: int, *, block: bool = False) -> np.ndarray:
        """New labels, one per channel."""
        start, self.count = self.count, self.count + count
        self.births.append(start)
        self.sets.reserve(self.count)
        self.sides.reserve(self.count)
        if self.count > len(self.is_block):
            self.is_block = np.concatenate([self.is_block, np.zeros(max(self.count, len(self.is_block)), bool)])
        self.is_block[start : self.count] = block
        return np.arange(start, self.count)

    def roots(self, labels: np.ndarray) -> np.ndarray:
        return self.sets.find(labels)

    def makers(self, labels: np.ndarray) -> np.ndarray:
        """A number for what made each label: labels that were made at once have the same."""
        return np.searchsorted(self.births, self.roots(labels), side="right")

    def unite(self, x: np.ndarray, y: np.ndarray, *, one_side: bool = False) -> None:
        """Labels x[i] and y[i] move together.

        Two channels become one. A channel that meets a block stays apart from the block's channels, and so do those of
        two blocks that meet.

        Args:
            one_side: whether they are on one side of what is computed, also where that is a product of activations.
        """
        if x is y or len(x) == 0 or np.array_equal(x, y):
            return
        # A gate that one value per head computes meets the channels of the head: if it were united with one of them, it
        # would be united with all, and they with each other.
        mixed = self.is_block[x] != self.is_block[y]
        if mixed.any():
            for a, b in zip(x[mixed], y[mixed], strict=True):
                channel, block = (b, a) if self.is_block[a] else (a, b)
                self.meetings.append((np.array([channel]), int(block), self.calls))
            x, y = x[~mixed], y[~mixed]
        blocks = self.is_block[x]
        self.ties.append((x[blocks], y[blocks]))
        met = (x == FIXED) != (y == FIXED)
        if met.any():
            self.tied.append((np.maximum(x[met], y[met]), self.where))
        self.join(x[~blocks], y[~blocks], one_side=one_side)

    def join(self, x: np.ndarray, y: np.ndarray, *, one_side: bool = False) -> None:
        """Labels of channels that are one from now on, and what made them so."""
        union = Union(x, y, self.where, self.where in self.products and not one_side)
        self.unions.append(union)
        self.sets.unite(x, y)
        if not union.sides:
            self.sides.unite(x, y)

    def copy(self, labels: np.ndarray, places: np.ndarray | int) -> np.ndarray:
        """New labels of the same channels, apart for each place: what follows may treat the places differently."""
        named = labels >= FIRST
        # One number per (label, place): the same channel twice at one place is the same copy.
        codes = labels[named] << 24 | np.broadcast_to(places, labels.shape)[named]
        distinct, which = np.unique(codes, return_inverse=True)
        origins, fresh = distinct >> 24, self.fresh(len(distinct))
        blocks = self.is_block[origins]
        self.is_block[fresh] = blocks
        self.ties.append((origins[blocks], fresh[blocks]))
        # Copies are the same channel from birth; they only have names of their own, so that slots can be told apart.
        for sets in (self.sets, self.sides):
            sets.parent[fresh[~blocks]] = sets.find(origins[~blocks])
        self.copies.append((fresh, origins, (distinct & 0xFFFFFF) + (self.calls << 24)))
        result = labels.copy()
        result[named] = fresh[which]
        return result

    def merge(self, x: np.ndarray, y: np.ndarray, *, one_side: bool = False) -> np.ndarray:
        """Unite element by element and return the label that each element keeps; arrays of one shape."""
        if np.array_equal(x, y):
            return x
        blocks = self.is_block[x] & self.is_block[y] & (x != y)
        both = (x > UNIFORM) & (y > UNIFORM) & ~blocks
        self.unite(x[both], y[both], one_side=one_side)
        # What survives: a label over a constant, and a channel over a block that it meets.
        weaker = (x == UNIFORM) | (self.is_block[x] & (y > UNIFORM) & ~self.is_block[y])
        result = np.where(weaker, y, x)
        result[blocks] = self._of_two_blocks(x[blocks], y[blocks])
        return result

    def gate(self, x: np.ndarray, y: np.ndarray, along: Sequence[int]) -> np.ndarray:
        """As `merge`, where x has one value for all channels that y holds along some dimensions: a gate.

        One channel that meets many does not make them one: they may still change places, as all see the same. The two
        arrays need only broadcast to one shape, and so does what is returned.
        """
        plain_x, plain_y = ((z >= FIRST) & ~self.is_block[z] for z in (x, y))
        self._note_gates(np.where(plain_x, x, UNIFORM), np.where(plain_y, y, UNIFORM), along)
        if plain_x.all() and plain_y.all():
            return y
        x, y = np.broadcast_arrays(x, y)
        return self.merge(np.where(plain_x & plain_y, UNIFORM, x), y)

    def _note_gates(self, x: np.ndarray, y: np.ndarray, along: Sequence[int]) -> None:
        """Which labels of y each label of x meets, 0 left out."""
        rest = [d for d in range(y.ndim) if d not in along]
        moved = y.transpose(*rest, *along)
        rows, which = np.unique(moved.reshape(math.prod(moved.shape[: len(rest)]), -1), axis=0, return_inverse=True)
        gates = x.transpose(*rest, *along)[(..., *(0 for _ in along))]
        pairs = np.stack([a.ravel() for a in np.broadcast_arrays(gates, which.reshape(moved.shape[: len(rest)]))])
        for gate, found in split_runs(*np.unique(pairs[:, pairs[0] > UNIFORM], axis=1)):
            # What one gate meets in several rows may meet another value of it in each: those rows move together.
            for row in found[1:]:
                self.merge(rows[found[0]], rows[row], one_side=True)
            met = np.unique(rows[found][rows[found] >= FIRST])
            self.gates.append(Gates(met, np.full(len(met), gate), self.calls, self.where))

    def _of_two_blocks(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """A new block for each distinct pair of blocks, tied to both."""
        pairs, which = np.unique(np.stack([x, y]), axis=1, return_inverse=True)
        found = self.fresh(pairs.shape[1], block=True)
        self.ties += [(pairs[0], found), (pairs[1], found)]
        return found[which.reshape(-1)]

    def block(self, labels: np.ndarray, cause: Cause, where: str) -> int:
        """A new block label for a set of channels."""
        label = int(self.fresh(1, block=True)[0])
        self.block_members.append((labels, label, self.calls))
        self.causes[label] = cause, where
        return label

    def colour(self, labels: np.ndarray, values: np.ndarray) -> None:
        """Only channels with the same value are interchangeable from now on."""
        self.colours.append((labels, values + self.next_colour))
        self.next_colour += int(values.max(initial=0)) + 1

    def passed(self, labels: np.ndarray, slot: int) -> None:
        """These channels are in one operand or output of the present operation; others may not be."""
        self.passes.append((np.unique(labels), (self.calls, slot)))

    def forbid(self, labels: np.ndarray, reason: str) -> None:
        labels = np.unique(labels)
        self.blocked.append((labels[labels > FIXED], reason))

    def pin(self, tensor: str, dim: int, reason: str) -> None:
        """No channel may run along this dimension of this tensor."""
        self.pins.setdefault((tensor, dim), reason)

    def note(self, labels: np.ndarray, text: str) -> None:
        self.notes.append((np.unique(labels), text))

    def use(self, key: Key, size: int, role: Role, positions: np.ndarray, labels: np.ndarray) -> None:
        """Index positions[i] along a tensor's dimension belongs to labels[i]; one index is one channel."""
        if len(positions) == 0:
            return
        table = self.tables.get(key)
        if table is None:
            table = self.tables[key] = np.zeros(size, np.int64)
        # The first label to reach an index holds it, later ones join it: a layer that runs twice ties what it reads.
        empty = table[positions] == 0
        table[positions[empty]] = labels[empty]
        self.unite(table[positions], labels)
        self.uses[key].append((role, positions, labels))

    def share(self, tensor: str, dim: int, role: Role, positions: np.ndarray, labels: np.ndarray) -> None:
        """As `use`, for per-channel tensors of which one entry may serve several channels."""
        if len(positions):
            self.shared[tensor, dim].append((role, positions, labels))
