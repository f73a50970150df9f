"""Tables as they are printed and as notebooks show them; groups that differ in their numbers only share a line."""

from __future__ import annotations

import html
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from intrafusion.names import (
    Twins,
    find_twins,
    hide_numbers,
    name_some,
    plain_name,
    plain_text,
    star_layer,
    star_numbers,
)

WIDTH = 100  # columns, where there is no terminal to ask
_MOST_LINES = 8  # of a sentence: what is longer stands in full in the JSON, and in the attributes of the object
_LEAST = 12  # columns to which a column may shrink
_GAP = "  "
_WHOLE = 24  # characters of a cell that a notebook does not break


# ---- a table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextTable:
    """Rows under a header, and sentences below.

    Attributes:
        rows: as many cells as the header has; a cell may have several lines.
        below: sentences, one a line.
        numbers: columns are put to the right, as numbers are, and never broken.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    below: tuple[str, ...] = ()
    numbers: bool = False

    def __str__(self) -> str:
        return "\n".join(self.list_lines(find_width()))

    def list_lines(self, width: int = WIDTH) -> list[str]:
        """The lines of the text, the first two of them the header, none longer than `width` where that can be."""
        table = [self.header, *self.rows]
        natural = [max(len(line) for row in table for line in row[c].split("\n")) for c in range(len(self.header))]
        widths = natural if self.numbers else _fit_widths(natural, width - len(_GAP) * (len(natural) - 1))
        first, *rest = (self._lay_out(row, widths) for row in table)
        body = [line for lines in rest for line in lines]
        rule = "-" * max(map(len, [*first, *body]))
        return [*first, rule, *body, *(part for line in self.below for part in wrap_text(line, width))]

    def _lay_out(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        cells = [
            [part for line in cell.split("\n") for part in wrap_text(line, width)]
            for cell, width in zip(row, widths, strict=True)
        ]
        put = str.rjust if self.numbers else str.ljust
        return [
            _GAP.join(put(cell[k] if k < len(cell) else "", w) for cell, w in zip(cells, widths, strict=True)).rstrip()
            for k in range(max(map(len, cells)))
        ]

    def to_html(self) -> str:
        """For notebooks: colours are those of the page, so it is as readable on a dark one."""
        side = "right" if self.numbers else "left"
        style = f"text-align: {side}; vertical-align: top; padding: 0.2em 0.8em; color: inherit; background: none"
        whole = lambda text: "; white-space: nowrap" if len(text) <= _WHOLE else ""  # noqa: E731
        cell = lambda tag, text: f'<{tag} style="{style}{whole(text)}">{_escape(text)}</{tag}>'  # noqa: E731
        line = lambda tag, row: f"<tr>{''.join(cell(tag, text) for text in row)}</tr>"  # noqa: E731
        head, body = line("th", self.header), "".join(line("td", row) for row in self.rows)
        return (
            f'<table style="border-collapse: collapse"><thead>{head}</thead><tbody>{body}</tbody></table>'
            + show_lines(self.below)
        )


def lay_out_figures(figures: Sequence[tuple[str, str]], said: Iterable[str] = ()) -> list[str]:
    """Figures below each other, each behind its name, and sentences; none wider than the screen."""
    label = max((len(name) for name, _ in figures), default=0) + 2
    lines = [line for name, text in figures for line in _wrap(name.ljust(label) + text, " " * label)]
    return [*lines, *(line for sentence in said for line in _wrap(sentence, "  "))]


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, find_width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def show_lines(lines: Iterable[str]) -> str:
    """Sentences as HTML, one a line."""
    shown = "<br>".join(map(_escape, lines))
    return f'<p style="margin: 0.5em 0">{shown}</p>' if shown else ""


def _escape(text: str) -> str:
    """As HTML; long names may be broken behind their dots."""
    return html.escape(text).replace("\n", "<br>").replace(".", ".<wbr>")


def find_width() -> int:
    """Columns of the terminal that standard output is, or that COLUMNS says; else 100."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    try:
        return (os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0) or WIDTH
    except (AttributeError, OSError, ValueError):  # no file at all, as in a window without a console
        return WIDTH


def _fit_widths(natural: Sequence[int], room: int) -> list[int]:
    """The widest columns share what the others leave, equally."""
    level = max(natural, default=0)
    while sum(min(n, level) for n in natural) > room and level > _LEAST:
        level -= 1
    widths = [min(n, level) for n in natural]
    for column, n in enumerate(natural):  # what rounding left
        widths[column] += min(n - widths[column], max(0, room - sum(widths)))
    return widths


