"""Masked tokens: the cosine schedules of noise and of masks, the token head and its sampler, against the formulas."""

import math

import pytest
import torch

from mimo.config import MiMoConfig
from mimo.diffusion import EpsilonSchedule, build_schedule
from mimo.network.token_diffusion import TokenDiffusion
from mimo.recipes.masked_tokens import masked_count
from mimo.sampling.masked import mask_counts
from mimo_kernels import guided_step

HEAD = {"token_depth": 2, "token_width": 16, "parameterization": "epsilon", "mask_ratio": (0.7, 1.0)}
HEAD |= {"mask_weight": 0.0, "dim": 24, "heads": 3, "channels": 5}


def signal() -> list[float]:
    """abar of every timestep, in a loop."""
    abar, found = 1.0, []
    for t in range(1000):
        now, then = (math.cos(((t + k) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (0, 1))
        abar *= 1 - min(1 - then / now, 0.999)
        found.append(abar)
    return found


def head(**changes) -> TokenDiffusion:
    """A token head in which nothing is zero."""
    torch.manual_seed(0)
    made = TokenDiffusion(MiMoConfig(**HEAD | changes), "auto")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def test_the_noise_schedule_is_the_cosine():
    schedule, abar = build_schedule("epsilon"), signal()
    t = torch.arange(1000)
    assert type(schedule) is EpsilonSchedule
    torch.testing.assert_close(schedule.alpha(t), torch.tensor(abar).sqrt(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(schedule.sigma(t), torch.tensor([math.sqrt(1 - a) for a in abar]), rtol=1e-6, atol=1e-9)
    # The closed form of iDDPM, where no beta is cut off.
    closed = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (0, 1, 500, 990)]
    assert [abar[k - 1] for k in (1, 500, 990)] == pytest.approx([c / closed[0] for c in closed[1:]])
    x, eps = torch.randn(2, 3, 4)
    noisy = schedule.add_noise(x, eps, torch.tensor([0, 500, 999]))
    for row, at in enumerate((0, 500, 999)):
        torch.testing.assert_close(noisy[row], math.sqrt(abar[at]) * x[row] + math.sqrt(1 - abar[at]) * eps[row])


@pytest.mark.parametrize(("steps", "visited"), [(1, [500]), (4, [875, 625, 375, 125]), (1000, [*range(999, -1, -1)])])
def test_a_step_is_the_mean_and_variance_of_the_posterior(steps, visited):
    """x' ~ q(x' | x, x_0) of the two timesteps, as Ho et al. write it (Eq. 6 and 7), with the x_0 that eps says."""
    schedule, abar = EpsilonSchedule(), signal()
    assert schedule.sampling_timesteps(steps).tolist() == visited
    coefficients = schedule.coefficients(steps).double()
    for i, t in enumerate(visited):
        here, there = abar[t], abar[visited[i + 1]] if i + 1 < steps else 1.0
        a, x, eps = here / there, 0.7, -0.3
        clean = (x - math.sqrt(1 - here) * eps) / math.sqrt(here)
        mean = (math.sqrt(there) * (1 - a) * clean + math.sqrt(a) * (1 - there) * x) / (1 - here)
        deviation = math.sqrt((1 - there) / (1 - here) * (1 - a))
        of_x, of_eps, of_noise = coefficients[i].tolist()
        assert of_x * x + of_eps * eps == pytest.approx(mean, rel=1e-4, abs=1e-5)
        assert of_noise == pytest.approx(deviation, rel=1e-5, abs=1e-9)
        at = schedule.step(torch.tensor(eps), torch.tensor(x), i, torch.tensor(2.0))
        assert at.item() == pytest.approx(mean + 2 * deviation, rel=1e-4, abs=1e-4)
    with pytest.raises(ValueError, match="steps=1001: expected 1..1000"):
        schedule.sampling_timesteps(1001)


def test_the_head_is_mars_mlp():
    """Each token by itself, step by step in plain tensors."""
    made = head()
    x, z, t = torch.randn(3, 4, 5), torch.randn(4, 24), torch.randint(1000, (3, 4))
    found = made(x, t, z)
    with torch.no_grad():
        for k in range(3):
            for n in range(4):
                angle = t[k, n] * 10_000 ** -(torch.arange(128) / 128)
                waves = torch.cat([angle.cos(), angle.sin()])
                c = made.time[2](torch.nn.functional.silu(made.time[0](waves))) + made.told(z[n])
                c = c * c.sigmoid()
                y = made.embed(x[k, n])
                for block in made.blocks:
                    shift, scale, gate = block.modulation(c).view(3, 16)
                    normed = (y - y.mean()) / (y.var(correction=0) + 1e-6).sqrt() * block.norm.weight + block.norm.bias
                    hidden = block.up(normed * (1 + scale) + shift)
                    y = y + gate * block.down(hidden * hidden.sigmoid())
                shift, scale = made.modulation(c).view(2, 16)
                y = (y - y.mean()) / (y.var(correction=0) + 1e-6).sqrt()
                torch.testing.assert_close(found[k, n], made.out(y * (1 + scale) + shift), rtol=1e-3, atol=1e-4)


def test_a_fresh_head_predicts_nothing():
    torch.manual_seed(0)
    made = TokenDiffusion(MiMoConfig(**HEAD), "auto")
    made.initialise()
    assert not made(torch.randn(2, 5), torch.tensor([0, 999]), torch.randn(2, 24)).any()


def test_the_gradients_of_the_head_by_finite_differences():
    made = head(token_width=8).double()
    x, z, t = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64), torch.arange(6) * 150
    x.requires_grad_(), z.requires_grad_()
    parameters = [made.blocks[0].modulation.weight, made.told.weight, made.out.bias]
    assert torch.autograd.gradcheck(
        lambda x, z, *_: made(x, t.view(2, 3), z), (x, z, *parameters), eps=1e-6, atol=1e-7, fast_mode=True
    )


@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_tokens_are_drawn_by_ancestral_steps_under_guidance(temperature):
    made, schedule, steps = head(), EpsilonSchedule(), 4
    z, start, noise = torch.randn(2, 3, 24), torch.randn(3, 5), torch.randn(steps, 3, 5)
    given = start.clone()
    found = made.sample(z, start, temperature * noise, torch.tensor([3.0, -2.0]), schedule, steps)
    assert torch.equal(start, given)
    abar, x, visited = signal(), start, [875, 625, 375, 125]
    with torch.no_grad():
        for i, t in enumerate(visited):
            told, null = (made(x, torch.full((3,), t), z[g]) for g in (0, 1))
            eps = null + 3 * (told - null)
            here, there = abar[t], abar[visited[i + 1]] if i + 1 < steps else 1.0
            a = here / there
            x = (x - (1 - a) / math.sqrt(1 - here) * eps) / math.sqrt(a)
            x = x + temperature * math.sqrt((1 - there) / (1 - here) * (1 - a)) * noise[i]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    for row in range(3):  # a token does not depend on the others
        alone = made.sample(
            z[:, row : row + 1], start[row : row + 1], temperature * noise[:, row : row + 1].contiguous(),
            torch.tensor([3.0, -2.0]), schedule, steps,
        )  # fmt: skip
        torch.testing.assert_close(alone[0], found[row], rtol=1e-5, atol=1e-5)


def test_masks_follow_the_cosine():
    for tokens, steps in ((1024, 64), (36, 8), (1440, 64)):
        counts = mask_counts(tokens, steps)
        assert len(counts) == steps and sum(counts) == tokens and min(counts) > 0
        left = tokens
        for k, count in enumerate(counts[:-1], start=1):
            left -= count
            exact = math.floor(tokens * math.cos(math.pi / 2 * k / steps))
            assert left == exact or left < exact  # one token per step at least, where the cosine is flat
        assert left == counts[-1]
    assert mask_counts(1024, 64)[:4] == [1, 1, 1, 2] and mask_counts(4, 64) == [1, 1, 1, 1] == mask_counts(4, 4)
    assert mask_counts(7, 1) == [7] and mask_counts(1, 9) == [1]
    with pytest.raises(ValueError, match="tokens=4, steps=0: expected 1 or more"):
        mask_counts(4, 0)


def test_mask_ratios_are_a_normal_distribution_cut_off():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(4000, generator=generator, dtype=torch.float64).tolist()
    found = torch.tensor([masked_count(1000, (0.7, 1.0), u) for u in drawn]) / 1000
    assert found.min() >= 0.7 and found.max() == 1.0
    # Of N(1, 0.25^2) below 1: P(r > x) by the error function.
    for x in (0.75, 0.85, 0.95):
        above, whole = (math.erf((1 - y) / 0.25 / math.sqrt(2)) for y in (x, 0.7))
        assert (found > x).double().mean().item() == pytest.approx(above / whole, abs=0.02)
    assert masked_count(1000, (0.7, 1.0), 0.0) == 700 and masked_count(5, (0.9, 0.9), 0.5) == 5
    assert {masked_count(16, (0.5, 0.5), u) for u in (0.0, 0.3, 0.999)} == {8}


def test_a_step_with_noise_is_guided_steps(backend="reference"):
    """The operator's three coefficients and the schedule's step are the same step."""
    schedule = EpsilonSchedule()
    coefficients = schedule.coefficients(5)
    x, v, noise = torch.randn(3, 4), torch.randn(1, 3, 4), torch.randn(3, 4)
    for i in range(5):
        found = guided_step(x.clone(), v, torch.ones(1), coefficients, torch.tensor([i]), noise=noise, backend=backend)
        torch.testing.assert_close(found, schedule.step(v[0], x, i, noise), rtol=1e-6, atol=1e-6)
