"""Claim: a network is made smaller block by block in far less memory than it takes, under a limit that it does not fit.

A random Llama, deep and narrow (96 blocks of width 512, 235 million parameters), in float32, in safetensors of at most
100 MB, keep .5 of its MLP units, two texts of 64 random tokens. Each of these runs in a process of its own, one thread:
  blocks  intrafusion.large.compress_folder under a limit on the process's private memory (RLIMIT_DATA) of what it
          takes after its imports plus half of the network.
  whole   from_pretrained and one call under the same limit, to see that it holds.
`peak_mb` is the largest resident set (VmHWM), files that are mapped included; `above_mb` that above what the process
took after its imports. `network_mb` is what the weights take, `block_mb` those of one block. Needs transformers and
Accelerate. Records: benchmarks/records/large.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from intrafusion.lab.bench import Record, append_record
from intrafusion.network.sources import import_transformers

RECORDS = Path(__file__).parent / "records" / "large.jsonl"
FULL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 96, "num_attention_heads": 8}
FULL |= {"num_key_value_heads": 4, "vocab_size": 16384}
SMOKE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SMOKE |= {"num_key_value_heads": 2, "vocab_size": 64}
TEXTS, TOKENS, KEEP = 2, 64, 0.5
SHARE = 0.5  # of the network, that is left under the limit


def read_status(field: str) -> float:
    """A field of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def make_folder(folder: Path, sizes: dict[str, int]) -> None:
    transformers: Any = import_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=256)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")


def draw_tokens(sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(sizes["vocab_size"], (TEXTS, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run_whole(folder: Path, sizes: dict[str, int]) -> None:
    transformers: Any = import_transformers()
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    model(**draw_tokens(sizes))


def run_blocks(folder: Path, sizes: dict[str, int]) -> None:
    from intrafusion.large import compress_folder

    print(compress_folder(folder, folder.with_name("small"), KEEP, inputs=draw_tokens(sizes)), file=sys.stderr)


def run_limited(what: str, folder: Path, sizes: dict[str, int], allowed_mb: float) -> dict[str, Any]:
    """Of this process: what it took, and whether the limit held it."""
    import intrafusion.large

    assert intrafusion.large
    transformers: Any = import_transformers()
    assert transformers.LlamaForCausalLM
    _ = torch.ones(8, 8) @ torch.ones(8, 8)
    base, data, start = read_status("VmRSS"), read_status("VmData"), time.perf_counter()
    limit = int((data + allowed_mb) * 2**20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        {"whole": run_whole, "blocks": run_blocks}[what](folder, sizes)
        done = "done"
    except Exception as error:  # of whatever kind: each allocator has its own
        if "allocate" not in str(error) and not isinstance(error, MemoryError):
            raise
        print(type(error).__name__, error, file=sys.stderr)
        done = "out of memory"
    peak, seconds = read_status("VmHWM"), time.perf_counter() - start
    found = {"peak_mb": peak, "above_mb": peak - base, "imports_mb": base, "seconds": seconds}
    return {"ended": done, **{name: round(value, 1) for name, value in found.items()}}


def measure(what: str, folder: Path, sizes: dict[str, int], allowed_mb: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--inside", what, str(folder), json.dumps(sizes), str(allowed_mb)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def count_mb(sizes: dict[str, int]) -> tuple[float, float]:
    """What the weights of the network take, and those of one block."""
    transformers: Any = import_transformers()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    take = lambda module: sum(p.nbytes for p in module.parameters()) / 2**20  # noqa: E731
    return take(model), take(model.model.layers[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--layers", type=int, help="instead of 96")
    parser.add_argument("--allowed-mb", type=float, help="instead of half of the network")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, recorded nowhere")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not all(importlib.util.find_spec(name) for name in ("transformers", "accelerate")):
        print("skipped: needs pip install intrafusion[transformers,train].")
        return
    if options.inside:
        torch.set_num_threads(1)
        what, folder, sizes, allowed = options.inside
        print(json.dumps(run_limited(what, Path(folder), json.loads(sizes), float(allowed))))
        return
    sizes = dict(SMOKE if options.smoke else FULL)
    sizes |= {"num_hidden_layers": options.layers} if options.layers else {}
    network_mb, block_mb = count_mb(sizes)
    allowed = options.allowed_mb or (2**10 if options.smoke else SHARE * network_mb)
    taken = {"network_mb": round(network_mb, 1), "block_mb": round(block_mb, 1), "allowed_mb": round(allowed, 1)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "original"
        make_folder(folder, sizes)
        for what in ("blocks",) if options.smoke else ("blocks", "whole"):
            setting = {"what": what, "network": "random Llama", **sizes, "keep": KEEP, "texts": TEXTS}
            record = Record("large", {**setting, "tokens": TOKENS}, {**measure(what, folder, sizes, allowed), **taken})
            print(record.setting, record.result)
            if not options.smoke:
                append_record(options.records, record)


if __name__ == "__main__":
    main()
