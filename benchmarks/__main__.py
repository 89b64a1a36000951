"""Run the benchmarks, each case in a process of its own, and write a record, a table and a picture.

    python -m benchmarks                    # on a GPU the same command
    python -m benchmarks --smoke            # a minute or two, for tests
    python -m benchmarks --out runs/bench --only size
    taskset -c 0 python -m benchmarks       # one core
    python -m benchmarks --plain            # without the two settings below

On a CPU two settings hold for every method. Memory comes in huge pages: a compiled step takes its temporary arrays
anew from the system each time, and in small pages handing them out is a quarter of the time of a low-rank update,
half of the time of dense AdamW's. And XLA orders operations by the memory they need, not by their readiness: up to
30 % less memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import cases, measure, report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one small case of each kind")
    parser.add_argument("--only", choices=("size", "phases", "depth"), help="cases of one kind")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="leave memory and XLA's schedule on CPU as they come")
    args = parser.parse_args(argv)
    if not args.plain:
        for variable, value in measure.SETTINGS.values():  # the processes of the cases read them when they start
            os.environ.setdefault(variable, value)
    machine = measure.machine()
    chosen = (cases.smoke if args.smoke else cases.every)(machine["platform"])
    chosen = [case for case in chosen if args.only in (None, case["kind"])]
    args.out.mkdir(parents=True, exist_ok=True)
    since, records = time.perf_counter(), []
    for case in tqdm(chosen, unit="case", disable=args.smoke):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cases", json.dumps(case)], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(f"{json.dumps(case)} failed with exit status {done.returncode}")
        records.append(json.loads(done.stdout.splitlines()[-1]))
        result = {"machine": machine, "seconds": round(time.perf_counter() - since), "cases": records}
        (args.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    report.write(args.out)
    print((args.out / "bench.md").read_text())


if __name__ == "__main__":
    main()
