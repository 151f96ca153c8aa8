"""Run by host.py in a Python of its own: python host_inputs.py SEED CASES. Prints how many calls were answered and how
many refused."""

import random
import sys
from array import array

import _C

REFUSALS = (ValueError, TypeError, MemoryError, BufferError, OverflowError, RuntimeError)
INT_MAX = 2**31 - 1
EDGES = [
    -(2**63),
    -(2**31),
    -1,
    0,
    1,
    2,
    7,
    8,
    64,
    2**16,
    INT_MAX - 2**16,
    INT_MAX - 64,
    INT_MAX - 1,
    INT_MAX,
    2**31,
    2**63 - 1,
    2**80,
]
CELLS = _C.schedule_layout["GROUP_CELLS"]


class Shrinks:
    """An int that empties the list it stands in when it is read."""

    def __init__(self, owner, random):
        self.owner, self.random = owner, random

    def __index__(self):
        if self.random.random() < 0.5:
            self.owner.clear()
        else:
            self.owner.extend(range(1000))
        return 3

    def __repr__(self):
        self.owner.clear()
        return "Shrinks"


class Lists:
    """Something with a `tolist`, as arrays and tensors have; what it gives may be anything. Its address is nobody's."""

    shape = (2**20, 2**20)

    def __init__(self, value):
        self.value = value

    def tolist(self):
        return self.value

    def data_ptr(self):
        return 8


def count(r):
    return r.choice(EDGES) if r.random() < 0.03 else r.randint(0, 70)


def lens(r, clips, frames, value=count):
    """Lists of lists, now and then something else in their place."""
    made = []
    for c in range(clips):
        clip = [value(r) for _ in range(frames[c])]
        if r.random() < 0.02 and clip:
            clip[r.randrange(len(clip))] = r.choice(
                [Shrinks(clip, r), Shrinks(made, r), None, 1.5, "3", True, [], object()]
            )
        if r.random() < 0.05:
            clip = r.choice([tuple(clip), Lists(clip), Lists(3), array("l", [1, 2]), None, 5, "ab", Lists(Lists(clip))])
        made.append(clip)
    if r.random() < 0.05:
        made = r.choice([tuple(made), Lists(made), Lists(None), 3, None, Lists([1, 2])])
    return made


def window(r):
    return r.choice([0, 0, 1, 2, 3, r.choice(EDGES[1:-1])])


def queries(r):
    ends = [None, 0, 1, -1, 3, r.choice(EDGES)]
    if r.random() < 0.05:
        return r.choice([3, "12", slice("a", None), slice(0, 4, 2), slice(0, 4, 0), slice(1.5), (0, 1)])
    return r.choice([None, slice(r.choice(ends), r.choice(ends)), slice(r.choice(ends), r.choice(ends), 1)])


def slices(r):
    """Ranges of queries and of keys, now and then wrong ones or none at all."""
    sizes = [r.choice([0, 1, 40, 400]) for _ in range(2)]
    count = r.choice([0, 1, 5, 40])

    def ranges(size):
        made = []
        for _ in range(count):
            start = r.randint(0, size)
            made.append([start, min(size, start + r.choice([0, 1, 3, size]))])
        if made and r.random() < 0.1:
            pair = r.choice(made)
            pair[r.randrange(2)] = r.choice([*EDGES, None, 1.5, Shrinks(pair, r), Shrinks(made, r)])
        if made and r.random() < 0.05:
            made[0] = r.choice([(), [1], [1, 2, 3], Lists(made[0]), Lists(3), "ab", None])
        return r.choice([made, made, made, Lists(made), 7]) if r.random() < 0.1 else made

    total = [r.choice([*EDGES, None, "3"]) if r.random() < 0.03 else size for size in sizes]
    return _C.frame_table_from_slices(ranges(sizes[0]), ranges(sizes[1]), *total)


def table(r):
    clips = r.randint(0, 4)
    frames = [r.randint(0, 6) for _ in range(clips)]
    kind = r.randrange(4)
    if kind == 3:
        return slices(r)
    if kind == 0:
        drop = r.choice([None, lens(r, clips, frames, lambda r: r.random() < 0.3)])
        other = frames if r.random() < 0.95 else frames[::-1]
        both = lens(r, clips, frames), lens(r, clips, other)
        return _C.frame_table_teacher_forcing(*both, drop, *(window(r) for _ in range(3)), r.random() < 0.5)
    if kind == 1:
        return _C.frame_table_block_causal(lens(r, clips, frames), *(window(r) for _ in range(3)), queries(r))
    return _C.frame_table_bidirectional(lens(r, clips, frames))


