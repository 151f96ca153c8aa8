"""Sizes at which the CUDA kernels, executed by the block emulator, take a path that the operators' own tests do not
reach."""

import pytest
import torch

import mimo_kernels.ops.token_rows  # noqa: F401  (registers the operators)
from mimo_kernels import AxialRoPE, qk_norm_rope
from mimo_kernels.ops.losses import BLOCKS, weighted_squared_error
from mimo_kernels.ops.rope import GRAD_BLOCKS

OPS = torch.ops.mimo_kernels
THREADS = 256


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "dim", "kept"), [(1, 1, 1), (9, 3, 5), (131, 17, 64), (300, 7, 300)])
def test_rows_copied_in_words_of_every_width(emulated, rows, dim, kept, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 255, (rows, dim), generator=generator).to(dtype)
    index = torch.randperm(rows, generator=generator)[:kept]
    y = OPS.gather_rows(x, index)
    assert torch.equal(y, x[index])
    expected = x[:1].repeat(rows, 1)
    expected[index] = y
    assert torch.equal(OPS.scatter_rows(y, index, rows, x[0])[0], expected)


@pytest.mark.parametrize(
    ("values", "dtype", "width"), [(1, torch.float32, 53), (1, torch.float16, 53), (8, torch.float16, 64)]
)
def test_more_errors_than_one_round_of_all_blocks(emulated, values, dtype, width):
    rows = BLOCKS * THREADS * values // width + 2  # the second round is a few of the threads
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, rows, width, generator=generator).to(dtype)
    weight = torch.rand(rows, generator=generator)
    exact = (weight[:, None].double() * (prediction.double() - target.double()).square()).sum()
    loss = weighted_squared_error(prediction.requires_grad_(), target, weight, backend="cuda")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    (actual,) = torch.autograd.grad(loss, prediction)
    expected = 2 * weight[:, None] * (prediction.detach().float() - target.float())
    torch.testing.assert_close(actual, expected.to(dtype), rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


def test_more_rows_than_one_round_of_the_gradient(emulated):
    rows = 4 * GRAD_BLOCKS + 1  # a warp for each but the last
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((rows, 3, 1, 8), (8,), (8,))]
    coords = torch.randint(0, 50, (rows, 3), generator=generator, dtype=torch.int32)
    dq, dk = torch.randn(2, rows, 1, 8, generator=generator)
    results = []
    for backend in ("cuda", "reference"):
        inputs = [t.double() if backend == "reference" else t for t in tensors]
        inputs = [t.detach().requires_grad_() for t in inputs]
        outputs = qk_norm_rope(*inputs, coords, AxialRoPE(8), backend=backend)
        results.append(torch.autograd.grad(outputs, inputs, [dq.to(outputs[0].dtype), dk.to(outputs[0].dtype)]))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)
