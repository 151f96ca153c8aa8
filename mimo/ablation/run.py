"""An ablation's cells, trained and measured: one after another, or several at once in processes of their own.

A cell is trained as `mimo train` trains, and measured from its checkpoints: whatever is there already is not done
again, so an ablation that was stopped goes on where it was, and its results are those of one that was not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from mimo import checkpoint, records
from mimo.ablation.measure import measure
from mimo.ablation.plan import Cell, Plan
from mimo.errors import InputError, user_input
from mimo.training.loop import train
from mimo.training.trainer import Trainer


class Stopped(Exception):
    """A signal has ended a training, which has saved itself."""


def run_cell(plan: Plan, cell: Cell) -> None:
    """Train what is not trained, measure what is not measured. Raises Stopped, and InputError for what is wrong."""
    run = cell.folder(plan.out)
    missing = [step for step in plan.steps if not cell.measured(plan.out, step).exists()]
    if missing:
        _train(plan, cell)
    for step in missing:
        found = measure(checkpoint.step_folder(run, step), plan.train_set, plan.test_set, plan.measuring, plan.device)
        cell.measured(plan.out, step).parent.mkdir(parents=True, exist_ok=True)
        records.write(cell.measured(plan.out, step), {"step": step} | found)
        print(f"{cell}: measured at step {step}", flush=True)


def _train(plan: Plan, cell: Cell) -> None:
    run, (model, config) = cell.folder(plan.out), plan.configs(cell)
    newest = checkpoint.step_folder(run, config.steps)
    if newest.exists() and checkpoint.latest(run, parts=())[0] == newest:
        return
    weights = dict(plan.weights)
    if model.repa_weight == 0:
        weights["encoder_weights"] = None
    trainer = user_input(
        Trainer,
        model,
        config,
        plan.sample,
        plan.train_set,
        device=torch.device(plan.device),
        ignore=["labels"] if model.num_classes == 0 else [],  # they are for probes
        told=plan.told,
        **weights,
    )
    train(trainer, run, resume=True, keep_every=plan.measuring.every, heading=f"{cell}")
    if trainer.step < config.steps:
        raise Stopped


def run_cells(plan: Plan, cells: list[Cell], jobs: int, after: Callable[[], object]) -> bool:
    """All cells; False when a signal has stopped them. after: called whenever a cell is done.

    Raises InputError of the first cell that cannot be run; others that were running are finished before.
    """
    if jobs > 1:
        return _several(plan, cells, jobs, after)
    for cell in cells:
        try:
            run_cell(plan, cell)
        except Stopped:
            return False
        except InputError as error:
            raise InputError(f"{cell}: {error}") from None
        after()
    return True


@dataclass
class _Job:
    cell: Cell
    process: BaseProcess
    says: Connection
    slot: int


def _several(plan: Plan, cells: list[Cell], jobs: int, after: Callable[[], object]) -> bool:
    """`run_cells` with `jobs` processes. What each prints is in output.txt of its cell."""
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // jobs)
    waiting, free = list(cells), list(range(jobs))
    running: list[_Job] = []
    problems: list[str] = []
    with _ending(running) as stopped:
        while running or (waiting and not stopped and not problems):
            while waiting and free and not stopped and not problems:
                cell, slot = waiting.pop(0), free.pop(0)
                says, theirs = context.Pipe(duplex=False)
                ours = replace(plan, device=_device(plan.device, slot))
                process = context.Process(target=_work, args=(ours, cell, threads, theirs))
                process.start()
                theirs.close()
                running.append(_Job(cell, process, says, slot))
            ended = wait([job.process.sentinel for job in running])
            for job in [job for job in running if job.process.sentinel in ended]:
                running.remove(job)
                free.append(job.slot)
                problem = _problem_of(job, plan)
                if problem is None:
                    print(f"{job.cell}: done", flush=True)
                    after()
                elif not stopped:
                    problems.append(problem)
    if problems:
        raise InputError(problems[0])
    return not stopped


@contextlib.contextmanager
def _ending(running: list[_Job]) -> Iterator[list[int]]:
    """While processes run: SIGTERM and SIGINT are passed on to them as SIGTERM, at which a training saves itself. Gives
    the signals that have come; after a SIGINT the block ends with KeyboardInterrupt."""
    came: list[int] = []

    def stop(number: int, _) -> None:
        came.append(number)
        for job in running:
            job.process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in came:
        raise KeyboardInterrupt


def _work(plan: Plan, cell: Cell, threads: int, says: Connection) -> None:
    """A process of `_several`: one cell. It says None when the cell is done, or in a line what is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all processes; the first one passes it on
    torch.set_num_threads(threads)
    folder = cell.folder(plan.out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a", buffering=1) as output:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                run_cell(plan, cell)
                says.send(None)
            except (Stopped, KeyboardInterrupt):
                says.send(f"{cell}: stopped")
            except InputError as error:
                says.send(f"{cell}: {error}")
            except Exception:
                traceback.print_exc()
                raise


def _problem_of(job: _Job, plan: Plan) -> str | None:
    job.process.join()
    try:
        return job.says.recv()
    except EOFError:
        log = job.cell.folder(plan.out) / "output.txt"
        return f"{job.cell}: its process ended with status {job.process.exitcode}, see {log}"


def _device(device: str, slot: int) -> str:
    """With several GPUs, processes take one each."""
    return f"cuda:{slot % torch.cuda.device_count()}" if device == "cuda" else device
