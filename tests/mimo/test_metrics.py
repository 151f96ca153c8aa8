"""Metrics against independent computations and the values that are known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mimo.evaluation.features import WEIGHT_FREE
from mimo.evaluation.metrics import (
    Features,
    bootstrap_interval,
    frechet_distance,
    frechet_from_features,
    mean_and_covariance,
    mmd,
    mmd_interval,
    psnr,
    ssim,
)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def gaussian_window() -> np.ndarray:
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    return np.outer(line, line) / line.sum() ** 2


def ssim_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """One colour of one frame: every window by itself."""
    window, values = gaussian_window(), []
    x, y = (np.pad(z.astype(float), 5, mode="reflect") for z in (x, y))
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = (z[row : row + 11, column : column + 11] for z in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            shared = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(light * (2 * shared + c2) / (var_a + var_b + c2))
    return float(np.mean(values))


def test_psnr_is_that_of_the_mean_squared_error():
    video, truth = clips(2, 3, 8, 9), clips(2, 3, 8, 9, seed=1)
    error = (video.numpy().astype(float) - truth.numpy()) ** 2
    expected = 10 * np.log10(255**2 / error.mean(axis=(2, 3, 4)))
    np.testing.assert_allclose(psnr(video, truth).numpy(), expected, rtol=1e-7)  # the library's logarithm is fp32
    assert psnr(torch.full_like(truth, 11), torch.full_like(truth, 10)).unique().item() == pytest.approx(
        48.1308, abs=1e-4
    )
    assert (psnr(truth, truth) == 100).all()


def test_ssim_is_that_of_every_window():
    truth = clips(2, 12, 13)
    video = (truth.float() * 0.8 + 20).to(torch.uint8)
    expected = [
        np.mean([ssim_by_loops(v[..., c], t[..., c]) for c in range(3)]) for v, t in zip(video.numpy(), truth.numpy())
    ]
    np.testing.assert_allclose(ssim(video, truth).numpy(), expected, rtol=1e-6)
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2, dtype=torch.float64))
    # Constant frames have no structure: what is left is (2 a b + c1) / (a^2 + b^2 + c1).
    flat = ssim(torch.full_like(truth, 100), torch.full_like(truth, 120))[0]
    c1 = (0.01 * 255) ** 2
    assert flat == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), rel=1e-6)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"video is torch.float32 .*: expected torch.uint8 \[..., F, H, W, 3\]"):
        psnr(clips(1, 4, 4).float(), clips(1, 4, 4))
    with pytest.raises(ValueError, match=r"video \[2, 4, 4, 3\] and truth \[1, 4, 4, 3\]: expected one shape"):
        psnr(clips(2, 4, 4), clips(1, 4, 4))
    with pytest.raises(ValueError, match="frames of 10 x 20: expected at least 11 x 11"):
        ssim(clips(1, 10, 20), clips(1, 10, 20))


class Passed(nn.Module):
    """Features for torchmetrics' FID: pixels of the first row."""

    num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 0, :6].double()


