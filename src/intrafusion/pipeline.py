"""The whole method on one screen: trace, verify, decide, reduce, prove, restore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from intrafusion.application import apply, count_ties, move_into, wrap_result
from intrafusion.arguments import Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.choice import decide_best
from intrafusion.compressed import Compressed
from intrafusion.errors import RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.heads import merge_inspected
from intrafusion.inspection import follow_given, inspect, make_workable, prepare_model
from intrafusion.measure.comparison import HeldOut
from intrafusion.measure.evaluate import Evaluate
from intrafusion.measure.size import size_of
from intrafusion.network.batches import ImagesLike, make_reusable
from intrafusion.network.calibration_images import Calls, as_calls, choose_inputs
from intrafusion.network.free_memory import MemoryLike
from intrafusion.network.held_out import Split
from intrafusion.network.identity import identify
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.texts import Tokenizer
from intrafusion.network.wrappers import outside_inference, unwrap
from intrafusion.planning import list_sizes
from intrafusion.progress import ShowProgress, shows_progress
from intrafusion.ranks import carry_out_best
from intrafusion.recipe import Keep, Ranks, Recipe
from intrafusion.reduce import Reducer
from intrafusion.restore import Calibration, calibrate
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
from intrafusion.surgery.configuration import find_config, is_configured, shrink_shapes, tie_by_config


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
            timed step), "images" (least squares on those given), "mirrored" (on their mirror images too, where images
            that were held out say that it helps, three times as long), "synthetic" (on images made from the network,
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
        order: "joint" (every group is described by the original network), "forward" (in six turns from the input, each
            as it is read where the ones before are fewer and solved: often closer, four times as long), or
            "backward" (one after another from the output, each described by what the ones before left; the authors'
            released code).
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
    return move_into(model, small, prepared.graph) if inplace else wrap_result(model, small)


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
        graph = follow_given(core, graph, inputs, calls, split)
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
        done = carry_out_best(recipe, model, graph, inputs, images, calibration)
        small = run_restorers(*done, images.seen, yardstick=yardstick)
        return replace(small, before=size_of(model, inputs), original=identify(model))
    plan = decide_best(model, graph, recipe, inputs, calibration=calibration, images=images.seen)
    small = apply(model, plan, inputs, graph=graph)
    return run_restorers(small, model, graph, calibration, images.seen, yardstick=yardstick)
