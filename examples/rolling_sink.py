"""A rollout without end: a window of the latest frames, and the first frame as a sink that stays near it. Its RoPE time
moves on with the window, so that no distance grows beyond those of training. One attention layer on random numbers.

    before   k_sink = rope(rope_inverse(k_sink, t0), t1)       in every step of the window, with an error that adds up
    after    cache.rotate(seqs, 0, lambda k: ...)              from the keys before RoPE, exactly as by one rotation

python examples/rolling_sink.py
"""

import torch
from torch import Tensor

from mimo_kernels import AxialRoPE, FrameCache, paged_frame_attention
from mimo_kernels.ops.rope import apply_rope

TOKENS, HEADS, HEAD_DIM, WINDOW, PAGE = 16, 2, 48, 4, 16


def coordinates(time: int, layers: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """(time, row, column) of the tokens of a frame, each as often as there are layers: int32 [tokens * layers, 3]."""
    side = int(TOKENS**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([torch.full((TOKENS,), time), rows.flatten(), columns.flatten()], 1)
    return place.int().repeat_interleave(layers, 0).to(device)


def rotated(x: Tensor, time: int, rope: AxialRoPE) -> Tensor:
    """x [sequences, tokens, heads, head_dim] at a time."""
    coords = coordinates(time, device=x.device).repeat(len(x), 1)
    return apply_rope(x.flatten(0, 1), coords, rope).view(x.shape)


def rollout(q: Tensor, k: Tensor, v: Tensor, rope: AxialRoPE) -> Tensor:
    """q, k, v [sequences, frames, tokens, heads, head_dim] before RoPE -> attention of every frame to the first one and
    to the latest WINDOW, itself included. The first frame always stands right before the window."""
    pages = 2 * FrameCache.pages_for(WINDOW + 2, TOKENS, sequences=len(q), page_size=PAGE)
    cache = FrameCache(1, HEADS, HEAD_DIM, num_pages=pages, page_size=PAGE, dtype=q.dtype, device=q.device)
    seqs = [cache.new_sequence() for _ in q]
    view = cache.view(seqs, max_pages=pages // len(q))
    frames = []
    for time in range(q.shape[1]):
        if time > WINDOW:  # the window's first frame is time - WINDOW + 1

            def turn(keys: Tensor, time: int = time) -> Tensor:  # [tokens, layers, heads, head_dim]
                coords = coordinates(time - WINDOW, keys.shape[1], keys.device)
                return apply_rope(keys.flatten(0, 1), coords, rope).view(keys.shape)

            cache.rotate(seqs, 0, turn)
            view.refresh()
        q_now, k_now = (rotated(x[:, time], time, rope) for x in (q, k))
        frames.append(paged_frame_attention(q_now, k_now, v[:, time], cache, layer=0, view=view))
        unrotated = [k[:, time]] if time == 0 else None  # of the sink alone
        cache.append(seqs, [k_now], [v[:, time]], unrotated)
        for seq in seqs:
            cache.evict(seq, window=WINDOW - 1, sink=1)
        view.refresh()
    return torch.stack(frames, 1)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rope = AxialRoPE(HEAD_DIM)
    q, k, v = torch.randn(3, 1, 40, TOKENS, HEADS, HEAD_DIM, device=device)
    out = rollout(q, k, v, rope)
    print(f"{out.shape[1]} frames with a window of {WINDOW}; the sink was never more than {WINDOW} frames away")


if __name__ == "__main__":
    main()
