"""What a training step costs: the tokens and floating-point operations of any network and recipe.

Nothing is assumed of a system. A training step runs as it is, forward and backward, on tensors without values (the
meta device), so that the largest presets can be counted on any machine: matrix products as they run, attention from the
pairs of its mask.

    matrix products      2 m n k each, backward included, counted by torch.utils.flop_counter
    attention            4 pairs (heads x head_dim) forward, and 2.5 times that backward; pairs: FrameMask.num_pairs
                         of every call, or what a frame sees of its cache

The frozen encoder of REPA is not counted.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mimo.config import MiMoConfig, TrainConfig
from mimo.network.network import MiMo
from mimo.recipes import build_recipe
from mimo.recipes.acdit import acdit
from mimo.recipes.base import Prepared, step_generator

TRAINED = 3.5  # attention's forward and backward over its forward


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
    of masking lies in the middle of its range, and no frame loses its history; where two objectives alternate, it is
    the mean of two steps."""
    middle = sum(config.mask_ratio) / 2
    config = replace(config, mask_ratio=(middle, middle), history_dropout=0.0)
    recipe, work = build_recipe(config, backend="reference"), Work()
    with torch.device("meta"):
        model = MiMo(config)
    given = conditions(config, clips, config.frames, torch.device("cpu"))
    if config.repa_weight > 0:
        given["features"] = torch.empty(clips, *config.latent_shape[:3], config.repa_channels, device="meta")
    latents, generator = torch.randn(clips, *config.latent_shape), step_generator(0, 0, "cpu")
    steps = (0, 1) if config.interleaved else (0,)
    with _without_values(recipe, model) as rows, work.counting(trained=True):
        for step in steps:
            recipe.loss(model, latents, generator=generator, step=step, **given).total.backward()
    found = {"rows": sum(rows), "pairs": work.pairs}
    found |= {"matmul_gflop": work.products / 1e9, "attention_gflop": work.attention / 1e9}
    mean = {name: value / clips / len(steps) for name, value in found.items()}
    return {"tokens": config.frames * config.tokens} | mean


def gflop_until(model: MiMoConfig, train: TrainConfig, steps: int) -> float:
    """GFLOP of the first `steps` optimiser steps of a run, those of its last phase without masking as they are."""

    def per_step(config: MiMoConfig) -> float:
        found = of_training(config)
        return train.batch_size * (found["matmul_gflop"] + found["attention_gflop"])

    unmasked = min(max(0, steps - (train.steps - train.unmasked_steps)), train.unmasked_steps)
    total = (steps - unmasked) * per_step(model)
    return total + unmasked * per_step(acdit(model)) if unmasked else total


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
