"""`mimo eval`: its numbers, what an interruption and other processes leave the same, and what it refuses."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mimo.cli import main
from mimo.data import ShapesDataset, VideoReader, write_video
from mimo.evaluation import subjects
from mimo.evaluation.features import DCTFeatures
from mimo.evaluation.metrics import bootstrap_interval, frechet_from_features, psnr
from mimo.evaluation.protocols import PROTOCOLS, Protocol
from mimo.sampling.loading import load
from mimo.sampling.sampler import Sampler
from mimo.sampling.videos import generate

from .. import processes

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    "--model.depth 1 --model.dim 16 --model.heads 2 --model.decoder-depth 1 --model.decoder-layer 1 --model.frames 3 "
    "--model.height 2 --model.width 2 --model.channels 12 --model.compression 1 8 8 --model.video-frames 3 "
    "--train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 --train.preview-every 0 "
    "--sample.steps 2 --sample.context-frames 1 --sample.num-frames 3"
).split()
FEW = "--clips 9 --batch-size 4".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        words = ["train", "--preset", "mimo-tiny", "--data", "shapes", "--out", str(folder / f"run{seed}"), *TINY]
        assert main([*words, "--steps", "1", "--train.seed", str(seed)]) == 0
    return folder


def evaluate(out, *words, data="shapes", few=FEW):
    return main(["eval", "--data", str(data), "--out", str(out), *few, *map(str, words)])


@pytest.fixture(scope="module")
def both(runs, tmp_path_factory):
    """The evaluation of two checkpoints, finished at once."""
    out = tmp_path_factory.mktemp("both") / "out"
    assert evaluate(out, "--checkpoints", runs / "run0", runs / "run1") == 0
    return out


def rows(out, score=None, videos=None):
    found = json.loads((out / "table.json").read_text())["rows"]
    return [row for row in found if score in (None, row["score"]) and (videos is None or videos in row["videos"])]


def results(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def truth(clips=9) -> torch.Tensor:
    dataset = ShapesDataset(num_frames=3, height=16, width=16)
    return torch.stack([torch.from_numpy(dataset.sample(index, 0)["video"]) for index in range(clips)])


def test_two_checkpoints(runs, both, capsys):
    """Every set has every score, of so many clips at that size, with an interval around it."""
    assert set(results(both)) == {
        *(f"{name}.{kind}" for name in ("table", "curves") for kind in ("json", "csv", "md")),
        "curves.png",
        "sheet.png",
    }
    sets = [str(runs / "run0"), str(runs / "run1"), "dct reconstruction", "last given frame"]
    found = rows(both)
    assert [(row["videos"], row["score"]) for row in found] == [
        (label, score) for label in sets for score in ("PSNR", "SSIM", "FD(DCT)", "FD(random)")
    ]
    for row in found:
        assert row["low"] < row["value"] < row["high"] and row["n"] == 9 and row["pixels"] == "16 x 16"
        alone = row["score"] in ("PSNR", "SSIM")
        assert row["frames"] == ("2-3" if alone else "1-3")
        assert row["compared with"] == ("its own clip" if alone else "9 real clips")
    with (both / "table.csv").open(newline="") as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [row["value"] for row in found]
    assert (both / "table.md").read_text().count("\n| ") == len(found) + 1


def test_its_numbers_are_those_of_the_videos(runs, both):
    """Computed again from clips, without a cache and in another batch."""
    real = truth()
    held = real[:, :1].expand(-1, 2, -1, -1, -1)
    values = psnr(held, real[:, 1:]).mean(1)
    (row,) = rows(both, "PSNR", "last given frame")
    assert row["value"] == pytest.approx(float(values.mean()))
    assert (row["low"], row["high"]) == pytest.approx(bootstrap_interval(values))
    curve = json.loads((both / "curves.json").read_text())["rows"]
    frames = [r["value"] for r in curve if r["videos"] == "last given frame" and r["score"] == "PSNR"]
    assert frames == pytest.approx(psnr(held, real[:, 1:]).mean(0).tolist())
    loaded = load(runs / "run0")
    options = {"tokenizer": loaded.tokenizer, "context": real, "ids": range(9), "seed": 0}
    made = generate(Sampler(loaded.model, loaded.sample_config), **options)
    features = DCTFeatures()
    (row,) = rows(both, "FD(DCT)", "run0")
    assert row["value"] == pytest.approx(frechet_from_features(features(real), features(made)), rel=1e-3)
    (row,) = rows(both, "PSNR", "run0")
    assert row["value"] == pytest.approx(float(psnr(made[:, 1:], real[:, 1:]).mean()), rel=1e-4)


class Stopped(Exception):
    pass


def test_an_interrupted_evaluation_goes_on(runs, both, tmp_path, monkeypatch):
    """Nothing that was finished is made again, a damaged file is, and the table is the same."""
    made, real_generate = [], subjects.generate

    def counted(*args, **options):
        if len(made) == 4:
            raise Stopped
        made.append(tuple(options["ids"]))
        return real_generate(*args, **options)

    words = "--checkpoints", runs / "run0", runs / "run1"
    monkeypatch.setattr(subjects, "generate", counted)
    with pytest.raises(Stopped):
        evaluate(tmp_path, *words)
    assert made == [(0, 1, 2, 3), (4, 5, 6, 7), (8,), (0, 1, 2, 3)] and not (tmp_path / "table.json").exists()
    videos = sorted(tmp_path.glob("cache/made-*/videos-00000.npz"))
    assert len(videos) == 2
    videos[0].write_bytes(videos[0].read_bytes()[:-50])  # the next reader makes it anew
    for file in videos[0].parent.glob("psnr-*-00000.npz"):
        file.unlink()
    made[:] = [()]
    assert evaluate(tmp_path, *words) == 0
    assert sorted(made[1:]) == [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]
    assert results(tmp_path) == results(both)
    # More of the same: other clips are made, those that were there are not.
    made[:] = [()]
    assert evaluate(tmp_path, "--checkpoints", runs / "run0", few=["--clips", "12", "--batch-size", "4"]) == 0
    assert made[1:] == [(8, 9, 10, 11)]


def test_two_processes_make_the_table_of_one(runs, both, tmp_path):
    words = ["eval", "--data", "shapes", "--out", tmp_path, *FEW, "--checkpoints", runs / "run0", runs / "run1"]
    ended = processes.finish(processes.start_ranks(2, [sys.executable, "-m", "mimo", *words]))
    assert [status for status, *_ in ended] == [0, 0], ended
    assert results(tmp_path) == results(both)


def test_the_best_of_several_counts_for_each_score_by_itself(runs, tmp_path):
    words = "--checkpoints", runs / "run0", "--trajectories", "3"
    assert evaluate(tmp_path, *words) == 0
    (file,) = tmp_path.glob("cache/made-*/psnr-*-00001.npz")
    with np.load(file) as arrays:
        values = arrays["values"]
    assert values.shape == (4, 3, 2) and len(np.unique(values)) == values.size  # noise of its own, each
    parts = []
    for part in sorted(tmp_path.glob("cache/made-*/psnr-*.npz")):
        with np.load(part) as arrays:
            parts.append(arrays["values"].mean(2))
    every = np.concatenate(parts)
    best, mean = rows(tmp_path, "PSNR", "run0")
    assert (best["over"], mean["over"]) == ("best of 3", "mean of 3")
    assert best["value"] == pytest.approx(every.max(1).mean()) and mean["value"] == pytest.approx(every.mean())
    (distance,) = rows(tmp_path, "FD(DCT)", "run0")
    features = []
    for part in sorted(tmp_path.glob("cache/made-*/dct-*.npz")):
        with np.load(part) as arrays:
            features.append(torch.from_numpy(arrays["values"]))
    real = DCTFeatures()(truth())
    each = [frechet_from_features(real, torch.cat(features)[:, k]) for k in range(3)]
    assert distance["over"] == "mean of 3" and distance["value"] == pytest.approx(np.mean(each))


class Lit(nn.Module):
    """A judge in the layout of I3D: the mean colours."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x.mean([2, 3, 4])


