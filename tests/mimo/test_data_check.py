"""`mimo data check`: counts what is there and names what cannot be read."""

import json

import numpy as np
import pytest

from mimo.data import DataError, write_video
from mimo.data.check import check, run


@pytest.fixture
def folder(tmp_path):
    for name, count, size in (("a.mp4", 20, (16, 24)), ("b.avi", 8, (16, 16)), ("sub/c.mkv", 12, (16, 24))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / name, np.full((count, *size, 3), 80, np.uint8), 25)
    (tmp_path / "bad.mp4").write_bytes(b"nonsense" * 40)
    (tmp_path / "zero.mp4").touch()
    return tmp_path


@pytest.mark.parametrize(("decode_all", "workers"), [(False, 0), (True, 0), (False, 2)])
def test_a_folder_of_videos(folder, decode_all, workers):
    (report,) = check(folder, num_frames=10, decode_all=decode_all, workers=workers)
    assert (report.files, report.kind, sorted(report.frames), report.short) == (5, "videos", [8, 12, 20], 1)
    assert report.sizes == {"16x24": 2, "16x16": 1} and report.rates == {"25": 3}
    assert [path for path, _ in report.unreadable] == [str(folder / "bad.mp4"), str(folder / "zero.mp4")]
    text = str(report)
    assert "5 videos, 3 readable, 2 not" in text and "8 to 20, median 12, 40 in all" in text
    assert (
        f"unreadable  {folder / 'bad.mp4'}: not a readable video: Invalid" in text
        and "1 have fewer than 10 frames" in text
    )


def test_two_kinds_and_actions(folder):
    video = np.zeros((6, 8, 8, 3), np.uint8)
    np.savez(folder / "t.npz", video=video, actions=[0, 0, 1, 1, 1, 2])
    np.savez(folder / "u.npz", video=video, actions=[0, 0])
    videos, trajectories = check(folder)
    assert videos.files == 5 and trajectories.files == 2
    assert trajectories.actions == {0: 2, 1: 3, 2: 1} and not trajectories.rates
    assert trajectories.unreadable == [(str(folder / "u.npz"), "holds 2 actions for the 6 frames of u.npz")]


def test_classes(folder):
    entries = [
        {"video_path": "a.mp4", "label": 0},
        {"video_path": "b.avi", "label": 3},
        {"video_path": "a.mp4", "label": 3},
    ]
    (folder / "list.json").write_text(json.dumps(entries))
    (report,) = check(folder, annotation=folder / "list.json")
    assert report.labels == {0: 1, 3: 2} and "2 (labels 0 to 3), 1 to 2 clips each" in str(report)


def test_a_layout_says_what_training_will_ask_for(folder):
    (folder / "train").mkdir()
    write_video(folder / "train" / "d.mp4", np.full((20, 16, 24, 3), 80, np.uint8))
    (report,) = check(folder, layout="kinetics600")
    assert (report.files, report.num_frames, report.short) == (1, 17, 0) and report.path.endswith("train")
    (report,) = check(folder, layout="kinetics600", num_frames=21)
    assert report.short == 1
    (folder / "list.json").write_text(json.dumps([{"video_path": "a.mp4", "label": 101}]))
    with pytest.raises(DataError, match=r"a\.mp4: label 101, expected one below num_classes 101"):
        check(folder / "list.json", layout="ucf101")
    with pytest.raises(DataError, match="unknown layout 'imagenet'"):
        check(folder, layout="imagenet")
    np.savez(folder / "train" / "d.npz", actions=np.arange(20))
    (report,) = check(folder / "train", layout="minecraft")
    assert report.unreadable == [(str(folder / "train" / "d.npz"), "actions reach from 0 to 19, expected in 0..3")]
    np.savez(folder / "train" / "d.npz", actions=np.zeros((20, 4), np.float32))  # the robot's, which are not used
    (report,) = check(folder / "train", layout="bair")
    assert not report.unreadable and report.short == 1
    (report,) = check(folder / "train")
    assert "'actions' is float32 [20, 4], expected integers [F]" in str(report)


def test_damage_inside_is_found_by_decoding_everything(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a.avi", frames, codec="mpeg4")
    data = bytearray((tmp_path / "a.avi").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = b"\x55" * 3000
    (tmp_path / "a.avi").write_bytes(data)
    (report,) = check(tmp_path, decode_all=True)
    (frames,) = report.frames
    assert 10 < frames < 40 and not report.unreadable
    assert report.damaged == [(str(tmp_path / "a.avi"), f"{frames} of 60 frames used, the next is damaged")]
    assert f"  damaged     {tmp_path / 'a.avi'}: {frames} of 60 frames used" in str(report)


def test_strict_refuses_what_is_not_whole(folder, tmp_path_factory):
    with pytest.raises(DataError, match=r"of its 5 clips 2 are unreadable, 0 damaged and 0 too short"):
        run(folder, strict=True)
    good = tmp_path_factory.mktemp("good")
    write_video(good / "a.mp4", np.full((20, 16, 16, 3), 80, np.uint8))
    run(good, strict=True)
    with pytest.raises(DataError, match="0 are unreadable, 0 damaged and 1 too short"):
        run(good, strict=True, num_frames=21)


def test_run_prints_and_refuses(folder, tmp_path_factory, capsys):
    run(folder)
    assert "5 videos, 3 readable, 2 not" in capsys.readouterr().out
    with pytest.raises(DataError, match="no such file"):
        run(folder / "missing")
    with pytest.raises(DataError, match="holds no video"):
        run(tmp_path_factory.mktemp("empty"))
    bad = tmp_path_factory.mktemp("bad")
    (bad / "a.mp4").touch()
    with pytest.raises(DataError, match="none of its 1 clips can be read"):
        run(bad)
    assert "unreadable" in capsys.readouterr().out


def test_real_data(shared_data):
    videos, trajectories = check(shared_data)
    assert videos.files == 4 and not videos.unreadable and sum(videos.frames) == 72 + 78 + 280 + 325
    assert trajectories.frames == [300] and sum(trajectories.actions.values()) == 300
