"""A host without a WebUI: the model comes from a checkpoint file.

The file is read once and kept, as the WebUI keeps its model: its header when somebody asks what it is, its weights at the
first lease. A `.yaml` of the same name beside it says what shapes cannot tell, as it does for the WebUI and for kohya's
scripts; it is read as often, and the tokenizers with the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file

from lib_lora_train.adapters.stack import find_lora, load_stack, split_tags
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import HostError, LoraTrainError, ModelError, SettingError, translated
from lib_lora_train.host import placement
from lib_lora_train.host.exposure import is_loopback
from lib_lora_train.host.lease import lease_for
from lib_lora_train.host.port import Checkpoint, Host, LeasedModel, Outline, RenderRequest, never
from lib_lora_train.model.family import Hints, detect
from lib_lora_train.model.sampler import to_image
from lib_lora_train.model.sd.hints_file import hints_from_yaml, tokenizers_from_yaml, with_words_of_file
from lib_lora_train.model.sd.tokens import Tokenizer
from lib_lora_train.settings import Settings
from lib_lora_train.settings.allowed_paths import AllowedPaths
from lib_lora_train.storage.content import read_header, refuse_wrong_content

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
           "I32": torch.int32, "U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

Result = TypeVar("Result")


class StandaloneHost(Host):
    """Leases the model of one `.safetensors` file. `checkpoint_file` None is a host with no model yet."""

    def __init__(self, checkpoint_file: Path | None, *, lora_folder: Path, runs_folder: Path,
                 device: torch.device | None = None, allowed: AllowedPaths | None = None) -> None:
        self.checkpoint_file, self.allowed = checkpoint_file, allowed
        self.lora_folder, self.runs_folder = lora_folder, runs_folder
        self.datasets_folder, self.taggers_folder = runs_folder.with_name("datasets"), lora_folder / "taggers"
        self.presets_folder = runs_folder.with_name("presets")
        self.models_folder = lora_folder  # there is no other
        self._device = placement.indexed(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._lock = threading.Lock()
        self._tensors: Mapping[str, torch.Tensor] | None = None
        self._tokenizers: Sequence[Tokenizer] | None = None
        self._description: tuple[Checkpoint, Outline] | None = None
        self._second: StandaloneHost | None = None

    def checkpoint(self) -> Checkpoint | None:
        """The file's name, family and old hash, read from its header; None where there is none or it is unusable."""
        try:
            return None if self.checkpoint_file is None else self._described(self.checkpoint_file)[0]
        except LoraTrainError:
            return None

    def outline(self) -> Outline | None:
        """What the file's header says; None where there is no usable file."""
        return None if self.checkpoint_file is None or self.checkpoint() is None else self._described(self.checkpoint_file)[1]

    @contextlib.contextmanager
    def lease(self, *, stop: ShouldStop = never) -> Iterator[LeasedModel]:
        """The file's tensors, read at the first time, onto the CPU. Each part stays where the last lease had it: nobody else
        uses the device."""
        if self.checkpoint_file is None:
            raise HostError("No model is loaded", remedy="name a checkpoint file (--checkpoint)")
        if not self._lock.acquire(blocking=False):
            raise HostError("The model is in use", remedy="wait for the other job to end")
        try:
            checkpoint, outline = self._described(self.checkpoint_file)
            if self._tensors is None:
                self._tokenizers = _beside(self.checkpoint_file, tokenizers_from_yaml)
                self._tensors = _load(self.checkpoint_file)
            yield LeasedModel(self._tensors, outline.hints, checkpoint, self._device, self._tokenizers)
        finally:
            self._lock.release()

    def select(self, title: str) -> str:
        """See `ModelSource`: another checkpoint of the same folder, by its file's name."""
        before, name = self.checkpoint(), title.partition(" [")[0]
        if before is not None and before.title == name:
            return name
        path = self.checkpoint_file.parent / name if self.checkpoint_file and name == Path(name).name else None
        if path is None or not path.is_file():
            raise HostError(f"The checkpoint {title} is not here", remedy="put it beside the one that --checkpoint names")
        with self._lock:
            try:
                description = describe_header(path, self._device)
            except ModelError as error:
                raise HostError(f"The checkpoint {title} cannot be used", why=error.reason) from error
            self.checkpoint_file, self._description, self._tensors, self._tokenizers = path, description, None, None
        return before.title if before else ""

    def idle(self) -> bool:
        """Whether the model is not leased."""
        return not self._lock.locked()

    def render(self, request: RenderRequest, *, stop: ShouldStop = never) -> list[Image.Image]:
        """By our own sampler; a LoRA in the prompt is a file of that name below `lora_folder`. Raises LoraFileError where there
        is none or it does not fit, as well. Another checkpoint is the path of its file; the last one is kept in memory."""
        if request.sampler != "Euler":
            raise HostError(f"There is no sampler {request.sampler!r} here", remedy="use Euler")
        if request.checkpoint:
            return self._second_host(Path(request.checkpoint)).render(dataclasses.replace(request, checkpoint=""), stop=stop)
        prompt, tags = split_tags(request.prompt)
        loras = [find_lora(tag, self.lora_folder) for tag in tags]
        with lease_for(self, "Rendering", settings=Settings(), should_stop=stop) as lease, translated("rendering"):
            adapters = load_stack(lease.model, loras)
            return [to_image(lease.model, lease.sample(
                dataclasses.replace(request, prompt=prompt, seed=request.seed + index), adapters=adapters))
                for index in range(request.count)]

    def _second_host(self, path: Path) -> StandaloneHost:
        if self.allowed is not None and not self.allowed.may_read(path):
            raise SettingError(f"The checkpoint {path} cannot be used", why="it is in no folder that is allowed")
        if self._second is None or self._second.checkpoint_file != path:
            self._second = StandaloneHost(path, lora_folder=self.lora_folder, runs_folder=self.runs_folder, device=self._device)
        return self._second

    def _described(self, path: Path) -> tuple[Checkpoint, Outline]:
        if self._description is None:
            self._description = describe_header(path, self._device)
        return self._description


