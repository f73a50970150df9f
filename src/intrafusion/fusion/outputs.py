"""What the layers of a network give on images: one row per channel, sampled at places that all networks share."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.network.batches import cast_like
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import watch_calls
from intrafusion.network.state import preserve_state


def record_outputs(
    model: nn.Module, graph: ChannelGraph, inputs: Inputs, *, places: int = 20_000, seed: int = 0
) -> dict[str, Tensor]:
    """What the layers that produce each group give before the activation function, norms that were folded included.

    Args:
        inputs: all images as one call.
        places: at most this many values per channel and layer.
        seed: of the sample of places; the same for networks of other widths.
    Returns:
        (n, d) float64 by name of the group: the outputs of all its layers side by side, in execution order. Groups
        that no convolution or linear module produces are missing.
    """
    sources = {g.name: found for g in graph.reducible if (found := _find_sources(model, graph, g))}
    dims = {name: dim for found in sources.values() for name, dim, _ in found}
    recorded: dict[str, list[Tensor]] = defaultdict(list)

    def store(name: str, x: Tensor, output: Tensor) -> None:
        flat = output.detach().movedim(dims[name], 0).flatten(1)
        if flat.shape[1] > places:
            chosen = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed))[:places]
            flat = flat[:, chosen.to(flat.device)]
        recorded[name].append(flat.float())

    with preserve_state(model), watch_calls({name: model.get_submodule(name) for name in dims}, store):
        cast_like(inputs, model).call(model)
    return {
        group: torch.cat([_pick(values, m) for name, _, m in found for values in recorded[name]], dim=1)
        for group, found in sources.items()
        if any(recorded[name] for name, _, _ in found)
    }


def _pick(values: Tensor, member: Member) -> Tensor:
    return values[torch.from_numpy(member.positions).to(values.device)].flatten(1).double()


def _find_sources(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> list[tuple[str, int, Member]]:
    """(module whose output to read, its channel dimension, member of the weight that makes it) of each producer."""
    norms = {n.producer_weight: n.mean.rpartition(".")[0] for n in graph.norms}
    found = []
    for member in group.with_role(Role.PRODUCES):
        name = norms.get(member.tensor, member.module)
        module = model.get_submodule(name)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            name, module = member.module, model.get_submodule(member.module)
        if member.tensor.endswith("weight") and is_along_outputs(model.get_submodule(member.module), member):
            found.append((name, -1 if isinstance(module, nn.Linear) else 1, member))
    return found


def is_along_outputs(module: nn.Module, member: Member) -> bool:
    """Whether position p along the weight's dimension is output channel p."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return member.within is None and (member.dim == 1 if module.transposed else member.dim == 0)
    return isinstance(module, nn.Linear) and member.dim == 0
