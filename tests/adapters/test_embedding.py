"""A word with vectors of its own is read as transformers reads a model that has them among its token embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from lib_lora_train.adapters import file
from lib_lora_train.adapters.embedding import WordEmbedding, WordVectors, split_embeddings
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.stack import WeightedLora, load_stack, merge_into, stacked
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.errors import LoraFileError
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.sd.text_encoder import TOKEN_EMBEDDING
from lib_lora_train.run.on_top import unused_words
from lib_lora_train.training.condition import TrainedText
from tests.model.small_checkpoints import COMMA, END, START, clip_config, randomised, relative_error
from tests.model.test_text_encoder import encoder_of, tokens
from tests.training import small_run
from tests.training.small_run import batch

WORD = "300 301"
"""Two tokens of the small tokenizer, of which numbers stand for themselves."""


def vectors(count: int, width: int = 48) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(5)) / 7


def word(name: str = WORD, count: int = 3, *, family: str = "sd1") -> WordEmbedding:
    widths = {one.config.component: one.config.width for one in small_run.model(family).text.encoders}
    return WordEmbedding(name, {component: vectors(count, width) for component, width in widths.items()})


def adapters(*words: WordEmbedding) -> dict[str, dict[str, WordVectors]]:
    return {component: {TOKEN_EMBEDDING: WordVectors(component, words)} for component in words[0].by_component}


def small_network(family: str, *embeddings: WordEmbedding) -> tuple[FrozenModel, AdapterNetwork]:
    model = small_run.model(family)
    targets = find_targets(model.components, family=model.architecture.family, text_encoder=False)[:2]
    network = AdapterNetwork.build(targets, rank=2, alpha=2, seed=0)
    network.embeddings = embeddings
    return model, network


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_pooled_vector_and_gradient_are_those_of_rows_in_transformers_embedding(checkpointing: bool) -> None:
    theirs = randomised(CLIPTextModelWithProjection(clip_config()))
    embedding = WordEmbedding("zzk", {"te": vectors(2)})
    ids, rows = tokens(), tokens()
    ids[0, 2:4], rows[0, 2:4] = torch.tensor([-1, -2]), torch.tensor([5, 6])  # 5 and 6 stand nowhere else
    ids[1, 30:32], rows[1, 30:32] = torch.tensor([-1, -2]), torch.tensor([5, 6])
    table = theirs.get_input_embeddings().weight
    with torch.no_grad():
        table[5:7] = embedding.by_component["te"]
    ours = encoder_of(theirs, "cond_stage_model.transformer.")
    before = {name: tensor.clone() for name, tensor in ours.tensors.items()}

    hidden, pooled = ours(ids, pooled=True, adapters=adapters(embedding)["te"], checkpointing=checkpointing)
    expected = theirs(rows)
    assert relative_error(hidden, expected.last_hidden_state) <= 1e-5
    assert relative_error(pooled, expected.text_embeds) <= 1e-5
    (hidden.pow(2).sum() + pooled.pow(3).sum()).backward()
    (expected.last_hidden_state.pow(2).sum() + expected.text_embeds.pow(3).sum()).backward()
    assert relative_error(embedding.by_component["te"].grad, table.grad[5:7]) <= 1e-4
    assert all(torch.equal(ours.tensors[name], old) for name, old in before.items())
    assert not any(tensor.requires_grad for tensor in ours.tensors.values())


@pytest.mark.parametrize("caption, expected", [
    ("a 300 301, red 300", [11, -1, -2, -3, COMMA, 13, 300]),
    ("300 301 300 301", [-1, -2, -3, -1, -2, -3]),
    ("300 302", [300, 302])])
def test_the_words_tokens_become_its_vectors_wherever_they_stand(caption: str, expected: list[int]) -> None:
    (chunk,), = small_run.model("sd1").text.tokenize(caption, adapters=adapters(word())).encoders
    assert [token for token in chunk if token not in (START, END)] == expected


def test_the_longest_word_counts_and_of_two_files_with_the_same_word_the_first() -> None:
    text = small_run.model("sd1").text
    (chunk,), = text.tokenize("300 301 300", adapters=adapters(word("300", 1), word())).encoders
    assert list(chunk[1:6]) == [-2, -3, -4, -1, END]
    (chunk,), = text.tokenize(WORD, adapters=stacked([adapters(word()), adapters(word(count=2))])).encoders
    assert list(chunk[1:5]) == [-1, -2, -3, END]


def test_vectors_that_do_not_fit_begin_the_next_chunk_and_a_near_comma_takes_its_tag_along() -> None:
    text = small_run.model("sd1").text

    def lengths(caption: str) -> list[int]:
        chunks, = text.tokenize(caption, adapters=adapters(word())).encoders
        return [sum(token not in (START, END) for token in chunk) for chunk in chunks]
    plain = " ".join(str(100 + n) for n in range(73))
    assert lengths(f"{plain} {WORD}") == [73, 3]  # as in the WebUI: at 73 of 75 no comma is looked back to
    assert lengths(f"{' '.join(map(str, range(100, 170)))}, 1 2 3 4 {WORD}") == [71, 7]
    assert lengths(f"{plain[:-8]} {WORD}") == [74]


def test_the_first_vectors_are_the_tokens_of_the_text_spread_over_them() -> None:
    """By the WebUI's `create_embedding`: vector i of n begins as token i·T // n of T."""
    text = small_run.model("sdxl").text
    embedding = WordEmbedding.initial(WORD, count=3, text="40 41", conditioner=text)
    for encoder in text.encoders:
        table = encoder.tensors[f"{TOKEN_EMBEDDING}.weight"]
        begun = embedding.by_component[encoder.config.component]
        assert torch.equal(begun, table[[40, 40, 41]]) and begun.data_ptr() != table.data_ptr()
    own = WordEmbedding.initial(WORD, count=2, text="", conditioner=text).by_component["te1"]
    assert torch.equal(own, text.encoders[0].tensors[f"{TOKEN_EMBEDDING}.weight"][[300, 301]])


