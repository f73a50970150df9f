"""Channels that are moved: split, shuffled, flipped, sliced, written in place; and slots that change their order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.core import Inputs, Wired, case, chain, conv_bn, image, parameter

Built = tuple[nn.Module, Inputs]


@case({"a": (6, 6), "b": 6}, blocked={"head": "output"})
def shufflenet() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        n, c, h, w = x.shape
        u, v = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, 1)
        return net.head(F.relu(torch.cat([net.b(v), u], 1)))

    return Wired(wiring, a=conv_bn(3, 12), b=conv_bn(6, 6), head=nn.Conv2d(12, 5, 1)), image()


@case({"a": (4, 4), "g1": (3, 3, 3, 3), "g2": (8, 8)}, blocked={"head": "output"})
def shuffle_between_grouped_convs() -> Built:
    """Behind the shuffle each group of `g2` reads three channels of each group of `g1`: four classes of three."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.g1(F.relu(net.a(x))))
        return net.head(F.relu(net.g2(F.channel_shuffle(x, 2))))

    convs = {"a": conv_bn(3, 8), "g1": conv_bn(8, 12, 1, groups=2), "g2": conv_bn(12, 16, 3, groups=2)}
    return Wired(wiring, **convs, head=nn.Conv2d(16, 5, 1)), image()


@case({"a": (4, 4), "b": 3, "c": 5}, blocked={"head": "output"})
def chunk_read_in_the_wrong_order() -> Built:
    """The layer that runs first reads the second half."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        u, v = F.relu(net.a(x)).chunk(2, 1)
        return net.head(F.relu(torch.cat([net.b(v), net.c(u)], 1)))

    return Wired(wiring, a=nn.Linear(3, 8), b=nn.Linear(4, 3), c=nn.Linear(4, 5), head=nn.Linear(8, 2)), torch.randn(
        4, 3
    )


@case({"a": (2, 5, 3), "b": 4}, blocked={"head": "output"})
def unequal_split() -> Built:
    """Three unequal parts: one read by `b`, one kept, one kept after a nonlinearity, joined in another order."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        u, v, w = net.a(x).split([2, 5, 3], dim=1)
        return net.head(F.relu(torch.cat([w, net.b(F.relu(v)), u * 2], 1)))

    return Wired(wiring, a=nn.Conv2d(3, 10, 3), b=nn.Conv2d(5, 4, 1), head=nn.Conv2d(9, 2, 1)), image(size=8)


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def split_of_tokens() -> Built:
    """The first token and the rest go different ways; the channels of both are the same."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        first, rest = F.relu(net.a(x)).split([1, 3], dim=1)
        return net.head(torch.cat([torch.tanh(net.b(first)), F.relu(net.b(rest))], 1))

    return Wired(wiring, a=nn.Linear(3, 6), b=nn.Linear(6, 5), head=nn.Linear(5, 2)), torch.randn(2, 4, 3)


@case({"a": 6}, blocked={"head": "output"})
def cat_of_shifted_images() -> Built:
    """Space-to-depth by slices (the YOLO focus layer): one channel covers four positions."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        corners = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return net.head(torch.cat(corners, 1))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(24, 2, 1)), image()


@case({"a": 6}, blocked={"head": "output"})
def flipped_channels() -> Built:
    """What was channel i is read at position n - 1 - i."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x)).flip(1))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"a": 6}, blocked={"head": "output"})
def rolled_channels() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.roll(F.relu(net.a(x)), 2, dims=1))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"a": 6}, blocked={"head": "output"})
def permuted_by_a_buffer() -> Built:
    """A fixed permutation of the channels, kept as an integer buffer."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x))[:, net.order])

    order = torch.tensor([3, 0, 5, 1, 4, 2])
    return Wired(wiring, a=nn.Linear(3, 6), order=order, head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"a": 2}, partial=True, blocked={"head": "output"})
