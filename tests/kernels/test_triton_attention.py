"""The Triton kernels of frame_attention against dense attention: interpreted on the CPU (fp32, fp16), compiled where
there is a GPU."""

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mimo_kernels.attention import FrameMask, frame_attention
from mimo_kernels.attention.triton import operator as triton_op
from mimo_kernels.attention.triton import schedule as triton_plan
from mimo_kernels.attention.triton.schedule import Config, configs
from mimo_kernels.attention.triton.tiles import split_head_dim
from mimo_kernels.testing import between_nans, poisoned_memory

from .frame_masks import cases, slices, tables
from .test_frame_attention import DEVICE, compare, gradients, tensors

attend = functools.partial(frame_attention, backend="triton")
# Rows that start, end and cross tiles of 32 rows and blocks of 16 or 32 keys; bare and masked blocks; several clips.
MASK = FrameMask.teacher_forcing(
    [[20, 0, 40], [5, 16, 1]], [[33, 7, 32], [16, 16, 16]], drop_history=[[False, False, True], [False] * 3]
)

SMALL = FrameMask.teacher_forcing([[9, 12]], [[20, 17]])


def check(mask, heads=1, head_dim=16, dtype=torch.float32, batch=None, scale=None, inputs=None, kv_heads=None):
    inputs = inputs or tensors(mask, heads, head_dim, dtype, batch, kv_heads=kv_heads)
    with poisoned_memory():
        fenced = [between_nans(x) if x.is_contiguous() else x for x in inputs]
        out, lse = attend(*fenced, mask, scale=scale, return_lse=True)
        results = [out, lse, *gradients(out, lse, fenced)]
    assert out.shape == inputs[0].shape and out.dtype == dtype and lse.dtype == torch.float32
    compare(results, inputs, mask, scale)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(cases(max_clips=2), slices()), st.sampled_from([torch.float32, torch.float16]))
def test_equals_dense_attention(case, dtype):
    check(case.mask, dtype=dtype)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(tables())
def test_any_intervals_and_rows_without_keys(table):
    check(FrameMask.from_table(table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 72, 80, 96, 112, 128, 256])
