"""The command line as a user calls it: exit codes, one sentence for bad input, one JSON event a line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train import events
from lib_lora_train.__main__ import main
from lib_lora_train.settings import DECLARATIONS

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--set", "resolution=64", "--set", "min_bucket_reso=64", "--set", "network_dim=2", "--set", "num_repeats=1",
         "--set", "sample_images=false", "--set", "validation=false"]


Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lib_lora_train", *map(str, arguments)]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """A command in this process, which saves three seconds of imports: its exit code, and all that it writes."""
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        return subprocess.CompletedProcess(arguments, main(list(map(str, arguments))), *capfd.readouterr())
    return run


def lines(output: str) -> list[events.Event]:
    return [events.from_dict(json.loads(line)) for line in output.splitlines()]


@pytest.fixture
def train(tiny_file: Path, images: Path, tmp_path: Path) -> list[object]:
    return ["train", "--checkpoint", tiny_file, "--data", images, "--name", "zzk", "--output-dir", tmp_path / "out", *SMALL]


def test_a_run_ends_with_0_a_file_and_nothing_but_events_on_stdout(run, train, tmp_path):
    done = run(*train, "--set", "max_train_epochs=1", "--json")
    assert done.returncode == 0, done.stderr
    seen = lines(done.stdout)
    assert seen[-1] == events.Finished("done", seen[-1].message, str(tmp_path / "out" / "zzk.safetensors"), 4, "healthy")
    assert (tmp_path / "out" / "zzk.safetensors").is_file()
    card = json.loads((tmp_path / "out" / "zzk.json").read_bytes())  # as of a run of the page
    assert card["description"].startswith("Step 4, epoch 1; trained for 4 on tiny")


def test_a_configuration_file_is_read_and_the_command_line_has_the_last_word(run, train, tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nnetwork_dim = 8\nmax_train_steps = 9\nseed = 5\n", encoding="utf-8")
    done = run(*train, "--config", tmp_path / "run.toml", "--set", "max_train_steps=2", "--json")
    assert done.returncode == 0, done.stderr
    planned, = [e for e in lines(done.stdout) if isinstance(e, events.Planned)]
    assert (planned.steps, planned.seed) == (2, 5)
    told = json.loads(run("inspect", tmp_path / "out" / "zzk.safetensors", "--json").stdout)
    assert (told["rank"], told["family"], told["hash_ok"], told["components"]) == (2, "sd1", True, {"unet": 72})
    record, = (tmp_path / "out" / "runs").iterdir()
    assert {f.name for f in record.iterdir()} == {"settings.toml", "events.jsonl", "images.json", "report.html", ".lock"}


@pytest.mark.parametrize("more, word", [
    (["--set", "network_dimm=3"], "network_dim"), (["--set", "network_dim"], "name=value"), (["--data", "nowhere"], "nowhere"),
    (["--checkpoint", "model.ckpt"], "pickled"), (["--config", "missing.toml"], "missing.toml"), (["--name", "a/b"], "a/b"),
    (["--resume", "nowhere"], "no run "), (["--output-dir", __file__], "output folder")])
def test_bad_input_is_one_sentence_and_2(run, train, more, word):
    done = run(*train, *more)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0 and word in done.stderr


def test_the_program_ends_with_that_exit_code_and_without_a_traceback(train):
    done = subprocess.run(command(*train, "--set", "network_dimm=3"), cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0 and "network_dim" in done.stderr and "Traceback" not in done.stderr


def test_a_name_that_cannot_be_a_file_leaves_no_record(run, train, tmp_path):
    assert run(*train, "--name", "../../elsewhere").returncode == 2
    assert not list(tmp_path.glob("**/*elsewhere*"))


def test_a_folder_without_runs_is_told_and_not_an_empty_answer(run, tmp_path):
    listed = run("runs", "--output-dir", tmp_path / "elsewhere", "--json")
    assert listed.returncode == 0 and json.loads(listed.stdout) == [] and "elsewhere" in listed.stderr


def test_a_runs_folder_or_its_name_is_enough_for_its_report_and_its_samples(run, tmp_path):
    folder = tmp_path / "runs" / "zzk-20261121-154501"
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "samples" / "1.png")
    (folder / "settings.toml").write_text('output_name = "zzk"\n', encoding="utf-8")
    sampled = events.Sampled(3, 1, 0, "a red cat", 7, "samples/1.png")
    (folder / "events.jsonl").write_text(json.dumps(events.to_dict(sampled)) + "\n", encoding="utf-8")
    told = run("samples", folder.name, "--output-dir", tmp_path, "--json", "--sheet", tmp_path / "sheet.png")
    shown, = json.loads(told.stdout)
    assert (told.returncode, shown["prompt"]) == (0, "a red cat")
    assert [(one["step"], one["file"], one["seed"]) for one in shown["pictures"]] == [(3, "samples/1.png", 7)]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert any(rgb == (255, 0, 0) for _, rgb in sheet.getcolors(1 << 16))
    assert run("report", folder, "--out", tmp_path / "r.html").returncode == 0
    assert "a red cat" in (tmp_path / "r.html").read_text(encoding="utf-8")
    for command in ("samples", "report"):
        refused = run(command, "nowhere", "--output-dir", tmp_path)
        assert refused.returncode == 2 and refused.stderr.strip().count("\n") == 0 and "nowhere" in refused.stderr


def test_the_saves_of_a_run_are_painted_and_one_of_them_becomes_the_lora(run, train, tiny_file, tmp_path, caplog):
    done = run(*train, "--set", "max_train_steps=2", "--set", "save_every_n_steps=1", "--set", "validation=true")
    assert done.returncode == 0 and "zzk is saved" in done.stdout and "What shows the work failed" not in caplog.text
    folder, = (tmp_path / "out" / "runs").iterdir()
    (tmp_path / "prompts.txt").write_text("a red cat\n\n", encoding="utf-8")
    grid = "grid", folder, "--checkpoint", tiny_file, "--prompts", tmp_path / "prompts.txt", "--seeds", 1, "--steps", 1
    told = run(*grid, "--saves", "zzk-step00000001", "--weights", "0.5,1", "--json")
    assert told.returncode == 0, told.stderr
    painted = json.loads(told.stdout)
    columns = [(one["save"], one["weight"]) for one in painted["columns"]]
    assert columns == [("", 0), ("zzk-step00000001", 0.5), ("zzk-step00000001", 1)]
    assert [prompt["text"] for prompt in painted["prompts"]] == ["a red cat"]
    assert len(painted["cells"]) == 3 and all((folder / cell["file"]).is_file() for cell in painted["cells"])
    assert json.loads(run("scores", folder, "--json").stdout) == painted["scores"]
    assert len(painted["scores"]["columns"]) == 3 and len(run("scores", folder).stdout.splitlines()) == 4
    assert json.loads(run("recommend", folder, "--json").stdout)["save"] == "zzk-step00000001"
    refused = run(*grid, "--saves", "nowhere")
    assert refused.returncode == 2 and refused.stderr.strip().count("\n") == 0 and "nowhere" in refused.stderr
    file = tmp_path / "out" / "zzk.safetensors"
    assert json.loads(run("inspect", file, "--json").stdout)["metadata"]["ss_steps"] == "2"
    told = run("take", folder, "zzk-step00000001", "--weight", "0.5", "--json")
    assert told.returncode == 0 and json.loads(told.stdout)["lora_text"] == "<lora:zzk:0.5>"
    assert json.loads(run("inspect", file, "--json").stdout)["metadata"]["ss_steps"] == "1"


def test_the_demos_model_cannot_be_copied_into_a_file_and_says_so(run, tmp_path):
    (tmp_path / "file").touch()
    done = run("demo", "--copy-model", tmp_path / "file")
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and "while the demo was made" in done.stderr


def test_inspecting_something_else_is_one_sentence_and_2(run, tmp_path):
    (tmp_path / "text.safetensors").write_text("no such thing", encoding="utf-8")
    done = run("inspect", tmp_path / "text.safetensors")
    assert done.returncode == 2 and "text.safetensors" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells of a closed pipe by another error")
def test_a_training_whose_output_nobody_reads_any_more_goes_on(run, train, tmp_path):
    process = subprocess.Popen(command(*train, "--set", "max_train_steps=3", "--json"), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        process.wait()
    assert process.returncode == 0 and "BrokenPipe" not in said and (tmp_path / "out" / "zzk.safetensors").is_file()
    listed, = json.loads(run("runs", "--output-dir", tmp_path / "out", "--json").stdout)
    assert (listed["outcome"], listed["steps"]) == ("done", 3)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl+C to the whole console")
def test_ctrl_c_ends_with_130_and_keeps_what_was_learnt(run, train, tmp_path):
    process = subprocess.Popen(command(*train, "--set", "max_train_steps=100000", "--json"), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)  # whatever happens here: nobody waits for it longer than this test may take
        for line in process.stdout:
            event = events.from_dict(json.loads(line))
            if isinstance(event, events.Step):
                process.send_signal(signal.SIGINT)
                break
        last = lines(process.stdout.read())[-1]
        process.wait()
    assert process.returncode == 130
    assert isinstance(last, events.Finished) and last.outcome == "stopped"
    assert (tmp_path / "out" / "zzk.safetensors").is_file()
    listed, = json.loads(run("runs", "--output-dir", tmp_path / "out", "--json").stdout)
    assert (listed["outcome"], listed["resume_step"], listed["total"]) == ("stopped", last.steps, 100000)
    # All settings are the run's own; only its length is given anew.
    more = run("train", "--checkpoint", train[2], "--output-dir", tmp_path / "out", "--resume", listed["id"], "--json",
               "--set", f"max_train_steps={last.steps + 1}")
    assert more.returncode == 0, more.stderr
    assert [e.step for e in lines(more.stdout) if isinstance(e, events.Step)] == [last.steps + 1]
    listed, = json.loads(run("runs", "--output-dir", tmp_path / "out", "--json").stdout)
    assert (listed["outcome"], listed["steps"], listed["resume_step"]) == ("done", last.steps + 1, None)


def test_a_file_of_kohyas_trains_and_its_settings_are_told_as_events(run, train, tmp_path):
    text = 'cache_latents = true\nlr_warmup_steps = 0.5\noptimizer_type = "AdamW8bit"\n'
    (tmp_path / "k.toml").write_text(text, encoding="utf-8")
    done = run(*train, "--config", tmp_path / "k.toml", "--set", "max_train_steps=2", "--json")
    assert done.returncode == 0, done.stderr
    told = " ".join(event.message for event in lines(done.stdout) if isinstance(event, events.Warned))
    assert "cache_latents" in told and "AdamW8bit" in told
    record, = (tmp_path / "out" / "runs").iterdir()
    assert "lr_warmup_steps = 1\n" in (record / "settings.toml").read_text(encoding="utf-8")  # half of two steps


def test_json_can_be_read_back_whatever_the_consoles_encoding_is(run, train, tmp_path, images):
    (images / "日本.txt").write_text("é", encoding="utf-8")
    out = tmp_path / "日é"
    for arguments in ((*train, "--output-dir", out, "--set", "max_train_steps=1"), ("runs", "--output-dir", out),
                      ("inspect", out / "zzk.safetensors"), ("check", images)):
        done = run(*arguments, "--json")
        assert done.stdout.isascii() and done.stdout.strip()
    path, = {row["path"] for row in json.loads(run("runs", "--output-dir", out, "--json").stdout)}
    assert Path(path).is_file()


@pytest.mark.parametrize("arguments", [
    ("prepare", "{images}", "--to", "{long}"), ("diagnose", "{long}"), ("diagnose", "--out", "{long}"), ("inspect", "{long}"),
    ("check", "{long}"), ("train", "--checkpoint", "{long}.safetensors"), ("tag", "{long}", "--with", "filename")])
def test_a_path_that_is_too_long_is_a_sentence(run, images, arguments):
    done = run(*(argument.format(images=images, long="x" * 5000) for argument in arguments))
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("name", ["--data", "--output-dir", "--resume", "--config", "reg_data_dir", "network_weights"])
def test_a_folder_that_may_not_be_entered_is_a_sentence(run, train, tmp_path, monkeypatch, name):
    stat, closed = os.stat, str(tmp_path / "closed")

    def refusing(path, *arguments, **named):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(closed):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return stat(path, *arguments, **named)
    monkeypatch.setattr(os, "stat", refusing)  # root may enter every folder
    done = run(*train, *((name, f"{closed}/x") if name.startswith("--") else ("--set", f"{name}={closed}/x")))
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr


def test_a_tilde_on_the_command_line_is_the_users_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert str(tmp_path) in run("check", "~/nothing").stderr


def test_every_setting_is_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} = " in text for name in DECLARATIONS)


def test_settings_come_from_a_run_a_preset_or_a_lora_and_go_out_as_toml(run, train, tmp_path):
    assert run(*train, "--preset", "Quick try", "--set", "max_train_steps=1", "--json").returncode == 0
    record, = (tmp_path / "out" / "runs").iterdir()
    shown = run("settings", "--run", record.name, "--output-dir", tmp_path / "out")
    assert 'preset = "Quick try (version 1), changed"' in shown.stdout and "learning_rate = 0.0003" in shown.stdout
    again = run("settings", tmp_path / "out" / "zzk.safetensors", "--out", tmp_path / "again.toml")
    assert again.returncode == 0 and "a LoRA file" in again.stderr
    text = (tmp_path / "again.toml").read_text(encoding="utf-8")
    assert "learning_rate = 0.0003" in text and "preset" not in text
    info = json.loads(run("inspect", tmp_path / "out" / "zzk.safetensors", "--json").stdout)
    assert info["metadata"]["ss_preset"] == "Quick try (version 1), changed"
    assert run(*train, "--preset", "Nobody").returncode == run("settings", "--run", "nobody").returncode == 2
