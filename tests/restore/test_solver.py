"""Many batches in lockstep: what one call of all images gives, within a bound, and whatever goes wrong is told."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import intrafusion
import intrafusion.restore.solver as solver_file
from intrafusion import IntrafusionWarning, ModelError, Recipe, RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import as_call, cut_call
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.restore import LeastSquares
from intrafusion.restore.places import PlaceSampler
from intrafusion.restore.ridge import Ridge
from intrafusion.restore.row_store import RowStore
from intrafusion.restore.shelf import Shelf, find_bound
from intrafusion.restore.targets import record_targets

WIDTH = 12


class Convolutions(nn.Module):
    """A stem, two residual blocks of which one changes the width, a head; one norm is not a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.a1, self.a2 = nn.Conv2d(8, 20, 3, padding=1), nn.Conv2d(20, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b1, self.b2, self.short = (
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 10, 3, stride=2),
            nn.Conv2d(8, 10, 3, stride=2),
        )
        self.group, self.head = nn.GroupNorm(1, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.a2(F.relu(self.a1(x)))).add_(x))
        x = self.b2(F.relu(self.b1(x))) + self.short(x)
        return self.head(F.relu(self.group(x)).mean((2, 3)))


class Attention(nn.Module):
    """A post-norm block of a transformer, with a gated MLP; padded tokens are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norms = nn.Embedding(30, WIDTH), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 28), nn.Linear(WIDTH, 28), nn.Linear(28, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, attention_mask[:, None, None].bool())
        x = self.norms[0](x + self.out(seen.transpose(1, 2).flatten(2)))
        x = self.norms[1](x + self.down(F.silu(self.gate(x)) * self.up(x)))
        return self.head(x[:, 0])


def images(n: int = 40, size: int = 9) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def texts(lengths: Sequence[int], longest: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(30, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


Made = tuple[nn.Module, ChannelGraph, Any]


def reduce(model: nn.Module, example: Any, **options: Any) -> Made:
    model = randomise_(model).eval()
    graph = intrafusion.inspect(model, example)
    plan = intrafusion.decide(model, graph, Recipe.of(**{"keep": 0.6, "reducer": "select", **options}))
    return model, graph, intrafusion.apply(model, plan, example, graph=graph)


def solve(made: Made, batches: Sequence[Inputs], solver: LeastSquares | None = None, **options: Any) -> Any:
    model, graph, reduced = made
    small = copy_model(reduced.model).eval()
    found = (solver or LeastSquares()).solver.solve_(small, reduced.plan.maps, model, graph, batches, **options)
    return small, found


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(named_tensors(a).values(), named_tensors(b).values(), strict=True)
    return max(
        float(((x - y).abs().max() / (y.abs().max() + 1e-9)).detach()) for x, y in pairs if x.is_floating_point()
    )


def call(x: Tensor) -> Inputs:
    return as_call(x)


# ---- the same as in one call ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [20_000, 300], ids=["all places", "sampled"])
@pytest.mark.parametrize("size", [16, 39, 1])
def test_batches_give_what_one_call_gives(size: int, rows: int) -> None:
    made, solver = reduce(Convolutions(), images(1)), LeastSquares(rows=rows)
    small, found = solve(made, [call(images())], solver)
    cut, same = solve(made, cut_call(call(images()), size), solver)
    assert found.changes.keys() == same.changes.keys() >= {"a1", "a2", "b1", "b2", "head"}
    assert found.norms.keys() == same.norms.keys() == {"group.weight", "group.bias"}
    assert distance(cut, small) < 2e-5
    assert distance(small, made[2].model) > 0.05


@pytest.mark.parametrize("drift", [True, False])
def test_texts_of_one_length_in_batches(drift: bool) -> None:
    given = texts([9, 3, 7, 9, 5, 6, 2, 8, 4, 9, 1, 7] * 3, 9)
    example = {name: t[:2] for name, t in given.items()}
    made, solver = reduce(Attention(), example), LeastSquares(drift=drift)
    whole, found = solve(made, [as_call(given)], solver)
    cut, same = solve(made, cut_call(as_call(given), 8), solver)
    assert found.changes.keys() == same.changes.keys()
    assert found.norms.keys() == same.norms.keys()
    assert {"norms.0.weight", "norms.1.bias"} <= found.norms.keys()
    assert distance(cut, whole) < 1e-5


def test_batches_of_texts_of_other_lengths() -> None:
    """Each padded to its own longest; in one call all are padded to the longest of all."""
    lengths = [5, 3, 4, 5, 9, 7, 8, 2, 6, 1, 4, 6] * 3
    given = texts(lengths, 9)
    made = reduce(Attention(), {name: t[:2] for name, t in given.items()})
    whole, found = solve(made, [as_call(given)])
    cut = [{n: t[i : i + 4, : max(lengths[i : i + 4])] for n, t in given.items()} for i in range(0, 36, 4)]
    parts, same = solve(made, [as_call(batch) for batch in cut])
    assert found.changes.keys() == same.changes.keys()
    assert found.norms.keys() == same.norms.keys()
    assert distance(parts, whole) < 1e-5


def test_rows_say_of_which_image_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixel that a 1 x 1 layer reads is that of its image."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten())
    made, seen = reduce(model, images(1), include="0"), {}
    monkeypatch.setattr(
        solver_file._Solving, "solve_layer_", lambda self, layer, rows: seen.setdefault(layer.name, rows) and False
    )
    solve(made, cut_call(call(images()), 15), LeastSquares(rows=200))
    rows, own = seen["0"], images().movedim(1, -1)
    assert len(rows.inputs) == len(rows.images) == 200
    for row, image in zip(rows.inputs, rows.images, strict=True):
        assert bool((own[int(image)] == row).all(-1).any())


# ---- within a bound -------------------------------------------------------------------------------------------------


def test_what_a_file_holds_comes_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batches = reduce(Convolutions(), images(1)), cut_call(call(images(40, 33)), 8)
    free, _ = solve(made, batches)
    shelves: list[Shelf] = []
    put_away = Shelf._put_away
    monkeypatch.setattr(Shelf, "_put_away", lambda self, *args: (put_away(self, *args), shelves.append(self)))
    for _ in range(2):
        bound, _ = solve(made, batches, memory=1_500_000)
        assert all(torch.equal(t, named_tensors(free)[name]) for name, t in named_tensors(bound).items())
    assert len(shelves) > 20
    assert shelves[0].file.handle is not None
    assert shelves[0].file.handle.closed


def test_what_is_laid_never_exceeds_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    made, held = reduce(Convolutions(), images(1)), []
    lay = Shelf.lay
    monkeypatch.setattr(Shelf, "lay", lambda self, *args: (lay(self, *args), held.append(self.held)))
    solve(made, cut_call(call(images(40, 33)), 8), memory=1_500_000)
    assert 0 < max(held) <= 1_500_000


def test_batches_too_large_for_the_bound_are_cut() -> None:
    made, batches = reduce(Convolutions(), images(1)), cut_call(call(images(24, 17)), 12)
    free, _ = solve(made, batches)
    with pytest.warns(IntrafusionWarning, match=r"expected at least [\d,]+ bytes, which 12 images .* cut to \d\."):
        small, _ = solve(made, batches, memory=200_000)
    assert distance(small, free) < 1e-5


def test_a_bound_too_small_for_one_image_says_the_least() -> None:
    made = reduce(Convolutions(), images(1))
    with pytest.raises(RecipeError, match=r"memory: expected at least [\d,]+ bytes, which one image takes") as caught:
        solve(made, cut_call(call(images(3, 33)), 1), memory=10_000)
    least = int(str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    solve(made, cut_call(call(images(3, 33)), 1), memory=least)
    with pytest.raises(RecipeError, match="one image takes"):
        solve(made, cut_call(call(images(3, 33)), 1), memory=least - 1)


class Full(Convolutions):
    """Has room for five images."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(x)


