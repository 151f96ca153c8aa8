"""One rule for damaged videos: training, `encode`, `data check` and `demo` use the same frames of one and say so
alike."""

import itertools
import logging

import av
import numpy as np
import pytest
import torch

from mimo.config import Encoding
from mimo.data import LatentShards, batches, moving_shapes, open_dataset, write_video
from mimo.data.check import check
from mimo.data.encode import write_shards
from mimo.demo.clips import read_windows
from mimo.tokenizers import build_tokenizer

SHAPE = {"num_frames": 3, "height": 16, "width": 16}


def cut_video(path, share, options):
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in moving_shapes(50, 64, 64, np.random.default_rng(0)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def zero_middle(path):
    """Damage that only decoding meets: 400 bytes of the pictures become zero."""
    write_video(path, moving_shapes(50, 64, 64, np.random.default_rng(1)))
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + 4 + (data.index(b"moov") - data.index(b"mdat")) // 2
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)


@pytest.fixture(params=["cut", "hidden"])
def damaged(request, tmp_path):
    """A folder with a damaged video beside a good one, and what is used of it."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "good.mp4", moving_shapes(50, 64, 64, np.random.default_rng(2)))
    if request.param == "cut":
        cut_video(folder / "bad.mp4", 0.7, {"g": "12"})
    else:
        zero_middle(folder / "bad.mp4")
    (report,) = check(folder)
    ((path, words),) = report.damaged
    assert path == str(folder / "bad.mp4") and not report.unreadable and report.files == 2
    used = int(words.split()[0])
    assert 10 < used < 50 and words == f"{used} of 50 frames used, the next is damaged"
    assert sorted(report.frames) == [used, 50]
    return folder, used, words


@pytest.mark.parametrize("workers", [0, 2])
def test_training_uses_the_frames_before_the_damage(damaged, caplog, workers):
    folder, used, words = damaged
    dataset = open_dataset(folder, **SHAPE | {"num_frames": used - 2})
    with caplog.at_level(logging.WARNING, logger="mimo.data"):
        got = list(itertools.islice(batches(dataset, 2, seed=0, num_workers=workers), 6))
    assert sorted(torch.cat([batch["index"] for batch in got]).tolist()) == [0] * 6 + [1] * 6
    assert [record.getMessage() for record in caplog.records] == [f"{folder / 'bad.mp4'}: {words}"]
    whole = open_dataset(folder / "bad.mp4", **SHAPE | {"num_frames": used}, random_start=False).sample(0, 0)["video"]
    for batch in got:
        clip = batch["video"][batch["index"].tolist().index(0)].numpy()
        assert any(np.array_equal(clip, whole[start : start + used - 2]) for start in range(3))
    with pytest.raises(ValueError, match=rf"bad\.mp4: has {used} frames, but {used + 1} were asked for"):
        open_dataset(folder / "bad.mp4", **SHAPE | {"num_frames": used + 1})


def test_encoding_uses_them_too(damaged, tmp_path, caplog):
    folder, used, words = damaged
    dataset = open_dataset(folder, **SHAPE | {"num_frames": used - 2})
    tokenizer = build_tokenizer("dct", compression=(1, 8, 8), channels=24)
    config = Encoding(passes=3, batch_size=2, workers=0)
    out = write_shards(dataset, tokenizer, tmp_path / "out", config, tokenizer_name="dct")
    assert len(LatentShards(out)) == 6 and [record.getMessage() for record in caplog.records] == [
        f"{folder / 'bad.mp4'}: {words}"
    ]


def test_the_demo_uses_them_too(damaged, capsys):
    folder, used, words = damaged
    windows = read_windows(folder, 4, 16, 16, 1)
    assert sorted(len(video) for _, video, _ in windows.clips) == [used, 50]
    assert f"{folder / 'bad.mp4'}: {words}" in capsys.readouterr().out
