"""A NaN, or an infinity, stays in its clip: in q, k, v or an incoming gradient of one clip it changes no bit of
another."""

import functools

import pytest
import torch

from mimo_kernels import paged_frame_attention
from mimo_kernels.attention import FrameMask, frame_attention
from mimo_kernels.testing import poisoned_memory

from .test_frame_attention import DEVICE, tensors
from .test_paged_attention import ragged

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter

# Clips that end inside tiles and blocks, some of one frame or of one row; a mask of alike clips has a schedule of its
# own.
RAGGED = FrameMask.teacher_forcing([[7, 3], [20, 5], [1]], [[9, 4], [3, 16], [2]])
MASKS = {
    "ragged": RAGGED,
    "alike": FrameMask.teacher_forcing([[7, 3]] * 3, [[9, 4]] * 3),
    "block causal": FrameMask.block_causal([[5, 9, 2], [11], [3, 3, 3, 3]], window=2, sink=1),
    "bidirectional": FrameMask.bidirectional([[13], [6], [21]]),
    "tiny": FrameMask.block_causal([[1, 2], [1, 1, 1], [2], [1, 1]]),
    "few ask": FrameMask.block_causal([[5, 9, 2], [11, 3], [3, 3, 3, 3]], window=2, queries=slice(-2, -1)),
    "few of the alike ask": FrameMask.block_causal([[9, 4]] * 3, queries=slice(1, None)),
}


@pytest.fixture(autouse=True)
def launches():
    """Instead of the watch over every load, which takes a NaN for what nobody has stored."""
    return []


def run(mask, inputs, dout, backend):
    """out, lse, dq, dk, dv, rows first."""
    with poisoned_memory():
        out, lse = frame_attention(*inputs, mask, backend=backend, return_lse=True)
        return [out, lse.T, *torch.autograd.grad([out, lse], inputs, [dout, torch.ones_like(lse)])]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", MASKS)
def test_other_clips_do_not_change_by_a_bit(name, backend):
    mask = MASKS[name]
    attend = functools.partial(run, mask, backend=backend)
    inputs, (dout, *_) = tensors(mask, heads=1), tensors(mask, heads=1, seed=3)
    dout = dout.detach()
    clean = attend(inputs, dout)
    own, others = [], []  # the rows and the keys of the clip that goes wrong, and all others
    for lens in (mask.clip_lens, mask.key_lens):
        own.append(torch.arange(lens[0], lens[0] + lens[1], device=DEVICE))
        others.append(torch.cat([torch.arange(lens[0]), torch.arange(lens[0] + lens[1], sum(lens))]).to(DEVICE))
    for which in range(4):
        spoilt = own[which in (1, 2)]
        for bad in (float("nan"), float("inf")):
            spoiled = [x.detach().clone() for x in (*inputs, dout)]
            for row in spoilt[[0, -1]].tolist():
                spoiled[which][row, :, ::5] = bad
            results = attend([x.requires_grad_() for x in spoiled[:3]], spoiled[3])
            for i, (result, expected) in enumerate(zip(results, clean)):
                assert torch.equal(result[others[i > 2]], expected[others[i > 2]])
            shows = [result[own[i > 2]].isfinite().all() for i, result in enumerate(results)]
            assert not all(shows) or name == "few ask"  # where it is, it shows, if anybody sees it


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("page_size", [4, 16])
def test_other_sequences_do_not_change_by_a_bit(backend, page_size):
    clips, seqs = ragged(page_size)
    view = clips.cache.view(seqs)
    inputs = [x.clone() for x in clips.frame(seqs, 9)]

    def attend(q, k, v):
        return paged_frame_attention(q, k, v, clips.cache, layer=1, view=view, backend=backend)

    clean = attend(*inputs)
    for which in range(3):
        spoiled = [x.clone() for x in inputs]
        spoiled[which][1, 3, :, ::3] = float("nan")
        out = attend(*spoiled)
        assert torch.equal(out[[0, 2, 3, 4]], clean[[0, 2, 3, 4]]) and not out[1].isfinite().all()
    page = int(view.page_table[3, 1])  # of the evicted sequence, which shares with nobody
    for part in range(2):
        kept = clips.cache.pool[1, part, page].clone()
        clips.cache.pool[1, part, page] = float("nan")
        view.refresh([None] * len(seqs)).refresh(seqs)  # the reference takes the pages anew
        out = attend(*inputs)
        assert torch.equal(out[[0, 1, 2, 4]], clean[[0, 1, 2, 4]]) and not out[3].isfinite().all()
        clips.cache.pool[1, part, page] = kept
