"""OpenAI's interface, by OpenAI's own client."""

from __future__ import annotations

import base64
import io
from typing import Any

import openai
import pytest
import requests
from PIL import Image

from gguf_sd.pipeline import Pipeline
from gguf_sd.quality import psnr
from tests.server.conftest import FAST, Running, picture


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


def test_pictures_are_those_of_the_pipeline(client: openai.OpenAI, models: dict[str, Any]) -> None:
    extra = FAST | {"guidance": 3.0, "negative_prompt": "a ring"}
    done = client.images.generate(prompt="a red circle", model="demo-q4_0", n=2, size="64x64", extra_body=extra)
    pipeline = Pipeline.load(models["demo-q4_0"], "cpu", "float32")
    expected = pipeline("a red circle", negative_prompt="a ring", guidance=3.0, steps=2, seed=1, count=2)
    assert done.data is not None
    painted = [picture(entry.b64_json or "") for entry in done.data]
    # Two at once here, one after another there: float32 products of other sizes may differ in their last bit.
    assert all(psnr(image, other) > 55 for image, other in zip(painted, expected, strict=True))
    assert painted[1].info["parameters"] == expected[1].info["parameters"]
    assert [entry.model_extra["seed"] for entry in done.data if entry.model_extra] == [1, 2]


def test_addresses_and_formats(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"prompt": "a red circle", "extra_body": FAST}
    done = client.images.generate(response_format="url", **settings)
    assert done.data is not None
    answer = requests.get(done.data[0].url or "", timeout=10)
    assert answer.headers["content-type"] == "image/png"
    plain = Image.open(io.BytesIO(answer.content))
    encoded = client.images.generate(output_format="webp", output_compression=100, **settings)
    assert encoded.data is not None
    webp = Image.open(io.BytesIO(base64.b64decode(encoded.data[0].b64_json or "")))
    assert (webp.format, webp.size) == ("WEBP", plain.size)
    assert requests.get(f"{answer.url[:-4]}xxxx", timeout=10).status_code == 404


def test_edits(client: openai.OpenAI) -> None:
    start, mask = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(start, "PNG")
    hole = Image.new("RGBA", (64, 64), "black")
    hole.paste((0, 0, 0, 0), (32, 0, 64, 64))
    hole.save(mask, "PNG")
    files: dict[str, Any] = {"image": ("a.png", start.getvalue()), "mask": ("m.png", mask.getvalue())}
    done = client.images.edit(prompt="a red circle", extra_body=FAST | {"mask_blur": 0}, **files)
    assert done.data is not None
    image = picture(done.data[0].b64_json or "")
    assert image.crop((0, 0, 32, 64)).getcolors() == [(32 * 64, (255, 165, 0))]
    assert len(image.crop((32, 0, 64, 64)).getcolors(1 << 12) or []) > 1
    with pytest.raises(openai.BadRequestError, match="edits one"):
        client.images.edit(prompt="a", image=[("a.png", b"x"), ("b.png", b"y")])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo-q8_0", "demo-q4_0"]
    assert client.models.retrieve("demo-q4_0").owned_by == "gguf-sd"
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a", model="dall-e-9")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("settings", "words", "param"),
    [
        ({"prompt": 5}, "prompt is 5; it takes a text", "prompt"),
        ({}, "prompt is missing", None),
        ({"prompt": "a", "stepz": 3}, "no setting 'stepz'", "stepz"),
        ({"prompt": "a", "stream": True}, "not streamed here", "stream"),
        ({"prompt": "a", "n": 99}, "1 to 16 pictures", None),
        ({"prompt": "a", "n": 10**30}, "n is 1000", "n"),
        ({"prompt": "a", "size": "9x"}, "size is '9x'", "size"),
        ({"prompt": "a", "size": "65x64"}, "no multiple of 8", None),
        ({"prompt": "a", "size": "99999x8"}, "up to 2048 pixels", None),
        ({"prompt": "a", "steps": 9999}, "up to 150", None),
        ({"prompt": "a", "guidance": 1e300}, "guidance is", "guidance"),
        ({"prompt": "a", "sampler": "../../etc/passwd"}, "unknown sampler", None),
        ({"prompt": "a" * 9000}, "up to 8000", None),
        ({"prompt": "a", "sampler": "x" * 10**6}, "sampler has 1000000 characters", None),
        ({"prompt": "a", "x" * 10**6: 1}, "no setting 'xxx", None),
        ({"prompt": "half a pair \ud800"}, "prompt must be a text", None),
        ({"prompt": "a", "\ud800": 1}, "no setting", "\\ud800"),
        ({"prompt": "<lora:../../x:1>"}, "which this server does not have", None),
        ({"prompt": "a", "image": "/etc/passwd"}, "no setting 'image'", "image"),
    ],
)
def test_bad_requests(served: Running, settings: dict[str, Any], words: str, param: str | None) -> None:
    answer = served.post("/v1/images/generations", **settings)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert words in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"\xff", b'{"prompt": ' + b"[" * 100_000, b'{"n": ' + b"9" * 9999 + b"}"]
)
def test_no_json(served: Running, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{served.url}/v1/images/generations", body, headers=headers, timeout=10)
    assert answer.status_code == 400
    assert "the request" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data", "application/json"])
@pytest.mark.parametrize(
    "body", [b"--x", b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc\r\n--x--\r\n']
)
def test_broken_forms(served: Running, kind: str, body: bytes) -> None:
    answer = requests.post(f"{served.url}/v1/images/edits", body, headers={"Content-Type": kind}, timeout=10)
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"prompt": "a", "n": "x"}, "n is 'x'"),
        ({"prompt": "a", "paste": "maybe"}, "paste is 'maybe'"),
        ({"prompt": "a", "strength": "0"}, "strength must lie above 0"),
        ({"prompt": "a", "strength": "nan"}, "strength is nan"),
        ({"prompt": "a", "resize": "squeeze"}, "unknown resize mode"),
        ({}, "prompt is missing"),
    ],
)
def test_bad_edits(served: Running, texts: dict[str, str], words: str) -> None:
    start = io.BytesIO()
    Image.new("RGB", (64, 64)).save(start, "PNG")
    files = {"image": ("../../etc/passwd", start.getvalue())}
    answer = requests.post(f"{served.url}/v1/images/edits", texts, files=files, timeout=10)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
