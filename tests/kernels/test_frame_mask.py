import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_mask

from mimo_kernels.attention import FrameMask
from mimo_kernels.core import host

from .. import processes
from .frame_masks import cases, dense_of_table, one_copy, slices, tables, teacher_forcing
from .planners import PLANNERS, both_planners  # noqa: F401


@settings(max_examples=150, deadline=None)
@given(st.one_of(cases(), slices()))
def test_mask_follows_the_rules(case):
    mask = case.mask
    assert torch.equal(mask.to_dense(), case.dense)
    assert mask.num_pairs == int(case.dense.sum())
    assert [mask.num_queries, mask.num_keys] == list(case.dense.shape)
    assert mask.clip_lens == case.clip_lens and mask.key_lens == case.key_lens
    assert mask.num_clips == len(case.clip_lens)


@settings(max_examples=100, deadline=None)
@given(st.one_of(cases(), slices()))
def test_table_is_canonical(case):
    assert case.mask.frames.dtype == torch.int32 and case.mask.frames.shape[1] >= 8
    row, most = 0, 3
    for start, end, *keys in case.mask.frames.tolist():
        assert row == start < end
        row = end
        used = [(a, b) for a, b in zip(keys[::2], keys[1::2]) if (a, b) != (0, 0)]
        assert keys == [bound for pair in used for bound in pair] + [0] * (len(keys) - 2 * len(used))
        most = max(most, len(used))
        assert all(a < b for a, b in used) and all(earlier[1] < later[0] for earlier, later in zip(used, used[1:]))
    assert row == case.mask.num_queries and case.mask.frames.shape[1] == 2 + 2 * most


@settings(max_examples=100, deadline=None)
@given(cases())
def test_uniform_says_whether_clips_are_alike(case):
    first = case.alone[0]
    alike = all(torch.equal(clip.frames, first.frames) and clip.num_keys == first.num_keys for clip in case.alone)
    assert case.mask.uniform == ((len(case.alone), first.num_queries) if alike else None)


def test_alike_clips_are_found():
    assert FrameMask.teacher_forcing([[3, 0]] * 4, [[2, 5]] * 4, window=1, sink=1).uniform == (4, 10)
    assert FrameMask.block_causal([[2, 1], [1, 2]]).uniform is None
    assert FrameMask.teacher_forcing([[1]] * 2, [[1]] * 2, drop_history=[[False], [True]]).uniform == (2, 2)
    assert (
        FrameMask.teacher_forcing([[1, 1]] * 2, [[1, 1]] * 2, drop_history=[[False] * 2, [False, True]]).uniform is None
    )
    assert FrameMask.block_causal([]).uniform is None


@settings(max_examples=50, deadline=None)
@given(tables())
def test_from_table(table):
    mask = FrameMask.from_table(table)
    dense = dense_of_table(table)
    assert torch.equal(mask.to_dense(), dense) and mask.num_pairs == int(dense.sum())
    assert torch.equal(mask.frames, table) and mask.uniform == (1, len(dense))


@settings(max_examples=25, deadline=None)
@given(st.one_of(cases(max_clips=2), slices()))
def test_mask_mod_is_the_same_rule(case):
    if case.dense.numel():
        dense = create_mask(case.mask.to_mask_mod(), None, None, *case.dense.shape, device="cpu")
        assert torch.equal(dense[0, 0], case.dense)


