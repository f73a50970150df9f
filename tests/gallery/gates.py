"""One value for many channels: weighted branches, experts, gates per head; and pieces that are one channel together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.attention import join_heads, projections, split_heads
from gallery.core import Inputs, Wired, case, image, parameter, pooled

Built = tuple[nn.Module, Inputs]
BOTH = {"a b": 8}  # the branches are one group, as where they are added; the gates stay
HEADS = 3


def branches(join: Callable[[Any, Tensor], Tensor], **more: nn.Module | nn.Parameter | Tensor) -> Built:
    """Two branches `a` and `b`, a layer `g` of two gates, and a head that reads what comes of them."""
    layers = {"a": nn.Linear(5, 8), "b": nn.Linear(5, 8), "g": nn.Linear(5, 2), "head": nn.Linear(8, 3)}
    return Wired(lambda net, x: net.head(join(net, x).tanh()), **layers, **more), torch.randn(4, 5)


def stacked(net: Any, x: Tensor, dim: int = 1) -> Tensor:
    return torch.stack([net.a(x), net.b(x)], dim)


@case(BOTH, blocked={"g": "several channels", "head": "output"})
def gate_by_softmax() -> Built:
    return branches(lambda net, x: (stacked(net, x) * net.g(x).softmax(1)[..., None]).sum(1))


@case(BOTH, blocked={"g": "several channels", "head": "output"})
def gate_by_softmax_on_the_last_axis() -> Built:
    return branches(lambda net, x: (stacked(net, x, -1) * net.g(x).softmax(1)[:, None]).sum(-1))


@case(BOTH, blocked={"g": "several channels", "head": "output"})
def gate_by_slice() -> Built:
    def join(net: Any, x: Tensor) -> Tensor:
        w = net.g(x).sigmoid()
        return w[:, :1] * net.a(x) + w[:, 1:] * net.b(x)

    return branches(join)


@case(BOTH, blocked={"g": "several channels", "head": "output"})
def gate_by_index() -> Built:
    def join(net: Any, x: Tensor) -> Tensor:
        w = net.g(x).sigmoid()
        return w[:, 0, None] * net.a(x) + w[:, 1, None].expand_as(net.b(x)) * net.b(x)

    return branches(join)


@case(BOTH, blocked={"g": "several channels", "head": "output"})
def gate_by_unbind_of_what_was_stacked() -> Built:
    def join(net: Any, x: Tensor) -> Tensor:
        (a, b), (u, v) = stacked(net, x).unbind(1), net.g(x).softmax(1).chunk(2, 1)
        return torch.lerp(u * a, v * b, u)

    return branches(join)


@case(BOTH, blocked={"g": "several channels", "head": "output"})
def gate_by_einsum() -> Built:
    return branches(lambda net, x: torch.einsum("bp,bpc->bc", net.g(x).softmax(1), stacked(net, x)))


@case(BOTH, blocked={"g": "several channels", "head": "output"})
def gate_by_einsum_from_the_other_side() -> Built:
    return branches(lambda net, x: torch.einsum("pbc,bp->bc", stacked(net, x, 0), net.g(x).tanh()))


@case(BOTH, blocked={"g": "several channels", "head": "output"})
def gate_by_product() -> Built:
    return branches(lambda net, x: (net.g(x).softmax(1)[:, None] @ stacked(net, x)).squeeze(1))


@case(BOTH, blocked={"head": "output"})
def gate_that_decides() -> Built:
    return branches(lambda net, x: torch.where(net.g(x)[:, :1] > 0, net.a(x), net.b(x)))


@case({"a": 8}, partial=True, blocked={"g": "several channels", "head": "output"})
def gate_that_is_added() -> Built:
    """One channel is added to all others, another is multiplied onto them."""
    return branches(lambda net, x: (net.a(x) + net.g(x)[:, 1:]).relu() * net.g(x)[:, :1])


@case({"a": 8}, blocked={"g": "", "head": "output", "other": "output"})
def gate_that_is_read_too() -> Built:
    """One channel is a gate and is read, the other is read only."""

    def wiring(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        g = net.g(x)
        return net.head((net.a(x) * g[:, 1:]).tanh()), net.other(g)

    layers = {"a": nn.Linear(5, 8), "g": nn.Linear(5, 2), "head": nn.Linear(8, 3), "other": nn.Linear(2, 3)}
    return Wired(wiring, **layers), torch.randn(4, 5)


@case(BOTH, blocked={"head": "output"})
def softmax_over_branches() -> Built:
    """Each channel has a softmax of its own, over the two branches."""
    return branches(lambda net, x: (stacked(net, x) * stacked(net, x).softmax(1)).sum(1))


@case({"a b c d": 8}, blocked={"head": "output"})
def softmax_over_other_branches() -> Built:
    def join(net: Any, x: Tensor) -> Tensor:
        scores = torch.stack([net.c(x), net.d(x)], -1).log_softmax(-1).exp()
        return (stacked(net, x, -1) * scores).sum(-1)

    return branches(join, c=nn.Linear(5, 8), d=nn.Linear(5, 8))


@case({"a b": 8}, blocked={"head": "output"})
def largest_of_two_branches() -> Built:
    return branches(lambda net, x: stacked(net, x).amax(1) * stacked(net, x).prod(1))


@case(BOTH, blocked={"head": "output"})
def branches_mixed_by_a_constant() -> Built:
    """Each mixture of the two branches has numbers of its own, the same for all channels."""

    def join(net: Any, x: Tensor) -> Tensor:
        matrix = torch.tensor([[0.3, 0.7], [-0.4, 0.2], [0.5, 0.5]], dtype=x.dtype)
        return torch.einsum("qp,bpc->bqc", matrix, stacked(net, x)).sigmoid().sum(1)

    return branches(join)


@case(BOTH, blocked={"head": "output"})
def branches_mixed_by_a_buffer() -> Built:
    return branches(lambda net, x: (stacked(net, x, -1) @ net.matrix).sigmoid().sum(-1), matrix=torch.randn(2, 3))


@case(BOTH, blocked={"head": "output"})
def branches_mixed_by_learned_weights() -> Built:
    """Architecture weights of DARTS: one number a branch, for all of its channels."""

    def join(net: Any, x: Tensor) -> Tensor:
        weights = net.weights.softmax(0)
        once = (stacked(net, x) * weights[:, None]).sum(1).sin()
        return once + torch.einsum("p,bpc->bc", weights, stacked(net, x)) + weights[0] * net.a(x)

    return branches(join, weights=parameter(2))


@case(blocked={"head": "output"})
def halves_mixed_in_either_order() -> Built:
    """The second half of the channels meets the constant the other way round."""

    def join(net: Any, x: Tensor) -> Tensor:
        both = stacked(net, x)
        crossed = torch.cat([both[..., :4], both[..., 4:].flip(1)], -1)
        return (crossed * torch.tensor([[0.3], [0.7]], dtype=x.dtype)).sum(1)

    return branches(join)


@case(blocked={"head": "output"})
def halves_under_two_gates() -> Built:
    """The first half of the channels meets one gate, the second the other."""

    def join(net: Any, x: Tensor) -> Tensor:
        return (net.a(x).unflatten(-1, (2, 4)) * net.g(x)[..., None]).flatten(1) + net.b(x)

    return branches(join)


@case({"a": 8}, partial=True, blocked={"head": "output"})
def gate_of_every_token() -> Built:
    """A channel for each token gates what layer `a` makes of that token."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head((net.a(x) * net.g(x.flatten(1))[..., None].sigmoid()).sum(1).tanh())

    return Wired(wiring, a=nn.Linear(3, 8), g=nn.Linear(15, 5), head=nn.Linear(8, 2)), torch.randn(2, 5, 3)


