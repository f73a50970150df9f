"""Random compositions: networks as people build them, from the operations of the gallery, with any of them anywhere.

Where `wirings` tries any order of operations on (batch, tokens, channels), these are made of whole blocks on images,
tokens and vectors, with every kind of layer, several inputs, and outputs in containers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gallery.attention import join_heads, split_heads
from gallery.core import Wired

Step = Callable[[Any, Tensor], Tensor]
Join = Callable[[Any, Tensor, Tensor], Tensor]
WIDEST, DEEPEST = 24, 9


@dataclass(eq=False)
class Parts:
    """The layers drawn so far, and the draw."""

    draw: random.Random
    layers: dict[str, nn.Module | nn.Parameter | Tensor] = field(default_factory=dict)

    def add(self, part: nn.Module | nn.Parameter | Tensor) -> str:
        name = f"l{len(self.layers)}"
        self.layers[name] = part
        return name

    def layer(self, module: nn.Module) -> Step:
        name = self.add(module)
        return lambda net, x: getattr(net, name)(x)

    def width(self) -> int:
        return self.draw.choice([4, 6, 8])

    def heads(self, width: int) -> int:
        return self.draw.choice([h for h in (1, 2, 3) if width % h == 0])

    def curve(self) -> Callable[[Tensor], Tensor]:
        return self.draw.choice([F.relu, F.gelu, torch.tanh, F.silu, F.leaky_relu, torch.sigmoid])


@dataclass(eq=False)
class Answer:
    """A dataclass as an output."""

    logits: Tensor
    extra: Any


# ---- blocks on images ------------------------------------------------------------------------------------------------


def conv(p: Parts, inputs: int, outputs: int, kernel: int = 3, **options: Any) -> Step:
    return p.layer(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=p.draw.random() < 0.6, **options))


def conv_norm(p: Parts, inputs: int, outputs: int) -> Step:
    first, norm, curve = conv(p, inputs, outputs), p.layer(nn.BatchNorm2d(outputs)), p.curve()
    return lambda net, x: curve(norm(net, first(net, x)))


def bottleneck(p: Parts, x: Tensor) -> Step:
    """A residual block with an inverted bottleneck: 1 x 1, depthwise, 1 x 1."""
    c, inner = x.shape[1], p.width()
    wide, deep = conv_norm(p, c, inner), conv(p, inner, inner, groups=inner)
    back, curve = conv(p, inner, c, 1), p.curve()
    return lambda net, x: x + back(net, curve(deep(net, wide(net, x))))


def residual(p: Parts, x: Tensor) -> Step:
    c, inner = x.shape[1], p.width()
    first, back = conv_norm(p, c, inner), conv_norm(p, inner, c)
    return lambda net, x: x + back(net, first(net, x))


def excite(p: Parts, x: Tensor) -> Step:
    """Squeeze and excitation."""
    c, inner = x.shape[1], p.width()
    down, up = conv(p, c, inner, 1), conv(p, inner, c, 1)
    return lambda net, x: x * up(net, down(net, x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def reused_conv(p: Parts, x: Tensor) -> Step:
    """One convolution twice: its inputs and outputs are the same channels."""
    once, curve = conv(p, x.shape[1], x.shape[1]), p.curve()
    return lambda net, x: once(net, curve(once(net, x)))


def unequal_halves(p: Parts, x: Tensor) -> Step:
    """Halves that go different ways and are put together again."""
    c = x.shape[1] // 2
    left, right = conv(p, c, p.width()), conv(p, x.shape[1] - c, p.width(), 1)
    return lambda net, x: torch.cat([left(net, x[:, :c]), right(net, x[:, c:])], 1)


def chunked(p: Parts, x: Tensor) -> Step:
    """A convolution whose outputs are two halves: one is a gate, or each has a curve of its own."""
    c = p.width()
    both, gated = conv(p, x.shape[1], 2 * c), p.draw.random() < 0.5

    def step(net: Any, x: Tensor) -> Tensor:
        a, b = both(net, x).chunk(2, 1)
        return a * b.sigmoid() if gated else torch.cat([a.relu(), b.tanh()], 1)

    return step


def image_attention(p: Parts, x: Tensor) -> Step:
    """Attention between pixels, added to them."""
    c, inner = x.shape[1], p.width()
    q, k, v = (conv(p, c, inner, 1) for _ in "qkv")
    back = conv(p, inner, c, 1)

    def step(net: Any, x: Tensor) -> Tensor:
        a, b, values = (f(net, x).flatten(2) for f in (q, k, v))
        scores = (a.mT @ b / a.shape[1] ** 0.5).softmax(-1)
        return x + back(net, (values @ scores.mT).unflatten(-1, x.shape[2:]))

    return step


def buffer_scale(p: Parts, x: Tensor) -> Step:
    """Multiplied by a buffer with two kinds of entries."""
    name = p.add(1.0 + (torch.arange(x.shape[1]) % 2)[:, None, None])
    return lambda net, x: x * getattr(net, name)


def layer_scale(p: Parts, x: Tensor) -> Step:
    name = p.add(nn.Parameter(torch.ones(x.shape[1], 1, 1)))
    return lambda net, x: x * getattr(net, name)


def channels_last_norm(p: Parts, x: Tensor) -> Step:
    norm = p.layer(nn.LayerNorm(x.shape[1]))
    return lambda net, x: norm(net, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def shuffled(p: Parts, x: Tensor) -> Step:
    """Grouped convolution, then a channel shuffle."""
    once = conv(p, x.shape[1], p.draw.choice([4, 8]), groups=2)
    return lambda net, x: once(net, x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def weight_normed_conv(p: Parts, x: Tensor) -> Step:
    return p.layer(parametrizations.weight_norm(nn.Conv2d(x.shape[1], p.width(), 3, padding=1)))


def upscaled(p: Parts, x: Tensor) -> Step:
    """Pixel shuffle, and back to the size before."""
    once = conv(p, x.shape[1], 4 * p.draw.choice([2, 4]))
    return lambda net, x: F.avg_pool2d(F.pixel_shuffle(once(net, x), 2), 2)


def padded(p: Parts, _: Tensor) -> Step:
    mode = p.draw.choice(["constant", "reflect"])
    return lambda net, x: F.pad(x, (1, 0, 1, 0), mode=mode)


def bent(p: Parts, _: Tensor) -> Step:
    curve = p.curve()
    return lambda net, x: curve(x)


IMAGE: dict[str, Callable[[Parts, Tensor], Step]] = {
    "conv": lambda p, x: conv(p, x.shape[1], p.width()),
    "conv norm": lambda p, x: conv_norm(p, x.shape[1], p.width()),
    "strided": lambda p, x: conv(p, x.shape[1], p.width(), stride=2),
    "circular": lambda p, x: conv(p, x.shape[1], p.width(), padding_mode="circular"),
    "grouped": lambda p, x: conv(p, x.shape[1], p.width(), groups=2),
    "depthwise": lambda p, x: conv(p, x.shape[1], x.shape[1] * p.draw.choice([1, 1, 2]), groups=x.shape[1]),
    "transposed": lambda p, x: p.layer(nn.ConvTranspose2d(x.shape[1], p.width(), 3, padding=1)),
    "transposed grouped": lambda p, x: p.layer(nn.ConvTranspose2d(x.shape[1], p.width(), 3, padding=1, groups=2)),
    "batch norm": lambda p, x: p.layer(nn.BatchNorm2d(x.shape[1], affine=p.draw.random() < 0.7)),
    "group norm": lambda p, x: p.layer(nn.GroupNorm(p.draw.choice([1, 2, x.shape[1]]), x.shape[1])),
    "instance norm": lambda p, x: p.layer(nn.InstanceNorm2d(x.shape[1], affine=p.draw.random() < 0.7)),
    "channels-last norm": channels_last_norm,
    "curve": bent,
    "prelu": lambda p, x: p.layer(nn.PReLU(x.shape[1])),
    "max pool": lambda p, x: lambda net, x: F.max_pool2d(x, 2, 1),
    "padded": padded,
    "more channels": lambda p, x: lambda net, x: F.pad(x, (0, 0, 0, 0, 0, 2)),
    "bottleneck": bottleneck,
    "residual": residual,
    "excite": excite,
    "reused": reused_conv,
    "unequal halves": unequal_halves,
    "chunked": chunked,
    "attention": image_attention,
    "buffer": buffer_scale,
    "layer scale": layer_scale,
    "shuffled": shuffled,
    "weight norm": weight_normed_conv,
    "pixel shuffle": upscaled,
    "scale from the width": lambda p, x: lambda net, x: x / x.shape[1] ** 0.5,
}


# ---- blocks on tokens, and on vectors --------------------------------------------------------------------------------


def linear(p: Parts, inputs: int, outputs: int) -> Step:
    return p.layer(nn.Linear(inputs, outputs, bias=p.draw.random() < 0.6))


def perceptron(p: Parts, x: Tensor) -> Step:
    """Two layers around a curve, added to what came in."""
    inner = p.width()
    up, down, curve = linear(p, x.shape[-1], inner), linear(p, inner, x.shape[-1]), p.curve()
    return lambda net, x: x + down(net, curve(up(net, x)))


def gated(p: Parts, x: Tensor) -> Step:
    """A gated linear unit: one layer and a chunk, two layers, or PyTorch's own."""
    inner, kind = p.width(), p.draw.choice(["chunk", "two", "glu"])
    down = linear(p, inner, x.shape[-1])
    if kind == "two":
        gate, value = linear(p, x.shape[-1], inner), linear(p, x.shape[-1], inner)
        return lambda net, x: down(net, F.silu(gate(net, x)) * value(net, x))
    both = linear(p, x.shape[-1], 2 * inner)
    if kind == "glu":
        return lambda net, x: down(net, F.glu(both(net, x), -1))
    return lambda net, x: down(net, F.silu(both(net, x).chunk(2, -1)[0]) * both(net, x).chunk(2, -1)[1])


