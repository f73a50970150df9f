"""Draw docs/pictures/tracing.svg: labels in one residual block and in one attention head. Run it from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, CELL = 940, 470, 26
COLOURS = {
    "stream": "#8ecae6",
    "inner": "#ffd166",
    "pair": "#c8b6ff",
    "value": "#b7e4c7",
    "block": "#f4a6a6",
    "fixed": "#d9d9d9",
}


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", style: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {style}>{words}</text>'


def strip(x: float, y: float, labels: Sequence[object], colour: str, below: str = "") -> str:
    """An activation: one cell per channel, with its label."""
    parts = []
    for i, label in enumerate(labels):
        parts.append(
            f'<rect x="{x + i * CELL}" y="{y}" width="{CELL}" height="{CELL}" fill="{COLOURS[colour]}" stroke="#444"/>'
        )
        parts.append(text(x + (i + 0.5) * CELL, y + 18, str(label), 12))
    return "".join(parts) + text(x + len(labels) * CELL / 2, y + CELL + 15, below, 11, style='fill="#555"')


def layer(x: float, y: float, name: str, width: int = 84) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{CELL}" rx="6" fill="#fff" stroke="#444" stroke-width="1.5"/>'
        + text(x + width / 2, y + 18, name)
    )


def arrow(*points: tuple[float, float]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="#444" stroke-width="1.3" marker-end="url(#tip)"/>'


def residual() -> list[str]:
    return [
        text(20, 28, "A residual block: x + back(relu(inner(x)))", 15, "start", 'font-weight="bold"'),
        strip(20, 60, [1, 1, 1], "fixed", "image: fixed"),
        arrow((98, 73), (118, 73)),
        layer(118, 60, "stem"),
        arrow((202, 73), (222, 73)),
        strip(222, 60, [2, 3, 4, 5], "stream", "x: four new labels"),
        arrow((326, 73), (356, 73)),
        layer(356, 60, "inner"),
        arrow((440, 73), (460, 73)),
        strip(460, 60, range(6, 12), "inner", "relu moves no label"),
        arrow((616, 73), (646, 73)),
        layer(646, 60, "back"),
        arrow((730, 73), (750, 73)),
        strip(750, 60, range(12, 16), "stream", "four more"),
        arrow((341, 73), (341, 139), (560, 139)),
        arrow((802, 108), (802, 139), (592, 139)),
        '<circle cx="576" cy="139" r="14" fill="#fff" stroke="#444" stroke-width="1.5"/>',
        text(576, 145, "+", 18),
        text(700, 132, "2 = 12, 3 = 13, 4 = 14, 5 = 15", 12),
        arrow((576, 153), (576, 174)),
        strip(524, 174, [2, 3, 4, 5], "stream", "one group of four: stem, back, and all that read them"),
    ]


def head() -> list[str]:
    return [
        text(20, 262, "An attention head: softmax(query(x) key(x)') value(x)", 15, "start", 'font-weight="bold"'),
        strip(20, 338, range(2, 8), "stream", "x: the stream"),
        arrow((176, 351), (196, 351), (196, 301), (216, 301)),
        arrow((176, 351), (216, 351)),
        arrow((176, 351), (196, 351), (196, 421), (216, 421)),
        layer(216, 288, "query"),
        layer(216, 338, "key"),
        layer(216, 408, "value"),
        arrow((300, 301), (320, 301)),
        arrow((300, 351), (320, 351)),
        arrow((300, 421), (320, 421)),
        strip(320, 288, [8, 9, 10], "pair"),
        strip(320, 338, [11, 12, 13], "pair", "8 = 11, 9 = 12, 10 = 13"),
        strip(320, 408, [15, 16, 17, 18], "value"),
        arrow((398, 301), (430, 301), (430, 326), (452, 326)),
        arrow((398, 351), (430, 351), (430, 326), (452, 326)),
        layer(452, 313, "q k'", 60),
        arrow((512, 326), (532, 326)),
        strip(532, 313, [14], "block"),
        text(534, 302, "block {8, 9, 10}: every score sees all three", 11, "start", 'fill="#555"'),
        arrow((558, 326), (600, 326)),
        layer(600, 313, "softmax"),
        arrow((684, 326), (720, 326), (720, 408)),
        arrow((424, 421), (690, 421)),
        layer(690, 408, "scores v", 72),
        arrow((762, 421), (782, 421)),
        strip(782, 408, [15, 16, 17, 18], "value", "read by out"),
    ]


def draw() -> str:
    tip = (
        '<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"><path d="M0,0 L8,4 L0,8 z" '
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
            f'<defs>{tip}fill="#444"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            *residual(),
            *head(),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("tracing.svg").write_text(draw(), encoding="utf-8")
