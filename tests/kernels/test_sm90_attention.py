"""The hand-written attention kernels for Hopper, executed by the block emulator and held against float64.

Every head dimension and dtype, fuzzed masks, and copies and products done at once, as late as possible and by chance.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_kernels.attention import FrameMask, frame_attention, sm90
from mimo_kernels.attention import frame as frame_module
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

HEAD_DIMS = (64, 72, 80, 128)
DTYPES = (torch.float16, torch.bfloat16)
EARLY, LATE, BY_CHANCE = range(3)
MASK = FrameMask.teacher_forcing([[40, 70]], [[64, 100]])
# Rows 0 to 89 see two intervals, 90 to 149 nothing, the rest three; some keys are seen by nobody.
HOLES = FrameMask.from_table(
    torch.tensor([[0, 90, 3, 20, 100, 141, 0, 0], [90, 150, 0, 0, 0, 0, 0, 0], [150, 200, 0, 1, 60, 63, 64, 199]])
)


def inputs_of(mask, head_dim, dtype, heads=1, batch=1, seed=0, kv_heads=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, mask.num_tokens, count, head_dim) for count in (heads, kv_heads or heads, kv_heads or heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def dense_attention(q, k, v, mask, scale):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    seen = mask.to_dense()
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.where(seen.any(1, keepdim=True), scores, 0.0).softmax(-1) * seen
    return torch.einsum("bhij,bjhd->bihd", weights, v), scores.logsumexp(-1)


def gradients(out, lse, inputs, with_lse):
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).to(out)
    if not with_lse:
        return torch.autograd.grad(out, inputs, dout)
    dlse = torch.randn(lse.shape, generator=generator).to(lse)
    return torch.autograd.grad([out, torch.where(lse.isfinite(), lse, 0.0)], inputs, [dout, dlse])


def run(emulated, inputs, mask, scale, mode=(EARLY, 0), with_lse=True):
    emulated.set_asynchrony(*mode)
    emulated.set_order(mode[0] + 3 * mode[1])
    with poisoned_memory():
        out, lse = sm90.attention(*inputs, mask, scale)
        return [out, lse, *gradients(out, lse, inputs, with_lse)]


YARDSTICK_HEADS = 32


def plain_and_exact(inputs, mask, scale, with_lse):
    """(out, lse, dq, dk, dv) by plain PyTorch in the dtype of the inputs, and in double precision."""
    results = []
    for same in (inputs, [x.detach().double().requires_grad_() for x in inputs]):
        out, lse = dense_attention(*same, mask, scale)
        results.append([out, lse, *gradients(out, lse, same, with_lse)])
    return results


def check(emulated, mask, head_dim, dtype, *, heads=1, kv_heads=1, batch=1, scale=None, mode=(EARLY, 0), with_lse=True):
    """Plain PyTorch's errors are those over many heads besides: the largest of a few is luck."""
    scale = head_dim**-0.5 if scale is None else scale
    inputs = [between_nans(x) for x in inputs_of(mask, head_dim, dtype, heads, batch, kv_heads=kv_heads)]
    actual = run(emulated, inputs, mask, scale, mode, with_lse)
    plain, exact = plain_and_exact(inputs, mask, scale, with_lse)
    wide = inputs_of(mask, head_dim, dtype, YARDSTICK_HEADS, seed=2, kv_heads=YARDSTICK_HEADS * kv_heads // heads)
    more = zip(*plain_and_exact(wide, mask, scale, with_lse))
    for name, *result, further in zip(("out", "lse", "dq", "dk", "dv"), actual, plain, exact, more):
        assert_within_budget(*result, name=name, more=further)


@st.composite
def masks(draw) -> FrameMask:
    length = st.sampled_from([0, 1, 7, 40, 63, 64, 65, 100, 128])
    clips = draw(st.integers(1, 2))
    frames = [draw(st.integers(1, 3)) for _ in range(clips)]
    history, future = ([draw(st.lists(length, min_size=n, max_size=n)) for n in frames] for _ in range(2))
    drop = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in frames]
    limits = {"window": draw(st.none() | st.integers(1, 2)), "sink": draw(st.integers(0, 1))}
    kind = draw(st.sampled_from(["teacher_forcing", "block_causal", "bidirectional", "alike", "from_table"]))
    if kind == "teacher_forcing":
        return FrameMask.teacher_forcing(history, future, drop_history=draw(st.sampled_from([None, drop])), **limits)
    if kind == "block_causal":
        return FrameMask.block_causal(history, **limits)
    if kind == "bidirectional":
        return FrameMask.bidirectional(future)
    if kind == "alike":
        return FrameMask.teacher_forcing([history[0]] * 2, [future[0]] * 2, **limits)
    ends = sorted(draw(st.sets(st.integers(1, 300), min_size=1, max_size=8)))
    rows = []
    for start, end in zip([0, *ends], ends):
        edges = sorted(draw(st.sets(st.integers(0, ends[-1]), max_size=6)))
        edges = edges[: len(edges) // 2 * 2]
        rows.append([start, end, *edges, *[0] * (6 - len(edges))])
    return FrameMask.from_table(torch.tensor(rows, dtype=torch.int32))


MODES = st.tuples(st.sampled_from([EARLY, LATE, BY_CHANCE]), st.integers(0, 9))
FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@settings(max_examples=4, **FUZZ)
@given(mask=masks(), mode=MODES, with_lse=st.booleans())
def test_equals_dense_attention(emulated, head_dim, dtype, mask, mode, with_lse):
    check(emulated, mask, head_dim, dtype, mode=mode, with_lse=with_lse)


@pytest.mark.parametrize("block", sm90.FORWARD_BLOCKS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_either_block_length(emulated, monkeypatch, head_dim, block):
    monkeypatch.setattr(sm90, "FORWARD_BLOCKS", (block, block))
    check(emulated, MASK, head_dim, torch.bfloat16, mode=(LATE, 0))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_who_comes_first_does_not_matter_to_a_bit(emulated, head_dim):
    inputs = inputs_of(MASK, head_dim, torch.bfloat16)
    first, *others = (run(emulated, inputs, MASK, 0.1, mode) for mode in ((EARLY, 0), (LATE, 0), (BY_CHANCE, 5)))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


def test_rows_without_keys_and_keys_without_rows(emulated):
    check(emulated, HOLES, 72, torch.float16, mode=(LATE, 0))
    inputs = inputs_of(HOLES, 72, torch.float16)
    out, lse, dq, dk, dv = run(emulated, inputs, HOLES, 0.1, with_lse=False)
    assert (out[:, 90:150] == 0).all() and (lse[..., 90:150] == -math.inf).all() and (dq[:, 90:150] == 0).all()
    assert (dk[:, 20:60] == 0).all() and (dv[:, 20:60] == 0).all() and (dv[:, 199] == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1.5, -0.3])
def test_scale(emulated, scale):
    check(emulated, FrameMask.block_causal([[33, 40]]), 64, torch.float16, scale=scale)


def test_heads_and_batch(emulated):
    check(emulated, FrameMask.block_causal([[70, 33]]), 72, torch.bfloat16, heads=3, kv_heads=3, batch=2)


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "batch"), [(72, 2, 1, 1), (128, 4, 2, 2)])
def test_heads_that_share_keys(emulated, head_dim, heads, kv_heads, batch):
    mask = FrameMask.block_causal([[70, 33]])
    check(emulated, mask, head_dim, torch.float16, heads=heads, kv_heads=kv_heads, batch=batch, mode=(LATE, 0))


