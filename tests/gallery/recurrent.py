"""Recurrent networks: a hidden channel covers one row per gate, and feeds back into the columns of its own weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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


LENGTHS = torch.tensor([2, 4, 1])


def packed(rnn: nn.Module, hidden: int, read: Any, lengths: Tensor = LENGTHS, **options: Any) -> Built:
    """Sequences of unequal length, packed for a recurrent layer; `read` takes the padded outputs and the states."""

    def wiring(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
        first = getattr(rnn, "batch_first", True)
        given = pack_padded_sequence(net.e(x).tanh(), lengths, batch_first=first, enforce_sorted=False)
        outputs, states = net.rnn(given)
        return net.head(read(pad_packed_sequence(outputs, batch_first=first, **options)[0], states))

    net = Wired(wiring, e=nn.Linear(5, 7), rnn=rnn, head=nn.Linear(hidden, 3))
    x = torch.randn(3, 4, 5)
    return net, (x if getattr(rnn, "batch_first", True) else x.transpose(0, 1), lengths)


@case({"e": 7, "rnn": 6}, blocked={"head": "output"})
def packed_lstm() -> Built:
    return packed(nn.LSTM(7, 6, batch_first=True), 6, lambda outputs, _: outputs)


@case({"e": 7, "rnn": (6, 6)}, blocked={"head": "output"})
def packed_gru_of_two_layers_in_order() -> Built:
    """Already sorted, the step first, and the mean over all steps, those that were padded included."""
    return packed(nn.GRU(7, 6, 2), 6, lambda outputs, _: outputs.mean(0), torch.tensor([4, 3, 1]))


@case({"e": 7, "rnn": (6, 6)}, blocked={"head": "output"})
def packed_elman_in_both_directions() -> Built:
    """What is padded with is no zero, but the same for all channels."""
    rnn = nn.RNN(7, 6, batch_first=True, bidirectional=True)
    return packed(rnn, 12, lambda outputs, _: outputs.amax(1), padding_value=-2.0, total_length=6)


@case({"e": 7, "rnn": 6}, blocked={"head": "output"})
def packed_gru_of_which_the_last_state_is_read() -> Built:
    return packed(nn.GRU(7, 6, batch_first=True), 6, lambda _, states: states[-1])


@case(blocked={"e": "packed along channels", "head": "output"})
def channels_that_are_taken_for_steps() -> Built:
    def wiring(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
        steps = net.e(x)[..., None]
        data = pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False).data
        return net.head(data.view(1, -1))

    net = Wired(wiring, e=nn.Linear(5, 4), head=nn.Linear(7, 3))
    return net, (torch.randn(3, 5), LENGTHS)


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
