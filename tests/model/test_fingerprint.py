"""A sample of the weights tells models apart."""

from __future__ import annotations

import torch

from lib_lora_train.model.fingerprint import sampled_fingerprint


def test_a_sample_tells_names_shapes_formats_and_numbers_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.nn.Parameter(torch.randn(7, 9, generator=generator)), "b": torch.randn(5, generator=generator).half()}
    told = [tensors, {"a": tensors["a"], "c": tensors["b"]}, {**tensors, "a": tensors["a"].reshape(9, 7)},
            {**tensors, "b": tensors["b"].bfloat16()}, {**tensors, "a": tensors["a"] + 1}]
    assert len({sampled_fingerprint(one) for one in told}) == len(told)
