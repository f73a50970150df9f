"""Batch norms folded into the linear map before them, and given meaningful statistics back afterwards.

Between `fold` and `unfold` every foldable norm is the identity plus a bias, so a reduction sees the rows and shifts
that the network really computes with:

    folded = fold(weights, norms)
    ...apply the maps to `folded`...
    final = unfold(reduced, weights, norms, merges)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from intrafusion.graph import FoldableNorm

_CANCELLED = 1e-3  # a merged gamma below this fraction of the merged |gamma| is replaced by the latter


def fold_norms(weights: Mapping[str, Tensor], norms: Sequence[FoldableNorm]) -> dict[str, Tensor]:
    r"""A float64 copy of the weights in which every norm is folded into its producer.

    w <- w g / sqrt(v + eps),   norm bias <- (b - mu) g / sqrt(v + eps) + beta,   b <- 0,
    and the norm's weight becomes 1, its mean 0, its variance 1 - eps: exactly the identity plus a bias.
    A norm without affine parameters holds the shift as its negative mean.

    Args:
        weights: tensors by name; none is modified. Tensors that are not floating point are copied as they are.
        norms: the norms to fold, each with its own producer.
    Reference: Theus et al. 2024, Eq. 1 (with eps).
    """
    folded = {name: _copy(tensor) for name, tensor in weights.items()}
    for norm in norms:
        gamma, _, mu, sigma = statistics_of(folded, norm)
        scale, shift = gamma / sigma, shift_of(folded, norm)
        rows = folded[norm.producer_weight]
        rows *= _along(scale, rows, norm.producer_dim)
        _write(
            folded, norm, weight=torch.ones_like(mu), bias=shift, mean=torch.zeros_like(mu), sigma=torch.ones_like(mu)
        )
        if norm.producer_bias is not None:
            folded[norm.producer_bias] = torch.zeros_like(mu)
    return folded


def unfold_norms(
    reduced: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    norms: Sequence[FoldableNorm],
    merges: Mapping[str, Tensor | None],
    folded: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""Give folded norms statistics back after a reduction; the function of the network stays the same.

    With R the merge with its rows normalised (entries |M_ij| / sum_j |M_ij|): gamma' = R gamma, beta' = R beta,
    sigma' = R sqrt(v + eps), b' = R b of the original network, and for a reduced row w~ with shift b~

        w' = w~ sigma' / gamma',   mu' = b' + (beta' - b~) sigma' / gamma',   v' = sigma'^2 - eps

    so that (w' x + b' - mu') / sigma' * gamma' + beta' = w~ x + b~. A selection gives back the selected entries of the
    original tensors, except where gamma = 0: such a channel is constant, and gets gamma' = 1 and a zero row.
    Where merged gammas cancel, gamma' = R |gamma|; it is never 0.

    Args:
        reduced: what became of `fold(original, norms)`; any shift added on the way to the producer's bias, the norm's
            bias or the norm's mean counts. Entries of the norm's weight and variance are not read.
        original: the tensors before folding.
        norms: the same norms as were folded.
        merges: merge (m, n) over all indices of the norm's vectors, by the name of its mean, or which of these it picks
            (m,); None or absent where its channels did not change.
        folded: what `fold(original, norms)` gave, where it is at hand.
    Returns:
        A copy of `reduced`, float64, with the tensors of all norms and their producers rewritten. A norm whose producer
        and shift did not change gets its original tensors back bit by bit.
    """
    final = dict(reduced)
    folded = fold_norms(_tensors_of(original, norms), norms) if folded is None else folded
    for norm in norms:
        names = _names(norm)
        if all(torch.equal(reduced[name], folded[name]) for name in names):
            final.update({name: _copy(original[name]) for name in names})
        else:
            _unfold_one(final, original, norm, merges.get(norm.mean))
    return final


