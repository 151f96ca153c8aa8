"""`mimo train` as torchrun starts it, in several processes (gloo, on the CPU): kills, signals, bad input."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mimo import checkpoint
from mimo.cli import main
from mimo.training.distributed import ReportedElsewhere
from mimo.training.log import read_log

from .. import processes
from ..processes import finish, free_port, start_ranks
from .small_runs import NETWORK, OPTIMISATION


def ours(text):
    """The lines that are not torch's: its warnings, and what gloo says of its connections."""
    return [line for line in text.splitlines() if not line.startswith(("[W", "[Gloo]"))]


def arguments(out, **options):
    values = {f"model.{name}": value for name, value in NETWORK.items() if name != "num_classes"}
    values |= {f"train.{name}": value for name, value in (OPTIMISATION | {"log_every": 10} | options).items()}
    words = ["train", "--preset", "mimo-tiny", "--data", "shapes", "--out", str(out)]
    for name, value in values.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def command(out, *more, **options):
    return [sys.executable, "-m", "mimo", *arguments(out, **options), *more]


def wait_for(condition, processes):
    deadline = time.monotonic() + 240
    while not condition():
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline
        time.sleep(0.002)


def steps_of(run):
    return [int(folder.name[5:]) for folder in checkpoint.step_folders(run)]


def tensors_of(run, step):
    folder = checkpoint.step_folder(run, step)
    state = checkpoint.read_state(folder)
    return {
        f"{part}.{name}": tensor
        for part in ("model", "ema", "optimizer")
        for name, tensor in checkpoint.read_tensors(folder, part, state).items()
    }


def kill(ranks, numbers) -> None:
    """Kills some, and lets the others go on: they do not wait for ever, and do not call it a success."""
    for number in numbers:
        ranks[number].kill()
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    assert all(status not in (0, 2) for status, *_ in finish(ranks))


@pytest.mark.parametrize(("strategy", "in_training", "in_checkpoint"), [("fsdp", [1], [0, 1]), ("ddp", [0, 1], [0])])
def test_killed_ranks_lose_nothing(tmp_path, strategy, in_training, in_checkpoint):
    """Ranks killed in the middle of training, then in the middle of a checkpoint; the end is an undisturbed run's."""
    options = {"strategy": strategy, "steps": 30, "save_every": 2, "lr": 1e-3}
    quiet, run = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed = start_ranks(2, command(quiet, **options))
    ranks = start_ranks(2, command(run, **options))
    wait_for(lambda: len(steps_of(run)) >= 1, ranks)
    kill(ranks, in_training)

    reached = steps_of(run)[-1]
    ranks = start_ranks(2, command(run, "--resume", **options))

    def writing():
        """The folder of a step that is not there yet, with a file in it and all ranks stopped."""
        if not any(int(f.name[-8:]) > reached for f in run.glob("checkpoints/.unfinished-*")):
            return False
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        for rank in ranks:
            os.waitid(os.P_PID, rank.pid, os.WSTOPPED)
        done = steps_of(run)[-1]
        if any(int(f.name[-8:]) > done for f in run.glob("checkpoints/.unfinished-*")):
            return True
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
        return False

    wait_for(writing, ranks)
    kill(ranks, in_checkpoint)
    newest, passed_over = checkpoint.latest(run)
    assert passed_over == [] and newest < checkpoint.step_folder(run, 30)

    results = finish(start_ranks(2, command(run, "--resume", **options)))
    assert [status for status, *_ in results] == [0, 0], results
    assert "deleted" in results[0][1] and ours(results[1][1]) == [], "the first rank alone talks"
    assert [status for status, *_ in finish(undisturbed)] == [0, 0]
    expected, found = tensors_of(quiet, 30), tensors_of(run, 30)
    assert expected.keys() == found.keys() and len(found) > 100
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_sigterm_to_one_rank_stops_all_with_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(2, command(run, steps=10_000, save_every=10_000, strategy="fsdp"))
    wait_for(lambda: (run / "log.jsonl").exists() and len(read_log(run)) >= 1, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    results = finish(ranks)
    assert [status for status, *_ in results] == [0, 0], results
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+)", results[0][1])[1])
    assert steps_of(run) == [stopped] and 10 <= stopped < 10_000
    assert read_log(run)[-1]["step"] == stopped


