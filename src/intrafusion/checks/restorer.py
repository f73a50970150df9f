"""The laws of restorers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from intrafusion.application import apply
from intrafusion.arguments import Seed, checked
from intrafusion.checks.laws import ROUNDING, Checking, adopt
from intrafusion.checks.networks import Case, example_cases, odd_modes_, user_case
from intrafusion.checks.reducer import count_holes
from intrafusion.checks.snapshot import Snapshot, copy_tensors, other_random_numbers, take_snapshot, tensors_in
from intrafusion.compressed import Compressed
from intrafusion.errors import IntrafusionError
from intrafusion.network.batches import ImagesLike
from intrafusion.network.double import output_difference, run_in_double
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.planning import decide
from intrafusion.recipe import Recipe
from intrafusion.reduce import ReductionMap
from intrafusion.restore import RestorerTraits


@checked
def check_restorer(
    restorer: Any,
    *,
    model: nn.Module | None = None,
    example_inputs: ExampleInputs | None = None,
    images: ImagesLike | None = None,
    seed: Seed = 0,
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
    restorer = adopt(restorer, "restorer")
    checking = Checking(restorer)
    checking.law("needs", RestorerTraits.are_told_by(restorer), "expected an attribute needs_data, True or False")
    cases = example_cases(seed) if model is None else [user_case(model, example_inputs, images)]
    works = [_check_on(checking, restorer, case) for case in cases]
    checking.law("works somewhere", any(works), "every network was refused")
    return checking.laws


def _check_on(checking: Checking, restorer: Any, case: Case) -> bool:
    """One network; False if the restorer refuses it."""
    images, original, plan = case.unlabelled, take_snapshot(case.model), _prune_case(case).plan
    shown = copy_tensors(images)
    _check_refusals(checking, restorer, case)
    small, again = _prune_case(case), _prune_case(case)
    for other in (small, again):
        odd_modes_(other.model)
    before = take_snapshot(small.model)
    try:
        restorer(small, case.model, case.graph, images)
    except IntrafusionError:
        _check_unwritten(checking, small.model, before, f"{case.name}, refused")
        return False
    _check_network(checking, small.model, before, case.name)
    _check_unwritten(checking, case.model, original, f"{case.name}, the original", "reference untouched")
    checking.law("reference untouched", small.plan == plan, f"{case.name}: the plan has changed")
    for name, tensor in tensors_in(images):
        checking.equal("inputs untouched", tensor, shown[name], f"{case.name}, images {name}")
    with other_random_numbers():
        restorer(again, case.model, case.graph, images)
    for name, tensor in named_tensors(small.model).items():
        checking.equal("deterministic", named_tensors(again.model)[name], tensor, f"{case.name}, {name}, done again")
    _check_lossless(checking, restorer, case.duplicated())
    return True


def _check_refusals(checking: Checking, restorer: Any, case: Case) -> None:
    """Without images, and with images that the network does not run on."""
    shapeless = Inputs.of(case.unlabelled).map(lambda t: t.flatten(1)[:, :1])
    for images, where in ((None, "without images"), (shapeless, "on images of a wrong shape")):
        small = _prune_case(case)
        before, got = take_snapshot(small.model), None
        try:
            restorer(small, case.model, case.graph, images)
        except Exception as error:
            got = str(error)
            _check_unwritten(checking, small.model, before, f"{case.name}, {where}, after {got!r}")
        if images is None and restorer.needs_data:
            asked = got is not None and "images" in got
            detail = f"{case.name}, {where}: expected an error that asks for images, got {got!r}"
            checking.law("needs", asked, detail)


def _check_network(checking: Checking, model: nn.Module, before: Snapshot, where: str) -> None:
    after = take_snapshot(model)
    for name, detail in after.described.items():
        was = before.described.get(name, "nothing")
        checking.law("network untouched", detail == was, f"{where}, {name}: expected {was}, got {detail}")
    missing = sorted(before.described.keys() - after.described.keys())
    checking.law("network untouched", not missing, f"{where}: {missing[:1]} has gone")
    for name, tensor in after.values.items():
        if tensor.is_floating_point():
            count = count_holes(tensor)
            checking.law("finite", not count, f"{where}: {name} holds {count} NaN or infinite entries")


def _check_unwritten(
    checking: Checking, model: nn.Module, before: Snapshot, where: str, law: str = "all or nothing"
) -> None:
    after = take_snapshot(model)
    checking.law(law, after.described == before.described, f"{where}: its tensors, modes, flags or hooks have changed")
    for name, tensor in after.values.items():
        checking.equal(law, tensor, before.values[name], f"{where}, {name}")


def _check_lossless(checking: Checking, restorer: Any, case: Case) -> None:
    small = _merge_pairs(case)
    inputs = Inputs.of(case.unlabelled)
    expected = run_in_double(case.model, inputs)
    error = lambda: output_difference(run_in_double(small.model, inputs), expected)  # noqa: E731
    before = error()
    restorer(small, case.model, case.graph, case.unlabelled)
    after = error()
    detail = f"{case.name}, exact duplicates merged: the output was off by {before:.2g} (relative), now by {after:.2g}"
    checking.law("lossless", after <= max(before, ROUNDING), detail)


def _prune_case(case: Case) -> Compressed:
    """Half of the channels of every group, taken as they are."""
    plan = decide(case.model, case.graph, Recipe.of(keep=0.5, reducer="select"))
    return apply(case.model, plan, case.inputs, graph=case.graph)


def _merge_pairs(case: Case) -> Compressed:
    """Channels c and c + n // 2 of every group become one: their mean in, their sum out."""
    plan = decide(case.model, case.graph, Recipe.of(keep=0.5, reducer="select"))
    maps, decisions = {}, []
    for decision in plan.decisions:
        if decision.group in {g.name for g in case.mixable}:
            maps[decision.group] = _pairs_map(decision.n)
            decision = replace(decision, m=len(maps[decision.group].merge))
        elif decision.reason is None:
            decision = replace(decision, m=decision.n)
        decisions.append(decision)
    return apply(case.model, replace(plan, maps=maps, decisions=tuple(decisions)), case.inputs, graph=case.graph)


def _pairs_map(n: int) -> ReductionMap:
    owner = torch.arange(n)
    owner[n // 2 : 2 * (n // 2)] = torch.arange(n // 2)
    owner[2 * (n // 2) :] = n // 2
    member = torch.nn.functional.one_hot(owner).double()
    return ReductionMap((member / member.sum(0)).T.contiguous(), member)
