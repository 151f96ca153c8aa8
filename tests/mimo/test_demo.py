"""The demo, in a configuration that takes seconds: its files, its numbers, real clips with actions."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mimo.cli import main
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.data import VideoReader, write_video
from mimo.demo.clips import Windows, read_windows
from mimo.demo.page import error_map
from mimo.demo.run import compare, demo, frame_psnr, psnr
from mimo.errors import InputError
from mimo.presets import TINY_SYSTEMS
from mimo.recipes import RECIPES
from mimo.sampling.loading import load
from mimo.training.local import run_together

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES, CONTEXT = 5, 2


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    model = MiMoConfig.from_preset("mimo-tiny").to_dict() | {
        **{"depth": 1, "dim": 16, "heads": 2, "decoder_depth": 1, "decoder_layer": 1, "frames": FRAMES},
        **{"height": 2, "width": 2, "channels": 8, "compression": (1, 4, 4), "video_frames": FRAMES},
    }
    training = TrainConfig.from_preset("mimo-tiny").to_dict() | {"batch_size": 2, "steps": 4, "log_every": 2}
    sampling = {"sampler": "euler", "steps": 2, "context_frames": CONTEXT, "num_frames": FRAMES}
    monkeypatch.setattr("mimo.demo.run.TEST_CLIPS", 8)
    for kind, values in ((MiMoConfig, model), (TrainConfig, training), (SampleConfig, sampling)):
        monkeypatch.setitem(kind._PRESETS, "mimo-tiny", values)


def test_demo_writes_its_files_and_prints_its_numbers(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--processes", "1"]) == 0
    output = capsys.readouterr().out
    for name in ("prediction.mp4", "prediction.gif", "contact_sheet.png", "loss.png", "result.html"):
        assert str(out / name) in output
    number = r"\d+\.\d+"
    for name in ("diffusion", "mask"):
        assert re.search(rf"{name} loss: {number} until step 2, {number} at the end", output)
    assert re.search(
        rf"PSNR of 3 predicted frames, mean of 8 unseen clips: {number} dB \({number}, {number}, {number}\), "
        rf"{number} dB for copying",
        output,
    )
    with VideoReader(out / "prediction.mp4") as reader:
        assert reader.num_frames == FRAMES
        # Truth above prediction: while context is shown both halves are the same, frame and border included.
        first = reader.read(1)[0].astype(int)
        top, bottom = np.split(first, 2)
        assert np.abs(top - bottom).mean() < 2
        assert np.abs(first[1, 1] - (235, 120, 20)).max() < 20
    with Image.open(out / "prediction.gif") as gif:
        assert gif.n_frames == FRAMES
    for name in ("contact_sheet.png", "loss.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    config = load(out / "run").model.config
    added = {"tokenizer": "lapped", "prediction": "clean", "residual": True}
    assert config.to_dict() | added == config.to_dict() and "residual=True" in output
    page = (out / "result.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and page.count("data:image/gif;base64,") == 1
    assert 'src="http' not in page and "residual=True" in page
    assert [f"frame {t}" in page for t in range(FRAMES + 1)] == [False] * CONTEXT + [True] * 3 + [False]


def test_demo_is_repeatable_and_can_be_repeated_in_place(tmp_path):
    one, again, other = (demo(None, tmp_path, steps=2, seed=seed) for seed in (0, 0, 1))
    for name in ("psnr", "psnr_copy"):
        assert one[name] == again[name]
    for name in ("diffusion", "mask"):
        assert one["last"][name] == again["last"][name]
    assert one["psnr"] != other["psnr"] and one["psnr_copy"] == other["psnr_copy"]


def test_the_newest_demo_is_the_one_that_is_sampled(tmp_path):
    for steps in (4, 2, 3):
        demo(None, tmp_path, steps=steps)
        assert load(tmp_path / "run").folder.name == f"step_{steps:08d}"


def test_minutes_become_steps_that_can_be_told_instead(tmp_path, capsys, monkeypatch):
    training = TrainConfig.from_preset("mimo-tiny").to_dict() | {"warmup": 3}
    monkeypatch.setitem(TrainConfig._PRESETS, "mimo-tiny", training)
    by_time = demo(None, tmp_path, minutes=1e-4)
    told = re.search(r"0.0001 minutes are (\d+) steps here.*--steps (\d+)\n", capsys.readouterr().out)
    assert told and told[1] == told[2] and int(told[1]) >= 12
    by_steps = demo(None, tmp_path, steps=int(told[1]))
    assert by_time["psnr"] == by_steps["psnr"] and by_time["last"]["mask"] == by_steps["last"]["mask"]


def test_two_processes_train_one_network(tmp_path, capsys):
    """The same steps as one, but for the order of sums; what they print comes once."""
    together = demo(None, tmp_path / "two", steps=2, processes=2)
    printed = capsys.readouterr().out
    assert "on 2 x cpu" in printed and printed.count("step 2/2") == 1
    alone = demo(None, tmp_path / "one", steps=2, processes=1)
    for name in ("diffusion", "mask"):
        assert together["last"][name] == pytest.approx(alone["last"][name], rel=1e-5)
    assert together["psnr"] == pytest.approx(alone["psnr"], abs=1e-2)
    with pytest.raises(RuntimeError, match="ended with 3 before it had begun"):
        run_together(2, print, _Ends())


class _Ends:
    """What ends the process that unpickles it."""

    def __reduce__(self):
        return sys.exit, (3,)


@pytest.mark.parametrize("recipe", [name for name in TINY_SYSTEMS if name != "mimo"])
def test_every_system_ends_in_a_video(recipe, tmp_path, capsys, monkeypatch):
    """By its own preset, after one step: the name of a recipe or of a system, which differ in a dash."""
    for name in ("TEST_CLIPS", "SHOWN_CLIPS"):
        monkeypatch.setattr(f"mimo.demo.run.{name}", 1)
    out = tmp_path / "demo"
    options = ["--out", str(out), "--steps", "1", "--processes", "1"]
    assert main(["demo", "--recipe", recipe.replace("-", "_"), *options]) == 0
    output = capsys.readouterr().out
    config, sampling = (kind.from_preset(f"{recipe}-tiny") for kind in (MiMoConfig, SampleConfig))
    assert f"{recipe}-tiny" in output and "diffusion loss: " in output
    assert ("mask loss: " in output) == (config.mask_weight > 0)
    assert ("alignment loss: " in output) == (config.repa_weight > 0)
    assert ("PSNR of " in output) == (sampling.context_frames > 0)
    with VideoReader(out / "prediction.mp4") as reader:
        assert reader.num_frames == config.video_frames


def test_unknown_systems_are_refused_with_the_known_ones(tmp_path, capsys):
    assert main(["demo", "--recipe", "dit", "--out", str(tmp_path / "demo")]) == 2
    error = capsys.readouterr().err
    assert error == f"error: unknown recipe 'dit': expected one of {', '.join(TINY_SYSTEMS)}\n"
    assert {name.replace("-", "_") for name in TINY_SYSTEMS} >= set(RECIPES), "every recipe has a tiny preset"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--minutes", "0"], "--minutes 0: expected more than 0"),
        (["--minutes", "2", "--steps", "3"], "--minutes 2 and --steps 3: expected one of them"),
        (["--processes", "0"], "--processes 0: expected at least 1"),
    ],
)
def test_bad_options_are_refused_in_a_line(options, words, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), *options]) == 2
    assert capsys.readouterr().err == f"error: {words}\n"


def clips(folder, lengths, *, actions):
    rng = np.random.default_rng(0)
    for number, length in enumerate(lengths):
        video = rng.integers(0, 255, (length, 16, 16, 3), dtype=np.uint8)
        more = {"actions": rng.integers(0, 3, length)} if actions else {}
        np.savez(folder / f"{number}.npz", video=video, **more)


def test_demo_on_trajectories_with_actions(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    clips(tmp_path / "clips", [20, 30], actions=True)
    assert (
        main(
            [
                "demo",
                "--data",
                str(tmp_path / "clips"),
                "--out",
                str(tmp_path / "demo"),
                "--steps",
                "2",
                "--processes",
                "1",
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert "2 clips, 50 frames, 3 actions" in output
    assert "8 windows of the training clips' ends, which training did not see" in output and "unseen" not in output
    assert load(tmp_path / "demo" / "run").model.config.num_actions == 3


def test_demo_on_videos_skips_what_it_cannot_use(tmp_path, capsys):
    data = tmp_path / "clips"
    data.mkdir()
    rng = np.random.default_rng(0)
    for name, length in (("long", 24), ("short", 6)):
        write_video(data / f"{name}.mp4", rng.integers(0, 255, (length, 16, 16, 3), dtype=np.uint8))
    (data / "broken.avi").write_bytes(b"no video")
    demo(data, tmp_path / "demo", steps=1, interval=2)
    output = capsys.readouterr().out
    assert "short.mp4: 3 frames, expected at least 10" in output and "broken.avi" in output
    assert "1 clip, 12 frames" in output
    for name in ("long", "short"):
        (data / f"{name}.mp4").unlink()
    with pytest.raises(InputError, match="none of its 1 videos and npz files can be used"):
        read_windows(data, FRAMES, 8, 8, 1)
    (data / "broken.avi").unlink()
    with pytest.raises(InputError, match="holds no video and no npz file"):
        read_windows(data, FRAMES, 8, 8, 1)


def test_test_windows_share_no_frame_with_training_windows():
    lengths = (10, 16, 40)
    videos = [np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 8, 8, 3)) for n in lengths]
    windows = Windows([(f"{n}", video, None) for n, video in zip(lengths, videos, strict=True)], num_frames=5)
    assert windows.num_actions == 0
    tests = windows.test_windows(9)
    for index in range(3):
        seen = {int(f) for seed in range(200) for f in windows.sample(index, seed)["video"][:, 0, 0, 0]}
        held_out = [test["video"][:, 0, 0, 0].tolist() for test in tests[index::3]]
        assert len(held_out) == 3
        assert all(frames == list(range(frames[0], frames[0] + 5)) for frames in held_out)
        assert not seen & {f for frames in held_out for f in frames}
        assert min(seen) == 0 and held_out[-1][-1] == lengths[index] - 1


def test_scores_compare_with_the_last_context_frame():
    truth = torch.zeros(2, 4, 2, 2, 3, dtype=torch.uint8)
    truth[:, 3] = 102
    predicted = truth.clone()
    predicted[0, 2] = 120
    predicted[1, 3] = 51
    scores = compare(predicted, truth, 2)
    assert scores["clips"] == 2 and scores["better"] == 1
    assert frame_psnr(predicted, truth)[0].tolist() == pytest.approx([148.13, 148.13, 6.55, 148.13], abs=0.01)
    assert scores["frames_copy"] == pytest.approx([148.13, 7.96], abs=0.01)
    assert scores["psnr_copy"] == pytest.approx(10.97, abs=0.01)


def test_error_maps_are_black_where_nothing_is_wrong():
    truth = np.zeros((1, 2, 2, 3), np.uint8)
    made = truth.copy()
    made[0, 0, 0] = 30, 0, 0
    made[0, 1, 1] = 255
    assert error_map(made, truth)[0, :, :, 0].tolist() == [[20, 0], [0, 255]]


def test_psnr_by_hand():
    truth = torch.zeros(2, 1, 2, 2, 3, dtype=torch.uint8)
    video = truth.clone()
    video[0, 0, 0, 0, 0] = 255  # MSE 255^2 / 12
    video[1] = 51  # MSE 51^2
    assert psnr(video, truth).tolist() == pytest.approx([10.79181, 13.97940], abs=1e-4)


@pytest.mark.parametrize("name", ["clips", "dmlab_5.npz"])
def test_demo_reads_the_real_clips(shared_data, name):
    windows = read_windows(shared_data / name, FRAMES, 16, 16, 1)
    assert len(windows) == (4 if name == "clips" else 1)
    assert windows.num_actions == (0 if name == "clips" else 3)
    assert len(windows.test_windows(8)) == 8
