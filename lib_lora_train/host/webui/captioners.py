"""The WebUI's own BLIP and DeepDanbooru, with which it interrogates images beside img2img's prompt. Some WebUIs have removed
them, and offer none.

Their weights are pickles: the WebUI opens them with its own code, as for those buttons. It also downloads them at
first use; here nothing is downloaded, and what is missing is said.

Each batch waits in the WebUI's queue, like any work on its models: generations go on in between. As in the WebUI,
the checkpoint's parts are moved off the GPU first where the WebUI does so, and each captioner at the end, unless
Settings, Interrogate keeps it on the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modules import call_queue, devices, images, paths, shared
from PIL import Image

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import HostError, translated
from lib_lora_train.host.port import never
from lib_lora_train.host.webui.model_access import ModelAccess
from lib_lora_train.host.webui.queue import QueueLock
from lib_lora_train.tagging.captioner import Captioner, CaptionerSource, Description, Tag
from lib_lora_train.tagging.options import TagOptions

_TOKENIZER = "bert-base-uncased"
_SIDE = 512
"""Of the images DeepDanbooru was trained on."""


def captioners(access: ModelAccess) -> Sequence[CaptionerSource]:
    """Those that the WebUI has code for, whether their files are there or not."""
    sources = {"interrogate": BlipSource(access), "deepbooru": DeepDanbooruSource(access)}
    return [source for name, source in sources.items() if _module(name) is not None]


def _module(name: str) -> Any:
    """The WebUI's module of that name, None where it has none."""
    try:
        return importlib.import_module(f"modules.{name}")
    except ImportError:
        return None


@dataclasses.dataclass(frozen=True)
class BlipSource:
    """BLIP writes a sentence. How long it is, is said in the WebUI's settings, Interrogate."""

    access: ModelAccess
    name, label, reads = "blip", "BLIP (a sentence)", "pixels"

    def missing(self) -> str:
        """Its weights, its code or its tokenizer."""
        if not _holds(folder := Path(paths.models_path) / "BLIP", ".pth"):
            return (f"BLIP is not there; put model_base_caption_capfilt_large.pth into {folder}, or press Interrogate CLIP in "
                    "img2img once, which fetches it.")
        if "BLIP" not in paths.paths:
            return "BLIP's code is not there; start the WebUI once without --skip-prepare-environment, which fetches it."
        if not tokenizer_is_there():
            return (f"BLIP's tokenizer {_TOKENIZER} is not there; press Interrogate CLIP in img2img once, which fetches it "
                    "from huggingface.co.")
        return ""

    @contextlib.contextmanager
    def open(self, options: TagOptions, device: torch.device, *, should_stop: ShouldStop | None = None) -> Iterator[Captioner]:
        """Where the WebUI wants it (--use-cpu interrogate), not on `device`."""
        _refuse(self.missing())
        interrogator, turn = shared.interrogator, functools.partial(_turn, self.access, should_stop)
        dtype, loaded = interrogator.dtype, interrogator.blip_model
        try:
            with turn():
                with translated("loading BLIP"):
                    _load_blip()
                # The interrogator's number format is that of its last model; alone, BLIP has to say its own.
                interrogator.dtype = next(interrogator.blip_model.parameters()).dtype
            yield _Queued(turn, _caption)
        finally:
            interrogator.dtype = dtype
            interrogator.unload()
            if hasattr(interrogator, "blip_patcher"):  # of the Forges, which know no BLIP without one
                interrogator.blip_model = loaded


