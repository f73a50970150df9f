"""intrafusion compress: a smaller network, shown and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from torch import Tensor

from intrafusion import pipeline
from intrafusion.cli import hugging_face
from intrafusion.cli.console import ROLLED_BACK, Kept, messages, progress_bar, working
from intrafusion.cli.defaults import tells_defaults
from intrafusion.cli.inputs import check_there, read_images, read_texts
from intrafusion.cli.models import read_function
from intrafusion.cli.network import (
    Network,
    annotated,
    lift_precision_,
    list_opening,
    read_network,
    say_saved,
    tell_doubt,
)
from intrafusion.cli.options import (
    Arguments,
    AsJson,
    Base,
    Checkpoints,
    Criterion,
    Device,
    DistillSeconds,
    EvaluateFunction,
    Fractions,
    ImageFile,
    InputShapes,
    KeepProgram,
    Memory,
    Name,
    Of,
    OptionalOutput,
    OptionalSeed,
    Order,
    RankWord,
    RecipeFile,
    ReducerName,
    RoundTo,
    Steps,
    TextFile,
    TrustProgram,
    Uniform,
    WeightFiles,
    choice_option,
    count_option,
    set_distilling,
)
from intrafusion.cli.outputs import check_file, check_place, check_program, check_saving, save_result
from intrafusion.cli.show import plan_data, print_json, say
from intrafusion.compressed import Compressed
from intrafusion.errors import ModelError, RecipeError
from intrafusion.io.atomic import read_text
from intrafusion.large import CompressedFolder, compress_folder
from intrafusion.network.texts import Tokenizer
from intrafusion.recipe import ONLY, Keep, Ranks, Recipe
from intrafusion.reduce import IntraFusion, Reducer
from intrafusion.reduce.fuse import NORMALIZATIONS
from intrafusion.restore import Distill, save_images
from intrafusion.smallest import Search, Wanted, read_wanted


def _layer_option(about: str) -> Any:
    """An option that selects layers."""
    return typer.Option(metavar="LAYER", help=f"{about}: name or pattern, NAME:inputs for what it reads (repeatable).")


def _list_defaults() -> dict[str, Any]:
    """Of the recipe, as far as it has any."""
    recipe: dict[str, Any] = yaml.safe_load(Recipe().to_yaml())
    return {
        "normalization": IntraFusion().normalization,
        "of": "macs",
        "distill_seconds": Distill().seconds,
        **{k: v for k, v in recipe.items() if v not in (None, []) and v is not False},
    }


@tells_defaults(_list_defaults())
def compress_command(
    model: Name,
    output: OptionalOutput = None,
    base: Base = None,
    weights: WeightFiles = None,
    arguments: Arguments = None,
    inputs: InputShapes = None,
    device: Device = "cpu",
    keep: Fractions = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=VALUE",
            help="Instead of --keep: params=0.5 or macs=0.5 (fractions of the original's), latency_ms=3.0, or "
            "memory_mb=20 (weights and results of one call); where to cut is then chosen for the least predicted error "
            "(repeatable: all limits are met).",
        ),
    ] = None,
    min_channels: Annotated[int | None, count_option("No group becomes smaller.")] = None,
    reducer: ReducerName = None,
    normalization: Annotated[str | None, choice_option(NORMALIZATIONS, "Of the reducer intrafusion")] = None,
    importance: Criterion = None,
    order: Order = None,
    round_to: RoundTo = None,
    restore: Steps = None,
    distill_seconds: DistillSeconds = None,
    checkpoints: Checkpoints = None,
    images: ImageFile = None,
    texts: TextFile = None,
    keep_images: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the images that the layers were solved on, for --images and report (.safetensors).",
        ),
    ] = None,
    include: Annotated[list[str] | None, _layer_option("Reduce only the channels of this layer")] = None,
    exclude: Annotated[list[str] | None, _layer_option("Leave the channels of this layer alone")] = None,
    seed: OptionalSeed = None,
    uniform: Uniform = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An output of the network that matters, by name or number; the others may change (repeatable). "
            "All by default.",
        ),
    ] = None,
    untie: Annotated[
        bool | None,
        typer.Option(
            "--untie",
            help="Give a head that shares the weight of an embedding one of its own first, so that the stream between "
            "can be rotated; that adds parameters.",
        ),
    ] = None,
    merge_heads: Annotated[
        int | None,
        count_option("Instead of --keep: so many key/value heads are left, each made of several; nothing else is cut."),
    ] = None,
    ranks: RankWord = None,
    evaluate: EvaluateFunction = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Instead of --keep: the smallest size that loses at most so much of what --evaluate gives, such as "
            "0.01; found in five or six tries.",
        ),
    ] = None,
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="Of --evaluate, as of a loss: a lower number is better.")
    ] = False,
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Instead of --evaluate and --max-drop: the smallest size whose outputs differ by at most this "
            "fraction of their variance on inputs that the solver did not see.",
        ),
    ] = None,
    of: Of = None,
    memory: Memory = None,
    blockwise: Annotated[
        bool,
        typer.Option(
            "--blockwise",
            help="Of a local folder hf:FOLDER: one block of the network after another, so that it need not fit into "
            "memory; sizes are such as its configuration can say.",
        ),
    ] = False,
    program: KeepProgram = False,
    trust_program: TrustProgram = False,
    recipe: RecipeFile = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if a group had to be rolled back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a network smaller and save it as safetensors, plan.json and recipe.yaml.

    A group is rolled back if the smaller network does not run with it, or no longer shows it; the others stay reduced.
    """
    said = locals()
    if blockwise:
        _compress_blockwise(said)
        return
    kept = Kept()
    with working(kept):
        loss = _read_loss(said)
        sizes = None if loss is None else loss.size()
        wanted = read_recipe(recipe, {name: said[name] for name in Recipe.options()}, normalization, sizes)
        wanted = set_distilling(wanted, distill_seconds, checkpoints)
        _check_outputs(output, keep_images)
        lines = check_given(images, texts, keep_images)
        network = read_network(
            model, base=base, weights=weights or (), arguments=arguments or (), inputs=inputs or (), device=device,
            trust_program=trust_program,
        )  # fmt: skip
        found, tokenizer = read_given(network, images, lines)
        tell_doubt(network)
        if output:
            check_place(output, network)
        if program:
            check_program(output, network.model, network.inputs)
        dtypes = lift_precision_(network)
        search = None if loss is None else loss.start(network.model)
        small, rolled_back = _reduce_network(network, wanted, found, tokenizer, memory, search)
        small = hugging_face.lower_precision_(small, dtypes)
        if output:
            save_result(small, output, network, program=program)
            kept.add(output)
        if keep_images and small.images:
            save_images(small.images.join().as_taken().tensors()[0], keep_images)
    if as_json:
        print_json("compress", _summary(network, small, output, rolled_back))
    else:
        _show(network, small, output)
    if strict and rolled_back:
        raise typer.Exit(ROLLED_BACK)


