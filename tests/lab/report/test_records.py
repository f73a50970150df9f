"""Tables of records, against numbers worked out by hand."""

from __future__ import annotations

import pytest
from lab.report.samples import drifting, original, reduction, trained

from intrafusion.lab.report.records import (
    comparison,
    drifts,
    latest_records,
    method_label,
    significance,
    stages,
    tables,
)


def test_methods_have_readable_names():
    assert method_label("select") == "pruned"
    assert method_label("intrafusion:normalization=function,bias=false+closed_form") == (
        "fused (normalization=function, bias=false) + closed_form"
    )
    assert method_label("mine:k=2") == "mine (k=2)"


def test_comparison_sets_methods_side_by_side_with_their_gain():
    records = [
        original(),
        reduction("conv1", 0.5, "select", 0.25),
        reduction("conv1", 0.5, "intrafusion", 0.5),
        reduction("conv2", 0.9, "intrafusion", 0.75),
    ]
    table = comparison(records)
    assert table is not None
    assert table.header == ("group", "channels", "keep", "criterion", "pruned", "fused", "gain")
    assert table.texts() == [
        ("conv1", "16 → 8", "50 %", "l1", "25.0 %", "50.0 %", "+25.0"),
        ("conv2", "16 → 14", "90 %", "l1", "", "75.0 %", ""),
    ]
    assert [cell.value for cell in table.rows[0][4:]] == [25, 50, 25]
    assert table.numeric == {1, 2, 4, 5, 6}


def test_several_seeds_are_a_mean_and_a_standard_deviation():
    records = [reduction("conv1", 0.5, "select", a, seed=i) for i, a in enumerate((0.2, 0.4, 0.6))]
    table = comparison(records)
    assert table is not None
    assert table.texts() == [("conv1", "16 → 8", "50 %", "l1", "40.0 ± 20.0 %")]


def test_several_networks_have_a_column():
    records = [reduction("conv1", 0.5, "select", 0.5, network=name) for name in ("a", "b")]
    table = comparison(records)
    assert table is not None
    assert [row[0] for row in table.texts()] == ["a", "b"]
    assert table.header[:2] == ("network", "group")


def test_a_setting_measured_twice_counts_once_with_its_last_result():
    records = [reduction("conv1", 0.5, "select", 0.1), reduction("conv1", 0.5, "select", 0.3)]
    assert [r.result["accuracy"] for r in latest_records(records)] == [0.3]


def test_significance_of_separate_samples(records):
    table = significance(records)
    assert table is not None
    # two samples of three without overlap: H = 12 / (6 * 7) * (6^2 + 15^2) / 3 - 3 * 7 = 27 / 7
    assert table.header == ("group", "keep", "source uniform", "source softmax", "H", "p")
    assert table.texts() == [("conv1", "50 %", "51.0 ± 1.0 %", "61.0 ± 1.0 %", "3.86", "0.050")]
    assert table.rows[0][4].value == pytest.approx(27 / 7)


def test_drift_and_training():
    table = drifts([drifting("select", (1, 0, 0, 0), 0.5), drifting("intrafusion", (1, 0, 0, 0), 0.25)])
    assert table is not None
    assert table.texts() == [("conv1", "50 %", "l1", "0.5", "0.25")]
    table = stages([trained("select", 0.7)])
    assert table is not None
    assert table.texts() == [("net", "pruned", "50 %", "90.0 %", "30.0 %", "70.0 %", "0")]


def test_each_record_is_in_the_tables_that_fit_it(records):
    assert [table.title for table in tables(records)] == [
        "Accuracy",
        "Kruskal-Wallis over networks",
        "Before and after fine-tuning",
        "Mean distance of the outputs",
    ]
    accuracy = tables(records)[0]
    assert len(accuracy.rows) == 6
    assert tables([]) == []
