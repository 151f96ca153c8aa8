"""MiMo: masked history modelling for autoregressive video diffusion."""

import importlib

__version__ = "0.2.0"
__all__ = ["MiMo", "MiMoConfig"]

_HOME = {"MiMo": "mimo.network.network", "MiMoConfig": "mimo.config"}


def __getattr__(name: str):
    # Looked up on first use, so that the command line answers --help and bad input without importing torch.
    if name not in _HOME:
        raise AttributeError(f"module 'mimo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
