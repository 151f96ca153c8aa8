"""Each private name of torch that the package uses, alone: which torch has moved or changed it is what a failure here tells."""

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


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch has no streams")
def test_raw_stream():
    assert callable(torch._C._cuda_getCurrentRawStream)
