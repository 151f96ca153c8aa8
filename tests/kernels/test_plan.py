"""Tile schedules: every allowed pair is computed exactly once, in the form the kernels rely on."""

import pytest
import torch
from hypothesis import given, settings

from mimo_kernels.attention import FrameMask
from mimo_kernels.core import host

from .planners import both_planners  # noqa: F401
from .plans import SIZES, blocks, check_keys, check_rows, masks, read_tile, schedule


def test_same_table_gives_the_same_bytes():
    mask = FrameMask.teacher_forcing([[40, 33, 7], [50]], [[64, 3, 60], [64]])
    for name in ("rows", "keys"):
        assert schedule(name, mask, 64, 32)[0] == schedule(name, mask, 64, 32)[0]


@settings(max_examples=150, deadline=None)
@given(masks(), SIZES)
def test_every_pair_is_in_one_tile_of_rows(mask, sizes):
    check_rows(mask, *sizes)


@settings(max_examples=150, deadline=None)
@given(masks(), SIZES)
def test_every_pair_is_in_one_tile_of_keys(mask, sizes):
    check_keys(mask, *sizes)


def work(mask: FrameMask, name: str, tile: int, block: int) -> list[int]:
    cells, tiles, _ = schedule(name, mask, tile, block)
    totals = []
    for _, _, place, bare_blocks in tiles:
        masked = read_tile(name, cells, place, bare_blocks, block)[1]
        totals.append(bare_blocks + sum(blocks(segment[0], segment[1], block) for segment in masked))
    return totals


def test_longest_tiles_come_first():
    mask = FrameMask.teacher_forcing([[40] * 6, [30] * 5], [[64] * 6, [64] * 5])
    for name in ("rows", "keys"):
        totals = work(mask, name, 64, 32)
        assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


