"""What every system costs: the tokens and floating-point operations of a training step and of a sampled frame.

    python benchmarks/train_bench.py --parts systems

Nothing is assumed of a system. A training step runs as it is, forward and backward, on tensors without values (the
meta device), so that the largest presets can be counted on any machine: matrix products as they run, attention from the
pairs of its mask. A sampled frame is counted while the sampler makes it, on tensors with values, and both are timed.

    matrix products      2 m n k each, backward included, counted by torch.utils.flop_counter
    attention            4 pairs (heads x head_dim) forward, and 2.5 times that backward; pairs: FrameMask.num_pairs
                         of every call, or what a frame sees of its cache

The frozen encoder of REPA is not counted. Beside it stand the papers' figures: Table 8 of MiMo's, whose unit is not
given, as ratios to ACDiT; and the tokens of a long context, FAR's Fig. 6.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import common  # noqa: F401 (puts the checkout first)
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mimo import MiMo, MiMoConfig
from mimo.config import PRESETS, SampleConfig
from mimo.network.frames import to_tokens
from mimo.presets import TINY_SYSTEMS
from mimo.recipes import build_recipe
from mimo.recipes.base import Prepared, step_generator
from mimo.sampling.sampler import Sampler

TABLE_8 = {"mimo-xl": (8.22, 0.750), "acdit-xl": (8.81, 0.788), "far-xl": (5.94, 0.704)}  # "GFLOPs" and seconds
LONG = ("far-b-minecraft", "far-long-b-dmlab")  # of one size, and as many tokens in a frame
CONTEXTS = (16, 32, 64, 128, 256)  # frames; of 128 FAR's Sec. 4.3 says that they are more than 8K tokens
TRAINED = 3.5  # attention's forward and backward over its forward
TOKENS = 20_480  # of all clips together in a timed step on a GPU


class Work:
    """Floating-point operations, of what runs inside `counting`."""

    def __init__(self) -> None:
        self.products = self.attention = self.pairs = 0.0

    @contextlib.contextmanager
    def counting(self, trained: bool) -> Iterator[None]:
        """trained: a backward follows every attention."""
        inside = 0.0  # what the counter sees of attention, which is counted here

        def counted(function, pairs_of):
            def call(q: Tensor, k: Tensor, v: Tensor, *arguments, **options):
                nonlocal inside
                pairs, before = pairs_of(q, *arguments, **options), counter.get_total_flops()
                self.pairs += pairs
                self.attention += (TRAINED if trained else 1.0) * 4 * pairs * q.shape[-1] * q.shape[-2]
                out = function(q, k, v, *arguments, **options)
                inside += counter.get_total_flops() - before
                return out

            return call

        with contextlib.ExitStack() as stack, FlopCounterMode(display=False) as counter:
            for name, pairs_of in (("frame_attention", _masked), ("paged_frame_attention", _paged)):
                for module in [m for key, m in sys.modules.items() if key.split(".")[0] == "mimo"]:
                    if function := vars(module).get(name):
                        stack.enter_context(mock.patch.object(module, name, counted(function, pairs_of)))
            yield
        self.products += counter.get_total_flops() - inside

    @property
    def total(self) -> float:
        return self.products + self.attention


def _masked(q: Tensor, mask, **_) -> float:
    return mask.num_pairs * (q.shape[0] if q.dim() == 4 else 1)


def _paged(q: Tensor, cache, *, view, self_mask=None, **_) -> float:
    sequences, new = q.shape[:2]
    pages = view.page_rows.cpu().unbind(0), view.num_pages.tolist()
    seen = sum(int(rows[:count].sum()) for rows, count in zip(*pages))
    own = sequences * new * new if self_mask is None else self_mask.num_pairs * sequences
    return new * seen + own


def _meta(value):
    """Without values; tuples and what has names in them likewise."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_meta, value))
    return value


def of_training(config: MiMoConfig, clips: int = 8) -> dict[str, float]:
    """Of a clip in a training step, the mean of `clips` for systems that draw their frames: `tokens` of the clip,
    `rows` of its frames, `pairs` of query and key over all layers, GFLOP of matrix products and of attention. A ratio
    of masking lies in the middle of its range, and no frame loses its history."""
    middle = sum(config.mask_ratio) / 2
    config = replace(config, mask_ratio=(middle, middle), history_dropout=0.0)
    recipe, work = build_recipe(config, backend="reference"), Work()
    with torch.device("meta"):
        model = MiMo(config)
    given = conditions(config, clips, config.frames, torch.device("cpu"))
    if config.repa_weight > 0:
        given["features"] = torch.empty(clips, *config.latent_shape[:3], config.repa_channels, device="meta")
    latents, generator = torch.randn(clips, *config.latent_shape), step_generator(0, 0, "cpu")
    with _without_values(recipe, model) as rows, work.counting(trained=True):
        recipe.loss(model, latents, generator=generator, **given).total.backward()
    found = {"rows": sum(rows), "pairs": work.pairs}
    found |= {"matmul_gflop": work.products / 1e9, "attention_gflop": work.attention / 1e9}
    return {"tokens": config.frames * config.tokens} | {name: value / clips for name, value in found.items()}


@contextlib.contextmanager
def _without_values(recipe, model: MiMo) -> Iterator[list[int]]:
    """The recipe draws its frames with values; network and loss run on the meta device, which knows no autocast. Gives
    the rows of every call of the network."""
    frames, forward, rows = recipe.frames, model.forward, []

    def drawn(*arguments):
        prepared = frames(*arguments)._asdict()
        return Prepared(**{name: _meta(value) if name != "batch" else value for name, value in prepared.items()})

    def run(batch, **options):
        rows.append(sum(frame.tokens for frame in batch.frames.frames))
        moved = {name: _meta(value) for name, value in vars(batch).items() if name != "frames"}
        return forward(replace(batch, **moved), **options)

    with (
        mock.patch.object(recipe, "frames", drawn),
        mock.patch.object(model, "forward", run),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
    ):
        yield rows


def conditions(config: MiMoConfig, clips: int, frames: int, device: torch.device) -> dict[str, Tensor]:
    """What a network is told, one and the same for all clips."""
    given = {}
    if config.num_classes:
        given["labels"] = torch.zeros(clips, dtype=torch.int64, device=device)
    if config.num_actions:
        given["actions"] = torch.zeros(clips, frames, dtype=torch.int64, device=device)
    if config.max_interval:
        given["intervals"] = torch.ones(clips, dtype=torch.int64, device=device)
    return given


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