def picked_by_a_buffer() -> Built:
    """Three of six channels are read, one of them twice; the other three are never read.

    Truth for the channels read: two are read once, one is read twice.
    """

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x)).index_select(1, net.order))

    order = torch.tensor([3, 0, 5, 3])
    return Wired(wiring, a=nn.Linear(3, 6), order=order, head=nn.Linear(4, 2)), torch.randn(4, 3)


@case(blocked={"head": "output"})
def folded_in_two() -> Built:
    """x + x.flip: channels i and n - 1 - i become one. Three pairs, unless refused because their order differs."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.head(F.relu(a + a.flip(1)))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case(blocked={"a": "", "head": "output"})
def added_to_its_neighbour() -> Built:
    """x + roll(x, 1) ties every channel to the next: nothing is left to permute."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.head(F.relu(a + a.roll(1, 1)))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case(blocked={"head": "output"})
def mirrored_slots() -> Built:
    """relu(x_i) is read at 2i, relu(-x_i) at 2(n-1-i) + 1: sorting the two positions would swap their meaning."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.head(torch.stack([a.relu(), (-a).relu().flip(1)], 2).flatten(1))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(12, 2)), torch.randn(4, 3)


@case(blocked={"head": "output"})
def mirrored_gate() -> Built:
    """Value 2i is gated by 2(n-1-i) + 1: the first slot of some channels is a gate, of others a value."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        y = net.fused(x)
        return net.head(y[..., ::2] * y[..., 1::2].flip(-1).sigmoid())

    return Wired(wiring, fused=nn.Linear(4, 12), head=nn.Linear(6, 2)), torch.randn(3, 4)


@case({"a": (4, 4)}, blocked={"head": "output"})
def halves_with_different_activations() -> Built:
    """One half passes through ReLU, the other through tanh: only channels of one half are interchangeable."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        u, v = net.a(x).chunk(2, 1)
        return net.head(torch.cat([u.relu(), v.tanh()], 1))

    return Wired(wiring, a=nn.Linear(3, 8), head=nn.Linear(8, 2)), torch.randn(4, 3)


@case({}, blocked={"head": "output"})
def scaled_by_their_index() -> Built:
    """Python numbers differ from channel to channel: no two are interchangeable as they stand."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x).tanh()
        return net.head(torch.stack([channel * (1.0 + i) for i, channel in enumerate(a.unbind(1))], 1))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"a": (2, 2, 4), "b": 5}, blocked={"head": "output"})
def temporal_shift() -> Built:
    """TSM: a quarter of the channels comes from one step later, a quarter from one step earlier, the rest stays."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        late = F.pad(x[:, 1:, :2], (0, 0, 0, 1))
        early = F.pad(x[:, :-1, 2:4], (0, 0, 1, 0))
        return net.head(F.relu(net.b(torch.cat([late, early, x[:, :, 4:]], 2))))

    return Wired(wiring, a=nn.Linear(3, 8), b=nn.Linear(8, 5), head=nn.Linear(5, 2)), torch.randn(2, 5, 3)


@case({"a": (2, 2, 2, 2)}, blocked={"head": "output"})
def spatial_shift() -> Built:
    """S2-MLP, ShiftNet: every quarter of the channels is rolled in another direction."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        up, down, left, right = F.relu(net.a(x)).chunk(4, 1)
        shifted = [up.roll(1, 2), down.roll(-1, 2), left.roll(1, 3), right.roll(-1, 3)]
        return net.head(torch.cat(shifted, 1))

    return Wired(wiring, a=nn.Conv2d(3, 8, 3), head=nn.Conv2d(8, 2, 3)), image(size=8)


@case({"a": (2, 6), "conv": 2}, blocked={"head": "output"})
def partial_convolution() -> Built:
    """FasterNet: only the first quarter of the channels is convolved, the rest passes."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        first, rest = F.relu(net.a(x)).split([2, 6], 1)
        return net.head(torch.cat([net.conv(first).relu(), rest], 1))

    convs = {"a": nn.Conv2d(3, 8, 3), "conv": nn.Conv2d(2, 2, 3, padding=1)}
    return Wired(wiring, **convs, head=nn.Conv2d(8, 2, 1)), image(size=8)


@case(blocked={"head": "output"})
def in_place_slice_write() -> Built:
    """Even and odd channels are copied to where they were, by two writes into views of a zero tensor."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        y = torch.zeros_like(a)
        y[:, ::2] = a[:, ::2]
        y[:, 1::2] = a[:, 1::2]
        return net.head(y)

    return Wired(wiring, a=nn.Linear(6, 8), head=nn.Linear(8, 3)), torch.randn(3, 6)


