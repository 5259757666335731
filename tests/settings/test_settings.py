"""Settings: read once, exactly, or refused in one sentence."""

import ast
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib_lora_train import settings
from lib_lora_train.errors import SettingError
from lib_lora_train.settings.toml import read_toml, write_toml


def test_every_setting_has_one_name_a_label_and_help():
    names = [d.name for area in settings.AREAS.values() for d in settings.declarations(area)]
    assert len(names) == len(set(names)) == len(settings.DECLARATIONS)
    labels = [d.label for d in settings.DECLARATIONS.values()]
    assert len(labels) == len(set(labels))
    for d in settings.DECLARATIONS.values():
        assert d.label and d.help.endswith("."), d.name
        assert d.type in (bool, int, float, str), d.name


def test_every_default_is_one_of_its_own_possible_values():
    for d in settings.DECLARATIONS.values():
        assert settings.read(d, d.default) == d.default


def test_values_of_older_files_are_still_read():
    assert settings.parse({"cuda_graphs": "auto"}).memory.cuda_graphs == "off"


def test_flat_is_the_inverse_of_parse():
    changed = {"network_dim": 32, "resolution": "768,512", "flip_aug": True, "learning_rate": 3e-5, "output_name": "zzk"}
    flat = settings.flat(settings.parse(changed))
    assert {name: flat[name] for name in changed} == changed
    assert settings.parse(flat) == settings.parse(changed)


@pytest.mark.parametrize("values, complaint", [
    ({"network_dimm": 4}, "network_dim"),
    ({"network_dim": 0}, "between 1 and 1024"),
    ({"network_dim": 4.5}, "whole number"),
    ({"network_dim": "four"}, "a number"),
    ({"network_dim": True}, "a number"),
    ({"learning_rate": math.nan}, "learning_rate"),
    ({"learning_rate": "1e999"}, "learning_rate"),
    ({"lr_scheduler": "cosin"}, "cosine_with_restarts"),
    ({"flip_aug": "maybe"}, "true or false"),
    ({"resolution": "12"}, "64"),
    ({"resolution": "5 12"}, "512"),
    ({"resolution": "512,512,512"}, "width,height"),
    ({"min_bucket_reso": 2048}, "max_bucket_reso"),
    ({"min_timestep": 500, "max_timestep": 500}, "499 or less"),
    ({"scale_v_pred_loss_like_noise_pred": True, "v_pred_like_loss": 0.5}, "v_pred_like_loss"),
    ({"preservation": "dop", "trigger_word": "zzk"}, "preservation_class"),
    ({"preservation": "dop", "preservation_class": "cat"}, "trigger_word"),
    ({"bucket_reso_steps": 12}, "multiple of 8"),
    ({"output_name": ["a"]}, "text"),
    ({"train_data_dir": "a\0b"}, "zero character"),
])
def test_what_is_not_possible_is_refused_by_name_with_the_reason(values, complaint):
    with pytest.raises(SettingError) as caught:
        settings.parse(values)
    assert next(iter(values)) in str(caught.value) and complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_from_a_command_line_becomes_the_settings_type():
    parsed = settings.parse({"network_dim": "32", "flip_aug": "yes", "learning_rate": "5e-5", "noise_offset": "0"})
    assert parsed.network.network_dim == 32 and parsed.dataset.flip_aug is True
    assert parsed.optimizer.learning_rate == 5e-5 and parsed.noise.noise_offset == 0.0


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("learning_rate", "0,0001", 1e-4), ("learning_rate", "5,5e-5", 5.5e-5), ("learning_rate", "'1e-4'", 1e-4),
    ("text_encoder_lr", [1e-4], 1e-4), ("text_encoder_lr", [5e-5, 5e-5], 5e-5), ("text_encoder_lr", "[1e-4]", 1e-4),
    ("network_dim", "16,0", 16), ("network_dim", "8", 8), ("resolution", [128, 256], "128,256"), ("resolution", [512], "512"),
    ("resolution", 512, "512"), ("lr_warmup_steps", 0.1, 0.1), ("lr_warmup_steps", "0,1", 0.1), ("lr_warmup_steps", 100.0, 100),
    ("v_parameterization", True, "on"), ("v_parameterization", "false", "off"), ("mixed_precision", "FP16", "fp16"),
    ("lr_scheduler", "Cosine", "cosine"), ("flip_aug", "TRUE", True), ("save_state", "False", False)])
def test_values_as_kohyas_files_have_them_are_understood(name, value, expected):
    read = settings.flat(settings.parse({name: value}))[name]
    assert read == expected and type(read) is type(expected)


