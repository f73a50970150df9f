"""Sizes that hardware likes: multiples of eight, of groups that are wide enough to bear it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from intrafusion.graph import ChannelGroup, families_of

STEP = 8  # channels that kernels take at once
WIDE = 32  # channels from which on a group has sizes enough to choose from, all multiples of eight


def list_steps(groups: Sequence[ChannelGroup], round_to: int | None) -> dict[str, int]:
    """The multiples that the sizes of groups are of, by name.

    Args:
        round_to: one for all but whole blocks; None for the default, 8 where a group has 32 channels or more.
    """
    if round_to is not None:
        return {g.name: round_to if g.is_channel else 1 for g in groups}
    families = families_of(groups)
    wide = [all(g.is_channel and g.size // g.multiple >= WIDE for g in twins) for twins in families]
    return {g.name: STEP if bears else 1 for twins, bears in zip(families, wide, strict=True) for g in twins}


def describe_rounding(
    groups: Sequence[ChannelGroup], sizes: Mapping[str, int], steps: Mapping[str, int], round_to: int | None
) -> list[str]:
    """That sizes were rounded which nobody asked for, and how they are not."""
    rounded = [g for g in groups if steps[g.name] > 1 and sizes.get(g.name, g.size) < g.size]
    if round_to is not None or not rounded:
        return []
    count = "size is a multiple" if len(rounded) == 1 else "sizes are multiples"
    return [
        f"target: {len(rounded)} {count} of {STEP}, which runs faster (groups of {WIDE} channels or more); "
        "round_to=1 allows any."
    ]
