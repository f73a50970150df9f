"""Where the heads of grouped-query attention lie: rows of keys, values and queries, and columns that read them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from intrafusion.graph import BLOCKS, ChannelGraph, ChannelGroup, Member, Role
from intrafusion.names import plain_name
from intrafusion.surgery.expect import find_siblings

_Rows = tuple[int, tuple[int, bool], np.ndarray, np.ndarray]
"""Which head they are of, where in it and whether they are a pair, rows of the keys (w,) and of the queries (r, w)."""
_PAIR = 2  # channels that a rotary embedding turns together


@dataclass(frozen=True, eq=False)
class KeyPart:
    """Channels of all key heads that nothing binds to the others: a rotary pair, or what any matrix may mix.

    Attributes:
        keys: (n, w) rows of the key layer, by key head.
        queries: (n, r, w) rows of the query layer, by key head and query head.
        rotary: whether the two channels are one complex number, which complex factors may multiply and nothing else.
    """

    keys: np.ndarray
    queries: np.ndarray
    rotary: bool


@dataclass(frozen=True, eq=False)
class Heads:
    """One attention: n key/value heads, each with r query heads.

    Attributes:
        name: of the group of whole heads.
        key, query, value, output: names of the layers; all but the output give the heads, which reads them.
        parts: the key channels.
        values: (n, w) rows of the value layer.
        columns: (n, r, w) columns of the output layer.
    """

    name: str
    key: str
    query: str
    value: str
    output: str
    parts: tuple[KeyPart, ...]
    values: np.ndarray
    columns: np.ndarray

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def shared(self) -> int:
        """Query heads for each key/value head."""
        return self.columns.shape[1]


def find_heads(graph: ChannelGraph) -> tuple[list[Heads], dict[str, str]]:
    """Every attention whose heads can be merged, and why others cannot, by the name of their group of whole heads."""
    found, refused = [], {}
    blocks = [g for g in graph.groups if not g.is_channel]
    inside = dict(zip([b.name for b in blocks], find_siblings(graph), strict=False))
    for block in blocks:
        if block.name.partition("#")[0].endswith(BLOCKS) and block.reducible:
            inner = [graph[name] for name in sorted(inside[block.name])]
            heads = _read_heads(block, inner)
            if isinstance(heads, Heads):
                found.append(heads)
            else:
                refused[block.name] = heads
    return found, refused


def _read_heads(block: ChannelGroup, inner: Sequence[ChannelGroup]) -> Heads | str:
    """Heads, or why they cannot be merged."""
    keys = [g for g in inner if g.with_role(Role.MATCHES)]
    values = [g for g in inner if g.with_role(Role.CONSUMES)]
    if not keys or not values or len(keys) + len(values) != len(inner):
        return "its heads are no keys, queries and values alone"
    if odd := next((str(m) for g in inner for m in g.members if not _is_plain(m)), None):
        return f"{odd} meets the heads besides"
    if not all(g.linear for g in values):
        return "something other than sums lies between the values and the layer that reads them"
    key_rows, query_rows = _weight(keys[0], Role.MATCHES), _weight(keys[0], Role.PRODUCES)
    value_rows, columns = _weight(values[0], Role.PRODUCES), _weight(values[0], Role.CONSUMES)
    homes = {m.tensor: m.positions for m in block.members}
    if key_rows is None or query_rows is None or value_rows is None or columns is None:
        return "it reads or makes its heads by something else than weights"
    if not all(m.tensor in homes for m in (key_rows, query_rows, value_rows, columns)):
        return "its layers are not the same for all heads"
    if len({m.tensor for m in (key_rows, query_rows, value_rows, columns)}) < 4:
        return "one layer gives keys, queries or values together"
    pairs = [(_weight(g, Role.PRODUCES), _weight(g, Role.CONSUMES)) for g in values]
    read = [_read_values(a, b, homes[value_rows.tensor]) for a, b in pairs if a is not None and b is not None]
    read.sort(key=lambda entry: entry[0])
    told = [_read_keys(g, homes[key_rows.tensor]) for g in keys]
    parts = None if None in told else _gather([found for found in told if found], block.size)
    if parts is None or [head for head, *_ in read] != list(range(block.size)):
        return "its heads have different channels, or such as are no rotary pairs"
    shapes = {v.shape for _, v, _ in read}, {c.shape for *_, c in read}, {len(part.queries[0]) for part in parts}
    if any(len(different) > 1 for different in shapes) or shapes[2] != {read[0][2].shape[0]}:
        return "its key heads serve different numbers of query heads"
    return Heads(
        block.name,
        *(plain_name(m.module) for m in (key_rows, query_rows, value_rows, columns)),
        parts=parts,
        values=np.stack([rows for _, rows, _ in read]),
        columns=np.stack([found for *_, found in read]),
    )


def _is_plain(member: Member) -> bool:
    """Whether it is a row of a layer, a column, or an entry of a bias."""
    known = {Role.PRODUCES, Role.MATCHES, Role.CONSUMES, Role.SHIFTS}
    return member.within is None and bool(member.roles & known) and not member.roles - known


def _weight(group: ChannelGroup, role: Role) -> Member | None:
    return next((m for m in group.with_role(role) if m.tensor.endswith("weight")), None)


def _find_home(positions: np.ndarray, homes: np.ndarray) -> int:
    """The head that rows lie in."""
    return int(np.flatnonzero(np.isin(homes, positions).any(1))[0])


def _read_values(rows: Member, columns: Member, homes: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Which head they are of, the rows (w,) and the columns (r, w)."""
    order = np.argsort(rows.positions[:, 0])
    return _find_home(rows.positions, homes), rows.positions[order, 0], np.sort(columns.positions[order], 1).T


def _read_keys(group: ChannelGroup, homes: np.ndarray) -> _Rows | None:
    """The rows of one group of keys; None where they can be no part."""
    keys, queries = _weight(group, Role.MATCHES), _weight(group, Role.PRODUCES)
    if keys is None or queries is None:
        return None
    head = _find_home(keys.positions, homes)
    start = int(keys.positions.min() - homes[head].min())
    if group.size == 1 and keys.positions.shape[1] == _PAIR:
        return head, (start, True), np.sort(keys.positions[0]), np.sort(queries.positions[0]).reshape(-1, _PAIR)
    if not (group.linear or group.size == 1) or keys.positions.shape[1] > 1:
        return None
    order = np.argsort(keys.positions[:, 0])
    return head, (start, False), keys.positions[order, 0], np.sort(queries.positions[order], 1).T


def _gather(found: Iterable[_Rows], heads: int) -> tuple[KeyPart, ...] | None:
    """The parts that correspond in all heads; None where they do not."""
    by_start: dict[tuple[int, bool], list[tuple[int, np.ndarray, np.ndarray]]] = defaultdict(list)
    for head, start, keys, queries in found:
        by_start[start].append((head, keys, queries))
    parts = []
    for (_, rotary), own in by_start.items():
        own.sort(key=lambda entry: entry[0])
        alike = len({(k.shape, q.shape) for _, k, q in own}) == 1
        if not alike or [head for head, *_ in own] != list(range(heads)):
            return None
        keys, queries = (np.stack(side) for side in zip(*[entry[1:] for entry in own], strict=True))
        parts.append(KeyPart(keys, queries, rotary))
    return tuple(parts)
