"""assert_cached_equals_masked with a stranger's model, right and wrong, and with masks that no cache can serve."""

import pytest
import torch
import torch.nn.functional as F

from mimo_kernels.attention import FrameMask
from mimo_kernels.testing import assert_cached_equals_masked


class Stranger:
    """A transformer of attention alone with learned places, grouped queries and keys that are rotated by place."""

    def __init__(self, tokens: int, layers: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 8):
        random = torch.Generator().manual_seed(0)
        self.split, self.dim = [heads, kv_heads, kv_heads], dim
        self.x = torch.randn(tokens, heads * dim, generator=random)
        self.qkv = torch.randn(layers, heads * dim, sum(self.split) * dim, generator=random) / 4
        self.proj = torch.randn(layers, heads * dim, heads * dim, generator=random) / 4
        self.place = torch.arange(tokens)

    def __call__(self, rows, attend):
        x, angle = self.x[rows], (0.3 * self.place[rows])[:, None, None]
        for layer, (qkv, proj) in enumerate(zip(self.qkv, self.proj)):
            q, k, v = (F.layer_norm(x, x.shape[-1:]) @ qkv).unflatten(1, (-1, self.dim)).split(self.split, 1)
            x = x + attend(layer, q * angle.cos(), k * angle.cos(), v).flatten(1) @ proj
        return x


MASKS = {
    "window and sink": FrameMask.block_causal([[3, 5, 2, 4], [1, 6]], window=2, sink=1),
    "teacher forcing": FrameMask.teacher_forcing(
        [[3, 2, 4], [5]], [[2, 6, 3], [1]], drop_history=[[False, True, False], [False]]
    ),
    "all at once": FrameMask.bidirectional([[7]]),
    "from the last to the first": FrameMask.from_table(
        torch.tensor([[0, 2, 0, 5, 0, 0, 0, 0], [2, 5, 2, 5, 0, 0, 0, 0]])
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_right_model(name):
    assert_cached_equals_masked(Stranger(MASKS[name].num_tokens), MASKS[name], page_size=4)


def test_a_model_whose_places_begin_anew_with_every_frame():
    class Wrong(Stranger):
        def __call__(self, rows, attend):
            self.place = torch.arange(len(self.x)) - rows.start
            return super().__call__(rows, attend)

    mask = MASKS["window and sink"]
    with pytest.raises(
        AssertionError, match=r"^rows 3\.\.8 of clip 0: cached and masked outputs differ by .* 1.0e-05 of"
    ):
        assert_cached_equals_masked(Wrong(mask.num_tokens), mask)
    assert_cached_equals_masked(Wrong(mask.num_tokens), mask, tolerance=100.0)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([[0, 2, 0, 4], [2, 4, 0, 3]], r"rows 2\.\.4 see a part of rows 2\.\.4, expected all or none of what is one"),
        ([[0, 2, 0, 4], [2, 4, 0, 2]], r"rows 2\.\.4 do not see themselves, expected rows that do$"),
        ([[0, 2, 0, 4], [2, 3, 0, 3], [3, 4, 0, 4]], r"rows 0\.\.2 see rows that see them in turn, expected an order"),
    ],
)
def test_a_mask_that_no_cache_can_serve(cells, message):
    mask = FrameMask.from_table(torch.tensor([[*row, 0, 0, 0, 0] for row in cells]))
    with pytest.raises(ValueError, match=message):
        assert_cached_equals_masked(Stranger(4), mask)


def test_a_model_that_does_not_keep_to_the_protocol():
    mask, model = MASKS["all at once"], Stranger(7)
    with pytest.raises(ValueError, match=r"^the model returned \[6, 32\] for 7 rows, expected \[rows, ...\]$"):
        assert_cached_equals_masked(lambda *args: model(*args)[1:], mask)
    with pytest.raises(ValueError, match="^the model called attend for layers none, expected 0, 1, ..."):
        assert_cached_equals_masked(lambda rows, attend: model.x[rows], mask)
    with pytest.raises(ValueError, match=r"^the model called attend for layers 1: \[7, 2, 8\] torch.float32, 2: "):
        assert_cached_equals_masked(lambda rows, attend: model(rows, lambda layer, *qkv: attend(layer + 1, *qkv)), mask)
