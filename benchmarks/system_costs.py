"""What every system costs: the tokens and floating-point operations of a training step and of a sampled frame.

    python benchmarks/train_bench.py --parts systems

A training step is counted as mimo.costs says, a sampled frame while the sampler makes it, on tensors with values, and
both are timed. Beside them stand the papers' figures: Table 8 of MiMo's, whose unit is not given, as ratios to ACDiT;
and the tokens of a long context, FAR's Fig. 6.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import common  # noqa: F401 (puts the checkout first)
import torch

from mimo import MiMo, MiMoConfig
from mimo.config import PRESETS, SampleConfig
from mimo.costs import Work, conditions, of_training
from mimo.network.frames import to_tokens
from mimo.presets import TINY_SYSTEMS
from mimo.sampling.sampler import Sampler

TABLE_8 = {"mimo-xl": (8.22, 0.750), "acdit-xl": (8.81, 0.788), "far-xl": (5.94, 0.704)}  # "GFLOPs" and seconds
LONG = ("far-b-minecraft", "far-long-b-dmlab")  # of one size, and as many tokens in a frame
CONTEXTS = (16, 32, 64, 128, 256)  # frames; of 128 FAR's Sec. 4.3 says that they are more than 8K tokens
TOKENS = 20_480  # of all clips together in a timed step on a GPU


class Sampling:
    """Sampling one video as a preset says; calling it makes one."""

    def __init__(self, preset: str, device: torch.device, backend: str = "auto"):
        self.config, self.device = MiMoConfig.from_preset(preset), device
        self.sampling = sampling = SampleConfig.from_preset(preset)
        torch.manual_seed(0)
        self.sampler = Sampler(MiMo(self.config, backend=backend).to(device).eval(), sampling)
        self.made = sampling.num_frames - sampling.context_frames

    @torch.no_grad()
    def __call__(self) -> None:
        config, sampling = self.config, self.sampling
        context, generator = None, torch.Generator(self.device).manual_seed(0)
        if sampling.context_frames:
            latents = torch.randn(1, sampling.context_frames, *config.latent_shape[1:], device=self.device)
            context = to_tokens(latents, config.patch)
        given = conditions(config, 1, sampling.num_frames, self.device)
        options = given if context is not None or given else {"batch": 1}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            for _ in self.sampler.stream(context, sampling.num_frames, generator=generator, **options):
                pass


def of_sampling(preset: str, device: torch.device) -> dict[str, float]:
    """GFLOP per frame made: all steps, all branches of guidance, and the frames that become history, the context among
    them. In plain PyTorch, as a replayed graph would count as little as it launches."""
    run, work = Sampling(preset, device, backend="reference"), Work()
    with work.counting(trained=False):
        run()
    return {"sample_gflop": work.total / 1e9 / run.made, "sample_steps": run.sampling.steps}


def systems(device: torch.device) -> dict[str, str]:
    """The preset of every system: the tiny ones on a CPU, its first preset of the largest network on a GPU."""
    if device.type != "cuda":
        return {system: f"{system}-tiny" for system in TINY_SYSTEMS}
    found = {}
    for system in TINY_SYSTEMS:
        names = [name for name in PRESETS if family(name) == system and not name.endswith("-tiny")]
        sizes = {name: MiMoConfig.from_preset(name) for name in names or [f"{system}-tiny"]}
        found[system] = max(sizes, key=lambda name: sizes[name].depth * sizes[name].dim ** 2)
    return found


def family(preset: str) -> str:
    """The system that a preset is of: the longest one that its name begins with."""
    return max((s for s in TINY_SYSTEMS if preset.startswith(f"{s}-")), key=len, default="")


def table_8() -> list[dict]:
    """The presets of the largest networks on K600 and UCF-101 beside the paper's ratios, each to ACDiT of its data."""
    rows = []
    for data in ("k600", "ucf101-uncond"):
        counts = {kind: of_training(MiMoConfig.from_preset(f"{kind}-{data}")) for kind in TABLE_8}
        totals = {kind: found["matmul_gflop"] + found["attention_gflop"] for kind, found in counts.items()}
        for kind, (flops, seconds) in TABLE_8.items():
            paper = {"paper_ratio": flops / TABLE_8["acdit-xl"][0], "paper_time": seconds / TABLE_8["acdit-xl"][1]}
            ours = {"train_gflop": totals[kind], "ratio": totals[kind] / totals["acdit-xl"]}
            rows.append({"what": "Table 8", "preset": f"{kind}-{data}", **counts[kind], **ours, **paper})
    return rows


def long_contexts(presets: tuple[str, ...], contexts: tuple[int, ...] = CONTEXTS) -> list[dict]:
    """Tokens and work of one clip of so many frames: FAR's Fig. 6, where all frames are whole and where distant ones
    are coarse, as many as can be drawn."""
    rows = []
    for preset in presets:
        config = MiMoConfig.from_preset(preset)
        for frames in contexts:
            with mock.patch.object(torch, "randint", lambda high, size=(), **_: torch.full(size, high - 1)):
                found = of_training(replace(config, frames=frames, video_frames=frames * config.compression[0]), 1)
            total = found["matmul_gflop"] + found["attention_gflop"]
            rows.append({"what": "Fig. 6", "preset": preset, "frames": frames, **found, "train_gflop": total})
    return rows
