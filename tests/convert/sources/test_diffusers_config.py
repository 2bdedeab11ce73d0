"""Folders of every width and depth that the engine runs; what it does not run is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguf_sd.errors import GgufSdError
from gguf_sd_convert.sources.diffusers_config import read_model_config

Make = Callable[..., Any]


def test_fields(tiny_pipeline: Make) -> None:
    config, notes = read_model_config(tiny_pipeline())
    unet, vae, text, scheduler = config.unet, config.vae, config.text[0], config.scheduler
    assert config.name == "sd1"
    assert notes == []
    assert (unet.in_channels, unet.out_channels, unet.block_out_channels) == (4, 4, (32, 64))
    assert (unet.transformer_layers, unet.mid_transformer_layers, unet.num_heads) == ((1, 0), 1, (4, 4))
    assert (unet.context_dim, unet.linear_projection, unet.vector_dim, unet.norm_groups) == (32, False, 0, 8)
    assert (vae.block_out_channels, vae.layers_per_block, vae.scaling_factor) == ((32, 32, 64, 64), 1, 0.18215)
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size) == (32, 64, 2, 520)
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.defaults.sampler, config.defaults.width, config.defaults.height) == ("pndm", 128, 128)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resnet_time_scale_shift", "scale_shift"),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("addition_embed_type", "image"),
        ("time_cond_proj_dim", 256),
        ("time_embedding_type", "fourier"),
        ("dual_cross_attention", True),
        ("only_cross_attention", True),
        ("encoder_hid_dim", 4096),
        ("conv_in_kernel", 1),
        ("act_fn", "gelu"),
        ("norm_eps", 1e-6),
        ("mid_block_type", "UNetMidBlock2D"),
        ("mid_block_type", None),
        ("attention_type", "gated"),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("center_input_sample", True),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]),
        ("layers_per_block", [1, 2]),
        ("cross_attention_dim", [32, 64]),
        ("attention_head_dim", 5),
        ("block_out_channels", "wide"),
        ("block_out_channels", [32, -64]),
        ("in_channels", 8),
        ("out_channels", 8),
        ("cross_attention_dim", 768),
        ("norm_num_groups", 0),
        ("time_embedding_dim", 64),
        ("_class_name", "UNet3DConditionModel"),
    ],
)
def test_unet_settings_are_refused_by_name(edited_folder: Make, key: str, value: Any) -> None:
    folder = edited_folder("unet", **{key: value})
    with pytest.raises(GgufSdError, match=key):
        read_model_config(folder)


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("vae", "_class_name", "AutoencoderTiny"),
        ("vae", "shift_factor", 0.1),
        ("vae", "latents_mean", [0, 0, 0, 0]),
        ("vae", "use_quant_conv", False),
        ("vae", "mid_block_add_attention", False),
        ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("vae", "scaling_factor", 0),
        ("vae", "latent_channels", 16),
        ("text_encoder", "hidden_act", "relu"),
        ("text_encoder", "layer_norm_eps", 1e-6),
        ("text_encoder", "architectures", ["T5EncoderModel"]),
        ("text_encoder", "model_type", "t5"),
        ("scheduler", "prediction_type", "flow"),
        ("scheduler", "trained_betas", [0.1]),
        ("scheduler", "rescale_betas_zero_snr", True),
        ("scheduler", "beta_schedule", "sigmoid"),
    ],
)
def test_other_settings_are_refused_by_name(edited_folder: Make, component: str, key: str, value: Any) -> None:
    folder = edited_folder(component, **{key: value})
    with pytest.raises(GgufSdError, match="in_channels" if key == "latent_channels" else key):
        read_model_config(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"'])
def test_broken_json(edited_folder: Make, content: str) -> None:
    folder: Path = edited_folder("unet")
    (folder / "vae" / "config.json").write_text(content)
    with pytest.raises(GgufSdError, match=r"vae.config\.json is no JSON"):
        read_model_config(folder)


@pytest.mark.parametrize(
    ("settings", "sampler", "schedule", "spacing"),
    [
        ({"_class_name": "DDIMScheduler"}, "ddim", "model", "leading"),
        ({"_class_name": "EulerDiscreteScheduler"}, "euler", "model", "leading"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler", "karras", "leading"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, "euler_a", "model",
         "trailing"),
        ({"_class_name": "HeunDiscreteScheduler"}, "heun", "model", "leading"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "dpmpp_2m", "karras", "leading"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", "model",
         "leading"),
        ({"_class_name": "LCMScheduler"}, "lcm", "model", "leading"),
        ({"_class_name": "PNDMScheduler", "use_karras_sigmas": True}, "pndm", "model", "leading"),
        ({"_class_name": "UniPCMultistepScheduler", "use_beta_sigmas": True}, "unipc", "beta", "leading"),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler", "use_exponential_sigmas": True}, "dpm2_a", "exponential",
         "leading"),
    ],
)  # fmt: skip
def test_schedulers(edited_folder: Make, settings: dict[str, Any], sampler: str, schedule: str, spacing: str) -> None:
    config, notes = read_model_config(edited_folder("scheduler", **settings))
    assert notes == []
    assert (config.defaults.sampler, config.defaults.schedule) == (sampler, schedule)
    assert config.scheduler.timestep_spacing == spacing


def test_defaults_of_absent_scheduler_settings(tiny_pipeline: Make, tmp_path: Path) -> None:
    """They are those of diffusers' class."""
    import json
    import shutil

    from gguf_sd.sampling.names import GRID_SCHEDULES, SAMPLERS
    from gguf_sd_convert.sources.scheduler_config import CLASSES
    from tests.sampling.oracle import scheduler_class

    for kind in CLASSES:
        folder = tmp_path / kind
        shutil.copytree(tiny_pipeline(), folder)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
        found, theirs = read_model_config(folder)[0].scheduler, scheduler_class(kind)().config
        for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type"):
            assert getattr(found, key) == theirs[key], (kind, key)
        assert (found.timestep_spacing, found.set_alpha_to_one) == (None, None)  # each sampler's own
        assert found.steps_offset == 1  # as diffusers' Stable Diffusion 1.x pipelines have it
        info = SAMPLERS[CLASSES[kind].sampler]
        assert info.spacing == theirs["timestep_spacing"]
        if info.schedules == GRID_SCHEDULES and "set_alpha_to_one" in theirs:
            assert info.ends_clean == theirs["set_alpha_to_one"]


