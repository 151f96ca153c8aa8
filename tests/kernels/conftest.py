from .emulation import emulated  # noqa: F401
