"""Claim: a group of 11,008 channels is reduced in 2 minutes and 8 GB on two idle cores, by every reducer.

One group of n channels with 4,096 features on each side (linear, GELU, linear; random weights in float32), keep .5,
n = 1,024 to 11,008: `intrafusion.compress` with all that it does (trace, proof, choice, surgery, second trace)
but restoring. pivot looks at 512 random rows. Each run is a process of its own, with one thread.
  cpu_s     processor time, which a busy machine changes less than `seconds` on the clock.
  ratio     cpu_s in float32 products of two 4,096 x 4,096 matrices (`peer_s`), measured before and after it.
  peak_mb   the largest resident set (VmHWM) above what the process held before, the network left out.
The table fits cpu_s and peak_mb to n^a over the sizes. Records: benchmarks/records/wide.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from large import read_status
from torch import Tensor, nn

import intrafusion
from intrafusion.lab.bench import Record, append_record

RECORDS = Path(__file__).parent / "records" / "wide.jsonl"
SIZES, FEATURES, ROWS, PEER = (1024, 2048, 4096, 8192, 11008), 4096, 512, 4096
SMOKE_SIZES, SMOKE_FEATURES, SMOKE_PEER = (64, 1100), 16, 256
REDUCERS = ("select", "pivot", "intrafusion", "fold")
KEEP = 0.5


def make_network(n: int, features: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, n), nn.GELU(), nn.Linear(n, features)).eval()


def time_peer(size: int) -> float:
    x = torch.ones(size, size)
    _ = x @ x
    start = time.process_time()
    _ = x @ x
    return time.process_time() - start


def reduce(reducer: str, model: nn.Module, example: Tensor, rows: Tensor) -> None:
    looks = rows if reducer in ("pivot", "eliminate") else None
    intrafusion.compress(model, example, KEEP, reducer=reducer, restore=None, inputs=looks)


def run_inside(reducer: str, n: int, features: int, peer: int) -> dict[str, Any]:
    """Of this process: what one reduction took."""
    model, example, rows = make_network(n, features), torch.randn(4, features), torch.randn(ROWS, features)
    reduce(reducer, make_network(8, 4), torch.randn(2, 4), torch.randn(64, 4))  # what is imported late
    before = time_peer(peer)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    base, start, cpu = read_status("VmRSS"), time.perf_counter(), time.process_time()
    reduce(reducer, model, example, rows)
    seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, read_status("VmHWM")
    unit = (before + time_peer(peer)) / 2
    network = sum(p.nbytes for p in model.parameters()) / 2**20
    found = {
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu, 1),
        "ratio": round(cpu / unit, 1),
        "peer_s": round(unit, 2),
    }
    return {**found, "peak_mb": round(peak - base), "network_mb": round(network)}


def measure(*what: object, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--threads", str(threads), "--inside", *map(str, what)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--reducers", nargs="+", default=REDUCERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="small layers, recorded nowhere")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        torch.set_num_threads(options.threads)
        reducer, *numbers = options.inside
        print(json.dumps(run_inside(reducer, *map(int, numbers))))
        return
    sizes, features = (SMOKE_SIZES, SMOKE_FEATURES) if options.smoke else (options.sizes, FEATURES)
    for n in sizes:
        for reducer in options.reducers[-1:] if options.smoke else options.reducers:
            peer = SMOKE_PEER if options.smoke else PEER
            result = measure(reducer, n, features, peer, threads=options.threads)
            setting = {"what": reducer, "n": n, "features": features, "keep": KEEP, "threads": options.threads}
            record = Record("wide", setting, result)
            print(record.setting, record.result, flush=True)
            if not options.smoke:
                append_record(options.records, record)


if __name__ == "__main__":
    main()
