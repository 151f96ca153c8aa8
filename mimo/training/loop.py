"""The training loop: steps, the log, checkpoints, previews, and how it begins and ends in a run folder."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import Tensor

from mimo import checkpoint
from mimo.errors import InputError
from mimo.training.distributed import StopRequest
from mimo.training.log import RunLog, only_process_in
from mimo.training.schedule import learning_rate
from mimo.training.trainer import Trainer


def train(
    trainer: Trainer,
    out: Path | None = None,
    *,
    resume: bool = False,
    keep_every: int | None = None,
    preview: Callable[[Trainer], list[Path]] | None = None,
    heading: str = "",
    wandb: bool = False,
) -> list[dict[str, float]]:
    """Train to config.steps and return the records of the log, one per interval.

    With a run folder, SIGTERM and SIGINT end training early, with a checkpoint; SIGINT then goes on as
    KeyboardInterrupt.

    Args:
        out: run folder for checkpoints, log.jsonl and TensorBoard; None writes nothing.
        resume: continue from the newest whole checkpoint in `out`; without it, a folder that has one is an error.
        keep_every: checkpoints whose step is a multiple of it are never deleted.
        preview: called every config.preview_every steps; returns the files it wrote.
        heading: printed when the run folder and the first batch are known to fit.
        wandb: log to Weights & Biases too.

    Raises: InputError for a run folder, checkpoint or dataset that does not fit, or when another process trains in the
        run folder, and when a loss stops being finite.
    """
    world = trainer.world
    folder = out if world.leads else None
    with (
        _open_run(trainer, out, resume) as notes,
        StopRequest(enabled=out is not None, world=world) as stop,
        RunLog(
            folder,
            trainer.config.steps,
            start=trainer.step,
            device=trainer.device,
            shown=world.leads,
            wandb=trainer.configs if wandb else None,
        ) as log,
    ):
        for note in notes:
            log.say(note)
        steps = _Steps(trainer, log, stop, out, keep_every, preview)
        stopped = steps.run(heading)
        if stopped:
            name = signal.Signals(stopped).name
            log.say(f"stopped by {name} after step {trainer.step}: --resume continues from there")
    if stopped == signal.SIGINT:  # whoever pressed it also wants what would come next not to come
        raise KeyboardInterrupt
    return steps.records


class _Steps:
    """The steps of one call of `train`, and what is logged, saved and shown between them."""

    def __init__(
        self,
        trainer: Trainer,
        log: RunLog,
        stop: StopRequest,
        out: Path | None,
        keep_every: int | None,
        preview: Callable[[Trainer], list[Path]] | None,
    ):
        self.trainer, self.log, self.stop = trainer, log, stop
        self.out, self.keep_every, self.preview = out, keep_every, preview
        self.records: list[dict[str, float]] = []
        self.logged = self.saved = trainer.step

    def run(self, heading: str) -> int:
        """To the last step, or to the signal that is returned."""
        trainer, stopped = self.trainer, 0
        trainer.start_data()
        while trainer.step < trainer.config.steps and not stopped:
            micro_batches, stopped = _next_batches(trainer, self.stop)
            if not stopped:
                if heading:
                    self.log.say(heading)
                    heading = ""
                trainer.train_step(micro_batches)
                self.log.advance()
            self._report(stopped)
        return stopped

    def _report(self, stopped: int) -> None:
        """Log, save and preview as far as it is due after this step, or because it is the last one."""
        trainer, config, step = self.trainer, self.trainer.config, self.trainer.step
        ends = stopped or step == config.steps
        logs = step > self.logged and (ends or step % config.log_every == 0)
        saves = step > self.saved and (ends or step % config.save_every == 0)
        if logs or saves or trainer.device.type == "cpu":  # on a GPU this waits for the device
            trainer.sums.require_finite()
        if logs:
            rate = learning_rate(step - 1, config)
            self.records.append(self.log.write(step, *trainer.sums.take(), rate, trainer.waited))
            self.logged, trainer.waited = step, 0.0
        with self.log.aside():
            if saves and self.out is not None:
                self.log.say(f"saved {trainer.save(self.out, keep_every=self.keep_every)}")
                self.saved = step
            previews = not stopped and config.preview_every and step % config.preview_every == 0
            if self.preview and previews and not trainer.world.agree(self.stop.signal):
                for path in self.preview(trainer):
                    self.log.say(f"preview {path}")


def _next_batches(trainer: Trainer, stop: StopRequest) -> tuple[list[dict[str, Tensor]], int]:
    """The micro batches of the next step, or the number of the signal on which all ranks stop before it.

    The ranks agree before every step, as in the middle of one nobody can leave: bad input and signals reach one rank
    first. They exchange two numbers between hosts, while the GPUs still run the step before.
    """
    micro_batches, error = [], None
    try:
        if not stop.signal:
            micro_batches = trainer.fetch()
    except ValueError as caught:
        error = caught
    except (RuntimeError, OSError, EOFError):
        if not stop.signal:  # else it also reached the worker processes that the next batch comes from
            raise
    return micro_batches, trainer.world.agree(stop.signal, error)


@contextmanager
def _open_run(trainer: Trainer, out: Path | None, resume: bool) -> Iterator[list[str]]:
    """Load the newest checkpoint if `resume`, and keep others from the folder; gives what the user should know."""
    if out is None:
        yield []
        return
    world, lock = trainer.world, None
    with world.together():
        if world.leads and not resume and checkpoint.step_folders(out):
            raise InputError(f"{out} already holds checkpoints: pass --resume to continue it, or another --out")
    newest, passed_over = checkpoint.latest(out, world=world)
    with world.together():
        notes = _load_newest(trainer, out, newest, passed_over, resume)
        if world.leads:
            try:
                out.mkdir(parents=True, exist_ok=True)
                lock = only_process_in(out)
            except OSError as error:
                raise InputError(f"cannot write to the run folder {out}: {error.strerror}") from None
            notes += [f"deleted {folder}, left by an interrupted save" for folder in checkpoint.delete_unfinished(out)]
    with lock or nullcontext():
        yield notes


def _load_newest(trainer: Trainer, out: Path, newest: Path | None, passed_over: list[str], resume: bool) -> list[str]:
    """Notes on what was loaded; InputError if the run cannot go on from there."""
    if newest is None and passed_over:
        raise InputError(f"{out} has no whole checkpoint to resume from: {passed_over[0]}; another --out begins anew")
    notes = [f"passed over: {reason}" for reason in passed_over]
    if newest is None:
        return [*notes, *([f"{out} has no checkpoint yet: starting from step 0"] if resume else [])]
    notes += [*trainer.load(newest), f"resuming from {newest}"]
    step, steps = trainer.step, trainer.config.steps
    if step > steps:
        raise InputError(f"steps={steps}: {out} is at step {step} already, expected no less")
    return [*notes, *([f"nothing to do: step {step} of {steps} is reached"] if step == steps else [])]
