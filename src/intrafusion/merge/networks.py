"""merge_heads(): fewer key/value heads in grouped-query attention, each made of several, proved and solved."""

from __future__ import annotations

from torch import nn

from intrafusion.arguments import Count, Seed, checked
from intrafusion.compressed import Compressed
from intrafusion.network.batches import ImagesLike
from intrafusion.network.inputs import ExampleInputs
from intrafusion.network.texts import Tokenizer
from intrafusion.pipeline import compress


@checked
def merge_heads(
    model: nn.Module,
    example_inputs: ExampleInputs,
    heads: Count,
    inputs: ImagesLike | None = None,
    *,
    images: ImagesLike | None = None,
    tokenizer: Tokenizer | None = None,
    seed: Seed = 0,
) -> Compressed:
    """Merge the key/value heads of grouped-query attention until so many are left; the query heads stay.

    Of heads that become one, values take their best common directions (see `principal_map`), keys those too, or, where
    a rotary embedding turns them in pairs, one complex factor for each pair, which commutes with the rotation; queries
    and the output layer take the other side of it. Those become one that lose least. Then every layer is solved
    for the original's outputs. The same as `compress(..., merge_heads=heads)`; `compress` does the rest, if more is
    wanted.

    Args:
        model: not modified.
        example_inputs: of one forward call.
        heads: that are left, a half, a quarter, ... of those that there are.
        inputs: as `compress`: what is looked at and solved on; without, what "auto" makes there.
        images: another name of `inputs`.
        tokenizer: as `compress`.
        seed: for the sampling of rows.
    Raises:
        ModelError: there are no heads that can be merged, or the smaller network is not proved to do what the maps say.
        BudgetError: a number of heads that cannot be reached by halving.
    Reference: the mean of heads, Ainslie et al. 2023; merging by principal components, and by complex ones, is OURS.
    """
    return compress(
        model, example_inputs, inputs=inputs, images=images, tokenizer=tokenizer, seed=seed, merge_heads=heads
    )
