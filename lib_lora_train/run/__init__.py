"""A run from its settings to a LoRA file: plan, job, record, resume, saves."""

RUNS_FOLDER = "runs"
"""Where the command line keeps the folders of runs: beside the results."""
PRESETS_FOLDER = "presets"
"""Where it looks for the user's presets, beside the runs."""
