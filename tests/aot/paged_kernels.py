"""The kernels of sampling compiled ahead of time for real GPUs, with what they cost there.

Triton decides at import whether it interprets, so the compiling happens in processes of their own: this file, run for
an architecture.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB per block
MAIN = (80, 90, 100)


class Case(NamedTuple):
    """backward: dq instead of the forward. options: heads of q share one of the cache, frames have a bias, and the
    tables are another's: page numbers and lengths. float8: of the pages."""

    arch: int
    dtype: str
    head_dim: int
    page_size: int
    tokens: int
    splits: int
    backward: bool = False
    options: bool = False
    float8: bool = False


# Every row of the tables of tile sizes on every architecture that it is for.
CASES = [Case(arch, "bf16", dim, 64, 256, 1) for arch in MAIN for dim in (72, 112, 128, 208, 256)]
CASES += [Case(arch, "bf16", 72, 64, 64, 4) for arch in MAIN]
CASES += [Case(arch, "fp32", 128, 64, 64, 2) for arch in MAIN]
CASES += [
    Case(80, "bf16", 128, 64, 64, 2),
    Case(80, "bf16", 176, 64, 256, 1),
    Case(90, "fp32", 256, 64, 256, 1),
    Case(90, "bf16", 72, 16, 256, 2),  # a block spans pages
    Case(80, "fp16", 96, 196, 196, 1),
]
CASES += [Case(arch, "bf16", dim, 64, 256, 1) for arch in (86, 120) for dim in (72, 128, 256)]
CASES += [Case(86, "bf16", 176, 64, 256, 1), Case(86, "bf16", 208, 64, 256, 1)]
CASES += [Case(arch, "bf16", 128, 64, 256, 1, options=True) for arch in MAIN]
CASES += [Case(90, "bf16", 72, 1560, 1560, 2, options=True)]
CASES += [Case(arch, "bf16", dim, 64, 256, 1, backward=True) for arch in MAIN for dim in (72, 128, 256)]
CASES += [Case(86, "bf16", 128, 64, 256, 1, backward=True)]
CASES += [Case(arch, "bf16", 128, 64, 256, 2, backward=True, options=True) for arch in (80, 90, 120)]
CASES += [Case(80, "bf16", 64, 64, tokens, 1, backward=True) for tokens in (64, 256)]
CASES += [Case(90, "bf16", 72, 16, 64, 4, backward=True), Case(80, "bf16", 128, 64, 64, 4, backward=True)]
CASES += [Case(90, "fp32", dim, 64, 256, 1, backward=True) for dim in (64, 128)]
CASES += [Case(arch, "bf16", 128, 64, 256, 1, float8=True) for arch in (80, 90, 100, 120)]
CASES += [Case(80, "bf16", 128, 64, 64, 1, float8=True), Case(90, "bf16", 72, 1560, 1560, 2, float8=True)]
CASES += [Case(arch, "bf16", 128, 64, 256, 1, backward=True, float8=True) for arch in (80, 90)]
CASES.sort(key=lambda case: case.arch)  # tests of an architecture run one after the other


def compile_case(case: Case) -> list[dict]:
    """Registers, stack, shared memory and instructions of both kernels."""
    from mimo_kernels.attention.triton import paged, paged_backward

    group = 4 if case.options else 1
    module = paged_backward if case.backward else paged
    itemsize = 4 if case.dtype == "fp32" else 2
    float8 = () if case.backward else (case.float8,)
    config = module.config_for(case.head_dim, itemsize, case.tokens * group, case.arch, *float8)
    options = paged.options(config, case.head_dim) | {"GROUP": group, "PAGE": case.page_size, "SPLITS": case.splits}
    options |= {"PACKED": not case.options, "HAS_BIAS": case.options, "FP8": case.float8}
    width = 1 << (case.head_dim - 1).bit_length()
    second = {"HEAD_DIM": case.head_dim, "WIDTH": width, "BM": paged.COMBINE_ROWS, "SPLITS": case.splits}
    types = dict.fromkeys(("p_tables", "p_lengths"), "*i32")
    types |= dict.fromkeys(("p_k_scales", "p_v_scales"), "*fp32")
    types |= dict.fromkeys(("p_k_pages", "p_v_pages"), "*u8") if case.float8 else {}
    types |= dict.fromkeys(("p_bias", "p_lse", "p_dlse", "p_partial", "p_partial_lse", "p_own_lse"), "*fp32")
    types |= dict.fromkeys(("scale", "scale_log2"), "fp32")
    if case.backward:
        options |= {"HAS_DLSE": case.options, "PARTS": paged_backward.parts_for(case.head_dim)}
        kernels = paged_backward.paged_dq_kernel, paged_backward.paged_dq_sum_kernel
        result = {"p_dq": "*fp32"}
    else:
        options |= {"PARTIAL": case.splits > 1}
        second |= {"HAS_OWN": case.options}
        kernels, result = (paged.paged_fwd_kernel, paged.paged_combine_kernel), {"p_out": "*fp32"}
    made = [measure(kernels[0], options, types | (result if case.splits > 1 else {}), case.arch, case.dtype)]
    if case.splits > 1:
        made.append(measure(kernels[1], second | {"num_warps": 4}, types, case.arch, case.dtype))
    return made


def compile_guided_step(arch: int) -> list[dict]:
    from mimo_kernels.ops.guidance import BLOCK, guided_step_kernel

    types = dict.fromkeys(("p_x", "p_weights", "p_coefficients", "p_noise"), "*fp32") | {"p_index": "*i64"}
    return [
        measure(guided_step_kernel, {"G": 3, "NOISE": noise, "BM": BLOCK, "num_warps": 4}, types, arch, "bf16")
        for noise in (False, True)
    ]


def measure(kernel, constants: dict, types: dict, arch: int, dtype: str) -> dict:
    """constants: those of the kernel, and how it is compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = types.get(name, f"*{dtype}" if name.startswith("p_") else "i32")
        if signature[name].startswith("*") and signature[name] != "*i32":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-resource-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "HMMA", "STL", "LDGSTS", "ATOM", "RED")}
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared, **counts}


if __name__ == "__main__":
    arch = int(sys.argv[1])
    made = [(case, compile_case(case)) for case in CASES if case.arch == arch]
    print(json.dumps(made + ([(("guided_step", arch), compile_guided_step(arch))] if arch in MAIN else [])))
