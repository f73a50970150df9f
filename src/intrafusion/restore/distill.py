"""The last step: all weights of the smaller network trained together, without labels, for what the original gives."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from intrafusion.arguments import Count, NotNegative, Positive, Seed, checked, expand_home
from intrafusion.brief import show_briefly
from intrafusion.errors import DivergenceError, FolderError, ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.io.atomic import atomic_file
from intrafusion.measure.closeness import Closeness, Yardstick
from intrafusion.network.apart import borrow, forked_random_numbers
from intrafusion.network.batches import ImagesLike
from intrafusion.network.free_memory import choose_memory
from intrafusion.network.held_out import held_out_places
from intrafusion.network.identity import digest_tensors
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.pass_memory import count_bytes
from intrafusion.network.tensors import check_graph, copy_model, named_tensors
from intrafusion.progress import report
from intrafusion.restore.noise import batch_norms
from intrafusion.restore.restorer import Reduced, require_images
from intrafusion.surgery.write import write_weights_
from intrafusion.train import Training, train_
from intrafusion.train.imitation import Imitation, Pool, find_read_merges
from intrafusion.train.training import Unlabelled

RATES = (3e-3, 1e-3, 3e-4)
"""Learning rates that are tried, one after the other until one is no better than the one before."""

_TRIAL = 0.05  # of the updates and of the time, for each rate that is tried
_RISE = 0.1  # of the updates, over which the rate rises
_CHECK = 50  # updates from one look at the held-out error to the next
_FEWEST_CHECKS = 8  # of few updates
_PATIENCE = 16  # such looks without a better error, after which it ends; most is gained when the rate falls, late
_MOMENTUM = 0.1  # by which norms remember; what a network was trained with may be too slow for some hundred updates
_TELLING = 16  # images of a batch at least, for its statistics to mean something
_MOST = 4096  # images that are drawn from
_ROOM = 8  # of the memory for them, one part in so many
_APART = 5  # one in so many is kept to look at, where none are


@checked
@dataclass(frozen=True)
class Distill:
    r"""Train all weights of the smaller network for the original's outputs and what its layers read; no labels.

    Each update is one of Adam on a batch of the inputs, see `Imitation`: in evaluation mode, but that batch norms take
    the statistics of the batch and remember what they average to, unless a batch goes through in parts of under 16
    images, or has padded rows. The rate rises over the first tenth and falls to 0 as half a cosine. Images are
    mirrored, shifted, cut into and mixed with each other. Which rate is tried, each on a twentieth of the updates, and
    judged by the output error on inputs that are kept apart; so is the course, every 50 updates: the network ends with
    the weights of the least error there, and with those from before if that is not less than theirs. OURS; for parts
    see `Imitation`.

    As the first step of a recipe, the layers are solved before ("auto").

    Attributes:
        steps: updates at most.
        seconds: budget of time, trials included; None for none. Where it ends before the steps do, the result depends
            on the machine.
        batch: images of an update; all, where there are fewer.
        lr: largest learning rate; None: chosen.
        blocks: weight of what layers read.
        views: whether images are mirrored, shifted, cut into and mixed. Other inputs never are.
        folder: where checkpoints are kept, so that a run that was interrupted goes on when it is started again; they
            are removed at the end. None: nowhere.
        seed: of the order of the inputs, and of the views.
    """

    steps: Count = 2_000
    seconds: Positive | None = 300.0
    batch: Count = 64
    lr: Positive | None = None
    blocks: NotNegative = 10.0
    views: bool = True
    folder: str | None = None
    seed: Seed = 0

    needs_data = True  # of the class, not a hyper-parameter
    follows = "auto"

    @checked
    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None
    ) -> None:
        """Write the trained weights into `compressed.model`, unless they are no better; on any error none of them.

        Args:
            images: unlabelled, as the networks take them; one in five is kept to look at.
        Raises:
            ModelError: no images, or too few to keep some apart; a network that cannot be trained.
        """
        self.distil(compressed, reference, graph, require_images(images, self))

    def distil(
        self,
        compressed: Reduced,
        reference: nn.Module,
        graph: ChannelGraph,
        images: ImagesLike,
        yardstick: Yardstick | None = None,
    ) -> Distilled:
        """The same, with what came of it.

        Args:
            yardstick: inputs kept apart from these images; None: some of these are.
        """
        check_graph(graph, reference)
        reference = borrow(reference)
        seen = read_input_batches(images, reference)
        if yardstick is None or not yardstick.unseen:
            seen, yardstick = _keep_apart(seen, reference)
        return _Run(self, compressed, reference, graph, _limit(seen), yardstick).go()


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    Attributes:
        before, after: how close the outputs were, measured by `yardstick`.
        undone: whether the weights are those from before.
        note: what was done, or why nothing.
    """

    before: Closeness
    after: Closeness
    yardstick: Yardstick
    undone: bool
    note: str

    __repr__ = show_briefly


