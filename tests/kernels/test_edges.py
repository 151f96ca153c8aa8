"""What lies at the edge of every operator's domain is served, or refused in one line that names it: nothing at all of
something, no dimension, odd strides, double precision, positions that no table holds."""

import pytest
import torch
from torch import Tensor

from mimo_kernels import (
    AxialRoPE,
    FrameRows,
    bias_gelu,
    gated_residual_modulate,
    gather_tokens,
    guided_step,
    modulate,
    qk_norm_rope,
    sample_tube_mask,
    scatter_tokens,
    weighted_squared_error,
)
from mimo_kernels.ops.rope import apply_rope, qk_norm_rope_cache

pytestmark = pytest.mark.usefixtures("emulated")
both = pytest.mark.parametrize("backend", ["cuda", "reference"])


def draw(*shape: int, **options) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(**options).requires_grad_()


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(out.isfinite().all() for out in outputs)
    results = torch.autograd.grad(sum(out.float().sum() for out in outputs), inputs)
    assert all(g.shape == x.shape and g.isfinite().all() for g, x in zip(results, inputs, strict=True))
    return results


NONE = torch.zeros(0, dtype=torch.int64)
EMPTY = {
    "modulate: no rows": lambda b: gradients(
        lambda x, s: modulate(x, s, s, FrameRows([], []), backend=b), draw(0, 8), draw(2, 8)
    ),
    "modulate: empty frames": lambda b: gradients(
        lambda x, s: modulate(x, s, s, FrameRows([0, 0], [-1, 1]), backend=b), draw(0, 8), draw(2, 8)
    ),
    "modulate: no groups": lambda b: gradients(
        lambda x, s: modulate(x, s, s, FrameRows([3], [-1]), backend=b), draw(3, 8), draw(0, 8)
    ),
    "gated: no rows": lambda b: gradients(
        lambda x, s: gated_residual_modulate(x, x, s, s, s, FrameRows([], []), backend=b), draw(0, 8), draw(2, 8)
    ),
    "qk_norm_rope: no heads": lambda b: gradients(
        lambda x, w: qk_norm_rope(x, w, w, torch.zeros(4, 3, dtype=torch.int32), AxialRoPE(8), backend=b),
        draw(4, 3, 0, 8),
        draw(8),
    ),
    "qk_norm_rope: no rows": lambda b: gradients(
        lambda x, w: qk_norm_rope(x, w, w, torch.zeros(0, 3, dtype=torch.int32), AxialRoPE(8), backend=b),
        draw(0, 3, 2, 8),
        draw(8),
    ),
    "gather: no columns": lambda b: gradients(lambda x: gather_tokens(x, torch.tensor([1]), backend=b), draw(3, 0)),
    "gather: nothing kept": lambda b: gradients(lambda x: gather_tokens(x, NONE, backend=b), draw(3, 8)),
    "gather: no rows": lambda b: gradients(lambda x: gather_tokens(x, NONE, backend=b), draw(0, 8)),
    "scatter: into nothing": lambda b: gradients(
        lambda x, f: scatter_tokens(x, NONE, 0, f, backend=b), draw(0, 8), draw(8)
    ),
    "scatter: holes alone": lambda b: gradients(
        lambda x, f: scatter_tokens(x, NONE, 4, f, backend=b), draw(0, 8), draw(8)
    ),
    "gelu: no rows": lambda b: gradients(lambda x, c: bias_gelu(x, c, backend=b), draw(0, 8), draw(8)),
    "squared error: nothing": lambda b: gradients(
        lambda p: weighted_squared_error(p, torch.zeros(0, 4), torch.ones(0), backend=b), draw(0, 4)
    ),
    "squared error: no columns": lambda b: gradients(
        lambda p: weighted_squared_error(p, torch.zeros(3, 0), torch.ones(3), backend=b), draw(3, 0)
    ),
}


@both
@pytest.mark.parametrize("case", EMPTY)
def test_nothing(case: str, backend: str):
    EMPTY[case](backend)


