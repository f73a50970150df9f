"""Places over all batches: those of one call where that can be, never too many, each of the right image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import sample_places
from intrafusion.network.row_weights import RowWeights
from intrafusion.restore.places import PlaceSampler, find_images


def batches(sizes: list[int], length: int = 6) -> list[Inputs]:
    return [Inputs((torch.zeros(n, length),)) for n in sizes]


def weighted(tables: list[Tensor]) -> list[Inputs]:
    return [Inputs((torch.zeros(t.shape),), weights=RowWeights((t,))) for t in tables]


def gather(sampler: PlaceSampler, shapes: list[tuple[int, ...]], counts: list[Tensor] | None = None) -> list[Tensor]:
    """Places of each batch that are kept, with images counted from the first batch on."""
    found = []
    for batch, shape in enumerate(shapes):
        places = sampler.choose("layer", batch, shape, None if counts is None else counts[batch])
        assert places is not None
        places[:, 0] += sum(s[0] for s in shapes[:batch])
        found.append(places)
    kept = sampler.list_kept("layer")
    return found if kept is None else [places[mask] for places, mask in zip(found, kept, strict=True)]


@pytest.mark.parametrize("limit", [50, 10**6], ids=["sampled", "all"])
@pytest.mark.parametrize("sizes", [[16, 16, 8], [40], [1] * 40, [20, 20]])
def test_places_are_those_of_one_call_however_it_is_cut(sizes: list[int], limit: int) -> None:
    whole = sample_places("layer", (40, 5, 7), limit, 3)
    found = gather(PlaceSampler(batches(sizes), limit, 3), [(n, 5, 7) for n in sizes])
    assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("limit", [60, 10**6], ids=["sampled", "all"])
def test_of_rows_that_count_differently_as_many_wherever_it_is_cut(limit: int) -> None:
    table = (torch.rand(40, 9, generator=torch.Generator().manual_seed(1)) < 0.6).double()
    found = []
    for sizes in ([16, 16, 8], [7] * 5 + [5]):
        tables = list(table.split(sizes))
        parts = gather(PlaceSampler(weighted(tables), limit, 0), [tuple(t.shape) for t in tables], tables)
        found.append(torch.cat(parts))
    assert torch.equal(*found)
    assert len(found[0]) == min(limit, int(table.sum()))
    assert bool((table[tuple(found[0].T)] > 0).all())
    if limit == 60:
        assert {int(i) // 10 for i in found[0][:, 0]} == {0, 1, 2, 3}  # of all images, not of the first only


def test_batches_of_other_lengths_have_their_share() -> None:
    calls = [Inputs((torch.zeros(8, length),)) for length in (5, 50, 20)]
    parts = gather(PlaceSampler(calls, 100, 0), [(8, 5), (8, 50), (8, 20)])
    assert sum(map(len, parts)) == 100
    assert len(parts[0]) < len(parts[2]) < len(parts[1])


def test_what_no_image_enters_is_seen_once_and_other_counts_are_refused() -> None:
    sampler = PlaceSampler(batches([4, 4, 2]), 1000, 0)
    table = [sampler.choose("table", batch, (4, 3)) for batch in range(3)]
    assert [None if p is None else len(p) for p in table] == [12, 12, 0]
    odd = [sampler.choose("odd", batch, (n, 3)) for batch, n in enumerate((4, 5, 2))]
    assert [None if p is None else len(p) for p in odd] == [12, None, 6]


def test_images_run_along_the_dimension_of_their_number() -> None:
    places = torch.tensor([[0, 3], [5, 0], [6, 1]])
    assert find_images(places, (8, 4), 8).tolist() == [0, 5, 6]  # type: ignore[union-attr]
    assert find_images(places, (9, 4), 4).tolist() == [3, 0, 1]  # type: ignore[union-attr]
    assert find_images(places, (8, 5), 4).tolist() == [0, 2, 3]  # type: ignore[union-attr]
    assert find_images(places, (9, 7), 4) is None
