"""Every system's training, ended by signals at the worst moments and resumed: the end is an undisturbed run's, bit for
bit. The process sends the signal to itself, so that the moment is the same on every machine; tests/fuzz sends them at
any moment, and test_launched.py to several ranks."""

import re
import subprocess
import sys

import pytest

from mimo import checkpoint
from mimo.cli import main
from mimo.presets import TINY_SYSTEMS
from mimo.training.log import read_log

from .. import processes

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "--model.depth 2 --model.dim 32 --model.heads 2 --model.decoder-layer 1 --train.batch-size 2 --train.warmup 2 "
    "--train.workers 0 --train.preview-every 0 --train.log-every 1 --train.save-every 2 --steps 6"
).split()
# arguments: when, the step, and the words of a command.
PROGRAM = """
import os, signal, sys
from mimo import checkpoint
from mimo.cli import main
from mimo.training.trainer import Trainer

when, step, *words = sys.argv[1:]
sha256, train_step = checkpoint.sha256, Trainer.train_step

def killed_in_a_checkpoint(file):
    if f".unfinished-step_{int(step):08d}" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    return sha256(file)

def stopped_in_a_step(trainer, *batches):
    if trainer.step + 1 == int(step):
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(trainer, *batches)

if when == "in a checkpoint":
    checkpoint.sha256 = killed_in_a_checkpoint
else:
    Trainer.train_step = stopped_in_a_step
sys.exit(main(words))
"""


def interrupted(when, step, *words):
    """Exit status and stdout of a command that a signal reaches."""
    command = [sys.executable, "-c", PROGRAM, when, step, *words]
    done = processes.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    return done.returncode, done.stdout


def end_of(run):
    """Every tensor of the last checkpoint as bytes, and what the log says of every step."""
    folder, passed_over = checkpoint.latest(run)
    assert not passed_over
    state = checkpoint.read_state(folder)
    tensors = {
        f"{part}.{name}": tensor.numpy().tobytes()
        for part in ("model", "ema", "optimizer")
        for name, tensor in checkpoint.read_tensors(folder, part, state).items()
    }
    learnt = ("step", "diffusion", "mask", "alignment", "grad_norm", "lr")
    return state["step"], tensors, [[row.get(name) for name in learnt] for row in read_log(run)]


@pytest.mark.parametrize("system", TINY_SYSTEMS)
def test_killed_in_a_checkpoint_and_stopped_by_a_signal_the_end_is_the_same(tmp_path, system):
    train = ["train", "--preset", f"{system}-tiny", "--data", "shapes", *SMALL, "--out"]
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert main([*train, str(alone)]) == 0

    status, said = interrupted("in a checkpoint", 4, *train, run)
    assert status == -9, said
    assert list(run.glob("checkpoints/.unfinished-step_00000004*"))
    assert checkpoint.latest(run) == (checkpoint.step_folder(run, 2), [])

    again = ["train", "--out", str(run), "--resume"]
    status, said = interrupted("in a step", 3, *again)
    assert status == 0 and re.search(r"stopped by SIGTERM after step 3\b", said), said
    assert checkpoint.latest(run) == (checkpoint.step_folder(run, 3), [])

    assert main(again) == 0
    assert not list(run.glob("checkpoints/.unfinished-*"))
    (step, tensors, curve), (_, expected, expected_curve) = end_of(run), end_of(alone)
    assert step == 6 and len(curve) == 6 and curve == expected_curve
    assert len(tensors) > 40 and tensors.keys() == expected.keys()
    assert [name for name in tensors if tensors[name] != expected[name]] == []
