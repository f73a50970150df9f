"""The laws that every importance, reducer and restorer is held to, run on one of them: ours or a third party's.

    check_importance(MyCriterion())
    check_reducer(MyReducer())
    check_restorer(MyRestorer())

Each returns the names of the laws that were tried and hold, or raises LawError with the law and the numbers. They take
seconds; call them from a test. The networks are small and random unless you give one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.apply import inside, named_tensors
from intrafusion.batches import Images
from intrafusion.compressed import Compressed
from intrafusion.errors import IntrafusionError
from intrafusion.graph import ChannelGraph, ChannelGroup, Role
from intrafusion.importance.observation import NEEDS, label, needs_of
from intrafusion.inputs import ExampleInputs, Inputs
from intrafusion.observe import observe_for
from intrafusion.pipeline import carry_out, decide, folded_weights, inspect
from intrafusion.recipe import Recipe
from intrafusion.reduce import Moments, ReductionMap, ReductionProblem
from intrafusion.verify import copy_of, difference, outputs_in_double

CLOSE = 1e-6  # numbers that should be equal but are computed in another order, relative to the largest

LAWS = {
    "shape": "the answer has the shape and type that the contract says",
    "finite": "no NaN and no infinity, whatever is dead, equal or missing",
    "deterministic": "the same question gives the same bits, whatever else drew random numbers",
    "inputs untouched": "nothing that was handed over is written to",
    "relabelling": "channels in another order get the same answer in that order",
    "needs": "a method that looks at images says so in `needs` or `needs_data`, and asks for `images=` if it gets none",
    "works somewhere": "a method may refuse a network with an IntrafusionError, but not all of them",
    "identity": "keeping every channel is the identity up to a permutation",
    "selects": "a reducer with mixes = False picks channels as they are",
    "absorbs duplicates": "merging exact duplicates changes nothing, for reducers with absorbs_duplicates = True",
    "network untouched": "a restorer changes numbers: no shape, type, device, mode, flag, parameter object or hook",
    "reference untouched": "the original network and the plan stay as they are",
    "all or nothing": "on an error nothing has been written",
    "lossless": "a reduction that lost nothing still has lost nothing after a restorer",
}


class LawError(IntrafusionError, AssertionError):
    """A method breaks a law."""


class Checking:
    """Collects the laws that one method was held to."""

    def __init__(self, method: object) -> None:
        self.name = label(method)
        self.held: dict[str, None] = {}

    def law(self, name: str, holds: bool, detail: str | Callable[[], str]) -> None:
        """Raise unless it holds; the detail says where, what was expected and what was got."""
        if not holds:
            text = detail() if callable(detail) else detail
            raise LawError(f"{self.name} breaks the law {name!r} ({LAWS[name]}): {text}.")
        self.held[name] = None

    def equal(self, name: str, found: Tensor, expected: Tensor, where: str) -> None:
        self.law(name, same(found, expected), lambda: f"{where}: {first_difference(found, expected)}")

    def close(self, name: str, found: Tensor, expected: Tensor, where: str) -> None:
        size = max(1e-300, float(expected.abs().max())) if expected.numel() else 1.0
        holds = found.shape == expected.shape and bool(((found - expected).abs() <= CLOSE * size).all())
        self.law(name, holds, lambda: f"{where}: {first_difference(found, expected, CLOSE * size)}")

    @property
    def laws(self) -> tuple[str, ...]:
        return tuple(self.held)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def first_difference(found: Tensor, expected: Tensor, least: float = 0.0) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"expected {kind(expected)}, got {kind(found)}"
    apart = ~((found - expected).abs() <= least) if found.is_floating_point() else found != expected
    at = tuple(apart.nonzero()[0].tolist()) if bool(apart.any()) else ()
    return f"at {list(at)}: expected {expected[at].item():.9g}, got {found[at].item():.9g}"


def kind(value: object) -> str:
    return f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# ---- importance -----------------------------------------------------------------------------------------------------


def check_importance(
    importance: Any,
    *,
    model: nn.Module | None = None,
    example_inputs: ExampleInputs | None = None,
    images: Images | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """Hold a criterion to its laws, on every group of some networks, healthy and half dead.

    A criterion whose scores belong to indices, not to what is there, says `random = True` and is not relabelled.

    Args:
        model: instead of our own small networks, with `example_inputs` and `images`.
        images: labelled or not; a list that can be read again. Only for criteria that look at images.
    Returns:
        the laws that hold.
    Raises:
        LawError: the first law that does not.
    """
    checking = Checking(importance)
    try:
        needs = needs_of(importance)
    except (ValueError, TypeError) as error:
        checking.law("needs", False, str(error))
        raise
    cases = example_cases(seed) if model is None else [user_case(model, example_inputs, images)]
    scored = [
        check_scores(checking, importance, needs, case, group, seed=seed)
        for healthy in cases
        for case in (healthy, healthy.half_dead(), healthy.dead())
        for group in case.groups
    ]
    checking.law("works somewhere", any(scored), "every group of every network was refused")
    return checking.laws


def check_scores(
    checking: Checking, importance: Any, needs: frozenset[str], case: Case, group: ChannelGroup, *, seed: int
) -> bool:
    """One group; False if the criterion refuses it."""
    where = f"{case.name}, group {group.name!r}"
    weights = folded_weights(case.model, case.graph, case.groups)
    check_asks_for_images(checking, importance, needs, group, weights, where)
    watch = lambda g: observe_for(importance, case.model, case.graph, [g], case.images, seed=seed).get(g.name)  # noqa: E731
    seen = watch(group)
    before = copies({"weights": weights, "observations": seen})
    try:
        scores = importance(group, weights, seen)
    except IntrafusionError:
        return False
    right = isinstance(scores, Tensor) and scores.shape == (group.size,) and scores.is_floating_point()
    checking.law("shape", right, f"{where}: expected {group.size} floating-point scores, got {kind(scores)}")
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    checking.law("finite", not bad, f"{where}: the score of channel {(bad or [0])[0]} is {scores[(bad or [0])[0]]}")
    for name, tensor in tensors_in({"weights": weights, "observations": seen}):
        checking.equal("inputs untouched", tensor, before[name], f"{where}, {name}")
    with other_random_numbers():
        checking.equal("deterministic", importance(group, weights, seen), scores, f"{where}, asked again")
    if not getattr(importance, "random", False):
        order = shuffled(group.size, seed)
        relabelled = in_order(group, order)
        checking.close("relabelling", importance(relabelled, weights, watch(relabelled)), scores[order], where)
    return True


def check_asks_for_images(
    checking: Checking, importance: Any, needs: frozenset[str], group: ChannelGroup, weights: Any, where: str
) -> None:
    if any(NEEDS[need] for need in needs):
        try:
            importance(group, weights, None)
            got = "it answered"
        except Exception as error:
            got = str(error)
        detail = f"{where}: without images, expected an error that names the argument `images=`, got {got!r}"
        checking.law("needs", "images=" in got, detail)


def in_order(group: ChannelGroup, order: Tensor) -> ChannelGroup:
    """The same channels under other numbers."""
    members = tuple(replace(m, positions=m.positions[order.numpy()]) for m in group.members)
    return replace(group, members=members)


# ---- reducers -------------------------------------------------------------------------------------------------------


def check_reducer(reducer: Any, *, seed: int = 0) -> tuple[str, ...]:
    """Hold a reducer to its laws, on random problems and on degenerate ones.

    Returns:
        the laws that hold.
    Raises:
        LawError: the first law that does not.
    """
    checking = Checking(reducer)
    checking.law(
        "shape", isinstance(getattr(reducer, "mixes", None), bool), "expected an attribute mixes, True or False"
    )
    for n, m in ((8, 5), (12, 3), (7, 6), (6, 1), (1, 1), (9, 9)):
        check_map(checking, reducer, random_problem(n, m, seed), f"{n} random channels to {m}", seed)
    for where, problem in degenerate_problems(seed):
        check_shapes(checking, reducer, reducer(problem), problem, where)
    for n in (1, 2, 9):
        check_identity(checking, reducer(random_problem(n, n, seed)), n)
    if getattr(reducer, "absorbs_duplicates", False):
        for times in ((2, 2, 2, 2), (1, 4, 2, 3)):
            check_duplicates(checking, reducer, times, seed)
    return checking.laws


def random_problem(n: int, m: int, seed: int, d: int = 9) -> ReductionProblem:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=draw, dtype=torch.float64)
    importance = (torch.randperm(n, generator=draw) + 1).double() / n
    biases = torch.randn(n, 2, generator=draw, dtype=torch.float64)
    return ReductionProblem(rows, importance, m, seed, biases, moments_like(rows))


def moments_like(rows: Tensor) -> Moments:
    """Statistics that channels with these rows might have, at two points."""
    means = torch.stack([rows.mean(1), rows.mean(1).abs()])
    covariances = torch.stack([rows @ rows.T, (rows @ rows.T).square()])
    return Moments(means, covariances, rows @ rows.T + torch.eye(len(rows), dtype=rows.dtype))


def degenerate_problems(seed: int) -> Iterator[tuple[str, ReductionProblem]]:
    ordinary = random_problem(8, 3, seed)
    rows = ordinary.features
    some = rows.clone()
    some[::2] = 0
    for where, features in (
        ("every other channel is zero", some),
        ("all channels are zero", torch.zeros_like(rows)),
        ("all channels are equal", rows[:1].expand(8, -1).clone()),
        ("all channels point the same way", rows[:1] * torch.arange(1.0, 9.0, dtype=rows.dtype)[:, None]),
    ):
        yield where, replace(ordinary, features=features, moments=moments_like(features))
    yield "all scores are 0", replace(ordinary, importance=torch.zeros(8, dtype=torch.float64))
    yield "no biases and no moments", replace(ordinary, biases=None, moments=None)
    yield "biases of no layer", replace(ordinary, biases=torch.zeros(8, 0, dtype=torch.float64))


def check_map(checking: Checking, reducer: Any, problem: ReductionProblem, where: str, seed: int) -> None:
    before = copies(problem)
    found = reducer(problem)
    check_shapes(checking, reducer, found, problem, where)
    for name, tensor in tensors_in(problem):
        checking.equal("inputs untouched", tensor, before[name], f"{where}, {name}")
    with other_random_numbers():
        again = reducer(problem)
    checking.equal("deterministic", again.merge, found.merge, f"{where}, merge, asked again")
    checking.equal("deterministic", again.unmerge, found.unmerge, f"{where}, unmerge, asked again")
    if not getattr(reducer, "random", False):
        check_relabelled(checking, found, reducer, problem, shuffled(len(problem.importance), seed), where)


def check_shapes(checking: Checking, reducer: Any, found: Any, problem: ReductionProblem, where: str) -> None:
    n, m = len(problem.importance), problem.size
    checking.law("shape", isinstance(found, ReductionMap), f"{where}: expected a ReductionMap, got {kind(found)}")
    for name, shape in (("merge", (m, n)), ("unmerge", (n, m)), ("shift", (n,))):
        matrix = getattr(found, name, None)
        if matrix is not None or name != "shift":
            right = isinstance(matrix, Tensor) and matrix.shape == shape and matrix.dtype == torch.float64
            checking.law("shape", right, f"{where}: {name}: expected float64{list(shape)}, got {kind(matrix)}")
            count = holes(matrix)
            checking.law("finite", not count, f"{where}: {name} holds {count} NaN or infinite entries")
    if not reducer.mixes:
        ones = (found.merge == 1).sum(1), (found.merge != 0).sum(1), (found.merge != 0).sum(0)
        holds = bool((ones[0] == 1).all() and (ones[1] == 1).all() and (ones[2] <= 1).all())
        checking.law("selects", holds, f"{where}: expected one 1 in each row of merge, got {found.merge.tolist()}")


def holes(tensor: Any) -> int:
    """How many entries are NaN or infinite."""
    return int((~torch.isfinite(tensor)).sum())


def check_relabelled(
    checking: Checking, found: ReductionMap, reducer: Any, problem: ReductionProblem, order: Tensor, where: str
) -> None:
    """The new channels may come in any order: each is looked for among those of the first answer."""
    other = reducer(reordered(problem, order))
    expected = found.merge[:, order]
    match = torch.cdist(other.merge, expected).argmin(1)
    where = f"{where}, in the order {order.tolist()}"
    once = len(match.unique()) == len(match)
    checking.law("relabelling", once, f"{where}: two new channels are the same one of the first answer")
    checking.close("relabelling", other.merge, expected[match], f"{where}, merge")
    checking.close("relabelling", other.unmerge, found.unmerge[order][:, match], f"{where}, unmerge")


def reordered(problem: ReductionProblem, order: Tensor) -> ReductionProblem:
    moments = problem.moments
    if moments is not None:
        covariances, reader = moments.covariances[:, order][:, :, order], moments.reader[order][:, order]
        moments = Moments(moments.means[:, order], covariances, reader)
    biases = None if problem.biases is None else problem.biases[order]
    features, importance = problem.features[order], problem.importance[order]
    return replace(problem, features=features, importance=importance, biases=biases, moments=moments)


def check_identity(checking: Checking, found: ReductionMap, n: int) -> None:
    where = f"keeping {n} of {n} channels"
    order = found.merge.argmax(1)
    permutation = torch.eye(n, dtype=torch.float64)[order]
    once = f"{where}: channel {int(order.mode().values)} is kept more than once"
    checking.law("identity", len(order.unique()) == n, once)
    checking.close("identity", found.merge, permutation, f"{where}, merge")
    checking.close("identity", found.unmerge, permutation.T, f"{where}, unmerge")
    shift = getattr(found, "shift", None)
    if shift is not None:
        checking.close("identity", 1 + shift, torch.ones_like(shift), f"{where}, 1 + shift")


def check_duplicates(checking: Checking, reducer: Any, times: tuple[int, ...], seed: int) -> None:
    """Different channels, each several times, of which one is more important: consumers must get the same sum."""
    m, n, d = len(times), sum(times), 6
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, d, generator=draw, dtype=torch.float64)
    owner = torch.cat([torch.arange(m), torch.arange(m).repeat_interleave(torch.tensor(times) - 1)])
    importance = torch.where(torch.arange(n) < m, 2.0, 1.0).double() + torch.rand(n, generator=draw)
    order = torch.randperm(n, generator=draw)
    owner, importance = owner[order], importance[order]
    features = torch.cat([rows[owner], rows[owner].flip(1)], dim=1)
    found = reducer(ReductionProblem(features, importance, m, seed, rows[owner, :1], moments_like(features)))
    signals = torch.randn(5, d, generator=draw, dtype=torch.float64)
    weights = torch.randn(3, n, generator=draw, dtype=torch.float64)
    expected = (signals @ rows[owner].T).relu() @ weights.T
    reduced = (signals @ (found.merge @ rows[owner]).T).relu() @ (weights @ found.unmerge).T
    where = f"{m} channels, {', '.join(map(str, times))} times, merged into {m}"
    checking.close("absorbs duplicates", reduced, expected, where)


# ---- restorers ------------------------------------------------------------------------------------------------------


def check_restorer(
    restorer: Any,
    *,
    model: nn.Module | None = None,
    example_inputs: ExampleInputs | None = None,
    images: Images | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """Hold a restorer to its laws: after plain pruning, and after a reduction that loses nothing.

    For the latter, channels of a copy of the network are made exact duplicates, its batch norms measured on `images`,
    and the duplicates merged.

    Args:
        model: instead of our own small networks, with `example_inputs` and `images`.
        images: unlabelled, all as one tensor or call.
    Returns:
        the laws that hold.
    Raises:
        LawError: the first law that does not.
    """
    checking = Checking(restorer)
    declared = isinstance(getattr(restorer, "needs_data", None), bool)
    checking.law("needs", declared, "expected an attribute needs_data, True or False")
    cases = example_cases(seed) if model is None else [user_case(model, example_inputs, images)]
    works = [check_on(checking, restorer, case) for case in cases]
    checking.law("works somewhere", any(works), "every network was refused")
    return checking.laws


def check_on(checking: Checking, restorer: Any, case: Case) -> bool:
    """One network; False if the restorer refuses it."""
    images, original, plan = case.unlabelled, snapshot(case.model), pruned(case).plan
    shown = copies(images)
    check_refusals(checking, restorer, case)
    small, again = pruned(case), pruned(case)
    for other in (small, again):
        odd_modes_(other.model)
    before = snapshot(small.model)
    try:
        restorer(small, case.model, case.graph, images)
    except IntrafusionError:
        check_unwritten(checking, small.model, before, f"{case.name}, refused")
        return False
    check_network(checking, small.model, before, case.name)
    check_unwritten(checking, case.model, original, f"{case.name}, the original", "reference untouched")
    checking.law("reference untouched", small.plan == plan, f"{case.name}: the plan has changed")
    for name, tensor in tensors_in(images):
        checking.equal("inputs untouched", tensor, shown[name], f"{case.name}, images {name}")
    with other_random_numbers():
        restorer(again, case.model, case.graph, images)
    for name, tensor in named_tensors(small.model).items():
        checking.equal("deterministic", named_tensors(again.model)[name], tensor, f"{case.name}, {name}, done again")
    check_lossless(checking, restorer, case.duplicated())
    return True


def check_refusals(checking: Checking, restorer: Any, case: Case) -> None:
    """Without images, and with images that the network does not run on."""
    shapeless = Inputs.of(case.unlabelled).map(lambda t: t.flatten(1)[:, :1])
    for images, where in ((None, "without images"), (shapeless, "on images of a wrong shape")):
        small = pruned(case)
        before, got = snapshot(small.model), None
        try:
            restorer(small, case.model, case.graph, images)
        except Exception as error:
            got = str(error)
            check_unwritten(checking, small.model, before, f"{case.name}, {where}, after {got!r}")
        if images is None and restorer.needs_data:
            asked = got is not None and "images" in got
            detail = f"{case.name}, {where}: expected an error that asks for images, got {got!r}"
            checking.law("needs", asked, detail)


def check_network(checking: Checking, model: nn.Module, before: Snapshot, where: str) -> None:
    after = snapshot(model)
    for name, detail in after.described.items():
        was = before.described.get(name, "nothing")
        checking.law("network untouched", detail == was, f"{where}, {name}: expected {was}, got {detail}")
    missing = sorted(before.described.keys() - after.described.keys())
    checking.law("network untouched", not missing, f"{where}: {missing[:1]} has gone")
    for name, tensor in after.values.items():
        if tensor.is_floating_point():
            count = holes(tensor)
            checking.law("finite", not count, f"{where}: {name} holds {count} NaN or infinite entries")


def check_unwritten(
    checking: Checking, model: nn.Module, before: Snapshot, where: str, law: str = "all or nothing"
) -> None:
    after = snapshot(model)
    checking.law(law, after.described == before.described, f"{where}: its tensors, modes, flags or hooks have changed")
    for name, tensor in after.values.items():
        checking.equal(law, tensor, before.values[name], f"{where}, {name}")


def check_lossless(checking: Checking, restorer: Any, case: Case) -> None:
    small = merged_pairs(case)
    inputs = Inputs.of(case.unlabelled)
    expected = outputs_in_double(case.model, inputs)
    error = lambda: difference(outputs_in_double(small.model, inputs), expected)  # noqa: E731
    before = error()
    restorer(small, case.model, case.graph, case.unlabelled)
    after = error()
    detail = f"{case.name}, exact duplicates merged: the output was off by {before:.2g} (relative), now by {after:.2g}"
    checking.law("lossless", after <= max(before, CLOSE), detail)


def pruned(case: Case) -> Compressed:
    """Half of the channels of every group, taken as they are."""
    plan = decide(case.model, case.graph, Recipe.of(keep=0.5, reducer="select"))
    return carry_out(case.model, plan, case.graph, case.inputs)


def merged_pairs(case: Case) -> Compressed:
    """Channels c and c + n // 2 of every group become one: their mean in, their sum out."""
    plan = decide(case.model, case.graph, Recipe.of(keep=0.5, reducer="select"))
    maps, decisions = {}, []
    for decision in plan.decisions:
        if decision.group in {g.name for g in case.mixable}:
            maps[decision.group] = pairs_map(decision.n)
            decision = replace(decision, m=len(maps[decision.group].merge))
        elif decision.reason is None:
            decision = replace(decision, m=decision.n)
        decisions.append(decision)
    return carry_out(case.model, replace(plan, maps=maps, decisions=tuple(decisions)), case.graph, case.inputs)


