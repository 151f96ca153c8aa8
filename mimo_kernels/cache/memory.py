"""Where a cache lives, and how much it can take there."""

import os

import torch


def device_of(device: torch.device | str) -> torch.device:
    """Raises ValueError for what is no device, or a GPU that is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}: {str(error).splitlines()[0]}") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device is {found}, torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def memory_of(device: torch.device) -> int | None:
    """Bytes that a pool can take there at most, as far as somebody knows."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else None


def in_words(num_bytes: int) -> str:
    """As GiB or MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.2f} MiB"
