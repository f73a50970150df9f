"""Tables as they are printed and as notebooks show them."""

from __future__ import annotations

import html
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import ChannelGraph, ChannelGroup, Decision, Member, Plan, Recipe, Role
from intrafusion.graph import tabulate_graph
from intrafusion.lab import zoo
from intrafusion.measure.size import Size
from intrafusion.plan import tabulate_plan
from intrafusion.table import MEANINGS, GroupLine, TextTable, find_width, tabulate_groups, wrap_text

MEMBERS = ("stem.weight[0] produces", "stem.bias[0] shifts", "head.weight[1] consumes")
PLAN = Plan(
    Recipe(),
    (
        Decision("stem", 8, 4, MEMBERS, "mixed", family=0),
        Decision("conv#0", 6, 3, ("conv.weight[0] produces",), "selected: softmax over channels", family=1),
        Decision("conv#1", 6, 3, ("conv.weight[0] produces",), "selected: softmax over channels", family=1),
        Decision("whole", 6, 6, ("whole.weight[0] produces",), "mixed", family=2),
        Decision("head", 10, 10, ("head.weight[0] produces",), "mixed", "output of the network", family=3),
        Decision("", 4, 2, ("scale[0] produces",), "mixed", family=4),
    ),
    {},
    warnings=("never reached: unused.weight",),
)


def block(n: int, size: int = 16, reason: str | None = None) -> ChannelGroup:
    """A group as it is in the n-th of several equal blocks."""
    roles = {f"blocks.{n}.up.weight": Role.PRODUCES, f"blocks.{n}.down.weight": Role.CONSUMES}
    members = tuple(Member(name, 0, np.arange(size)[:, None], frozenset([role])) for name, role in roles.items())
    return ChannelGroup(f"blocks.{n}.up", size, members, reason)


# ---- which rows -----------------------------------------------------------------------------------------------------


def test_a_plan() -> None:
    assert tabulate_plan(PLAN).rows == (
        ("stem", "8 -> 4", "mixed", "head"),
        ("conv#{0,1} (x2)", "6 -> 3", "selected", "conv\nnot mixed: softmax over channels"),
        ("whole", "6", "kept", "all kept"),
        ("head", "10", "kept", "output of the network"),
        ("", "4 -> 2", "mixed", "scale"),
    )


def test_twins_that_were_left_alone_for_other_reasons_have_rows_of_their_own() -> None:
    rows = tabulate_plan(PLAN.rolled_back({"conv#1": "does not run"})).rows
    assert [row[:2] for row in rows][1:3] == [("conv#0", "6 -> 3"), ("conv#1", "6")]
    assert rows[2][3] == "does not run"


def test_a_graph() -> None:
    tied = replace(block(2, 8), name="tied", unmixable="softmax over channels")
    heads = replace(block(3, 4), name="heads", kind="block")
    graph = ChannelGraph((block(0), tied, heads, block(1, 16, "an output")), warnings=("unused.weight",))
    table = tabulate_graph(graph, ("4 parameters",))
    assert table.rows == (
        ("blocks.0.up", "16", "mixed", "blocks.0.down"),
        ("tied", "8", "selected", "blocks.2.up, blocks.2.down\nnot mixed: softmax over channels"),
        (
            "heads",
            "4 blocks",
            "kept",
            'whole only where asked for, as by keep={"*:blocks": 0.5}',
        ),
        ("blocks.1.up", "16", "kept", "an output"),
    )
    legend = f"mixed: {MEANINGS['mixed']}; selected: {MEANINGS['selected']}; kept: {MEANINGS['kept']}"
    assert table.below == ("", legend, "2 of 4 groups can be reduced", "4 parameters", "note: unused.weight")


def test_only_words_that_occur_are_explained() -> None:
    assert tabulate_groups(("a", "b", "c", "d"), [GroupLine("x", "3", "kept")]).below == (
        "",
        f"kept: {MEANINGS['kept']}",
    )
    assert tabulate_groups(("a", "b", "c", "d"), [GroupLine("x", "3", "20%")]).below == ()
    assert tabulate_groups(("a", "b", "c", "d"), [GroupLine("x", "3", "20%")], ["so"]).below == ("", "so")


def test_equal_blocks_share_a_row() -> None:
    whys = [f"bmm in blocks.{k}.attention" for k in range(6)]
    groups = (*(block(k) for k in range(4)), block(4, 32), *(block(k, 8, whys[k]) for k in (0, 1, 5)))
    assert tabulate_graph(ChannelGraph(groups)).rows == (
        ("blocks.{0-3}.up (x4)", "16", "mixed", "blocks.*.down"),
        ("blocks.4.up", "32", "mixed", "blocks.4.down"),
        ("blocks.{0,1,5}.up (x3)", "8", "kept", "bmm in blocks.*.attention"),
    )


def test_the_layers_that_twins_run_through_are_counted_only_where_that_is_one_number() -> None:
    def reading(k: int) -> Decision:
        members = tuple(f"b.{later}.{name}.weight[1] consumes" for later in range(k, 4) for name in "pqrs")
        return Decision(f"b.{k}.up", 6, 3, members, "mixed")

    one, many = (tabulate_plan(Plan(Recipe(), tuple(map(reading, which)), {})).rows for which in ([3], [0, 1]))
    assert one == (("b.3.up", "6 -> 3", "mixed", "b.3.p, b.3.q, b.3.r and 1 more"),)
    assert many == (("b.{0,1}.up (x2)", "6 -> 3", "mixed", "b.*.p, b.*.q, b.*.r and more"),)


