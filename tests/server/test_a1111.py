"""AUTOMATIC1111's interface, by one of its clients, and by the requests of others."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import requests
import webuiapi
from PIL import Image

from gguf_sd.pipeline import Pipeline
from gguf_sd.quality import psnr
from gguf_sd.server.metrics import process_bytes
from tests.server.conftest import Running, as_text, picture, until


@pytest.fixture(scope="module")
def client(served: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{served.url}/sdapi/v1", sampler="Euler a", scheduler="automatic", steps=2)


SETTINGS: dict[str, Any] = {"prompt": "a red circle", "width": 64, "height": 64, "seed": 1}


def test_text_to_image(client: webuiapi.WebUIApi, models: dict[str, Any]) -> None:
    done = client.txt2img(**SETTINGS, n_iter=2, cfg_scale=3)
    pipeline = Pipeline.load(models["demo-q8_0"], "cpu", "float32")
    expected = pipeline(
        "a red circle", negative_prompt="", guidance=3.0, steps=2, seed=1, count=2, sampler="Euler a", schedule="model"
    )
    # Two at once here, one after another there: float32 products of other sizes may differ in their last bit.
    assert all(psnr(image, other) > 55 for image, other in zip(done.images, expected, strict=True))
    assert done.info["all_seeds"] == [1, 2]
    assert done.info["infotexts"][0] == done.image.info["parameters"] == expected[0].info["parameters"]
    assert done.parameters["cfg_scale"] == 3
    assert client.png_info(done.image).info == done.info["infotexts"][0]


def test_image_to_image_and_inpainting(client: webuiapi.WebUIApi) -> None:
    start = Image.new("RGB", (64, 64), "orange")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    done = client.img2img(images=[start], denoising_strength=0.6, **SETTINGS)
    assert done.info["denoising_strength"] == 0.6
    whole = client.img2img(images=[start], mask_image=mask, mask_blur=0, denoising_strength=1.0, **SETTINGS)
    assert whole.image.crop((0, 0, 32, 64)).getcolors() == [(32 * 64, (255, 165, 0))]
    other = client.img2img(
        images=[start], mask_image=mask, mask_blur=0, inpainting_mask_invert=1, denoising_strength=1.0, **SETTINGS
    )
    assert other.image.crop((32, 0, 64, 64)).getcolors() == [(32 * 64, (255, 165, 0))]


def test_lists(client: webuiapi.WebUIApi) -> None:
    assert [model["model_name"] for model in client.get_sd_models()] == ["demo-q8_0", "demo-q4_0"]
    assert "DPM++ 2M" in client.util_get_sampler_names()
    assert {"karras", "sgm_uniform"} < set(client.util_get_scheduler_names())
    assert client.get_upscalers() == client.get_loras() == client.get_sd_vae() == []
    assert client.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert client.get_memory()["ram"]["used"] > 0


def test_checkpoints_are_switched(client: webuiapi.WebUIApi) -> None:
    first = client.util_get_current_model()
    try:
        client.util_set_model("q4_0")
        assert client.util_get_current_model().startswith("demo-q4_0 [")
        assert client.txt2img(**SETTINGS).info["sd_model_name"] == "demo-q4_0"
        override = {"sd_model_checkpoint": "demo-q8_0"}
        assert client.txt2img(**SETTINGS, override_settings=override).info["sd_model_name"] == "demo-q8_0"
        assert client.util_get_current_model().startswith("demo-q4_0 [")
    finally:
        client.set_options({"sd_model_checkpoint": first})


def test_what_open_webui_sends(served: Running) -> None:
    """The address is verified, models are listed, the options are posted back whole with another model, and a picture
    asked for with a JSON body of few fields; every request has an Authorization header, empty without a key."""
    headers = {"Authorization": ""}
    options = requests.get(f"{served.url}/sdapi/v1/options", headers=headers, timeout=10).json()
    titles = [model["title"] for model in served.get("/sdapi/v1/sd-models").json()]
    options["sd_model_checkpoint"] = titles[1]
    answer = requests.post(f"{served.url}/sdapi/v1/options", json=options, headers=headers, timeout=10)
    assert answer.status_code == 200
    assert served.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == titles[1]
    body = {"prompt": "a red circle", "batch_size": 1, "width": 64, "height": 64, "steps": 2, "negative_prompt": ""}
    done = served.post("/sdapi/v1/txt2img", **body).json()
    assert picture(done["images"][0]).size == (64, 64)
    assert isinstance(done["info"], str)
    assert served.post("/sdapi/v1/options", sd_model_checkpoint=titles[0]).status_code == 200


def test_what_sillytavern_sends(served: Running) -> None:
    """Lists, a model that is set until progress says that nothing is at work, and its request for a picture."""
    get = lambda name: served.get(f"/sdapi/v1/{name}").json()  # noqa: E731
    names = ("upscalers", "latent-upscale-modes", "sd-vae", "samplers", "schedulers", "sd-models")
    assert all(isinstance(get(name), list) for name in names)
    assert served.post("/sdapi/v1/options", sd_model_checkpoint=get("sd-models")[0]["title"]).status_code == 200
    progress = get("progress")
    assert (progress["progress"], progress["state"]["job_count"]) == (0.0, 0)
    body: dict[str, Any] = {"prompt": "a red circle", "negative_prompt": "", "sampler_name": "Euler a", "steps": 2}
    body |= {"scheduler": "Karras", "cfg_scale": 7, "width": 64, "height": 64, "seed": -1, "clip_skip": 1}
    body |= {"restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1.5}
    body |= {"hr_additional_steps": 0, "hr_second_pass_steps": 0, "denoising_strength": 0.7, "save_images": True}
    body |= {"send_images": True, "do_not_save_grid": False, "do_not_save_samples": False}
    body |= {"override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"}}
    body |= {"override_settings_restore_afterwards": True}
    assert len(served.post("/sdapi/v1/txt2img", **body).json()["images"]) == 1


def test_progress_and_interrupt(served: Running, client: webuiapi.WebUIApi) -> None:
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(done=client.txt2img(**SETTINGS, steps=150, n_iter=2)))
    thread.start()
    until(lambda: client.get_progress()["current_image"])
    progress = client.get_progress()
    assert 0 < progress["progress"] < 1
    assert progress["eta_relative"] > 0
    assert progress["state"]["sampling_steps"] == 150
    assert picture(progress["current_image"]).size == (64, 64)
    client.interrupt()
    thread.join(10)
    assert len(found["done"].images) == 1, "the last look, nothing was finished"


@pytest.mark.parametrize(
    ("path", "settings", "status", "words"),
    [
        ("txt2img", {"stepz": 3}, 422, "no setting 'stepz'"),
        ("txt2img", {"steps": "x"}, 422, "steps is 'x'"),
        ("txt2img", {"enable_hr": True}, 422, "does not have that"),
        ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [1]}}}, 422, "does not have that"),
        ("txt2img", {"sampler_name": "nonsense"}, 422, "unknown sampler"),
        ("txt2img", {"batch_size": 4, "n_iter": 5}, 422, "20 are asked for"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "x"}}, 404, "no checkpoint 'x'"),
        ("txt2img", {"override_settings": [1]}, 422, "takes a JSON object"),
        ("img2img", {}, 404, "Init image not found"),
        ("img2img", {"init_images": ["%%%"]}, 422, "no base64"),
        ("img2img", {"init_images": ["aGFsbG8="]}, 422, "cannot be read"),
        ("img2img", {"init_images": ["http://127.0.0.1/x.png"]}, 422, "fetches nothing"),
        ("png-info", {"image": 3}, 422, "takes one field"),
        ("options", {"sd_model_checkpoint": 3}, 422, "takes a text"),
        ("options", {"nonsense": 3}, 422, "no setting"),
    ],
)
def test_bad_requests(served: Running, path: str, settings: dict[str, Any], status: int, words: str) -> None:
    answer = served.post(f"/sdapi/v1/{path}", **settings)
    assert answer.status_code == status
    assert words in answer.json()["detail"]
    assert set(answer.json()) == {"error", "detail", "body", "errors"}


@pytest.mark.parametrize(("side", "words"), [(6000, "6000 x 6000 pixels"), (14_000, "too many pixels")])
def test_a_bomb_is_refused_by_its_header(served: Running, side: int, words: str) -> None:
    bomb = Image.new("1", (side, side))
    text = as_text(bomb)
    before = process_bytes()
    answer = served.post("/sdapi/v1/img2img", init_images=[text])
    assert answer.status_code == 422
    assert words in answer.json()["detail"]
    assert process_bytes() - before < 50 << 20
