"""The folders a run may touch while others reach the WebUI, and the setting that adds to them.

Allowed are what the WebUI may hand out itself (--gradio-allowed-path, which holds its data folder) and its LoRA folder; results
go to the LoRA folder. Output folders elsewhere count only where nobody can change them from the page.
"""

from __future__ import annotations

import os
from pathlib import Path

from modules import paths, shared

from lib_lora_train.host.exposure import reached_by_others
from lib_lora_train.settings.allowed_paths import AllowedPaths

OPTION = "lora_train_folders"
_OUTPUTS = ("outdir_samples", "outdir_txt2img_samples", "outdir_img2img_samples", "outdir_extras_samples", "outdir_grids",
            "outdir_txt2img_grids", "outdir_img2img_grids", "outdir_save", "outdir_init_images")


def allowed() -> AllowedPaths | None:
    """None while only this machine's user reaches the WebUI."""
    flags = shared.cmd_opts
    if not reached_by_others(vars(flags), os.environ):
        return None
    loras = Path(flags.lora_dir)
    reading = [Path(paths.data_path), loras, *map(Path, getattr(flags, "lora_dirs", ())),  # of Forge Neo
               *map(Path, flags.gradio_allowed_path or ()), *_further()]
    if getattr(flags, "hide_ui_dir_config", False) or getattr(flags, "freeze_settings", False):
        reading += [Path(folder) for name in _OUTPUTS if (folder := getattr(shared.opts, name, ""))]
    advice = "other folders are named in Settings, Train LoRA" if _editable() else (
        "its owner names other folders in Settings, Train LoRA, after a start without --listen or --share")
    return AllowedPaths(tuple(dict.fromkeys(reading)), (loras,), advice)


def add_option() -> None:
    """The page "Train LoRA" of the WebUI's settings. For `on_ui_settings`.

    While others reach the WebUI they must not add to the allowed paths themselves: the WebUI refuses to change what is not
    visible. Who may install extensions there (--enable-insecure-extension-access) may do anything already.
    """
    option = shared.OptionInfo(
        "", "Folders that datasets may come from while others reach this WebUI (--listen, --share, --gradio-auth), one a line",
        None, {"lines": 3, "visible": _editable()}, section=("lora_train", "Train LoRA"), restrict_api=True,
    ).info("the WebUI's own folder and its LoRA folder are always allowed; on a WebUI of one's own every folder is")
    option.category_id = "training"  # the heading it stands under; hosts without headings do not ask for it
    shared.opts.add_option(OPTION, option)


def _editable() -> bool:
    flags = shared.cmd_opts
    return not reached_by_others(vars(flags), os.environ) or bool(
        getattr(flags, "enable_insecure_extension_access", False))


def _further() -> list[Path]:
    lines = str(getattr(shared.opts, OPTION, "") or "").splitlines()
    return [Path(line.strip().strip('"')) for line in lines if line.strip()]
