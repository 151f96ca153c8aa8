"""mimo.data.video: exact frames in, whole files out, and a named reason for everything that cannot be read."""

import io
import os
import pickle
import socket
import struct
import sys
import zipfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mimo.data.errors import DamagedVideo, UnreadableVideo
from mimo.data.kept import KeptFrames
from mimo.data.npz import load_actions
from mimo.data.shapes import moving_shapes
from mimo.data.video import VideoReader, read_clip, to_float, to_uint8
from mimo.data.writing import contact_sheet, upscale, write_gif, write_video
from mimo.errors import InputError
from mimo.folders import atomic_path

from .. import processes


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
    kept = KeptFrames(0)
    with VideoReader(tmp_path / name, kept) as reader:
        reader.read(6, start=18, interval=6)
        decoded = kept.decoded
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
        "pickled": "pickled objects, which are never loaded",
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
    told = processes.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
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


# ---- local files only


def test_no_path_is_a_url(tmp_path, monkeypatch):
    """A file's name is never parsed: not a protocol, not a list of files, not options."""
    asked = []
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    port = server.getsockname()[1]
    monkeypatch.chdir(tmp_path)
    frames = numbered(6)
    names = [
        f"http:/127.0.0.1:{port}/x.mp4",
        "concat:a.mp4|a.mp4",
        "file:a.mp4",
        "a%03d.mp4",
        "subfile,,start,0,end,9,,:a.mp4",
    ]
    write_video("a.mp4", frames)
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        write_video(name if name.endswith(".mp4") else f"{name}.mp4", frames[:4])
        assert os.path.isfile(name)
        assert numbers(read_clip(name)) == [0, 1, 2, 3]
        os.remove(name)
        with pytest.raises(UnreadableVideo, match="No such file"):
            read_clip(name)
    with pytest.raises(TimeoutError):
        asked.append(server.accept())
    assert not asked
    server.close()


@pytest.mark.parametrize("name", ["list.mp4", "list.mkv", "list.avi"])
def test_a_list_of_files_is_no_video_whatever_its_name(tmp_path, name):
    write_video(tmp_path / "a.mp4", numbered(6))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:{tmp_path}/a.mp4\n#EXT-X-ENDLIST\n"
    for text in ("ffconcat version 1.0\nfile a.mp4\n", playlist):
        (tmp_path / name).write_text(text)
        with pytest.raises(UnreadableVideo, match="not a readable video"):
            read_clip(tmp_path / name)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    reasons = {"pipe.mp4": "is no regular file", "pipe.npz": "is no regular file", "folder.npz": "is a folder"}
    for name, why in reasons.items():
        with pytest.raises(UnreadableVideo, match=why):
            read_clip(tmp_path / name)
    with pytest.raises(UnreadableVideo, match="is no regular file"):
        read_clip("/dev/null")


# ---- damaged files


