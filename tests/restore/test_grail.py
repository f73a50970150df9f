"""GRAIL against the authors' formula, done by hand with NumPy, reader by reader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gallery.core import chain
from torch import Tensor, nn

import intrafusion
from intrafusion import Compressed, ModelError, RecipeError
from intrafusion.restore import Grail
from intrafusion.restore.grail import tell_channels


def made() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 8, 3), "n": nn.BatchNorm2d(8), "r": nn.ReLU(), "b": nn.Conv2d(8, 6, 3), "s": nn.ReLU()}
    tail = {"p": nn.AdaptiveAvgPool2d(2), "f": nn.Flatten(), "c": nn.Linear(24, 4)}
    return chain(**parts, **tail).eval(), torch.randn(40, 3, 9, 9) + 0.5


def pruned(model: nn.Module, x: Tensor, reducer: str = "select") -> Compressed:
    return intrafusion.compress(model, x[:2], 0.5, reducer=reducer, restore=None)


def by_hand(rows: np.ndarray, merge: np.ndarray, strength: float) -> np.ndarray:
    gram = rows.T @ rows / len(rows)
    inner = merge @ gram @ merge.T
    return gram @ merge.T @ np.linalg.inv(inner + strength * np.trace(inner) / len(inner) * np.eye(len(inner)))


def restore(small: Compressed, model: nn.Module, x: Tensor, strength: float = 1e-3) -> None:
    Grail(strength, batch=16)(small, model, intrafusion.inspect(model, x[:2]), x)


def test_every_reader_gets_a_ridge_of_its_own_on_what_it_reads_of_the_original() -> None:
    model, x = made()
    small = pruned(model, x)
    maps = small.plan.maps
    restore(small, model, x, 0.01)
    with torch.no_grad():
        h = model.r(model.n(model.a(x)))
        g = model.f(model.p(model.s(model.b(h)))).double().numpy()
    a, b = (maps[name].merge.numpy() for name in ("a", "b"))
    told = by_hand(h.movedim(1, -1).flatten(0, -2).double().numpy(), a, 0.01)
    kept = model.b.weight.detach().double().numpy()[b.argmax(1)]
    expected = np.einsum("ochw,ck->okhw", kept, told)
    np.testing.assert_allclose(small.model.b.weight.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(small.model.b.bias, model.b.bias[b.argmax(1)])
    wide = np.kron(b, np.eye(4))  # four places of every channel are read apart
    head = model.c.weight.detach().double().numpy() @ by_hand(g, wide, 0.01)
    np.testing.assert_allclose(small.model.c.weight.detach().numpy(), head, rtol=1e-4, atol=1e-5)


def test_folded_channels_are_told_from_their_means() -> None:
    model, x = made()
    small = pruned(model, x, "fold")
    plain = small.model.c.weight.clone()
    restore(small, model, x)
    with torch.no_grad():
        g = model.f(model.p(model.s(model.b(model.r(model.n(model.a(x))))))).double().numpy()
    merge = np.kron(small.plan.maps["b"].merge.numpy(), np.eye(4))
    head = model.c.weight.detach().double().numpy() @ by_hand(g, merge, 1e-3)
    np.testing.assert_allclose(small.model.c.weight.detach().numpy(), head, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, small.model.c.weight)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 12), nn.Linear(12, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.b(torch.tanh(3 * self.a(self.embed(input_ids))))


@pytest.mark.parametrize("filler", [0, 8])
def test_padded_tokens_do_not_count(filler: int) -> None:
    torch.manual_seed(0)
    model, ids = Tokens().eval(), torch.randint(0, 9, (60, 5))
    mask = (torch.arange(5) < torch.randint(2, 6, (60, 1))).long()
    texts = {"input_ids": ids.where(mask.bool(), filler), "attention_mask": mask}
    example = {name: tensor[:2] for name, tensor in texts.items()}
    small = intrafusion.compress(model, example, {"a": 0.5}, inputs=texts, reducer="select", restore="grail")
    with torch.no_grad():
        read = torch.tanh(3 * model.a(model.embed(ids)))[mask.bool()].double().numpy()
    head = model.b.weight.detach().double().numpy() @ by_hand(read, small.plan.maps["a"].merge.numpy(), 1e-3)
    np.testing.assert_allclose(small.model.b.weight.detach().numpy(), head, rtol=1e-4, atol=1e-5)


def test_nothing_lost_nothing_changed() -> None:
    gram = torch.tensor([[2.0, 0.0, 2.0], [0.0, 3.0, 0.0], [2.0, 0.0, 2.0]]).double()
    merge = torch.eye(3).double()[:2]
    assert tell_channels(gram, merge, 0.1) is None
    assert tell_channels(gram + torch.eye(3), merge, 0.1) is not None


@pytest.mark.parametrize(("reducer", "idle"), [("pivot", True), ("select", False)])
def test_it_is_said_where_nothing_was_changed(reducer: str, *, idle: bool) -> None:
    model, x = made()
    small = intrafusion.compress(model, x[:1], keep=0.5, reducer=reducer, restore="grail", inputs=x)
    bare = intrafusion.compress(model, x[:1], keep=0.5, reducer=reducer, restore=None, inputs=x)
    same = [torch.equal(a, b) for a, b in zip(small.model.parameters(), bare.model.parameters(), strict=True)]
    assert all(same) == idle
    assert ("it changed nothing" in (small.restored[0].note or "")) == idle


def test_errors() -> None:
    model, x = made()
    small = pruned(model, x)
    before = {name: t.clone() for name, t in small.model.state_dict().items()}
    with pytest.raises(ModelError, match="Grail needs images"):
        Grail()(small, model, intrafusion.inspect(model, x[:2]), None)
    with pytest.raises(ModelError, match="b: the original network gives NaN or infinity on these images"):
        Grail()(small, model, intrafusion.inspect(model, x[:2]), torch.full_like(x, float("inf")))
    assert all(torch.equal(t, before[name]) for name, t in small.model.state_dict().items())
    with pytest.raises(RecipeError, match="strength: expected a number > 0, got 0"):
        Grail(strength=0)
