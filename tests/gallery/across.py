"""Operations along other axes than the channels': message passing, sampling, transforms along time, distances."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.core import Inputs, Wired, case, image, parameter

Built = tuple[nn.Module, Inputs]

TARGETS = torch.tensor([0, 1, 1, 2, 0])


def between(operation: Any) -> Built:
    """linear -> operation on five rows of six channels -> linear."""
    net = Wired(lambda net, x: net.head(operation(net.a(x).tanh())), a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    return net, torch.randn(5, 4)


def make_targets(h: Tensor) -> Tensor:
    return TARGETS[:, None].expand(-1, h.shape[1])


@case({"a": 6}, blocked={"head": "output"})
def messages_added() -> Built:
    return between(lambda h: h.new_zeros(3, h.shape[1]).index_add(0, TARGETS, h))


@case({"a": 6}, blocked={"head": "output"})
def messages_scattered() -> Built:
    """scatter_add, and the mean and the largest of the messages."""

    def operation(h: Tensor) -> Tensor:
        zeros, index = h.new_zeros(3, h.shape[1]), make_targets(h)
        largest = zeros.scatter_reduce(0, index, h, "amax", include_self=False)
        return zeros.scatter_add(0, index, h) + zeros.scatter_reduce(0, index, h, "mean") * largest

    return between(operation)


@case({"a b": 6}, blocked={"head": "output"})
def messages_between_two_layers() -> Built:
    """What is written and what it is written into are one channel, position by position."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        y = net.b(x).index_add(0, TARGETS, net.a(x).tanh())
        y[TARGETS[1:3]] = net.a(x)[:2]
        return net.head(y)

    return Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(5, 4)


@case({"a": 6}, blocked={"head": "output"}, probe=lambda: (torch.linspace(-1, 1, 20).view(5, 4), TARGETS.flip(0)))
def messages_along_edges_of_the_input() -> Built:
    """Where the messages go is an input: it is the same for all channels."""

    def wiring(net: Any, x: Tensor, to: Tensor) -> Tensor:
        h = net.a(x).tanh()
        return net.head(torch.zeros_like(h).index_add(0, to, h[to]).index_put((to,), h, accumulate=True))

    return Wired(wiring, a=nn.Linear(4, 6), head=nn.Linear(6, 2)), (torch.randn(5, 4), TARGETS)


@case(blocked={"a": "scatter_add", "head": "output"})
def each_channel_scattered_elsewhere() -> Built:
    """The index differs from channel to channel."""
    return between(lambda h: torch.zeros_like(h).scatter_add(0, torch.arange(30).view(5, 6) % 5, h))


@case(blocked={"a": "varies along", "head": "output"})
def written_into_a_constant() -> Built:
    return between(lambda h: torch.arange(18.0, dtype=h.dtype).view(3, 6).index_add(0, TARGETS, h))


@case(blocked={"a": "along channels", "head": "output"})
def written_along_channels() -> Built:
    return between(lambda h: torch.zeros_like(h).index_put((TARGETS[:, None], TARGETS.new_tensor(range(6))), h))


@case({"a": 6}, blocked={"head": "output"})
def segments_averaged() -> Built:
    return between(lambda h: torch.segment_reduce(h, "mean", lengths=torch.tensor([2, 3]), axis=0))


