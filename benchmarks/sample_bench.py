"""Sampling: time per frame and per step, launches, host reads and memory of the paged cache against its peers.

    python benchmarks/sample_bench.py [--out bench_results] [--shapes NAME ...]

Peers, over the same network and sampler: no cache (the history is computed anew in every step), a contiguous cache that
`torch.cat` joins with every frame, and a buffer of a fixed number of frames that is shifted when it is full and keeps
its length on the device, as Self-Forcing does. All of them first have to make the same video as the paged cache.

FAR's Fig. 11 in miniature stands below: a long video of FAR without and with a cache, and of FAR-Long with its
multi-level cache, seconds beside those of the paper and both over the last.

The limit is what the machine needs for the matrix products of the steps alone, or for reading the weights once per
step, whichever is longer, at the ceilings measured in the same run. Without a GPU small networks run in fp32 on the
CPU.
"""

import argparse
import functools
from dataclasses import dataclass, replace
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mimo import MiMo, MiMoConfig
from mimo.config import SampleConfig
from mimo.sampling.history import CachedHistory, CachePolicy, History
from mimo.sampling.sampler import Sampler

WINDOW = 8  # frames, of "paged, window" and of the shifted buffer


@dataclass(frozen=True)
class Shape:
    name: str
    network: MiMoConfig
    batch: int
    frames: int
    steps: int
    uncached: bool = True  # False: too slow to wait for


def shapes(device: torch.device) -> list[Shape]:
    flow = {"parameterization": "flow", "mask_weight": 0.0}
    if device.type != "cuda":
        tiny = {"depth": 2, "dim": 64, "heads": 2, "channels": 8, "decoder_layer": 1} | flow
        square = MiMoConfig(**tiny, height=8, width=8)
        small = MiMoConfig(**tiny, height=4, width=4)
        return [Shape("64 tokens", square, 1, 64, 8), Shape("16 tokens, batch 8", small, 8, 24, 4)]
    xl = {"depth": 28, "dim": 1152, "heads": 16, "channels": 16, "decoder_layer": 23} | flow
    base = {"depth": 12, "dim": 768, "heads": 12, "channels": 32, "decoder_layer": 9} | flow
    found = [Shape("XL, 256 tokens", MiMoConfig(**xl, height=16, width=16), 1, 16, 50, uncached=False)]
    found.append(Shape("B, 64 tokens", MiMoConfig(**base, height=8, width=8), 1, 256, 10))
    for batch, side in ((1, 4), (16, 8), (64, 8), (8, 16)):
        network = MiMoConfig(**base, height=side, width=side)
        found.append(Shape(f"B, {side * side} tokens, batch {batch}", network, batch, 16, 20, uncached=False))
    return found


@dataclass(frozen=True)
class LongVideo:
    """network: FAR-Long's; without its coarse frames it is FAR's."""

    name: str
    network: MiMoConfig
    frames: int
    steps: int


FIG_11 = {"no cache": 1341, "cache": 171, "multi-level cache": 104}  # seconds for 256 frames, FAR's Fig. 11


def long_videos(device: torch.device) -> list[LongVideo]:
    far_long = {"recipe": "far_long", "parameterization": "flow", "coarse_stride": 4, "height": 8, "width": 8}
    far_long |= {"mask_weight": 0.0, "mask_ratio": (0.0, 0.0), "separate_ln": False}
    if device.type != "cuda":
        tiny = {"depth": 2, "dim": 64, "heads": 2, "channels": 8, "decoder_layer": 1, "frames": 48, "fine_frames": 8}
        return [LongVideo("Fig. 11, 64 tokens", MiMoConfig(**far_long, **tiny), 48, 16)]
    base = {"depth": 12, "dim": 768, "heads": 12, "channels": 32, "frames": 256, "fine_frames": 16}
    return [LongVideo("Fig. 11, FAR-B", MiMoConfig(**far_long, **base), 256, 50)]


class Concatenated(History):
    """Contiguous keys and values per layer, joined with the frame's own by torch.cat in every layer of every step."""

    def begin(self, clips) -> None:
        c = self.model.config
        self.past = [
            torch.zeros(2, self.size, 0, c.heads, c.head_dim, dtype=self.key.dtype, device=self.device)
        ] * c.depth

    def record(self, x) -> None:
        def attend(layer, q, k, v):
            new = torch.stack([x.unflatten(0, (self.size, -1)) for x in (k, v)])
            out = self.attend(layer, q, k, v)
            self.past[layer] = torch.cat([self.past[layer], new], 2)
            return out

        self.model.history_frame(x.to(self.key.dtype), self.conditions.position, attend)

    def attend(self, layer, q, k, v):
        q, k, v = (x.unflatten(0, (self.size, -1)) for x in (q, k, v))
        k, v = (torch.cat([past, own], 1) for past, own in zip(self.past[layer], (k, v)))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    def end(self) -> None:
        self.past = []


