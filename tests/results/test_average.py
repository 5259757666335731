"""The average of a run's saves, where the host finds it while a grid is sampled."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lora_train.errors import LoraFileError
from lib_lora_train.results.average import beside_others
from tests.results.written_run import Run


@pytest.mark.parametrize("name", ["zzk", "zzk [v2]", "日本 (1)"])
def test_another_lora_of_its_name_is_found_wherever_it_lies_and_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    run = Run(tmp_path)
    average = run.save(f"{name}-average", 4, value=1.0).rename(tmp_path / f"{name}-average.safetensors")
    other = run.host.lora_folder / "older" / average.name
    with beside_others(run.host, average) as path:
        assert path.read_bytes() == average.read_bytes() and path.parent != average.parent
    assert not path.exists()
    other.parent.mkdir()
    run.save(other.stem, 8, value=2.0).rename(other)
    with pytest.raises(LoraFileError), beside_others(run.host, average):
        pass
