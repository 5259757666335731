"""A save as it is given to others: the LoRA under a name of its own, sample images, and what to say of it.

Of the settings only those are told that say nothing of this machine (`run/shareable.py`); images are the run's own samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_lora_train.adapters import file
from lib_lora_train.adapters.metadata import renamed
from lib_lora_train.errors import OutputError, plain_line, printable, translated
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.results.history import read_history
from lib_lora_train.results.overview import image_of, overview
from lib_lora_train.results.promote import source_of
from lib_lora_train.results.recommend import recommend
from lib_lora_train.results.saves import lora_text
from lib_lora_train.results.shared_texts import description
from lib_lora_train.results.user_metadata import thumbnail
from lib_lora_train.run.output import checked_name
from lib_lora_train.run.record import read_settings
from lib_lora_train.run.shareable import shareable
from lib_lora_train.settings import Value

_MOST_IMAGES = 6


@dataclasses.dataclass(frozen=True)
class SharedLora:
    """A save of a run for others to use.

    name        the file's, without its ending
    source      where its weights are
    family      the name of one of `FAMILIES`, "" for none of them
    checkpoint  the name and the hash of the model it was trained on
    weight      the recommended one
    details       {what: how much} of the training; `settings` are those that differ from their defaults
    images      (PNG with what the WebUI reads back, prompt)
    """

    name: str
    source: Path
    trigger: str
    family: str
    checkpoint: str
    weight: float
    details: Mapping[str, object]
    settings: Mapping[str, Value]
    images: tuple[tuple[bytes, str], ...]

    @property
    def lora_text(self) -> str:
        """What to write in a prompt."""
        return lora_text(f"{self.name}.safetensors", round(self.weight, 2))

    @property
    def family_title(self) -> str:
        """As pages of models call it."""
        return {"sd1": "Stable Diffusion 1.5", "sd2": "Stable Diffusion 2.1", "sdxl": "SDXL 1.0"}.get(self.family, "unknown")

    @classmethod
    def of(cls, folder: Path, save_id: str, *, name: str = "", weight: float | None = None) -> SharedLora:
        """That save of the run in `folder`, called `name`, "" for the run's LoRA. Raises LoraFileError where it is not there,
        OutputError for a bad name."""
        source, settings, history = source_of(folder, save_id), read_settings(folder), read_history(folder)
        name = checked_name(name or str(settings.get("output_name", "")))
        metadata, planned, best = file.read_metadata(source), history.planned, recommend(folder)
        version, known = metadata.get("ss_base_model_version", ""), metadata.get("ss_new_sd_model_hash", "")[:10]
        model = planned.checkpoint if planned else metadata.get("ss_sd_model_name", "")
        details = {"steps": metadata.get("ss_steps"), "epochs": metadata.get("ss_epoch"),
                 "images": planned.pictures if planned else None, "resolution": planned.resolution if planned else None,
                 "rank / alpha": f"{metadata.get('ss_network_dim')} / {metadata.get('ss_network_alpha')}"}
        if weight is None:
            weight = best.weight if best and best.save == save_id else 1.0
        return cls(
            name, source, str(settings.get("trigger_word", "")),
            next((one.name for one in FAMILIES.values() if version.startswith(one.metadata.base_version)), ""),
            plain_line(f"{Path(model).name} [{known}]" if known else Path(model).name), weight,
            {what: value for what, value in details.items() if value}, shareable(settings, changed=True),
            tuple(_images(folder, save_id, name)))

    def write(self, folder: Path) -> None:
        """Write the LoRA and its images, NAME-1.png and so on, into an existing folder. Raises OutputError, LoraFileError."""
        read = file.load(self.source)
        small = b""
        for number, (data, _) in enumerate(self.images, 1):
            (folder / f"{self.name}-{number}.png").write_bytes(data)
            if not small:
                with Image.open(io.BytesIO(data)) as image:
                    small = thumbnail(image.convert("RGB"))
        file.save(folder / f"{self.name}.safetensors", read.tensors,
                  renamed(read.metadata, self.name, trigger_word=self.trigger, thumbnail=small),
                  dtype=next(iter(read.tensors.values())).dtype)


def _images(folder: Path, save_id: str, name: str) -> Iterator[tuple[bytes, str]]:
    """The samples of a save, else the grid's images of it, one for each prompt, with the LoRA called `name`."""
    data = overview(folder)
    step = next((save["step"] for save in data["saves"] if save["id"] == save_id), None)
    found = [(shown["file"], sample["prompt"]) for sample in data["samples"] for shown in sample["pictures"]
             if shown["step"] == step]
    grid = data["grid"]
    if not found and grid:
        cells = {cell["prompt"]: cell["file"] for cell in reversed(grid["cells"]) if cell["done"]
                 and grid["columns"][cell["column"]]["save"] == save_id and not grid["columns"][cell["column"]]["part"]}
        found = [(path, grid["prompts"][prompt]["text"]) for prompt, path in sorted(cells.items())]
    for entry, prompt in found[:_MOST_IMAGES]:
        path = image_of(folder, entry)
        with contextlib.suppress(OSError, ValueError, SyntaxError):
            if path is not None:
                yield _renamed_image(path, save_id, name), prompt


def _renamed_image(path: Path, save_id: str, name: str) -> bytes:
    """The image as PNG, whose words name the LoRA as it is called now."""
    with Image.open(path) as image:
        written, text, target = str(image.info.get("parameters", "")), PngInfo(), io.BytesIO()
        for old in {save_id, _name_in(written)} - {""}:
            written = written.replace(f"<lora:{old}:", f"<lora:{name}:")
        text.add_text("parameters", printable(written))
        image.convert("RGB").save(target, "PNG", pnginfo=text)
    return target.getvalue()


def _name_in(parameters: str) -> str:
    """The name of the last LoRA in an image's words, which is the one in training; "" for none."""
    return parameters.partition("\n")[0].rpartition("<lora:")[2].partition(":")[0] if "<lora:" in parameters else ""


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to be filled, which is called `target` when the block ends without an error. Raises OutputError where there is
    one already, and where the disk refuses; nothing is left then."""
    if os.path.lexists(target):
        raise OutputError(f"There is already something called {target.name}", why=f"{target} exists",
                          remedy="choose another name, or move it away")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with translated(f"writing {target.name}"):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def export_for_civitai(shared: SharedLora, target: Path) -> Path:
    """Write a folder to upload to Civitai: the LoRA, images with their generation data, and description.txt. Raises OutputError
    also where the folder exists."""
    with new_folder(target) as folder:
        shared.write(folder)
        (folder / "description.txt").write_text(description(shared), encoding="utf-8", newline="\n")
    return target
