"""Several processes (gloo, on the CPU) train what one trains: curves, averages, checkpoints, signals, kills,
bad input."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from mimo import checkpoint
from mimo.cli import main
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import ShapesDataset
from mimo.errors import InputError
from mimo.recipes.base import LossParts
from mimo.sampling.loading import load as load_for_sampling
from mimo.training.distributed import ReportedElsewhere, process_group, whole
from mimo.training.log import read_log
from mimo.training.loop import train
from mimo.training.trainer import Trainer

NETWORK = {
    **{"depth": 2, "dim": 16, "heads": 2, "decoder_depth": 1, "decoder_layer": 1},
    **{"frames": 3, "height": 2, "width": 2, "channels": 12, "compression": (1, 2, 2), "video_frames": 3},
    **{"parameterization": "flow", "history_dropout": 0.2, "num_classes": 3},
}
FAR_LONG = {
    **{"recipe": "far_long", "mask_weight": 0.0, "mask_ratio": (0.0, 0.0), "separate_ln": False},
    **{"clean_context": 0.1, "coarse_stride": 2, "fine_frames": 2},
}
OPTIMISATION = {
    **{"batch_size": 8, "steps": 4, "lr": 1e-2, "warmup": 2, "precision": "fp32", "ema_decay": 0.9},
    **{"workers": 0, "log_every": 1, "save_every": 100, "preview_every": 0},
}


class LabelledShapes(ShapesDataset):
    """Shapes with classes; clip 0 is of class `odd`."""

    def __init__(self, *args, odd=0, **options):
        super().__init__(*args, **options)
        self.odd = odd

    def sample(self, index, seed):
        return super().sample(index, seed) | {"label": torch.tensor(index % 3 if index else self.odd).numpy()}


def make_trainer(model=None, odd=0, **options):
    config = MiMoConfig(**NETWORK | (model or {}))
    frames, height, width = config.video_shape
    dataset = LabelledShapes(num_frames=frames, height=height, width=width, length=20, odd=odd)
    sample, training = SampleConfig(sampler="euler", steps=2, context_frames=1, num_frames=3), OPTIMISATION | options
    shapes = [map(int, stage.split(":")[1].split("x")) for stage in training.get("stages", ())]
    stages = [LabelledShapes(num_frames=f, height=h, width=w, length=20, odd=odd) for f, h, w in shapes]
    return Trainer(config, TrainConfig(**training), sample, dataset, stages=stages)


def whole_state(trainer):
    """Every tensor of a trainer, whole."""
    tensors = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in trainer.ema.tensors.items()}
    tensors |= checkpoint.optimizer_tensors(trainer.optimizer, trainer.model)
    return {name: whole(tensor).detach().clone() for name, tensor in tensors.items()}


class NanAt:
    """The recipe, with a gradient that is not a number at some steps (on one rank alone if told)."""

    def __init__(self, trainer, steps, rank=None):
        self.recipe, self.steps = trainer.recipe, steps
        self.here = rank is None or trainer.world.rank == rank

    def loss(self, *args, step, **options):
        parts = self.recipe.loss(*args, step=step, **options)
        return LossParts(parts.total * float("nan"), *parts[1:]) if self.here and step in self.steps else parts


# Running ranks --------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(size, command):
    """The environment that torchrun gives, without waiting for torchrun itself."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ours(text):
    """The lines that are not torch's: its warnings, and what gloo says of its connections."""
    return [line for line in text.splitlines() if not line.startswith(("[W", "[Gloo]"))]


def finish(processes, timeout=240):
    """(exit status, stdout, stderr) of every rank."""
    results = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, results, strict=True)]


def in_ranks(size, code, **values):
    """Run code that uses this module's names in `size` ranks; it ends by calling report(something for JSON), once."""
    program = textwrap.dedent(
        f"""
        import json, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch
        torch.set_num_threads(1)
        from test_distributed import *
        values = json.loads({json.dumps(values)!r})
        with process_group(gpu=False) as world:
            def report(value):
                if world.leads:
                    print("REPORT" + json.dumps(value))
        """
    ) + textwrap.indent(textwrap.dedent(code), "    ")
    results = finish(start_ranks(size, [sys.executable, "-c", program]))
    for status, _, errors in results:
        assert status == 0, errors
    return json.loads(results[0][1].partition("REPORT")[2])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Equal training -------------------------------------------------------------------------------------------------------

