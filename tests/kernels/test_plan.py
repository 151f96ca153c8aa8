"""Tile schedules: every allowed pair is computed exactly once, in the form the kernels rely on."""

import torch
from hypothesis import given, settings

from mimo_kernels.attention import FrameMask

from .plans import MASKED_KEYS, MASKED_ROWS, SIZES, blocks, check_keys, check_rows, masks, read_tile, schedule


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
    width = MASKED_ROWS if name == "rows" else MASKED_KEYS
    totals = []
    for _, _, place, bare_blocks in tiles:
        masked = read_tile(cells, place, bare_blocks, block, width)[1]
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
    """The share of the computed pairs that count, in batches of many groups: clips that differ, frames that fill tiles only together."""
    drops = torch.rand(32, 16, generator=torch.Generator().manual_seed(0)) < 0.1
    dropped = FrameMask.teacher_forcing([[160] * 5] * 32, [[256] * 5] * 32, drop_history=drops[:, :5])
    short = FrameMask.teacher_forcing([[40] * 16] * 32, [[64] * 16] * 32, drop_history=drops)
    long = FrameMask.teacher_forcing([[40] * 300], [[64] * 300])
    tiny = FrameMask.teacher_forcing([[8] * 100] * 10 + [[5] * 50], [[8] * 100] * 10 + [[5] * 50])
    for mask, rows, keys in ((dropped, 0.92, 0.89), (short, 0.72, 0.74), (long, 0.98, 0.98), (tiny, 0.7, 0.5)):
        assert mask.num_pairs / schedule("rows", mask, 128, 64)[2] > rows
        assert mask.num_pairs / schedule("keys", mask, 128, 64)[2] > keys


def test_small_clips_share_tiles():
    mask = FrameMask.bidirectional([[16]] * 32)
    assert len(schedule("rows", mask, 128, 64)[1]) == 8  # 64 keys, one block, each
    assert len(schedule("keys", mask, 128, 64)[1]) == 8
