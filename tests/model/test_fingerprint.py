"""The weights tell models apart, all of them and a sample."""

from __future__ import annotations

import torch

from lib_lora_train.model.fingerprint import encoder_fingerprint, sampled_fingerprint, tensor_fingerprint


def test_a_sample_tells_names_shapes_formats_and_numbers_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.nn.Parameter(torch.randn(7, 9, generator=generator)), "b": torch.randn(5, generator=generator).half()}
    told = [tensors, {"a": tensors["a"], "c": tensors["b"]}, {**tensors, "a": tensors["a"].reshape(9, 7)},
            {**tensors, "b": tensors["b"].bfloat16()}, {**tensors, "a": tensors["a"] + 1}]
    assert len({sampled_fingerprint(one) for one in told}) == len(told)


def test_another_encoder_is_another_vae_and_another_decoder_is_not() -> None:
    vae = {"encoder.conv_in.weight": torch.ones(2, 3), "quant_conv.bias": torch.ones(2),
           "decoder.conv_in.weight": torch.ones(4), "post_quant_conv.bias": torch.ones(2)}
    before = encoder_fingerprint(vae)
    decoder = {"decoder.conv_in.weight": torch.zeros(4), "post_quant_conv.bias": torch.zeros(2)}
    assert encoder_fingerprint({**vae, **decoder}) == before
    assert encoder_fingerprint({**vae, "encoder.conv_in.weight": torch.zeros(2, 3)}) != before
    assert encoder_fingerprint({**vae, "quant_conv.bias": torch.zeros(2)}) != before


def test_a_fingerprint_tells_tensors_apart_by_name_shape_dtype_and_content() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    same = {"b": torch.tensor(1.0), "a": torch.arange(6.0)}
    assert tensor_fingerprint(base) == tensor_fingerprint(same)
    others = [
        {"a": torch.arange(6.0), "c": torch.tensor(1.0)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)},
        {"a": torch.arange(6.0).to(torch.bfloat16), "b": torch.tensor(1.0)},
        {"a": torch.arange(6.0), "b": torch.tensor(1.0000001)}, {"a": torch.arange(6.0)}]
    assert len({tensor_fingerprint(t) for t in [base, *others]}) == 6