def test_lens_may_be_tensors_and_tuples():
    expected = teacher_forcing([[2, 3], [2, 3]], [[4, 1], [4, 1]], [[False, True], [True, False]])
    lens = torch.tensor([[2, 3], [2, 3]]), torch.tensor([[4, 1], [4, 1]], dtype=torch.int32)
    drop = torch.tensor([[False, True], [True, False]])
    assert torch.equal(FrameMask.teacher_forcing(*lens, drop_history=drop).frames, expected.mask.frames)
    rows = [torch.tensor([2, 3]), (2, torch.tensor(3))]
    mask = FrameMask.teacher_forcing(rows, lens[1].numpy(), drop_history=drop.numpy())
    assert torch.equal(mask.frames, expected.mask.frames)
    assert mask.future_lens == [[4, 1], [4, 1]]
    turned = torch.tensor([[2, 9, 3], [2, 9, 3]])[:, ::2]  # not contiguous
    assert FrameMask.block_causal(turned).history_lens == [[2, 3], [2, 3]]
    assert FrameMask.block_causal(torch.zeros(2, 0, dtype=torch.int64)).history_lens == [[], []]


def test_lens_are_copied():
    lens = [[1, 2]]
    mask = FrameMask.block_causal(lens)
    lens[0].append(3)
    assert mask.history_lens == [[1, 2]] and mask.future_lens == [[]]


def test_windows_by_hand():
    dense = one_copy([[1] * 5], True, window=2, sink=1).mask.to_dense()
    assert [row.nonzero().flatten().tolist() for row in dense] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    dense = FrameMask.teacher_forcing([[1] * 4], [[1] * 4], window=2, sink=1).to_dense()
    assert [row.nonzero().flatten().tolist() for row in dense[4:]] == [[4], [0, 5], [0, 1, 6], [0, 2, 7]]


def test_a_reach_beyond_all_tokens_is_none():
    expected = FrameMask.block_causal([[2, 3, 1]]).frames
    for option in ("window", "window_tokens", "sink"):
        assert torch.equal(FrameMask.block_causal([[2, 3, 1]], **{option: 2**80}).frames, expected)


def test_metadata_is_in_frames_not_tokens():
    frame = 2**27
    mask = FrameMask.teacher_forcing([[frame] * 4], [[frame] * 4])
    assert mask.num_tokens == 2**30 and mask.num_pairs == (1 + 2 + 3 + 4 + 1 + 2 + 3 + 4) * frame**2
    assert mask.frames.shape == (8, 8)


def test_from_table_finds_alike_clips():
    mask = FrameMask.teacher_forcing([[3, 2]] * 4, [[4, 1]] * 4)
    blind = mask.frames.clone().view(4, 4, 8)
    blind[:, :2, 2:] = 0  # history rows see nothing
    whole = FrameMask.from_table(blind.flatten(0, 1), clip_lens=mask.clip_lens)
    assert whole.uniform == (4, 10) and torch.equal(whole.pattern, blind[0])
    assert whole.history_lens == [[3, 2, 4, 1]] * 4
    dense = mask.to_dense()
    dense.view(4, 10, -1)[:, :5] = False
    assert torch.equal(whole.to_dense(), dense)
    blind[2, 3, 2:] = torch.tensor([28, 30, 0, 0, 0, 0])
    assert FrameMask.from_table(blind.flatten(0, 1), clip_lens=mask.clip_lens).uniform is None


def test_from_table_with_empty_clips():
    mask = FrameMask.from_table(torch.tensor([[0, 2, 1, 2, 0, 0, 0, 0]]), clip_lens=[0, 2, 0])
    assert mask.clip_lens == [0, 2, 0] and mask.history_lens == [[], [2], []] and mask.uniform is None
    assert FrameMask.from_table(torch.zeros(0, 8, dtype=torch.int32)).num_tokens == 0


def test_drawing():
    mask = FrameMask.teacher_forcing([[40, 0, 8]] * 3, [[64] * 3] * 3, drop_history=[[False, True, False]] * 3)
    assert repr(mask).splitlines() == [
        "FrameMask.teacher_forcing: 3 clips, 720 tokens, 50,496 pairs (9.7% of all)",
        "clip 0, and the other 2 alike: rows see columns",
        "         h0 h2 f0 f1 f2",
        "  h0  40 ■  ·  ·  ·  ·",
        "  h2   8 ■  ■  ·  ·  ·",
        "  f0  64 ·  ·  ■  ·  ·",
        "  f1  64 ·  ·  ·  ■  ·",
        "  f2  64 ■  ·  ·  ·  ■",
    ]


