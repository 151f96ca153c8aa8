"""Processes of this machine that work together without a launcher: the one that needs others starts them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mimo.errors import InputError

R = TypeVar("R")


def run_together(size: int, work: Callable[..., R], *given: Any) -> R:
    """What work(*given) returns in this process, while it also runs in size - 1 others, as one group over gloo (see
    `mimo.training.distributed.World`). Each has its share of the cores as threads.

    Small networks train faster so than with as many threads in one process, which wait for each other in every
    operation. The others end with this process, whatever ends it; what they print is theirs to leave out.

    Args:
        size: processes, this one included; 1 is this one alone, without a group.
        work, given: importable by name, and what pickle takes.

    Raises RuntimeError when another process ends before it has begun.
    """
    if size == 1:
        return work(*given)
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store, others = Path(folder) / "store", []
        try:
            for rank in range(1, size):
                here, there = context.Pipe(duplex=False)
                arguments = rank, size, store, max(1, cores // size), there, work, given
                other = context.Process(target=_follow, args=arguments, daemon=True)
                other.start()
                there.close()
                others.append((other, here))
            for other, here in others:
                try:
                    here.recv()
                except EOFError:
                    other.join()
                    raise RuntimeError(f"process {other.pid} ended with {other.exitcode} before it had begun") from None
            torch.set_num_threads(max(1, cores // size))
            _join(0, size, store)
            try:
                result = work(*given)
            finally:
                dist.destroy_process_group()
            for other, _ in others:
                other.join()
            return result
        finally:
            torch.set_num_threads(threads)
            for other, _ in others:
                other.terminate()


def _join(rank: int, size: int, store: Path) -> None:
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=size)


def _follow(rank: int, size: int, store: Path, threads: int, ready: Connection, work: Callable, given: tuple) -> None:
    """Another process, from its beginning to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all; the first process ends the others
    torch.set_num_threads(threads)
    ready.send(None)
    _join(rank, size, store)
    with suppress(InputError):  # the first process reports it
        work(*given)
    dist.destroy_process_group()
