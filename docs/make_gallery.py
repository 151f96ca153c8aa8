"""Draws docs/gallery.md: `python docs/make_gallery.py`. A test compares what is committed with what this makes."""

from pathlib import Path

import torch

from mimo_kernels.attention import FrameMask

DOCS = Path(__file__).resolve().parent
CELL = 14  # pixels of a token in a drawing

MASKS = {
    "bidirectional": (
        "Every token of a clip sees every other one: DFoT and video DiTs. Clips do not see each other.",
        "FrameMask.bidirectional([[12], [8]])",
    ),
    "block-causal": (
        "A frame sees itself and all before it: FAR, and every cached rollout.",
        "FrameMask.block_causal([[4, 4, 4, 4, 4]])",
    ),
    "window-and-sink": (
        "The latest two frames, and the first one for good: long rollouts in constant memory.",
        "FrameMask.block_causal([[4, 4, 4, 4, 4]], window=2, sink=1)",
    ),
    "the-last-frames-ask": (
        "Keys of all frames, queries of the last two: a chunk behind a cached prefix.",
        "FrameMask.block_causal([[4, 4, 4, 4, 4]], queries=slice(-2, None))",
    ),
    "teacher-forcing": (
        "Clean history beside noisy future, which sees the history before it and itself: MiMo, ACDiT, Self-Forcing.",
        "FrameMask.teacher_forcing([[4, 4, 4]], [[4, 4, 4]])",
    ),
    "masked-history": (
        "MiMo: tokens of the history are dropped, here two of four; there are fewer keys and no holes.",
        "FrameMask.teacher_forcing([[2, 2, 2]], [[4, 4, 4]])",
    ),
    "dropped-history": (
        "History guidance: single future frames are cut off from their history in training.",
        "FrameMask.teacher_forcing([[4, 4, 4]], [[4, 4, 4]], drop_history=[[False, True, False]])",
    ),
    "the-future-first": (
        "Other codes put the noisy frames first.",
        "FrameMask.teacher_forcing([[4, 4, 4]], [[4, 4, 4]], future_first=True)",
    ),
    "slices": (
        "Whatever else: ranges of queries by ranges of keys, as many for a row as it takes.",
        "FrameMask.from_slices([(0, 8), (8, 16), (8, 16), (8, 16)], [(0, 8), (0, 2), (4, 6), (9, 16)], num_queries=16)",
    ),
}


def draw(dense: torch.Tensor) -> str:
    """bool [queries, keys] as an SVG: a square per pair, dark where the query sees the key."""
    queries, keys = dense.shape
    width, height = keys * CELL + 1, queries * CELL + 1
    squares = [
        f'<rect x="{k * CELL + 1}" y="{q * CELL + 1}" width="{CELL - 1}" height="{CELL - 1}" '
        f'fill="{"#3f51b5" if dense[q, k] else "#9e9e9e"}" fill-opacity="{1 if dense[q, k] else 0.18}"/>'
        for q in range(queries)
        for k in range(keys)
    ]
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *squares, "</svg>", ""])


def page() -> dict[str, str]:
    """Every file of the gallery by its path in docs/."""
    lines = [
        "# Masks, drawn",
        "",
        "A row is a query, a column a key; what is dark is seen. Frames have four tokens where nothing else is said.",
        "Made by `docs/make_gallery.py` with `mask.to_dense()`; `print(mask)` draws any mask frame by frame.",
        "",
    ]
    files = {}
    for name, (words, code) in MASKS.items():
        mask = eval(code, {"FrameMask": FrameMask})
        files[f"gallery/{name}.svg"] = draw(mask.to_dense())
        title = name.replace("-", " ").capitalize()
        lines += [f"## {title}", "", words, "", "```python", code, "```", ""]
        pairs = f"{mask.num_pairs} pairs of {mask.num_queries} queries and {mask.num_keys} keys"
        lines += [f"![{title}: {pairs}](gallery/{name}.svg)", "", f"{pairs}.", ""]
    return {"gallery.md": "\n".join(lines), **files}


if __name__ == "__main__":
    for name, text in page().items():
        path = DOCS / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