def test_long_batches_are_ordered_in_bands_of_clips():
    mask = FrameMask.block_causal([[1560] * 6] * 8)  # 9360 rows per clip
    for band_rows, clips in ((9360, 1), (9361, 2), (18720, 2), (18721, 3), (8 * 9360, 8)):
        for name in ("rows", "keys"):
            _, tiles, _ = schedule(name, mask, 128, 64, band_rows)
            bands = [tile[0] // (clips * 9360) for tile in tiles]
            assert bands == sorted(bands) and set(bands) == set(range(-(-8 // clips)))


def test_metadata_does_not_grow_with_the_number_of_pairs():
    for frames in (20, 40):
        mask = FrameMask.teacher_forcing([[160] * frames], [[256] * frames])
        for name in ("rows", "keys"):
            cells, tiles, _ = schedule(name, mask, 128, 64)
            assert len(cells) <= 8 * len(mask.frames) + 140 * len(tiles)


def test_frames_that_fill_tiles_cost_nothing_extra():
    mask = FrameMask.block_causal([[128] * 8])
    for name in ("rows", "keys"):
        assert schedule(name, mask, 128, 64)[2] == mask.num_pairs
    mask = FrameMask.teacher_forcing([[64] * 8], [[64] * 8])
    assert schedule("rows", mask, 64, 64)[2] == mask.num_pairs


def test_short_tiles_stand_where_they_cost_least():
    """The share of the computed pairs that count, in batches of many groups: clips that differ, frames that fill tiles
    only together."""
    drops = torch.rand(32, 16, generator=torch.Generator().manual_seed(0)) < 0.1
    dropped = FrameMask.teacher_forcing([[160] * 5] * 32, [[256] * 5] * 32, drop_history=drops[:, :5])
    short = FrameMask.teacher_forcing([[40] * 16] * 32, [[64] * 16] * 32, drop_history=drops)
    long = FrameMask.teacher_forcing([[40] * 300], [[64] * 300])
    tiny = FrameMask.teacher_forcing([[8] * 100] * 10 + [[5] * 50], [[8] * 100] * 10 + [[5] * 50])
    for mask, rows, keys in ((dropped, 0.92, 0.89), (short, 0.72, 0.74), (long, 0.98, 0.98), (tiny, 0.7, 0.5)):
        assert mask.num_pairs / schedule("rows", mask, 128, 64)[2] > rows
        assert mask.num_pairs / schedule("keys", mask, 128, 64)[2] > keys


EXECUTED = {
    "k600": [38535168, 36372480, 39583744, 36896768],
    "dropped": [24059904, 19103744, 23822336, 19587072],
    "window": [17825792, 12648448, 20709376, 13631488],
    "far": [2064384, 1939456, 2064384, 1939456],
}


def test_executed_pairs_of_the_masks_of_training():
    """What the planner made of them when a row had three intervals at most: more intervals cost nothing there."""
    drops = torch.rand(32, 16, generator=torch.Generator().manual_seed(0)) < 0.1
    short = [[40] * 16] * 32, [[64] * 16] * 32
    masks = {
        "k600": FrameMask.teacher_forcing([[160] * 5] * 32, [[256] * 5] * 32),
        "dropped": FrameMask.teacher_forcing(*short, drop_history=drops),
        "window": FrameMask.teacher_forcing(*short, window=4, sink=1),
        "far": FrameMask.block_causal([[64] * 16] * 3 + [[33] * 20]),
    }
    executed = {
        name: [schedule(kind, mask, *sizes)[2] for kind in ("rows", "keys") for sizes in ((128, 64), (64, 32))]
        for name, mask in masks.items()
    }
    assert executed == EXECUTED


def test_what_a_schedule_holds_is_linear_in_the_intervals():
    """Rows of 300 intervals: a segment for each in every tile, and nothing that grows with their square."""
    ranges = [(10 * i, 10 * i + 7) for i in range(300)]
    mask = FrameMask.from_slices([(0, 256)] * 300, ranges, num_queries=256, num_keys=3000)
    assert mask.frames.shape == (1, 602) and mask.num_pairs == 256 * 2100
    check_rows(mask, 128, 64)
    check_keys(mask, 128, 64)
    cells, tiles, _ = schedule("rows", mask, 128, 64)
    assert len(tiles) == 2 and len(cells) < 2 * 300 * 6 + 100


def test_clips_share_no_tile():
    """What is hidden is multiplied by 0, and 0 times NaN is NaN: a tile of two clips would carry a NaN from one to the
    other."""
    mask = FrameMask.teacher_forcing([[5, 9], [3], [40, 0, 33], [1]], [[16, 2], [7], [64, 8, 1], [1]])
    ends = torch.tensor(mask.clip_lens).cumsum(0).tolist()
    for name in ("rows", "keys"):
        for tile, block in ((128, 64), (16, 16)):
            _, tiles, _ = schedule(name, mask, tile, block)
            assert all(
                any(end - length <= tile[0] < tile[1] <= end for end, length in zip(ends, mask.clip_lens))
                for tile in tiles
            )
    assert len(schedule("rows", FrameMask.bidirectional([[16]] * 32), 128, 64)[1]) == 32


@pytest.mark.parametrize("name", ["rows", "keys"])
def test_a_table_that_was_written_to_is_not_planned(name):
    """The planner writes where the table says: whatever stands in it, an exception and no write past the end."""
    mask = FrameMask.teacher_forcing([[40, 33, 7]], [[64, 3, 60]])
    for row, column, value in [
        (0, 1, 2**31 - 1),
        (2, 0, -5),
        (1, 2, -1),
        (4, 5, 2**30),
        (3, 4, 1),
        (0, 7, 9),
    ]:
        table = mask.frames.clone()
        table[row, column] = value
        with pytest.raises(ValueError, match=r"frames\[\d\] is not what a FrameMask holds|a mask of \d+ rows"):
            plan(name, table.numpy())


def plan(name, table, tile=64, block=32, band_rows=1000):
    return getattr(host.planner(), f"plan_{name}")(table, tile=tile, block=block, band_rows=band_rows)


@pytest.mark.parametrize("name", ["rows", "keys"])
def test_the_planner_believes_nothing_it_is_lent(name):
    table = FrameMask.block_causal([[40, 33]]).frames
    assert plan(name, table.numpy())[1] > 0
    for lent in (
        b"",
        bytes(64),
        table.numpy()[:, :6],
        table.numpy()[::-1],
        table.long().numpy(),
        table.T.numpy(),
        table.numpy()[0],
    ):
        with pytest.raises(ValueError, match="not a contiguous int32 .groups, 8."):
            plan(name, lent)
    for lent in (table.data_ptr(), [[1]], None):
        with pytest.raises(TypeError):
            plan(name, lent)
    for sizes in ({"tile": 0}, {"tile": 2**31 - 1}, {"block": 3}, {"block": 2**30}, {"band_rows": 0}):
        with pytest.raises(ValueError, match="a schedule with tiles of"):
            plan(name, table.numpy(), **sizes)


@pytest.mark.parametrize("name", ["rows", "keys"])
def test_rows_that_a_kernel_cannot_count_are_refused(name):
    """Kernels count up to a tile past the last row."""
    rows = host.schedule_layout()["MAX_ROWS"]
    for count in (rows + 1, 2**31 - 1):
        mask = FrameMask.bidirectional([[count]])
        with pytest.raises(ValueError, match=f"a mask of {count} rows; the kernels number at most {rows}"):
            plan(name, mask.frames.numpy(), tile=2**16, block=2**16)
    table = FrameMask.bidirectional([[rows]]).frames
    cells, tiles, executed, _ = plan(name, table.numpy(), tile=2**16, block=2**16)
    assert tiles == 2**15 - 1 and executed == tiles * (2**15 - 1) * 2**32 and len(cells) < 2**22