def test_slices_of_a_projection_are_read_in_place(emulated):
    mask = FrameMask.block_causal([[70, 30]])
    qkv = torch.randn(1, mask.num_tokens, 3, 2, 72, generator=torch.Generator().manual_seed(0)).half()
    slices = [x.requires_grad_() for x in qkv.unbind(2)]
    assert all(sm90._addressable(x) is x for x in slices)
    copies = [x.detach().contiguous().requires_grad_() for x in slices]
    for a, b in zip(run(emulated, slices, mask, 0.1), run(emulated, copies, mask, 0.1)):
        assert torch.equal(a, b)


def test_a_value_that_is_not_finite_stays_in_its_clip(emulated):
    """Clips that are alike: a block that reaches past the end of a clip reads zeros there, not the next clip's rows."""
    mask = FrameMask.teacher_forcing([[30, 7]] * 2, [[40, 9]] * 2)
    inputs = inputs_of(mask, 72, torch.float16)
    expected = run(emulated, inputs, mask, 0.1)
    with torch.no_grad():
        for x in inputs:
            x[:, 86:] = math.nan
    actual = run(emulated, inputs, mask, 0.1)
    for a, b in zip(actual, expected):
        first = (slice(None), slice(0, 86)) if a.dim() == 4 else (slice(None), slice(None), slice(0, 86))
        assert torch.equal(a[first], b[first])


def test_no_tokens(emulated):
    mask = FrameMask.block_causal([[0, 0]])
    out, lse, *grads = run(emulated, inputs_of(mask, 64, torch.float16), mask, 0.1)
    assert out.shape == (1, 0, 1, 64) and lse.shape == (1, 1, 0) and all(g.shape == out.shape for g in grads)


@pytest.fixture
def choices():
    frame_module._choose.cache_clear()
    yield
    frame_module._choose.cache_clear()


def test_frame_attention_takes_it_by_name_alone(emulated, choices, monkeypatch):
    inputs = [x[0].detach().requires_grad_() for x in inputs_of(MASK, 64, torch.float16)]
    calls = []
    monkeypatch.setattr(sm90, "attention", lambda *args, own=sm90.attention: (calls.append(1), own(*args))[1])
    out, lse = frame_attention(*inputs, MASK, backend="cuda", return_lse=True)
    assert len(calls) == 1 and out.shape == inputs[0].shape and lse.shape == (1, MASK.num_tokens)
    torch.testing.assert_close(out, frame_attention(*inputs, MASK, backend="reference"), rtol=0, atol=2e-3)
    frame_attention(*inputs, MASK)
    assert len(calls) == 1
    monkeypatch.setattr(frame_module, "_preference", lambda device: ("cuda", "reference"))
    frame_attention(*inputs, MASK)
    assert len(calls) == 1


def test_what_it_does_not_serve_is_refused_with_every_reason(emulated, choices):
    x = torch.zeros(MASK.num_tokens, 1, 96)
    message = (
        r"backend 'cuda' cannot serve: q, k and v are torch.float32, expected float16 or bfloat16; "
        r"head_dim is 96, expected one of 64, 72, 80, 128$"
    )
    with pytest.raises(ValueError, match=message):
        frame_attention(x, x, x, MASK, backend="cuda")


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_gpus_are_refused(monkeypatch, capability):
    monkeypatch.setattr("mimo_kernels.core.backends.cuda_refusals", lambda device: [])
    monkeypatch.setattr("mimo_kernels.core.backends.cuda_archs", lambda: ("sm_80", "sm_100"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reasons = sm90.device_refusals(torch.device("cuda", 0))
    assert f"the GPU is sm_{capability[0]}{capability[1]}, the kernels are for sm_90 alone" in reasons
    assert "compiled are sm_80, sm_100, the kernels need sm_90a" in reasons
