"""Texts as inputs: through the tokenizer, and what is no text, no token and too long, told before an index fails."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import ArgumentError, IntrafusionWarning, ModelError
from intrafusion.network.batches import join_batches, read_batches
from intrafusion.network.calibration_images import as_calls
from intrafusion.network.inputs import Inputs
from intrafusion.network.texts import make_sentences, tokenize
from intrafusion.network.token_limits import find_token_limits

WORDS = ["the", "cat", "dog", "house", "river", "stone", "green", "walks", "sleeps", "over"]


class Tokenizer:
    """Words by their number; 0 is padding."""

    model_max_length = 10**30

    def get_vocab(self) -> dict[str, int]:
        return {word: i + 1 for i, word in enumerate(WORDS)} | {"##ing": 11, "\u2581and": 12}

    def __call__(self, texts: list[str], *, padding: bool, truncation: bool, return_tensors: str, **limit: int) -> Any:
        known = self.get_vocab()
        rows = [[known.get(word, known.get("\u2581" + word, 1)) for word in text.split()] for text in texts]
        rows = [row[: limit.get("max_length")] for row in rows]
        length = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        }


class Encoder(nn.Module):
    def __init__(self, positions: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(13, 8), nn.Embedding(positions, 8)
        self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        return self.last(self.first(x).relu())


EXAMPLE = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
TEXTS = ["the cat sleeps", "green house over the river stone", "dog walks"] * 20


def test_texts_are_inputs_where_there_is_a_tokenizer() -> None:
    model, keep = Encoder().eval(), {"first": 0.5}
    small = intrafusion.compress(model, EXAMPLE, keep, inputs=TEXTS, tokenizer=Tokenizer())
    given = Tokenizer()(TEXTS, padding=True, truncation=True, return_tensors="pt")
    same = intrafusion.compress(model, EXAMPLE, keep, inputs=given)
    for a, b in zip(small.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert small.images is not None
    assert small.images.first.weights is not None
    assert "48 sequences" in str(small)
    batches = [(TEXTS[:30], torch.zeros(30)), (TEXTS[30:], torch.zeros(30))]
    batched = intrafusion.compress(model, EXAMPLE, keep, inputs=batches, tokenizer=Tokenizer())
    assert all(torch.equal(a, b) for a, b in zip(batched.model.parameters(), same.model.parameters(), strict=True))


def test_without_data_and_with_a_tokenizer_sentences_are_made_of_its_words() -> None:
    small = intrafusion.compress(Encoder().eval(), EXAMPLE, {"first": 0.5}, tokenizer=Tokenizer())
    assert "256 sentences of dictionary words" in " ".join(str(small).split())
    sentences = make_sentences(Tokenizer(), 5, seed=0)
    assert sentences is not None
    assert {word for text in sentences for word in text.split()} <= {*WORDS, "and"}
    assert sentences == make_sentences(Tokenizer(), 5, seed=0) != make_sentences(Tokenizer(), 5, seed=1)


def test_longer_texts_are_cut_where_the_positions_end() -> None:
    text = " ".join(WORDS * 3)
    assert tokenize([text], Tokenizer(), 16)["input_ids"].shape == (1, 16)
    calls = as_calls([text], Encoder(), Inputs.of(EXAMPLE), Tokenizer())
    assert calls is not None
    assert next(iter(calls)).tensors()[0].shape == (1, 16)


BAD: dict[str, tuple[Any, str]] = {
    "empty": (
        ["the cat", " "],
        "inputs: expected texts with something in them, got 1 empty of 2, the first at 1; leave",
    ),
    "none": ([], "images: expected at least one batch, got none"),
    "mixed": (["the cat", 3], "inputs: batch 1: expected texts as in the others, got 3"),
    "lists": ([{"input_ids": [[1, 2], [3]]}], "batch 0 of images: expected tensors in a dict, got lists in input_ids"),
    "ids": (
        {"input_ids": torch.full((3, 4), 13)},
        r"images: input_ids: expected token numbers from 0 to 12, for which words has rows, got 13; tokenize with",
    ),
    "negative": ({"input_ids": torch.full((3, 4), -1)}, "from 0 to 12, for which words has rows, got -1"),
    "long": (
        {"input_ids": torch.ones(3, 17, dtype=torch.long)},
        "images: input_ids: expected sequences of at most 16 tokens, for which places has positions, got 17; cut them",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_network_cannot_take_is_told_before_it_runs(case: str) -> None:
    given, message = BAD[case]
    like = {"input_ids": EXAMPLE["input_ids"]}
    with pytest.raises((ModelError, TypeError), match=message):
        intrafusion.compress(Encoder().eval(), like, 0.5, inputs=given, tokenizer=Tokenizer())


def test_texts_without_a_tokenizer() -> None:
    message = r"inputs: expected tensors, got texts such as 'the cat sleeps', and no tokenizer; pass tokenizer="
    with pytest.raises(ModelError, match=message):
        intrafusion.compress(Encoder().eval(), EXAMPLE, 0.5, inputs=TEXTS)


def test_a_tokenizer_that_fails_or_gives_no_tensors() -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ValueError("no padding token")

    with pytest.raises(ModelError, match="does not take these texts: ValueError: no padding token .* pad_token"):
        tokenize(["a"], failing)
    with pytest.raises(ModelError, match="expected a tokenizer that gives a dict of tensors"):
        tokenize(["a"], lambda *_, **__: [1, 2])


def test_sequences_of_unequal_lengths_say_how_to_pad() -> None:
    parts = [{"input_ids": torch.ones(2, n, dtype=torch.long)} for n in (3, 5)]
    with pytest.raises(ModelError, match=re.escape("padding='max_length'")):
        join_batches(read_batches(parts))


def test_limits_are_read_off_the_embeddings() -> None:
    limits = find_token_limits(Encoder(), Inputs.of(EXAMPLE))
    assert limits.tokens == {"input_ids": ("words", 13)}
    assert (limits.positions, limits.longest) == ((("places", 16, 0),), 16)
    assert find_token_limits(nn.Linear(3, 2), Inputs((torch.zeros(1, 3),))).longest is None


class Places(nn.Embedding):
    """Called on tokens, of which it takes the number only, as the decoders of BART and Whisper have it."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.arange(ids.shape[1]) + 2)


