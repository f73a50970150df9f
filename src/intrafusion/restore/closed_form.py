"""Statistics of merged channels in closed form: no data, no forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.errors import RecipeError
from intrafusion.graph import ChannelGraph, ChannelGroup, FoldableNorm, Member, Role
from intrafusion.network.batches import ImagesLike
from intrafusion.network.tensors import check_graph, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.restorer import Reduced
from intrafusion.restore.statistics import correlations, find_merge, merge_variances, patch_products
from intrafusion.surgery.maps import mean_weights, norm_tensors, reduce_weights
from intrafusion.surgery.norms import fold_norms, shift_of, statistics_of, with_statistics
from intrafusion.surgery.write import write_weights_

Tensors = Mapping[str, Tensor]


@checked
@dataclass(frozen=True)
class ClosedForm:
    r"""Give merged channels the mean and the variance that the channels they were made of had.

    Behind a batch norm, channel j has mean beta_j and standard deviation |gamma_j|, and channels i, j correlate as
    <w_i, x> and <w_j, x> do: R_ij, over patches x of independent channels whose neighbouring pixels correlate as
    exp(-distance / reach). So the new channels y' = M y have

        mean  M beta,   variance  diag(M D R D^T M^T),  D = diag |gamma|,

    smaller than any of their parts where unlike channels were averaged. The norm's statistics are set to these, and its
    scale and shift to the averages  gamma'^2 = A gamma^2, beta' = A beta, with A the merge as weighted means. A channel
    that was only selected keeps its numbers.

    Of a norm that reads sums or concatenations of layers' outputs only the variance is corrected, by the same formula.

    Norms are corrected as the reduction left them: what another restorer has written stays, so this one comes first. It
    knows of no change before the layer: after heavy reduction of the inputs, `Reestimate` sees what this one cannot.

    Attributes:
        reach: of the correlation between neighbouring pixels, in pixels; 0 for none, as the paper has it.
        floor: the variance is at least this fraction of what it would be for uncorrelated channels.

    Reference: Wang et al. 2025, Fold-AR, for cluster means and reach 0; for any merge and depthwise kernels OURS.
    """

    reach: float = 1.0
    floor: float = 1e-3

    needs_data = False  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        if not self.reach >= 0:
            raise RecipeError(f"reach: expected pixels >= 0, got {self.reach!r}.")
        if not 0 < self.floor <= 1:
            raise RecipeError(f"floor: expected a fraction in (0, 1], got {self.floor!r}.")

    @checked
    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None = None
    ) -> None:
        """Write statistics, scales and shifts of the batch norms behind merged channels; `images` are not used."""
        check_graph(graph, reference)
        original = {name: tensor.detach() for name, tensor in named_tensors(reference).items()}
        present = named_tensors(compressed.model)
        fresh = reduce_weights(original, graph, compressed.plan.maps)
        kernels = {m.tensor for g in graph.groups for m in g.with_role(Role.SCALES)}
        new: dict[str, Tensor] = {}
        for norm in graph.norms:
            merge = find_merge(norm.mean, len(original[norm.mean]), graph, compressed.plan.maps)
            if merge is not None and _mixes(merge) and _is_untouched(norm, present, fresh):
                new |= self.correct_norm(norm, merge, original, fresh, depthwise=norm.producer_weight in kernels)
        new |= self.correct_variances(graph, compressed.plan.maps, original, present, fresh)
        write_weights_(compressed.model, {name: tensor.to(present[name]) for name, tensor in new.items()})

    def correct_variances(
        self, graph: ChannelGraph, maps: Mapping[str, ReductionMap], original: Tensors, present: Tensors, fresh: Tensors
    ) -> dict[str, Tensor]:
        """Variances of the norms that do not directly follow one layer: they read sums or concatenations of outputs."""
        known = {norm.variance for norm in graph.norms}
        names = {m.tensor for g in graph.groups if g.name in maps for m in g.with_role(Role.VARIANCE)} - known
        folded = fold_norms(_select_floating(original), graph.norms) if names else {}
        new = {}
        for name in names:
            size = len(original[name])
            merge = find_merge(name, size, graph, maps)
            if merge is not None and _mixes(merge) and _is_close(present[name], fresh[name]):
                alike = torch.eye(size, dtype=torch.float64)
                for group in graph.groups:
                    _fill_(alike, group, name, folded, self.reach)
                spread = original[name].double().cpu().sqrt()
                variance = merge_variances(merge, spread, alike, self.floor)
                new[name] = torch.where(_find_mixed_rows(merge), variance, fresh[name].double().cpu())
        return new

    def correct_norm(
        self, norm: FoldableNorm, merge: Tensor, original: Tensors, fresh: Tensors, *, depthwise: bool
    ) -> dict[str, Tensor]:
        """The norm's tensors by name, float64."""
        own = {name: original[name].double() for name in norm_tensors(norm)}
        gamma, beta, _, _ = statistics_of(own, norm)
        mean = mean_weights(merge).to(gamma)
        rows = fold_norms(own, [norm])[norm.producer_weight].movedim(norm.producer_dim, 0)
        alike = correlations(rows, self.reach)
        merge = merge.to(gamma)
        if depthwise:  # kernels were averaged, shifts merged, and what they read has the mean it should have
            shift = shift_of(own, norm)
            expected = mean @ (beta - shift) + merge @ shift
            spread = merge_variances(mean, gamma.abs(), alike, self.floor).sqrt()
        else:
            expected, spread = merge @ beta, merge_variances(merge, gamma.abs(), alike, self.floor).sqrt()
        left = {name: fresh[name].double() for name in norm_tensors(norm)}
        now_gamma, now_beta, now_mean, now_sigma = statistics_of(left, norm)
        per_unit = now_sigma / now_gamma
        wanted = (mean @ gamma.square()).sqrt() * now_gamma.sign()
        live = _find_mixed_rows(merge) & (spread > 0)
        pick = lambda new, old: torch.where(live, new, old)  # noqa: E731
        return with_statistics(
            left,
            norm,
            weight=pick(wanted, now_gamma),
            bias=pick(mean @ beta, now_beta),
            mean=pick(now_mean + (expected - now_beta) * per_unit, now_mean),
            sigma=pick(spread * per_unit.abs(), now_sigma),
        )


