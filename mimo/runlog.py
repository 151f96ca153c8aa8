"""What a training run tells the world: a progress bar, status lines, TensorBoard, and log.jsonl to plot from."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm


class RunLog:
    """Progress of steps start..steps; `write` one record per interval. With out=None nothing is written to disk.

    RUN/log.jsonl holds one JSON object per line; rows of steps that a resumed run will repeat are removed first.
    """

    def __init__(self, out: Path | None, steps: int, *, start: int, device: torch.device):
        self.steps, self.device = steps, device
        self.file, self.board = None, None
        if out is not None:
            from torch.utils.tensorboard import SummaryWriter

            rows = [row for row in read_log(out) if row["step"] <= start]
            self.file = (out / "log.jsonl").open("w")
            self.file.writelines(json.dumps(row) + "\n" for row in rows)
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        # tqdm's disable=None: a bar on a terminal, only the status lines in a file.
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, leave=False, disable=None)
        self.step, self.clock = start, time.monotonic()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
            self.board.close()

    def advance(self) -> None:
        self.bar.update()

    def write(self, step: int, means: dict[str, float], tokens: int, lr: float) -> dict[str, float]:
        """means: since the last record; tokens: latent positions seen since then. Returns the whole record."""
        now = time.monotonic()
        per_step = (now - self.clock) / max(1, step - self.step)
        record = {
            "step": step,
            **means,
            "lr": lr,
            "tokens_per_second": tokens / max(1e-9, now - self.clock),
            "memory_gib": self._memory() / 2**30,
        }
        self.step, self.clock = step, now
        self.say(
            f"step {step}/{self.steps}  diffusion {means['diffusion']:.4f}  mask {means['mask']:.4f}  "
            f"grad norm {means['grad_norm']:.3f}  lr {lr:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{record['memory_gib']:.2f} GiB  ETA {duration(per_step * (self.steps - step))}"
        )
        if self.file is not None:
            print(json.dumps(record), file=self.file, flush=True)
            for name, value in record.items():
                if name != "step":
                    self.board.add_scalar(name, value, step)
        return record

    def say(self, line: str) -> None:
        """A line above the progress bar."""
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


def read_log(run: Path) -> list[dict[str, float]]:
    """The records of RUN/log.jsonl, oldest first; a last line cut short by a kill is left out."""
    file = run / "log.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def duration(seconds: float) -> str:
    """75.2 -> "1:15", 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
