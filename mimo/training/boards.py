"""Where the records of a run go to be looked at, beside RUN/log.jsonl: TensorBoard, and on request Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mimo import records
from mimo.errors import InputError

Record = dict[str, float]
PATIENCE = 60  # seconds that wandb may take to answer, and to send the rest when a run ends


class Board(Protocol):
    """A place for the records of a run; OSError where the disk refuses one."""

    def write(self, step: int, record: Record) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """RUN/tensorboard; rows of steps behind `start` are taken back."""

    def __init__(self, out: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


@dataclass
class _Known:
    """RUN/wandb.json: which of wandb's runs this is."""

    id: str


class WandbRun:
    """A run of Weights & Biases, whose files lie in RUN/wandb; RUN/wandb.json remembers which, and who goes on with RUN
    goes on with it. Project, entity and mode are what wandb itself finds (WANDB_PROJECT, WANDB_MODE, `wandb login`).

    Nothing that fails here stops a run: without an answer the records stay on the disk, where `wandb sync` finds them,
    and `say` says so, once.

    Args:
        out: the run folder.
        config: what the run was told, for its page.
        say: prints a line.
    """

    def __init__(self, out: Path, config: dict[str, Any], say: Callable[[str], None]):
        import wandb

        self._say, self._run = say, None
        settings: dict[str, Any] = {"console": "off", "silent": True, "init_timeout": PATIENCE}
        if hasattr(wandb.Settings(), "finish_timeout"):  # wandb before 0.22 waits
            settings["finish_timeout"] = PATIENCE
        told = {"dir": str(out), "name": out.name, "config": config, "resume": "allow"}
        try:
            told["id"] = _known_id(out, say)
            try:
                self._run = wandb.init(**told, settings=wandb.Settings(**settings))
            except Exception as error:
                say(f"wandb: {_first_line(error)}; the records stay in {out / 'wandb'}, for `wandb sync`")
                self._run = wandb.init(**told, mode="offline", settings=wandb.Settings(**settings))
        except Exception as error:
            self._give_up(error)
            return
        if self._run.url:
            say(f"wandb: {self._run.url}")

    def write(self, step: int, record: Record) -> None:
        """wandb takes steps in order alone; those that a resumed run repeats are there already, and the same."""
        if self._run is not None:
            try:
                if step >= self._run.step:
                    self._run.log({name: value for name, value in record.items() if name != "step"}, step=step)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._say(f"wandb: {_first_line(error)}; nothing more of this run is logged there")


def require_wandb() -> None:
    """InputError where the package is not installed. (A folder of wandb's files is no package.)"""
    spec = find_spec("wandb")
    if spec is None or spec.origin is None:
        raise InputError("--log wandb needs the package wandb: pip install wandb")


def _known_id(out: Path, say: Callable[[str], None]) -> str:
    """The number of wandb's run, drawn when there is none."""
    file = out / "wandb.json"
    try:
        if file.exists():
            return records.read(file, _Known).id
    except InputError as error:
        say(f"{error}: wandb begins another run")
    known = _Known(secrets.token_hex(4))
    records.write(file, asdict(known))
    return known.id


def _first_line(error: Exception) -> str:
    return f"{error}".strip().partition("\n")[0] or type(error).__name__