def test_the_slurm_example_stops_in_time_and_is_queued_again(tmp_path):
    """With torchrun itself, and stand-ins for SLURM's commands: srun runs its command here, scontrol writes down what
    it is asked."""
    script = Path(__file__).parents[2] / "examples" / "slurm.sh"
    run, commands = tmp_path / "run", tmp_path / "bin"
    commands.mkdir()
    programs = {
        "srun": 'shift; exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, text in programs.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "71", "PROCESSES_PER_NODE": "2"}
    slurm |= {"RENDEZVOUS_PORT": str(free_port()), "PATH": f"{commands}:{os.environ['PATH']}"}
    # torchrun also stops the processes that read data.
    _, *options = arguments(run, steps=10_000, save_every=10_000, workers=1)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(["bash", str(script), *options], env=processes.environment(**slurm), **pipes)
    wait_for(lambda: (run / "log.jsonl").exists() and len(read_log(run)) >= 1, [job])
    job.send_signal(signal.SIGTERM)
    output, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+)", output)[1])
    assert steps_of(run) == [stopped] and (tmp_path / "asked").read_text() == "requeue 71\n"
    assert output.count("mimo-tiny on 2 x cpu") == 1


def assert_one_line_and_status_2(results, words):
    assert [status for status, *_ in results] == [2] * len(results), results
    lines = [line for _, _, errors in results for line in ours(errors)]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines
    return [bool(ours(errors)) for _, _, errors in results]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--train.batch-size", "5"], "expected a multiple of accumulate=1 times 2 processes"),  # seen by all
        (["--train.colour", "red"], "colour"),  # seen by all, before they know each other
        (["--train.strategy", "fsdp", "--compile"], "strategy='fsdp': expected 'ddp' with --compile"),
    ],
)
def test_bad_options_are_said_once(tmp_path, more, words):
    results = finish(start_ranks(2, command(tmp_path / "run", *more)))
    assert assert_one_line_and_status_2(results, words) == [True, False]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train.batch-size", "5"], "error: batch_size=5: expected a multiple of accumulate=1 times 2 processes"),
        (["--train.colour", "red"], "error: mimo train: Unrecognized options: --train.colour"),
    ],
)
def test_torchrun_names_bad_input_as_the_cause(tmp_path, more, message):
    """Its report says what the rank said, and its exit status is its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    words = [*torchrun, "-m", "mimo", *arguments(tmp_path / "run"), *more]
    done = processes.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stderr.count(message) == 2, done.stderr
    said, _, cause = done.stderr.partition("Root Cause")
    assert any(line.startswith(message) for line in said.splitlines()) and message in cause


@pytest.mark.parametrize(("rank", "launched"), [(0, True), (1, True), (1, False)])
def test_a_rank_with_nothing_to_say_lets_the_others_end_first(tmp_path, monkeypatch, capsys, rank, launched):
    """torchrun ends all processes when one has ended: it has to be the one that names the cause."""
    report, waited = tmp_path / "error.json", []
    monkeypatch.setenv("RANK", str(rank))
    if launched:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    else:
        monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr("mimo.errors.time.sleep", lambda seconds: waited.append((seconds, report.exists())))
    assert main(["train", "--preset", "mimo-tiny", "--colour", "red"]) == 2
    speaks = rank == 0
    assert bool(capsys.readouterr().err) == report.exists() == speaks
    assert waited == ([] if speaks or not launched else [(60, False)])

    def elsewhere(command):
        raise ReportedElsewhere()

    monkeypatch.setattr("mimo.cli.train.Train.run", elsewhere)
    waited.clear()
    words = ["train", "--preset", "mimo-tiny", "--data", "shapes", "--out", str(tmp_path / "run")]
    assert main(words) == 2 and capsys.readouterr().err == ""
    assert [seconds for seconds, _ in waited] == ([60] if launched else [])
