"""The hand-written Hopper kernels on the hardware, by the tests that the Triton kernels pass: run after
test_sm90_probe.py."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from mimo_kernels.attention import frame_attention
from mimo_kernels.attention.sm90 import HEAD_DIMS, device_refusals

from . import test_attention_gpu as suite

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    if reasons := device_refusals(torch.device("cuda", 0)):
        pytest.skip("; ".join(reasons))
    monkeypatch.setattr(suite, "attend", lambda *args, **kwargs: frame_attention(*args, backend="cuda", **kwargs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(mask=suite.masks())
def test_equals_dense_attention(head_dim, dtype, mask):
    suite.check(mask, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("shape", suite.SHAPES)
def test_the_shapes_that_matter(shape):
    mask, head_dim = suite.SHAPES[shape]
    suite.check(mask, head_dim=head_dim)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_heads_that_share_keys(heads, kv_heads, head_dim):
    suite.test_heads_that_share_keys(heads, kv_heads, head_dim)


@pytest.mark.parametrize("shape", ["k600", "minecraft", "wan"])
def test_twenty_runs_give_the_same_bits(shape):
    suite.test_twenty_runs_give_the_same_bits(shape)


def test_a_captured_graph_computes_the_same():
    suite.test_a_captured_graph_computes_the_same()


def test_compiles_as_one_graph():
    suite.test_compiles_as_one_graph()


def test_nothing_waits_for_the_device():
    suite.test_nothing_waits_for_the_device()


def test_more_elements_than_32_bits_count():
    suite.test_more_elements_than_32_bits_count()
