"""mimo.data.encode and mimo.data.latents: the same bytes however the work is cut, and every fault named."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mimo.cli import main
from mimo.config import Encoding
from mimo.data import (
    ClipDataset,
    DataError,
    LatentShards,
    ShapesDataset,
    UnreadableVideo,
    VideoFolder,
    batches,
    encode,
    open_dataset,
    to_float,
    write_video,
)
from mimo.data.check import check
from mimo.data.encode import verify, write_shards
from mimo.errors import InputError
from mimo.records import CHECKSUM
from mimo.tokenizers import build_tokenizer
from mimo.tokenizers.weights import checksum

from .. import processes

SHAPE = {"num_frames": 3, "height": 16, "width": 16}
CONFIG = Encoding(passes=2, shard_clips=4, batch_size=3, workers=0)


@pytest.fixture
def tokenizer():
    return build_tokenizer("dct", compression=(1, 8, 8), channels=24)


def videos(folder, names="abcde"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        frames = np.random.default_rng(ord(name)).integers(0, 256, (9, 20, 24, 3), dtype=np.uint8)
        write_video(folder / f"{name}.mp4", frames)
    return folder


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def run(dataset, tokenizer, out, config=CONFIG, **kwargs):
    return write_shards(dataset, tokenizer, out, config, tokenizer_name="dct", **kwargs)


def test_shards_hold_the_encoded_samples(tmp_path, tokenizer):
    dataset = VideoFolder(videos(tmp_path / "in"), **SHAPE, random_crop=True, flip=True)
    out = run(dataset, tokenizer, tmp_path / "out")
    shards = [load_file(out / f"shard-{number:05d}.safetensors") for number in range(3)]
    assert [len(shard["latents"]) for shard in shards] == [4, 4, 2]
    index, turn = (torch.cat([shard[key] for shard in shards]).tolist() for key in ("index", "pass"))
    assert index == [0, 1, 2, 3, 4] * 2 and turn == [0] * 5 + [1] * 5
    latents = torch.cat([shard["latents"] for shard in shards])
    assert latents.shape == (10, 3, 2, 2, 24) and latents.dtype == torch.float16
    assert not torch.equal(latents[0], latents[5]), "each pass draws its own start and crop"
    seed = int(np.random.SeedSequence((0, 1)).generate_state(1, np.uint64)[0])
    video = to_float(torch.from_numpy(dataset.sample(2, seed)["video"])[None])
    assert torch.allclose(tokenizer.encode(video)[0], latents[7].float(), atol=2e-3, rtol=2e-3)
    assert verify(out, dataset, tokenizer) == 10


@pytest.mark.parametrize("config", [Encoding(passes=2, shard_clips=4, batch_size=4, workers=2)])
def test_processes_and_workers_change_nothing(tmp_path, tokenizer, config):
    dataset = VideoFolder(videos(tmp_path / "in"), **SHAPE, flip=True)
    alone = run(dataset, tokenizer, tmp_path / "alone", config)
    for rank in (2, 0):
        run(dataset, tokenizer, tmp_path / "shared", config, rank=rank, world_size=3)
        assert not (tmp_path / "shared" / "index.json").exists()
        with pytest.raises(DataError, match="encoding is not finished"):
            open_dataset(tmp_path / "shared", **SHAPE)
    run(dataset, tokenizer, tmp_path / "shared", config, rank=1, world_size=3)
    assert contents(alone) == contents(tmp_path / "shared")


def test_a_stopped_run_continues(tmp_path, tokenizer):
    dataset = VideoFolder(videos(tmp_path / "in"), **SHAPE)
    whole = contents(run(dataset, tokenizer, tmp_path / "whole"))

    class Stops(torch.nn.Module):
        """A tokenizer that is killed at its second batch of the second shard."""

        compression, latent_shape = tokenizer.compression, staticmethod(tokenizer.latent_shape)
        definition = tokenizer.definition
        calls = 0

        def encode(self, video):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return tokenizer.encode(video)

    with pytest.raises(KeyboardInterrupt):
        run(dataset, Stops(), tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["files.json", "plan.json", "shard-00000.safetensors"]
    (tmp_path / "out" / "shard-00001.safetensors").write_bytes(whole["shard-00001.safetensors"][:-7])  # a torn copy
    first = (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns
    run(dataset, tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns == first, "whole shards are not made again"


def start(*arguments, write=None, **options):
    """encode in a process of its own, which pytest can kill; `write` takes the place of safetensors' save_file."""

    def work():
        torch.set_num_threads(1)  # threads do not survive the fork,
        tqdm.set_lock(threading.RLock())  # and processes of their own do not share tqdm's lock, as forked ones do
        if write is not None:
            encode.save_file = write
        run(*arguments, **options)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_process_killed_while_it_writes_leaves_nothing_wrong(tmp_path, tokenizer):
    dataset, out = VideoFolder(videos(tmp_path / "in"), **SHAPE), tmp_path / "out"
    whole = contents(run(dataset, tokenizer, tmp_path / "whole"))

    def half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if "shard-00001" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    process = start(dataset, tokenizer, out, write=half)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = sorted(set(contents(out)) - {"files.json", "plan.json", "shard-00000.safetensors"})
    assert len(left) == 1 and left[0].startswith(".shard-00001.")
    with pytest.raises(DataError, match="encoding is not finished"):
        open_dataset(out, **SHAPE)
    run(dataset, tokenizer, out)
    assert contents(out) == whole, "the half file is gone too"