def attention(p: Parts, x: Tensor) -> Step:
    """By hand or PyTorch's own, with several heads, with or without a scale from the width, added to what came in."""
    c, inner = x.shape[-1], p.draw.choice([4, 8, 12])
    heads, kind = p.heads(inner), p.draw.choice(["sdpa", "hand", "hand, scaled"])
    q, k, v = (linear(p, c, inner) for _ in "qkv")
    back = linear(p, inner, c)

    def step(net: Any, x: Tensor) -> Tensor:
        a, b, values = (split_heads(f(net, x), heads) for f in (q, k, v))
        if kind == "sdpa":
            return x + back(net, join_heads(F.scaled_dot_product_attention(a, b, values)))
        scale = a.shape[-1] ** -0.5 if "scaled" in kind else 0.5
        return x + back(net, join_heads((a @ b.mT * scale).softmax(-1) @ values))

    return step


def fused_attention(p: Parts, x: Tensor) -> Step:
    c, inner = x.shape[-1], p.draw.choice([4, 8])
    heads = p.heads(inner)
    three, back = linear(p, c, 3 * inner), linear(p, inner, c)

    def step(net: Any, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, heads) for t in three(net, x).chunk(3, -1))
        return back(net, join_heads(F.scaled_dot_product_attention(q, k, v)))

    return step


