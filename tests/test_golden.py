"""Golden runs: the same settings and the same seed give the same LoRA file as when golden.json was recorded.

Each case trains by the command line on small random checkpoints and on images made here, and is compared with golden.json:
the losses of its steps and the norms of its tensors everywhere, within a tolerance; all bytes of its tensors where torch, the
kind of CPU and the number of threads are those of the recording, because other kernels round differently.

Where a change of the numbers is intended, or the recording shall hold for another machine:

    PYTHONPATH=. python tests/test_golden.py --record tests/golden.json
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: the number of threads changes how sums are rounded

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

# All that is used of the project: its command line, and what makes small checkpoints.
from lib_lora_train.__main__ import main
from tests.model import small_checkpoints
from tests.model.checkpoint_files import write_other
from tools import tiny_checkpoint

ROOT = Path(sys.modules[main.__module__].__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
THREADS = int(os.environ["OMP_NUM_THREADS"])
NUMBERS = ("lora_up", "lora_down", "losses")

CLOSE = 5e-4
"""The relative tolerance of losses and norms on machines that round differently. Two threads, AVX2 and CPUs without AVX, as far
as they can be pretended, were within 4e-5, and bf16 within 2e-3."""


# --- what is trained on -----------------------------------------------------------------------------------------------

def write_sd1(folder: Path) -> Path:
    """The smallest SD1, with the .yaml and the vocabulary of its own maker."""
    return tiny_checkpoint.write(folder, name="sd1", size=tiny_checkpoint.SMALLEST)


def write_image(path: Path, number: int, size: tuple[int, int], *, caption: str = "", mode: str = "RGB",
                orientation: int = 1) -> None:
    """An image of stripes and curves, computed in whole numbers; each `number` gives another one."""
    y, x = np.mgrid[:size[1], :size[0]]
    channels = [(3 + number) * x + (5 * channel + number) * y + x * y // (3 + channel) + 40 * channel for channel in range(4)]
    image = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path, exif=exif)
    if caption:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def write_images(folder: Path) -> None:
    """Three datasets: `plain`, `shapes` in kohya's layout, and `class` for regularisation."""
    long = ", ".join(f"a photo of red cat {number}" for number in range(12))  # more than one chunk of 75 tokens
    write_image(folder / "plain/0.png", 0, (64, 64), caption="zzk, red cat, a photo, of blue")
    write_image(folder / "plain/1.png", 1, (80, 80), caption=long)
    write_image(folder / "plain/2.png", 2, (96, 72), caption="a photo of zzk", mode="RGBA")
    write_image(folder / "plain/3.png", 3, (130, 70), mode="L")
    write_image(folder / "shapes/3_zzk/0.png", 4, (128, 128), caption="zzk, a, red, cat")
    write_image(folder / "shapes/3_zzk/1.png", 5, (192, 64), caption="zzk, blue, a photo of cat")
    write_image(folder / "shapes/1_zzk cat/2.png", 6, (200, 70))
    write_image(folder / "shapes/1_zzk cat/3.png", 7, (190, 66), caption="cat", orientation=6)
    write_image(folder / "shapes/1_zzk cat/4.png", 8, (150, 140), caption="red, zzk, blue")
    for number in range(3):
        write_image(folder / f"class/1_cat/{number}.png", 9 + number, (128, 128 if number else 64), caption="a cat")


@dataclass(frozen=True)
class Material:
    """The folder that holds checkpoints and images, and in which runs get folders of their own."""

    folder: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def write(cls, folder: Path) -> Material:
        """All checkpoints and images."""
        write_sd1(folder)
        for family in ("sd2", "sdxl"):
            write_other(folder, family, small_checkpoints.checkpoint(family), small_checkpoints.HINTS[family])
        write_images(folder)
        return cls(folder)

    def fingerprints(self) -> dict[str, str]:
        """Of each checkpoint's tensors."""
        return {family: fingerprint(load_file(self.folder / f"{family}.safetensors")) for family in ("sd1", "sd2", "sdxl")}

    def new_folder(self) -> Path:
        """For one more run's result."""
        return self.folder / f"run-{next(self._numbers)}"


# --- the command line -------------------------------------------------------------------------------------------------

def command(checkpoint: Path, output: Path, settings: Mapping[str, object], *more: object) -> list[str]:
    """The arguments of a training run."""
    sets = (part for name, value in settings.items() for part in ("--set", f"{name}={value}"))
    return [str(part) for part in (
        "train", "--checkpoint", checkpoint, "--name", "golden", "--output-dir", output, *sets, "--json", *more)]


