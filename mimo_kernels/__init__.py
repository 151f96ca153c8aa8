"""Kernels for autoregressive video models: frame-wise attention, packed-row operators and the paged frame cache.

Importing this package imports neither torch nor Triton; the names below load on first use, so that
`python -m mimo_kernels.collect_env` can say what is missing on a machine where they do not load.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "AxialRoPE": "ops.rope",
    "FrameCache": "cache.pages",
    "FrameMask": "attention",
    "FrameRows": "ops.frame_rows",
    "bias_gelu": "ops.gelu",
    "frame_attention": "attention",
    "gated_residual_modulate": "ops.adaln",
    "gather_tokens": "ops.token_rows",
    "guided_step": "ops.guidance",
    "modulate": "ops.adaln",
    "paged_frame_attention": "attention.paged",
    "qk_norm_rope": "ops.rope",
    "sample_tube_mask": "ops.token_rows",
    "scatter_tokens": "ops.token_rows",
    "weighted_squared_error": "ops.losses",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
