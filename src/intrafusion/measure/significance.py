"""Do several samples differ by more than chance?"""

from __future__ import annotations

from collections.abc import Sequence

from intrafusion.arguments import checked
from intrafusion.errors import ArgumentError


@checked
def kruskal_wallis(samples: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The H statistic, and the probability p of one at least as large if all samples came from one distribution.

    Equal values throughout give H = 0 and p = 1. The chi-square approximation that p rests on wants about five values
    in each sample.

    Raises:
        ArgumentError: fewer than two samples, or an empty one.
    Reference: Kruskal and Wallis 1952; used by Theus et al. 2024, Table 4.
    """
    from scipy.stats import kruskal

    if len(samples) < 2 or not all(samples):
        raise ArgumentError(f"expected two or more samples with values, got sizes {[len(s) for s in samples]}.")
    if len({value for sample in samples for value in sample}) == 1:
        return 0.0, 1.0
    found = kruskal(*samples)
    return float(found.statistic), float(found.pvalue)