class Shifted(History):
    """A buffer of WINDOW frames per layer; the frame's keys and values are written behind the history in every step.
    When it is full it is shifted by a copy; how far it is filled stands on the device and is read in every layer."""

    def begin(self, clips) -> None:
        c = self.model.config
        shape = (c.depth, 2, self.size, WINDOW * self.tokens, c.heads, c.head_dim)
        self.buffer = torch.zeros(shape, dtype=self.key.dtype, device=self.device)
        self.filled = torch.zeros(c.depth, dtype=torch.int64, device=self.device)

    def record(self, x) -> None:
        self.model.history_frame(x.to(self.key.dtype), self.conditions.position, self.attend)
        self.filled += self.tokens
        if self.filled[0].item() == self.buffer.shape[3]:
            for layer in self.buffer:
                layer[:, :, : -self.tokens] = layer[:, :, self.tokens :].clone()
            self.filled -= self.tokens

    def attend(self, layer, q, k, v):
        begin = self.filled[layer].item()
        end = begin + self.tokens
        for buffer, own in zip(self.buffer[layer], (k, v)):
            buffer[:, begin:end] = own.unflatten(0, (self.size, -1))
        q = q.unflatten(0, (self.size, -1)).transpose(1, 2)
        k, v = (buffer[:, :end].transpose(1, 2) for buffer in self.buffer[layer])
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    def end(self) -> None:
        self.buffer = None


def samplers(model: MiMo, config: SampleConfig, uncached: bool = True) -> dict[str, Sampler]:
    """Name -> sampler; those with a window see WINDOW frames."""
    found = {"paged": Sampler(model, config), "paged, window": Sampler(model, config, policy=CachePolicy(WINDOW))}
    found["torch.cat"] = Sampler(model, config)
    found["torch.cat"].history_type = Concatenated
    found["shifted buffer"] = Sampler(model, config)
    found["shifted buffer"].history_type = Shifted
    if model.head.weight.is_cuda:
        found["paged, frame graph"] = Sampler(model, config, graph="frame")
    if uncached:
        found["no cache"] = Sampler(model, config, use_cache=False)
    return found


class Calls(TorchDispatchMode):
    """Counts operators, those of them that compute (neither views nor allocations), and values read back."""

    def __init__(self):
        super().__init__()
        self.operators = self.launches = self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(made.alias_info is not None and not made.alias_info.is_write for made in function._schema.returns)
        self.operators += 1
        self.launches += not views and not function.overloadpacket.__name__.startswith(("empty", "new_empty"))
        self.reads += function.overloadpacket is torch.ops.aten._local_scalar_dense
        return function(*args, **(kwargs or {}))


def calls_per_step(sampler: Sampler, shape: Shape) -> tuple[float, float]:
    """Operators that the host issues per denoising step (a captured graph is one), and values it reads back."""
    stream = sampler.stream(None, 4, batch=shape.batch)
    next(stream)
    if sampler.history_type is CachedHistory and sampler.model.head.weight.is_cuda:
        return (1.0 if sampler.graph == "step" else 1 / shape.steps), 0.0
    with Calls() as calls:
        next(stream)
    return calls.operators / shape.steps, calls.reads / shape.steps


def launches(model: MiMo, shape: Shape) -> dict[str, int]:
    """Operators of the paged sampler that compute something: of one denoising step and of one pass as history. That is
    what a captured graph holds; on a GPU each of our operators is one kernel, in plain PyTorch it is several."""
    config = SampleConfig(sampler="euler", steps=2, num_frames=3)
    stream = Sampler(model, config).stream(None, 3, batch=shape.batch)
    next(stream)
    run, counts = stream.run, {}
    run.index.zero_()
    run.history.reserve()
    for name, part in (("launches_per_step", run.step), ("launches_per_history", run.record)):
        with torch.no_grad(), Calls() as calls:
            part.function()
        counts[name] = calls.launches
    stream.close()
    return counts


def step_limit(shape: Shape, model: MiMo, limits: dict) -> float:
    """Milliseconds: the longer of a step's arithmetic without attention and one reading of the weights."""
    weights = [p for block in model.blocks for p in block.parameters()]
    # Modulation works on one row per frame, everything else on every token.
    dense = sum(m.weight.numel() for block in model.blocks for m in (block.attention.qkv, block.attention.proj))
    dense += sum(layer.weight.numel() for block in model.blocks for layer in (block.mlp.up, block.mlp.down))
    flops = 2 * dense * shape.batch * model.config.tokens
    return 1000 * max(
        flops / (1e12 * limits["matmul_tflops"]), sum(p.nbytes for p in weights) / (1e9 * limits["copy_gb_per_s"])
    )


