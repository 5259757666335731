"""An image as a PNG file that says how it was made, in the words of the WebUI, which reads them back."""

from __future__ import annotations

import io

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_lora_train.errors import printable
from lib_lora_train.model.sampler import SampleRequest


def png_of(image: Image.Image, request: SampleRequest, *, checkpoint: str, sampler: str = "Euler") -> bytes:
    """The file's bytes; `checkpoint` is the model's name."""
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    text = PngInfo()
    text.add_text("parameters", printable(
        f"{request.prompt}{negative}\nSteps: {request.steps}, Sampler: {sampler}, CFG scale: {request.cfg_scale:g}, "
        f"Seed: {request.seed}, Size: {request.width}x{request.height}, Model: {checkpoint}"))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=text)
    return file.getvalue()
