"""mimo.data.datasets and mimo.data.shapes: what a sample holds, that it is repeatable, and what is refused."""

import json
import pickle

import numpy as np
import pytest

from mimo.data import (
    DataError,
    NpzTrajectories,
    ShapesDataset,
    UnreadableVideo,
    VideoFolder,
    moving_shapes,
    open_dataset,
    write_video,
)
from mimo.data.check import check

SMALL = {"num_frames": 4, "height": 16, "width": 16}


def numbered(count, height=16, width=24):
    values = (5 * np.arange(count) + 10).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames):
    return np.round((frames.reshape(len(frames), -1).mean(1) - 10) / 5).astype(int).tolist()


@pytest.fixture
def folder(tmp_path):
    """Two videos at the top, one in a subfolder, things that are none of our business."""
    for name in ("b.mp4", "a.avi", "deep/er/c.mkv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / name, numbered(20))
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / ".hidden.mp4").write_text("left by a copy that broke off")
    return tmp_path


def write_npz(path, count=20, actions=None, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    actions = np.arange(count) if actions is None else np.asarray(actions)
    np.savez(path, video=numbered(count, size, size), actions=actions)
    return path


def annotate(path, entries):
    path.write_text(json.dumps(entries))
    return path


# ---- samples


def test_folder_is_searched_and_sorted(folder):
    dataset = VideoFolder(folder, **SMALL)
    assert [dataset.name(i) for i in range(len(dataset))] == [
        str(folder / n) for n in ("a.avi", "b.mp4", "deep/er/c.mkv")
    ]
    assert dataset.num_classes is None and "3 videos" in repr(dataset)
    sample = dataset.sample(2, 0)
    assert list(sample) == ["video"] and sample["video"].shape == (4, 16, 16, 3) and sample["video"].dtype == np.uint8


def test_linked_folders_are_followed_once(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("links")
    (other / "clips").symlink_to(folder)
    (folder / "deep" / "loop").symlink_to(folder)
    assert len(VideoFolder(other, **SMALL)) == 3
    (other / "gone.mp4").symlink_to(folder / "missing.mp4")
    dataset = VideoFolder(other, **SMALL)
    with pytest.raises(UnreadableVideo, match=r"gone\.mp4: No such file"):
        dataset.sample(3, 0)


def test_sample_is_a_pure_function_of_index_and_seed(folder):
    dataset = VideoFolder(folder, **SMALL, random_crop=True, flip=True)
    again = pickle.loads(pickle.dumps(dataset))
    starts = set()
    for seed in range(25):
        a, b = dataset.sample(1, seed)["video"], again.sample(1, seed)["video"]
        assert np.array_equal(a, b)
        start = numbers(a)[0]
        assert numbers(a) == list(range(start, start + 4))
        starts.add(start)
    assert len(starts) > 8 and min(starts) >= 0 and max(starts) <= 16
    assert {numbers(dataset.sample(i, 3)["video"])[0] for i in range(3)} != {numbers(a)[0]}


def test_every_start_is_reached(folder):
    dataset = VideoFolder(folder, **SMALL | {"num_frames": 18})
    assert {numbers(dataset.sample(0, seed)["video"])[0] for seed in range(30)} == {0, 1, 2}
    still = VideoFolder(folder, **SMALL, random_start=False)
    assert {numbers(still.sample(0, seed)["video"])[0] for seed in range(5)} == {0}


def test_interval_and_its_fallback(folder):
    taken = numbers(VideoFolder(folder, **SMALL, interval=6).sample(0, 1)["video"])
    assert np.diff(taken).tolist() == [6, 6, 6]
    fallback = numbers(VideoFolder(folder, **SMALL, interval=7).sample(0, 1)["video"])
    assert np.diff(fallback).tolist() == [1, 1, 1]


def test_dynamic_interval(folder):
    dataset = VideoFolder(folder, **SMALL, interval=(1, 25))
    drawn = set()
    for seed in range(40):
        sample = dataset.sample(0, seed)
        assert np.diff(numbers(sample["video"])).tolist() == [sample["interval"]] * 3
        drawn.add(int(sample["interval"]))
    assert drawn == {1, 2, 3, 4, 5, 6}  # 20 frames: four of them reach at most 6 apart
    assert dataset.sample(0, 5)["interval"].dtype == np.int64


def test_crop_and_flip(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 240, 5, dtype=np.uint8)[None, None, :, None], (4, 16, 48, 3))
    write_video(tmp_path / "a.mp4", ramp)
    centre = VideoFolder(tmp_path, **SMALL).sample(0, 0)["video"].astype(float)
    assert abs(centre.mean() - ramp[:, :, 16:32].mean()) < 3
    means, slopes = set(), set()
    dataset = VideoFolder(tmp_path, **SMALL, random_crop=True, flip=True)
    for seed in range(30):
        video = dataset.sample(0, seed)["video"].astype(float)
        means.add(round(video.mean() / 10))
        slopes.add(np.sign(video[0, 0, -1, 0] - video[0, 0, 0, 0]))
    assert len(means) > 8 and slopes == {-1, 1}


def test_single_file(folder):
    assert len(open_dataset(folder / "b.mp4", **SMALL)) == 1


def test_clip_too_short_is_named(folder):
    with pytest.raises(UnreadableVideo, match=r"a\.avi: has 20 frames, but 21 were asked for"):
        VideoFolder(folder, **SMALL | {"num_frames": 21}).sample(0, 0)


# ---- actions


def test_npz_actions_follow_the_frames(tmp_path):
    write_npz(tmp_path / "x.npz", actions=np.arange(20))
    dataset = NpzTrajectories(tmp_path, **SMALL, interval=3)
    for seed in range(5):
        sample = dataset.sample(0, seed)
        assert sample["actions"].dtype == np.int64 and sample["actions"].tolist() == numbers(sample["video"])
    np.savez(tmp_path / "x.npz", video=numbered(20))
    assert list(dataset.sample(0, 0)) == ["video"]


def test_actions_beside_videos(tmp_path):
    """TECO's Minecraft layout: x.mp4 and x.npz."""
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", numbered(20))
        np.savez(tmp_path / f"{name}.npz", actions=np.arange(20))
    dataset = open_dataset(tmp_path, **SMALL, num_actions=20)
    assert isinstance(dataset, VideoFolder)
    sample = dataset.sample(1, 4)
    assert sample["actions"].tolist() == numbers(sample["video"])
    with pytest.raises(DataError, match="flip mirrors"):
        VideoFolder(tmp_path, **SMALL, flip=True)
    (tmp_path / "b.npz").unlink()
    with pytest.raises(DataError, match=r"b\.npz: missing, though 1 of the 2 videos"):
        VideoFolder(tmp_path, **SMALL)


def test_wrong_actions_are_named(tmp_path):
    write_npz(tmp_path / "short" / "x.npz", actions=np.zeros(19, int))
    with pytest.raises(UnreadableVideo, match=r"x\.npz: holds 19 actions for the 20 frames"):
        NpzTrajectories(tmp_path / "short", **SMALL).sample(0, 0)
    write_npz(tmp_path / "far" / "x.npz", actions=[5] * 20)
    with pytest.raises(UnreadableVideo, match=r"from 5 to 5, expected in 0\.\.3"):
        NpzTrajectories(tmp_path / "far", **SMALL, num_actions=4).sample(0, 0)
    write_npz(tmp_path / "far" / "y.npz", actions=[3] * 20)
    with pytest.raises(DataError, match=r"^[^:]*x\.npz: actions reach from 5 to 5"):  # though y.npz could be used
        open_dataset(tmp_path / "far", **SMALL, num_actions=4)
    write_npz(tmp_path / "below" / "x.npz", actions=[-1] * 20)
    with pytest.raises(UnreadableVideo, match="expected >= 0"):
        NpzTrajectories(tmp_path / "below", **SMALL).sample(0, 0)


# ---- annotations, classes, splits


def test_annotation_with_labels(folder):
    entries = [{"video_path": "b.mp4", "label": 7}, {"video_path": "deep/er/c.mkv", "label": 2}]
    dataset = open_dataset(folder, **SMALL, annotation=annotate(folder / "list.json", entries))
    assert len(dataset) == 2 and dataset.num_classes == 8
    assert dataset.sample(0, 0)["label"] == 7 and dataset.sample(1, 0)["label"].dtype == np.int64
    assert len(open_dataset(folder / "list.json", **SMALL)) == 2
    assert VideoFolder(folder, **SMALL, annotation=folder / "list.json", num_classes=101).num_classes == 101
    with pytest.raises(DataError, match=r"b\.mp4: label 7, expected one below num_classes 5"):
        VideoFolder(folder, **SMALL, annotation=folder / "list.json", num_classes=5)


def test_annotation_elsewhere_with_actions(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("lists")
    np.savez(other / "acts.npz", actions=np.arange(20))
    entries = [{"video_path": str(folder / "b.mp4"), "action_path": str(other / "acts.npz")}]
    sample = open_dataset(folder, **SMALL, annotation=annotate(other / "list.json", entries)).sample(0, 0)
    assert sample["actions"].tolist() == numbers(sample["video"])


def test_annotation_of_npz(tmp_path):
    write_npz(tmp_path / "t" / "x.npz")
    write_video(tmp_path / "other.mp4", numbered(4))
    dataset = open_dataset(annotate(tmp_path / "l.json", [{"video_path": "t/x.npz"}]), **SMALL)
    assert isinstance(dataset, NpzTrajectories) and len(dataset) == 1


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([{"video_path": "b.mp4"}, {"video_path": "no.mp4"}], r"1 of the 2 files it names are missing.*no\.mp4"),
        ([{"path": "b.mp4"}], r"list\.json: \[0\]\.video_path is missing and \"path\" is unknown|is missing"),
        (["b.mp4"], r'list\.json: \[0\] is "b\.mp4", expected an object'),
        ([{"video_path": 3}], r"\[0\]\.video_path is 3, expected text"),
        ([{"video_path": "b\0.mp4"}], r"\[0\]\.video_path is .*, expected text"),
        ([{"video_path": "b.mp4", "label": "3"}], r'\[0\]\.label is "3", expected a whole number or null'),
        ([{"video_path": "b.mp4", "label": -1}], r"\[0\] is refused: label -1, expected a class, 0 to 2147483647"),
        ([{"video_path": "b.mp4", "label": 2**31}], r"\[0\] is refused: label 2147483648, expected a class"),
        ([{"video_path": "b.mp4", "label": 2**70}], r"\[0\]\.label is 1180591620717411303424, expected a whole number"),
        ([{"video_path": "b.mp4", "label": True}], r"\[0\]\.label is true"),
        ([{"video_path": "b.mp4", "label": 1.5}], r"\[0\]\.label is 1\.5"),
        ([{"video_path": "b.mp4", "label": 1}, {"video_path": "a.avi"}], "entry 1 has no 'label'"),
        ([], "at least one entry"),
        ({"video_path": "b.mp4"}, "expected a list"),
        ([{"video_path": "notes.txt"}], r"notes\.txt is neither a video nor an npz file"),
    ],
)
def test_wrong_annotations(folder, entries, why):
    with pytest.raises(DataError, match=why) as error:
        open_dataset(folder, **SMALL, annotation=annotate(folder / "list.json", entries))
    assert "\n" not in str(error.value)


