"""The whole method on one screen: trace, verify, decide, reduce, prove, restore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from intrafusion.arguments import Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.budget.rank_curves import list_unsaving
from intrafusion.budget.sensitivity import judge_network
from intrafusion.choice import decide_best
from intrafusion.compressed import Compressed
from intrafusion.errors import ModelError, RecipeError
from intrafusion.graph import ChannelGraph, families_of
from intrafusion.heads import merge_inspected
from intrafusion.measure.comparison import HeldOut
from intrafusion.measure.evaluate import Evaluate
from intrafusion.measure.size import size_of
from intrafusion.names import name_some
from intrafusion.network.apart import borrow, uninterrupted
from intrafusion.network.batches import ImagesLike, make_reusable
from intrafusion.network.calibration_images import Calls, as_calls, choose_inputs
from intrafusion.network.free_memory import MemoryLike
from intrafusion.network.held_out import Split
from intrafusion.network.identity import identify
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.provenance import keep_config_
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.network.texts import Tokenizer
from intrafusion.network.wrappers import (
    check_inplace,
    holds_inference_tensors,
    note_unwrapped,
    outside_inference,
    unwrap,
    wrap_like,
)
from intrafusion.plan import Plan, is_miss
from intrafusion.planning import choose_split, list_sizes, make_plan, warn_of_misses
from intrafusion.progress import ShowProgress, report, shows_progress
from intrafusion.recipe import Keep, Ranks, Recipe
from intrafusion.reduce import Reducer
from intrafusion.restore import Calibration, add_shifts_, calibrate
from intrafusion.restore.steps import (
    add_comparison,
    calibrate_for,
    find_held_out,
    find_yardstick,
    measure_held_out,
    run_restorers,
    split_images,
)
from intrafusion.smallest import Search, read_wanted
from intrafusion.surgery.configuration import (
    find_config,
    fit_config_,
    is_configured,
    shrink_shapes,
    take_config_,
    tie_by_config,
)
from intrafusion.surgery.lowrank import ranks_of, split_exactly, split_provably
from intrafusion.surgery.operate import Surgery, operate
from intrafusion.surgery.optimizers import carry_state_
from intrafusion.surgery.permute import add_reasons, verify_groups
from intrafusion.surgery.proof import FunctionCheck, Reference
from intrafusion.surgery.untie import tell_of_untying, undo_ties
from intrafusion.surgery.widths import tie_widths
from intrafusion.surgery.write import Repair, make_repairs_, write_weights_
from intrafusion.trace import trace
from intrafusion.trace.run import trace_more

_LOOKED_AT = 256  # batches, for other ways through a forward than the example takes
_UNFIT = {
    "meta": "it holds no values there; load its weights first",
    "mps": "that has no float64, in which maps are solved and proved; use model.cpu(), and move the result back",
}
"""Devices that a network cannot be on, and why."""


@partial(checked, leaving=(*Recipe.options(), "evaluate", "max_drop", "max_error", "of"))
@outside_inference
@shows_progress("compress")
def compress(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Keep | None = None,
    *,
    target: Mapping[str, float] | None = None,
    reducer: str | Mapping[str, Any] | Reducer = "pivot",
    importance: Any = "l2",
    restore: Any = "auto",
    inputs: ImagesLike | None = None,
    images: ImagesLike | None = None,
    tokenizer: Tokenizer | None = None,
    round_to: int | None = None,
    min_channels: int = 1,
    include: Any = None,
    exclude: Any = None,
    order: str = "joint",
    seed: Seed = 0,
    uniform: bool = False,
    outputs: Any = None,
    untie: bool = False,
    merge_heads: int | None = None,
    ranks: Ranks = False,
    evaluate: Evaluate | None = None,
    max_drop: float | None = None,
    lower_is_better: bool = False,
    max_error: float | None = None,
    of: str | None = None,
    inplace: bool = False,
    memory: MemoryLike = None,
    progress: ShowProgress = None,
) -> Compressed:
    """Make a trained network smaller, without training, and without data unless `inputs` are given.

    Args:
        model: any eager PyTorch network, also in DataParallel or `torch.compile`, in which it comes back; not modified
            unless `inplace`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward call.
        keep: fraction of the channels of every group to keep, in (0, 1], or {name pattern: fraction}; 0.7 by default.
        target: instead of `keep`, at most so much: {"params": 0.5} or {"macs": 0.5}, fractions of the original's,
            {"latency_ms": 3.0} or {"memory_mb": 20} (10^6 bytes of weights and results) for a call on the example
            inputs, or several of these, which are all met; where to cut is then chosen for the least predicted error.
        reducer: "pivot" (the channels that tell most of the others), "intrafusion", "select" (plain pruning), ...,
            "auto" (the best of several on inputs that they were not solved on, about twice the time), a name with
            hyper-parameters, {"name": "intrafusion", "normalization": "function"}, or any Reducer.
        importance: "l2" (Torch-Pruning's magnitude), "l1", "linf", "random", ..., a name with hyper-parameters, or
            any callable (group, weights, observations) -> (n,) scores; not used by "pivot".
        restore: what is done against the loss: "auto" (on the images given; else on what about 20 seconds allow, by a
            timed step), "images" (least squares on those given), "synthetic" (on images made from the network,
            minutes), "noise" (without data, in seconds), None, a restorer or its name, or several in order; see
            `intrafusion.restore`.
        inputs: a few hundred unlabelled images, or a hundred texts, as the network takes them: a tensor or array, or
            any iterable of such, of tuples (as many arguments as the example inputs have, then labels) or of dicts
            (entries that forward does not take are left out), such as a DataLoader; or texts, with a `tokenizer`. What
            an `attention_mask` leaves out counts nowhere. One in five, at most 64, is kept to measure the result on.
        images: another name of `inputs`, here and wherever inputs are an argument.
        tokenizer: of a language model, for inputs that are texts; without inputs, for sentences of its words. As those
            of transformers: tokenizer(texts, padding=True, return_tensors="pt", ...) gives a dict of tensors.
        round_to: make every size a multiple of this (the nearest, never below it). None: with a target, sizes of groups
            of 32 channels or more are multiples of 8, if they can meet it; 1: none are.
        min_channels: no group becomes smaller than this.
        include: reduce only the channels of these layers: names, patterns, types, functions (name, module) -> bool,
            or a list of such; "name:inputs" or `inputs_of(...)` means what the layers read, else what they produce.
        exclude: leave the channels of these layers alone; as `include`.
        order: "joint" (every group is described by the original weights) or "backward" (one after another from the
            output, each described by what the ones before left; the authors' released code).
        seed: for whatever draws random numbers.
        uniform: of a network of transformers, only sizes that its configuration can say, so that `from_pretrained`
            opens what `save_pretrained` writes: groups that one number there sets become one size, and groups that none
            sets alone are left alone.
        outputs: names or indices of those outputs that matter, such as "logits", where a network returns more that
            nobody wants (hidden states, caches); the others may change their values and shapes. None: all matter.
        untie: of a language model whose head shares the weight of its embedding, give the head a copy of its own first,
            so that the stream between can be rotated; that adds parameters, and the result says how many.
        merge_heads: instead of `keep`, for grouped-query attention: as many key/value heads are left, each made of
            several, and nothing else is cut; see `intrafusion.merge.merge_heads`.
        ranks: whether layers may become two thinner ones each (factorised). True: `target` chooses between fewer
            channels and lower ranks, layer by layer, and takes the result only where it beats fewer channels alone on
            unseen inputs; "only": lower ranks alone; 0.5: each layer keeps half of its weights, and `keep` is 1 unless
            it is given.
        evaluate: with `max_drop`: a number for a network, such as its accuracy; it is given a copy in evaluation mode.
        max_drop: instead of `keep`, how much of that number may be lost, such as 0.01: the smallest size that does is
            looked for, in five or six tries, and all of them are told.
        lower_is_better: whether a lower number is the better one, as of a loss.
        max_error: instead of `evaluate` and `max_drop`: the smallest size whose outputs differ by at most this fraction
            of their variance on inputs that the solver did not see.
        of: what is made small then: "macs" (None), "params", or "channels", the same share of every group.
        inplace: write the smaller weights into `model` itself. Optimizers that train it are found and go on: what they
            remember (momentum, moments) goes through the same maps. Losses from before can no longer be differentiated.
        memory: bytes, or text such as "2GB", that what is held of the inputs and computed of them may take, beside the
            networks: inputs go through in smaller batches, and what a loader gives is read anew where it is too much to
            be kept. None: half of what is free.
        progress: None: a bar in a terminal or a notebook, once the work lasts, else lines of `logging`; False: nothing;
            True: at once; or a function (stage, done, total).
    Returns:
        the smaller network with the plan that was carried out; groups that were left alone say why.
    Raises:
        ModelError: the network does not run on the example inputs, holds NaN, or has no group to reduce.
        BudgetError: a keep outside (0, 1], a name that nothing matches, a target that means nothing, a drop that no
            size meets.
        RecipeError: a method, a hyper-parameter or another option that means nothing; less memory than one image takes.
        ArgumentError: `evaluate` raises something, gives no number, or no better one for the network than for the same
            with all weights zero.
    Warns:
        IntrafusionWarning: fewer than 32 images, whole numbers where the example has floating ones, a target that is
            missed, or no images, and "auto" would take long for the best that it can do without; what it does then
            depends on the machine.
    """
    said = locals()
    sizes = {"keep": keep, "target": target, "merge_heads": merge_heads}
    wanted = read_wanted(evaluate, max_drop, max_error, lower_is_better=lower_is_better, of=of, ranks=ranks, **sizes)
    size = {} if wanted is None else wanted.size()
    recipe = Recipe.of(**{name: said[name] for name in Recipe.options()} | size)
    given = choose_inputs(inputs, images)
    if untie and inplace:
        raise RecipeError("untie: expected a copy to be made, got inplace=True too; leave one of them out.")
    if merge_heads is not None and inplace:
        raise RecipeError("merge_heads: expected a copy to be made, got inplace=True too; leave one of them out.")
    if recipe.ranks is not False and inplace:
        raise RecipeError("ranks: expected a copy to be made, got inplace=True too; leave one of them out.")
    search = None if wanted is None else wanted.start(model)
    core = make_workable(model, inplace=inplace)
    example = recipe.call_of(example_inputs)
    graph = inspect(prepare_model(core, recipe, example), example)
    prepared = Prepared.of(recipe, core, graph, example, given, tokenizer=tokenizer, memory=memory)
    small = prepared.carry_out(recipe) if search is None else prepared.find_smallest(recipe, search)
    return _move_into(model, small, prepared.graph) if inplace else wrap_result(model, small)


def make_workable(model: Any, *, inplace: bool = False) -> nn.Module:
    """The network inside its wrappers, of ordinary tensors, with nobody else to call it.

    Raises:
        ModelError: no network that can be worked on, see `wrappers`.
    """
    core = unwrap(model)
    if inplace:
        check_inplace(model)
    with torch.inference_mode(False):
        return copy_model(core) if holds_inference_tensors(core) else borrow(core)


def prepare_model(model: nn.Module, recipe: Recipe, example_inputs: ExampleInputs) -> nn.Module:
    """The network that a recipe is for: the same, or one whose ties are undone.

    Raises:
        ModelError: they cannot be, see `undo_ties`.
    """
    return undo_ties(unwrap(model), recipe.call_of(example_inputs)) if recipe.untie else model


def wrap_result(model: nn.Module, small: Compressed) -> Compressed:
    """The smaller network in what the original one came in."""
    return replace(small, model=wrap_like(model, small.model), notes=(*small.notes, *note_unwrapped(model)))


@checked
@outside_inference
@shows_progress("compress")
def follow(
    recipe: Recipe,
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: ExampleInputs,
    images: ImagesLike | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: Tokenizer | None = None,
    search: Search | None = None,
    memory: MemoryLike = None,
    progress: ShowProgress = None,
) -> Compressed:
    """Do what a recipe says to a network that was inspected before: decide, apply, restore.

    Args:
        graph: of the network, of `prepare_model(model, recipe, ...)` where the recipe unties.
        calibration: instead of the one that the recipe would make, for several recipes on one network.
        tokenizer, memory: as `compress`.
        search: for the smallest size that loses little enough, in place of the recipe's.
    """
    recipe = recipe if search is None else search.wanted.ask(recipe)
    prepared = Prepared.of(recipe, model, graph, example_inputs, images, calibration, tokenizer, memory)
    return prepared.carry_out(recipe) if search is None else prepared.find_smallest(recipe, search)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network, and what recipes share that differ in sizes only.

    Attributes:
        whole, model: the network, and the same with its ties undone where the recipe does that.
        graph: of the latter.
        calls: what was given to solve layers on; split: what of it is seen, and what is held out.
        calibration: what the channels are chosen and the layers solved on; None: each recipe makes its own.
    """

    whole: nn.Module
    model: nn.Module
    graph: ChannelGraph
    inputs: Inputs
    calls: Calls | None
    split: Split
    calibration: Calibration | None
    tokenizer: Tokenizer | None
    memory: MemoryLike = None

    __repr__ = show_briefly

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: nn.Module,
        graph: ChannelGraph,
        example_inputs: ExampleInputs,
        images: ImagesLike | None = None,
        calibration: Calibration | None = None,
        tokenizer: Tokenizer | None = None,
        memory: MemoryLike = None,
    ) -> Prepared:
        """
        Args:
            graph: of `prepare_model(model, recipe, ...)`.
        """
        recipe.refuse_foreign()
        whole, inputs = make_workable(model), recipe.call_of(example_inputs)
        core = prepare_model(whole, recipe, inputs)
        calls = as_calls(make_reusable(images), core, inputs, tokenizer)
        split = Split(calls) if calibration is not None else split_images(calls, core, recipe, memory)
        graph = _follow_given(core, graph, inputs, calls, split)
        return cls(whole, core, graph, inputs, calls, split, calibration, tokenizer, memory)

    def calibrated(self, recipe: Recipe) -> Prepared:
        """With a calibration for this recipe and all that differ in sizes only."""
        graph = tie_by_config(self.graph, self.model) if recipe.uniform else self.graph
        found = calibrate_for(self.model, graph, self.inputs, recipe, self.split.seen, self.tokenizer, self.memory)
        return replace(self, graph=graph, calibration=found)

    def find_smallest(self, recipe: Recipe, search: Search) -> Compressed:
        """The same at the smallest size that passes; what sizes share is found out once."""
        shared = self if self.calibration is not None else self.calibrated(recipe)
        small, trials = search.find(recipe, shared.make, shared.measure)
        return search.tell(shared.compare(small), trials)

    def carry_out(self, recipe: Recipe) -> Compressed:
        """Decide, apply, restore, compare; or merge heads, and compare."""
        return self.compare(self.make(recipe))

    def make(self, recipe: Recipe) -> Compressed:
        """Decide, apply, restore; or merge heads."""
        small = self._reduce(recipe) if recipe.merge_heads is None else self._merge(recipe)
        small = replace(small, notes=(*small.notes, *(self.calls.warn() if self.calls is not None else ())))
        return count_ties(small, self.whole, self.model)

    def _reduce(self, recipe: Recipe) -> Compressed:
        return reduce_and_restore(
            *(recipe, self.model, self.graph, self.inputs, self.split),
            calibration=self.calibration,
            tokenizer=self.tokenizer,
            memory=self.memory,
        )

    def _merge(self, recipe: Recipe) -> Compressed:
        """Heads; that needs something to look at in any case."""
        seen, level = self.split.seen, "auto" if self.split.seen is None else "images"
        known = self.calibration or calibrate(
            *(self.model, self.inputs, level, seen), seed=recipe.seed, tokenizer=self.tokenizer, memory=self.memory
        )
        return merge_inspected(
            recipe, self.model, self.graph, self.inputs, known, find_yardstick(self.split, self.model)
        )

    def compare(self, small: Compressed) -> Compressed:
        """With what both networks take, and how close their outputs are."""
        return add_comparison(small, self.whole, self.split, find_held_out(small.restored))

    def measure(self, small: Compressed) -> HeldOut | None:
        """How close its outputs are; None where there is nothing to see it on."""
        return find_held_out(small.restored) or measure_held_out(small.model, self.whole, self.split)


def count_ties(small: Compressed, model: nn.Module, untied: nn.Module) -> Compressed:
    """With the size that the network had before it was untied, and what is to be said of that."""
    if not small.plan.recipe.untie:
        return small
    before = small.before if untied is model else size_of(model, small.inputs)
    return replace(small, before=before, notes=(*small.notes, tell_of_untying(model, untied)))


@checked
@outside_inference
def explain_unsaid(recipe: Recipe, model: nn.Module, graph: ChannelGraph) -> str | None:
    """Why `from_pretrained` will not open the smaller network, before it is made; None if it will, or is not known to.

    Of a target, which chooses the size of every group by itself, that it may not.
    """
    model = unwrap(model)
    if recipe.uniform or recipe.merge_heads is not None or not is_configured(model):
        return None
    if recipe.ranks is not False:
        return "no configuration says that a layer is two"
    if recipe.target is not None:
        return "a target chooses the size of every group by itself"
    sizes = list_sizes(model, graph, recipe)
    return find_config(model, shrink_shapes(graph, sizes))[1] or None


def reduce_and_restore(
    recipe: Recipe,
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Inputs,
    images: Split,
    *,
    calibration: Calibration | None = None,
    tokenizer: Tokenizer | None = None,
    memory: MemoryLike = None,
) -> Compressed:
    """The same with images that were split before, and no comparison of the two networks."""
    graph = tie_by_config(graph, model) if recipe.uniform else graph
    calibration = calibration or calibrate_for(model, graph, inputs, recipe, images.seen, tokenizer, memory)
    yardstick = find_yardstick(images, model)
    if recipe.ranks is not False:
        done = _carry_out_best(recipe, model, graph, inputs, images, calibration)
        small = run_restorers(*done, images.seen, yardstick=yardstick)
        return replace(small, before=size_of(model, inputs), original=identify(model))
    plan = decide_best(model, graph, recipe, inputs, calibration=calibration, images=images.seen)
    small = apply(model, plan, inputs, graph=graph)
    return run_restorers(small, model, graph, calibration, images.seen, yardstick=yardstick)


_Candidate = tuple[Compressed, nn.Module, ChannelGraph, Calibration | None]
"""A network before its layers are solved, and what it was made of, which may have layers as two of full rank."""


def _carry_out_best(
    recipe: Recipe,
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Inputs,
    images: Split,
    calibration: Calibration | None,
) -> _Candidate:
    """Layers become two, in one budget with the channels; or, where a target may choose, fewer channels alone.

    Both are tried on inputs that nothing was measured on, the layers solved, and the better one is taken.
    """
    plain = None
    if recipe.ranks is True:
        plan = make_plan(model, graph, recipe, inputs, calibration=calibration, images=images.seen)
        plain = apply(model, plan, inputs, graph=graph), model, graph, calibration
    split = _factorise(recipe, model, graph, inputs, images, calibration)
    best, note = _choose_candidate(plain, split, solves=bool(recipe.levels))
    warn_of_misses(best[0].plan)
    return replace(best[0], notes=(*best[0].notes, note)) if note else best[0], *best[1:]


def _factorise(
    recipe: Recipe,
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Inputs,
    images: Split,
    calibration: Calibration | None,
) -> _Candidate | None:
    """With those layers as two for which that is worth it; None if there are none.

    Those whose rank turns out to save no weights, or cannot become lower, are left as they are.
    """
    names = choose_split(model, graph, recipe, inputs, calibration, images.seen)
    while names:
        core, proved = split_provably(model, names, inputs, graph)
        if not proved:
            return None
        own, known = inspect(core, inputs), None if calibration is None else calibration.seen_by(core)
        split = {name: rank for name, rank in ranks_of(core).items() if name in proved}
        plan = make_plan(core, own, recipe, inputs, calibration=known, images=images.seen, split=split, original=model)
        small = apply(core, plan, inputs, graph=own)
        idle = list_unsaving(small.model, split)
        if not idle:
            return small, core, own, known
        names = [name for name in proved if name not in idle]
    return None


def _choose_candidate(
    plain: _Candidate | None, split: _Candidate | None, *, solves: bool
) -> tuple[_Candidate, str | None]:
    """The better one of one or two, and what is to be said of it.

    Raises:
        ModelError: there is none.
    """
    if split is None and plain is None:
        raise ModelError("ranks: no layer saves anything as two, or nothing has to be saved; give less, or use keep=.")
    if split is None or plain is None:
        found = plain or split
        assert found is not None
        return found, "ranks: no layer is worth two, so only channels are fewer." if split is None else None
    missed = [any(map(is_miss, one[0].plan.warnings)) for one in (plain, split)]
    if missed[0] != missed[1]:
        return (split, _LOWERED) if missed[0] else (plain, _NARROWED)
    errors = [_judge_candidate(one, solves=solves) for one in (plain, split)]
    if errors[1] < _WORTH * errors[0]:
        return split, f"ranks: layers become two, as that changes the output less ({_compare(*errors)})."
    return plain, f"ranks: no layer becomes two, as that gains too little: the output changes {_compare(*errors)}."


_WORTH = 0.95  # of the error of fewer channels alone: two layers are slower than one of as many MACs, and images few
_LOWERED = "ranks: layers become two, as fewer channels alone miss the target."
_NARROWED = "ranks: no layer becomes two, as only fewer channels meet the target."


def _judge_candidate(one: _Candidate, *, solves: bool) -> float:
    small, model, graph, calibration = one
    trial = replace(small, model=copy_model(small.model))
    return judge_network(trial, model, graph, calibration, solves=solves)


def _compare(error: float, other: float) -> str:
    return f"by {other:.2g} of its variance instead of {error:.2g}"


def _move_into(model: nn.Module, small: Compressed, graph: ChannelGraph) -> Compressed:
    """The smaller weights in the original's own parameters; optimizers of these go on."""
    check_inplace(model)
    core = unwrap(model)
    with uninterrupted():
        notes = carry_state_(core, graph, small.plan.maps)
        with torch.inference_mode(inference := holds_inference_tensors(core)):  # tensors of that mode stay such
            new = {n: t.data.clone() if inference else t.data for n, t in named_tensors(small.model).items()}
            write_weights_(core, new)
        make_repairs_(core, small.repairs)
        keep_config_(core, core)
        take_config_(core, small.model)
    return replace(small, model=model, notes=(*small.notes, *notes))


@checked
@outside_inference
@shows_progress("inspect")
def inspect(model: nn.Module, example_inputs: ExampleInputs, *, progress: ShowProgress = None) -> ChannelGraph:
    """Trace a network into channel groups and prove each of them by a permutation."""
    model, inputs = make_workable(model), Inputs.of(example_inputs)
    check_weights(model)
    report("tracing the network", 0)
    graph = trace(model, inputs)
    report("tracing the network", 1)
    return _prove(model, graph, inputs)


def _prove(model: nn.Module, graph: ChannelGraph, inputs: Inputs) -> ChannelGraph:
    report("proving channel groups", 0)
    graph = tie_widths(_leave_masks_alone(model, verify_groups(model, graph, inputs)), model, inputs)
    report("proving channel groups", 1)
    return graph


def _follow_given(
    model: nn.Module, graph: ChannelGraph, inputs: Inputs, calls: Calls | None, split: Split
) -> ChannelGraph:
    """The graph with the ways that given inputs, as they come and as they are parted, take through a forward."""
    if calls is None or not graph.ways:
        return graph
    parts = [part for part in (split.seen, split.measured) if isinstance(part, Batches)]
    found = trace_more(model, inputs, graph, chain(islice(calls, _LOOKED_AT), *parts))
    return graph if found is None else _prove(model, found, inputs)


def check_weights(model: nn.Module) -> None:
    masks = set() if any(t.is_meta for t in model.parameters()) else _find_masks(model)
    for name, tensor in named_tensors(model).items():
        if tensor.device.type in _UNFIT:
            raise ModelError(
                f"{name}: expected weights on the CPU or a GPU, got {tensor.device}: {_UNFIT[tensor.device.type]}."
            )
        if name not in masks and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{name}: expected finite weights, got NaN or infinity; the network was saved broken, load another."
            )


