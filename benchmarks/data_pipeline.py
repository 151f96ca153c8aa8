"""Part of train_bench.py: clips per second through each stage of the data pipeline, and how long a training step waits
for its batch.

    videos decoded      video files through the training loader: seek, decode, resize, crop, collate
    videos kept         the same with the default memory for decoded frames, as far as the videos fit into it
    videos encoded      `mimo encode` from start to end, its own verification included
    shards read         latent shards through the training loader
    training            `mimo.training.loop.train`, from shards and from videos: its demand, and the share of its time
                        spent in `next(batches)`

Waiting is measured in the process that trains, from asking for a batch to having it. The GPU may still be busy with the
step before then, so the share is an upper bound of what a faster pipeline could save. Videos are H.264, made here with
`write_video` from moving shapes, unless there is a folder of real ones. All files are as fresh in the page cache as
their number allows: a slow disk is not measured.
"""

import itertools
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import torch

from mimo import MiMoConfig
from mimo.config import Encoding, SampleConfig, TrainConfig
from mimo.data import LatentShards, batches, moving_shapes, open_dataset, write_video
from mimo.data.encode import write_shards
from mimo.tokenizers import build_tokenizer
from mimo.training.loop import train
from mimo.training.trainer import Trainer

WAIT_GOAL = 2.0  # percent of the step, from shards

COLUMNS = {
    "what": "what", "source": "source", "workers": "workers",
    "clips_per_s": "clips/s", "p20": "20%", "p80": "80%", "ms_per_step": "ms/step",
    "wait_percent": "waiting %", "first_batch_s": "first batch s",
}  # fmt: skip
PLOT = {"group": "source", "bar": "workers", "value": "clips_per_s", "panel": "what", "unit": "clips per second"}


@dataclass(frozen=True)
class Size:
    """What is measured: videos, clips cut from them, and the training they feed.

    Args:
        network: its clips are cut, its latents stored, and it is trained.
        clips: per training step.
        videos, frames, height, width: files to make. Few are made and copied.
        rounds: of every throughput measurement.
        steps: of every training, the first two not counted.
        workers: of the loader, for each throughput; the last one feeds the training from videos.
    """

    network: MiMoConfig
    clips: int
    videos: int
    frames: int
    height: int
    width: int
    rounds: int
    steps: int
    workers: tuple[int, ...]


def size(device: torch.device) -> Size:
    """Kinetics-600's usual 340 x 256 and 300 frames into mimo-b-k600; without a GPU a small part of it."""
    cores = len(os.sched_getaffinity(0))
    workers = tuple(sorted({1, cores}))
    if device.type == "cuda":
        return Size(MiMoConfig.from_preset("mimo-b-k600"), 32, 64, 300, 256, 340, 5, 60, workers)
    network = MiMoConfig(depth=2, dim=128, heads=4, height=8, width=8, channels=8, decoder_layer=1, decoder_depth=1)
    return Size(network, 4, 16, 60, 128, 170, 5, 25, workers)


def make_videos(folder: Path, size: Size, different: int = 8) -> Path:
    """H.264 files of moving shapes; copies of the first few, since only decoding them counts."""
    made = min(different, size.videos)
    with ThreadPoolExecutor(min(made, size.workers[-1])) as pool:  # the encoder lets go of the interpreter's lock
        list(pool.map(_make_video, [folder] * made, [size] * made, range(made)))
    for number in range(made, size.videos):
        shutil.copyfile(_video(folder, number % made), _video(folder, number))
    return folder


