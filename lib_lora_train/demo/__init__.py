"""`python -m lib_lora_train demo`: a first LoRA in a minute or two, on a small model that comes with the extension.

It goes the same road as every run: a checkpoint file, a folder of images, `run_job`, a LoRA file; then it paints with
and without that file, writes one image that shows both, and serves the page.
The model paints emoji as Google draws them; the LoRA learns from 24 images, two of which are held out to measure on, to make
stickers of them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lib_lora_train import events, terminal
from lib_lora_train.api import service
from lib_lora_train.demo import embedded
from lib_lora_train.demo.sheet import draw_sheet, sample_rows
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run.runner import RUNNER
from lib_lora_train.settings.field import Value
from lib_lora_train.studio.operations import SAMPLES

STYLE, SUBJECT = SAMPLES["style"], SAMPLES["subject"]
NAME = "sticker-style"
# No trigger word: a style is wanted in every image.
SETTINGS: dict[str, Value] = {
    "output_name": NAME, "overwrite": True, "train_data_dir": str(STYLE), "resolution": "128",
    "max_train_steps": 200, "train_batch_size": 4, "network_dim": 16, "network_alpha": 16.0, "learning_rate": 1e-3}


def demo_host(folder: Path) -> StandaloneHost:
    """The host of the embedded checkpoint; LoRAs and runs go into `folder`."""
    return StandaloneHost(embedded.CHECKPOINT, lora_folder=folder / "loras", runs_folder=folder / "runs")


def run_demo(folder: Path, *, page: bool, port: int, address: str, auth: str = "") -> int:
    """Train, paint before and after into `folder`/before-after.png, and (with `page`) serve until stopped."""
    if page:
        from lib_lora_train.ui.standalone import listen, serve
        listen(address, port).close()  # a port that is taken is told before the minutes of training
    # So small a model is quicker on one thread: its operations end sooner than threads can be told of them.
    torch.set_num_threads(1)
    host = demo_host(folder)
    print("Training a LoRA on 24 pictures, two of them held out to measure on ...", flush=True)
    service.start(SETTINGS, runner=RUNNER, host=host)
    shown = 0
    terminal.raise_on_interrupt()
    try:
        while not RUNNER.wait(timeout=2.0):
            step = getattr(RUNNER.status(), "step", None)
            if step is not None and step.step >= shown + 50:
                shown = step.step
                print(f"  step {step.step}/{step.total}   loss {step.average_loss:.3f}", flush=True)
    except KeyboardInterrupt:
        RUNNER.finish()
    finished = RUNNER.status().finished
    assert isinstance(finished, events.Finished)
    print(finished.message, flush=True)
    if finished.outcome != "done":
        return terminal.INTERRUPTED if finished.outcome == "stopped" else 1
    print("Painting words that it never saw, with and without it ...", flush=True)
    image = folder / "before-after.png"
    draw_sheet(sample_rows(host, Path(finished.path), dataset=STYLE)).save(image)
    print(f"Before and after: {image.resolve()}", flush=True)
    if page:
        print("Now the page, with this run on it (Ctrl+C ends):", flush=True)
        serve(host, port=port, address=address, auth=auth)
    return 0
