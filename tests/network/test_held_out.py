"""Which images are kept apart: evenly spread, never seen again, and only where rows are answered one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from intrafusion.network.held_out import Split, held_out_places, hold_out, take_first
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs

A = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
MODEL = nn.Linear(3, 2).eval()


def rows(found: Split) -> tuple[list[list[float]], list[list[float]]]:
    """The images that are seen, and those that are measured on."""
    assert isinstance(found.seen, Batches)
    assert found.measured is not None
    return torch.cat([c.tensors()[0] for c in found.seen]).tolist(), found.measured.join().tensors()[0].tolist()


class Shuffled:
    """Batches in another order each time that they are read, as of a loader that shuffles."""

    def __init__(self, size: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Inputs]:
        yield from (Inputs((part,)) for part in A[torch.randperm(60, generator=self.generator)].split(self.size))


@pytest.mark.parametrize("size", [1, 7, 60])
def test_each_image_is_on_one_side_also_where_a_loader_shuffles(size: int) -> None:
    seen, held = rows(hold_out(Shuffled(size), MODEL))
    assert (len(seen), len(held)) == (48, 12)
    assert sorted(seen + held) == sorted(A.tolist())


def test_images_sorted_by_class_are_held_out_of_each_class() -> None:
    places = held_out_places(200)
    assert (places // 20).bincount().tolist() == [4] * 10
    assert len(held_out_places(10_000)) == 64
    assert held_out_places(10_000).diff().unique().tolist() == [156, 157]


def test_labels_go_with_their_images_and_what_is_not_one_per_image_stays() -> None:
    mask = torch.ones(1, 3)
    found = hold_out([Inputs((A,), {"mask": mask}, labels=torch.arange(60))], Masked())
    assert isinstance(found.seen, Batches)
    (call,) = found.seen
    assert call.kwargs == {"mask": mask}
    assert call.labels is not None
    assert torch.equal(A[call.labels], call.args[0])
    assert found.measured is not None
    assert found.measured.first.kwargs == {"mask": mask}


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


class Centred(nn.Module):
    """Its answer to an image depends on the others in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class FixedNodes(nn.Module):
    """A graph of 60 nodes: it runs on no part of them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.eye(60) @ x


class Recurrent(nn.Module):
    """The first dimension is time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.RNN(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[0]


@pytest.mark.parametrize("model", [Centred(), FixedNodes(), Recurrent()], ids=lambda m: type(m).__name__)
def test_none_are_held_out_where_rows_are_not_answered_one_by_one(model: nn.Module) -> None:
    found = hold_out([Inputs((A,))], model.eval())
    assert found.measured is None
    assert not found.unseen
    assert isinstance(found.seen, Batches)
    assert torch.equal(found.seen[0].args[0], A)


def test_few_images_are_all_seen() -> None:
    assert hold_out([Inputs((A[:49],))], MODEL).measured is None
    assert hold_out([Inputs((A[:50],))], MODEL).unseen


def test_of_a_stream_the_first_batch_is_measured_on() -> None:
    found = take_first([Inputs((A[:50],)), Inputs((A[50:],))], unseen=False)
    assert found.measured is not None
    assert torch.equal(found.measured.first.args[0], A[:50])
    assert not found.unseen