def built_in_attention(p: Parts, x: Tensor) -> Step:
    name = p.add(nn.MultiheadAttention(x.shape[-1], p.heads(x.shape[-1]), batch_first=True))
    return lambda net, x: x + getattr(net, name)(x, x, x, need_weights=False)[0]


def tied(p: Parts, x: Tensor) -> Step:
    """An autoencoder with one weight, there and back."""
    name, curve = p.add(nn.Parameter(torch.ones(p.width(), x.shape[-1]))), p.curve()
    return lambda net, x: F.linear(curve(F.linear(x, getattr(net, name))), getattr(net, name).T)


def shared_layers(p: Parts, x: Tensor) -> Step:
    """Two layers with one weight and biases of their own."""
    a, b = nn.Linear(x.shape[-1], x.shape[-1]), nn.Linear(x.shape[-1], x.shape[-1])
    b.weight = a.weight
    first, second, curve = p.layer(a), p.layer(b), p.curve()
    return lambda net, x: second(net, curve(first(net, x)))


def reused_linear(p: Parts, x: Tensor) -> Step:
    once, curve = linear(p, x.shape[-1], x.shape[-1]), p.curve()
    return lambda net, x: x + once(net, curve(once(net, x)))


def weight_normed_linear(p: Parts, x: Tensor) -> Step:
    return p.layer(parametrizations.weight_norm(nn.Linear(x.shape[-1], p.width())))


def positions(p: Parts, x: Tensor) -> Step:
    """Added to every place, as position embeddings are."""
    name = p.add(nn.Parameter(torch.ones(x.shape[1:])))
    return lambda net, x: x + getattr(net, name)


