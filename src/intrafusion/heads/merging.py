"""Fewer key/value heads in grouped-query attention, each made of several, proved and solved."""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.compressed import Compressed, Restoration
from intrafusion.errors import BudgetError, ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.heads.find import Heads, find_heads
from intrafusion.heads.maps import Merging, Seen, as_matrix
from intrafusion.measure.closeness import Yardstick
from intrafusion.measure.size import size_of
from intrafusion.network.batches import cast_like, double_first
from intrafusion.network.double import output_difference
from intrafusion.network.gram import square_rows
from intrafusion.network.identity import identify
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer, find_layers, watch_calls
from intrafusion.network.provenance import keep_config_
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.shares import Share, ShareSampler
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.plan import Decision, Plan, describe_members
from intrafusion.recipe import Recipe
from intrafusion.reduce import ReductionMap, cluster_map
from intrafusion.restore import Calibration, LeastSquares
from intrafusion.restore.steps import add_figures
from intrafusion.surgery.configuration import build_from_config, fit_config_, is_configured
from intrafusion.surgery.numbers import find_numbers
from intrafusion.surgery.proof import FUNCTION, Reference
from intrafusion.surgery.write import Repair, make_repairs_, weights_written, write_weights_

_MERGED = ":merged"  # what decisions on merged heads are called by, behind the key layer
_ROWS_OF = ":rows"  # what the maps of single layers of merged heads are called by, behind the layer
_ROWS = 20_000  # places of each layer that are looked at
_FEWEST_ROWS, _ENTRIES = 512, 2**27  # of what output layers read, for each run; of all of that together
_TRIES = 64  # choices of numbers in attributes that follow
_EXACT = 1e-9  # outputs in float64 may differ by this fraction where nothing was changed but their order of summation


def merge_inspected(
    recipe: Recipe,
    model: nn.Module,
    graph: ChannelGraph,
    example: Inputs,
    calibration: Calibration,
    yardstick: Yardstick | None = None,
) -> Compressed:
    """Merge the key/value heads of a network that was inspected until as many are left as a recipe says, and solve.

    Args:
        graph: of the network, whole heads included.
        calibration: what is looked at and solved on.
        yardstick: what errors are measured by, rather than by the calibration's own.
    Raises:
        ModelError: there are no heads that can be merged, or the smaller network is not proved to do what the maps say.
        BudgetError: a number of heads that cannot be reached by halving.
    """
    assert recipe.merge_heads is not None
    heads, (found, refused) = recipe.merge_heads, find_heads(graph)
    found = _select_plain(found, model, graph, refused)
    _check_count(found, heads, refused, graph)
    reference = Reference(model, graph, example)
    _prove_factors(reference, found)
    merged = _merge_all(model, found, heads, calibration)
    small, repairs = _cut(reference, found, merged, heads)
    changed = any(heads < h.count for h in found)
    keep_config_(small, model)
    unsaid = fit_config_(small, example) if changed else None
    lots = {h.name: chosen for h, (chosen, _) in zip(found, merged, strict=True)}
    plan = Plan(
        recipe,
        (*(_decide(h, heads, model) for h in found), *_explain_refused(graph, refused)),
        graph.shapes,
        {f"{h.key}{_MERGED}": _as_map(lots[h.name], h.count) for h in found if heads < h.count},
        graph.warnings,
    )
    rows = _describe_rows(model, found, merged, heads) if changed else {}
    by = yardstick or calibration.plain_yardstick
    restored = _restore_(small, model, graph, calibration, rows, by) if changed and by else ()
    return Compressed(
        *(small, plan, size_of(model, example), size_of(small, example), example, repairs),
        restored=restored,
        images=calibration.images,
        notes=(f"intrafusion.load is needed, not from_pretrained: {unsaid}",) if unsaid else (),
        original=identify(model),
    )


def _decide(h: Heads, m: int, model: nn.Module) -> Decision:
    """What a plan says of merged heads; no group of the graph is called so, as nothing but this makes such a map."""
    tensors = named_tensors(model)
    names = [f"{layer}.{part}" for layer in (h.key, h.value) for part in ("weight", "bias")]
    members = tuple(f"{name}[0] {Role.PRODUCES}" for name in names if name in tensors)
    proof = FUNCTION if m < h.count else None
    return Decision(f"{h.key}{_MERGED}", h.count, m, members, "merged", kind="block", proof=proof)


