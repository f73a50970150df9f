"""Texts that a causal language model samples from itself: what it was trained on, as it remembers it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError, NoInputsError
from intrafusion.network.batches import cast_like, take_images
from intrafusion.network.inputs import Inputs
from intrafusion.network.row_weights import MASKS
from intrafusion.network.state import preserve_state
from intrafusion.network.token_limits import find_token_limits, list_arguments
from intrafusion.restore.tokens import find_token_ranges

SAMPLED = "texts sampled from the network itself"
_TEXTS, _FEWEST_TEXTS, _HELD_OUT = 64, 8, 32
_LENGTH = 128  # tokens
_CACHED = 5  # passes over whole texts that sampling with a cache takes as long as, at least; 2 to 4 were measured
_SAME = 1e-3  # of the size of logits: what longer sequences may change by rounding


@dataclass(frozen=True, eq=False)
class Sampler:
    """A causal language model, and how it is called.

    Attributes:
        example: one call.
        argument: which of its arguments are the tokens.
        vocabulary: numbers that these may have.
        output: which of its outputs are the logits of the next tokens.
        grows: whether it takes sequences of every length up to `length`; else of that alone.
        first: the token that texts begin with; None for any.
    """

    model: nn.Module
    example: Inputs
    argument: str | int
    vocabulary: int
    output: int
    length: int
    grows: bool
    first: int | None

    __repr__ = show_briefly

    def call(self, ids: Tensor) -> Inputs:
        """The example with these tokens, all of which count."""
        own = list_arguments(self.example)[self.argument]
        assert isinstance(own, Tensor)

        def fit(name: str | int, value: Any) -> Any:
            if name == self.argument:
                return ids.to(own)
            if not isinstance(value, Tensor) or not value.dim() or len(value) != len(own):
                return value
            if name in MASKS:
                return torch.ones(ids.shape, device=value.device).to(value.dtype)
            return value[torch.arange(len(ids), device=value.device) % len(own)]

        args = tuple(fit(i, value) for i, value in enumerate(self.example.args))
        kwargs = {name: fit(name, value) for name, value in (self.example.kwargs or {}).items()}
        return replace(self.example, args=args, kwargs=kwargs, source="the texts that are sampled")

    def logits(self, ids: Tensor) -> Tensor:
        """Of the token behind each, (texts, length, vocabulary)."""
        found = cast_like(self.call(ids), self.model).call(self.model)[self.output]
        return found[..., : self.vocabulary]

    def sample(self, count: int, seed: int) -> Inputs:
        """Texts of `length` tokens at temperature 1, all at once, token by token."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocabulary, (count, self.length), generator=generator)
        if self.first is not None:
            ids[:, 0] = self.first
        with preserve_state(self.model):
            if self.is_fast and (found := self._generate(ids[:, :1], seed)) is not None:
                return self.call(found)
            for t in range(1, self.length):
                logits = self.logits(ids[:, :t] if self.grows else ids)[:, t - 1]
                shares = logits.double().softmax(1).cpu()
                ids[:, t] = torch.multinomial(shares, 1, generator=generator)[:, 0]
        return self.call(ids)

    @property
    def is_fast(self) -> bool:
        """Whether the network generates text itself, by a cache, as those of transformers do."""
        can = getattr(self.model, "can_generate", None)
        return self.argument == "input_ids" and self.grows and callable(can) and bool(can())

    def _generate(self, first: Tensor, seed: int) -> Tensor | None:
        """Texts by its own `generate`; None where that fails."""
        torch.manual_seed(seed)
        plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True, "pad_token_id": 0}
        new = self.length - 1
        first = cast_like(Inputs((first,)), self.model).args[0]
        try:
            found = self.model.generate(  # type: ignore[operator]
                input_ids=first, attention_mask=torch.ones_like(first), max_new_tokens=new, min_new_tokens=new, **plain
            )
        except Exception:  # whatever a network does in there: texts are sampled by passes then
            return None
        fits = isinstance(found, Tensor) and found.shape == (len(first), self.length)
        return found if fits and int(found.max()) < self.vocabulary else None

    def time_pass(self, count: int) -> float:
        """Seconds of one pass over so many whole texts."""
        ids = torch.zeros(count, self.length, dtype=torch.long)
        with preserve_state(self.model):
            start = time.perf_counter()
            self.logits(ids)
            return time.perf_counter() - start


