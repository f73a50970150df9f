"""Weights that are not plain: tied, normalised, masked, factorised, generated; frozen networks and low precision."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from gallery.core import Inputs, Wired, case, chain, conv_bn, image, parameter, pooled

Built = tuple[nn.Module, Inputs]


@case({"a": 12}, blocked={"b": "output"}, unmixable=("a",))
def weight_norm() -> Built:
    """Columns of `b` are divided by the length of its rows: merging two of them changes the length."""
    wn = parametrizations.weight_norm
    return chain(a=wn(nn.Linear(6, 12)), relu=nn.ReLU(), b=wn(nn.Linear(12, 3))), torch.randn(3, 6)


@case({"a": 8}, blocked={"b": "output"}, unmixable=("a",))
def weight_norm_old() -> Built:
    """The older form, a forward pre-hook that writes a plain tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = nn.utils.weight_norm(nn.Linear(6, 8)), nn.utils.weight_norm(nn.Linear(8, 3))
    return detached(chain(a=a, relu=nn.ReLU(), b=b), torch.randn(3, 6))


def detached(model: nn.Module, inputs: Tensor) -> Built:
    """Run once without gradients, so that weights made by hooks are leaves and the network can be copied."""
    with torch.no_grad():
        model(inputs)
    return model, inputs


@case({"a b": 8}, unmixable=("a b",))
def spectral_norm() -> Built:
    """The largest singular value of `b` is computed with a buffer that has one entry per channel of `a`."""
    sn = parametrizations.spectral_norm
    return chain(a=sn(nn.Linear(6, 8)), relu=nn.ReLU(), b=sn(nn.Linear(8, 3))), torch.randn(3, 6)


@case(blocked={"b": "output"})
def orthogonal() -> Built:
    """A weight that is a matrix exponential: no single channel can be cut out of it."""
    a = parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="matrix_exp")
    return chain(a=a, relu=nn.ReLU(), b=nn.Linear(6, 3)), torch.randn(3, 6)


@case({"a": 6, "b": 5}, blocked={"head": "output"}, unmixable=("a", "b"))
def weight_standardisation() -> Built:
    """Each filter is centred and scaled by its own statistics at run time."""

    def standardised(conv: nn.Conv2d, x: Tensor) -> Tensor:
        weight = conv.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, conv.bias)

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(standardised(net.a, x))
        return net.head(F.relu(standardised(net.b, x)))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 5, 3), head=nn.Conv2d(5, 2, 1)), image()


@case({"a": 6}, blocked={"b": "output"})
def weight_times_a_constant() -> Built:
    """Equalised learning rate: the weight is multiplied by one number."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, net.a.weight * 0.5, net.a.bias))
        return F.conv2d(x, 2.0 * net.b.weight, net.b.bias)

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 2, 3)), image()


@case({"a": 6, "": 5}, blocked={"head": "output"})
def numbers_spread_by_vectors() -> Built:
    """Each number of a table times a vector of its own, as in FT-Transformer; its bias and a class token follow."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(-1) * net.scales + net.shifts
        tokens = torch.cat([net.token.expand(len(x), 1, 5), tokens], 1)
        return net.head(net.a(tokens).relu().mean(1))

    parts = {"scales": parameter(4, 5), "shifts": parameter(4, 5), "token": parameter(1, 1, 5)}
    return Wired(wiring, a=nn.Linear(5, 6), head=nn.Linear(6, 2), **parts), torch.randn(3, 4)


@case({"a": 7}, blocked={"b": "output"}, unmixable=("a",))
def positive_weights() -> Built:
    """softplus(weight): the sum of two columns is not the column of the sum."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, F.softplus(net.a.weight), net.a.bias))
        return F.linear(x, F.softplus(net.b.weight), net.b.bias)

    return Wired(wiring, a=nn.Linear(3, 7), b=nn.Linear(7, 2)), torch.randn(4, 3)


@case({"a": 7}, blocked={"b": "output"}, unmixable=("a",))
def masked_weights() -> Built:
    """Unstructured pruning by hand: a 0/1 mask of the weight's shape, kept as a buffer."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, net.a.weight * net.mask_a, net.a.bias))
        return F.linear(x, net.b.weight * net.mask_b, net.b.bias)

    masks = {"mask_a": (torch.rand(7, 3) > 0.4).float(), "mask_b": (torch.rand(2, 7) > 0.4).float()}
    return Wired(wiring, a=nn.Linear(3, 7), b=nn.Linear(7, 2), **masks), torch.randn(4, 3)


