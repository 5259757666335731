"""`bench speed`: what it measures and compares; no figure of time is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lib_lora_train.errors import SettingError, TrainingError
from lib_lora_train.host.standalone import StandaloneHost
from tools.bench import speed
from tools.bench.against import our_command
from tools.bench.command import main
from tools.bench.host import make_images
from tools.bench.roofline import Rates
from tools.bench.speed import PUBLISHED, Case, SpeedPlan, most_apart, run_speed
from tools.bench.timed_run import Measured, measure_run
from tools.bench.variants import variants_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes longer than the rest of these tests."""
    monkeypatch.setattr(speed, "measured_rates", lambda device, dtype: Rates(operations=1e11, bytes=1e10))


def plan(folder: Path, checkpoint: Path, *compared: str) -> SpeedPlan:
    return SpeedPlan(output=folder, device=CPU, cases=(Case("sd1", 64, 1),), compared=variants_of(compared), steps=3,
                     warm_up=2, rank=2, checkpoint=checkpoint,
                     changes={"min_bucket_reso": 64, "enable_bucket": False})


def test_stretches_of_several_steps_are_of_so_many_steps(host: StandaloneHost, tmp_path: Path) -> None:
    data = make_images(tmp_path / "made", side=64, count=3)
    run = measure_run(host, settings={"resolution": "64", "min_bucket_reso": 64, "network_dim": 2, "sample_images": False},
                      data=data, steps=9, warm_up=3, device=CPU, stretch=4)
    assert 2 <= len(run.wall) <= 3  # nine steps, a timestamp at every fourth call, the end
    assert len(run.cpu) == len(run.wall) and min(run.wall) > 0 and len(run.losses) == 12


def test_the_same_settings_twice_have_equal_losses(tiny_file: Path, tmp_path: Path) -> None:
    text = run_speed(plan(tmp_path, tiny_file, "defaults", "again:noise_offset=0"), say=lambda line: None)
    assert "differ by at most 0 of the loss in 5 steps: equal within float error" in text
    assert "times the roofline" not in text and "× roofline" in text
    written = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == ["defaults", "again"]
    assert [len(run["wall"]) for row in written["rows"] for run in row["runs"]] == [3, 3]  # each step after the warm-up
    assert (tmp_path / "speed.md").read_text(encoding="utf-8") == text


def test_losses_are_scored_only_where_the_settings_compute_the_same_and_a_run_that_fails_costs_no_others_figures(
        tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(host: object, *, settings: dict[str, object], **_: object) -> Measured:
        if settings["train_batch_size"] == "64":
            raise TrainingError("The memory ran out while training")
        return Measured((2.0,), (1.0,), (0.5 if settings["network_dim"] == 2 and "channels_last" not in settings else 0.6,), ())

    monkeypatch.setattr(speed, "measure_run", measured)
    text = run_speed(plan(tmp_path, tiny_file, "defaults", "large:train_batch_size=64", "channels_last", "rank:network_dim=4"),
                     say=lambda line: None)
    assert "large: **failed.** The memory ran out while training." in text
    assert "losses of channels_last and defaults differ by at most 0.2 of the loss in 1 steps: **not equal: more than" in text
    assert "losses of rank and defaults differ by at most 0.2 of the loss in 1 steps.\n" in text
    rows = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["rows"]
    assert [len(row["runs"]) for row in rows] == [1, 0, 1, 1] and "large ÷ defaults" not in text
    # Arithmetic of 64 times the images; more of it with a higher rank.
    rooflines = [row["roofline"]["arithmetic"] for row in rows]
    assert rooflines[1] == pytest.approx(64 * rooflines[0]) and rooflines[3] > rooflines[0] == rooflines[2]


def test_losses_apart_are_measured_relative_to_the_first() -> None:
    assert most_apart([1.0, 2.0, 4.0], [1.0, 2.5, 4.4]) == pytest.approx(0.25)


def test_what_to_compare_is_a_known_name_or_settings() -> None:
    assert variants_of(["eager", "x:train_batch_size=2,seed=3"]) == {
        "eager": {"cuda_graphs": "off"}, "x": {"train_batch_size": "2", "seed": "3"}}
    with pytest.raises(SettingError, match="nothing called 'fast'"):
        variants_of(["fast"])


def test_the_published_cases_are_those_that_targets_are_set_for() -> None:
    assert [case.name for case in PUBLISHED] == ["sd1 512² batch 1", "sd1 512² batch 4", "sdxl 1024² batch 1"]


def test_our_own_command_trains_what_the_outside_one_is_asked_for(tiny_file: Path, tmp_path: Path) -> None:
    words = our_command(plan(tmp_path, tiny_file), Case("sd1", 64, 2), data=tmp_path, checkpoint=tiny_file)
    for setting in ("train_batch_size=2", "network_dim=2", "network_alpha=2.0", "mixed_precision=no", "min_snr_gamma=0.0",
                    "max_train_steps={steps}", "resolution=64"):
        assert setting in words


def test_the_command_line_measures_beside_another_program(tiny_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_MININTERVAL", "0")  # our own bar shows even steps as short as these
    trainer = tmp_path / "other.py"
    trainer.write_text(
        "import sys\nsteps = int(sys.argv[1])\n"
        "for step in range(1, steps + 1):\n    print(f'|##| {step}/{steps} [00:00<00:00]', flush=True)\n"
        "    sum(range(100000))\n", encoding="utf-8")
    code = main(["speed", "--device", "cpu", "--checkpoint", str(tiny_file), "--resolution", "64", "--out",
                 str(tmp_path / "out"), "--steps", "8", "--pairs", "1", "--set", "enable_bucket=false", "--set",
                 "min_bucket_reso=64", "--against", f'"{_python()}" "{trainer.as_posix()}" {{steps}}'])
    text = capfd.readouterr().out
    assert code == 0
    (pair,) = json.loads((tmp_path / "out" / "against.json").read_text(encoding="utf-8"))["cases"][0]["pairs"]
    ours, theirs = pair["ours"]["wall"], pair["theirs"]["wall"]
    assert ours > 0 and theirs > 0
    assert f"ours ÷ theirs (clock): {ours / theirs:.3f};" in text
    assert f"time per step: {'met' if ours / theirs <= 0.9 else '**missed**'}" in text


def _python() -> str:
    import sys
    return Path(sys.executable).as_posix()


def test_the_command_line_writes_a_random_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "sd1", "--size", "small", "--out", str(tmp_path)]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
