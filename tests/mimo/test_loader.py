"""mimo.data.loader: batch i depends on (dataset, seed, i) alone, ranks share nothing, bad files are passed over."""

import itertools
import logging
import os

import numpy as np
import pytest
import torch

from mimo.data import (
    DataError,
    ShapesDataset,
    UnreadableVideo,
    VideoFolder,
    batches,
    moving_shapes,
    open_dataset,
    write_video,
)
from mimo.data.loader import default_workers

SMALL = {"num_frames": 3, "height": 16, "width": 16}


def take(count, *args, **kwargs):
    return list(itertools.islice(batches(*args, **kwargs), count))


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


class Recorder:
    """Ten clips that count who reads them; those in `bad` cannot be read."""

    def __init__(self, bad=(), length=10):
        self.bad, self.length, self.read = set(bad), length, []

    def __len__(self):
        return self.length

    def sample(self, index, seed):
        self.read.append(index)
        if index in self.bad:
            raise UnreadableVideo(f"clip{index}", "is broken")
        return {"video": np.full((1, 1, 1, 3), index, np.uint8), "seed": np.int64(seed >> 1)}


def test_batches_are_repeatable_and_differ():
    dataset = ShapesDataset(**SMALL, length=7)
    a = take(6, dataset, 3, seed=1)
    assert equal(a, take(6, dataset, 3, seed=1))
    assert not equal(a, take(6, dataset, 3, seed=2))
    assert a[0]["video"].shape == (3, 3, 16, 16, 3) and a[0]["video"].dtype == torch.uint8
    walk = torch.cat([batch["index"] for batch in a])
    assert sorted(walk[:7].tolist()) == sorted(walk[7:14].tolist()) == list(range(7))
    assert walk[:7].tolist() != walk[7:14].tolist()
    first, second = walk[:7].tolist().index(4), 7 + walk[7:14].tolist().index(4)
    clips = torch.cat([batch["video"] for batch in a])
    assert not torch.equal(clips[first], clips[second]), "an epoch later the clip is cut differently"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resuming_at_any_step_continues_the_run(tmp_path, workers):
    for name in "abcde":
        write_video(
            tmp_path / f"{name}.mp4", np.random.default_rng(ord(name)).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
        )
    dataset = VideoFolder(tmp_path, **SMALL, flip=True, random_crop=True)
    whole = take(7, dataset, 2, seed=3)
    assert equal(whole[:3], take(3, dataset, 2, seed=3, num_workers=workers))
    assert equal(whole[4:], take(3, dataset, 2, seed=3, start_step=4, num_workers=workers))


def test_resuming_reads_nothing_of_earlier_steps():
    dataset = Recorder()
    late = take(1, dataset, 2, seed=0, start_step=1003)
    assert len(dataset.read) == 2 and dataset.read == late[0]["index"].tolist()


