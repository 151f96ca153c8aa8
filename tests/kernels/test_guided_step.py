"""guided_step, reference and Triton kernel (interpreted on the CPU), against the formula and the schedules."""

import pytest
import torch

from mimo.diffusion import FlowSchedule, VPredictionSchedule
from mimo_kernels.ops.guidance import _triton_op, guided_step, guided_step_ref
from mimo_kernels.testing import assert_within_budget, between_nans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(branches: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    v = torch.randn(branches, *shape, generator=generator).to(dtype)
    weights, coefficients = torch.randn(branches, generator=generator), torch.randn(7, 2, generator=generator)
    return [tensor.to(device) for tensor in (x, v, weights, coefficients)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("branches, shape", [(1, (3,)), (2, (2, 8, 5)), (3, (4, 256, 4)), (2, (1, 1, 1025))])
def test_equals_the_formula(backend, dtype, branches, shape):
    x, v, weights, coefficients = draw(branches, *shape, dtype=dtype)
    for i in (0, 6):
        a, b = coefficients[i].double()
        exact = a * x.double() + b * torch.einsum("g,g...->...", weights.double(), v.double())
        index = torch.tensor([i], device=DEVICE)
        plain = guided_step_ref(x, v, weights, coefficients, index)
        here = between_nans(x)
        out = guided_step(here, between_nans(v), weights, coefficients, index, backend=backend)
        assert out.data_ptr() == here.data_ptr()
        assert_within_budget(out, plain, exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_noise_is_the_third_summand(backend):
    x, v, weights, _ = draw(2, 2, 513, dtype=torch.float16)
    generator = torch.Generator().manual_seed(1)
    coefficients, noise = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((4, 3), (2, 513)))
    index = torch.tensor([2], device=DEVICE)
    a, b, c = coefficients[2].double()
    exact = a * x.double() + b * torch.einsum("g,g...->...", weights.double(), v.double()) + c * noise.double()
    plain = guided_step_ref(x, v, weights, coefficients, index, noise)
    given = (between_nans(v), weights, coefficients, index)
    out = guided_step(between_nans(x), *given, noise=between_nans(noise), backend=backend)
    assert_within_budget(out, plain, exact)


@pytest.mark.parametrize("schedule", [FlowSchedule(), VPredictionSchedule()], ids=["euler", "ddim"])
def test_equals_the_schedules_step(schedule):
    steps = 5
    schedule.sampling_timesteps(steps)
    every = torch.arange(steps)
    zero, one = torch.zeros(steps), torch.ones(steps)
    coefficients = torch.stack([schedule.step(zero, one, every), schedule.step(one, zero, every)], 1)
    x, v, weights, _ = draw(2, 3, 4, device="cpu")
    for i in range(steps):
        guided = weights[0] * v[0] + weights[1] * v[1]
        out = guided_step(x.clone(), v, weights, coefficients, torch.tensor([i]))
        torch.testing.assert_close(out, schedule.step(guided, x, i), rtol=1e-6, atol=1e-6)


def test_operator_is_registered_in_full():
    x, v, weights, coefficients = draw(2, 3, 4)
    index = torch.tensor([1], device=DEVICE)
    for noise in (None, torch.randn_like(x)):
        rows = coefficients if noise is None else torch.randn(7, 3, device=DEVICE)
        arguments = (x, v, weights, rows, index, noise)
        torch.library.opcheck(_triton_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_wrong_use_is_named():
    x, v, weights, coefficients = draw(2, 3, 4)
    index = torch.tensor([1], device=DEVICE)
    with pytest.raises(ValueError, match="guided_step: x is torch.float64, expected torch.float32$"):
        guided_step(x.double(), v, weights, coefficients, index)
    with pytest.raises(ValueError, match=r"v has shape \[1, 3, 4\], expected \[2, 3, 4\]$"):
        guided_step(x, v[:1], weights, coefficients, index)
    with pytest.raises(ValueError, match=r"index has shape \[\], expected \[1\]$"):
        guided_step(x, v, weights, coefficients, index[0])
    with pytest.raises(ValueError, match=r"x has strides \[1, 4\], expected a contiguous \[4, 3\]$"):
        guided_step(x.T, v.transpose(1, 2), weights, coefficients, index)
    with pytest.raises(ValueError, match=r"coefficients has shape \[7, 2\], expected \[steps, 3\]$"):
        guided_step(x, v, weights, coefficients, index, noise=x)
    with pytest.raises(ValueError, match=r"noise has shape \[4\], expected \[3, 4\]$"):
        guided_step(x, v, weights, torch.zeros(7, 3, device=DEVICE), index, noise=x[0])
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        guided_step(x, v, weights, coefficients, index, backend="cuda")