ALIGNED = {"repa_weight": 0.5, "repa_layer": 1, "repa_encoder": "hog", "repa_channels": 28, "repa_hidden": 8} | {
    "compression": (1, 4, 4)
}
MASKED = {
    "recipe": "magi",
    "attention": "factorized",
    "positions": "sincos",
    "learned_places": True,
    "qk_norm": False,
} | {
    **{"parameterization": "epsilon", "token_depth": 1, "token_width": 16, "noise_levels": 3, "history_dropout": 0.0},
    **{"mask_weight": 0.0, "mask_ratio": (0.5, 0.9), "cross_attention": True},
}
RAGGED = {"recipe": "videomar", "parameterization": "epsilon", "token_depth": 1, "token_width": 16} | {
    **{"history_dropout": 0.0, "mask_weight": 0.0, "mask_ratio": (0.5, 0.9), "cross_attention": True},
}
VARIANTS = {
    "plain": ({}, {}),
    "interleaved": ({"interleaved": True}, {}),
    "unmasked": ({"positions": "learned", "separate_ln": False}, {"unmasked_steps": 2}),
    "aligned": (ALIGNED, {}),
    "magi": (MASKED, {}),
    "videomar": (RAGGED, {"stages": ("2:2x4x2",)}),
    "far_long": (FAR_LONG, {}),
}
PARTS = ("diffusion", "mask", "alignment", "grad_norm")


@functools.cache
def alone(variant):
    """Records and final tensors of one process."""
    model, options = VARIANTS[variant]
    trainer = make_trainer(model, **options)
    return train(trainer), whole_state(trainer)


