"""The smallest network that loses little enough, by what a function of the user says or by the output error."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from intrafusion.arguments import plain
from intrafusion.asked import SHARES
from intrafusion.brief import show_briefly
from intrafusion.compressed import Compressed
from intrafusion.errors import ArgumentError, BudgetError, RecipeError, show, unknown_name
from intrafusion.measure.closeness import say_where
from intrafusion.measure.comparison import HeldOut, percent
from intrafusion.measure.evaluate import Evaluate, Judge
from intrafusion.measure.trials import Trial, Trials, find_loss, show_limit
from intrafusion.network.wrappers import wrap_like
from intrafusion.plan import is_miss
from intrafusion.planning import sizes_are_searched
from intrafusion.progress import prefix_stages
from intrafusion.recipe import ONLY, Keep, Recipe

FRACTIONS = (*SHARES, "channels")
"""What a size may be a fraction of."""
SEARCHED = tuple(k / 40 for k in range(39, 1, -1))
"""Fractions of the original among which the smallest is looked for: from 0.975 to 0.05."""
_ROUNDING = 1e-9  # of what scores are off by where they are subtracted

_ALLOWED = "of= says what is made small, include=, exclude=, min_channels= and round_to= hold"


@dataclass(frozen=True, eq=False)
class Wanted:
    """What the smallest network must not lose.

    Attributes:
        most: how much of the score may be lost, or how large the output error may be.
        judge: what scores networks; None: the output error counts.
        lower_is_better: whether that is so of the score.
        of: what sizes are fractions of.
    """

    most: float
    judge: Judge | None = None
    lower_is_better: bool = False
    of: str = "macs"

    __repr__ = show_briefly

    def size(self, share: float = SEARCHED[0]) -> dict[str, Any]:
        """A size, as options of a recipe."""
        return {"keep": share, "target": None} if self.of == "channels" else {"target": {self.of: share}}

    def ask(self, recipe: Recipe, share: float = SEARCHED[0]) -> Recipe:
        """The recipe with a size."""
        return replace(recipe, **self.size(share))

    def start(self, model: nn.Module) -> Search:
        """With what is known of the original, before any work.

        Raises:
            ArgumentError: no number comes back, or the original is no better than a network that knows nothing.
            BudgetError: as much may be lost as there is to lose.
        """
        if self.judge is None:
            return Search(self, model)
        original, nothing = self.judge.score(model, "the original network"), self.judge.score_nothing(model)
        if nothing is not None:
            self._check_against_nothing(original, nothing)
        return Search(self, model, original, nothing)

    def _check_against_nothing(self, original: float, nothing: float) -> None:
        margin = find_loss(original, nothing, self.lower_is_better)
        both = f"{original:.4g} for the network and {nothing:.4g} for the same with all weights zero"
        if margin == 0:
            raise ArgumentError(
                f"evaluate: expected another number for the network than for one that knows nothing, got {both}; it "
                "must look at the network that it is given."
            )
        if margin < 0:
            better = "lower" if self.lower_is_better else "higher"
            advice = "leave lower_is_better out" if self.lower_is_better else "say lower_is_better=True if not"
            raise ArgumentError(
                f"evaluate: expected a better number for the network than for one that knows nothing, got {both}; is "
                f"{better} better? {advice}, and check that it evaluates what it is given."
            )
        if margin <= self.most:
            raise BudgetError(
                f"max_drop: expected less than there is to lose, got {self.most:g}: evaluate gives {both}; one point "
                "of a share such as 0.93 is 0.01."
            )


def read_wanted(
    evaluate: Evaluate | None,
    max_drop: Any,
    max_error: Any,
    *,
    lower_is_better: bool = False,
    of: Any = None,
    keep: Keep | None = None,
    target: Any = None,
    merge_heads: Any = None,
    ranks: Any = False,
) -> Wanted | None:
    """What is asked of the search; None where none is.

    Args:
        ranks: of the recipe; a word wants sizes that are targets, a fraction such as are not.

    Raises:
        RecipeError: options that do not go together.
        BudgetError: a drop or an error that means nothing.
        ArgumentError: something else than a function.
    """
    if of is not None and (not isinstance(of, str) or of not in FRACTIONS):
        raise BudgetError(f"of: {unknown_name('measure', of, FRACTIONS)}")
    if max_drop is None and max_error is None:
        _refuse_alone(evaluate=evaluate, lower_is_better=lower_is_better or None, of=of)
        return None
    asked = "max_drop" if max_error is None else "max_error"
    if max_drop is not None and max_error is not None:
        raise RecipeError("max_drop: goes without max_error; one is of what evaluate gives, one of the outputs.")
    beside = [n for n, v in (("keep", keep), ("target", target), ("merge_heads", merge_heads)) if v is not None]
    if beside:
        raise RecipeError(f"{asked}: goes without {' and '.join(beside)}, as it finds the size itself; {_ALLOWED}.")
    check_ranks(ranks, of)
    if max_error is not None:
        _refuse_beside_error(evaluate=evaluate, lower_is_better=lower_is_better or None)
        return Wanted(_read_error(max_error), of=of or "macs")
    if evaluate is None:
        raise RecipeError(
            "max_drop: expected evaluate= too, a function that gives a number for a network, got none; without one, "
            "max_error= limits the output error."
        )
    return Wanted(_read_drop(max_drop), Judge(evaluate), lower_is_better, of or "macs")


def _refuse_alone(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise RecipeError(f"{name}: goes with max_drop= (or max_error=), which finds the smallest size; add that.")


def check_ranks(ranks: Any, of: str | None) -> None:
    """
    Raises:
        RecipeError: ranks that sizes which are fractions of this cannot choose, or choose themselves.
    """
    if of == "channels" and (ranks is True or ranks == ONLY):
        raise RecipeError(
            f"ranks: expected sizes between which ranks can be chosen, got of='channels' beside {show(ranks)}; leave "
            "of= out, or give a fraction, such as ranks=0.5."
        )
    if of != "channels" and type(ranks) is float:
        raise RecipeError(
            f"ranks: sizes in {of or 'macs'} choose ranks themselves, got {show(ranks)}; give "
            "ranks=True, or of='channels'."
        )


def _refuse_beside_error(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise RecipeError(f"max_error: goes without {name}, which goes with max_drop=; leave one of them out.")


def _read_drop(value: Any) -> float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise BudgetError(
            f"max_drop: expected a number of at least 0, got {show(value)}; 0.01 is one point of an accuracy in 0..1."
        )
    return float(value)


def _read_error(value: Any) -> float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise BudgetError(
            f"max_error: expected a fraction between 0 and 1, got {show(value)}; 0.1 is a tenth of the variance of the "
            "outputs, 1 what a constant is off by."
        )
    return float(value)


@dataclass(frozen=True, eq=False)
class Search:
    """One search.

    Attributes:
        model: the original network.
        original, nothing: its score, and that of the same with all weights zero.
    """

    wanted: Wanted
    model: nn.Module
    original: float | None = None
    nothing: float | None = None

    __repr__ = show_briefly

    def find(
        self,
        recipe: Recipe,
        make: Callable[[Recipe], Compressed],
        measure: Callable[[Compressed], HeldOut | None],
    ) -> tuple[Compressed, Trials]:
        """The smallest that passes, and all that were tried.

        Args:
            measure: how close the outputs of a smaller network are, where no function of the user tells.
        Raises:
            BudgetError: none passes; the least harmful is named.
            RecipeError: there is nothing to measure outputs on.
        """
        tried, passing, on = list[Trial](), list[Compressed](), list[HeldOut]()

        def passes(index: int) -> bool:
            sized = self.wanted.ask(recipe, SEARCHED[index])
            with prefix_stages(f"try {len(tried) + 1} of up to {count_tries(len(SEARCHED))}"), sizes_are_searched():
                small = make(sized)
            asked = f"{self.wanted.of} {SEARCHED[index]:g}"
            value = self._score(asked, small) if self.wanted.judge is not None else self._see(measure(small), on)
            tried.append(Trial(asked, small.after.params, small.after.macs, value, self._is_enough(value)))
            if tried[-1].passes and _is_smaller(small):
                passing[:] = [small]
            return tried[-1].passes

        bisect(len(SEARCHED), passes)
        if not passing:
            raise BudgetError(self._explain_failure(tried))
        where = say_where(on[0].on, on[0].unseen) if on else None
        scores = self.original, self.nothing, self.wanted.lower_is_better
        measured = "output error" if self.wanted.judge is None else "score"
        return passing[0], Trials(measured, self.wanted.most, tuple(tried), len(SEARCHED), *scores, where)

    def tell(self, small: Compressed, trials: Trials) -> Compressed:
        """With all that were tried, also in the plan, and what was noticed meanwhile."""
        plan = replace(small.plan, warnings=(*(w for w in small.plan.warnings if not is_miss(w)), str(trials)))
        noticed = self.wanted.judge.notes if self.wanted.judge is not None else ()
        return replace(small, plan=plan, trials=trials, notes=(*small.notes, *noticed))

    def _score(self, asked: str, small: Compressed) -> float:
        assert self.wanted.judge is not None
        return self.wanted.judge.score(wrap_like(self.model, small.model), f"the network at {asked}")

    def _see(self, held: HeldOut | None, on: list[HeldOut]) -> float:
        """The output error, and what it is of."""
        if held is None:
            raise RecipeError("max_error: expected inputs to measure outputs on, got none; give inputs=, 50 or more.")
        on[:] = [held]
        return held.after.error

    def _is_enough(self, value: float) -> bool:
        lost = value if self.original is None else find_loss(self.original, value, self.wanted.lower_is_better)
        return lost <= self.wanted.most + _ROUNDING * abs(self.original or 0.0)

    def _explain_failure(self, tried: list[Trial]) -> str:
        harmful = [trial for trial in tried if not trial.passes]
        if not harmful:
            return (
                f"{'max_error' if self.original is None else 'max_drop'}: expected a size at which the network is "
                f"smaller, got none of {len(tried)} tried, as no group shrinks; {_ALLOWED}."
            )
        worse = lambda t: -t.value if self.original is not None and not self.wanted.lower_is_better else t.value  # noqa: E731
        best = min(harmful, key=lambda t: (math.isnan(t.value), worse(t)))
        if self.original is None:
            expected = f"max_error: expected a size whose output error is at most {show_limit(self.wanted.most)}"
            least = f"{best.asked}, is off by {percent(best.value)}"
        else:
            expected = f"max_drop: expected a size that loses at most {self.wanted.most:g} of {self.original:.4g}"
            least = f"{best.asked}, has {best.value:.4g}"
        return (
            f"{expected}, got none of {len(tried)} tried; the least harmful, {least}. Allow more, or give more inputs."
        )


def _is_smaller(small: Compressed) -> bool:
    """Whether anything is gone; sizes next to the whole may be none that groups can have."""
    return small.after.params < small.before.params or small.after.macs < small.before.macs


def bisect(count: int, passes: Callable[[int], bool]) -> int:
    """How many of so many passes, the first ones, in about log2 of their number of tries; none behind one that fails.

    >>> bisect(100, lambda index: index < 42)
    42
    """
    return bisect_left(range(count), True, key=lambda index: not passes(index))


def count_tries(count: int) -> int:
    """How many tries `bisect` takes at most.

    >>> count_tries(7), count_tries(8)
    (3, 4)
    """
    return count.bit_length()
