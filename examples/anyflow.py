"""AnyFlow's FAR transformer in diffusers, trained with chunks that are clean, noisy or compressed: FlexAttention's
BlockMask, its padding to blocks of 128 and its recompilation for every length give way to a FrameMask.

    before    mask = transformer.build_attention_mask(...)         # a BlockMask; q, k and v are padded for it
    after     mask = far_mask(transformer, latents, chunks, clean=True)
              use_frame_masks(transformer)

    transformer(latents, timestep, ..., chunk_partition=chunks, clean_hidden_states=clean, attention_mask=mask)

Run it: python examples/anyflow.py
"""

import torch
from diffusers.models.transformers.transformer_anyflow_far import (
    AnyFlowCausalAttnProcessor,
    AnyFlowFARTransformer3DModel,
    apply_rotary_emb,
)
from torch import Tensor

from mimo_kernels.attention import FrameMask, frame_attention


class FrameMaskProcessor(AnyFlowCausalAttnProcessor):
    """Self-attention under the FrameMask that the transformer is given as its attention_mask."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **cache):
        if not isinstance(attention_mask, FrameMask):  # a rollout with its own cache
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **cache)
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = (norm(x).to(v.dtype) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        q, k = (
            apply_rotary_emb(x.transpose(1, 2), rotary_emb[name]).transpose(1, 2)
            for x, name in ((q, "query"), (k, "key"))
        )
        out = frame_attention(q, k, v, attention_mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def use_frame_masks(transformer: AnyFlowFARTransformer3DModel) -> None:
    for block in transformer.blocks:
        block.attn1.set_processor(FrameMaskProcessor())


def far_mask(
    transformer: AnyFlowFARTransformer3DModel, latents: Tensor, chunks: list[int], *, clean: bool
) -> FrameMask:
    """Who sees whom in training, one clip for the whole batch: latents [B, frames, C, height, width], chunks: frames of
    each. The tokens are those of compressed chunks, then of noisy ones, then (with `clean`) of the same ones clean.

    A chunk sees the compressed chunks before it and itself; a noisy one besides the clean chunks before it, or without
    clean ones the noisy chunks; a clean one the clean chunks up to itself.
    """
    config = transformer.config
    height, width = latents.shape[-2:]
    full, compressed = (
        (height // size[1]) * (width // size[2]) for size in (config.patch_size, config.compressed_patch_size)
    )
    distant = max(0, len(chunks) - config.full_chunk_limit)
    lens = [frames * (compressed if i < distant else full) for i, frames in enumerate(chunks)]
    starts = [sum(lens[:i]) for i in range(len(lens) + 1)]
    context, end = starts[distant], starts[-1]
    if not clean:
        return FrameMask.block_causal([lens])
    copy = end - context  # from a noisy chunk to its clean one
    queries, keys = [], []
    for i, (start, stop) in enumerate(zip(starts, starts[1:])):
        if i < distant:
            queries.append((start, stop))
            keys.append((0, stop))
            continue
        noisy, own = (start, stop), (start + copy, stop + copy)
        queries += [noisy, noisy, noisy, own, own]
        keys += [(0, context), noisy, (end, start + copy), (0, context), (end, stop + copy)]
    pairs = [(query, key) for query, key in zip(queries, keys) if key[0] < key[1]]
    return FrameMask.from_slices(*map(list, zip(*pairs)), num_queries=end + copy)


def small_transformer() -> AnyFlowFARTransformer3DModel:
    """Random weights, AnyFlow's shape."""
    return AnyFlowFARTransformer3DModel(
        patch_size=(1, 2, 2), compressed_patch_size=(1, 4, 4), full_chunk_limit=2, num_attention_heads=2,
        attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2,
        rope_max_seq_len=64,
    ).eval()  # fmt: skip


def inputs(chunks: list[int], clean: bool) -> dict:
    latents, frames = torch.randn(1, sum(chunks), 4, 8, 8), sum(chunks)
    given = {"hidden_states": latents, "timestep": torch.full((1, frames), 500), "r_timestep": torch.zeros(1, frames)}
    given |= {"encoder_hidden_states": torch.randn(1, 5, 16), "chunk_partition": chunks, "return_dict": False}
    if clean:
        recent = torch.randn(1, sum(chunks[-2:]), 4, 8, 8)
        given |= {"clean_hidden_states": recent, "clean_timestep": torch.zeros(1, recent.shape[1])}
    return given


def main() -> None:
    torch.manual_seed(0)
    transformer, chunks = small_transformer(), [1, 2, 2]
    given = inputs(chunks, clean=True)
    mask = far_mask(transformer, given["hidden_states"], chunks, clean=True)
    print(mask)
    use_frame_masks(transformer)
    with torch.no_grad():
        print("velocity:", list(transformer(**given, attention_mask=mask)[0].shape))


if __name__ == "__main__":
    main()
