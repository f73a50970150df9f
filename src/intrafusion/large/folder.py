"""A folder of Hugging Face made smaller block by block: a network larger than memory, whole or not at all."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.errors import FolderError, IntrafusionError, ModelError, RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.importance.observation import needs_of
from intrafusion.inspection import inspect
from intrafusion.io.atomic import atomic_folder
from intrafusion.io.pretrained import check_apart, copy_beside, copy_modules, find_network_part
from intrafusion.io.shards import FLOATS, Shards, ShardWriter, Stored
from intrafusion.large.block import Streams, explain_groups, join_graphs, reduce_block, solve_block_
from intrafusion.large.chain import BlockCall, find_blocks, follow_blocks, load_block
from intrafusion.large.offload import make_skeleton, weights_from_disk
from intrafusion.large.release import only_new_collected, release_memory
from intrafusion.measure.closeness import say_where
from intrafusion.names import hide_numbers, name_some
from intrafusion.network.batches import (
    ImagesLike,
    count_images,
    double_first,
    join_batches,
    make_reusable,
    name_inputs,
    pick_images,
    read_labelled,
    reading,
)
from intrafusion.network.calibration_images import as_calls
from intrafusion.network.double import TOLERANCE, copy_as_double, output_difference, run_in_double
from intrafusion.network.held_out import held_out_places
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.sources import find_transformers, import_transformers, needing
from intrafusion.network.texts import Tokenizer
from intrafusion.network.wrappers import outside_inference
from intrafusion.planning import list_sizes
from intrafusion.progress import ShowProgress, report, shows_progress
from intrafusion.recipe import Keep, Recipe
from intrafusion.restore import LeastSquares
from intrafusion.restore.solver import LayerSolver
from intrafusion.surgery.configuration import find_config, shrink_shapes, tie_by_config

_TOKENS = 16  # of the example, where none is given
_ROWS = 4096  # of a weight that are looked at together


@checked
@dataclass(frozen=True)
class BlockReport:
    """What became of one block.

    Attributes:
        sizes: of its groups that became smaller, as (before, after).
        error_before, error_after: the output error of the stream behind it before and after its layers were solved,
            earlier blocks included; None where there were no inputs.
    """

    block: str
    sizes: Mapping[str, tuple[int, int]]
    error_before: float | None = None
    error_after: float | None = None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {n} -> {m}" for name, (n, m) in self.sizes.items()) or "as it was"
        if self.error_before is None or self.error_after is None:
            return f"{self.block}: {sizes}"
        solved = "not solved, as that was no nearer" if self.error_after == self.error_before else "solved"
        return f"{self.block}: {sizes}; {solved}, error behind it {self.error_before:.2g} -> {self.error_after:.2g}"


@checked
@dataclass(frozen=True, eq=False)
class CompressedFolder:
    """What was written.

    Attributes:
        before, after: parameters.
        measured_on: what the errors behind the blocks are of; None without inputs.
        unseen: whether these were kept from the solver.
    """

    folder: Path
    before: int
    after: int
    blocks: tuple[BlockReport, ...]
    notes: tuple[str, ...] = ()
    measured_on: str | None = None
    seconds: float = 0.0
    unseen: bool = False

    __repr__ = show_briefly

    def __str__(self) -> str:
        head = f"parameters: {self.before / 1e6:.4g} M -> {self.after / 1e6:.4g} M, {self.seconds:.0f} s"
        on = [f"errors measured {say_where(self.measured_on, self.unseen)}"] if self.measured_on else []
        return "\n".join([head, *on, *map(str, self.blocks), *(f"note: {note}" for note in self.notes)])


@partial(checked, leaving=("keep",))
@outside_inference
@shows_progress("compress")
def compress_folder(
    folder: str | Path,
    output: str | Path,
    keep: Keep | None = None,
    *,
    inputs: ImagesLike | None = None,
    tokenizer: Tokenizer | None = None,
    example_inputs: ExampleInputs | None = None,
    architecture: str | None = None,
    progress: ShowProgress = None,
    **options: Any,
) -> CompressedFolder:
    """Make a network of transformers smaller that need not fit into memory; the result opens with `from_pretrained`.

    Block after block is read, traced, proved, reduced, solved (where inputs are given) and written; what lies before
    and behind the blocks, and the stream between them, stay as they are. At any time memory holds one block, its
    copies and the stream of the inputs. Sizes are such as the configuration can say.

    Args:
        folder: config.json and safetensors, in one file or in several.
        output: a new folder; it appears whole or not at all.
        keep: as `compress`.
        inputs: texts with a `tokenizer`, or what the network takes, as `compress`; None: channels are selected by
            their weights, and no layer is solved.
        example_inputs: one call; by default some tokens, or the first batch of `inputs` of a network that reads none.
        architecture: name of a class of transformers; None: the one that config.json names.
        **options: reducer, importance, restore ("auto", None or a `LeastSquares`), round_to, min_channels, include,
            exclude and seed, as `compress`.
    Raises:
        FolderError: a folder that is damaged or incomplete, or an output that exists.
        ModelError: a network whose blocks do not run one after another, or with no group that its configuration sets.
        RecipeError: an option that means nothing block by block.
    """
    start = time.perf_counter()
    recipe, solver = _read_recipe(keep, options)
    origin, target = _read_path(folder), _read_path(output)
    check_apart(target, origin)
    with atomic_folder(target, ours=lambda _: False, names=()) as place:
        network = _Network.of(origin, architecture)  # by which transformers are imported
        with only_new_collected():
            calls = _make_calls(network, inputs, tokenizer, example_inputs)
            example = calls[0] if example_inputs is None and calls else _find_example(network, example_inputs)
            small = _Work(network, recipe, solver, example, calls).write(place)
        copy_beside(origin, place, ("README.md",))  # it tells of the original
        copy_modules(origin, place)
        (place / "recipe.yaml").write_text(recipe.to_yaml())
    return replace(small, folder=target, seconds=time.perf_counter() - start)


def _read_path(path: str | Path) -> Path:
    """
    Raises:
        FolderError: it is no name of a folder.
    """
    try:
        Path(path).resolve()
    except (ValueError, RuntimeError, OSError) as error:  # a null character; links that lead in a circle
        raise FolderError(f"{str(path)!r}: is no name of a folder ({error}); choose another one.") from error
    return Path(path)


def _read_recipe(keep: Keep | None, options: Mapping[str, Any]) -> tuple[Recipe, LayerSolver | None]:
    """And what solves the layers, where there are inputs.

    Raises:
        RecipeError: an option that is not there block by block.
    """
    recipe = Recipe.of(keep=keep, **options, **({} if "uniform" in options else {"uniform": True}))
    recipe.refuse_foreign()
    unfit = {
        "target": recipe.target is not None and "sizes for it are chosen over all layers; give keep",
        "uniform": not recipe.uniform and "from_pretrained opens only sizes that a configuration says; leave it out",
        "order": recipe.order != "joint" and "blocks come one after another; leave it out",
        "outputs": recipe.outputs is not None and "the stream behind the blocks is kept whole; leave it out",
        "importance": needs_of(recipe.importance) - {"tensors"} and "it needs data or gradients; choose one of weights",
    }
    for name, why in unfit.items():
        if why:
            raise RecipeError(f"{name}: not block by block: {why}.")
    step = recipe.restore[0] if len(recipe.restore) == 1 else None
    if not recipe.restore:
        return recipe, None
    if step in ("auto", "images"):
        return recipe, LeastSquares(seed=recipe.seed).solver
    if isinstance(step, LeastSquares):
        return recipe, step.solver
    raise RecipeError("restore: block by block expected 'auto', 'images', None or LeastSquares(...), got another step.")


# ---- the network in the folder --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Network:
    """A network whose weights are in their files.

    Attributes:
        skeleton: it, without values.
        blocks: names of its blocks.
        places: by the name of each of its tensors, that in the files, and where it lies.
        notes: what in the files is left out.
    """

    skeleton: nn.Module
    blocks: tuple[str, ...]
    shards: Shards
    places: Mapping[str, tuple[str, Stored]]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, origin: Path, architecture: str | None) -> _Network:
        config, kind = _find_architecture(origin, architecture)
        shards = Shards.of(origin)
        release_memory()  # maps of files, which count where private memory is limited
        try:
            skeleton = make_skeleton(kind, config)
        except (IntrafusionError, MemoryError):
            raise
        except Exception as error:  # whatever a configuration without meaning makes it raise
            raise ModelError(f"{origin}: {kind.__name__} cannot be built from its config.json ({error}).") from error
        places, notes = _match_names(skeleton, shards)
        network = cls(skeleton, find_blocks(skeleton), shards, places, notes)
        network.fill_buffers_()
        return network

    def read(self, name: str) -> Tensor:
        return self.shards.read(self.places[name][0])

    def fill_buffers_(self) -> None:
        """Buffers outside the blocks that are kept with the weights get their values."""
        kept = self.skeleton.state_dict()
        for name, buffer in self.skeleton.named_buffers():
            if name in kept and not name.startswith(tuple(f"{block}." for block in self.blocks)):
                buffer.data = self.read(name).to(buffer.dtype)

    def check_finite(self) -> None:
        """
        Raises:
            ModelError: a parameter holds NaN or infinity.
        """
        for stored in sorted({self.places[name][0] for name, _ in self.skeleton.named_parameters()}):
            if not all(bool(torch.isfinite(part).all()) for part in self.shards.map(stored).split(_ROWS)):
                raise ModelError(
                    f"{self.shards.folder}: {stored}: expected finite weights, got NaN or infinity; the network was "
                    "saved broken, fetch another."
                )
        release_memory()

    @property
    def takes(self) -> set[str]:
        """Names of what a call may give."""
        return set(signature(self.skeleton.forward).parameters)


def _find_architecture(origin: Path, architecture: str | None) -> tuple[Any, type]:
    """Configuration and class.

    Raises:
        FolderError: no folder of one network of transformers.
        ModelError: its weights are quantised, or its architecture is not installed.
    """
    if part := find_network_part(origin):
        raise FolderError(f"{origin}: holds several modules; name the folder of the network in it, {origin / part}.")
    if not (origin / "config.json").is_file():
        raise FolderError(f"{origin}: expected a folder with a config.json, got none; save_pretrained writes it.")
    with needing("transformers"):
        transformers: Any = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(origin, trust_remote_code=False)
    except Exception as error:  # no promise of narrower ones
        raise FolderError(f"{origin}: its config.json cannot be read ({error}); fetch the folder again.") from error
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{origin}: its weights are quantised; compress those that it was quantised from.")
    named = architecture or next(iter(config.architectures or ()), None)
    if named is None:
        raise ModelError(f"{origin}: its config.json names no architecture; give architecture=.")
    return config, find_transformers(named)


def _match_names(skeleton: nn.Module, shards: Shards) -> tuple[dict[str, tuple[str, Stored]], tuple[str, ...]]:
    """Where every tensor of the network lies, one that has several names under any of them; what is left over.

    Raises:
        ModelError: tensors are missing, of another shape, quantised, or of layers that the configuration lacks.
    """
    own = skeleton.state_dict(keep_vars=True)
    stored = {id(own[name]): name for name in shards.tensors if name in own}
    missing = [name for name, tensor in own.items() if id(tensor) not in stored]
    places = {name: stored[id(tensor)] for name, tensor in own.items() if id(tensor) in stored}
    found = {name: (place, shards.tensors[place]) for name, place in places.items()}
    wrong = [n for n, (_, s) in found.items() if s.shape != tuple(own[n].shape)]
    odd = [n for n, (_, s) in found.items() if own[n].is_floating_point() and s.dtype not in FLOATS]
    extra = [name for name in shards.tensors if name not in own]
    if _are_renamed([tuple(own[n].shape) for n in missing], [shards.tensors[n].shape for n in extra]):
        raise ModelError(
            f"{shards.folder}: its files hold weights otherwise than the network, such as {extra[0]} for "
            f"{missing[0]}; from_pretrained converts them, which is not done block by block: compress the network "
            "whole, with intrafusion.compress (in a shell, without --blockwise)."
        )
    kinds = {hide_numbers(name) for name in own}
    alike = [name for name in extra if hide_numbers(name) in kinds]
    for names, what in ((missing, "no weights of"), (wrong, "other shapes of"), (alike, "weights without a place of")):
        if names:
            raise ModelError(
                f"{shards.folder}: config.json and the weights contradict each other: there are {what} "
                f"{name_some(names)}; fetch the folder again, or write it anew with save_pretrained."
            )
    if odd:
        raise ModelError(f"{shards.folder}: {name_some(odd)} are quantised; compress those they were quantised from.")
    return found, (f"left out, as the network has no place for them: {name_some(extra)}",) if extra else ()


def _are_renamed(missing: Sequence[tuple[int, ...]], extra: Sequence[tuple[int, ...]]) -> bool:
    """Whether what is missing is there under other names, or in other parts: its shapes, or as many entries."""
    same = sum(map(math.prod, missing)) == sum(map(math.prod, extra))
    return bool(missing) and (same or not Counter(missing) - Counter(extra))


# ---- calls ----------------------------------------------------------------------------------------------------------


def _find_example(network: _Network, given: ExampleInputs | None) -> Inputs:
    if given is not None:
        return _without_cache(Inputs.of(given), network.takes)
    tables = [m for m in network.skeleton.modules() if isinstance(m, nn.Embedding)]
    if "input_ids" not in network.takes or not tables:
        kind = type(network.skeleton).__name__
        raise ModelError(f"{kind}: no example is known for a network without tokens; give example_inputs or inputs.")
    ids = torch.arange(_TOKENS)[None] % max(table.num_embeddings for table in tables)
    return _without_cache(Inputs.of({"input_ids": ids}), network.takes)


def _make_calls(
    network: _Network, inputs: ImagesLike | None, tokenizer: Tokenizer | None, example: ExampleInputs | None
) -> list[Inputs]:
    """What the layers are solved on, and what errors are measured on; the same where inputs are few."""
    if inputs is None:
        return []
    inputs = make_reusable(inputs)
    if example is None and "input_ids" not in network.takes:
        example = _read_first(inputs, network.takes)
    like = _find_example(network, example)
    calls = as_calls(inputs, network.skeleton, like, tokenizer)
    call = _without_cache(join_batches(list(calls or ())), network.takes)
    total = count_images(call)
    apart = torch.zeros(total, dtype=torch.bool)
    apart[held_out_places(total)] = True
    if not bool(apart.any()):
        return [double_first(call)] * 2
    return [double_first(pick_images(call, part.nonzero()[:, 0])) for part in (~apart, apart)]


def _read_first(inputs: ImagesLike, takes: set[str]) -> Inputs:
    """The first batch of inputs, as a call by which all are read; without entries that forward does not take."""
    with reading(read_labelled(inputs)) as batches:
        first, _ = next(batches)
    return replace(first, kwargs={name: value for name, value in (first.kwargs or {}).items() if name in takes})


def _without_cache(call: Inputs, takes: set[str]) -> Inputs:
    """Without keys and values for a next call, which would stay in memory for all blocks."""
    return replace(call, kwargs={**(call.kwargs or {}), "use_cache": False}) if "use_cache" in takes else call


# ---- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Work:
    """The blocks of a network made smaller, one after another.

    Attributes:
        example: one call, to trace and to prove on.
        calls: what the layers are solved on, and what is measured on; empty for neither.
    """

    network: _Network
    recipe: Recipe
    solver: LayerSolver | None
    example: Inputs
    calls: Sequence[Inputs]

    def write(self, place: Path) -> CompressedFolder:
        """Everything into an empty folder."""
        network, blocks = self.network, self.network.blocks
        network.check_finite()
        examples = self.follow(self.example)
        graphs = {name: self.look(index, examples[index]) for index, name in enumerate(blocks)}
        sizes, config = _choose_sizes(network, graphs, self.recipe)
        target = make_skeleton(type(network.skeleton), config)
        rest = _pack(network)
        writer, done = ShardWriter(place, len(blocks) + len(rest)), list[BlockReport]()
        streams = self.make_streams()
        release_memory()
        for index, name in enumerate(blocks):
            report("blocks", index, len(blocks))
            own = {group.removeprefix(f"{name}."): m for group, m in sizes.items() if group.startswith(f"{name}.")}
            small, what = self.reduce(name, graphs[name], examples[index], own, streams)
            _check_config(target, name, small, examples[index])
            writer.write(self.lower(name, small))
            done.append(what)
            del small
            release_memory()
        report("blocks", len(blocks), len(blocks))
        for names in rest:
            writer.write({name: network.shards.map(name) for name in names})
            release_memory()
        writer.finish()
        _save_config(target, network.skeleton, place)
        return self.summarise(target, done)

    def load(self, name: str) -> nn.Module:
        return load_block(self.network.skeleton, name, self.network.read)

    def follow(self, call: Inputs) -> list[Inputs]:
        """The call of every block, all on the stream that reaches the first one."""
        stream, calls = self.walk(call)
        return [block.on(stream) for block in calls]

    def walk(self, call: Inputs) -> tuple[Tensor, list[BlockCall]]:
        network, first = self.network, self.load(self.network.blocks[0])
        with weights_from_disk(network.skeleton, network.places):
            return follow_blocks(network.skeleton, network.blocks, call, first)

    def make_streams(self) -> tuple[Streams, Streams] | None:
        """Those that layers are solved on, and those that errors are measured on, which may be the same."""
        if not self.calls:
            return None
        found = {id(call): self.walk(call) for call in self.calls}
        streams = {key: Streams(calls, start, start) for key, (start, calls) in found.items()}
        return streams[id(self.calls[0])], streams[id(self.calls[1])]

    def look(self, index: int, example: Inputs) -> ChannelGraph:
        """The groups of a block, proved."""
        report("proving channel groups", index, len(self.network.blocks))
        release_memory()
        return inspect(self.load(self.network.blocks[index]), example)

    def reduce(
        self,
        name: str,
        graph: ChannelGraph,
        example: Inputs,
        sizes: Mapping[str, int],
        streams: tuple[Streams, Streams] | None,
    ) -> tuple[nn.Module, BlockReport]:
        """A smaller block, and what became of it; the streams have passed it then."""
        block, errors = self.load(name), (None, None)
        seen = streams[0] if streams and self.recipe.needs_moments else None
        try:
            small, maps = reduce_block(block, graph, example, sizes, replace(self.recipe, **_OF_BLOCKS), seen)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
        release_memory()
        if streams and self.solver is not None:
            errors = solve_block_(small, maps, block, graph, self.solver, *streams)
        for own in {id(stream): stream for stream in streams or ()}.values():
            own.pass_(block, small)
        return small, BlockReport(name, {g: (graph[g].size, m) for g, m in sizes.items()}, *errors)

    def lower(self, name: str, small: nn.Module) -> dict[str, Tensor]:
        """The tensors of a block by their names in the network, of the precision that they came in."""
        state = {f"{name}.{own}": tensor for own, tensor in small.state_dict().items()}
        return {n: t.to(FLOATS.get(self.network.places[n][1].dtype, t.dtype)) for n, t in state.items()}

    def summarise(self, target: nn.Module, done: Iterable[BlockReport]) -> CompressedFolder:
        before, after = (sum(p.numel() for p in m.parameters()) for m in (self.network.skeleton, target))
        notes, on = list(self.network.notes), None
        if self.calls:
            weights = self.calls[1].weights
            count = count_images(self.calls[1]) - (weights.doubled if weights else 0)
            on = f"{count} {name_inputs(self.calls[1])}"
        else:
            notes.append("no inputs were given: channels were selected by weights, and no layer was solved")
        unseen = bool(self.calls) and self.calls[0] is not self.calls[1]
        return CompressedFolder(Path(), before, after, tuple(done), tuple(notes), on, unseen=unseen)


_OF_BLOCKS: dict[str, Any] = {
    "uniform": False,
    "include": None,
    "exclude": (),
    "round_to": None,
    "min_channels": 1,
    "restore": (),
}
"""What of a recipe has been carried out already where a block is decided, or comes behind it."""


def _choose_sizes(network: _Network, graphs: Mapping[str, ChannelGraph], recipe: Recipe) -> tuple[dict[str, int], Any]:
    """The size of every group that becomes smaller, and the configuration that says so.

    Raises:
        ModelError: there is none.
    """
    graph = join_graphs(graphs)
    sizes = list_sizes(network.skeleton, graph, recipe)
    smaller = {name: m for name, m in sizes.items() if m < graph[name].size}
    heads = [name for name in smaller if not graph[name].is_channel]
    if heads:
        raise ModelError(f"{name_some(heads)}: whole heads stay block by block; leave out the pattern that names them.")
    if not smaller:
        tied = tie_by_config(graph, network.skeleton)
        raise ModelError(
            "there is no channel group to reduce in the blocks, with this keep and these layers. "
            f"{_explain_largest(tied, recipe)}{explain_groups(tied.groups)}"
        )
    config, why = find_config(network.skeleton, {**_shapes_of(network.skeleton), **shrink_shapes(graph, smaller)})
    if config is None:
        raise ModelError(f"no configuration says these sizes: {why}; exclude these layers.")
    return smaller, config


def _explain_largest(graph: ChannelGraph, recipe: Recipe) -> str:
    """Why a keep for some layers alone makes nothing smaller."""
    free = [group.name for group in graph.groups if group.is_channel and group.reducible]
    if not free or not isinstance(recipe.keep, Mapping):
        return ""
    return f"{name_some(free)}: one number of the configuration sets them, to the largest size that keep asks for. "


def _shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _pack(network: _Network) -> list[list[str]]:
    """The tensors outside the blocks, each once, in files of which none is much larger than a block."""
    state, inside = network.skeleton.state_dict(), tuple(f"{block}." for block in network.blocks)
    stored = dict.fromkeys(place for name, (place, _) in network.places.items() if not name.startswith(inside))
    largest = sum(t.nbytes for n, t in state.items() if n.startswith(inside[0]))
    packs, size = list[list[str]](), 0
    for name in stored:
        if not packs or size + state[name].nbytes > largest:
            packs.append([])
            size = 0
        packs[-1].append(name)
        size += state[name].nbytes
    return packs


def _check_config(target: nn.Module, name: str, small: nn.Module, example: Inputs) -> None:
    """
    Raises:
        ModelError: the block that the new configuration makes gives something else with these weights.
    """
    try:
        built = load_block(target, name, lambda own: small.state_dict()[own.removeprefix(f"{name}.")])
        a, b = (run_in_double(copy_as_double(m), example) for m in (built, small))
        differ = output_difference(a, b)
    except RuntimeError as error:  # other shapes than the configuration says
        raise ModelError(f"{name}: the block that its configuration makes takes other tensors ({error}).") from error
    if not differ <= TOLERANCE:
        raise ModelError(f"{name}: the block that its configuration makes gives outputs that differ by {differ:.2g}.")


def _save_config(target: Any, original: Any, place: Path) -> None:
    target.config.architectures = original.config.architectures or [type(original).__name__]
    target.config.save_pretrained(place)
