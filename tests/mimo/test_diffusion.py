"""Schedules against the formulas and against diffusers; Listing 1 against a scalar transcription of its formulas."""

import math

import pytest
import torch

from mimo.diffusion import FlowSchedule, VPredictionSchedule, build_schedule, compute_loss_weight


def toy_model(x: torch.Tensor, t: float) -> torch.Tensor:
    """Some smooth function of x and t in place of a network."""
    return torch.sin(1.7 * x + 0.001 * t) - 0.3 * x


def test_v_schedule_is_the_rescaled_linear_schedule():
    root, product = [], 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        root.append(math.sqrt(product))
    expected = [(r - root[-1]) * root[0] / (root[0] - root[-1]) for r in root]

    schedule, t = VPredictionSchedule(), torch.arange(1000)
    alpha, sigma = schedule.alpha(t).double(), schedule.sigma(t).double()
    torch.testing.assert_close(alpha, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64), rtol=1e-6, atol=0)
    assert alpha[-1] == 0 and sigma[-1] == 1 and schedule.snr(t)[-1] == 0
    assert abs(alpha[0] - math.sqrt(1 - 1e-4)) < 1e-7
    snr = torch.tensor([e**2 / (1 - e**2) for e in expected])
    torch.testing.assert_close(schedule.snr(t), snr, rtol=1e-3, atol=1e-6)  # 1 - e^2 loses digits at the first t


@pytest.mark.parametrize("schedule", [VPredictionSchedule(), FlowSchedule()])
def test_noise_and_target_follow_the_definitions(schedule):
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 2, 3, 4, 5, generator=generator).unbind()
    t = schedule.sample_timesteps((2, 3), generator, x.device)
    noisy, target = schedule.add_noise(x, eps, t), schedule.target(x, eps, t)
    for b in range(2):
        for f in range(3):
            a, s = schedule.alpha(t[b, f]).item(), schedule.sigma(t[b, f]).item()
            torch.testing.assert_close(noisy[b, f], a * x[b, f] + s * eps[b, f])
            v = a * eps[b, f] - s * x[b, f] if isinstance(schedule, VPredictionSchedule) else eps[b, f] - x[b, f]
            torch.testing.assert_close(target[b, f], v)
            assert schedule.snr(t[b, f]).item() == pytest.approx((a / s) ** 2, rel=1e-4)


def test_timesteps_are_a_function_of_the_generator_and_follow_their_distribution():
    for schedule in VPredictionSchedule(), FlowSchedule():
        first, second, third = (
            schedule.sample_timesteps((20_000,), torch.Generator().manual_seed(seed), "cpu") for seed in (3, 3, 4)
        )
        assert torch.equal(first, second) and not torch.equal(first, third)
    uniform = VPredictionSchedule().sample_timesteps((20_000,), torch.Generator().manual_seed(0), "cpu")
    assert uniform.dtype == torch.int64 and uniform.min() == 0 and uniform.max() == 999
    assert abs(uniform.float().mean() - 499.5) < 10
    logit = first.logit()  # of the flow schedule, the last of the loop
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03
    assert torch.equal(FlowSchedule().embedding(torch.tensor([0.25])), torch.tensor([250.0]))


