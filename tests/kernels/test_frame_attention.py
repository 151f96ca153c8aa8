"""frame_attention and its reference backend. The same file runs on the CPU and, where there is one, on a GPU."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from mimo_kernels.attention import FrameMask, describe_backends, frame_attention
from mimo_kernels.attention import frame as frame_module
from mimo_kernels.core import torch_private
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

from .frame_masks import cases, slices, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK = FrameMask.teacher_forcing([[3, 0, 5], [3, 0, 5]], [[6, 1, 4], [6, 1, 4]])
FEW_ASK = FrameMask.block_causal([[11, 3, 5]] * 2, queries=slice(1, None))
SLICED = FrameMask.from_slices([(0, 30)] * 5, [(7 * i, 7 * i + 4) for i in range(5)], num_queries=30, num_keys=40)
RAGGED = FrameMask.teacher_forcing([[3, 4], [5]], [[2, 6], [1]], drop_history=[[False, True], [False]])


def tensors(mask, heads=2, head_dim=16, dtype=torch.float32, batch=None, seed=0, kv_heads=None):
    """q, k, v."""
    generator = torch.Generator().manual_seed(seed)
    lead, kv_heads, made = () if batch is None else (batch,), kv_heads or heads, []
    for tokens, count in ((mask.num_queries, heads), (mask.num_keys, kv_heads), (mask.num_keys, kv_heads)):
        shape = (*lead, tokens, count, head_dim)
        made.append(torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_())
    return made


def dense_attention(q, k, v, mask, scale=None):
    """The same by the book, in the dtype of q: (out, lse), lse in fp32 or better. Heads of k and v that several of q
    share are repeated."""
    k, v = (x.repeat_interleave(q.shape[-2] // x.shape[-2], -2) for x in (k, v))
    scores = torch.einsum("...ihd,...jhd->...hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = mask.to_dense().to(q.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    # A row without keys: no probabilities instead of 0 / 0.
    weights = torch.where(seen.any(1, keepdim=True), scores, 0.0).softmax(-1) * seen
    return torch.einsum("...hij,...jhd->...ihd", weights, v), scores.logsumexp(-1)


def gradients(out, lse, inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x) for x in (out, lse))
    lse = torch.where(lse.isfinite(), lse, 0.0)
    return torch.autograd.grad([out, lse], inputs, [dout, dlse])


YARDSTICK_HEADS = 64


def plain_and_exact(inputs, mask, scale=None):
    """(out, lse, dq, dk, dv) by plain PyTorch in the dtype of the inputs, and in double precision."""
    results = []
    for same in (inputs, [x.detach().double().requires_grad_() for x in inputs]):
        out, lse = dense_attention(*same, mask, scale)
        results.append([out, lse, *gradients(out, lse, same)])
    return results


def compare(results, inputs, mask, scale=None):
    """In half precision plain PyTorch's errors are those over many heads besides: the largest of a few is luck."""
    plain, exact = plain_and_exact(inputs, mask, scale)
    more = [None] * len(plain)
    if inputs[0].dtype != torch.float32:
        heads, kv_heads = (x.shape[-2] for x in inputs[:2])
        kv_heads = YARDSTICK_HEADS * kv_heads // heads
        heads = kv_heads * (inputs[0].shape[-2] // inputs[1].shape[-2])
        wide = tensors(mask, heads, inputs[0].shape[-1], inputs[0].dtype, seed=2, kv_heads=kv_heads)
        more = list(zip(*plain_and_exact(wide, mask, scale)))
    for name, *result, further in zip(("out", "lse", "dq", "dk", "dv"), results, plain, exact, more):
        assert_within_budget(*result, name=name, more=further)


def check(mask, heads=2, head_dim=16, dtype=torch.float32, batch=None, scale=None, kv_heads=None):
    inputs = tensors(mask, heads, head_dim, dtype, batch, kv_heads=kv_heads)
    with poisoned_memory():
        fenced = [between_nans(x) for x in inputs]
        out, lse = frame_attention(*fenced, mask, scale=scale, backend="reference", return_lse=True)
        results = [out, lse, *gradients(out, lse, fenced)]
    assert out.shape == inputs[0].shape and out.dtype == dtype and lse.dtype == torch.float32
    compare(results, inputs, mask, scale)


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(cases(), slices()),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([8, 24, 72]),
    st.sampled_from([1, 2, 5]),
)
def test_equals_dense_attention(case, dtype, head_dim, heads):
    check(case.mask, heads, head_dim, dtype)


