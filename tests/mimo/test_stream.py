"""Runs that are interrupted and continued: the same frames bit for bit, and clear words for states that do not fit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mimo.checkpoint
from mimo import MiMo, records
from mimo.cli import main
from mimo.config import SampleConfig
from mimo.errors import InputError
from mimo.recipes.base import HistoryPolicy
from mimo.recipes.mimo import MaskedHistory
from mimo.sampling.history import CachePolicy
from mimo.sampling.sampler import Sampler
from mimo.sampling.saving import Saving, delete_folder

from .. import processes
from .small_streams import config, network, start

OPTIONS = {
    "whole": {},
    "window and sink": {"window": 3, "sink": 1, "temperature": (1.0, 0.5), "history_noise": (0.1, 0.5)},
    "alone": {"window": 1},  # an empty cache
    "frame graph": {"graph": "frame"},
}


@pytest.fixture(scope="module")
def model() -> MiMo:
    return network()


def sampler_of(model: MiMo, name: str) -> Sampler:
    options = dict(OPTIONS[name])
    sampling = {field: options.pop(field) for field in tuple(options) if field in SampleConfig().to_dict()}
    return Sampler(model, config(**sampling), **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_continued_frames_are_the_same_bit_for_bit(model, tmp_path, name, stop):
    """Stopped after `stop` frames, saved after the second and the fourth."""
    expected = list(start(sampler_of(model, name)))
    stream = start(sampler_of(model, name), Saving(tmp_path, every=2))
    for frame in expected[:stop]:
        assert torch.equal(next(stream), frame)
    stream.close()
    torch.manual_seed(99)  # the state of everything else does not matter
    done = []
    sampler = sampler_of(network(), name)
    continued = sampler.resume(Saving(tmp_path, every=3), progress=lambda *now: done.append(now))
    saved = stop // 2 * 2
    assert continued.progress.done == saved
    assert all(torch.equal(a, b) for a, b in zip(continued.saved(), expected[:saved], strict=True))
    rest = list(continued)
    assert len(rest) == len(expected) - saved and all(map(torch.equal, rest, expected[saved:]))
    assert done[0] == (saved + 1, 6) and done[-1] == (6, 6) and len(sampler.latencies) == len(rest)
    assert all(torch.equal(a, b) for a, b in zip(continued.saved(), expected, strict=True))
    (run,) = sampler._idle.values()
    assert run.history.cache.num_free_pages == run.history.cache.num_pages


def test_what_changes_is_added_to_the_frame_before_the_interruption(tmp_path):
    model = network(prediction="clean", residual=True, recent_frames=2)
    sampler = sampler_of(model, "window and sink")
    expected = list(start(sampler))
    stream = start(sampler, Saving(tmp_path, every=2))
    for _ in range(3):
        next(stream)
    stream.close()
    rest = list(sampler_of(model, "window and sink").resume(Saving(tmp_path, every=3)))
    assert len(rest) == 4 and all(map(torch.equal, rest, expected[2:]))


def test_continued_in_the_cache_of_the_interrupted_run_and_twice(model, tmp_path):
    sampler = Sampler(model, config())
    expected = list(start(sampler))
    stream = start(sampler, Saving(tmp_path, every=1))
    next(stream)
    stream.close()
    list(start(sampler))  # leaves its cache and pages behind for the next run of the size
    for done in (1, 2):
        continued = sampler.resume(Saving(tmp_path, every=1))
        assert torch.equal(next(continued), expected[done])
        continued.close()
    assert all(map(torch.equal, sampler.resume(Saving(tmp_path)), expected[3:]))
    finished = sampler.resume(Saving(tmp_path))
    assert list(finished) == [] and all(torch.equal(a, b) for a, b in zip(finished.saved(), expected, strict=True))


def test_a_change_of_a_yielded_frame_is_not_saved(model, tmp_path):
    expected = list(start(Sampler(model, config())))
    stream = start(Sampler(model, config()), Saving(tmp_path, every=2))
    next(stream).zero_()
    next(stream).zero_()
    assert all(torch.equal(a, b) for a, b in zip(stream.saved(), expected[:2], strict=True))


@pytest.mark.parametrize("moment", ["frames", "state"])
def test_killed_while_saving(model, tmp_path, monkeypatch, moment):
    """A save that does not come to its end changes nothing: the state before it is continued."""
    expected = list(start(Sampler(model, config())))
    stream = start(Sampler(model, config()), Saving(tmp_path, every=2))
    next(stream), next(stream), next(stream)
    original = Path.rename

    def killed(self, target):
        if (moment == "frames") == ("frames" in self.parent.parts[len(tmp_path.parts) :]):
            raise KeyboardInterrupt
        return original(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        next(stream)
    continued = Sampler(model, config()).resume(Saving(tmp_path, every=1))
    assert continued.progress.done == 2
    assert all(map(torch.equal, continued, expected[2:]))
    assert all(torch.equal(a, b) for a, b in zip(continued.saved(), expected, strict=True))
    assert not list(tmp_path.rglob(f"{mimo.checkpoint._UNFINISHED}*"))


def saved_run(model: MiMo, folder: Path, **options) -> Saving:
    saving = Saving(folder, every=2, request={"seed": 1})
    stream = start(Sampler(model, config(), **options), saving)
    next(stream), next(stream)
    stream.close()
    return saving


def test_state_of_another_run_is_named(model, tmp_path):
    saving = saved_run(model, tmp_path)

    def refuses(match: str, sampler: Sampler, saving: Saving = saving):
        with pytest.raises(InputError, match=match):
            sampler.resume(saving)

    refuses(r"weights is '[0-9a-f]{64}' there and '[0-9a-f]{64}' here", Sampler(network(1), config()))
    refuses("network.depth is 2 there and 3 here", Sampler(network(depth=3), config()))
    refuses("sampling.steps is 2 there and 4 here", Sampler(model, config(steps=4)))
    refuses("sampling.window is None there and 3 here", Sampler(model, config(), policy=CachePolicy(3)))
    refuses("sampling.page_size is 8 there and 4 here", Sampler(model, config(), page_size=4))
    refuses("request.seed is 1 there and 2 here", Sampler(model, config()), Saving(tmp_path, request={"seed": 2}))
    with torch.autocast("cpu", torch.bfloat16):
        refuses("sampling.dtype is 'torch.float32' there and 'torch.bfloat16' here", Sampler(model, config()))
    assert Sampler(model, config()).resume(saving).progress.done == 2


def test_state_with_fewer_histories_is_refused(model, tmp_path, monkeypatch):
    """As an older version saved it, whose null branch was told the actions of its history."""
    with monkeypatch.context() as patch:
        patch.setattr(MaskedHistory, "history_policy", classmethod(lambda cls, config: HistoryPolicy()))
        saving = saved_run(model, tmp_path)
    with pytest.raises(InputError, match="has 4 sequences in its cache, expected 8: 4 in each of 2 histories"):
        next(Sampler(model, config()).resume(saving))


def test_damaged_and_missing_states_are_named(model, tmp_path):
    sampler = Sampler(model, config())
    with pytest.raises(InputError, match="none does not exist"):
        sampler.resume(Saving(tmp_path / "none"))
    saving = saved_run(model, tmp_path / "run")
    with pytest.raises(InputError, match="run holds a saved run: resume it"):
        start(sampler, saving)
    with pytest.raises(ValueError, match="a run saves its cache, got use_cache=False"):
        start(Sampler(model, config(), use_cache=False), Saving(tmp_path / "other"))
    with pytest.raises(ValueError, match="every=0: expected 1 or more"):
        Saving(tmp_path, every=0)
    (file,) = (tmp_path / "run" / "checkpoints").rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=rf"{file.name}.*(truncated|bytes)"):
        sampler.resume(saving)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="checksum"):
        sampler.resume(saving)
    file.write_bytes(whole)
    (file,) = (tmp_path / "run" / "frames").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{file.name}.*(truncated|bytes).*delete it to begin anew"):
        sampler.resume(saving)


@pytest.mark.parametrize("where", ["state", "tensors", "frames", "frames of another run"])
def test_damage_falls_back_to_the_state_before_and_says_so(model, tmp_path, caplog, where):
    expected = list(start(Sampler(model, config())))
    runs = [tmp_path / "one", tmp_path / "other"]
    for seed, run in enumerate(runs, 1):
        stream = start(Sampler(model, config()), Saving(run, every=2), seed)
        for _ in range(4):
            next(stream)
        stream.close()
    newest = runs[0] / "checkpoints" / "step_00000004"
    if where == "frames of another run":
        step = "frames/checkpoints/step_00000004"
        (runs[0] / step).rename(tmp_path / "aside")
        (runs[1] / step).rename(runs[0] / step)
    else:
        damaged = {"state": newest / "state.json", "tensors": next(newest.rglob("*.safetensors"))}
        damaged["frames"] = next((runs[0] / "frames/checkpoints/step_00000004").rglob("*.safetensors"))
        data = bytearray(damaged[where].read_bytes())
        data[len(data) // 2] ^= 1
        damaged[where].write_bytes(data)
    continued = Sampler(model, config()).resume(Saving(runs[0], every=2))
    assert continued.progress.done == 2
    (said,) = [record.message for record in caplog.records if record.name == "mimo.sample"]
    assert said.startswith("passed over: ") and "step_00000004" in said
    assert all(map(torch.equal, continued, expected[2:]))
    assert all(torch.equal(a, b) for a, b in zip(continued.saved(), expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"progress": []}, "progress is a list of 0, expected an object"),
        ({"progress": {"total": 6}}, "progress.seed is missing"),
        ({"run": [1, 1]}, "run is a list of 2, expected a list of 6 values"),
        ({"run": [1, "1", 1, 1, True, True]}, r'run\[1\] is "1", expected a whole number'),
        ({"configs": None}, "configs is null, expected an object"),
    ],
)
def test_a_state_with_other_types_is_refused(model, tmp_path, changes, words):
    saving = saved_run(model, tmp_path)
    file = tmp_path / "checkpoints" / "step_00000002" / "state.json"
    file.write_text(records.sealed(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=words):
        Sampler(model, config()).resume(saving)


def test_only_what_a_run_saved_is_deleted(model, tmp_path):
    folder = tmp_path / "unfinished"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt was not written by mimo"):
        start(Sampler(model, config()), Saving(folder))
    (folder / "thesis.txt").unlink()
    saved_run(model, folder)
    (folder / "checkpoints" / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="link is a link"):
        delete_folder(folder)
    (folder / "checkpoints" / "link").unlink()
    delete_folder(folder)
    assert not folder.exists() and tmp_path.exists()


def test_a_link_in_the_place_of_the_folder_is_not_followed(model, tmp_path):
    saving = saved_run(model, tmp_path / "elsewhere")
    link, before = tmp_path / "unfinished", sorted(saving.folder.rglob("*"))
    link.symlink_to(saving.folder)
    for refused in (
        lambda: delete_folder(link),
        lambda: Sampler(model, config()).resume(Saving(link, request=saving.request)),
    ):
        with pytest.raises(InputError, match="unfinished is a link"):
            refused()
    assert sorted(saving.folder.rglob("*")) == before
    delete_folder(saving.folder)
    saving.folder.mkdir()
    with pytest.raises(InputError, match="unfinished is a link"):
        start(Sampler(model, config()), Saving(link))


def test_long_run_is_saved_and_continued_in_constant_space(tmp_path):
    """300 frames, of which what is kept is the cache's window and, on disk, every frame once."""
    model = network(depth=1, num_classes=0, num_actions=0)
    sampler = Sampler(model, config(steps=1), policy=CachePolicy(4, sink=2))
    stream = sampler.stream(None, 300, generator=torch.Generator().manual_seed(0), saving=Saving(tmp_path, every=25))
    sizes, made = [], []
    for frame in stream:
        made.append(frame)
        assert len(stream.saver.unsaved) < 25
        if len(made) % 50 == 0:
            before, state = sorted((tmp_path / "checkpoints").iterdir())
            sizes.append(sum(file.stat().st_size for file in state.rglob("*.safetensors")))
        if len(made) == 260:
            break
    stream.close()
    assert len(set(sizes)) == 1
    continued = sampler.resume(Saving(tmp_path, every=25))
    assert continued.run.history.cache.num_pages == 6
    rest = list(continued)
    assert len(rest) == 50 and all(map(torch.equal, rest[:10], made[250:]))
    assert len(list(continued.saved())) == 300
    newest = mimo.checkpoint.step_folders(tmp_path)[-1]
    assert json.loads((newest / "state.json").read_text())["progress"]["done"] == 300


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from small_streams import *
for number, frame in enumerate(start(Sampler(network(), config()), Saving(Path({out!r}), every=2))):
    print("frame", flush=True)
    if number == 2:
        sys.stdin.read()
