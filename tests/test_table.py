from __future__ import annotations

from dataclasses import replace

from intrafusion import Decision, Plan, Recipe
from intrafusion.measure.size import Size
from intrafusion.table import plan_text, table_rows

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


def test_rows() -> None:
    assert table_rows(PLAN) == [
        ("stem", "8 -> 4", "mixed", "stem, head"),
        ("conv#0 .. conv#1", "2 x 6 -> 3", "selected: softmax over channels", "conv"),
        ("whole", "6", "kept", "all kept"),
        ("head", "10", "kept", "output of the network"),
        ("", "4 -> 2", "mixed", "scale"),
    ]


def test_twins_that_were_left_alone_for_other_reasons_have_rows_of_their_own() -> None:
    broken = PLAN.rolled_back({"conv#1": "does not run"})
    assert [r[:2] for r in table_rows(broken)][1:3] == [("conv#0", "6 -> 3"), ("conv#1", "6")]
    assert table_rows(broken)[2][3] == "does not run"


def test_text_is_aligned_and_ends_with_sizes_and_notes() -> None:
    lines = plan_text(PLAN, Size(2000, 10), Size(1500, 0)).splitlines()
    column = lines[0].index("members or reason")
    assert lines[0].split() == ["group", "channels", "how", "members", "or", "reason"]
    assert set(lines[1]) == {"-"}
    assert [line[column:] for line in lines[2:7]] == [r[3] for r in table_rows(PLAN)]
    assert lines[-2] == "parameters 2,000 -> 1,500 (75.0%); MACs 10 -> 0 (0.0%)"
    assert lines[-1] == "note: never reached: unused.weight"


def test_without_sizes_there_is_no_line_of_sizes() -> None:
    assert "parameters" not in plan_text(PLAN)
    assert "parameters 0; MACs 5 -> 5 (100.0%)" in plan_text(PLAN, Size(0, 5), Size(0, 5))


def test_long_reasons_are_cut() -> None:
    long = replace(PLAN, decisions=(Decision("a", 2, 2, (), "mixed", "x" * 100),), warnings=())
    assert plan_text(long).splitlines()[-1].split()[-1] == "x" * 61 + "..."