def check(model: MiMo, shape: Shape) -> None:
    """All implementations make the same video while the window holds it."""
    config = SampleConfig(sampler="euler", steps=2, num_frames=WINDOW)
    videos = {
        name: sampler.sample(None, WINDOW, batch=min(2, shape.batch), generator=torch.Generator().manual_seed(0))
        for name, sampler in samplers(model, config).items()
    }
    for name, video in videos.items():
        error = (video - videos["paged"]).norm() / videos["paged"].norm()
        if not error < (1e-5 if video.device.type == "cpu" else 2e-2):
            raise SystemExit(
                f"{shape.name}: {name} makes another video than the paged cache, relative error {error:.2e}"
            )


def build(network: MiMoConfig, device: torch.device) -> MiMo:
    torch.manual_seed(0)
    with torch.device(device):
        model = MiMo(network).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def bench(shape: Shape, device: torch.device, limits: dict) -> tuple[list[dict], dict[str, list[float]]]:
    model = build(shape.network, device)
    check(model, shape)
    config = SampleConfig(sampler="euler", steps=shape.steps, num_frames=shape.frames)
    limit = (shape.steps + 1) * step_limit(shape, model, limits)
    group, memory, calls = samplers(model, config, shape.uncached), {}, {}
    for name, sampler in group.items():
        calls[name] = calls_per_step(sampler, shape)
        if name != "no cache":  # compiles and captures
            run = functools.partial(sampler.sample, None, shape.frames, batch=shape.batch)
            memory[name] = common.peak_memory(run, device)
    counted = launches(model, shape)
    # Frame by frame in turn, so that clocks and neighbours hit all alike.
    streams = {name: sampler.stream(None, shape.frames, batch=shape.batch) for name, sampler in group.items()}
    for _ in range(shape.frames):
        for stream in streams.values():
            next(stream)
    rows, curves = [], {}
    for name, sampler in group.items():
        # The first frames have no history and the last one is not cached: they are shown, not counted.
        seconds = [latency() for latency in sampler.latencies]
        curves[name] = [1000 * s for s in seconds]
        late = torch.tensor(curves[name][len(seconds) // 2 : -1])
        rows.append(
            {
                "what": "time per frame",
                "shape": shape.name,
                "implementation": name,
                "frames": shape.frames,
                "steps": shape.steps,
                "ms": late.median().item(),
                "ms_p20": late.quantile(0.2).item(),
                "ms_p80": late.quantile(0.8).item(),
                "ms_per_step": late.median().item() / (shape.steps + 1),
                "frames_per_s": shape.batch * len(seconds) / sum(seconds),
                "total_s": sum(seconds),
                "times_limit": late.median().item() / limit,
                "late_over_early": (late.median() / torch.tensor(curves[name][WINDOW:-1][:5]).median()).item(),
                "calls_per_step": calls[name][0],
                "reads_per_step": calls[name][1],
                "peak_mib": memory.get(name),
                **(counted if name.startswith("paged") else {}),
            }
        )
    for row in rows:
        row["speedup_of_ours"] = row["total_s"] / rows[0]["total_s"]
    return rows, curves


def networks(video: LongVideo, device: torch.device) -> tuple[MiMo, MiMo]:
    """FAR and FAR-Long with the same weights, as far as both have them."""
    far_long = build(video.network, device)
    far = build(replace(video.network, recipe="far", coarse_stride=0, fine_frames=0), device)
    far.load_state_dict({name: far_long.state_dict()[name] for name in far.state_dict()})
    return far, far_long


def bench_long(video: LongVideo, device: torch.device) -> list[dict]:
    """Seconds for a long video, with every cache, after a look that it is the video of no cache."""
    config = SampleConfig(sampler="euler", steps=video.steps, num_frames=video.frames)
    few = replace(config, steps=2, num_frames=video.network.fine_frames + 2)
    far, far_long = networks(video, device)
    for model in (far, far_long):
        made = [
            Sampler(model, few, use_cache=cached).sample(
                None, few.num_frames, generator=torch.Generator().manual_seed(0)
            )
            for cached in (True, False)
        ]
        error = (made[0] - made[1]).norm() / made[1].norm()
        if not error < (1e-5 if device.type == "cpu" else 2e-2):
            raise SystemExit(f"{video.name}: the cache makes another video than none, relative error {error:.2e}")
    group = {"no cache": Sampler(far, config, use_cache=False), "cache": Sampler(far, config)}
    group["multi-level cache"] = Sampler(far_long, config)
    rows = []
    for name, sampler in group.items():
        if device.type == "cuda" and name != "no cache":  # compiles and captures
            sampler.sample(None, video.frames)
        sampler.sample(None, video.frames)
        seconds = [latency() for latency in sampler.latencies]
        rows.append(
            {
                "what": "FAR Fig. 11",
                "shape": video.name,
                "implementation": name,
                "frames": video.frames,
                "steps": video.steps,
                "ms": 1000 * torch.tensor(seconds).median().item(),
                "total_s": sum(seconds),
                "cache_mib": sampler.cache_bytes(1, 0, video.frames, labels=False, actions=False) / 2**20,
                "paper_s": FIG_11[name],
            }
        )
    rows[0]["cache_mib"] = 0.0
    for row in rows:
        row["over_multi_level"] = row["total_s"] / rows[-1]["total_s"]
        row["paper_over_multi_level"] = row["paper_s"] / rows[-1]["paper_s"]
    return rows


def plot_frames(path: Path, title: str, curves: dict[str, dict[str, list[float]]]) -> None:
    """Time of every frame, a panel per shape."""
    try:
        import matplotlib
    except ImportError:
        print("no plot of the frames: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(curves), 1, figsize=(7, 3.2 * len(curves)), squeeze=False)
    for axis, (shape, lines) in zip(axes[:, 0], curves.items()):
        for name, milliseconds in lines.items():
            axis.plot(milliseconds[:-1], label=name)
        axis.set_yscale("log")
        axis.set_title(f"{title}: {shape}", fontsize=10)
        axis.set_xlabel("frames generated before")
        axis.set_ylabel("ms per frame")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


COLUMNS = {
    "shape": "shape",
    "implementation": "implementation",
    "ms": "ms/frame",
    "ms_per_step": "ms/step",
    "frames_per_s": "frames/s",
    "total_s": "total s",
    "times_limit": "x limit",
    "late_over_early": "late/early",
    "calls_per_step": "calls/step",
    "reads_per_step": "reads/step",
    "launches_per_step": "launches/step",
    "launches_per_history": "launches/history",
    "peak_mib": "MiB",
    "speedup_of_ours": "speed-up of paged",
}
LONG_COLUMNS = {
    "shape": "shape",
    "implementation": "implementation",
    "frames": "frames",
    "steps": "steps",
    "total_s": "total s",
    "over_multi_level": "over multi-level",
    "paper_s": "paper's s",
    "paper_over_multi_level": "paper's over multi-level",
    "cache_mib": "cache MiB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--shapes", nargs="+", help="names; all by default")
    parser.add_argument("--minutes", type=float, help="begin no shape that would end later")
    parser.add_argument("--frames", type=int, help="frames to generate, instead of the shape's")
    arguments = parser.parse_args()

    budget = common.Budget(arguments.minutes)
    device = common.default_device()
    chosen: list[Shape | LongVideo] = [*shapes(device), *long_videos(device)]
    if arguments.shapes:
        known = [shape.name for shape in chosen]
        if unknown := set(arguments.shapes) - set(known):
            parser.error(f"unknown shapes {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
        chosen = [shape for shape in chosen if shape.name in arguments.shapes]
    if arguments.frames:
        if arguments.frames < 2 * WINDOW:
            parser.error(f"--frames {arguments.frames}: expected at least {2 * WINDOW}, two windows")
        chosen = [replace(shape, frames=arguments.frames) for shape in chosen]

    header, limits = common.machine(device), common.ceilings(device)
    common.print_header("sampling benchmark", header, limits)
    if device.type != "cuda":
        print("  no GPU: small networks in fp32 on the CPU; the figures say nothing about the GPU kernels")
    rows, curves = [], {}
    bars = {"group": "shape", "bar": "implementation", "value": "ms", "panel": "what", "unit": "ms"}
    for shape in budget.of(chosen):
        print(f"{shape.name}: {shape.frames} frames, {shape.steps} steps", flush=True)
        if isinstance(shape, LongVideo):
            rows += bench_long(shape, device)
        else:
            measured, curves[shape.name] = bench(shape, device, limits)
            rows += measured
        common.save_results(arguments.out, "sampling", header, limits, rows, bars, ms_of_every_frame=curves)
    if budget.left_out:
        print(
            f"not measured within {arguments.minutes:g} minutes: {', '.join(shape.name for shape in budget.left_out)}"
        )
    path = common.write_results(arguments.out, "sampling", header, limits, rows, bars, ms_of_every_frame=curves)
    if curves:
        plot_frames(path.with_name("sampling_frames.png"), header["device"], curves)
    for what, columns in (("time per frame", COLUMNS), ("FAR Fig. 11", LONG_COLUMNS)):
        if some := [row for row in rows if row["what"] == what]:
            print("\n" + common.format_table(some, columns))
    print(f"{path}, {path.with_suffix('.csv')}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
