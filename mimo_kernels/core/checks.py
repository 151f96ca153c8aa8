"""How operators, attention and cache refuse what they are given, in one wording: ValueError, one line,

    <operator>: <argument> <what it is>, expected <what it should be>

Every check takes the operator's name, the argument's name and the argument. Shapes are written as lists, [rows, 3, 72],
with a name where any number will do.
"""

import math
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

from mimo_kernels.core import torch_private

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what kernels read and write
FLOAT_NAMES = "float32, float16 or bfloat16"


def refuse(op: str, name: str, found: str, expected: str) -> NoReturn:
    raise ValueError(f"{op}: {name} {found}, expected {expected}")


def expect_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        refuse(op, name, f"is a {type(x).__name__}", "a torch.Tensor")


def expect_shape(op: str, name: str, x: Tensor, *shape: int | str) -> None:
    """Numbers have to agree; a word stands for any number, and a word that begins with `...` for any leading
    dimensions."""
    expect_tensor(op, name, x)
    actual, wanted = x.shape, shape
    if actual == wanted:  # the usual case first: every call of an operator asks several times
        return
    if len(actual) != len(wanted) and wanted and isinstance(wanted[0], str) and wanted[0].startswith("..."):
        wanted = wanted[1:]
        actual = actual[max(0, len(actual) - len(wanted)) :]
    fits = len(actual) == len(wanted)
    for have, want in zip(actual, wanted):
        fits = fits and (have == want or isinstance(want, str))
    if not fits:
        refuse(op, name, f"has shape {list(x.shape)}", f"[{', '.join(map(str, shape))}]")


def expect_shapes(op: str, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """All tensors that are there of this shape."""
    for name, x in tensors.items():
        if x is not None and not (isinstance(x, Tensor) and x.shape == shape):
            expect_shape(op, name, x, *shape)


def expect_dtype(op: str, name: str, x: Tensor, *dtypes: torch.dtype, why: str = "") -> None:
    """One of these dtypes; `why` says where the demand comes from: "as x"."""
    if x.dtype not in dtypes:
        listed = [str(dtype) for dtype in dict.fromkeys(dtypes)]
        expected = " or ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
        refuse(op, name, f"is {x.dtype}", f"{expected} ({why})" if why else expected)


def expect_floating(op: str, name: str, x: Tensor) -> None:
    """For functions whose reference serves float64 as well."""
    if not x.is_floating_point():
        refuse(op, name, f"is {x.dtype}", FLOAT_NAMES)


def expect_device(op: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """All tensors where `reference` is."""
    for name, x in tensors.items():
        if x is not None and x.device != reference.device:
            refuse(op, name, f"is on {x.device}", f"{reference.device}")


def expect_kind(op: str, reference_name: str, reference: Tensor, **tensors: Tensor) -> None:
    """All tensors of the device and dtype of `reference`, the argument of that name."""
    for name, x in tensors.items():
        expect_tensor(op, name, x)
        if x.device != reference.device:
            refuse(op, name, f"is on {x.device}", f"{reference.device} (as {reference_name})")
        if x.dtype != reference.dtype:
            refuse(op, name, f"is {x.dtype}", f"{reference.dtype} (as {reference_name})")


def expect_like(op: str, reference_name: str, reference: Tensor, **tensors: Tensor) -> None:
    """All tensors of the device, dtype and shape of `reference`, the argument of that name."""
    expect_kind(op, reference_name, reference, **tensors)
    for name, x in tensors.items():
        if x.shape != reference.shape:
            refuse(op, name, f"has shape {list(x.shape)}", f"{list(reference.shape)} (as {reference_name})")


def expect_contiguous(op: str, name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        refuse(op, name, f"has strides {list(x.stride())}", f"a contiguous {list(x.shape)}")


def expect_constant(op: str, name: str, x: Tensor) -> None:
    if x.requires_grad:
        refuse(op, name, "requires a gradient", "a constant (detach it)")


def expect_no_gradient(op: str, *tensors: Tensor) -> None:
    """For functions that have none: a gradient that would be lost is refused."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(f"{op}: has no gradient, expected a call under torch.no_grad()")


def on_host(x: Tensor) -> bool:
    """Whether values can be looked at: they lie on the CPU, and nothing is being traced. Elsewhere kernels check."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch_private.is_fake(x)


def expect_indices(op: str, name: str, x: Tensor, end: int) -> None:
    """All values in [0, end), where they can be looked at."""
    if on_host(x) and x.numel():
        low, high = (int(bound) for bound in torch.aminmax(x))
        if low < 0 or high >= end:
            refuse(op, name, f"holds {low if low < 0 else high}", f"values in [0, {end})")


def expect_number(op: str, name: str, value: Any, *, above: float = -math.inf) -> None:
    """A finite number above a bound."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above < value < math.inf:
        refuse(
            op, name, f"is {value!r}", "a finite number" if above == -math.inf else f"a finite number above {above:g}"
        )


def expect_count(op: str, name: str, value: Any, low: int = 0, high: int | None = None) -> None:
    """A whole number between bounds, both included; numpy's are some."""
    whole = isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        expected = f"a whole number of at least {low}" if high is None else f"a whole number in {low}..{high}"
        refuse(op, name, f"is {value!r}", expected)
