"""Mean and covariance of a group's channels as its consumers read them, measured on images."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.network.batches import ImagesLike, cast_like, count_images, double_first
from intrafusion.network.gram import WIDE, find_scale, square_columns, square_rows
from intrafusion.network.input_batches import read_input_batches
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer, Port, find_layers, unseen_by_modes, watch_calls
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.shares import ALL, ShareSampler
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.observe.bare import BareLayer, BareWatcher
from intrafusion.observe.image_dims import find_image_dims
from intrafusion.reduce.problem import Moments
from intrafusion.surgery.norms import fold_norms
from intrafusion.trace.decomposition import unfuse
from intrafusion.trace.products import Product, Products

_NO_VARIANCE = 1e-12  # a channel with less than this fraction of the largest variance does not vary
_SINGLE = 2.0**-90, 2.0**120  # between these, the largest entries and all that count beside them fit into float32
_ROUNDING = 1e-10  # of the largest variance: what rounding in float32 leaves in directions in which nothing varies


def find_readers(group: ChannelGroup, layers: Mapping[str, Layer]) -> list[Port]:
    """Where dense layers read a group."""
    members = [m for m in group.with_role(Role.CONSUMES) if m.within is None and m.module in layers]
    read = [m for m in members if m.tensor.endswith("weight") and m.dim == layers[m.module].input_dim]
    return [Port.of(layers[m.module], m) for m in read]


def count_matrices(model: nn.Module, graph: ChannelGraph, groups: Iterable[ChannelGroup]) -> dict[str, int]:
    """How many n x n matrices the moments of each group hold at least, by name.

    A covariance for each layer that reads it, and the squares of all that read it, unless their columns are few.
    """
    layers, found = find_layers(model, graph), dict[str, int]()
    for group in groups:
        ports = find_readers(group, layers)
        few = _are_few([(graph.shapes[p.weight], p.layer.input_dim, p.positions) for p in ports], group.size)
        found[group.name] = max(len(ports), 1) + (not few)
    return found


def _fold_all(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """Every floating tensor of a network in float64, foldable norms folded."""
    return fold_norms({n: t for n, t in named_tensors(model).items() if t.is_floating_point()}, graph.norms)


def _find_bare_reads(groups: Iterable[ChannelGroup]) -> dict[str, list[tuple[str, Member]]]:
    """Where each weight reads channels, whoever owns it: by weight, members with their group, all along one dim."""
    found: dict[str, list[tuple[str, Member]]] = {}
    for group in groups:
        for member in group.with_role(Role.CONSUMES):
            if member.within is None:
                known = found.setdefault(member.tensor, [])
                if not known or known[0][1].dim == member.dim:
                    known.append((group.name, member))
    return found


def measure_moments(
    model: nn.Module, graph: ChannelGraph, images: ImagesLike, *, rows: int = 20_000, seed: int = 0
) -> dict[str, Moments]:
    """Moments of every group of which something is read, from one forward pass of the original network on each batch.

    They do not depend on the batches, up to rounding, where the network answers each image by itself.

    Args:
        images: unlabelled; see `intrafusion.network.batches`.
        rows: sampled places per layer, over all images.
    Raises:
        ModelError: no images, or images that the network does not run on.
    """
    batches = read_input_batches(images, model)
    taker = MomentTaker(model, graph, rows, seed).look_at(batches)
    for batch, share in batches.shared():
        call = double_first(batch)
        taker.share, taker.weights = share, call.weights
        with preserve_state(model), taker:
            cast_like(call, model).call(model)
    return taker.moments()


class MomentTaker(contextlib.ExitStack):
    """Takes the moments of what is read of the channels in the forward passes that run inside.

    Dense layers are watched as such. Weights that are read in another way (by a function, tied, or by a layer that does
    not run as one) are watched at the products that they enter. It can be entered again, for the next batch.

    Attributes:
        share: the part of all images that the next batch is.
        weights: how much the positions of that call count; padded ones do not.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        rows: int = 20_000,
        seed: int = 0,
        weights: RowWeights | None = None,
    ) -> None:
        super().__init__()
        self.model, self.graph, self.weights, self.share = model, graph, weights, ALL
        self.sampler = ShareSampler(rows, seed)
        layers, groups = find_layers(model, graph), [g for g in graph.reducible if g.is_channel]
        self.ports: dict[str, list[tuple[str, Port]]] = defaultdict(list)  # by layer, with the group
        for group in groups:
            for port in find_readers(group, layers):
                self.ports[port.layer.name].append((group.name, port))
        self.layers = {name: layers[name] for name in self.ports}
        self.sides = {g.name: _Sides.of(g, layers, graph.shapes) for g in groups if g.with_role(Role.MATCHES)}
        self.linear = {g.name for g in groups if g.linear}
        self.bare = _find_bare_reads(groups)
        self.found: dict[str, dict[str, _Sums]] = {g.name: {} for g in groups}  # by group, by weight
        self.watched: set[str] = set()  # layers that were seen to run as such
        self.ran: set[str] = set()  # those of them that give either side of a product
        self.givers = {m.tensor for side in self.sides.values() for m in side.members}
        self.bare_givers = BareWatcher(model, graph, self.ran, called=self.given_bare) if self.givers else None

    def look_at(self, batches: Iterable[Inputs]) -> MomentTaker:
        """Before anything runs: along which dimensions the images of such batches run."""
        if self.bare_givers is not None:
            self.bare_givers.along = find_image_dims(self.model, self.graph, next(iter(batches)))
        return self

    def __enter__(self) -> MomentTaker:
        along = {weight: members[0][1].dim for weight, members in self.bare.items()}
        products = Products(named_tensors(self.model), Inputs(), self.multiplied, along)
        called = lambda _, args, kwargs: self.called(Inputs(args, kwargs), products)  # noqa: E731
        self.callback(self.model.register_forward_pre_hook(called, with_kwargs=True).remove)
        modules = {name: layer.module for name, layer in self.layers.items()}
        self.enter_context(watch_calls(modules, reached=self.reached))
        sides = {port.layer.name: port.layer for side in self.sides.values() for port in side.ports.values()}
        ran = lambda name, _: self.ran.add(name)  # noqa: E731
        self.enter_context(watch_calls({n: layer.module for n, layer in sides.items()}, self.given, reached=ran))
        self.enter_context(unfuse(self.model))
        self.enter_context(products)
        if self.bare_givers is not None:
            self.enter_context(self.bare_givers)
        return self

    def called(self, inputs: Inputs, products: Products) -> None:
        """A pass begins."""
        products.note_inputs(inputs)
        self.images = count_images(inputs)
        if self.bare_givers is not None:
            self.bare_givers.begin()

    def reached(self, name: str, x: Tensor) -> None:
        """A dense layer is about to read."""
        layer = self.layers[name]
        self.watched.add(name)
        counts = layer.weigh_rows(x, self.weights)
        places, each = self.sampler.draw(name, layer.shape_places(x), self.share, counts)
        rows, weights = layer.take_rows(x, places.to(x.device)), _weigh(places, each, counts)
        for group, port in self.ports[name]:
            sums = self.found[group].setdefault(port.weight, _Sums(layer.input_dim, port.positions))
            sums.add(rows.double() if group in self.linear else rows, port.positions, weights)

    def given(self, name: str, x: Tensor, output: Tensor) -> None:
        """A layer gave what is multiplied with what another gives."""
        for side in self.sides.values():
            side.add(name, output, self.weights)

    def given_bare(self, layer: BareLayer, x: Tensor, output: Tensor) -> None:
        """A function gave that with a parameter."""
        if layer.tensor in self.givers:
            rows = layer.arrange(output, self.images)
            rows = rows if layer.spatial_dims or rows.dim() > 2 else rows[None]  # one sequence, as far as is seen
            for side in self.sides.values():
                side.add_bare(layer, rows, self.weights)

    def multiplied(self, product: Product) -> None:
        """Something was multiplied with a weight, perhaps by one of those layers."""
        if product.contracted is None:
            return
        (a, a_made), (b, b_made) = product.sides
        a_dim, b_dim = product.contracted
        if a_made is None and b_made is not None:
            self._note_factor(b_made.coordinates, b_dim, a.movedim(a_dim, -1))
        if b_made is None and a_made is not None:
            self._note_factor(a_made.coordinates, a_dim, b.movedim(b_dim, -1))

    def _note_factor(self, weights: Mapping[str, Tensor], dim: int, x: Tensor) -> None:
        """Coordinates of weights, of which a dimension was summed over together with the last one of x."""
        for weight, coordinates in weights.items():
            index = None if self._is_watched(weight) else _index_along(coordinates, dim)
            if index is not None:
                with unseen_by_modes():
                    counts = None if self.weights is None else self.weights.of_rows(x, weight).flatten()
                    self._note_read(weight, index, x.reshape(-1, x.shape[-1]), counts)

    def _is_watched(self, weight: str) -> bool:
        """Whether the layer that owns a weight was seen to read with it."""
        layer = weight.rpartition(".")[0]
        return layer in self.watched and any(port.weight == weight for _, port in self.ports[layer])

    def _note_read(self, weight: str, index: Tensor, x: Tensor, counts: Tensor | None) -> None:
        """Rows x (k, d), of which the place i was multiplied with the coordinate index[i] of the weight.

        Args:
            counts: how much each row counts, (k,).
        """
        places, each = self.sampler.draw(weight, (len(x),), self.share, counts)
        rows, weights = x[places[:, 0].to(x.device)], _weigh(places, each, counts)
        for group, member in self.bare[weight]:
            positions = torch.as_tensor(member.positions, dtype=torch.long)
            columns = _find_places(positions, index.cpu())
            if columns is not None:
                sums = self.found[group].setdefault(weight, _Sums(member.dim, positions, shifts=False))
                sums.add(rows.double() if group in self.linear else rows, columns, weights)

    def moments(self) -> dict[str, Moments]:
        """By group; norms are folded as they are now. What was seen is forgotten, group by group: it is as large."""
        weights = _fold_all(self.model, self.graph)
        rotated, found = {g.name for g in self.graph.reducible if g.rotation is not None}, dict[str, Moments]()
        while self.found:
            name = next(iter(self.found))
            reads = {weight: sums.read() for weight, sums in self.found.pop(name).items() if sums.count}
            if reads:
                linear = name in self.linear
                seen = {weight: read.within_sample() for weight, read in reads.items()} if linear else reads
                found[name] = _join_reads(seen, weights)
            if reads and name in rotated:
                found[name] = replace(found[name], bare=_join_bare_reads(self.graph[name], reads, weights))
        late = self.settle_bare() if self.sides else {}
        sides = {group: side.moments(late) for group, side in self.sides.items()}
        return found | {group: moments for group, moments in sides.items() if moments is not None}

    def settle_bare(self) -> dict[str, Tensor]:
        """What was added to products with parameters in a step of its own, by layer."""
        layers = {port.layer.name: port.layer for side in self.sides.values() for port in side.bare.values()}
        return {} if self.bare_givers is None else self.bare_givers.settle(layers)


