"""Names as they are shown."""

from __future__ import annotations

import itertools
import re

import pytest

from intrafusion.names import (
    advise_to_fold,
    find_twins,
    hide_numbers,
    name_some,
    plain_name,
    plain_text,
    star_layer,
    star_numbers,
)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("conv.parametrizations.weight.original1", "conv.weight"),
        ("a.0.parametrizations.weight.original", "a.0.weight"),
        ("conv.parametrizations.weight", "conv"),
        ("conv.parametrizations.weight.0", "conv"),
        ("conv.parametrizations.weight.0._u", "conv._u"),
        ("parametrizations.weight.original0", "weight"),
        ("parametrizations.weight", ""),
        ("layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ("my_parametrizations.weight", "my_parametrizations.weight"),
        ("", ""),
    ],
)
def test_parametrizations_are_left_out(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_names_in_sentences_are_plain() -> None:
    text = "a.parametrizations.weight.original1 goes through div in parametrizations.weight.0, and so on: b.conv."
    assert plain_text(text) == "a.weight goes through div in the network, and so on: b.conv."


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("a.0.parametrizations.weight.original", "a.0"),
        ("div in parametrizations.weight.0", "the network"),
        ("b.parametrizations.weight.original and c.parametrizations.weight.0, b.parametrizations.weight.0", "b, c"),
    ],
)
def test_advice_on_parametrizations_names_their_modules(text: str, modules: str) -> None:
    call = "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
    assert advise_to_fold(text) == f"; after training, {call} folds that in (module: {modules})"


def test_no_advice_without_a_parametrization() -> None:
    assert advise_to_fold("my_parametrizations.weight and conv.weight") == ""


def expand(name: str) -> set[str]:
    """Every name that braces stand for."""
    parts = re.split(r"\{([\d,-]+)\}", name)
    sets = [[part] if k % 2 == 0 else expand_set(part) for k, part in enumerate(parts)]
    return {"".join(chosen) for chosen in itertools.product(*sets)}


def expand_set(numbers: str) -> list[str]:
    ends = [part.split("-") for part in numbers.split(",")]
    return [str(k) for first, *last in ends for k in range(int(first), int(last[0] if last else first) + 1)]


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.0.c", "a.1.c", "a.2.c"], ["a.{0-2}.c"]),
        (["a.0.c", "a.2.c"], ["a.{0,2}.c"]),
        (["a.0.c", "a.1.c", "a.2.c", "a.5.c"], ["a.{0-2,5}.c"]),
        (["a9", "a10", "a11"], ["a{9-11}"]),
        ([f"b{k}.q#{h}" for k in range(3) for h in range(4)], ["b{0-2}.q#{0-3}"]),
        (["0#0", "0#1"], ["0#{0,1}"]),
        (["alone3"], ["alone3"]),
        (["0.conv", "1.conv"], ["{0,1}.conv"]),
    ],
)
def test_names_that_are_all_combinations_of_numbers_are_one(names: list[str], joined: list[str]) -> None:
    assert [twins.name for twins in find_twins(names)] == joined
    assert set.union(*map(expand, joined)) == set(names)


def test_what_is_no_combination_of_numbers_is_not_said_to_be_one() -> None:
    names = ["b1.l0", "b1.l1", "b1.l2", "b2.l0", "b2.l1", "b2.l7"]
    found = find_twins(names)
    assert set.union(*(expand(twins.name) for twins in found)) == set(names)
    assert sorted(place for twins in found for place in twins.places) == list(range(6))
    for twins in found:
        assert expand(twins.name) == {names[place] for place in twins.places}


@pytest.mark.parametrize("seed", range(20))
def test_no_name_is_lost_or_made_up(seed: int) -> None:
    import random

    draw = random.Random(seed)
    names = list({f"l{draw.randrange(3)}.{draw.randrange(4)}.c{draw.randrange(3)}": None for _ in range(15)})
    for twins in find_twins(names):
        assert expand(twins.name) == {names[place] for place in twins.places}
    assert sorted(place for twins in find_twins(names) for place in twins.places) == list(range(len(names)))


def test_bare_numbers_and_fractions_are_no_names() -> None:
    assert hide_numbers("0") == "0"
    assert hide_numbers("differs by 0.5 or 1e-05 on 12 of 30") == "differs by 0.5 or 1e-05 on 12 of 30"
    assert hide_numbers("bmm in a.0.attn") == hide_numbers("bmm in a.31.attn")
    assert hide_numbers("3 of a.0") != hide_numbers("4 of a.0")


def test_sentences_of_twins_have_stars_where_they_differ() -> None:
    assert star_numbers(["12 of a1.0.b in a1.c", "12 of a1.1.b in a1.c"]) == "12 of a1.*.b in a1.c"
    assert star_numbers(["the same"]) == "the same"


def test_a_layer_has_a_star_where_it_varies_with_its_twin() -> None:
    one_varies = (False, True, False)
    assert star_layer("layer1.0.conv2", "layer1.0.conv1", one_varies) == "layer1.*.conv2"
    assert star_layer("layer1.3.bn1", "layer1.2.conv1", one_varies) == "layer1.*.bn1"
    assert star_layer("layer2.0.conv1", "layer1.2.conv1", one_varies) == "layer2.0.conv1"  # the next stage
    assert star_layer("head", "layer1.2.conv1", one_varies) == "head"


def test_some_names_and_how_many_more() -> None:
    assert name_some(["a.0.c", "b", "a.1.c"]) == "a.{0,1}.c, b"
    assert name_some(["a", "b", "c", "d.0", "d.1"]) == "a, b, c and 2 more"
    assert name_some(["a", "b", "c", "d.0", "d.1"], counted=False) == "a, b, c and more"
    assert name_some([]) == ""