def listening_allowed_paths(address: str, output: Path, *folders: Path) -> AllowedPaths | None:
    """What a page at `address` may touch: its output folder, and `folders` for reading; None where it is one's own.
    Raises SettingError for folders that mean nothing there."""
    if is_loopback(address):
        if folders:
            raise SettingError(f"--allow is of no use at {address}", why="a page there may read every folder",
                               remedy="leave it out, or have other machines reach the page with --listen")
        return None
    loras, others = output.resolve(), [folder.resolve() for folder in folders]
    return AllowedPaths((loras, *others), (loras,), "other folders are named with --allow when the page is started")


def describe_file(path: Path) -> Checkpoint:
    """What the header of a checkpoint file says; no weights are read. Raises ModelError."""
    return describe_header(path, placement.CPU)[0]


def describe_header(path: Path, device: torch.device) -> tuple[Checkpoint, Outline]:
    """What the header of a checkpoint file says, and its outline for training on `device`. Raises ModelError."""
    hints = with_words_of_file(_beside(path, hints_from_yaml) or Hints(), path)
    outline = Outline(read_shapes(path), hints, device)
    family = detect(outline.tensors, outline.hints).family.name
    return Checkpoint(path.stem, path.name, family, legacy_hash=_legacy_hash(path)), outline


def _beside(path: Path, read: Callable[[Path], Result]) -> Result | None:
    """What `read` makes of the `.yaml` of the checkpoint's name; None where there is none."""
    configuration = path.with_suffix(".yaml")
    return read(configuration) if os.path.lexists(configuration) else None


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(f"{path.name} is a pickled checkpoint", why="such a file can run any program when it is opened",
                         remedy="convert it to .safetensors, or load it in the WebUI and train there")
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"{path.name} is not a checkpoint", why="its name does not end in .safetensors",
                         remedy="choose a .safetensors file")
    with _readable(path), path.open("rb"):
        pass
    refuse_wrong_content(path, ModelError)


def read_shapes(path: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint file's header: names to tensors without data (device "meta"). Raises ModelError."""
    _check_suffix(path)
    with _readable(path), safetensors.safe_open(path, framework="pt"):  # which looks whether it is whole
        return {name: torch.empty(entry["shape"], dtype=_DTYPES.get(entry["dtype"], torch.uint8), device="meta")
                for name, entry in read_header(path).items()}


def _load(path: Path) -> Mapping[str, torch.Tensor]:
    with translated(f"loading {path.name}"), _readable(path):
        return load_file(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(f"The checkpoint {path} does not exist", remedy="check the path") from error
    except UnicodeEncodeError as error:
        raise ModelError(f"The checkpoint {path} cannot be read", why="its path is not text in UTF-8", remedy="rename the file "
                         "or its folder") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ModelError(f"The checkpoint {path.name} cannot be read", why=getattr(error, "strerror", None) or str(error),
                         remedy="check the path, or download it again") from error


def _legacy_hash(path: Path) -> str:
    """The WebUI's old hash: sha256 of 64 KiB at 1 MiB, 8 digits."""
    with _readable(path), open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
