"""The names that other programs call samplers and schedules by."""

import pytest

from gguf_sd.config import SD15
from gguf_sd.errors import GgufSdError
from gguf_sd.sampling import SAMPLERS, SCHEDULES, make_schedule, resolve_sampler, resolve_schedule

SD = SD15.scheduler


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
        ("UniPC", ("unipc", None)),
        ("uni_pc", ("unipc", None)),
        ("UniPCMultistepScheduler", ("unipc", None)),
        ("DPM++ SDE Karras", ("dpmpp_sde", "karras")),
        ("dpmpp_sde_gpu", ("dpmpp_sde", None)),
        ("DPMSolverSDEScheduler", ("dpmpp_sde", None)),
        ("DPM++ 2S a", ("dpmpp_2s_a", None)),
        ("DPM++ 2S a Karras", ("dpmpp_2s_a", "karras")),
        ("dpmpp_2s_ancestral", ("dpmpp_2s_a", None)),
        ("dpm++2s_a", ("dpmpp_2s_a", None)),
        ("dpm++2m", ("dpmpp_2m", None)),
        ("DPM++ 3M SDE Exponential", ("dpmpp_3m_sde", "exponential")),
        ("dpmpp_3m_sde", ("dpmpp_3m_sde", None)),
        ("LMS", ("lms", None)),
        ("k_lms", ("lms", None)),
        ("LMS Karras", ("lms", "karras")),
        ("LMSDiscreteScheduler", ("lms", None)),
        ("DPM2", ("dpm2", None)),
        ("dpm_2", ("dpm2", None)),
        ("KDPM2DiscreteScheduler", ("dpm2", None)),
        ("DPM2 a Karras", ("dpm2_a", "karras")),
        ("dpm_2_ancestral", ("dpm2_a", None)),
        ("k_dpm_2_a", ("dpm2_a", None)),
        ("KDPM2AncestralDiscreteScheduler", ("dpm2_a", None)),
        ("DDPM", ("ddpm", None)),
        ("DDPMScheduler", ("ddpm", None)),
        ("TCD", ("tcd", None)),
        ("TCDScheduler", ("tcd", None)),
        ("ddim_trailing", ("ddim", "trailing")),
        ("DPM++ 2M SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("DPM++ 2M Align Your Steps", ("dpmpp_2m", "ays")),
        ("LCMScheduler", ("lcm", None)),
    ],
)
def test_names_of_other_programs(name, expected):
    assert resolve_sampler(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Automatic", "model"),
        ("default", "model"),
        ("discrete", "model"),
        ("Uniform", "normal"),
        ("SGM Uniform", "sgm_uniform"),
        ("sgm_uniform", "sgm_uniform"),
        ("ddim_uniform", "leading"),
        ("DDIM", "leading"),
        ("Polyexponential", "exponential"),
        ("Align Your Steps", "ays"),
        ("Simple", "simple"),
        ("Beta", "beta"),
    ],
)
def test_schedules_of_other_programs(name, expected):
    assert resolve_schedule(name, "euler") == expected


@pytest.mark.parametrize(
    ("name", "near"),
    [("ipndm", "pndm"), ("dpm++2mv2", "dpmpp_2m"), ("DPMSolverSinglestepScheduler", "dpmsolvermultistepscheduler")],
)
def test_samplers_that_are_not_here(name, near):
    with pytest.raises(GgufSdError, match=f"unknown sampler .*did you mean .*{near}"):
        resolve_sampler(name)


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
        ("euler", "kl_optimal", "unknown schedule 'kl_optimal'"),
        ("ddim", "Align Your Steps", r"'ddim' has no schedule 'ays' \(Align Your Steps\)"),
        ("euler", "sgm_unifrm", "mean sgm_uniform"),
        ("PLMS Karras", "model", "'pndm' has no schedule 'karras'"),
    ],
)
def test_schedules_that_do_not_fit(sampler, schedule, message):
    with pytest.raises(GgufSdError, match=message):
        make_schedule(SD, sampler, schedule, 10)