@dataclasses.dataclass(frozen=True)
class DeepDanbooruSource:
    """DeepDanbooru finds tags. Thresholds and spelling are ours, not those of the WebUI's settings."""

    access: ModelAccess
    name, label, reads = "deepdanbooru", "DeepDanbooru (tags)", "pixels"

    def missing(self) -> str:
        """Its weights."""
        if _holds(folder := Path(paths.models_path) / "torch_deepdanbooru", ".pt"):
            return ""
        return (f"DeepDanbooru is not there; put model-resnet_custom_v3.pt into {folder}, or press Interrogate DeepBooru in "
                "img2img once, which fetches it.")

    @contextlib.contextmanager
    def open(self, options: TagOptions, device: torch.device, *, should_stop: ShouldStop | None = None) -> Iterator[Captioner]:
        """On the WebUI's device."""
        _refuse(self.missing())
        turn, deepbooru = functools.partial(_turn, self.access, should_stop), _module("deepbooru")
        try:
            with turn(), translated("loading DeepDanbooru"):
                deepbooru.model.start()
            yield _Queued(turn, lambda images: _tags(deepbooru.model, images, threshold=options.general_threshold))
        finally:
            if deepbooru.model.model is not None:
                deepbooru.model.stop()


@dataclasses.dataclass(frozen=True)
class _Queued:
    """A captioner that waits in the queue for each batch."""

    turn: Callable[[], contextlib.AbstractContextManager[None]]
    caption: Callable[[Sequence[Image.Image]], list[Description]]

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        with self.turn():
            return self.caption(images)


@contextlib.contextmanager
def _turn(access: ModelAccess, should_stop: ShouldStop | None) -> Iterator[None]:
    with QueueLock(call_queue.queue_lock).held(stop=should_stop or never):
        access.unload(access.current())
        yield


def _load_blip() -> None:
    """As `interrogate` loads it, without CLIP, which would rank styles that no caption needs."""
    interrogator = shared.interrogator
    if interrogator.blip_model is None:
        interrogator.blip_model = interrogator.load_blip_model()
        if devices.device_interrogate.type != "cpu" and not getattr(shared.cmd_opts, "no_half", False):
            interrogator.blip_model = interrogator.blip_model.half()
    interrogator.blip_model = interrogator.blip_model.to(devices.device_interrogate)


def _caption(images: Sequence[Image.Image]) -> list[Description]:
    # A press of Interrogate meanwhile has moved it to the CPU.
    shared.interrogator.blip_model.to(devices.device_interrogate)
    return [Description(text=shared.interrogator.generate_caption(image)) for image in images]


def _tags(danbooru: Any, decoded: Sequence[Image.Image], *, threshold: float) -> list[Description]:
    """Every tag from `threshold` on, and the ratings: what `tag_multi` computes, before it writes its text."""
    danbooru.start()  # a press of Interrogate meanwhile has moved it to the CPU
    # 2: fitted in, the rest filled from the image's own edges.
    squares = [np.asarray(images.resize_image(2, image, _SIDE, _SIDE), dtype=np.float32) / 255 for image in decoded]
    weight = next(danbooru.model.parameters())
    with torch.no_grad(), devices.autocast():
        scores = danbooru.model(torch.from_numpy(np.stack(squares)).to(weight.device, weight.dtype)).float().cpu().numpy()
    return [_description(danbooru.model.tags, row, threshold=threshold) for row in scores]


def _description(names: Sequence[str], scores: np.ndarray, *, threshold: float) -> Description:
    found = [Tag(name.removeprefix("rating:"), float(score), "rating") if name.startswith("rating:")
             else Tag(name, float(score)) for name, score in zip(names, scores, strict=True)
             if score >= threshold or name.startswith("rating:")]
    return Description(tuple(sorted(found, key=lambda tag: -tag.score)))


def _holds(folder: Path, suffix: str) -> bool:
    return any(path.is_file() for path in folder.rglob(f"*{suffix}"))


def tokenizer_is_there() -> bool:
    """Whether transformers finds it without the network: where it keeps what it fetched, or in a folder of that name."""
    from transformers.utils import cached_file

    try:
        return cached_file(_TOKENIZER, "vocab.txt", local_files_only=True) is not None
    except (OSError, ValueError):
        return False


def _refuse(sentence: str) -> None:
    if sentence:
        what, _, remedy = sentence.partition("; ")
        raise HostError(what, remedy=remedy)
