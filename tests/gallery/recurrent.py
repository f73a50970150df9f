"""Recurrent networks: a hidden channel covers one row per gate, and feeds back into the columns of its own weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.core import Inputs, Wired, case

Built = tuple[nn.Module, Inputs]


def last_step(net: Any, x: Tensor) -> Tensor:
    return net.head(net.rnn(net.e(x).tanh())[0][:, -1])


def recurrent(rnn: nn.Module, hidden: int) -> Built:
    return Wired(last_step, e=nn.Linear(5, 7), rnn=rnn, head=nn.Linear(hidden, 3)), torch.randn(2, 4, 5)


@case({"e": 7, "rnn": (6, 6)}, blocked={"head": "output"})
def lstm_of_two_layers() -> Built:
    return recurrent(nn.LSTM(7, 6, 2, batch_first=True), 6)


@case({"e": 7, "rnn": 6}, blocked={"head": "output"})
def gru() -> Built:
    return recurrent(nn.GRU(7, 6, batch_first=True), 6)


@case({"e": 7, "rnn": 6}, blocked={"head": "output"})
def elman() -> Built:
    return recurrent(nn.RNN(7, 6, batch_first=True, nonlinearity="relu", bias=False), 6)


@case({"e": 7, "rnn": (6, 6)}, blocked={"head": "output"})
def lstm_bidirectional() -> Built:
    return recurrent(nn.LSTM(7, 6, batch_first=True, bidirectional=True), 12)


@case({"e": 7, "rnn": (6, 3)}, blocked={"head": "output"})
def lstm_with_projection() -> Built:
    """Six cell channels, projected to three that feed back."""
    return recurrent(nn.LSTM(7, 6, batch_first=True, proj_size=3), 3)


@case({"e": 7, "rnn": 6}, blocked={"head": "output"})
def lstm_cell_in_a_loop() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        first, *rest = net.e(x).tanh().unbind(1)
        state = net.rnn(first)
        for step in rest:
            state = net.rnn(step, state)
        return net.head(state[0])

    return Wired(wiring, e=nn.Linear(5, 7), rnn=nn.LSTMCell(7, 6), head=nn.Linear(6, 3)), torch.randn(2, 4, 5)


@case({"e": 7, "rnn": 6}, blocked={"head": "output"})
def gru_cell_from_a_learned_state() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        state = net.start.expand(len(x), -1)
        for step in net.e(x).tanh().unbind(1):
            state = net.rnn(step, state)
        return net.head(state)

    start = nn.Parameter(torch.randn(1, 6))
    net = Wired(wiring, e=nn.Linear(5, 7), rnn=nn.GRUCell(7, 6), start=start, head=nn.Linear(6, 3))
    return net, torch.randn(2, 4, 5)


@case({"into back": 6}, blocked={"head": "output"})
def recurrence_by_hand() -> Built:
    def wiring(net: Any, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 6, dtype=x.dtype)
        for step in x.unbind(1):
            state = torch.tanh(net.into(step) + net.back(state))
        return net.head(state)

    layers = {"into": nn.Linear(5, 6), "back": nn.Linear(6, 6, bias=False), "head": nn.Linear(6, 3)}
    return Wired(wiring, **layers), torch.randn(2, 4, 5)


@case({"into": 6, "gates": 5, "mix": 4}, blocked={"head": "output"})
def convolutional_lstm() -> Built:
    """One convolution over input and state makes all four gates."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        state = memory = torch.zeros(len(x), 5, 6, 6, dtype=x.dtype)
        for frame in x.unbind(1):
            joined = torch.cat([F.relu(net.into(frame)), state], 1)
            i, f, o, g = net.gates(joined).chunk(4, 1)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            state = o.sigmoid() * memory.tanh()
        return net.head(F.relu(net.mix(state)))

    convs = {"into": nn.Conv2d(2, 6, 3, padding=1), "gates": nn.Conv2d(11, 20, 3, padding=1)}
    return Wired(wiring, **convs, mix=nn.Conv2d(5, 4, 1), head=nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 2, 6, 6)
