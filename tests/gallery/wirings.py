"""Random wirings: any layers and operations in any order, to find what nobody thought of.

Activations are (batch, tokens, channels). Every operation reads earlier results and appends its own; two linear layers
at the end read some of them, so most channels take several ways to the output.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.core import Wired

Step = Callable[[Any, Tensor], Tensor]
Layers = dict[str, nn.Module | nn.Parameter | Tensor]

PLAIN: dict[str, Step] = {
    "relu": lambda net, x: x.relu(),
    "sin": lambda net, x: x.sin(),
    "sigmoid": lambda net, x: x.sigmoid(),
    "twice": lambda net, x: 2 * x,
    "minus": lambda net, x: -x,
    "flip": lambda net, x: x.flip(-1),
    "roll": lambda net, x: x.roll(1, -1),
    "repeat": lambda net, x: x.repeat(1, 1, 2),
    "interleave": lambda net, x: torch.stack([x, x.sin()], -1).flatten(-2),
    "unit": lambda net, x: F.normalize(x, dim=-1),
    "centre": lambda net, x: x - x.mean(-1, keepdim=True),
    "softmax": lambda net, x: x.softmax(-1),
    "powers": lambda net, x: torch.stack([x, -x, x * x]).mean(0),
    "even": lambda net, x: x[..., ::2],
    "tail": lambda net, x: x[..., 1:],
    "first token": lambda net, x: torch.cat([x[:, :1], x[:, 1:].tanh()], 1),
    "shift one": lambda net, x: torch.cat([x[..., :1].roll(1, 1), x[..., 1:]], -1),
    "shift half": lambda net, x: torch.cat([x[..., : x.shape[-1] // 2].roll(1, 1), x[..., x.shape[-1] // 2 :]], -1),
    "write": lambda net, x: written(x),
    "attend": lambda net, x: (x @ x.mT).softmax(-1) @ x,
    "constant": lambda net, x: x * (1 + torch.arange(x.shape[-1], dtype=x.dtype) % 2),
    "excite": lambda net, x: x * x.mean(1, keepdim=True).sigmoid(),
}
HALVED: dict[str, Step] = {
    "left": lambda net, x: x.chunk(2, -1)[0],
    "right": lambda net, x: x.chunk(2, -1)[1],
    "swap": lambda net, x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "halves apart": lambda net, x: torch.cat([x.chunk(2, -1)[0].relu(), x.chunk(2, -1)[1].tanh()], -1),
    "glu": lambda net, x: F.glu(x, -1),
    "mirrored gate": lambda net, x: x.chunk(2, -1)[1].flip(-1) * x.chunk(2, -1)[0].sigmoid(),
    "pairs": lambda net, x: x.unflatten(-1, (-1, 2)).amax(-1),
    "sum of halves": lambda net, x: x.unflatten(-1, (2, -1)).sum(-2),
    "shuffle": lambda net, x: x.unflatten(-1, (2, -1)).mT.flatten(-2),
}


def written(x: Tensor) -> Tensor:
    """Every second channel replaced in place, through a view."""
    x = x.clone()
    x[..., ::2].tanh_()
    return x


def layer(draw: random.Random, width: int, layers: Layers) -> Step:
    """A linear layer, norm, grouped convolution or per-channel parameter."""
    name = f"l{len(layers)}"
    kind = draw.choice(["linear", "linear", "layer norm", "batch norm", "scale", "grouped", "group norm", "recurrent"])
    if width % 2 and kind.startswith("group"):
        kind = "linear"
    if kind == "scale":
        layers[name] = nn.Parameter(torch.randn(width))
        return lambda net, x: x * getattr(net, name) + 0.5
    layers[name] = {
        "linear": lambda: nn.Linear(width, draw.choice([4, 6])),
        "layer norm": lambda: nn.LayerNorm(width),
        "batch norm": lambda: nn.BatchNorm1d(width),
        "grouped": lambda: nn.Conv1d(width, draw.choice([4, 6]), 1, groups=2),
        "group norm": lambda: nn.GroupNorm(2, width),
        "recurrent": lambda: nn.GRU(width, 4, batch_first=True),
    }[kind]()
    if kind in ("linear", "layer norm"):
        return lambda net, x: getattr(net, name)(x)
    if kind == "recurrent":
        return lambda net, x: getattr(net, name)(x)[0]
    return lambda net, x: getattr(net, name)(x.mT).mT


def joined(draw: random.Random, widths: list[int], first: int) -> tuple[int, Callable[[Tensor, Tensor], Tensor]]:
    """Another result, and how to join it with this one."""
    alike = [i for i, w in enumerate(widths) if w == widths[first]]
    how = draw.choice(["cat", "add", "multiply", "where"])
    if how == "cat":
        return draw.randrange(len(widths)), lambda x, y: torch.cat([x, y], -1)
    operations = {"add": torch.add, "multiply": torch.mul, "where": lambda x, y: torch.where(x > 0, x, y)}
    return draw.choice(alike), operations[how]


def random_network(seed: int) -> tuple[nn.Module, Tensor, list[str]]:
    """A network, an input, and the names of its operations."""
    draw = random.Random(seed)
    layers: Layers = {"stem": nn.Linear(3, draw.choice([4, 6, 8]))}
    x = torch.zeros(2, 3, 3)
    steps: list[Callable[[Any, list[Tensor]], Tensor]] = [lambda net, past: net.stem(past[0])]
    results, story = [x, steps[0](Wired(len, **layers).eval(), [x])], ["stem"]
    while len(steps) < draw.choice([4, 8, 12]):
        source = draw.randrange(1, len(results))
        width = results[source].shape[-1]
        step, name = next_step(draw, [0] + [r.shape[-1] for r in results[1:]], source, layers)
        result = step(Wired(len, **layers).eval(), results).detach()
        if 0 < result.shape[-1] <= 24 and width:
            steps.append(step)
            results.append(result)
            story.append(f"{name}({source})")
    ends = [len(results) - 1, draw.randrange(1, len(results))]
    layers["head"] = nn.Linear(sum(results[e].shape[-1] for e in ends), 2)

    def wiring(net: Any, x: Tensor) -> Tensor:
        past = [x]
        for step in steps:
            past.append(step(net, past))
        return net.head(torch.cat([past[e] for e in ends], -1).tanh())

    return Wired(wiring, **layers).eval(), torch.randn(2, 3, 3), [*story, f"head{ends}"]


def next_step(
    draw: random.Random, widths: list[int], source: int, layers: Layers
) -> tuple[Callable[[Any, list[Tensor]], Tensor], str]:
    kind = draw.choice(["layer", "join", "plain", "plain", "halved"])
    if kind == "layer":
        made = layer(draw, widths[source], layers)
        return lambda net, past: made(net, past[source]), f"layer {len(layers) - 1}"
    if kind == "join":
        other, operation = joined(draw, widths, source)
        other = max(other, 1)
        return lambda net, past: operation(past[source], past[other]), f"join {other}"
    table = HALVED if kind == "halved" and widths[source] % 2 == 0 else PLAIN
    name = draw.choice(list(table))
    return lambda net, past: table[name](net, past[source]), name
