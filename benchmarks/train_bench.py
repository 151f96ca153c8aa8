"""One training step of MiMo: time, model FLOP utilisation and peak memory, against ACDiT and against a compiler's
version of the same model; and the data that feeds it: clips per second of every stage, and the share of the step spent
waiting for a batch (see data_pipeline.py); and every system beside the others, a step and a sampled frame, in tokens,
floating-point operations and time (see system_costs.py).

    python benchmarks/train_bench.py [--out bench_results] [--batch CLIPS] [--networks NAME ...]
        [--parts step data systems] [--data FOLDER]

    MiMo                            this package: history tube-masked, both losses
    ACDiT                           this package: history whole, no decoder, the diffusion loss alone
    torch.compile + FlexAttention   MiMo in plain PyTorch, compiled whole, with block masks made beforehand

A step is forward, backward, clipping and AdamW in bf16 autocast over fp32 weights. The mask ratio is fixed at the
middle of its range and no frame loses its history, so that every step has one shape and one mask. G is the time that
the step's matrix products (attention left out) take at the ceiling measured in the same run. Without a GPU a small
network runs in fp32, and the compiled version uses the reference attention.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import common
import system_costs
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from mimo import MiMo, MiMoConfig
from mimo.recipes import build_recipe
from mimo.recipes.acdit import acdit
from mimo.recipes.base import step_generator
from mimo_kernels.attention import FrameMask

PARTS = ("step", "data", "systems")
MIMO, ACDIT, BASELINE = "MiMo", "ACDiT", "torch.compile + FlexAttention"


def networks(device: torch.device) -> dict[str, tuple[MiMoConfig, int]]:
    """name -> config with one shape for every step, and clips per step."""
    if device.type != "cuda":
        small = MiMoConfig(depth=2, dim=128, heads=4, height=8, width=8, channels=8, decoder_layer=1, decoder_depth=1)
        found = {"small": (small, 4)}
    else:
        found = {name: (MiMoConfig.from_preset(name), 16) for name in ("mimo-xl-k600", "mimo-xl-ucf101-uncond")}
    for name, (config, clips) in found.items():
        ratio = sum(config.mask_ratio) / 2
        found[name] = replace(config, mask_ratio=(ratio, ratio), history_dropout=0.0), clips
    return found


class Step:
    """A training step of one network on fixed data; calling it makes one."""

    def __init__(self, config: MiMoConfig, clips: int, device: torch.device, backend: str):
        self.device = device
        self.model = MiMo(config, backend=backend).to(device)
        self.recipe = build_recipe(config, backend=backend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        self.latents = torch.randn(clips, *config.latent_shape, device=device)
        self.generator = step_generator(0, 0, device)
        self.given: dict[str, Tensor] = {}
        if config.repa_weight > 0:  # as `mimo encode` stores them; making them in the step is the encoder's cost
            shape = (clips, *config.latent_shape[:3], config.repa_channels)
            self.given["features"] = torch.randn(shape, device=device)

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.recipe.loss(self.model, self.latents, generator=self.generator, **self.given).total

    def __call__(self) -> None:
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def masks_of(step: Step) -> tuple[FrameMask, FrameMask, list[FrameMask]]:
    """The masks of every step of this network (those without dropped history are kept): of the blocks, of a last block
    whose history nobody reads, of the decoder."""
    seen, compute = [], step.model.compute

    def remember(packed, decodings, *arguments):
        seen.append((packed.mask, packed.last_mask, [decoding.mask for decoding in decodings.values()]))
        return compute(packed, decodings, *arguments)

    with mock.patch.object(step.model, "compute", remember), torch.no_grad():
        step.loss()
    return seen[-1]


def compiled_baseline(step: Step) -> Callable[[], None]:
    """The step with the network compiled whole; on a GPU with FlexAttention in place of frame_attention."""
    if step.device.type != "cuda":
        step.model.compute = torch.compile(step.model.compute, fullgraph=True)
        return step
    blocks, last, decoder = masks_of(step)
    for mask in (blocks, last, *decoder):
        one = FrameMask.from_table(mask.pattern, key_lens=mask.key_lens[:1])  # all clips are alike
        sizes = one.num_queries, one.num_keys
        mask.block_mask = create_block_mask(one.to_mask_mod(step.device), None, None, *sizes, step.device)
    step.model.compute = torch.compile(step.model.compute, fullgraph=True)

    def run() -> None:
        with mock.patch("mimo.network.network.frame_attention", flex_frame_attention):
            step()

    return run


def flex_frame_attention(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask, *, backend: str) -> Tensor:
    q, k, v = (x.unflatten(0, (mask.num_clips, -1)).transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask.block_mask).transpose(1, 2).flatten(0, 1)


def work(step: Step) -> dict[str, float]:
    """GFLOP of a step: matrix products outside attention, counted as they run; and attention, 3.5 times its forward's
    useful work."""
    config, (mask, last, decoder) = step.model.config, masks_of(step)
    with FlopCounterMode(display=False) as counter:
        step.loss().backward()
    step.optimizer.zero_grad()
    counts = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counts.items() if "mm" in str(op))
    pairs = (config.depth - 1) * mask.num_pairs + last.num_pairs
    pairs += sum(config.decoder_depth * each.num_pairs for each in decoder)
    return {"matmul_gflop": products / 1e9, "attention_gflop": 3.5 * 4 * pairs * config.dim / 1e9}


def measure(
    name: str,
    config: MiMoConfig,
    clips: int,
    device: torch.device,
    limits: dict,
    seconds: float = 1e6,
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """One row per version, saved as they come. One version lives at a time, so that each has the memory for itself."""
    baseline = BASELINE if device.type == "cuda" else "torch.compile, reference attention"
    versions = {MIMO: (config, "auto"), ACDIT: (acdit(config), "auto"), baseline: (config, "reference")}
    end = time.perf_counter() + seconds
    rows, losses = [], {}
    for version, (wanted, backend) in versions.items():
        row = {"network": name, "clips": clips, "version": version}
        try:
            torch.manual_seed(0)
            step = Step(wanted, clips, device, backend)
            row |= work(step)
            losses[version] = float(step.loss().detach())
            with common.at_most(max(1.0, end - time.perf_counter())):
                run = compiled_baseline(step) if version == baseline else step
                run()  # compiles, and makes the optimizer's state
            row["peak_gib"] = total_memory(run, device)
            timing = common.interleaved(
                {"step": run}, device, seconds=8.0 if device.type == "cuda" else 1.0, max_runs=20
            )
            row |= {"ms": timing["step"].median, "p20": timing["step"].p20, "p80": timing["step"].p80}
        except Exception as error:  # that a version fails is a result, main tells of ours
            row["note"] = f"failed: {common.one_line(error)}"
        step = run = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch._dynamo.reset()
        rows.append(row)
        finish(rows, limits)
        save(rows)
    if {MIMO, baseline} <= losses.keys() and not abs(losses[MIMO] - losses[baseline]) <= 0.02 * abs(losses[baseline]):
        rows[0]["note"] = (
            f"wrong: it starts at loss {losses[MIMO]}, the same network in plain PyTorch at {losses[baseline]}"
        )
    return rows


def finish(rows: list[dict], limits: dict) -> None:
    """What follows from the times: utilisation, the ratio to G, and the ratios between versions."""
    ours = rows[0].get("ms")
    for row in rows:
        if "ms" not in row:
            continue
        seconds = row["ms"] / 1000
        floor = row["matmul_gflop"] / limits["matmul_tflops"] / 1000
        total = row["matmul_gflop"] + row["attention_gflop"]
        row |= {"g_ms": 1000 * floor, "step_over_g": seconds / floor}
        row["mfu_percent"] = 100 * total / 1000 / seconds / limits["matmul_tflops"]
        if ours is not None:
            row["mimo_over_this"] = ours / row["ms"]


def total_memory(function: Callable, device: torch.device) -> float | None:
    """GiB at the peak, weights and optimizer state included."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_results"))
    parser.add_argument("--batch", type=int, help="clips per step")
    parser.add_argument("--networks", nargs="+", metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=("step", "data"))
    parser.add_argument("--data", type=Path, help="a folder of videos; without it, videos are made")
    parser.add_argument("--minutes", type=float, default=1e4, help="the compiled version is given up beyond this")
    arguments = parser.parse_args()

    end = time.perf_counter() + 60 * arguments.minutes
    device = common.default_device()
    known = networks(device)
    chosen = arguments.networks or list(known)[:1]  # compiling the other one takes another minute
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown network {unknown[0]!r}; on {device.type} there are {', '.join(known)}")
    header, limits = common.machine(device), common.ceilings(device)
    common.print_header("Training step", header, limits)
    if device.type != "cuda":
        print("  No GPU: a small network on the CPU. These figures say nothing about the GPU kernels.")
    tables, wrong = [], []
    if "data" in arguments.parts:  # first: its workers are forked before anything big is there
        try:
            import data_pipeline  # needs a decoder of videos, the step does not
        except ImportError as error:
            tables.append(f"the data part is left out: {common.one_line(error)}")
        else:
            rows = data_pipeline.measure(data_pipeline.size(device), device, arguments.data)
            tables.append(data_pipeline.report(arguments.out, header, limits, rows))
    if "step" in arguments.parts:
        rows = []
        for name in chosen:
            config, clips = known[name]
            left = end - time.perf_counter() - (8.0 if device.type == "cuda" else 0.0)  # to time it

            def save(new: list[dict], before: list[dict] = rows) -> None:
                report(arguments.out, header, limits, [*before, *new])

            rows += measure(name, config, arguments.batch or clips, device, limits, left, save)
        tables.append(report(arguments.out, header, limits, rows))
        wrong = [
            f"{row['network']}: {row['note']}" for row in rows if row["version"] in (MIMO, ACDIT) and "note" in row
        ]
    if "systems" in arguments.parts:
        rows = system_rows(device)
        tables.append(systems_report(arguments.out, header, limits, rows))
        wrong += [f"{row['system']}: {row['note']}" for row in rows if "note" in row]
    print("\n\n".join([*tables, *wrong]))
    return int(bool(wrong))


