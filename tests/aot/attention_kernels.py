"""Every attention kernel in every tile size, compiled here for real GPUs: registers, shared memory and which matrix
instructions came out.

Triton decides when a kernel is decorated whether it is interpreted, so that the compiling happens in processes of their
own. As a script it prints the table:

    python tests/aot/attention_kernels.py [ARCH ...]
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may use
# Architecture -> dtype -> head dimensions. In bf16 they take every row of a table between them where the table is that
# architecture's own; what shares a table, and the other dtypes, are compiled at fewer.
HEAD_DIMS = (64, 72, 96, 128, 192, 256)
CASES = {
    80: {"bf16": (*HEAD_DIMS, 112), "fp32": (72,)},
    86: {"bf16": (128, 256), "fp32": (256,)},
    89: {"bf16": (72,)},
    90: {"bf16": (*HEAD_DIMS, 112), "fp32": (72,)},
    100: {"bf16": HEAD_DIMS},
    120: {"bf16": (72, 256), "fp32": (64,)},
}
PASSES = ("forward", "dq", "dkv", "rows")
# (pass, head dimension) -> query heads per key head, where not only 1: dK/dV loops over them, the others only divide.
SHARED = {("dkv", 128): (1, 4)}
COLUMNS = (
    "pass",
    "arch",
    "dtype",
    "head dim",
    "sharing",
    "tile",
    "block",
    "warps",
    "stages",
    "registers",
    "shared KiB",
    "HGMMA",
    "HMMA",
    "loads",
    "stores",
    "drains",
    "in loops",
)


def product_loops(code: str) -> list[list[str]]:
    """The instructions of every innermost loop with warpgroup products."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", code)]
    jumps = [(at, re.search(r"\bBRA\b.* 0x([0-9a-f]+)$", text)) for at, text in lines]
    loops = {(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at}
    products = [at for at, text in lines if "HGMMA" in text]
    loops = {(first, last) for first, last in loops if any(first <= at <= last for at in products)}
    inner = [
        one for one in loops if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in loops)
    ]
    return [[text for at, text in lines if first <= at <= last] for first, last in sorted(inner)]


def compile_kernel(name: str, arch: int, dtype: str, head_dim: int, sharing: int, config):
    """One kernel as Triton compiles it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mimo_kernels.attention.triton import backward as triton_bwd
    from mimo_kernels.attention.triton import forward as triton_fwd
    from mimo_kernels.attention.triton.tiles import split_head_dim

    kernel = {
        "forward": triton_fwd.frame_attention_fwd_kernel,
        "dq": triton_bwd.frame_attention_dq_kernel,
        "dkv": triton_bwd.frame_attention_dkv_kernel,
        "rows": triton_bwd.frame_attention_rows_kernel,
    }[name]
    if name == "rows":
        constants = {"D": head_dim, "BM": config.tile, "HAS_DLSE": True}
    else:
        tile, block = ("BN", "BM") if name == "dkv" else ("BM", "BN")
        constants = {
            "D": head_dim,
            "PARTS": split_head_dim(head_dim),
            "HEADS_PER_KV": sharing,
            tile: config.tile,
            block: config.block,
            "PRECISION": triton_fwd.precision(dtype == "fp32"),
        }
        if name == "forward":
            constants["AHEAD"] = config.ahead
        if name == "dkv":
            constants["MASKED_STAGES"] = config.masked_stages
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
        elif parameter.name.startswith("p_"):
            kinds = {"p_plan": "*i32", "p_lse": "*fp32", "p_dlse": "*fp32", "p_rows": "*i64"}
            signature[parameter.name] = kinds.get(parameter.name, f"*{dtype}")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            kinds = {"scale": "fp32", "scale_log2": "fp32"}
            signature[parameter.name] = kinds.get(
                parameter.name, "i64" if parameter.name.startswith("stride_b") else "i32"
            )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compiled(name: str, arch: int, dtype: str, head_dim: int, sharing: int, config) -> dict:
    """A row of the table: what the compiler made of one kernel."""
    result = compile_kernel(name, arch, dtype, head_dim, sharing, config)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count = lambda opcode: len(re.findall(rf"\b{opcode}\b", code))  # noqa: E731
    values = (name, arch, dtype, head_dim, sharing, config.tile, config.block, config.num_warps, config.num_stages)
    registers = int(re.search(r"REG:(\d+)", code)[1])
    shared = round(result.metadata.shared / 1024, 1)
    counts = (count("HGMMA"), count("HMMA"), count("LDL"), count("STL"))
    loops = product_loops(code)
    drains = "+".join(str(sum("WARPGROUP.DEPBAR.LE gsb0, 0x0" in text for text in loop)) for loop in loops) or "-"
    local = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for loop in loops for text in loop)
    return dict(zip(COLUMNS, (*values, registers, shared, *counts, drains, local)))


def choices(name: str, arch: int, dtype: str, head_dim: int) -> tuple:
    import torch

    from mimo_kernels.attention.triton.backward import DELTA_ROWS
    from mimo_kernels.attention.triton.schedule import Config, configs

    if name == "rows":
        if head_dim not in (72, 256):
            return ()
        return (Config(DELTA_ROWS, 0, 4, 3),)  # 4 warps as in its launch, 3 stages as Triton's default
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return configs(name, arch, kinds[dtype], head_dim)


def table(archs: list[int]) -> None:
    print(" ".join(f"{column:>9}" for column in COLUMNS), flush=True)
    for arch in archs:
        for dtype, head_dims in CASES[arch].items():
            for name in PASSES:
                for head_dim in head_dims:
                    for config in choices(name, arch, dtype, head_dim):
                        for sharing in SHARED.get((name, head_dim), (1,)):
                            row = compiled(name, arch, dtype, head_dim, sharing, config)
                            print(" ".join(f"{value:>9}" for value in row.values()), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    table([int(arch) for arch in sys.argv[1:]] or list(CASES))
