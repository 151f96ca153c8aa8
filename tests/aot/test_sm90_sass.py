"""CUDA kernels as machine code for sm_90a. Those of attention: products issued as they are written, registers and
shared memory of the design (docs/hopper.md). The others: rows written 16 bytes at a time."""

import re
from pathlib import Path

import pytest

from .test_cuda_resources import compiled_images, dump

FORWARD, DQ, DKV = range(3)
PRODUCER_REGISTERS, CONSUMER_REGISTERS, REGISTERS, THREADS = 24, 240, 65536, 384
NAME = r"attention_sm90_kernel<\((?:sm90::)?Pass\)(\d), (half_t|bfloat_t), (\d+), (\d+)>"
# Pass, channels, rows of a block.
KERNELS = [(FORWARD, channels, block) for channels in (64, 80, 128) for block in (64, 128)]
KERNELS += [(passed, channels, 64) for passed in (DQ, DKV) for channels in (64, 80, 128)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return compiled_images(tmp_path_factory.mktemp("images"), ["sm_90a"])


def of_sm90(found) -> dict[tuple[int, str, int, int], str]:
    named = [(re.search(NAME, name), facts) for arch, name, facts in found if arch == "sm_90a"]
    return {(int(m[1]), m[2], int(m[3]), int(m[4])): facts for m, facts in named if m}


@pytest.fixture(scope="module")
def bodies(images) -> list[tuple[str, str, str]]:
    """(architecture, kernel, its code): a dump takes seconds."""
    return dump("-sass", images, r"Function : (\w+)\n([\s\S]*?)(?=\n\s*Function : |\Z)")


@pytest.fixture(scope="module")
def code(bodies) -> dict[tuple[int, str, int, int], list[str]]:
    """Kernel of attention -> its instructions."""
    return {name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*?)\s*;", body) for name, body in of_sm90(bodies).items()}


def test_rows_are_written_16_bytes_at_a_time(bodies):
    """The compiler splits some stores into four. What is left of 4 bytes are statistics and sums, at most two stores
    per kernel. Of one architecture, as the splitting is nvcc's and comes before those."""
    seen = set()
    for arch, name, body in bodies:
        if match := re.search(r"(modulate|qk_norm_rope|qk_rope|bias_gelu)_\w*kernel", name):
            seen.add((arch, match[0]))
            assert len(re.findall(r"STG\.E ", body)) <= 2 and "STG.E.128 " in body, (arch, name.split("(")[0])
    assert len(seen) == 7 and {arch for arch, _ in seen} == {"sm_90a"}


def test_every_kernel_is_there(code):
    assert set(code) == {
        (p, dtype, channels, block) for p, channels, block in KERNELS for dtype in ("half_t", "bfloat_t")
    }


def marks(instructions: list[str]) -> str:
    """A: products may begin; h and H: one with at most 16 channels, one with more; 0 and 1: until so many groups are
    left."""
    text = ""
    for line in instructions:
        if "WARPGROUP.ARRIVE" in line:
            text += "A"
        elif product := re.search(r"HGMMA\.64x(\d+)x16", line):
            text += "h" if product[1] == "16" else "H"
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line):
            text += wait[1]
        elif "WARPGROUP" in line:
            text += "?"
    return text


@pytest.mark.parametrize("dtype", ["half_t", "bfloat_t"])
@pytest.mark.parametrize(("passed", "channels", "block"), KERNELS)
def test_products_are_issued_as_they_are_written(code, passed, channels, block, dtype):
    """Scores, and while those of the next block are multiplied, the sums: one wait for either, none between the parts
    of a product, none of the compiler's own (it serialises what it cannot follow)."""
    scores = "H" * (channels // 16) * (1 if passed == FORWARD else 2)
    sums = ("Hh" if channels % 64 else "H") * (block // 16)
    if passed == DKV:
        sums *= 2
    first, last = f"A{scores}0", f"A{sums}0"
    ahead = "" if (passed, channels) == (DKV, 128) else f"A{scores}A{sums}10"
    assert marks(code[passed, dtype, channels, block]) == first + ahead + last


def test_nothing_is_kept_in_local_memory(code):
    for name, instructions in code.items():
        assert not [line for line in instructions if re.search(r"\b(LDL|STL)\b", line)], name


def test_registers_change_hands(code):
    """Either role asks once; what all threads start with is what the roles share in the end, and the most there is."""
    start = REGISTERS // THREADS // 8 * 8
    assert start * THREADS >= (PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS) * 128
    for name, instructions in code.items():
        asked = [int(line.split()[-1], 16) for line in instructions if "USETMAXREG" in line]
        assert sorted(asked) == [PRODUCER_REGISTERS, CONSUMER_REGISTERS], name


def test_registers_and_stack(images):
    found = of_sm90(dump("--dump-resource-usage", images, r"Function (\w+):\s*(.+)"))
    assert len(found) == 2 * len(KERNELS)
    for name, facts in found.items():
        amounts = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", facts)}
        assert amounts["REG"] <= REGISTERS // THREADS and amounts["STACK"] == amounts["LOCAL"] == 0, name


def test_copies_are_tensor_copies(code):
    """No load of a tensor but by TMA: what consumers load from global memory are intervals, runs and statistics."""
    for name, instructions in code.items():
        assert any("UTMALDG.4D" in line for line in instructions), name
        assert not [line for line in instructions if "LDGSTS" in line], name