@case({"a": 7}, blocked={"b": "output"}, unmixable=("a",))
def pruned_by_torch() -> Built:
    """torch.nn.utils.prune: weight_orig * weight_mask, computed by a forward pre-hook."""
    net = chain(a=nn.Linear(3, 7), relu=nn.ReLU(), b=nn.Linear(7, 2))
    prune.l1_unstructured(net[0], "weight", amount=0.3)
    prune.l1_unstructured(net[2], "weight", amount=0.3)
    return detached(net, torch.randn(4, 3))


@case({"a": 7}, blocked={"b": "output"}, unmixable=("a",))
def bias_pruned_by_torch() -> Built:
    """What becomes one channel adds up the biases, and a product of sums is no sum of products."""
    net = chain(a=nn.Linear(3, 7), relu=nn.ReLU(), b=nn.Linear(7, 2))
    prune.l1_unstructured(net[0], "bias", amount=0.3)
    return detached(net, torch.randn(4, 3))


@case({"w": 10, "": 4}, blocked={"head": "output"})
def lora() -> Built:
    """weight + up @ down: the rank is a group of its own."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(F.linear(x, net.w.weight + net.up @ net.down)))

    parts = {"w": nn.Linear(6, 10), "up": parameter(10, 4), "down": parameter(4, 6), "head": nn.Linear(10, 3)}
    return Wired(wiring, **parts), torch.randn(3, 6)


@case({"w up": 10, "down": 4}, blocked={"head": "output"})
def lora_as_layers() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.w(x) + 0.5 * net.up(net.down(x))))

    parts = {"down": nn.Linear(6, 4, bias=False), "up": nn.Linear(4, 10, bias=False), "w": nn.Linear(6, 10)}
    return Wired(wiring, **parts, head=nn.Linear(10, 3)), torch.randn(3, 6)


@case({"enc": 7}, unmixable=("enc",))
def tied_autoencoder() -> Built:
    """The decoder is the encoder transposed: one axis produces and consumes."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return F.linear(F.relu(net.enc(x)), net.enc.weight.t(), net.bias)

    return Wired(wiring, enc=nn.Linear(5, 7), bias=parameter(5)), torch.randn(4, 5)


@case({"a b": 6, "b": 4}, blocked={"head": "output"}, unmixable=("a b", "b"))
def tied_convolutions() -> Built:
    """conv_transpose2d with the weight of a convolution: channels come back to where they were."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        y = F.relu(net.b(x))
        return net.head(F.relu(x + F.conv_transpose2d(y, net.b.weight)))

    return Wired(wiring, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 4, 3), head=nn.Conv2d(6, 2, 1)), image()


@case(blocked={"gen": "", "head": "output"})
def hyper_network() -> Built:
    """The kernel of a convolution is the output of a linear layer."""

    def wiring(net: Any, x: Tensor, z: Tensor) -> Tensor:
        kernel = net.gen(z).view(6, 3, 3, 3)
        return net.head(F.relu(F.conv2d(x, kernel)))

    return Wired(wiring, gen=nn.Linear(4, 162), head=nn.Conv2d(6, 2, 1)), (image(), torch.randn(4))


@case({"router": 5}, partial=True, blocked={"head": "output"})
def conditional_convolution() -> Built:
    """CondConv: a kernel per sample, mixed from several by a router, applied as one grouped convolution."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        mix = net.gate(F.relu(net.router(pooled(x)))).softmax(1)
        kernels = (mix @ net.kernels.flatten(1)).view(-1, 3, 3, 3)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=len(x))
        return net.head(F.relu(y.view(len(x), 4, *y.shape[2:])))

    parts = {"router": nn.Linear(3, 5), "gate": nn.Linear(5, 2), "kernels": parameter(2, 4, 3, 3, 3)}
    return Wired(wiring, **parts, head=nn.Conv2d(4, 2, 1)), image()


