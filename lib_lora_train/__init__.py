"""Train LoRAs on a model that is already loaded: see README.md and `run/job.py`."""

__version__ = "0.1.0"
