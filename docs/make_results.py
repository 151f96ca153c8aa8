"""Writes docs/results.md from benchmarks/results: `python docs/make_results.py`. A test compares what is committed with
what this makes.

A folder of results is a machine: what `benchmarks/report.py --out benchmarks/results/NAME` leaves there.
"""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"

HEAD = """# Results

What the benchmarks measured, out of the files under `benchmarks/results`, which hold more columns: the 20th and 80th
percentiles among them. Made by `docs/make_results.py`.
"""

WORDS = {  # benchmark -> what it measures
    "attention": "`frame_attention` against other ways to compute the same, each compared with float64 before it is "
    "timed: one call under a dense mask, FlexAttention, and calls of a variable-length attention whose results are "
    'merged. "Against ours" is the time divided by that of `frame_attention`; the ceiling is that of a matrix product.',
    "data": "Clips per second out of videos, through a tokenizer and out of latent shards; and what of a training step "
    "is spent waiting for them.",
    "fp8": "What float8 products do to the gradients of a small network, beside bf16, and beside another batch in "
    "fp32: how far gradients of a step differ by chance.",
    "sampling": "A video frame by frame: with the paged cache (all frames, or a window of them), with a cache that is "
    "joined or shifted anew for every frame, and without one.",
}
COLUMNS = {  # benchmark -> key -> heading; of others all columns
    "attention": {
        **{key: key for key in ("shape", "implementation")},
        **{
            f"{direction} {key}": f"{direction}{words}"
            for direction in ("forward", "backward")
            for key, words in (
                ("ms", ", ms"),
                ("percent_of_ceiling", ", % of ceiling"),
                ("speedup_of_ours", ": against ours"),
            )
        },
    },
    "sampling": {
        **{key: key for key in ("shape", "implementation", "frames")},
        "ms": "ms per frame",
        "total_s": "s in all",
        "speedup_of_ours": "against paged",
    },
}
OFF_THE_PAGE = {"runs", "tokens", "head_dim", "note", "p20", "p80", "ms_p20", "ms_p80"}


def cell(value) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}".removesuffix(".0") if isinstance(value, float) else str(value)


def table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[cell(row.get(key)) for key in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def both_directions(rows: list[dict]) -> list[dict]:
    """A row for every shape and implementation, what is measured by direction."""
    joined: dict[tuple, dict] = {}
    for row in rows:
        together = joined.setdefault((row["shape"], row["implementation"]), {**row})
        together |= {f"{row['direction']} {key}": value for key, value in row.items()}
    return list(joined.values())


def section(result: dict, pictures: list[Path]) -> list[str]:
    """A benchmark on a machine."""
    name, machine, limits = result["benchmark"], result["machine"], result["ceilings"]
    rows = [row for row in result["rows"] if row.get(result["plot"]["value"]) is not None]
    rows = both_directions(rows) if name == "attention" else rows
    keys = dict.fromkeys(key for row in rows for key in row if row[key] is not None and key not in OFF_THE_PAGE)
    lines = [f"### {name.replace('_', ' ').capitalize()}", "", *([WORDS[name], ""] if name in WORDS else [])]
    for shape, says in result.get("shapes", {}).items():
        lines.append(f"- `{shape}`: {says['what']}; {says['mask']}; {says['heads']} heads of {says['head_dim']}")
    lines += [""] if result.get("shapes") else []
    lines += table(rows, COLUMNS.get(name) or {key: key.replace("_", " ") for key in keys}) + [""]
    for picture in pictures:
        lines += [f"![{picture.stem.replace('_', ' ')}](../{picture.relative_to(DOCS.parent).as_posix()})", ""]
    taken = f"Commit {machine['commit']}, {machine['date']}, torch {machine['torch']}, Triton {machine['triton']}."
    product = f"{limits['matmul']} matrix product {limits['matmul_tflops']:.4g} TFLOP/s"
    copy = f"copy {limits['copy_gb_per_s']:.4g} GB/s"
    return [*lines, f"{taken} Ceilings in the same run: {product}, {copy}.", ""]


def page() -> str:
    lines = HEAD.splitlines() + [""]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.name != "report.json"]
        results = [result for result in found if "benchmark" in result and result.get("rows")]
        if not results:
            continue
        machine = results[0]["machine"]
        lines += [f"## {machine['device']}", ""]
        if machine["kind"] != "cuda":
            lines += ["Small shapes on a CPU: these figures say nothing about the GPU kernels.", ""]
        for result in results:
            name = result["benchmark"]
            lines += section(result, sorted({*folder.glob(f"{name}.png"), *folder.glob(f"{name}_*.png")}))
    return "\n".join(lines)


if __name__ == "__main__":
    (DOCS / "results.md").write_text(page())
