"""A rollout with gradients: time and memory of attention to a paged cache against caches that are cloned or joined.

    python benchmarks/rollout_bench.py [--out bench_results] [--minutes M]

Frame after frame goes through the same layers of attention, each made from the output of the one before and seeing a
window of finished frames as constants; then one backward through all of them (Self-Forcing's training, without the
rest of its network). Peers, both over scaled_dot_product_attention: keys and values of the history joined by torch.cat,
which every frame saves anew for its backward; and a buffer of the window, cloned for every frame because the next one
writes to it. All of them first have to give the same gradients. "saved" counts every byte that autograd keeps until the
backward, the pool of pages included. Without a GPU it runs small in fp32 on the CPU.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_kernels import FrameCache, paged_frame_attention


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int  # of a frame
    frames: int
    window: int
    batch: int = 1


def shapes(device: torch.device) -> list[Shape]:
    if device.type != "cuda":
        return [Shape("16 frames of 64 tokens", 2, 2, 2, 32, 64, 16, 8)]
    return [
        Shape("21 frames of 1,560 tokens, 12 heads (Wan 1.3B)", 4, 12, 12, 128, 1560, 21, 21),
        Shape("64 frames of 256 tokens, window 16", 8, 16, 16, 72, 256, 64, 16, batch=2),
        Shape("64 frames of 256 tokens, window 16, 4 of 16 heads", 8, 16, 4, 128, 256, 64, 16, batch=2),
    ]


class Network(torch.nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        self.split = [shape.heads, shape.kv_heads, shape.kv_heads]
        self.qkv = torch.nn.ModuleList(
            torch.nn.Linear(width, sum(self.split) * shape.head_dim, bias=False) for _ in range(shape.layers)
        )

    def forward(self, x: Tensor, attend: Callable) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """A frame, and the keys and values of every layer, detached."""
        kept = []
        for layer, qkv in enumerate(self.qkv):
            normed = F.layer_norm(x, x.shape[-1:])
            q, k, v = qkv(normed).unflatten(-1, (-1, self.shape.head_dim)).split(self.split, -2)
            kept.append((k.detach(), v.detach()))
            x = x + attend(layer, q, k, v).flatten(-2)
        return x, kept


def paged(network: Network, x: Tensor) -> Tensor:
    s, total = network.shape, x.new_zeros(())
    size = min(64, s.tokens)
    pages = FrameCache.pages_for(s.frames, s.tokens, sequences=s.batch, page_size=size)
    kind = {"dtype": x.dtype, "device": x.device}
    cache = FrameCache(s.layers, s.kv_heads, s.head_dim, num_pages=pages, page_size=size, **kind)
    seqs = [cache.new_sequence() for _ in range(s.batch)]
    for _ in range(s.frames):
        # Pinned, so that what is saved can be counted; a live view with a refresh per frame does as well.
        view = cache.view(seqs, max_pages=pages // s.batch, pinned=True)
        attend = functools.partial(_attend_to_pages, cache, view)
        x, kept = network(x, attend)
        cache.append(seqs, *zip(*kept))
        for seq in seqs:
            cache.evict(seq, window=s.window)
        total = total + x.float().square().mean()
    return total


def _attend_to_pages(cache, view, layer, q, k, v):
    return paged_frame_attention(q, k, v, cache, layer=layer, view=view)


def joined(network: Network, x: Tensor) -> Tensor:
    """torch.cat of the frames of the window in every layer."""
    s, total = network.shape, x.new_zeros(())
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(s.layers)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (torch.cat([*(p[i] for p in past[layer]), own], 1) for i, own in ((0, k), (1, v)))
        return sdpa(q, keys, values)

    for _ in range(s.frames):
        x, kept = network(x, attend)
        for frames, new in zip(past, kept):
            frames.append(new)
            del frames[: max(0, len(frames) - s.window)]
        total = total + x.float().square().mean()
    return total


def cloned(network: Network, x: Tensor) -> Tensor:
    """A buffer of the window and of one frame more per layer. It is cloned for every frame: what is written into it
    otherwise is what the backward of frames before has saved."""
    s, total, filled = network.shape, x.new_zeros(()), 0
    buffers = x.new_zeros(s.layers, 2, s.batch, (s.window + 1) * s.tokens, s.kv_heads, s.head_dim)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = buffers[layer].clone()
        end = filled + s.tokens
        both[:, :, filled:end] = torch.stack([k, v])
        return sdpa(q, *both[:, :, :end])

    for _ in range(s.frames):
        x, kept = network(x, attend)
        if filled == s.window * s.tokens:
            buffers = buffers.roll(-s.tokens, 3)
            filled -= s.tokens
        for buffer, new in zip(buffers, kept):
            buffer[:, :, filled : filled + s.tokens] = torch.stack(new)
        filled += s.tokens
        total = total + x.float().square().mean()
    return total


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)


IMPLEMENTATIONS = {"paged": paged, "torch.cat": joined, "cloned cache": cloned}


def saved_mib(rollout: Callable, network: Network, x: Tensor) -> float:
    """Every storage that autograd keeps for the backward, once; without the weights, which are there anyway."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, Tensor] = {}  # kept alive, so that no address comes twice

    def pack(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        rollout(network, x)
    return sum(x.untyped_storage().nbytes() for place, x in storages.items() if place not in weights) / 2**20


def gradients(rollout: Callable, network: Network, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(rollout(network, x), list(network.parameters()))


def bench(shape: Shape, device: torch.device, seconds: float = 3.0) -> list[dict]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = Network(shape).to(device, dtype)
    x = torch.randn(shape.batch, shape.tokens, shape.heads * shape.head_dim, device=device, dtype=dtype)
    runs = {name: functools.partial(gradients, rollout, network, x) for name, rollout in IMPLEMENTATIONS.items()}
    expected = runs["torch.cat"]()
    for name, run in runs.items():
        for actual, exact in zip(run(), expected):
            error = ((actual - exact).float().norm() / exact.float().norm()).item()
            if not error < (1e-4 if dtype == torch.float32 else 5e-2):
                raise SystemExit(f"{shape.name}: {name} has other gradients than torch.cat, relative error {error:.2e}")
    timings = common.interleaved(runs, device, seconds=seconds, min_runs=3)
    rows = []
    for name, rollout in IMPLEMENTATIONS.items():
        rows.append(
            {
                "what": "rollout with gradients",
                "shape": shape.name,
                "implementation": name,
                "frames": shape.frames,
                "ms": timings[name].median,
                "ms_p20": timings[name].p20,
                "ms_p80": timings[name].p80,
                "saved_mib": saved_mib(rollout, network, x),
                "peak_mib": common.peak_memory(runs[name], device),
            }
        )
    for row in rows:
        row["speedup_of_ours"] = row["ms"] / rows[0]["ms"]
        row["saved_over_ours"] = row["saved_mib"] / rows[0]["saved_mib"]
    return rows


COLUMNS = {
    "shape": "shape",
    "implementation": "implementation",
    "ms": "ms/rollout",
    "ms_p20": "p20",
    "ms_p80": "p80",
    "saved_mib": "saved MiB",
    "peak_mib": "peak MiB",
    "speedup_of_ours": "speed-up of paged",
    "saved_over_ours": "saved / paged",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--shapes", nargs="+", help="names; all by default")
    parser.add_argument("--minutes", type=float, help="begin no shape that would end later")
    arguments = parser.parse_args()

    budget, device = common.Budget(arguments.minutes), common.default_device()
    chosen = shapes(device)
    if arguments.shapes:
        known = [shape.name for shape in chosen]
        if unknown := set(arguments.shapes) - set(known):
            parser.error(f"unknown shapes {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
        chosen = [shape for shape in chosen if shape.name in arguments.shapes]
    header, limits = common.machine(device), common.ceilings(device)
    common.print_header("rollout benchmark", header, limits)
    if device.type != "cuda":
        print("  no GPU: a small rollout in fp32 on the CPU; the times say nothing about the GPU kernels")
    rows: list[dict] = []
    bars = {"group": "shape", "bar": "implementation", "value": "saved_mib", "panel": "what", "unit": "saved MiB"}
    for shape in budget.of(chosen):
        print(shape.name, flush=True)
        rows += bench(shape, device)
        common.save_results(arguments.out, "rollout", header, limits, rows, bars)
    if budget.left_out:
        print(
            f"not measured within {arguments.minutes:g} minutes: {', '.join(shape.name for shape in budget.left_out)}"
        )
    path = common.write_results(arguments.out, "rollout", header, limits, rows, bars)
    print("\n" + common.format_table(rows, COLUMNS))
    print(f"{path}, {path.with_suffix('.csv')}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