_WHOLE = (
    *("base", "weights", "arguments", "inputs", "target", "outputs", "program", "trust_program", "keep_images"),
    *("as_json", "strict", "memory", "merge_heads", "ranks"),
    *("evaluate", "max_drop", "max_error", "lower_is_better", "of", "distill_seconds", "checkpoints"),
)
"""Options that a network block by block does not take."""
_FLAGS = {"arguments": "arg", "inputs": "input", "as_json": "json"}  # options that are not called as their argument


def _refuse_beside(said: Mapping[str, Any]) -> None:
    """
    Raises:
        RecipeError: options that do not go with --blockwise.
    """
    beside = [name for name in _WHOLE if said[name] not in (None, False, [])]
    if said["device"] not in ("cpu", "auto"):
        beside.append("device")
    if beside:
        named = ", ".join(f"--{_FLAGS.get(name, name).replace('_', '-')}" for name in beside)
        raise RecipeError(f"--blockwise: does not go with {named}; leave out one or the other.")


def _read_loss(said: Mapping[str, Any]) -> Wanted | None:
    """What the smallest size may lose; in place of sizes that a recipe in a file has, not of those that were given.

    Raises:
        RecipeError, BudgetError, ModelError: options that mean nothing.
    """
    function = read_function(said["evaluate"], "--evaluate") if said["evaluate"] else None
    sizes = {name: said[name] or None for name in ("keep", "target", "merge_heads")}
    limits = said["max_drop"], said["max_error"]
    sizes["ranks"] = read_ranks(said["ranks"]) if said["ranks"] else False
    return read_wanted(function, *limits, lower_is_better=said["lower_is_better"], of=said["of"], **sizes)