def test_unknown_scheduler_is_noted(edited_folder: Make) -> None:
    config, notes = read_model_config(edited_folder("scheduler", _class_name="DEISMultistepScheduler"))
    assert config.defaults.sampler == "dpmpp_2m"
    assert "DEISMultistepScheduler" in notes[0]


@pytest.mark.parametrize(("size", "expected"), [(16, (128, 128)), ([8, 24], (192, 64)), (None, (512, 512))])
def test_default_size(edited_folder: Make, size: Any, expected: tuple[int, int]) -> None:
    defaults = read_model_config(edited_folder("unet", sample_size=size))[0].defaults
    assert (defaults.width, defaults.height) == expected


def test_steps_and_guidance_of_the_models_own(tiny_pipeline: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline(), tmp_path / "own")
    index = json.loads((folder / "model_index.json").read_text())

    def with_own(value: Any) -> Any:
        (folder / "model_index.json").write_text(json.dumps(index | {"_gguf_sd": value}))
        return read_model_config(folder)[0].defaults

    defaults = with_own({"steps": 12, "guidance": 2.5})
    assert (defaults.steps, defaults.guidance, defaults.width) == (12, 2.5, 128)
    for value, message in (
        ({"steps": 0}, "steps is 0"),
        ({"guidance": "much"}, "guidance is 'much'"),
        ({"sampler": "x"}, "an object of steps and guidance"),
        (7, "an object of steps and guidance"),
    ):
        with pytest.raises(GgufSdError, match=message):
            with_own(value)
