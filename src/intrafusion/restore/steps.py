"""The steps of a recipe against the loss: on what, in which order, and what each gains."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from intrafusion.compressed import Compressed, Restoration
from intrafusion.errors import ModelError, NoInputsError
from intrafusion.graph import ChannelGraph
from intrafusion.importance.observation import needs_of
from intrafusion.measure.closeness import Closeness, Yardstick
from intrafusion.measure.comparison import HeldOut, compare_networks, percent
from intrafusion.network.batches import ImagesLike, cast_like
from intrafusion.network.calibration_images import Calls, warn_caller
from intrafusion.network.free_memory import MemoryLike, read_memory
from intrafusion.network.held_out import Split, hold_out, take_first
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.network.texts import Tokenizer
from intrafusion.progress import report
from intrafusion.recipe import Recipe
from intrafusion.restore import Calibration, Noise, Restorer, calibrate
from intrafusion.restore.calibration import AFFORDABLE
from intrafusion.restore.distill import Distill
from intrafusion.restore.implausible import find_implausible
from intrafusion.restore.mirrored import ENOUGH, add_mirrored
from intrafusion.surgery.write import write_weights_

_SOLVING = 5  # times the pass in which it is found out what is read of channels; 3 to 6 of a perceptron, ViT, ResNet-50
ENOUGH_TO_CHOOSE = 32  # noise images, where no layer is solved and no size is chosen on them


def split_images(images: Calls | None, model: nn.Module, recipe: Recipe, memory: MemoryLike = None) -> Split:
    """The images that a recipe may be fitted to, and those that its result is measured on.

    Some are held out where all are read at once, as for solving layers; what streams through restorers and criteria one
    batch after another is not kept, and is measured where it was seen.

    Warns:
        IntrafusionWarning: what the images show already, such as that they are on another scale than the network knows.
    """
    if images is None:
        return Split()
    if recipe.levels or recipe.needs_moments:
        split = hold_out(images, model, read_memory(memory))
    else:
        split = take_first(images, unseen=not recipe.restore and not needs_of(recipe.importance) - {"tensors"})
    images.notes = find_implausible(model, images.sample, images.like) | images.notes  # the type is told first
    images.warn()
    return split


def calibrate_for(
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Inputs,
    recipe: Recipe,
    images: ImagesLike | None = None,
    tokenizer: Tokenizer | None = None,
    memory: MemoryLike = None,
) -> Calibration | None:
    """What the channels are chosen and the layers solved on; None if a recipe needs nothing, or "auto" finds nothing.

    Raises:
        ModelError: the recipe asks for a level that this network, or what is given, does not allow.
    """
    levels = recipe.levels
    chosen = recipe.needs_moments
    if not levels and not chosen:
        return None
    level = levels[0] if levels else "noise" if images is None else "images"
    only_chosen = not levels and recipe.target is None
    noise = Noise(seed=recipe.seed, images=ENOUGH_TO_CHOOSE) if only_chosen else Noise(seed=recipe.seed)
    may_give_up = images is None and (not levels or levels[0] == "auto")
    try:
        found = calibrate(
            *(model, inputs, level, images),
            noise=noise,
            seed=recipe.seed,
            tokenizer=tokenizer,
            memory=memory,
            affordable=_find_affordable(recipe),
        )
    except NoInputsError:
        if not may_give_up:
            raise
        return None
    if may_give_up:  # find out now whether the network runs on what was made
        start = time.perf_counter()
        try:
            _ = found.moments_of(graph) if chosen else found.reference
        except ModelError:
            if _runs_on(model, found.images):  # something else is wrong
                raise
            return None
        if chosen and levels and images is None:
            _warn_of_long_work(str(found), _SOLVING * (time.perf_counter() - start))
    return found


def _find_affordable(recipe: Recipe) -> float | None:
    """Seconds for images that are made: as much as for training on them, where that is done; None: the usual."""
    budgets = [step.seconds for step in recipe.restore if isinstance(step, Distill) and step.seconds is not None]
    return max([AFFORDABLE, *budgets]) if budgets else None


def _runs_on(model: nn.Module, images: Batches) -> bool:
    try:
        for call in images:
            with preserve_state(model):
                cast_like(call, model).call(model)
    except ModelError:
        return False
    return True


def _warn_of_long_work(on: str, seconds: float) -> None:
    if seconds > AFFORDABLE:
        warn_caller(
            f"no inputs were given, and solving the layers on {on} takes about {seconds:.0f} s here. Better: inputs=, "
            "a few hundred unlabelled ones; or restore=None."
        )


def run_restorers(
    small: Compressed,
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Calibration | None,
    images: ImagesLike | None = None,
    *,
    yardstick: Yardstick | None = None,
) -> Compressed:
    """Carry out the steps of the recipe against the loss, writing the smaller network's weights.

    Args:
        yardstick: what errors are measured by, rather than by the calibration's own.
    Returns:
        the same smaller network, with what was done and what it gained.
    Raises:
        ModelError: a restorer that needs images, and there are none.
    """
    steps, done, notes = small.plan.recipe.restore, list[Restoration](), list[str]()
    for index, step in enumerate(steps):
        report("restoring", index, len(steps))
        if isinstance(step, Distill):
            told = _distil(step, small, model, graph, images, calibration, yardstick)
            done += [told] if isinstance(told, Restoration) else []
            notes += [told] if isinstance(told, str) else []
        elif not isinstance(step, str):
            by = calibration.plain_yardstick if yardstick is None and calibration is not None else yardstick
            on = None if images is None or calibration is None else str(calibration)
            done.append(_run_restorer(step, small, model, graph, images, by, on))
        elif calibration is None:
            notes.append("not restored: no images were given, and none can be made for inputs like these")
        else:
            done += _solve_on_level(step, small, model, graph, calibration, yardstick)
    report("restoring", len(steps), len(steps))
    seen = calibration.images if calibration else None
    return replace(small, restored=tuple(done), images=seen, notes=(*small.notes, *notes))


def _solve_on_level(
    step: str,
    small: Compressed,
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Calibration,
    yardstick: Yardstick | None,
) -> list[Restoration]:
    """The layers solved on a level; where "auto" made images and they do harm, then on noise."""
    mirrored = step == "mirrored"
    reduced = {name: t.detach().clone() for name, t in named_tensors(small.model).items()} if mirrored else {}
    done = [_solve_or_undo(small, model, graph, calibration, yardstick, calibration.why if step == "auto" else None)]
    if mirrored:
        done = [_try_mirrored(done[0], small, model, graph, calibration, yardstick or calibration.yardstick, reduced)]
    if step == "auto" and calibration.level == "synthetic" and done[0].undone:
        noise = calibrate(model, small.inputs, "noise", seed=calibration.seed)
        by = yardstick or calibration.yardstick
        done.append(_solve_or_undo(small, model, graph, noise, by, "in place of the step before"))
    return done


def _solve_or_undo(
    small: Compressed,
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Calibration,
    yardstick: Yardstick | None,
    why: str | None,
) -> Restoration:
    """The layers solved, and put back as they were if the outputs on what was held out are worse then."""
    start = time.perf_counter()
    by = yardstick or calibration.yardstick
    weights = {name: tensor.detach().clone() for name, tensor in named_tensors(small.model).items()}
    if (
        calibration.is_standardised and yardstick is None
    ):  # noise is no measure of networks with statistics of their own
        before, after = calibration.restore(small, model, graph, by.measure)
    else:
        before = by.measure(small.model)
        calibration.restore(small, model, graph, lambda _: None)
        after = by.measure(small.model)
    idle = _note_idle(small.model, weights)
    if undone := after.is_worse_than(before):
        write_weights_(small.model, weights)
    said = why, calibration.explain_counts(), idle, "undone, as the outputs were worse" if undone else None
    note = "; ".join(filter(None, said)) or None
    seconds = calibration.seconds + time.perf_counter() - start
    done = Restoration(type(calibration.restorer).__name__, str(calibration), seconds, note=note, undone=undone)
    return add_figures(done, before, after, by)


def _try_mirrored(
    done: Restoration,
    small: Compressed,
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Calibration,
    by: Yardstick,
    reduced: Mapping[str, Tensor],
) -> Restoration:
    """The layers solved once more, with mirror images beside the images, if that is better on those held out.

    Args:
        done: what was done on the images alone.
        reduced: the weights before that.
    """
    held_out = by.count if by.unseen else 0
    if held_out < ENOUGH or done.result is None:
        why = f"{held_out} images held out are too few to tell whether they help; {ENOUGH} are enough"
        return _noting(done, f"without mirror images: {why}")
    start, (before, alone) = time.perf_counter(), done.result
    weights = {name: tensor.detach().clone() for name, tensor in named_tensors(small.model).items()}
    write_weights_(small.model, dict(reduced))
    images = add_mirrored(calibration.images, calibration.original)
    replace(calibration, images=images).restore(small, model, graph, lambda _: None)
    both = by.measure(small.model)
    done = replace(done, seconds=done.seconds + time.perf_counter() - start)
    found, without = percent(both.error), percent(alone.error)
    if found == without:
        found, without = (f"{100 * closeness.error:.4g} %" for closeness in (both, alone))
    errors = f"outputs are off by {found} of their variance, without by {without}"
    if not alone.is_worse_than(both):
        write_weights_(small.model, weights)
        return _noting(done, f"mirror images left out: with them {errors}")
    done = replace(done, undone=False, note=None)  # of what is no longer there
    done = _noting(done, f"mirror images too: with them {errors}")
    return add_figures(done, before, both, by)


def _noting(done: Restoration, note: str) -> Restoration:
    return replace(done, note="; ".join(filter(None, (done.note, note))))


def _run_restorer(
    restorer: Restorer,
    small: Compressed,
    model: nn.Module,
    graph: ChannelGraph,
    images: ImagesLike | None,
    yardstick: Yardstick | None,
    on: str | None,
) -> Restoration:
    """One that was named: it is not undone, and where it had nothing to do, that is said."""
    start = time.perf_counter()
    before = yardstick.measure(small.model) if yardstick else None
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(small.model).items()}
    restorer(small, model, graph, images)
    note = _note_idle(small.model, tensors)
    done = Restoration(type(restorer).__name__, on, time.perf_counter() - start, note=note)
    if yardstick is None or before is None:
        return done
    return add_figures(done, before, yardstick.measure(small.model), yardstick)


def _distil(
    step: Distill,
    small: Compressed,
    model: nn.Module,
    graph: ChannelGraph,
    images: ImagesLike | None,
    calibration: Calibration | None,
    yardstick: Yardstick | None,
) -> Restoration | str:
    """On what was given, or made; where it cannot be done, what was restored before stays, and it is said why."""
    start, by = time.perf_counter(), yardstick
    if images is None:
        if calibration is None or calibration.level == "noise":
            return _NO_DISTILLING
        images, by = calibration.images, by or calibration.yardstick
    on = str(calibration) if calibration is not None else None
    try:
        found = step.distil(small, model, graph, images, by)
    except ModelError as error:
        return f"not distilled: {str(error).removeprefix('distill: ')}"
    done = Restoration(type(step).__name__, on, time.perf_counter() - start, note=found.note, undone=found.undone)
    return add_figures(done, found.before, found.after, found.yardstick)


def _note_idle(model: nn.Module, before: Mapping[str, Tensor]) -> str | None:
    """What is said where all tensors are as they were before a step."""
    alike = all(torch.equal(before[name], tensor) for name, tensor in named_tensors(model).items())
    return _IDLE if alike else None


_IDLE = "it changed nothing: no layer here is one that it works on, or none lost anything that it sees"

_NO_DISTILLING = (
    "not distilled: noise tells too little to train on; give inputs=, or restore=['synthetic', 'distill'], which makes "
    "some from the network"
)


def add_figures(done: Restoration, before: Closeness, after: Closeness, yardstick: Yardstick) -> Restoration:
    """With how close the outputs were before and after, and what that was measured on."""
    figures = {
        "error_before": before.error,
        "error_after": after.error,
        "agreement_before": before.agreement,
        "agreement_after": after.agreement,
        "outputs_before": before.outputs,
        "outputs_after": after.outputs,
    }
    return replace(done, **figures, measured_on=str(yardstick), unseen=yardstick.unseen)


def add_comparison(small: Compressed, model: nn.Module, split: Split, held_out: HeldOut | None = None) -> Compressed:
    """With what both networks take, and how close their outputs are.

    Args:
        held_out: that, where it is known; else it is measured now, if there are images for it.
    """
    found = compare_networks(model, small.model, small.inputs, small.before, small.after)
    if held_out is None:
        try:
            held_out = measure_held_out(small.model, model, split)
        except ModelError as error:
            found = replace(found, failed=f"outputs could not be compared: {error}")
    return replace(small, comparison=replace(found, held_out=held_out))


def measure_held_out(small: nn.Module, model: nn.Module, split: Split) -> HeldOut | None:
    """How close the outputs of a smaller network are; None without images that were held out.

    Raises:
        ModelError: one of the networks does not run on them.
    """
    yardstick = find_yardstick(split, model)
    return None if yardstick is None else HeldOut(str(yardstick), split.unseen, yardstick.measure(small))


def find_held_out(steps: Sequence[Restoration]) -> HeldOut | None:
    """How close the outputs are, from before the first step to behind the last; None if no step was measured."""
    results = [(step, result) for step in steps if (result := step.result) is not None]
    if not results:
        return None
    (_, (before, _)), (last, (_, after)) = results[0], results[-1]
    return HeldOut(last.measured_on or "", last.unseen, after, before)


def find_yardstick(split: Split, model: nn.Module) -> Yardstick | None:
    """What a network made of this one is measured by; None without images that were held out."""
    if split.measured is None:
        return None
    return Yardstick(model, split.measured, split.measured.kind, unseen=split.unseen)
