"""Noise schedules, their samplers, and the weight of the diffusion loss.

All schedules answer the same questions, so neither training nor sampling asks which one is in use:

    sample_timesteps(shape, generator, device)     timesteps of a training batch
    alpha(t), sigma(t), snr(t)                     signal, noise, (alpha / sigma)^2
    add_noise(x, eps, t)                           x_t = alpha(t) x + sigma(t) eps
    target(x, eps, t)                              what the network predicts at t
    error_weight(t)                                what its squared error counts, None for 1
    embedding(t)                                   the number in 0..1000 that the network embeds
    sampling_timesteps(steps, device)              the timesteps t_0 > t_1 > ... that a sampler visits
    step(v, x, i)                                  from t_i to t_{i+1}, or to the clean x after the last
    coefficients(steps, device)                    a step as the factors of x, of the prediction and, if it draws any,
                                                   of its noise: what `mimo_kernels.guided_step` takes

Timesteps are tensors of any shape, matched with the leading dimensions of x. Tables are computed in float64 and rounded
once to float32. Nothing here waits for the device: a step index may itself be a tensor on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mimo_kernels.core.device_copies import DeviceCopies

LEAST_NOISE = 0.05  # tau below which an error of clean latents weighs no more (JiT)


def _table(values: Tensor) -> DeviceCopies:
    """A small constant table, in float32 on every device that asks for it."""
    return DeviceCopies("the tables of the noise schedule", values.float())


def _match(coefficient: Tensor, x: Tensor) -> Tensor:
    """[...] -> [..., 1, 1] with as many dimensions as x [..., *, *], in its dtype."""
    return coefficient.to(x.dtype).reshape(coefficient.shape + (1,) * (x.dim() - coefficient.dim()))


class _Schedule(ABC):
    """What follows from alpha(t) and sigma(t) alone."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the clean latents at time t [...]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise at time t [...]."""

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x + sigma(t) eps.  x, eps [..., *], t [...]."""
        return _match(self.alpha(t), x) * x + _match(self.sigma(t), x) * eps

    def snr(self, t: Tensor) -> Tensor:
        """alpha(t)^2 / sigma(t)^2."""
        return (self.alpha(t) / self.sigma(t)).square()

    def error_weight(self, t: Tensor) -> Tensor | None:
        """What turns the squared error of what the network predicts at t [...] into that of v or eps; None: it is
        that."""
        return None

    @abstractmethod
    def sampling_timesteps(self, steps: int, device: torch.device | str = "cpu") -> Tensor:
        """[steps]: the timesteps t_0 > t_1 > ... that a sampler visits, and `step` counts."""

    @abstractmethod
    def step(self, v: Tensor, x: Tensor, i: int | Tensor) -> Tensor:
        """x [..., *] at t_i and the prediction v there -> x at t_{i+1}, or the clean x after the last."""

    def coefficients(self, steps: int, device: torch.device | str = "cpu") -> Tensor:
        """fp32 [steps, 2]: `step` is linear in x and v."""
        self.sampling_timesteps(steps)
        every = torch.arange(steps, device=device)
        zero, one = torch.zeros(steps, device=device), torch.ones(steps, device=device)
        return torch.stack([self.step(zero, one, every), self.step(one, zero, every)], 1)


class VPredictionSchedule(_Schedule):
    """Variance-preserving diffusion with v-prediction, sampled with DDIM (eta = 0).

        beta from 1e-4 to 0.02, linear over `num_timesteps`;  abar_t = prod_{s <= t} (1 - beta_s)
        alpha_t = sqrt(abar_t), then shifted and scaled so that its last value is 0 and its first stays (zero terminal
        SNR) sigma_t = sqrt(1 - alpha_t^2),  v = alpha_t eps - sigma_t x
        `steps` sampling steps visit round(num_timesteps (1 - i / steps)) - 1 (trailing spacing); each goes to the
        timestep visited next and the last one to alpha = 1

    Timesteps are int64, 0..num_timesteps - 1. Sources: Salimans and Ho 2022 (v); Lin et al. 2024, Algorithm 1 (zero
    terminal SNR) and Table 2 (trailing); Song et al. 2020, Eq. 12 (DDIM).
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        self.num_timesteps = num_timesteps
        beta = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        alpha = torch.cumprod(1 - beta, dim=0).sqrt()
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        self._alpha_sigma = torch.stack([alpha, (1 - alpha.square()).sqrt()])
        self._table = _table(self._alpha_sigma)

    def alpha(self, t: Tensor) -> Tensor:
        return self._table.on(t.device)[0][0, t]

    def sigma(self, t: Tensor) -> Tensor:
        return self._table.on(t.device)[0][1, t]

    def embedding(self, t: Tensor) -> Tensor:
        return t.float()

    def sample_timesteps(self, shape, generator: torch.Generator, device: torch.device) -> Tensor:
        """Uniform over 0..num_timesteps - 1, int64."""
        return torch.randint(self.num_timesteps, shape, generator=generator, device=device)

    def target(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = alpha(t) eps - sigma(t) x."""
        return _match(self.alpha(t), x) * eps - _match(self.sigma(t), x) * x

    def sampling_timesteps(self, steps: int, device: torch.device | str = "cpu") -> Tensor:
        """int64 [steps]; from here on `step` takes one of these `steps` steps."""
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"steps={steps}: expected 1..{self.num_timesteps}")
        i = torch.arange(steps, dtype=torch.float64)
        visited = (self.num_timesteps - i * (self.num_timesteps / steps)).round().long() - 1
        here = self._alpha_sigma[:, visited]
        there = torch.cat([here[:, 1:], torch.tensor([[1.0], [0.0]], dtype=torch.float64)], dim=1)
        # x0 = a x - s v and eps = s x + a v; so a' x0 + s' eps is this linear map of x and v.
        of_x = there[0] * here[0] + there[1] * here[1]
        of_v = there[1] * here[0] - there[0] * here[1]
        self._steps = _table(torch.stack([of_x, of_v]))
        return visited.to(device)

    def step(self, v: Tensor, x: Tensor, i: int | Tensor) -> Tensor:
        """x' = alpha' x0 + sigma' eps with x0 = alpha x - sigma v and eps = sigma x + alpha v, at visited timestep
        i."""
        of_x, of_v = self._steps.on(x.device)[0][:, i].to(x.dtype)
        return of_x * x + of_v * v


class FlowSchedule(_Schedule):
    """Rectified flow, sampled with Euler steps.

        alpha = 1 - tau,  sigma = tau,  v = d x_tau / d tau = eps - x
        training draws tau = sigmoid(n), n ~ N(0, 1)  (logit-normal, Eq. 26)
        `steps` sampling steps visit linspace(1, 0.001, steps) and the last one goes to 0

    Timesteps are float32 in (0, 1]; the network embeds 1000 tau. Sources: Liu et al. 2022, Esser et al. 2024.

    A network that predicts the clean latents (prediction="clean") says v = (x_tau - x) / tau with them, and its error
    is weighed as one of v, by 1 / tau^2 with tau not below 0.05: noise need not pass through a narrow network, whose
    output is then the little that clean latents hold. Source: Li and He 2025 (JiT, arXiv 2511.13720).

    Args:
        prediction: what the network predicts, "velocity" or "clean" latents.
        location: mean of n; more than 0 trains more at much noise (the m of Esser et al., Eq. 19).
    """

    def __init__(self, prediction: str = "velocity", location: float = 0.0) -> None:
        self.prediction, self.location = prediction, location

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def embedding(self, t: Tensor) -> Tensor:
        return 1000 * t

    def sample_timesteps(self, shape, generator: torch.Generator, device: torch.device) -> Tensor:
        """Logit-normal(location, 1), float32."""
        return (torch.randn(shape, generator=generator, device=device) + self.location).sigmoid()

    def target(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = eps - x, or x, whatever t."""
        return x if self.prediction == "clean" else eps - x

    def error_weight(self, t: Tensor) -> Tensor | None:
        return None if self.prediction == "velocity" else t.clamp(min=LEAST_NOISE).square().reciprocal()

    def sampling_timesteps(self, steps: int, device: torch.device | str = "cpu") -> Tensor:
        """float32 [steps]; from here on `step` takes one of these `steps` steps."""
        if steps < 1:
            raise ValueError(f"steps={steps}: expected 1 or more")
        visited = torch.linspace(1, 0.001, steps, dtype=torch.float64)
        self._steps = _table(torch.stack([torch.cat([visited.diff(), -visited[-1:]]), visited]))
        return visited.float().to(device)

    def step(self, v: Tensor, x: Tensor, i: int | Tensor) -> Tensor:
        """x' = x + (tau_{i+1} - tau_i) v, where a network that predicts clean latents says them for v."""
        step, tau = (column[i].to(x.dtype) for column in self._steps.on(x.device)[0])
        return x + step * (v if self.prediction == "velocity" else (x - v) / tau)


class EpsilonSchedule(_Schedule):
    """Variance-preserving diffusion of single tokens with a cosine schedule and epsilon-prediction, sampled with
    ancestral steps: what the token diffusion of MAR, MAGI and VideoMAR uses.

        beta_t = min(1 - f(t + 1) / f(t), 0.999),  f(t) = cos^2(pi / 2 (t / num_timesteps + 0.008) / 1.008)
        abar_t = prod_{s <= t} (1 - beta_s),  alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)
        `steps` sampling steps visit the middle of each of `steps` equal parts of the timesteps, the last part first
        x' = (x - (1 - a) / sigma_t eps) / sqrt(a) + temperature sqrt((1 - abar') / (1 - abar) (1 - a)) noise
        with a = abar / abar', of the timestep visited and of the one visited next (abar' = 1 after the last)

    The variance of a step is that of q(x' | x, x_0), which nothing learns: the loss is the squared error of eps alone.
    iDDPM's spacing begins at the very last timestep, where alpha is 5e-5: there an error of eps comes back 300 times as
    large in the first of 100 steps. In the middle of the last part alpha is 0.008, and it comes back 3 times as large.

    Timesteps are int64, 0..num_timesteps - 1. Sources: Nichol and Dhariwal 2021 (cosine, respaced steps); Ho et al.
    2020, Algorithm 2; Li et al. 2024 (MAR), Eq. 2 and 3 and Sec. 3.2 (temperature).
    """

    def __init__(self, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = ((t + 0.008) / 1.008 * torch.pi / 2).cos().square()
        self._signal = (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)  # abar
        self._table = _table(torch.stack([self._signal.sqrt(), (1 - self._signal).sqrt()]))

    def alpha(self, t: Tensor) -> Tensor:
        return self._table.on(t.device)[0][0, t]

    def sigma(self, t: Tensor) -> Tensor:
        return self._table.on(t.device)[0][1, t]

    def embedding(self, t: Tensor) -> Tensor:
        return t.float()

    def sample_timesteps(self, shape, generator: torch.Generator, device: torch.device) -> Tensor:
        """Uniform over 0..num_timesteps - 1, int64."""
        return torch.randint(self.num_timesteps, shape, generator=generator, device=device)

    def target(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """eps, whatever t."""
        return eps

    def sampling_timesteps(self, steps: int, device: torch.device | str = "cpu") -> Tensor:
        """int64 [steps]; from here on `step` takes one of these `steps` steps."""
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"steps={steps}: expected 1..{self.num_timesteps}")
        part = torch.arange(steps - 1, -1, -1)
        visited = (2 * part + 1) * self.num_timesteps // (2 * steps)
        here = self._signal[visited]
        there = torch.cat([here[1:], torch.ones(1, dtype=torch.float64)])
        ratio = here / there
        of_x, of_eps = 1 / ratio.sqrt(), (ratio - 1) / (1 - here).sqrt() / ratio.sqrt()
        of_noise = ((1 - there) / (1 - here) * (1 - ratio)).sqrt()
        self._steps = _table(torch.stack([of_x, of_eps, of_noise]))
        return visited.to(device)

    def step(self, v: Tensor, x: Tensor, i: int | Tensor, noise: Tensor | None = None) -> Tensor:
        """x' of the predicted eps `v`, at visited timestep i. noise: N(0, 1) times the temperature; None is none."""
        of_x, of_eps, of_noise = self._steps.on(x.device)[0][:, i].to(x.dtype)
        mean = of_x * x + of_eps * v
        return mean if noise is None else mean + of_noise * noise

    def coefficients(self, steps: int, device: torch.device | str = "cpu") -> Tensor:
        """fp32 [steps, 3]: the factors of x, eps and noise."""
        self.sampling_timesteps(steps)
        return self._steps.on(torch.device(device))[0].T.contiguous()


def build_schedule(
    parameterization: str, prediction: str = "velocity", location: float = 0.0
) -> VPredictionSchedule | FlowSchedule | EpsilonSchedule:
    """The schedule of MiMoConfig.parameterization: "v", "flow" or "epsilon". prediction, location: of "flow" alone."""
    if parameterization == "flow":
        return FlowSchedule(prediction, location)
    schedules = {"v": VPredictionSchedule, "epsilon": EpsilonSchedule}
    if parameterization not in schedules:
        raise ValueError(f"unknown parameterization {parameterization!r}: expected one of v, flow, epsilon")
    return schedules[parameterization]()


def compute_loss_weight(
    snr: Tensor, gamma: float, prediction_type: str, decay: float | None = None, causal: bool = True
) -> Tensor:
    """Min-SNR weight of every frame's diffusion loss, fused over frames when `decay` is given (the paper's Listing 1).

    With S_t = snr_t / gamma, its clipped form C_t = min(snr_t, gamma) / gamma and the running mean of C over the frames
    before t, A_1 = 0, A_2 = C_1, A_{t+1} = decay A_t + (1 - decay) C_t, the two SNRs are fused to

        snr'_t = gamma (1 - (1 - decay A_t)(1 - S_t)),     clipped'_t = gamma (1 - (1 - decay A_t)(1 - C_t))

    The listing differs from Eqs. 23-25 in that A starts from the first frame's own C and is multiplied by `decay` once
    more. Without `causal`, A is the mean of the running means from both ends of the clip.

    Args:
        snr: [B, T], alpha^2 / sigma^2 of every frame.
        gamma: the clip threshold.
        prediction_type: "epsilon" (weight clipped / snr), "v_prediction" (clipped / (snr + 1)) or "sample" (clipped).
        decay: None for plain min-SNR.
        causal: frames see only earlier frames.

    Returns:
        [B, T].
    """
    clipped = snr.clamp(max=gamma)
    if decay is not None:

        def mean_before(share: Tensor) -> Tensor:
            means = [torch.zeros_like(share[:, 0]), share[:, 0]]
            for t in range(1, share.shape[1] - 1):
                means.append(decay * means[-1] + (1 - decay) * share[:, t])
            return torch.stack(means[: share.shape[1]], dim=1)

        share = clipped / gamma
        seen = mean_before(share)
        if not causal:
            seen = 0.5 * (seen + mean_before(share.flip(1)).flip(1))
        unseen = 1 - decay * seen
        clipped, snr = gamma * (1 - unseen * (1 - share)), gamma * (1 - unseen * (1 - snr / gamma))
    if prediction_type == "epsilon":
        return clipped / snr
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    if prediction_type == "sample":
        return clipped
    raise ValueError(f"unknown prediction_type {prediction_type!r}: expected 'epsilon', 'v_prediction' or 'sample'")