def _weigh(places: Tensor, each: float, counts: Tensor | None) -> Tensor | None:
    """How much each row at these places counts, (k, 1); None for all alike."""
    if counts is None:
        return None if each == 1 else torch.full((len(places), 1), each, dtype=torch.float64)
    return each * counts[tuple(places.to(counts.device).T)].double()[:, None]


@dataclass(eq=False)
class _Sides:
    """Second moments of the two sides of products, such as queries and keys.

    What the second side has in common over a sequence is left out: it adds the same to all scores of a query, which a
    softmax over them does not see.

    Attributes:
        members: weights that give either side.
        ports: of the members that are dense layers.
        bare: where functions gave those that did not run as layers, as they were last seen.
        squares: by member, the sum of squares (n, n), of slots (n, slots), and of weights so far.
    """

    members: list[Member]
    ports: dict[int, Port]
    bare: dict[int, Port] = field(default_factory=dict)
    squares: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, group: ChannelGroup, layers: Mapping[str, Layer], shapes: Mapping[str, Sequence[int]]) -> _Sides:
        members = [m for m in group.with_role(Role.PRODUCES, Role.MATCHES) if len(shapes[m.tensor]) > 1]  # no biases
        is_known = lambda m: m.module in layers and m.within is None and m.dim != layers[m.module].input_dim  # noqa: E731
        return cls(members, {i: Port.of(layers[m.module], m) for i, m in enumerate(members) if is_known(m)})

    def is_second(self, index: int) -> bool:
        return Role.MATCHES in self.members[index].roles

    def add(self, name: str, output: Tensor, weights: RowWeights | None = None) -> None:
        for index, port in self.ports.items():
            if port.layer.name == name:
                self.note(index, port, port.layer.apply_norm(output), weights)

    def add_bare(self, layer: BareLayer, output: Tensor, weights: RowWeights | None) -> None:
        for index, member in enumerate(self.members):
            if member.tensor == layer.tensor and member.dim == layer.dim and member.within is None:
                positions = torch.as_tensor(member.positions, dtype=torch.long) - layer.start
                if bool((positions >= 0).all()) and bool((positions < layer.outputs).all()):
                    port = self.bare[index] = Port(layer, member.tensor, reads=False, positions=positions)
                    self.note(index, port, layer.apply_norm(output), weights)

    def note(self, index: int, port: Port, output: Tensor, weights: RowWeights | None) -> None:
        x = port.take_channels(output).double()  # (images, n, places)
        counts = port.weigh_channels(output, weights)  # (images, 1, places)
        counts = torch.ones_like(x[:, :1]) if counts is None else counts[:, None]
        x = torch.where(counts > 0, x, 0.0)  # padded places may hold NaN
        mean = (counts * x).sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp(min=1e-300)
        x = x - mean if self.is_second(index) else x
        total = (counts * x).unflatten(2, (-1, port.positions.shape[1])).sum((0, 2))
        square, count = torch.einsum("inp,imp->nm", counts * x, x), counts.sum()
        before = self.squares.get(index)
        sums = (square, total, count)
        self.squares[index] = sums if before is None else tuple(a + b for a, b in zip(before, sums, strict=True))

    def moments(self, late: Mapping[str, Tensor]) -> Moments | None:
        """None unless all that gives either side was seen.

        Args:
            late: what was added to what functions gave, by layer.
        """
        if len(self.squares) < len(self.members):
            return None
        sides = [[self.square(i, late) for i in self.squares if self.is_second(i) == side] for side in (False, True)]
        if not all(sides):
            return None
        first, second = (torch.stack(found).sum(0) for found in sides)
        return Moments(torch.zeros_like(first[:1]), first[None], second)

    def square(self, index: int, late: Mapping[str, Tensor]) -> Tensor:
        """The second moment of what one weight gives, with what was added to it; that has no part in the second."""
        square, total, count = self.squares[index]
        port = self.bare.get(index)
        if port is not None and port.layer.name in late and not self.is_second(index):
            bias = late[port.layer.name].to(square)[port.positions.to(square.device)]  # (n, slots)
            cross = total @ bias.T
            square = square + cross + cross.T + count / bias.shape[1] * bias @ bias.T
        return square / count