@case({"a": 6}, partial=True, blocked={"head": "output"})
def in_place_write_over_space() -> Built:
    """The border of an image is set to zero through a view; every channel is treated alike."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x).sigmoid()
        a[:, :, 0] = 0
        a[:, :, :, -1].zero_()
        return net.head(a)

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(6, 2, 3)), image(size=8)


@case(blocked={"head": "output"})
def in_place_add_to_half() -> Built:
    """Half of the channels is shifted through a view: the halves are no longer alike."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        half = a[:, :3]
        half.add_(1.0)
        return net.head(a.relu())

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case(blocked={"head": "output"})
def in_place_nonlinearity_on_half() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        F.relu(a[:, :3], inplace=True)
        a[:, 3:] *= 2
        return net.head(a.sin())

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case(blocked={"head": "output"})
def in_place_write_through_an_alias() -> Built:
    """A hidden tensor is changed through a view of it that was taken before."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        flat = a.view(-1, 2, 3)
        flat[:, 1].mul_(net.b(x).sigmoid())
        return net.head(a.relu())

    return Wired(wiring, a=nn.Linear(3, 6), b=nn.Linear(3, 3), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case(blocked={"head": "output"})
def out_argument() -> Built:
    """Results written into a given tensor by `out=`."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        y = torch.empty_like(a)
        torch.add(a, 1.0, out=y)
        half = torch.empty(len(x), 3, dtype=x.dtype)
        torch.mul(y[:, :3], 2.0, out=half)
        return net.head(torch.cat([half, y[:, 3:]], 1).relu())

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"a": 6}, partial=True, blocked={"head": "output"})
def part_never_read() -> Built:
    """Two of eight channels are cut off before anything reads them."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x))[:, :6])

    return Wired(wiring, a=nn.Linear(3, 8), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"a": 4}, blocked={"head": "output"})
def repeated_channels() -> Built:
    """Channels repeated one by one, then as a whole: four positions each."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x)).repeat_interleave(2, 1).repeat(1, 2, 1, 1))

    return Wired(wiring, a=nn.Conv2d(3, 4, 3), head=nn.Conv2d(16, 2, 1)), image(size=8)


@case({"a": 8}, blocked={"head": "output"})
def maxout() -> Built:
    """Pairs of channels, of which the larger counts: the pair moves as a whole."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(net.a(x).view(-1, 8, 2).max(-1).values)

    return Wired(wiring, a=nn.Linear(4, 16), head=nn.Linear(8, 2)), torch.randn(3, 4)


@case({"a": 3}, blocked={"head": "output"})
def summed_in_threes() -> Built:
    """view and sum over a part of the channel axis, behind a nonlinearity."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(net.a(x).sigmoid().view(-1, 2, 3).sum(1))

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(3, 2)), torch.randn(3, 4)


@case({"a": 6}, blocked={"head": "output"})
def round_trip_of_layouts() -> Built:
    """NCHW -> tokens -> NHWC -> NCHW, through views, permutes, unflatten and movedim."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        n, c, h, w = a.shape
        tokens = a.flatten(2).mT.reshape(n * h * w, c)
        return net.head(tokens.unflatten(0, (n, h, w)).movedim(-1, 1).contiguous())

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(6, 2, 3)), image(size=8)


@case({"a": 6}, blocked={"head": "output"})
def windows() -> Built:
    """Swin windows: space is cut into tiles, rolled, and put together again."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = torch.roll(F.relu(net.a(x)).permute(0, 2, 3, 1), (-1, -1), (1, 2))
        n, h, w, c = a.shape
        tiles = a.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        tiles = tiles + tiles.mean(1, keepdim=True)
        a = tiles.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return net.head(torch.roll(a, (1, 1), (1, 2)))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Linear(6, 2)), image(size=10)


