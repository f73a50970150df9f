"""Block after block trained to give what it gives in the original network; no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from intrafusion.arguments import Batch, checked
from intrafusion.graph import ChannelGraph
from intrafusion.plan import Plan
from intrafusion.train.loop import train_
from intrafusion.train.objectives import Block
from intrafusion.train.training import History, Training, Unlabelled


@checked
def reconstruct_(
    model: nn.Module,
    reference: nn.Module,
    images: Batch,
    blocks: Sequence[str],
    how: Training | None = None,
    *,
    merges: Mapping[str, Tensor] | None = None,
) -> dict[str, History]:
    r"""Train one block after the other, in place, to minimise mean || f_block(x_now) - M y_ref ||^2.

    x_now is what the part of the network before the block gives, which has been trained already and is in evaluation
    mode; y_ref what the block gives in the reference network.

    Args:
        blocks: names of modules, in execution order.
        merges: M (m, n) by block, where its output has fewer channels; see `merges_of`.
    Reference: Zimmer et al. 2023, section 3.
    """
    merges = merges or {}
    return {
        name: train_(model, Unlabelled(images), how, objective=Block(reference, name, merges.get(name)), within=name)
        for name in blocks
    }


@checked
def merges_of(graph: ChannelGraph, plan: Plan, blocks: Sequence[str]) -> dict[str, Tensor]:
    """The merge of the group of channels that leaves each block, for blocks whose output was reduced.

    That is the group which a layer of the block produces and a layer behind the block reads.
    """
    found: dict[str, Tensor] = {}
    for block in blocks:
        inside = lambda name, own=block: name == own or name.startswith(f"{own}.")  # noqa: E731
        leaving = [
            g.name for g in graph.reducible if any(map(inside, g.producers)) and not all(map(inside, g.consumers))
        ]
        if len(leaving) == 1 and leaving[0] in plan.maps:
            found[block] = plan.maps[leaving[0]].merge
    return found
