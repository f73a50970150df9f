"""Other threads of the program, and interrupts, while a network is looked at and reduced."""

from __future__ import annotations

import contextvars
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion import compress, inspect
from intrafusion.network.apart import borrow, forked_random_numbers, one_at_a_time, only_here, uninterrupted
from intrafusion.network.state import preserve_state
from intrafusion.observe.observe import observe
from intrafusion.restore import LeastSquares, calibrate
from intrafusion.trace import trace

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
GARBAGE = 1e3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Has something done in the middle of each of its calls, but for those that are made by that."""

    meanwhile: ClassVar[Callable[[], Any] | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 24), nn.Linear(24, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        x = F.relu(self.norm(self.a(x)))
        if Net.meanwhile is not None and threading.current_thread().name != "other":
            in_another_thread(Net.meanwhile)
        return self.c(F.relu(self.b(x)))


def make_net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(X)  # statistics of the norm
    net.calls.zero_()
    net.last = None
    return net.eval()


def in_another_thread(function: Callable[[], Any]) -> Any:
    found, errors = [], []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


@pytest.fixture(autouse=True)
def nothing_meanwhile() -> Iterator[None]:
    yield
    Net.meanwhile = None


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "calls"}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def list_hooks(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(vars(module)[table]) for module in model.modules() for table in tables)


def draw_state() -> tuple[Tensor, Any, Tensor]:
    return torch.get_rng_state(), random.getstate(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002


# ---- another thread calls the network -------------------------------------------------------------------------------

WORK: dict[str, Callable[[Net], Any]] = {
    "compress": lambda net: weights_of(compress(net, X[:4], 0.5, inputs=X).model),
    "in batches": lambda net: weights_of(compress(net, X[:4], 0.5, inputs=list(X.split(20))).model),
    "in place": lambda net: weights_of(compress(net, X[:4], 0.5, inputs=X, inplace=True).model),
    "target": lambda net: weights_of(compress(net, X[:4], target={"macs": 0.5}, inputs=X).model),
    "chip": lambda net: weights_of(compress(net, X[:4], 0.5, importance="chip", reducer="select", inputs=X).model),
    "noise": lambda net: weights_of(compress(net, X[:4], 0.5, restore="noise").model),
    "steps": lambda net: weights_of(intrafusion.compress_in_steps(net, X[:4], 0.5, 2, inputs=X).model),
    "frontier": lambda net: weights_of(intrafusion.frontier(net, X[:4], X, sizes=(0.8, 0.5))[1].model),
    "inspect": lambda net: {g.name: torch.from_numpy(g.members[0].positions) for g in inspect(net, X[:4]).groups},
    "moments": lambda net: look_at_moments(net),
    "observe": lambda net: look_at_activations(net),
    "restorer": lambda net: restore_by_hand(net),
}


def restore_by_hand(net: Net) -> dict[str, Tensor]:
    graph = inspect(net, X[:4])
    small = compress(net, X[:4], 0.5, restore=None)
    LeastSquares()(small, net, graph, X)
    return weights_of(small.model)


def look_at_moments(net: Net) -> dict[str, Tensor]:
    found = calibrate(net, X[:4], images=X).moments_of(inspect(net, X[:4]))
    return {name: moments.covariances for name, moments in found.items()}


def look_at_activations(net: Net) -> dict[str, Tensor]:
    graph = inspect(net, X[:4])
    found = observe(net, graph, graph.reducible, X, ["activations"])
    return {name: seen.activations.mean for name, seen in found.items() if seen.activations is not None}


@pytest.mark.parametrize("work", WORK)
def test_calls_by_another_thread_change_nothing_and_are_not_changed(work: str) -> None:
    alone = WORK[work](make_net())
    net, other, calls = make_net(), make_net(), 0
    expected = other(GARBAGE)

    def call() -> None:
        nonlocal calls
        calls += 1
        with torch.no_grad():
            assert work == "in place" or torch.equal(net(GARBAGE), expected)

    Net.meanwhile = call
    found = WORK[work](net)
    assert_same(found, alone)
    assert calls > 3
    Net.meanwhile = None
    assert list_hooks(net) == 0
    if work != "in place":
        assert int(net.calls) == calls
        assert net.last is GARBAGE
        assert not any(module.training for module in net.modules())


def test_a_network_that_trains_meanwhile_keeps_its_modes_and_statistics() -> None:
    net = make_net().train()
    modes = []
    Net.meanwhile = lambda: modes.append((net.training, net.norm.training, net.a.weight.requires_grad, net(X).shape))
    net.a.requires_grad_(False)
    compress(net, X[:4], 0.5, inputs=X, importance="taylor", reducer="select")
    assert set(modes) == {(True, True, False, torch.Size([96, 3]))}
    assert int(net.norm.num_batches_tracked) == len(modes) + 1  # one of `make_net`


def test_two_threads_at_once_give_what_each_gives_alone_and_leave_everything_as_it_was() -> None:
    nets = [make_net(), make_net()]
    nets.append(nets[0])
    alone = weights_of(compress(make_net(), X[:4], 0.5, inputs=list(X.split(20))).model)
    before, found, ready = draw_state(), dict[int, Any](), threading.Barrier(len(nets))

    def run(index: int) -> None:
        ready.wait()
        found[index] = compress(nets[index], X[:4], 0.5, inputs=list(X.split(20)))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(nets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(len(nets)):
        assert_same(weights_of(found[index].model), alone)
        assert not found[index].rolled_back
    assert sum(map(list_hooks, nets)) == 0
    after = draw_state()
    assert torch.equal(after[0], before[0])
    assert after[1] == before[1]
    assert torch.equal(after[2], before[2])


# ---- borrowed networks ----------------------------------------------------------------------------------------------


def test_a_borrowed_network_has_the_same_weights_and_modules_of_its_own() -> None:
    net = make_net()
    net.c.weight = nn.Parameter(net.c.weight.detach(), requires_grad=False)
    net.tied = nn.Linear(24, 3)
    net.tied.weight = net.c.weight
    own = borrow(net)
    assert borrow(own) is own
    assert {id(m) for m in own.modules()}.isdisjoint(map(id, net.modules()))
    pairs = list(zip(own.parameters(), net.parameters(), strict=True))
    assert all(a.data_ptr() == b.data_ptr() and a.requires_grad == b.requires_grad for a, b in pairs)
    assert own.tied.weight is own.c.weight
    assert own.norm.running_mean.data_ptr() != net.norm.running_mean.data_ptr()
    assert torch.equal(own(X), net(X))


def test_what_cannot_be_copied_is_worked_on_itself() -> None:
    net = make_net()
    net.lock = threading.Lock()
    assert borrow(net) is net
    assert [g.size for g in trace(net, X[:4]).groups] == [32, 24, 3]
    assert list_hooks(net) == 0


# ---- one at a time --------------------------------------------------------------------------------------------------


def test_a_second_thread_waits_and_the_first_may_go_in_again() -> None:
    entered, came = threading.Event(), list[str]()

    def second() -> None:
        entered.set()
        with preserve_state(nn.Linear(2, 2)):
            came.append("second")

    with one_at_a_time():
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        with preserve_state(nn.Linear(2, 2)), forked_random_numbers():
            came.append("again")
        helper = threading.Thread(target=contextvars.copy_context().run, args=(lambda: inside(came),))
        helper.start()
        helper.join()
        assert came == ["again", "helper"]
    thread.join()
    assert came == ["again", "helper", "second"]


def inside(came: list[str]) -> None:
    """In a thread that the first one hands part of its work to."""
    with one_at_a_time():
        came.append("helper")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks with threads
def test_a_new_process_does_not_wait_for_a_thread_that_it_has_not() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with one_at_a_time():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    child = os.fork()
    if not child:
        signal.alarm(20)  # ends it where it waits
        with one_at_a_time():
            os._exit(7)
    status = os.waitpid(child, 0)[1]
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7


def test_hooks_on_all_modules_are_for_one_thread() -> None:
    came = list[int]()
    hook = only_here(came.append)
    hook(1)
    in_another_thread(lambda: hook(2))
    assert came == [1]


# ---- interrupts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """Behind `nohup`, or in the background of a script, Python is started with them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
def test_an_interrupt_waits_for_what_must_be_done_whole() -> None:
    done = list[str]()
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("to the end")
    assert done == ["to the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert in_another_thread(lambda: list(iterate_uninterrupted())) == [1]


def iterate_uninterrupted() -> Iterator[int]:
    with uninterrupted():
        yield 1


@pytest.mark.usefixtures("_interrupts")
def test_a_network_is_written_in_place_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    wanted = weights_of(compress(net, X[:4], 0.5, restore=None).model)
    written = intrafusion.application.write_weights_

    def interrupted(model: nn.Module, weights: dict[str, Tensor]) -> Any:
        if model is net:
            signal.raise_signal(signal.SIGINT)
        return written(model, weights)

    monkeypatch.setattr(intrafusion.application, "write_weights_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(net, X[:4], 0.5, restore=None, inplace=True)
    assert_same(weights_of(net), wanted)
    assert net(X).shape == (96, 3)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 7, 20])
def test_wherever_it_stops_the_network_is_as_it_was(at: int) -> None:
    net, count = make_net().train(), 0
    before, drawn, flags = weights_of(net), draw_state(), torch.backends.mha.get_fastpath_enabled()

    def stop() -> None:
        nonlocal count
        count += 1
        if count == at:
            raise Stop

    Net.meanwhile = stop
    with pytest.raises(Stop):
        compress(net, X[:4], 0.5, inputs=list(X.split(20)))
    assert_same(weights_of(net), before)
    assert int(net.calls) == 0
    assert net.last is None
    assert list_hooks(net) == 0
    assert all(module.training for module in net.modules())
    assert torch.equal(draw_state()[0], drawn[0])
    assert draw_state()[1] == drawn[1]
    assert torch.backends.mha.get_fastpath_enabled() == flags
