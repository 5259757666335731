"""Where a WebUI has its model: what differs between AUTOMATIC1111's and those made from it.

Each kind is a module with the functions of `ModelAccess`: a1111.py, backend.py (Forge, Forge Neo), patched.py (reForge, Forge
Classic). Which one fits is told by what can be imported, not by a name: there are many forks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lib_lora_train.errors import HostError, ModelError, translated
from lib_lora_train.host import placement, standalone
from lib_lora_train.host.port import Checkpoint, Outline, same_title
from lib_lora_train.model.family import FAMILIES, Hints
from lib_lora_train.model.sd.refusals import refuse_other_kinds
from lib_lora_train.model.sd.tokens import Tokenizer


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which checkpoint and VAE a model is made of: their files, "" for the checkpoint's own VAE."""

    checkpoint: str
    vae: str

    def __str__(self) -> str:
        """As a user knows it."""
        return os.path.basename(self.checkpoint) + (f" with {os.path.basename(self.vae)}" if self.vae else "")


class ModelAccess(Protocol):
    """What is asked of the WebUI about its model, `sd_model`, whose class is the WebUI's own."""

    def current(self) -> Any:
        """The model that is loaded now, None where there is none; never loads, never waits."""

    def load(self) -> Any:
        """The model that the WebUI is set to, loaded where it is not; None where there is none. With the queue's lock held.
        Raises HostError where it cannot be loaded."""

    def select(self, title: str) -> str:
        """Hold the model of this title of the WebUI's list from now on, and return the title of the one before, "" for none.
        With the queue's lock held. Raises HostError where it is gone or cannot be loaded; the one before is chosen again then.
        """

    def pending(self) -> Any:
        """The entry of the WebUI's list of checkpoints that it is set to and loads when it is needed; None where that is the
        loaded one."""

    def restored(self, identity: Identity) -> Any:
        """The model of that identity, loaded where the WebUI is only set to it; None while the WebUI is set to another. With
        the queue's lock held. Raises HostError where no model is left."""

    def may_be_back(self, identity: Identity) -> bool:
        """Whether it is worth waiting in the queue for it. Asked without the lock, so the answer may be old."""

    def identity(self, sd_model: Any) -> Identity:
        """That of a loaded model."""

    def refuse_options(self) -> None:
        """Raises HostError where the WebUI was started in a way that leaves no whole model to lease."""

    def refuse_kind(self, sd_model: Any) -> None:
        """Raises ModelError for kinds that names and shapes alone do not give away; `family.detect` knows the others."""

    def describe(self, sd_model: Any) -> Checkpoint:
        """The loaded checkpoint by name. Hashes are those that the WebUI knows already."""

    def modules(self, sd_model: Any) -> Sequence[nn.Module]:
        """Those whose parameters are leased."""

    def collect(self, sd_model: Any) -> dict[str, Tensor]:
        """Every tensor of the model by reference, under its checkpoint's name. Raises HostError if one is nowhere, ModelError
        where they are not plain numbers."""

    def hints(self, sd_model: Any) -> Hints:
        """Heads, activations, prediction and schedule as the WebUI's own modules and settings have them."""

    def tokenizers(self, sd_model: Any) -> Sequence[Tokenizer]:
        """One a text encoder: the WebUI's own wrapper around it."""

    def remove_loras(self, sd_model: Any, networks: Any) -> None:
        """Give every layer the checkpoint's own weights again; `networks` is the module of the Lora extension. With the
        queue's lock held. Raises HostError where a layer is still changed afterwards."""

    def unload(self, sd_model: Any) -> None:
        """Put each part where the WebUI keeps what no generation computes with. With the queue's lock held."""


def choose() -> ModelAccess:
    """That of the WebUI this runs in."""
    forge = _importable("modules_forge")
    kind = "backend" if forge and _importable("backend.loader") else "patched" if forge else "a1111"
    return cast(ModelAccess, importlib.import_module(f"{__package__}.{kind}"))


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # its package is missing
        return False


