"""SmilingWolf's WD v3 taggers, from a folder with their three files as they are on huggingface.co.

    model.safetensors   timm's weights
    config.json         timm's architecture, its arguments, and the size and range of images it wants
    selected_tags.csv   tag_id, name, category, count: one line for each of the model's outputs, in their order

Weights in any other format are not opened: pickles can run programs. timm comes with open_clip, which the WebUI has.

Preprocessing as published with the models: on white to a square, bicubic to the model's size, channels from blue to red,
from -1 to 1; the sigmoid of each output is how sure the model is.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lib_lora_train.dataset.images import MAX_PIXELS
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import ModelError, translated
from lib_lora_train.tagging.captioner import Category, Description, Tag
from lib_lora_train.tagging.options import TagOptions

FILES = ("model.safetensors", "config.json", "selected_tags.csv")
AUTHOR = "SmilingWolf"
PUBLISHED = ("wd-vit-tagger-v3", "wd-swinv2-tagger-v3", "wd-convnext-tagger-v3", "wd-vit-large-tagger-v3",
             "wd-eva02-large-tagger-v3")
_CATEGORIES: dict[str, Category] = {"4": "character", "9": "rating"}
"""Danbooru's numbers of the kinds of tags; the others are said about the image in general."""
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR,
               "lanczos": Image.Resampling.LANCZOS}
_LONGEST_SIDE = 4096
_MOST_JSON = 1 << 20


@dataclasses.dataclass(frozen=True)
class Config:
    """What config.json says. `size` is (width, height)."""

    architecture: str
    arguments: dict[str, Any]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: Image.Resampling


@dataclasses.dataclass(frozen=True)
class WDSource:
    """One tagger: in `folder`, or, if it is a published one, where the Hugging Face libraries keep what they fetched."""

    folder: Path
    reads: Literal["pixels"] = "pixels"

    @property
    def name(self) -> str:
        """ "wd:" and the folder's name."""
        return f"wd:{self.folder.name}"

    @property
    def label(self) -> str:
        """The folder's name, which is the model's."""
        return f"WD tagger ({self.folder.name})"

    def missing(self) -> str:
        """What is not there, and where it belongs. Reads the disk only."""
        if importlib.util.find_spec("timm") is None:
            return "The WD taggers need the Python package timm, which is not installed; install it with: pip install timm."
        if self._where() is not None:
            return ""
        absent = [name for name in FILES if not (self.folder / name).is_file()]
        files = f"{', '.join(absent[:-1])} and {absent[-1]}" if len(absent) > 1 else absent[0]
        origin = f" from huggingface.co/{AUTHOR}/{self.folder.name}" if self.folder.name in PUBLISHED else ""
        fetch = ", or switch Download on" if origin else ""
        return f"The tagger {self.folder.name} is not there; put {files}{origin} into {self.folder}{fetch}."

    @contextlib.contextmanager
    def open(self, options: TagOptions, device: torch.device, *,
             should_stop: ShouldStop | None = None) -> Iterator[WDTagger]:
        """Load the model, and free its memory at the end. Fetched first where it is not there and `options.download`."""
        folder = self._where()
        if folder is None and options.download and self.folder.name in PUBLISHED:
            folder = _fetched(self.folder.name)
        sentence = self.missing()
        if folder is None or sentence:
            what, _, remedy = sentence.partition("; ")
            raise ModelError(what, remedy=remedy)
        tagger = load(folder, options=options, device=device)
        try:
            yield tagger
        finally:
            tagger.close()
            del tagger
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()

    def _where(self) -> Path | None:
        """The folder that holds all three files."""
        if all((self.folder / name).is_file() for name in FILES):
            return self.folder
        return _cached(self.folder.name) if self.folder.name in PUBLISHED else None


class WDTagger:
    """A loaded tagger: looks at several images in one pass."""

    def __init__(self, model: nn.Module, config: Config, tags: Sequence[tuple[str, Category]], *, options: TagOptions,
                 device: torch.device) -> None:
        self._model: nn.Module | None = model
        self._config, self._tags, self._device = config, tags, device
        floors = {"general": options.general_threshold, "character": options.character_threshold, "rating": 0.0}
        self._floors = np.array([floors[category] for _, category in tags])

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        """The tags that reach their threshold, and all ratings, the surest first."""
        return [self._description(row) for row in self.scores(images)]

    def scores(self, images: Sequence[Image.Image]) -> np.ndarray:
        """How sure the model is of every tag, 0…1: (images, tags), in the order of selected_tags.csv."""
        assert self._model is not None, "the tagger is closed"
        batch = torch.from_numpy(np.stack([prepared(image, self._config) for image in images]))
        with torch.no_grad():
            # The one synchronisation of a batch: its scores come back.
            return self._model(batch.to(self._device)).float().sigmoid().cpu().numpy()

    def close(self) -> None:
        """Release the weights."""
        self._model = None

    def _description(self, scores: np.ndarray) -> Description:
        if not np.isfinite(scores).all():
            raise ModelError("The tagger's answer is not a number", remedy="its files may be damaged: fetch them again")
        found = np.flatnonzero(scores >= self._floors)
        order = found[np.argsort(-scores[found], kind="stable")]
        return Description(tuple(Tag(self._tags[i][0], float(scores[i]), self._tags[i][1]) for i in order))


