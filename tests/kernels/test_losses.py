"""weighted_squared_error: the CUDA kernels, executed by the block emulator, against plain PyTorch."""

import pytest
import torch

from mimo_kernels.ops.losses import weighted_squared_error
from mimo_kernels.testing import assert_within_budget, between_nans, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.mimo_kernels


def sample(shape, weight_dims: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return [prediction, target, torch.rand(shape[:weight_dims], generator=generator)]


def run(tensors, backend, kind=None):
    prediction, target = (t.to(kind or t.dtype).detach() for t in tensors[:2])
    with poisoned_memory():
        loss = weighted_squared_error(prediction.requires_grad_(), target, tensors[2], backend=backend)
        return loss, *torch.autograd.grad(loss * 0.7, prediction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "weight_dims"),
    [((2, 3, 5, 16), 2), ((2, 3, 5, 16), 3), ((2, 3, 5, 3), 3), ((7,), 1), ((9, 8), 0), ((1, 1), 2), ((0, 4), 1),
    ((3000, 48), 1)],
)  # fmt: skip
def test_loss_and_gradient(emulated, shape, weight_dims, dtype):
    tensors = sample(shape, weight_dims, dtype)
    actual = run([between_nans(t) for t in tensors], "cuda")
    plain, exact = run(tensors, "reference"), run(tensors, "reference", torch.float64)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    for name, a, p, e in zip(["loss", "gradient"], actual, plain, exact):
        assert_within_budget(a, p, e, name=name)


def test_the_two_losses_of_the_objective():
    prediction, target, _ = sample((2, 3, 5, 4), 2)
    squares = (prediction - target).square()
    per_frame = torch.rand(2, 3)
    diffusion = weighted_squared_error(prediction, target, per_frame / squares.numel())
    torch.testing.assert_close(diffusion, (per_frame * squares.mean(dim=(2, 3))).mean())
    dropped = torch.rand(2, 1, 5).expand(2, 3, 5) < 0.4
    masked = weighted_squared_error(prediction, target, dropped / (dropped.sum() * 4))
    torch.testing.assert_close(masked, squares[dropped].mean())


def test_misaligned_inputs(emulated):
    prediction, target, weight = sample((6, 16), 1)
    shifted = torch.cat([torch.zeros(1), prediction.flatten()])[1:].view(6, 16)
    expected = run([prediction, target, weight], "reference")
    for a, b in zip(run([shifted, target.t().contiguous().t(), weight], "cuda"), expected):
        torch.testing.assert_close(a, b)


def test_the_same_bits_whoever_runs_first(emulated):
    tensors, first = sample((40, 1000), 1), None
    for seed in range(20):
        emulated.set_order(seed)
        results = run(tensors, "cuda")
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first))


def test_operators_are_well_formed(emulated):
    prediction, target, weight = sample((2, 3, 8), 2)
    torch.library.opcheck(OPS.squared_error.default, (prediction.requires_grad_(), target, weight))
    dloss = torch.tensor(0.5)
    torch.library.opcheck(OPS.squared_error_backward.default, (dloss, prediction.detach(), target, weight))


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_compiles_whole(emulated, backend):
    prediction, target, weight = sample((2, 3, 8), 2)
    prediction.requires_grad_()
    expected = weighted_squared_error(prediction, target, weight, backend=backend)
    compiled = torch.compile(weighted_squared_error, fullgraph=True, backend="aot_eager")
    actual = compiled(prediction, target, weight, backend=backend)
    torch.testing.assert_close(actual, expected)
    (a,), (b,) = (torch.autograd.grad(loss, prediction) for loss in (actual, expected))
    torch.testing.assert_close(a, b)


def test_bad_input():
    prediction, target, weight = sample((2, 3, 8), 2)
    for arguments, message in (
        ((prediction, target[:1], weight), r"target has shape \[1, 3, 8\], expected \[2, 3, 8\]"),
        ((prediction, target.half(), weight), "target is torch.float16"),
        ((prediction.int(), target.int(), weight), "prediction is torch.int32, expected float32"),
        ((prediction, target, weight[:, :2]), r"weight has shape \[2, 2\], expected first dimensions of \[2, 3, 8\]"),
        ((prediction, target, weight.double()), "weight is torch.float64"),
        ((prediction, target, weight.to("meta")), "weight is on meta, expected cpu"),
        ((prediction, target.clone().requires_grad_(), weight), "target requires a gradient"),
        ((prediction, target, weight.clone().requires_grad_()), "weight requires a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            weighted_squared_error(*arguments)
