"""One block as a network of its own: made smaller by a plan of its own, proved, and solved for the whole stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from intrafusion.application import apply
from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup
from intrafusion.large.chain import BlockCall, run_block
from intrafusion.large.release import release_memory
from intrafusion.measure.drift import output_error
from intrafusion.names import name_some
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs
from intrafusion.network.row_weights import select_counted
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.planning import decide
from intrafusion.recipe import Recipe
from intrafusion.reduce import ReductionMap
from intrafusion.restore import Calibration, LeastSquares
from intrafusion.restore.solver import LayerSolver
from intrafusion.surgery.write import write_weights_


def join_graphs(graphs: Mapping[str, ChannelGraph]) -> ChannelGraph:
    """The groups of all blocks as those of the network; for their names, sizes and tensors."""
    groups, shapes, families = list[ChannelGroup](), dict[str, tuple[int, ...]](), 0
    for block, graph in graphs.items():
        groups += [_lift(group, block, families) for group in graph.groups]
        families += 1 + max((group.family for group in graph.groups), default=0)
        shapes |= {f"{block}.{name}": shape for name, shape in graph.shapes.items()}
    return ChannelGraph(tuple(groups), shapes=shapes)


def _lift(group: ChannelGroup, block: str, families: int) -> ChannelGroup:
    members = tuple(replace(member, tensor=f"{block}.{member.tensor}") for member in group.members)
    family = group.family + families
    return replace(group, name=f"{block}.{group.name}", members=members, family=family, rotation=None)


@dataclass(eq=False)
class Streams:
    """What reaches a block: in the original network, and in the smaller one whose earlier blocks are smaller already.

    Attributes:
        calls: how each of the blocks is called.
        passed: so many of them.
    """

    calls: Sequence[BlockCall]
    original: Tensor
    smaller: Tensor
    passed: int = 0

    __repr__ = show_briefly

    @property
    def inputs(self) -> tuple[Inputs, Inputs]:
        """Of the block that comes next, and of the smaller one in its place."""
        call = self.calls[self.passed]
        return call.on(self.original), call.on(self.smaller)

    def pass_(self, block: nn.Module, small: nn.Module) -> None:
        self.original, self.smaller = self._run(block, small)
        self.passed += 1

    def measure(self, block: nn.Module, small: nn.Module) -> float:
        """The output error behind a block: mean squared difference as a fraction of the original's variance."""
        weights = self.calls[self.passed].network.weights
        expected, found = (select_counted([stream], weights) for stream in self._run(block, small))
        return output_error(found, expected)

    def _run(self, block: nn.Module, small: nn.Module) -> tuple[Tensor, Tensor]:
        original, smaller = self.inputs
        return run_block(block, original), run_block(small, smaller)


def reduce_block(
    block: nn.Module,
    graph: ChannelGraph,
    example: Inputs,
    sizes: Mapping[str, int],
    recipe: Recipe,
    seen: Streams | None,
) -> tuple[nn.Module, Mapping[str, ReductionMap]]:
    """A smaller copy of a block whose groups have these sizes, and the maps that made it.

    Args:
        seen: what the channels are chosen on; None: weights alone.
    Raises:
        ModelError: a group cannot have its size here.
    """
    if not sizes:
        return copy_model(block), {}
    recipe = replace(recipe, keep={name: m / graph[name].size for name, m in sizes.items()})
    plan = decide(block, graph, recipe, example, calibration=_look(block, graph, recipe, seen))
    release_memory()
    small = apply(block, plan, example, graph=graph)
    if small.plan.sizes != sizes:
        why = "; ".join(f"{name}: {reason}" for name, reason in small.rolled_back.items())
        raise ModelError(
            f"cannot have the sizes that the other blocks have ({why or plan.sizes}); exclude these layers."
        )
    return small.model, small.plan.maps


def _look(block: nn.Module, graph: ChannelGraph, recipe: Recipe, seen: Streams | None) -> Calibration | None:
    """What is read of the channels, found now, so that what that takes is free again when channels are chosen."""
    if seen is None:
        return None
    looked = Calibration("images", Batches.of(seen.inputs[0]), block, LeastSquares(), seed=recipe.seed)
    looked.moments_of(graph)
    release_memory()
    return looked


def solve_block_(
    small: nn.Module,
    maps: Mapping[str, ReductionMap],
    block: nn.Module,
    graph: ChannelGraph,
    solver: LayerSolver,
    seen: Streams,
    measured: Streams,
) -> tuple[float, float]:
    """Solve the layers of a smaller block, in place, for what the original one gives on the original stream.

    They are put back as they were where the stream behind the block is not nearer to the original's by that.

    Returns:
        the output error behind the block before and after.
    """
    before = measured.measure(block, small)
    weights = {name: tensor.detach().clone() for name, tensor in named_tensors(small).items()}
    given, reached = seen.inputs
    solver.solve_(small, maps, block, graph, [given], reached=[reached])
    after = measured.measure(block, small)
    if not after <= before:
        write_weights_(small, weights)
        return before, before
    return before, after


def explain_groups(groups: Iterable[ChannelGroup]) -> str:
    """Why groups are left alone, each reason once."""
    reasons: dict[str, list[str]] = {}
    for group in groups:
        if group.is_channel and group.reason is not None:
            reasons.setdefault(group.reason, []).append(group.name)
    return "; ".join(f"{name_some(names)}: {why}" for why, names in reasons.items())
