"""A target that cannot be met, in words: what was reached, and what was asked for."""

from __future__ import annotations

from intrafusion.plan import MISSED

_UNITS = {"params": " parameters", "macs": " MACs", "latency_ms": " ms", "memory_mb": " MB"}
_PLAIN = ("latency_ms", "memory_mb")  # of which a share tells nothing new


def describe_amount(kind: str, amount: float) -> str:
    """Parameters, MACs, milliseconds or megabytes as a person would write them.

    >>> describe_amount("params", 1_361_022), describe_amount("macs", 98_304.0), describe_amount("latency_ms", 3.0)
    ('1.36 M parameters', '98,304 MACs', '3 ms')
    """
    return f"{_shorten(kind, amount)}{_UNITS[kind]}"


def _shorten(kind: str, amount: float) -> str:
    if kind in _PLAIN:
        return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if amount >= unit:
            return f"{amount / unit:,.3g} {name}" if amount < 1000 * unit else f"{amount / unit:,.0f} {name}"
    return f"{amount:,.0f}"


def explain_miss(kind: str, reached: float, goal: float, whole: float, held: str = "", *, even: bool = False) -> str:
    """
    Args:
        whole: what the original has.
        held: the options that keep groups from becoming smaller, in words.
        even: whether the same share of every group was taken, as other sizes, also closer ones, lose more.
    """
    unit = _UNITS[kind] if kind in _PLAIN else ""
    got, wanted = describe_amount(kind, reached), f"{_shorten(kind, goal)}{unit}"
    if kind not in _PLAIN:
        got, wanted = f"{got} ({_share(reached, whole)})", f"{wanted} ({_share(goal, whole)})"
    allowed = f"that {held} allow" if " and " in held else f"that {held} allows" if held else "that are allowed"
    if even:
        end = "no such share of every group comes closer, and sizes that do were measured to change the output more"
    else:
        end = "nothing comes closer"
    return f"{MISSED}{got} instead of {wanted}; with the groups and sizes {allowed}, {end}."


def _share(part: float, whole: float) -> str:
    """Of the original's, with two digits, or one behind the point."""
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 10 and abs(percent - round(percent)) < 0.05 else f"{percent:.3g} %"
