"""What a network makes of clean history: hidden states behind its layers, pooled over each clip.

All frames of a clip run through the network as finished frames that became history do when it samples: teacher-forced
systems have norms of their own for them, others tell them a timestep (mimo.recipes.base.HistoryPolicy). Every frame
sees those before it and itself; a network that makes all frames at once is shown all of them at tau = 0. Class and text
are the null ones, so that nothing is read that was told; actions and the interval are told where the network knows any.

Letters: B clips, T frames, N tokens per frame, C channels, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from mimo.network.frames import Frame, FrameBatch, FrameList, Kind, to_tokens
from mimo.network.network import MiMo
from mimo.recipes import recipe_type
from mimo.recipes.base import HistoryPolicy


def history_policy(model: MiMo) -> HistoryPolicy:
    """How a finished frame becomes history in this network."""
    return recipe_type(model.config).history_policy(model.config)


def history_layers(model: MiMo) -> tuple[int, ...]:
    """The layers behind which history has hidden states: all of 1..depth, but the last one where training reads the
    noisy frames alone there, as clean ones then end at their keys and values."""
    config = model.config
    block: Any = model.blocks[-1]
    last = block.norm2.weight is not None or not config.separate_ln or _kind(model) != "clean"
    return tuple(range(1, config.depth + last))


def history_batch(
    model: MiMo, latents: Tensor, *, actions: Tensor | None = None, intervals: Tensor | None = None
) -> FrameBatch:
    """Clips whose frames are all history.

    Args:
        latents: [B, T, H, W, C], as a tokenizer makes them.
        actions: int64 [B, T], for a network that knows actions; None tells it the null one.
        intervals: int64 [B], for a network that knows intervals.
    """
    config, policy, kind = model.config, history_policy(model), _kind(model)
    x = to_tokens(latents, config.patch)
    clips, frames, tokens = x.shape[:3]
    listed = _history(clips, frames, tokens, kind, "bidirectional" if policy.at_once else "block_causal")
    timestep = masked = None
    if kind == "noisy":
        timestep = torch.full((clips * frames,), policy.timestep or 0.0, device=x.device)
    if config.token_depth:
        masked = torch.zeros(clips * frames * tokens, dtype=torch.bool, device=x.device)  # all tokens are there
    return FrameBatch(listed, x.flatten(0, 1), timestep, actions=actions, intervals=intervals, masked=masked)


def hidden_states(model: MiMo, batch: FrameBatch, layers: Sequence[int]) -> dict[int, Tensor]:
    """Layer -> hidden states behind it of the frames of a `history_batch`, [B, T N, D]."""
    tap = "clean" if _kind(model) == "clean" else "noisy"
    out = model(batch, reconstruct=False, taps=[(layer, tap) for layer in layers])
    clips = len(batch.frames.clips)
    return {layer: out.features[layer, tap].unflatten(0, (clips, -1)) for layer in layers}


@torch.no_grad()
def pooled_history(model: MiMo, batch: FrameBatch, layers: Sequence[int]) -> Tensor:
    """The mean over all tokens of all frames of a clip: fp32 [B, L, D]."""
    states = hidden_states(model, batch, layers)
    return torch.stack([states[layer].float().mean(1) for layer in layers], 1)


def _kind(model: MiMo) -> Kind:
    policy = history_policy(model)
    return "noisy" if policy.timestep is not None or policy.at_once else policy.kind


@lru_cache(maxsize=16)
def _history(
    clips: int, frames: int, tokens: int, kind: Kind, sees: Literal["block_causal", "bidirectional"]
) -> FrameList:
    return FrameList((tuple(Frame(t, kind, tokens) for t in range(frames)),) * clips, sees)
