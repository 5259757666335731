"""The settings of trackers, under kohya's names. A key is never a setting: settings are written into files."""

from __future__ import annotations

import dataclasses

from lib_lora_train.settings.field import setting


@dataclasses.dataclass(frozen=True)
class TrackingSettings:
    """Other programs that follow the run."""

    log_with: str = setting(
        "none", "Tracker", "Send losses, rates, samples and the verdict to TensorBoard or to Weights & Biases as well, or to "
        "all of them. Both are packages of their own. Weights & Biases sends them to its server, with the login that `wandb "
        "login` keeps on this machine.", choices=("none", "tensorboard", "wandb", "all"))
    logging_dir: str = setting(
        "", "Tracker folder", "Where trackers write their files. Empty is the folder logs in the run's own.", is_path=True)
    log_prefix: str = setting(
        "", "Prefix of tracker folders", "Put in front of the time that names a run's folder in the tracker folder.")
    log_tracker_name: str = setting(
        "network_train", "Tracker project", "The project at Weights & Biases, and TensorBoard's folder of a run in the tracker "
        "folder.")
    wandb_run_name: str = setting(
        "", "Run name at Weights & Biases", "Empty is the LoRA's name.")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The trackers to use, by the name of their package."""
        return {"none": (), "all": ("tensorboard", "wandb")}.get(self.log_with, (self.log_with,))


def unused_of_trackers(chosen: TrackingSettings) -> tuple[str, ...]:
    """The names of the settings that the trackers that are chosen do not look at."""
    if "wandb" in chosen.chosen:
        return ()
    return ("wandb_run_name",) if chosen.chosen else ("wandb_run_name", "logging_dir", "log_prefix", "log_tracker_name")