@case({"a": 8}, partial=True, blocked={"head": "output"})
def gate_of_every_pixel() -> Built:
    """One of two maps gates all channels of a grouped convolution."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(pooled(net.c(net.a(x)).relu() * net.g(x)[:, 1:].sigmoid()))

    parts = {"a": nn.Conv2d(3, 8, 3), "c": nn.Conv2d(8, 8, 3, padding=1), "g": nn.Conv2d(3, 2, 3)}
    return Wired(wiring, **parts, head=nn.Linear(8, 2)), image()


@case({"a b excite": 6, "squeeze": 3}, blocked={"head": "output"})
def selective_kernel_of_two_layers() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        both = torch.stack([F.relu(net.a(x)), F.relu(net.b(x))], 1)
        z = F.relu(net.squeeze(pooled(both.sum(1))))
        weights = torch.stack([layer(z) for layer in net.excite], 1).softmax(1)
        return net.head((both * weights[..., None, None]).sum(1))

    convs = {"a": nn.Conv2d(3, 6, 3, padding=1), "b": nn.Conv2d(3, 6, 5, padding=2), "head": nn.Conv2d(6, 2, 1)}
    excite = nn.ModuleList([nn.Linear(3, 6), nn.Linear(3, 6)])
    return Wired(wiring, **convs, squeeze=nn.Linear(6, 3), excite=excite), image(size=8)


@case({"stem": (4, 4), "split excite": 6, "squeeze": 4}, blocked={"head": "output"})
def split_attention() -> Built:
    """ResNeSt: one grouped convolution makes both splits, whose sum is squeezed into a softmax over the splits."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        splits = F.relu(net.split(F.relu(net.stem(x)))).unflatten(1, (2, -1))
        z = net.squeeze(splits.sum(1).mean((2, 3), keepdim=True)).sigmoid()
        weights = net.excite(z).unflatten(1, (2, -1)).softmax(1)
        return net.head((splits * weights).sum(1))

    convs = {"stem": nn.Conv2d(3, 8, 3), "split": nn.Conv2d(8, 12, 3, groups=2)}
    ones = {"squeeze": nn.Conv2d(6, 4, 1), "excite": nn.Conv2d(4, 12, 1), "head": nn.Conv2d(6, 2, 1)}
    return Wired(wiring, **convs, **ones), image()


