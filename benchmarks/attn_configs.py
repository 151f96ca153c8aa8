"""What attn_tune.py tries and what it concludes: candidates for the tiles of the attention kernels, the launches of a
pass, what the compiler makes of each, and which of them a table should hold."""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import common  # first: it finds the packages of this checkout
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mimo_kernels.attention.triton import backward as triton_bwd
from mimo_kernels.attention.triton import forward as triton_fwd
from mimo_kernels.attention.triton.schedule import Config, Plan, configs
from mimo_kernels.attention.triton.tiles import split_head_dim

# Pass -> up to this many channels (the padded head dimension) -> TILExBLOCKxWARPS, each tried with every number of
# stages. For sm_90, where every 4 warps multiply 64 rows of the tile, or 128 one half after the other. What outgrows
# shared memory or spills is left out once it is compiled.
TILES = {
    "forward": {
        80: "64x32x4 64x64x4 64x128x4 128x32x4 128x64x4 128x64x8 128x128x8 256x64x8",
        128: "64x32x4 64x64x4 64x128x4 128x32x4 128x32x8 128x64x8 128x128x8",
        256: "64x32x4 64x64x4 128x32x8 128x64x8",
    },
    "dq": {
        80: "64x32x4 64x64x4 64x128x4 128x32x4 128x32x8 128x64x8 128x128x8 256x32x8",
        128: "64x32x4 64x64x4 128x32x8 128x64x8 128x128x8",
        256: "64x32x4 64x32x8 128x32x8",
    },
    "dkv": {
        80: "64x32x4 64x64x4 64x64x8 128x32x4 128x32x8 128x64x8",
        128: "64x32x4 64x64x4 64x64x8 128x32x8 128x64x8",
        256: "32x32x8 64x16x8 64x32x8",
    },
}
STAGES = (2, 3, 4)
MAX_STORES = 64  # to local memory: what spills more is not worth its time
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # per program; a multiprocessor has one more
KERNELS = {
    "forward": (triton_fwd, "frame_attention_fwd_kernel"),
    "rows": (triton_bwd, "frame_attention_rows_kernel"),
    "dq": (triton_bwd, "frame_attention_dq_kernel"),
    "dkv": (triton_bwd, "frame_attention_dkv_kernel"),
}


class Job(NamedTuple):
    name: str  # of the pass
    head_dim: int
    config: Config


class Tensors(NamedTuple):
    """q .. dv bf16 [1, L, H, D], lse fp32 [1, H, L]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    lse: Tensor

    def results(self, name: str) -> dict[str, Tensor]:
        return {
            field: getattr(self, field) for field in {"forward": ("out",), "dq": ("dq",), "dkv": ("dk", "dv")}[name]
        }


def random_tensors(tokens: int, heads: int, head_dim: int, device: torch.device) -> Tensors:
    values = (torch.empty(1, tokens, heads, head_dim, dtype=torch.bfloat16, device=device).normal_() for _ in range(8))
    return Tensors(*values, torch.empty(1, heads, tokens, device=device))


class Noted:
    """In a kernel's place: a launch is not made but noted, as `launch` to make it again and again, and as `build` to
    only compile it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def note(*args, **kwargs) -> None:
            self.launch = functools.partial(self.kernel[grid], *args, **kwargs)
            self.build = functools.partial(self.kernel.warmup, *args, grid=grid, **kwargs)

        return note


def launches(name: str, x: Tensors, plan: Plan) -> dict[str, Noted]:
    """What the operator's own launcher launches for a pass, by kernel: what is compiled ahead and what is timed is what
    users run."""
    noted, scale = {}, x.q.shape[-1] ** -0.5
    with contextlib.ExitStack() as stack:
        for key, (module, kernel) in KERNELS.items():
            noted[key] = Noted(getattr(module, kernel))
            stack.enter_context(mock.patch.object(module, kernel, noted[key]))
        if name == "forward":
            triton_fwd.forward(x.q, x.k, x.v, x.out, x.lse, plan, scale)
        else:
            triton_bwd.backward(x.dout, None, x.q, x.k, x.v, x.out, x.lse, x.dq, x.dk, x.dv, plan, plan, scale)
    return noted