def _tell_of_numbers(numbers: Sequence[Repair]) -> tuple[str, ...]:
    """What the example cannot tell: whether a number that follows the channels means something else elsewhere."""
    if not numbers:
        return ()
    shown = name_some([f"{r.module}.{r.attribute} {r.old} -> {r.new}".lstrip(".") for r in numbers])
    return (
        f"numbers in attributes follow the channels: {shown}. If one is also a length or a number of pixels, which the "
        "example did not show, exclude these layers.",
    )


def _tell_of_config(why: str, recipe: Recipe) -> str:
    if recipe.ranks is not False:
        advice = "no configuration says that a layer is two; leave ranks out for one that does"
    elif recipe.uniform:
        advice = (
            "the sizes are such as it says, but its code derives something from them: exclude= what has to stay, most "
            "often the stream (the layers that embed)"
        )
    else:
        advice = "uniform=True makes sizes that a configuration says"
    return f"intrafusion.load is needed, not from_pretrained: {why}; {advice}"


def _tell_of_outputs(recipe: Recipe) -> tuple[str, ...]:
    if recipe.outputs is None:
        return ()
    named = name_some([str(name) for name in recipe.outputs])
    return (f"of the network's outputs only {named} was kept; the others may have other values and shapes.",)


def _check_written(small: nn.Module, model: nn.Module) -> None:
    """
    Raises:
        ModelError: a tensor has no finite entries any more, where it had.
    """
    originals = named_tensors(model)
    for name, tensor in named_tensors(small).items():
        broken = tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        if broken and bool(torch.isfinite(originals[name]).all()):
            raise ModelError(
                f"{name}: the reduced weights are too large for {tensor.dtype}: expected finite ones, got NaN or "
                "infinity; use model.double(), rescale the network, or reduce with another reducer."
            )


