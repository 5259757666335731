"""The trigger word's own vectors in a file of ours, as the real WebUI reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_lora_train.adapters.network import AdapterNetwork
from tests.adapters.test_embedding import small_network, word
from tests.webui.running import WebUI
from tests.webui.test_training import train

TAG = " <lora:pivotal:1>"
FULL = "cat " * 71  # and five vectors do not fit into a chunk of 75
PROMPTS = ("a photo of zzk, red", "zzk zzk", f"{FULL} zzk on grass", f"{FULL}, red zzk, on grass", f"{FULL} on, red grass, zzk",
           "a photo of zz and k, ZZK")


@pytest.fixture(scope="module")
def trained(webui: WebUI, dataset: Path) -> str:
    """A LoRA with five vectors for the word zzk, and the UNet's layers alone."""
    finished = train(webui, dataset, "pivotal", trigger_word="zzk", train_trigger_embedding=True, embedding_vectors=5,
                     embedding_init_text="red cat", embedding_lr=5e-2, network_train_unet_only=True)
    assert finished["outcome"] == "done", finished
    return "pivotal"


def test_the_file_is_read_with_its_word(webui: WebUI, trained: str) -> None:
    vectors = load_file(webui.loras / f"{trained}.safetensors")["bundle_emb.zzk.string_to_param.*"]
    found = webui.get(f"/probe/lora?name={trained}")
    assert found["embeddings"] == {"zzk": [5, vectors.shape[1]]}
    assert not any("lora_unet" in message for message in found["complaints"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_condition_and_prediction_equal_the_webuis_with_the_file(webui: WebUI, trained: str, prompt: str) -> None:
    found = webui.post("/probe/parity", {"name": trained, "prompt": prompt})
    assert found["text"] <= 1e-3 < 0.02 < found["text_effect"] and found["difference"] <= 1e-3, found


def test_the_word_is_an_ordinary_one_where_the_lora_is_not_in_the_prompt(webui: WebUI, trained: str) -> None:
    plain = "a photo of zzk"
    assert webui.post("/probe/parity", {"name": trained, "prompt": plain})["text_effect"] > 0.02
    found = webui.post("/probe/parity", {"name": "", "prompt": plain})
    assert found["text"] <= 1e-3 and found["text_effect"] == 0, found


def test_the_image_of_a_prompt_changes_with_the_file_and_at_weight_zero_by_the_word_alone(webui: WebUI, trained: str) -> None:
    without, zero = webui.sample("a photo of zzk"), webui.sample("a photo of zzk <lora:pivotal:0>")
    assert len({without, zero, webui.sample(f"a photo of zzk{TAG}")}) == 3
    assert webui.sample("a photo of a cat <lora:pivotal:0>") == webui.sample("a photo of a cat")
    assert webui.sample("a photo of zzk") == without


def test_the_two_encoders_vectors_of_sdxl_are_read(webui: WebUI) -> None:
    network: AdapterNetwork = small_network("sdxl", word("zzk", family="sdxl"))[1]
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, webui.loras / "xl.safetensors")
    widths = sum(len(vectors[0]) for vectors in network.embeddings[0].by_component.values())
    assert webui.get("/probe/lora?name=xl")["embeddings"] == {"zzk": [3, widths]}
    assert torch.equal(network.state_dict()["bundle_emb.zzk.clip_l"], network.embeddings[0].by_component["te1"].detach())
