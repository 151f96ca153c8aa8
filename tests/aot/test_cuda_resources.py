"""Every file of CUDA kernels, compiled here for every GPU generation: registers that leave room for enough loads in
flight and no spills.

Reads what mimo_kernels._C holds where it holds all three architectures, and otherwise compiles the sources with the
nvcc that setup.py finds.
"""

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import setuptools
import triton

from mimo_kernels.core import backends

ROOT = Path(__file__).parents[2]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHS = ["sm_80", "sm_90a", "sm_100"]

# Kernel -> registers per thread at most. A multiprocessor has 65536: 128 leave 16 warps, 96 leave 21, 64 leave 32. The
# forward of modulate keeps a row of up to 8 x 256 columns per warp; its wide backward sums 3 x 32 columns per thread.
LIMITS = {
    r"copy_rows_kernel": 64,
    r"invert_kernel": 64,
    r"hole_sum_kernel": 64,
    r"column_sum_kernel": 64,
    r"modulate_fwd_kernel<(half_t|bfloat_t), 5, false, false>": 96,
    r"modulate_fwd_kernel<(half_t|bfloat_t), [1-6],": 128,
    r"modulate_fwd_kernel<(half_t|bfloat_t), 8,": 168,
    r"modulate_fwd_kernel<float, [1-6],": 168,
    r"modulate_fwd_kernel<float, 8,": 255,
    r"modulate_bwd_kernel<(half_t|bfloat_t), 1,": 128,
    r"modulate_bwd_kernel<float, 1,": 176,
    r"modulate_bwd_kernel<\w+, 4,": 255,
    r"bias_gelu_kernel<(half_t|bfloat_t),": 72,
    r"bias_gelu_kernel<float,": 128,
    r"squared_error_(bwd_)?kernel": 64,
    r"qk_norm_rope_fwd_kernel": 128,
    r"qk_norm_rope_bwd_kernel": 128,
    r"qk_rope_fwd_kernel<(half_t|bfloat_t),": 128,
    r"qk_rope_fwd_kernel<float,": 168,
    r"qk_rope_bwd_kernel": 168,
}


def compiled_images(folder: Path, archs: list[str]) -> list[Path]:
    """Machine code for these architectures, STEM.ARCH.cubin of every file of kernels."""
    if set(archs) <= set(backends.cuda_archs()):
        images = []
        for source, target, contents in backends.extension().device_code():
            if target in archs:
                images.append(folder / f"{Path(source).stem}.{target}.cubin")
                images[-1].write_bytes(contents)
        return images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        build = runpy.run_path(str(ROOT / "setup.py"))
    notes: list[str] = []
    toolkit = build["find_toolkit"](build["host_compiler"](), folder, notes)
    if toolkit is None:
        pytest.skip(f"no nvcc: {'; '.join(notes) or 'none found'}")
    images = [folder / f"{source.stem}.{arch}.cubin" for source in (ROOT / "csrc").glob("*.cu") for arch in archs]
    for image in images:
        stem, arch, _ = image.name.split(".")
        command = [toolkit.nvcc, *build["NVCC_FLAGS"], f"-arch={arch}", "-cubin", ROOT / "csrc" / f"{stem}.cu"]
        subprocess.run([str(part) for part in [*command, "-o", image]], check=True)
    return images


def dump(option: str, images: list[Path], function: str) -> list[tuple[str, str, str]]:
    """(architecture, kernel with its template arguments, what is said of it), from cuobjdump; `function` finds a kernel
    and what is said."""
    found = []
    for path in images:
        report = subprocess.run([str(CUOBJDUMP), option, str(path)], capture_output=True, text=True, check=True)
        found += [(path.name.split(".")[1], *match) for match in re.findall(function, report.stdout)]
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for _, name, _ in found), capture_output=True, text=True, check=True
    )
    readable = [re.sub(r"mimo::((?!sm90)\w+::)?", "", name) for name in names.stdout.splitlines()]
    return [(arch, name, facts) for (arch, _, facts), name in zip(found, readable)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return compiled_images(tmp_path_factory.mktemp("images"), ARCHS)


@pytest.fixture(scope="module")
def resources(images) -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, kernel with its template arguments, resource -> amount)"""
    return [
        (arch, name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", facts)})
        for arch, name, facts in dump("--dump-resource-usage", images, r"Function (\w+):\s*(.+)")
    ]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_of_the_sources_is_compiled(resources, arch):
    sources = "".join(path.read_text() for path in [*(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc").glob("*.cuh")])
    declared = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", sources))
    compiled = {match[0] for a, name, _ in resources if a == arch and (match := re.search(r"\w+_kernel", name))}
    assert declared and compiled >= declared


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_spills(resources, arch):
    wrong = []
    for name, amounts in ((name, amounts) for a, name, amounts in resources if a == arch):
        limit = next((limit for pattern, limit in LIMITS.items() if re.search(pattern, name)), 255)
        if amounts["REG"] > limit or amounts["STACK"] or amounts["LOCAL"]:
            wrong.append(
                f"{name.split('(')[0]}: {amounts['REG']} registers (limit {limit}), {amounts['STACK']} bytes of stack"
            )
    assert not wrong, "\n".join(wrong)


def test_limits_name_real_kernels(resources):
    for pattern in LIMITS:
        assert any(re.search(pattern, name) for _, name, _ in resources), pattern
