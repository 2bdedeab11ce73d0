"""Trajectories against diffusers' schedulers and k-diffusion's formulas, on models whose denoiser is known."""

from dataclasses import replace

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from gguf_sd.config import SD15, SDXL, SDXL_TURBO
from gguf_sd.errors import GgufSdError
from gguf_sd.sampling import SAMPLERS, NoiseSource, add_noise, make_schedule, sample
from gguf_sd.sampling.denoiser import Denoiser
from tests.sampling.oracle import (
    COMBINATIONS,
    IN_DIFFUSERS,
    K_DIFFUSION,
    SHAPE,
    Mixture,
    finished_steps,
    oracle,
    oracle_loop,
    oracle_noise,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array_")  # of diffusers with NumPy 2

SD = SD15.scheduler
NO_SAMPLE_PREDICTION = ("pndm", "euler_a", "dpm2", "dpm2_a", "dpmpp_sde")  # in diffusers


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


@pytest.mark.parametrize(("sampler", "name"), [(s, name) for s, name in COMBINATIONS if s in IN_DIFFUSERS])
@pytest.mark.parametrize("steps", [1, 2, 6, 21])
def test_trajectories_equal_diffusers(sampler, name, steps):
    assert_equals_diffusers(sampler, name, SD, steps)


@pytest.mark.parametrize(("sampler", "name"), [(s, name) for s, name in COMBINATIONS if s in K_DIFFUSION])
@pytest.mark.parametrize(("steps", "start"), [(1, None), (2, None), (6, None), (21, None), (9, 0), (9, 4), (9, 8)])
def test_trajectories_equal_k_diffusion(sampler, name, steps, start):
    """Those that diffusers has not; begun from noise, and at a later step as image-to-image is."""
    seeds, model = (7, 8), Mixture(SD)
    schedule, noise = make_schedule(SD, sampler, name, steps), NoiseSource(seeds)
    eps, generators = oracle_noise(seeds)
    unet = Denoiser(model)
    levels = schedule.sigmas.tolist()
    timesteps = dict(zip(levels, schedule.timesteps, strict=False))  # told apart by their levels

    def denoise(x, sigma):
        nearest = min(timesteps, key=lambda level: abs(level - sigma))
        assert nearest == pytest.approx(sigma, rel=1e-5)
        return unet.denoise(x, timesteps[nearest], torch.tensor(nearest))

    sigmas = levels[(start or 0) * SAMPLERS[sampler].evaluations :: SAMPLERS[sampler].evaluations]
    sigmas = [*sigmas, 0.0] if SAMPLERS[sampler].evaluations == 2 else sigmas
    eps = eps * (schedule.init_noise_sigma if start is None else sigmas[0])
    expected = K_DIFFUSION[sampler](denoise, eps, sigmas, lambda: randn_tensor(SHAPE, generator=generators))
    begun = noise(SHAPE) if start is None else add_noise(torch.zeros(SHAPE), noise(SHAPE), schedule, start)
    calls = model.calls
    found = list(sample(model, begun, schedule, noise, start_step=start))
    assert model.calls - calls == schedule.evaluations(start or 0)
    for step, latents in zip(found, expected, strict=True):
        torch.testing.assert_close(step.latents, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noise(SHAPE), randn_tensor(SHAPE, generator=generators))  # drew as often


def test_align_your_steps_goes_by_the_model():
    for config in (SD15, SDXL):
        scheduler, seeds = oracle("euler", "ays", config.scheduler, 10, config.name), (1, 2)
        latents, _ = oracle_noise(seeds)
        expected = oracle_loop(scheduler, Mixture(SD), latents * scheduler.init_noise_sigma)
        schedule = make_schedule(config.scheduler, "euler", "ays", 10, config.name)
        *_, last = sample(Mixture(SD), NoiseSource(seeds)(SHAPE), schedule)
        torch.testing.assert_close(last.latents, expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", IN_DIFFUSERS)
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_prediction_types_equal_diffusers(sampler, kind):
    if kind == "sample" and sampler in NO_SAMPLE_PREDICTION:
        pytest.skip("not in diffusers; the next test has all but pndm")
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


@pytest.mark.parametrize("sampler", ["euler_a", "ddim", "pndm", "ddpm", "unipc", "dpm2_a", "dpmpp_sde"])
def test_turbo_spacing_and_alpha_to_one(sampler):
    config = replace(SDXL_TURBO.scheduler, set_alpha_to_one=True)
    for steps in (1, 4):
        assert_equals_diffusers(sampler, "model", config, steps, seeds=(0, 2**63))


@pytest.mark.parametrize("sampler", IN_DIFFUSERS)
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


@pytest.mark.parametrize("sampler", IN_DIFFUSERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_latents(sampler, dtype):
    """Nearer to the float32 run on the same noise than diffusers, which rounds after every operation or step; of old
    diffusers, within three units of the dtype.

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
    assert error < max(their_error, 3 * torch.finfo(dtype).eps)
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
