"""Attention of every backend that runs here, out, lse and all gradients, against double precision."""

import hypothesis
import torch
from hypothesis import strategies as st

from mimo_kernels.attention import FrameMask, frame_attention

from ..kernels.frame_masks import cases, slices, tables
from ..kernels.test_frame_attention import compare, gradients, tensors
from ..kernels.test_paged_attention import follow_a_cache
from ..kernels.test_paged_gradients import any_call
from .registry import batch, check_examples, fuzzer

MASKS = st.one_of(
    cases(max_clips=2).map(lambda case: case.mask),
    slices().map(lambda case: case.mask),
    tables().map(FrameMask.from_table),
)
SCALES = st.sampled_from([None, None, 1.5, 0.0, -0.3])


def attention(seed: int, examples: int, backend: str, dtypes: list[torch.dtype], head_dims: list[int]) -> int:
    def check(drawn):
        mask, dtype, head_dim, (kv_heads, sharing), scale, values = drawn
        inputs = tensors(mask, kv_heads * sharing, head_dim, dtype, seed=values, kv_heads=kv_heads)
        out, lse = frame_attention(*inputs, mask, scale=scale, backend=backend, return_lse=True)
        compare([out, lse, *gradients(out, lse, inputs)], inputs, mask, scale)

    kinds, widths = st.sampled_from(dtypes), st.sampled_from(head_dims)
    heads = st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)])  # of k, and of q for each
    return check_examples(seed, examples, st.tuples(MASKS, kinds, widths, heads, SCALES, st.integers(10, 10**6)), check)


@fuzzer("attention-reference", ci_seeds=1)
def on_the_reference(seed: int) -> int:
    return attention(seed, 60, "reference", [torch.float32, torch.float16, torch.bfloat16], [8, 24, 72, 128])


@fuzzer("attention-triton", ci_seeds=1)
def on_triton(seed: int) -> int:
    return attention(seed, 12, "triton", [torch.float32, torch.float16], [8, 16, 24, 40])


@fuzzer("attention-paged", ci_seeds=1)
def on_pages(seed: int) -> int:
    count = 0

    @hypothesis.seed(seed)
    @batch(40)
    @hypothesis.given(st.data())
    def every(data):
        nonlocal count
        count += 1
        follow_a_cache(data)

    every()
    return count


@fuzzer("attention-paged-gradients", ci_seeds=0)  # the test that it is made of runs with the others
def on_pages_with_gradients(seed: int) -> int:
    count = 0

    @hypothesis.seed(seed)
    @batch(10)
    @hypothesis.given(st.data())
    def every(data):
        nonlocal count
        count += 1
        any_call(data)

    every()
    return count
