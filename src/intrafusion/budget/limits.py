"""One limit of a target, and what of a recipe keeps it from being met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from intrafusion.brief import show_briefly
from intrafusion.budget.cost import Cost, add_up
from intrafusion.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Limit:
    """At most so much of something.

    Attributes:
        kind: one of `MEASURES`.
        goal: how much, in parameters, MACs, milliseconds or megabytes.
        whole: how much the original has.
        costs: what is spent as a function of sizes, of which the largest counts, such as the memory at every moment of
            a call; of a latency, the MACs.
        doubt: why the prediction is not believed; None where it is exact.
    """

    kind: str
    goal: float
    whole: float
    costs: tuple[Cost, ...] = ()
    doubt: str | None = None

    __repr__ = show_briefly

    def spend(self, sizes: Mapping[str, int]) -> float:
        """What is predicted of a network of these sizes."""
        return max(add_up(self.costs, sizes))

    def costs_above(self, most: float) -> list[Cost]:
        """Those that exceed so much in the whole network: what does not, never will."""
        whole = add_up(self.costs, {})
        above = [cost for cost, spent in zip(self.costs, whole, strict=True) if spent > most]
        return above or [self.costs[whole.index(max(whole))]]


def describe_held(recipe: Recipe) -> str:
    """The options that keep groups from becoming smaller, in words."""
    held = [f"min_channels={recipe.min_channels}"] if recipe.min_channels > 1 else []
    held += [f"round_to={recipe.round_to}"] if (recipe.round_to or 1) > 1 else []
    held += [name for name in ("include", "exclude") if getattr(recipe, name)]
    return f"{', '.join(held[:-1])} and {held[-1]}" if len(held) > 1 else "".join(held)