def _compress_blockwise(said: Mapping[str, Any]) -> None:
    """The command with --blockwise."""
    output = said["output"]
    with working():
        _refuse_beside(said)
        wanted = read_recipe(said["recipe"], {name: said[name] for name in Recipe.options()}, said["normalization"])
        _check_outputs(output, None)
        lines = check_given(said["images"], said["texts"], None)
        done = _compress_blocks(said["model"], output, wanted, said["images"], lines)
    say(str(done))
    _, architecture = hugging_face.split_target(said["model"].removeprefix("hf:"))
    place = output.resolve()
    written = hugging_face.python_expression(f"{place}:{architecture}" if architecture else f"{place}", {})
    say(f"\nsaved to {output}; back in one line:\nimport transformers; model = {written}")


def _compress_blocks(
    model: str, output: Path | None, recipe: Recipe, images: Path | None, texts: list[str] | None
) -> CompressedFolder:
    """
    Raises:
        ModelError: it is not the name of a local folder, or there is no output.
    """
    kind, _, target = model.partition(":")
    name, architecture = hugging_face.split_target(target)
    if kind != "hf" or not Path(name).is_dir():
        raise ModelError(f"--blockwise: expected a local folder as hf:FOLDER, got {model}; fetch the model first.")
    if output is None:
        raise ModelError("--blockwise: expected a folder to write to; give one with -o.")
    options: dict[str, Any] = {option: getattr(recipe, option) for option in Recipe.options()}
    options["uniform"] = True
    tokenizer = hugging_face.read_tokenizer(Path(name)) if texts else None
    options["inputs"] = read_images(images) if images else texts
    with progress_bar("compress") as progress:
        return compress_folder(
            name, output, options.pop("keep"), tokenizer=tokenizer, architecture=architecture, progress=progress,
            **options,
        )  # fmt: skip


def _check_outputs(folder: Path | None, images: Path | None) -> None:
    if folder:
        check_saving(folder)
    if images:
        check_file(images)


def check_given(images: Path | None, texts: Path | None, kept: Path | None) -> list[str] | None:
    """The texts, which are read before anything is built.

    Raises:
        RecipeError: options that exclude each other.
        FolderError: there is no such file, or it holds no text.
    """
    if texts and (images or kept):
        other = f"--images {images}" if images else f"--keep-images {kept}"
        raise RecipeError(f"--texts {texts}: goes without {other}: one is for texts, one for images; leave one out.")
    check_there(images, texts)
    return read_texts(texts) if texts else None


def read_given(
    network: Network, images: Path | None, texts: list[str] | None
) -> tuple[Tensor | list[str] | None, Tokenizer | None]:
    """What the layers are to be solved on, and the tokenizer that texts, or sentences made without data, go through."""
    if images:
        return read_images(images, network.inputs), None
    folder = network.folder or Path(network.name)
    if texts:
        return texts, hugging_face.read_tokenizer(folder)
    return None, hugging_face.find_tokenizer(folder, network.model)


