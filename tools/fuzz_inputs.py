"""What `fuzz_readers` and `fuzz_studio` are fed with: sound files and texts of each kind, and ways to damage them.

The same random.Random makes the same input, so that one of them can be made again.
"""

from __future__ import annotations

import io
import json
import math
import random
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from lib_lora_train.settings import Settings, flat
from lib_lora_train.training import checkpoint
from tools import tiny_checkpoint

ODD = ("", "\0", "\ud800", "\u202e", "NUL", "../" * 9, "<img src=x onerror=alert(1)>", "a" * 5000, "💥" * 99, "\r\n", "%s%n",
        "{0}", "nan", "1e999", "-0", "9" * 400, "true", "\\\\?\\C:\\", "file:///etc/passwd", " ", ",", ",," * 500)
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -2**63, 10**400, 0.5, 1e308, float("nan"),
            float("inf"))


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of the seeds, damaged in one to eight ways; sometimes bytes from nowhere."""
    if rng.random() < 0.08:
        return rng.randbytes(rng.choice((0, 1, 7, 8, 9, 64, 500, 4000)))
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            break
        position = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(len(data), 64))
        end = min(len(data), position + rng.choice((1, 2, 4, 8, 40, 400)))
        action = rng.randrange(8)
        if action == 0:
            data[position] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[position:end] = rng.randbytes(end - position)
        elif action == 2:
            del data[position:end]
        elif action == 3:
            data[position:position] = rng.randbytes(end - position)
        elif action == 4:
            del data[position:]
        elif action == 5:
            data[position:end] = data[position:end] * rng.choice((2, 3, 50))
        elif action == 6:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice((0, 1, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            data[position:position + width] = (number % 256 ** width).to_bytes(width, order)
        else:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) or 1)
            data[position:position] = other[start:start + end - position]
    return bytes(data[:1 << 20])


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A value as JSON could hold it."""
    kind = rng.randrange(9)
    if kind == 0 and depth < 4:
        names = (*ODD, "data_offsets", "shape", "dtype")
        return {rng.choice(names): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 1 and depth < 4:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind == 2:
        return rng.choice((None, True, False))
    return rng.choice(_NUMBERS) if kind < 6 else rng.choice(ODD)


def text(rng: random.Random, seeds: list[str]) -> str:
    """A name or a line of text with odd letters in it."""
    parts = [rng.choice((*seeds, *ODD, chr(rng.randrange(0x110000)), chr(rng.randrange(128)), ".", "/", "\\", "-", ":"))
             for _ in range(rng.randrange(1, 5))]
    return "".join(parts)


def json_text(rng: random.Random, data: Any) -> bytes:
    """`data` as JSON, sometimes nested deeper than any parser goes."""
    written = json.dumps(data)
    if rng.random() < 0.02:
        depth = rng.choice((900, 5000, 100_000))
        written = written.replace("null", "[" * depth + "]" * rng.choice((depth, 0)), 1) if "null" in written else "[" * depth
    return written.encode("utf-8", "surrogatepass")


def tensors_file(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A safetensors file: its bytes damaged; its header changed and the length of it put right; or a sound file of other
    tensors than a reader expects."""
    if rng.random() < 0.3:
        return mutated(rng, seeds)
    data = rng.choice(seeds)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    if rng.random() < 0.6:
        return _sound(rng, header)
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(list(header) or [""])
        action = rng.randrange(5)
        if action == 0:
            header.pop(name, None)
        elif action == 1:
            header[rng.choice((name, *ODD))] = anything(rng)
        elif isinstance(header.get(name), dict):
            header[name][rng.choice(("dtype", "shape", "data_offsets", "ss_v2"))] = rng.choice((
                anything(rng), [0, 0], [0, 4], [-1, 1], [4, 0], [2**62, 2], "F8_E4M3", "C64", "BOOL", "F64"))
    body = json_text(rng, header)
    size = rng.choice((len(body),) * 6 + (len(body) - 1, len(body) + 1, 0, 2**63, 2**64 - 1))
    return struct.pack("<Q", size) + body + data[8 + length:][:rng.choice((None, None, None, 0, 10))]


def _sound(rng: random.Random, header: dict[str, Any]) -> bytes:
    """A file that safetensors takes, with tensors renamed, left out, reshaped and of other formats; small ones get bytes."""
    metadata, changed = header.pop("__metadata__", {}), {}
    damage = rng.choice((0.0, 0.001, 0.01, 0.3))
    for name, entry in header.items():
        shape, dtype = list(entry["shape"]), entry["dtype"]
        if rng.random() < damage:
            action = rng.randrange(5)
            if action == 0:
                continue
            name = rng.choice((name + "x", name[:-3], name.replace("0", "1"), *ODD[4:])) if action == 1 else name
            shape = rng.choice((shape[::-1], shape[:1], [], [0, *shape], [1, *shape], [*shape, 1])) if action == 2 else shape
            dtype = rng.choice(tuple(_WIDTHS)) if action == 3 else dtype
            shape = [rng.choice((1, 2, 3, 4, 7, 64)) for _ in shape] if action == 4 else shape
        changed[name] = (shape, dtype)
    if rng.random() < 0.3 and metadata:
        metadata[rng.choice(list(metadata))] = rng.choice((*ODD, "{}", "[]", "null", json_text(rng, anything(rng)).decode(
            "utf-8", "replace")))
    described, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (shape, dtype) in changed.items():
        stop = end + math.prod(shape) * _WIDTHS[dtype]
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, stop]}
        end = stop
    body = json.dumps(described).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(body)) + body + (rng.randbytes(end) if end < 10_000 else b"")


def image_file(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A damaged image; half of the PNGs get their checksums put right, so that the damage is looked at."""
    data = mutated(rng, seeds)
    return _with_checksums(data) if data[:4] == b"\x89PNG" and rng.random() < 0.5 else data


def _with_checksums(data: bytes) -> bytes:
    out, at = bytearray(data[:8]), 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at:at + 4], "big")
        body = data[at + 4:at + 8 + length]
        if len(body) < 4 + length:
            return bytes(out) + data[at:]
        out += data[at:at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


# ---- seeds ----------------------------------------------------------------------------------------------------------

def image_seeds() -> list[bytes]:
    """A small image in each format, with metadata, transparency, a palette, frames."""
    rgb = Image.effect_mandelbrot((24, 18), (-2, -1, 1, 1), 40).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    variants: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "PNG", {"exif": exif}), (rgb.convert("P"), "PNG", {}), (rgb.convert("RGBA"), "PNG", {}),
        (rgb.convert("L"), "PNG", {"transparency": 3}), (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {}), (rgb, "WEBP", {}),
        (rgb.convert("RGBA"), "WEBP", {"lossless": True}), (rgb, "GIF", {}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}), (rgb, "BMP", {}), (rgb, "TIFF", {"exif": exif}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}), (rgb.convert("F"), "TIFF", {}),
        (rgb, "MPO", {"save_all": True, "append_images": [rgb]})]
    seeds = []
    for image, kind, options in variants:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        seeds.append(buffer.getvalue())
    return seeds


