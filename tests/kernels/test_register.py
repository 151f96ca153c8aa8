"""Every operator that is registered, called with its sample: what torch.library asks of it, and derivatives that it
does not have."""

import importlib
import re
import warnings

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from mimo_kernels.core.operators import OPERATORS
from mimo_kernels.core.register import SAMPLES
from mimo_kernels.ops.guidance import guided_step
from mimo_kernels.ops.rope import qk_norm_rope_cache

for family in {*(operator.family for operator in OPERATORS), "attention.triton.operator"}:
    importlib.import_module(f"mimo_kernels.{family}")
pytestmark = pytest.mark.usefixtures("emulated")
every_operator = pytest.mark.parametrize("name", SAMPLES)


def overload(name: str):
    return getattr(torch.ops.mimo_kernels, name).default


def writes(name: str) -> bool:
    return overload(name)._schema.is_mutable


def call(name: str, args: tuple) -> tuple[Tensor, ...]:
    results = overload(name)(*args)
    return results if isinstance(results, tuple) else () if results is None else (results,)


def sample(name: str, rows: int = 5, requires_grad: bool = False) -> tuple:
    torch.manual_seed(0)
    args = SAMPLES[name](rows)
    return tuple(
        arg.detach().requires_grad_() if requires_grad and isinstance(arg, Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def copied(args: tuple) -> tuple:
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def detached(arg):
    return arg.detach() if isinstance(arg, Tensor) else arg


def facts(tensors) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


def has_gradient(name: str) -> bool:
    """Whether a gradient comes out of it: told by the operators themselves, by the name that their backward has."""
    try:
        args = sample(name, requires_grad=True)
        outputs = [t for t in call(name, args) if t.requires_grad]
        torch.autograd.grad(
            outputs, [t for t in args if isinstance(t, Tensor)][:1], [torch.ones_like(t) for t in outputs]
        )
    except NotImplementedError:
        return False
    return True


@every_operator
def test_is_well_formed(name: str):
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    wants = not writes(name) and has_gradient(name)
    torch.library.opcheck(overload(name), sample(name, requires_grad=wants), test_utils=utils)


@every_operator
def test_forward_mode_is_refused_for_every_argument(name: str):
    refusal = pytest.raises(NotImplementedError, match=f"^mimo_kernels::{name} has no forward-mode derivative .*$")
    args = sample(name)
    floating = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    for i in floating:
        with forward_ad.dual_level(), refusal:
            dual = forward_ad.make_dual(args[i], torch.ones_like(args[i]))
            overload(name)(*args[:i], dual, *args[i + 1 :])
    first = floating[0]

    def function(x: Tensor):
        return overload(name)(*args[:first], x, *args[first + 1 :])

    with refusal:
        torch.func.jvp(function, (args[first],), (torch.ones_like(args[first]),))
    with forward_ad.dual_level():  # tangents of others do not matter
        call(name, args)


@every_operator
def test_a_derivative_that_is_not_there_is_refused(name: str):
    args = sample(name, requires_grad=True)
    if writes(name):
        with pytest.raises(NotImplementedError, match=f"^mimo_kernels::{name} has no gradient: call it under"):
            overload(name)(*args)
        with torch.no_grad():
            call(name, args)
        return
    inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    outputs = [t for t in call(name, args) if t.requires_grad]
    weights = [torch.ones_like(t).requires_grad_() for t in outputs]
    if not has_gradient(name):
        with pytest.raises(NotImplementedError, match=f"^mimo_kernels::{name.removesuffix('_backward')} has no "):
            torch.autograd.grad(outputs, inputs[0], weights)
        return
    gradients = torch.autograd.grad(outputs, inputs, weights, create_graph=True, allow_unused=True)
    twice = [g for g in gradients if g is not None and g.requires_grad]
    try:
        torch.autograd.grad(twice, [*inputs, *weights], [torch.ones_like(g) for g in twice], allow_unused=True)
    except NotImplementedError as error:
        assert re.fullmatch(r"mimo_kernels::\w+ has no (gradient|second derivative \(double backward\))", str(error))
    else:  # the gradient is an operator that has one: rows that are copied
        differentiable = [x for x, gradient in zip(inputs, gradients, strict=True) if gradient is not None]
        at = [next(i for i, arg in enumerate(args) if arg is x) for x in differentiable]

        def function(*given: Tensor):
            chosen = dict(zip(at, given, strict=True))
            return overload(name)(*[chosen.get(i, detached(arg)) for i, arg in enumerate(args)])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of single precision, in which what is linear is exact enough
            assert torch.autograd.gradgradcheck(function, tuple(differentiable), eps=1e-2, atol=1e-2, rtol=1e-2)


@every_operator
def test_compiles_whole(name: str):
    args = sample(name)
    expected = call(name, copied(args))

    def function(*tensors: Tensor):
        given = list(tensors)
        return overload(name)(*[given.pop(0) if isinstance(arg, Tensor) else arg for arg in args])

    tensors = [arg for arg in copied(args) if isinstance(arg, Tensor)]
    torch.compiler.reset()  # all operators are one function to it
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    actual = actual if isinstance(actual, tuple) else () if actual is None else (actual,)
    assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))


@every_operator
def test_torch_func_grad_is_refused(name: str):
    args = sample(name)
    first = next(i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point())

    def total(x: Tensor) -> Tensor:
        return sum(t.float().sum() for t in call(name, (*args[:first], x, *args[first + 1 :])))

    with pytest.raises(NotImplementedError, match=f"^mimo_kernels::{name} (has no gradient|writes into)"):
        torch.func.grad(total)(args[first])


@every_operator
def test_shapes_without_values(name: str):
    args = sample(name)
    results = call(name, args)
    meta = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
    assert facts(call(name, tuple(meta))) == facts(results)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
        assert facts(call(name, tuple(fake))) == facts(results)


@every_operator
def test_no_rows(name: str):
    args = sample(name, rows=0)
    results = call(name, args)
    meta = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
    assert facts(call(name, tuple(meta))) == facts(results)
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("name", [name for name in SAMPLES if not writes(name)])
def test_functionalize(name: str):
    args = sample(name)
    expected = call(name, copied(args))
    tensors = [arg for arg in args if isinstance(arg, Tensor)]

    def function(*tensors: Tensor):
        given = iter(tensors)
        return call(name, tuple(next(given) if isinstance(arg, Tensor) else arg for arg in args))

    actual = torch.func.functionalize(function)(*tensors)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", [name for name in SAMPLES if writes(name)])
def test_autograd_learns_of_writes(name: str):
    args = sample(name)
    written = [arg for arg, it in zip(args, overload(name)._schema.arguments) if it.alias_info is not None]
    before = [t._version for t in written]
    call(name, args)
    assert all(t._version > version for t, version in zip(written, before))


def test_functions_that_write_are_refused_in_functionalize():
    x, v, *others = sample("guided_step_triton")
    with pytest.raises(NotImplementedError, match="^guided_step writes into its arguments"):
        torch.func.functionalize(lambda x, v: guided_step(x, v, *others, backend="triton"))(x, v)
    qkv, _, _, q_weight, k_weight, *_, k_cache, v_cache, rows = sample("qk_norm_rope_cache")
    with pytest.raises(NotImplementedError, match="^qk_norm_rope_cache writes into its arguments"):
        torch.func.functionalize(
            lambda x: qk_norm_rope_cache(x, q_weight, k_weight, None, None, k_cache, v_cache, rows, backend="cuda")
        )(qkv)