def test_positions_that_are_called_on_tokens_hold_no_tokens() -> None:
    class Decoder(Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.last(self.first(self.words(input_ids) + self.places(input_ids)).relu())

    model = Decoder().eval()
    model.places = Places(9, 8)
    limits = find_token_limits(model, Inputs.of(EXAMPLE))
    assert limits.tokens == {"input_ids": ("words", 13)}
    assert (limits.positions, limits.longest) == ((("places", 9, 2),), 7)
    ids = torch.full((40, 5), 12)
    assert intrafusion.compress(model, {"input_ids": ids[:2]}, 0.5, inputs={"input_ids": ids}).plan.sizes


class Turned(nn.Module):
    """Without embeddings of positions, as where keys are turned by them; a configuration says how many there are."""

    def __init__(self, known: Any = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.first, self.second = nn.Embedding(13, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.config = SimpleNamespace(max_position_embeddings=known)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(self.first(self.words(input_ids)).relu())


def test_positions_that_only_a_configuration_counts() -> None:
    ids = EXAMPLE["input_ids"]
    calls = as_calls([" ".join(WORDS * 3)], Turned(), Inputs.of({"input_ids": ids[:, :5]}), Tokenizer())
    assert calls is not None
    assert next(iter(calls)).tensors()[0].shape == (1, 8)
    assert not calls.notes.get("long")
    long = torch.randint(13, (40, 9), generator=torch.Generator().manual_seed(0))
    message = r"images: sequences of 9 tokens, where the configuration of the network says at most 8"
    with pytest.warns(IntrafusionWarning, match=message):
        small = intrafusion.compress(Turned().eval(), {"input_ids": long[:2, :5]}, 0.5, inputs={"input_ids": long})
    assert any("at most 8 (max_position_embeddings)" in note for note in small.notes)
    for known in (9, None, -1, "8"):
        calls = as_calls({"input_ids": long}, Turned(known), Inputs.of({"input_ids": long[:2, :5]}))
        assert calls is not None
        assert list(calls)
        assert not calls.notes


def test_images_is_another_name_of_inputs() -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    one, other = (intrafusion.compress(model, x[:2], 0.5, **{name: x}) for name in ("inputs", "images"))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    graph = intrafusion.inspect(model, x[:2])
    recipe = intrafusion.Recipe.of(keep=0.5, importance="taylor", reducer="select")
    doors = [
        lambda: intrafusion.compress(model, x[:2], 0.5, inputs=x, images=x),
        lambda: intrafusion.compress_in_steps(model, x[:2], 0.5, 2, inputs=x, images=x),
        lambda: intrafusion.fuse([model, model], x[:2], inputs=x, images=x),
        lambda: intrafusion.decide(model, graph, recipe, inputs=x, images=x),
    ]
    for door in doors:
        with pytest.raises(ArgumentError, match="expected inputs= or images=, which are two names .* got both; leave"):
            door()
    plans = [intrafusion.decide(model, graph, recipe, **{name: x}) for name in ("inputs", "images")]
    assert plans[0] == plans[1]
    steps = intrafusion.compress_in_steps(model, x[:2], 0.5, 2, inputs=x)
    assert "images" in str(steps)
    assert intrafusion.fuse([model, model], x[:2], using="activations", inputs=x).plan is not None
