"""Linear probes: what can be read is read, what cannot is guessed."""

import pytest
import torch

from mimo.evaluation.linear_probe import ProbeConfig, linear_probe

CLASSES = 4


def separable(n: int, seed: int, classes: int = CLASSES, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, dim] around a centre per class, far apart, on scales that differ by a thousand."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = torch.randn(n, dim, generator=generator)
    x[:, :classes] += 30 * torch.nn.functional.one_hot(labels, classes)
    return x * torch.logspace(-1.5, 1.5, dim) + 5, labels[:, None]


def test_separable_features_are_read_and_shuffled_labels_are_not():
    x, labels = separable(2048, 0)
    test, truth = separable(400, 1)
    assert linear_probe(x[None], labels[None], test, truth, [CLASSES]).all()
    shuffled = labels[torch.randperm(2048, generator=torch.Generator().manual_seed(2))]
    share = linear_probe(x[None], shuffled[None], test, truth, [CLASSES]).float().mean()
    assert abs(share - 1 / CLASSES) < 0.16  # classes err together: 4 clusters, each of one answer or two


def test_features_without_what_is_asked_give_chance():
    generator = torch.Generator().manual_seed(0)
    x, test = torch.randn(1, 1024, 8, generator=generator), torch.randn(2000, 8, generator=generator)
    labels = torch.randint(CLASSES, (1, 1024, 1), generator=generator)
    truth = torch.randint(CLASSES, (2000, 1), generator=generator)
    share = linear_probe(x, labels, test, truth, [CLASSES]).float().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_factors_side_by_side_are_read_as_if_alone():
    x, labels = separable(2048, 0)
    test, truth = separable(100, 1)
    other, other_truth = (labels + 1) % 2, (truth + 1) % 2
    together = linear_probe(
        x[None], torch.cat([labels, other], 1)[None], test, torch.cat([truth, other_truth], 1), [4, 2]
    )
    assert together.shape == (100, 2) and together.all()


def test_a_mirrored_view_has_labels_of_its_own():
    """Left and right, of which a mirror makes the other: with the labels of what is shown it is learnt, with those of
    the clip as it was it cannot be."""
    x, labels = separable(2048, 0, classes=2)
    test, truth = separable(200, 1, classes=2)
    swapped = separable(2048, 0, classes=2)[0][torch.arange(2048) ^ 1]  # a clip of the other class
    views = torch.stack([x, swapped])
    right = linear_probe(views, torch.stack([labels, 1 - labels]), test, truth, [2]).float().mean()
    wrong = linear_probe(views, torch.stack([labels, labels]), test, truth, [2]).float().mean()
    assert right == 1 and wrong < 0.9


def test_the_same_seed_gives_the_same_answers():
    x, labels = separable(200, 0, dim=5)
    x = x + 8 * torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    runs = [linear_probe(x[None], labels[None], x, labels, [CLASSES], seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_training_is_as_the_paper_has_it(monkeypatch):
    """10 epochs of whole batches of 128, the rate from 1e-3 down a cosine, and its weight decay."""
    rates, decays = [], set()
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        decays.add(self.param_groups[0]["weight_decay"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    x, labels = separable(300, 0)
    linear_probe(x[None], labels[None], x, labels, [CLASSES])
    cosine = [
        1e-3 * (1 + torch.cos(torch.tensor(i / 20 * torch.pi, dtype=torch.float64)).item()) / 2 for i in range(20)
    ]
    assert rates == pytest.approx(cosine, abs=1e-12) and decays == {0.01}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.full((1, 8, 1), 4)}, r"^labels: expected each below the classes of its factor, \[4\]$"),
        ({"features": torch.zeros(1, 8, 3)}, r"expected \[V, N, D\], \[V, N, 1\], \[M, D\], \[M, 1\]$"),
        ({"features": torch.full((1, 8, 2), torch.nan)}, "^features: not all of them are finite$"),
        ({"features": torch.zeros(1, 1, 2), "labels": torch.zeros(1, 1, 1).long()}, "^1 clips to train .* at least 2$"),
    ],
)
def test_bad_input(change, words):
    given = {"features": torch.zeros(1, 8, 2), "labels": torch.zeros(1, 8, 1).long()} | change
    with pytest.raises(ValueError, match=words):
        linear_probe(given["features"], given["labels"], torch.zeros(3, 2), torch.zeros(3, 1).long(), [4])


def test_bad_settings():
    for name, value in {"epochs": 0, "seeds": 0, "batch_size": 1, "lr": 0.0, "weight_decay": -1.0}.items():
        with pytest.raises(ValueError, match=f"^{name}={value}: expected"):
            ProbeConfig(**{name: value})
