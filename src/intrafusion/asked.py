"""What may be asked of a budget, checked before any work."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from intrafusion.errors import BudgetError, show, unknown_name

MEASURES = ("params", "macs", "latency_ms", "memory_mb")
"""What a target may be stated in."""
SHARES = ("params", "macs")
"""Those of which a number up to 1 is a fraction of the original's; the others have a unit."""


def _check_fraction(fraction: Any, where: str) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        images = hasattr(fraction, "shape") or hasattr(fraction, "dataset")
        advice = "images are said by name, inputs=..." if images else "0.7 keeps 70 % of the channels"
        raise BudgetError(f"{where}: expected a fraction in (0, 1], got {show(fraction)}; {advice}.")


def check_keep(keep: Any) -> None:
    """Raise BudgetError unless it is a fraction, or fractions by pattern."""
    if not isinstance(keep, Mapping):
        _check_fraction(keep, "keep")
        return
    for pattern, fraction in keep.items():
        _check_fraction(fraction, f"keep[{show(pattern)}]")
        if not isinstance(pattern, str):
            raise BudgetError(f"keep: expected patterns of names in a mapping, got {show(pattern)}; '*' means all.")


def check_count(count: Any, where: str) -> None:
    if type(count) is not int or not 1 <= count < 2**63:
        raise BudgetError(f"{where}: expected a whole number >= 1, got {show(count)}; 1 is the least.")


def check_target(target: Any) -> dict[str, float]:
    """What is measured, and how much of it is wanted at most; one limit or several.

    Raises:
        BudgetError: no limit, an unknown one, or one that is not positive.
    """
    if not isinstance(target, Mapping) or not target:
        raise BudgetError(
            f'target: expected limits of {", ".join(MEASURES)}, such as {{"params": 0.5}}, got {show(target)}.'
        )
    for kind, wanted in target.items():
        if not isinstance(kind, str) or kind not in MEASURES:
            raise BudgetError(f"target: {unknown_name('measure', kind, MEASURES)}")
        if isinstance(wanted, bool) or not isinstance(wanted, (int, float)) or not 0 < wanted <= sys.float_info.max:
            raise BudgetError(f"target[{kind!r}]: expected a number above 0, got {show(wanted)}; {_EXAMPLES[kind]}.")
    return {str(kind): float(wanted) for kind, wanted in target.items()}


_EXAMPLES = {
    **dict.fromkeys(SHARES, "0.5 is half of it"),
    "latency_ms": "3.0 is three milliseconds",
    "memory_mb": "100 is a hundred megabytes",
}


def least_size(min_channels: int, round_to: int | None) -> int:
    """The smallest size of a group: a multiple of `round_to` that is not below `min_channels`.

    >>> least_size(6, 4), least_size(6, None)
    (8, 6)
    """
    step = round_to or 1
    return -(-max(min_channels, step) // step) * step
