"""`mimo sample`: what it writes, what it refuses at once, and what it says meanwhile."""

import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mimo.cli import main
from mimo.data import VideoReader, read_clip, write_video
from mimo.data.npz import NpzReader
from mimo.errors import InputError
from mimo.runtime import memory_of
from mimo.sampling import request, videos
from mimo.sampling.loading import load
from mimo.sampling.sampler import Sampler

TINY = (
    "--model.depth 1 --model.dim 16 --model.heads 2 --model.decoder-depth 1 --model.decoder-layer 1 --model.frames 3 "
    "--model.height 2 --model.width 2 --model.channels 12 --model.compression 1 2 2 --model.video-frames 3 "
    "--train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 --train.preview-every 0 "
    "--sample.steps 2 --sample.context-frames 1 --sample.num-frames 3"
).split()


@pytest.fixture(scope="module")
def actions(tmp_path_factory):
    """A folder of npz trajectories."""
    folder, rng = tmp_path_factory.mktemp("actions"), np.random.default_rng(0)
    for number in range(3):
        video = rng.integers(0, 255, (8, 8, 8, 3), dtype=np.uint8)
        np.savez(folder / f"{number}.npz", video=video, actions=rng.integers(0, 4, 8))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, actions):
    folder = tmp_path_factory.mktemp("runs") / "run"
    data = ["--data", str(actions), "--model.num-actions", "4"]
    assert main(["train", "--preset", "mimo-tiny", *data, "--out", str(folder), *TINY, "--steps", "2"]) == 0
    return folder


@pytest.fixture
def sample(run, actions, tmp_path, capsys):
    """Runs the command into tmp_path/out; returns its exit status and what it wrote to stderr."""

    def sample(*words, context=actions / "0.npz", out=tmp_path / "out"):
        capsys.readouterr()
        given = ["--context", str(context)] if context else []
        status = main(["sample", "--checkpoint", str(run), "--out", str(out), *given, *map(str, words)])
        return status, capsys.readouterr().err

    return sample


def files(folder) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_every_pixel_is_kept_where_it_is_asked_for(sample, actions, tmp_path):
    """The npz is read again by the readers of clips, with its actions; the pictures hold the same, at native size."""
    size = {"--frames": 6, "--count": 2}
    words = [word for pair in size.items() for word in pair]
    for kind in ("mp4", "npz", "png"):
        assert sample(*words, "--format", kind, out=tmp_path / kind)[0] == 0
    shown = {"contact_sheet.png", *(f"sample_{n}.{suffix}" for n in range(2) for suffix in ("mp4", "gif"))}
    assert set(files(tmp_path / "mp4")) == shown
    assert set(files(tmp_path / "npz")) == shown | {"sample_0.npz", "sample_1.npz"}
    for n in range(2):
        with NpzReader(tmp_path / "npz" / f"sample_{n}.npz") as reader:
            video, told = reader.read(reader.num_frames), reader.actions
        assert video.shape == (6, 4, 4, 3)
        truth = read_clip(actions / "0.npz", 1, size=(4, 4))
        assert np.array_equal(video[:1], truth)
        assert np.array_equal(told, np.load(actions / "0.npz")["actions"][:6])
        pictures = sorted((tmp_path / "png" / f"sample_{n}").glob("*.png"))
        assert [path.name for path in pictures] == [f"frame_{t:06d}.png" for t in range(6)]
        assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pictures]), video)
    # And it is a context for the next one.
    assert sample("--frames", 5, context=tmp_path / "npz" / "sample_0.npz", out=tmp_path / "again")[0] == 0


