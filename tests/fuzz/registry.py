"""The frame of the fuzzers: a fuzzer is a function that draws and checks cases from a seed, under a name.

    @fuzzer("masks", ci_seeds=4)
    def masks(seed: int) -> int:
        ...                      # raises on the first case that is wrong
        return cases             # how many were checked

The same seed gives the same cases. `python -m tests.fuzz` runs all of them for as long as it is told to, each batch in
a worker process, so that the death of one is a failure like any other; `tests/fuzz/test_fuzz.py` runs the seeds 0 ..
ci_seeds - 1 of each with the other tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import hypothesis
from hypothesis import HealthCheck, Phase, settings


@dataclass(frozen=True)
class Fuzzer:
    """ci_seeds: batches that run with the tests."""

    name: str
    run: Callable[[int], int]
    ci_seeds: int


FUZZERS: dict[str, Fuzzer] = {}
MODULES = (
    "masks",
    "host",
    "planners",
    "cache",
    "gradients",
    "rope",
    "files",
    "kills",
)  # of this folder: each registers its fuzzers when it is imported


def load() -> dict[str, Fuzzer]:
    """All fuzzers by name."""
    for module in MODULES:
        import_module(f"{__package__}.{module}")
    return FUZZERS


def fuzzer(name: str, *, ci_seeds: int) -> Callable[[Callable[[int], int]], Callable[[int], int]]:
    """Registers a fuzzer. The module it stands in has to be named in MODULES."""

    def register(run: Callable[[int], int]) -> Callable[[int], int]:
        if name in FUZZERS:
            raise ValueError(f"two fuzzers are called {name!r}")
        FUZZERS[name] = Fuzzer(name, run, ci_seeds)
        return run

    return register


def batch(examples: int, **options) -> settings:
    """Hypothesis' settings of a batch: what is drawn depends on the seed alone, and a failure is shrunk before it is
    shown."""
    phases = (Phase.generate, Phase.shrink)
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        **options,
    )


def check_examples(seed: int, examples: int, strategy, check: Callable[[object], None]) -> int:
    """Calls `check` with `examples` draws of a strategy; returns how many there were (a small strategy has fewer)."""
    count = 0

    @hypothesis.seed(seed)
    @batch(examples)
    @hypothesis.given(strategy)
    def every(case):
        nonlocal count
        count += 1
        check(case)

    every()
    return count
