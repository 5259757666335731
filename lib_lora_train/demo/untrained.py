"""Weights for a small checkpoint that need no training and still let one see what a LoRA does.

**The VAE's latents are the picture**, eight times smaller.

The encoder averages blocks of 8×8 pixels, the decoder blows them up again with a smoothing kernel, so a picture comes
back blurred but recognisable. Three latent channels are red, green and blue, counted from white: white is 0, so the
zeros that convolutions put around a picture are white paper. The fourth channel is their mean.

How the layers that do something else are made to do nothing: residual blocks and attention add zero. The last group
norm and SiLU of each half are made linear: a signal s shares its norm group of four channels with −s and the constants
C and −C, which are much larger. Then the group's mean is 0 and its deviation C/√2 whatever the picture, and the norm's
weight and bias turn s into s + SHIFT, where SiLU is the identity to one part in ten thousand.

**The UNet says that everything is noise**: it predicts ε = x_t, plus a little of what its random layers make. That is what
a network says that knows nothing about pictures, and what a LoRA can improve on. x_t reaches the output through the
outermost skip connection as the pair x, −x in one norm group (so the norm keeps its mean), and SiLU(x) − SiLU(−x) = x.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

CONSTANT, SHIFT = 200.0, 12.0
# Latents of about zero mean and unit variance after Stable Diffusion's factor 0.18215, for drawings on white.
LATENT_GAIN, LATENT_CENTRE = 7.0, 0.6
LOG_VARIANCE = -8.0


def vae_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The VAE's tensors for these shapes (local names, 128 channels at every level)."""
    made = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in made.items():
        if name.endswith(".weight") and tensor.ndim == 1:
            tensor.fill_(1.0)  # norms inside residual blocks; what follows them is zero
    signals = [0, 4, 8]  # of 128 channels in 32 groups of four: the signal, its negative, and the two constants

    for side in ("encoder", "decoder"):
        made[f"{side}.norm_out.weight"][signals] = CONSTANT / 2 ** 0.5
        made[f"{side}.norm_out.bias"][signals] = SHIFT
        for channel in signals:
            made[f"{side}.conv_in.bias"][channel + 2], made[f"{side}.conv_in.bias"][channel + 3] = CONSTANT, -CONSTANT

    for color, channel in enumerate(signals):
        for sign, place in ((1.0, channel), (-1.0, channel + 1)):
            made["encoder.conv_in.weight"][place, color, 1, 1] = sign
            made["encoder.conv_in.bias"][place] = -sign  # white is 1 in the picture, 0 from here on
            made["decoder.conv_in.weight"][place, color, 1, 1] = sign / LATENT_GAIN
            made["decoder.conv_in.bias"][place] = -sign * LATENT_CENTRE
    for name, tensor in made.items():
        if name.endswith("downsample.conv.weight"):
            for channel in range(tensor.shape[0]):
                tensor[channel, channel, :2, :2] = 0.25
        elif name.endswith("upsample.conv.weight"):
            for channel in range(tensor.shape[0]):
                # The constants are kept as they are: smoothing would pull them to zero at the borders.
                tensor[channel, channel] = _SMOOTH if channel % 4 < 2 else _KEEP
    leave, bias = made["encoder.conv_out.weight"], made["encoder.conv_out.bias"]
    for color, channel in enumerate(signals):
        leave[color, channel, 1, 1] = LATENT_GAIN
        leave[3, channel, 1, 1] = LATENT_GAIN / 3
    bias[:4], bias[4:] = LATENT_GAIN * (LATENT_CENTRE - SHIFT), LOG_VARIANCE
    made["quant_conv.weight"][:, :, 0, 0] = torch.eye(8)
    made["post_quant_conv.weight"][:, :, 0, 0] = torch.eye(4)

    for color, channel in enumerate(signals):
        made["decoder.conv_out.weight"][color, channel, 1, 1] = 1.0
    made["decoder.conv_out.bias"][:] = 1.0 - SHIFT
    return made


_SMOOTH = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
_KEEP = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def let_through(unet: dict[str, torch.Tensor]) -> None:
    """Change a random UNet (local names, 64 channels at the outermost level), in place, into one that predicts x_t."""
    channels, pairs = 64, 8  # four latent channels, each as x and −x
    enter = unet["input_blocks.0.0.weight"]
    enter[:pairs], unet["input_blocks.0.0.bias"][:pairs] = 0.0, 0.0
    last = max(int(name.split(".")[1]) for name in unet if name.startswith("output_blocks."))
    resnet, transformer = f"output_blocks.{last}.0", f"output_blocks.{last}.1"
    skip = unet[f"{resnet}.skip_connection.weight"]
    # Nothing else is added to these channels on their way out.
    for name in (f"{resnet}.skip_connection", f"{resnet}.out_layers.3", f"{transformer}.proj_out"):
        unet[f"{name}.weight"][:pairs], unet[f"{name}.bias"][:pairs] = 0.0, 0.0
    for place in range(pairs):
        skip[place, skip.shape[1] - channels + place, 0, 0] = 1.0
    unet["out.0.weight"][:pairs], unet["out.0.bias"][:pairs] = 1.0, 0.0
    leave = unet["out.2.weight"]
    leave *= 0.03
    leave[:, :pairs], unet["out.2.bias"][:] = 0.0, 0.0
    for latent in range(4):
        for sign, place in ((1.0, 2 * latent), (-1.0, 2 * latent + 1)):
            enter[place, latent, 1, 1] = sign
            leave[latent, place, 1, 1] = sign
