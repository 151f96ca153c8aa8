"""A rollout with a cache: every new frame attends to the finished ones in their pages, then joins them. One attention
layer on random numbers.

python examples/rollout.py
"""

import torch

from mimo_kernels.attention import FrameCache, FrameMask, frame_attention, paged_frame_attention

FRAMES, TOKENS, HEADS, HEAD_DIM = 6, 16, 4, 64


def rollout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q, k, v [sequences, frames, tokens, heads, head_dim] -> as q, frame after frame."""
    pages = FrameCache.pages_for(q.shape[1], q.shape[2], sequences=len(q), page_size=16)
    cache = FrameCache(1, HEADS, HEAD_DIM, num_pages=pages, page_size=16, dtype=q.dtype, device=q.device)
    seqs = [cache.new_sequence() for _ in q]
    view = cache.view(seqs, max_pages=pages // len(q))  # what attention sees of the cache
    frames = []
    for frame in zip(q.unbind(1), k.unbind(1), v.unbind(1)):  # a network makes these of the frame it denoises
        frames.append(paged_frame_attention(*frame, cache, layer=0, view=view))
        cache.append(seqs, [frame[1]], [frame[2]])  # the finished frame becomes history: keys and values per layer
        view.refresh()
    return torch.stack(frames, 1)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = torch.randn(3, 2, FRAMES, TOKENS, HEADS, HEAD_DIM, device=device)
    out = rollout(q, k, v)
    mask = FrameMask.block_causal([[TOKENS] * FRAMES])
    print(mask)
    whole = frame_attention(*(x.flatten(1, 2) for x in (q, k, v)), mask).unflatten(1, (FRAMES, TOKENS))
    print(f"largest difference from attention under the whole mask: {(out - whole).abs().max():.1e}")


if __name__ == "__main__":
    main()