@pytest.mark.parametrize("kind", ["mp4", "npz", "png"])
def test_results_are_replaced_on_request_alone(sample, tmp_path, kind):
    out = tmp_path / "out"
    assert sample("--format", kind)[0] == 0
    before = files(out)
    status, errors = sample("--format", kind, "--seed", 1)
    assert status == 2 and files(out) == before
    more = 2 if kind == "mp4" else 3
    assert (
        errors
        == f"error: {out / 'sample.mp4'} and {more} more: exists already: expected another --out, or --overwrite\n"
    )
    assert sample("--format", kind, "--seed", 1, "--overwrite")[0] == 0
    after = files(out)
    assert after.keys() == before.keys() and after["sample.mp4"] != before["sample.mp4"]
    (out / "sample.mp4").unlink()
    (out / "sample.gif").unlink()
    assert "contact_sheet.png" in sample()[1]


def test_a_folder_of_pictures_with_a_file_of_the_user_stays(sample, tmp_path, monkeypatch):
    """Known before the first frame is made."""
    assert sample("--format", "png")[0] == 0
    note = tmp_path / "out" / "sample" / "notes.txt"
    note.write_text("mine")
    monkeypatch.setattr(request, "generate", lambda *_, **__: pytest.fail("sampled in vain"))
    status, errors = sample("--format", "png", "--overwrite")
    assert status == 2 and f"{note} was not written by mimo" in errors and note.read_text() == "mine"
    shutil.rmtree(note.parent)
    note.parent.write_text("mine")
    assert f"{note.parent} was not written by mimo" in sample("--format", "png", "--overwrite")[1]
    assert note.parent.read_text() == "mine"


