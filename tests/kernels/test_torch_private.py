"""Each private name of torch that the package uses, alone: which torch has moved or changed it is what a failure here
tells."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from mimo_kernels.core import torch_private


def test_forward_level():
    assert torch_private.forward_level() == -1
    with forward_ad.dual_level():
        assert torch_private.forward_level() == 0
    levels = []
    torch.func.jvp(lambda x: levels.append(torch_private.forward_level()) or x, (torch.ones(1),), (torch.ones(1),))
    assert levels == [0] and torch_private.forward_level() == -1


def test_functorch_active():
    seen = []
    torch.func.grad(lambda x: seen.append(torch_private.functorch_active()) or x)(torch.ones(()))
    assert seen == [True] and not torch_private.functorch_active()


def test_below_autograd():
    x = torch.ones(1, requires_grad=True)
    with torch_private.below_autograd():
        assert not (2 * x).requires_grad
    assert (2 * x).requires_grad


def test_after_autograd():
    keys = torch._C._dispatch_keys(torch.ones(1))
    assert keys.has(torch._C.DispatchKey.AutogradCPU)
    after = keys & torch_private.AFTER_AUTOGRAD
    assert after.has(torch._C.DispatchKey.CPU) and not after.has(torch._C.DispatchKey.AutogradCPU)


def test_modes():
    assert torch_private.dispatch_modes() == 0 and torch_private.fake_mode() is None
    with FakeTensorMode() as mode:
        assert torch_private.dispatch_modes() == 1 and torch_private.fake_mode() is mode
        assert torch_private.is_fake(torch.ones(1))
        with torch_private.without_dispatch_modes():
            assert torch_private.dispatch_modes() == 0 and torch.ones(2).sum() == 2
        assert torch_private.dispatch_modes() == 1
    assert not torch_private.is_fake(torch.ones(1)) and torch_private.is_fake(torch.ones(1, device="meta"))


def test_saved_tensors_are_packed():
    assert not torch_private.saved_tensors_are_packed()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert torch_private.saved_tensors_are_packed()


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch has no streams")
def test_raw_stream():
    assert callable(torch._C._cuda_getCurrentRawStream)


def test_operator_overload():
    assert isinstance(torch.ops.aten.add.Tensor, torch_private.OpOverload)


def attention_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, rows, 16, generator=generator, requires_grad=True) for rows in (5, 7, 7)]


@pytest.mark.parametrize("masked", [False, True])
def test_cpu_attention(masked):
    q, k, v = attention_inputs()
    scores = 0.3 * q @ k.transpose(-1, -2)
    bias = torch.zeros(5, 7).masked_fill(torch.ones(5, 7).tril() == 0, -torch.inf) if masked else None
    scores = scores if bias is None else scores + bias
    expected = scores.softmax(-1) @ v
    out, lse = torch_private.cpu_attention(q.detach(), k.detach(), v.detach(), attn_mask=bias, scale=0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    dout = out.cos()
    gradients = torch_private.cpu_attention_backward(
        dout, q.detach(), k.detach(), v.detach(), out, lse, 0.0, False, attn_mask=bias, scale=0.3
    )
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_cuda_attention_takes_what_it_took():
    """Whether it computes what it did is for tests/gpu; here its arguments, in order."""
    names = [argument.name for argument in torch_private.cuda_attention.default._schema.arguments]
    assert names[:4] == ["query", "key", "value", "bias"]
    assert names[4:11] == [
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "dropout_p",
        "custom_mask_type",
        "compute_log_sumexp",
    ]
    names = [argument.name for argument in torch_private.cuda_attention_backward.default._schema.arguments]
    assert names[:6] == ["grad_out_", "query", "key", "value", "bias", "out"]
    assert names[6:16] == [
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "logsumexp",
        "dropout_p",
        "philox_seed",
        "philox_offset",
        "custom_mask_type",
        "bias_requires_grad",
    ]
    assert {"scale", "num_splits_key"} <= set(names)


def test_no_other_file_uses_a_private_name():
    """An attribute of torch that begins with one underscore, at any depth, or an import of such a module."""
    package = Path(torch_private.__file__).parents[1]
    found = {}
    for path in package.rglob("*.py"):
        names = re.findall(r"\btorch(?:\.\w+)*\._[a-zA-Z]\w*|from torch[\w.]* import _\w+", path.read_text())
        if names:
            found[path.relative_to(package).as_posix()] = names
    assert found.pop("core/torch_private.py")
    assert not found
