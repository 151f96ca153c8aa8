"""What Triton tells the tensor cores of a tile: its forward kernel for sm_90 is compiled, and the tile descriptors are
followed back through the PTX to their constants.

Triton decides when a kernel is decorated whether it is interpreted, so that this runs in a process of its own:

    python tests/aot/triton_descriptors.py HEAD_DIM
"""

import json
import re
import sys

BLOCK = 64  # keys per step
KEYS, VALUES = 0, 1  # b as its rows lie in memory (q k'), and transposed (p v)


def told_by_triton(head_dim: int) -> list[list[int]]:
    """(columns, KEYS or VALUES, what is added to address / 16) of every product, each once."""
    from attention_kernels import compile_kernel

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


if __name__ == "__main__":
    print(json.dumps(told_by_triton(int(sys.argv[1]))))
