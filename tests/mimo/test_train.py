"""Training: exact resume, whatever interrupts it; the schedule; accumulation; the guard against divergence."""

import errno
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from mimo import checkpoint
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import ShapesDataset
from mimo.errors import InputError
from mimo.recipes.base import LossParts
from mimo.training.average import EMA
from mimo.training.log import RunLog, read_log
from mimo.training.loop import train
from mimo.training.schedule import learning_rate
from mimo.training.trainer import Trainer

from .. import processes
from .small_runs import ALIGNED, FAR_LONG, MASKED

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = {
    **{"depth": 2, "dim": 16, "heads": 2, "decoder_depth": 1, "decoder_layer": 1},
    **{"frames": 3, "height": 2, "width": 2, "channels": 12, "compression": (1, 2, 2), "video_frames": 3},
    **{"parameterization": "flow", "history_dropout": 0.2},
}
OPTIMISATION = {
    **{"batch_size": 4, "steps": 6, "lr": 1e-2, "warmup": 2, "precision": "fp32", "ema_decay": 0.9},
    **{"workers": 0, "log_every": 2, "save_every": 100, "preview_every": 0},
}


def make_trainer(model=None, length=20, clips=ShapesDataset, **options):
    model_config = MiMoConfig(**NETWORK | (model or {}))
    frames, height, width = model_config.video_shape
    dataset = clips(num_frames=frames, height=height, width=width, length=length)
    sample_config = SampleConfig(sampler="euler", steps=2, context_frames=1, num_frames=3)
    return Trainer(model_config, TrainConfig(**OPTIMISATION | options), sample_config, dataset)


def state_of(trainer):
    return {
        **{f"model.{name}": t.clone() for name, t in trainer.model.state_dict().items()},
        **{f"ema.{name}": t.clone() for name, t in trainer.ema.tensors.items()},
        **checkpoint.optimizer_tensors(trainer.optimizer, trainer.model),
    }


def assert_identical(one, other):
    assert one.keys() == other.keys() and len(one) > 100
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class NanAt:
    """The recipe, with a loss that is not a number at some steps."""

    def __init__(self, recipe, steps):
        self.recipe, self.steps = recipe, steps

    def loss(self, *args, step, **kwargs):
        parts = self.recipe.loss(*args, step=step, **kwargs)
        factor = float("nan") if step in self.steps else 1.0
        return LossParts(parts.total * factor, parts.diffusion * factor, parts.mask)


@pytest.mark.parametrize(
    ("model", "options", "bad"),
    [
        ({}, {}, ()),
        ({"interleaved": True}, {"accumulate": 2}, ()),
        ({"parameterization": "v", "min_snr_gamma": 5.0, "min_snr_decay": 0.96}, {"unmasked_steps": 2}, ()),
        ({}, {"max_skipped": 2}, (0, 2, 3)),
        (ALIGNED, {}, ()),
        (MASKED | {"cross_attention": False}, {"accumulate": 2}, ()),
        (FAR_LONG, {}, ()),
    ],
)
def test_resumed_training_is_bitwise_undisturbed_training(tmp_path, model, options, bad):
    def make():
        trainer = make_trainer(model, **options)
        trainer.objective.recipe = NanAt(trainer.recipe, bad)
        return trainer

    straight = make()
    train(straight)
    first = make()
    first.start_data()
    for _ in range(3):
        first.train_step()
    folder = first.save(tmp_path)
    torch.randn(7)  # what others draw from the global generator must not matter
    second = make()
    second.load(folder)
    assert second.step == 3
    train(second)
    assert second.ema.updates == 6 - len(bad)
    assert_identical(state_of(straight), state_of(second))


def test_another_seed_trains_another_model():
    one, other = make_trainer(seed=0, steps=1), make_trainer(seed=1, steps=1)
    train(one), train(other)
    assert not torch.equal(one.model.embed.weight, other.model.embed.weight)


def test_resume_refuses_another_configuration_and_names_it(tmp_path):
    folder = make_trainer().save(tmp_path)
    with pytest.raises(InputError, match=r"model\.depth is 2 there and 3 here; train\.lr is 0\.01 there and 0\.1 here"):
        make_trainer({"depth": 3}, lr=0.1).load(folder)
    make_trainer(steps=50, log_every=7, keep=9).load(folder)


def test_a_resumed_run_says_that_its_data_has_changed(tmp_path, capsys):
    train(make_trainer(steps=1), tmp_path)
    train(make_trainer(steps=2), tmp_path, resume=True)
    assert "the data was" not in capsys.readouterr().out
    train(make_trainer(steps=3, length=21), tmp_path, resume=True)
    assert re.search(r"the data was .*20 procedural clips.* and is .*21 .* now", capsys.readouterr().out)


