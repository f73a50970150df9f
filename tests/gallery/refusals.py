"""Networks that read an order, a value or an identity off their channels: refuse, or be right, but never be wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.core import Inputs, Wired, case, image, parameter, pooled

Built = tuple[nn.Module, Inputs]


def between(operation: Any, hidden: int = 6, read: int = 6) -> Built:
    """linear -> operation -> linear."""
    net = Wired(lambda net, x: net.head(operation(net.a(x))), a=nn.Linear(4, hidden), head=nn.Linear(read, 2))
    return net, torch.randn(3, 4)


@case({"a": 6}, blocked={"head": "output"})
def softmax_over_channels() -> Built:
    return between(lambda a: a.softmax(-1))


@case({"a": 6}, blocked={"head": "output"})
def log_softmax_over_channels() -> Built:
    return between(lambda a: a.log_softmax(-1).exp())


@case(blocked={"a": "cumsum", "head": "output"})
def cumsum_over_channels() -> Built:
    return between(lambda a: a.cumsum(-1))


@case(blocked={"a": "fft", "head": "output"})
def fft_over_channels() -> Built:
    return between(lambda a: torch.fft.fft(a).real)


@case(blocked={"a": "sort", "head": "output"})
def sorted_channels() -> Built:
    return between(lambda a: a.sort(-1).values)


@case(blocked={"a": "topk", "head": "output"})
def topk_over_channels() -> Built:
    return between(lambda a: a.topk(3, -1).values, read=3)


@case(blocked={"a": "", "head": "output"})
def argmax_over_channels() -> Built:
    """The index of the largest channel is looked up in a table."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.head(F.one_hot(a.argmax(-1), 6).to(a.dtype) + 0.1)

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(16, 4)


@case(blocked={"a": "", "head": "output"})
def chosen_by_the_data() -> Built:
    """Every sample reads the channel that its own data points at."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        order = net.b(x).argsort(-1)
        return net.head(torch.gather(a, 1, order).sigmoid())

    return Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(8, 4)


@case(blocked={"a": "", "head": "output"})
def pooling_over_channels() -> Built:
    """avg_pool1d with the channels last: neighbours are averaged in pairs."""
    net = Wired(lambda net, x: net.head(F.avg_pool1d(net.a(x).relu(), 3, 1)), a=nn.Linear(4, 8), head=nn.Linear(6, 2))
    return net, torch.randn(3, 5, 4)


@case(blocked={"a": "", "head": "output"})
def max_pooling_of_channel_pairs() -> Built:
    """Maxout by max_pool1d: only channels of one pair are interchangeable."""
    net = Wired(lambda net, x: net.head(F.max_pool1d(net.a(x).tanh(), 2)), a=nn.Linear(4, 8), head=nn.Linear(4, 2))
    return net, torch.randn(3, 5, 4)


@case(blocked={"a": "", "head": "output"})
def upsampling_of_channels() -> Built:
    """Linear interpolation along the channels."""
    net = Wired(
        lambda net, x: net.head(F.interpolate(net.a(x).tanh(), 11, mode="linear")),
        a=nn.Linear(4, 6), head=nn.Linear(11, 2),
    )  # fmt: skip
    return net, torch.randn(3, 5, 4)


@case(blocked={"stem": "", "head": "output"})
def convolution_over_channels() -> Built:
    """ECA: a 1-d convolution slides over the channels."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        gate = net.eca(pooled(x)[:, None]).sigmoid()
        return net.head(x * gate.mT[..., None])

    parts = {"stem": nn.Conv2d(3, 6, 3), "eca": nn.Conv1d(1, 1, 3, padding=1, bias=False)}
    return Wired(wiring, **parts, head=nn.Conv2d(6, 2, 1)), image()


