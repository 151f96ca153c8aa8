"""Kernels for autoregressive video models: frame-wise attention, packed-row operators and the paged frame cache.

Importing this package imports neither torch nor Triton; the names below load on first use, so that
`python -m mimo_kernels.collect_env` can say what is missing on a machine where they do not load.
"""

import importlib

from mimo_kernels.core.operators import OPERATORS

__version__ = "0.2.0"

# What is public beside the operators: the data that they take, and a second door to one of them.
_EXPORTS = {operator.name: operator.family for operator in OPERATORS} | {
    "AxialRoPE": "ops.axial_rope",
    "FrameCache": "cache.pages",
    "FrameMask": "attention.mask",
    "FrameRows": "ops.frame_rows",
    "paged_attention": "attention.paged",
    "sample_tube_mask": "ops.token_rows",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