def test_batches_too_large_for_a_device_are_halved() -> None:
    made = reduce(Full(), images(1))
    with pytest.warns(IntrafusionWarning) as told:
        small, _ = solve(made, cut_call(call(images(32)), 16))
    said = [str(w.message) for w in told]
    assert ["of 16 images are cut to 8" in said[0], "of 8 images are cut to 4" in said[1], len(said)] == [True, True, 2]
    assert "out of memory" in said[0]
    free, _ = solve(made, cut_call(call(images(32)), 4))
    assert distance(small, free) == 0


class Mixing(Full):
    """What it gives for an image depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


def test_images_that_meet_are_not_cut_apart() -> None:
    made = reduce(Mixing(), images(2))
    with pytest.raises(ModelError, match="out of memory"):
        solve(made, [call(images(16))])


# ---- networks that keep something -----------------------------------------------------------------------------------


class Remembering(Convolutions):
    """Keeps tensors in attributes, in a list and in a buffer that it writes, and reads them further on."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Tensor] = []
        self.register_buffer("written", torch.zeros(9 * 9))

    def forward(self, x: Tensor) -> Tensor:
        self.shift, self.notes[:] = x.mean((1, 2, 3)), [x.square().mean((1, 2, 3))]
        self.written.copy_(x.abs().amax((0, 1)).flatten())
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.a2(F.relu(self.a1(x)))).add_(x)) * self.notes[0][:, None, None, None]
        x = self.b2(F.relu(self.b1(x + self.shift[:, None, None, None] * self.written.view(9, 9)))) + self.short(x)
        return self.head(F.relu(self.group(x)).mean((2, 3)))


