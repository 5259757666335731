"""Latents are told apart by what they were made with, and by nothing else."""

from __future__ import annotations

import torch

from lib_lora_train.inputs.fingerprint import encoder_fingerprint


def vae() -> dict[str, torch.Tensor]:
    return {"encoder.conv_in.weight": torch.ones(2, 3), "quant_conv.bias": torch.ones(2),
            "decoder.conv_in.weight": torch.ones(4), "post_quant_conv.bias": torch.ones(2)}


def test_another_encoder_is_another_vae_and_another_decoder_is_not():
    before = encoder_fingerprint(vae())
    painter = {"decoder.conv_in.weight": torch.zeros(4), "post_quant_conv.bias": torch.zeros(2)}
    assert encoder_fingerprint({**vae(), **painter}) == before
    assert encoder_fingerprint({**vae(), "encoder.conv_in.weight": torch.zeros(2, 3)}) != before
    assert encoder_fingerprint({**vae(), "quant_conv.bias": torch.zeros(2)}) != before
    assert encoder_fingerprint({**vae(), "encoder.conv_in.weight": torch.ones(2, 3).half()}) != before
