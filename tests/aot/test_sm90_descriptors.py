"""How the Hopper kernels tell the tensor cores of a tile (csrc/sm90.cuh), against what Triton tells them of the same
one: its forward kernel is compiled, and the tile descriptors are followed back through the PTX to their constants.

Runs in a process of its own, because Triton decides when a kernel is decorated whether it is interpreted.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = 64  # keys per step
KEYS, VALUES = 0, 1  # b as its rows lie in memory (q k'), and transposed (p v)


def told_by_triton(head_dim: int) -> list[list[int]]:
    """(columns, KEYS or VALUES, what is added to address / 16) of every product, each once."""
    from test_triton_aot import compile_kernel

    from mimo_kernels.attention.triton.schedule import Config

    ptx = compile_kernel("forward", 90, "bf16", head_dim, 1, Config(128, BLOCK, 8, 2)).asm["ptx"]
    made = {}  # register -> operation and its operands
    found = set()
    for line in ptx.splitlines():
        if product := re.search(r"wgmma\.mma_async\S*m64n(\d+)k16.* (%rd\d+), [^,]+, 1, 1(?:, 0)?, ([01]);", line):
            found.add((int(product[1]), int(product[3]), _constant(product[2], made)))
        elif step := re.match(r"\s*([\w.]+)\s+(%\w+), (.+);", line):
            made[step[2]] = step[1], step[3].split(", ")
    return sorted(map(list, found))


def _constant(register: str, made: dict) -> int:
    """The sum of the numbers that were added to an address on its way into the register."""
    total = 0
    while register in made:
        operation, operands = made[register]
        if operation.split(".")[0] not in ("or", "add", "cvt"):
            break
        total += sum(int(operand) for operand in operands if not operand.startswith("%"))
        registers = [operand for operand in operands if operand.startswith("%")]
        if len(registers) != 1:
            break
        (register,) = registers
    return total % 2**64


PROGRAM = """
#include <cstdio>
#include "sm90.cuh"
using namespace mimo::sm90;
int main() {
    const unsigned long long wide = tile_descriptor<128>(0), narrow = tile_descriptor<32>(0);
    const unsigned long long spanning = tile_descriptor<128>(0, 64 * 128);
    std::printf("%llu %llu %llu", wide, narrow, spanning);
}
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> tuple[int, int, int]:
    """Descriptors at address 0: 64 channels, 16 channels, transposed with a further tile of 64 channels behind."""
    folder = tmp_path_factory.mktemp("descriptors")
    (folder / "tell.cpp").write_text(PROGRAM)
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'kernels' / 'emulate'}"]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    subprocess.run(
        [compiler, "-std=c++17", "-w", "-DMIMO_EMULATE", "-DMIMO_WITH_CUDA", *folders, "tell.cpp", "-o", "tell"],
        cwd=folder,
        check=True,
    )
    return tuple(map(int, subprocess.run([folder / "tell"], capture_output=True, check=True).stdout.split()))


def told(head_dim: int) -> list[tuple[int, int, int]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (str(ROOT), *sys.path) if path)
    run = subprocess.run([sys.executable, __file__, str(head_dim)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [tuple(product) for product in json.loads(run.stdout)]


NEXT_TILE = 0x3FFF << 16  # of a tile whose rows lie in memory as they are, and of a single one, nobody reads these bits


def steps(descriptor: int, *byte_offsets: int, keep: bool = False) -> set[int]:
    descriptor = descriptor if keep else descriptor & ~NEXT_TILE
    return {descriptor + (offset >> 4) for offset in byte_offsets}


def test_tiles_of_64_and_of_16_channels(ours):
    """72 channels: 64 of them in rows of 128 bytes, 16 in rows of 32."""
    wide, narrow, _ = ours
    products = told(72)
    keys = {c & ~NEXT_TILE for _, side, c in products if side == KEYS}
    assert keys == steps(wide, *(32 * k for k in range(4))) | steps(narrow, 0)
    for columns, descriptor, bytes_per_row in ((64, wide, 128), (16, narrow, 32)):
        values = {c & ~NEXT_TILE for n, side, c in products if side == VALUES and n == columns}
        assert values == steps(descriptor, *(16 * bytes_per_row * k for k in range(BLOCK // 16)))


def test_two_tiles_of_64_channels(ours):
    """128 channels: a product with the values spans both tiles, and is told how far apart they are."""
    wide, _, spanning = ours
    products = told(128)
    keys = {c & ~NEXT_TILE for _, side, c in products if side == KEYS}
    assert keys == steps(wide, *(k // 4 * BLOCK * 128 + k % 4 * 32 for k in range(8)))
    values = {c for n, side, c in products if side == VALUES and n == 128}
    assert values == steps(spanning, *(16 * 128 * k for k in range(BLOCK // 16)), keep=True)


if __name__ == "__main__":
    print(json.dumps(told_by_triton(int(sys.argv[1]))))
