"""Networks that read whole numbers: which of them pick rows of an embedding, and what is put in their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion.errors import ModelError
from intrafusion.network.inputs import Inputs
from intrafusion.restore.noise import Noise
from intrafusion.restore.tokens import draw_tokens, find_token_ranges


class Reader(nn.Module):
    """Words and their kinds, of which one table is shorter; a mask that is no token; one place is shifted by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.more, self.kinds = nn.Embedding(11, 8), nn.Embedding(7, 8), nn.Embedding(2, 8)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids.long()) + self.more(ids[:, :]) + self.kinds(kinds.t().contiguous()).transpose(0, 1)
        return self.last(self.first(x * mask[..., None]).relu())


IDS = torch.tensor([[0, 1, 2, 3, 4]])
KINDS, MASK = torch.zeros(1, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 1]])


def test_the_range_is_that_of_the_shortest_table_that_is_picked_from() -> None:
    assert find_token_ranges(Reader(), Inputs((IDS, KINDS, MASK))) == {0: 7, 1: 2}
    assert find_token_ranges(nn.Linear(3, 2), Inputs((torch.zeros(1, 3),))) == {}


def test_tokens_are_random_in_that_range_and_the_rest_is_repeated() -> None:
    call = draw_tokens(Inputs((IDS, KINDS), {"mask": MASK}), {0: 7, 1: 2}, most=50, seed=3)
    ids, kinds, mask = call.tensors()
    assert ids.shape == kinds.shape == mask.shape == (50, 5)
    assert sorted(ids.unique().tolist()) == list(range(7))
    assert sorted(kinds.unique().tolist()) == [0, 1]
    assert torch.equal(mask, MASK.expand(50, 5))
    again = draw_tokens(Inputs((IDS, KINDS), {"mask": MASK}), {0: 7, 1: 2}, most=50, seed=3).tensors()
    assert all(torch.equal(a, b) for a, b in zip(again, call.tensors(), strict=True))


def test_long_sequences_are_few() -> None:
    call = draw_tokens(Inputs((torch.zeros(1, 2000, dtype=torch.long),)), {0: 7}, most=512, seed=0)
    assert call.tensors()[0].shape == (8, 2000)


@pytest.mark.parametrize("restore", ["auto", "noise"])
def test_a_network_of_tokens_is_calibrated_without_data_and_says_on_what(restore: str) -> None:
    model, inputs = Reader().eval(), (IDS, KINDS, MASK)
    small = intrafusion.compress(model, inputs, {"first": 0.5}, restore=restore)
    assert small.plan.sizes == {"first": 8}
    assert "mixed" in str(small)
    assert "on 512 sequences of random tokens" in str(small)
    plain = intrafusion.compress(model, inputs, {"first": 0.5}, reducer="select", restore=None)
    probe = Noise(seed=9).make(Inputs(inputs), model)
    with torch.no_grad():
        [wanted], [found], [pruned] = (probe.call(m) for m in (model, small.model, plain.model))
    assert float((found - wanted).norm()) < 0.5 * float((pruned - wanted).norm())


def test_whole_numbers_that_pick_nothing_are_no_tokens() -> None:
    class Counted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.float())

    with pytest.raises(ModelError, match="expected a network of one floating-point input"):
        intrafusion.compress(
            nn.Sequential(Counted(4, 8), nn.ReLU(), nn.Linear(8, 2)),
            torch.ones(2, 4, dtype=torch.long),
            restore="noise",
        )
