"""`python -m lib_lora_train demo`: a first LoRA in about two minutes, on a model made on the spot.

It goes the same road as every run: a checkpoint file, a folder of pictures, `run_job`, a LoRA file; then it paints with
and without that file, writes one picture that shows both, and serves the page.
The UNet has learnt nothing, so "before" is noise; the pictures are Twemoji faces (see LICENSE-pictures.txt).
"""

from __future__ import annotations

from pathlib import Path

import torch

from lib_lora_train import events
from lib_lora_train.demo import tiny_checkpoint
from lib_lora_train.demo.sheet import SheetRow, draw_sheet, paint_rows
from lib_lora_train.host.standalone import StandaloneHost, listening_fence
from lib_lora_train.runner import RUNNER
from lib_lora_train.settings import parse
from lib_lora_train.settings.field import Value

PICTURES = Path(__file__).parent / "pictures"
NAME = "demo"
# One epoch of many repeats: the model is random, so there is everything to learn and nothing to preserve.
SETTINGS: dict[str, Value] = {
    "output_name": NAME, "overwrite": True, "train_data_dir": str(PICTURES), "trigger_word": "twemoji",
    "resolution": "128", "max_train_steps": 500, "train_batch_size": 2, "network_dim": 32, "network_alpha": 32.0,
    "learning_rate": 3e-3, "min_snr_gamma": 0.0, "keep_tokens": 1}


def demo_host(folder: Path, *, address: str = "127.0.0.1") -> StandaloneHost:
    """The host of the demo's checkpoint, which is made in `folder` unless it is there; LoRAs go beside it."""
    checkpoint = folder / "model" / "tiny.safetensors"
    if not checkpoint.is_file():
        tiny_checkpoint.write(checkpoint.parent, size=tiny_checkpoint.DEMO)
    return StandaloneHost(checkpoint, lora_folder=folder / "loras", runs_folder=folder / "runs",
                          fence=listening_fence(address, folder / "loras", folder, PICTURES))


def run_demo(folder: Path, *, page: bool, port: int, address: str, auth: str = "") -> int:
    """Train, paint before and after into `folder`/before-after.png, and (with `page`) serve until stopped."""
    print("Making a small model that has learnt nothing ...", flush=True)
    # So small a model is quicker on one thread: its operations end sooner than threads can be told of them.
    torch.set_num_threads(1)
    host = demo_host(folder, address=address)
    print("Training a LoRA on 24 pictures ...", flush=True)
    RUNNER.start(parse(SETTINGS), host)
    shown = 0
    while not RUNNER.wait(timeout=2.0):
        step = getattr(RUNNER.status(), "step", None)
        if step is not None and step.step >= shown + 50:
            shown = step.step
            print(f"  step {step.step}/{step.total}   loss {step.average_loss:.3f}", flush=True)
    finished = RUNNER.status().finished
    assert isinstance(finished, events.Finished)
    print(finished.message, flush=True)
    if finished.outcome != "done":
        return 1
    print("Painting with and without it ...", flush=True)
    rows: list[SheetRow] = paint_rows(host, Path(finished.path), pictures=PICTURES)
    picture = folder / "before-after.png"
    draw_sheet(rows).save(picture)
    print(f"Before and after: {picture.resolve()}", flush=True)
    if page:
        from lib_lora_train.ui.standalone import serve
        print("Now the page, with this run on it (Ctrl+C ends):", flush=True)
        serve(host, port=port, address=address, auth=auth)
    return 0
