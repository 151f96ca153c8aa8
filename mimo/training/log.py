"""What a training run tells the world: a progress bar, status lines, boards, and log.jsonl to plot from."""

import fcntl
import itertools
import json
import logging
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from mimo import records
from mimo.errors import InputError
from mimo.folders import atomic_path
from mimo.recipes.base import LossParts
from mimo.training.boards import Board, TensorBoard, WandbRun
from mimo.training.distributed import World

log = logging.getLogger("mimo.train")
PARTS = ("diffusion", "mask", "alignment", "grad_norm")  # of a step; all but the last are fields of LossParts


class RunLog:
    """Progress of steps start..steps; `write` one record per interval. With out=None nothing is written to disk, and
    unless `shown` nothing to the terminal.

    RUN/log.jsonl holds one JSON object per line; rows of steps that a resumed run will repeat are removed first. A
    damaged one is kept beside it, and what can be read of it is in the new one.

    Args:
        wandb: the run's configuration, if it is logged to Weights & Biases as well.
    """

    def __init__(
        self,
        out: Path | None,
        steps: int,
        *,
        start: int,
        device: torch.device,
        shown: bool = True,
        wandb: dict[str, Any] | None = None,
    ):
        self.steps, self.device, self.shown = steps, device, shown
        self.out, self.file, self.refused = out, None, False
        self.boards: list[Board] = []
        if out is not None:
            self.file, damaged = _continue_log(out / "log.jsonl", start)
            self.boards = [TensorBoard(out, start)]
            if wandb is not None:
                self.boards.append(WandbRun(out, wandb, self.say))
        # tqdm's disable=None: a bar on a terminal, only the status lines in a file.
        hidden = None if shown else True
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, leave=False, disable=hidden)
        self.step, self.clock = start, time.monotonic()
        if out is not None and damaged:
            self.say(damaged)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for written in (self.file, *self.boards):
            if written is not None:
                with self._bearing_refusals():
                    written.close()

    def advance(self) -> None:
        self.bar.update()

    def write(
        self, step: int, means: dict[str, float | int], tokens: int, lr: float, waited: float
    ) -> dict[str, float]:
        """means: since the last record; tokens: latent positions seen since then; waited: seconds for data. Returns the
        whole record."""
        now = time.monotonic()
        seconds = max(1e-9, now - self.clock)
        per_step = seconds / max(1, step - self.step)
        record = {
            "step": step,
            **means,
            "lr": lr,
            "tokens_per_second": tokens / seconds,
            "data_wait": min(1.0, waited / seconds),  # share of the time
            "memory_gib": self._memory() / 2**30,
        }
        self.step, self.clock = step, now
        self.say(
            f"step {step}/{self.steps}  diffusion {means['diffusion']:.4f}  mask {means['mask']:.4f}  "
            + (f"alignment {means['alignment']:.4f}  " if means.get("alignment") else "")
            + f"grad norm {means['grad_norm']:.3f}  lr {lr:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"data {record['data_wait']:.1%}  {record['memory_gib']:.2f} GiB  "
            f"ETA {duration(per_step * (self.steps - step))}"
            + (f"  skipped {means['skipped']} (gradient not finite)" if means["skipped"] else "")
        )
        if self.file is not None:
            with self._bearing_refusals():
                print(json.dumps(record), file=self.file, flush=True)
                os.fsync(self.file.fileno())  # as checkpoints are: a power failure takes neither
        for board in self.boards:
            with self._bearing_refusals():
                board.write(step, record)
        return record

    @contextmanager
    def _bearing_refusals(self) -> Iterator[None]:
        """A disk that is full costs rows of the log, which is said once, and not the training."""
        try:
            yield
        except OSError as error:
            if not self.refused:
                log.warning("%s: rows of the log are missing: %s", self.out, error.strerror or error)
            self.refused = True

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if self.shown:
            with tqdm.external_write_mode():
                print(line, flush=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens here (checkpoints, previews) is not counted as training time."""
        start = time.monotonic()
        yield
        self.clock += time.monotonic() - start

    def _memory(self) -> int:
        """Peak bytes: of the device where there is one, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Sums:
    """Sums since the last record, on the device: training waits for it, and for the other ranks, only when one is due.

    A step is bad when its gradient norm, which is the same on all ranks, is not finite. Bad steps count in no mean.

    Args:
        max_skipped: so many bad steps in a row are borne.
    """

    def __init__(self, device: torch.device, world: World, max_skipped: int):
        self.device, self.world, self.max_skipped = device, world, max_skipped
        self.row = torch.zeros((), dtype=torch.int64, device=device)  # bad steps up to now, in a row
        self.over = torch.zeros((), dtype=torch.bool, device=device)  # there was a row longer than max_skipped
        # Of that row: its first step, and its PARTS.
        self.first_bad = torch.zeros(1 + len(PARTS), dtype=torch.float64, device=device)
        self._clear()

    def _clear(self) -> None:
        self.total = torch.zeros(len(PARTS), dtype=torch.float64, device=self.device)
        self.current = torch.zeros(len(PARTS) - 1, dtype=torch.float64, device=self.device)
        self.counted = torch.zeros(len(PARTS), dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.tokens = 0

    def add(self, loss: LossParts, accumulate: int, tokens: int) -> None:
        """One micro batch of this rank, out of `accumulate`; tokens: of all ranks."""
        parts = (getattr(loss, name) for name in PARTS[:-1])
        computed = [torch.zeros_like(loss.total) if part is None else part for part in parts]
        self.current += torch.stack(computed).detach() / accumulate
        self.tokens += tokens

    def end_step(self, step: int, grad_norm: Tensor) -> Tensor:
        """Returns whether the step is bad, as 1.0 or 0.0 on the device."""
        values = torch.cat([self.current, grad_norm.detach().to(self.current).reshape(1)])
        bad = ~values[-1].isfinite()
        self.row = torch.where(bad, self.row + 1, 0)
        begins = (self.row == 1) & ~self.over
        self.first_bad = torch.where(begins, torch.cat([values.new_full((1,), step), values]), self.first_bad)
        self.over |= self.row > self.max_skipped
        self.skipped += bad
        self.total += torch.where(bad, 0, values)
        self.counted += (values != 0) & ~bad
        self.current = torch.zeros_like(self.current)
        return bad.float()

    def require_finite(self) -> None:
        """Raises InputError naming the step if more bad steps came in a row than are borne: on every rank, and its
        words on one of them (see `World.agree`)."""
        if self.over.item():
            step, diffusion, mask, alignment, grad_norm = self.world.mean(self.first_bad).tolist()
            aligned = f"alignment loss {alignment:g}, " if alignment else ""
            after = f", nor is it finite in the {self.max_skipped} steps after it" if self.max_skipped else ""
            diverged = InputError(
                f"training diverged at step {step:.0f}: diffusion loss {diffusion:g}, mask loss {mask:g}, {aligned}"
                f"gradient norm {grad_norm:g}{after}; nothing after the last checkpoint is kept (a smaller learning "
                "rate may help)"
            )
            self.world.agree(error=diverged)

    def take(self) -> tuple[dict[str, float | int], int]:
        """Means over ranks and steps since the last call, how many steps were skipped, and the tokens of all."""
        # A part that a step did not compute is exactly 0: the mean is over the steps that did.
        means = self.world.mean(self.total / self.counted.clamp(min=1)).tolist()
        record = dict(zip(PARTS, means, strict=True)) | {"skipped": self.skipped.item()}
        tokens = self.tokens
        self._clear()
        return record, tokens


def only_process_in(run: Path) -> TextIO:
    """An open file that keeps other processes from training in this folder until it is closed or this process ends,
    however it ends; InputError if one does."""
    file = (run / "lock").open("a+")
    try:  # lockf, not flock: the lock is of this process alone, and workers that outlive it do not have it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(f"{run}: {file.read().strip()} is training in it, expected another --out or to wait") from None
    except OSError as error:
        log.warning("%s: nothing keeps a second process from training in it: %s", run, error.strerror)
        return file
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


def read_log(run: Path) -> list[dict[str, float]]:
    """The records of RUN/log.jsonl, oldest first; a last line cut short by a kill is left out.

    Raises: InputError naming the first line that is no record.
    """
    rows, faults = _read_rows(run / "log.jsonl")
    if faults:
        raise InputError(faults[0])
    return rows


def _read_rows(file: Path) -> tuple[list[dict[str, float]], list[str]]:
    """The records in a log, and what is wrong with its other lines."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    rows, faults, lines = [], [], data.split(b"\n")
    for number, line in enumerate(lines, 1):
        source = f"{file}: line {number}"
        try:
            row = records.convert(records.parse(line, source), dict[str, float], source)
            records.convert({"step": row.get("step")}, _HasStep, source)
        except InputError as error:
            if number < len(lines):  # what follows the last line end is nothing, or a line cut short
                faults.append(str(error))
        else:
            rows.append(row)
    return rows, faults


@dataclass
class _HasStep:
    step: int


def _continue_log(file: Path, start: int) -> tuple[TextIO, str]:
    """The log, open behind its rows up to step `start`, and what has to be said if it was damaged."""
    rows, faults = _read_rows(file)
    said = ""
    if faults:
        names = (file.with_name(f"log.damaged-{number}.jsonl") for number in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        file.rename(aside)
        said = f"{faults[0]}; the damaged log stays as {aside.name}, {len(rows)} rows go on in {file.name}"
    with atomic_path(file) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= start))
        records.flush(temporary)
    records.flush(file.parent)
    return file.open("a"), said


def duration(seconds: float) -> str:
    """75.2 -> "1:15", 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
