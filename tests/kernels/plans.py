"""The oracle of tile schedules: reads one as a kernel does and compares what it covers with the dense mask, pair by
pair."""

import torch
from hypothesis import strategies as st

from mimo_kernels.attention import FrameMask
from mimo_kernels.attention.triton.schedule import BAND_ROWS
from mimo_kernels.core import host

LAYOUT = host.schedule_layout()
TILE_COLUMNS, SEGMENT, MASKED_KEYS = LAYOUT["TILE_CELLS"], LAYOUT["SEGMENT_CELLS"], LAYOUT["ROW_SEGMENT_CELLS"]
HEADER, KEY_SEGMENT, BOUNDS = LAYOUT["HEADER_CELLS"], LAYOUT["KEY_SEGMENT_CELLS"], LAYOUT["BOUNDS_CELLS"]


def schedule(name: str, mask: FrameMask, tile: int, block: int, band_rows: int = BAND_ROWS):
    cells, num_tiles, executed, covered = getattr(host.planner(), f"plan_{name}")(
        mask.frames.numpy(), tile, block, band_rows, mask.num_keys
    )
    assert covered == (mask.num_queries if name == "rows" else mask.num_keys)
    cells = torch.frombuffer(cells, dtype=torch.int32).tolist() if cells else []
    tiles = [cells[TILE_COLUMNS * i : TILE_COLUMNS * (i + 1)] for i in range(num_tiles)]
    return cells, tiles, executed


def read_tile(name: str, cells: list[int], place: int, bare_blocks: int, block: int):
    """Bare segments, masked segments and the bounds of the tile, read as a kernel does. A masked segment of "rows" is
    (start, end, bounds), the bounds being (row, first key, end key)."""
    bare, masked, left = [], [], bare_blocks
    while left:
        start, end = cells[place : place + SEGMENT]
        assert end > start and (end - start) % block == 0
        bare.append((start, end))
        left -= (end - start) // block
        place += SEGMENT
    assert left == 0
    steps = cells[place]
    place += HEADER
    while steps > 0:
        if name == "rows":
            start, end, count = cells[place : place + KEY_SEGMENT]
            place += KEY_SEGMENT
            segment = start, end, [cells[place + BOUNDS * i : place + BOUNDS * (i + 1)] for i in range(count)]
            place, steps = place + BOUNDS * count, steps - 1
        else:
            segment = cells[place : place + MASKED_KEYS]
            place, steps = place + MASKED_KEYS, steps - blocks(*segment[:2], block)
        assert segment[1] > segment[0]
        masked.append(segment)
    assert steps == 0
    return bare, masked, tuple(cells[place : place + SEGMENT])


