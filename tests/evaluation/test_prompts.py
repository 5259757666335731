"""Sample prompts are read as kohya's scripts read them; what cannot be understood is told in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lora_train.adapters.stack import LoraTag
from lib_lora_train.errors import SettingError
from lib_lora_train.evaluation.prompts import SamplePrompt, bare_prompts, default_prompts, fitted, parse_prompts, read_prompts
from lib_lora_train.model.sampler import SampleRequest
from lib_lora_train.settings import flat, parse
from lib_lora_train.settings.allowed_paths import AllowedPaths, check_allowed
from lib_lora_train.settings.toml import read_toml, write_toml

DEFAULTS = SampleRequest("", width=512, height=512, steps=12, cfg_scale=7.0, seed=99)


def parsed(text: str) -> tuple[SamplePrompt, ...]:
    return parse_prompts(text, defaults=DEFAULTS)


def test_a_line_of_kohyas_is_a_request_and_what_it_leaves_out_is_the_defaults() -> None:
    # The second line is after the README of sd-scripts; the LoRA is as the WebUI writes it.
    text = """
        # prompt 1
        masterpiece, best quality, (1girl), in white shirts --n low quality, worst quality --w 768 --h 512 --d 1 --l 7.5 --s 28
        a <lora:style:0.5:0.25> cat -- or two, well--known

          red --S 5 --L 1
    """
    first, second, third = parsed(text)
    assert first == SamplePrompt("masterpiece, best quality, (1girl), in white shirts", SampleRequest(
        "masterpiece, best quality, (1girl), in white shirts", "low quality, worst quality", 768, 512, 28, 7.5, 1))
    assert second.text == "a <lora:style:0.5:0.25> cat -- or two, well--known"
    assert second.request == SampleRequest("a  cat -- or two, well--known", "", 512, 512, 12, 7.0, 99)
    assert second.loras == (LoraTag("style", 0.5, 0.25),)
    assert third.request == SampleRequest("red", "", 512, 512, 5, 1.0, 99)
    assert parsed("# nothing\n\n") == ()


@pytest.mark.parametrize(("line", "word"), [
    ("a --x 1", "--x"), ("a --ss ddim", "Euler"), ("a --w", "--w"), ("a --w 12.5", "--w"), ("a --h -1", "--h"),
    ("a --w 9999999999999999999", "--w"), ("a --l nan", "--l"), ("a --s 0", "--s"), ("a --d x", "--d"), ("a --w ²", "--w"),
    ("a <lora:b:x>", "<lora:b:x>")])
def test_what_cannot_be_understood_is_named_in_one_sentence(line: str, word: str) -> None:
    with pytest.raises(SettingError) as refusal:
        parsed(f"fine\n{line}")
    assert word in str(refusal.value) and "sample_prompts" in str(refusal.value) and "\n" not in str(refusal.value)


def test_sizes_become_those_of_the_model_which_is_said_once() -> None:
    prompts, notes = fitted(parsed("a --w 500 --h 70\nb --w 500 --h 70\nc --w 512"), multiple=64)
    assert [(p.request.width, p.request.height) for p in prompts] == [(512, 64), (512, 64), (512, 512)]
    assert len(notes) == 1 and "500×70" in notes[0] and "512×64" in notes[0]


def test_three_different_captions_with_the_trigger_word_are_the_default() -> None:
    captions = ["red", "red", "blue", "zzk, green", "white", "black"]
    prompts = default_prompts(captions, trigger_word="zzk", defaults=DEFAULTS)
    assert [(p.text, p.request.prompt, p.request.seed) for p in prompts] == [
        (text, text, 99) for text in ("zzk, red", "zzk, green", "zzk, black")]
    assert [p.text for p in default_prompts(["a"], trigger_word="", defaults=DEFAULTS)] == ["a"]
    assert default_prompts([], trigger_word="zzk", defaults=DEFAULTS) == ()
    few = default_prompts(["a", "b"], trigger_word="", defaults=DEFAULTS, others=["b", "c", "a", "d"])
    assert [p.text for p in few] == ["a", "b", "c"]


def test_prompts_may_lie_in_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("a\r\nb, größer".encode("utf-16"))
    (tmp_path / "torn.txt").write_bytes(b"\xff\xfe\x00\xd8a")
    assert [p.text for p in parsed(read_prompts(str(tmp_path / "prompts.txt")))] == ["a", "b, größer"]
    assert read_prompts("a photo.txt\nb") == "a photo.txt\nb"
    for name in ("none.txt", "prompts.toml", "torn.txt"):
        with pytest.raises(SettingError) as refusal:
            read_prompts(str(tmp_path / name))
        assert name in str(refusal.value)


def test_the_file_of_prompts_must_be_an_allowed_one_and_prompts_need_not(tmp_path: Path) -> None:
    allowed = AllowedPaths((tmp_path,), (tmp_path,), "")
    check_allowed(parse({"sample_prompts": "a cat\n/etc/passwd.txt"}), allowed)
    check_allowed(parse({"sample_prompts": f'"{tmp_path / "p.txt"}"'}), allowed)
    for path in ("/etc/hosts.txt", str(tmp_path / ".." / "p.txt"), "~/p.txt"):
        with pytest.raises(SettingError):
            check_allowed(parse({"sample_prompts": path}), allowed)


def test_lines_of_prompts_survive_the_settings_file(tmp_path: Path) -> None:
    values = flat(parse({"sample_prompts": 'a "cat" --n x\n# \\ \nb'}))
    (tmp_path / "settings.toml").write_text(write_toml(values), encoding="utf-8")
    assert read_toml(tmp_path / "settings.toml") == values


def test_prompts_that_are_sampled_alike_are_lines_without_comments_and_flags():
    assert bare_prompts(["  a \t cat ", "", "# no", "a -- b", "<lora:x:0.5> --5"]) == ("a cat", "a -- b", "<lora:x:0.5> --5")
    for flagged in ("a cat --w 512", "--n blurry"):
        with pytest.raises(SettingError):
            bare_prompts(["a dog", flagged])
