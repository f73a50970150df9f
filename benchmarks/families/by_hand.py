"""Families that no installed package has: graph nets, U-Nets, detectors, diffusion, generators, sequences, mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .family import Call, Family


def _conv(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _conv(3, 12), _conv(12, 20), _conv(20, 32)
        self.up1, self.up2 = nn.ConvTranspose2d(32, 20, 2, 2), nn.ConvTranspose2d(20, 12, 2, 2)
        self.d, self.e, self.out = _conv(40, 20), _conv(24, 12), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        b = self.d(torch.cat([self.up1(c), b], 1))
        return self.out(self.e(torch.cat([self.up2(b), a], 1)))


class DiffusionBlock(nn.Module):
    """A residual block of a denoising U-Net: group norms, the time step added as a shift per channel."""

    def __init__(self, i: int, o: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, i), nn.Conv2d(i, o, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, o), nn.Conv2d(o, o, 3, padding=1)
        self.time, self.skip = nn.Linear(time, o), nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.skip(x)


class SpatialAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = (
            nn.GroupNorm(4, channels),
            *(nn.Conv2d(channels, channels, 1) for _ in range(4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
        return x + self.o((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))


class DiffusionUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.embed = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Sequential(nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 24)),
        )
        self.down, self.halve, self.mid = (
            DiffusionBlock(16, 16, 24),
            nn.Conv2d(16, 32, 3, 2, 1),
            DiffusionBlock(32, 32, 24),
        )
        self.attention, self.up, self.leave = (
            SpatialAttention(32),
            DiffusionBlock(48, 16, 24),
            nn.Conv2d(16, 3, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.arange(1, 5, device=t.device)
        t = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        a = self.down(self.enter(x), t)
        b = self.attention(self.mid(self.halve(a), t))
        return self.leave(self.up(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1), t))


class DiffusionTransformer(nn.Module):
    """A block of DiT: norms without weights, scaled and shifted by the condition."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.patch, self.time = nn.Conv2d(3, width, 4, 4), nn.Linear(8, width)
        self.norm, self.condition = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 6 * width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.out = nn.Linear(width, 48)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        a, b, c, d, e, f = self.condition(F.silu(self.time(t)))[:, None].chunk(6, -1)
        h = self.norm(x) * (1 + a) + b
        x = x + c * self.attention(h, h, h, need_weights=False)[0]
        x = x + d * self.mlp(self.norm(x) * (1 + e) + f)
        return self.out(self.norm(x))


class Bottlenecks(nn.Module):
    """C2f of YOLOv8: halves, each block fed by the last, all concatenated."""

    def __init__(self, i: int, o: int, n: int = 2) -> None:
        super().__init__()
        c = o // 2
        self.enter, self.leave = _conv(i, o, 1), _conv((2 + n) * c, o, 1)
        self.blocks = nn.ModuleList(nn.Sequential(_conv(c, c), _conv(c, c)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Yolo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            _conv(3, 12, 3, 2),
            Bottlenecks(12, 16),
            nn.Sequential(_conv(16, 24, 3, 2), Bottlenecks(24, 24)),
        )
        self.pool, self.squeeze, self.neck = nn.MaxPool2d(5, 1, 2), _conv(72, 24, 1), Bottlenecks(40, 16)
        self.box = nn.ModuleList(nn.Sequential(_conv(c, 16), nn.Conv2d(16, 4, 1)) for c in (16, 24))
        self.kind = nn.ModuleList(nn.Sequential(_conv(c, 16), nn.Conv2d(16, 3, 1)) for c in (16, 24))

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.a(self.stem(x))
        b = self.b(a)
        pooled = self.pool(b)
        b = self.squeeze(torch.cat([b, pooled, self.pool(pooled)], 1))
        a = self.neck(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1))
        return [layer(y) for layers in (self.box, self.kind) for layer, y in zip(layers, (a, b), strict=True)]


