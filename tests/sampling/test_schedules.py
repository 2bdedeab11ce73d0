"""Timesteps and sigmas, against diffusers' schedulers and other programs' formulas."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

from gguf_sd.config import SD15, SDXL, SDXL_TURBO
from gguf_sd.errors import GgufSdError
from gguf_sd.sampling import SAMPLERS, add_noise, make_schedule
from gguf_sd.sampling.schedules import alphas_cumprod, betas
from gguf_sd.sampling.spacings import beta_quantiles
from tests.sampling.oracle import (
    COMBINATIONS,
    FIELDS,
    FORMULAS,
    formula_sigmas,
    fractional_timesteps,
    oracle,
    scheduler_class,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array_")  # of diffusers with NumPy 2

SD = SD15.scheduler
LEADING = SDXL.scheduler


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_equal_diffusers(beta_schedule):
    config = replace(SD, beta_schedule=beta_schedule, num_train_timesteps=777)
    scheduler = diffusers.DDIMScheduler(**{key: getattr(config, key) for key in FIELDS})
    assert torch.equal(betas(config), scheduler.betas)
    assert torch.equal(alphas_cumprod(config), scheduler.alphas_cumprod)


@pytest.mark.parametrize(("sampler", "name"), COMBINATIONS)
@pytest.mark.parametrize("config", [SD, LEADING, SDXL_TURBO.scheduler], ids=["unnamed", "leading", "trailing"])
def test_timesteps_and_sigmas_equal_diffusers(sampler, name, config):
    """To the bit; but beta's quantiles and what lies halfway are computed in another way, and a class or two computes
    in float64 or rounds its timesteps."""
    exact = name not in ("beta", *FORMULAS) and sampler not in ("dpm2", "dpm2_a", "dpmpp_sde", "dpmpp_2s_a")
    near = {"rtol": 0, "atol": 0} if exact else {"rtol": 2e-6, "atol": 2e-3}
    for steps in (1, 2, 3, 7, 25, 50):
        schedule = make_schedule(config, sampler, name, steps)
        expected = oracle(sampler, name, config, steps)
        found, every = schedule.timesteps, 1
        if sampler == "dpmpp_2s_a":  # not in diffusers; what lies halfway: test_what_lies_halfway
            every, found = 2, found[::2]
        assert found.dtype == (torch.float32 if expected.timesteps.is_floating_point() else torch.int64)
        torch.testing.assert_close(found, expected.timesteps.to(found.dtype), **near)
        assert schedule.evaluations() == len(expected.timesteps) * every - (every - 1)
        assert schedule.init_noise_sigma == pytest.approx(float(expected.init_noise_sigma), rel=0 if exact else 1e-6)
        if hasattr(expected, "sigmas"):
            assert schedule.sigmas.dtype == torch.float32
            every = SAMPLERS[sampler].evaluations
            theirs = expected.sigmas[1::2] if every == 2 and sampler != "dpmpp_2s_a" else expected.sigmas[1:]
            ours = schedule.sigmas[2::2] if every == 2 else schedule.sigmas[1:]
            torch.testing.assert_close(schedule.sigmas[0], expected.sigmas[0], **near)
            torch.testing.assert_close(ours, theirs[: len(ours)], **near)
            assert schedule.sigmas[-1] == 0


@pytest.mark.parametrize("sampler", ["heun", "dpm2", "dpm2_a", "dpmpp_sde", "dpmpp_2s_a"])
def test_what_lies_halfway(sampler):
    schedule = make_schedule(SD, sampler, steps=6)
    for step in range(6):
        sigma, second, end = (float(level) for level in schedule.evaluation_levels(step))
        target = end**2 / sigma if sampler in ("dpm2_a", "dpmpp_2s_a") else end  # what an ancestral step goes down to
        assert second == pytest.approx(end if sampler == "heun" else (sigma * target) ** 0.5, rel=1e-3)
    torch.testing.assert_close(schedule.timesteps, fractional_timesteps(schedule.sigmas[:-1], SD), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd1", "sdxl"])
def test_schedules_of_other_programs(name, config):
    for sampler in ("euler", "dpmpp_2m", "unipc", "dpmpp_3m_sde"):
        for steps in (1, 2, 3, 7, 10, 11, 20, 33):
            schedule = make_schedule(config.scheduler, sampler, name, steps, config.name)
            expected = formula_sigmas(name, config.scheduler, steps, config.name)
            torch.testing.assert_close(schedule.sigmas[:-1], expected, rtol=2e-5, atol=0)
            timesteps = fractional_timesteps(expected, config.scheduler)
            torch.testing.assert_close(schedule.timesteps, timesteps, rtol=0, atol=1e-3)
            assert schedule.init_noise_sigma == (schedule.sigmas[0] if SAMPLERS[sampler].sigma_space else 1)


def test_align_your_steps_is_for_models_that_it_was_published_for():
    tens = [make_schedule(SD, "euler", "ays", 10, architecture) for architecture in ("sd1", "sdxl")]
    assert tens[0].timesteps.round().tolist() == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    assert tens[1].timesteps.round().tolist() == [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
    with pytest.raises(GgufSdError, match=r"'ays' is published for .* not for 'sd3' of 1000"):
        make_schedule(SD, "euler", "ays", 10, "sd3")
    with pytest.raises(GgufSdError, match="not for 'sd1' of 600; choose another"):
        make_schedule(replace(SD, num_train_timesteps=600), "euler", "ays", 10)


def test_beta_quantiles_equal_scipys():
    shares = np.concatenate([np.linspace(0, 1, 101), [1e-9, 1e-4, 0.4999, 0.5001, 1 - 1e-4]])
    for shape in (0.6, 0.9):
        np.testing.assert_allclose(
            beta_quantiles(shares, shape), scipy.stats.beta.ppf(shares, shape, shape), atol=1e-12
        )


@pytest.mark.parametrize("sampler", [s for s, info in SAMPLERS.items() if info.scheduler])
@pytest.mark.parametrize(
    "published",
    [
        pytest.param({}, id="nothing named"),
        pytest.param({"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}, id="sd15"),
        pytest.param({"steps_offset": 1, "timestep_spacing": "leading", "clip_sample": False}, id="sdxl"),
    ],
)
def test_the_default_schedule_is_that_of_diffusers_from_config(sampler, published):
    """As a user of diffusers changes the sampler: SomeScheduler.from_config(pipeline.scheduler.config)."""
    betas_named = {"beta_start": SD.beta_start, "beta_end": SD.beta_end, "beta_schedule": SD.beta_schedule}
    source = diffusers.PNDMScheduler.from_config({**betas_named, **published, "skip_prk_steps": True})
    theirs = scheduler_class(SAMPLERS[sampler].scheduler).from_config(source.config)
    config = replace(SD, steps_offset=0, set_alpha_to_one=None)
    config = replace(config, **{key: value for key, value in published.items() if key in vars(config)})
    for steps in (4, 20, 30):
        theirs.set_timesteps(steps)
        schedule = make_schedule(config, sampler, steps=steps)
        torch.testing.assert_close(schedule.timesteps.double(), theirs.timesteps.double(), rtol=0, atol=2e-3)
        assert schedule.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
        if hasattr(theirs, "sigmas"):
            assert schedule.sigmas[0] == pytest.approx(float(theirs.sigmas[0]), rel=1e-6)
    if sampler in ("ddim", "pndm"):
        assert schedule.sigmas[-1] == pytest.approx(float((1 / theirs.final_alpha_cumprod - 1) ** 0.5), abs=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("name", ["model", "karras", "exponential"])
def test_other_noise_schedules_equal_diffusers(sampler, name):
    config = replace(SD, beta_schedule="squaredcos_cap_v2", num_train_timesteps=600, timestep_spacing="linspace")
    schedule = make_schedule(config, sampler, name, 12)
    expected = oracle(sampler, name, config, 12)
    assert torch.equal(schedule.timesteps, expected.timesteps)
    assert torch.equal(schedule.sigmas, expected.sigmas)


def test_sigmas_of_samplers_on_the_training_grid():
    """diffusers keeps none for these: they are the levels its alphas_cumprod give."""
    alphas = alphas_cumprod(SD)
    schedule = make_schedule(SD, "ddim", steps=10)
    expected = [((1 - alphas[t]) / alphas[t]) ** 0.5 for t in (*schedule.timesteps, 0)]
    torch.testing.assert_close(schedule.sigmas, torch.stack(expected), rtol=0, atol=0)
    assert make_schedule(replace(SD, set_alpha_to_one=True), "pndm", steps=10).sigmas[-1] == 0


def test_pndm_50_and_20():
    schedule = make_schedule(SD, "pndm", steps=50)
    assert schedule.timesteps.tolist() == [981, 961, *range(961, 0, -20)]
    assert schedule.evaluations() == 51
    assert make_schedule(SD, "pndm", steps=20).timesteps.tolist() == [951, 901, *range(901, 0, -50)]


def test_ddim_50():
    assert make_schedule(SD, "ddim", steps=50).timesteps.tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize(("steps", "expected"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_turbo(steps, expected):
    schedule = make_schedule(SDXL_TURBO.scheduler, "euler_a", "model", steps)
    assert schedule.timesteps.tolist() == expected
    assert schedule.init_noise_sigma == pytest.approx(14.6146, abs=1e-4)
    assert schedule.sigmas[0] == pytest.approx(14.6146, abs=1e-4)
    assert schedule.sigmas[-1] == 0
    assert make_schedule(SDXL.scheduler, "euler_a", "trailing", steps).timesteps.tolist() == expected


def test_sdxl_euler_20():
    schedule = make_schedule(SDXL.scheduler, "euler", steps=20)
    assert schedule.timesteps.tolist() == list(range(951, 0, -50))
    assert schedule.init_noise_sigma == pytest.approx(11.07, abs=5e-3)


def test_dpmpp_2m_karras_20():
    timesteps = make_schedule(SD, "DPM++ 2M Karras", steps=20).timesteps.tolist()
    assert timesteps[:4] == [999, 962, 921, 876]
    assert timesteps[-2:] == [2, 0]
    assert len(timesteps) == 20


def test_lcm_4():
    assert make_schedule(SD, "lcm", steps=4).timesteps.tolist() == [999, 759, 499, 259]


def test_trailing_takes_exactly_the_steps_asked():
    """np.arange(1000, 0, -1000 / 61) has 62 entries; diffusers then evaluates the model at timestep -1."""
    assert len(np.arange(1000, 0, -1000 / 61)) == 62
    for sampler in ("ddim", "euler", "dpmpp_2m"):
        schedule = make_schedule(SD, sampler, "trailing", 61)
        assert schedule.evaluations() == 61
        assert torch.equal(schedule.timesteps, oracle(sampler, "trailing", SD, 61).timesteps[:61])


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [("pndm", [11, 9, 1 + 1]), ("heun", [19, 15, 1]), ("euler", [10, 8, 1]), ("dpmpp_2m", [10, 8, 1])],
)
def test_evaluations(sampler, evaluations):
    schedule = make_schedule(SD, sampler, steps=10)
    assert [schedule.evaluations(start) for start in (0, 2, 9)] == evaluations


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("step", [0, 1, 5])
def test_add_noise_equals_diffusers(sampler, step):
    name = SAMPLERS[sampler].schedules[-1]
    schedule = make_schedule(SD, sampler, name, 8)
    scheduler = oracle(sampler, name, SD, 8)
    index = step * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    latents, noise = torch.randn(2, 2, 4, 3, 5, generator=torch.Generator().manual_seed(step))
    expected = scheduler.add_noise(latents, noise, scheduler.timesteps[index : index + 1].repeat(2))
    torch.testing.assert_close(add_noise(latents, noise, schedule, step), expected, rtol=1e-6, atol=1e-6)
    half = add_noise(latents.half(), noise.half(), schedule, step)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("euler", 0, "cannot take 0 steps"),
        ("euler", -3, "cannot take -3 steps"),
        ("ddim", 1001, "choose 1 to 1000"),
        ("lcm", 51, "choose 1 to 50"),
        ("ddim", 1000, "too many"),  # leading with offset 1 would begin at timestep 1000
        ("dpmpp_2m", 1000, "too many"),  # leading would stand still
    ],
)
def test_steps_out_of_range(sampler, steps, message):
    with pytest.raises(GgufSdError, match=message):
        make_schedule(SD, sampler, "model", steps)


def test_config_out_of_range():
    with pytest.raises(GgufSdError, match="unknown beta schedule 'cosine'"):
        make_schedule(replace(SD, beta_schedule="cosine"), "euler")
    with pytest.raises(GgufSdError, match="unknown timestep spacing 'even'"):
        make_schedule(replace(SD, timestep_spacing="even"), "euler")
