"""Multistep solvers on variance-preserving latents, as diffusers has them: DPM-Solver++(2M) and its SDE, UniPC."""

from __future__ import annotations

import torch
from torch import Tensor

from gguf_sd.sampling.denoiser import Denoiser, Level
from gguf_sd.sampling.noise import Noise
from gguf_sd.sampling.samplers.common import Trajectory
from gguf_sd.sampling.schedules import Schedule


def dpmpp_2m(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, algorithm 2."""
    timesteps = schedule.timesteps.to(x.device)
    history = _TwoStep()
    for i in range(start, schedule.steps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        level, level_next = Level.from_ratio(sigma), Level.from_ratio(sigma_next)
        denoised = denoiser.predict(x, timesteps[i], level).denoised
        h = (sigma / sigma_next).log()  # the step in log signal-to-noise ratio; infinite for the last
        target = history.extrapolate(denoised, h)
        x = level_next.sigma / level.sigma * x - level_next.alpha * torch.expm1(-h) * target
        x = yield x, denoised


def dpmpp_2m_sde(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """SDE-DPM-Solver++(2M), midpoint, eta 1: Lu et al. 2022, arXiv:2211.01095.

    Its noise is drawn in float32 whatever the dtype of the latents, as diffusers does.
    """
    timesteps = schedule.timesteps.to(x.device)
    history = _TwoStep()
    for i in range(start, schedule.steps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        level, level_next = Level.from_ratio(sigma), Level.from_ratio(sigma_next)
        denoised = denoiser.predict(x, timesteps[i], level).denoised
        h = (sigma / sigma_next).log()
        target = history.extrapolate(denoised, h)
        replaced = -torch.expm1(-2 * h)  # share of the noise's variance that is drawn anew
        fresh = noise(x.shape, torch.float32).to(x)
        x = level_next.sigma / level.sigma * torch.exp(-h) * x
        x = x + level_next.alpha * replaced * target + level_next.sigma * replaced**0.5 * fresh
        x = yield x, denoised


def unipc(denoiser: Denoiser, x: Tensor, schedule: Schedule, start: int, noise: Noise) -> Trajectory:
    """UniPC of order 2 with B2(h): Zhao et al. 2023, arXiv:2302.04867.

    Its predictor is DPM-Solver++(2M); each evaluation first corrects the step before. So does diffusers, from the
    latents before that step: those sent back only reach the model.
    """
    timesteps = schedule.timesteps.to(x.device)
    history, corrector = _TwoStep(), _Corrector()
    for i in range(start, schedule.steps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        level, level_next = Level.from_ratio(sigma), Level.from_ratio(sigma_next)
        denoised = denoiser.predict(x, timesteps[i], level).denoised
        if i > start:
            x = corrector.corrected(denoised, level)
        h = (sigma / sigma_next).log()
        corrector.remember(x, denoised, level, h)
        target = history.extrapolate(denoised, h)
        x = level_next.sigma / level.sigma * x - level_next.alpha * torch.expm1(-h) * target
        x = yield x, denoised


class _Corrector:
    """What UniC needs to know of the step that it corrects: where it began, with which estimates."""

    def __init__(self) -> None:
        self.denoised: list[Tensor] = []  # newest first, as are the steps in log SNR
        self.steps: list[Tensor] = []

    def remember(self, x: Tensor, denoised: Tensor, level: Level, h: Tensor) -> None:
        self.x, self.level = x, level
        self.denoised, self.steps = [denoised, *self.denoised[:1]], [h, *self.steps[:1]]

    def corrected(self, denoised: Tensor, level: Level) -> Tensor:
        """Latents at the end of the step, given the estimate there: eq. 9 of the paper, weights as in algorithm 1."""
        h, before = self.steps[0], self.denoised[0]
        b = torch.expm1(-h)
        if len(self.steps) == 1:
            change = (denoised - before) / 2
        else:
            first = -(b / h + 1) / b
            second = 2 * ((b / h + 1) / h - 1 / 2) / b
            ratio = self.steps[1] / h
            old = (first - second) / (1 + ratio)
            change = old * (before - self.denoised[1]) / ratio + (first - old) * (denoised - before)
        return level.sigma / self.level.sigma * self.x - level.alpha * b * (before + change)


class _TwoStep:
    """What a two-step solver remembers: the last denoised latents and the step in log SNR it took then."""

    def __init__(self) -> None:
        self.denoised: Tensor | None = None
        self.h = torch.zeros(())

    def extrapolate(self, denoised: Tensor, h: Tensor) -> Tensor:
        """Denoised latents at the middle of the coming step h; as they are for the first and last step."""
        last, h_last = self.denoised, self.h
        self.denoised, self.h = denoised, h
        if last is None or torch.isinf(h):
            return denoised
        return denoised + h / (2 * h_last) * (denoised - last)
