"""How much each row of what a network computes counts: rows of padded tokens count nothing.

A call of a network has a weight for each of its positions, (n, length), as its attention mask says. Which rows of an
activation are those positions is told by its shape. Two things shapes do not tell: batch from sequence where both are
as long, and in which order rows lie that were flattened. For that a sequence stands in the batch twice, the second time
without weight (`doubled`): its rows are alike in the order that is the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError

_ALIKE = 1e-2  # of the size of rows: what kernels may round another way at another place of a batch

MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
"""Arguments that are 1 where there is something and 0 where there is padding, and the tokens that each goes with."""

_INVERTED = ("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "key_padding_mask")
"""Arguments that are True where there is padding, as in torch.nn.Transformer."""

_IGNORED = -100  # a label that no loss counts, as of padding
SHUT = -1e3  # what is added to scores that shall not count is below this

_MASKLIKE = ("mask", "pad", "length")  # in names of arguments that may say what is padding


@dataclass(frozen=True, eq=False)
class RowWeights:
    """How much the rows of one call count, by their place.

    Attributes:
        tables: (n, length) float64 >= 0 for each kind of sequence: of an encoder, of a decoder; or (n, 1) for rows of
            images that count differently.
        lost: where the rows could not be told apart, so that all of a sample count; shared by calls made of each other.
        doubled: samples at the end that stand there twice, for the order of rows to be seen.
    """

    tables: tuple[Tensor, ...]
    lost: set[str] = field(default_factory=set)
    doubled: int = 0

    __repr__ = show_briefly

    def map(self, change: Callable[[Tensor], Tensor]) -> RowWeights:
        return replace(self, tables=tuple(map(change, self.tables)))

    def of_rows(self, x: Tensor, where: str) -> Tensor:
        """Weights of rows x (*places, c), one for each place.

        Where the shape has no places for the positions, a sample's rows all count as its largest position does; that is
        noted as lost, but for one row a sample, such as a class token's.
        """
        shape = x.shape[:-1]
        found = [w for table in self.tables if (w := self._place(table, x)) is not None]
        if found and all(torch.equal(w, found[0]) for w in found[1:]):
            return found[0].expand(shape)
        whole = self.tables[0].amax(1).to(x.device) if self.tables else ()
        if isinstance(whole, Tensor) and shape and shape[0] == len(whole):
            if math.prod(shape[1:]) > 1 and any(table.shape[1] > 1 for table in self.tables):
                self.lost.add(where)
            return whole.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        self.lost.add(where)
        return torch.ones(shape, dtype=torch.float64, device=x.device)

    def of_outputs(self, output: Tensor, where: str) -> Tensor:
        """Weights of what a network gave: along all dimensions but the last, or along both of two."""
        scores = output.dim() == 2 and any(t.shape == output.shape and t.shape[1] > 1 for t in self.tables)
        return self.of_rows(output[..., None] if scores or output.dim() < 2 else output, where)

    def _place(self, table: Tensor, x: Tensor) -> Tensor | None:
        """A table along the dimensions of rows, to be expanded; None where that is not clear."""
        shape, (n, length), table = x.shape[:-1], table.shape, table.to(x.device)
        if length == 1 or n == length or not shape:
            return None
        if shape[0] == n:
            dims = [d for d in range(1, len(shape)) if shape[d] == length]
            view = [n if d == 0 else length if d in dims else 1 for d in range(len(shape))]
            return table.reshape(view) if len(dims) == 1 else None
        if tuple(shape[:2]) == (length, n):
            return table.T.reshape(length, n, *[1] * (len(shape) - 2))
        if shape == (n * length,):
            return self._flatten(table, x)
        return None

    def _flatten(self, table: Tensor, x: Tensor) -> Tensor | None:
        """For rows (n * length, c): in the order in which the sample that stands there twice has the same rows."""
        n, length = table.shape
        orders = {by: x.reshape(*shape, x.shape[-1]) for by, shape in ((0, (n, length)), (1, (length, n)))}
        alike = [by for by, rows in orders.items() if self.doubled and _has_copy(rows, by, self.doubled)]
        return (table if alike[0] == 0 else table.T).flatten() if len(alike) == 1 else None


def _has_copy(rows: Tensor, dim: int, count: int) -> bool:
    """Whether the last samples along a dimension are the first one again."""
    first, last = rows.select(dim, 0).double(), rows.narrow(dim, rows.shape[dim] - count, count).double()
    return bool((last - first.unsqueeze(dim)).norm() <= _ALIKE * max(1, count) ** 0.5 * first.norm())


def weigh_evenly(weights: Tensor) -> Tensor | None:
    """Weights of mean 1, (k, 1); None where all are the same."""
    even = not len(weights) or bool((weights == weights[0]).all())
    return None if even else (weights / weights.mean())[:, None]


def weigh_within(counts: Tensor) -> Tensor:
    """Weights (images, places) as shares of each image's sum; 0 for an image of which no place counts."""
    return counts / counts.sum(1, keepdim=True).clamp(min=1e-300)


