"""Attention whose rows see whole frames: the mask that says which, the operators, and the cache of finished frames that
the paged one reads."""

from mimo_kernels.attention.frame import describe_backends, frame_attention
from mimo_kernels.attention.mask import FrameMask
from mimo_kernels.attention.paged import paged_attention, paged_frame_attention
from mimo_kernels.cache.pages import FrameCache

__all__ = [
    "FrameCache",
    "FrameMask",
    "describe_backends",
    "frame_attention",
    "paged_attention",
    "paged_frame_attention",
]
