"""frame_attention against its peers: forward and backward, on every shape that matters, each row after a correctness
check.

    python benchmarks/attn_bench.py [--out bench_results] [--shapes k600-xl wan-tf] [--seconds 0.3] [--minutes 5]

Writes attention.json and attention.csv under --out after every implementation and direction, attention.png at the end,
and prints a table last. Every peer is timed in turn with frame_attention, round after round, so that clocks and
neighbours hit both alike. With --minutes it begins no shape that would not fit; the first ones matter most. Exits with
status 1 if frame_attention failed or was wrong on a shape. Without a GPU it runs small shapes on the CPU, where there
is no fused FlexAttention backward and no Triton.

Useful TFLOP/s count the allowed query-key pairs at the true head dim, 4 FLOPs per pair and channel forward and 2.5
times that backward; executed ones count what the kernel computes for it: whole tiles (ours 128 x 64, FlexAttention 128
x 128), whole matrices, padded head dims.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common  # first: it finds the packages of this checkout
import torch
import torch._functorch.config
from attn_peers import PUBLISHED, Unavailable, candidates, exact_attention

from mimo_kernels.attention import FrameMask

OURS = "frame_attention"
PREPARE_SECONDS = 90  # for an implementation to make its mask, compile and run once
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # relative root mean square deviation from fp32
COLUMNS = {
    "shape": "shape",
    "implementation": "implementation",
    "direction": "direction",
    "ms": "ms",
    "ms_p20": "20%",
    "ms_p80": "80%",
    "useful_tflops": "useful TFLOP/s",
    "executed_tflops": "executed",
    "percent_of_ceiling": "% ceiling",
    "speedup_of_ours": "ours is x faster",
    "peak_mib": "peak MiB",
    "error": "rms error",
}
ONCE = {
    "shape": "shape",
    "implementation": "implementation",
    "mask_seconds": "mask",
    "metadata_seconds": "metadata",
    "first_call_seconds": "first call",
}
PUBLISHED_COLUMNS = {
    "implementation": "implementation",
    "mask": "mask",
    "forward_tflops": "forward TFLOP/s",
    "backward_tflops": "backward TFLOP/s",
    "source": "source",
}
PLOT = {
    "group": "shape",
    "bar": "implementation",
    "value": "useful_tflops",
    "panel": "direction",
    "unit": "useful TFLOP/s",
}


@dataclass
class Shape:
    name: str
    what: str
    mask: FrameMask
    heads: int
    head_dim: int
    kv_heads: int | None = None  # None: as many as heads
    mask_mod: Callable | None = None  # the rule as arithmetic, for FlexAttention, where all frames have one length


def teacher_forcing(name, what, clips, frames, tokens, kept, heads, head_dim, kv_heads=None) -> Shape:
    mask = FrameMask.teacher_forcing([[kept] * frames] * clips, [[tokens] * frames] * clips)
    history = frames * kept

    def mask_mod(b, h, q_idx, kv_idx):
        q_future, k_future = q_idx >= history, kv_idx >= history
        q_frame = torch.where(q_future, (q_idx - history) // tokens, q_idx // kept)
        k_frame = torch.where(k_future, (kv_idx - history) // tokens, kv_idx // kept)
        earlier = ~k_future & torch.where(q_future, k_frame < q_frame, k_frame <= q_frame)
        return earlier | (q_future & k_future & (q_frame == k_frame))

    return Shape(name, what, mask, heads, head_dim, kv_heads, mask_mod)


def block_causal(name, what, clips, frames, tokens, heads, head_dim) -> Shape:
    mask = FrameMask.block_causal([[tokens] * frames] * clips)
    return Shape(
        name, what, mask, heads, head_dim, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx // tokens <= q_idx // tokens
    )


def ragged(name, what, clips, frames, tokens, kept, heads, head_dim) -> Shape:
    draw = random.Random(0)
    history, future = [], []
    for _ in range(clips):
        count, share = draw.randint(*frames), draw.randint(*kept)
        history.append([share] * count)
        future.append([tokens] * count)
    return Shape(name, what, FrameMask.teacher_forcing(history, future), heads, head_dim)


def last_frames(name, what, clips, frames, tokens, asked, heads, head_dim) -> Shape:
    mask = FrameMask.block_causal([[tokens] * frames] * clips, queries=slice(-asked, None))
    return Shape(name, what, mask, heads, head_dim)


def slices(name, what, chunks, tokens, heads, head_dim) -> Shape:
    """Every chunk sees the first one, the one in the middle before it, the latest two and itself: up to four intervals,
    told as ranges of queries and of keys."""
    seen = [sorted({0, chunk // 2, max(chunk - 2, 0), max(chunk - 1, 0), chunk}) for chunk in range(chunks)]
    pairs = [(chunk, other) for chunk, others in enumerate(seen) for other in others]
    q_ranges, k_ranges = ([(i * tokens, (i + 1) * tokens) for i in side] for side in zip(*pairs))
    mask = FrameMask.from_slices(q_ranges, k_ranges, num_queries=chunks * tokens)
    return Shape(name, what, mask, heads, head_dim)


def gpu_shapes() -> list[Shape]:
    return [
        teacher_forcing("k600-xl", "MiMo-XL training", 32, 5, 256, 160, 16, 72),
        teacher_forcing("wan-tf", "teacher forcing of a 1.3B video DiT", 1, 21, 1560, 1560, 12, 128),
        teacher_forcing("minecraft-b", "long clips", 1, 300, 64, 40, 12, 64),
        ragged("ragged", "k600-xl, 128..192 kept per clip, 2..5 frames", 32, (2, 5), 256, (128, 192), 16, 72),
        teacher_forcing("ucf-xl", "MiMo-XL training", 32, 16, 64, 40, 16, 72),
        teacher_forcing("k600-b", "MiMo-B training", 32, 5, 256, 160, 12, 64),
        block_causal("far-xl", "block causal, one copy", 32, 16, 64, 18, 64),
        teacher_forcing("wan-gqa", "wan-tf with 3 query heads to a key head", 1, 21, 1560, 1560, 12, 128, kv_heads=4),
        teacher_forcing("magi-tracks", "temporal layers of MAGI: a token per frame", 8 * 256, 16, 1, 1, 16, 80),
        last_frames("rollout", "the last 3 of 21 frames ask", 1, 21, 1560, 3, 12, 128),
        slices("slices", "from_slices, up to 4 intervals", 32, 1024, 12, 128),
    ]


def cpu_shapes() -> list[Shape]:
    return [
        teacher_forcing("cpu-tf", "teacher forcing", 2, 16, 64, 64, 4, 64),
        teacher_forcing("cpu-kept", "teacher forcing, 40 of 64 kept", 2, 16, 64, 40, 4, 72),
        block_causal("cpu-causal", "block causal, one copy", 2, 16, 64, 4, 64),
        ragged("cpu-ragged", "24..48 kept per clip, 4..16 frames", 3, (4, 16), 64, (24, 48), 4, 64),
        teacher_forcing("cpu-gqa", "cpu-tf with 4 query heads to a key head", 2, 16, 64, 64, 4, 64, kv_heads=1),
        last_frames("cpu-rollout", "the last 3 of 16 frames ask", 2, 16, 64, 3, 4, 64),
        slices("cpu-slices", "from_slices, up to 4 intervals", 16, 64, 4, 64),
    ]


def bench(
    shape: Shape,
    device: torch.device,
    ceiling_tflops: float,
    seconds: float,
    save: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """A row per implementation and direction. `save` is told of all there are after each."""
    mask, heads, head_dim = shape.mask, shape.heads, shape.head_dim
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    asked, seen = (mask.num_queries, heads, head_dim), (mask.num_keys, shape.kv_heads or heads, head_dim)
    sizes = (asked, seen, seen, asked)
    q, k, v, dout = (torch.randn(size, device=device, dtype=dtype, generator=generator) for size in sizes)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    exact = exact_attention(mask, *inputs, dout)
    table, ours = [], None
    for label, make in candidates(device, shape.mask_mod).items():
        row, peer = {"implementation": label}, None
        try:
            with common.at_most(PREPARE_SECONDS):
                peer, row = _prepare(make, shape, inputs, dout, exact, device)
        except Unavailable as reason:
            row["note"] = str(reason)
        except Exception as error:  # that a peer fails is a result; that ours does, main tells
            row["note"] = f"failed: {common.one_line(error)}"
        ours = peer if label == OURS else ours
        for direction in ("forward", "backward"):
            timed = {"shape": shape.name, "direction": direction, "head_dim": head_dim, "tokens": mask.num_queries}
            timed |= row
            if peer is not None and direction == "backward" and peer.forward_only:
                timed["note"] = "forward only"
            elif peer is not None:
                both = {OURS: ours, label: peer} if ours else {label: peer}
                timings = _timings(both, direction, inputs, dout, device, seconds)
                timed |= _figures(timings[label], peer, direction, dtype, mask.num_pairs, ceiling_tflops)
                if ours:
                    timed["speedup_of_ours"] = timings[label].median / timings[OURS].median
            table.append(timed)
            save(table)
    return table


def _timings(peers: dict, direction: str, inputs, dout, device, seconds: float) -> dict[str, common.Timing]:
    functions = {
        label: _forward(peer, inputs) if direction == "forward" else _backward(peer, inputs, dout)
        for label, peer in peers.items()
    }
    return common.interleaved(functions, device, seconds=seconds, min_runs=10 if device.type == "cuda" else 3)


def _prepare(make, shape: Shape, inputs, dout, exact, device) -> tuple:
    """The implementation, checked against fp32, and what its row says beside the times."""
    peer = make(shape.mask, device, shape.heads, shape.head_dim, shape.kv_heads)
    start = time.perf_counter()
    _forward_backward(peer, inputs, dout)  # compiles
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    peer.prepare_seconds["first call"] = time.perf_counter() - start
    results = []
    peak = common.peak_memory(lambda: results.extend(_forward_backward(peer, inputs, dout)), device)
    error = max(_deviation(result, truth) for result, truth in zip(results, exact))
    if not error <= TOLERANCE[dout.dtype]:
        raise AssertionError(f"{peer.name} is wrong: rms error {error:.2e}, allowed {TOLERANCE[dout.dtype]:.0e}")
    row = {"implementation": peer.name, "error": error, "peak_mib": peak}
    return peer, row | {f"{what}_seconds".replace(" ", "_"): spent for what, spent in peer.prepare_seconds.items()}


def _forward_backward(peer, inputs, dout) -> list[torch.Tensor]:
    if peer.forward_only:
        return [_forward(peer, inputs)()]
    out = peer(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def _forward(peer, inputs) -> Callable:
    plain = [x.detach() for x in inputs]
    return lambda: peer(*plain)


def _backward(peer, inputs, dout) -> Callable:
    out = peer(*inputs)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _deviation(result: torch.Tensor, truth: torch.Tensor) -> float:
    return ((result.float() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def _figures(timing, peer, direction, dtype, pairs, ceiling_tflops) -> dict:
    flops = 4 * pairs * peer.heads * peer.head_dim * (2.5 if direction == "backward" else 1.0)
    useful = flops * 1e-9 / timing.median
    return {
        "ms": timing.median,
        "ms_p20": timing.p20,
        "ms_p80": timing.p80,
        "runs": timing.runs,
        "useful_tflops": useful,
        "executed_tflops": peer.executed(direction, dtype) * 1e-9 / timing.median,
        "percent_of_ceiling": 100 * useful / ceiling_tflops,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--shapes", nargs="+", help="names; all by default")
    parser.add_argument("--seconds", type=float, default=0.3, help="timed per implementation and direction")
    parser.add_argument("--minutes", type=float, help="begin no shape that would end later")
    arguments = parser.parse_args()

    budget = common.Budget(arguments.minutes)
    device = common.default_device()
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # the backward is timed alone, again and again
    shapes = gpu_shapes() if device.type == "cuda" else cpu_shapes()
    if arguments.shapes:
        known = [shape.name for shape in shapes]
        if unknown := set(arguments.shapes) - set(known):
            parser.error(f"unknown shapes {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
        shapes = [shape for shape in shapes if shape.name in arguments.shapes]

    header, limits = common.machine(device), common.ceilings(device)
    common.print_header("frame_attention benchmark", header, limits)
    if device.type != "cuda":
        print("  no GPU: small shapes in fp32 on the CPU; the figures say nothing about the GPU kernels")
    rows, sizes, result = [], {}, None
    save = partial(common.save_results, arguments.out, "attention", header, limits, plot=PLOT, shapes=sizes)
    for shape in budget.of(shapes):
        mask = shape.mask
        print(
            f"{shape.name}: {shape.what}; {mask.num_clips} clips, {mask.num_queries} queries, "
            f"{mask.num_pairs} pairs, {shape.heads} x {shape.head_dim}",
            flush=True,
        )
        table = repr(mask).splitlines()[0]
        sizes[shape.name] = {"what": shape.what, "mask": table, "heads": shape.heads, "head_dim": shape.head_dim}
        with_new = partial(_saved, save, rows)
        rows = rows + bench(shape, device, limits["matmul_tflops"], arguments.seconds, with_new)
        result = save(rows=rows)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return _tell(arguments, budget, rows, result)


def _saved(save: Callable, before: list[dict], new: list[dict]) -> None:
    save(rows=before + new)


def _tell(arguments: argparse.Namespace, budget: common.Budget, rows: list[dict], result: dict | None) -> int:
    """Prints what was measured and what was not; the exit status."""
    measured = [row for row in rows if "ms" in row]
    print("\nseconds spent once per mask or per length (the first call compiles):")
    print(common.format_table([row for row in measured if row["direction"] == "forward"], ONCE))
    absent = {}
    for row in rows:
        if "note" in row:
            absent.setdefault(f"{row['implementation']}: {row['note']}", {})[row["shape"]] = None
    print()
    for what, where in absent.items():
        print(f"not measured: {what} ({', '.join(where)})")
    if budget.left_out:
        print(
            f"not measured within {arguments.minutes:g} minutes: {', '.join(shape.name for shape in budget.left_out)}"
        )
    print("\n" + common.format_table(measured, COLUMNS))
    print("\ntold by others, on an H100 at 128 channels and 32k tokens, and not measured here:")
    print(common.format_table(list(PUBLISHED), PUBLISHED_COLUMNS))
    if result is not None:
        common.draw(arguments.out, result)
        written = (arguments.out / f"attention.{kind}" for kind in ("json", "csv", "png"))
        print(", ".join(str(path) for path in written if path.exists()))
    wrong = sorted(
        {f"{row['shape']}: {row['note']}" for row in rows if row["implementation"] == OURS and "note" in row}
    )
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
