"""Batch norms that can be folded into the layer before them."""

from __future__ import annotations

from collections import defaultdict

from intrafusion.graph import FoldableNorm
from intrafusion.trace.info import Origin
from intrafusion.trace.relations import Relations


def find_foldable_norms(relations: Relations, origins: list[Origin]) -> tuple[FoldableNorm, ...]:
    """Batch norms that always and alone read one linear map's output."""
    by_weight: dict[str, list[Origin]] = defaultdict(list)
    for origin in origins:
        by_weight[origin.weight].append(origin)
    found = [_match_norm(relations, runs) for runs in by_weight.values()]
    return tuple(norm for norm in found if norm is not None)


def _match_norm(relations: Relations, runs: list[Origin]) -> FoldableNorm | None:
    """The norm behind every run of one linear map, if it is the same, reads it alone, and reads nothing else."""
    first = runs[0]
    if first.norm is None or any((o.norm, o.reads, o.bias) != (first.norm, 1, first.bias) for o in runs):
        return None
    gain, bias, mean, variance = first.norm
    if mean is None or variance is None or relations.norm_calls[mean] != len(runs) or bias is None:
        return None
    return FoldableNorm(first.weight, first.dim, first.bias, gain, bias, mean, variance, first.eps)
