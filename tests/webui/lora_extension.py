"""Runs in the Python of a WebUI v1.10.1: what its own Lora extension makes of LoRA files, on small models of each family.

    python lora_extension.py FOLDER, with WEBUI_ROOT naming the WebUI

FOLDER holds `cases.json`, {family: {"unet": UNetModel's arguments, "text": [[kind, arguments], …], "files": [[file,
multiplier], …]}}, `{family}.safetensors` with the tensors under checkpoint names, and `{family}-inputs.safetensors`. Written
are `{file}.result.safetensors` (the UNet's prediction, and the text encoders' weights) and `found.json`, {file: {"unmatched"}}.
The models are of ldm's, sgm's, transformers' and open_clip's classes, as the WebUI makes them of a checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import types
from pathlib import Path

ROOT, FOLDER = Path(os.environ["WEBUI_ROOT"]).resolve(), Path(sys.argv[1]).resolve()
os.chdir(ROOT)
sys.argv = ["launch.py", "--use-cpu", "all", "--no-half", "--skip-torch-cuda-test", "--data-dir", str(FOLDER)]
sys.path[:0] = [str(ROOT), str(ROOT / "extensions-builtin" / "Lora")]

import torch  # noqa: E402
from modules import shared_init  # noqa: E402

shared_init.initialize()

import networks  # noqa: E402
import open_clip  # noqa: E402
from ldm.modules.diffusionmodules.openaimodel import UNetModel as LdmUNet  # noqa: E402
from modules import devices, sd_models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sgm.modules.diffusionmodules.openaimodel import UNetModel as SgmUNet  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402


class Holder(torch.nn.Module):
    """Modules under the names that the extension looks for."""

    def __init__(self, modules: dict[str, object]) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def model_of(family: str, case: dict) -> Holder:
    unet = (SgmUNet if family == "sdxl" else LdmUNet)(**case["unet"])
    embedders = []
    for kind, arguments in case["text"]:
        embedders.append(Holder({"transformer": CLIPTextModel(CLIPTextConfig(**arguments))}) if kind == "clip" else
                         Holder({"model": open_clip.transformer.TextTransformer(**arguments)}))
    modules: dict[str, object] = {"model": Holder({"diffusion_model": unet})}
    if family == "sdxl":
        wrapped = torch.nn.ModuleList(Holder({"wrapped": embedder}) for embedder in embedders)
        modules["conditioner"] = Holder({"embedders": wrapped})
    else:
        modules["cond_stage_model"] = embedders[0]
    model = Holder(modules).eval()
    model.is_sdxl = family == "sdxl"
    names = {name.replace(".wrapped.", "."): name for name in model.state_dict()}
    tensors = {names[name]: tensor for name, tensor in load_file(FOLDER / f"{family}.safetensors").items() if name in names}
    missing, _ = model.load_state_dict(tensors, strict=False)
    assert not [name for name in missing if "position_ids" not in name and "attn_mask" not in name], missing
    return model


class Complaints(logging.Handler):
    """What the extension logs of keys that it could not place."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def apply_networks(model: Holder) -> None:
    """What each module's forward does. The Linear inside a MultiheadAttention has no forward that is called."""
    for module in model.modules():
        if type(module) in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.MultiheadAttention):
            networks.network_apply_weights(module)


@torch.no_grad()
def main() -> None:
    complaints, found = Complaints(), {}
    devices.dtype_unet = torch.float32  # what loading a model with --no-half sets
    logging.getLogger().addHandler(complaints)
    logging.getLogger().setLevel(logging.DEBUG)
    for family, case in json.loads((FOLDER / "cases.json").read_text()).items():
        sd_models.model_data.sd_model = model = model_of(family, case)
        sd_models.model_data.was_loaded_at_least_once = True
        networks.assign_network_names_to_compvis_modules(model)
        inputs = load_file(FOLDER / f"{family}-inputs.safetensors")
        for name, multiplier in case["files"]:
            complaints.texts.clear()
            network = networks.load_network(name, types.SimpleNamespace(filename=str(FOLDER / name)))
            network.te_multiplier = network.unet_multiplier = multiplier
            networks.loaded_networks[:] = [network]
            apply_networks(model)
            result = {name.replace(".wrapped.", "."): tensor.clone() for name, tensor in model.state_dict().items()
                      if not name.startswith("model.")}
            y = inputs.get("y")
            result["prediction"] = model.model.diffusion_model(
                inputs["x"], timesteps=inputs["t"], context=inputs["context"], y=y)
            save_file({key: tensor.contiguous() for key, tensor in result.items()}, FOLDER / f"{name}.result.safetensors")
            found[name] = {"unmatched": [text for text in complaints.texts if "match" in text or "layer" in text]}
            networks.loaded_networks[:] = []
            apply_networks(model)  # the weights as they were
    (FOLDER / "found.json").write_text(json.dumps(found))


main()
