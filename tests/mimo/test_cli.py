"""The command line: every bad input is one line and status 2; overrides arrive; the same seed gives the same video."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mimo import checkpoint
from mimo.cli import main, parse
from mimo.data import VideoReader, write_video
from mimo.records import sealed
from mimo.sampling.loading import load

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    "--model.depth 1 --model.dim 16 --model.heads 2 --model.decoder-depth 1 --model.decoder-layer 1 --model.frames 3 "
    "--model.height 2 --model.width 2 --model.channels 12 --model.compression 1 2 2 --model.video-frames 3 "
    "--train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 --train.preview-every 0 "
    "--sample.steps 2 --sample.context-frames 1 --sample.num-frames 3"
).split()


def train(out, *more, data="shapes"):
    return main(
        ["train", "--preset", "mimo-tiny", "--data", str(data), "--out", str(out), *TINY, "--steps", "2", *more]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture
def own_run(run, tmp_path):
    return shutil.copytree(run, tmp_path / "own")


@pytest.fixture
def clip(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
    return write_video(tmp_path / "clip.mp4", frames)


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with status 2 and one line on stderr, and returns that line."""

    def refused(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
        return errors

    return refused


def train_arguments(out, data="shapes"):
    return ["train", "--preset", "mimo-tiny", "--data", data, "--out", out, *TINY, "--steps", 2]


# Help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_may_be_cut_short(words):
    command = [sys.executable, "-m", "mimo", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


def test_help_needs_no_torch():
    code = (
        "import sys; from mimo.cli import main\n"
        "assert main(['--help']) == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mimo demo" in result.stdout and "mimo-b-k600" in result.stdout


@pytest.mark.parametrize("command", ["demo", "train", "sample"])
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_a_group_of_commands_explains_itself(capsys):
    assert main(["data", "--help"]) == 0
    output, errors = capsys.readouterr()
    assert "data check" in output and "Count what a folder holds" in output and not errors
    assert main(["data"]) == 2
    output, errors = capsys.readouterr()
    assert errors.startswith("usage: mimo data COMMAND") and not output


@pytest.mark.parametrize("command", ["train", "encode"])
def test_help_says_that_the_preset_is_required(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    option = text[text.index("--preset {") :]
    assert option.startswith("--preset {mimo-b-k600,") and option.index("(required)") < option.index(" --out ")


def test_version_and_empty_command_line(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out[0].isdigit()
    assert main([]) == 2
    assert "usage: mimo COMMAND" in capsys.readouterr().err


# Bad input: words of the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("paint", "unknown command 'paint': expected one of demo, train, sample"),
        ("train --data x --out y", "--preset is missing: expected one of mimo-b-k600"),
        ("train --preset mimo-huge --data x --out y", "unknown preset 'mimo-huge': expected one of mimo-b-k600"),
        ("train --preset mimo-tiny --out y", "--data"),
        ("train --preset mimo-tiny --data shapes --out y --model.deep 3", "--model.deep"),
        ("train --preset mimo-tiny --data shapes --out y --model.depth four", "'four'"),
        ("train --preset mimo-tiny --data shapes --out y --train.interval x", "'x': expected INT or INT INT\n"),
        ("train --preset mimo-tiny --data shapes --out y --keep-every 0", "--keep-every 0: expected at least 1"),
        (f"train --preset mimo-tiny --data shapes --out y --train.seed {2**63}", "expected less than 2**63"),
        ("demo --seed -1", "seed=-1: expected zero or more"),
        (
            "train --preset mimo-tiny --data shapes --out y --model.heads 5",
            "error: mimo train: --model.heads=5: expected a divisor",
        ),
        (
            "train --preset mimo-tiny --data shapes --out y --train.interval 4 2",
            "--train.interval=(4, 2): expected a whole",
        ),
        ("train --preset mimo-tiny --data shapes --out y --model.mask-ratio 0.5 1.5", "mask_ratio=(0.5, 1.5)"),
        ("train --preset mimo-tiny --data shapes --out y --steps -1", "error: --steps -1: expected more than zero"),
        ("train --preset mimo-tiny --data shapes --out y --train.lr inf", "--train.lr=inf: expected a finite number"),
        ("train-tokenizer --data x --out y --size 8 8 --lr nan", "--lr nan: expected a finite number"),
        ("train --preset mimo-tiny --data shapes --out y --train.accumulate 3 --train.batch-size 4", "accumulate=3"),
        ("train --preset mimo-tiny --data shapes --out y --model.tokenizer vq", "unknown tokenizer 'vq'"),
        (
            "train --preset mimo-tiny --data shapes --out y --model.frames 5",
            "error: frames=5: expected 8, as the tokenizer 'dct' makes of clips of video_frames=8 frames, 48 x 48 "
            "pixels\n",
        ),
        (
            "train --preset far-long-tiny --data shapes --out y --model.coarse-stride 4",
            "--model.coarse_stride=4: expected 2 or more, dividing 6 x 6 tokens\n",
        ),
        (
            "train --preset far-long-tiny --data shapes --out y --model.fine-frames 9",
            "--model.fine_frames=9: expected 1..frames=8 with coarse_stride=3\n",
        ),
        (
            "train --preset far-tiny --data shapes --out y --model.coarse-stride 3 --model.fine-frames 4",
            "coarse_stride=3: expected 0 with recipe='far'\n",
        ),
        (
            "train --preset far-long-tiny --data shapes --out y --model.coarse-stride 0 --model.fine-frames 0",
            "coarse_stride=0: expected 2 or more with recipe='far_long'\n",
        ),
        ("sample --out y", "--checkpoint"),
        ("demo --steps 0", "--steps 0: expected at least 1"),
    ],
)
def test_bad_words(refused, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*words.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_words_of_the_parser_on_any_terminal(refused, monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    start = ["train", "--preset", "mimo-tiny", "--data", "shapes", "--out", "y"]
    assert refused(*start, "--steps", "abc") == "error: mimo train: --steps 'abc': expected INT\n"
    message = refused(*start, "--stesp", 3)
    assert message.startswith("error: mimo train: Unrecognized options: --stesp, 3; Perhaps you meant: --steps")
    assert "help" not in message and "---" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refused, tmp_path):
    assert "--device cuda" in refused(*train_arguments(tmp_path / "run"), "--device", "cuda")


# Bad input: data ------------------------------------------------------------------------------------------------------


def test_bad_data(refused, tmp_path):
    out = tmp_path / "run"
    assert f"{tmp_path / 'none'}" in refused(*train_arguments(out, tmp_path / "none"))
    folder = tmp_path / "videos"
    folder.mkdir()
    assert str(folder) in refused(*train_arguments(out, folder))
    (folder / "broken.mp4").write_bytes(b"this is no video")
    assert "broken.mp4" in refused(*train_arguments(out, folder))
    assert not out.exists()


def test_missing_data_of_the_demo(refused, tmp_path):
    assert str(tmp_path / "none") in refused("demo", "--data", tmp_path / "none", "--out", tmp_path / "demo")


@pytest.mark.parametrize(("kind", "words"), [("actions", []), ("labels", ["--folder-labels"])])
def test_what_clips_have_and_the_network_has_no_place_for(refused, tmp_path, kind, words):
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 255, (2, 8, 8, 8, 3), dtype=np.uint8)
    for number, video in enumerate(videos):
        if kind == "actions":
            (tmp_path / "clips").mkdir(exist_ok=True)
            np.savez(tmp_path / "clips" / f"{number}.npz", video=video, actions=rng.integers(0, 4, 8))
        else:
            write_video(tmp_path / "clips" / f"class{number}" / "clip.mp4", video)
    run, clips = tmp_path / "run", tmp_path / "clips"
    message = refused(*train_arguments(run, clips), *words)
    field = {"actions": "num_actions", "labels": "num_classes"}[kind]
    assert f"{field}=0, but the clips have {kind}: expected --model.{field.replace('_', '-')}" in message
    assert f"--ignore-{kind}" in message and not run.exists()
    assert train(run, *words, f"--ignore-{kind}", data=clips) == 0


def test_classes_without_labels(tmp_path, capsys):
    assert train(tmp_path / "run", "--model.num-classes", "5") == 2
    output, errors = capsys.readouterr()
    assert errors == "error: num_classes=5, but the clips have no label\n"
    assert not output, "the parameters are of interest once the run begins"


def test_a_run_folder_that_cannot_be_made(refused, run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert "cannot write to the run folder" in refused(*train_arguments(out))
    (tmp_path / "run" / "lock").mkdir(parents=True)  # no file that can be opened, as in a folder that is read-only
    assert "cannot write to the run folder" in refused(*train_arguments(tmp_path / "run"))
    # Those that write when they are done refuse before they begin.
    for command in (["demo"], ["sample", "--checkpoint", run]):
        assert f"--out {out}: {tmp_path / 'file'} is no folder that can be written to" in refused(
            *command, "--out", out
        )


def test_a_full_disk(refused, run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "sheet.png")

    monkeypatch.setattr("mimo.sampling.request.generate", full)
    assert "No space left on device: 'sheet.png'" in refused("sample", "--checkpoint", run, "--out", tmp_path)


def test_an_interruption_is_said_once(run, tmp_path, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    checkpoint.step_folder(tmp_path / "unfinished", 1).mkdir(parents=True)  # of an earlier run
    command = ["sample", "--checkpoint", str(run), "--out", str(tmp_path)]
    monkeypatch.setattr("mimo.sampling.request.sample", stopped)
    assert main(command) == 130 and capsys.readouterr().err == "interrupted\n"
    assert main([*command, "--save-every", "2"]) == 130
    assert capsys.readouterr().err == f"interrupted: --resume continues the run in {tmp_path / 'unfinished'}\n"
    monkeypatch.setenv("RANK", "1")
    assert main(command) == 130 and not capsys.readouterr().err


# Bad input: checkpoints -----------------------------------------------------------------------------------------------


def step(run):
    return run / "checkpoints" / "step_00000002"


def shard(run, part):
    return step(run) / part / "shard-00001-model-00001-of-00001.safetensors"


def refused_by_both(refused, run, *more):
    """The message of `mimo sample` and of `mimo train --resume` on a run."""
    one = refused("sample", "--checkpoint", run, "--out", run.parent / "samples")
    other = refused(*train_arguments(run), "--resume")
    assert not (run.parent / "samples").exists()
    return one, other


def test_missing_checkpoint(refused, tmp_path):
    out = tmp_path / "samples"
    assert f"{tmp_path / 'none'} does not exist" in refused("sample", "--checkpoint", tmp_path / "none", "--out", out)
    assert "holds no checkpoint" in refused("sample", "--checkpoint", tmp_path, "--out", out)


def test_truncated_checkpoint(refused, own_run):
    for part in ("ema", "model"):
        file = shard(own_run, part)
        file.write_bytes(file.read_bytes()[:-100])
        for message in refused_by_both(refused, own_run):
            assert "is truncated" in message and ".safetensors" in message


def test_pickle_where_safetensors_is_expected(refused, own_run):
    torch.save({"weight": torch.zeros(3)}, shard(own_run, "ema"))
    for message in refused_by_both(refused, own_run):
        assert f"{shard(own_run, 'ema').name} is a pickle" in message
    assert "is a pickle" in refused("sample", "--checkpoint", shard(own_run, "ema"), "--out", own_run)


def test_resume_with_another_config(refused, own_run):
    message = refused(*train_arguments(own_run), "--resume", "--model.depth", 2, "--train.lr", 0.5)
    assert "model.depth is 1 there and 2 here" in message and "train.lr is" in message


def test_train_over_a_finished_run(refused, own_run):
    assert "already holds checkpoints" in refused(*train_arguments(own_run))


def test_tensors_that_do_not_fit_the_recorded_config(refused, own_run):
    file, state_file = shard(own_run, "ema"), step(own_run) / "state.json"
    state = json.loads(state_file.read_text())
    state["configs"]["model"]["depth"] = 2
    state_file.write_text(sealed(state))
    assert "blocks.1" in refused("sample", "--checkpoint", own_run, "--out", own_run / "samples")
    state["configs"]["model"]["colour"] = "red"
    state_file.write_text(sealed(state))
    assert "colour" in refused("sample", "--checkpoint", own_run, "--out", own_run / "samples")
    save_file(load_file(file), file, metadata={"more": "bytes"})
    assert "bytes" in refused("sample", "--checkpoint", own_run, "--out", own_run / "samples")


# Bad input: sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--context CLIP --context-frames 6 --frames 9", "6 context frames are asked for, it holds 5"),
        (
            "--context CLIP --context-frames 3 --start 4 --frames 9",
            "3 context frames are asked for, it holds 1 from frame 4",
        ),
        (
            "--context CLIP --context-frames 3 --frames 3",
            "--frames 3: the context is part of them, expected more than its 3",
        ),
        ("--context none.mp4", "none.mp4: no such file"),
        ("--context .", "--context .: is a folder, expected a video"),
        ("--context-frames 3", "expected a --context"),
        ("--class 1", "this model has no classes"),
        ("--frames 0", "--frames 0"),
        ("--count 0", "--count 0"),
        ("--steps 0", "--steps 0: expected more"),
        ("--sampler ddim", "sampler='ddim'"),
        ("--fps 0", "fps 0: expected 0.01 to 1000"),
        (f"--seed {2**63}", "expected 0 to 2**63 - 1"),
        ("--sink 3", "--sink 3: expected a --window"),
        ("--class-guidance 2", "--class-guidance 2: expected a --class"),
        ("--history-guidance 2", "trained with --model.history-dropout 0"),
        ("--resume", "holds no run to continue"),
        ("--window 0", "--window 0: expected 1 or more frames"),
        ("--temperature 1 -1", "--temperature (1.0, -1.0)"),
    ],
)
def test_bad_sampling(refused, run, clip, tmp_path, words, message):
    words = [clip if word == "CLIP" else word for word in words.split()]
    assert message in refused("sample", "--checkpoint", run, "--out", tmp_path / "samples", *words)
    assert not (tmp_path / "samples").exists()


def test_corrupted_context(refused, run, clip, tmp_path):
    clip.write_bytes(clip.read_bytes()[:200])
    assert "clip.mp4" in refused("sample", "--checkpoint", run, "--out", tmp_path / "samples", "--context", clip)


# What works -----------------------------------------------------------------------------------------------------------


def test_overrides_and_presets_reach_the_run(tmp_path, capsys):
    more = [
        "--train.lr",
        "0.25",
        "--train.betas",
        "0.8",
        "0.9",
        "--model.mask-offsets",
        "0",
        "--model.positions",
        "learned",
    ]
    assert (
        train(tmp_path / "run", *more, "--model.no-separate-ln", "--keep-every", "1", "--train.preview-every", "2") == 0
    )
    configs = json.loads((step(tmp_path / "run") / "state.json").read_text())["configs"]
    assert configs["train"]["lr"] == 0.25 and configs["train"]["betas"] == [0.8, 0.9] and configs["train"]["steps"] == 2
    assert configs["model"]["mask_offsets"] == [0] and configs["model"]["positions"] == "learned"
    assert configs["model"]["separate_ln"] is False
    assert configs["model"]["parameterization"] == "flow"  # the preset's, not overridden
    output = capsys.readouterr().out
    assert "step 2/2" in output and "decoder" in output
    preview = tmp_path / "run" / "previews" / "step_00000002.mp4"
    assert str(preview) in output
    with VideoReader(preview) as reader:
        assert reader.num_frames == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    """A rate that only the weights show to be too large: the first step's loss and gradient are finite."""
    run = tmp_path / "run"
    rate = ["--train.lr", "1e38", "--train.lr-end", "1e38", "--train.weight-decay", "1e3"]
    assert train(run, *rate, "--steps", "1") == 2
    output, errors = capsys.readouterr()
    assert errors.startswith(f"error: checkpoint {step(run).with_name('step_00000001')} is not written: model ")
    assert errors.endswith("is not finite\n") and errors.count("\n") == 1
    assert "saved" not in output and not list((run / "checkpoints").glob("*"))


def resume(run, *more):
    return main(["train", "--out", str(run), "--resume", *map(str, more)])


def test_a_run_remembers_what_it_was_told(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for number in range(3):
        write_video(tmp_path / "videos" / f"{number}.mp4", rng.integers(0, 255, (8, 16, 16, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert train(run, "--train.lr", "0.25", "--random-crop", "--keep-every", "1", data="videos") == 0
    first = json.loads((step(run) / "state.json").read_text())["configs"]
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert resume(run) == 0
    assert "nothing to do: step 2 of 2" in capsys.readouterr().out
    # Neither are the preset's own values, given again with it, taken for an order to change something.
    assert resume(run, "--preset", "mimo-tiny", "--data", tmp_path / "videos") == 0
    assert "nothing to do: step 2 of 2" in capsys.readouterr().out
    assert resume(run, "--steps", 4, "--train.keep", 5, "--sample.steps", 3, "--no-random-crop") == 0
    output, errors = capsys.readouterr()
    assert "steps 2 -> 4: the learning rate at step 2 goes from 1e-05 to 0.0" in output and not errors
    assert "keep 2 -> 5: older checkpoints are deleted" in output
    assert "sample.steps 2 -> 3: previews and later samples are drawn so" in output
    assert "random_crop True -> False: with other clips it is another run from here" in output
    assert output.count(" -> ") == 4 and "the data was" not in output
    later = run / "checkpoints" / "step_00000004" / "state.json"
    second = json.loads(later.read_text())["configs"]
    first["train"] |= {"steps": 4, "keep": 5}
    first["sample"]["steps"], first["told"]["random_crop"] = 3, False
    assert second == first and second["train"]["lr"] == 0.25 and second["told"]["keep_every"] == 1


def test_what_a_resumed_run_cannot_change_or_does_not_know(refused, own_run, tmp_path):
    again = ["train", "--out", own_run, "--resume"]
    assert f"--preset mimo-b-k600: {own_run} was begun with mimo-tiny" in refused(*again, "--preset", "mimo-b-k600")
    assert "model.depth is 1 there and 2 here" in refused(*again, "--model.depth", 2)
    nothing = ["train", "--out", tmp_path / "none", "--resume"]
    assert f"--resume: {tmp_path / 'none'} holds no checkpoint to continue" in refused(*nothing)
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_is_no_permission_to_run_code(own_run):
    state_file = step(own_run) / "state.json"
    state = json.loads(state_file.read_text())
    state["configs"]["told"]["trust_pickle"] = True
    state_file.write_text(sealed(state))
    command = parse(["train", "--out", str(own_run), "--resume"])
    assert command.data == "shapes" and command.trust_pickle is False


def test_a_run_of_before_it_was_remembered_goes_on(refused, own_run, monkeypatch, capsys):
    from mimo import checkpoint

    read = checkpoint.read_state

    def without(folder):
        state = read(folder)
        return state | {"configs": {name: part for name, part in state["configs"].items() if name != "told"}}

    monkeypatch.setattr("mimo.checkpoint.read_state", without)
    assert "--data" in refused("train", "--out", own_run, "--resume", "--steps", 3)
    assert resume(own_run, "--data", "shapes", "--steps", 3) == 0
    assert " -> " in capsys.readouterr().out and (own_run / "checkpoints" / "step_00000003").exists()


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("an error inside a training step")

    monkeypatch.setattr("mimo.training.trainer.Trainer.train_step", broken)
    with pytest.raises(ValueError, match="inside a training step"):
        train(tmp_path / "run")


def sample(run, out, *more):
    assert main(["sample", "--checkpoint", str(run), "--out", str(out), *map(str, more)]) == 0
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_same_seed_same_video(run, tmp_path, capsys):
    one = sample(run, tmp_path / "a", "--seed", 3)
    assert sorted(one) == ["contact_sheet.png", "sample.gif", "sample.mp4"]
    assert [str(tmp_path / "a" / name) for name in ("sample.mp4", "sample.gif", "contact_sheet.png")] == [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))
    ]
    assert sample(run, tmp_path / "b", "--seed", 3) == one
    assert sample(run, tmp_path / "c", "--seed", 4)["sample.gif"] != one["sample.gif"]


def test_prediction_keeps_its_context_and_has_the_asked_length(run, clip, tmp_path):
    more = ["--context", clip, "--context-frames", 2, "--start", 1, "--frames", 6, "--count", 2]
    files = sample(run, tmp_path / "out", *more)
    assert sorted(files) == ["contact_sheet.png", *(f"sample_{i}.{kind}" for i in range(2) for kind in ("gif", "mp4"))]
    frames = []
    for number in range(2):
        with VideoReader(tmp_path / "out" / f"sample_{number}.mp4") as reader:
            assert reader.num_frames == 6
            frames.append(reader.read(6).astype(int))
    assert np.abs(frames[0][:2] - frames[1][:2]).max() <= 2  # the same context, each encoded once more
    assert np.abs(frames[0][2:] - frames[1][2:]).max() > 10  # two samples


def test_averaged_and_last_weights_differ(tmp_path):
    run = tmp_path / "run"
    assert train(run, "--train.lr", "0.1", "--train.lr-end", "0.1", "--train.ema-decay", "0.9", "--steps", "8") == 0
    assert sample(run, tmp_path / "a") != sample(run, tmp_path / "b", "--weights", "model")


@pytest.mark.parametrize("words", ["--window 1", "--temperature 0.5 0.4", "--history-noise 0.5 0.5"])
def test_options_of_long_videos_reach_the_sampler(tmp_path, words):
    run = tmp_path / "run"
    assert train(run, "--train.lr", "0.1", "--train.lr-end", "0.1", "--train.ema-decay", "0", "--steps", "8") == 0
    assert sample(run, tmp_path / "a", "--frames", 6) != sample(run, tmp_path / "b", "--frames", 6, *words.split())


def test_classes_and_actions(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        video = rng.integers(0, 255, (8, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{number}.npz", video=video, actions=rng.integers(0, 4, 8))
    run = tmp_path / "run"
    assert train(run, "--model.num-actions", "4", data=tmp_path) == 0
    files = sample(run, tmp_path / "out", "--context", tmp_path / "0.npz", "--frames", 5)
    assert "sample.mp4" in files

    videos = tmp_path / "videos"
    for label in ("jump", "run"):
        (videos / label).mkdir(parents=True)
        write_video(videos / label / "0.mp4", rng.integers(0, 255, (8, 16, 16, 3), dtype=np.uint8))
    run = tmp_path / "classes"
    fast = ["--train.lr", "0.1", "--train.ema-decay", "0", "--steps", "8"]  # which have to tell the classes apart
    assert train(run, "--model.num-classes", "2", "--folder-labels", *fast, data=videos) == 0
    one = sample(run, tmp_path / "c0", "--class", 0, "--class-guidance", 2)
    assert one != sample(run, tmp_path / "c1", "--class", 1, "--class-guidance", 2)
    assert main(["sample", "--checkpoint", str(run), "--out", str(tmp_path / "c2"), "--class", "2"]) == 2


def test_what_only_training_needs_stays_on_disk(run, monkeypatch):
    read, original = {}, checkpoint.read_tensors

    def record(*args, **options):
        read.update(original(*args, **options))
        return read

    monkeypatch.setattr(checkpoint, "read_tensors", record)
    model = load(run).model
    assert model.decoder is None and set(read) == set(model.state_dict())
    saved = load_file(shard(run, "ema"))
    assert {name.partition(".")[0] for name in saved.keys() - read.keys()} == {"decoder"}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
