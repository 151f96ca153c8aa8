"""The attention kernels on a device: bf16 against fp32, bitwise repeatability, sizes beyond 32 bits, graphs, and what
must not happen between."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_kernels.attention import FrameMask, frame_attention
from mimo_kernels.attention.triton import backward as triton_bwd
from mimo_kernels.attention.triton import forward as triton_fwd
from mimo_kernels.attention.triton.schedule import PASSES, architecture, configs
from mimo_kernels.testing import assert_within_budget, poisoned_memory

pytestmark = pytest.mark.gpu

# A clip or two of each; a dense matrix in double precision has to fit.
SHAPES = {
    "k600": (FrameMask.teacher_forcing([[160] * 5] * 2, [[256] * 5] * 2), 72),
    "ucf": (FrameMask.teacher_forcing([[40] * 16] * 2, [[64] * 16] * 2), 72),
    "ragged": (FrameMask.teacher_forcing([[131] * 3, [177] * 5], [[256] * 3, [256] * 5]), 72),
    "minecraft": (FrameMask.teacher_forcing([[40] * 80], [[64] * 80]), 64),
    "wan": (FrameMask.teacher_forcing([[1560] * 3], [[1560] * 3]), 128),
    "far": (FrameMask.block_causal([[64] * 16] * 2), 64),
    "window and sink": (FrameMask.teacher_forcing([[196] * 12], [[196] * 12], window=4, sink=1), 64),
    "window in tokens": (
        FrameMask.teacher_forcing([[196, 50] * 4], [[196, 50] * 4], window_tokens=300, future_first=True),
        64,
    ),
    "few ask": (FrameMask.block_causal([[256] * 8] * 2, queries=slice(-2, None)), 128),
    "many intervals": (
        FrameMask.from_slices(
            [(0, 700), (100, 900)] * 20, [(97 * i, 97 * i + 60) for i in range(40)], num_queries=1000, num_keys=4000
        ),
        72,
    ),
}
KERNELS = (
    triton_fwd.frame_attention_fwd_kernel,
    triton_bwd.frame_attention_dq_kernel,
    triton_bwd.frame_attention_dkv_kernel,
)


def tensors(mask, heads=2, head_dim=72, dtype=torch.bfloat16, seed=0, kv_heads=None):
    generator = torch.Generator("cuda").manual_seed(seed)
    kv_heads = kv_heads or heads
    shapes = [(mask.num_queries, heads, head_dim), *[(mask.num_keys, kv_heads, head_dim)] * 2]
    made = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes]
    return [x.requires_grad_() for x in made]


def attend(*args, **kwargs):
    return frame_attention(*args, backend="triton", **kwargs)


def dense_attention(q, k, v, seen):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.where(seen.any(1, keepdim=True), scores, 0.0).softmax(-1) * seen
    return torch.einsum("hij,jhd->ihd", weights, v), scores.logsumexp(-1)


def results(function, inputs, douts):
    out, lse = function(*inputs)
    gradients = torch.autograd.grad(
        [out, torch.where(lse.isfinite(), lse, 0.0)], inputs, [x.to(y.dtype) for x, y in zip(douts, (out, lse))]
    )
    return [out, lse, *gradients]


def check(mask, **kwargs):
    inputs = tensors(mask, **kwargs)
    seen = mask.to_dense().cuda()
    tokens, heads, _ = inputs[0].shape
    douts = torch.randn_like(inputs[0]), torch.randn(heads, tokens, device="cuda")
    with poisoned_memory():
        actual = results(lambda q, k, v: attend(q, k, v, mask, return_lse=True), inputs, douts)
    plain = results(lambda q, k, v: dense_attention(q, k, v, seen), inputs, douts)
    exact = results(
        lambda q, k, v: dense_attention(q, k, v, seen), [x.detach().double().requires_grad_() for x in inputs], douts
    )
    for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv"), actual, plain, exact):
        assert_within_budget(a, p, e, name=name)


@st.composite
def masks(draw) -> FrameMask:
    length = st.sampled_from([0, 1, 7, 40, 63, 64, 65, 128, 160, 200, 256])
    clips = draw(st.integers(1, 4))
    frames = [draw(st.integers(1, 5)) for _ in range(clips)]
    history, future = ([draw(st.lists(length, min_size=n, max_size=n)) for n in frames] for _ in range(2))
    drop = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in frames]
    limits = {"window": draw(st.none() | st.integers(1, 3)), "sink": draw(st.integers(0, 2))}
    if draw(st.booleans()):
        return FrameMask.teacher_forcing(history, future, drop_history=draw(st.sampled_from([None, drop])), **limits)
    return FrameMask.block_causal(history, **limits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(mask=masks())
def test_equals_dense_attention(head_dim, dtype, mask):
    check(mask, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_that_matter(shape):
    """Whole tiles, long loops of bare blocks, and frames that do not end with a tile, at the sizes that training
    has."""
    mask, head_dim = SHAPES[shape]
    check(mask, head_dim=head_dim)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 72, 80, 96, 104, 112, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_dims(head_dim, dtype):
    check(FrameMask.teacher_forcing([[160, 130, 40]], [[256, 64, 100]]), head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2)])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_heads_that_share_keys(heads, kv_heads, head_dim):
    mask = FrameMask.teacher_forcing([[160, 130, 40]], [[256, 64, 100]])
    check(mask, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


@pytest.mark.parametrize("shape", ["k600", "minecraft", "wan"])
def test_twenty_runs_give_the_same_bits(shape):
    mask, head_dim = SHAPES[shape]
    inputs = tensors(mask, heads=4, head_dim=head_dim)
    first = None
    for _ in range(20):
        out = attend(*inputs, mask)
        run = [out, *torch.autograd.grad(out.float().square().sum(), inputs)]
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(run, first))


def test_more_elements_than_32_bits_count():
    mask = FrameMask.block_causal([[1024] * 2] * 128)
    tokens, heads, head_dim = mask.num_tokens, 65, 128
    assert tokens * heads * head_dim > 2**31
    # One tensor of 4 GiB is all four inputs: beside tests of other processes there has to be room for the results.
    dout = torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = (dout.detach().requires_grad_() for _ in range(3))
    out = attend(q, k, v, mask)
    out.backward(dout)
    last, clip = slice(tokens - 2048, tokens), FrameMask.block_causal([[1024] * 2])
    inputs = [x.detach()[last, -1:].contiguous().requires_grad_() for x in (q, k, v)]
    alone = attend(*inputs, clip)
    alone.backward(dout[last, -1:])
    torch.testing.assert_close(out[last, -1:], alone, rtol=0, atol=0)
    for whole, part in zip((q, k, v), inputs):
        torch.testing.assert_close(whole.grad[last, -1:], part.grad, rtol=0, atol=0)


def test_a_captured_graph_computes_the_same():
    mask = FrameMask.teacher_forcing([[160] * 3], [[256] * 3])
    inputs = tensors(mask)
    dout = torch.randn_like(inputs[0])

    def step():
        return torch.autograd.grad(attend(*inputs, mask), inputs, dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_a_mask_is_not_planned_inside_a_capture():
    mask = FrameMask.block_causal([[100, 28]])
    inputs = [x.detach() for x in tensors(mask)]
    attend(*inputs, FrameMask.block_causal([[28, 100]]))  # compiled
    with pytest.raises(ValueError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attend(*inputs, mask)


def test_new_lengths_compile_nothing():
    def compiled():
        return [sum(len(entry[0]) for entry in kernel.device_caches.values()) for kernel in KERNELS]

    def run(generator, dtype):
        clips = int(torch.randint(1, 5, (), generator=generator))
        lens = [
            torch.randint(0, 200, (2, int(torch.randint(1, 5, (), generator=generator))), generator=generator).tolist()
            for _ in range(clips)
        ]
        mask = FrameMask.teacher_forcing([clip[0] for clip in lens], [clip[1] for clip in lens])
        if mask.num_tokens:
            inputs = tensors(mask, dtype=dtype)
            attend(*inputs, mask).sum().backward()

    choices = {name: configs(name, architecture(torch.device("cuda", 0)), torch.bfloat16, 72) for name in PASSES}
    before = compiled()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        run(generator, torch.bfloat16)
    # At most once per tile size, whatever the mask.
    assert all(after - start <= len(choices[name]) for start, after, name in zip(before, compiled(), PASSES))
    once = compiled()
    for _ in range(50):
        run(generator, torch.bfloat16)
    assert compiled() == once


def test_nothing_waits_for_the_device():
    mask = FrameMask.teacher_forcing([[160] * 3] * 2, [[256] * 3] * 2)
    inputs = tensors(mask)
    attend(*inputs, FrameMask.teacher_forcing([[160] * 3] * 2, [[256] * 3] * 2)).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*inputs, mask).sum().backward()  # planning and uploading included
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_as_one_graph():
    compiled = torch.compile(lambda q, k, v, mask: attend(q * 2, k, v, mask), fullgraph=True)
    for lens in ([[64, 100]], [[30, 128, 5]]):
        mask = FrameMask.block_causal(lens)
        inputs = tensors(mask)
        expected = torch.autograd.grad(attend(inputs[0] * 2, *inputs[1:], mask).float().square().sum(), inputs)
        actual = torch.autograd.grad(compiled(*inputs, mask).float().square().sum(), inputs)
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b)


def test_peak_memory_is_linear():
    mask = FrameMask.teacher_forcing([[1560] * 4], [[1560] * 4])
    inputs = tensors(mask, heads=12, head_dim=128)
    attend(*inputs, mask).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    attend(*inputs, mask).sum().backward()
    one = inputs[0].numel() * inputs[0].element_size()
    # out, its gradient, dq, dk, dv and their accumulation, and the log-sum-exps.
    assert torch.cuda.max_memory_allocated() - held < 9 * one
