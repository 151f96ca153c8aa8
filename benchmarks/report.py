"""Everything that wants a GPU in one command: build, GPU tests, all benchmarks; one JSON and one Markdown page with
plots.

    python benchmarks/report.py [--out bench_results] [--minutes 8] [--skip-build] [--skip-tests]
        [--only NAME ...] [--shapes NAME ...] [--readme README.md] [--only-page]
    python benchmarks/report.py --sanitize

Builds the module in place, runs the tests that need a device and the kernel tests, then every benchmark of this folder,
each in a process of its own. What --minutes leaves after build and tests is shared out to the benchmarks, which begin
nothing that would not fit and write what they have after every shape; one that overruns all the same is stopped. Writes
report.json and report.md beside the benchmarks' own files under --out, anew after every step, and exits with status 1
if anything failed. Without a GPU the same runs with what each part does there. --only: these steps alone, beside the
results that are there. --shapes: handed on to the one benchmark that --only names. --readme writes the summary table
between the markers <!-- benchmarks --> and <!-- /benchmarks --> of that file. --only-page runs nothing: page, plots and
table from the results under --out.

--sanitize runs every kernel once, small, under compute-sanitizer: memcheck, and racecheck and synccheck for the kernels
of csrc/.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import common

LIMIT_SECONDS = {"build": 120, "tests": 240}
SHARES = {"attn_bench": 4, "lengths_bench": 1, "ops_bench": 3, "rollout_bench": 1, "sample_bench": 3, "train_bench": 3}
DEFAULT_SHARE = 1
GRACE_SECONDS = 30  # beyond its share, before a benchmark is stopped
TEST_WORKERS = 8
MARKERS = "<!-- benchmarks -->", "<!-- /benchmarks -->"
OFF_THE_PAGE = {"runs", "tokens", "head_dim", "note"}  # in the CSV
OURS = (
    "frame_attention",
    "paged",
    "guided_step",
)  # in the names of our Triton kernels; those of csrc/ are in namespace mimo
SANITIZER = {"memcheck": ("mimo", *OURS), "racecheck": ("mimo",), "synccheck": ("mimo",)}


def steps(out: Path) -> dict[str, list[str]]:
    """Name -> command, in order."""
    tests = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", "tests/gpu", "tests/kernels"]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= TEST_WORKERS:
        tests += ["-n", str(TEST_WORKERS), "--dist", "worksteal"]
    found = {"build": [sys.executable, "setup.py", "build_ext", "--inplace"], "tests": tests}
    for path in sorted((common.ROOT / "benchmarks").glob("*_bench.py")):
        found[path.stem] = [sys.executable, str(path), "--out", str(out)]
    return found


def sanitizer_steps() -> dict[str, list[str]]:
    """Every tool over the same small launches. Without the caching allocator, so that tensors do not lie in one
    another's memory."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/gpu/test_every_kernel.py"]
    found = {}
    for name, kernels in SANITIZER.items():
        wanted = [part for kernel in kernels for part in ("--kernel-name", f"kernel_substring={kernel}")]
        padding = ["--padding", "256"] if name == "memcheck" else []
        found[name] = [tool, "--tool", name, *padding, "--error-exitcode", "9", "--print-limit", "20", *wanted, *tests]
    return found


def run(name: str, command: list[str], out: Path, limit: float, environment: dict | None = None) -> dict:
    """Runs one step, its output in out/NAME.log as it comes and on the screen at the end."""
    print(f"== {name}, at most {limit:.0f} s: {' '.join(command)}", flush=True)
    start, log = time.perf_counter(), out / f"{name}.log"
    with open(log, "w") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=common.ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | (environment or {}),
            )
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its own workers
            process.wait()
            status = None
        except OSError as error:
            status = 127
            file.write(f"{error}\n")
        if status is None:
            file.write(f"\nstopped after {limit:.0f} s\n")
    text = log.read_text(errors="replace").rstrip()
    print(text, flush=True)
    return {
        "step": name,
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "last_line": text.splitlines()[-1].replace(f"{out}{os.sep}", "") if text else "",  # a report travels
    }


def seconds_for(name: str, later: list[str], left: float) -> float:
    """A benchmark's part of the seconds that are left for it and those after it."""
    shares = {other: SHARES.get(other, DEFAULT_SHARE) for other in (name, *later)}
    return max(30.0, left * shares[name] / sum(shares.values()))


