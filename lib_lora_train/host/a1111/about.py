"""Which WebUI this is, for a report of a problem."""

from __future__ import annotations

from modules import launch_utils, shared

# What changes how a model is held or computed; no names, no passwords.
_FLAGS = ("medvram", "medvram_sdxl", "lowvram", "no_half", "no_half_vae", "upcast_sampling", "precision", "use_cpu", "xformers",
          "opt_sdp_attention", "disable_model_loading_ram_optimization", "api", "listen", "share")


def about() -> str:
    """ "AUTOMATIC1111 v1.10.1 medvram=True"."""
    flags = {name: value for name in _FLAGS if (value := getattr(shared.cmd_opts, name, None))}
    return " ".join([f"AUTOMATIC1111 {launch_utils.git_tag()}", *(f"{name}={value}" for name, value in flags.items())])