def _find_mixed_rows(merge: Tensor) -> Tensor:
    """(m,): which new channels are more than one old channel, or one at another size."""
    return ((merge != 0).sum(1) > 1) | (merge.sum(1) != 1)


def _mixes(merge: Tensor) -> bool:
    return bool(_find_mixed_rows(merge).any())


def _is_untouched(norm: FoldableNorm, present: Tensors, fresh: Tensors) -> bool:
    """Whether a norm and its layer are as the reduction left them."""
    return all(_is_close(present[name], fresh[name]) for name in norm_tensors(norm))


def _is_close(present: Tensor, fresh: Tensor) -> bool:
    return torch.allclose(present.double(), fresh.to(present).double(), rtol=1e-5, atol=1e-8)


def _select_floating(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _fill_(alike: Tensor, group: ChannelGroup, variance: str, folded: Tensors, reach: float) -> None:
    """Correlations of one group's channels into those of all that a norm reads: of the sum of what its layers give.

    The layers read inputs of one scale that have nothing to do with each other.
    """
    read = [m for m in group.with_role(Role.VARIANCE) if m.tensor == variance and m.within is None]
    made = [m for m in group.with_role(Role.PRODUCES) if m.within is None]
    if not read or not made:
        return
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for member in made:
        total += patch_products(_put_channels_first(folded[member.tensor], member), reach).cpu()
    size = total.diagonal().clamp(min=1e-30).sqrt()
    found = (total / torch.outer(size, size)).clamp(-1, 1).fill_diagonal_(1.0)
    for member in read:
        for slot in torch.from_numpy(member.positions).T:
            alike[slot[:, None], slot] = found


def _put_channels_first(weight: Tensor, member: Member) -> Tensor:
    """(n, inputs, *kernel) of what produces a group; several slots of a channel count as inputs."""
    rows = weight.movedim(member.dim, 0)[torch.from_numpy(member.positions).to(weight.device)]
    return rows.flatten(1, 2) if rows.dim() > 2 else rows