def test_processes_killed_at_any_moment(tmp_path, tokenizer):
    """Three processes that start at once, killed again and again: the shards come out as if nothing had happened."""
    dataset, config = VideoFolder(videos(tmp_path / "in"), **SHAPE), Encoding(passes=8, shard_clips=2, workers=0)
    whole = contents(run(dataset, tokenizer, tmp_path / "whole", config))
    out, waits = tmp_path / "out", np.random.default_rng(0).uniform(0.01, 0.15, 6)
    for wait in waits:
        processes = [start(dataset, tokenizer, out, config, rank=rank, world_size=3) for rank in range(3)]
        time.sleep(wait)
        for process in processes:
            process.kill()
            process.join(60)
    processes = [start(dataset, tokenizer, out, config, rank=rank, world_size=3) for rank in range(3)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = contents(out)
    hidden = {name for name in found if name[0] == "."}  # at most some begun .json, never as much as a shard
    assert {name: found[name] for name in found.keys() - hidden} == whole
    assert all(".json." in name for name in hidden)


def test_a_folder_that_is_being_begun_or_was_left_so_is_taken(tmp_path, tokenizer):
    dataset, out = ShapesDataset(**SHAPE, length=2), tmp_path / "out"
    out.mkdir()
    (out / "files.json").write_text("{}")
    (out / ".plan.1.tmp.json").write_text("{")
    assert len(LatentShards(run(dataset, tokenizer, out))) == 4


def test_shards_can_be_read_by_whoever_can_read_the_folder(encoded):
    _, out = encoded
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_training_reads_shards(tmp_path, tokenizer):
    write_video(tmp_path / "in" / "a.mp4", np.zeros((9, 16, 16, 3), np.uint8))
    write_video(tmp_path / "in" / "b.mp4", np.full((9, 16, 16, 3), 255, np.uint8))
    for name, label in (("a", 0), ("b", 1)):
        np.savez(tmp_path / "in" / f"{name}.npz", actions=np.full(9, label))
    entries = [{"video_path": f"{n}.mp4", "label": k, "action_path": f"{n}.npz"} for k, n in enumerate("ab")]
    (tmp_path / "in" / "list.json").write_text(json.dumps(entries))
    dataset = open_dataset(tmp_path / "in" / "list.json", **SHAPE, interval=(1, 2), num_classes=2, num_actions=2)
    shards = open_dataset(run(dataset, tokenizer, tmp_path / "out"), **SHAPE)
    assert isinstance(shards, LatentShards) and len(shards) == 4 and shards.num_classes == 2 and shards.num_actions == 2
    assert shards.latent_shape == (3, 2, 2, 24)
    for workers in (0, 2):
        for batch in itertools.islice(batches(shards, 2, seed=0, num_workers=workers), 4):
            assert batch["latents"].shape == (2, 3, 2, 2, 24) and batch["latents"].dtype == torch.float32
            bright = batch["latents"][:, 0, 0, 0, 0] > 0
            assert torch.equal(bright.long(), batch["label"]) and set(batch["interval"].tolist()) <= {1, 2}
            assert torch.equal(batch["actions"], batch["label"][:, None].expand(2, 3))
    (report,) = check(tmp_path / "out")
    assert report.files == 4 and not report.unreadable
    assert report.labels == {0: 2, 1: 2} and report.actions == {0: 6, 1: 6}


def test_shapes_and_other_precisions(tmp_path, tokenizer):
    dataset = ShapesDataset(**SHAPE, length=5)
    for dtype in ("fp32", "bf16"):
        out = run(dataset, tokenizer, tmp_path / dtype, Encoding(shard_clips=2, dtype=dtype, workers=0))
        assert LatentShards(out).sample(4, 0)["latents"].dtype == np.float32
        assert verify(out, dataset, tokenizer, clips=5) == 5


def test_unreadable_clips_are_left_out(tmp_path, tokenizer, caplog):
    folder = videos(tmp_path / "in")
    for name in "ac":
        (folder / f"{name}.mp4").write_bytes(b"")
    shards = LatentShards(run(VideoFolder(folder, **SHAPE), tokenizer, tmp_path / "out"))
    assert len(shards) == 6 and len(caplog.records) == 2 and "a.mp4" in caplog.text and "c.mp4" in caplog.text
    for name in "bde":
        (folder / f"{name}.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 5 clips could be encoded"):
        run(VideoFolder(folder, **SHAPE), tokenizer, tmp_path / "none")


@pytest.mark.parametrize("workers", [0, 2])
def test_actions_out_of_range_stop_it(tmp_path, tokenizer, workers):
    folder = videos(tmp_path / "in")
    for name in "abcde":
        np.savez(folder / f"{name}.npz", actions=np.full(9, 7 if name == "d" else 1))
    dataset = VideoFolder(folder, **SHAPE, num_actions=4)
    with pytest.raises(DataError, match=r"d\.npz: actions reach from 7 to 7, expected in 0\.\.3"):
        run(dataset, tokenizer, tmp_path / "out", Encoding(shard_clips=4, workers=workers))


# ---- faults


def test_a_full_disk_is_one_line(tmp_path, tokenizer, monkeypatch):
    def refuse(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(encode, "save_file", refuse)
    with pytest.raises(InputError, match=r"cannot write .*shard-00000\.safetensors: .*No space left on device"):
        run(VideoFolder(videos(tmp_path / "in"), **SHAPE), tokenizer, tmp_path / "out")


@pytest.fixture
def encoded(tmp_path, tokenizer):
    dataset = VideoFolder(videos(tmp_path / "in"), **SHAPE)
    return dataset, run(dataset, tokenizer, tmp_path / "out")


def test_clips_that_are_not_finite_are_named_and_left_out(encoded, caplog):
    _, out = encoded
    file = out / "shard-00001.safetensors"
    with safe_open(file, "pt") as shard:
        metadata = shard.metadata()
    tensors = load_file(file)
    tensors["latents"][2, 0, 0, 0, 0] = torch.nan
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(UnreadableVideo, match=r"shard-00001\.safetensors: clip 2 is not finite"):
        LatentShards(out).sample(6, 0)
    got = list(itertools.islice(batches(LatentShards(out), 2, seed=0), 10))
    assert all(batch["latents"].isfinite().all() for batch in got)
    assert set(torch.cat([batch["index"] for batch in got]).tolist()) == {*range(10)} - {6}
    assert "clip 2 is not finite" in caplog.text


def test_a_shard_cut_short_is_named(encoded):
    dataset, out = encoded
    file = out / "shard-00001.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    why = rf"shard-00001\.safetensors: has {size - 10} bytes, {size} were written"
    for look in (lambda: LatentShards(out).check_readable(), lambda: open_dataset(out, **SHAPE)):
        with pytest.raises(DataError, match=why + ": run mimo encode again"):
            look()
    (report,) = check(out)
    assert len(report.unreadable) == 4 and report.files == 10
    assert str(report).count("shard-00001.safetensors") == 1 and "were written (4 clips)" in str(report)
    got = torch.cat([batch["index"] for batch in itertools.islice(batches(LatentShards(out), 2, seed=0), 10)])
    assert set(got.tolist()) == {0, 1, 2, 3, 8, 9}, "training goes on with the other shards"
    with pytest.raises(DataError, match=why):
        verify(out)
    file.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: .*No such file"):
        LatentShards(out).check_readable()
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: No such file"):
        verify(out)


def test_a_changed_byte_is_found_and_mended(encoded, tokenizer):
    dataset, out = encoded
    before = contents(out)
    data = bytearray(before["shard-00000.safetensors"])
    data[-5] ^= 1
    (out / "shard-00000.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00000\.safetensors: its checksum is not"):
        verify(out)
    (report,) = check(out)
    assert len(report.unreadable) == 4 and "its checksum is not" in str(report)
    with pytest.raises(DataError, match=r"shard-00000\.safetensors: its checksum is not .*: run mimo encode again"):
        open_dataset(out, **SHAPE)
    run(dataset, tokenizer, out)
    assert contents(out) == before


def test_a_changed_dataset_is_refused(encoded, tokenizer):
    dataset, out = encoded
    size = (dataset.path / "b.mp4").stat().st_size
    videos(dataset.path, "c")
    (dataset.path / "b.mp4").write_bytes((dataset.path / "a.mp4").read_bytes() + b"1")
    now = (dataset.path / "b.mp4").stat().st_size
    for call in (lambda: run(dataset, tokenizer, out), lambda: verify(out, dataset)):
        what = rf"changed since .*: 1 of 5 files, first .*b\.mp4: {size} bytes .* then, {now} bytes .* now"
        with pytest.raises(DataError, match=what):
            call()


@pytest.mark.parametrize("place", [0, 60_000, 100_000, -1])
def test_a_file_replaced_by_one_as_long_is_noticed_and_a_copy_is_none(tmp_path, tokenizer, place):
    file = videos(tmp_path / "in", "a") / "a.mp4"
    data = bytearray(file.read_bytes().ljust(150_000, b"\0"))
    file.write_bytes(data)
    dataset, out = VideoFolder(file, **SHAPE), tmp_path / "out"
    run(dataset, tokenizer, out)
    os.utime(file, (0, 0))
    assert verify(out, dataset) == 2
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="1 of 1 files, first .*: 150000 bytes .* then, 150000 bytes .* now"):
        verify(out, dataset)
    file.unlink()
    with pytest.raises(DataError, match=r"unreadable \(No such file or directory\) now"):
        verify(out, dataset)


def test_latents_of_another_definition_of_the_tokenizer_are_refused(encoded, tokenizer, monkeypatch):
    _, out = encoded
    shards, cut = LatentShards(out), {"interval": 1, "flip": False}
    then = checksum(tokenizer)
    shards.require_made_by("dct", tokenizer, then, **cut)
    monkeypatch.setattr(type(tokenizer), "definition", "dct 3")
    now = checksum(tokenizer)
    with pytest.raises(DataError, match=f"was encoded with tokenizer_sha256 '{then}', training has '{now}'"):
        shards.require_made_by("dct", tokenizer, now, **cut)


def test_another_tokenizer_is_noticed(encoded):
    dataset, out = encoded
    with pytest.raises(DataError, match="differs from clip .* encoded anew"):
        verify(out, dataset, build_tokenizer("dct", compression=(1, 8, 8), channels=24).apply(_halve))


def _halve(module):
    module.scale *= 0.5


def test_other_settings_are_refused(encoded, tokenizer, tmp_path):
    dataset, out = encoded
    with pytest.raises(DataError, match="was begun with passes 2, not 3"):
        run(dataset, tokenizer, out, Encoding(passes=3, shard_clips=4, workers=0))
    with pytest.raises(DataError, match=r"was begun with settings .*'flip': False"):
        run(VideoFolder(dataset.path, **SHAPE, flip=True), tokenizer, out)
    with pytest.raises(DataError, match="is not empty and was not begun"):
        run(dataset, tokenizer, tmp_path / "in")
    with pytest.raises(DataError, match="holds clips of 3 x 16 x 16, expected 3 x 32 x 32"):
        open_dataset(out, num_frames=3, height=32, width=32)
    with pytest.raises(ValueError, match="height a multiple of 8"):
        run(VideoFolder(dataset.path, num_frames=3, height=12, width=16), tokenizer, tmp_path / "x")
    for bad in ({"passes": 0}, {"dtype": "int8"}, {"seed": -1}, {"workers": -1}, {"posterior": "mode"}):
        with pytest.raises(ValueError, match="(passes|dtype|seed|workers|posterior)=.*: expected "):
            Encoding(**bad)


def test_labels_and_actions_out_of_range_are_named(tmp_path, tokenizer):
    for name, label in (("a", 0), ("b", 2)):
        write_video(tmp_path / "in" / f"{name}.mp4", np.zeros((9, 16, 16, 3), np.uint8))
        np.savez(tmp_path / "in" / f"{name}.npz", actions=np.arange(9) % (1 + label))
    entries = [{"video_path": f"{n}.mp4", "label": 2 * k, "action_path": f"{n}.npz"} for k, n in enumerate("ab")]
    (tmp_path / "in" / "list.json").write_text(json.dumps(entries))
    out = run(open_dataset(tmp_path / "in" / "list.json", **SHAPE), tokenizer, tmp_path / "out")
    assert open_dataset(out, **SHAPE).num_classes == 3 and len(open_dataset(out, **SHAPE, num_classes=9)) == 4
    for options, what in (({"num_classes": 2}, "label 2, expected 0..1"), ({"num_actions": 2}, "actions 2, expected")):
        with pytest.raises(DataError, match=rf"shard-00000\.safetensors: clip 1 has {what}"):
            open_dataset(out, **SHAPE, **options)


def test_a_clip_that_stops_decoding_while_it_is_verified_is_named(encoded, tokenizer, monkeypatch):
    dataset, out = encoded

    def stops(index, seed):
        raise UnreadableVideo(dataset.name(index), "frame 3 is damaged")

    monkeypatch.setattr(dataset, "sample", stops)
    with pytest.raises(DataError, match=r"clip \d came from .*[a-e]\.mp4, which cannot be read any more: frame 3 is"):
        verify(out, dataset, tokenizer)


def test_datasets_say_what_their_clips_carry(tmp_path, tokenizer):
    """Videos, trajectories and shards alike; what is left out is not carried."""
    videos(tmp_path / "in", "ab")
    for name in "ab":
        np.savez(tmp_path / "in" / f"{name}.npz", actions=np.zeros(9, int))
    entries = [{"video_path": f"{n}.mp4", "label": k, "action_path": f"{n}.npz"} for k, n in enumerate("ab")]
    (tmp_path / "in" / "list.json").write_text(json.dumps(entries))
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "a.npz", video=np.zeros((9, 16, 16, 3), np.uint8), actions=np.zeros(9, int))
    out = run(open_dataset(tmp_path / "in" / "list.json", **SHAPE), tokenizer, tmp_path / "out")
    for path, labels in ((tmp_path / "in" / "list.json", True), (tmp_path / "npz", False), (out, True)):
        for use in (True, False):
            dataset = open_dataset(path, **SHAPE, use_actions=use, use_labels=use)
            assert isinstance(dataset, ClipDataset)
            assert (dataset.has_labels, dataset.has_actions) == (use and labels, use)
            assert {"label", "actions"} & dataset.sample(0, 0).keys() == ({"label"} if use and labels else set()) | (
                {"actions"} if use else set()
            )
    plain = open_dataset(videos(tmp_path / "plain"), **SHAPE)
    assert not plain.has_labels and not plain.has_actions


