"""How the operators are judged: error budgets against an exact result, and memory poisoned with NaN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    atol: float = 1e-5,
    name: str = "output",
    more: tuple[Tensor, Tensor] | None = None,
) -> None:
    """An operator may err at most twice as much as plain PyTorch in the same dtype, plus a small absolute term:

        err(actual) <= 2 err(plain) + atol * max(1, max |exact|)

    where err is the largest and, checked as well, the root mean square deviation from `exact`.

    actual: the operator's result.
    plain:  the same computation by ordinary PyTorch operators in the dtype under test.
    exact:  the same computation in fp32 or fp64. Infinite values have to stand at the same places in `actual`.

    more:   plain and exact results of further inputs of the same kind, whose errors count as plain's too: the largest
            of a few errors is luck, and a small case has few.

    AssertionError naming the result, its worst element and both errors.
    """
    if not actual.shape == plain.shape == exact.shape:
        raise AssertionError(
            f"{name}: shape {list(actual.shape)}, plain {list(plain.shape)}, exact {list(exact.shape)}"
        )
    if exact.dtype not in (torch.float32, torch.float64):
        raise AssertionError(f"{name}: the exact result is {exact.dtype}, expected float32 or float64")
    if exact.numel() == 0:
        return
    exact, actual, plain = (x.detach().to(exact.device, torch.float64) for x in (exact, actual, plain))
    finite = exact.isfinite()
    if exact.isnan().any():
        raise AssertionError(f"{name}: the exact result holds NaN")
    if not (torch.equal(actual[~finite], exact[~finite]) and actual[finite].isfinite().all()):
        wrong = torch.where(finite, ~actual.isfinite(), actual != exact)
        index = tuple(wrong.nonzero()[0].tolist())
        count = int(wrong.sum())
        raise AssertionError(
            f"{name}: {count} non-finite values differ; at {index} it is {actual[index]}, exact {exact[index]}"
        )
    small = atol * max(1.0, exact[finite].abs().max().item() if finite.any() else 0.0)
    deviation = torch.where(finite, (actual - exact).abs(), 0.0)
    plain_deviation = torch.where(finite, (plain - exact).abs(), 0.0).flatten()
    if more is not None:
        further, truth = (x.detach().to(exact.device, torch.float64) for x in more)
        plain_deviation = torch.cat([plain_deviation, (further - truth)[truth.isfinite()].abs()])
    for kind, error, plain_error in (
        ("largest", deviation.max(), plain_deviation.max()),
        ("root mean square", deviation.square().mean().sqrt(), plain_deviation.square().mean().sqrt()),
    ):
        if not error <= 2 * plain_error + small:
            index = tuple(int(i) for i in torch.unravel_index(deviation.argmax(), deviation.shape))
            raise AssertionError(
                f"{name}: {kind} error {error:.3e} exceeds 2 x {plain_error:.3e} (plain PyTorch) + {small:.1e}; "
                f"worst at {index}: {actual[index]:.6g}, exact {exact[index]:.6g}"
            )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty and its relatives give NaN (integers: the largest value): what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill


def between_nans(x: Tensor, margin: int = 256) -> Tensor:
    """The values of x as a contiguous view into a buffer with `margin` NaN elements before and after, so that a kernel
    that reads out of bounds shows. A margin that is a multiple of 8 keeps 16-byte loads aligned."""
    buffer = x.new_full((x.numel() + 2 * margin,), float("nan"))
    view = buffer[margin : margin + x.numel()].view(x.shape)
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)