@settings(max_examples=15, deadline=None)
@given(tables(), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_without_keys_and_batches(table, batch, dtype):
    check(FrameMask.from_table(table), batch=batch, dtype=dtype)


@settings(max_examples=15, deadline=None)
@given(
    st.one_of(cases(max_clips=2), slices()),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([(2, 1), (6, 2), (4, 1), (3, 1)]),
)
def test_heads_that_share_keys(case, dtype, heads):
    check(case.mask, heads[0], dtype=dtype, kv_heads=heads[1])


def test_heads_that_share_keys_in_a_batch():
    check(FrameMask.block_causal([[4, 2, 7]], window=2), 4, batch=3, kv_heads=2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims(head_dim):
    check(FrameMask.block_causal([[33, 64, 1, 40]]), 1, head_dim)


@pytest.mark.parametrize(
    ("mask", "calls"),
    [
        (FrameMask.teacher_forcing([[1] * 8] * 6, [[1] * 8] * 6), 3),  # tracks of a factorized network
        (FrameMask.block_causal([[1] * 80], window=20, sink=2), 2),
        (FrameMask.block_causal([[3, 4, 40, 2, 1], [1, 5, 2]]), 6),
        (FrameMask.teacher_forcing([[1, 2, 0]], [[2, 1, 3]], drop_history=[[False, True, True]]), 4),
    ],
)
@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the reference makes a call per frame")
def test_small_frames_share_calls(mask, calls, monkeypatch):
    """Frames of a few tokens are no call each; their gradients and log-sum-exps are those of the dense mask."""
    made, original = [], torch_private.cpu_attention
    monkeypatch.setattr(
        torch_private, "cpu_attention", lambda *given, **named: made.append(1) or original(*given, **named)
    )
    check(mask)
    assert len(made) == calls
    check(mask, dtype=torch.bfloat16)


@pytest.mark.parametrize("scale", [0.0, 1.5, -0.3])
def test_scale(scale):
    check(RAGGED, scale=scale)


def test_a_row_without_keys_gives_zero():
    mask = FrameMask.from_table(torch.tensor([[0, 2, 2, 5, 0, 0, 0, 0], [2, 5, 0, 0, 0, 0, 0, 0]]))
    q, k, v = tensors(mask)
    out, lse = frame_attention(q, k, v, mask, return_lse=True)
    assert out[:2].abs().min() > 0 and lse[:, :2].isfinite().all()
    assert (out[2:] == 0).all() and (lse[:, 2:] == -math.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[2:] == 0).all() and (dk[:2] == 0).all() and (dv[:2] == 0).all() and (dv[2:] != 0).all()


@pytest.mark.parametrize(
    "mask", [FrameMask.block_causal([]), FrameMask.block_causal([[0, 0], [0]]), FrameMask.bidirectional([[0]] * 3)]
)
def test_no_tokens(mask):
    q, k, v = tensors(mask)
    out, lse = frame_attention(q, k, v, mask, return_lse=True)
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


@pytest.mark.parametrize("shape", [(38, 0, 16), (0, 19, 2, 16), (4, 19, 0, 16)])
def test_no_heads_and_no_batch(shape):
    mask = MASK if len(shape) == 3 else FrameMask.teacher_forcing([[3, 0, 5]], [[6, 1, 4]])
    q, k, v = (torch.zeros(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    out, lse = frame_attention(q, k, v, mask, backend="reference", return_lse=True)
    assert out.shape == shape and lse.shape == (*shape[:-3], shape[-2], shape[-3])
    gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(gradient.shape == shape for gradient in gradients)


def test_strides_are_free():
    tokens, heads, head_dim = MASK.num_tokens, 2, 16
    qkv = torch.randn(tokens, 3, heads, head_dim, device=DEVICE)
    expected = frame_attention(*(x.contiguous() for x in qkv.unbind(1)), MASK)
    torch.testing.assert_close(frame_attention(*qkv.unbind(1), MASK), expected)
    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in qkv.unbind(1)]
    out = frame_attention(*turned, MASK)
    torch.testing.assert_close(out, expected)
    out.backward(torch.randn(head_dim, heads, tokens, device=DEVICE).permute(2, 1, 0))
    one = torch.randn(1, 1, head_dim, device=DEVICE).expand(tokens, heads, head_dim)
    torch.testing.assert_close(frame_attention(one, one, one, MASK), one)


def test_lse_alone_is_differentiable():
    inputs = tensors(RAGGED)
    lse = frame_attention(*inputs, RAGGED, return_lse=True)[1]
    actual = torch.autograd.grad(lse.square().sum(), inputs[:2])
    expected = torch.autograd.grad(dense_attention(*inputs, RAGGED)[1].square().sum(), inputs[:2])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_future_frames_leak_nothing():
    mask = FrameMask.teacher_forcing([[4, 3, 5, 2]], [[6, 2, 7, 3]])
    inputs = tensors(mask)
    starts = [0, 4, 7, 12, 14, 20, 22, 29, 32]
    out = frame_attention(*inputs, mask)
    for frame in range(4):
        rows = slice(starts[4 + frame], starts[5 + frame])
        for gradient in torch.autograd.grad(out[rows].square().sum(), inputs[1:], retain_graph=True):
            touched = gradient.abs().sum((1, 2)) > 0
            visible = torch.zeros_like(touched)
            visible[: starts[frame]] = True
            visible[rows] = True
            assert torch.equal(touched, visible)


def test_gradients_are_bitwise_reproducible():
    mask = FrameMask.teacher_forcing([[40] * 6] * 2, [[64] * 6] * 2, window=3, sink=1)
    inputs = tensors(mask, dtype=torch.bfloat16)
    runs = []
    for _ in range(5):
        out, lse = frame_attention(*inputs, mask, return_lse=True)
        runs.append([out, lse, *gradients(out, lse, inputs)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_alike_clips_as_one_batch_equal_each_clip_alone():
    q, k, v = tensors(MASK)
    single = FrameMask.teacher_forcing([[3, 0, 5]], [[6, 1, 4]])
    assert MASK.uniform == (2, 19)
    batched = frame_attention(*(x.unflatten(0, (2, 19)) for x in (q, k, v)), single)
    torch.testing.assert_close(frame_attention(q, k, v, MASK), batched.flatten(0, 1))


@pytest.mark.parametrize("mask", [MASK, RAGGED, FrameMask.block_causal([[4, 2, 7]], window=2, sink=1)])
def test_equals_flex_attention_with_the_same_mask(mask):
    inputs = [x.detach() for x in tensors(mask)]
    tokens = mask.num_tokens
    block_mask = create_block_mask(mask.to_mask_mod(DEVICE), None, None, tokens, tokens, device=DEVICE)
    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in inputs]
    expected = flex_attention(*heads_first, block_mask=block_mask)[0].transpose(0, 1)
    torch.testing.assert_close(frame_attention(*inputs, mask), expected, atol=1e-5, rtol=1e-4)


def test_saves_only_what_the_backward_needs():
    inputs = tensors(MASK)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = frame_attention(*inputs, MASK, return_lse=True)
    shapes = sorted(tuple(x.shape) for x in saved if x.is_floating_point())
    assert shapes == sorted([(1, *x.shape) for x in (*inputs, out, lse)])
    assert sum(x.numel() for x in saved if not x.is_floating_point()) <= MASK.frames.numel()


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler's account of the CPU's memory")
def test_memory_is_linear_in_the_tokens():
    mask = FrameMask.teacher_forcing([[512] * 12], [[512] * 12], window=2, sink=1)
    inputs = tensors(mask, heads=1, head_dim=8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        frame_attention(*inputs, mask).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 40 * mask.num_tokens * 8 * 4 < mask.num_tokens**2 / 8


@pytest.mark.parametrize(("mask", "kv_heads"), [(MASK, 2), (RAGGED, 1), (FEW_ASK, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operators_pass_opcheck(mask, kv_heads, dtype):
    q, k, v = (x.detach().unsqueeze(0).requires_grad_() for x in tensors(mask, dtype=dtype, kv_heads=kv_heads))
    arguments = (q, k, v, mask.pattern, mask.repeats, 0.3)
    torch.library.opcheck(torch.ops.mimo_kernels.frame_attention_reference.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.mimo_kernels.frame_attention_reference(*arguments)
        saved = (*(x.detach() for x in (q, k, v)), out, lse, mask.pattern, mask.repeats, 0.3)
        for dlse in (None, torch.ones_like(lse)):
            torch.library.opcheck(
                torch.ops.mimo_kernels.frame_attention_reference_backward.default, (out, dlse, *saved)
            )


def many_masks():
    """Lengths, clips, frames, windows, sinks: everything a training run may change from batch to batch."""
    masks = []
    for i in range(12):
        clips, frames = 2 + i % 3, 2 + i % 4
        history, future = [[3 + i] * frames] * clips, [[5 + i % 5] * frames] * clips
        masks.append(FrameMask.teacher_forcing(history, future, window=None if i % 2 else 2, sink=i % 2))
    return masks


def test_compiles_whole_and_once_for_all_lengths():
    counter = CompileCounterWithBackend("aot_eager")

    def function(q, k, v, mask):
        return frame_attention(q * 1.5, k, v, mask, backend="reference", return_lse=True)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for mask in many_masks():
        inputs = tensors(mask)
        expected, actual = function(*inputs, mask), compiled(*inputs, mask)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradients(*actual, inputs), gradients(*expected, inputs))
    # The first lengths as constants, then all others as variables.
    assert counter.frame_count == 2


def test_compiles_once_for_all_counts_of_keys():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(frame_attention, fullgraph=True, backend=counter)
    for i in range(3):
        mask = FrameMask.block_causal([[4 + i, 3, 5 + 2 * i]], queries=slice(1, None))
        inputs = [x.detach() for x in tensors(mask)]
        torch.testing.assert_close(compiled(*inputs, mask), frame_attention(*inputs, mask))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "make", [FrameMask.block_causal, FrameMask.bidirectional, lambda x: FrameMask.teacher_forcing(x, x)]
)
@pytest.mark.parametrize("lens", [[[3, 4]], torch.tensor([[3, 4]])])
def test_a_mask_built_inside_breaks_the_graph_and_no_more(make, lens):
    def function(q):
        mask = make(lens)
        return frame_attention(2 * q[: mask.num_tokens], q[: mask.num_tokens], q[: mask.num_tokens], mask) + 1

    q = torch.randn(14, 2, 16, device=DEVICE)
    counter = CompileCounterWithBackend("eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = torch.compile(function, backend=counter)(q)
    assert torch.equal(actual, function(q)) and counter.frame_count >= 1
    assert not [warning for warning in caught if "mimo_kernels" in str(warning.message)]
    with pytest.raises(Exception, match="a FrameMask is built on the host from numbers"):
        torch.compile(function, backend="eager", fullgraph=True)(q)


def test_compiles_with_the_mask_closed_over_and_any_backend():
    inputs = tensors(RAGGED)
    compiled = torch.compile(lambda q, k, v: frame_attention(q, k, v, RAGGED).sin(), fullgraph=True)
    expected, actual = frame_attention(*inputs, RAGGED).sin(), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


def test_activation_checkpointing():
    inputs = tensors(MASK)
    expected = torch.autograd.grad(frame_attention(*inputs, MASK).square().sum(), inputs)
    out = checkpoint(frame_attention, *inputs, MASK, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.square().sum(), inputs), expected))


def test_auto_takes_the_reference_on_the_cpu():
    assert describe_backends("cpu")["reference"] == []
    inputs = [x.detach().cpu() for x in tensors(MASK)]
    assert torch.equal(frame_attention(*inputs, MASK), frame_attention(*inputs, MASK, backend="reference"))


def test_triton_comes_first_on_a_gpu():
    backends = describe_backends("cuda")
    assert list(backends) == ["triton", "cuda", "reference"]
    assert torch.cuda.is_available() or (backends["triton"] and backends["cuda"])


def test_the_cuda_backend_refuses_masks_it_does_not_know(monkeypatch):
    monkeypatch.setattr(frame_module, "_serving_backend", lambda *_: "cuda")
    reason = "backend 'cuda' cannot serve: the mask has 30 queries and 40 keys, expected as many of both in each clip; "
    with pytest.raises(ValueError, match=reason + "a row of the mask sees 5 intervals of keys, expected at most 3"):
        frame_attention(*tensors(SLICED), SLICED, backend="cuda")


def test_the_cuda_backend_says_every_reason():
    reason = "backend 'cuda' cannot serve: q, k and v are torch.float32, .*; head_dim is 16, "
    reason += "expected one of 64, 72, 80, 128"
    with pytest.raises(ValueError, match=reason):
        frame_attention(*tensors(MASK), MASK, backend="cuda")


def test_triton_refuses_cpu_tensors_outside_its_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    frame_module._choose.cache_clear()
    inputs = [x.detach().cpu() for x in tensors(MASK)]
    with pytest.raises(ValueError, match="backend 'triton' cannot serve: .*cpu.*TRITON_INTERPRET"):
        frame_attention(*inputs, MASK, backend="triton")


def bad(message, q=(38, 2, 16), k=None, v=None, mask=MASK, dtype=torch.float32, device=None, **options):
    k = k or q
    v = v or k
    return pytest.param(q, k, v, mask, dtype, device, options, message)


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "dtype", "device", "options", "message"),
    [
        bad("k is torch.float16, expected torch.float32 (as q)", dtype=torch.float16),
        bad("q is torch.float64, expected torch.float32, torch.float16 or torch.bfloat16", dtype=(torch.float64,) * 3),
        bad("k has 3 heads, expected a number that divides the 4 heads of q", q=(38, 4, 16), k=(38, 3, 16)),
        bad("k has 4 heads, expected a number that divides the 2 heads of q", k=(38, 4, 16)),
        bad("k has 0 heads, expected a number that divides the 2 heads of q", k=(38, 0, 16)),
        bad("k has 2 heads, expected a number that divides the 0 heads of q", q=(38, 0, 16), k=(38, 2, 16)),
        bad("k has shape [37, 2, 16], expected [38, kv_heads, 16]", k=(37, 2, 16)),
        bad("k has shape [1, 38, 2, 16], expected [38, kv_heads, 16]", k=(1, 38, 2, 16)),
        bad("v has shape [37, 2, 16], expected [38, 2, 16] (as k)", k=(38, 2, 16), v=(37, 2, 16)),
        bad("v has shape [38, 1, 16], expected [38, 2, 16] (as k)", k=(38, 2, 16), v=(38, 1, 16)),
        bad("q has 38 tokens, expected 16 as the mask has", mask=FEW_ASK),
        bad("k has shape [16, 2, 16], expected [38, kv_heads, 16]", q=(16, 2, 16), mask=FEW_ASK),
        bad("head_dim is 12, expected a multiple of 8 from 8 to 256", q=(38, 2, 12)),
        bad("head_dim is 264, expected a multiple of 8 from 8 to 256", q=(38, 2, 264)),
        bad("q has 39 tokens, expected 38 as the mask has, or a mask made for this sequence", q=(39, 2, 16)),
        bad("q has shape [38, 16], expected [tokens, heads, head_dim] or", q=(38, 16)),
        bad("q is a batch of 3 sequences and the mask has 2 clips, expected a mask of one clip", q=(3, 38, 2, 16)),
        bad("k is on meta, expected cpu (as q)", device="meta"),
        bad("mask is a Tensor, expected a FrameMask", mask=torch.ones(38, 38)),
        bad("scale is nan, expected a finite number", scale=float("nan")),
        bad("scale is -inf, expected a finite number", scale=-float("inf")),
        bad("frame_attention: scale is 'x', expected a finite number", scale="x"),
        bad("scale is [0.5], expected a finite number", scale=[0.5]),
        bad("looks like the [heads, tokens, head_dim] of scaled_dot_product_attention", q=(2, 38, 16)),
        bad("tokens come before heads: q.transpose(1, 2))", q=(3, 2, 38, 16)),
        bad("frame_attention: unknown backend 'flash'; expected one of auto, ", backend="flash"),
    ],
)
def test_bad_input(q, k, v, mask, dtype, device, options, message):
    dtypes = dtype if isinstance(dtype, tuple) else (torch.float32, dtype, torch.float32)
    q, k, v = (torch.zeros(shape, dtype=dtype, device=DEVICE) for shape, dtype in zip((q, k, v), dtypes))
    with pytest.raises(ValueError) as error:
        frame_attention(q, k if device is None else k.to(device), v, mask, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_mask_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        mask = FrameMask.block_causal([[3, 4]])
    q = torch.randn(7, 2, 16, requires_grad=True)
    frame_attention(q, q, q, mask).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("heads", [0, 2])
def test_tensors_without_numbers_give_shapes(heads):
    """Meta tensors, FakeTensorMode around the call or around the mask as well, functionalize."""
    mask = FrameMask.block_causal([[3, 4]])
    meta = torch.empty(7, heads, 16, device="meta")
    assert frame_attention(meta, meta, meta, mask).shape == (7, heads, 16)
    with FakeTensorMode():
        fake = torch.empty(7, heads, 16, requires_grad=True)
        for inside in (mask, FrameMask.block_causal([[3, 4]]), FrameMask.block_causal([])):
            if inside.num_tokens:
                out, lse = frame_attention(fake, fake, fake, inside, return_lse=True)
                assert out.shape == (7, heads, 16) and lse.shape == (heads, 7)
                assert torch.autograd.grad(out.sum(), fake)[0].shape == fake.shape
    assert torch_private.is_fake(out)
    real = torch.randn(7, 2, 16)
    functional = torch.func.functionalize(lambda x: frame_attention(x, x, x, FrameMask.block_causal([[3, 4]])))(real)
    assert torch.equal(functional, frame_attention(real, real, real, mask))


def test_a_table_that_was_written_to_is_refused():
    q, k, v = (x.detach() for x in tensors(MASK))
    for attribute in ("frames", "pattern"):
        mask = FrameMask.teacher_forcing([[3, 0, 5], [3, 0, 5]], [[6, 1, 4], [6, 1, 4]])
        frame_attention(q, k, v, mask)
        getattr(mask, attribute)[0, 3] = 2
        with pytest.raises(ValueError, match="the mask's table `frames` was written to; .* make a new one"):
            frame_attention(q, k, v, mask)


def test_arrays_are_not_tensors():
    x = np.zeros((38, 2, 16), dtype=np.float32)
    with pytest.raises(ValueError, match="frame_attention: v is a ndarray, expected a torch.Tensor"):
        frame_attention(torch.from_numpy(x), torch.from_numpy(x), x, MASK)


def test_equals_two_calls_of_sdpa_by_hand():
    """MiMo's own frames: history is block causal, a future frame sees earlier history and itself."""
    history, future = [3, 5], [4, 6]
    mask = FrameMask.teacher_forcing([history], [future])
    q, k, v = (x.detach() for x in tensors(mask))

    def sdpa(rows, keys):
        heads_first = [x.transpose(0, 1) for x in (q[rows], k[keys], v[keys])]
        return F.scaled_dot_product_attention(*heads_first).transpose(0, 1)

    expected = [sdpa(slice(0, 3), slice(0, 3)), sdpa(slice(3, 8), slice(0, 8)), sdpa(slice(8, 12), slice(8, 12))]
    expected.append(sdpa(slice(12, 18), [*range(3), *range(12, 18)]))
    torch.testing.assert_close(frame_attention(q, k, v, mask), torch.cat(expected))
