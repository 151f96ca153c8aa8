"""Pages of a byte per number: a scale for each page and head makes the most of their range."""

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
MOST_FLOAT8 = 448.0  # its largest number


def to_float8(x: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """x [frames, tokens, heads, head_dim] -> float8 of that shape, and what each page and head is multiplied by, fp32
    [frames, pages, heads]: the largest number of a page becomes 448. A page with an infinity or NaN has a scale that is
    one, and then all of its numbers are NaN or infinite."""
    frames, tokens, heads, dim = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, -tokens % page_size))
    most = padded.unflatten(1, (-1, page_size)).abs().amax((2, 4))  # [frames, pages, heads]
    scales = torch.where(most == 0, 1.0, (most / MOST_FLOAT8).clamp(min=2.0**-100))
    of_rows = scales.repeat_interleave(page_size, 1)[:, :tokens, :, None]
    return (x.float() / of_rows).to(FLOAT8), scales
