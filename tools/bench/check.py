"""`bench check`: what a GPU has to show before anything is on by default, in one run of at most eight minutes.

Each check is on its own: one that fails is told and the next begins, one that loses the GPU or ends the process is told and the
others go on in a new process. A line of JSON for each is written as soon as it is known, so that what was measured is there
whatever happens later. What the figures justify as a default is said at the end.

Models have the published sizes and random weights, made on the spot. On a CPU (`--device cpu`) the same checks run on narrow
models for a few steps: they prove nothing but that the script works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from lib_lora_train.memory.plan import CONTEXT, GIGABYTE
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.quantised import quantise
from lib_lora_train.settings.field import Value
from lib_lora_train.training import loop
from tools.bench.host import RandomHost, make_images
from tools.bench.memory import ON_GPU, PLANS, SWAP, planned
from tools.bench.report import machine_text
from tools.bench.speed import Case, shared_settings
from tools.bench.timed_run import Measured, limited_gpu, measure_run
from tools.bench.training import Say
from tools.bench.variants import VARIANTS
from tools.bench.yielding import YieldingHost

SECONDS = 8 * 60.0
FILE_NAME = "check.jsonl"
SAME_LOSS = 5e-3  # relative, over all steps of two runs that should compute the same
PAYS = 1.05  # so many times as fast a way has to be to become the default
SWAP_COSTS = 1.5  # times as long a step with all blocks swapped may take, for the memory plan to swap by itself
_HEADS = (40, 64, 80, 160)
_LOST = 3  # the exit code of a process whose GPU does not answer any more

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CheckPlan:
    """Where and on what to check; `small` is the same on narrow models, a few steps each."""

    output: Path
    device: torch.device
    small: bool
    precision: str
    seconds: float = SECONDS
    only: tuple[str, ...] = ()
    rank: int = 16

    @property
    def steps(self) -> int:
        """Of a run that is timed or compared, after its warm-up."""
        return 3 if self.small else 50

    @property
    def warm_up(self) -> int:
        """Steps that are not timed."""
        return 1 if self.small else 10


class Checks:
    """The checks by name, in the order of what is most worth knowing, with what they share."""

    def __init__(self, plan: CheckPlan) -> None:
        self.plan, self.cuda = plan, plan.device.type == "cuda"
        self._held: tuple[str, RandomHost] | None = None
        side = (64, 64) if plan.small else (512, 1024)
        self.sd1, self.sd1_batch, self.sdxl = Case("sd1", side[0], 1), Case("sd1", side[0], 4), Case("sdxl", side[1], 1)
        self.by_name: dict[str, Callable[[], Figures]] = {"kernels": self.kernels, "eight bits": self.eight_bits}
        for case in (self.sd1, self.sdxl, self.sd1_batch):
            self.by_name[f"graphs, {case.name}"] = functools.partial(self.graphs, case)
        for case in (self.sdxl, self.sd1):
            self.by_name[f"swapping, {case.name}"] = functools.partial(self.swapping, case)
        for case in (self.sd1, self.sdxl):
            self.by_name[f"memory, {case.name}"] = functools.partial(self.memory, case)
        for case, gigabytes in ((self.sdxl, 8), (self.sdxl, 6), (self.sd1, 4), (self.sdxl, 12)):
            self.by_name[f"within {gigabytes} GB, {case.name}"] = functools.partial(self.within, case, gigabytes)
        for case, gigabytes in ((self.sdxl, 6), (self.sd1, 3)):
            name = f"within {gigabytes} GB by swapping, {case.name}"
            self.by_name[name] = functools.partial(self.within, case, gigabytes, SWAP)
        self.by_name |= {"overflow in a replay": self.overflow, "capture beside another thread": self.beside_another_thread,
                         "hand-over to a generation": self.generation, "five runs in a row": self.five_runs,
                         f"channels last, {self.sd1.name}": functools.partial(self.channels_last, self.sd1),
                         f"channels last, {self.sdxl.name}": functools.partial(self.channels_last, self.sdxl)}

    def kernels(self) -> Figures:
        """Attention at each head size and the backward of a convolution, against the same in double precision on the CPU: the
        error relative to the largest number."""
        dtype = torch.float16 if self.cuda else torch.float32
        found, generator = {}, torch.Generator().manual_seed(0)

        def both(compute: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> float:
            inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
            results = []
            for device, kind in ((self.plan.device, dtype), (torch.device("cpu"), torch.float64)):
                given = [tensor.detach().clone().to(device, kind).requires_grad_() for tensor in inputs]
                result = compute(*given)
                result.float().square().mean().backward()
                results.append([tensor.detach().double().cpu() for tensor in (result, given[0].grad)])
            return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))

        for head in _HEADS:
            found[f"attention {head}"] = both(F.scaled_dot_product_attention, *[(1, 2, 256, head)] * 3)
        weight = torch.randn(64, 32, 3, 3, generator=generator).to(dtype)

        def convolution(x: torch.Tensor) -> torch.Tensor:
            return frozen_conv2d(x, weight.to(x.device, x.dtype), None, stride=1, padding=1)

        found["convolution"] = both(convolution, (2, 32, 32, 32))
        return {"errors": found, "ok": max(found.values()) < (2e-2 if dtype == torch.float16 else 1e-4)}

    def eight_bits(self) -> Figures:
        """A linear layer with int8 and fp8 weights against the exact one: the relative error of the output."""
        found = {}
        weight, x = torch.randn(640, 640), torch.randn(256, 640)
        exact = x @ weight.T
        for kind in ("int8", "fp8"):
            held = quantise(weight.to(self.plan.device), kind)
            approximate = x.to(self.plan.device) @ held.dense(torch.float32).T
            found[kind] = float((approximate.cpu() - exact).norm() / exact.norm())
        return {"errors": found, "ok": found["int8"] < 0.02 and found["fp8"] < 0.05}

    def graphs(self, case: Case) -> Figures:
        """Steps as written and captured: seconds, losses, and what eager steps and captured ones take of the memory."""
        eager, captured = (self._run(case, VARIANTS[name]) for name in ("eager", "graphs"))
        return {"seconds": {"eager": eager.seconds, "graphs": captured.seconds},
                "times as fast": eager.seconds / captured.seconds, **_losses(eager, captured),
                "bytes": {"eager": _bytes(eager), "graphs": _bytes(captured)}, "notes": list(captured.notes)}

    def channels_last(self, case: Case) -> Figures:
        """Convolutions' weights in NHWC order and not: seconds and losses."""
        first, last = (self._run(case, VARIANTS[name]) for name in ("channels_first", "channels_last"))
        return {"seconds": {"channels_first": first.seconds, "channels_last": last.seconds},
                "times as fast": first.seconds / last.seconds, **_losses(first, last)}

    def swapping(self, case: Case) -> Figures:
        """All of the UNet's blocks swapped and none: seconds, losses and bytes. Without a GPU nothing is swapped."""
        resident, swapped = (self._run(case, VARIANTS[name]) for name in ("eager", "swapped"))
        ratio = {"times as long": swapped.seconds / resident.seconds} if self.cuda else {}
        return {"seconds": {"resident": resident.seconds, "swapped": swapped.seconds}, **ratio, **_losses(resident, swapped),
                "bytes": {"resident": _bytes(resident), "swapped": _bytes(swapped)}}

    def memory(self, case: Case) -> Figures:
        """What the memory plan predicts for each way, and what torch gave out at most in its steps."""
        found = {}
        for name, settings in (PLANS | ON_GPU if self.cuda else PLANS).items():
            predicted = planned(self._host(case).outline().tensors, case, settings=settings, device_type=self.plan.device.type,
                                precision=self.plan.precision, rank=self.plan.rank)
            found[name] = {"predicted": predicted.bytes - CONTEXT, "allocated": _bytes(self._run(case, settings, steps=5))}
        errors = {name: one["predicted"] / one["allocated"] - 1 for name, one in found.items() if one["allocated"]}
        return {"bytes": found, "errors": errors, "ok": all(-0.05 < error < 0.25 for error in errors.values())}

    def within(self, case: Case, gigabytes: int, settings: Mapping[str, Value] = MappingProxyType({})) -> Figures:
        """A whole run as on a GPU of so many GB, encoding of images and captions included."""
        limit = limited_gpu(self.plan.device, gigabytes) if self.cuda else contextlib.nullcontext()
        with limit:
            run = self._run(case, {"memory_budget": float(gigabytes), **settings}, steps=10)
        most = run.gpu.run_reserved + CONTEXT if run.gpu else 0
        return {"seconds": run.seconds, "gigabytes": most / GIGABYTE, "ok": most <= gigabytes * GIGABYTE}

    def overflow(self) -> Figures:
        """Captured steps of which the first overflow: they are skipped, and the others learn."""
        scaler = functools.partial(_first_overflowing, loop.LossScaler)
        with mock.patch.object(loop, "LossScaler", scaler):
            run = self._run(self.sd1, VARIANTS["graphs"] | {"mixed_precision": "fp16" if self.cuda else "no"})
        good = sum(map(_is_finite, run.losses))
        return {"finite losses": good, "steps": len(run.losses), "ok": _is_finite(run.losses[-1])}

    def beside_another_thread(self) -> Figures:
        """Captured steps while another thread computes, waits for the GPU and empties torch's cache, as another tab may."""
        alone = self._run(self.sd1, VARIANTS["graphs"])
        with self._other_thread() as rounds:
            beside = self._run(self.sd1, VARIANTS["graphs"])
        return {**_losses(alone, beside), "rounds of the other": len(rounds), "notes": list(beside.notes)}

    def generation(self) -> Figures:
        """The model released to somebody else after each third of the steps; then it is in another place of the memory."""
        alone = self._run(self.sd1, VARIANTS["graphs"])
        host = YieldingHost(self._host(self.sd1), every=2 if self.plan.small else 20)
        interrupted, found = self._run(self.sd1, VARIANTS["graphs"], host=host), host.leased.yielded
        losses = _losses(alone, interrupted)
        return {**losses, "yielded": found, "ok": bool(found) and losses["ok"]}

    def five_runs(self) -> Figures:
        """What is free of the GPU after each of five runs: nothing may be left behind."""
        free = []
        for _ in range(2 if self.plan.small else 5):
            self._run(self.sd1, VARIANTS["graphs"], steps=5)
            self._clean()
            free.append(torch.cuda.mem_get_info(self.plan.device)[0] if self.cuda else 0)
        return {"free": free, "ok": free[0] - free[-1] < 64 << 20}

    def _host(self, case: Case) -> RandomHost:
        """The same weights for all runs of a family; those of another one leave the memory."""
        if self._held is None or self._held[0] != case.family:
            self._held = None
            self._clean()
            self._held = case.family, RandomHost(case.family, folder=self.plan.output, device=self.plan.device,
                                                 dtype=_dtype(self.plan), small=self.plan.small)
        return self._held[1]

    def _run(self, case: Case, settings: Mapping[str, Value], *, steps: int = 0, host: RandomHost | None = None) -> Measured:
        plan = self.plan
        self._clean()
        shared = shared_settings(case, rank=plan.rank, precision=plan.precision)
        if plan.small:
            shared |= {"min_bucket_reso": 64}
        steps = min(steps, plan.steps) or plan.steps
        return measure_run(host or self._host(case), settings={**shared, **settings},
                           data=self._images(case.resolution), steps=steps, warm_up=plan.warm_up, device=plan.device,
                           stretch=1 if plan.small else max(1, steps // 5))

    @functools.cache  # noqa: B019 - one object a process; each call would draw others
    def _images(self, side: int) -> Path:
        return make_images(self.plan.output / f"pictures-{side}", side=side, count=4)

    def _clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _other_thread(self) -> Iterator[list[float]]:
        ended, rounds = threading.Event(), list[float]()

        def compute() -> None:
            while not ended.wait(0.01):
                square = torch.randn(512, 512, device=self.plan.device)
                rounds.append(float((square @ square).mean()))
                self._clean()

        thread = threading.Thread(target=compute, daemon=True)
        thread.start()
        try:
            yield rounds
        finally:
            ended.set()
            thread.join()


def run_check(plan: CheckPlan, *, command: tuple[str, ...]) -> str:
    """Check, and return what was found; the lines are in `plan.output`/check.jsonl. `command` is this program's, which is
    started for the checks, and anew after one that ended it."""
    plan.output.mkdir(parents=True, exist_ok=True)
    file = plan.output / FILE_NAME
    file.unlink(missing_ok=True)
    begin, remaining = time.monotonic(), [name for name in Checks(plan).by_name if name in plan.only or not plan.only]
    while remaining and (left := plan.seconds - (time.monotonic() - begin)) > 0:
        code = subprocess.run([*command, "--seconds", f"{left:.0f}", *[word for name in remaining for word in ("--only", name)],
                               "--in-this-process"], check=False).returncode
        done = {line["check"] for line in read_lines(file)}
        ended = next((name for name in remaining if name not in done), None)
        if ended and code:
            _write(file, {"check": ended, "failed": f"the process ended with {code}"})
            done.add(ended)
        remaining = [name for name in remaining if name not in done]
        if not code:
            break
    for name in remaining:
        _write(file, {"check": name, "skipped": f"no time was left of {plan.seconds:.0f} seconds"})
    text = summary(read_lines(file), machine_text(plan.device))
    (plan.output / "check.md").write_text(text, encoding="utf-8")
    return text


def check_here(plan: CheckPlan, *, say: Say) -> int:
    """Run the plan's checks in this process, a line each; returns the exit code."""
    file, begin, checks = plan.output / FILE_NAME, time.monotonic(), Checks(plan)
    for name in plan.only:
        if time.monotonic() - begin > plan.seconds:
            return 0
        say(f"{name} ...")
        started = time.monotonic()
        try:
            line: Figures = {"check": name, **checks.by_name[name]()}
        except Exception as error:  # noqa: BLE001 - told, and the next check has its turn
            line = {"check": name, "failed": f"{type(error).__name__}: {error}"[:500]}
        _write(file, {**line, "took": round(time.monotonic() - started, 1)})
        try:
            if checks.cuda:
                torch.cuda.synchronize(plan.device)
        except RuntimeError:
            return _LOST
    return 0


def read_lines(file: Path) -> list[Figures]:
    """The lines that were written so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def summary(lines: list[Figures], machine: str) -> str:
    """What was found in words: each check, then what the figures say about defaults."""
    said = [machine, ""]
    for line in lines:
        result = line.get("failed") or line.get("skipped")
        figures = {key: value for key, value in line.items() if key not in ("check", "failed", "skipped", "ok", "took")}
        verdict = next((word for word in ("failed", "skipped") if word in line), "ok" if line.get("ok", True) else "NOT OK")
        said.append(f"- {line['check']}: {verdict}. {result or json.dumps(_rounded(figures))}")
    said += ["", "Defaults that these figures justify:"]
    for setting, of in (("cuda_graphs", "graphs"), ("channels_last", "channels last")):
        said.append(_default(lines, setting, ("on", "off"), of=of, ratio="times as fast", pays=lambda faster: faster >= PAYS))
    said.append(_default(lines, "blocks_to_swap", ("all", "none"), of="swapping", ratio="times as long",
                         pays=lambda longer: longer <= SWAP_COSTS))
    return "\n".join(said) + "\n"


def _default(lines: list[Figures], setting: str, words: tuple[str, str], *, of: str, ratio: str,
             pays: Callable[[float], bool]) -> str:
    known = [line for line in lines if line["check"].startswith(of) and ratio in line]
    justified = bool(known) and all(line["ok"] and pays(line[ratio]) for line in known)
    ratios = ", ".join(f"{line[ratio]:.2f} ({line['check'].partition(', ')[2]})" for line in known)
    return f"- {setting} = {words[not justified]}: {ratios or 'not measured'} {ratio}"


def _write(file: Path, line: Figures) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def _losses(one: Measured, other: Measured) -> Figures:
    """How far the losses of two runs are apart at most, relative; and whether that is as good as nothing."""
    apart = max((abs(a - b) / max(abs(a), 1e-6) for a, b in zip(one.losses, other.losses, strict=True)), default=0.0)
    return {"losses apart": apart, "ok": apart <= SAME_LOSS}


def _bytes(run: Measured) -> int:
    return run.gpu.steps_allocated if run.gpu else 0


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _dtype(plan: CheckPlan) -> torch.dtype:
    return torch.float16 if plan.device.type == "cuda" else torch.float32


def _first_overflowing(scaler: type, device: torch.device, *, enabled: bool, initial: float) -> Any:
    """A loss scaler that begins so high that the first steps overflow."""
    return scaler(device, enabled=enabled, initial=initial * 2.0**20)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