@case({"a": 4, "b": 4}, blocked={"head": "output"})
def strided_view() -> Built:
    """`as_strided`, `unfold` of a tensor, `diagonal` and `select` are all views."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        windows = a.unfold(2, 3, 2).sum(-1)
        b = torch.as_strided(net.b(windows), (len(x), 4, 2), (16, 4, 2)).tanh()
        return net.head(b.select(2, 1) + b.select(2, 0))

    return Wired(wiring, a=nn.Conv1d(3, 4, 2), b=nn.Conv1d(4, 4, 1), head=nn.Linear(4, 2)), torch.randn(2, 3, 10)


@case({"conv": 4, "head.a": 5}, blocked={"head.b": "output"})
def nested_chain() -> Built:
    head = chain(a=nn.Linear(4, 5), relu=nn.ReLU(), b=nn.Linear(5, 2))
    net = chain(conv=nn.Conv2d(3, 4, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), tanh=nn.Tanh(), head=head)
    return net, image(size=8)


@case({"a": 4, "b": 10}, blocked={"head": "output"})
def flattened_tokens() -> Built:
    """(tokens, channels) flattened into one axis: channel i covers i, i + 4, i + 8. The ten of `b` are transposed."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        b = net.b(F.relu(net.a(x)).flatten(1)).tanh()
        return net.head(b.view(len(x), 2, 5).transpose(1, 2).flatten(1))

    return Wired(wiring, a=nn.Linear(3, 4), b=nn.Linear(12, 10), head=nn.Linear(10, 2)), torch.randn(2, 3, 3)


def pairs_summed(x: Tensor) -> Tensor:
    """Channels 0 and 1, 2 and 3, ... behind a nonlinearity."""
    return x.sigmoid().unflatten(-1, (-1, 2)).sum(-1)


@case({"a": 4}, unmixable=("a",), blocked={"head": "output"})
def maxout_with_a_layer_norm() -> Built:
    """The norm sees all pairs; each is one channel."""
    net = chain(
        a=nn.Linear(4, 8),
        maxout=Wired(lambda net, x: x.unflatten(-1, (4, 2)).amax(-1)),
        norm=nn.LayerNorm(4),
        head=nn.Linear(4, 2),
    )
    return net, torch.randn(3, 4)


