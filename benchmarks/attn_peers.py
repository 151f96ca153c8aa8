"""The attentions that frame_attention is measured against, each given its best form of the same mask.

Every implementation is an object with `name`, `prepare_seconds` (what it spends once per mask or per length, outside
the timing), `executed` (FLOPs it spends) and `__call__(q, k, v)`: [tokens, heads, head_dim] packed in, the same out,
differentiable. One that does not run here raises Unavailable from its constructor, with the reason.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mimo_kernels.attention import FrameMask, frame_attention, sm90

MAX_DENSE_BYTES = 8 * 2**30
MAX_GATHERED_BYTES = 16 * 2**30


# What the package index does not have, as others tell it: H100, bf16, head dim 128, 32k tokens. Not measured here.
_TOLD = ("implementation", "mask", "forward_tflops", "backward_tflops", "source")
_BY_MAGI = "MagiAttention's benchmarks of kernels"
PUBLISHED = tuple(
    dict(zip(_TOLD, told))
    for told in (
        ("FlashAttention-3", "full", 702, 600, _BY_MAGI),
        ("FlashAttention-3", "causal", 680, 585, _BY_MAGI),
        ("MagiAttention", "full", 635, 576, _BY_MAGI),
        ("MagiAttention", "block causal, clips of several lengths", 572, 363, _BY_MAGI),
    )
)


class Unavailable(Exception):
    """Why an implementation does not take part."""


class Implementation:
    name: str
    prepare_seconds: dict[str, float]
    forward_only = False

    def __init__(self, mask: FrameMask, device: torch.device, heads: int, head_dim: int, kv_heads: int | None = None):
        self.mask, self.device, self.heads, self.head_dim = mask, device, heads, head_dim
        self.kv_heads = kv_heads or heads
        self.pairs, self.padded_dim = mask.num_pairs, head_dim
        self.prepare_seconds = {}

    def executed(self, direction: str, dtype: torch.dtype) -> float:
        """FLOPs that the kernel spends, all heads together."""
        return 4 * self.pairs * self.heads * self.padded_dim * (2.5 if direction == "backward" else 1.0)

    def clips_first(self, x: Tensor) -> Tensor:
        """[tokens, h, d] -> [clips, h, rows, d] where all clips are alike, else [1, h, tokens, d]."""
        return x.unflatten(0, (self.mask.repeats, -1)).transpose(1, 2)

    def one_clip(self) -> FrameMask:
        """The mask that `clips_first` tensors need."""
        mask = self.mask
        if mask.repeats == 1:
            return mask
        return FrameMask.from_table(mask.pattern, clip_lens=mask.clip_lens[:1], key_lens=mask.key_lens[:1])


class Ours(Implementation):
    def __init__(self, mask, device, heads, head_dim, kv_heads=None, backend: str = "auto"):
        super().__init__(mask, device, heads, head_dim, kv_heads)
        if backend == "cuda":
            reasons = sm90.device_refusals(device) or sm90.input_refusals(torch.bfloat16, head_dim)
            if reasons := reasons or sm90.mask_refusals(mask):
                raise Unavailable("; ".join(reasons))
        self.name = "frame_attention" if backend == "auto" else f"frame_attention, {backend}"
        self.backend = backend

    def __call__(self, q, k, v):
        return frame_attention(q, k, v, self.mask, backend=self.backend)

    def executed(self, direction, dtype):
        if self.backend == "reference" or self.device.type == "cpu":
            return super().executed(direction, dtype)
        from mimo_kernels.attention.triton import operator as triton_op
        from mimo_kernels.attention.triton.tiles import split_head_dim

        q = torch.empty(0, self.heads, self.head_dim, dtype=dtype, device=self.device)
        pairs = {name: plan.executed_pairs for name, plan in triton_op.plans(q, self.mask).items()}
        # Two products per pair forward; the backward's two kernels take three and four, as both recompute the scores.
        products = 2 * pairs["forward"] if direction == "forward" else 3 * pairs["dq"] + 4 * pairs["dkv"]
        return 2 * products * self.heads * sum(split_head_dim(self.head_dim))


class Flex(Implementation):
    """Compiled FlexAttention with a block mask made beforehand. On the CPU eager, which is forward only.

    flash: with the kernels of FlashAttention-4, to which the rule is compiled as their mask_mod, with block-sparse
    lists: their best form for masks like these."""

    def __init__(
        self, mask, device, heads, head_dim, kv_heads=None, mask_mod: Callable | None = None, flash: bool = False
    ):
        super().__init__(mask, device, heads, head_dim, kv_heads)
        if flash:
            _import("flash_attn.cute.interface", device)
        compiled = device.type == "cuda"
        self.name = "FlexAttention, compiled" if compiled else "FlexAttention, eager"
        if flash:
            self.name = "FlexAttention on FlashAttention-4"
        self.forward_only = not compiled
        rows, keys = (count // mask.repeats for count in (mask.num_queries, mask.num_keys))
        mask_mod = mask_mod or self.one_clip().to_mask_mod(device)
        self.make = partial(create_block_mask, mask_mod, None, None, rows, keys, device=str(device), _compile=compiled)
        self.block_mask = self.make()  # compiles, where it is compiled
        _synchronize(device)
        start = time.perf_counter()
        self.block_mask = self.make()
        _synchronize(device)
        self.prepare_seconds["mask"] = time.perf_counter() - start
        self.pairs = touched_pairs(mask, 128, 128) if compiled else rows * mask.num_keys
        if compiled:
            self.padded_dim = -(-head_dim // 16) * 16 if flash else 1 << (head_dim - 1).bit_length()
            torch._dynamo.reset()  # every shape is compiled for itself: that is how it runs fastest
        attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        self.attend = partial(attend, enable_gqa=self.kv_heads != heads)
        if flash:
            self.attend = partial(self.attend, kernel_options={"BACKEND": "FLASH"})

    def __call__(self, q, k, v):
        q, k, v = (self.clips_first(x) for x in (q, k, v))
        return self.attend(q, k, v, block_mask=self.block_mask).transpose(1, 2).flatten(0, 1)


class DenseSDPA(Implementation):
    """scaled_dot_product_attention with a bool matrix."""

    def __init__(
        self,
        mask,
        device,
        heads,
        head_dim,
        kv_heads=None,
        backend: SDPBackend | None = None,
        packed: bool | None = None,
    ):
        """packed: one matrix for all clips; None: only where the clips are not alike."""
        super().__init__(mask, device, heads, head_dim, kv_heads)
        if packed is False and mask.repeats < mask.num_clips:
            raise Unavailable("the clips are not alike")
        self.backend, self.packed = backend, packed or mask.repeats < mask.num_clips
        details = [backend.name.split("_")[0].lower()] if backend else ["packed" if packed else "per clip"]
        self.name = ", ".join(["SDPA, dense mask", *details])
        clips = 1 if self.packed else mask.repeats
        rows, keys = mask.num_queries // clips, mask.num_keys // clips
        size = 3 * rows * keys  # as bool, and as the bias of two bytes that SDPA makes of it
        if size > MAX_DENSE_BYTES:
            raise Unavailable(f"a dense mask of {rows} x {keys} takes {size / 2**30:.0f} GiB")
        start = time.perf_counter()
        self.dense = dense(mask if self.packed else self.one_clip(), device)
        _synchronize(device)
        self.prepare_seconds["mask"] = time.perf_counter() - start
        self.pairs = clips * rows * keys

    def clips_first(self, x):
        return x.unsqueeze(0).transpose(1, 2) if self.packed else super().clips_first(x)

    def __call__(self, q, k, v):
        q, k, v = (self.clips_first(x) for x in (q, k, v))
        options = {"attn_mask": self.dense, "enable_gqa": self.kv_heads != self.heads}
        if self.backend is None:
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(0, 1)
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(0, 1)


@dataclass
class Sequences:
    """One varlen call: query rows that are their own sequences, each with a range of key rows; ranges may overlap."""

    query_rows: Tensor  # int64 [n], which rows of the packed sequence
    key_rows: Tensor  # int64, the keys of all sequences, one after another
    cu_q: Tensor  # int32 [sequences + 1]
    cu_k: Tensor  # int32 [sequences + 1], into key_rows
    max_q: int
    max_k: int


class VarlenCalls(Implementation):
    """Varlen FlashAttention, what people write without a kernel for the mask: with `merged` one call per key interval,
    put together by their log-sum-exp; else one call in which a frame is a sequence and its intervals lie side by side.

    Keys that several frames see are gathered once for each. The backward gives every call the merged output and
    log-sum-exp, so it needs no gradient of the merge.
    """

    def __init__(self, mask, device, heads, head_dim, kv_heads=None, *, kernels: type, merged: bool):
        super().__init__(mask, device, heads, head_dim, kv_heads)
        if device.type == "cpu" and self.kv_heads != heads:
            raise Unavailable("torch's flash kernels for the CPU do not take heads that share keys")
        self.kernels = kernels(device, head_dim)
        self.name = f"varlen calls + merge, {kernels.label}" if merged else f"varlen, gathered, {kernels.label}"
        if device.type == "cuda":
            self.padded_dim = -(-head_dim // 32) * 32
        start = time.perf_counter()
        rows, keys = _intervals(mask)
        chosen = [[k[i : i + 1] for k in keys] for i in range(max(map(len, keys)))] if merged else [keys]
        self.calls = [self._sequences(rows, part) for part in chosen]
        _synchronize(device)
        self.prepare_seconds["metadata"] = time.perf_counter() - start
        gathered = sum(call.key_rows.numel() for call in self.calls)
        size = 4 * gathered * self.kv_heads * head_dim
        if size > MAX_GATHERED_BYTES:
            raise Unavailable(f"gathering {gathered} overlapping keys takes {size / 2**30:.0f} GiB")

    def _sequences(self, rows: list[tuple[int, int]], keys: list[list[tuple[int, int]]]) -> Sequences:
        """Groups of rows and the intervals of keys of each; those that have none are left out."""
        kept = [(row, intervals) for row, intervals in zip(rows, keys) if intervals]
        q_lens = torch.tensor([end - start for (start, end), _ in kept])
        k_lens = torch.tensor([sum(end - start for start, end in intervals) for _, intervals in kept])
        return Sequences(
            _ranges([row for row, _ in kept]).to(self.device),
            _ranges([interval for _, intervals in kept for interval in intervals]).to(self.device),
            F.pad(q_lens.cumsum(0), (1, 0)).to(self.device, torch.int32),
            F.pad(k_lens.cumsum(0), (1, 0)).to(self.device, torch.int32),
            int(q_lens.max()),
            int(k_lens.max()),
        )

    def __call__(self, q, k, v):
        return _Varlen.apply(q, k, v, self)


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, peer: VarlenCalls):
        out, lse = None, None
        for call in peer.calls:
            rows = call.query_rows
            part, part_lse = peer.kernels.forward(q[rows], k[call.key_rows], v[call.key_rows], call)
            if out is None and len(rows) == len(q):  # the first interval is every row's
                out, lse = part, part_lse.T
                continue
            if out is None:  # some rows see nothing
                out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
            before, after = lse[rows], torch.logaddexp(lse[rows], part_lse.T)
            merged = out[rows] * (before - after).exp().unsqueeze(-1) + part * (part_lse.T - after).exp().unsqueeze(-1)
            out[rows], lse[rows] = merged.to(out.dtype), after
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.peer = peer
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for call in ctx.peer.calls:
            rows, keys = call.query_rows, call.key_rows
            gradients = ctx.peer.kernels.backward(
                dout[rows], q[rows], k[keys], v[keys], out[rows], lse[rows].T.contiguous(), call
            )
            for total, index, part in zip((dq, dk, dv), (rows, keys, keys), gradients):
                total.index_add_(0, index, part.float())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


class TorchFlash2:
    """FlashAttention-2 inside torch; on the CPU its flash kernel, sequence by sequence."""

    label = "torch flash"

    def __init__(self, device: torch.device, head_dim: int):
        self.cpu, self.scale = device.type == "cpu", head_dim**-0.5

    def forward(self, q, k, v, call):
        if self.cpu:
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            parts = [attend(q[i], k[j], v[j], scale=self.scale) for q, k, v, i, j in _each(q, k, v, call)]
            return torch.cat([out[0].transpose(0, 1) for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, False, False, scale=self.scale
        )
        return out, lse

    def backward(self, dout, q, k, v, out, lse, call):
        if self.cpu:
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            dout, out = (x.transpose(0, 1).unsqueeze(0) for x in (dout, out))
            parts = [
                attend(dout[i], q[i], k[j], v[j], out[i], lse[None, :, i[2]], 0.0, False, scale=self.scale)
                for q, k, v, i, j in _each(q, k, v, call)
            ]
            return [torch.cat([part[n][0].transpose(0, 1) for part in parts]) for n in range(3)]
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # seed and offset of a dropout that is not there
        return torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            call.cu_q,
            call.cu_k,
            call.max_q,
            call.max_k,
            0.0,
            False,
            unused,
            unused,
            scale=self.scale,
        )


class FlashAttnPackage:
    """FlashAttention-2 of the flash-attn package."""

    label = "flash-attn"

    def __init__(self, device: torch.device, head_dim: int):
        self.module = _import("flash_attn.flash_attn_interface", device)
        self.scale = head_dim**-0.5

    def forward(self, q, k, v, call):
        out, lse, *_ = self.module._flash_attn_varlen_forward(
            q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, self.scale, causal=False
        )
        return out, lse

    def backward(self, dout, q, k, v, out, lse, call):
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        self.module._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, *gradients, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, self.scale,
            causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=False,
        )  # fmt: skip
        return gradients


class FlashAttention4:
    """FlashAttention-4, the CuTe kernels of the flash-attn package."""

    label = "FlashAttention-4"

    def __init__(self, device: torch.device, head_dim: int):
        self.module = _import("flash_attn.cute.interface", device)
        self.scale = head_dim**-0.5

    def forward(self, q, k, v, call):
        return self.module._flash_attn_fwd(q, k, v, softmax_scale=self.scale, return_lse=True, **self._lengths(call))[
            :2
        ]

    def backward(self, dout, q, k, v, out, lse, call):
        return self.module._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=self.scale, **self._lengths(call))[:3]

    @staticmethod
    def _lengths(call) -> dict:
        """Without the longest lengths it takes all rows for them."""
        lengths = {"cu_seqlens_q": call.cu_q, "cu_seqlens_k": call.cu_k}
        return lengths | {"max_seqlen_q": call.max_q, "max_seqlen_k": call.max_k}


def candidates(device: torch.device, mask_mod: Callable | None = None) -> dict[str, Callable[..., Implementation]]:
    """Label -> constructor (mask, device, heads, head_dim, kv_heads) of everything that is compared, ours first."""
    found = {"frame_attention": Ours, "FlexAttention": partial(Flex, mask_mod=mask_mod)}
    found["FlexAttention on FlashAttention-4"] = partial(Flex, mask_mod=mask_mod, flash=True)
    found["frame_attention, cuda"] = partial(Ours, backend="cuda")
    found["frame_attention, atomic backward"] = _atomic
    if device.type == "cuda":
        found["SDPA, frame by frame"] = partial(Ours, backend="reference")
        found["SDPA, dense mask, efficient"] = partial(DenseSDPA, backend=SDPBackend.EFFICIENT_ATTENTION)
        found["SDPA, dense mask, cudnn"] = partial(DenseSDPA, backend=SDPBackend.CUDNN_ATTENTION)
    else:
        found["SDPA, dense mask, packed"] = partial(DenseSDPA, packed=True)
        found["SDPA, dense mask, per clip"] = partial(DenseSDPA, packed=False)
    for kernels in (TorchFlash2, FlashAttnPackage, FlashAttention4):
        for merged, label in ((False, "varlen, gathered"), (True, "varlen calls + merge")):
            found[f"{label}, {kernels.label}"] = partial(VarlenCalls, kernels=kernels, merged=merged)
    return found


def _atomic(*args) -> Implementation:
    try:
        from attn_atomic import AtomicBackward
    except ImportError as error:
        raise Unavailable(f"the Triton kernels do not load ({error})") from None
    return AtomicBackward(*args)


def exact_attention(mask: FrameMask, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """out, dq, dk and dv in fp32 by the definition, one frame of all alike clips at a time: what every implementation
    is checked against."""
    repeats = mask.repeats

    def split(x):
        return x.view(repeats, x.shape[0] // repeats, *x.shape[1:]).transpose(1, 2)  # [clips, h, rows, d]

    q, k, v, dout = (x.detach().float() for x in (q, k, v, dout))
    sharing = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(sharing, 1) for x in (k, v))
    totals = [torch.zeros_like(x) for x in (q, q, k, v)]
    out, dq, dk, dv = (split(x) for x in totals)
    for row_start, row_end, *bounds in mask.pattern.tolist():
        rows = slice(row_start, row_end)
        keys = torch.cat([torch.arange(*bounds[i : i + 2], device=q.device) for i in range(0, len(bounds), 2)])
        leaves = split(q)[:, :, rows], split(k)[:, :, keys], split(v)[:, :, keys]
        leaves = [x.detach().requires_grad_() for x in leaves]
        weights = (leaves[0] @ leaves[1].transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        part = weights @ leaves[2]
        out[:, :, rows] = part.detach()
        gradients = torch.autograd.grad(part, leaves, split(dout)[:, :, rows])
        dq[:, :, rows] = gradients[0]
        dk.index_add_(2, keys, gradients[1])
        dv.index_add_(2, keys, gradients[2])
    return [*totals[:2], *(x.unflatten(1, (-1, sharing)).sum(2) for x in totals[2:])]


def dense(mask: FrameMask, device: torch.device) -> Tensor:
    """`mask.to_dense()`, made on the device."""
    seen = torch.zeros(mask.num_queries, mask.num_keys, dtype=torch.bool, device=device)
    for row_start, row_end, *bounds in mask.frames.tolist():
        for start, end in zip(bounds[::2], bounds[1::2]):
            seen[row_start:row_end, start:end] = True
    return seen


def touched_pairs(mask: FrameMask, rows_per_tile: int, keys_per_tile: int) -> int:
    """Query-key pairs in the tiles of a clip that hold any allowed pair: what a tiled kernel computes."""
    table, repeats = mask.pattern.tolist(), mask.repeats
    rows, total, first = mask.num_queries // max(repeats, 1), 0, 0
    for start in range(0, rows, rows_per_tile):
        end = min(start + rows_per_tile, rows)
        while table[first][1] <= start:
            first += 1
        touched, group = set(), first
        while group < len(table) and table[group][0] < end:
            bounds = table[group][2:]
            for key_start, key_end in zip(bounds[::2], bounds[1::2]):
                if key_end:
                    touched.update(range(key_start // keys_per_tile, -(-key_end // keys_per_tile)))
            group += 1
        total += len(touched) * rows_per_tile * keys_per_tile
    return repeats * total


def _intervals(mask: FrameMask) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]:
    """Groups of rows, and the intervals of keys that each sees."""
    rows, keys = [], []
    for row_start, row_end, *bounds in mask.frames.tolist():
        rows.append((row_start, row_end))
        keys.append([(start, end) for start, end in zip(bounds[::2], bounds[1::2]) if end > start])
    return rows, keys


def _ranges(intervals: list[tuple[int, int]]) -> Tensor:
    """All of start .. end - 1, one interval after another."""
    starts, ends = torch.tensor(intervals).T
    lens = ends - starts
    owner = torch.repeat_interleave(lens)
    ends = lens.cumsum(0)
    return torch.arange(int(ends[-1])) - (ends - lens)[owner] + starts[owner]


def _each(q: Tensor, k: Tensor, v: Tensor, call: Sequences):
    """q, k, v as [1, h, n, d] with the index of every sequence's rows and keys."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    q_ends, k_ends = call.cu_q.tolist(), call.cu_k.tolist()
    everything = slice(None)
    for i in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        yield q, k, v, (everything, everything, rows), (everything, everything, keys)


def _import(name: str, device: torch.device):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from None
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    return module


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