def _explain_refused(graph: ChannelGraph, refused: Mapping[str, str]) -> Iterator[Decision]:
    for name, why in refused.items():
        n = graph[name].size
        yield Decision(name, n, n, describe_members(graph[name]), "kept", why, kind="block")


def _as_map(lots: Sequence[tuple[int, ...]], n: int) -> ReductionMap:
    """Which heads became one: as if each were the mean of its lot."""
    labels = torch.empty(n, dtype=torch.long)
    for index, lot in enumerate(lots):
        labels[list(lot)] = index
    return cluster_map(labels)


def _select_plain(
    found: Iterable[Heads], model: nn.Module, graph: ChannelGraph, refused: dict[str, str]
) -> list[Heads]:
    """Those whose layers are dense ones with a weight of their own; why others are not is noted."""
    layers, plain = find_layers(model, graph), []
    for heads in found:
        odd = [name for name in (heads.key, heads.query, heads.value, heads.output) if name not in layers]
        if odd:
            refused[heads.name] = f"{odd[0]} is no linear layer with a weight of its own"
        else:
            plain.append(heads)
    return plain


def _explain_stay(graph: ChannelGraph) -> str:
    """Why the keys of the first attention stay, and so are in no whole heads; empty where there are none."""
    stay = next((g for g in graph.groups if g.reason and g.with_role(Role.MATCHES)), None)
    return "" if stay is None else f"{stay.name}: {stay.reason}; outputs= names those outputs that matter."


def _check_count(found: Sequence[Heads], heads: int, refused: Mapping[str, str], graph: ChannelGraph) -> None:
    if not found:
        why = "; ".join(f"{n}: {w}" for n, w in refused.items()) or _explain_stay(graph)
        raise ModelError(f"merge_heads: there are no key/value heads here that several could share. {why}".strip())
    for own in found:
        times = own.count // heads
        if heads * times != own.count or times & (times - 1):
            halves = ", ".join(str(own.count >> k) for k in range(own.count.bit_length()) if not own.count % (1 << k))
            raise BudgetError(f"heads: {own.name} has {own.count}; expected one of {halves}, got {heads}.")


# ---- what is seen ---------------------------------------------------------------------------------------------------


def _merge_all(
    model: nn.Module, found: Sequence[Heads], m: int, calibration: Calibration
) -> list[tuple[list[tuple[int, ...]], Merging]]:
    """For each attention which of its heads become one."""
    grams, mixed = _see(calibration, found)
    weights = {n: t.detach().double() for n, t in named_tensors(model).items()}
    merged = []
    for h in found:
        read = weights[f"{h.output}.weight"][:, torch.from_numpy(h.columns.ravel())]
        merging = Merging(h, Seen(grams[h.key], grams[h.query], mixed[h.output], read.T @ read))
        merged.append((merging.choose(m), merging))
    return merged


