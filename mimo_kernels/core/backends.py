"""The one place that picks a backend for an operator and can say why the others do not serve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def choose(op: str, requested: str, refusals: dict[str, list[str]]) -> str:
    """The backend that serves this call of `op`.

    requested: "auto" for the first backend that can serve, or the name of one that has to.
    refusals:  backend -> every reason why it cannot serve this call, in order of preference; an empty list: it can.

    ValueError when the name is unknown or nothing can serve; the message lists every reason.
    """
    if requested == "auto":
        for backend, reasons in refusals.items():
            if not reasons:
                return backend
        listed = "; ".join(f"{backend!r}: {', '.join(reasons)}" for backend, reasons in refusals.items())
        raise ValueError(f"{op}: no backend can serve: {listed}")
    if requested not in refusals:
        raise ValueError(f"{op}: unknown backend {requested!r}; expected one of {', '.join(['auto', *refusals])}")
    if refusals[requested]:
        raise ValueError(f"{op}: backend {requested!r} cannot serve: {'; '.join(refusals[requested])}")
    return requested


def load(name: str) -> tuple[Any, str]:
    """The module and "", or None and why it does not load. A broken installation raises more than ImportError."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, f"{name} does not load ({type(error).__name__}: {error})".splitlines()[0]


# Loaded once, here: the functions below are traced by torch.compile, which cannot follow an import.
_extension, _extension_reason = load("mimo_kernels._C")
_triton, _triton_reason = load("triton")
_torch, _ = load("torch")


def extension() -> Any:
    """mimo_kernels._C, or None where it is not built or does not load."""
    return _extension


def extension_reason() -> str:
    """Why the extension, or its CUDA part, is not there; "" when both are."""
    if _extension is None or _extension.cuda_archs:
        return _extension_reason
    return f"mimo_kernels._C was built without CUDA ({_extension.cuda_reason})"


def cuda_archs() -> tuple[str, ...]:
    """Architectures the extension was compiled for, by nvcc's names: ("sm_80", "sm_90a", "sm_100", "compute_100")."""
    return _extension.cuda_archs if _extension else ()


def triton_available() -> bool:
    return _triton is not None


def triton_reason() -> str:
    """Why Triton does not load; "" when it does."""
    return _triton_reason


def cuda_refusals(device: torch.device) -> list[str]:
    """Why the extension's CUDA kernels cannot run on `device`; operators add what their own inputs rule out."""
    reasons = [extension_reason()] if extension_reason() else []
    if missing := _no_gpu(device):
        return [*reasons, missing]
    capability = _torch.cuda.get_device_capability(device)
    if cuda_archs() and not _runs_on(capability, cuda_archs()):
        reasons.append(f"the GPU is {_sm(capability)}, compiled are {', '.join(cuda_archs())}")
    # Within a major version every driver serves. Launches go through functions that came with CUDA 12.
    needed = max(int(_extension.cuda_version.split(".")[0]), 12) if cuda_archs() else 0
    if cuda_archs() and (driver := _extension.driver_version()) // 1000 < needed:
        served = f"{driver // 1000}.{driver % 1000 // 10}"
        reasons.append(f"the driver serves CUDA up to {served}, needed is {needed}.0 or newer")
    return reasons


def triton_refusals(device: torch.device) -> list[str]:
    """Why Triton kernels cannot run on `device`; operators add what their own inputs rule out."""
    if _triton is None:
        return [triton_reason()]
    if device.type == "cpu":
        return [] if _triton.knobs.runtime.interpret else ["the tensors are on cpu and TRITON_INTERPRET is not set"]
    if missing := _no_gpu(device):
        return [missing]
    capability = _torch.cuda.get_device_capability(device)
    return [] if capability >= (8, 0) else [f"the GPU is {_sm(capability)}, the kernels need sm_80 or newer"]


def _no_gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on cuda"
    return "" if _torch.cuda.is_available() else "torch sees no CUDA device"


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _runs_on(capability: tuple[int, int], archs: tuple[str, ...]) -> bool:
    """sm_80 runs on every 8.x, sm_90a on 9.0 alone, sm_100f on every 10.x; compute_100 is translated for all newer
    ones."""
    for arch in archs:
        kind, name = arch.split("_")
        number = int(name.rstrip("af"))
        built = (number // 10, number % 10)
        if name.endswith("a"):
            serves = built == capability
        elif kind == "sm" or name.endswith("f"):
            serves = built[0] == capability[0] and built[1] <= capability[1]
        else:
            serves = built <= capability
        if serves:
            return True
    return False
