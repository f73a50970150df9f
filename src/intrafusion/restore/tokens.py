"""Random tokens for networks that read whole numbers, where no data is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.network.inputs import Inputs
from intrafusion.network.modes import Mode
from intrafusion.network.state import preserve_state
from intrafusion.trace.dispatch import is_composite

_TOKENS = 2**12  # of all sequences together, unless that would leave fewer than _FEWEST_SEQUENCES
_FEWEST_SEQUENCES = 8


def find_token_ranges(model: nn.Module, inputs: Inputs) -> dict[int, int]:
    """By the place of an argument that picks rows of embeddings, whole numbers only, how many rows there are.

    Found out by one forward pass; of several tables, the shortest. Empty where no argument picks rows.
    """
    tokens = {i: t for i, t in enumerate(inputs.tensors()) if _is_tokens(t)}
    if not tokens:
        return {}
    picking = _Picking(tokens)
    with preserve_state(model), picking:
        inputs.call(model)
    return picking.rows


def draw_tokens(inputs: Inputs, ranges: Mapping[int, int], most: int, seed: int) -> Inputs:
    """A call with random rows of the embeddings, each as likely, in place of those of the example.

    What else goes with the batch (masks) is repeated from the example.

    Args:
        ranges: as `find_token_ranges` found them.
        most: sequences.
    """
    tensors = inputs.tensors()
    own = len(tensors[min(ranges)])
    length = max(1, tensors[min(ranges)][:1].numel())
    count = min(most, max(_FEWEST_SEQUENCES, _TOKENS // length))
    generator = torch.Generator().manual_seed(seed)

    def draw(place: int, like: Tensor) -> Tensor:
        if place in ranges:
            return torch.randint(ranges[place], (count, *like.shape[1:]), generator=generator).to(like)
        batched = like.dim() > 0 and len(like) == own
        return like[torch.arange(count, device=like.device) % own] if batched else like

    found = iter([draw(place, like) for place, like in enumerate(tensors)])
    return inputs.map(lambda _: next(found))


class _Picking(Mode):
    """Follows whole numbers through operations that only move them to the embeddings whose rows they pick."""

    def __init__(self, tokens: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.rows: dict[int, int] = {}
        self.place = WeakTensorKeyDictionary()
        for place, tensor in tokens.items():
            self.place[tensor] = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = [self.place[t] for t in operands if t in self.place]
        if func._schema.name.startswith(("aten::embedding", "aten::_embedding_bag")) and args[1] in self.place:
            place = self.place[args[1]]
            self.rows[place] = min(self.rows.get(place, len(args[0])), len(args[0]))
        elif len(operands) == len(places) == 1:  # moved, or cast
            for output in tree_leaves(out):
                if isinstance(output, Tensor) and not output.is_floating_point() and output.dtype != torch.bool:
                    self.place[output] = places[0]
        return out


def _is_tokens(t: Tensor) -> bool:
    return t.dtype in (torch.int32, torch.int64) and t.dim() > 0