@case(blocked={"a": "", "head": "output"})
def convolution_over_space_and_channels() -> Built:
    """A 3-d convolution with the channels as depth."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.conv(F.relu(net.a(x))[:, None])).flatten(1, 2))

    parts = {"a": nn.Conv2d(3, 6, 3), "conv": nn.Conv3d(1, 2, 3, padding=1), "head": nn.Conv2d(12, 2, 1)}
    return Wired(wiring, **parts), image(size=8)


@case(blocked={"head": "output"})
def difference_of_neighbours() -> Built:
    return between(lambda a: a[:, 1:].tanh() - a[:, :-1], read=5)


@case({"a": 5}, blocked={"head": "output"})
def one_channel_is_special() -> Built:
    """Channel 0 gates all others."""
    return between(lambda a: a[:, 1:] * a[:, :1].sigmoid(), read=5)


@case(blocked={"head": "output"})
def branch_on_one_channel() -> Built:
    """Python's `if` reads the value of one channel."""
    return between(lambda a: a * 3 if bool(a[0, 0] > a[0, 1]) else a.exp())


@case(blocked={"head": "output"})
def number_read_from_one_channel() -> Built:
    """A Python number taken out of the network and put back."""
    return between(lambda a: a.tanh() + float(a[0, 0]))


@case(blocked={"a": "", "head": "output"})
def through_numpy() -> Built:
    """What leaves PyTorch is out of sight; what comes back is a constant."""
    return between(lambda a: torch.from_numpy(a.detach().numpy().copy()).tanh())


@case(blocked={"a": "", "head": "output"})
def through_a_list() -> Built:
    return between(lambda a: torch.tensor(a.tolist(), dtype=a.dtype).tanh())


@case(blocked={"head": "output"})
def through_data() -> Built:
    """`.data` and `.detach()` are no escape."""
    return between(lambda a: a.data.detach().clone().requires_grad_(False).tanh())


@case({"a": (2, 4)}, partial=True, blocked={"head": "output"})
def masked_channels() -> Built:
    """A fixed mask says which nonlinearity a channel has: only channels with the same one are interchangeable."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.head(torch.where(net.mask, a.relu(), a.sin()))

    mask = torch.tensor([True, False, True, True, False, True])
    return Wired(wiring, a=nn.Linear(4, 6), mask=mask, head=nn.Linear(6, 2)), torch.randn(3, 4)


def varied_mask() -> Inputs:
    return torch.linspace(-1, 1, 12).view(3, 4), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 1.0]).expand(3, 6)


@case(blocked={"a": "input", "head": "output"}, probe=varied_mask)
def masked_by_an_input() -> Built:
    """A mask over channels is an input; in the example it happens to be all ones."""

    def wiring(net: Any, x: Tensor, mask: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x)) * mask)

    net = Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    return net, (torch.randn(3, 4), torch.ones(3, 6))


def varied_boolean() -> Inputs:
    return torch.linspace(-1, 1, 12).view(3, 4), torch.tensor([True, False, True, False, False, True]).expand(3, 6)


@case(blocked={"a": "input", "head": "output"}, probe=varied_boolean)
def selected_by_a_boolean_input() -> Built:
    def wiring(net: Any, x: Tensor, mask: Tensor) -> Tensor:
        return net.head(net.a(x).tanh().masked_fill(mask, -1.0))

    net = Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    return net, (torch.randn(3, 4), torch.ones(3, 6, dtype=torch.bool))


def varied_tokens() -> Inputs:
    return torch.linspace(-1, 1, 30).view(2, 5, 3), torch.tensor([[True, True, False, True, True], [True] * 5])


@case({"a": 6}, blocked={"head": "output"}, probe=varied_tokens)
def masked_tokens_by_an_input() -> Built:
    """A padding mask over tokens, all ones in the example, touches all channels alike."""

    def wiring(net: Any, x: Tensor, mask: Tensor) -> Tensor:
        a = net.a(x).tanh().masked_fill(~mask[..., None], 0.0)
        return net.head(a.sum(1) / mask.sum(1, keepdim=True))

    net = Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2))
    return net, (torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool))


@case(blocked={"a": "input", "head": "output"})
def gated_by_the_input() -> Built:
    """Every hidden channel is multiplied by one entry of the input."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x)) * x)

    return Wired(wiring, a=nn.Linear(6, 6), head=nn.Linear(6, 2)), torch.randn(3, 6)


def other_vector() -> Inputs:
    return torch.linspace(-1, 2, 18).view(3, 6)


