"""gather_tokens, scatter_tokens and sample_tube_mask: the CUDA kernels, executed by the block emulator, against plain
PyTorch."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mimo_kernels import gather_tokens, sample_tube_mask, scatter_tokens
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.mimo_kernels


def sample(rows: int, dim: int, kept: int, dtype=torch.float32, index_dtype=torch.int64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator).to(dtype)
    index = torch.randperm(rows, generator=generator)[:kept].to(index_dtype)
    fill = torch.randn(dim, generator=generator).to(dtype)
    return x, index, fill


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "dim", "kept"),
    [(1, 8, 1), (5, 8, 0), (7, 1, 3), (33, 20, 17), (129, 72, 129), (70, 1152, 41), (3, 8192, 2)],
)
def test_kernels_equal_plain_pytorch(emulated, rows, dim, kept, dtype):
    x, index, fill = sample(rows, dim, kept, dtype, torch.int32 if kept % 2 else torch.int64)
    with poisoned_memory():
        y = gather_tokens(between_nans(x), index, backend="cuda")
        z = scatter_tokens(between_nans(y), index, rows, between_nans(fill), backend="cuda")
        zeros = scatter_tokens(y, index, rows, backend="cuda")
    assert torch.equal(y, gather_tokens(x, index, backend="reference"))
    assert torch.equal(z, scatter_tokens(y, index, rows, fill, backend="reference"))
    assert torch.equal(zeros, scatter_tokens(y, index, rows, backend="reference"))


def test_generated_code_scatters_a_single_precision_query_among_half_precision_rows():
    """What autocast does in the decoder, through Inductor."""
    x, index, fill = sample(24, 16, 12)
    x = x[:12].bfloat16()

    def scatter(x, fill):
        return scatter_tokens(x, index, 24, fill, backend="reference")

    assert torch.equal(torch.compile(scatter, fullgraph=True)(x, fill), scatter(x, fill))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim", "kept"), [(5, 8, 5), (200, 40, 77), (131, 7, 0), (67, 1152, 50)])
def test_gradients(emulated, rows, dim, kept, dtype):
    x, index, fill = sample(rows, dim, kept, dtype)
    dy = torch.randn(rows, dim).to(dtype)
    dkept = torch.randn(kept, dim).to(dtype)

    def gradients(backend, kind):
        inputs = [t.to(kind).requires_grad_() for t in (x, fill)]
        with poisoned_memory():
            y = gather_tokens(inputs[0], index, backend=backend)
            z = scatter_tokens(y, index, rows, inputs[1], backend=backend)
            dx, dfill = torch.autograd.grad(z, inputs, dy.to(kind), retain_graph=True)
            (direct,) = torch.autograd.grad(y, inputs[:1], dkept.to(kind))
        return dx, dfill, direct

    actual, plain, exact = (
        gradients("cuda", dtype),
        gradients("reference", dtype),
        gradients("reference", torch.float64),
    )
    assert torch.equal(actual[0], plain[0]) and torch.equal(actual[2], plain[2])
    assert_within_budget(actual[1], plain[1], exact[1], name="dfill")


def test_gradients_are_the_same_bits_whoever_runs_first(emulated):
    x, index, fill = sample(150, 24, 40)
    fill.requires_grad_()
    results = []
    for seed in range(20):
        emulated.set_order(seed)
        z = scatter_tokens(x[:40], index, 150, fill, backend="cuda")
        results.append(torch.autograd.grad(z, fill, x)[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_misaligned_and_strided_inputs(emulated, offset):
    x = torch.randn(30 * 16 + offset).bfloat16()[offset:].view(30, 16)
    index = torch.arange(0, 60, 2)[3:9]  # a strided index
    index = index[::2]
    y = gather_tokens(x, index, backend="cuda")
    assert torch.equal(y, x[index])
    wide = torch.randn(3, 40).bfloat16()[:, offset : offset + 16]
    fill = torch.randn(16 + offset).bfloat16()[offset:]
    z = scatter_tokens(wide, index, 30, fill, backend="cuda")
    assert torch.equal(z, scatter_tokens(wide, index, 30, fill, backend="reference"))


def test_an_index_out_of_range_stops_the_kernel(emulated):
    x = torch.randn(4, 8)
    for bad in (-1, 4, 1 << 40):
        index = torch.tensor([0, bad])
        with pytest.raises(RuntimeError, match="index out of range"):
            OPS.gather_rows(x, index)
        with pytest.raises(RuntimeError, match="index out of range"):
            OPS.scatter_rows(x[:2], index, 4, None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i, b: gather_tokens(x[0], i, backend=b), r"x has shape \[8\], expected \["),
        (
            lambda x, i, b: gather_tokens(x, i.float(), backend=b),
            "index is torch.float32, expected torch.int32 or torch.int64",
        ),
        (lambda x, i, b: gather_tokens(x, i + 3, backend=b), r"index holds 6, expected values in \[0, 5\)"),
        (lambda x, i, b: gather_tokens(x, i - 2, backend=b), "index holds -2"),
        (lambda x, i, b: gather_tokens(x, i.to("meta"), backend=b), "index is on meta, expected cpu"),
        (lambda x, i, b: scatter_tokens(x, i, 9, backend=b), "index has shape"),
        (lambda x, i, b: scatter_tokens(x[:2], i, 1, backend=b), r"index holds 3, expected values in \[0, 1\)"),
        (lambda x, i, b: scatter_tokens(x[:2], i, 9, x[0, :4], backend=b), r"fill has shape \[4\], expected \[8\]"),
        (lambda x, i, b: gather_tokens(x, i, backend="metal"), "unknown backend 'metal'"),
    ],
)
def test_bad_input(call, message, backend):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 8), torch.tensor([0, 3]), backend)


def test_cuda_backend_says_why_it_cannot_serve():
    with pytest.raises(ValueError, match="gather_tokens: backend 'cuda' cannot serve: .*cpu"):
        gather_tokens(torch.randn(5, 8), torch.tensor([0]), backend="cuda")


def test_operators_are_well_formed(emulated):
    x, index, fill = sample(9, 8, 4)
    x.requires_grad_(), fill.requires_grad_()
    torch.library.opcheck(OPS.gather_rows.default, (x, index))
    torch.library.opcheck(OPS.scatter_rows.default, (x[:4], index, 9, fill))
    torch.library.opcheck(OPS.scatter_rows.default, (x[:4], index, 9, None))
    torch.library.opcheck(
        OPS.hole_sum.default, (x.detach(), torch.tensor([0, -1, -1, 1, 2, 3, -1, -1, -1], dtype=torch.int32))
    )


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_compiles_whole_and_under_checkpointing(emulated, backend):
    def drop_and_restore(x, index, fill):
        return scatter_tokens(gather_tokens(x, index, backend=backend).sin(), index, x.shape[0], fill, backend=backend)

    x, index, fill = sample(12, 8, 5)
    x.requires_grad_(), fill.requires_grad_()
    expected = torch.autograd.grad(drop_and_restore(x, index, fill).square().sum(), (x, fill))
    compiled = torch.compile(drop_and_restore, fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda *a: checkpoint(drop_and_restore, *a, use_reentrant=False)):
        actual = torch.autograd.grad(run(x, index, fill).square().sum(), (x, fill))
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b)


def test_tube_mask():
    mask = sample_tube_mask(1000, 12, 5, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (1000, 5) and mask.dtype == torch.int64
    assert (mask[:, 1:] > mask[:, :-1]).all() and mask.min() == 0 and mask.max() == 11
    frequency = torch.bincount(mask.flatten(), minlength=12) / 1000
    assert (frequency - 5 / 12).abs().max() < 0.07  # 4.5 standard deviations
    assert torch.equal(mask, sample_tube_mask(1000, 12, 5, generator=torch.Generator().manual_seed(0)))
    assert sample_tube_mask(3, 4, 0).shape == (3, 0)
    assert torch.equal(sample_tube_mask(2, 4, 4), torch.arange(4).expand(2, 4))
    with pytest.raises(ValueError, match="num_kept is 5, expected a whole number in 0..4"):
        sample_tube_mask(1, 4, 5)
    with pytest.raises(ValueError, match="batch is -1, expected a whole number of at least 0"):
        sample_tube_mask(-1, 4, 2)