@case(blocked={"head": "output"})
def pairs_that_are_centred() -> Built:
    """Sums of pairs minus their mean over all pairs."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        pairs = pairs_summed(net.a(x))
        return net.head((pairs - pairs.mean(-1, keepdim=True)).sin())

    return Wired(wiring, a=nn.Linear(4, 8), head=nn.Linear(4, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def pairs_that_gate_pairs() -> Built:
    """Pair 0 is multiplied by pair 2, pair 1 by pair 3: the four channels of a product are not alike."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        value, gate = pairs_summed(net.a(x)).chunk(2, -1)
        return net.head(value * gate.sin())

    return Wired(wiring, a=nn.Linear(4, 8), head=nn.Linear(2, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def pairs_that_attend() -> Built:
    """Attention between tokens whose channels are pairs."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        pairs = pairs_summed(net.a(x))
        return net.head((pairs @ pairs.mT).softmax(-1) @ pairs)

    return Wired(wiring, a=nn.Linear(4, 8), head=nn.Linear(4, 2)), torch.randn(2, 5, 4)


@case(blocked={"head": "output"})
def sum_of_a_channel_with_itself() -> Built:
    """A sum over copies of one channel is that channel; then one channel is shifted in time and the rest is not."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        doubled = F.normalize(torch.stack([a, a]).sum(0), dim=-1)
        return net.head(torch.cat([doubled[..., :1].roll(1, 1), doubled[..., 1:]], -1))

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(2, 5, 4)


@case(blocked={"head": "output"})
def group_norm_behind_a_layer_norm() -> Built:
    """Statistics of all channels, then of pairs of them."""
    net = chain(
        a=nn.Linear(4, 8),
        all=nn.LayerNorm(8),
        tanh=nn.Tanh(),
        swap=Wired(lambda net, x: x.mT),
        pairs=nn.GroupNorm(4, 8),
        sin=Wired(lambda net, x: x.sin()),
        head=nn.Conv1d(8, 2, 1),
    )
    return net, torch.randn(2, 5, 4)


@case({"a": (3, 3), "g": (2, 2)}, blocked={"head": "output"})
def grouped_conv_behind_a_roll() -> Built:
    """The first group reads channels 5, 0, 1 in this order, the second 2, 3, 4: swapping groups must keep the order."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(net.g(net.a(x).relu().roll(1, 1)).sin())

    convs = {"a": nn.Conv1d(3, 6, 1), "g": nn.Conv1d(6, 4, 1, groups=2), "head": nn.Conv1d(4, 2, 1)}
    return Wired(wiring, **convs), torch.randn(2, 3, 5)


@case(blocked={"head": "output"})
def constant_on_paired_channels() -> Built:
    """Of the two places of a channel one is doubled: for channels 0 and 2 it is the second, for channel 1 the first."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        value, gate = a.chunk(2, -1)
        factors = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0], dtype=a.dtype)
        return net.head(torch.cat([value * gate.sigmoid(), a * factors], -1))

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(9, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def one_of_two_slots_is_read() -> Built:
    """A gate pairs i with i + 3; even positions are read too: of channels 0 and 2 the value, of channel 1 the gate."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        value, gate = a.chunk(2, -1)
        return net.head(torch.cat([value * gate.sigmoid(), a[..., ::2].sin()], -1))

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def one_of_two_slots_is_changed() -> Built:
    """A gate pairs i with i + 3; tanh is applied to even positions, so to the value of some and the gate of others."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        value, gate = a.chunk(2, -1)
        changed = torch.stack([a[..., ::2].tanh(), a[..., 1::2].sin()], -1).flatten(-2)
        return net.head(torch.cat([value * gate.sigmoid(), changed], -1))

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(9, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def symmetric_product_and_a_roll() -> Built:
    """a_i * a_(i+2) treats both places alike, but the rolled copy does not: 0, 2 go to 1, 3 and 1, 3 go to 2, 0."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        left, right = a.chunk(2, -1)
        return net.head(torch.cat([left * right, a.roll(1, -1).sin()], -1))

    return Wired(wiring, a=nn.Linear(4, 4), head=nn.Linear(6, 2)), torch.randn(3, 4)


@case({"a": (3, 3)}, blocked={"head": "output"})
def copies_that_are_shifted() -> Built:
    """Of three copies of each channel two are shifted in time for channels 0 to 2, one for channels 3 to 5."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        copies = net.a(x).repeat(1, 1, 3)
        return net.head(torch.cat([copies[..., :9].roll(1, 1), copies[..., 9:]], -1).relu())

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(18, 2)), torch.randn(2, 5, 4)


@case(blocked={"head": "output"})
def pairs_added_to_their_channels() -> Built:
    """The even channel of a pair gets the maximum, the odd one the sine of the maximum."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        largest = a.unflatten(-1, (-1, 2)).amax(-1)
        return net.head(a + torch.stack([largest, largest.sin()], -1).flatten(-2))

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(3, 4)


@case({"a": (2, 2)}, blocked={"head": "output"})
def pairs_of_which_half_are_shifted() -> Built:
    """Whole pairs are interchangeable only where they come from the same step."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        pairs = pairs_summed(net.a(x))
        return net.head(torch.cat([pairs[..., :2].roll(1, 1), pairs[..., 2:]], -1).sin())

    return Wired(wiring, a=nn.Linear(4, 8), head=nn.Linear(4, 2)), torch.randn(2, 5, 4)


@case({"a": 8, "b": 6}, blocked={"c": "output"})
def circular_padding() -> Built:
    """A torus, by the layer's own padding and on one axis by hand: written part by part into a new tensor."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.pad(F.relu(net.a(x)), (1, 1, 0, 0), mode="circular")
        return net.c(F.relu(net.b(F.pad(x, (0, 0, 1, 1)))))

    wrapped = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
    return Wired(wiring, a=wrapped, b=nn.Conv2d(8, 6, 3), c=nn.Conv2d(6, 2, 1)), image()


@case({"a": 4, "b": 4}, blocked={"c": "output"})
def written_in_halves() -> Built:
    """Two layers write the halves of a new tensor; a view from before sees what was written."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        both = torch.zeros(len(x), 8)
        late = both[:, 4:]
        both[:, :4], both[:, 4:] = torch.relu(net.a(x)), torch.relu(net.b(x))
        return net.c(both) + net.d(late)

    layers = {"a": nn.Linear(5, 4), "b": nn.Linear(5, 4), "c": nn.Linear(8, 3), "d": nn.Linear(4, 3)}
    return Wired(wiring, **layers), torch.randn(2, 5)


@case({"a": 4, "b": 4}, blocked={"c": "output"})
def written_in_parts_and_changed_there() -> Built:
    """What was written in parts is added to, multiplied and clamped in place, part by part."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a, b = net.a(x), net.b(x)
        y = torch.zeros(len(x), 8)
        y[:, :4], y[:, 4:] = a, 0.5
        y[:, :4].mul_(2)
        y[:, 4:] += b
        y.view(len(x), 2, 4)[:, 1].clamp_(min=0)
        return net.c(y)

    return Wired(wiring, a=nn.Linear(5, 4), b=nn.Linear(5, 4), c=nn.Linear(8, 3)), torch.randn(2, 5)


@case({"a": 8}, blocked={"c": "output"})
def seen_in_part_before_it_is_written() -> Built:
    """A view is taken of zeros, and channels are written into the whole of them afterwards."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        y, total = torch.zeros(a.shape), torch.ones(a.shape)
        late, early = y[:, :, 2:], total.flatten(1).view(a.shape)[:, :, :3]
        y[:] = a
        total *= a
        return net.c((late * early).relu())

    return Wired(wiring, a=nn.Conv1d(3, 8, 1), c=nn.Conv1d(8, 3, 1)), torch.randn(2, 3, 5)


@case({"a b": 2, "a": (2, 2)}, blocked={"c": "output"})
def added_to_part_of_another() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        a[:, :4] += net.b(x)
        a[:, 1:][:, ::2].neg_()
        return net.c(a.relu())

    return Wired(wiring, a=nn.Conv1d(3, 8, 1), b=nn.Conv1d(3, 4, 1), c=nn.Conv1d(8, 3, 1)), torch.randn(2, 3, 5)


@case({"a": 4, "b": 4}, blocked={"c": "output"})
def added_to_padding() -> Built:
    """Padding is the same for all channels, whatever lies beside it."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        y = F.pad(net.a(x), (0, 4))
        return net.c(torch.cat([y[:, :4], (y[:, 4:] + net.b(x)).relu()], 1))

    return Wired(wiring, a=nn.Linear(5, 4), b=nn.Linear(5, 4), c=nn.Linear(8, 3)), torch.randn(2, 5)


@case({"a": 8}, blocked={"c": "output"})
def tokens_written_beside_parameters() -> Built:
    """A class token is written in front of the others, and positions begin as a parameter that tokens are added to."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        tokens = torch.zeros(len(x), 7, 8)
        tokens[:, :1] = net.token
        tokens[:, 1:] = net.a(x)
        placed = net.places.repeat(len(x), 1, 1)
        placed[:, 1:] += tokens[:, 1:]
        return net.c((tokens * placed).relu())

    places = {"token": parameter(1, 1, 8), "places": parameter(1, 7, 8)}
    return Wired(wiring, a=nn.Linear(5, 8), c=nn.Linear(8, 3), **places), torch.randn(2, 6, 5)


@case({"a": 8}, blocked={"c": "output"})
def rows_added_to_part_by_index() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        late = a[:, 1:]
        late[:, torch.tensor([0, 2])] += 1.0
        late.index_add_(1, torch.tensor([1, 3]), a[:, :2].clone())
        return net.c(a.relu())

    return Wired(wiring, a=nn.Linear(5, 8), c=nn.Linear(8, 3)), torch.randn(2, 6, 5)


@case({}, blocked={"a": "write into part of a parameter or buffer"})
def written_into_part_of_a_buffer() -> Built:
    """A cache stays as long as it is, call after call."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        net.cache[:, :6] = net.a(x)
        return net.c(net.cache)

    return Wired(wiring, a=nn.Linear(5, 8), c=nn.Linear(8, 3), cache=nn.Buffer(torch.zeros(2, 9, 8))), torch.randn(
        2, 6, 5
    )


@case({}, blocked={"a": "seen as another kind"})
def written_through_another_kind() -> Built:
    """Pairs of numbers are written through a view of complex ones."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 4, dtype=torch.complex128)
        torch.view_as_real(y)[...] += net.a(x).view(len(x), 4, 2)
        return net.c(torch.view_as_real(y * 2).flatten(1))

    return Wired(wiring, a=nn.Linear(5, 8), c=nn.Linear(8, 3).double()), torch.randn(2, 5)


@case({"a": 6}, blocked={"c": "output"})
def linear_map_resampled() -> Built:
    """A linear layer computes maps of 4 by 4, which are pooled and enlarged: a map is one channel in 16 slots."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        maps = F.max_pool2d(net.a(x).view(len(x), -1, 4, 4), 2)
        return net.c(F.interpolate(maps, scale_factor=2, mode="bilinear"))

    return Wired(wiring, a=nn.Linear(5, 96), c=nn.Conv2d(6, 2, 3, padding=1)), torch.randn(2, 5)


@case({}, blocked={"a": "pooling across channels"})
def pooled_across_channels() -> Built:
    """A pool that runs along the rows of a layer cares for their order."""
    wiring = lambda net, x: net.b(F.avg_pool1d(net.a(x)[:, None], 2)[:, 0])  # noqa: E731
    return Wired(wiring, a=nn.Linear(5, 8), b=nn.Linear(4, 3)), torch.randn(2, 5)


@case({"a": 8}, blocked={"b": "output"})
def padded_and_scaled() -> Built:
    """Zeros in front of a sequence, then a scale per channel: the scaled zero belongs to the scale's channel."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.b(F.pad(net.a(x), (0, 0, 1, 0)) * net.scale)

    net = Wired(wiring, a=nn.Linear(5, 8), b=nn.Linear(8, 3), scale=parameter(8))
    return net, torch.randn(2, 4, 5)


@case({"a": 8}, blocked={"b": "output"})
def padded_and_normed() -> Built:
    """A row of zeros through a layer norm is its bias, channel by channel."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.b(net.norm(F.pad(net.a(x), (0, 0, 1, 0))))

    return Wired(wiring, a=nn.Linear(5, 8), b=nn.Linear(8, 3), norm=nn.LayerNorm(8)), torch.randn(2, 4, 5)


@case({}, blocked={"a": "tied to the input of the network or to fixed data: "})
def tokens_beside_the_input() -> Built:
    """The input's columns stay where they are, and so do rows that the same weight reads: a row with the reason."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.b(torch.cat([x, net.a(x)], 1))

    return Wired(wiring, a=nn.Linear(5, 5), b=nn.Linear(5, 3)), torch.randn(2, 4, 5)


@case({"a": 6}, blocked={"head": "output"})
def written_between_rows_of_one_number() -> Built:
    """The rest of what channels are written into is the same for all of them."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        rows = torch.full((len(x) + 2, 6), 0.5, dtype=x.dtype)
        rows[1:-1] = net.a(x)
        return net.head(rows.tanh())

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(3, 4)


@case(blocked={"a": "", "head": "output"})
def written_between_rows_that_tell_channels_apart() -> Built:
    """It was filled with one number, then changed channel by channel."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        rows = x.new_zeros(len(x) + 2, 6)
        rows[:2].add_(torch.arange(6.0))
        rows[1:-1] = net.a(x)
        return net.head(rows.tanh())

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(3, 4)
