"""The constants that a map owes the consumers: what the old channels are on top of unmerge times the new ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.graph import ChannelGraph
from intrafusion.network.layers import Port, find_layers
from intrafusion.network.tensors import check_graph
from intrafusion.observe.moments import find_readers
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.statistics import find_output_merge


@checked
def add_shifts_(small: nn.Module, reference: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> None:
    """Give every consumer of a reduced group what it is owed: the sum over its original kernel of W_c shift (in place).

    It goes to the consumer's bias or to the norm behind it; a consumer with neither gets none. At the border of padded
    images the constant is that of the inside.
    """
    check_graph(graph, reference)
    owing = [(g, shift) for g in graph.groups if g.name in maps and (shift := maps[g.name].shift) is not None]
    originals, layers = (find_layers(m, graph) for m in (reference, small)) if owing else ({}, {})
    for group, shift in owing:
        for port in find_readers(group, originals):
            if port.layer.name in layers:
                layer = layers[port.layer.name]
                owed = _find_constant(port, shift)
                merge = find_output_merge(port.layer, graph, maps)
                owed = owed if merge is None else owed @ merge.T.to(owed)
                layer.add_(torch.zeros_like(layer.matrix), layer.before_norm(owed)[0])


def _find_constant(port: Port, shift: Tensor) -> Tensor:
    """What inputs that are `shift` everywhere change of a layer's output, after its norm, (1, c) float64."""
    layer, matrix = port.layer, port.layer.matrix.detach().double()
    inputs = layer.module.weight.shape[layer.input_dim]
    columns = matrix.reshape(len(matrix), -1, inputs).sum(1)[:, port.positions.to(matrix.device)]
    return layer.after_norm((columns.sum(2) @ shift.to(matrix.device))[None])
