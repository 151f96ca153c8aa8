"""diffusers' Wan transformer, made autoregressive over frames through its attention processor.

What changes is one call inside the processor, and which processor the self-attention of every block has:

    before    out = dispatch_attention_fn(query, key, value, attn_mask=None)  # every token sees every token
    after     out = frame_attention(query, key, value, mask)  # every token sees what its frame may see

    block causal (one copy of the frames; also how it is sampled)
              set_frame_mask(transformer, block_causal_mask(transformer, latents))
              transformer(latents, timestep, text)

    teacher forcing (clean frames beside noisy ones; one timestep per frame)
              set_frame_mask(transformer, teacher_forcing_mask(transformer, noisy))
              velocity = teacher_forcing(transformer, clean, noisy, timesteps, text)

Run it: python examples/wan.py
"""

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from mimo_kernels.attention import FrameMask, frame_attention


class FrameMaskProcessor:
    """Self-attention of Wan under a FrameMask of one clip, which the batch shares."""

    def __init__(self, mask: FrameMask):
        self.mask = mask

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        out = frame_attention(query, key, value, self.mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan's rotary embedding: channels 2i and 2i + 1 turn together."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class TwoCopies(nn.Module):
    """Wan's positions for [clean, noisy] along the frames: both copies of a frame have the same place in time."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rope(hidden_states[:, :, : hidden_states.shape[2] // 2])
        return torch.cat([cos, cos], dim=1), torch.cat([sin, sin], dim=1)


def frame_lens(transformer: WanTransformer3DModel, latents: Tensor) -> list[int]:
    """Tokens of every frame of latents [B, C, frames, height, width]."""
    frames, height, width = (size // patch for size, patch in zip(latents.shape[2:], transformer.config.patch_size))
    return [height * width] * frames


def block_causal_mask(transformer: WanTransformer3DModel, latents: Tensor, **options) -> FrameMask:
    return FrameMask.block_causal([frame_lens(transformer, latents)], **options)


def teacher_forcing_mask(transformer: WanTransformer3DModel, latents: Tensor, **options) -> FrameMask:
    lens = frame_lens(transformer, latents)
    return FrameMask.teacher_forcing([lens], [lens], **options)


def set_frame_mask(transformer: WanTransformer3DModel, mask: FrameMask) -> None:
    """Self-attention takes the mask; cross-attention to the text stays as it is."""
    for block in transformer.blocks:
        block.attn1.set_processor(FrameMaskProcessor(mask))


def teacher_forcing(
    transformer: WanTransformer3DModel, clean: Tensor, noisy: Tensor, timesteps: Tensor, text: Tensor
) -> Tensor:
    """The prediction for the noisy frames. clean, noisy [B, C, frames, height, width], timesteps [B, frames]; clean
    frames are at timestep 0."""
    lens = frame_lens(transformer, noisy)
    per_frame = torch.cat([torch.zeros_like(timesteps), timesteps], dim=1)
    per_token = per_frame.repeat_interleave(torch.tensor(lens + lens, device=timesteps.device), dim=1)
    rope = transformer.rope
    transformer.rope = TwoCopies(rope)
    try:
        both = transformer(torch.cat([clean, noisy], dim=2), per_token, text, return_dict=False)[0]
    finally:
        transformer.rope = rope
    return both[:, :, clean.shape[2] :]


def small_transformer() -> WanTransformer3DModel:
    """Random weights, Wan's shape."""
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    transformer = small_transformer()
    clean, noisy = torch.randn(2, 1, 4, 3, 8, 8)
    text, timesteps = torch.randn(1, 5, 16), torch.tensor([[100, 500, 900]])
    mask = teacher_forcing_mask(transformer, noisy)
    set_frame_mask(transformer, mask)
    print(mask)
    with torch.no_grad():
        print("velocity of the noisy frames:", list(teacher_forcing(transformer, clean, noisy, timesteps, text).shape))


if __name__ == "__main__":
    main()
