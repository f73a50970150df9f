"""GRAIL: every reader tells the channels that went from those that stayed, by their Gram matrix on images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.network.apart import borrow
from intrafusion.network.batches import ImagesLike, cast_like, check_batch, double_first, rebatch
from intrafusion.network.layers import Layer, find_layers, watch_calls
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import check_graph, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.restorer import Reduced, require_images
from intrafusion.surgery.maps import compose_merges, reduce_weights
from intrafusion.surgery.streams import is_turned
from intrafusion.surgery.write import write_weights_

_NOTHING = 1e-12  # share of the signal that is lost to rounding
Maps = Mapping[str, ReductionMap]


@checked
@dataclass(frozen=True)
class Grail:
    r"""Give every reader the weight that reads the old channels off the new ones, a ridge regression of its own.

    With G = E x x^T, not centred, of what a layer reads of the original network where it is not padding, and M what
    became of it,

        W <- W B,    B = G M^T (M G M^T + lam I)^-1,    lam = strength * mean diag(M G M^T).

    One number per pair of channels, the same for all places of a kernel; biases stay. All G are of the original
    network, so errors of the layers before go uncorrected. A reader for which nothing is lost stays as it is, and so do
    grouped and transposed convolutions, and readers of what was rotated or has a shift.

    Attributes:
        strength: of the ridge; the authors' 1e-3.
        batch: images that go through at a time.

    Reference: Tang et al. 2026 (GRAIL, arXiv 2602.23795); it follows any choice of channels, or folding.
    """

    strength: float = 1e-3
    batch: int = 128

    needs_data = True  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        check_batch(self.batch)
        if not self.strength > 0:
            raise RecipeError(f"strength: expected a number > 0, got {self.strength!r}.")

    @checked
    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None = None
    ) -> None:
        """Write the weights of readers.

        Raises:
            ModelError: no images, or the original network gives NaN or infinity on them.
        """
        check_graph(graph, reference)
        maps, reference = compressed.plan.maps, borrow(reference)
        readers = {layer.name: (layer, merge, read) for layer, merge, read in _find_readers(reference, graph, maps)}
        chunks = rebatch(require_images(images, self), self.batch)
        grams: dict[str, Tensor] = {}
        weights: RowWeights | None = None

        def reached(name: str, x: Tensor) -> None:
            rows = _list_inputs(readers[name][0], x, weights)
            grams[name] = grams.get(name, 0) + rows.T @ rows

        modules = {name: layer.module for name, (layer, _, _) in readers.items()}
        with preserve_state(reference), watch_calls(modules, reached=reached):
            for chunk in chunks:
                call = double_first(chunk)
                weights = call.weights
                cast_like(call, reference).call(reference)
        original = {name: tensor.detach() for name, tensor in named_tensors(reference).items()}
        new: dict[str, Tensor] = {}
        for name, gram in grams.items():
            layer, merge, read = readers[name]
            if not bool(torch.isfinite(gram).all()):
                raise ModelError(f"{name}: the original network gives NaN or infinity on these images.")
            weight = original[layer.weight_name]
            told = tell_channels(gram, merge.to(gram), self.strength)
            if told is not None:
                others = {name: maps[name] for name in _list_groups(layer, graph) & maps.keys() - read}
                rest = reduce_weights(original, graph, others).get(layer.weight_name, weight)
                new[layer.weight_name] = _read_by(rest.double(), told, layer.input_dim).to(weight)
        write_weights_(compressed.model, new)


def tell_channels(gram: Tensor, merge: Tensor, strength: float) -> Tensor | None:
    """B (n, m) of `Grail`, float64; None where the new channels tell all of the old ones.

    Args:
        gram: G (n, n).
        merge: M (m, n).
    """
    seen = gram @ merge.T
    inner = merge @ seen
    lost = gram.trace() - (torch.linalg.pinv(inner, hermitian=True) @ (seen.T @ seen)).trace()
    if float(lost) <= _NOTHING * len(gram) * float(gram.trace()):
        return None
    inner.diagonal().add_(strength * inner.diagonal().mean())
    return torch.linalg.solve(inner, seen.T).T.contiguous()


def _find_readers(model: nn.Module, graph: ChannelGraph, maps: Maps) -> Iterator[tuple[Layer, Tensor, frozenset[str]]]:
    """Dense layers that read reduced groups, what the maps do to their inputs, (m, n), and which groups these are."""
    groups = {g.name: g for g in graph.groups if g.name in maps}
    for layer in find_layers(model, graph).values():
        read = [(g, m) for g in groups.values() for m in g.members if _reads(layer, m)]
        if read and all(_is_plain(g, maps[g.name], layer) for g, _ in read):
            inputs = layer.module.weight.shape[layer.input_dim]
            yield (
                layer,
                compose_merges([(m, maps[g.name].merge) for g, m in read], inputs),
                frozenset(g.name for g, _ in read),
            )


def _list_groups(layer: Layer, graph: ChannelGraph) -> set[str]:
    """Those that run through its weight."""
    return {g.name for g in graph.groups if any(m.tensor == layer.weight_name for m in g.members)}


def _reads(layer: Layer, member: Member) -> bool:
    along = member.tensor == layer.weight_name and member.dim == layer.input_dim
    return along and Role.CONSUMES in member.roles and member.within is None


def _is_plain(group: ChannelGroup, reduction: ReductionMap, layer: Layer) -> bool:
    """Whether a map is only a merge, of channels that the layer does not give as well."""
    gives = any(m.tensor == layer.weight_name and m.dim != layer.input_dim for m in group.members)
    return not gives and reduction.shift is None and reduction.scale is None and not is_turned(group, reduction)


def _list_inputs(layer: Layer, x: Tensor, weights: RowWeights | None) -> Tensor:
    """What a layer reads at every place that counts, times the root of how much it does, (rows, inputs) float64."""
    rows, counts = x.movedim(layer.channel_dim, -1).double(), layer.weigh_rows(x, weights)
    if counts is None:
        return rows.reshape(-1, rows.shape[-1])
    return rows[counts > 0] * counts[counts > 0].sqrt()[:, None]  # padded places may hold NaN


def _read_by(weight: Tensor, told: Tensor, dim: int) -> Tensor:
    return (weight.movedim(dim, -1) @ told).movedim(-1, dim).contiguous()
