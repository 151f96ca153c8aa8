"""What becomes of a command whose words reach nobody: the work is done, and the exit status says so."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mimo import checkpoint
from mimo.cli import main
from mimo.data import write_video

from .. import processes

TINY = (
    "--model.depth 1 --model.dim 16 --model.heads 2 --model.decoder-depth 1 --model.decoder-layer 1 --model.frames 3 "
    "--model.height 2 --model.width 2 --model.channels 12 --model.compression 1 2 2 --model.video-frames 3"
)
TRAINING = (
    "--train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 --train.preview-every 0 "
    "--train.log-every 1 --train.save-every 2 --sample.steps 2 --sample.context-frames 1 --sample.num-frames 3 "
    "--steps 5"
)
# Where stdout and stderr go, as files or closed (None).
LOST = {
    "reader gone": (),
    "full": ("/dev/full",),
    "closed": (None,),
    "both full": ("/dev/full", "/dev/full"),
    "both closed": (None, None),
}
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


def run_without_reader(how: str, words: str) -> int:
    """Exit status of `mimo WORDS` with its output lost."""
    command = [sys.executable, "-m", "mimo", *words.split()]
    if LOST[how]:
        targets = dict(zip(("stdout", "stderr"), LOST[how], strict=False))
        closed = [number for number, target in enumerate(targets.values(), 1) if target is None]
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(path, "w")) for name, path in targets.items() if path}
            return processes.run(command, closed=closed, timeout=240, **files).returncode
    process = processes.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read().splitlines()
    assert all(line.startswith(b"sampling: ") for line in said), said  # how far it is, where that takes long
    return process.wait(timeout=240)


@needs_dev_full
@pytest.mark.parametrize("how", LOST)
def test_training_goes_on_to_its_end(tmp_path, how):
    words = f"train --preset mimo-tiny --data shapes --out {tmp_path / 'run'} {TINY} {TRAINING}"
    assert run_without_reader(how, words) == 0
    assert [folder.name for folder in checkpoint.step_folders(tmp_path / "run")] == ["step_00000004", "step_00000005"]


def test_training_that_a_shell_has_begun_without_output(tmp_path):
    """Closed before Python begins."""
    words = f"train --preset mimo-tiny --data shapes --out {tmp_path / 'run'} {TINY} {TRAINING}"
    command = ["bash", "-c", f"{sys.executable} -m mimo {words} >&- 2>&-"]
    assert subprocess.run(command, env=processes.environment(), timeout=240).returncode == 0
    assert checkpoint.latest(tmp_path / "run")[0].name == "step_00000005"


@needs_dev_full
@pytest.mark.parametrize("how", ["reader gone", "both closed"])
def test_encoding_and_sampling_go_on_to_their_end(tmp_path, how):
    run, latents, samples = (tmp_path / name for name in ("run", "latents", "samples"))
    assert main(f"train --preset mimo-tiny --data shapes --out {run} {TINY} {TRAINING}".split()) == 0
    assert run_without_reader(how, f"sample --checkpoint {run} --out {samples}") == 0
    assert (samples / "sample.mp4").exists() and (samples / "contact_sheet.png").exists()
    write_video(tmp_path / "clips" / "clip.mp4", np.zeros((4, 16, 16, 3), np.uint8))
    encode = f"encode --preset mimo-tiny --data {tmp_path / 'clips'} --out {latents} {TINY} --workers 0"
    assert run_without_reader(how, encode) == 0
    assert (latents / "index.json").exists()


@needs_dev_full
def test_a_report_that_nobody_can_read_is_no_success(tmp_path):
    """Of a command that only prints, what it prints is the work; a reader who leaves early has seen enough."""
    write_video(tmp_path / "clip.mp4", np.zeros((4, 16, 16, 3), np.uint8))
    command = [sys.executable, "-m", "mimo", "data", "check", tmp_path, "--workers", "0"]
    with open("/dev/full", "w") as full:
        done = processes.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr == "error: cannot write to stdout: No space left on device\n"
    words = f"set -o pipefail; {' '.join(map(str, command))} | true"
    done = subprocess.run(["bash", "-c", words], capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b""


def test_letters_that_the_terminal_does_not_have(tmp_path):
    run = tmp_path / "läufe"
    command = [sys.executable, *f"-m mimo train --preset mimo-tiny --data shapes --out {run} {TINY} {TRAINING}".split()]
    done = processes.run(
        command, capture_output=True, text=True, env=processes.environment(PYTHONIOENCODING="ascii"), timeout=240
    )
    assert done.returncode == 0 and "l\\xe4ufe" in done.stdout, done.stderr
