"""Claim: whatever a network looks like, a folder went through, or a process died of, nothing is silently wrong.

Counts what the random tests count, of --times as many cases as `make test` tries (`make fuzz` tries 20 times as many):
random networks of which channels are cut that cannot matter, judged by zeroing entries of weights; saved folders that
are damaged at random; processes killed while they write. Every case that is wrong, or crashes, is told and fails.
Records: benchmarks/records/robustness.jsonl, one a run.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from intrafusion.lab.bench import Record, append_record

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "records" / "robustness.jsonl"
TESTS = ("tests/test_fuzz.py", "tests/io/test_mutations.py", "tests/test_kills.py")
SMOKE = "tests/io/test_mutations.py::test_damaged_plans_load_exactly_or_are_refused"
_COUNTS = re.compile(r"^([\w ,-]+?)( \d of \d)?: (\{.*\}|\d+ kills)$", re.MULTILINE)


def read_counts(printed: str) -> dict[str, dict[str, int]]:
    """What the tests printed: counts by what was tried, parts of one title added up."""
    found: dict[str, Counter[str]] = {}
    for what, part, counts in _COUNTS.findall(printed):
        title = f"random {what}" if part else what  # folders of networks are damaged, too
        told = ast.literal_eval(counts) if counts.startswith("{") else {"kills": int(counts.split()[0])}
        found.setdefault(title, Counter()).update(told)
    return {title: dict(counter) for title, counter in found.items()}


def run(times: int, tests: tuple[str, ...]) -> Record:
    environment = {**os.environ, "INTRAFUSION_FUZZ": str(times)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-s", "-m", "", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-4000:] + done.stderr[-2000:])
    return Record("robustness", {"times": times, "tests": list(tests)}, read_counts(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--smoke", action="store_true", help="damaged plans alone, recorded nowhere")
    options = parser.parse_args()
    if options.smoke:
        print(run(1, (SMOKE,)).result)
        return
    record = run(options.times, TESTS)
    append_record(options.records, record)
    print(record.result)


if __name__ == "__main__":
    main()
