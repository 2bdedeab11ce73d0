"""How fast each sampler's error falls with the number of steps, and which distribution the stochastic ones sample."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gguf_sd.config import SD15
from gguf_sd.sampling import SAMPLERS, NoiseSource, add_noise, make_schedule, sample
from tests.sampling.oracle import Mixture

SD = SD15.scheduler

# For one Gaussian of mean m and variance v, (x0 + sigma * eps - m) / sqrt(v + sigma^2) stays constant along the
# probability-flow ODE. 1024 training steps divide evenly, so that meshes of all sizes are smooth.
SMOOTH = replace(SD, num_train_timesteps=1024, steps_offset=0)
MEAN, STD = 0.7, 0.5


def ode_error(sampler: str, name: str, steps: int) -> float:
    """Largest error, halfway through the timesteps, of a run from exact start values in float64."""
    config = replace(SMOOTH, num_train_timesteps=1025) if name == "linspace" else SMOOTH
    schedule = make_schedule(config, sampler, name, steps)
    every = SAMPLERS[sampler].evaluations
    levels = [*schedule.sigmas[0 : len(schedule.timesteps) : every].double(), schedule.sigmas[-1].double()]
    if sampler == "pndm":
        del levels[1]  # its second timestep comes twice
    noise = torch.linspace(-2, 2, 60, dtype=torch.float64).reshape(1, 4, 3, 5)
    scale = levels[0] if SAMPLERS[sampler].sigma_space else levels[0] / (1 + levels[0] ** 2) ** 0.5
    x = add_noise(torch.zeros_like(noise), noise, schedule)
    torch.testing.assert_close(x, noise * scale, rtol=1e-6, atol=0)

    half = steps // 2
    model = Mixture(config, (MEAN,), STD, schedule.sigmas)
    trajectory = [step.latents for step in sample(model, x, schedule, start_step=0)]
    ratio = noise * levels[0] - MEAN  # of the start, in sigma space
    exact = MEAN + ratio * ((STD**2 + levels[half] ** 2) / (STD**2 + levels[0] ** 2)) ** 0.5
    found = trajectory[half - 1]
    if not SAMPLERS[sampler].sigma_space:
        found = found * (1 + levels[half] ** 2) ** 0.5
    return float((found - exact).abs().max())


@pytest.mark.parametrize(
    ("sampler", "name", "order"),
    [
        ("euler", "linspace", 1),
        ("ddim", "leading", 1),
        ("heun", "linspace", 2),
        ("heun", "karras", 2),
        ("dpm2", "linspace", 2),
        ("dpm2", "karras", 2),
        ("dpmpp_2m", "linspace", 2),
        ("dpmpp_2m", "karras", 2),
        ("dpmpp_2m", "exponential", 2),
        ("pndm", "leading", 2),
    ],
)
def test_convergence_order(sampler, name, order):
    coarse, fine = (ode_error(sampler, name, steps) for steps in (64, 128))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("sampler", "name"), [("unipc", "karras"), ("unipc", "exponential"), ("lms", "karras")])
def test_higher_orders_after_a_lower_ones_first_steps(sampler, name):
    """UniC raises UniP's order 2 to 3; LMS is of order 4, but begins with one of 1."""
    coarse, fine = (ode_error(sampler, name, steps) for steps in (64, 128))
    assert np.log2(coarse / fine) > 2.8


def sde_error(sampler: str, steps: int) -> float:
    """Error, halfway in log sigma, of the mean of x along the reverse SDE where the denoised picture turns as
    cos(log(sigma_max / sigma)) whatever x is: dx = 2 (x - denoised) d(log sigma) + noise.

    Noise has no part in the mean of these samplers, so they run without.
    """
    schedule = make_schedule(replace(SMOOTH, prediction_type="sample"), sampler, "exponential", steps)
    angles = (schedule.sigmas[0].double() / schedule.sigmas.double()).log()
    calls = iter(angles.cos().tolist())
    x = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    if not SAMPLERS[sampler].sigma_space:
        x = x / (1 + schedule.sigmas[0].double() ** 2) ** 0.5

    def model(x, timestep):
        return torch.full_like(x, next(calls))

    def silence(shape, dtype=None):
        return torch.zeros(shape, dtype=torch.float64)

    half = steps // 2
    trajectory = [step.latents for step in sample(model, x, schedule, silence, start_step=0)]
    found, index = trajectory[half - 1].mean(), half * SAMPLERS[sampler].evaluations
    if not SAMPLERS[sampler].sigma_space:
        found = found * (1 + schedule.sigmas[index].double() ** 2) ** 0.5
    angle = angles[index]
    exact = torch.exp(-2 * angle) + (2 * angle.cos() + angle.sin() - 2 * torch.exp(-2 * angle)) * 2 / 5
    return float((found - exact).abs())


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        ("euler_a", 1),
        ("dpm2_a", 1),  # the step down is of order 2, but not the division into steps down and up
        ("dpmpp_2s_a", 1),
        ("dpmpp_sde", 2),
        ("dpmpp_2m_sde", 2),
        ("dpmpp_3m_sde", 2),  # 3 with twice its second difference, which nobody's has
    ],
)
def test_convergence_order_of_stochastic_samplers(sampler, order):
    coarse, fine = (sde_error(sampler, steps) for steps in (128, 256))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_higher_orders_are_worth_their_evaluations():
    """At an equal number of model evaluations."""
    assert ode_error("heun", "linspace", 32) < 0.5 * ode_error("euler", "linspace", 64)
    assert ode_error("pndm", "leading", 32) < 0.1 * ode_error("ddim", "leading", 32)


@pytest.mark.parametrize("sampler", [s for s, info in SAMPLERS.items() if info.stochastic and s not in ("lcm", "tcd")])
def test_stochastic_samplers_give_the_distribution(sampler):
    """One Gaussian in, its mean and spread out."""
    noise = NoiseSource([0])
    schedule = make_schedule(SD, sampler, "trailing", 200)
    *_, last = sample(Mixture(SD, (MEAN,), STD), noise((1, 4, 64, 64)), schedule, noise)
    assert float(last.latents.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(last.latents.std()) == pytest.approx(STD, abs=0.03)