def test_drawing_of_other_keys_than_queries():
    assert repr(FrameMask.block_causal([[3, 0, 4, 5]] * 2, queries=slice(-2, None))).splitlines() == [
        "FrameMask.block_causal: 2 clips, 18 queries, 24 keys, 176 pairs (40.7% of all), queries=slice(-2, None, None)",
        "clip 0, and the other 1 alike: rows see columns",
        "       0 2 3",
        "  2  4 ■ ■ ·",
        "  3  5 ■ ■ ■",
    ]
    mask = FrameMask.from_slices([(0, 4), (4, 8), (0, 8)], [(0, 4), (4, 8), (10, 12)], num_queries=9, num_keys=12)
    assert repr(mask).splitlines()[1:] == [
        "clip 0: rows see columns",
        "        k0 k1 k2 k3",
        "  q0  4 ■  ·  ·  ■",
        "  q1  4 ·  ■  ·  ■",
        "  q2  1 ·  ·  ·  ·",
    ]
    mask = FrameMask.teacher_forcing([[2, 3]], [[4, 5]], future_first=True, window_tokens=6)
    assert repr(mask).splitlines() == [
        "FrameMask.teacher_forcing: 1 clip, 14 tokens, 65 pairs (33.2% of all), window_tokens=6, future_first=True",
        "clip 0: rows see columns",
        "        f0 f1 h0 h1",
        "  f0  4 ■  ·  ·  ·",
        "  f1  5 ·  ■  ▒  ·",
        "  h0  2 ·  ·  ■  ·",
        "  h1  3 ·  ·  ■  ■",
    ]


def test_slices_are_a_union():
    """Ranges that touch, overlap or repeat are one interval; tensors and lists say the same."""
    q_ranges, k_ranges = [(0, 6), (0, 6), (2, 6), (2, 4), (3, 3)], [(0, 4), (4, 6), (1, 5), (9, 10), (0, 10)]
    mask = FrameMask.from_slices(q_ranges, k_ranges, num_queries=6, num_keys=10)
    assert mask.frames.tolist() == [[0, 2, 0, 6, 0, 0, 0, 0], [2, 4, 0, 6, 9, 10, 0, 0], [4, 6, 0, 6, 0, 0, 0, 0]]
    assert mask.clip_lens == [6] and mask.key_lens == [10] and mask.num_pairs == 38
    given = torch.tensor(q_ranges), torch.tensor(k_ranges, dtype=torch.int32)
    assert torch.equal(FrameMask.from_slices(*given, num_queries=6, num_keys=10).frames, mask.frames)
    nobody = FrameMask.from_slices([], [], num_queries=3)
    assert nobody.to_dense().shape == (3, 3) and nobody.num_pairs == 0


def test_from_table_of_other_keys_than_queries():
    rows = [[0, 2, 0, 3, 0, 0, 0, 0], [2, 4, 5, 7, 0, 0, 0, 0], [4, 5, 8, 9, 0, 0, 0, 0]]
    mask = FrameMask.from_table(torch.tensor(rows), clip_lens=[2, 3], key_lens=[5, 4])
    assert mask.num_queries == 5 and mask.num_keys == 9 and mask.uniform is None
    alike = FrameMask.from_table(torch.tensor([rows[0], [2, 4, 5, 8, 0, 0, 0, 0]]), clip_lens=[2, 2], key_lens=[5, 5])
    assert alike.uniform == (2, 2) and alike.repeats == 2 and alike.num_keys == 10
    # As many rows in each, but not as many keys.
    assert FrameMask.from_table(alike.frames, clip_lens=[2, 2], key_lens=[5, 6]).uniform is None
    # Columns that no group uses go.
    wide = torch.nn.functional.pad(torch.tensor(rows), (0, 4))
    assert FrameMask.from_table(wide, clip_lens=[2, 3], key_lens=[5, 4]).frames.tolist() == rows


