"""mimo.data.video: exact frames in, whole files out, and a named reason for everything that cannot be read."""

import os
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mimo.data.shapes import moving_shapes
from mimo.data.video import (
    UnreadableVideo,
    VideoReader,
    atomic_path,
    contact_sheet,
    read_clip,
    to_float,
    to_uint8,
    upscale,
    write_gif,
    write_video,
)
from mimo.errors import InputError


def numbered(count, height=32, width=48):
    """Frames that tell their number: frame i is grey 5 i + 10."""
    values = (5 * np.arange(count) + 10).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames):
    return np.round((frames.reshape(len(frames), -1).mean(1) - 10) / 5).astype(int).tolist()


def smooth(count=6, height=40, width=56):
    y, x, t = np.meshgrid(np.arange(height), np.arange(width), np.arange(count), indexing="ij")
    channels = [128 + 90 * np.sin(0.05 * (x + k * y) + 0.3 * t + 0.3 * k) for k in range(3)]
    return np.stack(channels, -1).transpose(2, 0, 1, 3).astype(np.uint8)


FORMATS = [("a.mp4", None), ("a.mkv", None), ("a.avi", None), ("a.mov", None), ("a.webm", None), ("b.avi", "mpeg4")]


@pytest.mark.parametrize(("name", "codec"), FORMATS)
def test_round_trip(tmp_path, name, codec):
    frames = smooth()
    write_video(tmp_path / name, frames, 12.5, codec=codec)
    with VideoReader(tmp_path / name) as reader:
        assert (reader.num_frames, reader.height, reader.width) == frames.shape[:3]
        assert reader.fps == pytest.approx(12.5)
    back = read_clip(tmp_path / name)
    assert back.dtype == np.uint8 and back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 4
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("name", "codec"), FORMATS)
def test_every_start_and_interval_gives_the_named_frames(tmp_path, name, codec):
    write_video(tmp_path / name, numbered(40), 10, codec=codec)
    with VideoReader(tmp_path / name) as reader:
        for start in range(0, 36, 5):
            for interval in (1, 3):
                count = min(4, (39 - start) // interval + 1)
                clip = reader.read(count, start=start, interval=interval)
                assert numbers(clip) == list(range(start, start + count * interval, interval))
    assert numbers(read_clip(tmp_path / name, start=37)) == [37, 38, 39]
    assert numbers(read_clip(tmp_path / name, start=1, interval=13)) == [1, 14, 27]


def test_variable_frame_rate_and_key_frames(tmp_path):
    """Frame i is the i-th shown frame, whatever its time stamp, and seeking lands on the right key frame."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"g": "7", "bf": "3", "crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i, frame in enumerate(numbered(30)):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts = i * i + 3 * i
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    with VideoReader(tmp_path / "a.mkv") as reader:
        for start in range(28):
            assert numbers(reader.read(3, start=start)) == [start, start + 1, start + 2]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "mpeg4"), ("a.webm", "libvpx-vp9")])
def test_frames_that_nobody_needs_are_not_decoded(tmp_path, name, codec):
    """Leaving them out changes no pixel of the others. Only the first two have frames that no other refers to."""
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"bf": "3", "g": "20"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in moving_shapes(50, 48, 64, np.random.default_rng(3), speed=(0.05, 0.1)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / name)) as container:
        everything = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(everything) == 50
    with VideoReader(tmp_path / name) as reader:
        for start in range(0, 47, 3):
            for interval in (1, 2, 5):
                wanted = range(start, min(50, start + 6 * interval), interval)
                clip = reader.read(len(wanted), start=start, interval=interval)
                assert all(np.array_equal(clip[i], everything[n]) for i, n in enumerate(wanted)), (start, interval)
        decoded = len(list(reader._frames(range(18, 49, 6))))
    assert decoded <= 40 or codec == "libvpx-vp9"


def test_resize_covers_and_crops(tmp_path):
    frames = np.zeros((2, 40, 120, 3), np.uint8)
    frames[:, :, :40, 0], frames[:, :, 40:80, 1], frames[:, :, 80:, 2] = 200, 200, 200  # red, green, blue thirds
    write_video(tmp_path / "a.mp4", frames)
    for crop, channel in (((0.5, 0.0), 0), ((0.5, 0.5), 1), ((0.5, 1.0), 2)):
        clip = read_clip(tmp_path / "a.mp4", 2, size=(20, 20), crop=crop)
        assert clip.shape == (2, 20, 20, 3)
        middle = clip[:, 4:-4, 4:-4].reshape(-1, 3).mean(0)
        assert middle[channel] > 180 and np.delete(middle, channel).max() < 25
    assert read_clip(tmp_path / "a.mp4", 1, size=(80, 100)).shape == (1, 80, 100, 3)  # magnified


def test_odd_and_tiny_sizes(tmp_path):
    frames = smooth(3, 33, 17)
    write_video(tmp_path / "odd.mp4", frames)
    back = read_clip(tmp_path / "odd.mp4")
    assert back.shape == (3, 34, 18, 3)
    assert np.abs(back[:, :33, :17].astype(int) - frames).mean() < 5
    tiny = np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3)
    write_video(tmp_path / "tiny.mp4", tiny, min_side=10)
    assert read_clip(tmp_path / "tiny.mp4").shape == (2, 12, 20, 3)
    assert np.array_equal(upscale(tiny, 10)[:, ::4, ::4], tiny) and upscale(tiny, 3) is tiny
    write_video(tmp_path / "one.mp4", tiny[:1, :1, :1])
    assert read_clip(tmp_path / "one.mp4").shape == (1, 2, 2, 3)


def damaged_files(folder):
    write_video(folder / "good.mp4", smooth(30))
    whole = (folder / "good.mp4").read_bytes()
    contents = {"zero.mp4": b"", "noise.mp4": bytes(range(256)) * 20, "text.avi": b"not a video\n" * 50}
    contents |= {"cut.mp4": whole[: len(whole) // 2], "head.mp4": whole[:40], "tail.mkv": whole[-200:]}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.mp4").mkdir()
    return [*contents, "folder.mp4", "missing.mp4"]


def test_unreadable_files_are_named(tmp_path):
    for name in damaged_files(tmp_path):
        with pytest.raises(UnreadableVideo) as error:
            read_clip(tmp_path / name, 1)
        assert error.value.path == str(tmp_path / name) and str(error.value).startswith(error.value.path)
        assert error.value.why and "\n" not in str(error.value)


def test_truncated_with_index_in_front_keeps_its_whole_frames(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 10**6
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with VideoReader(tmp_path / "cut.mp4") as reader:
        assert 10 < reader.num_frames < 25
        kept = reader.read(reader.num_frames)
        assert np.array_equal(kept, read_clip(tmp_path / "a.mp4", reader.num_frames))
        with pytest.raises(UnreadableVideo, match=f"has {reader.num_frames} frames, but 30"):
            reader.read(30)


def test_bytes_changed_in_the_middle_never_crash(tmp_path):
    write_video(tmp_path / "good.mp4", smooth(30))
    whole = np.frombuffer((tmp_path / "good.mp4").read_bytes(), np.uint8)
    outcomes = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        bad = whole.copy()
        begin = rng.integers(0, len(bad) - 200)
        bad[begin : begin + 200] = rng.integers(0, 256, 200)
        (tmp_path / "bad.mp4").write_bytes(bad.tobytes())
        try:
            assert read_clip(tmp_path / "bad.mp4", 30, size=(16, 16)).shape == (30, 16, 16, 3)
            outcomes.add("read")
        except UnreadableVideo as error:
            assert str(tmp_path / "bad.mp4") in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_asking_for_too_much(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(10))
    with pytest.raises(UnreadableVideo, match=r"has 10 frames, but 16 were asked for \(start 0, interval 1\)"):
        read_clip(tmp_path / "a.mp4", 16)
    with pytest.raises(UnreadableVideo, match=r"start 2, interval 3"):
        read_clip(tmp_path / "a.mp4", 4, start=2, interval=3)
    with pytest.raises(UnreadableVideo, match="has 10 frames"):
        read_clip(tmp_path / "a.mp4", start=10)
    for bad in ({"num_frames": 0}, {"num_frames": 1, "start": -1}, {"num_frames": 1, "interval": 0}):
        with pytest.raises(ValueError, match="must be >= 1"):
            read_clip(tmp_path / "a.mp4", **bad)


def test_npz(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (20, 16, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", video=video)
    assert np.array_equal(read_clip(tmp_path / "a.npz", 4, start=3, interval=5), video[3:19:5])
    assert read_clip(tmp_path / "a.npz", 2, size=(8, 8)).shape == (2, 8, 8, 3)
    np.savez(tmp_path / "b.npz", frames=video)
    np.savez(tmp_path / "c.npz", video=video.astype(np.float32))
    np.savez(tmp_path / "d.npz", video=video, actions=np.zeros((20, 2)))
    np.savez(tmp_path / "pickled.npz", video=np.array([{"a": 1}], dtype=object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-500])
    (tmp_path / "zero.npz").touch()
    (tmp_path / "text.npz").write_text("not what its name says")
    reasons = {
        "text": "it is no zip archive",
        "b": "no array 'video'",
        "c": "float32",
        "d": "'actions' is float64",
        "pickled": "allow_pickle",
    }
    for name, why in (reasons | {"cut": "not a readable npz", "zero": "it is empty", "none": "No such"}).items():
        with pytest.raises(UnreadableVideo, match=why):
            read_clip(tmp_path / f"{name}.npz", 1)


def test_conversion_is_exact():
    video = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16, 1).expand(2, 4, 4, 16, 3)
    x = to_float(video)
    assert x.shape == (2, 4, 3, 4, 16) and x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), video)
    single = torch.zeros(1, 2, 2, 3)
    to_float(single)
    assert single.eq(0).all(), "the argument is left alone"
    assert torch.equal(
        to_uint8(torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1)).flatten(), torch.tensor([0, 128, 255]).byte()
    )


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = write_gif(tmp_path / "a.gif", smooth(2))
    before = path.read_bytes()
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.gif"]


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_writers_refuse_other_arrays(tmp_path, frames):
    for call in (write_video, write_gif, lambda path, frames: contact_sheet(path, {"a": frames})):
        with pytest.raises(ValueError, match="expected uint8"):
            call(tmp_path / "a.mp4", frames)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fps", [0, -3, float("nan"), 1e-4, 1e9])
def test_writers_refuse_rates(tmp_path, fps):
    for write, name in ((write_video, "a.mp4"), (write_gif, "a.gif")):
        with pytest.raises(ValueError, match="expected 0.01 to 1000 frames per second"):
            write(tmp_path / name, smooth(2), fps)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^cannot write .*file/a\.gif: File exists$"):
        write_gif(tmp_path / "file" / "a.gif", smooth(1))
    code = (
        "import resource, signal, sys, numpy; from mimo.data import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
        "rng = numpy.random.default_rng(0); frames = rng.integers(0, 256, (4, 64, 64, 3), dtype=numpy.uint8)\n"
        "for name, write in (('a.mp4', write_video), ('a.gif', write_gif)):\n"
        "    try: write(f'{sys.argv[1]}/{name}', frames)\n"
        "    except ValueError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert told.stdout.splitlines() == [f"cannot write {tmp_path}/a.{kind}: File too large" for kind in ("mp4", "gif")]
    assert os.listdir(tmp_path) == ["file"]


def test_unknown_container(tmp_path):
    with pytest.raises(ValueError, match="expected one of"):
        write_video(tmp_path / "a.xyz", smooth(1))


def test_gif_plays_forever(tmp_path):
    write_gif(tmp_path / "a.gif", smooth(5), fps=8, min_side=80)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (112, 80) and gif.info["loop"] == 0 and gif.info["duration"] == 120


def test_contact_sheet_marks_the_context(tmp_path):
    orange = np.array([235, 120, 20])
    grey = np.full((6, 32, 32, 3), (90, 40, 200), np.uint8)
    path = contact_sheet(tmp_path / "a.png", {"truth": grey, "prediction": grey}, 2, min_side=32)
    sheet = np.asarray(Image.open(path))
    full_width = (sheet == orange).all(-1).sum(1) >= 2 * 38  # rows of pixels that both context borders cover
    assert full_width.sum() == 2 * 2 * 3  # two rows of frames, top and bottom edge, three pixels each
    inside = (sheet == (90, 40, 200)).all(-1).sum()
    assert inside == 2 * 6 * 32 * 32
    plain = np.asarray(Image.open(contact_sheet(tmp_path / "b.png", {"truth": grey}, min_side=32)))
    assert not (plain == orange).all(-1).any()


def test_contact_sheet_thins_long_rows_and_bears_short_ones(tmp_path):
    long, short = np.full((300, 16, 16, 3), (90, 40, 200), np.uint8), np.full((4, 16, 16, 3), (0, 60, 0), np.uint8)
    path = contact_sheet(tmp_path / "a.png", {"long": long, "short": short}, 1, min_side=16, max_columns=10)
    sheet = np.asarray(Image.open(path))
    assert (sheet == (90, 40, 200)).all(-1).sum() == 10 * 256 and (sheet == (0, 60, 0)).all(-1).sum() == 256
    with pytest.raises(ValueError, match="rows is empty"):
        contact_sheet(tmp_path / "b.png", {})


def test_real_clips_seek_exactly(shared_data):
    for path in sorted((shared_data / "clips").glob("*.mp4")):
        with VideoReader(path) as reader:
            everything = reader.read(reader.num_frames, size=(24, 24))
            for start in (0, 17, reader.num_frames - 4):
                assert np.array_equal(reader.read(4, start=start, size=(24, 24)), everything[start : start + 4])
            assert np.array_equal(reader.read(5, start=2, interval=7, size=(24, 24)), everything[2:31:7])
