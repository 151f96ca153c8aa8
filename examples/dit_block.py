"""A plain DiT block over the frames of a video, before and after: SDPA with a dense mask, and frame_attention.

What changes is the attention call and what is passed as the mask:

    before    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                          # [B, heads, tokens, head_dim]
              out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)            # bool [tokens, tokens]
              out = out.transpose(1, 2)

    after     out = frame_attention(q, k, v, mask)  # [B, tokens, heads, head_dim], FrameMask

Run it: python examples/dit_block.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo_kernels.attention import FrameMask, frame_attention


class DiTBlock(nn.Module):
    """AdaLN-zero attention and MLP, x [B, tokens, dim], condition [B, dim]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | FrameMask) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + gate1 * self.proj(self.attend(q, k, v, mask).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FrameDiTBlock(DiTBlock):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: FrameMask) -> Tensor:
        return frame_attention(q, k, v, mask)


def main() -> None:
    torch.manual_seed(0)
    mask = FrameMask.teacher_forcing([[40] * 4], [[64] * 4])
    print(mask)
    before, after = DiTBlock(128, 4), FrameDiTBlock(128, 4)
    after.load_state_dict(before.state_dict())
    x, condition = torch.randn(2, mask.num_tokens, 128), torch.randn(2, 128)
    with torch.no_grad():
        difference = before(x, condition, mask.to_dense()) - after(x, condition, mask)
    print(f"largest difference of the outputs: {difference.abs().max():.1e}")


if __name__ == "__main__":
    main()