def effective_rows(weights: Tensor | None, count: int) -> float:
    """As how many rows of equal weight these tell; weights (k, 1) of mean 1 (Kish 1965)."""
    return count if weights is None else count**2 / float(weights.square().sum())


def select_counted(outputs: Sequence[Tensor], weights: RowWeights | None) -> list[Tensor]:
    """Of what a network gave, the rows that count, (k, ...), each times the root of its weight; without weights all.

    >>> kept = select_counted([torch.ones(3, 2, 5)], RowWeights((torch.tensor([[1.0, 1], [1, 0], [1, 1]]),)))
    >>> [tuple(t.shape) for t in kept]
    [(5, 5)]
    """
    if weights is None:
        return list(outputs)
    return [t if t.dim() == 0 else _select(t, weights.of_outputs(t, "the output")) for t in outputs]


def _select(output: Tensor, weights: Tensor) -> Tensor:
    kept = weights > 0
    rows, root = output[kept], weights[kept].sqrt()
    if bool((root == 1).all()) or not output.is_floating_point():
        return rows
    return rows * root.reshape(-1, *[1] * (rows.dim() - 1)).to(rows)


# ---- reading masks --------------------------------------------------------------------------------------------------


def find_weights(arguments: Mapping[str, object], source: str) -> RowWeights | None:
    """What the masks among the named arguments of a call say; None where there are none.

    Of an encoder-decoder without a mask for the decoder, labels of -100 are padding.

    Raises:
        ModelError: a mask of another shape than the tokens, or a sequence of which it leaves nothing.
    """
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    tables, lost = list[Tensor](), set[str]()
    for name in (*MASKS, *_INVERTED):
        if name in tensors and not _is_continued(arguments):
            table = _read_mask(name, tensors, source)
            tables.extend([] if table is None else [table])
            lost.update([name] if table is None else [])
    labels = tensors.get("labels")
    if tables and labels is not None and "decoder_attention_mask" not in tensors and _is_of_decoder(labels, tables[0]):
        tables.append((labels != _IGNORED).double())
    return RowWeights(tuple(tables), lost) if tables or lost else None


def find_unknown_masks(arguments: Mapping[str, object], count: int) -> list[str]:
    """Names of what may say which of `count` sequences have padding where, but is no mask that is known.

    >>> find_unknown_masks({"lengths": torch.tensor([3, 2]), "attention_mask": torch.ones(2, 3)}, 2)
    ['lengths']
    """
    found = [(name, t) for name, t in arguments.items() if isinstance(t, Tensor) and any(p in name for p in _MASKLIKE)]
    return [name for name, t in found if name not in (*MASKS, *_INVERTED) and _may_be_padding(t, count)]


def _may_be_padding(mask: Tensor, count: int) -> bool:
    """Not so what is for all sequences, for pairs of positions, or everywhere the same."""
    of_pairs = mask.dim() > 1 and mask.shape[-1] == mask.shape[-2]
    return mask.dim() > 0 and len(mask) == count and not of_pairs and bool((mask != mask.flatten()[0]).any())


def _is_continued(arguments: Mapping[str, object]) -> bool:
    """With a cache, masks are longer than what is computed."""
    return arguments.get("past_key_values") is not None


def _is_of_decoder(labels: Tensor, mask: Tensor) -> bool:
    whole = labels.dim() == 2 and not labels.is_floating_point() and bool((labels == _IGNORED).any())
    return whole and len(labels) == len(mask) and labels.shape != mask.shape


def _read_mask(name: str, tensors: Mapping[str, Tensor], source: str) -> Tensor | None:
    """(n, length) of 0 and 1; None where a mask does not say which positions of a sequence there are.

    Of pairs of positions, those are there that any position may look at.
    """
    mask = tensors[name]
    tokens = tensors.get(MASKS.get(name, ""))
    if tokens is not None and mask.dim() < 3 and mask.shape != tokens.shape:
        raise ModelError(
            f"{source}: {name}: expected one number for each token, {list(tokens.shape)}, got {list(mask.shape)}; "
            "pass the mask that the tokenizer gave with them."
        )
    is_added = mask.is_floating_point() and bool((mask < 0).any() or (mask.dim() > 2 and not mask.any()))
    kept = mask > SHUT if is_added else ~mask.bool() if name in _INVERTED else mask > 0
    if kept.dim() > 2 and tokens is not None and (len(kept), kept.shape[-1]) == tokens.shape:
        kept = kept.flatten(1, -2).any(1)
    if kept.dim() != 2:
        return None
    empty = (~kept.any(1)).nonzero()[:, 0].tolist()
    if empty:
        which = "every sequence" if len(empty) == len(mask) else f"sequence {empty[0]}"
        raise ModelError(
            f"{source}: {name}: expected at least one token of each sequence to count, got a mask that leaves nothing "
            f"of {which}; leave such sequences out."
        )
    return kept.double()
