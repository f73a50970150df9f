"""One Ray of one core for the tests of this folder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from intrafusion.lab.bench.cluster import Cluster, connect


@pytest.fixture(scope="session")
def one_core() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="needs ray: pip install 'intrafusion[ray]'")
    os.environ.setdefault("RAY_worker_niceness", "0")  # beside the tests of other processes they would wait for minutes
    started: list[subprocess.Popen] = []
    popen, subprocess.Popen.__init__ = subprocess.Popen.__init__, remembering(started)
    try:
        with connect(Cluster(cores=1)):
            subprocess.Popen.__init__ = popen
            yield Cluster(cores=1)
    finally:
        subprocess.Popen.__init__ = popen
    for process in started:  # Ray ends its processes and forgets them, which Python takes for a leak
        process.wait(30)


def remembering(started: list[subprocess.Popen]):
    start = subprocess.Popen.__init__

    def init(self: subprocess.Popen, *args, **kwargs) -> None:
        start(self, *args, **kwargs)
        started.append(self)

    return init