class NoDevice:
    """What Triton asks of its driver to compile for an architecture."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_ahead(job: Job, arch: int) -> dict:
    """Runs in a process of its own: leaves the kernel in Triton's cache, where the launch finds it, and returns what it
    takes."""
    driver.set_active(NoDevice(arch))
    plan = Plan(job.config, torch.empty(4, dtype=torch.int32, device="meta"), 1, 1, 1, 0)
    try:
        kernel = launches(job.name, random_tensors(1, 1, job.head_dim, torch.device("meta")), plan)[job.name].build()
    except Exception as error:  # a candidate the compiler cannot do is a result
        return {"note": f"does not compile: {common.one_line(error)}"}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, shared, warps = (
        int(re.search(r"REG:(\d+)", code)[1]),
        kernel.metadata.shared / 1024,
        job.config.num_warps,
    )
    programs = min(2048 // (32 * warps), 65536 // (32 * warps * 8 * math.ceil(registers / 8)))
    stores = len(re.findall(r"\bSTL\b", code))
    limit, note = SHARED_KIB[max(known for known in SHARED_KIB if known <= arch)], {}
    if shared > limit:
        note = {"note": f"more than {limit} KiB of shared memory"}
    elif stores > MAX_STORES:
        note = {"note": "spills"}
    return {
        "registers": registers,
        "shared_kib": round(shared, 1),
        "programs": min(programs, int((limit + 1) // (shared + 1))),
        "stores": stores,
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
    } | note


def compile_all(jobs: list[Job], arch: int) -> dict[Job, dict]:
    start = time.perf_counter()
    workers = min(os.cpu_count() or 1, len(jobs))
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        found = dict(zip(jobs, pool.map(compile_ahead, jobs, itertools.repeat(arch))))
    print(f"{len(jobs)} candidates compiled in {time.perf_counter() - start:.0f} s by {workers} processes", flush=True)
    return found


def present_choices(name: str, arch: int, head_dim: int) -> tuple[Config, ...]:
    return configs(name, arch, torch.bfloat16, head_dim)


def plain(config: Config) -> Config:
    return replace(config, cost=1.0)


def candidates(name: str, arch: int, head_dim: int, given: list[Config] | None) -> list[Config]:
    """The configured ones first: they are what the others are compared with."""
    channels = sum(split_head_dim(head_dim))
    tiles = next(tiles for limit, tiles in TILES[name].items() if channels <= limit)
    others = [parsed(f"{tile}x{stages}") for tile in tiles.split() for stages in STAGES] if given is None else given
    # With the head dimension in parts, ptxas would make every product wait for the one before.
    if name == "forward" and given is None and len(split_head_dim(head_dim)) == 1:
        others += [replace(config, ahead=True) for config in others if config.num_warps == 8]
    if name == "dkv" and given is None:
        others += [replace(config, masked_stages=2) for config in others]
    return list(dict.fromkeys([*map(plain, present_choices(name, arch, head_dim)), *others]))


def label(config: Config) -> str:
    masked = f"+masked{config.masked_stages}" * (config.masked_stages != 1)
    return "x".join(map(str, astuple(config)[:4])) + "+ahead" * config.ahead + masked


def parsed(text: str) -> Config:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(\+ahead)?(?:\+masked([1-9]))?", text)
    if match is None:
        form = "TILExBLOCKxWARPSxSTAGES[+ahead][+maskedSTAGES]"
        raise argparse.ArgumentTypeError(f"{text!r}; expected {form}, such as 128x64x4x3")
    *sizes, ahead, masked = match.groups()
    return Config(*map(int, sizes), ahead=ahead is not None, masked_stages=int(masked or 1))


def suggestion(
    rows: list[dict], name: str, head_dim: int, arch: int
) -> tuple[tuple[Config, ...], float, list[str]] | None:
    """The choice, or the two, that the rule of `make_plan` makes the most of: with their costs, how many times as fast
    as the present ones they are (geometric mean over the shapes), and the shapes."""
    present = present_choices(name, arch, head_dim)
    times: dict[Config, dict[str, tuple[float, int]]] = {}
    for row in rows:
        if (row["sweep"], row["pass"], row["head_dim"]) == ("tiles", name, head_dim) and "ms" in row:
            config = parsed(row["candidate"])
            times.setdefault(config, {})[row["shape"]] = row["ms"], row["executed_pairs"]
    if any(plain(config) not in times for config in present):
        return None
    shapes = [shape for shape in times[plain(present[0])] if all(shape in times[plain(config)] for config in present)]
    times = {config: of for config, of in times.items() if all(shape in of for shape in shapes)}

    def log_time(choices: tuple[Config, ...]) -> float:
        picked = ((shape, min(choices, key=lambda c: c.cost * times[plain(c)][shape][1])) for shape in shapes)
        return mean(math.log(times[plain(config)][shape][0]) for shape, config in picked)

    def cost(config: Config, other: Config) -> float:
        logs = (
            math.log(times[config][s][0] / times[config][s][1] * times[other][s][1] / times[other][s][0])
            for s in shapes
        )
        return round(math.exp(mean(logs)), 2)

    pairs = ((first, replace(second, cost=cost(second, first))) for first, second in itertools.permutations(times, 2))
    one = min(((config,) for config in times), key=log_time)
    two = min(pairs, key=log_time, default=one)
    best = two if log_time(two) < log_time(one) - 0.01 else one
    return best, math.exp(log_time(present) - log_time(best)), shapes


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def written(choices: tuple[Config, ...]) -> str:
    """As in triton_plan.py."""
    entries = []
    for c in choices:
        more = ", ahead=True" * c.ahead + f", masked_stages={c.masked_stages}" * (c.masked_stages != 1)
        entries.append(f"Config({', '.join(map(str, astuple(c)[: 4 + (c.cost != 1.0)]))}{more})")
    return f"({', '.join(entries)}{',' * (len(entries) == 1)})"
