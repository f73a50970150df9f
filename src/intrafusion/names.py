"""Names of layers and tensors as they are shown: without parametrizations, and those of twins as one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

_PARAMETRISED = re.compile(r"(?:^|(?<=\s)|\.)parametrizations\.(\w+)(?:(\.original\d*)|\.\d+)?(?!\w)")
_COMPUTED = re.compile(r"(?:(\w+(?:\.\w+)*)\.)?(?<!\w)parametrizations\.(\w+)")
_WITH_NUMBERS = re.compile(
    r"[A-Za-z_]\w*(?:\.\w+)*"  # layer1.0.conv1
    r"|\d+(?:\.\w+)*\.[A-Za-z_]\w*(?:\.\w+)*"  # 0.conv, but no number on its own, such as 0.5
    r"|(?<=#)\d+"  # conv#0
)
_HOLE = "\0"  # where a number was


# ---- parametrizations -----------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """The name of a layer or tensor as if no parametrization, such as a weight norm, lay in between."""
    return _PARAMETRISED.sub(lambda found: f".{found[1]}" if found[2] else "", name).lstrip(".")


def plain_text(text: str) -> str:
    """A sentence with such names."""
    return _PARAMETRISED.sub(_name_plainly, text)


def advise_to_fold(text: str) -> str:
    """What to do about the parametrizations, such as a spectral norm, that a text names; empty where there are none.

    >>> advise_to_fold("div in fc.parametrizations.weight.0")
    "; after training, torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') folds that in (module: fc)"
    """
    found = list(dict.fromkeys(_COMPUTED.findall(text)))
    if not found:
        return ""
    modules = name_some([module or "the network" for module, _ in found])
    call = f"torch.nn.utils.parametrize.remove_parametrizations(module, {found[0][1]!r})"
    return f"; after training, {call} folds that in (module: {modules})"


def _name_plainly(found: re.Match[str]) -> str:
    inside = "." if found[0].startswith(".") else ""
    return f"{inside}{found[1]}" if found[2] else "" if inside else "the network"


# ---- twins ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twins:
    """Names that differ only in numbers, and that are all combinations of these.

    Attributes:
        name: all of them as one, such as "layer1.{0-3}.conv1".
        places: of each in the sequence that they were found in.
        varies: for each number of the name, whether it tells them apart.
    """

    name: str
    places: tuple[int, ...]
    varies: tuple[bool, ...]


def find_twins(names: Sequence[str]) -> list[Twins]:
    """The fewest such sets that all of these names fall into, or nearly; they are equal after `hide_numbers`."""
    boxes = [(tuple(frozenset([n]) for n in _read_numbers(name)), (place,)) for place, name in enumerate(names)]
    for dim in reversed(range(len(boxes[0][0]))):
        joined: dict[object, list[_Box]] = {}
        for box in boxes:
            joined.setdefault((box[0][:dim], box[0][dim + 1 :]), []).append(box)
        boxes = [_unite_boxes(same, dim) for same in joined.values()]
    hidden = hide_numbers(names[0])
    return [
        Twins(_fill(hidden, [_show_numbers(n) for n in numbers]), places, tuple(len(n) > 1 for n in numbers))
        for numbers, places in sorted(boxes, key=lambda box: min(box[1]))
    ]


_Box = tuple[tuple[frozenset[str], ...], tuple[int, ...]]


def _unite_boxes(boxes: Sequence[_Box], dim: int) -> _Box:
    numbers = boxes[0][0]
    joined = frozenset[str]().union(*(box[0][dim] for box in boxes))
    return (*numbers[:dim], joined, *numbers[dim + 1 :]), tuple(sorted(place for box in boxes for place in box[1]))


def _show_numbers(numbers: frozenset[str]) -> str:
    """As "{0-3,7}"; one number stands alone."""
    if len(numbers) == 1:
        return next(iter(numbers))
    found = sorted(numbers, key=lambda number: (int(number), number))
    runs = groupby(
        enumerate(found), key=lambda item: int(item[1]) - item[0] if item[1] == str(int(item[1])) else item[1]
    )
    ranges = [[number for _, number in run] for _, run in runs]
    return "{" + ",".join(r[0] if len(r) == 1 else f"{r[0]}{'-' if len(r) > 2 else ','}{r[-1]}" for r in ranges) + "}"


def name_some(names: Sequence[str], shown: int = 3, *, counted: bool = True) -> str:
    """The first of these names, those of twins as one, and how many more there are."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(hide_numbers(name), []).append(name)
    joined = [twins for same in alike.values() for twins in find_twins(same)]
    left = sum(len(twins.places) for twins in joined[shown:])
    more = "" if not left else f" and {left} more" if counted else " and more"
    return ", ".join(twins.name for twins in joined[:shown]) + more


def hide_numbers(text: str) -> str:
    """Equal for names, and for sentences with names, that differ only in the numbers of layers."""
    return _WITH_NUMBERS.sub(lambda found: re.sub(r"\d+", _HOLE, found[0]), text)


def star_numbers(texts: Sequence[str]) -> str:
    """Sentences that are equal after `hide_numbers` as one, with * for the numbers in which they differ."""
    columns = zip(*map(_read_numbers, texts), strict=True)
    return _fill(hide_numbers(texts[0]), [c[0] if len(set(c)) == 1 else "*" for c in columns])


def star_layer(layer: str, twin: str, varies: Sequence[bool]) -> str:
    """The name of a layer, with * for each number that tells a twin from the others and that it has in common with it.

    Args:
        twin: the name of one of them.
        varies: see `Twins`.
    """
    numbers, own = _read_numbers(layer), _read_numbers(twin)
    texts, own_texts = (hide_numbers(name).split(_HOLE) for name in (layer, twin))
    for k in range(min(len(numbers), len(own))):
        if texts[k] != own_texts[k] or not (varies[k] or numbers[k] == own[k]):
            break
        numbers[k] = "*" if varies[k] else numbers[k]
    return _fill(_HOLE.join(texts), numbers)


def _read_numbers(text: str) -> list[str]:
    return [number for name in _WITH_NUMBERS.findall(text) for number in re.findall(r"\d+", name)]


def _fill(hidden: str, numbers: Sequence[str]) -> str:
    first, *rest = hidden.split(_HOLE)
    return first + "".join(number + text for number, text in zip(numbers, rest, strict=True))