@case({"stem b": 8, "a": 6}, blocked={"head": "output"})
def frozen() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        return net.head(pooled(F.relu(net.b(F.relu(net.a(x))) + x)))

    convs = {"stem": conv_bn(3, 8), "a": conv_bn(8, 6), "b": conv_bn(6, 8)}
    return Wired(wiring, **convs, head=nn.Linear(8, 2)).requires_grad_(False), image()


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def bfloat16() -> Built:
    net = chain(
        a=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), relu=nn.ReLU(), b=nn.Conv2d(6, 5, 3), norm=nn.GroupNorm(1, 5),
        silu=nn.SiLU(), head=nn.Conv2d(5, 2, 1),
    )  # fmt: skip
    return net.bfloat16(), image().bfloat16()


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def half_precision() -> Built:
    net = chain(a=nn.Linear(3, 6), norm=nn.LayerNorm(6), gelu=nn.GELU(), b=nn.Linear(6, 5), relu=nn.ReLU(),
                head=nn.Linear(5, 2))  # fmt: skip
    return net.half(), torch.randn(4, 3).half()


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def mixed_precision() -> Built:
    """Linear layers in bfloat16, norms in float32, casts in between."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        y = net.norm(net.a(x).float()).to(x.dtype)
        return net.head(F.relu(net.b(F.gelu(y)))).float()

    layers = {name: nn.Linear(*size).bfloat16() for name, size in {"a": (3, 6), "b": (6, 5), "head": (5, 2)}.items()}
    return Wired(wiring, **layers, norm=nn.LayerNorm(6)), torch.randn(4, 3).bfloat16()


@case({"a": 6}, blocked={"head": "output"})
def linear_in_autocast() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            return net.head(F.relu(net.a(x)))

    return Wired(wiring, a=nn.Linear(3, 6), head=nn.Linear(6, 2)), torch.randn(4, 3)


@case({"a": 6, "b splines": 5}, blocked={"head": "output"})
def splines_of_each_channel() -> Built:
    """A Kolmogorov-Arnold layer: four functions of each channel, read by a weight (outputs, channels, functions)."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        bumps = torch.exp(-((a[..., None] - net.grid) ** 2))
        y = net.b(F.silu(a)) + torch.einsum("bik,oik->bo", bumps, net.splines.weight)
        return net.head(y.tanh())

    splines = nn.Module()
    splines.weight = parameter(5, 6, 4)
    parts = {"a": nn.Linear(3, 6), "b": nn.Linear(6, 5), "splines": splines, "head": nn.Linear(5, 2)}
    return Wired(wiring, grid=torch.linspace(-2, 2, 4), **parts), torch.randn(3, 3)


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def stacked_functions_of_each_channel() -> Built:
    """Each function stacked behind the others, read by a weight (outputs, channels, functions)."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.head(torch.einsum("bik,oik->bo", torch.stack([a, a.sin(), a.cos()], -1), net.b.weight).tanh())

    b = nn.Module()
    b.weight = parameter(5, 6, 3)
    return Wired(wiring, a=nn.Linear(3, 6), b=b, head=nn.Linear(5, 2)), torch.randn(3, 3)


@case({"a": 6, "b": 5}, blocked={"head": "output"})
def splines_of_which_a_linear_layer_reads_the_weight() -> Built:
    """The same with the weight flattened, as in F.linear(functions.flatten(1), weight.flatten(1))."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        a = net.a(x)
        bumps = torch.exp(-((a[..., None] - net.grid) ** 2))
        return net.head(F.linear(bumps.flatten(1), net.b.weight.flatten(1)).tanh())

    b = nn.Module()
    b.weight = parameter(5, 6, 4)
    return Wired(wiring, grid=parameter(6, 4), a=nn.Linear(3, 6), b=b, head=nn.Linear(5, 2)), torch.randn(3, 3)