def load_results(out: Path) -> list[dict]:
    """The benchmarks' results under `out`, in the order of their names."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if path.name != "report.json"]
    return [result for result in results if "benchmark" in result and "rows" in result]


def page(done: list[dict], results: list[dict], out: Path) -> str:
    lines = ["# Benchmarks", ""]
    if results:
        machine = results[0]["machine"]
        lines += [f"- {key}: {machine[key]}" for key in machine if key not in ("kind", "commit", "date")]
        if machine["kind"] != "cuda":
            lines += ["", "**No GPU: small shapes on the CPU. These figures say nothing about the GPU kernels.**"]
    if done:
        lines += ["", common.format_table(done, {key: key.replace("_", " ") for key in done[0]}, markdown=True)]
    for result in results:
        limits, machine = result["ceilings"], result["machine"]
        lines += ["", f"## {result['benchmark']}", "", f"Commit {machine['commit']}, {machine['date']}.", ""]
        lines.append(
            f"Ceilings in the same run: {limits['matmul']} matrix product {limits['matmul_tflops']:.4g} TFLOP/s, "
            f"copy {limits['copy_gb_per_s']:.4g} GB/s."
        )
        for name, shape in result.get("shapes", {}).items():
            lines.append(f"- {name}: {shape['what']}; {shape['mask']}; {shape['heads']} heads of {shape['head_dim']}")
        measured = [row for row in result["rows"] if row.get(result["plot"]["value"]) is not None]
        columns = {
            key: key.replace("_", " ")
            for key in dict.fromkeys(key for row in measured for key in row)
            if key not in OFF_THE_PAGE and any(row.get(key) is not None for row in measured)
        }
        lines += ["", common.format_table(measured, columns, markdown=True)]
        if (out / f"{result['benchmark']}.png").exists():
            lines += ["", f"![{result['benchmark']}]({result['benchmark']}.png)"]
    return "\n".join(lines) + "\n"


def readme_table(results: list[dict]) -> str:
    """Ours and the best peer on every shape of the attention benchmark, with where and when it was measured."""
    attention = next((result for result in results if result["benchmark"] == "attention"), None)
    if attention is None:
        raise ValueError("no attention.json among the results; run benchmarks/attn_bench.py with the same --out first")
    machine, rows = attention["machine"], []
    measured = [row for row in attention["rows"] if "ms" in row]
    for ours in [row for row in measured if row["implementation"] == "frame_attention"]:
        peers = [row for row in measured if (row["shape"], row["direction"]) == (ours["shape"], ours["direction"])]
        peers = [row for row in peers if row is not ours]
        best = min(peers, key=lambda row: row["ms"], default=None)
        rows.append(
            {**ours, "peer": best and best["implementation"], "times": best and f"{best['ms'] / ours['ms']:.2f}x"}
        )
    columns = {
        "shape": "shape", "direction": "direction", "ms": "ms", "useful_tflops": "useful TFLOP/s",
        "percent_of_ceiling": "% of matmul ceiling",
        "peer": "fastest peer", "times": "against it",
    }  # fmt: skip
    versions = f"torch {machine['torch']}, triton {machine['triton']}; commit {machine['commit']}"
    where = f"{machine['device']}; {versions}, {machine['date']}."
    return f"{where}\n\n{common.format_table(rows, columns, markdown=True)}"


def write_readme(path: Path, table: str) -> None:
    text = path.read_text()
    begin, end = (text.find(marker) for marker in MARKERS)
    if begin < 0 or end < begin:
        raise ValueError(f"{path} has no {MARKERS[0]} followed by {MARKERS[1]}; the table goes between them")
    path.write_text(f"{text[: begin + len(MARKERS[0])]}\n{table}\n{text[end:]}")


def write_page(done: list[dict], out: Path) -> list[dict]:
    results = load_results(out)
    (out / "report.json").write_text(json.dumps({"steps": done, "results": results}, indent=1))
    (out / "report.md").write_text(page(done, results, out))
    return results


def run_all(arguments: argparse.Namespace, out: Path) -> list[dict]:
    end, done = time.perf_counter() + 60 * arguments.minutes, []
    if arguments.sanitize:
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for name, command in sanitizer_steps().items():
            done.append(run(name, command, out, end - time.perf_counter(), environment))
        return done
    commands = steps(out)
    if unknown := [name for name in arguments.only or () if name not in commands]:
        raise SystemExit(f"report.py: unknown step {unknown[0]!r}; expected some of {', '.join(commands)}")
    skipped = {"build": arguments.skip_build, "tests": arguments.skip_tests}
    names = [name for name in commands if name in (arguments.only or commands) and not skipped.get(name)]
    if not arguments.only:
        for stale in load_results(out):
            (out / f"{stale['benchmark']}.json").unlink()  # a page shows one run
    for i, name in enumerate(names):
        command, limit = commands[name], LIMIT_SECONDS.get(name)
        if limit is None:
            share = seconds_for(name, names[i + 1 :], end - time.perf_counter())
            command, limit = [*command, "--minutes", f"{share / 60:.2f}"], share + GRACE_SECONDS
            command += ["--shapes", *arguments.shapes] if arguments.shapes else []
        done.append(run(name, command, out, limit))
        write_page(done, out)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="build, tests or names of benchmarks, such as attn_bench"
    )
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="for the benchmark that --only names")
    parser.add_argument(
        "--sanitize", action="store_true", help="every kernel once under compute-sanitizer, nothing else"
    )
    parser.add_argument("--readme", type=Path, help="write the summary table into this file")
    parser.add_argument("--only-page", action="store_true", help="run nothing, take the results under --out")
    arguments = parser.parse_args()

    if arguments.shapes and (len(arguments.only or ()) != 1 or arguments.only[0] in LIMIT_SECONDS):
        parser.error("--shapes belongs to one benchmark, expected --only with its name, such as --only attn_bench")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.only_page:
        done = json.loads((out / "report.json").read_text())["steps"] if (out / "report.json").exists() else []
    else:
        done = run_all(arguments, out)
    if not arguments.sanitize:
        for result in load_results(out):
            common.draw(out, result)  # of a benchmark that was stopped, too
        results = write_page(done, out)
        print(f"\n{out / 'report.json'}\n{out / 'report.md'}")
        if arguments.readme:
            try:
                write_readme(arguments.readme, readme_table(results))
            except ValueError as error:
                parser.error(str(error))
    print(
        common.format_table(done, {"step": "step", "status": "status", "seconds": "seconds", "last_line": "last line"})
    )
    return int(any(step["status"] != 0 for step in done))


if __name__ == "__main__":
    sys.exit(main())