@case(blocked={"a": "input", "head": "output"}, probe=other_vector)
def gated_by_the_input_uniform() -> Built:
    """The same, with an example input of zeros and ones: what is equal in the example need not be equal."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.gelu(net.a(x)) * x)

    return Wired(wiring, a=nn.Linear(6, 6), head=nn.Linear(6, 2)), torch.ones(3, 6)


@case({"a": 6}, blocked={"head": "output"}, probe=lambda: torch.linspace(-1, 2, 12).view(3, 4))
def all_zero_input() -> Built:
    """The customary torch.zeros(1, 3, 224, 224): values are no evidence."""
    net = Wired(lambda net, x: net.head(F.gelu(net.a(x))), a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    return net, torch.zeros(3, 4)


@case(blocked={"left": "", "right": "", "head": "output"})
def bilinear_layer() -> Built:
    """nn.Bilinear has a three-axis weight; two of them consume."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(net.both(net.left(x).tanh(), net.right(x).tanh()).tanh())

    parts = {"left": nn.Linear(4, 5), "right": nn.Linear(4, 6), "both": nn.Bilinear(5, 6, 7), "head": nn.Linear(7, 2)}
    return Wired(wiring, **parts), torch.randn(3, 4)


@case({"lift": 6, "": 5}, blocked={"head": "output"})
def fourier_layer() -> Built:
    """FNO: complex weights between two Fourier transforms over space."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = net.lift(x)
        spectrum = torch.fft.rfft2(x)[..., :3, :3]
        spectrum = torch.einsum("bixy,ioxy->boxy", spectrum, torch.view_as_complex(net.weight))
        return net.head(F.gelu(torch.fft.irfft2(spectrum, s=x.shape[-2:])))

    weight = parameter(6, 5, 3, 3, 2)
    return Wired(wiring, lift=nn.Conv2d(3, 6, 1), weight=weight, head=nn.Conv2d(5, 2, 1)), image(size=8)


@case(blocked={"lift": "a complex matrix", "head": "output"})
def complex_parameter() -> Built:
    """Between two Fourier transforms over time; a complex parameter is no constant, but not followed."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(net.lift(x), dim=1) @ net.weight
        return net.head(torch.fft.irfft(spectrum, n=x.shape[1], dim=1))

    weight = nn.Parameter(torch.randn(6, 5, dtype=torch.cfloat))
    return Wired(wiring, lift=nn.Linear(3, 6), weight=weight, head=nn.Linear(5, 2)), torch.randn(2, 8, 3)


