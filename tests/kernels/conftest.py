import pytest
import torch

from mimo_kernels.core import backends

from .emulation import emulated  # noqa: F401


@pytest.fixture(autouse=True)
def launches():
    """The Triton kernels that the test has launched. Interpreted ones are watched in every test: see
    `watched_kernels`."""
    if backends.triton_refusals(torch.device("cpu")):
        yield []
        return
    from .triton_memory import watched_kernels

    with watched_kernels() as names:
        yield names
