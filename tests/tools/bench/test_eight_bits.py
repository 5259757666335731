"""`bench eight-bits`: how far two LoRAs are apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tools.bench.eight_bits import distance

KEY = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


def lora(path: Path, down: torch.Tensor, up: torch.Tensor, alpha: float) -> Path:
    save_file({f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up, f"{KEY}.alpha": torch.tensor(alpha)}, path)
    return path


def test_the_change_counts_and_not_how_it_is_factored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(2, 6), torch.randn(5, 2)
    one = lora(tmp_path / "one.safetensors", down, up, 2.0)
    same = lora(tmp_path / "same.safetensors", 4 * down, up / 2, 1.0)
    assert distance(one, same) == pytest.approx(0, abs=1e-6)
    assert distance(one, lora(tmp_path / "half.safetensors", down, up, 1.0)) == pytest.approx(0.5)
    assert distance(one, lora(tmp_path / "other.safetensors", down, -up, 2.0)) == pytest.approx(2.0)