@dataclass(eq=False)
class _Sums:
    """Sums over the rows that were read of the channels of a group with one weight, batch by batch.

    Attributes:
        dim: of the weight, along which the channels run.
        positions: (n, slots) along it.
        shifts: whether the reader may have a place for a constant.
        count: of rows and slots, by their weight; squares: of these weights.
        centre: (n,) float64, the mean of the first rows, about which the sums are; moved: of differences from it, (n,);
            square: of their products, (n, n).
    """

    dim: int
    positions: Tensor
    shifts: bool = True
    count: float = 0.0
    squares: float = 0.0
    centre: Tensor | None = None
    moved: Tensor | None = None
    square: Tensor | None = None

    def add(self, rows: Tensor, columns: Tensor, weights: Tensor | None) -> None:
        """Rows (k, d), of which the channels are at columns (n, slots); weights (k, 1), None for all alike."""
        channels = _take_channels(rows, columns)
        if not len(channels):
            return
        scale = find_scale(channels)
        channels = channels / scale
        if weights is not None:
            weights = weights.to(channels).repeat_interleave(len(channels) // len(weights), 0)
        count, squares = (len(channels),) * 2 if weights is None else (weights.sum(), weights.square().sum())
        if self.centre is None or self.moved is None:
            mean = channels.mean(0) if weights is None else (weights * channels).sum(0) / count
            self.centre = mean.double() * scale
            self.moved = torch.zeros_like(self.centre)
            centred = channels - mean
        else:
            centred = channels - (self.centre / scale).to(channels)
            moved = centred if weights is None else weights * centred
            self.moved = self.moved + moved.sum(0, dtype=torch.float64) * scale
        square = square_rows(centred if weights is None else weights.sqrt() * centred).mul_(scale**2)
        self.square = square if self.square is None else self.square.add_(square)
        self.count += float(count)
        self.squares += float(squares)

    def read(self) -> _Read:
        """Mean, sample covariance and that shrunk; once."""
        assert self.centre is not None
        assert self.moved is not None
        assert self.square is not None
        moved = self.moved / self.count
        sample = self.square.div_(self.count).sub_(torch.outer(moved, moved))
        rows = self.count**2 / self.squares
        covariance = shrink(sample, rows)
        return _Read(self.dim, self.positions, self.centre + moved, covariance, sample, self.shifts, rows)


@dataclass(frozen=True, eq=False)
class _Read:
    """What was read of the channels of a group with one weight.

    Attributes:
        dim: of the weight, along which the channels run.
        positions: (n, slots) along it.
        mean: (n,) over rows and slots, float64.
        covariance: (n, n) likewise, shrunk; sample: as it was seen.
        shifts: whether the reader may have a place for a constant.
        rows: of equal weight that tell as much as those that were seen.
    """

    dim: int
    positions: Tensor
    mean: Tensor
    covariance: Tensor
    sample: Tensor
    shifts: bool = True
    rows: float = 0.0

    @property
    def uncentred(self) -> tuple[Tensor, Tensor]:
        """As a mean of zero and a second moment: what is told from the channels is then told without a constant."""
        return torch.zeros_like(self.mean), self.covariance + torch.outer(self.mean, self.mean)

    def within_sample(self) -> _Read:
        """The same without what shrinking gave to directions that showed nothing in more rows than there are channels.

        Heads, bottlenecks and the like of a lower rank than they are wide lose that without loss.
        """
        if self.rows <= len(self.mean):
            return self
        values, vectors = torch.linalg.eigh(self.sample)
        alive = vectors * (values > _ROUNDING * values.amax())
        alive = alive @ alive.T
        return replace(self, covariance=alive @ self.covariance @ alive)

    def take_columns(self, weight: Tensor) -> Tensor:
        """W_c of each channel over outputs, kernel positions and slots, (n, k)."""
        return weight.movedim(self.dim, 0)[self.positions.to(weight.device)].flatten(1)

    def square_columns(self, weight: Tensor) -> Tensor:
        """Sum of W_c W_c^T over outputs, kernel positions and slots, (n, n)."""
        return square_columns(self.take_columns(weight))


def _join_reads(reads: Mapping[str, _Read], weights: Mapping[str, Tensor]) -> Moments:
    """The moments of one group from what was read with each weight."""
    shifts = all(read.shifts for read in reads.values())
    pairs = [(read.mean, read.covariance) if shifts else read.uncentred for read in reads.values()]
    means, covariances = (_stack(parts) for parts in zip(*pairs, strict=True))
    columns = _find_few_columns(reads, weights)
    if columns is not None:
        return Moments(means, covariances, None, columns=columns)
    squares = [read.square_columns(weights[name]) for name, read in reads.items()]
    return Moments(means, covariances, squares[0] if len(squares) == 1 else torch.stack(squares).sum(0))


def _find_few_columns(reads: Mapping[str, _Read], weights: Mapping[str, Tensor]) -> Tensor | None:
    """All columns of what reads many channels (k, n), where products with them are fewer than with their squares."""
    n = len(next(iter(reads.values())).mean)
    if not _are_few([(weights[name].shape, read.dim, read.positions) for name, read in reads.items()], n):
        return None
    columns = [read.take_columns(weights[name]) for name, read in reads.items()]
    dtype = torch.float32 if all(_SINGLE[0] < find_scale(own) < _SINGLE[1] for own in columns) else torch.float64
    return torch.cat([own.to(dtype) for own in columns], 1).T


def _are_few(readers: Iterable[tuple[Sequence[int], int, Tensor]], n: int) -> bool:
    """Whether weights of these shapes, that read along a dimension at positions (n, slots), have few columns for n."""
    k = sum(math.prod(shape) // shape[dim] * positions.shape[1] for shape, dim, positions in readers)
    return n > WIDE and 2 * k < n


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """One of many; a single one, which may be large, is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _join_bare_reads(group: ChannelGroup, reads: Mapping[str, _Read], weights: Mapping[str, Tensor]) -> Moments:
    """The moments of what norms give before gain and shift, if they have such; a gain of zero hides a channel.

    Then those of what others read of the stream as it is.
    """
    norms = group.rotation.norms if group.rotation is not None else ()
    places = {m.tensor: m.positions[:, 0] for m in group.with_role(Role.SCALES, Role.SHIFTS)}
    bare: dict[str, _Read] = {}
    readers: list[Tensor] = []
    behind = {name: norm for norm in norms for name, _ in norm.readers if name in reads}
    for name, norm in behind.items():
        read = reads[name]
        one = torch.ones_like(read.mean)
        gain = one if norm.scale is None else norm.offset + weights[norm.scale].flatten()[places[norm.scale]].to(one)
        shift = 0 * one if norm.shift is None else weights[norm.shift].flatten()[places[norm.shift]].to(one)
        inverse = torch.where(gain != 0, 1 / gain, 0.0)
        covariance = inverse[:, None] * read.sample * inverse  # not shrunk: that would turn the directions
        bare[name] = replace(read, mean=(read.mean - shift) * inverse, covariance=covariance)
        readers.append(gain[:, None] * read.square_columns(weights[name]).to(one) * gain)
    plain = {name: replace(read, covariance=read.sample) for name, read in reads.items() if name not in bare}
    if not bare:
        return _join_reads(plain, weights)
    readers += [read.square_columns(weights[name]).to(read.mean) for name, read in plain.items()]
    joined = _join_reads(bare | plain, weights)
    return replace(joined, squares=torch.stack(readers).sum(0), plain=len(plain), columns=None)


def _index_along(coordinates: Tensor, dim: int) -> Tensor | None:
    """The coordinates along one dimension, (k,), if they are the same all along the others."""
    rows = coordinates.movedim(dim, -1).reshape(-1, coordinates.shape[dim])
    return rows[0] if len(rows) and bool((rows == rows[:1]).all()) else None


def _find_places(positions: Tensor, index: Tensor) -> Tensor | None:
    """Places of positions (n, slots), if the place i has the coordinate index[i]; None if one is not there."""
    place = torch.full((max(int(index.max()), int(positions.max())) + 1,), -1)
    place[index] = torch.arange(len(index))
    places = place[positions]
    return None if bool((places < 0).any()) else places


def _take_channels(rows: Tensor, positions: Tensor) -> Tensor:
    """The channels at positions (n, slots) of rows (k, d), a row for each slot: (k slots, n), float32 or float64."""
    positions = positions.to(rows.device)
    every = len(positions) == rows.shape[1] and torch.equal(
        positions.flatten(), torch.arange(len(positions)).to(positions)
    )
    channels = rows if every else rows[:, positions].movedim(1, -1).flatten(0, -2)
    return channels if channels.dtype == torch.float64 else channels.float()


def shrink(covariance: Tensor, rows: float) -> Tensor:
    r"""A covariance (n, n) that rows as few as channels do not take for a close tie between channels.

    Correlations R become (1 - rho) R off the diagonal, variances stay;  with n channels that vary and k rows

        rho = ((1 - 2/n) tr R^2 + n^2) / ((k + 1 - 2/n) (tr R^2 - n)),  at most 1.

    Reference: Chen, Wiesel, Eldar and Hero 2010, equation 23 (oracle approximating shrinkage), applied to correlations
        as in Schaefer and Strimmer 2005.
    """
    variances = covariance.diagonal().clone()
    alive = variances > _NO_VARIANCE * variances.max()
    scale = torch.where(alive, variances, torch.inf).rsqrt()
    parts = zip(scale.split(WIDE), covariance.split(WIDE), strict=True)
    squares = float(sum((own[:, None] * rows * scale).square_().sum() for own, rows in parts))
    n = max(int(alive.sum()), 2)
    rho = ((1 - 2 / n) * squares + n**2) / max((rows + 1 - 2 / n) * (squares - n), 1e-30)
    result = covariance * (1 - min(rho, 1.0))
    result.diagonal().copy_(variances)
    return result
