"""Places that are drawn batch by batch: those of one call, or as many as each batch has of what counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import sample_places
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.shares import ShareSampler


def draw(batches: Batches, shape: tuple[int, ...], rows: int, *, flat: bool = False) -> Tensor:
    """Places over all images, whichever the batches are."""
    sampler, found, start = ShareSampler(rows, 3), [], 0
    for call, share in batches.shared():
        count = len(call.args[0])
        own = (count * shape[0], *shape[1:]) if flat else (count, *shape)
        places, each = sampler.draw("layer", own, share)
        assert each == 1
        places[:, 0] += start * (shape[0] if flat else 1)
        found.append(places)
        start += count
    return torch.cat(found)


@pytest.mark.parametrize("rows", [50, 1000, 10**6])
@pytest.mark.parametrize("flat", [False, True])
def test_the_places_are_those_of_one_call(rows: int, flat: bool) -> None:
    x = torch.zeros(90, 2)
    shape = (90 * 5, 7) if flat else (90, 5, 7)
    expected = sample_places("layer", shape, rows, 3)
    for sizes in ([90], [1] * 90, [40, 50], [3, 80, 7]):
        batches = Batches.of(*(Inputs((part,)) for part in x.split(sizes)))
        assert torch.equal(draw(batches, (5, 7), rows, flat=flat), expected)


def test_of_masked_sequences_each_batch_gives_its_part_and_says_what_a_row_stands_for() -> None:
    lengths = [[3, 9, 9], [2, 1], [9] * 5]
    calls = []
    for some in lengths:
        table = (torch.arange(9) < torch.tensor(some)[:, None]).double()
        calls.append(Inputs((torch.zeros(len(some), 9, dtype=torch.long),), weights=RowWeights((table,))))
    sampler, rows, stands = ShareSampler(40, 0), 0, 0.0
    for call, share in Batches.of(*calls).shared():
        assert call.weights is not None
        counts = call.weights.tables[0]
        places, each = sampler.draw("layer", tuple(counts.shape), share, counts)
        assert bool((counts[tuple(places.T)] > 0).all())
        assert each * len(places) == pytest.approx(float(counts.sum()))
        rows, stands = rows + len(places), stands + each * len(places)
    assert rows == 40
    assert stands == pytest.approx(sum(map(sum, lengths)))