@pytest.mark.parametrize("steps", [1, 10, 50, 100])
def test_ddim_trajectory_equals_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDIMScheduler(
        beta_schedule="linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    reference.set_timesteps(steps)
    ours = VPredictionSchedule()
    timesteps = ours.sampling_timesteps(steps)
    assert torch.equal(timesteps, reference.timesteps)
    x = y = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(reference.timesteps):
        x = ours.step(toy_model(x, t.item()), x, i)
        y = reference.step(toy_model(y, t.item()), t, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_euler_trajectory_equals_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.FlowMatchEulerDiscreteScheduler()
    reference.set_timesteps(steps)
    ours = FlowSchedule()
    timesteps = ours.sampling_timesteps(steps)
    torch.testing.assert_close(ours.embedding(timesteps), reference.timesteps, rtol=1e-6, atol=1e-6)
    x = y = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(reference.timesteps):
        x = ours.step(toy_model(x, t.item()), x, i)
        y = reference.step(toy_model(y, t.item()), t, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [VPredictionSchedule(), FlowSchedule(), FlowSchedule("clean")])
def test_a_perfect_model_is_sampled_back_to_the_data(schedule):
    """With the true v of a single clean x, every trajectory ends on that x; the step index may be a tensor."""
    generator = torch.Generator().manual_seed(2)
    clean, noise = torch.randn(2, 8, generator=generator).unbind()
    x = noise
    for i, t in enumerate(schedule.sampling_timesteps(7)):
        a, s = schedule.alpha(t), schedule.sigma(t)
        eps = (x - a * clean) / s
        stepped = schedule.step(schedule.target(clean, eps, t), x, torch.tensor(i))
        assert torch.equal(stepped, schedule.step(schedule.target(clean, eps, t), x, i))
        x = stepped
    torch.testing.assert_close(x, clean, rtol=1e-5, atol=1e-5)


def test_clean_latents_are_another_word_for_the_velocity():
    """The same steps, and the same errors where tau is at least 0.05: v = (x_tau - x) / tau."""
    said, meant = FlowSchedule("clean"), FlowSchedule()
    assert said.target(CLEAN, NOISE, TAU) is CLEAN
    noisy = said.add_noise(CLEAN, NOISE, TAU)
    wrong = CLEAN + 0.1 * torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(4))
    v = (noisy - wrong) / TAU[:, None]
    errors = (v - meant.target(CLEAN, NOISE, TAU)).square().mean(1)
    weighed = said.error_weight(TAU) * (wrong - CLEAN).square().mean(1)
    torch.testing.assert_close(weighed[TAU >= 0.05], errors[TAU >= 0.05])
    assert (weighed[TAU < 0.05] < errors[TAU < 0.05]).all() and meant.error_weight(TAU) is None
    visited = said.sampling_timesteps(5), meant.sampling_timesteps(5)
    coefficients = said.coefficients(5)
    for i in range(5):
        v = (noisy - wrong) / visited[0][i]
        torch.testing.assert_close(said.step(wrong, noisy, i), meant.step(v, noisy, i))
        a, b = coefficients[i]
        torch.testing.assert_close(a * noisy + b * wrong, meant.step(v, noisy, i), rtol=1e-4, atol=1e-4)


def test_timesteps_of_flow_may_lie_higher():
    at = [build_schedule("flow", "velocity", location) for location in (0.0, 2.0)]
    drawn = [
        schedule.sample_timesteps((1000,), torch.Generator().manual_seed(0), torch.device("cpu")) for schedule in at
    ]
    torch.testing.assert_close(drawn[1].logit(), drawn[0].logit() + 2.0, rtol=1e-3, atol=1e-3)


def listing_weight(snr, gamma, kind, decay, causal):
    """Listing 1 for one clip in Python floats, straight from its recurrences."""

    def cumulative(values):
        cum = []
        for t, value in enumerate(values):
            cum.append(value if t == 0 else decay * cum[t - 1] + (1 - decay) * value)
        return [0.0, *cum[:-1]]

    clipped = [min(s, gamma) for s in snr]
    if decay is not None:
        normalized = [c / gamma for c in clipped]
        cum = cumulative(normalized)
        if not causal:
            backward = cumulative(normalized[::-1])[::-1]
            cum = [0.5 * (f + b) for f, b in zip(cum, backward, strict=True)]
        clipped = [gamma * (1 - (1 - c * decay) * (1 - n)) for c, n in zip(cum, normalized, strict=True)]
        snr = [gamma * (1 - (1 - c * decay) * (1 - s / gamma)) for c, s in zip(cum, snr, strict=True)]
    divisor = {"epsilon": snr, "v_prediction": [s + 1 for s in snr], "sample": [1.0] * len(snr)}[kind]
    return [c / d for c, d in zip(clipped, divisor, strict=True)]


@pytest.mark.parametrize("frames", [1, 2, 5, 9])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("decay", "causal"), [(None, True), (0.96, True), (0.96, False), (0.5, True)])
def test_loss_weight_is_listing_1(frames, kind, decay, causal):
    snr = torch.randn(3, frames, generator=torch.Generator().manual_seed(frames)).mul(2).exp()
    weight = compute_loss_weight(snr.double(), 5.0, kind, decay=decay, causal=causal)
    for row, values in zip(weight, snr.double().tolist(), strict=True):
        expected = torch.tensor(listing_weight(values, 5.0, kind, decay, causal), dtype=torch.float64)
        torch.testing.assert_close(row, expected, rtol=1e-12, atol=0)


def test_loss_weight_by_hand():
    """gamma 5, decay 0.96, v-prediction, SNRs 10, 1, 0: the frames' A are 0, 1 and 0.96 + 0.04 * 0.2."""
    weight = compute_loss_weight(torch.tensor([[10.0, 1.0, 0.0]]), 5.0, "v_prediction", decay=0.96)
    second = 5 * (1 - (1 - 0.96) * (1 - 0.2))
    third = 5 * 0.96 * (0.96 + 0.04 * 0.2)
    expected = torch.tensor([[5 / 11, second / (second + 1), third / (third + 1)]])
    torch.testing.assert_close(weight, expected)


CLEAN, NOISE = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3)).unbind()
TAU = torch.tensor([0.01, 0.05, 0.2, 0.5, 0.9, 1.0])


def test_bad_input_names_the_value():
    with pytest.raises(ValueError, match="steps=0"):
        FlowSchedule().sampling_timesteps(0)
    with pytest.raises(ValueError, match="steps=1001"):
        VPredictionSchedule().sampling_timesteps(1001)
    with pytest.raises(ValueError, match="'ddpm'.*v, flow"):
        build_schedule("ddpm")
    with pytest.raises(ValueError, match="'x0'.*'sample'"):
        compute_loss_weight(torch.ones(1, 2), 5.0, "x0")
