"""LBYL, leave before you leave: readers tell the filters that went from those that stayed, by weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.errors import RecipeError
from intrafusion.graph import READS, ChannelGraph, ChannelGroup, Role
from intrafusion.importance.features import channel_biases, channel_rows
from intrafusion.network.batches import ImagesLike
from intrafusion.network.tensors import check_graph, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.restorer import Reduced
from intrafusion.surgery.maps import reduce_weights
from intrafusion.surgery.norms import fold_norms
from intrafusion.surgery.write import write_weights_


@checked
@dataclass(frozen=True)
class LeaveBeforeYouLeave:
    r"""Let every channel that was pruned leave its columns to those that stay, as its filter is made of theirs.

    With w_j the filter of channel j and b_j its bias, norms folded, and S the channels that were kept, for j not in S

        s_j = argmin || w_j - sum_k s_k w_k ||^2 + shift (b_j - sum_k s_k b_k)^2 + lam ||s||^2,    k in S,
        lam = strength * mean_k (|| w_k ||^2 + shift b_k^2),

    and readers get W_S + sum_j W_j s_j^T. The three terms are the paper's residual error, error of the norm and error
    of the activation function; its weights of the terms are not known to us, these are OURS. No data. Filters are those
    of all layers that give the channels. Only pruned groups are restored, not merged ones, and none whose channels must
    not be mixed.

    Attributes:
        strength: of the ridge.
        shift: weight of the biases' error.

    Reference: Lee, Kim and Choi 2025 (Training-free restoration of pruned neural networks, arXiv 2502.08474).
    """

    strength: float = 0.1
    shift: float = 1.0

    needs_data = False  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        for name in ("strength", "shift"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}.")

    @checked
    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None = None
    ) -> None:
        """Write the weights of readers; `images` are not used."""
        check_graph(graph, reference)
        maps = compressed.plan.maps
        original = {name: tensor.detach() for name, tensor in named_tensors(reference).items()}
        folded = fold_norms(original, graph.norms)
        pruned = [g for g in graph.groups if g.name in maps and _is_pruned(g, maps[g.name])]
        left = {g.name: self._leave(g, maps[g.name], folded) for g in pruned}
        new = reduce_weights(original, graph, {**maps, **left})
        readers = {m.tensor for g in pruned for m in g.with_role(*READS)}
        write_weights_(compressed.model, {name: new[name] for name in readers})

    def _leave(self, group: ChannelGroup, reduction: ReductionMap, folded: Mapping[str, Tensor]) -> ReductionMap:
        filters = [channel_rows(folded, m) for m in group.with_role(Role.PRODUCES)]
        rows = torch.cat([*filters, self.shift**0.5 * channel_biases(group, folded)], 1)
        assert reduction.picked is not None
        return replace(reduction, unmerge=leave_columns(rows, reduction.picked, self.strength).to(reduction.unmerge))


def leave_columns(rows: Tensor, kept: Tensor, strength: float) -> Tensor:
    """What each of n channels leaves to each of those that are kept, (n, m) float64: the identity for these.

    Args:
        rows: (n, d), a channel's filter and bias.
        kept: (m,) channels.
        strength: of the ridge, as a fraction of the mean squared length of the rows that are kept.
    """
    rows, kept = rows.double(), kept.to(rows.device)
    inner = rows[kept] @ rows[kept].T
    inner.diagonal().add_((strength * inner.diagonal().mean()).clamp(min=1e-30))
    left = torch.linalg.solve(inner, rows[kept] @ rows.T).T.contiguous()
    left[kept] = torch.eye(len(kept), dtype=left.dtype, device=left.device)
    return left


def _is_pruned(group: ChannelGroup, reduction: ReductionMap) -> bool:
    """Whether a group was only selected from, may be mixed, and has filters."""
    plain = reduction.picked is not None and reduction.shift is None and reduction.scale is None
    pruned = plain and torch.equal(reduction.unmerge, reduction.merge.T)
    return pruned and group.is_channel and not group.unmixable and bool(group.with_role(Role.PRODUCES))