def test_annotation_that_is_none(folder):
    (folder / "list.json").write_text("{")
    with pytest.raises(DataError, match=r"list\.json: is damaged, not JSON"):
        open_dataset(folder, **SMALL, annotation=folder / "list.json")
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        open_dataset(folder, **SMALL, annotation=folder / "none.json")
    for text in ("[" * 100_000, '[{"video_path":' * 100_000, '[{"label": ' + "9" * 5000 + "}]", "[\xff]"):
        (folder / "list.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=r"list\.json: is damaged") as error:
            open_dataset(folder / "list.json", **SMALL)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("how", ["absolute", "parents", "link", "linked folder", "actions"])
def test_an_annotation_does_not_lead_out_of_its_folder_unasked(tmp_path, how):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        write_video(folder / "a.mp4", numbered(6))
    np.savez(outside / "a.npz", actions=np.zeros(6, int))
    (inside / "link.mp4").symlink_to(outside / "a.mp4")
    (inside / "folder").symlink_to(outside)
    entry = {
        "absolute": {"video_path": str(outside / "a.mp4")},
        "parents": {"video_path": "../out/a.mp4"},
        "link": {"video_path": "link.mp4"},
        "linked folder": {"video_path": "folder/a.mp4"},
        "actions": {"video_path": "a.mp4", "action_path": "folder/a.npz"},
    }[how]
    path = annotate(inside / "list.json", [entry])
    with pytest.raises(DataError, match=r"list\.json: .* lies outside of .*/in, expected .*--allow-outside") as error:
        open_dataset(path, **SMALL)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="lies outside of"):
        check(path)
    assert len(open_dataset(path, **SMALL, allow_outside=True)) == 1
    assert check(path, allow_outside=True)[0].files == 1
    # A link within the folder is none that leads out, nor is a folder of linked videos that no list names.
    (inside / "alias.mp4").symlink_to(inside / "a.mp4")
    assert len(open_dataset(annotate(path, [{"video_path": "alias.mp4"}]), **SMALL)) == 1
    assert len(open_dataset(inside / "folder", **SMALL, use_actions=False)) == 1