def _leave_masks_alone(model: nn.Module, graph: ChannelGraph) -> ChannelGraph:
    """The graph without groups along which a mask has infinite or NaN entries: such cannot be mixed."""
    tensors = named_tensors(model)
    broken = {n for n, t in tensors.items() if not t.is_meta and not bool(torch.isfinite(t).all())}
    reasons = {
        group.name: f"{member.tensor} has infinite or NaN entries along these channels"
        for group in graph.reducible for member in group.members if member.tensor in broken
    }  # fmt: skip
    return add_reasons(graph, reasons)


def _find_masks(model: nn.Module) -> set[str]:
    """Tensors that may hold infinities or NaN on purpose: buffers, and frozen parameters of two values.

    What a norm remembers of its inputs is not among them.
    """
    own = {n for n, b in model.named_buffers() if n.rpartition(".")[2] not in ("running_mean", "running_var")}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    return own | {n for n, p in frozen.items() if not p.isnan().any() and len(p.unique()) <= 2}


def _carry_out_said(
    plan: Plan, model: nn.Module, graph: ChannelGraph, reference: Reference
) -> tuple[Surgery, Plan, str | None]:
    """A plan carried out; of uniform sizes without those from which what the configuration builds derives something.

    Tied embeddings of T5, whose outputs are scaled by the width that the configuration says, are such.
    """
    surgery, done, unsaid = _carry_out(plan, model, graph, reference)
    if not plan.recipe.uniform or unsaid is None:
        return surgery, done, unsaid
    families = families_of(group for group in graph.groups if group.name in done.maps)
    for family in sorted(families, key=lambda groups: -sum(len(group.members) for group in groups)):
        reasons = {group.name: f"uniform: with fewer of these, {unsaid}" for group in family}
        tried, other, why = _carry_out(plan.rolled_back(reasons), model, graph, reference)
        if why is None and other.sizes:
            return replace(tried, rolled_back={**tried.rolled_back, **reasons}), other, None
    return surgery, done, unsaid


