"""Trajectories against diffusers' schedulers and exact solutions, on models whose denoiser is known."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from gguf_sd.config import SD15, SDXL_TURBO, SchedulerConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.sampling import SAMPLERS, NoiseSource, add_noise, make_schedule, sample
from gguf_sd.sampling.denoiser import Denoiser
from gguf_sd.sampling.schedules import train_sigmas

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers with NumPy 2

SD = SD15.scheduler
COMBINATIONS = [(sampler, name) for sampler, info in SAMPLERS.items() for name in info.schedules]
SHAPE = (2, 4, 3, 5)
SHARED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


class Mixture:
    """The exact model of data drawn from Gaussians: ``means`` [K], a common ``std``, equal weights.

    Called like a UNet; counts its calls. More than one mean makes it nonlinear.
    """

    def __init__(self, config: SchedulerConfig, means=(-1.5, 0.5, 1.0), std=0.3, levels=None):
        self.sigmas = train_sigmas(config).double().numpy()
        self.levels = levels  # of each call, for where a rounded timestep says too little
        self.kind, self.std, self.calls = config.prediction_type, std, 0
        self.means = torch.tensor(means, dtype=torch.float64)

    def __call__(self, x, timestep):
        assert timestep.ndim == 0
        if self.levels is None:
            ratio = float(np.interp(float(timestep), np.arange(len(self.sigmas)), self.sigmas))
        else:
            ratio = float(self.levels[self.calls])
        self.calls += 1
        alpha = (1 + ratio**2) ** -0.5
        sigma = ratio * alpha
        distance = x.double()[..., None] - alpha * self.means
        variance = (alpha * self.std) ** 2 + sigma**2
        weights = torch.softmax(-(distance**2) / (2 * variance), dim=-1)
        denoised = (weights * (self.means + alpha * self.std**2 / variance * distance)).sum(-1)
        eps = (x.double() - alpha * denoised) / sigma
        out = {"epsilon": eps, "v_prediction": alpha * eps - sigma * denoised, "sample": denoised}
        return out[self.kind].to(x.dtype)


def oracle(sampler: str, name: str, config: SchedulerConfig, steps: int):
    """diffusers' scheduler of a sampler and schedule, with its timesteps set."""
    options = {key: getattr(config, key) for key in (*SHARED, "timestep_spacing", "steps_offset")}
    if name in ("leading", "trailing", "linspace"):
        options["timestep_spacing"] = name
    ramp = {f"use_{name}_sigmas": True} if name in ("karras", "exponential") else {}
    own = {
        "pndm": {"skip_prk_steps": True, "set_alpha_to_one": config.set_alpha_to_one},
        "ddim": {"clip_sample": False, "set_alpha_to_one": config.set_alpha_to_one},
        "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    }
    scheduler = getattr(diffusers, SAMPLERS[sampler].scheduler)
    if sampler == "euler_a" and ramp:  # not in diffusers: its ancestral steps on Euler's sigmas
        scheduler = scheduler(**options)
        ramped = diffusers.EulerDiscreteScheduler(**options, **ramp)
        ramped.set_timesteps(steps)
        scheduler.timesteps, scheduler.sigmas = ramped.timesteps, ramped.sigmas
    else:
        scheduler = scheduler(**options, **ramp, **own.get(sampler, {}))
        scheduler.set_timesteps(steps)
    return scheduler


def oracle_loop(scheduler, model, latents, generators=None, start=0):
    """The denoising loop of diffusers' pipelines: latents after every evaluation."""
    draws = "generator" in scheduler.step.__code__.co_varnames
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    trajectory = []
    for t in scheduler.timesteps[start * scheduler.order :]:
        output = model(scheduler.scale_model_input(latents, t), t)
        options = {"generator": generators} if draws else {}
        latents = scheduler.step(output, t, latents, **options).prev_sample
        trajectory.append(latents)
    return trajectory


def oracle_noise(seeds, shape=SHAPE, dtype=torch.float32):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return randn_tensor(shape, generator=generators, dtype=dtype), generators


def finished_steps(sampler, trajectory):
    """Of latents after every evaluation, those after every step."""
    if sampler == "heun":
        return [*trajectory[1:-1:2], trajectory[-1]]
    return trajectory[1:] if sampler == "pndm" and len(trajectory) > 1 else trajectory


def assert_equals_diffusers(sampler, name, config, steps, seeds=(7, 8)):
    scheduler, model = oracle(sampler, name, config, steps), Mixture(config)
    latents, generators = oracle_noise(seeds)
    expected = oracle_loop(scheduler, model, latents * scheduler.init_noise_sigma, generators)
    calls, noise = model.calls, NoiseSource(seeds)
    schedule = make_schedule(config, sampler, name, steps)
    found = list(sample(model, noise(SHAPE), schedule, noise))
    assert model.calls - calls == schedule.evaluations() == len(expected)
    assert [step.index for step in found] == list(range(steps))
    assert {step.total for step in found} == {steps}
    for step, latents in zip(found, finished_steps(sampler, expected), strict=True):
        torch.testing.assert_close(step.latents, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noise(SHAPE), randn_tensor(SHAPE, generator=generators))  # drew as often


@pytest.mark.parametrize(("sampler", "name"), COMBINATIONS)
@pytest.mark.parametrize("steps", [1, 2, 6, 21])
def test_trajectories_equal_diffusers(sampler, name, steps):
    assert_equals_diffusers(sampler, name, SD, steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_prediction_types_equal_diffusers(sampler, kind):
    if kind == "sample" and sampler in ("pndm", "euler_a"):
        pytest.skip("not in diffusers; the next test has euler_a")
    assert_equals_diffusers(sampler, "model", replace(SD, prediction_type=kind), 8)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "pndm"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_prediction_types_give_the_same_picture(sampler, kind):
    """PLMS is no such sampler: it averages model outputs, whatever they are."""
    final = []
    for config in (SD, replace(SD, prediction_type=kind)):
        noise = NoiseSource([1, 2])
        *_, last = sample(Mixture(config), noise(SHAPE), make_schedule(config, sampler, steps=8), noise)
        final.append(last.latents)
    torch.testing.assert_close(*final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler_a", "ddim", "pndm"])
def test_turbo_spacing_and_alpha_to_one(sampler):
    config = replace(SDXL_TURBO.scheduler, set_alpha_to_one=True)
    for steps in (1, 4):
        assert_equals_diffusers(sampler, "model", config, steps, seeds=(0, 2**63))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("start", [0, 1, 2, 5, 8])
def test_starting_at_a_later_step_equals_diffusers(sampler, start):
    steps, model, seeds = 9, Mixture(SD), (3, 4)
    scheduler = oracle(sampler, "model", SD, steps)
    clean = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) - 0.5
    eps, generators = oracle_noise(seeds)
    at = scheduler.timesteps[start * scheduler.order]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    latents = scheduler.add_noise(clean, eps, at.repeat(2))
    expected = oracle_loop(scheduler, model, latents, generators, start)

    calls, noise = model.calls, NoiseSource(seeds)
    schedule = make_schedule(SD, sampler, steps=steps)
    latents = add_noise(clean, noise(SHAPE), schedule, start)
    found = list(sample(model, latents, schedule, noise, start_step=start))
    assert model.calls - calls == schedule.evaluations(start)
    assert [(step.index, step.total) for step in found] == [(i, steps - start) for i in range(steps - start)]
    for step, latents in zip(found, finished_steps(sampler, expected), strict=True):
        torch.testing.assert_close(step.latents, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_image_of_a_batch_depends_on_its_own_seed_only(sampler):
    schedule, model = make_schedule(SD, sampler, steps=6), Mixture(SD)

    def final(*seeds):
        noise = NoiseSource(seeds)
        *_, last = sample(model, noise((len(seeds), *SHAPE[1:])), schedule, noise)
        return last.latents

    both = final(11, 12)
    assert not torch.allclose(both[0], both[1], atol=0.1)
    torch.testing.assert_close(both, torch.cat([final(11), final(12)]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_latents(sampler, dtype):
    """Nearer to the float32 run on the same noise than diffusers, which rounds after every operation or step.

    The model is smooth here (one Gaussian), so that differences are rounding and not another picture.
    """
    model, steps = Mixture(SD, means=(0.5,), std=0.8), 10
    scheduler, schedule = oracle(sampler, "model", SD, steps), make_schedule(SD, sampler, steps=steps)
    latents, generators = oracle_noise((5, 6), dtype=dtype)
    theirs = oracle_loop(scheduler, model, latents * scheduler.init_noise_sigma, generators)[-1].float()

    noise, dtypes = NoiseSource((5, 6), dtype), set()

    def watched(x, timestep):
        dtypes.add(x.dtype)
        return model(x, timestep)

    *_, last = sample(watched, noise(SHAPE), schedule, noise)
    assert dtypes == {dtype} == {last.latents.dtype, last.denoised.dtype}

    again = NoiseSource((5, 6), dtype)
    *_, exact = sample(model, again(SHAPE).float(), schedule, again)
    error = (last.latents.float() - exact.latents).abs().max()
    their_error = (theirs - exact.latents).abs().max()
    assert error < their_error
    assert (last.latents.float() - theirs).abs().max() < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seeds", [(0,), (1, 2, 99)])
def test_noise_source_equals_randn_tensor(seeds, dtype):
    noise, shape = NoiseSource(seeds, dtype), (len(seeds), 4, 5, 3)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for draw in (None, None, torch.float32, None):
        expected = randn_tensor(shape, generator=generators, dtype=draw or dtype)
        found = noise(shape, draw)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_denoised_is_the_estimate_to_preview():
    """A model that knows the picture: every sampler's estimate is that picture from the first step on."""
    picture = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    config = replace(SD, prediction_type="sample")
    for sampler in SAMPLERS:
        noise = NoiseSource([1, 2])
        steps = list(sample(lambda x, t: picture, noise(SHAPE), make_schedule(config, sampler, steps=5), noise))
        for step in steps:
            torch.testing.assert_close(step.denoised, picture, rtol=1e-3, atol=1e-3)
        assert (steps[0].latents - picture).std() > 0.3


# For one Gaussian of mean m and variance v, (x0 + sigma * eps - m) / sqrt(v + sigma^2) stays constant along the
# probability-flow ODE. 1024 training steps divide evenly, so that meshes of all sizes are smooth.
SMOOTH = replace(SD, num_train_timesteps=1024, steps_offset=0)
MEAN, STD = 0.7, 0.5


def ode_error(sampler: str, name: str, steps: int) -> float:
    """Largest error, halfway through the timesteps, of a run from exact start values in float64."""
    config = replace(SMOOTH, num_train_timesteps=1025) if name == "linspace" else SMOOTH
    schedule = make_schedule(config, sampler, name, steps)
    every = 2 if sampler == "heun" else 1
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
        ("dpmpp_2m", "linspace", 2),
        ("dpmpp_2m", "karras", 2),
        ("dpmpp_2m", "exponential", 2),
        ("pndm", "leading", 2),
    ],
)
def test_convergence_order(sampler, name, order):
    coarse, fine = (ode_error(sampler, name, steps) for steps in (64, 128))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_higher_orders_are_worth_their_evaluations():
    """At an equal number of model evaluations."""
    assert ode_error("heun", "linspace", 32) < 0.5 * ode_error("euler", "linspace", 64)
    assert ode_error("pndm", "leading", 32) < 0.1 * ode_error("ddim", "leading", 32)


def test_stochastic_samplers_give_the_distribution():
    """One Gaussian in, its mean and spread out."""
    for sampler in ("euler_a", "dpmpp_2m_sde"):
        noise = NoiseSource([0])
        schedule = make_schedule(SD, sampler, "trailing", 200)
        *_, last = sample(Mixture(SD, (MEAN,), STD), noise((1, 4, 64, 64)), schedule, noise)
        assert float(last.latents.mean()) == pytest.approx(MEAN, abs=0.02)
        assert float(last.latents.std()) == pytest.approx(STD, abs=0.03)


def test_nothing_runs_before_it_is_asked_for():
    model = Mixture(SD)
    steps = sample(model, torch.ones(SHAPE), make_schedule(SD, "euler", steps=4))
    assert model.calls == 0
    next(steps)
    assert model.calls == 1


def test_no_gradients_are_kept():
    def model(x, timestep):
        return x * torch.ones(1, requires_grad=True)

    *_, last = sample(model, torch.ones(SHAPE), make_schedule(SD, "euler", steps=2))
    assert not last.latents.requires_grad
    assert torch.is_grad_enabled()


def test_errors():
    schedule = make_schedule(SD, "euler", steps=4)
    for start in (-1, 4):
        with pytest.raises(GgufSdError, match=f"cannot start at step {start} of 4; choose 0 to 3"):
            sample(Mixture(SD), torch.ones(SHAPE), schedule, start_step=start)
    with pytest.raises(ValueError, match="'euler_a' draws noise"):
        sample(Mixture(SD), torch.ones(SHAPE), make_schedule(SD, "euler_a", steps=4))
    with pytest.raises(GgufSdError, match="unknown prediction type 'flow'"):
        Denoiser(Mixture(SD), "flow")
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        NoiseSource([1, 2])((3, 4))
    with pytest.raises(ValueError, match="one seed an image"):
        NoiseSource([])
