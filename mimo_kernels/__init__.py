"""Kernels for autoregressive video models: frame-wise attention, packed-row operators and the paged frame cache.

Importing this package imports neither torch nor Triton; the names below load on first use, so that
`python -m mimo_kernels.collect_env` can say what is missing on a machine where they do not load.
"""

import importlib
import sys
import types

__version__ = "0.1.0"

_EXPORTS = {
    "AxialRoPE": "qk_norm_rope",
    "FrameCache": "cache",
    "FrameMask": "attention",
    "FrameRows": "modulate",
    "bias_gelu": "gelu",
    "frame_attention": "attention",
    "gated_residual_modulate": "modulate",
    "gather_tokens": "tokens",
    "guided_step": "guided_step",
    "modulate": "modulate",
    "paged_frame_attention": "attention.paged",
    "qk_norm_rope": "qk_norm_rope",
    "sample_tube_mask": "tokens",
    "scatter_tokens": "tokens",
    "weighted_squared_error": "losses",
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


class _Package(types.ModuleType):
    """`modulate` and `qk_norm_rope` name a file and its function; as attributes of the package they are always the
    function, also after `import mimo_kernels.modulate`, where the import system would put the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _EXPORTS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
