"""The steps of a recipe against the loss: on what, in which order, and what each gains."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from torch import nn

from intrafusion.compressed import Compressed, Restoration
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.batches import ImagesLike
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.progress import Progress, report
from intrafusion.recipe import Recipe
from intrafusion.restore import Calibration, Noise, calibrate
from intrafusion.surgery.write import write_weights_

ENOUGH_TO_CHOOSE = 32  # noise images, where no layer is solved and no size is chosen on them


def calibrate_for(
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Inputs,
    recipe: Recipe,
    images: ImagesLike | None = None,
    *,
    progress: Progress | None = None,
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
        found = calibrate(model, inputs, level, images, noise=noise, seed=recipe.seed, progress=progress)
        if may_give_up:  # find out now whether the network runs on what was made
            _ = found.moments_of(graph) if chosen else found.reference
    except ModelError:
        if not may_give_up:
            raise
        return None  # no image can be made for such inputs
    return found


def run_restorers(
    small: Compressed,
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Calibration | None,
    images: ImagesLike | None = None,
    *,
    progress: Progress | None = None,
) -> Compressed:
    """Carry out the steps of the recipe against the loss, writing the smaller network's weights.

    Returns:
        the same smaller network, with what was done and what it gained.
    Raises:
        ModelError: a restorer that needs images, and there are none.
    """
    show = progress or report
    steps, done, notes = small.plan.recipe.restore, [], []
    for index, step in enumerate(steps):
        show("restoring", index, len(steps))
        start = time.perf_counter()
        if isinstance(step, str):
            if calibration is None:
                notes.append("not restored: no images were given, and none can be made for inputs like these")
                continue
            restorer, note = calibration.restorer, calibration.why if step == "auto" else None
            before, after, undone = _restore_or_undo(small, model, graph, calibration)
            seconds = calibration.seconds + time.perf_counter() - start
            note = "; ".join(filter(None, (note, "undone, as the outputs were worse" if undone else None))) or None
        else:
            restorer, note = step, None
            before = _measure_error(small.model, calibration)
            restorer(small, model, graph, images)
            after = _measure_error(small.model, calibration)
            seconds = time.perf_counter() - start
        on = str(calibration) if before is not None else None
        done.append(Restoration(type(restorer).__name__, on, seconds, before, after, note))
    show("restoring", len(steps), len(steps))
    seen = calibration.images if calibration else None
    return replace(small, restored=tuple(done), images=seen, notes=(*small.notes, *notes))


def _restore_or_undo(
    small: Compressed, model: nn.Module, graph: ChannelGraph, calibration: Calibration
) -> tuple[float, float, bool]:
    """The error of the outputs before and after, and whether the weights were put back, as it grew."""
    weights = {name: tensor.detach().clone() for name, tensor in named_tensors(small.model).items()}
    before, after = calibration.restore(small, model, graph)
    if not (after > before or math.isnan(after)):
        return before, after, False
    write_weights_(small.model, weights)
    return before, after, True


def _measure_error(small: nn.Module, calibration: Calibration | None) -> float | None:
    """Noise is no measure of what a network does with its own statistics."""
    return None if calibration is None or calibration.level == "noise" else calibration.error(small)
