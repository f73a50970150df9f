"""A smaller network beside its original: size, time, and outputs; in words that need no glossary."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from intrafusion.brief import show_briefly
from intrafusion.measure.closeness import Closeness, say_where
from intrafusion.measure.latency import time_turns
from intrafusion.measure.size import Size
from intrafusion.network.batches import count_images
from intrafusion.network.free_memory import describe_bytes
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import named_tensors

_SECONDS, _RUNS, _WARMUP = 1.0, 30, 1
_NAMED = 4  # outputs whose errors are printed
_ENOUGH = 3  # runs, to say which network is faster
_FASTER = 0.97  # of the original's time; above it, the difference is within what a machine varies


@dataclass(frozen=True)
class Footprint:
    """What one network takes.

    Attributes:
        params: parameters.
        macs: multiply-accumulates on the example inputs, the whole batch.
        bytes: of all tensors, as a file of weights holds them.
        latency_ms: median milliseconds of one forward call on the example inputs; None if it could not be timed.
    """

    params: int
    macs: int
    bytes: int
    latency_ms: float | None = None

    __repr__ = show_briefly


@dataclass(frozen=True)
class HeldOut:
    """How close the smaller network is to the original on some inputs.

    Attributes:
        on: how many of what.
        unseen: whether they were kept from the solver.
        after: of the network as it is.
        before: of the network before anything was restored; None where nothing was.
    """

    on: str
    unseen: bool
    after: Closeness
    before: Closeness | None = None

    __repr__ = show_briefly

    def row(self) -> tuple[str, str]:
        """A name, and the rest in words."""
        where = say_where(self.on, self.unseen)
        return "outputs", f"{where}{',' * (',' in where)} {self._how_far()}{self._agreement()}"

    def _how_far(self) -> str:
        before = f" ({percent(self.before.error)} before restoring)" if self.before else ""
        return f"differ by {percent(self.after.error)}{self._which()} of their variance{before}"

    def _which(self) -> str:
        """The worst of several outputs by name, and the others."""
        ranked = sorted(self.after.outputs.items(), key=lambda item: -item[1])
        if not ranked:
            return ""
        others = [f", {percent(error)} ({name})" for name, error in ranked[1:_NAMED]]
        rest = [f" and {len(ranked) - _NAMED} by less"] if len(ranked) > _NAMED else []
        return "".join([f" ({ranked[0][0]})", *others, *rest])

    def _agreement(self) -> str:
        return "" if self.after.agreement is None else f"; labels agree on {percent(self.after.agreement)}"


@dataclass(frozen=True)
class Comparison:
    """A smaller network beside its original, measured at the end of a compression.

    Attributes:
        before, after: what each takes.
        batch: images in the example inputs, on which both were timed.
        threads: of PyTorch while they were timed.
        device: where.
        runs: how often each was timed, in turns.
        held_out: how close the outputs are; None where there was nothing to see it on.
        failed: why something could not be measured.
    """

    before: Footprint
    after: Footprint
    batch: int
    threads: int
    device: str
    runs: int = 0
    held_out: HeldOut | None = None
    failed: str | None = None

    __repr__ = show_briefly

    @property
    def speedup(self) -> float | None:
        """How many times as fast the smaller network is; None if it was not timed."""
        before, after = self.before.latency_ms, self.after.latency_ms
        return before / after if before and after else None

    @property
    def is_faster(self) -> bool | None:
        """By more than machines vary; None if it was not timed, or too seldom."""
        return None if self.speedup is None or self.runs < _ENOUGH else self.speedup * _FASTER > 1

    def to_data(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Comparison:
        """Read what `to_data` gave.

        Raises:
            TypeError, KeyError: something else.
        """
        held = data["held_out"]
        found = {"before": Footprint(**data["before"]), "after": Footprint(**data["after"])}
        return cls(**{**data, **found, "held_out": None if held is None else _read_held_out(held)})

    def figures(self) -> list[tuple[str, str]]:
        """The rows, and how close the outputs are."""
        return self.rows() if self.held_out is None else [*self.rows(), self.held_out.row()]

    def rows(self) -> list[tuple[str, str]]:
        """What is compared, and both values in words."""
        before, after = self.before, self.after
        rows = [
            ("parameters", describe_change(before.params, after.params)),
            ("MACs", describe_change(before.macs, after.macs)),
            ("file", describe_change(before.bytes, after.bytes, describe_bytes)),
        ]
        if before.latency_ms is not None and after.latency_ms is not None:
            times = f"{before.latency_ms:.3g} ms -> {after.latency_ms:.3g} ms"
            rows.append(("latency", f"{times} ({self.speedup:.2f} times as fast; {self._timing()})"))
        return rows

    def _timing(self) -> str:
        threads = f", {self.threads} thread{'s'[: self.threads > 1]}" if self.device == "cpu" else ""
        how = f"medians of {self.runs} runs in turn" if self.runs > 1 else "one run each"
        return f"batch {self.batch} on {self.device}{threads}, {how}"


def compare_networks(model: nn.Module, small: nn.Module, inputs: Inputs, before: Size, after: Size) -> Comparison:
    """Size and time of two networks; takes about a second, or one timed call of each where these take longer.

    What goes wrong is told in `failed`, not raised.

    Args:
        model: the original network.
        before: its size.
        after: that of the smaller one.
    """
    device = next((t.device.type for t in named_tensors(model).values()), "cpu")
    found = Comparison(
        _measure_footprint(model, before),
        _measure_footprint(small, after),
        count_images(inputs),
        torch.get_num_threads(),
        device,
    )
    try:
        times = time_turns([model, small], inputs, repeats=_RUNS, warmup=_WARMUP, seconds=_SECONDS)
    except Exception as error:  # whatever a network raises: the smaller one is there, and stays
        return replace(found, failed=f"latency could not be measured: {type(error).__name__}: {error}")
    old, new = map(statistics.median, times)
    timed = replace(found.before, latency_ms=old), replace(found.after, latency_ms=new)
    return replace(found, before=timed[0], after=timed[1], runs=len(times[0]))


def _measure_footprint(model: nn.Module, size: Size) -> Footprint:
    return Footprint(size.params, size.macs, sum(t.numel() * t.element_size() for t in named_tensors(model).values()))


def _read_held_out(data: Mapping[str, Any]) -> HeldOut:
    before = data["before"]
    read = {"after": Closeness(**data["after"]), "before": None if before is None else Closeness(**before)}
    return HeldOut(**{**data, **read})


def describe_change(before: int, after: int, shown: Callable[[int], str] = "{:,}".format) -> str:
    """Both values, and what is left.

    >>> describe_change(1000, 500)
    '1,000 -> 500 (50.0%)'
    """
    return f"{shown(before)} -> {shown(after)}" + (f" ({after / before:.1%})" if before else "")


def percent(share: float) -> str:
    """A share with two digits that tell something; only what is whole is 100 %.

    >>> percent(0.0312), percent(0.974), percent(0.9961), percent(1.0), percent(1.5), percent(0.0)
    ('3.1 %', '97 %', '99.6 %', '100 %', '150 %', '0 %')
    """
    value = 100 * share
    if value == 0 or value >= 100:
        return f"{value:.0f} %"
    if value < 0.01:
        return "less than 0.01 %"
    if value >= 99:
        return f"{min(value, 99.9):.1f} %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"
