"""Every attention of diffusers that goes through `dispatch_attention_fn`, under a FrameMask: a backend of that name.

    register()
    transformer.set_attention_backend("frame_mask")
    with frame_mask(mask):
        transformer(latents, timestep, text)

Attention with the mask's numbers of queries and keys is served by `frame_attention`; all other (to a text, say) by
torch's own. diffusers lists its backends in an Enum, which knows no way to add one: `register` adds a member by hand.

Run it: python examples/diffusers_backend.py
"""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from mimo_kernels.attention import FrameMask, frame_attention

NAME = "frame_mask"
_mask: contextvars.ContextVar[FrameMask | None] = contextvars.ContextVar("frame_mask", default=None)


@contextlib.contextmanager
def frame_mask(mask: FrameMask) -> Iterator[None]:
    """Attention inside has this mask."""
    token = _mask.set(mask)
    try:
        yield
    finally:
        _mask.reset(token)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config=None,
) -> Tensor:
    """query [batch, queries, heads, head_dim], key and value [batch, keys, heads, head_dim], as diffusers calls it."""
    mask = _mask.get()
    if mask is None or (query.shape[1], key.shape[1]) != (mask.num_queries, mask.num_keys):
        native = attention_dispatch._AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return native(query, key, value, attn_mask, **options, _parallel_config=_parallel_config)
    if attn_mask is not None or dropout_p or is_causal:
        raise ValueError("attention under a FrameMask has a mask, expected no attn_mask, is_causal or dropout besides")
    return frame_attention(query, key, value, mask, scale=scale)


def register() -> None:
    """diffusers knows the backend "frame_mask" from now on."""
    if NAME not in AttentionBackendName._value2member_map_:
        member = str.__new__(AttentionBackendName, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        AttentionBackendName._member_map_[NAME.upper()] = member
        AttentionBackendName._value2member_map_[NAME] = member
        AttentionBackendName._member_names_.append(NAME.upper())
    attention_dispatch._AttentionBackendRegistry.register(AttentionBackendName(NAME))(attention)


def main() -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    register()
    transformer.set_attention_backend(NAME)
    latents, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad(), frame_mask(FrameMask.block_causal([[16, 16, 16]])):
        out = transformer(latents, torch.tensor([500]), text, return_dict=False)[0]
    print(f"velocity under a block-causal mask: {list(out.shape)}")


if __name__ == "__main__":
    main()
