"""Attention maps: what the centre token of the last frame attends to in clean history (MiMo's App. G.2).

The attention of the network gives no weights. They are recomputed for the rows that ask alone, from their queries, all
keys and the logarithm of the sum over keys that attention returns of these rows:

    w(i, j) = exp(scale <q_i, k_j> - lse_i),   one row i per clip and head

Letters: B clips, T frames, N tokens per frame, h heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo.evaluation.representation import hidden_states
from mimo.network.frames import FrameBatch
from mimo.network.network import MiMo
from mimo_kernels.attention import FrameMask, frame_attention

PAPER_LAYERS = (4, 8, 12, 16, 20)
RED, BLUE = (255, 0, 0), (40, 80, 255)
_STRONGEST = 0.8  # how much of the greatest weight's place is red


def shown_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """Of the layers that history has, the paper's; of a network too shallow for two of them, all."""
    there = tuple(layer for layer in PAPER_LAYERS if layer in layers)
    return there if len(there) > 1 else tuple(layers)


def drawn_heads(heads: int, count: int, seed: int) -> tuple[int, ...]:
    """`count` of the heads, or all if there are no more, in order."""
    rng = np.random.default_rng(seed)
    return tuple(sorted(rng.choice(heads, min(count, heads), replace=False).tolist()))


@torch.no_grad()
def centre_query_weights(
    model: MiMo, batch: FrameBatch, layers: Sequence[int], heads: Sequence[int]
) -> dict[int, Tensor]:
    """Layer -> what the token at (height // 2, width // 2) of every clip's last frame gives to the tokens of its clip:
    fp32 [B, heads, T, N], each head's summing to one.

    Args:
        batch: as `history_batch` makes it.

    Raises ValueError for a network whose attention is factorized: there is no layer in which a token sees all frames.
    """
    if model.config.attention != "joint":
        raise ValueError(f"attention={model.config.attention!r}: expected 'joint', as a token sees its clip at once")
    if wrong := [head for head in heads if not 0 <= head < model.config.heads]:
        raise ValueError(f"head {wrong[0]}: expected one below {model.config.heads}")
    weights: dict[int, Tensor] = {}
    hooks = []
    for layer in layers:
        watch = partial(_watch, weights=weights, layer=layer, model=model, batch=batch, heads=tuple(heads))
        attention: Any = model.blocks[layer - 1].attention
        hooks.append(attention.register_forward_pre_hook(watch))
    try:
        hidden_states(model, batch, layers)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: weights[layer] for layer in layers}


def _watch(module, args: tuple, *, weights: dict, layer: int, model: MiMo, batch: FrameBatch, heads: tuple) -> tuple:
    """Before a block's attention: its `attend` also keeps the weights of the rows that ask."""
    y, coords, rope, attend, *rest = args

    def attend_and_keep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights[layer] = _weights_of_rows(model, batch, q, k, v, heads)
        return attend(q, k, v)

    return y, coords, rope, attend_and_keep, *rest


def _weights_of_rows(model: MiMo, batch: FrameBatch, q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, ...]) -> Tensor:
    """q, k, v [B T N, h, d] -> [B, heads, T, N]."""
    clips, frames = len(batch.frames.clips), len(batch.frames.clips[0])
    tokens, width = model.config.tokens, model.config.grid[1]
    centre = model.config.grid[0] // 2 * width + width // 2
    length = frames * tokens
    first = [clip * length for clip in range(clips)]
    rows = torch.tensor(first, device=q.device) + length - tokens + centre
    mask = FrameMask.from_slices(
        [(clip, clip + 1) for clip in range(clips)],
        [(start, start + length) for start in first],
        num_queries=clips,
        num_keys=clips * length,
    )
    asking = q[rows].contiguous()  # [B, h, d]
    _, lse = frame_attention(asking, k, v, mask, backend=model.backend, return_lse=True)  # lse [h, B]
    chosen = torch.tensor(heads, device=q.device)
    keys = k.unflatten(0, (clips, length))[:, :, chosen].float()  # [B, T N, heads, d]
    scores = torch.einsum("bhd,blhd->bhl", asking[:, chosen].float(), keys) / q.shape[-1] ** 0.5
    shares = torch.exp(scores - lse[chosen].mT[..., None].float())
    return shares.unflatten(2, (frames, tokens))


def overlay(video: np.ndarray, weights: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] with weights [T, N] over them in red, the greatest weight of the clip the
    reddest, and a blue dot at the place of the query in the last frame."""
    frames, height, width = video.shape[:3]
    rows, columns = (np.arange(size) * cells // size for size, cells in zip((height, width), grid))
    share = weights.reshape(frames, *grid)[:, rows][:, :, columns, None]  # [T, H, W, 1]
    share = _STRONGEST * share / max(float(weights.max()), 1e-12)
    grey = video.mean(-1, keepdims=True)  # on which red is seen
    shown = (1 - share) * grey + share * np.array(RED)
    y, x = np.ogrid[:height, :width]
    centre = [(cells // 2 + 0.5) * size / cells for size, cells in zip((height, width), grid)]
    radius = max(1.0, min(height / grid[0], width / grid[1]) / 4)
    shown[-1][np.hypot(y + 0.5 - centre[0], x + 0.5 - centre[1]) <= radius] = BLUE
    return (shown + 0.5).astype(np.uint8)


def latent_frames(video: np.ndarray, frames: int, compression: int) -> np.ndarray:
    """Of a clip [F, H, W, 3] the last frame that each of `frames` latent frames stands for."""
    return video[len(video) - 1 - compression * np.arange(frames)[::-1]]
