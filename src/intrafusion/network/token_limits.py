"""Which token numbers, and how long sequences, a network takes: told before an index fails inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.network.inputs import Inputs
from intrafusion.network.modes import Mode
from intrafusion.network.state import preserve_state


@dataclass(frozen=True, eq=False)
class TokenLimits:
    """What the embeddings of a network hold.

    Attributes:
        tokens: by argument, the embedding that it picks rows of, and how many there are.
        positions: embeddings of positions, how many rows they have, and which is that of the first position.
        known: tokens of the longest sequences that the network was made for, where its configuration says so.
    """

    tokens: Mapping[str | int, tuple[str, int]] = field(default_factory=dict)
    positions: tuple[tuple[str, int, int], ...] = ()
    known: int | None = None

    __repr__ = show_briefly

    @property
    def longest(self) -> int | None:
        """Tokens that a sequence may have; None where no embedding of positions was seen."""
        return min((rows - first for _, rows, first in self.positions), default=None)

    @property
    def cut(self) -> int | None:
        """Tokens at which longer texts are cut."""
        return self.known if self.longest is None else self.longest

    def doubt(self, call: Inputs) -> str | None:
        """What is to be said of sequences that run, and are longer than the network knows."""
        given = list_arguments(call)
        lengths = [ids.shape[-1] for k in self.tokens if isinstance(ids := given.get(k), Tensor) and ids.dim() > 1]
        if self.cut is None or max(lengths, default=0) <= self.cut:
            return None
        return (
            f"{call.source}: sequences of {max(lengths)} tokens, where the configuration of the network says at most "
            f"{self.cut} (max_position_embeddings): it was not trained on what is longer; cut them"
        )

    def check(self, call: Inputs) -> None:
        """
        Raises:
            ModelError: token numbers without a row, or sequences longer than the positions.
        """
        given = list_arguments(call)
        for argument, (table, rows) in self.tokens.items():
            if isinstance(ids := given.get(argument), Tensor) and ids.numel():
                self._check_ids(ids, rows, f"{call.source}: {argument}" if argument else call.source, table)

    def _check_ids(self, ids: Tensor, rows: int, where: str, table: str) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise ModelError(
                f"{where}: expected token numbers from 0 to {rows - 1}, for which {table} has rows, got "
                f"{low if low < 0 else high}; tokenize with the tokenizer of this network."
            )
        longest, length = self.longest, ids.shape[-1]
        if longest is not None and ids.dim() > 1 and length > longest:
            name = min(self.positions, key=lambda entry: entry[1] - entry[2])[0]
            raise ModelError(
                f"{where}: expected sequences of at most {longest} tokens, for which {name} has positions, got "
                f"{length}; cut them: tokenizer(..., truncation=True, max_length={longest})."
            )


def find_token_limits(model: nn.Module, example: Inputs) -> TokenLimits:
    """What is seen in one forward pass, and what a configuration says.

    Nothing is seen where no argument is a whole number, or the network does not run.
    """
    tokens: dict[str | int, Tensor] = {k: t for k, t in list_arguments(example).items() if _is_whole(t)}
    tables = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if not tokens or not tables:
        return TokenLimits()
    known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    known = known if type(known) is int and known > 0 else None
    given = example.copied()
    owners = {_memory_of(t): key for key, t in list_arguments(given).items() if key in tokens and isinstance(t, Tensor)}
    found: dict[str | int, tuple[str, int]] = {}
    positions: list[tuple[str, int, int]] = []
    lengths = {t.shape[-1] for t in tokens.values() if t.dim()}

    def reached(weight: Tensor, picked: Tensor) -> None:
        if (name := tables.get(id(weight))) is None:
            return
        key, rows = owners.get(_memory_of(picked)), len(weight)
        if key is not None:
            found[key] = min((found[key], (name, rows)), key=lambda entry: entry[1]) if key in found else (name, rows)
        elif picked.dim() and picked.shape[-1] in lengths and _counts_up(picked):
            positions.append((name, rows, int(picked.min())))

    try:
        with preserve_state(model), _Picks(reached):
            model(*given.args, **(given.kwargs or {}))
    except Exception:  # whatever a network raises: told where it is traced
        return TokenLimits(known=known)
    return TokenLimits(found, tuple(positions), known)


class _Picks(Mode):
    """Tells of every pick of rows: a module for positions may be called on tokens, of which it takes the number."""

    def __init__(self, reached: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.reached = reached

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.reached(args[0], args[1])
        return func(*args, **(kwargs or {}))


def list_arguments(call: Inputs) -> dict[str | int, Any]:
    """Arguments by name, positional ones by number."""
    return dict(enumerate(call.args)) | dict(call.kwargs or {})


def _memory_of(tensor: Tensor) -> int:
    """What a tensor shares with its views."""
    return tensor.untyped_storage().data_ptr()


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and value.dim() > 0


def _counts_up(picked: Tensor) -> bool:
    return picked.shape[-1] > 1 and bool((picked.diff(dim=-1) == 1).all())
