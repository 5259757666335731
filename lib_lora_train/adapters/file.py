"""The LoRA file: saved atomically, with the hashes that others look it up by; loaded and inspected with clear refusals.

The format is safetensors with kohya's keys. Weights are read whole into memory and never stay mapped, so that on
Windows no open handle keeps a file from being replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lib_lora_train.errors import LoraFileError, TrainingError, translated
from lib_lora_train.model.architecture import UNET_COMPONENT
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.model.fingerprint import not_finite
from lib_lora_train.model.sd.lora_keys import foreign_layout
from lib_lora_train.storage.atomic import replacing
from lib_lora_train.storage.content import header_of, refuse_wrong_content

SAVE_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}

# Last part of a key -> the kind of network that has it; the first match counts.
_KINDS = (("dora_scale", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("lokr_w1_a", "LoKr"),
          ("oft_blocks", "OFT"), ("lora_down.weight", "LoRA"))
_DOWN = ("lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight", "lora_A.weight", "lora_A.default.weight")


@dataclass(frozen=True)
class LoraFile:
    """A file as it was read: `tensors` in the file's dtype on the CPU, `metadata` {} where it has none."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    model_hash: str


@dataclass(frozen=True)
class LoraInfo:
    """What `inspect` finds out about a LoRA file.

    family       by name, "sd1"; None where neither keys, metadata nor sizes tell
    kind         "LoRA", "LoCon", "LoHa", "LoKr", "DoRA", "OFT", "LoRA (PEFT)", "LoRA (diffusers)", or "unknown"
    rank, alpha  the most common ones; None where the kind has none
    components   layers by component: {"unet": 192, "te": 72}
    keys         all tensor names, sorted
    dtypes       the number formats of the weights, "float16"
    not_finite   tensors that hold a NaN or an infinity; one of them spoils every picture
    model_hash   as computed from the bytes: what the WebUI and CivitAI look the file up by
    hash_ok      whether the file's own `sshs_model_hash` says the same; None where it has none
    size         bytes
    """

    path: Path
    family: str | None
    kind: str
    rank: int | None
    alpha: float | None
    components: Mapping[str, int]
    keys: tuple[str, ...]
    dtypes: tuple[str, ...]
    not_finite: tuple[str, ...]
    metadata: Mapping[str, str]
    model_hash: str
    hash_ok: bool | None
    size: int


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, dtype: torch.dtype) -> None:
    """Write `tensors` (kohya's keys, any device) as `dtype`, atomically: readers see the old file or the new one.

    Adds `sshs_model_hash` and `sshs_legacy_hash`, and the hash of ModelSpec where that is followed. `ss_output_name` must be
    the file's stem, or the WebUI lists the LoRA under a name that is not its file's. The temporary file beside the result has
    a name that no program takes for a model, and is removed in any case.

    Raises TrainingError if a weight is not finite in `dtype` (an existing file stays), OutputError if the
    folder refuses.
    """
    path = Path(path)
    assert path.suffix == ".safetensors", "the WebUI finds LoRAs by this suffix"
    assert metadata.get("ss_output_name", path.stem) == path.stem, "the alias must equal the file's stem"
    weights = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    if bad := not_finite(weights):
        raise TrainingError(
            f"The LoRA was not saved to {path.name}", why=f"{bad[0]} holds values that are not numbers",
            remedy="lower the learning rate, or save as float if it was saved as fp16")
    # sd-scripts takes the hashes of a file with the `ss_*` metadata alone, so that editing a title or adding the hashes
    # themselves changes neither.
    data = safetensors.torch.save(weights, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    header, body = _split(data)
    digest = _sha256(body)
    header["__metadata__"] = {**metadata, "sshs_model_hash": digest,
                              "sshs_legacy_hash": _sha256(data[0x100000:0x110000])[:8]}
    if "modelspec.sai_model_spec" in metadata:
        header["__metadata__"]["modelspec.hash_sha256"] = f"0x{digest}"
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    with translated(f"saving {path.name}"), replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(body)


def load(path: Path) -> LoraFile:
    """Read a LoRA file of any kind. Raises LoraFileError if it is not there, not safetensors, or damaged."""
    path = Path(path)
    with _refusing(path):
        data = path.read_bytes()
        tensors, (header, body) = safetensors.torch.load(data), _split(data)
        return LoraFile(path, tensors, header.get("__metadata__") or {}, _sha256(body))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, without reading the weights; {} where there is none. Raises as `load` does."""
    with _refusing(Path(path)), safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{tensor's name: shape} of a LoRA, without reading the weights. Raises as `load` does."""
    with _refusing(Path(path)), safetensors.safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


def inspect(path: Path) -> LoraInfo:
    """Look at a LoRA file of any kind, also one that cannot be continued from. Raises as `load` does."""
    file = load(path)
    ranks = Counter(tensor.shape[0] for key, tensor in file.tensors.items() if tensor.ndim and key.endswith(_DOWN))
    alphas = Counter(float(tensor) for key, tensor in file.tensors.items()
                     if key.endswith(".alpha") and tensor.numel() == 1)
    layers = {_layer(key) for key in file.tensors}
    stored_hash = file.metadata.get("sshs_model_hash")
    return LoraInfo(
        path=file.path, family=recognise(file.tensors, file.metadata), kind=_kind(file.tensors),
        rank=ranks.most_common(1)[0][0] if ranks else None,
        alpha=alphas.most_common(1)[0][0] if alphas else None,
        components=dict(sorted(Counter(_component(layer) for layer in layers).items())),
        keys=tuple(sorted(file.tensors)),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values()})),
        not_finite=tuple(not_finite(file.tensors)), metadata=file.metadata, model_hash=file.model_hash,
        hash_ok=None if stored_hash is None else stored_hash == file.model_hash,
        size=file.path.stat().st_size)


