"""The emulator of Hopper's asynchronous instructions finds the mistakes it is meant to (emulate/faulty_sm90.cu)."""

import re

import pytest
import torch

EARLY, LATE, BY_CHANCE = range(3)
MODES = [(EARLY, 0), (LATE, 0), (BY_CHANCE, 1), (BY_CHANCE, 2)]
TILES = 4


def run(emulated, name: str, mode: tuple[int, int] = (EARLY, 0)) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What goes wrong, the result, and what it should be."""
    tiles = torch.randn(1 + TILES, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    out = torch.zeros(64, 64)
    emulated.set_asynchrony(*mode)
    emulated.set_order(mode[0])
    emulated.lend("out", out, writable=True)
    emulated.lend("in", tiles, writable=False)
    try:
        failure = emulated.run_faulty_sm90(name, out.data_ptr(), tiles.data_ptr())
    finally:
        emulated.take_back()
    own = tiles[0].double()
    own[:4] = 0
    return failure, out, own @ tiles[1:].double().sum(0).T


@pytest.mark.parametrize("mode", MODES)
def test_what_is_right_passes(emulated, mode):
    failure, out, expected = run(emulated, "right", mode)
    assert failure == ""
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            "no async fence",
            r"no fence_async: a copy or product reads the shared memory \+ \d+ bytes, which thread \d+ stored",
        ),
        ("no named barrier", r"a data race: a (read|write) of the shared memory"),
        # Which of the two depends on who comes first.
        (
            "wrong phase",
            r"data race: a read .* a copy counted by barrier 'full' wrote|forever for .*barrier 'full', parity 1",
        ),
        (
            "overrun ring",
            r"a data race: a write .* nothing orders|more arrivals at barrier 'full' than it counts",
        ),
        ("one arrival too few", r"threads wait forever for barrier 'empty', parity 0, barrier 'full', parity 1$"),
        (
            "arrives too early",
            r"a data race: a write of the shared memory \+ 8192 bytes, which a product of warpgroup 0 reads",
        ),
        (
            "no wait for the copy",
            r"a read of the shared memory \+ \d+ bytes, which (a copy counted by barrier 'full' wrote|nobody)",
        ),
        ("sums read before the wait", r"sums of a product under way are read before its wait; thread"),
        ("fragments overwritten", r"registers of a product under way are written before its wait"),
        ("no product fence", r"a product without product_fence since the last group"),
        ("too few bytes", r"threads wait forever for barrier 'empty', parity 0, barrier 'full', parity 0$"),
        ("barriers without fence", r"barrier 'own full' counts a copy and was made without fence_barrier_init"),
        ("misplaced tile", r"a copied tile at the shared memory \+ 512 bytes; expected a multiple of 1024"),
        ("product left", r"a product of warpgroup 0 is under way at the end of the block"),
        ("barrier overwritten", r"a write to a barrier, the shared memory \+ 24584 bytes"),
        ("more registers than there are", r"threads wait forever for registers \(248 per thread\)$"),
        ("no multiple of 8 registers", r"setmaxnreg of 36; expected a multiple of 8 from 24 to 256"),
        ("named barrier of too few", r"threads wait forever for named barrier 3$"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_mistake_is_named(emulated, mistake, message, mode):
    assert re.search(message, run(emulated, mistake, mode)[0])
    assert run(emulated, "right", mode)[0] == ""


def test_a_copy_that_nobody_waits_for_is_found_when_it_comes_late(emulated):
    assert "a copy counted by barrier 'full' is under way at the end" in run(emulated, "copy left", (LATE, 0))[0]


def test_a_wrong_swizzle_gives_wrong_sums(emulated):
    failure, out, expected = run(emulated, "wrong swizzle")
    assert failure == "" and (out.double() - expected).abs().max() > 1