class Pyramid(nn.Module):
    """FCOS: a feature pyramid, and one head with group norms for all its levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_conv(3, 16, 3, 2), _conv(16, 24, 3, 2), _conv(24, 32, 3, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (16, 24, 32))
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.kind, self.box, self.scale = (
            nn.Conv2d(16, 3, 3, padding=1),
            nn.Conv2d(16, 4, 3, padding=1),
            nn.Parameter(torch.ones(3)),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        levels, out, above = [], [], None
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        for i in (2, 1, 0):
            here = self.lateral[i](levels[i])
            above = here if above is None else here + F.interpolate(above, scale_factor=2.0)
            h = self.tower(above)
            out += [self.kind(h), (self.box(h) * self.scale[i]).exp()]
        return out


class GraphConvolution(nn.Module):
    """GCN (Kipf and Welling 2017): neighbours averaged by a matrix that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = (adjacency @ self.a(x)).relu()
        x = x + (adjacency @ self.b(x)).relu()
        return adjacency @ self.c(x)


class GraphSage(nn.Module):
    """Messages along a list of edges, summed by index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.own, self.other, self.leave = (
            nn.Linear(6, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 3),
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.enter(x).relu()
        summed = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        return self.leave((self.own(x) + self.other(summed)).relu())


class GraphAttention(nn.Module):
    """GAT (Velickovic et al. 2018): each head scores its edges by two vectors."""

    def __init__(self, heads: int = 3, width: int = 8) -> None:
        super().__init__()
        self.heads, self.enter, self.leave = heads, nn.Linear(6, heads * width, bias=False), nn.Linear(heads * width, 3)
        self.source, self.target = nn.Parameter(torch.randn(heads, width)), nn.Parameter(torch.randn(heads, width))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.enter(x).unflatten(-1, (self.heads, -1))
        scores = (h * self.source).sum(-1)[:, None] + (h * self.target).sum(-1)[None]
        scores = F.leaky_relu(scores, 0.2).masked_fill(adjacency[..., None] == 0, -1e9)
        return self.leave(F.elu(torch.einsum("ijh,jhd->ihd", scores.softmax(1), h)).flatten(1))


class GraphIsomorphism(nn.Module):
    """GIN (Xu et al. 2019), read out over all nodes by layer, on messages sent by scatter_add."""

    def __init__(self) -> None:
        super().__init__()
        mlp = lambda i: nn.Sequential(nn.Linear(i, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 16))  # noqa: E731
        self.a, self.b, self.eps, self.leave = mlp(6), mlp(16), nn.Parameter(torch.zeros(2)), nn.Linear(32, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        seen = []
        for i, layer in enumerate((self.a, self.b)):
            index = edges[1][:, None].expand(-1, x.shape[1])
            summed = torch.zeros_like(x).scatter_add(0, index, x[edges[0]])
            x = layer((1 + self.eps[i]) * x + summed).relu()
            seen.append(x.sum(0))
        return self.leave(torch.cat(seen))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU], **options: Any) -> None:
        super().__init__()
        self.embed, self.core = nn.Embedding(50, 12), kind(12, 16, 2, batch_first=True, **options)
        self.leave = nn.Linear(32 if options.get("bidirectional") else 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.core(self.embed(x))[0].mean(1))


class Dilated(nn.Module):
    """WaveNet: gated dilated convolutions with residual and skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, 16, 1)
        self.gated = nn.ModuleList(nn.Conv1d(16, 32, 2, dilation=2**i) for i in range(3))
        self.back, self.skip = (nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3)) for _ in range(2))
        self.leave = nn.Sequential(nn.ReLU(), nn.Conv1d(16, 16, 1), nn.ReLU(), nn.Conv1d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.enter(x), 0.0
        for gated, back, skip in zip(self.gated, self.back, self.skip, strict=True):
            a, b = gated(x).chunk(2, 1)
            h = a.tanh() * b.sigmoid()
            x, total = back(h) + x[..., -h.shape[-1] :], skip(h)[..., -8:] + total
        return self.leave(total)


class Weighted(nn.Module):
    """A temporal convolutional network with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.a, self.b, self.skip = (
            norm(nn.Conv1d(4, 16, 3, padding=1)),
            norm(nn.Conv1d(16, 16, 3, padding=1)),
            nn.Conv1d(4, 16, 1),
        )
        self.leave = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave((self.b(self.a(x).relu()).relu() + self.skip(x)).relu().mean(-1))


class Points(nn.Module):
    """PointNet: a shared network for every point, the largest of each channel, joined to each point again."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1))
        self.leave = nn.Sequential(nn.Conv1d(64, 24, 1), nn.ReLU(), nn.Conv1d(24, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.own(x)
        return self.leave(torch.cat([h, h.amax(-1, keepdim=True).expand_as(h)], 1))


class Experts(nn.Module):
    """A mixture of experts: all run, the gate weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.leave = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        weights = self.gate(x).softmax(-1)
        return self.leave(x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)))


class StateSpace(nn.Module):
    """S4D: a diagonal linear recurrence, done as a convolution by FFT."""

    def __init__(self, width: int = 16, states: int = 4) -> None:
        super().__init__()
        self.enter, self.mix, self.leave = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.rate, self.weight = nn.Parameter(torch.rand(width, states)), nn.Parameter(torch.randn(width, states))

    def forward(self, x: Tensor) -> Tensor:
        u = self.enter(x)
        t = torch.arange(u.shape[1], dtype=u.dtype, device=u.device)
        kernel = (self.weight[..., None] * (-self.rate.exp()[..., None] * t).exp()).sum(1)
        n = 2 * len(t)
        y = torch.fft.irfft(torch.fft.rfft(u.mT, n=n) * torch.fft.rfft(kernel, n=n), n=n)[..., : len(t)]
        return self.leave(u + self.mix(F.gelu(y.mT)))


class Coupling(nn.Module):
    """RealNVP: half of the channels scales and shifts the other half, then they change places."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for net in self.nets:
            a, b = x.chunk(2, -1)
            scale, shift = net(a).chunk(2, -1)
            x = torch.cat([b * scale.tanh().exp() + shift, a], -1)
        return x


class Autoencoder(nn.Module):
    """A variational autoencoder, at the mean of its code; both the picture and the code are given."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(_conv(3, 12, 3, 2), _conv(12, 24, 3, 2), nn.Flatten(), nn.Linear(24 * 16, 16))
        self.grow, self.leave = nn.Linear(8, 24 * 16), nn.Sequential(
            nn.ConvTranspose2d(24, 12, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(12, 3, 4, 2, 1), nn.Sigmoid()
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.enter(x).chunk(2, 1)
        return self.leave(self.grow(mean).view(len(x), -1, 4, 4)), mean, spread


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
        )
        self.act, self.up, self.leave = nn.PReLU(16), nn.Conv2d(16, 48, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        h = h + self.b(self.act(self.a(h)))
        return self.leave(F.pixel_shuffle(self.up(h), 2)) + F.interpolate(x, scale_factor=2.0)


class Recommender(nn.Module):
    """DLRM: embeddings and dense features, their products in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, 12) for _ in range(3))
        self.dense, self.top = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 12)), nn.Sequential(
            nn.Linear(12 + 6, 16), nn.ReLU(), nn.Linear(16, 1)
        )  # fmt: skip

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        d = self.dense(x)
        t = torch.stack([d, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        rows, columns = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([d, (t @ t.mT)[:, rows, columns]], 1))


class Conformer(nn.Module):
    """A block of a conformer: half feed-forwards, attention, a gated depthwise convolution."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        half = lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 48), nn.SiLU(), nn.Linear(48, width))  # noqa: E731
        self.enter, self.first, self.second, self.leave = nn.Linear(8, width), half(), half(), nn.Linear(width, 5)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.depth, self.down = (
            nn.Conv1d(width, 2 * width, 1),
            nn.Conv1d(width, width, 5, 1, 2, groups=width),
            nn.Conv1d(width, width, 1),
        )
        self.batch = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.first(x) / 2
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        h = F.glu(self.up(self.norm2(x).mT), 1)
        x = x + self.down(F.silu(self.batch(self.depth(h)))).mT
        return self.leave(self.norm3(x + self.second(x) / 2))


class Translator(nn.Module):
    """PyTorch's own transformer: encoder, decoder, cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.leave = nn.Linear(5, 32), nn.Linear(5, 32), nn.Linear(32, 3)
        self.core = nn.Transformer(32, 4, 2, 2, 48, 0.0, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.leave(self.core(self.a(x), self.b(y)))


def _both(i: int, o: int) -> nn.Sequential:
    """Convolved over space, then over time."""
    space, time = nn.Conv3d(i, 12, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(12, o, (3, 1, 1), padding=(1, 0, 0))
    return nn.Sequential(space, nn.BatchNorm3d(12), nn.ReLU(), time, nn.BatchNorm3d(o))


class Video(nn.Module):
    """A (2+1)-dimensional residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b, self.leave = _both(3, 16), _both(16, 16), _both(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        return self.leave((x + self.b(self.a(x).relu())).relu().mean((2, 3, 4)))


class Actor(nn.Module):
    """PPO: one body for the policy and the value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.policy, self.value = nn.Linear(32, 4), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.policy(h).log_softmax(-1), self.value(h)


def _graph() -> Call:
    adjacency = (torch.rand(7, 7) > 0.5).float() + torch.eye(7)
    return torch.randn(7, 6), adjacency / adjacency.sum(1, keepdim=True)


def _edges() -> Call:
    return torch.randn(7, 6), torch.stack([torch.randperm(7), torch.randperm(7)]).repeat(1, 2)


def _times() -> Call:
    return torch.randn(2, 3, 16, 16), torch.rand(2)


def _hand(name: str, build: Callable[[], nn.Module], inputs: Callable[[], Call]) -> Family:
    return Family(f"by hand:{name}", "by hand", build, inputs)


def _noise(*shape: int) -> Callable[[], Call]:
    return lambda: (torch.randn(shape),)


def _tokens() -> Call:
    return (torch.randint(0, 50, (2, 7)),)


BY_HAND = (
    _hand("U-Net", UNet, _noise(1, 3, 16, 16)),
    _hand("diffusion U-Net", DiffusionUNet, _times),
    _hand("diffusion transformer", DiffusionTransformer, lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 8))),
    _hand("YOLOv8", Yolo, _noise(1, 3, 32, 32)),
    _hand("FCOS", Pyramid, _noise(1, 3, 32, 32)),
    _hand("GCN", GraphConvolution, _graph),
    _hand("GraphSAGE", GraphSage, _edges),
    _hand("GAT", GraphAttention, _graph),
    _hand("GIN", GraphIsomorphism, _edges),
    _hand("LSTM", lambda: Recurrent(nn.LSTM), _tokens),
    _hand("GRU, both ways", lambda: Recurrent(nn.GRU, bidirectional=True), _tokens),
    _hand("WaveNet", Dilated, _noise(2, 1, 20)),
    _hand("TCN with weight norm", Weighted, _noise(2, 4, 12)),
    _hand("PointNet", Points, _noise(2, 3, 20)),
    _hand("mixture of experts", Experts, _noise(4, 6)),
    _hand("S4D", StateSpace, _noise(2, 9, 3)),
    _hand("RealNVP", Coupling, _noise(3, 8)),
    _hand("autoencoder", Autoencoder, _noise(2, 3, 16, 16)),
    _hand("super resolution", SuperResolution, _noise(1, 3, 12, 12)),
    _hand("DLRM", Recommender, lambda: (torch.randn(3, 5), torch.randint(0, 20, (3, 3)))),
    _hand("conformer", Conformer, _noise(2, 9, 8)),
    _hand("nn.Transformer", Translator, lambda: (torch.randn(2, 6, 5), torch.randn(2, 4, 5))),
    _hand("R(2+1)D", Video, _noise(1, 3, 4, 8, 8)),
    _hand("actor and critic", Actor, _noise(3, 8)),
)