def blocks(start: int, end: int, block: int) -> int:
    return -(-(end - start) // block)


def check_rows(mask: FrameMask, tile: int, block: int) -> None:
    cells, tiles, executed = schedule("rows", mask, tile, block)
    dense = mask.to_dense()
    covered = torch.zeros(dense.shape, dtype=torch.int32)
    rows = torch.zeros(mask.num_queries, dtype=torch.int32)
    computed = 0
    for start, end, place, bare_blocks in tiles:
        assert 0 < end - start <= tile
        rows[start:end] += 1
        bare, masked, ends = read_tile("rows", cells, place, bare_blocks, block)
        assert ends == (start, end)
        for key_start, key_end in bare:
            assert dense[start:end, key_start:key_end].all()
            covered[start:end, key_start:key_end] += 1
            computed += (key_end - key_start) // block
        for key_start, key_end, bounds in masked:
            begins = [row for row, _, _ in bounds]
            assert begins == sorted(set(begins)) and begins[0] <= start and begins[-1] < end
            for (row, lo, hi), row_end in zip(bounds, [*begins[1:], end]):
                assert key_start <= lo <= hi <= key_end or lo == hi
                covered[max(row, start) : row_end, lo:hi] += 1
            computed += blocks(key_start, key_end, block)
    assert torch.equal(rows, torch.ones_like(rows))
    assert torch.equal(covered, dense.int())
    assert executed == computed * tile * block >= mask.num_pairs


def check_keys(mask: FrameMask, tile: int, block: int) -> None:
    cells, tiles, executed = schedule("keys", mask, tile, block)
    dense = mask.to_dense()
    covered = torch.zeros(dense.shape, dtype=torch.int32)
    keys = torch.zeros(mask.num_keys, dtype=torch.int32)
    computed = 0
    for start, end, place, bare_blocks in tiles:
        assert 0 < end - start <= tile
        keys[start:end] += 1
        bare, masked, ends = read_tile("keys", cells, place, bare_blocks, block)
        assert ends == (start, end)
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


SLICES = st.builds(slice, *[st.none() | st.integers(-6, 6)] * 2)


@st.composite
def slices(draw, tokens: int, most: int) -> FrameMask:
    """Up to so many slices of up to so many queries and keys; short ones make rows of many intervals."""
    sizes = draw(st.integers(0, tokens)), draw(st.integers(0, tokens))
    longest = draw(st.sampled_from([3, 20, tokens]))

    def ranges(size):
        start = draw(st.integers(0, size))
        return start, min(size, start + draw(st.integers(0, longest)))

    count = draw(st.integers(0, most))
    wide = draw(st.booleans())  # all queries: then a row has all intervals
    queries = [(0, sizes[0]) if wide else ranges(sizes[0]) for _ in range(count)]
    keys = [ranges(sizes[1]) for _ in range(count)]
    return FrameMask.from_slices(queries, keys, num_queries=sizes[0], num_keys=sizes[1])


@st.composite
def masks(draw) -> FrameMask:
    """Of every kind, frames between 0 and 70 tokens; one kind in two has as many keys as queries at most by chance."""
    kind = draw(st.sampled_from(["teacher_forcing", "block_causal", "bidirectional", "from_table", "from_slices"]))
    length = st.one_of(st.integers(0, 3), st.sampled_from([8, 16, 32, 33]), st.integers(0, 70))
    clips = draw(st.integers(1, 3))
    frames = [draw(st.integers(1, 5)) for _ in range(clips)]
    lens = [draw(st.lists(length, min_size=n, max_size=n)) for n in frames]
    limits = {"sink": draw(st.integers(0, 2))}
    limits |= draw(st.fixed_dictionaries({}, optional={"window": st.integers(1, 3)}))
    if "window" not in limits:
        limits["window_tokens"] = draw(st.none() | st.integers(1, 100))
    if kind == "bidirectional":
        return FrameMask.bidirectional(lens)
    if kind == "block_causal":
        return FrameMask.block_causal(lens, **limits, queries=draw(st.none() | SLICES))
    if kind == "teacher_forcing":
        future = [draw(st.lists(length, min_size=n, max_size=n)) for n in frames]
        drop = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in frames]
        limits |= {"drop_history": draw(st.sampled_from([None, drop])), "future_first": draw(st.booleans())}
        return FrameMask.teacher_forcing(lens, future, **limits)
    if kind == "from_slices":
        return draw(slices(200, 20))
    # Any intervals at all, also ones that end inside a group, look ahead, or are missing.
    ends = sorted(draw(st.sets(st.integers(1, 150), min_size=1, max_size=12)))
    rows = []
    for start, end in zip([0, *ends], ends):
        edges = sorted(draw(st.sets(st.integers(0, ends[-1]), min_size=0, max_size=6)))
        edges = edges[: len(edges) // 2 * 2]
        rows.append([start, end, *edges, *[0] * (6 - len(edges))])
    return FrameMask.from_table(torch.tensor(rows, dtype=torch.int32))


SIZES = st.sampled_from([(16, 16), (32, 16), (16, 32), (64, 32), (128, 64), (64, 64)])