def wrap_text(text: str, width: int = WIDTH, most: int = _MOST_LINES) -> list[str]:
    """Lines of at most this width, broken at spaces, else behind the dots and underscores of names, else anywhere."""
    lines = [""]
    for word in re.findall(r"\s*\S+", text):
        if len(lines[-1] + word) > width and lines[-1]:
            lines, word = [*lines, ""], word.lstrip()
        for piece in _break_word(word, width):
            lines = lines if len(lines[-1] + piece) <= width else [*lines, ""]
            lines[-1] += piece
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][: width - 3].rstrip()}..."]


def _break_word(word: str, width: int) -> list[str]:
    """The word, or if it is too long for a line, pieces that are not."""
    pieces = [word] if len(word) <= width else re.findall(r"[^._]*[._]|[^._]+$", word)
    return [piece[k : k + width] for piece in pieces for k in range(0, len(piece), width)]


# ---- groups ---------------------------------------------------------------------------------------------------------

MEANINGS = {
    "mixed": "new channels may combine old ones",
    "selected": "each new channel is an old one",
    "rotated": "the best directions are kept instead of channels",
    "factorised": "the layer becomes two thinner ones, of that rank together",
    "kept": "the group is left alone",
}
"""What the words in the third column of a table of groups mean."""


@dataclass(frozen=True)
class GroupLine:
    """One channel group, or several that are alike, as one line of a table.

    Attributes:
        channels: how many, and how many are left.
        how: one of `MEANINGS`, or what a table of another kind tells there.
        layers: that the channels run through.
        why: the channels are kept, or must not be mixed.
        count: of the groups.
    """

    name: str
    channels: str
    how: str
    layers: tuple[str, ...] = ()
    why: str = ""
    count: int = 1

    def cells(self) -> tuple[str, str, str, str]:
        name = self.name if self.count == 1 else f"{self.name} (x{self.count})"
        others = name_some([layer for layer in self.layers if layer != self.name], counted=self.count == 1)
        return name, self.channels, self.how, "\n".join(filter(None, (others, self.why)))


def tabulate_groups(header: Sequence[str], groups: Iterable[GroupLine], below: Iterable[str] = ()) -> TextTable:
    """A line for each group; groups that are alike, and whose names differ only in numbers, share one.

    Below stands first what the words in it mean.
    """
    lines = join_twins(map(_name_line_plainly, groups))
    legend = explain_words(line.how for line in lines)
    sentences = [sentence for sentence in (legend, *below) if sentence]
    rows = tuple(line.cells() for line in lines)
    return TextTable(tuple(header), rows, tuple(map(plain_text, ["", *sentences] if sentences else [])))


def explain_words(used: Iterable[str]) -> str:
    """What those words mean that are used; nothing where none needs it."""
    found = set(used)
    return "; ".join(f"{word}: {meaning}" for word, meaning in MEANINGS.items() if word in found)


def _name_line_plainly(line: GroupLine) -> GroupLine:
    layers = tuple(dict.fromkeys(map(plain_name, line.layers)))
    return replace(line, name=plain_name(line.name), layers=layers, why=plain_text(line.why))


def join_twins(lines: Iterable[GroupLine]) -> list[GroupLine]:
    """Lines in their order, those of twins on the place of the first."""
    lines, alike = list(lines), dict[object, list[int]]()
    for index, line in enumerate(lines):
        key = hide_numbers(line.name), line.channels, line.how, hide_numbers(line.why)
        alike.setdefault(key, []).append(index)
    joined: dict[int, GroupLine] = {}
    for places in alike.values():
        for twins in find_twins([lines[place].name for place in places]):
            own = [places[k] for k in twins.places]
            joined[own[0]] = _join_lines([lines[k] for k in own], twins)
    return [joined[place] for place in sorted(joined)]


def _join_lines(lines: Sequence[GroupLine], twins: Twins) -> GroupLine:
    layers = [
        star_layer(layer, line.name, twins.varies) for line in lines for layer in line.layers if layer != line.name
    ]
    why = star_numbers([line.why for line in lines])
    return replace(lines[0], name=twins.name, layers=tuple(dict.fromkeys(layers)), why=why, count=len(lines))
