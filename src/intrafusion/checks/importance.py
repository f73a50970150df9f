"""The laws of importance criteria."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.arguments import Seed, checked
from intrafusion.checks.laws import Checking, adopt, describe_kind, random_order
from intrafusion.checks.networks import Case, example_cases, user_case
from intrafusion.checks.snapshot import copy_tensors, other_random_numbers, tensors_in
from intrafusion.errors import IntrafusionError
from intrafusion.graph import ChannelGroup
from intrafusion.importance.observation import NEEDS, ImportanceTraits, needs_of
from intrafusion.network.batches import ImagesLike
from intrafusion.network.inputs import ExampleInputs
from intrafusion.observe.observe import observe_for
from intrafusion.planning import fold_weights


@checked
def check_importance(
    importance: Any,
    *,
    model: nn.Module | None = None,
    example_inputs: ExampleInputs | None = None,
    images: ImagesLike | None = None,
    seed: Seed = 0,
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
    importance = adopt(importance, "importance")
    checking = Checking(importance)
    try:
        needs = needs_of(importance)
    except (ValueError, TypeError) as error:
        checking.law("needs", False, str(error))
        raise
    cases = example_cases(seed) if model is None else [user_case(model, example_inputs, images)]
    scored = [
        _check_scores(checking, importance, needs, case, group, seed=seed)
        for healthy in cases
        for case in (healthy, healthy.half_dead(), healthy.dead())
        for group in case.groups
    ]
    checking.law("works somewhere", any(scored), "every group of every network was refused")
    return checking.laws


def _check_scores(
    checking: Checking, importance: Any, needs: frozenset[str], case: Case, group: ChannelGroup, *, seed: int
) -> bool:
    """One group; False if the criterion refuses it."""
    where = f"{case.name}, group {group.name!r}"
    weights = fold_weights(case.model, case.graph, case.groups)
    _check_asks_for_images(checking, importance, needs, group, weights, where)
    watch = lambda g: observe_for(importance, case.model, case.graph, [g], case.images, seed=seed).get(g.name)  # noqa: E731
    seen = watch(group)
    before = copy_tensors({"weights": weights, "observations": seen})
    try:
        scores = importance(group, weights, seen)
    except IntrafusionError:
        return False
    right = isinstance(scores, Tensor) and scores.shape == (group.size,) and scores.is_floating_point()
    checking.law("shape", right, f"{where}: expected {group.size} floating-point scores, got {describe_kind(scores)}")
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    checking.law("finite", not bad, f"{where}: the score of channel {(bad or [0])[0]} is {scores[(bad or [0])[0]]}")
    for name, tensor in tensors_in({"weights": weights, "observations": seen}):
        checking.equal("inputs untouched", tensor, before[name], f"{where}, {name}")
    with other_random_numbers():
        checking.equal("deterministic", importance(group, weights, seen), scores, f"{where}, asked again")
    if not ImportanceTraits.of(importance).random:
        order = random_order(group.size, seed)
        relabelled = _reorder_group(group, order)
        checking.close("relabelling", importance(relabelled, weights, watch(relabelled)), scores[order], where)
    return True


def _check_asks_for_images(
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


def _reorder_group(group: ChannelGroup, order: Tensor) -> ChannelGroup:
    """The same channels under other numbers."""
    members = tuple(replace(m, positions=m.positions[order.numpy()]) for m in group.members)
    return replace(group, members=members)