def test_split_and_folder_labels(tmp_path):
    """Kinetics: split / class / file."""
    for name in ("train/run/a.mp4", "train/jump/b.mp4", "val/run/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / name, numbered(6))
    dataset = open_dataset(tmp_path, **SMALL, split="train", folder_labels=True)
    assert [int(dataset.sample(i, 0)["label"]) for i in range(2)] == [0, 1] and dataset.num_classes == 2
    with pytest.raises(DataError, match=r"no split 'test', only the folders \['train', 'val'\]"):
        open_dataset(tmp_path, **SMALL, split="test")


def test_evaluation_order_is_balanced(folder):
    entries = [{"video_path": "b.mp4", "label": label} for label in (0, 0, 0, 1, 1, 2)]
    order = VideoFolder(folder, **SMALL, annotation=annotate(folder / "l.json", entries)).evaluation_order()
    assert order == [0, 3, 5, 1, 4, 2]
    assert VideoFolder(folder, **SMALL).evaluation_order() == [0, 1, 2]


# ---- the papers' layouts


def test_kinetics600_layout(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        write_video(tmp_path / split / "a.mp4", numbered(40, 24, 32))
    dataset = open_dataset(tmp_path, layout="kinetics600")
    starts = {numbers(dataset.sample(0, seed)["video"])[0] for seed in range(12)}
    assert len(dataset) == 1 and dataset.sample(0, 0)["video"].shape == (17, 128, 128, 3) and len(starts) > 5
    assert open_dataset(tmp_path, layout="kinetics600", split="val").name(0).endswith("val/a.mp4")


def test_ucf101_layout(tmp_path):
    """FAR's annotation; 16 frames 3 apart, or 1 apart where the clip is too short."""
    for name, count in (("long", 46), ("short", 20)):
        write_video(tmp_path / f"{name}.avi", numbered(count, 24, 32))
    entries = [{"video_path": "long.avi", "label": 100}, {"video_path": "short.avi", "label": 0}]
    path = annotate(tmp_path / "train.json", entries)
    dataset = open_dataset(path, layout="ucf101", height=64, width=64)
    for index, step, label in ((0, 3, 100), (1, 1, 0)):
        sample = dataset.sample(index, 0)
        assert sample["video"].shape == (16, 64, 64, 3) and sample["label"] == label
        assert np.diff(numbers(sample["video"])).tolist() == [step] * 15
    with pytest.raises(DataError, match="label 101, expected one below num_classes 101"):
        open_dataset(annotate(path, [{"video_path": "long.avi", "label": 101}]), layout="ucf101")


def test_minecraft_layout(tmp_path):
    """FAR's annotation and TECO's pairs of files give the same."""
    write_video(tmp_path / "a.mp4", numbered(40))
    np.savez(tmp_path / "a.npz", actions=np.arange(40) % 4)
    path = annotate(tmp_path / "train.json", [{"video_path": "a.mp4", "action_path": "a.npz"}])
    small = {"num_frames": 30, "height": 16, "width": 16}
    pairs, listed = (open_dataset(where, layout="minecraft", **small) for where in (tmp_path, path))
    a, b = pairs.sample(0, 7), listed.sample(0, 7)
    assert a.keys() == b.keys() == {"video", "actions"} and all(np.array_equal(a[key], b[key]) for key in a)
    assert a["actions"].tolist() == [n % 4 for n in numbers(a["video"])]


def test_dmlab_layout(tmp_path):
    write_npz(tmp_path / "train" / "0" / "7.npz", count=301, actions=np.arange(301) % 3, size=64)
    dataset = open_dataset(tmp_path, layout="dmlab", split="train")
    sample = dataset.sample(0, 0)
    assert sample["video"].shape == (300, 64, 64, 3) and sample["actions"].shape == (300,)
    assert sample["actions"][0] == (0 if (sample["video"][0] == 10).all() else 1)


def test_bair_layout(tmp_path):
    """The annotation names actions that are not classes; they are left alone."""
    write_video(tmp_path / "a.avi", numbered(30, 64, 64))
    np.savez(tmp_path / "a.npz", actions=np.zeros((30, 4), np.float32))
    path = annotate(tmp_path / "train.json", [{"video_path": "a.avi", "action_path": "a.npz"}])
    for where in (tmp_path, path):
        sample = open_dataset(where, layout="bair", flip=True).sample(0, 0)
        assert list(sample) == ["video"] and sample["video"].shape == (30, 64, 64, 3)


def test_unknown_layout(tmp_path):
    with pytest.raises(DataError, match="unknown layout 'imagenet': known layouts are kinetics600, ucf101"):
        open_dataset(tmp_path, layout="imagenet")


def test_videos_of_different_sizes_batch_together(tmp_path):
    for name, height, width in (("a", 24, 32), ("b", 48, 20), ("c", 16, 16)):
        write_video(tmp_path / f"{name}.mp4", numbered(6, height, width))
    dataset = VideoFolder(tmp_path, **SMALL, random_crop=True)
    assert {dataset.sample(index, 0)["video"].shape for index in range(3)} == {(4, 16, 16, 3)}


# ---- open_dataset refuses


def test_what_open_dataset_refuses(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match="no such file or folder"):
        open_dataset(folder / "missing", **SMALL)
    with pytest.raises(DataError, match="holds no video and no npz file"):
        open_dataset(empty, **SMALL)
    for path in ("/dev/null", "/dev/null/x"):
        with pytest.raises(DataError, match="/dev/null: is neither a file nor a folder|/dev/null/x: Not a directory"):
            open_dataset(path, **SMALL)
    with pytest.raises(DataError, match="holds no video"):
        open_dataset(folder / "notes.txt", **SMALL)
    write_npz(folder / "x.npz")
    with pytest.raises(DataError, match="holds 3 videos and 1 npz trajectories"):
        open_dataset(folder, **SMALL)
    for bad in ({"num_frames": 0}, {"interval": 0}, {"interval": (3, 2)}, {"height": 0}):
        with pytest.raises(ValueError, match="expected all >= 1"):
            VideoFolder(folder, **SMALL | bad)


def test_fully_unreadable_folder(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "b.mp4").write_bytes(b"junk" * 100)
    with pytest.raises(
        DataError, match=r"none of its 2 videos can be used; the first is .*a\.mp4: not a readable video: Invalid"
    ):
        open_dataset(tmp_path, **SMALL)
    write_video(tmp_path / "c.mp4", numbered(3))
    with pytest.raises(DataError, match="none of its 3 videos"):
        open_dataset(tmp_path, **SMALL)
    write_video(tmp_path / "d.mp4", numbered(4))
    assert len(open_dataset(tmp_path, **SMALL)) == 4


def test_real_data(shared_data):
    clips = open_dataset(shared_data / "clips", num_frames=17, height=64, width=64)
    assert len(clips) == 4
    for index in range(4):
        video = clips.sample(index, 0)["video"]
        assert video.shape == (17, 64, 64, 3) and video.std() > 10
    dmlab = open_dataset(shared_data / "dmlab_5.npz", num_frames=16, height=64, width=64, num_actions=4)
    sample = dmlab.sample(0, 0)
    with np.load(shared_data / "dmlab_5.npz") as arrays:
        video, actions = arrays["video"], arrays["actions"]
    starts = [t for t in range(285) if np.array_equal(video[t : t + 16], sample["video"])]
    assert any(np.array_equal(actions[t : t + 16], sample["actions"]) for t in starts)


# ---- shapes


def test_shapes_are_repeatable_and_distinct():
    dataset = open_dataset("shapes", num_frames=6, height=32, width=48, length=10)
    assert isinstance(dataset, ShapesDataset) and len(dataset) == 10
    a = dataset.sample(3, 5)["video"]
    assert a.shape == (6, 32, 48, 3) and a.dtype == np.uint8
    assert np.array_equal(a, dataset.sample(3, 5)["video"])
    others = [dataset.sample(3, 6)["video"], dataset.sample(4, 5)["video"]]
    assert all(np.abs(a.astype(int) - other).mean() > 5 for other in others)
    with pytest.raises(ValueError, match="expected all >= 1"):
        ShapesDataset(num_frames=0, height=8, width=8)


def test_shapes_move_over_a_still_background():
    for seed in range(10):
        clip = moving_shapes(8, 64, 64, np.random.default_rng(seed), shapes=(1, 1)).astype(int)
        changed = np.abs(np.diff(clip, axis=0)).max(-1) > 8  # [F - 1, H, W]
        share = changed.mean((1, 2))
        assert share.max() > 0.005, "something moves"
        assert (~changed.any(0)).mean() > 0.3, "the rest stands still"


def test_shapes_are_smooth_in_time():
    """Halving the frame rate is the same motion at twice the speed: no jumps."""
    clip = moving_shapes(32, 64, 64, np.random.default_rng(2), speed=(0.01, 0.01)).astype(float)
    step = np.abs(np.diff(clip, axis=0)).mean((1, 2, 3))
    assert step.max() < 4 * max(np.median(step), 0.2)


def test_a_trajectory_without_actions_among_others_is_unreadable(tmp_path):
    video = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", video=video)
    np.savez(tmp_path / "b.npz", video=video, actions=np.arange(3))
    dataset = NpzTrajectories(tmp_path, num_frames=3, height=4, width=4)
    assert dataset.has_actions and dataset.sample(1, 0)["actions"].tolist() == [0, 1, 2]
    with pytest.raises(UnreadableVideo, match="a.npz: holds no actions, though other files do"):
        dataset.sample(0, 0)
    assert "actions" not in NpzTrajectories(tmp_path, num_frames=3, height=4, width=4, use_actions=False).sample(0, 0)


def test_a_refusal_quotes_no_kilobyte_of_the_file(tmp_path):
    np.savez(tmp_path / "a.npz", video=np.zeros((3, 4, 4, 3), np.uint8))
    data = (tmp_path / "a.npz").read_bytes()
    # Where zip keeps the length of the name in front of the member: zipfile quotes all that it then takes for a name.
    (tmp_path / "a.npz").write_bytes(data[:26] + (300).to_bytes(2, "little") + data[28:])
    with pytest.raises(UnreadableVideo, match="a.npz: not a readable npz file") as caught:
        NpzTrajectories(tmp_path, num_frames=3, height=4, width=4).sample(0, 0)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