@pytest.mark.parametrize(
    "words, needed",
    [
        ("--frames 1000000000000 --window 2", r"--frames 1000000000000 --count 1 --steps 2 needs at least \S+ TiB"),
        ("--frames 1000000000000", r"PiB of memory, \S+ TiB of it for the (cache|video)"),
        ("--count 99999999", r"--frames 3 --count 99999999 --steps 2 needs at least \S+ GiB"),
        ("--steps 1000000000000", r"\S+ TiB of it for the steps"),
        ("--context-frames 999999999999 --frames 1000000000000", "needs at least"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made(sample, tmp_path, monkeypatch, words, needed):
    monkeypatch.setattr(request, "memory_of", lambda _: 2**34)
    monkeypatch.setattr(request, "read_context", lambda *_: pytest.fail("the context was read"))
    status, errors = sample(*words.split())
    assert status == 2 and re.search(needed, errors) and errors.endswith("this machine has 16 GiB\n"), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("compression", [1, 4])
def test_frames_are_counted_in_the_latents_that_cover_them(chunk, compression):
    """Against trying every number: latents that come in chunks, of which the first covers fewer frames."""

    class Chunks:
        def num_frames(self, latents: int) -> int:
            if latents % chunk:
                raise ValueError(f"{latents} latents")
            return (latents // chunk - 1) * chunk * compression + 1

    cover = {Chunks().num_frames(chunk * n): chunk * n for n in range(1, 100)}
    for frames in range(1, 60):
        if frames in cover:
            assert request.latents_covering("--frames", frames, Chunks()) == cover[frames]
            continue
        low, high = max(n for n in cover if n < frames), min(n for n in cover if n > frames)
        with pytest.raises(InputError, match=f"--frames {frames}: this model's latents cover {low} or {high} frames"):
            request.latents_covering("--frames", frames, Chunks())
    for frames in (0, -1, 2**63):
        with pytest.raises(InputError, match=f"--frames {frames}: expected at least 1, and less than"):
            request.latents_covering("--frames", frames, Chunks())


def test_the_memory_of_this_machine_is_known():
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**26 < memory_of(torch.device("cpu")) <= pages


@pytest.mark.parametrize(
    "config, histories", [({"class_guidance": 1.0}, 1), ({"class_guidance": 2.0}, 2), ({"window": 2}, 1)]
)
def test_the_memory_that_is_named_is_what_the_cache_takes(run, config, histories):
    """`cache_bytes` before the run against the pool in the run."""
    loaded = load(run, device=torch.device("cpu"))
    sampler = Sampler(loaded.model, replace(loaded.sample_config, **config))
    stream = sampler.stream(None, 5, actions=torch.zeros(2, 5, dtype=torch.int64))
    next(stream)
    pool = stream.run.history.cache.pool
    assert sampler.cache_bytes(2, 0, 5, labels=False, actions=True) == pool.nbytes
    clips, frames, keys_and_values = 2, config.get("window", 5), 2
    assert pool.nbytes == histories * clips * frames * keys_and_values * loaded.model.config.tokens * 16 * 4
    stream.close()


def test_progress_is_said_with_the_time_that_is_left(sample, monkeypatch):
    _, errors = sample("--frames", 6)
    first, *_, last = errors.splitlines()
    assert re.fullmatch(r"sampling: frame 1 of 5, \d\d:\d\d spent, about \d\d:\d\d left", first)
    assert re.fullmatch(r"sampling: frame 5 of 5, \d\d:\d\d spent", last)
    assert len(errors.splitlines()) == 2  # the next line comes after seconds
    monkeypatch.setattr(videos, "_SECONDS", 0.0)
    assert len(sample("--frames", 6, "--overwrite")[1].splitlines()) == 5


def test_paths_that_are_no_files(sample, actions, tmp_path):
    assert "--context /dev/null: is no regular file, expected a video" in sample(context="/dev/null")[1]
    assert "--actions /dev/null: is no regular file, expected an npz" in sample("--actions", "/dev/null")[1]
    assert f"--actions {actions}: is a folder, expected an npz" in sample("--actions", actions)[1]
    assert "no such file" in sample(context=tmp_path / "none.mp4")[1]
    assert "file name too long" in sample(context=tmp_path / ("x" * 300))[1]
    assert not (tmp_path / "out").exists()


def test_a_context_that_has_changed_stops_the_continuation(sample, actions, tmp_path, monkeypatch):
    clip = tmp_path / "clip.npz"
    clip.write_bytes((actions / "0.npz").read_bytes())
    original, calls = Sampler._noise, iter(range(99))

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    words = ["--frames", 6, "--save-every", 1]
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "_noise", interrupted)
        assert sample(*words, context=clip)[0] == 130
    clip.write_bytes((actions / "1.npz").read_bytes())
    status, errors = sample(*words, "--resume", context=clip)
    assert status == 2 and "request.context_sha256 is" in errors and "request.actions_sha256 is" in errors
    clip.write_bytes((actions / "0.npz").read_bytes())
    assert sample(*words, "--resume", context=clip)[0] == 0
    assert not (tmp_path / "out" / "unfinished").exists()


def test_a_file_put_into_the_unfinished_run_meanwhile_stays(sample, tmp_path, monkeypatch, capsys):
    note = tmp_path / "out" / "unfinished" / "notes.txt"
    original = request.generate

    def generate(*args, **options):
        made = original(*args, **options)
        note.write_text("mine")
        return made

    monkeypatch.setattr(request, "generate", generate)
    assert sample("--save-every", 1)[0] == 0
    assert note.read_text() == "mine" and (tmp_path / "out" / "sample.mp4").exists()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: there is nothing to differ")
def test_the_same_frames_are_the_same_mp4_on_any_number_of_cores(tmp_path):
    rng, cores = np.random.default_rng(0), os.sched_getaffinity(0)
    rows, columns = np.mgrid[:96, :128]
    waves = [np.sin(columns / 9 + t / 3) + np.cos(rows / 7 - t / 5) for t in range(60)]
    noise = rng.integers(0, 30, (60, 96, 128, 3))
    clip = ((np.stack(waves)[..., None] * 60 + 120) + noise).clip(0, 255).astype(np.uint8)
    encoded = []
    try:
        for number, usable in enumerate((cores, {min(cores)}, cores)):
            os.sched_setaffinity(0, usable)
            encoded.append(write_video(tmp_path / f"{number}.mp4", clip, min_side=256).read_bytes())
    finally:
        os.sched_setaffinity(0, cores)
    assert encoded[0] == encoded[1] == encoded[2]
    assert b"Lavf" not in encoded[0] and b"Lavc" not in encoded[0]
    with VideoReader(tmp_path / "0.mp4") as reader:
        assert reader.num_frames == 60