@pytest.mark.parametrize("family, names", [("sd1", ["string_to_param.*"]), ("sdxl", ["clip_g", "clip_l"])])
def test_a_file_holds_the_vectors_under_the_webuis_names_and_gives_them_back(family: str, names: list[str], tmp_path: Path
                                                                             ) -> None:
    model, network = small_network(family, word(family=family))
    tensors = {key: tensor for key, tensor in network.state_dict().items() if key.startswith("bundle_emb.")}
    assert sorted(tensors) == [f"bundle_emb.{WORD}.{name}" for name in names]
    path = tmp_path / "zzk.safetensors"
    file.save(path, network.state_dict(), {}, dtype=torch.float32)
    again = AdapterNetwork.continued(network.targets, file.load(path).tensors, seed=0)
    assert again.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in again.state_dict().items())
    stack = load_stack(model, [WeightedLora(path, text_weight=0.0, unet_weight=0.0)])  # as in the WebUI, at any weight
    ids = model.text.ids([model.text.tokenize(WORD, adapters=stack)])
    assert all((one[0, 0, 1:4] == torch.tensor([-1, -2, -3])).all() for one in ids)
    assert file.inspect(path).components["unet"] == 2


def test_a_lora_that_is_trained_on_top_of_leaves_its_words_out_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "below.safetensors"
    file.save(path, small_network("sd1", word())[1].state_dict(), {}, dtype=torch.float32)
    model = small_run.built("sd1", small_run.tensors("sd1"))
    below = [WeightedLora(path)]
    merge_into(model, below)
    assert model.text.tokenize(WORD) == small_run.model("sd1").text.tokenize(WORD)
    assert len(unused_words(below)) == 1 and not unused_words([])


@pytest.mark.parametrize("key", ["bundle_emb.zzk.emb_params", "bundle_emb.zzk", "bundle_emb.zzk.clip_h"])
def test_an_embedding_of_another_form_is_refused(key: str) -> None:
    with pytest.raises(LoraFileError):
        split_embeddings({key: torch.zeros(1, 48)})


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_condition_is_the_ordinary_words_without_the_lora_and_with_it_the_vectors(family: str) -> None:
    model, network = small_network(family, word(family=family))
    own = {name: layers for name, layers in network.adapters().items() if name != "unet"}
    condition = TrainedText(model.text, clip_skip=1, adapters=own, checkpointing=False, dtype=torch.float32)
    images = batch(1, caption=f"a {WORD}")
    images = images.extended(condition.prepare(images.captions))
    plain = model.text.encode([model.text.tokenize(caption) for caption in images.captions])
    without = condition.encode(images, adapted=False)
    assert torch.equal(without.context, plain.context)
    for caption, reached in ((f"a {WORD}", True), ("a cat", False)):
        other = batch(1, caption=caption)
        other = other.extended(condition.prepare(other.captions))
        trained = condition.encode(other)
        assert torch.equal(trained.context, condition.encode(other, adapted=False).context) is not reached
        sums = [trained.context.square().sum(), *([] if trained.pooled is None else [trained.pooled.square().sum()])]
        grads = torch.autograd.grad(sum(sums), list(network.embeddings[0].parameters()))
        assert [bool(grad.any()) for grad in grads] == [reached] * len(model.text.encoders)
    network.set_multiplier(0.0)
    off = batch(1, caption=f"a {WORD}")
    off = off.extended(condition.prepare(off.captions))
    assert torch.equal(condition.encode(off).context, plain.context)


def test_a_word_at_multiplier_0_leaves_the_ordinary_embedding_bit_for_bit() -> None:
    model, embedding = small_run.model("sd1"), word()
    embedding.multiplier = 0.0
    tokens_of = model.text.tokenize(WORD, adapters=adapters(embedding))
    assert tokens_of == model.text.tokenize(WORD)
    assert torch.equal(model.text.encode([tokens_of], adapters=adapters(embedding)).context,
                       model.text.encode([tokens_of]).context)