def find_sampler(model: nn.Module, example: Inputs) -> Sampler:
    """How texts are sampled from a network.

    That is one of which the first token argument, (n, length), gives logits (n, length, vocabulary) that no later token
    changes.

    Raises:
        NoInputsError: no causal language model.
    """
    example = replace(example, outputs=None)
    ranges = find_token_ranges(model, example)
    tokens = [(example.tensors()[place], rows) for place, rows in sorted(ranges.items())]
    tokens = [(t, rows) for t, rows in tokens if t.dim() == 2]
    if not tokens:
        raise NoInputsError(
            "texts can be sampled only from a language model: no argument (n, length) picks its tokens."
        )
    (own, rows), arguments = tokens[0], list_arguments(example)
    argument = next(name for name, value in arguments.items() if value is own)
    with preserve_state(model):
        outputs = cast_like(example, model).call(model)
    places = [i for i, t in enumerate(outputs) if t.is_floating_point() and _are_logits(t, own, rows)]
    if not places:
        raise NoInputsError(
            f"texts can be sampled only from a language model: no output holds logits {[*own.shape, rows]} of tokens."
        )
    first = _find_first_token(model, rows)
    sampler = Sampler(model, example, argument, rows, places[0], own.shape[1], grows=False, first=first)
    with preserve_state(model):
        sampler = _stretch(sampler, arguments)
    if not _is_causal(sampler):
        raise NoInputsError(
            "texts can be sampled only from a causal language model: later tokens change earlier logits."
        )
    return sampler


def sample_texts(sampler: Sampler, seed: int, seconds: float | None = None) -> tuple[Inputs, Inputs, str | None]:
    """Texts, others that are held out, and why they are fewer or shorter than usual, if they are.

    Args:
        seconds: that sampling may take, by a timed pass; None for as long as it takes.
    Raises:
        ModelError: not even a few texts fit into the time, or the network gives NaN.
    """
    count, length = _TEXTS, sampler.length
    steps = _CACHED if sampler.is_fast else (length + 1) / 2 if sampler.grows else length
    each = sampler.time_pass(_FEWEST_TEXTS) / _FEWEST_TEXTS
    wanted = each * (_TEXTS + _HELD_OUT) * steps
    while seconds is not None and each * 1.5 * count * steps > seconds and count > _FEWEST_TEXTS:
        count //= 2
    if seconds is not None and each * 1.5 * count * steps > seconds:
        raise ModelError(
            f"sampling {_TEXTS} texts from the network is left out: it would take about {wanted:.0f} s here"
        )
    made = sampler.sample(count + count // 2, seed)
    why = None if count == _TEXTS else f"{_TEXTS} texts would take about {wanted:.0f} s here"
    return take_images(made, 0, count), take_images(made, count, count + count // 2), why


def _are_logits(output: Tensor, tokens: Tensor, rows: int) -> bool:
    return output.dim() == 3 and output.shape[:2] == tokens.shape and output.shape[2] >= rows


def _find_first_token(model: nn.Module, rows: int) -> int | None:
    """The one that a text begins with, as configurations of transformers say."""
    said = getattr(getattr(model, "config", None), "bos_token_id", None)
    return said if isinstance(said, int) and 0 <= said < rows else None


def _stretch(sampler: Sampler, arguments: Mapping[str | int, object]) -> Sampler:
    """With texts of the usual length, and growing, where the network takes them."""
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    if any(name != sampler.argument and name not in MASKS for name in tensors):
        return sampler
    longest = find_token_limits(sampler.model, sampler.example).cut
    length = max(sampler.length, _LENGTH)
    wanted = replace(sampler, length=length if longest is None else min(length, longest), grows=True)
    for tried in (wanted, replace(sampler, grows=True)):
        if all(_runs(lambda t=tried, n=n: t.logits(torch.zeros(2, n, dtype=torch.long))) for n in (1, tried.length)):
            return tried
    return sampler


def _runs(call: Callable[[], object]) -> bool:
    try:
        call()
    except ModelError:
        return False
    return True


def _is_causal(sampler: Sampler) -> bool:
    """Whether the logits of tokens stay when the last one changes."""
    generator = torch.Generator().manual_seed(0)
    length = min(sampler.length, 32) if sampler.grows else sampler.length
    ids = torch.randint(sampler.vocabulary, (4, length), generator=generator)
    if ids.shape[1] < 2:
        return False
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % sampler.vocabulary
    with preserve_state(sampler.model):
        before, after = (sampler.logits(t)[:, :-1].double() for t in (ids, other))
    return float((after - before).norm()) <= _SAME * float(before.norm())
