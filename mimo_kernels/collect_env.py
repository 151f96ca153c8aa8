"""`python -m mimo_kernels.collect_env`: versions, what was compiled, and which backend serves every operator here.

It is what to look at, and to send, when something is slow or does not run; so it works where torch or Triton do not.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
import time
import types
import warnings

import mimo_kernels
from mimo_kernels.core import backends, host
from mimo_kernels.core.operators import OPERATORS

PACKAGES = ("torch", "triton", "flash-attn", "einops", "numpy")


def collect() -> dict[str, dict[str, str]]:
    """Heading -> name -> value, in reading order."""
    torch, torch_reason = _load("torch")
    sections = {
        "system": {"platform": platform.platform(), "python": f"{platform.python_version()} at {sys.executable}"},
        "packages": {"mimo_kernels": mimo_kernels.__version__} | {name: _version(name) for name in PACKAGES},
        "gpu": _gpu(torch, torch_reason),
        "extension": _extension(),
        "masks and schedules": _planner(),
    }
    for device in ("cpu", "cuda"):
        if torch is None:
            facts = {"none": "torch does not load"}
        elif device == "cuda" and not torch.cuda.is_available():
            facts = {"none": "torch sees no CUDA device"}
        else:
            facts = {op.name: _serves(op.family, torch.device(device)) for op in OPERATORS}
        sections[f"operators on {device}"] = facts
    return sections


def _load(name: str) -> tuple[types.ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a broken installation raises anything
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _version(package: str) -> str:
    """The version that loads, its local part (torch's +cu130) included, or that of the files, and why they do not
    load."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    module, reason = _load(package.replace("-", "_"))
    return f"{version}, does not load ({reason})" if reason else getattr(module, "__version__", version)


def _gpu(torch: types.ModuleType | None, torch_reason: str) -> dict[str, str]:
    if torch is None:
        return {"torch": f"does not load ({torch_reason})"}
    facts = {"torch built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "cpu"}
    try:
        facts["driver"] = open("/proc/driver/nvidia/version").readline().removeprefix("NVRM version:").strip()
    except OSError:
        facts["driver"] = "no NVIDIA driver"
    if not torch.cuda.is_available():
        return facts | {"devices": "none that torch can use"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} multiprocessors"
        facts[f"cuda:{index}"] = f"{device.name}, sm_{device.major}{device.minor}, {memory}"
    return facts


def _extension() -> dict[str, str]:
    module = backends.extension()
    if module is None:
        return {"mimo_kernels._C": backends.extension_reason()}
    facts = {"mimo_kernels._C": str(module.__file__), "compiled for": ", ".join(module.cuda_archs) or "host code only"}
    if module.cuda_archs:
        facts |= {"compiler": module.cuda_compiler, "device code": f"CUDA {module.cuda_version}"}
    return facts | ({"note": module.cuda_reason} if module.cuda_reason else {})


def _planner() -> dict[str, str]:
    """Who makes frame tables and schedules, and how long that takes here: of 16 clips of 16 frames that all differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the section above says why
        try:
            planner = host.planner()
        except ImportError as error:
            return {"made in": f"nothing ({error})"}
    lens = [[20 + (7 * clip + 5 * frame) % 25 for frame in range(16)] for clip in range(16)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        cells, columns, *_ = planner.frame_table_teacher_forcing(lens, [[64] * 16] * 16, None, 0, 0, 0, False)
        table = memoryview(cells).cast("B").cast("i", [len(cells) // 4 // columns, columns])
        planner.plan_rows(table, 128, 64, 32768)
        planner.plan_keys(table, 128, 64, 32768)
        seconds.append(time.perf_counter() - start)
    made = "Python (mimo_kernels.planner)" if host.in_python() else "C++ (mimo_kernels._C)"
    return {"made in": made, "16 clips x 16 frames": f"{1e3 * min(seconds):.2f} ms per batch"}


def _serves(family: str, device) -> str:
    """The backend that "auto" takes for a typical call on a torch.device; then, a line each, those that cannot serve,
    and why."""
    try:
        refusals = importlib.import_module(f"mimo_kernels.{family}").describe_backends(device)
    except Exception as error:
        return f"none: mimo_kernels.{family} fails ({type(error).__name__}: {error})"
    ready = [backend for backend, reasons in refusals.items() if not reasons]
    refused = [f"not {backend}: {', '.join(reasons)}" for backend, reasons in refusals.items() if reasons]
    return "\n".join([", then ".join(ready) or "none", *refused])


def render(sections: dict[str, dict[str, str]]) -> str:
    width = max(len(name) for facts in sections.values() for name in facts)
    indent = "\n" + " " * (width + 6)
    blocks = []
    for heading, facts in sections.items():
        lines = [f"  {name:<{width}}  {value}".replace("\n", indent) for name, value in facts.items()]
        blocks.append("\n".join([heading, *lines]))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    print(render(collect()))