def assert_same_training(records, tensors, variant):
    expected, expected_tensors = alone(variant)
    assert len(records) == len(expected) == 4
    for record, one in zip(records, expected, strict=True):
        for part in PARTS:
            assert record[part] == pytest.approx(one[part], rel=2e-5), (record["step"], part)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        # AdamW's first steps have the size of the rate whatever the gradient's: where it is near zero, sums show.
        torch.testing.assert_close(tensor, expected_tensors[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulated_training_equals_training_in_one_piece(variant):
    model, options = VARIANTS[variant]
    trainer = make_trainer(model, **options, accumulate=4)
    records = train(trainer)
    assert_same_training(records, whole_state(trainer), variant)


def test_two_ranks_train_what_one_trains(tmp_path):
    """Both strategies, with and without accumulation, recomputation and offload, in one pair of processes."""
    runs = [
        *(("ddp", variant, {}) for variant in VARIANTS),
        *(("fsdp", variant, {}) for variant in VARIANTS),
        ("ddp", "plain", {"accumulate": 2, "recompute": True}),
        ("fsdp", "plain", {"accumulate": 2, "recompute": True}),
        ("fsdp", "plain", {"cpu_offload": True}),
    ]
    records = in_ranks(
        2,
        """
        from torch.distributed.tensor import DTensor
        records = []
        for number, (strategy, variant, options) in enumerate(values["runs"]):
            model, more = VARIANTS[variant]
            trainer = make_trainer(model, **more, strategy=strategy, **options)
            records.append(train(trainer))
            sharded = [isinstance(t, DTensor) for t in (*trainer.model.parameters(), *trainer.ema.tensors.values())]
            assert all(sharded) if strategy == "fsdp" else not any(sharded)
            head = trainer.model.head.out if trainer.model_config.token_depth else trainer.model.head
            assert strategy == "ddp" or len(head.weight.to_local()) == 6
            state = whole_state(trainer)
            averaged = trainer.averaged()
            assert (averaged is not None) == world.leads
            if world.leads:
                assert all(torch.equal(state[f"ema.{name}"], t) for name, t in averaged.state_dict().items())
                torch.save(state, f"{values['folder']}/{number}.pt")
        report(records)
        """,
        runs=runs,
        folder=str(tmp_path),
    )
    for number, (_, variant, _) in enumerate(runs):
        assert_same_training(records[number], torch.load(tmp_path / f"{number}.pt"), variant)


def test_recomputed_activations_give_equal_gradients():
    gradients = []
    for recompute in (False, True):
        trainer = make_trainer(recompute=recompute, grad_clip=1e9)
        trainer.optimizer.step = lambda trainer=trainer: gradients.append(
            [parameter.grad.clone() for parameter in trainer.model.parameters()]
        )
        trainer.start_data()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            trainer.train_step()
        gradients[-1].append(sum(saved))
    *plain, much = gradients[0]
    *again, little = gradients[1]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True)) and len(plain) > 40
    assert little < 0.5 * much  # of what is kept between forward and backward


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_checkpoints_reshard(tmp_path):
    """fsdp on 2 -> ddp on 2 -> alone -> fsdp on 4 -> alone, bit for bit; each writes anew what the one before wrote."""
    hops = """
        from pathlib import Path
        for strategy, source, target in values["hops"]:
            trainer = make_trainer(strategy=strategy)
            if source is None:
                trainer.start_data()
                trainer.train_step()
                trainer.train_step()
            else:
                with world.together():
                    trainer.load(checkpoint.latest(Path(source))[0])
            trainer.save(Path(target))
        report(trainer.step)
    """

    def load(folder):
        trainer = make_trainer()
        trainer.load(checkpoint.latest(folder)[0])
        assert trainer.step == 2 and trainer.ema.updates == 2
        return trainer

    fsdp2, ddp2, alone, fsdp4 = folders = [tmp_path / name for name in ("fsdp2", "ddp2", "alone", "fsdp4")]
    in_ranks(2, hops, hops=[("fsdp", None, str(fsdp2)), ("ddp", str(fsdp2), str(ddp2))])
    trainer = load(ddp2)
    trainer.save(alone)
    in_ranks(4, hops, hops=[("fsdp", str(alone), str(fsdp4))])
    first, state, last = whole_state(load(fsdp2)), whole_state(trainer), whole_state(load(fsdp4))
    assert first.keys() == state.keys() == last.keys() and len(state) > 100
    assert [name for name in state if not torch.equal(first[name], state[name])] == []
    assert [name for name in state if not torch.equal(last[name], state[name])] == []
    sampled = load_for_sampling(fsdp4, device=torch.device("cpu")).model.state_dict()
    assert all(torch.equal(state[f"ema.{name}"], tensor) for name, tensor in sampled.items())
    parts = [list(folder.glob("checkpoints/step_00000002/model/shard-*")) for folder in folders]
    assert [len(files) for files in parts] == [2, 2, 1, 4]
    sizes = [sum(file.stat().st_size for file in files) for files in parts]
    assert max(sizes) < 1.8 * min(sizes)  # what all ranks hold is written once


def test_a_damaged_shard_stops_every_rank_with_one_message(tmp_path):
    run = tmp_path / "run"
    train(make_trainer(steps=1), run)
    (file,) = (run / "checkpoints" / "step_00000001" / "ema").iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    saw = in_ranks(
        2,
        """
        from pathlib import Path
        saw = ""
        try:
            train(make_trainer(steps=2), Path(values["run"]), resume=True)
        except InputError as error:
            saw = str(error)
        report(world.gather(saw))
        """,
        run=str(run),
    )
    assert sum(bool(words) for words in saw) == 1 and "checksum of ema/shard-00001" in "".join(saw)


def test_a_full_disk_of_one_rank_is_said_once(tmp_path):
    saw = in_ranks(
        2,
        """
        import resource
        from pathlib import Path
        trainer, saw = make_trainer(strategy="fsdp"), None
        if not world.leads:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            trainer.save(Path(values["run"]))
        except InputError as error:
            saw = str(error)
        report(world.gather(saw))
        """,
        run=str(tmp_path),
    )
    assert sorted(map(bool, saw)) == [False, True] and "step_00000000 cannot be written: File too large" in "".join(saw)
    assert checkpoint.latest(tmp_path) == (None, [])


