"""The oracle of tile schedules: reads one as a kernel does and compares what it covers with the dense mask, pair by
pair."""

import torch
from hypothesis import strategies as st

from mimo_kernels.attention import FrameMask
from mimo_kernels.attention.triton.schedule import BAND_ROWS
from mimo_kernels.core import backends

LAYOUT = backends.extension().schedule_layout
TILE_COLUMNS, GROUP_COLUMNS = LAYOUT["TILE_CELLS"], LAYOUT["GROUP_CELLS"]
MASKED_ROWS, MASKED_KEYS = LAYOUT["SEGMENT_CELLS"], LAYOUT["ROW_SEGMENT_CELLS"]


def schedule(name: str, mask: FrameMask, tile: int, block: int, band_rows: int = BAND_ROWS):
    frames = mask.frames
    cells, num_tiles, executed, rows = getattr(backends.extension(), f"plan_{name}")(
        frames.numpy(), tile, block, band_rows
    )
    assert rows == mask.num_tokens
    cells = torch.frombuffer(cells, dtype=torch.int32).tolist() if cells else []
    tiles = [cells[TILE_COLUMNS * i : TILE_COLUMNS * (i + 1)] for i in range(num_tiles)]
    groups = torch.tensor(cells[TILE_COLUMNS * num_tiles :][: frames.numel()], dtype=torch.int32).view(
        -1, GROUP_COLUMNS
    )
    assert torch.equal(groups, frames)
    return cells, tiles, executed


def read_tile(cells: list[int], place: int, bare_blocks: int, block: int, width: int):
    """Bare segments, masked segments, groups of the tile and its bounds, read as a kernel does."""
    bare, masked, left = [], [], bare_blocks
    while left:
        start, end = cells[place : place + 2]
        assert end > start and (end - start) % block == 0
        bare.append((start, end))
        left -= (end - start) // block
        place += 2
    assert left == 0
    steps, first_group, end_group, _ = cells[place : place + 4]
    place += 4
    while steps > 0:
        segment = cells[place : place + width]
        assert segment[1] > segment[0]
        masked.append(segment)
        steps -= 1 if width == MASKED_ROWS else -(-(segment[1] - segment[0]) // block)
        place += width
    assert steps == 0
    return bare, masked, (first_group, end_group), tuple(cells[place : place + 2])


def blocks(start: int, end: int, block: int) -> int:
    return -(-(end - start) // block)


def check_rows(mask: FrameMask, tile: int, block: int) -> None:
    cells, tiles, executed = schedule("rows", mask, tile, block)
    dense = mask.to_dense()
    covered = torch.zeros(mask.num_tokens, mask.num_tokens, dtype=torch.int32)
    rows = torch.zeros(mask.num_tokens, dtype=torch.int32)
    computed = 0
    for start, end, place, bare_blocks in tiles:
        assert 0 < end - start <= tile
        rows[start:end] += 1
        bare, masked, (first, last), bounds = read_tile(cells, place, bare_blocks, block, MASKED_ROWS)
        assert bounds == (start, end)
        assert (
            mask.frames[first, 0] <= start < mask.frames[first, 1]
            and mask.frames[last - 1, 0] < end <= mask.frames[last - 1, 1]
        )
        for key_start, key_end in bare:
            assert dense[start:end, key_start:key_end].all()
            covered[start:end, key_start:key_end] += 1
            computed += (key_end - key_start) // block
        for key_start, key_end in masked:
            for row_start, row_end, *keys in mask.frames[first:last].tolist():
                seen = [
                    (max(a, key_start), min(b, key_end))
                    for a, b in zip(keys[::2], keys[1::2])
                    if a < key_end and b > key_start
                ]
                assert len(seen) <= 1, "a row sees two intervals of a masked segment"
                for lo, hi in seen:
                    covered[max(row_start, start) : min(row_end, end), lo:hi] += 1
            computed += blocks(key_start, key_end, block)
    assert torch.equal(rows, torch.ones_like(rows))
    assert torch.equal(covered, dense.int())
    assert executed == computed * tile * block >= mask.num_pairs


def check_keys(mask: FrameMask, tile: int, block: int) -> None:
    cells, tiles, executed = schedule("keys", mask, tile, block)
    dense = mask.to_dense()
    covered = torch.zeros(mask.num_tokens, mask.num_tokens, dtype=torch.int32)
    keys = torch.zeros(mask.num_tokens, dtype=torch.int32)
    computed = 0
    for start, end, place, bare_blocks in tiles:
        assert 0 < end - start <= tile
        keys[start:end] += 1
        bare, masked, _, bounds = read_tile(cells, place, bare_blocks, block, MASKED_KEYS)
        assert bounds == (start, end)
        for row_start, row_end in bare:
            assert dense[row_start:row_end, start:end].all()
            covered[row_start:row_end, start:end] += 1
            computed += (row_end - row_start) // block
        for segment in masked:
            row_start, row_end, *begins = segment[:5]
            edges = [row_start, *(min(edge, row_end) for edge in begins), row_end]
            assert edges == sorted(edges)
            assert row_end - row_start <= block or edges[1] == row_end, "several groups in a segment of several blocks"
            for i in range(4):
                lo, hi = segment[8 + 2 * i : 10 + 2 * i]
                assert start <= lo <= hi <= end or lo == hi
                covered[edges[i] : edges[i + 1], lo:hi] += 1
            computed += blocks(row_start, row_end, block)
    assert torch.equal(keys, torch.ones_like(keys))
    assert torch.equal(covered, dense.int())
    assert executed == computed * tile * block >= mask.num_pairs


@st.composite
def masks(draw) -> FrameMask:
    kind = draw(st.sampled_from(["teacher_forcing", "block_causal", "bidirectional", "from_table"]))
    length = st.one_of(st.integers(0, 3), st.sampled_from([8, 16, 32, 33]), st.integers(0, 70))
    clips = draw(st.integers(1, 3))
    frames = [draw(st.integers(1, 5)) for _ in range(clips)]
    lens = [draw(st.lists(length, min_size=n, max_size=n)) for n in frames]
    limits = {"window": draw(st.none() | st.integers(1, 3)), "sink": draw(st.integers(0, 2))}
    if kind == "bidirectional":
        return FrameMask.bidirectional(lens)
    if kind == "block_causal":
        return FrameMask.block_causal(lens, **limits)
    if kind == "teacher_forcing":
        future = [draw(st.lists(length, min_size=n, max_size=n)) for n in frames]
        drop = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in frames]
        return FrameMask.teacher_forcing(lens, future, drop_history=draw(st.sampled_from([None, drop])), **limits)
    # Any intervals at all, also ones that end inside a group, look ahead, or are missing.
    ends = sorted(draw(st.sets(st.integers(1, 150), min_size=1, max_size=12)))
    rows = []
    for start, end in zip([0, *ends], ends):
        edges = sorted(draw(st.sets(st.integers(0, ends[-1]), min_size=0, max_size=6)))
        edges = edges[: len(edges) // 2 * 2]
        rows.append([start, end, *edges, *[0] * (6 - len(edges))])
    return FrameMask.from_table(torch.tensor(rows, dtype=torch.int32))


SIZES = st.sampled_from([(16, 16), (32, 16), (16, 32), (64, 32), (128, 64), (64, 64)])