@dataclass(eq=False)
class _Run:
    """One distillation."""

    how: Distill
    compressed: Reduced
    reference: nn.Module
    graph: ChannelGraph
    seen: Batches
    yardstick: Yardstick
    failed: list[str] = field(default_factory=list)

    def go(self) -> Distilled:
        before = self.yardstick.measure(self.compressed.model)
        small = _lift(self.compressed.model)
        _check_floating(small)
        pool = Pool.of(self.seen, self.how.batch)
        merges = find_read_merges(self.reference, self.graph, self.compressed.plan.maps) if self.how.blocks else {}
        imitation = Imitation(_lift(self.reference), self.graph, merges, pool, self.how.blocks, self.how.views)
        imitation.look(small)
        _check_gradients(imitation, small)
        for norm in batch_norms(small):
            norm.momentum = _MOMENTUM
        with _checkpoints(self.how, small, pool) as folder:
            rate = self.choose(imitation, small, folder)
            steps = self.train(small, imitation, rate, folder) if rate is not None else 0
        note = self.tell(rate, steps, imitation)
        if not steps:
            return Distilled(before, before, self.yardstick, True, note)
        return self.write(small, before, note)

    # ---- what is chosen ---------------------------------------------------------------------------------------------

    @property
    def rates(self) -> tuple[float, ...]:
        return RATES if self.how.lr is None else (self.how.lr,)

    def choose(self, imitation: Imitation, small: nn.Module, folder: Path | None) -> float | None:
        """The rate, by the held-out error after a short training; None where every one makes the loss infinite."""
        if len(self.rates) == 1:
            return self.rates[0]
        known = None if folder is None else _read_choice(folder)
        if known is not None:
            return known
        best, least = None, -math.inf
        for index, rate in enumerate(self.rates):
            report("trying rates", index, len(self.rates))
            score = self.try_out(rate, imitation, copy_model(small))
            if score <= least and best is not None:
                break
            best, least = (rate, score) if score > -math.inf else (None, score)
        if folder is not None and best is not None:
            _write_choice(folder, best)
        return best

    def count_trials(self, best: float) -> int:
        """How many rates were tried until this one was chosen."""
        return min(self.rates.index(best) + 2, len(self.rates)) if len(self.rates) > 1 else 0

    def try_out(self, rate: float, imitation: Imitation, trial: nn.Module) -> float:
        steps = max(1, round(self.how.steps * _TRIAL))
        try:
            self.run(trial, imitation, self.plan(rate, imitation.pool, steps, self.share_of(_TRIAL)))
        except DivergenceError as error:
            self.failed.append(str(error))
            return -math.inf
        return self.score(trial)

    def share_of(self, share: float) -> float | None:
        return None if self.how.seconds is None else self.how.seconds * share

    # ---- training ---------------------------------------------------------------------------------------------------

    def plan(self, rate: float, pool: Pool, steps: int, seconds: float | None) -> Training:
        batch = min(self.how.batch, pool.count) if pool.joined else 1
        parts = max(1, -(-batch // (self.seen.size or batch)))
        return Training(
            epochs=steps,
            steps=steps,
            batch_size=batch,
            optimizer="adam",
            lr=rate,
            warmup=_RISE,
            decay="cosine",
            seed=self.how.seed,
            evaluating=True,
            norms=batch // parts >= _TELLING and pool.calls[0].weights is None,
            seconds=seconds,
            accumulate=parts,
        )

    def train(self, small: nn.Module, imitation: Imitation, rate: float, folder: Path | None) -> int:
        """In place; how many updates the weights have that it ends with."""
        left = 1 - _TRIAL * self.count_trials(rate)
        how = self.plan(rate, imitation.pool, self.how.steps, self.share_of(left))
        how = replace(how, patience=_PATIENCE)
        report("distilling", 0, how.steps or 1)
        try:
            return self.run(small, imitation, how, folder)
        except DivergenceError as error:
            self.failed.append(str(error))
            return 0

    def run(self, model: nn.Module, imitation: Imitation, how: Training, folder: Path | None = None) -> int:
        updates = min(_CHECK, max(1, (how.steps or 1) // _FEWEST_CHECKS))
        count, drawn = imitation.pool.count, updates * how.batch_size
        redraw = lambda places, generator: torch.randint(count, places.shape, generator=generator)  # noqa: E731
        checked_steps = lambda index, epoch: report("distilling", (index + 1) * updates, how.steps or 1)  # noqa: E731
        validation = self.score if how.patience is not None else None
        with torch.enable_grad():
            history = train_(
                *(model, Unlabelled(torch.arange(drawn) % count), how),
                objective=imitation,
                validation=validation,
                augment=redraw if count > drawn else None,  # else the others would never be seen
                folder=folder,
                on_epoch=checked_steps if how.patience is not None else None,
            )
        return history.steps

    def score(self, model: nn.Module) -> float:
        """Higher is better."""
        found = self.yardstick.measure(model)
        lost = sum(found.outputs.values()) if found.outputs else found.error
        return -math.inf if math.isnan(lost) else -lost

    # ---- what comes of it -------------------------------------------------------------------------------------------

    def write(self, small: nn.Module, before: Closeness, note: str) -> Distilled:
        """The new weights into the network that was given, unless it is worse with them."""
        own = named_tensors(self.compressed.model)
        new = {name: p.detach() for name, p in small.named_parameters() if p.is_floating_point()} | _read_norms(small)
        weights = {name: own[name].detach().clone() for name in new}
        write_weights_(self.compressed.model, {name: t.to(own[name].dtype) for name, t in new.items()})
        after = self.yardstick.measure(self.compressed.model)
        better = before.is_worse_than(after)
        if not better:
            write_weights_(self.compressed.model, weights)
            note = f"{note}; undone, as the outputs were no better"
        return Distilled(before, after, self.yardstick, not better, note)

    def tell(self, rate: float | None, steps: int, imitation: Imitation) -> str:
        if rate is None or not steps:
            return (
                f"undone, as it diverged: {self.failed[-1] if self.failed else 'the outputs are no numbers any more'}"
            )
        views = ", images mirrored, shifted, cut and mixed" if imitation.has_views else ""
        aims = "outputs and what layers read" if imitation.known else "outputs"
        return f"{steps} steps at a rate of {rate:g} for {aims}{views}"


# ---- inputs ---------------------------------------------------------------------------------------------------------


def _keep_apart(seen: Batches, reference: nn.Module) -> tuple[Batches, Yardstick]:
    """The rest, and one in five to look at, of few too; of calls that are not cut, whole ones.

    Raises:
        ModelError: there is only one.
    """
    whole = seen.size is None
    count = len(seen) if whole else seen.count
    if count < 2:
        what = "batches, which this network needs whole" if whole and seen.count > 1 else "inputs"
        raise ModelError(f"distill: expected several {what}, to keep one apart to stop by, got {seen}; give more.")
    places = held_out_places(count)
    places = places if len(places) else torch.arange(min(_APART // 2, count - 1), count, _APART)
    rest = torch.ones(count, dtype=torch.bool)
    rest[places] = False
    if not whole:
        return seen.part(rest.nonzero()[:, 0]), Yardstick(reference, seen.part(places).kept(), seen.kind)
    calls = list(seen)
    apart, left = ([calls[i] for i in chosen.tolist()] for chosen in (places, rest.nonzero()[:, 0]))
    return Batches.of(*left), Yardstick(reference, Batches.of(*apart), seen.kind)


def _limit(seen: Batches) -> Batches:
    """As many as are held in memory, and no more than are drawn from."""
    each = count_bytes(seen.first) / max(1, seen.counts[0])
    most = min(_MOST, max(2, int(choose_memory(seen.memory) / _ROOM / max(1.0, each))))
    if seen.count <= most:
        return seen
    return seen[: max(1, most // max(seen.counts))] if seen.size is None else seen.take(most)


# ---- networks -------------------------------------------------------------------------------------------------------

_HALF = (torch.float16, torch.bfloat16)


def _lift(model: nn.Module) -> nn.Module:
    """A copy, of half precision in single, in which small updates are not lost."""
    copy = copy_model(model)
    for tensor in named_tensors(copy).values():
        if tensor.dtype in _HALF:
            tensor.data = tensor.data.float()
    return copy


def _read_norms(model: nn.Module) -> dict[str, Tensor]:
    """What batch norms remember, by name."""
    norms = {id(t) for norm in batch_norms(model) for t in (norm.running_mean, norm.running_var)}
    return {name: t.detach() for name, t in model.named_buffers() if id(t) in norms}


def _check_floating(model: nn.Module) -> None:
    if not any(p.is_floating_point() and p.numel() for p in model.parameters()):
        raise ModelError("distill: the network has no floating-point parameters to train; leave the step out.")


def _check_gradients(imitation: Imitation, model: nn.Module) -> None:
    """
    Raises:
        ModelError: no gradient comes back to the parameters.
    """
    trial = copy_model(model).eval()
    for p in trial.parameters():
        p.requires_grad_(p.is_floating_point())
    try:
        with torch.enable_grad(), forked_random_numbers():
            loss = imitation(trial, torch.arange(min(2, imitation.pool.count) if imitation.pool.joined else 1), None)
            if loss.requires_grad:
                loss.backward()
    except RuntimeError as error:
        raise ModelError(f"distill: the network cannot be differentiated: {error}; leave the step out.") from error
    if not any(p.grad is not None for p in trial.parameters()):
        raise ModelError(
            "distill: no gradient comes back to the parameters: the network's forward takes none (no_grad, inference, "
            "detach, rounding); leave the step out."
        )


# ---- going on after an interruption ---------------------------------------------------------------------------------


@contextmanager
def _checkpoints(how: Distill, small: nn.Module, pool: Pool) -> Iterator[Path | None]:
    """A folder for this distillation of this network alone, which is removed once it is done."""
    if how.folder is None:
        yield None
        return
    place = Path(expand_home(how.folder)) / f"distill-{_name(how, small, pool)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{place}: cannot be made for checkpoints: {error}; choose another folder.") from error
    yield place
    shutil.rmtree(place, ignore_errors=True)


def _name(how: Distill, small: nn.Module, pool: Pool) -> str:
    """Of what it depends on: options, weights, how many inputs and which."""
    options = json.dumps({**asdict(how), "folder": None}, sort_keys=True)
    inputs = {str(index): tensor for index, tensor in enumerate(t for call in pool.calls for t in call.tensors())}
    told = (options, digest_tensors(named_tensors(small)), digest_tensors(inputs))
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:12]


def _read_choice(folder: Path) -> float | None:
    path = folder / "choice.json"
    if not path.is_file():
        return None
    try:
        return float(json.loads(path.read_text())["lr"])
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path}: damaged ({error}); remove it.") from error


def _write_choice(folder: Path, rate: float) -> None:
    with atomic_file(folder / "choice.json") as path:
        path.write_text(json.dumps({"lr": rate}))
