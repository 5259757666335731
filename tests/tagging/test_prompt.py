"""A prompt as words: what only the program understands is gone, what the image shows is not."""

from __future__ import annotations

import pytest

from lib_lora_train.tagging.plain import plain_words, positive_prompt


@pytest.mark.parametrize(("parameters", "prompt"), [
    ("a cat\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a", "a cat"),
    ("a cat, on a mat\nin the sun\nSteps: 20, Sampler: Euler a, CFG scale: 7", "a cat, on a mat\nin the sun"),
    ("a cat", "a cat"),
    ("Negative prompt: blurry\nSteps: 20, Sampler: Euler", ""),
    ("Steps: 20, Sampler: Euler", ""),
    ("", ""),
    ("a cat\nNegative prompt: bad,\nSteps to avoid\nSteps: 20, Seed: 1", "a cat"),
    ("Steps: a staircase\nSteps: 20, Seed: 1", "Steps: a staircase"),
])
def test_the_prompt_ends_where_the_negative_one_or_the_parameters_begin(parameters: str, prompt: str):
    assert positive_prompt(parameters) == prompt


@pytest.mark.parametrize(("prompt", "words"), [
    ("a cat, (blue eyes:1.2)", "a cat, blue eyes"),
    ("((a cat)), [blurry]", "a cat, blurry"),
    ("a cat <lora:fluff:0.8>, <lyco:x>, <hypernet:y:1>sun", "a cat, sun"),
    ("a <3 heart>", "a <3 heart>"),
    (r"saber \(fate\), a\\b, \[x\]", r"saber (fate), a\b, [x]"),
    ("[cat:dog:0.5] on a mat", "dog on a mat"),
    ("[cat::0.5] on a mat", "cat on a mat"),
    ("[:dog:0.5]", "dog"),
    ("[dog:10] on a mat", "dog on a mat"),
    ("[red|blue] hat", "red, blue hat"),
    ("[[a|b]:(c:1.1):0.3] x", "c x"),
    ("a cat BREAK a dog", "a cat, a dog"),
    ("a cat :1.2 AND a dog :0.8", "a cat, a dog"),
    ("BRAND new, Andy", "BRAND new, Andy"),
    ("a cat,\n\n,, a dog\n  sun  ", "a cat, a dog, sun"),
    ("ratio 16:9, at 10:30", "ratio 16:9, at 10:30"),
    ("(unclosed:1.3, [open", "unclosed:1.3, open"),
    ("<lora:x:1>", ""),
])
def test_only_words_stay(prompt: str, words: str):
    assert plain_words(prompt) == words