class VersionCheck:
    """Detects whether somebody changed a leased model.

    A switch of checkpoint may leave the module in place and copy other weights into the very tensors that are leased.
    torch counts such in-place changes for its own check of tensors that are saved for backward
    (https://pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks), which is asked here: the weights
    are saved by a graph of one scalar. Moving a tensor between devices is no change. Inference tensors are not counted;
    the WebUIs that have them put other parameters in their place, which is seen as well.
    """

    def __init__(self, access: ModelAccess, sd_model: Any, tensors: Mapping[str, Tensor]) -> None:
        self._access, self._sd_model, self._info = access, sd_model, sd_model.sd_checkpoint_info
        self._owners = [(module, name, parameter) for part in access.modules(sd_model) for module in part.modules()
                        for name, parameter in module.named_parameters(recurse=False)]
        self._scalar = torch.zeros((), requires_grad=True)
        with torch.enable_grad():
            self._graph = _Saved.apply(self._scalar, [tensor for tensor in tensors.values() if not tensor.is_inference()])

    def check(self) -> None:
        """Raises HostError if the model is not the leased one any more, weight for weight."""
        same = self._access.current() is self._sd_model and self._sd_model.sd_checkpoint_info is self._info
        same = same and all(getattr(module, name) is parameter for module, name, parameter in self._owners)
        if same:
            try:
                torch.autograd.grad(self._graph, self._scalar, retain_graph=True)
            except RuntimeError:  # "modified by an inplace operation"; there is nothing else in this graph
                same = False
        if not same:
            raise model_changed()


class _Saved(torch.autograd.Function):
    """The identity of a scalar, whose backward asks for `tensors` as they were."""

    @staticmethod
    def forward(ctx: Any, scalar: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        ctx.save_for_backward(*tensors)
        return scalar.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors
        return gradient, None


def model_changed() -> HostError:
    """The error for a model whose weights are not the leased ones any more."""
    return HostError(
        "The WebUI's model was changed while it was trained on",
        why="another checkpoint, VAE or LoRA was put in its place",
        remedy="choose its checkpoint and VAE again at the top of the page and resume the run")


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, int]]:
    """For every tensor of UNet, VAE and text encoders its shape and a sum over its bits: the same for the same weights,
    wherever they are."""
    sums = {name: (tensor.shape, _exact(name, tensor).sum(dtype=torch.int64))
            for name, tensor in placement.weights_of(tensors).items()}
    # All are computed before the first is waited for; a copy of eight bytes each.
    return {name: (shape, int(total)) for name, (shape, total) in sums.items()}


def _exact(name: str, tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers."""
    tensor = tensor.detach()
    if name.endswith(("token_embedding.weight", "position_embedding.weight")):
        tensor = tensor.float()  # the Forges make these fp32 when they first paint
    return tensor.view(_BITS[tensor.element_size()])


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def outline(access: ModelAccess, sd_model: Any) -> Outline:
    """The model's names and shapes, and the device it would be trained on; also during a generation."""
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
              for name, tensor in access.collect(sd_model).items()}
    return Outline(shapes, access.hints(sd_model), device())


def device() -> torch.device:
    """The WebUI's, with its index."""
    from modules import devices

    return torch.empty(0, device=devices.device).device


def describe_pending(info: Any) -> tuple[Checkpoint, Outline | None]:
    """A checkpoint of the WebUI's list that is not loaded, by its file's header. Without an outline where that does not tell
    all: of pickled files, and where VAE or text encoders are in files of their own."""
    path = Path(info.filename)
    try:
        family, refusal, outline = _read_header(path, path.stat().st_mtime_ns)
    except (ModelError, OSError):
        family, refusal, outline = "", _NOT_LOADED, None
    return described(info, family=family, refusal=refusal), outline


