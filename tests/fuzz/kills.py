"""Processes killed (SIGKILL) at any moment of what they write: nothing that was there is lost, nothing half is
believed, and who goes on ends where nobody was killed.

The moments are drawn from the seed; where in the work they fall, the machine decides.
"""

import contextlib
import io
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from mimo import checkpoint
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import ShapesDataset
from mimo.sampling.saving import Saving
from mimo.training.log import read_log
from mimo.training.loop import train
from mimo.training.trainer import Trainer

from .files import as_bytes, encode, files_of, folder, sampler, stream, write_clips
from .registry import fuzzer

# Forked from a process that has imported this module and computed nothing: they begin at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As in the processes that are killed: another number of threads sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def work(job: Callable[..., None], arguments: tuple, parent: Connection) -> None:
    torch.set_num_threads(1)
    parent.send("begins")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        job(*arguments, parent)
    parent.send("ends")


def killed(draw: random.Random, longest: float, job: Callable[..., None], *arguments: object) -> list:
    """Runs job(*arguments, connection) in a process and kills it within so many seconds; what it has sent by then."""
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work, args=(job, arguments, there), daemon=True)
    process.start()
    there.close()
    assert here.recv() == "begins"
    time.sleep(draw.uniform(0, longest))
    process.kill()
    process.join()
    said = []
    with contextlib.suppress(EOFError):
        while True:
            said.append(here.recv())
    assert process.exitcode == -9 or said[-1:] == ["ends"], f"the process ended with {process.exitcode}, {said}"
    return said


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(step)
    return {part: {"w": torch.randn(64, 64, generator=draw)} for part in ("model", "ema")}


def save_on(run: str, first: int, parent: Connection) -> None:
    for step in range(first, first + 1000):
        checkpoint.save(Path(run), step, tensors_of(step), {"configs": {"step": step}}, keep_last=2)
        parent.send(step)


@fuzzer("kills of saves", ci_seeds=1)
def kills_of_saves(seed: int) -> int:
    draw, cases, newest = random.Random(seed), 12, 0
    with folder() as run:
        for _ in range(cases):
            said = killed(draw, 0.15, save_on, str(run), newest + 1)
            saved = max([newest, *said])
            found, passed_over = checkpoint.latest(run)
            assert not passed_over, passed_over
            newest = 0 if found is None else checkpoint.read_state(found)["step"]
            assert newest in (saved, saved + 1), f"step {newest} is the newest, {saved} was saved"
            for place in checkpoint.step_folders(run):
                state = checkpoint.read_state(place)
                expected = tensors_of(state["step"])
                for part, named in expected.items():
                    assert as_bytes(checkpoint.read_tensors(place, part, state)) == as_bytes(named)
            if draw.random() < 0.5:  # the next save has to bear what the last one left
                checkpoint.delete_unfinished(run)
                assert not list((run / "checkpoints").glob(".*"))
    return cases


def trainer() -> Trainer:
    network = {"depth": 1, "dim": 16, "heads": 2, "decoder_depth": 1, "decoder_layer": 1, "parameterization": "flow"}
    network |= {"frames": 3, "height": 2, "width": 2, "channels": 12, "compression": (1, 2, 2), "video_frames": 3}
    training = {"batch_size": 2, "steps": 10, "lr": 1e-2, "warmup": 2, "precision": "fp32", "workers": 0}
    training |= {"log_every": 1, "save_every": 1, "preview_every": 0}
    dataset = ShapesDataset(num_frames=3, height=4, width=4, length=20)
    sampling = SampleConfig(sampler="euler", steps=1, context_frames=1, num_frames=3)
    return Trainer(MiMoConfig(**network), TrainConfig(**training), sampling, dataset, device=torch.device("cpu"))


def train_on(run: str, parent: Connection) -> None:
    train(trainer(), Path(run), resume=True)


@fuzzer("kills of training", ci_seeds=1)
def kills_of_training(seed: int) -> int:
    draw, cases = random.Random(seed), 6
    with folder() as place, one_thread(), contextlib.redirect_stdout(io.StringIO()):
        newest = 0
        for _ in range(cases):
            killed(draw, 1.5, train_on, str(place / "killed"))
            found, passed_over = checkpoint.latest(place / "killed")
            assert not passed_over, passed_over
            step = 0 if found is None else checkpoint.read_state(found)["step"]
            assert step >= newest, f"step {newest} is lost, {step} is the newest"
            newest = step
            assert newest <= len(read_log(place / "killed")) + 1
        states = []
        for run in (place / "killed", place / "spared"):
            last = trainer()
            train(last, run, resume=True)
            states.append(as_bytes(last.model.state_dict()) | as_bytes(dict(last.ema.tensors)))
            assert [row["step"] for row in read_log(run)] == list(range(1, 11))
        assert states[0] == states[1]
    return cases


def sample_on(place: str, parent: Connection) -> None:
    saving = Saving(Path(place), every=1)
    begun = checkpoint.step_folders(saving.folder)
    for _ in sampler().resume(saving) if begun else stream(saving):
        parent.send("frame")


@fuzzer("kills of unfinished videos", ci_seeds=1)
def kills_of_unfinished_videos(seed: int) -> int:
    draw, cases = random.Random(seed), 6
    with folder() as place, one_thread():
        expected = list(stream(None))
        saving, done = Saving(place / "unfinished", every=1), 0
        for _ in range(cases):
            done += killed(draw, 0.3, sample_on, str(saving.folder)).count("frame")
        if not checkpoint.step_folders(saving.folder):
            list(stream(saving))
        continued = sampler().resume(saving)
        assert continued.progress.done >= done
        list(continued)
        assert all(torch.equal(a, b) for a, b in zip(continued.saved(), expected, strict=True))
    return cases


def encode_on(clips: str, out: str, parent: Connection) -> None:
    encode(Path(clips), Path(out))


@fuzzer("kills of encodings", ci_seeds=1)
def kills_of_encodings(seed: int) -> int:
    draw, cases = random.Random(seed), 6
    with folder() as place:
        write_clips(place / "clips")
        encode(place / "clips", place / "spared")
        for _ in range(cases):
            killed(draw, 0.1, encode_on, str(place / "clips"), str(place / "killed"))
        encode(place / "clips", place / "killed")
        spared, found = (
            {file.name: file.read_bytes() for file in files_of(place / run)} for run in ("spared", "killed")
        )
        left = [name for name in found.keys() - spared.keys() if not name.startswith(".index.json.")]
        assert not left, left  # of an index that was being written, which another process may do
        assert all(found[name] == spared[name] for name in spared)
    return cases
