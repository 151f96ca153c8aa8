"""Attention whose rows see whole frames: the mask that says which, and the operator."""

from mimo_kernels.attention.frame import describe_backends, frame_attention
from mimo_kernels.attention.mask import FrameMask

__all__ = ["FrameMask", "describe_backends", "frame_attention"]