def load(folder: Path, *, options: TagOptions, device: torch.device) -> WDTagger:
    """The tagger in `folder`, ready on `device`. Raises ModelError naming the file that cannot be used."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the second: a torchvision that was made for another torch
        raise ModelError("The Python package timm, which the WD taggers need, does not work here", why=str(error),
                         remedy="install it again with: pip install timm torchvision") from error
    config, tags = read_config(folder / "config.json"), read_tags(folder / "selected_tags.csv")
    if not timm.is_model(config.architecture):
        raise ModelError(f"{folder / 'config.json'} names the architecture {config.architecture}",
                         why=f"timm {timm.__version__} does not know it", remedy="update timm")
    with translated(f"loading the tagger {folder.name}"):
        model = _built(config, outputs=len(tags), path=folder / "config.json")
        _fill(model, folder / "model.safetensors")
        return WDTagger(model.eval().requires_grad_(False).to(device), config, tags, options=options, device=device)


def read_config(path: Path) -> Config:
    """What config.json says about the model. Raises ModelError."""
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_MOST_JSON).decode("utf-8-sig"))
        # timm's older layout has everything on one level (timm/models/_hub.py).
        images = data.get("pretrained_cfg", data)
        channels, height, width = (int(number) for number in images["input_size"])
        mean, std = (tuple(float(n) for n in images.get(key) or (0.5, 0.5, 0.5)) for key in ("mean", "std"))
        config = Config(str(data["architecture"]), dict(data.get("model_args") or {}), (width, height), mean, std,
                        _RESAMPLING[images.get("interpolation") or "bicubic"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is no description of a tagger", why=f"{type(error).__name__}: {error}",
                         remedy="fetch it again") from error
    if channels != 3 or len(mean) != 3 or len(std) != 3 or not all(std) or not all(1 <= side <= 2048 for side in config.size):
        raise ModelError(f"{path} is no description of a tagger", why="pictures of that kind cannot be made")
    return config


def read_tags(path: Path) -> list[tuple[str, Category]]:
    """Name and category of every output, in order. Raises ModelError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(row["name"], _CATEGORIES.get(row["category"].strip(), "general")) for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise ModelError(f"{path} is no list of tags", why=f"{type(error).__name__}: {error}",
                         remedy="fetch it again") from error
    if not rows:
        raise ModelError(f"{path} is no list of tags", why="it is empty", remedy="fetch it again")
    return rows


def prepared(image: Image.Image, config: Config) -> np.ndarray:
    """One image as the model wants it: float32 (3, height, width), blue first."""
    side = max(image.size)
    if side * side > MAX_PIXELS:
        # Laid on a square, a long strip would fill the memory.
        image = image.copy()
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), config.resampling)
        side = max(image.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    values = np.asarray(square.resize(config.size, config.resampling), dtype=np.float32) / 255
    normal = (values - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    return np.ascontiguousarray(normal[:, :, ::-1].transpose(2, 0, 1))


def _built(config: Config, *, outputs: int, path: Path) -> nn.Module:
    """The architecture with random weights. Nothing in the configuration can make timm open or fetch another file: it is
    the entry point that is called, which loads only where it is told to be pretrained."""
    import timm.models

    foreign = [name for name, value in config.arguments.items() if name.startswith(("pretrained", "checkpoint")) or (
        not isinstance(value, (bool, int, float, str, list, type(None))))]
    if foreign:
        raise ModelError(f"{path} asks for {foreign[0]}", why="that is no part of an architecture")
    arguments = {name: value for name, value in config.arguments.items() if value is not None} | {"num_classes": outputs}
    try:
        return timm.models.model_entrypoint(config.architecture)(pretrained=False, **arguments)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise ModelError(f"The tagger's architecture {config.architecture} cannot be made from {path}",
                         why=f"{type(error).__name__}: {error}", remedy="update timm") from error


def _fill(model: nn.Module, path: Path) -> None:
    own = model.state_dict()
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"The tagger's weights {path} cannot be read", why=str(error), remedy="fetch them again") from error
    for name, tensor in own.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise ModelError(f"The tagger's weights {path} do not fit its config.json and selected_tags.csv",
                             why=f"{name} {'has another shape' if name in tensors else 'is missing'}",
                             remedy="take all three files from the same place")
    # Surplus names are buffers that older versions of timm kept, which are computed now (attn_mask and the like).
    model.load_state_dict({name: tensors[name] for name in own})


def _cached(model: str) -> Path | None:
    """Where the Hugging Face libraries keep a published tagger, if it was fetched before."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(f"{AUTHOR}/{model}", name) for name in FILES]
    return Path(found[0]).parent if all(isinstance(path, str) for path in found) else None


def _fetched(model: str) -> Path:
    """Fetch a published tagger's three files, to where the Hugging Face libraries keep such. Raises ModelError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HfHubHTTPError

    try:
        # The large one last: an obstacle shows at once.
        paths = [Path(hf_hub_download(f"{AUTHOR}/{model}", name)) for name in reversed(FILES)]
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"The tagger {model} could not be fetched from huggingface.co", why=lines[0],
                         remedy=f"check the connection, or put {', '.join(FILES)} into a folder {model} by hand") from error
    return paths[-1].parent