def cut_video(path, count=50, share=0.7, **options):
    """A video with its tables in front whose end is missing, as a broken download leaves it."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "12"} | options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in moving_shapes(count, 64, 64, np.random.default_rng(0)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov"])
def test_a_damaged_video_is_as_long_as_its_frames_before_the_damage(tmp_path, name):
    with VideoReader(cut_video(tmp_path / name)) as reader:
        used = reader.num_frames
        assert 15 < used < 40 and reader.damage == f"{used} of 50 frames used, the next is damaged"
        everything = reader.read(used)
        for start in range(0, used - 4, 7):
            assert np.array_equal(reader.read(4, start=start), everything[start : start + 4])
        with pytest.raises(UnreadableVideo, match=f"has {used} frames, but"):
            reader.read(used + 1)
    assert np.array_equal(read_clip(tmp_path / name), everything)


def test_damage_that_only_decoding_meets_shortens_when_it_is_met(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(60))
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = data.index(b"mdat") + 4 + (data.index(b"moov") - data.index(b"mdat")) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "a.mp4").write_bytes(data)
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert reader.num_frames == 60 and reader.damage is None
        with pytest.raises(DamagedVideo):
            reader.read(60)
        used = reader.shorten()
        assert 0 < used < 60 and reader.damage == f"{used} of 60 frames used, the next is damaged"
        assert len(reader.read(used)) == used


def test_a_video_of_which_nothing_decodes(tmp_path):
    path = cut_video(tmp_path / "a.mp4", share=1)
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 4
    data[begin:] = bytes(len(data) - begin)
    path.write_bytes(data)
    with pytest.raises(UnreadableVideo, match="none of its 50 frames decodes"), VideoReader(path) as reader:
        reader.shorten()


# ---- frames that are read again


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_frames_read_again_are_not_decoded_again(tmp_path, name):
    write_video(tmp_path / name, smooth(40))
    kept, none = KeptFrames(1 << 24), KeptFrames(0)

    def look(store):
        clips = []
        for start, interval in ((20, 1), (0, 3), (35, 1), (7, 2)):
            for crop in ((0.5, 0.5), (0.0, 1.0)):
                with VideoReader(tmp_path / name, store) as reader:
                    clips.append(reader.read(5, start=start, interval=interval, size=(16, 24), crop=crop))
        return np.stack(clips)

    first, plain = look(kept), look(none)
    assert np.array_equal(first, plain) and none.used == 0
    assert kept.decoded <= 40 < none.decoded, "each frame is decoded once"
    decoded = kept.decoded
    assert np.array_equal(look(kept), first) and kept.decoded == decoded
    with VideoReader(tmp_path / name, kept) as reader:
        reader.read(2, size=(8, 8))
    assert kept.decoded > decoded, "another size is another frame"


def test_kept_frames_stay_below_their_limit(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(40))
    limit = 10 * 40 * 56 * 3
    kept = KeptFrames(limit)
    with VideoReader(tmp_path / "a.mp4", kept) as reader:
        for start in range(0, 40, 2):
            assert np.array_equal(reader.read(1, start=start), read_clip(tmp_path / "a.mp4", 1, start=start))
    assert kept.used <= limit
    small = pickle.loads(pickle.dumps(kept))
    assert (small.limit, small.used, small.decoded) == (limit, 0, 0), "what was kept stays in its process"


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    kept = KeptFrames(1 << 24)
    for value in (30, 200):
        write_video(tmp_path / "a.mp4", np.full((4, 16, 16, 3), value, np.uint8))
        os.utime(tmp_path / "a.mp4", (value, value))
        with VideoReader(tmp_path / "a.mp4", kept) as reader:
            assert abs(reader.read(1).mean() - value) < 5


# ---- npz files that lie


def lying_npz(path, shape, *, name="video.npy", data=b"\0" * 64, file_size=None):
    """An npz file whose array claims a shape that its data do not have."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, header.getvalue() + data)
    if file_size is not None:  # as the zip archive's own directory has it
        raw = path.read_bytes()
        size = struct.pack("<I", len(header.getvalue()) + len(data))
        path.write_bytes(raw.replace(size + size, size + struct.pack("<I", file_size)))
    return path


def test_npz_files_that_claim_more_than_they_hold_take_no_memory(tmp_path):
    for shape in ((10**15, 64, 64, 3), (2**62, 2, 2, 2), (5, 64, 64, 3), (-1, 64, 64, 3)):
        with pytest.raises(UnreadableVideo, match=r"'video\.npy' claims to be uint8 .* and holds 64"):
            read_clip(lying_npz(tmp_path / "a.npz", shape), 1)
    with pytest.raises(UnreadableVideo, match=r"claims 4294967294 bytes, \d+ packed ones hold at most"):
        read_clip(lying_npz(tmp_path / "a.npz", (4, 4, 4, 1), file_size=2**32 - 2), 1)
    with pytest.raises(UnreadableVideo, match="not a readable npz file"):
        lying_npz(tmp_path / "b.npz", (10**15,), name="actions.npy")
        np.savez(tmp_path / "v.npz", video=np.zeros((2, 4, 4, 3), np.uint8))
        load_actions(tmp_path / "b.npz")


def test_npz_actions_beyond_int64(tmp_path):
    np.savez(tmp_path / "a.npz", actions=np.array([0, 2**64 - 1], np.uint64))
    with pytest.raises(UnreadableVideo, match=r"'actions' holds 18446744073709551615, expected less than 2\*\*63"):
        load_actions(tmp_path / "a.npz")


def test_npz_files_with_damaged_names_are_refused_in_one_short_line(tmp_path):
    np.savez(tmp_path / "a.npz", video=np.zeros((200, 8, 8, 3), np.uint8))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[26:28] = b"\xff\xff"  # the length of a file's name
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UnreadableVideo, match="not a readable npz file") as error:
        read_clip(tmp_path / "a.npz", 1)
    assert len(error.value.why) < 300
