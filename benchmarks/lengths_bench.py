"""What changing lengths cost: frame_attention and FlexAttention on batches whose clips are never the same.

    python benchmarks/lengths_bench.py [--out bench_results] [--shapes k600-xl] [--minutes 3]

A training run draws other lengths for every batch: frames per clip, tokens kept per clip. For each batch the mask is
built and attention runs forward and backward, all on the clock, up to the device's last kernel:

    mask           the mask alone, on the host (FlexAttention: its block mask)
    first call     of the process: compiling included
    new lengths    a batch like no other before it: mask, schedule or block mask, compiling where lengths ask for it
    known lengths  the same batches again: masks and schedules are there

FlexAttention runs compiled as it comes: torch.compile finds for itself that lengths vary. On the CPU it runs eagerly,
which is forward only; frame_attention then is timed forward only too. Writes lengths.json, .csv and .png under --out
after every implementation and prints a table last.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common  # first: it finds the packages of this checkout
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mimo_kernels.attention import FrameMask, frame_attention

COLUMNS = {
    "shape": "shape",
    "what": "what",
    "implementation": "implementation",
    "ms": "ms",
    "ms_p20": "20%",
    "ms_p80": "80%",
    "note": "note",
}
PLOT = {"group": "what", "bar": "implementation", "value": "ms", "panel": "shape", "unit": "ms"}


@dataclass
class Shape:
    """clips of `tokens` per future frame; frames and kept tokens are drawn for every clip of every batch."""

    name: str
    what: str
    clips: int
    frames: tuple[int, int]
    tokens: int
    kept: tuple[int, int]
    heads: int
    head_dim: int
    batches: int

    def lens(self) -> list[tuple[list[list[int]], list[list[int]]]]:
        """(history, future) of every batch."""
        draw, batches = random.Random(0), []
        for _ in range(self.batches):
            clips = [(draw.randint(*self.frames), draw.randint(*self.kept)) for _ in range(self.clips)]
            history = [[kept] * frames for frames, kept in clips]
            batches.append((history, [[self.tokens] * frames for frames, _ in clips]))
        return batches


GPU_SHAPES = (
    Shape("k600-xl", "2..5 frames of 256, 128..192 kept per clip", 32, (2, 5), 256, (128, 192), 16, 72, 8),
    Shape("ucf-xl", "8..16 frames of 64, 24..48 kept per clip", 32, (8, 16), 64, (24, 48), 16, 72, 8),
)
CPU_SHAPES = (Shape("cpu-ragged", "4..8 frames of 16, 6..12 kept per clip", 2, (4, 8), 16, (6, 12), 2, 64, 4),)


class Ours:
    name = "frame_attention"
    backward = True

    def __init__(self, device: torch.device):
        self.device = device

    def mask(self, history: list[list[int]], future: list[list[int]]) -> FrameMask:
        return FrameMask.teacher_forcing(history, future)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: FrameMask) -> Tensor:
        return frame_attention(q, k, v, mask)


class Flex:
    def __init__(self, device: torch.device):
        self.device, self.backward = device, device.type == "cuda"
        self.name = "FlexAttention, compiled" if self.backward else "FlexAttention, eager"
        self.compute = torch.compile(flex_attention) if self.backward else flex_attention

    def mask(self, history: list[list[int]], future: list[list[int]]):
        """From the bounds of every row on the device: our mask costs some microseconds of it."""
        frames = FrameMask.teacher_forcing(history, future)
        rows, mask_mod = frames.num_tokens, frames.to_mask_mod(self.device)
        return create_block_mask(mask_mod, None, None, rows, rows, device=str(self.device), _compile=self.backward)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return self.compute(*heads_first, block_mask=mask).squeeze(0).transpose(0, 1)


def measure(shape: Shape, attention, device: torch.device) -> list[dict]:
    """A row per line of the head of this file."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spent: dict[str, list[float]] = {"mask": [], "first call": [], "new lengths": [], "known lengths": []}
    made = []
    for i, (history, future) in enumerate(shape.lens()):
        tokens = sum(map(sum, history)) + sum(map(sum, future))
        x = torch.randn(4, tokens, shape.heads, shape.head_dim, device=device, dtype=dtype).unbind()
        start = _now(device)
        made.append((attention.mask(history, future), x))
        built = _now(device)
        _attend(attention, device, *made[-1])
        spent["first call" if i == 0 else "new lengths"].append(_now(device) - start)
        if i:  # the first one may compile
            spent["mask"].append(built - start)
    for mask, x in made:
        start = _now(device)
        _attend(attention, device, mask, x)
        spent["known lengths"].append(_now(device) - start)
    rows = []
    for what, times in spent.items():
        fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
        figures = {"ms": statistics.median(times), "ms_p20": fifths[0], "ms_p80": fifths[3], "runs": len(times)}
        rows.append({"shape": shape.name, "what": what, "implementation": attention.name} | figures)
    return rows


def _now(device: torch.device) -> float:
    """Milliseconds, behind all that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def _attend(attention, device: torch.device, mask, x: tuple[Tensor, ...]) -> None:
    *inputs, dout = x
    if device.type != "cuda":
        attention.attend(*inputs, mask)
        return
    inputs = [x.detach().requires_grad_() for x in inputs]
    torch.autograd.grad(attention.attend(*inputs, mask), inputs, dout)


def bench(shapes, device: torch.device, save: Callable[[list[dict]], object], budget: common.Budget) -> list[dict]:
    rows = []
    for shape, make in budget.of([(shape, make) for shape in shapes for make in (Ours, Flex)]):
        attention = make(device)
        torch._dynamo.reset()
        try:
            rows += measure(shape, attention, device)
        except Exception as error:  # that a peer fails is a result
            rows.append({"shape": shape.name, "implementation": attention.name, "note": common.one_line(error)})
        save(rows)
    return rows


def main() -> int:
    device = common.default_device()
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in shapes], help="all by default")
    parser.add_argument("--minutes", type=float, help="begin nothing that would end later")
    arguments = parser.parse_args()

    header, limits = common.machine(device), common.ceilings(device)
    common.print_header("changing lengths", header, limits)
    if device.type != "cuda":
        print("  no GPU: small shapes in fp32, forward alone; the figures say nothing about the GPU kernels")
    chosen = [shape for shape in shapes if not arguments.shapes or shape.name in arguments.shapes]
    sizes = {
        shape.name: {"what": shape.what, "mask": f"{shape.batches} batches", "heads": shape.heads}
        | {"head_dim": shape.head_dim}
        for shape in chosen
    }
    save = partial(common.save_results, arguments.out, "lengths", header, limits, plot=PLOT, shapes=sizes)
    budget = common.Budget(arguments.minutes)
    rows = bench(chosen, device, lambda rows: save(rows=rows), budget)
    for shape, make in budget.left_out:
        print(f"not measured within {arguments.minutes:g} minutes: {shape.name}, {make.__name__}")
    print("\n" + common.format_table(rows, COLUMNS))
    common.draw(arguments.out, save(rows=rows))
    failed = [row for row in rows if row["implementation"] == Ours.name and "note" in row]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
