"""What the WebUI lends and gets back."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.webui.running import WebUI

LONG = "a photo of a red cat, " * 9 + "zzk (blue:1.3), [cat] " * 5


def test_the_lent_tensors_are_the_webuis_own_memory(webui: WebUI) -> None:
    leased = webui.get("/probe/lent")
    assert leased["foreign"] == 0
    assert not [name for name in leased["names"] if "wrapped" in name]
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in leased["names"]


def test_what_shapes_cannot_tell_comes_from_the_webuis_modules(webui: WebUI) -> None:
    leased = webui.get("/probe/lent")
    # lib_lora_train/demo/tiny_checkpoint.py has these; by the family's rule they would be 8 and 1.
    assert (leased["unet_heads"], leased["text_heads"]) == (4, [2])
    assert (leased["family"], leased["prediction_type"], leased["latent_scale"]) == ("sd1", "epsilon", 0.18215)
    assert leased["checkpoint"]["name"] == "tiny"
    assert leased["checkpoint"]["title"] == webui.get("/sdapi/v1/options")["sd_model_checkpoint"]
    assert len(leased["checkpoint"]["sha256"]) == 64


def test_while_lent_the_queue_is_locked_and_the_job_shown_and_both_end(webui: WebUI) -> None:
    leased = webui.get("/probe/lent")
    assert leased["locked"] and leased["job"].startswith("task(lora-train-")
    assert webui.get("/sdapi/v1/progress?skip_current_image=true")["state"]["job"] == ""
    webui.sample()


def test_borrowing_changes_no_tensor(webui: WebUI) -> None:
    before = webui.get("/probe/model")
    webui.get("/probe/lent")
    assert webui.get("/probe/model") == before
    assert before["gradients"] == []


@pytest.mark.parametrize("prompt", ["", "a photo of zzk, red cat", LONG])
def test_the_prediction_equals_the_webuis(webui: WebUI, prompt: str) -> None:
    plain = prompt.replace("(blue:1.3)", "blue").replace("[cat]", "cat")  # no emphasis: captions have none
    found = webui.post("/probe/parity", {"prompt": plain})
    assert found["difference"] <= 1e-4 and found["text"] <= 1e-4, found


def test_clip_skip_is_the_webuis(webui: WebUI) -> None:
    with webui.option("CLIP_stop_at_last_layers", 2):
        assert webui.get("/probe/lent")["clip_skip"] == 2
        found = webui.post("/probe/parity", {"prompt": "a photo of zzk"})
    assert found["difference"] <= 1e-4 and found["text"] <= 1e-4, found


@pytest.mark.parametrize("schedule", ["Default", "Zero Terminal SNR"])
def test_the_noise_schedule_is_the_webuis(webui: WebUI, schedule: str) -> None:
    with webui.option("sd_noise_schedule", schedule):
        leased = webui.get("/probe/lent")
    assert leased["zero_terminal_snr"] == (schedule != "Default")
    # The WebUI keeps the last one of a zero-terminal-SNR schedule a little above zero.
    assert leased["schedule_difference"] <= 1e-6


def test_captions_are_cut_into_the_chunks_that_the_webui_makes(webui: WebUI) -> None:
    text = LONG.replace("(blue:1.3)", "blue").replace("[cat]", "cat")
    found = webui.post("/probe/tokens", {"text": text})
    assert len(found["theirs"]) == 2 and found["ours"] == found["theirs"]


def test_our_sampler_paints_the_webuis_picture(webui: WebUI) -> None:
    settings = {"prompt": "a photo of zzk", "negative_prompt": "blue", "width": 128, "height": 64, "steps": 6,
                "cfg_scale": 5.0, "seed": 11}
    ours = _pixels(webui.post("/probe/sample", settings)["image"])
    theirs = _pixels(webui.sample(**settings))
    difference = np.abs(ours - theirs)
    assert theirs.std() > 10
    # A value within float error of a whole number may fall on either side of it.
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01, (difference.max(), (difference > 0).mean())


def test_the_host_renders_what_txt2img_paints(webui: WebUI) -> None:
    settings = {"prompt": "a photo of zzk", "width": 128, "steps": 3, "cfg_scale": 3}
    model, surroundings = webui.get("/probe/model"), webui.get("/probe/surroundings")
    rendered = webui.post("/probe/render", {**settings, "negative_prompt": "red", "seed": 3, "count": 2})["images"]
    now = webui.get("/probe/surroundings")
    # A generation of the user draws random numbers, too.
    assert webui.get("/probe/model") == model
    assert {name for name, value in surroundings.items() if now[name] != value} <= {"random", "torch", "numpy"}
    for seed, image in zip((3, 4), rendered, strict=True):
        assert np.array_equal(_pixels(image), _pixels(webui.sample(**settings, seed=seed)))
    other = webui.post("/probe/render", {**settings, "negative_prompt": "red", "seed": 3, "sampler": "DDIM"})["images"]
    assert np.array_equal(_pixels(other[0]), _pixels(webui.sample(**settings, sampler_name="DDIM")))


@pytest.mark.parametrize("request_", [{"sampler": "none"}, {"leased": True}], ids=str)
def test_an_unknown_sampler_and_a_model_that_is_leased_are_refused(webui: WebUI, request_: dict[str, object]) -> None:
    assert webui.post("/probe/render", request_) == {"error": "HostError"}
    webui.sample()


def _pixels(image: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"), dtype=np.int16)