def test_a_run_is_neither_overwritten_nor_lost(tmp_path):
    train(make_trainer(steps=2), tmp_path)
    with pytest.raises(InputError, match="already holds checkpoints"):
        train(make_trainer(steps=4), tmp_path)
    train(make_trainer(steps=4), tmp_path, resume=True)
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == ["step_00000002", "step_00000004"]
    assert [row["step"] for row in read_log(tmp_path)] == [2, 4]
    for folder in checkpoint.step_folders(tmp_path):
        (folder / "state.json").unlink()
    with pytest.raises(InputError, match="no whole checkpoint to resume from: .*state.json is missing"):
        train(make_trainer(steps=6), tmp_path, resume=True)


def test_log_repeats_no_step_after_a_resume(tmp_path):
    train(make_trainer(steps=6, log_every=1, save_every=4), tmp_path)
    (tmp_path / "checkpoints" / "step_00000006" / "state.json").unlink()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "diff')  # a line cut short by a kill
    train(make_trainer(steps=6, log_every=1, save_every=4), tmp_path, resume=True)
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_log_tells_how_long_data_was_waited_for(monkeypatch):
    """In seconds, which a busy machine cannot make less; the record has them as a share of the time."""

    class Slow(ShapesDataset):
        def sample(self, index, seed):
            time.sleep(0.1)
            return super().sample(index, seed)

    waits, write = [], RunLog.write

    def watched(log, step, means, tokens, lr, waited):
        waits.append(waited)
        return write(log, step, means, tokens, lr, waited)

    monkeypatch.setattr(RunLog, "write", watched)
    slow = make_trainer(steps=2, clips=Slow)
    (record,) = train(slow)
    assert len(waits) == 1 and waits[0] >= 0.1 * slow.config.batch_size
    assert 0 < record["data_wait"] <= 1


def test_status_line_says_everything(tmp_path, capsys):
    train(make_trainer(), tmp_path)
    number = r"[\d.e+-]+"
    line = (
        rf"step 4/6  diffusion {number}  mask {number}  grad norm {number}  lr {number}  "
        rf"[\d,]+ tokens/s  data [\d.]+%  [\d.]+ GiB  ETA \d+:\d\d"
    )
    assert re.search(line, capsys.readouterr().out)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_constant_learning_rate_stays_after_warm_up():
    config = TrainConfig(lr=0.4, lr_schedule="constant", warmup=4, steps=10)
    assert [learning_rate(step, config) for step in range(12)] == [0.1, 0.2, pytest.approx(0.3), *[0.4] * 9]


def test_learning_rate_warms_up_then_follows_a_cosine():
    config = TrainConfig(lr=1.0, lr_end=0.1, warmup=4, steps=15)
    rates = [learning_rate(step, config) for step in range(15)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.55)  # half way from step 4 to step 14
    assert rates[14] == pytest.approx(0.1)
    assert learning_rate(20, config) == pytest.approx(0.1)


def test_the_average_by_hand_and_of_a_short_run():
    """Update n keeps min(decay, (n + 1) / (n + 18)) of what was there; a skipped step leaves all as it is."""
    model, skips = torch.nn.Linear(1, 1, bias=False), {4, 7}
    average, expected, updates = EMA(model, decay=0.6), None, 0
    for step in range(40):
        value = math.sin(step)
        torch.nn.init.constant_(model.weight, value)
        average.update(model, torch.tensor(1.0 if step in skips else 0.0))
        if step not in skips:
            decay = min(0.6, (updates + 1) / (updates + 18)) if updates else 0
            expected = value if expected is None else decay * expected + (1 - decay) * value
            updates += 1
        assert average.tensors["weight"].item() == pytest.approx(expected, abs=1e-6)
    assert average.updates == updates == 38

    average = EMA(model, decay=0.99)
    for step in range(150):  # the weights move once, after the first step
        torch.nn.init.constant_(model.weight, float(step == 0))
        average.update(model, torch.zeros(()))
    assert 0 <= average.tensors["weight"].item() < 1e-6


class MeanOfLatents:
    """A stand-in objective whose gradient is the mean of the latents: the same however a batch is split."""

    def loss(self, model, latents, *, labels, actions, generator, **_):
        total = model.embed.bias.sum() * latents.mean()
        return LossParts(total, total, torch.zeros(()))


def test_accumulated_gradient_is_that_of_the_whole_batch():
    gradients = []
    for accumulate in (1, 2, 4):
        trainer = make_trainer(accumulate=accumulate, grad_clip=1e9)
        trainer.objective.recipe = MeanOfLatents()
        trainer.optimizer.step = lambda trainer=trainer: gradients.append(trainer.model.embed.bias.grad.clone())
        trainer.start_data()
        trainer.train_step()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    assert gradients[0].abs().max() > 0


def test_divergence_names_its_step_and_saves_nothing(tmp_path):
    trainer = make_trainer(save_every=1)
    trainer.objective.recipe = NanAt(trainer.recipe, (2,))
    with pytest.raises(
        InputError, match="diverged at step 3: diffusion loss nan, mask loss [0-9.]+, gradient norm nan"
    ):
        train(trainer, tmp_path)
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == ["step_00000001", "step_00000002"]


