"""The Triton kernels touch their arguments and nothing else, read what was written, and do not race: under the watched
interpreter."""

import pytest
import torch

from mimo_kernels.attention import FrameMask, frame_attention, paged_frame_attention
from mimo_kernels.attention.paged import _triton_op as paged_op
from mimo_kernels.testing import poisoned_memory

triton = pytest.importorskip("triton")
tl = triton.language
from .test_frame_attention import gradients  # noqa: E402
from .test_paged_attention import ragged  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")


@triton.jit
def faulty_kernel(p_y, p_x, n, KIND: tl.constexpr):
    o = tl.program_id(0) * 8 + tl.arange(0, 8)
    if KIND == "right":
        tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)
    elif KIND == "load past the end":
        tl.store(p_y + o, tl.load(p_x + o), mask=o < n)
    elif KIND == "load before the start":
        tl.store(p_y + o, tl.load(p_x + o - 1, mask=o < n), mask=o < n)
    elif KIND == "store past the end":
        tl.store(p_y + o, tl.load(p_x + o, mask=o < n))
    elif KIND == "load of an output":
        tl.store(p_y + o, tl.load(p_y + o, mask=o < n), mask=o < n)
    elif KIND == "two programs store":
        tl.store(p_y + o // 2, 1.0, mask=o % 2 == 0)
        tl.store(p_y + 1 + tl.program_id(0), 1.0)
    elif KIND == "two lanes store":
        tl.store(p_y + o // 2, 1.0)
    elif KIND == "another program's element":
        tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)
        tl.load(p_y + 0)
    elif KIND == "own store":
        tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)
        tl.load(p_y + o, mask=o < n)
    elif KIND == "atomic":
        tl.atomic_add(p_x + o, 1.0, mask=o < n)
    elif KIND == "stored after a load elsewhere":
        tl.load(p_x + 8)
        tl.store(p_x + o, 1.0, mask=(o >= 8) & (o < n))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("load past the end", r"faulty_kernel: a load outside of its arguments: p_x \+ 52 bytes \(\[13\]\)"),
        ("load before the start", "a load outside of its arguments"),
        ("store past the end", r"a store outside of its arguments: p_y \+ 52 bytes"),
        ("load of an output", "a load of what nobody has stored: p_y"),
        ("two programs store", "a store to what another program stores: p_y"),
        ("two lanes store", "two lanes store to one element"),
        ("another program's element", "a load of what"),
        ("own store", "a load of what the program itself stored"),
        ("atomic", "an atomic operation: nothing fixes the order of its sums"),
        ("stored after a load elsewhere", "a store to what another program loads: p_x"),
    ],
)
def test_a_mistake_is_named(launches, kind, message):
    # In the middle of a larger buffer: what is outside of the tensors can be read all the same.
    x, y = torch.zeros(2, 64)[:, 20:33]
    y.fill_(float("nan"))
    faulty_kernel[(2,)](y, x, 13, KIND="right")
    y.fill_(float("nan"))
    with pytest.raises(Exception, match=message):
        faulty_kernel[(2,)](y, x, 13, KIND=kind)
    assert launches == ["faulty_kernel"] * 2


def test_gaps_between_rows_are_outside():
    wide = torch.zeros(2, 16)
    with pytest.raises(Exception, match="outside of its arguments"):
        faulty_kernel[(2,)](torch.zeros(16), wide[:, :4], 16, KIND="right")


# Frames that start, end and cross tiles and blocks, of one row, empty, dropped; windows; several clips.
MASKS = {
    "teacher forcing": FrameMask.teacher_forcing(
        [[20, 0, 40], [5, 16, 1]], [[33, 7, 32], [16, 16, 16]], drop_history=[[False, False, True], [False] * 3]
    ),
    "equal clips": FrameMask.teacher_forcing([[8, 5]] * 3, [[9, 6]] * 3),
    "window and sink": FrameMask.block_causal([[8] * 9], window=3, sink=1),
    "frames of one token": FrameMask.block_causal([[1] * 17]),
    "bidirectional": FrameMask.bidirectional([[3, 4], [50], [1]]),
    "one row": FrameMask.block_causal([[1]]),
    "a row without keys": FrameMask.from_table(torch.tensor([[0, 5, 0, 0, 0, 0, 0, 0], [5, 38, 0, 38, 0, 0, 0, 0]])),
}


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [(name, 16, torch.float32) for name in MASKS]
    + [("teacher forcing", 24, torch.float16), ("window and sink", 72, torch.float32)],
)
def test_frame_attention(launches, name, head_dim, dtype):
    """Slices of one projection: what lies between their rows and heads belongs to somebody else."""
    mask = MASKS[name]
    qkv = torch.randn(mask.num_tokens, 3, 1, head_dim).to(dtype)
    inputs = [qkv[:, i].detach().requires_grad_() for i in range(3)]
    with poisoned_memory():
        out, lse = frame_attention(*inputs, mask, backend="triton", return_lse=True)
        gradients(out, lse, inputs)
    assert len(launches) == 4 and out.isfinite().all()


@pytest.mark.parametrize(("splits", "kernels"), [(1, 1), (3, 2)])
def test_paged_attention(launches, splits, kernels):
    clips, seqs = ragged(4, heads=2, dim=24, dtype=torch.float16)
    q, k, v = clips.frame(seqs, 9)
    view = clips.cache.view(seqs)
    with poisoned_memory():
        paged_op(q, k, v, *clips.cache.keys_and_values(0), view.tables, None, None, None, 0.2, splits=splits)
    assert len(launches) == kernels


def test_paged_attention_with_everything_and_its_gradient(launches):
    """A block spans pages; few rows, so that forward and gradient are split; then own keys alone."""
    clips, seqs = ragged(9, heads=1, dim=24, dtype=torch.float16)
    leaves = [x.detach().requires_grad_() for x in clips.frame(seqs[:2], 9, group=2)]
    more = {"self_mask": FrameMask.block_causal([[4, 5]]), "frame_bias": torch.randn(2, 4), "backend": "triton"}
    with poisoned_memory():
        view = clips.cache.view(seqs[:2], max_pages=60)
        out, lse = paged_frame_attention(*leaves, clips.cache, layer=0, view=view, return_lse=True, **more)
        torch.autograd.grad([out, lse], leaves, [torch.randn_like(out), torch.randn_like(lse)])
    assert {"paged_fwd_kernel", "paged_combine_kernel", "paged_dq_kernel", "paged_dq_sum_kernel"} <= set(launches)
