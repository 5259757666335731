"""The commands `sweep`, `compare` and `runs delete`, one after the other on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib_lora_train.__main__ import main
from lib_lora_train.host import standalone


def test_a_sweep_is_trained_compared_and_deleted(
        tiny_file: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return main(list(map(str, arguments))), *capfd.readouterr()

    reads, load = [], standalone._load
    monkeypatch.setattr(standalone, "_load", lambda path: reads.append(path) or load(path))
    out = tmp_path / "out"
    given = ["resolution=64", "min_bucket_reso=64", "max_train_steps=1", "sample_images=false"]
    sweep = ["sweep", "--checkpoint", tiny_file, "--data", images, "--name", "zzk", "--output-dir", out,
             *(word for text in given for word in ("--set", text)), "--vary", "seed=1,2"]
    code, _, told = run(*sweep, "--vary", "network_dim=2,many")
    assert code == 2 and "network_dim" in told and not out.exists()
    assert run(*sweep, "--vary", "network_dim=2,3", "--dry-run")[0] == 0
    assert not (out / "runs").exists() and not reads
    code, table, told = run(*sweep, "--vary", "network_dim=2,3")
    assert code == 0, told
    assert sorted(path.stem for path in out.glob("*.safetensors")) == [
        f"zzk-seed_{seed}-network_dim_{dim}" for seed in (1, 2) for dim in (2, 3)]
    assert len(reads) == 1 and "network_dim" in table and "± " in table
    found = json.loads(run("compare", "--sweep", "zzk", "--output-dir", out, "--json")[1])
    assert [(row["settings"], [one["seed"] for one in row["runs"]]) for row in found["rows"]] == [
        ({"network_dim": 2}, [1, 2]), ({"network_dim": 3}, [1, 2])]

    ids = [one["run"] for row in found["rows"] for one in row["runs"]]
    code, _, told = run("runs", "delete", ids[0], "--output-dir", out)
    assert code == 2 and "--yes" in told  # nobody can be asked
    assert run("runs", "delete", ids[0], ids[1], "--output-dir", out, "--yes", "--loras")[0] == 0
    assert sorted(path.name for path in (out / "runs").iterdir()) == sorted(ids[2:])
    assert sorted(path.stem for path in out.glob("*.safetensors")) == [f"zzk-seed_{seed}-network_dim_3" for seed in (1, 2)]