def steps_of(output: str) -> list[tuple[int, float]]:
    """(step, loss) of each step among the events of --json."""
    events = map(json.loads, output.splitlines())
    return [(event["step"], event["loss"]) for event in events if event["event"] == "step"]


class Watched(io.StringIO):
    """What a run prints. After step `interrupt_at` it is interrupted as by Ctrl+C; 0 is never."""

    def __init__(self, interrupt_at: int) -> None:
        super().__init__()
        self._interrupt_at = interrupt_at

    def write(self, text: str) -> int:
        """A whole line, or the end of one."""
        written = super().write(text)
        if self._interrupt_at and text.strip() and [step for step, _ in steps_of(text)] == [self._interrupt_at]:
            signal.raise_signal(signal.SIGINT)
        return written


def run_here(arguments: list[str], *, interrupt_at: int = 0) -> list[tuple[int, float]]:
    """A run in this process, which saves the seconds of imports, on the CPU; its steps."""
    out, errors, threads = Watched(interrupt_at), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), \
                mock.patch("torch.cuda.is_available", return_value=False):
            code = main(arguments)
    finally:
        torch.set_num_threads(threads)
    assert code == (130 if interrupt_at else 0), errors.getvalue()
    return steps_of(out.getvalue())


def run_in_two_processes(arguments: list[str]) -> list[tuple[int, float]]:
    """A run of two processes of one group; the steps that rank 0 tells."""
    with socket.socket() as held:
        # Held until both have ended, so that nobody else is given the port. torch's store may listen on it all the same.
        if sys.platform != "win32":
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if sys.platform == "win32":
            held.close()
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
                 "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT)}
        processes = [subprocess.Popen(
            [sys.executable, "-m", "lib_lora_train", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)]
        try:
            told = [process.communicate(timeout=500) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], [errors for _, errors in told]
    return steps_of(told[0][0])


# --- the cases --------------------------------------------------------------------------------------------------------

Way = Callable[["Case", Material, Path], list[tuple[int, float]]]


def straight(case: Case, material: Material, output: Path) -> list[tuple[int, float]]:
    """One run from its beginning to its end."""
    return run_here(case.command(material, output))


def in_two_processes(case: Case, material: Material, output: Path) -> list[tuple[int, float]]:
    """One run that two processes share."""
    return run_in_two_processes(case.command(material, output))


def on_from_a_file(case: Case, material: Material, output: Path) -> list[tuple[int, float]]:
    """A run that continues the LoRA file of a run of two steps."""
    first = material.new_folder()
    run_here(case.command(material, first, max_train_steps=2))
    return run_here(case.command(material, output, network_weights=first / "golden.safetensors", seed=7))


def interrupted(case: Case, material: Material, output: Path) -> list[tuple[int, float]]:
    """A run that is interrupted after three steps and resumed."""
    begun = run_here(case.command(material, output), interrupt_at=3)
    return begun + run_here(case.resume(material, output))


def lengthened(case: Case, material: Material, output: Path) -> list[tuple[int, float]]:
    """A run of two steps that keeps its resume point, and is then asked for as many as the settings say."""
    begun = run_here(case.command(material, output, max_train_steps=2, save_state_on_train_end=True))
    return begun + run_here(case.resume(material, output, max_train_steps=case.all_settings["max_train_steps"]))


@dataclass(frozen=True)
class Case:
    """One run to compare. `data` is the folder of its images, `settings` are laid over `COMMON`.

    `like` names a case whose tensors this one must equal byte for byte on every machine.
    """

    family: str
    data: str
    settings: Mapping[str, object] = field(default_factory=dict)
    way: Way = straight
    tolerance: float = CLOSE
    like: str = ""

    @property
    def all_settings(self) -> dict[str, object]:
        """`COMMON`, what the data calls for, and the case's own."""
        return {**COMMON, **OF_DATA[self.data], **self.settings}

    def command(self, material: Material, output: Path, **changes: object) -> list[str]:
        """The arguments of a run into `output`."""
        settings = {**self.all_settings, **changes}
        if "reg_data_dir" in settings:
            settings["reg_data_dir"] = material.folder / str(settings["reg_data_dir"])
        return command(material.folder / f"{self.family}.safetensors", output, settings, "--data", material.folder / self.data)

    def resume(self, material: Material, output: Path, **changes: object) -> list[str]:
        """The arguments that go on with the one run in `output`."""
        run, = (folder.name for folder in (output / "runs").iterdir())
        return command(material.folder / f"{self.family}.safetensors", output, changes, "--resume", run)


COMMON = {"network_dim": 4, "network_alpha": 2, "learning_rate": 0.005, "text_encoder_lr": 0.002, "lr_scheduler": "constant",
          "max_train_steps": 4, "min_bucket_reso": 64, "sample_images": False, "validation": False, "save_every_n_epochs": 0,
          "save_precision": "float", "seed": 1234}
# 128 and not 64: of a single pixel in the middle of the UNet attention has no gradient but rounding, which AdamW would follow.
OF_DATA = {"plain": {"resolution": 128, "num_repeats": 1}, "shapes": {"resolution": 128}}
TEXT = {"network_train_unet_only": False}
CAPTIONS = {"shuffle_caption": True, "keep_tokens": 1, "caption_tag_dropout_rate": 0.3, "caption_dropout_rate": 0.2}
FRESH = {"flip_aug": True, "color_aug": True, "random_crop": True}
RICH = {**TEXT, **CAPTIONS, "flip_aug": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_train_steps": 6,
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "validation": True}

CASES = {
    "sd1": Case("sd1", "plain", {"save_precision": "fp16", "lr_scheduler": "cosine"}),
    "sd1 with text encoder": Case("sd1", "plain", {**TEXT, "clip_skip": 2, "trigger_word": "blue"}),
    "sd2 v-prediction": Case("sd2", "plain"),
    "sd2 with text encoder and zero terminal snr": Case("sd2", "plain", {**TEXT, "zero_terminal_snr": "on"}),
    "sdxl": Case("sdxl", "plain", {"flip_aug": True}),
    "sdxl with text encoders": Case("sdxl", "shapes", {**TEXT, "train_batch_size": 2}),
    "gradient accumulation": Case("sd1", "plain", {
        "gradient_accumulation_steps": 3, "weight_decay": 0.2, "max_grad_norm": 0.05}),
    "captions": Case("sd1", "plain", {**CAPTIONS, "max_train_steps": 6}),
    "captions with text encoder": Case("sd1", "plain", {**TEXT, **CAPTIONS, "train_batch_size": 2}),
    "noise": Case("sd1", "plain", {"noise_offset": 0.1, "min_snr_gamma": 2}),
    "fresh images": Case("sd1", "shapes", {**FRESH, "train_batch_size": 2}),
    "buckets and repeats": Case("sd1", "shapes", {"train_batch_size": 2, "max_train_epochs": 2, "max_train_steps": 0}),
    "no upscaling": Case("sd1", "shapes", {"bucket_no_upscale": True, "min_bucket_reso": 256, "cache_latents_to_disk": True}),
    "one size": Case("sd1", "plain", {"enable_bucket": False, "resolution": "128,64"}),
    "regularisation": Case("sd1", "shapes", {"reg_data_dir": "class", "prior_loss_weight": 0.4, "train_batch_size": 2}),
    "bf16": Case("sd1", "plain", {**TEXT, "mixed_precision": "bf16"}, tolerance=1e-2),
    "gradient checkpointing": Case("sd1", "plain", {**TEXT, "gradient_checkpointing": True}),
    "int8": Case("sd1", "plain", {"base_weights": "int8"}),
    "fp8": Case("sdxl", "plain", {"base_weights": "fp8"}),
    "channels last": Case("sd1", "shapes", {"channels_last": "on"}),
    "warm-up and restarts": Case("sd1", "plain", {
        "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2, "lr_warmup_steps": 2, "max_train_steps": 7}),
    "linear, no min-snr": Case("sd1", "plain", {
        "lr_scheduler": "linear", "unet_lr": 0.01, "min_snr_gamma": 0, "save_precision": "bf16"}),
    "network_weights": Case("sd1", "plain", TEXT, on_from_a_file),
    "rich": Case("sd1", "shapes", RICH),
    "rich, interrupted and resumed": Case("sd1", "shapes", RICH, interrupted, like="rich"),
    "sd1 with text encoder, lengthened": Case(
        "sd1", "plain", {**TEXT, "clip_skip": 2, "trigger_word": "blue"}, lengthened, like="sd1 with text encoder"),
    "two processes": Case("sd1", "shapes", {
        **RICH, "validation": False, "reg_data_dir": "class", "prior_loss_weight": 0.4}, in_two_processes),
}


# --- what a run gives -------------------------------------------------------------------------------------------------

def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of all tensors in the order of their names: name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def norm(tensors: Mapping[str, torch.Tensor], part: str) -> float:
    """The Euclidean norm of all tensors with `part` in their names, taken together."""
    return rounded(torch.cat([tensor.double().flatten() for name, tensor in tensors.items() if part in name]).norm().item())


def rounded(number: float) -> float:
    """To the eight digits that are worth recording."""
    return float(f"{number:.8g}")


def outcome(case: Case, material: Material) -> dict[str, object]:
    """What golden.json holds of a run."""
    output = material.new_folder()
    steps = case.way(case, material, output)
    assert [step for step, _ in steps] == list(range(1, len(steps) + 1))
    tensors = load_file(output / "golden.safetensors")
    return {"sha256": fingerprint(tensors), "lora_up": norm(tensors, "lora_up"), "lora_down": norm(tensors, "lora_down"),
            "losses": [rounded(loss) for _, loss in steps]}


def machine() -> dict[str, object]:
    """What the bytes of a run depend on beside its settings."""
    return {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu": cpu_name(), "threads": THREADS, "numpy": np.__version__, "pillow": PIL.__version__}


DECIDES = ("torch", "cpu_capability", "cpu", "threads")
"""Of `machine`: where one of these differs the bytes may, too."""


def cpu_name() -> str:
    """The CPU's name; on Linux with family and model, since virtual machines shorten names."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "model name" in about:
            return f"{about['model name']}, family {about.get('cpu family', '?')}, model {about.get('model', '?')}"
    return platform.processor() or platform.machine()


def record(path: Path) -> None:
    """Write to `path` what all cases give here. Each is run twice, the second time in another order and among other runs, and
    must give the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        material = Material.write(Path(folder))
        runs = {}
        for name, case in CASES.items():
            sys.stdout.write(f"{name}\n")
            runs[name] = outcome(case, material)
        for name in reversed(CASES):
            again = outcome(CASES[name], material)
            assert again == runs[name], f"{name} is not reproducible: {runs[name]} and {again}"
        checkpoints = material.fingerprints()
    for name, case in CASES.items():
        assert not case.like or runs[name] == runs[case.like], f"{name} is not {case.like}"
    content = {"machine": machine(), "checkpoints": checkpoints, "runs": runs}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# --- the tests --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden() -> dict[str, object]:
    """What was recorded."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Checkpoints and images, for all tests of this file."""
    return Material.write(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, object]]:
    """What the runs of this file gave so far, by the names of their cases."""
    return {}


def differences(recorded: Mapping[str, object]) -> dict[str, str]:
    """How this machine differs from that of the recording."""
    return {name: f"{name} is {value} and was {recorded.get(name)}" for name, value in machine().items()
            if value != recorded.get(name)}


def same_kernels(recorded: Mapping[str, object]) -> bool:
    """Whether bytes can be compared."""
    return not set(DECIDES) & differences(recorded).keys()


def explained(recorded: Mapping[str, object]) -> str:
    """The differences as a part of a sentence."""
    return "; ".join(differences(recorded).values()) or "versions and CPU are those of the recording"


def test_bytes_are_compared_on_this_machine(golden):
    """Skipped, and says why, where the other tests compare numbers only."""
    if not same_kernels(golden["machine"]):
        pytest.skip(f"only losses and norms are compared: {explained(golden['machine'])}")
    assert golden["runs"].keys() == CASES.keys()


def test_the_checkpoints_are_those_of_the_recording(golden, material):
    """Where they are not, no run can be."""
    if not same_kernels(golden["machine"]):
        pytest.skip("random numbers may be rounded differently here")
    assert material.fingerprints() == golden["checkpoints"], explained(golden["machine"])


@pytest.mark.parametrize("name", CASES)
def test_a_run_gives_what_was_recorded(golden, material, made, name):
    case, expected, recorded = CASES[name], golden["runs"][name], golden["machine"]
    found = made[name] = outcome(case, material)
    for number in NUMBERS:
        assert found[number] == pytest.approx(expected[number], rel=case.tolerance), (
            f"'{name}' differs from golden.json in {number} by more than {case.tolerance}; {explained(recorded)}")
    if same_kernels(recorded):
        assert found["sha256"] == expected["sha256"], (
            f"the tensors of '{name}' are no longer byte for byte those of golden.json; {explained(recorded)}")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.like])
def test_a_resumed_run_gives_what_an_uninterrupted_one_gives(material, made, name):
    """On every machine, byte for byte, whatever was recorded."""
    for one in (name, CASES[name].like):
        if one not in made:  # the test above was not among those that were asked for
            made[one] = outcome(CASES[one], material)
    assert made[name] == made[CASES[name].like]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=record.__doc__)
    parser.add_argument("--record", type=Path, metavar="OUT.json", required=True)
    record(parser.parse_args().record)
