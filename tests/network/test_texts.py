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


class Translator(Encoder):
    """An encoder-decoder; what its decoder begins with is said as those of transformers say it."""

    def __init__(self, start: int | None = 12, shift: Any = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(decoder_start_token_id=start)
        if shift is not None:
            self.prepare_decoder_input_ids_from_labels = shift

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        return super().forward(decoder_input_ids) + super().forward(input_ids).mean(1, keepdim=True)


BOTH = {**EXAMPLE, "decoder_input_ids": torch.ones(2, 4, dtype=torch.long)}


def read_texts(model: nn.Module, example: dict[str, Tensor], tokenizer: Any = None) -> tuple[Inputs, Any]:
    calls = as_calls(TEXTS[:3], model, Inputs.of(example), tokenizer or Tokenizer())
    assert calls is not None
    (call,) = calls
    return call, calls


def test_a_decoder_reads_the_texts_behind_its_start_and_that_is_said() -> None:
    call, calls = read_texts(Translator(), BOTH)
    given = call.kwargs or {}
    assert given["input_ids"].tolist() == [[1, 2, 9, 0, 0, 0], [7, 4, 10, 1, 5, 6], [3, 8, 0, 0, 0, 0]]
    assert given["decoder_input_ids"].tolist() == [
        [12, 1, 2, 9, 0, 0, 0], [12, 7, 4, 10, 1, 5, 6], [12, 3, 8, 0, 0, 0, 0],
    ]  # fmt: skip
    assert given["decoder_attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert call.weights is not None
    assert len(call.weights.tables) == 2
    assert "pass dicts with input_ids and decoder_input_ids in Python" in calls.notes["decoder"]
    with pytest.warns(IntrafusionWarning, match="the decoder reads the texts too"):
        small = intrafusion.compress(Translator().eval(), BOTH, {"first": 0.5}, inputs=TEXTS, tokenizer=Tokenizer())
    assert any("the decoder reads the texts too" in note for note in small.notes)
    made = intrafusion.compress(Translator().eval(), BOTH, {"first": 0.5}, tokenizer=Tokenizer())
    assert "256 sentences of dictionary words" in " ".join(str(made).split())


def test_a_network_that_shifts_labels_itself_does() -> None:
    given = read_texts(Translator(None, lambda labels: labels.roll(1, 1) + 1), BOTH)[0].kwargs or {}
    assert torch.equal(given["decoder_input_ids"][:, 1:], given["input_ids"] + 1)
    assert given["decoder_input_ids"][:, 0].tolist() == [1, 1, 1]


def test_texts_are_cut_so_that_the_decoder_has_a_place_for_its_start() -> None:
    model = Translator()
    model.places = nn.Embedding(6, 8)
    for texts, longest in ((TEXTS[:3], 5), ([TEXTS[0]], 3)):
        (call,) = as_calls(texts, model, Inputs.of(BOTH), Tokenizer()) or ()
        given = call.kwargs or {}
        assert (given["input_ids"].shape[1], given["decoder_input_ids"].shape[1]) == (longest, longest + 1)


def test_where_the_start_of_a_decoder_is_not_known_that_is_said() -> None:
    def fails(labels: Tensor) -> Tensor:
        raise ValueError("pad_token_id has to be defined")

    for model in (Translator(None), Translator(None, fails)):
        with pytest.raises(ModelError, match=r"no decoder_start_token_id.*write it into config\.json"):
            read_texts(model, BOTH)
    assert "decoder_input_ids" in (read_texts(Translator(12, fails), BOTH)[0].kwargs or {})


def test_what_a_decoder_reads_is_left_to_those_who_say_it() -> None:
    """Where the example does not show it, or the tokenizer gives it."""
    assert "decoder_input_ids" not in (read_texts(Translator(), EXAMPLE)[0].kwargs or {})

    class Pairs(Tokenizer):
        def __call__(self, texts: list[str], **options: Any) -> Any:
            found = super().__call__(texts, **options)
            return {**found, "decoder_input_ids": found["input_ids"] * 0 + 5}

    call, calls = read_texts(Translator(), BOTH, Pairs())
    assert (call.kwargs or {})["decoder_input_ids"].unique().tolist() == [5]
    assert "decoder" not in calls.notes


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
