"""python -m tests.fuzz --minutes N [--seed S] [--only NAME ...]: every fuzzer in turn, a batch of cases at a time,
until the time is over.

A failure is printed with the command that repeats it, and the run goes on; a line per fuzzer with its cases and
failures comes last. Exit status 1 where there were failures.
"""

import argparse
import os
import sys
import time
from collections import Counter

# Before torch and Triton load: the tensors are small, and without a GPU the kernels run interpreted.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

from . import registry  # noqa: E402
from .worker import Worker  # noqa: E402


def main(arguments: list[str] | None = None, start: str = "spawn") -> int:
    fuzzers = registry.load()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Runs the fuzzers for some minutes.")
    parser.add_argument("--minutes", type=float, required=True, help="stop after the batch that is running then")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch; counts up (default: 0)")
    parser.add_argument("--only", choices=fuzzers, nargs="+", help="these fuzzers instead of all")
    options = parser.parse_args(arguments)
    names = options.only or list(fuzzers)
    end, seed = time.monotonic() + 60 * options.minutes, options.seed
    cases, failures, batches = Counter(), Counter(), Counter()
    worker = Worker(start)
    while time.monotonic() < end:
        for name in names:
            count, wrong = worker.run(name, seed)
            batches[name] += 1
            cases[name] += count
            if wrong:
                failures[name] += 1
                print(
                    f"\n{name}, seed {seed}; again with: "
                    f"python -m tests.fuzz --minutes 0.01 --seed {seed} --only {name}"
                )
                print(wrong, flush=True)
            if time.monotonic() >= end:
                break
        seed += 1
    worker.close()
    width = max(map(len, names))
    print(f"{'fuzzer':<{width}} {'batches':>8} {'cases':>10} {'failures':>9}")
    for name in names:
        print(f"{name:<{width}} {batches[name]:>8,} {cases[name]:>10,} {failures[name]:>9,}")
    print(f"{'all':<{width}} {batches.total():>8,} {cases.total():>10,} {failures.total():>9,}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
