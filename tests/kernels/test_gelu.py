"""bias_gelu: the CUDA kernels, executed by the block emulator, against plain PyTorch."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mimo_kernels.ops.gelu import bias_gelu
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.mimo_kernels


def sample(rows: int, dim: int, dtype=torch.float32, bias_dtype=None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(rows, dim, generator=generator)
    return [x.to(dtype), torch.randn(dim, generator=generator).to(bias_dtype or dtype)]


def run(tensors, backend, kind=None):
    """Output and gradients."""
    inputs = [t.to(kind or t.dtype).detach().requires_grad_() for t in tensors]
    dy = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    with poisoned_memory():
        y = bias_gelu(*inputs, backend=backend)
        return y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))


def check(tensors):
    actual, plain = run([between_nans(t) for t in tensors], "cuda"), run(tensors, "reference")
    for name, a, p, e in zip(["y", "dx", "dbias"], actual, plain, run(tensors, "reference", torch.float64)):
        assert a.dtype == p.dtype
        assert_within_budget(a, p, e, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (1, 8), (3, 264), (70, 40), (131, 16), (5, 4608), (2, 8200)])
def test_outputs_and_gradients(emulated, rows, dim, dtype):
    check(sample(rows, dim, dtype))
    check(sample(rows, dim, dtype)[:1])  # without a bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_bias_beside_narrow_tokens(emulated, dtype):
    check(sample(9, 40, dtype, torch.float32))


def test_far_from_zero(emulated):
    x = torch.tensor([[-1e4, -50.0, -9.0, -1e-30, 0.0, 9.0, 50.0, 1e4]], requires_grad=True)
    y = bias_gelu(x, backend="cuda")
    torch.testing.assert_close(y, torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-10)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0, 0, 0.5, 0.5, 1, 1, 1]]), rtol=1e-6, atol=1e-10)


def test_rows_of_no_columns(emulated):
    x, bias = torch.zeros(5, 0), torch.zeros(0)
    assert bias_gelu(x, bias).shape == x.shape
    with pytest.raises(ValueError, match="x has 0 columns"):
        bias_gelu(x, bias, backend="cuda")


def test_any_leading_shape_and_alignment(emulated):
    x = torch.randn(2 * 3 * 16 + 1)[1:].view(2, 3, 16)
    bias = torch.randn(17)[1:]
    torch.testing.assert_close(bias_gelu(x, bias, backend="cuda"), bias_gelu(x, bias, backend="reference"))
    strided = x.transpose(0, 1)
    torch.testing.assert_close(bias_gelu(strided, bias, backend="cuda"), bias_gelu(strided, bias, backend="reference"))


def test_gradients_are_the_same_bits_whoever_runs_first(emulated):
    tensors, first = sample(300, 24, torch.bfloat16), None
    for seed in range(20):
        emulated.set_order(seed)
        results = run(tensors, "cuda")
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first))


def test_operators_are_well_formed(emulated):
    x, bias = sample(5, 16)
    x.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(OPS.bias_gelu.default, (x, bias))
    torch.library.opcheck(OPS.bias_gelu.default, (x, None))
    for b in (bias.detach(), None):
        torch.library.opcheck(OPS.bias_gelu_backward.default, (x.detach().cos(), x.detach(), b))


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_compiles_whole_and_under_checkpointing(emulated, backend):
    def layer(x, bias):
        return bias_gelu(x.sin(), bias, backend=backend)

    inputs = [t.requires_grad_() for t in sample(6, 16)]
    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for variant in (compiled, lambda *a: checkpoint(layer, *a, use_reentrant=False)):
        for a, b in zip(torch.autograd.grad(variant(*inputs).sum(), inputs), expected):
            torch.testing.assert_close(a, b)


def test_bad_input(emulated):
    x, bias = sample(4, 16)
    for call, message in (
        (lambda: bias_gelu(x, bias[:8]), r"bias has shape \[8\], expected \[16\]"),
        (lambda: bias_gelu(x, bias.half()), "bias is torch.float16"),
        (lambda: bias_gelu(x, bias.to("meta")), "bias is on meta, expected cpu"),
        (lambda: bias_gelu(x[0, 0]), r"x has shape \[\], expected \[..., D\]"),
        (lambda: bias_gelu(x.int()), "x is torch.int32, expected float32"),
        (lambda: bias_gelu(x[:, :12], backend="cuda"), "x has 12 columns, expected a multiple of 8"),
        (lambda: bias_gelu(x, backend="triton"), "unknown backend"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(bias_gelu(x[:, :12]), bias_gelu(x[:, :12], backend="reference"))
