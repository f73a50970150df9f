"""The sizes that were tried to find the smallest one that loses little enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from intrafusion.brief import show_briefly
from intrafusion.measure.comparison import percent


@dataclass(frozen=True)
class Trial:
    """One size.

    Attributes:
        asked: in words, such as "macs 0.5".
        params, macs: of that network.
        value: its score, or its output error.
        passes: whether that is good enough.
    """

    asked: str
    params: int
    macs: int
    value: float
    passes: bool

    __repr__ = show_briefly


@dataclass(frozen=True)
class Trials:
    """How the smallest size was found.

    Attributes:
        measure: "score" or "output error".
        most: how much may be lost, or how large the error may be.
        tried: in that order.
        count: of the sizes among which it was looked for.
        original: score of the original; None for errors.
        nothing: score of the network with all weights zero; None for errors, and where it is not known.
        lower_is_better: whether that is so of the score.
        on: what output errors are measured on.
    """

    measure: str
    most: float
    tried: tuple[Trial, ...]
    count: int
    original: float | None = None
    nothing: float | None = None
    lower_is_better: bool = False
    on: str | None = None

    __repr__ = show_briefly

    @property
    def found(self) -> Trial:
        """The smallest that passes."""
        return [trial for trial in self.tried if trial.passes][-1]

    def table(self) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """A header, and a row for each size that was tried."""
        rows = (
            (t.asked, f"{t.params:,}", f"{t.macs:,}", self._show(t.value), "yes" if t.passes else "no")
            for t in self.tried
        )
        return ("tried", "parameters", "MACs", self.measure, "enough"), tuple(rows)

    def row(self) -> tuple[str, str]:
        """A name, and what came of it."""
        if self.original is None:
            return self.measure, f"{self._show(self.found.value)} (at most {show_limit(self.most)} was allowed)"
        lost = find_loss(self.original, self.found.value, self.lower_is_better)
        said = f"{lost:.2g} lost" if lost > 0 else "nothing lost"
        return (
            self.measure,
            f"{self._show(self.original)} -> {self._show(self.found.value)} ({said}, at most {self.most:g})",
        )

    def __str__(self) -> str:
        """All of it in a sentence."""
        allowed = f"with {self.measure} at most {show_limit(self.most)}" if self.original is None else self._allowed()
        tried = ", ".join(f"{t.asked}: {self._show(t.value)}{'' if t.passes else ' (no)'}" for t in self.tried)
        where = f", {self.on}" if self.on else ""
        return f"{self.found.asked} is the smallest of {self.count} sizes {allowed}{where}; tried: {tried}"

    def _allowed(self) -> str:
        assert self.original is not None
        nothing = "" if self.nothing is None else f" ({self._show(self.nothing)} with all weights zero)"
        return f"that loses at most {self.most:g} of the score {self._show(self.original)}{nothing}"

    def _show(self, value: float) -> str:
        return f"{value:.4g}" if self.original is not None else percent(value)

    def to_data(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def show_limit(error: float) -> str:
    """An output error that is allowed, as it was asked for: what is measured is rounded, this is not.

    >>> show_limit(0.15), show_limit(1e-9)
    ('15 %', '1e-07 %')
    """
    return f"{100 * error:.4g} %"


def find_loss(original: float, value: float, lower_is_better: bool) -> float:
    """How much worse a score is than the original's.

    >>> find_loss(0.75, 0.5, False), find_loss(0.75, 1.0, True)
    (0.25, 0.25)
    """
    return value - original if lower_is_better else original - value