def test_bf16_trains_in_autocast_with_fp32_weights():
    trainer = make_trainer(precision="bf16")
    records = train(trainer)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert all(0 < record["diffusion"] < 100 for record in records)


def test_learns_one_clip():
    trainer = make_trainer({"dim": 32, "history_dropout": 0.0}, steps=150, batch_size=8, log_every=15, lr_end=1e-3)
    trainer.dataset = OneClip(trainer.dataset)
    records = train(trainer)
    assert records[-1]["diffusion"] < 0.7 * records[0]["diffusion"]
    assert records[-1]["mask"] < 0.2 * records[0]["mask"]


class OneClip:
    def __init__(self, dataset):
        self.clip = dataset.sample(0, 0)

    def __len__(self):
        return 1

    def sample(self, index, seed):
        return self.clip


@pytest.mark.parametrize("moment", ["checkpoint", "preview"])
def test_a_signal_while_something_is_written_ends_training_with_a_checkpoint(tmp_path, moment):
    trainer = make_trainer(save_every=1 if moment == "checkpoint" else 100, preview_every=1)
    previews, save = [], trainer.save

    def signalled(here):
        if here == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    def preview(trainer):
        signalled("preview")
        previews.append(trainer.step)
        return []

    def saving(*args, **options):
        signalled("checkpoint")
        return save(*args, **options)

    trainer.save = saving
    train(trainer, tmp_path, preview=preview)
    assert trainer.step == 1 and checkpoint.latest(tmp_path) == (checkpoint.step_folder(tmp_path, 1), [])
    assert previews == ([1] if moment == "preview" else []), "nothing long is begun after the signal"


def test_steps_below_those_made_are_refused(tmp_path):
    trainer = make_trainer(steps=2)
    train(trainer, tmp_path)
    with pytest.raises(InputError, match=rf"steps=1: {tmp_path} is at step 2 already, expected no less"):
        train(make_trainer(steps=1), tmp_path, resume=True)
    assert train(make_trainer(steps=2), tmp_path, resume=True) == []


def test_one_process_trains_in_a_folder(tmp_path, capsys):
    other = "import sys, time; from pathlib import Path; from mimo.training.log import only_process_in; "
    other += "lock = only_process_in(Path(sys.argv[1])); print('has it', flush=True); time.sleep(600)"
    process = processes.Popen([sys.executable, "-c", other, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "has it\n"
        for resume in (False, True):
            with pytest.raises(InputError, match=rf"{tmp_path}: process {process.pid} on .* is training in it"):
                train(make_trainer(steps=1), tmp_path, resume=resume, heading="nothing is said before that")
        assert not capsys.readouterr().out and not (tmp_path / "log.jsonl").exists()
    finally:
        process.kill()
        process.communicate()
    train(make_trainer(steps=1), tmp_path, heading="now it is")  # whoever was killed holds nothing
    assert capsys.readouterr().out.startswith("now it is\n")
    train(make_trainer(steps=2), tmp_path, resume=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_that_a_full_disk_refuses_does_not_stop_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("mimo.training.log._continue_log", lambda *_: (open("/dev/full", "a"), ""))
    assert len(train(make_trainer(steps=4, log_every=1), tmp_path)) == 4
    assert checkpoint.latest(tmp_path)[0] == checkpoint.step_folder(tmp_path, 4)
    assert caplog.text.count(f"{tmp_path}: rows of the log are missing: No space left on device") == 1


def test_a_file_system_without_locks_does_not_stop_training(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    assert len(train(make_trainer(steps=1), tmp_path)) == 1
    assert f"{tmp_path}: nothing keeps a second process from training in it" in caplog.text


# The command as its own process, interrupted by signals. --------------------------------------------------------------


def arguments(out):
    options = {
        **{f"model.{name}": value for name, value in NETWORK.items()},
        **{f"train.{name}": value for name, value in OPTIMISATION.items()},
        **{"train.steps": 40, "train.save_every": 1, "train.log_every": 1},
    }
    words = ["train", "--preset", "mimo-tiny", "--data", "shapes", "--out", str(out)]
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def start(out, *more):
    command = [sys.executable, "-m", "mimo", *arguments(out), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return processes.Popen(command, start_new_session=True, **pipes)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_reaches_the_data_workers_too_loses_nothing(tmp_path, number):
    """As torchrun and terminals send it: to the whole process group, while nobody waits for data."""
    process = start(tmp_path, "--train.workers", "2", "--train.steps", "10000", "--train.save-every", "10000")
    wait_for(lambda: len(read_log(tmp_path)) >= 2, process)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 0), errors
    stopped = int(re.search(rf"stopped by {number.name} after step (\d+)", output)[1])
    assert checkpoint.latest(tmp_path)[0] == checkpoint.step_folder(tmp_path, stopped)
