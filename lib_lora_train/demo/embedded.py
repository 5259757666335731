"""The small model that comes with the extension: it paints emoji from their names (its model card: model/README.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

NAME = "emoji"
CHECKPOINT = Path(__file__).parent / "model" / f"{NAME}.safetensors"


def put_beside(folder: Path) -> Path:
    """Copy the model into `folder` (a WebUI's models/Stable-diffusion) in the form that the WebUI loads; returns its path.

    That is `emoji.safetensors`, `emoji.yaml`, and `emoji-text/` with the text encoder's configuration and CLIP's vocabulary,
    which open_clip carries. The `.yaml` names that folder by its whole path, since the WebUI looks from where it was started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / f"{NAME}-text"
    text.mkdir(exist_ok=True)
    shutil.copyfile(CHECKPOINT.parent / f"{NAME}-text" / "config.json", text / "config.json")
    _write_vocabulary(text)
    configuration = yaml.safe_load(CHECKPOINT.with_suffix(".yaml").read_text(encoding="utf-8"))
    configuration["model"]["params"]["cond_stage_config"]["params"]["version"] = str(text.resolve())
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
    return Path(shutil.copyfile(CHECKPOINT, folder / CHECKPOINT.name))


def _write_vocabulary(folder: Path) -> None:
    """CLIP's vocabulary as transformers' CLIPTokenizer reads it."""
    from open_clip.tokenizer import SimpleTokenizer  # imported late: it takes seconds

    tokenizer = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    ours = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {ours.get(piece, piece): index for piece, index in tokenizer.encoder.items()}
    merges = [" ".join(pair) for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda item: item[1])]
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    for name, content in (("vocab.json", vocabulary), ("special_tokens_map.json", special), ("tokenizer_config.json", {
            **special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True})):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
