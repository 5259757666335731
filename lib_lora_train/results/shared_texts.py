"""What is said of a LoRA that is given to others: a description for Civitai, a README for the Hugging Face hub. In English."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lib_lora_train.errors import plain_line, printable

if TYPE_CHECKING:
    from lib_lora_train.results.sharing import SharedLora


def description(shared: SharedLora) -> str:
    """What to write on a page of models, as plain text."""
    lines = [shared.name, "", f"Base model: {shared.family_title}, trained on {shared.checkpoint or 'an unknown checkpoint'}",
             *([f"Trigger words: {shared.trigger}"] if shared.trigger else []),
             f"Recommended weight: {shared.weight:g}", f"Prompt: {_prompt(shared)}", "", "Training",
             *(f"- {what}: {value}" for what, value in {**shared.details, **shared.settings}.items())]
    prompts = dict.fromkeys(plain_line(prompt) for _, prompt in shared.images)
    if prompts:
        lines += ["", "Prompts of the images", *(f"- {prompt}" for prompt in prompts)]
    return printable("\n".join(lines) + "\n")


def readme(shared: SharedLora, *, license_name: str = "") -> str:
    """The model's page on the Hugging Face hub: metadata in YAML, of which JSON is a part, and Markdown."""
    images = [(f"images/{shared.name}-{number}.png", plain_line(prompt)) for number, (_, prompt) in enumerate(shared.images, 1)]
    front = {"tags": ["lora", "stable-diffusion-xl" if shared.family == "sdxl" else "stable-diffusion", "text-to-image"],
             "library_name": "diffusers", "pipeline_tag": "text-to-image", "base_model": _REPOSITORIES.get(shared.family),
             "instance_prompt": shared.trigger or None, "license": license_name or None,
             "widget": [{"text": prompt, "output": {"url": path}} for path, prompt in images] or None}
    head = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items() if value)
    rows = "\n".join(f"| {name} | {_code(value)} |" for name, value in {**shared.details, **shared.settings}.items())
    trigger = f"Trigger: {_code(shared.trigger)}. " if shared.trigger else ""
    gallery = "<Gallery />\n\n" if images else ""
    return printable(
        f"---\n{head}\n---\n\n# {shared.name}\n\n{gallery}A LoRA for {shared.family_title}, trained on "
        f"{_code(shared.checkpoint or 'an unknown checkpoint')}.\n\n{trigger}Recommended weight: {shared.weight:g}. In the "
        f"WebUI, with the file among the LoRAs: {_code(_prompt(shared))}\n\n## Training\n\n| | |\n|---|---|\n{rows}\n")


_REPOSITORIES = {"sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2": "stabilityai/stable-diffusion-2-1",
                 "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
"""On the hub, by family: the model whose kind a checkpoint is of. Where a checkpoint itself comes from, no file says."""


def _prompt(shared: SharedLora) -> str:
    return f"{shared.trigger} {shared.lora_text}".strip()


def _code(value: object) -> str:
    """As code in a cell of Markdown's tables."""
    text = plain_line(str(value)).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else ""