def _ordered(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose header is the same each time; safetensors itself shuffles the metadata."""
    data = save(tensors, metadata)
    length = int.from_bytes(data[:8], "little")
    body = json.dumps(json.loads(data[8:8 + length]), sort_keys=True).encode()
    return struct.pack("<Q", len(body)) + body + data[8 + length:]


def lora_seeds() -> list[bytes]:
    """Small LoRA files of two families."""
    return [_ordered({f"{layer}.lora_down.weight": torch.ones(4, 8), f"{layer}.lora_up.weight": torch.ones(8, 4),
                  f"{layer}.alpha": torch.tensor(2.0)}, {"ss_base_model_version": version, "ss_network_dim": "4"})
            for layer, version in (("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "sd_v1"),
                                   ("lora_unet_input_blocks_4_1_proj_in", "sdxl_base_v1-0"))]


def checkpoint_seeds() -> tuple[list[bytes], int]:
    """(the header of a small SD1 checkpoint and one that lacks most of it, the bytes of its file): no weights are read."""
    with tempfile.TemporaryDirectory() as made:
        path = tiny_checkpoint.write(Path(made))
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header = json.dumps(json.loads(file.read(int.from_bytes(start, "little"))), sort_keys=True).encode()
    few = json.dumps(dict(list(json.loads(header).items())[:40])).encode()
    return [struct.pack("<Q", len(header)) + header, struct.pack("<Q", len(few)) + few], size


def state_seeds() -> list[bytes]:
    """A training state as it is written, of one layer."""
    state = {"step": 3, "overflows": 0, "version": checkpoint.VERSION, "settings": flat(Settings()), "started_at": 1.5,
             "steps": 9, "dataset": "x", "checkpoint": {}}
    return [_ordered({"lora.a.lora_down.weight": torch.ones(2, 2), "optimizer.0.exp_avg": torch.ones(2, 2),
                  "scaler.scale": torch.tensor(1.0), "scaler.good_steps": torch.tensor(1), "recent": torch.ones(3)},
                 {"lora_train_state": json.dumps(state)})]


YAML_SEEDS = [b"model:\n  params:\n    scale_factor: 0.18215\n    linear_start: 0.00085\n    linear_end: 0.0120\n"
              b"    parameterization: v\n    unet_config: {params: {num_heads: 8}}\n"
              b"    cond_stage_config: {params: {version: clip}}\n",
              b"model:\n  params: &a\n    network_config: {params: {num_head_channels: 64}}\n"
              b"    conditioner_config: {params: {emb_models: [{input_key: txt}]}}\n"]