@case(blocked={"offset": "", "head": "output"})
def deformable_sampling() -> Built:
    """Where to look is computed by a layer: its two outputs are coordinates."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        grid = net.offset(a).tanh().permute(0, 2, 3, 1)
        return net.head(F.grid_sample(a, grid, align_corners=False))

    parts = {"a": nn.Conv2d(3, 6, 3), "offset": nn.Conv2d(6, 2, 3, padding=1), "head": nn.Conv2d(6, 2, 1)}
    return Wired(wiring, **parts), image(size=8)


@case(blocked={"head": "output"})
def complex_numbers() -> Built:
    """Neighbouring channels are real and imaginary part (rotary embeddings of the original Llama)."""

    def operation(a: Tensor) -> Tensor:
        pairs = torch.view_as_complex(a.unflatten(-1, (3, 2)))
        turn = torch.polar(torch.ones(3, dtype=a.dtype), torch.arange(3, dtype=a.dtype))
        return torch.view_as_real(pairs * turn).flatten(-2).tanh()

    return between(operation)


@case(blocked={"head": "output"})
def distances() -> Built:
    """Radial basis functions: cdist to learned centres."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.exp(-torch.cdist(net.a(x), net.centres)))

    return Wired(wiring, a=nn.Linear(4, 6), centres=parameter(5, 6), head=nn.Linear(5, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def scattered() -> Built:
    """Channels written to places given by an integer buffer."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        y = torch.zeros(len(x), 8, dtype=a.dtype).index_add(1, net.places, a)
        return net.head(y.scatter(1, net.places[:2].expand(len(x), 2), 2.0).tanh())

    places = torch.tensor([7, 2, 5, 0, 1, 3])
    return Wired(wiring, a=nn.Linear(4, 6), places=places, head=nn.Linear(8, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def index_written() -> Built:
    """Channels overwritten by advanced indexing, and by a boolean mask."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        a[:, net.places] = net.b(x)
        a[a > 1] = 0.5
        return net.head(a.tanh())

    places = torch.tensor([4, 0])
    return Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 2), places=places, head=nn.Linear(6, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def outer_sum() -> Built:
    """a_i + b_j for all i and j, read by a linear layer."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head((net.a(x)[:, :, None] + net.b(x)[:, None, :]).tanh().flatten(1))

    return Wired(wiring, a=nn.Linear(4, 3), b=nn.Linear(4, 5), head=nn.Linear(15, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def polynomial_of_the_index() -> Built:
    """Channels are weighted by arange: none is like another."""
    return between(lambda a: (a.tanh() * torch.arange(6, dtype=a.dtype)).sin())


@case(blocked={"head": "output"})
def noise_of_a_fixed_seed() -> Built:
    """Noise drawn from a generator of its own is a constant that differs from channel to channel."""

    def operation(a: Tensor) -> Tensor:
        noise = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return (a + noise.to(a.dtype)).tanh()

    return between(operation)


@case({"a": 6}, partial=True, blocked={"head": "output"})
def reduction_to_one_number() -> Built:
    """mean, var, logsumexp and norm over channels do not care about their order."""

    def operation(a: Tensor) -> Tensor:
        sizes = [a.mean(-1), a.var(-1), a.logsumexp(-1), a.norm(dim=-1), a.amax(-1), a.prod(-1)]
        return torch.stack(sizes, -1)

    return between(operation)


@case({"a": 6}, partial=True, blocked={"head": "output"})
def median_over_channels() -> Built:
    return between(lambda a: torch.cat([a.tanh(), a.median(-1, keepdim=True).values], -1), read=7)


@case({"a": 6}, partial=True)
def summed_to_the_output() -> Built:
    """The output is the sum over hidden channels: nothing consumes them, and a copy would count twice."""
    return Wired(lambda net, x: net.a(x).relu().sum(-1), a=nn.Linear(4, 6)), torch.randn(3, 4)


@case(blocked={"a": "", "head": "output"})
def index_of_the_largest() -> Built:
    """`max` returns values, which do not care about order, and indices, which do."""

    def operation(a: Tensor) -> Tensor:
        return torch.cat([a.tanh(), a.max(-1, keepdim=True).indices.to(a.dtype)], -1)

    net, _ = between(operation, read=7)
    return net, torch.randn(16, 4)


@case(blocked={"a": "output"})
def view_without_permute() -> Built:
    """The classical mistake: (n, c, h, w).view(n, h * w, c) mixes channels and space."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        return net.head(a.view(len(x), 16, 4))

    return Wired(wiring, a=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 2)), image(size=6)


HIDDEN_WEIGHT = torch.linspace(-1, 1, 30).view(5, 6)
HIDDEN_KERNEL = torch.linspace(-1, 1, 54).view(6, 1, 3, 3)


@case(blocked={"a": "", "head": "output"})
def unregistered_weight() -> Built:
    """A weight that is no parameter and no buffer cannot be permuted."""
    return between(lambda a: F.linear(a.tanh(), HIDDEN_WEIGHT.to(a.dtype)), read=5)


@case(blocked={"head": "output"})
def unregistered_depthwise_kernel() -> Built:
    """Fixed kernels that differ from channel to channel."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x).tanh()
        return net.head(F.conv2d(a, HIDDEN_KERNEL.to(a.dtype), groups=6))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(6, 2, 1)), image(size=8)


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def one_hot_input() -> Built:
    """Integers that become vectors inside: the columns of `a` belong to the input."""

    def wiring(net: Any, ids: Tensor) -> Tensor:
        x = F.one_hot(ids, 7).to(net.a.weight.dtype)
        return net.head(net.b(net.a(x).tanh()).relu())

    net = Wired(wiring, a=nn.Linear(7, 6), b=nn.Linear(6, 5), head=nn.Linear(5, 2))
    return net, torch.randint(0, 7, (2, 5))


@case(blocked={"head": "output"})
def different_powers() -> Built:
    """torch.pow with a list of exponents: a constant that no multiplication shows."""
    return between(lambda a: torch.pow(a.sigmoid(), torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0], dtype=a.dtype)))


@case(blocked={"head": "output"})
def clamped_by_a_constant() -> Built:
    return between(lambda a: torch.clamp(a, max=torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 2.0], dtype=a.dtype)))


@case(blocked={"head": "output"})
def branched_on_slices() -> Built:
    """The same operations in another order on the second half."""
    return between(lambda a: torch.cat([a[:, :3].relu().sin(), a[:, 3:].sin().relu()], 1))


@case(blocked={"head": "output"})
def different_padding_of_halves() -> Built:
    """Convolved alike, but shifted differently over space before."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        u, v = net.a(x).relu().chunk(2, 1)
        return net.head(torch.cat([F.pad(u, (2, 0)), F.pad(v, (0, 2))], 1))

    return Wired(wiring, a=nn.Conv1d(3, 6, 3), head=nn.Conv1d(6, 2, 3)), torch.randn(2, 3, 9)


@case(blocked={"head": "output"})
def different_pooling_of_halves() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        u, v = net.a(x).chunk(2, 1)
        return net.head(torch.cat([F.max_pool2d(u, 2), F.avg_pool2d(v, 2)], 1))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(6, 2, 3)), image(size=10)


