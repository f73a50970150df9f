"""Several ways to make channels fewer, compared on the network itself: which is best is no matter of taste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intrafusion.arguments import checked
from intrafusion.errors import RecipeError, unknown_name
from intrafusion.reduce.pivot import Pivot
from intrafusion.reduce.problem import Reducer, ReductionMap, ReductionProblem

CANDIDATES = ("pivot", "eliminate", "magnitude", "fold")
"""What can be compared: reducers by their names; "magnitude" is "select" by l2 norms, each layer weighing the same."""


@checked
@dataclass(frozen=True)
class Auto:
    """That of several candidates whose smaller network is closest to the original on inputs it was not solved on.

    `compress` makes, solves and compares them, see `intrafusion.choice`. One group alone tells nothing of that: there
    the first candidate is taken, which is a pivot.

    Attributes:
        candidates: names; the first is taken where nothing can be compared.
    """

    candidates: Sequence[str] = ("pivot", "eliminate", "magnitude")

    mixes = True  # of the class, not a hyper-parameter
    needs_moments = True
    rotates = True

    def __post_init__(self) -> None:
        for name in self.candidates:
            if name not in CANDIDATES:
                raise RecipeError(unknown_name("candidate", name, CANDIDATES))
        named = tuple(self.candidates)
        if isinstance(self.candidates, str) or not named or len({*named}) < len(named):
            raise RecipeError(f"candidates: expected different names such as {CANDIDATES}, got {self.candidates!r}.")
        object.__setattr__(self, "candidates", named)

    def selecting(self) -> Reducer:
        return Pivot().selecting()

    @checked
    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        return Pivot()(problem)