def test_no_columns_are_the_references():
    gradients(lambda x, s: modulate(x, s, s, FrameRows([3], [0])), draw(3, 0), draw(2, 0))
    gradients(lambda x, b: bias_gelu(x, b), draw(3, 0), draw(0))
    gradients(lambda x, w: qk_norm_rope(x, w, w, None, None), draw(4, 3, 2, 0), draw(0))
    gradients(lambda x, f: scatter_tokens(x, torch.tensor([1]), 4, f), draw(1, 0), draw(0))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_step_of_nothing_and_of_one_number(backend: str):
    coefficients, index = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1])
    x = torch.zeros(0)
    assert guided_step(x, torch.zeros(2, 0), torch.ones(2), coefficients, index, backend=backend) is x
    assert guided_step(torch.tensor(2.0), torch.ones(1), torch.ones(1), coefficients, index, backend=backend) == 10


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_qkv_whose_channels_lie_apart(backend: str, dtype):
    rope, coords = AxialRoPE(8), torch.arange(12, dtype=torch.int32).view(4, 3)
    weight = torch.ones(8)
    strided = draw(4, 3, 8, 2, dtype=dtype).detach().transpose(2, 3)
    for turned in (rope, None):
        there = coords if turned else None
        expected = qk_norm_rope(strided.contiguous(), weight, weight, there, turned, backend=backend, return_v=True)
        actual = qk_norm_rope(strided, weight, weight, there, turned, backend=backend, return_v=True)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
    rows = strided[:, 0]
    assert torch.equal(apply_rope(rows, coords, rope), apply_rope(rows.contiguous(), coords, rope))


@both
def test_other_strides(backend: str):
    rows, scale = FrameRows([2, 1], [-1, 0]), draw(8, 2).T
    for function, x in (
        (lambda x: modulate(x, scale, scale, rows, backend=backend), draw(8, 3).T),
        (lambda x: gather_tokens(x, torch.arange(6)[::3], backend=backend), draw(8, 6).T),
        (lambda x: bias_gelu(x, draw(16)[::2], backend=backend), draw(8, 3).T),
        (lambda x: weighted_squared_error(x, torch.ones(3, 8), torch.ones(6)[::2], backend=backend), draw(8, 3).T),
    ):
        torch.testing.assert_close(function(x), function(x.contiguous()))


def test_squared_error_in_double_precision():
    prediction = draw(3, 4, dtype=torch.float64)
    prediction = prediction.detach().requires_grad_()
    target, weight = torch.ones(3, 4, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    exact = (weight[:, None] * (prediction - target).square()).sum()
    for kind in (torch.float64, torch.float32):
        loss = weighted_squared_error(prediction, target, weight.to(kind))
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, exact, rtol=1e-15, atol=0)
    assert torch.autograd.gradcheck(lambda p: weighted_squared_error(p, target, weight), prediction)
    with pytest.raises(ValueError, match=r"weight is torch.float64, expected torch.float32$"):
        weighted_squared_error(prediction.float(), target.float(), weight)


SPLITS = [(8, 0, 0), (0, 8, 0), (0, 0, 8), (0, 2, 6), (4, 4, 0)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_axes_without_channels(split, dtype):
    rope, weight = AxialRoPE(8, split=split), torch.ones(8)
    qkv = draw(4, 3, 2, 8, dtype=dtype).detach()
    far = torch.full((4, 3), 3000, dtype=torch.int32)
    exact = qk_norm_rope(qkv.double(), weight, weight, far, rope, backend="reference")
    actuals = qk_norm_rope(qkv, weight, weight, far, rope, backend="reference")
    for actual, expected in zip(actuals, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)
    for position in (-1, -(2**31), 2**31 - 1, 1 << 20):
        for axis in range(3):
            coords = torch.zeros(4, 3, dtype=torch.int32)
            coords[2, axis] = position
            with pytest.raises(ValueError, match=rf"coords holds {position}, expected values in \[0, 1048576\)$"):
                qk_norm_rope(qkv, weight, weight, coords, rope, backend="reference")


@pytest.mark.parametrize("split", SPLITS)
def test_axes_without_channels_on_kernels(split):
    rope, weight, qkv = AxialRoPE(8, split=split), torch.ones(8), draw(4, 3, 2, 8).detach()
    coords = torch.arange(12, dtype=torch.int32).view(4, 3)
    pairs = (qk_norm_rope(qkv, weight, weight, coords, rope, backend=backend) for backend in ("cuda", "reference"))
    for actual, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, expected)
    with pytest.raises(RuntimeError, match="a position is negative or beyond the table"):
        qk_norm_rope(qkv, weight, weight, coords - 1, rope, backend="cuda")


def test_a_table_without_end_is_refused():
    with pytest.raises(
        ValueError, match=r"^tables_on: max_position is 1048576, expected a whole number in 0..1048575$"
    ):
        AxialRoPE(8).tables_on("cpu", 1 << 20)