@case({"a": 6}, blocked={"head": "output"})
def maxout_of_maps() -> Built:
    """A pair of maps, of which the larger counts, is one channel for the norm and the head."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.norm(net.a(x).unflatten(1, (-1, 2)).amax(2))))

    parts = {"a": nn.Conv2d(3, 12, 3), "norm": nn.BatchNorm2d(6), "head": nn.Conv2d(6, 2, 1)}
    return Wired(wiring, **parts), image()


@case({"a b": 6}, blocked={"head": "output"})
def maxout_beside_a_shortcut() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head((net.a(x).unflatten(1, (-1, 3)).amax(2) + net.b(x)).tanh())

    return Wired(wiring, a=nn.Linear(4, 18), b=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(3, 4)


@case({"a": 6}, blocked={"g": "several channels", "head": "output"})
def pieces_of_one_layer_under_a_gate() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        pieces, weights = net.a(x).unflatten(1, (2, -1)), net.g(x).softmax(1)
        return net.head(torch.einsum("bpc,bp->bc", pieces, weights).tanh())

    return Wired(wiring, a=nn.Linear(4, 12), g=nn.Linear(4, 2), head=nn.Linear(6, 2)), torch.randn(3, 4)


# ---- experts --------------------------------------------------------------------------------------------------------


def experts(mix: Callable[[Any, Tensor], Tensor]) -> Built:
    """Three experts of one hidden layer, a router `g`, and a head that reads their mixture."""
    some = nn.ModuleList([nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(3)])
    net = Wired(lambda net, x: net.head(mix(net, x).tanh()), some=some, g=nn.Linear(4, 3), head=nn.Linear(6, 2))
    return net, torch.randn(7, 4)


HIDDEN = {f"some.{k}.0": 5 for k in range(3)}
OUTPUTS = {"some.0.2 some.1.2 some.2.2": 6}


@case(HIDDEN | OUTPUTS, blocked={"g": "several channels", "head": "output"})
def experts_by_einsum() -> Built:
    def mix(net: Any, x: Tensor) -> Tensor:
        return torch.einsum("be,ebc->bc", net.g(x).softmax(-1), torch.stack([expert(x) for expert in net.some]))

    return experts(mix)


@case(HIDDEN | OUTPUTS, blocked={"g": "topk", "head": "output"})
def experts_chosen_one_by_one() -> Built:
    """The two best experts of every row, taken out of all by index."""

    def mix(net: Any, x: Tensor) -> Tensor:
        best, which = net.g(x).softmax(-1).topk(2)
        outputs, rows = torch.stack([expert(x) for expert in net.some], 1), torch.arange(len(x))
        return best[:, :1] * outputs[rows, which[:, 0]] + best[:, 1:] * outputs[rows, which[:, 1]]

    return experts(mix)


@case({"w1": 5, "w2": 6}, blocked={"g": "several channels", "head": "output"})
def experts_in_one_parameter() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.expand(3, -1, -1), net.w1.w).relu()
        return net.head(torch.einsum("be,ebc->bc", net.g(x).softmax(-1), torch.bmm(hidden, net.w2.w)).tanh())

    parts = {"w1": nn.ParameterDict({"w": parameter(3, 4, 5)}), "w2": nn.ParameterDict({"w": parameter(3, 5, 6)})}
    return Wired(wiring, **parts, g=nn.Linear(4, 3), head=nn.Linear(6, 2)), torch.randn(7, 4)


@case(blocked={"some.0.2": "index", "some.1.2": "index", "head": "output"})
def experts_chosen_channel_by_channel() -> Built:
    """Each channel follows an expert of its own, that the data choose."""

    def mix(net: Any, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in net.some], 1)
        return outputs.take_along_dim(net.g(x).argsort(1).repeat(1, 2)[:, None], 1).squeeze(1)

    return experts(mix)


# ---- heads ----------------------------------------------------------------------------------------------------------


@case({"q k": (4, 4), "v": (4, 4), "stem o": 6}, blocks={"q k v g": 2}, blocked={"g": "several channels"})
def attention_with_a_gate_per_head() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        q, k, v = (split_heads(layer(x), 2) for layer in (net.q, net.k, net.v))
        gate = net.g(x).sigmoid().mT[..., None]
        return net.head(F.gelu(x + net.o(join_heads((q @ k.mT).softmax(-1) @ v * gate))))

    return Wired(wiring, **projections(6, 8, 8), g=nn.Linear(6, 2)), torch.randn(2, 5, 3)


@case({"v": (4,) * HEADS}, blocks={"v g": HEADS}, blocked={"g": "several channels", "head": "output"})
def pooling_by_scores_of_heads() -> Built:
    """A score per head and token, from a layer of its own, with a softmax over tokens."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        values, scores = net.v(x).unflatten(-1, (HEADS, -1)), net.g(x).softmax(1)
        return net.head(torch.einsum("bth,bthd->bhd", scores, values).flatten(1).tanh())

    layers = {"v": nn.Linear(3, 4 * HEADS), "g": nn.Linear(3, HEADS), "head": nn.Linear(4 * HEADS, 2)}
    return Wired(wiring, **layers), torch.randn(2, 5, 3)