def test_drawing_where_the_output_is_ascii():
    code = "from mimo_kernels.attention import FrameMask; print(FrameMask.block_causal([[2] * 12], window=2))"
    said = {}
    for encoding in ("ascii", "utf-8"):
        environment = processes.environment(PYTHONIOENCODING=encoding)
        done = processes.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        said[encoding] = done.stdout.decode(encoding)
    assert said["utf-8"].strip() == repr(FrameMask.block_causal([[2] * 12], window=2))
    assert "  10  2 .  .  .  .  .  ~  .  .  #  #  ." in said["ascii"].splitlines()


def test_long_drawings_are_abbreviated():
    lines = repr(FrameMask.block_causal([[64] * 300, [1], [2]], window=4, sink=1)).splitlines()
    assert len(lines) < 25 and max(map(len, lines)) < 100
    assert lines[0].endswith("window=4, sink=1") and lines[-1] == "... 1 more, with other lengths"
    last = next(line for line in lines if line.split()[:1] == ["299"])
    assert last.split()[2:] == ["■", "·", "·", "·", "·", "…", "·", "■", "■", "■", "■"]


def test_drawing_of_nothing():
    assert repr(FrameMask.block_causal([])) == "FrameMask.block_causal: 0 clips, 0 tokens, 0 pairs"


def table(*groups, dtype=torch.int32, **options):
    return FrameMask.from_table(
        torch.tensor([group + [0] * (8 - len(group)) for group in groups], dtype=dtype), **options
    )


class Address:
    """Says that it has memory, and where: nothing is there."""

    shape = (2**20, 2**20)

    def data_ptr(self):
        return 8

    def __repr__(self):
        return "Address"


def fake_lens(make):
    with FakeTensorMode():
        make(torch.ones(2, 8, dtype=torch.int64))


def transformed(transform):
    transform(lambda lens: FrameMask.block_causal(lens) and lens)(torch.ones(1, 1, 2, dtype=torch.int64)[0])


