"""Everything that wants a GPU in one command: build, GPU tests, all benchmarks; one JSON and one Markdown page with plots.

    python benchmarks/report.py [--out bench_results] [--skip-build] [--skip-tests] [--readme README.md] [--only-page]

Builds the module in place, runs the tests that need a device and the kernel tests, then every benchmark of this folder, each in a process of its own
and none beyond its limit; under 8 minutes on the reference GPU. Writes report.json and report.md beside the benchmarks' own files under --out, and
exits with status 1 if anything failed. Without a GPU the same runs with what each part does there. --readme writes the summary table between the
markers <!-- benchmarks --> and <!-- /benchmarks --> of that file. --only-page runs nothing: page, plots and table from the results under --out.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import common

LIMIT_SECONDS = {"build": 120, "tests": 150, "attn_bench": 240, "train_bench": 180}
DEFAULT_LIMIT = 120
MARKERS = "<!-- benchmarks -->", "<!-- /benchmarks -->"
OFF_THE_PAGE = {"runs", "tokens", "head_dim", "note"}  # in the CSV


def steps(out: Path, skip_build: bool, skip_tests: bool) -> dict[str, list[str]]:
    found = {}
    if not skip_build:
        found["build"] = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if not skip_tests:
        found["tests"] = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--continue-on-collection-errors",
            "tests/gpu",
            "tests/kernels",
        ]
    for path in sorted((common.ROOT / "benchmarks").glob("*_bench.py")):
        found[path.stem] = [sys.executable, str(path), "--out", str(out)]
    return found


def run(name: str, command: list[str], out: Path) -> dict:
    """Runs one step with its output on the screen and in out/NAME.log."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    limit, start = LIMIT_SECONDS.get(name, DEFAULT_LIMIT), time.perf_counter()
    lines = []
    try:
        process = subprocess.run(
            command, cwd=common.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
        )
        lines, status = process.stdout.splitlines(), process.returncode
    except subprocess.TimeoutExpired as error:
        lines, status = (error.stdout or b"").decode(errors="replace").splitlines(), None
        lines.append(f"stopped after {limit} s")
    (out / f"{name}.log").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return {
        "step": name,
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "last_line": lines[-1] if lines else "",
    }


def load_results(out: Path) -> list[dict]:
    """The benchmarks' results under `out`, in the order of their names."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if path.name != "report.json"]
    return [result for result in results if "benchmark" in result and "rows" in result]


def page(done: list[dict], results: list[dict], out: Path) -> str:
    lines = ["# Benchmarks", ""]
    if results:
        machine = results[0]["machine"]
        lines += [f"- {key}: {machine[key]}" for key in machine if key != "kind"]
        if machine["kind"] != "cuda":
            lines += ["", "**No GPU: small shapes on the CPU. These figures say nothing about the GPU kernels.**"]
    if done:
        lines += ["", common.format_table(done, {key: key.replace("_", " ") for key in done[0]}, markdown=True)]
    for result in results:
        limits = result["ceilings"]
        lines += ["", f"## {result['benchmark']}", ""]
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
        peers = [row for row in peers if not row["implementation"].startswith("frame_attention")]
        best = min(peers, key=lambda row: row["ms"], default=None)
        rows.append(
            {**ours, "peer": best and best["implementation"], "times": best and f"{best['ms'] / ours['ms']:.2f}x"}
        )
    columns = {
        "shape": "shape", "direction": "direction", "ms": "ms", "useful_tflops": "useful TFLOP/s", "percent_of_ceiling": "% of matmul ceiling",
        "peer": "fastest peer", "times": "against it",
    }  # fmt: skip
    where = f"{machine['device']}; torch {machine['torch']}, triton {machine['triton']}; commit {machine['commit']}, {machine['date']}."
    return f"{where}\n\n{common.format_table(rows, columns, markdown=True)}"


def write_readme(path: Path, table: str) -> None:
    text = path.read_text()
    begin, end = (text.find(marker) for marker in MARKERS)
    if begin < 0 or end < begin:
        raise ValueError(f"{path} has no {MARKERS[0]} followed by {MARKERS[1]}; the table goes between them")
    path.write_text(f"{text[: begin + len(MARKERS[0])]}\n{table}\n{text[end:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--readme", type=Path, help="write the summary table into this file")
    parser.add_argument("--only-page", action="store_true", help="run nothing, take the results under --out")
    arguments = parser.parse_args()

    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.only_page:
        done = json.loads((out / "report.json").read_text())["steps"] if (out / "report.json").exists() else []
        for result in load_results(out):
            common.draw(out, result)
    else:
        for stale in load_results(out):
            (out / f"{stale['benchmark']}.json").unlink()  # a page shows one run
        done = [
            run(name, command, out) for name, command in steps(out, arguments.skip_build, arguments.skip_tests).items()
        ]
    results = load_results(out)
    (out / "report.json").write_text(json.dumps({"steps": done, "results": results}, indent=1))
    (out / "report.md").write_text(page(done, results, out))
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