# Steps that are not finite --------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks_alike():
    found = in_ranks(
        2,
        """
        found = []
        for strategy in ("ddp", "fsdp"):
            trainer = make_trainer(strategy=strategy, max_skipped=2, steps=5)
            trainer.objective.recipe = NanAt(trainer, steps=(0, 2, 3), rank=1)
            trainer.start_data()
            moved = []
            for step in range(5):
                before = whole_state(trainer)
                trainer.train_step()
                trainer.sums.require_finite()
                after = whole_state(trainer)
                zero = {name: torch.zeros_like(tensor) for name, tensor in after.items()}
                moved.append(sum(not torch.equal(after[name], (zero | before)[name]) for name in after))
                if step == 1:  # the first that counts
                    assert all(torch.equal(t, after["ema" + n[5:]]) for n, t in after.items() if n.startswith("model."))
            means, _ = trainer.sums.take()
            finite = all(tensor.isfinite().all().item() for tensor in after.values())
            found.append([moved, int(trainer.ema.updates), means["skipped"], finite, means["diffusion"]])
        report(found)
        """,
    )
    for moved, updates, skipped, finite, diffusion in found:
        assert moved[0] == moved[2] == moved[3] == 0 and min(moved[1], moved[4]) > 100
        assert updates == 2 and skipped == 3 and finite and 0 < diffusion < 10


def test_too_many_skipped_steps_end_training_and_name_the_first(tmp_path):
    trainer = make_trainer(max_skipped=2, steps=9, save_every=1)
    trainer.objective.recipe = NanAt(trainer, steps=(1, 3, 4, 5))
    with pytest.raises(InputError, match="diverged at step 4: .* nor is it finite in the 2 steps after it"):
        train(trainer, tmp_path)
    assert checkpoint.latest(tmp_path)[0].name == "step_00000005"
    assert [row["skipped"] for row in read_log(tmp_path)] == [0, 1, 0, 1, 1]
    tensors = checkpoint.read_tensors(
        checkpoint.latest(tmp_path)[0], "model", checkpoint.read_state(checkpoint.latest(tmp_path)[0])
    )
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# The command, as torchrun starts it -----------------------------------------------------------------------------------


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
    slurm |= {"RENDEZVOUS_PORT": str(free_port()), "PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    # torchrun also stops the processes that read data.
    _, *options = arguments(run, steps=10_000, save_every=10_000, workers=1)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(["bash", str(script), *options], env=os.environ | slurm, **pipes)
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
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=240)
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


def test_divergence_is_said_once():
    saw = in_ranks(
        2,
        """
        trainer, saw = make_trainer(), None
        trainer.objective.recipe = NanAt(trainer, steps=(1,))
        try:
            train(trainer)
        except InputError as error:
            saw = str(error)
        report(world.gather(saw))
        """,
    )
    assert saw[0].startswith("training diverged at step 2") and saw[1] == ""


def test_data_that_one_rank_alone_cannot_use_stops_all(tmp_path):
    """In the middle of training: the rank that meets the bad label says so, the other one does not wait for it."""
    program = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_distributed import *
        import mimo.cli
        from pathlib import Path

        class Command:
            def run(self):
                with process_group(gpu=False):
                    train(make_trainer(odd=7, steps=50), Path(sys.argv[1]))

        mimo.cli.parse = lambda argv: Command()
        sys.exit(mimo.cli.main(["train"]))
        """
    )
    results = finish(start_ranks(2, [sys.executable, "-c", program, str(tmp_path)]))
    said = assert_one_line_and_status_2(results, "label 7 in the data, expected 0..2")
    assert sum(said) == 1


def test_more_processes_than_gpus(monkeypatch):
    gpus, words = torch.cuda.device_count(), []
    for rank in range(gpus, gpus + 3):
        for name, value in {"RANK": rank, "WORLD_SIZE": gpus + 3, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(InputError) as caught, process_group(gpu=True):
            pass
        words.append(str(caught.value))
    assert words == [f"LOCAL_RANK={gpus}: expected a process per GPU, of which this machine has {gpus}", "", ""]


def test_offload_needs_shards_and_fsdp_a_launcher():
    with pytest.raises(ValueError, match="cpu_offload=True: expected False unless strategy is 'fsdp'"):
        TrainConfig(cpu_offload=True)
    with pytest.raises(ValueError, match="strategy='fsdp': expected .*torchrun"):
        make_trainer(strategy="fsdp")
    assert make_trainer(strategy="ddp").shared is not None  # alone there is nothing to share