def recognise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    """The name of the family a LoRA was made for, or None.

    Families of one layout (SD1 and SD2) share their keys: the metadata tells them apart, else the width of the text
    condition in full-size models.
    """
    families = [family for family in FAMILIES.values() if any(key.startswith(family.lora_prefixes) for key in tensors)]
    if len(families) > 1:
        version, v2 = metadata.get("ss_base_model_version", ""), metadata.get("ss_v2")
        ends = ("attn2_to_k.lora_down.weight", "attn2_to_k.hada_w1_b", "self_attn_q_proj.lora_down.weight")
        widths = {tensor.shape[1] for key, tensor in tensors.items() if key.endswith(ends) and tensor.ndim > 1}
        told = ([family for family in families if version.startswith(family.metadata.base_version)]
                or [family for family in families if v2 == str(family.metadata.v2)])
        families = told or [family for family in families if widths == {family.text_width}]
    return families[0].name if len(families) == 1 else None


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Errors of reading `path` as the LoraFileError that tells what it is."""
    try:
        yield
    except OSError as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))
        raise LoraFileError(f"{path} cannot be read", why=why, remedy="choose another file") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        refuse_wrong_content(path, LoraFileError)
        raise LoraFileError(f"{path.name} is damaged", why=str(error), remedy="copy or download it again") from error


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """(JSON header, the bytes behind it) of a file, which safetensors offers for a path only."""
    file = io.BytesIO(data)
    return header_of(file), memoryview(data)[file.tell():]


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _kind(tensors: Mapping[str, Tensor]) -> str:
    if layout := foreign_layout(tensors):
        return f"LoRA ({layout})"
    parts = {key.partition(".")[2] for key in tensors}
    kind = next((kind for part, kind in _KINDS if part in parts), "unknown")
    convolutions = any(tensor.ndim == 4 and tensor.shape[2] > 1 for tensor in tensors.values())
    return "LoCon" if kind == "LoRA" and convolutions else kind


def _layer(key: str) -> str:
    """The layer of a key, "unet.mid_block…" and "text_encoder.text_model…" of other layouts as kohya's names begin."""
    if not foreign_layout([key]):
        return key.partition(".")[0]
    layer = re.split(r"[._]lora[._]", key.removeprefix("base_model.model."))[0]
    return f"lora_{layer.replace('text_encoder_2.', 'te2_').replace('text_encoder.', 'te_').replace('.', '_')}"


def _component(layer: str) -> str:
    known = {UNET_COMPONENT, *(spec.component for family in FAMILIES.values() for spec in family.text)}
    parts = layer.split("_")
    return parts[1] if len(parts) > 2 and parts[1] in known else "other"
