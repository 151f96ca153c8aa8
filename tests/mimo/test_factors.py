"""mimo.data.factors: every factor is in the picture, balanced, and independent of what a single frame gives away."""

import hashlib

import numpy as np
import pytest

from mimo.cli.options import Clips
from mimo.data import FACTORS, FactorClips, open_dataset
from mimo.data.factors import BLOCK, SPEEDS, draw_clip, mirrored
from mimo.data.shapes import draw_shape
from mimo.errors import InputError

NONE = {"occlusion": 0, "number": 0, "shape": 0, "texture": 0, "speed": 1, "direction": 0}


def clips(**options) -> FactorClips:
    return FactorClips(**{"num_frames": 3, "height": 32, "width": 32} | options)


def drawn(frames: int = 4, height: int = 48, width: int = 48, seed: int = 0, **factors: int) -> np.ndarray:
    return draw_clip(frames, height, width, NONE | factors, np.random.default_rng(seed)).astype(float)


def changes(clip: np.ndarray) -> np.ndarray:
    """The share of pixels that change from frame to frame."""
    return (np.abs(np.diff(clip, axis=0)).max(-1) > 8).mean()


def test_a_sample_follows_from_split_index_and_seed():
    dataset = clips()
    sample = dataset.sample(5, 7)
    assert sample["video"].shape == (3, 32, 32, 3) and sample["video"].dtype == np.uint8
    assert sample["factors"].tolist() == [*dataset.factors(5).values()]
    again = clips().sample(5, 7)
    assert np.array_equal(sample["video"], again["video"])
    other = dataset.sample(5, 8)
    assert np.array_equal(sample["factors"], other["factors"]) and not np.array_equal(sample["video"], other["video"])
    assert "label" not in sample and not dataset.has_labels
    labelled = clips(label="texture")
    assert labelled.num_classes == 4 and labelled.sample(5, 7)["label"] == dataset.factors(5)["texture"]


def test_train_and_test_share_no_clip():
    digests = {
        hashlib.sha256(clips(split=split).sample(index, seed)["video"].tobytes()).digest()
        for split in ("train", "test")
        for index in range(24)
        for seed in range(4)
    }
    assert len(digests) == 2 * 24 * 4
    factors = [[tuple(clips(split=split).factors(i).values()) for i in range(BLOCK)] for split in ("train", "test")]
    assert factors[0] != factors[1], "nor the order of factors"


