"""Figures hold the numbers of the records, and Plotly takes them."""

from __future__ import annotations

import pytest
from lab.report.samples import original, reduction, row_of_plane

from intrafusion.lab.report.figures import Figure, figures, methods_of, sizes_of_plan
from intrafusion.plan import Decision


def variant(figure: Figure, *values: str):
    key = tuple(choice.values.index(value) for choice, value in zip(figure.choices, values, strict=True))
    return figure.variants[key]


def test_there_is_a_figure_for_every_experiment(records):
    assert list(figures(records)) == ["curves", "gains", "sizes", "marginals", "training", "drift", "landscape"]
    assert figures([original()]) == {}


def test_plotly_knows_every_property(records):
    go = pytest.importorskip("plotly.graph_objects", reason="needs plotly: pip install 'intrafusion[dev]'")
    for figure in figures(records).values():
        assert figure.variants
        for shown in figure.variants.values():
            go.Figure(data=list(shown.data), layout=dict(shown.layout))  # raises on a name or value it does not know


@pytest.mark.parametrize(
    ("against", "x"), [("channels kept", [50, 90]), ("parameters", [250, 810]), ("MACs", [1250, 4050])]
)
def test_curves_run_over_size(records, against, x):
    pruned, fused, line = variant(figures(records)["curves"], "net", "whole network", "l1", against).data
    assert (pruned["x"], pruned["y"]) == (x, [20, 80])
    assert (fused["x"], fused["y"]) == (x, [60, 85])
    assert (line["x"], line["y"]) == (x, [90, 90])
    assert [t["meta"] for t in (pruned, fused, line)] == [
        {"method": "select"},
        {"method": "intrafusion"},
        {"role": "reference"},
    ]


def test_whole_networks_come_first(records):
    assert figures(records)["curves"].choices[1].values == ("whole network", "conv1", "conv2")


def test_seeds_become_a_mean_with_the_range():
    records = [reduction("conv1", k, "select", a, seed=s) for k in (0.5, 0.9) for s, a in enumerate((0.2, 0.3, 0.7))]
    (trace,) = variant(figures(records)["curves"], "net", "conv1", "l1", "channels kept").data
    assert trace["y"] == pytest.approx([40, 40])
    assert trace["error_y"]["array"] == pytest.approx([30, 30])
    assert trace["error_y"]["arrayminus"] == pytest.approx([20, 20])


def test_gains_are_fused_minus_pruned(records):
    (trace,) = variant(figures(records)["gains"], "net", "l1").data
    assert (trace["y"], trace["x"]) == (["conv1", "conv2"], ["90 %", "50 %"])
    assert [pytest.approx(row) for row in trace["z"]] == [[5, 40], [-45, -10]]


def test_sizes_before_and_after(records):
    before, after = variant(figures(records)["sizes"], "net", "whole network", "50 %").data
    assert before["y"] == after["y"] == ["conv1", "conv2"]
    assert (before["x"], after["x"]) == ([16, 32], [8, 16])
    figure = sizes_of_plan([Decision("conv1", 16, 8, (), "mixed"), Decision("fc", 10, 10, (), "mixed", "the output")])
    assert figure is not None
    assert [trace["x"] for trace in variant(figure).data] == [[16, 10], [8, 10]]


def test_drift_shows_shares_and_what_lies_beyond(records):
    pruned, fused = variant(figures(records)["drift"], "net", "conv1", "50 %").data
    assert (pruned["x"], pruned["y"]) == ([0.5, 1.5, 2.5], [10, 60, 20])
    assert pruned["name"] == "pruned: mean 1.7, 10 % beyond 3"
    assert fused["name"] == "fused: mean 1"


def test_a_landscape_is_drawn_once_all_its_rows_are_there():
    rows = [row_of_plane(row) for row in (2, 0, 1)]
    assert "landscape" not in figures(rows[:2])
    surface, corners = variant(figures(rows)["landscape"], "net", "whole network, l1", "70 %", "accuracy").data
    assert surface["y"] == [0, 1, 2]
    assert surface["z"][2] == pytest.approx([20, 30, 40])
    assert corners["text"] == ["original", "pruned", "fused"]
    assert (corners["x"], corners["y"]) == ([0, 2, 2], [0, 0, 2])
    loss, _ = variant(figures(rows)["landscape"], "net", "whole network, l1", "70 %", "loss").data
    assert loss["z"][1] == [1, 2, 3]


def test_training_and_marginals(records):
    pruned, fused = variant(figures(records)["training"], "net", "whole network", "50 %").data
    assert (pruned["x"], pruned["y"]) == ([0, 0, 1], pytest.approx([90, 30, 70]))
    assert fused["y"][-1] == pytest.approx(80)
    boxes = variant(figures(records)["marginals"], "conv1", "50 %").data
    assert [box["name"] for box in boxes] == ["source uniform", "source softmax"]
    assert boxes[0]["y"] == pytest.approx([50, 51, 52])
    assert boxes[0]["text"] == ["net", "other", "third"]


def test_the_usual_methods_have_the_first_colours():
    records = [reduction("conv1", 0.5, method, 0.5) for method in ("fold", "intrafusion", "mine", "select")]
    assert methods_of(records) == ["select", "intrafusion", "fold", "mine"]