def test_layers_with_weight_norm_have_their_own_names() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), norm(nn.Linear(6, 3)))
    graph = intrafusion.inspect(model, torch.randn(2, 4))
    assert [group.name for group in graph.groups] == ["0", "2"]
    assert graph["0"].producers == ("0",)
    assert graph["0"].consumers == ("2",)
    assert "parametrizations" not in str(graph)
    small = intrafusion.compress(model, torch.randn(2, 4), keep={"0": 0.5}, restore=None)
    assert small.plan.sizes == {"0": 3}
    assert "parametrizations" not in str(small)


def test_what_is_printed_is_the_table() -> None:
    graph = ChannelGraph((block(0),))
    assert str(graph) == str(tabulate_graph(graph))
    assert str(PLAN) == str(tabulate_plan(PLAN))
    assert str(PLAN).splitlines()[0].split() == ["group", "channels", "how", "other", "layers,", "or", "reason"]


@pytest.mark.parametrize("name", ["cifar10_resnet20", "cifar10_vit", "cifar10_densenet100"])
def test_the_tables_of_known_networks_fit_a_screen(name: str) -> None:
    graph = intrafusion.trace.trace(zoo.build(name), zoo.example_input(name))
    lines = tabulate_graph(graph).list_lines(100)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


# ---- as text --------------------------------------------------------------------------------------------------------


def test_text_is_aligned_and_ends_with_sizes_and_notes() -> None:
    lines = tabulate_plan(PLAN, Size(2000, 10), Size(1500, 0)).list_lines(100)
    column = lines[0].index("other layers")
    assert set(lines[1]) == {"-"}
    assert [line[column:] for line in lines[2:5]] == ["head", "conv", "not mixed: softmax over channels"]
    assert lines[-2] == "parameters 2,000 -> 1,500 (75.0%); MACs 10 -> 0 (0.0%)"
    assert lines[-1] == "note: never reached: unused.weight"


def test_without_sizes_there_is_no_line_of_sizes() -> None:
    assert "parameters" not in str(tabulate_plan(PLAN))
    assert "parameters 0; MACs 5 -> 5 (100.0%)" in str(tabulate_plan(PLAN, Size(0, 5), Size(0, 5)))


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_line_is_wider_than_asked_and_no_word_is_lost(width: int) -> None:
    name = "encoder.layers.0.self_attention.output_projection.dense"
    reason = f"all channels of this group are seen together: {name}_a, {name}_b"
    table = TextTable(("group", "n", "reason"), ((name, "16", reason), ("b", "4", "")), (reason,))
    lines = table.list_lines(width)
    assert max(map(len, lines)) <= width
    column = lines[0].index("reason")
    rows, below = lines[2 : 2 + len(lines) - 2 - len(wrap_text(reason, width))], wrap_text(reason, width)
    assert re.sub(r"\s", "", "".join(line[column:] for line in rows)) == reason.replace(" ", "")
    assert re.sub(r"\s", "", "".join(line[:column] for line in rows)).replace("16", "") == f"{name}b4"
    assert lines[-len(below) :] == below


def test_lines_are_broken_at_spaces_else_behind_dots_else_anywhere() -> None:
    assert wrap_text("one two three", 8) == ["one two", "three"]
    assert wrap_text("see encoder.layers.dense, too", 16) == ["see", "encoder.layers.", "dense, too"]
    assert wrap_text("x" * 20, 8) == ["x" * 8, "x" * 8, "x" * 4]
    assert wrap_text("", 8) == [""]
    assert wrap_text("    indented", 20) == ["    indented"]


def test_what_has_more_than_a_few_lines_is_cut() -> None:
    lines = wrap_text("word " * 100, 20)
    assert len(lines) == 8
    assert lines[-1] == "word word word wo..."


def test_numbers_stand_to_the_right() -> None:
    table = TextTable(("keep", "accuracy"), (("0.5", "9.0"), ("1", "10.25")), numbers=True)
    assert table.list_lines(10)[2:] == [" 0.5       9.0", "   1     10.25"]


def test_the_width_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert find_width() == 100
    monkeypatch.setattr("sys.stdout", None)
    assert find_width() == 100
    monkeypatch.setenv("COLUMNS", "73")
    assert find_width() == 73
    monkeypatch.undo()
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1)
    monkeypatch.setattr(os, "get_terminal_size", lambda file: os.terminal_size((123, 40)))
    assert find_width() == 123


# ---- as HTML --------------------------------------------------------------------------------------------------------


def test_notebooks_show_the_same_table_with_names_escaped() -> None:
    bad = "<script>alert('&')</script>"
    plan = Plan(Recipe(), (Decision(bad, 2, 2, (), "mixed", f"because of {bad}"),), {}, warnings=(bad,))
    page = plan._repr_html_()
    assert bad not in page
    text = html.unescape(re.sub(r"<wbr>|<(?!script)[^>]*>", " ", page))
    legend = f"kept: {MEANINGS['kept']}"
    shown = f"group channels how other layers, or reason {bad} 2 kept because of {bad} {legend} note: {bad}"
    assert text.split() == shown.split()


def test_notebooks_show_one_row_for_each_row() -> None:
    graph = ChannelGraph((*(block(k) for k in range(4)), block(0, 2)))
    assert graph._repr_html_().count("<tr>") == 1 + 2
    assert PLAN._repr_html_().count("<tr>") == 1 + len(tabulate_plan(PLAN).rows)


def test_the_colours_are_those_of_the_page() -> None:
    page = PLAN._repr_html_()
    assert re.findall(r"#[0-9a-f]{3,6}|rgb|white(?!-)|black", page.replace("#{", "")) == []
