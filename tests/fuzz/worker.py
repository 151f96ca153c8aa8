"""Batches of a fuzzer in a process of its own: what kills it does not end the run."""

import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from . import registry


def run_batch(name: str, seed: int) -> tuple[int, str]:
    """The cases that were checked, and the traceback of the one that was wrong, or nothing."""
    try:
        return registry.load()[name].run(seed), ""
    except Exception:
        return 0, traceback.format_exc()


class Worker:
    """A process that runs batches, and another after its death. `start`: how it begins, as in multiprocessing."""

    def __init__(self, start: str = "spawn"):
        self.start = start
        self.pool: ProcessPoolExecutor | None = None

    def run(self, name: str, seed: int) -> tuple[int, str]:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, mp_context=get_context(self.start))
        try:
            return self.pool.submit(run_batch, name, seed).result()
        except BrokenProcessPool:
            self.pool = None
            return 0, "the process died\n"

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