@case({"w": 8}, blocked={"head": "output"})
def graph_attention() -> Built:
    """GAT with one head: two learned vectors score both ends of an edge."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        h = net.w(x)
        scores = F.leaky_relu(h @ net.source + (h @ net.target).mT)
        return net.head(F.elu(scores.softmax(-1) @ h))

    ends = {"source": parameter(8, 1), "target": parameter(8, 1)}
    return Wired(wiring, w=nn.Linear(3, 8), **ends, head=nn.Linear(8, 2)), torch.randn(2, 5, 3)


@case({"b": 5}, blocked={"a": "one value for several channels", "head": "output"})
def every_channel_times_every_channel() -> Built:
    """Products of all pairs, and a column of the head for each: those of which there are fewer are gates."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head((net.a(x)[:, :, None] * net.b(x)[:, None]).flatten(1))

    return Wired(wiring, a=nn.Linear(4, 3), b=nn.Linear(4, 5), head=nn.Linear(15, 2)), torch.randn(3, 4)


@case({"b": 5}, blocked={"a": "one value for several channels", "head": "output"})
def two_functions_of_a_channel_times_every_channel() -> Built:
    """Six functions, but three channels: these are fewer."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        functions = torch.stack([a, a.sin()], -1).flatten(1)
        return net.head((functions[:, :, None] * net.b(x)[:, None]).flatten(1))

    return Wired(wiring, a=nn.Linear(4, 3), b=nn.Linear(4, 5), head=nn.Linear(30, 2)), torch.randn(3, 4)


@case({"into step": 8}, partial=True, blocked={"states": "one value for several channels", "head": "output"})
def selective_state_space() -> Built:
    """Mamba: each channel has several states, which step sizes, one a channel, and inputs, one a state, drive."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        h = F.silu(net.into(x))
        step = F.softplus(net.step(h))
        driven, read = net.states(h).chunk(2, -1)
        decay = torch.exp(-step[..., None] * net.rates.exp())
        gain = step[..., None] * driven[:, :, None] * h[..., None]
        state, outputs = torch.zeros(len(x), h.shape[-1], 3, dtype=x.dtype), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + gain[:, t]
            outputs.append((state @ read[:, t, :, None])[..., 0])
        return net.head(torch.stack(outputs, 1) + h * net.skip)

    parts = {"into": nn.Linear(4, 8), "step": nn.Linear(8, 8), "states": nn.Linear(8, 6), "head": nn.Linear(8, 2)}
    return Wired(wiring, **parts, rates=parameter(8, 3), skip=parameter(8)), torch.randn(2, 4, 4)
