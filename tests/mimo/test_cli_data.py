"""The command line's data and tokenizers: presets on the papers' layouts, shards, weights, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mimo.cli import main
from mimo.config import MiMoConfig
from mimo.data import LatentShards, NpzTrajectories, VideoFolder, VideoReader, write_video
from mimo.diffusion import FlowSchedule, VPredictionSchedule
from mimo.tokenizers.dcae import DCAETokenizer, far_config
from mimo.tokenizers.videovae import VideoVAE, VideoVAEConfig, VideoVAETokenizer

from .. import processes

pytestmark = pytest.mark.usefixtures("one_thread")

# Width and depth of a network that takes no time; what the presets say of data, tokenizer, schedule and loss stays.
NARROW = (
    "--model.depth 1 --model.dim 16 --model.heads 2 --model.decoder-depth 1 --model.decoder-layer 1 --model.height 2 "
    "--model.width 2 --train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 --sample.steps 2 "
    "--steps 2"
).split()
TINY = [*NARROW, *"--model.frames 3 --model.video-frames 3 --sample.context-frames 1 --sample.num-frames 3".split()]


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with status 2 and one line on stderr, and returns that line."""

    def refused(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and errors.count("\n") == 1, errors
        return errors

    return refused


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that commands start, newest last."""
    from mimo.training.trainer import Trainer

    started, start = [], Trainer.start_data
    monkeypatch.setattr(Trainer, "start_data", lambda self: (started.append(self), start(self))[1])
    return started


def done(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def frames(count, size=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# Weights of the released layouts, drawn at random
# -----------------------------------------------------------------------


def small_dcae(factor, channels=32, seed=0):
    autoencoder = pytest.importorskip("diffusers").AutoencoderDC
    config = far_config(factor, channels=channels, width=8)
    one = tuple(min(1, count) for count in config["encoder_layers_per_block"])
    torch.manual_seed(seed)
    return DCAETokenizer(
        autoencoder(**config | {"encoder_layers_per_block": one, "decoder_layers_per_block": one}), scale=0.5
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders of tokenizer weights by name: "videovae", "dcae32", "dcae16"."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vae = VideoVAEConfig.kinetics600(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)
    VideoVAETokenizer(VideoVAE(vae)).save(folder / "videovae")
    for factor in (16, 32):
        small_dcae(factor).save(folder / f"dcae{factor}")
    return {path.name: path for path in folder.iterdir()}


# The papers' folders
# ----------------------------------------------------------------------------------------------------


def kinetics600(folder):
    """train/CLASS/*.mp4 and val/CLASS/*.mp4."""
    for split in ("train", "val"):
        for number in range(2):
            write_video(folder / split / f"class {number}" / f"{number}.mp4", frames(20, seed=number))
    return folder


def ucf101(folder):
    """FAR's annotation beside the videos: one long enough for interval 3, one not."""
    for name, count in (("a", 48), ("b", 20)):
        write_video(folder / "UCF-101" / f"{name}.avi", frames(count, 72))
    entries = [{"video_path": "UCF-101/a.avi", "label": 0}, {"video_path": "UCF-101/b.avi", "label": 100}]
    (folder / "train.json").write_text(json.dumps(entries))
    return folder / "train.json"


def minecraft(folder):
    """TECO's videos of 300 frames, each with its actions in an npz beside it."""
    for number in range(2):
        write_video(folder / "train" / f"{number}.mp4", frames(301, 32, seed=number))
        np.savez(folder / "train" / f"{number}.npz", actions=np.arange(301) % 4)
    return folder


PRESETS = {
    "mimo-b-k600": (kinetics600, "kinetics600", "videovae", VideoVAETokenizer, VPredictionSchedule),
    "mimo-xl-k600": (kinetics600, "kinetics600", "videovae", VideoVAETokenizer, VPredictionSchedule),
    "mimo-xl-ucf101": (ucf101, "ucf101", "dcae32", DCAETokenizer, FlowSchedule),
    "mimo-xl-ucf101-uncond": (ucf101, "ucf101", "dcae32", DCAETokenizer, FlowSchedule),
    "mimo-b-minecraft": (minecraft, "minecraft", "dcae16", DCAETokenizer, FlowSchedule),
    "acdit-b-k600": (kinetics600, "kinetics600", "videovae", VideoVAETokenizer, VPredictionSchedule),
    "dfot-b-k600": (kinetics600, "kinetics600", "videovae", VideoVAETokenizer, VPredictionSchedule),
    "far-b-k600": (kinetics600, "kinetics600", "videovae", VideoVAETokenizer, VPredictionSchedule),
    "far-xl-ucf101": (ucf101, "ucf101", "dcae32", DCAETokenizer, FlowSchedule),
    "far-b-minecraft": (minecraft, "minecraft", "dcae16", DCAETokenizer, FlowSchedule),
    "video-dit-b-ucf101-uncond": (ucf101, "ucf101", "dcae32", DCAETokenizer, FlowSchedule),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_starts_on_its_data(preset, tmp_path, weights, trainers):
    make, layout, tokenizer, kind, schedule = PRESETS[preset]
    data, out = make(tmp_path / "data"), tmp_path / "run"
    more = ["--split", "train"] if layout == "minecraft" else []
    if preset.endswith("uncond"):
        more.append("--ignore-labels")
    if MiMoConfig.from_preset(preset).rope_split:  # of heads that are narrower here
        more += ["--model.rope-split", "2", "2", "4"]
    done(
        *["train", "--preset", preset, "--data", data, "--layout", layout, *more, "--out", out, *NARROW],
        *["--model.tokenizer", tokenizer.rstrip("0123456789"), "--tokenizer-weights", weights[tokenizer]],
        *["--train.preview-every", 2],
    )
    (trainer,) = trainers
    config, dataset = trainer.model_config, trainer.dataset
    assert type(trainer.tokenizer) is kind and type(trainer.recipe.schedule) is schedule
    assert type(dataset) is VideoFolder and len(dataset) == 2
    sample = dataset.sample(0, 0)
    assert sample["video"].shape == (*config.video_shape, 3)
    record = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 2 and 0 < record["diffusion"] < 100
    assert config.recipe == preset.split("-b-")[0].split("-xl-")[0].replace("-", "_")
    assert 0 < record["mask"] < 100 if config.recipe == "mimo" else record["mask"] == 0
    if layout == "kinetics600":
        assert (config.frames, config.video_frames, config.min_snr_decay) == (5, 17, 0.96) and set(sample) == {"video"}
        assert all("/train/" in dataset.name(index) for index in range(2))
    if layout == "ucf101":
        assert dataset.interval == (3, 3) and dataset.flip and dataset.random_crop
        assert config.num_classes == (0 if preset.endswith("uncond") else 101) and sample["label"] == 0
    if layout == "minecraft":
        assert config.num_actions == 4 and sample["actions"].shape == (300,)
    with VideoReader(out / "previews" / "step_00000002.mp4") as preview:
        assert preview.num_frames == config.video_frames
    full = MiMoConfig.from_preset(preset)
    assert trainer.tokenizer.latent_shape(*full.video_shape) == full.latent_shape
    if layout != "minecraft":  # which is sampled with actions, as its preview was
        given = {"kinetics600": ["--context", dataset.name(0)], "ucf101": ["--class", 5] if config.num_classes else []}
        done("sample", "--checkpoint", out, "--out", tmp_path / "samples", *given[layout])
        with VideoReader(tmp_path / "samples" / "sample.mp4") as result:
            assert result.num_frames == config.video_frames
    recorded = json.loads((out / "checkpoints" / "step_00000002" / "state.json").read_text())["configs"]["tokenizer"]
    assert recorded["weights"] == str(weights[tokenizer]) and len(recorded["sha256"]) == 64


def test_dmlab_and_bair_layouts_train_too(tmp_path, trainers):
    np.savez(tmp_path / "0.npz", video=frames(8), actions=np.arange(8) % 3)
    actions = ["--model.num-actions", 3]
    run = ["train", "--preset", "mimo-tiny", "--data", tmp_path, *TINY, "--train.preview-every", 0]
    done(*run, "--layout", "dmlab", "--out", tmp_path / "dmlab", *actions)
    write_video(tmp_path / "bair" / "0.mp4", frames(8))
    np.savez(tmp_path / "bair" / "0.npz", actions=np.zeros((8, 4), np.float32))
    done(*run, "--layout", "bair", "--data", tmp_path / "bair", "--out", tmp_path / "bair-run")
    assert type(trainers[0].dataset) is NpzTrajectories and trainers[0].dataset.num_actions == 3
    assert not trainers[1].dataset.use_actions


def test_far_long_trains_on_dmlab_and_goes_on_from_a_clip_of_it(tmp_path, trainers, refused):
    """FAR's data for long video: npz trajectories with actions. The clip that is continued brings its own."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for number in range(2):
        np.savez(data / f"{number}.npz", video=frames(12, seed=number), actions=np.arange(12) % 4)
    small = ["--model.num-actions", 4, "--model.coarse-stride", 2, "--model.fine-frames", 2]
    done(
        *["train", "--preset", "far-long-tiny", "--data", data, "--layout", "dmlab", "--out", run, *TINY, *small],
        *["--train.preview-every", 0],
    )
    assert type(trainers[0].dataset) is NpzTrajectories and trainers[0].model_config.recipe == "far_long"
    record = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 2 and 0 < record["diffusion"] < 100
    sample = ["sample", "--checkpoint", run, "--context", data / "0.npz", "--context-frames", 4, "--frames", 9]
    done(*sample, "--class-guidance", 1.5, "--out", tmp_path / "samples")
    with VideoReader(tmp_path / "samples" / "sample.mp4") as result:
        assert result.num_frames == 9
    message = "window=3, sink=0: expected none, as 'far_long' keeps the latest 2 frames whole"
    assert message in refused(*sample, "--window", 3, "--out", tmp_path / "refused")


# Tokenizer weights
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        write_video(folder / f"{number}.mp4", frames(8, 32, seed=number))
    return folder


DCAE = "--model.tokenizer dcae --model.compression 1 16 16 --model.channels 32".split()


def train(data, out, *more):
    run = ["train", "--preset", "mimo-tiny", "--data", data, "--out", out, *TINY, "--train.preview-every", 0]
    return [str(word) for word in [*run, *more]]


def test_a_checkpoint_remembers_its_tokenizer(tmp_path, weights, videos, refused):
    own = shutil.copytree(weights["dcae16"], tmp_path / "tokenizer")
    run, there = tmp_path / "run", ["--tokenizer-weights", own]
    done(*train(videos, run, *DCAE, *there))
    sample = ["sample", "--checkpoint", run, "--out", tmp_path / "out", "--context", videos / "0.mp4", "--frames", 4]
    sample += ["--overwrite"]
    done(*sample)
    first = (tmp_path / "out" / "sample.gif").read_bytes()

    moved = own.rename(tmp_path / "moved")
    message = refused(*sample)
    assert "which --tokenizer-weights can name anew" in message and str(own) in message
    done(*sample, "--tokenizer-weights", moved)
    assert (tmp_path / "out" / "sample.gif").read_bytes() == first

    small_dcae(16, seed=1).save(tmp_path / "other")
    other = ["--tokenizer-weights", tmp_path / "other"]
    assert "is not the tokenizer it was trained with" in refused(*sample, *other)
    done(*train(videos, run, *DCAE, "--tokenizer-weights", moved, "--steps", 3, "--resume"))
    assert "tokenizer is " in refused(*train(videos, run, *DCAE, *other, "--steps", 4, "--resume"))


def test_refused_tokenizer_weights(tmp_path, weights, videos, refused):
    out = tmp_path / "run"
    assert "needs weights (--tokenizer-weights)" in refused(*train(videos, out, *DCAE))
    gone = ["--tokenizer-weights", tmp_path / "gone.pth"]
    assert "gone.pth: No such file" in refused(*train(videos, out, *DCAE, *gone))
    assert "'dct' has no weights" in refused(*train(videos, out, *gone))
    wrong = ["--tokenizer-weights", weights["dcae32"]]
    assert "compresses (1, 32, 32)" in refused(*train(videos, out, *DCAE, *wrong))
    pickled = tmp_path / "vae.ckpt"
    torch.save({"model_cfg": {}, "state_dict": {}, "trainer": Path("x")}, pickled)
    vae = "--model.tokenizer videovae --model.compression 4 8 8 --model.channels 16".split()
    message = refused(*train(videos, out, *vae, "--tokenizer-weights", pickled))
    assert "pickled objects" in message and "--trust-pickle" in message
    message = refused(*train(videos, out, *vae, "--tokenizer-weights", pickled, "--trust-pickle"))
    assert "pickled objects" not in message and "vae.ckpt" in message  # read, and found to hold no weights
    assert not out.exists()


# mimo encode
# ------------------------------------------------------------------------------------------------------------


def encode(data, out, *more):
    shape = "--model.height 2 --model.width 2 --model.frames 3 --model.video-frames 3 --workers 0".split()
    return [str(word) for word in ["encode", "--preset", "mimo-tiny", "--data", data, "--out", out, *shape, *more]]


@pytest.mark.parametrize("tokenizer", ["dct", "dcae"])
def test_training_from_shards_is_training_from_videos(tmp_path, weights, videos, trainers, capsys, tokenizer):
    """One file per clip and frames that all start at 0: then both see the same clips."""
    more = [*DCAE, "--tokenizer-weights", weights["dcae16"]] if tokenizer == "dcae" else []
    more += ["--device", "cpu"]  # where the same sums come out the same
    short = tmp_path / "short"
    for number in range(3):
        write_video(short / f"{number}.mp4", frames(3, 32, seed=number))
    done(*encode(short, tmp_path / "shards", *more, "--dtype", "fp32", "--shard-clips", 2))
    assert "LatentShards" in capsys.readouterr().out
    done(*train(tmp_path / "shards", tmp_path / "a", *more, "--train.preview-every", 2))
    done(*train(short, tmp_path / "b", *more, "--train.preview-every", 2))
    a, b = trainers
    assert type(a.dataset) is LatentShards and len(a.dataset.index.shards) == 2
    for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    records = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1]) for run in "ab"]
    for part in ("diffusion", "mask", "grad_norm"):
        assert records[0][part] == pytest.approx(records[1][part], rel=1e-4)
    for run in "ab":
        with VideoReader(tmp_path / run / "previews" / "step_00000002.mp4") as preview:
            assert preview.num_frames == 3


def test_encoding_is_shared_and_continued(tmp_path, videos, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "shards"
    for rank, text in ((0, "process 0 of 2 has written its part"), (1, "wrote and verified LatentShards")):
        monkeypatch.setenv("RANK", str(rank))
        done(*encode(videos, out, "--shard-clips", 2))
        assert text in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    for rank in (0, 1):  # both find all of it done
        monkeypatch.setenv("RANK", str(rank))
        done(*encode(videos, out, "--shard-clips", 2))
        assert capsys.readouterr().out.count("\n") == (rank == 0)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before and len(before) == 2


def test_refused_encodings(tmp_path, videos, refused):
    out = tmp_path / "shards"
    assert "--preset is missing" in refused("encode", "--data", videos, "--out", out)
    assert "invalid choice 'int8' for argument '--dtype'" in refused(*encode(videos, out, "--dtype", "int8"))
    assert "none: no such file" in refused(*encode(tmp_path / "none", out))
    message = refused(*encode(videos, out, "--model.channels", 5, "--model.frames", 4))
    assert "frames=4: expected 3, as the tokenizer 'dct' makes of clips of video_frames=3" in message
    assert "unknown layout 'imagenet'" in refused(*encode(videos, out, "--layout", "imagenet"))
    assert "--split says how files are read" in refused(*encode("shapes", out, "--split", "train"))
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is no folder" in refused(*encode(videos, tmp_path / "file" / "shards"))
    done(*encode(videos, out))
    assert "another --out" in refused(*encode(videos, out, "--seed", 1))
    assert "holds latents, expected videos" in refused(*encode(out, tmp_path / "again"))


def test_refused_shards(tmp_path, weights, videos, refused):
    shards, run = tmp_path / "shards", tmp_path / "run"
    done(*encode(videos, shards, "--model.channels", 12))
    assert "latent_shape [3, 2, 2, 12], training has [3, 2, 2, 24]" in refused(*train(shards, run))
    more = ["--model.channels", 12]
    assert "interval [1, 1], training has [2, 2]" in refused(*train(shards, run, *more, "--train.interval", 2))
    assert "flip False, training has True" in refused(*train(shards, run, *more, "--train.flip"))
    assert "--layout says how files are read" in refused(*train(shards, run, *more, "--layout", "bair"))
    assert "the clips have no label" in refused(*train(shards, tmp_path / "labels", *more, "--model.num-classes", 3))
    wide = ["--model.width", 4]
    assert "holds clips of 3 x 16 x 16, expected 3 x 16 x 32" in refused(*train(shards, run, *more, *wide))

    there = [*DCAE, "--tokenizer-weights", weights["dcae16"]]
    done(*encode(videos, tmp_path / "dcae", *there))
    small_dcae(16, seed=1).save(tmp_path / "other")
    other = [*DCAE, "--tokenizer-weights", tmp_path / "other"]
    assert "was encoded with tokenizer_sha256" in refused(*train(tmp_path / "dcae", run, *other))

    (shards / "index.json").unlink()
    assert "encoding is not finished" in refused(*train(shards, run, *more))
    assert not run.exists()


def test_labels_beyond_the_network_are_refused(tmp_path, refused):
    for name in ("a", "b", "c"):
        write_video(tmp_path / "videos" / name / "0.mp4", frames(4))
    done(*encode(tmp_path / "videos", tmp_path / "shards", "--folder-labels"))
    message = refused(*train(tmp_path / "shards", tmp_path / "run", "--model.num-classes", 1))
    assert "shard-00000.safetensors: clip 1 has label 1, expected 0..0" in message
    done(*train(tmp_path / "shards", tmp_path / "run2", "--model.num-classes", 3))


# mimo data check
# --------------------------------------------------------------------------------------------------------


def test_data_check(tmp_path, videos, refused, capsys):
    folder = shutil.copytree(videos, tmp_path / "videos")
    (folder / "broken.mp4").write_bytes(b"this is no video")
    done("data", "check", folder, "--num-frames", 9)
    text = capsys.readouterr().out
    assert f"{folder}: 4 videos, 3 readable, 1 not" in text and "3 have fewer than 9 frames" in text
    assert "32x32 (3)" in text and f"unreadable  {folder / 'broken.mp4'}" in text

    done(*encode(videos, tmp_path / "shards"))
    capsys.readouterr()
    done("data", "check", tmp_path / "shards")
    assert "3 clips of latents 3 x 2 x 2 x 24 (dct), 3 readable" in capsys.readouterr().out

    assert "no such file or folder" in refused("data", "check", tmp_path / "none")
    assert "has no split 'val'" in refused("data", "check", folder, "--split", "val")
    assert "--num-frames -1: expected 0 or more" in refused("data", "check", folder, "--num-frames", -1)
    assert "PATH" in refused("data", "check")
    assert "unknown command" in refused("data", "count")
    done("data", "check", videos, "--strict")
    assert "of its 4 clips 1 are unreadable, 0 damaged and 0 too short" in refused("data", "check", folder, "--strict")
    entries = [{"video_path": str(videos / "0.mp4")}]
    (folder / "list.json").write_text(json.dumps(entries))
    assert "--allow-outside" in refused("data", "check", folder / "list.json")
    done("data", "check", folder / "list.json", "--allow-outside")
    assert "--allow-outside" in refused(*train(folder / "list.json", tmp_path / "run"))
    drawn = refused(*train(videos, tmp_path / "run", "--train.posterior", "sample"))
    assert "posterior='sample': expected 'mean', as the tokenizer 'dct' gives no distribution" in drawn
    assert "--frame-memory -1" in refused(*train(videos, tmp_path / "run", "--frame-memory", -1))
    done(*train(folder / "list.json", tmp_path / "run", "--allow-outside", "--frame-memory", 1))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"this is no video")
    assert "none of its 1 clips can be read" in refused("data", "check", tmp_path / "bad")


def test_data_check_ends_quietly_when_nobody_reads_on(videos):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mimo", "data", "check", str(videos)]
    done = processes.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# mimo train-tokenizer
# ---------------------------------------------------------------------------------------------------


def test_train_tokenizer(tmp_path, videos, refused, capsys):
    pytest.importorskip("diffusers")
    small = "--compression 16 --channels 4 --width 8 --frames 2 --batch-size 2 --precision fp32 --workers 0".split()
    run = ["train-tokenizer", "--data", videos, "--out", tmp_path / "run", *small, "--steps", 2]
    assert "--size is missing" in refused(*run)
    assert "expected sides that compression 16 divides" in refused(*run, "--size", 20, 32)
    assert "--steps 0: expected more than zero" in refused(*run, "--size", 32, 32, "--steps", 0)
    assert not (tmp_path / "run").exists()
    done(*run, "--size", 32, 32)
    assert f"wrote {tmp_path / 'run' / 'tokenizer'}" in capsys.readouterr().out
    assert "already holds checkpoints" in refused(*run, "--size", 32, 32)
    done(*run, "--size", 32, 32, "--steps", 3, "--resume")
    trained = ["--model.tokenizer", "dcae", "--model.compression", 1, 16, 16, "--model.channels", 4]
    done(*train(videos, tmp_path / "model", *trained, "--tokenizer-weights", tmp_path / "run" / "tokenizer"))


@pytest.mark.parametrize("words", [["encode"], ["data", "check"], ["train-tokenizer"]])
def test_new_commands_explain_themselves(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0 and "--split" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert f"  {' '.join(words)}" in capsys.readouterr().out