def _unfold_one(
    final: dict[str, Tensor], original: Mapping[str, Tensor], norm: FoldableNorm, merge: Tensor | None
) -> None:
    old = {name: _copy(original[name]) for name in _names(norm) if name != norm.producer_weight}
    gamma, beta, _, sigma = statistics_of(old, norm)
    average = _averaging(merge, sigma)
    gamma, beta, sigma = _never_zero(average(gamma), average(gamma.abs())), average(beta), average(sigma)
    bias = average(_producer_bias(old, norm))

    _, norm_bias, norm_mean, _ = statistics_of(final, norm)
    shift = _producer_bias(final, norm) + norm_bias - norm_mean
    rows = final[norm.producer_weight]
    final[norm.producer_weight] = rows * _along(sigma / gamma, rows, norm.producer_dim)
    _write(final, norm, weight=gamma, bias=beta, mean=bias + (beta - shift) * sigma / gamma, sigma=sigma)
    if norm.producer_bias is not None:
        final[norm.producer_bias] = bias


def _averaging(merge: Tensor | None, like: Tensor) -> Callable[[Tensor], Tensor]:
    """What becomes of a vector (n,) of a norm; see `unfold_norms`."""
    if merge is None or merge.dim() == 1:
        return lambda vector: vector if merge is None else vector[merge]
    size = merge.to(like).abs()
    total = size.sum(dim=1, keepdim=True)
    weights = torch.where(total > 0, size / torch.where(total > 0, total, 1.0), 1.0 / size.shape[1])
    return lambda vector: weights @ vector


def _never_zero(gamma: Tensor, magnitude: Tensor) -> Tensor:
    gamma = torch.where(gamma.abs() > _CANCELLED * magnitude, gamma, magnitude)
    return torch.where(gamma == 0, 1.0, gamma)


def statistics_of(weights: Mapping[str, Tensor], norm: FoldableNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gamma, beta, mu and sigma = sqrt(v + eps); a norm without affine parameters has gamma 1 and beta 0."""
    mu = weights[norm.mean]
    gamma = torch.ones_like(mu) if norm.weight is None else weights[norm.weight]
    beta = torch.zeros_like(mu) if norm.bias is None else weights[norm.bias]
    return gamma, beta, mu, (weights[norm.variance] + norm.eps).sqrt()


def _write(
    weights: dict[str, Tensor], norm: FoldableNorm, *, weight: Tensor, bias: Tensor, mean: Tensor, sigma: Tensor
) -> None:
    """Set the norm to x -> (x - mean) / sigma * weight + bias, whichever parameters it has."""
    if norm.bias is None:
        mean = mean - bias * sigma / weight
    else:
        weights[norm.bias] = bias
    if norm.weight is not None:
        weights[norm.weight] = weight
    weights[norm.mean] = mean
    weights[norm.variance] = (sigma.square() - norm.eps).clamp_min(0.0)


def shift_of(weights: Mapping[str, Tensor], norm: FoldableNorm) -> Tensor:
    """The constant (c,) that a norm adds once it is folded into its producer: (b - mu) gamma / sigma + beta."""
    gamma, beta, mu, sigma = statistics_of(weights, norm)
    return (_producer_bias(weights, norm) - mu) * gamma / sigma + beta


def with_statistics(
    weights: Mapping[str, Tensor], norm: FoldableNorm, *, weight: Tensor, bias: Tensor, mean: Tensor, sigma: Tensor
) -> dict[str, Tensor]:
    """The tensors of a norm that computes x -> (x - mean) / sigma * weight + bias, whichever parameters it has.

    Args:
        weight: (c,); must be 1 for a norm without one.
        sigma: (c,) = sqrt(variance + eps); what is below sqrt(eps) is taken for that.
    """
    new = {name: weights[name] for name in (norm.weight, norm.bias, norm.mean, norm.variance) if name is not None}
    _write(new, norm, weight=weight, bias=bias, mean=mean, sigma=sigma)
    return new


def _producer_bias(weights: Mapping[str, Tensor], norm: FoldableNorm) -> Tensor:
    return torch.zeros_like(weights[norm.mean]) if norm.producer_bias is None else weights[norm.producer_bias]


def _names(norm: FoldableNorm) -> list[str]:
    names = (norm.producer_weight, norm.producer_bias, norm.weight, norm.bias, norm.mean, norm.variance)
    return [name for name in names if name is not None]


def _tensors_of(weights: Mapping[str, Tensor], norms: Sequence[FoldableNorm]) -> dict[str, Tensor]:
    return {name: weights[name] for norm in norms for name in _names(norm)}


def _along(vector: Tensor, rows: Tensor, dim: int) -> Tensor:
    return vector.reshape([-1 if d == dim else 1 for d in range(rows.dim())])


def _copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()
