"""Texts as a network takes them: sentences through the tokenizer that goes with it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import ModelError, show

Tokenizer = Callable[..., Any]
"""Makes a dict of tensors of texts, as the tokenizers of transformers do."""

_DEEPEST = 3  # lists that a text lies in: of batches, of a batch and its labels, of texts
_WORDS = (8, 24)  # in a sentence


def is_text(value: Any) -> bool:
    """Whether something is a text, a batch of them, perhaps with labels behind, or a list of such batches."""
    for _ in range(_DEEPEST):
        value = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(value, str)


def list_texts(given: Iterable[Any]) -> list[str]:
    """All texts of batches, or of none, without what else is in them."""
    texts: list[str] = []
    for index, part in enumerate(given):
        part = part[0] if isinstance(part, (list, tuple)) and part and isinstance(part[0], (list, tuple)) else part
        for text in part if isinstance(part, (list, tuple)) else [part]:
            if not isinstance(text, str):
                raise ModelError(f"inputs: batch {index}: expected texts as in the others, got {show(text)}.")
            texts.append(text)
    return texts


def tokenize(texts: Sequence[str], tokenizer: Tokenizer | None, longest: int | None = None) -> dict[str, Tensor]:
    """One call of the network, padded to the longest text, with the mask that says so.

    Args:
        longest: tokens that the network has positions for; longer texts are cut there.
    Raises:
        ModelError: no tokenizer, a text in which nothing is, or a tokenizer that does not take them.
    """
    if tokenizer is None:
        raise ModelError(
            f"inputs: expected tensors, got texts such as {show(texts[0])}, and no tokenizer; pass tokenizer=..., or "
            "what tokenizer(texts, padding=True, truncation=True, return_tensors='pt') gives."
        )
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ModelError(
            f"inputs: expected texts with something in them, got {len(empty)} empty of {len(texts)}, the first at "
            f"{empty[0]}; leave them out."
        )
    most = min([n for n in (longest, getattr(tokenizer, "model_max_length", None)) if isinstance(n, int)], default=None)
    limit = {} if most is None or most > 10**6 else {"max_length": most}
    try:
        found = tokenizer(list(texts), padding=True, truncation=bool(limit), return_tensors="pt", **limit)
    except Exception as error:
        raise ModelError(
            f"inputs: the tokenizer ({type(tokenizer).__name__}) does not take these texts: {type(error).__name__}: "
            f"{error} Tokenize them first, or give it a pad_token where it has none."
        ) from error
    if not isinstance(found, Mapping) or not any(isinstance(t, Tensor) for t in found.values()):
        raise ModelError(f"inputs: expected a tokenizer that gives a dict of tensors, got {show(found)} from it.")
    return dict(found)


Shift = Callable[[Tensor], Tensor]
"""What a decoder reads, (n, 1 + length), of tokens (n, length): those behind the one that it starts with."""


def find_shift(model: nn.Module) -> Shift:
    """As the network itself does it for labels, or behind the `decoder_start_token_id` of its configuration.

    It raises a ModelError for a network that says neither.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    start, padding = (
        getattr(getattr(model, "config", None), name, None) for name in ("decoder_start_token_id", "pad_token_id")
    )

    def shift(tokens: Tensor) -> Tensor:
        if callable(own):
            more = tokens.new_full((len(tokens), 1), padding if isinstance(padding, int) else 0)  # is shifted out
            with contextlib.suppress(Exception):  # whatever it raises where the configuration is not complete
                found = own(labels=torch.cat([tokens, more], 1))
                if isinstance(found, Tensor) and found.shape == (len(tokens), 1 + tokens.shape[1]):
                    return found
        if not isinstance(start, int):
            raise ModelError(
                "inputs: texts for an encoder-decoder whose configuration has no decoder_start_token_id, so that it is "
                "not known what its decoder begins with; write it into config.json, or pass dicts with "
                "decoder_input_ids as inputs= in Python."
            )
        return torch.cat([tokens.new_full((len(tokens), 1), start), tokens], 1)

    return shift


def make_sentences(tokenizer: Tokenizer, count: int, seed: int) -> list[str] | None:
    """Sentences of words of the tokenizer's vocabulary, in no order that means anything; None where it shows none."""
    vocabulary = getattr(tokenizer, "get_vocab", dict)()
    plain = {word.lstrip("\u0120\u2581") for word in vocabulary if isinstance(word, str) and not word.startswith("##")}
    words = sorted(word for word in plain if word.isalpha() and len(word) > 2)
    if len(words) < _WORDS[0]:
        return None
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(*_WORDS))) for _ in range(count)]
