"""CKNNA against its formulas written out over all pairs, and values that are known."""

import math

import pytest
import torch

from mimo.evaluation.cknna import cknna, cknna_interval, jackknife_groups, nearest


def features(n: int = 40, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def neighbours(x: torch.Tensor, k: int) -> list[set[int]]:
    """By sorting."""
    products = (x @ x.T).tolist()
    return [set(sorted((j for j in range(len(x)) if j != i), key=lambda j: -products[i][j])[:k]) for i in range(len(x))]


def by_hand(phi: torch.Tensor, psi: torch.Tensor, k: int, definition: str) -> float:
    """Over matrices of all pairs."""

    def align(x: torch.Tensor, y: torch.Tensor) -> float:
        n = len(x)
        kernels = [z @ z.T for z in (x, y)]
        near = neighbours(x, k), neighbours(y, k)
        both = torch.tensor([[float(j in near[0][i] and j in near[1][i]) for j in range(n)] for i in range(n)])
        if definition == "paper":
            centred = [kernel - kernel.mean(1, keepdim=True) for kernel in kernels]
            return float((both * centred[0] * centred[1]).sum())
        first, second = (both * kernel for kernel in kernels)
        one = torch.ones(n, dtype=x.dtype)
        hsic = torch.trace(first @ second) + (one @ first @ one) * (one @ second @ one) / ((n - 1) * (n - 2))
        return float(hsic - 2 / (n - 2) * (one @ first @ second @ one)) / (n * (n - 3))

    rest = 0.0 if definition == "paper" else 1e-6
    return align(phi, psi) / (math.sqrt(align(phi, phi) * align(psi, psi)) + rest)


@pytest.mark.parametrize("definition", ["paper", "public"])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_it_is_what_the_formulas_say_over_all_pairs(k, definition):
    phi = features()
    psi = phi[:, :4] @ features(4, 5, 1) + 0.8 * features(seed=2)[:, :5]  # alike, but not the same
    expected = by_hand(phi, psi, k, definition)
    assert cknna(phi, psi, k, definition) == pytest.approx(expected, abs=1e-12)
    turned = expected if definition == "paper" else by_hand(psi, phi, k, definition)  # the public one is not symmetric
    assert cknna(psi, phi, k, definition) == pytest.approx(turned, abs=1e-12)
    assert 0.02 < expected < 0.98


@pytest.mark.parametrize("definition", ["paper", "public"])
def test_known_values(definition):
    phi = features(300, 16)
    assert cknna(phi, phi, 10, definition) == pytest.approx(1, abs=1e-4)
    turned = phi @ torch.linalg.qr(features(16, 16, 5))[0]
    assert cknna(phi, turned, 10, definition) == pytest.approx(1, abs=1e-4), "inner products do not see rotations"
    centred = features(300, 16, 7) - 0.3, features(300, 16, 8) - 0.3
    assert abs(cknna(*centred, 10, definition)) < 0.1, "of features that have nothing to do with each other"


def test_the_definitions_differ_as_they_say():
    """The paper's is blind to what is added to all inner products with a row, and counts neighbours that are not
    neighbours of each other; the public one counts them in its correction alone."""
    phi, psi = features(60), features(60, 5, 3)
    paper, public = (cknna(phi, psi, 5, definition) for definition in ("paper", "public"))
    assert abs(paper - public) > 0.01
    # A far point's neighbours do not have it among theirs: one-sided pairs. Only the paper's first sum has them.
    line = torch.tensor([[1.0], [2.0], [3.0], [4.0], [100.0]], dtype=torch.float64)
    assert neighbours(line, 1) == [{4}, {4}, {4}, {4}, {3}]
    assert cknna(line, line, 1, "paper") == pytest.approx(1)
    assert cknna(line, line, 1, "public") == pytest.approx(by_hand(line, line, 1, "public"))


def test_leaving_out_a_group_is_leaving_it_out():
    phi = features(50)
    groups = jackknife_groups(50, seed=3)
    assert sorted(torch.cat(groups).tolist()) == [*range(50)]
    whole, *parts = nearest(phi, 4, groups)
    for group, part in zip(groups, parts, strict=True):
        rest = torch.tensor([i for i in range(50) if i not in group.tolist()])
        (expected,) = nearest(phi[rest], 4)
        assert torch.equal(part.index, expected.index)
        torch.testing.assert_close(part.product, expected.product)
        torch.testing.assert_close(part.mean, expected.mean)
    assert whole.index.shape == (50, 4)


def test_the_interval_has_the_width_of_the_spread_over_other_clips():
    """The jackknife's standard error against the standard deviation over sets that are drawn anew."""

    def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        phi = features(200, 8, seed)
        return phi, phi + 0.7 * features(200, 8, 1000 + seed)

    values = torch.tensor([cknna(*drawn(seed)) for seed in range(40)])
    intervals = torch.tensor([cknna_interval(*drawn(seed)) for seed in range(10)])
    error = ((intervals[:, 2] - intervals[:, 1]) / 2 / 1.96).mean()
    assert 0.5 * values.std() < error < 2 * values.std()
    assert (intervals[:, 0] == values[:10]).all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"^10 nearest neighbours of 10 clips: expected more than max\(10, 3\) clips$"):
        cknna(features(10), features(10))
    with pytest.raises(ValueError, match="^10 nearest neighbours of 11 clips, 9 without a tenth of them: expected"):
        cknna_interval(features(11), features(11))
    with pytest.raises(
        ValueError, match=r"^features \[10, 6\] and \[9, 6\]: expected \[N, D\] and \[N, D'\] of one N$"
    ):
        cknna(features(10), features(9), 2)
    with pytest.raises(ValueError, match="not all of them are finite"):
        cknna(features(10) * math.inf, features(10), 2)