def _see(calibration: Calibration, found: Sequence[Heads]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments of what keys and queries of the original are, and of all values as each head mixes them.

    For the latter, the network runs once for each way of giving the key heads one another's values in turn; what the
    output layers give is that of the first run, so that the layers behind see what they are meant to.
    """
    reference, outputs = calibration.reference, {h.output: h for h in found}
    names = [*outputs, *(name for h in found for name in (h.value, h.key, h.query))]
    layers = {n: Layer(n, reference.get_submodule(n)) for n in names}  # type: ignore[arg-type]
    entries = sum(h.columns.size * h.count for h in found)
    limit = max(_FEWEST_ROWS, min(_ROWS, _ENTRIES // entries))
    samplers = {n: ShareSampler(limit if n in outputs else _ROWS, calibration.seed) for n in names}
    grams, counts = dict[str, Tensor](), Counter[str]()  # by layer, sums over batches
    for batch, share in calibration.images.shared():
        looking = _Look(found, layers, samplers, double_first(batch).weights, share)
        for _ in range(max(h.count for h in found)):
            with preserve_state(reference), watch_calls({n: layer.module for n, layer in layers.items()}, looking):
                cast_like(double_first(batch), reference).call(reference)
        for name, (square, rows) in looking.sums().items():
            grams[name] = grams[name] + square if name in grams else square
            counts[name] += rows
    means = {name: square / counts[name] for name, square in grams.items()}
    return {n: m for n, m in means.items() if n not in outputs}, {n: m for n, m in means.items() if n in outputs}


@dataclass(eq=False)
class _Look:
    """What keys, queries and output layers show of one batch, which runs several times.

    Attributes:
        given: what each output layer gave in the first run.
        read: of each output layer, rows of what it read in each run.
        squares: of keys and queries, products of rows, and how many.
    """

    found: Sequence[Heads]
    layers: Mapping[str, Layer]
    samplers: Mapping[str, ShareSampler]
    weights: RowWeights | None
    share: Share
    given: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    squares: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outputs, self.values = {h.output: h for h in self.found}, {h.value: h for h in self.found}

    def __call__(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        if name in self.outputs:
            self.read[name].append(self._take(name, x)[:, torch.from_numpy(self.outputs[name].columns)])
            return self.given.setdefault(name, output)
        if name in self.values and self.read[self.values[name].output]:
            return _turn(output, self.values[name], len(self.read[self.values[name].output]))
        if name not in self.values and name not in self.squares:
            rows = self._take(name, output)
            self.squares[name] = square_rows(rows), len(rows)
        return None

    def sums(self) -> dict[str, tuple[Tensor, int]]:
        """By layer, products of rows and how many rows there are."""
        runs = {h.output: torch.stack(self.read[h.output][: h.count]) for h in self.found}
        return self.squares | {name: (_square_mixed(rows), rows.shape[1]) for name, rows in runs.items()}

    def _take(self, name: str, x: Tensor) -> Tensor:
        layer = self.layers[name]
        counts = layer.weigh_rows(x, self.weights)
        places, _ = self.samplers[name].draw(name, layer.shape_places(x), self.share, counts)
        return layer.take_outputs(x, places.to(x.device))


def _turn(output: Tensor, h: Heads, run: int) -> Tensor:
    """What a value layer gives, with the values of head g + run in the place of head g."""
    turned = output.clone()
    turned[..., torch.from_numpy(h.values.ravel())] = output[..., torch.from_numpy(np.roll(h.values, -run, 0).ravel())]
    return turned


def _square_mixed(runs: Tensor) -> Tensor:
    """(n, n w, n w): for each key head the products of all values as its query heads mix them, summed over all rows.

    Args:
        runs: (n, k, n, r, w), of each run the rows by key head and query head.
    """
    n, _, _, _, w = runs.shape
    mixed = [runs[[(v - g) % n for v in range(n)], :, g].permute(1, 2, 0, 3).reshape(-1, n * w) for g in range(n)]
    return torch.stack([square_rows(rows) for rows in mixed])


# ---- weights --------------------------------------------------------------------------------------------------------


def _rewrite_(weights: dict[str, Tensor], h: Heads, lots: Sequence[tuple[int, ...]], merging: Merging) -> None:
    """Full-size weights in which all heads of a lot are the same, lot by lot in order (in place)."""
    old, place, output = dict(weights), 0, f"{h.output}.weight"
    weights[output] = old[output].clone()
    for lot in map(list, lots):
        keys, values = [merging.merge_keys(p, lot) for p in h.parts], merging.merge_values(lot)
        for g, head in enumerate(lot):
            for part, union in zip(h.parts, keys, strict=True):
                _put_rows(weights, old, h.key, union.merge, part.keys[lot].ravel(), part.keys[place])
                for own, to in zip(part.queries[head], part.queries[place], strict=True):
                    _put_rows(weights, old, h.query, union.unmerge[g].T, own, to)
            _put_rows(weights, old, h.value, values.merge, h.values[lot].ravel(), h.values[place])
            for own, to in zip(h.columns[head], h.columns[place], strict=True):
                weights[output][:, torch.from_numpy(to)] = old[output][:, torch.from_numpy(own)] @ values.unmerge[g]
            place += 1


def _put_rows(
    weights: dict[str, Tensor], old: Mapping[str, Tensor], layer: str, matrix: Tensor, given: np.ndarray, to: np.ndarray
) -> None:
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in weights:
            weights[name] = weights[name].clone() if weights[name] is old[name] else weights[name]
            weights[name][torch.from_numpy(to)] = matrix @ old[name][torch.from_numpy(given)]


def _list_touched(h: Heads) -> list[str]:
    return [f"{layer}.{part}" for layer in (h.key, h.query, h.value, h.output) for part in ("weight", "bias")]


def _cut(
    reference: Reference,
    found: Sequence[Heads],
    merged: Sequence[tuple[list[tuple[int, ...]], Merging]],
    m: int,
) -> tuple[nn.Module, tuple[Repair, ...]]:
    """The smaller network, proved in float64 against the full one in which the heads of a lot are the same."""
    full = {n: t for n, t in reference.weights.items() if any(n in _list_touched(h) for h in found)}
    for h, (lots, merging) in zip(found, merged, strict=True):
        if m < h.count:
            _rewrite_(full, h, lots, merging)
    with weights_written(reference.double, full):
        expected = reference.run()
    cut = dict(full)
    for h in found:
        _drop_rows_(cut, h, m)
    small = copy_model(reference.model)
    types = {n: t.dtype for n, t in named_tensors(small).items()}
    repairs = write_weights_(small, {n: t.to(types[n]) for n, t in cut.items()})
    told = _read_numbers_of_config(small, found)
    choices = itertools.islice(_list_choices(small, found, m), _TRIES) if told is None else [told]
    numbers = _find_numbers(reference, m, choices, cut, expected)
    make_repairs_(small, numbers)
    return small, (*repairs, *numbers)


def _drop_rows_(weights: dict[str, Tensor], h: Heads, m: int) -> None:
    """Of equal heads the first of each lot stays (in place)."""
    for layer, rows in ((h.key, [p.keys for p in h.parts]), (h.value, [h.values])):
        gone = np.concatenate([np.delete(r, np.s_[:: h.count // m], axis=0).ravel() for r in rows])
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in weights:
                keep = np.setdiff1d(np.arange(len(weights[name])), gone)
                weights[name] = weights[name][torch.from_numpy(keep)]


def _find_numbers(
    reference: Reference,
    m: int,
    choices: Iterable[tuple[Repair, ...]],
    cut: Mapping[str, Tensor],
    expected: list[Tensor],
) -> tuple[Repair, ...]:
    """Numbers in attributes that follow: with them, the smaller network gives what is expected.

    Raises:
        ModelError: with none of the choices it does.
    """
    for numbers in choices:
        with weights_written(reference.double, cut, numbers):
            try:
                given = reference.run()
            except Exception:  # whatever a forward raises that meets other numbers than it expects
                continue
        if output_difference(given, expected) <= max(_EXACT, reference.tolerance):
            return numbers
    raise ModelError(
        f"merge_heads: with {m} key/value heads the network does not run, or gives something else than with equal "
        "ones; its forward writes their number, or that of the queries for each, where it cannot be changed."
    )


def _read_numbers_of_config(small: nn.Module, found: Sequence[Heads]) -> tuple[Repair, ...] | None:
    """What the numbers around the heads are in a network that is built from the configuration of these sizes.

    What the example does not show, such as a number that only masks make count, is then right too. None where there is
    no such configuration.
    """
    if not is_configured(small) or fit_config_(copied := copy_model(small)) is not None:
        return None
    with torch.device("meta"):
        built = build_from_config(copied, copied.config)
    return tuple(
        Repair(name, place, n, new[place])
        for name in {h.key.rpartition(".")[0] for h in found}
        for new in [find_numbers(built.get_submodule(name))]
        for place, n in find_numbers(small.get_submodule(name)).items()
        if "." not in place and new.get(place, n) != n
    )


def _list_choices(model: nn.Module, found: Sequence[Heads], m: int) -> Iterator[tuple[Repair, ...]]:
    """What numbers of the modules around the heads may become, the fewest first: heads, or queries for each head."""
    around = {h.key.rpartition(".")[0]: h for h in found}
    held = {(name, place): n for name in around for place, n in find_numbers(model.get_submodule(name)).items()}
    options: dict[str, set[str]] = {}
    for (name, place), n in held.items():
        if "." not in place:
            h = around[name]
            kinds = {"heads"} if n == h.count else set()
            options.setdefault(place, set()).update(kinds | ({"shared"} if n == h.shared else set()))
    alike = lambda place: len({held.get((name, place)) for name in around}) == 1  # noqa: E731  # no number of a layer
    places = [place for place, kinds in options.items() if kinds and alike(place)]
    for size in range(len(places) + 1):
        for chosen in itertools.combinations(places, size):
            for kinds in itertools.product(*(sorted(options[place]) for place in chosen)):
                yield tuple(
                    Repair(name, place, held[name, place], m if kind == "heads" else h.shared * (h.count // m))
                    for place, kind in zip(chosen, kinds, strict=True)
                    for name, h in around.items()
                    if held.get((name, place)) == (h.count if kind == "heads" else h.shared)
                )


def _prove_factors(reference: Reference, found: Sequence[Heads]) -> None:
    """Random complex factors of all rotary pairs, taken out of the queries again, must leave the outputs as they are.

    Raises:
        ModelError: they do not.
    """
    draw, weights = torch.Generator().manual_seed(0), dict(reference.weights)
    old = dict(weights)
    for h in found:
        for part in (p for p in h.parts if p.rotary):
            for head in range(h.count):
                size, angle = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
                factor = torch.polar(torch.tensor(0.5 + size).double(), torch.tensor(6.28 * angle).double())
                _put_rows(weights, old, h.key, as_matrix(factor), part.keys[head], part.keys[head])
                for r in range(h.shared):
                    rows = part.queries[head, r]
                    _put_rows(weights, old, h.query, as_matrix(1 / factor.conj()), rows, rows)
    with weights_written(reference.double, weights):
        error = output_difference(reference.run(), reference.outputs)
    if error > max(_EXACT, reference.tolerance):
        raise ModelError(
            f"merge_heads: complex factors on pairs of keys and queries change the outputs by {error:.1e}; what turns "
            "them is no rotary embedding."
        )


# ---- restoring ------------------------------------------------------------------------------------------------------


def _describe_rows(
    model: nn.Module, found: Sequence[Heads], merged: Sequence[tuple[list[tuple[int, ...]], Merging]], m: int
) -> dict[str, Tensor]:
    """What the outputs of keys, queries and values are of the original's: a matrix (rows, rows before) by layer."""
    tensors, matrices = named_tensors(model), dict[str, Tensor]()
    for h, (lots, merging) in zip(found, merged, strict=True):
        made = (h.key, h.query, h.value)
        rows = {f"{n}.weight": torch.eye(len(tensors[f"{n}.weight"]), dtype=torch.float64) for n in made}
        rows[f"{h.output}.weight"] = torch.zeros(1, tensors[f"{h.output}.weight"].shape[1], dtype=torch.float64)
        if m < h.count:
            _rewrite_(rows, h, lots, merging)
            _drop_rows_(rows, h, m)
        matrices |= {n: rows[f"{n}.weight"] for n in made}
    return matrices


def _restore_(
    small: nn.Module,
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Calibration,
    rows: Mapping[str, Tensor],
    yardstick: Yardstick,
) -> tuple[Restoration, ...]:
    """Solve all layers, those of the heads for what `rows` make of the original's (in place).

    What made the outputs worse is taken back.
    """
    start = time.perf_counter()
    before, kept = yardstick.measure(small), {n: t.detach().clone() for n, t in named_tensors(small).items()}
    small.eval()
    known = replace(graph, groups=tuple(_as_group(layer, matrix) for layer, matrix in rows.items()))
    maps = {f"{layer}{_ROWS_OF}": ReductionMap(matrix, torch.linalg.pinv(matrix)) for layer, matrix in rows.items()}
    LeastSquares(seed=calibration.seed).solver.solve_(
        small, maps, model, known, calibration.images, memory=calibration.images.memory
    )
    after = yardstick.measure(small)
    if undone := after.is_worse_than(before):
        write_weights_(small, kept)
    done = Restoration("LeastSquares", str(calibration), time.perf_counter() - start, undone=undone)
    return (add_figures(done, before, after, yardstick),)


def _as_group(layer: str, matrix: Tensor) -> ChannelGroup:
    """The rows of a layer, as what a map goes by."""
    rows = Member(f"{layer}.weight", 0, np.arange(matrix.shape[1])[:, None], frozenset([Role.PRODUCES]))
    return ChannelGroup(f"{layer}{_ROWS_OF}", matrix.shape[1], (rows,))
