"""Masks against the rules pair by pair, and their schedules against the masks: every allowed pair exactly once, bare
blocks bare, executed pairs counted."""

import torch
from hypothesis import strategies as st

from ..kernels.frame_masks import cases, slices
from ..kernels.plans import SIZES, check_keys, check_rows, masks
from .registry import check_examples, fuzzer


@fuzzer("masks", ci_seeds=2)
def random_masks(seed: int) -> int:
    def check(case):
        assert torch.equal(case.mask.to_dense(), case.dense)
        assert case.mask.num_pairs == int(case.dense.sum())
        assert [case.mask.num_queries, case.mask.num_keys] == list(case.dense.shape)
        assert [sum(case.clip_lens), sum(case.key_lens)] == list(case.dense.shape)

    return check_examples(seed, 300, st.one_of(cases(), slices()), check)


@fuzzer("plans", ci_seeds=3)
def random_plans(seed: int) -> int:
    def check(drawn):
        mask, sizes = drawn
        check_rows(mask, *sizes)
        check_keys(mask, *sizes)

    return check_examples(seed, 150, st.tuples(masks(), SIZES), check)
