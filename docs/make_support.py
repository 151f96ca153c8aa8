"""Compiles every attention kernel for every GPU and writes docs/support.md: `python docs/make_support.py`.

It takes some minutes, and no GPU. The cases are those of tests/aot, some of which every run of the tests compiles, with
limits.
"""

import datetime
import importlib.util
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parent.parent
GPUS = {80: "A100", 86: "A10, RTX 30", 89: "L4, L40S, RTX 40", 90: "H100, H200", 100: "B200", 120: "RTX 50"}
HEAD_DIMS = (64, 72, 80, 128, 192, 256)

HEAD = """# What runs where

The Triton kernels of attention, compiled ahead of time for every GPU in bfloat16: the shared memory that a program
takes at most, and values that are set aside in local memory, if any. A head dimension between two columns takes the
tiles of the next one. All of it has run in Triton's interpreter, and not yet on these GPUs. The CUDA operators are
compiled for sm_80, sm_90a and sm_100, and as PTX for what comes later; `python -m mimo_kernels.collect_env` says what
serves on a machine. Float32: tests/aot.
"""


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "aot" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(rows: list[dict]) -> str:
    """Of the worst of the tiles that may be chosen."""
    spilled, inside = max(row["stores"] for row in rows), max(row["in loops"] for row in rows)
    words = f"{max(row['shared KiB'] for row in rows):.0f} KiB"
    return words + (f", {spilled} spilled" if spilled else "") + (f", {inside} in loops" if inside else "")


def frame_cells(arch: int) -> dict[str, list[str]]:
    aot = load("attention_kernels")
    found = {}
    for name, words in (("forward", "forward"), ("dq", "dQ"), ("dkv", "dK/dV")):
        found[f"`frame_attention` {words}"] = [
            cell([aot.compiled(name, arch, "bf16", dim, 1, config) for config in aot.choices(name, arch, "bf16", dim)])
            for dim in HEAD_DIMS
        ]
    return found


def paged_cells(arch: int) -> dict[str, list[str]]:
    aot = load("paged_kernels")
    found = {}
    variants = {
        "`paged_frame_attention` forward": {},
        "... with fewer heads of keys, a bias, tables of others": {"options": True},
        "... dQ": {"backward": True},
        "... dQ with all of that": {"backward": True, "options": True},
        "... forward, float8 pages": {"float8": True},
    }
    for words, options in variants.items():
        cells = []
        for dim in HEAD_DIMS:
            kernel = aot.compile_case(aot.Case(arch, "bf16", dim, 64, 256, 1, **options))[0]
            rows = {"stores": kernel["STL"], "in loops": 0, "shared KiB": kernel["shared"] / 1024}
            cells.append(cell([rows]))
        found[words] = cells
    return found


def main() -> None:
    limits = load("attention_kernels").SHARED_LIMIT
    lines = [
        *HEAD.splitlines(),
        "",
        f"Made by `docs/make_support.py` with Triton {triton.__version__}, {datetime.date.today()}.",
        "",
    ]
    for arch, names in GPUS.items():
        lines += [f"## sm_{arch}: {names}", "", f"{limits[arch]} KiB of shared memory for a program.", ""]
        lines += ["| head dimension | " + " | ".join(map(str, HEAD_DIMS)) + " |", "|---" * (1 + len(HEAD_DIMS)) + "|"]
        for words, cells in (frame_cells(arch) | paged_cells(arch)).items():
            lines.append(f"| {words} | " + " | ".join(cells) + " |")
        lines.append("")
        print(f"sm_{arch} done", flush=True)
    (ROOT / "docs" / "support.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
