"""The one way to become an operator of torch: `mimo_kernels::<name>`, with shapes for tracing and an answer to every
derivative.

    bias_gelu_op = register(
        "bias_gelu(Tensor x, Tensor? bias) -> Tensor",
        _bias_gelu,                                   # runs on CPU and CUDA tensors
        fake=lambda x, bias: torch.empty_like(x),     # shapes, dtypes and strides, for meta tensors and torch.compile
        sample=lambda rows: (torch.randn(rows, 8), torch.randn(8)),
        gradients=_gradients, save=_save,             # reverse mode, if it has one
    )

torch answers a derivative that an operator does not have with zeros, with nothing or with a line about its internals.
Operators registered here raise NotImplementedError that names them: for forward mode always, for the gradient of an
operator without one (a backward operator: double backward) when that gradient is asked for, for torch.func.grad and its
kin. An operator that writes into its arguments has no gradients at all and is refused where one would be lost.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mimo_kernels.core import torch_private

DEVICES = ("CPU", "CUDA")
SAMPLES: dict[str, Callable[[int], tuple]] = {}  # by name, for whoever checks all operators


class _Library(torch.library.Library):
    """Puts the refusal of forward mode in front of every autograd kernel, those of register_autograd included."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **options) -> None:
        if dispatch_key == "Autograd":
            fn = _without_tangents(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **options)


_LIBRARY = _Library("mimo_kernels", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable,
    *,
    fake: Callable,
    sample: Callable[[int], tuple],
    gradients: Callable | None = None,
    save: Callable | None = None,
) -> torch_private.OpOverload:
    """Defines an operator from its schema, "name(Tensor x, ...) -> ...", and returns it.

    Args:
        schema: in torch's schema language; `Tensor(a!)` for an argument that is written in place.
        implementation: computes the results; they alias no argument.
        fake: takes the same arguments, returns empty results, and reads no values.
        sample: number of rows, 0 or more -> the arguments of a small call on the CPU; the tests call every operator so.
        gradients: (ctx, *gradients of the outputs) -> a gradient or None per argument. Only for an operator that writes
            into none of its arguments.
        save: (ctx, inputs, output): what `gradients` needs.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    operator = getattr(torch.ops.mimo_kernels, name).default
    written = [i for i, argument in enumerate(operator._schema.arguments) if argument.alias_info is not None]
    for device in DEVICES:
        _LIBRARY.impl(name, _counting_writes(implementation, written) if written else implementation, device)
    torch.library.register_fake(f"mimo_kernels::{name}", fake, lib=_LIBRARY)
    if written:
        _LIBRARY.impl(name, _without_gradients(name, operator), "Autograd", with_keyset=True)
    else:
        torch.library.register_autograd(
            f"mimo_kernels::{name}",
            gradients or _refuse_gradients(name),
            setup_context=save,
            lib=_LIBRARY,
        )
    SAMPLES[name] = sample
    return operator


def _any_requires_grad(args: tuple) -> bool:
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _without_tangents(name: str, kernel: Callable) -> Callable:
    def autograd_kernel(keyset, *args, **kwargs):
        if torch_private.forward_level() >= 0 and any(
            isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args
        ):
            raise NotImplementedError(
                f"mimo_kernels::{name} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad)"
            )
        if torch.is_grad_enabled() and torch_private.functorch_active() and _any_requires_grad(args):
            raise NotImplementedError(
                f"mimo_kernels::{name} has no gradient in transforms of torch.func; use torch.autograd"
            )
        return kernel(keyset, *args, **kwargs)

    return autograd_kernel


def _refuse_gradients(name: str) -> Callable:
    def gradients(ctx, *_):
        what = "second derivative (double backward)" if name.endswith("_backward") else "gradient"
        raise NotImplementedError(f"mimo_kernels::{name.removesuffix('_backward')} has no {what}")

    return gradients


def refuse_torch_func(name: str) -> None:
    """For an operator that writes into its arguments. Its function asks too: functionalize comes before our kernels."""
    if not torch.compiler.is_compiling() and torch_private.functorch_active():
        raise NotImplementedError(f"{name} writes into its arguments and has no place in transforms of torch.func")


def _without_gradients(name: str, operator: torch_private.OpOverload) -> Callable:
    def autograd_kernel(keyset, *args):
        refuse_torch_func(f"mimo_kernels::{name}")
        if torch.is_grad_enabled() and _any_requires_grad(args):
            raise NotImplementedError(f"mimo_kernels::{name} has no gradient: call it under torch.no_grad()")
        with torch_private.below_autograd():
            return operator.redispatch(keyset & torch_private.AFTER_AUTOGRAD, *args)

    return autograd_kernel


def _counting_writes(implementation: Callable, written: list[int]) -> Callable:
    """Autograd has to know of writes, else it takes an overwritten tensor for the one that it saved."""

    def counting(*args):
        result = implementation(*args)
        torch.autograd.graph.increment_version([args[i] for i in written])
        return result

    return counting
