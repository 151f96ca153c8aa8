"""How operators and models are judged: error budgets against an exact result, memory poisoned with NaN, and a model
with a cache against the same model under its whole mask."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mimo_kernels.attention import FrameCache, FrameMask, frame_attention, paged_frame_attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> out


def assert_within_budget(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    atol: float = 1e-5,
    name: str = "output",
    more: tuple[Tensor, Tensor] | None = None,
) -> None:
    """An operator may err at most twice as much as plain PyTorch in the same dtype, plus a small absolute term:

        err(actual) <= 2 err(plain) + atol * max(1, max |exact|)

    where err is the largest and, checked as well, the root mean square deviation from `exact`.

    Args:
        actual: the operator's result.
        plain: the same computation by ordinary PyTorch operators in the dtype under test.
        exact: the same computation in fp32 or fp64. Infinite values have to stand at the same places in `actual`.
        more: plain and exact results of further inputs of the same kind, whose errors count as plain's too: the largest
            of a few errors is luck, and a small case has few.

    AssertionError naming the result, its worst element and both errors.
    """
    if not actual.shape == plain.shape == exact.shape:
        raise AssertionError(
            f"{name}: shape {list(actual.shape)}, plain {list(plain.shape)}, exact {list(exact.shape)}"
        )
    if exact.dtype not in (torch.float32, torch.float64):
        raise AssertionError(f"{name}: the exact result is {exact.dtype}, expected float32 or float64")
    if exact.numel() == 0:
        return
    exact, actual, plain = (x.detach().to(exact.device, torch.float64) for x in (exact, actual, plain))
    finite = exact.isfinite()
    if exact.isnan().any():
        raise AssertionError(f"{name}: the exact result holds NaN")
    if not (torch.equal(actual[~finite], exact[~finite]) and actual[finite].isfinite().all()):
        wrong = torch.where(finite, ~actual.isfinite(), actual != exact)
        index = tuple(wrong.nonzero()[0].tolist())
        count = int(wrong.sum())
        raise AssertionError(
            f"{name}: {count} non-finite values differ; at {index} it is {actual[index]}, exact {exact[index]}"
        )
    small = atol * max(1.0, exact[finite].abs().max().item() if finite.any() else 0.0)
    deviation = torch.where(finite, (actual - exact).abs(), 0.0)
    plain_deviation = torch.where(finite, (plain - exact).abs(), 0.0).flatten()
    if more is not None:
        further, truth = (x.detach().to(exact.device, torch.float64) for x in more)
        plain_deviation = torch.cat([plain_deviation, (further - truth)[truth.isfinite()].abs()])
    for kind, error, plain_error in (
        ("largest", deviation.max(), plain_deviation.max()),
        ("root mean square", deviation.square().mean().sqrt(), plain_deviation.square().mean().sqrt()),
    ):
        if not error <= 2 * plain_error + small:
            index = tuple(int(i) for i in torch.unravel_index(deviation.argmax(), deviation.shape))
            raise AssertionError(
                f"{name}: {kind} error {error:.3e} exceeds 2 x {plain_error:.3e} (plain PyTorch) + {small:.1e}; "
                f"worst at {index}: {actual[index]:.6g}, exact {exact[index]:.6g}"
            )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty and its relatives give NaN (integers: the largest value): what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill


def between_nans(x: Tensor, margin: int = 256) -> Tensor:
    """The values of x as a contiguous view into a buffer with `margin` NaN elements before and after, so that a kernel
    that reads out of bounds shows. A margin that is a multiple of 8 keeps 16-byte loads aligned."""
    buffer = x.new_full((x.numel() + 2 * margin,), float("nan"))
    view = buffer[margin : margin + x.numel()].view(x.shape)
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


class RowsModel(Protocol):
    """What `assert_cached_equals_masked` asks of a model: any function that runs some rows of a sequence.

    ``model(rows, attend)``: `rows` is a slice of the packed sequence that the mask is about, a whole frame or all of
    it. The model makes these rows of its inputs (tokens, positions, timesteps: whatever it adds to them is its own
    affair, and has to depend on the place in the sequence alone), runs its layers, and calls in each

        out = attend(layer, q, k, v)

    with layer counted from 0, q ``[rows, heads, head_dim]`` and k, v ``[rows, kv_heads, head_dim]`` as attention takes
    them, after norm and rotation. `out` is shaped as q. It returns a tensor ``[rows, ...]``.
    """

    def __call__(self, rows: slice, attend: Attend, /) -> Tensor: ...


class _Group(NamedTuple):
    """Rows of a clip that see the same keys: themselves and the whole groups of these numbers."""

    clip: int
    rows: slice
    seen: tuple[int, ...]


TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def assert_cached_equals_masked(
    model: RowsModel,
    mask: FrameMask,
    *,
    tolerance: float | None = None,
    page_size: int = 16,
    backend: str = "auto",
) -> None:
    """A model that runs frame after frame, with the frames before in a `FrameCache`, has to give what it gives for the
    whole sequence at once under `mask`: else it samples from another distribution than it was trained on.

    model: see `RowsModel`. It is called once with all rows and `frame_attention` under the mask, then once per group of
        rows that see the same keys, in an order in which what they see is there before them, with
        `paged_frame_attention`. Without gradients, in the dtype and on the device of what it makes.
    mask: any FrameMask whose rows see themselves and whole groups of others, and not each other in a circle:
        block causal with windows and sinks, teacher forcing with dropped history.
    tolerance: largest difference, relative to the largest output; default 1e-5 (float32), 1e-2 (float16), 5e-2
        (bfloat16).
    page_size: of the cache. backend: of both operators.

    AssertionError that names the rows where the outputs differ. ValueError for a mask that no cache can serve, and for
    a model that does not keep to the protocol.
    """
    groups = _groups_of(mask)
    shapes: dict[int, Tensor] = {}  # of every layer, its keys

    def masked(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes[layer] = k
        return frame_attention(q, k, v, mask, backend=backend, return_lse=True)[0]

    with torch.no_grad():
        expected = _run(model, slice(0, mask.num_tokens), masked)
        cache = _cache_for(shapes, groups, page_size)
        seqs = [cache.new_sequence() for _ in range(mask.num_clips)]
        limit = TOLERANCE.get(expected.dtype, 1e-5) if tolerance is None else tolerance
        scale = expected.abs().max().item() if expected.numel() else 0.0
        times: dict[int, int] = {}  # of the groups in the cache
        while len(times) < len(groups):
            ready = [i for i, group in enumerate(groups) if i not in times and all(j in times for j in group.seen)]
            if not ready:
                left = min(set(range(len(groups))) - set(times))
                _refuse_mask(groups[left].rows, "see rows that see them in turn", "an order of frames")
            for number in ready:
                clip, rows, seen = groups[number]
                times[number] = cache.position(seqs[clip])
                actual = _run_cached(model, rows, cache, seqs[clip], [times[j] for j in seen], backend)
                worst = (actual.float() - expected[rows].float()).abs().max().item()
                if not worst <= limit * scale:
                    raise AssertionError(
                        f"rows {rows.start}..{rows.stop} of clip {clip}: cached and masked outputs differ by "
                        f"{worst:.3e}, more than {limit:.1e} of the largest output, {scale:.3e}"
                    )


def _run(model: RowsModel, rows: slice, attend: Attend) -> Tensor:
    out = model(rows, attend)
    if not isinstance(out, Tensor) or out.ndim < 1 or out.shape[0] != rows.stop - rows.start:
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"the model returned {found} for {rows.stop - rows.start} rows, expected [rows, ...]")
    return out


def _run_cached(model: RowsModel, rows: slice, cache: FrameCache, seq: int, seen: list[int], backend: str) -> Tensor:
    """The rows as one more frame of the sequence, which sees the frames of these times."""
    view, slot = cache.view([seq], seen), cache.begin_frame([seq], rows.stop - rows.start)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(slot, layer, k[None], v[None])
        return paged_frame_attention(q[None], k[None], v[None], cache, layer=layer, view=view, backend=backend)[0]

    out = _run(model, rows, attend)
    cache.commit(slot)
    return out


def _cache_for(shapes: dict[int, Tensor], groups: list[_Group], page_size: int) -> FrameCache:
    layers, keys = sorted(shapes), [(*k.shape[1:], k.dtype, k.device) for k in shapes.values()]
    if layers != list(range(len(layers))) or not layers or len(set(keys)) != 1:
        found = ", ".join(f"{layer}: {list(shapes[layer].shape)} {shapes[layer].dtype}" for layer in layers)
        raise ValueError(
            f"the model called attend for layers {found or 'none'}, expected 0, 1, ... with keys of one shape and dtype"
        )
    pages = sum(-(-(rows.stop - rows.start) // page_size) for _, rows, _ in groups)
    heads, head_dim, dtype, device = keys[0]
    return FrameCache(
        len(layers), heads, head_dim, num_pages=max(1, pages), page_size=page_size, dtype=dtype, device=device
    )


def _groups_of(mask: FrameMask) -> list[_Group]:
    """Neighbouring rows that see the same keys."""
    dense, ranges, start = mask.to_dense(), [], 0
    clips = [clip for clip, length in enumerate(mask.clip_lens) for _ in range(length)]
    for _, same in groupby(zip(clips, map(bytes, dense.to(torch.uint8).numpy()), strict=True)):
        end = start + len(list(same))
        ranges.append(slice(start, end))
        start = end
    groups = []
    for number, rows in enumerate(ranges):
        keys = dense[rows.start]
        counts = [int(keys[other].sum()) for other in ranges]
        seen = [other for other, count in enumerate(counts) if count]
        if number not in seen:
            _refuse_mask(rows, "do not see themselves", "rows that do")
        if partly := [i for i in seen if counts[i] != ranges[i].stop - ranges[i].start]:
            other = ranges[partly[0]]
            _refuse_mask(rows, f"see a part of rows {other.start}..{other.stop}", "all or none of what is one frame")
        groups.append(_Group(clips[rows.start], rows, tuple(i for i in seen if i != number)))
    return groups


def _refuse_mask(rows: slice, found: str, expected: str) -> None:
    raise ValueError(f"assert_cached_equals_masked: rows {rows.start}..{rows.stop} {found}, expected {expected}")
