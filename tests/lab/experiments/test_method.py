"""Methods as text."""

from __future__ import annotations

import pytest

from intrafusion.lab.experiments.method import Method, parse_method
from intrafusion.reduce import IntraFusion, Select
from intrafusion.restore import LeastSquares, Reestimate


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("select", Method(Select())),
        ("intrafusion:normalization=function, bias=false,p=2", Method(IntraFusion("function", p=2, bias=False))),
        ("select+noise", Method(Select(), ("noise",))),
        (
            "select+reestimate + least_squares:rows=5",
            Method(Select(), (Reestimate(), LeastSquares(rows=5))),
        ),
    ],
)
def test_reducer_options_and_steps(text, method):
    assert parse_method(text) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selct", "unknown reducer 'selct'. Did you mean 'select'"),
        ("intrafusion:p", "expected NAME:option=value"),
        ("intrafusion:q=1", "reducer 'intrafusion': unknown hyper-parameter 'q'"),
        ("intrafusion:normalization=sauce", "unknown normalization 'sauce'. Did you mean 'source'"),
        ("select+closd_form", "unknown restorer 'closd_form'"),
        ("select+noise:rows=3", "'noise' takes no options"),
    ],
)
def test_what_cannot_be_read_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        parse_method(text)
