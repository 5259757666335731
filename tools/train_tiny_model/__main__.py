"""Train the model of the demo and of the benchmark from nothing: autoencoder, text encoder and UNet.

    python tools/train_tiny_model --folder tiny-model --decoder-minutes 70 --denoiser-minutes 80

One command, in a folder of its own, that can be ended and given again: both parts go on where their last save (every few
minutes) left them, and longer times than before go on from what is there. They do not need each other: on a machine with two
cores `--part decoder --threads 1` and `--part denoiser --threads 1` may run side by side, then `--part export`.
Images and words come with `npm pack`. At the end the checkpoint, its `.yaml` and the text encoder's configuration are
written to the folder that the demo reads, and a sheet of 64 prompts is generated. Everything drawn is seeded; but the learning
rate follows the clock, so another machine comes to other weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import autoencoder  # noqa: E402
import denoiser  # noqa: E402
import export  # noqa: E402
from graph import plain_attention  # noqa: E402
from images import gather  # noqa: E402
from sheet import write_sheet  # noqa: E402

from lib_lora_train.model import frozen  # noqa: E402
from lib_lora_train.model.architecture import Hints  # noqa: E402
from lib_lora_train.model.sd.vae import VAE  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Train, export, sample the sheet."""
    arguments = _arguments()
    folder, device, dtype = arguments.folder, torch.device(arguments.device), DTYPES[arguments.precision]
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    packages = folder / "packages"
    # The autoencoder learns from all of them; the UNet has enough to do with fewer.
    images, chosen = autoencoder.bank(gather(packages), packages), gather(packages, at_most=arguments.at_most)
    model = frozen.build(export.untrained(vocabulary=export.END + 1, seed=arguments.seed),
                         hints=Hints(unet_heads=export.SIZE.heads, text_heads=(export.SIZE.text_heads,)))
    vae = {name: tensor.clone() for name, tensor in model.vae.tensors.items()}
    autoencoder.fit_encoder(vae, images)
    autoencoder.prepare_decoder(vae)
    encoder = VAE(vae, model.vae.config)
    statistics = autoencoder.latent_statistics(encoder, images)
    weights = {part: {name: tensor.clone().to(device) for name, tensor in model.components[part].items()}
               for part in ("unet", "te")}

    def minutes(part: str, given: float) -> float:
        return given if arguments.part in (part, "all") else 0.0  # without time nothing is trained, only read

    with plain_attention():
        vae = autoencoder.train_decoder(
            model.vae, {name: tensor.to(device) for name, tensor in vae.items()}, images, state_file=folder / "decoder.pt",
            minutes=minutes("decoder", arguments.decoder_minutes), seed=arguments.seed, device=device, dtype=dtype)
        if arguments.part == "decoder":
            return
        material = denoiser.prepare(chosen, packages, lambda pixels: (
            autoencoder.encoded(encoder, pixels) - statistics.mean) / statistics.deviation)
        weights = denoiser.train(model, weights, material, state_file=folder / "denoiser.pt",
                                minutes=minutes("denoiser", arguments.denoiser_minutes), seed=arguments.seed, device=device,
                                dtype=dtype)
        if arguments.part == "denoiser":
            return
    checkpoint = export.write(arguments.out, vae=vae, statistics=statistics, weights=weights)
    print(f"{checkpoint}: {checkpoint.stat().st_size / 1e6:.1f} MB", flush=True)
    write_sheet(checkpoint, checkpoint.with_name("sheet.png"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_tiny_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("tiny-model"), help="packages and training states")
    parser.add_argument("--out", type=Path, default=export.TARGET, help="where the checkpoint is written")
    parser.add_argument("--part", choices=("all", "decoder", "denoiser", "export"), default="all")
    parser.add_argument("--decoder-minutes", type=float, default=70)
    parser.add_argument("--denoiser-minutes", type=float, default=80)
    parser.add_argument("--at-most", type=int, default=2, help="emoji of a subcategory that the UNet learns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="of activations; weights are kept in fp32")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice by default)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