@both
def test_a_cache_is_written_where_no_gradient_is_lost(backend: str):
    def write(qkv, rows):
        cache = torch.zeros(2, 4, 1, 8)
        return qk_norm_rope_cache(qkv, torch.ones(8), torch.ones(8), None, None, *cache, rows, backend=backend)

    with pytest.raises(ValueError, match="^qk_norm_rope_cache: has no gradient, expected a call under torch.no_grad"):
        write(draw(2, 3, 1, 8), torch.arange(2))
    with torch.no_grad():
        write(draw(2, 3, 1, 8), torch.arange(2))
        message = {"cuda": "cache row out of range", "reference": r"cache_rows holds 9, expected values in \[0, 4\)"}
        with pytest.raises((ValueError, RuntimeError), match=message[backend]):
            write(draw(2, 3, 1, 8), torch.tensor([0, 9]))


ROWS = FrameRows([3], [0])
STEP = (torch.zeros(3), torch.zeros(2, 3), torch.ones(2), torch.ones(3, 2))
REFUSED = {
    r"modulate: x has shape \[\], expected \[rows, D\]": lambda: modulate(draw(), draw(1, 8), draw(1, 8), ROWS),
    r"modulate: scale has shape \[\], expected \[groups, 8\]": lambda: modulate(draw(3, 8), draw(), draw(1, 8), ROWS),
    "modulate: scale is a list, expected a torch.Tensor": lambda: modulate(draw(3, 8), [1], draw(1, 8), ROWS),
    "modulate: eps is 'x', expected a finite number": lambda: modulate(draw(3, 8), *draw(2, 1, 8), ROWS, eps="x"),
    "modulate: rows is a list, expected FrameRows": lambda: modulate(draw(3, 8), draw(1, 8), draw(1, 8), [3]),
    r"qk_norm_rope: qkv has shape \[\], expected": lambda: qk_norm_rope(draw(), draw(8), draw(8), None, None),
    "qk_norm_rope: rope is a int, expected AxialRoPE": lambda: qk_norm_rope(
        draw(4, 3, 2, 8), draw(8), draw(8), torch.zeros(4, 3, dtype=torch.int32), 3
    ),
    r"apply_rope: x has shape \[8\], expected": lambda: apply_rope(draw(8), NONE, AxialRoPE(8)),
    r"gather_tokens: x has shape \[\], expected": lambda: gather_tokens(draw(), NONE),
    r"gather_tokens: index has shape \[\], expected \[kept\]": lambda: gather_tokens(draw(3, 2), torch.tensor(1)),
    "gather_tokens: index is a list, expected a torch.Tensor": lambda: gather_tokens(draw(3, 2), [1]),
    "scatter_tokens: num_rows is 'a', expected a whole number": lambda: scatter_tokens(draw(0, 2), NONE, "a"),
    "scatter_tokens: num_rows is -1, expected a whole number": lambda: scatter_tokens(draw(0, 2), NONE, -1),
    "scatter_tokens: num_rows is 2.0, expected a whole number": lambda: scatter_tokens(draw(0, 2), NONE, 2.0),
    r"bias_gelu: x has shape \[\], expected \[..., D\]": lambda: bias_gelu(draw()),
    "bias_gelu: x is a list, expected a torch.Tensor": lambda: bias_gelu([1.0]),
    r"weighted_squared_error: weight has shape \[3, 1\], expected first dimensions of \[3\]": lambda: (
        weighted_squared_error(draw(3), torch.zeros(3), torch.ones(3, 1))
    ),
    r"guided_step: index holds 3, expected values in \[0, 3\)": lambda: guided_step(*STEP, torch.tensor([3])),
    r"guided_step: index holds -1, expected values in \[0, 3\)": lambda: guided_step(*STEP, torch.tensor([-1])),
    r"guided_step: weights has shape \[0\], expected \[G\], at least one branch": lambda: guided_step(
        STEP[0], torch.zeros(0, 3), torch.ones(0), STEP[3], torch.tensor([1])
    ),
    "guided_step: v is on meta, expected cpu": lambda: guided_step(
        STEP[0], STEP[1].to("meta"), *STEP[2:], torch.tensor([1])
    ),
    "sample_tube_mask: num_kept is 5, expected a whole number in 0..4": lambda: sample_tube_mask(1, 4, 5),
    r"AxialRoPE: head_dim is 8.0, expected": lambda: AxialRoPE(8.0),
    r"AxialRoPE: a number of split is -2, expected": lambda: AxialRoPE(8, split=(-2, 4, 6)),
    "AxialRoPE: theta is inf, expected a finite number above 0": lambda: AxialRoPE(8, theta=float("inf")),
    r"FrameRows: 4611686018427387904 rows of 1 groups, expected fewer": lambda: FrameRows([2**61, 2**61], [0, 0]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_line(message: str):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        REFUSED[message]()
    assert "\n" not in str(error.value)