@pytest.mark.filterwarnings("ignore:.torch.jit:Warning")
def test_protocols_with_judges_and_a_size(runs, tmp_path, monkeypatch):
    torch.jit.script(Lit()).save(str(tmp_path / "i3d.pt"))
    like = Protocol(source="a test", scores=("fvd",), clips=9, context_frames=1, frames=3, scored=2, size=8)
    monkeypatch.setitem(PROTOCOLS, "kinetics600", like)
    words = "--protocol", "kinetics600", "--i3d", tmp_path / "i3d.pt", "--checkpoints", runs / "run0"
    assert evaluate(tmp_path / "out", *words, few=[]) == 0
    (row,) = rows(tmp_path / "out", "FVD", "last given")
    real = truth()[:, :2].float().div(127.5).sub(1)
    small = (
        torch.nn.functional.interpolate(real.flatten(0, 1).movedim(-1, 1), (8, 8), mode="bilinear", antialias=True)
        .movedim(1, -1)
        .unflatten(0, (9, 2))
    )
    held = small[:, :1].expand_as(small)
    expected = frechet_from_features(small.mean((1, 2, 3)), held.mean((1, 2, 3)))
    assert row["value"] == pytest.approx(expected, rel=0.1) and (row["frames"], row["pixels"]) == ("1-2", "8 x 8")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A dataset of files with classes, one of them damaged, and a network that is told them and nothing else."""
    folder = tmp_path_factory.mktemp("classes")
    clips = truth(10).repeat_interleave(2, 1).numpy()
    for number, clip in enumerate(clips):
        (folder / f"data/{number % 2}").mkdir(parents=True, exist_ok=True)
        write_video(folder / f"data/{number % 2}/clip{number}.mp4", clip)
    (folder / "data/1/broken.mp4").write_bytes(b"no video")
    words = ["train", "--preset", "mimo-tiny", "--data", str(folder / "data"), "--folder-labels"]
    words += ["--model.num-classes", "2", "--out", str(folder / "run"), *TINY, "--sample.context-frames", "0"]
    assert main([*words, "--steps", "1"]) == 0
    return folder


def test_videos_from_classes_have_no_clip_of_their_own(classes, tmp_path, capsys, caplog):
    words = "--checkpoints", classes / "run", "--folder-labels"
    assert evaluate(tmp_path, *words, data=classes / "data", few=["--clips", "11"]) == 0
    assert {row["score"] for row in rows(tmp_path)} == {"FD(DCT)", "FD(random)"}
    assert {row["n"] for row in rows(tmp_path)} == {10} and caplog.text.count("broken.mp4") == 1
    assert not (tmp_path / "curves.json").exists()
    capsys.readouterr()
    assert evaluate(tmp_path, *words, "--scores", "psnr", data=classes / "data", few=["--clips", "10"]) == 2
    words = "--checkpoints", classes / "run"
    assert evaluate(tmp_path, *words, data=classes / "data", few=["--clips", "10"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "the score psnr compares a video with its own clip: expected --context-frames" in said[0]
    assert said[1].endswith("run is told classes, and the clips of --data have none") and len(said) == 2


def test_folders_of_videos(classes, runs, tmp_path, capsys):
    """By the clips' names each is compared with its clip; by other names the sets are."""
    data = tmp_path / "data"
    shutil.copytree(classes / "data", data)
    (data / "1/broken.mp4").rename(data / "1/clip11.mp4")  # a clip that has a pair and cannot be read
    for number in range(10):
        with VideoReader(data / f"{number % 2}/clip{number}.mp4") as reader:
            clip = reader.read(reader.num_frames)
        np.savez(tmp_path / f"clip{number}.npz", video=clip)
    for name in ("same", "others"):
        (tmp_path / name).mkdir()
    for number in range(10):
        shutil.copy(tmp_path / f"clip{number}.npz", tmp_path / f"same/clip{number}.npz")
        shutil.copy(tmp_path / f"clip{number}.npz", tmp_path / f"others/{number}.npz")
    few = ["--clips", "11", "--context-frames", "1"]
    shutil.copy(tmp_path / "same/clip0.npz", tmp_path / "same/clip11.npz")
    folders = "--videos", tmp_path / "same", tmp_path / "others"
    assert evaluate(tmp_path / "out", *folders, data=data, few=few) == 0
    (equal,) = rows(tmp_path / "out", "PSNR", "same")
    assert equal["value"] == 100 and equal["low"] == equal["high"] == 100
    assert not rows(tmp_path / "out", "PSNR", "others")
    for distance in rows(tmp_path / "out", "FD(DCT)", "same") + rows(tmp_path / "out", "FD(DCT)", "others"):
        assert distance["value"] == pytest.approx(0, abs=1e-6) and distance["n"] == 10
    capsys.readouterr()
    np.savez(tmp_path / "others/x.npz", video=np.zeros((6, 16, 18, 3), np.uint8))
    assert evaluate(tmp_path / "out", *folders, data=data, few=few) == 2
    np.savez(tmp_path / "others/x.npz", video=np.zeros((2, 16, 16, 3), np.uint8))
    assert evaluate(tmp_path / "out", *folders, data=data, few=few) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("others/x.npz: is 16 x 18, expected 16 x 16, as the others") and len(said) == 2
    assert said[1].endswith("others/x.npz: has 2 frames, expected at least 6")


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    one, other = runs / "run0", tmp_path / "other"
    words = [*TINY, "--model.height", "3"]
    assert (
        main(["train", "--preset", "mimo-tiny", "--data", "shapes", "--out", str(other), *words, "--steps", "1"]) == 0
    )
    capsys.readouterr()
    for words, message in (
        ([], "nothing to measure: expected --checkpoints or --videos"),
        (["--checkpoints", one, "--clips", 7], "--clips 7: expected at least 8, for FD(DCT), which compares sets"),
        (["--checkpoints", one, "--clips", 10_001], "--clips 10001: --data holds 10000 clips"),
        (["--checkpoints", one, "--clips", 0], "--clips 0: expected at least 1"),
        (["--checkpoints", one, other], "16 x 16, interval 1), expected one shape"),
        (["--checkpoints", one, one], "run0 is named twice, expected each once"),
        (["--checkpoints", one, "--scores", "fvd"], "the score fvd needs --i3d: i3d_torchscript.pt"),
        (["--checkpoints", one, "--scores", "lpips", "--alexnet", "none"], "none: No such file"),
        (
            ["--checkpoints", one, "--protocol", "best"],
            "unknown protocol 'best': expected one of relative, kinetics600",
        ),
        (["--checkpoints", one, "--context-frames", 3], "--context-frames 3: expected fewer than the 3 frames"),
        (["--checkpoints", one, "--trajectories", 0], "--trajectories 0: expected at least 1"),
        (["--checkpoints", one, "--size", 8], "ssim: frames of 8 x 8: expected at least 11 x 11, its window"),
        (["--checkpoints", one, "--steps", 0], "--steps 0: expected"),
        (["--checkpoints", tmp_path / "none"], "none does not exist"),
        (["--videos", tmp_path / "none"], "no such file or folder"),
    ):
        status = evaluate(tmp_path / "out", *words)
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("eval: ")]
        assert status == 2 and len(said) == 1 and message in said[0], (words, said)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_say_what_they_are_of(name):
    protocol = PROTOCOLS[name]
    assert protocol.source and (protocol.scored or 0) <= (protocol.frames or 10**9)
    if protocol.context_frames and protocol.frames:
        assert protocol.context_frames < (protocol.scored or protocol.frames)


def test_a_folder_with_too_few_videos_says_how_many(tmp_path, capsys):
    """Its sets are compared as they are; nothing else would have said so before."""
    (tmp_path / "few").mkdir()
    for number in range(5):
        np.savez(tmp_path / f"few/{number}.npz", video=truth(1)[0].numpy())
    assert evaluate(tmp_path / "out", "--videos", tmp_path / "few", few=["--clips", "8"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("few: FD(DCT) of 5 videos and 5 clips says nothing, expected at least 8 (--clips)")
