"""A checkpoint of format 2, written by `mimo train` before state.json had a checksum: today's code loads it, resumes
it and samples from it, and makes of it what the code of that time made (expected.npz)."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mimo import checkpoint
from mimo.cli import main
from mimo.data import ShapesDataset
from mimo.sampling.loading import load
from mimo.sampling.sampler import Sampler
from mimo.sampling.videos import generate
from mimo.training.log import read_log

OLD = Path(__file__).parent / "format_2"
# As the run was started: mimo-tiny on shapes, as small as it goes.
MODEL = {"depth": 1, "dim": 8, "heads": 1, "mlp_ratio": 1, "decoder_depth": 1, "decoder_layer": 1} | {
    **{"height": 4, "width": 4, "channels": 12}
}
TRAIN = {"steps": 6, "batch_size": 4, "workers": 0, "warmup": 1, "log_every": 1, "save_every": 3, "preview_every": 0}


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "run", ignore=shutil.ignore_patterns("expected.npz")))


@pytest.fixture(scope="module")
def expected():
    with np.load(OLD / "expected.npz") as file:
        return {name: file[name] for name in file.files}


def test_it_is_of_the_old_format_and_whole(run):
    folder, passed_over = checkpoint.find(run)
    assert not passed_over and checkpoint.read_state(folder)["format"] == 2
    assert sum(file.stat().st_size for file in OLD.rglob("*") if file.is_file()) < 150_000


def test_training_goes_on_as_it_would_have(run, expected, capsys):
    options = [f"--model.{name}={value}" for name, value in MODEL.items()]
    options += ["--model.rope-split", "2", "4", "2"]  # what that time's only one was for 8 channels
    options += [f"--train.{name}={value}" for name, value in TRAIN.items()]
    arguments = ["train", "--preset", "mimo-tiny", "--data", "shapes", "--out", str(run), "--resume", "--device", "cpu"]
    assert main(arguments + [option.replace("_", "-") for option in options]) == 0, capsys.readouterr()
    rows = read_log(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    losses = [[row[name] for name in ("diffusion", "mask", "grad_norm")] for row in rows[3:]]
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-4)
    newest = checkpoint.find(run)[0]
    assert newest.name == "step_00000006" and checkpoint.read_state(newest)["format"] == checkpoint.FORMAT


def test_sampling_gives_the_video_that_it_gave(run, expected):
    loaded = load(run, device=torch.device("cpu"))
    frames, height, width = loaded.model.config.video_shape
    clip = ShapesDataset(num_frames=frames, height=height, width=width).sample(0, 0)["video"]
    sampler = Sampler(loaded.model, loaded.sample_config)
    video = generate(sampler, tokenizer=loaded.tokenizer, context=torch.from_numpy(clip)[None], seed=5)
    difference = video[0, 3:].numpy().astype(int) - expected["predicted"]
    assert abs(difference).max() <= 1  # of 255: another machine rounds otherwise