@pytest.mark.parametrize("split", ["train", "test"])
def test_factors_are_balanced_and_independent(split):
    dataset = clips(split=split)
    found = np.array([[*dataset.factors(index).values()] for index in range(40 * BLOCK)])
    for column, classes in zip(found.T, FACTORS.values(), strict=True):
        for block in column.reshape(-1, BLOCK):
            assert np.bincount(block, minlength=len(classes)).tolist() == [BLOCK // len(classes)] * len(classes)
    for i in range(found.shape[1]):
        for j in range(i):
            table = np.zeros((found[:, i].max() + 1, found[:, j].max() + 1))
            np.add.at(table, (found[:, i], found[:, j]), 1)
            expected = len(found) / table.size
            assert ((table - expected) ** 2 / expected).sum() < 3 * table.size, "chi-squared of two factors"


@pytest.mark.parametrize("direction", range(8))
def test_shapes_go_where_the_direction_says(direction):
    """The best shift from one frame to the next, of a torus; the background nearly stands still."""
    before, after = (frame.mean(-1) for frame in drawn(2, seed=direction, speed=2, direction=direction))
    angle = np.pi / 4 * direction
    expected = SPEEDS[2] * 48 * np.array([np.sin(angle), np.cos(angle)])
    shifts = [(y, x) for y in range(-7, 8) for x in range(-7, 8)]
    scores = [np.abs(np.roll(before, shift, (0, 1)) - after)[np.abs(before - after) > 8].sum() for shift in shifts]
    assert np.linalg.norm(shifts[int(np.argmin(scores))] - expected) < 1.6


def test_speed_number_and_occlusion_are_seen():
    slow, medium, fast = (np.mean([changes(drawn(seed=s, speed=k)) for s in range(6)]) for k in range(3))
    assert slow < medium < fast
    one, two, three = (np.mean([changes(drawn(seed=s, number=k)) for s in range(6)]) for k in range(3))
    assert 1.5 * one < two and 1.2 * two < three
    for seed in range(4):  # behind the fence fewer pixels change than before it, with the same shapes
        free, before, behind = (drawn(seed=seed, occlusion=k, speed=2) for k in range(3))
        posts = np.abs(behind[0] - behind[-1]).max(-1) == 0
        assert posts.mean() > 0.15
        assert changes(behind) < changes(free) and before.shape == free.shape


def test_what_leaves_comes_in_on_the_other_side():
    """As much of a disc is in the picture wherever its centre is, and without wrapping less of it near the border."""
    edge = np.linspace(0, 48, 16, endpoint=False)
    centers, colour, found = np.stack([edge, edge[::-1]], 1), np.ones(3, np.float32), []
    for wrap in (True, False):
        frames = np.zeros((16, 48, 48, 3), np.float32)
        draw_shape(frames, centers, np.zeros(16, np.float32), 7.0, 1, "plain", 7.0, colour, colour, wrap=wrap)
        found.append(frames[..., 0].sum((1, 2)))
    assert np.allclose(found[0], np.pi * 49, rtol=0.01)
    assert found[1].min() < 0.6 * np.pi * 49 and np.isclose(found[1].max(), np.pi * 49, rtol=0.01)


def test_where_shapes_are_in_a_frame_says_nothing_of_their_motion():
    """The first frame is the same, whatever the speed and the direction; and as places are drawn uniformly over a
    torus, every later one is as likely."""
    expected = drawn(1)
    for direction in range(8):
        for speed in range(3):
            assert np.array_equal(drawn(1, direction=direction, speed=speed), expected)


def test_a_mirror_turns_the_direction_alone():
    sample = clips(num_frames=2).sample(3, 1)
    turned = mirrored(sample["factors"])
    names = [*FACTORS]
    differing = [name for name, a, b in zip(names, sample["factors"], turned, strict=True) if a != b]
    assert set(differing) <= {"direction"}
    words = FACTORS["direction"]
    for direction, word in enumerate(words):
        row = np.zeros(6, np.int64)
        row[names.index("direction")] = direction
        other = words[mirrored(row)[names.index("direction")]]
        exchanged = {"right": "left", "left": "right"}
        assert other == " ".join(exchanged.get(part, part) for part in word.split())


def test_the_command_line_opens_them_and_refuses_what_does_not_fit():
    shape = {"num_frames": 4, "height": 16, "width": 16}
    dataset = Clips(data="factors", split="test").open(**shape, interval=1)
    assert isinstance(dataset, FactorClips) and dataset.split == "test"
    with pytest.raises(InputError, match="^split='val': expected one of train, test$"):
        Clips(data="factors", split="val").open(**shape)
    with pytest.raises(InputError, match="^--data factors: --random-crop says how files are read"):
        Clips(data="factors", random_crop=True).open(**shape)
    with pytest.raises(ValueError, match="^label='size': expected one of shape, texture"):
        clips(label="size")
    with pytest.raises(ValueError, match="expected all >= 1"):
        clips(length=0)


def test_factors_may_have_one_class_in_every_clip():
    shape = {"num_frames": 2, "height": 32, "width": 32}
    dataset, all_of_them = open_dataset("factors:number=three,occlusion=none", **shape), FactorClips(**shape)
    for index in (0, 7):
        factors = dataset.factors(index)
        assert factors == all_of_them.factors(index) | {"number": 2, "occlusion": 0}
        assert dataset.sample(index, 1)["factors"].tolist() == [*factors.values()]
    assert repr(dataset) != repr(all_of_them) and dataset.settings() != all_of_them.settings()
    for name, complaint in [
        ("factors:number", "'number' is no FACTOR=CLASS"),
        ("factors:number=four", "number=four: expected one of one, two, three"),
        ("factors:size=big", "size=big: expected a factor, one of shape, "),
    ]:
        with pytest.raises(ValueError, match=complaint):
            open_dataset(name, **shape)
