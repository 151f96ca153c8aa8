"""Each of Hopper's instructions alone (csrc/probe_sm90.cu) against what this file computes.

Here under emulation, in tests/gpu on the hardware. The copy pins the swizzle independently of the C++ that kernels and
emulator share.
"""

import pytest
import torch

HEAD_DIMS = (64, 72, 80, 128)
DTYPES = {torch.float16: 1, torch.bfloat16: 2}
COPIED, SCORES, SCORES_FROM_SHARED, SUMS = range(4)
CASES = [(d, 64, dtype) for d in HEAD_DIMS for dtype in DTYPES] + [(d, 128, torch.float16) for d in HEAD_DIMS]


def probe(
    kernels, step: int, head_dim: int, block: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(head_dim + block)
    a, b = (torch.randn(rows, head_dim, generator=generator).to(device, dtype) for rows in (64, block))
    channels = -(-head_dim // 16) * 16
    width = {COPIED: block * channels // 2 // 64, SUMS: channels}.get(step, block)
    out = torch.full((64, width), float("nan"), device=device)
    kernels.probe_sm90(
        out=out.data_ptr(),
        a=a.data_ptr(),
        b=b.data_ptr(),
        step=step,
        head_dim=head_dim,
        block=block,
        dtype=DTYPES[dtype],
        device=0,
        stream=torch.cuda.current_stream().cuda_stream if device != "cpu" else 0,
    )
    return out.cpu(), a.cpu(), b.cpu()


def swizzled(tile: torch.Tensor) -> torch.Tensor:
    """Rows of 64 or 16 values as TMA writes them: CU_TENSOR_MAP_SWIZZLE_128B exchanges the eight
    16-byte pieces of a 128-byte row by the row's number modulo 8; _32B the two pieces of rows 4 to 7 of every eight."""
    rows, width = tile.shape
    pieces = tile.reshape(rows, width // 8, 8)
    row = torch.arange(rows)[:, None]
    piece = torch.arange(width // 8)[None]
    other = piece ^ (row % 8 if width == 64 else row // 4 % 2)
    return pieces[row, other].reshape(-1)


def check_copy(kernels, head_dim, block, dtype, device="cpu"):
    out, _, b = probe(kernels, COPIED, head_dim, block, dtype, device)
    b = torch.nn.functional.pad(b, (0, -head_dim % 16))
    parts = [swizzled(b[:, c : c + 64]) for c in range(0, b.shape[1], 64)]
    assert torch.equal(out.flatten().view(dtype), torch.cat(parts))


def check_product(kernels, step, head_dim, block, dtype, device="cpu"):
    out, a, b = probe(kernels, step, head_dim, block, dtype, device)
    scores = a.double() @ b.double().T
    expected = scores
    if step == SUMS:
        expected = torch.nn.functional.pad(scores.to(dtype).double() @ b.double(), (0, -head_dim % 16))
    # A score that is narrowed may be another neighbour of its exact value.
    atol = torch.finfo(dtype).eps * 8 * block**0.5 if step == SUMS else 1e-4
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("head_dim", "block", "dtype"), CASES)
def test_copies_are_swizzled(emulated, head_dim, block, dtype):
    check_copy(emulated, head_dim, block, dtype)


@pytest.mark.parametrize("step", [SCORES, SCORES_FROM_SHARED, SUMS])
@pytest.mark.parametrize(("head_dim", "block", "dtype"), CASES)
def test_products(emulated, step, head_dim, block, dtype):
    check_product(emulated, step, head_dim, block, dtype)


def test_what_there_is_no_probe_for_is_refused(emulated):
    with pytest.raises(RuntimeError, match="probe_sm90: invalid argument"):
        probe(emulated, 4, 64, 64, torch.float16)