def test_head_dims(head_dim, dtype):
    check(FrameMask.block_causal([[19, 17]]), head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_and_blocks_of_every_kind(dtype):
    check(MASK, head_dim=24, dtype=dtype)


@pytest.mark.parametrize(
    "mask",
    [
        FrameMask.block_causal([[8] * 9], window=3, sink=1),
        FrameMask.block_causal([[1] * 40]),
        FrameMask.teacher_forcing([[8, 8]] * 2, [[16, 16]] * 2),
        FrameMask.bidirectional([[3, 4], [50], [1]]),
    ],
    ids=["window and sink", "frames of one token", "equal clips", "bidirectional"],
)
def test_masks(mask):
    check(mask)


@pytest.mark.parametrize(
    "mask",
    [
        FrameMask.from_slices([(0, 50)] * 6, [(14 * i, 14 * i + 9) for i in range(6)], num_queries=70, num_keys=90),
        FrameMask.teacher_forcing([[20, 7]], [[33, 18]], future_first=True, window_tokens=30),
        FrameMask.from_slices([(0, 3)], [(0, 0)], num_queries=3, num_keys=0),
        FrameMask.from_slices([], [], num_queries=0, num_keys=5),
    ],
    ids=["many intervals", "future first", "no keys", "no queries"],
)
def test_masks_beyond_frames(mask):
    check(mask)


def test_other_keys_than_queries_with_a_batch_and_with_clips_alike():
    check(FrameMask.block_causal([[40, 9, 21]], queries=slice(-2, None)), heads=2, batch=2)
    check(FrameMask.block_causal([[30, 9]] * 3, queries=slice(1, None)))


def test_a_schedule_of_one_clip_serves_bands_of_clips(monkeypatch):
    monkeypatch.setattr(triton_plan, "BAND_ROWS", 120)
    mask = FrameMask.teacher_forcing([[8, 5]] * 5, [[9, 6]] * 5)
    assert [triton_op.plans(tensors(mask, heads)[0], mask)["forward"].band for heads in (1, 2, 9)] == [4, 2, 1]
    check(mask, heads=2)


def test_batch():
    check(FrameMask.block_causal([[10, 20, 7]]), heads=2, batch=3)


@pytest.mark.parametrize(("heads", "kv_heads", "dtype"), [(2, 1, torch.float32), (6, 2, torch.float16)])
def test_heads_that_share_keys(heads, kv_heads, dtype):
    """Tiles of either pass with bare and masked blocks: the sums over heads go over both."""
    check(MASK, heads, head_dim=24, dtype=dtype, kv_heads=kv_heads)


def test_heads_that_share_keys_in_a_batch_of_slices():
    mask = FrameMask.block_causal([[20, 17]])
    projection = torch.randn(2, mask.num_tokens, 4 + 2 * 2, 16, device=DEVICE)
    check(mask, inputs=[x.requires_grad_() for x in projection.split((4, 2, 2), 2)])


def test_a_batch_larger_than_a_grid(monkeypatch):
    monkeypatch.setattr(triton_op, "MAX_BATCH", 2)
    check(FrameMask.block_causal([[5, 4]]), batch=5)


def test_scale():
    mask = FrameMask.block_causal([[10, 7]])
    for scale in (2.0, -0.7, 0.0):
        check(mask, scale=scale)


def test_views_of_a_projection_are_read_in_place():
    mask = FrameMask.teacher_forcing([[7, 9]], [[8, 8]])
    qkv = torch.randn(mask.num_tokens, 3, 2, 24, device=DEVICE)
    qkv[:, 1:] *= 0.5
    views = [qkv[:, i].detach().requires_grad_() for i in range(3)]
    assert all(triton_op._addressable(x.unsqueeze(0)).data_ptr() == x.data_ptr() for x in views)
    check(mask, head_dim=24, inputs=views)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1).detach().requires_grad_() for x in views]
    check(mask, head_dim=24, inputs=heads_first)


def test_views_that_cannot_be_read_in_place_are_copied():
    mask = FrameMask.block_causal([[7, 9]])
    wide = torch.randn(3, mask.num_tokens, 2, 27, device=DEVICE)
    check(mask, head_dim=24, inputs=[wide[i, ..., 3:].detach().requires_grad_() for i in range(3)])