def test_what_modules_keep_is_that_of_their_batch() -> None:
    """The same as a network that keeps nothing and is given the same images."""

    class Local(Convolutions):
        def forward(self, x: Tensor) -> Tensor:
            shift, note, written = x.mean((1, 2, 3)), x.square().mean((1, 2, 3)), x.abs().amax((0, 1))
            x = F.relu(self.stem(x))
            x = F.relu(self.norm(self.a2(F.relu(self.a1(x)))).add_(x)) * note[:, None, None, None]
            x = self.b2(F.relu(self.b1(x + shift[:, None, None, None] * written))) + self.short(x)
            return self.head(F.relu(self.group(x)).mean((2, 3)))

    found = []
    for network in (Local, Remembering):
        small, _ = solve(reduce(network(), images(2)), cut_call(call(images()), 10), memory=60_000_000)
        found.append({n: t for n, t in named_tensors(small).items() if n != "written"})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


class Shared(Convolutions):
    """Computes a table once, which all batches read then."""

    tables: dict[int, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if 0 not in self.tables:
            self.tables[0] = torch.arange(33 * 33 * 16).view(1, 16, 33, 33) * 1e-5
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.a2(F.relu(self.a1(x)))).add_(x))
        x = self.b2(F.relu(self.b1(x) + self.tables[0][:, : self.b1.out_channels])) + self.short(x)
        return self.head(F.relu(self.group(x)).mean((2, 3)))


def test_what_another_batch_made_is_there_when_it_is_read() -> None:
    Shared.tables = {}
    made = reduce(Shared(), images(1, 33))
    batches = cut_call(call(images(40, 33)), 8)
    found = []
    for memory in (None, 1_500_000):
        Shared.tables = {}
        found.append(solve(made, batches, memory=memory)[0])
    assert distance(*found) == 0
    assert Shared.tables[0].untyped_storage().nbytes() == 4 * 33 * 33 * 16


class Random(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn(3, 1, 1))


def test_both_networks_draw_the_same_random_numbers_on_each_batch() -> None:
    """With nothing cut away, nothing is to be written then."""
    made, state = reduce(Random(), images(1), keep=1.0), torch.get_rng_state()
    _, found = solve(made, cut_call(call(images()), 10))
    assert found.changes == {}
    assert torch.equal(torch.get_rng_state(), state)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def none_left(*models: nn.Module) -> bool:
    hooked = any(m._forward_hooks or m._forward_pre_hooks for model in models for m in model.modules())
    return not hooked and not any(thread.name == "intrafusion batch" for thread in threading.enumerate())


@pytest.mark.parametrize("spoilt", [0, 27])
def test_a_batch_that_gives_nan_is_named(spoilt: int) -> None:
    x, made = images(), reduce(Convolutions(), images(1))
    x[spoilt] = float("nan")
    where = {0: r"batch 0 \(images 0 to 9\)", 27: r"batch 2 \(images 20 to 29\)"}[spoilt]
    with pytest.raises(ModelError, match=f"stem.0: the original network gives NaN or infinity on {where}; check"):
        solve(made, cut_call(call(x), 10))


