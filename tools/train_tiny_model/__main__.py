"""Train the model of the demo and of the benchmark: by default on from the checkpoint that is shipped.

    python tools/train_tiny_model --folder tiny-model --minutes 240

UNet and text encoder learn the same things in many styles (`tools/styles.py`), so that what is shown and how it is drawn are
two things to them; the autoencoder stays as it is. `--from-nothing` trains that too, and the rest from random weights.

The command can be ended and given again: it goes on where its last save (every few minutes) left it. The state, the packages
(from `npm pack`) and `gate.jsonl`, how the model takes styles that it was never shown, after each 20,000 samples, are kept in
the folder; at the end the checkpoint, its `.yaml`, the text encoder's configuration and a sheet of 64 prompts are written to
`--out`. Needs `pip install resvg-py` beside what the tests need. A newer torch than the WebUI's is half as fast again on a CPU.

Everything drawn is seeded; but the learning rate follows the clock, so another machine comes to other weights.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import autoencoder  # noqa: E402
import denoiser  # noqa: E402
import export  # noqa: E402
from gate import Gate, words_of  # noqa: E402
from graph import plain_attention  # noqa: E402
from sheet import write_sheet  # noqa: E402
from training_images import TrainingImages  # noqa: E402

from lib_lora_train.model.sd.vae import VAE  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCALE = 0.18215


def main() -> None:
    """Train, export, sample the sheet."""
    arguments = _arguments()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with plain_attention():
        start = _autoencoder_from_nothing(arguments) if arguments.from_nothing else arguments.start
        model = export.read(start)
        encode = functools.partial(autoencoder.scaled_latents, model.vae, scale=SCALE)
        packages = folder / "packages"
        gate = Gate(packages, encode, words=arguments.gate_words)
        images = TrainingImages(packages, encode, every_word=arguments.every_word, gate_words=words_of(arguments.gate_words))
        print(f"{len(images)} drawings", flush=True)
        weights = {part: {name: tensor.clone().to(arguments.device) for name, tensor in model.components[part].items()}
                   for part in ("unet", "te")}
        trained = denoiser.Denoiser(model, weights, device=torch.device(arguments.device), dtype=DTYPES[arguments.precision])
        denoiser.train(trained, images, gate, folder=folder, seconds=60 * arguments.minutes,
                       small=arguments.small, seed=arguments.seed)
    checkpoint = export.write(arguments.out or folder / "model", {**trained.average(), "vae": model.vae.tensors})
    print(f"{checkpoint}: {checkpoint.stat().st_size / 1e6:.1f} MB", flush=True)
    write_sheet(checkpoint, checkpoint.with_name("sheet.png"))


def _autoencoder_from_nothing(arguments: argparse.Namespace) -> Path:
    """A checkpoint in the folder whose autoencoder is trained and whose other weights are random; one that is there stays."""
    path = arguments.folder / "start.safetensors"
    if path.is_file():
        return path
    device, dtype = torch.device(arguments.device), DTYPES[arguments.precision]
    tensors = export.untrained(vocabulary=export.END + 1, seed=arguments.seed)
    model = export.build(tensors)
    images = autoencoder.bank(arguments.folder / "packages")
    vae = {name: tensor.clone() for name, tensor in model.vae.tensors.items()}
    autoencoder.fit_encoder(vae, images)
    autoencoder.prepare_decoder(vae)
    statistics = autoencoder.latent_statistics(VAE(vae, model.vae.config), images)
    vae = autoencoder.train_decoder(
        model.vae, {name: tensor.to(device) for name, tensor in vae.items()}, images,
        state_file=arguments.folder / "decoder.pt", minutes=arguments.decoder_minutes, seed=arguments.seed, device=device,
        dtype=dtype)
    made = autoencoder.normalised(vae, statistics, SCALE)
    save_file({**tensors, **{f"{export.PREFIXES['vae']}{name}": tensor.contiguous() for name, tensor in made.items()}}, path)
    return path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_tiny_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("tiny-model"), help="packages and training states")
    parser.add_argument("--start", type=Path, default=export.SHIPPED, help="the checkpoint to go on from (the shipped one)")
    parser.add_argument("--from-nothing", action="store_true", help="begin with random weights, the autoencoder first")
    parser.add_argument("--out", type=Path, help="where the checkpoint is written (FOLDER/model)")
    parser.add_argument("--minutes", type=float, default=80, help="of training UNet and text encoder, from now; 0 only writes "
                        "what is there")
    parser.add_argument("--small", type=float, default=0.5, help="share of the batches whose pictures have half the side "
                        "(0.5): three times as many a second")
    parser.add_argument("--every-word", action="store_true", help="all 785 words, not only those that the demo, the benchmark "
                        "and the gate ask for")
    parser.add_argument("--decoder-minutes", type=float, default=70)
    parser.add_argument("--gate-words", type=int, default=64, help="words that the gate is measured on, at most 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="of activations; weights are kept in fp32")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice by default)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