def _video(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.mp4"


def _make_video(folder: Path, size: Size, number: int) -> None:
    frames = moving_shapes(size.frames, size.height // 2, size.width // 2, np.random.default_rng(number))
    write_video(_video(folder, number), frames.repeat(2, axis=1).repeat(2, axis=2), 30, quality=23)


def measure(size: Size, device: torch.device, data: Path | None = None) -> list[dict]:
    """Rows of every stage. data: real videos; None makes some."""
    logging.getLogger("mimo").setLevel(logging.ERROR)  # clips that cannot be read are `mimo data check`'s business
    frames, height, width = size.network.video_shape
    with tempfile.TemporaryDirectory() as folder:
        videos = data or make_videos(Path(folder, "videos"), size)
        shape = {"num_frames": frames, "height": height, "width": width}
        dataset, forgetful = open_dataset(videos, **shape), open_dataset(videos, **shape, frame_memory=0)
        rows = [_read("videos decoded", forgetful, workers, 4, size.rounds) for workers in size.workers]
        rows += [_read("videos kept", dataset, workers, 4, size.rounds) for workers in size.workers]
        encoded, shards = _encode(dataset, size, device, Path(folder))
        rows.append(encoded)
        rows += [_read("shards read", shards, workers, size.clips, size.rounds) for workers in size.workers]
        rows.append(_train("latent shards", shards, size, 2, device))
        rows.append(_train("videos", dataset, size, size.workers[-1], device))
    return rows


def _row(what: str, source: str, workers: int, rates: list[float], **more) -> dict:
    fifths = statistics.quantiles(rates, n=5, method="inclusive")
    rates = {"clips_per_s": statistics.median(rates), "p20": fifths[0], "p80": fifths[3]}
    return {"what": what, "source": source, "workers": workers} | rates | more


def _read(what: str, dataset, workers: int, clips: int, rounds: int) -> dict:
    """Rounds of so many batches that every worker gives some, after what they had decoded ahead is used up."""
    stream = batches(dataset, clips, seed=0, num_workers=workers)
    start = time.perf_counter()
    next(stream)
    first_batch = time.perf_counter() - start
    ahead, per_round = 5 * workers, max(2 * workers, 512 // clips if isinstance(dataset, LatentShards) else 0)
    for _ in itertools.islice(stream, ahead):
        pass
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in itertools.islice(stream, per_round):
            pass
        rates.append(clips * per_round / (time.perf_counter() - start))
    source = "latent shards" if isinstance(dataset, LatentShards) else "videos"
    return _row(what, source, workers, rates, clips=clips, first_batch_s=first_batch)


def _encode(dataset, size: Size, device: torch.device, folder: Path) -> tuple[dict, LatentShards]:
    """`mimo encode` with the network's own tokenizer, into a fresh folder every time."""
    network, workers = size.network, size.workers[-1]
    tokenizer = build_tokenizer(network.tokenizer, compression=network.compression, channels=network.channels)
    config = Encoding(passes=max(1, 64 // len(dataset)), shard_clips=32, workers=workers)
    rates = []
    for number in range(3):
        start = time.perf_counter()
        name, where = network.tokenizer, folder / str(number)
        out = write_shards(dataset, tokenizer, where, config, tokenizer_name=name, device=device)
        rates.append(len(LatentShards(out)) / (time.perf_counter() - start))
    return _row("videos encoded", network.tokenizer, workers, rates), LatentShards(out)


class Waiting(Trainer):
    """A trainer that notes when it asked for every batch and when it had it."""

    def start_data(self) -> None:
        super().start_data()
        self.asked, self.had = [], []
        self.stream = self._noted(self.stream)

    def _noted(self, stream: Iterator) -> Iterator:
        while True:
            self.asked.append(time.perf_counter())
            batch = next(stream)
            self.had.append(time.perf_counter())
            yield batch


def _train(source: str, dataset, size: Size, workers: int, device: torch.device, unmeasured: int = 2) -> dict:
    """Demand and waiting of the training loop itself, without the first steps, which start workers and kernels."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    config = TrainConfig(
        batch_size=size.clips, steps=size.steps, warmup=0, workers=workers, precision=precision, log_every=size.steps
    )
    trainer = Waiting(size.network, config, SampleConfig(), dataset, device=device)
    train(trainer)  # ends with a record, which waits for the device
    asked = [*trainer.asked, time.perf_counter()]
    steps = [after - before for before, after in itertools.pairwise(asked)][unmeasured:]
    waits = [had - asked for asked, had in zip(trainer.asked, trainer.had, strict=True)][unmeasured:]
    return _row(
        "training",
        source,
        workers,
        [size.clips / step for step in steps],
        clips=size.clips,
        ms_per_step=1000 * sum(steps) / len(steps),
        wait_percent=100 * sum(waits) / sum(steps),
        first_batch_s=trainer.had[0] - trainer.asked[0],
    )


def verdict(rows: list[dict]) -> str:
    """Whether training from shards reaches the goal, in one line."""
    waiting = next(
        row["wait_percent"] for row in rows if row["what"] == "training" and row["source"] == "latent shards"
    )
    return f"  From latent shards a step waits {waiting:.2g} % of its time for data (goal: under {WAIT_GOAL:g} %)."


def report(out: Path, header: dict, limits: dict, rows: list[dict]) -> str:
    """Writes data.json, data.csv and data.png; returns the table."""
    path = common.write_results(out, "data", header, limits, rows, PLOT)
    return f"{common.format_table(rows, COLUMNS)}\n{verdict(rows)}\n{path}"