def batch_norm(p: Parts, x: Tensor) -> Step:
    norm = p.layer(nn.BatchNorm1d(x.shape[-1]))
    return (lambda net, x: norm(net, x.mT).mT) if x.dim() == 3 else norm


def along_tokens(p: Parts, x: Tensor) -> Step:
    """A convolution along the tokens, plain or depthwise."""
    c = x.shape[-1]
    once = p.layer(nn.Conv1d(c, c, 3, padding=1, groups=p.draw.choice([1, c])))
    return lambda net, x: once(net, x.mT).mT


def recurrent(p: Parts, x: Tensor) -> Step:
    name = p.add(p.draw.choice([nn.GRU, nn.LSTM])(x.shape[-1], p.width(), batch_first=True))
    return lambda net, x: getattr(net, name)(x)[0]


VECTOR: dict[str, Callable[[Parts, Tensor], Step]] = {
    "linear": lambda p, x: linear(p, x.shape[-1], p.width()),
    "linear again": lambda p, x: linear(p, x.shape[-1], p.width()),
    "weight norm": weight_normed_linear,
    "perceptron": perceptron,
    "gated": gated,
    "tied": tied,
    "shared": shared_layers,
    "reused": reused_linear,
    "batch norm": batch_norm,
    "layer norm": lambda p, x: p.layer(nn.LayerNorm(x.shape[-1])),
    "rms norm": lambda p, x: p.layer(nn.RMSNorm(x.shape[-1])),
    "curve": bent,
    "positions": positions,
    "scale from the width": lambda p, x: lambda net, x: x / x.shape[-1] ** 0.5,
    "flip": lambda p, x: lambda net, x: x.flip(-1),
}
TOKENS = VECTOR | {
    "attention": attention,
    "fused attention": fused_attention,
    "built-in attention": built_in_attention,
    "along tokens": along_tokens,
    "recurrent": recurrent,
    "mean of tokens": lambda p, x: lambda net, x: x.mean(1),
    "first token": lambda p, x: lambda net, x: x[:, 0],
}
LEAVING: dict[str, Callable[[Parts, Tensor], Step]] = {
    "pooled": lambda p, x: lambda net, x: x.mean((2, 3)),
    "flattened": lambda p, x: lambda net, x: F.adaptive_avg_pool2d(x, 2).flatten(1),
    "as tokens": lambda p, x: lambda net, x: x.flatten(2).mT,
}
KINDS = {2: VECTOR, 3: TOKENS, 4: IMAGE}


# ---- putting together ------------------------------------------------------------------------------------------------


def concatenated(x: Tensor, y: Tensor) -> Join | None:
    axis = 1 if x.dim() == 4 else -1
    rest = [(a, b) for d, (a, b) in enumerate(zip(x.shape, y.shape, strict=False)) if d != axis % x.dim()]
    fits = x.dim() == y.dim() and all(a == b for a, b in rest)
    return (lambda net, x, y: torch.cat([x, y], axis)) if fits else None


def joined(p: Parts, x: Tensor, y: Tensor) -> Join | None:
    """How two results can be put together, if at all: added, multiplied, side by side, or one steers another."""
    if x.shape == y.shape and p.draw.random() < 0.6:
        operation = p.draw.choice([torch.add, torch.mul, torch.maximum])
        return lambda net, x, y: operation(x, y)
    if x.dim() == 4 and y.dim() == 2:
        steer = linear(p, y.shape[1], x.shape[1])
        return lambda net, x, y: x * steer(net, y)[:, :, None, None]
    return concatenated(x, y)


@dataclass(frozen=True, eq=False)
class Composition:
    """A network in evaluation mode and float64, an input and another of another batch, and what it is made of."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    probe: tuple[Tensor, ...]
    story: tuple[str, ...]


def compose(seed: int) -> Composition:
    """The network of a number; its weights are those of PyTorch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Composer(seed).compose()


