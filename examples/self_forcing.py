"""Self-Forcing: a causal video model is trained on its own rollout. Its frames come out one after another over a cache
of keys and values, the gradient flows through one denoising step of each, and the history is constant.

    before   kv = [(k.clone(), v.clone()) for k, v in kv]; k = torch.cat([kv[layer][0], k], 1); sdpa(q, k, ...)
    after    paged_frame_attention(q, k, v, cache, layer=layer, view=view)

The lines before keep a clone of the whole history per frame and layer until the backward; the operator keeps its own
rows and the numbers of the pages. With a window the cache stays as small as the window; its sinks stay.

python examples/self_forcing.py
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mimo_kernels.attention import FrameCache, FrameMask, paged_frame_attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v), each [S, N, heads, head_dim] -> out
PAGE = 16


class CausalTransformer(nn.Module):
    """A transformer over one or several frames [S, N, channels] of a time each, which is told how to attend."""

    def __init__(self, channels: int = 4, dim: int = 32, heads: int = 2, depth: int = 2, frames: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.head = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.time, self.noise = nn.Embedding(frames, dim), nn.Linear(1, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(depth)
        )

    def forward(self, x: Tensor, time: Tensor, sigma: float, attend: Attend) -> Tensor:
        """x [S, N, channels] at noise level sigma, time int64 [N] -> the clean frame that it guesses."""
        h = self.embed(x) + self.time(time) + self.noise(x.new_full((1,), sigma))
        for layer, (qkv, out, mlp) in enumerate(zip(self.qkv, self.out, self.mlp)):
            q, k, v = qkv(self.norms[2 * layer](h)).unflatten(-1, (3, self.heads, -1)).unbind(2)
            h = h + out(attend(layer, q, k, v).flatten(2))
            h = h + mlp(self.norms[2 * layer + 1](h))
        return self.head(h)


def new_cache(model: CausalTransformer, sequences: int, frames: int, tokens: int) -> FrameCache:
    head_dim = model.embed.out_features // model.heads
    pages = FrameCache.pages_for(frames + 1, tokens, sequences=sequences, page_size=PAGE)
    weight = model.embed.weight
    return FrameCache(
        *(len(model.qkv), model.heads, head_dim),
        num_pages=2 * pages,  # what a pending backward holds stays beside what is seen
        page_size=PAGE,
        dtype=weight.dtype,
        device=weight.device,
    )


def rollout(
    model: CausalTransformer, noise: Tensor, sigmas: list[float], *, window: int | None = None, sink: int = 0
) -> Tensor:
    """noise [S, frames, N, channels] -> frames of that shape, each from a few steps of which the last has a gradient.

    window: how many latest frames a frame sees, itself included; sink: the first ones that it sees besides.
    """
    sequences, frames, tokens = noise.shape[:3]
    cache = new_cache(model, sequences, frames, tokens)
    seqs = [cache.new_sequence() for _ in range(sequences)]
    view = cache.view(seqs, max_pages=FrameCache.pages_for(frames, tokens, page_size=PAGE))
    made = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return paged_frame_attention(q, k, v, cache, layer=layer, view=view)

    for number in range(frames):
        x, time = noise[:, number], torch.full((tokens,), number, device=noise.device)
        for step, sigma in enumerate(sigmas):
            with torch.set_grad_enabled(step + 1 == len(sigmas)):
                clean = model(x, time, sigma, attend)
            if step + 1 < len(sigmas):
                x = clean + sigmas[step + 1] * (noise[:, number] - clean)
        made.append(clean)
        remember(model, cache, seqs, clean.detach(), time, attend)
        if window is not None:
            for seq in seqs:
                cache.evict(seq, window=window - 1, sink=sink)
        view.refresh()
    return torch.stack(made, 1)


@torch.no_grad()
def remember(model, cache: FrameCache, seqs: list[int], clean: Tensor, time: Tensor, attend: Attend) -> None:
    """The finished frame becomes history: its keys and values at noise level 0 go into the pages."""
    slot = cache.begin_frame(seqs, clean.shape[1])

    def write(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(slot, layer, k, v)
        return attend(layer, q, k, v)

    model(clean, time, 0.0, write)
    cache.commit(slot)


@torch.no_grad()
def recompute(model, cache: FrameCache, frames: Tensor, first: int = 0) -> list[int]:
    """Sequences whose history is made anew, frames [S, frames, N, channels] at once, causal among themselves: after a
    prompt changed, or so that a window's first frame has no memory of those that left it.

    first: the time of the first frame.
    """
    sequences, count, tokens = frames.shape[:3]
    seqs = [cache.new_sequence() for _ in range(sequences)]
    view, mask = cache.view(seqs), FrameMask.block_causal([[tokens] * count])
    made: list[tuple[Tensor, Tensor]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made.append((k, v))
        return paged_frame_attention(q, k, v, cache, layer=layer, view=view, self_mask=mask)

    time = torch.arange(first, first + count, device=frames.device).repeat_interleave(tokens)
    model(frames.flatten(1, 2), time, 0.0, attend)
    for number in range(count):
        rows = slice(number * tokens, (number + 1) * tokens)
        cache.append(seqs, [k[:, rows] for k, _ in made], [v[:, rows] for _, v in made])
    return seqs


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CausalTransformer().to(device)
    noise, target = torch.randn(2, 2, 6, 16, 4, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(8):
        made = rollout(model, noise, [1.0, 0.5], window=4, sink=1)
        loss = (made - target).square().mean()  # Self-Forcing has a distribution-matching loss here
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss of a rollout of {noise.shape[1]} frames: {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