def system_rows(device: torch.device, chosen: dict[str, str] | None = None, seconds: float = 1.0) -> list[dict]:
    """Every system by its preset (`chosen`; None: all): work and time of a training step per clip, and of a frame."""
    rows = []
    for system, preset in (chosen or system_costs.systems(device)).items():
        row: dict = {"what": "systems", "system": system, "preset": preset}
        try:
            config = MiMoConfig.from_preset(preset)
            clips = max(1, system_costs.TOKENS // (config.frames * config.tokens)) if device.type == "cuda" else 1
            row |= system_costs.of_training(config) | system_costs.of_sampling(preset, device) | {"clips": clips}
            row["train_gflop"] = row["matmul_gflop"] + row["attention_gflop"]
            step, sample = Step(config, clips, device, "auto"), system_costs.Sampling(preset, device)
            for name, run, share in (("train_ms", step, clips), ("sample_ms", sample, sample.made)):
                run()  # the optimizer's state, graphs, plans
                row[name] = common.interleaved({name: run}, device, seconds=seconds, max_runs=10)[name].median / share
        except Exception as error:  # that a system fails is a result, main tells of it
            row["note"] = f"failed: {common.one_line(error)}"
        step = sample = None
        gc.collect()
        rows.append(row)
    base = next((row for row in rows if row["system"] == "acdit" and "note" not in row), None)
    for row in rows if base else ():
        for name in ("train_gflop", "sample_gflop"):
            if name in row:
                row[f"{name}_over_acdit"] = row[name] / base[name]
    return rows


def systems_report(out: Path, header: dict, limits: dict, rows: list[dict]) -> str:
    """Writes systems.json, systems.csv and systems.png; returns three tables: the systems, Table 8 and Fig. 6."""
    counted = system_costs.table_8(), system_costs.long_contexts(system_costs.LONG)
    plot = {"group": "system", "bar": "what", "value": "train_gflop", "panel": "what", "unit": "GFLOP per clip"}
    every = [*rows, *({"system": row["preset"], **row} for part in counted for row in part)]
    path = common.write_results(out, "systems", header, limits, every, plot)
    work = {"rows": "rows", "pairs": "pairs", "matmul_gflop": "matmul GFLOP", "attention_gflop": "attention GFLOP"}
    tables = [
        common.format_table(
            rows,
            {"system": "system", "preset": "preset", "tokens": "tokens/clip", **work}
            | {"train_gflop_over_acdit": "/ ACDiT", "train_ms": "ms/clip", "sample_steps": "steps"}
            | {"sample_gflop": "GFLOP/frame", "sample_gflop_over_acdit": "/ ACDiT", "sample_ms": "ms/frame"}
            | {"note": "note"},
        ),
        "MiMo's Table 8, a training step:\n"
        + common.format_table(
            counted[0],
            {"preset": "preset", **work, "train_gflop": "GFLOP/clip", "ratio": "/ ACDiT"}
            | {"paper_ratio": "paper's FLOPs / ACDiT", "paper_time": "paper's time / ACDiT"},
        ),
        "FAR's Fig. 6, a clip of many frames:\n"
        + common.format_table(
            counted[1], {"preset": "preset", "frames": "frames", **work, "train_gflop": "GFLOP/clip"}
        ),
    ]
    return "\n\n".join(tables) + f"\n{path}"


def report(out: Path, header: dict, limits: dict, rows: list[dict]) -> str:
    """Writes train.json, train.csv and train.png; returns the table."""
    plot = {"group": "network", "bar": "version", "value": "ms", "panel": "what", "unit": "ms per step"}
    path = common.write_results(out, "train", header, limits, [{"what": "training step", **row} for row in rows], plot)
    columns = {
        "network": "network", "clips": "clips", "version": "version", "ms": "ms", "p20": "20%", "p80": "80%",
        "step_over_g": "step / G",
        "mfu_percent": "MFU %", "peak_gib": "peak GiB", "mimo_over_this": "MiMo / this", "note": "note",
    }  # fmt: skip
    return f"{common.format_table(rows, columns)}\n{path}"


if __name__ == "__main__":
    sys.exit(main())