def pairs_map(n: int) -> ReductionMap:
    owner = torch.arange(n)
    owner[n // 2 : 2 * (n // 2)] = torch.arange(n // 2)
    owner[2 * (n // 2) :] = n // 2
    member = torch.nn.functional.one_hot(owner).double()
    return ReductionMap((member / member.sum(0)).T.contiguous(), member)


# ---- networks to try things on --------------------------------------------------------------------------------------


class Example(nn.Module):
    """A stream that two layers give and two read, an inner group, a linear head; with batch norms or with biases."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norms else nn.Identity
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=not norms), norm(8)
        self.first, self.norm1 = nn.Conv2d(8, 10, 3, padding=1, bias=not norms), norm(10)
        self.second, self.norm2 = nn.Conv2d(10, 8, 3, padding=1, bias=not norms), norm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.second(self.norm1(self.first(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True, eq=False)
class Case:
    """A network and images to try a method on."""

    name: str
    model: nn.Module
    graph: ChannelGraph
    inputs: Inputs
    images: Any

    @property
    def groups(self) -> list[ChannelGroup]:
        return [g for g in self.graph.reducible if g.kind == "channel"]

    @property
    def mixable(self) -> list[ChannelGroup]:
        return [g for g in self.groups if g.unmixable is None and g.size > 1]

    @property
    def unlabelled(self) -> Any:
        images = self.images
        return images[0][0] if isinstance(images, list) and isinstance(images[0], tuple) else images

    def with_model(self, name: str, change_: Callable[[nn.Module], None]) -> Case:
        model = copy_of(self.model)
        with torch.no_grad():
            change_(model)
        return replace(self, name=f"{self.name}, {name}", model=model)

    def half_dead(self) -> Case:
        """Every other channel of every group is zero."""
        return self.with_model("half of the channels dead", lambda model: dead_(model, self.mixable, 2))

    def dead(self) -> Case:
        return self.with_model("all channels dead", lambda model: dead_(model, self.mixable, 1))

    def duplicated(self) -> Case:
        """Channel c + n // 2 of every group is channel c; batch norms know the images; all in float64."""
        images = Inputs.of(self.unlabelled).double()

        def change_(model: nn.Module) -> None:
            duplicate_(model.double(), self.mixable)
            remember_(model, images)

        return replace(self.with_model("channels duplicated", change_), inputs=self.inputs.double(), images=images)


def example_cases(seed: int) -> list[Case]:
    """With batch norms, and without; both in evaluation mode, with numbers no initialisation would give."""
    cases = []
    for name, norms in (("a network with batch norms", True), ("a network without norms", False)):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            model, images = Example(norms), torch.randn(24, 3, 6, 6)
            for tensor_name, tensor in model.named_parameters():
                if tensor.dim() == 1:
                    tensor.uniform_(0.3, 1.5) if tensor_name.startswith("norm") else tensor.uniform_(-0.5, 0.5)
            remember_(model, Inputs.of(images))
        labels = torch.arange(24) % 5
        inputs = Inputs.of(images[:2])
        cases.append(Case(name, model.eval(), inspect(model, inputs), inputs, [(images, labels)]))
    return cases


def user_case(model: nn.Module, example_inputs: ExampleInputs | None, images: Any) -> Case:
    if example_inputs is None:
        raise ValueError("example_inputs: expected what one call of the model takes, got None.")
    inputs, model = Inputs.of(example_inputs), copy_of(model)  # a broken method may write to it
    return Case(type(model).__name__, model, inspect(model, inputs), inputs, inputs if images is None else images)


def incoming(group: ChannelGroup, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(tensor with the channel dimension first, positions (n, slots)) of all that makes a group's channels."""
    tensors = named_tensors(model)
    for member in group.members:
        if Role.CONSUMES not in member.roles:
            tensor = tensors[member.tensor].data
            part = tensor if member.within is None else inside(tensor, member.within)
            yield part.movedim(member.dim, 0), torch.from_numpy(member.positions)


def dead_(model: nn.Module, groups: Iterable[ChannelGroup], step: int) -> None:
    for group in groups:
        for tensor, positions in incoming(group, model):
            tensor[positions[::step].flatten()] = 0


def duplicate_(model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
    for group in groups:
        half = group.size // 2
        for tensor, positions in incoming(group, model):
            tensor[positions[half : 2 * half]] = tensor[positions[:half]]


def remember_(model: nn.Module, inputs: Inputs) -> None:
    """Set the statistics of batch norms to those of these images in one batch."""
    flags = [(m, m.training) for m in model.modules()]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None
    inputs.call(model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, flag in flags:
        module.training = flag


# ---- before and after -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a network is apart from its numbers, by name, and the numbers."""

    described: dict[str, str]
    values: dict[str, Tensor]


def snapshot(model: nn.Module) -> Snapshot:
    tensors = named_tensors(model)
    described = {f"tensor {n}": f"{kind(t)} on {t.device}, object {id(t)}, {flags_of(t)}" for n, t in tensors.items()}
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        described[f"module {name!r}"] = f"{type(module).__name__}, training {module.training}, {hooks} hooks"
    return Snapshot(described, {n: t.detach().clone() for n, t in tensors.items()})


def flags_of(tensor: Tensor) -> str:
    return f"requires_grad {tensor.requires_grad}, grad {None if tensor.grad is None else kind(tensor.grad)}"


def odd_modes_(model: nn.Module) -> None:
    """Training and evaluation mode, frozen and free, in turns."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)


def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))


class other_random_numbers:
    """The program's random numbers are elsewhere inside, and where they were afterwards."""

    def __enter__(self) -> None:
        import numpy as np

        self.torch, self.numpy = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        torch.manual_seed(987_654_321)
        np.random.seed(987_654_321)  # noqa: NPY002

    def __exit__(self, *_: object) -> None:
        import numpy as np

        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)  # noqa: NPY002


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in mappings, sequences and dataclasses, by path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from tensors_in(entry, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from tensors_in(entry, f"{name}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name), f"{name}.{field.name}")


def copies(value: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_in(value)}
