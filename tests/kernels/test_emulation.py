"""The block emulator itself: it finds the mistakes it is meant to find, and its 16-bit floats are those of torch."""

import pytest
import torch

from .emulation import EMULATOR

OUTSIDE = "outside of the operands and the shared memory"
RACE = "which another thread of the block {} since the last barrier"
UNWRITTEN = "which nobody has written"


def run(emulated, *names: str, blocks: int = 1, size: int = 64) -> str:
    """What goes wrong in kernels of faulty.cu, one after the other on the same operands, each the middle of a larger
    buffer."""
    out, x = torch.zeros(2, size + 128)[:, 64 : 64 + size]
    emulated.lend("out", out, writable=True)
    emulated.lend("in", x, writable=False)
    try:
        failures = [emulated.run_faulty(name, out.data_ptr(), x.data_ptr(), blocks) for name in names]
    finally:
        emulated.take_back()
    assert not any(failures[:-1])
    return failures[-1]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("absent lane", "never reach"),
        ("barrier in a branch", "at different barriers or shuffles"),
        ("barrier in two branches", "at different barriers or shuffles"),
        ("barrier after an exit", "some threads never reach: they have ended"),
        ("exit after a barrier", "some threads never reach: they have ended"),
        ("misaligned", "a misaligned access: 16 bytes at out + 4 bytes"),
        ("misaligned word", "a misaligned access: 8 bytes at out + 4 bytes"),
        ("shared overrun", f"a write {OUTSIDE}: 4 bytes at the shared memory + 256 bytes"),
        ("read past the end", f"a read {OUTSIDE}: 4 bytes at in + 256 bytes"),
        ("read 16 bytes past the end", f"a read {OUTSIDE}: 16 bytes at in + 256 bytes"),
        ("read before the start", f"a read {OUTSIDE}: 4 bytes at in - 4 bytes"),
        ("read of nothing", f"a read {OUTSIDE}: 4 bytes at an unknown address"),
        ("read of another thread's stack", f"a read {OUTSIDE}"),
        ("write past the end", f"a write {OUTSIDE}: 4 bytes at out + 256 bytes"),
        ("write to an input", "a write to in + 0 bytes (of 256), an input"),
        ("output read first", f"a read of out + 0 bytes (of 256), {UNWRITTEN}"),
        ("shared read first", f"a read of the shared memory + 0 bytes (of 256), {UNWRITTEN}"),
        ("shuffle as a barrier", RACE.format("wrote")),
        ("one place for all rounds", RACE.format("read")),
        ("two writers", RACE.format("wrote")),
    ],
)
def test_a_mistake_is_named_and_the_next_kernel_runs(emulated, mistake, message):
    assert message in run(emulated, mistake)
    assert run(emulated, "with the barrier") == ""
    for order in (1, 2):
        emulated.set_order(order)
        assert run(emulated, mistake)


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        (["two blocks write"], "a write of out + 0 bytes (of 512), which another block wrote"),
        (["a block reads what another wrote"], "a read of out + 0 bytes (of 512), which another block wrote"),
        (
            ["define the second half", "a block writes what another read"],
            "a write of out + 256 bytes (of 512), which another block read",
        ),
        (["shared of the block before"], f"a read of the shared memory + 0 bytes (of 256), {UNWRITTEN}"),
    ],
)
def test_blocks_have_no_order(emulated, kernels, message):
    assert message in run(emulated, *kernels, blocks=2, size=128)
    assert run(emulated, *kernels, size=128) == ""


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("kernel", ["with the barrier", "two places in turn", "two writers of two halves"])
def test_what_is_right_passes(emulated, order, kernel):
    emulated.set_order(order)
    assert run(emulated, kernel) == ""


def test_launches_of_a_stream_have_an_order(emulated):
    assert run(emulated, "with the barrier", "two places in turn", "output read first") == ""


def test_a_missing_barrier_shows_in_any_order(emulated):
    """One half of the block reads before the other half writes, or after it: nothing there yet, or a race."""
    for order in range(6):
        emulated.set_order(order)
        failure = run(emulated, "missing barrier")
        assert UNWRITTEN in failure or RACE.format("wrote") in failure


def test_the_line_is_named(emulated):
    failure = run(emulated, "two writers")
    source = (EMULATOR / "faulty.cu").read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "void two_writers(" in text)
    assert failure.endswith(f"; thread (1, 0, 0) of block (0, 0, 0) at faulty.cu:{line}")


def test_operators_lend_exactly_their_tensors(emulated):
    x, index = torch.randn(5, 8), torch.tensor([4, 0])

    here = {"wide_index": True, "row_bytes": 32, "device": 0, "stream": 0}

    def gather(y, x=x, index=index, kept=2, skipped=0):
        at = x.data_ptr() + skipped if skipped else x.data_ptr()
        emulated.gather_rows(y=y.data_ptr(), x=at, index=index.data_ptr(), kept=kept, rows=5, **here)

    y = torch.zeros(4, 8)[1:3]
    gather(y)
    assert torch.equal(y, x[index])
    with pytest.raises(RuntimeError, match=r"gather_rows: a write outside .*: 16 bytes at y \+ 32 bytes \(of 32\)"):
        gather(y[:1])
    with pytest.raises(RuntimeError, match=r"a read outside .*: 16 bytes at x \+ 128 bytes \(of 128\)"):
        gather(y, x[:4])
    with pytest.raises(RuntimeError, match=r"a read outside .*: 8 bytes at index \+ 8 bytes \(of 8\)"):
        gather(y, index=index[:1])
    with pytest.raises(AssertionError, match="gather_rows: not all of y was written"):
        gather(y, kept=1)
    with pytest.raises(AssertionError, match="gather_rows: x is not what data_ptr"):
        gather(y, skipped=32)
    wide = torch.randn(5, 16)
    with pytest.raises(RuntimeError, match="a read outside"):
        gather(y, wide[:, :8], torch.tensor([0, 3]))  # 96 bytes on: between the first halves of two rows
    inverse = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(
        RuntimeError, match=r"scatter_rows: a write outside .*: 20 bytes at inverse \+ 0 bytes \(of 16\)"
    ):
        out = torch.empty(5, 8)
        pointers = {"y": out, "inverse": inverse, "x": y, "index": index}
        pointers = {name: tensor.data_ptr() for name, tensor in pointers.items()}
        emulated.scatter_rows(**pointers, fill=0, kept=2, rows=5, **here)


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