def _carry_out(
    plan: Plan, model: nn.Module, graph: ChannelGraph, reference: Reference
) -> tuple[Surgery, Plan, str | None]:
    """And why no configuration says the sizes of the smaller network."""
    check, inputs = FunctionCheck(reference), reference.inputs
    surgery = operate(model, graph, dict(plan.maps), inputs, check)
    plan = plan.rolled_back(surgery.rolled_back).proved(surgery.maps, check.proved)
    add_shifts_(surgery.model, model, graph, plan.maps)
    _check_written(surgery.model, model)
    keep_config_(surgery.model, model)
    return surgery, plan, fit_config_(surgery.model, inputs) if plan.sizes else None


@checked
@outside_inference
@shows_progress("apply")
def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: ExampleInputs,
    *,
    graph: ChannelGraph | None = None,
    inplace: bool = False,
    progress: ShowProgress = None,
) -> Compressed:
    """Carry out a plan that was decided, or loaded, before, and nothing else: no restorer of its recipe runs.

    The smaller network is written, run and traced again; what it does not bear out is rolled back.

    Args:
        graph: what `inspect` found in this network; None: it is inspected now.
        inplace: write the smaller weights into `model` itself.
    Raises:
        PlanError: the plan was made for another network.
        ModelError: the network does not run on the example inputs.
    """
    whole, inputs = make_workable(model, inplace=inplace), plan.recipe.call_of(example_inputs)
    if plan.recipe.untie and inplace:
        raise RecipeError("untie: expected a copy to be made, got inplace=True too; leave it out.")
    if plan.split and inplace:
        raise RecipeError("ranks: expected a copy to be made, got inplace=True too; leave it out.")
    untied = prepare_model(whole, plan.recipe, inputs)
    core = split_exactly(untied, plan.split) if plan.split else untied
    if graph is None:
        plan.check_fits({n: tuple(t.shape) for n, t in named_tensors(core).items() if t.is_floating_point()})
        graph = inspect(core, inputs)
    plan.check_fits(graph.shapes, graph)
    graph = tie_by_config(graph, core) if plan.recipe.uniform else graph
    report("checking the smaller network", 0)
    first = whole if plan.split else core
    before = size_of(first, inputs)
    surgery, plan, unsaid = _carry_out_said(plan, core, graph, Reference(core, graph, inputs))
    after = size_of(surgery.model, inputs)
    small = Compressed(
        *(surgery.model, plan, before, after, inputs, surgery.repairs),
        rolled_back=surgery.rolled_back,
        original=identify(first),
        notes=(
            *_tell_of_numbers(surgery.numbers),
            *_tell_of_outputs(plan.recipe),
            *([_tell_of_config(unsaid, plan.recipe)] if unsaid else []),
        ),
    )
    small = small if untied is whole else count_ties(small, whole, untied)
    report("checking the smaller network", 1)
    return _move_into(model, small, graph) if inplace else wrap_result(model, small)
