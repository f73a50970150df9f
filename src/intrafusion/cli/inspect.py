"""intrafusion inspect: the channel groups of a network, proven by permutation, or what was done to a saved one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from intrafusion import pipeline
from intrafusion.cli.console import progress_bar, working
from intrafusion.cli.network import Network, is_saved, read_network
from intrafusion.cli.options import Arguments, AsJson, Base, Device, InputShapes, Name, TrustProgram, WeightFiles
from intrafusion.cli.show import plan_data, print_json, print_plan, say
from intrafusion.compressed import Restoration
from intrafusion.graph import ChannelGraph, ChannelGroup, tabulate_graph
from intrafusion.io.folder import read_document
from intrafusion.measure.closeness import OUTPUT_ERROR
from intrafusion.measure.comparison import Comparison
from intrafusion.measure.size import Size, size_of
from intrafusion.plan import Plan, describe_members
from intrafusion.table import lay_out_figures


def inspect_command(
    model: Name,
    base: Base = None,
    weights: WeightFiles = None,
    arguments: Arguments = None,
    inputs: InputShapes = None,
    device: Device = "cpu",
    trust_program: TrustProgram = False,
    as_json: AsJson = False,
) -> None:
    """Show the channel groups of a network and which can be reduced; of a saved folder alone, what was done.

    Weights do not matter here: a network of the zoo is built with random ones.
    """
    with working("nothing is ever written; the same command starts again."):
        saved = base is None and not trust_program and is_saved(model)
        if saved:
            plan, before, after = read_saved(Path(model))
            told = read_document(Path(model))
            restored, comparison = read_done(told)
        else:
            network = read_network(
                model, base=base, weights=weights or (), arguments=arguments or (), inputs=inputs or (), device=device,
                trained=False, trust_program=trust_program,
            )  # fmt: skip
            graph, size = _find_graph(network)
    if saved:
        done = {"restored": told.get("restored", []), "comparison": told.get("comparison")}
        notes = list(told.get("notes", []))
        if as_json:
            print_json("inspect", {"model": model, **plan_data(plan, before, after), **done, "notes": notes})
        else:
            _print_done(comparison, [*restored, *(f"note: {note}" for note in notes)])
            print_plan(plan, *((before, after) if comparison is None else (None, None)))
    else:
        data = {"model": model, **_graph_data(graph, size)}
        print_json("inspect", data) if as_json else _print_graph(graph, size)


def read_saved(folder: Path) -> tuple[Plan, Size | None, Size | None]:
    """The plan in a saved folder, and the sizes before and after; a plan that was not carried out has none."""
    data = read_document(folder)
    before, after = (Size(**data[key]) if key in data else None for key in ("before", "after"))
    return Plan.from_json(json.dumps(data)), before, after


def read_done(told: Mapping[str, Any]) -> tuple[list[str], Comparison | None]:
    """What was done against the loss, in words, and both networks beside each other, as a folder tells."""
    comparison = told.get("comparison")
    restored = [str(Restoration(**step)) for step in told.get("restored", [])]
    return restored, None if comparison is None else Comparison.from_data(comparison)


def _print_done(comparison: Comparison | None, said: Sequence[str]) -> None:
    """Latency was that of another machine, or moment."""
    figures = [] if comparison is None else [row for row in comparison.figures() if row[0] != "latency"]
    meaning = [f"output error: {OUTPUT_ERROR}"] if any("output error" in sentence for sentence in said) else []
    lines = lay_out_figures(figures, [*said, *meaning])
    if lines:
        say("\n".join([*lines, ""]))


def _find_graph(network: Network) -> tuple[ChannelGraph, Size]:
    with progress_bar("inspect") as progress:
        graph = pipeline.inspect(network.model, network.inputs, progress=progress)
    return graph, size_of(network.model, network.inputs)


def _graph_data(graph: ChannelGraph, size: Size) -> dict[str, Any]:
    return {
        "size": asdict(size),
        "groups": [_group_data(g) for g in graph.groups],
        "fixed": [asdict(side) for side in graph.fixed],
        "warnings": list(graph.warnings),
    }


def _group_data(group: ChannelGroup) -> dict[str, Any]:
    return {
        "group": group.name,
        "n": group.size,
        "kind": group.kind,
        "members": list(describe_members(group)),
        "reason": group.reason,
        "unmixable": group.unmixable,
        "family": group.family,
        "depth": group.depth,
        "notes": list(group.notes),
    }


def _print_graph(graph: ChannelGraph, size: Size) -> None:
    say(str(tabulate_graph(graph, (f"parameters {size.params:,}; MACs {size.macs:,}",))))
