"""Batches in an endless, repeatable order: batch number i is a pure function of (dataset, seed, i).

The clips are walked in epochs, each a permutation drawn from (seed, epoch). Step i of a training with global batch G
takes the places i * G .. i * G + G - 1 of that walk: clip j of step i depends on (seed, i * G + j) alone, whatever the
ranks and accumulation that G is split over. Micro batch m of rank r, with W ranks and micro batches of b clips, is part
m * W + r:

    G = accumulate * W * b          part = m * W + r          clips part * b .. part * b + b - 1 of the global batch

So the ranks share no place of the walk, every clip comes once per epoch over all of them, any split trains on the same
global batches in the same order, and a run resumed at step i, on as many ranks as it likes, reads nothing of earlier
steps.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mimo.data.errors import DataError, OutOfRange, UnreadableVideo
from mimo.data.protocols import Clips

log = logging.getLogger("mimo.data")


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


class _Batches(Dataset):
    """Map from the step to (batch or None, [(file, why it is unusable)], {file: what of it is used}, error or None)."""

    def __init__(self, dataset: Clips, batch_size: int, seed: int, rank: int, world_size: int):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int):
        batch, unreadable, error = self._batch(step)
        return batch, unreadable, dict(getattr(self.dataset, "shortened", {})), error

    def _batch(self, step: int):
        unreadable: list[tuple[str, str]] = []
        first = (step * self.world_size + self.rank) * self.batch_size  # see the top of this file
        samples = []
        for position in range(first, first + self.batch_size):
            try:
                sample = self._read(position, unreadable)
            except DataError as error:  # told as a value, since a worker's exception comes with its traceback as text
                return None, [], str(error)
            if sample is None:
                return None, unreadable, f"none of the {len(self.dataset)} clips can be used"
            samples.append(sample)
        keys = [sorted(sample) for sample in samples]
        if keys.count(keys[0]) != len(keys):
            return (
                None,
                unreadable,
                f"clips differ in what they hold: {keys[0]} and {next(k for k in keys if k != keys[0])}",
            )
        batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in keys[0]}
        return batch, unreadable, None

    def _read(self, position: int, unreadable: list) -> dict | None:
        """The sample at a position of the walk, or the next readable one of the same epoch."""
        length = len(self.dataset)
        epoch, place = divmod(position, length)
        order = _permutation(length, self.seed, epoch)
        for index in itertools.chain(order[place:], order[:place]):
            # The walk's own position seeds the sample, so a clip is cut differently in every epoch.
            seed = int(np.random.SeedSequence((self.seed, position)).generate_state(1, np.uint64)[0])
            try:
                return {
                    **self.dataset.sample(int(index), seed),
                    "index": np.int64(index),
                    "noise_seed": np.int64(seed >> 1),
                }
            except OutOfRange as error:
                raise DataError(str(error)) from None
            except UnreadableVideo as error:
                unreadable.append((error.path, error.why))
        return None


class _From:
    """The steps from `start` on; itertools.count cannot be iterated twice."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def default_workers(dataset: Clips, *, gpu: bool, processes: int = 1) -> int:
    """How many worker processes pay, on this machine, for one of `processes` that share its cores.

    Where samples are decoded from files, a quarter of the cores and at least one (with a GPU, whose process needs
    little of them, half, at most 8): the core that a worker takes from a CPU's training is worth less there than its
    decoding. Where they are made or only read, none, but two beside a GPU, so that it does not wait for Python.
    """
    cores = len(os.sched_getaffinity(0)) // max(1, processes)
    if dataset.decodes:
        return min(8, max(1, cores // 2)) if gpu else max(int(cores > 1), cores // 4)
    return 2 if gpu else 0


def batches(
    dataset: Clips,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    num_workers: int | None = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches from number `start_step` on: the samples' arrays stacked, `index` int64 [B] of the clips and
    `noise_seed` int64 [B], of whatever else is drawn for a clip.

    Args:
        dataset: any of mimo.data.datasets.
        batch_size: clips per batch of this rank; with accumulation, of one micro batch.
        start_step: number of the first batch. With accumulation a step has `accumulate` batches, so that micro batch m
            of step i is number i * accumulate + m.
        num_workers: processes that decode ahead; the batches are the same for every number. None: see
            `default_workers`.
        pin_memory: for a GPU.
        rank, world_size: this process among those that share the dataset.

    A clip that cannot be read is replaced by the next readable one of the epoch, and logged once under "mimo.data" with
    its file and reason, as is a damaged one of which a part is used. Raises DataError when no clip can be read, and at
    one whose actions are out of range.
    """
    if batch_size < 1 or start_step < 0 or seed < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size {batch_size} must be >= 1, start_step {start_step} and seed {seed} >= 0,"
            f" rank {rank} in 0..{world_size - 1}"
        )
    if num_workers is None:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # torchrun says how many are on this machine
        num_workers = default_workers(dataset, gpu=pin_memory, processes=sharing)
    source = _Batches(dataset, batch_size, seed, rank, world_size)
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=_From(start_step),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # or starting to iterate would draw from torch's global generator
    )
    return _checked(loader, dataset)


def report(reported: set[str], unreadable: Iterable[tuple[str, str]], shortened: Mapping[str, str]) -> None:
    """Logs each file once: why it is passed over, or what of a damaged one is used. reported: the files that were."""
    passed_over = [(path, f"skipped {path}: {why}") for path, why in unreadable]
    for path, words in [*passed_over, *((path, f"{path}: {used}") for path, used in shortened.items())]:
        if path not in reported:
            reported.add(path)
            log.warning("%s", words)


def _checked(loader: DataLoader, dataset: Clips) -> Iterator[dict[str, torch.Tensor]]:
    reported: set[str] = set()
    for batch, unreadable, shortened, error in loader:
        report(reported, unreadable, shortened)
        if error is not None:
            reason = f"; the first is {unreadable[0][0]}: {unreadable[0][1]}" if unreadable else ""
            raise DataError(f"{dataset!r}: {error}{reason}")
        yield batch