class Composer:
    """Draws steps, and runs each once to know the shape of its result."""

    def __init__(self, seed: int) -> None:
        self.parts = Parts(random.Random(seed))
        self.draw = self.parts.draw
        self.steps: list[Callable[[Any, list[Tensor]], Tensor]] = []
        self.results: list[Tensor] = []
        self.story: list[str] = []

    def take(self, name: str, step: Callable[[Any, list[Tensor]], Tensor]) -> None:
        """Keep a step, if what it makes is neither empty nor too large."""
        net = Wired(len, **self.parts.layers).double().eval()
        with torch.no_grad():
            result = step(net, self.results)
        large = result.shape[1] if result.dim() == 4 else result.shape[-1]
        if (
            large <= WIDEST
            and (result.dim() != 4 or min(result.shape[2:]) > 1)
            and (result.dim() != 3 or result.shape[1] > 1)
        ):
            self.steps.append(step)
            self.results.append(result)
            self.story.append(name)

    def compose(self) -> Composition:
        make = self.enter()
        for _ in range(self.draw.randrange(2, DEEPEST)):
            self.go_on()
        wiring = self.leave()
        model = Wired(wiring, **self.parts.layers).double().eval()
        return Composition(model, make(2), make(3), tuple(self.story))

    def enter(self) -> Callable[[int], tuple[Tensor, ...]]:
        """The inputs, and a layer that reads each of them."""
        kinds = self.draw.choice([["image"], ["image"], ["tokens"], ["ids"], ["vector"], ["image", "vector"]])
        self.results += [INPUTS[kind](2) for kind in kinds]
        self.inputs, self.story = len(kinds), ["input " + " ".join(kinds)]
        for index, kind in enumerate(kinds):
            if kind == "ids":
                step = self.parts.layer(nn.Embedding(7, self.parts.width()))
            else:
                x = self.results[index]
                step = (conv_norm if kind == "image" else linear)(self.parts, x.shape[1 if kind == "image" else -1], 6)
            self.take(f"stem of {kind}", lambda net, past, step=step, index=index: step(net, past[index]))
        return lambda batch: tuple(INPUTS[kind](batch) for kind in kinds)

    def go_on(self) -> None:
        """One more block, one more join, or the way from an image to tokens or a vector."""
        last = len(self.results) - 1
        source = last if self.draw.random() < 0.8 else self.draw.randrange(self.inputs, last + 1)
        x, kind = self.results[source], self.draw.random()
        if kind < 0.2:
            other = self.draw.randrange(self.inputs, last + 1)
            join = joined(self.parts, x, self.results[other])
            if join is not None:
                self.take(f"join({source}, {other})", lambda net, past: join(net, past[source], past[other]))
            return
        table = LEAVING if x.dim() == 4 and kind < 0.3 else KINDS[x.dim()]
        name = self.draw.choice(list(table))
        channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
        if channels % 2 == 0:
            step = table[name](self.parts, x)
            self.take(f"{name}({source})", lambda net, past: step(net, past[source]))

    def leave(self) -> Callable[..., Any]:
        """One or two heads, and the container of what they say."""
        steps, inputs = list(self.steps), self.inputs
        ends = [len(self.results) - 1, self.draw.randrange(inputs, len(self.results))]
        heads = [self.head(self.results[end]) for end in ends]
        pack = self.draw.choice([*PACKS])
        self.story.append(f"{pack} of heads on {ends}")

        def wiring(net: Any, *given: Tensor) -> Any:
            past = list(given)
            for step in steps:
                past.append(step(net, past))
            return PACKS[pack](
                *(lambda head=head, end=end: head(net, past[end]) for head, end in zip(heads, ends, strict=True))
            )

        return wiring

    def head(self, x: Tensor) -> Step:
        """A linear layer on every token, or on what an image comes to."""
        if x.dim() != 4:
            return linear(self.parts, x.shape[-1], 2)
        into = LEAVING[self.draw.choice(["pooled", "flattened"])](self.parts, x)
        last = linear(self.parts, into(None, x).shape[-1], 2)
        return lambda net, x: last(net, into(net, x))


INPUTS: dict[str, Callable[[int], Tensor]] = {
    "image": lambda batch: torch.randn(batch, 3, 6, 6).double(),
    "tokens": lambda batch: torch.randn(batch, 5, 3).double(),
    "ids": lambda batch: torch.randint(7, (batch, 5)),
    "vector": lambda batch: torch.randn(batch, 5).double(),
}
PACKS: dict[str, Callable[..., Any]] = {
    "tensor": lambda first, second: first(),
    "tuple": lambda first, second: (first(), second()),
    "dict": lambda first, second: {"logits": first(), "extra": second()},
    "nest": lambda first, second: [{"logits": first()}, (second(), None)],
    "dataclass": lambda first, second: Answer(first(), {"extra": second()}),
}
"""What a network returns, of its two heads; the second may stay unused."""