@pytest.mark.parametrize("change", [lambda lens: lens.clear(), lambda lens: lens.extend(range(10**5))])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("planner", PLANNERS)
def test_lists_that_change_while_they_are_read(change, outer, planner, monkeypatch):
    monkeypatch.setattr(host, "_planner", planner)

    class Three:
        def __index__(self):
            change(lens if outer else lens[0])
            return 3

    lens = [[1, Three(), *range(100)], [5] * 100]
    mask = FrameMask.block_causal(lens)
    assert mask.history_lens == [[1, 3, *range(100)], [5] * 100]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrameMask.block_causal([1, 2]), "frame_lens[0] is 1; expected a list of token counts"),
        (lambda: FrameMask.block_causal(5), "frame_lens is 5; expected a list of clips"),
        (lambda: FrameMask.block_causal([[3], [4, -2]]), "frame_lens[1][1] is -2; expected a token count"),
        (lambda: FrameMask.block_causal(torch.tensor([[3], [-2]])), "frame_lens[1][0] is -2; expected a token count"),
        (lambda: FrameMask.block_causal(torch.tensor([[2**40]])), "more than 2147483647 tokens at frame_lens[0]"),
        (lambda: FrameMask.bidirectional([[1.5]]), "lens[0][0] is 1.5; expected a token count, an int >= 0"),
        (lambda: FrameMask.bidirectional([[True]]), "lens[0][0] is True; expected a token count"),
        (lambda: FrameMask.block_causal(torch.ones(1, 2)), "frame_lens[0][0] is 1.0"),
        (lambda: FrameMask.block_causal(torch.ones(1, 2, 2, dtype=torch.int64)), "frame_lens[0][0] is [1, 1]"),
        (lambda: FrameMask.block_causal([[2**31 - 1, 1]]), "more than 2147483647 tokens at frame_lens[0]"),
        (lambda: FrameMask.block_causal([[2**80]]), "more than 2147483647 tokens"),
        (lambda: FrameMask.teacher_forcing([[1]], [[1], [1]]), "history_lens has 1 clips and future_lens has 2"),
        (lambda: FrameMask.teacher_forcing([[1, 2]], [[1]]), "history_lens[0] has 2 frames and future_lens[0] has 1"),
        (
            lambda: FrameMask.teacher_forcing([[1]], [[1]], drop_history=[]),
            "drop_history has 0 clips and future_lens has 1",
        ),
        (
            lambda: FrameMask.teacher_forcing([[1, 2]], [[1, 2]], drop_history=torch.zeros(1, 3, dtype=torch.bool)),
            "history_lens[0] has 2 frames and drop_history[0] has 3",
        ),
        (
            lambda: FrameMask.teacher_forcing([[1]], [[1]], drop_history=[[0]]),
            "drop_history[0][0] is 0; expected a bool",
        ),
        (lambda: FrameMask.block_causal([[1]], window=0), "window is 0; expected a number of frames >= 1"),
        (
            lambda: FrameMask.block_causal([[1]], window_tokens=0),
            "window_tokens is 0; expected a number of tokens >= 1",
        ),
        (
            lambda: FrameMask.block_causal([[1]], window=2, window_tokens=3),
            "window is 2 and window_tokens is 3; expected one",
        ),
        (lambda: FrameMask.block_causal([[1]], queries=2), "queries is 2; expected a slice of frames"),
        (
            lambda: FrameMask.block_causal([[1]], queries=slice(0, 4, 2)),
            "queries is slice(0, 4, 2); expected a slice from int to int, without a step",
        ),
        (
            lambda: FrameMask.block_causal([[1]], queries=slice("a", None)),
            "queries is slice('a', None, None); expected",
        ),
        (lambda: FrameMask.teacher_forcing([[1]], [[1]], future_first=1), "future_first is 1; expected a bool"),
        (
            lambda: FrameMask.block_causal([[3, 4]], queries=slice(1, None)).num_tokens,
            "num_tokens: this mask has 4 queries and 7 keys; expected as many of both",
        ),
        (
            lambda: FrameMask.from_slices([(0, 4)], [(0, 9)], num_queries=8),
            "k_ranges[0] is (0, 9); expected (start, end) with 0 <= start <= end <= 8, which is num_queries",
        ),
        (
            lambda: FrameMask.from_slices([(4, 2)], [(0, 9)], num_queries=8, num_keys=9),
            "q_ranges[0] is (4, 2); expected (start, end) with 0 <= start <= end <= 8, which is num_queries",
        ),
        (
            lambda: FrameMask.from_slices([(0, 4)], [(0, 4), (1, 2)], num_queries=8),
            "q_ranges has 1 ranges and k_ranges has 2; expected the same number",
        ),
        (lambda: FrameMask.from_slices(5, [], num_queries=8), "q_ranges is 5; expected a list of (start, end)"),
        (lambda: FrameMask.from_slices([(1,)], [(1, 2)], num_queries=8), "q_ranges[0] is (1,); expected (start, end)"),
        (
            lambda: FrameMask.from_slices([], [], num_queries=-1),
            "num_queries is -1; expected a token count, an int in 0",
        ),
        (
            lambda: FrameMask.from_slices([], [], num_queries=1, num_keys=2**31),
            "num_keys is 2147483648; expected a token",
        ),
        (lambda: table([0, 4], clip_lens=[4], key_lens=[2, 2]), "key_lens has 2 clips and clip_lens has 1; expected"),
        (lambda: table([0, 4, 0, 3], key_lens=[2]), "frames[0] has key intervals 0..3, 0..0, 0..0; expected"),
        (
            lambda: FrameMask.from_table(torch.zeros(2, 9, dtype=torch.int32)),
            "of shape [2, 9]; expected int32 or int64",
        ),
        (lambda: FrameMask.block_causal([[1]], window=1.0), "window is 1.0; expected a number of frames >= 1"),
        (lambda: FrameMask.block_causal([[1]], sink=-1), "sink is -1; expected a number of frames >= 0"),
        (
            lambda: table([0, 4], dtype=torch.float32),
            "frames is torch.float32 of shape [1, 8]; expected int32 or int64",
        ),
        (lambda: FrameMask.from_table(torch.zeros(2, 6, dtype=torch.int32)), "of shape [2, 6]; expected int32 or"),
        (lambda: table([1, 2]), "frames[0] has rows 1..2; expected a range that starts at 0"),
        (lambda: table([0, 4], [4, 4]), "frames[1] has rows 4..4; expected a range that starts at 4 and is not empty"),
        (
            lambda: table([0, 4, 0, 2, 2, 3]),
            "frames[0] has key intervals 0..2, 2..3, 0..0; expected ascending ones with gaps",
        ),
        (lambda: table([0, 4, 0, 0, 2, 3]), "frames[0] has key intervals 0..0, 2..3, 0..0"),
        (lambda: table([0, 4, 0, 5]), "frames[0] has key intervals 0..5, 0..0, 0..0; expected"),
        (
            lambda: table([0, 4], [4, 6, 3, 5], clip_lens=[4, 2]),
            "frames[1] has key intervals 3..5, 0..0, 0..0; expected",
        ),
        (
            lambda: table([0, 4], [4, 6], clip_lens=[3, 3]),
            "frames[0] has rows 0..4; expected none beyond its clip, which ends at 3",
        ),
        (lambda: table([0, 4], clip_lens=[4, 1]), "clip_lens add up to 5 and frames has 4 rows"),
        (lambda: table([0, 4], clip_lens=[2**63 - 1, 5 - 2**63]), "more than 2147483647 tokens at clip_lens[0]"),
        (lambda: table([0, 4], clip_lens=[2**62] * 4 + [4]), "more than 2147483647 tokens at clip_lens[0]"),
        (lambda: table([0, 4], clip_lens=[8, -4]), "clip_lens[1] is -4; expected a token count"),
        (lambda: table([0, 4], clip_lens=4), "clip_lens is 4; expected a list of token counts"),
        (lambda: table([0, 2**31], dtype=torch.int64), "frames has 2147483648 rows; expected at most 2147483647"),
        (lambda: FrameMask.block_causal(Address()), "frame_lens is Address; expected a list of clips"),
        (lambda: FrameMask.block_causal([Address()]), "frame_lens[0] is Address; expected a list of token counts"),
        (lambda: FrameMask.block_causal(torch.ones(1, 2, device="meta")), "built from numbers, and a tensor here has"),
        (
            lambda: fake_lens(lambda lens: FrameMask.block_causal(lens)),
            "built from numbers, and a tensor here has none",
        ),
        (lambda: fake_lens(lambda lens: FrameMask.block_causal([lens[0]])), "built from numbers, and a tensor here"),
        (lambda: fake_lens(lambda lens: FrameMask.from_table(lens.int())), "built from numbers, and a tensor here has"),
        (lambda: transformed(torch.func.functionalize), "built from numbers, and a tensor here has none"),
        (lambda: transformed(torch.func.vmap), "built from numbers, and a tensor here has none"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


@given(st.integers(1, 6), st.integers(0, 6))
def test_a_window_as_long_as_the_clip_hides_nothing(window, sink):
    frames = min(window, 6)
    whole = FrameMask.teacher_forcing([[2] * frames], [[3] * frames])
    assert torch.equal(
        FrameMask.teacher_forcing([[2] * frames], [[3] * frames], window=window, sink=sink).frames, whole.frames
    )