@case(blocked={"head": "output"})
def different_norms_of_halves() -> Built:
    """Statistics over space for one half, none for the other (instance-batch norm without parameters)."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        u, v = net.a(x).chunk(2, 1)
        return net.head(torch.cat([F.instance_norm(u), v], 1).relu())

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), head=nn.Conv2d(6, 2, 3)), image(size=10)


@case(blocked={"head": "output"})
def different_steps_of_halves() -> Built:
    """One half read at the first step, the other at the last."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x).tanh()
        return net.head(torch.cat([a[:, 0, :3], a[:, -1, 3:]], -1))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(2, 4, 3)


@case({"a": 6}, blocked={"g": "varies along", "head": "output"})
def tokens_gated_by_their_means() -> Built:
    """One channel per token, multiplied by the mean of that token: the mean has no channels, but tells tokens apart."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(net.g(x.flatten(1)) * net.a(x).tanh().mean(-1))

    return Wired(wiring, a=nn.Linear(3, 6), g=nn.Linear(15, 5), head=nn.Linear(5, 2)), torch.randn(2, 5, 3)


@case(blocked={"g": "varies along", "head": "output"})
def tokens_gated_by_one_map() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(net.g(x.flatten(1)) * net.a(x).sigmoid().squeeze(-1))

    return Wired(wiring, a=nn.Linear(3, 1), g=nn.Linear(15, 5), head=nn.Linear(5, 2)), torch.randn(2, 5, 3)


@case(
    blocked={"a": "index", "head": "output"}, probe=lambda: (torch.linspace(-1, 1, 12).view(3, 4), torch.tensor([1, 1]))
)
def indexed_by_an_input() -> Built:
    """Which channels are read is an input; the example reads some, another call reads others."""

    def wiring(net: Any, x: Tensor, index: Tensor) -> Tensor:
        return net.head(net.a(x).tanh().index_select(1, index))

    net = Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(2, 2))
    return net, (torch.randn(3, 4), torch.tensor([4, 0]))


@case(blocked={"a": "", "head": "output"})
def triangle_of_channels() -> Built:
    """tril sets the channels apart: each is zero from another row on."""
    net = Wired(lambda net, x: net.head(net.a(x).tril()), a=nn.Linear(3, 6), head=nn.Linear(6, 2))
    return net, torch.randn(5, 3)


@case(blocked={"head": "output"})
def rolled_copies() -> Built:
    """Channels and their sines, rolled by half: of a channel's two places now the first, now the second is the sine."""
    return between(lambda a: torch.cat([a, a.sin()], -1).roll(3, -1), read=12)


@case(blocked={"head": "output"})
def norm_groups_of_rolled_copies() -> Built:
    """Both groups of the norm see all channels, but not the same of their two copies."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.head(net.norm(torch.cat([a, a.sin()], -1).roll(2, -1)))

    return Wired(wiring, a=nn.Linear(4, 4), norm=nn.GroupNorm(2, 8), head=nn.Linear(8, 2)), torch.randn(3, 4)


@case(blocked={"head": "output"})
def some_copies_written() -> Built:
    """Every second entry of two copies of three channels: of each channel one copy, the first or the second."""

    def operation(a: Tensor) -> Tensor:
        copies = a.repeat(1, 2)
        copies[:, ::2].tanh_()
        return copies

    return between(operation, hidden=3)
