"""Attention of one long clip on several processes, in two ways; the kernels are those of one process.

    heads_sharded      Ulysses: every process has some of the tokens; two exchanges turn that into all tokens of some of
                       the heads and back. For sampling with a cache, whose pages then hold the heads of the process.
    context_parallel   every process has some of the keys and keeps them; queries travel, and the partial results are
                       merged by their log-sum-exp. For teacher forcing on clips whose keys fit no single device.

        out = sum_r exp(lse_r - lse) out_r        lse = log sum_r exp(lse_r)

torchrun --nproc-per-node 2 examples/sharded.py
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_kernels.attention import FrameCache, FrameMask, frame_attention, paged_frame_attention


class Exchange(torch.autograd.Function):
    """part i goes to process i; what comes back is one part from each process. Its backward is itself."""

    @staticmethod
    def forward(ctx, *parts: Tensor) -> tuple[Tensor, ...]:
        received = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        dist.all_to_all(received, [part.contiguous() for part in parts])
        return tuple(received)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        return Exchange.apply(*grads)


def to_heads(x: Tensor) -> Tensor:
    """[tokens of mine, heads, d] -> [all tokens, heads of mine, d]."""
    return torch.cat(Exchange.apply(*x.chunk(dist.get_world_size(), 1)))


def to_tokens(x: Tensor) -> Tensor:
    """[all tokens, heads of mine, d] -> [tokens of mine, heads, d]."""
    return torch.cat(Exchange.apply(*x.chunk(dist.get_world_size())), 1)


def heads_sharded(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask) -> Tensor:
    """q, k, v [tokens of mine, heads, d] under the mask of the whole sequence -> as q. The processes have equally many
    tokens, and their number divides the heads."""
    return to_tokens(frame_attention(*(to_heads(x) for x in (q, k, v)), mask))


def rollout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sampling with the heads sharded: q, k, v [frames, tokens of mine, heads, d] -> as q, frame after frame. The pages
    of this process hold all tokens of its heads."""
    frames, tokens, heads, head_dim = q.shape
    size = dist.get_world_size()
    pages = FrameCache.pages_for(frames, tokens * size, page_size=16)
    cache = FrameCache(1, heads // size, head_dim, num_pages=pages, page_size=16, dtype=q.dtype, device=q.device)
    seqs = [cache.new_sequence()]
    view = cache.view(seqs, max_pages=pages)
    made = []
    for frame in zip(q, k, v):
        q_now, k_now, v_now = (to_heads(x)[None] for x in frame)
        out = paged_frame_attention(q_now, k_now, v_now, cache, layer=0, view=view)
        made.append(to_tokens(out[0]))
        cache.append(seqs, [k_now.detach()], [v_now.detach()])
        view.refresh()
    return torch.stack(made)


def context_parallel(q: Tensor, k: Tensor, v: Tensor, masks: list[FrameMask]) -> Tensor:
    """q, k, v [tokens of mine, heads, d] -> as q. masks: of every process, all queries by the keys that it has."""
    queries = torch.cat(Exchange.apply(*[q] * dist.get_world_size()))  # everybody's, for everybody
    out, lse = frame_attention(queries, k, v, masks[dist.get_rank()], return_lse=True)
    lse = lse.transpose(0, 1)[..., None]  # [queries, heads, 1]
    highest = lse.detach().clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    weight = (lse - highest).exp()  # 0 where none of these keys is seen; every query sees some key of some process
    total = torch.cat([out * weight, weight], -1)
    mine = sum(Exchange.apply(*total.chunk(dist.get_world_size())))
    return (mine[..., :-1] / mine[..., -1:]).to(q.dtype)


def keys_of_process(mask: FrameMask, size: int) -> list[FrameMask]:
    """The mask of a whole clip cut by keys into `size` equal parts: of every frame, the part of its key intervals."""
    share = mask.num_keys // size
    masks = []
    for first in range(0, mask.num_keys, share):
        queries, keys = [], []
        for row_start, row_end, *ends in mask.frames.tolist():
            for start, end in zip(ends[::2], ends[1::2]):
                part = max(start, first) - first, min(end, first + share) - first
                if part[0] < part[1]:
                    queries.append((row_start, row_end))
                    keys.append(part)
        masks.append(FrameMask.from_slices(queries, keys, num_queries=mask.num_queries, num_keys=share))
    return masks


def say(rank: int, name: str, error: float) -> None:
    words = f"process {rank}: {name} differs from one process by at most {error:.1e}\n"
    print(words, end="", flush=True)  # in one piece, beside those of others


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    mask = FrameMask.teacher_forcing([[8, 8, 8]], [[8, 8, 8]])
    share = slice(rank * mask.num_tokens // size, (rank + 1) * mask.num_tokens // size)
    whole = [torch.randn(mask.num_tokens, 2 * size, 16).requires_grad_() for _ in range(3)]
    expected = frame_attention(*whole, mask)
    gradients = torch.autograd.grad(expected.square().sum(), whole)
    for name, attend in (
        ("heads_sharded", lambda *x: heads_sharded(*x, mask)),
        ("context_parallel", lambda *x: context_parallel(*x, keys_of_process(mask, size))),
    ):
        mine = [x[share].detach().requires_grad_() for x in whole]
        out = attend(*mine)
        found = torch.autograd.grad(out.square().sum(), mine)
        error = max(
            (one - other[share]).abs().max().item() for one, other in zip((out, *found), (expected, *gradients))
        )
        say(rank, name, error)
    frames = torch.randn(3, 4, 4 * size, 2 * size, 16)
    mask = FrameMask.block_causal([[4 * size] * 4])
    expected = frame_attention(*(x.flatten(0, 1) for x in frames), mask).unflatten(0, (4, -1))
    mine = slice(4 * rank, 4 * rank + 4)
    say(rank, "rollout", (rollout(*frames[:, :, mine]) - expected[:, mine]).abs().max().item())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