def test_frechet_distance_of_gaussians_has_a_closed_form():
    a, b = draws(500, 8), draws(500, 8, seed=1)
    assert frechet_from_features(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_from_features(a, a + 3) == pytest.approx(8 * 9)  # moved: the squared distance
    assert frechet_from_features(a, 2 * a + 1) == pytest.approx(
        float((a.mean(0) + 1).square().sum() + mean_and_covariance(a)[1].trace())
    )  # twice as wide: tr(C) (2 - 1)^2
    mean, cov = torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 0.0]))
    other = torch.diag(torch.tensor([9.0, 1.0, 0.0]))  # commuting: the sum of (root - root)^2, singular or not
    assert frechet_distance(mean, cov, mean + 1, other) == pytest.approx(3 + 4 + 1)
    # Not commuting, against the general root: the eigenvalues of the product.
    mixed = b @ draws(8, 8, seed=2)
    (m, c), (n, d) = mean_and_covariance(a), mean_and_covariance(mixed)
    np.testing.assert_allclose(c.numpy(), np.cov(a.numpy(), rowvar=False), rtol=1e-12)
    root = np.sqrt(np.linalg.eigvals(c.numpy() @ d.numpy()).astype(complex)).real.sum()
    expected = float((m - n).square().sum() + c.trace() + d.trace()) - 2 * root
    assert frechet_from_features(a, mixed) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_few_vectors_is_that_of_their_covariances():
    """The small way and the large way are one formula: N < D."""
    a, b = draws(5, 12), 2 * draws(7, 12, seed=1) + 0.3
    large = frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))
    assert frechet_from_features(a, b) == pytest.approx(large, rel=1e-6)
    assert frechet_from_features(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(feature=Passed(), normalize=False).set_dtype(torch.float64)
    real, made = clips(40, 6, 6).movedim(-1, 1), (clips(40, 6, 6, seed=1) // 2).movedim(-1, 1)
    fid.update(real, real=True)
    fid.update(made, real=False)
    ours = frechet_from_features(Passed()(real), Passed()(made))
    assert ours == pytest.approx(float(fid.compute()), rel=1e-6)


def test_mmd_is_the_mean_over_all_pairs():
    a, b = 5 * draws(6, 4), 5 * draws(5, 4, seed=1) + 2

    def kernel(x, y):
        return np.mean([[math.exp(-sum((u - v) ** 2 for u, v in zip(p, q)) / 200) for p in x] for q in y])

    x, y = a.tolist(), b.tolist()
    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert mmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert mmd(a, a) == pytest.approx(0, abs=1e-9)
    assert mmd(a, a + 1e3) == pytest.approx(1000 * 2 * kernel(x, x))
    # Vectors far from each other: 2 scale / N is all there is, which is why N belongs to the figure.
    far = torch.eye(50, dtype=torch.float64) * 1e4
    assert mmd(far[:25], far[25:]) == pytest.approx(1000 * 2 / 25)
    # Gaussians of one width, moved by m: E k = (s^2 / (s^2 + 2))^(D/2) exp(-m^2 / (2 (s^2 + 2))).
    near, moved = draws(1000, 2), draws(1000, 2, seed=1) + 10
    alike = 100 / 102
    expected = 1000 * 2 * alike * (1 - math.exp(-200 / (2 * 102)))
    assert mmd(near, moved) == pytest.approx(expected, rel=0.03)


def test_mmd_in_parts_is_mmd(monkeypatch):
    a, b = draws(9, 4), draws(8, 4, seed=1) + 1
    whole = mmd(a, b), mmd_interval(a, b, resamples=5)
    monkeypatch.setattr("mimo.evaluation.metrics._ROWS", 4)
    assert (mmd(a, b), *mmd_interval(a, b, resamples=5)) == pytest.approx((whole[0], *whole[1]), rel=1e-9)
    # The weights of a resample are its rows.
    by_rows = bootstrap_interval([a, b], mmd, resamples=5, paired=False, centred=True)
    assert whole[1] == pytest.approx(by_rows, rel=1e-9)


def test_sets_that_have_no_distance_are_refused():
    with pytest.raises(ValueError, match=r"features are \[1, 4\]: expected \[N, D\], at least 2 vectors"):
        mean_and_covariance(draws(1, 4))
    with pytest.raises(ValueError, match="features of 4 and 5 values: expected one width"):
        mmd(draws(3, 4), draws(3, 5))
    with pytest.raises(ValueError, match="features of the second set: not all of them are finite"):
        frechet_from_features(draws(3, 4), draws(3, 4) / 0)
    with pytest.raises(ValueError, match=r"shapes \[3\], \[3, 3\], \[4\], \[4, 4\]: expected"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = draws(400) * 3 + 7
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * 3 / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.08)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.08)
    assert (low, high) == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    narrow = bootstrap_interval(values, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        low, high = bootstrap_interval(draws(50, seed=seed), seed=seed, resamples=200)
        covered += low <= 0 <= high
    assert 88 <= covered <= 99


def test_bootstrap_of_pairs_and_of_sets():
    a = draws(60) * 10
    b = a + 1 + 0.01 * draws(60, seed=1)

    def difference(x, y):
        return float((y - x).mean())

    together, apart = bootstrap_interval([a, b], difference), bootstrap_interval([a, b], difference, paired=False)
    assert together[1] - together[0] < 0.01 < 1 < apart[1] - apart[0]
    # Resamples repeat rows, which moves sets apart: an interval around the distance has to be centred.
    x, y = draws(30, 10), draws(30, 10, seed=1)
    distance = frechet_from_features(x, y)
    options = {"resamples": 50, "paired": False}
    plain = bootstrap_interval([x, y], frechet_from_features, **options)
    centred = bootstrap_interval([x, y], frechet_from_features, **options, centred=True)
    assert plain[0] > distance and centred[0] < distance < centred[1]
    with pytest.raises(ValueError, match="sets of 60 and 30 samples: expected one size, as they are paired"):
        bootstrap_interval([a, draws(30)], difference)
    with pytest.raises(ValueError, match="values that are not finite"):
        bootstrap_interval([1.0, math.inf])


@pytest.mark.parametrize("name", WEIGHT_FREE)
def test_features_without_weights(name):
    features = WEIGHT_FREE[name]()
    assert isinstance(features, Features) and not features.needs_weights
    video = clips(3, 4, 24, 20)
    made = features(video)
    assert made.shape == (3, {"dct": 60, "random": 128}[name]) and made.dtype == torch.float32
    torch.testing.assert_close(made, WEIGHT_FREE[name]()(video), rtol=0, atol=0)  # no state, no chance
    torch.testing.assert_close(made[1:2], features(video[1:2]), rtol=0, atol=0)  # nothing of the batch
    assert not torch.allclose(made, features(video.flip(1)))  # in what order frames come
    assert not torch.allclose(made, features(video // 2))


def test_features_without_weights_rank_what_is_worse_last():
    """Noise moves a set of smooth clips away, more noise further."""
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    phases = torch.rand(24, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 6
    waves = torch.sin((rows + columns) / 4 + torch.arange(4).view(1, 4, 1, 1) / 3 + phases)
    truth = (waves * 60 + 128).to(torch.uint8)[..., None].repeat(1, 1, 1, 1, 3)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    for kind in WEIGHT_FREE.values():
        features = kind()
        scores = [
            frechet_from_features(features(truth), features((truth + level * noise).clamp(0, 255).to(torch.uint8)))
            for level in (0, 8, 32)
        ]
        assert 0 == pytest.approx(scores[0], abs=1e-6) and scores[0] < scores[1] < scores[2], (kind.name, scores)


def test_dct_features_of_constant_clips_are_their_grey_levels():
    made = WEIGHT_FREE["dct"]()(torch.full((1, 5, 32, 48, 3), 70, dtype=torch.uint8)).view(3, 20)
    torch.testing.assert_close(made[:, 0], torch.full((3,), 70.0))
    assert made[:, 1:].abs().max() < 1e-4