def test_rows_whose_sum_overflows_are_no_infinity() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.eye(2) * 3e37
    batches = [Inputs.of(torch.ones(20, 2))]
    store = RowStore(PlaceSampler(batches, 100, 0), Shelf(2**20))
    record_targets(model, {"0": Layer("0", model[0])}, batches, store)
    assert float(store.take("0").sum()) == float("inf")
    batches[0].args[0][7, 1] = float("inf")
    store = RowStore(PlaceSampler(batches, 100, 0), Shelf(2**20))
    with pytest.raises(ModelError, match="0: the original network gives NaN or infinity"):
        record_targets(model, {"0": Layer("0", model[0])}, batches, store)


def test_what_is_kept_of_a_loader_leaves_less_for_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = list[int]()
    monkeypatch.setattr(solver_file, "Shelf", lambda bound: bounds.append(bound) or Shelf(bound))
    made, x = reduce(Convolutions(), images(1)), images()
    for given in (x, DataLoader(TensorDataset(x), batch_size=10)):
        LeastSquares()(copy.deepcopy(made[2]), made[0], made[1], given)
    assert bounds == [find_bound(), find_bound(x.nbytes)]
    assert bounds[0] - bounds[1] == x.nbytes


def test_a_batch_on_which_the_smaller_network_overflows_is_named() -> None:
    model, graph, reduced = reduce(Convolutions(), images(1))
    reached = cut_call(call(images()), 10)
    reached[3] = reached[3].map(lambda x: x * float("inf"))
    with pytest.raises(ModelError, match=r"stem.0: restoring gives NaN .* on batch 3 \(images 30 to 39\)"):
        solve((model, graph, reduced), cut_call(call(images()), 10), reached=reached)
    assert none_left(model, reduced.model)


class Forked(Convolutions):
    """Images of large values go another way; in the middle all meet again."""

    def forward(self, x: Tensor) -> Tensor:
        large = bool(x.abs().max().numpy() > 10)  # an array, of which nobody can say what was decided
        x = F.relu(self.stem(x))
        if not large:
            x = F.relu(self.norm(self.a2(F.relu(self.a1(x)))).add_(x))
        x = self.b2(F.relu(self.b1(x))) + self.short(x)
        return self.head(F.relu(self.group(x)).mean((2, 3)))


def test_layers_that_a_batch_does_not_reach_are_left_alone_and_told() -> None:
    made, x = reduce(Forked(), images(1)), images()
    x[25] *= 10
    with pytest.warns(IntrafusionWarning, match=r"a\{1,2\} left as before: batches take different ways"):
        small, found = solve(made, cut_call(call(x), 10))
    assert found.skipped["a1"] == "batch 2 (images 20 to 29) reaches it in another way than the first"
    assert {"b1", "b2", "head"} <= found.changes.keys()
    assert torch.equal(small.a1.weight, made[2].model.a1.weight)


def test_batches_that_part_ways_in_the_smaller_network_only() -> None:
    made, batches = reduce(Forked(), images(1)), cut_call(call(images()), 10)
    reached = list(batches)
    reached[1] = replace(batches[1], args=(batches[1].args[0] * 10,))
    with pytest.warns(IntrafusionWarning, match=r"a\{1,2\} left as before"):
        _, found = solve(made, batches, reached=reached)
    assert {"b1", "b2", "head"} <= found.changes.keys()
    assert found.changes.keys().isdisjoint({"a1", "a2"})


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    model, graph, reduced = reduce(Convolutions(), images(1))
    before = [copy.deepcopy(m.state_dict()) for m in (model, reduced.model)]
    state, solved = torch.get_rng_state(), Ridge.solve
    calls: list[int] = []

    def interrupted(self: Ridge, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error("stop")
        return solved(self, *args)

    monkeypatch.setattr(Ridge, "solve", interrupted)
    with pytest.raises((error, ModelError), match="stop"):
        LeastSquares()(reduced, model, graph, list(images().split(10)))
    assert none_left(model, reduced.model)
    for network, state_dict in zip((model, reduced.model), before, strict=True):
        assert all(torch.equal(value, state_dict[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_in_the_forward_of_a_later_batch() -> None:
    made, x = reduce(Convolutions(), images(1)), images()
    reached = cut_call(call(x), 10)
    reached[2] = replace(reached[2], args=(x[20:30, :2],))  # two channels
    with pytest.raises(ModelError, match="does not run on images .*2, 9, 9"):
        solve(made, cut_call(call(x), 10), reached=reached)
    assert none_left(made[0], made[2].model)
