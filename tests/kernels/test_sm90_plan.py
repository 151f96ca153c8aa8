"""Schedules of the Hopper kernels: every allowed pair in one block, true states, few pairs beside the useful ones."""

import pytest
import torch
from hypothesis import given, settings

from mimo_kernels.attention import FrameMask
from mimo_kernels.attention.sm90 import BAND_ROWS, mask_refusals
from mimo_kernels.core.backends import extension

from .plans import masks

pytestmark = pytest.mark.skipif(extension() is None, reason="these schedules are made by the extension alone")
ROWS, TILE_COLUMNS, RUN_COLUMNS = 64, 8, 4
SKIP, BARE, MASKED = range(3)


def read(mask: FrameMask, block: int, keys: bool, frames: torch.Tensor | None = None):
    """Tiles as (chunks, blocks), a block being (start, states, group); and the pairs that are computed."""
    frames = mask.frames if frames is None else frames
    cells, count, pairs, rows = extension().plan_sm90(frames.numpy(), block=block, band_rows=BAND_ROWS, keys=keys)
    cells = torch.frombuffer(cells, dtype=torch.int32).tolist() if cells else []
    assert rows == (int(frames[-1, 1]) if len(frames) else 0)
    assert cells[TILE_COLUMNS * count :][: frames.numel()] == frames.flatten().tolist()
    tiles = []
    for t in range(count):
        *bounds, place, runs, group0, group1 = cells[TILE_COLUMNS * t : TILE_COLUMNS * (t + 1)]
        assert place % 4 == 0  # read 16 bytes at a time
        blocks = []
        for r in range(runs):
            start, length, states, group = cells[place + RUN_COLUMNS * r : place + RUN_COLUMNS * (r + 1)]
            blocks += [(start + block * i, (states & 3, states >> 2 & 3), group) for i in range(length)]
        tiles.append((((*bounds[:2], group0), (*bounds[2:], group1)), blocks))
    return tiles, pairs


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@settings(max_examples=60, deadline=None)
@given(mask=masks().filter(lambda mask: not mask_refusals(mask)))
def test_every_pair_is_in_one_block(keys, block, mask):
    tiles, pairs = read(mask, block, keys)
    dense = mask.to_dense().T if keys else mask.to_dense()
    covered = torch.zeros_like(dense, dtype=torch.int32)
    own = torch.zeros(mask.num_tokens, dtype=torch.int32)
    computed = 0
    for chunks, blocks in tiles:
        for start, states, group in blocks:
            assert states != (SKIP, SKIP)
            # The first group that can have rows in the block: kernels look on from there.
            assert group == 0 or mask.frames[group - 1, 1] <= start
        for w, (first, end, group) in enumerate(chunks):
            assert 0 <= end - first <= ROWS
            own[first:end] += 1
            if end > first:
                assert mask.frames[group, 0] <= first < mask.frames[group, 1]
            working = [i for i, block_ in enumerate(blocks) if block_[1][w] != SKIP]
            assert working == list(range(len(blocks)))[slice(working[0], working[-1] + 1) if working else slice(0)]
            for start, states, _ in blocks:
                part = dense[first:end, start : start + block]
                if states[w] == BARE:
                    assert part.shape[1] == block and part.all()
                assert states[w] != SKIP or not part.any()
                covered[first:end, start : start + block] += part * (states[w] != SKIP)
                computed += (states[w] != SKIP) * ROWS * block
        assert chunks[0][1] > chunks[0][0]
    assert torch.equal(own, torch.ones_like(own))
    assert torch.equal(covered, dense.int())
    assert pairs == computed >= mask.num_pairs


# Executed over useful pairs of the forward, and of dK and dV, in blocks of 64.
SHAPES = {
    "k600-xl": (FrameMask.teacher_forcing([[160] * 5], [[256] * 5]), 1.05, 1.06),
    "ucf-xl": (FrameMask.teacher_forcing([[40] * 16], [[64] * 16]), 1.13, 1.14),
    "minecraft-b": (FrameMask.teacher_forcing([[40] * 300], [[64] * 300]), 1.02, 1.02),
    "wan-tf": (FrameMask.teacher_forcing([[1560] * 21], [[1560] * 21]), 1.01, 1.01),
    "far-xl": (FrameMask.block_causal([[64] * 16]), 1.0, 1.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_few_pairs_are_computed_that_nobody_sees(shape):
    mask, *most = SHAPES[shape]
    for keys, limit in zip((False, True), most):
        assert read(mask, 64, keys)[1] <= limit * mask.num_pairs


def test_longest_tiles_come_first():
    mask = FrameMask.teacher_forcing([[40] * 6], [[64] * 6])
    for keys in (False, True):
        lengths = [sum((a != SKIP) + (b != SKIP) for _, (a, b), _ in blocks) for _, blocks in read(mask, 64, keys)[0]]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_chunks_end_with_clips():
    mask = FrameMask.block_causal([[50], [30, 20], [70]])
    for keys in (False, True):
        chunks = sorted(chunk[:2] for chunks, _ in read(mask, 64, keys)[0] for chunk in chunks if chunk[0] < chunk[1])
        assert {0, 50, 100} <= {start for start, _ in chunks} and all(end - start <= ROWS for start, end in chunks)


def test_a_table_that_was_written_to_is_refused():
    frames = MASK.frames.clone()
    frames[0, 1] = 10**6
    with pytest.raises(ValueError, match="its table was written to"):
        extension().plan_sm90(frames.numpy(), block=64, band_rows=BAND_ROWS, keys=False)
    with pytest.raises(ValueError, match="blocks of 32"):
        extension().plan_sm90(MASK.frames.numpy(), block=32, band_rows=BAND_ROWS, keys=False)


MASK = FrameMask.block_causal([[3, 4]])
