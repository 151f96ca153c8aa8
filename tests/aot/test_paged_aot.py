"""The kernels of sampling compiled ahead of time for real GPUs, with what they cost there.

Triton decides at import whether it interprets, so the compiling happens in a process of its own: this file, run.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SHARED_LIMIT = {80: 163, 90: 227, 100: 227}  # KiB per block

# (architecture, dtype, head_dim, page_size, tokens per frame, splits): every row of CONFIGS on every architecture.
CASES = [(arch, "bf16", dim, 64, 256, 1) for arch in SHARED_LIMIT for dim in (72, 112, 128, 208, 256)]
CASES += [(arch, "bf16", 72, 64, 64, 4) for arch in SHARED_LIMIT]
CASES += [(arch, "fp32", 128, 64, 64, 2) for arch in SHARED_LIMIT]
CASES += [
    (80, "bf16", 128, 64, 64, 2),
    (80, "bf16", 176, 64, 256, 1),
    (90, "fp32", 256, 64, 256, 1),
    (90, "bf16", 72, 16, 256, 2),  # a block spans pages
    (80, "fp16", 96, 196, 196, 1),
]


def compile_case(arch: int, dtype: str, head_dim: int, page_size: int, tokens: int, splits: int) -> list[dict]:
    """Registers, stack, shared memory and instructions of both kernels."""
    from mimo_kernels.attention.triton import paged as triton_paged

    config = triton_paged.config_for(head_dim, 4 if dtype == "fp32" else 2, tokens, arch)
    forward = {"HEAD_DIM": head_dim, "PARTS": triton_paged.split_head_dim(head_dim), "PAGE": page_size}
    forward |= {"BM": config.block_m, "BN": config.block_n, "SPLITS": splits, "PRECISION": triton_paged.PRECISION}
    width = 1 << (head_dim - 1).bit_length()
    combine = {"HEAD_DIM": head_dim, "WIDTH": width, "BM": triton_paged.COMBINE_ROWS, "SPLITS": splits}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    types = dict.fromkeys(("p_page_table", "p_page_rows", "p_num_pages"), "*i32") | {"p_lse": "*fp32"}
    types |= {"p_partial": "*fp32", "scale_log2": "fp32"}
    partial = types | {"p_out": "*fp32"} if splits > 1 else types
    made = [measure(triton_paged.paged_fwd_kernel, forward, partial, arch, dtype, options)]
    if splits > 1:
        made.append(measure(triton_paged.paged_combine_kernel, combine, types, arch, dtype, {"num_warps": 4}))
    return made


def compile_guided_step(arch: int) -> list[dict]:
    from mimo_kernels.ops.guidance import BLOCK, guided_step_kernel

    types = dict.fromkeys(("p_x", "p_weights", "p_coefficients"), "*fp32") | {"p_index": "*i64"}
    constants = {"G": 3, "BM": BLOCK}
    return [measure(guided_step_kernel, constants, types, arch, "bf16", {"num_warps": 4})]


def measure(kernel, constants: dict, types: dict, arch: int, dtype: str, options: dict) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, list[dict]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {tuple(case): made for case, made in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "sm{}-{}-d{}-page{}-n{}-splits{}".format(*case))
def test_compiles_without_spills_and_fits(compiled, case):
    arch, dtype = case[:2]
    for kernel in compiled[case]:
        assert kernel["stack"] == 0 and kernel["STL"] == 0
        assert kernel["shared"] <= SHARED_LIMIT[arch] * 1024
        assert kernel["registers"] <= 255
        assert kernel["ATOM"] == kernel["RED"] == 0  # deterministic
    if arch == 90 and dtype == "bf16":
        assert compiled[case][0]["HGMMA"] > 0 and compiled[case][0]["HMMA"] == 0


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_guided_step_compiles(compiled, arch):
    (kernel,) = compiled["guided_step", arch]
    assert kernel["stack"] == 0 and kernel["STL"] == 0 and kernel["registers"] <= 64


def test_pages_stream_in_while_the_tensor_cores_work(compiled):
    assert all(compiled[case][0]["LDGSTS"] > 0 for case in CASES if case[1] == "bf16")


if __name__ == "__main__":
    made = [(case, compile_case(*case)) for case in CASES]
    print(json.dumps(made + [(("guided_step", arch), compile_guided_step(arch)) for arch in SHARED_LIMIT]))
