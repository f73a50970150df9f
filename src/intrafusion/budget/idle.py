"""What was asked of sizes and changes nothing, in words: a request without effect is never passed over in silence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from intrafusion.budget.uniform import find_pattern, uniform_sizes
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of
from intrafusion.names import name_some
from intrafusion.recipe import Recipe
from intrafusion.surgery.ties import offer_blocks

_SHOWN = 5  # names of groups in one note


def explain_idle_sizes(
    groups: Sequence[ChannelGroup], sizes: Mapping[str, int], graph: ChannelGraph, recipe: Recipe
) -> tuple[str, ...]:
    """Notes on the options that leave groups as they are.

    Args:
        groups: those that may shrink.
        sizes: number of channels that each of them keeps.
    """
    if recipe.target is not None:
        idle = all(sizes.get(g.name, g.size) == g.size for g in groups)
        return (f"target {dict(recipe.target)}: no group becomes smaller.",) if idle else ()
    by_keep = uniform_sizes(groups, recipe.keep, graph)
    shrinking = [g for g in groups if by_keep[g.name] < g.size]
    if not shrinking:
        idle = f"keep={recipe.keep!r} leaves every group as it is; give a smaller fraction."
        told = *_held_twins(groups, graph, recipe), *_idle_patterns(groups, graph, recipe.keep, below=1.0)
        return told or (idle,)
    return (
        *_idle_patterns(groups, graph, recipe.keep),
        *_idle_limits(shrinking, sizes, graph, recipe),
        *_held_twins(groups, graph, recipe),
    )


def _idle_limits(
    shrinking: Sequence[ChannelGroup], sizes: Mapping[str, int], graph: ChannelGraph, recipe: Recipe
) -> Iterable[str]:
    """Groups that would shrink by `keep` alone, and do not because of what else was asked."""
    stopped = [g for g in shrinking if sizes[g.name] == g.size]
    rounded = uniform_sizes(shrinking, recipe.keep, graph, round_to=recipe.round_to)
    by_rounding = [g for g in stopped if rounded[g.name] == g.size]
    by_minimum = [g for g in stopped if rounded[g.name] < g.size]
    if by_rounding:
        yield _say_stopped(f"round_to={recipe.round_to}", by_rounding, shrinking, "a smaller multiple")
    if by_minimum:
        yield _say_stopped(f"min_channels={recipe.min_channels}", by_minimum, shrinking, "a smaller number")


def _say_stopped(option: str, stopped: Sequence[ChannelGroup], shrinking: Sequence[ChannelGroup], remedy: str) -> str:
    names = ", ".join(f"{g.name} ({g.size})" for g in stopped[:_SHOWN])
    more = f" and {len(stopped) - _SHOWN} more" if len(stopped) > _SHOWN else ""
    whole = "every group as it is" if len(stopped) == len(shrinking) else "groups as they are that keep would shrink"
    return f"{option} leaves {whole}: {names}{more}; give {remedy}, or keep less."


def _idle_patterns(
    groups: Sequence[ChannelGroup], graph: ChannelGraph, keep: float | Mapping[str, float], below: float = math.inf
) -> Iterable[str]:
    """Patterns, of fractions below some, that no group goes by which can shrink."""
    if isinstance(keep, Mapping):
        used = {find_pattern(group, keep) for group in groups}
        for pattern, fraction in keep.items():
            if pattern not in used and fraction < below:
                yield f"keep[{pattern!r}] changes nothing: {_explain_pattern(pattern, groups, graph, keep)}."


def _explain_pattern(
    pattern: str, groups: Iterable[ChannelGroup], graph: ChannelGraph, keep: Mapping[str, float]
) -> str:
    """Why no group goes by a pattern: others stand before it, or what it names stays for a reason of its own."""
    before = [find_pattern(g, keep) for g in groups if find_pattern(g, [pattern])]
    if before:
        return f"its groups go by {name_some(list(dict.fromkeys(map(repr, before))))}, which comes first and so counts"
    stays = next((g for g in graph.groups if g.reason and find_pattern(g, [pattern])), None)
    return "no group that can be reduced goes by it" + (f" ({stays.name}: {stays.reason})" if stays else "")


def _held_twins(groups: Sequence[ChannelGroup], graph: ChannelGraph, recipe: Recipe) -> Iterable[str]:
    """Groups that are cut in step with another one, of which more is kept."""
    if not isinstance(recipe.keep, Mapping):
        return
    for twins in families_of(groups):
        patterns = {g.name: find_pattern(g, recipe.keep) for g in twins}
        shares = {name: 1.0 if pattern is None else recipe.keep[pattern] for name, pattern in patterns.items()}
        most = max(twins, key=lambda g: shares[g.name])
        held = [g for g in twins if shares[g.name] < shares[most.name]]
        if held:
            names, offer = name_some([g.name for g in held]), offer_blocks(held[0], graph)
            yield f"{names}: cut in step with {most.name}, of which {shares[most.name]:.0%} were asked for{offer}."
