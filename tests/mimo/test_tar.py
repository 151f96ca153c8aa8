"""Videos in tar shards are the videos of a folder; shards that are not whole, or hold what is not read, are refused."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from mimo.cli import main
from mimo.data import datasets, open_dataset
from mimo.data.errors import DataError
from mimo.data.writing import write_video

SHAPE = {"num_frames": 3, "height": 8, "width": 8}


def pack(shard, members, mode="w"):
    """members: name -> content."""
    with tarfile.open(shard, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return shard


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos and their annotation, in a folder."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for number in range(5):
        frames = rng.integers(0, 255, (4 + number, 16, 16, 3), dtype=np.uint8)
        write_video(folder / "sub" / f"{number}.mp4", frames)
    entries = [{"video_path": f"sub/{number}.mp4", "label": number % 3} for number in range(5)]
    (folder / "list.json").write_text(json.dumps(entries))
    return folder


def content(videos, number):
    return (videos / "sub" / f"{number}.mp4").read_bytes()


@pytest.fixture(scope="module")
def shards(videos, tmp_path_factory):
    """The same in two shards: a comma and a colon in the name, a name of more than 100 characters."""
    folder = tmp_path_factory.mktemp("shards, :of a")
    for name, numbers in (("0.tar", (0, 1, 2)), ("1.tar", (3, 4))):
        members = {}
        for number in numbers:
            key = "a long folder/" * 10 + str(number)
            members[f"{key}.mp4"] = content(videos, number)
            members[f"{key}.json"] = json.dumps({"label": number % 3, "caption": "..."}).encode()
            members[f"{key}.txt"] = b"what nobody asks for"
        pack(folder / name, members)
    return folder


@pytest.mark.parametrize("memory", [0, 16])
def test_shards_are_the_folder(videos, shards, memory):
    options = {**SHAPE, "frame_memory": memory, "random_crop": True, "flip": True}
    packed, plain = open_dataset(shards, **options), open_dataset(videos / "list.json", **options)
    assert type(packed) is datasets.TarShards and len(packed) == len(plain) == 5
    packed = pickle.loads(pickle.dumps(packed))  # as a worker has it
    for seed in (0, 1):
        for index in range(5):
            one, other = packed.sample(index, seed), plain.sample(index, seed)
            assert one.keys() == other.keys() == {"video", "label"} and one["label"] == other["label"]
            assert np.array_equal(one["video"], other["video"])
    assert packed.num_classes == 3 and packed.evaluation_order() == plain.evaluation_order()
    assert packed.sources() == [shards / "0.tar", shards / "1.tar"]
    assert packed.name(3).startswith(f"{shards / '1.tar'}: a long folder/") and packed.name(3).endswith("/3.mp4")


def test_labels_are_optional_and_one_shard_is_a_dataset(videos, tmp_path):
    alone = pack(tmp_path / "a.tar", {"x.MP4": content(videos, 0), "x.json": b'{"caption": "no class"}'})
    assert set(open_dataset(alone, **SHAPE).sample(0, 0)) == {"video"}


def test_shards_beside_what_was_unpacked_from_them_are_left_alone(videos, tmp_path):
    pack(tmp_path / "a.tar", {"x.mp4": b""})
    (tmp_path / "y.mp4").write_bytes(content(videos, 0))
    assert type(open_dataset(tmp_path, **SHAPE)) is datasets.VideoFolder


def test_data_check_knows_them(videos, shards, tmp_path, capsys):
    assert main(["data", "check", str(shards), "--num-frames", "6"]) == 0
    said = capsys.readouterr().out
    assert "5 videos in tar shards, 5 readable, 0 not" in said and "2 have fewer than 6 frames" in said
    assert "3 (labels 0 to 2), 1 to 2 clips each" in said
    half = content(videos, 4)
    pack(tmp_path / "a.tar", {"good.mp4": content(videos, 0), "bad.mp4": half[:200], "none.mp4": b""})
    assert main(["data", "check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "3 videos in tar shards, 1 readable, 2 not" in said and f"{tmp_path / 'a.tar'}: bad.mp4: not a read" in said
    assert open_dataset(tmp_path, **SHAPE).sample(0, 0)["video"].shape == (3, 8, 8, 3)


def test_shards_are_encoded(shards, tmp_path, capsys):
    words = "--model.height 2 --model.width 2 --model.frames 3 --model.video-frames 3 --workers 0".split()
    encode = ["encode", "--preset", "mimo-tiny", "--data", str(shards), "--out", str(tmp_path / "latents"), *words]
    assert main(encode) == 0
    files = json.loads((tmp_path / "latents" / "files.json").read_text())
    assert {str(shards / "0.tar"), str(shards / "1.tar")} <= files.keys()
    assert "5" in capsys.readouterr().out


def damaged(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_what_is_refused(videos, tmp_path):
    def refused(path, **options):
        with pytest.raises(DataError) as caught:
            open_dataset(path, **SHAPE, **options)
        return str(caught.value)

    clip = {"0.mp4": content(videos, 0)}
    labelled = clip | {"0.json": b'{"label": 1}'}
    whole = pack(tmp_path / "whole.tar", labelled | {"1.mp4": b"x" * 600, "1.json": b'{"label": 0}'}).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        second = archive.getmembers()[2]
    cases = {
        "by name": (pack(tmp_path / "a.tar.gz", clip, "w:gz"), "is a compressed tar, in which no clip can be found"),
        "by content": (pack(tmp_path / "a.tar", clip, "w:xz"), "is compressed (xz): expected an uncompressed tar"),
        "empty": (b"", "is no whole tar"),
        "of something else": (b"no tar at all" * 100, "is no whole tar"),
        "cut in a header": (whole[: second.offset + 100], "is no whole tar"),
        "cut before a header": (whole[: second.offset], f"damaged or cut off at byte {second.offset}"),
        "cut in a video": (whole[: second.offset_data + 300], "is no whole tar"),
        "with a damaged header": (damaged(whole, second.offset + 3), f"damaged or cut off at byte {second.offset}"),
        "without a label": (labelled | {"1.mp4": b""}, "1.mp4: has no label, though others do"),
        "with a label of another kind": (clip | {"0.json": b'{"label": "3"}'}, "0.json: label is '3'"),
        "with a label below 0": (clip | {"0.json": b'{"label": -1}'}, "label -1, expected a class"),
        "with what is no JSON": (clip | {"0.json": b"{"}, "0.json: "),
        "with actions": (clip | {"0.npz": b""}, "0.npz: actions in shards are not read: expected none, or --ignore"),
        "with no video": ({"0.json": b"{}"}, "holds no videos in tar shards"),
    }
    for name, (made, says) in cases.items():
        path = made
        if not hasattr(made, "read_bytes"):
            path = tmp_path / f"{name}.tar"
            path.write_bytes(made) if isinstance(made, bytes) else pack(path, made)
        message = refused(path)
        assert says.replace("'3'", '"3"') in message and "\n" not in message, (name, message)
    assert "classes of videos in tar shards are those of KEY.json" in refused(
        pack(tmp_path / "l.tar", clip), folder_labels=True
    )
    assert "texts in tar shards are not read" in refused(tmp_path / "l.tar", text=(4, 8))
    open_dataset(pack(tmp_path / "n.tar", clip | {"0.npz": b""}), **SHAPE, use_actions=False)
