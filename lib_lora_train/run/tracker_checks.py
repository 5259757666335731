"""Whether the trackers that the settings choose can be used here, told before anything begins."""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from lib_lora_train.errors import OutputError, SettingError
from lib_lora_train.run.output import checked_name
from lib_lora_train.settings import Settings, named
from lib_lora_train.training.optimizer_kinds import install_command

TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


def check_trackers(settings: Settings) -> None:
    """Raise SettingError where a tracker that is chosen cannot be used here: its package is missing, or it has no key;
    and where a part of its folder's name is no plain name, and might lead elsewhere."""
    if settings.tracking.chosen:
        _check_names(settings)
    for package in settings.tracking.chosen:
        if importlib.util.find_spec(package) is None:
            raise SettingError(f"{TITLES[package]} needs the Python package {package}, which is not installed",
                               remedy=f"install it with: {install_command(package).replace(' --no-deps', '')}, or set "
                                      f"{named('log_with')} to none")
    if "wandb" in settings.tracking.chosen and not _has_key():
        raise SettingError("Weights & Biases has no key on this machine",
                           remedy="run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline to send nothing")


def _check_names(settings: Settings) -> None:
    prefix, project = settings.tracking.log_prefix, settings.tracking.log_tracker_name
    for name, value, folder in (("log_prefix", prefix, f"{prefix}20000101000000"),  # the time follows it
                                ("log_tracker_name", project, project or "0")):
        try:
            checked_name(folder)
        except OutputError as error:
            raise SettingError(f"{named(name)} cannot be {value!r}", why="it becomes a part of a folder's name",
                               remedy="write a plain name such as my_character") from error


def _has_key() -> bool:
    """Whether wandb finds a key by itself, or needs none. It would ask for one in the terminal, which nobody may see."""
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY") or os.environ.get(
            "WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for place in places:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeError):
            if netrc.netrc(place).authenticators(server):
                return True
    return False