def refuse_pending(info: Any) -> None:
    """Raises ModelError where the file's header tells that it cannot be trained: better than to load it first."""
    checkpoint, _ = describe_pending(info)
    if checkpoint.refusal and checkpoint.refusal != _NOT_LOADED:
        raise ModelError(checkpoint.refusal)


_NOT_LOADED = "its kind shows when it is loaded"


@functools.lru_cache(maxsize=1)
def _read_header(path: Path, changed_at: int) -> tuple[str, str, Outline | None]:
    """(family, refusal, outline)."""
    shapes = standalone.read_shapes(path)
    try:
        refuse_other_kinds(shapes)
    except ModelError as error:
        return "", str(error), None
    try:
        return family_of(shapes), "", standalone.describe_header(path, device())[1]
    except ModelError:
        return family_of(shapes), "", None


def family_of(tensors: Mapping[str, Tensor]) -> str:
    """The family of a checkpoint's UNet (checkpoint names), "" for none."""
    return next((family.name for family in reversed(FAMILIES.values()) if family.recognises(tensors)), "")


def file_of(sd_model: Any) -> Path:
    """The checkpoint's file."""
    return Path(sd_model.sd_checkpoint_info.filename)


def choose_checkpoint(title: str, *, before: str, load: Callable[[Any], Any]) -> str:
    """As `ModelAccess.select`; `load` loads an entry of the WebUI's list, which its setting names already, and returns the
    model."""
    if same_title(before, title):
        return before
    _set_checkpoint(chosen := listed(title))
    why = "the log has the details"
    try:
        with translated("loading another checkpoint"):
            sd_model = load(chosen)
        if sd_model is not None and sd_model.sd_checkpoint_info.filename == chosen.filename:
            return before
    except Exception as error:  # noqa: BLE001 - of any class: no file, a file of an unknown kind
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if before:
        with contextlib.suppress(Exception):  # what is told is why the other one is not there
            _set_checkpoint(listed(before))
            load(listed(before))
    raise HostError(f"The checkpoint {title} could not be loaded", why=why, remedy="choose another one")


def _set_checkpoint(info: Any) -> None:
    from modules import shared

    try:
        shared.opts.set("sd_model_checkpoint", info.title, run_callbacks=False)
    except AssertionError as error:
        raise HostError("The WebUI's checkpoint cannot be changed", why="its settings are frozen",
                        remedy="start it without --freeze-settings") from error


def listed(title: str) -> Any:
    """The checkpoint of that title in the WebUI's list. Raises HostError where its file is gone."""
    from modules import sd_models

    found = sd_models.checkpoint_aliases.get(title)
    if found is None or not os.path.isfile(found.filename):
        raise HostError(f"The checkpoint {title} is not there any more", remedy="put its file back and press Refresh")
    return found


def described(info: Any, *, family: str, vae: str = "", refusal: str = "") -> Checkpoint:
    """A checkpoint of the WebUI's list; `vae` is the file of another VAE than its own."""
    return Checkpoint(name=info.name_for_extra, title=info.title, family=family, sha256=info.sha256 or "",
                      legacy_hash=info.hash or "", vae_name=os.path.basename(vae), refusal=refusal)


def refusal_of(access: ModelAccess, sd_model: Any) -> str:
    """Why a loaded model cannot be trained, one sentence; "" where nothing speaks against it."""
    try:
        access.refuse_kind(sd_model)
    except ModelError as error:
        return str(error)
    return ""


def attention_heads(unet: nn.Module) -> tuple[int | None, int | None]:
    """(heads a layer, None) or (None, channels a head): whichever is the same in all of the UNet's attention layers."""
    found = {(m.heads, m.to_q.weight.shape[0]) for m in unet.modules() if hasattr(m, "heads") and hasattr(m, "to_q")}
    heads = {heads for heads, _ in found}
    if len(heads) == 1:
        return heads.pop(), None
    widths = {channels // heads for heads, channels in found}
    return None, widths.pop() if len(widths) == 1 else None