def test_gradients_are_the_same_bits_every_time():
    inputs = tensors(SMALL, heads=2, head_dim=24, kv_heads=1)
    first, second = (gradients(*attend(*inputs, SMALL, return_lse=True), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_what_a_row_cannot_see_does_not_reach_it():
    mask = FrameMask.teacher_forcing([[6, 6, 6]], [[8, 8, 8]])
    dense = mask.to_dense().to(DEVICE)
    inputs = tensors(mask)
    out = attend(*inputs, mask)
    rows = slice(18 + 8, 18 + 16)  # the second future frame: sees the first history frame and itself
    dk, dv = torch.autograd.grad(out[rows].sum(), inputs[1:])
    unseen = ~dense[rows.start]
    assert dk[unseen].eq(0).all() and dv[unseen].eq(0).all()
    assert dk[~unseen].ne(0).any() and dv[~unseen].ne(0).any()


def test_only_one_of_the_gradients():
    inputs = tensors(SMALL, head_dim=16)
    out, lse = attend(*inputs, SMALL, return_lse=True)
    (from_out,) = torch.autograd.grad(out.sum(), inputs[0], retain_graph=True)
    (from_lse,) = torch.autograd.grad(torch.where(lse.isfinite(), lse, 0.0).sum(), inputs[0], retain_graph=True)
    (both,) = torch.autograd.grad(out.sum() + torch.where(lse.isfinite(), lse, 0.0).sum(), inputs[0])
    torch.testing.assert_close(from_out + from_lse, both, atol=1e-5, rtol=1e-5)


def test_checkpointing():
    inputs = tensors(SMALL)
    plain = torch.autograd.grad(attend(*inputs, SMALL).square().sum(), inputs)
    again = torch.autograd.grad(checkpoint(attend, *inputs, SMALL, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_compiles_as_one_graph():
    compiled = torch.compile(lambda q, k, v, mask: attend(q * 2, k, v, mask), fullgraph=True, backend="aot_eager")
    for lens in ([[4, 6]], [[7, 3, 5]]):
        mask = FrameMask.block_causal(lens)
        inputs = tensors(mask)
        expected = torch.autograd.grad(attend(inputs[0] * 2, *inputs[1:], mask).square().sum(), inputs)
        actual = torch.autograd.grad(compiled(*inputs, mask).square().sum(), inputs)
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b)


def test_opcheck():
    mask = FrameMask.teacher_forcing([[3, 4]], [[5, 2]])
    q, k, v = (x.unsqueeze(0).detach().requires_grad_() for x in tensors(mask, kv_heads=1))
    torch.library.opcheck(torch.ops.mimo_kernels.frame_attention_triton, (q, k, v, mask.pattern, 1, 0.25))
    mask = FrameMask.block_causal([[3, 4]], queries=slice(1, None))
    q, k, v = (x.unsqueeze(0).detach().requires_grad_() for x in tensors(mask))
    torch.library.opcheck(torch.ops.mimo_kernels.frame_attention_triton, (q, k, v, mask.pattern, 1, 0.25))


def test_nothing_to_do():
    for mask, shape in ((FrameMask.block_causal([[0, 0]]), (0, 2, 16)), (FrameMask.block_causal([[5]]), (5, 0, 16))):
        inputs = [torch.zeros(shape, device=DEVICE, requires_grad=True) for _ in range(3)]
        out = attend(*inputs, mask)
        assert out.shape == shape
        out.sum().backward()
        assert inputs[0].grad.shape == shape


def test_plans_are_made_once_per_mask():
    mask = FrameMask.block_causal([[10, 20]])
    inputs = tensors(mask)
    first = triton_op.plans(inputs[0], mask)
    attend(*inputs, mask).sum().backward()
    again = triton_op.plans(inputs[0], mask)
    assert all(again[name] is first[name] for name in first)
    assert first["forward"].data is first["dq"].data  # equal tiles share a schedule
    assert triton_op.plans(inputs[0], FrameMask.block_causal([[10, 20]]))["forward"] is not first["forward"]


def test_the_cheaper_tile_height_is_taken(monkeypatch):
    choices = (Config(64, 16, 1, 1), Config(16, 16, 1, 1, 1.2))
    monkeypatch.setattr(triton_plan, "configs", lambda *_: choices)
    q = torch.zeros(1, 1, 1, 16, device=DEVICE)
    whole = triton_op.plans(q, FrameMask.block_causal([[64, 64]]))["forward"]
    thin = triton_op.plans(q, FrameMask.teacher_forcing([[16, 16, 16]], [[16, 16, 16]]))["forward"]
    assert whole.config is choices[0] and thin.config is choices[1]
    assert whole.executed_pairs == 64 * 64 + 64 * 128


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU multiplies bfloat16 rightly")
def test_the_interpreter_refuses_bfloat16():
    inputs = tensors(MASK, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="'triton' cannot serve: .*bfloat16"):
        attend(*inputs, MASK)


def test_head_dims_split_into_powers_of_two():
    assert [split_head_dim(d) for d in (8, 64, 72, 80, 96, 104, 128, 240, 256)] == [
        (16,), (64,), (64, 16), (64, 16), (64, 32), (64, 32, 16), (128,), (256,), (256,)
    ]  # fmt: skip
    for head_dim in range(8, 257, 8):
        parts = split_head_dim(head_dim)
        assert head_dim <= sum(parts) < head_dim + 48 and list(parts) == sorted(set(parts), reverse=True)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 120, 121])
def test_every_architecture_has_tile_sizes(arch):
    for name, dtype, head_dim in itertools.product(
        ("forward", "dq", "dkv"), (torch.float32, torch.bfloat16), range(8, 257, 8)
    ):
        assert configs(name, arch, dtype, head_dim)
