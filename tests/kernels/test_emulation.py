"""The block emulator itself: it finds the mistakes it is meant to find, and its 16-bit floats are those of torch."""

import math

import pytest
import torch


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("absent lane", "never reach"),
        ("barrier in a branch", "never reach"),
        ("overrun", "past the end of the shared memory"),
        ("misaligned", "misaligned"),
    ],
)
def test_a_mistake_is_named_and_the_next_kernel_runs(emulated, mistake, message):
    failure, _ = emulated.run_faulty(mistake)
    assert message in failure
    assert emulated.run_faulty("missing barrier")[0] == ""


def test_a_missing_barrier_shows(emulated):
    results = []
    for order in (0, 1, 2):
        emulated.set_order(order)
        results.append(emulated.run_faulty("missing barrier")[1])
    assert all(any(math.isnan(value) for value in result) for result in results)  # read before it was written
    assert str(results[0]) != str(results[1]) != str(results[2])


def test_half_and_bfloat_are_those_of_torch(emulated):
    patterns = torch.arange(1 << 16).to(torch.int32)
    halves = patterns.to(torch.int16).view(torch.float16)
    widened = torch.tensor([emulated.from_half(int(bits)) for bits in patterns])
    assert torch.equal(widened.nan_to_num(1e9), halves.float().nan_to_num(1e9))
    # Every half, the middle between neighbours (ties to even), a little beside it, and what overflows.
    finite = halves[halves.isfinite()].float().sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    values = torch.cat(
        [finite, middle, middle * (1 + 1e-6), middle * (1 - 1e-6), torch.tensor([65519.9, 65520.0, -1e9, 1e-9])]
    )
    for narrow, dtype in ((emulated.to_half, torch.float16), (emulated.to_bfloat, torch.bfloat16)):
        bits = torch.tensor([narrow(value) for value in values.tolist()]).to(torch.int16)
        assert torch.equal(bits.view(dtype), values.to(dtype))