def test_ranks_share_no_clip_and_equal_one_rank():
    dataset = Recorder(length=24)
    alone = take(6, dataset, 8, seed=5)
    ranks = [take(6, dataset, 2, seed=5, rank=rank, world_size=4) for rank in range(4)]
    joined = [{k: torch.cat([rank[i][k] for rank in ranks]) for k in alone[0]} for i in range(6)]
    assert equal(alone, joined)
    seen = [torch.cat([batch["index"] for batch in rank[:3]]).tolist() for rank in ranks]
    assert sorted(itertools.chain(*seen)) == list(range(24))


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 12), (2, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_any_split_of_the_global_batch_has_the_same_clips_in_the_same_order(ranks, accumulate):
    """17 clips, of which one cannot be read, in global batches of 12: epochs end in the middle of a step."""
    dataset, steps, micro = Recorder(length=17, bad=(5,)), 5, 12 // (ranks * accumulate)
    whole = take(steps, dataset, 12, seed=5)
    numbered = [take(steps * accumulate, dataset, micro, seed=5, rank=rank, world_size=ranks) for rank in range(ranks)]
    for step in range(steps):
        parts = [numbered[part % ranks][step * accumulate + part // ranks] for part in range(ranks * accumulate)]
        assert equal([whole[step]], [{key: torch.cat([part[key] for part in parts]) for key in whole[step]}])
    resumed = take(1, dataset, micro, seed=5, rank=ranks - 1, world_size=ranks, start_step=3 * accumulate)
    assert equal(resumed, numbered[-1][3 * accumulate : 3 * accumulate + 1])


@pytest.mark.parametrize("ranks", range(1, 8))
def test_every_clip_comes_once_per_epoch_over_all_ranks(ranks):
    dataset, per_rank = Recorder(length=13), 2 * 13  # of single clips: 2 * ranks epochs, that end on any rank
    walks = [take(per_rank, dataset, 1, seed=2, rank=rank, world_size=ranks) for rank in range(ranks)]
    walk = [int(walks[place % ranks][place // ranks]["index"]) for place in range(per_rank * ranks)]
    epochs = [walk[first : first + 13] for first in range(0, len(walk), 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs) and len(epochs) == 2 * ranks


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_left_alone(workers):
    before = torch.get_rng_state()
    take(2, Recorder(), 2, seed=0, num_workers=workers)
    assert torch.equal(before, torch.get_rng_state())


def test_sample_seeds_do_not_repeat():
    seeds = torch.cat([batch["seed"] for batch in take(50, Recorder(), 10, seed=0)])
    assert seeds.unique().numel() == 500


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_reported_once_and_replaced(caplog, workers):
    with caplog.at_level(logging.WARNING, logger="mimo.data"):
        got = take(10, Recorder(bad=(3, 4)), 4, seed=0, num_workers=workers)
    assert sorted(record.getMessage() for record in caplog.records) == [f"skipped clip{i}: is broken" for i in (3, 4)]
    shown = torch.cat([batch["index"] for batch in got])
    assert set(shown.tolist()) == set(range(10)) - {3, 4}
    good = torch.cat([batch["index"] for batch in take(10, Recorder(), 4, seed=0)])
    usable = ~torch.isin(good, torch.tensor([3, 4]))
    assert torch.equal(shown[usable], good[usable]), "the other clips keep their places"
    assert equal(got[5:], take(5, Recorder(bad=(3, 4)), 4, seed=0, start_step=5))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable(workers):
    with pytest.raises(DataError, match="none of the 10 clips can be used; the first is clip") as error:
        take(1, Recorder(bad=range(10)), 4, seed=0, num_workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_for_all_of_a_dataset_is_told_in_one_line(workers):
    class Wrong(Recorder):
        def sample(self, index, seed):
            raise DataError("label 7, expected 0..3")

    with pytest.raises(DataError, match=r"Wrong object.*: label 7, expected 0\.\.3$") as error:
        take(1, Wrong(), 4, seed=0, num_workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_actions_out_of_range_stop_instead_of_being_left_out(tmp_path, workers):
    for name, highest in (("a", 3), ("b", 4)):
        actions = np.r_[np.zeros(7, int), highest]
        np.savez(tmp_path / f"{name}.npz", video=np.zeros((8, 16, 16, 3), np.uint8), actions=actions)
    dataset = open_dataset(tmp_path, **SMALL, num_actions=4)
    with pytest.raises(DataError, match=r"b\.npz: actions reach from 0 to 4, expected in 0\.\.3$"):
        take(4, dataset, 2, seed=0, num_workers=workers)


def test_one_bad_video_among_good(tmp_path, caplog):
    for name in "acd":
        write_video(tmp_path / f"{name}.mp4", np.full((5, 16, 16, 3), 50, np.uint8))
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    write_video(tmp_path / "short.mp4", np.full((2, 16, 16, 3), 50, np.uint8))
    dataset = open_dataset(tmp_path, **SMALL)
    with caplog.at_level(logging.WARNING, logger="mimo.data"):
        got = take(8, dataset, 2, seed=0)
    assert len(caplog.records) == 2
    assert any("b.mp4" in r.getMessage() for r in caplog.records)
    assert any("short.mp4: has 2 frames, but 3" in r.getMessage() for r in caplog.records)
    assert {dataset.name(int(i))[-5] for batch in got for i in batch["index"]} == set("acd")


def test_clips_that_differ_in_kind():
    class Mixed(Recorder):
        def sample(self, index, seed):
            return super().sample(index, seed) | ({"label": np.int64(1)} if index % 2 else {})

    with pytest.raises(DataError, match="clips differ in what they hold"):
        take(5, Mixed(), 4, seed=0)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"start_step": -1}, {"rank": 2, "world_size": 2}, {"seed": -1}])
def test_arguments(bad):
    with pytest.raises(ValueError, match="must be >= 1"):
        batches(**({"dataset": Recorder(), "batch_size": 1, "seed": 0} | bad))


class Counting(VideoFolder):
    """Tells in every sample how many frames were decoded so far, in the process that made it."""

    def sample(self, index, seed):
        sample = super().sample(index, seed)
        return sample | {"decoded": np.int64(self.kept.decoded), "process": np.int64(os.getpid())}


def small_videos(folder, count=3):
    for number in range(count):
        frames = moving_shapes(20, 24, 32, np.random.default_rng(number))
        write_video(folder / f"{number}.mp4", frames)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_every_frame_is_decoded_once_per_process_and_no_batch_depends_on_it(tmp_path, workers):
    dataset = Counting(small_videos(tmp_path), **SMALL, random_crop=True, flip=True, interval=(1, 3))
    got = take(40, dataset, 3, seed=4, num_workers=workers)
    for process in set(torch.cat([batch["process"] for batch in got]).tolist()):
        counts = [batch["decoded"][batch["process"] == process] for batch in got]
        assert torch.cat(counts).max() <= 3 * 20, "of three videos of 20 frames"
    forgetful = Counting(tmp_path, **SMALL, random_crop=True, flip=True, interval=(1, 3), frame_memory=0)
    plain = take(40, forgetful, 3, seed=4)
    assert plain[-1]["decoded"].max() > 5 * 3 * 20
    for key in ("video", "interval", "index"):
        assert all(torch.equal(a[key], b[key]) for a, b in zip(got, plain, strict=True))


def test_the_memory_for_frames_is_shared_by_the_workers(tmp_path):
    class Telling(VideoFolder):
        def sample(self, index, seed):
            return super().sample(index, seed) | {"used": np.int64(self.kept.used)}

    dataset = Telling(small_videos(tmp_path, 12), num_frames=3, height=96, width=128, frame_memory=4)
    used = torch.cat([batch["used"] for batch in take(40, dataset, 2, seed=0, num_workers=2)])
    assert 2**20 < used.max() <= 2 * 2**20


def test_workers_are_taken_where_they_pay(tmp_path, monkeypatch):
    shapes, files = ShapesDataset(**SMALL), VideoFolder(small_videos(tmp_path, 1), **SMALL)
    for cores, on_cpu, on_gpu in ((1, 0, 1), (2, 1, 1), (4, 1, 2), (16, 4, 8), (64, 16, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_workers(files, gpu=False) == on_cpu and default_workers(files, gpu=True) == on_gpu
        assert default_workers(shapes, gpu=False) == 0 and default_workers(shapes, gpu=True) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert default_workers(files, gpu=True, processes=8) == 1
    assert equal(take(3, files, 2, seed=0, num_workers=None), take(3, files, 2, seed=0))


def test_the_seed_of_a_clips_noise_does_not_depend_on_the_split():
    whole = take(3, Recorder(), 4, seed=1)
    halves = [take(3, Recorder(), 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        seeds = torch.cat([halves[rank][step]["noise_seed"] for rank in range(2)])
        assert torch.equal(whole[step]["noise_seed"], seeds)
    assert torch.cat([batch["noise_seed"] for batch in whole]).unique().numel() == 12
