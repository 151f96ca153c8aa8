"""Chooses the tables of mimo_kernels/attention/triton/schedule.py: every candidate tile compiled ahead of time,
checked, and timed on the shapes that matter.

    python benchmarks/attn_tune.py [--passes forward dq dkv] [--head-dims 72 128 64] [--shapes k600-xl]
        [--configs 128x64x4x3] [--minutes 9]
    python benchmarks/attn_tune.py --dry-run [--arch 90]        # no GPU: compiles, and prints what each candidate takes

A candidate is TILExBLOCKxWARPSxSTAGES[+ahead][+maskedSTAGES], the fields of a Config. Writes attention_tuning.json and
.csv under --out after every pass of every shape, prints the best candidates of each, and last the table rows it
suggests. A head dim that no shape has is measured on all of them, in place of theirs. TFLOP/s count what a pass has to
multiply for the allowed pairs at the true head dim: two products forward, three for dQ, four for dK and dV (the
benchmark's five for both count S and dP once). Needs a GPU; exits with status 2 without one, with 1 if a configured
tile is wrong or does not run.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import common  # first: it finds the packages of this checkout
import torch
import triton
from attn_bench import TOLERANCE, Shape, gpu_shapes
from attn_configs import (
    SHARED_KIB,
    Job,
    Noted,
    candidates,
    compile_all,
    label,
    launches,
    mean,
    parsed,
    plain,
    present_choices,
    random_tensors,
    suggestion,
    written,
)
from attn_peers import exact_attention
from torch import Tensor

from mimo_kernels.attention.triton import schedule as triton_plan
from mimo_kernels.attention.triton.schedule import PASSES, Config, Plan
from mimo_kernels.attention.triton.tiles import split_head_dim

BAND_ROWS = (8192, 16384, 32768, 65536, 262144)
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # matrix products per pair
SHOWN = 6  # candidates of a table; all are in the files
RESOURCES = {
    "registers": "registers",
    "shared_kib": "shared KiB",
    "programs": "programs/SM",
    "stores": "spill stores",
    "hgmma": "HGMMA",
}
COLUMNS = {
    "pass": "pass",
    "head_dim": "head dim",
    "shape": "shape",
    "candidate": "candidate",
    "present": "present",
    "useful_tflops": "useful TFLOP/s",
    "executed_tflops": "executed",
    "ms": "ms",
    "ms_p20": "20%",
    "ms_p80": "80%",
    **RESOURCES,
    "error": "rms error",
    "note": "note",
}
PLOT = {"group": "shape", "bar": "candidate", "value": "useful_tflops", "panel": "pass", "unit": "useful TFLOP/s"}


@dataclass
class Case:
    """A shape on the device, and what its results should be."""

    shape: Shape
    device: torch.device

    def __post_init__(self):
        mask, device = self.shape.mask, self.device
        self.x = random_tensors(mask.num_tokens, self.shape.heads, self.shape.head_dim, device)
        exact = exact_attention(mask, *(getattr(self.x, name)[0] for name in ("q", "k", "v", "dout")))
        self.exact = dict(zip(("out", "dq", "dk", "dv"), exact))

    def plan(self, name: str, choices: tuple[Config, ...]) -> Plan:
        mask = self.shape.mask
        return triton_plan.make_plan({}, name, mask.pattern, mask.repeats, self.device, self.shape.heads, choices)[0]

    def prepared(self, name: str, plan: Plan) -> tuple[Noted, float]:
        """The kernel of the pass, launched once, and the worst error of its results."""
        noted = launches(name, self.x, plan)
        if name != "forward":
            noted["rows"].launch()
        results = self.x.results(name)
        for result in results.values():
            result.fill_(math.nan)
        noted[name].launch()
        error = max(deviation(result[0], self.exact[field]) for field, result in results.items())
        if not error <= TOLERANCE[torch.bfloat16]:
            raise AssertionError(f"wrong: rms error {error:.2e}")
        return noted[name], error


def deviation(result: Tensor, truth: Tensor) -> float:
    return ((result.float() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def measure(case: Case, name: str, plans: dict[str, Plan], seconds: float) -> dict[str, dict]:
    """Label -> figures, or a note why there are none."""
    shape, mask = case.shape, case.shape.mask
    arch = triton_plan.architecture(case.device)
    if name != "forward":  # it needs out and lse
        case.prepared("forward", case.plan("forward", present_choices("forward", arch, shape.head_dim)))
    rows, running = {}, {}
    for key, plan in plans.items():
        try:
            running[key] = case.prepared(name, plan)
        except Exception as error:  # that a candidate fails is a result
            rows[key] = {"note": common.one_line(error)}
    functions = {key: noted.launch for key, (noted, _) in running.items()}
    per_pair = 2e-9 * PRODUCTS[name] * shape.heads * shape.head_dim
    timings = common.interleaved(functions, case.device, seconds=seconds, min_runs=10) if functions else {}
    for key, timing in timings.items():
        rows[key] = {
            "ms": timing.median,
            "ms_p20": timing.p20,
            "ms_p80": timing.p80,
            "useful_tflops": per_pair * mask.num_pairs / timing.median,
            "executed_tflops": per_pair * plans[key].executed_pairs / timing.median,
            "executed_pairs": plans[key].executed_pairs,
            "error": running[key][1],
        }
    return rows


def compiled_row(job: Job, taken: dict, arch: int) -> dict:
    present = job.config in map(plain, present_choices(job.name, arch, job.head_dim))
    row = {
        "pass": job.name,
        "head_dim": job.head_dim,
        "candidate": label(job.config),
        "present": "*" if present else None,
    }
    return row | taken


def tile_rows(case: Case, name: str, found: dict[Job, dict], seconds: float) -> list[dict]:
    rows = {
        job.config: compiled_row(job, taken, triton_plan.architecture(case.device))
        for job, taken in found.items()
        if job.name == name and job.head_dim == case.shape.head_dim
    }
    plans = {row["candidate"]: case.plan(name, (config,)) for config, row in rows.items() if "note" not in row}
    figures = measure(case, name, plans, seconds)
    return [row | figures.get(row["candidate"], {}) for row in rows.values()]


def band_rows(case: Case, name: str, seconds: float) -> list[dict]:
    """The present tiles with other values of BAND_ROWS."""
    head_dim, plans = case.shape.head_dim, {}
    choices = present_choices(name, triton_plan.architecture(case.device), head_dim)
    for value in dict.fromkeys((*BAND_ROWS, triton_plan.BAND_ROWS)):
        with mock.patch.object(triton_plan, "BAND_ROWS", value):
            plans[str(value)] = case.plan(name, choices)
    figures = measure(case, name, plans, seconds)
    present = str(triton_plan.BAND_ROWS)
    rows = [
        {"pass": name, "head_dim": head_dim, "candidate": key, "present": "*" if key == present else None}
        for key in plans
    ]
    return [row | figures[row["candidate"]] for row in rows]


def print_suggestions(rows: list[dict], arch: int) -> None:
    print(
        f"\nsuggested rows of the table for sm_{arch}, and how many times as fast as the present ones (geometric mean):"
    )
    for name in PASSES:
        for head_dim in sorted({row["head_dim"] for row in rows if row["pass"] == name and row["sweep"] == "tiles"}):
            if found := suggestion(rows, name, head_dim, arch):
                best, gain, shapes = found
                row = f'"{name}": {{{sum(split_head_dim(head_dim))}: {written(best)}}},'
                print(f"    {row}  # {gain:.3f} x; d {head_dim} on {', '.join(shapes)}")
    bands = [row for row in rows if row["sweep"] == "bands"]
    present = {(row["pass"], row["shape"]): row["ms"] for row in bands if row["present"]}
    for value in dict.fromkeys(row["candidate"] for row in bands):
        found = [(row, present.get((row["pass"], row["shape"]))) for row in bands if row["candidate"] == value]
        gains = [math.log(before / row["ms"]) for row, before in found if before and "ms" in row]
        if gains:
            print(f"    BAND_ROWS = {value}  # {math.exp(mean(gains)):.3f} x; {len(gains)} passes of shapes")


def tuned_shapes() -> list[Shape]:
    """Those of a training run: as many queries as keys, of as many heads."""
    return [s for s in gpu_shapes() if s.kv_heads is None and s.mask.num_queries == s.mask.num_keys]


def chosen_shapes(names: list[str] | None, head_dims: list[int] | None) -> list[Shape]:
    shapes = [shape for shape in tuned_shapes() if names is None or shape.name in names]
    if head_dims is None:
        return shapes
    by_dim = {dim: [shape for shape in shapes if shape.head_dim == dim] for dim in head_dims}
    return [s for dim in head_dims for s in by_dim[dim] or [replace(shape, head_dim=dim) for shape in shapes]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--head-dims", nargs="+", type=int, help="those of the shapes by default")
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in tuned_shapes()], help="all by default")
    parser.add_argument(
        "--configs", nargs="+", type=parsed, help="TILExBLOCKxWARPSxSTAGES to try beside the present ones"
    )
    parser.add_argument("--seconds", type=float, default=0.15, help="timed per candidate and shape")
    parser.add_argument("--minutes", type=float, help="begin nothing that would end later")
    parser.add_argument("--dry-run", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--arch", type=int, choices=SHARED_KIB, default=90, help="of --dry-run; 90 by default")
    arguments = parser.parse_args()

    budget, device = common.Budget(arguments.minutes), common.default_device()
    refusal = None
    if triton.knobs.runtime.interpret:
        refusal = "TRITON_INTERPRET is set: nothing would be compiled"
    elif device.type != "cuda" and not arguments.dry_run:
        refusal = "no CUDA GPU to measure on; --dry-run compiles the candidates without one"
    if refusal:
        print(f"attn_tune: {refusal}", file=sys.stderr)
        return 2
    arch = arguments.arch if arguments.dry_run else triton_plan.architecture(device)
    shapes = chosen_shapes(arguments.shapes, arguments.head_dims)
    jobs = [
        Job(name, head_dim, candidate)
        for head_dim in dict.fromkeys(shape.head_dim for shape in shapes)
        for name in arguments.passes
        for candidate in candidates(name, arch, head_dim, arguments.configs)
    ]
    found = compile_all(jobs, arch)
    if arguments.dry_run:
        rows = [compiled_row(job, found[job], arch) for job in jobs]
        columns = ("pass", "head_dim", "candidate", "present", *RESOURCES, "note")
        print(common.format_table(rows, {key: COLUMNS[key] for key in columns}))
        return int(any(row["present"] and "note" in row for row in rows))

    torch.manual_seed(0)
    header, limits = common.machine(device), common.ceilings(device)
    common.print_header("frame_attention tiles", header, limits)
    pieces = [
        (shape, name, sweep)
        for shape in shapes
        for sweep in ("tiles", "bands")
        for name in arguments.passes
        if sweep == "tiles" or shape.mask.num_clips > 1
    ]
    rows, failed, case = [], [], None
    for shape, name, sweep in budget.of(pieces):
        try:
            if case is None or case.shape is not shape:
                case = None  # frees the one before
                case = Case(shape, device)
            if sweep == "tiles":
                new = tile_rows(case, name, found, arguments.seconds)
            else:
                new = band_rows(case, name, arguments.seconds)
        except Exception as error:
            failed.append(f"{shape.name}, {name}, {sweep}: {common.one_line(error)}")
            continue
        new = [{"sweep": sweep, "shape": shape.name} | row for row in new]
        new.sort(key=lambda row: -row.get("useful_tflops", 0.0))
        rows += new
        for row in new:
            if row["present"] and "note" in row:
                failed.append(f"{shape.name}, {name}, present {row['candidate']}: {row['note']}")
        common.save_results(arguments.out, "attention_tuning", header, limits, rows, PLOT)
        shown = [row for place, row in enumerate(new) if place < SHOWN or row["present"]]
        filled = {key: heading for key, heading in COLUMNS.items() if any(row.get(key) is not None for row in shown)}
        print("\n" + common.format_table(shown, filled), flush=True)
    for shape, name, sweep in budget.left_out:
        print(f"not measured within {arguments.minutes:g} minutes: {shape.name}, {name}, {sweep}")
    if rows:
        print_suggestions(rows, arch)
        print(", ".join(str(arguments.out / f"attention_tuning.{kind}") for kind in ("json", "csv")))
    for line in failed:
        print(line)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