@case({"a": 6}, blocked={"head": "output"})
def spectrum_along_time() -> Built:
    """Filtered in the frequency domain, along rows."""

    def operation(h: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(h, dim=0)
        return torch.fft.irfft(spectrum[:2], n=5, dim=0) + torch.fft.fft(h, dim=0).abs()

    return between(operation)


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """x (images, steps, channels) with a kernel (channels, steps) of all that came before."""
    n = 2 * x.shape[1]
    return torch.fft.irfft(torch.fft.rfft(x.mT, n=n) * torch.fft.rfft(kernel, n=n), n=n)[..., : x.shape[1]].mT


@case({"a mix": 6}, blocked={"head": "output"})
def state_space_as_a_convolution() -> Built:
    """S4D: a kernel as long as the sequence, computed of two parameters, which is transformed along time."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        h = net.a(x)
        decay = (-net.rate.exp()[..., None] * torch.arange(5)).exp()
        return net.head(h + net.mix(F.gelu(convolve(h, (net.weight[..., None] * decay).sum(1)))))

    layers = {"a": nn.Linear(3, 6), "mix": nn.Linear(6, 6), "head": nn.Linear(6, 2)}
    return Wired(wiring, **layers, rate=parameter(6, 4), weight=parameter(6, 4)), torch.randn(2, 5, 3)


@case({"a": 6}, blocked={"head": "output"})
def learned_kernel_of_a_long_convolution() -> Built:
    """As of Hyena: an entry for each channel and step, transformed along the steps."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.gelu(convolve(net.a(x), net.kernel)))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2), kernel=parameter(6, 5)), torch.randn(2, 5, 3)


@case(blocked={"a": "transformed along it: _fft_r2c", "head": "output"})
def kernel_transformed_along_its_channels() -> Built:
    """A spectrum over channels, of which every entry depends on all of them."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(net.a(x) * torch.fft.fft(net.weight).real)

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2), weight=parameter(6)), torch.randn(5, 3)


@case({"a": 6}, blocked={"head": "output"})
def sparse_graph() -> Built:
    return between(lambda h: torch.sparse.mm(torch.eye(5, dtype=h.dtype).roll(1, 0).to_sparse(), h))


@case({"a": 6}, blocked={"head": "output"})
def bags_of_rows() -> Built:
    return between(lambda h: F.embedding_bag(TARGETS[None], h, mode="mean"))


@case({"table": 6}, blocked={"head": "output"})
def bags_of_words() -> Built:
    """A table of words, whose rows are pinned."""
    parts = {"table": nn.EmbeddingBag(9, 6, mode="max"), "head": nn.Linear(6, 2)}
    return Wired(lambda net, ids: net.head(net.table(ids)), **parts), torch.randint(0, 9, (3, 4))


@case({"a": 6}, blocked={"offset": "coordinates", "head": "output"})
def sampled_where_a_layer_says() -> Built:
    """The coordinates have an order; the channels of what is sampled have none."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        grid = net.offset(x).tanh().permute(0, 2, 3, 1)
        return net.head(F.grid_sample(net.a(x).tanh(), grid, align_corners=False))

    parts = {"a": nn.Conv2d(3, 6, 3), "offset": nn.Conv2d(3, 2, 3), "head": nn.Conv2d(6, 2, 1)}
    return Wired(wiring, **parts), image(size=6)


@case({"a": 6}, blocked={"head": "output"}, unmixable=("a",))
def weighted_by_distances() -> Built:
    """A copy of a channel counts twice in a distance."""
    return between(lambda h: torch.cdist(h, h) @ h)


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def graph_matrix_in_a_buffer() -> Built:
    """Rows are mixed by a constant matrix, from the left, and from the right where they come last."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        h = (net.graph @ net.a(x)).tanh()
        return net.head((net.b(h).mT @ net.graph).mT.sigmoid())

    parts = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 5), "head": nn.Linear(5, 2)}
    return Wired(wiring, graph=torch.randn(7, 7), **parts), torch.randn(7, 4)


@case({"a": 6}, blocked={"head": "output"})
def normalised_graph_for_a_batch() -> Built:
    """The matrix is scaled by its degrees before use, and serves every graph of a batch."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        graph = net.graph / net.graph.sum(0, keepdim=True)
        return net.head(torch.einsum("ij,bjc->bic", graph, net.a(x)).tanh())

    return Wired(wiring, graph=torch.rand(7, 7) + 1, a=nn.Linear(4, 6), head=nn.Linear(6, 2)), torch.randn(3, 7, 4)