def read_recipe(
    file: Path | None, options: dict[str, Any], normalization: str | None, sizes: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe in a file, or the default one, changed by the options that are not None.

    Args:
        sizes: the first of those between which a search chooses, in place of what the file says.

    Raises:
        RecipeError: the file holds no recipe, an option means nothing, or the reducer has no normalization.
    """
    recipe = Recipe.from_yaml(read_text(file)) if file else Recipe()
    stated = {name: getattr(recipe, name) for name in Recipe.options()}
    chosen = {name: _READERS.get(name, _same)(said) for name, said in options.items() if said not in (None, [])}
    chosen |= {name: size for name, size in (sizes or {}).items() if size is not None}
    if normalization and not file:
        chosen.setdefault("reducer", "intrafusion")
    if {"target", "merge_heads"} & chosen.keys() or ((recipe.target or recipe.merge_heads) and "keep" not in chosen):
        stated["keep"] = None  # the sizes come from the target, or the heads, unless a keep is given now
    elif "keep" in chosen:
        stated["target"] = stated["merge_heads"] = None
    if not isinstance(chosen.get("ranks", False), (bool, str)) and "keep" not in chosen and not file:
        stated["keep"] = None
    recipe = Recipe.of(**stated | chosen)
    recipe = replace(recipe, reducer=_with_normalization(recipe.reducer, normalization)) if normalization else recipe
    recipe.refuse_foreign()
    return recipe


def _with_normalization(reducer: Reducer, normalization: str) -> Reducer:
    if not isinstance(reducer, IntraFusion):
        raise RecipeError(f"--normalization goes with the reducer intrafusion, got {reducer}; leave it out.")
    return replace(reducer, normalization=normalization)


def read_keep(texts: Iterable[str]) -> Keep:
    """0.7, or PATTERN=FRACTION in the order given; a fraction alone among patterns holds for the rest.

    >>> read_keep(["0.7", "layer2.*=0.5"])
    {'layer2.*': 0.5, '*': 0.7}

    Raises:
        RecipeError: not a number, or two numbers for one pattern.
    """
    keep: dict[str, float] = {}
    for text in sorted(texts, key=lambda t: "=" not in t):
        pattern, equals, number = text.rpartition("=")
        if equals and not pattern:
            raise RecipeError(f"--keep {text}: expected a pattern in front of =, such as layer2.*=0.5, or 0.5 alone.")
        pattern = pattern or "*"
        if pattern in keep:
            raise RecipeError(f"--keep {text}: there is a fraction for {pattern!r} already; give one for each pattern.")
        try:
            keep[pattern] = float(number)
        except ValueError as error:
            raise RecipeError(f"--keep {text}: expected a fraction such as 0.7, or PATTERN=0.7.") from error
    return keep["*"] if keep.keys() == {"*"} else keep


def read_fraction(text: str, option: str = "--keep") -> float:
    """One fraction for all groups.

    Raises:
        RecipeError: it is a pattern, or no number.
    """
    try:
        return float(text)
    except ValueError as error:
        raise RecipeError(f"{option} {text}: expected a fraction alone here, such as 0.7.") from error


def read_ranks(text: str) -> Ranks:
    """
    >>> read_ranks("both"), read_ranks("only"), read_ranks("0.5")
    (True, 'only', 0.5)

    Raises:
        RecipeError: neither a word nor a number.
    """
    if text in ("both", ONLY):
        return text == "both" or text
    try:
        return float(text)
    except ValueError as error:
        raise RecipeError(f"--ranks {text}: expected both, only, or a fraction such as 0.5.") from error


def _read_target(texts: Iterable[str]) -> dict[str, float]:
    """
    >>> _read_target(["macs=0.5", "params=0.6"])
    {'macs': 0.5, 'params': 0.6}

    Raises:
        RecipeError: not a number, or two numbers for one kind.
    """
    target: dict[str, float] = {}
    for text in texts:
        kind, _, number = text.partition("=")
        if kind in target:
            raise RecipeError(f"--target {text}: there is a limit for {kind} already; give one for each kind.")
        try:
            target[kind] = float(number)
        except ValueError as error:
            raise RecipeError(f"--target {text}: expected KIND=VALUE, such as params=0.5 or latency_ms=3.0.") from error
    return target


def _same(said: Any) -> Any:
    return said


_READERS: dict[str, Callable[[Any], Any]] = {"keep": read_keep, "target": _read_target, "ranks": read_ranks}
"""Options that are written in another way than in a recipe."""


def _reduce_network(
    network: Network,
    recipe: Recipe,
    given: Tensor | list[str] | None,
    tokenizer: Tokenizer | None,
    memory: str | None,
    search: Search | None = None,
) -> tuple[Compressed, list[str]]:
    """The smaller network, and the groups that were to be reduced but had to be rolled back."""
    recipe = recipe if search is None else search.wanted.ask(recipe)
    with progress_bar("compress") as progress:
        model = pipeline.prepare_model(network.model, recipe, network.inputs)
        graph = pipeline.inspect(model, recipe.call_of(network.inputs), progress=progress)
        if network.folder and (why := pipeline.explain_unsaid(recipe, model, graph)):
            messages.print(
                f"note: intrafusion.load will be needed, not from_pretrained, unless what is in the way is rolled "
                f"back: {why}; --uniform makes sizes that a configuration says.",
                soft_wrap=True,
            )
        small = pipeline.follow(
            *(recipe, network.model, graph, network.inputs, given),
            tokenizer=tokenizer,
            search=search,
            memory=memory,
            progress=progress,
        )
    return annotated(small, network), list(small.rolled_back)


def _summary(network: Network, small: Compressed, folder: Path | None, rolled_back: list[str]) -> dict[str, Any]:
    return {
        "model": network.name,
        "output": str(folder) if folder else None,
        "load": network.loading(folder) if folder else None,
        "from_pretrained": bool(folder and list_opening(folder)),
        "rolled_back": rolled_back,
        "restored": [asdict(step) for step in small.restored],
        "comparison": small.comparison.to_data() if small.comparison else None,
        "notes": list(small.notes),
        "trials": small.trials.to_data() if small.trials else None,
        **plan_data(small.plan, small.before, small.after),
        "warnings": list(dict.fromkeys((*small.plan.warnings, *small.warnings))),
    }


def _show(network: Network, small: Compressed, folder: Path | None) -> None:
    say(str(small))
    say_saved(network, folder)