def any_cells(r):
    """Groups of one clip with any intervals, now and then with a wrong cell."""
    end, groups = 0, []
    for _ in range(r.randint(0, 12)):
        start, end = end, end + (r.choice([1, 1000, 2**30]) if r.random() < 0.05 else r.randint(1, 40))
        groups.append([start, end])
    room = r.choice([3, 3, 4, 9])
    for group in groups:
        cuts = sorted(r.sample(range(min(end, 10**6) + 1), min(2 * r.randint(0, room), end)))
        cuts = cuts[: len(cuts) // 2 * 2]
        group += cuts + [0] * (2 * room - len(cuts))
    if groups and r.random() < 0.3:
        group = r.choice(groups)
        group[r.randrange(len(group))] = r.choice(EDGES)
    return groups


def from_cells(r):
    groups = any_cells(r)
    total = groups[-1][1] if groups else 0
    clip_lens = r.choice(
        [None, None, [total], [0, total, 0], [r.choice(EDGES)], [2**63 - 1, -(2**63 - 1) + total], [2**62] * 4]
    )
    if r.random() < 0.1 and groups:
        groups[0] = r.choice([[], [0] * 9, [None] * 8, "12345678", Lists(groups[0])])
    key_lens = r.choice([None, None, clip_lens, [total], [3 * total], [r.choice(EDGES)], [total] * 3])
    return _C.frame_table_from_table(groups, clip_lens, key_lens)


def lent(cells, columns, r):
    """The same cells as memory: as it should be, or of another shape, type, place or step."""
    size = len(cells) // columns
    if r.random() < 0.9:
        return memoryview(cells).cast("B").cast("i", (size, columns)) if size else memoryview(b"").cast("B")
    flat = memoryview(cells).cast("B")
    wrong = [flat, flat.cast("i"), b"", bytes(flat), memoryview(bytes(1 + len(flat)))[1:], None, 7, Lists([[1]])]
    if size:
        wrong += [flat.cast("f", (size, columns)), flat.cast("i", (columns, size))]
        wrong.append(flat.cast("i", (size, columns))[::2])
    return r.choice(wrong)


def plan(r):
    """The schedule of a table that was made, or was made and then written to, or is made up."""
    kind = r.random()
    if kind < 0.6:
        cells = array("i")
        made, columns, *_ = table(r)
        cells.frombytes(bytes(made))
        if kind < 0.3 and cells:
            for _ in range(r.randint(1, 3)):
                cells[r.randrange(len(cells))] = r.choice([x for x in EDGES if abs(x) <= INT_MAX])
    else:
        groups = any_cells(r)
        columns = len(groups[0]) if groups else CELLS
        cells = array("i", [max(-(2**31), min(INT_MAX, x)) for group in groups for x in group])
    tile, block = r.choice([(16, 16), (64, 32), (128, 64), (1, 1), (1000, 2)])
    if r.random() < 0.05:
        tile, block = (r.choice([0, -1, 3, 2**16, 2**17, INT_MAX]) for _ in range(2))
    # A schedule is as long as its rows take tiles: nobody waits for that of 2^31 rows.
    rows = max(cells[1::columns], default=0)
    if rows > 10**6 and tile * 10**5 < rows:
        tile = 2**16
    if rows <= 10**5 and r.random() < 0.4:
        blocks = r.choice([64, 128, 64, 128, 32])
        return _C.plan_sm90(
            lent(cells, columns, r), block=blocks, band_rows=r.choice([1, 60, 16384, 0]), keys=r.random() < 0.5
        )
    # Keys that are more than the rows take tiles too.
    keys = r.choice([-1, -1, 0, rows, rows // 2, rows + 100, min(2 * rows, 10**7), r.choice([-5, 2**31, 2**62])])
    return r.choice([_C.plan_rows, _C.plan_keys])(
        lent(cells, columns, r), tile, block, r.choice([1, 60, 16384, 16384, INT_MAX, 0]), keys
    )


def main(seed, cases):
    r = random.Random(seed)
    answered = refused = 0
    for _ in range(cases):
        call = r.choices([table, from_cells, plan], [2, 1, 4])[0]
        try:
            call(r)
            answered += 1
        except REFUSALS as error:
            assert str(error), "a refusal without a word"
            refused += 1
    print(answered, refused)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