"""


def test_killed_process_is_continued(model, tmp_path):
    script = KILLED.format(folder=str(Path(__file__).parent), out=str(tmp_path / "run"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = processes.Popen([sys.executable, "-c", script], **pipes)
    for _ in range(3):
        assert process.stdout.readline() == "frame\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    expected = list(start(Sampler(model, config())))
    continued = Sampler(model, config()).resume(Saving(tmp_path / "run", every=2))
    assert continued.progress.done == 2
    assert all(map(torch.equal, continued, expected[2:]))


TINY = (
    "--model.depth 1 --model.dim 16 --model.heads 2 --model.decoder-depth 1 --model.decoder-layer 1 --model.frames 3 "
    "--model.height 2 --model.width 2 --model.channels 12 --model.compression 1 2 2 --model.video-frames 3 "
    "--train.batch-size 2 --train.warmup 0 --train.precision fp32 --train.workers 0 --train.preview-every 0 "
    "--sample.steps 2 --sample.context-frames 0 --sample.num-frames 8"
).split()


def test_command_line_continues_an_interrupted_video(tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    train = ["train", "--preset", "mimo-tiny", "--data", "shapes", "--out", str(run), "--steps", "1", *TINY]
    assert main(train) == 0

    def sample(*more, to=out) -> int:
        capsys.readouterr()
        return main(["sample", "--checkpoint", str(run), "--out", str(to), "--count", "2", *more])

    assert sample(to=tmp_path / "expected") == 0
    original, calls = Sampler._noise, iter(range(99))

    def interrupted(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "_noise", interrupted)
        assert sample("--save-every", "2") == 130
    assert f"interrupted: --resume continues the run in {out / 'unfinished'}" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["unfinished"]
    assert sample("--save-every", "2") == 2 and "holds a saved run: resume it" in capsys.readouterr().err
    assert sample("--resume", "--seed", "7") == 2 and "request.seed is 0 there and 7 here" in capsys.readouterr().err
    assert sample("--resume", "--steps", "3") == 2 and "sampling.steps is 2 there and 3 here" in capsys.readouterr().err
    assert sample("--resume") == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}  # nothing unfinished is left
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert sample("--resume") == 2 and "out holds no run to continue" in capsys.readouterr().err
    (out / "unfinished").mkdir()
    (out / "unfinished" / "thesis.txt").write_text("mine")
    assert (
        sample("--save-every", "2", "--overwrite") == 2
        and "thesis.txt was not written by mimo" in capsys.readouterr().err
    )
    assert (out / "unfinished" / "thesis.txt").read_text() == "mine"
    assert sample("--save-every", "0") == 2 and "--save-every 0: expected at least 1" in capsys.readouterr().err
    assert sample("--save-every", "3", to=tmp_path / "again") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
