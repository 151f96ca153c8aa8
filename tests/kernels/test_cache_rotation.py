"""Frames of a FrameCache whose keys are rotated to other times, from the keys before RoPE."""

import pytest
import torch
from torch import Tensor

from mimo_kernels import AxialRoPE, FrameCache, paged_frame_attention
from mimo_kernels.ops.rope import apply_rope

LAYERS, HEADS, DIM, TOKENS, PAGE = 2, 2, 16, 6, 4
ROPE = AxialRoPE(DIM, theta=10.0)


def at(time: int) -> Tensor:
    """Coordinates of a frame of 2 x 3 tokens."""
    grid = torch.cartesian_prod(torch.tensor([time]), torch.arange(2), torch.arange(3))
    return grid.to(torch.int32)


def turn_to(time: int):
    return lambda k: apply_rope(k, at(time), ROPE)


def random_frame(seed: int, seqs: int = 1, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Keys before RoPE and values, [layers, seqs, tokens, heads, head_dim]."""
    shape = 2, LAYERS, seqs, TOKENS, HEADS, DIM
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).unbind()


def append(cache: FrameCache, seqs: list[int], seed: int, time: int, rotatable: bool) -> tuple[Tensor, Tensor]:
    keys, values = random_frame(seed, len(seqs), cache.dtype)
    turned = torch.stack([torch.stack([turn_to(time)(k) for k in layer]) for layer in keys])
    cache.append(seqs, turned, values, keys if rotatable else None)
    return keys, values


def make(num_pages: int = 12, **options) -> FrameCache:
    return FrameCache(LAYERS, HEADS, DIM, num_pages=num_pages, page_size=PAGE, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_1000_rotations_keys_are_those_of_one(dtype):
    cache = make(dtype=dtype)
    seq = cache.new_sequence()
    keys, values = append(cache, [seq], 0, time=0, rotatable=True)
    for i in range(1000):
        cache.rotate([seq], 0, turn_to(i * 37 % 1000))
    cache.rotate([seq], 0, turn_to(21))
    k, v = cache.frame(seq, 0)
    expected = torch.stack([turn_to(21)(layer[0]) for layer in keys])
    assert torch.equal(k, expected) and torch.equal(v, values[:, 0])
    assert cache.num_free_pages == 12 - 2 and cache.frame_indices(seq) == [0]


def test_the_sink_of_a_long_rollout_stays_in_the_trained_range():
    """A window of 3 frames and a sink: the time of a key is never further from the query's than 4, and attention is
    what it is at times 0 to 4, as in training."""
    window, frames = 3, 40
    cache = make()
    seq = cache.new_sequence()
    history: list[tuple[Tensor, Tensor]] = []
    for time in range(frames):
        if cache.num_frames(seq) > window:
            cache.rotate([seq], 0, turn_to(time - window - 1))
        shown = [0, *range(max(1, time - window), time)][: cache.num_frames(seq)]
        assert cache.frame_indices(seq) == shown
        generator = torch.Generator().manual_seed(1000 + time)
        q, k_own, v_own = torch.randn(3, TOKENS, HEADS, DIM, generator=generator)
        first = max(0, time - window - 1)  # the time of the sink, and 0 in training
        rotated = (turn_to(time)(x)[None] for x in (q, k_own))
        out = paged_frame_attention(*rotated, v_own[None], cache, layer=1, view=cache.view([seq]))
        trained = [0, *range(time - first - len(shown) + 1, time - first)][: len(shown)]
        assert max([time - first, *trained]) <= window + 1
        keys = [turn_to(t)(history[index][0][1, 0]) for t, index in zip(trained, shown, strict=True)]
        values = [history[index][1][1, 0] for index in shown]
        k = torch.cat([*keys, turn_to(time - first)(k_own)]).double()
        weight = torch.einsum("qhd,khd->hqk", turn_to(time - first)(q).double(), k).mul(DIM**-0.5).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weight, torch.cat([*values, v_own]).double())
        torch.testing.assert_close(out[0].double(), expected, rtol=1e-4, atol=1e-5)
        history.append(append(cache, [seq], time, time, rotatable=time == 0))
        cache.evict(seq, window=window, sink=1)


def test_forks_share_what_is_rotated_and_others_keep_theirs():
    cache = make()
    seq = cache.new_sequence()
    append(cache, [seq], 0, time=0, rotatable=True)
    fork, other = cache.fork(seq), cache.fork(seq)
    pinned = cache.view([seq], pinned=True)
    before = cache.frame(other, 0)[0]
    cache.rotate([seq, fork], 0, turn_to(5))
    assert cache.num_free_pages == 12 - 4
    assert torch.equal(cache.frame(seq, 0)[0], cache.frame(fork, 0)[0])
    assert torch.equal(cache.frame(other, 0)[0], before) and not torch.equal(cache.frame(seq, 0)[0], before)
    rows = pinned.rows()
    assert torch.equal(cache.pool.flatten(2, 3)[:, 0, rows], before)
    cache.rotate([other], 0, turn_to(5))
    assert torch.equal(cache.frame(other, 0)[0], cache.frame(seq, 0)[0])


def test_a_view_of_before_is_out_of_date():
    cache = make()
    seq = cache.new_sequence()
    append(cache, [seq], 0, time=0, rotatable=True)
    view = cache.view([seq])
    cache.rotate([seq], 0, turn_to(3))
    with pytest.raises(ValueError, match="older than the cache"):
        cache.check_view(view)


def test_slots_keep_the_address_of_unrotated_keys():
    """A captured graph writes there; what was committed stays."""
    cache = make()
    seq = cache.new_sequence()
    slot, address = None, None
    for seed in (0, 1):
        keys, values = random_frame(seed)
        slot = cache.begin_frame([seq], TOKENS, reuse=slot, rotatable=True)
        address = address or slot.unrotated.data_ptr()
        assert slot.unrotated.data_ptr() == address
        for layer in range(LAYERS):
            cache.write(slot, layer, keys[layer], values[layer], keys[layer])
        cache.commit(slot)
    for index in (0, 1):
        cache.rotate([seq], index, lambda k: 2 * k)
        assert torch.equal(cache.frame(seq, index)[0], 2 * random_frame(index)[0][:, 0])
    with pytest.raises(ValueError, match=r"cannot reuse a slot .* rotatable: True, for 1 x 6 tokens, rotatable: False"):
        cache.begin_frame([seq], TOKENS, reuse=slot)


def test_saving_keeps_unrotated_keys():
    cache = make()
    seq = cache.new_sequence()
    append(cache, [seq], 0, time=0, rotatable=True)
    append(cache, [seq], 1, time=1, rotatable=False)
    fork = cache.fork(seq)
    state = cache.state_dict()
    restored = make(num_pages=20)
    restored.load_state_dict(state)
    for one in (cache, restored):
        one.rotate([seq, fork], 0, turn_to(9))
        assert one.num_pages - one.num_free_pages == 4  # the fork still shares it
    assert torch.equal(cache.frame(fork, 0)[0], restored.frame(fork, 0)[0])
    with pytest.raises(ValueError, match="appended without its unrotated keys, expected a rotatable one"):
        restored.rotate([seq], 1, turn_to(9))
    table = state["unrotated_frames"]
    for wrong, message in (
        ({"unrotated": state["unrotated"][1:]}, r"unrotated has shape \[5, 2, 2, 16\], expected \[6, 2, 2, 16\]"),
        ({"unrotated_frames": table.int()}, "unrotated_frames is torch.int32"),
        ({"unrotated_frames": table + torch.tensor([1, 0])}, "unrotated keys for page 1, with which no frame begins"),
        ({"unrotated_frames": table.repeat(2, 1)}, r"expected \[12, 2, 2, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            restored.load_state_dict({**state, **wrong})


def test_wrong_use_is_named_and_changes_nothing():
    cache = make(num_pages=4)
    seq = cache.new_sequence()
    keys, values = random_frame(0)
    slot = cache.begin_frame([seq], TOKENS)
    with pytest.raises(ValueError, match="unrotated is given, expected None: the slot's rotatable is False"):
        cache.write(slot, 0, keys[0], values[0], keys[0])
    cache.cancel(slot)
    slot = cache.begin_frame([seq], TOKENS, rotatable=True)
    with pytest.raises(ValueError, match="unrotated is missing, expected the keys before RoPE"):
        cache.write(slot, 0, keys[0], values[0])
    with pytest.raises(ValueError, match="has an open frame and cannot have a frame rotated"):
        cache.rotate([seq], 0, turn_to(1))
    cache.cancel(slot)
    append(cache, [seq], 0, time=0, rotatable=True)
    for turn, message in (
        (lambda k: k[1:], r"what turn returns has shape \[5, 2, 2, 16\], expected \[6, 2, 2, 16\]"),
        (lambda k: k.double(), "what turn returns is torch.float64, expected torch.float32"),
        (lambda k: k.clone().requires_grad_(), "what turn returns requires a gradient"),
        (lambda k: 1 / 0, "division by zero"),
    ):
        with pytest.raises((ValueError, ZeroDivisionError), match=message):
            cache.rotate([seq], 0, turn)
    with pytest.raises(ValueError, match="frame 3 of sequence 0 is not resident"):
        cache.rotate([seq], 3, turn_to(1))
    assert cache.num_free_pages == 2
    append(cache, [seq], 1, time=1, rotatable=False)
    with pytest.raises(ValueError, match="the cache is full"):
        cache.rotate([seq], 0, turn_to(1))
    assert cache.num_free_pages == 0 and cache.frame_indices(seq) == [0, 1]
