"""What every benchmark shares: the machine's name and ceilings, interleaved timing, and results as JSON, CSV, a table
and a plot."""

import contextlib
import csv
import datetime
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if any((ROOT / "mimo_kernels" / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
    sys.path.insert(0, str(ROOT))  # measure the checkout the benchmark lies in, where it is built

FLUSH_BYTES = 512 * 2**20  # larger than any L2
LEAD_CYCLES = 10**6  # about half a millisecond in which the host runs ahead, so that launching is not timed


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict:
    """Device, versions, commit and date: the header of every result."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)} (no GPU)"
    return {
        "device": name,
        "kind": device.type,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "mimo_kernels": _version("mimo-kernels"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def ceilings(device: torch.device) -> dict:
    """What this device reaches in this run: a large matrix product, and a large copy counting bytes read and
    written."""
    gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty((2**31 if gpu else 2**26) // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    timings = interleaved({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, seconds=0.5)
    return {
        "matmul": f"{str(dtype).removeprefix('torch.')} {size}^3",
        "matmul_tflops": 2 * size**3 / timings["matmul"].median * 1e-9,
        "copy_gb_per_s": 2 * source.nbytes / timings["copy"].median * 1e-6,
    }


@dataclass
class Timing:
    """Milliseconds."""

    median: float
    p20: float
    p80: float
    runs: int


def interleaved(
    functions: dict[str, Callable],
    device: torch.device,
    *,
    seconds: float = 0.3,
    min_runs: int = 5,
    max_runs: int = 100,
) -> dict[str, Timing]:
    """Times every function in turn, round after round, so that clocks and neighbours hit all alike. `seconds` per
    function.

    On a GPU between CUDA events, after the L2 cache was overwritten, and with the host ahead; nothing waits for the
    device inside a round.
    """
    for function in functions.values():
        function()
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if device.type == "cuda" else None

    def one_round() -> dict[str, float]:
        spans = {name: _timed(function, flush) for name, function in functions.items()}
        if flush is not None:
            torch.cuda.synchronize(device)
        return {name: _milliseconds(*span) for name, span in spans.items()}

    budget = 1000 * seconds * len(functions)
    rounds = max(min_runs, min(max_runs, int(budget / max(sum(one_round().values()), 1e-3))))
    samples = [one_round() for _ in range(rounds)]
    return {name: _summary([sample[name] for sample in samples]) for name in functions}


def _timed(function: Callable, flush: torch.Tensor | None) -> tuple:
    if flush is None:
        start = time.perf_counter()
        function()
        return start, time.perf_counter()
    flush.zero_()
    torch.cuda._sleep(LEAD_CYCLES)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    return start, end


def _milliseconds(start, end) -> float:
    return start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else 1000 * (end - start)


def _summary(times: list[float]) -> Timing:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], len(times))


class Budget:
    """What a benchmark may take. `of(pieces)` gives one piece after the other as long as another one like the longest
    so far fits; the others are in `left_out`. Most important pieces first."""

    def __init__(self, minutes: float | None = None):
        self.end = math.inf if minutes is None else time.perf_counter() + 60 * minutes
        self.longest = 0.0
        self.left_out: list = []

    def of(self, pieces: Sequence) -> Iterator:
        for piece in pieces:
            start = time.perf_counter()
            if start + self.longest > self.end:
                self.left_out.append(piece)
                continue
            yield piece
            self.longest = max(self.longest, time.perf_counter() - start)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread where what is inside takes longer: some peers compile for minutes."""

    def stop(*_) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_memory(function: Callable, device: torch.device) -> float | None:
    """MiB that `function` needs on top of what is there before; None on the CPU, which does not count them."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def save_results(out: Path, name: str, header: dict, limits: dict, rows: list[dict], plot: dict, **extra) -> dict:
    """out/name.json (everything) and out/name.csv (the rows), either the old file or the new one whenever the process
    is stopped: a benchmark saves after every shape. plot: what `bar_plot` draws (group, bar, value, panel, unit)."""
    out.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": name, "machine": header, "ceilings": limits, "plot": plot, **extra, "rows": rows}
    with _replaced(out / f"{name}.json") as file:
        json.dump(result, file, indent=1)
    with _replaced(out / f"{name}.csv") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return result


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator:
    temporary = path.with_suffix(path.suffix + ".new")
    with open(temporary, "w", newline="") as file:
        yield file
    os.replace(temporary, path)


def write_results(out: Path, name: str, header: dict, limits: dict, rows: list[dict], plot: dict, **extra) -> Path:
    """`save_results` and the plot, out/name.png."""
    draw(out, save_results(out, name, header, limits, rows, plot, **extra))
    return out / f"{name}.json"


def draw(out: Path, result: dict) -> None:
    """The plot of a result, from what its JSON says."""
    rows = [row for row in result["rows"] if row.get(result["plot"]["value"]) is not None]
    if rows:
        bar_plot(out / f"{result['benchmark']}.png", rows, title=result["machine"]["device"], **result["plot"])


def print_header(title: str, header: dict, limits: dict) -> None:
    print(title)
    print("  " + header["device"])
    print("  " + ", ".join(f"{key} {header[key]}" for key in ("torch", "triton", "cuda", "python", "commit", "date")))
    print(
        f"  ceilings in this run: {limits['matmul']} matrix product {limits['matmul_tflops']:.4g} TFLOP/s,"
        f" copy {limits['copy_gb_per_s']:.4g} GB/s"
    )


def format_table(rows: list[dict], columns: dict[str, str], markdown: bool = False) -> str:
    """columns: key -> heading. Numbers to four digits, None as '-'."""
    cells = [list(columns.values())] + [[_cell(row.get(key)) for key in columns] for row in rows]
    if markdown:
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in cells)


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def bar_plot(
    path: Path, rows: list[dict], *, group: str, bar: str, value: str, panel: str, title: str, unit: str
) -> None:
    """Grouped bars: one panel per value of `panel`, one group of bars per `group`, one colour per `bar`."""
    try:
        import matplotlib
    except ImportError:
        print(
            f"matplotlib is not installed: {path.name} is not drawn; "
            "benchmarks/report.py --only-page draws it elsewhere"
        )
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels, groups, bars = (list(dict.fromkeys(row[key] for row in rows)) for key in (panel, group, bar))
    figure, axes = plt.subplots(len(panels), 1, figsize=(max(7.0, 1.7 * len(groups)), 3.2 * len(panels)), squeeze=False)
    for axis, panel_name in zip(axes[:, 0], panels):
        for i, bar_name in enumerate(bars):
            found = {row[group]: row.get(value) for row in rows if row[panel] == panel_name and row[bar] == bar_name}
            heights = [found.get(name) or 0.0 for name in groups]
            places = [g + (i - (len(bars) - 1) / 2) * 0.8 / len(bars) for g in range(len(groups))]
            axis.bar(places, heights, 0.8 / len(bars), label=bar_name)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(f"{title}: {panel_name}", fontsize=10)
        axis.set_ylabel(unit)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, not over them
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    if given := os.environ.get("BENCH_COMMIT"):  # for a copy of the tree without its .git
        return given

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
