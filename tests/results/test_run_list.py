"""The list of runs, quick for hundreds; and deleting, which touches nothing but what it says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from lib_lora_train import events
from lib_lora_train.errors import HostError, LoraFileError
from lib_lora_train.results import run_list
from lib_lora_train.results.run_list import delete_runs, deletion, disk_use, listed
from tests.fake_host import FakeHost
from tests.results.written_run import Run


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def written(host: FakeHost, number: int) -> Run:
    run = Run(host.lora_folder.parent, host, run=f"zzk{number}-20261121-12000{number}", values={"output_name": f"zzk{number}"})
    run.tell(events.Measured(50, 1, (), (), (0.3,), (0.4,), {}))
    run.save(f"zzk{number}-000001", 50)
    run.sample(50)
    run.save(f"zzk{number}", 100, final=True, value=2.0)
    run.tell(events.Finished("done", "It is saved.", "", 100, "healthy"))
    run.record.close()
    os.utime(run.folder / "settings.toml", (number, number))
    return run


def test_runs_are_listed_newest_first_in_parts_and_read_once(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [written(host, number) for number in range(5)]
    first, second = (listed(host.runs_folder, offset=offset, count=3) for offset in (0, 3))
    assert [run["id"] for run in (*first["runs"], *second["runs"])] == [run.folder.name for run in reversed(runs)]
    one = first["runs"][0]
    assert (first["total"], one["outcome"], one["verdict"], one["file"]) == (5, "done", "healthy", "samples/0-50.png")
    assert (one["save"], one["scores"]["held_out_gain"]) == ("zzk4-000001", pytest.approx(25))
    assert one["size"] == sum(path.stat().st_size for path in runs[4].folder.rglob("*") if path.is_file())
    loras = list(host.lora_folder.glob("*.safetensors"))
    assert disk_use(host.runs_folder)["lora_size"] == sum(path.stat().st_size for path in loras)
    monkeypatch.setattr(run_list, "past_run", lambda folder: pytest.fail("it was read before"))
    assert listed(host.runs_folder, count=3) == first
    json.dumps(first, allow_nan=False)


def test_a_run_is_deleted_with_its_files_but_its_lora_only_where_that_is_asked_for(host: FakeHost) -> None:
    one, other = written(host, 1), written(host, 2)
    before = {path.name for path in host.lora_folder.iterdir()}
    found = deletion(host.runs_folder, [one.folder.name], with_loras=False)
    assert found.freed == run_list.folder_size(one.folder) > 0 and one.folder.exists()
    delete_runs(found, host)
    assert not one.folder.exists() and {path.name for path in host.lora_folder.iterdir()} == before
    # Somebody put another LoRA in the place of a save.
    (host.lora_folder / "zzk2-000001.safetensors").write_bytes(b"another")
    found = deletion(host.runs_folder, [other.folder.name], with_loras=True)
    assert [lora.name for lora in found.loras] == ["zzk2.safetensors"]
    delete_runs(found, host)
    assert {path.name for path in host.lora_folder.iterdir()} == before - {"zzk2.safetensors"}
    assert list(host.runs_folder.iterdir()) == []


def test_the_lora_that_another_run_of_the_name_wrote_just_before_or_after_is_not_deleted(host: FakeHost) -> None:
    def made(number: int, *saves: tuple[str, int]) -> Run:
        run = Run(host.lora_folder.parent, host, run=f"zzk-20261121-12000{number}")
        for stem, step in saves:
            run.save(stem, step, final=stem == "zzk")
        run.record.close()
        return run

    def loras(run: Run) -> list[str]:
        return [lora.name for lora in deletion(host.runs_folder, [run.folder.name], with_loras=True).loras]

    before, under_test = made(1, ("zzk", 50)), made(2, ("zzk-000001", 50))
    assert (loras(before), loras(under_test)) == (["zzk.safetensors"], ["zzk-000001.safetensors"])
    after = made(3, ("zzk", 50))
    assert (loras(before), loras(under_test), loras(after)) == ([], ["zzk-000001.safetensors"], ["zzk.safetensors"])


def test_the_list_knows_at_once_that_a_save_is_gone(host: FakeHost) -> None:
    written(host, 1)
    assert listed(host.runs_folder)["runs"][0]["lora_size"] > 0
    for path in host.lora_folder.glob("*.safetensors"):
        path.unlink()
    one = listed(host.runs_folder)["runs"][0]
    assert (one["save"], one["lora_size"]) == ("", 0)


def test_what_is_under_way_or_queued_to_go_on_is_not_deleted(host: FakeHost) -> None:
    under_way = Run(host.lora_folder.parent, host, run="zzk-20261121-120000")
    with pytest.raises(HostError):
        deletion(host.runs_folder, [under_way.folder.name], with_loras=False)
    under_way.record.close()
    queue = host.runs_folder / "queue.json"
    for state in ("waiting", "running"):
        queue.write_text(json.dumps({"entries": [{"run": under_way.folder.name, "state": state}]}), encoding="utf-8")
        with pytest.raises(HostError):
            deletion(host.runs_folder, [under_way.folder.name], with_loras=False)
    queue.unlink()
    assert deletion(host.runs_folder, [under_way.folder.name], with_loras=False).folders == (under_way.folder,)


def test_no_path_and_no_link_leads_a_deletion_elsewhere(host: FakeHost, tmp_path: Path) -> None:
    run, outside = written(host, 1), tmp_path / "outside"
    outside.mkdir()
    for name in ("settings.toml", "precious.txt"):
        (outside / name).write_text("", encoding="utf-8")
    for spelt in ("", ".", "..", "../outside", str(outside), str(run.folder), f"{run.folder.name}/.", f"./{run.folder.name}",
                  "nowhere", "queue.json", f"{run.folder.name}/samples", f"{run.folder.name}\\..", "a\0b"):
        with pytest.raises(LoraFileError):
            deletion(host.runs_folder, [spelt], with_loras=True)
    if sys.platform != "win32":  # links need a right there
        (host.runs_folder / "link").symlink_to(outside)
        (host.runs_folder / "alias").symlink_to(run.folder)
        for name in ("link", "alias"):
            with pytest.raises(LoraFileError):
                deletion(host.runs_folder, [name], with_loras=True)
        (run.folder / "inside").symlink_to(outside)
        (run.folder / "samples" / "deep").symlink_to(outside)
        assert listed(host.runs_folder)["total"] == 1
    delete_runs(deletion(host.runs_folder, [run.folder.name], with_loras=True), host)
    assert not run.folder.exists() and (outside / "precious.txt").exists()


def test_a_deletion_that_fails_half_way_leaves_the_run_in_the_list(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    run = written(host, 1)

    def refuse(path: Path) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(run_list.shutil, "rmtree", refuse)
    with pytest.raises(Exception, match="disk"):
        delete_runs(deletion(host.runs_folder, [run.folder.name], with_loras=False), host)
    monkeypatch.undo()
    assert [one["id"] for one in listed(host.runs_folder)["runs"]] == [run.folder.name]
    delete_runs(deletion(host.runs_folder, [run.folder.name], with_loras=False), host)
    assert listed(host.runs_folder) == {"total": 0, "runs": []}