@pytest.mark.parametrize(("name", "value"), [
    ("text_encoder_lr", [1e-4, 5e-5]), ("text_encoder_lr", []), ("max_train_steps", "1,000"), ("max_train_steps", "10,000"),
    ("learning_rate", "1,2,3"), ("lr_warmup_steps", 1.5), ("lr_warmup_steps", -0.1), ("network_dim", 0.5),
    ("output_name", ["a"]), ("resolution", [128, 128, 128]), ("resolution", ["a"])])
def test_values_that_may_mean_two_things_are_refused_by_name(name, value):
    with pytest.raises(SettingError, match=name):
        settings.parse({name: value})


@pytest.mark.parametrize("text", ["[512, 768]", "(512,768)", "512 x 768", "512,768"])
def test_a_size_is_read_in_each_way_that_people_write_it(text):
    assert settings.resolution_of(text, default=1) == (512, 768)


def test_an_alpha_of_0_is_the_rank_as_in_kohyas_scripts():
    assert settings.parse({"network_alpha": "0", "network_dim": 4}).network.network_alpha == 4.0


def test_a_tilde_is_the_users_folder_and_only_at_the_beginning(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    expected = {"~/a": "/home/me/a", "~": "/home/me", '"~/a b"': "/home/me/a b", "~a/b": "~a/b", "a~/~": "a~/~"}
    assert {text: settings.parse({"train_data_dir": text}).dataset.train_data_dir for text in expected} == expected
    assert settings.parse({"training_comment": "~/a"}).save.training_comment == "~/a"


def test_a_path_copied_by_windows_loses_its_quotes():
    assert settings.parse({"train_data_dir": '"C:\\my pictures\\zzk"'}).dataset.train_data_dir == "C:\\my pictures\\zzk"


@pytest.mark.parametrize("values, name", [
    ({"keep_tokens": 2}, "keep_tokens"),
    ({"token_warmup_min": 3}, "token_warmup_min"),
    ({"rotate_aug_variants": 8}, "rotate_aug_variants"),
    ({"rotate_aug_degrees": 5, "rotate_aug_variants": 8, "color_aug": True}, "rotate_aug_variants"),
    ({"lr_scheduler_num_cycles": 3}, "lr_scheduler_num_cycles"),
    ({"text_encoder_lr": 1e-5}, "text_encoder_lr"),
    ({"prior_loss_weight": 0.5}, "prior_loss_weight"),
    ({"cache_latents_to_disk": True, "random_crop": True}, "cache_latents_to_disk"),
    ({"cuda_graphs": "on", "color_aug": True}, "cuda_graphs"),
    ({"cuda_graphs": "on", "cpu_offload_checkpointing": True}, "cuda_graphs"),
    ({"enable_bucket": False, "max_bucket_reso": 2048}, "max_bucket_reso"),
    ({"enable_bucket": False, "bucket_reso_steps": 32}, "bucket_reso_steps"),
    ({"bucket_no_upscale": True, "max_bucket_reso": 2048}, "max_bucket_reso"),
    ({"unet_lr": 1e-4, "learning_rate": 1e-3}, "learning_rate"),
    ({"network_weights": "a.safetensors", "network_dim": 64}, "network_dim"),
    ({"network_weights": "a.safetensors", "network_alpha": 1}, "network_alpha"),
    ({"huber_c": 0.2}, "huber_c"),
    ({"loss_type": "l1", "huber_schedule": "constant"}, "huber_schedule"),
    ({"loss_type": "huber", "huber_scale": 2}, "huber_scale"),
    ({"adaptive_noise_scale": 0.1}, "adaptive_noise_scale"),
    ({"noise_offset_random_strength": True}, "noise_offset_random_strength"),
    ({"multires_noise_discount": 0.5}, "multires_noise_discount"),
    ({"ip_noise_gamma_random_strength": True}, "ip_noise_gamma_random_strength"),
    ({"conditioning_data_dir": "masks", "alpha_mask": True}, "conditioning_data_dir"),
    ({"unmasked_weight": 0.1}, "unmasked_weight"),
    ({"masked_prior_preservation_weight": 1}, "masked_prior_preservation_weight"),
    ({"preservation": "blank", "preservation_class": "cat"}, "preservation_class"),
    ({"preservation": "dco", "preservation_weight": 2}, "preservation_weight"),
    ({"dco_beta": 100}, "dco_beta"),
    ({"network_weights": "a.safetensors", "network_targets": "attention"}, "network_targets"),
    ({"network_targets": "attention", "conv_dim": 4}, "conv_dim"), ({"conv_alpha": 1}, "conv_alpha"),
])
def test_a_setting_without_effect_is_named(values, name):
    notes = settings.ignored(settings.parse(values))
    assert len(notes) == 1 and name in notes[0]


@pytest.mark.parametrize(("value", "sentence"), [
    (None, "Rank (network_dim) is empty: it must be a number; the default is 16."),
    (0.0, "Rank (network_dim) = 0 is not possible: it must lie between 1 and 1024; the default is 16."),
    (1.5, "Rank (network_dim) = 1.5 is not possible: it must be a whole number; the default is 16."),
])
def test_a_refused_value_is_named_as_the_page_and_as_the_command_line_call_it(value, sentence):
    with pytest.raises(SettingError) as refusal:
        settings.parse({"network_dim": value})
    assert str(refusal.value) == sentence


def test_every_message_names_settings_by_the_pages_label_with_kohyas_name_in_brackets():
    """Read from the sources: a text with a blank in it that holds a setting's name holds it as the page's user knows it."""
    shown = {name: f"{d.label} ({name})" for name, d in settings.DECLARATIONS.items() if "_" in name}
    raw = []
    for path in sorted(Path(settings.__file__).parents[1].rglob("*.py")):
        if path.name in ("kohya.py", "kohya_network.py"):
            continue  # they tell of a file in its own names
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value and node not in docs:
                rest = functools.reduce(lambda text, known: text.replace(known, ""), shown.values(), node.value)
                raw += [f"{path.name}:{node.lineno} {name}" for name in shown if re.search(rf"\b{name}\b", rest)]
    assert raw == []


def test_what_has_no_effect_is_said_in_the_pages_words():
    notes = settings.ignored(settings.parse({"unet_lr": 1e-4, "learning_rate": 1e-3}))
    assert notes == ["Learning rate (learning_rate) has no effect: UNet learning rate (unet_lr) takes its place."]


def test_defaults_ignore_nothing():
    assert settings.ignored(settings.Settings()) == []


def test_toml_gives_back_every_value_exactly(tmp_path):
    values = dict(settings.flat(settings.Settings()))
    values |= {"output_name": 'quote " backslash \\ 日本 \t end', "train_data_dir": "C:\\Bilder\\ä", "learning_rate": 1e-7,
               "training_comment": "line\nline \x7f"}
    file = tmp_path / "run.toml"
    file.write_text(write_toml(values), encoding="utf-8")
    assert read_toml(file) == values


def test_tables_are_only_for_the_reader_and_a_name_may_stand_once(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[network]\nnetwork_dim = 4\n[training]\nseed = 7\n", encoding="utf-8-sig")
    assert read_toml(file) == {"network_dim": 4, "seed": 7}
    file.write_text("seed = 1\n[training]\nseed = 7\n", encoding="utf-8")
    with pytest.raises(SettingError, match="twice"):
        read_toml(file)


@pytest.mark.parametrize("content", [b"network_dim = ", b"\xff\xfe\x00", b"[[[[", b"a = {" * 2000])
def test_what_is_not_toml_is_refused_by_file_name(tmp_path, content):
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(SettingError, match="broken.toml"):
        read_toml(file)


@pytest.mark.parametrize("name", ["trigger_word", "training_comment", "output_name", "output_dir", "network_weights", "resume"])
def test_text_that_is_not_utf8_is_refused_by_name_and_a_folder_that_is_only_read_is_not(name):
    """On Linux an argument or a file's name may be any bytes; Python makes lone surrogates of those that are not UTF-8."""
    with pytest.raises(SettingError, match=rf"\({name}\) = .*is not possible: it is not text in UTF-8"):
        settings.parse({name: "caf\udce9"})
    assert settings.parse({"train_data_dir": "10_caf\udce9"}).dataset.train_data_dir == "10_caf\udce9"


@pytest.mark.skipif(sys.platform == "win32", reason="names are Unicode there")
def test_a_locale_that_cannot_hold_a_text_is_told_and_not_taken_for_bad_bytes():
    """LC_ALL=C with Python's own cures switched off: its arguments and names of files are ASCII."""
    script = ("import sys\nfrom lib_lora_train.errors import UserError\nfrom lib_lora_train.settings import parse\n"
              "for attempt in (lambda: parse({'trigger_word': sys.argv[1]}), lambda: parse({'output_dir': '/\\xe9'}),\n"
              "                lambda: parse({'output_name': '\\xe9'})):\n"
              "    try:\n        attempt()\n    except UserError as error:\n        print(ascii(str(error)))\n"
              "print(parse({'training_comment': '\\xe9'}).save.training_comment == '\\xe9')")
    done = subprocess.run([sys.executable, "-c", script, "\u00e9".encode()], cwd=Path(settings.__file__).parents[2], text=True,
                          capture_output=True, check=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    *refused, comment = done.stdout.splitlines()
    assert len(refused) == 3 and all("as the locale says" in text and "ascii" in text for text in refused), done.stdout
    assert comment == "True"
