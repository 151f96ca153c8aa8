"""How the Hopper kernels tell the tensor cores of a tile (csrc/sm90.cuh), against what Triton tells them of the same
one: see triton_descriptors.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .. import processes
from .triton_descriptors import BLOCK, KEYS, VALUES

ROOT = Path(__file__).parents[2]
COMPILER = Path(__file__).with_name("triton_descriptors.py")


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
    command, env = [sys.executable, COMPILER, head_dim], processes.environment("TRITON_INTERPRET")
    run = processes.run(command, env=env, capture_output=True, text=True)
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