def damage(value):
    """Texts that are no index: cut, of other types, with keys missing, renamed and added, nested deeply."""
    text = json.dumps(value)
    yield from ("", "{", "[]", "null", text[: len(text) // 2], "[" * 100_000, '{"shards":' * 100_000, text + "}")
    for key in value:
        if key != CHECKSUM:
            yield json.dumps({name: item for name, item in value.items() if name != key})
        for other in (None, "x", -1, 1.5, True, [], {}, [[]], 2**70, "../../etc/passwd"):
            if other != value[key]:
                yield json.dumps(value | {key: other})


def without_checksum(path):
    return {name: item for name, item in json.loads(path.read_text()).items() if name != CHECKSUM}


@pytest.mark.parametrize("sealed", [True, False])
def test_damaged_index(encoded, sealed):
    """With its checksum every change is found; without one, as older versions wrote it, what does not fit its type."""
    _, out = encoded
    path = out / "index.json"
    whole, value = path.read_text(), json.loads(path.read_text()) if sealed else without_checksum(path)
    may_be_other = {"dataset", "settings", "clips", "tokenizer", "tokenizer_sha256", "num_classes", "num_actions"}
    may_be_other |= {"passes", "shard_clips", "posterior"}
    for text in damage(value):
        path.write_text(text)
        try:
            LatentShards(out).check_readable()
        except DataError as error:
            assert str(error).startswith(str(out)) and "\n" not in str(error)
        else:
            there = json.loads(text)
            assert not sealed or CHECKSUM not in there
            changed = {name for name in value | there if value.get(name) != there.get(name)}
            assert changed <= may_be_other | {CHECKSUM}
    path.write_text(json.dumps(value | {"format": "other"}) if not sealed else whole)
    if not sealed:
        with pytest.raises(DataError, match="format 'other', this version reads"):
            LatentShards(out)


@pytest.mark.parametrize("name", ["plan.json", "files.json"])
def test_damaged_plan_and_files(encoded, tokenizer, name):
    dataset, out = encoded
    path = out / name
    for text in damage(json.loads(path.read_text())):
        path.write_text(text)
        with pytest.raises(DataError) as error:
            run(dataset, tokenizer, out)
        assert str(error.value).startswith(f"{out}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../in/a.safetensors", "/etc/passwd", "shard-00000.safetensors/../x", "a.mp4", ""])
def test_an_index_names_shards_and_nothing_else(encoded, name):
    _, out = encoded
    index = without_checksum(out / "index.json")
    index["shards"][1]["name"] = name
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json: shards\[1\] is refused: name .*, expected shard-00000"):
        LatentShards(out)


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused_unless_allowed(encoded, tmp_path):
    _, out = encoded
    (out / "shard-00001.safetensors").rename(tmp_path / "elsewhere")
    (out / "shard-00001.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"index\.json: .*shard-00001\.safetensors lies outside of .*--allow-outside"):
        open_dataset(out, **SHAPE)
    assert len(open_dataset(out, **SHAPE, allow_outside=True)) == 10


def test_a_shard_of_other_shapes_than_its_index_says_is_refused(encoded):
    _, out = encoded
    index = without_checksum(out / "index.json")
    index["shards"][0]["clips"] += 1
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"latents are \[4, 3, 2, 2, 24\], expected \[5, 3, 2, 2, 24\]"):
        open_dataset(out, **SHAPE)


def test_a_full_disk_leaves_nothing_that_is_believed_later(tmp_path):
    """Files above 20 KB cannot be written: shards cannot, in a process of its own."""
    folder = videos(tmp_path / "in")
    code = (
        "import resource, signal, sys; from mimo.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    command = ["encode", "--preset", "mimo-tiny", "--data", folder, "--out", out, "--workers", "0"]
    told = processes.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert told.returncode == 2 and told.stderr.count("\n") == 1, told.stderr
    assert "cannot write" in told.stderr and "File too large" in told.stderr
    assert sorted(path.name for path in out.iterdir()) == ["files.json", "plan.json"]
    assert main([str(word) for word in command]) == 0
    assert verify(out) == 5


def test_what_killed_processes_left_is_deleted_and_nothing_else(tmp_path, tokenizer):
    dataset = VideoFolder(videos(tmp_path / "in"), **SHAPE)
    out = run(dataset, tokenizer, tmp_path / "out")
    whole = sorted(file.name for file in out.iterdir())
    left = [
        ".shard-00000.12.tmp.safetensors",
        ".plan.json.12.tmp",
        ".files.json.12.tmp",
        ".tmpAb12Cd",
        ".index.json.12.tmp",
    ]
    kept = [".tmpnotes.txt", ".index.json.13.tmp", ".shard-notes"]
    for name in left + kept:
        (out / name).write_text("x")
    os.utime(out / ".index.json.12.tmp", (0, 0))  # the other one may be of a process that is writing it
    (out / ".tmpLinked").symlink_to(tmp_path / "in")
    run(dataset, tokenizer, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == sorted([*whole, *kept, ".tmpLinked"])
