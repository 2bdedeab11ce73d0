"""Timesteps, sigmas and names, against diffusers' schedulers."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from gguf_sd.config import SD15, SDXL, SDXL_TURBO, SchedulerConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.sampling import SAMPLERS, SCHEDULES, add_noise, make_schedule, resolve_sampler, resolve_schedule
from gguf_sd.sampling.schedules import alphas_cumprod, betas

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers with NumPy 2

SD = SD15.scheduler
COMBINATIONS = [(sampler, name) for sampler, info in SAMPLERS.items() for name in info.schedules]
SHARED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


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
    if sampler == "euler_a":  # has no ramps in diffusers: Euler's sigmas are the same
        scheduler = diffusers.EulerDiscreteScheduler(**options, **ramp)
    else:
        scheduler = getattr(diffusers, SAMPLERS[sampler].scheduler)(**options, **ramp, **own.get(sampler, {}))
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_equal_diffusers(beta_schedule):
    config = replace(SD, beta_schedule=beta_schedule, num_train_timesteps=777)
    scheduler = diffusers.DDIMScheduler(**{key: getattr(config, key) for key in SHARED})
    assert torch.equal(betas(config), scheduler.betas)
    assert torch.equal(alphas_cumprod(config), scheduler.alphas_cumprod)


@pytest.mark.parametrize(("sampler", "name"), COMBINATIONS)
@pytest.mark.parametrize("config", [SD, SDXL_TURBO.scheduler], ids=["leading", "trailing"])
def test_timesteps_and_sigmas_equal_diffusers(sampler, name, config):
    for steps in (1, 2, 3, 4, 7, 20, 25, 30, 50):
        schedule = make_schedule(config, sampler, name, steps)
        expected = oracle(sampler, name, config, steps)
        assert schedule.timesteps.dtype == expected.timesteps.dtype
        assert torch.equal(schedule.timesteps, expected.timesteps), steps
        assert schedule.evaluations() == len(expected.timesteps)
        assert schedule.init_noise_sigma == float(expected.init_noise_sigma), steps
        if hasattr(expected, "sigmas"):
            assert schedule.sigmas.dtype == torch.float32
            assert torch.equal(schedule.sigmas, expected.sigmas), steps


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
    ("name", "expected"),
    [
        ("Euler a", ("euler_a", None)),
        ("euler_ancestral", ("euler_a", None)),
        ("EulerAncestralDiscreteScheduler", ("euler_a", None)),
        ("Euler a Karras", ("euler_a", "karras")),
        ("EULER", ("euler", None)),
        ("EulerDiscreteScheduler", ("euler", None)),
        ("DPM++ 2M", ("dpmpp_2m", None)),
        ("dpm++ 2m karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m", ("dpmpp_2m", None)),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", None)),
        ("DPM++ 2M SDE", ("dpmpp_2m_sde", None)),
        ("DPM++ 2M SDE Karras", ("dpmpp_2m_sde", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("dpmpp_2m_sde", ("dpmpp_2m_sde", None)),
        ("PLMS", ("pndm", None)),
        ("PNDMScheduler", ("pndm", None)),
        ("DDIM", ("ddim", None)),
        ("DDIMScheduler", ("ddim", None)),
        (" Heun ", ("heun", None)),
        ("HeunDiscreteScheduler", ("heun", None)),
        ("LCM", ("lcm", None)),
        ("LCMScheduler", ("lcm", None)),
    ],
)
def test_names_of_other_programs(name, expected):
    assert resolve_sampler(name) == expected


def test_own_names_resolve_to_themselves():
    for sampler, info in SAMPLERS.items():
        assert resolve_sampler(sampler) == (sampler, None)
        assert resolve_sampler(info.label) == (sampler, None)
        for name in info.schedules:
            assert resolve_schedule(name.upper(), sampler) == name
    assert {name for info in SAMPLERS.values() for name in info.schedules} == set(SCHEDULES)


def test_the_schedule_in_a_name_gives_way_to_a_schedule_asked_for():
    assert make_schedule(SD, "DPM++ 2M Karras", "exponential", 5).name == "exponential"
    assert make_schedule(SD, "DPM++ 2M Karras", "model", 5).name == "karras"


def test_unknown_sampler_names_the_nearest_and_all():
    with pytest.raises(GgufSdError) as error:
        resolve_sampler("euler_ancestrl")
    assert "euler_ancestral" in str(error.value)
    assert all(sampler in str(error.value) for sampler in SAMPLERS)


@pytest.mark.parametrize(
    ("sampler", "schedule", "message"),
    [
        ("euler", "kerras", "mean karras.*exponential"),
        ("ddim", "karras", "'ddim' has no schedule 'karras'.*leading, trailing, linspace"),
        ("lcm", "trailing", "'lcm' has no schedule 'trailing'.*choose from model"),
        ("euler", "sgm_uniform", "nearest is 'trailing'"),
        ("PLMS Karras", "model", "'pndm' has no schedule 'karras'"),
    ],
)
def test_schedules_that_do_not_fit(sampler, schedule, message):
    with pytest.raises(GgufSdError, match=message):
        make_schedule(SD, sampler, schedule, 10)


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
