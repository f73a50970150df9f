"""Texts that a language model samples itself: a chain whose probabilities are known is sampled as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import ModelError
from intrafusion.network.inputs import Inputs
from intrafusion.network.sources import import_transformers
from intrafusion.restore import Calibration
from intrafusion.restore.texts import find_sampler, sample_texts

TOKENS = 5


class Chain(nn.Module):
    """The next token depends on the last one alone, by a table of logits."""

    def __init__(self, positions: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.positions = nn.Embedding(TOKENS, TOKENS), positions
        self.table.weight.data *= 2
        self.first, self.last = nn.Linear(TOKENS, 16), nn.Linear(16, TOKENS)
        self.last.weight.data *= 0.01
        self.last.bias.data.zero_()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.positions is not None and ids.shape[1] != self.positions:
            raise ValueError("of one length")
        logits = self.table(ids)
        return logits + self.last(self.first(logits).relu())


class Sees(Chain):
    """Every logit depends on the last token."""

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(ids) + self.table(ids[:, -1:])


IDS = torch.zeros(2, 6, dtype=torch.long)


@pytest.mark.parametrize("positions", [None, 6])
def test_texts_have_the_probabilities_of_the_network(positions: int | None) -> None:
    model = Chain(positions).eval()
    sampler = find_sampler(model, Inputs((IDS,)))
    assert (sampler.length, sampler.grows) == ((128, True) if positions is None else (6, False))
    ids = sampler.sample(3000 if positions else 150, seed=0).args[0]
    assert ids.shape[1] == sampler.length
    counts = torch.zeros(TOKENS, TOKENS)
    for t in range(ids.shape[1] - 1):
        counts.index_put_((ids[:, t], ids[:, t + 1]), torch.ones(len(ids)), accumulate=True)
    found = counts / counts.sum(1, keepdim=True)
    with torch.no_grad():
        wanted = model.double()(torch.arange(TOKENS)[None].expand(2, -1).repeat(1, 2)[:, :6])[0, :TOKENS].softmax(1)
    assert float((found - wanted).abs().max()) < 0.04
    again, other = (sampler.sample(4, seed=s).args[0] for s in (7, 8))
    assert torch.equal(again, sampler.sample(4, seed=7).args[0])
    assert not torch.equal(again, other)


def test_the_mask_counts_all_of_a_sampled_text() -> None:
    call = find_sampler(Chain().eval(), Inputs((), {"ids": IDS, "attention_mask": IDS + 1})).sample(3, seed=0)
    assert call.kwargs is not None
    assert call.kwargs["attention_mask"].tolist() == [[1] * 128] * 3


def test_what_is_no_language_model_says_so() -> None:
    with pytest.raises(ModelError, match="later tokens change earlier logits"):
        find_sampler(Sees().eval(), Inputs((IDS,)))
    with pytest.raises(ModelError, match="no argument .* picks its tokens"):
        find_sampler(nn.Linear(3, 2), Inputs((torch.zeros(1, 3),)))
    encoder = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6))
    with pytest.raises(ModelError, match=r"no output holds logits \[2, 6, 7\] of tokens"):
        find_sampler(encoder, Inputs((IDS,)))
    with pytest.raises(ModelError, match="no output holds logits"):
        intrafusion.compress(encoder.eval(), IDS, 0.5, restore="synthetic")


def test_fewer_texts_where_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = find_sampler(Chain().eval(), Inputs((IDS,)))
    monkeypatch.setattr(type(sampler), "time_pass", lambda *_: 8.0)  # a second for each text, and pass
    seen, apart, why = sample_texts(sampler, 0, seconds=1.5 * 16 * 64.5)
    assert [len(call.args[0]) for call in (seen, apart)] == [16, 8]
    assert why == "64 texts would take about 6192 s here"
    with pytest.raises(ModelError, match="sampling 64 texts from the network is left out: it would take about 6192 s"):
        sample_texts(sampler, 0, seconds=1.0)


@pytest.mark.parametrize("example", [IDS, {"ids": IDS, "attention_mask": torch.ones_like(IDS)}])
def test_a_language_model_is_restored_on_its_own_text_and_says_so(example: Any) -> None:
    model = Chain().eval()
    small = intrafusion.compress(model, example, {"first": 0.5})
    said = " ".join(str(small).split())
    assert "LeastSquares on 64 texts sampled from the network itself" in said
    assert "on 32 texts sampled from the network itself, not used by the solver" in said
    [step] = small.restored
    assert step.unseen
    assert step.result is not None
    assert not step.result[1].is_worse_than(step.result[0])


def test_what_does_harm_on_sampled_texts_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those from before, and noise, which does no harm here, comes in its place."""
    solve = Calibration.restore

    def spoil(self: Calibration, small: Any, *rest: Any) -> Any:
        if self.level != "synthetic":
            return solve(self, small, *rest)
        with torch.no_grad():
            small.model.last.weight.mul_(-30)
        return rest[-1](small.model), rest[-1](small.model)

    monkeypatch.setattr(Calibration, "restore", spoil)
    model = Chain().eval()
    small = intrafusion.compress(model, IDS, {"first": 0.5})
    harmed, instead = small.restored
    assert harmed.undone
    assert harmed.result is not None
    assert instead.result is not None
    assert harmed.result[1] == harmed.result[0]
    assert instead.on == "512 sequences of random tokens"
    assert instead.measured_on == harmed.measured_on == "32 texts sampled from the network itself"
    assert instead.error_before == pytest.approx(harmed.error_before)
    assert not instead.result[1].is_worse_than(instead.result[0])


def test_networks_of_transformers_sample_with_their_cache() -> None:
    pytest.importorskip("transformers", exc_type=ImportError)
    t = import_transformers()
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=30, bos_token_id=1, eos_token_id=2, **small)).eval()
    sampler = find_sampler(model, Inputs((), {"input_ids": IDS}))
    assert sampler.is_fast
    found = sampler.sample(4, seed=0)
    assert found.kwargs is not None
    ids = found.kwargs["input_ids"]
    assert ids.shape == (4, 128)
    assert ids[:, 0].tolist() == [1] * 4
    assert torch.equal(ids, (sampler.sample(4, seed=0).kwargs or {})["input_ids"])
